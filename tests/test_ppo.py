"""ppo.py against oracles written from the papers, hand-made trajectories, and environments with known answers."""

import copy
import random
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import rows, timeless

from algorithms import ppo

TINY = {"num_steps": 16, "num_minibatches": 2, "update_epochs": 2, "eval_episodes": 1, "device": "cpu"}


MADE, RECEIVED, SEEDS, ECHOED = [], [], [], []  # by the environments below: themselves, actions, seeds, actions


class Counter(gym.Env):
    """Observes step + 100 * episode; its n-th episode lasts LENGTHS[n % 3] steps and ends as ENDS[n % 3] says."""

    LENGTHS, ENDS = (3, 2, 4), ("terminated", "truncated", "truncated")
    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        self.episode, self.t, self.steps = -1, 0, 0
        MADE.append(self)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return np.array([100.0 * self.episode], np.float32), {}

    def step(self, action):
        self.t, self.steps = self.t + 1, self.steps + 1
        over = self.t == self.LENGTHS[self.episode % 3]
        end = self.ENDS[self.episode % 3]
        obs = np.array([self.t + 100.0 * self.episode], np.float32)
        return obs, float(self.t), over and end == "terminated", over and end == "truncated", {}


class Bandit(gym.Env):
    """One step; arm a of three pays a."""

    observation_space = gym.spaces.Box(0, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(3)

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), float(action), True, False, {}


class Chain(gym.Env):
    """Four states in a row, one-hot; whatever the action, the next one follows, and leaving the last one pays 1."""

    observation_space = gym.spaces.Discrete(4)
    action_space = gym.spaces.MultiDiscrete([2, 3])

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = 0
        return self.state, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.state += 1
        return min(self.state, 3), float(self.state == 4), self.state == 4, False, {}


class Target(gym.Env):
    """One step in an asymmetric box: the closer to the point, the better."""

    POINT = np.array([[2.0], [-4.0]])
    observation_space = gym.spaces.Dict(a=gym.spaces.Discrete(2), b=gym.spaces.Tuple([gym.spaces.Box(0, 1, (2, 2))]))
    action_space = gym.spaces.Box(np.array([[-1.0], [-5.0]]), np.array([[3.0], [0.0]]), dtype=np.float32)

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {"a": 0, "b": (np.zeros((2, 2), np.float32),)}, {}

    def step(self, action):
        RECEIVED.append(action)
        return (
            {"a": 0, "b": (np.zeros((2, 2), np.float32),)},
            -float(((action - self.POINT) ** 2).sum()),
            True,
            False,
            {},
        )


class Seeded(gym.Env):
    """Ends by truncation after three steps, which pay 1, 2 and 3; notes the seeds that it is given."""

    observation_space = gym.spaces.Box(-9, 9, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            SEEDS.append(seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(1, np.float32), float(self.t), False, self.t == 3, {}


class Echo(Seeded):
    """The same, and notes its actions."""

    def step(self, action):
        ECHOED.append(int(action))
        return super().step(action)


for env in Counter, Bandit, Chain, Target, Seeded, Echo:
    gym.register(f"{env.__name__}-v0", env, disable_env_checker=True)


def weights(run_dir):
    return torch.load(run_dir / "model.pt", weights_only=True)["model"]


def random_batch(steps=40, envs=3, seed=0):
    rng = np.random.default_rng(seed)
    rewards, values, next_values = rng.normal(size=(3, steps, envs))
    terminated, truncated = rng.random((2, steps, envs)) < 0.15
    return rewards, values, next_values, terminated, truncated


def advantages_by_definition(rewards, values, next_values, terminated, truncated, gamma, lam):
    """The sum of (gamma lambda)^l delta_t+l up to the end of the episode, term by term."""
    result = np.zeros_like(rewards)
    for t, i in np.ndindex(*rewards.shape):
        for k in range(t, len(rewards)):
            future = 0.0 if terminated[k, i] else gamma * next_values[k, i]
            result[t, i] += (gamma * lam) ** (k - t) * (rewards[k, i] + future - values[k, i])
            if terminated[k, i] or truncated[k, i]:
                break
    return result


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (0.9, 0.0), (0.97, 1.0), (1.0, 0.5)])
def test_gae_is_the_sum_that_defines_it(gamma, lam):
    batch = random_batch()
    np.testing.assert_allclose(ppo.gae(*batch, gamma, lam), advantages_by_definition(*batch, gamma, lam), atol=1e-12)


def test_gae_with_lambda_1_is_monte_carlo_and_with_lambda_0_is_td():
    rewards, values, next_values, terminated, truncated = random_batch()
    returns = ppo.gae(rewards, values, next_values, terminated, truncated, 0.9, 1.0) + values
    deltas = rewards + 0.9 * next_values * ~terminated - values
    np.testing.assert_allclose(ppo.gae(rewards, values, next_values, terminated, truncated, 0.9, 0.0), deltas)
    # Monte Carlo needs consistent values inside an episode: next_values[t] = values[t + 1] unless it ends there
    ended = terminated | truncated
    next_values[:-1] = np.where(ended[:-1], next_values[:-1], values[1:])
    returns = ppo.gae(rewards, values, next_values, terminated, truncated, 0.9, 1.0) + values
    for i in range(rewards.shape[1]):
        expected = next_values[-1, i]
        for t in reversed(range(len(rewards))):
            if ended[t, i]:
                expected = next_values[t, i]
            expected = rewards[t, i] + 0.9 * expected * (not terminated[t, i])
            assert returns[t, i] == pytest.approx(expected)


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_an_end_inside_a_batch_separates_it_into_its_episodes(end):
    rewards, values, next_values, *_ = random_batch(steps=10, envs=2)
    terminated, truncated = np.zeros((2, 10, 2), dtype=bool)
    {"terminated": terminated, "truncated": truncated}[end][3, 0] = True  # only environment 0, after step 3
    batch = (rewards, values, next_values, terminated, truncated)
    whole = ppo.gae(*batch, 0.9, 0.8)
    parts = [ppo.gae(*(x[rows, :1] for x in batch), 0.9, 0.8) for rows in (slice(0, 4), slice(4, 10))]
    np.testing.assert_allclose(whole[:, :1], np.concatenate(parts))
    np.testing.assert_allclose(whole[:, 1:], ppo.gae(*(x[:, 1:] for x in batch), 0.9, 0.8))


