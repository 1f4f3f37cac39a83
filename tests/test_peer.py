"""peer.py: d3rlpy gets our flags and our transitions, and its runs are judged and reported like ours."""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT, call, rows

from algorithms import cql, iql
from benchmark import peer, record, report
from benchmark import run as launcher

PEER = ROOT / "benchmark" / "peer.py"
UV = Path(sys.executable).with_name("uv")


@pytest.fixture
def logs(monkeypatch):
    """135 transitions of Pendulum, whose actions are from -2 to 2, and a time limit in each 45."""
    monkeypatch.setattr(gym.spec("Pendulum-v1"), "max_episode_steps", 45)
    flags = "--policy", "random", "--env-id", "Pendulum-v1", "--steps", "135", "--output", "logs"
    monkeypatch.setattr(sys, "argv", ["benchmark/record.py", *flags])
    record.main()
    return "--dataset", "logs", "--env-id", "Pendulum-v1"


@pytest.fixture
def d3rlpy(monkeypatch):
    """In place of the package: it notes what it gets, and its policy always does the same."""
    seen = SimpleNamespace(configs=[], batches=[], action=2, loss=1.0)

    class Learner:
        def create_impl(self, *shapes):
            seen.shapes = shapes

        def update(self, batch):
            seen.batches.append(batch)
            return {"loss": seen.loss}

        def predict(self, obs):
            assert obs.dtype == np.float32
            return np.stack([np.array(seen.action)] * len(obs))

    class Algos:
        def __getattr__(self, name):
            def config(**values):
                seen.configs.append((name, values))
                return SimpleNamespace(create=lambda device: Learner())

            return config

    module, dataset = ModuleType("d3rlpy"), ModuleType("d3rlpy.dataset")
    module.algos, module.seed, module.dataset = Algos(), lambda seed: None, dataset
    module.optimizers = SimpleNamespace(
        CosineAnnealingLRFactory=lambda T_max: f"cosine over {T_max}",  # noqa: N803
        AdamFactory=lambda lr_scheduler_factory: f"Adam, {lr_scheduler_factory}",
    )
    module.preprocessing = SimpleNamespace(StandardObservationScaler=lambda **values: values)
    dataset.TransitionMiniBatch = SimpleNamespace
    monkeypatch.setitem(sys.modules, "d3rlpy", module)
    monkeypatch.setitem(sys.modules, "d3rlpy.dataset", dataset)
    monkeypatch.setattr(peer, "find_spec", lambda name: module)
    return seen


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["benchmark/peer.py", *map(str, flags)])
    peer.main()


# ---- What d3rlpy gets


def test_each_flag_reaches_the_setting_of_its_kind():
    args = iql.Args(
        batch_size=7, learning_rate=0.25, gamma=0.5, tau=0.125, expectile=0.75, temperature=6.0, max_weight=9.0
    )
    rates = {"actor_learning_rate": 0.25, "critic_learning_rate": 0.25}
    name, values, falling = peer.settings("iql", args, discrete=False)
    own = {"expectile": 0.75, "weight_temp": 6.0, "max_weight": 9.0, "tau": 0.125}
    assert (name, falling) == ("IQLConfig", ["actor_optim_factory"]), "iql's other rates stay, as in iql.py"
    assert values == {"batch_size": 7, "gamma": 0.5, "n_critics": 2} | rates | own
    name, values, falling = peer.settings("bc", args, discrete=False)
    assert (name, falling) == ("BCConfig", ["optim_factory"])
    assert values == {"batch_size": 7, "learning_rate": 0.25, "policy_type": "deterministic"}
    assert peer.settings("bc", args, discrete=True)[:2] == (
        "DiscreteBCConfig",
        {"batch_size": 7, "learning_rate": 0.25, "beta": 0.0},
    )
    args = cql.Args(batch_size=7, learning_rate=0.25, gamma=0.5, tau=0.125, cql_alpha=5.0, num_samples=3)
    name, values, falling = peer.settings("cql", args, discrete=False)
    own = {"conservative_weight": 5.0, "n_action_samples": 3, "tau": 0.125, "soft_q_backup": True, "n_critics": 2}
    own |= {"temp_learning_rate": 0.25, "initial_temperature": 0.2, "alpha_learning_rate": 0.0, "initial_alpha": 1.0}
    assert name == "CQLConfig"
    assert falling == ["actor_optim_factory", "critic_optim_factory", "temp_optim_factory"]
    assert values == {"batch_size": 7, "gamma": 0.5} | rates | own
    name, values, falling = peer.settings("cql", args, discrete=True)
    own = {"learning_rate": 0.25, "alpha": 5.0, "target_update_interval": 8, "n_critics": 1}
    assert (name, falling) == ("DiscreteCQLConfig", ["optim_factory"])
    assert values == {"batch_size": 7, "gamma": 0.5} | own


