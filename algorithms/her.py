"""Hindsight experience replay (HER) with soft actor-critic (SAC): learn from a failure what it did achieve.

Where only reaching a goal is rewarded, nearly all early episodes look alike: the goal was missed. But each of them
reached something. HER replays a transition with such a goal in place of the true one, and with the reward for that
goal. The learner is SAC, as in sac.py: it needs no change, because the goal g is part of the observation.

    [1] y = r + gamma (min_i Q'_i(s', a') - alpha log pi(a'|s')), a' ~ pi, or y = r if s' is terminal   SAC, cf. Eq. 6
    [2] a = tanh(u), u = mean(s) + std(s) e, e ~ N(0, I): log pi(a|s) = log p(u) - sum_j log(1-a_j^2)   SAC, Appendix C
    [3] temperature: minimise E[-alpha log pi(a|s) - alpha H],  a ~ pi,  H = -dim(a)                         SAC, Eq. 18
    [4] critics: minimise sum_i E[(Q_i(s, a) - y)^2]                                                          SAC, Eq. 5
    [5] actor:   minimise E[alpha log pi(a|s) - min_i Q_i(s, a)],  a ~ pi                                 SAC, cf. Eq. 7
    [6] targets: theta' <- tau theta + (1 - tau) theta'                                                 SAC, Algorithm 1
    [7] a replayed transition gets, with probability k / (k + 1), a new goal g', which a step of its episode achieved;
        future: this step or a later one; episode: any step; final: the last one            HER, Sections 3.3 and 4.5
    [8] its reward becomes r' = r(achieved(s'), g')                                                 HER, cf. Algorithm 1

sac.py explains [1] to [6]; diff sac.py her.py shows what HER adds. achieved(s') is the goal that is reached in s', the
paper's m(s'). An observation is a Dict of observation, achieved_goal and desired_goal (g): see gymnasium-robotics.

Papers: Andrychowicz et al. 2017, arXiv:1707.01495 (HER); Haarnoja et al. 2018, arXiv:1812.05905 (SAC).

Differs from HER's paper (from SAC's: see sac.py):
- SAC in place of DDPG, two hidden layers of 256 units, not three of 64; one gradient step for each environment step.
- Transitions are replayed while their episode still runs, with goals from its steps so far (paper: whole episodes).
- Goals are drawn anew at each replay, as in HER's code. final, too, replaces k / (k + 1) of the goals, not half.
- g' also decides whether s' is terminal, where the environment can tell. The strategy random is left out.
- Networks see the achieved goal, too. Observations are not normalised, y is not clipped. Time limits: see sac.py.

    python algorithms/her.py --env-id gymnasium_robotics:FetchReach-v4
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[atari,box2d,classic-control,mujoco,toy-text]>=1.4,<2", "gymnasium-robotics>=1.4.2", "moviepy>=2.2",
#     "mujoco>=3.11,<3.12", "numpy>=2", "opencv-python-headless>=4.10", "torch>=2.13", "tqdm>=4.66", "tyro>=1",
#     "wandb>=0.31",
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

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm


@dataclass
class Args:
    # Run
    env_id: str = "gymnasium_robotics:FetchReach-v4"  # a Gymnasium environment, or module:id if a module registers it
    seed: int = 1  # seed of environments, networks and sampling
    total_timesteps: int = 20_000  # environment steps, summed over all environments
    num_envs: int = 1  # environments stepped together
    device: str = "auto"  # cpu, cuda, cuda:N or mps; auto: cpu
    threads: int | None = None  # CPU threads of PyTorch; None: 1; for layers of 256 try 2
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
    policy_lr: float = 1e-3  # learning rate of the actor; SAC's paper: 3e-4
    q_lr: float = 1e-3  # learning rate of the critics and of the temperature; SAC's paper: 3e-4
    gamma: float = 0.95  # discount; HER's paper: 0.98
    tau: float = 0.005  # [6] share of the new weights in an update of the targets
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    batch_size: int = 256  # transitions in a gradient step; HER's paper: 128
    learning_starts: int | None = None  # random steps before learning; None: total_timesteps / 10, at most 10,000
    utd: float = 1.0  # gradient steps per environment step: the update-to-data ratio
    num_critics: int = 2  # [1], [5] number of critics, all in the minimum
    alpha: float = 0.2  # [1], [5] temperature at the start, with --no-autotune always; SAC's authors: 1
    autotune: bool = True  # [3] tune the temperature
    her_strategy: Literal["future", "episode", "final"] = "future"  # [7] where goals come from; paper's best: future
    her_ratio: float = 4.0  # [7] k: replayed transitions with a new goal for each one with its true goal; 0: plain SAC

    def __post_init__(self) -> None:
        check_ranges(self, tau=(0, 1), learning_starts=(0, math.inf), buffer_size=(self.num_envs, math.inf))
        if self.learning_starts is None:
            self.learning_starts = min(self.total_timesteps // 10, 10_000)
        if self.autotune and self.alpha == 0:
            raise UsageError("--alpha 0 can't be tuned: add --no-autotune, or start above 0")


def network(in_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, out_dim))


class SAC(nn.Module):
    """The networks. They see actions in [-1, 1]; to_env maps these to the environment's Box, from low to high."""

    def __init__(self, args: Args, obs_shape: tuple[int, ...], space: gym.spaces.Box):  # space: of the actions
        super().__init__()
        self.obs_shape, self.action_space = obs_shape, space
        self.center, self.scale = (space.high + space.low) / 2, (space.high - space.low) / 2
        obs_dim, action_dim = obs_shape[0], space.low.size
        self.actor = network(obs_dim, 2 * action_dim)  # mean and log of the standard deviation of u in [2]
        self.critics = nn.ModuleList([network(obs_dim + action_dim, 1) for _ in range(args.num_critics)])
        self.target_critics = copy.deepcopy(self.critics)
        self.log_alpha = nn.Parameter(torch.tensor(args.alpha).log().clamp(-99))  # --alpha 0: e^-99, as log 0 is -inf

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:  # (B, obs_dim) -> (B, action_dim), (B,)
        mean, log_std = self.actor(obs).chunk(2, -1)
        return squashed_normal(mean, log_std.clamp(-20, 2), torch.randn_like(mean))  # clamped as in the authors' code

    def to_env(self, actions: Tensor) -> np.ndarray:  # (..., action_dim) -> (..., *action shape)
        space, actions, batch_shape = self.action_space, actions.cpu().numpy(), actions.shape[:-1]
        actions = self.center + self.scale * actions.reshape((*batch_shape, *space.shape))
        return np.clip(actions, space.low, space.high).astype(space.dtype)  # rounding can lead beyond the bounds

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The action without noise for an observation, (obs_dim,), or for each of a batch, (B, obs_dim)."""
        obs = torch.as_tensor(np.asarray(obs), dtype=torch.float32, device=next(self.parameters()).device)
        mean, _ = self.actor(obs).chunk(2, -1)
        return self.to_env(mean.tanh())


def q_values(critics: nn.ModuleList, obs: Tensor, actions: Tensor) -> Tensor:
    """Q_i(s, a) of each of n critics. (B, obs_dim), (B, action_dim) -> (n, B)"""
    inputs = torch.cat([obs, actions], -1)
    return torch.stack([critic(inputs).squeeze(-1) for critic in critics])


class Goals:
    """What HER needs of the environment: where the goals are in an observation, and reward and end for a new goal."""

    def __init__(self, args: Args, env: gym.Env):
        space = env.observation_space
        parts = space.spaces if isinstance(space, gym.spaces.Dict) else {}
        vectors = [isinstance(part, gym.spaces.Box) and len(part.shape) == 1 for part in parts.values()]
        names = {"observation", "achieved_goal", "desired_goal"}
        if set(parts) != names or not all(vectors) or parts["achieved_goal"].shape != parts["desired_goal"].shape:
            wanted = "vectors in a Dict of observation, achieved_goal and a desired_goal like it: see sac.py"
            raise UsageError(f"--env-id {args.env_id} observes {space}; her.py needs {wanted}")
        places, start = {}, 0
        for name, part in parts.items():  # an observation is a vector here: the parts of the Dict, one after another
            places[name] = slice(start, start + part.shape[0])
            start += part.shape[0]
        self.achieved, self.desired = places["achieved_goal"], places["desired_goal"]
        two_goals = np.zeros((2, *parts["desired_goal"].shape), np.float32)  # to try both functions
        try:
            self.compute_reward = env.get_wrapper_attr("compute_reward")  # a wrapper's, if it has its own
            assert np.shape(self.compute_reward(two_goals, two_goals, {})) == (2,), "it returned no batch"
        except Exception as error:
            raise UsageError(f"--env-id {args.env_id}: her.py needs compute_reward, for batches: {error!r}") from None
        self.can_end_episodes = env.has_wrapper_attr("compute_terminated")  # says whether s' is terminal for a new goal
        if self.can_end_episodes:
            try:
                self.compute_terminated = env.get_wrapper_attr("compute_terminated")
                self.compute_terminated(two_goals[0], two_goals[1], {})
            except NotImplementedError:
                self.can_end_episodes = False
        if not self.can_end_episodes:
            print(f"{args.env_id} has no compute_terminated: with another goal, terminated stays as it is")

    def outcomes(self, achieved: np.ndarray, goals: np.ndarray, terminated: np.ndarray) -> tuple:
        """[8] of R transitions: (R, goal_dim), (R, goal_dim), (R,) -> rewards (R,), terminated (R,)"""
        rewards = self.compute_reward(achieved, goals, {})  # [8]; {}: infos are not kept
        if self.can_end_episodes:  # unlike compute_reward, it takes no batch
            terminated = [self.compute_terminated(a, g, {}) for a, g in zip(achieved, goals, strict=True)]
        return rewards, terminated


class HindsightReplayBuffer:
    """The last transitions of N environments. A row holds one step of all; a new row takes the place of the oldest.

    Rows are numbered from the start of the run: row i is in place i % size. first and last are the numbers of the
    first and the last row of a transition's episode.
    """

    def __init__(self, buffer_size: int, num_envs: int, obs_dim: int, action_dim: int):
        needed = 4e-9 * buffer_size * (2 * obs_dim + action_dim + 6)  # GB: a float32 has four bytes, an int64 eight
        memory = 1e-9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
        if needed > 0.9 * memory:
            raise UsageError(f"--buffer-size {buffer_size} needs {needed:.1f} GB; this machine has {memory:.1f} GB")
        self.num_envs, self.size, self.added = num_envs, buffer_size // num_envs, 0  # size, added: in rows
        shapes = {"obs": (obs_dim,), "actions": (action_dim,), "rewards": (), "terminated": (), "next_obs": (obs_dim,)}
        self.arrays = {name: np.zeros((self.size, num_envs, *shape), np.float32) for name, shape in shapes.items()}
        self.arrays |= {name: np.zeros((self.size, num_envs), np.int64) for name in ("first", "last")}

    def add(self, **new: np.ndarray) -> None:
        """A step of all environments: obs, actions, rewards, terminated, next_obs and first, (N, ...) each."""
        for name, values in new.items():  # of one row, (N, ...)
            self.arrays[name][self.added % self.size] = values
        for i, first in enumerate(new["first"]):  # this row is now the last of its episode, also for the rows before
            self.arrays["last"][np.arange(first, self.added + 1) % self.size, i] = self.added
        self.added += 1

    def sample(self, batch_size: int, goals: Goals, args: Args) -> list[Tensor]:
        """obs, actions, rewards, terminated, next_obs: (B, obs_dim), (B, action_dim), (B,), (B,), (B, obs_dim)"""
        oldest = max(0, self.added - self.size)
        rows = torch.randint(oldest, self.added, (batch_size,)).numpy()
        envs = torch.randint(self.num_envs, (batch_size,)).numpy()
        *batch, first, last = [array[rows % self.size, envs] for array in self.arrays.values()]  # copies, not views
        obs, _, rewards, terminated, next_obs = batch

        # [7] A goal for each transition: the one achieved in a random row from earliest to last
        earliest = {"future": rows, "episode": np.maximum(first, oldest), "final": last}[args.her_strategy]
        share = torch.rand(batch_size, dtype=torch.float64).numpy()  # uniform in [0, 1)
        chosen = earliest + (share * (last + 1 - earliest)).astype(int)
        new_goals = self.arrays["next_obs"][chosen % self.size, envs][:, goals.achieved]  # (B, goal_dim)

        # Some of them, R of B, take it
        some = (torch.rand(batch_size) < args.her_ratio / (args.her_ratio + 1)).numpy()  # (B,) bool
        obs[some, goals.desired] = next_obs[some, goals.desired] = new_goals[some]  # copies: the buffer keeps g
        achieved = next_obs[some, goals.achieved]
        rewards[some], terminated[some] = goals.outcomes(achieved, new_goals[some], terminated[some])  # [8]
        return [torch.from_numpy(array) for array in batch]

    def state_dict(self) -> dict:
        filled = {name: torch.from_numpy(array[: self.added]) for name, array in self.arrays.items()}
        return filled | {"added": self.added}

    def load_state_dict(self, state: dict) -> None:
        self.added = state["added"]
        for name, array in self.arrays.items():
            array[: self.added] = state[name].numpy()


def td_target(rewards: Tensor, terminated: Tensor, next_values: Tensor, gamma: float) -> Tensor:
    """y, (B,). next_values: Q'_i - alpha log pi, (n, B). log pi has no i, so the minimum of these is that of [1]."""
    assert rewards.shape == terminated.shape == next_values.shape[1:]
    return rewards + gamma * (1 - terminated) * next_values.amin(0)  # [1]; a terminal state is worth nothing