@pytest.fixture
def recorded(monkeypatch):
    """What train hands to gae and to update, with a critic that values an observation at itself."""
    seen, make_agent, gae, update = {"gae": [], "update": []}, ppo.make_agent, ppo.gae, ppo.update

    def make(args, env):
        agent = make_agent(args, env)
        policy = agent.forward

        def forward(obs):
            seen = agent.obs_stats(obs) if agent.obs_stats else obs
            return policy(obs)[0], seen[:, 0]

        agent.forward = forward
        return agent

    monkeypatch.setattr(ppo, "make_agent", make)
    monkeypatch.setattr(ppo, "gae", lambda *batch: (seen["gae"].append(batch), gae(*batch))[1])
    monkeypatch.setattr(
        ppo, "update", lambda a, o, batch, args: (seen["update"].append(batch), update(a, o, batch, args))[1]
    )
    return seen


@pytest.mark.parametrize("num_envs", [1, 3])
def test_what_reaches_the_loss_is_what_happened(recorded, num_envs):
    ppo.train(ppo.Args(env_id="Counter-v0", total_timesteps=10 * num_envs, num_envs=num_envs, gamma=0.5, gae_lambda=0,
                       norm_reward=False, **TINY | {"num_steps": 10, "num_minibatches": 1}))  # fmt: skip
    observations, *_, advantages, returns = recorded["update"][0]
    seen =     np.repeat([0,   1,   2,       100, 101,         200, 201, 202, 203,         300], num_envs)  # fmt: skip
    led_to =   np.repeat([1,   2,   np.nan,  101, 102,         201, 202, 203, 204,         301], num_envs)  # fmt: skip
    rewards =  np.repeat([1,   2,   3,       1,   2,           1,   2,   3,   4,           1], num_envs)  # fmt: skip
    targets = np.array(rewards) + 0.5 * np.nan_to_num(led_to)
    np.testing.assert_array_equal(observations[:, 0], seen)
    np.testing.assert_allclose(returns, targets)
    np.testing.assert_allclose(advantages, targets - seen)


@pytest.fixture
def staggered(monkeypatch):
    """Environment k starts in its episode 10 k: all observations, lengths and ends differ between environments."""
    made, make_env = [], ppo.make_env

    def make(*args, **kwargs):
        env = make_env(*args, **kwargs)
        env.unwrapped.episode = 10 * (len(made) - 1) - 1  # the first one made is not stepped
        made.append(env)
        return env

    monkeypatch.setattr(ppo, "make_env", make)
    monkeypatch.setattr(ppo, "evaluate", lambda *_: {"eval/episodic_return": 0.0})


def test_rows_of_several_environments_are_not_mixed_up(recorded, staggered, tmp_path):
    ppo.train(ppo.Args(env_id="Counter-v0", total_timesteps=36, num_envs=3, gamma=0.5, gae_lambda=0, norm_reward=False,
                       run_dir=str(tmp_path / "run"), **TINY | {"num_steps": 12, "num_minibatches": 1}))  # fmt: skip
    expected, ended = np.zeros((12, 3, 2)), []
    for k in range(3):
        episode, t = 10 * k, 0
        for step in range(12):
            here, t = 100 * episode + t, t + 1
            over = t == Counter.LENGTHS[episode % 3]
            terminated = over and Counter.ENDS[episode % 3] == "terminated"
            expected[step, k] = here, t + 0.5 * (0 if terminated else 100 * episode + t)
            if over:
                ended.append((3 * (step + 1), k, t * (t + 1) / 2, t))
                episode, t = episode + 1, 0
    observations, *_, returns = recorded["update"][0]
    np.testing.assert_array_equal(observations[:, 0], expected[..., 0].flatten())
    np.testing.assert_allclose(returns, expected[..., 1].flatten())
    logged = [row for row in rows(tmp_path / "run") if "charts/episodic_return" in row]
    got = [(row["global_step"], row["charts/episodic_return"], row["charts/episodic_length"]) for row in logged]
    assert got == [(step, total, length) for step, _, total, length in sorted(ended)]


def test_each_action_is_chosen_for_its_own_observation(recorded, staggered, monkeypatch):
    """By a policy that says whether the observation is odd."""
    monkeypatch.setattr(ppo.ActorCritic, "sample", lambda agent, obs: (obs % 2).long())
    ppo.train(ppo.Args(env_id="Counter-v0", total_timesteps=32, num_envs=2, **TINY))
    observations, actions, *_ = recorded["update"][0]
    assert torch.equal(actions, (observations % 2).long())


