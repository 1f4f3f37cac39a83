"""MuZero: AlphaZero's search in a model that is learned, so that nobody has to tell it the rules.

Three networks: h turns an observation into a latent state s. g gives an action's reward and the next state. f gives
p_a, the probability of each action, and v, the discounted sum of rewards to come. Nothing predicts observations.

    [1] in the tree: a = argmax_a Q(s, a) + C(s) P(s, a) sqrt(N(s)) / (1 + N(s, a))                       AlphaZero
        C(s) = log((1 + N(s) + c_base) / c_base) + c_init
    [2] backup: G = r + gamma G', N(s, a) <- N(s, a) + 1, W(s, a) <- W(s, a) + G, Q(s, a) = W(s, a) / N(s, a)
    [3] at the root: P(s, a) = (1 - epsilon) p_a + epsilon eta_a, eta ~ Dirichlet(alpha)             AlphaGo Zero
    [4] model: s_0 = h(o_t), (r_k, s_k) = g(s_(k-1), a_(t+k-1)), (p_k, v_k) = f(s_k)
    [5] value target: z_t = u_t + gamma u_(t+1) + ... + gamma^(n-1) u_(t+n-1) + gamma^n nu_(t+n)
    [6] loss: l = sum_k (CE(u_(t+k-1), r_k) + CE(z_(t+k), v_k) + CE(pi_(t+k), p_k)) + c ||theta||^2
    [7] scale: S(x) = sign(x) (sqrt(|x| + 1) - 1) + 0.001 x

P is p; at the root in training, [3]. N(s) is 1 + sum_a N(s, a). In [1] Q is scaled: a tree's least (games: -1) becomes
0, its largest 1. G' is G one step deeper, v at the end. In games the other player's numbers change sign: G', in [5]
every second u, nu if n is odd. u_t is the reward of a_t (paper: u_(t+1)), nu a root's mean G, pi the shares of visits.
k is 0 to K, for r 1 to K; k > 0 weighs 1 / K. CE: cross entropy. r, v: distributions of S(r), S(v), in games without S.

Paper: Schrittwieser et al. 2020, arXiv:1911.08265, doi:10.1038/s41586-020-03051-4.

Differs from the paper:
- Environments run side by side in one process, and the model, of MLPs, learns between their steps, by AdamW.
- h sees one observation (paper: 8 to 100), with the legal moves. Latent states: mean 0, variance 1 (paper: 0 to 1).
- Games begin with a few random moves. Their result is a reward, then v is 0 (paper: v stays the result, by MSE).
- Replay is uniform (paper: Atari by priority), of finished episodes. After a time limit the last v is the bootstrap.
- Q is scaled with its r (pseudocode: without). Untried: the mean of the tried (pseudocode: 0). N(s) is 1 above paper's.

    python algorithms/muzero.py --env-id CartPole-v1
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[atari,box2d,classic-control,mujoco,toy-text]>=1.4,<2", "moviepy>=2.2", "numpy>=2", "open-spiel>=2",
#     "pillow>=11", "torch>=2.13", "tqdm>=4.66", "tyro>=1", "wandb>=0.31",
# ]
# ///

import contextlib
import functools
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
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pyspiel
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm


@dataclass
class Args:
    # Run
    env_id: str = "CartPole-v1"  # a Gymnasium environment, module:id if a module registers it, or a game of OpenSpiel
    seed: int = 1  # seed of environments, networks and sampling
    total_timesteps: int = 30_000  # environment steps, summed over all environments
    num_envs: int = 20  # environments stepped together
    device: str = "auto"  # auto (here always a CPU), cpu, cuda, cuda:N or mps
    threads: int | None = None  # CPU threads of PyTorch; None: 1; for layers of 256 try 2
    checkpoint_frequency: int | None = None  # steps between checkpoints; None: a tenth of the run
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "plainrl"  # W&B project
    run_dir: str | None = None  # folder of the run; None: a new one in runs/
    resume: bool = False  # go on with the run in --run-dir; a larger --total-timesteps makes it longer
    # Evaluation
    eval_frequency: int | None = 5_000  # steps between evaluations; None: a twentieth of the run
    eval_episodes: int = 20  # episodes of an evaluation
    eval_max_steps: int = 27_000  # steps after which an episode of an evaluation is cut: Atari's half an hour
    capture_video: bool = False  # film the first episode of each evaluation
    evaluate: bool = False  # only evaluate the model in --run-dir
    # Algorithm
    num_simulations: int = 25  # walks through the tree for each step; paper: 50 (Atari), 800 (board games)
    eval_simulations: int = 25  # the same in evaluations
    c_init: float = 0.625  # [1] weight of P against Q; paper: 1.25
    c_base: float = 19_652.0  # [1] visits of a node after which C(s) has grown by log 2: far more than here
    dirichlet_alpha: float = 1.0  # [3] the smaller, the fewer actions get most of the noise; paper: 0.25 (Atari)
    noise_fraction: float = 0.25  # [3] epsilon
    temperature: float = 1.0  # at the start; an action is drawn in proportion to N ** (1 / temperature)
    final_temperature: float = 0.25  # at the end, linear between; 0: most visited; paper: 1, 0.5, 0.25 (Atari)
    temperature_moves: int = 30  # a game's later moves are the most visited; other environments: 0 does so with all
    random_moves: int = 6  # a game of self-play begins with 0 to this many random moves; paper: 0
    gamma: float = 0.997  # discount; paper: 1 in board games
    td_steps: int = 50  # [5] n; paper: 10 (Atari), to the end (board games)
    unroll_steps: int = 10  # [6] K; paper: 5
    support_size: int = 20  # r and v: integers of S(x) to plus and minus this; 20 is x = 422; games need 1; paper: 300
    latent_size: int = 32  # numbers in a latent state
    hidden_size: int = 64  # units of a hidden layer
    learning_rate: float = 2e-3  # of AdamW; paper: 0.05 to 0.00007 (Atari), of SGD
    anneal_lr: bool = True  # let the learning rate fall linearly to 0
    weight_decay: float = 1e-4  # [6] c
    buffer_size: int = 50_000  # steps in the replay buffer; paper: those of the last 125,000 sequences (Atari)
    batch_size: int = 128  # positions in a gradient step; paper: 1024 (Atari), 2048 (board games)
    learning_starts: int = 1_000  # environment steps before the first gradient step
    train_frequency: int = 2  # environment steps, summed over all environments, per gradient step
    eval_positions: int = 5_000  # positions in which the chosen move is compared with the best, in a solved game
    opponent_simulations: int = 1_000  # of OpenSpiel's search, the opponent in games that can't be solved

    def __post_init__(self) -> None:
        counts = {"temperature_moves": (0, 1e12), "random_moves": (0, 1e12), "learning_starts": (0, 1e12)}  # may be 0
        check_ranges(self, c_base=(1, math.inf), dirichlet_alpha=(0.001, 1e6), noise_fraction=(0, 1), **counts)


def scale(x: Tensor) -> Tensor:  # [7]
    return x.sign() * ((x.abs() + 1).sqrt() - 1) + 0.001 * x


def unscale(y: Tensor) -> Tensor:
    """The inverse of scale. With root = sqrt(|x| + 1) it is |y| = root - 1 + 0.001 (root^2 - 1), solved for root."""
    c = y.abs() + 1.001
    root = 2 * c / (1 + (1 + 0.004 * c).sqrt())  # ((1 + 0.004 c).sqrt() - 1) / 0.002, without its rounding errors
    return y.sign() * (root.square() - 1)


def two_hot(x: Tensor, support_size: int, scaled: bool = True) -> Tensor:  # (...) -> (..., 2 * support_size + 1)
    """A distribution with mean S(x): an integer gets 1 minus its distance from that, or 0 beyond a distance of 1."""
    y = (scale(x) if scaled else x).clamp(-support_size, support_size)[..., None]
    support = torch.arange(-support_size, support_size + 1, device=x.device)
    return (1 - (support - y).abs()).clamp(min=0)


def expectation(logits: Tensor, scaled: bool = True) -> Tensor:  # (..., 2 * support_size + 1) -> (...)
    support = torch.arange(logits.shape[-1], device=logits.device) - logits.shape[-1] // 2
    mean = (logits.softmax(-1) * support).sum(-1)
    return unscale(mean) if scaled else mean


def two_layers(num_inputs: int, hidden_size: int, num_outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(num_inputs, hidden_size), nn.ReLU(), nn.Linear(hidden_size, num_outputs))


class Network(nn.Module):
    """The model [4]. In games an observation begins with A numbers, 1 for a legal move, then the player, 0 or 1."""

    def __init__(self, args: Args, obs_shape: tuple[int, ...], action_space: gym.Space):
        super().__init__()
        self.obs_shape, self.action_space, self.is_game = obs_shape, action_space, is_game(args.env_id)
        self.num_actions, atoms = int(action_space.n), 2 * args.support_size + 1  # atoms: the integers of r and v
        self.h = two_layers(*obs_shape, args.hidden_size, args.latent_size)
        self.g = two_layers(args.latent_size + self.num_actions, args.hidden_size, args.latent_size)
        self.norm = nn.LayerNorm(args.latent_size, elementwise_affine=False)  # numbers do not grow from step to step
        self.reward_head = two_layers(args.latent_size, args.hidden_size, atoms)
        self.policy_head = two_layers(args.latent_size, args.hidden_size, self.num_actions)
        self.value_head = two_layers(args.latent_size, args.hidden_size, atoms)
        for head in self.reward_head, self.value_head:  # rewards and values begin as 0
            nn.init.zeros_(head[2].weight)
            nn.init.zeros_(head[2].bias)

    def represent(self, obs: Tensor) -> Tensor:  # (B, O) -> (B, L)
        return self.norm(self.h(obs))  # [4]

    def dynamics(self, latent: Tensor, action: Tensor) -> Tensor:  # (B, L), (B,) -> (B, L)
        chosen = nn.functional.one_hot(action, self.num_actions)  # (B, A)
        return self.norm(latent + self.g(torch.cat([latent, chosen], dim=1)))  # [4] s_k: predict reads r_k off it

    def predict(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of p, v and r, (..., A or atoms), of states (..., L). r is of the step to that state; s_0 has none."""
        return self.policy_head(latent), self.value_head(latent), self.reward_head(latent)  # [4]

    @torch.inference_mode()
    def initial(self, obs: np.ndarray) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]:
        """What a search begins with: latent states (B, L), legal actions (B, A), p (B, A), v (B,)."""
        legal = obs[:, : self.num_actions] > 0 if self.is_game else np.ones((len(obs), self.num_actions), bool)
        latent = self.represent(torch.as_tensor(obs, dtype=torch.float32, device=next(self.parameters()).device))
        logits, v, _ = self.predict(latent)
        p = logits.masked_fill(torch.from_numpy(~legal).to(logits.device), -1e9).softmax(-1)
        return latent, legal, p.cpu().numpy(), expectation(v, not self.is_game).cpu().numpy()

    @torch.inference_mode()
    def recurrent(self, latent: Tensor, action: np.ndarray) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]:
        """One step of the model in the search: the next latent states (B, L), r (B,), p (B, A), v (B,)."""
        latent = self.dynamics(latent, torch.from_numpy(action).to(latent.device))
        logits, v, r = self.predict(latent)
        r, v = expectation(torch.stack([r, v]), not self.is_game).cpu().numpy()
        return latent, r, logits.softmax(-1).cpu().numpy(), v

    def act(self, obs: np.ndarray) -> np.ndarray:
        """The action that the network itself finds best, without a search: (O,) -> (), or for a batch (B, O) -> (B,)"""
        obs = np.asarray(obs)
        p = self.initial(obs.reshape(-1, obs.shape[-1]))[2]
        return (p.argmax(-1).astype(self.action_space.dtype) + self.action_space.start).reshape(obs.shape[:-1])


