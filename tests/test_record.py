"""record.py: the same command makes the same bits, transitions follow each other, ends are what they were."""

import hashlib
import importlib
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, call, tiny

from algorithms import dqn, iql, sac
from benchmark import record

SHIPPED = ROOT / "benchmark" / "offline" / "frozenlake"


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["benchmark/record.py", *map(str, flags)])
    record.main()


def data_of(folder):
    return dict(np.load(Path(folder, "data.npz"))), json.loads(Path(folder, "data.json").read_text())


def digest(folder):
    return hashlib.sha256(Path(folder, "data.npz").read_bytes()).hexdigest()


def assert_in_order(data):
    """Each transition begins where the one before has led, or after an end."""
    ends = data["terminations"] | data["truncations"]
    follows = (data["observations"][1:] == data["next_observations"][:-1]).reshape(len(ends) - 1, -1).all(1)
    assert (follows | ends[:-1]).all()
    assert ends[-1]


def test_random_actions_in_a_table_by_the_environments_own_rules(monkeypatch):
    flags = "--policy", "random", "--env-id", "FrozenLake-v1", "--steps", 3000
    run(monkeypatch, *flags, "--output", "a")
    data, about = data_of("a")
    assert [*data] == [*iql.ARRAYS]
    assert {len(array) for array in data.values()} == {3000}
    assert_in_order(data)
    table = gym.make("FrozenLake-v1").unwrapped.P
    for s, a, r, ended, _, s2 in zip(*data.values(), strict=True):
        assert (s2, r, ended) in [outcome[1:] for outcome in table[s][a]]
    assert np.bincount(data["actions"], minlength=4) == pytest.approx(750, abs=120)
    assert about["env_id"] == "FrozenLake-v1"
    assert shlex.split(about["command"])[1:] == ["benchmark/record.py", *map(str, flags), "--output", "a"]
    ends = np.flatnonzero(data["terminations"] | data["truncations"])
    assert about["episodes"] == len(ends) - 1, "the last one is cut"
    assert about["mean_return"] == pytest.approx(data["rewards"][: ends[-2] + 1].sum() / (len(ends) - 1))
    assert about["command"] in Path("a/README.md").read_text()
    for name, more in {"b": [], "c": ["--seed", 2]}.items():
        run(monkeypatch, *flags, *more, "--output", name)
    assert digest("a") == digest("b") != digest("c")


def test_time_limits_are_truncations(monkeypatch):
    run(monkeypatch, "--policy", "random", "--env-id", "Pendulum-v1", "--steps", 450, "--output", "a")
    data, _ = data_of("a")
    assert np.flatnonzero(data["truncations"]).tolist() == [199, 399, 449]
    assert not data["terminations"].any()
    assert data["observations"].shape == (450, 3)
    assert data["actions"].shape == (450, 1)
    assert_in_order(data)
    run(monkeypatch, "--policy", "random", "--env-id", "CliffWalking-v1", "--steps", 1001, "--output", "b")
    assert np.flatnonzero(data_of("b")[0]["truncations"]).tolist() == [999, 1000], "where there is none, 1,000 steps"


@pytest.fixture
def trained(cli, tmp_path_factory):
    """A tiny run of a script; one serves all tests."""

    def make(script, *flags):
        if (script, flags) not in TRAINED:
            run_dir = tmp_path_factory.mktemp("trained") / "run"
            assert cli(script, *tiny(script, *flags), "--run-dir", run_dir)[0] == 0
            TRAINED[script, flags] = run_dir
        return TRAINED[script, flags]

    return make


TRAINED = {}


@pytest.mark.parametrize(
    ("script", "env_id"),
    [("q_learning", "FrozenLake-v1"), ("dqn", "FrozenLake-v1"), ("td3", "Pendulum-v1"), ("iql", "FrozenLake-v1")],
)
def test_a_trained_agents_own_actions(script, env_id, trained, monkeypatch):
    run_dir = trained(script, "--env-id", env_id)
    run(monkeypatch, "--run-dir", run_dir, "--steps", 150, "--output", "a")
    data, about = data_of("a")
    assert_in_order(data)
    agent = importlib.import_module(f"algorithms.{script}").load(str(run_dir))
    seen = data["observations"]
    if script in ("dqn", "iql"):
        seen = np.eye(16)[seen]
    expected = np.stack([agent.act(row) for row in seen])
    assert np.array_equal(data["actions"], expected)
    assert about["behaviour"] == f"{script} on {env_id}, seed 1"


