"""maddpg.py against the paper's equations one agent at a time, recorded episodes, and games with known answers."""

import copy
import itertools
import math
import random
import shutil
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import rows, timeless
from pettingzoo import ParallelEnv

from algorithms import maddpg

TINY = {"num_envs": 2, "total_timesteps": 60, "learning_starts": 10, "train_frequency": 10, "batch_size": 8,
        "hidden_size": 16, "eval_episodes": 1, "device": "cpu"}  # fmt: skip
TRANSITIONS, SEEDS, MADE = [], [], []  # by the environments below: what happened, seeds, themselves


class Trio(ParallelEnv):
    """Three agents of different sizes. In every third episode b leaves, terminated, before the others.

    Agent k observes 100 * episode + step + 0.1 * k in all its components and earns step + k. Episodes last 3, 2 and 4
    steps: the first two end by truncation, the third by termination of a and truncation of c.
    """

    metadata = {"name": "trio", "render_modes": []}  # noqa: RUF012
    possible_agents = ["a", "b", "c"]  # noqa: RUF012
    LENGTHS = 3, 2, 4
    DIMS = {"a": 1, "b": 2, "c": 3}  # noqa: RUF012
    ACTIONS = {  # noqa: RUF012
        "a": gym.spaces.Discrete(2),
        "b": gym.spaces.Discrete(3, start=-1),
        "c": gym.spaces.Box(np.array([[-1.0], [-5.0]]), np.array([[3.0], [0.0]]), dtype=np.float64),
    }

    def __init__(self):
        self.episode, self.number = -1, len(MADE)
        MADE.append(self)

    def observation_space(self, agent):
        return gym.spaces.Box(-np.inf, np.inf, (self.DIMS[agent],), np.float64)

    def action_space(self, agent):
        return self.ACTIONS[agent]

    def observe(self):
        return {name: np.full(self.DIMS[name], 100 * self.episode + self.t + 0.1 * "abc".index(name)) for name in "abc"}

    def reset(self, seed=None, options=None):
        if seed is not None:
            SEEDS.append(seed)
        self.agents, self.episode, self.t = list("abc"), self.episode + 1, 0
        self.last = self.observe()
        return self.last, {name: {} for name in "abc"}

    def step(self, actions):
        assert set(actions) == set(self.agents), "those who are there act, and nobody else"
        assert all(self.ACTIONS[name].contains(action) for name, action in actions.items())
        self.t += 1
        acting, obs, kind = self.agents, self.observe(), self.episode % 3
        over = self.t == self.LENGTHS[kind]
        terminated = {name: (over and kind == 2 and name == "a") or (kind == 2 and name == "b") for name in acting}
        truncated = {name: over and not terminated[name] for name in acting}
        rewards = {name: float(self.t + "abc".index(name)) for name in acting}
        self.agents = [name for name in acting if not terminated[name] and not truncated[name]]
        TRANSITIONS.append((self.number, self.last, actions, rewards, terminated, obs, set(acting)))
        self.last = obs
        return {name: obs[name] for name in acting}, rewards, terminated, truncated, {name: {} for name in acting}


class Staggered(Trio):
    """Its copies begin with different episodes, and don't end together."""

    def __init__(self):
        super().__init__()
        self.episode += self.number % 3


class Game(ParallelEnv):
    """Both agents earn 1 minus the distance of what they do to what pays best, once an episode.

    Discrete: a matrix with its optimum, 1, where the first plays 2 and the second 0. Box: a point in two boxes.
    """

    metadata = {"name": "game", "render_modes": []}  # noqa: RUF012
    possible_agents = ["row", "column"]  # noqa: RUF012
    PAYS = np.array([[0.5, 0.0, 0.2], [0.0, 0.6, 0.0], [1.0, 0.1, 0.3]])
    POINT = 2.0, -4.0
    continuous = False

    def observation_space(self, agent):
        return gym.spaces.Box(0, 1, (1,), np.float32)

    def action_space(self, agent):
        if not self.continuous:
            return gym.spaces.Discrete(3)
        low, high = (-1.0, 3.0) if agent == "row" else (-5.0, 0.0)
        return gym.spaces.Box(low, high, (1,), np.float32)

    def reset(self, seed=None, options=None):
        self.agents = ["row", "column"]
        return {name: np.ones(1, np.float32) for name in self.agents}, {name: {} for name in self.agents}

    def step(self, actions):
        row, column = actions["row"], actions["column"]
        if self.continuous:
            reward = 1 - abs(row[0] - self.POINT[0]) - abs(column[0] - self.POINT[1])
        else:
            reward = self.PAYS[row, column]
        names, self.agents = self.agents, []
        ended = dict.fromkeys(names, True)
        obs = {name: np.zeros(1, np.float32) for name in names}
        return (
            obs,
            dict.fromkeys(names, float(reward)),
            ended,
            dict.fromkeys(names, False),
            {name: {} for name in names},
        )


class BoxGame(Game):
    continuous = True


class Mean(Game):
    """Competition: what the row player earns, the column player loses."""

    def step(self, actions):
        obs, rewards, *rest = super().step(actions)
        return obs, {"row": rewards["row"], "column": -rewards["column"]}, *rest


class Staying(Game):
    """Who has ended stays listed; the row player is terminated in the first step, the other truncated in the second."""

    def reset(self, seed=None, options=None):
        self.t = 0
        return super().reset(seed, options)

    def step(self, actions):
        self.t += 1
        obs, rewards, _, _, infos = super().step(actions)
        self.agents = ["row", "column"]
        return obs, rewards, {"row": True, "column": False}, {"row": False, "column": self.t == 2}, infos


class Dice(Game):
    """Draws from Python's and NumPy's global generators, as a careless environment does."""

    def step(self, actions):
        obs, _, *others = super().step(actions)
        return obs, {"row": random.random(), "column": np.random.random()}, *others


class Forever(Trio):
    """Never ends."""

    LENGTHS = 10**9, 10**9, 10**9


class Lonely(Trio):
    possible_agents = ["a"]  # noqa: RUF012


class Pictures(Trio):
    def observation_space(self, agent):
        return gym.spaces.Box(0, 255, (84, 84, 3), np.uint8)


class Unbounded(Trio):
    def action_space(self, agent):
        return gym.spaces.Box(-np.inf, 1, (2,))


class ManyActions(Trio):
    def action_space(self, agent):
        return gym.spaces.MultiDiscrete([2, 3])


class IntegerBox(Trio):
    def action_space(self, agent):
        return gym.spaces.Box(0, 9, (2,), np.int64)


class NaN(Game):
    def step(self, actions):
        obs, rewards, *rest = super().step(actions)
        return obs, dict.fromkeys(rewards, float("nan")), *rest


def make(env_id="test_maddpg:Trio", **flags):
    """Arguments, environment, actors and a learner whose targets differ from the networks."""
    torch.manual_seed(0)
    args = maddpg.Args(**TINY | {"env_id": env_id} | flags)
    env = maddpg.make_env(args)
    actors = maddpg.make_agent(args, env)
    learner = maddpg.MADDPG(actors, args)
    for targets in learner.target_actors, learner.target_critics:
        for parameter in targets.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return args, env, actors, learner


