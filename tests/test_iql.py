"""iql.py: expectiles, targets and weights by hand, which loss reaches which network, reading data, and exact tables."""

import copy
import json
import math
import shutil
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, call
from gymnasium.envs.registration import EnvSpec

from algorithms import cql, decision_transformer, iql

SHIPPED = ROOT / "benchmark" / "offline" / "frozenlake"
BOX = gym.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 1], np.float32))
DISCRETE = gym.spaces.Discrete(3)
each_kind = pytest.mark.parametrize("space", [DISCRETE, BOX], ids=["discrete", "box"])


def make_agent(space, obs_dim=4, seed=0):
    torch.manual_seed(seed)
    return iql.make_agent(iql.Args(), (obs_dim,), space)


def make_optimizers(agent, rate=1e-2):
    actor = [*agent.actor.parameters(), agent.log_std]
    return {
        "actor_optimizer": torch.optim.Adam(actor, rate, fused=True),
        "critic_optimizer": torch.optim.Adam(agent.critics.parameters(), rate, fused=True),
        "value_optimizer": torch.optim.Adam(agent.value.parameters(), rate, fused=True),
    }


def random_batch(space, size=32, obs_dim=4, seed=1):
    rng = np.random.default_rng(seed)
    actions = rng.integers(3, size=size) if space is DISCRETE else rng.uniform(-1, 1, (size, 2)).astype(np.float32)
    ends = rng.integers(2, size=(2, size)).astype(np.float32)
    batch = {
        "observations": rng.normal(size=(size, obs_dim)).astype(np.float32), "actions": actions,
        "rewards": rng.normal(size=size).astype(np.float32), "terminations": ends[0], "truncations": ends[1],
        "next_observations": rng.normal(size=(size, obs_dim)).astype(np.float32),
    }  # fmt: skip
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def parameters(*modules):
    return [p.detach().clone() for module in modules for p in module.parameters()]


# ---- Equations


def expectile_of(samples, expectile):
    """The v with the smallest loss, by bisection of the slope, which autograd gives."""
    low, high = min(samples), max(samples)
    for _ in range(60):
        v = torch.tensor((low + high) / 2, dtype=torch.float64, requires_grad=True)
        iql.expectile_loss(torch.tensor(samples, dtype=torch.float64) - v, expectile).backward()
        low, high = (v.item(), high) if v.grad < 0 else (low, v.item())
    return low


def test_expectiles_from_the_mean_to_the_largest():
    samples = [0.0, 1.0, 2.0, 10.0]
    assert expectile_of(samples, 0.5) == pytest.approx(3.25)
    # 0.9 times the distances above equal 0.1 times those below: 0.9 (10 - v) = 0.1 (3 v - 3)
    assert expectile_of(samples, 0.9) == pytest.approx(9.3 / 1.2)
    found = [expectile_of(samples, e) for e in (0.5, 0.7, 0.9, 0.99, 0.9999)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(10, abs=0.01)
    for e in 0.2, 0.7, 0.95:
        assert expectile_of([0.0, 1.0], e) == pytest.approx(e), "of a fair coin"


def test_the_loss_of_an_expectile_by_hand():
    difference = torch.tensor([2.0, -1.0, 0.0, -3.0])
    assert iql.expectile_loss(difference, 0.7).item() == pytest.approx((0.7 * 4 + 0.3 * 1 + 0 + 0.3 * 9) / 4)


def test_targets_by_hand():
    rewards, terminated, values = torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, 0.0], [4.0, 8.0, 0.0]])
    assert iql.td_target(rewards, terminated, values, 0.5).tolist() == [3.0, 2.0, 0.5]
    with pytest.raises(AssertionError):
        iql.td_target(rewards[:, None], terminated, values, 0.5)


def test_weights_are_clipped_after_the_exponential():
    advantages = torch.tensor([-1.0, 0.0, 1.0, 1.6, 50.0, 1e6])
    weights = iql.policy_weights(advantages, 3.0, 100.0)
    expected = [math.exp(-3), 1.0, math.exp(3), 100.0, 100.0, 100.0]
    torch.testing.assert_close(weights, torch.tensor(expected))
    assert iql.policy_weights(advantages, 0.0, 100.0).tolist() == [1.0] * 6


