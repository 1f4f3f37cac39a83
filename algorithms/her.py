"""Hindsight experience replay (HER) with soft actor-critic: learn from a failure what it did achieve.

Where only reaching a goal is rewarded, nearly all early episodes look alike: the goal was missed. But each of them
reached something. HER replays its transitions once more as if that had been the goal, with the rewards that would then
have been paid. The learner does not notice: it is sac.py, on observations that contain the goal.

    [1] y = r + gamma (min_i Q'_i(s', a') - alpha log pi(a'|s')), a' ~ pi, or y = r where s' is terminal      SAC, Eq. 6
    [2] a = tanh(u), u ~ N(mean(s), std(s)^2): log pi(a|s) = log N(u) - sum_j log(1 - tanh(u_j)^2)       SAC, Appendix C
    [3] temperature: minimise E[-alpha log pi(a|s) - alpha H],  H = -dim(a)                                  SAC, Eq. 18
    [4] critics: minimise sum_i E[(Q_i(s, a) - y)^2]                                                          SAC, Eq. 5
    [5] actor:   minimise E[alpha log pi(a|s) - min_i Q_i(s, a)],  a ~ pi                                     SAC, Eq. 7
    [6] targets: theta' <- tau theta + (1 - tau) theta'                                                 SAC, Algorithm 1
    [7] with a probability of k / (k + 1), a transition's goal g becomes a goal g' that was achieved in its episode,
        future: in this step or a later one; episode: in any step; final: in the last one      HER, Sections 3.3 and 4.5
    [8] its reward becomes r' = r(achieved(s'), g'), and g' decides whether s' is terminal              HER, Algorithm 1

Here gamma is the discount; a prime marks what comes next, and the target networks, whose weights theta' follow slowly.
In [2], N(u) is the density of u, and j counts the dimensions of an action. In [7] and [8], g' and r' are what takes the
place of g and r; achieved is called m in the paper.

HER: Andrychowicz et al. 2017, arXiv:1707.01495. SAC: Haarnoja et al. 2018, arXiv:1812.05905; diff sac.py her.py shows
what HER adds to it.

Differs from HER's paper: SAC instead of DDPG, and its samples instead of noise and one random action in five; two
hidden layers of 256 units, not three of 64, batches of 256, not 128, a gradient step for each environment step, not 40
for 16 episodes, targets that move in each of these, not once in 40, and a discount of 0.95, not 0.98; a transition is
replayed from the moment it was made, and with a goal of its episode so far; the networks see the achieved goal too;
final has a k, which is 1 in the paper; the strategy random, normalised observations and clipped targets are left out.
Episodes of the paper have no terminal states. As in the authors' code, goals are drawn anew whenever a transition is
replayed, not once when it is stored, and a time limit does not count as a terminal state: the value of the last
observation stands for the rest of the episode. As in sac.py, actions are random in the first tenth of the run, in
10,000 steps at most, alpha starts at 0.2, and evaluation acts without noise, with tanh(mean(s)).

Actions come from a Box with finite bounds. The networks see them rescaled to [-1, 1], and log pi is the density of
these: H then means the same for every range.

Environments observe a Dict of observation, achieved_goal and desired_goal, and have compute_reward, for batches, and
compute_terminated; is_success or success in their infos is logged. Those of the package gymnasium-robotics do so:
FetchReach, PointMaze and others.

    python algorithms/her.py --env-id gymnasium_robotics:FetchReach-v4
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "filelock>=3.20", "gymnasium[atari,box2d,classic-control,mujoco,toy-text]>=1.4,<2",
#     "gymnasium-robotics>=1.4.2", "moviepy>=2.2", "mujoco>=3.11,<3.12", "numpy>=2",
#     "opencv-python-headless>=4.10", "torch>=2.13", "tqdm>=4.66", "tyro>=1", "wandb>=0.31",
# ]
# ///

import copy
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
from collections import defaultdict
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
    env_id: str = "gymnasium_robotics:FetchReach-v4"  # a Gymnasium environment, or module:id if a module registers it
    seed: int = 1  # all randomness follows from it
    total_timesteps: int = 20_000  # environment steps, summed over all environments
    num_envs: int = 1  # environments stepped together
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

    policy_lr: float = 1e-3  # learning rate of the actor
    q_lr: float = 1e-3  # learning rate of the critics, and of the temperature
    gamma: float = 0.95  # discount
    tau: float = 0.005  # [6] share of the new weights in an update of the targets
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    batch_size: int = 256  # transitions in a gradient step
    learning_starts: int | None = None  # random steps before learning starts; None: a tenth of the run, 10,000 at most
    utd: float = 1.0  # gradient steps per environment step: the update-to-data ratio
    num_critics: int = 2  # [1] number of critics
    alpha: float = 0.2  # [1] temperature: at the start, and with --no-autotune always
    autotune: bool = True  # [3] tune the temperature
    her_strategy: Literal["future", "episode", "final"] = "future"  # [7] where goals are taken from
    her_ratio: float = 4.0  # [7] k: transitions replayed with an achieved goal per one with the true goal; 0: SAC

    def __post_init__(self) -> None:
        check_and_complete(self, tau=(0, 1), learning_starts=(0, math.inf), buffer_size=(self.num_envs, math.inf))
        if self.learning_starts is None:
            self.learning_starts = min(self.total_timesteps // 10, 10_000)
        if self.autotune and self.alpha == 0:
            refuse("--alpha 0 can't be tuned: add --no-autotune, or start above 0")


class Actor(nn.Module):
    """The policy, a squashed normal. Its actions are in [-1, 1]; to_env maps these to the Box from low to high."""

    def __init__(self, obs_dim: int, low: np.ndarray, high: np.ndarray):
        super().__init__()
        self.low, self.high = low, high
        self.center, self.scale = (high + low) / 2, (high - low) / 2
        self.net = nn.Sequential(
            nn.Linear(obs_dim, 256), nn.ReLU(),
            nn.Linear(256, 256), nn.ReLU(),
            nn.Linear(256, 2 * low.size),
        )  # fmt: skip

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """(B, obs_dim) -> mean and log of the standard deviation before the squashing, (B, action_dim) each"""
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)  # as in the code of SAC's authors

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:  # (B, obs_dim) -> (B, action_dim), (B,)
        mean, log_std = self(obs)
        return squashed_normal(mean, log_std, torch.randn_like(mean))

    def to_env(self, actions: Tensor) -> np.ndarray:  # (B, action_dim) -> (B, *action shape)
        actions = self.center + self.scale * actions.cpu().numpy().reshape(-1, *self.low.shape)
        return np.clip(actions, self.low, self.high)  # rounding may have led beyond the bounds

    @torch.inference_mode()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The actions without noise: deterministic, for evaluation. (B, obs_dim) -> (B, *action shape)"""
        mean, _ = self(torch.from_numpy(obs).to(next(self.parameters()).device))
        return self.to_env(mean.tanh())


