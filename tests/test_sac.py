"""What sac.py does not share with td3.py, but some of it with her.py. What is td3.py's too is in test_td3.py."""

import copy
import math

import numpy as np
import pytest
import torch
from test_td3 import (
    HIGH,
    LOW,
    adam_by_hand,
    assert_same_parameters,
    critic_by_hand,
    layers_by_hand,
    make_agent,
    make_learner,
    random_batch,
    step,
)

from algorithms import her, sac

both = pytest.mark.parametrize("script", [sac, her], ids=["sac", "her"])


@both
def test_log_probabilities_are_those_of_a_squashed_normal(script):
    torch.manual_seed(0)
    mean, log_std, noise = torch.randn(3, 50, 4, dtype=torch.float64)
    actions, log_prob = script.squashed_normal(mean, log_std, noise)
    normal = torch.distributions.Normal(mean, log_std.exp())
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform(cache_size=1))
    inside = actions.clamp(-1 + 1e-9, 1 - 1e-9)
    torch.testing.assert_close(actions, (mean + log_std.exp() * noise).tanh())
    some = (actions.abs() < 0.999).all(1)
    assert some.sum() > 10
    torch.testing.assert_close(log_prob[some], squashed.log_prob(inside).sum(1)[some], atol=1e-6, rtol=1e-6)


@both
@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (0.7, -0.5), (-1.5, 0.3), (0.2, -2.0)])
def test_probabilities_integrate_to_one_over_asymmetric_boxes(script, mean, log_std):
    """Over each range of the box, by the trapezoid rule over the actions that the environment gets."""
    noise = torch.linspace(-9, 9, 20_001, dtype=torch.float64)[:, None]
    actions, log_prob = script.squashed_normal(torch.full_like(noise, mean), torch.full_like(noise, log_std), noise)
    for low, high in zip(LOW, HIGH, strict=True):
        agent = make_agent(script, 1, np.array([low], np.float64), np.array([high], np.float64))
        received = torch.from_numpy(agent.to_env(actions))[:, 0]
        density = log_prob.exp() / agent.scale.item()  # the density in the box: its ranges are scaled
        assert torch.trapezoid(density, received).item() == pytest.approx(1, abs=1e-4)
        expected = torch.trapezoid(density * received, received).item()
        sampled = agent.to_env((mean + math.exp(log_std) * torch.randn(200_000, 1, dtype=torch.float64)).tanh())
        assert expected == pytest.approx(sampled.mean(), abs=0.01 * float(high - low))


@both
def test_log_probabilities_stay_finite_and_exact_where_tanh_is_one(script):
    u = torch.tensor([[-300.0], [-40.0], [-10.0], [0.0], [10.0], [40.0], [300.0]], requires_grad=True)
    actions, log_prob = script.squashed_normal(u, torch.zeros_like(u), torch.zeros_like(u))
    assert actions[0] == -1
    log_cosh = u.double().abs() + torch.log1p((-2 * u.double().abs()).exp()) - math.log(2)
    expected = -0.5 * math.log(2 * math.pi) + 2 * log_cosh  # log(1 - tanh^2) = -2 log cosh
    torch.testing.assert_close(log_prob.double(), expected[:, 0], rtol=1e-6, atol=1e-6)
    log_prob.sum().backward()
    assert u.grad.isfinite().all()


@both
def test_samples_have_the_means_and_deviations_of_the_network_and_acting_has_none(script):
    torch.manual_seed(0)
    agent = make_agent(script)
    obs = torch.randn(1, 3)
    mean, log_std = agent.actor(obs).split(3, dim=1)
    with torch.no_grad():
        actions, log_prob = agent.sample(obs.expand(50_000, -1))
    u = actions.double().clamp(-1 + 1e-7, 1 - 1e-7).atanh()
    torch.testing.assert_close(u.mean(0).float(), mean[0].detach(), atol=0.03, rtol=0)
    torch.testing.assert_close(u.std(0).float(), log_std.exp()[0].detach(), atol=0.03, rtol=0)
    np.testing.assert_allclose(np.corrcoef(u.T), np.eye(3), atol=0.03)  # no two components share their noise
    assert log_prob.shape == (50_000,)
    expected = (LOW + HIGH) / 2 + (HIGH - LOW) / 2 * mean.tanh().detach().numpy()
    np.testing.assert_allclose(agent.act(obs.numpy()), expected, rtol=1e-5)


@both
@pytest.mark.parametrize(("value", "expected"), [(99, 2), (1.5, 1.5), (-19, -19), (-99, -20)])
def test_deviations_are_clamped(script, value, expected, monkeypatch):
    agent, noise = make_agent(script), torch.tensor([[0.5, -1.0, 2.0]])
    torch.nn.init.zeros_(agent.actor[4].weight)
    agent.actor[4].bias.data[:] = torch.tensor([0.1] * 3 + [value] * 3)
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    actions, log_prob = agent.sample(torch.zeros(1, 3))
    clamped = script.squashed_normal(torch.full((1, 3), 0.1), torch.full((1, 3), float(expected)), noise)
    torch.testing.assert_close((actions, log_prob), clamped)


