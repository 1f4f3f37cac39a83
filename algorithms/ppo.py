"""Proximal policy optimisation (PPO): collect a batch with the current policy, then learn from it for several epochs.

A policy gradient is valid only for the policy that collected the data, so it allows one step per batch. PPO takes many:
it multiplies each advantage by the ratio of the action's new to its old probability, and clips this ratio, so that the
objective gains nothing from moving the policy far from the one that collected the batch.

    [1] delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                                      PPO, Eq. 12
        A_t     = delta_t + gamma lambda A_{t+1}                                       PPO, Eq. 11, as a recursion
        with V(s_{t+1}) = 0 if s_{t+1} is terminal, and A_{t+1} = 0 if step t ends an episode or the batch
    [2] ratio_t = pi(a_t|s_t) / pi_old(a_t|s_t)                                        PPO, Section 3
        L_clip  = E[min(ratio_t A_t, clip(ratio_t, 1 - epsilon, 1 + epsilon) A_t)]     PPO, Eq. 7
    [3] L_value = E[(V(s_t) - R_t)^2]  with  R_t = A_t + V_old(s_t)                    PPO, Eq. 9; R_t: as in Baselines
    [4] maximise L_clip - c_1 L_value + c_2 entropy(pi)                                PPO, Eq. 9

Here gamma is the discount; with lambda = 0, [1] takes one reward and then V, with lambda = 1 all rewards to the end.
PPO: Schulman et al. 2017, arXiv:1707.06347. Generalised advantage estimation (GAE), which is [1]: Schulman et al. 2016,
arXiv:1506.02438.

Differs from the paper: as in OpenAI Baselines, advantages are normalised in each minibatch, the norm of the gradient is
clipped, weights start orthogonal, Adam's epsilon is 1e-5, and rewards are divided by the running standard deviation of
the discounted return; but, unlike there, neither the rewards nor the change of V in [3] are clipped. The learning rate
is annealed in all tasks and epsilon in none; the paper anneals both, on Atari only. Evaluation takes the most likely
actions, where the paper averages training episodes. A time limit does not count as a terminal state: the value of the
last observation stands for the rest of the episode.

Box actions are rescaled to [-1, 1], where the policy is Gaussian. The environment gets the sample clipped to its box;
the log-probability is that of the unclipped sample. Atari (ALE/...): 84 x 84 greyscale, maximum over two frames, each
action held for four frames, the last four images stacked, up to 30 no-ops, sticky actions, the sign of the reward, and
the Nature CNN (the paper took the smaller network of A3C); an episode is a game, not a life.

    python algorithms/ppo.py --env-id LunarLander-v3
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "filelock>=3.20", "gymnasium[atari,box2d,classic-control,mujoco,toy-text]>=1.4,<2", "moviepy>=2.2",
#     "mujoco>=3.11,<3.12", "numpy>=2", "opencv-python-headless>=4.10", "torch>=2.13", "tqdm>=4.66", "tyro>=1",
#     "wandb>=0.31",
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
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

import filelock
import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "LunarLander-v3"  # a Gymnasium environment, or module:id if a module registers it
    seed: int = 1  # all randomness follows from it
    total_timesteps: int = 500_000  # environment steps, summed over all environments
    num_envs: int = 8  # environments stepped together
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    eval_frequency: int | None = None  # steps between evaluations; None: a twentieth of the run
    eval_episodes: int = 20  # episodes of an evaluation
    checkpoint_frequency: int | None = None  # steps between checkpoints, which cut episodes; None: a tenth of the run
    capture_video: bool = False  # film the first episode of each evaluation
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "plainrl"  # W&B project
    run_dir: str | None = None  # folder of the run; None: a new one in runs/
    resume: bool = False  # continue the run in --run-dir with its own arguments
    evaluate: bool = False  # only evaluate the model in --run-dir

    learning_rate: float = 5e-4  # of Adam or RMSprop
    anneal_lr: bool = True  # anneal it linearly to 0
    num_steps: int = 512  # steps of each environment in a batch
    num_minibatches: int = 64  # minibatches per epoch
    update_epochs: int = 12  # passes over the batch
    gamma: float = 0.999  # discount
    gae_lambda: float = 0.96  # [1] lambda
    clip_coef: float = 0.2  # [2] epsilon
    vf_coef: float = 0.5  # [4] c_1; CleanRL halves the loss as well: its 0.5 is 0.25 here
    ent_coef: float = 0.0  # [4] c_2
    max_grad_norm: float = 0.5  # gradients with a larger norm are scaled down to it
    target_kl: float | None = None  # skip a batch's further epochs once one ends with a larger approx_kl; None: never
    norm_adv: bool = True  # normalise the advantages of each minibatch
    norm_obs: bool = False  # normalise vector observations by their running mean and standard deviation
    norm_reward: bool = True  # divide rewards by the running standard deviation of the return; on Atari always the sign
    log_std_init: float = 0.0  # log of the standard deviation of Box actions, scaled to [-1, 1], at the start
    optimizer: Literal["adam", "rmsprop"] = "adam"  # rmsprop: as A2C
    compile: bool = False  # torch.compile the update: some 20 s once, faster from then on

    def __post_init__(self) -> None:
        check_and_complete(self, gae_lambda=(0, 1), log_std_init=(-20, 2))
        batch_size = self.num_envs * self.num_steps
        if batch_size % self.num_minibatches:
            refuse(f"--num-minibatches {self.num_minibatches} must divide num_envs * num_steps = {batch_size}")


class RunningMeanStd(nn.Module):
    """Mean and variance of all rows given to update, in buffers: saved with the model, frozen unless updated."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, rows: Tensor) -> None:  # (B, dim)
        var, mean = torch.var_mean(rows, dim=0, correction=0)
        self.count += len(rows)
        share = (len(rows) / self.count).float()  # of these rows among all
        delta = mean - self.mean
        self.mean += share * delta
        self.var += share * (var - self.var) + share * (1 - share) * delta**2  # Chan, Golub & LeVeque 1979

    def forward(self, x: Tensor) -> Tensor:  # (..., dim) -> (..., dim)
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10)  # clamped as in Baselines