def batch_of(env, size=32, seed=0):
    """Random transitions: obs, actions, rewards, terminated, next_obs."""
    torch.manual_seed(seed)
    obs, next_obs = torch.randn(2, size, sum(gym.spaces.flatdim(space) for space in env.obs_space_n))
    actions = []
    for space in env.action_space_n:
        dim = gym.spaces.flatdim(space)
        discrete = isinstance(space, gym.spaces.Discrete)
        actions.append(torch.eye(dim)[torch.randint(dim, (size,))] if discrete else torch.rand(size, dim))
    rewards, terminated = torch.randn(size, len(env.names)), (torch.rand(size, len(env.names)) < 0.3).float()
    return obs, torch.cat(actions, 1), rewards, terminated, next_obs


def columns(dims):
    """The slice of each agent in a row."""
    ends = np.cumsum([0, *dims])
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def critic_alone(critics, i, obs, actions):
    """Q_i as an ordinary network, from its slices of the batched parameters."""
    hidden = (
        obs @ (critics.obs_weight * critics.sees_obs)[i] + actions @ (critics.action_weight * critics.sees_actions)[i]
    )
    hidden = (hidden + critics.bias1[i]).relu()
    hidden = (hidden @ critics.weight2[i] + critics.bias2[i]).relu()
    return (hidden @ critics.weight3[i] + critics.bias3[i]).squeeze(-1)


@pytest.fixture
def replayed(monkeypatch):
    """The replay buffers that train made."""
    made, init = [], maddpg.JointBuffer.__init__

    def spy(self, *args):
        init(self, *args)
        made.append(self)

    monkeypatch.setattr(maddpg.JointBuffer, "__init__", spy)
    return made


@pytest.mark.parametrize("num_envs", [1, 3])
def test_each_agents_row_is_what_happened_to_it(num_envs, replayed):
    TRANSITIONS.clear()
    maddpg.train(maddpg.Args(env_id="test_maddpg:Staggered", **TINY | {"num_envs": num_envs, "eval_frequency": 10**9,
                             "total_timesteps": 30 * num_envs, "learning_starts": 10**9,
                             "checkpoint_frequency": 10**9}))  # fmt: skip
    (replay,) = replayed
    happened = TRANSITIONS[: 30 * num_envs]  # the evaluation at the end comes later
    assert replay.num_added == len(happened) == 30 * num_envs
    left = 0
    for row, (_, obs, actions, rewards, terminated, next_obs, acting) in zip(replay.rows, happened, strict=True):
        got_obs, got_actions, got_rewards, got_terminated, got_next_obs = (
            part.numpy() for part in row.split(replay.widths)
        )
        for i, (name, o, a) in enumerate(zip("abc", columns([1, 2, 3]), columns([2, 3, 2]), strict=True)):
            if name not in acting:
                left += 1
                assert got_terminated[i] == 1
                assert got_rewards[i] == 0
                just_left = obs["a"] % 100 == 1  # its last observation ended the row before
                np.testing.assert_allclose(got_obs[o], obs[name] if just_left else 0, rtol=1e-6)
                assert (got_next_obs[o] == 0).all()
                continue
            np.testing.assert_allclose(got_obs[o], obs[name], rtol=1e-6)
            np.testing.assert_allclose(got_next_obs[o], next_obs[name], rtol=1e-6)
            assert got_rewards[i] == rewards[name]
            assert got_terminated[i] == terminated[name]
            space = Trio.ACTIONS[name]
            expected = gym.spaces.flatten(space, actions[name])  # Discrete: one-hot
            np.testing.assert_allclose(got_actions[a], expected, rtol=1e-6)
    assert left > 3 * num_envs, "b was away in some"


def test_exploration_noise_is_for_a_box_of_minus_1_to_1_and_evaluation_has_none(replayed, tmp_path, monkeypatch):
    init = maddpg.MADDPG.__init__

    def apart(self, *args):
        init(self, *args)
        for parameter in self.target_actors.parameters():  # which don't act
            parameter.data += 1

    monkeypatch.setattr(maddpg.MADDPG, "__init__", apart)
    for noise in 0.0, 0.4:  # mpe2's boxes are half as wide
        flags = {"total_timesteps": 2000, "learning_starts": 10**9, "eval_frequency": 2000,
                 "run_dir": str(tmp_path / str(noise))}  # fmt: skip
        args = maddpg.Args(continuous_actions=True, exploration_noise=noise, **TINY | flags)
        maddpg.train(args)
        actors = maddpg.make_agent(args, maddpg.make_env(args))
        maddpg.load_file(tmp_path / str(noise) / "model.pt", model=actors)
        obs, actions, *_ = replayed[-1].rows.split(replayed[-1].widths, 1)
        difference = actions - torch.from_numpy(actors.act(obs.numpy()))
        assert difference.std().item() == pytest.approx(noise / 2, abs=0.01)
    of_a_step = difference.reshape(1000, 30)  # no two components, agents or copies share it
    np.testing.assert_allclose(np.corrcoef(of_a_step.T), np.eye(30), atol=0.15)


def test_an_action_at_a_float64_bound_is_not_beyond_it(monkeypatch):
    monkeypatch.setitem(Trio.ACTIONS, "c", gym.spaces.Box(-0.1, 0.1, (2, 1), np.float64))
    env = maddpg.make_env(maddpg.Args(**TINY | {"env_id": "test_maddpg:Trio"}))
    env.reset()
    for bound in np.float32([-0.1, 0.1]):
        assert abs(float(bound)) > 0.1
        env.step(np.full(7, bound))  # Trio fails where an action is not in its box


def test_an_episode_is_over_once_every_agent_has_ended_listed_or_not():
    for env_id, expected in ("Game", [True]), ("Staying", [False, True]):
        env = maddpg.make_env(maddpg.Args(**TINY | {"env_id": f"test_maddpg:{env_id}"}))
        env.reset()
        assert [env.step(np.zeros(6))[-1] for _ in expected] == expected


@pytest.mark.parametrize("num_envs", [1, 2, 3])
def test_steps_are_summed_over_copies_and_each_episode_is_logged_once(num_envs, tmp_path, monkeypatch):
    monkeypatch.setattr(maddpg, "evaluate", lambda *_, **__: {"eval/episodic_return": 0.0})
    TRANSITIONS.clear()
    total = 18 * num_envs
    maddpg.train(maddpg.Args(env_id="test_maddpg:Trio", run_dir=str(tmp_path / "run"), **TINY | {
        "num_envs": num_envs, "total_timesteps": total, "checkpoint_frequency": total}))  # fmt: skip
    assert len(TRANSITIONS) == total
    episodes = [row for row in rows(tmp_path / "run") if "charts/episodic_return" in row]
    returns = [(6.0, 9.0, 12.0), (3.0, 5.0, 7.0), (10.0, 2.0, 18.0)] * 2  # of a, b, c
    ends = [3, 5, 9, 12, 14, 18]
    expected = [(num_envs * step, *parts, sum(parts)) for step, parts in zip(ends, returns, strict=True)]
    names = [f"charts/episodic_return/{name}" for name in "abc"]
    got = [tuple(row[name] for name in ("global_step", *names, "charts/episodic_return")) for row in episodes]
    assert got == [row for row in expected for _ in range(num_envs)]
    assert [row["charts/episodic_length"] for row in episodes[::num_envs]] == [3, 2, 4] * 2


