"""dqn.py against oracles: lists in place of the buffer, targets by hand, environments with known answers, and SB3."""

import copy
import io
import math
import os
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import rows

from algorithms import dqn

TINY = {"eval_episodes": 1, "device": "cpu", "learning_starts": 0, "train_frequency": 1, "batch_size": 16,
        "buffer_size": 500}  # fmt: skip
MADE, ECHOED = [], []  # by the environments below: themselves, actions


class Counter(gym.Env):
    """Observes step + 100 * episode; its n-th episode lasts LENGTHS[n % 3] steps and ends as ENDS[n % 3] says."""

    LENGTHS, ENDS = (3, 2, 4), ("terminated", "truncated", "truncated")
    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        self.episode, self.t, self.steps = -1, 0, 0
        MADE.append(self)

    def observe(self):
        return np.array([self.t + 100.0 * self.episode], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action):
        self.t, self.steps = self.t + 1, self.steps + 1
        over = self.t == self.LENGTHS[self.episode % 3]
        end = self.ENDS[self.episode % 3]
        return self.observe(), float(self.t), over and end == "terminated", over and end == "truncated", {}


class Film(Counter):
    """The same in pictures: their grey is 1 + step + 10 * episode, their lower half black."""

    LENGTHS = (7, 2, 6)
    observation_space = gym.spaces.Box(0, 255, (100, 90, 3), np.uint8)

    def observe(self):
        picture = np.full((100, 90, 3), 1 + self.t + 10 * self.episode, np.uint8)
        picture[50:] = 0
        return picture


