"""Makes data sets for the scripts that learn from logs alone: iql, cql, decision_transformer.

    python benchmark/record.py --run-dir runs/hopper --steps 100000 --output data/hopper
    python benchmark/record.py --policy random --env-id Hopper-v5 --output data/hopper-random
    python benchmark/record.py --run-dir runs/good runs/poor --random-share 0.3 --output data/hopper-mixed
    python benchmark/record.py --run-dir runs/hopper --replay-buffer --output data/hopper-replay

The first plays the trained agent of a run folder. Of several agents, each plays an episode in turn. The last one takes
the newest --steps transitions of the replay buffer of a run of sac, td3 or dqn, from where an episode begins.

The folder gets data.npz, data.json (how it was made, and how good the behaviour was) and README.md. data.npz has six
arrays with one row for each transition, in the order in which they were made, one episode after another: observations,
actions, rewards, terminations, truncations, next_observations. A termination is an end after which nothing can be
earned; a truncation is a time limit, or the end of the recording. The same command writes the same bits.
"""

import importlib
import json
import os
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
from command_line import parse
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), os.getcwd()]  # the scripts, and environments in modules of the current folder
# Returns of a random and of an expert policy, from D4RL (Fu et al. 2020, arXiv:2004.07219): d4rl/infos.py. A score is
# 0 for the first, 100 for the second. They are for older versions of these environments.
D4RL = {
    "HalfCheetah": (-280.178953, 12135.0),
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
    "Ant": (-325.6, 3879.7),
}


@dataclass
class Args:
    output: Path  # the new folder
    run_dir: tuple[str, ...] = ()  # folders of trained agents
    policy: Literal["trained", "random"] = "trained"  # random: without a run folder, but with --env-id
    env_id: str | None = None  # None: that of the run
    steps: int = 100_000  # transitions
    random_share: float = 0.0  # each action is a random one with this probability
    replay_buffer: bool = False  # take the transitions out of the run's checkpoint; --steps: the last so many
    seed: int = 1  # of the episodes and of random actions


class UsageError(Exception):
    """One line for the user."""


def load_agent(run_dir: str) -> tuple[object, object, object]:
    """The script of a run as a module, the run's arguments, its agent."""
    try:
        script = json.loads(Path(run_dir, "config.json").read_text())["script"]
        module = importlib.import_module(f"algorithms.{script}")
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UsageError(f"--run-dir {run_dir} is no run folder: {error}") from None
    if hasattr(module, "History"):
        raise UsageError(f"--run-dir {run_dir}: {script} needs the reward of each step, and is not recorded")
    if not hasattr(module, "make_env"):
        raise UsageError(f"--run-dir {run_dir}: {script} learns from text, and has no environment")
    try:
        return module, module.saved_args(run_dir), module.load(run_dir)
    except module.UsageError as error:
        raise UsageError(str(error)) from None


def command_of(run_dir: str) -> str:
    words = json.loads(Path(run_dir, "config.json").read_text()).get("command")
    return shlex.join(["python", *map(str, words)]) if isinstance(words, list) else "an unknown command"


def play(args: Args, env_id: str, agents: list) -> dict[str, np.ndarray]:
    """args.steps transitions of the agents, or of random actions where there is none."""
    env = gym.make(env_id)
    if env.spec.max_episode_steps is None:  # a bad policy could walk in circles for ever
        env = gym.wrappers.TimeLimit(env, 1000)
    space, rng = env.observation_space, np.random.default_rng([args.seed, 2])
    discrete = isinstance(space, gym.spaces.Discrete)
    if not space.is_np_flattenable or gym.spaces.flatdim(space) > 3000:
        raise UsageError(f"{env_id} observes {space}: only numbers of states and vectors can be recorded")
    vector = (gym.spaces.flatdim(space),)
    for agent in agents:
        if agent.obs_shape != vector or agent.action_space != env.action_space:
            raise UsageError(f"{env_id} is not what the agent was trained in: {agent.obs_shape}, {agent.action_space}")

    def see(obs: object) -> np.ndarray:  # as it is recorded: a copy, for some environments use their array again
        return np.array(obs) if discrete else gym.spaces.flatten(space, obs).astype(np.float32)

    def choose(agent: object, obs: object) -> np.ndarray:
        if agent is None or rng.random() < args.random_share:
            return env.action_space.sample()
        if type(agent).__name__ == "Table":  # q_learning's: it knows states by their numbers
            return agent.act(np.asarray(obs) - space.start)
        return agent.act(gym.spaces.flatten(space, obs))

    rows = {name: [] for name in ARRAYS}
    env.action_space.seed(args.seed)
    episode, ended = -1, True
    for _ in tqdm(range(args.steps), disable=None):
        if ended:
            episode += 1
            agent = agents[episode % len(agents)] if agents else None
            obs, _ = env.reset(seed=np.random.SeedSequence([args.seed, 3, episode]).generate_state(1).item())
        action = choose(agent, obs)
        before = see(obs), np.array(action)  # step may change both
        next_obs, reward, terminated, truncated, _ = env.step(action)
        ended = terminated or truncated
        new = *before, float(reward), bool(terminated), bool(truncated), see(next_obs)
        for name, value in zip(ARRAYS, new, strict=True):
            rows[name].append(value)
        obs = next_obs
    env.close()
    data = {name: np.array(values) for name, values in rows.items()}
    data["truncations"][-1] |= not ended
    return data


