"""decision_transformer.py: sums by brute force, the order of tokens, causality, padding, playing, and Bayes' rule."""

import copy
import json
import math
import os
import re
import sys
from contextlib import closing
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT

from algorithms import decision_transformer as dt
from benchmark import record

SHIPPED = ROOT / "benchmark" / "offline" / "frozenlake"
BOX = gym.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 1], np.float32))
DISCRETE = gym.spaces.Discrete(3, start=5)
each_kind = pytest.mark.parametrize("space", [DISCRETE, BOX], ids=["discrete", "box"])
SMALL = {"hidden_size": 16, "num_layers": 2, "context_length": 5}


def make_agent(space, obs_dim=4, **flags):
    torch.manual_seed(0)
    agent = dt.make_agent(dt.Args(**SMALL | flags), (obs_dim,), space)
    agent.return_scale.fill_(2.0)
    return agent


def random_steps(space, n, seed=1):
    """n steps of an episode, as a context without its mask."""
    rng = torch.Generator().manual_seed(seed)
    actions = torch.randint(3, (n,), generator=rng) if space is DISCRETE else torch.rand(n, 2, generator=rng) * 2 - 1
    return {
        "returns_to_go": torch.randn(n, generator=rng), "timesteps": torch.arange(7, 7 + n),
        "observations": torch.randn(n, 4, generator=rng), "actions": actions,
    }  # fmt: skip


def changed(value):
    return (value + 1) % 3 if value.dtype == torch.int64 else value + 1.0


# ---- Logs


def logs():
    """Ends of both kinds, an episode of one step, and a last one that the recording cuts."""
    rng = np.random.default_rng(0)
    terminations, truncations = np.zeros(40, np.float32), np.zeros(40, np.float32)
    terminations[[4, 5, 20]], truncations[[11, 20, 30]] = 1, 1
    columns = {"rewards": rng.normal(size=40), "observations": rng.normal(size=(40, 4)), "terminations": terminations,
               "truncations": truncations, "actions": rng.uniform(-1, 1, (40, 2))}  # fmt: skip
    return {name: torch.tensor(column, dtype=torch.float32) for name, column in columns.items()}


STOPS = [5, 6, 12, 21, 31, 40]


def test_returns_to_go_are_the_sums_of_the_rewards_to_come_in_the_episode():
    data = logs()
    episodes = dt.split_episodes(data)
    assert [len(episode["timesteps"]) for episode in episodes] == np.diff([0, *STOPS]).tolist()
    for start, stop, episode in zip([0, *STOPS[:-1]], STOPS, episodes, strict=True):
        for t in range(stop - start):
            expected = math.fsum(data["rewards"][start + t : stop].tolist())
            assert episode["returns_to_go"][t].item() == pytest.approx(expected, abs=1e-6)
            assert episode["timesteps"][t] == t
            assert torch.equal(episode["observations"][t], data["observations"][start + t])
            assert torch.equal(episode["actions"][t], data["actions"][start + t])


def test_sums_of_long_episodes_are_exact():
    """PyTorch adds with more digits than float32 has: number after number, that would be wrong by more."""
    n = 100_000
    data = {"rewards": torch.full((n,), 0.1), "terminations": torch.zeros(n), "truncations": torch.zeros(n),
            "observations": torch.zeros(n, 1), "actions": torch.zeros(n)}  # fmt: skip
    assert dt.split_episodes(data)[0]["returns_to_go"][0].item() == pytest.approx(0.1 * n, rel=1e-6)


