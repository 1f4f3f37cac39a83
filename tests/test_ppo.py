"""ppo.py against oracles written from the papers, hand-made trajectories, and environments with known answers."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import rows, timeless
from tiny_envs import MADE, Counter, Seeded

from algorithms import ppo

TINY = {"num_steps": 16, "num_minibatches": 2, "update_epochs": 2, "eval_episodes": 1, "device": "cpu"}
BOX = gym.spaces.Box(-9, 9, (2,), np.float32)

RECEIVED, ECHOED = [], []  # the actions that the environments below were given


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


class Echo(Seeded):
    """Notes its actions."""

    def step(self, action):
        ECHOED.append(int(action))
        return super().step(action)


for env in Bandit, Chain, Target, Echo:
    gym.register(f"{env.__name__}-v0", env, disable_env_checker=True)


def weights(run_dir):
    return torch.load(run_dir / "model.pt", weights_only=True)["model"]


def make_agent(action_space, obs_shape=(4,), **flags):
    """An agent with outputs of scale 1: at the start, they are nearly 0 everywhere."""
    agent = ppo.make_agent(ppo.Args(**flags), obs_shape, action_space)
    torch.nn.init.normal_(agent.actor[-1].weight, std=0.15)
    return agent


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

    def make(*args):
        agent = make_agent(*args)
        policy = agent.forward

        def forward(obs):
            return policy(obs)[0], agent.features(obs)[:, 0]

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


def no_evaluation(monkeypatch):
    monkeypatch.setattr(ppo, "evaluate", lambda *_: {"eval/episodic_return": 0.0})


@pytest.fixture
def staggered(monkeypatch):
    """Environment k starts in its episode 10 k: all observations, lengths and ends differ between environments."""
    made, make_env = [], ppo.make_env

    def make(*args, **kwargs):
        env = make_env(*args, **kwargs)
        env.unwrapped.episode = 10 * len(made) - 1
        made.append(env)
        return env

    monkeypatch.setattr(ppo, "make_env", make)
    no_evaluation(monkeypatch)


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


def test_rewards_are_scaled_by_the_deviation_of_sums_that_restart_with_each_episode(recorded):
    ppo.train(ppo.Args(env_id="Counter-v0", total_timesteps=16, num_envs=1, gamma=0.5, **TINY | {"num_steps": 8}))
    sums = [[1, 2.5, 4.25, 1, 2.5, 1, 2.5, 4.25], [6.125, 1, 2.5, 4.25, 1, 2.5, 1, 2.5]]  # episode 2 spans both batches
    plain = [[1, 2, 3, 1, 2, 1, 2, 3], [4, 1, 2, 3, 1, 2, 1, 2]]
    for batch, n in zip(recorded["gae"], (1, 2), strict=True):
        np.testing.assert_allclose(batch[0][:, 0], plain[n - 1] / np.std(np.concatenate(sums[:n])), rtol=1e-5)


def test_sums_restart_in_the_environment_whose_episode_ends_and_in_no_other(recorded, staggered):
    ppo.train(ppo.Args(env_id="Counter-v0", total_timesteps=16, num_envs=2, gamma=0.5, **TINY | {"num_steps": 8}))
    sums = [[1, 2.5, 4.25, 1, 2.5, 1, 2.5, 4.25], [1, 2.5, 1, 2.5, 4.25, 6.125, 1, 2.5]]
    plain = [[1, 2, 3, 1, 2, 1, 2, 3], [1, 2, 1, 2, 3, 4, 1, 2]]
    np.testing.assert_allclose(recorded["gae"][0][0].T, plain / np.std(sums), rtol=1e-5)


@pytest.mark.parametrize(
    ("drought", "reward", "scaled"),
    [
        (400, 1.0, 10),
        (400, -1.0, -10),
        (400, 0.1, 10),
        (63, 1.0, 64 / 63**0.5),
        (63, -3.0, -64 / 63**0.5),
        (9, 0.0, 0),
    ],
)
@pytest.mark.parametrize("num_envs", [1, 4])
def test_the_first_reward_after_a_drought_is_clipped(drought, reward, scaled, num_envs):
    """One reward among n has a standard deviation of sqrt(n - 1) / n of it."""
    scaler, rewards = ppo.RewardScaler(num_envs, gamma=0.0), np.zeros((drought + 1, num_envs))
    rewards[-1] = reward
    batches = np.split(rewards, [drought // 2, drought])  # the drought began in batches before
    scaled_rewards = np.concatenate([scaler(batch, np.zeros(batch.shape, bool)) for batch in batches])
    assert (scaled_rewards[:-1] == 0).all()
    np.testing.assert_allclose(scaled_rewards[-1], scaled, rtol=1e-4)


def test_a_scaler_goes_on_from_its_saved_state():
    rng = np.random.default_rng(0)
    rewards, ended = rng.normal(size=(3, 20, 2)), rng.random((3, 20, 2)) < 0.1
    scaler, resumed = ppo.RewardScaler(2, 0.9), ppo.RewardScaler(2, 0.9)
    for batch in 0, 1:
        scaler(rewards[batch], ended[batch])
    resumed.load_state_dict(copy.deepcopy(scaler.state_dict()))
    np.testing.assert_array_equal(resumed(rewards[2], ended[2]), scaler(rewards[2], ended[2]))


def loss_of(log_prob, old_log_prob, advantages, entropy=None, values=None, returns=None, **flags):
    zeros = torch.zeros_like(advantages)
    entropy, values, returns = (zeros if x is None else x for x in (entropy, values, returns))
    args = ppo.Args(**{"clip_coef": 0.2, "norm_adv": False} | flags)
    return ppo.ppo_loss(log_prob, entropy, values, old_log_prob, advantages, returns, args)


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
    loss, parts = loss_of(log_prob, old, advantages, entropy, values, returns, vf_coef=0.7, ent_coef=0.3)
    expected = parts["losses/policy_loss"] + 0.7 * ((values - returns) ** 2).mean() - 0.3 * entropy.mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    columns = (log_prob, old, advantages, entropy, values, returns)
    singles = [loss_of(*(x[i : i + 1] for x in columns), vf_coef=0.7, ent_coef=0.3)[0].item() for i in range(32)]
    assert loss.item() == pytest.approx(np.mean(singles), rel=1e-5)


def test_metrics_are_means_over_the_rows_of_the_loss():
    torch.manual_seed(0)
    log_prob, old, advantages, entropy, values, returns = torch.randn(6, 32)
    _, parts = loss_of(log_prob, old, advantages, entropy, values, returns)
    ratio = (log_prob - old).exp()
    objectives = [
        min(r * a, min(max(r, 0.8), 1.2) * a) for r, a in zip(ratio.tolist(), advantages.tolist(), strict=True)
    ]
    assert parts["losses/policy_loss"].item() == pytest.approx(-np.mean(objectives), rel=1e-5)
    torch.testing.assert_close(parts["losses/value_loss"], ((values - returns) ** 2).mean())
    torch.testing.assert_close(parts["losses/entropy"], entropy.mean())
    torch.testing.assert_close(parts["losses/approx_kl"], (ratio - 1 - ratio.log()).mean())
    torch.testing.assert_close(parts["losses/clipfrac"], ((ratio < 0.8) | (ratio > 1.2)).float().mean())


def test_advantages_are_normalised_among_the_rows_of_the_loss():
    torch.manual_seed(0)
    log_prob, old, advantages = torch.randn(3, 32)
    normalised = (advantages - advantages.mean()) / advantages.std(correction=0)
    expected, _ = loss_of(log_prob, old, normalised)
    for scaled in advantages, 5 * advantages + 3:
        assert loss_of(log_prob, old, scaled, norm_adv=True)[0].item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss_of(log_prob, old, advantages)[0].item() != pytest.approx(expected.item(), rel=1e-2)
    assert loss_of(log_prob[:1], old[:1], advantages[:1], norm_adv=True)[0] == 0, "a single one is its mean"


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(AssertionError):
        loss_of(torch.zeros(4, 1), torch.zeros(4), torch.zeros(4))


def test_categorical_policy_against_torch_distributions():
    torch.manual_seed(0)
    agent, obs = make_agent(gym.spaces.MultiDiscrete([2, 5], start=[0, -3])), torch.randn(7, 4)
    logits, actions = agent(obs)[0].detach(), agent.sample(obs)
    parts = [torch.distributions.Categorical(logits=part) for part in logits.split([2, 5], -1)]
    log_prob, entropy = agent.log_prob_and_entropy(logits, actions)
    torch.testing.assert_close(log_prob, sum(part.log_prob(actions[:, k]) for k, part in enumerate(parts)))
    torch.testing.assert_close(entropy, sum(part.entropy() for part in parts))
    assert torch.equal(agent.sample(obs, mode=True), torch.stack([part.probs.argmax(-1) for part in parts], -1))
    np.testing.assert_array_equal(agent.to_env(actions), actions.numpy() + np.array([0, -3]))
    many = agent.sample(obs[:1].expand(20_000, -1))
    for k, part in enumerate(parts):
        frequencies = torch.bincount(many[:, k], minlength=len(part.probs[0])) / 20_000
        torch.testing.assert_close(frequencies, part.probs[0], atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("space", "num_actions"),
    [(gym.spaces.Discrete(3, start=5), 3), (gym.spaces.MultiDiscrete([[2, 3]], start=[[1, -4]]), 6)],
)
def test_actions_are_counted_from_the_environments_own_start(space, num_actions):
    torch.manual_seed(0)
    agent = ppo.make_agent(ppo.Args(), (4,), space)
    actions = agent.to_env(agent.sample(torch.randn(200, 4)))
    assert all(space.contains(action) for action in actions)
    assert len(np.unique(actions, axis=0)) == num_actions


def test_gaussian_policy_against_torch_distributions():
    torch.manual_seed(0)
    agent, obs = make_agent(gym.spaces.Box(-1, 1, (3,))), torch.randn(7, 4)
    agent.log_std.data = torch.tensor([-1.0, 0.0, 0.5])
    mean, actions = agent(obs)[0].detach(), agent.sample(obs)
    normal = torch.distributions.Normal(mean, agent.log_std.exp())
    log_prob, entropy = agent.log_prob_and_entropy(mean, actions)
    torch.testing.assert_close(log_prob, normal.log_prob(actions).sum(-1))
    torch.testing.assert_close(entropy, normal.entropy().sum(-1))
    many = agent.sample(obs[:1].expand(50_000, -1))
    torch.testing.assert_close(many.mean(0), mean[0], atol=0.03, rtol=0)
    torch.testing.assert_close(many.std(0), agent.log_std.exp(), atol=0.03, rtol=0)
    assert torch.equal(agent.sample(obs, mode=True), mean)


def to_env(low, high, value):
    """What the environment gets where the policy says value in each dimension."""
    agent = ppo.make_agent(ppo.Args(), (4,), gym.spaces.Box(np.float32(low), np.float32(high)))
    return agent.to_env(torch.full((1, len(low)), float(value)))[0]


def test_box_bounds_are_mapped_to_plus_minus_one_and_respected():
    low, high = [-1, 0, -5, -np.inf], [3, 10, 0, np.inf]
    for value, expected in (0, (1, 5, -2.5, 0)), (1, (3, 10, 0, 1)), (-1, (-1, 0, -5, -1)), (9, (3, 10, 0, 9)):
        np.testing.assert_allclose(to_env(low, high, value), expected)
    for value, expected in (0.5, (0.5, 0.5)), (9, (9, 2)), (-9, (0, -9)):  # not mapped, but respected
        np.testing.assert_allclose(to_env([0, -np.inf], [np.inf, 2], value), expected)
    # the density of the unclipped sample integrates to one
    grid = torch.linspace(-8, 8, 2001).unsqueeze(-1)
    one = ppo.make_agent(ppo.Args(), (4,), gym.spaces.Box(-1, 3, (1,)))
    log_prob, _ = one.log_prob_and_entropy(torch.zeros_like(grid), grid)
    assert torch.trapezoid(log_prob.exp(), grid[:, 0]).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("bound", [1.1e6, np.finfo(np.float32).max, np.inf])
def test_a_bound_beyond_a_million_is_none(bound):
    for low, high in (-bound, bound), (-bound, 5), (-5, bound):
        assert to_env([low], [high], 0.5) == 0.5
    assert to_env([-9e5], [9e5], 0.5) == 4.5e5


def gradients(agent, output):
    """Which of the parts get a gradient from the actor's output, 0, or the critic's, 1."""
    agent.zero_grad(set_to_none=True)
    agent(torch.rand(2, *agent.obs_shape))[output].sum().backward()
    return {name.split(".")[0] for name, parameter in agent.named_parameters() if parameter.grad is not None}


def test_actor_and_critic_are_two_networks_for_vectors_and_two_heads_for_images():
    vectors, images = (ppo.make_agent(ppo.Args(), shape, BOX) for shape in [(5,), (4, 84, 84)])
    assert (gradients(vectors, 0), gradients(vectors, 1)) == ({"actor"}, {"critic"})
    assert (gradients(images, 0), gradients(images, 1)) == ({"cnn", "actor"}, {"cnn", "critic"})


def test_running_statistics_equal_those_of_all_rows_at_once():
    torch.manual_seed(0)
    data = torch.randn(1000, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, 100.0, -3.0])
    stats = ppo.RunningMeanStd(3)
    for rows_ in data.split([1, 9, 490, 500]):
        stats.update(rows_)
    assert (stats.count, stats.count.dtype) == (1000, torch.int64), "float64 is unknown on MPS, float32 too coarse"
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


def uneven_batch():
    """An agent, its arguments and 33 rows, whose returns are their numbers: the minibatches of 16 leave one of them."""
    args = ppo.Args(env_id="CartPole-v1", num_envs=2, **TINY)
    agent = ppo.make_agent(args, (4,), gym.spaces.Discrete(2))
    rest = torch.zeros(33, 1, dtype=torch.long), torch.zeros(33), torch.randn(33), torch.arange(33).float()
    return agent, args, (torch.randn(33, 4), *rest)


def test_every_transition_once_an_epoch_and_a_rest_smaller_than_a_minibatch(monkeypatch):
    batches, ppo_loss = [], ppo.ppo_loss
    monkeypatch.setattr(ppo, "ppo_loss", lambda *args: (batches.append(args[5]), ppo_loss(*args))[1])
    agent, args, batch = uneven_batch()
    metrics = ppo.update(agent, torch.optim.Adam(agent.parameters()), batch, args)
    assert [len(b) for b in batches] == [16, 16, 1] * 2
    for epoch in batches[:3], batches[3:]:
        assert torch.equal(torch.cat(epoch).sort().values, batch[4])
    assert not torch.equal(torch.cat(batches[:3]), torch.cat(batches[3:])), "another order in each epoch"
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("compile_", [True, False])
def test_a_shorter_minibatch_is_not_compiled(monkeypatch, compile_):
    """Each new size of its inputs would compile the function once more."""
    sizes, losses, ppo_loss = [], [], ppo.ppo_loss

    def compiled(function):
        return lambda *inputs: (sizes.append(len(inputs[0])), function(*inputs))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(ppo, "ppo_loss", lambda *args: (losses.append(len(args[0])), ppo_loss(*args))[1])
    agent, args, batch = uneven_batch()
    args.compile = compile_
    ppo.update(agent, torch.optim.Adam(agent.parameters()), batch, args)
    assert sizes == ([16, 16] * 2 if compile_ else [])
    assert losses == [16, 16, 1] * 2, "it is learnt from, though"


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
    no_evaluation(monkeypatch)
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
    agent = ppo.make_agent(args, (4,), gym.spaces.Discrete(2))
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
    agent = make_agent(BOX, (3,), norm_obs=True)
    agent.obs_stats.update(torch.randn(100, 3) * 4 + 7)
    obs = torch.randn(50, 3) * 4 + 7
    means = agent(obs)[0].detach()
    np.testing.assert_allclose(agent.act(obs.numpy()), np.clip(9 * means, -9, 9), rtol=1e-4, atol=1e-5)  # by the mean
    agent.log_std.data.fill_(-20)
    torch.testing.assert_close(agent.sample(obs), means, atol=1e-5, rtol=1e-4)


SPACES = [gym.spaces.Discrete(3, start=5), gym.spaces.MultiDiscrete([[2, 3]]), BOX,
          gym.spaces.Box(-1, 1, (1, 2), np.float32)]  # fmt: skip


@pytest.mark.parametrize("space", SPACES, ids=repr)
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64, np.uint8, list])
def test_act_takes_one_observation_or_a_batch_of_any_type(space, kind):
    torch.manual_seed(0)
    agent = make_agent(space)
    batch = np.random.default_rng(0).integers(0, 9, (8, 4))
    expected = agent.act(batch.astype(np.float32))
    assert len(np.unique(expected, axis=0)) > 1, "else a wrong row would do"
    batch = batch.tolist() if kind is list else batch.astype(kind)
    actions = agent.act(batch)
    np.testing.assert_array_equal(actions, expected)
    assert agent.act(batch[:1]).shape == (1, *space.shape), "a batch of one is a batch"
    for obs, action in zip(batch, actions, strict=True):
        one = agent.act(obs)
        assert space.contains(one)
        np.testing.assert_allclose(one, action, rtol=1e-5, atol=1e-6)


def test_act_takes_one_image_or_a_batch():
    torch.manual_seed(0)
    agent = ppo.make_agent(ppo.Args(), (4, 84, 84), gym.spaces.Discrete(6))
    agent.actor.weight.data.normal_()
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 84, 84), dtype=np.uint8)
    images[:4] //= 8
    actions = agent.act(images)
    assert len(set(actions)) > 1
    assert [agent.act(image) for image in images] == actions.tolist()
    assert agent(torch.from_numpy(images))[0].argmax(-1).tolist() == actions.tolist()


def test_networks_start_orthogonal():
    torch.manual_seed(0)
    agent = ppo.make_agent(ppo.Args(), (5,), gym.spaces.Discrete(4))
    images = ppo.make_agent(ppo.Args(), (4, 84, 84), gym.spaces.Discrete(4))
    layers = [(layer, 2**0.5) for network in (agent.actor, agent.critic) for layer in network[:-1:2]]
    layers += [(layer, 2**0.5) for layer in images.cnn if hasattr(layer, "weight")]
    layers += [(agent.actor[-1], 0.01), (agent.critic[-1], 1.0), (images.actor, 0.01), (images.critic, 1.0)]
    assert len(layers) == 2 * 2 + 4 + 4
    for layer, gain in layers:
        weight = layer.weight.flatten(1)
        torch.testing.assert_close(torch.linalg.svdvals(weight), torch.full((min(weight.shape),), gain))
        assert (layer.bias == 0).all()
    for log_std in 0.0, -0.7:
        policy = ppo.make_agent(ppo.Args(log_std_init=log_std), (17,), gym.spaces.Box(-1, 1, (6,)))
        torch.testing.assert_close(policy.log_std.data, torch.full((6,), log_std))


def test_networks_layer_by_layer():
    """dqn.py has the same text of the one for images."""
    torch.manual_seed(0)
    agent, obs = make_agent(BOX, (5,)), torch.randn(7, 5)
    images = ppo.make_agent(ppo.Args(), (4, 84, 84), BOX)
    bytes_ = torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8)
    for parameter in [*agent.parameters(), *images.parameters()]:
        parameter.data += 0.01 * torch.randn_like(parameter)  # biases too
    for network, output in (agent.actor, agent(obs)[0]), (agent.critic, agent(obs)[1][:, None]):
        first, second, last = (layer for layer in network if hasattr(layer, "weight"))
        hidden = (obs @ first.weight.T + first.bias).tanh()
        hidden = (hidden @ second.weight.T + second.bias).tanh()
        torch.testing.assert_close(output, hidden @ last.weight.T + last.bias)
    *convolutions, linear = (layer for layer in images.cnn if hasattr(layer, "weight"))
    hidden = bytes_ / 255
    for layer, stride in zip(convolutions, (4, 2, 1), strict=True):
        hidden = torch.nn.functional.conv2d(hidden, layer.weight, layer.bias, stride).clamp(min=0)
    hidden = (hidden.flatten(1) @ linear.weight.T + linear.bias).clamp(min=0)
    torch.testing.assert_close(images(bytes_)[0], images.actor(hidden))
    torch.testing.assert_close(images(bytes_)[1], images.critic(hidden)[:, 0])


def test_normalised_observations_are_clamped():
    stats = ppo.RunningMeanStd(1)
    stats.update(torch.tensor([[-1.0], [1.0]]))
    torch.testing.assert_close(
        stats(torch.tensor([[-99.0], [-9.0], [9.0], [99.0]])), torch.tensor([[-10.0], [-9], [9], [10]])
    )


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
    no_evaluation(monkeypatch)
    ECHOED.clear()
    ppo.train(ppo.Args(env_id="Echo-v0", total_timesteps=48, num_envs=3, **TINY))
    assert seen[0][1].flatten().tolist() == ECHOED
    assert 0 < np.mean(ECHOED) < 1


def test_a2c_has_the_same_gradient():
    """At ratio 1 the clipped objective has the policy gradient, A grad log pi, so PPO's first step is A2C's."""
    torch.manual_seed(0)
    args = ppo.Args(env_id="CartPole-v1", optimizer="rmsprop", update_epochs=1, num_minibatches=1, norm_adv=False,
                    vf_coef=0.5, ent_coef=0.01)  # fmt: skip
    agent = ppo.make_agent(args, (4,), gym.spaces.Discrete(2))
    obs, actions, advantages, returns = torch.randn(64, 4), torch.randint(2, (64, 1)), torch.randn(64), torch.randn(64)

    def gradient(loss_of_network):
        outputs, values = agent(obs)
        log_prob, entropy = agent.log_prob_and_entropy(outputs, actions)
        return torch.autograd.grad(
            loss_of_network(log_prob, entropy, values), [*agent.actor.parameters(), *agent.critic.parameters()]
        )

    a2c = gradient(
        lambda log_prob, entropy, v: (
            -(log_prob * advantages).mean() + 0.5 * ((v - returns) ** 2).mean() - 0.01 * entropy.mean()
        )
    )
    clipped = gradient(
        lambda log_prob, entropy, v: ppo.ppo_loss(log_prob, entropy, v, log_prob.detach(), advantages, returns, args)[0]
    )
    for ours, theirs in zip(clipped, a2c, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_atari_learns_from_the_sign_and_logs_the_score(monkeypatch, tmp_path):
    seen, gae = [], ppo.gae
    monkeypatch.setattr(ppo, "gae", lambda rewards, *rest: (seen.append(rewards), gae(rewards, *rest))[1])
    no_evaluation(monkeypatch)
    ppo.train(ppo.Args(env_id="ALE/SpaceInvaders-v5", total_timesteps=512, num_envs=2, run_dir=str(tmp_path / "run"),
                       **TINY | {"num_steps": 256, "update_epochs": 1}))  # fmt: skip
    assert set(np.unique(seen)) == {0, 1}
    assert weights(tmp_path / "run")["cnn.0.weight"].shape == (32, 4, 8, 8)


def test_learns_a_bandit():
    result = ppo.train(
        ppo.Args(env_id="Bandit-v0", total_timesteps=4096, num_envs=4, eval_episodes=1, num_steps=64, num_minibatches=4)
    )
    assert result["eval/episodic_return"] == 2


def test_learns_the_values_of_a_chain():
    args = ppo.Args(env_id="Chain-v0", total_timesteps=16_384, gamma=0.9, gae_lambda=0.5, norm_reward=False,
                    eval_episodes=1, num_steps=64, num_minibatches=8, learning_rate=3e-3, run_dir="run")  # fmt: skip
    ppo.train(args)
    values = ppo.load("run")(torch.eye(4))[1].tolist()
    assert values == pytest.approx([0.9**3, 0.9**2, 0.9, 1], abs=0.02)


@pytest.mark.slow
def test_learns_a_point_in_an_asymmetric_box_and_sends_nothing_outside_of_it():
    RECEIVED.clear()
    result = ppo.train(ppo.Args(env_id="Target-v0", total_timesteps=16_384, eval_episodes=1, num_steps=64,
                                num_minibatches=8, learning_rate=3e-3))  # fmt: skip
    assert result["eval/episodic_return"] > -0.05
    received = np.stack(RECEIVED)
    assert (received >= Target.action_space.low).all()
    assert (received <= Target.action_space.high).all()
    assert (received == Target.action_space.high).any(), "the noise did reach over the edge"


@pytest.mark.slow
def test_learns_cartpole():
    result = ppo.train(ppo.Args(env_id="CartPole-v1", total_timesteps=32_768, eval_frequency=32_768))
    assert result["eval/episodic_return"] >= 400  # eight seeds: 448 to 500


@pytest.mark.slow
def test_the_compiled_loss_learns_the_same_and_is_compiled_once(tmp_path):
    torch._dynamo.reset()
    for compile_ in False, True:
        torch._dynamo.utils.counters.clear()
        ppo.train(ppo.Args(env_id="CartPole-v1", total_timesteps=72, num_envs=2, norm_obs=True, compile=compile_,
                           run_dir=str(tmp_path / str(compile_)), **TINY))  # fmt: skip
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compile_, "two batches, and a short one"
    for eager, compiled in zip(timeless(tmp_path / "False"), timeless(tmp_path / "True"), strict=True):
        assert compiled == pytest.approx(eager, rel=1e-3, abs=1e-4)
