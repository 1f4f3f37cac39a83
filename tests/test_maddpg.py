"""maddpg.py against the paper's equations one agent at a time, recorded episodes, and games with known answers."""

import contextlib
import copy
import itertools
import math
import random
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import rows, timeless
from pettingzoo import ParallelEnv
from torch.nn.functional import one_hot

from algorithms import maddpg

TINY = {"num_envs": 2, "total_timesteps": 60, "learning_starts": 10, "train_frequency": 10, "batch_size": 8,
        "hidden_size": 16, "eval_episodes": 1, "eval_frequency": 10**9, "device": "cpu"}  # fmt: skip
TRANSITIONS, SEEDS, MADE = [], [], []  # by the environments below: what happened, seeds, themselves


class Trio(ParallelEnv):
    """Three agents of different sizes. In every third episode b leaves, terminated, before the others.

    Agent k observes 100 * episode + step + 0.1 * k in all its components and earns step + k. Episodes last 3, 2 and 4
    steps: the first two end by truncation, the third by termination of a and truncation of c.
    """

    metadata = {"name": "trio", "render_modes": []}  # noqa: RUF012
    possible_agents = ["a", "b", "c"]  # noqa: RUF012
    LENGTHS = 3, 2, 4
    DIMS = {"a": 1, "b": 2, "c": 3}  # noqa: RUF012
    ACTIONS = {  # noqa: RUF012
        "a": gym.spaces.Discrete(2),
        "b": gym.spaces.Discrete(3, start=-1),
        "c": gym.spaces.Box(np.array([[-1.0], [-5.0]]), np.array([[3.0], [0.0]]), dtype=np.float64),
    }

    def __init__(self):
        self.episode, self.number = -1, len(MADE)
        MADE.append(self)

    def observation_space(self, agent):
        return gym.spaces.Box(-np.inf, np.inf, (self.DIMS[agent],), np.float64)

    def action_space(self, agent):
        return self.ACTIONS[agent]

    def observe(self):
        return {name: np.full(self.DIMS[name], 100 * self.episode + self.t + 0.1 * "abc".index(name)) for name in "abc"}

    def reset(self, seed=None, options=None):
        if seed is not None:
            SEEDS.append(seed)
        self.agents, self.episode, self.t = list("abc"), self.episode + 1, 0
        self.last = self.observe()
        return self.last, {name: {} for name in "abc"}

    def step(self, actions):
        assert set(actions) == set(self.agents), "those who are there act, and nobody else"
        assert all(self.ACTIONS[name].contains(action) for name, action in actions.items())
        self.t += 1
        acting, obs, kind = self.agents, self.observe(), self.episode % 3
        over = self.t == self.LENGTHS[kind]
        terminated = {name: (over and kind == 2 and name == "a") or (kind == 2 and name == "b") for name in acting}
        truncated = {name: over and not terminated[name] for name in acting}
        rewards = {name: float(self.t + "abc".index(name)) for name in acting}
        self.agents = [name for name in acting if not terminated[name] and not truncated[name]]
        TRANSITIONS.append((self.number, self.last, actions, rewards, terminated, obs, set(acting)))
        self.last = obs
        return {name: obs[name] for name in acting}, rewards, terminated, truncated, {name: {} for name in acting}


class Staggered(Trio):
    """Its copies begin with different episodes, and don't end together."""

    def __init__(self):
        super().__init__()
        self.episode += self.number % 3


class Game(ParallelEnv):
    """Both agents earn 1 minus the distance of what they do to what pays best, once an episode.

    Discrete: a matrix with its optimum, 1, where the first plays 2 and the second 0. Box: a point in two boxes.
    """

    metadata = {"name": "game", "render_modes": []}  # noqa: RUF012
    possible_agents = ["row", "column"]  # noqa: RUF012
    PAYS = np.array([[0.5, 0.0, 0.2], [0.0, 0.6, 0.0], [1.0, 0.1, 0.3]])
    POINT = 2.0, -4.0
    continuous = False

    def observation_space(self, agent):
        return gym.spaces.Box(0, 1, (1,), np.float32)

    def action_space(self, agent):
        if not self.continuous:
            return gym.spaces.Discrete(3)
        low, high = (-1.0, 3.0) if agent == "row" else (-5.0, 0.0)
        return gym.spaces.Box(low, high, (1,), np.float32)

    def reset(self, seed=None, options=None):
        self.agents = ["row", "column"]
        return {name: np.ones(1, np.float32) for name in self.agents}, {name: {} for name in self.agents}

    def step(self, actions):
        row, column = actions["row"], actions["column"]
        if self.continuous:
            reward = 1 - abs(row[0] - self.POINT[0]) - abs(column[0] - self.POINT[1])
        else:
            reward = self.PAYS[row, column]
        names, self.agents = self.agents, []
        ended = dict.fromkeys(names, True)
        obs = {name: np.zeros(1, np.float32) for name in names}
        return (
            obs,
            dict.fromkeys(names, float(reward)),
            ended,
            dict.fromkeys(names, False),
            {name: {} for name in names},
        )


class BoxGame(Game):
    continuous = True


class Mean(Game):
    """Competition: what the row player earns, the column player loses."""

    def step(self, actions):
        obs, rewards, *rest = super().step(actions)
        return obs, {"row": rewards["row"], "column": -rewards["column"]}, *rest


class Staying(Game):
    """Who has ended stays listed; the row player is terminated in the first step, the other truncated in the second."""

    def reset(self, seed=None, options=None):
        self.t = 0
        return super().reset(seed, options)

    def step(self, actions):
        self.t += 1
        obs, rewards, _, _, infos = super().step(actions)
        self.agents = ["row", "column"]
        return obs, rewards, {"row": True, "column": False}, {"row": False, "column": self.t == 2}, infos


class Dice(Game):
    """Draws from Python's and NumPy's global generators, as a careless environment does."""

    def step(self, actions):
        obs, _, *others = super().step(actions)
        return obs, {"row": random.random(), "column": np.random.random()}, *others


class Forever(Trio):
    """Never ends."""

    LENGTHS = 10**9, 10**9, 10**9


class Pictures(Trio):
    def observation_space(self, agent):
        return gym.spaces.Box(0, 255, (84, 84, 3), np.uint8)


class Unbounded(Trio):
    def action_space(self, agent):
        return gym.spaces.Box(-np.inf, 1, (2,))


class LargestFloats(Trio):
    def action_space(self, agent):
        return gym.spaces.Box(np.finfo(np.float32).min, np.finfo(np.float32).max, (2,))


class ManyActions(Trio):
    def action_space(self, agent):
        return gym.spaces.MultiDiscrete([2, 3])


class IntegerBox(Trio):
    def action_space(self, agent):
        return gym.spaces.Box(0, 9, (2,), np.int64)


class NaN(Game):
    def step(self, actions):
        obs, rewards, *rest = super().step(actions)
        return obs, dict.fromkeys(rewards, float("nan")), *rest


def make(env_id="test_maddpg:Trio", **flags):
    """Arguments, environment, and an agent whose targets differ from its networks."""
    torch.manual_seed(0)
    args = maddpg.Args(**TINY | {"env_id": env_id} | flags)
    env = maddpg.make_env(args)
    agent = maddpg.make_agent(args, env.observation_space.shape, env.action_space)
    for targets in agent.target_actor_n, agent.target_critic_n:
        for parameter in targets.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return args, env, agent