def test_each_step_of_the_logs_begins_a_context_equally_often_and_none_leaves_its_episode():
    """So episodes are drawn by their lengths."""
    torch.manual_seed(0)
    data, args = logs(), dt.Args(context_length=4, batch_size=500)
    episodes = dt.split_episodes(data)
    lengths = torch.tensor([len(episode["timesteps"]) for episode in episodes], dtype=torch.float32)
    begins = np.zeros(40)
    for _ in range(16):
        batch = dt.sample(episodes, lengths, args, "cpu")
        assert {*batch} == {"returns_to_go", "timesteps", "observations", "actions", "mask"}
        for b in range(args.batch_size):
            mask = batch["mask"][b].tolist()
            assert mask == sorted(mask), "padding stands on the left"
            k = sum(mask)
            rows = (data["observations"] == batch["observations"][b][-k]).all(-1).nonzero().item() + np.arange(k)
            begins[rows[0]] += 1
            stop = next(stop for stop in STOPS if rows[0] < stop)
            assert k == min(4, stop - rows[0]), "it is as long as it can be"
            assert torch.equal(batch["actions"][b][-k:], data["actions"][rows])
            assert torch.equal(batch["observations"][b][-k:], data["observations"][rows])
    expected = begins.sum() / 40
    assert ((begins - expected) ** 2 / expected).sum() < 73, "chi-square with 39 degrees of freedom: 0.999 quantile"


def test_padding_by_hand():
    short = {"timesteps": torch.tensor([3]), "observations": torch.tensor([[1.0, 2.0]])}
    long = {"timesteps": torch.tensor([0, 1, 2]), "observations": torch.arange(6.0).view(3, 2)}
    batch = dt.collate([short, long], "cpu")
    assert batch["mask"].tolist() == [[False, False, True], [True, True, True]]
    assert batch["timesteps"].tolist() == [[0, 0, 3], [0, 1, 2]]
    assert batch["observations"].tolist() == [[[0, 0], [0, 0], [1, 2]], [[0, 1], [2, 3], [4, 5]]]


# ---- The transformer


def test_layers_begin_with_weights_of_their_own():
    agent = make_agent(DISCRETE, num_layers=2)
    for one, other in zip(*(layer.parameters() for layer in agent.layers), strict=True):
        assert one.ndim == 1 or not torch.equal(one, other)


@each_kind
def test_tokens_are_return_state_action_and_actions_are_predicted_at_states(space):
    agent, seen = make_agent(space, max_timestep=9), {}
    agent.normalize.fit(torch.randn(50, 4) * 3 + 1)
    agent.layers[0].register_forward_pre_hook(lambda _, inputs: seen.update(tokens=inputs[0]))
    agent.layers[-1].register_forward_hook(lambda _, inputs, output: seen.update(output=output))
    context = dt.collate([random_steps(space, 4), random_steps(space, 4, seed=2)], "cpu")
    predicted = agent(context)
    assert seen["tokens"].shape == (2, 12, 16)
    for b in range(2):
        for k in range(4):
            time = agent.embed_time.weight[min(7 + k, 9)]
            action = context["actions"][b, k]
            action = torch.eye(3)[action] if space is DISCRETE else action
            obs = (context["observations"][b, k] - agent.normalize.mean) / agent.normalize.std
            by_hand = [
                agent.embed[0](context["returns_to_go"][b, k].view(1) / 2.0), agent.embed[1](obs),
                agent.embed[2](action),
            ]  # fmt: skip
            expected = agent.norm(torch.stack(by_hand) + time)
            torch.testing.assert_close(seen["tokens"][b, 3 * k : 3 * k + 3], expected)
            output = agent.predict_action(seen["output"][b, 3 * k + 1])
            torch.testing.assert_close(predicted[b, k], output if space is DISCRETE else output.tanh())


@each_kind
def test_an_action_depends_on_the_past_and_the_present_alone(space):
    """Bit for bit: neither on later steps, nor on itself. And it does depend on all that came before."""
    agent = make_agent(space)
    steps = random_steps(space, 5)
    before = agent(dt.collate([steps], "cpu"))[0]
    for name in "returns_to_go", "observations", "actions", "timesteps":
        for k in range(5):
            others = copy.deepcopy(steps)
            others[name][k] = changed(others[name][k])
            moved = (agent(dt.collate([others], "cpu"))[0] != before).any(-1)
            first = k + 1 if name == "actions" else k
            assert moved.tolist() == [t >= first for t in range(5)], (name, k)