class Tree:
    """Searches from B states side by side: the same row of each array is the same search.

    A node is a latent state. Node 0 is the root, h of the observation, and simulation k adds node k.
    """

    def __init__(self, legal: np.ndarray, prior: np.ndarray, args: Args):  # (B, A) each, of the roots
        per_node = len(legal), args.num_simulations + 1  # shapes of arrays: a number for each node, or for each move
        per_move = (*per_node, legal.shape[1])
        self.visits, self.total, self.prior = np.zeros(per_move), np.zeros(per_move), np.zeros(per_move)  # N, W, P
        self.legal = np.ones(per_move, bool)  # the model does not know what is legal later
        self.legal[:, 0], self.prior[:, 0] = legal, prior
        self.child = np.full(per_move, -1)  # the node to which an action leads; -1: none yet
        self.reward = np.zeros(per_node)  # of the step that led to a node
        game = is_game(args.env_id)
        lowest, highest = (-1.0, 1.0) if game else (1e30, -1e30)  # Q's bounds so far; games: known
        self.lowest, self.highest = np.full(len(legal), lowest), np.full(len(legal), highest)
        self.discount = -args.gamma if game else args.gamma  # what is good for the other player is bad for this one

    def select(self, args: Args) -> tuple[list[tuple], np.ndarray, np.ndarray]:
        """Walks down each tree, by [1], to an action that leads to no node yet.

        Returns the path, a list: for each depth, which searches came so far, at which nodes, and the actions taken
        there. Then for each search, (B,) each, the node and the action where its walk ended.
        """
        low, width = self.lowest[:, None, None], np.maximum(self.highest - self.lowest, 1e-9)[:, None, None]
        total = (self.total - self.visits * low) / width  # sums of G, such that Q = total / visits is from 0 to 1
        mean = total.sum(-1, keepdims=True) / np.maximum(self.visits.sum(-1, keepdims=True), 1)  # (B, nodes, 1)
        total = np.where(self.visits > 0, total, mean)  # untried: the mean itself, for puct divides it by 1
        scores = puct(self.visits, total, self.prior, args)  # of all nodes at once: quicker than one by one
        best = np.where(self.legal, scores, -np.inf).argmax(-1)  # (B, nodes)
        rows, nodes, path = np.arange(len(best)), np.zeros(len(best), int), []
        parent, last_action = nodes.copy(), nodes.copy()
        while len(rows):
            actions = best[rows, nodes]
            path.append((rows, nodes, actions))
            parent[rows], last_action[rows] = nodes, actions
            next_nodes = self.child[rows, nodes, actions]
            rows, nodes = rows[next_nodes >= 0], next_nodes[next_nodes >= 0]  # the walks that go on
        return path, parent, last_action

    def backup(self, path: list[tuple], value: np.ndarray) -> None:
        """value: (B,), v of the new node at the end of each path, for the player who is to move there."""
        later = value.astype(np.float64)  # G' in [2]; each pass below makes it G, which is G' for the step above
        for rows, nodes, actions in reversed(path):
            later[rows] = self.reward[rows, self.child[rows, nodes, actions]] + self.discount * later[rows]  # [2] G
            self.visits[rows, nodes, actions] += 1  # [2]
            self.total[rows, nodes, actions] += later[rows]  # [2]
            q = self.total[rows, nodes, actions] / self.visits[rows, nodes, actions]
            self.lowest[rows], self.highest[rows] = np.minimum(self.lowest[rows], q), np.maximum(self.highest[rows], q)