def test_shares_of_random_actions_and_agents_in_turn(trained, monkeypatch):
    class Always:
        obs_shape, action_space = (16,), gym.spaces.Discrete(4)

        def __init__(self, action):
            self.action = action

        def act(self, obs):
            return np.int64(self.action)

    args = record.Args(output=Path("a"), steps=4000, random_share=0.4)
    data = record.play(args, "FrozenLake-v1", [Always(1), Always(2)])
    episode = np.concatenate([[0], (data["terminations"] | data["truncations"]).cumsum()[:-1]])
    for agent, action in (0, 1), (1, 2):
        share = (data["actions"][episode % 2 == agent] == action).mean()
        assert share == pytest.approx(0.6 + 0.4 / 4, abs=0.04)
    args.random_share = 0
    data = record.play(args, "FrozenLake-v1", [Always(3)])
    assert (data["actions"] == 3).all()


def test_scores_of_d4rl_by_hand():
    data = {"rewards": np.array([1000.0, 477.13, 5.0]), "terminations": np.array([False, True, False])}
    data["truncations"] = np.array([False, False, True])
    about = record.summary(data, "Hopper-v5")
    assert about["episodes"] == 1
    assert about["d4rl_score"] == pytest.approx(100 * (1477.13 + 20.272305) / (3234.3 + 20.272305))
    assert "d4rl_score" not in record.summary(data, "FrozenLake-v1")


def test_the_last_episode_does_not_count_unless_it_is_the_only_one():
    data = {"rewards": np.array([1.0, 2, 3, 4, 5, 6, 70]), "truncations": np.zeros(7, bool)}
    data["terminations"] = np.array([0, 1, 1, 1, 0, 1, 1], bool)
    about = record.summary(data, "FrozenLake-v1")  # returns 3, 3, 4, 11, 70
    assert (about["episodes"], about["min_return"], about["max_return"]) == (4, 3, 11)
    about = record.summary({name: array[2:3] for name, array in data.items()}, "FrozenLake-v1")
    assert (about["episodes"], about["mean_return"]) == (1, 3)


class Careless(gym.Env):
    """Shows the same array again and again, and changes the actions that it is given."""

    observation_space, action_space = gym.spaces.Box(-9, 99, (1,), np.float32), gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = np.zeros(1, np.float32)
        return self.obs, {}

    def step(self, action):
        self.obs += 1
        action[:] = 7.0
        return self.obs, 0.0, False, bool(self.obs[0] == 5), {}


gym.register("CarelessOfRows-v0", Careless, disable_env_checker=True)


def test_rows_hold_what_was_seen_and_done_before_the_step(monkeypatch):
    run(monkeypatch, "--policy", "random", "--env-id", "CarelessOfRows-v0", "--steps", 12, "--output", "a")
    data, _ = data_of("a")
    assert data["observations"][:, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert data["next_observations"][:, 0].tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]
    assert (np.abs(data["actions"]) <= 1).all()
    assert len(np.unique(data["actions"])) == 12


EPISODES = [3, 4, 2], [5, 1, 4, 2]  # lengths of the episodes of two environments, again and again


def stream(num_rows):
    """Rows of two environments: observations [environment, episode, t], and ends of both kinds in turn."""
    rows = [[], []]
    for env, lengths in enumerate(EPISODES):
        episode, t = 0, 0
        for _ in range(num_rows):
            ends = t + 1 == lengths[episode % len(lengths)]
            rows[env].append(([env, episode, t], [env, episode, t + 1], ends and episode % 2 == 0))
            episode, t = (episode + 1, 0) if ends else (episode, t + 1)
    return rows


