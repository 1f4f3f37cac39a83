"""Environments of milliseconds, whose every observation and reward a test can foresee."""

import gymnasium as gym
import numpy as np

MADE, SEEDS = [], []  # by the environments below: themselves, the seeds of their episodes


class Counter(gym.Env):
    """Observes step + 100 * episode and pays the step; its n-th episode lasts LENGTHS[n % 3], ends as ENDS[n % 3]."""

    LENGTHS, ENDS = (3, 2, 4), ("terminated", "truncated", "truncated")
    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        self.episode, self.t, self.steps = -1, 0, 0
        MADE.append(self)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return np.array([100.0 * self.episode], np.float32), {}

    def step(self, action):
        self.t, self.steps = self.t + 1, self.steps + 1
        over = self.t == self.LENGTHS[self.episode % 3]
        end = self.ENDS[self.episode % 3]
        obs = np.array([self.t + 100.0 * self.episode], np.float32)
        return obs, float(self.t), over and end == "terminated", over and end == "truncated", {}


class Seeded(gym.Env):
    """Ends by truncation after three steps, which pay 1, 2 and 3; notes the seeds that it is given."""

    observation_space = gym.spaces.Box(-9, 9, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            SEEDS.append(seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(1, np.float32), float(self.t), False, self.t == 3, {}


for env in Counter, Seeded:
    gym.register(f"{env.__name__}-v0", env, disable_env_checker=True)