@each_kind
def test_what_stands_in_the_padding_changes_nothing(space):
    agent = make_agent(space)
    short, long = random_steps(space, 2), random_steps(space, 5, seed=2)
    alone, batch = agent(dt.collate([short], "cpu")), dt.collate([short, long], "cpu")
    padded = agent(batch)
    torch.testing.assert_close(padded[0, -2:], alone[0], atol=1e-6, rtol=1e-5)
    for name in "returns_to_go", "observations", "actions", "timesteps":
        batch[name][0, :3] = changed(batch[name][0, :3])
    assert torch.equal(agent(batch)[0, -2:], padded[0, -2:])
    assert torch.equal(agent(batch)[1], padded[1])


@each_kind
def test_the_loss_is_the_mean_over_true_steps_and_so_is_its_gradient(space):
    agent = make_agent(space)
    short, long = random_steps(space, 2), random_steps(space, 5, seed=2)
    parts = []
    for steps in short, long:
        predicted = agent(dt.collate([steps], "cpu"))[0]
        for output, action in zip(predicted, steps["actions"], strict=True):
            by_hand = -output.log_softmax(-1)[action] if space is DISCRETE else ((output - action) ** 2).mean()
            parts.append(by_hand)
    expected = sum(parts) / 7
    batch = dt.collate([short, long], "cpu")
    loss = dt.imitation_loss(agent(batch), batch["actions"], batch["mask"])
    torch.testing.assert_close(loss, expected)
    used = [p for name, p in agent.named_parameters()]
    gradients = [torch.autograd.grad(x, used, allow_unused=True) for x in (loss, expected)]
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)
        assert got.isfinite().all()


@each_kind
def test_returns_are_scaled_or_not_seen_at_all(space):
    agent, steps = make_agent(space), random_steps(space, 3)
    before = agent(dt.collate([steps], "cpu"))
    tenfold = steps | {"returns_to_go": steps["returns_to_go"] * 8}
    assert not torch.equal(agent(dt.collate([tenfold], "cpu")), before)
    agent.return_scale.fill_(16.0)
    assert torch.equal(agent(dt.collate([tenfold], "cpu")), before)
    cloning = make_agent(space, condition=False)
    outputs = [cloning(dt.collate([each], "cpu")) for each in (steps, tenfold)]
    assert torch.equal(*outputs)


# ---- Playing


PLAYED = []  # the episodes of Payer


class Payer(gym.Env):
    """Random observations, rewards and lengths; it writes down each episode: obs, action, reward of each step."""

    observation_space = gym.spaces.Box(-9, 9, (4,))

    def __init__(self, box=False):
        self.action_space = BOX if box else DISCRETE

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.steps = int(self.np_random.integers(1, 9)), []
        PLAYED.append(self.steps)
        self.obs = self.np_random.normal(size=4).astype(np.float32)
        return self.obs, {}

    def step(self, action):
        assert self.action_space.contains(action)
        reward, self.left = self.np_random.normal(), self.left - 1
        self.steps.append((self.obs.copy(), action, reward))
        self.obs[:] = self.np_random.normal(size=4)  # the same array again, as some environments do
        return self.obs, reward, self.left == 0, False, {}


gym.register("Payer-v0", Payer, disable_env_checker=True)
gym.register("PayerBox-v0", Payer, disable_env_checker=True, kwargs={"box": True})


@each_kind
def test_in_an_evaluation_the_return_to_go_falls_by_the_true_reward(space, tmp_path):
    """Each episode has a context of its own: the newest 5 steps as they were played, whichever others have ended."""
    args = dt.Args(env_id="Payer-v0" if space is DISCRETE else "PayerBox-v0", eval_episodes=12, target_return=3.0)
    agent, seen = make_agent(space), []
    agent.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    PLAYED.clear()
    result = dt.evaluate(agent, args, tmp_path)
    assert result["eval/episodic_return"] == pytest.approx(np.mean([sum(r for *_, r in steps) for steps in PLAYED]))
    assert len(seen) == max(len(steps) for steps in PLAYED) > 6
    for t, batch in enumerate(seen):
        playing = [steps for steps in PLAYED if len(steps) > t]
        assert len(batch["mask"]) == len(playing)
        for b, steps in enumerate(playing):
            rows = range(max(0, t - 4), t + 1)
            assert batch["mask"][b].tolist() == [True] * len(rows)
            assert batch["timesteps"][b].tolist() == [*rows]
            earned = [sum(r for *_, r in steps[:row]) for row in rows]
            assert batch["returns_to_go"][b].tolist() == pytest.approx([3.0 - sum_ for sum_ in earned], abs=1e-6)
            np.testing.assert_array_equal(batch["observations"][b], [steps[row][0] for row in rows])
            done = [steps[row][1] for row in rows[:-1]]
            got = batch["actions"][b][:-1]
            np.testing.assert_allclose(agent.to_env(got) if done else [], done, rtol=1e-6)
            assert not batch["actions"][b][-1].any(), "the present action is still unknown"


