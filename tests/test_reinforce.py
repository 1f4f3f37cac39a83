"""reinforce.py against gradients in closed form, sums by definition, hand-made episodes and known answers."""

import copy
import itertools
import types
from pathlib import Path

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
            torch.from_numpy(rng.normal(size=(length + 1, obs_dim)).astype(np.float32)),
            torch.from_numpy(rng.integers(num_actions, size=length)),
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
        assert list(advantages[i]) == ["none", "mean", "value"]
        assert all(advantage.shape == (len(episode.rewards),) for advantage in advantages[i].values())
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
            np.testing.assert_allclose([row[t] for row in advantages[i].values()], expected, atol=1e-5)
    assert not episodes[-1].terminated
    assert not np.isclose(values[-1][-1], 0)


def test_a_single_episode_has_no_mean_to_subtract():
    (advantage,) = reinforce.subtract_baselines(random_episodes(lengths=(4,)), [torch.zeros(5)], 0.9)
    torch.testing.assert_close(advantage["mean"], advantage["none"])


LOGITS, PAYS = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64), (10.0, 11.0, 12.5)


class Softmax(torch.nn.Module):
    """A policy of three logits, which does not look at its observation."""

    def __init__(self):
        super().__init__()
        self.actor = torch.nn.Module()
        self.actor.logits = torch.nn.Parameter(LOGITS.clone())

    def policy(self, obs):
        return torch.distributions.Categorical(logits=self.actor.logits.expand(len(obs), -1))


def test_expected_gradient_of_a_bandit_is_the_one_in_closed_form_under_every_baseline_and_its_variance_is_lower():
    """All outcomes of two episodes, weighted by their probabilities: no sampling, so equality is exact."""
    probs = LOGITS.softmax(-1)
    pays = torch.tensor(PAYS, dtype=torch.float64)
    gradient = probs * (pays - probs @ pays)  # of the expected reward, by the logits
    values = [torch.tensor([probs @ pays, 99.0])] * 2
    mean, square, measured = torch.zeros(3, 3), torch.zeros(3), torch.zeros(3)
    for arms in itertools.product(range(3), repeat=2):
        probability = probs[list(arms)].prod()
        episodes = [Episode(torch.ones(2, 1), torch.tensor([a]), [PAYS[a]], terminated=True) for a in arms]
        advantages = reinforce.subtract_baselines(episodes, values, 1.0)
        agent, estimates = Softmax(), []
        for name in ("none", "mean", "value"):
            log_prob = agent.policy(torch.ones(2, 1)).log_prob(torch.tensor(arms))
            objective = reinforce.objective(log_prob, torch.cat([of_each[name] for of_each in advantages]), 2)
            estimates.append(torch.autograd.grad(objective, agent.actor.logits)[0])
        mean = mean + probability * torch.stack(estimates)
        square = square + probability * torch.stack(estimates).square().sum(-1)
        variances = reinforce.gradient_variances(agent, episodes, advantages)
        measured = measured + probability * torch.tensor([*variances.values()], dtype=torch.float64)
    for expected in mean:
        torch.testing.assert_close(expected, gradient, atol=1e-6, rtol=1e-6)
    variance = square - mean.square().sum(-1)
    # what is measured is on average the variance; under "mean" two estimates share their returns, so it is not quite
    torch.testing.assert_close(measured[[0, 2]], variance[[0, 2]], atol=1e-6, rtol=1e-6)
    assert variance[0] > 40 * variance[1]
    assert variance[1] > 1.5 * variance[2]


def test_gradient_of_an_episode_is_the_sum_over_its_steps():
    torch.manual_seed(0)
    agent, advantages = make("CartPole-v1"), torch.randn(7)
    parameters, obs, actions = list(agent.actor.parameters()), torch.randn(7, 4), torch.randint(2, (7,))

    def gradient(rows):
        objective = reinforce.objective(agent.policy(obs[rows]).log_prob(actions[rows]), advantages[rows], 1)
        return torch.cat([g.flatten() for g in torch.autograd.grad(objective, parameters)])

    torch.testing.assert_close(gradient(range(7)), sum(gradient([t]) for t in range(7)), atol=1e-5, rtol=1e-4)
    with pytest.raises(AssertionError):
        reinforce.objective(torch.zeros(7, 1), advantages, 1)


