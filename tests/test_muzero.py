"""muzero.py: its search against alphazero's, minimax and exact values, targets by brute force, and what is learned."""

import math
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import rows, timeless
from torch import nn

from algorithms import alphazero as az
from algorithms import muzero as mz

TIC_TAC_TOE, CONNECT_THREE = "tic_tac_toe", "connect_four(rows=4,columns=4,x_in_row=3)"


def position(game, moves=()):
    state = mz.load_game(game).new_initial_state()
    for move in moves:
        state.apply_action(move)
    return state


def observed(states):
    return np.stack([mz.observe(state) for state in states])


def exact(game):
    """Judges positions by minimax; all legal moves are equally likely."""
    solution = az.solve(game)

    def judge(states):
        legal = np.zeros((len(states), states[0].num_distinct_actions()), bool)
        player = np.array([az.player_of(state) for state in states])
        value = np.zeros(len(states))
        for i, state in enumerate(states):
            legal[i, state.legal_actions()] = True
            value[i] = az.result_of(state) if player[i] == 0 else solution[az.key_of(state)][1]
        return legal, legal / np.maximum(legal.sum(-1, keepdims=True), 1), value, player

    return judge


class Rules:
    """The true model of a game: its latent states are numbers of positions. judge is as alphazero's Network.judge."""

    def __init__(self, states, judge):
        self.states, self.judge = list(states), judge

    def initial(self, obs):
        assert len(obs) == len(self.states)
        legal, prior, value, player = self.judge(self.states)
        return torch.arange(len(obs))[:, None], legal, prior, player * value

    def recurrent(self, latent, action):
        ids, rewards, players = [], np.zeros(len(action)), np.zeros(len(action))
        for i, (number, move) in enumerate(zip(latent[:, 0].tolist(), action.tolist(), strict=True)):
            state = self.states[number]
            if state.is_terminal() or move not in state.legal_actions():
                ids.append(number)  # it absorbs
                continue
            child = state.child(move)
            if child.is_terminal():
                rewards[i] = mz.player_of(state) * mz.result_of(child)  # for the player who moves
            ids.append(len(self.states))
            self.states.append(child)
        _, prior, value, players = self.judge([self.states[number] for number in ids])
        return torch.tensor(ids)[:, None], rewards, prior, players * value  # player 0, after the end: v is 0


class Made:
    """A model of made-up numbers: the latent state is the number of a sequence of actions, which decides them."""

    def __init__(self, seeds, num_actions, legal=None):
        self.paths, self.num_actions = [(seed,) for seed in seeds], num_actions
        self.legal = np.ones((len(seeds), num_actions), bool) if legal is None else legal

    def numbers(self, path):  # reward, p, v
        rng = np.random.default_rng([1000 + part for part in path])
        return rng.normal(), rng.dirichlet(np.ones(self.num_actions)), rng.normal()

    def initial(self, obs):
        _, p, v = zip(*map(self.numbers, self.paths[: len(obs)]), strict=True)
        return torch.arange(len(obs))[:, None], self.legal, np.stack(p), np.array(v)

    def recurrent(self, latent, action):
        first = len(self.paths)
        self.paths += [(*self.paths[i], a) for i, a in zip(latent[:, 0].tolist(), action.tolist(), strict=True)]
        r, p, v = zip(*map(self.numbers, self.paths[first:]), strict=True)
        return torch.arange(first, len(self.paths))[:, None], np.array(r), np.stack(p), np.array(v)


# ---- The search


def searched_by_both(monkeypatch, states, judge, num_simulations=30):
    """All that is made equal: alphazero's Q is -1 ... 1 and 0 if untried, muzero's 0 ... 1 and then the mean."""

    def puct(n, w, prior, args):
        w = (w + n) / 2
        mean = w.sum(-1, keepdims=True) / np.maximum(n.sum(-1, keepdims=True), 1)
        return mz.puct(n, np.where(n > 0, w, mean), prior, args)

    args = {"env_id": str(states[0].get_game()).removesuffix("()"), "num_simulations": num_simulations}
    az_args, args = az.Args(**args, c_init=0.625), mz.Args(**args, c_init=0.625, gamma=1)
    monkeypatch.setattr(az, "puct", puct)
    return az.search(judge, states, az_args), mz.search(Rules(states, judge), observed(states), args)[0]


@pytest.mark.parametrize("kind", ["exact", "network"])
def test_in_the_true_model_it_counts_the_same_visits_as_alphazero(monkeypatch, kind):
    states = [state for state, _, _ in az.solve(TIC_TAC_TOE).values()][::40]
    judge = exact(TIC_TAC_TOE)
    if kind == "network":
        torch.manual_seed(1)
        judge = az.make_agent(az.Args(), (37,), gym.spaces.Discrete(9)).judge
        judge([states[0]])
    expected, got = searched_by_both(monkeypatch, states, judge)
    assert (got == expected).all()
    assert len({*map(bytes, got)}) > 50


