"""Multi-agent deep deterministic policy gradient (MADDPG): critics that see everything, actors that see their own.

To an agent that learns among others the world keeps changing, because the others' policies do. Given what all agents
observe and do, it stays the same. So in training each agent has a critic that sees all observations and actions, beside
an actor that sees the agent's own observation only; trained actors need no critic. As each critic learns its own
agent's reward, agents may cooperate, compete, or both.

    [1] critics: minimise E[(Q_i(x, a_1, ..., a_N) - y_i)^2]                                               MADDPG, Eq. 6
        y_i = r_i + gamma Q'_i(x', a'_1, ..., a'_N)  with  a'_j = mu'_j(o'_j), or y_i = r_i where x' is terminal for i
    [2] actors:  maximise E[Q_i(x, a_1, ..., a_i, ..., a_N)]  with  a_i = mu_i(o_i)                        MADDPG, Eq. 5
    [3] targets: theta' <- tau theta + (1 - tau) theta'                                              MADDPG, Algorithm 1

Here gamma is the discount; a prime marks what comes next, and the target networks, whose weights theta' follow slowly.
Agent i observes o_i, does a_i by its policy mu_i, and earns r_i; x is (o_1, ..., o_N). In [2] the other agents' actions
are those of the replay buffer, as in the paper; the library EPyMARL takes what the present actors would choose.

MADDPG: Lowe et al. 2017, arXiv:1706.02275. A discrete a_i in [2] is a sample of the actor's softmax, and gets its
gradient through the straight-through Gumbel-softmax: Jang et al. 2017, arXiv:1611.01144. That gradient is biased
(Tilbury et al. 2023, arXiv:2302.11793): it follows slopes of Q_i at one-hot actions, where Q_i has learned nothing but
values. --actor-gradient exact has none of that: there [2] is the sum over all actions of agent i, each weighted by its
probability (Allen et al. 2017, arXiv:1709.00503).

A pair that makes up a language, in simple_speaker_listener_v4, may also unlearn it. The buffer keeps messages that had
another meaning when they were sent; --buffer-size 100000 drops them sooner. And a speaker's gradients may be near zero
for long; then Adam, which divides by the root of their mean square, leaps. With --beta2 0.9 it forgets that mean square
as fast as their mean, and no weight moves by more than the learning rate in a step (Dohare et al. 2023, Overcoming
Policy Collapse in Deep Reinforcement Learning). With --anneal-lr the language settles.

Differs from the paper: agents don't infer the others' policies (Section 4.2) and have one policy each, no ensemble
(Section 4.3); all agents learn from the same batch. Discrete actions are one-hot, in y_i the most likely ones; in the
authors' code they are soft samples everywhere, and gradients are clipped. As there, the mean square of the actors'
outputs is a small penalty in [2], and a time limit does not count as a terminal state: the value of the last
observation stands for the rest of the episode. Evaluation takes the most likely actions, and in a box those without
noise. The paper's sizes are --hidden-size 64 --batch-size 1024 --train-frequency 100 --learning-rate 0.01, and in that
code --learning-starts 25600; the defaults learn more from a step. With --algorithm ddpg a critic sees its own agent's
observation and action only: independent DDPG, the paper's baseline.

Returns are sums over an episode and all agents; one whose name ends in an agent's, as episodic_return/agent_0 does, is
that agent's own. An evaluation on simple_spread_v3 also gives the distance of a landmark to the nearest agent, summed
over landmarks and averaged over steps; the number of collisions; and how many landmarks are occupied at the end:

                                                  return   distances   collisions   occupied
    random actions                                 -80.0        2.09          1.4       0.02
    each agent to its landmark, best assignment    -26.5        0.67          1.2       2.38

    python algorithms/maddpg.py --env-id simple_spread_v3
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "filelock>=3.20", "gymnasium[atari,box2d,classic-control,mujoco,toy-text]>=1.4,<2", "moviepy>=2.2",
#     "mpe2>=1.1,<2", "mujoco>=3.11,<3.12", "numpy>=2", "opencv-python-headless>=4.10", "pettingzoo>=1.27,<2",
#     "torch>=2.13", "tqdm>=4.66", "tyro>=1", "wandb>=0.31",
# ]
# ///

import copy
import importlib
import itertools
import json
import math
import os
import pkgutil
import platform
import random
import shlex
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

import filelock
import gymnasium as gym
import mpe2
import numpy as np
import torch
import tyro
from pettingzoo import ParallelEnv
from torch import Tensor, nn
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "simple_spread_v3"  # one of mpe2, or module:function for another parallel one of PettingZoo
    seed: int = 1  # all randomness follows from it
    total_timesteps: int = 625_000  # environment steps, summed over all environments
    num_envs: int = 25  # environments stepped together
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    eval_frequency: int | None = None  # steps between evaluations; None: a twentieth of the run
    eval_episodes: int = 100  # episodes of an evaluation
    checkpoint_frequency: int | None = None  # steps between checkpoints, which cut episodes; None: a tenth of the run
    capture_video: bool = False  # film the first episode of each evaluation
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "plainrl"  # W&B project
    run_dir: str | None = None  # folder of the run; None: a new one in runs/
    resume: bool = False  # continue the run in --run-dir with its own arguments
    evaluate: bool = False  # only evaluate the model in --run-dir

    opponent_dir: str | None = None  # with --evaluate: another run; adversaries of each play the other agents of both
    algorithm: Literal["maddpg", "ddpg"] = "maddpg"  # critics see everything, or what their own agent observes and does
    continuous_actions: bool = False  # mpe2's environments: actions in a box, not discrete ones
    actor_gradient: Literal["gumbel", "exact"] = "gumbel"  # [2] of discrete actions: through one sample, or exactly
    learning_rate: float = 1e-3  # of Adam, for actors and critics
    anneal_lr: bool = False  # anneal it linearly to 0
    beta2: float = 0.999  # Adam's decay of the gradients' mean square; beta1, of their mean, is 0.9
    gamma: float = 0.95  # discount
    tau: float = 0.01  # [3] share of the new weights in an update of the targets
    hidden_size: int = 128  # units in each of the two hidden layers
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    batch_size: int = 256  # transitions in a gradient step
    learning_starts: int = 5_000  # environment steps before the first gradient step
    train_frequency: int = 10  # environment steps, summed over all environments, between gradient steps
    exploration_noise: float = 0.2  # standard deviation of the noise on actions in training, for a box of [-1, 1]
    output_coef: float = 1e-3  # weight of the penalty in [2]

    def __post_init__(self) -> None:
        check_and_complete(self, tau=(0, 1), learning_starts=(0, math.inf), buffer_size=(self.num_envs, math.inf),
                           beta2=(0, 0.9999))  # fmt: skip
        if self.continuous_actions and ":" in self.env_id:
            refuse(f"--continuous-actions is for mpe2's environments; --env-id {self.env_id} chooses by itself")
        if self.continuous_actions and self.actor_gradient == "exact":
            refuse("--actor-gradient exact is for discrete actions; in a box [2] has its exact gradient anyway")
        if self.opponent_dir is not None and not self.evaluate:
            refuse("--opponent-dir needs --evaluate")


class Actor(nn.Module):
    """mu_i: from an agent's observation to its action, one-hot where actions are discrete, else a point in a box.

    The network's outputs are logits, or what a sigmoid maps into the box. Three methods make actions of them: for
    evaluation and targets, for exploration, and for [2]. Outputs and actions are (B, action_dim).
    """

    def __init__(self, obs_dim: int, space: gym.spaces.Discrete | gym.spaces.Box, hidden_size: int):
        super().__init__()
        self.discrete, self.action_dim = isinstance(space, gym.spaces.Discrete), gym.spaces.flatdim(space)
        self.net = nn.Sequential(
            nn.Linear(obs_dim, hidden_size), nn.ReLU(),
            nn.Linear(hidden_size, hidden_size), nn.ReLU(),
            nn.Linear(hidden_size, self.action_dim),
        )  # fmt: skip
        if not self.discrete:
            self.register_buffer("low", torch.tensor(space.low.flatten(), dtype=torch.float32), persistent=False)
            self.register_buffer("high", torch.tensor(space.high.flatten(), dtype=torch.float32), persistent=False)

    def best(self, outputs: Tensor) -> Tensor:
        """The action without noise."""
        if self.discrete:
            return torch.zeros_like(outputs).scatter_(-1, outputs.argmax(-1, keepdim=True), 1)  # one-hot
        return torch.lerp(self.low, self.high, outputs.sigmoid())

    def noisy(self, outputs: Tensor, noise: float) -> Tensor:
        """The action that explores: a sample from the softmax, or Gaussian around the best."""
        if self.discrete:
            return self.best(gumbel(outputs))
        best = self.best(outputs)
        return (best + noise * (self.high - self.low) / 2 * torch.randn_like(best)).clamp(self.low, self.high)

    def weighted(self, outputs: Tensor, k: int) -> tuple[Tensor, Tensor]:  # (K, B), (K, B, action_dim)
        """For [2], the mean over rows of sum_k weight_k Q(x, ..., action_k, ...): K weights and K actions for each row.

        Only one of the two has a gradient. Discrete, K > 1: all actions, weighted by their probabilities, and zeros of
        weight 0 in what is left of K. Discrete, K = 1: one sample, of weight 1. In a box: its one action, K times, each
        of weight 1 / K.
        """
        if self.discrete and k > 1:
            probabilities = nn.functional.pad(outputs.softmax(-1), (0, k - self.action_dim)).T
            all_actions = torch.eye(k, self.action_dim, device=outputs.device)
            return probabilities, all_actions.unsqueeze(1).expand(-1, len(outputs), -1)
        if self.discrete:
            soft = gumbel(outputs).softmax(-1)
            action = self.best(soft) + (soft - soft.detach())  # one-hot, with the gradient of soft: straight-through
        else:
            action = self.best(outputs)
        return outputs.new_full((k, len(outputs)), 1 / k), action.expand(k, -1, -1)


def gumbel(logits: Tensor) -> Tensor:
    """Adds Gumbel noise: the argmax of the sum is a sample of softmax(logits), the Gumbel-max trick."""
    return logits - torch.empty_like(logits).exponential_().log()  # minus the log of an exponential variable


class Actors(nn.Module):
    """The actors of all N agents. A row of O numbers holds what all agents observe, a row of A what all do."""

    def __init__(self, obs_space_n: list[gym.Space], action_space_n: list[gym.Space], hidden_size: int):
        super().__init__()
        self.obs_dims = [gym.spaces.flatdim(space) for space in obs_space_n]
        pairs = zip(self.obs_dims, action_space_n, strict=True)
        self.actor_n = nn.ModuleList(Actor(obs_dim, space, hidden_size) for obs_dim, space in pairs)
        self.action_dims = [actor.action_dim for actor in self.actor_n]

    def with_outputs(self, obs: Tensor) -> list[tuple[Actor, Tensor]]:  # (B, O) -> N of (B, action_dim)
        return [(actor, actor.net(o)) for actor, o in zip(self.actor_n, obs.split(self.obs_dims, -1), strict=True)]

    def best(self, obs: Tensor) -> Tensor:  # (B, O) -> (B, A)
        return torch.cat([actor.best(outputs) for actor, outputs in self.with_outputs(obs)], -1)

    def noisy(self, obs: Tensor, noise: float) -> Tensor:  # (B, O) -> (B, A)
        return torch.cat([actor.noisy(outputs, noise) for actor, outputs in self.with_outputs(obs)], -1)

    @torch.inference_mode()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The actions without noise: deterministic, for evaluation. (B, O) -> (B, A)"""
        return self.best(torch.from_numpy(obs).to(next(self.parameters()).device)).cpu().numpy()


