"""cql.py: the integral by quadrature, the penalty by hand, SAC and DQN without it, and exact tables below it."""

import copy
import math
from contextlib import closing

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from algorithms import cql, dqn, sac

SHIPPED = ROOT / "benchmark" / "offline" / "frozenlake" / "data.npz"
BOX = gym.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 1], np.float32))
LINE = gym.spaces.Box(-1, 1, (1,))
DISCRETE = gym.spaces.Discrete(3)
each_kind = pytest.mark.parametrize("space", [DISCRETE, BOX], ids=["discrete", "box"])


def make_agent(space, obs_dim=4, seed=0):
    torch.manual_seed(seed)
    return cql.make_agent(cql.Args(), (obs_dim,), space)


def make_optimizers(agent, rate=1e-2, kind=torch.optim.Adam):
    parts = {"critic_optimizer": agent.critics.parameters()}
    if not agent.discrete:
        parts |= {"actor_optimizer": agent.actor.parameters(), "alpha_optimizer": [agent.log_alpha]}
    return {name: kind(part, rate) for name, part in parts.items()}


def random_batch(space, size=32, obs_dim=4, seed=1):
    rng = np.random.default_rng(seed)
    actions = rng.integers(3, size=size) if space is DISCRETE else rng.uniform(-1, 1, (size, 2)).astype(np.float32)
    ends = rng.integers(2, size=(2, size)).astype(np.float32)
    batch = {
        "observations": rng.normal(size=(size, obs_dim)).astype(np.float32), "actions": actions,
        "rewards": rng.normal(size=size).astype(np.float32), "terminations": ends[0], "truncations": ends[1],
        "next_observations": rng.normal(size=(size, obs_dim)).astype(np.float32),
    }  # fmt: skip
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def parameters(*modules):
    return [p.detach().clone() for module in modules for p in module.parameters()]


@pytest.fixture
def tables(monkeypatch):
    """One-hot states: a critic is a table of a number for each state and action, all 0 at first."""

    def table(in_dim, out_dim):
        layer = nn.Linear(in_dim, out_dim, bias=False)
        nn.init.zeros_(layer.weight)
        return layer

    monkeypatch.setattr(cql, "network", table)


# ---- The integral


def test_the_integral_equals_quadrature(monkeypatch):
    """With the actions of each of the three densities alone, and with all of them, as in a gradient step."""
    monkeypatch.setattr(cql, "network", lambda i, o: nn.Sequential(nn.Linear(i, 16), nn.Tanh(), nn.Linear(16, o)))
    agent, num = make_agent(LINE, obs_dim=3), 50_000
    for critic in agent.critics:  # so that the values of actions differ
        critic[-1].weight.data *= 5
    obs, next_obs = torch.randn(2, 2, 3)
    grid = torch.linspace(-1, 1, 2001)
    with torch.no_grad():
        curve = cql.q_values(agent.critics, obs.expand(2001, 2, 3), grid[:, None, None].expand(2001, 2, 1))
        exact = torch.trapezoid(curve.exp(), grid, dim=1).log()  # (n, B)
        actions, log_density = cql.sample_actions(agent, obs, next_obs, num)
        q = cql.q_values(agent.critics, obs.expand(3 * num, 2, 3), actions)
    assert (curve.amax(1) - curve.amin(1)).min() > 0.1, "the values of actions differ"
    for part in slice(0, num), slice(num, 2 * num), slice(2 * num, 3 * num), slice(None):
        torch.testing.assert_close(cql.log_integral(q[:, part], log_density[part]), exact, atol=0.03, rtol=0)


def test_the_integral_of_a_constant_is_the_volume():
    for dim in 1, 2, 5:
        space = gym.spaces.Box(-1, 1, (dim,))
        agent, obs = make_agent(space), torch.randn(6, 4)
        _, log_density = cql.sample_actions(agent, obs, obs, 10)
        q = torch.full((2, 10, 6), 1.5)
        expected = torch.full((2, 6), 1.5 + dim * math.log(2))
        torch.testing.assert_close(cql.log_integral(q, log_density[-10:]), expected)
    with pytest.raises(AssertionError):
        cql.log_integral(q, log_density[:, :1])


