"""alphazero.py: the search against exact values, signs and targets by hand, the exact solution, and what is learned."""

import contextlib
import importlib
import math
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyspiel
import pytest
import torch
from conftest import ROOT, rows

from algorithms import alphazero as az

TIC_TAC_TOE, CONNECT_THREE = "tic_tac_toe", "connect_four(rows=4,columns=4,x_in_row=3)"


def position(game, moves=()):
    state = az.load_game(game).new_initial_state()
    for move in moves:
        state.apply_action(move)
    return state


def exact(game, prior=None):
    """Judges positions as the perfect network would: by minimax; all moves are equally likely."""
    solution = az.solve(game)

    def judge(states):
        legal = np.zeros((len(states), states[0].num_distinct_actions()), bool)
        value, player = np.zeros(len(states)), np.array([az.player_of(state) for state in states])
        for i, state in enumerate(states):
            legal[i, state.legal_actions()] = True
            value[i] = az.result_of(state) if player[i] == 0 else solution[az.key_of(state)][1]
        return legal, legal / np.maximum(legal.sum(-1, keepdims=True), 1), value, player

    return judge


def blind(states):
    """Judges as a network that knows nothing but the ends of games."""
    legal = np.array([[move in state.legal_actions() for move in range(9)] for state in states])
    player = np.array([az.player_of(state) for state in states])
    value = np.array([az.result_of(s) if p == 0 else 0.0 for s, p in zip(states, player, strict=True)])
    return legal, legal / np.maximum(legal.sum(-1, keepdims=True), 1), value, player


class Perfect:
    """An agent that plays by the exact solution; worst: it chooses the move that is worst."""

    def __init__(self, game, worst=False):
        args = az.Args(env_id=game)
        with contextlib.closing(az.make_env(args)) as env:
            self.obs_shape, self.action_space = env.observation_space.shape, env.action_space
        self.solution, self.sign, self.exact = az.solve(game), -1 if worst else 1, exact(game)
        self.by_obs = {az.observe(state).tobytes(): best for state, _, best in self.solution.values()}

    def judge(self, states):
        legal, prior, value, player = self.exact(states)
        return legal, prior, self.sign * value, player

    def act(self, obs):
        return np.array([self.by_obs[row.tobytes()].argmax() for row in obs])


# ---- The search


@pytest.mark.parametrize(
    ("game", "simulations", "share"),
    [(TIC_TAC_TOE, 40, 0.2), pytest.param(TIC_TAC_TOE, 40, 1, marks=pytest.mark.slow),
     pytest.param(CONNECT_THREE, 40, 1, marks=pytest.mark.slow)],
)  # fmt: skip
def test_with_exact_values_the_search_returns_a_minimax_move_in_every_state(game, simulations, share):
    args = az.Args(num_simulations=simulations)
    positions = list(az.solve(game).values())[:: round(1 / share)]
    for part in np.array_split(np.arange(len(positions)), math.ceil(len(positions) / 1000)):
        visits = az.search(exact(game), [positions[i][0] for i in part], args)
        best = np.array([positions[i][2] for i in part])
        assert best[np.arange(len(part)), visits.argmax(-1)].all()


def test_without_any_knowledge_it_sees_a_win_and_a_threat_one_move_ahead():
    """x x . / o o . / . . . : whoever is to move takes the third in a row; and who can't win, must block."""
    args = az.Args(num_simulations=200)
    first, second = position(TIC_TAC_TOE, [0, 3, 1, 4]), position(TIC_TAC_TOE, [0, 3, 1, 4, 8])
    must_block = position(TIC_TAC_TOE, [0, 3, 7, 4])
    assert az.search(blind, [first, second, must_block], args).argmax(-1).tolist() == [2, 5, 5]


def test_visits_sum_to_the_simulations_and_illegal_moves_have_none():
    states = [position(TIC_TAC_TOE, moves) for moves in ([], [4], [4, 0, 8, 2, 6], [0, 1, 2, 3, 4, 6, 5, 8])]
    for noise in False, True:
        visits = az.search(blind, states, az.Args(num_simulations=33), noise=noise)
        assert (visits.sum(-1) == 33).all()
        for state, row in zip(states, visits, strict=True):
            assert not row[[move for move in range(9) if move not in state.legal_actions()]].any()