class Critics(nn.Module):
    """Q_1, ..., Q_N: N networks in one batch. Weights of columns that a critic is not to see count as 0."""

    def __init__(self, sees_obs: Tensor, sees_actions: Tensor, hidden_size: int):  # (N, O) and (N, A), true or false
        super().__init__()
        n, obs_dim, action_dim = len(sees_obs), sees_obs.shape[1], sees_actions.shape[1]
        self.register_buffer("sees_obs", sees_obs.unsqueeze(-1), persistent=False)  # (N, O, 1)
        self.register_buffer("sees_actions", sees_actions.unsqueeze(-1), persistent=False)  # (N, A, 1)
        inputs = (sees_obs.sum(1) + sees_actions.sum(1)).view(n, 1, 1)  # (N, 1, 1): how many columns each sees

        def uniform(fan_in: Tensor | int, *shape: int) -> nn.Parameter:  # as an nn.Linear starts
            return nn.Parameter((2 * torch.rand(shape) - 1) / fan_in**0.5)

        self.obs_weight = uniform(inputs, n, obs_dim, hidden_size)
        self.action_weight = uniform(inputs, n, action_dim, hidden_size)
        self.bias1 = uniform(inputs, n, 1, hidden_size)
        self.weight2 = uniform(hidden_size, n, hidden_size, hidden_size)
        self.bias2 = uniform(hidden_size, n, 1, hidden_size)
        self.weight3, self.bias3 = uniform(hidden_size, n, hidden_size, 1), uniform(hidden_size, n, 1, 1)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:  # (B, O), (B, A) or for each critic (N, B, A) -> (N, B)
        n = len(self.bias1)
        # The first layer is the sum of two products, of obs and of actions: (N, B, hidden_size)
        hidden = torch.baddbmm(self.bias1, obs.expand(n, -1, -1), self.obs_weight * self.sees_obs)
        hidden = torch.baddbmm(hidden, actions.expand(n, -1, -1), self.action_weight * self.sees_actions).relu_()
        hidden = torch.baddbmm(self.bias2, hidden, self.weight2).relu_()
        return torch.baddbmm(self.bias3, hidden, self.weight3).squeeze(-1)


