"""Tabular Q-learning, SARSA, Expected SARSA and Double Q-learning: learn from each step what each action is worth.

Q(s, a) is the discounted sum of the rewards to expect after action a in state s. It is learned as a table: after each
step one entry moves towards a better estimate, the reward plus what the table says that the next state s' is worth.
The four algorithms differ in nothing but this value of s'.

    [1] Q-learning         target = r + gamma max_a Q(s', a)                     Watkins & Dayan 1992
    [2] SARSA              target = r + gamma Q(s', a')                          Rummery & Niranjan 1994
    [3] Expected SARSA     target = r + gamma sum_a pi(a|s') Q(s', a)            van Seijen et al. 2009
    [4] Double Q-learning  target = r + gamma Q_2(s', argmax_a Q_1(s', a))       van Hasselt 2010, Algorithm 1
    [5] all                Q(s, a) <- Q(s, a) + alpha (target - Q(s, a))

Here gamma is the discount, alpha the learning rate, a' the action that is taken next, and pi the policy that explores.
[4] has two tables and acts by their mean; a coin tossed at each step says which of them is Q_1, the one to update.

Watkins & Dayan: doi:10.1007/BF00992698. Rummery & Niranjan: CUED/F-INFENG/TR 166, with a network and traces. van
Seijen et al.: doi:10.1109/ADPRL.2009.4927542. van Hasselt: Double Q-learning, NeurIPS 2010. All four also: Sutton &
Barto 2018, Sections 6.4 to 6.7, incompleteideas.net/book/the-book-2nd.html.

[1] learns what the greedy policy is worth, whatever policy explores. [2] and [3] learn what the exploring policy is
worth, its missteps included: on CliffWalking-v1 they keep away from the edge along which [1] walks, as long as they
explore. [4] takes the best action by one table and its worth from the other, because the maximum of noisy estimates is
too high; what it learns may be too low.

Differs from the papers: alpha is annealed linearly to 0, and all values start at an optimistic 1, so that actions not
tried yet look good. The next action is chosen before the update, as [2] needs it, in all four. A time limit does not
count as a terminal state: the value of the last state stands for the rest of the episode. An environment without a time
limit, as CliffWalking-v1 is, gets one of 1,000 steps.

Where the environment gives its transition probabilities, as Gymnasium's FrozenLake, CliffWalking and Taxi do, the
greedy policy is also evaluated exactly, beside the optimal one from value iteration.

    python algorithms/q_learning.py --env-id FrozenLake-v1
    python algorithms/q_learning.py --env-id CliffWalking-v1 --algorithm sarsa --start-e 0.1 --end-e 0.1
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "filelock>=3.20", "gymnasium[atari,box2d,classic-control,mujoco,toy-text]>=1.4,<2", "moviepy>=2.2", "numpy>=2",
#     "tqdm>=4.66", "tyro>=1", "wandb>=0.31",
# ]
# ///

import json
import math
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

import filelock
import gymnasium as gym
import numpy as np
import tyro
from gymnasium.envs.toy_text import CliffWalkingEnv, FrozenLakeEnv
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "FrozenLake-v1"  # a Gymnasium environment, or module:id if a module registers it
    seed: int = 1  # all randomness follows from it
    total_timesteps: int = 300_000  # environment steps, summed over all environments
    eval_frequency: int | None = None  # steps between evaluations; None: a twentieth of the run
    eval_episodes: int = 20  # episodes of an evaluation
    checkpoint_frequency: int | None = None  # steps between checkpoints, which cut episodes; None: a tenth of the run
    capture_video: bool = False  # film the first episode of each evaluation
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "plainrl"  # W&B project
    run_dir: str | None = None  # folder of the run; None: a new one in runs/
    resume: bool = False  # continue the run in --run-dir with its own arguments
    evaluate: bool = False  # only evaluate the model in --run-dir

    algorithm: Literal["q-learning", "sarsa", "expected-sarsa", "double-q-learning"] = "q-learning"  # [1] to [4]
    learning_rate: float = 0.2  # [5] alpha
    anneal_lr: bool = True  # anneal it linearly to 0
    gamma: float = 0.995  # discount
    initial_value: float = 1.0  # of all Q(s, a); optimistic if no return exceeds it
    exploration: Literal["epsilon-greedy", "boltzmann", "ucb"] = "epsilon-greedy"  # how actions are chosen
    start_e: float = 1.0  # epsilon, or Boltzmann's temperature in units of the return, at the start
    end_e: float = 0.02  # the same from the end of exploration_fraction on
    exploration_fraction: float = 0.5  # share of the run in which it goes linearly from start_e to end_e
    ucb_c: float = 1.0  # ucb: weight of the uncertainty, in units of the return
    plot_values: bool = False  # draw the final values as values.png in the run's folder; needs matplotlib

    def __post_init__(self) -> None:
        bounds = (1e-9, math.inf) if self.exploration == "boltzmann" else (0, 1)  # boltzmann() divides by it
        check_and_complete(self, learning_rate=(0, 1), initial_value=(-math.inf, math.inf), start_e=bounds,
                           end_e=bounds, exploration_fraction=(0, 1))  # fmt: skip
        if self.plot_values and not find_spec("matplotlib"):
            refuse("--plot-values needs matplotlib: pip install matplotlib")


class Table:
    """Q(s, a), twice for Double Q-learning, in lists: to read and write single numbers they are faster than arrays."""

    def __init__(self, num_tables: int, num_states: int, num_actions: int, initial_value: float):
        self.q = [[[initial_value] * num_actions for _ in range(num_states)] for _ in range(num_tables)]
        self.counts = [[0] * num_actions for _ in range(num_states)]  # how often each action was taken

    def values(self, state: int) -> list[float]:
        """Of each action; the mean of the tables, if there are two."""
        if len(self.q) == 1:
            return self.q[0][state]
        return [(a + b) / 2 for a, b in zip(self.q[0][state], self.q[1][state], strict=True)]

    def act(self, states: np.ndarray) -> np.ndarray:
        """The best actions, of equal ones the first: deterministic, for evaluation. (B,) -> (B,)"""
        return np.array([self.values(state) for state in states.tolist()]).argmax(axis=1)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"q": np.array(self.q), "counts": np.array(self.counts)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        for name, array in self.state_dict().items():
            if (state[name].shape, state[name].dtype) != (array.shape, array.dtype):
                raise ValueError(f"{name} is of another shape or type")
        self.q, self.counts = state["q"].tolist(), state["counts"].tolist()


def linear_schedule(start: float, end: float, duration: float, step: int) -> float:
    return start + (end - start) * min(1, step / max(1, duration))


def boltzmann(values: list[float], temperature: float) -> list[float]:
    """Probabilities proportional to exp(value / temperature)."""
    best = max(values)  # subtracted, or exp would overflow
    weights = [math.exp((value - best) / temperature) for value in values]
    total = sum(weights)
    return [weight / total for weight in weights]


def upper_bounds(values: list[float], counts: list[int], c: float) -> list[float]:
    """Values and a bonus for uncertainty, Sutton & Barto 2018, Eq. 2.10; what has never been tried comes first."""
    if 0 in counts:
        return [float(count == 0) for count in counts]
    log_total = math.log(sum(counts))  # t of Eq. 2.10 is here the number of visits to this state
    return [value + c * math.sqrt(log_total / count) for value, count in zip(values, counts, strict=True)]


def greedy(values: list[float]) -> int:
    """The action of the highest value, ties broken at random."""
    best = max(values)
    if values.count(best) == 1:
        return values.index(best)
    return random.choice([action for action, value in enumerate(values) if value == best])


def explore(values: list[float], counts: list[int], epsilon: float, args: Args) -> int:
    """An action in a state with these Q(s, a) and counts, (A,) each; epsilon is also Boltzmann's temperature."""
    if args.exploration == "boltzmann":
        return random.choices(range(len(values)), boltzmann(values, epsilon))[0]
    if args.exploration == "ucb":
        return greedy(upper_bounds(values, counts, args.ucb_c))
    return int(random.random() * len(values)) if random.random() < epsilon else greedy(values)