def optimizers_of(agent, lr=0.0):
    """For tests: those of train are Adam."""
    return {
        "actors": torch.optim.SGD(agent.actor_n.parameters(), lr),
        "critics": torch.optim.SGD(agent.critic_n.parameters(), lr),
    }


def update(agent, batch, optimizers=None, **changes):
    """A step of the script's update, in which by default nothing moves: metric -> (N,)"""
    args = maddpg.replace(agent.args, **{"tau": 0.0} | changes)
    metrics = maddpg.update(agent, optimizers or optimizers_of(agent), batch, args)
    assert not any(value.requires_grad for value in metrics.values())
    names = "td_loss", "q_values", "actor_loss"
    return {name: torch.stack([metrics[f"losses/{name}/{agent_name}"] for agent_name in agent.names]) for name in names}


def batch_of(env, size=32, seed=0):
    """Random transitions: obs, actions, rewards, terminated, next_obs."""
    torch.manual_seed(seed)
    obs, next_obs = torch.randn(2, size, sum(env.obs_dim_n))
    actions = []
    for dim, space in zip(env.action_dim_n, env.action_space_n, strict=True):
        discrete = isinstance(space, gym.spaces.Discrete)
        actions.append(torch.eye(dim)[torch.randint(dim, (size,))] if discrete else torch.rand(size, dim))
    rewards, terminated = torch.randn(size, len(env.names)), (torch.rand(size, len(env.names)) < 0.3).float()
    return obs, torch.cat(actions, 1), rewards, terminated, next_obs


def columns(dims):
    """The slice of each agent in a row."""
    ends = np.cumsum([0, *dims])
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


O_N, A_N = columns([1, 2, 3]), columns([2, 3, 2])  # of Trio's agents


def layers_by_hand(net, x):
    first, _, second, _, last = net
    hidden = (x @ first.weight.T + first.bias).clamp(min=0)
    hidden = (hidden @ second.weight.T + second.bias).clamp(min=0)
    return hidden @ last.weight.T + last.bias


def q_by_hand(agent, critic_n, i, obs, actions):
    """Q_i, from rows: of all agents, or of agent i alone."""
    if agent.args.algorithm == "ddpg":
        obs, actions = obs[:, O_N[i]], actions[:, A_N[i]]
    return layers_by_hand(critic_n[i], torch.cat([obs, actions], 1))[:, 0]


def acting(env_id, act, **flags):
    """What evaluate needs to know of an agent, and its arguments."""
    args = maddpg.Args(**TINY | {"env_id": env_id} | flags)
    with contextlib.closing(maddpg.make_env(args)) as env:
        spaces = env.obs_space_n, env.action_space_n
        return types.SimpleNamespace(act=act, names=env.names, space_n=spaces), args


def evaluate(env_id, act, **flags):
    return maddpg.evaluate(*acting(env_id, act, **flags), Path("film"))


@pytest.fixture
def replayed(monkeypatch):
    """The replay buffers that train made."""
    made, init = [], maddpg.ReplayBuffer.__init__

    def spy(self, *args):
        init(self, *args)
        made.append(self)

    monkeypatch.setattr(maddpg.ReplayBuffer, "__init__", spy)
    return made


class StartedError(Exception):
    """train has made all that it will need."""


@pytest.fixture
def parts_of(monkeypatch):
    """What train has made when it starts: its model, optimizers and buffer."""

    def start(self, **parts):
        self.__class__.parts_of_train = parts
        raise StartedError

    def make_parts(**flags):
        with monkeypatch.context() as patch:
            patch.setattr(maddpg.Run, "start", start)
            with pytest.raises(StartedError):
                maddpg.train(maddpg.Args(**TINY | {"env_id": "test_maddpg:Trio"} | flags))
        return maddpg.Run.__dict__["parts_of_train"]

    return make_parts


# ---- Environments and the replay buffer


@pytest.mark.parametrize("num_envs", [1, 3])
def test_each_agents_row_is_what_happened_to_it(num_envs, replayed):
    TRANSITIONS.clear()
    maddpg.train(maddpg.Args(env_id="test_maddpg:Staggered", **TINY | {"num_envs": num_envs, "eval_frequency": 10**9,
                             "total_timesteps": 30 * num_envs, "learning_starts": 10**9}))  # fmt: skip
    (replay,) = replayed
    happened = TRANSITIONS[: 30 * num_envs]  # the evaluation at the end comes later
    assert replay.num_added == len(happened) == 30 * num_envs
    left = 0
    for row, (_, obs, actions, rewards, terminated, next_obs, acting) in zip(replay.rows, happened, strict=True):
        got_obs, got_actions, got_rewards, got_terminated, got_next_obs = (
            part.numpy() for part in row.split(replay.widths)
        )
        for i, (name, o, a) in enumerate(zip("abc", O_N, A_N, strict=True)):
            if name not in acting:
                left += 1
                assert got_terminated[i] == 1
                assert got_rewards[i] == 0
                just_left = obs["a"] % 100 == 1  # its last observation ended the row before
                np.testing.assert_allclose(got_obs[o], obs[name] if just_left else 0, rtol=1e-6)
                assert (got_next_obs[o] == 0).all()
                continue
            np.testing.assert_allclose(got_obs[o], obs[name], rtol=1e-6)
            np.testing.assert_allclose(got_next_obs[o], next_obs[name], rtol=1e-6)
            assert got_rewards[i] == rewards[name]
            assert got_terminated[i] == terminated[name]
            space = Trio.ACTIONS[name]
            expected = gym.spaces.flatten(space, actions[name])  # Discrete: one-hot
            if name == "c":  # in the replay, its box goes from 0 to 1
                expected = (expected - [-1, -5]) / [4, 5]
            np.testing.assert_allclose(got_actions[a], expected, rtol=1e-5)
    assert left > 3 * num_envs, "b was away in some"


def test_a_row_from_0_to_1_fills_an_asymmetric_box_and_never_leaves_it(monkeypatch):
    """Trio fails where an action is not in its box. float32(0.1) is more than 0.1."""
    for box in gym.spaces.Box(np.array([[-1.0], [-5.0]]), np.array([[3.0], [0.0]])), gym.spaces.Box(-0.1, 0.1, (2, 1)):
        for dtype in np.float32, np.float64:
            space = gym.spaces.Box(box.low.astype(dtype), box.high.astype(dtype), dtype=dtype)
            monkeypatch.setitem(Trio.ACTIONS, "c", space)
            env = maddpg.make_env(maddpg.Args(**TINY | {"env_id": "test_maddpg:Trio"}))
            env.reset()
            for share in 0.0, 1.0, 0.75:
                env.step(np.float32([1, 0, 0, 1, 0, share, 0.5]))
                action = TRANSITIONS[-1][2]["c"]
                low, high = space.low[:, 0], space.high[:, 0]
                expected = low[0] + share * (high[0] - low[0]), (low[1] + high[1]) / 2
                np.testing.assert_allclose(action[:, 0], expected, rtol=1e-6)


def test_the_reward_of_a_step_is_the_sum_and_info_has_that_of_each_agent():
    env = maddpg.make_env(maddpg.Args(**TINY | {"env_id": "test_maddpg:Mean"}))
    env.reset()
    obs, reward, terminated, truncated, info = env.step(np.eye(3)[[2, 0]].ravel())
    assert (reward, terminated, truncated) == (0, True, False)
    assert info["rewards"].tolist() == [1, -1]
    assert info["terminated"].tolist() == [True, True]
    assert obs.tolist() == [0, 0]