class JointBuffer:
    """The last transitions of all environments, each one row: x, a, r, terminated, x' of all agents."""

    def __init__(self, buffer_size: int, widths: list[int], device: str):
        needed = 4 * buffer_size * sum(widths)  # bytes: a float32 has four
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > 0.9 * memory:
            refuse(f"--buffer-size {buffer_size} needs {needed / 1e9:.1f} GB; this machine has {memory / 1e9:.1f} GB")
        self.rows = torch.empty(buffer_size, sum(widths), device=device)  # on a CPU it takes memory as it fills
        self.widths, self.num_added = widths, 0

    def add(self, *parts: np.ndarray) -> None:  # (num_envs, width) each
        new = torch.from_numpy(np.concatenate(parts, axis=1, dtype=np.float32))
        self.rows[(self.num_added + torch.arange(len(new))) % len(self.rows)] = new.to(self.rows.device)
        self.num_added += len(new)

    def sample(self, batch_size: int) -> tuple[Tensor, ...]:  # (B, width) each
        filled = min(self.num_added, len(self.rows))
        return self.rows[torch.randint(filled, (batch_size,), device=self.rows.device)].split(self.widths, dim=1)

    def state_dict(self) -> dict:
        # torch.save writes all the memory behind a tensor: of a slice, without clone, all rows
        return {"rows": self.rows[: self.num_added].clone(), "num_added": self.num_added}

    def load_state_dict(self, state: dict) -> None:
        self.num_added = state["num_added"]
        self.rows[: self.num_added] = state["rows"].to(self.rows.device)