@pytest.mark.parametrize(
    ("game", "step"), [(TIC_TAC_TOE, 40), (CONNECT_THREE, 500), pytest.param(TIC_TAC_TOE, 1, marks=pytest.mark.slow)]
)
def test_in_the_true_model_with_exact_values_it_chooses_a_minimax_move(game, step):
    solution = [*az.solve(game).values()][::step]
    states, _, best = zip(*solution, strict=True)
    args = mz.Args(env_id=game, num_simulations=40, gamma=1)
    moves = mz.search(Rules(states, exact(game)), observed(states), args)[0].argmax(-1)
    assert np.stack(best)[np.arange(len(states)), moves].all()


class Mdp:
    """A random deterministic MDP of S states and A actions as a model. v is exact, or 0."""

    def __init__(self, seed, gamma, exact_values, num_states=7, num_actions=3):
        rng = np.random.default_rng(seed)
        self.next = rng.integers(num_states, size=(num_states, num_actions))
        self.reward = rng.normal(size=(num_states, num_actions))
        self.value = np.zeros(num_states)
        for _ in range(2000):
            self.q = self.reward + gamma * self.value[self.next]  # (S, A)
            self.value = self.q.max(1)
        self.v = self.value if exact_values else np.zeros(num_states)
        self.uniform = np.full(num_actions, 1 / num_actions)

    def initial(self, obs):
        state = obs[:, 0].astype(int)
        p = np.tile(self.uniform, (len(obs), 1))
        return torch.from_numpy(state)[:, None], np.ones(p.shape, bool), p, self.v[state]

    def recurrent(self, latent, action):
        state = latent[:, 0].numpy()
        after = self.next[state, action]
        p = np.tile(self.uniform, (len(state), 1))
        return torch.from_numpy(after)[:, None], self.reward[state, action], p, self.v[after]


@pytest.mark.parametrize("exact_values", [True, False])
def test_in_an_mdp_it_chooses_the_best_action_and_its_value_comes_near(exact_values):
    """gamma is 0.5: what is behind 10 steps counts a thousandth. Where v is 0 the search must find the rewards."""
    errors = {}
    for num_simulations in 100, 400:
        right, gaps, error = [], [], []
        for seed in range(10):
            mdp = Mdp(seed, 0.5, exact_values)
            visits, value = mz.search(mdp, np.arange(7.0)[:, None], mz.Args(num_simulations=num_simulations, gamma=0.5))
            best, second = np.sort(mdp.q, axis=1)[:, :-3:-1].T
            right.append(visits.argmax(-1) == mdp.q.argmax(-1))
            gaps.append(best - second)
            error.append(value - mdp.value)
        assert np.concatenate(right)[np.concatenate(gaps) > 0.1].all()
        errors[num_simulations] = np.concatenate(error)
    # The mean over actions is below the best one's value, by less the more the search prefers the best
    assert max(error.max() for error in errors.values()) < 0
    assert errors[100].min() > -0.55
    assert errors[400].min() > -0.25
    assert errors[400].mean() > -0.2


def searched_with_nodes(model, seed, legal, args):
    """The paper's search, one simulation after the other, each node a dictionary."""
    sign = -1 if mz.is_game(args.env_id) else 1

    def node(path):
        reward, p, v = model.numbers(path)
        return {"path": path, "r": reward, "p": p, "v": v, "n": np.zeros(len(p)), "w": np.zeros(len(p)), "to": {}}

    root = node((seed,))
    low, high = (-1, 1) if sign < 0 else (math.inf, -math.inf)
    for _ in range(args.num_simulations):
        here, walk, action = root, [], None
        while action is None or action in walk[-1][0]["to"]:
            here = here if action is None else here["to"][action]
            visits = 1 + here["n"].sum()
            scores = []
            for a in range(model.num_actions):
                q = 0
                if here["n"].any():
                    g = here["w"][a] / here["n"][a] if here["n"][a] else here["w"].sum() / here["n"].sum()
                    q = (g - low) / max(high - low, 1e-9)
                c = math.log((1 + visits + args.c_base) / args.c_base) + args.c_init
                u = c * here["p"][a] * math.sqrt(visits) / (1 + here["n"][a])
                scores.append(q + u if legal[a] or here is not root else -math.inf)
            action = int(np.argmax(scores))
            walk.append((here, action))
        last = here["to"][action] = node((*here["path"], action))
        g = last["v"]
        for here, action in walk[::-1]:
            g = here["to"][action]["r"] + sign * args.gamma * g
            here["n"][action] += 1
            here["w"][action] += g
            q = here["w"][action] / here["n"][action]
            low, high = min(low, q), max(high, q)
    return root["n"], root["w"].sum() / root["n"].sum()