def test_an_episode_is_over_once_every_agent_has_ended_listed_or_not():
    """It is terminated where all agents are, else truncated."""
    for env_id, expected in ("Game", [(True, False)]), ("Staying", [(False, False), (False, True)]):
        env = maddpg.make_env(maddpg.Args(**TINY | {"env_id": f"test_maddpg:{env_id}"}))
        env.reset()
        assert [env.step(np.zeros(6))[2:4] for _ in expected] == expected


@pytest.mark.parametrize("num_envs", [1, 2, 3])
def test_steps_are_summed_over_copies_and_each_episode_is_logged_once(num_envs, tmp_path, monkeypatch):
    monkeypatch.setattr(maddpg, "evaluate", lambda *_, **__: {"eval/episodic_return": 0.0})
    TRANSITIONS.clear()
    total = 18 * num_envs
    maddpg.train(maddpg.Args(env_id="test_maddpg:Trio", run_dir=str(tmp_path / "run"), **TINY | {
        "num_envs": num_envs, "total_timesteps": total}))  # fmt: skip
    assert len(TRANSITIONS) == total
    episodes = [row for row in rows(tmp_path / "run") if "charts/episodic_return" in row]
    returns = [sum(parts) for parts in [(6.0, 9.0, 12.0), (3.0, 5.0, 7.0), (10.0, 2.0, 18.0)] * 2]  # of a, b, c
    ends = [3, 5, 9, 12, 14, 18]
    expected = [(num_envs * step, total) for step, total in zip(ends, returns, strict=True)]
    got = [tuple(row[name] for name in ("global_step", "charts/episodic_return")) for row in episodes]
    assert got == [row for row in expected for _ in range(num_envs)]
    assert [row["charts/episodic_length"] for row in episodes[::num_envs]] == [3, 2, 4] * 2


@pytest.mark.parametrize(
    ("num_envs", "frequency", "starts"), [(1, 10, 20), (3, 10, 30), (4, 3, 13), (5, 1, 1), (2, 7, 1)]
)
def test_updates_per_step_do_not_depend_on_the_number_of_copies(num_envs, frequency, starts, monkeypatch):
    monkeypatch.setattr(maddpg, "evaluate", lambda *_, **__: {"eval/episodic_return": 0.0})
    seen, step = [], maddpg.update
    monkeypatch.setattr(maddpg, "update", lambda *args: (seen.append(args[2]), step(*args))[1])
    flags = {"num_envs": num_envs, "total_timesteps": 120, "learning_starts": starts, "train_frequency": frequency}
    maddpg.train(maddpg.Args(env_id="test_maddpg:Trio", **TINY | flags))
    before = -(-starts // num_envs) * num_envs - num_envs  # the last step that is too early to learn
    assert len(seen) == 120 // frequency - before // frequency
    assert all(len(part) == TINY["batch_size"] for batch in seen for part in batch)


def test_every_hundredth_gradient_step_is_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(maddpg, "evaluate", lambda *_, **__: {"eval/episodic_return": 0.0})
    metrics, step = [], maddpg.update
    monkeypatch.setattr(maddpg, "update", lambda *args: (metrics.append(step(*args)), metrics[-1])[1])
    flags = {"total_timesteps": 500, "learning_starts": 100, "train_frequency": 1, "num_envs": 4}
    maddpg.train(maddpg.Args(env_id="test_maddpg:Trio", run_dir=str(tmp_path / "run"), **TINY | flags))
    logged = [row for row in rows(tmp_path / "run") if "losses/td_loss/a" in row]
    assert [row["global_step"] for row in logged] == [100, 200, 300, 400, 500], "each 4 steps learn 4 times"
    for row in logged:
        expected = metrics[row["global_step"] - 97]  # the first was number 97, after step 100
        assert {name: row[name] for name in expected} == {name: float(value) for name, value in expected.items()}
    names = {f"losses/{name}/{agent}" for name in ("td_loss", "q_values", "actor_loss") for agent in "abc"}
    assert {name for name in logged[-1] if name.startswith("losses/")} == names


def test_replay_equals_a_list_past_three_times_its_capacity():
    rng, oracle = np.random.default_rng(0), []
    replay = maddpg.ReplayBuffer(10, [2, 1], "cpu")
    for n in [3, 3, 3, 3, 4, 1, 3, 10, 3, 4]:
        first, second = rng.normal(size=(n, 2)), rng.normal(size=(n, 1)).astype(np.float32)
        replay.add(first, second)
        oracle = (oracle + [np.float32([*a, *b]).tolist() for a, b in zip(first, second, strict=True)])[-10:]
        first[:], second[:] = 99, 99  # what was stored must not be the caller's memory
        samples = torch.cat(replay.sample(500), 1).tolist()
        assert {tuple(row) for row in samples} == {tuple(row) for row in oracle}
    assert replay.num_added == 37
    frequencies = np.unique(torch.cat(replay.sample(20_000), 1)[:, 0], return_counts=True)[1] / 20_000
    np.testing.assert_allclose(frequencies, 0.1, atol=0.01)
    assert [part.shape for part in replay.sample(7)] == [(7, 2), (7, 1)]
    several = torch.stack([replay.sample(10)[1] for _ in range(1000)])  # (1000, 10, 1): each row of a batch is random
    np.testing.assert_allclose(several.std(0), torch.cat(replay.sample(10_000)[1:]).std(), rtol=0.1)


def test_a_buffer_may_take_nine_tenths_of_the_memory(monkeypatch):
    monkeypatch.setattr(maddpg.os, "sysconf", {"SC_PHYS_PAGES": 100, "SC_PAGE_SIZE": 10}.get)
    assert maddpg.ReplayBuffer(75, [2, 1], "cpu").rows.nbytes == 900
    with pytest.raises(maddpg.UsageError, match="--buffer-size 76 needs"):
        maddpg.ReplayBuffer(76, [2, 1], "cpu")


@pytest.mark.parametrize("flags", [{"tau": 1.1}, {"buffer_size": 24}, {"learning_starts": -1}, {"train_frequency": 0}])
def test_numbers_out_of_range_are_refused(flags):
    with pytest.raises(maddpg.UsageError, match=f"--{next(iter(flags)).replace('_', '-')} is"):
        maddpg.Args(**flags)
    maddpg.Args(tau=1, buffer_size=25, learning_starts=0, train_frequency=1)


@pytest.mark.parametrize("added", [4, 13])
def test_replay_is_saved_as_far_as_it_is_filled_and_goes_on_where_it_was(added, tmp_path):
    one, other = maddpg.ReplayBuffer(10, [1], "cpu"), maddpg.ReplayBuffer(10, [1], "cpu")
    for k in range(added):
        one.add(np.full((1, 1), k))
    torch.save(one.state_dict(), tmp_path / "replay.pt")
    state = torch.load(tmp_path / "replay.pt", weights_only=True)
    assert state["rows"].untyped_storage().nbytes() == 4 * min(added, 10)
    other.load_state_dict(state)
    for replay in one, other:
        replay.add(np.full((2, 1), -1))
    assert torch.equal(one.rows[: min(added + 2, 10)], other.rows[: min(added + 2, 10)])
    assert other.num_added == added + 2


# ---- The equations


@pytest.mark.parametrize("gradient", ["exact", "gumbel"])
@pytest.mark.parametrize("algorithm", ["maddpg", "ddpg"])
def test_targets_losses_and_gradients_equal_the_papers_one_agent_at_a_time(algorithm, gradient):
    """T6, T15: next observations, target actors, target critics; terminated masks its own agent only."""
    _, env, agent = make(algorithm=algorithm, actor_gradient=gradient, gamma=0.9, output_coef=0.7)
    batch = obs, actions, rewards, terminated, next_obs = batch_of(env)
    torch.manual_seed(5)
    got = update(agent, batch)
    next_actions = []
    for i, net in enumerate(agent.target_actor_n):
        outputs = layers_by_hand(net, next_obs[:, O_N[i]])
        next_actions.append(torch.eye(outputs.shape[1])[outputs.argmax(1)] if i < 2 else 1 / (1 + (-outputs).exp()))
    next_actions = torch.cat(next_actions, 1)
    torch.manual_seed(5)  # the same noise for both: it is drawn agent after agent
    for i, (actor, critic) in enumerate(zip(agent.actor_n, agent.critic_n, strict=True)):
        q_next = q_by_hand(agent, agent.target_critic_n, i, next_obs, next_actions)
        y = (rewards[:, i] + 0.9 * (1 - terminated[:, i]) * q_next).detach()
        q = q_by_hand(agent, agent.critic_n, i, obs, actions)
        loss = ((q - y) ** 2).mean()
        torch.testing.assert_close(got["q_values"][i], q.mean().detach())
        torch.testing.assert_close(got["td_loss"][i], loss.detach())
        gradients = [parameter.grad for parameter in critic.parameters()]
        torch.testing.assert_close(gradients, [*torch.autograd.grad(loss, [*critic.parameters()])])
        # [2]: of agent i alone the action is new
        outputs, joint = layers_by_hand(actor, obs[:, O_N[i]]), actions.clone()
        if gradient == "exact" and i < 2:
            value = 0
            for k in range(outputs.shape[1]):
                joint[:, A_N[i]] = torch.eye(outputs.shape[1])[k]
                value = value + outputs.softmax(1)[:, k] * q_by_hand(agent, agent.critic_n, i, obs, joint).detach()
        else:
            if i < 2:
                soft = (outputs - torch.empty_like(outputs).exponential_().log()).softmax(1)
                hard = torch.eye(outputs.shape[1])[soft.argmax(1)]
                joint[:, A_N[i]] = hard + soft - soft.detach()
            else:
                joint[:, A_N[i]] = 1 / (1 + (-outputs).exp())
            value = q_by_hand(agent, agent.critic_n, i, obs, joint)
        expected = -value.mean() + 0.7 * (outputs**2).mean()
        torch.testing.assert_close(got["actor_loss"][i], expected.detach())
        gradients = [parameter.grad for parameter in actor.parameters()]
        torch.testing.assert_close(gradients, [*torch.autograd.grad(expected, [*actor.parameters()])])
    assert got["td_loss"].unique().numel() == got["actor_loss"].unique().numel() == 3


def test_losses_of_a_batch_are_the_means_of_the_losses_of_its_rows():
    """T8. Box actions, whose best is the same each time."""
    _, env, agent = make("test_maddpg:BoxGame")
    batch = batch_of(env)
    whole = update(agent, batch)
    singles = [update(agent, [part[k : k + 1] for part in batch]) for k in range(len(batch[0]))]
    for name, value in whole.items():
        torch.testing.assert_close(value, torch.stack([single[name] for single in singles]).mean(0))


def permuted(part, dims, order):
    return torch.cat([part[:, columns(dims)[i]] for i in order], 1)


@pytest.mark.parametrize("algorithm", ["maddpg", "ddpg"])
@pytest.mark.parametrize("order", [(2, 0, 1), (1, 0, 2)])
def test_permuting_the_agents_permutes_the_losses(order, algorithm):
    """T15, with three agents of different sizes. exact: else the order changes who gets which noise."""
    args, env, agent = make(algorithm=algorithm, actor_gradient="exact")
    batch = obs, actions, rewards, terminated, next_obs = batch_of(env)
    other_env = copy.copy(env)
    for name in "names", "obs_space_n", "action_space_n", "obs_dim_n", "action_dim_n":
        setattr(other_env, name, [getattr(env, name)[i] for i in order])
    other = maddpg.MADDPG(args, other_env)
    for prefix in "", "target_":
        for kind in "actor_n", "critic_n":
            for k, i in enumerate(order):
                state = getattr(agent, prefix + kind)[i].state_dict()
                if kind == "critic_n" and algorithm == "maddpg":
                    weight = state["0.weight"]
                    o, a = weight[:, : obs.shape[1]], weight[:, obs.shape[1] :]
                    state["0.weight"] = torch.cat([permuted(o, [1, 2, 3], order), permuted(a, [2, 3, 2], order)], 1)
                getattr(other, prefix + kind)[k].load_state_dict(state)
    other_batch = (
        permuted(obs, [1, 2, 3], order), permuted(actions, [2, 3, 2], order), rewards[:, list(order)],
        terminated[:, list(order)], permuted(next_obs, [1, 2, 3], order),
    )  # fmt: skip
    first, second = update(agent, batch), update(other, other_batch)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value[list(order)])
        assert value.unique().numel() == 3


