"""Deep Q-network (DQN): learn the value of each action by bootstrapping, and act greedily with respect to it.

Q-learning with a network in place of the table. Two things made it stable: a replay buffer, from which old transitions
are drawn at random, so that neighbours in a batch have nothing to do with each other; and a target network Q', an older
copy of the weights, so that the targets don't move with every step.

    [1] y = r + gamma Q'(s', a*)  with  a* = argmax_a Q'(s', a), or y = r where s' is terminal     DQN, Algorithm 1
    [2] a* = argmax_a Q(s', a) instead: Q chooses and Q' judges, so that no error chooses itself   Double DQN, cf. Eq. 4
    [3] L = E[(y - Q(s, a))^2]                                                                     DQN, Algorithm 1
    [4] Q(s, a) = V(s) + A(s, a) - mean_a' A(s, a')                                                Dueling, Eq. 9
    [5] explore: with probability epsilon any action, else argmax_a Q(s, a)                        DQN, Algorithm 1
        or Boltzmann: the action a with a probability proportional to exp(Q(s, a) / temperature)
    [6] hold the random action of [5] for n steps, with P(n) proportional to 1 / n^2               ez-greedy, Sec. 4.2
    [7] theta' <- tau theta + (1 - tau) theta'  every so many gradient steps; tau 1: a copy        DQN, Algorithm 1

Here gamma is the discount; a prime marks what comes next, and the target network, whose weights are theta'.

DQN: Mnih et al. 2015, doi:10.1038/nature14236; without a target network already in arXiv:1312.5602. Double DQN: van
Hasselt et al. 2016, arXiv:1509.06461. Dueling networks: Wang et al. 2016, arXiv:1511.06581. ez-greedy, for goals that
single random steps never come upon: Dabney et al. 2021, arXiv:2006.01782.

Differs from the papers: Adam in place of RMSprop, with a learning rate annealed to 0; errors in the gradient of [3] are
clipped to [-1, 1] only with --huber, the gradient's norm only with --max-grad-norm; exploration follows its schedule
from the first step, where DQN acts at random until learning starts; evaluation is greedy; the dueling streams part
after the last hidden layer, not before it, and gradients are not scaled there; a held action ends with its episode. By
default y is Double DQN's, with [2], and the target network follows a little at each gradient step, as in DDPG:
Lillicrap et al. 2016, arXiv:1509.02971. DQN's own are --no-double-q, and --tau 1 with, say, --target-network-frequency
500: a copy every 500 gradient steps. A time limit does not count as a terminal state: the value of the last observation
stands for the rest of the episode. Prioritised replay and n-step returns are left out.

Atari (ALE/...): 84 x 84 greyscale, maximum over two frames, each action held for four frames, the last four images
stacked, up to 30 no-ops, sticky actions, the sign of the reward; an episode is a game, not a life. Usual settings for
it are --total-timesteps 10000000 --buffer-size 1000000 --learning-starts 80000 --train-frequency 4 --batch-size 32
--learning-rate 1e-4 --tau 1 --target-network-frequency 2000 --end-e 0.01 --huber.

    python algorithms/dqn.py --env-id CartPole-v1
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "filelock>=3.20", "gymnasium[atari,box2d,classic-control,mujoco,toy-text]>=1.4,<2", "moviepy>=2.2",
#     "mujoco>=3.11,<3.12", "numpy>=2", "opencv-python-headless>=4.10", "torch>=2.13", "tqdm>=4.66", "tyro>=1",
#     "wandb>=0.31",
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
    env_id: str = "CartPole-v1"  # a Gymnasium environment, or module:id if a module registers it
    seed: int = 1  # all randomness follows from it
    total_timesteps: int = 50_000  # environment steps, summed over all environments
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

    learning_rate: float = 5e-4  # of Adam
    anneal_lr: bool = True  # anneal it linearly to 0
    gamma: float = 0.99  # discount
    buffer_size: int = 100_000  # transitions in the replay buffer
    batch_size: int = 128  # transitions in a gradient step
    learning_starts: int = 1_000  # environment steps before the first gradient step
    train_frequency: int = 1  # environment steps, summed over all environments, between gradient steps
    target_network_frequency: int = 1  # gradient steps, not environment steps, between updates of the target network
    tau: float = 0.01  # [7] share of the new weights in such an update; 1: a copy
    exploration: Literal["epsilon-greedy", "ez-greedy", "boltzmann"] = "epsilon-greedy"  # [5], [6]
    start_e: float = 1.0  # [5] epsilon, or Boltzmann's temperature in units of the return, at the start
    end_e: float = 0.05  # [5] the same from the end of exploration_fraction on
    exploration_fraction: float = 0.2  # share of the run in which it goes linearly from start_e to end_e
    max_grad_norm: float | None = None  # gradients with a larger norm are scaled down to it; None: none are
    norm_obs: bool = False  # normalise vector observations by their running mean and standard deviation
    huber: bool = False  # [3] as Huber loss, e^2 / 2, and |e| - 1/2 where |e| > 1: its slope is clipped, as in DQN
    double_q: bool = True  # [2] Double DQN
    dueling: bool = False  # [4] dueling network

    def __post_init__(self) -> None:
        bounds = (0, math.inf if self.exploration == "boltzmann" else 1)
        check_and_complete(self, learning_starts=(0, math.inf), buffer_size=(self.num_envs, math.inf), tau=(0, 1),
                           start_e=bounds, end_e=bounds, exploration_fraction=(0, 1))  # fmt: skip


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


class DuelingHead(nn.Module):
    """[4] State value and advantages apart: what all actions have in common is learned once."""

    def __init__(self, hidden_dim: int, num_actions: int):
        super().__init__()
        self.value = nn.Linear(hidden_dim, 1)
        self.advantage = nn.Linear(hidden_dim, num_actions)

    def forward(self, hidden: Tensor) -> Tensor:  # (B, hidden_dim) -> (B, A)
        advantage = self.advantage(hidden)
        return self.value(hidden) + advantage - advantage.mean(-1, keepdim=True)  # [4]; (B, 1) + (B, A) - (B, 1)


class QNetwork(nn.Module):
    """The values of all actions in a state: two hidden layers for vectors, the Nature CNN for images."""

    def __init__(
        self, obs_shape: tuple[int, ...], num_actions: int, start: int,
        dueling: bool = False, norm_obs: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.num_actions = num_actions
        self.start = start  # the environment counts from here, the network from 0
        if len(obs_shape) == 3:
            self.hidden, hidden_dim = NatureCNN(), 512
        else:  # not orthogonal(): with biases at 0 the values would start in proportion to the input
            self.hidden = nn.Sequential(nn.Linear(*obs_shape, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
            hidden_dim = 128
        self.head = DuelingHead(hidden_dim, num_actions) if dueling else nn.Linear(hidden_dim, num_actions)
        self.obs_stats = RunningMeanStd(*obs_shape) if norm_obs else None

    def forward(self, obs: Tensor) -> Tensor:  # (B, *obs_shape) -> (B, A)
        obs = obs if self.obs_stats is None else self.obs_stats(obs)
        return self.head(self.hidden(obs))

    @torch.inference_mode()
    def q_values(self, obs: np.ndarray) -> Tensor:  # (B, *obs_shape) -> (B, A), for acting
        return self(torch.from_numpy(obs).to(next(self.parameters()).device)).cpu()

    def act(self, obs: np.ndarray) -> np.ndarray:
        """The best actions: deterministic, for evaluation. (B, *obs_shape) -> (B,)"""
        return self.q_values(obs).argmax(-1).numpy() + self.start


class ReplayBuffer:
    """The last transitions of N environments, with each observation stored once.

    An observation is a frame (vectors), or a stack of K frames (images) of which only the newest is new. A transition
    holds the numbers of the K + 1 frames in its observation and its next one, so nothing is guessed about where
    episodes begin and end.

    Frames, and rows of N transitions, are numbered from the start of the run; each array is a ring, in which number n
    is at n modulo its length. An episode of T steps has T + 1 frames: the 2 % more frames than transitions are enough
    if T is 50 or more on average. Where episodes are shorter, the oldest transitions are forgotten a little earlier.
    """

    ARRAYS = "frames", "frame_numbers", "actions", "rewards", "terminated"

    def __init__(self, buffer_size: int, num_envs: int, obs_shape: tuple[int, ...]):
        images = len(obs_shape) == 3
        self.obs_shape, self.stack = obs_shape, obs_shape[0] if images else 1
        frame_shape, dtype = (obs_shape[1:], np.uint8) if images else (obs_shape, np.float32)
        max_rows = buffer_size // num_envs
        max_frames = math.ceil(1.02 * buffer_size) + 2 * num_envs * (self.stack + 1)  # enough for the newest row
        frame_bytes = math.prod(frame_shape) * np.dtype(dtype).itemsize
        needed = max_frames * frame_bytes + buffer_size * (8 * (self.stack + 1) + 8 + 4 + 1)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > 0.9 * memory:
            refuse(f"--buffer-size {buffer_size} needs {needed / 1e9:.1f} GB; this machine has {memory / 1e9:.1f} GB")
        self.frames = np.zeros((max_frames, *frame_shape), dtype)
        self.frame_numbers = np.zeros((max_rows, num_envs, self.stack + 1), np.int64)
        self.actions = np.zeros((max_rows, num_envs), np.int64)
        self.rewards = np.zeros((max_rows, num_envs), np.float32)
        self.terminated = np.zeros((max_rows, num_envs), np.bool_)
        self.num_frames = self.num_rows = self.oldest_row = 0  # oldest_row: of those with all their frames

    def put_frames(self, obs: np.ndarray) -> np.ndarray:  # (B, *obs_shape) -> (B,)
        """Stores the newest frame of each observation; returns their numbers."""
        numbers = np.arange(self.num_frames, self.num_frames + len(obs))
        self.frames[numbers % len(self.frames)] = obs if self.stack == 1 else obs[:, -1]
        self.num_frames += len(obs)
        return numbers

    def begin(self, obs: np.ndarray) -> None:  # (N, *obs_shape)
        """New episodes in all environments. The first stack of an episode is its first frame, K times."""
        self.current = np.repeat(self.put_frames(obs)[:, None], self.stack, axis=1)  # (N, K): the numbers of its frames

    def add(
        self, actions: np.ndarray, rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray,
        obs: np.ndarray, infos: dict,
    ) -> None:  # fmt: skip
        """What envs.step took and returned: after an end, obs is the next episode's first. (N, ...) each"""
        ended = terminated | truncated
        next_obs = obs.copy()
        for i in np.flatnonzero(ended):
            next_obs[i] = infos["final_obs"][i]
        row = self.num_rows % len(self.actions)
        self.frame_numbers[row, :, :-1] = self.current  # (N, K)
        self.frame_numbers[row, :, -1] = self.put_frames(next_obs)
        self.actions[row], self.rewards[row], self.terminated[row] = actions, rewards, terminated
        self.num_rows += 1
        self.current = self.frame_numbers[row, :, 1:].copy()
        if ended.any():
            self.current[ended] = self.put_frames(obs[ended])[:, None]
        # Forget the rows that are overwritten, and those of which a frame is
        self.oldest_row = max(self.oldest_row, self.num_rows - len(self.actions))
        oldest_frame = self.num_frames - len(self.frames)
        while self.frame_numbers[self.oldest_row % len(self.actions)].min() < oldest_frame:
            self.oldest_row += 1

    def sample(self, batch_size: int, device: str) -> tuple[Tensor, ...]:
        """obs (B, *obs_shape), actions (B,), rewards (B,), terminated (B,), next_obs (B, *obs_shape)"""
        num_envs = self.actions.shape[1]
        low, high = self.oldest_row * num_envs, self.num_rows * num_envs  # a row and an environment as one number
        where = np.random.randint(low, high, batch_size) % self.actions.size  # (B,)
        numbers = self.frame_numbers.reshape(-1, self.stack + 1)[where]  # (B, K + 1)
        frames = torch.from_numpy(self.frames[numbers % len(self.frames)]).to(device)  # (B, K + 1, *frame_shape)
        obs, next_obs = (part.reshape(-1, *self.obs_shape) for part in (frames[:, :-1], frames[:, 1:]))
        columns = (array.reshape(-1)[where] for array in (self.actions, self.rewards, self.terminated))
        actions, rewards, terminated = (torch.from_numpy(column).to(device) for column in columns)
        return obs, actions, rewards, terminated, next_obs

    def state_dict(self) -> dict:
        state = {name: getattr(self, name) for name in ("num_frames", "num_rows", "oldest_row")}
        for name in self.ARRAYS:
            filled = self.num_frames if name == "frames" else self.num_rows
            # torch.save writes all the memory behind a tensor; behind that of a NumPy slice is only the slice
            state[name] = torch.from_numpy(getattr(self, name)[:filled])
        return state

    def load_state_dict(self, state: dict) -> None:
        for name in self.ARRAYS:
            getattr(self, name)[: len(state[name])] = state[name].numpy()
        self.num_frames, self.num_rows, self.oldest_row = (
            state[name] for name in ("num_frames", "num_rows", "oldest_row")
        )


