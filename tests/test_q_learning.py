"""q_learning.py against targets by hand, Bellman's equations as linear systems, and environments with known answers."""

import itertools
import random
from collections import Counter as Multiset
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
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


@pytest.fixture(autouse=True)
def nothing_noted():
    STEPS.clear()
    SEEDS.clear()


def read(run_dir):
    """Q(s, a), (1 or 2, S, A), and counts, (S, A), of a run's model, with the initial value where it never was."""
    model = torch.load(Path(run_dir, "model.pt"), weights_only=True)["model"]
    states, args = model["states"].tolist(), q_learning.saved_args(run_dir)
    q = np.full((len(model["q"]), max(states) + 1, model["counts"].shape[1]), args.initial_value)
    counts = np.zeros(q.shape[1:], int)
    q[:, states], counts[states] = model["q"], model["counts"]
    return q, counts


def train(run_dir="run", **kwargs):
    """A run in Walk without evaluations but the last; returns its rows and its Q(s, a), (1 or 2, S, A)."""
    args = {"env_id": "Walk-v0", "total_timesteps": 1000, "eval_frequency": 10**9, "eval_episodes": 1}
    args = q_learning.Args(**args | {"checkpoint_frequency": 10**9, "run_dir": str(run_dir)} | kwargs)
    q_learning.train(args)
    return rows(Path(run_dir)), read(run_dir)[0]


def make_table(num_tables, num_actions, initial_value=0.0, q=()):
    """A table with these rows, for each table a list of lists."""
    algorithm = "double-q-learning" if num_tables == 2 else "q-learning"
    args = q_learning.Args(algorithm=algorithm, initial_value=initial_value)
    table = q_learning.make_agent(args, (), D(num_actions))
    for of_one, values in zip(table.q, q, strict=False):
        for s, row in enumerate(values):
            of_one[s], table.counts[s] = row, [0] * num_actions
    return table


def make_env(env_id, **flags):
    return q_learning.make_env(q_learning.Args(env_id=env_id, **flags))


def exact(env, actions, gamma=0.9):
    """The exact returns of a policy, one action for each state, and of value iteration's."""
    q = [[float(a == action) for a in range(int(env.action_space.n))] for action in actions]
    return q_learning.exact_returns(make_table(1, int(env.action_space.n), q=[q]), env, q_learning.Args(gamma=gamma))


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


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("terminated", [True, False])
def test_a_td_error_of_half_at_alpha_a_tenth_moves_3_to_3_05(algorithm, terminated, monkeypatch):
    monkeypatch.setattr(Odd, "REWARD", 3.5 if terminated else 0.5)
    step = Odd.step
    monkeypatch.setattr(Odd, "step", lambda self, a: (*step(self, a)[:2], terminated, not terminated, {}))
    _, q = train(env_id="TableOddShifted-v0", total_timesteps=1, algorithm=algorithm, learning_rate=0.1,
                 initial_value=3.0, gamma=1.0)  # fmt: skip
    assert sorted(q.flatten()) == pytest.approx([3.0] * (q.size - 1) + [3.05])


NEXT_VALUES = {"q-learning": 4, "sarsa": -2, "expected-sarsa": 1.6 + 0.2 - 0.8, "double-q-learning": 0.7}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_values_of_the_next_state_by_hand(algorithm):
    args = q_learning.Args(algorithm=algorithm)
    value = q_learning.next_value([4.0, 1.0, -2.0], [0.7, 9.0, 3.0], 2, [0.4, 0.2, 0.4], args)
    assert value == pytest.approx(NEXT_VALUES[algorithm])


class Numbered(q_learning.defaultdict):
    """Rows for two actions: of table k, each value is at first state + 100 k."""

    def __init__(self, k):
        super().__init__()
        self.k = k

    def __missing__(self, state):
        self[state] = [float(state + 100 * self.k)] * 2
        return self[state]