@pytest.mark.parametrize("algorithm", ["maddpg", "ddpg"])
def test_losses_of_an_agent_move_its_own_networks_only(algorithm):
    """T16."""
    _, env, agent = make(algorithm=algorithm)
    obs, actions, *_ = batch_of(env)
    obs_n, action_n = [obs[:, o] for o in O_N], [actions[:, a] for a in A_N]
    for i in range(3):
        for loss, nets in (
            (agent.actor_loss(i, obs_n, action_n), agent.actor_n),
            (agent.q_value(agent.critic_n, i, obs_n, action_n).mean(), agent.critic_n),
        ):
            agent.zero_grad()
            loss.backward()
            for j, net in enumerate(nets):
                moved = sum(p.grad.abs().sum() for p in net.parameters() if p.grad is not None)
                assert (moved > 0) == (i == j)
            targets = *agent.target_actor_n.parameters(), *agent.target_critic_n.parameters()
            assert all(parameter.grad is None for parameter in targets)


def test_ddpg_critics_see_their_own_agent_only_and_maddpgs_see_all():
    for algorithm in "maddpg", "ddpg":
        _, env, agent = make(algorithm=algorithm)
        obs, actions, *_ = batch_of(env)
        obs_n, action_n = [obs[:, o].requires_grad_() for o in O_N], [actions[:, a].requires_grad_() for a in A_N]
        for i in range(3):
            value = agent.q_value(agent.critic_n, i, obs_n, action_n)
            assert value.shape == (32,)
            seen = torch.autograd.grad(value.sum(), obs_n + action_n, allow_unused=True)
            for j, gradient in enumerate(seen):
                assert (gradient is not None and gradient.abs().sum() > 0) == (i == j % 3 or algorithm == "maddpg")


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_of_updates_does_not_matter(order):
    """T16: Algorithm 1, agent after agent with optimizers of their own and the targets last, equals update."""
    _, env, agent = make(output_coef=0.1, actor_gradient="exact")
    mirror = copy.deepcopy(agent)
    optimizers = {
        "actors": torch.optim.Adam(agent.actor_n.parameters(), 0.01),
        "critics": torch.optim.Adam(agent.critic_n.parameters(), 0.01),
    }
    actor_optimizer_n = [torch.optim.Adam(actor.parameters(), 0.01) for actor in mirror.actor_n]
    critic_optimizer_n = [torch.optim.Adam(critic.parameters(), 0.01) for critic in mirror.critic_n]
    for number in range(3):
        batch = obs, actions, rewards, terminated, next_obs = batch_of(env, seed=number)
        update(agent, batch, optimizers, tau=0.3)
        obs_n, action_n = [obs[:, o] for o in O_N], [actions[:, a] for a in A_N]
        for i in order:
            with torch.no_grad():
                outputs = [net(next_obs[:, o]) for net, o in zip(mirror.target_actor_n, O_N, strict=True)]
                next_actions = torch.cat([mirror.choose(j, outputs[j]) for j in range(3)], 1)
                q_next = q_by_hand(mirror, mirror.target_critic_n, i, next_obs, next_actions)
                y = rewards[:, i] + 0.95 * (1 - terminated[:, i]) * q_next
            critic_optimizer_n[i].zero_grad()
            ((q_by_hand(mirror, mirror.critic_n, i, obs, actions) - y) ** 2).mean().backward()
            critic_optimizer_n[i].step()
            actor_optimizer_n[i].zero_grad()
            mirror.actor_loss(i, obs_n, action_n).backward()
            actor_optimizer_n[i].step()
        for nets, targets in (mirror.actor_n, mirror.target_actor_n), (mirror.critic_n, mirror.target_critic_n):
            for net, target in zip(nets.parameters(), targets.parameters(), strict=True):
                target.data = 0.7 * target.data + 0.3 * net.data
    for (name, ours), theirs in zip(agent.named_parameters(), mirror.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4, msg=name)