def test_the_densities_are_those_of_both_states():
    agent, (obs, next_obs) = make_agent(BOX), torch.randn(2, 5, 4)
    actions, log_density = cql.sample_actions(agent, obs, next_obs, 7)
    assert actions.shape == (21, 5, 2)
    for states, part in ((obs, slice(0, 7)), (next_obs, slice(7, 14))):
        mean, log_std = agent.actor(states).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.exp())
        squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
        expected = squashed.log_prob(actions[part]).sum(-1)
        torch.testing.assert_close(log_density[part], expected, atol=1e-3, rtol=1e-3)
    assert (log_density[14:] == -2 * math.log(2)).all()
    assert actions[14:].abs().max() <= 1


# ---- A gradient step


def test_without_the_penalty_it_is_sac_to_the_bit(monkeypatch):
    agent, args = make_agent(BOX), cql.Args(cql_alpha=0.0, tau=0.005)
    other = sac.SAC(sac.Args(), (4,), BOX)
    other.load_state_dict(agent.state_dict())
    sample = cql.sample_actions

    def aside(*args):  # the penalty's draws, from which no others follow
        with torch.random.fork_rng():
            return sample(*args)

    monkeypatch.setattr(cql, "sample_actions", aside)
    optimizers, others = make_optimizers(agent), make_optimizers(agent)
    others = {name: torch.optim.Adam(part, 1e-2) for name, part in {
        "critic_optimizer": other.critics.parameters(), "actor_optimizer": other.actor.parameters(),
        "alpha_optimizer": [other.log_alpha]}.items()}  # fmt: skip
    for seed in range(10):
        batch = random_batch(BOX, seed=seed)
        torch.manual_seed(seed)
        cql.update(agent, optimizers, batch, args)
        torch.manual_seed(seed)
        names = "observations", "actions", "rewards", "terminations", "next_observations"
        sac.update(other, others, [batch[name] for name in names], sac.Args())
    assert all(torch.equal(a, b) for a, b in zip(agent.parameters(), other.parameters(), strict=True))
    cql.update(agent, optimizers, batch, cql.Args(cql_alpha=1.0))
    sac.update(other, others, [batch[name] for name in names], sac.Args())
    assert not torch.equal(agent.critics[0][0].weight, other.critics[0][0].weight)


def test_without_the_penalty_it_is_double_dqn():
    agent, args = make_agent(DISCRETE), cql.Args(cql_alpha=0.0)
    q_network, target = copy.deepcopy(agent.critics[0]), copy.deepcopy(agent.target_critics[0])
    optimizers, optimizer = make_optimizers(agent), torch.optim.Adam(q_network.parameters(), 1e-2)
    for seed in range(10):
        batch = random_batch(DISCRETE, seed=seed)
        cql.update(agent, optimizers, batch, args)
        names = "observations", "actions", "rewards", "terminations", "next_observations"
        rows = [batch[name].bool() if name == "terminations" else batch[name] for name in names]
        dqn.update(q_network, target, optimizer, rows, dqn.Args())
        cql.soft_update(target, q_network, args.tau)
    torch.testing.assert_close(parameters(agent.critics), parameters(q_network))
    torch.testing.assert_close(parameters(agent.target_critics), parameters(target))


def test_the_penalty_of_a_table_by_hand(tables):
    """Its gradient is the softmax of Q less the actions of the data: in each state they sum to 0."""
    agent = make_agent(DISCRETE, obs_dim=2)
    table = np.array([[1.0, 2.0, 0.0], [0.5, 0.0, -1.0]])
    agent.critics[0].weight.data = torch.tensor(table.T, dtype=torch.float32)
    states, actions = [0, 0, 0, 1], [0, 0, 2, 1]
    batch = {
        "observations": torch.eye(2)[states], "actions": torch.tensor(actions), "rewards": torch.ones(4),
        "terminations": torch.ones(4), "truncations": torch.zeros(4), "next_observations": torch.eye(2)[states],
    }  # fmt: skip
    expected, penalty = np.zeros((2, 3)), 0.0
    for s, a in zip(states, actions, strict=True):
        expected[s, a] += 2 * (table[s, a] - 1) / 4
        expected[s] += 0.7 * np.exp(table[s]) / np.exp(table[s]).sum() / 4
        expected[s, a] -= 0.7 / 4
        penalty += (math.log(np.exp(table[s]).sum()) - table[s, a]) / 4
    metrics = cql.update(agent, make_optimizers(agent), batch, cql.Args(cql_alpha=0.7))
    np.testing.assert_allclose(agent.critics[0].weight.grad.T, expected, rtol=1e-5, atol=1e-7)
    assert metrics["losses/penalty"].item() == pytest.approx(penalty)