def td_target(rewards: Tensor, terminated: Tensor, target_q: Tensor, choosing_q: Tensor, gamma: float) -> Tensor:
    """The target y of Q(s, a), (B,). rewards, terminated: (B,); target_q, choosing_q: (B, A), of the next observation.

    target_q is Q' of the equations. choosing_q chooses the next action: it is Q' in DQN [1], and Q in Double DQN [2].
    """
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


def gradient_steps_until(step: int, args: Args) -> int:
    """Gradient steps that are due after so many environment steps."""
    return max(0, step - args.learning_starts) // args.train_frequency


def explore(q_network: QNetwork, obs: np.ndarray, epsilon: float, held: np.ndarray, args: Args) -> np.ndarray:
    """[5] Actions counted from 0; epsilon is also Boltzmann's temperature. (N, *obs_shape) -> (N,)

    held: (2, N), the random actions that ez-greedy holds and for how many more steps. It is changed in place.
    """
    if args.exploration == "boltzmann":
        q_values = q_network.q_values(obs)
        gumbel = -torch.empty_like(q_values).exponential_().log()  # minus the log of an exponential variable
        return (q_values + epsilon * gumbel).argmax(-1).numpy()  # a sample of softmax(Q / epsilon): Gumbel-max trick
    at_random = np.random.random(len(obs)) < epsilon
    actions = np.random.randint(q_network.num_actions, size=len(obs))
    if args.exploration == "ez-greedy":  # [6]
        begins = at_random & (held[1] == 0)
        held[:, begins] = actions[begins], np.random.zipf(2, begins.sum())
        at_random, actions = held[1] > 0, held[0].copy()
        held[1] -= at_random
    if not at_random.all():
        actions = np.where(at_random, actions, q_network.q_values(obs).argmax(-1).numpy())
    return actions