@each_kind
def test_a_played_episode_is_predicted_as_a_logged_one(space):
    """The contexts of playing are those of training, with the return-to-go of the logs where the target is met."""
    agent, rng = make_agent(space), np.random.default_rng(3)
    obs, rewards = rng.normal(size=(9, 4)).astype(np.float32), rng.normal(size=9)
    history, outputs, actions = dt.History(rewards.sum()), [], []
    agent.register_forward_hook(lambda _, inputs, output: outputs.append(output[0, -1]))
    seen = np.empty(4, np.float32)  # an environment may show the same array again and again
    for row, reward in zip(obs, rewards, strict=True):
        seen[:] = row
        action = agent.act(seen, history)
        assert agent.action_space.contains(action)
        history.earn(reward)
        actions.append(history.steps[-1]["actions"])
    assert len(history.steps) == 5, "an endless episode must not fill the memory"
    played, actions = list(outputs), torch.stack(actions)
    flags = {"terminations": torch.tensor([0.0] * 8 + [1]), "truncations": torch.zeros(9)}
    (episode,) = dt.split_episodes(
        {"rewards": torch.tensor(rewards).float(), "observations": torch.tensor(obs), "actions": actions, **flags}
    )
    for t in range(9):
        context = {name: values[max(0, t - 4) : t + 1] for name, values in episode.items()}
        torch.testing.assert_close(agent(dt.collate([context], "cpu"))[0, -1], played[t], atol=1e-5, rtol=1e-4)


def test_a_lone_observation_is_the_first_step_of_an_episode():
    agent, obs = make_agent(DISCRETE), np.random.default_rng(0).normal(size=(6, 4))
    agent.target_return.fill_(1.5)
    assert agent.act(obs).tolist() == [agent.act(row, dt.History(1.5)).item() for row in obs]
    assert agent.act(obs).tolist() == [agent.act(row).item() for row in obs]
    with pytest.raises(AssertionError):
        agent.act(obs[:, :1])
    agent.eval()  # PyTorch has another way through its layers then
    assert agent.act(obs).tolist() == [agent.act(row, dt.History(1.5)).item() for row in obs]


def test_actions_are_drawn_from_the_policy_and_a_seed_says_which():
    agent, obs = make_agent(DISCRETE), np.ones(4)
    with torch.no_grad():
        agent.predict_action[1].bias += torch.tensor([1.0, 0.0, -1.0])
    first = {"returns_to_go": torch.ones(1), "timesteps": torch.zeros(1, dtype=torch.int64),
             "observations": torch.ones(1, 4), "actions": torch.tensor([0])}  # fmt: skip
    policy = agent(dt.collate([first], "cpu"))[0, 0].softmax(-1).detach()
    drawn = agent.act(np.tile(obs, (4000, 1)), [dt.History(1.0, seed) for seed in range(4000)]) - 5
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 4000, policy, atol=0.03)
    assert agent.act(obs, dt.History(1.0)) == 5 + policy.argmax()
    batch = np.tile(obs, (5, 1))
    together = agent.act(batch, [dt.History(1.0, seed) for seed in range(5)])
    assert together.tolist() == [agent.act(obs, dt.History(1.0, seed)) for seed in range(5)]
    assert len({*together.tolist()}) > 1


# ---- Runs, against what is known