class Bandit(gym.Env):
    """One step; the arms 5, 6, 7 pay 0, 1, 2."""

    observation_space = gym.spaces.Box(0, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(3, start=5)

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        ECHOED.append(int(action))
        return np.ones(1, np.float32), float(action - 5), True, False, {}


class Chain(gym.Env):
    """Four states in a row, one-hot. Action 1 goes on, and from the last one to the end, which pays 1; 0 stays."""

    observation_space = gym.spaces.Discrete(4)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.t = 0
        return self.state, {}

    def step(self, action):
        self.state, self.t = self.state + int(action), self.t + 1
        return min(self.state, 3), float(self.state == 4), self.state == 4, self.t == 10, {}


class Forever(gym.Env):
    """One state, whose every step pays 1, cut off after five: it is worth 1 / (1 - gamma)."""

    observation_space = gym.spaces.Box(0, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.ones(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.ones(1, np.float32), 1.0, False, self.t == 5, {}


for env in Counter, Film, Bandit, Chain, Forever:
    gym.register(f"Dqn{env.__name__}-v0", env, disable_env_checker=True)


@pytest.fixture
def no_evaluation(monkeypatch):
    monkeypatch.setattr(dqn, "evaluate", lambda *_: {"eval/episodic_return": 0.0})


@pytest.fixture
def updates(monkeypatch):
    """What train hands to update, and both networks' weights before it."""
    seen, update = [], dqn.update

    def spy(q_network, target_network, optimizer, batch, args):
        weights = [[p.detach().clone() for p in network.parameters()] for network in (q_network, target_network)]
        seen.append({"batch": batch, "q": weights[0], "target": weights[1], "lr": optimizer.param_groups[0]["lr"]})
        return update(q_network, target_network, optimizer, batch, args)

    monkeypatch.setattr(dqn, "update", spy)
    return seen


def make_network(num_actions=4, obs_shape=(3,), start=0, **flags):
    args = dqn.Args(**{"norm_obs": False} | flags)
    return dqn.make_agent(args, obs_shape, gym.spaces.Discrete(num_actions, start=start))


# What reaches the loss


@pytest.mark.parametrize("num_envs", [1, 3])
def test_what_reaches_the_loss_is_what_happened(num_envs, updates, no_evaluation):
    """Also across a checkpoint, which changes nothing."""
    args = dqn.Args(env_id="DqnCounter-v0", total_timesteps=14 * num_envs, num_envs=num_envs,
                    checkpoint_frequency=10 * num_envs, **TINY | {"batch_size": 64})  # fmt: skip
    dqn.train(args)
    happened = {  # observation, reward, terminated, next observation
        (0, 1, False, 1), (1, 2, False, 2), (2, 3, True, 3),
        (100, 1, False, 101), (101, 2, False, 102),
        (200, 1, False, 201), (201, 2, False, 202), (202, 3, False, 203), (203, 4, False, 204),
        (300, 1, False, 301), (301, 2, False, 302), (302, 3, True, 303),
        (400, 1, False, 401), (401, 2, False, 402),
    }  # fmt: skip
    learned = set()
    for update in updates:
        obs, actions, rewards, terminated, next_obs = update["batch"]
        assert obs.shape == next_obs.shape == (64, 1)
        assert actions.shape == rewards.shape == terminated.shape == (64,)
        columns = obs[:, 0].tolist(), rewards.tolist(), terminated.tolist(), next_obs[:, 0].tolist()
        learned |= set(zip(*columns, strict=True))
    assert learned == happened


def test_pictures_that_reach_the_loss_are_the_stacks_that_were_seen(updates, no_evaluation, monkeypatch):
    """Also after a resumption, where these environments begin with their first episode again: it can't be replayed."""
    seen, forward = [], dqn.QNetwork.forward

    def spy(network, obs):
        if len(obs) == 2:
            seen.append(obs.clone())
        return forward(network, obs)

    monkeypatch.setattr(dqn.QNetwork, "forward", spy)
    flags = {"env_id": "DqnFilm-v0", "num_envs": 2, "run_dir": "run"} | TINY | {"train_frequency": 4}
    dqn.train(dqn.Args(total_timesteps=20, **flags))  # in its second episode
    dqn.train(dqn.saved_args("run", resume=True, total_timesteps=60))
    stacks = {tuple(stack[:, 10, 0].tolist()) for stack in torch.cat(seen)}
    assert {(1, 1, 1, 1), (1, 1, 1, 2), (4, 5, 6, 7), (11, 11, 11, 12), (21, 21, 22, 23)} <= stacks
    learned = set()
    for update in updates:
        obs, _, rewards, terminated, next_obs = update["batch"]
        assert obs.dtype == torch.uint8
        assert obs.shape == next_obs.shape == (16, 4, 84, 84)
        assert torch.equal(next_obs[:, :3], obs[:, 1:])
        assert (obs[:, :, :40] == obs[:, :, :1, :1]).all()
        assert (obs[:, :, 44:] == 0).all()
        columns = obs[:, :, 10, 0].tolist(), rewards.tolist(), terminated.tolist(), next_obs[:, 3, 10, 0].tolist()
        learned |= {(tuple(stack), *rest) for stack, *rest in zip(*columns, strict=True)}
    assert {stack for stack, *_ in learned} <= stacks
    for stack, reward, end, following in learned:
        first = stack[3] - (stack[3] - 1) % 10  # of its episode
        assert stack == tuple(max(first, stack[3] - back) for back in (3, 2, 1, 0)), "pictures of one episode"
        assert following == stack[3] + 1, "the picture after the step, not the next episode's first one"
        assert reward == (following - 1) % 10
        assert end == (following % 30 == 8), "every third episode terminates"
    assert ((4, 5, 6, 7), 7, True, 8) in learned, "a terminated episode's last"
    assert ((11, 11, 11, 12), 2, False, 13) in learned, "a truncated episode's last"


# The buffer


def make_buffer(size, num_envs, obs_shape):
    args = dqn.Args(buffer_size=size, num_envs=num_envs, total_timesteps=num_envs)
    return dqn.ImageReplayBuffer(args, obs_shape) if len(obs_shape) == 3 else dqn.ReplayBuffer(args, obs_shape)


def make_held(num_envs):
    held = torch.nn.Module()
    held.register_buffer("actions", torch.zeros(num_envs, dtype=torch.int64))
    held.register_buffer("steps_left", torch.zeros(num_envs, dtype=torch.int64))
    return held


def play(buffer, num_envs, obs_shape, num_rows, mean_length, seed=0, restart_every=None):
    """Feeds random episodes to the buffer; returns them as a list of transitions, (row, environment) in order.

    restart_every: of so many rows. Then new episodes begin without an end of the old ones, as where a run is resumed.
    """
    rng = np.random.default_rng(seed)
    images = len(obs_shape) == 3

    def frame():
        return rng.integers(256, size=obs_shape[1:], dtype=np.uint8) if images else rng.random(obs_shape, np.float32)

    def first():
        return np.stack([frame()] * obs_shape[0]) if images else frame()

    history, ended = [], np.ones(num_envs, bool)
    obs = np.zeros((num_envs, *obs_shape), np.uint8 if images else np.float32)
    for t in range(num_rows):
        for i in range(num_envs):
            if ended[i] or (restart_every and t % restart_every == i):
                obs[i] = first()
        actions, rewards = rng.integers(7, size=num_envs), rng.random(num_envs)
        terminated, truncated = rng.random((2, num_envs)) < 0.5 / mean_length
        next_obs = np.stack([np.concatenate([o[1:], frame()[None]]) if images else frame() for o in obs])
        for i in range(num_envs):
            history.append((obs[i].copy(), actions[i], np.float32(rewards[i]), terminated[i], next_obs[i].copy()))
        names = "obs", "actions", "rewards", "terminated", "next_obs"
        given = [x.copy() for x in (obs, actions, rewards, terminated, next_obs)]
        buffer.add(**dict(zip(names, given, strict=True)))
        for array in given:
            array[:] = 0  # an environment may overwrite what it has returned
        obs, ended = next_obs, terminated | truncated
    return history


@pytest.fixture
def every_transition(monkeypatch):
    """The whole buffer in order, by the function that samples from it."""

    def read(buffer):
        monkeypatch.setattr(torch, "randint", lambda low, high, _: torch.arange(low, high))
        batch = buffer.sample(1)
        monkeypatch.undo()
        return batch

    return read


@pytest.mark.parametrize("obs_shape", [(3,), (4, 5, 6)])
@pytest.mark.parametrize(("num_envs", "capacity"), [(1, 1), (1, 2), (2, 2), (3, 3), (8, 8), (1, 30), (3, 60), (4, 62)])
@pytest.mark.parametrize("mean_length", [1, 5, 10**9])
@pytest.mark.parametrize("restart_every", [None, 7])
def test_buffer_equals_a_list(obs_shape, num_envs, capacity, mean_length, restart_every, every_transition):
    for num_rows in 1, 5, capacity // num_envs, capacity // num_envs + 1, 3 * capacity + 1:
        buffer = make_buffer(capacity, num_envs, obs_shape)
        history = play(buffer, num_envs, obs_shape, num_rows, mean_length, restart_every=restart_every)
        batch = every_transition(buffer)
        kept = len(batch[0])
        for column, expected in zip(batch, zip(*history[-kept:], strict=True), strict=True):
            np.testing.assert_array_equal(column.numpy(), np.stack(expected))
        full = min(len(history), capacity)
        if len(obs_shape) == 1:
            assert kept == full
        assert full // 2 <= kept <= full, "an episode of one step has two images, the worst case"
        if mean_length == 10**9 and not restart_every:
            assert kept >= full - num_envs, "each first image takes the place of one transition"


def test_a_first_image_that_is_black_is_an_image(every_transition):
    """The buffer's memory is black too before anything is in it: as image number 0."""
    buffer, black = make_buffer(8, 1, (4, 5, 6)), np.zeros((1, 4, 5, 6), np.uint8)
    white = black.copy()
    white[:, 3] = 255
    step = {"actions": np.zeros(1, int), "rewards": np.zeros(1), "terminated": np.zeros(1, bool)}
    buffer.add(obs=black, next_obs=white, **step)
    obs, *_, next_obs = every_transition(buffer)
    np.testing.assert_array_equal(obs, black)
    np.testing.assert_array_equal(next_obs, white)


def test_buffer_samples_all_it_holds_evenly_and_anew(every_transition):
    torch.manual_seed(0)
    buffer = make_buffer(60, 3, (2,))
    play(buffer, 3, (2,), 100, mean_length=5)
    held = {tuple(obs.tolist()): 0 for obs in every_transition(buffer)[0]}
    batches = [buffer.sample(200) for _ in range(50)]
    for obs in torch.cat([batch[0] for batch in batches]):
        held[tuple(obs.tolist())] += 1
    expected = 50 * 200 / len(held)
    assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in held.values())
    assert not torch.equal(batches[0][0], batches[1][0])


@pytest.mark.parametrize("num_rows", [0, 3, 100])
@pytest.mark.parametrize("obs_shape", [(3,), (4, 5, 6)])
def test_buffer_is_saved_and_restored(obs_shape, num_rows, every_transition):
    buffer, other = make_buffer(60, 3, obs_shape), make_buffer(60, 3, obs_shape)
    play(buffer, 3, obs_shape, num_rows, mean_length=5)
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for b in buffer, other:
        play(b, 3, obs_shape, 4, mean_length=5, seed=1)
    for one, two in zip(every_transition(buffer), every_transition(other), strict=True):
        assert torch.equal(one, two)


def test_a_buffer_of_another_shape_is_not_restored():
    with pytest.raises(RuntimeError):
        make_buffer(60, 3, (4,)).load_state_dict(make_buffer(60, 3, (3,)).state_dict())


def count_bytes(monkeypatch):
    """Of the tensors that are made from now on, which get one row only."""
    made, zeros = [], torch.zeros

    def count(size, *shape, dtype=torch.float32):
        made.append(math.prod((size, *shape)) * dtype.itemsize)
        return zeros(1, *shape, dtype=dtype)

    monkeypatch.setattr(torch, "zeros", count)
    return made


def test_a_million_atari_transitions_take_less_than_7_5_gb(monkeypatch):
    made = count_bytes(monkeypatch)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 2**24, "SC_PAGE_SIZE": 2**12}[name])
    make_buffer(1_000_000, 8, (4, 84, 84))
    assert 7.056e9 < sum(made) < 7.5e9