def make(env_id, **flags):
    args = reinforce.Args(env_id=env_id, **flags)
    env = reinforce.make_env(args)
    return reinforce.make_agent(args, env.observation_space.shape, env.action_space)


def value(agent, obs):
    return agent.critic(obs).squeeze(-1)


def sgd(agent, rate=0.1, value_rate=0.0):
    return (
        torch.optim.SGD(agent.actor.parameters(), rate),
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
        values = [value(mirror, episode.observations) for episode in episodes]
    advantages = reinforce.subtract_baselines(episodes, values, 0.9)
    parameters, gradients, entropies = list(mirror.actor.parameters()), np.zeros((3, 3), object), []
    for i, episode in enumerate(episodes):
        logits = mirror.actor(episode.observations[:-1])
        log_probs = logits.log_softmax(-1)
        entropies += (-(log_probs.exp() * log_probs).sum(-1)).tolist()
        for k, name in enumerate(["none", "mean", "value"]):
            objective = sum(log_probs[t, a] * advantages[i][name][t] for t, a in enumerate(episode.actions))
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
        last = value(mirror, episode.observations[-1:]).item()
        last_value = 0.0 if episode.terminated else last
        obs.append(episode.observations[:-1])
        returns += [return_by_definition(episode, t, 0.9, last_value) for t in range(len(episode.rewards))]
    obs, returns = torch.cat(obs), torch.tensor(returns)
    before = value(mirror, obs).detach()
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


def run(**flags):
    """One run in Steps without checkpoints in between; its rows."""
    flags = {"env_id": "ReinforceSteps-v0", "checkpoint_frequency": 10**9, "run_dir": "run"} | TINY | flags
    reinforce.train(reinforce.Args(**flags))
    return rows(Path(flags["run_dir"]))


def told(episode):
    """(observations, rewards, terminated)"""
    return episode.observations[:, 0].tolist(), episode.rewards, episode.terminated


def whole_episode(n):
    length, end = Steps.LENGTHS[n % 3], Steps.ENDS[n % 3]
    steps = np.arange(length + 1)
    return (100.0 * n + steps).tolist(), steps[1:].astype(float).tolist(), end == "terminated"


@pytest.mark.parametrize("num_steps", [1, 3, 4, 5, 6, 10])
def test_a_batch_is_all_episodes_that_begin_in_its_first_steps(num_steps, batches):
    """Their lengths are 3, 2, 4, 3, 2, 4, ..."""
    MADE.clear()
    run(total_timesteps=60, num_steps=num_steps)
    following = 0
    for episodes, *_ in batches:
        began = 0  # steps of the batch before the episode that follows
        expected = []
        while began < num_steps:
            expected.append(whole_episode(following))
            began += Steps.LENGTHS[following % 3]
            following += 1
        assert list(map(told, episodes)) == expected
    assert len(batches) >= 4
    # the actions are those that the environment got
    (env,) = [env for env in MADE if env.steps >= 60]
    actions = [int(action) + 5 for episodes, *_ in batches for episode in episodes for action in episode.actions]
    assert env.actions[: len(actions)] == actions
    assert len(set(actions)) == 2


def test_each_action_is_chosen_for_its_own_observation(monkeypatch):
    """By a policy that says whether the observation is odd."""
    episodes = []

    def parity(agent, obs):
        return types.SimpleNamespace(sample=lambda: obs[:, 0].long() % 2)

    monkeypatch.setattr(reinforce.PolicyAndValue, "policy", parity)
    monkeypatch.setattr(reinforce, "update", lambda *args: episodes.extend(args[3]) or {})
    monkeypatch.setattr(reinforce, "evaluate", lambda *_: {"eval/episodic_return": 0.0})
    run(total_timesteps=24)
    assert episodes
    for episode in episodes:
        assert episode.actions.tolist() == [obs % 2 for obs in episode.observations[:-1, 0]]


def test_steps_are_transitions_and_each_episode_is_logged_once(batches):
    MADE.clear()
    log = run(total_timesteps=31)
    assert sum(env.steps for env in MADE) == 31
    assert log[-1]["global_step"] == 31
    lengths = [Steps.LENGTHS[n % 3] for n in range(10)]
    expected = [(step, n * (n + 1) / 2, n) for n, step in zip(lengths, np.cumsum(lengths), strict=True)]
    episodes = [row for row in log if "charts/episodic_return" in row]
    got = [(row["global_step"], row["charts/episodic_return"], row["charts/episodic_length"]) for row in episodes]
    assert got == expected


@pytest.mark.parametrize("baseline", ["none", "mean", "value"])
def test_a_batch_that_the_budget_cuts_off_is_not_learned_from(baseline, batches):
    """Its whole episodes would be the short ones. Batches of 5, 7 and 6 steps, then 4 that are lost."""
    log = run(total_timesteps=22, baseline=baseline)
    assert [sum(len(episode.rewards) for episode in episodes) for episodes, *_ in batches] == [5, 7, 6]
    assert [row["global_step"] for row in log if "losses/entropy" in row] == [5, 12, 18]


def test_learning_rate_goes_down_a_line_to_zero(batches):
    for anneal, expected in (True, [1 - 5 / 18, 1 - 12 / 18, 0]), (False, [1.0] * 3):
        log = run(total_timesteps=18, anneal_lr=anneal, learning_rate=1.0, run_dir=str(anneal))
        rates = [row["charts/learning_rate"] for row in log if "charts/learning_rate" in row]
        assert rates == pytest.approx(expected)
    *_, value_optimizer = batches[-1]
    assert value_optimizer.param_groups[0]["lr"] == reinforce.Args().value_learning_rate


def test_an_episode_that_could_not_be_repeated_ends_where_the_checkpoint_was(batches, monkeypatch):
    """Stopped after 6 steps, the third of the second batch; then the environment behaves in another way."""
    goes_on = reinforce.Run.goes_on
    monkeypatch.setattr(reinforce.Run, "goes_on", lambda self: self.global_step < 8 and goes_on(self))
    run(total_timesteps=40, checkpoint_frequency=1)
    monkeypatch.setattr(reinforce.Run, "goes_on", goes_on)
    assert len(batches) == 1
    reset = Steps.reset
    monkeypatch.setattr(Steps, "reset", lambda self, **kwargs: (reset(self, **kwargs)[0] + 1000, {}))
    reinforce.train(reinforce.saved_args("run", resume=True))
    first, second, *_ = batches[1][0]
    assert told(first) == ([200.0, 201.0, 202.0], [1.0, 2.0], False)
    assert second.observations[0, 0] >= 1000


def test_batches_survive_checkpoints():
    rng = np.random.default_rng(0)
    batch, other = reinforce.Batch(), reinforce.Batch()
    other.load_state_dict(batch.state_dict())
    assert not other
    for t in range(9):
        flags = np.array([t == 5]), np.array([t in (3, 5, 8)])
        obs, next_obs = rng.normal(size=(2, 1, 4)).astype(np.float32)
        batch.append((obs, rng.integers(2, size=1), rng.normal(size=1).astype(np.float32), next_obs, *flags))
    torch.save(batch.state_dict(), "file")
    other.load_state_dict(torch.load("file", weights_only=True))
    assert len(other) == 9
    for step, same in zip(batch, other, strict=True):
        for part, part_too in zip(step, same, strict=True):
            np.testing.assert_array_equal(part, part_too, strict=True)
    episodes = other.episodes("cpu")
    assert [len(episode.rewards) for episode in episodes] == [4, 2, 3]
    assert [episode.terminated for episode in episodes] == [False, True, False]
    np.testing.assert_array_equal(episodes[1].observations, np.concatenate([batch[4][0], batch[5][0], batch[5][3]]))


def test_discrete_policy_against_its_softmax():
    torch.manual_seed(0)
    agent, obs = make("ReinforceSteps-v0"), torch.randn(1, 1)
    torch.nn.init.normal_(agent.actor[-1].weight)
    probs = agent.actor(obs).softmax(-1)[0].detach()
    many = agent.policy(obs.expand(20_000, -1)).sample()
    torch.testing.assert_close(torch.bincount(many, minlength=2) / 20_000, probs, atol=0.015, rtol=0)
    assert agent.act(obs.numpy()).tolist() == [5 + probs.argmax().item()], "the environment counts from 5"


def test_box_bounds_are_mapped_to_plus_minus_one_and_respected():
    low, high = np.array([-1.0, 0.0, -5.0, -1e9]), np.array([3.0, 10.0, 0.0, 1e9])
    agent = reinforce.PolicyAndValue((3,), gym.spaces.Box(low, high, dtype=np.float64))
    for value, expected in (0, (1, 5, -2.5, 0)), (1, (3, 10, 0, 1)), (-1, (-1, 0, -5, -1)), (9, (3, 10, 0, 9)):
        np.testing.assert_allclose(agent.to_env(torch.full((1, 4), float(value)))[0], expected)
    half = gym.spaces.Box(np.array([0.0, -np.inf]), np.array([np.inf, 2.0]), dtype=np.float64)
    for value, expected in (0.5, (0.5, 0.5)), (9, (9, 2)), (-9, (0, -9)):  # not mapped, but respected
        actions = reinforce.PolicyAndValue((3,), half).to_env(torch.full((1, 2), float(value)))
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
    [("CarRacing-v3", "vector"), ("ReinforceTwo-v0", "MultiDiscrete"), ("ReinforceWhole-v0", "int64")],
)
def test_other_spaces_are_refused_by_name_and_ppo_is_named_where_it_can_use_them(env_id, word):
    with pytest.raises(reinforce.UsageError, match=word) as mistake:
        make(env_id)
    assert "ppo.py" in str(mistake.value)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "InvertedPendulum-v5"])