@pytest.mark.parametrize(
    ("num_envs", "frequency", "starts"), [(1, 10, 20), (3, 10, 30), (4, 3, 13), (5, 1, 1), (2, 7, 1)]
)
def test_updates_per_step_do_not_depend_on_the_number_of_copies(num_envs, frequency, starts, monkeypatch):
    monkeypatch.setattr(maddpg, "evaluate", lambda *_, **__: {"eval/episodic_return": 0.0})
    seen, update = [], maddpg.MADDPG.update
    monkeypatch.setattr(maddpg.MADDPG, "update", lambda self, batch: (seen.append(batch), update(self, batch))[1])
    flags = {"num_envs": num_envs, "total_timesteps": 120, "learning_starts": starts, "train_frequency": frequency}
    maddpg.train(maddpg.Args(env_id="test_maddpg:Trio", **TINY | flags))
    before = -(-starts // num_envs) * num_envs - num_envs  # the last step that is too early to learn
    assert len(seen) == 120 // frequency - before // frequency
    assert all(len(part) == TINY["batch_size"] for batch in seen for part in batch)


def test_replay_equals_a_list_past_three_times_its_capacity():
    rng, oracle = np.random.default_rng(0), []
    replay = maddpg.JointBuffer(10, [2, 1], "cpu")
    for n in [3, 3, 3, 3, 4, 1, 3, 10, 3, 4]:
        first, second = rng.normal(size=(n, 2)), rng.normal(size=(n, 1)).astype(np.float32)
        replay.add(first, second)
        oracle = (oracle + [np.float32([*a, *b]).tolist() for a, b in zip(first, second, strict=True)])[-10:]
        first[:], second[:] = 99, 99  # what was stored must not be the caller's memory
        samples = torch.cat(replay.sample(500), 1).tolist()
        assert {tuple(row) for row in samples} == {tuple(row) for row in oracle}
    assert replay.num_added == 37
    frequencies = np.unique(torch.cat(replay.sample(20_000), 1)[:, 0], return_counts=True)[1] / 20_000
    np.testing.assert_allclose(frequencies, 0.1, atol=0.01)
    assert [part.shape for part in replay.sample(7)] == [(7, 2), (7, 1)]
    several = torch.stack([replay.sample(10)[1] for _ in range(1000)])  # (1000, 10, 1): each row of a batch is random
    np.testing.assert_allclose(several.std(0), torch.cat(replay.sample(10_000)[1:]).std(), rtol=0.1)


def test_a_buffer_may_take_nine_tenths_of_the_memory(monkeypatch, capsys):
    monkeypatch.setattr(maddpg.os, "sysconf", {"SC_PHYS_PAGES": 100, "SC_PAGE_SIZE": 10}.get)
    assert maddpg.JointBuffer(75, [2, 1], "cpu").rows.nbytes == 900
    with pytest.raises(SystemExit) as end:
        maddpg.JointBuffer(76, [2, 1], "cpu")
    assert end.value.code == 2
    assert "--buffer-size 76 needs" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [{"tau": 1.1}, {"buffer_size": 24}, {"learning_starts": -1}, {"train_frequency": 0}])
def test_numbers_out_of_range_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as end:
        maddpg.Args(**flags)
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    maddpg.Args(tau=1, buffer_size=25, learning_starts=0, train_frequency=1)


@pytest.mark.parametrize("added", [4, 13])
def test_replay_is_saved_as_far_as_it_is_filled_and_goes_on_where_it_was(added, tmp_path):
    one, other = maddpg.JointBuffer(10, [1], "cpu"), maddpg.JointBuffer(10, [1], "cpu")
    for k in range(added):
        one.add(np.full((1, 1), k))
    torch.save(one.state_dict(), tmp_path / "replay.pt")
    state = torch.load(tmp_path / "replay.pt", weights_only=True)
    assert state["rows"].untyped_storage().nbytes() == 4 * min(added, 10)
    other.load_state_dict(state)
    for replay in one, other:
        replay.add(np.full((2, 1), -1))
    assert torch.equal(one.rows[: min(added + 2, 10)], other.rows[: min(added + 2, 10)])
    assert other.num_added == added + 2


@pytest.mark.parametrize("gradient", ["exact", "gumbel"])
@pytest.mark.parametrize("algorithm", ["maddpg", "ddpg"])
def test_targets_and_losses_equal_the_papers_one_agent_at_a_time(algorithm, gradient):
    """T6, T15: next observations, target actors, target critics; terminated masks its own agent only."""
    _, env, actors, learner = make(algorithm=algorithm, actor_gradient=gradient, gamma=0.9, output_coef=0.7)
    obs, actions, rewards, terminated, next_obs = batch_of(env)
    o_n, a_n = columns([1, 2, 3]), columns([2, 3, 2])
    targets = learner.targets(rewards, terminated, next_obs)
    next_actions = []
    for i, actor in enumerate(learner.target_actors.actor_n):
        outputs = actor.net(next_obs[:, o_n[i]])
        greedy = torch.eye(actor.action_dim)[outputs.argmax(1)]
        low, high = torch.tensor([-1.0, -5.0]), torch.tensor([3.0, 0.0])
        next_actions.append(greedy if i < 2 else low + (high - low) * outputs.sigmoid())
    next_actions = torch.cat(next_actions, 1)
    losses, values = learner.critic_losses(obs, actions, targets)
    for i in range(3):
        q_next = critic_alone(learner.target_critics, i, next_obs, next_actions)
        y = rewards[:, i] + 0.9 * (1 - terminated[:, i]) * q_next
        torch.testing.assert_close(targets[i], y)
        q = critic_alone(learner.critics, i, obs, actions)
        torch.testing.assert_close(values[i], q)
        torch.testing.assert_close(losses[i], ((q - y) ** 2).mean())
    assert not targets.requires_grad
    # [2]: of agent i alone the action is new. The same noise for both: it is drawn agent after agent
    torch.manual_seed(5)
    actor_losses = learner.actor_losses(obs, actions)
    torch.manual_seed(5)
    for i, actor in enumerate(actors.actor_n):
        outputs = actor.net(obs[:, o_n[i]])
        joint = actions.clone()
        if gradient == "exact" and actor.discrete:
            value = 0
            for k in range(actor.action_dim):
                joint[:, a_n[i]] = torch.eye(actor.action_dim)[k]
                value += outputs.softmax(1)[:, k] * critic_alone(learner.critics, i, obs, joint)
        else:
            joint[:, a_n[i]] = actor.weighted(outputs, 1)[1][0]
            value = critic_alone(learner.critics, i, obs, joint)
        expected = -value.mean() + 0.7 * (outputs**2).mean()
        torch.testing.assert_close(actor_losses[i], expected)
        parameters = list(actor.parameters())
        gradients = torch.autograd.grad(actor_losses[i], parameters, retain_graph=True)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, parameters))


