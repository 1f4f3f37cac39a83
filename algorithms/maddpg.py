"""Multi-agent deep deterministic policy gradient (MADDPG): centralised training, decentralised execution.

As all agents learn, the environment of each is non-stationary: it contains the others' policies. But given the actions
of all, it is stationary. So in training each agent has a centralised critic, which sees all observations and actions.
Its actor sees the agent's own observation only, and acts without the critic. Each critic learns its own agent's return,
so agents may cooperate, compete, or both.

    [1] critics: minimise E[(Q_i(x, a_1, ..., a_N) - y_i)^2]                                               MADDPG, Eq. 6
        y_i = r_i + gamma Q'_i(x', a'_1, ..., a'_N)  with  a'_j = mu'_j(o'_j), or y_i = r_i where x' is terminal for i
    [2] actors:  maximise E[Q_i(x, a_1, ..., a_i, ..., a_N)]  with  a_i = mu_i(o_i)                    MADDPG, cf. Eq. 5
    [3] targets: theta' <- tau theta + (1 - tau) theta'                                              MADDPG, Algorithm 1

Agent i of N observes o_i, takes action a_i by its policy mu_i, gets reward r_i. x is (o_1, ..., o_N). A prime: the next
step, or a target network with weights theta'. Only a'_j and, in [2], a_i do not come from the replay buffer.

Papers: Lowe et al. 2017, arXiv:1706.02275; DDPG: 1509.02971. Actors' gradient: 1611.01144 (gumbel), 1709.00503 (exact).

Differs from the paper:
- Agents do not infer the others' policies, and have one policy each, not an ensemble. All learn from the same batch.
- No gradient is clipped; the authors' code clips that of each weight matrix to norm 0.5. Other schedule: see Args.
- In mpe2's simple_spread_v3 r_i = -(distances + i's collisions) / 2; the authors' r_i is 2 (r_1 + ... + r_N) for all.
- Discrete actions are one-hot: argmax in y_i and in evaluation, else sampled. The authors' are soft Gumbel samples.
- Box actions get Gaussian noise, in the paper noise of a random process. The authors' code has a Gaussian policy.
- As in the authors' code, an actor's loss has a small penalty, and a time limit is not a terminal state.

    python algorithms/maddpg.py --env-id simple_spread_v3
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[atari,box2d,classic-control,mujoco,toy-text]>=1.4,<2", "moviepy>=2.2", "mpe2>=1.1,<2", "numpy>=2",
#     "pettingzoo>=1.27,<2", "torch>=2.13", "tqdm>=4.66", "tyro>=1", "wandb>=0.31",
# ]
# ///

import contextlib
import copy
import importlib
import inspect
import io
import itertools
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from pettingzoo import ParallelEnv
from torch import Tensor, nn
from tqdm import tqdm


@dataclass
class Args:
    # Run
    env_id: str = "simple_spread_v3"  # an mpe2 environment, or module:function that makes a ParallelEnv of PettingZoo
    seed: int = 1  # seed of environments, networks and sampling
    total_timesteps: int = 625_000  # environment steps, summed over all environments
    num_envs: int = 25  # environments stepped together
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
    algorithm: Literal["maddpg", "ddpg"] = "maddpg"  # ddpg, the paper's baseline: critics see their own agent only
    continuous_actions: bool = False  # mpe2's environments: actions in a box instead of discrete ones
    actor_gradient: Literal["gumbel", "exact"] = "gumbel"  # [2], discrete: by a Gumbel-softmax sample, or all actions
    learning_rate: float = 1e-3  # of Adam, for actors and critics; paper: 0.01
    anneal_lr: bool = False  # let the learning rate fall linearly to 0
    beta2: float = 0.999  # of Adam; with 0.9, its beta1, no step moves a weight by more than the learning rate
    gamma: float = 0.95  # discount
    tau: float = 0.01  # [3] share of the new weights in an update of the targets
    hidden_size: int = 128  # units in each of the two hidden layers; paper: 64
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    batch_size: int = 256  # transitions in a gradient step; paper: 1024
    learning_starts: int = 5_000  # environment steps before the first gradient step; the authors' code: 25,600
    train_frequency: int = 10  # environment steps, summed over all environments, per gradient step; paper: 100
    exploration_noise: float = 0.2  # std of Gaussian noise on box actions, for a range of [-1, 1]; discrete: sampled
    output_coef: float = 1e-3  # weight of the penalty, the mean square of an actor's outputs, in its loss; paper: 0
    opponent_dir: str | None = None  # with --evaluate: a second run; each run's adversaries play each run's good agents

    def __post_init__(self) -> None:
        check_ranges(self, tau=(0, 1), beta2=(0, 0.9999), learning_starts=(0, 1e12), buffer_size=(self.num_envs, 1e12))
        if self.opponent_dir is not None and not self.evaluate:
            raise UsageError("--opponent-dir needs --evaluate")


def make_network(in_dim: int, out_dim: int, size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, out_dim))


class MADDPG(nn.Module):
    """The networks of all N agents. A name that ends in _n holds an item for each agent."""

    def __init__(self, args: Args, env: "JointEnv"):
        super().__init__()
        self.args, self.names, self.space_n = args, env.names, (env.obs_space_n, env.action_space_n)
        self.obs_dim_n, self.action_dim_n = env.obs_dim_n, env.action_dim_n
        self.discrete_n = [isinstance(space, gym.spaces.Discrete) for space in env.action_space_n]
        self.actor_n, self.critic_n = nn.ModuleList(), nn.ModuleList()
        for obs_dim, action_dim in zip(env.obs_dim_n, env.action_dim_n, strict=True):
            in_dim = obs_dim + action_dim if args.algorithm == "ddpg" else sum(env.obs_dim_n + env.action_dim_n)
            self.actor_n.append(make_network(obs_dim, action_dim, args.hidden_size))
            self.critic_n.append(make_network(in_dim, 1, args.hidden_size))
        self.target_actor_n, self.target_critic_n = copy.deepcopy(self.actor_n), copy.deepcopy(self.critic_n)

    def choose(self, i: int, outputs: Tensor, explore: bool = False) -> Tensor:  # both (..., action_dim)
        """mu_i(o_i). Discrete: logits -> one-hot, argmax or sampled. Box: the sigmoid, in [0, 1], or with noise."""
        if self.discrete_n[i]:
            chosen = torch.multinomial(outputs.softmax(-1), 1).squeeze(-1) if explore else outputs.argmax(-1)
            return nn.functional.one_hot(chosen, outputs.shape[-1]).float()
        if explore:  # exploration_noise is for [-1, 1], and this range is half as wide
            return (outputs.sigmoid() + self.args.exploration_noise / 2 * torch.randn_like(outputs)).clamp(0, 1)
        return outputs.sigmoid()

    @torch.inference_mode()
    def act(self, obs: np.ndarray, explore: bool = False) -> np.ndarray:
        """All agents' observations side by side, (O,) or (B, O), to all their actions side by side, (A,) or (B, A)"""
        obs = torch.as_tensor(np.asarray(obs), dtype=torch.float32, device=next(self.parameters()).device)
        output_n = [actor(o) for actor, o in zip(self.actor_n, obs.split(self.obs_dim_n, -1), strict=True)]
        return torch.cat([self.choose(i, outputs, explore) for i, outputs in enumerate(output_n)], -1).cpu().numpy()

    def q_value(self, critic_n: nn.ModuleList, i: int, obs_n: Sequence[Tensor], action_n: Sequence[Tensor]) -> Tensor:
        """Q_i: (B, obs_dim) and (B, action_dim) of each agent -> (B,)"""
        seen = [obs_n[i], action_n[i]] if self.args.algorithm == "ddpg" else [*obs_n, *action_n]
        return critic_n[i](torch.cat(seen, -1)).squeeze(-1)

    def actor_loss(self, i: int, obs_n: Sequence[Tensor], action_n: Sequence[Tensor]) -> Tensor:
        """[2] negated, plus a penalty. Agent i does what its actor says now, the others what they did in the buffer."""
        outputs = self.actor_n[i](obs_n[i])  # (B, action_dim)

        def q_of(action: Tensor) -> Tensor:  # (B, action_dim) -> (B,)
            return self.q_value(self.critic_n, i, obs_n, [*action_n[:i], action, *action_n[i + 1 :]])

        if not self.discrete_n[i]:  # the gradient of Q_i flows through the action into the actor, as in DDPG
            q = q_of(self.choose(i, outputs))
        elif self.args.actor_gradient == "gumbel":
            # Forward a one-hot sample, backward the gradient of a soft one: the straight-through Gumbel-softmax. Biased
            # even for a linear Q_i. Besides, [1] fits Q_i's values at one-hot actions, not the slope that is used here
            q = q_of(nn.functional.gumbel_softmax(outputs, hard=True))
        else:  # exact: the mean of Q_i over the softmax policy (mean actor-critic); no gradient of Q_i is needed
            with torch.no_grad():
                all_actions = torch.eye(self.action_dim_n[i], device=outputs.device)
                q_of_each = torch.stack([q_of(action.expand_as(outputs)) for action in all_actions], -1)
            q = (outputs.softmax(-1) * q_of_each).sum(-1)
        return -q.mean() + self.args.output_coef * outputs.square().mean()