def test_each_critic_gets_the_penalty_and_nothing_else_does(monkeypatch):
    agent, batch = make_agent(BOX), random_batch(BOX)
    obs, actions, next_obs = batch["observations"], batch["actions"], batch["next_observations"]
    fixed = cql.sample_actions(agent, obs, next_obs, 3)
    fixed = [part.detach() for part in fixed]
    monkeypatch.setattr(cql, "sample_actions", lambda *given: {3: fixed}[given[-1]])  # 3: --num-samples
    hand = copy.deepcopy(agent)
    torch.manual_seed(3)
    cql.update(agent, make_optimizers(agent), batch, cql.Args(cql_alpha=2.0, num_samples=3))

    torch.manual_seed(3)
    with torch.no_grad():
        next_actions, log_prob = hand.sample(next_obs)
        next_q = torch.minimum(*cql.q_values(hand.target_critics, next_obs, next_actions)) - 0.2 * log_prob
        y = batch["rewards"] + 0.99 * torch.where(batch["terminations"] == 1, 0.0, next_q)
    for critic, learned in zip(hand.critics, agent.critics, strict=True):
        q = critic(torch.cat([obs, actions], -1))[:, 0]
        terms = [critic(torch.cat([obs, a], -1))[:, 0].exp() / d.exp() for a, d in zip(*fixed, strict=True)]
        loss = (q - y).square().mean() + 2 * ((sum(terms) / 9).log() - q).mean()
        gradients = torch.autograd.grad(loss, [*critic.parameters()])
        torch.testing.assert_close([p.grad for p in learned.parameters()], [*gradients])
    assert all(p.grad is None for p in agent.target_critics.parameters())


def test_the_penalty_moves_no_policy():
    agent, batch = make_agent(BOX), random_batch(BOX)
    _, log_z, next_values = cql.box_values(agent, *(batch[name] for name in cql.ARRAYS[:2]), batch["observations"], 4)
    log_z.sum().backward()
    assert all(p.grad is None for p in [*agent.actor.parameters(), agent.log_alpha])
    assert all(p.grad is not None for p in agent.critics.parameters())
    assert not next_values.requires_grad


def after_a_step(space, **changes):
    agent, batch = make_agent(space), random_batch(space)
    cql.update(agent, make_optimizers(agent), batch | changes, cql.Args())
    return parameters(agent)


@each_kind
def test_terminations_mask_the_bootstrap_and_truncations_do_not(space):
    plain = after_a_step(space)
    for name, changes in ("truncations", False), ("terminations", True):
        flipped = 1 - random_batch(space)[name]
        other = after_a_step(space, **{name: flipped})
        assert any(not torch.equal(a, b) for a, b in zip(plain, other, strict=True)) == changes, name


def test_targets_by_hand():
    rewards, terminated = torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, 0.0]])
    values = torch.tensor([[4.0, 8.0, 0.0], [5.0, 1.0, -2.0]])
    assert cql.td_target(rewards, terminated, values, 0.5).tolist() == [3.0, 2.0, -0.5]
    with pytest.raises(AssertionError):
        cql.td_target(rewards[:, None], terminated, values, 0.5)


