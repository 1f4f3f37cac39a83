"""Environments as people write them, each with a trait that a script could stumble over.

Each comes in the kinds that the scripts act in: --env-id fault_envs:Plain-discrete-v0 has vectors and two actions,
Plain-box-v0 a force instead, Plain-table-v0 states with numbers, Plain-goal-v0 goals; fault_envs:PlainTeam has agents.
"""

import random
from collections import Counter
from typing import ClassVar

import gymnasium as gym
import numpy as np
import torch
from pettingzoo import ParallelEnv

VECTOR, FORCE = gym.spaces.Box(-9, 9, (3,), np.float32), gym.spaces.Box(-1, 1, (1,), np.float32)
KINDS = {
    "discrete": (VECTOR, gym.spaces.Discrete(2)),
    "box": (VECTOR, FORCE),
    "table": (gym.spaces.Discrete(10), gym.spaces.Discrete(2)),
    "goal": (gym.spaces.Dict(observation=VECTOR, achieved_goal=FORCE, desired_goal=FORCE), FORCE),
}
COUNT = Counter()  # of what was made, and of what was closed
SWITCH = Counter()  # what a test sets in an environment: a key that is not 0 switches something
ERRORS = RuntimeError("it broke"), KeyboardInterrupt()  # of which SWITCH["error"] is one


class Plain(gym.Env):
    """Ten steps, which pay for large actions. It has no constructor, so it takes no render_mode."""

    LENGTH = 10

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t += 1
        obs = self.observe()
        if isinstance(self.observation_space, gym.spaces.Dict):
            reward = self.compute_reward(obs["achieved_goal"], obs["desired_goal"], {})
        else:
            reward = np.sum(action)
        return obs, self.pay(float(reward)), False, self.ends(), {}

    def ends(self):
        return self.t >= self.LENGTH

    def pay(self, reward):
        return reward

    def vector(self):
        return np.array([self.t / 10, *self.np_random.uniform(-1, 1, 2)], np.float32)

    def observe(self):
        vector = self.vector()
        if isinstance(self.observation_space, gym.spaces.Discrete):
            return int(abs(vector[1]) * 9.99)
        if isinstance(self.observation_space, gym.spaces.Dict):
            return {"observation": vector, "achieved_goal": vector[1:2], "desired_goal": np.zeros(1, np.float32)}
        return vector

    def compute_reward(self, achieved, desired, info):
        return -(np.abs(achieved - desired) > 0.5).any(-1).astype(np.float32)


class NeedsFile(Plain):
    """Its constructor has an argument of its own, which gymnasium.make knows nothing of."""

    def __init__(self, csv):
        self.csv = csv


class Faulty(Plain):
    """Its constructor has a fault of its own."""

    def __init__(self):
        raise ValueError("no market today")


class PaysArrays(Plain):
    """Rewards are arrays of one element, as a network or a data frame gives them."""

    def pay(self, reward):
        return np.array([reward])


class PaysZeroDim(Plain):
    def pay(self, reward):
        return np.array(reward, np.float32)


class EndsInArrays(Plain):
    """Whether an episode has ended is an array of one element as well."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, np.array([terminated]), np.array([truncated]), info


class PaysIntegers(Plain):
    """Integers of Python, and no noise to tell one episode from another."""

    def pay(self, reward):
        return round(reward)


class PaysNan(Plain):
    def pay(self, reward):
        return float("nan") if self.t == 7 else reward


class PaysInfinity(Plain):
    def pay(self, reward):
        return -float("inf") if self.t == 7 else reward


class ShowsNan(Plain):
    """After seven steps."""

    def vector(self):
        return super().vector() if self.t != 7 else np.array([0, np.nan, 0], np.float32)


class BeginsWithNan(Plain):
    """In one episode of three."""

    def vector(self):
        vector = super().vector()
        return vector * np.nan if self.t == 0 and self.np_random.random() < 1 / 3 else vector


class ShowsInfinity(Plain):
    def vector(self):
        return super().vector() if self.t != 7 else np.array([0, np.inf, 0], np.float32)


class Overwrites(Plain):
    """Observes one array, which it keeps overwriting."""

    def vector(self):
        vector = self.__dict__.setdefault("array", np.zeros(3, np.float32))
        vector[:] = super().vector()
        return vector


class ShowsTooLittle(Plain):
    """Observes one number, where its space has three."""

    def vector(self):
        return super().vector()[:1]


class Float64(Plain):
    """Observes other numbers than its space says."""

    def vector(self):
        return super().vector().astype(np.float64)


class Dice(Plain):
    """Draws from the global generators of Python and NumPy: a run of it can't be replayed from the middle."""

    def vector(self):
        return np.array([self.t / 10, random.uniform(-1, 1), np.random.uniform(-1, 1)], np.float32)