def test_a_buffer_that_memory_cannot_hold_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 1000}[name])
    make_buffer(1000, 1, (10,))
    monkeypatch.setattr(torch, "zeros", None)
    with pytest.raises(dqn.UsageError, match=r"--buffer-size 100000 .* GB") as error:
        make_buffer(100_000, 1, (10,))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("obs_shape", [(3,), (4, 5, 6)])
def test_a_buffer_may_take_nine_tenths_of_the_memory(obs_shape, monkeypatch):
    """Of an image buffer, what does not grow with its size is not counted."""
    made = count_bytes(monkeypatch)
    make_buffer(10**6, 3, obs_shape)
    memory = math.ceil(sum(made) / 0.9)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": memory, "SC_PAGE_SIZE": 1}.get)
    make_buffer(10**6, 3, obs_shape)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": int(memory * 0.9999), "SC_PAGE_SIZE": 1}.get)
    with pytest.raises(dqn.UsageError):
        make_buffer(10**6, 3, obs_shape)


def test_windows_which_does_not_tell_its_memory_has_a_buffer(monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    make_buffer(60, 3, (3,))


# Targets, loss, update


def test_targets_by_hand():
    rewards, terminated = torch.tensor([1.0, 2, 3, 4]), torch.tensor([False, True, False, False])
    target_q = torch.tensor([[10.0, 20], [10, 20], [30, 20], [5, 7]])  # the third row's episode was truncated
    choosing_q = torch.tensor([[0.0, 1], [0, 1], [1, 0], [9, 8]])  # chooses otherwise in the last row
    targets = dqn.td_target(rewards, terminated, target_q, target_q, 0.5)
    assert targets.tolist() == [1 + 0.5 * 20, 2, 3 + 0.5 * 30, 4 + 0.5 * 7]
    targets = dqn.td_target(rewards, terminated, target_q, choosing_q, 0.5)
    assert targets.tolist() == [1 + 0.5 * 20, 2, 3 + 0.5 * 30, 4 + 0.5 * 5]


def test_loss_by_hand_and_as_the_mean_over_its_rows():
    q_values, actions = torch.tensor([[0.0, 1], [2, 0], [5, 5], [0, 0]]), torch.tensor([1, 0, 0, 1])
    targets = torch.tensor([1.5, 0, 5, -4])
    loss, values = dqn.q_loss(q_values, actions, targets, huber=False)
    assert values.tolist() == [1, 2, 5, 0]
    assert loss.item() == pytest.approx((0.5**2 + 2**2 + 0 + 4**2) / 4)
    clipped, values = dqn.q_loss(q_values, actions, targets, huber=True)
    assert values.tolist() == [1, 2, 5, 0]
    assert clipped.item() == pytest.approx((0.5**2 / 2 + 1.5 + 0 + 3.5) / 4)
    for huber, whole in (False, loss), (True, clipped):
        singles = [(q_values[i : i + 1], actions[i : i + 1], targets[i : i + 1]) for i in range(4)]
        assert whole.item() == pytest.approx(np.mean([dqn.q_loss(*row, huber)[0].item() for row in singles]))


def test_huber_loss_clips_the_error():
    q_values = torch.tensor([[-30.0], [-0.5], [0.25], [8]], requires_grad=True)
    loss, _ = dqn.q_loss(q_values, torch.zeros(4, dtype=torch.long), torch.zeros(4), huber=True)
    loss.backward()
    assert (4 * q_values.grad).flatten().tolist() == [-1, -0.5, 0.25, 1]


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(AssertionError):
        dqn.q_loss(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), torch.zeros(4, 1), False)
    with pytest.raises(AssertionError):
        dqn.td_target(torch.zeros(4, 1), torch.zeros(4, dtype=torch.bool), torch.zeros(4, 2), torch.zeros(4, 2), 0.9)


