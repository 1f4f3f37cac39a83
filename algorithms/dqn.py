"""Deep Q-network (DQN): learn how good each action is, and take the best one.

Q(s, a) is the return to expect, the discounted sum of rewards, when a is taken in state s and the best actions after.
A network is fitted to a target y for it: the reward plus the discounted best Q of the next state s' (bootstrapping).
Two things keep this stable. Batches are drawn at random from a replay buffer, so that transitions are not correlated.
And y is from a target network Q', whose weights theta' slowly follow Q's weights theta. In [3] y has no gradient.

    [1] y = r + gamma Q'(s', a*)  with  a* = argmax_a Q'(s', a), or y = r where s' is terminal     DQN, Algorithm 1
    [2] a* = argmax_a Q(s', a) instead: Q selects and Q' evaluates, against overestimation         Double DQN
    [3] L = E[(y - Q(s, a))^2]                                                                     DQN, Algorithm 1
    [4] Q(s, a) = V(s) + A(s, a) - mean_a' A(s, a')                                                Dueling, Eq. 9
    [5] explore: with probability epsilon any action, else argmax_a Q(s, a)                        DQN, Algorithm 1
        or Boltzmann: the action a with a probability proportional to exp(Q(s, a) / temperature)       not in the papers
    [6] hold the random action of [5] for n steps, with P(n) proportional to 1 / n^2               ez-greedy
    [7] theta' <- tau theta + (1 - tau) theta'  every C gradient steps; tau 1: DQN's copy         DDPG, Algorithm 1

Paper: Mnih et al. 2015, doi:10.1038/nature14236. Double DQN: van Hasselt et al. 2016, arXiv:1509.06461. Dueling: Wang
et al. 2016, arXiv:1511.06581. ez-greedy: Dabney et al. 2021, arXiv:2006.01782.

Differs from the papers:
- Defaults are CartPole's, with 8 environments. Double DQN and the soft update of DDPG (arXiv:1509.02971) are default.
- Squared error, no Huber loss. Adam, not RMSprop; its learning rate falls to 0. Epsilon falls from the first step on.
- Vectors are normalised, the CNN starts orthogonal. [4]: no hidden layer in the two streams, no scaled gradient.
- ez-greedy holds [6]'s action for n steps in all, 10,000 at most and within the episode; the paper for n + 1 steps.
- A time limit is not terminal, nor a lost life (unlike DQN). Evaluation: epsilon 0, not 0.05. Atari: sticky actions.

    python algorithms/dqn.py --env-id CartPole-v1
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
from typing import Literal

import cv2
import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm


@dataclass
class Args:
    # Run
    env_id: str = "CartPole-v1"  # a Gymnasium environment, or module:id if a module registers it
    seed: int = 1  # seed of environments, networks and sampling
    total_timesteps: int = 50_000  # environment steps, summed over all environments
    num_envs: int = 8  # environments stepped together
    device: str = "auto"  # cpu, cuda, cuda:N or mps; auto: for images a GPU if there is one, else cpu
    threads: int | None = None  # CPU threads of PyTorch; None: 1 for vectors, else all; for layers of 256 try 2
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
    learning_rate: float = 5e-4  # of Adam; paper: 2.5e-4, of RMSprop
    anneal_lr: bool = True  # let the learning rate fall linearly to 0
    gamma: float = 0.99  # discount
    buffer_size: int = 100_000  # transitions in the replay buffer; paper: 1,000,000
    batch_size: int = 128  # transitions in a gradient step; paper: 32
    learning_starts: int = 1_000  # environment steps, by [5], before the first gradient step; paper: 50,000, random
    train_frequency: int = 1  # environment steps, summed over all environments, per gradient step; paper: 4
    target_network_frequency: int = 1  # [7] C, gradient steps between updates of the target network; paper: 10,000
    tau: float = 0.01  # [7] share of the new weights in such an update; paper: 1, a copy
    exploration: Literal["epsilon-greedy", "ez-greedy", "boltzmann"] = "epsilon-greedy"  # [5], [6]
    start_e: float = 1.0  # [5] epsilon at the start; with boltzmann it is the temperature, in units of Q
    end_e: float = 0.05  # [5] epsilon, or the temperature, after exploration_fraction of the run; paper: 0.1
    exploration_fraction: float = 0.2  # share of the run in which epsilon falls to end_e; paper: 1M of 50M steps, 0.02
    max_grad_norm: float | None = None  # clip the gradient's norm to this; None, as in DQN: no clipping; Dueling: 10
    norm_obs: bool = True  # normalise vector observations by their running mean and standard deviation; images: no
    huber: bool = False  # [3] as Huber loss of e = y - Q: e^2 / 2, and |e| - 1/2 where |e| > 1; paper: yes
    double_q: bool = True  # [2] Double DQN; paper: no
    dueling: bool = False  # [4] dueling network
    compile: bool = False  # torch.compile the gradient step, which takes some 10 s once

    def __post_init__(self) -> None:
        bounds = (0, math.inf if self.exploration == "boltzmann" else 1)
        ranges = {"start_e": bounds, "end_e": bounds, "exploration_fraction": (0, 1), "tau": (0, 1)}
        check_ranges(self, learning_starts=(0, math.inf), buffer_size=(self.num_envs, math.inf), **ranges)


class RunningMeanStd(nn.Module):
    """Mean and variance of all rows given to update. They are buffers: saved with the model, frozen in evaluation."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def update(self, rows: Tensor) -> None:  # (B, dim)
        var, mean = torch.var_mean(rows, dim=0, correction=0)
        self.count += len(rows)
        share = len(rows) / self.count  # these rows / all rows so far
        delta = mean - self.mean
        self.mean += share * delta
        self.var += share * (var - self.var) + share * (1 - share) * delta**2  # Chan, Golub & LeVeque 1979

    def forward(self, x: Tensor) -> Tensor:  # (..., dim) -> (..., dim)
        assert x.shape[-1:] == self.mean.shape  # else a last dimension of 1 would be broadcast
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10)  # clamped as in Baselines