def test_actions_are_those_of_the_environment():
    agent = make_agent(gym.spaces.Discrete(3, start=5))
    obs = np.random.default_rng(0).normal(size=(6, 4))
    assert agent.act(obs).tolist() == (5 + agent.critics[0](torch.tensor(obs).float()).argmax(-1)).tolist()
    assert agent.act(obs[0]) == agent.act(obs)[0]
    agent = make_agent(BOX)
    mean = agent.actor(torch.tensor(obs).float())[:, :2].tanh().detach().numpy()
    np.testing.assert_allclose(agent.act(obs), np.array([0, 0.5]) + mean * np.array([2, 0.5]), rtol=1e-5)


# ---- What it learns


def test_a_table_reaches_its_fixed_point(tables):
    """Where the gradient of [4] is 0: Q(s, a) = y(s, a) - c / 2 (softmax(a) / share of a in the data - 1)."""
    states, actions = [0] * 6 + [1] * 4, [0, 0, 0, 1, 1, 2, 0, 1, 1, 2]
    rewards, next_states = [1.0, 0, 0, 2, 1, 3, 0, 1, 4, 2], [1, 1, 0, 0, 1, 1, 0, 0, 1, 0]
    ended = [0, 0, 0, 1, 0, 0, 0, 1, 0, 1]
    batch = {
        "observations": torch.eye(2)[states], "actions": torch.tensor(actions), "rewards": torch.tensor(rewards),
        "terminations": torch.tensor(ended).float(), "truncations": torch.zeros(10),
        "next_observations": torch.eye(2)[next_states],
    }  # fmt: skip
    agent = make_agent(DISCRETE, obs_dim=2)
    optimizers = make_optimizers(agent, 0.3, torch.optim.SGD)
    for _ in range(1500):
        cql.update(agent, optimizers, batch, cql.Args(cql_alpha=0.8, gamma=0.9, tau=1.0))

    q = np.zeros((2, 3))
    for _ in range(5000):
        y, count = np.zeros((2, 3)), np.zeros((2, 3))
        for s, a, r, end, s2 in zip(states, actions, rewards, ended, next_states, strict=True):
            y[s, a] += r + 0.9 * (1 - end) * q[s2].max()
            count[s, a] += 1
        share = count / count.sum(1, keepdims=True)
        softmax = np.exp(q) / np.exp(q).sum(1, keepdims=True)
        q += 0.1 * (y / count - 0.4 * (softmax / share - 1) - q)
    np.testing.assert_allclose(agent.critics[0].weight.detach().T, q, atol=1e-3)


def read_logs(num_rows):
    args = cql.Args()
    with closing(cql.make_env(args)) as env:
        data = cql.read_dataset(args, env)
    data["rewards"] *= args.reward_scale
    return {name: array[:num_rows] for name, array in data.items()}


def exact_values(policy, gamma):
    """Of a deterministic policy, (16,), in FrozenLake without a time limit: a linear system from its own table."""
    with closing(gym.make("FrozenLake-v1")) as env:
        table = env.unwrapped.P
    lead, pay = np.zeros((16, 16)), np.zeros(16)
    for s in table:
        for p, s2, r, end in table[s][int(policy[s])]:
            pay[s] += p * r
            lead[s, s2] += p * (not end)
    return np.linalg.solve(np.eye(16) - gamma * lead, pay)


def learned_and_exact(agent, data, args):
    """The mean over the data's states of Q(s, pi(s)), and of the true value of pi: in rewards of the environment."""
    states = data["observations"].argmax(-1).numpy()
    q = agent.critics[0](torch.eye(16)).detach().numpy() / args.reward_scale
    return q.max(1)[states].mean(), exact_values(q.argmax(1), args.gamma)[states].mean()


def test_values_lie_below_the_exact_ones_of_the_policy_and_without_the_penalty_above(tables):
    """10,000 transitions: half of the logs. The maximum finds the luckiest actions of few."""
    data, found = read_logs(10_000), {}
    for cql_alpha in 0.0, 1.0:
        args = cql.Args(cql_alpha=cql_alpha, tau=0.3)
        agent = make_agent(gym.spaces.Discrete(4), obs_dim=16)
        optimizers = make_optimizers(agent)
        for step in range(800):
            rows = torch.randint(10_000, (512,))
            optimizers["critic_optimizer"].param_groups[0]["lr"] = 1.0 * (1 - step / 800)
            cql.update(agent, optimizers, {name: array[rows] for name, array in data.items()}, args)
        found[cql_alpha] = learned_and_exact(agent, data, args)
    assert found[1.0][0] < found[1.0][1] - 0.05, found  # 0.325 and 0.431 at the fixed point
    assert found[0.0][0] > found[0.0][1] + 0.03, found  # 0.498 and 0.431