def random_batch(num=32, dim=4):
    return (torch.randn(num, dim), torch.randint(2, (num,)), torch.randn(num) * 3, torch.rand(num) < 0.3,
            torch.randn(num, dim))  # fmt: skip


def two_networks(args):
    return [dqn.make_agent(args, (4,), gym.spaces.Discrete(2)) for _ in range(2)]


@pytest.mark.parametrize("double_q", [True, False])
@pytest.mark.parametrize(("dueling", "max_grad_norm"), [(True, None), (False, 1e3), (False, 0.3)])
def test_update_is_a_gradient_step_on_the_loss(double_q, dueling, max_grad_norm):
    torch.manual_seed(0)
    args = dqn.Args(double_q=double_q, dueling=dueling, gamma=0.9, max_grad_norm=max_grad_norm)
    q_network, target_network = two_networks(args)
    optimizer = torch.optim.SGD(q_network.parameters(), 0.1)
    dqn.update(q_network, target_network, optimizer, random_batch(), args)  # its gradient must not come in again
    mirror, target_before = copy.deepcopy(q_network), copy.deepcopy(target_network.state_dict())
    batch = obs, actions, rewards, terminated, next_obs = random_batch()
    metrics = dqn.update(q_network, target_network, optimizer, batch, args)

    expected, disagreements, mean_value = 0.0, 0, 0.0
    for i in range(32):
        ours, theirs = mirror(next_obs[i]), target_network(next_obs[i])
        disagreements += ours.argmax() != theirs.argmax()
        future = theirs[ours.argmax()] if double_q else theirs.max()
        error = mirror(obs[i])[actions[i]] - rewards[i] - (0 if terminated[i] else 0.9 * future.item())
        expected = expected + error**2 / 32
        mean_value += mirror(obs[i])[actions[i]].item() / 32
    assert disagreements > 0, "else Double DQN would not differ"
    assert metrics["losses/td_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["losses/q_values"].item() == pytest.approx(mean_value, abs=1e-5)
    gradient = torch.autograd.grad(expected, [*mirror.parameters()])
    norm = torch.cat([slope.flatten() for slope in gradient]).norm().item()
    assert norm > 0.3, "else nothing would be clipped"
    if max_grad_norm is None:
        assert "losses/grad_norm" not in metrics, "it takes time, and is only needed for clipping"
    else:
        assert metrics["losses/grad_norm"].item() == pytest.approx(norm, rel=1e-5), "before clipping"
    scale = min(1, (max_grad_norm or math.inf) / norm)
    for ours, theirs, slope in zip(q_network.parameters(), mirror.parameters(), gradient, strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * scale * slope, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(value, target_before[name]) for name, value in target_network.state_dict().items())
    assert all(parameter.grad is None for parameter in target_network.parameters())


def test_update_equals_that_of_stable_baselines3(monkeypatch):
    sb3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    torch.manual_seed(0)
    args = dqn.Args(double_q=False, gamma=0.97, huber=True, max_grad_norm=0.1, norm_obs=False)
    q_network, target_network = two_networks(args)
    peer = sb3.DQN("MlpPolicy", "CartPole-v1", gamma=0.97, device="cpu", batch_size=32, max_grad_norm=0.1,
                   policy_kwargs={"net_arch": [128, 128]})  # fmt: skip
    for theirs, ours in (peer.q_net, q_network), (peer.q_net_target, target_network):
        theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    batch = obs, actions, rewards, terminated, next_obs = random_batch()
    columns = actions.unsqueeze(1), next_obs, terminated.float().unsqueeze(1), rewards.unsqueeze(1)
    monkeypatch.setattr(peer.replay_buffer, "sample", lambda *_, **__: ReplayBufferSamples(obs, *columns))
    peer.learn(0)  # makes its logger
    peer.policy.optimizer = torch.optim.SGD(peer.q_net.parameters(), 0.1)
    monkeypatch.setattr(peer, "_update_learning_rate", lambda *_: None)
    peer.train(gradient_steps=1, batch_size=32)
    optimizer = torch.optim.SGD(q_network.parameters(), 0.1)
    metrics = dqn.update(q_network, target_network, optimizer, batch, args)
    assert metrics["losses/grad_norm"] > args.max_grad_norm
    assert metrics["losses/td_loss"].item() == pytest.approx(peer.logger.name_to_value["train/loss"], rel=1e-5)
    for ours, theirs in zip(q_network.parameters(), peer.q_net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


# Networks


def test_dueling_adds_a_value_to_advantages_whose_mean_is_zero():
    torch.manual_seed(0)
    network, obs = make_network(3, (8,), dueling=True), torch.randn(5, 8)
    hidden = network.hidden(obs)
    values, advantages = network.value(hidden), network.head(hidden)
    for i, a in np.ndindex(5, 3):
        expected = values[i, 0] + advantages[i, a] - sum(advantages[i]) / 3
        assert network(obs)[i, a].item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(network(obs).mean(-1), values[:, 0])
    plain = make_network(3, (8,))
    assert torch.equal(plain(obs), plain.head(plain.hidden(obs)))


def test_hidden_layers_of_vectors_begin_with_biases():
    """Without, the network is linear in the length of a state, learns nothing at 0, and diverges on CartPole."""
    network = make_network(obs_shape=(5,))
    assert all((layer.bias != 0).all() for layer in (network.hidden[0], network.hidden[2]))


def test_images_are_scaled():
    images, network = torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8), make_network(3, (4, 84, 84))
    torch.testing.assert_close(network(images), network.head(network.hidden(images.float() / 255)))
    assert network(images).shape == (2, 3)


def test_normaliser_has_seen_what_the_environments_showed_and_serves_both_networks(updates, no_evaluation, monkeypatch):
    networks, update = [], dqn.update

    def updating(q_network, target_network, *others):
        networks.append((q_network, target_network, q_network.obs_stats.mean.item()))
        return update(q_network, target_network, *others)

    monkeypatch.setattr(dqn, "update", updating)
    dqn.train(dqn.Args(env_id="DqnCounter-v0", total_timesteps=26, num_envs=2, norm_obs=True, run_dir="run", **TINY))
    shown = [1, 2, 100, 101, 200, 201, 202, 203, 300, 301, 302, 400, 401]  # after each step, to be acted on next
    assert networks[0][2] == 1, "before a gradient step it knows the newest observations"
    network, obs = dqn.load("run"), torch.tensor([[2.0], [101.0], [304.0]])
    assert network.obs_stats.count == 26
    assert network.obs_stats.mean.item() == pytest.approx(np.mean(shown), rel=1e-5)
    assert network.obs_stats.var.item() == pytest.approx(np.var(shown), rel=1e-5)
    plain = copy.deepcopy(network)
    plain.obs_stats = torch.nn.Identity()
    seen = (obs - np.mean(shown)) / np.std(shown)
    torch.testing.assert_close(network(obs), plain(seen), rtol=1e-4, atol=1e-4)
    q_network, target_network, _ = networks[-1]
    assert target_network.obs_stats is q_network.obs_stats


def test_acting_takes_the_best_action_as_the_environment_counts():
    torch.manual_seed(0)
    network, obs = make_network(4, (3,), start=5), torch.randn(20, 3)
    best = [max(range(4), key=lambda a: network(obs)[i, a].item()) for i in range(20)]
    assert network.act(obs.numpy()).tolist() == [5 + a for a in best]
    single = network.act(obs[7].numpy())
    assert single.shape == ()
    assert single == 5 + best[7]
    assert len(set(best)) > 1


# Exploration


def test_epsilon_greedy():
    torch.manual_seed(0)
    q_values = torch.randn(4000, 4)
    greedy = q_values.argmax(-1)
    assert torch.equal(dqn.explore(q_values, 0.0, None, dqn.Args()), greedy)
    for epsilon in 0.3, 1.0:
        actions = dqn.explore(q_values, epsilon, None, dqn.Args())
        assert (actions == greedy).float().mean().item() == pytest.approx(1 - 0.75 * epsilon, abs=0.03)
        others = (actions[actions != greedy] - greedy[actions != greedy]) % 4
        assert (others.bincount(minlength=4)[1:] / len(others)).tolist() == pytest.approx([1 / 3] * 3, abs=0.06)


def test_boltzmann():
    torch.manual_seed(0)
    args, one = dqn.Args(exploration="boltzmann"), torch.tensor([[1.0, -1.0, 2.0, 0.0]])
    for temperature in 0.5, 3.0:
        frequencies = dqn.explore(one.repeat(20_000, 1), temperature, None, args).bincount(minlength=4) / 20_000
        assert frequencies.tolist() == pytest.approx(torch.softmax(one[0] / temperature, 0).tolist(), abs=0.015)
    q_values = torch.randn(100, 4)
    assert torch.equal(dqn.explore(q_values, 0.0, None, args), q_values.argmax(-1))


def test_ez_greedy_holds_random_actions():
    torch.manual_seed(0)
    args, num_envs = dqn.Args(exploration="ez-greedy"), 4000
    q_values, held, taken = torch.randn(num_envs, 6), make_held(num_envs), []
    greedy = q_values.argmax(-1)
    for epsilon in [1.0] + [0.0] * 40:  # all begin at once, and nothing begins afterwards
        taken.append(dqn.explore(q_values, epsilon, held, args))
    taken = torch.stack(taken)
    assert (taken[0].bincount(minlength=6) / num_envs).tolist() == pytest.approx([1 / 6] * 6, abs=0.03)
    chosen = taken[0] != greedy  # where holding can be told from acting greedily
    same = (taken == taken[0]).long().cumprod(0)[:, chosen].bool()
    assert (taken[:, chosen] == torch.where(same, taken[0, chosen], greedy[chosen])).all(), "held, then greedy for good"
    durations = same.sum(0).numpy()
    for n in 1, 2, 3, 4:  # P(n) = 6 / (pi n)^2
        assert np.mean(durations == n) == pytest.approx(6 / (math.pi * n) ** 2, abs=0.03)
    assert np.mean(durations > 40) == pytest.approx(1 - sum(6 / (math.pi * n) ** 2 for n in range(1, 41)), abs=0.01)

    held.actions[:], held.steps_left[:] = 2, 3
    for _ in range(3):  # nothing begins before the held action has ended
        assert (dqn.explore(q_values, 1.0, held, args) == 2).all()
    assert (dqn.explore(q_values, 1.0, held, args) == 2).float().mean() < 0.3


def test_ez_greedy_lets_go_at_the_end_of_an_episode_in_its_environment_alone(monkeypatch, no_evaluation):
    """The second environment begins with its episode 1."""
    MADE.clear()
    seen, explore, make_env = [], dqn.explore, dqn.make_env

    def staggered(*args, **kwargs):
        env = make_env(*args, **kwargs)
        env.unwrapped.episode = len(MADE) - 2
        return env

    def spy(q_values, epsilon, held, args):
        seen.append(held.steps_left.clone())
        actions = explore(q_values, epsilon, held, args)
        held.steps_left[:] = 1000  # held for good, but for the episode's end
        return actions

    monkeypatch.setattr(dqn, "explore", spy)
    monkeypatch.setattr(dqn, "make_env", staggered)
    dqn.train(dqn.Args(env_id="DqnCounter-v0", num_envs=2, exploration="ez-greedy", total_timesteps=40, **TINY))
    let_go = [[step for step, steps_left in enumerate(seen) if steps_left[i] == 0] for i in range(2)]
    assert let_go == [[0, 3, 5, 9, 12, 14, 18], [0, 2, 6, 9, 11, 15, 18]]


def test_the_environment_gets_the_actions_that_are_learned_from_counted_from_its_own_start(updates, no_evaluation):
    ECHOED.clear()
    dqn.train(dqn.Args(env_id="DqnBandit-v0", total_timesteps=60, num_envs=2, **TINY))
    assert set(ECHOED) == {5, 6, 7}
    for update in updates:
        _, actions, rewards, terminated, _ = update["batch"]
        assert torch.equal(actions, rewards.long())
        assert terminated.all()


def test_actions_are_those_of_the_network_that_learns_and_not_of_its_target(monkeypatch, no_evaluation):
    acting, learning, forward, update = [], [], dqn.QNetwork.forward, dqn.update

    def spy(network, obs):
        if len(obs) == 2:
            acting.append(network)
        return forward(network, obs)

    monkeypatch.setattr(dqn.QNetwork, "forward", spy)
    monkeypatch.setattr(dqn, "update", lambda *args: (learning.append(args[0]), update(*args))[1])
    dqn.train(dqn.Args(env_id="DqnCounter-v0", total_timesteps=10, num_envs=2, **TINY))
    assert len(acting) == 5
    assert len(set(acting + learning)) == 1


def test_linear_schedule_at_both_ends():
    assert [dqn.linear_schedule(1.0, 0.2, 40, step) for step in (0, 10, 20, 40, 41, 1000)] == pytest.approx(
        [1, 0.8, 0.6, 0.2, 0.2, 0.2]
    )
    assert dqn.linear_schedule(1.0, 0.2, 0, 1) == pytest.approx(0.2)


def test_epsilon_and_learning_rate_over_a_run(monkeypatch, no_evaluation):
    seen, explore = {}, dqn.explore

    def spy(q_values, epsilon, held, args):
        seen[len(seen) * 2] = epsilon
        return explore(q_values, epsilon, held, args)

    monkeypatch.setattr(dqn, "explore", spy)
    schedule = {"start_e": 0.9, "end_e": 0.1, "learning_rate": 1.0, "exploration_fraction": 0.5}
    dqn.train(dqn.Args(env_id="DqnCounter-v0", total_timesteps=4000, num_envs=2, run_dir="run", **schedule,
                       **TINY | {"train_frequency": 5, "learning_starts": 500}))  # fmt: skip
    assert [seen[step] for step in (0, 1000, 2000, 3998)] == pytest.approx([0.9, 0.5, 0.1, 0.1])
    logged = [row for row in rows(Path("run")) if "charts/epsilon" in row]
    assert [row["global_step"] for row in logged] == [1500, 2500, 3500], "every 200 gradient steps"
    assert [row["charts/epsilon"] for row in logged] == pytest.approx([0.3, 0.1, 0.1], abs=0.001)
    assert [row["charts/learning_rate"] for row in logged] == pytest.approx([0.625, 0.375, 0.125], abs=0.001)
    assert all(row["charts/SPS"] > 0 for row in logged)


def test_learning_rate_stays_without_annealing(updates, no_evaluation):
    for anneal in True, False:
        updates.clear()
        dqn.train(dqn.Args(env_id="DqnCounter-v0", total_timesteps=20, num_envs=1, learning_rate=0.5, anneal_lr=anneal,
                           **TINY))  # fmt: skip
        expected = [0.5 * (1 - step / 20 * anneal) for step in range(20)]
        assert [update["lr"] for update in updates] == pytest.approx(expected)


# Counts


@pytest.mark.parametrize("num_envs", [1, 3, 4])
@pytest.mark.parametrize("train_frequency", [1, 5, 8])
@pytest.mark.parametrize("learning_starts", [0, 30])
def test_one_gradient_step_for_every_so_many_transitions(num_envs, train_frequency, learning_starts, updates,
                                                         no_evaluation):  # fmt: skip
    flags = TINY | {"train_frequency": train_frequency, "learning_starts": learning_starts, "checkpoint_frequency": 48}
    dqn.train(dqn.Args(env_id="DqnCounter-v0", total_timesteps=240, num_envs=num_envs, **flags))
    assert len(updates) == (240 - learning_starts) // train_frequency


@pytest.mark.parametrize(("num_envs", "train_frequency", "frequency", "tau"),
                         [(1, 1, 1, 0.3), (3, 1, 4, 1.0), (4, 2, 3, 0.5), (2, 5, 4, 1.0)])  # fmt: skip
def test_target_network_follows_every_so_many_gradient_steps(num_envs, train_frequency, frequency, tau, updates,
                                                             no_evaluation):  # fmt: skip
    dqn.train(dqn.Args(env_id="DqnCounter-v0", total_timesteps=120, num_envs=num_envs, checkpoint_frequency=60,
                       target_network_frequency=frequency, tau=tau, **TINY | {"train_frequency": train_frequency})
              )  # fmt: skip
    assert len(updates) == 120 // train_frequency
    assert all(torch.equal(q, target) for q, target in zip(updates[0]["q"], updates[0]["target"], strict=True))
    for done in range(1, len(updates)):
        before, after = updates[done - 1], updates[done]
        for old, new, q in zip(before["target"], after["target"], after["q"], strict=True):
            torch.testing.assert_close(new, old + tau * (q - old) if done % frequency == 0 else old)
        assert any(not torch.equal(x, y) for x, y in zip(before["q"], after["q"], strict=True))


@pytest.mark.parametrize("num_envs", [1, 2, 3])
def test_steps_are_transitions_and_each_episode_is_logged_once(num_envs, tmp_path, no_evaluation):
    MADE.clear()
    total = 27 * num_envs
    dqn.train(dqn.Args(env_id="DqnCounter-v0", total_timesteps=total, num_envs=num_envs, checkpoint_frequency=total,
                       run_dir=str(tmp_path / "run"), **TINY))  # fmt: skip
    assert sum(env.steps for env in MADE) == total
    episodes = [row for row in rows(tmp_path / "run") if "charts/episodic_return" in row]
    ends = [(3, 6), (5, 3), (9, 10), (12, 6), (14, 3), (18, 10), (21, 6), (23, 3), (27, 10)]  # (step, return) of one
    got = [(row["global_step"], row["charts/episodic_return"]) for row in episodes]
    assert got == [(step * num_envs, reward) for step, reward in ends for _ in range(num_envs)]
    assert [row["charts/episodic_length"] for row in episodes[::num_envs]] == [3, 2, 4] * 3


def test_logged_losses_and_values_are_those_of_every_200th_update(monkeypatch, no_evaluation):
    history, update = [], dqn.update
    monkeypatch.setattr(dqn, "update", lambda *args: (history.append(update(*args)), history[-1])[1])
    dqn.train(dqn.Args(env_id="DqnCounter-v0", total_timesteps=2000, num_envs=4, run_dir="run", max_grad_norm=1.0,
                       **TINY | {"train_frequency": 3}))  # fmt: skip
    logged = [row for row in rows(Path("run")) if "losses/td_loss" in row]
    assert [row["global_step"] for row in logged] == [600, 1200, 1800]
    for row, metrics in zip(logged, history[199::200], strict=True):
        for name in "losses/td_loss", "losses/q_values", "losses/grad_norm":
            assert row[name] == float(metrics[name])


# Spaces


@pytest.mark.parametrize("word", ["sac.py", "td3.py", "ppo.py"])
def test_other_actions_are_refused(word):
    with pytest.raises(dqn.UsageError, match=word):
        dqn.make_agent(dqn.Args(env_id="Pendulum-v1"), (3,), gym.spaces.Box(-2, 2, (1,)))


@pytest.mark.parametrize("flags", [{"tau": 1.1}, {"start_e": 1.1}, {"end_e": -0.1}, {"exploration_fraction": 1.1},
                                   {"buffer_size": 7}, {"batch_size": 0}, {"train_frequency": 0},
                                   {"learning_starts": -1}])  # fmt: skip
def test_numbers_out_of_range_are_refused(flags):
    with pytest.raises(dqn.UsageError, match=f"--{next(iter(flags)).replace('_', '-')} "):
        dqn.Args(**flags)
    dqn.Args(exploration="boltzmann", start_e=50.0)


def test_atari_learns_from_the_sign_and_logs_the_score(updates, no_evaluation):
    args = dqn.Args(env_id="ALE/SpaceInvaders-v5", total_timesteps=600, num_envs=2, checkpoint_frequency=600,
                    **TINY | {"train_frequency": 600, "batch_size": 200, "buffer_size": 600})  # fmt: skip
    dqn.train(args)
    (update,) = updates
    assert update["batch"][0].shape == (200, 4, 84, 84)
    assert set(update["batch"][2].tolist()) == {0, 1}


# Learning


COPIED = {"tau": 1.0, "target_network_frequency": 20, "learning_rate": 1e-3, "train_frequency": 2}  # a quick target


def test_learns_a_bandit():
    args = dqn.Args(env_id="DqnBandit-v0", total_timesteps=2000, num_envs=4, eval_episodes=1, learning_starts=100,
                    run_dir="run")  # fmt: skip
    assert dqn.train(args)["eval/episodic_return"] == 2
    assert dqn.load("run")(torch.ones(1)).tolist() == pytest.approx([0, 1, 2], abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"dueling": True}, {"double_q": False}, {"exploration": "boltzmann"}])