def test_a_search_is_the_same_alone_and_beside_others():
    states = [state for state, _, _ in list(az.solve(TIC_TAC_TOE).values())[::500]]
    args = az.Args(num_simulations=30)
    together = az.search(exact(TIC_TAC_TOE), states, args)
    for state, row in zip(states, together, strict=True):
        assert np.array_equal(az.search(exact(TIC_TAC_TOE), [state], args)[0], row)


GRID = np.arange(9).reshape(3, 3)
SYMMETRIES = [np.rot90(grid, turns).ravel() for grid in (GRID, GRID.T) for turns in range(4)]  # new cell: old cell


def symmetric_judge(states):
    """Priors and values without meaning, but the same for a position that is turned or mirrored; no two are equal."""
    legal, _, value, player = blind(states)
    prior = np.zeros(legal.shape)
    for i, state in enumerate(states):
        cells = np.array([*str(state).replace("\n", "")])

        def number(*what):
            return np.random.default_rng([ord(c) for c in "".join(what)]).random()

        for move in np.flatnonzero(legal[i]):
            marked = cells.copy()
            marked[move] = "?"
            prior[i, move] = math.fsum(sorted(number(*marked[turn]) for turn in SYMMETRIES))
        if player[i]:
            value[i] = math.fsum(sorted(number(*cells[turn]) for turn in SYMMETRIES)) / 8 - 0.5
    return legal, prior / 10, value, player


def test_symmetric_positions_are_searched_alike():
    args = az.Args(num_simulations=25)
    moves = [0, 1, 5]
    turned = [[int(np.flatnonzero(turn == move)[0]) for move in moves] for turn in SYMMETRIES]
    visits = az.search(symmetric_judge, [position(TIC_TAC_TOE, each) for each in turned], args)
    for turn, row in zip(SYMMETRIES, visits, strict=True):
        assert np.array_equal(row, visits[0][turn])
    assert len(np.unique(visits[0])) > 3, "the moves differ"


def test_puct_by_hand():
    args = az.Args(c_init=1.5, c_base=10)
    visits, total, prior = np.array([[3.0, 1, 0]]), np.array([[1.5, -1, 0]]), np.array([[0.5, 0.3, 0.2]])
    c = math.log((1 + 5 + 10) / 10) + 1.5  # N(s) = 1 + 3 + 1 + 0
    root = math.sqrt(5)
    expected = [0.5 + c * 0.5 * root / 4, -1 + c * 0.3 * root / 2, 0 + c * 0.2 * root / 1]
    assert az.puct(visits, total, prior, args)[0] == pytest.approx(expected)


def test_a_value_counts_against_the_other_player_and_for_a_player_who_moves_twice():
    tree = az.Tree(2, 4, 2)
    tree.player[:] = [[1, -1, 1, -1], [-1, -1, 1, 0]]
    everyone = np.array([0, 1])
    path = [(everyone, np.array([0, 0]), np.array([1, 0])), (everyone, np.array([1, 1]), np.array([0, 0]))]
    path.append((np.array([1]), np.array([2]), np.array([1])))
    for _ in range(2):
        tree.backup(path, np.array([0.5, -1.0]))
    assert tree.total[0, 0].tolist() == [0, 1]  # twice 0.5 for the first player
    assert tree.total[0, 1].tolist() == [-1, 0]
    assert tree.total[1, 0].tolist() == tree.total[1, 1].tolist() == [2, 0], "the second player moved twice"
    assert tree.total[1, 2].tolist() == [0, -2]
    assert tree.visits[0, 0].tolist() == [0, 2]
    assert tree.visits[1, 2].tolist() == [0, 2]