@pytest.fixture
def seen(monkeypatch):
    """What train hands to next_value, with a table whose numbers are at first those of the states."""
    given, next_value, make_agent = [], q_learning.next_value, q_learning.make_agent

    def make(*args):
        agent = make_agent(*args)
        agent.q = [Numbered(k) for k in range(len(agent.q))]
        return agent

    monkeypatch.setattr(q_learning, "make_agent", make)
    monkeypatch.setattr(
        q_learning, "next_value", lambda q, *others: (given.append((q[:], *others)), next_value(q, *others))[1]
    )
    return given


def test_what_is_learned_from_is_what_happened(seen):
    log, _ = train(env_id="TableCounter-v0", total_timesteps=10, learning_rate=0.0, eval_frequency=10)
    steps = STEPS[:10]
    assert [s for s, _, _ in steps] == [0, 1, 2, 10, 11, 20, 21, 22, 23, 0]
    assert [q[0] for q, *_ in seen] == [1, 2, 11, 12, 21, 22, 23, 24, 1], (
        "of the last state of an episode, not of the reset; truncated is not terminated, as state 3 is"
    )
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
def test_the_target_is_of_the_action_that_is_taken_next_and_of_the_policy_that_took_it(algorithm, seen):
    train(env_id="TableCounter-v0", total_timesteps=200, algorithm=algorithm, learning_rate=0.0, start_e=0.6, end_e=0.6)
    on = [i for i, (_, _, s) in enumerate(STEPS[:200]) if s != 3]  # steps that do not end in a terminal state
    taken = [action for _, action, _ in STEPS[:200]]
    assert len(on) == len(seen)
    for i, (_, _, action, _, _) in zip(on, seen, strict=True):
        if i < 199 and STEPS[i][2] not in (12, 24):  # the time limit
            assert action == taken[i + 1]
    assert {action for _, _, action, _, _ in seen} == {0, 1}
    if algorithm == "expected-sarsa":
        assert seen[0][3] == pytest.approx([0.5, 0.5]), "two actions of equal worth"


def test_double_q_learning_tosses_a_coin_for_the_table_that_learns(seen):
    train(env_id="TableCounter-v0", total_timesteps=400, algorithm="double-q-learning", learning_rate=0.0)
    assert {other[0] - q[0] for q, other, *_ in seen} == {100, -100}
    assert 0.35 * len(seen) < sum(q[0] < 100 for q, *_ in seen) < 0.65 * len(seen)


def test_double_q_learning_moves_the_table_that_chose_the_action_of_the_target(seen):
    """... to the other one's value of it: Q_1 of states 0 and 1 is 0 and 1, Q_2 100 and 101."""
    moved = set()
    for seed in range(1, 13):
        _, q = train(str(seed), env_id="TableCounter-v0", total_timesteps=1, algorithm="double-q-learning", gamma=0.5,
                     learning_rate=1.0, seed=seed)  # fmt: skip
        chose = int(seen[-1][0][0] == 101)
        assert (q[1 - chose] == np.arange(2)[:, None] + 100 * (1 - chose)).all()
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
        table = q_learning.make_agent(args, (), D(4))
        assert len(table.q) == 1 + (algorithm == "double-q-learning")
        assert all(of_one[7] == [2.5] * 4 for of_one in table.q)
        assert table.values(3) == [2.5] * 4


def test_acting_is_by_the_mean_of_the_tables_and_takes_the_first_of_equals():
    table = make_table(2, 3, q=[[[1, 5, 0], [2, 2, 2], [0, 1, 1]], [[5, 0, 0], [2, 2, 2], [0, 1, 1]]])
    assert table.values(0) == [3, 2.5, 0]
    for _ in range(20):
        assert table.act(np.array([0, 1, 2, 2])).tolist() == [0, 0, 1, 1]
    table.action_space = D(3, start=5)
    assert table.act(np.array([[2], [0]])).tolist() == [[6], [5]]
    assert table.act(2) == 6, "one state"
    assert table.act(99) == 5, "one that it has never met"
    assert not {99} & {*table.q[0], *table.counts}, "to evaluate changes nothing"