@pytest.mark.parametrize("env_id", ["CartPole-v1", TIC_TAC_TOE])
def test_a_batch_of_searches_gives_what_plain_nodes_give_each(env_id):
    """Values of any size, rewards on the way, and where two play, their signs."""
    legal = np.random.default_rng(1).random((40, 4)) < 0.7
    legal[:, 2] = True
    model, args = Made(range(40), 4, legal), mz.Args(env_id=env_id, num_simulations=40, gamma=0.9, c_init=1.25)
    visits, values = mz.search(model, np.zeros((40, 4)), args)
    for seed in range(40):
        expected, value = searched_with_nodes(model, seed, legal[seed], args)
        assert visits[seed].tolist() == expected.tolist()
        assert values[seed] == pytest.approx(value)
    assert (visits.sum(-1) == 40).all(), "visits sum to the simulations"
    assert (visits[~legal] == 0).all(), "illegal moves at the root have no visits"
    assert (visits > 0).sum() > 80


def test_a_batch_gives_what_each_game_alone_gives():
    states = [position(TIC_TAC_TOE, moves) for moves in ([], [4], [0, 4, 8], [0, 3, 1, 4])]
    torch.manual_seed(1)
    agent, args = network(TIC_TAC_TOE), mz.Args(env_id=TIC_TAC_TOE)
    together, values = mz.search(agent, observed(states), args)
    for i, state in enumerate(states):
        alone, value = mz.search(agent, observed([state]), args)
        assert alone[0].tolist() == together[i].tolist()
        assert value[0] == pytest.approx(values[i], abs=1e-5)


def test_one_step_by_hand_with_rewards_and_the_sign_of_the_other_player():
    """Two simulations at the root: each G is r + gamma v of the new node, or r - gamma v where two play."""
    for env_id, sign in ("CartPole-v1", 1), (TIC_TAC_TOE, -1):
        model = Made([3], 1)
        _, value = mz.search(model, np.zeros((1, 1)), mz.Args(env_id=env_id, num_simulations=2, gamma=0.5))
        (r_1, _, v_1), (r_2, _, v_2) = model.numbers((3, 0)), model.numbers((3, 0, 0))
        first = r_1 + sign * 0.5 * v_1
        second = r_1 + sign * 0.5 * (r_2 + sign * 0.5 * v_2)
        assert value[0] == pytest.approx((first + second) / 2)


def test_noise_comes_only_to_the_root_and_to_legal_moves():
    np.random.seed(1)
    legal = np.array([[True, True, False, True]] * 200)
    model = Made([5] * 200, 4, legal)
    plain, _ = mz.search(Made([5] * 200, 4, legal), np.zeros((200, 1)), mz.Args())
    noisy, _ = mz.search(model, np.zeros((200, 1)), mz.Args(), noise=True)
    assert (plain == plain[0]).all()
    assert len({*map(bytes, noisy)}) > 5
    assert (noisy[:, 2] == 0).all()
    no_noise, _ = mz.search(Made([5] * 200, 4, legal), np.zeros((200, 1)), mz.Args(noise_fraction=0), noise=True)
    assert (no_noise == plain).all()


# ---- The scale of rewards and values


def test_the_scale_and_its_inverse_are_exact():
    x = torch.cat([torch.zeros(1), torch.logspace(-9, 9, 181)]).double()
    x = torch.cat([-x, x])
    assert torch.allclose(mz.unscale(mz.scale(x)), x, rtol=1e-9, atol=1e-12)
    assert torch.allclose(mz.scale(mz.unscale(x)), x, rtol=1e-9, atol=1e-12)
    by_hand = {0.0: 0.0, 3.0: 1 + 0.003, -3.0: -1 - 0.003, 99.0: 9 + 0.099, 1e6 - 1: 999 + 999.999}
    for value, scaled in by_hand.items():
        assert mz.scale(torch.tensor(value)).item() == pytest.approx(scaled, abs=1e-4)
    # As float32, which the networks use, the formula of the paper would be off by 6e-5 near 0
    x = torch.linspace(-500, 500, 20_001)
    assert torch.allclose(mz.unscale(mz.scale(x)), x, rtol=2e-5, atol=1e-6)
    papers = x.sign() * ((((1 + 0.004 * (x.abs() + 1.001)).sqrt() - 1) / 0.002).square() - 1)
    assert torch.allclose(mz.unscale(x), papers, rtol=1e-3, atol=1e-3)