class ReplayBuffer:
    """The last transitions of all environments, each one row: x, a, r, terminated, x' of all agents."""

    def __init__(self, buffer_size: int, widths: list[int], device: str):
        needed = 4e-9 * buffer_size * sum(widths)  # GB: a float32 has four bytes
        memory = 1e-9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
        if needed > 0.9 * memory:
            raise UsageError(f"--buffer-size {buffer_size} needs {needed:.1f} GB; this machine has {memory:.1f} GB")
        self.rows = torch.empty(buffer_size, sum(widths), device=device)  # on a CPU it takes memory as it fills
        self.widths, self.num_added = widths, 0

    def add(self, *parts: np.ndarray) -> None:  # (num_envs, width) each
        new = torch.from_numpy(np.concatenate(parts, axis=1, dtype=np.float32)).to(self.rows.device)
        self.rows[(self.num_added + torch.arange(len(new))) % len(self.rows)] = new
        self.num_added += len(new)

    def sample(self, batch_size: int) -> tuple[Tensor, ...]:  # (B, width) each
        filled = min(self.num_added, len(self.rows))
        return self.rows[torch.randint(filled, (batch_size,), device=self.rows.device)].split(self.widths, dim=1)

    def state_dict(self) -> dict:  # clone: torch.save would write all the memory behind a slice
        return {"rows": self.rows[: self.num_added].clone(), "num_added": self.num_added}

    def load_state_dict(self, state: dict) -> None:
        self.num_added = state["num_added"]
        self.rows[: self.num_added] = state["rows"].to(self.rows.device)