def test_the_actors_step_neither_changes_nor_computes_gradients_of_the_critics():
    _, env, agent = make()
    before = copy.deepcopy(agent)
    optimizers = {"actors": optimizers_of(agent, 0.1)["actors"], "critics": optimizers_of(agent)["critics"]}
    update(agent, batch_of(env), optimizers)
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, agent.get_parameter(name)) == (not name.startswith("actor_n")), name


@pytest.mark.parametrize("anneal", [False, True])
def test_the_learning_rate_of_all_networks_ends_near_0_or_stays(anneal, tmp_path, monkeypatch):
    rates, step = [], maddpg.update

    def spy(agent, optimizers, batch, args):
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers.values()])
        return step(agent, optimizers, batch, args)

    monkeypatch.setattr(maddpg, "update", spy)
    flags = {"learning_starts": 0, "train_frequency": 2, "learning_rate": 0.5, "anneal_lr": anneal}
    flags |= {"total_timesteps": 200, "eval_frequency": 10**9}
    maddpg.train(maddpg.Args(env_id="test_maddpg:Trio", run_dir=str(tmp_path / "run"), **TINY | flags))
    expected = [0.5 * (1 - step / 200 * anneal) for step in range(0, 200, 2)]
    assert rates == [[pytest.approx(rate)] * 2 for rate in expected]
    logged = [row["charts/learning_rate"] for row in rows(tmp_path / "run") if "charts/learning_rate" in row]
    assert logged == [pytest.approx(expected[-1])]


def test_targets_share_nothing_with_the_networks_and_no_optimizer_holds_them(parts_of):
    """T11."""
    parts = parts_of()
    agent = parts["model"]
    for nets, targets, optimizer in (
        (agent.actor_n, agent.target_actor_n, parts["actors"]),
        (agent.critic_n, agent.target_critic_n, parts["critics"]),
    ):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in nets.parameters()}
        for net, target in zip(nets.parameters(), targets.parameters(), strict=True):
            assert torch.equal(net, target)
            assert net.data_ptr() != target.data_ptr()


@pytest.mark.slow
@pytest.mark.parametrize(("beta2", "leap"), [(0.999, 0.1 / math.sqrt(0.001)), (0.9, 0.1 / math.sqrt(0.1))])
def test_a_gradient_after_many_of_zero_is_a_leap_unless_both_means_forget_alike(beta2, leap, parts_of):
    """By Adam's own equations: 3.2 learning rates after 0.999, a third of one after 0.9."""
    parts = parts_of(learning_rate=0.01, beta2=beta2)
    for nets, optimizer in (parts["model"].actor_n, parts["actors"]), (parts["model"].critic_n, parts["critics"]):
        weight = next(nets.parameters())
        before = weight.detach().clone()
        for i in range(8001):  # by then bias correction has ended
            for parameter in nets.parameters():
                parameter.grad = torch.full_like(parameter, float(i == 8000))
            optimizer.step()
        torch.testing.assert_close(before - weight, torch.full_like(weight, 0.01 * leap), atol=0, rtol=0.01)


# ---- Actors


def test_exploration_samples_the_softmax_and_a_discrete_action_is_one_hot():
    _, _, agent = make("test_maddpg:Game")
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, -1.0])
    samples = agent.choose(0, logits.expand(40_000, -1), explore=True)
    assert ((samples == 0) | (samples == 1)).all()
    torch.testing.assert_close(samples.sum(1), torch.ones(40_000))
    torch.testing.assert_close(samples.mean(0), logits.softmax(0), atol=0.01, rtol=0)
    assert agent.choose(0, logits[None]).tolist() == [[0, 1, 0]]


class Fixed(torch.nn.Module):
    """An actor whose outputs are its parameters, whatever it observes."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = torch.nn.Parameter(torch.tensor(outputs, dtype=torch.float64))

    def forward(self, obs):
        return self.outputs.expand(len(obs), -1)


class Linear(torch.nn.Module):
    """A critic of agent 0's action alone, in a game of two agents that observe a number and act by three."""

    def __init__(self, weights):
        super().__init__()
        self.weights = torch.tensor(weights, dtype=torch.float64)

    def forward(self, inputs):
        self.action = inputs[:, 2:5].detach().double()
        return inputs[:, 2:5].double() @ self.weights[:, None]


def gradient_of(actor_gradient, n, env_id="test_maddpg:Game", outputs=(0.3, -0.5, 0.1), weights=(1.0, -2.0, 0.5)):
    """That of [2] for the outputs of actor 0; and the actions that its critic saw."""
    _, _, agent = make(env_id, actor_gradient=actor_gradient, output_coef=0.0)
    agent.actor_n[0], agent.critic_n[0] = Fixed(outputs), Linear(weights)
    torch.manual_seed(1)
    agent.actor_loss(0, [torch.zeros(n, 1)] * 2, [torch.full((n, 3), 9.0)] * 2).backward()
    return -agent.actor_n[0].outputs.grad, agent.critic_n[0].action


def test_gumbels_gradient_is_that_of_the_expected_soft_action_and_its_critic_sees_a_hard_one():
    """By finite differences, with the same noise on both sides."""
    n, logits = 400_000, torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    gradient, seen = gradient_of("gumbel", n)
    torch.testing.assert_close(seen, one_hot(seen.argmax(1), 3).double())
    torch.testing.assert_close(seen.mean(0), logits.softmax(0), atol=0.003, rtol=0)

    def soft(logits):  # E[sum_k w_k softmax(logits + Gumbel)_k]
        torch.manual_seed(1)
        noise = -torch.empty(n, 3, dtype=torch.float64).exponential_().log()
        return ((logits + noise).softmax(-1) @ weights).mean().item()

    for k in range(3):
        step = 1e-4 * torch.eye(3, dtype=torch.float64)[k]
        difference = (soft(logits + step) - soft(logits - step)) / 2e-4
        assert gradient[k].item() == pytest.approx(difference, abs=1e-6)
    true, _ = gradient_of("exact", 1)
    assert 0.95 < torch.nn.functional.cosine_similarity(true, gradient, dim=0) < 0.99999, "biased, a little"