def test_a_game_in_which_a_player_moves_twice_is_searched_rightly():
    """In mancala a last stone in one's own store gives another move: minimax two moves deep, by hand."""
    game = "mancala"
    start = position(game)
    again = [move for move in start.legal_actions() if start.child(move).current_player() == 0]
    assert again, "there is such a move"

    def judge(states):  # the more stones in the first player's store, the better for the first player
        legal = np.array([s.legal_actions_mask() for s in states], bool)
        stores = [s.observation_tensor(0) for s in states]
        value = np.array([(store[7] - store[0]) / 48 for store in stores])
        return legal, legal / legal.sum(-1, keepdims=True), value, np.array([az.player_of(s) for s in states])

    visits = az.search(judge, [start], az.Args(num_simulations=300, c_init=0.1))[0]
    assert visits.argmax() in again


def test_noise_has_the_moments_of_a_dirichlet_distribution_and_none_for_illegal_moves():
    np.random.seed(0)
    alpha, legal = 0.5, np.tile([True, True, False, True], (20_000, 1))
    prior = np.where(legal, 1 / 3, 0)
    eta = az.add_noise(prior, legal, az.Args(dirichlet_alpha=alpha, noise_fraction=1))
    assert (eta[:, 2] == 0).all()
    assert eta.sum(-1) == pytest.approx(np.ones(len(eta)))
    assert eta[:, 0].mean() == pytest.approx(1 / 3, abs=0.01)
    assert eta[:, 0].var() == pytest.approx((1 / 3) * (2 / 3) / (3 * alpha + 1), rel=0.03)
    mixed = az.add_noise(prior, legal, az.Args(noise_fraction=0.25))
    assert mixed[:, 0].min() >= 0.25, "three quarters are the network's"
    alone = np.tile([False, True], (1000, 1))
    assert (az.add_noise(alone * 1.0, alone, az.Args(dirichlet_alpha=0.001)) == alone).all()


def test_noise_is_added_at_the_root_only_in_self_play():
    np.random.seed(0)
    args, states = az.Args(num_simulations=30, noise_fraction=1.0, dirichlet_alpha=0.1), [position(TIC_TAC_TOE)]
    plain = [az.search(blind, states, args)[0].tolist() for _ in range(3)]
    noisy = [az.search(blind, states, args, noise=True)[0].tolist() for _ in range(3)]
    assert plain[0] == plain[1] == plain[2]
    assert noisy[0] != noisy[1] != noisy[2]


@pytest.mark.parametrize(("temperature", "expected"), [(1, [0, 0.2, 0.8]), (0.5, [0, 1 / 17, 16 / 17])])
def test_moves_are_drawn_by_their_visits(temperature, expected):
    np.random.seed(0)
    pi = np.tile([0, 0.2, 0.8], (20_000, 1))
    args = az.Args(temperature=temperature, temperature_moves=3)
    drawn = az.draw_moves(pi, np.full(len(pi), 2), args)
    assert np.bincount(drawn, minlength=3) / len(pi) == pytest.approx(expected, abs=0.01)
    assert (az.draw_moves(pi, np.full(len(pi), 3), args) == 2).all(), "later moves are the most visited"
    assert (az.draw_moves(pi, np.zeros(len(pi)), replace(args, temperature=0.0)) == 2).all()
    assert (az.draw_moves(pi[:99], np.zeros(99), replace(args, temperature=1e-3)) == 2).all(), "without overflow"


def test_a_legal_move_is_drawn_even_by_the_largest_random_number(monkeypatch):
    """Rounding must not leave the last share below the number: then no share is above it."""
    monkeypatch.setattr(np.random, "random", lambda shape: np.full(shape, 1 - 2**-53))
    visits = np.random.default_rng(0).integers(1, 50, (1000, 60)) * ([0] + [1] * 59)  # move 0 is illegal
    args = az.Args(temperature=0.7)
    assert (az.draw_moves(visits / visits.sum(-1, keepdims=True), np.zeros(1000), args) > 0).all()


# ---- The network


def network(game=TIC_TAC_TOE, **flags):
    torch.manual_seed(0)
    args = az.Args(env_id=game, hidden_size=16, num_channels=8, **flags)
    with contextlib.closing(az.make_env(args)) as env:
        return az.make_agent(args, env.observation_space.shape, env.action_space)