def test_two_hot_puts_all_mass_at_integers_and_its_expectation_is_exact_between():
    integers = torch.arange(-5, 6)
    assert torch.allclose(mz.two_hot(mz.unscale(integers.double()), 5), torch.eye(11).double(), atol=1e-12)
    x = torch.linspace(-30, 30, 601).double()
    hot = mz.two_hot(x, 6)
    assert hot.shape == (601, 13)
    assert torch.allclose(hot.sum(-1), torch.ones(601).double())
    assert ((hot > 0).sum(-1) <= 2).all()
    assert torch.allclose(mz.expectation(hot.clamp(min=1e-300).log()), x, atol=1e-9)
    beside = hot[0].nonzero()[:, 0] - 6  # scale(-30) is -4.598
    assert beside.tolist() == [-5, -4]
    assert hot[0, 1].item() == pytest.approx(math.sqrt(31) - 1 + 0.03 - 4)
    assert torch.equal(mz.two_hot(torch.tensor([1e6, -1e6]), 2), torch.eye(5)[[4, 0]]), "clipped to the support"


# ---- Targets


@pytest.mark.parametrize("td_steps", [1, 3, 10, 1000])
@pytest.mark.parametrize("last", [0.0, 7.0])  # a true end, a time limit
def test_value_targets_are_those_of_brute_force(td_steps, last):
    rng = np.random.default_rng(1)
    rewards, values, gamma = rng.normal(size=12), np.append(rng.normal(size=12), last), 0.9
    got = mz.value_targets(rewards, values, mz.Args(td_steps=td_steps, gamma=gamma))
    for t in range(12):
        expected, discount, step = 0.0, 1.0, t
        while step < 12 and step < t + td_steps:
            expected += discount * rewards[step]
            discount, step = discount * gamma, step + 1
        assert got[t] == pytest.approx(expected + discount * values[step])


def filled(terminated, players, args, num_steps=4, num_actions=3):
    """A buffer with one episode of environment 1 of 2; and the numbers of it, (T, ...)."""
    rng = np.random.default_rng(1)
    buffer = mz.EpisodeBuffer(args, 2, num_actions, "cpu")
    obs, pi = rng.normal(size=(num_steps, 2)), rng.dirichlet(np.ones(num_actions), num_steps)
    actions, rewards, values = rng.integers(num_actions, size=num_steps), *rng.normal(size=(2, num_steps))
    for t in range(num_steps):
        row = obs[t], pi[t], actions[t], rewards[t], values[t], players[t]
        buffer.add(*(np.stack([np.zeros_like(part), part]) for part in row))
    buffer.finish(1, terminated, 5.0)
    return buffer, (obs, pi, actions, rewards, values)


def unrolled(buffer, row):
    """One row as sample gives it: obs, pi, actions, rewards, z, known."""
    drawn = torch.full((1,), row)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda *_, **__: drawn)
        return [part[0].numpy() for part in buffer.sample(1)]


@pytest.mark.parametrize("terminated", [True, False])
def test_the_unrolled_targets_are_those_of_brute_force_also_after_the_end(terminated):
    args = mz.Args(num_envs=2, unroll_steps=3, td_steps=2, gamma=0.9)
    buffer, (obs, pi, actions, rewards, values) = filled(terminated, [1, 1, 1, 1], args)
    assert buffer.num_added == 4
    values = [*values, 0 if terminated else 5.0]
    for t in range(4):
        got = unrolled(buffer, t)
        assert got[0] == pytest.approx(obs[t], rel=1e-5)
        for k in range(4):
            got_pi, action, reward, z, known = (part[k] for part in got[1:])
            if (step := t + k) < 4:
                assert known
                assert got_pi == pytest.approx(pi[step], rel=1e-5)
                assert action == actions[step]
                assert reward == pytest.approx(rewards[step], rel=1e-5)
                expected = rewards[step] + 0.9 * values[step + 1]
                if step < 3:
                    expected = rewards[step] + 0.9 * rewards[step + 1] + 0.81 * values[step + 2]
                assert z == pytest.approx(expected, rel=1e-5)
            else:  # absorbed after a true end, unknown after a time limit; no policy is learned there
                assert known == terminated
                assert (got_pi == 0).all()
                assert (reward, z) == (0, 0)
                assert action in (0, 1, 2)


def test_in_games_targets_are_for_the_player_to_move():
    """The second player moves twice in between, and wins 1 at the end: the first player's reward is -1."""
    args = mz.Args(env_id=TIC_TAC_TOE, num_envs=1, unroll_steps=2, td_steps=100, gamma=1)
    buffer = mz.EpisodeBuffer(args, 1, 2, "cpu")
    for t, (player, reward) in enumerate([(1, 0), (-1, 0), (1, 0), (-1, 1)]):
        buffer.add(np.full((1, 1), t), np.eye(2)[[0]], np.zeros(1), np.full(1, reward), np.zeros(1), np.full(1, player))
    buffer.finish(0, True, 9.0)
    assert unrolled(buffer, 0)[4].tolist() == [-1, 1, -1]
    assert unrolled(buffer, 2)[4].tolist() == [-1, 1, 0], "after the end 0"
    assert unrolled(buffer, 2)[3].tolist() == [0, 1, 0], "the reward of who wins"
    args = mz.Args(env_id=TIC_TAC_TOE, num_envs=1, unroll_steps=2, td_steps=1, gamma=0.5)
    buffer = mz.EpisodeBuffer(args, 1, 2, "cpu")
    for player, value in [(1, 0.2), (-1, 0.6)]:
        buffer.add(np.zeros((1, 1)), np.eye(2)[[0]], np.zeros(1), np.zeros(1), np.full(1, value), np.full(1, player))
    buffer.finish(0, True, 9.0)
    assert unrolled(buffer, 0)[4].tolist() == pytest.approx([-0.5 * 0.6, 0, 0]), "the next root value is the other's"