def update(agent: MADDPG, optimizers: dict, batch: tuple[Tensor, ...], args: Args) -> dict[str, Tensor]:
    """A gradient step of all critics, then of all actors, on one batch (Algorithm 1: one each). Returns metrics."""
    obs, actions, rewards, terminated, next_obs = batch  # (B, O), (B, A), (B, N), (B, N), (B, O)
    obs_n, next_obs_n = obs.split(agent.obs_dim_n, -1), next_obs.split(agent.obs_dim_n, -1)
    action_n, critic_losses, metrics = actions.split(agent.action_dim_n, -1), [], {}
    with torch.no_grad():
        next_action_n = [agent.choose(i, actor(next_obs_n[i])) for i, actor in enumerate(agent.target_actor_n)]
        next_q_n = [agent.q_value(agent.target_critic_n, i, next_obs_n, next_action_n) for i in range(len(agent.names))]
    for i, name in enumerate(agent.names):
        y = rewards[:, i] + args.gamma * (1 - terminated[:, i]) * next_q_n[i]  # [1]; (B,)
        q = agent.q_value(agent.critic_n, i, obs_n, action_n)
        critic_losses.append((q - y).square().mean())  # [1]
        metrics |= {f"losses/td_loss/{name}": critic_losses[i].detach(), f"losses/q_values/{name}": q.detach().mean()}
    optimizers["critics"].zero_grad()
    sum(critic_losses).backward()  # critics share no weights, so a step on the sum is a step on each
    optimizers["critics"].step()

    actor_losses = [agent.actor_loss(i, obs_n, action_n) for i in range(len(agent.names))]
    metrics |= {f"losses/actor_loss/{name}": actor_losses[i].detach() for i, name in enumerate(agent.names)}
    optimizers["actors"].zero_grad()
    sum(actor_losses).backward(inputs=list(agent.actor_n.parameters()))  # computes no gradient of the critics' weights
    optimizers["actors"].step()

    with torch.no_grad():
        for targets, nets in (agent.target_actor_n, agent.actor_n), (agent.target_critic_n, agent.critic_n):
            for theta_target, theta in zip(targets.parameters(), nets.parameters(), strict=True):
                theta_target.lerp_(theta, args.tau)  # [3]: the share tau of the way from theta' to theta
    return metrics