ARRAYS = "observations", "actions", "rewards", "terminations", "truncations", "next_observations"


def take_buffer(run_dir: str, module: object, saved: object, agent: object, steps: int) -> dict[str, np.ndarray]:
    """The replay buffer in a run's checkpoint: first all of environment 0, then all of environment 1, and so on.

    Episodes whose first steps are lost are left out, and those that had not ended yet, but for the last environment's.
    A buffer does not keep time limits. A time limit shows only where the next episode begins in another state.
    """
    script = Path(module.__file__).stem
    if script not in ("sac", "td3", "dqn"):
        raise UsageError(f"--replay-buffer takes transitions of sac, td3 and dqn; {run_dir} is a run of {script}")
    try:
        buffer, num_envs = module.load_file(Path(run_dir, "checkpoint.pt"))["buffer"], saved.num_envs
    except module.UsageError as error:
        raise UsageError(str(error)) from None
    if "images" in buffer:
        raise UsageError(f"{run_dir} observes images: only numbers of states and vectors can be recorded")
    names = "obs", "actions", "rewards", "terminated", "next_obs"
    columns = {name: buffer[name].numpy() for name in names}
    added = int(buffer["added"])  # in rows of all environments; of dqn, in transitions
    if script == "dqn":  # row after row: transition n is that of environment n % num_envs
        size = len(columns["obs"]) // num_envs * num_envs
        kept = np.arange(max(0, added - size), added) % len(columns["obs"])
        columns = {name: column[kept].reshape(-1, num_envs, *column.shape[1:]) for name, column in columns.items()}
    else:
        size = len(columns["obs"])
        kept = np.arange(max(0, added - size), added) % size
        columns = {name: column[kept] for name, column in columns.items()}
    newest = max(1, steps // num_envs)  # rows
    columns = {name: column[-newest:].swapaxes(0, 1) for name, column in columns.items()}
    terminated = columns["terminated"] > 0  # (N, rows)
    follows = (columns["next_obs"][:, :-1] == columns["obs"][:, 1:]).all(-1)
    truncated = np.concatenate([~follows, np.ones((num_envs, 1), bool)], 1) & ~terminated
    actions = columns["actions"]
    actions = actions + agent.action_space.start if script == "dqn" else agent.to_env(torch.from_numpy(actions.copy()))
    arrays = columns["obs"], actions, columns["rewards"], terminated, truncated, columns["next_obs"]
    all_rows = added // num_envs if script == "dqn" else added
    first = np.full((num_envs, 1), all_rows == terminated.shape[1])  # is the first one of the whole run still here?
    begins = np.concatenate([first, (terminated | truncated)[:, :-1]], 1)
    whole = begins.cumsum(1) > 0  # (N, rows): from the first beginning of an episode on
    if not whole.any():
        raise UsageError(f"{run_dir}: in these transitions no episode begins; ask for more --steps")
    ends = terminated.copy()
    ends[:, :-1] |= ~follows
    ended = ends[:, ::-1].cumsum(1)[:, ::-1] > 0  # (N, rows): up to the last end
    ended[-1] = True
    whole = whole & ended if (whole & ended).any() else whole
    return {name: array[whole] for name, array in zip(ARRAYS, arrays, strict=True)}


def summary(data: dict[str, np.ndarray], env_id: str) -> dict[str, object]:
    """Number and returns of the episodes. The last one may be cut: it is left out if there are others."""
    ends = np.flatnonzero(data["terminations"] | data["truncations"])
    starts = np.concatenate([[0], ends[:-1] + 1])
    returns = np.add.reduceat(data["rewards"], starts)
    whole = returns[:-1] if len(returns) > 1 else returns
    result = {"episodes": len(whole), "mean_return": whole.mean(), "std_return": whole.std()}
    result |= {"min_return": whole.min(), "max_return": whole.max()}
    name = env_id.split("/")[-1].split("-")[0]
    if name in D4RL:
        random, expert = D4RL[name]
        result["d4rl_score"] = 100 * (result["mean_return"] - random) / (expert - random)
        result["d4rl_reference"] = f"0 is a return of {random}, 100 one of {expert}: d4rl/infos.py, arXiv:2004.07219"
    return {key: float(value) if isinstance(value, np.floating) else value for key, value in result.items()}


README = """# {env_id}: {transitions} transitions

Behaviour: {behaviour}. Trained by

    {trained_by}

The logs are then made by

    {command}

(name another folder to make them again), in {episodes} episodes. An unfinished last episode is not counted, unless it
is the only one. Returns are from {min_return:.4g} to {max_return:.4g}, on average {mean_return:.4g} (standard deviation
{std_return:.4g}). `data.npz` has {arrays}; `data.json` says how they were made.
"""


def main() -> None:
    args = parse(Args, __doc__)
    sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may hold bytes that are no text
    if (args.output / "data.npz").exists():
        raise UsageError(f"--output {args.output} holds a data set: name another folder")
    if args.steps < 1 or not 0 <= args.random_share <= 1 or args.seed < 0:
        raise UsageError("--steps is at least 1, --random-share from 0 to 1, --seed at least 0")
    if (args.policy == "random") == bool(args.run_dir) or (args.policy == "random" and not args.env_id):
        raise UsageError("give it --run-dir, or --policy random and --env-id")
    if args.replay_buffer and (len(args.run_dir) != 1 or args.random_share or args.env_id):
        raise UsageError("--replay-buffer takes one --run-dir as it is: no --random-share, no --env-id")
    torch.set_num_threads(1)
    loaded = [load_agent(run_dir) for run_dir in args.run_dir]
    env_id = args.env_id or loaded[0][1].env_id
    trained_by = [command_of(run_dir) for run_dir in args.run_dir]
    there = next(path for path in (args.output.absolute(), *args.output.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):  # known before the work, not after it
        raise UsageError(f"--output {args.output}: {there} is no folder that can be written to")
    if args.replay_buffer:
        data = take_buffer(args.run_dir[0], *loaded[0], args.steps)
    else:
        try:
            data = play(args, env_id, [agent for _, _, agent in loaded])
        except (gym.error.Error, ImportError) as error:
            raise UsageError(f"--env-id {env_id}: {error}") from None
    names = [f"{module.__name__.split('.')[-1]} on {saved.env_id}, seed {saved.seed}" for module, saved, _ in loaded]
    behaviour = ", ".join(names) or "random actions"
    behaviour += f"; random actions with probability {args.random_share}" if loaded and args.random_share else ""
    about = {"env_id": env_id, "command": shlex.join(["python", "benchmark/record.py", *sys.argv[1:]])}
    about |= {"behaviour": behaviour + ("; its replay buffer" if args.replay_buffer else "")}
    about["trained_by"] = trained_by
    about |= {"transitions": len(data["rewards"])} | summary(data, env_id)
    about["versions"] = {name: version(name) for name in ("gymnasium", "numpy", "torch")}
    args.output.mkdir(parents=True, exist_ok=True)
    shapes = ", ".join(f"{name} {array.shape} {array.dtype}" for name, array in data.items())
    text = README.format(**about | {"arrays": shapes, "trained_by": "\n    ".join(trained_by) or "nobody"})
    (args.output / "README.md").write_text(text, errors="backslashreplace")
    (args.output / "data.json").write_text(json.dumps(about, indent=1) + "\n")
    np.savez_compressed(args.output / "data.tmp.npz", **data)
    os.replace(args.output / "data.tmp.npz", args.output / "data.npz")
    print(f"{args.output}: {about['transitions']} transitions, mean return {about['mean_return']:.4g}")


if __name__ == "__main__":
    try:
        main()
    except (UsageError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