def update(
    q_network: QNetwork, target_network: QNetwork, optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, ...], args: Args,
) -> dict[str, Tensor]:  # fmt: skip
    """A gradient step with a batch of the buffer. Returns what to log."""
    obs, actions, rewards, terminated, next_obs = batch
    with torch.no_grad():
        target_q = target_network(next_obs)
        choosing_q = q_network(next_obs) if args.double_q else target_q  # [2] or [1]
        targets = td_target(rewards, terminated, target_q, choosing_q, args.gamma)
    loss, values = q_loss(q_network(obs), actions, targets, args.huber)
    optimizer.zero_grad()
    loss.backward()
    max_norm = math.inf if args.max_grad_norm is None else args.max_grad_norm
    grad_norm = nn.utils.clip_grad_norm_(q_network.parameters(), max_norm)  # the norm before clipping
    optimizer.step()
    return {"losses/td_loss": loss.detach(), "losses/q_values": values.detach().mean(), "losses/grad_norm": grad_norm}


def make_agent(args: Args, env: gym.Env) -> QNetwork:
    space = env.action_space
    if not isinstance(space, gym.spaces.Discrete):
        others = "ppo.py, and for Box of floats sac.py and td3.py"
        refuse(f"--env-id {args.env_id} acts in {space}; dqn.py knows Discrete only: see {others}")
    if args.norm_obs and len(env.observation_space.shape) == 3:
        refuse(f"--norm-obs is for vectors, and --env-id {args.env_id} observes images, which are divided by 255")
    return QNetwork(env.observation_space.shape, int(space.n), int(space.start), args.dueling, args.norm_obs)


