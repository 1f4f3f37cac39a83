"""td3.py, and what sac.py has in common with it, against oracles written from the papers and hand-made environments."""

import copy
import os
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import rows, timeless

from algorithms import her, sac, td3

TINY = {"eval_episodes": 1, "device": "cpu", "batch_size": 8, "learning_starts": 4}
LOW, HIGH = np.array([-1.0, 0.0, -5.0], np.float32), np.array([3.0, 10.0, 0.0], np.float32)
both = pytest.mark.parametrize("script", [td3, sac], ids=["td3", "sac"])

MADE, RECEIVED = [], []  # by the environments below: themselves, and the actions they were given


class Counter(gym.Env):
    """Observes step + 100 * episode; its n-th episode lasts LENGTHS[n % 3] steps and ends as ENDS[n % 3] says.

    The copies that train steps begin with episodes 0, 1, 2 and so on: they don't end together.
    """

    LENGTHS, ENDS = (3, 2, 4), ("terminated", "truncated", "truncated")
    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(LOW, HIGH)

    def __init__(self, render_mode=None):
        self.episode, self.t, self.steps = len(MADE) - 1, 0, 0
        MADE.append(self)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return np.array([100.0 * self.episode], np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        RECEIVED.append(action)
        self.t, self.steps = self.t + 1, self.steps + 1
        over = self.t == self.LENGTHS[self.episode % 3]
        end = self.ENDS[self.episode % 3]
        obs = np.array([self.t + 100.0 * self.episode], np.float32)
        return obs, float(self.t), over and end == "terminated", over and end == "truncated", {}


gym.register("BoxCounter-v0", Counter, disable_env_checker=True)


class Goal(gym.Env):
    """Observes three numbers, of which two are goals, and acts as the environment above."""

    number = gym.spaces.Box(-9, 9, (1,), np.float32)
    observation_space = gym.spaces.Dict(observation=number, achieved_goal=number, desired_goal=number)
    action_space = Counter.action_space

    def compute_reward(self, achieved, desired, info):
        return np.zeros(len(achieved))


class StartedError(Exception):
    """train has made all that it will need."""


def make_learner(script, seed=0, **flags):
    """The agent and the optimizers that train makes, for 3 observed numbers and actions from LOW to HIGH."""

    class Run:
        envs, obs_shape, action_space, device = [Goal()], (3,), Counter.action_space, "cpu"

        def __init__(self, args):
            torch.manual_seed(seed)

        def start(self, **parts):
            self.__class__.parts = parts
            raise StartedError

        def close(self):
            pass

    args = script.Args(**TINY | flags)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StartedError):
        patch.setattr(script, "Run", Run)
        script.train(args)
    optimizers = {name: part for name, part in Run.parts.items() if isinstance(part, torch.optim.Optimizer)}
    return types.SimpleNamespace(args=args, agent=Run.parts["model"], optimizers=optimizers, update=script.update)


def make_agent(script, obs_dim=3, low=LOW, high=HIGH):
    return script.make_agent(script.Args(), (obs_dim,), gym.spaces.Box(low, high, dtype=low.dtype))


def random_batch(size=8, obs_dim=3, action_dim=3, seed=0):
    """obs, actions, rewards, terminated, next_obs"""
    g = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randn(2, size, obs_dim, generator=g)
    actions, rewards = torch.rand(size, action_dim, generator=g) * 2 - 1, torch.randn(size, generator=g)
    return obs, actions, rewards, (torch.rand(size, generator=g) < 0.3).float(), next_obs


def step(learner, batch, number=1):
    numbers = [number] if learner.update is td3.update else []
    return learner.update(learner.agent, learner.optimizers, list(batch), *numbers, learner.args)


def layers_by_hand(net, x):
    """Layer by layer, without what follows the last one."""
    first, second, last = (layer for layer in net.modules() if isinstance(layer, torch.nn.Linear))
    for layer in first, second:
        x = torch.clamp(x @ layer.weight.T + layer.bias, min=0)
    return x @ last.weight.T + last.bias


def critic_by_hand(critics, i, obs, actions):
    """Q_i, (B,)"""
    return layers_by_hand(critics[i], torch.cat([obs, actions], 1))[:, 0]