def squashed_normal(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """a, (B, action_dim), and log pi(a|s), (B,). Reparameterised, as a function of noise: gradients reach mean, std."""
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)  # log p(u): noise is (u - mean) / std
    log_det = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))  # log(1 - tanh(u)^2), stable for large |u|
    return u.tanh(), (log_normal - log_det).sum(-1)  # [2]


@torch.no_grad()
def soft_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    for theta_target, theta in zip(target.parameters(), online.parameters(), strict=True):
        theta_target.lerp_(theta, tau)  # [6]: the share tau of the way from theta' to theta


def update(agent: SAC, optimizers: dict, batch: list[Tensor], args: Args) -> dict[str, Tensor]:
    """A gradient step with a batch of the buffer. Returns metrics to log."""
    obs, actions, rewards, terminated, next_obs = batch
    alpha = agent.log_alpha.detach().exp()  # a constant in [1] and [5]
    with torch.no_grad():
        next_actions, next_log_prob = agent.sample(next_obs)
        next_values = q_values(agent.target_critics, next_obs, next_actions) - alpha * next_log_prob  # (n, B) - (B,)
        targets = td_target(rewards, terminated, next_values, args.gamma)  # [1]
    values = q_values(agent.critics, obs, actions)  # (n, B)
    critic_losses = (values - targets).square().mean(-1)  # [4]; (n, B) - (B,) -> (n,)
    optimizers["critic_optimizer"].zero_grad()
    critic_losses.sum().backward()
    optimizers["critic_optimizer"].step()
    metrics = {f"losses/qf{i}_loss": loss for i, loss in enumerate(critic_losses.detach(), 1)}
    metrics["losses/q_values"] = values.detach().mean()

    new_actions, log_prob = agent.sample(obs)
    actor_loss = (alpha * log_prob - q_values(agent.critics, obs, new_actions).amin(0)).mean()  # [5]; (B,) - (B,)
    optimizers["actor_optimizer"].zero_grad()
    actor_loss.backward(inputs=list(agent.actor.parameters()))  # computes no gradient of the critics' weights
    optimizers["actor_optimizer"].step()
    entropy = -log_prob.detach().mean()
    if args.autotune:
        alpha_loss = agent.log_alpha.exp() * (entropy + actions.shape[1])  # [3]: alpha falls if entropy > H = -dim(a)
        optimizers["alpha_optimizer"].zero_grad()
        alpha_loss.backward()
        optimizers["alpha_optimizer"].step()
    soft_update(agent.target_critics, agent.critics, args.tau)
    return metrics | {"losses/actor_loss": actor_loss.detach(), "losses/entropy": entropy, "losses/alpha": alpha}