def test_steps_a_second_are_the_steps_of_a_batch_over_its_time(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(ppo.time, "perf_counter", lambda: next(clock))
    args = ppo.Args(env_id="Seeded-v0", total_timesteps=96, num_envs=2, run_dir=str(tmp_path / "run"), **TINY)
    ppo.train(args)
    assert [row["charts/SPS"] for row in rows(tmp_path / "run") if "charts/SPS" in row] == [8, 8, 8]


def test_rewards_are_scaled_by_the_deviation_of_sums_that_restart_with_each_episode(recorded):
    ppo.train(ppo.Args(env_id="Counter-v0", total_timesteps=16, num_envs=1, gamma=0.5, checkpoint_frequency=16,
                       **TINY | {"num_steps": 8}))  # fmt: skip
    sums = [[1, 2.5, 4.25, 1, 2.5, 1, 2.5, 4.25], [6.125, 1, 2.5, 4.25, 1, 2.5, 1, 2.5]]  # episode 2 spans both batches
    plain = [[1, 2, 3, 1, 2, 1, 2, 3], [4, 1, 2, 3, 1, 2, 1, 2]]
    for batch, n in zip(recorded["gae"], (1, 2), strict=True):
        np.testing.assert_allclose(batch[0][:, 0], plain[n - 1] / np.std(np.concatenate(sums[:n])), rtol=1e-5)


def test_sums_restart_in_the_environment_whose_episode_ends_and_in_no_other(recorded, staggered):
    ppo.train(ppo.Args(env_id="Counter-v0", total_timesteps=16, num_envs=2, gamma=0.5, **TINY | {"num_steps": 8}))
    sums = [[1, 2.5, 4.25, 1, 2.5, 1, 2.5, 4.25], [1, 2.5, 1, 2.5, 4.25, 6.125, 1, 2.5]]
    plain = [[1, 2, 3, 1, 2, 1, 2, 3], [1, 2, 1, 2, 3, 4, 1, 2]]
    np.testing.assert_allclose(recorded["gae"][0][0].T, plain / np.std(sums), rtol=1e-5)


def loss_of(log_prob, old_log_prob, advantages, entropy=None, values=None, returns=None, clip=0.2, vf=0.0, ent=0.0):
    zeros = torch.zeros_like(advantages)
    entropy, values, returns = (zeros if x is None else x for x in (entropy, values, returns))
    return ppo.ppo_loss(log_prob, entropy, values, old_log_prob, advantages, returns, clip, vf, ent)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective"),
    [(1.5, 2, 2.4), (1.5, -2, -3), (0.5, 2, 1), (0.5, -2, -1.6), (1.1, 2, 2.2), (0.9, -2, -1.8)],
)
def test_clipped_objective_by_hand(ratio, advantage, objective):
    loss, parts = loss_of(torch.tensor([ratio]).log(), torch.zeros(1), torch.tensor([float(advantage)]))
    assert loss.item() == pytest.approx(-objective)
    assert parts["losses/clipfrac"].item() == (ratio in (1.5, 0.5))
    assert parts["losses/approx_kl"].item() == pytest.approx(ratio - 1 - np.log(ratio), abs=1e-6)


def test_gradient_flows_where_the_objective_is_not_clipped():
    for ratio, advantage, flows in (1.5, 2, False), (1.5, -2, True), (0.5, 2, True), (0.5, -2, False), (1.0, 2, True):
        log_prob = torch.tensor([ratio]).log().requires_grad_()
        loss_of(log_prob, torch.zeros(1), torch.tensor([float(advantage)]))[0].backward()
        assert log_prob.grad.item() == pytest.approx(-ratio * advantage if flows else 0)


def test_loss_is_its_three_terms_and_the_mean_over_its_rows():
    torch.manual_seed(0)
    log_prob, old, advantages, entropy, values, returns = torch.randn(6, 32)
    loss, parts = loss_of(log_prob, old, advantages, entropy, values, returns, vf=0.7, ent=0.3)
    expected = parts["losses/policy_loss"] + 0.7 * ((values - returns) ** 2).mean() - 0.3 * entropy.mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    columns = (log_prob, old, advantages, entropy, values, returns)
    singles = [loss_of(*(x[i : i + 1] for x in columns), vf=0.7, ent=0.3)[0].item() for i in range(32)]
    assert loss.item() == pytest.approx(np.mean(singles), rel=1e-5)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(AssertionError):
        loss_of(torch.zeros(4, 1), torch.zeros(4), torch.zeros(4))


def test_categorical_policy_against_torch_distributions():
    torch.manual_seed(0)
    policy, logits = ppo.CategoricalPolicy([2, 5], np.array([0, -3])), torch.randn(7, 7)
    actions = policy.sample(logits)
    parts = [torch.distributions.Categorical(logits=part) for part in logits.split([2, 5], -1)]
    log_prob, entropy = policy.log_prob_and_entropy(logits, actions)
    torch.testing.assert_close(log_prob, sum(part.log_prob(actions[:, k]) for k, part in enumerate(parts)))
    torch.testing.assert_close(entropy, sum(part.entropy() for part in parts))
    assert torch.equal(policy.mode(logits), torch.stack([part.probs.argmax(-1) for part in parts], -1))
    np.testing.assert_array_equal(policy.to_env(actions), actions.numpy() + np.array([0, -3]))
    many = policy.sample(logits[:1].expand(20_000, -1))
    for k, part in enumerate(parts):
        frequencies = torch.bincount(many[:, k], minlength=len(part.probs[0])) / 20_000
        torch.testing.assert_close(frequencies, part.probs[0], atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("space", "num_actions"),
    [(gym.spaces.Discrete(3, start=5), 3), (gym.spaces.MultiDiscrete([[2, 3]], start=[[1, -4]]), 6)],
)
def test_actions_are_counted_from_the_environments_own_start(space, num_actions):
    torch.manual_seed(0)
    env = types.SimpleNamespace(observation_space=gym.spaces.Box(-1, 1, (4,)), action_space=space)
    agent = ppo.make_agent(ppo.Args(), env)
    actions = agent.policy.to_env(agent.sample(torch.randn(200, 4)))
    assert all(space.contains(action) for action in actions)
    assert len(np.unique(actions, axis=0)) == num_actions


