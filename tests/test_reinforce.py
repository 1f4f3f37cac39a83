"""reinforce.py against gradients in closed form, sums by definition, hand-made episodes and known answers."""

import copy
import itertools
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import rows, timeless

from algorithms import reinforce
from algorithms.reinforce import Episode

TINY = {"num_steps": 5, "eval_episodes": 1, "device": "cpu"}
MADE, RECEIVED = [], []  # by the environments below: themselves, actions


class Steps(gym.Env):
    """Observes step + 100 * episode and pays the step; its n-th episode lasts LENGTHS[n % 3], ends as ENDS[n % 3]."""

    LENGTHS, ENDS = (3, 2, 4), ("terminated", "truncated", "truncated")
    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Discrete(2, start=5)

    def __init__(self, render_mode=None):
        self.episode, self.t, self.steps, self.actions = -1, 0, 0, []
        MADE.append(self)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return np.array([100.0 * self.episode], np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t, self.steps = self.t + 1, self.steps + 1
        self.actions.append(int(action))
        over, end = self.t == self.LENGTHS[self.episode % 3], self.ENDS[self.episode % 3]
        obs = np.array([self.t + 100.0 * self.episode], np.float32)
        return obs, float(self.t), over and end == "terminated", over and end == "truncated", {}


class Arms(gym.Env):
    """One step; arm a of three pays 10 + a."""

    observation_space = gym.spaces.Box(0, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(3)

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action):
        return np.ones(1, np.float32), 10.0 + action, True, False, {}


class Row(gym.Env):
    """Four states in a row, one-hot, and leaving the last one pays 1; or, after two steps, a time limit."""

    observation_space = gym.spaces.Discrete(4)
    action_space = gym.spaces.Discrete(2)
    LIMIT = None

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.t = int(self.np_random.integers(4)) if self.LIMIT else 0, 0
        return self.state, {}

    def step(self, action):
        self.state, self.t = self.state + 1, self.t + 1
        return min(self.state, 3), float(self.state == 4), self.state == 4, self.t == self.LIMIT, {}


class Point(gym.Env):
    """One step in an asymmetric box: the closer to the point, the better."""

    POINT = np.array([[2.0], [-4.0]])
    observation_space = gym.spaces.Dict(a=gym.spaces.Discrete(2), b=gym.spaces.Box(0, 1, (2, 2)))
    action_space = gym.spaces.Box(np.array([[-1.0], [-5.0]]), np.array([[3.0], [0.0]]), dtype=np.float32)

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {"a": 0, "b": np.zeros((2, 2), np.float32)}, {}

    def step(self, action):
        RECEIVED.append(action)
        obs = {"a": 0, "b": np.zeros((2, 2), np.float32)}
        return obs, -float(((action - self.POINT) ** 2).sum()), True, False, {}


class Anywhere(Point):
    """The same without a box. In one, as long as the noise is large, the best mean lies far beyond the best action."""

    action_space = gym.spaces.Box(-np.inf, np.inf, (2, 1))


class Two(Row):
    action_space = gym.spaces.MultiDiscrete([2, 3])


class Whole(Row):
    action_space = gym.spaces.Box(0, 9, (2,), np.int64)


for env in Steps, Arms, Row, Point, Anywhere, Two, Whole:
    gym.register(f"Reinforce{env.__name__}-v0", env, disable_env_checker=True)


def weights(run_dir):
    return torch.load(run_dir / "model.pt", weights_only=True)["model"]


def random_episodes(lengths=(7, 3, 5), obs_dim=4, num_actions=2, seed=0):
    """Episodes of these lengths, the last of them truncated."""
    rng = np.random.default_rng(seed)
    return [
        Episode(
            list(rng.normal(size=(length + 1, obs_dim)).astype(np.float32)),
            list(torch.from_numpy(rng.integers(num_actions, size=length))),
            rng.normal(size=length).tolist(),
            terminated=length != lengths[-1],
        )
        for length in lengths
    ]


def return_by_definition(episode, t, gamma, last_value=0.0):
    """The sum of gamma^(k - t) r_k from t on, term by term, and what the last observation is worth."""
    length = len(episode.rewards)
    return sum(gamma ** (k - t) * episode.rewards[k] for k in range(t, length)) + gamma ** (length - t) * last_value


@pytest.mark.parametrize(("gamma", "last_value"), [(0.9, 0.0), (1.0, 0.0), (0.5, 3.0), (0.0, 3.0)])
def test_reward_to_go_is_the_sum_that_defines_it(gamma, last_value):
    for episode in random_episodes():
        expected = [return_by_definition(episode, t, gamma, last_value) for t in range(len(episode.rewards))]
        got = reinforce.reward_to_go(episode.rewards, last_value, gamma)
        torch.testing.assert_close(got, torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_each_baseline_by_its_definition():
    """Truncated episodes end with the value of their last observation where V is the baseline, and only there."""
    gamma, episodes = 0.9, random_episodes()
    values = [torch.randn(len(episode.observations)) for episode in episodes]
    advantages = reinforce.subtract_baselines(episodes, values, gamma)
    for i, (episode, value) in enumerate(zip(episodes, values, strict=True)):
        assert advantages[i].shape == (3, len(episode.rewards))
        for t in range(len(episode.rewards)):
            plain = return_by_definition(episode, t, gamma)
            others = [
                return_by_definition(other, t, gamma) if t < len(other.rewards) else 0.0
                for other in episodes
                if other is not episode
            ]
            last_value = 0.0 if episode.terminated else value[-1].item()
            bootstrapped = return_by_definition(episode, t, gamma, last_value)
            expected = [plain, plain - np.mean(others), bootstrapped - value[t].item()]
            np.testing.assert_allclose(advantages[i][:, t], expected, atol=1e-5)
    assert not episodes[-1].terminated
    assert not np.isclose(values[-1][-1], 0)


def test_a_single_episode_has_no_mean_to_subtract():
    (advantage,) = reinforce.subtract_baselines(random_episodes(lengths=(4,)), [torch.zeros(5)], 0.9)
    torch.testing.assert_close(advantage[1], advantage[0])


LOGITS, PAYS = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64), (10.0, 11.0, 12.5)


def estimates_for(arms, value):
    """The (K, 3 baselines, 3 logits) estimates of K one-step episodes that chose these arms."""
    logits = LOGITS.clone().requires_grad_()
    episodes = [Episode([np.ones(1)] * 2, [torch.tensor(a)], [PAYS[a]], terminated=True) for a in arms]
    advantages = reinforce.subtract_baselines(episodes, [torch.tensor([value, 99.0])] * len(arms), 1.0)
    return torch.stack(
        [
            reinforce.policy_gradient(logits.log_softmax(-1)[torch.tensor([a])], advantage.double(), [logits])
            for a, advantage in zip(arms, advantages, strict=True)
        ]
    )


def test_expected_gradient_of_a_bandit_is_the_one_in_closed_form_under_every_baseline_and_its_variance_is_lower():
    """All outcomes of two episodes, weighted by their probabilities: no sampling, so equality is exact."""
    probs = LOGITS.softmax(-1)
    pays = torch.tensor(PAYS, dtype=torch.float64)
    gradient = probs * (pays - probs @ pays)  # of the expected reward, by the logits
    value = (probs @ pays).item()
    mean, square, measured = torch.zeros(3, 3), torch.zeros(3), torch.zeros(3)
    for arms in itertools.product(range(3), repeat=2):
        probability = probs[list(arms)].prod()
        estimates = estimates_for(arms, value)
        mean = mean + probability * estimates.mean(0)
        square = square + probability * estimates.mean(0).square().sum(-1)
        measured = measured + probability * reinforce.variance_of_mean(estimates)
    for expected in mean:
        torch.testing.assert_close(expected, gradient, atol=1e-6, rtol=1e-6)
    variance = square - mean.square().sum(-1)
    # what is measured is on average the variance; under "mean" two estimates share their returns, so it is not quite
    torch.testing.assert_close(measured[[0, 2]], variance[[0, 2]], atol=1e-6, rtol=1e-6)
    assert variance[0] > 40 * variance[1]
    assert variance[1] > 1.5 * variance[2]


def test_gradient_of_an_episode_is_the_sum_over_its_steps():
    torch.manual_seed(0)
    agent, advantages = make("CartPole-v1"), torch.randn(3, 7)
    parameters, obs, actions = list(agent.actor.parameters()), torch.randn(7, 4), torch.randint(2, (7,))
    whole = reinforce.policy_gradient(agent.policy(obs).log_prob(actions), advantages, parameters)
    single = sum(
        reinforce.policy_gradient(agent.policy(obs[[t]]).log_prob(actions[[t]]), advantages[:, [t]], parameters)
        for t in range(7)
    )
    torch.testing.assert_close(whole, single, atol=1e-5, rtol=1e-4)
    for k in range(3):
        loss = (agent.policy(obs).log_prob(actions) * advantages[k]).sum()
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        torch.testing.assert_close(whole[k], expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(AssertionError):
        reinforce.policy_gradient(torch.zeros(7, 1), advantages, parameters)


def make(env_id, **flags):
    return reinforce.make_agent(reinforce.Args(env_id=env_id, **flags), reinforce.make_env(env_id))


def sgd(agent, rate=0.1, value_rate=0.0):
    return (
        torch.optim.SGD(agent.actor.parameters(), rate, maximize=True),
        torch.optim.SGD(agent.critic.parameters(), value_rate),
    )


@pytest.mark.parametrize("baseline", ["none", "mean", "value"])
def test_update_climbs_the_mean_gradient_of_its_baseline_and_measures_the_variance_of_all(baseline):
    torch.manual_seed(0)
    args = reinforce.Args(gamma=0.9, baseline=baseline, value_epochs=1, device="cpu")
    agent, episodes = make("CartPole-v1"), random_episodes()
    mirror = copy.deepcopy(agent)
    metrics = reinforce.update(agent, *sgd(agent), episodes, args)
    with torch.no_grad():
        values = [mirror.value(torch.from_numpy(np.stack(episode.observations))) for episode in episodes]
    advantages = reinforce.subtract_baselines(episodes, values, 0.9)
    parameters, gradients, entropies = list(mirror.actor.parameters()), np.zeros((3, 3), object), []
    for i, episode in enumerate(episodes):
        logits = mirror.actor(torch.from_numpy(np.stack(episode.observations[:-1])))
        log_probs = logits.log_softmax(-1)
        entropies.append(-(log_probs.exp() * log_probs).sum(-1).mean().item())
        for k in range(3):
            objective = sum(log_probs[t, a] * advantages[i][k, t] for t, a in enumerate(episode.actions))
            gradient = torch.autograd.grad(objective, parameters, retain_graph=True)
            gradients[k, i] = torch.cat([g.flatten() for g in gradient])
    for k, name in enumerate(["none", "mean", "value"]):
        estimates = torch.stack(list(gradients[k])).numpy()
        expected = np.trace(np.cov(estimates.T)) / 3
        assert metrics[f"losses/gradient_variance_{name}"] == pytest.approx(expected, rel=1e-3)
        if name == baseline:
            step = torch.cat([p.flatten() for p in agent.actor.parameters()]).detach()
            step -= torch.cat([p.flatten() for p in parameters]).detach()
            np.testing.assert_allclose(step, 0.1 * estimates.mean(0), atol=1e-5)
    assert metrics["losses/entropy"] == pytest.approx(np.mean(entropies), rel=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_the_gradients_variance_is_measured_from_two_episodes_on(count):
    agent = make("CartPole-v1")
    metrics = reinforce.update(agent, *sgd(agent), random_episodes()[:count], reinforce.Args(device="cpu"))
    measured = [value for name, value in metrics.items() if "gradient_variance" in name]
    assert len(measured) == (3 if count == 2 else 0)
    assert all(value > 0 for value in measured)


def test_value_network_learns_bootstrapped_returns_after_the_policy_and_leaves_it_alone():
    torch.manual_seed(0)
    episodes = random_episodes()
    agent = make("CartPole-v1")
    mirror = copy.deepcopy(agent)
    args = reinforce.Args(gamma=0.9, value_epochs=3, device="cpu")
    metrics = reinforce.update(agent, *sgd(agent, rate=0.0, value_rate=0.1), episodes, args)
    for one, other in zip(agent.actor.parameters(), mirror.actor.parameters(), strict=True):
        assert torch.equal(one, other)
    obs, returns = [], []
    for episode in episodes:
        last = mirror.value(torch.from_numpy(episode.observations[-1][None])).item()
        last_value = 0.0 if episode.terminated else last
        obs += episode.observations[:-1]
        returns += [return_by_definition(episode, t, 0.9, last_value) for t in range(len(episode.rewards))]
    obs, returns = torch.from_numpy(np.stack(obs)), torch.tensor(returns)
    before = mirror.value(obs).detach()
    expected = 1 - np.var((returns - before).numpy()) / np.var(returns.numpy())
    assert metrics["losses/explained_variance"] == pytest.approx(expected, rel=1e-4)
    losses = []
    for _ in range(3):  # a batch of fewer than 256 rows is one minibatch, so its order does not matter
        loss = ((mirror.critic(obs)[:, 0] - returns) ** 2).mean()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(mirror.critic.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(mirror.critic.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    for one, other in zip(agent.critic.parameters(), mirror.critic.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert metrics["losses/value_loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_a_batch_of_one_episode_is_learned_from():
    agent, args = make("CartPole-v1"), reinforce.Args(baseline="none", device="cpu")
    before = copy.deepcopy(agent.actor.state_dict())
    metrics = reinforce.update(agent, *sgd(agent), random_episodes(lengths=(3,)), args)
    assert all(np.isfinite(value) for value in metrics.values())
    assert not any("variance_none" in name for name in metrics), "one estimate has no variance"
    assert any(not torch.equal(value, before[name]) for name, value in agent.actor.state_dict().items())


@pytest.fixture
def batches(monkeypatch):
    """The episodes that train hands to update."""
    seen, update = [], reinforce.update

    def spy(agent, optimizer, value_optimizer, episodes, args):
        seen.append((copy.deepcopy(episodes), optimizer, value_optimizer))
        return update(agent, optimizer, value_optimizer, episodes, args)

    monkeypatch.setattr(reinforce, "update", spy)
    monkeypatch.setattr(reinforce, "evaluate", lambda *_: {"eval/episodic_return": 0.0})
    return seen


def told(episode):
    """(observations, rewards, terminated)"""
    return [float(obs[0]) for obs in episode.observations], episode.rewards, episode.terminated


def whole_episode(n):
    length, end = Steps.LENGTHS[n % 3], Steps.ENDS[n % 3]
    steps = np.arange(length + 1)
    return (100.0 * n + steps).tolist(), steps[1:].astype(float).tolist(), end == "terminated"


def test_a_batch_is_all_episodes_that_each_environment_begins_in_its_first_steps(batches, monkeypatch, tmp_path):
    """Environment k starts in its episode 10 k, so that lengths, ends and observations differ between environments."""
    MADE.clear()
    make_env = reinforce.make_env

    def staggered(*args, **kwargs):
        env = make_env(*args, **kwargs)
        env.unwrapped.episode = 10 * (len(MADE) - 2) - 1  # the first one made is not stepped
        return env

    monkeypatch.setattr(reinforce, "make_env", staggered)
    reinforce.train(reinforce.Args(env_id="ReinforceSteps-v0", total_timesteps=90, num_envs=3, num_steps=6,
                                   checkpoint_frequency=90, run_dir=str(tmp_path / "run"), device="cpu"))  # fmt: skip
    assert sum(env.steps for env in MADE) == 90, "where the last round of steps is only for two of the three as well"
    following = [0, 10, 20]
    for episodes, *_ in batches:
        expected = []
        for k in range(3):
            played = 0
            while played < 6:
                expected.append(whole_episode(following[k]))
                played += Steps.LENGTHS[following[k] % 3]
                following[k] += 1
        assert sorted(map(told, episodes)) == sorted(expected)
    assert len(batches) == 3, "6 to 9 steps of each environment in each of them; a fourth is cut off"
    # the actions are those that the environments got
    played = {int(episode.observations[0][0]): episode for episodes, *_ in batches for episode in episodes}
    for k, env in enumerate(MADE[1:4]):
        actions = [int(action) + 5 for n in range(10 * k, following[k]) for action in played[100 * n].actions]
        assert env.actions[: len(actions)] == actions
    assert len({int(action) for episode in played.values() for action in episode.actions}) == 2


def test_each_action_is_chosen_for_its_own_observation(monkeypatch):
    """By a policy that says whether the observation is odd."""
    episodes = []

    def parity(agent, obs):
        return types.SimpleNamespace(sample=lambda: obs[:, 0].long() % 2)

    monkeypatch.setattr(reinforce.PolicyAndValue, "policy", parity)
    monkeypatch.setattr(reinforce, "update", lambda *args: episodes.extend(args[3]) or {})
    monkeypatch.setattr(reinforce, "evaluate", lambda *_: {"eval/episodic_return": 0.0})
    reinforce.train(reinforce.Args(env_id="ReinforceSteps-v0", total_timesteps=24, num_envs=2, **TINY))
    assert episodes
    for episode in episodes:
        assert [int(action) for action in episode.actions] == [obs[0] % 2 for obs in episode.observations[:-1]]


@pytest.mark.parametrize("num_envs", [1, 2, 3])
def test_steps_are_transitions_and_each_episode_is_logged_once(num_envs, batches, tmp_path):
    MADE.clear()
    total = 31 * num_envs
    reinforce.train(reinforce.Args(env_id="ReinforceSteps-v0", total_timesteps=total, num_envs=num_envs,
                                   checkpoint_frequency=total, run_dir=str(tmp_path / "run"), **TINY))  # fmt: skip
    assert sum(env.steps for env in MADE) == total
    logged = rows(tmp_path / "run")
    assert logged[-1]["global_step"] == total
    # batches of the episodes 0 and 1; 2 and 3; 4 and 5; then 6 and 7; 8 and 9; 10 and 11; of each environment
    expected, step = [], 0
    for first in range(0, 12, 2):
        ends, lengths = [], [Steps.LENGTHS[n % 3] for n in (first, first + 1)]
        for t in range(1, sum(lengths) + 1):
            for _ in range(num_envs):
                step += 1
                if step <= total and t in (lengths[0], sum(lengths)):
                    length = lengths[0] if t == lengths[0] else lengths[1]
                    ends.append((step, length * (length + 1) / 2, length))
        expected += ends
    episodes = [row for row in logged if "charts/episodic_return" in row]
    got = [(row["global_step"], row["charts/episodic_return"], row["charts/episodic_length"]) for row in episodes]
    assert got == expected


@pytest.mark.parametrize("baseline", ["none", "mean", "value"])
def test_a_batch_that_the_budget_cuts_off_is_not_learned_from(baseline, batches, tmp_path):
    """Its whole episodes would be the short ones. Two environments: 10 and 14 steps a batch, then 6 that are lost."""
    args = reinforce.Args(env_id="ReinforceSteps-v0", total_timesteps=30, num_envs=2, baseline=baseline,
                          checkpoint_frequency=30, run_dir=str(tmp_path / "run"), **TINY)  # fmt: skip
    reinforce.train(args)
    assert [sum(len(episode.rewards) for episode in episodes) for episodes, *_ in batches] == [10, 14]
    learned = [row["global_step"] for row in rows(tmp_path / "run") if "losses/entropy" in row]
    assert learned == [10, 24]


def test_learning_rate_goes_down_a_line_to_zero(batches, tmp_path):
    for anneal, expected in (True, [1.0, 1 - 10 / 48, 0.5, 0.25]), (False, [1.0] * 4):
        run_dir = tmp_path / str(anneal)
        reinforce.train(reinforce.Args(env_id="ReinforceSteps-v0", total_timesteps=48, num_envs=2, anneal_lr=anneal,
                                       learning_rate=1.0, checkpoint_frequency=48, run_dir=str(run_dir),
                                       **TINY))  # fmt: skip
        rates = [row["charts/learning_rate"] for row in rows(run_dir) if "charts/learning_rate" in row]
        assert rates == pytest.approx(expected)
    _, optimizer, value_optimizer = batches[-1]
    assert optimizer.defaults["maximize"]
    assert not value_optimizer.defaults["maximize"]
    assert value_optimizer.param_groups[0]["lr"] == reinforce.Args().value_learning_rate


def test_steps_a_second_are_the_steps_of_a_batch_over_its_time(batches, tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(reinforce.time, "perf_counter", lambda: next(clock))
    reinforce.train(reinforce.Args(env_id="ReinforceSteps-v0", total_timesteps=24, num_envs=2, checkpoint_frequency=24,
                                   run_dir=str(tmp_path / "run"), **TINY))  # fmt: skip
    assert [row["charts/SPS"] for row in rows(tmp_path / "run") if "charts/SPS" in row] == [5, 7]


def test_discrete_policy_against_its_softmax():
    torch.manual_seed(0)
    agent, obs = make("ReinforceSteps-v0"), torch.randn(1, 1)
    torch.nn.init.normal_(agent.actor[-1].weight)
    probs = agent.actor(obs).softmax(-1)[0].detach()
    many = agent.policy(obs.expand(20_000, -1)).sample()
    torch.testing.assert_close(torch.bincount(many, minlength=2) / 20_000, probs, atol=0.015, rtol=0)
    assert agent.act(obs.numpy()).tolist() == [5 + probs.argmax().item()], "the environment counts from 5"


def test_box_bounds_are_mapped_to_plus_minus_one_and_respected():
    low, high = np.array([-1.0, 0.0, -5.0, -np.inf]), np.array([3.0, 10.0, 0.0, np.inf])
    agent = reinforce.PolicyAndValue(3, gym.spaces.Box(low, high, dtype=np.float64))
    for value, expected in (0, (1, 5, -2.5, 0)), (1, (3, 10, 0, 1)), (-1, (-1, 0, -5, -1)), (9, (3, 10, 0, 9)):
        np.testing.assert_allclose(agent.to_env(torch.full((1, 4), float(value)))[0], expected)
    half = gym.spaces.Box(np.array([0.0, -np.inf]), np.array([np.inf, 2.0]), dtype=np.float64)
    for value, expected in (0.5, (0.5, 0.5)), (9, (9, 2)), (-9, (0, -9)):  # not mapped, but respected
        actions = reinforce.PolicyAndValue(3, half).to_env(torch.full((1, 2), float(value)))
        np.testing.assert_allclose(actions[0], expected)
    agent.actor.log_std.data = torch.tensor([-1.0, 0.0, 0.5, 1.0])
    obs = torch.randn(7, 3)
    policy = agent.policy(obs)
    actions, mean, std = policy.sample(), agent.actor(obs), agent.actor.log_std.exp()
    normal = torch.distributions.Normal(mean, std)
    torch.testing.assert_close(policy.log_prob(actions), normal.log_prob(actions).sum(-1))
    torch.testing.assert_close(policy.entropy(), normal.entropy().sum(-1))
    np.testing.assert_allclose(agent.act(obs.numpy()), agent.to_env(mean.detach()), rtol=1e-5)
    many = agent.policy(obs[:1].expand(50_000, -1)).sample()
    torch.testing.assert_close(many.mean(0), mean[0].detach(), atol=0.05, rtol=0)
    torch.testing.assert_close(many.std(0), std.detach(), atol=0.05, rtol=0)


def test_networks_start_without_a_preference():
    agent = make("CartPole-v1")
    assert agent.policy(torch.randn(9, 4)).probs.sub(0.5).abs().max() < 0.02
    assert (make("ReinforcePoint-v0").actor.log_std == 0).all()


@pytest.mark.parametrize(
    ("env_id", "word"),
    [("ALE/Pong-v5", "images"), ("ReinforceTwo-v0", "MultiDiscrete"), ("ReinforceWhole-v0", "int64")],
)
def test_other_spaces_are_refused_by_name_and_ppo_is_named_where_it_can_use_them(env_id, word, capsys):
    with pytest.raises(SystemExit) as end:
        make(env_id)
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert word in message
    assert "ppo.py" in message


@pytest.mark.parametrize("env_id", ["CartPole-v1", "InvertedPendulum-v5"])
def test_a_run_that_is_killed_and_goes_on_equals_one_that_is_not(env_id, tmp_path, monkeypatch):
    flags = {"env_id": env_id, "total_timesteps": 2000, "num_envs": 2, "num_steps": 30, "eval_episodes": 1,
             "checkpoint_frequency": 500, "eval_frequency": 400}  # fmt: skip
    reinforce.train(reinforce.Args(run_dir=str(tmp_path / "whole"), **flags))
    update, calls = reinforce.update, []

    def dying(*args):
        calls.append(1)
        if len(calls) == 8:
            raise RuntimeError("killed")
        return update(*args)

    monkeypatch.setattr(reinforce, "update", dying)
    with pytest.raises(RuntimeError, match="killed"):
        reinforce.train(reinforce.Args(run_dir=str(tmp_path / "killed"), **flags))
    (tmp_path / "killed" / ".lock").unlink()
    reinforce.train(reinforce.Args(run_dir=str(tmp_path / "killed"), resume=True, **flags))
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
    one, other = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("baseline", ["none", "mean", "value"])
def test_learns_a_bandit(baseline):
    args = reinforce.Args(env_id="ReinforceArms-v0", total_timesteps=2048, num_envs=4, num_steps=8, eval_episodes=1,
                          baseline=baseline)  # fmt: skip
    reinforce.train(args)
    assert rows(reinforce.Path(args.run_dir))[-1]["eval/episodic_return"] == 12


@pytest.mark.parametrize("limit", [None, 2])
def test_learns_the_values_of_a_row_of_states(limit, monkeypatch):
    """Also where a time limit ends every episode after two steps: what follows is bootstrapped."""
    monkeypatch.setattr(Row, "LIMIT", limit)
    args = reinforce.Args(env_id="ReinforceRow-v0", total_timesteps=16_384, num_envs=4, num_steps=64,
                          gamma=0.9, eval_episodes=1)  # fmt: skip
    reinforce.train(args)
    agent = make("ReinforceRow-v0")
    agent.load_state_dict(weights(reinforce.Path(args.run_dir)))
    assert agent.value(torch.eye(4)).tolist() == pytest.approx([0.9**3, 0.9**2, 0.9, 1], abs=0.02)


def test_sends_nothing_outside_of_the_box():
    RECEIVED.clear()
    reinforce.train(reinforce.Args(env_id="ReinforcePoint-v0", total_timesteps=512, **TINY))
    received = np.stack(RECEIVED)
    assert (received >= Point.action_space.low).all()
    assert (received <= Point.action_space.high).all()
    assert (received == Point.action_space.high).any(), "the noise did reach over the edge"


def test_learns_a_point():
    args = reinforce.Args(env_id="ReinforceAnywhere-v0", total_timesteps=8192, num_steps=4, eval_episodes=1)
    reinforce.train(args)
    assert rows(reinforce.Path(args.run_dir))[-1]["eval/episodic_return"] > -0.5  # -20 at first


def test_learns_cartpole():
    args = reinforce.Args(total_timesteps=40_000, eval_frequency=40_000)
    reinforce.train(args)
    assert rows(reinforce.Path(args.run_dir))[-1]["eval/episodic_return"] >= 400