class StackedLinear(nn.Module):
    """n linear layers in one product, each of which starts as an nn.Linear does."""

    def __init__(self, n: int, in_dim: int, out_dim: int):
        super().__init__()
        bound = 1 / math.sqrt(in_dim)
        self.weight = nn.Parameter(torch.empty(n, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n, 1, out_dim).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:  # (n, B, in_dim) -> (n, B, out_dim)
        if self.weight.shape[-1] == 1:  # n dot products with each row: baddbmm takes several times as long for them
            return (x * self.weight.mT).sum(-1, keepdim=True) + self.bias
        return torch.baddbmm(self.bias, x, self.weight)


class Critics(nn.Module):
    """n networks Q_i(s, a) that share nothing but the calls: one batch of products costs less than n products."""

    def __init__(self, n: int, obs_dim: int, action_dim: int):
        super().__init__()
        self.layer1 = StackedLinear(n, obs_dim + action_dim, 256)
        self.layer2 = StackedLinear(n, 256, 256)
        self.layer3 = StackedLinear(n, 256, 1)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:  # (B, obs_dim), (B, action_dim) -> (n, B)
        x = torch.cat([obs, actions], -1).expand(len(self.layer1.weight), -1, -1)  # (n, B, obs_dim + action_dim)
        x = self.layer1(x).relu_()
        x = self.layer2(x).relu_()
        return self.layer3(x).squeeze(-1)


def where_goals_are(space: gym.spaces.Dict) -> tuple[slice, slice]:
    """The places of achieved_goal and desired_goal in an observation: the parts of the Dict, one after another."""
    places, start = {}, 0
    for name, part in space.items():
        places[name] = slice(start, start + part.shape[0])
        start += part.shape[0]
    return places["achieved_goal"], places["desired_goal"]


class GoalBuffer:
    """The last transitions of N environments, and the rows in which the episode of each begins and ends.

    A row holds a step of all environments. Rows are numbered from the start of the run; row i is kept in place
    i % length, until row i + length takes it.
    """

    def __init__(
        self, buffer_size: int, num_envs: int, obs_dim: int, action_dim: int, achieved: slice, desired: slice
    ):  # fmt: skip
        self.widths = obs_dim, action_dim, 1, 1, obs_dim
        needed = buffer_size * (4 * sum(self.widths) + 16)  # bytes: four a float32, eight each for first and last
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > 0.9 * memory:
            refuse(f"--buffer-size {buffer_size} needs {needed / 1e9:.1f} GB; this machine has {memory / 1e9:.1f} GB")
        self.length = buffer_size // num_envs
        self.rows = np.zeros((self.length, num_envs, sum(self.widths)), np.float32)
        self.first, self.last = np.zeros((2, self.length, num_envs), np.int64)  # of each transition's episode
        self.episode_start = np.zeros(num_envs, np.int64)  # first row of each environment's present episode
        self.achieved, self.desired = achieved, desired  # places of the goals in an observation
        self.num_added = 0

    def begin(self, which: np.ndarray) -> None:
        """New episodes in these environments. (N,) bool"""
        self.episode_start[which] = self.num_added

    def add(
        self, obs: np.ndarray, actions: np.ndarray, rewards: np.ndarray, terminated: np.ndarray, next_obs: np.ndarray
    ) -> None:
        """A step of N environments, (N, ...) each. Where an episode has ended, next_obs is its last observation."""
        row = self.num_added
        self.rows[row % self.length] = np.hstack([obs, actions, rewards[:, None], terminated[:, None], next_obs])
        self.first[row % self.length] = self.episode_start
        # This row is now the last of each present episode: all of its rows that are still kept learn so
        for env_index, start in enumerate(self.episode_start):
            self.last[np.arange(max(start, row - self.length + 1), row + 1) % self.length, env_index] = row
        self.num_added += 1

    def read(self, row: np.ndarray, env_index: np.ndarray) -> list[np.ndarray]:
        """Copies of obs, actions, rewards, terminated, next_obs: (B, width) each; row, env_index: (B,)"""
        return np.split(self.rows[row % self.length, env_index], np.cumsum(self.widths)[:-1], axis=1)

    def sample(self, batch_size: int, device: str, env: gym.Env, args: Args) -> tuple[Tensor, ...]:
        """obs, actions, rewards, terminated, next_obs: (B, obs_dim), (B, action_dim), (B,), (B,), (B, obs_dim)

        env tells what a transition would have earned with another goal.
        """
        oldest = max(0, self.num_added - self.length)
        row = np.random.randint(oldest, self.num_added, batch_size)
        env_index = np.random.randint(self.rows.shape[1], size=batch_size)
        obs, actions, rewards, terminated, next_obs = self.read(row, env_index)

        # [7] R of the B transitions get another goal: the one achieved in a random row from earliest to last
        relabelled = np.random.random(batch_size) < args.her_ratio / (args.her_ratio + 1)  # (B,) bool
        row, env_index = row[relabelled], env_index[relabelled]
        first, last = self.first[row % self.length, env_index], self.last[row % self.length, env_index]  # (R,) each
        earliest = {"future": row, "episode": np.maximum(first, oldest), "final": last}[args.her_strategy]
        *_, reached = self.read(np.random.randint(earliest, last + 1), env_index)
        goals = reached[:, self.achieved]  # (R, goal_dim)
        obs[relabelled, self.desired] = next_obs[relabelled, self.desired] = goals
        achieved = next_obs[relabelled, self.achieved]
        rewards[relabelled, 0] = env.compute_reward(achieved, goals, {})  # [8]; {}: infos are not kept
        pairs = zip(achieved, goals, strict=True)  # one after the other, as compute_terminated knows no batches
        terminated[relabelled, 0] = [env.compute_terminated(*pair, {}) for pair in pairs]
        columns = obs, actions, rewards[:, 0], terminated[:, 0], next_obs
        return tuple(torch.from_numpy(np.ascontiguousarray(column)).to(device) for column in columns)

    def state_dict(self) -> dict:
        # torch.save writes all the memory behind a tensor; behind that of a NumPy slice is only the slice
        filled = {name: torch.from_numpy(getattr(self, name)[: self.num_added]) for name in ("rows", "first", "last")}
        return filled | {"num_added": self.num_added}  # no episode_start: after a checkpoint all episodes begin anew

    def load_state_dict(self, state: dict) -> None:
        for name in "rows", "first", "last":
            getattr(self, name)[: len(state[name])] = state[name].numpy()
        self.num_added = state["num_added"]


def td_target(rewards: Tensor, terminated: Tensor, next_values: Tensor, gamma: float) -> Tensor:
    """The target y, one for all critics, (B,). rewards, terminated: (B,); next_values: by each target critic, (n, B)"""
    assert rewards.shape == terminated.shape == next_values.shape[1:]
    return rewards + gamma * (1 - terminated) * next_values.amin(0)  # [1]; a terminal state is worth nothing


def squashed_normal(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Actions from standard normal noise, and their log-probabilities. (B, action_dim) each -> (B, action_dim), (B,)"""
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)  # log N(u): noise is (u - mean) / std
    log_slope = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))  # log(1 - tanh(u)^2), also at tanh(u) = 1
    return u.tanh(), (log_normal - log_slope).sum(-1)  # [2]


class SAC(nn.Module):
    """The networks, the targets that follow them, and the optimizers: all that a gradient step changes."""

    def __init__(self, actor: Actor, critics: Critics, args: Args):
        super().__init__()
        self.args, self.actor, self.critics = args, actor, critics
        self.target_critics = copy.deepcopy(critics)
        # alpha is learned as its logarithm, so that it stays above 0; a fixed alpha of 0 is exp(-infinity)
        self.log_alpha = nn.Parameter(torch.tensor(args.alpha).log())
        self.target_entropy = -actor.low.size  # [3] H
        self.to(args.device)
        self.actor_optimizer = torch.optim.Adam(actor.parameters(), args.policy_lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(critics.parameters(), args.q_lr, fused=True)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], args.q_lr, fused=True)

    def update(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """A gradient step with a batch of the buffer. Returns what to log."""
        obs, actions, rewards, terminated, next_obs = batch
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            next_actions, next_log_prob = self.actor.sample(next_obs)
            next_values = self.target_critics(next_obs, next_actions) - alpha * next_log_prob  # [1]; (n, B) - (B,)
            targets = td_target(rewards, terminated, next_values, self.args.gamma)  # [1]
        values = self.critics(obs, actions)  # (n, B)
        critic_losses = (values - targets).square().mean(-1)  # [4]; (n, B) - (B,) -> (n,)
        self.critic_optimizer.zero_grad()
        critic_losses.sum().backward()
        self.critic_optimizer.step()
        metrics = {f"losses/qf{i}_loss": loss for i, loss in enumerate(critic_losses.detach(), 1)}
        metrics["losses/q_values"] = values.detach().mean()

        new_actions, log_prob = self.actor.sample(obs)
        actor_loss = (alpha * log_prob - self.critics(obs, new_actions).amin(0)).mean()  # [5]; (B,) - (B,)
        self.actor_optimizer.zero_grad()
        actor_loss.backward(inputs=list(self.actor.parameters()))  # computes no gradient of the critics' weights
        self.actor_optimizer.step()
        entropy = -log_prob.detach().mean()
        metrics |= {"losses/actor_loss": actor_loss.detach(), "losses/entropy": entropy, "losses/alpha": alpha}
        if self.args.autotune:
            alpha_loss = self.log_alpha.exp() * (entropy - self.target_entropy)  # [3]
            self.alpha_optimizer.zero_grad()
            alpha_loss.backward()
            self.alpha_optimizer.step()
        with torch.no_grad():
            target, online = [*self.target_critics.parameters()], [*self.critics.parameters()]
            torch._foreach_lerp_(target, online, self.args.tau)  # [6]: a step of tau from target to online
        return metrics


def make_agent(args: Args, env: gym.Env) -> Actor:
    space, obs_shape = env.action_space, env.observation_space.shape
    if not isinstance(space, gym.spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        refuse(f"--env-id {args.env_id} acts in {space}; her.py knows Box of floats only: see dqn.py and ppo.py")
    if not space.is_bounded():
        refuse(f"--env-id {args.env_id} acts in {space}; her.py needs finite bounds: see ppo.py")
    parts = getattr(env.unwrapped.observation_space, "spaces", {})
    vectors = [isinstance(part, gym.spaces.Box) and len(part.shape) == 1 for part in parts.values()]
    if set(parts) != {"observation", "achieved_goal", "desired_goal"} or not all(vectors):
        refuse(f"--env-id {args.env_id} observes {env.unwrapped.observation_space}; her.py needs vectors in a Dict of "
               "observation, achieved_goal and desired_goal: see sac.py")  # fmt: skip
    goals = np.zeros((2, *parts["desired_goal"].shape), np.float32)
    try:
        assert np.shape(env.unwrapped.compute_reward(goals, goals, {})) == (2,), "compute_reward returned no batch"
        env.unwrapped.compute_terminated(*goals, {})
    except Exception as error:
        refuse(f"--env-id {args.env_id}: her.py needs compute_reward, for batches, and compute_terminated: {error!r}")
    return Actor(*obs_shape, space.low, space.high)


def gradient_steps_until(step: int, args: Args) -> int:
    """Gradient steps that are due after so many environment steps."""
    return int(args.utd * max(0, step - args.learning_starts))


def train(args: Args) -> None:
    env = make_env(args.env_id, film=args.capture_video)  # for its spaces, and to find out now if it can't be filmed
    args.device = choose_device(args.device, small=True)
    torch.manual_seed(args.seed)
    actor = make_agent(args, env)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.low.size
    learner = SAC(actor, Critics(args.num_critics, obs_dim, action_dim), args)
    places = where_goals_are(env.unwrapped.observation_space)
    buffer = GoalBuffer(min(args.buffer_size, args.total_timesteps), args.num_envs, obs_dim, action_dim, *places)
    optimizers = {"actor_optimizer": learner.actor_optimizer, "critic_optimizer": learner.critic_optimizer}
    optimizers["alpha_optimizer"] = learner.alpha_optimizer
    run = Run(args, args.env_id, model=actor, learner=learner, **optimizers, buffer=buffer)
    global_step = run.restore()  # 0 in a new run

    while True:
        # 1. Evaluate and save where it is due, and at the end
        if run.evaluation_is_due(global_step):
            run.log(global_step, evaluate(actor.act, args, f"step-{global_step}", run.stopped))
        if run.checkpoint_is_due(global_step):
            run.save(global_step)
        if global_step == args.total_timesteps:
            break

        # 2. At the start and after each checkpoint, make the environments anew and reseed, also in a run that nothing
        #    interrupts: then one that is killed, and resumed from a checkpoint, gives the same results
        if global_step == run.checkpoint_step:
            envs, obs = make_envs(args, global_step)
            buffer.begin(np.full(args.num_envs, True))
            episode_return, episode_length = np.zeros((2, args.num_envs))
            history, logged_step, seconds = defaultdict(list), global_step, 0.0  # since the last row of losses

        # 3. Act: one step in each of N environments
        start_time = time.perf_counter()
        with torch.inference_mode():
            if global_step < args.learning_starts:
                actions = torch.empty(args.num_envs, action_dim).uniform_(-1, 1)
            else:
                actions, _ = actor.sample(torch.from_numpy(obs).to(args.device))
        next_obs, rewards, terminated, truncated, infos = envs.step(actor.to_env(actions))
        previous_step, global_step = global_step, global_step + args.num_envs
        episode_return += rewards
        episode_length += 1
        final_obs = next_obs.copy()  # after an end, next_obs is the next episode's first, and its own last is in infos
        for i in np.flatnonzero(terminated | truncated):
            final_obs[i] = infos["final_obs"][i]
            ended = {"charts/episodic_return": episode_return[i], "charts/episodic_length": episode_length[i]}
            for name in "is_success", "success":  # FetchReach's, and PointMaze's
                if name in infos["final_info"]:
                    ended["charts/success"] = infos["final_info"][name][i]
            run.log(global_step, ended)
            episode_return[i] = episode_length[i] = 0
        buffer.add(obs, actions.cpu().numpy(), rewards, terminated, final_obs)
        buffer.begin(terminated | truncated)
        obs = next_obs

        # 4. Learn: utd gradient steps for every environment step, whatever the number of environments
        taken, due = gradient_steps_until(previous_step, args), gradient_steps_until(global_step, args)
        for _ in range(taken, due):
            metrics = learner.update(buffer.sample(args.batch_size, args.device, env.unwrapped, args))
            for name, value in metrics.items():
                history[name].append(value)

        # 5. Log
        seconds += time.perf_counter() - start_time
        if global_step // 1000 > previous_step // 1000 or run.checkpoint_is_due(global_step):
            metrics = {name: torch.stack(values).mean() for name, values in history.items()}
            metrics["charts/learning_rate"] = args.policy_lr
            metrics["charts/SPS"] = (global_step - logged_step) / seconds
            run.log(global_step, metrics)
            history, logged_step, seconds = defaultdict(list), global_step, 0.0
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