def policy(values: list[float], counts: list[int], epsilon: float, args: Args) -> list[float]:
    """pi(a|s): the probabilities with which explore chooses the actions. All lists are (A,)."""
    if args.exploration == "boltzmann":
        return boltzmann(values, epsilon)
    if args.exploration == "ucb":
        values, epsilon = upper_bounds(values, counts, args.ucb_c), 0.0
    best = max(values)
    of_each = epsilon / len(values)
    of_best = of_each + (1 - epsilon) / values.count(best)
    return [of_best if value == best else of_each for value in values]


def td_target(
    reward: float, terminated: bool, next_q: list[float], other_next_q: list[float],
    next_action: int, next_probs: list[float] | None, args: Args,
) -> float:  # fmt: skip
    """The target of Q(s, a). next_q: Q(s', a) of the table that learns, other_next_q: of the other one, (A,) each.

    next_action: a' of [2]; next_probs: pi(a|s') of [3], (A,), else None.
    """
    if terminated:
        return reward  # a terminal state is worth nothing
    if args.algorithm == "q-learning":
        next_value = max(next_q)  # [1]
    elif args.algorithm == "sarsa":
        next_value = next_q[next_action]  # [2]
    elif args.algorithm == "expected-sarsa":
        next_value = sum(prob * q for prob, q in zip(next_probs, next_q, strict=True))  # [3]
    else:
        next_value = other_next_q[next_q.index(max(next_q))]  # [4]
    return reward + args.gamma * next_value


