"""q_learning.py against targets by hand, Bellman's equations as linear systems, and environments with known answers."""

import gc
import itertools
import os
import random
import signal
import sys
from collections import Counter as Multiset
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from conftest import rows, timeless

from algorithms import q_learning

ALGORITHMS = ["q-learning", "sarsa", "expected-sarsa", "double-q-learning"]
EXPLORATIONS = ["epsilon-greedy", "boltzmann", "ucb"]
STEPS = []  # of the environments below: (state, action, next state), as they saw them
SEEDS = []  # with which they were reset


class Walk(gym.Env):
    """States 0, 1, 2: action 1 goes one further, with luck; action 0 stays and costs 0.1; leaving state 2 pays 1."""

    observation_space = gym.spaces.Discrete(4)
    action_space = gym.spaces.Discrete(2)
    initial_state_distrib = np.array([1.0, 0, 0, 0])
    P = {  # noqa: RUF012
        s: {0: [(1.0, s, -0.1, False)], 1: [(0.8, s + 1, float(s == 2), s == 2), (0.2, s, 0.0, False)]}
        for s in range(3)
    }

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            SEEDS.append(seed)
        self.state = 0
        return 0, {}

    def step(self, action):
        transitions = self.P[self.state][action]
        _, next_state, reward, terminated = transitions[0 if self.np_random.random() < transitions[0][0] else 1]
        STEPS.append((self.state, action, next_state))
        self.state = next_state
        return next_state, reward, terminated, False, {}


class Counter(gym.Env):
    """Observes step + 10 * (episode % 3); the episodes last 3, 2, 4 steps and end as ENDS says; step t pays t."""

    LENGTHS, ENDS = (3, 2, 4), ("terminated", "truncated", "truncated")
    observation_space = gym.spaces.Discrete(40)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        self.episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = (self.episode + 1) % 3, 0
        return 10 * self.episode, {}

    def step(self, action):
        self.t += 1
        STEPS.append((10 * self.episode + self.t - 1, action, 10 * self.episode + self.t))
        end = self.ENDS[self.episode] if self.t == self.LENGTHS[self.episode] else ""
        return 10 * self.episode + self.t, float(self.t), end == "terminated", end == "truncated", {}


class Odd(gym.Env):
    """An environment with the spaces that it is given: it notes actions, observes samples, pays REWARD."""

    REWARD = 0.0

    def __init__(self, observation_space, action_space, render_mode=None):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        STEPS.append((None, action, None))
        return self.observation_space.sample(), self.REWARD, False, True, {}


D, BOX = gym.spaces.Discrete, gym.spaces.Box(-1, 1, (3,))
ODD = {
    "Shifted": {"observation_space": D(3, start=-1), "action_space": D(2, start=5)},
    "Product": {"observation_space": gym.spaces.Dict(b=D(2), a=gym.spaces.Tuple([D(3, start=4), D(2)]))},
    "Digits": {"observation_space": gym.spaces.MultiDiscrete(np.array([[2, 3], [2, 2]]), start=np.ones((2, 2), int))},
    "Bits": {"observation_space": gym.spaces.MultiBinary([2, 2])},
    "Box": {"observation_space": BOX},
    "Mixed": {"observation_space": gym.spaces.Tuple([D(2), BOX])},
    "Huge": {"observation_space": gym.spaces.MultiDiscrete([256] * 9)},
    "Continuous": {"observation_space": D(2), "action_space": BOX},
}
gym.register("Walk-v0", Walk, max_episode_steps=50, disable_env_checker=True)
gym.register("EndlessWalk-v0", Walk, disable_env_checker=True)
gym.register("TableCounter-v0", Counter, disable_env_checker=True)
for name, kwargs in ODD.items():
    gym.register(f"TableOdd{name}-v0", Odd, disable_env_checker=True, kwargs={"action_space": D(2)} | kwargs)


HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def release():
    """Lets go of a run that did not finish: the signal handlers hold it, and it the lock of its folder."""
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)
    gc.collect()


@pytest.fixture(autouse=True)
def nothing_noted():
    STEPS.clear()
    SEEDS.clear()
    yield
    release()


def train(run_dir="run", **kwargs):
    """A run in Walk without evaluations but the last; returns its rows and its Q(s, a), (1 or 2, S, A)."""
    args = {"env_id": "Walk-v0", "total_timesteps": 1000, "eval_frequency": 10**9, "eval_episodes": 1}
    args = q_learning.Args(**args | {"checkpoint_frequency": 10**9, "run_dir": str(run_dir)} | kwargs)
    q_learning.train(args)
    return rows(Path(run_dir)), np.load(Path(run_dir, "model.npz"))["model/q"]