class SomeDice(Dice):
    """Does so in half of its episodes."""

    def reset(self, *, seed=None, options=None):
        self.throws = seed is not None and seed % 2
        return super().reset(seed=seed)

    def vector(self):
        return super().vector() if self.throws else Plain.vector(self)


class DiceEnd(Dice):
    """How long an episode is, is thrown as well; no step may follow its end."""

    def reset(self, *, seed=None, options=None):
        self.length = random.randint(2, 20)
        return super().reset(seed=seed)

    def step(self, action):
        assert self.t < self.length, "a step after the end"
        return super().step(action)

    def ends(self):
        return self.t == self.length


class TorchDice(Plain):
    """Draws from PyTorch's global generator, as a learned simulator does."""

    def vector(self):
        return np.array([self.t / 10, *torch.rand(2).tolist()], np.float32)


class DiceMap(Plain):
    """Draws a map when it is made, and never again."""

    def __init__(self):
        self.map = random.uniform(-1, 1), np.random.uniform(-1, 1)

    def vector(self):
        return super().vector() / 2 + np.array([0, *self.map], np.float32)


class ListsSuccess(Plain):
    """Says in an array of one element whether the goal was reached."""

    def step(self, action):
        return *super().step(action)[:-1], {"is_success": np.array([True])}


class Breaks(Plain):
    """Breaks in mid-run, in the middle of one episode of fifty, until SWITCH mends it."""

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        self.breaks = self.np_random.random() < 0.02
        return obs, info

    def step(self, action):
        if self.breaks and self.t == 5 and not SWITCH["mended"]:
            raise RuntimeError("the arm is stuck")
        return super().step(action)


class Endless(Plain):
    def ends(self):
        return False


class Counted(Plain):
    """Has something to close, and can be told to break in its n-th constructor, reset or step."""

    def __init__(self, render_mode=None):
        self.act("made")

    def act(self, what):
        COUNT[what] += 1
        if COUNT[what] == SWITCH[what]:
            COUNT["made"] -= what == "made"  # it was not
            raise ERRORS[SWITCH["error"]]

    def reset(self, *, seed=None, options=None):
        self.act("reset")
        return super().reset(seed=seed)

    def step(self, action):
        self.act("stepped")
        return super().step(action)

    def close(self):
        COUNT["closed"] += not self.__dict__.get("closed")
        self.closed = True


class Draws(Plain):
    """Renders what SWITCH says, of what people's render() returns."""

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 10}
    RETURNS: ClassVar[dict] = {
        "grey": np.zeros((32, 32), np.uint8), "floats": np.zeros((32, 32, 3)), "tuple": (np.zeros((32, 32, 3)), 1),
        "nothing": None,
    }  # fmt: skip

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return next(value for name, value in self.RETURNS.items() if SWITCH[name])


class CountedPictures(Counted):
    """Claims that it can be filmed, and shows nothing."""

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 10}

    def render(self):
        return None


for cls in [value for value in vars().values() if isinstance(value, type) and issubclass(value, Plain)]:
    for kind, (observation_space, action_space) in KINDS.items():
        spaces = {"observation_space": observation_space, "action_space": action_space, "__module__": __name__}
        gym.register(f"{cls.__name__}-{kind}-v0", type(cls.__name__, (cls,), spaces), disable_env_checker=True)


class OwnDiscrete(gym.spaces.Discrete):
    """As people make one, to add a method."""


class OwnBox(gym.spaces.Box):
    pass


for name, action_space in {  # the environments say no to an action that their space does not contain
    "Int32-discrete": gym.spaces.Discrete(2, start=1, dtype=np.int32),
    "Own-discrete": OwnDiscrete(2),
    "Half-box": gym.spaces.Box(-1, 1, (2,), np.float16),
    "Double-box": gym.spaces.Box(-1, 1, (2,), np.float64),
    "Tiny-box": gym.spaces.Box(-5e-4, 5e-4, (2,)),
    "Scalar-box": gym.spaces.Box(-1, 1, (), np.float32),
    "Own-box": OwnBox(-1, 1, (2,)),
    "Int32-table": gym.spaces.Discrete(2, start=1, dtype=np.int32),
    "Own-table": OwnDiscrete(2),
}.items():
    spaces = {"action_space": action_space, "observation_space": KINDS[name.split("-")[1]][0], "__module__": __name__}
    gym.register(f"Acts{name}-v0", type("Acts", (Plain,), spaces), disable_env_checker=True)