def make_agent(args: Args, obs_shape: tuple[int, ...], action_space: gym.Space) -> MADDPG:
    """Opens an environment, which knows each agent's spaces. obs_shape, action_space: of all joined, unused here."""
    with contextlib.closing(make_env(args)) as env:
        for name, space, obs_dim in zip(env.names, env.action_space_n, env.obs_dim_n, strict=True):
            box = isinstance(space, gym.spaces.Box) and space.dtype.kind == "f" and (space.high - space.low).max() < 2e6
            if obs_dim > 3000 or not (box or isinstance(space, gym.spaces.Discrete)):
                raise UsageError(f"{name} of {args.env_id} sees images or acts in {space}, no Discrete or bounded Box")
        return MADDPG(args, env)


def train(args: Args) -> dict[str, float]:
    """Trains all agents, returns their last evaluation. run.step acts; run.goes_on evaluates and saves."""
    with contextlib.closing(Run(args)) as run:  # closes the environments, also after an error
        agent = make_agent(args, run.obs_shape, run.action_space).to(run.device)
        n, adam = len(agent.names), {"lr": args.learning_rate, "betas": (0.9, args.beta2), "fused": True}
        optimizers = {"actors": torch.optim.Adam(agent.actor_n.parameters(), **adam)}
        optimizers["critics"] = torch.optim.Adam(agent.critic_n.parameters(), **adam)
        widths = [*run.obs_shape, *run.action_space.shape, n, n, *run.obs_shape]  # as in buffer.add
        buffer = ReplayBuffer(min(args.buffer_size, args.total_timesteps), widths, run.device)
        run.start(model=agent, buffer=buffer, **optimizers)
        while run.goes_on():  # False at the end
            # 1. Act: one step in each of the environments
            obs, first_step = run.obs, run.global_step  # before run.step, which changes both
            actions = agent.act(obs, explore=True)
            next_obs, _, _, _, infos = run.step(actions)
            rewards, terminated = [info["rewards"] for info in infos], [info["terminated"] for info in infos]
            buffer.add(obs, actions, rewards, terminated, next_obs)

            # 2. Learn: a gradient step per train_frequency environment steps; a pass makes num_envs environment steps
            if run.global_step < args.learning_starts:
                continue
            rate = args.learning_rate * ((1 - first_step / args.total_timesteps) if args.anneal_lr else 1)
            for optimizer in optimizers.values():
                optimizer.param_groups[0]["lr"] = rate
            for number in range(first_step // args.train_frequency + 1, run.global_step // args.train_frequency + 1):
                metrics = update(agent, optimizers, buffer.sample(args.batch_size), args)
                if number % 100 == 0:  # 3. Log; number: gradient steps, had they begun at step 0
                    run.log(metrics | {"charts/learning_rate": rate})
        return run.result


# From here to the ruled line: environments and evaluation for several agents, in place of the other scripts' own
class JointEnv(gym.Env):
    """All agents' observations, (O,), and actions, (A,), in a row: one-hot, or in [0, 1]. The reward: their sum."""

    def __init__(self, env: ParallelEnv, render_mode: str | None):
        self.env, self.names, self.render, self.close = env, list(env.possible_agents), env.render, env.close
        self.render_mode, self.metadata = render_mode, env.metadata
        self.obs_space_n = [env.observation_space(name) for name in self.names]
        self.action_space_n = [env.action_space(name) for name in self.names]
        self.obs_dim_n = [gym.spaces.flatdim(space) for space in self.obs_space_n]
        self.action_dim_n = [gym.spaces.flatdim(space) for space in self.action_space_n]
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (sum(self.obs_dim_n),), np.float32)
        self.action_space = gym.spaces.Box(0, 1, (sum(self.action_dim_n),), np.float32)
        self.end_n = np.cumsum(self.action_dim_n)  # where an agent's actions end in a row

    def row(self, obs: dict) -> np.ndarray:  # -> (O,); zeros for an agent that has left
        agents = zip(self.names, self.obs_space_n, self.obs_dim_n, strict=True)
        parts = [gym.spaces.flatten(space, obs[name]) if name in obs else np.zeros(dim) for name, space, dim in agents]
        return np.concatenate(parts, dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        return self.row(self.env.reset(seed=seed)[0]), {}

    def step(self, row: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:  # row: (A,)
        actions = {}
        for name, space, dim, end in zip(self.names, self.action_space_n, self.action_dim_n, self.end_n, strict=True):
            if name in self.env.agents and isinstance(space, gym.spaces.Discrete):
                actions[name] = int(space.start + row[end - dim : end].argmax())
            elif name in self.env.agents:
                share = row[end - dim : end].reshape(space.shape)  # of the way from low to high
                actions[name] = (1 - share) * space.low + share * space.high
        obs, rewards, terminated, truncated, infos = self.env.step(actions)
        over = all(terminated.get(name) or truncated.get(name) for name in self.env.agents)  # no agent left: True
        info = {"benchmark": [infos[name].get("benchmark_data") for name in infos]}
        info["rewards"] = np.array([np.asarray(rewards.get(name, 0.0)).item() for name in self.names])  # (N,)
        info["terminated"] = np.array([terminated.get(name, True) for name in self.names])  # (N,); True: it left
        all_terminated = over and bool(info["terminated"].all())
        return self.row(obs), info["rewards"].sum(), all_terminated, over and not all_terminated, info


def make_env(args: Args, film: Path | None = None, benchmark: bool = False) -> gym.Env:
    """benchmark: with mpe2's own figures in info, which make a step a third slower."""
    options, env = {"render_mode": "rgb_array"} if film else {}, None
    module, _, name = args.env_id.partition(":")
    if not name:
        module, name = f"mpe2.{module}", "parallel_env"
        options |= {"continuous_actions": args.continuous_actions, "benchmark_data": benchmark}
    try:
        env = getattr(importlib.import_module(module), name)(**options)
        if not isinstance(env, ParallelEnv):
            raise TypeError("not a parallel environment of PettingZoo")
        env = JointEnv(env, options.get("render_mode"))
        if film:
            env.reset()
            assert getattr(x := env.render(), "dtype", 0) == np.uint8 and x.shape[2:] == (3,), "render() gives no RGB"
            env = gym.wrappers.RecordVideo(env, str(film.parent), lambda number: number == 0, name_prefix=film.name)
        return env
    except Exception as error:
        with contextlib.suppress(AttributeError):  # of None, which was not made
            env.close()
        if not film and not isinstance(error, ImportError | AttributeError | TypeError):
            raise  # from within the environment: the traceback helps most
        raise UsageError(f"--env-id {args.env_id}: {error}; mpe2's are listed at mpe2.farama.org") from None


def evaluate(agent: MADDPG, args: Args, film: Path) -> dict[str, float]:
    """Plays eval_episodes episodes, from the same seeds every time, and films the first."""
    if args.opponent_dir is not None:
        return cross_play(agent.names, args, film)
    seeds = np.random.SeedSequence([args.seed, 1]).generate_state(args.eval_episodes).tolist()  # 1: training has 0
    episodes = []
    with contextlib.ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())  # some environments draw from these three
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        random.seed(args.seed)
        np.random.seed(seeds)
        torch.default_generator.manual_seed(args.seed)
        env = stack.enter_context(contextlib.closing(make_env(args, film if args.capture_video else None, True)))
        here, there = (env.unwrapped.obs_space_n, env.unwrapped.action_space_n), agent.space_n
        if here != there:
            raise UsageError(f"--env-id {args.env_id} observes and acts in {here}, the trained agents in {there}")
        for seed in seeds:
            obs, infos, over = env.reset(seed=seed)[0], [], False
            while not over and len(infos) < args.eval_max_steps:
                obs, _, terminated, truncated, info = env.step(agent.act(obs))
                infos.append(info)
                over = terminated or truncated
                if Run.stop_signal:
                    return {}
            if not over:
                tqdm.write(f"--eval-max-steps {args.eval_max_steps} has cut an episode of this evaluation")
            returns = np.sum([info["rewards"] for info in infos], axis=0)  # (N,)
            episode = {"eval/episodic_return": returns.sum(), "eval/episodic_length": len(infos)}
            episode |= {f"eval/episodic_return/{name}": own for name, own in zip(agent.names, returns, strict=True)}
            episodes.append(episode | measures(args.env_id, [info["benchmark"] for info in infos]))
    result = {name: np.mean([episode[name] for episode in episodes]) for name in episodes[0]}
    return result | {"eval/return_std": np.std([episode["eval/episodic_return"] for episode in episodes])}


def measures(env_id: str, benchmark: list) -> dict[str, float]:
    """mpe2's measures of an episode: those in the paper's tables, and the landmarks occupied at its end."""
    if env_id == "simple_spread_v3":  # the distance of each landmark to the nearest agent, summed over landmarks
        _, hits, distances, occupied = np.array(benchmark, dtype=float).transpose(2, 0, 1)  # (T, N); hits count twice
        return {"eval/distances": distances.mean(), "eval/collisions": hits.sum() / 2, "eval/occupied": occupied[-1, 0]}
    if env_id == "simple_adversary_v3":  # whether an agent, and the adversary, end within the target's diameter of it
        adversary, *agents = benchmark[-1]  # squared distances; an agent's last is that to the target
        success = min(distances[-1] for distances in agents) < 0.16**2
        return {"eval/agent_success": success, "eval/adversary_success": adversary < 0.16**2}
    return {"eval/touches": np.sum(benchmark)} if env_id == "simple_tag_v3" else {}


def cross_play(names: list[str], args: Args, film: Path) -> dict[str, float]:
    """The adversaries of run_dir and opponent_dir play the other agents of both, as in the paper's tables."""
    adversaries = [i for i, name in enumerate(names) if name.startswith(("adversary", "leadadversary", "eve"))]
    if not adversaries:
        raise UsageError(f"--opponent-dir needs adversaries; --env-id {args.env_id} has {', '.join(names)}")
    for k, (foe, ally) in enumerate(itertools.product([args.run_dir, args.opponent_dir], repeat=2)):
        team, foes = load(ally), load(foe)
        for i in adversaries:
            team.actor_n[i] = foes.actor_n[i]
        result = evaluate(team, replace(args, opponent_dir=None), film.with_name(f"{film.name}-{k}"))
        print(f"adversaries of {foe}, others of {ally}:", ", ".join(f"{name} {v:.4g}" for name, v in result.items()))
    return {}


# ---- Below this line nothing learns: command line, environments, evaluation, run folder, as in all scripts ----
# For learning one part matters: Run.step (what follows the end of an episode). train needs only Run.


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
