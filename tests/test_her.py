"""What her.py adds to sac.py: which goals are replayed, and what they pay."""

import inspect
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import rows
from goal_env import VECTOR, Point

from algorithms import her, sac

STEPS = []  # of the environment below: the episode, and what happened


class Noted(Point):
    """Notes its steps. An episode ends in the right half plane, or after 12 steps."""

    ENDS = True

    def near(self, achieved, desired):
        return achieved[..., 0] > 0.5

    def reset(self, *, seed=None, options=None):
        self.obs, info = super().reset(seed=seed)
        self.episode = object()
        return self.obs, info

    def step(self, action):
        before = self.obs
        self.obs, reward, terminated, *others = super().step(action)
        obs, next_obs = (gym.spaces.flatten(self.observation_space, part) for part in (before, self.obs))
        STEPS.append((self.episode, [*obs, *(action / 0.5), reward, terminated, *next_obs]))
        return self.obs, reward, terminated, *others


gym.register("Noted-v0", Noted, disable_env_checker=True)


def args_of(strategy="future", ratio=4.0):
    return types.SimpleNamespace(her_strategy=strategy, her_ratio=ratio)


def fill(buffer, num_envs, steps, seed=0):
    """Transitions whose achieved goals are their own numbers: (10 * row, env). Returns the episodes' rows, per env."""
    rng, episodes = np.random.default_rng(seed), [[[]] for _ in range(num_envs)]
    buffer.begin(np.full(num_envs, True))
    for t in range(steps):
        obs = np.array([[t, i, 1000.0, 1000.0, t, i] for i in range(num_envs)])
        next_obs = np.array([[t + 0.5, i, 1000.0, 1000.0, t + 0.5, i] for i in range(num_envs)])
        buffer.add(obs, np.zeros((num_envs, 1)), np.full(num_envs, -7.0), np.zeros(num_envs, bool), next_obs)
        ended = rng.random(num_envs) < 0.25
        buffer.begin(ended)
        for i in range(num_envs):
            episodes[i][-1].append(t)
            if ended[i]:
                episodes[i].append([])
    return episodes


@pytest.mark.parametrize("strategy", ["future", "episode", "final"])
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("steps", [7, 20, 75])
def test_goals_come_from_where_the_strategy_says(strategy, num_envs, steps):
    length = 20
    buffer = her.GoalBuffer(length * num_envs, num_envs, 6, 1, slice(0, 2), slice(2, 4))
    episodes = fill(buffer, num_envs, steps)
    episode_of = {(t, i): episode for i in range(num_envs) for episode in episodes[i] for t in episode}
    np.random.seed(0)
    obs, actions, rewards, terminated, next_obs = buffer.sample(4000 * num_envs, "cpu", Point(), args_of(strategy))
    assert [part.shape[1:] for part in (obs, actions, rewards, terminated, next_obs)] == [(6,), (1,), (), (), (6,)]
    assert torch.equal(obs[:, 2:4], next_obs[:, 2:4]), "one goal in both"
    assert torch.equal(obs[:, :2] + torch.tensor([0.5, 0]), next_obs[:, :2]), "what was achieved stays"
    relabelled = obs[:, 2] != 1000
    assert relabelled.float().mean() == pytest.approx(0.8, abs=0.03)
    assert (rewards[~relabelled] == -7).all()
    seen, oldest = {}, max(0, steps - length)
    for place, goal in zip(obs[relabelled, :2].tolist(), obs[relabelled, 2:4].tolist(), strict=True):
        seen.setdefault((int(place[0]), int(place[1])), set()).add((goal[0], goal[1]))
    assert len(seen) == min(steps, length) * num_envs
    for (t, i), goals in seen.items():
        episode = [s for s in episode_of[t, i] if s >= oldest]
        allowed = {"future": [s for s in episode if s >= t], "episode": episode, "final": episode[-1:]}[strategy]
        assert goals == {(s + 0.5, float(i)) for s in allowed}, (t, i)
    hits = (obs[:, 2:4] == next_obs[:, :2]).all(1)
    assert torch.equal(rewards[relabelled], hits[relabelled].float() - 1)


@pytest.mark.parametrize(("ratio", "share"), [(0.0, 0.0), (1.0, 0.5), (4.0, 0.8)])
def test_ratio_is_of_replayed_to_true_goals(ratio, share):
    buffer = her.GoalBuffer(50, 1, 6, 1, slice(0, 2), slice(2, 4))
    fill(buffer, 1, 50)
    before = buffer.rows.copy()
    obs, *_ = buffer.sample(20_000, "cpu", Point(), args_of(ratio=ratio))
    assert (obs[:, 2] != 1000).float().mean() == pytest.approx(share, abs=0.015)
    np.testing.assert_array_equal(buffer.rows, before, "the buffer keeps the true goals")