QUICK = ["--total-timesteps", 20, "--eval-episodes", 2, "--batch-size", 8, "--hidden-size", 8, "--num-layers", 1,
         "--eval-frequency", 20]  # fmt: skip


def rows_of(run_dir):
    return [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]


def test_what_is_asked_for(cli, monkeypatch):
    """The best return of the data, unless the flag says otherwise; --evaluate can ask a trained agent for another."""
    asked, history = [], dt.History
    monkeypatch.setattr(
        dt, "History", lambda target, seed=None: (asked.append((target, seed)), history(target, seed))[1]
    )
    for flags, target in ([], 1.0), (["--target-return", -0.5], -0.5):
        run_dir = f"run{target}"
        assert cli("decision_transformer", *QUICK, *flags, "--run-dir", run_dir)[0] == 0
        assert {target for target, _ in asked} == {target}
        assert {seed for _, seed in asked} == {None}
        assert len(asked) == 2, "--eval-episodes, once each"
        assert dt.load(run_dir).target_return == target
        asked.clear()
        assert cli("decision_transformer", "--run-dir", run_dir, "--evaluate")[0] == 0
        assert {target for target, _ in asked} == {target}
        asked.clear()
        other = "--run-dir", run_dir, "--evaluate", "--target-return", 0.25, "--draw-actions"
        assert cli("decision_transformer", *other)[0] == 0
        assert {target for target, _ in asked} == {0.25}
        assert None not in {seed for _, seed in asked}
        asked.clear()


def test_the_last_episode_counts_if_a_time_limit_ended_it_as_it_ended_others(cli, tmp_path):
    """Nothing but its length tells it from one that was cut: it is as long as the longest."""
    stored = dict(np.load(SHIPPED / "data.npz"))
    data = {key: np.concatenate([array[2:5]] * 3) for key, array in stored.items()}
    data["terminations"][:] = 0
    data["truncations"] = np.tile([0, 0, 1], 3)
    data["rewards"] = np.repeat([-3.0, -2.0, -1.0], 3)
    np.savez(tmp_path / "limits.npz", **data)
    assert cli("decision_transformer", *QUICK, "--dataset", "limits.npz", "--run-dir", "limits")[0] == 0
    assert dt.load("limits").target_return == -3.0


def test_a_cut_episode_is_no_target(cli, tmp_path):
    """It has lost less than all others: on the cliff, one of three steps -3. Where it is the only one, it counts."""
    stored = dict(np.load(SHIPPED / "data.npz"))
    ends = np.flatnonzero(stored["terminations"] | stored["truncations"])
    cases = {"cut": (ends[3] + 2, -4.0), "whole": (ends[3] + 1, -4.0), "alone": (ends[0], -2.0)}
    for name, (stop, _) in cases.items():
        data = {key: array[:stop].copy() for key, array in stored.items()}
        data["rewards"] = np.zeros(stop)
        if name == "alone":
            data["rewards"][-1] = -2.0
        else:
            data["rewards"][ends[:4]] = [-6.0, -5, -8, -4]
            data["rewards"][ends[3] + 1 :] = -1.0
        data["truncations"][-1] |= not data["terminations"][-1]
        np.savez(tmp_path / f"{name}.npz", **data)
    assert stored["terminations"][ends[3]], "the last whole one is whole"
    for name, (_, best) in cases.items():
        assert cli("decision_transformer", *QUICK, "--dataset", f"{name}.npz", "--run-dir", name)[0] == 0
        assert dt.load(name).target_return == best, name


def test_it_is_not_recorded_as_if_each_step_were_the_first(cli):
    assert cli("decision_transformer", *QUICK, "--run-dir", "run")[0] == 0
    with pytest.raises(record.UsageError, match="decision_transformer"):
        record.load_agent("run")


