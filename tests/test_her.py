"""What her.py adds to sac.py: which goals are replayed, and what they pay."""

import copy
import inspect
import re
import types
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import rows, timeless
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
    return types.SimpleNamespace(env_id="Point-v0", her_strategy=strategy, her_ratio=ratio)


def make_buffer(size=50, num_envs=1):
    return her.HindsightReplayBuffer(size, num_envs, 6, 1)


def sample(buffer, size, env, **args):
    """From observations whose first two numbers are the achieved goal, and whose next two are the desired one."""
    goals = her.Goals(args_of(), env)
    goals.achieved, goals.desired = slice(0, 2), slice(2, 4)
    return buffer.sample(size, goals, args_of(**args))


def fill(buffer, num_envs, steps, seed=0):
    """Transitions whose achieved goals are their own numbers: (row, env). Returns the episodes' rows, per env."""
    rng, episodes = np.random.default_rng(seed), [[[]] for _ in range(num_envs)]
    first = np.full(num_envs, buffer.added)
    for t in range(steps):
        obs = np.array([[t, i, 1000.0, 1000.0, t, i] for i in range(num_envs)])
        next_obs = np.array([[t + 0.5, i, 1000.0, 1000.0, t + 0.5, i] for i in range(num_envs)])
        buffer.add(obs=obs, actions=np.zeros((num_envs, 1)), rewards=np.full(num_envs, -7.0),
                   terminated=np.zeros(num_envs, bool), next_obs=next_obs, first=first)  # fmt: skip
        ended = rng.random(num_envs) < 0.25
        first = np.where(ended, buffer.added, first)
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
    buffer = make_buffer(length * num_envs, num_envs)
    episodes = fill(buffer, num_envs, steps)
    episode_of = {(t, i): episode for i in range(num_envs) for episode in episodes[i] for t in episode}
    torch.manual_seed(0)
    obs, actions, rewards, terminated, next_obs = sample(buffer, 4000 * num_envs, Point(), strategy=strategy)
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
    buffer = make_buffer()
    fill(buffer, 1, 50)
    before = copy.deepcopy(buffer.arrays)
    obs, *_ = sample(buffer, 20_000, Point(), ratio=ratio)
    assert (obs[:, 2] != 1000).float().mean() == pytest.approx(share, abs=0.015)
    for name, array in before.items():
        np.testing.assert_array_equal(buffer.arrays[name], array, "the buffer keeps the true goals")


@pytest.mark.parametrize("ends", [True, False])
def test_a_replayed_goal_ends_the_episode_where_reaching_it_would_have(ends, monkeypatch):
    monkeypatch.setattr(Point, "ENDS", ends)
    buffer = make_buffer()
    fill(buffer, 1, 50)
    _, _, rewards, terminated, _ = sample(buffer, 500, Point())
    assert torch.equal(terminated == 1, (rewards == 0) & ends)
    assert (rewards == 0).any()


def test_the_environment_is_told_what_was_achieved_and_what_was_the_goal():
    """By an environment that pays for the goal's number, and ends where that of the achieved one is larger."""

    class Ordered(Point):
        def compute_reward(self, achieved, desired, info):
            return desired[:, 0]

        def compute_terminated(self, achieved, desired, info):
            return achieved[0] > desired[0]

    buffer = make_buffer()
    fill(buffer, 1, 50)
    obs, _, rewards, terminated, next_obs = sample(buffer, 500, Ordered(), strategy="episode")
    relabelled = obs[:, 2] != 1000
    assert torch.equal(rewards[relabelled], obs[relabelled, 2])
    assert torch.equal(terminated[relabelled] == 1, (next_obs[:, 0] > obs[:, 2])[relabelled])
    assert 0 < terminated[relabelled].mean() < 1