def train(args: Args) -> None:
    env = make_env(args.env_id, film=args.capture_video)  # for its spaces, and to find out now if it can't be filmed
    args.device = choose_device(args.device, small=len(env.observation_space.shape) == 1)
    torch.manual_seed(args.seed)
    q_network = make_agent(args, env).to(args.device)
    target_network = copy.deepcopy(q_network)
    target_network.obs_stats = q_network.obs_stats  # one normaliser for both
    optimizer = torch.optim.Adam(q_network.parameters(), args.learning_rate, fused=True)
    buffer = ReplayBuffer(args.buffer_size, args.num_envs, env.observation_space.shape)
    run = Run(args, args.env_id, model=q_network, target=target_network, optimizer=optimizer, buffer=buffer)
    global_step = run.restore()  # 0 in a new run

    while True:
        # 1. Evaluate and save where it is due, and at the end
        if run.evaluation_is_due(global_step):
            run.log(global_step, evaluate(q_network.act, args, f"step-{global_step}", run.stopped))
        if run.checkpoint_is_due(global_step):
            run.save(global_step)
        if global_step == args.total_timesteps:
            break

        # 2. At the start and after each checkpoint, make the environments anew and reseed, also in a run that nothing
        #    interrupts: then one that is killed, and resumed from a checkpoint, gives the same results
        if global_step == run.checkpoint_step:
            envs, obs = make_envs(args, global_step)
            buffer.begin(obs)
            episode_return, episode_length = np.zeros((2, args.num_envs))
            held = np.zeros((2, args.num_envs), np.int64)  # [6]
            history, logged_step, seconds = defaultdict(list), global_step, 0.0  # since the last row of losses

        # 3. Act: one step in each of N environments
        start_time = time.perf_counter()
        duration = args.exploration_fraction * args.total_timesteps
        epsilon = linear_schedule(args.start_e, args.end_e, duration, global_step)
        actions = explore(q_network, obs, epsilon, held, args)
        obs, rewards, terminated, truncated, infos = envs.step(actions + q_network.start)
        previous_step, global_step = global_step, global_step + args.num_envs
        episode_return += rewards
        episode_length += 1
        for i in np.flatnonzero(terminated | truncated):
            ended = {"charts/episodic_return": episode_return[i], "charts/episodic_length": episode_length[i]}
            run.log(global_step, ended)
            episode_return[i] = episode_length[i] = 0
            held[:, i] = 0
        if q_network.obs_stats:
            q_network.obs_stats.update(torch.from_numpy(obs).to(args.device))
        learned_rewards = np.sign(rewards) if args.env_id.startswith("ALE/") else rewards
        buffer.add(actions, learned_rewards, terminated, truncated, obs, infos)

        # 4. Learn: a gradient step for every train_frequency environment steps, whatever the number of environments
        taken, due = gradient_steps_until(previous_step, args), gradient_steps_until(global_step, args)
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - previous_step / args.total_timesteps)
        for number in range(taken + 1, due + 1):
            batch = buffer.sample(args.batch_size, args.device)
            for name, value in update(q_network, target_network, optimizer, batch, args).items():
                history[name].append(value)
            if number % args.target_network_frequency == 0:
                with torch.no_grad():
                    target, online = [*target_network.parameters()], [*q_network.parameters()]
                    torch._foreach_lerp_(target, online, args.tau)  # [7]: a step of tau from target to online

        # 5. Log
        seconds += time.perf_counter() - start_time
        if global_step // 1000 > previous_step // 1000 or run.checkpoint_is_due(global_step):
            metrics = {name: torch.stack(values).mean() for name, values in history.items()}
            metrics["charts/epsilon"] = epsilon
            metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
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
