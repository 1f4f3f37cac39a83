"""Proximal policy optimisation (PPO): learn several times from each batch of experience, in small moves.

The advantage A_t is how much better action a_t was than the policy's average. A policy gradient is unbiased only for
data of the current policy, so a plain method takes one step with each batch. PPO takes many. For each action it
compares the probability that the policy gives it now with the one at collection. Their ratio starts at 1. Once it is
above 1 + epsilon for a good action (A_t > 0), or below 1 - epsilon for a bad one, moving further gains nothing.

    [1] delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                                      PPO, Eq. 12; r_t: the reward
        A_t     = delta_t + gamma lambda A_{t+1}                                       PPO, Eq. 11; delta_t at an end
    [2] ratio_t = pi(a_t|s_t) / pi_old(a_t|s_t)                                        PPO, Sec. 3: its r_t(theta)
        L_clip  = E[min(ratio_t A_t, clip(ratio_t, 1 - epsilon, 1 + epsilon) A_t)]     PPO, Eq. 7
    [3] L_value = E[(V(s_t) - R_t)^2]  with  R_t = A_t + V_old(s_t)                    PPO, Eq. 9; R_t: its V_t^targ
    [4] maximise L_clip - c_1 L_value + c_2 entropy(pi)                                PPO, Eq. 9

Paper: Schulman et al. 2017, arXiv:1707.06347. Advantages [1]: GAE, Schulman et al. 2016, arXiv:1506.02438.

Differs from the paper:
- As in OpenAI Baselines: R_t [3]; advantages normalised in each minibatch, clipped gradient norm, orthogonal weights,
  Adam's epsilon 1e-5, rewards over a running standard deviation (RewardScaler), clipped. But L_value is not clipped.
- Defaults are LunarLander's. The learning rate falls to 0 in all tasks; in the paper it and epsilon do, on Atari only.
- A time limit is not a terminal state: the value of the last observation stands for the rest of the episode.
- Box actions are scaled to [-1, 1] and clipped. Evaluation takes the most likely action; the paper scores training.
- Atari (ALE/...): rewards are signs; the larger Nature CNN; sticky actions; a lost life does not end the episode.

    python algorithms/ppo.py --env-id LunarLander-v3
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[atari,box2d,classic-control,mujoco,toy-text]>=1.4,<2", "moviepy>=2.2", "mujoco>=3.11,<3.12",
#     "numpy>=2", "opencv-python-headless>=4.10", "torch>=2.13", "tqdm>=4.66", "tyro>=1", "wandb>=0.31",
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
from torch.distributions import Normal
from tqdm import tqdm


@dataclass
class Args:
    # Run
    env_id: str = "LunarLander-v3"  # a Gymnasium environment, or module:id if a module registers it
    seed: int = 1  # seed of environments, networks and sampling
    total_timesteps: int = 500_000  # environment steps, summed over all environments
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
    learning_rate: float = 5e-4  # of Adam or RMSprop; paper: 3e-4 (MuJoCo), 2.5e-4 (Atari)
    anneal_lr: bool = True  # let the learning rate fall linearly to 0; paper: only on Atari, and clip_coef too
    num_steps: int = 512  # T, the horizon: steps of each environment in a batch; paper: 2048 (MuJoCo), 128 (Atari)
    num_minibatches: int = 64  # in a batch, here of 8 x 512 / 64 = 64 steps; paper: 32 of 64 (MuJoCo), 4 of 256 (Atari)
    update_epochs: int = 12  # passes over the batch; paper: 10 (MuJoCo), 3 (Atari)
    gamma: float = 0.999  # discount; paper: 0.99
    gae_lambda: float = 0.96  # [1] lambda; paper: 0.95
    clip_coef: float = 0.2  # [2] epsilon; paper: 0.2 (MuJoCo), 0.1 (Atari)
    vf_coef: float = 0.5  # [4] c_1; paper: 1 (Atari). CleanRL halves the loss, so its 0.5 is 0.25 here
    ent_coef: float = 0.0  # [4] c_2; paper: 0 (MuJoCo), 0.01 (Atari)
    max_grad_norm: float = 0.5  # clip the gradient's norm to this; losses/grad_norm is before that; paper: no clipping
    target_kl: float | None = None  # stop after an epoch whose last minibatch has a larger approx_kl; None: never
    norm_adv: bool = True  # normalise the advantages of each minibatch
    norm_obs: bool = False  # normalise vector observations by their running mean and standard deviation; images: no
    norm_reward: bool = True  # divide rewards by a running standard deviation (RewardScaler); Atari: they become signs
    log_std_init: float = 0.0  # log of the first standard deviation of Box actions, which are scaled to [-1, 1]
    optimizer: Literal["adam", "rmsprop"] = "adam"  # rmsprop: for A2C, with Baselines' values
    compile: bool = False  # torch.compile the loss, which takes some 20 s once

    def __post_init__(self) -> None:
        check_ranges(self, gae_lambda=(0, 1), log_std_init=(-20, 2))
        if self.num_envs * self.num_steps % self.num_minibatches:
            raise UsageError(f"--num-minibatches {self.num_minibatches} must divide --num-envs times --num-steps")


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


class RewardScaler(nn.Module):
    """Divides rewards by the running standard deviation of S_t = r_t + gamma S_(t-1), so that V has similar sizes."""

    def __init__(self, num_envs: int, gamma: float):
        super().__init__()
        self.gamma, self.stats = gamma, RunningMeanStd(1)
        self.register_buffer("current", torch.zeros(num_envs))  # S_t of each environment

    def forward(self, rewards: np.ndarray, ended: np.ndarray) -> np.ndarray:  # (T, N), (T, N) -> (T, N)
        sums, current = np.empty_like(rewards), self.current.numpy()  # numpy() shares the buffer's memory
        for t in range(len(rewards)):
            current[:] = self.gamma * current + rewards[t]
            sums[t] = current
            current[ended[t]] = 0
        self.stats.update(torch.from_numpy(sums).float().view(-1, 1))
        # Clipped as in Baselines: the first reward after a long time without any would be huge
        return np.clip(rewards / math.sqrt(self.stats.var.item() + 1e-8), -10, 10)


def orthogonal(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(obs_dim: int, num_outputs: int, gain: float) -> nn.Sequential:
    return nn.Sequential(
        orthogonal(nn.Linear(obs_dim, 64)), nn.Tanh(),
        orthogonal(nn.Linear(64, 64)), nn.Tanh(),
        orthogonal(nn.Linear(64, num_outputs), gain),
    )  # fmt: skip


def nature_cnn() -> nn.Sequential:
    """The network of Mnih et al. 2015 up to its last hidden layer: (B, 4, 84, 84) -> (B, 512)"""
    return nn.Sequential(
        orthogonal(nn.Conv2d(4, 32, 8, stride=4)), nn.ReLU(),
        orthogonal(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU(),
        orthogonal(nn.Conv2d(64, 64, 3, stride=1)), nn.ReLU(),
        nn.Flatten(), orthogonal(nn.Linear(64 * 7 * 7, 512)), nn.ReLU(),
    )  # fmt: skip


class ActorCritic(nn.Module):
    """The policy and V: two networks for vectors, two heads on one CNN for images. space: the action space."""

    def __init__(self, args: Args, obs_shape: tuple[int, ...], space: gym.Space):
        super().__init__()
        self.obs_shape, self.action_space, self.discrete = obs_shape, space, not isinstance(space, gym.spaces.Box)
        if self.discrete:  # an action is K choices, of sizes[k] options each; Discrete: K = 1
            self.sizes = [int(space.n)] if isinstance(space, gym.spaces.Discrete) else space.nvec.flatten().tolist()
            num_outputs = sum(self.sizes)
        else:  # D independent normals, with standard deviations that do not depend on the observation
            num_outputs = space.low.size
            self.log_std = nn.Parameter(torch.full((num_outputs,), args.log_std_init))
            bounded = (abs(space.low) < 1e6) & (abs(space.high) < 1e6)  # without real bounds: scale 1
            middle = np.clip(0, space.low, space.high)
            low, high = np.where(bounded, space.low, middle - 1), np.where(bounded, space.high, middle + 1)
            self.center, self.scale = (high + low) / 2, (high - low) / 2
        self.obs_stats = RunningMeanStd(*obs_shape) if args.norm_obs and len(obs_shape) == 1 else nn.Identity()
        # Gain 0.01: at first the policy is nearly the same in every state
        if len(obs_shape) == 3:
            self.cnn = nature_cnn()
            self.actor = orthogonal(nn.Linear(512, num_outputs), 0.01)
            self.critic = orthogonal(nn.Linear(512, 1), 1.0)
        else:
            self.actor = mlp(*obs_shape, num_outputs, gain=0.01)
            self.critic = mlp(*obs_shape, 1, gain=1.0)

    def features(self, obs: Tensor) -> Tensor:  # (B, *obs_shape) -> (B, obs_dim or 512)
        return self.cnn(obs / 255) if len(self.obs_shape) == 3 else self.obs_stats(obs)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:  # -> logits or means (B, num_outputs); V (B,)
        features = self.features(obs)
        return self.actor(features), self.critic(features).squeeze(-1)

    def log_prob_and_entropy(self, outputs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """(B, num_outputs), (B, K or D) -> (B,), (B,): sums over independent choices or normals."""
        if not self.discrete:
            normal = Normal(outputs, self.log_std.exp(), validate_args=False)  # unchecked: faster
            return normal.log_prob(actions).sum(-1), normal.entropy().sum(-1)
        log_prob, entropy = 0.0, 0.0
        for logits, action in zip(outputs.split(self.sizes, -1), actions.split(1, -1), strict=True):
            log_probs = logits.log_softmax(-1)  # faster than Categorical
            log_prob = log_prob + log_probs.gather(-1, action).squeeze(-1)
            entropy = entropy - (log_probs.exp() * log_probs).sum(-1)
        return log_prob, entropy

    @torch.no_grad()
    def sample(self, obs: Tensor, mode: bool = False) -> Tensor:  # (B, *obs_shape) -> (B, K or D); mode: most likely
        outputs = self.actor(self.features(obs))
        if not self.discrete:
            return outputs if mode else outputs + self.log_std.exp() * torch.randn_like(outputs)
        if not mode:  # argmax(logits + Gumbel noise) is a sample; -log of an Exp(1) sample is Gumbel noise
            outputs = outputs - torch.empty_like(outputs).exponential_().log()
        return torch.stack([logits.argmax(-1) for logits in outputs.split(self.sizes, -1)], -1)

    def to_env(self, actions: Tensor) -> np.ndarray:  # (B, K or D) -> (B, *action shape)
        space, actions = self.action_space, actions.cpu().numpy().reshape(-1, *self.action_space.shape)
        if self.discrete:
            return (actions + space.start).astype(space.dtype)  # the network counts from 0
        # From [-1, 1] to the box. A sample outside of it is clipped for the environment; the loss sees it unclipped
        return np.clip(self.center + self.scale * actions, space.low, space.high).astype(space.dtype)

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The most likely action for an observation, (*obs_shape,), or for each of a batch, (B, *obs_shape)."""
        obs = torch.as_tensor(np.asarray(obs), dtype=torch.float32, device=next(self.parameters()).device)
        single = obs.ndim == len(self.obs_shape)
        actions = self.to_env(self.sample(obs[None] if single else obs, mode=True))
        return actions[0] if single else actions