@pytest.mark.parametrize(("game", "blocks"), [(TIC_TAC_TOE, 0), (CONNECT_THREE, 1), ("connect_four", 4), ("nim", 0)])
def test_a_network_with_and_without_convolutions(game, blocks):
    agent = network(game, num_blocks=blocks)
    assert sum(isinstance(layer, az.ResidualBlock) for layer in agent.body) == blocks
    states = [position(game), position(game, [1])]
    obs = torch.from_numpy(np.stack([az.observe(state) for state in states]))
    logits, v = agent(obs)
    assert logits.shape == (2, agent.action_space.n)
    assert v.shape == (2,)
    assert (v.abs() < 1).all()
    assert [agent.act(row) for row in obs.numpy()] == agent.act(obs.numpy()).tolist()


def test_convolutions_need_rows_and_columns():
    with pytest.raises(az.UsageError, match=r"--num-blocks must be 0.*nim"):
        network("nim", num_blocks=1)


@pytest.mark.parametrize("flags", [{}, {"num_blocks": 1}])
def test_the_network_sees_every_cell_and_the_player_to_move(flags):
    agent = network(**flags)
    obs = torch.from_numpy(az.observe(position(TIC_TAC_TOE, [4, 0]))[None]).requires_grad_()
    logits, v = agent(obs)
    (gradient,) = torch.autograd.grad(v.sum() + logits[0, 1], obs)
    assert (gradient[0, 9:] != 0).float().mean() > 0.9
    assert gradient[0, 9] != 0, "whose turn it is"


def test_illegal_moves_have_probability_0():
    agent, states = network(), [position(TIC_TAC_TOE, [4, 0, 8]), position(TIC_TAC_TOE, [1])]
    legal, prior, _, _ = agent.judge(states)
    for i, state in enumerate(states):
        assert np.flatnonzero(legal[i]).tolist() == state.legal_actions()
    assert (prior[~legal] == 0).all()
    assert (prior[legal] > 0).all()
    assert prior.sum(-1) == pytest.approx([1, 1])


def test_the_value_is_the_first_players_whoever_is_to_move_and_exact_at_the_end():
    agent = network()
    won, lost = position(TIC_TAC_TOE, [0, 3, 1, 4, 2]), position(TIC_TAC_TOE, [0, 3, 1, 4, 8, 5])
    drawn = position(TIC_TAC_TOE, [0, 1, 2, 4, 3, 5, 7, 6, 8])
    states = [position(TIC_TAC_TOE), position(TIC_TAC_TOE, [4]), won, lost, drawn]
    _, _, value, player = agent.judge(states)
    v = agent(torch.from_numpy(np.stack([az.observe(state) for state in states])))[1].tolist()
    assert player.tolist() == [1, -1, 0, 0, 0]
    assert value == pytest.approx([v[0], -v[1], 1, -1, 0])


def test_a_result_is_won_drawn_or_lost_also_in_games_of_points():
    results, rng = {}, np.random.default_rng(0)
    for _ in range(100):
        state = position("dots_and_boxes(utility_margin=true)", rng.permutation(12))
        results[state.returns()[0]] = az.result_of(state)
    assert results == {-4: -1, -2: -1, 0: 0, 2: 1, 4: 1}


def test_the_loss_by_hand():
    agent = network()
    state = position(TIC_TAC_TOE, [0, 4, 8])
    obs = torch.from_numpy(az.observe(state)[None])
    pi, z = torch.zeros(1, 9), torch.tensor([[-1.0]])
    pi[0, 1], pi[0, 2] = 0.25, 0.75
    _, prior, value, _ = agent.judge([state])
    loss, metrics = az.alphazero_loss(agent, obs, pi, z)
    policy_loss = -0.25 * math.log(prior[0, 1]) - 0.75 * math.log(prior[0, 2])
    assert metrics["losses/policy_loss"].item() == pytest.approx(policy_loss, rel=1e-5)
    assert metrics["losses/value_loss"].item() == pytest.approx((-1 + value[0]) ** 2, rel=1e-5)  # v is the second's
    assert loss.item() == pytest.approx(policy_loss + (-1 + value[0]) ** 2, rel=1e-5)
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert metrics["losses/target_entropy"].item() == pytest.approx(entropy, rel=1e-5)