@pytest.mark.parametrize("ends", [True, False])
def test_a_replayed_goal_ends_the_episode_where_reaching_it_would_have(ends, monkeypatch):
    monkeypatch.setattr(Point, "ENDS", ends)
    buffer = her.GoalBuffer(50, 1, 6, 1, slice(0, 2), slice(2, 4))
    fill(buffer, 1, 50)
    _, _, rewards, terminated, _ = buffer.sample(500, "cpu", Point(), args_of())
    assert torch.equal(terminated == 1, (rewards == 0) & ends)
    assert (rewards == 0).any()


def test_the_environment_is_told_what_was_achieved_and_what_was_the_goal():
    """By an environment that pays for the goal's number, and ends where that of the achieved one is larger."""

    class Ordered(Point):
        def compute_reward(self, achieved, desired, info):
            return desired[:, 0]

        def compute_terminated(self, achieved, desired, info):
            return achieved[0] > desired[0]

    buffer = her.GoalBuffer(50, 1, 6, 1, slice(0, 2), slice(2, 4))
    fill(buffer, 1, 50)
    obs, _, rewards, terminated, next_obs = buffer.sample(500, "cpu", Ordered(), args_of("episode"))
    relabelled = obs[:, 2] != 1000
    assert torch.equal(rewards[relabelled], obs[relabelled, 2])
    assert torch.equal(terminated[relabelled] == 1, (next_obs[:, 0] > obs[:, 2])[relabelled])
    assert 0 < terminated[relabelled].mean() < 1


@pytest.mark.parametrize("steps", [7, 20, 33])
def test_buffer_is_saved_as_far_as_it_is_filled_and_goes_on_where_it_was(steps, tmp_path):
    buffer, other = (her.GoalBuffer(40, 2, 6, 1, slice(0, 2), slice(2, 4)) for _ in range(2))
    fill(buffer, 2, steps)
    torch.save(buffer.state_dict(), tmp_path / "file")
    other.load_state_dict(torch.load(tmp_path / "file", weights_only=True))
    for one in buffer, other:
        fill(one, 2, 9, seed=1)
    for name in "rows", "first", "last":
        np.testing.assert_array_equal(getattr(buffer, name), getattr(other, name))
    batches = []
    for one in buffer, other:
        np.random.seed(0)
        batches.append(one.sample(100, "cpu", Point(), args_of()))
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_a_buffer_may_take_nine_tenths_of_the_memory(monkeypatch, capsys):
    monkeypatch.setattr(her.os, "sysconf", {"SC_PHYS_PAGES": 100, "SC_PAGE_SIZE": 10}.get)
    buffer = her.GoalBuffer(25, 1, 1, 1, slice(0, 1), slice(0, 1))
    assert buffer.rows.nbytes + buffer.first.nbytes + buffer.last.nbytes == 900
    with pytest.raises(SystemExit) as end:
        her.GoalBuffer(26, 1, 1, 1, slice(0, 1), slice(0, 1))
    assert end.value.code == 2
    assert "--buffer-size 26 needs" in capsys.readouterr().err


def test_environments_without_goals_are_refused_with_the_script_for_them(capsys):
    with pytest.raises(SystemExit) as end:
        her.make_agent(her.Args(), her.make_env("Pendulum-v1"))
    assert end.value.code == 2
    assert "desired_goal: see sac.py" in capsys.readouterr().err


class Grid(Point):
    observation_space = gym.spaces.Dict(
        observation=VECTOR,
        achieved_goal=gym.spaces.MultiDiscrete([5, 5]),
        desired_goal=gym.spaces.MultiDiscrete([5, 5]),
    )


class Nested(Point):
    observation_space = gym.spaces.Dict(
        observation=VECTOR, achieved_goal=gym.spaces.Dict(a=VECTOR), desired_goal=gym.spaces.Dict(a=VECTOR)
    )


class OneSum(Point):
    def near(self, achieved, desired):  # of the whole batch: axis is missing
        return np.linalg.norm(achieved - desired) < 0.3


class NeverTerminated(Point):
    compute_terminated = property()


@pytest.mark.parametrize(
    ("env_class", "word"),
    [(Grid, "vectors"), (Nested, "vectors"), (OneSum, "no batch"), (NeverTerminated, "compute_terminated")],
)
def test_goals_that_can_not_be_replaced_are_refused(env_class, word, capsys):
    env = gym.wrappers.FlattenObservation(env_class())
    with pytest.raises(SystemExit) as end:
        her.make_agent(her.Args(), env)
    assert end.value.code == 2
    assert word in capsys.readouterr().err


