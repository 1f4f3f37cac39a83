"""AlphaZero: a network and a tree search teach each other, by games against themselves.

The network sees a position s and gives a probability p_a for each move a, and v, a guess of how the game will end for
the player to move: 1 is a win, -1 a loss. The search looks ahead along likely and good moves, so its choice is better
than the network's. The network learns the search's choices and the results of the games, and a better network searches
better. Nothing but the rules is given.

    [1] in the tree:   a = argmax_a Q(s, a) + C(s) P(s, a) sqrt(N(s)) / (1 + N(s, a))         AlphaZero, pseudocode
        C(s) = log((1 + N(s) + c_base) / c_base) + c_init
    [2] backup:        N(s, a) <- N(s, a) + 1,  W(s, a) <- W(s, a) + v,  Q(s, a) = W(s, a) / N(s, a)    AlphaGo Zero
    [3] at the root:   P(s, a) = (1 - epsilon) p_a + epsilon eta_a,  eta ~ Dirichlet(alpha)             AlphaGo Zero
    [4] policy target: pi_a = N(s, a) / sum_b N(s, b) at the root                              AlphaZero, pseudocode
    [5] loss:          l = (z - v)^2 - pi^T log p + c ||theta||^2                                       AlphaZero

N counts how often the search went through a position or took a move. P is p; only at the root in self-play it is [3].
In [2] v is the network's value of the new position, or the result where the game is over. It goes up the path, at each
position with the sign for its player to move. z is the result of the game for the player to move in s: -1, 0 or 1.

Papers: Silver et al. 2017, arXiv:1712.01815; pseudocode: doi:10.1126/science.aar6404. AlphaGo Zero: Nature 550, 354.

Differs from the paper:
- Games run side by side in one process, with learning between moves. None is resigned.
- The board is not turned towards the mover, and is one position, not 8. At the root N(s) is 1 above the pseudocode's.
- Games of self-play begin with a few random moves, so that the network also learns positions that follow mistakes.
- Q is from -1 to 1, and 0 for an untried move, as in AlphaGo Zero. In the pseudocode an untried move counts as lost.
- The network: an MLP, or residual blocks without batch norm, then 4 channels and a layer that both heads share.
- AdamW: its weight decay stands for the last term of [5]. Illegal moves are masked out of the loss as well.

    python algorithms/alphazero.py --env-id tic_tac_toe
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
from collections.abc import Callable
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
    env_id: str = "tic_tac_toe"  # a game of OpenSpiel, also with its parameters: connect_four(rows=4,columns=4)
    seed: int = 1  # seed of environments, networks and sampling
    total_timesteps: int = 80_000  # environment steps, summed over all environments
    num_envs: int = 100  # environments stepped together
    device: str = "auto"  # auto (here always a CPU), cpu, cuda, cuda:N or mps
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
    num_simulations: int = 50  # walks through the tree for each move of self-play; paper: 800
    eval_simulations: int = 200  # the same in evaluations
    c_init: float = 1.25  # [1] weight of P against Q; paper: 1.25 for Q from 0 to 1, as much as 2.5 here
    c_base: float = 19_652.0  # [1] visits of a node after which C(s) has grown by log 2: far more than here
    dirichlet_alpha: float = 1.0  # [3] the smaller, the fewer moves get most of the noise; paper: 0.3 chess, 0.03 Go
    noise_fraction: float = 0.25  # [3] epsilon
    temperature: float = 1.0  # draws a move of self-play in proportion to N ** (1 / temperature); 0: the most visited
    temperature_moves: int = 30  # of a game, moves that are drawn; every later move is the one with the most visits
    random_moves: int = 6  # a game of self-play begins with 0 to this many random moves; paper: 0
    num_blocks: int = 0  # residual blocks; 0: no convolutions, which is enough for tiny boards; paper: 19
    num_channels: int = 64  # of a convolution; paper: 256
    hidden_size: int = 256  # units of a layer
    learning_rate: float = 1e-3  # of AdamW; paper: 0.2 to 0.0002, of SGD
    anneal_lr: bool = True  # let the learning rate fall linearly to 0
    weight_decay: float = 1e-4  # [5] c
    buffer_size: int = 50_000  # positions in the replay buffer; paper: those of the last 1,000,000 games
    batch_size: int = 256  # positions in a gradient step; paper: 4096
    learning_starts: int = 5_000  # environment steps before the first gradient step
    train_frequency: int = 8  # environment steps, summed over all environments, per gradient step
    eval_positions: int = 5_000  # positions in which the chosen move is compared with the best, in a solved game
    opponent_simulations: int = 1_000  # of OpenSpiel's search, the opponent in games that can't be solved
    play: bool = False  # with --evaluate: you play one game against the model, in the terminal

    def __post_init__(self) -> None:
        counts = {"temperature_moves": (0, 1e12), "random_moves": (0, 1e12), "num_blocks": (0, 1e12)}  # may be 0
        limits = {"noise_fraction": (0, 1), "learning_starts": (0, 1e12)}
        check_ranges(self, c_base=(1, math.inf), dirichlet_alpha=(0.001, 1e6), **counts, **limits)
        if self.play and not self.evaluate:
            raise UsageError("--play needs --evaluate and --run-dir")


class ResidualBlock(nn.Module):
    """Two convolutions learn what to add to their input: (B, channels, H, W) -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class Network(nn.Module):
    """(p, v) = f(s). An observation: which of A moves are legal (0 or 1 each), who is to move (0 or 1), the board."""

    def __init__(self, args: Args, obs_shape: tuple[int, ...], action_space: gym.Space, board: list[int]):
        super().__init__()
        self.obs_shape, self.action_space = obs_shape, action_space
        self.board = board  # (C, H, W) where it has rows and columns
        size, channels, num_cells = args.hidden_size, args.num_channels, math.prod(board[1:])
        self.widths = [int(action_space.n), 1, math.prod(board)]  # sizes of the three parts
        self.num_blocks = args.num_blocks
        if args.num_blocks and len(board) != 3:
            raise UsageError(f"--num-blocks must be 0: the board of {args.env_id} has no rows and columns, but {board}")
        if not args.num_blocks:
            layers = [nn.Linear(1 + math.prod(board), size), nn.ReLU(), nn.Linear(size, size), nn.ReLU()]
        else:  # the player to move is one more plane
            layers = [nn.Conv2d(board[0] + 1, channels, 3, padding=1), nn.ReLU()]
            layers += [ResidualBlock(channels) for _ in range(args.num_blocks)]
            layers += [nn.Conv2d(channels, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * num_cells, size), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.policy_head = nn.Linear(size, int(action_space.n))
        self.value_head = nn.Sequential(nn.Linear(size, 1), nn.Tanh())

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:  # (B, O) -> (B, A) logits of p, (B,) v
        legal, player, board = obs.split(self.widths, dim=1)  # player: 0 or 1 here, 1 or -1 in judge and in the tree
        if self.num_blocks:
            board = board.unflatten(1, self.board)  # (B, C, H, W)
            player = player[..., None, None].expand(-1, 1, *self.board[1:])  # (B, 1, H, W)
        features = self.body(torch.cat([board, player], dim=1))  # (B, hidden_size)
        logits = self.policy_head(features).masked_fill(legal <= 0, -1e9)  # p = 0; with -inf, [5] has 0 * inf = nan
        return logits, self.value_head(features).squeeze(1)

    @torch.inference_mode()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The move that the network itself finds best, without a search: (O,) -> (), or for a batch (B, O) -> (B,)"""
        obs = torch.as_tensor(np.asarray(obs), dtype=torch.float32, device=next(self.parameters()).device)
        return self(obs.reshape(-1, obs.shape[-1]))[0].argmax(-1).reshape(obs.shape[:-1]).cpu().numpy()

    @torch.inference_mode()
    def judge(self, states: list[pyspiel.State]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What the search has to know of B positions: legal moves (B, A), P (B, A), value_of_first (B,), player (B,).

        value_of_first is player 0's: of a finished game its result, else the network's guess.
        """
        obs = np.stack([observe(state) for state in states])
        logits, v = self(torch.from_numpy(obs).to(next(self.parameters()).device))
        player = np.array([player_of(state) for state in states])
        value_of_first = player * v.cpu().numpy()  # v is that of the player to move
        for i in np.flatnonzero(player == 0):
            value_of_first[i] = result_of(states[i])
        return obs[:, : self.widths[0]] > 0, logits.softmax(-1).cpu().numpy(), value_of_first, player


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


class Tree:
    """Searches of B games side by side: the same row of each array is the same game.

    A node is a position. Node 0 is the root. Simulation k adds node k, or none if it comes to a known end of the game.
    """

    def __init__(self, num_games: int, num_nodes: int, num_moves: int):
        nodes, moves = (num_games, num_nodes), (num_games, num_nodes, num_moves)
        self.visits, self.total, self.prior = np.zeros(moves), np.zeros(moves), np.zeros(moves)  # N, W, P of (s, a)
        self.legal = np.zeros(moves, bool)
        self.child = np.full(moves, -1)  # the node to which a move leads; -1: none yet
        self.value_of_first, self.player = np.zeros(nodes), np.zeros(nodes)  # as judge gives them

    def add(self, games: np.ndarray, node: int, judged: tuple[np.ndarray, ...]) -> None:
        """judged: what Network.judge says of this node's position in each of these games."""
        self.legal[games, node], self.prior[games, node] = judged[:2]
        self.value_of_first[games, node], self.player[games, node] = judged[2:]

    def select(self, args: Args) -> tuple[list[tuple], np.ndarray, np.ndarray, np.ndarray]:
        """Walks down each tree, by [1], to a move that leads to no node yet, or to the end of the game.

        Returns the path: for each depth the games whose walks came so far, their nodes and moves. And the last step of
        each walk, (B,) each: from which node, by which move, and to which node; -1: to none yet.
        """
        games, nodes, path = np.arange(len(self.visits)), np.zeros(len(self.visits), int), []
        parent, last_move, leaf = nodes.copy(), nodes.copy(), nodes.copy()
        while len(games):
            scores = puct(self.visits[games, nodes], self.total[games, nodes], self.prior[games, nodes], args)
            moves = np.where(self.legal[games, nodes], scores, -np.inf).argmax(-1)
            path.append((games, nodes, moves))
            next_nodes = self.child[games, nodes, moves]
            parent[games], last_move[games], leaf[games] = nodes, moves, next_nodes
            inside = (next_nodes >= 0) & (self.player[games, next_nodes] != 0)  # they go on; -1: masked
            games, nodes = games[inside], next_nodes[inside]
        return path, parent, last_move, leaf

    def backup(self, path: list[tuple], value_of_first: np.ndarray) -> None:
        """value_of_first: (B,), what the position at the end of each game's path is worth to player 0."""
        for games, nodes, moves in path:
            self.visits[games, nodes, moves] += 1  # [2]
            self.total[games, nodes, moves] += self.player[games, nodes] * value_of_first[games]  # [2] v for its mover


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


def search(judge: Callable, states: list[pyspiel.State], args: Args, noise: bool = False) -> np.ndarray:
    """Searches from each of the B positions: N(s, a) at the roots, (B, A). judge is Network.judge, or acts like it."""
    everyone = np.arange(len(states))  # the index of each game
    positions = {(game, 0): state for game, state in enumerate(states)}  # (game, node) -> state
    tree = Tree(len(states), args.num_simulations + 1, states[0].num_distinct_actions())
    tree.add(everyone, 0, judge(states))
    if noise:
        tree.prior[:, 0] = add_noise(tree.prior[:, 0], tree.legal[:, 0], args)
    for node in range(1, args.num_simulations + 1):
        path, parent, move, leaf = tree.select(args)
        # Expand: the network judges all new positions at once. An end of the game gets a node too, the first time
        new = np.flatnonzero(leaf < 0)
        for game in new.tolist():
            positions[game, node] = positions[game, int(parent[game])].child(int(move[game]))
        if len(new):
            tree.add(new, node, judge([positions[game, node] for game in new.tolist()]))
            tree.child[new, parent[new], move[new]] = node
            leaf[new] = node
        tree.backup(path, tree.value_of_first[everyone, leaf])
    return tree.visits[:, 0]


def draw_moves(pi: np.ndarray, move_numbers: np.ndarray, args: Args) -> np.ndarray:
    """The moves of self-play: (B, A) -> (B,). move_numbers, (B,): how many came before, random ones included."""
    if args.temperature == 0:
        return pi.argmax(-1)
    weights = (pi / pi.max(-1, keepdims=True)) ** (1 / args.temperature)  # at most 1: no overflow, no sum of 0
    shares = weights.cumsum(-1)  # (B, A)
    shares /= shares[:, -1:]  # rising to 1 exactly: divided by weights.sum(-1), the last can be rounded below 1
    drawn = (shares > np.random.random((len(pi), 1))).argmax(-1)  # the first that is above the random number
    return np.where(move_numbers < args.temperature_moves, drawn, pi.argmax(-1))


class GameBuffer:
    """The last positions of finished games, a row each: observation, pi, z. Those of unfinished games wait for z."""

    def __init__(self, buffer_size: int, widths: list[int], num_envs: int, device: str):
        needed = 4e-9 * buffer_size * sum(widths)  # GB: a float32 has four bytes
        memory = 1e-9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
        if needed > 0.9 * memory:
            raise UsageError(f"--buffer-size {buffer_size} needs {needed:.1f} GB; this machine has {memory:.1f} GB")
        self.rows = torch.empty(buffer_size, sum(widths), device=device)  # on a CPU it takes memory as it fills
        self.widths, self.num_added, self.waiting = widths, 0, [[] for _ in range(num_envs)]

    def add(self, obs: np.ndarray, pi: np.ndarray, player: np.ndarray) -> None:  # (N, O), (N, A), (N,): 1 or -1
        # The last column holds the player, 1 or -1, until the result is known
        rows = np.concatenate([obs, pi, player[:, None]], axis=1, dtype=np.float32)
        for waiting, row in zip(self.waiting, rows, strict=True):
            waiting.append(row)

    def finish(self, game: int, result: float) -> None:
        """result: player 0's. z is that of the player who was to move."""
        waiting = self.waiting[game][-len(self.rows) :]  # of a game that is longer than the buffer, the last ones
        new = torch.from_numpy(np.stack(waiting)).to(self.rows.device)
        new[:, -1] *= result  # player * player 0's result is z
        self.rows[(self.num_added + torch.arange(len(new))) % len(self.rows)] = new
        self.num_added += len(new)
        self.waiting[game] = []

    def sample(self, batch_size: int) -> tuple[Tensor, ...]:  # (B, O), (B, A), (B, 1)
        filled = min(self.num_added, len(self.rows))
        return self.rows[torch.randint(filled, (batch_size,), device=self.rows.device)].split(self.widths, dim=1)

    def state_dict(self) -> dict:  # clone: torch.save would write all the memory behind a slice
        waiting = [torch.from_numpy(np.array(rows)) for rows in self.waiting]
        return {"rows": self.rows[: self.num_added].clone(), "num_added": self.num_added, "waiting": waiting}

    def load_state_dict(self, state: dict) -> None:
        self.num_added, self.waiting = state["num_added"], [list(rows.numpy()) for rows in state["waiting"]]
        self.rows[: self.num_added] = state["rows"].to(self.rows.device)


def alphazero_loss(agent: Network, obs: Tensor, pi: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """[5] but for its last term, which is AdamW's decay: (B, O), (B, A), (B, 1) -> the loss, and metrics to log."""
    logits, v = agent(obs)
    policy_loss = -(pi * logits.log_softmax(-1)).sum(-1).mean()  # [5]
    value_loss = (z.squeeze(1) - v).square().mean()  # [5]
    entropy = torch.special.entr(pi).sum(-1).mean()  # of pi: the smallest policy loss that is possible
    metrics = {"losses/policy_loss": policy_loss, "losses/value_loss": value_loss, "losses/target_entropy": entropy}
    return value_loss + policy_loss, {name: value.detach() for name, value in metrics.items()}


def make_agent(args: Args, obs_shape: tuple[int, ...], action_space: gym.Space) -> Network:
    return Network(args, obs_shape, action_space, load_game(args.env_id).observation_tensor_shape())


def train(args: Args) -> dict[str, float]:
    """Trains a network, returns its last evaluation. run.step acts; run.goes_on evaluates and saves; run.log writes."""
    with contextlib.closing(Run(args)) as run:  # closes the environments, also after an error
        agent = make_agent(args, run.obs_shape, run.action_space).to(run.device)
        adam = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "fused": True}
        optimizer = torch.optim.AdamW(agent.parameters(), **adam)
        buffer = GameBuffer(args.buffer_size, [*run.obs_shape, int(run.action_space.n), 1], args.num_envs, run.device)
        run.start(model=agent, optimizer=optimizer, buffer=buffer)
        for waiting, moves in zip(buffer.waiting, run.actions, strict=True):
            if not moves:  # a game that could not be replayed after --resume began again
                waiting.clear()
        while run.goes_on():  # False at the end
            # 1. Play: a search and a move in each of the games
            obs, first_step = run.obs, run.global_step  # after an end run.obs is the next game's first
            states = [env.unwrapped.state for env in run.envs]
            visits = search(agent.judge, states, args, noise=True)
            pi = visits / visits.sum(-1, keepdims=True)  # [4] the temperature changes the move played, not this target
            player = np.array([player_of(state) for state in states])
            actions = draw_moves(pi, np.array([state.move_number() for state in states]), args)
            _, rewards, terminated, _, _ = run.step(actions)

            # 2. Keep: a finished game's result is the target of all its positions
            buffer.add(obs, pi, player)
            for game in np.flatnonzero(terminated):
                buffer.finish(game, rewards[game])

            # 3. Learn: a gradient step per train_frequency environment steps; this pass made N environment steps
            if run.global_step < args.learning_starts or buffer.num_added == 0:
                continue
            rate = args.learning_rate * ((1 - first_step / args.total_timesteps) if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = rate
            for number in range(first_step // args.train_frequency + 1, run.global_step // args.train_frequency + 1):
                loss, metrics = alphazero_loss(agent, *buffer.sample(args.batch_size))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if number % 100 == 0:  # 4. Log
                    run.log(metrics | {"charts/learning_rate": rate})
        return run.result


# From here to the ruled line: the game as an environment, its solution, and a game against you
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


class Board(gym.Env):
    """A game of OpenSpiel as an environment of Gymnasium. Whoever is to move acts; rewards are player 0's."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 1}

    def __init__(self, args: Args, render_mode: str | None, random_moves: int):
        self.game, self.render_mode, self.random_moves = load_game(args.env_id), render_mode, random_moves
        self.judge = None  # render shows what it thinks
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
        self.state = self.state.child(int(action))
        over = self.state.is_terminal()
        return observe(self.state), (result_of(self.state) if over else 0.0), over, False, {}

    def render(self) -> np.ndarray:  # (400, 640, 3)
        """The position as text. Where judge is given: what it expects, and its moves with their probabilities p."""
        image, lines = Image.new("RGB", (640, 400), "white"), str(self.state).splitlines()
        draw, font = ImageDraw.Draw(image), ImageFont.load_default(18)
        if self.judge and not self.state.is_terminal():
            _, (p,), (value_of_first,), _ = self.judge([self.state])
            moves = sorted(self.state.legal_actions(), key=lambda move: -p[move])[:14]
            names = [f"{self.state.action_to_string(move)}  {p[move]:.2f}" for move in moves]
            draw.multiline_text((420, 10), "\n".join([f"result {value_of_first:+.2f}", *names]), "black", font)
        size = min(400 / max(len(line) for line in lines), 400 / len(lines), 100)  # of a cell, one for each character
        font = ImageFont.load_default(0.8 * size)
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
    parts = [search(agent.judge, states[i : i + 250], args).argmax(-1) for i in range(0, len(states), 250)]
    moves = agent.act(np.stack([observe(state) for state in states])), np.concatenate(parts)
    return np.stack([np.stack(best)[np.arange(len(chosen)), move] for move in moves])


def play(agent: Network, args: Args) -> dict[str, float]:
    """You against the model, one game. Beside each move: how often the search took it, and the network's p."""
    state = load_game(args.env_id).new_initial_state()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # main's would wait for the end of the game
    try:
        side = player_of(state) * (1 if input("Do you begin? y or n: ").lower().startswith("y") else -1)
        while not state.is_terminal():
            visits, (_, (p,), (value_of_first,), _) = search(agent.judge, [state], args)[0], agent.judge([state])
            names = {state.action_to_string(move): move for move in state.legal_actions()}
            print(f"\n{state}\nThe network expects {value_of_first:+.2f} for player 0.")
            for name, move in sorted(names.items(), key=lambda item: -visits[item[1]]):
                print(f"    {move:>4}  {name:<12} visits {visits[move]:>5.0f}  p {p[move]:.3f}")
            move = visits.argmax().item()
            if player_of(state) == side:
                answers = names | {str(move): move for move in names.values()}
                while (answer := input("Your move, as number or name: ").strip()) not in answers:
                    print("That is no move here.")
                move = answers[answer]
            else:
                print("The model plays", state.action_to_string(move))
            state.apply_action(move)
    except EOFError:
        raise UsageError("--play needs a terminal in which you can type") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(f"\n{state}")
    return {"eval/episodic_return": -side * result_of(state)}  # the model's


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


def make_env(args: Args, film: Path | None = None, random_moves: int | None = None) -> gym.Env:
    env = Board(args, "rgb_array" if film else None, args.random_moves if random_moves is None else random_moves)
    return gym.wrappers.RecordVideo(env, str(film.parent), lambda i: i == 0, name_prefix=film.name) if film else env


def evaluate(agent: nn.Module, args: Args, film: Path) -> dict[str, float]:
    """Plays eval_episodes games, with the search and without noise. The agent begins every second one. Films the first.

    The opponent is a perfect player where the game can be solved, else OpenSpiel's search, which rates positions by
    random play.
    """
    searching = replace(args, num_simulations=args.eval_simulations)
    seeds = np.random.SeedSequence([args.seed, 1]).generate_state(args.eval_episodes) // 2  # 1: training has 0
    rng, game = np.random.default_rng(seeds), load_game(args.env_id)
    with contextlib.ExitStack() as stack:
        films = [film if args.capture_video else None] + [None] * (len(seeds) - 1)
        envs = [stack.enter_context(contextlib.closing(make_env(args, film, 0))) for film in films]
        here, there = (envs[0].observation_space.shape, envs[0].action_space), (agent.obs_shape, agent.action_space)
        if here != there:
            raise UsageError(f"--env-id {args.env_id} observes and acts in {here}, the trained agent in {there}")
        if args.play:
            args.eval_episodes = 1  # main prints it
            return play(agent, searching)
        envs[0].unwrapped.judge, bots, solution = agent.judge, [], solve(args.env_id)
        for env, seed in zip(envs, seeds.tolist(), strict=True):
            env.reset(seed=seed)
            rollouts = pyspiel.RandomRolloutEvaluator(1, seed)  # one random game for each position that it rates
            # 2.0: how much it explores; 1000: MB of memory at most; True: it proves wins where it can
            bots.append(pyspiel.MCTSBot(game, rollouts, 2.0, args.opponent_simulations, 1000, True, seed, False))
        sides = 1 - 2 * (np.arange(len(seeds)) % 2)  # 1 where the agent is player 0, else -1
        returns, lengths, playing = np.zeros(len(seeds)), np.zeros(len(seeds)), [*range(len(seeds))]
        while playing:
            states = {i: envs[i].unwrapped.state for i in playing}
            ours = [i for i in playing if player_of(states[i]) == sides[i]]
            moves = search(agent.judge, [states[i] for i in ours], searching).argmax(-1) if ours else []
            chosen = dict(zip(ours, moves, strict=True))
            for i in playing.copy():
                if i not in chosen and solution:
                    chosen[i] = rng.choice(np.flatnonzero(solution[key_of(states[i])][2]))
                elif i not in chosen:
                    chosen[i] = bots[i].step(states[i])
                _, reward, over, _, _ = envs[i].step(chosen[i])
                returns[i] += sides[i] * reward
                lengths[i] += 1
                if over or lengths[i] == args.eval_max_steps:
                    playing.remove(i)
                    if not over:
                        tqdm.write(f"--eval-max-steps {args.eval_max_steps} has cut an episode of this evaluation")
                if Run.stop_signal:
                    return {}
    result = {"eval/episodic_return": returns.mean(), "eval/return_std": returns.std()}
    result["eval/episodic_length"] = lengths.mean()
    if not solution:
        return result
    deserved = sides * solution[key_of(game.new_initial_state())][1]  # what perfect play earns
    result["eval/losses_to_perfect"] = np.sum(returns < deserved)
    right = optimal_moves(agent, solution, searching)  # (2, positions)
    if Run.stop_signal:
        return {}
    return result | {"eval/network_optimal": right[0].mean(), "eval/search_optimal": right[1].mean()}


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
