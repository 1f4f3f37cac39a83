"""Tabular Q-learning, SARSA, Expected SARSA and Double Q-learning: learn from each step what each action is worth.

Q(s, a) is the return to expect after action a in state s: the sum of the rewards, the one t steps later times gamma^t.
It is learned as a table. After each step, one entry moves by the share alpha towards a better estimate: the reward r
plus gamma times what the table says that the next state s' is worth. The four algorithms differ only in this value.

    [1] Q-learning         target = r + gamma max_a Q(s', a)                     Watkins & Dayan 1992
    [2] SARSA              target = r + gamma Q(s', a')                          Rummery & Niranjan 1994
    [3] Expected SARSA     target = r + gamma sum_a pi(a|s') Q(s', a)            van Seijen et al. 2009
    [4] Double Q-learning  target = r + gamma Q_2(s', argmax_a Q_1(s', a))       van Hasselt 2010, Algorithm 1
    [5] all                Q(s, a) <- Q(s, a) + alpha (target - Q(s, a));  target = r where s' is terminal

Here a' is the next action, and pi the policy that explores. [2] and [3] learn what pi is worth, missteps included: on
CliffWalking-v1 they keep away from the edge. [1] learns what the best policy is worth. A maximum of noisy estimates is
too high on average: [4] takes the best action by Q_1, its worth by Q_2, and Q_1 learns; a coin says which one is Q_1.

Papers: doi:10.1007/BF00992698; CUED/F-INFENG/TR 166; doi:10.1109/ADPRL.2009.4927542; Double Q-learning, NeurIPS 2010.
All four: Sutton & Barto 2018, Sections 6.4 to 6.7, incompleteideas.net/book/the-book-2nd.html.

Differs from the papers:
- alpha falls linearly to 0. All values start at 1: optimistic if no return exceeds 1. All four draw a' before [5].
- A time limit is not a terminal state: the value of the last state stands for the rest of the episode.
- An environment without a time limit, as CliffWalking-v1 is, gets one of 1,000 steps.

    python algorithms/q_learning.py --env-id CliffWalking-v1 --algorithm sarsa --start-e 0.1 --end-e 0.1
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[atari,box2d,classic-control,mujoco,toy-text]>=1.4,<2", "moviepy>=2.2", "numpy>=2", "torch>=2.13",
#     "tqdm>=4.66", "tyro>=1", "wandb>=0.31",
# ]
# ///

import contextlib
import inspect
import io
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.envs.toy_text import CliffWalkingEnv, FrozenLakeEnv
from torch import Tensor, nn
from tqdm import tqdm


@dataclass
class Args:
    # Run
    env_id: str = "FrozenLake-v1"  # a Gymnasium environment, or module:id if a module registers it
    seed: int = 1  # seed of environments, networks and sampling
    total_timesteps: int = 300_000  # environment steps
    checkpoint_frequency: int | None = None  # steps between checkpoints; None: a tenth of the run
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "plainrl"  # W&B project
    run_dir: str | None = None  # folder of the run; None: a new one in runs/
    resume: bool = False  # go on with the run in --run-dir; a larger --total-timesteps makes it longer
    # Evaluation
    eval_frequency: int | None = None  # steps between evaluations; None: a twentieth of the run
    eval_episodes: int = 20  # episodes of an evaluation
    eval_max_steps: int = 27_000  # steps after which an episode of an evaluation is cut: Atari's half an hour
    capture_video: bool = False  # film the first episode of each evaluation
    evaluate: bool = False  # only evaluate the model in --run-dir
    # Algorithm
    algorithm: Literal["q-learning", "sarsa", "expected-sarsa", "double-q-learning"] = "q-learning"  # [1] to [4]
    learning_rate: float = 0.2  # [5] alpha
    anneal_lr: bool = True  # let the learning rate fall linearly to 0
    gamma: float = 0.995  # discount
    initial_value: float = 1.0  # of all Q(s, a); optimistic if no return exceeds it
    exploration: Literal["epsilon-greedy", "boltzmann", "ucb"] = "epsilon-greedy"  # how actions are chosen
    start_e: float = 1.0  # epsilon, or Boltzmann's temperature in units of the return, at the start
    end_e: float = 0.02  # its value once exploration_fraction of the run is over
    exploration_fraction: float = 0.5  # share of the run in which it goes linearly from start_e to end_e
    ucb_c: float = 1.0  # ucb: weight of the uncertainty, in units of the return
    plot_values: bool = False  # draw a grid's final values as values.png in the run's folder; needs matplotlib

    num_envs, device, threads = 1, "cpu", None  # no types, so no flags: it learns from one step at a time

    def __post_init__(self) -> None:
        range_e = (1e-9, math.inf) if self.exploration == "boltzmann" else (0, 1)  # Boltzmann divides by it
        check_ranges(self, learning_rate=(0, 1), initial_value=(-math.inf, math.inf), start_e=range_e, end_e=range_e,
                     exploration_fraction=(0, 1))  # fmt: skip
        if self.plot_values and not find_spec("matplotlib"):
            raise UsageError("--plot-values needs matplotlib: pip install matplotlib")


class Table:
    """Q(s, a) in lists: faster than arrays, one number at a time. A state's row is made when it is first met."""

    def __init__(self, args: Args, action_space: gym.spaces.Discrete, obs_shape: tuple[int, ...]):  # (S,), for S states
        self.obs_shape, self.action_space, num_actions = obs_shape, action_space, int(action_space.n)
        num_tables = 2 if args.algorithm == "double-q-learning" else 1
        self.q = [defaultdict(lambda: [args.initial_value] * num_actions) for _ in range(num_tables)]
        self.counts = defaultdict(lambda: [0] * num_actions)  # how often each action was taken; its keys: states met
        self.next_action = -1  # to take in the present state; -1: it is not chosen yet

    def values(self, state: int) -> list[float]:
        """Q(s, a) of each action; the mean of the tables, if there are two."""
        if len(self.q) == 1:
            return self.q[0][state]
        return [(a + b) / 2 for a, b in zip(self.q[0][state], self.q[1][state], strict=True)]

    def act(self, obs: np.ndarray) -> np.ndarray:
        """The best action for one state, or for each of B states, (B,). Of equal ones, as in new states, the first."""
        states, start = np.asarray(obs), self.action_space.start
        rows = [self.values(s) if s in self.counts else [0.0] for s in states.flatten().tolist()]  # new ones: no row
        return np.reshape([row.index(max(row)) for row in rows], states.shape).astype(start.dtype) + start

    def state_dict(self) -> dict[str, Tensor]:
        states = list(self.counts)
        q = torch.tensor([[table[s] for s in states] for table in self.q], dtype=torch.float64)  # (1 or 2, S, A)
        counts = torch.tensor([self.counts[s] for s in states], dtype=torch.int64)  # (S, A)
        return {"q": q, "counts": counts, "states": torch.tensor(states), "next_action": torch.tensor(self.next_action)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        states = state["states"].tolist()
        for table, q in zip(self.q, state["q"].tolist(), strict=True):
            table.update(zip(states, q, strict=True))
        self.counts.update(zip(states, state["counts"].tolist(), strict=True))
        self.next_action = state["next_action"].item()


def linear_schedule(start: float, end: float, duration: float, step: int) -> float:
    return start + (end - start) * min(1, step / max(1, duration))


def upper_bounds(values: list[float], counts: list[int], c: float) -> list[float]:
    """Values and a bonus for uncertainty, Sutton & Barto 2018, Eq. 2.10; what has never been tried comes first."""
    if 0 in counts:
        return [float(count == 0) for count in counts]
    log_total = math.log(sum(counts))  # t of Eq. 2.10 is here the number of visits to this state
    return [value + c * math.sqrt(log_total / count) for value, count in zip(values, counts, strict=True)]


def policy(values: list[float], counts: list[int], epsilon: float, args: Args) -> list[float]:
    """pi(a|s) in a state with these Q(s, a) and counts; all lists are (A,). epsilon: also Boltzmann's temperature."""
    if args.exploration == "boltzmann":  # proportional to exp(Q / temperature)
        weights = [math.exp((value - max(values)) / epsilon) for value in values]  # minus the max: exp can't overflow
        total = sum(weights)
        return [weight / total for weight in weights]
    if args.exploration == "ucb":
        values, epsilon = upper_bounds(values, counts, args.ucb_c), 0.0
    best = max(values)
    share = (1 - epsilon) / values.count(best)
    return [epsilon / len(values) + (share if value == best else 0) for value in values]


def explore(values: list[float], counts: list[int], epsilon: float, args: Args) -> int:
    """Draws an action from policy; epsilon-greedy does it without the list of probabilities, which is faster."""
    if args.exploration != "epsilon-greedy":
        return random.choices(range(len(values)), policy(values, counts, epsilon, args))[0]
    if random.random() < epsilon:
        return random.randrange(len(values))
    highest = max(values)
    best = [action for action, value in enumerate(values) if value == highest]
    return best[0] if len(best) == 1 else random.choice(best)


def next_value(q: list[float], other_q: list[float], next_action: int, next_probs: list[float], args: Args) -> float:
    """What s' is worth. q: Q(s', a) of the table that learns, other_q: of the other one; next_probs: pi(a|s')."""
    if args.algorithm == "q-learning":
        return max(q)  # [1]
    if args.algorithm == "sarsa":
        return q[next_action]  # [2]
    if args.algorithm == "expected-sarsa":
        return sum(prob * value for prob, value in zip(next_probs, q, strict=True))  # [3]
    return other_q[q.index(max(q))]  # [4]


def exact_returns(agent: Table, env: gym.Env, args: Args) -> dict[str, float]:
    """Expected undiscounted returns, from the known probabilities: of the greedy policy, and of the optimal one.

    The optimal one is best for the discounted return without a time limit, so its return here can be the smaller one.
    """
    start = getattr(env.unwrapped, "initial_state_distrib", None)  # FrozenLake, CliffWalking and Taxi have one
    if start is None or len(start) > 2000 or not hasattr(env.unwrapped, "P"):  # more would take too much memory
        return {}
    if getattr(env.unwrapped, "fickle_passenger", False):  # an option of Taxi: P does not tell of it
        return {}
    states = np.arange(len(start))
    rewards = np.zeros((len(states), env.action_space.n))  # (S, A): expected
    probs = np.zeros((*rewards.shape, len(states)))  # (S, A, S): of each next state, if the episode goes on
    for s, actions in env.unwrapped.P.items():
        for a, transitions in actions.items():
            for prob, next_s, reward, terminated in transitions:
                rewards[s, a] += prob * reward
                probs[s, a, next_s] += prob * (not terminated)
    q = np.zeros_like(rewards)
    for _ in range(10_000):
        old_q, q = q, rewards + args.gamma * probs @ q.max(axis=1)  # value iteration: [1]'s target, averaged over s'
        if np.abs(q - old_q).max() < 1e-10:
            break
    results = {}
    for name, actions in {"exact": agent.act(states) - env.action_space.start, "optimal": q.argmax(axis=1)}.items():
        policy_rewards, policy_probs = rewards[states, actions], probs[states, actions]  # (S,), (S, S)
        state_probs, expected = start, 0.0  # state_probs: of being in each state, the episode not over
        for _ in range(env.spec.max_episode_steps):
            state_probs, expected = state_probs @ policy_probs, expected + state_probs @ policy_rewards
        results[f"eval/{name}_return"] = float(expected)
    return results


def make_agent(args: Args, obs_shape: tuple[int, ...], action_space: gym.Space) -> Table:
    if not isinstance(action_space, gym.spaces.Discrete):
        raise UsageError(f"--env-id {args.env_id} acts in {action_space}, not Discrete: see ppo.py")
    return Table(args, action_space, obs_shape)


def train(args: Args) -> dict[str, float]:
    """Trains an agent, returns its last evaluation. run.step acts; run.goes_on evaluates and saves; run.log writes."""
    with contextlib.closing(Run(args)) as run:  # closes the environment, also after an error
        agent = make_agent(args, run.obs_shape, run.action_space)
        run.start(model=agent)  # what a checkpoint holds
        state, first_action = run.obs[0].item(), int(run.action_space.start)  # actions are counted from 0 here
        duration = args.exploration_fraction * args.total_timesteps
        while run.goes_on():  # False at the end
            # 1. Act
            epsilon = linear_schedule(args.start_e, args.end_e, duration, run.global_step)
            action, learning_rate = agent.next_action, args.learning_rate
            if not run.actions[0]:  # an episode begins: one has ended, or --resume could not replay it
                action = explore(agent.values(state), agent.counts[state], epsilon, args)
            if args.anneal_lr:
                learning_rate *= 1 - run.global_step / args.total_timesteps
            next_state, reward, terminated, *_ = run.step(action + first_action)
            agent.counts[state][action] += 1

            # 2. Choose the next action before [5], as [2] needs it. In the book the others choose after [5]
            next_values, next_counts = agent.values(next_state), agent.counts[next_state]
            next_action = explore(next_values, next_counts, epsilon, args)
            next_probs = policy(next_values, next_counts, epsilon, args) if args.algorithm == "expected-sarsa" else []

            # 3. Learn
            table, other = agent.q[0], agent.q[-1]  # one and the same, except for [4]
            if args.algorithm == "double-q-learning" and random.random() < 0.5:
                table, other = other, table
            target = reward
            if not terminated:  # a terminal state is worth nothing
                target += args.gamma * next_value(table[next_state], other[next_state], next_action, next_probs, args)
            td_error = target - table[state][action]
            table[state][action] += learning_rate * td_error  # [5]
            state, agent.next_action = run.obs[0].item(), next_action  # after an end run.obs is of the next episode

            # 4. Log
            if run.global_step % 1000 == 0:
                losses = {"losses/td_loss": td_error * td_error, "charts/epsilon": epsilon}  # td_loss: of this step
                run.log(losses | {"charts/learning_rate": learning_rate})
        show_grid(run.envs[0], agent, run.dir / "values.png" if args.plot_values else None)
        return run.result


def show_grid(env: gym.Env, agent: Table, picture: Path | None) -> None:
    """Of Gymnasium's grids: prints the greedy policy, with a dot where the agent never had to act; draws max_a Q."""
    if isinstance(env.unwrapped, FrozenLakeEnv):
        shape, signs = env.unwrapped.desc.shape, "<v>^"  # of the actions
    elif isinstance(env.unwrapped, CliffWalkingEnv):
        shape, signs = env.unwrapped.shape, "^>v<"
    else:
        return
    states = range(np.prod(shape))
    cells = [signs[agent.act(s)] if any(agent.counts[s]) else "." for s in states]
    tqdm.write("\n    ".join(["The greedy policy:", *map(" ".join, np.reshape(cells, shape))]))
    if picture:
        from matplotlib.figure import Figure

        values = [max(agent.values(s)) if any(agent.counts[s]) else np.nan for s in states]  # NaN: white
        axes = Figure(figsize=(8, 5), layout="constrained").subplots()
        axes.figure.colorbar(axes.imshow(np.reshape(values, shape)), label="max_a Q(s, a)")
        axes.figure.savefig(picture)


# ---- Below this line nothing learns: command line, environments, evaluation, run folder, as in all scripts ----
# What matters for learning: make_env (what is observed), Run.step (what follows an end). train needs Run and make_env.


class UsageError(Exception):
    """A mistake of the user: main prints it as one line, which says what to do, and ends with exit code 2."""


def check_ranges(args: Args, **ranges: tuple[float, float]) -> None:
    """Refuses integers below 1, floats below 0 (or see ranges), NumPy's numbers and unknown words. Sets frequencies."""
    ranges = {"seed": (0, 2**63 - 1), "gamma": (0, 1), "threads": (1, 1024), "max_grad_norm": (1e-9, math.inf)} | ranges
    for (name, value), kind in zip(vars(args).items(), Args.__annotations__.values(), strict=True):
        low, high = ranges.get(name, (0 if "float" in str(kind) else 1, math.inf))
        if hasattr(value, "dtype") or (type(value) in (int, float) and not low <= value <= min(high, 1e308)):  # not inf
            raise UsageError(f"--{name.replace('_', '-')} is {value!r}, which is not a number from {low} to {high}")
        words = getattr(kind, "__args__", [str])  # "a" and "b" of Literal["a", "b"]
        if isinstance(value, str) and value not in words and str not in words:
            raise UsageError(f"--{name.replace('_', '-')} is {value}, which is none of {words}")
    if args.total_timesteps % getattr(args, "num_envs", 1):
        raise UsageError(f"--total-timesteps {args.total_timesteps} must be a multiple of --num-envs {args.num_envs}")
    args.eval_frequency = args.eval_frequency or math.ceil(args.total_timesteps / 20)
    args.checkpoint_frequency = args.checkpoint_frequency or math.ceil(args.total_timesteps / 10)


def saved_args(run_dir: str | Path, **changes: object) -> Args:
    """The arguments of a run, with changes. train(saved_args("runs/...", resume=True)) goes on with it."""
    try:
        config = json.loads(Path(run_dir, "config.json").read_text())
        assert config["script"] == Path(__file__).stem, f"it is a run of {config['script']}.py"
        return Args(**config["args"] | {"run_dir": str(run_dir)} | changes)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UsageError(f"--run-dir must be a sound run of {Path(__file__).name}, not {run_dir}: {error!r}") from None


def parse_args() -> Args:
    """The command line. --help prints Args. With --resume or --evaluate, flags not given are those of the run."""
    if {"-h", "--help"} & {*sys.argv}:
        flags = inspect.getsource(Args).split("\n\n")[0].split("class Args:\n")[1].replace("    # ", "\n")
        flags = re.sub(r"    (\w+): ", lambda field: f"  --{field[1].replace('_', '-')}: ", flags)
        sys.exit(print(__doc__.split("\n\n    [1]")[0], *re.findall("\nPaper.*(?:\n.+)*", __doc__), flags, sep="\n"))
    run_dirs = re.findall("--run[-_]dir[\n=](.*)", "\n".join(sys.argv)) or [""]
    default = {"default": saved_args(run_dirs[-1])} if {"--resume", "--evaluate"} & {*sys.argv} else {}
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            return tyro.cli(Args, **default)
        except SystemExit:  # tyro draws a box around its message
            raise UsageError(re.sub("[^ -~]+", " ", printed.getvalue())) from None


def number_of(space: gym.Space, obs: object) -> tuple[int, int]:
    """The number of an observation, and how many the space has. In a composite space the parts' are its digits."""
    if isinstance(space, gym.spaces.Discrete):
        return int(obs) - int(space.start), int(space.n)
    if isinstance(space, gym.spaces.MultiBinary):
        space = gym.spaces.MultiDiscrete(np.full(space.shape, 2))
    if not isinstance(space, gym.spaces.MultiDiscrete | gym.spaces.Tuple | gym.spaces.Dict):
        raise UsageError(f"observations can't be counted, but are {space}: see dqn.py, ppo.py")
    number, count = 0, 1
    for part in space.keys() if isinstance(space, gym.spaces.Dict) else range(len(obs)):
        digit, base = number_of(space[part], obs[part])
        number, count = number * base + digit, count * base
    return number, count


def make_env(args: Args, film: Path | None = None) -> gym.Env:
    """An environment whose states are numbered from 0, and whose episodes end some time."""
    env, known = None, Exception if film else (gym.error.Error, ImportError, TypeError, NotImplementedError, UsageError)
    try:
        env = gym.make(args.env_id, **({"render_mode": "rgb_array"} if film else {}))
        space = env.observation_space
        _, num_states = number_of(space, space.sample())
        if num_states > 10**7:
            raise UsageError(f"it has {num_states} states, too many for a table: see dqn.py")
        if film:
            env.reset()
            assert getattr(x := env.render(), "dtype", 0) == np.uint8 and x.shape[2:] == (3,), "render() gives no RGB"
            options = {"episode_trigger": lambda _: True, "video_length": 3000}  # frames wait in memory
            env = gym.wrappers.RecordVideo(env, str(film.parent), name_prefix=film.name, **options)
    except known as error:  # another one comes from within the environment: its traceback helps most
        if env is not None:
            env.close()
        hint = "; --capture-video needs render_mode rgb_array, and MuJoCo perhaps MUJOCO_GL=egl" if film else ""
        raise UsageError(f"--env-id {args.env_id}: {str(error) or env.observation_space}{hint}") from None
    if env.spec.max_episode_steps is None:  # or a greedy policy that has learned little would walk in circles for ever
        env = gym.wrappers.TimeLimit(env, 1000)
    if isinstance(space, gym.spaces.Discrete) and space.start == 0:
        return env
    return gym.wrappers.TransformObservation(env, lambda o: number_of(space, o)[0], gym.spaces.Discrete(num_states))


def evaluate(agent: nn.Module, args: Args, film: Path) -> dict[str, float]:
    """Plays eval_episodes episodes, from the same seeds every time, each in its own environment. Films the first."""
    seeds = np.random.SeedSequence([args.seed, 1]).generate_state(args.eval_episodes).tolist()  # 1: training has 0
    returns, lengths, playing = np.zeros(len(seeds)), np.zeros(len(seeds)), {}
    with contextlib.ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())  # some environments draw from these three
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        random.seed(args.seed)
        np.random.seed(seeds)
        torch.default_generator.manual_seed(args.seed)
        films = [film if args.capture_video else None] + [None] * (len(seeds) - 1)
        envs = [stack.enter_context(contextlib.closing(make_env(args, film))) for film in films]
        here, there = ((int(envs[0].observation_space.n),), envs[0].action_space), (agent.obs_shape, agent.action_space)
        if here != there:
            raise UsageError(f"--env-id {args.env_id} observes and acts in {here}, the trained agent in {there}")
        playing = {i: env.reset(seed=seed)[0] for i, (env, seed) in enumerate(zip(envs, seeds, strict=True))}
        while playing and not Run.stop_signal:
            for i, action in zip(list(playing), agent.act(np.stack([*playing.values()])), strict=True):
                playing[i], reward, terminated, truncated, _ = envs[i].step(action)
                returns[i : i + 1] += reward  # some environments return an array of one element
                lengths[i] += 1
                if terminated or truncated or lengths[i] == args.eval_max_steps:
                    del playing[i]
    if lengths.max() == args.eval_max_steps:
        tqdm.write(f"--eval-max-steps {args.eval_max_steps} was reached: perhaps an episode was cut")
    result = {"eval/episodic_return": returns.mean(), "eval/return_std": returns.std()}
    return {} if playing else result | {"eval/episodic_length": lengths.mean()} | exact_returns(agent, envs[0], args)