def test_our_networks_begin_as_the_peers_settings_say():
    agent = cql.CQL((3,), gym.spaces.Box(-1, 1, (2,)))
    _, values, _ = peer.settings("cql", cql.Args(), discrete=False)
    assert math.exp(agent.log_alpha.item()) == pytest.approx(values["initial_temperature"])
    assert len(agent.critics) == values["n_critics"]
    agent = cql.CQL((3,), gym.spaces.Discrete(2))
    assert len(agent.critics) == peer.settings("cql", cql.Args(), discrete=True)[1]["n_critics"]


def test_a_batch_is_rows_of_the_data_and_a_time_limit_is_no_end():
    n = 20
    data = {name: np.arange(2 * n).reshape(n, 2) for name in ("observations", "next_observations")}
    data |= {"next_observations": data["observations"] + 100, "actions": np.arange(n), "rewards": np.arange(n) / 2}
    data |= {"terminations": np.arange(n) == 3, "truncations": np.arange(n) == 5}
    batch = peer.draw(data, 300, np.random.default_rng(1))
    number = batch["actions"].astype(int)
    assert {*number.flat} == {*range(n)}, "also the last one of an episode"
    assert np.array_equal(batch["observations"], 2 * number + [0, 1])
    assert np.array_equal(batch["next_observations"], 2 * number + [100, 101])
    assert np.array_equal(batch["rewards"], number / 2)
    assert np.array_equal(batch["terminals"], number == 3)
    assert {array.dtype.name for name, array in batch.items() if name != "transitions"} == {"float32"}
    assert {len(array) for name, array in batch.items() if name != "transitions"} == {300}
    assert np.array_equal(batch["intervals"], np.ones((300, 1)))


# ---- A run


def test_a_run_is_a_row_of_its_own_in_the_report(monkeypatch, d3rlpy):
    flags = "--algorithm", "cql", "--eval-episodes", 30, "--eval-frequency", 150, "--batch-size", 8
    for seed in 1, 2:
        run(monkeypatch, *flags, "--total-timesteps", 250, "--seed", seed, "--run-dir", f"runs/{seed}")
    assert [row["global_step"] for row in rows(Path("runs/1"))] == [100, 150, 200, 250]
    assert ["eval/episodic_return" in row for row in rows(Path("runs/1"))] == [False, True, False, True]
    assert ["losses/loss" in row for row in rows(Path("runs/1"))] == [True, False, True, False]
    args = cql.Args(seed=1, eval_episodes=30)
    same = SimpleNamespace(obs_shape=(16,), action_space=gym.spaces.Discrete(4), act=lambda obs: np.full(len(obs), 2))
    expected = cql.evaluate(same, args, Path("films"))
    assert {key: rows(Path("runs/1"))[-1][key] for key in expected} == expected, "our evaluation, our seeds"
    assert expected["eval/episodic_length"] % 1, "which differ"
    (row,) = [report.summarise(e) for e in report.sort_out(report.find_runs("runs", ""), (1, 2))]
    assert (row["script"], row["environment"], row["n"], row["of"]) == ("d3rlpy_cql", "FrozenLake-v1", 2, 2)
    (experiment,) = report.sort_out(report.find_runs("runs", ""), ())
    command = report.reproduce(experiment)["command, and --seed"]
    assert command.startswith("`python benchmark/peer.py --algorithm cql --eval-episodes 30")
    name, values = d3rlpy.configs[0]
    assert name == "DiscreteCQLConfig"
    assert values["optim_factory"] == "Adam, cosine over 250"
    assert d3rlpy.shapes == ((16,), 4)
    data, _ = cql.open_dataset(str(cql.DATA), gym.make("FrozenLake-v1"))
    rewards = {float(reward) for batch in d3rlpy.batches for reward in batch.rewards.flat}
    assert rewards == {100 * float(reward) for reward in np.unique(data["rewards"])}, "--reward-scale"


def test_box_actions_are_scaled_for_the_environment(monkeypatch, d3rlpy, logs):
    d3rlpy.action = [0.5]
    flags = "--algorithm", "iql", *logs, "--total-timesteps", 3, "--eval-episodes", 2, "--return-range", 50
    run(monkeypatch, *flags, "--run-dir", "a")
    act = lambda obs: np.full((len(obs), 1), 1.0, np.float32)  # noqa: E731
    same = SimpleNamespace(obs_shape=(3,), action_space=gym.make("Pendulum-v1").action_space, act=act)
    expected = iql.evaluate(same, iql.Args(env_id="Pendulum-v1", eval_episodes=2), Path("films"))
    assert rows(Path("a"))[-1]["eval/episodic_return"] == pytest.approx(expected["eval/episodic_return"], rel=1e-6)
    actions = np.concatenate([batch.actions for batch in d3rlpy.batches])
    assert np.abs(actions).max() <= 1
    data, _ = iql.open_dataset("logs", gym.make("Pendulum-v1"))
    scale = 50 / abs(np.subtract(*data["rewards"].reshape(3, 45).sum(1)[:2]))  # the last episode may be cut
    rewards = np.concatenate([batch.rewards for batch in d3rlpy.batches])
    assert np.isclose(rewards, scale * data["rewards"]).any(1).all(), "--return-range"
    assert "optim_factory" not in d3rlpy.configs[0][1]
    assert d3rlpy.configs[0][1]["actor_optim_factory"] == "Adam, cosine over 3"