def test_rewards_are_scaled_by_the_returns_of_episodes():
    data = {"rewards": [1, 2, 3, -1, 5, 0], "terminations": [0, 1, 0, 0, 0, 0], "truncations": [0, 0, 0, 1, 0, 1]}
    data = {name: torch.tensor(values, dtype=torch.float32) for name, values in data.items()}
    assert iql.reward_scale(data, 100.0) == pytest.approx(100 / (3 - 2)), "returns 3, 2; the last, 5, may be cut"
    whole = data | {"terminations": torch.tensor([0.0, 1, 0, 0, 0, 1])}
    assert iql.reward_scale(whole, 100.0) == pytest.approx(100 / (5 - 2))
    assert iql.reward_scale(whole, 0.0) == 1
    assert iql.reward_scale(whole | {"rewards": torch.zeros(6)}, 100.0) == 1
    one = {name: values[2:4] for name, values in data.items()}
    assert iql.reward_scale(one, 100.0) == 1, "a single episode, also if it is cut"
    both = {"rewards": torch.tensor([500.0, 1500.0]), "terminations": torch.zeros(2), "truncations": torch.ones(2)}
    assert iql.reward_scale(both, 1000.0) == 1, "of two, none is left out"
    assert iql.reward_scale(both, 100.0) == pytest.approx(0.1)
    tenths = torch.tensor([0.1] * 10 + [0.5, 0.5])  # two returns of 1, but for rounding
    ends = torch.zeros(12).scatter(0, torch.tensor([9, 11]), 1)
    equal = {"rewards": tenths + 1e-7 * ends, "terminations": ends, "truncations": torch.zeros(12)}
    assert iql.reward_scale(equal, 100.0) == 1, "rounding is no difference"


def test_log_probabilities_of_both_policies():
    obs = torch.randn(7, 4)
    agent = make_agent(DISCRETE)
    actions = torch.tensor([0, 1, 2, 2, 1, 0, 1])
    expected = torch.distributions.Categorical(logits=agent.actor(obs)).log_prob(actions)
    torch.testing.assert_close(agent.log_prob(obs, actions), expected)
    agent = make_agent(BOX)
    agent.log_std.data = torch.tensor([-0.5, 9.0])
    actions = torch.rand(7, 2) * 2 - 1
    normal = torch.distributions.Normal(agent.actor(obs).tanh(), torch.tensor([-0.5, 2.0]).exp())
    torch.testing.assert_close(agent.log_prob(obs, actions), normal.log_prob(actions).sum(-1))
    assert agent.log_prob(obs, torch.ones(7, 2)).isfinite().all(), "also at the bounds"


def test_actions_are_those_of_the_environment():
    agent = make_agent(gym.spaces.Discrete(3, start=5))
    obs = np.random.default_rng(0).normal(size=(6, 4))
    assert agent.act(obs).tolist() == (5 + agent.actor(torch.tensor(obs).float()).argmax(-1)).tolist()
    assert agent.act(obs[0]) == agent.act(obs)[0]
    agent = make_agent(BOX)
    mean = agent.actor(torch.tensor(obs).float()).tanh().detach().numpy()
    np.testing.assert_allclose(agent.act(obs), np.array([0, 0.5]) + mean * np.array([2, 0.5]), rtol=1e-5)


# ---- A gradient step


