"""Implicit Q-learning (IQL): learn to act from logs alone, without a step in the environment.

Q-learning asks for the best action in the next state. The logs say nothing of actions that nobody tried there, and a
network's guess is often far too high. IQL never asks for those. V(s) is more than the mean of Q(s, a) over the actions
in the data: a high expectile, near the best. Q learns from V. The policy imitates the data, good actions most.

    [1] value:   minimise E[L(Q'(s, a) - V(s))],  L(x) = |e - 1{x < 0}| x^2,  Q' = min_i Q'_i                     IQL
    [2] target:  y = r + gamma V(s'), or y = r where s' is terminal                                               IQL
    [3] critics: minimise sum_i E[(Q_i(s, a) - y)^2]                                                              IQL
    [4] weights: w = min(exp(beta (Q'(s, a) - V(s))), w_max)                                                      IQL
    [5] policy:  maximise E[w log pi(a|s)]                                                                        IQL
    [6] targets: theta' <- tau theta + (1 - tau) theta'                                                           IQL

s, a, r, s' are always from the data. i counts critics. Q' is a slow copy of Q, with weights theta'. L is the expectile
loss, e its level. The paper writes tau for our e, and alpha for our tau. With e = 1/2, V is the mean: the value of
the policy of the data. The closer e is to 1, the closer V is to the largest Q'. The larger beta, the greedier pi.

Paper: Kostrikov, Nair and Levine 2021, arXiv:2110.06169, "Offline Reinforcement Learning with Implicit Q-Learning".

Differs from the paper:
- Discrete actions, too: a critic then has an output for each action, and the policy is categorical.
- Rewards are scaled in every environment; in mazes each step costs nothing (paper: 1). Observations can be normalised.
- At a time limit y has V(s') of the last observation. The authors' data leave out that transition.
- PyTorch's own initialisation, not an orthogonal one. No fine-tuning in the environment, which is only for evaluation.

    python algorithms/iql.py
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[atari,box2d,classic-control,mujoco,toy-text]>=1.4,<2", "moviepy>=2.2", "mujoco>=3.11,<3.12",
#     "numpy>=2", "opencv-python-headless>=4.10", "torch>=2.13", "tqdm>=4.66", "tyro>=1", "wandb>=0.31",
# ]
# ///

import contextlib
import copy
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
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

DATA = Path(__file__).parent.parent / "benchmark" / "offline" / "frozenlake"  # the default data set
ARRAYS = "observations", "actions", "rewards", "terminations", "truncations", "next_observations"


@dataclass
class Args:
    # Run
    env_id: str = "FrozenLake-v1"  # a Gymnasium environment, or module:id if a module registers it
    seed: int = 1  # seed of environments, networks and sampling
    total_timesteps: int = 4_000  # gradient steps; paper: 1,000,000
    device: str = "auto"  # cpu, cuda, cuda:N or mps; auto: cpu
    threads: int | None = None  # CPU threads of PyTorch; None: 1; for layers of 256 try 2
    checkpoint_frequency: int | None = None  # steps between checkpoints; None: a tenth of the run
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "plainrl"  # W&B project
    run_dir: str | None = None  # folder of the run; None: a new one in runs/
    resume: bool = False  # go on with the run in --run-dir; a larger --total-timesteps makes it longer
    # Evaluation
    eval_frequency: int | None = None  # steps between evaluations; None: a twentieth of the run
    eval_episodes: int = 100  # episodes of an evaluation
    eval_max_steps: int = 27_000  # steps after which an episode of an evaluation is cut: Atari's half an hour
    capture_video: bool = False  # film the first episode of each evaluation
    evaluate: bool = False  # only evaluate the model in --run-dir
    # Algorithm
    dataset: str = str(DATA)  # folder with data.npz, .npz, Minari id or folder; default: benchmark/offline/frozenlake
    learning_rate: float = 1e-3  # of all networks; paper: 3e-4
    anneal_lr: bool = True  # let the policy's learning rate fall to 0 along a cosine
    gamma: float = 0.99  # [2] discount
    tau: float = 0.02  # [6] share of the new weights in an update of the targets; paper: 0.005
    batch_size: int = 256  # transitions in a gradient step
    expectile: float = 0.98  # [1] e; paper: 0.7, and 0.9 in mazes
    temperature: float = 3.0  # [4] beta: 0 imitates all actions equally; paper: 3; 10 in mazes
    max_weight: float = 100.0  # [4] w_max; paper: 100
    return_range: float = 100.0  # best minus worst return after scaling; 0: unscaled; times beta in [4]; authors: 1000
    norm_obs: bool = False  # normalise observations

    num_envs = 1  # no flag: environments are for evaluation only

    def __post_init__(self) -> None:
        check_ranges(self, tau=(0, 1), expectile=(1e-6, 1 - 1e-6), max_weight=(1e-6, math.inf))  # 0 < e < 1, 0 < w_max


def network(in_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, out_dim))


class Normalizer(nn.Module):
    """(observation - mean) / std, from the data. Part of the model; nothing changes it after fit."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))

    def fit(self, obs: Tensor) -> None:  # (T, obs_dim)
        self.mean[:], self.std[:] = obs.mean(0), obs.std(0, unbiased=False) + 1e-3  # a std can be 0

    def forward(self, obs: Tensor) -> Tensor:
        assert obs.shape[-1:] == self.mean.shape  # else a last dimension of 1 would be broadcast
        return (obs - self.mean) / self.std