def test_loss_of_a_batch_is_the_mean_of_the_losses_of_its_rows():
    """T8. Box actions, whose best is the same each time."""
    _, env, _, learner = make("test_maddpg:BoxGame")
    obs, actions, rewards, terminated, next_obs = batch_of(env)
    whole = learner.critic_losses(obs, actions, learner.targets(rewards, terminated, next_obs))[0]
    actor = learner.actor_losses(obs, actions)
    singles = [[part[k : k + 1] for part in (obs, actions, rewards, terminated, next_obs)] for k in range(len(obs))]
    critic_singles = [learner.critic_losses(o, a, learner.targets(r, t, n))[0] for o, a, r, t, n in singles]
    torch.testing.assert_close(whole, torch.stack(critic_singles).mean(0))
    torch.testing.assert_close(actor, torch.stack([learner.actor_losses(o, a) for o, a, *_ in singles]).mean(0))
    with pytest.raises(AssertionError):
        learner.critic_losses(obs, actions, learner.targets(rewards, terminated, next_obs).T)


def permuted(part, dims, order):
    return torch.cat([part[:, columns(dims)[i]] for i in order], 1)


@pytest.mark.parametrize("algorithm", ["maddpg", "ddpg"])
@pytest.mark.parametrize("order", [(2, 0, 1), (1, 0, 2)])
def test_permuting_the_agents_permutes_the_losses(order, algorithm, monkeypatch):
    """T15, with three agents of different sizes."""
    monkeypatch.setattr(maddpg, "gumbel", lambda logits: logits)  # else the order changes who gets which noise
    args, env, actors, learner = make(algorithm=algorithm)
    o_dims, a_dims = actors.obs_dims, actors.action_dims
    obs, actions, rewards, terminated, next_obs = batch_of(env)
    other_env = copy.copy(env)
    for name in "names", "obs_space_n", "action_space_n":
        setattr(other_env, name, [getattr(env, name)[i] for i in order])
    other = maddpg.MADDPG(maddpg.make_agent(args, other_env), args)
    for ours, theirs in (actors, other.actors), (learner.target_actors, other.target_actors):
        for k, i in enumerate(order):
            theirs.actor_n[k].load_state_dict(ours.actor_n[i].state_dict())
    for ours, theirs in (learner.critics, other.critics), (learner.target_critics, other.target_critics):
        for name, parameter in ours.named_parameters():
            value = parameter.data[list(order)]
            dims = {"obs_weight": o_dims, "action_weight": a_dims}.get(name)
            theirs.get_parameter(name).data = value if dims is None else permuted(value, dims, order)
    first = learner.critic_losses(obs, actions, learner.targets(rewards, terminated, next_obs))[0]
    obs2, next_obs2, actions2 = (
        permuted(obs, o_dims, order),
        permuted(next_obs, o_dims, order),
        permuted(actions, a_dims, order),
    )
    targets2 = other.targets(rewards[:, list(order)], terminated[:, list(order)], next_obs2)
    torch.testing.assert_close(other.critic_losses(obs2, actions2, targets2)[0], first[list(order)])
    torch.testing.assert_close(other.actor_losses(obs2, actions2), learner.actor_losses(obs, actions)[list(order)])
    assert first.unique().numel() == 3


@pytest.mark.parametrize("algorithm", ["maddpg", "ddpg"])
def test_losses_of_an_agent_move_its_own_networks_only(algorithm):
    """T16."""
    _, env, actors, learner = make(algorithm=algorithm)
    obs, actions, rewards, terminated, next_obs = batch_of(env)
    for i in range(3):
        actors.zero_grad()
        learner.actor_losses(obs, actions)[i].backward()
        for j, actor in enumerate(actors.actor_n):
            moved = sum(parameter.grad.abs().sum() for parameter in actor.parameters() if parameter.grad is not None)
            assert (moved > 0) == (i == j)
        learner.critics.zero_grad()
        learner.critic_losses(obs, actions, learner.targets(rewards, terminated, next_obs))[0][i].backward()
        for parameter in learner.critics.parameters():
            assert all((parameter.grad[j].abs().sum() > 0) == (i == j) for j in range(3))
        assert all(parameter.grad is None for parameter in learner.target_critics.parameters())


def test_ddpg_critics_see_their_own_agent_only_and_maddpgs_see_all():
    for algorithm in "maddpg", "ddpg":
        _, env, _, learner = make(algorithm=algorithm)
        obs, actions, *_ = batch_of(env)
        obs.requires_grad_()
        actions.requires_grad_()
        for i in range(3):
            seen = torch.autograd.grad(learner.critics(obs, actions)[i].sum(), (obs, actions))
            for part, dims in zip(seen, ([1, 2, 3], [2, 3, 2]), strict=True):
                for j, own in enumerate(columns(dims)):
                    assert (part[:, own].abs().sum() > 0) == (i == j or algorithm == "maddpg")


def test_critics_start_as_linear_layers_do_with_the_inputs_that_each_sees():
    torch.manual_seed(0)
    sees_obs, sees_actions = torch.ones(200, 3, dtype=torch.bool), torch.ones(200, 4, dtype=torch.bool)
    sees_obs[100:, 1:] = sees_actions[100:, 1:] = False
    critics = maddpg.Critics(sees_obs, sees_actions, 16)
    for half, inputs in (slice(0, 100), 3 + 4), (slice(100, 200), 1 + 1):
        for name, parameter in critics.named_parameters():
            fan_in = inputs if name in ("obs_weight", "action_weight", "bias1") else 16
            scaled = parameter[half].detach() * fan_in**0.5
            assert 0.9 < scaled.max() <= 1, name
            assert -1 <= scaled.min() < -0.9, name


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_of_updates_does_not_matter(order):
    """T16: Algorithm 1, agent after agent with optimizers of their own and the targets last, equals update."""
    _, env, _, learner = make(tau=0.3, learning_rate=0.01, output_coef=0.1)
    mirror = copy.deepcopy(learner)
    mirror.actor_optimizer_n = [torch.optim.Adam(actor.parameters(), 0.01) for actor in mirror.actors.actor_n]
    mirror.critic_n = [
        {name: torch.nn.Parameter(p.data[i : i + 1].clone()) for name, p in mirror.critics.named_parameters()}
        for i in range(3)
    ]
    mirror.critic_optimizer_n = [torch.optim.Adam(critic.values(), 0.01) for critic in mirror.critic_n]
    noise = torch.rand(3, 32, 3)
    for step in range(3):
        batch = obs, actions, rewards, terminated, next_obs = batch_of(env, seed=step)
        by_agent = {2: -noise[0, :, :2].log(), 3: -noise[1].log()}  # a and b have 2 and 3 actions
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(maddpg, "gumbel", lambda logits: logits - by_agent[logits.shape[-1]].log())  # noqa: B023
            learner.update(batch)
            for i in order:

                def gathered():
                    return {
                        name: torch.cat([critic[name] for critic in mirror.critic_n]) for name in mirror.critic_n[0]
                    }

                for name, value in gathered().items():
                    mirror.critics.get_parameter(name).data = value.data
                y = mirror.targets(rewards, terminated, next_obs)[i]
                mirror.critics.zero_grad()
                ((mirror.critics(obs, actions)[i] - y) ** 2).mean().backward()
                for name, parameter in mirror.critic_n[i].items():
                    parameter.grad = mirror.critics.get_parameter(name).grad[i : i + 1]
                mirror.critic_optimizer_n[i].step()
                for name, value in gathered().items():
                    mirror.critics.get_parameter(name).data = value.data
                mirror.actors.zero_grad()
                mirror.actor_losses(obs, actions)[i].backward()
                mirror.actor_optimizer_n[i].step()
            for nets, targets in (mirror.actors, mirror.target_actors), (mirror.critics, mirror.target_critics):
                for net, target in zip(nets.parameters(), targets.parameters(), strict=True):
                    target.data = 0.7 * target.data + 0.3 * net.data
    for name in "actors", "critics", "target_actors", "target_critics":
        ours, theirs = getattr(learner, name).state_dict(), getattr(mirror, name).state_dict()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("anneal", [False, True])