def bellman(gamma, epsilon):
    """Q(s, a) in Walk of the policy that is epsilon-greedy for this very Q: found among the solutions of 8 systems."""
    best = None
    for greedy in itertools.product(range(2), repeat=3):
        pi = np.full((3, 2), epsilon / 2)
        pi[range(3), greedy] += 1 - epsilon
        matrix, rewards = np.eye(6), np.zeros(6)
        for s, a in itertools.product(range(3), range(2)):
            for prob, next_s, reward, terminated in Walk.P[s][a]:
                rewards[2 * s + a] += prob * reward
                if not terminated:
                    matrix[2 * s + a, 2 * next_s : 2 * next_s + 2] -= gamma * prob * pi[next_s]
        q = np.linalg.solve(matrix, rewards).reshape(3, 2)
        if (q.argmax(axis=1) == greedy).all():
            best = q if best is None else np.maximum(q, best)
    return best


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_learns_the_values_of_bellmans_equation(algorithm):
    _, q = train(total_timesteps=60_000, algorithm=algorithm, gamma=0.9, start_e=0.8, end_e=0.8)
    on_policy = algorithm in ("sarsa", "expected-sarsa")
    assert np.abs(bellman(0.9, 0.8) - bellman(0.9, 0.0)).max() > 0.1, "the two can be told apart"
    np.testing.assert_allclose(q.mean(axis=0)[:3], bellman(0.9, 0.8 if on_policy else 0.0), atol=0.03)