@pytest.mark.parametrize("steps", [7, 20, 33])
def test_buffer_is_saved_as_far_as_it_is_filled_and_goes_on_where_it_was(steps, tmp_path):
    buffer, other = make_buffer(40, 2), make_buffer(40, 2)
    fill(buffer, 2, steps)
    torch.save(buffer.state_dict(), tmp_path / "file")
    other.load_state_dict(torch.load(tmp_path / "file", weights_only=True))
    for one in buffer, other:
        fill(one, 2, 9, seed=1)
    for name, array in buffer.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name])
    batches = []
    for one in buffer, other:
        torch.manual_seed(0)
        batches.append(sample(one, 100, Point()))
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_a_buffer_may_take_nine_tenths_of_the_memory(monkeypatch):
    monkeypatch.setattr(her.os, "sysconf", {"SC_PHYS_PAGES": 100, "SC_PAGE_SIZE": 10}.get)
    assert sum(array.nbytes for array in her.HindsightReplayBuffer(25, 1, 1, 1).arrays.values()) == 900
    with pytest.raises(her.UsageError, match=r"--buffer-size 26 needs .* GB"):
        her.HindsightReplayBuffer(26, 1, 1, 1)


def test_environments_without_goals_are_refused_with_the_script_for_them():
    env = her.make_env(her.Args(env_id="Pendulum-v1"))
    with pytest.raises(her.UsageError, match=r"desired_goal like it: see sac\.py"):
        her.Goals(her.Args(), env.unwrapped)


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


@pytest.mark.parametrize(("env_class", "word"), [(Grid, "vectors"), (Nested, "vectors"), (OneSum, "no batch")])
def test_goals_that_can_not_be_replaced_are_refused(env_class, word):
    with pytest.raises(her.UsageError, match=word):
        her.Goals(her.Args(), env_class())


class NothingEnds(Point):
    compute_terminated = property()  # hasattr says no


class NotSaid(Point):
    def compute_terminated(self, achieved, desired, info):
        raise NotImplementedError


for env_class in NothingEnds, NotSaid:
    gym.register(f"{env_class.__name__}-v0", env_class, disable_env_checker=True)


@pytest.mark.parametrize("env_class", [NothingEnds, NotSaid])
def test_without_compute_terminated_a_transition_keeps_its_end(env_class, monkeypatch, capsys):
    monkeypatch.setattr(her, "evaluate", lambda *_: {"eval/episodic_return": 0.0})
    her.train(her.Args(env_id=f"{env_class.__name__}-v0", total_timesteps=40, learning_starts=20, batch_size=8))
    assert capsys.readouterr().out.count("has no compute_terminated") == 1
    buffer = make_buffer(40, 2)
    fill(buffer, 2, 20)
    ends = buffer.arrays["terminated"][:] = np.random.default_rng(0).random((20, 2)) < 0.5
    obs, _, rewards, terminated, _ = sample(buffer, 500, env_class())
    places = obs[:, :2].long().numpy()
    np.testing.assert_array_equal(terminated.numpy(), ends[places[:, 0], places[:, 1]])
    assert (rewards == 0).any()
    assert (obs[:, 2] != 1000).any()


@pytest.mark.parametrize("error", [ZeroDivisionError, AttributeError])
def test_errors_of_compute_terminated_are_the_environments_own(error):
    class Wrong(Point):
        def compute_terminated(self, achieved, desired, info):
            raise error

    with pytest.raises(error):
        her.Goals(her.Args(), Wrong())


class SetByReset(Point):
    """Its two functions need what only reset sets."""

    def reset(self, **what):
        self.factor = 1
        return super().reset(**what)

    def compute_reward(self, achieved, desired, info):
        return self.factor * super().compute_reward(achieved, desired, info)

    def compute_terminated(self, achieved, desired, info):
        return self.factor == 2


gym.register("SetByReset-v0", SetByReset, disable_env_checker=True)


def test_the_environment_is_reset_before_its_functions_are_tried(monkeypatch, capsys):
    monkeypatch.setattr(her, "evaluate", lambda *_: {"eval/episodic_return": 0.0})
    her.train(her.Args(env_id="SetByReset-v0", total_timesteps=40, learning_starts=20, batch_size=8))
    assert "has no compute_terminated" not in capsys.readouterr().out


class Restless(Point):
    """To ask whether a goal ends the episode moves its own goal, as in AntMaze_UMaze-v3."""

    def compute_terminated(self, achieved, desired, info):
        self.goal = np.full(2, 8, np.float32)
        return False


gym.register("Restless-v0", Restless, disable_env_checker=True)