class IQL(nn.Module):
    """The networks. Box actions are in [-1, 1] here, discrete ones count from 0; to_env gives the environment's."""

    def __init__(self, obs_shape: tuple[int, ...], space: gym.Space):  # space: of the actions
        super().__init__()
        self.obs_shape, self.action_space = obs_shape, space
        self.discrete = isinstance(space, gym.spaces.Discrete)
        (obs_dim,), action_dim = obs_shape, int(space.n) if self.discrete else math.prod(space.shape)
        critic_dims = (obs_dim, action_dim) if self.discrete else (obs_dim + action_dim, 1)
        self.normalize = Normalizer(obs_dim)
        self.actor = network(obs_dim, action_dim)  # logits, or the mean before its tanh
        self.log_std = nn.Parameter(torch.zeros(0 if self.discrete else action_dim))  # the same in all states; Box only
        self.value = network(obs_dim, 1)
        self.critics = nn.ModuleList([network(*critic_dims) for _ in range(2)])
        self.target_critics = copy.deepcopy(self.critics)

    def v(self, obs: Tensor) -> Tensor:  # (B, obs_dim) -> (B,)
        return self.value(self.normalize(obs)).squeeze(-1)

    def q(self, critics: nn.ModuleList, obs: Tensor, actions: Tensor) -> Tensor:
        """Q_i(s, a) of each critic. (B, obs_dim), (B,) or (B, action_dim) -> (2, B)"""
        obs = self.normalize(obs)
        if self.discrete:
            return torch.stack([critic(obs).gather(-1, actions[:, None]).squeeze(-1) for critic in critics])
        return torch.stack([critic(torch.cat([obs, actions], -1)).squeeze(-1) for critic in critics])

    def log_prob(self, obs: Tensor, actions: Tensor) -> Tensor:
        """log pi(a|s). (B, obs_dim), (B,) or (B, action_dim) -> (B,)"""
        output = self.actor(self.normalize(obs))
        if self.discrete:
            return output.log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1)
        # As in the authors' code: a normal around tanh(mean). sac.py's has atanh(a), infinite where a is -1 or 1
        log_std = self.log_std.clamp(-5, 2)
        noise = (actions - output.tanh()) / log_std.exp()
        return (-0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def to_env(self, actions: Tensor) -> np.ndarray:  # (..., action_dim) -> (..., *action shape), or (...,) -> (...,)
        space, actions = self.action_space, actions.cpu().numpy()
        if self.discrete:
            return actions.astype(space.dtype) + space.start  # the environment counts from start
        low, high, actions = space.low, space.high, actions.reshape((*actions.shape[:-1], *space.shape))
        return np.clip((high + low) / 2 + (high - low) / 2 * actions, low, high).astype(space.dtype)

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The most likely action for an observation, (obs_dim,), or for each of a batch, (B, obs_dim)."""
        obs = torch.as_tensor(np.asarray(obs), dtype=torch.float32, device=next(self.parameters()).device)
        output = self.actor(self.normalize(obs))
        return self.to_env(output.argmax(-1) if self.discrete else output.tanh())


def open_dataset(dataset: str, env: gym.Env) -> tuple[dict[str, np.ndarray], gym.envs.registration.EnvSpec]:
    """The arrays of a data set, (T, ...) each, and the id and options of its environment: env's if they are unknown."""
    path = Path(dataset)
    file = path / "data.npz" if path.is_dir() else path
    try:
        if file.suffix == ".npz" and (file.exists() or not path.is_dir()):
            with np.load(file) as stored:  # data only: it executes no code
                arrays = {name: stored[name] for name in ARRAYS}
            about = json.loads(file.with_name("data.json").read_text()) if file.with_name("data.json").exists() else {}
            return arrays, gym.envs.registration.EnvSpec(about.get("env_id", env.spec.id))
        import minari

        folder = path / "data" if (path / "data").is_dir() else path
        stored = minari.MinariDataset(folder) if path.is_dir() else minari.load_dataset(dataset)
        episodes = list(stored.iterate_episodes())  # an episode of n steps has n + 1 observations
        parts = {name: [getattr(episode, name) for episode in episodes] for name in ARRAYS[1:5]}  # not observations
        seen, keys = [e.observations for e in episodes], getattr(env.env.observation_space, "spaces", None)
        seen = [np.hstack([obs[k] for k in keys or obs]) if isinstance(obs, dict) else obs for obs in seen]  # mazes
        parts |= {"observations": [obs[:-1] for obs in seen], "next_observations": [obs[1:] for obs in seen]}
        parts["truncations"] = [np.append(e.truncations[:-1], e.terminations[-1:] == 0) for e in episodes]  # all end
        return {name: np.concatenate(parts[name]) for name in ARRAYS}, stored.env_spec or env.spec
    except ImportError:
        raise UsageError(f"no .npz file at --dataset {dataset}; Minari's need pip install 'minari[hdf5]'") from None
    except Exception as error:  # missing or damaged files raise many kinds
        raise UsageError(f"--dataset {dataset} can't be read: {type(error).__name__}: {error!s:.200}") from None


def read_dataset(args: Args, env: gym.Env) -> dict[str, Tensor]:
    """All T transitions, compared with the environment. In order: a forgotten truncation would join two episodes.

    observations, next_observations: (T, obs_dim). actions: (T,) from 0, or (T, action_dim) in [-1, 1]. rewards: (T,).
    terminations, truncations: (T,) of 0 and 1. Only a termination means that nothing can be earned any more.
    """
    arrays, spec = open_dataset(args.dataset, env)
    observes, acts, num_rows = env.env.observation_space, env.action_space, len(np.atleast_1d(arrays["rewards"]))

    def check(condition: bool, message: str) -> None:
        if not condition:
            raise UsageError(f"--dataset {args.dataset}: {message}")

    def vectors(name: str) -> np.ndarray:  # (T, D)
        array, space = arrays[name], acts if name == "actions" else observes
        if isinstance(space, gym.spaces.Discrete) and array.size == num_rows:  # numbers of states or actions: one-hot
            inside = np.isin(array, space.start + np.arange(space.n))
            check(inside.all(), f"{name} from {array.min()} to {array.max()}, but {args.env_id} has {space}")
            return np.eye(space.n, dtype=np.float32)[array.astype(np.int64).flatten() - space.start]
        array = array.reshape(num_rows, -1).astype(np.float32)
        check(array.shape[1] == gym.spaces.flatdim(space), f"{name} {array.shape}, but {args.env_id} has {space}")
        return array

    check(f":{args.env_id}".endswith(f":{spec.id}"), f"made in {spec.id}, not {args.env_id}: name that --env-id")
    if options := {k: v for k, v in spec.kwargs.items() if k != "render_mode" and v != env.spec.kwargs.get(k)}:
        tqdm.write(f"--dataset {args.dataset} was made in {spec.id} with {options}; evaluations are without these")
    needed = 8e-9 * num_rows * gym.spaces.flatdim(observes)  # GB of both observations: a float32 has four bytes
    memory = 1e-9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    check(needed < 0.9 * memory, f"its observations need {needed:.1f} GB; this machine has {memory:.1f} GB")
    data, single = {}, ("rewards", "terminations", "truncations")  # one number a row
    for name, array in arrays.items():
        fits = num_rows and array.shape[:1] == (num_rows,) and (array.ndim == 1 or name not in single)
        check(fits, f"{name} {array.shape} beside {num_rows} rewards")
        check(array.dtype.kind in "biuf" and np.isfinite(np.float32(array)).all(), f"words, NaN or infinity in {name}")
        data[name] = array.astype(np.float32) if name in single else vectors(name)
    ends = np.stack([data["terminations"], data["truncations"]])
    check(np.isin(ends, (0, 1)).all(), "terminations and truncations must be 0 or 1")
    moved = (data["next_observations"][:-1] != data["observations"][1:]).any(-1) & ~ends.any(0)[:-1]
    check(not moved.any(), f"row {moved.nonzero()[0][:1]} does not lead to the next row, but no episode ends there")
    if isinstance(acts, gym.spaces.Discrete):
        data["actions"] = data["actions"].argmax(-1)
    else:
        low, high, actions = acts.low.flatten(), acts.high.flatten(), data["actions"]
        check((abs(2 * actions - low - high) <= 1.001 * (high - low)).all(), f"actions beyond {acts}: clip these first")
        data["actions"] = (2 * (actions - low) / np.maximum(high - low, 1e-9) - 1).clip(-1, 1)
    return {name: torch.from_numpy(array) for name, array in data.items()}


def reward_scale(data: dict[str, Tensor], return_range: float) -> float:
    """With this factor the best and the worst return of the data differ by return_range. 1 if all returns are equal."""
    ends = (data["terminations"] + data["truncations"] > 0).long()
    episode = ends.cumsum(0) - ends  # (T,): the number of each transition's episode
    returns = torch.zeros(int(episode[-1]) + 1).index_add(0, episode, data["rewards"])
    returns = returns if data["terminations"][-1] or len(returns) < 3 else returns[:-1]  # it may be cut; two must stay
    gap = (returns.max() - returns.min()).item()
    return return_range / gap if return_range and gap > 1e-4 * returns.abs().max() else 1.0  # less is rounding


def expectile_loss(difference: Tensor, expectile: float) -> Tensor:
    """The mean of L. difference: Q' - V, (B,). With a high expectile, it costs more if V is below than above."""
    weights = torch.where(difference < 0, 1 - expectile, expectile)  # [1] |e - 1{x < 0}|
    return (weights * difference.square()).mean()  # [1]


def td_target(rewards: Tensor, terminated: Tensor, next_values: Tensor, gamma: float) -> Tensor:
    """The target y of both critics, (B,). next_values: V(s'), (B,)"""
    assert rewards.shape == terminated.shape == next_values.shape
    return rewards + gamma * (1 - terminated) * next_values  # [2]; a terminal state is worth nothing


def policy_weights(advantages: Tensor, temperature: float, max_weight: float) -> Tensor:
    """How much each action of the batch counts for the policy, (B,). advantages: Q' - V, (B,)"""
    return (temperature * advantages).exp().clamp(max=max_weight)  # [4] w


@torch.no_grad()
def soft_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    for theta_target, theta in zip(target.parameters(), online.parameters(), strict=True):
        theta_target.lerp_(theta, tau)  # [6]: the share tau of the way from theta' to theta


def update(agent: IQL, optimizers: dict, batch: dict[str, Tensor], args: Args) -> dict[str, Tensor]:
    """A gradient step of each network, in the order of the authors' code. Returns metrics to log."""
    obs, actions, next_obs = batch["observations"], batch["actions"], batch["next_observations"]
    with torch.no_grad():
        target_q = agent.q(agent.target_critics, obs, actions).amin(0)  # [1] Q', (2, B) -> (B,)
    value_loss = expectile_loss(target_q - agent.v(obs), args.expectile)  # [1]
    optimizers["value_optimizer"].zero_grad()
    value_loss.backward()
    optimizers["value_optimizer"].step()
    with torch.no_grad():
        values = agent.v(obs)
        weights = policy_weights(target_q - values, args.temperature, args.max_weight)
    actor_loss = -(weights * agent.log_prob(obs, actions)).mean()  # [5]; no action but the data's
    optimizers["actor_optimizer"].zero_grad()
    actor_loss.backward()
    optimizers["actor_optimizer"].step()
    with torch.no_grad():  # truncations are not used: after a time limit, V estimates the rest
        targets = td_target(batch["rewards"], batch["terminations"], agent.v(next_obs), args.gamma)
    q = agent.q(agent.critics, obs, actions)  # (2, B)
    critic_losses = (q - targets).square().mean(-1)  # [3]; (2, B) - (B,) -> (2,)
    optimizers["critic_optimizer"].zero_grad()
    critic_losses.sum().backward()
    optimizers["critic_optimizer"].step()
    soft_update(agent.target_critics, agent.critics, args.tau)
    losses = {"value_loss": value_loss, "actor_loss": actor_loss, "qf1_loss": critic_losses[0], "q_values": q.mean()}
    losses.update(values=values.mean(), weights=weights.mean(), clipfrac=(weights == args.max_weight).float().mean())
    return {f"losses/{name}": value.detach() for name, value in losses.items()}


def make_agent(args: Args, obs_shape: tuple[int, ...], action_space: gym.Space) -> IQL:
    floats = isinstance(action_space, gym.spaces.Box) and np.issubdtype(action_space.dtype, np.floating)
    bounded = floats and np.abs([action_space.low, action_space.high]).max() < 1e6
    if not bounded and not isinstance(action_space, gym.spaces.Discrete):
        raise UsageError(f"--env-id {args.env_id} acts in {action_space}, not Discrete or a Box of floats below 1e6")
    return IQL(obs_shape, action_space)


def train(args: Args) -> dict[str, float]:
    """Trains an agent, returns its last evaluation. run.goes_on evaluates and saves; run.log writes."""
    with contextlib.closing(Run(args)) as run:  # closes the environments, also after an error
        agent = make_agent(args, run.obs_shape, run.action_space).to(run.device)
        data = read_dataset(args, run.envs[0])
        data["rewards"] *= reward_scale(data, args.return_range)
        if args.norm_obs:
            agent.normalize.fit(data["observations"])
        learned = {"actor_optimizer": [*agent.actor.parameters(), agent.log_std]}
        learned |= {"critic_optimizer": agent.critics.parameters(), "value_optimizer": agent.value.parameters()}
        optimizers = {name: torch.optim.Adam(part, args.learning_rate, fused=True) for name, part in learned.items()}
        run.actions = []  # training plays no episodes, so a checkpoint has none to play again
        run.start(model=agent, **optimizers)  # what a checkpoint holds
        while run.goes_on():  # False at the end
            # 1. Draw transitions
            rows = torch.randint(len(data["rewards"]), (args.batch_size,))
            batch = {name: array[rows].to(run.device) for name, array in data.items()}
            # 2. Learn
            progress = run.global_step / args.total_timesteps if args.anneal_lr else 0.0
            rate = args.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
            optimizers["actor_optimizer"].param_groups[0]["lr"] = rate
            metrics = update(agent, optimizers, batch, args)
            run.global_step += 1
            if run.global_step % 100 == 0:  # 3. Log
                run.log(metrics | {"charts/learning_rate": rate})
        return run.result


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


def make_env(args: Args, film: Path | None = None) -> gym.Env:
    """An environment that observes vectors, (D,) float32."""
    env, known = None, Exception if film else (gym.error.Error, ImportError, TypeError, NotImplementedError, UsageError)
    try:
        env = gym.make(args.env_id, **({"render_mode": "rgb_array"} if film else {}))
        if not env.observation_space.is_np_flattenable or gym.spaces.flatdim(env.observation_space) > 3000:
            raise UsageError(f"observations are no vector, but {env.observation_space}: see ppo.py, dqn.py")
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
    if isinstance(env.observation_space, gym.spaces.Box) and env.observation_space.dtype.kind != "f":
        env = gym.wrappers.DtypeObservation(env, np.float32)  # FlattenObservation would cast to integers
    return gym.wrappers.FlattenObservation(env)  # Discrete: one-hot


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
        here, there = (envs[0].observation_space.shape, envs[0].action_space), (agent.obs_shape, agent.action_space)
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
    return {} if playing else result | {"eval/episodic_length": lengths.mean()}


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
        self.obs_shape, self.action_space = self.envs[0].observation_space.shape, self.envs[0].action_space
        small = len(self.obs_shape) == 1  # networks for vectors are too small for a GPU to help
        self.obs = np.zeros((args.num_envs, *self.obs_shape), np.float32 if small else np.uint8)
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
        kind = "vectors" if len(self.obs_shape) == 1 else "images"
        print(f"{args.env_id}: observes {kind} {self.obs_shape}, run folder {self.dir}, from step {self.global_step}")

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

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        """Steps all environments: (N, *action shape) -> next_obs, rewards, terminated, truncated, infos, N of each.

        Where an episode has ended, next_obs is its last observation, and self.obs the first one of the next episode.
        """
        next_obs, rewards, infos = np.empty_like(self.obs), np.zeros(len(self.envs)), []
        terminated, truncated = np.zeros(len(self.envs), bool), np.zeros(len(self.envs), bool)
        for i, (env, action) in enumerate(zip(self.envs, actions.copy(), strict=True)):  # step may change actions
            self.actions[i].append(action)
            next_obs[i], rewards[i : i + 1], terminated[i], truncated[i], info = env.step(actions[i])
            infos.append(info)
        if not math.isfinite(next_obs.sum(dtype=float) + rewards.sum()):
            raise FloatingPointError(f"NaN or infinity from {self.args.env_id}: rewards {rewards}, {next_obs}")
        self.obs = next_obs.copy()
        self.global_step += len(self.envs)
        self.returns += rewards
        for i in np.flatnonzero(terminated | truncated):
            self.log({"charts/episodic_return": self.returns[i], "charts/episodic_length": len(self.actions[i])})
            self.begin_episode(i)
        return next_obs, rewards, terminated, truncated, infos

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