def test_the_learning_rate_of_all_networks_ends_near_0_or_stays(anneal, tmp_path, monkeypatch):
    rates, update = [], maddpg.MADDPG.update

    def spy(self, batch):
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in (self.actor_optimizer, self.critic_optimizer)])
        return update(self, batch)

    monkeypatch.setattr(maddpg.MADDPG, "update", spy)
    flags = TINY | {"learning_starts": 0, "train_frequency": 2, "learning_rate": 0.5, "anneal_lr": anneal}
    maddpg.train(maddpg.Args(env_id="test_maddpg:Trio", run_dir=str(tmp_path / "run"), **flags))
    expected = [0.5 * (1 - step / 60 * anneal) for step in range(0, 60, 2)]
    assert rates == [[rate, rate] for rate in expected]
    logged = [row["charts/learning_rate"] for row in rows(tmp_path / "run") if "charts/learning_rate" in row]
    assert logged[-1] == expected[-1]


def test_targets_share_nothing_with_the_networks_and_no_optimizer_holds_them():
    """T11."""
    args = maddpg.Args(env_id="test_maddpg:Trio", **TINY)
    actors = maddpg.make_agent(args, maddpg.make_env(args))
    learner = maddpg.MADDPG(actors, args)
    for nets, targets, optimizer in (
        (actors, learner.target_actors, learner.actor_optimizer),
        (learner.critics, learner.target_critics, learner.critic_optimizer),
    ):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in nets.parameters()}
        for net, target in zip(nets.parameters(), targets.parameters(), strict=True):
            assert torch.equal(net, target)
            assert net.data_ptr() != target.data_ptr()


@pytest.mark.parametrize(("beta2", "leap"), [(0.999, 0.1 / math.sqrt(0.001)), (0.9, 0.1 / math.sqrt(0.1))])
def test_a_gradient_after_many_of_zero_is_a_leap_unless_both_means_forget_alike(beta2, leap):
    """By Adam's own equations: 3.2 learning rates after 0.999, a third of one after 0.9."""
    learner = make(learning_rate=0.01, beta2=beta2)[-1]
    for nets, optimizer in (
        (learner.actors, learner.actor_optimizer),
        (learner.critics, learner.critic_optimizer),
    ):
        weight = next(nets.parameters())
        before = weight.detach().clone()
        for i in range(8001):  # by then bias correction has ended
            for parameter in nets.parameters():
                parameter.grad = torch.full_like(parameter, float(i == 8000))
            optimizer.step()
        torch.testing.assert_close(before - weight, torch.full_like(weight, 0.01 * leap), atol=0, rtol=0.01)


def test_actor_step_leaves_the_critics_as_the_critic_step_left_them():
    _, env, _, learner = make(learning_rate=0.1)
    batch = batch_of(env)
    moved, step, gradients, critic_step = [], learner.actor_optimizer.step, [], learner.critic_optimizer.step
    before = copy.deepcopy(learner.critics.state_dict())

    def critic_spy():
        gradients.extend(parameter.grad.clone() for parameter in learner.critics.parameters())
        critic_step()

    def spy():
        moved.append(copy.deepcopy(learner.critics.state_dict()))
        step()

    learner.critic_optimizer.step, learner.actor_optimizer.step = critic_spy, spy
    learner.update(batch)
    assert all(map(torch.equal, gradients, (parameter.grad for parameter in learner.critics.parameters())))
    assert all(torch.equal(value, learner.critics.state_dict()[name]) for name, value in moved[0].items())
    assert any(not torch.equal(value, before[name]) for name, value in moved[0].items())
    assert all(parameter.requires_grad for parameter in learner.critics.parameters())


def discrete_actor(actions=3):
    torch.manual_seed(0)
    return maddpg.Actor(2, gym.spaces.Discrete(actions), 8)


def test_gumbel_noise_samples_the_softmax_and_the_sample_is_one_hot():
    torch.manual_seed(0)
    actor, logits = discrete_actor(4), torch.tensor([0.0, 1.0, -1.0, 2.0])
    for method in (lambda x: actor.noisy(x, 0.0)), (lambda x: actor.weighted(x, 1)[1][0]):
        samples = method(logits.expand(40_000, -1))
        torch.testing.assert_close(samples.sum(1), torch.ones(40_000))
        torch.testing.assert_close(samples.max(1).values, torch.ones(40_000))
        torch.testing.assert_close(samples.mean(0), logits.softmax(0), atol=0.01, rtol=0)
    assert actor.best(logits[None]).tolist() == [[0, 0, 0, 1]]


def test_discrete_gradient_is_that_of_the_expected_soft_action():
    """By finite differences, with the same noise on both sides; and the sample that the critic sees is hard."""
    actor, n = discrete_actor(), 400_000
    logits = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    torch.manual_seed(1)
    ((probability,), (action,)) = actor.weighted(logits.expand(n, -1), 1)
    assert (probability == 1).all()
    (action @ weights).mean().backward()

    def soft(logits):  # E[sum_k w_k softmax(logits + Gumbel)_k]
        torch.manual_seed(1)
        noise = -torch.empty(n, 3, dtype=torch.float64).exponential_().log()
        return ((logits + noise).softmax(-1) @ weights).mean().item()

    for k in range(3):
        step = 1e-4 * torch.eye(3, dtype=torch.float64)[k]
        difference = (soft(logits.detach() + step) - soft(logits.detach() - step)) / 2e-4
        assert logits.grad[k].item() == pytest.approx(difference, abs=1e-6)
    # In expectation it points where the gradient of the true expectation, sum_k w_k softmax_k, does
    true = torch.autograd.grad(logits.softmax(-1) @ weights, logits)[0]
    assert torch.nn.functional.cosine_similarity(true, logits.grad, dim=0) > 0.95