def test_observations_are_normalised_as_ours_are(monkeypatch, d3rlpy, logs):
    d3rlpy.action = [0.0]
    flags = "--algorithm", "bc", *logs, "--total-timesteps", 1, "--eval-episodes", 1, "--no-anneal-lr", "--norm-obs"
    run(monkeypatch, *flags, "--run-dir", "a")
    obs = np.load("logs/data.npz")["observations"]
    ((name, values),) = d3rlpy.configs
    scaler = values.pop("observation_scaler")
    assert (name, "optim_factory" in values) == ("BCConfig", False)
    assert np.allclose(scaler["mean"], obs.mean(0), atol=1e-5)
    assert np.allclose(scaler["std"], obs.std(0), atol=1e-5)
    assert scaler["eps"] == 1e-3
    args = json.loads(Path("a/config.json").read_text())["args"]
    assert "expectile" not in args, "what cloning has no use for is no argument of it"
    assert args["norm_obs"] is True


def test_the_launcher_finds_it_done_and_its_resume_begins_anew(monkeypatch, d3rlpy):
    flags = "--algorithm", "bc", "--total-timesteps", 2, "--eval-frequency", 2, "--eval-episodes", 3, "--seed", 5
    run(monkeypatch, *flags, "--run-dir", "a")
    before = json.loads(Path("a/config.json").read_text())
    planned = launcher.Run("a", "a", ["python", "peer.py"], [], "", 5, launcher.RESULT, "")
    launcher.read_progress(planned, Path("a"))
    assert (planned.step, planned.total) == (2, 2)
    assert planned.final == rows(Path("a"))[-1]["eval/episodic_return"]
    with open("a/metrics.jsonl", "a") as file:
        file.write("half a ro")
    run(monkeypatch, "--resume", "--run-dir=a")
    assert len(rows(Path("a"))) == 1
    after = json.loads(Path("a/config.json").read_text())
    assert after["command"] == before["command"]
    assert after["args"] == before["args"]
    with pytest.raises(peer.UsageError, match="holds a run"):
        run(monkeypatch, *flags, "--run-dir", "a")


def test_nan_ends_the_run(monkeypatch, d3rlpy):
    d3rlpy.loss = math.nan
    with pytest.raises(FloatingPointError, match="NaN or infinity at step 100"):
        run(monkeypatch, "--algorithm", "bc", "--total-timesteps", 100, "--eval-episodes", 1, "--run-dir", "a")


# ---- What is refused, and who runs it


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("", "--algorithm must be one of iql, cql, bc"),
        ("--algorithm sac", "invalid choice: 'sac'"),
        ("--algorithm iql", "no discrete actions"),
        ("--algorithm cql --expectile 0.9", "expectile"),
        ("--algorithm bc --gamma 2", "--gamma is 2.0"),
        ("--algorithm bc --dataset nothing", "no .npz file at --dataset nothing"),
        ("--algorithm bc --env-id Taxi-v4", "made in FrozenLake-v1, not Taxi-v4"),
        ("--algorithm bc --env-id Nothing-v0", "--env-id Nothing-v0"),
        ("--algorithm bc --track", "not for a peer"),
        ("--algorithm bc --device cuda", "not for a peer"),
        ("--resume", "--resume needs the --run-dir"),
        ("--resume --run-dir nothing", "--resume needs the --run-dir"),
        ("--resume --run-dir a --seed 2", "no flag but --run-dir"),
    ],
)
def test_what_is_refused(flags, complaint, monkeypatch):
    """Before d3rlpy is asked for, so also without it."""
    monkeypatch.setattr(peer, "find_spec", lambda name: pytest.fail("it would go on"))
    with pytest.raises((peer.UsageError, iql.UsageError, cql.UsageError), match=complaint):
        run(monkeypatch, *flags.split())


def test_a_mistake_is_one_line_and_exit_code_2():
    result = call(PEER, "--algorithm", "iql")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: --env-id FrozenLake-v1: d3rlpy's IQL has no discrete actions")