def test_a_run_that_dies_and_goes_on_equals_one_without_checkpoints(env_id, monkeypatch):
    """It dies in the midst of an episode, of a batch, and between two checkpoints."""
    flags = {"env_id": env_id, "total_timesteps": 1000, "num_steps": 60, "eval_frequency": 400}
    run(run_dir="whole", **flags)
    step, calls = reinforce.Run.step, []

    def dying(self, actions):
        calls.append(1)
        if len(calls) == 777:
            raise RuntimeError("killed")
        return step(self, actions)

    monkeypatch.setattr(reinforce.Run, "step", dying)
    with pytest.raises(RuntimeError, match="killed"):
        run(run_dir="killed", checkpoint_frequency=37, **flags)
    torch.manual_seed(99)  # whatever the process that goes on starts with
    run(run_dir="killed", checkpoint_frequency=37, resume=True, **flags)
    assert timeless(Path("killed")) == timeless(Path("whole"))
    one, other = weights(Path("killed")), weights(Path("whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("baseline", [pytest.param("none", marks=pytest.mark.slow), "mean", "value"])
def test_learns_a_bandit(baseline):
    log = run(env_id="ReinforceArms-v0", total_timesteps=2048, num_steps=32, baseline=baseline)
    assert log[-1]["eval/episodic_return"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 2])
def test_learns_the_values_of_a_row_of_states(limit, monkeypatch):
    """Also where a time limit ends every episode after two steps: what follows is bootstrapped."""
    monkeypatch.setattr(Row, "LIMIT", limit)
    run(env_id="ReinforceRow-v0", total_timesteps=8192, num_steps=128, gamma=0.9)
    agent = reinforce.load("run")
    assert value(agent, torch.eye(4)).tolist() == pytest.approx([0.9**3, 0.9**2, 0.9, 1], abs=0.02)


def test_sends_nothing_outside_of_the_box():
    RECEIVED.clear()
    run(env_id="ReinforcePoint-v0", total_timesteps=512)
    received = np.stack(RECEIVED)
    assert (received >= Point.action_space.low).all()
    assert (received <= Point.action_space.high).all()
    assert (received == Point.action_space.high).any(), "the noise did reach over the edge"


@pytest.mark.slow
def test_learns_a_point():
    log = run(env_id="ReinforceAnywhere-v0", total_timesteps=4096, num_steps=16)
    assert log[-1]["eval/episodic_return"] > -0.5  # -20 at first


@pytest.mark.slow
def test_learns_cartpole():
    result = reinforce.train(reinforce.Args(total_timesteps=40_000, eval_frequency=40_000))
    assert result["eval/episodic_return"] >= 400