# ---- What it learns from


def test_z_is_the_result_for_the_player_who_was_to_move():
    buffer = az.GameBuffer(6, [1, 1, 1], 2, "cpu")
    for t, player in enumerate([1, -1, -1]):  # game 0: the second player moves twice, and wins
        obs = np.array([[t], [10 + t]])
        buffer.add(obs, obs / 100, np.array([player, 1]))
    buffer.finish(0, -1.0)
    assert buffer.num_added == 3
    assert buffer.rows[:3, [0, 2]].tolist() == [[0, -1], [1, 1], [2, 1]]
    assert buffer.rows[:3, 1].tolist() == pytest.approx([0, 0.01, 0.02])
    assert {row[0].item() for row in buffer.sample(50)[0]} == {0, 1, 2}, "game 1 is not finished"
    copy = az.GameBuffer(6, [1, 1, 1], 2, "cpu")
    copy.load_state_dict(buffer.state_dict())
    for each in buffer, copy:
        each.add(np.array([[7], [13]]), np.zeros((2, 1)), np.array([1, 1]))
        each.finish(1, 0.0)
        assert each.rows[:, 0].tolist() == [12 + 1, 1, 2, 10, 11, 12], "the oldest is overwritten"
        assert each.rows[[0, 3, 4, 5], 2].tolist() == [0, 0, 0, 0], "a draw"
        assert [len(rows) for rows in each.waiting] == [1, 0]


def test_of_a_game_that_is_longer_than_the_buffer_the_last_positions_stay():
    buffer = az.GameBuffer(3, [1, 1, 1], 1, "cpu")
    for t in range(8):
        buffer.add(np.array([[t]]), np.zeros((1, 1)), np.array([1]))
    buffer.finish(0, 1.0)
    assert buffer.num_added == 3
    assert buffer.rows[:, 0].tolist() == [5, 6, 7]


def test_a_game_that_cannot_be_replayed_leaves_no_positions_for_the_next(monkeypatch, tmp_path):
    """The checkpoint's observations are changed: so every game in progress begins again after --resume."""
    flags = {"total_timesteps": 12, "learning_starts": 200, "eval_frequency": 200, "eval_episodes": 1}
    tiny = {"num_envs": 4, "num_simulations": 2, "eval_simulations": 1, "eval_positions": 1, "random_moves": 0}
    run_dir = tmp_path / "run"
    az.train(az.Args(run_dir=str(run_dir), **flags, **tiny))
    checkpoint = torch.load(run_dir / "checkpoint.pt")
    assert [len(rows) for rows in checkpoint["buffer"]["waiting"]] == [3, 3, 3, 3]
    checkpoint["obs"] += 1
    torch.save(checkpoint, run_dir / "checkpoint.pt")
    kept, finish = [], az.GameBuffer.finish
    monkeypatch.setattr(
        az.GameBuffer, "finish", lambda self, *what: (kept.append(self.waiting[what[0]]), finish(self, *what))
    )
    az.train(az.saved_args(run_dir, resume=True, total_timesteps=60))
    assert len(kept) >= 4
    for game in kept:
        empty = np.array(game)[:, 10:19].sum(-1).tolist()  # the first plane marks empty cells
        assert empty == [*range(9, 9 - len(game), -1)], "from the empty board on, one stone a move"


def test_self_play_keeps_whole_games_with_the_searchs_shares(monkeypatch, tmp_path):
    """Every row is checked: legal moves only, pi sums to 1, and z is the result for the player to move."""
    kept, finish = [], az.GameBuffer.finish

    def keeping(self, game, result):
        kept.append((np.stack(self.waiting[game]), result))
        finish(self, game, result)

    monkeypatch.setattr(az.GameBuffer, "finish", keeping)
    short = {"total_timesteps": 200, "learning_starts": 200, "eval_frequency": 200, "eval_simulations": 1}
    az.train(az.Args(num_envs=4, num_simulations=7, random_moves=3, run_dir=str(tmp_path / "run"), **short))
    assert len(kept) > 10
    returns = [row["charts/episodic_return"] for row in rows(tmp_path / "run") if "charts/episodic_return" in row]
    assert returns == [result for _, result in kept]
    for game, result in kept:
        legal, player, board, pi, sign = game[:, :9], game[:, 9], game[:, 10:37], game[:, 37:46], game[:, 46]
        assert pi.sum(-1) == pytest.approx(np.ones(len(game)))
        assert np.rint(pi * 7) == pytest.approx(pi * 7, abs=1e-5)
        assert (pi[legal == 0] == 0).all()
        assert (sign == 1 - 2 * player).all()
        stones = 9 - board[:, :9].sum(-1)  # the first plane marks empty cells
        assert np.diff(stones).tolist() == [1] * (len(game) - 1), "one position after each move"
        assert stones[0] <= 3, "at most three random moves"
        assert result == 0 or sign[-1] == result, "whoever moved last has won"