def make_agent(args: Args, obs_shape: tuple[int, ...], action_space: gym.Space) -> SAC:
    floats = isinstance(action_space, gym.spaces.Box) and np.issubdtype(action_space.dtype, np.floating)
    if not floats or np.abs([action_space.low, action_space.high]).max() >= 1e6:
        raise UsageError(f"--env-id {args.env_id} acts in {action_space}, no Box of floats below 1e6: see ppo.py")
    return SAC(args, obs_shape, action_space)


def train(args: Args) -> dict[str, float]:
    """Trains an agent, returns its last evaluation. run.step acts; run.goes_on evaluates and saves; run.log writes."""
    with contextlib.closing(Run(args)) as run, contextlib.closing(make_env(args)) as env:  # closed also after an error
        agent = make_agent(args, run.obs_shape, run.action_space).to(run.device)
        optimizers = {
            "actor_optimizer": torch.optim.Adam(agent.actor.parameters(), args.policy_lr, fused=True),
            "critic_optimizer": torch.optim.Adam(agent.critics.parameters(), args.q_lr, fused=True),
            "alpha_optimizer": torch.optim.Adam([agent.log_alpha], args.q_lr, fused=True),
        }
        action_dim, buffer_size = run.action_space.low.size, min(args.buffer_size, args.total_timesteps)
        env.reset(seed=args.seed)  # compute_reward may need what this sets
        goals = Goals(args, env.env)  # below FlattenObservation; an environment of its own: asking may change it
        buffer = HindsightReplayBuffer(buffer_size, args.num_envs, *run.obs_shape, action_dim)
        run.start(model=agent, buffer=buffer, **optimizers)  # what a checkpoint holds
        while run.goes_on():  # False at the end
            # 1. Act: one step in each of N environments
            obs, first_step = run.obs, run.global_step  # before run.step, which changes both
            first = [buffer.added - len(past) for past in run.actions]  # rows where episodes began; past: their actions
            with torch.no_grad():
                if first_step < args.learning_starts:
                    actions = torch.empty(args.num_envs, action_dim).uniform_(-1, 1)
                else:
                    actions, _ = agent.sample(torch.from_numpy(obs).to(run.device))
            next_obs, rewards, terminated, truncated, infos = run.step(agent.to_env(actions))
            buffer.add(obs=obs, actions=actions.cpu(), rewards=rewards, terminated=terminated, next_obs=next_obs,
                       first=first)  # fmt: skip
            for i in np.flatnonzero(terminated | truncated):
                for name in "is_success", "success":  # FetchReach's, and PointMaze's
                    if name in infos[i]:
                        run.log({"charts/success": np.mean(infos[i][name])})

            # 2. Learn: utd gradient steps for each of the N environment steps of this pass
            made = int(args.utd * max(0, first_step - args.learning_starts))  # gradient steps so far
            due = int(args.utd * max(0, run.global_step - args.learning_starts))
            for number in range(made + 1, due + 1):
                batch = [part.to(run.device) for part in buffer.sample(args.batch_size, goals, args)]
                metrics = update(agent, optimizers, batch, args)
                if number % 100 == 0:  # 3. Log
                    run.log(metrics | {"charts/learning_rate": args.policy_lr})
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