def test_box_actions_fill_their_box_and_noise_stays_in_it():
    """T10: asymmetric."""
    torch.manual_seed(0)
    space = gym.spaces.Box(np.array([-1.0, 0, -5]), np.array([3.0, 10, 0]), dtype=np.float32)
    actor = maddpg.Actor(2, space, 8)
    for value, expected in (0.0, [1, 5, -2.5]), (99.0, [3, 10, 0]), (-99.0, [-1, 0, -5]):
        np.testing.assert_allclose(actor.best(torch.full((1, 3), value))[0], expected, atol=1e-6)
    noisy = actor.noisy(torch.zeros(50_000, 3), 0.2)
    torch.testing.assert_close(noisy.mean(0), torch.tensor([1, 5, -2.5]), atol=0.02, rtol=0)
    torch.testing.assert_close(noisy.std(0), torch.tensor([0.4, 1.0, 0.5]), atol=0.01, rtol=0)
    edge = actor.noisy(torch.full((1000, 3), 99.0), 1.0)
    assert all(space.contains(row) for row in edge.numpy())
    assert (edge < torch.tensor([3.0, 10, 0])).any()
    outputs = torch.zeros(1, 3, requires_grad=True)
    actor.weighted(outputs, 1)[1].sum().backward()
    torch.testing.assert_close(outputs.grad[0], torch.tensor([4.0, 10, 5]) / 4)


def test_an_actor_has_two_hidden_layers_with_relu():
    for actor in maddpg.make_agent(*make()[:2]).actor_n:
        first, _, second, _, last = actor.net
        obs = torch.randn(7, first.in_features)
        hidden = (first.weight @ obs.T + first.bias[:, None]).clamp(min=0)  # (16, 7)
        hidden = (second.weight @ hidden + second.bias[:, None]).clamp(min=0)
        torch.testing.assert_close(actor.net(obs), (last.weight @ hidden + last.bias[:, None]).T)
        assert hidden.shape == (16, 7)
        assert (hidden == 0).any()


def test_actors_act_on_their_own_observation_as_evaluated():
    _, _, actors, _ = make()
    obs = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    actions = actors.act(obs)
    for i, (o, a) in enumerate(zip(columns([1, 2, 3]), columns([2, 3, 2]), strict=True)):
        actor = actors.actor_n[i]
        np.testing.assert_allclose(
            actions[:, a], actor.best(actor.net(torch.from_numpy(obs[:, o]))).detach(), rtol=1e-6
        )
    assert np.array_equal(actions, actors.act(obs)), "without noise"


@pytest.mark.parametrize(("env_id", "gradient"), [("Game", "gumbel"), ("Game", "exact"), ("BoxGame", "gumbel")])
def test_learns_a_game_with_a_known_optimum(env_id, gradient, tmp_path):
    """T22. The pair of actions that each would choose against a random other is not the best."""
    args = maddpg.Args(env_id=f"test_maddpg:{env_id}", total_timesteps=4000, num_envs=4, learning_starts=500,
                       train_frequency=4, batch_size=128, hidden_size=32, learning_rate=3e-3, eval_episodes=1,
                       run_dir=str(tmp_path / "run"), exploration_noise=0.4, actor_gradient=gradient,
                       device="cpu")  # fmt: skip
    maddpg.train(args)
    assert rows(tmp_path / "run")[-1]["eval/episodic_return"] / 2 > (0.9 if env_id == "BoxGame" else 0.99)


def test_critics_learn_the_values_of_a_game(tmp_path, monkeypatch):
    """Each agent's own: one earns what the other loses."""
    learners, init = [], maddpg.MADDPG.__init__
    monkeypatch.setattr(maddpg.MADDPG, "__init__", lambda self, *args: (learners.append(self), init(self, *args))[1])
    maddpg.train(maddpg.Args(env_id="test_maddpg:Mean", total_timesteps=3000, num_envs=4, learning_starts=100,
                             train_frequency=4, batch_size=128, hidden_size=32, learning_rate=3e-3, eval_episodes=1,
                             output_coef=1.0, device="cpu"))  # fmt: skip
    for row, column in itertools.product(range(3), repeat=2):
        actions = torch.cat([torch.eye(3)[row], torch.eye(3)[column]])[None]
        values = learners[0].critics(torch.ones(1, 2), actions)[:, 0]
        assert values[0].item() == pytest.approx(Game.PAYS[row, column], abs=0.1)
        assert values[1].item() == pytest.approx(-Game.PAYS[row, column], abs=0.1)


def test_no_two_resets_share_a_seed():
    def of_training(seed, step):
        SEEDS.clear()
        maddpg.make_envs(maddpg.Args(env_id="test_maddpg:Trio", seed=seed, **TINY | {"num_envs": 4}), step)
        return list(SEEDS)

    training = [seed for run, step in itertools.product((1, 2), (0, 1000)) for seed in of_training(run, step)]
    assert of_training(1, 0) == training[:4]
    evaluation = []
    for seed in 1, 2:
        args = maddpg.Args(env_id="test_maddpg:Trio", seed=seed, **TINY | {"eval_episodes": 3})
        _, _, actors, _ = make()
        SEEDS.clear()
        for _ in range(2):
            maddpg.evaluate(actors.act, args, "x")
        assert SEEDS[:3] == SEEDS[3:]
        evaluation += SEEDS[:3]
    assert len(set(training + evaluation)) == 16 + 6


def test_only_the_first_reset_of_each_copy_is_seeded(monkeypatch):
    monkeypatch.setattr(maddpg, "evaluate", lambda *_, **__: {"eval/episodic_return": 0.0})
    SEEDS.clear()
    maddpg.train(maddpg.Args(env_id="test_maddpg:Trio", checkpoint_frequency=60, **TINY))
    assert len(SEEDS) == 2


def seed_the_global_streams(seed):
    for function in random.seed, np.random.seed, torch.manual_seed:
        function(seed)