def test_gaussian_policy_against_torch_distributions():
    torch.manual_seed(0)
    policy, mean = ppo.GaussianPolicy(np.full(3, -1.0), np.full(3, 1.0), 0.0), torch.randn(7, 3)
    policy.log_std.data = torch.tensor([-1.0, 0.0, 0.5])
    actions = policy.sample(mean)
    normal = torch.distributions.Normal(mean, policy.log_std.exp())
    log_prob, entropy = policy.log_prob_and_entropy(mean, actions)
    torch.testing.assert_close(log_prob, normal.log_prob(actions).sum(-1))
    torch.testing.assert_close(entropy, normal.entropy().sum(-1))
    many = policy.sample(mean[:1].expand(50_000, -1))
    torch.testing.assert_close(many.mean(0), mean[0], atol=0.03, rtol=0)
    torch.testing.assert_close(many.std(0), policy.log_std.exp(), atol=0.03, rtol=0)
    assert torch.equal(policy.mode(mean), mean)


def test_box_bounds_are_mapped_to_plus_minus_one_and_respected():
    low, high = np.array([-1.0, 0.0, -5.0, -np.inf]), np.array([3.0, 10.0, 0.0, np.inf])
    policy = ppo.GaussianPolicy(low, high, 0.0)
    for value, expected in (0, (1, 5, -2.5, 0)), (1, (3, 10, 0, 1)), (-1, (-1, 0, -5, -1)), (9, (3, 10, 0, 9)):
        np.testing.assert_allclose(policy.to_env(torch.full((1, 4), float(value)))[0], expected)
    half = ppo.GaussianPolicy(np.array([0.0, -np.inf]), np.array([np.inf, 2.0]), 0.0)  # not mapped, but respected
    for value, expected in (0.5, (0.5, 0.5)), (9, (9, 2)), (-9, (0, -9)):
        np.testing.assert_allclose(half.to_env(torch.full((1, 2), float(value)))[0], expected)
    # the density of the unclipped sample integrates to one
    grid = torch.linspace(-8, 8, 2001).unsqueeze(-1)
    one = ppo.GaussianPolicy(low[:1], high[:1], 0.0)
    log_prob, _ = one.log_prob_and_entropy(torch.zeros_like(grid), grid)
    assert torch.trapezoid(log_prob.exp(), grid[:, 0]).item() == pytest.approx(1, abs=1e-5)


def test_actor_and_critic_in_one_product_are_two_networks():
    torch.manual_seed(0)
    two, obs = ppo.TwoMLPs(5), torch.randn(7, 5)
    torch.nn.init.normal_(two.bias1)
    torch.nn.init.normal_(two.bias2)
    for k, hidden in enumerate(two(obs)):
        expected = ((obs @ two.weight1[k] + two.bias1[k]).tanh() @ two.weight2[k] + two.bias2[k]).tanh()
        torch.testing.assert_close(hidden, expected)
    two(obs)[0].sum().backward()
    for parameter in two.parameters():
        assert parameter.grad[0].abs().sum() > 0
        assert parameter.grad[1].abs().sum() == 0, "what the actor learns leaves the critic alone"
    gram = two.weight2[1].T @ two.weight2[1]
    torch.testing.assert_close(gram, 2 * torch.eye(64), atol=1e-4, rtol=0)
    assert not torch.equal(two.weight1[0], two.weight1[1])


