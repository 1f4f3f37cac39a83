"""Plays mpe2's tasks with random actions, and with teams that follow a rule: limits for what maddpg.py learns.

    python benchmark/by_hand.py

The rules see what all agents observe at once, and are no optimum. An agent that has somewhere to go pushes so that it
will be as near to there as it can in three steps. simple_spread: each goes to a landmark of its own, such that the ways
are shortest in all. simple_speaker_listener and simple_reference: a speaker names the landmark; who has not heard of
one yet goes to the middle of all. simple_adversary: both agents go to the target. Nobody observes a velocity there, so
they push until they are near, or infer their velocities from where they were before; the adversary stays.

The episodes are those on which maddpg.py is judged, of seeds 1 to 5. Without --output the table replaces by_hand.json.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from command_line import parse

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from algorithms import maddpg  # noqa: E402

MOVES = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]])  # mpe2's first five actions: none, left, right, down, up
Play = Callable[[list[np.ndarray]], list[np.ndarray]]  # what each agent observes -> what each does


@dataclass
class Args:
    output: Path = ROOT / "benchmark" / "results" / "by_hand.json"  # the table
    episodes: int | None = None  # of each seed; None: as many as in README's rows


def steer(way: np.ndarray, velocity: np.ndarray, continuous: bool = False) -> np.ndarray:
    """The push, (5,), that brings an agent nearest to where it wants to go in three steps. way, velocity: (2,)

    In a step of mpe2 the place moves by 0.1 v, and then v becomes 0.75 v + 0.5 push.
    """
    missing = way - 0.1 * (1 + 0.75 + 0.75**2) * velocity
    push = missing / (0.1 * (1 + 0.75) * 0.5)
    if continuous:
        right, up = push.clip(-1, 1)
        return np.array([0, -right, right, -up, up]).clip(0, 1)
    return np.eye(5)[np.linalg.norm(push - MOVES, axis=1).argmin()]


def spread() -> Play:
    def play(obs):
        velocity, _, ways = zip(*((o[:2], o[2:4], o[4:10].reshape(3, 2)) for o in obs), strict=True)
        distance = np.linalg.norm(ways, axis=2)  # of each agent to each landmark
        landmarks = min(permutations(range(3)), key=lambda order: distance[range(3), order].sum())
        return [steer(ways[i][landmark], velocity[i]) for i, landmark in enumerate(landmarks)]

    return play


def speaker_listener(continuous: bool) -> Play:
    def play(obs):
        goal, (velocity, ways, heard) = obs[0], np.split(obs[1], [2, 8])
        ways = ways.reshape(3, 2)
        way = ways[heard.argmax()] if heard.any() else ways.mean(0)
        return [np.eye(3)[goal.argmax()], steer(way, velocity, continuous)]

    return play


def reference() -> Play:
    def play(obs):
        actions = []
        for velocity, ways, goal, heard in (np.split(o, [2, 8, 11]) for o in obs):
            ways = ways.reshape(3, 2)
            way = ways[heard.argmax()] if heard.any() else ways.mean(0)
            actions.append(np.outer(np.eye(10)[goal.argmax()], steer(way, velocity)).ravel())  # word * 5 + move
        return actions

    return play


def adversary(near: float) -> Play:
    """near: no nearer to the target than this do agents push"""

    def play(obs):
        ways = (o[:2] for o in obs[1:])
        return [np.eye(5)[0], *(steer(way * (np.linalg.norm(way) > near), np.zeros(2)) for way in ways)]

    return play


def adversary_with_memory() -> Play:
    steps, ways, velocities = 0, np.zeros((2, 2)), np.zeros((2, 2))

    def play(obs):
        nonlocal steps, ways, velocities
        before, ways = ways, np.array([o[:2] for o in obs[1:]])
        # velocities has the pushes since then already, and what was left of those before is seen in the places
        velocities = velocities + 0.75 * (before - ways) / 0.1 if steps % 25 else np.zeros((2, 2))
        actions = [steer(way, velocity) for way, velocity in zip(ways, velocities, strict=True)]
        steps, velocities = steps + 1, 0.5 * np.array(actions) @ MOVES
        return [np.eye(5)[0], *actions]

    return play


def at_random(env: maddpg.JointEnv) -> Play:
    spaces = env.action_space_n
    for i, space in enumerate(spaces):
        space.seed(i)
    return lambda obs: [maddpg.gym.spaces.flatten(space, space.sample()) for space in spaces]


def teams() -> Iterator[tuple[str, bool, int, str, Play | None]]:
    """Task, whether actions are continuous, episodes of a seed, the rule in words, and the rule; None: random"""
    rules = {
        ("simple_spread_v3", False, 100): {"the best assignment": spread()},
        ("simple_speaker_listener_v4", False, 1000): {"perfect messages": speaker_listener(False)},
        ("simple_speaker_listener_v4", True, 1000): {"perfect messages": speaker_listener(True)},
        ("simple_reference_v3", False, 100): {"perfect messages": reference()},
        ("simple_adversary_v3", False, 100): {
            **{f"agents that push until they are {near} away": adversary(near) for near in (0.1, 0.2, 0.3, 0.4)},
            "agents that infer their velocities": adversary_with_memory(),
        },
    }
    for task, plays in rules.items():
        for rule, play in {"random actions": None, **plays}.items():
            yield *task, rule, play


def main() -> None:
    args, rows = parse(Args, __doc__), []
    for env_id, continuous, episodes, rule, play in teams():
        results = []
        for seed in range(1, 6):
            flags = {"env_id": env_id, "continuous_actions": continuous, "seed": seed}
            run = maddpg.Args(**flags, eval_episodes=args.episodes or episodes)
            env = maddpg.make_env(run)
            cuts = np.cumsum([space.shape[0] for space in env.obs_space_n])[:-1]
            play = play or at_random(env)

            def act(obs: np.ndarray, play: Play = play, cuts: np.ndarray = cuts) -> np.ndarray:  # (O,) -> (A,)
                return np.concatenate(play(np.split(obs, cuts)), dtype=np.float32)

            team = SimpleNamespace(act=act, names=env.names, space_n=(env.obs_space_n, env.action_space_n))
            result = maddpg.evaluate(team, run, Path())
            env.close()
            results.append({name.removeprefix("eval/"): value for name, value in result.items()})
        means = {name: round(float(np.mean([result[name] for result in results])), 3) for name in results[0]}
        row = {"environment": env_id, "continuous_actions": continuous, "team": rule, "episodes": 5 * run.eval_episodes}
        rows.append(row | means)
        print(f"{env_id}{', continuous' * continuous}: {rule}: {means['episodic_return']:.1f}", means, flush=True)
    table = {"made_by": "python benchmark/by_hand.py", "mpe2": version("mpe2"), "rows": rows}
    args.output.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