def load_file(path: Path, **parts: nn.Module | torch.optim.Optimizer) -> dict:
    """Reads model.pt or checkpoint.pt, data and never code, into the parts of the same names."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        assert {"model", "bytes" if path.name == "checkpoint.pt" else "action_space"} <= state.keys()
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state
    except Exception as error:  # a damaged file can raise anything
        raise UsageError(f"{path} is missing, damaged or of another script ({type(error).__name__})") from None


SPACES = {"Discrete": ("n", "start"), "MultiDiscrete": ("nvec", "start"), "Box": ("low", "high", "shape")}  # in files


def load(run_dir: str) -> nn.Module:
    """The trained agent of a run, without its environment: load("runs/...").act(observation) is an action."""
    state = load_file(Path(run_dir, "model.pt"))
    kind, dtype, values = state["action_space"]
    values = {name: value.numpy()[()] for name, value in values.items()}  # [()]: a 0-d array becomes a number
    space = getattr(gym.spaces, kind)(**values, dtype=np.dtype(dtype).type)
    agent = make_agent(saved_args(run_dir), tuple(state["obs_shape"]), space)
    load_file(Path(run_dir, "model.pt"), model=agent)
    return agent


class Run:
    """A run: environments, folder, log. obs, (N, ...): what is now seen; actions: each present episode's."""

    stop_signal, all_threads = 0, torch.get_num_threads()  # main sets the first, at a signal; PyTorch chose the second

    def __init__(self, args: Args):
        name = f"{re.sub('[:/]', '-', args.env_id)}__{Path(__file__).stem}__{args.seed}"
        self.args, self.dir = args, Path(args.run_dir or f"runs/{name}__{datetime.now():%Y%m%d-%H%M%S-%f}")
        self.command = shlex.join([sys.executable, __file__, "--run-dir", str(self.dir)])
        self.global_step, self.last_step, self.started, self.result, self.wandb = 0, 0, time.time(), {}, None
        try:
            torch.zeros(1, device=args.device.replace("auto", "cpu"))
        except (AssertionError, RuntimeError) as error:
            raise UsageError(f"--device {args.device} can't be used, --device cpu can ({error!s:.99})") from None
        if args.capture_video:
            make_env(args, film=self.dir / "videos" / "trial").close()  # finds out now whether it can be filmed
        random.seed(args.seed)
        np.random.seed(np.random.SeedSequence(args.seed).generate_state(4))  # the seed itself gives PyTorch's numbers
        torch.manual_seed(args.seed)
        with contextlib.ExitStack() as stack:
            self.envs = [stack.enter_context(contextlib.closing(make_env(args))) for _ in range(args.num_envs)]
            self.opened = stack.pop_all()  # what close will close; start adds to it
        self.obs_shape, self.action_space = (int(self.envs[0].observation_space.n),), self.envs[0].action_space
        small = len(self.obs_shape) == 1  # networks for vectors are too small for a GPU to help
        self.obs = np.zeros(args.num_envs, np.int64)  # the number of a state, of obs_shape[0] states
        self.returns, self.actions = np.zeros(args.num_envs), [[] for _ in range(args.num_envs)]  # of present episodes
        self.device = args.device.replace("auto", "cuda" if torch.cuda.is_available() and not small else "cpu")
        torch.set_num_threads(args.threads or (1 if small else Run.all_threads))

    def start(self, **parts: nn.Module | torch.optim.Optimizer) -> None:
        """Opens the folder. parts: all that changes in training, with a state_dict; the one named model acts."""
        args, path, checkpoint, self.parts = self.args, self.dir / "config.json", self.dir / "checkpoint.pt", parts
        if args.resume:
            saved, config = asdict(saved_args(self.dir)), json.loads(path.read_text())
            changed = {k for k, v in vars(args).items() if v != saved[k]} - {"run_dir", "resume", "device", "threads"}
            if changed - {"total_timesteps", "capture_video"} or args.total_timesteps < saved["total_timesteps"]:
                raise UsageError(f"--resume can only raise --total-timesteps; unlike the run's: {', '.join(changed)}")
        elif any((self.dir / name).exists() for name in ("config.json", "checkpoint.pt", "model.pt", "metrics.jsonl")):
            raise UsageError(f"--run-dir {self.dir} holds a run: go on with --resume, or name another folder")
        else:
            git = f"git -C {shlex.quote(os.path.dirname(__file__))} describe --always --abbrev=40 --dirty --exclude='*'"
            config = {"script": Path(__file__).stem, "args": asdict(args), "command": sys.argv}
            config |= {"commit": subprocess.getoutput(f"{git} 2>&-") or None, "wandb_id": os.urandom(8).hex()}
            config["versions"] = {d.name: d.version for d in distributions()} | {"python": sys.version}
            config["hardware"] = subprocess.getoutput("uname -a; lscpu | grep 'Model name'; nvidia-smi -L 2>&-")
        config["args"]["total_timesteps"] = args.total_timesteps  # a resumed run may be longer
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            if args.track:
                import wandb

                names = {"project": args.wandb_project_name, "name": self.dir.name, "id": config["wandb_id"]}
                self.wandb = wandb.init(dir=self.dir.resolve(), config=config["args"], resume="allow", **names)
                self.opened.callback(self.wandb.finish)
                self.wandb.define_metric("*", step_metric="global_step")
            Path(f"{path}.tmp").write_text(json.dumps(config, indent=1, default=str))  # default: run_dir may be a Path
            os.replace(f"{path}.tmp", path)
            self.metrics = self.opened.enter_context(open(self.dir / "metrics.jsonl", "ab"))
        except Exception as error:  # W&B's have many kinds: no key, no network
            hint = "--run-dir must be writable" if isinstance(error, OSError) else "WANDB_MODE=offline needs no account"
            raise UsageError(f"{error}: {hint}") from None
        state = {"step": 0, "last_step": 0, "seconds": 0.0, "bytes": 0, "actions": self.actions, "streams": []}
        if args.resume and (checkpoint.exists() or Path(self.dir, "model.pt").exists()):  # save writes this one later
            state |= load_file(checkpoint, **parts)
        if self.metrics.tell() < state["bytes"]:
            raise UsageError(f"{self.metrics.name} lacks rows that were there when {checkpoint} was written")
        self.metrics.seek(self.metrics.truncate(state["bytes"]))  # later rows will be written again
        self.global_step, self.last_step, self.result = state["step"], state["last_step"], state.get("result", {})
        self.started -= state["seconds"]
        for i, actions in enumerate(state["actions"]):
            whole = self.begin_episode(i, np.array(actions))
            if not whole or ("obs" in state and (self.obs[i] != state["obs"][i].numpy()).any()):
                tqdm.write(f"{args.env_id} can't be replayed exactly: the present episode of environment {i} ends here")
                self.begin_episode(i)
        setters = random.setstate, np.random.set_state, torch.set_rng_state, torch.cuda.set_rng_state_all
        for setter, stream in zip(setters, state["streams"], strict=False):
            setter(stream)
        self.bar = tqdm(total=args.total_timesteps, initial=self.global_step, unit=" steps", disable=None)
        self.opened.callback(self.bar.close)
        print(f"{args.env_id}: run folder {self.dir}, from step {self.global_step}")

    def begin_episode(self, i: int, actions: np.ndarray | tuple = ()) -> bool:
        """Resets environment i. After --resume it replays the episode's actions so far; False if that ended it."""
        began = self.global_step - len(self.envs) * len(actions)  # each episode has a seed of its own
        seed = np.random.SeedSequence([self.args.seed, 0, i, began]).generate_state(1).item()
        obs, _ = self.envs[i].reset(seed=seed)
        self.returns[i], self.actions[i] = 0.0, list(actions)
        for action in actions:
            obs, reward, terminated, truncated, _ = self.envs[i].step(action.copy())  # step may change it
            self.returns[i : i + 1] += reward
            if terminated or truncated:
                return False
        if np.shape(obs) != self.obs[i].shape or not np.isfinite(obs).all():
            raise FloatingPointError(f"NaN, infinity or another shape than its space's from {self.args.env_id}: {obs}")
        self.obs[i] = obs
        return True

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        """Steps the environment -> next_obs, reward, terminated, truncated, info. Arrays would take most of the time.

        Where an episode has ended, next_obs is its last observation, and self.obs the first one of the next episode.
        """
        self.actions[0].append(action)
        next_obs, reward, terminated, truncated, info = self.envs[0].step(action)
        reward = np.asarray(reward).item()  # some environments return an array of one element
        if not math.isfinite(reward):
            raise FloatingPointError(f"NaN or infinity from {self.args.env_id}: rewards {reward}")
        self.obs[0] = next_obs
        self.global_step += 1
        self.returns[0] += reward
        if terminated or truncated:
            self.log({"charts/episodic_return": self.returns[0], "charts/episodic_length": len(self.actions[0])})
            self.begin_episode(0)
        return int(next_obs), reward, terminated, truncated, info

    def goes_on(self) -> bool:
        """Evaluates and saves where that is due. False at the end of the run."""
        args, step, last = self.args, self.global_step, self.last_step
        end, self.last_step = step == args.total_timesteps, step
        if step // args.eval_frequency > last // args.eval_frequency or (end and step > last):
            if result := evaluate(self.parts["model"], args, self.dir / "videos" / f"step-{step}"):
                self.log(result)
                self.result = {name: float(value) for name, value in result.items()}
            else:  # a signal has stopped it: after --resume it is due again
                self.last_step = last
        if step // args.checkpoint_frequency > last // args.checkpoint_frequency or end or Run.stop_signal:
            self.save()
        if Run.stop_signal:
            print(f"Stopped at step {step}. To go on:\n    {self.command} --resume")
            raise SystemExit(128 + Run.stop_signal)
        if end:
            print(f"Done: {self.dir}/model.pt. To watch it:\n    {self.command} --evaluate --capture-video")
        return not end

    def log(self, row: dict[str, float]) -> None:
        """Writes a row of metrics.jsonl, and sends it to W&B. NaN or infinity ends the run."""
        seconds = time.time() - self.started
        row = {"global_step": self.global_step, "time": round(seconds, 3)} | {k: float(v) for k, v in row.items()}
        if "charts/learning_rate" in row:
            row["charts/SPS"] = self.global_step / seconds  # since the run began, evaluations included
        if broken := [name for name, value in row.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"NaN or infinity at step {self.global_step} in {', '.join(broken)}")
        self.metrics.write(json.dumps(row).encode() + b"\n")
        self.metrics.flush()
        if self.wandb:
            with contextlib.suppress(Exception):  # W&B's troubles must not end the run
                self.wandb.log(row)
        if evaluation := [f"{name[5:]} {value:.4g}" for name, value in row.items() if name.startswith("eval/")]:
            tqdm.write(f"step {self.global_step:>10,}: {', '.join(evaluation)}")
        self.bar.update(self.global_step - self.bar.n)

    def save(self) -> None:
        """Writes checkpoint.pt, then model.pt. A kill at any moment leaves each whole, the old or the new one."""
        space, (_, keys, *rest) = self.action_space, np.random.get_state()
        kind = next(kind for kind in SPACES if isinstance(space, getattr(gym.spaces, kind)))  # or a subclass
        state = {name: part.state_dict() for name, part in self.parts.items()}
        if not all(math.isfinite(values.sum()) for values in state["model"].values()):
            raise FloatingPointError(f"NaN or infinity at step {self.global_step} in the parameters")
        values = {name: torch.as_tensor(getattr(space, name)) for name in SPACES[kind]}
        model = {"model": state["model"], "obs_shape": self.obs_shape, "action_space": (kind, str(space.dtype), values)}
        state |= {"step": self.global_step, "last_step": self.last_step, "seconds": time.time() - self.started}
        state |= {"bytes": self.metrics.tell(), "obs": torch.from_numpy(self.obs), "result": self.result}
        state["actions"] = [torch.from_numpy(np.array(actions)) for actions in self.actions]
        streams = random.getstate(), ("MT19937", keys.tolist(), *rest), torch.get_rng_state()
        state["streams"] = *streams, torch.cuda.get_rng_state_all() if "cuda" in self.device else []
        for name, content in {"checkpoint.pt": state, "model.pt": model}.items():
            torch.save(content, self.dir / f"{name}.tmp")
            os.replace(self.dir / f"{name}.tmp", self.dir / name)

    def close(self) -> None:
        self.opened.close()
        if self.last_step and isinstance(sys.exc_info()[1], Exception) and not Run.stop_signal:
            print(f"Fix the cause first: {self.command} --resume repeats the steps that led to it", file=sys.stderr)


def main() -> None:
    """Exit codes: 0 done, 2 a mistake of the user, 130 or 143 stopped by a signal, 1 everything else."""

    def stop(number: int, _: object) -> None:
        Run.stop_signal = number
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nStopping after this batch or evaluation; a second Ctrl-C goes back to the last checkpoint.\n")

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # each line at once, also into a file
    sys.path.insert(1, os.getcwd())  # for environments in modules of the current folder
    gym.logger.min_level = gym.logger.ERROR  # warnings of libraries would stand around our one line
    warnings.simplefilter("ignore")
    try:
        args = parse_args()
        if args.evaluate:
            film = Path(args.run_dir, "videos", f"evaluation-{datetime.now():%Y%m%d-%H%M%S-%f}")
            result = evaluate(load(args.run_dir), args, film)
            if Run.stop_signal:
                sys.exit(128 + Run.stop_signal)
            print(*(f"{name} {value:.4g}," for name, value in result.items()), args.eval_episodes, "episodes")
            print(*(f"{path}\n" for path in film.parent.glob(f"{film.name}*.mp4")), sep="", end="")
        else:
            train(args)
    except (UsageError, FloatingPointError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


if __name__ == "__main__":
    main()