def test_running_statistics_equal_those_of_all_rows_at_once():
    torch.manual_seed(0)
    data = torch.randn(1000, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, 100.0, -3.0])
    stats = ppo.RunningMeanStd(3)
    for rows_ in data.split([1, 9, 490, 500]):
        stats.update(rows_)
    torch.testing.assert_close(stats.mean, data.mean(0))
    torch.testing.assert_close(stats.var, data.var(0, correction=0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stats(data).std(0, correction=0), torch.ones(3), rtol=1e-3, atol=1e-3)


def test_normaliser_is_saved_shared_by_all_environments_and_moves_only_after_the_epochs(
    recorded, tmp_path, monkeypatch
):
    moves, update = [], ppo.RunningMeanStd.update
    monkeypatch.setattr(ppo.RunningMeanStd, "update", lambda self, data: (moves.append(data), update(self, data)))
    args = ppo.Args(env_id="Counter-v0", total_timesteps=64, num_envs=2, norm_obs=True, norm_reward=False,
                    checkpoint_frequency=64, run_dir=str(tmp_path / "run"), **TINY)  # fmt: skip
    ppo.train(args)
    assert [len(data) for data in moves] == [32, 32], "once a batch, with the rows of both environments"
    saved = weights(tmp_path / "run")
    np.testing.assert_allclose(saved["obs_stats.mean"], torch.cat(moves).mean(0), rtol=1e-5)
    assert saved["obs_stats.count"] == 64
    # final observations pass through it like all others: the value of 102 is its normalised self, in the second batch
    _, _, next_values, _, truncated = recorded["gae"][1][:5]
    ends = next_values[truncated] * moves[0].std(correction=0).item() + moves[0].mean().item()
    assert sorted(ends) == pytest.approx([504, 504, 702, 702, 804, 804, 1002, 1002], abs=0.01)


def test_first_minibatch_compares_the_policy_with_itself(monkeypatch):
    seen, ppo_loss = [], ppo.ppo_loss

    def spy(*args):
        loss, parts = ppo_loss(*args)
        seen.append((args, parts))
        return loss, parts

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    for env_id in "CartPole-v1", "Target-v0":
        seen.clear()
        ppo.train(ppo.Args(env_id=env_id, total_timesteps=32, num_envs=2, norm_obs=True, **TINY))
        (log_prob, _, _, old_log_prob, *_), parts = seen[0]
        torch.testing.assert_close(log_prob, old_log_prob, atol=1e-5, rtol=0)
        assert parts["losses/clipfrac"] == 0
        assert parts["losses/approx_kl"].abs() < 1e-6
        assert any(not torch.allclose(args[0], args[3], atol=1e-6) for args, _ in seen[1:]), "later ones do not"


def test_every_transition_once_an_epoch_and_a_rest_smaller_than_a_minibatch(monkeypatch):
    batches, advantages, ppo_loss = [], [], ppo.ppo_loss

    def spy(*args):
        batches.append(args[5])
        advantages.append(args[4])
        return ppo_loss(*args)

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    args = ppo.Args(env_id="CartPole-v1", num_envs=2, **TINY)
    agent = ppo.make_agent(args, ppo.make_env(args.env_id))
    optimizer = torch.optim.Adam(agent.parameters())
    size = 33  # the minibatches of 16 leave one row
    returns = torch.arange(size).float()
    batch = (
        torch.randn(size, 4),
        torch.zeros(size, 1, dtype=torch.long),
        torch.zeros(size),
        torch.randn(size),
        returns,
    )
    metrics = ppo.update(agent, optimizer, batch, args)
    assert [len(b) for b in batches] == [16, 16, 1] * 2
    for epoch in batches[:3], batches[3:]:
        assert torch.equal(torch.cat(epoch).sort().values, returns)
    assert not torch.equal(torch.cat(batches[:3]), torch.cat(batches[3:])), "another order in each epoch"
    assert all(np.isfinite(value) for value in metrics.values())
    for normalised in advantages[:2]:
        assert normalised.mean().item() == pytest.approx(0, abs=1e-6)
        assert normalised.std(correction=0).item() == pytest.approx(1, rel=1e-4)
    assert advantages[2].item() == 0, "a single advantage is its mean"


def test_target_kl_ends_the_epochs_after_one_whose_last_minibatch_exceeds_it(monkeypatch):
    kls, ppo_loss = [], ppo.ppo_loss

    def spy(*args):
        loss, parts = ppo_loss(*args)
        kls.append(parts["losses/approx_kl"].item())
        return loss, parts

    def kls_with(target_kl):
        kls.clear()
        ppo.train(ppo.Args(env_id="CartPole-v1", total_timesteps=32, num_envs=2, learning_rate=0.01,
                           target_kl=target_kl, **TINY | {"update_epochs": 10}))  # fmt: skip
        return list(kls)

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    whole = kls_with(None)
    assert len(whole) == 2 * 10
    last = whole[1]  # of the first epoch
    assert len(kls_with(0.99 * last)) == 2
    assert len(kls_with(1.01 * last)) > 2
    assert kls_with(1e9) == whole


@pytest.mark.parametrize("num_envs", [1, 2, 3])
def test_steps_are_transitions_and_each_episode_is_logged_once(num_envs, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "evaluate", lambda *_, **__: {"eval/episodic_return": 0.0, "eval/return_std": 0.0})
    updates, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: (updates.append(1), clip(*args))[1])
    MADE.clear()
    total = 27 * num_envs  # a batch of 16 steps, and one of 11
    ppo.train(ppo.Args(env_id="Counter-v0", total_timesteps=total, num_envs=num_envs, checkpoint_frequency=total,
                       run_dir=str(tmp_path / "run"), **TINY))  # fmt: skip
    assert sum(env.steps for env in MADE) == total
    episodes = [row for row in rows(tmp_path / "run") if "charts/episodic_return" in row]
    ends = [(3, 6), (5, 3), (9, 10), (12, 6), (14, 3), (18, 10), (21, 6), (23, 3), (27, 10)]  # (step, return) of one
    got = [(row["global_step"], row["charts/episodic_return"]) for row in episodes]
    assert got == [(step * num_envs, reward) for step, reward in ends for _ in range(num_envs)]
    assert [row["charts/episodic_length"] for row in episodes[::num_envs]] == [3, 2, 4] * 3
    assert len(updates) == 2 * 2 + 2 * -(-11 // 8), "two epochs; minibatches of 8 rows an environment"
    assert rows(tmp_path / "run")[-1]["global_step"] == total


def test_learning_rate_goes_down_a_line_to_zero(tmp_path):
    for anneal, expected in (True, [1.0, 0.75, 0.5, 0.25]), (False, [1.0] * 4):
        run_dir = tmp_path / str(anneal)
        ppo.train(ppo.Args(env_id="CartPole-v1", total_timesteps=128, num_envs=2, learning_rate=1.0, anneal_lr=anneal,
                           run_dir=str(run_dir), **TINY))  # fmt: skip
        rates = [row["charts/learning_rate"] for row in rows(run_dir) if "charts/learning_rate" in row]
        assert rates == pytest.approx(expected)


def test_logged_explained_variance_is_that_of_the_returns(recorded, tmp_path):
    ppo.train(ppo.Args(env_id="Counter-v0", total_timesteps=16, num_envs=1, run_dir=str(tmp_path / "run"), **TINY))
    values, returns = recorded["gae"][0][1], recorded["update"][0][4].numpy()
    row = next(row for row in rows(tmp_path / "run") if "losses/explained_variance" in row)
    expected = 1 - np.var(returns - values.flatten()) / np.var(returns)
    assert row["losses/explained_variance"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("norm_adv", [True, False])
def test_update_is_gradient_steps_on_the_loss(norm_adv):
    """One minibatch an epoch, so that the order of the rows does not matter."""
    torch.manual_seed(0)
    args = ppo.Args(env_id="CartPole-v1", num_envs=2, num_steps=16, num_minibatches=1, update_epochs=3, vf_coef=0.7,
                    ent_coef=0.03, clip_coef=0.1, max_grad_norm=0.3, norm_adv=norm_adv, device="cpu")  # fmt: skip
    agent = ppo.make_agent(args, ppo.make_env(args.env_id))
    mirror = copy.deepcopy(agent)
    obs, actions, old, advantages, returns = (
        torch.randn(32, 4),
        torch.randint(2, (32, 1)),
        -torch.rand(32),
        *torch.randn(2, 32),
    )
    metrics = ppo.update(
        agent, torch.optim.SGD(agent.parameters(), 0.1), (obs, actions, old, advantages + 1, returns), args
    )
    advantages = advantages + 1
    if norm_adv:
        advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    history = []
    for _ in range(3):
        logits, values = mirror(obs)
        categorical = torch.distributions.Categorical(logits=logits)
        ratio = (categorical.log_prob(actions[:, 0]) - old).exp()
        policy_loss = -torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.1) * advantages).mean()
        loss = policy_loss + 0.7 * ((values - returns) ** 2).mean() - 0.03 * categorical.entropy().mean()
        gradient = torch.autograd.grad(loss, [*mirror.parameters()])
        norm = torch.cat([g.flatten() for g in gradient]).norm()
        assert norm > 0.3, "else nothing would be clipped"
        with torch.no_grad():
            for parameter, g in zip(mirror.parameters(), gradient, strict=True):
                parameter -= 0.1 * g * 0.3 / norm
        history.append(policy_loss.item())
    for name, parameter in agent.named_parameters():
        torch.testing.assert_close(parameter, dict(mirror.named_parameters())[name], atol=1e-5, rtol=1e-4)
    assert metrics["losses/policy_loss"] == pytest.approx(np.mean(history), abs=1e-5)


