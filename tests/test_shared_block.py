"""What stands below the ruled line, called directly: environments, evaluation, seeds, log. ppo.py stands for all:
test_consistency.py holds the others to the same text, and test_contract.py tests it in whole runs of every script."""

import contextlib
import random
import types
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import rows
from tiny_envs import SEEDS, Counter, Seeded

from algorithms import ppo


class Dice(Seeded):
    """Draws from Python's and NumPy's global generators, as a careless environment does."""

    def step(self, action):
        self.t += 1
        return np.array([random.random()], np.float32), np.random.random(), False, self.t == 3, {}


class Careless(Seeded):
    """Declares float32, and returns what RETURNS says; its last one is an array that it keeps overwriting."""

    RETURNS = "float64"

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.array = getattr(self, "array", np.zeros(1, np.float32))
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        return self.observe(), 1.0, False, self.t == 5, {}

    def observe(self):
        self.array[:] = self.t
        return {"float64": np.array([self.t], np.float64), "list": [float(self.t)], "live": self.array}[self.RETURNS]


for env in Dice, Careless:
    gym.register(f"{env.__name__}-v0", env, disable_env_checker=True)


def zeros(obs):
    return np.zeros(len(obs), int)


def evaluate(act: Callable[[np.ndarray], np.ndarray] = zeros, **flags: object) -> dict[str, float]:
    args = ppo.Args(**flags)
    with contextlib.closing(ppo.make_env(args)) as env:
        agent = types.SimpleNamespace(act=act, obs_shape=env.observation_space.shape, action_space=env.action_space)
    return ppo.evaluate(agent, args, Path("film"))


@contextlib.contextmanager
def started(**flags):
    """A run that has begun, in an empty folder."""
    args = ppo.Args(**flags)
    with contextlib.closing(ppo.Run(args)) as run:
        run.start(model=ppo.make_agent(args, run.obs_shape, run.action_space))
        yield run


def seeds_of_training(seed, steps=9):
    SEEDS.clear()
    with started(env_id="Seeded-v0", seed=seed, num_envs=4) as run:
        for _ in range(steps):
            run.step(np.zeros(4, int))
    return list(SEEDS)


def test_no_two_episodes_share_a_seed():
    training = seeds_of_training(1) + seeds_of_training(2)
    assert seeds_of_training(1) == training[:16], "the same seed, the same episodes"
    evaluation = []
    for seed in 1, 2:
        SEEDS.clear()
        for _ in range(2):
            result = evaluate(env_id="Seeded-v0", seed=seed, eval_episodes=3)
        assert SEEDS[:3] == SEEDS[3:], "each evaluation plays the same episodes"
        evaluation += SEEDS[:3]
    assert len(set(training + evaluation)) == 2 * 4 * 4 + 2 * 3, "4 environments begin 4 episodes"
    assert result == {"eval/episodic_return": 6, "eval/return_std": 0, "eval/episodic_length": 3}


def test_evaluation_averages_over_episodes_of_different_lengths(monkeypatch):
    made, make_env = iter(range(-1, 100)), ppo.make_env  # evaluate above makes one for its spaces

    def make(*args, **kwargs):
        env = make_env(*args, **kwargs)
        env.unwrapped.episode = next(made) - 1  # the next reset begins Counter's episode 0, 1, 2: 3, 2, 4 steps
        return env

    monkeypatch.setattr(ppo, "make_env", make)
    result = evaluate(env_id="Counter-v0", eval_episodes=3)
    returns = np.array([6.0, 3, 10])
    assert result["eval/episodic_return"] == pytest.approx(returns.mean())
    assert result["eval/return_std"] == pytest.approx(returns.std())
    assert result["eval/episodic_length"] == np.mean(Counter.LENGTHS)


def test_evaluation_leaves_the_global_streams_alone_and_is_not_moved_by_them():
    results = []
    for seed in 1, 2:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        results.append(evaluate(lambda obs: (obs[:, 0] > 0.5).astype(int), env_id="Dice-v0", eval_episodes=3))
        assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert results[0] == results[1]


def test_a_signal_ends_an_evaluation_without_a_result(monkeypatch):
    calls = []

    def act(obs):
        calls.append(obs)
        if len(calls) == 2:
            monkeypatch.setattr(ppo.Run, "stop_signal", 15)
        return zeros(obs)

    assert evaluate(act, env_id="Seeded-v0", eval_episodes=2) == {}
    assert len(calls) == 2


@pytest.mark.parametrize("limit", [{}, {"eval_max_steps": 50}])
def test_evaluation_of_an_environment_without_a_time_limit_ends(monkeypatch, limit, capsys):
    monkeypatch.setattr(Seeded, "step", lambda self, action: (np.zeros(1, np.float32), 1.0, False, False, {}))
    result = evaluate(env_id="Seeded-v0", eval_episodes=1, **limit)
    assert result["eval/episodic_length"] == limit.get("eval_max_steps", 27_000)
    assert "--eval-max-steps" in capsys.readouterr().out, "it says that an episode may have been cut"


@pytest.mark.parametrize("kind", ["float64", "list", "live"])
def test_observations_are_copied_as_float32_whatever_the_environment_returns(kind, monkeypatch):
    monkeypatch.setattr(Careless, "RETURNS", kind)
    with started(env_id="Careless-v0", num_envs=1) as run:
        seen, led_to = [run.obs], []
        for _ in range(7):
            next_obs, *_ = run.step(np.zeros(1, int))
            led_to.append(next_obs)
            seen.append(run.obs)
    assert [obs[0, 0] for obs in seen] == [0, 1, 2, 3, 4, 0, 1, 2], "after an end, a new episode's first"
    assert [obs[0, 0] for obs in led_to] == [1, 2, 3, 4, 5, 1, 2], "at an end, the old one's last"
    assert {obs.dtype for obs in seen + led_to} == {np.dtype(np.float32)}


def test_the_largest_numbers_of_float32_are_numbers(monkeypatch):
    monkeypatch.setattr(Seeded, "step", lambda self, action: (np.full(1, 3e38, np.float32), 1.0, False, False, {}))
    with started(env_id="Seeded-v0", num_envs=4) as run:
        run.step(np.zeros(4, int))
    assert (run.obs == np.float32(3e38)).all()


def test_atari_preprocessing():
    env = ppo.make_env(ppo.Args(env_id="ALE/Breakout-v5"))
    atari = env
    while not isinstance(atari, gym.wrappers.AtariPreprocessing):
        atari = atari.env
    assert (atari.frame_skip, atari.noop_max, atari.terminal_on_life_loss) == (4, 30, False)
    assert atari.unwrapped._frameskip == 1, "else it would skip 4 times 4 frames"
    assert env.observation_space == gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)


def test_rows_of_training_have_the_steps_a_second_since_the_run_began(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(ppo, "time", types.SimpleNamespace(time=lambda: clock[0]))
    with started(env_id="Seeded-v0", num_envs=2, run_dir="run") as run:
        for _ in range(3):
            clock[0] += 0.25
            run.step(np.zeros(2, int))
        clock[0] += 0.25
        run.log({"losses/loss": 0.5, "charts/learning_rate": 0.1})
    *ends, row = rows(Path("run"))
    assert [end["time"] for end in ends] == [0.75, 0.75], "of two episodes"
    assert row == {"global_step": 6, "time": 1, "losses/loss": 0.5, "charts/learning_rate": 0.1, "charts/SPS": 6}