class Transitions:
    """The transition probabilities that a finite environment gives: a row for each transition that can happen."""

    def __init__(self, env: gym.Env, gamma: float):
        transitions = env.unwrapped.P  # P[s][a]: a list of (probability, next state, reward, terminated)
        rows = [(s, a, *row) for s, of_s in transitions.items() for a, of_a in of_s.items() for row in of_a]
        states, actions, self.probs, next_states, self.rewards, terminated = np.array(rows, float).T  # (rows,) each
        self.states, self.actions, self.next_states = (x.astype(int) for x in (states, actions, next_states))
        self.continues = 1 - terminated
        self.start = np.asarray(env.unwrapped.initial_state_distrib, float)  # (S,)
        self.num_actions, self.time_limit = int(env.action_space.n), env.spec.max_episode_steps
        self.optimal_return = self.expected_return(self.value_iteration(gamma).argmax(axis=1))

    def value_iteration(self, gamma: float) -> np.ndarray:
        """The optimal Q(s, a), (S, A). With gamma 1 they may be infinite: then the iteration is cut off."""
        num_states, q = len(self.start), np.zeros((len(self.start), self.num_actions))
        pairs = self.states * self.num_actions + self.actions  # (rows,): (s, a) as one number
        for _ in range(100_000):
            targets = self.rewards + gamma * self.continues * q.max(axis=1)[self.next_states]  # [1]
            # for each (s, a) the sum of probability * target
            old_q, q = q, np.bincount(pairs, self.probs * targets, q.size).reshape(num_states, -1)
            if np.abs(q - old_q).max() < 1e-10:
                break
        return q

    def expected_return(self, actions: np.ndarray) -> float:
        """Of an episode, undiscounted, up to the time limit, with one action for each state. (S,) -> ()"""
        taken = np.flatnonzero(self.actions == actions[self.states])  # the rows that can happen under these actions
        occupancy, expected = self.start, 0.0  # (S,): the probabilities of being in each state
        for _ in range(self.time_limit):
            flow = occupancy[self.states[taken]] * self.probs[taken]  # the probability of each in this step
            expected += flow @ self.rewards[taken]
            occupancy = np.bincount(self.next_states[taken], flow * self.continues[taken], len(self.start))
            if not occupancy.any():
                break
        return float(expected)

    def evaluate(self, act: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
        """Exact undiscounted returns, up to the time limit: of act's policy, and of value iteration's.

        Value iteration's is optimal for discounted rewards without a time limit, so the other can be the larger one.
        """
        expected = self.expected_return(act(np.arange(len(self.start))))
        return {"eval/exact_return": expected, "eval/optimal_return": self.optimal_return}


def make_agent(args: Args, env: gym.Env) -> Table:
    num_tables = 2 if args.algorithm == "double-q-learning" else 1
    return Table(num_tables, int(env.observation_space.n), int(env.action_space.n), args.initial_value)


def train(args: Args) -> None:
    env = make_env(args.env_id, film=args.capture_video)  # for its spaces, and to find out now if it can't be filmed
    agent = make_agent(args, env)
    transitions = Transitions(env, args.gamma) if hasattr(env.unwrapped, "initial_state_distrib") else None
    exploration_steps = args.exploration_fraction * args.total_timesteps
    run = Run(args, args.env_id, model=agent)
    global_step = run.restore()  # 0 in a new run
    start_time = time.perf_counter()  # of the steps that the next charts/SPS is about

    while True:
        # 1. Evaluate and save where it is due, and at the end
        if run.evaluation_is_due(global_step):
            evaluation_start = time.perf_counter()
            row = evaluate(agent.act, args, f"step-{global_step}", run.stopped)
            if row and transitions:  # row is empty if a signal stopped the evaluation
                row |= transitions.evaluate(agent.act)
            run.log(global_step, row)
            start_time += time.perf_counter() - evaluation_start  # SPS is that of training alone
        if run.checkpoint_is_due(global_step):
            run.save(global_step)
        if global_step == args.total_timesteps:
            break

        # 2. At the start and after each checkpoint, make the environment anew and reseed, also in a run that nothing
        #    interrupts: then one that is killed, and resumed from a checkpoint, gives the same results
        if global_step == run.checkpoint_step:
            env, state = make_envs(args, global_step)
            epsilon = linear_schedule(args.start_e, args.end_e, exploration_steps, global_step)
            action = explore(agent.values(state), agent.counts[state], epsilon, args)
            episode_return, episode_length = 0.0, 0
            td_errors, start_time = [], time.perf_counter()

        # 3. Act
        next_state, reward, terminated, truncated, _ = env.step(action)
        global_step += 1
        agent.counts[state][action] += 1
        epsilon = linear_schedule(args.start_e, args.end_e, exploration_steps, global_step)
        next_values, next_counts = agent.values(next_state), agent.counts[next_state]
        next_action = explore(next_values, next_counts, epsilon, args)  # before the table changes: [2] learns about it
        next_probs = policy(next_values, next_counts, epsilon, args) if args.algorithm == "expected-sarsa" else None

        # 4. Learn
        learning_rate = args.learning_rate
        if args.anneal_lr:
            learning_rate *= 1 - (global_step - 1) / args.total_timesteps  # 1 in the first step
        table, other = agent.q[0], agent.q[-1]  # one and the same, except for Double Q-learning
        if args.algorithm == "double-q-learning" and random.random() < 0.5:
            table, other = other, table
        target = td_target(reward, terminated, table[next_state], other[next_state], next_action, next_probs, args)
        td_error = target - table[state][action]
        table[state][action] += learning_rate * td_error  # [5]
        state, action = next_state, next_action

        # 5. Log
        episode_return += reward
        episode_length += 1
        td_errors.append(td_error)
        if terminated or truncated:
            run.log(global_step, {"charts/episodic_return": episode_return, "charts/episodic_length": episode_length})
            episode_return, episode_length = 0.0, 0
            state, _ = env.reset()
            action = explore(agent.values(state), agent.counts[state], epsilon, args)
        if global_step % 1000 == 0 or run.checkpoint_is_due(global_step):
            metrics = {"losses/td_loss": np.square(td_errors).mean(), "charts/epsilon": epsilon}
            metrics["charts/learning_rate"] = learning_rate
            metrics["charts/SPS"] = len(td_errors) / (time.perf_counter() - start_time)
            run.log(global_step, metrics)
            td_errors, start_time = [], time.perf_counter()
    show_policy(env, agent)
    if args.plot_values:
        plot_values(env, agent, run.dir / "values.png")
    run.finish("Done. To watch it:", "--evaluate --capture-video")


def grid_of(env: gym.Env) -> tuple[tuple[int, int], str] | None:
    """Of Gymnasium's grids: rows and columns, and a sign for each action."""
    if isinstance(env.unwrapped, FrozenLakeEnv):
        return env.unwrapped.desc.shape, "<v>^"
    return (env.unwrapped.shape, "^>v<") if isinstance(env.unwrapped, CliffWalkingEnv) else None


def show_policy(env: gym.Env, agent: Table) -> None:
    """Prints the greedy policy of a grid; a dot where the agent never had to act."""
    if grid := grid_of(env):
        actions = agent.act(np.arange(len(agent.counts)))
        cells = [grid[1][action] if any(counts) else "." for action, counts in zip(actions, agent.counts, strict=True)]
        tqdm.write("\n    ".join(["The greedy policy:", *map(" ".join, np.reshape(cells, grid[0]))]))


def plot_values(env: gym.Env, agent: Table, path: Path) -> None:
    """max_a Q(s, a) of a grid, else Q(s, a) with a column for each state; white where nothing was learned."""
    from matplotlib.figure import Figure

    q = np.array([agent.values(state) for state in range(len(agent.counts))])  # (S, A)
    q = np.ma.masked_where(np.array(agent.counts) == 0, q)
    grid, axes = grid_of(env), Figure(figsize=(8, 5), layout="constrained").subplots()
    if grid:
        image = axes.imshow(q.max(axis=1).reshape(grid[0]))
    else:
        image = axes.imshow(q.T, aspect="auto", interpolation="nearest")
        axes.set(xlabel="state", ylabel="action", yticks=range(q.shape[1]))
    axes.figure.colorbar(image, label="value")
    axes.figure.savefig(path)


# Below the ruled line every script is the same. These are q_learning.py's exceptions, under the names that they have in
# the other scripts: one environment of numbered states instead of several of vectors, and files in NumPy's format.
MODEL, CHECKPOINT = "model.npz", "checkpoint.npz"


def state_number(space: gym.Space, obs: object) -> tuple[int, int]:
    """The number of an observation, and how many the space has. In a composite space the parts' are its digits."""
    if isinstance(space, gym.spaces.Discrete):
        return int(obs) - int(space.start), int(space.n)
    if isinstance(space, gym.spaces.Tuple):
        parts = [state_number(part, part_obs) for part, part_obs in zip(space.spaces, obs, strict=True)]
    elif isinstance(space, gym.spaces.Dict):
        parts = [state_number(part, obs[name]) for name, part in space.spaces.items()]
    elif isinstance(space, gym.spaces.MultiDiscrete):
        digits = (np.asarray(obs) - space.start).flatten().tolist()
        parts = zip(digits, space.nvec.flatten().tolist(), strict=True)
    elif isinstance(space, gym.spaces.MultiBinary):
        parts = [(int(bit), 2) for bit in np.asarray(obs).flatten()]
    else:
        refuse(f"q_learning.py needs observations that can be counted, and {space} can't; dqn.py has a network instead")
    number, count = 0, 1
    for digit, base in parts:
        number, count = number * base + digit, count * base
    return number, count


def make_env(env_id: str, film: bool = False) -> gym.Env:
    """One environment whose states and actions are numbered from 0, and whose episodes end some time."""
    try:
        env = gym.make(env_id, render_mode="rgb_array" if film else None)
        if film:
            env.reset()
            if env.render() is None:
                raise ValueError("it gives no picture to film")
    except Exception as error:  # unknown, outdated, not installed, can't render here: its message says which
        refuse(f"--env-id {env_id}: {error}")
    space, actions = env.observation_space, env.action_space
    if not isinstance(actions, gym.spaces.Discrete):
        refuse(f"--env-id {env_id} acts in {actions}; q_learning.py knows Discrete only: see ppo.py")
    num_states = state_number(space, space.sample())[1]
    if num_states * int(actions.n) > 10**7:
        refuse(f"--env-id {env_id} has {num_states} states, too many for a table; dqn.py has a network instead")
    if env.spec.max_episode_steps is None:  # or a greedy policy that has learned little would walk in circles for ever
        env = gym.wrappers.TimeLimit(env, 1000)
    if not isinstance(space, gym.spaces.Discrete) or space.start != 0:
        numbers = gym.spaces.Discrete(num_states)
        env = gym.wrappers.TransformObservation(env, lambda obs: state_number(space, obs)[0], numbers)
    if actions.start != 0:
        numbers = gym.spaces.Discrete(actions.n)
        env = gym.wrappers.TransformAction(env, lambda action: action + actions.start, numbers)
    return env


def make_envs(args: Args, step: int) -> tuple[gym.Env, int]:
    """A new environment and its first state. Reseeds everything random from (seed, step)."""
    seeds = np.random.SeedSequence(args.seed, spawn_key=(0, step))  # 0: training; evaluation has 1
    env_seed, seed = seeds.generate_state(2).tolist()
    random.seed(seed)
    np.random.seed(seed)
    env = make_env(args.env_id)
    return env, env.reset(seed=env_seed)[0]


def evaluate_saved(args: Args) -> None:
    """Plays eval_episodes episodes with the model in run_dir and prints the result."""
    env = make_env(args.env_id)
    agent = make_agent(args, env)
    load_file(Path(args.run_dir, MODEL), model=agent)
    result = evaluate(agent.act, args, "evaluation")
    if hasattr(env.unwrapped, "initial_state_distrib"):
        result |= Transitions(env, args.gamma).evaluate(agent.act)
    print(*(f"{name} {value:.4g}" for name, value in result.items()), f"{args.eval_episodes} episodes", sep=", ")
    show_policy(env, agent)


def save_file(path: Path, state: dict) -> None:
    """Numbers, and dictionaries of arrays: these get names like model/q."""
    arrays = {name: value for name, value in state.items() if not isinstance(value, dict)}
    for part in state.keys() - arrays.keys():
        arrays |= {f"{part}/{name}": array for name, array in state[part].items()}
    write_file(path, lambda file: np.savez(file, **arrays))


def save_model(folder: Path, model: Table) -> None:
    save_file(folder / MODEL, {"model": model.state_dict()})


def load_file(path: Path, **parts: Table) -> dict:
    """Reads what save_file wrote, data and never code, into the parts of the same names."""
    if not path.exists():
        refuse(f"{path} is missing")
    try:
        state = {}
        with np.load(path, allow_pickle=False) as arrays:
            for name, array in arrays.items():
                part, _, name_in_part = name.partition("/")
                if name_in_part:
                    state.setdefault(part, {})[name_in_part] = array
                else:
                    state[name] = array.item()
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (PermissionError, MemoryError):  # not the fault of what is in the file
        raise
    except Exception as error:  # a damaged file can raise anything
        refuse(f"{path} is damaged or of another script ({type(error).__name__})")
    return state


# ---- Below this line every script is the same: command line, environments, evaluation, run folder ----


def refuse(message: object) -> NoReturn:
    """Ends the program for a user's mistake: one line that says what to do, and exit code 2."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def check_and_complete(args: Args, **ranges: tuple[float, float]) -> None:
    """Refuses numbers out of range, by default integers below 1, others below 0. Fills in frequencies that are None."""
    ranges = {"seed": (0, 2**63 - 1), "gamma": (0, 1)} | ranges
    for name, value in vars(args).items():
        low, high = ranges.get(name, (1 if type(value) is int else 0, math.inf))  # type(): a bool is no count
        if type(value) in (int, float) and not (math.isfinite(value) and low <= value <= high):
            refuse(f"--{name.replace('_', '-')} is {value}, which is not a number from {low} to {high}")
    num_envs = vars(args).get("num_envs", 1)
    if args.total_timesteps % num_envs:
        refuse(f"--total-timesteps {args.total_timesteps} must be a multiple of --num-envs {num_envs}")
    args.eval_frequency = args.eval_frequency or math.ceil(args.total_timesteps / 20)
    args.checkpoint_frequency = args.checkpoint_frequency or math.ceil(args.total_timesteps / 10)


def parse_args() -> Args:
    """The command line. With --resume or --evaluate, the arguments in the run's config.json are put in front of it."""
    args = tyro.cli(Args, description=__doc__)
    if not args.resume and not args.evaluate:
        return args
    if args.run_dir is None:
        refuse("--resume and --evaluate need --run-dir")
    path = Path(args.run_dir, "config.json")
    try:
        config = json.loads(path.read_text())
        script, saved = config["script"], dict(config["args"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse(f"{path} is missing or damaged ({error!r})")
    if script != Path(__file__).stem:
        refuse(f"--run-dir {args.run_dir} holds a run of {script}.py")
    flags = [f"--{'no-' if value is False else ''}{name}" for name, value in saved.items() if isinstance(value, bool)]
    flags += [f"--{name}={value}" for name, value in saved.items() if not isinstance(value, bool)]
    merged = tyro.cli(Args, args=flags + sys.argv[1:])
    for name in saved.keys() - {"run_dir", "resume", "device"}:
        if args.resume and getattr(merged, name) != saved[name]:
            refuse(f"--resume goes on with the run's own arguments; leave out --{name.replace('_', '-')}")
    return merged


def evaluate(
    act: Callable[[np.ndarray], np.ndarray], args: Args, name: str, stopped: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Plays the same eval_episodes episodes every time, each in its own environment; films the first under this name.

    act: (B, *obs_shape) -> (B, *action shape). Ends early, with an empty result, once stopped() is true. The random
    streams of training stay as they are.
    """
    streams = random.getstate(), np.random.get_state()  # for environments that draw from these instead of their own
    seeds = np.random.SeedSequence(args.seed, spawn_key=(1,)).generate_state(args.eval_episodes).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[0])
    envs = [make_env(args.env_id, film=args.capture_video and i == 0) for i in range(args.eval_episodes)]
    if args.capture_video:
        film = {"name_prefix": name, "episode_trigger": lambda _: True, "video_length": 3000}  # frames wait in memory
        envs[0] = gym.wrappers.RecordVideo(envs[0], f"{args.run_dir}/videos", **film)
    obs = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)]
    returns, lengths = np.zeros((2, args.eval_episodes))
    playing = list(range(args.eval_episodes))
    while playing and not stopped():
        actions = act(np.stack([obs[i] for i in playing]))
        for i, action in zip(playing.copy(), actions, strict=True):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            returns[i] += reward
            lengths[i] += 1
            if terminated or truncated or lengths[i] == 27_000:  # Atari's limit, for environments without one
                envs[i].close()
                playing.remove(i)
    random.setstate(streams[0])
    np.random.set_state(streams[1])
    if playing:
        return {}
    result = {"eval/episodic_return": returns.mean(), "eval/return_std": returns.std()}
    return result | {"eval/episodic_length": lengths.mean()}


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces the file atomically: a crash never leaves half of it."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save hides a full disk behind the latter
        temporary.unlink(missing_ok=True)
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


class Run:
    """A run's folder: config.json, metrics.jsonl, checkpoint, model, videos/. W&B, if tracking, gets the rows.

    Each of the parts has state_dict and load_state_dict. All go into the checkpoint; the one named model, which is what
    acts, also into a file of its own.
    """

    def __init__(self, args: Args, task: str, **parts: object):
        task = task.replace("/", "-").replace(":", "-")
        name = f"{task}__{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        args.run_dir = args.run_dir or f"runs/{name}"
        self.args, self.parts, self.dir = args, parts, Path(args.run_dir)
        self.dir.mkdir(parents=True, exist_ok=True)
        self.lock = filelock.FileLock(self.dir / ".lock", timeout=0)  # ends with the process, however that ends
        try:
            self.lock.acquire()
        except filelock.Timeout:
            refuse(f"--run-dir {self.dir} is in use by another process")
        path = self.dir / "config.json"
        if not args.resume and (path.exists() or (self.dir / CHECKPOINT).exists()):
            refuse(f"--run-dir {self.dir} holds a run: continue it with --resume, or name another folder")
        config = json.loads(path.read_text()) if args.resume else self.describe()
        self.wandb = self.start_wandb(config) if args.track else None
        if not args.resume:
            write_file(path, lambda file: file.write(json.dumps(config, indent=1).encode()))
        self.metrics = open(self.dir / "metrics.jsonl", "ab")
        self.num_rows, self.evaluation_step, self.checkpoint_step = 0, 0, 0
        self.started, self.stop_signal = time.time(), None
        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, self.ask_to_stop)
        print(f"{Path(__file__).name} on {task}, device {vars(args).get('device', 'cpu')}, run directory {self.dir}")

    def describe(self) -> dict:
        """What another person needs to know to repeat the run."""
        git = f"git -C {shlex.quote(str(Path(__file__).parent))} describe --always --abbrev=40 --exclude='*' --dirty"
        commit_status, commit = subprocess.getstatusoutput(git)
        cpu_status, cpu = subprocess.getstatusoutput("grep -m 1 'model name' /proc/cpuinfo")
        gpu_status, gpus = subprocess.getstatusoutput("nvidia-smi --query-gpu=name --format=csv,noheader")
        cpu = cpu.split(": ")[-1] if cpu_status == 0 else platform.machine()
        gpus = gpus if gpu_status == 0 else "none"
        packages = [distribution.metadata for distribution in distributions()]  # read once each
        return {
            "script": Path(__file__).stem,
            "args": asdict(self.args),
            "command": sys.argv,
            "commit": commit if commit_status == 0 else None,  # ends in -dirty if files differ from it
            "versions": {"python": platform.python_version()} | {m["Name"]: m["Version"] for m in packages},
            "hardware": f"{platform.platform()}, {os.cpu_count()} cores ({cpu}), GPUs: {gpus}",
            "wandb_id": os.urandom(8).hex(),
        }

    def start_wandb(self, config: dict) -> object:
        import wandb

        run = {"project": self.args.wandb_project_name, "name": self.dir.name, "id": config["wandb_id"]}
        try:
            run = wandb.init(dir=self.dir, config=config["args"], resume="allow", **run)
        except Exception as error:  # no key, no network, a wrong mode: it has many kinds
            refuse(f"--track: {error}; with WANDB_MODE=offline it needs neither account nor network")
        run.define_metric("*", step_metric="global_step")
        return run

    def ask_to_stop(self, number: int, _frame: object) -> None:
        self.stop_signal = number
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the program at once

    def stopped(self) -> bool:
        return self.stop_signal is not None

    def restore(self) -> int:
        """Loads the last checkpoint, if any, and returns its step. Rows that were written after it are dropped."""
        state = {"step": 0, "evaluation_step": 0, "seconds": 0, "metrics_bytes": 0}
        if (self.dir / CHECKPOINT).exists():
            state = load_file(self.dir / CHECKPOINT, **self.parts)
        if self.metrics.tell() < state["metrics_bytes"]:
            refuse(f"{self.metrics.name} lacks rows that were there when {CHECKPOINT} was written")
        self.metrics.truncate(state["metrics_bytes"])
        self.num_rows = (self.dir / "metrics.jsonl").read_bytes().count(b"\n")
        self.checkpoint_step, self.evaluation_step = state["step"], state["evaluation_step"]
        self.started -= state["seconds"]
        self.bar = tqdm(total=self.args.total_timesteps, initial=self.checkpoint_step, unit=" steps", disable=None)
        return self.checkpoint_step

    def is_due(self, frequency: int, last: int, step: int) -> bool:
        """Whether a multiple of the frequency, or the end of the run, has been reached since the last time."""
        return step // frequency > last // frequency or step == self.args.total_timesteps > last

    def evaluation_is_due(self, step: int) -> bool:
        return self.is_due(self.args.eval_frequency, self.evaluation_step, step)

    def checkpoint_is_due(self, step: int) -> bool:
        return self.is_due(self.args.checkpoint_frequency, self.checkpoint_step, step) or self.stopped()

    def log(self, step: int, row: dict[str, float]) -> None:
        """Writes one row, unless it is empty. NaN or infinity becomes null in it, and ends the run."""
        if not row:
            return
        broken = [name for name, value in row.items() if not math.isfinite(value)]
        row = {name: None if name in broken else float(value) for name, value in row.items()}
        row = {"global_step": step, "time": round(time.time() - self.started, 3)} | row
        self.metrics.write(json.dumps(row).encode() + b"\n")
        self.metrics.flush()
        try:
            if self.wandb and self.num_rows >= self.wandb.step:  # after --resume, rows recur that W&B has already
                self.wandb.log(row, step=self.num_rows, commit=True)
        except Exception as error:  # it must not end the run
            tqdm.write(f"W&B gets no more rows ({error!r}); metrics.jsonl gets all of them", file=sys.stderr)
            self.wandb = None
        self.num_rows += 1
        if broken:
            raise FloatingPointError(f"NaN or infinity at step {step} in {', '.join(broken)}")
        evaluation = [f"{name[5:]} {value:.4g}" for name, value in row.items() if name.startswith("eval/")]
        if evaluation:
            self.evaluation_step = step
            tqdm.write(f"step {step:>10,}: {', '.join(evaluation)}")
        if "charts/episodic_return" in row:
            self.bar.set_postfix_str(f"return {row['charts/episodic_return']:.1f}", refresh=False)
        self.bar.update(step - self.bar.n)

    def save(self, step: int) -> None:
        """Writes checkpoint and model. Ends the program if a signal has asked for it."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        if not all(math.isfinite(values.sum()) for values in state["model"].values()):
            raise FloatingPointError(f"NaN or infinity at step {step} in the parameters")
        os.fsync(self.metrics.fileno())
        state |= {"step": step, "evaluation_step": self.evaluation_step}
        state |= {"seconds": time.time() - self.started, "metrics_bytes": self.metrics.tell()}
        save_model(self.dir, self.parts["model"])
        save_file(self.dir / CHECKPOINT, state)  # last: it completes the rest
        self.checkpoint_step = step
        if self.stopped():
            self.finish(f"Stopped at step {step}. To continue:", "--resume", 128 + self.stop_signal)
            raise SystemExit(128 + self.stop_signal)

    def finish(self, news: str, flags: str, exit_code: int = 0) -> None:
        self.bar.close()
        if self.wandb:
            self.wandb.finish(exit_code)
        self.lock.release()
        print(f"{news}\n    python {shlex.quote(sys.argv[0])} --run-dir {shlex.quote(str(self.dir))} {flags}")


def main() -> None:
    """Exit codes: 0 done, 2 user error, 130 or 143 stopped by a signal, 1 everything else."""
    sys.stdout.reconfigure(line_buffering=True)  # each line at once, into a pipe or a log file too
    args = parse_args()
    try:
        if args.evaluate:
            evaluate_saved(args)
        else:
            train(args)
    except KeyboardInterrupt:  # before or after training, where nothing has to be saved
        sys.exit(130)
    except (FloatingPointError, MemoryError, OSError) as error:
        print("error:", error, file=sys.stderr)
        sys.exit(1)  # not raise SystemExit: W&B listens to sys.exit


if __name__ == "__main__":
    main()