class MADDPG(nn.Module):
    """The networks of all agents, the targets that follow them, and the optimizers: all that a gradient step changes.

    Losses are (N,). Those of agent i have gradients in its own networks only, so an optimizer for their sum moves each
    network as one of its own would.
    """

    def __init__(self, actors: Actors, args: Args):
        super().__init__()
        self.args, self.actors, n = args, actors, len(actors.actor_n)
        agents = torch.arange(n)
        obs_owner = agents.repeat_interleave(torch.tensor(actors.obs_dims))  # (O,): whose observation a column is in
        action_owner = agents.repeat_interleave(torch.tensor(actors.action_dims))  # (A,)
        own_obs, own_action = obs_owner == agents.view(n, 1), action_owner == agents.view(n, 1)  # (N, O), (N, A)
        central = args.algorithm == "maddpg"  # then all critics see all columns
        self.register_buffer("own_action", own_action.view(n, 1, -1), persistent=False)  # (N, 1, A)
        discrete = [actor.action_dim for actor in actors.actor_n if actor.discrete]
        self.num_actions = max(discrete, default=1) if args.actor_gradient == "exact" else 1  # K in [2]
        self.critics = Critics(own_obs | central, own_action | central, args.hidden_size)
        self.target_actors, self.target_critics = copy.deepcopy(actors), copy.deepcopy(self.critics)
        self.to(args.device)
        adam = {"lr": args.learning_rate, "betas": (0.9, args.beta2), "fused": True}
        self.actor_optimizer = torch.optim.Adam(actors.parameters(), **adam)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), **adam)

    def targets(self, rewards: Tensor, terminated: Tensor, next_obs: Tensor) -> Tensor:
        """The y_i of all agents: (B, N), (B, N), (B, O) -> (N, B)"""
        with torch.no_grad():
            next_values = self.target_critics(next_obs, self.target_actors.best(next_obs))
            return rewards.T + self.args.gamma * (1 - terminated.T) * next_values  # [1] y_i

    def critic_losses(self, obs: Tensor, actions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(B, O), (B, A), (N, B) -> the losses and the values, (N,) and (N, B)"""
        values = self.critics(obs, actions)
        assert values.shape == targets.shape
        return (values - targets).square().mean(1), values  # [1]

    def actor_losses(self, obs: Tensor, actions: Tensor) -> Tensor:  # (B, O), (B, A) -> (N,)
        pairs = self.actors.with_outputs(obs)
        weighted = [actor.weighted(outputs, self.num_actions) for actor, outputs in pairs]
        weights = torch.stack([w for w, _ in weighted])  # (N, K, B)
        own = torch.cat([a for _, a in weighted], -1).flatten(0, 1)  # (K * B, A)
        # For critic i, agent i's action alone is new: (N, K * B, A)
        joint = torch.where(self.own_action, own, actions.repeat(self.num_actions, 1))
        values = self.critics(obs.repeat(self.num_actions, 1), joint).view_as(weights)
        penalty = torch.stack([outputs.square().mean() for _, outputs in pairs])
        return -(weights * values).sum(1).mean(1) + self.args.output_coef * penalty  # [2], negated

    def update(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """A gradient step of all networks with a batch of the buffer. Returns what to log, (N,) each."""
        obs, actions, rewards, terminated, next_obs = batch
        targets = self.targets(rewards, terminated, next_obs)  # all agents', before anything moves
        critic_losses, values = self.critic_losses(obs, actions, targets)
        self.critic_optimizer.zero_grad()
        critic_losses.sum().backward()
        self.critic_optimizer.step()

        actor_losses = self.actor_losses(obs, actions)
        self.actor_optimizer.zero_grad()
        actor_losses.sum().backward(inputs=list(self.actors.parameters()))  # no gradient of the critics' weights
        self.actor_optimizer.step()

        with torch.no_grad():
            target = [*self.target_actors.parameters(), *self.target_critics.parameters()]
            online = [*self.actors.parameters(), *self.critics.parameters()]
            torch._foreach_lerp_(target, online, self.args.tau)  # [3]: a step of tau from target to online
        return {
            "losses/td_loss": critic_losses.detach(),
            "losses/q_values": values.detach().mean(1),
            "losses/actor_loss": actor_losses.detach(),
        }


def make_agent(args: Args, env: "JointEnv") -> Actors:
    for name, obs_space, action_space in zip(env.names, env.obs_space_n, env.action_space_n, strict=True):
        if not obs_space.is_np_flattenable or len(obs_space.shape or ()) > 2:
            refuse(f"--env-id {args.env_id}: {name} observes {obs_space}; maddpg.py knows vectors, not images")
        box = isinstance(action_space, gym.spaces.Box) and np.issubdtype(action_space.dtype, np.floating)
        if not isinstance(action_space, gym.spaces.Discrete) and not (box and action_space.is_bounded()):
            refuse(f"--env-id {args.env_id}: {name} acts in {action_space}; maddpg.py knows Discrete and bounded Box")
    return Actors(env.obs_space_n, env.action_space_n, args.hidden_size)


def train(args: Args) -> None:
    env = make_env(args, film=args.capture_video)  # for its spaces, and to find out now if it can't be filmed
    args.device = choose_device(args.device, small=True)
    torch.manual_seed(args.seed)
    actors = make_agent(args, env)
    learner = MADDPG(actors, args)
    n, obs_dim, action_dim = len(env.names), sum(actors.obs_dims), sum(actors.action_dims)
    buffer = JointBuffer(min(args.buffer_size, args.total_timesteps), [obs_dim, action_dim, n, n, obs_dim], args.device)
    optimizers = {"actor_optimizer": learner.actor_optimizer, "critic_optimizer": learner.critic_optimizer}
    run = Run(args, args.env_id, model=actors, learner=learner, **optimizers, buffer=buffer)
    global_step = run.restore()  # 0 in a new run

    while True:
        # 1. Evaluate and save where it is due, and at the end
        if run.evaluation_is_due(global_step):
            run.log(global_step, evaluate(actors.act, args, f"step-{global_step}", run.stopped))
        if run.checkpoint_is_due(global_step):
            run.save(global_step)
        if global_step == args.total_timesteps:
            break

        # 2. At the start and after each checkpoint, make the environments anew and reseed, also in a run that nothing
        #    interrupts: then one that is killed, and resumed from a checkpoint, gives the same results
        if global_step == run.checkpoint_step:
            envs, obs = make_envs(args, global_step)
            episode_returns, episode_length = np.zeros((args.num_envs, n)), np.zeros(args.num_envs)
            history, logged_step, seconds = defaultdict(list), global_step, 0.0  # since the last row of losses

        # 3. Act: one step in each of the environments
        start_time = time.perf_counter()
        with torch.inference_mode():
            actions = actors.noisy(torch.from_numpy(obs).to(args.device), args.exploration_noise).cpu().numpy()
        steps = [env.step(row) for env, row in zip(envs, actions, strict=True)]
        next_obs, rewards, terminated, over = (np.stack(part) for part in zip(*steps, strict=True))
        previous_step, global_step = global_step, global_step + args.num_envs
        episode_returns += rewards
        episode_length += 1
        buffer.add(obs, actions, rewards, terminated, next_obs)
        obs = next_obs
        for i in np.flatnonzero(over):
            ended = {"charts/episodic_return": episode_returns[i].sum(), "charts/episodic_length": episode_length[i]}
            run.log(global_step, ended | env.by_agent("charts/episodic_return", episode_returns[i]))
            episode_returns[i] = episode_length[i] = 0
            obs[i] = envs[i].reset()

        # 4. Learn: a gradient step for every train_frequency environment steps, whatever the number of environments
        if args.anneal_lr:
            for optimizer in optimizers.values():
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - previous_step / args.total_timesteps)
        if global_step >= args.learning_starts:
            for _ in range(previous_step // args.train_frequency, global_step // args.train_frequency):
                metrics = learner.update(buffer.sample(args.batch_size))
                for name, value in metrics.items():
                    history[name].append(value)  # (N,)

        # 5. Log
        seconds += time.perf_counter() - start_time
        if global_step // 1000 > previous_step // 1000 or run.checkpoint_is_due(global_step):
            metrics = {}
            for name, values in history.items():
                metrics |= env.by_agent(name, torch.stack(values).mean(0))
            metrics["charts/learning_rate"] = learner.actor_optimizer.param_groups[0]["lr"]
            metrics["charts/SPS"] = (global_step - logged_step) / seconds
            run.log(global_step, metrics)
            history, logged_step, seconds = defaultdict(list), global_step, 0.0
    run.finish("Done. To watch it:", "--evaluate --capture-video")


# Below the ruled line every script is the same. These are maddpg.py's exceptions, under the names that they have in the
# other scripts: environments of several agents, from PettingZoo instead of Gymnasium.


class JointEnv:
    """A PettingZoo parallel environment in which one row holds what all agents observe, (O,), or do, (A,)."""

    def __init__(self, env: ParallelEnv):
        self.env, self.names = env, list(env.possible_agents)
        self.obs_space_n = [env.observation_space(name) for name in self.names]
        self.action_space_n = [env.action_space(name) for name in self.names]
        ends = itertools.accumulate(gym.spaces.flatdim(space) for space in self.action_space_n)
        self.action_columns = [slice(start, end) for start, end in itertools.pairwise([0, *ends])]

    def reset(self, seed: int | None = None) -> np.ndarray:  # (O,)
        self.infos = {}
        return self.row(self.env.reset(seed=seed)[0])

    def row(self, obs: dict) -> np.ndarray:  # (O,)
        return np.concatenate([
            gym.spaces.flatten(space, obs[name]) if name in obs else np.zeros(gym.spaces.flatdim(space))
            for name, space in zip(self.names, self.obs_space_n, strict=True)
        ], dtype=np.float32)  # fmt: skip

    def step(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        """Actions, (A,), to observations, (O,), rewards and terminated, (N,), and whether the episode is over.

        An agent that has left before the others counts as terminated: it observes zeros and earns 0.
        """
        actions = {}
        for name, space, columns in zip(self.names, self.action_space_n, self.action_columns, strict=True):
            if name in self.env.agents:
                if isinstance(space, gym.spaces.Discrete):
                    actions[name] = int(space.start + row[columns].argmax())
                else:  # clipped: a float32 may lie beyond the bound that it stands for
                    actions[name] = np.clip(row[columns].reshape(space.shape), space.low, space.high)
        obs, rewards, terminated, truncated, self.infos = self.env.step(actions)
        over = all(terminated.get(name) or truncated.get(name) for name in self.env.agents)  # an ended one may be gone
        rewards = np.array([rewards.get(name, 0.0) for name in self.names])
        return self.row(obs), rewards, np.array([terminated.get(name, True) for name in self.names]), over

    def by_agent(self, metric: str, values: np.ndarray | Tensor) -> dict[str, float]:  # (N,)
        return {f"{metric}/{name}": float(value) for name, value in zip(self.names, values, strict=True)}


def make_env(args: Args, film: bool = False, benchmark: bool = False) -> JointEnv:
    """benchmark: with mpe2's figures for benchmarks among the infos, which make a step a third slower."""
    options = {"render_mode": "rgb_array"} if film else {}
    try:
        if ":" in args.env_id:
            module, name = args.env_id.split(":")
        else:
            module, name = f"mpe2.{args.env_id}", "parallel_env"
            options |= {"continuous_actions": args.continuous_actions, "benchmark_data": benchmark}
        env = getattr(importlib.import_module(module), name)(**options)
        if not isinstance(env, ParallelEnv):
            raise TypeError("not a parallel environment of PettingZoo")
        if film:
            env.reset()
            if env.render() is None:
                raise ValueError("it gives no picture to film")
        env = JointEnv(env)
    except Exception as error:  # unknown, not installed, can't render here: its message says which
        known = ", ".join(module.name for module in pkgutil.iter_modules(mpe2.__path__) if "_v" in module.name)
        single = "for Gymnasium's environments, with one agent, there are ppo.py, dqn.py, sac.py and td3.py"
        refuse(f"--env-id {args.env_id}: {error!r}; mpe2 has {known}; {single}")
    if len(env.names) == 1:
        refuse(f"--env-id {args.env_id} has a single agent, for which there are ppo.py, dqn.py, sac.py and td3.py")
    return env


def make_envs(args: Args, step: int) -> tuple[list[JointEnv], np.ndarray]:
    """New environments and their first observations, (num_envs, O). Reseeds everything random from (seed, step)."""
    seeds = np.random.SeedSequence(args.seed, spawn_key=(0, step))  # 0: training; evaluation has 1
    *env_seeds, seed = seeds.generate_state(args.num_envs + 1).tolist()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    envs = [make_env(args) for _ in range(args.num_envs)]
    return envs, np.stack([env.reset(seed) for env, seed in zip(envs, env_seeds, strict=True)])


def evaluate(
    act: Callable[[np.ndarray], np.ndarray], args: Args, name: str, stopped: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Plays the same eval_episodes episodes every time, each in its own environment; films the first under this name.

    act: (1, O) -> (1, A). Ends early, with an empty result, once stopped() is true. The random streams of training stay
    as they are.
    """
    streams = random.getstate(), np.random.get_state()  # for environments that draw from these instead of their own
    seeds = np.random.SeedSequence(args.seed, spawn_key=(1,)).generate_state(args.eval_episodes).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[0])
    episodes, frames = [], []
    for seed in seeds:
        film = args.capture_video and seed == seeds[0]
        env = make_env(args, film, benchmark=True)
        obs, over, rewards, benchmark = env.reset(seed), False, [], []
        while not over and not stopped() and len(rewards) < 27_000:  # for environments without a limit
            if film and len(frames) < 3000:  # they wait in memory
                frames.append(env.env.render())
            obs, reward, _, over = env.step(act(obs[None])[0])
            rewards.append(reward)
            benchmark.append([info.get("benchmark_data") for info in env.infos.values()])
        env.env.close()
        if stopped():
            break
        returns = np.sum(rewards, axis=0)  # (N,)
        episode = {"eval/episodic_return": returns.sum(), "eval/episodic_length": len(rewards)}
        episode |= env.by_agent("eval/episodic_return", returns)
        episodes.append(episode | measures(args.env_id, benchmark))
    random.setstate(streams[0])
    np.random.set_state(streams[1])
    if stopped():
        return {}
    if frames:
        from gymnasium.utils.save_video import save_video  # imports moviepy

        save_video(frames, f"{args.run_dir}/videos", lambda _: True, fps=10, name_prefix=name)
    result = {metric: np.mean([episode[metric] for episode in episodes]) for metric in episodes[0]}
    return result | {"eval/return_std": np.std([episode["eval/episodic_return"] for episode in episodes])}


def measures(env_id: str, benchmark: list) -> dict[str, float]:
    """What the paper's tables count in an episode, from mpe2's figures of each step and agent."""
    if env_id == "simple_spread_v3":  # the distance of each landmark to the nearest agent, summed over landmarks
        _, collisions, distances, occupied = np.moveaxis(np.array(benchmark, dtype=float), -1, 0)  # (T, N) each
        occupied, collisions = occupied[-1, 0], collisions.sum() / 2  # both agents count a collision
        return {"eval/distances": distances.mean(), "eval/collisions": collisions, "eval/occupied": occupied}
    if env_id == "simple_tag_v3":
        return {"eval/touches": np.sum(benchmark)}
    if env_id == "simple_adversary_v3":  # whether an agent, and the adversary, end within the target's diameter of it
        adversary, *agents = benchmark[-1]  # squared distances; an agent's last is that to the target
        success = min(distances[-1] for distances in agents) < 0.16**2
        return {"eval/agent_success": success, "eval/adversary_success": adversary < 0.16**2}
    return {}


def load_actors(folder: str, args: Args, env: JointEnv) -> Actors:
    actors = make_agent(args, env).to(choose_device(args.device, small=True))
    load_file(Path(folder, MODEL), model=actors)
    return actors


def pairings(args: Args, env: JointEnv) -> dict[str, Actors]:
    """The adversaries of run_dir and opponent_dir, each with the other agents of both, as in the paper's tables."""
    try:
        saved = json.loads(Path(args.opponent_dir, "config.json").read_text())["args"]
        differ = [name for name in ("env_id", "continuous_actions", "hidden_size") if saved[name] != vars(args)[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse(f"--opponent-dir {args.opponent_dir}: config.json is missing or damaged ({error!r})")
    if differ:
        refuse(f"--opponent-dir {args.opponent_dir} holds a run with another {differ[0]}")
    adversaries = [i for i, name in enumerate(env.names) if name.startswith(("adversary", "leadadversary", "eve"))]
    if not adversaries:
        refuse(f"--opponent-dir needs adversaries; --env-id {args.env_id} has {', '.join(env.names)}")
    runs = {folder: load_actors(folder, args, env) for folder in (args.run_dir, args.opponent_dir)}
    teams = {}
    for one, other in itertools.product(runs, repeat=2):
        teams[f"adversaries of {one}, others of {other}"] = team = copy.deepcopy(runs[other])
        for i in adversaries:
            team.actor_n[i] = runs[one].actor_n[i]
    return teams


def evaluate_saved(args: Args) -> None:
    """Plays eval_episodes episodes with the model in run_dir, or with each of the pairings, and prints the results."""
    env = make_env(args)
    teams = pairings(args, env) if args.opponent_dir else {args.run_dir: load_actors(args.run_dir, args, env)}
    for k, (name, team) in enumerate(teams.items()):
        result = evaluate(team.act, args, f"evaluation-{k}" if args.opponent_dir else "evaluation")
        if args.opponent_dir:
            print(f"{name}:")
        print(*(f"{name} {value:.4g}" for name, value in result.items()), f"{args.eval_episodes} episodes", sep=", ")


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