def gae(rewards, values, next_values, terminated, truncated, gamma: float, gae_lambda: float) -> np.ndarray:
    """Generalised advantage estimation. Arrays are (T, N); next_values: V(s_{t+1}), at an end V(last observation)."""
    deltas = rewards + gamma * next_values * ~terminated - values  # [1]; a terminal state is worth nothing
    decay = gamma * gae_lambda * ~(terminated | truncated)  # 0 where step t + 1 belongs to the next episode
    advantages, advantage = np.empty_like(deltas), 0.0  # 0: the deltas after the batch are not known
    for t in reversed(range(len(deltas))):
        advantages[t] = advantage = deltas[t] + decay[t] * advantage  # [1]
    return advantages


def ppo_loss(log_prob, entropy, values, old_log_prob, advantages, returns, args: Args) -> tuple[Tensor, dict]:
    """The loss and its metrics. All (B,): log_prob, entropy and values are of the networks now, the rest is fixed."""
    assert log_prob.shape == entropy.shape == values.shape == old_log_prob.shape == advantages.shape == returns.shape
    if args.norm_adv:  # correction=0: a single row must not become NaN
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()  # of [2]
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).mean()  # [2]; minus: it is minimised
    value_loss = (values - returns).square().mean()  # [3]
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy.mean()  # [4]
    metrics = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy.mean()}
    metrics["approx_kl"] = (ratio - 1 - log_ratio).mean()  # KL(pi_old || pi), by k3 of joschu.net/blog/kl-approx.html
    metrics["clipfrac"] = (ratio != clipped_ratio).float().mean()  # share of ratios outside of 1 +- epsilon
    return loss, {f"losses/{name}": value.detach() for name, value in metrics.items()}