def test_random_moves_begin_games_from_the_seed_and_never_end_one():
    env = az.make_env(az.Args(random_moves=9))
    begun = [env.reset(seed=seed)[0].tobytes() for seed in range(200)]
    assert begun == [env.reset(seed=seed)[0].tobytes() for seed in range(200)]
    lengths = []
    for seed in range(200):
        env.reset(seed=seed)
        assert not env.unwrapped.state.is_terminal()
        lengths.append(env.unwrapped.state.move_number())
    assert set(lengths) == set(range(9))
    env = az.make_env(az.Args(random_moves=0))
    env.reset(seed=1)
    assert env.unwrapped.state.move_number() == 0


# ---- The truth


def test_the_solution_of_small_games():
    solution = az.solve(TIC_TAC_TOE)
    assert len(solution) == 4520, "positions in which somebody is to move"
    assert solution[az.key_of(position(TIC_TAC_TOE))][1] == 0, "a draw"
    _, value, best = solution[az.key_of(position(TIC_TAC_TOE, [0, 4, 8]))]  # the corners: an edge, or it is lost
    assert value == 0
    assert np.flatnonzero(best).tolist() == [1, 3, 5, 7]
    _, value, best = solution[az.key_of(position(TIC_TAC_TOE, [0, 3, 1, 4]))]
    assert (value, np.flatnonzero(best).tolist()) == (1, [2])
    connect = az.solve(CONNECT_THREE)
    assert len(connect) == 23_930, "41,750 with the positions in which the game is over"
    assert connect[az.key_of(position(CONNECT_THREE))][1] == 1, "the first player wins"
    assert az.solve("connect_four") is None
    assert az.solve("chess") is None


@pytest.mark.parametrize("script", ["alphazero", "muzero"])
@pytest.mark.parametrize("game", ["oware(num_houses_per_player=2,num_seeds_per_house=2)", "go(board_size=2,komi=0.5)"])
def test_a_game_whose_rules_look_at_earlier_positions_counts_as_unsolved(script, game):
    """A board that stood there before is forbidden, or ends the game: its text does not tell what it is worth."""
    assert importlib.import_module(f"algorithms.{script}").solve(game) is None


def test_the_solution_fits_every_way_to_a_position():
    """In quoridor walls and pawns can come about in several orders. Random games never leave the solution."""
    game, rng = "quoridor(board_size=3)", np.random.default_rng(0)
    solution, start = az.solve(game), az.load_game(game).new_initial_state()
    for _ in range(20):
        state = start.clone()
        while not state.is_terminal():
            known, value, best = solution[az.key_of(state)]
            assert known.legal_actions() == state.legal_actions()
            children = [state.child(move) for move in state.legal_actions()]
            results = [az.result_of(s) if s.is_terminal() else solution[az.key_of(s)][1] for s in children]
            wanted = max(results) if az.player_of(state) == 1 else min(results)
            assert value == wanted
            assert np.flatnonzero(best).tolist() == [
                move for move, result in zip(state.legal_actions(), results, strict=True) if result == wanted
            ]
            state = rng.choice(children)


@pytest.mark.parametrize("script", ["alphazero", "muzero"])
@pytest.mark.parametrize("game", ["clobber(rows=1,columns=1)", "nfg_game", "connect_four(rows=-1)"])
def test_a_game_that_is_none_is_one_line(script, game, cli):
    code, _, err = cli(script, "--env-id", game)
    assert (code, err.count("\n")) == (2, 1), err
    assert game.partition("(")[0] in err