@both
@pytest.mark.parametrize("autotune", [True, False])
def test_a_learning_step_is_that_of_its_equations(script, autotune, monkeypatch):
    """In float64, against the equations one by one."""
    learner = make_learner(script, gamma=0.9, tau=0.2, alpha=0.3, autotune=autotune, policy_lr=1e-3, q_lr=2e-3)
    learner.agent.double()
    for parameter in learner.agent.target_critics.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    obs, actions, rewards, terminated, next_obs = batch = [part.double() for part in random_batch(16)]
    mirror = copy.deepcopy(learner.agent)
    noises = list(torch.randn(2, 16, 3, dtype=torch.float64))
    waiting = iter(noises)
    monkeypatch.setattr(torch, "randn_like", lambda _: next(waiting))
    metrics = step(learner, batch)
    monkeypatch.undo()

    def pi(obs, noise):
        mean, log_std = layers_by_hand(mirror.actor, obs).split(3, dim=1)
        normal = torch.distributions.Normal(mean, log_std.exp())
        u = mean + log_std.exp() * noise
        return torch.tanh(u), (normal.log_prob(u) - torch.log(1 - torch.tanh(u) ** 2)).sum(1)

    alpha = mirror.log_alpha.exp().item()
    assert alpha == pytest.approx(0.3)
    next_actions, next_log_prob = pi(next_obs, noises[0])
    twins = [critic_by_hand(mirror.target_critics, i, next_obs, next_actions) for i in range(2)]
    y = (rewards + 0.9 * (1 - terminated) * (torch.minimum(*twins) - alpha * next_log_prob)).detach()
    losses = [((critic_by_hand(mirror.critics, i, obs, actions) - y) ** 2).mean() for i in range(2)]
    critic_parameters = list(mirror.critics.parameters())
    adam_by_hand(critic_parameters, torch.autograd.grad(sum(losses), critic_parameters), 2e-3)
    new_actions, log_prob = pi(obs, noises[1])
    twins = [critic_by_hand(mirror.critics, i, obs, new_actions) for i in range(2)]
    assert len({bool(first < second) for first, second in zip(*twins, strict=True)}) == 2, "each is once the smaller"
    actor_loss = (alpha * log_prob - torch.minimum(*twins)).mean()
    actor_parameters = list(mirror.actor.parameters())
    gradients = torch.autograd.grad(actor_loss, actor_parameters)
    adam_by_hand(actor_parameters, gradients, 1e-3)
    if autotune:
        loss = (-mirror.log_alpha.exp() * (log_prob.detach() - 3)).mean()  # H = -dim(a) = -3
        adam_by_hand([mirror.log_alpha], torch.autograd.grad(loss, [mirror.log_alpha]), 2e-3)
    for target, online in zip(mirror.target_critics.parameters(), critic_parameters, strict=True):
        target.data = 0.8 * target.data + 0.2 * online.data
    assert_same_parameters(learner.agent, mirror, atol=1e-8)
    assert metrics["losses/actor_loss"].item() == pytest.approx(actor_loss.item(), rel=1e-8)
    assert metrics["losses/entropy"].item() == pytest.approx(-log_prob.mean().item(), rel=1e-8)
    assert metrics["losses/alpha"].item() == pytest.approx(0.3)


@pytest.mark.parametrize(("log_std", "rises"), [(-6.0, True), (0.0, False)])
def test_temperature_rises_where_entropy_is_below_its_target_and_falls_above(log_std, rises):
    learner = make_learner(sac, policy_lr=0.0)
    torch.nn.init.zeros_(learner.agent.actor[4].weight)
    learner.agent.actor[4].bias.data[:] = torch.tensor([0.0] * 3 + [log_std] * 3)
    metrics = [step(learner, random_batch(64, seed=i)) for i in range(20)]
    assert (metrics[0]["losses/entropy"] < -3) == rises
    alphas = [row["losses/alpha"].item() for row in metrics]
    assert alphas == sorted(alphas, reverse=not rises)
    assert alphas[0] == pytest.approx(0.2)
    assert alphas[0] != alphas[-1]


def test_a_fixed_temperature_stays_and_may_be_zero():
    for alpha in 0.0, 0.7:
        learner = make_learner(sac, autotune=False, alpha=alpha)
        for i in range(3):
            metrics = step(learner, random_batch(seed=i))
            assert metrics["losses/alpha"].item() == pytest.approx(alpha)
            assert all(value.isfinite() for value in metrics.values())
        assert all(value.isfinite().all() for value in learner.agent.state_dict().values()), "no run saves others"
    with pytest.raises(sac.UsageError, match=r"--alpha 0 .* --no-autotune"):
        sac.Args(alpha=0.0)