def test_the_model_keeps_scale_and_normaliser(cli, tmp_path):
    data = {name: np.array(values) for name, values in np.load(SHIPPED / "data.npz").items()}
    data["rewards"] = -3.0 * data["rewards"]
    np.savez(tmp_path / "negative.npz", **data)
    flags = "--dataset", "negative.npz", "--norm-obs", "--run-dir", "run"
    code, _, err = cli("decision_transformer", *QUICK, *flags)
    assert code == 0, err
    agent = dt.load("run")
    assert agent.return_scale == 3.0
    assert agent.target_return == 0.0, "the best of 0 and -3"
    obs = torch.eye(16)[data["observations"]]
    torch.testing.assert_close(agent.normalize.mean, obs.mean(0))
    torch.testing.assert_close(agent.normalize.std, obs.std(0, unbiased=False) + 1e-3)


def test_the_learning_rate_rises_and_a_resumed_run_speaks_of_no_episodes(cli):
    assert cli("decision_transformer", *QUICK, "--total-timesteps", 200, "--warmup", 150, "--run-dir", "run")[0] == 0
    rates = [row["charts/learning_rate"] for row in rows_of("run") if "charts/learning_rate" in row]
    assert rates == pytest.approx([1e-3 * 100 / 150, 1e-3])
    code, out, err = cli("decision_transformer", "--run-dir", "run", "--resume", "--total-timesteps", 220)
    assert code == 0, err
    assert "replayed" not in out + err