def orthogonal(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def nature_cnn() -> nn.Sequential:
    """The network of Mnih et al. 2015 up to its last hidden layer: (B, 4, 84, 84) -> (B, 512)"""
    return nn.Sequential(
        orthogonal(nn.Conv2d(4, 32, 8, stride=4)), nn.ReLU(),
        orthogonal(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU(),
        orthogonal(nn.Conv2d(64, 64, 3, stride=1)), nn.ReLU(),
        nn.Flatten(), orthogonal(nn.Linear(64 * 7 * 7, 512)), nn.ReLU(),
    )  # fmt: skip


class QNetwork(nn.Module):
    """The values of all actions in a state: two hidden layers for vectors, the Nature CNN for images."""

    def __init__(self, args: Args, obs_shape: tuple[int, ...], space: gym.spaces.Discrete):  # space: of the actions
        super().__init__()
        self.obs_shape, self.action_space = obs_shape, space
        if len(obs_shape) == 3:
            self.hidden, hidden_dim = nature_cnn(), 512
        else:  # PyTorch's own start: with the zero biases of orthogonal(), Q would at first grow in proportion to |s|
            self.hidden = nn.Sequential(nn.Linear(*obs_shape, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
            hidden_dim = 128
        self.head = nn.Linear(hidden_dim, int(space.n))  # Q, or the advantages of [4]
        self.value = nn.Linear(hidden_dim, 1) if args.dueling else None
        self.obs_stats = RunningMeanStd(*obs_shape) if args.norm_obs and len(obs_shape) == 1 else nn.Identity()

    def forward(self, obs: Tensor) -> Tensor:  # (B, *obs_shape) -> (B, A), A: number of actions
        hidden = self.hidden(obs / 255 if len(self.obs_shape) == 3 else self.obs_stats(obs))
        if self.value is None:
            return self.head(hidden)
        advantages = self.head(hidden)
        return self.value(hidden) + advantages - advantages.mean(-1, keepdim=True)  # [4]; (B, 1) + (B, A) - (B, 1)

    @torch.inference_mode()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The best action, counted from start, of an observation, (*obs_shape,), or of several, (B, *obs_shape)."""
        obs = torch.as_tensor(np.asarray(obs), dtype=torch.float32, device=next(self.parameters()).device)
        batch = obs if obs.ndim > len(self.obs_shape) else obs[None]
        actions = self(batch).argmax(-1).cpu().numpy().astype(self.action_space.dtype) + self.action_space.start
        return actions if batch is obs else actions[0]


class ReplayBuffer(nn.Module):
    """A ring: transition n is in row n % size of each tensor. An nn.Module, so that a checkpoint saves its tensors."""

    def __init__(self, args: Args, obs_shape: tuple[int, ...], dtype: torch.dtype = torch.float32, more_bytes: int = 0):
        super().__init__()
        self.size = size = args.buffer_size
        needed = 1e-9 * size * (2 * math.prod(obs_shape) * dtype.itemsize + 8 + 4 + 1 + more_bytes)
        memory = 1e-9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
        if needed > 0.9 * memory:
            raise UsageError(f"--buffer-size {size} needs {needed:.1f} GB; this machine has {memory:.1f} GB")
        self.register_buffer("obs", torch.zeros(size, *obs_shape, dtype=dtype))
        self.register_buffer("actions", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("rewards", torch.zeros(size))
        self.register_buffer("terminated", torch.zeros(size, dtype=torch.bool))
        self.register_buffer("next_obs", torch.zeros(size, *obs_shape, dtype=dtype))
        self.register_buffer("added", torch.tensor(0))  # transitions so far
        self.register_buffer("oldest", torch.tensor(0))  # number of the oldest that sample may draw

    def add(self, **transitions: np.ndarray) -> None:
        """Adds a transition of each of N environments: n + N comes after n. A keyword for each tensor, with N rows."""
        rows = (self.added.item() + np.arange(len(transitions["obs"]))) % self.size
        for name, values in transitions.items():
            getattr(self, name).numpy()[rows] = values  # by NumPy, which converts types
        self.added += len(rows)
        self.oldest.clamp_(min=self.added - self.size)

    def sample(self, batch_size: int) -> list[Tensor]:
        """obs (B, *obs_shape), actions (B,), rewards (B,), terminated (B,), next_obs (B, *obs_shape)"""
        rows = torch.randint(self.oldest.item(), self.added.item(), (batch_size,)) % self.size
        return [self.obs[rows], self.actions[rows], self.rewards[rows], self.terminated[rows], self.next_obs[rows]]


class ImageReplayBuffer(ReplayBuffer):
    """The same for stacks of K images. Each image is stored once: a million transitions take 7.1 GB, not 56 GB.

    obs and next_obs hold the indices of K images. The image of index n is images[n % len(images)].
    """

    def __init__(self, args: Args, obs_shape: tuple[int, ...]):
        super().__init__(args, obs_shape[:1], torch.int64, more_bytes=math.prod(obs_shape[1:]))
        # Room for self.size images, and for older ones in their stacks: of K steps, which add up to 2 num_envs each
        num_images = self.size + 2 * args.num_envs * obs_shape[0]
        self.register_buffer("images", torch.zeros(num_images, *obs_shape[1:], dtype=torch.uint8))

    def add(self, obs: np.ndarray, next_obs: np.ndarray, **others: np.ndarray) -> None:
        obs, next_obs = torch.from_numpy(obs), torch.from_numpy(next_obs)  # (N, K, 84, 84)
        indices = self.next_obs[torch.arange(self.added - len(obs), self.added) % self.size]  # (N, K)
        begun = (self.images[indices % len(self.images)] != obs).flatten(1).any(1)  # (N,): obs is not the last next_obs
        new_images = torch.cat([obs[begun, -1], next_obs[:, -1]])  # the first of new episodes, then N next ones
        new_indices = indices[-1, -1] + 1 + torch.arange(len(new_images))  # indices[-1, -1]: the newest image so far
        self.images[new_indices % len(self.images)] = new_images
        indices[begun] = new_indices[: -len(obs), None]  # an episode's first stack is one image K times
        super().add(obs=indices, next_obs=torch.cat([indices[:, 1:], new_indices[-len(obs) :, None]], 1), **others)
        # Forget transitions whose newest image is not among the newest self.size: their oldest may be overwritten soon
        while self.next_obs[self.oldest % self.size, -1] <= new_indices[-1] - self.size:
            self.oldest += 1

    def sample(self, batch_size: int) -> list[Tensor]:
        obs, *others, next_obs = super().sample(batch_size)
        return [self.images[obs % len(self.images)], *others, self.images[next_obs % len(self.images)]]


def td_target(rewards: Tensor, terminated: Tensor, target_q: Tensor, choosing_q: Tensor, gamma: float) -> Tensor:
    """y, (B,). target_q: Q'(s', .), (B, A), gives the value. choosing_q: Q' in [1], Q in [2], (B, A), selects a*."""
    next_actions = choosing_q.argmax(-1, keepdim=True)  # (B, 1)
    next_values = target_q.gather(-1, next_actions).squeeze(-1)  # (B,)
    assert rewards.shape == terminated.shape == next_values.shape
    return rewards + gamma * next_values * ~terminated  # [1]; a terminal state is worth nothing


def q_loss(q_values: Tensor, actions: Tensor, targets: Tensor, huber: bool) -> tuple[Tensor, Tensor]:
    """The loss, and the values Q(s, a) (B,). q_values: (B, A); actions, targets: (B,)"""
    values = q_values.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    assert values.shape == targets.shape
    loss = nn.functional.smooth_l1_loss if huber else nn.functional.mse_loss  # [3]
    return loss(values, targets), values


def linear_schedule(start: float, end: float, duration: float, step: int) -> float:
    return start + (end - start) * min(1, step / max(1, duration))


def explore(q_values: Tensor, epsilon: float, held: nn.Module, args: Args) -> Tensor:
    """[5] Actions (N,), counted from 0, for Q values (N, A). For boltzmann, epsilon is the temperature. held: [6]."""
    if args.exploration == "boltzmann":  # Gumbel-max trick; -log of an Exp(1) sample is Gumbel noise
        return (q_values - epsilon * torch.empty_like(q_values).exponential_().log()).argmax(-1)
    num_envs, num_actions = q_values.shape
    at_random, actions = torch.rand(num_envs) < epsilon, torch.randint(num_actions, (num_envs,))
    if args.exploration == "ez-greedy":
        begins = at_random & (held.steps_left == 0)
        held.actions[begins] = actions[begins]
        weights = 1 / torch.arange(1.0, 10_001) ** 2  # [6] n up to 10,000
        held.steps_left[begins] = 1 + torch.multinomial(weights, num_envs, replacement=True)[begins]  # index 0: n = 1
        at_random, actions = held.steps_left > 0, held.actions.clone()  # now: who holds an action
        held.steps_left -= at_random.long()
    return torch.where(at_random, actions, q_values.argmax(-1))


def update(
    q_network: QNetwork, target_network: QNetwork, optimizer: torch.optim.Optimizer, batch: list[Tensor], args: Args
) -> dict[str, Tensor]:
    """A gradient step with a batch of the buffer. Returns what to log."""
    obs, actions, rewards, terminated, next_obs = batch
    optimizer.zero_grad()
    with torch.no_grad():
        target_q = target_network(next_obs)
        choosing_q = q_network(next_obs) if args.double_q else target_q  # [2] or [1]
        targets = td_target(rewards, terminated, target_q, choosing_q, args.gamma)
    loss, values = q_loss(q_network(obs), actions, targets, args.huber)
    metrics = {"losses/td_loss": loss.detach(), "losses/q_values": values.detach().mean()}
    loss.backward()
    if args.max_grad_norm is not None:
        metrics["losses/grad_norm"] = nn.utils.clip_grad_norm_(q_network.parameters(), args.max_grad_norm)
    optimizer.step()
    return metrics


def make_agent(args: Args, obs_shape: tuple[int, ...], action_space: gym.Space) -> QNetwork:
    if not isinstance(action_space, gym.spaces.Discrete):
        raise UsageError(f"--env-id {args.env_id} acts in {action_space}, not Discrete: see ppo.py, sac.py and td3.py")
    return QNetwork(args, obs_shape, action_space)


def train(args: Args) -> dict[str, float]:
    """Trains an agent, returns its last evaluation. run.step acts; run.goes_on evaluates and saves; run.log writes."""
    with contextlib.closing(Run(args)) as run:  # closes the environments, also after an error
        q_network = make_agent(args, run.obs_shape, run.action_space).to(run.device)
        target_network = copy.deepcopy(q_network)
        target_network.obs_stats = q_network.obs_stats  # both see the same input; [7] moves parameters only
        optimizer = torch.optim.Adam(q_network.parameters(), args.learning_rate, fused=True)
        kind_of_buffer = ImageReplayBuffer if len(run.obs_shape) == 3 else ReplayBuffer
        buffer = kind_of_buffer(args, run.obs_shape)
        held = nn.Module()  # [6] each environment's held action and steps left; a Module, so that checkpoints save it
        held.register_buffer("actions", torch.zeros(args.num_envs, dtype=torch.int64))
        held.register_buffer("steps_left", torch.zeros(args.num_envs, dtype=torch.int64))
        run.start(model=q_network, target=target_network, optimizer=optimizer, buffer=buffer, held=held)
        gradient_step = torch.compile(update) if args.compile else update
        if args.compile:  # forward and backward become one program; the optimizer's fused step is one already
            torch._dynamo.config.trace_autograd_ops = True
            optimizer.step = torch.compiler.disable(optimizer.step)
        while run.goes_on():  # False at the end
            # 1. Act: one step in each of N environments
            obs, step = run.obs, run.global_step  # where an episode has ended, run.obs is the first of the next
            epsilon = linear_schedule(args.start_e, args.end_e, args.exploration_fraction * args.total_timesteps, step)
            with torch.inference_mode():
                q_values = q_network(torch.from_numpy(obs).to(run.device)).cpu()  # (N, A)
            actions = explore(q_values, epsilon, held, args).numpy().astype(run.action_space.dtype)
            next_obs, rewards, terminated, truncated, _ = run.step(actions + run.action_space.start)
            held.steps_left[torch.from_numpy(terminated | truncated)] = 0
            if args.norm_obs and len(run.obs_shape) == 1:
                q_network.obs_stats.update(torch.from_numpy(run.obs).to(run.device))
            if args.env_id.startswith("ALE/"):
                rewards = np.sign(rewards)  # as in the paper: -1, 0 or 1; the logged returns are not clipped
            buffer.add(obs=obs, actions=actions, rewards=rewards, terminated=terminated, next_obs=next_obs)

            # 2. Learn: a gradient step per train_frequency environment steps; this pass made N environment steps
            rate = args.learning_rate * (1 - step / args.total_timesteps if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = rate
            made = max(0, step - args.learning_starts) // args.train_frequency  # gradient steps before
            due = max(0, run.global_step - args.learning_starts) // args.train_frequency  # and after this pass
            for number in range(made + 1, due + 1):
                batch = [part.to(run.device) for part in buffer.sample(args.batch_size)]
                metrics = gradient_step(q_network, target_network, optimizer, batch, args)
                if number % args.target_network_frequency == 0:
                    with torch.no_grad():
                        for target, online in zip(target_network.parameters(), q_network.parameters(), strict=True):
                            target.lerp_(online, args.tau)  # [7]
                if number % 200 == 0:  # 3. Log
                    run.log(metrics | {"charts/epsilon": epsilon, "charts/learning_rate": rate})
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


def is_image(space: gym.Space) -> bool:
    """True for bytes to 255, 32 x 32 or more, with 1, 3 or 4 channels, first or last, or none. All else are vectors."""
    sizes = sorted(space.shape or ())
    bytes_up_to_255 = space.dtype == np.uint8 and space.high.max() == 255
    return bytes_up_to_255 and len(sizes) > 1 and sizes[-2] >= 32 and sizes[:-2] in ([], [1], [3], [4])


def to_grey(picture: np.ndarray) -> np.ndarray:  # -> (84, 84)
    if picture.ndim == 3:  # the channels go last, without transparency; then their mean
        picture = np.moveaxis(picture, np.argmin(picture.shape), -1)[..., :3].mean(-1).astype(np.uint8)
    return cv2.resize(picture, (84, 84), interpolation=cv2.INTER_AREA)


def make_env(args: Args, film: Path | None = None) -> gym.Env:
    """An environment that observes images, (4, 84, 84) uint8, or vectors, (D,) float32."""
    atari = args.env_id.startswith("ALE/")
    options = ({"frameskip": 1} if atari else {}) | ({"render_mode": "rgb_array"} if film else {})  # Atari: below
    env, known = None, Exception if film else (gym.error.Error, ImportError, TypeError, NotImplementedError, UsageError)
    try:
        if re.search("NoFrameskip|:ALE/", args.env_id):
            raise UsageError("Atari games are named ALE/Pong-v5")
        env = gym.make(f"ale_py:{args.env_id}" if atari else args.env_id, **options)
        space = env.observation_space
        if not (atari or is_image(space)) and (not space.is_np_flattenable or gym.spaces.flatdim(space) > 3000):
            raise UsageError(f"observations are neither a picture nor a vector of up to 3000 numbers, but {space}")
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
    if atari:
        return gym.wrappers.FrameStackObservation(gym.wrappers.AtariPreprocessing(env), 4)
    if is_image(space):
        env = gym.wrappers.TransformObservation(env, to_grey, gym.spaces.Box(0, 255, (84, 84), np.uint8))
        return gym.wrappers.FrameStackObservation(env, 4)
    if isinstance(space, gym.spaces.Box) and space.dtype.kind != "f":
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