def test_acting_and_evaluating_see_what_learning_sees():
    torch.manual_seed(0)
    agent = ppo.ActorCritic((3,), ppo.GaussianPolicy(np.full(2, -9.0), np.full(2, 9.0), 0.0), norm_obs=True)
    agent.obs_stats.update(torch.randn(100, 3) * 4 + 7)
    torch.nn.init.normal_(agent.actor.weight)
    obs = torch.randn(50, 3) * 4 + 7
    means = agent(obs)[0].detach()
    np.testing.assert_allclose(agent.act(obs.numpy()), np.clip(9 * means, -9, 9), rtol=1e-4, atol=1e-5)  # by the mean
    agent.policy.log_std.data.fill_(-20)
    torch.testing.assert_close(agent.sample(obs), means, atol=1e-5, rtol=1e-4)


def test_networks_start_orthogonal():
    torch.manual_seed(0)
    agent = ppo.ActorCritic((5,), ppo.CategoricalPolicy([4], np.zeros(())), norm_obs=False)
    hidden = [(weight, 2**0.5) for name in ("weight1", "weight2") for weight in getattr(agent.hidden, name)]
    for weight, gain in [*hidden, (agent.actor.weight, 0.01), (agent.critic.weight, 1)]:
        torch.testing.assert_close(torch.linalg.svdvals(weight), torch.full((min(weight.shape),), float(gain)))
    for bias in agent.hidden.bias1, agent.hidden.bias2, agent.actor.bias, agent.critic.bias:
        assert (bias == 0).all()
    env = gym.make("HalfCheetah-v5")
    for log_std in 0.0, -0.7:
        policy = ppo.make_agent(ppo.Args(log_std_init=log_std), env).policy
        torch.testing.assert_close(policy.log_std.data, torch.full((6,), log_std))
    obs = torch.randn(7, 5)
    of_actor, of_critic = agent.hidden(obs)
    torch.testing.assert_close(agent(obs)[0], agent.actor(of_actor))
    torch.testing.assert_close(agent(obs)[1], agent.critic(of_critic)[:, 0])


def test_nature_cnn_layer_by_layer():
    """dqn.py has the same text."""
    torch.manual_seed(0)
    cnn, images = ppo.NatureCNN(), torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8)
    *convolutions, linear = (layer for layer in cnn if hasattr(layer, "weight"))
    hidden = images / 255
    for layer, stride in zip(convolutions, (4, 2, 1), strict=True):
        hidden = torch.nn.functional.conv2d(hidden, layer.weight, layer.bias, stride).clamp(min=0)
    torch.testing.assert_close(cnn(images), (hidden.flatten(1) @ linear.weight.T + linear.bias).clamp(min=0))


def test_normalised_observations_are_clamped():
    stats = ppo.RunningMeanStd(1)
    stats.update(torch.tensor([[-1.0], [1.0]]))
    torch.testing.assert_close(
        stats(torch.tensor([[-99.0], [-9.0], [9.0], [99.0]])), torch.tensor([[-10.0], [-9], [9], [10]])
    )