@each_kind
def test_each_loss_reaches_its_own_network_alone(space):
    """The gradients that a step leaves are those of each loss by itself: V's touches no Q, and Q's touches no V."""
    args, agent, batch = iql.Args(expectile=0.8, tau=0.005), make_agent(space), random_batch(space)
    obs, actions, next_obs = batch["observations"], batch["actions"], batch["next_observations"]
    for critic in agent.target_critics:  # so that Q' is not Q
        critic[-1].bias.data += torch.randn(critic[-1].bias.shape)
    hand, optimizers = copy.deepcopy(agent), make_optimizers(agent)
    iql.update(agent, optimizers, batch, args)
    assert all(p.grad is None for p in agent.target_critics.parameters())

    target_q = hand.q(hand.target_critics, obs, actions).detach()
    target_q = torch.minimum(*target_q)
    difference = target_q - hand.v(obs)
    loss = sum((0.8 if x > 0 else 0.2) * x**2 for x in difference) / len(difference)
    gradients = torch.autograd.grad(loss, [*hand.value.parameters()])
    torch.testing.assert_close([p.grad for p in agent.value.parameters()], [*gradients])

    v, next_v = agent.v(obs).detach(), agent.v(next_obs).detach()  # V has made its step before the others use it
    weights = (3 * (target_q - v)).exp().clamp(max=100)
    gradients = torch.autograd.grad(-(weights * hand.log_prob(obs, actions)).mean(), [*hand.actor.parameters()])
    torch.testing.assert_close([p.grad for p in agent.actor.parameters()], [*gradients])

    y = batch["rewards"] + 0.99 * torch.where(batch["terminations"] == 1, 0.0, next_v)
    loss = sum((q - y).square().mean() for q in hand.q(hand.critics, obs, actions))
    gradients = torch.autograd.grad(loss, [*hand.critics.parameters()])
    torch.testing.assert_close([p.grad for p in agent.critics.parameters()], [*gradients])

    expected = [0.995 * old + 0.005 * new for old, new in zip(
        hand.target_critics.parameters(), agent.critics.parameters(), strict=True)]  # fmt: skip
    torch.testing.assert_close([*agent.target_critics.parameters()], expected)


def after_a_step(space, **changes):
    agent, batch = make_agent(space), random_batch(space)
    iql.update(agent, make_optimizers(agent), batch | changes, iql.Args())
    return parameters(agent)


@each_kind
def test_terminations_mask_the_bootstrap_and_truncations_do_not(space):
    plain = after_a_step(space)
    for name, changes in ("truncations", False), ("terminations", True):
        flipped = 1 - random_batch(space)[name]
        other = after_a_step(space, **{name: flipped})
        assert any(not torch.equal(a, b) for a, b in zip(plain, other, strict=True)) == changes, name