def test_probabilities_of_epsilon_greedy():
    args, counts = q_learning.Args(), [0] * 4
    assert q_learning.policy([1, 3, 2, 0], counts, 0.4, args) == pytest.approx([0.1, 0.7, 0.1, 0.1])
    assert q_learning.policy([1, 3, 3, 0], counts, 0.4, args) == pytest.approx([0.1, 0.4, 0.4, 0.1])
    assert q_learning.policy([1, 3, 3, 0], counts, 0.0, args) == pytest.approx([0, 0.5, 0.5, 0])
    assert q_learning.policy([1, 3, 3, 0], counts, 1.0, args) == pytest.approx([0.25] * 4)


def test_probabilities_of_boltzmann():
    values = np.array([1.0, 2.0, 2.0, -1.0])
    expected = np.exp(values / 0.7) / np.exp(values / 0.7).sum()
    args = q_learning.Args(exploration="boltzmann")
    assert q_learning.policy(values.tolist(), [0] * 4, 0.7, args) == pytest.approx(expected)
    assert q_learning.policy([9000.0, 9001.0, 1e9], [0] * 3, 1e-9, args) == [0, 0, 1], "no overflow"


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


def test_ties_are_broken_at_random_while_training(seen):
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
        levels = [*np.linspace(start, end, 5)[1:], *[end] * 4]
        assert [row["charts/epsilon"] for row in logged] == pytest.approx(levels, abs=1.01 * (start - end) / 4000)
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
    _, counts = read("run")
    assert counts.sum() == 2
    assert [s for s, row in enumerate(counts) if row.any()] == [0, 1]


@pytest.mark.parametrize(
    ("env_id", "gamma", "optimum"),
    [("FrozenLake-v1", 0.995, 0.7402), ("FrozenLake8x8-v1", 0.995, 0.8936), ("Taxi-v4", 0.995, 7.93),
     ("CliffWalking-v1", 0.995, -13), ("CliffWalking-v1", 1.0, -13)],
)  # fmt: skip
def test_optimal_returns_that_are_known(env_id, gamma, optimum):
    env = make_env(env_id)
    result = exact(env, [0] * int(env.observation_space.n), gamma)
    assert result["eval/optimal_return"] == pytest.approx(optimum, abs=1e-4)


@pytest.mark.parametrize(("gamma", "best_action"), [(0.0, 0), (0.5, 0), (0.9, 1), (0.99, 1)])
def test_value_iteration_solves_bellmans_equation(gamma, best_action, monkeypatch):
    """What is best in state 0, to stay or to go on, depends on the discount: now the latter costs more."""
    first = {0: [(1.0, 0, -0.3, False)], 1: [(0.8, 1, -1.0, False), (0.2, 0, -1.0, False)]}
    monkeypatch.setattr(Walk, "P", Walk.P | {0: first})
    best = bellman(gamma, 0.0).argmax(axis=1)
    assert best[0] == best_action
    returns = exact(make_env("Walk-v0"), [*best, 0], gamma)
    assert returns["eval/optimal_return"] == pytest.approx(returns["eval/exact_return"])
    others = exact(make_env("Walk-v0"), [1 - best[0], *best[1:], 0], gamma)
    assert abs(others["eval/exact_return"] - returns["eval/exact_return"]) > 0.1


def test_exact_return_is_the_sum_over_all_ways_that_an_episode_can_go():
    def expected(state, steps_left, actions):
        if steps_left == 0:
            return 0.0
        return sum(
            prob * (reward + (0 if terminated else expected(next_state, steps_left - 1, actions)))
            for prob, next_state, reward, terminated in Walk.P[state][actions[state]]
        )

    for limit in 1, 2, 3, 7:
        env = gym.make("Walk-v0", max_episode_steps=limit)
        for actions in itertools.product(range(2), repeat=3):
            result = exact(env, [*actions, 0])
            assert result["eval/exact_return"] == pytest.approx(expected(0, limit, actions))