def test_bellmans_values_by_hand():
    """Going on from state 2 is worth 0.8 + 0.2 * 0.8 Q, and so on backwards: Q(s) = 0.64 Q(s + 1) / 0.84."""
    last = 0.8 / 0.84
    expected = [last * (0.64 / 0.84) ** 2, last * 0.64 / 0.84, last]
    np.testing.assert_allclose(bellman(0.8, 0.0)[:, 1], expected)
    np.testing.assert_allclose(
        q_learning.Transitions(q_learning.make_env("Walk-v0"), 0.8).value_iteration(0.8)[:3, 1], expected
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("terminated", [True, False])
def test_a_td_error_of_half_at_alpha_a_tenth_moves_3_to_3_05(algorithm, terminated, monkeypatch):
    monkeypatch.setattr(Odd, "REWARD", 3.5 if terminated else 0.5)
    step = Odd.step
    monkeypatch.setattr(Odd, "step", lambda self, a: (*step(self, a)[:2], terminated, not terminated, {}))
    _, q = train(env_id="TableOddShifted-v0", total_timesteps=1, algorithm=algorithm, learning_rate=0.1,
                 initial_value=3.0, gamma=1.0)  # fmt: skip
    assert sorted(q.flatten()) == pytest.approx([3.0] * (q.size - 1) + [3.05])


TARGETS = {"q-learning": 1 + 0.5 * 4, "sarsa": 1 + 0.5 * -2, "expected-sarsa": 1 + 0.5 * (1.6 + 0.2 - 0.8),
           "double-q-learning": 1 + 0.5 * 0.7}  # fmt: skip


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_targets_by_hand(algorithm):
    args = q_learning.Args(algorithm=algorithm, gamma=0.5)
    next_state = [4.0, 1.0, -2.0], [0.7, 9.0, 3.0], 2, [0.4, 0.2, 0.4]
    assert q_learning.td_target(1.0, False, *next_state, args) == pytest.approx(TARGETS[algorithm])
    assert q_learning.td_target(1.0, True, *next_state, args) == 1.0, "a terminal state is worth nothing"


@pytest.fixture
def targets(monkeypatch):
    """What train hands to td_target, with a table whose numbers are those of the states; it does not learn."""
    seen, td_target, make_agent = [], q_learning.td_target, q_learning.make_agent

    def make(args, env):
        agent = make_agent(args, env)
        agent.q = [[[float(s + 100 * k)] * len(values) for s, values in enumerate(table)]
                   for k, table in enumerate(agent.q)]  # fmt: skip
        return agent

    monkeypatch.setattr(q_learning, "make_agent", make)
    monkeypatch.setattr(q_learning, "td_target", lambda *given: (seen.append(given), td_target(*given))[1])
    return seen


def test_what_reaches_the_target_is_what_happened(targets):
    log, _ = train(env_id="TableCounter-v0", total_timesteps=10, learning_rate=0.0, eval_frequency=10)
    steps = STEPS[:10]
    assert [s for s, _, _ in steps] == [0, 1, 2, 10, 11, 20, 21, 22, 23, 0]
    assert [given[2][0] for given in targets] == [1, 2, 3, 11, 12, 21, 22, 23, 24, 1], (
        "of the last state, not the reset"
    )
    assert [given[0] for given in targets] == [1, 2, 3, 1, 2, 1, 2, 3, 4, 1]
    assert [given[1] for given in targets] == [False, False, True] + [False] * 7, "truncated is not terminated"
    episodes = [(row["global_step"], row["charts/episodic_return"], row["charts/episodic_length"])
                for row in log if "charts/episodic_return" in row]  # fmt: skip
    assert episodes == [(3, 6, 3), (5, 3, 2), (9, 10, 4)]


def test_a_time_limit_bootstraps_and_a_terminal_state_does_not():
    """One pass through the episodes of Counter, learning rate 1: the last step of the first one is terminal."""
    _, q = train(env_id="TableCounter-v0", total_timesteps=9, learning_rate=1.0, anneal_lr=False, gamma=0.5,
                 initial_value=8.0)  # fmt: skip
    learned = {s: [value for value in q[0, s] if value != 8] for s in (0, 1, 2, 10, 11, 20, 21, 22, 23)}
    assert learned == {0: [5], 1: [6], 2: [3], 10: [5], 11: [6], 20: [5], 21: [6], 22: [7], 23: []}  # 4 + 4 = 8


@pytest.mark.parametrize("algorithm", ["sarsa", "expected-sarsa"])
def test_the_target_is_of_the_action_that_is_taken_next_and_of_the_policy_that_took_it(algorithm, targets):
    train(env_id="TableCounter-v0", total_timesteps=200, algorithm=algorithm, learning_rate=0.0, start_e=0.6, end_e=0.6)
    ends = {i for i, (_, _, s) in enumerate(STEPS[:200]) if s in (3, 12, 24)}
    taken = [action for _, action, _ in STEPS[:200]]
    for i in set(range(199)) - ends:
        assert targets[i][4] == taken[i + 1]
    assert {given[4] for given in targets} == {0, 1}
    if algorithm == "expected-sarsa":
        assert targets[0][5] == pytest.approx([0.5, 0.5]), "two actions of equal worth"


def test_double_q_learning_tosses_a_coin_for_the_table_that_learns(targets):
    train(env_id="TableCounter-v0", total_timesteps=400, algorithm="double-q-learning", learning_rate=0.0)
    assert {given[3][0] - given[2][0] for given in targets} == {100, -100}
    assert 150 < sum(given[2][0] < 100 for given in targets) < 250


def test_double_q_learning_moves_the_table_that_chose_the_action_of_the_target(targets):
    """... to the other one's value of it: Q_1 of states 0 and 1 is 0 and 1, Q_2 100 and 101."""
    moved = set()
    for seed in range(1, 13):
        _, q = train(str(seed), env_id="TableCounter-v0", total_timesteps=1, algorithm="double-q-learning", gamma=0.5,
                     learning_rate=1.0, seed=seed)  # fmt: skip
        chose = int(targets[-1][2][0] == 101)
        assert (q[1 - chose] == np.arange(40)[:, None] + 100 * (1 - chose)).all()
        assert sorted(q[chose, 0]) == sorted([100 * chose, 1 + 0.5 * (1 if chose else 101)])
        moved.add(chose)
    assert moved == {0, 1}


def test_double_q_learning_changes_the_table_that_chose_the_action_of_its_target(monkeypatch):
    """Bandit with one step: each table is moved by half of the steps, and by no other."""
    monkeypatch.setattr(Odd, "REWARD", 1.0)
    step = Odd.step
    monkeypatch.setattr(Odd, "step", lambda self, a: (*step(self, a)[:2], True, False, {}))
    _, q = train(env_id="TableOddShifted-v0", total_timesteps=400, algorithm="double-q-learning", learning_rate=0.01,
                 anneal_lr=False, initial_value=0.0)  # fmt: skip
    updates = np.log(1 - q) / np.log(0.99)
    np.testing.assert_allclose(updates, updates.round(), atol=1e-6)
    assert updates.sum() == pytest.approx(400)
    assert 150 < updates[0].sum() < 250


def test_single_table_algorithms_have_one_table_and_double_two():
    for algorithm in ALGORITHMS:
        args = q_learning.Args(algorithm=algorithm, initial_value=2.5)
        q = np.array(q_learning.make_agent(args, q_learning.make_env(args.env_id)).q)
        assert q.shape == (1 + (algorithm == "double-q-learning"), 16, 4)
        assert (q == 2.5).all()


def test_acting_is_by_the_mean_of_the_tables_and_takes_the_first_of_equals():
    table = q_learning.Table(2, 3, 3, 0.0)
    table.q[0] = [[1, 5, 0], [2, 2, 2], [0, 1, 1]]
    table.q[1] = [[5, 0, 0], [2, 2, 2], [0, 1, 1]]
    assert table.values(0) == [3, 2.5, 0]
    for _ in range(20):
        assert table.act(np.array([0, 1, 2, 2])).tolist() == [0, 0, 1, 1]


def test_probabilities_of_epsilon_greedy():
    args, counts = q_learning.Args(), [0] * 4
    assert q_learning.policy([1, 3, 2, 0], counts, 0.4, args) == pytest.approx([0.1, 0.7, 0.1, 0.1])
    assert q_learning.policy([1, 3, 3, 0], counts, 0.4, args) == pytest.approx([0.1, 0.4, 0.4, 0.1])
    assert q_learning.policy([1, 3, 3, 0], counts, 0.0, args) == pytest.approx([0, 0.5, 0.5, 0])
    assert q_learning.policy([1, 3, 3, 0], counts, 1.0, args) == pytest.approx([0.25] * 4)


def test_probabilities_of_boltzmann():
    values = np.array([1.0, 2.0, 2.0, -1.0])
    expected = np.exp(values / 0.7) / np.exp(values / 0.7).sum()
    assert q_learning.boltzmann(values.tolist(), 0.7) == pytest.approx(expected)
    assert q_learning.boltzmann([9000.0, 9001.0, 1e9], 1e-9) == [0, 0, 1], "no overflow"


def test_upper_bounds():
    assert q_learning.upper_bounds([9, 1, 5], [3, 0, 0], 1.0) == [0, 1, 1], "the untried ones first"
    values, counts = np.array([0.5, 0.4, 0.1]), np.array([50, 10, 4])
    expected = values + 0.3 * np.sqrt(np.log(64) / counts)
    assert q_learning.upper_bounds(values.tolist(), counts.tolist(), 0.3) == pytest.approx(expected)


@pytest.mark.parametrize("exploration", EXPLORATIONS)
def test_exploring_follows_the_probabilities_of_the_policy(exploration):
    args = q_learning.Args(exploration=exploration, ucb_c=0.5)
    states = ([0.5, 0.2, 0.5, 0.1], [9, 3, 9, 30]), ([0.5, 0.2, 0.3, 0.1], [9, 9, 4, 1]), ([1.0] * 4, [5, 0, 5, 0])
    expected = []
    for values, counts in states:
        random.seed(0)
        probs = q_learning.policy(values, counts, 0.3, args)
        drawn = Multiset(q_learning.explore(values, counts, 0.3, args) for _ in range(20_000))
        assert sum(probs) == pytest.approx(1)
        assert [drawn[a] / 20_000 for a in range(4)] == pytest.approx(probs, abs=0.015)
        expected.append([round(p, 3) for p in probs])
    if exploration == "ucb":
        assert expected == [[0.5, 0, 0.5, 0], [0, 0, 0, 1], [0, 0.5, 0, 0.5]]


def test_ties_are_broken_at_random_while_training(targets):
    train(env_id="TableCounter-v0", total_timesteps=400, learning_rate=0.0, start_e=0.0, end_e=0.0)
    assert 150 < sum(action for _, action, _ in STEPS[:400]) < 250


def test_schedules_at_both_ends(tmp_path):
    assert [q_learning.linear_schedule(1.0, 0.2, 8, t) for t in (0, 2, 8, 9)] == pytest.approx([1, 0.8, 0.2, 0.2])
    assert q_learning.linear_schedule(1.0, 0.2, 0, 1) == pytest.approx(0.2)
    run = {"total_timesteps": 8000, "exploration_fraction": 0.5}
    for exploration, start, end in ("epsilon-greedy", 0.9, 0.1), ("boltzmann", 5, 1):
        levels = {"start_e": start, "end_e": end}
        log, _ = train(tmp_path / exploration, learning_rate=0.4, exploration=exploration, **run, **levels)
        logged = [row for row in log if "charts/learning_rate" in row]
        assert [row["global_step"] for row in logged] == list(range(1000, 9000, 1000))
        assert [row["charts/learning_rate"] for row in logged] == pytest.approx(np.arange(0.35, -0.01, -0.05), abs=1e-4)
        assert [row["charts/epsilon"] for row in logged] == pytest.approx([*np.linspace(start, end, 5)[1:], *[end] * 4])
        assert all(row["charts/SPS"] > 0 and row["losses/td_loss"] >= 0 for row in logged)


def test_exploration_is_what_the_environment_gets(tmp_path):
    """With every value equal to begin with, and learning switched off: random, then greedy."""
    train(tmp_path / "a", env_id="TableCounter-v0", total_timesteps=600, learning_rate=0.0, start_e=1.0, end_e=0.0)
    assert {action for _, action, _ in STEPS[:600]} == {0, 1}
    STEPS.clear()
    _, q = train(tmp_path / "b", total_timesteps=20_000, end_e=0.0, exploration_fraction=0.5)
    greedy = q[0].argmax(axis=1)
    late = STEPS[15_000:20_000]
    assert np.mean([action == greedy[s] for s, action, _ in late]) > 0.99
    assert np.mean([action == greedy[s] for s, action, _ in STEPS[:1000]]) < 0.6


def test_first_learning_rate_is_not_annealed_and_steps_are_counted():
    _, q = train(env_id="TableCounter-v0", total_timesteps=2, learning_rate=0.5, initial_value=0.0, gamma=0.0)
    assert [value for value in q.flatten() if value] == [0.5, 0.5], "0.5 * 1, and half of 0.5 * 2"
    counts = np.load("run/model.npz")["model/counts"]
    assert counts.sum() == 2
    assert [s for s in range(40) if counts[s].any()] == [0, 1]


@pytest.mark.parametrize(
    ("env_id", "gamma", "optimum"),
    [("FrozenLake-v1", 0.995, 0.7402), ("FrozenLake8x8-v1", 0.995, 0.8936), ("Taxi-v4", 0.995, 7.93),
     ("CliffWalking-v1", 0.995, -13), ("CliffWalking-v1", 1.0, -13)],
)  # fmt: skip
def test_optimal_returns_that_are_known(env_id, gamma, optimum):
    assert q_learning.Transitions(q_learning.make_env(env_id), gamma).optimal_return == pytest.approx(optimum, abs=1e-4)


def test_value_iteration_solves_bellmans_equation():
    for gamma in 0.0, 0.5, 0.9, 0.99:
        q = q_learning.Transitions(q_learning.make_env("Walk-v0"), gamma).value_iteration(gamma)
        np.testing.assert_allclose(q[:3], bellman(gamma, 0.0), atol=1e-7)
        assert (q[3] == 0).all()


def test_exact_return_is_the_sum_over_all_ways_that_an_episode_can_go():
    model = q_learning.Transitions(q_learning.make_env("Walk-v0"), 0.9)

    def expected(state, steps_left, actions):
        if steps_left == 0:
            return 0.0
        return sum(
            prob * (reward + (0 if terminated else expected(next_state, steps_left - 1, actions)))
            for prob, next_state, reward, terminated in Walk.P[state][actions[state]]
        )

    for actions in itertools.product(range(2), repeat=3):
        for model.time_limit in 1, 2, 3, 7:
            exact = model.expected_return(np.array([*actions, 0]))
            assert exact == pytest.approx(expected(0, model.time_limit, actions))


def test_exact_return_is_the_mean_of_sampled_ones():
    args = q_learning.Args(env_id="FrozenLake-v1", eval_episodes=2000)
    model = q_learning.Transitions(q_learning.make_env(args.env_id), 0.995)
    actions = model.value_iteration(0.995).argmax(axis=1)
    sampled = q_learning.evaluate(lambda states: actions[states], args, "x")["eval/episodic_return"]
    assert sampled == pytest.approx(model.expected_return(actions), abs=0.03)


def observations(space):
    """All of them."""
    if isinstance(space, D):
        return [int(space.start) + i for i in range(space.n)]
    if isinstance(space, gym.spaces.Tuple):
        return list(itertools.product(*map(observations, space.spaces)))
    if isinstance(space, gym.spaces.Dict):
        values = itertools.product(*map(observations, space.spaces.values()))
        return [dict(reversed(list(zip(space.spaces, v, strict=True)))) for v in values]
    if isinstance(space, gym.spaces.MultiBinary):
        return [np.reshape(bits, space.shape) for bits in itertools.product(range(2), repeat=int(np.prod(space.shape)))]
    digits = itertools.product(*(range(n) for n in space.nvec.flatten()))
    return [np.reshape(d, space.shape) + space.start for d in digits]


@pytest.mark.parametrize("space", [
    D(5), D(5, start=-2), gym.make("Blackjack-v1").observation_space,
    *(ODD[name]["observation_space"] for name in ("Product", "Digits", "Bits")),
])  # fmt: skip
def test_every_observation_has_a_number_of_its_own(space):
    every = observations(space)
    assert all(space.contains(obs) for obs in every if not isinstance(space, gym.spaces.MultiBinary))
    numbers = [q_learning.state_number(space, obs) for obs in every]
    assert sorted(number for number, _ in numbers) == list(range(len(every)))
    assert {count for _, count in numbers} == {len(every)}


@pytest.mark.parametrize("name", ["Shifted", "Product", "Digits", "Bits"])
def test_any_discrete_spaces_are_numbered_from_0(name):
    _, q = train(env_id=f"TableOdd{name}-v0", total_timesteps=300)
    assert q.shape == (1, {"Shifted": 3, "Product": 12, "Digits": 24, "Bits": 16}[name], 2)
    assert (q < 1).any(axis=(0, 2)).all(), "all states were met"
    assert {int(action) for _, action, _ in STEPS} == ({5, 6} if name == "Shifted" else {0, 1})


def test_learns_blackjack():
    log, q = train(env_id="Blackjack-v1", total_timesteps=30_000, eval_episodes=500, gamma=1.0)
    assert q.shape == (1, 32 * 11 * 2, 2)
    assert log[-1]["eval/episodic_return"] > -0.2, "random play loses 0.4"
    assert "eval/exact_return" not in log[-1], "it gives no probabilities"


def command(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["algorithms/q_learning.py", *map(str, flags)])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    capsys.readouterr()
    try:
        q_learning.main()
        code = 0
    except SystemExit as end:
        code = end.code
    release()
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--env-id CartPole-v1", ["Box", "dqn.py"]), ("--env-id TableOddBox-v0", ["Box", "dqn.py"]),
        ("--env-id TableOddMixed-v0", ["Box", "dqn.py"]), ("--env-id TableOddHuge-v0", ["too many", "dqn.py"]),
        ("--env-id TableOddContinuous-v0", ["acts in Box", "ppo.py"]), ("--plot-values", ["matplotlib", "pip install"]),
        ("--exploration boltzmann --end-e 0", ["--end-e"]),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(flags, words, monkeypatch, capsys):
    monkeypatch.setattr(q_learning, "find_spec", lambda name: None)
    code, _, err = command(monkeypatch, capsys, *flags.split())
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert not Path("runs").exists()


def test_negative_initial_values_are_allowed():
    _, q = train(total_timesteps=1, initial_value=-4.0)
    assert (q == -4).sum() == q.size - 1


VARIANTS = [(a, "epsilon-greedy") for a in ALGORITHMS] + [("q-learning", "ucb"), ("expected-sarsa", "boltzmann")]


@pytest.mark.parametrize(("algorithm", "exploration"), VARIANTS)
def test_killed_and_resumed_equals_unbroken(algorithm, exploration, monkeypatch):
    flags = {"env_id": "FrozenLake-v1", "total_timesteps": 4000, "checkpoint_frequency": 700, "eval_frequency": 900,
             "algorithm": algorithm, "exploration": exploration}  # fmt: skip
    train("unbroken", **flags)
    log = q_learning.Run.log

    def killed(self, step, row):
        if step > 1500:
            raise InterruptedError
        log(self, step, row)

    with monkeypatch.context() as patch:
        patch.setattr(q_learning.Run, "log", killed)
        died = False
        try:
            train("killed", **flags)
        except InterruptedError:  # its traceback, gone after this line, would hold the folder's lock
            died = True
    assert died
    release()
    assert q_learning.load_file(Path("killed/checkpoint.npz"))["step"] == 1400
    random.seed(99)  # whatever the process that goes on starts with
    np.random.seed(99)
    train("killed", resume=True, **flags)
    assert timeless(Path("killed")) == timeless(Path("unbroken"))
    for name in "model/q", "model/counts":
        arrays = [np.load(f"{run}/model.npz")[name] for run in ("killed", "unbroken")]
        np.testing.assert_array_equal(*arrays)


def test_a_run_that_is_stopped_in_an_evaluation_repeats_it(monkeypatch):
    flags = {"env_id": "FrozenLake-v1", "total_timesteps": 3000, "eval_frequency": 1000, "eval_episodes": 5}
    train("unbroken", **flags, checkpoint_frequency=1500)
    evaluate = q_learning.evaluate

    def stopping(act, args, name, stopped):
        if name == "step-2000":
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(act, args, name, stopped)

    with monkeypatch.context() as patch:
        patch.setattr(q_learning, "evaluate", stopping)
        code = 0
        try:
            train("stopped", **flags, checkpoint_frequency=1500)
        except SystemExit as end:
            code = end.code
    assert code == 143
    release()
    before = timeless(Path("stopped"))
    assert before[-1]["global_step"] == 2000
    assert "eval/exact_return" not in before[-1]
    train("stopped", resume=True, **flags, checkpoint_frequency=1500)
    after = timeless(Path("stopped"))
    assert after[: len(before)] == before
    assert [row["global_step"] for row in after if "eval/exact_return" in row] == [1000, 2000, 3000]
    assert after[len(before)]["global_step"] == 2000
    assert "eval/exact_return" in after[len(before)]


def test_no_two_resets_share_a_seed_and_evaluations_share_theirs():
    train(total_timesteps=300, checkpoint_frequency=100, eval_frequency=150, eval_episodes=3)
    first_training, second_training = SEEDS[:2]
    evaluations = SEEDS[2:5], SEEDS[-3:]
    assert evaluations[0] == evaluations[1]
    assert len(set(SEEDS)) == 3 + 3
    SEEDS.clear()
    train("other", total_timesteps=300, checkpoint_frequency=100, eval_frequency=150, eval_episodes=3, seed=2)
    assert not {first_training, second_training, *evaluations[0]} & set(SEEDS)


def test_watching_changes_nothing_and_another_seed_does():
    tables = [train(name, env_id="FrozenLake-v1", total_timesteps=3000, **flags)[1]
              for name, flags in {"a": {}, "b": {"eval_frequency": 100}, "c": {"seed": 2}}.items()]  # fmt: skip
    np.testing.assert_array_equal(tables[0], tables[1])
    assert (tables[0] != tables[2]).any()


def test_the_constant_of_ucb_matters():
    flags = {"env_id": "FrozenLake-v1", "exploration": "ucb"}
    assert (train("a", **flags, ucb_c=0.1)[1] != train("b", **flags, ucb_c=9.0)[1]).any()


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    ("q", "counts"),
    [
        (np.array([Bomb()], object), np.zeros((4, 2), int)),
        (np.zeros((1, 2, 2)), np.zeros((2, 2), int)),
        (np.zeros((1, 4, 2)), np.zeros((4, 2))),
    ],
    ids=["code in an array", "another table", "counts that are no integers"],
)
def test_a_file_with_something_else_in_it_is_refused(q, counts, monkeypatch, capsys):
    train(total_timesteps=100)
    np.savez("run/model.npz", **{"model/q": q, "model/counts": counts})
    code, _, err = command(monkeypatch, capsys, "--run-dir", "run", "--evaluate")
    assert code == 2, err
    assert "model.npz" in err
    assert err.count("\n") == 1
    assert not Path("exploded").exists(), "no code was run"