def test_the_global_streams_in_training_follow_from_seed_and_step_alone():
    args, drawn = maddpg.Args(env_id="test_maddpg:Dice", **TINY), []
    for seed, step in (1, 0), (2, 0), (2, 1000):
        seed_the_global_streams(seed)
        maddpg.make_envs(args, step)
        drawn.append((random.random(), np.random.random(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]
    assert not set(drawn[1]) & set(drawn[2])


def test_evaluation_leaves_the_global_streams_alone_and_is_not_moved_by_them():
    args, results = maddpg.Args(env_id="test_maddpg:Dice", **TINY | {"eval_episodes": 3}), []
    for seed in 1, 2:
        seed_the_global_streams(seed)
        before = random.getstate(), np.random.get_state()[1].tolist()
        results.append(maddpg.evaluate(lambda obs: np.zeros((1, 6)), args, "x"))
        assert before == (random.getstate(), np.random.get_state()[1].tolist())
    assert results[0] == results[1]


def test_evaluation_sums_over_steps_and_agents(monkeypatch):
    episodes = itertools.cycle([-1, 0, 1])
    monkeypatch.setattr(
        Trio, "__init__", lambda self: setattr(self, "number", 0) or setattr(self, "episode", next(episodes))
    )
    _, _, actors, _ = make()
    episodes = itertools.cycle([-1, 0, 1])
    result = maddpg.evaluate(actors.act, maddpg.Args(env_id="test_maddpg:Trio", **TINY | {"eval_episodes": 3}), "x")
    sums = np.array([[6.0, 9, 12], [3, 5, 7], [10, 2, 18]])
    assert result["eval/episodic_return"] == pytest.approx(sums.sum(1).mean())
    assert result["eval/return_std"] == pytest.approx(sums.sum(1).std())
    assert [result[f"eval/episodic_return/{name}"] for name in "abc"] == pytest.approx(sums.mean(0).tolist())
    assert result["eval/episodic_length"] == 3


def test_evaluation_ends_without_a_limit_and_when_asked_to_stop():
    args = maddpg.Args(env_id="test_maddpg:Forever", **TINY)
    _, _, actors, _ = make()
    calls = []
    assert maddpg.evaluate(actors.act, args, "x", lambda: calls.append(1) or len(calls) > 50) == {}
    assert len(TRANSITIONS) >= 40
    act = actors.act(np.zeros((1, 6), np.float32))
    assert maddpg.evaluate(lambda obs: act, args, "x")["eval/episodic_length"] == 27_000


def random_act(env, rng):
    parts = [np.eye(space.n)[rng.integers(space.n)] if isinstance(space, gym.spaces.Discrete)
             else rng.uniform(space.low, space.high) for space in env.action_space_n]  # fmt: skip
    return np.concatenate(parts)[None].astype(np.float32)


def controller(obs):
    """The best assignment of agents to landmarks at every step, then full thrust, or none near the landmark.

    An agent observes its velocity, its position, and the three landmarks' relative positions.
    """
    parts = obs.reshape(3, 18)
    velocity, landmarks = parts[:, :2], parts[:, 4:10].reshape(3, 3, 2)
    distance = np.linalg.norm(landmarks - 0.4 * velocity[:, None], axis=-1)  # without thrust an agent rolls 0.4 v
    best = min(itertools.permutations(range(3)), key=lambda order: sum(distance[i, k] for i, k in enumerate(order)))
    actions = np.zeros((3, 5), np.float32)
    for i, k in enumerate(best):
        ahead = landmarks[i, k] - 0.4 * velocity[i]
        axis = np.abs(ahead).argmax()
        actions[i, 0 if abs(ahead[axis]) < 0.1 else 1 + 2 * axis + (ahead[axis] > 0)] = 1
    return actions.reshape(1, 15)


def test_scale_free_figures_of_a_random_policy_and_of_the_best_assignment():
    args = maddpg.Args(eval_episodes=100, device="cpu")
    env, rng = maddpg.make_env(args), np.random.default_rng(0)
    random = maddpg.evaluate(lambda obs: random_act(env, rng), args, "x")
    best = maddpg.evaluate(controller, args, "x")
    print(random, best)
    assert random["eval/episodic_return"] == pytest.approx(-79, abs=6)
    assert best["eval/episodic_return"] == pytest.approx(-27, abs=2)
    for result in random, best:  # rewards: half the distances, which all share, and half the collisions of one's own
        returns = -1.5 * 25 * result["eval/distances"] - result["eval/collisions"]
        assert result["eval/episodic_return"] == pytest.approx(returns, rel=1e-5)
    assert random["eval/distances"] > 1.7
    assert best["eval/distances"] < 0.8
    assert random["eval/occupied"] < 0.3
    assert best["eval/occupied"] > 2


MPE = ["simple_adversary_v3", "simple_crypto_v3", "simple_push_v3", "simple_reference_v3", "simple_speaker_listener_v4",
       "simple_spread_v3", "simple_tag_v3", "simple_world_comm_v3"]  # fmt: skip


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("env_id", MPE)
def test_every_environment_of_the_paper_runs_and_its_episodes_are_truncated(env_id, continuous, tmp_path, replayed):
    args = maddpg.Args(env_id=env_id, continuous_actions=continuous, run_dir=str(tmp_path / "run"), **TINY | {
        "total_timesteps": 104, "checkpoint_frequency": 104})  # fmt: skip
    maddpg.train(args)
    env = maddpg.make_env(args)
    *_, end, last = (row for row in rows(tmp_path / "run") if "eval/episodic_return" not in row)
    returns = [end[f"charts/episodic_return/{name}"] for name in env.names]
    assert end["charts/episodic_return"] == pytest.approx(sum(returns))
    assert end["charts/episodic_length"] == 25
    assert all(
        f"losses/{metric}/{name}" in last for metric in ("td_loss", "q_values", "actor_loss") for name in env.names
    )
    obs, actions, _, terminated, next_obs = (part.numpy() for part in replayed[0].rows.split(replayed[0].widths, 1))
    assert not terminated.any()
    same = (next_obs[:-2] == obs[2:]).all(1)  # two copies, row about
    assert not same[48:50].any(), "the next observation of an episode's last step is not the next episode's first"
    assert same[:48].all()
    discrete = all(isinstance(space, gym.spaces.Discrete) for space in env.action_space_n)
    assert discrete != continuous
    assert ((actions == 0) | (actions == 1)).all() == discrete


def saved_run(tmp_path, name, env_id="simple_tag_v3", **flags):
    args = maddpg.Args(env_id=env_id, run_dir=str(tmp_path / name), **TINY | {"eval_episodes": 3} | flags)
    maddpg.train(args)
    return args


def command(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["maddpg.py", *map(str, flags)])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    capsys.readouterr()
    try:
        maddpg.main()
        code = 0
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_saved_actors_evaluate_as_those_that_were_saved(tmp_path, monkeypatch, capsys):
    """T21."""
    saved_run(tmp_path, "one")
    last = rows(tmp_path / "one")[-1]
    code, out, _ = command(monkeypatch, capsys, "--run-dir", tmp_path / "one", "--evaluate")
    assert code == 0
    expected = ", ".join(f"{name} {value:.4g}" for name, value in last.items() if name.startswith("eval/"))
    assert out == f"{expected}, 3 episodes\n"
    model = torch.load(tmp_path / "one" / "model.pt", weights_only=True)["model"]
    assert all(name.startswith("actor_n.") for name in model), "what acts, and nothing else"


def test_cross_play_pairs_the_adversaries_of_each_run_with_the_agents_of_each(tmp_path, monkeypatch, capsys):
    one, other = saved_run(tmp_path, "one"), saved_run(tmp_path, "other", seed=2, algorithm="ddpg")
    env = maddpg.make_env(one)
    actors = {}
    for args in one, other:
        actors[args.run_dir] = maddpg.make_agent(args, env)
        maddpg.load_file(maddpg.Path(args.run_dir, "model.pt"), model=actors[args.run_dir])
    code, out, err = command(
        monkeypatch, capsys, "--run-dir", one.run_dir, "--evaluate", "--opponent-dir", other.run_dir
    )
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) == 8
    got = []
    for k, (ours, theirs) in enumerate(itertools.product((one.run_dir, other.run_dir), repeat=2)):
        assert lines[2 * k] == f"adversaries of {ours}, others of {theirs}:"

        def act(obs, ours=ours, theirs=theirs):  # adversaries come first: three times 5 actions
            return np.concatenate([actors[ours].act(obs)[:, :15], actors[theirs].act(obs)[:, 15:]], 1)

        result = maddpg.evaluate(act, one, "x")
        assert lines[2 * k + 1] == ", ".join(f"{name} {value:.4g}" for name, value in result.items()) + ", 3 episodes"
        assert "eval/touches" in result
        got.append(result["eval/episodic_return"])
    assert len(set(got)) == 4, "or the pairings would be the same"


@pytest.mark.parametrize(("env_id", "adversaries"), [("simple_world_comm_v3", 4), ("simple_crypto_v3", 1)])
def test_the_lead_adversary_and_eve_are_adversaries(env_id, adversaries, tmp_path):
    one, other = (saved_run(tmp_path, str(seed), env_id, seed=seed, total_timesteps=2) for seed in (1, 2))
    env = maddpg.make_env(one)
    one.opponent_dir = other.run_dir
    actors = {args.run_dir: maddpg.load_actors(args.run_dir, args, env) for args in (one, other)}
    obs = torch.ones(1, sum(actors[one.run_dir].obs_dims))
    outputs = {folder: [row for _, row in those.with_outputs(obs)] for folder, those in actors.items()}
    teams = maddpg.pairings(one, env)
    for (ours, theirs), team in zip(itertools.product(outputs, repeat=2), teams.values(), strict=True):
        expected = outputs[ours][:adversaries] + outputs[theirs][adversaries:]
        assert all(torch.equal(row, e) for (_, row), e in zip(team.with_outputs(obs), expected, strict=True))


def test_cross_play_is_refused_where_it_makes_no_sense(tmp_path, monkeypatch, capsys):
    spread, tag = saved_run(tmp_path, "spread", "simple_spread_v3"), saved_run(tmp_path, "tag")
    for one, other, word in (
        (spread, spread, "adversaries"),
        (tag, spread, "another env_id"),
        (tag, saved_run(tmp_path, "box", continuous_actions=True), "another continuous_actions"),
        (tag, saved_run(tmp_path, "wide", hidden_size=8), "another hidden_size"),
    ):
        flags = "--run-dir", one.run_dir, "--evaluate", "--opponent-dir", other.run_dir
        code, _, err = command(monkeypatch, capsys, *flags)
        assert (code, err.count("\n")) == (2, 1), err
        assert word in err
    code, _, err = command(
        monkeypatch, capsys, "--run-dir", tag.run_dir, "--evaluate", "--opponent-dir", tmp_path / "no"
    )
    assert code == 2
    assert "config.json" in err


def test_measures_of_tag_and_adversary_by_hand(monkeypatch):
    assert maddpg.measures("simple_tag_v3", [[1, 0, 2, 0], [0, 1, 0, 0]]) == {"eval/touches": 4}
    near, far = 0.15**2, 0.17**2
    for adversary, agent, expected in (near, far, (False, True)), (far, near, (True, False)):
        steps = [[9.0, (9, 9, 9.0), (9, 9, 9.0)], [adversary, (9.0, near, agent), (near, 9.0, far)]]
        result = maddpg.measures("simple_adversary_v3", steps)
        assert (result["eval/agent_success"], result["eval/adversary_success"]) == expected
    assert maddpg.measures("simple_push_v3", [[None, None]]) == {}


def test_an_episode_is_filmed_from_its_first_frame(tmp_path, monkeypatch):
    from moviepy import VideoFileClip

    saved_run(tmp_path, "run", "simple_adversary_v3", capture_video=True, eval_frequency=60)
    (film,) = (tmp_path / "run" / "videos").iterdir()
    assert film.name == "step-60-episode-0.mp4"
    with VideoFileClip(str(film)) as clip:
        frames = list(clip.iter_frames())
    assert len(frames) == 25
    assert (frames[0] != frames[-1]).any()


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("LunarLander-v3", ["LunarLander-v3", "simple_spread_v3", "ppo.py"]),
        ("simple_spred_v3", ["simple_spread_v3"]),
        ("simple_v3", ["single agent", "sac.py"]),
        ("test_maddpg:Lonely", ["single agent", "dqn.py"]),
        ("test_maddpg:Nothing", ["Nothing"]),
        ("nowhere:env", ["nowhere"]),
        ("a:b:c", ["a:b:c"]),
        ("json:JSONDecoder", ["parallel"]),
        ("mpe2.simple_spread_v3:env", ["parallel"]),
        ("test_maddpg:Pictures", ["a observes", "images"]),
        ("test_maddpg:Unbounded", ["a acts in", "bounded"]),
        ("test_maddpg:ManyActions", ["a acts in", "Discrete"]),
        ("test_maddpg:IntegerBox", ["a acts in", "Box(0, 9"]),
    ],
)
def test_environments_it_cannot_use_get_one_line(env_id, words, monkeypatch, capsys, tmp_path):
    code, _, err = command(monkeypatch, capsys, "--env-id", env_id, "--run-dir", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1), err
    assert all(word in err for word in words), err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--env-id", "test_maddpg:Trio", "--continuous-actions"], "--continuous-actions"),
        (["--continuous-actions", "--actor-gradient", "exact"], "--actor-gradient"),
        (["--opponent-dir", "elsewhere"], "--evaluate"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags, word, monkeypatch, capsys, tmp_path):
    code, _, err = command(monkeypatch, capsys, *flags, "--total-timesteps", 50, "--run-dir", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1), err
    assert word in err