def adam_by_hand(parameters, gradients, lr):
    """The first step of Adam, which hardly depends on a gradient's size: so it is kept, to be compared as well."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
        first, second = 0.1 * gradient / (1 - 0.9), 0.001 * gradient**2 / (1 - 0.999)
        parameter.data -= lr * first / (second.sqrt() + 1e-8)


def assert_same_parameters(module, expected, atol):
    for (name, parameter), other in zip(module.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
        if other.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, msg=lambda m, name=name: f"{name}, gradient: {m}")


# ---- The buffer ----


def add(buffer, *parts):
    buffer.add(**dict(zip(("obs", "actions", "rewards", "terminated", "next_obs"), parts, strict=True)))


def add_number(buffer, number):
    """A step of one environment, in which all is this number, or minus it, or half more."""
    one = np.full((1, 1), float(number))
    add(buffer, one.repeat(2, 1), -one.repeat(3, 1), one[0], np.array([False]), one.repeat(2, 1) + 0.5)


@both
@pytest.mark.parametrize("num_envs", [1, 2, 3])
def test_buffer_is_a_list_of_the_last_transitions(script, num_envs):
    rng, buffer, oracle = np.random.default_rng(0), script.ReplayBuffer(10, num_envs, 2, 3), []
    for _ in range(3 * 10 + 4):
        obs, actions, next_obs = (rng.normal(size=(num_envs, n)).astype(np.float32) for n in (2, 3, 2))
        rewards, terminated = rng.normal(size=num_envs), rng.random(num_envs) < 0.3  # float64, as environments give
        columns = obs, actions, rewards, terminated, next_obs
        add(buffer, *columns)
        oracle += [tuple(column[i].copy() for column in columns) for i in range(num_envs)]
        for array in columns:
            array[:] = 0  # what the caller does with them afterwards is its own affair
        torch.manual_seed(0)
        sample = buffer.sample(400)
        assert [tuple(part.shape) for part in sample] == [(400, 2), (400, 3), (400,), (400,), (400, 2)]
        assert all(part.dtype == torch.float32 for part in sample)
        seen = {tuple(np.hstack(row).astype(np.float32)) for row in zip(*(p.numpy() for p in sample), strict=True)}
        kept = 10 // num_envs * num_envs
        assert seen == {tuple(np.hstack(row).astype(np.float32)) for row in oracle[-kept:]}


@both
def test_buffer_samples_all_it_holds_alike(script):
    buffer = script.ReplayBuffer(100, 2, 1, 1)
    for i in range(5):
        number = np.array([[2 * i], [2 * i + 1]])
        add(buffer, number, number, np.zeros(2), np.zeros(2), number)
    torch.manual_seed(0)
    counts = torch.bincount(buffer.sample(20_000)[0][:, 0].long(), minlength=10)
    assert len(counts) == 10
    assert counts.min() > 1800
    assert counts.max() < 2200


@both
@pytest.mark.parametrize("steps", [4, 10, 23])
def test_buffer_is_saved_as_far_as_it_is_filled_and_goes_on_where_it_was(script, steps, tmp_path):
    buffer, other = script.ReplayBuffer(10, 1, 2, 3), script.ReplayBuffer(10, 1, 2, 3)
    for i in range(steps):
        add_number(buffer, i)
    torch.save(buffer.state_dict(), tmp_path / "file")
    assert len(torch.load(tmp_path / "file", weights_only=True)["obs"]) == min(steps, 10)
    other.load_state_dict(torch.load(tmp_path / "file", weights_only=True))
    for i in range(steps, steps + 5):
        add_number(buffer, i)
        add_number(other, i)
        for name, array in buffer.arrays.items():
            np.testing.assert_array_equal(array, other.arrays[name])
        torch.manual_seed(i)
        expected = buffer.sample(50)
        torch.manual_seed(i)
        for one, two in zip(expected, other.sample(50), strict=True):
            assert torch.equal(one, two)


@both
def test_a_checkpoint_of_a_big_buffer_is_small(script, tmp_path):
    buffer = script.ReplayBuffer(100_000, 1, 2, 3)
    for i in range(5):
        add_number(buffer, i)
    torch.save(buffer.state_dict(), tmp_path / "file")
    assert (tmp_path / "file").stat().st_size < 5_000


@both
def test_a_buffer_larger_than_the_memory_is_refused(script):
    with pytest.raises(script.UsageError, match=r"--buffer-size 1000000000000 needs 168000.0 GB; .* has \d+\.\d GB"):
        script.ReplayBuffer(10**12, 1, 17, 6)


@both
def test_a_buffer_may_take_nine_tenths_of_the_memory(script, monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 100, "SC_PAGE_SIZE": 10}.get)
    assert sum(array.nbytes for array in script.ReplayBuffer(45, 1, 1, 1).arrays.values()) == 900
    with pytest.raises(script.UsageError):
        script.ReplayBuffer(46, 1, 1, 1)


@pytest.mark.parametrize(
    ("script", "name"), [(td3, "ReplayBuffer"), (sac, "ReplayBuffer"), (her, "HindsightReplayBuffer")]
)
def test_where_the_memory_can_not_be_asked_for_a_buffer_is_made(script, name, monkeypatch):
    """On Windows."""
    monkeypatch.delattr(os, "sysconf")
    assert getattr(script, name)(46, 1, 1, 1).size == 46


# ---- Networks ----


@both
@pytest.mark.parametrize("n", [1, 2, 3])
def test_critics_are_separate_networks(script, n):
    critics, (obs, actions, *_) = make_learner(script, num_critics=n).agent.critics, random_batch(7)
    values = script.q_values(critics, obs, actions)
    assert values.shape == (n, 7)
    for i in range(n):
        torch.testing.assert_close(values[i], critic_by_hand(critics, i, obs, actions))
    values[0].sum().backward()
    for i, critic in enumerate(critics):
        for parameter, other in zip(critic.parameters(), critics[0].parameters(), strict=True):
            assert (parameter.grad.abs().sum() > 0) == (i == 0)
            assert i == 0 or not torch.equal(parameter, other)


@both
def test_actions_fill_an_asymmetric_box_and_never_leave_it(script):
    agent = make_agent(script, 2, LOW.reshape(3, 1), HIGH.reshape(3, 1))
    for value, expected in (-1, LOW), (0, (LOW + HIGH) / 2), (1, HIGH), (0.5, [2, 7.5, -1.25]):
        actions = agent.to_env(torch.full((2, 3), float(value)))
        assert actions.shape == (2, 3, 1)
        assert actions.dtype == np.float32
        np.testing.assert_allclose(actions[1, :, 0], expected, rtol=1e-6)
    odd = make_agent(script, 2, np.array([-0.1], np.float32), np.array([0.7], np.float32))
    assert odd.to_env(torch.ones(1, 1))[0] <= odd.action_space.high
    assert odd.to_env(-torch.ones(1, 1))[0] >= odd.action_space.low


@pytest.mark.parametrize("script", [td3, sac, her], ids=["td3", "sac", "her"])
def test_it_acts_on_one_observation_and_on_a_batch_of_any_type(script):
    agent = make_agent(script, 3, LOW.reshape(3, 1), HIGH.reshape(3, 1))
    batch = np.array([[1, 2, 3], [-4, 5, 6]])
    actions = agent.act(batch)
    assert actions.shape == (2, 3, 1)
    assert not np.allclose(actions[0], actions[1])
    for kind in int, np.uint8, np.float16, np.float32, np.float64, list:
        one = [1, 2, 3] if kind is list else batch[0].astype(kind)
        np.testing.assert_allclose(agent.act(one), actions[0], rtol=1e-5)
    assert agent.act(batch[:1]).shape == (1, 3, 1)
    assert agent.action_space.contains(agent.act(batch[0]))


@pytest.mark.parametrize("script", [td3, sac, her], ids=["td3", "sac", "her"])
@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Discrete(3),
        gym.spaces.MultiDiscrete([3, 2]),
        gym.spaces.Box(0, 9, (2,), np.int64),
        gym.spaces.Box(-np.inf, 1, (2,)),
        gym.spaces.Box(-1, np.inf, (2,)),
        gym.spaces.Box(np.array([-1, -1e6]), np.array([1, 1]), dtype=np.float64),
        gym.spaces.Box(np.float32([-1, -1]), np.float32([3e38, 1])),
    ],
    ids=str,
)
def test_other_actions_are_refused_with_the_script_that_knows_them(script, space):
    with pytest.raises(script.UsageError, match=r"Box of floats below 1e6: see ppo\.py"):
        script.make_agent(script.Args(), (3,), space)
    script.make_agent(script.Args(), (3,), gym.spaces.Box(-9e5, 9e5, (2,)))


# ---- Targets and losses ----


@both
def test_targets_by_hand(script):
    rewards, terminated = torch.tensor([1.0, 2, 3, 4]), torch.tensor([0.0, 1, 0, 0])
    next_values = torch.tensor([[10.0, 10, 10, -5], [10.0, 20, 7, 8]])  # alike; after an end; disagreeing twice
    expected = torch.tensor([1 + 9.0, 2, 3 + 6.3, 4 - 4.5])
    torch.testing.assert_close(script.td_target(rewards, terminated, next_values, 0.9), expected)
    with pytest.raises(AssertionError):
        script.td_target(rewards[:, None], terminated, next_values, 0.9)
    with pytest.raises(AssertionError):
        script.td_target(rewards, terminated, next_values.T, 0.9)


@both
def test_losses_of_a_batch_are_the_means_over_its_rows(script, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    learner, batch = make_learner(script, policy_frequency=1) if script is td3 else make_learner(script), random_batch()
    singles = [step(copy.deepcopy(learner), [part[i : i + 1] for part in batch]) for i in range(8)]
    whole = step(copy.deepcopy(learner), batch)
    for name in "losses/qf1_loss", "losses/qf2_loss", "losses/q_values":
        assert whole[name] == pytest.approx(np.mean([single[name] for single in singles]), rel=1e-5), name


@both
def test_the_actors_step_neither_changes_nor_computes_gradients_of_the_critics(script):
    learner = make_learner(script, policy_frequency=1) if script is td3 else make_learner(script)
    computed, of_critic_step, critic_step = [], [], learner.optimizers["critic_optimizer"].step

    def keep():
        of_critic_step.extend(parameter.grad.clone() for parameter in learner.agent.critics.parameters())
        critic_step()

    learner.optimizers["critic_optimizer"].step = keep
    for parameter in learner.agent.critics.parameters():
        parameter.register_hook(lambda gradient: computed.append(gradient))
    before = copy.deepcopy(learner.agent.actor)
    step(learner, random_batch())
    assert len(computed) == 2 * 6, "once, for the critics' own loss"
    for parameter, gradient in zip(learner.agent.critics.parameters(), of_critic_step, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert all(
        not torch.equal(a, b) for a, b in zip(before.parameters(), learner.agent.actor.parameters(), strict=True)
    )


@both
def test_the_critics_step_leaves_the_actor_alone(script):
    learner = make_learner(script, policy_lr=0.0)
    learner.optimizers["actor_optimizer"].step = lambda: None
    step(learner, random_batch())
    for name, parameter in learner.agent.actor.named_parameters():
        assert parameter.grad is None or script is sac, name


@both
def test_a_learning_steps_gradients_are_those_of_its_own_batch(script):
    rates = {"policy_lr": 0.0, "q_lr": 0.0, "tau": 0.0} | ({"policy_frequency": 1} if script is td3 else {})
    gradients = []
    for batches in [0, 1], [1]:
        learner = make_learner(script, **rates)
        for seed in batches:
            torch.manual_seed(seed)  # the same noise
            step(learner, random_batch(seed=seed))
        gradients.append(
            {name: p.grad for name, p in learner.agent.named_parameters() if not name.startswith("target_")}
        )
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, msg=lambda m, name=name: f"{name}: {m}")


@both
def test_targets_get_no_gradients_and_metrics_keep_none(script):
    learner = make_learner(script, policy_frequency=1) if script is td3 else make_learner(script)
    metrics = step(learner, random_batch())
    assert all(p.grad is None for name, p in learner.agent.named_parameters() if name.startswith("target_"))
    assert not any(value.requires_grad for value in metrics.values()), "the graph of each step would stay in memory"


@both
@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_targets_follow_by_tau(script, tau):
    learner = make_learner(script, tau=tau, policy_frequency=1) if script is td3 else make_learner(script, tau=tau)
    for name in ("critics", "actor") if script is td3 else ("critics",):
        online, target = getattr(learner.agent, name), getattr(learner.agent, f"target_{name}")
        for parameter in online.parameters():  # away from the start, where targets and networks are equal
            parameter.data += 1
        old = copy.deepcopy(target)
        torch.manual_seed(0)
        step(learner, random_batch())
        for a, b, c in zip(old.parameters(), online.parameters(), target.parameters(), strict=True):
            torch.testing.assert_close(c, tau * b + (1 - tau) * a, atol=1e-6, rtol=1e-6)


@both
def test_targets_share_no_memory_with_the_networks_and_no_optimizer_holds_them(script):
    learner = make_learner(script)
    targets = {p.data_ptr() for name, p in learner.agent.named_parameters() if name.startswith("target_")}
    others = {p.data_ptr() for name, p in learner.agent.named_parameters() if not name.startswith("target_")}
    assert targets
    assert not targets & others
    groups = [group for optimizer in learner.optimizers.values() for group in optimizer.param_groups]
    held = [p.data_ptr() for group in groups for p in group["params"]]
    assert sorted(held) == sorted(others), "each parameter that learns is held once"


# ---- The loop ----


@pytest.fixture
def recorded(monkeypatch):
    """What train hands to the buffer and to the learning steps; the latter learn nothing."""
    seen = {"add": [], "update": []}
    for script in td3, sac:
        add = script.ReplayBuffer.add

        def keep(self, add=add, **columns):
            seen["add"].append([np.array(column) for column in columns.values()])
            add(self, **columns)

        def update(agent, optimizers, batch, *others):
            *number, _ = others
            seen["update"].append((*number, len(seen["add"]), batch))
            return {"losses/actor_loss": torch.tensor(float(len(seen["update"])))}

        monkeypatch.setattr(script.ReplayBuffer, "add", keep)
        monkeypatch.setattr(script, "update", update)
        monkeypatch.setattr(script, "evaluate", lambda *_: {"eval/episodic_return": 0.0, "eval/return_std": 0.0})
    MADE.clear()
    RECEIVED.clear()
    return seen


@both
@pytest.mark.parametrize("num_envs", [1, 3])
def test_what_reaches_the_buffer_is_what_happened(script, num_envs, recorded):
    script.train(script.Args(env_id="BoxCounter-v0", total_timesteps=10 * num_envs, num_envs=num_envs,
                             checkpoint_frequency=4 * num_envs, **TINY))  # fmt: skip
    obs, actions, rewards, terminated, next_obs = (np.stack(column) for column in zip(*recorded["add"], strict=True))
    expected_obs =        [0, 1, 2, 100, 101, 200, 201, 202, 203, 300, 301, 302, 400, 401, 500]  # fmt: skip
    expected_next_obs =   [1, 2, 3, 101, 102, 201, 202, 203, 204, 301, 302, 303, 401, 402, 501]  # fmt: skip
    expected_rewards =    [1, 2, 3, 1,   2,   1,   2,   3,   4,   1,   2,   3,   1,   2,   1]  # fmt: skip
    expected_terminated = [0, 0, 1, 0,   0,   0,   0,   0,   0,   0,   0,   1,   0,   0,   0]  # fmt: skip
    for i, start in enumerate([0, 3, 5][:num_envs]):  # where episode i begins
        own = slice(start, start + 10)
        np.testing.assert_array_equal(obs[:, i, 0], expected_obs[own])
        np.testing.assert_array_equal(next_obs[:, i, 0], expected_next_obs[own])
        np.testing.assert_array_equal(rewards[:, i], expected_rewards[own])
        np.testing.assert_array_equal(terminated[:, i], expected_terminated[own])
    done = np.array(RECEIVED).reshape(10, num_envs, 3)
    np.testing.assert_allclose((LOW + HIGH) / 2 + (HIGH - LOW) / 2 * actions, done, atol=1e-5)


@both
@pytest.mark.parametrize("num_envs", [1, 2, 3])
@pytest.mark.parametrize("utd", [1.0, 0.5, 2.0, 0.25, 0.0])
def test_learning_steps_keep_their_ratio_to_environment_steps(script, num_envs, utd, recorded):
    total, starts = 36, 7
    script.train(script.Args(env_id="BoxCounter-v0", total_timesteps=total, num_envs=num_envs, utd=utd,
                             checkpoint_frequency=13, **TINY | {"learning_starts": starts}))  # fmt: skip
    assert sum(env.steps for env in MADE) == total
    assert len(recorded["update"]) == int(utd * (total - starts))
    for count, (*number, adds, batch) in enumerate(recorded["update"], 1):
        assert number == ([count] if script is td3 else []), "td3 is told the number of its learning step"
        assert count <= utd * (adds * num_envs - starts), "none is early"
        assert len(batch[0]) == 8
    last = {adds: count for count, (*_, adds, _) in enumerate(recorded["update"], 1)}
    for adds, count in last.items():
        assert count == int(utd * (adds * num_envs - starts)), "none is late"


@pytest.mark.parametrize("script", [td3, sac, her], ids=["td3", "sac", "her"])
def test_a_tenth_of_the_run_is_random_but_not_more_than_10_000_steps(script):
    steps = {10: 1, 25_000: 2_500, 100_000: 10_000, 1_000_000: 10_000}
    assert {total: script.Args(total_timesteps=total).learning_starts for total in steps} == steps
    assert script.Args(learning_starts=0).learning_starts == 0


@both
@pytest.mark.parametrize("num_envs", [1, 2, 3])
def test_each_episode_is_logged_once_at_its_step(script, num_envs, recorded, tmp_path):
    script.train(script.Args(env_id="BoxCounter-v0", total_timesteps=27 * num_envs, num_envs=num_envs,
                             checkpoint_frequency=99, run_dir=str(tmp_path / "run"), **TINY))  # fmt: skip
    expected = []
    for i in range(num_envs):
        step = 0
        for k in range(i, i + 9):  # nine episodes
            step += (3, 2, 4)[k % 3]
            expected.append((step * num_envs, i, (6, 3, 10)[k % 3], (3, 2, 4)[k % 3]))
    episodes = [row for row in rows(tmp_path / "run") if "charts/episodic_return" in row]
    names = "global_step", "charts/episodic_return", "charts/episodic_length"
    got = [tuple(row[name] for name in names) for row in episodes]
    assert got == [(step, *figures) for step, _, *figures in sorted(expected)]


@both
def test_losses_of_every_hundredth_learning_step_are_logged(script, recorded, tmp_path):
    script.train(script.Args(env_id="BoxCounter-v0", total_timesteps=3000, num_envs=3, utd=0.5, run_dir=str(tmp_path),
                             **TINY | {"learning_starts": 1000}))  # fmt: skip
    learned = [(row["global_step"], row["losses/actor_loss"]) for row in rows(tmp_path) if "losses/actor_loss" in row]
    assert learned == [(1000 + 2 * n + -(1000 + 2 * n) % 3, n) for n in range(100, 1001, 100)]


@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_td3_logs_steps_in_which_the_actor_moves(frequency, tmp_path):
    td3.train(
        td3.Args(env_id="Pendulum-v1", total_timesteps=320, policy_frequency=frequency, run_dir=str(tmp_path), **TINY)
    )
    learned = [row for row in rows(tmp_path) if "losses/q_values" in row]
    assert [row["global_step"] - 4 for row in learned] == list(range(50 * frequency, 317, 50 * frequency))
    assert all("losses/actor_loss" in row for row in learned)


@both
def test_first_actions_are_uniform_and_later_ones_the_policys(script, recorded, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    made, make = [], script.make_agent

    def keep(*args):
        made.append(make(*args))
        next(made[0].actor.parameters()).data /= -10_000  # for actions between the bounds; and away from its target
        return made[0]

    monkeypatch.setattr(script, "make_agent", keep)
    script.train(script.Args(env_id="BoxCounter-v0", total_timesteps=2100, **TINY | {"learning_starts": 2000}))
    first, later = np.array(RECEIVED[:2000]), np.array(RECEIVED[2000:])
    shares = np.stack([np.histogram(first[:, j], 5, (LOW[j], HIGH[j]))[0] for j in range(3)]) / 2000
    np.testing.assert_allclose(shares, 0.2, atol=0.04)
    np.testing.assert_allclose(np.corrcoef(first.T), np.eye(3), atol=0.1)
    obs = np.concatenate([column[0] for column in recorded["add"][2000:]])
    np.testing.assert_allclose(later, made[0].act(obs), rtol=1e-4, atol=1e-5)


@both
def test_killed_and_resumed_equals_unbroken(script, tmp_path, monkeypatch):
    """Bit for bit, in the middle of episodes and with a buffer that is full; and no checkpoint leaves a trace."""
    flags = {"env_id": "Pendulum-v1", "total_timesteps": 603, "num_envs": 3, "utd": 0.5, "eval_frequency": 603,
             "buffer_size": 300, **TINY | {"learning_starts": 100}}  # fmt: skip
    script.train(script.Args(run_dir=str(tmp_path / "unbroken"), checkpoint_frequency=603, **flags))
    save = script.Run.save

    def die(self):
        save(self)
        if self.global_step == 402:
            raise KeyboardInterrupt

    monkeypatch.setattr(script.Run, "save", die)
    with pytest.raises(KeyboardInterrupt):
        script.train(script.Args(run_dir=str(tmp_path / "killed"), checkpoint_frequency=201, **flags))
    monkeypatch.setattr(script.Run, "save", save)
    script.train(script.saved_args(tmp_path / "killed", resume=True))
    assert any("losses/actor_loss" in row for row in rows(tmp_path / "killed"))
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "unbroken")
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("killed", "unbroken"))
    assert one.keys() == two.keys()
    for part in "model", "buffer":
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(two[part][name])), name


@both
def test_a_run_made_longer_equals_a_long_one(script, tmp_path):
    """Also where the longer one has room for more transitions."""
    flags = {"env_id": "Pendulum-v1", "eval_frequency": 300, "buffer_size": 400, "utd": 0.5,
             **TINY | {"learning_starts": 100}}  # fmt: skip
    script.train(script.Args(total_timesteps=600, run_dir=str(tmp_path / "long"), **flags))
    script.train(script.Args(total_timesteps=300, run_dir=str(tmp_path / "short"), **flags))
    script.train(script.saved_args(tmp_path / "short", resume=True, total_timesteps=600))
    assert timeless(tmp_path / "short") == timeless(tmp_path / "long")


@pytest.mark.slow
@both
def test_pendulum_is_learned(script, tmp_path):
    script.train(script.Args(env_id="Pendulum-v1", total_timesteps=5000, device="cpu", batch_size=64, tau=0.02,
                             learning_starts=500, eval_episodes=20, eval_frequency=5000, checkpoint_frequency=5000,
                             run_dir=str(tmp_path / "run")))  # fmt: skip
    assert rows(tmp_path / "run")[-1]["eval/episodic_return"] > -300, "random actions get about -1200"


# ---- TD3 alone ----


@pytest.mark.parametrize("ddpg", [False, True])
def test_a_learning_step_of_td3_is_that_of_its_equations(ddpg, monkeypatch):
    """In float64, against the equations one by one; as DDPG, without the three ideas."""
    flags = {"num_critics": 1, "policy_noise": 0.0} if ddpg else {"policy_noise": 0.4}
    learner = make_learner(td3, gamma=0.9, tau=0.2, noise_clip=0.3, policy_frequency=1, policy_lr=1e-3, q_lr=2e-3,
                           **flags)  # fmt: skip
    learner.agent.double()
    for parameter in [*learner.agent.target_actor.parameters(), *learner.agent.target_critics.parameters()]:
        parameter.data += 0.05 * torch.randn_like(parameter)
    obs, actions, rewards, terminated, next_obs = batch = [part.double() for part in random_batch(16)]
    mirror = copy.deepcopy(learner)
    noise = torch.randn(16, 3, dtype=torch.float64)
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    metrics = step(learner, batch)
    monkeypatch.undo()

    def mu(actor, obs):
        return torch.tanh(layers_by_hand(actor, obs))

    next_actions = mu(mirror.agent.target_actor, next_obs)
    if not ddpg:
        next_actions = torch.clamp(next_actions + torch.clamp(0.4 * noise, -0.3, 0.3), -1, 1)
    n = 1 if ddpg else 2
    next_values = [critic_by_hand(mirror.agent.target_critics, i, next_obs, next_actions) for i in range(n)]
    y = rewards + 0.9 * (1 - terminated) * (next_values[0] if ddpg else torch.minimum(*next_values))
    y = y.detach()
    losses = [((critic_by_hand(mirror.agent.critics, i, obs, actions) - y) ** 2).mean() for i in range(n)]
    critic_parameters = list(mirror.agent.critics.parameters())
    adam_by_hand(critic_parameters, torch.autograd.grad(sum(losses), critic_parameters), 2e-3)
    actor_loss = -critic_by_hand(mirror.agent.critics, 0, obs, mu(mirror.agent.actor, obs)).mean()
    actor_parameters = list(mirror.agent.actor.parameters())
    adam_by_hand(actor_parameters, torch.autograd.grad(actor_loss, actor_parameters), 1e-3)
    for name in "actor", "critics":
        for target, online in zip(
            getattr(mirror.agent, f"target_{name}").parameters(), getattr(mirror.agent, name).parameters(), strict=True
        ):
            target.data = 0.8 * target.data + 0.2 * online.data
    assert_same_parameters(learner.agent, mirror.agent, atol=1e-9)
    for i, loss in enumerate(losses, 1):
        assert metrics[f"losses/qf{i}_loss"].item() == pytest.approx(loss.item(), rel=1e-9)
    assert metrics["losses/actor_loss"].item() == pytest.approx(actor_loss.item(), rel=1e-9)


@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_the_actor_and_all_targets_move_in_every_dth_step_only(frequency):
    learner, moved = make_learner(td3, policy_frequency=frequency), []
    for number in range(1, 8):
        before = copy.deepcopy(learner.agent.state_dict())
        metrics = step(learner, random_batch(seed=number), number)
        changed = dict.fromkeys(("critics", "actor", "target_critics", "target_actor"), False)
        for name, values in learner.agent.state_dict().items():
            changed[name.split(".")[0]] |= not torch.equal(values, before[name])
        assert changed.pop("critics")
        assert len(set(changed.values())) == 1
        assert changed["actor"] == ("losses/actor_loss" in metrics)
        moved.append(changed["actor"])
    assert moved == [number % frequency == 0 for number in range(1, 8)]


def test_smoothing_noise_is_of_each_component_its_own_clipped_and_normal():
    torch.manual_seed(0)
    noise = td3.smooth(torch.zeros(50_000, 2), 0.2, 0.3)
    assert len(noise.unique()) > 50_000, "no two components share it"
    assert noise.abs().max() == pytest.approx(0.3)
    inside, normal = noise[noise.abs() < 0.3], 0.2 * torch.randn(100_000)
    assert len(inside) / 100_000 == pytest.approx((normal.abs() < 0.3).float().mean().item(), abs=0.01)
    assert inside.std() == pytest.approx(normal[normal.abs() < 0.3].std().item(), rel=0.02)
    assert noise.mean().abs() < 0.005
    assert np.corrcoef(noise.T)[0, 1] == pytest.approx(0, abs=0.02)
    ends = td3.smooth(torch.tensor([[-1.0, 1.0]]).expand(1000, -1), 0.2, 0.5)
    assert ends.abs().max() == 1, "actions stay in the box"
    in_the_box = make_agent(td3).to_env(td3.smooth(torch.zeros(20_000, 3), 0.2, 0.5))
    np.testing.assert_allclose(in_the_box.std(0) / (HIGH - LOW), 0.0978, rtol=0.03)  # alike in relation to the range
    np.testing.assert_allclose(in_the_box.mean(0), (LOW + HIGH) / 2, atol=0.03)


@pytest.fixture
def no_policy(monkeypatch):
    """The policy takes the middle of the box everywhere."""
    make = td3.make_agent

    def make_zero(*args):
        agent = make(*args)
        for parameter in agent.actor.parameters():
            torch.nn.init.zeros_(parameter)
        return agent

    monkeypatch.setattr(td3, "make_agent", make_zero)


def test_exploration_noise_has_its_deviation_in_relation_to_the_box(recorded, no_policy):
    td3.train(td3.Args(env_id="BoxCounter-v0", total_timesteps=4000, num_envs=2, exploration_noise=0.25,
                       **TINY | {"utd": 0.0}))  # fmt: skip
    deviations = np.std(RECEIVED[4:], axis=0) / ((HIGH - LOW) / 2)
    np.testing.assert_allclose(deviations, 0.25, rtol=0.06)
    np.testing.assert_allclose(np.mean(RECEIVED[4:], axis=0), (LOW + HIGH) / 2, atol=0.08)
    of_a_step = np.reshape(RECEIVED[4:], (-1, 6))  # no two components, and no two environments, share it
    np.testing.assert_allclose(np.corrcoef(of_a_step.T), np.eye(6), atol=0.1)


def test_explored_actions_stay_in_the_box(recorded, no_policy):
    td3.train(td3.Args(env_id="BoxCounter-v0", total_timesteps=200, exploration_noise=2.0, **TINY | {"utd": 0.0}))
    stored = np.concatenate([columns[1] for columns in recorded["add"]])
    assert (stored.min(), stored.max()) == (-1, 1)