def test_exact_gradient_is_that_of_the_expected_value():
    """Of sum_k w_k softmax_k: softmax_k (w_k - the sum itself)."""
    gradient, _ = gradient_of("exact", 4)
    probabilities = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64).softmax(0)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(gradient, probabilities * (weights - probabilities @ weights))


def test_in_a_box_the_gradient_flows_through_the_action():
    """T10."""
    _, env, agent = make("test_maddpg:Trio", output_coef=0.0)
    agent.actor_n[2] = Fixed([0.0, 3.0])
    agent.critic_n[2] = torch.nn.Linear(6 + 7, 1, bias=False, dtype=torch.float64)
    obs, actions, *_ = batch_of(env)
    agent.actor_loss(2, [obs[:, o].double() for o in O_N], [actions[:, a] for a in A_N]).backward()
    share = torch.tensor([0.0, 3.0], dtype=torch.float64).sigmoid()
    torch.testing.assert_close(-agent.actor_n[2].outputs.grad, agent.critic_n[2].weight[0, 11:] * share * (1 - share))


def test_noise_is_for_a_box_of_minus_1_to_1_and_stays_in_it():
    _, _, agent = make("test_maddpg:Trio", exploration_noise=0.2)
    torch.manual_seed(0)
    for outputs, expected in (0.0, 0.5), (99.0, 1.0), (-99.0, 0.0):
        assert agent.choose(2, torch.full((1, 2), outputs)).tolist() == [[expected, expected]]
    noisy = agent.choose(2, torch.zeros(50_000, 2), explore=True)
    torch.testing.assert_close(noisy.mean(0), torch.full((2,), 0.5), atol=0.005, rtol=0)
    torch.testing.assert_close(noisy.std(0), torch.full((2,), 0.1), atol=0.002, rtol=0)
    assert abs(np.corrcoef(noisy.T)[0, 1]) < 0.02
    edge = agent.choose(2, torch.full((1000, 2), 99.0), explore=True)
    assert edge.max() == 1
    assert 0 < edge.min() < 0.95


def test_training_explores_with_the_actors_not_with_their_targets(replayed, tmp_path, monkeypatch):
    make_agent = maddpg.make_agent

    def apart(*args):
        agent = make_agent(*args)
        for parameter in agent.target_actor_n.parameters():
            parameter.data += 1
        return agent

    monkeypatch.setattr(maddpg, "make_agent", apart)
    for noise in 0.0, 0.4:  # mpe2's boxes are half as wide as those for which noise is meant
        flags = {"total_timesteps": 2000, "learning_starts": 10**9, "eval_frequency": 2000}
        run_dir = str(tmp_path / str(noise))
        maddpg.train(maddpg.Args(continuous_actions=True, exploration_noise=noise, run_dir=run_dir, **TINY | flags))
        obs, actions, *_ = replayed[-1].rows.split(replayed[-1].widths, 1)
        difference = actions - torch.from_numpy(maddpg.load(run_dir).act(obs.numpy()))
        assert difference.std().item() == pytest.approx(noise / 2, abs=0.01)
    of_a_step = difference.reshape(1000, 30)  # no two components, agents or copies share it
    np.testing.assert_allclose(np.corrcoef(of_a_step.T), np.eye(30), atol=0.15)


def test_networks_have_two_hidden_layers_with_relu():
    _, _, agent = make()
    for net in *agent.actor_n, *agent.critic_n:
        x = torch.randn(7, net[0].in_features)
        torch.testing.assert_close(net(x), layers_by_hand(net, x))
        assert [layer.out_features for layer in net[::2]][:2] == [16, 16]


def test_actors_act_on_their_own_observation_alone_or_in_a_batch_of_any_type():
    _, _, agent = make()
    obs = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    actions = agent.act(obs)
    assert actions.shape == (5, 7)
    for i, (o, a) in enumerate(zip(O_N, A_N, strict=True)):
        expected = agent.choose(i, layers_by_hand(agent.actor_n[i], torch.from_numpy(obs[:, o])))
        np.testing.assert_allclose(actions[:, a], expected.detach(), rtol=1e-6)
    assert np.array_equal(actions, agent.act(obs)), "without noise"
    for one in obs[0], obs[0].astype(np.float64), obs[0].tolist():
        np.testing.assert_allclose(agent.act(one), actions[0], rtol=1e-6)


# ---- Games with known answers


@pytest.mark.slow
@pytest.mark.parametrize(("env_id", "gradient"), [("Game", "gumbel"), ("Game", "exact"), ("BoxGame", "gumbel")])
def test_learns_a_game_with_a_known_optimum(env_id, gradient, tmp_path):
    """T22. The pair of actions that each would choose against a random other is not the best."""
    args = maddpg.Args(env_id=f"test_maddpg:{env_id}", total_timesteps=4000, num_envs=4, learning_starts=500,
                       train_frequency=4, batch_size=128, hidden_size=32, learning_rate=3e-3, eval_episodes=1,
                       run_dir=str(tmp_path / "run"), exploration_noise=0.4, actor_gradient=gradient,
                       device="cpu")  # fmt: skip
    maddpg.train(args)
    assert rows(tmp_path / "run")[-1]["eval/episodic_return"] / 2 > (0.9 if env_id == "BoxGame" else 0.99)


@pytest.mark.slow
def test_critics_learn_the_values_of_a_game(tmp_path, monkeypatch):
    """Each agent's own: one earns what the other loses."""
    agents, make_agent = [], maddpg.make_agent
    monkeypatch.setattr(maddpg, "make_agent", lambda *args: (agents.append(make_agent(*args)), agents[0])[1])
    maddpg.train(maddpg.Args(env_id="test_maddpg:Mean", total_timesteps=3000, num_envs=4, learning_starts=100,
                             train_frequency=4, batch_size=128, hidden_size=32, learning_rate=3e-3, eval_episodes=1,
                             output_coef=1.0, device="cpu"))  # fmt: skip
    for row, column in itertools.product(range(3), repeat=2):
        action_n = torch.eye(3)[[row]], torch.eye(3)[[column]]
        values = [agents[0].q_value(agents[0].critic_n, i, [torch.ones(1, 1)] * 2, action_n) for i in range(2)]
        assert values[0].item() == pytest.approx(Game.PAYS[row, column], abs=0.1)
        assert values[1].item() == pytest.approx(-Game.PAYS[row, column], abs=0.1)


# ---- Evaluation


def test_no_two_episodes_share_a_seed():
    seeds = []
    for seed in 1, 2:
        SEEDS.clear()
        flags = {"seed": seed, "total_timesteps": 18, "eval_frequency": 10**9, "eval_episodes": 3}
        maddpg.train(maddpg.Args(env_id="test_maddpg:Trio", **TINY | flags))
        training, evaluation = SEEDS[:-3], SEEDS[-3:]
        assert len(training) == 8, "two copies play episodes of 3, 2 and 4 steps, and begin a fourth"
        _, _, agent = make()
        SEEDS.clear()
        maddpg.evaluate(agent, maddpg.Args(env_id="test_maddpg:Trio", **TINY | flags), Path("film"))
        assert evaluation == SEEDS, "each evaluation plays the same episodes"
        seeds += training + evaluation
    assert len(set(seeds)) == 2 * (8 + 3)