def test_exact_return_is_the_mean_of_sampled_ones():
    args = q_learning.Args(env_id="FrozenLake-v1", eval_episodes=2000)
    q = [[float(a == action) for a in range(4)] for action in (0, 3, 3, 3, 0, 0, 0, 0, 3, 1, 0, 0, 0, 2, 1, 0)]
    table = make_table(1, 4, q=[q])
    table.obs_shape = (16,)
    result = q_learning.evaluate(table, args, None)
    assert result["eval/exact_return"] == pytest.approx(0.7402, abs=1e-4)
    assert result["eval/episodic_return"] == pytest.approx(result["eval/exact_return"], abs=0.03)


def test_a_table_that_would_take_too_much_memory_has_no_exact_return(monkeypatch):
    for size, known in (2000, True), (2001, False):
        monkeypatch.setattr(Walk, "initial_state_distrib", np.eye(1, size)[0])
        assert bool(exact(make_env("Walk-v0"), [0] * 4)) == known


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
    numbers = [q_learning.number_of(space, obs) for obs in every]
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
    assert 600 < q.shape[1] <= 32 * 11 * 2
    assert log[-1]["eval/episodic_return"] > -0.2, "random play loses 0.4"
    assert "eval/exact_return" not in log[-1], "it gives no probabilities"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--env-id CartPole-v1", ["Box", "dqn.py"]), ("--env-id TableOddBox-v0", ["Box", "dqn.py"]),
        ("--env-id TableOddMixed-v0", ["Box", "dqn.py"]), ("--env-id TableOddHuge-v0", ["too many", "dqn.py"]),
        ("--env-id TableOddContinuous-v0", ["acts in Box", "ppo.py"]), ("--plot-values", ["matplotlib", "pip install"]),
        ("--exploration boltzmann --end-e 0", ["--end-e"]),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(flags, words, monkeypatch, cli):
    monkeypatch.setattr(q_learning, "find_spec", lambda name: None)
    code, _, err = cli("q_learning", *flags.split())
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
def test_a_run_that_dies_and_goes_on_equals_one_without_checkpoints(algorithm, exploration, monkeypatch):
    """It dies twice: in the midst of an episode, and at its end."""
    flags = {"env_id": "FrozenLake-v1", "total_timesteps": 4000, "eval_frequency": 900, "algorithm": algorithm,
             "exploration": exploration}  # fmt: skip
    train("unbroken", **flags)
    step, deaths, resumed = q_learning.Run.step, [1503, 2500], {}

    def dying(self, action):
        if deaths and self.global_step >= deaths[0] and bool(self.actions[0]) == (len(deaths) == 2):
            del deaths[0]
            raise InterruptedError
        return step(self, action)

    monkeypatch.setattr(q_learning.Run, "step", dying)
    for _ in range(2):
        with pytest.raises(InterruptedError):
            train("killed", checkpoint_frequency=70, **flags, **resumed)
        random.seed(99)  # whatever the process that goes on starts with
        resumed = {"resume": True}
    train("killed", checkpoint_frequency=70, **flags, **resumed)
    assert timeless(Path("killed")) == timeless(Path("unbroken"))
    models = [torch.load(Path(name, "model.pt"), weights_only=True)["model"] for name in ("killed", "unbroken")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_where_an_episode_could_not_be_replayed_the_action_is_chosen_in_the_new_one(monkeypatch):
    """It stopped in mid-episode, where the action for state 11 was chosen. The episode that follows begins in 10."""
    train(env_id="TableCounter-v0", total_timesteps=4)
    step, begin_episode, explore, asked = q_learning.Run.step, q_learning.Run.begin_episode, q_learning.explore, []

    def not_replayed(self, i, actions=()):
        begin_episode(self, i)
        return not len(actions)

    def explored(values, *others):
        asked.append("explore")
        return explore(values, *others)

    monkeypatch.setattr(q_learning.Run, "begin_episode", not_replayed)
    monkeypatch.setattr(q_learning, "explore", explored)
    monkeypatch.setattr(q_learning.Run, "step", lambda self, a: (asked.append(("step", self.obs[0])), step(self, a))[1])
    q_learning.train(q_learning.saved_args("run", resume=True, total_timesteps=8))
    assert asked[:2] == ["explore", ("step", 10)]


def test_no_two_episodes_share_a_seed_and_evaluations_share_theirs():
    train(total_timesteps=300, eval_frequency=150, eval_episodes=3)
    counts = Multiset(SEEDS)
    assert sorted(counts.values())[-4:] == [1, 2, 2, 2], "those of the two evaluations"
    assert len(counts) > 3 + 5
    used = set(SEEDS)
    SEEDS.clear()
    train("other", total_timesteps=300, eval_frequency=150, eval_episodes=3, seed=2)
    assert not used & set(SEEDS)


def test_watching_changes_nothing_and_another_seed_does():
    tables = [train(name, env_id="FrozenLake-v1", total_timesteps=3000, **flags)[1]
              for name, flags in {"a": {}, "b": {"eval_frequency": 100}, "c": {"seed": 2}}.items()]  # fmt: skip
    np.testing.assert_array_equal(tables[0], tables[1])
    assert (tables[0] != tables[2]).any()


def test_the_constant_of_ucb_matters():
    flags = {"env_id": "FrozenLake-v1", "exploration": "ucb"}
    assert (train("a", **flags, ucb_c=0.1)[1] != train("b", **flags, ucb_c=9.0)[1]).any()


def test_what_is_saved_is_what_is_loaded():
    table, other = make_table(2, 2, 0.1), make_table(2, 2, 0.0)
    other.load_state_dict(table.state_dict())
    assert (len(other.counts), other.next_action) == (0, -1), "of an empty table"
    for state in 7, 3, 5:
        table.values(state)
        table.counts[state][1] += state
    table.q[1][3][0] = 1 / 3
    table.next_action = 1
    torch.save(table.state_dict(), "file")
    other.load_state_dict(torch.load("file", weights_only=True))
    assert (other.q, other.counts, other.next_action) == (table.q, table.counts, 1)
    assert [list(part) for part in (*other.q, other.counts)] == [[7, 3, 5]] * 3, "in the same order"
    assert (type(other.q[0][3][0]), type(other.counts[3][0]), type(other.next_action)) == (float, int, int)
    assert {part.dtype for part in table.state_dict().values()} == {torch.float64, torch.int64}
    with pytest.raises(ValueError, match="argument"):  # what load_file makes one line of
        make_table(1, 2).load_state_dict(table.state_dict())


def test_nan_rewards_end_the_run_and_spare_the_last_checkpoint(monkeypatch, cli):
    monkeypatch.setattr(Odd, "REWARD", float("nan"))
    code, _, err = cli("q_learning", "--env-id", "TableOddShifted-v0", "--run-dir", "run")
    assert code == 1
    assert "NaN" in err
    assert not Path("run/model.pt").exists()


def test_an_environment_without_a_time_limit_gets_one():
    log, _ = train(env_id="EndlessWalk-v0", total_timesteps=1500, learning_rate=0.0, start_e=0.0, end_e=0.0,
                   eval_episodes=2, initial_value=0.0)  # fmt: skip
    assert log[-1]["eval/episodic_length"] == 1000, "the first of equal actions stays where it is"
    assert log[-1]["eval/exact_return"] == pytest.approx(log[-1]["eval/episodic_return"])
    assert make_env("Walk-v0").spec.max_episode_steps == 50, "one that it has is kept"


@pytest.mark.parametrize(("env_id", "inside", "shape", "signs"), [
    ("FrozenLake-v1", 9, (4, 4), "<v>^"), ("CliffWalking-v1", 17, (4, 12), "^>v<"),
])  # fmt: skip
def test_arrows_point_where_the_actions_lead(env_id, inside, shape, signs, capsys):
    env = gym.make(env_id, **({"is_slippery": False} if "Lake" in env_id else {}))
    height, width = shape
    for sign, offset in {"<": -1, ">": 1, "^": -width, "v": width}.items():
        ((_, next_state, *_),) = env.unwrapped.P[inside][signs.index(sign)]
        assert next_state == inside + offset
    for action in range(4):
        table = make_table(1, 4, q=[[[float(a == action) for a in range(4)]] * 2])
        table.counts[0][1] = 1
        q_learning.show_grid(env, table, None)
        shown = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
        assert [len(line) for line in shown] == [width] * height
        assert shown[0][:2] == [signs[action], "."], "a dot where it never acted"
    q_learning.show_grid(gym.make("Taxi-v4"), table, None)
    assert capsys.readouterr().out == ""


def test_values_are_drawn_on_request(capsys):
    image = pytest.importorskip("matplotlib.image")
    train(env_id="FrozenLake-v1", plot_values=True)
    assert image.imread("run/values.png").std() > 0.05
    assert "The greedy policy:\n    " in capsys.readouterr().out
    train("plain", env_id="FrozenLake-v1")
    train("taxi", env_id="Taxi-v4", plot_values=True)
    assert [path.name for path in Path().glob("*/*.png")] == ["values.png"]


def test_what_was_never_tried_is_left_white(monkeypatch):
    axes = pytest.importorskip("matplotlib.axes").Axes
    drawn, imshow = [], axes.imshow
    monkeypatch.setattr(
        axes, "imshow", lambda self, values, **look: drawn.append(values) or imshow(self, values, **look)
    )
    table = make_table(1, 4, q=[[[0.0] * 4, [0.0, 3.0, 1.0, 2.0]]])
    table.counts[1][2] = 1
    q_learning.show_grid(gym.make("FrozenLake-v1"), table, Path("values.png"))
    assert drawn[0].shape == (4, 4)
    assert np.argwhere(~np.isnan(drawn[0])).tolist() == [[0, 1]]
    assert drawn[0][0, 1] == 3


def test_a_table_has_at_most_ten_million_states():
    for states, fits in (10**7, True), (10**7 + 1, False):

        class Large(gym.Env):
            observation_space, action_space = gym.spaces.Discrete(states), gym.spaces.Discrete(10)

            def __init__(self, render_mode=None):
                pass

        gym.register("TableLarge-v0", Large, disable_env_checker=True, max_episode_steps=9)
        if fits:
            make_env("TableLarge-v0")
        else:
            with pytest.raises(q_learning.UsageError, match="too many"):
                make_env("TableLarge-v0")
        del gym.registry["TableLarge-v0"]


def test_evaluate_repeats_the_last_evaluation(cli):
    log, _ = train(env_id="FrozenLake-v1", total_timesteps=3000, eval_episodes=7)
    code, out, _ = cli("q_learning", "--run-dir", "run", "--evaluate")
    assert code == 0
    for name in "episodic_return", "exact_return", "optimal_return":
        assert f"eval/{name} {log[-1][f'eval/{name}']:.4g}" in out
    assert "7 episodes" in out


@pytest.mark.parametrize("env_id", ["FrozenLake8x8-v1", "Taxi-v4"])
def test_a_trained_table_is_not_evaluated_where_there_are_other_states_or_actions(env_id, cli):
    train(env_id="FrozenLake-v1", total_timesteps=300)
    code, _, err = cli("q_learning", "--run-dir", "run", "--evaluate", "--env-id", env_id)
    assert code == 2
    assert "--env-id" in err


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