def test_the_buffer_keeps_the_last_rows_and_its_state():
    args = mz.Args(num_envs=2, unroll_steps=1, buffer_size=6)
    buffer, (obs, *_) = filled(True, [1, 1, 1, 1], args)
    assert [len(waiting) for waiting in buffer.waiting] == [4, 0]
    copy = mz.EpisodeBuffer(args, 2, 3, "cpu")
    copy.load_state_dict(buffer.state_dict())
    for each in buffer, copy:
        np.random.seed(1)
        each.finish(0, False, 0.0)
        assert each.num_added == 8
        assert each.rows[2:4, :2].numpy() == pytest.approx(obs[2:], rel=1e-5), "the oldest two are overwritten"
        assert (each.rows[[4, 5, 0, 1], :2] == 0).all()
    assert torch.equal(buffer.rows, copy.rows)
    small, (obs, *_) = filled(True, [1, 1, 1, 1], mz.Args(num_envs=2, unroll_steps=1, buffer_size=3))
    assert sorted(small.rows[:, 0].tolist()) == pytest.approx(sorted(obs[1:, 0]), rel=1e-5), "of a long one the last"


def test_training_keeps_what_was_played(monkeypatch, tmp_path):
    """Every row: legal moves only, the action was searched, the winner has the reward, observations follow."""
    kept, finish = [], mz.EpisodeBuffer.finish

    def keeping(self, i, terminated, last_value):
        kept.append(np.stack(self.waiting[i]))
        finish(self, i, terminated, last_value)

    monkeypatch.setattr(mz.EpisodeBuffer, "finish", keeping)
    args = {"total_timesteps": 120, "learning_starts": 200, "eval_frequency": 120, "eval_episodes": 1}
    tiny = {"num_envs": 4, "num_simulations": 7, "eval_simulations": 1, "eval_positions": 1, "random_moves": 3}
    mz.train(mz.Args(env_id=TIC_TAC_TOE, run_dir=str(tmp_path / "run"), **args, **tiny))
    returns = [row["charts/episodic_return"] for row in rows(tmp_path / "run") if "charts/episodic_return" in row]
    assert len(kept) == len(returns) > 8
    for game, result in zip(kept, returns, strict=True):
        legal, to_move, pi, (actions, rewards, _, player) = game[:, :9], game[:, 9], game[:, 37:46], game[:, 46:].T
        assert (player == 1 - 2 * to_move).all()
        assert pi.sum(-1) == pytest.approx(np.ones(len(game)))
        assert np.rint(pi * 7) == pytest.approx(pi * 7)
        assert (pi[legal == 0] == 0).all()
        assert (pi[np.arange(len(game)), actions.astype(int)] > 0).all()
        assert rewards.tolist() == [0] * (len(game) - 1) + [abs(result)]
        assert rewards[-1] * player[-1] == result