@pytest.mark.parametrize("answer", ["y", "n"])
def test_you_begin_where_player_1_does(answer, monkeypatch, capsys):
    """In chess White is OpenSpiel's player 1."""
    agent, args = network("chess"), az.Args(env_id="chess", num_simulations=2)
    answers = iter([answer])
    monkeypatch.setattr("builtins.input", lambda _: next(answers, None) or (_ for _ in ()).throw(EOFError))
    with pytest.raises(az.UsageError):
        az.play(agent, args)
    out = capsys.readouterr().out
    assert out.count("The model plays") == (answer == "n"), out


def test_the_solution_agrees_with_open_spiels_own_search():
    for game in TIC_TAC_TOE, CONNECT_THREE:
        solution = list(az.solve(game).values())
        for state, value, _ in solution[:: len(solution) // 10]:
            rollouts = pyspiel.RandomRolloutEvaluator(1, 1)
            bot = pyspiel.MCTSBot(az.load_game(game), rollouts, 2.0, 100_000, 1000, True, 1, False)
            proven = bot.mcts_search(state).outcome
            assert (proven or [value])[0] == value


def test_a_perfect_agent_never_loses_and_is_right_everywhere_and_the_worst_is_neither():
    for game in TIC_TAC_TOE, CONNECT_THREE:
        args = az.Args(env_id=game, eval_episodes=10, eval_positions=300, eval_simulations=40)
        result = az.evaluate(Perfect(game), args, Path("film"))
        assert result["eval/network_optimal"] == result["eval/search_optimal"] == 1
        assert result["eval/losses_to_perfect"] == 0, "though the second player loses connect three"
        assert result["eval/episodic_return"] == 0
        assert result["eval/return_std"] == (game == CONNECT_THREE)
        result = az.evaluate(Perfect(game, worst=True), args, Path("film"))
        assert result["eval/losses_to_perfect"] >= (9 if game == TIC_TAC_TOE else 4), "it wants to lose"
        assert result["eval/episodic_return"] < -0.8
        assert result["eval/search_optimal"] < 0.7


def test_a_larger_game_is_played_against_open_spiels_search(monkeypatch):
    made, bot = [], pyspiel.MCTSBot
    monkeypatch.setattr(pyspiel, "MCTSBot", lambda *args: (made.append(args[3]), bot(*args))[1])
    game = "connect_four(rows=5,columns=5)"
    args = az.Args(env_id=game, eval_episodes=2, eval_simulations=2, opponent_simulations=7)
    result = az.evaluate(network(game), args, Path("film"))
    assert made == [7, 7]
    assert result.keys() == {"eval/episodic_return", "eval/return_std", "eval/episodic_length"}
    assert result == az.evaluate(network(game), args, Path("film"))


@pytest.mark.parametrize(("game", "word"), [
    ("go_fish", "dice"), ("backgammon", "dice"), ("kriegspiel", "hidden"), ("oshi_zumo", "turn"), ("pig", "dice"),
    ("tiny_hanabi", "dice"), ("solitaire", "two players"), ("no_such_game", "registered_names"),
    ("connect_four(rows=0,columns=0)", "a board"),
])  # fmt: skip
def test_other_kinds_of_games_are_refused(game, word):
    with pytest.raises(az.UsageError, match=word):
        az.load_game(game)


# ---- Pictures, and a game against a person


@pytest.mark.parametrize("game", [TIC_TAC_TOE, "connect_four", "mancala", "othello"])
def test_a_picture_changes_with_every_move_and_with_what_the_network_thinks(game):
    env = az.Board(az.Args(env_id=game), "rgb_array", random_moves=0)
    env.reset(seed=1)
    empty = env.render()
    assert empty.shape == (400, 640, 3)
    env.judge = network(game).judge
    thought = env.render()
    assert (thought != empty).any()
    env.step(env.state.legal_actions()[0])
    assert (env.render() != thought).any()


def test_stones_fall_to_the_bottom_of_the_picture():
    env = az.Board(az.Args(env_id="connect_four"), "rgb_array", random_moves=0)
    env.reset(seed=1)
    before = env.render()
    env.step(0)
    changed = np.argwhere((env.render() != before).any(-1))
    assert changed[:, 0].min() > 250, "in the lowest row"
    assert changed[:, 1].max() < 80, "of the first column"


def test_a_game_against_a_person(monkeypatch, capsys):
    """A person who moves second, mistypes, and gives moves as names and as numbers."""
    agent, asked, legal = Perfect(TIC_TAC_TOE), [], []
    mistakes = iter(["9", "o(9,9)"])

    def answer(question):
        asked.append(question)
        if len(asked) == 1:
            return "n"
        moves = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if " visits " in line]
        if moves:  # the last of them is the move with the fewest visits
            legal[:] = moves[-1]
        return next(mistakes, None) or legal[len(asked) % 2]

    monkeypatch.setattr("builtins.input", answer)
    args = az.Args(play=True, evaluate=True, eval_simulations=20)
    result = az.evaluate(agent, args, Path("film"))
    assert result == {"eval/episodic_return": 1}, "of the model, which is perfect against the worst moves"
    assert args.eval_episodes == 1
    assert len(asked) > 4