def test_goals_are_found_in_flat_observations():
    env = her.make_env("Point-v0")
    achieved, desired = her.where_goals_are(env.unwrapped.observation_space)
    env.reset(seed=0)
    obs, *_ = env.step(np.array([0.5, -0.25], np.float32))
    np.testing.assert_allclose(obs[achieved], [0.5, -0.25])
    np.testing.assert_allclose(obs[desired], env.unwrapped.goal)
    assert achieved == slice(2, 4), "Point has its observation first"
    long = gym.spaces.Box(0, 1, (9,))
    other = gym.spaces.Dict({"observation": long, "desired_goal": VECTOR, "achieved_goal": VECTOR})
    sample = other.sample()
    flat = gym.spaces.flatten(other, sample)
    for name, place in zip(("achieved_goal", "desired_goal"), her.where_goals_are(other), strict=True):
        np.testing.assert_array_equal(flat[place], sample[name])


def test_what_sac_has_too_is_the_same_to_the_letter():
    """Here is what tests/test_consistency.py leaves out, and of the loop all but two lines."""
    for name in "Actor", "td_target", "gradient_steps_until":
        assert inspect.getsource(getattr(her, name)) == inspect.getsource(getattr(sac, name))
    ours, theirs = (inspect.getsource(script.train).splitlines() for script in (her, sac))
    replaced = [line.split("(")[0].strip() for line in theirs if line not in ours]
    assert replaced == ["buffer = TransitionBuffer", "metrics = learner.update"]


@pytest.mark.parametrize("num_envs", [1, 3])
def test_what_reaches_the_buffer_is_what_happened(num_envs, monkeypatch):
    STEPS.clear()
    buffers, make = [], her.GoalBuffer.__init__
    monkeypatch.setattr(her.GoalBuffer, "__init__", lambda self, *args: (buffers.append(self), make(self, *args))[0])
    monkeypatch.setattr(her, "evaluate", lambda *_: {"eval/episodic_return": 0.0})
    her.train(her.Args(env_id="Noted-v0", total_timesteps=90 * num_envs, num_envs=num_envs, device="cpu", utd=0.0,
                       checkpoint_frequency=90 * num_envs))  # fmt: skip
    for i in range(num_envs):
        episodes, happened = zip(*STEPS[i::num_envs], strict=True)
        np.testing.assert_allclose(buffers[0].rows[:, i], happened, atol=1e-6)
        first = [episodes.index(episode) for episode in episodes]
        lengths = [episodes.count(episode) for episode in episodes]
        np.testing.assert_array_equal(buffers[0].first[:, i], first)
        np.testing.assert_array_equal(buffers[0].last[:, i], np.add(first, lengths) - 1)
        assert 12 in lengths
        assert len(set(lengths)) > 2, "some end before"


@pytest.mark.parametrize(("num_envs", "success"), [(1, "success"), (1, None), (3, "is_success")])
def test_train_hands_whole_episodes_to_the_buffer_and_logs_success(num_envs, success, monkeypatch, tmp_path):
    monkeypatch.setattr(Point, "SUCCESS", success)
    monkeypatch.setattr(Point, "near", lambda self, achieved, desired: desired[..., 0] > 0)  # all of an episode or none
    buffers, make = [], her.GoalBuffer.__init__
    monkeypatch.setattr(her.GoalBuffer, "__init__", lambda self, *args: (buffers.append(self), make(self, *args))[0])
    her.train(her.Args(env_id="Point-v0", total_timesteps=40 * num_envs, num_envs=num_envs, device="cpu", utd=0.0,
                       checkpoint_frequency=30 * num_envs, eval_episodes=1, run_dir=str(tmp_path / "run")))  # fmt: skip
    bounds = [(0, 11)] * 12 + [(12, 23)] * 12 + [(24, 29)] * 6 + [(30, 39)] * 10  # the checkpoint at 30 cuts one
    for i in range(num_envs):
        assert list(zip(buffers[0].first[:, i], buffers[0].last[:, i], strict=True)) == bounds
    ended = [row for row in rows(tmp_path / "run") if "charts/episodic_return" in row]
    assert len(ended) == 2 * num_envs
    returns = [row["charts/episodic_return"] for row in ended]
    assert set(returns) == {0, -12} or num_envs == 1
    assert [row.get("charts/success") for row in ended] == [value == 0 if success else None for value in returns]


def test_it_learns_to_reach_goals_which_sac_alone_misses(tmp_path):
    results = {}
    for ratio in 4.0, 0.0:
        her.train(her.Args(env_id="Point-v0", total_timesteps=1500, learning_starts=300, device="cpu", batch_size=64,
                           her_ratio=ratio, eval_frequency=1500, eval_episodes=50,
                           run_dir=str(tmp_path / f"run{ratio}")))  # fmt: skip
        results[ratio] = rows(tmp_path / f"run{ratio}")[-1]["eval/episodic_return"]
    assert results[4.0] > -5, "the farthest goal is 6 steps away"
    assert results[4.0] > results[0.0] + 2