def seeds_of(seed, step, num_envs=4):
    SEEDS.clear()
    ppo.make_envs(ppo.Args(env_id="Seeded-v0", seed=seed, num_envs=num_envs), step)
    return list(SEEDS)


def test_no_two_resets_share_a_seed():
    training = seeds_of(1, 0) + seeds_of(2, 0) + seeds_of(1, 1000) + seeds_of(2, 1000)
    assert seeds_of(1, 0) == training[:4], "the same seed and step, the same episodes"
    evaluation = []
    for seed in 1, 2:
        SEEDS.clear()
        args = ppo.Args(env_id="Seeded-v0", seed=seed, eval_episodes=3)
        for _ in range(2):
            result = ppo.evaluate(lambda obs: np.zeros(len(obs), int), args, "x")
        assert SEEDS[:3] == SEEDS[3:], "each evaluation plays the same episodes"
        evaluation += SEEDS[:3]
    assert len(set(training + evaluation)) == 16 + 6
    assert result == {"eval/episodic_return": 6, "eval/return_std": 0, "eval/episodic_length": 3}


def test_evaluation_averages_over_episodes_of_different_lengths(monkeypatch):
    made = iter(range(100))
    make_env = ppo.make_env

    def make(*args, **kwargs):
        env = make_env(*args, **kwargs)
        env.unwrapped.episode = next(made) - 1  # the next reset begins Counter's episode 0, 1, 2: 3, 2, 4 steps
        return env

    monkeypatch.setattr(ppo, "make_env", make)
    result = ppo.evaluate(lambda obs: np.zeros(len(obs), int), ppo.Args(env_id="Counter-v0", eval_episodes=3), "x")
    returns = np.array([6.0, 3, 10])
    assert result["eval/episodic_return"] == pytest.approx(returns.mean())
    assert result["eval/return_std"] == pytest.approx(returns.std())
    assert result["eval/episodic_length"] == 3


class Dice(Seeded):
    """Draws from Python's and NumPy's global generators, as a careless environment does."""

    def step(self, action):
        self.t += 1
        return np.array([random.random()], np.float32), np.random.random(), False, self.t == 3, {}


gym.register("Dice-v0", Dice, disable_env_checker=True)


def test_evaluation_leaves_the_global_streams_alone_and_is_not_moved_by_them():
    args, results = ppo.Args(env_id="Dice-v0", eval_episodes=3), []
    for seed in 1, 2:
        random.seed(seed)
        np.random.seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist()
        results.append(ppo.evaluate(lambda obs: (obs[:, 0] > 0.5).astype(int), args, "x"))
        assert before == (random.getstate(), np.random.get_state()[1].tolist())
    assert results[0] == results[1]


def test_evaluation_ends_when_it_is_told_to():
    asked = iter([False, False, True])
    args = ppo.Args(env_id="Seeded-v0", eval_episodes=2)
    assert ppo.evaluate(lambda obs: np.zeros(len(obs), int), args, "x", lambda: next(asked)) == {}
    assert next(asked, None) is None


def test_evaluation_of_an_environment_without_a_time_limit_ends(monkeypatch):
    monkeypatch.setattr(Seeded, "step", lambda self, action: (np.zeros(1, np.float32), 1.0, False, False, {}))
    result = ppo.evaluate(lambda obs: np.zeros(len(obs), int), ppo.Args(env_id="Seeded-v0", eval_episodes=1), "x")
    assert result["eval/episodic_length"] == 27_000


class Careless(Seeded):
    """Declares float32, and returns what RETURNS says; its last one is an array that it keeps overwriting."""

    RETURNS = "float64"

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.array = getattr(self, "array", np.zeros(1, np.float32))
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        return self.observe(), 1.0, False, self.t == 5, {}

    def observe(self):
        self.array[:] = self.t
        return {"float64": np.array([self.t], np.float64), "list": [float(self.t)], "live": self.array}[self.RETURNS]


gym.register("Careless-v0", Careless, disable_env_checker=True)


@pytest.mark.parametrize("kind", ["float64", "list", "live"])
def test_observations_are_copied_as_float32_whatever_the_environment_returns(kind, monkeypatch):
    monkeypatch.setattr(Careless, "RETURNS", kind)
    envs, obs = ppo.make_envs(ppo.Args(env_id="Careless-v0", num_envs=1), 0)
    assert obs.dtype == np.float32
    for t in range(1, 6):
        obs, _, _, truncated, infos = envs.step(np.zeros(1, int))
        assert obs[0] == t % 5
    assert truncated[0]
    assert infos["final_obs"][0] == 5
    assert infos["final_obs"][0].dtype == np.float32


def test_atari_preprocessing():
    env = ppo.make_env("ALE/Breakout-v5")
    atari = env
    while not isinstance(atari, gym.wrappers.AtariPreprocessing):
        atari = atari.env
    assert (atari.frame_skip, atari.noop_max, atari.terminal_on_life_loss, atari.unwrapped._frameskip) == (
        4,
        30,
        False,
        1,
    )
    assert env.observation_space == gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)


def test_optimizers_and_their_constants(monkeypatch):
    made, update = [], ppo.update
    monkeypatch.setattr(
        ppo, "update", lambda agent, optimizer, *rest: (made.append(optimizer), update(agent, optimizer, *rest))[1]
    )
    for name in "adam", "rmsprop":
        ppo.train(ppo.Args(env_id="Seeded-v0", total_timesteps=32, num_envs=2, optimizer=name, **TINY))
    adam, rmsprop = made
    assert (type(adam), adam.defaults["eps"], adam.defaults["betas"]) == (torch.optim.Adam, 1e-5, (0.9, 0.999))
    assert (type(rmsprop), rmsprop.defaults["eps"], rmsprop.defaults["alpha"]) == (torch.optim.RMSprop, 1e-5, 0.99)