def test_play_shows_visits_and_ends_where_nobody_types(monkeypatch, capsys):
    def answer(question):
        if "begin" in question:
            return "y"
        raise EOFError

    monkeypatch.setattr("builtins.input", answer)
    with pytest.raises(az.UsageError, match="terminal"):
        az.evaluate(Perfect(TIC_TAC_TOE), az.Args(play=True, evaluate=True, eval_simulations=20), Path("film"))
    out = capsys.readouterr().out
    visits = [int(line.split("visits")[1].split()[0]) for line in out.splitlines() if "visits" in line]
    assert len(visits) == 9
    assert sum(visits) == 20
    assert visits == sorted(visits, reverse=True)


def test_ctrl_c_ends_a_game_at_once_though_main_waits_for_good_moments(monkeypatch):
    before = signal.signal(signal.SIGINT, lambda *_: None)  # as main's: it notes the signal and goes on
    monkeypatch.setattr("builtins.input", lambda _: signal.raise_signal(signal.SIGINT) or "y")
    try:
        with pytest.raises(SystemExit) as ended:
            az.evaluate(Perfect(TIC_TAC_TOE), az.Args(play=True, evaluate=True, eval_simulations=2), Path("film"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    assert ended.value.__suppress_context__, "no traceback of the interrupt"


def test_the_lines_of_the_guide_work(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = {"num_simulations": 2, "eval_simulations": 1, "eval_episodes": 1, "eval_positions": 1}
    az.train(az.Args(num_envs=2, total_timesteps=20, run_dir="runs/tictactoe", **tiny))
    section = (ROOT / "algorithms" / "README.md").read_text().split("\n## alphazero.py\n")[1].split("\n## ")[0]
    (program,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    os.symlink(ROOT / "algorithms", "algorithms")
    monkeypatch.setattr(sys, "path", [*sys.path])
    capsys.readouterr()
    exec(program, {})
    assert re.fullmatch(r"[0-8]\n\[[0-8]\]\n", capsys.readouterr().out)


def test_play_with_the_model_of_another_game_is_refused():
    args = az.Args(env_id=CONNECT_THREE, play=True, evaluate=True)
    with pytest.raises(az.UsageError, match="trained agent"):
        az.evaluate(Perfect(TIC_TAC_TOE), args, Path("film"))


# ---- Learning


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "share"), [({}, 0.85), ({"num_blocks": 1, "num_channels": 16}, 0.7)])  # of 0.5
def test_it_learns_tic_tac_toe(flags, share, tmp_path):
    flags = flags | {"total_timesteps": 6_400, "eval_frequency": 6_400, "learning_starts": 1_000, "train_frequency": 4}
    result = az.train(az.Args(num_simulations=25, hidden_size=128, run_dir=str(tmp_path / "run"), **flags))
    assert result["eval/network_optimal"] > share
    assert result["eval/search_optimal"] > 0.95