class Missions(gym.Space):
    """A kind of space that Gymnasium does not know, as Minigrid's missions are."""


class Tenths(Plain):
    """Its space says integers, and it shows tenths."""

    observation_space, action_space = gym.spaces.Box(0, 100, (2,), np.int64), gym.spaces.Discrete(2)

    def vector(self):
        return np.array([self.t / 10, 0.5])


class SeesMissions(Plain):
    observation_space, action_space = gym.spaces.Dict(mission=Missions((), str), view=VECTOR), gym.spaces.Discrete(2)


class SeesScreen(Plain):
    observation_space = gym.spaces.Dict(screen=gym.spaces.Box(0, 255, (120, 160, 3), np.uint8), view=VECTOR)
    action_space = gym.spaces.Discrete(2)


class SeesManyFrames(Plain):
    observation_space = gym.spaces.Box(0, 255, (84, 84, 12), np.uint8)
    action_space = gym.spaces.Discrete(2)


class UnlikeGoals(Plain):
    """What was achieved is one number, and what is wanted three."""

    observation_space = gym.spaces.Dict(observation=VECTOR, achieved_goal=FORCE, desired_goal=VECTOR)
    action_space = FORCE


for cls in Tenths, SeesMissions, SeesScreen, SeesManyFrames, UnlikeGoals:
    gym.register(f"{cls.__name__}-v0", cls, disable_env_checker=True)

ODD = {
    "Observation": (gym.spaces.Sequence(gym.spaces.Discrete(2)), gym.spaces.Discrete(2)),
    "Action": (gym.spaces.Discrete(2), gym.spaces.Text(3)),
}
for name, (observation_space, action_space) in ODD.items():  # no script can act in these
    spaces = {"observation_space": observation_space, "action_space": action_space, "__module__": __name__}
    gym.register(f"CountedOdd{name}-v0", type("CountedOdd", (Counted,), spaces), disable_env_checker=True)


# ---- Several agents


class PlainTeam(ParallelEnv):
    """Two agents, each of which acts in a box, as one of the environments above does."""

    TRAITS = Plain
    metadata: ClassVar[dict] = {"name": "team"}

    def __init__(self):
        self.possible_agents = ["one", "other"]
        self.env = type("One", (self.TRAITS,), {"observation_space": VECTOR, "action_space": FORCE})()

    def observation_space(self, agent):
        return VECTOR

    def action_space(self, agent):
        return FORCE

    def for_each(self, value):
        return dict.fromkeys(self.possible_agents, value)

    def reset(self, seed=None, options=None):
        self.agents = self.possible_agents
        return self.for_each(self.env.reset(seed=seed)[0]), self.for_each({})

    def step(self, actions):
        obs, reward, terminated, truncated, _ = self.env.step(np.float32(np.mean([*actions.values()], axis=0)))
        return *map(self.for_each, (obs, reward, terminated, truncated)), self.for_each({})

    def close(self):
        self.env.close()


for name, cls in [*vars().items()]:
    if isinstance(cls, type) and issubclass(cls, Plain):
        vars()[f"{name}Team"] = type(f"{name}Team", (PlainTeam,), {"TRAITS": cls, "__module__": __name__})


# ---- Action spaces with bounds that no controller could send

LARGEST = float(np.finfo(np.float32).max)
BOUNDS = {
    "Both": (-LARGEST, LARGEST),
    "Upper": (0.0, LARGEST),
    "Lower": (-LARGEST, 5.0),
    "Million": (-1e7, 1e7),
    "Infinite": (-np.inf, np.inf),
    "Half": (-1.0, np.inf),
    "Above10": (10.0, np.inf),
    "OneOfTwo": ([-1.0, -LARGEST], [1.0, LARGEST]),
}