def test_what_is_saved_is_what_is_loaded():
    table, other = q_learning.Table(2, 3, 2, 0.1), q_learning.Table(2, 3, 2, 0.0)
    table.q[1][2][0] = 1 / 3
    table.counts[1][1] = 7
    q_learning.save_file(Path("file.npz"), {"model": table.state_dict(), "step": 12, "seconds": 0.1})
    state = q_learning.load_file(Path("file.npz"), model=other)
    assert (other.q, other.counts) == (table.q, table.counts)
    assert (state["step"], state["seconds"]) == (12, 0.1)
    assert (type(state["step"]), type(other.q[0][0][0]), type(other.counts[0][0])) == (int, float, int)
    assert [path.name for path in Path().iterdir()] == ["file.npz"]


def test_nan_rewards_end_the_run_and_spare_the_last_checkpoint(monkeypatch, capsys):
    monkeypatch.setattr(Odd, "REWARD", float("nan"))
    code, _, err = command(monkeypatch, capsys, "--env-id", "TableOddShifted-v0", "--run-dir", "run")
    assert code == 1
    assert "NaN" in err
    assert not Path("run/model.npz").exists()


def test_an_environment_without_a_time_limit_gets_one():
    log, _ = train(env_id="EndlessWalk-v0", total_timesteps=1500, learning_rate=0.0, start_e=0.0, end_e=0.0,
                   eval_episodes=2, initial_value=0.0)  # fmt: skip
    assert log[-1]["eval/episodic_length"] == 1000, "the first of equal actions stays where it is"
    assert log[-1]["eval/exact_return"] == pytest.approx(log[-1]["eval/episodic_return"])
    assert q_learning.make_env("Walk-v0").spec.max_episode_steps == 50, "one that it has is kept"