class Coins(gym.Env):
    """Three steps; action 1 pays 1, action 0 nothing."""

    observation_space, action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.ones(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.ones(1, np.float32), float(action), self.t == 3, False, {}


gym.register("Coins-v0", Coins, disable_env_checker=True)


def write(path, rewards, actions, length):
    n = len(rewards)
    ends = np.arange(1, n + 1) % length == 0
    np.savez(path, observations=np.ones((n, 1)), actions=actions, rewards=rewards, terminations=ends,
             truncations=np.zeros(n), next_observations=np.ones((n, 1)))  # fmt: skip
    return str(path)


TRAINED = {
    "hidden_size": 16,
    "num_layers": 1,
    "learning_rate": 1e-2,
    "warmup": 10,
    "eval_frequency": 10**6,
    "eval_episodes": 30,
}


def test_who_asks_for_a_return_gets_it(tmp_path):
    """The logs throw a fair coin. All of 3, 2, 1 and 0 are to be had, but only if the return-to-go is kept right."""
    actions = np.random.default_rng(0).integers(2, size=1500)
    path = write(tmp_path / "coins.npz", actions.astype(float), actions, 3)
    args = dt.Args(env_id="Coins-v0", dataset=path, run_dir="run", total_timesteps=300, context_length=3, **TRAINED)
    result = dt.train(args)
    assert result["eval/episodic_return"] > 2.9, "the best of the data, without being told"
    agent = dt.load("run")
    for target in 0, 1, 2, 3:
        args = dt.saved_args("run", target_return=float(target))
        result = dt.evaluate(agent, args, tmp_path)
        assert result["eval/episodic_return"] == pytest.approx(target, abs=0.1)
        assert result["eval/return_std"] < 0.3
    assert agent.act(np.ones(1)) == 1
    assert agent.act(np.ones(1), dt.History(0.0)) == 0


def test_luck_is_taken_for_skill_exactly_as_bayes_says(tmp_path):
    """Arm 0 pays nine times in ten, but is rarely pulled; arm 1 three times in ten. Of the pays, most are arm 1's."""
    actions = np.repeat([0, 0, 1, 1], [180, 20, 240, 560])
    rewards = np.repeat([1.0, 0, 1, 0], [180, 20, 240, 560])
    path = write(tmp_path / "arms.npz", rewards, actions, 1)
    flags = {"env_id": "Coins-v0", "dataset": path, "total_timesteps": 300, "context_length": 1, **TRAINED}
    for condition, expected in (True, [20 / 580, 180 / 420]), (False, [0.2, 0.2]):
        dt.train(dt.Args(**flags, condition=condition, run_dir=f"run-{condition}"))
        agent = dt.load(f"run-{condition}")
        context = {"returns_to_go": torch.tensor([[0.0], [1.0]]), "timesteps": torch.zeros(2, 1, dtype=torch.int64),
                   "observations": torch.ones(2, 1, 1), "actions": torch.zeros(2, 1, dtype=torch.int64),
                   "mask": torch.ones(2, 1, dtype=torch.bool)}  # fmt: skip
        arm_0 = agent(context)[:, 0].softmax(-1)[:, 0]
        assert arm_0.tolist() == pytest.approx(expected, abs=0.06)
    assert dt.load("run-True").act(np.ones(1)) == 1, "asked for 1, the likeliest action is the worse arm"


def exact_return(policy, steps=100):
    """The expected return on the frozen lake of policy[t, s, a], from the environment's own table."""
    with closing(gym.make("FrozenLake-v1")) as env:
        table, start = env.unwrapped.P, env.unwrapped.initial_state_distrib
    v = np.zeros(16)
    for t in reversed(range(steps)):
        v = np.array([sum(policy[t, s, a] * p * (r + v[s2] * (not end))
                          for a in range(4) for p, s2, r, end in table[s][a]) for s in table])  # fmt: skip
    return float(np.dot(start, v))


def shares(rows):
    """How often each action is taken in each state in some rows of the shipped logs."""
    data = np.load(SHIPPED / "data.npz")
    count = np.full((16, 4), 1e-9)
    np.add.at(count, (data["observations"][rows], data["actions"][rows]), 1)
    return np.tile(count / count.sum(1, keepdims=True), (100, 1, 1))


def rows_of_success():
    data = np.load(SHIPPED / "data.npz")
    ends = data["terminations"] | data["truncations"]
    episode = ends.cumsum() - ends
    return np.bincount(episode, weights=data["rewards"])[episode] == 1


def test_on_the_slippery_lake_those_who_arrived_were_lucky():
    """What the logs can teach by imitation: little, even if learned exactly. The optimum is 0.74."""
    everyone, arrived = shares(np.arange(20_000)), shares(rows_of_success())
    assert exact_return(everyone) == pytest.approx(0.041, abs=0.001)
    assert exact_return(arrived) == pytest.approx(0.071, abs=0.001)
    likeliest = np.eye(4)[arrived.argmax(-1)]
    assert exact_return(likeliest) == 0, "it pushes against the wall at the start, as most did for most of the time"


def test_the_guides_program_plays_with_a_trained_agent(monkeypatch):
    dt.train(dt.Args(**SMALL, total_timesteps=2, eval_episodes=1, run_dir="runs/lake"))
    section = (
        (ROOT / "algorithms" / "README.md").read_text().split("\n## decision_transformer.py\n")[1].split("\n## ")[0]
    )
    (program,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    os.symlink(ROOT / "algorithms", "algorithms")
    monkeypatch.setattr(sys, "path", [*sys.path])
    namespace = {}
    exec(program, namespace)
    assert len(namespace["history"].steps) == 1
    assert namespace["history"].return_to_go == 1 - namespace["reward"]


@pytest.mark.slow
@pytest.mark.parametrize("condition", [True, False])
def test_it_learns_what_those_did_who_arrived(condition):
    """With a context of one step the policy depends on state and time alone, and its exact return can be computed."""
    args = dt.Args(condition=condition, context_length=1, total_timesteps=1500, hidden_size=32, num_layers=1,
                   eval_frequency=10**6, batch_size=256, run_dir="run")  # fmt: skip
    dt.train(args)
    agent = dt.load("run")
    context = {"returns_to_go": torch.ones(1600, 1), "timesteps": torch.arange(100).repeat_interleave(16)[:, None],
               "observations": torch.eye(16).repeat(100, 1)[:, None], "actions": torch.zeros(1600, 1).long(),
               "mask": torch.ones(1600, 1, dtype=torch.bool)}  # fmt: skip
    with torch.no_grad():
        policy = agent(context)[:, 0].softmax(-1).view(100, 16, 4).double().numpy()
    expected = shares(rows_of_success() if condition else np.arange(20_000))
    assert exact_return(policy) == pytest.approx(exact_return(expected), abs=0.012)
    if not condition:
        assert abs(policy[5, 0] - expected[5, 0]).max() < 0.03