def test_without_d3rlpy_it_calls_uv(monkeypatch):
    called = []
    monkeypatch.setattr(peer, "find_spec", lambda name: None)
    monkeypatch.setattr(peer.os, "execv", lambda *words: called.append(words) or sys.exit())
    monkeypatch.setattr(peer.shutil, "which", lambda name, path: f"{name} of {path.split(':')[0]}")
    with pytest.raises(SystemExit):
        run(monkeypatch, "--algorithm", "bc", "--seed", 3)
    uv = f"uv of {Path(sys.executable).parent}"
    assert called == [(uv, [uv, "run", "--quiet", "--script", peer.__file__, "--algorithm", "bc", "--seed", "3"])]
    monkeypatch.setattr(peer.shutil, "which", lambda name, path: None)
    with pytest.raises(peer.UsageError, match="pip install uv"):
        run(monkeypatch, "--algorithm", "bc")


@pytest.mark.parametrize("suite", ["offline", "offline_mujoco"])
def test_the_suites_give_a_peer_what_ours_has(suite, monkeypatch):
    """The same steps, data and flags; and seeds on which nothing was chosen."""
    ours, peers = {}, {}
    for planned in launcher.plan(launcher.Args(suite=suite)):
        words, script = planned.command(Path())[1:], Path(planned.launch[-1]).stem
        if script == "peer":
            algorithm, _, args = peer.parse(words[1:])
            assert peer.settings(algorithm, args, discrete=suite == "offline")
        elif script in ("iql", "cql"):
            monkeypatch.setattr(sys, "argv", words)
            args = {"iql": iql, "cql": cql}[script].parse_args()
            algorithm = "bc" if getattr(args, "temperature", 1) == 0 else script
        else:
            continue
        assert args.seed >= 11
        kept = {k: v for k, v in asdict(args).items() if algorithm != "bc" or k not in peer.OF_VALUES}
        (peers if script == "peer" else ours)[args.env_id, algorithm, args.seed, args.total_timesteps] = kept
    assert peers.keys() - ours.keys() <= {("FrozenLake-v1", "bc", seed, 4000) for seed in range(11, 16)}
    assert len(peers) == {"offline": 10, "offline_mujoco": 21}[suite]
    for key in peers.keys() & ours.keys():
        other = {name for name in ours[key] if peers[key][name] != ours[key][name]}
        assert other == ({"reward_scale", "cql_alpha"} if suite == "offline" else set()), "see its docstring"


@pytest.fixture
def d3rlpys_python():
    """The interpreter of the environment that uv makes."""
    try:
        made = subprocess.run([UV, "sync", "--script", PEER], capture_output=True, text=True, timeout=400)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"uv makes no environment: {error}")
    if made.returncode:
        pytest.skip(f"uv makes no environment: {made.stderr[-300:]}")
    found = subprocess.run([UV, "python", "find", "--script", PEER], capture_output=True, text=True, check=True)
    return found.stdout.strip()


@pytest.mark.slow
@pytest.mark.again
@pytest.mark.timeout(900)  # it starts PyTorch and d3rlpy five times
@pytest.mark.usefixtures("d3rlpys_python")
def test_d3rlpy_itself(logs, tmp_path):
    """Each kind learns some steps."""
    few = {"total-timesteps": 100, "eval-frequency": 100, "eval-episodes": 1, "eval-max-steps": 30, "batch-size": 16}
    few = [f"--{name}={value}" for name, value in few.items()]
    for name, *flags in (["iql", *logs], ["cql", *logs], ["bc", *logs, "--norm-obs"], ["cql"], ["bc"]):
        folder = tmp_path / f"{name}{len(flags)}"
        result = call(PEER, "--algorithm", name, *flags, *few, "--run-dir", folder, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        (row,) = rows(folder)
        assert row["global_step"] == 100
        assert any(key.startswith("losses/") for key in row)
        assert json.loads((folder / "config.json").read_text())["versions"]["d3rlpy"] == "2.8.1"


@pytest.mark.slow
@pytest.mark.again
@pytest.mark.timeout(900)
def test_its_environments_are_ours(d3rlpys_python):
    """To the last bit."""
    program = (
        "import gymnasium as gym, numpy as np\n"
        "for name in 'HalfCheetah-v5', 'Hopper-v5', 'FrozenLake-v1':\n"
        "    env = gym.make(name)\n"
        "    env.action_space.seed(1)\n"
        "    seen = [env.reset(seed=1)[0]]\n"
        "    for _ in range(50):\n"
        "        obs, reward, ended, *_ = env.step(env.action_space.sample())\n"
        "        seen += [obs, float(reward), ended]\n"
        "        if ended: break\n"
        "    print(name, [np.asarray(x).tolist() for x in seen])\n"
    )
    here, there = (
        subprocess.run([interpreter, "-c", program], capture_output=True, text=True, check=True).stdout
        for interpreter in (sys.executable, d3rlpys_python)
    )
    assert here == there