def test_the_environments_got_the_actions_that_the_loss_sees(monkeypatch):
    seen, update = [], ppo.update
    monkeypatch.setattr(ppo, "update", lambda a, o, batch, args: (seen.append(batch), update(a, o, batch, args))[1])
    monkeypatch.setattr(ppo, "evaluate", lambda *_, **__: {"eval/episodic_return": 0.0, "eval/return_std": 0.0})
    ECHOED.clear()
    ppo.train(ppo.Args(env_id="Echo-v0", total_timesteps=48, num_envs=3, **TINY))
    assert seen[0][1].flatten().tolist() == ECHOED
    assert 0 < np.mean(ECHOED) < 1


def test_a2c_has_the_same_gradient():
    """At ratio 1 the clipped objective has the policy gradient, A grad log pi, so PPO's first step is A2C's."""
    torch.manual_seed(0)
    args = ppo.Args(env_id="CartPole-v1", optimizer="rmsprop", update_epochs=1, num_minibatches=1, norm_adv=False)
    agent = ppo.make_agent(args, ppo.make_env(args.env_id))
    obs, actions, advantages, returns = torch.randn(64, 4), torch.randint(2, (64, 1)), torch.randn(64), torch.randn(64)

    def gradient(loss_of_network):
        outputs, values = agent(obs)
        log_prob, entropy = agent.policy.log_prob_and_entropy(outputs, actions)
        return torch.autograd.grad(
            loss_of_network(log_prob, entropy, values), [*agent.actor.parameters(), *agent.critic.parameters()]
        )

    a2c = gradient(
        lambda log_prob, entropy, v: (
            -(log_prob * advantages).mean() + 0.5 * ((v - returns) ** 2).mean() - 0.01 * entropy.mean()
        )
    )
    clipped = gradient(
        lambda log_prob, entropy, v: ppo.ppo_loss(
            log_prob, entropy, v, log_prob.detach(), advantages, returns, 0.2, 0.5, 0.01
        )[0]
    )
    for ours, theirs in zip(clipped, a2c, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_atari_learns_from_the_sign_and_logs_the_score(monkeypatch, tmp_path):
    seen, gae = [], ppo.gae
    monkeypatch.setattr(ppo, "gae", lambda rewards, *rest: (seen.append(rewards), gae(rewards, *rest))[1])
    monkeypatch.setattr(ppo, "evaluate", lambda *_, **__: {"eval/episodic_return": 0.0, "eval/return_std": 0.0})
    ppo.train(ppo.Args(env_id="ALE/SpaceInvaders-v5", total_timesteps=512, num_envs=2, run_dir=str(tmp_path / "run"),
                       **TINY | {"num_steps": 256, "update_epochs": 1}))  # fmt: skip
    assert set(np.unique(seen)) == {0, 1}
    assert weights(tmp_path / "run")["hidden.0.weight"].shape == (32, 4, 8, 8)


def test_learns_a_bandit():
    args = ppo.Args(
        env_id="Bandit-v0", total_timesteps=4096, num_envs=4, eval_episodes=1, num_steps=64, num_minibatches=4
    )
    ppo.train(args)
    last = rows(ppo.Path(args.run_dir))[-1]
    assert last["eval/episodic_return"] == 2


def test_learns_the_values_of_a_chain():
    args = ppo.Args(env_id="Chain-v0", total_timesteps=16_384, gamma=0.9, gae_lambda=0.5, norm_reward=False,
                    eval_episodes=1, num_steps=64, num_minibatches=8, learning_rate=3e-3)  # fmt: skip
    ppo.train(args)
    agent = ppo.make_agent(args, ppo.make_env("Chain-v0"))
    agent.load_state_dict(weights(ppo.Path(args.run_dir)))
    values = agent(torch.eye(4))[1].tolist()
    assert values == pytest.approx([0.9**3, 0.9**2, 0.9, 1], abs=0.02)


def test_learns_a_point_in_an_asymmetric_box_and_sends_nothing_outside_of_it():
    RECEIVED.clear()
    args = ppo.Args(
        env_id="Target-v0", total_timesteps=16_384, eval_episodes=1, num_steps=64, num_minibatches=8, learning_rate=3e-3
    )
    ppo.train(args)
    assert rows(ppo.Path(args.run_dir))[-1]["eval/episodic_return"] > -0.05
    received = np.stack(RECEIVED)
    assert (received >= Target.action_space.low).all()
    assert (received <= Target.action_space.high).all()
    assert (received == Target.action_space.high).any(), "the noise did reach over the edge"


def test_learns_cartpole():
    args = ppo.Args(env_id="CartPole-v1", total_timesteps=20_000, eval_frequency=20_000)
    ppo.train(args)
    assert rows(ppo.Path(args.run_dir))[-1]["eval/episodic_return"] >= 400


def test_compiled_update_learns_the_same(tmp_path):
    for compile_ in False, True:
        ppo.train(
            ppo.Args(
                env_id="CartPole-v1",
                total_timesteps=64,
                num_envs=2,
                compile=compile_,
                run_dir=str(tmp_path / str(compile_)),
                **TINY,
            )
        )
    for eager, compiled in zip(timeless(tmp_path / "False"), timeless(tmp_path / "True"), strict=True):
        assert compiled == pytest.approx(eager, rel=1e-3, abs=1e-4)