@each_kind
def test_expectile_one_half_and_temperature_zero_is_behaviour_cloning(space):
    """To the bit: the policy is that of a program which maximises log pi(a|s) and has no values."""
    args = iql.Args(expectile=0.5, temperature=0)
    agent = make_agent(space)
    cloned, optimizers = copy.deepcopy(agent), make_optimizers(agent)
    optimizer = torch.optim.Adam([*cloned.actor.parameters(), cloned.log_std], 1e-2, fused=True)
    for seed in range(20):
        batch = random_batch(space, seed=seed)
        iql.update(agent, optimizers, batch, args)
        loss = -cloned.log_prob(batch["observations"], batch["actions"]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for a, b in zip(agent.actor.parameters(), cloned.actor.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(agent.log_std, cloned.log_std)
    assert not torch.equal(agent.critics[0][0].weight, cloned.critics[0][0].weight), "it has learned values beside it"


# ---- Data


def write(folder, env_id=None, **changes):
    """Five transitions of FrozenLake in two episodes; a change of None leaves an array out."""
    data = {
        "observations": np.array([0, 1, 0, 4, 8]), "actions": np.array([2, 0, 1, 1, 3]),
        "rewards": np.array([0.0, 0, 0, 0, 1]), "terminations": np.array([0, 0, 0, 0, 1], bool),
        "truncations": np.array([0, 1, 0, 0, 0], bool), "next_observations": np.array([1, 2, 4, 8, 12]),
    } | changes  # fmt: skip
    folder.mkdir(exist_ok=True, parents=True)
    np.savez(folder / "data.npz", **{name: array for name, array in data.items() if array is not None})
    if env_id:
        (folder / "data.json").write_text(json.dumps({"env_id": env_id}))
    return folder


def read(dataset, env_id="FrozenLake-v1"):
    args = iql.Args(env_id=env_id, dataset=str(dataset))
    with closing(iql.make_env(args)) as env:
        return iql.read_dataset(args, env)


def test_states_become_one_hot_and_nothing_is_shuffled(tmp_path):
    for dataset in write(tmp_path / "d", "FrozenLake-v1"), tmp_path / "d" / "data.npz":
        data = read(dataset)
        assert [*data] == [*iql.ARRAYS]
        assert torch.equal(data["observations"], torch.eye(16)[[0, 1, 0, 4, 8]])
        assert torch.equal(data["next_observations"], torch.eye(16)[[1, 2, 4, 8, 12]])
        assert data["actions"].tolist() == [2, 0, 1, 1, 3]
        assert data["rewards"].tolist() == [0, 0, 0, 0, 1]
        assert data["terminations"].tolist() == [0, 0, 0, 0, 1]
        assert data["truncations"].tolist() == [0, 1, 0, 0, 0]
    one_hot = np.eye(16)
    again = write(tmp_path / "e", observations=one_hot[[0, 1, 0, 4, 8]], next_observations=one_hot[[1, 2, 4, 8, 12]])
    assert torch.equal(read(again)["observations"], data["observations"]), "as the other scripts see it"


def test_actions_of_a_box_are_scaled_to_plus_and_minus_one(tmp_path):
    obs = np.arange(18, dtype=np.float64).reshape(6, 3)
    changes = {"observations": obs[:5], "next_observations": obs[1:], "actions": np.array([[-2.0], [0], [1], [2], [2]])}
    data = read(write(tmp_path / "d", "Pendulum-v1", **changes), "Pendulum-v1")
    assert data["actions"].tolist() == [[-1], [0], [0.5], [1], [1]]
    assert data["observations"].dtype == data["actions"].dtype == torch.float32
    with pytest.raises(iql.UsageError, match="beyond Box"):
        read(write(tmp_path / "e", **changes | {"actions": changes["actions"] * 1.1}), "Pendulum-v1")
    with pytest.raises(iql.UsageError, match="observations"):
        read(write(tmp_path / "f", **changes), "MountainCarContinuous-v0")


def test_an_action_with_one_possible_value_and_numbers_in_a_column(tmp_path):
    obs = np.arange(18, dtype=np.float64).reshape(6, 3)
    changes = {"observations": obs[:5], "next_observations": obs[1:], "actions": np.tile([[1.0, 3.0]], (5, 1))}
    data = read(write(tmp_path / "d", **changes), "Fixed-v0")
    assert data["actions"].tolist() == [[0, -1]] * 5
    column = write(tmp_path / "e", actions=np.array([[2], [0], [1], [1], [3]]))
    assert read(column)["actions"].tolist() == [2, 0, 1, 1, 3]


class Fixed(gym.Env):
    observation_space = gym.spaces.Box(-99, 99, (3,), np.float32)
    action_space = gym.spaces.Box(np.array([0, 3], np.float32), np.array([2, 3], np.float32))


gym.register("Fixed-v0", Fixed, disable_env_checker=True)


class Shifted(gym.Env):
    observation_space, action_space = gym.spaces.Discrete(3, start=7), gym.spaces.Discrete(2, start=-1)


gym.register("Shifted-v0", Shifted, disable_env_checker=True)


def test_numbers_may_start_elsewhere(tmp_path):
    states, actions = np.array([7, 9, 8, 7, 9]), np.array([-1, 0, 0, -1, 0])
    folder = write(tmp_path / "d", observations=states, next_observations=states, actions=actions,
                   truncations=np.ones(5))  # fmt: skip
    data = read(folder, "Shifted-v0")
    assert data["actions"].tolist() == [0, 1, 1, 0, 1]
    assert torch.equal(data["observations"], torch.eye(3)[[0, 2, 1, 0, 2]])


NAN = np.array([0, 0, np.nan, 0, 1])
WRONG = {
    "a short array": ({"actions": np.array([1, 2])}, "actions"),
    "rewards in a column": ({"rewards": np.zeros((5, 1))}, "rewards"),
    "terminations in a column": ({"terminations": np.zeros((5, 1))}, "terminations"),
    "no transitions": ({name: np.zeros(0) for name in iql.ARRAYS}, "rewards"),
    "one number": ({"rewards": np.array(1.0)}, "rewards"),
    "NaN": ({"rewards": NAN}, "NaN or infinity in rewards"),
    "infinity": ({"observations": NAN + np.inf}, "observations"),
    "a number beyond float32": ({"rewards": np.array([0, 0, 1e39, 0, 1])}, "NaN or infinity in rewards"),
    "words": ({"actions": np.array(["left"] * 5)}, "actions"),
    "objects": ({"actions": np.array([None] * 5)}, "allow_pickle"),
    "a missing array": ({"truncations": None}, "truncations"),
    "an unknown action": ({"actions": np.array([0, 1, 2, 3, 4])}, "actions from 0 to 4"),
    "half an action": ({"actions": np.array([0, 1, 2, 3, 0.5])}, "actions"),
    "an unknown state": ({"observations": np.array([0, 1, 0, 4, 16])}, "observations"),
    "vectors": ({"observations": np.zeros((5, 3))}, "observations (5, 3)"),
    "half an end": ({"terminations": np.array([0, 0, 0.5, 0, 1])}, "0 or 1"),
    "two ends": ({"terminations": np.array([0, 0, 0, 0, 2])}, "0 or 1"),
    "a jump within an episode": ({"next_observations": np.array([1, 2, 5, 8, 12])}, "row [2]"),
    "an episode that goes on": ({"truncations": np.zeros(5)}, "row [1]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_get_one_line(case, tmp_path, cli):
    changes, word = WRONG[case]
    code, _, err = cli("iql", "--dataset", write(tmp_path / "d", **changes))
    assert code == 2, err
    assert word in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("module", [iql, cql, decision_transformer])
def test_an_action_may_lie_beyond_its_bound_by_a_thousandth_of_the_range(module, tmp_path):
    """By a rounding. In a range of a thousandth, three times the bound is no rounding."""
    args = module.Args(dataset=str(tmp_path / "d.npz"), env_id="fault_envs:ActsTiny-box-v0")
    with closing(module.make_env(args)) as env:
        for beyond, fits in (1.0005, True), (3, False):
            arrays = {"observations": np.zeros((5, 3)), "next_observations": np.zeros((5, 3)), "rewards": np.zeros(5)}
            arrays |= {"terminations": np.zeros(5), "truncations": [0, 0, 0, 0, 1], "actions": np.zeros((5, 2))}
            arrays["actions"][2, 1] = -5e-4 * beyond
            np.savez(tmp_path / "d.npz", **arrays)
            if fits:
                assert module.read_dataset(args, env)["actions"].min() == -1
            else:
                with pytest.raises(module.UsageError, match="clip these first"):
                    module.read_dataset(args, env)


@pytest.mark.parametrize("module", [iql, cql, decision_transformer])
def test_too_many_vectors_for_the_memory_are_refused_before_they_are_made(module, tmp_path, monkeypatch):
    """Five rows of 16 numbers, twice, in four bytes each: 640 bytes."""
    folder = write(tmp_path / "d")
    args = module.Args(dataset=str(folder))
    with closing(module.make_env(args)) as env:
        for memory, fits in (712, True), (710, False):
            monkeypatch.setattr(module.os, "sysconf", {"SC_PHYS_PAGES": memory, "SC_PAGE_SIZE": 1}.get, raising=False)
            if fits:
                assert module.read_dataset(args, env)["observations"].shape == (5, 16)
            else:
                monkeypatch.setattr(module.np, "eye", None)
                with pytest.raises(module.UsageError, match="this machine has"):
                    module.read_dataset(args, env)


def test_data_of_another_environment_and_files_that_are_none(tmp_path):
    with pytest.raises(iql.UsageError, match="made in CliffWalking-v1, not FrozenLake-v1: name that --env-id"):
        read(write(tmp_path / "d", "CliffWalking-v1"))
    (tmp_path / "text.npz").write_text("no archive")
    for wrong in "text.npz", "missing.npz":
        with pytest.raises(iql.UsageError, match="can't be read"):
            read(tmp_path / wrong)
    for wrong in "[]", '{"env_id"':
        (tmp_path / "d" / "data.json").write_text(wrong)
        with pytest.raises(iql.UsageError, match="can't be read"):
            read(tmp_path / "d")
    (tmp_path / "d" / "data.json").write_text("{}")
    assert len(read(tmp_path / "d")["rewards"]) == 5


def test_a_module_before_the_id_makes_no_other_environment(tmp_path):
    for made_in in "FrozenLake-v1", "gymnasium:FrozenLake-v1":
        data = read(write(tmp_path / "d", made_in), "gymnasium:FrozenLake-v1")
        assert len(data["rewards"]) == 5
    with pytest.raises(iql.UsageError, match="not gymnasium:FrozenLake-v1"):
        read(write(tmp_path / "d", "Lake-v1"), "gymnasium:FrozenLake-v1")


def test_minari_is_asked_for_only_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(iql.UsageError, match="pip install 'minari"):
        read("mujoco/hopper/medium-v0")


@pytest.fixture
def minari(monkeypatch):
    """What the script uses of the package: two episodes, of two and of three steps."""
    arrays = np.load(write(Path("plain")) / "data.npz")
    names = "actions", "rewards", "terminations", "truncations"
    episodes = [
        SimpleNamespace(**{name: arrays[name][a:b] for name in names},
                        observations=np.append(arrays["observations"][a:b], arrays["next_observations"][b - 1]))
        for a, b in ((0, 2), (2, 5))
    ]  # fmt: skip
    stored = SimpleNamespace(iterate_episodes=lambda: iter(episodes), env_spec=EnvSpec("FrozenLake-v1"))
    asked = []
    opened = lambda which: (asked.append(str(which)), stored)[1]  # noqa: E731
    module = SimpleNamespace(MinariDataset=opened, load_dataset=opened)
    monkeypatch.setitem(sys.modules, "minari", module)
    return asked, stored


def test_minaris_episodes_are_the_same_transitions(minari, tmp_path):
    asked, stored = minari
    (tmp_path / "lake-v0" / "data").mkdir(parents=True)
    plain = read(tmp_path / "plain")
    for dataset in "lake/random-v0", tmp_path / "lake-v0", tmp_path / "lake-v0" / "data":
        data = read(dataset)
        assert all(torch.equal(data[name], plain[name]) for name in iql.ARRAYS)
    folder = str(tmp_path / "lake-v0" / "data")
    assert asked == ["lake/random-v0", folder, folder]
    stored.env_spec = EnvSpec("CliffWalking-v1")
    with pytest.raises(iql.UsageError, match="made in CliffWalking-v1, not FrozenLake-v1: name that --env-id"):
        read("lake/random-v0")


def test_minaris_dicts_of_observations_become_vectors_in_the_environments_order(minari):
    _, stored = minari
    space, n = gym.make("goal_env:Point-v0").observation_space, 5
    space.seed(1)
    seen = [space.sample() for _ in range(n + 1)]
    ends = np.zeros(n, bool)
    episode = SimpleNamespace(actions=np.zeros((n, 2), np.float32), rewards=np.ones(n), terminations=ends)
    episode.truncations = np.arange(n) == n - 1
    episode.observations = {key: np.stack([obs[key] for obs in seen]) for key in sorted(space, reverse=True)}
    stored.iterate_episodes = lambda: iter([episode, episode])
    stored.env_spec = EnvSpec("Point-v0")
    with pytest.raises(iql.UsageError, match="made in Point-v0, not FrozenLake-v1: name that --env-id"):
        read("maze")
    data = read("maze", "goal_env:Point-v0")
    flat = torch.from_numpy(np.stack([gym.spaces.flatten(space, obs) for obs in seen]))
    assert torch.equal(data["observations"], torch.cat([flat[:-1], flat[:-1]]))
    assert torch.equal(data["next_observations"], torch.cat([flat[1:], flat[1:]]))


@pytest.mark.parametrize("module", [iql, cql, decision_transformer])
def test_options_of_minaris_environment_are_named_where_evaluations_lack_them(minari, module, capsys):
    """No flag carries them; in silence, the agent would be judged on other ice."""
    _, stored = minari
    for options, named in (
        ({}, False),
        ({"map_name": "4x4", "render_mode": "ansi"}, False),
        ({"is_slippery": False}, True),
    ):
        stored.env_spec = EnvSpec("FrozenLake-v1", kwargs=options)
        args = module.Args(dataset="lake")
        with closing(module.make_env(args)) as env:
            module.read_dataset(args, env)
        printed = capsys.readouterr().out
        assert (
            "was made in FrozenLake-v1 with {'is_slippery': False}; evaluations are without these" in printed
        ) == named
    stored.env_spec = None
    assert len(read("lake")["rewards"]) == 5


def test_an_episode_of_minari_ends_where_its_file_says(minari):
    """Some flag only terminations. Two episodes must not become one where the next begins in the last state."""
    _, stored = minari
    episodes = list(stored.iterate_episodes())
    plain = read("lake")
    for episode in episodes:
        episode.truncations = np.zeros(len(episode.rewards), bool)
    stored.iterate_episodes = lambda: iter(episodes)
    assert torch.equal(read("lake")["truncations"], plain["truncations"])
    assert plain["truncations"].tolist() == [0, 1, 0, 0, 0]


def test_the_package_minari_itself(tmp_path, monkeypatch):
    """Where it is installed: a data set that it has written."""
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    arrays = np.load(write(Path("plain")) / "data.npz")
    buffers = []
    for number, (a, b) in enumerate(((0, 2), (2, 5))):
        part = {name: arrays[name][a:b] for name in ("actions", "rewards", "terminations", "truncations")}
        observations = np.append(arrays["observations"][a:b], arrays["next_observations"][b - 1])
        buffers.append(minari.data_collector.EpisodeBuffer(
            id=number, observations=list(observations), infos=None,
            **{name: list(array) for name, array in part.items()}))  # fmt: skip
    minari.create_dataset_from_buffers("lake/mixed-v0", buffer=buffers, env="FrozenLake-v1", data_format="hdf5")
    for dataset in "lake/mixed-v0", tmp_path / "minari" / "lake" / "mixed-v0":
        data = read(dataset)
        assert all(torch.equal(data[name], read(tmp_path / "plain")[name]) for name in iql.ARRAYS)


def test_copied_alone_it_says_what_to_give_it(tmp_path):
    folder = tmp_path / "some" / "where"
    folder.mkdir(parents=True)
    result = call(Path(shutil.copy(ROOT / "algorithms" / "iql.py", folder)))
    assert result.returncode == 2
    place = tmp_path / "some" / "benchmark" / "offline" / "frozenlake"
    assert result.stderr.startswith(
        (f"error: no .npz file at --dataset {place}", f"error: --dataset {place} can't be read")
    )
    assert result.stderr.count("\n") == 1


# ---- Runs

QUICK = ["--total-timesteps", 40, "--eval-episodes", 2, "--batch-size", 8]


def test_the_normaliser_is_the_datas_and_frozen(cli, tmp_path):
    assert cli("iql", *QUICK, "--norm-obs", "--run-dir", "run")[0] == 0
    agent, obs = iql.load("run"), read(SHIPPED)["observations"]
    torch.testing.assert_close(agent.normalize.mean, obs.mean(0))
    torch.testing.assert_close(agent.normalize.std, obs.std(0, unbiased=False) + 1e-3)
    normal = agent.normalize(obs)
    torch.testing.assert_close(normal.mean(0), torch.zeros(16), atol=1e-4, rtol=0)
    assert agent.normalize.mean.requires_grad is False
    assert cli("iql", *QUICK, "--run-dir", "plain")[0] == 0
    assert torch.equal(iql.load("plain").normalize(obs), obs)


def test_a_resumed_run_speaks_of_no_episodes(cli, monkeypatch):
    """Training plays none, so there is none to play again."""
    assert cli("iql", *QUICK, "--run-dir", "run")[0] == 0
    code, out, err = cli("iql", "--run-dir", "run", "--resume", "--total-timesteps", 60)
    assert code == 0, err
    assert "replayed" not in out + err


@pytest.mark.parametrize("episodes", [1, 3])
def test_an_evaluation_has_eval_episodes(cli, monkeypatch, episodes):
    makes, make_env = [], iql.make_env
    monkeypatch.setattr(iql, "make_env", lambda *args: makes.append(args) or make_env(*args))
    assert cli("iql", *QUICK, "--eval-frequency", 40, "--eval-episodes", episodes, "--run-dir", "run")[0] == 0
    assert len(makes) == 1 + episodes, "and one that shows its spaces"


def test_the_policys_learning_rate_falls_along_a_cosine(cli):
    assert cli("iql", *QUICK, "--total-timesteps", 400, "--run-dir", "run")[0] == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    rates = [row["charts/learning_rate"] for row in rows if "charts/learning_rate" in row]
    rate = iql.Args.learning_rate
    expected = [rate * (1 + math.cos(math.pi * step / 400)) / 2 for step in (99, 199, 299, 399)]
    assert rates == pytest.approx(expected)


# ---- Tables, against exact values


def best_of_the_logs(data, num_states, num_actions, gamma=0.99):
    """Value iteration on the model that the logs count out, over the actions that they have: the policy, (S,)."""
    s, a, r, ended, _, s2 = (data[name] for name in iql.ARRAYS)
    count, pay = np.zeros((num_states, num_actions)), np.zeros((num_states, num_actions))
    lead = np.zeros((num_states, num_actions, num_states))
    np.add.at(count, (s, a), 1)
    np.add.at(pay, (s, a), r)
    np.add.at(lead, (s[~ended], a[~ended], s2[~ended]), 1)
    n, v = np.maximum(count, 1), np.zeros(num_states)
    for _ in range(2000):
        q = np.where(count > 0, pay / n + gamma * (lead / n[..., None]) @ v, -np.inf)
        v = np.where(count.sum(1) > 0, q.max(1), 0.0)
    return q.argmax(1)


def exact_return(policy, env_id, steps=100):
    """The expected return of a deterministic policy, (S,), within a time limit: from the environment's own table."""
    with closing(gym.make(env_id)) as env:
        table, start = env.unwrapped.P, env.unwrapped.initial_state_distrib
    v = np.zeros(len(policy))
    for _ in range(steps):
        v = np.array([sum(p * (r + v[s2] * (not end)) for p, s2, r, end in table[s][int(policy[s])]) for s in table])
    return float(np.dot(start, v))


def most_frequent(data, num_states, num_actions):
    """What behaviour cloning aims at: (S,)"""
    count = np.zeros((num_states, num_actions))
    np.add.at(count, (data["observations"], data["actions"]), 1)
    return count.argmax(1)


def walk_the_cliff(num_steps=10_000):
    """Half of the actions are random, the others take the long way round, two rows above the cliff."""
    way, rng = {36: 0, 24: 0, 23: 2, 35: 2} | dict.fromkeys(range(12, 23), 1), np.random.default_rng(5)
    with closing(gym.make("CliffWalking-v1", max_episode_steps=100)) as env:
        rows, (obs, _) = [], env.reset(seed=0)
        for _ in range(num_steps):
            action = way.get(obs, int(rng.integers(4))) if rng.random() < 0.5 else int(rng.integers(4))
            next_obs, reward, terminated, truncated, _ = env.step(action)
            rows.append((obs, action, float(reward), terminated, truncated, next_obs))
            obs = env.reset()[0] if terminated or truncated else next_obs
    data = {name: np.array(values) for name, values in zip(iql.ARRAYS, zip(*rows, strict=True), strict=True)}
    data["truncations"][-1] = True
    return data


def test_what_the_logs_teach_is_known_exactly():
    lake, cliff = dict(np.load(SHIPPED / "data.npz")), walk_the_cliff()
    assert exact_return(best_of_the_logs(lake, 16, 4), "FrozenLake-v1") == pytest.approx(0.7402, abs=1e-4)
    assert exact_return(most_frequent(lake, 16, 4), "FrozenLake-v1") == 0, "cloning never arrives"
    assert exact_return(best_of_the_logs(cliff, 48, 4), "CliffWalking-v1") == -13
    assert exact_return(most_frequent(cliff, 48, 4), "CliffWalking-v1") == -15


@pytest.mark.slow
@pytest.mark.parametrize(("env_id", "num_states", "flags"), [
    ("FrozenLake-v1", 16, {}), ("CliffWalking-v1", 48, {"return_range": 0, "expectile": 0.9995}),
])  # fmt: skip
def test_the_policy_is_the_best_within_the_logs(env_id, num_states, flags, tmp_path, monkeypatch):
    """With small networks, which are quick: within three per cent. A fall costs 100, so 0.98 would fear the edge."""
    layers = lambda i, o: [torch.nn.Linear(i, 64), torch.nn.ReLU(), torch.nn.Linear(64, o)]  # noqa: E731
    monkeypatch.setattr(iql, "network", lambda i, o: torch.nn.Sequential(*layers(i, o)))
    data = dict(np.load(SHIPPED / "data.npz")) if env_id == "FrozenLake-v1" else walk_the_cliff()
    np.savez("logs.npz", **data)
    args = iql.Args(env_id=env_id, dataset="logs.npz", run_dir="run", total_timesteps=8000, eval_frequency=8000,
                    eval_max_steps=200, learning_rate=3e-3, **flags)  # fmt: skip
    iql.train(args)
    value = exact_return(iql.load("run").act(np.eye(num_states)), env_id)
    best = exact_return(best_of_the_logs(data, num_states, 4), env_id)
    assert value >= best - 0.03 * abs(best)
    assert value > exact_return(most_frequent(data, num_states, 4), env_id)