def test_asking_about_goals_leaves_the_environments_that_act_alone(monkeypatch):
    seen, add = [], her.HindsightReplayBuffer.add
    monkeypatch.setattr(her, "evaluate", lambda *_: {"eval/episodic_return": 0.0})
    monkeypatch.setattr(
        her.HindsightReplayBuffer, "add", lambda buffer, **new: (seen.append(new["next_obs"]), add(buffer, **new))
    )
    her.train(her.Args(env_id="Restless-v0", total_timesteps=40, learning_starts=10, batch_size=8))
    assert len(seen) == 40
    assert np.abs(seen).max() < 8


def test_goals_are_found_in_flat_observations():
    env = her.make_env(her.Args(env_id="Point-v0"))
    goals = her.Goals(her.Args(), env.unwrapped)
    env.reset(seed=0)
    obs, *_ = env.step(np.array([0.5, -0.25], np.float32))
    np.testing.assert_allclose(obs[goals.achieved], [0.5, -0.25])
    np.testing.assert_allclose(obs[goals.desired], env.unwrapped.goal)
    assert goals.achieved == slice(2, 4), "Point has its observation first"

    class Other(Point):
        long = gym.spaces.Box(0, 1, (9,))
        observation_space = gym.spaces.Dict({"observation": long, "desired_goal": VECTOR, "achieved_goal": VECTOR})

    goals, parts = her.Goals(her.Args(), Other()), Other.observation_space.sample()
    flat = gym.spaces.flatten(Other.observation_space, parts)
    np.testing.assert_array_equal(flat[goals.achieved], parts["achieved_goal"])
    np.testing.assert_array_equal(flat[goals.desired], parts["desired_goal"])


def test_what_sac_has_too_is_the_same_to_the_letter():
    """Here is what tests/test_consistency.py leaves out, and of the loop all but two lines. with opens one more env."""
    for name in "SAC", "td_target", "update", "make_agent":
        assert inspect.getsource(getattr(her, name)) == inspect.getsource(getattr(sac, name))
    ours, theirs = (inspect.getsource(script.train).splitlines() for script in (her, sac))
    opened, *replaced = [re.split("[(=]", line)[0].strip() for line in theirs if line not in ours]
    assert opened == "with contextlib.closing"
    assert replaced == ["buffer", "next_obs, rewards, terminated, _, _", "buffer.add", "batch"]


@pytest.fixture
def buffers(monkeypatch):
    """Those that train makes. No evaluation takes its time."""
    made, make = [], her.HindsightReplayBuffer.__init__
    monkeypatch.setattr(
        her.HindsightReplayBuffer, "__init__", lambda self, *args: (made.append(self), make(self, *args))[0]
    )
    monkeypatch.setattr(her, "evaluate", lambda *_: {"eval/episodic_return": 0.0})
    return made


@pytest.mark.parametrize("num_envs", [1, 3])
def test_what_reaches_the_buffer_is_what_happened(num_envs, buffers):
    STEPS.clear()
    her.train(her.Args(env_id="Noted-v0", total_timesteps=90 * num_envs, num_envs=num_envs, utd=0.0))
    names = "obs", "actions", "rewards", "terminated", "next_obs"
    for i in range(num_envs):
        episodes, happened = zip(*STEPS[i::num_envs], strict=True)
        columns = [buffers[0].arrays[name][:, i].reshape(90, -1) for name in names]
        np.testing.assert_allclose(np.hstack(columns), happened, atol=1e-6)
        first = [episodes.index(episode) for episode in episodes]
        lengths = [episodes.count(episode) for episode in episodes]
        np.testing.assert_array_equal(buffers[0].arrays["first"][:, i], first)
        np.testing.assert_array_equal(buffers[0].arrays["last"][:, i], np.add(first, lengths) - 1)
        assert 12 in lengths
        assert len(set(lengths)) > 2, "some end before"


def bounds(buffer, i):
    """The first and the last row of the episode of each of environment i's transitions."""
    return list(zip(buffer.arrays["first"][:, i], buffer.arrays["last"][:, i], strict=True))