def test_a_policy_of_numbers_stays_where_the_data_are(monkeypatch):
    """Rewards grow up to the last action of the data, 0, and nobody has tried the cliff behind it."""
    monkeypatch.setattr(cql, "network", lambda i, o: nn.Sequential(nn.Linear(i, 32), nn.Tanh(), nn.Linear(32, o)))
    found = {}
    for cql_alpha in 0.0, 1.0:
        agent = make_agent(LINE, obs_dim=1)
        optimizers = make_optimizers(agent, 5e-3)
        for _ in range(300):
            actions = torch.rand(64, 1) - 1
            batch = {name: torch.ones(64, 1) for name in ("observations", "next_observations")}
            batch |= {"actions": actions, "rewards": 5 * actions[:, 0], "terminations": torch.ones(64)}
            cql.update(agent, optimizers, batch, cql.Args(cql_alpha=cql_alpha, num_samples=4))
        found[cql_alpha] = agent.act(np.ones(1)).item()
    assert found[0.0] > 0.5, found
    assert -0.5 < found[1.0] < 0.3, found


# ---- Runs


@pytest.fixture
def swings(tmp_path):
    """Logs of Pendulum by a random policy."""
    rng, rows = np.random.default_rng(0), []
    with closing(gym.make("Pendulum-v1", max_episode_steps=50)) as env:
        obs, _ = env.reset(seed=0)
        for _ in range(200):
            action = rng.uniform(-2, 2, 1).astype(np.float32)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            rows.append((obs, action, reward, terminated, truncated, next_obs))
            obs = env.reset()[0] if truncated else next_obs
    path = tmp_path / "swings.npz"
    np.savez(path, **{name: np.array(values) for name, values in zip(cql.ARRAYS, zip(*rows, strict=True), strict=True)})
    return path


def test_a_run_with_a_box_repeats_and_goes_on_to_the_bit(swings, cli):
    flags = ["--env-id", "Pendulum-v1", "--dataset", swings, "--batch-size", 8, "--eval-episodes", 1,
             "--eval-max-steps", 5, "--num-samples", 2, "--no-anneal-lr"]  # fmt: skip
    for name, seed, steps in (("a", 1, 40), ("b", 1, 40), ("c", 2, 40), ("d", 1, 20)):
        code, _, err = cli("cql", *flags, "--seed", seed, "--total-timesteps", steps, "--run-dir", name)
        assert code == 0, err
    assert cli("cql", "--run-dir", "d", "--resume", "--total-timesteps", 40)[0] == 0
    a, b, c, d = (parameters(cql.load(name)) for name in "abcd")
    for other, same in (b, True), (c, False), (d, True):
        assert all(torch.equal(x, y) for x, y in zip(a, other, strict=True)) == same


@pytest.mark.slow
def test_the_policy_is_nearly_the_best(monkeypatch):
    """0.740 is the optimum of the game, and also the best that these logs can teach: see test_iql.py."""
    monkeypatch.setattr(cql, "network", lambda i, o: nn.Sequential(nn.Linear(i, 64), nn.ReLU(), nn.Linear(64, o)))
    args = cql.Args(run_dir="run", learning_rate=3e-3, total_timesteps=8000, eval_frequency=8000)
    cql.train(args)
    agent, data = cql.load("run"), read_logs(20_000)
    learned, exact = learned_and_exact(agent, data, args)
    assert learned < exact - 0.05
    with closing(gym.make("FrozenLake-v1")) as env:
        table, policy, v = env.unwrapped.P, agent.act(np.eye(16)), np.zeros(16)
    for _ in range(100):
        v = np.array([sum(p * (r + v[s2] * (not end)) for p, s2, r, end in table[s][int(policy[s])]) for s in table])
    assert v[0] >= 0.97 * 0.74016