def test_evaluation_leaves_the_global_streams_alone_and_is_not_moved_by_them():
    results = []
    for seed in 1, 2:
        random.seed(seed)
        np.random.seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist()
        results.append(evaluate("test_maddpg:Dice", lambda obs: np.zeros(6), eval_episodes=3))
        assert before == (random.getstate(), np.random.get_state()[1].tolist())
    assert results[0] == results[1]


def test_evaluation_sums_over_steps_and_agents():
    _, _, agent = make()
    args = maddpg.Args(env_id="test_maddpg:Trio", **TINY | {"eval_episodes": 3})
    result = maddpg.evaluate(agent, args, Path("film"))
    sums = np.array([[6.0, 9, 12], [3, 5, 7], [10, 2, 18]])
    assert result["eval/episodic_return"] == pytest.approx(sums.sum(1).mean())
    assert result["eval/return_std"] == pytest.approx(sums.sum(1).std())
    assert [result[f"eval/episodic_return/{name}"] for name in "abc"] == pytest.approx(sums.mean(0).tolist())
    assert result["eval/episodic_length"] == 3


@pytest.mark.parametrize("limit", [{}, {"eval_max_steps": 50}])
def test_evaluation_ends_without_a_limit_and_when_asked_to_stop(limit, monkeypatch, capsys):
    calls = []

    def act(obs):
        calls.append(1)
        if len(calls) == 40:
            monkeypatch.setattr(maddpg.Run, "stop_signal", 15)
        return np.float32([1, 0, 1, 0, 0, 0.5, 0.5])

    assert evaluate("test_maddpg:Forever", act, **limit) == {}
    assert len(calls) == 40
    monkeypatch.setattr(maddpg.Run, "stop_signal", 0)
    result = evaluate("test_maddpg:Forever", act, **limit)
    assert result["eval/episodic_length"] == limit.get("eval_max_steps", 27_000)
    assert "--eval-max-steps" in capsys.readouterr().out


def random_act(env, rng):
    parts = [np.eye(space.n)[rng.integers(space.n)] if isinstance(space, gym.spaces.Discrete)
             else rng.uniform(space.low, space.high) for space in env.action_space_n]  # fmt: skip
    return np.concatenate(parts).astype(np.float32)


def controller(obs):
    """The best assignment of agents to landmarks at every step, then full thrust, or none near the landmark.

    An agent observes its velocity, its position, and the three landmarks' relative positions.
    """
    parts = obs.reshape(3, 18)
    velocity, landmarks = parts[:, :2], parts[:, 4:10].reshape(3, 3, 2)
    distance = np.linalg.norm(landmarks - 0.4 * velocity[:, None], axis=-1)  # without thrust an agent rolls 0.4 v
    best = min(itertools.permutations(range(3)), key=lambda order: sum(distance[i, k] for i, k in enumerate(order)))
    actions = np.zeros((3, 5), np.float32)
    for i, k in enumerate(best):
        ahead = landmarks[i, k] - 0.4 * velocity[i]
        axis = np.abs(ahead).argmax()
        actions[i, 0 if abs(ahead[axis]) < 0.1 else 1 + 2 * axis + (ahead[axis] > 0)] = 1
    return actions.ravel()


def test_scale_free_figures_of_a_random_policy_and_of_the_best_assignment():
    env, rng = maddpg.make_env(maddpg.Args()), np.random.default_rng(0)
    random = evaluate("simple_spread_v3", lambda obs: random_act(env, rng), eval_episodes=100)
    best = evaluate("simple_spread_v3", controller, eval_episodes=100)
    print(random, best)
    assert random["eval/episodic_return"] == pytest.approx(-79, abs=6)
    assert best["eval/episodic_return"] == pytest.approx(-27, abs=3)
    for result in random, best:  # rewards: half the distances, which all share, and half the collisions of one's own
        returns = -1.5 * 25 * result["eval/distances"] - result["eval/collisions"]
        assert result["eval/episodic_return"] == pytest.approx(returns, rel=1e-5)
    assert random["eval/distances"] > 1.7
    assert best["eval/distances"] < 0.8
    assert random["eval/occupied"] < 0.3
    assert best["eval/occupied"] > 2


MPE = ["simple_adversary_v3", "simple_crypto_v3", "simple_push_v3", "simple_reference_v3", "simple_speaker_listener_v4",
       "simple_spread_v3", "simple_tag_v3", "simple_v3", "simple_world_comm_v3"]  # fmt: skip