def test_a_time_limit_bootstraps_from_the_networks_value_and_a_fall_does_not(monkeypatch, tmp_path):
    finished, finish = [], mz.EpisodeBuffer.finish

    def keeping(self, i, terminated, last_value):
        finish(self, i, terminated, last_value)
        finished.append((bool(terminated), last_value, self.rows[self.num_added - 1].clone(), self.args))

    monkeypatch.setattr(mz.EpisodeBuffer, "finish", keeping)
    gym.register("Short-v0", "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=12)
    try:
        args = {"total_timesteps": 200, "learning_starts": 40, "eval_frequency": 200, "eval_episodes": 1}
        mz.train(mz.Args("Short-v0", num_envs=4, run_dir=str(tmp_path), batch_size=8, num_simulations=2, **args))
    finally:
        del gym.registry["Short-v0"]
    assert {terminated for terminated, *_ in finished} == {True, False}
    assert any(abs(value) > 0.01 for _, value, *_ in finished)
    for terminated, value, row, args in finished:
        z = row[4 + 2].item()  # of the last step of its episode
        assert z == pytest.approx(1 if terminated else 1 + args.gamma * value, rel=1e-5)


# ---- The model and its loss


def network(env_id="CartPole-v1", **changes):
    args = mz.Args(env_id=env_id, **changes)
    env = mz.make_env(args)
    return mz.make_agent(args, env.observation_space.shape, env.action_space)


def test_the_gradient_into_the_dynamics_function_is_halved_at_each_step():
    """g of a model with one number is s + a: what reaches s_0 through k steps is 1 / 2^k of the plain gradient."""
    x = torch.tensor([3.0], requires_grad=True)
    y = mz.halve_gradient(x)
    assert y.item() == 3
    y.backward()
    assert x.grad.item() == 0.5

    class Line(nn.Module):
        is_game = False

        def represent(self, obs):
            self.start = obs.clone().requires_grad_()
            return self.start

        def dynamics(self, latent, action):
            return latent + action[:, None]

        def predict(self, latents):
            zeros = torch.zeros(1, 4, 2)
            return zeros, torch.cat([latents, zeros], dim=2), torch.zeros(1, 4, 3)

    gradients = []
    for known in torch.eye(4):  # the loss of one step alone; of step 0 it is always there
        line, zeros = Line(), torch.zeros(1, 4)
        batch = torch.zeros(1, 1), torch.zeros(1, 4, 2), zeros, zeros, zeros, known[None]
        mz.muzero_loss(line, batch, mz.Args(unroll_steps=3, support_size=1))[0].backward()
        gradients.append(line.start.grad.item())
    first, *later = gradients
    ratios = [(gradient - first) / first for gradient in later]
    assert ratios == pytest.approx([1 / 3 / 2, 1 / 3 / 4, 1 / 3 / 8]), "1 / K, and a half for each step"


def test_the_loss_by_hand():
    """The first step counts 1, the others 1 / K; after a time limit nothing, after a true end rewards and values."""
    torch.manual_seed(1)
    args = mz.Args(unroll_steps=2, support_size=3)
    agent = network(unroll_steps=2, support_size=3)
    for parameter in agent.parameters():
        nn.init.normal_(parameter, std=0.3)
    obs, actions = torch.randn(2, 4), torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    pi = torch.tensor([[[0.3, 0.7], [0.5, 0.5], [0, 0]], [[1, 0], [0, 0], [0, 0]]])
    rewards, z = torch.tensor([[1.0, 1, 0], [1, 0, 0]]), torch.tensor([[1.9, 1, 0], [1, 0, 0]])
    known = torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    loss, metrics = mz.muzero_loss(agent, (obs, pi, actions, rewards, z, known), args)
    totals = {"policy": 0.0, "value": 0.0, "reward": 0.0}
    for b in range(2):
        latent = agent.represent(obs[b : b + 1])
        for k in range(3):
            weight = known[b, k].item() * (1 if k == 0 else 1 / 2) / 2  # and the mean of two
            policy, value = (logits[0].log_softmax(0) for logits in agent.predict(latent)[:2])
            totals["policy"] -= weight * (pi[b, k] @ policy).item()
            totals["value"] -= weight * (mz.two_hot(z[b, k], 3) @ value).item()
            if k < 2:
                latent = agent.dynamics(latent, actions[b, k : k + 1].long())
                r = agent.predict(latent)[2]
                weight = known[b, k].item() / 2 / 2
                totals["reward"] -= weight * (mz.two_hot(rewards[b, k], 3) @ r[0].log_softmax(0)).item()
    for name, total in totals.items():
        assert metrics[f"losses/{name}_loss"].item() == pytest.approx(total, rel=1e-5)
    assert loss.item() == pytest.approx(totals["policy"] + totals["value"] + totals["reward"], rel=1e-5)


def test_results_of_games_are_whole_classes_and_other_values_are_on_the_scale():
    for env_id, class_1 in (TIC_TAC_TOE, 1.0), ("CartPole-v1", mz.unscale(torch.tensor(1.0)).item()):
        args = mz.Args(env_id=env_id, unroll_steps=1, support_size=1)
        agent = network(env_id, unroll_steps=1, support_size=1)
        for head in agent.value_head, agent.reward_head:
            head[2].bias.data[2] = 50.0  # all mass on the class 1
        obs = np.zeros((1, *agent.obs_shape), np.float32)
        obs[:, : agent.num_actions] = 1
        latent, _, _, v = agent.initial(obs)
        _, r, _, later = agent.recurrent(latent, np.array([0]))
        assert [*v, *r, *later] == pytest.approx([class_1] * 3, rel=1e-5)
        pi, one = torch.zeros(1, 2, agent.num_actions), torch.full((1, 2), class_1)
        _, metrics = mz.muzero_loss(agent, (torch.as_tensor(obs), pi, one * 0, one, one, torch.ones(1, 2)), args)
        assert metrics["losses/value_loss"].item() == pytest.approx(0, abs=1e-5)
        assert metrics["losses/reward_loss"].item() == pytest.approx(0, abs=1e-5)


def test_the_model_learns_rewards_values_and_the_end_of_one_batch():
    """Fitted to the rows of two episodes, g and f tell along the actions what came, and 0 after the end."""
    torch.manual_seed(1)
    np.random.seed(1)
    args = mz.Args(num_envs=2, unroll_steps=4, td_steps=100, gamma=0.9, hidden_size=64, latent_size=16)
    buffer, (obs, _, actions, rewards, _) = filled(True, [1, 1, 1, 1], args)
    agent = mz.Network(args, (2,), gym.spaces.Discrete(3))
    optimizer = torch.optim.Adam(agent.parameters(), 3e-3)
    for _ in range(400):
        loss, _ = mz.muzero_loss(agent, buffer.sample(16), args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    latent, _, _, v = agent.initial(obs[:1])
    returns = mz.value_targets(rewards, np.zeros(5), args)
    assert v[0] == pytest.approx(returns[0], abs=0.1)
    for t in range(4):
        latent, r, _, v = agent.recurrent(latent, actions[t : t + 1])
        assert r[0] == pytest.approx(rewards[t], abs=0.1)
        assert v[0] == pytest.approx(returns[t + 1] if t < 3 else 0, abs=0.1)


def test_illegal_moves_have_probability_0_at_the_root_and_a_new_model_expects_nothing():
    agent, states = network(TIC_TAC_TOE), [position(TIC_TAC_TOE, [4, 0, 8]), position(TIC_TAC_TOE, [1])]
    latent, legal, p, v = agent.initial(observed(states))
    for i, state in enumerate(states):
        assert np.flatnonzero(legal[i]).tolist() == state.legal_actions()
    assert (p[~legal] == 0).all()
    assert p.sum(-1) == pytest.approx([1, 1])
    assert v == pytest.approx([0, 0], abs=1e-6)
    for row in latent:
        assert row.mean().item() == pytest.approx(0, abs=1e-5)
        assert row.std(correction=0).item() == pytest.approx(1, abs=1e-2)
    after, r, p, v = agent.recurrent(latent, np.array([1, 0]))
    assert after.shape == latent.shape
    assert (p > 0).all(), "inside the model every move is possible"
    assert [*r, *v] == pytest.approx([0] * 4, abs=1e-6)
    assert agent.act(observed(states)).shape == (2,)
    assert agent.act(mz.observe(states[0])) in states[0].legal_actions()
    p = agent.initial(observed(states))[2]
    assert agent.act(observed(states)).tolist() == p.argmax(-1).tolist()


# ---- The truth, and whole runs


def test_a_perfect_model_never_loses_and_is_right_everywhere():
    class Perfect(Rules):
        def __init__(self, game):
            with mz.make_env(mz.Args(env_id=game)) as env:
                self.obs_shape, self.action_space = env.observation_space.shape, env.action_space
            self.by_obs = {mz.observe(state).tobytes(): state for state, _, _ in mz.solve(game).values()}
            self.best = {mz.observe(state).tobytes(): best for state, _, best in mz.solve(game).values()}
            super().__init__([], exact(game))

        def initial(self, obs):
            self.states = [self.by_obs[row.tobytes()] for row in obs]
            return super().initial(obs)

        def act(self, obs):
            return np.array([self.best[row.tobytes()].argmax() for row in obs])

    for game in TIC_TAC_TOE, CONNECT_THREE:
        args = mz.Args(env_id=game, eval_episodes=10, eval_positions=300, eval_simulations=40, gamma=1)
        result = mz.evaluate(Perfect(game), args, Path("film"))
        assert result["eval/network_optimal"] == result["eval/search_optimal"] == 1
        assert result["eval/losses_to_perfect"] == 0
        assert result["eval/episodic_return"] == 0
        assert result["eval/return_std"] == (game == CONNECT_THREE), "whoever begins wins connect three"


def test_evaluations_draw_nothing_search_without_noise_and_are_equal():
    agent = network()
    state = np.random.get_state()[1].copy(), torch.get_rng_state()
    args = mz.Args(eval_episodes=3, eval_simulations=5)
    result = mz.evaluate(agent, args, Path("film"))
    assert result == mz.evaluate(agent, args, Path("film"))
    assert (np.random.get_state()[1] == state[0]).all()
    assert torch.equal(torch.get_rng_state(), state[1])
    agent = network("connect_four(rows=5,columns=5)")
    args = mz.Args("connect_four(rows=5,columns=5)", eval_episodes=2, eval_simulations=2, opponent_simulations=7)
    result = mz.evaluate(agent, args, Path("film"))
    assert result.keys() == {"eval/episodic_return", "eval/return_std", "eval/episodic_length"}
    assert result == mz.evaluate(agent, args, Path("film"))


def test_actions_that_do_not_begin_at_0(tmp_path):
    class Counted(gym.Env):
        observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2, start=5)

        def reset(self, *, seed=None, options=None):
            self.steps = 0
            return np.zeros(1, np.float32), {}

        def step(self, action):
            assert action in (5, 6)
            self.steps += 1
            return np.full(1, self.steps / 9, np.float32), float(action == 6), self.steps == 9, False, {}

    gym.register("Counted-v0", Counted)
    try:
        args = {"total_timesteps": 400, "learning_starts": 100, "eval_frequency": 400, "eval_episodes": 1}
        result = mz.train(mz.Args("Counted-v0", num_envs=4, run_dir=str(tmp_path / "run"), batch_size=16, **args))
        assert mz.load(str(tmp_path / "run")).act(np.zeros(1, np.float32)) in (5, 6)
    finally:
        del gym.registry["Counted-v0"]
    assert result["eval/episodic_length"] == 9


def test_a_player_who_moves_twice_in_a_row_is_refused(tmp_path):
    """In mancala a last stone in one's own store gives another move; the search would take it for the other's."""
    args = {"num_simulations": 2, "eval_simulations": 1, "eval_episodes": 1, "opponent_simulations": 1}
    args |= {"total_timesteps": 400, "eval_frequency": 400}
    with pytest.raises(mz.UsageError, match=r"--env-id mancala.*: a player moves twice in a row"):
        mz.train(mz.Args("mancala", run_dir=str(tmp_path / "run"), **args))


def test_a_game_that_cannot_be_replayed_leaves_no_steps_for_the_next(monkeypatch, tmp_path):
    tiny = {"num_envs": 4, "num_simulations": 2, "eval_simulations": 1, "eval_positions": 1, "random_moves": 0}
    args = {"total_timesteps": 12, "learning_starts": 200, "eval_frequency": 200, "eval_episodes": 1}
    run_dir = tmp_path / "run"
    mz.train(mz.Args(env_id=TIC_TAC_TOE, run_dir=str(run_dir), **args, **tiny))
    checkpoint = torch.load(run_dir / "checkpoint.pt")
    assert [len(rows) for rows in checkpoint["buffer"]["waiting"]] == [3, 3, 3, 3]
    checkpoint["obs"] += 1
    torch.save(checkpoint, run_dir / "checkpoint.pt")
    kept, finish = [], mz.EpisodeBuffer.finish
    monkeypatch.setattr(
        mz.EpisodeBuffer, "finish", lambda self, *what: (kept.append(self.waiting[what[0]]), finish(self, *what))
    )
    mz.train(mz.saved_args(run_dir, resume=True, total_timesteps=60))
    assert len(kept) >= 4
    for game in kept:
        assert np.array(game)[:, 10:19].sum(-1).tolist() == [*range(9, 9 - len(game), -1)], "from the empty board on"


@pytest.mark.parametrize("env_id", ["CartPole-v1", TIC_TAC_TOE])
def test_stopped_and_resumed_equals_unbroken(env_id, tmp_path):
    tiny = {"num_envs": 4, "num_simulations": 4, "eval_simulations": 2, "eval_positions": 20, "eval_episodes": 2}
    tiny |= {"batch_size": 16, "learning_starts": 80, "eval_frequency": 200, "anneal_lr": False, "hidden_size": 16}
    tiny |= {"final_temperature": 1.0, "env_id": env_id}  # else a longer run has other schedules
    mz.train(mz.Args(run_dir=str(tmp_path / "whole"), total_timesteps=400, **tiny))
    mz.train(mz.Args(run_dir=str(tmp_path / "broken"), total_timesteps=232, **tiny))
    mz.train(mz.saved_args(tmp_path / "broken", resume=True, total_timesteps=400))
    whole, broken = timeless(tmp_path / "whole"), timeless(tmp_path / "broken")
    evaluation = {"eval/episodic_return"}
    broken = [row for row in broken if not (row["global_step"] == 232 and evaluation <= row.keys())]
    assert whole == broken
    whole, broken = (torch.load(tmp_path / name / "model.pt")["model"] for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


@pytest.mark.slow
def test_it_learns_cartpole(tmp_path):
    args = mz.Args(total_timesteps=10_000, eval_frequency=10_000, run_dir=str(tmp_path / "run"))
    assert mz.train(args)["eval/episodic_return"] > 200


@pytest.mark.slow
def test_it_learns_tic_tac_toe(tmp_path):
    flags = {"num_envs": 100, "gamma": 1, "support_size": 1, "hidden_size": 256, "latent_size": 64, "unroll_steps": 3}
    flags |= {"batch_size": 256, "train_frequency": 8, "buffer_size": 50_000, "final_temperature": 1}
    flags |= {"total_timesteps": 30_000, "eval_frequency": 30_000}
    result = mz.train(mz.Args(TIC_TAC_TOE, run_dir=str(tmp_path / "run"), **flags))
    assert result["eval/network_optimal"] > 0.8
    assert result["eval/search_optimal"] > 0.88