def test_nan_ends_the_run(monkeypatch, capsys, tmp_path):
    code, _, err = command(monkeypatch, capsys, "--env-id", "test_maddpg:NaN", "--run-dir", tmp_path / "run")
    assert code == 1
    assert "NaN" in err


@pytest.mark.parametrize("env_id", ["simple_spread_v3", "test_maddpg:Trio"])
def test_killed_and_resumed_equals_unbroken(env_id, tmp_path, monkeypatch):
    """T20, and T17: the run before it, with another evaluation frequency, is the same."""
    flags = TINY | {"total_timesteps": 240, "checkpoint_frequency": 40, "buffer_size": 100, "eval_frequency": 120}
    maddpg.train(maddpg.Args(env_id=env_id, run_dir=str(tmp_path / "whole"), **flags))
    maddpg.train(maddpg.Args(env_id=env_id, run_dir=str(tmp_path / "often"), **flags | {"eval_frequency": 20}))
    update, updates = maddpg.MADDPG.update, []

    def dying(self, batch):
        updates.append(1)
        if len(updates) == 18:
            raise KeyboardInterrupt
        return update(self, batch)

    monkeypatch.setattr(maddpg.MADDPG, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        maddpg.train(maddpg.Args(env_id=env_id, run_dir=str(tmp_path / "cut"), **flags))
    shutil.copytree(tmp_path / "cut", tmp_path / "resumed")  # a process's death would free the folder's lock
    maddpg.train(maddpg.Args(env_id=env_id, run_dir=str(tmp_path / "resumed"), resume=True, **flags))
    assert len(updates) > 25
    assert timeless(tmp_path / "resumed") == timeless(tmp_path / "whole")
    for other in "resumed", "often":
        ours, theirs = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", other))
        for part in "model", "learner":
            assert all(torch.equal(ours[part][name], theirs[part][name]) for name in ours[part])
        assert torch.equal(ours["buffer"]["rows"], theirs["buffer"]["rows"])
        assert ours["buffer"]["num_added"] == 240
