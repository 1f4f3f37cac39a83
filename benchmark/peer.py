"""Runs a peer on our logs: d3rlpy's IQL, CQL and behaviour cloning (BC), for a report beside iql.py and cql.py.

    uv run --script benchmark/peer.py --algorithm iql --dataset data/hopper --env-id Hopper-v5 --total-timesteps 30000
    python benchmark/peer.py --algorithm cql --reward-scale 1 --cql-alpha 0.005 --total-timesteps 5000

d3rlpy needs an older Gymnasium than ours, so it has an environment of its own, which uv makes. Where d3rlpy is missing,
the script calls uv itself. So the second command works as well, and run.py can start it. With the versions below,
FrozenLake-v1, HalfCheetah-v5 and Hopper-v5 give the same numbers in both environments.

Flags and their defaults are those of algorithms/iql.py (for iql and bc) or algorithms/cql.py. The reading of the data,
the scale of the rewards and the evaluation with its seeds are that script's own code. Batches are drawn as there, since
d3rlpy's own way drops the last transition before a time limit. The update is d3rlpy's. It differs from ours:

- iql: the policy's standard deviation begins at exp(-1.5), not at 1. The critics learn from V as it was before its own
  update. There are no discrete actions.
- cql: the temperature learns before the actor. The entropy is in the targets as in ours, which is not d3rlpy's default.
- cql, discrete: Huber's loss in place of the square. It finds means only where errors are below 1, so our reward scale
  of 100 gives a policy that never arrives; with --reward-scale 1 the penalty has to be smaller, too. Targets are copied
  every 1 / tau steps, not a little in each.
- bc, with a Box: the squared error. iql.py --temperature 0 learns a standard deviation; both aim at the mean.

The run folder has no model. --resume begins the run anew, with the flags that it had.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["d3rlpy==2.8.1", "gymnasium[mujoco,toy-text]==1.0.0", "mujoco>=3.11,<3.12", "numpy>=2", "torch>=2.13",
#     "tqdm>=4.66", "tyro>=1"]
# ///

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from algorithms import cql, iql  # noqa: E402

OURS = {"iql": iql, "cql": cql, "bc": iql}  # the script whose flags, data and evaluation a peer has
UNUSED = {"track", "wandb_project_name", "capture_video", "evaluate", "resume", "device", "checkpoint_frequency"}
OF_VALUES = {"tau", "gamma", "expectile", "temperature", "max_weight", "return_range"}  # unused by bc


class UsageError(Exception):
    """One line for the user."""


def parse(words: list[str]) -> tuple[str, ModuleType, object]:
    """The algorithm, our script of its kind, and that script's arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--algorithm", choices=OURS)
    parser.add_argument("--run-dir")
    parser.add_argument("--resume", action="store_true")
    if {"-h", "--help"} & {*words}:
        sys.exit(print(__doc__.strip()))
    try:
        options, others = parser.parse_known_args(words)
        if options.resume and (others or options.algorithm):
            raise UsageError("--resume takes no flag but --run-dir: the run has its own")
        if options.resume:
            config = json.loads(Path(options.run_dir or "", "config.json").read_text())
            saved, others = parser.parse_known_args(config["command"][1:])
            options.algorithm = saved.algorithm
    except (argparse.ArgumentError, OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--resume needs the --run-dir of a run: {error}" if "--resume" in words else error) from None
    if options.algorithm is None:
        raise UsageError(f"--algorithm must be one of {', '.join(OURS)}")
    ours, before = OURS[options.algorithm], sys.argv
    sys.argv = [before[0], *others, *([f"--run-dir={options.run_dir}"] if options.run_dir else [])]
    try:
        args = ours.parse_args()
    finally:
        sys.argv = before
    if args.track or args.capture_video or args.evaluate or args.device not in ("auto", "cpu"):
        raise UsageError("--track, --capture-video, --evaluate and another --device than cpu are not for a peer")
    args.resume = options.resume
    return options.algorithm, ours, args


def settings(algorithm: str, args: object, discrete: bool) -> tuple[str, dict[str, object], list[str]]:
    """d3rlpy's name of the configuration, its values, and the optimizers whose rate falls where --anneal-lr is on."""
    rate, values = args.learning_rate, {"batch_size": args.batch_size}
    if algorithm == "bc" and discrete:
        return "DiscreteBCConfig", values | {"learning_rate": rate, "beta": 0.0}, ["optim_factory"]
    if algorithm == "bc":
        return "BCConfig", values | {"learning_rate": rate, "policy_type": "deterministic"}, ["optim_factory"]
    values["gamma"] = args.gamma
    if algorithm == "iql" and discrete:
        raise UsageError(f"--env-id {args.env_id}: d3rlpy's IQL has no discrete actions; cql and bc have")
    if discrete:
        values |= {"learning_rate": rate, "alpha": args.cql_alpha, "n_critics": 1}
        return (
            "DiscreteCQLConfig",
            values | {"target_update_interval": round(1 / max(args.tau, 1e-6))},
            ["optim_factory"],
        )
    values |= {"actor_learning_rate": rate, "critic_learning_rate": rate, "tau": args.tau, "n_critics": 2}
    if algorithm == "iql":
        values |= {"expectile": args.expectile, "weight_temp": args.temperature, "max_weight": args.max_weight}
        return "IQLConfig", values, ["actor_optim_factory"]
    values |= {"conservative_weight": args.cql_alpha, "n_action_samples": args.num_samples, "soft_q_backup": True}
    values |= {"temp_learning_rate": rate, "initial_temperature": 0.2}
    values |= {"alpha_learning_rate": 0.0, "initial_alpha": 1.0}  # no Lagrange multiplier
    return "CQLConfig", values, [f"{part}_optim_factory" for part in ("actor", "critic", "temp")]


def make_learner(algorithm: str, args: object, data: dict[str, np.ndarray], space: gym.Space) -> object:
    import d3rlpy

    discrete, obs = isinstance(space, gym.spaces.Discrete), data["observations"]
    name, values, falling = settings(algorithm, args, discrete)
    if args.anneal_lr:
        cosine = d3rlpy.optimizers.CosineAnnealingLRFactory(T_max=args.total_timesteps)
        values |= {part: d3rlpy.optimizers.AdamFactory(lr_scheduler_factory=cosine) for part in falling}
    if getattr(args, "norm_obs", False):
        scaler = d3rlpy.preprocessing.StandardObservationScaler
        values["observation_scaler"] = scaler(mean=obs.mean(0), std=obs.std(0), eps=1e-3)
    d3rlpy.seed(args.seed)
    learner = getattr(d3rlpy.algos, name)(**values).create(device="cpu:0")
    learner.create_impl(obs.shape[1:], int(space.n) if discrete else data["actions"].shape[1])
    return learner


def draw(data: dict[str, np.ndarray], size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A batch as d3rlpy's update takes it: transitions drawn with replacement, (size, ...) float32 each."""
    rows = rng.integers(len(data["rewards"]), size=size)
    part = {name: array[rows].astype(np.float32).reshape(size, -1) for name, array in data.items()}
    batch = {name: part[name] for name in ("observations", "actions", "rewards", "next_observations")}
    batch |= {"terminals": part["terminations"], "intervals": np.ones_like(part["rewards"])}  # a time limit is no end
    return batch | {"next_actions": np.zeros_like(part["actions"]), "transitions": []}  # which no update here uses


def open_folder(algorithm: str, args: object) -> Path:
    """A folder with a config.json like that of our scripts."""
    name = f"{re.sub('[:/]', '-', args.env_id)}__d3rlpy_{algorithm}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    folder = Path(args.run_dir or f"runs/{name}")
    path, unused = folder / "config.json", UNUSED | (OF_VALUES if algorithm == "bc" else set())
    if path.exists() and not args.resume:
        raise UsageError(f"--run-dir {folder} holds a run: begin it anew with --resume, or name another folder")
    config = {"script": f"d3rlpy_{algorithm}", "args": {k: v for k, v in asdict(args).items() if k not in unused}}
    config["command"] = json.loads(path.read_text())["command"] if args.resume else sys.argv
    status, commit = subprocess.getstatusoutput(f"git -C '{ROOT}' describe --always --abbrev=40 --dirty --exclude='*'")
    config["commit"] = None if status else commit
    config["versions"] = {d.name: d.version for d in distributions()} | {"python": sys.version}
    config["hardware"] = subprocess.getoutput("uname -a; lscpu | grep 'Model name'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config, indent=1))
    except OSError as error:
        raise UsageError(f"--run-dir must be writable: {error}") from None
    return folder


def train(algorithm: str, ours: ModuleType, args: object, data: dict[str, np.ndarray], agent: torch.nn.Module) -> None:
    """agent: ours, untrained. It knows the environment's actions; d3rlpy's policy takes the place of its own."""
    from d3rlpy.dataset import TransitionMiniBatch

    learner, rng = make_learner(algorithm, args, data, agent.action_space), np.random.default_rng(args.seed)
    agent.act = lambda obs: agent.to_env(torch.from_numpy(learner.predict(obs.astype(np.float32))))
    folder, started = open_folder(algorithm, args), time.time()
    print(f"d3rlpy's {algorithm} on {args.env_id}: run folder {folder}", flush=True)
    with open(folder / "metrics.jsonl", "w", buffering=1) as metrics:
        for step in range(1, args.total_timesteps + 1):
            losses = learner.update(TransitionMiniBatch(**draw(data, args.batch_size, rng)))
            row = {f"losses/{name}": loss for name, loss in losses.items()} if step % 100 == 0 else {}
            if step % args.eval_frequency == 0 or step == args.total_timesteps:
                row |= ours.evaluate(agent, args, folder)
                print(f"step {step:>10,}: episodic_return {row['eval/episodic_return']:.4g}", flush=True)
            if not all(map(math.isfinite, row.values())):
                raise FloatingPointError(f"NaN or infinity at step {step}: {row}")
            if row:
                row = {"global_step": step, "time": round(time.time() - started, 3)} | row
                metrics.write(json.dumps(row, default=float) + "\n")


def main() -> None:
    algorithm, ours, args = parse(sys.argv[1:])
    torch.set_num_threads(args.threads or 1)
    gym.logger.min_level = gym.logger.ERROR
    with contextlib.closing(ours.make_env(args)) as env:  # finds mistakes before it installs anything
        agent = ours.make_agent(args, env.observation_space.shape, env.action_space)
        data = ours.read_dataset(args, env)
    settings(algorithm, args, agent.discrete)
    if not find_spec("d3rlpy"):
        uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if not uv:
            raise UsageError("d3rlpy is not installed, and there is no uv to install it: pip install uv")
        os.execv(uv, [uv, "run", "--quiet", "--script", __file__, *sys.argv[1:]])
    data["rewards"] *= ours.reward_scale(data, args.return_range) if ours is iql else args.reward_scale
    train(algorithm, ours, args, {name: array.numpy() for name, array in data.items()}, agent)


if __name__ == "__main__":
    try:
        main()
    except (UsageError, iql.UsageError, cql.UsageError, FloatingPointError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