@pytest.mark.parametrize(("num_envs", "success"), [(1, "success"), (1, None), (3, "is_success")])
def test_train_hands_whole_episodes_to_the_buffer_and_logs_success(num_envs, success, monkeypatch, buffers, tmp_path):
    monkeypatch.setattr(Point, "SUCCESS", success)
    monkeypatch.setattr(Point, "near", lambda self, achieved, desired: desired[..., 0] > 0)  # all of an episode or none
    her.train(her.Args(env_id="Point-v0", total_timesteps=40 * num_envs, num_envs=num_envs, utd=0.0,
                       checkpoint_frequency=7 * num_envs, run_dir=str(tmp_path / "run")))  # fmt: skip
    for i in range(num_envs):
        assert bounds(buffers[0], i) == [(0, 11)] * 12 + [(12, 23)] * 12 + [(24, 35)] * 12 + [(36, 39)] * 4
    ended = [row for row in rows(tmp_path / "run") if "charts/episodic_return" in row]
    assert len(ended) == 3 * num_envs
    returns = [row["charts/episodic_return"] for row in ended]
    assert set(returns) == {0, -12}
    logged = [(row["global_step"], row["charts/success"]) for row in rows(tmp_path / "run") if "charts/success" in row]
    assert logged == ([(row["global_step"], row["charts/episodic_return"] == 0) for row in ended] if success else [])


class Drifting(Point):
    """No two of its episodes are alike, whatever the seed."""

    MADE: ClassVar[list] = []

    def reset(self, *, seed=None, options=None):
        _, info = super().reset(seed=seed)
        self.MADE.append(self)
        self.place = np.full(2, 0.001 * len(self.MADE), np.float32)
        return self.observe(), info


gym.register("Drifting-v0", Drifting, disable_env_checker=True)


@pytest.mark.parametrize(("env_id", "third"), [("Point-v0", [(24, 35)] * 12), ("Drifting-v0", None)])
def test_a_resumed_run_joins_the_rows_of_one_episode_alone(env_id, third, buffers, tmp_path):
    """Where an environment can't be replayed, the present episode ends at the checkpoint, here after row 29."""
    flags = {"env_id": env_id, "num_envs": 2, "utd": 0.0, "buffer_size": 2000, "run_dir": str(tmp_path / "run")}
    her.train(her.Args(total_timesteps=60, **flags))
    her.train(her.saved_args(tmp_path / "run", resume=True, total_timesteps=90))
    third = third or [(24, 29)] * 6 + [(30, 41)] * 6
    for i in range(2):
        assert bounds(buffers[1], i)[:36] == [(0, 11)] * 12 + [(12, 23)] * 12 + third


@pytest.mark.slow
def test_killed_and_resumed_equals_unbroken(tmp_path, monkeypatch):
    """Bit for bit, in the middle of episodes and with a buffer that is full; and no checkpoint leaves a trace."""
    flags = {"env_id": "Point-v0", "total_timesteps": 501, "num_envs": 3, "eval_frequency": 501, "eval_episodes": 1,
             "batch_size": 8, "buffer_size": 150, "learning_starts": 60}  # fmt: skip
    her.train(her.Args(run_dir=str(tmp_path / "unbroken"), checkpoint_frequency=501, **flags))
    save = her.Run.save

    def die(self):
        save(self)
        if self.global_step == 300:
            raise KeyboardInterrupt

    monkeypatch.setattr(her.Run, "save", die)
    with pytest.raises(KeyboardInterrupt):
        her.train(her.Args(run_dir=str(tmp_path / "killed"), checkpoint_frequency=30, **flags))
    monkeypatch.setattr(her.Run, "save", save)
    her.train(her.saved_args(tmp_path / "killed", resume=True))
    assert any("losses/actor_loss" in row for row in rows(tmp_path / "killed"))
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "unbroken")
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("killed", "unbroken"))
    for part in "model", "buffer":
        for name, value in one[part].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(two[part][name])), name


@pytest.mark.slow
def test_it_learns_to_reach_goals_which_sac_alone_misses(tmp_path):
    results = {}
    for ratio in 4.0, 0.0:
        her.train(her.Args(env_id="Point-v0", total_timesteps=1500, learning_starts=300, batch_size=64,
                           her_ratio=ratio, eval_frequency=1500, eval_episodes=50,
                           run_dir=str(tmp_path / f"run{ratio}")))  # fmt: skip
        results[ratio] = rows(tmp_path / f"run{ratio}")[-1]["eval/episodic_return"]
    assert results[4.0] > -5, "the farthest goal is 6 steps away"
    assert results[4.0] > results[0.0] + 2