def orthogonal(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class TwoMLPs(nn.Module):
    """The hidden layers of actor and critic, which share nothing, in one batch of two: fewer and larger products."""

    def __init__(self, obs_dim: int):
        super().__init__()
        layers = (
            [orthogonal(nn.Linear(obs_dim, 64)) for _ in range(2)],
            [orthogonal(nn.Linear(64, 64)) for _ in range(2)],
        )
        # (2, obs_dim, 64) and (2, 64, 64): the actor's and the critic's, transposed for x @ weight
        self.weight1, self.weight2 = (nn.Parameter(torch.stack([layer.weight.T for layer in pair])) for pair in layers)
        self.bias1, self.bias2 = nn.Parameter(torch.zeros(2, 1, 64)), nn.Parameter(torch.zeros(2, 1, 64))

    def forward(self, obs: Tensor) -> Tensor:  # (B, obs_dim) -> (2, B, 64)
        hidden = torch.baddbmm(self.bias1, obs.expand(2, -1, -1), self.weight1).tanh()
        return torch.baddbmm(self.bias2, hidden, self.weight2).tanh()


class NatureCNN(nn.Sequential):
    """The network of Mnih et al. 2015 up to its last hidden layer. Images are bytes until they get here."""

    def __init__(self):
        super().__init__(
            orthogonal(nn.Conv2d(4, 32, 8, stride=4)), nn.ReLU(),
            orthogonal(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU(),
            orthogonal(nn.Conv2d(64, 64, 3, stride=1)), nn.ReLU(),
            nn.Flatten(), orthogonal(nn.Linear(64 * 7 * 7, 512)), nn.ReLU(),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:  # (B, 4, 84, 84) uint8 -> (B, 512)
        return super().forward(images / 255)


class CategoricalPolicy(nn.Module):
    """Discrete and MultiDiscrete actions: an independent softmax for each of the K components (Discrete: K = 1).

    torch.distributions computes the same, as in reinforce.py, but takes longer over it than the network.
    """

    def __init__(self, sizes: list[int], start: np.ndarray):
        super().__init__()
        self.sizes, self.start = sizes, start  # the environment counts from start, the network from 0
        self.num_outputs = sum(sizes)

    def sample(self, logits: Tensor) -> Tensor:  # (B, sum of sizes) -> (B, K)
        # With Gumbel noise, minus the log of an exponential variable, the argmax is a sample of the softmax
        return self.mode(logits - torch.empty_like(logits).exponential_().log())

    def mode(self, logits: Tensor) -> Tensor:  # (B, sum of sizes) -> (B, K)
        return torch.stack([part.argmax(-1) for part in logits.split(self.sizes, -1)], -1)

    def log_prob_and_entropy(self, logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """(B, sum of sizes), (B, K) -> (B,), (B,)"""
        log_prob, entropy = 0.0, 0.0  # the sums over the independent components
        for part, action in zip(logits.split(self.sizes, -1), actions.split(1, -1), strict=True):
            log_probs = part.log_softmax(-1)
            log_prob = log_prob + log_probs.gather(-1, action).squeeze(-1)
            entropy = entropy - (log_probs.exp() * log_probs).sum(-1)
        return log_prob, entropy

    def to_env(self, actions: Tensor) -> np.ndarray:  # (B, K) -> (B, *action shape)
        return actions.cpu().numpy().reshape(-1, *self.start.shape) + self.start


class GaussianPolicy(nn.Module):
    """Box actions: independent normals for the D components; the standard deviations do not depend on the state."""

    def __init__(self, low: np.ndarray, high: np.ndarray, log_std_init: float):
        super().__init__()
        self.low, self.high = low, high
        bounded = np.isfinite(low) & np.isfinite(high)  # a component without bounds is not rescaled
        low, high = np.where(bounded, low, -1), np.where(bounded, high, 1)
        self.center, self.scale = (high + low) / 2, (high - low) / 2
        self.num_outputs = low.size
        self.log_std = nn.Parameter(torch.full((low.size,), log_std_init))

    def sample(self, mean: Tensor) -> Tensor:  # (B, D) -> (B, D)
        return mean + self.log_std.exp() * torch.randn_like(mean)

    def mode(self, mean: Tensor) -> Tensor:  # (B, D) -> (B, D)
        return mean

    def log_prob_and_entropy(self, mean: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D), (B, D) -> (B,), (B,)"""
        z = (actions - mean) / self.log_std.exp()
        log_prob = (-0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        entropy = (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
        return log_prob, entropy.expand_as(log_prob)

    def to_env(self, actions: Tensor) -> np.ndarray:  # (B, D) -> (B, *action shape)
        actions = self.center + self.scale * actions.cpu().numpy().reshape(-1, *self.low.shape)
        return np.clip(actions, self.low, self.high)


class ActorCritic(nn.Module):
    """Policy and value network: apart for vectors, and for images two heads on one Nature CNN."""

    def __init__(self, obs_shape: tuple[int, ...], policy: CategoricalPolicy | GaussianPolicy, norm_obs: bool):
        super().__init__()
        self.policy = policy
        self.images = len(obs_shape) == 3
        self.hidden = NatureCNN() if self.images else TwoMLPs(*obs_shape)
        hidden_dim = 512 if self.images else 64
        self.actor = orthogonal(nn.Linear(hidden_dim, policy.num_outputs), 0.01)  # 0.01: at first all actions are alike
        self.critic = orthogonal(nn.Linear(hidden_dim, 1), 1.0)
        self.obs_stats = RunningMeanStd(*obs_shape) if norm_obs else None
        self.return_stats = RunningMeanStd(1)

    def features(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """(B, *obs_shape) -> what the actor's and the critic's last layer see, (B, 64 or 512) each."""
        obs = obs if self.obs_stats is None else self.obs_stats(obs)
        hidden = self.hidden(obs)
        return (hidden, hidden) if self.images else hidden.unbind(0)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """(B, *obs_shape) -> distribution parameters: logits or means (B, num_outputs); values (B,)"""
        of_actor, of_critic = self.features(obs)
        return self.actor(of_actor), self.critic(of_critic).squeeze(-1)

    def sample(self, obs: Tensor) -> Tensor:  # (B, *obs_shape) -> (B, K or D)
        return self.policy.sample(self.actor(self.features(obs)[0]))

    @torch.inference_mode()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The most likely actions: deterministic, for evaluation. (B, *obs_shape) -> (B, *action shape)"""
        obs = torch.from_numpy(obs).to(next(self.parameters()).device)
        return self.policy.to_env(self.policy.mode(self.actor(self.features(obs)[0])))


def gae(
    rewards: np.ndarray, values: np.ndarray, next_values: np.ndarray,
    terminated: np.ndarray, truncated: np.ndarray, gamma: float, gae_lambda: float,
) -> np.ndarray:  # fmt: skip
    """Generalised advantage estimation, (T, N) as all its arguments are; next_values: V(s_{t+1}), before any reset."""
    deltas = rewards + gamma * next_values * ~terminated - values  # [1]; a terminal state is worth nothing
    decay = gamma * gae_lambda * ~(terminated | truncated)  # 0 where step t + 1 is in another episode than step t
    advantages, advantage = np.empty_like(deltas), 0.0
    for t in reversed(range(len(deltas))):
        advantages[t] = advantage = deltas[t] + decay[t] * advantage  # [1]
    return advantages


def ppo_loss(
    log_prob: Tensor, entropy: Tensor, values: Tensor,  # of the network that learns
    old_log_prob: Tensor, advantages: Tensor, returns: Tensor,  # of the batch
    clip_coef: float, vf_coef: float, ent_coef: float,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The loss, and metrics to log. All tensors are (B,)."""
    assert log_prob.shape == entropy.shape == values.shape == old_log_prob.shape == advantages.shape == returns.shape
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).mean()  # [2], negated: to be minimised
    value_loss = (values - returns).square().mean()  # [3]
    mean_entropy = entropy.mean()
    loss = policy_loss + vf_coef * value_loss  # [4]
    if ent_coef:  # its gradient would take time, for nothing if the weight is 0
        loss = loss - ent_coef * mean_entropy  # [4]
    with torch.no_grad():
        metrics = {
            "losses/policy_loss": policy_loss.detach(),
            "losses/value_loss": value_loss.detach(),
            "losses/entropy": mean_entropy.detach(),
            "losses/approx_kl": (ratio - 1 - log_ratio).mean(),  # k3 of joschu.net/blog/kl-approx.html: never negative
            "losses/clipfrac": (ratio != clipped_ratio).float().mean(),
        }
    return loss, metrics


def update(agent: ActorCritic, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, ...], args: Args) -> dict:
    """Several epochs over a batch: observations, actions, old log-probabilities, advantages, returns, (B, ...) each.

    Returns what to log, each the mean over all minibatches; grad_norm is the norm before clipping.
    """
    loss_function = torch.compile(ppo_loss) if args.compile else ppo_loss  # compiled the first time only
    minibatch_size = args.num_envs * args.num_steps // args.num_minibatches
    parameters, history = list(agent.parameters()), []
    for _ in range(args.update_epochs):
        order = torch.randperm(len(batch[0]), device=args.device)
        shuffled = (rows[order].split(minibatch_size) for rows in batch)  # of each a tuple of minibatches
        for obs, actions, old_log_prob, advantages, returns in zip(*shuffled, strict=True):
            if args.norm_adv:
                std, mean = torch.std_mean(advantages, correction=0)  # correction=0: a single row must not become NaN
                advantages = (advantages - mean) / (std + 1e-8)
            dist_params, values = agent(obs)
            log_prob, entropy = agent.policy.log_prob_and_entropy(dist_params, actions)
            coefs = args.clip_coef, args.vf_coef, args.ent_coef
            loss, metrics = loss_function(log_prob, entropy, values, old_log_prob, advantages, returns, *coefs)
            optimizer.zero_grad()
            loss.backward()
            metrics["losses/grad_norm"] = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            history.append(metrics)
        if args.target_kl is not None and metrics["losses/approx_kl"] > args.target_kl:
            break
    return {name: torch.stack([metrics[name] for metrics in history]).mean().item() for name in metrics}


def make_agent(args: Args, env: gym.Env) -> ActorCritic:
    space = env.action_space
    if isinstance(space, gym.spaces.Discrete):
        policy = CategoricalPolicy([int(space.n)], np.asarray(space.start))
    elif isinstance(space, gym.spaces.MultiDiscrete):
        policy = CategoricalPolicy(space.nvec.flatten().tolist(), space.start)
    elif isinstance(space, gym.spaces.Box) and np.issubdtype(space.dtype, np.floating):
        policy = GaussianPolicy(space.low, space.high, args.log_std_init)
    else:
        refuse(f"--env-id {args.env_id} acts in {space}; ppo.py knows Discrete, MultiDiscrete and Box of floats")
    if args.norm_obs and len(env.observation_space.shape) == 3:
        refuse(f"--norm-obs is for vectors, and --env-id {args.env_id} observes images, which are divided by 255")
    return ActorCritic(env.observation_space.shape, policy, args.norm_obs)


def train(args: Args) -> None:
    env = make_env(args.env_id, film=args.capture_video)  # for its spaces, and to find out now if it can't be filmed
    args.device = choose_device(args.device, small=len(env.observation_space.shape) == 1)
    torch.manual_seed(args.seed)
    agent = make_agent(args, env).to(args.device)
    if args.compile:
        agent.compile()
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)  # eps: as Baselines
    else:
        optimizer = torch.optim.RMSprop(agent.parameters(), args.learning_rate, alpha=0.99, eps=1e-5)  # both: as A2C
    run = Run(args, args.env_id, model=agent, optimizer=optimizer)
    global_step = run.restore()  # 0 in a new run

    while True:
        # 1. Evaluate and save where it is due, and at the end
        if run.evaluation_is_due(global_step):
            run.log(global_step, evaluate(agent.act, args, f"step-{global_step}", run.stopped))
        if run.checkpoint_is_due(global_step):
            run.save(global_step)
        if global_step == args.total_timesteps:
            break

        # 2. At the start and after each checkpoint, make the environments anew and reseed, also in a run that nothing
        #    interrupts: then one that is killed, and resumed from a checkpoint, gives the same results
        if global_step == run.checkpoint_step:
            envs, obs = make_envs(args, global_step)
            episode_return, episode_length, discounted_sum = np.zeros((3, args.num_envs))

        # 3. Act: T steps in each of N environments
        first_step, start_time = global_step, time.perf_counter()
        num_steps = min(args.num_steps, (args.total_timesteps - global_step) // args.num_envs)  # fewer at the end
        observations, actions, truncations = [torch.from_numpy(obs).to(args.device)], [], []
        rewards, discounted_sums = np.zeros((2, num_steps, args.num_envs))
        terminated, truncated = np.zeros((2, num_steps, args.num_envs), dtype=bool)
        with torch.inference_mode():
            for t in range(num_steps):
                actions.append(agent.sample(observations[t]))
                obs, rewards[t], terminated[t], truncated[t], infos = envs.step(agent.policy.to_env(actions[t]))
                observations.append(torch.from_numpy(obs).to(args.device))  # after an end: the next episode's first
                global_step += args.num_envs
                episode_return += rewards[t]
                episode_length += 1
                discounted_sums[t] = discounted_sum = args.gamma * discounted_sum + rewards[t]
                for i in np.flatnonzero(terminated[t] | truncated[t]):
                    ended = {"charts/episodic_return": episode_return[i], "charts/episodic_length": episode_length[i]}
                    run.log(global_step, ended)
                    episode_return[i] = episode_length[i] = discounted_sum[i] = 0
                    if not terminated[t, i]:
                        truncations.append((t, i, infos["final_obs"][i]))

        # 4. Old log-probabilities, values, advantages: in one pass over the batch, cheaper than a part in every step
        observations = torch.cat(observations)  # ((T + 1) * N, *obs_shape)
        actions = torch.cat(actions)  # (T * N, K or D)
        with torch.no_grad():
            dist_params, values = agent(observations)
            old_log_prob, _ = agent.policy.log_prob_and_entropy(dist_params[: len(actions)], actions)
            values = values.view(num_steps + 1, args.num_envs).cpu().numpy()
            next_values = values[1:].copy()
            for t, i, final_obs in truncations:  # where the episode was cut off, not where the next one starts
                next_values[t, i] = agent(torch.from_numpy(final_obs[None]).to(args.device))[1].item()
        if args.env_id.startswith("ALE/"):
            rewards = np.sign(rewards)
        elif args.norm_reward:  # "reward scaling" in Engstrom et al. 2020, arXiv:2005.12729
            agent.return_stats.update(torch.from_numpy(discounted_sums).float().view(-1, 1).to(args.device))
            rewards = rewards / math.sqrt(agent.return_stats.var.item() + 1e-8)
        advantages = gae(rewards, values[:-1], next_values, terminated, truncated, args.gamma, args.gae_lambda)
        returns = advantages + values[:-1]  # [3]

        # 5. Learn
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - first_step / args.total_timesteps)
        observations = observations[: len(actions)]  # without the one after the last step
        # (T, N) -> (T * N,)
        flat = [torch.from_numpy(array).float().flatten().to(args.device) for array in (advantages, returns)]
        metrics = update(agent, optimizer, (observations, actions, old_log_prob, *flat), args)
        if agent.obs_stats:
            agent.obs_stats.update(observations)  # after the epochs: [2] compares two policies on the same input

        # 6. Log
        metrics["losses/explained_variance"] = 1 - np.var(returns - values[:-1]) / (np.var(returns) + 1e-8)
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        metrics["charts/SPS"] = (global_step - first_step) / (time.perf_counter() - start_time)
        run.log(global_step, metrics)
    run.finish("Done. To watch it:", "--evaluate --capture-video")


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


def choose_device(name: str, small: bool) -> str:
    """auto takes a GPU if there is one, but the CPU for small networks, which don't repay the transfers."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and not small else "cpu"
    try:
        torch.zeros(1, device=name)
    except (AssertionError, RuntimeError) as error:
        refuse(f"--device {name} can't be used here; --device cpu can ({str(error).splitlines()[0]})")
    if small:
        torch.set_num_threads(1)  # small matrices: a second thread costs more than it gives
    return name


def make_env(env_id: str, film: bool = False) -> gym.Env:
    """One environment that observes images, (4, 84, 84) uint8, or vectors, (D,) float32."""
    if env_id.endswith("NoFrameskip-v4"):
        refuse(f"--env-id {env_id}: name the game ALE/Breakout-v5, ALE/Pong-v5 and so on; its frames are skipped here")
    atari = {"frameskip": 1} if env_id.startswith("ALE/") else {}  # AtariPreprocessing skips frames itself
    try:
        if atari:
            import ale_py  # registers the games

            ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        env = gym.make(env_id, render_mode="rgb_array" if film else None, **atari)
        if film:
            env.reset()
            if env.render() is None:
                raise ValueError("it gives no picture to film")
    except Exception as error:  # unknown, outdated, not installed, can't render here: its message says which
        refuse(f"--env-id {env_id}: {error}")
    space = env.observation_space
    if atari:
        return gym.wrappers.FrameStackObservation(gym.wrappers.AtariPreprocessing(env), 4)
    if space.dtype == np.uint8 and len(space.shape or ()) == 3 and space.shape[-1] == 3:
        env = gym.wrappers.ResizeObservation(gym.wrappers.GrayscaleObservation(env), (84, 84))
        return gym.wrappers.FrameStackObservation(env, 4)
    if not space.is_np_flattenable:
        refuse(f"--env-id {env_id} observes {space}, which can't be flattened into a vector")
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        env = gym.wrappers.FlattenObservation(env)  # Discrete: one-hot
    elif space.dtype == np.float32 and str(env.spec.entry_point).startswith("gymnasium."):
        return env
    # A copy: other environments say float32 and return float64 or lists, or one array that they keep overwriting
    vector = gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)
    return gym.wrappers.TransformObservation(env, lambda obs: np.array(obs, np.float32), vector)


def make_envs(args: Args, step: int) -> tuple[gym.vector.SyncVectorEnv, np.ndarray]:
    """New environments and their first observations, (N, *obs_shape). Reseeds everything random from (seed, step)."""
    seeds = np.random.SeedSequence(args.seed, spawn_key=(0, step))  # 0: training; evaluation has 1
    *env_seeds, seed = seeds.generate_state(args.num_envs + 1).tolist()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    # SAME_STEP: the step that ends an episode returns the next one's first observation; its own last is in final_obs
    same_step = gym.vector.AutoresetMode.SAME_STEP
    envs = gym.vector.SyncVectorEnv([lambda: make_env(args.env_id)] * args.num_envs, autoreset_mode=same_step)
    return envs, envs.reset(seed=env_seeds)[0]


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


def evaluate_saved(args: Args) -> None:
    """Plays eval_episodes episodes with the model in run_dir and prints the result."""
    env = make_env(args.env_id)
    agent = make_agent(args, env).to(choose_device(args.device, small=len(env.observation_space.shape) == 1))
    load_file(Path(args.run_dir, MODEL), model=agent)
    result = evaluate(agent.act, args, "evaluation")
    print(*(f"{name} {value:.4g}" for name, value in result.items()), f"{args.eval_episodes} episodes", sep=", ")


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


MODEL, CHECKPOINT = "model.pt", "checkpoint.pt"


def save_file(path: Path, state: dict) -> None:
    write_file(path, lambda file: torch.save(state, file))


def save_model(folder: Path, model: nn.Module) -> None:
    save_file(folder / MODEL, {"model": model.state_dict()})


def load_file(path: Path, **parts: nn.Module | torch.optim.Optimizer) -> dict:
    """Reads what save_file wrote, data and never code, into the parts of the same names."""
    if not path.exists():
        refuse(f"{path} is missing")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (PermissionError, MemoryError, torch.OutOfMemoryError):  # not the fault of what is in the file
        raise
    except Exception as error:  # a damaged file can raise anything
        refuse(f"{path} is damaged or of another script ({type(error).__name__})")
    return state


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