@pytest.mark.parametrize("continuous", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("env_id", MPE)
def test_every_environment_of_the_paper_runs_and_its_episodes_are_truncated(env_id, continuous, tmp_path, replayed):
    args = maddpg.Args(env_id=env_id, continuous_actions=continuous, run_dir=str(tmp_path / "run"), **TINY | {
        "total_timesteps": 110, "train_frequency": 1})  # fmt: skip
    maddpg.train(args)
    env = maddpg.make_env(args)
    *_, losses, result = rows(tmp_path / "run")
    assert result["eval/episodic_return"] == pytest.approx(
        sum(result[f"eval/episodic_return/{name}"] for name in env.names)
    )
    lengths = [row["charts/episodic_length"] for row in rows(tmp_path / "run") if "charts/episodic_length" in row]
    assert lengths == [25] * 4
    assert all(
        f"losses/{metric}/{name}" in losses for metric in ("td_loss", "q_values", "actor_loss") for name in env.names
    )
    obs, actions, _, terminated, next_obs = (part.numpy() for part in replayed[0].rows.split(replayed[0].widths, 1))
    assert not terminated.any()
    same = (next_obs[:-2] == obs[2:]).all(1)  # two copies, row about
    assert not same[48:50].any(), "the next observation of an episode's last step is not the next episode's first"
    assert same[:48].all()
    discrete = all(isinstance(space, gym.spaces.Discrete) for space in env.action_space_n)
    assert discrete != continuous
    assert ((actions == 0) | (actions == 1)).all() == discrete


def saved_run(tmp_path, name, env_id="simple_tag_v3", **flags):
    args = maddpg.Args(env_id=env_id, run_dir=str(tmp_path / name), **TINY | {"eval_episodes": 3} | flags)
    maddpg.train(args)
    return args


def test_saved_actors_evaluate_as_those_that_were_saved(tmp_path, cli):
    """T21."""
    saved_run(tmp_path, "one")
    last = rows(tmp_path / "one")[-1]
    code, out, _ = cli("maddpg", "--run-dir", tmp_path / "one", "--evaluate")
    assert code == 0
    expected = ", ".join(f"{name} {value:.4g}" for name, value in last.items() if name.startswith("eval/"))
    assert out.strip() == f"{expected}, 3 episodes"


def test_cross_play_pairs_the_adversaries_of_each_run_with_the_agents_of_each(tmp_path, cli):
    """Also if one has wider networks than the other."""
    one = saved_run(tmp_path, "one")
    other = saved_run(tmp_path, "other", seed=2, algorithm="ddpg", hidden_size=8)
    agents = {args.run_dir: maddpg.load(args.run_dir) for args in (one, other)}
    flags = "--run-dir", one.run_dir, "--evaluate", "--opponent-dir", other.run_dir
    code, out, err = cli("maddpg", *flags)
    assert code == 0, err
    lines = out.splitlines()
    got = []
    for ours, theirs in itertools.product((one.run_dir, other.run_dir), repeat=2):

        def act(obs, ours=ours, theirs=theirs):  # adversaries come first: three times 5 actions
            return np.concatenate([agents[ours].act(obs)[:15], agents[theirs].act(obs)[15:]])

        result = evaluate("simple_tag_v3", act, eval_episodes=3)
        values = ", ".join(f"{name} {value:.4g}" for name, value in result.items())
        assert lines.pop(0) == f"adversaries of {ours}, others of {theirs}: {values}"
        assert "eval/touches" in result
        got.append(result["eval/episodic_return"])
    assert len(set(got)) == 4, "or the pairings would be the same"
    assert "3 episodes" in lines.pop(0)


def test_cross_play_films_each_pairing(tmp_path, cli):
    one, other = (saved_run(tmp_path, str(seed), seed=seed, total_timesteps=2, eval_episodes=1) for seed in (1, 2))
    flags = "--run-dir", one.run_dir, "--evaluate", "--opponent-dir", other.run_dir, "--capture-video"
    code, _, err = cli("maddpg", *flags)
    assert code == 0, err
    assert len([*Path(one.run_dir, "videos").glob("evaluation-*.mp4")]) == 4


@pytest.mark.parametrize(("env_id", "adversaries"), [("simple_world_comm_v3", 4), ("simple_crypto_v3", 1)])
def test_the_lead_adversary_and_eve_are_adversaries(env_id, adversaries, tmp_path, monkeypatch):
    one, other = (saved_run(tmp_path, str(seed), env_id, seed=seed, total_timesteps=2) for seed in (1, 2))
    args, played = maddpg.replace(one, evaluate=True, opponent_dir=other.run_dir), []
    of_run = {run.run_dir: [*maddpg.load(run.run_dir).actor_n] for run in (one, other)}
    evaluate = maddpg.evaluate
    monkeypatch.setattr(maddpg, "evaluate", lambda agent, *_: (played.append([*agent.actor_n]), {})[1])
    assert evaluate(maddpg.load(one.run_dir), args, Path("film")) == {}
    for (ours, theirs), team in zip(itertools.product(of_run, repeat=2), played, strict=True):
        expected = of_run[ours][:adversaries] + of_run[theirs][adversaries:]
        assert all(torch.equal(a[0].weight, b[0].weight) for a, b in zip(team, expected, strict=True))


def test_cross_play_is_refused_where_it_makes_no_sense(tmp_path, cli):
    spread, tag = saved_run(tmp_path, "spread", "simple_spread_v3"), saved_run(tmp_path, "tag")
    for one, other, word in (
        (spread, spread, "adversaries"),
        (tag, spread, "the trained agents in"),
        (tag, saved_run(tmp_path, "box", continuous_actions=True), "the trained agents in"),
    ):
        flags = "--run-dir", one.run_dir, "--evaluate", "--opponent-dir", other.run_dir
        code, _, err = cli("maddpg", *flags)
        assert (code, err.count("\n")) == (2, 1), err
        assert word in err
    code, _, err = cli("maddpg", "--run-dir", tag.run_dir, "--evaluate", "--opponent-dir", tmp_path / "no")
    assert code == 2
    assert str(tmp_path / "no") in err


def test_measures_of_tag_and_adversary_by_hand():
    assert maddpg.measures("simple_tag_v3", [[1, 0, 2, 0], [0, 1, 0, 0]]) == {"eval/touches": 4}
    near, far = 0.15**2, 0.17**2
    for adversary, agent, expected in (near, far, (False, True)), (far, near, (True, False)):
        steps = [[9.0, (9, 9, 9.0), (9, 9, 9.0)], [adversary, (9.0, near, agent), (near, 9.0, far)]]
        result = maddpg.measures("simple_adversary_v3", steps)
        assert (result["eval/agent_success"], result["eval/adversary_success"]) == expected
    assert maddpg.measures("simple_push_v3", [[None, None]]) == {}


def test_an_episode_is_filmed_from_its_first_frame(tmp_path):
    from moviepy import VideoFileClip

    saved_run(tmp_path, "run", "simple_adversary_v3", capture_video=True, eval_frequency=60)
    (film,) = (tmp_path / "run" / "videos").iterdir()
    assert film.name == "step-60-episode-0.mp4"
    with VideoFileClip(str(film)) as clip:
        frames = list(clip.iter_frames())
    assert len(frames) == 26
    assert (frames[0] != frames[-1]).any()


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("LunarLander-v3", ["LunarLander-v3", "mpe2.farama.org"]),
        ("simple_spred_v3", ["simple_spred_v3", "mpe2.farama.org"]),
        ("test_maddpg:Nothing", ["Nothing"]),
        ("nowhere:env", ["nowhere"]),
        ("a:b:c", ["a:b:c"]),
        ("json:JSONDecoder", ["parallel"]),
        ("mpe2.simple_spread_v3:env", ["parallel"]),
        ("test_maddpg:Pictures", ["a of", "images"]),
        ("test_maddpg:Unbounded", ["a of", "bounded"]),
        ("test_maddpg:ManyActions", ["a of", "Discrete"]),
        ("test_maddpg:IntegerBox", ["a of", "Box(0, 9"]),
        ("test_maddpg:LargestFloats", ["a of", "bounded"]),
    ],
)
def test_environments_it_cannot_use_get_one_line(env_id, words, cli, tmp_path):
    code, _, err = cli("maddpg", "--env-id", env_id, "--run-dir", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1), err
    assert all(word in err for word in words), err
    assert not (tmp_path / "run").exists()


def test_an_opponent_without_an_evaluation_is_refused(cli, tmp_path):
    code, _, err = cli("maddpg", "--opponent-dir", "elsewhere", "--total-timesteps", 50, "--run-dir", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1), err
    assert "--evaluate" in err


def test_nan_ends_the_run(cli, tmp_path):
    code, _, err = cli("maddpg", "--env-id", "test_maddpg:NaN", "--run-dir", tmp_path / "run")
    assert code == 1
    assert "NaN" in err


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"continuous_actions": True}, {"actor_gradient": "exact", "algorithm": "ddpg"}])
def test_killed_and_resumed_equals_unbroken(flags, tmp_path, monkeypatch):
    """T20, and T17: another run, which evaluates and saves more often, is the same."""
    flags = TINY | {"total_timesteps": 240, "buffer_size": 100, "eval_frequency": 120, "train_frequency": 2} | flags

    def run(name, **changes):
        maddpg.train(maddpg.Args(**flags | {"run_dir": str(tmp_path / name), "checkpoint_frequency": 40} | changes))

    run("whole")
    run("often", eval_frequency=20, checkpoint_frequency=2)
    step, numbers = maddpg.update, []

    def dying(*args):
        numbers.append(1)
        if len(numbers) == 88:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(maddpg, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        run("resumed")
    run("resumed", resume=True)
    assert len(numbers) > 115
    assert timeless(tmp_path / "resumed") == timeless(tmp_path / "whole")
    assert any("losses/td_loss/agent_0" in row for row in rows(tmp_path / "whole"))
    for other in "resumed", "often":
        ours, theirs = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", other))
        assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in ours["model"])
        assert torch.equal(ours["buffer"]["rows"], theirs["buffer"]["rows"])
        assert ours["buffer"]["num_added"] == 240