class Joint(gym.Env):
    """The nearer to 0.5, the better. What it is sent, it keeps."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    SENT: ClassVar[list] = []

    def __init__(self, low, high, dtype):
        low, high = np.array(low, dtype, ndmin=1), np.array(high, dtype, ndmin=1)
        self.action_space = gym.spaces.Box(low, high, dtype=dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        self.SENT.append(action)
        distance = float(np.abs(action - 0.5).max())
        return np.zeros(1, np.float32), -min(distance, 10.0), False, self.t == 5, {}


class JointWithGoal(Joint):
    observation_space = gym.spaces.Dict(observation=FORCE, achieved_goal=FORCE, desired_goal=FORCE)

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return {"observation": obs, "achieved_goal": obs, "desired_goal": obs}, info

    def step(self, action):
        obs, *rest = super().step(action)
        return {"observation": obs, "achieved_goal": obs, "desired_goal": obs}, *rest

    def compute_reward(self, achieved, desired, info):
        return -np.abs(achieved - desired).max(-1)


for name, (low, high) in BOUNDS.items():
    for dtype in np.float32, np.float64:
        for kind, cls in {"box": Joint, "goal": JointWithGoal}.items():
            bounds = {"low": low, "high": high, "dtype": dtype}
            gym.register(f"Joint{name}-{dtype.__name__}-{kind}-v0", cls, kwargs=bounds, disable_env_checker=True)


# ---- Grids of codes, and pictures


class Grid(gym.Env):
    """Two grids that differ in one code, in one place; what is right depends on it."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, shape, dtype, high, place):
        self.observation_space, self.place = gym.spaces.Box(0, high, shape, dtype), place

    def observe(self):
        self.side = int(self.np_random.integers(2))
        grid = np.ones(self.observation_space.shape, self.observation_space.dtype)
        grid[self.place] = 2 * self.side if self.observation_space.dtype != bool else self.side
        return grid

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        reward = float(action == self.side)
        self.t += 1
        return self.observe(), reward, False, self.t == 10, {}


GRIDS = {  # shape, dtype, bound, where the code is
    "Minigrid": ((7, 7, 3), np.uint8, 255, (3, 3, 2)),
    "LowBound": ((7, 7, 3), np.uint8, 10, (3, 6, 0)),
    "ChannelsFirst": ((3, 9, 9), np.uint8, 255, (2, 4, 4)),
    "OneChannel": ((8, 8, 1), np.uint8, 255, (0, 7, 0)),
    "Flat": ((19, 19), np.uint8, 2, (18, 18)),
    "FourChannels": ((11, 11, 4), np.uint8, 255, (5, 5, 3)),
    "ManyChannels": ((10, 10, 6), bool, 1, (9, 0, 5)),
    "Floats": ((7, 7, 3), np.float32, 255, (3, 3, 2)),
    "Integers": ((7, 7, 3), np.int64, 255, (3, 3, 2)),
}
for name, (shape, dtype, high, place) in GRIDS.items():
    spaces = {"shape": shape, "dtype": dtype, "high": high, "place": place}
    gym.register(f"Grid{name}-v0", Grid, kwargs=spaces, disable_env_checker=True)

PICTURES = {  # shape; the axes of height and width
    "Atari": ((210, 160, 3), (0, 1)),
    "CarRacing": ((96, 96, 3), (0, 1)),
    "ChannelsFirst": ((3, 96, 96), (1, 2)),
    "Small": ((64, 64, 3), (0, 1)),
    "SmallFirst": ((3, 64, 64), (1, 2)),
    "Depth": ((64, 64, 1), (0, 1)),
    "DepthFirst": ((1, 120, 160), (1, 2)),
    "NoChannel": ((64, 64), (0, 1)),
    "Alpha": ((100, 200, 4), (0, 1)),
    "AlphaFirst": ((4, 100, 200), (1, 2)),
}


class Picture(gym.Env):
    """A dark room with a bright upper left quarter."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, shape, axes):
        self.observation_space, self.axes = gym.spaces.Box(0, 255, shape, np.uint8), axes

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        picture = np.full(self.observation_space.shape, 20, np.uint8)
        view = np.moveaxis(picture, self.axes, (0, 1))  # (height, width, ...)
        view[: view.shape[0] // 2, : view.shape[1] // 2] = 220
        return picture, {}

    def step(self, action):
        return self.reset()[0], float(action), False, False, {}


for name, (shape, axes) in PICTURES.items():
    spaces = {"shape": shape, "axes": axes}
    gym.register(f"Picture{name}-v0", Picture, kwargs=spaces, max_episode_steps=10, disable_env_checker=True)


# ---- A long time without a reward


class Drought(gym.Env):
    """A corridor; only its far end pays."""

    observation_space, action_space = gym.spaces.Box(0, 1, (15,)), gym.spaces.Discrete(2)

    def observe(self):
        return np.eye(15, dtype=np.float32)[self.place]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 0
        return self.observe(), {}

    def step(self, action):
        self.place = max(0, self.place + (1 if action else -1))
        arrived = self.place == 14
        return self.observe(), float(arrived), arrived, False, {}


gym.register("Drought-v0", Drought, max_episode_steps=80, disable_env_checker=True)