def puct(visits: np.ndarray, total: np.ndarray, prior: np.ndarray, args: Args) -> np.ndarray:
    """What is maximised in [1], which the papers call PUCT, for each move: (B, A) each -> (B, A).

    Q is total / visits. Of an untried move total / 1 is taken as Q: 0 in AlphaZero, a mean in MuZero.
    """
    n = 1 + visits.sum(-1, keepdims=True)  # N(s): 1 is the visit that made the node; the pseudocode's root lacks it
    c = np.log((1 + n + args.c_base) / args.c_base) + args.c_init  # [1]
    q = total / np.maximum(visits, 1)  # [2]
    return q + c * prior * np.sqrt(n) / (1 + visits)  # [1]


def add_noise(prior: np.ndarray, legal: np.ndarray, args: Args) -> np.ndarray:  # (B, A), (B, A) -> (B, A)
    eta = legal * (np.random.gamma(args.dirichlet_alpha, size=legal.shape) + 1e-99)  # never 0 for all moves
    eta /= eta.sum(-1, keepdims=True)  # gamma draws, divided by their sum, are a draw of the Dirichlet distribution
    return (1 - args.noise_fraction) * prior + args.noise_fraction * eta  # [3]


def search(model: Network, obs: np.ndarray, args: Args, noise: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A search from each of B observations. Returns N(s, a) at the roots, (B, A), and nu, the mean G there, (B,)."""
    everyone = np.arange(len(obs))
    latent, legal, prior, _ = model.initial(obs)
    tree = Tree(legal, add_noise(prior, legal, args) if noise else prior, args)
    latents = latent.new_empty(args.num_simulations + 1, *latent.shape)  # (nodes, B, L), filled node by node
    latents[0] = latent
    for node in range(1, args.num_simulations + 1):
        path, parent, action = tree.select(args)
        # Expand: the model makes one step from all the leaves at once. It knows no ends, so every walk adds a node
        latents[node], tree.reward[:, node], tree.prior[:, node], v = model.recurrent(latents[parent, everyone], action)
        tree.child[everyone, parent, action] = node
        tree.backup(path, v)
    visits = tree.visits[:, 0]
    return visits, tree.total[:, 0].sum(-1) / visits.sum(-1)


def draw_moves(pi: np.ndarray, move_numbers: np.ndarray, args: Args) -> np.ndarray:
    """The moves of self-play: (B, A) -> (B,). move_numbers, (B,): how many came before, random ones included."""
    if args.temperature == 0:
        return pi.argmax(-1)
    weights = (pi / pi.max(-1, keepdims=True)) ** (1 / args.temperature)  # at most 1: no overflow, no sum of 0
    shares = weights.cumsum(-1)  # (B, A)
    shares /= shares[:, -1:]  # rising to 1 exactly: divided by weights.sum(-1), the last can be rounded below 1
    drawn = (shares > np.random.random((len(pi), 1))).argmax(-1)  # the first that is above the random number
    return np.where(move_numbers < args.temperature_moves, drawn, pi.argmax(-1))


def value_targets(rewards: np.ndarray, root_values: np.ndarray, args: Args) -> np.ndarray:
    """z of an episode's T steps: rewards (T,), root_values (T + 1,), nu of each step.

    root_values[T] stands for what follows the episode: 0 after a true end, v where a time limit cut it.
    """
    targets, num_steps = np.zeros(len(rewards)), len(rewards)
    discounts = args.gamma ** np.arange(num_steps + 1)
    for t in range(num_steps):
        n = min(args.td_steps, num_steps - t)  # fewer near the end
        targets[t] = discounts[:n] @ rewards[t : t + n] + discounts[n] * root_values[t + n]  # [5]
    return targets


class EpisodeBuffer:
    """The last steps of finished episodes. A row: an observation, then 4 + A numbers for it and each of K later steps.

    These are action, reward, z, known (1 or 0) and pi. A row can then be sampled without the rows that follow it.
    Steps of an episode that has not ended wait, for z needs what comes later.
    """

    def __init__(self, args: Args, obs_size: int, num_actions: int, device: str):
        self.args, size = args, args.buffer_size
        self.widths = [obs_size, (args.unroll_steps + 1) * (4 + num_actions)]
        needed = 4e-9 * size * sum(self.widths)  # GB: a float32 has four bytes
        memory = 1e-9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
        if needed > 0.9 * memory:
            raise UsageError(f"--buffer-size {size} needs {needed:.1f} GB; this machine has {memory:.1f} GB")
        self.rows = torch.empty(size, sum(self.widths), device=device)  # on a CPU it takes memory as it fills
        self.num_actions, self.num_added, self.waiting = num_actions, 0, [[] for _ in range(args.num_envs)]

    def add(self, obs: np.ndarray, *columns: np.ndarray) -> None:
        """obs (N, O), pi (N, A); (N,) each: actions, rewards and nu of the player to move, and this player, 1 or -1."""
        rows = np.column_stack([obs, *columns])
        for waiting, row in zip(self.waiting, rows, strict=True):
            waiting.append(row)

    def finish(self, i: int, terminated: bool, last_value: float) -> None:
        """The episode of environment i ends: last_value is v of the last observation, where a time limit cut it."""
        steps, unroll = np.stack(self.waiting[i]), self.args.unroll_steps
        obs, pi = np.split(steps[:, :-4], [self.widths[0]], axis=1)
        action, reward, value, player = steps[:, -4:].T
        # In games player * (...) turns what is the mover's into player 0's, and z back again
        values = np.append(player * value, 0 if terminated else last_value)
        z = player * value_targets(player * reward, values, self.args)
        targets = np.column_stack([action, reward, z, np.ones(len(z)), pi])  # (T, 4 + A)
        # After a true end come K steps: reward 0 and z 0 whatever the action, so it is random. pi 0 makes its loss 0.
        # After a time limit nothing is known, and these K steps have no weight
        after = np.zeros((unroll, targets.shape[1]))
        after[:, 0], after[:, 3] = np.random.randint(self.num_actions, size=unroll), terminated
        targets = np.concatenate([targets, after])
        windows = [targets[k : k + len(z)] for k in range(unroll + 1)]  # step k of each row
        new = np.concatenate([obs, *windows], axis=1, dtype=np.float32)[-len(self.rows) :]
        places = (self.num_added + torch.arange(len(new))) % len(self.rows)  # the oldest rows
        self.rows[places] = torch.from_numpy(new).to(self.rows.device)
        self.num_added += len(new)
        self.waiting[i] = []

    def sample(self, batch_size: int) -> tuple[Tensor, ...]:
        """(B, O), (B, K + 1, A) and (B, K + 1) each: obs, pi, actions, rewards, z, known."""
        filled = min(self.num_added, len(self.rows))
        rows = self.rows[torch.randint(filled, (batch_size,), device=self.rows.device)]
        obs, steps = rows.split(self.widths, dim=1)
        steps = steps.unflatten(1, (-1, 4 + self.num_actions))
        return obs, steps[..., 4:], *steps[..., :4].unbind(-1)

    def state_dict(self) -> dict:  # clone: torch.save would write all the memory behind a slice
        waiting = [torch.from_numpy(np.array(rows)) for rows in self.waiting]
        return {"rows": self.rows[: self.num_added].clone(), "num_added": self.num_added, "waiting": waiting}

    def load_state_dict(self, state: dict) -> None:
        self.num_added, self.waiting = state["num_added"], [list(rows.numpy()) for rows in state["waiting"]]
        self.rows[: self.num_added] = state["rows"].to(self.rows.device)


def halve_gradient(x: Tensor) -> Tensor:
    return 0.5 * x + 0.5 * x.detach()


def muzero_loss(agent: Network, batch: tuple[Tensor, ...], args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """[6] but for its last term, for which AdamW's decay stands. What EpisodeBuffer.sample gives -> loss, metrics."""
    obs, pi, actions, rewards, z, known = batch
    latents = [agent.represent(obs)]
    for k in range(args.unroll_steps):
        # Gradients of all later steps come back through here. Halved each time, they do not pile up as K grows
        latents.append(agent.dynamics(halve_gradient(latents[-1]), actions[:, k].long()))
    policy_logits, value_logits, reward_logits = agent.predict(torch.stack(latents, dim=1))  # (B, K + 1, ...)
    weights = known / args.unroll_steps  # (B, K + 1): states 1 to K together weigh as much as state 0
    weights[:, 0] = 1
    # cross_entropy wants the classes in dimension 1. The reward in row k is that of the step to state k + 1
    policy_losses = nn.functional.cross_entropy(policy_logits.mT, pi.mT, reduction="none")  # [6] (B, K + 1)
    scaled = not agent.is_game  # games: rewards and results are -1, 0 and 1, so S is not needed
    z, rewards = (two_hot(x, args.support_size, scaled) for x in (z, rewards[:, :-1]))  # (..., atoms)
    value_losses = nn.functional.cross_entropy(value_logits.mT, z.mT, reduction="none")  # [6]
    reward_losses = nn.functional.cross_entropy(reward_logits[:, 1:].mT, rewards.mT, reduction="none")  # [6]
    policy_loss, value_loss = (weights * policy_losses).sum(1).mean(), (weights * value_losses).sum(1).mean()
    reward_loss = (known[:, :-1] / args.unroll_steps * reward_losses).sum(1).mean()
    metrics = {"losses/policy_loss": policy_loss, "losses/value_loss": value_loss, "losses/reward_loss": reward_loss}
    metrics["losses/target_entropy"] = torch.special.entr(pi[:, 0]).sum(-1).mean()  # of k = 0; policy_loss: all k
    loss = policy_loss + value_loss + reward_loss  # [6]
    return loss, {name: value.detach() for name, value in metrics.items()}


def make_agent(args: Args, obs_shape: tuple[int, ...], action_space: gym.Space) -> Network:
    if not isinstance(action_space, gym.spaces.Discrete):
        raise UsageError(f"--env-id {args.env_id} acts in {action_space}, not Discrete: see ppo.py, sac.py and td3.py")
    return Network(args, obs_shape, action_space)


def train(args: Args) -> dict[str, float]:
    """Trains an agent, returns its last evaluation. run.step acts; run.goes_on evaluates and saves; run.log writes."""
    with contextlib.closing(Run(args)) as run:  # closes the environments, also after an error
        agent = make_agent(args, run.obs_shape, run.action_space).to(run.device)
        adam = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "fused": True}
        optimizer = torch.optim.AdamW(agent.parameters(), **adam)
        buffer = EpisodeBuffer(args, *run.obs_shape, agent.num_actions, run.device)
        run.start(model=agent, optimizer=optimizer, buffer=buffer)
        for waiting, taken in zip(buffer.waiting, run.actions, strict=True):
            if not taken:  # no action yet: a new episode, perhaps instead of one that --resume could not replay
                waiting.clear()
        while run.goes_on():  # False at the end
            # 1. Act: a search and a step in each of N environments
            obs, first_step = run.obs, run.global_step  # after an end run.obs is the next episode's first
            visits, root_values = search(agent, obs, args, noise=True)
            pi = visits / visits.sum(-1, keepdims=True)
            player, move_numbers = np.ones(args.num_envs), np.zeros(args.num_envs)
            if agent.is_game:
                player = 1 - 2 * obs[:, agent.num_actions]  # player 0 becomes 1, player 1 becomes -1
                move_numbers = np.array([env.unwrapped.state.move_number() for env in run.envs])
            progress = first_step / args.total_timesteps
            temperature = args.temperature + progress * (args.final_temperature - args.temperature)
            actions = draw_moves(pi, move_numbers, replace(args, temperature=temperature))
            next_obs, rewards, terminated, truncated, _ = run.step(actions + run.action_space.start)

            # 2. Keep: targets are made when an episode ends
            buffer.add(obs, pi, actions, player * rewards, root_values, player)
            for i in np.flatnonzero(terminated | truncated):
                buffer.finish(i, terminated[i], agent.initial(next_obs[i : i + 1])[3].item())

            # 3. Learn: a gradient step per train_frequency environment steps; this pass made N environment steps
            if run.global_step < args.learning_starts or buffer.num_added == 0:
                continue
            rate = args.learning_rate * (1 - progress if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = rate
            for number in range(first_step // args.train_frequency + 1, run.global_step // args.train_frequency + 1):
                loss, metrics = muzero_loss(agent, buffer.sample(args.batch_size), args)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if number % 100 == 0:  # 4. Log
                    metrics["charts/root_value"] = root_values.mean()
                    run.log(metrics | {"charts/temperature": temperature, "charts/learning_rate": rate})
        return run.result


# From here to the ruled line: games as environments, and their solutions, as in alphazero.py
def is_game(name: str) -> bool:
    return name.partition("(")[0] in pyspiel.registered_names()


@functools.cache
def load_game(name: str) -> pyspiel.Game:
    """Refuses all games but those of two players who move in turn, see everything and get a result at the end."""
    if name.partition("(")[0] not in pyspiel.registered_names():
        raise UsageError(f"--env-id {name} is no game of OpenSpiel; pyspiel.registered_names() lists them")
    stderr = os.dup(2)  # OpenSpiel's own program writes there before it raises
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        game = pyspiel.load_game(name)
        moves = game.new_initial_state().legal_actions()
    except (pyspiel.SpielError, IndexError, ValueError) as error:
        raise UsageError(f"--env-id {name}: {error!s:.200}") from None
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    kind, wanted = game.get_type(), pyspiel.GameType
    if not (
        game.num_players() == 2
        and kind.dynamics == wanted.Dynamics.SEQUENTIAL
        and kind.chance_mode == wanted.ChanceMode.DETERMINISTIC
        and kind.information == wanted.Information.PERFECT_INFORMATION
        and kind.utility == wanted.Utility.ZERO_SUM
        and kind.reward_model == wanted.RewardModel.TERMINAL
        and kind.provides_observation_tensor
        and moves
    ):
        needed = "two players in turn, no dice or cards, nothing hidden, and at the end one wins what the other loses"
        raise UsageError(f"--env-id {name}: {Path(__file__).name} needs a board as numbers, {needed}")
    return game


def observe(state: pyspiel.State) -> np.ndarray:  # (O,)
    if state.is_terminal():  # nobody can move, and the network's answer is not used
        return np.array([0] * (state.num_distinct_actions() + 1) + state.observation_tensor(0), np.float32)
    return np.array([*state.legal_actions_mask(), state.current_player(), *state.observation_tensor()], np.float32)


def player_of(state: pyspiel.State) -> int:
    """1 where player 0 is to move (who begins in most games, not in chess), -1 where player 1 is, 0 at the end."""
    return 0 if state.is_terminal() else 1 - 2 * state.current_player()


def result_of(state: pyspiel.State) -> float:
    """Player 0's result of a finished game, also where OpenSpiel counts by how much it was won."""
    return float(np.sign(state.returns()[0]))  # 1 won, 0 drawn, -1 lost


class Board(gym.Env):
    """A game of OpenSpiel as an environment of Gymnasium. Whoever is to move acts; rewards are player 0's."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 1}

    def __init__(self, args: Args, render_mode: str | None, random_moves: int):
        self.game, self.render_mode, self.random_moves = load_game(args.env_id), render_mode, random_moves
        self.action_space = gym.spaces.Discrete(self.game.num_distinct_actions())
        width = int(self.action_space.n) + 1 + self.game.observation_tensor_size()
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (width,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state = self.game.new_initial_state()
        for _ in range(self.np_random.integers(self.random_moves + 1)):
            state = self.state.child(int(self.np_random.choice(self.state.legal_actions())))
            self.state = self.state if state.is_terminal() else state  # a move that would end the game is not made
        return observe(self.state), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        player, self.state = self.state.current_player(), self.state.child(int(action))
        if self.state.current_player() == player:
            raise UsageError(f"--env-id {self.game}: a player moves twice in a row, but here the search takes turns")
        over = self.state.is_terminal()
        return observe(self.state), (result_of(self.state) if over else 0.0), over, False, {}

    def render(self) -> np.ndarray:  # (400, 640, 3)
        """The position as text."""
        image, lines = Image.new("RGB", (640, 400), "white"), str(self.state).splitlines()
        size = min(400 / max(len(line) for line in lines), 400 / len(lines), 100)  # of a cell, one for each character
        draw, font = ImageDraw.Draw(image), ImageFont.load_default(0.8 * size)
        for row, line in enumerate(lines):
            for column, character in enumerate(line):
                draw.text((size * (column + 0.5), size * (row + 0.5)), character, "black", font, "mm")
        return np.asarray(image)


@functools.cache
def solve(name: str) -> dict[tuple[str, int, int], tuple[pyspiel.State, float, np.ndarray]] | None:
    """Minimax over the whole game. Each position in which somebody is to move, player 0's result from there if
    both play well, and the best moves, (A,) of True and False. None for a game of more than some 50,000 positions, or
    with rules that look at more than the position's text, its player to move and the number of moves so far.
    """
    solution = {}

    def result_from(state: pyspiel.State, look_again: bool = True) -> float:  # look_again: check a known one
        if state.is_terminal():
            return result_of(state)
        old = solution.get(key_of(state))
        if old is None or look_again:
            sign, results = player_of(state), np.full(state.num_distinct_actions(), -np.inf)
            for move in state.legal_actions():
                results[move] = sign * result_from(state.child(move), old is None)  # for the player to move
            new = state, sign * results.max(), results == results.max()
            if len(solution) > 50_000 or (old and (old[1] != new[1] or (old[2] != new[2]).any())):
                raise OverflowError  # too many, or a position whose worth depends on how it came about
            solution.setdefault(key_of(state), new)
        return solution[key_of(state)][1]

    try:
        result_from(load_game(name).new_initial_state())
        return solution
    except (OverflowError, RecursionError):  # too many positions, or games of too many moves
        return None


def key_of(state: pyspiel.State) -> tuple[str, int, int]:
    return str(state), state.current_player(), state.move_number()


def optimal_moves(agent: Network, solution: dict, args: Args) -> np.ndarray:
    """In which positions the network's move, and the search's, is as good as the best: (2, positions)"""
    chosen = np.random.default_rng(args.seed).permutation(len(solution))[: args.eval_positions]
    positions = [*solution.values()]
    states, _, best = zip(*(positions[i] for i in chosen), strict=True)
    obs = np.stack([observe(state) for state in states])
    parts = [search(agent, obs[i : i + 250], args)[0].argmax(-1) for i in range(0, len(obs), 250)]  # saves memory
    moves = agent.act(obs), np.concatenate(parts)
    return np.stack([np.stack(best)[np.arange(len(chosen)), move] for move in moves])


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
    if is_game(args.env_id):
        env = Board(args, "rgb_array" if film else None, args.random_moves)
        return gym.wrappers.RecordVideo(env, str(film.parent), lambda i: i == 0, name_prefix=film.name) if film else env
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
    """Plays the same eval_episodes episodes every time, with the search and without noise, and films the first.

    In a game the agent begins every second episode. The opponent is a perfect player where the game can be solved, else
    OpenSpiel's search, which rates positions by random play.
    """
    searching = replace(args, num_simulations=args.eval_simulations, random_moves=0)
    seeds = np.random.SeedSequence([args.seed, 1]).generate_state(args.eval_episodes).tolist()  # 1: training has 0
    returns, lengths, playing = np.zeros(len(seeds)), np.zeros(len(seeds)), {}
    game, rng, opponents = is_game(args.env_id), np.random.default_rng(seeds), []
    solution = solve(args.env_id) if game else None
    sides = 1 - 2 * (np.arange(len(seeds)) % 2) if game else np.ones(len(seeds))  # 1: the agent is player 0, else -1
    with contextlib.ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())  # some environments draw from these three
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        random.seed(args.seed)
        np.random.seed(seeds)
        torch.default_generator.manual_seed(args.seed)
        films = [film if args.capture_video else None] + [None] * (len(seeds) - 1)
        envs = [stack.enter_context(contextlib.closing(make_env(searching, film))) for film in films]
        here, there = (envs[0].observation_space.shape, envs[0].action_space), (agent.obs_shape, agent.action_space)
        if here != there:
            raise UsageError(f"--env-id {args.env_id} observes and acts in {here}, the trained agent in {there}")
        if game:
            for seed in seeds:
                rollouts = pyspiel.RandomRolloutEvaluator(1, seed // 2)  # one random game for each position it rates
                # 2.0: how much it explores; 1000: MB of memory at most; True: it proves wins where it can
                limits = 2.0, args.opponent_simulations, 1000, True, seed // 2, False
                opponents.append(pyspiel.MCTSBot(load_game(args.env_id), rollouts, *limits))
        playing = {i: env.reset(seed=seed)[0] for i, (env, seed) in enumerate(zip(envs, seeds, strict=True))}
        while playing and not Run.stop_signal:
            ours = [i for i in playing if not game or player_of(envs[i].unwrapped.state) == sides[i]]
            chosen = {}
            if ours:
                visits, _ = search(agent, np.stack([playing[i] for i in ours]), searching)
                chosen = dict(zip(ours, visits.argmax(-1) + agent.action_space.start, strict=True))
            for i in list(playing):
                if i not in chosen:
                    state = envs[i].unwrapped.state
                    perfect = rng.choice(np.flatnonzero(solution[key_of(state)][2])) if solution else None
                    chosen[i] = perfect if solution else opponents[i].step(state)
                playing[i], reward, terminated, truncated, _ = envs[i].step(chosen[i])
                returns[i : i + 1] += sides[i] * reward  # some environments return an array of one element
                lengths[i] += 1
                if terminated or truncated or lengths[i] == args.eval_max_steps:
                    del playing[i]
    if lengths.max() == args.eval_max_steps:
        tqdm.write(f"--eval-max-steps {args.eval_max_steps} was reached: perhaps an episode was cut")
    result = {"eval/episodic_return": returns.mean(), "eval/return_std": returns.std()}
    result["eval/episodic_length"] = lengths.mean()
    if solution and not playing:
        deserved = sides * solution[key_of(load_game(args.env_id).new_initial_state())][1]  # what perfect play earns
        right = optimal_moves(agent, solution, searching)  # (2, positions)
        result |= {"eval/losses_to_perfect": np.sum(returns < deserved)}
        result |= {"eval/network_optimal": right[0].mean(), "eval/search_optimal": right[1].mean()}
    return {} if playing or Run.stop_signal else result


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