@pytest.mark.parametrize(("env_id", "inside"), [("FrozenLake-v1", 9), ("CliffWalking-v1", 17)])
def test_arrows_point_where_the_actions_lead(env_id, inside, capsys):
    env = gym.make(env_id, **({"is_slippery": False} if "Lake" in env_id else {}))
    (height, width), signs = q_learning.grid_of(env)
    for sign, offset in {"<": -1, ">": 1, "^": -width, "v": width}.items():
        ((_, next_state, *_),) = env.unwrapped.P[inside][signs.index(sign)]
        assert next_state == inside + offset
    table = q_learning.Table(1, height * width, 4, 0.0)
    table.q[0][0][2], table.counts[0][1] = 1.0, 1
    table.q[0][1][2] = 1.0
    q_learning.show_policy(env, table)
    shown = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [len(line) for line in shown] == [width] * height
    assert shown[0][:2] == [signs[2], "."], "a dot where it never acted"
    q_learning.show_policy(gym.make("Taxi-v4"), table)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "Blackjack-v1"])
def test_values_are_drawn_on_request(env_id):
    image = pytest.importorskip("matplotlib.image")
    train(env_id=env_id, plot_values=True)
    assert image.imread("run/values.png").std() > 0.05


def test_what_was_never_tried_is_left_white(tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes").Axes
    drawn, imshow = [], axes.imshow
    monkeypatch.setattr(
        axes, "imshow", lambda self, values, **look: drawn.append(values) or imshow(self, values, **look)
    )
    table = q_learning.Table(1, 500, 6, 0.0)
    table.counts[3][4] = 1
    q_learning.plot_values(gym.make("Taxi-v4"), table, tmp_path / "values.png")
    assert np.argwhere(~drawn[0].mask).tolist() == [[4, 3]]


def test_a_table_has_at_most_ten_million_values(capsys):
    for states, fits in (10**6, True), (10**6 + 1, False):

        class Large(gym.Env):
            observation_space, action_space = gym.spaces.Discrete(states), gym.spaces.Discrete(10)

            def __init__(self, render_mode=None):
                pass

        gym.register("TableLarge-v0", Large, disable_env_checker=True, max_episode_steps=9)
        if fits:
            q_learning.make_env("TableLarge-v0")
        else:
            with pytest.raises(SystemExit):
                q_learning.make_env("TableLarge-v0")
            assert "too many" in capsys.readouterr().err
        del gym.registry["TableLarge-v0"]


def test_evaluate_repeats_the_last_evaluation_and_shows_the_policy(monkeypatch, capsys):
    log, _ = train(env_id="FrozenLake-v1", total_timesteps=3000, eval_episodes=7)
    code, out, _ = command(monkeypatch, capsys, "--run-dir", "run", "--evaluate")
    assert code == 0
    for name in "episodic_return", "exact_return", "optimal_return":
        assert f"eval/{name} {log[-1][f'eval/{name}']:.4g}" in out
    assert "7 episodes" in out
    assert "The greedy policy:\n    " in out


def test_defaults_learn_frozen_lake():
    log, _ = train(env_id="FrozenLake-v1", total_timesteps=60_000)
    assert log[-1]["eval/exact_return"] >= 0.735
    assert log[-1]["eval/optimal_return"] == pytest.approx(0.7402, abs=1e-4)


def test_on_the_cliff_sarsa_walks_away_from_the_edge_and_falls_less_while_it_explores():
    exploring, walked = {}, {}
    for algorithm in "q-learning", "sarsa":
        STEPS.clear()
        log, _ = train(algorithm, env_id="CliffWalking-v1", total_timesteps=50_000, algorithm=algorithm, gamma=1.0,
                       learning_rate=0.5, anneal_lr=False, start_e=0.1, end_e=0.1, initial_value=0.0)  # fmt: skip
        episodes = [row["charts/episodic_return"] for row in log if "charts/episodic_return" in row]
        exploring[algorithm] = np.mean(episodes[-500:])
        walked[algorithm] = log[-1]["eval/exact_return"]
    assert walked["q-learning"] == -13
    assert -30 < walked["sarsa"] < -13
    assert exploring["sarsa"] > exploring["q-learning"] + 10