def test_learns_the_values_of_a_chain(flags):
    args = dqn.Args(env_id="DqnChain-v0", total_timesteps=6000, gamma=0.9, eval_episodes=1, end_e=0.5, run_dir="run",
                    **COPIED, **flags)  # fmt: skip
    assert dqn.train(args)["eval/episodic_length"] == 4
    q_values = dqn.load("run")(torch.eye(4))
    assert q_values[:, 1].tolist() == pytest.approx([0.9**3, 0.9**2, 0.9, 1], abs=0.03)
    assert q_values[:, 0].tolist() == pytest.approx([0.9**4, 0.9**3, 0.9**2, 0.9], abs=0.03)


def test_a_time_limit_is_no_terminal_state():
    args = dqn.Args(env_id="DqnForever-v0", total_timesteps=4000, gamma=0.8, eval_episodes=1, run_dir="run",
                    **COPIED)  # fmt: skip
    dqn.train(args)
    assert dqn.load("run")(torch.ones(1)).tolist() == pytest.approx([5, 5], abs=0.2)


@pytest.mark.slow
def test_learns_cartpole():
    args = dqn.Args(total_timesteps=24_000, eval_frequency=24_000)
    assert dqn.train(args)["eval/episodic_return"] >= 150


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"max_grad_norm": 0.3, "dueling": True}], ids=["default", "clipped"])
def test_compiled_gradient_steps_are_those_of_the_plain_code(tmp_path, flags):
    agents, steps = [], 50
    for compile_ in False, True:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run_dir = str(tmp_path / str(compile_))
        flags |= {"compile": compile_, "run_dir": run_dir, "eval_episodes": 1, "eval_frequency": 1000}
        dqn.train(dqn.Args(total_timesteps=100 + steps, learning_starts=100, num_envs=1, learning_rate=0.01, **flags))
        agents.append(dqn.load(run_dir).state_dict())
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == compile_, "one for all gradient steps, though the learning rate falls"
    for name, plain in agents[0].items():
        torch.testing.assert_close(agents[1][name], plain, atol=1e-4, rtol=1e-4, msg=name)