@pytest.mark.parametrize("script", ["sac", "dqn"])
@pytest.mark.parametrize(
    ("added", "size", "steps"), [(6, 10, 99), (10, 10, 99), (23, 10, 99), (23, 10, 14), (9, 10, 8)]
)
def test_a_buffer_begins_where_an_episode_begins_and_ends_where_one_ends(script, added, size, steps):
    """By brute force: added rows of two environments, of which the buffer keeps size, and steps are asked for."""
    rows = stream(added)
    ring = np.zeros((size, 2, 7), np.float32)
    for i in range(added):
        for env in range(2):
            obs, next_obs, terminated = rows[env][i]
            ring[i % size, env] = [*obs, *next_obs, terminated]
    buffer = {"obs": ring[..., :3], "next_obs": ring[..., 3:6], "terminated": ring[..., 6], "rewards": ring[..., 2]}
    buffer["actions"] = np.zeros((size, 2), np.int64) if script == "dqn" else np.zeros((size, 2, 1), np.float32)
    if script == "dqn":
        buffer = {name: array.reshape(2 * size, *array.shape[2:]) for name, array in buffer.items()}
    buffer = {name: torch.tensor(array) for name, array in buffer.items()}
    buffer["added"] = torch.tensor(2 * added) if script == "dqn" else added
    module = SimpleNamespace(__file__=f"{script}.py", load_file=lambda _: {"buffer": buffer})
    agent = SimpleNamespace(action_space=gym.spaces.Discrete(2), to_env=lambda actions: actions.numpy())
    data = record.take_buffer("run", module, SimpleNamespace(num_envs=2), agent, steps)

    expected, firsts = [], []
    for env in range(2):
        oldest = max(0, added - min(size, steps // 2))  # where an end before it would be lost, too
        first = next(i for i in range(oldest, added) if i == 0 or (i > oldest and rows[env][i][0][2] == 0))
        # Where the next one has another beginning, or a terminal state; of the last environment all is kept
        ends = [i for i in range(first, added) if rows[env][i][2] or (i + 1 < added and rows[env][i + 1][0][2] == 0)]
        last = added - 1 if env else max(ends, default=first - 1)
        firsts.append(len(expected))
        expected += [obs for obs, *_ in rows[env][first : last + 1]]
    assert data["observations"].tolist() == expected
    assert_in_order(data)
    for i in firsts:
        assert data["observations"][i, 2] == 0, "an episode begins"


def test_a_buffer_in_which_no_episode_begins_is_refused(trained, monkeypatch):
    run_dir = trained("sac")
    with pytest.raises(record.UsageError, match="no episode begins"):
        run(monkeypatch, "--run-dir", run_dir, "--replay-buffer", "--steps", 4, "--output", "a")


@pytest.mark.parametrize(("script", "module"), [("dqn", dqn), ("sac", sac)])
def test_a_replay_buffer_is_taken_out_as_it_was_kept(script, module, trained, monkeypatch):
    run_dir = trained(script)
    run(monkeypatch, "--run-dir", run_dir, "--replay-buffer", "--output", "a")
    data, about = data_of("a")
    buffer = torch.load(run_dir / "checkpoint.pt", weights_only=True)["buffer"]
    env_id, kept, names = about["env_id"], len(data["rewards"]), ("obs", "next_obs", "rewards", "terminated", "actions")
    if script == "dqn":
        num_envs = dqn.saved_args(run_dir).num_envs
        added, size = buffer["added"].item(), len(buffer["obs"]) // num_envs * num_envs
        assert added > size, "it has lost its first transitions"
        order, parts = np.arange(added - size, added).reshape(-1, num_envs).T % len(buffer["obs"]), []
        for env, part in enumerate(order):  # from the first transition that follows an end to the last end
            leads = (buffer["next_obs"][part[:-1]] == buffer["obs"][part[1:]]).all(-1)
            ends = (buffer["terminated"][part[:-1]].bool() | ~leads).nonzero()[:, 0].tolist()
            ends += [len(part) - 1] * (env == num_envs - 1 or bool(buffer["terminated"][part[-1]]))
            parts.append(part[ends[0] + 1 : ends[-1] + 1])
        columns = {name: buffer[name].numpy()[np.concatenate(parts)] for name in names}
    else:
        follows = (buffer["next_obs"][:-1] == buffer["obs"][1:]).all(-1)
        stop = int((~follows[:, 0]).nonzero()[-1]) + 1  # Pendulum has time limits alone
        assert stop < len(buffer["obs"]), "the second environment keeps its last episode, which is cut"
        columns = {name: np.concatenate([buffer[name][:stop, 0], buffer[name][:, 1]]) for name in names}
        columns["actions"] = 2 * columns["actions"]  # Pendulum's go from -2 to 2
    assert np.array_equal(data["observations"], columns["obs"])
    assert np.array_equal(data["next_observations"], columns["next_obs"])
    assert np.array_equal(data["rewards"], columns["rewards"])
    assert np.array_equal(data["terminations"], columns["terminated"] > 0)
    np.testing.assert_allclose(data["actions"], columns["actions"], rtol=1e-6)
    assert_in_order(data)
    if script == "sac":
        assert np.diff(np.flatnonzero(data["truncations"])).tolist() == [200] * 9 + [24], "time limits"
    args = iql.Args(env_id=env_id, dataset="a")
    if script == "sac":
        assert len(iql.read_dataset(args, iql.make_env(args))["rewards"]) == kept, "iql.py can read it"
    run(monkeypatch, "--run-dir", run_dir, "--replay-buffer", "--steps", 100, "--output", "last")
    assert 0 < len(data_of("last")[0]["rewards"]) <= 100


WRONG = {
    "": "--run-dir, or --policy random",
    "--policy random": "--env-id",
    "--policy random --env-id Nowhere-v0": "Nowhere",
    "--policy random --env-id CarRacing-v3": "vectors",
    "--policy random --env-id FrozenLake-v1 --random-share 2": "--random-share",
    "--policy random --env-id FrozenLake-v1 --steps 0": "--steps",
    "--policy random --env-id FrozenLake-v1 --replay-buffer": "--replay-buffer",
    "--run-dir nothing-here": "nothing-here",
    "--run-dir some-run --replay-buffer --env-id Pendulum-v1": "no --env-id",
}


@pytest.mark.parametrize("flags", WRONG)
def test_mistakes_are_one_line(flags, monkeypatch):
    with pytest.raises(record.UsageError, match=WRONG[flags]):
        run(monkeypatch, *flags.split(), "--output", "a")
    assert not Path("a").exists()


def test_no_step_is_lost_for_an_unknown_command_or_a_name_that_is_no_text(trained, monkeypatch):
    run_dir = Path(shutil.copytree(trained("q_learning", "--env-id", "FrozenLake-v1"), "copy"))
    config = json.loads((run_dir / "config.json").read_text())
    del config["command"]
    (run_dir / "config.json").write_text(json.dumps(config))
    output = os.fsdecode(b"a\xff")
    run(monkeypatch, "--run-dir", run_dir, "--steps", 5, "--output", output)
    assert data_of(output)[1]["trained_by"] == ["an unknown command"]


def test_mistakes_of_runs_and_folders(trained, monkeypatch):
    run_dir = trained("q_learning", "--env-id", "FrozenLake-v1")
    with pytest.raises(record.UsageError, match="sac, td3 and dqn"):
        run(monkeypatch, "--run-dir", run_dir, "--replay-buffer", "--output", "a")
    with pytest.raises(record.UsageError, match="not what the agent was trained in"):
        run(monkeypatch, "--run-dir", run_dir, "--env-id", "CliffWalking-v1", "--output", "a")
    for script in "sft", "reward_model":
        Path(script).mkdir()
        Path(script, "config.json").write_text(json.dumps({"script": script}))
        with pytest.raises(record.UsageError, match="learns from text"):
            run(monkeypatch, "--run-dir", script, "--output", "a")
    Path("list").mkdir()
    Path("list", "config.json").write_text("[]")
    with pytest.raises(record.UsageError, match="no run folder"):
        run(monkeypatch, "--run-dir", "list", "--output", "a")
    Path("file").write_text("")
    for output in "file", "file/a":
        with monkeypatch.context() as patch, pytest.raises(record.UsageError, match="no folder that can be written to"):
            patch.setattr(record, "play", None)  # it turns out before any step
            run(patch, "--run-dir", run_dir, "--output", output)
    run(monkeypatch, "--run-dir", run_dir, "--steps", 5, "--output", "a")
    before = digest("a")
    with pytest.raises(record.UsageError, match="holds a data set"):
        run(monkeypatch, "--run-dir", run_dir, "--steps", 5, "--output", "a")
    assert digest("a") == before


def test_a_replay_buffer_that_is_not_there_or_damaged(trained, monkeypatch):
    run_dir = Path(shutil.copytree(trained("sac", "--env-id", "Pendulum-v1"), "copy"))
    for damage in Path.unlink, lambda path: path.write_bytes(b"PK"):
        damage(run_dir / "checkpoint.pt")
        with pytest.raises(record.UsageError, match=r"checkpoint.pt is missing, damaged"):
            run(monkeypatch, "--run-dir", run_dir, "--replay-buffer", "--output", "a")


def test_an_environment_in_a_module_of_the_current_folder(tmp_path):
    (tmp_path / "my_lake.py").write_text(
        "import gymnasium as gym\n"
        "gym.register('Lake-v0', 'gymnasium.envs.toy_text.frozen_lake:FrozenLakeEnv', max_episode_steps=9)\n"
    )
    flags = "--policy", "random", "--env-id", "my_lake:Lake-v0", "--steps", "5", "--output", "data"
    result = call(ROOT / "benchmark" / "record.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(data_of(tmp_path / "data")[0]["rewards"]) == 5


def test_the_shipped_data_are_made_again_by_their_commands(tmp_path):
    """To the bit: the first command trains the behaviour policy, the second is in data.json."""
    assert (SHIPPED / "data.npz").stat().st_size < 100_000
    (trained_by,) = data_of(SHIPPED)[1]["trained_by"]
    flags = shlex.split(trained_by)[2:]
    assert call("q_learning", *flags, cwd=tmp_path).returncode == 0
    _, about = data_of(SHIPPED)
    command = shlex.split(about["command"])[2:]
    assert command[-2:] == ["--output", "benchmark/offline/frozenlake"]
    result = call(ROOT / "benchmark" / "record.py", *command[:-1], "again", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    arrays, again = data_of(SHIPPED)[0], data_of(tmp_path / "again")[0]
    assert all(np.array_equal(arrays[name], again[name]) for name in iql.ARRAYS)
    assert digest(SHIPPED) == digest(tmp_path / "again")