def update(agent: ActorCritic, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, ...], args: Args) -> dict:
    """Several epochs of gradient steps with a batch. Returns the means of all minibatches' metrics."""

    def loss_of(obs, actions, old_log_prob, advantages, returns) -> tuple[Tensor, dict]:
        outputs, values = agent(obs)
        log_prob, entropy = agent.log_prob_and_entropy(outputs, actions)
        return ppo_loss(log_prob, entropy, values, old_log_prob, advantages, returns, args)

    minibatch_size, history = args.num_envs * args.num_steps // args.num_minibatches, []
    compiled_loss = torch.compile(loss_of) if args.compile else loss_of  # PyTorch keeps the code between calls
    for _ in range(args.update_epochs):
        for rows in torch.randperm(len(batch[0]), device=batch[0].device).split(minibatch_size):
            # The run's last batch may be short: its last minibatch is not worth another compilation
            loss_function = compiled_loss if len(rows) == minibatch_size else loss_of
            loss, metrics = loss_function(*(part[rows] for part in batch))
            optimizer.zero_grad()
            loss.backward()
            metrics["losses/grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            history.append(metrics)
        if args.target_kl is not None and metrics["losses/approx_kl"] > args.target_kl:
            break
    return {name: torch.stack([step[name] for step in history]).mean().item() for name in history[0]}


def make_agent(args: Args, obs_shape: tuple[int, ...], action_space: gym.Space) -> ActorCritic:
    floats = isinstance(action_space, gym.spaces.Box) and np.issubdtype(action_space.dtype, np.floating)
    if not floats and not isinstance(action_space, gym.spaces.Discrete | gym.spaces.MultiDiscrete):
        raise UsageError(f"--env-id {args.env_id} acts in {action_space}: not Discrete, MultiDiscrete or Box of floats")
    return ActorCritic(args, obs_shape, action_space)


def train(args: Args) -> dict[str, float]:
    """Trains an agent, returns its last evaluation. run.step acts; run.goes_on evaluates and saves; run.log writes."""
    with contextlib.closing(Run(args)) as run:  # closes the environments, also after an error
        agent = make_agent(args, run.obs_shape, run.action_space).to(run.device)
        scaler = RewardScaler(args.num_envs, args.gamma)
        if args.optimizer == "adam":
            optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)
        else:
            optimizer = torch.optim.RMSprop(agent.parameters(), args.learning_rate, alpha=0.99, eps=1e-5)
        run.start(model=agent, optimizer=optimizer, scaler=scaler)  # what a checkpoint holds
        while run.goes_on():  # False at the end
            # 1. Act: T steps in each of N environments, fewer at the end of the run
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - run.global_step / args.total_timesteps)
            observations, next_observations, actions = [], [], []
            num_steps = min(args.num_steps, (args.total_timesteps - run.global_step) // args.num_envs)
            rewards = np.zeros((num_steps, args.num_envs))
            terminated, truncated = np.zeros_like(rewards, bool), np.zeros_like(rewards, bool)
            for t in range(num_steps):
                observations.append(torch.from_numpy(run.obs).to(run.device))
                actions.append(agent.sample(observations[t]))
                next_obs, rewards[t], terminated[t], truncated[t], _ = run.step(agent.to_env(actions[t]))
                next_observations.append(torch.from_numpy(next_obs).to(run.device))  # run.obs, except at an end

            # 2. Advantages and returns. The networks are still those that acted: one pass gives pi_old and V_old
            observations, actions = torch.cat(observations), torch.cat(actions)  # (T * N, *obs_shape), (T * N, K or D)
            with torch.no_grad():
                outputs, values = agent(observations)
                old_log_prob, _ = agent.log_prob_and_entropy(outputs, actions)
                _, next_values = agent(torch.cat(next_observations))
            values, next_values = (v.view(num_steps, args.num_envs).cpu().numpy() for v in (values, next_values))
            if args.env_id.startswith("ALE/"):
                rewards = np.sign(rewards)  # as in the DQN paper; the logged returns are not clipped
            elif args.norm_reward:
                rewards = scaler(rewards, terminated | truncated)
            advantages = gae(rewards, values, next_values, terminated, truncated, args.gamma, args.gae_lambda)
            returns = advantages + values  # [3]

            # 3. Learn
            flat = [torch.from_numpy(x).float().flatten().to(run.device) for x in (advantages, returns)]  # (T * N,)
            metrics = update(agent, optimizer, (observations, actions, old_log_prob, *flat), args)
            if args.norm_obs and len(run.obs_shape) == 1:
                agent.obs_stats.update(observations)  # only now: in [2] pi and pi_old need the same input

            # 4. Log; explained_variance: 1 if V predicted the returns, 0 if a constant would do as well
            metrics["losses/explained_variance"] = 1 - np.var(returns - values) / (np.var(returns) + 1e-8)
            metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            run.log(metrics)
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
