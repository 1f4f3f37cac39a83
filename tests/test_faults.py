"""Traits of environments, machines and command lines over which scripts of this kind have stumbled."""

import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import fault_envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, call, rows, timeless, tiny
from facts import FACTS
from fault_envs import BOUNDS, COUNT, GRIDS, PICTURES, SWITCH

from benchmark import report

ACTING = [path.stem for path in SCRIPTS if FACTS[path.stem].acts]
SCRIPTS_OF = {  # each kind of fault_envs.py
    "discrete": ["ppo", "dqn", "reinforce"],
    "box": ["td3", "sac", "ppo", "reinforce"],
    "table": ["q_learning"],
    "goal": ["her"],
    "team": ["maddpg"],
}
CASES = [(script, kind) for kind, names in SCRIPTS_OF.items() for script in names if script in ACTING]
slow = pytest.mark.slow


def cases(*without, quick=("ppo",)):
    """A test for each script in each of its kinds, of which `make test` runs the quick scripts."""
    params = [
        pytest.param(script, kind, marks=[slow][script in quick :]) for script, kind in CASES if kind not in without
    ]
    return pytest.mark.parametrize(("script", "kind"), params)


def env_of(name, kind):
    return f"fault_envs:{name}Team" if kind == "team" else f"fault_envs:{name}-{kind}-v0"


SHORT = ["--total-timesteps", 256, "--eval-frequency", 128, "--checkpoint-frequency", 64]


def module_of(script):
    return importlib.import_module(f"algorithms.{script}")


def is_one_line(err):
    return err.startswith("error: ") and err.count("\n") == 1 and len(err) < 700


@pytest.fixture(autouse=True)
def nothing_counted():
    for counter in COUNT, SWITCH:
        counter.clear()


@pytest.fixture
def trained(cli):
    """Trains a script in one of the environments: the rows of its log without what the clock says, and its output."""

    def train(script, env_id, *flags):
        run_dir = Path(f"run{len(list(Path().glob('run*')))}")
        code, out, err = cli(script, *tiny(script, *SHORT, "--env-id", env_id, *flags), "--run-dir", run_dir)
        assert code == 0, err
        return timeless(run_dir), out + err

    return train


# ---- How environments are made


@cases()
def test_an_environment_without_a_constructor_trains_and_only_filming_needs_a_render_mode(script, kind, cli, trained):
    log, _ = trained(script, env_of("Plain", kind))
    assert log
    for flags in tiny(script, "--env-id", env_of("Plain", kind)), ["--run-dir", "run0", "--evaluate"]:
        code, _, err = cli(script, *flags, "--capture-video")
        assert code == 2, err
        assert is_one_line(err)
        assert "render_mode" in err


@cases()
def test_an_argument_that_the_constructor_misses_is_named(script, kind, cli):
    code, _, err = cli(script, *tiny(script), "--env-id", env_of("NeedsFile", kind))
    assert code == 2, err
    assert is_one_line(err)
    assert "csv" in err


@cases()
def test_an_error_within_a_constructor_is_a_traceback_to_its_place(script, kind, cli):
    with pytest.raises(ValueError, match="no market today") as error:
        cli(script, *tiny(script), "--env-id", env_of("Faulty", kind))
    assert Path(error.traceback[-1].path).name == "fault_envs.py"


OWN_ENVIRONMENT = """
import gymnasium
from fault_envs import FORCE, KINDS, Plain, PlainTeam

class Own(Plain):
    observation_space, action_space = KINDS.get({kind!r}, (FORCE, FORCE))

def team():
    return PlainTeam()

gymnasium.register("Own-v0", Own)
"""


@cases()
def test_a_module_in_the_current_folder_is_found_also_by_the_printed_command(script, kind, tmp_path):
    shutil.copy(fault_envs.__file__, tmp_path)
    (tmp_path / "of_mine.py").write_text(OWN_ENVIRONMENT.format(kind=kind))
    env_id = "of_mine:team" if kind == "team" else "of_mine:Own-v0"
    result = call(script, *tiny(script, *SHORT, "--env-id", env_id), cwd=tmp_path, PYTHONPATH="")
    assert result.returncode == 0, result.stderr
    command = result.stdout.splitlines()[-1].replace(" --capture-video", "")
    result = subprocess.run(
        command, shell=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True
    )
    assert result.returncode == 0, (command, result.stderr)
    assert "eval/episodic_return" in result.stdout


# ---- What environments return


@pytest.mark.parametrize("trait", ["PaysArrays", "PaysZeroDim", "EndsInArrays", "Overwrites", "Float64"])
@cases()
def test_arrays_for_numbers_and_reused_arrays_are_the_same_run(script, kind, trait, trained):
    if kind == "team" and trait == "EndsInArrays":
        trait = "PaysArrays"  # PettingZoo's tables of agents hold no arrays of such
    assert trained(script, env_of(trait, kind))[0] == trained(script, env_of("Plain", kind))[0]


@cases("table", "goal")
def test_an_observation_of_another_shape_than_its_space_is_no_observation(script, kind, cli):
    """One number must not become three equal ones."""
    try:
        code, _, err = cli(script, *tiny(script, *SHORT, "--env-id", env_of("ShowsTooLittle", kind)))
    except (ValueError, RuntimeError):
        return  # a traceback into Gymnasium, or into PettingZoo's wrapper
    assert code == 1
    assert "another shape" in err


@cases()
def test_rewards_that_are_integers(script, kind, trained):
    log, _ = trained(script, env_of("PaysIntegers", kind))
    returns = [row["charts/episodic_return"] for row in log if "charts/episodic_return" in row]
    assert returns
    assert all(value == int(value) for value in returns)


NANS = ["PaysNan", "PaysInfinity", "ShowsNan", "ShowsInfinity", "BeginsWithNan"]


@pytest.mark.parametrize("trait", NANS)
@cases()
def test_nan_from_an_environment_is_one_line(script, kind, trait, cli):
    if kind == "table" and not trait.startswith("Pays"):
        trait = "PaysNan"  # a state has a number
    code, _, err = cli(script, *tiny(script, "--env-id", env_of(trait, kind)), "--run-dir", "run")
    assert code == 1, err
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert "NaN" in line
    assert len(line) < 700
    assert "Traceback" not in err
    assert all("--resume" in other for other in err.splitlines() if other != line)
    for row in rows(Path("run")):
        assert np.isfinite([*row.values()]).all()


@cases()
def test_episodes_are_whole_whatever_the_checkpoints(script, kind, trained):
    log, _ = trained(script, env_of("Plain", kind), "--checkpoint-frequency", 4)
    lengths = [row["charts/episodic_length"] for row in log if "charts/episodic_length" in row]
    num_envs = 1 if script in ("q_learning", "reinforce") else 2
    assert lengths == [10] * (256 // num_envs // 10 * num_envs)


def test_checkpoints_do_not_cut_the_long_episodes_of_pendulum(trained):
    flags = ["--num-envs", 8, "--num-steps", 50, "--total-timesteps", 3200, "--checkpoint-frequency", 320]
    log, _ = trained("ppo", "Pendulum-v1", *flags, "--eval-frequency", 10**6)
    assert [row["charts/episodic_length"] for row in log if "charts/episodic_length" in row] == [200] * 16


@pytest.mark.parametrize("script", [script for script in ("her",) if script in ACTING])
def test_success_may_stand_in_an_array(script, trained):
    log, _ = trained(script, env_of("ListsSuccess", "goal"))
    assert {row["charts/success"] for row in log if "charts/success" in row} == {1}


@pytest.mark.parametrize("script", [script for script in ("ppo", "dqn", "reinforce") if script in ACTING])
def test_real_numbers_in_a_space_of_integers_are_not_cut_off(script):
    seen, space = observations(script, "fault_envs:Tenths-v0", steps=5)
    assert space.shape == (2,)
    assert np.allclose(seen[:, 0], np.arange(6) / 10)
    assert np.allclose(seen[:, 1], 0.5)


ACTS = {
    "discrete": ["Int32", "Own"], "box": ["Half", "Double", "Scalar", "Own"], "table": ["Int32", "Own"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("script", "env_id"),
    [
        pytest.param(script, f"fault_envs:Acts{name}-{kind}-v0", marks=[slow][script in ("ppo", "dqn", "td3") :])
        for script, kind in CASES
        for name in ACTS.get(kind, ())
    ],
)
def test_an_environment_gets_what_its_space_contains(script, env_id, trained):
    """In training, in evaluations, and from the loaded agent, for one observation and for several."""
    trained(script, env_id)
    agent = module_of(script).load("run0")
    with closing(gym.make(env_id)) as env:
        obs = env.reset(seed=1)[0]
        assert env.action_space.contains(agent.act(obs) if np.ndim(obs) else agent.act(obs).item())
        assert all(env.action_space.contains(action) for action in agent.act(np.stack([obs, obs])))


@pytest.mark.parametrize(
    ("script", "env_id"),
    [
        (script, f"fault_envs:{name}-v0")
        for script in ACTING
        for name in {
            "ppo": ["SeesMissions", "SeesScreen", "SeesManyFrames"], "dqn": ["SeesScreen", "SeesManyFrames"],
            "reinforce": ["SeesMissions", "SeesScreen"], "her": ["UnlikeGoals", "SeesMissions"],
        }.get(script, ())
    ],
)  # fmt: skip
def test_what_a_script_cannot_observe_is_one_line(script, env_id, cli):
    code, _, err = cli(script, *tiny(script), "--env-id", env_id)
    assert code == 2, err
    assert is_one_line(err)
    assert "Dict" in err or "Box" in err


@pytest.mark.parametrize("picture", fault_envs.Draws.RETURNS)
@cases("team", quick=("ppo",))
def test_what_is_no_picture_is_said_before_the_run(script, kind, picture, cli):
    SWITCH[picture] = 1
    code, _, err = cli(script, *tiny(script), "--env-id", env_of("Draws", kind), "--capture-video", "--run-dir", "run")
    assert code == 2, err
    assert is_one_line(err)
    assert "render()" in err
    assert not Path("run/metrics.jsonl").exists()


# ---- Action spaces without bounds


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("script", [script for script in ("ppo", "reinforce") if script in ACTING])
def test_a_bound_that_no_controller_could_send_is_no_bound(script, bounds, dtype, trained):
    fault_envs.Joint.SENT.clear()
    trained(script, f"fault_envs:Joint{bounds}-{dtype}-box-v0")
    sent = np.array(fault_envs.Joint.SENT)
    assert np.isfinite(sent).all()
    assert np.abs(sent).max() < 20, "standard deviations of 1 around 0"
    assert len(np.unique(sent)) > len(sent) / 4
    low, high = BOUNDS[bounds]
    assert (sent >= low).all()
    assert (sent <= high).all()


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize(
    ("script", "kind"), [(s, k) for s, k in {"td3": "box", "sac": "box", "her": "goal"}.items() if s in ACTING]
)
def test_scripts_that_need_bounds_refuse_in_one_line(script, kind, bounds, cli):
    fault_envs.Joint.SENT.clear()
    code, _, err = cli(script, *tiny(script), "--env-id", f"fault_envs:Joint{bounds}-float32-{kind}-v0")
    assert code == 2, err
    assert is_one_line(err)
    assert "Box" in err
    assert not fault_envs.Joint.SENT
    assert not Path("runs").exists()


# ---- Grids and pictures


def observations(script, env_id, steps=9):
    module = module_of(script)
    with closing(module.make_env(module.Args(env_id=env_id))) as env:
        seen = [env.reset(seed=1)[0]]
        for _ in range(steps):
            seen.append(env.step(0)[0])
        return np.array(seen), env.observation_space


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("script", [script for script in SCRIPTS_OF["discrete"] if script in ACTING])
def test_a_small_grid_of_codes_is_a_vector(script, grid):
    shape, *_ = GRIDS[grid]
    seen, space = observations(script, f"fault_envs:Grid{grid}-v0")
    assert space.shape == (np.prod(shape),)
    assert np.issubdtype(seen.dtype, np.number) or seen.dtype == bool
    different = (seen != seen[0]).sum(0)
    assert (different > 0).sum() == 1, "one code tells the two grids apart, and it is left as it is"
    assert set(np.unique(seen.astype(float))) <= {0, 1, 2}


@pytest.mark.parametrize("script", [script for script in SCRIPTS_OF["discrete"] if script in ACTING])
def test_a_grid_of_bytes_is_learned_as_one_of_floats(script, trained):
    logs = [trained(script, f"fault_envs:Grid{grid}-v0") for grid in ("Minigrid", "Floats", "Integers")]
    assert logs[0][0] == logs[1][0] == logs[2][0]
    assert "vectors (147,)" in logs[0][1], "it says what it took the observation for"


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("script", [script for script in ("ppo", "dqn") if script in ACTING])
def test_a_picture_is_grey_84_by_84_whatever_the_order_of_its_axes(script, picture):
    seen, space = observations(script, f"fault_envs:Picture{picture}-v0", steps=4)
    assert space == gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    assert seen.dtype == np.uint8
    frame = seen[-1, -1].astype(float)
    assert frame[:41, :41] == pytest.approx(220, abs=60 if "Alpha" in picture else 1)
    assert frame[43:].mean() < 80, "dark below"
    assert frame[:, 43:].mean() < 80, "dark on the right"


@pytest.mark.parametrize("script", [script for script in ("ppo", "dqn") if script in ACTING])
def test_a_script_says_that_it_saw_pictures(script, trained):
    _, out = trained(script, "fault_envs:PictureDepth-v0", "--total-timesteps", 128, "--learning-rate", 1e-4)
    assert "images (4, 84, 84)" in out


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("script", [script for script in ["reinforce"] if script in ACTING])
def test_scripts_for_vectors_refuse_pictures(script, picture, cli):
    code, _, err = cli(script, *tiny(script), "--env-id", f"fault_envs:Picture{picture}-v0")
    assert code == 2, err
    assert is_one_line(err)
    assert "ppo.py" in err


# ---- What is opened is closed


def everything_is_closed():
    assert COUNT["made"] > 0
    assert COUNT["made"] == COUNT["closed"], COUNT


@cases(quick=ACTING)
def test_a_run_closes_its_environments(script, kind, cli, trained):
    trained(script, env_of("Counted", kind))
    everything_is_closed()
    for flags in ["--resume"], ["--resume", "--total-timesteps", 400], ["--evaluate"], ["--evaluate", "--seed", 3]:
        COUNT.clear()
        code, _, err = cli(script, "--run-dir", "run0", *flags)
        assert code == 0, err
        everything_is_closed()


@pytest.mark.parametrize(
    ("what", "number"), [("made", 2), ("made", 4), ("reset", 2), ("reset", 4), ("stepped", 5), ("stepped", 150)]
)
@cases()
def test_whatever_breaks_environments_are_closed(script, kind, what, number, cli):
    """The second and fourth that are made: of training and of evaluation."""
    for error in 0, 1:
        COUNT.clear()
        SWITCH.update({what: number, "error": error})
        with pytest.raises(type(fault_envs.ERRORS[error])):
            cli(script, *tiny(script, *SHORT, "--env-id", env_of("Counted", kind)), "--run-dir", f"run{error}")
        SWITCH.clear()
        everything_is_closed()


@cases()
def test_a_signal_closes_environments(script, kind, cli, monkeypatch):
    module = module_of(script)
    goes_on = module.Run.goes_on

    def stopping(self):
        if self.global_step:
            signal.raise_signal(signal.SIGTERM)
        return goes_on(self)

    monkeypatch.setattr(module.Run, "goes_on", stopping)
    code, _, err = cli(script, *tiny(script, *SHORT, "--env-id", env_of("Counted", kind)))
    assert code == 143, err
    everything_is_closed()


@cases()
def test_a_refusal_closes_environments(script, kind, cli):
    Path("taken").mkdir()
    Path("taken", "config.json").write_text("{}")
    Path("file").write_text("")
    env_id = env_of("Counted", kind)
    refusals = [["--run-dir", "taken"], ["--run-dir", "file/run"], ["--capture-video"]]
    if kind != "team":
        refusals += [["--env-id", f"fault_envs:CountedOdd{what}-v0"] for what in ("Observation", "Action")]
        refusals += [["--env-id", env_of("CountedPictures", kind), "--capture-video"]]
    made = 0
    for flags in refusals:
        COUNT.clear()
        code, _, err = cli(script, *tiny(script, "--env-id", env_id), *flags)
        assert code == 2, err
        assert is_one_line(err)
        assert COUNT["made"] == COUNT["closed"], (flags, COUNT)
        made += COUNT["made"]
    assert made > 1


# ---- A break in mid-run


@cases()
def test_a_break_of_the_environment_is_its_traceback_and_a_line_that_resuming_repeats_it(
    script, kind, cli, capsys, tmp_path
):
    flags = tiny(script, "--env-id", env_of("Breaks", kind))
    run_dir, places = tmp_path / "broken", []
    for again in flags, ["--resume"], ["--resume"]:
        with pytest.raises(RuntimeError, match="the arm is stuck") as error:
            cli(script, *again, "--run-dir", run_dir)
        assert Path(error.traceback[-1].path).name == "fault_envs.py"
        err = capsys.readouterr().err
        assert f"--run-dir {run_dir} --resume" in err
        assert "repeat" in err
        places.append(rows(run_dir)[-1]["global_step"])
    assert places[0] > 0
    assert len(set(places)) == 1, "it breaks again where it broke"
    SWITCH["mended"] = 1
    assert cli(script, "--run-dir", run_dir, "--resume")[0] == 0
    assert cli(script, *flags, "--run-dir", tmp_path / "never broken")[0] == 0
    assert timeless(run_dir) == timeless(tmp_path / "never broken")


def test_the_traceback_of_a_break_ends_in_the_users_file():
    """As a terminal shows it: the line about --resume does not come after the last line of the traceback."""
    result = call("ppo", *tiny("ppo", "--env-id", "fault_envs:Breaks-discrete-v0", "--run-dir", "run"), cwd=Path())
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert lines[-1] == "RuntimeError: the arm is stuck"
    assert [line for line in lines if line.startswith("  File ")][-1].split('"')[1] == fault_envs.__file__
    assert sum("--resume" in line for line in lines) == 1


# ---- Environments that can't be replayed


@pytest.mark.parametrize("trait", ["Dice", "SomeDice", "DiceEnd", "TorchDice", "DiceMap"])
@cases()
def test_what_draws_from_the_global_generators_repeats_itself_with_the_seed(script, kind, trait, trained):
    logs = []
    for seed in 1, 1, 2:
        for set_seed in random.seed, np.random.seed, torch.manual_seed:
            set_seed(len(logs))
        logs.append(trained(script, env_of(trait, kind), "--seed", seed)[0])
    assert logs[0] == logs[1] != logs[2]


@cases()
def test_evaluations_do_not_touch_pytorchs_generator_either(script, kind, trained):
    """An environment may draw from it. How often a run is evaluated changes nothing in its training."""
    logs = [trained(script, env_of("TorchDice", kind), "--eval-frequency", frequency)[0] for frequency in (64, 256)]
    often, seldom = ([row for row in log if not any(name.startswith("eval/") for name in row)] for log in logs)
    assert often == seldom


@pytest.mark.parametrize("trait", ["Dice", "SomeDice", "DiceEnd"])
@cases()
def test_where_no_replay_is_exact_a_line_says_so_and_the_run_goes_on(script, kind, trait, cli, monkeypatch):
    module = module_of(script)
    goes_on, stops = module.Run.goes_on, []

    def stopping(self):
        if self.global_step >= 2 ** len(stops) * 9:
            stops.append(self.global_step)
            signal.raise_signal(signal.SIGTERM)
        return goes_on(self)

    monkeypatch.setattr(module.Run, "goes_on", stopping)
    code, out, err = cli(script, *tiny(script, "--env-id", env_of(trait, kind)), "--run-dir", "run")
    said = []
    while code == 143:
        code, out, err = cli(script, "--run-dir", "run", "--resume")
        said.append("replayed" in out + err)
    assert code == 0, err
    assert len(set(stops)) > 3
    assert any(said)
    assert rows(Path("run"))[-1]["global_step"] == 4 * FACTS[script].quarter
    for row in rows(Path("run")):
        assert row.get("charts/episodic_length", 10) <= (20 if trait == "DiceEnd" else 10)


def test_episodes_that_can_be_replayed_go_on_beside_those_that_cannot(capsys):
    module = module_of("ppo")
    args = module.Args(env_id="fault_envs:SomeDice-discrete-v0", num_envs=8, run_dir="run")
    with closing(module.Run(args)) as run:
        run.start(model=module.make_agent(args, run.obs_shape, run.action_space))
        for _ in range(13):
            run.step(np.ones(8, int))
        run.save()
        obs, returns, throws = run.obs.copy(), run.returns.copy(), [env.unwrapped.throws for env in run.envs]
    with closing(module.Run(module.saved_args("run", resume=True))) as run:
        run.start(model=module.make_agent(args, run.obs_shape, run.action_space))
        assert 0 < sum(throws) < 8
        for i, lost in enumerate(throws):
            assert run.obs[i, 0] == (0 if lost else pytest.approx(0.3))
            assert run.returns[i] == (0 if lost else returns[i])
            assert lost or np.array_equal(run.obs[i], obs[i])
        for _ in range(7):
            *_, truncated, _ = run.step(np.ones(8, int))
        assert truncated.tolist() == [not lost for lost in throws]
    assert rows(Path("run"))[-1]["charts/episodic_length"] == 10


# ---- Environments without an end


@cases()
def test_an_environment_without_an_end_is_cut_in_evaluations_which_say_so(script, kind, cli, trained):
    flags = ["--eval-max-steps", 30, "--eval-episodes", 2, "--run-dir", "run"]
    code, out, err = cli(script, *tiny(script, *SHORT, "--env-id", env_of("Endless", kind)), *flags)
    assert code == 0, err
    assert re.search(r"--eval-max-steps 30\b", out)
    assert {row["eval/episodic_length"] for row in rows(Path("run")) if "eval/episodic_length" in row} == {30}
    _, out = trained(script, env_of("Plain", kind), "--eval-max-steps", 11)
    assert "--eval-max-steps" not in out, "nothing was cut"


# ---- Other machines


@pytest.mark.parametrize("script", ACTING)
def test_a_system_without_sysconf(script, cli, monkeypatch):
    """Windows has none."""
    monkeypatch.delattr(os, "sysconf")
    code, _, err = cli(script, *tiny(script, *SHORT))
    assert code == 0, err


@pytest.mark.parametrize("script", ACTING)
def test_a_system_without_git_or_any_other_program(script, cli, monkeypatch):
    monkeypatch.setenv("PATH", "nowhere")
    code, _, err = cli(script, *tiny(script, *SHORT, "--run-dir", "run"))
    assert code == 0, err
    assert not re.fullmatch(r"[0-9a-f]{40}.*", json.loads(Path("run", "config.json").read_text())["commit"] or "")


@pytest.mark.parametrize("script", [script for script in ACTING if script != "q_learning"])
def test_nothing_of_64_bits_and_a_point_goes_to_a_gpu_of_apple(script, cli, monkeypatch):
    """MPS has no float64: here a device of that name stands for it, and moving such numbers to it fails as it does."""
    module, to, moved = module_of(script), torch.Tensor.to, []

    def moving(self, *args, **kwargs):
        moved.append(self)
        if self.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return to(self, *args, **kwargs)

    def start(self, **parts):
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                moved.extend(part.to(self.device).state_dict().values())
        return start_run(self, **parts)

    start_run = module.Run.start
    monkeypatch.setattr(module.Run, "start", start)
    monkeypatch.setattr(torch.Tensor, "to", moving)
    flags = ["--norm-obs"] if "norm_obs" in module.Args.__dataclass_fields__ else []
    code, _, err = cli(script, *tiny(script, *SHORT, *flags))
    assert code == 0, err
    assert len(moved) > 20


ONE_LINE = {  # a script and flags: a word of the one line, round which nothing else stands
    "ppo --env-id LunarLander-v2": "LunarLander-v3",
    "ppo --env-id LunarLander-v2 --capture-video": "LunarLander-v3",
    "ppo --env-id HalfCheetah-v5 --capture-video": "MUJOCO_GL=egl",
    "ppo --env-id HalfCheetah-v3": "HalfCheetah-v",
    "ppo --env-id ALE/Nothing-v5": "ALE/Nothing",
    "sac --env-id Hopper-v5 --capture-video": "MUJOCO_GL=egl",
    "her --env-id gymnasium_robotics:FetchReach-v4 --capture-video": "MUJOCO_GL=egl",
    "dqn --env-id MountainCar-v7": "v0",
    "q_learning --env-id Taxi-v3": "Taxi-v4",
    "maddpg --env-id simple_spred_v3": "mpe2",
    "alphazero --env-id tic_tac_toe(size=4)": "size",
    "muzero --env-id CartPole-v7": "v1",
}


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=[] if command.startswith("ppo") else slow)
        for command in ONE_LINE
        if command.split()[0] in ACTING
    ],
)
def test_no_library_prints_round_the_one_line(command):
    script, *flags = command.split()
    environ = {
        name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY")
    }
    script_and_flags = [ROOT / "algorithms" / f"{script}.py", *tiny(script), *flags]
    result = subprocess.run([sys.executable, *script_and_flags], env=environ, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines(keepends=True) if not line.startswith("AdroitHand")]
    assert is_one_line("".join(lines)), result.stderr  # but for what gymnasium_robotics says when it is imported
    assert ONE_LINE[command] in result.stderr
    assert not result.stdout


# ---- What a model is asked to act in


OTHERS = {
    "ppo": ["Acrobot-v1", "Pendulum-v1", "FrozenLake-v1", "fault_envs:PictureSmall-v0"],
    "dqn": ["Acrobot-v1", "FrozenLake-v1", "fault_envs:PictureSmall-v0"],
    "reinforce": ["Acrobot-v1", "Pendulum-v1", "FrozenLake-v1"],
    "td3": ["MountainCarContinuous-v0", "InvertedPendulum-v5"],
    "sac": ["MountainCarContinuous-v0", "InvertedPendulum-v5"],
    "q_learning": ["Taxi-v4", "CliffWalking-v1"],
    "her": ["fault_envs:Plain-goal-v0"],
    "maddpg": ["simple_tag_v3", "fault_envs:PlainTeam"],
    "iql": ["CliffWalking-v1", "CartPole-v1"],
    "cql": ["CliffWalking-v1", "CartPole-v1"],
    "decision_transformer": ["CliffWalking-v1", "CartPole-v1"],
    "alphazero": ["connect_four(rows=4,columns=4,x_in_row=3)", "othello"],
    "muzero": ["Acrobot-v1", "FrozenLake-v1", "tic_tac_toe"],
}


@pytest.mark.parametrize("script", ACTING)
def test_evaluating_in_another_environment_names_both_spaces(script, cli):
    assert cli(script, *tiny(script, *SHORT, "--run-dir", "run"))[0] == 0
    for env_id in OTHERS[script]:
        code, _, err = cli(script, "--run-dir", "run", "--evaluate", "--env-id", env_id)
        assert code == 2, err
        assert is_one_line(err)
        assert env_id in err
        assert "damaged" not in err
        assert len(re.findall(r"\(\d+,|Discrete|Box", err)) >= 2, "both are named"


# ---- Sweeps


@pytest.mark.parametrize("script", [pytest.param(s, marks=[slow][s == "ppo" :]) for s in ACTING])
def test_flags_as_a_sweep_of_wandb_writes_them(script, cli):
    """With ${args_no_boolean_flags} in its command: underscores, values after =, switches alone."""
    fields = module_of(script).Args.__dataclass_fields__
    rate = FACTS[script].rate.replace("-", "_")
    flags = [f"--{rate}=0.25", "--total_timesteps=256", "--eval_frequency=128", "--track"]
    flags += ["--anneal_lr"] if "anneal_lr" in fields else []
    code, _, err = cli(script, *tiny(script), *flags, "--run-dir", "run")
    assert code == 0, err
    args = json.loads(Path("run", "config.json").read_text())["args"]
    assert (args[rate], args["total_timesteps"], args["track"]) == (0.25, 256, True)


@slow
def test_the_run_of_a_sweeps_agent_gets_the_rows(tmp_path):
    """The agent chooses the run's id, and says so in the environment."""
    (tmp_path / "parameters.yaml").write_text("wandb_version: 1\nlearning_rate:\n  value: 0.25\n")
    sweep = {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "chosen1", "WANDB_SWEEP_PARAM_PATH": "parameters.yaml"}
    flags = tiny("ppo", *SHORT, "--track", "--learning-rate", 0.25, "--run-dir", "run")
    result = call("ppo", *flags, cwd=tmp_path, **sweep)
    assert result.returncode == 0, result.stderr
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert offline.name.endswith("-chosen1")


# ---- ppo.py's own


def test_the_first_reward_after_a_long_time_without_is_not_huge(trained, monkeypatch):
    from algorithms import ppo

    scaler = ppo.RewardScaler(num_envs=2, gamma=0.99)
    for _ in range(50):
        scaled = scaler(np.zeros((128, 2)), np.zeros((128, 2), bool))
        assert (scaled == 0).all()
    rewards = np.zeros((128, 2))
    rewards[100, 1], rewards[120, 0] = 1, -1
    scaled = scaler(rewards, rewards != 0)
    assert scaled.max() == 10
    assert scaled.min() == -10
    gae, seen = ppo.gae, []
    monkeypatch.setattr(ppo, "gae", lambda rewards, *rest: (seen.append(rewards), gae(rewards, *rest))[1])
    log, _ = trained("ppo", "fault_envs:Drought-v0", "--total-timesteps", 8192, "--eval-frequency", 8192)
    assert 0 < np.max(seen) <= 10
    assert max(row.get("losses/value_loss", 0) for row in log) < 40, "25; without a limit, 61"


def test_compile_compiles_once_for_whole_minibatches_and_never_for_the_last_short_batch(trained, monkeypatch):
    compiled, original = [], torch.compile

    def eager(graph, _):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function: original(function, backend=eager))
    torch._dynamo.reset()
    trained("ppo", "CartPole-v1", "--compile", "--total-timesteps", 128 * 3 + 50, "--eval-frequency", 10**6)
    assert len(compiled) == 1


# ---- her.py's own


@pytest.mark.parametrize("script", [script for script in ["her"] if script in ACTING])
def test_a_goal_environment_without_compute_terminated_trains_and_it_is_said_once(script, trained):
    log, out = trained(script, "fault_envs:Plain-goal-v0")
    assert log
    assert out.count("compute_terminated") == 1


# ---- Words and figures


@pytest.mark.parametrize("script", [script for script in ["dqn"] if script in ACTING])
def test_how_long_ez_greedy_holds_an_action_is_said_where_it_differs_from_the_paper(script):
    """What dqn.py does, test_dqn.py tests: n steps; Algorithm 1 of the paper counts n down after the first one."""
    differs = module_of(script).__doc__.split("Differs from the paper")[1]
    assert re.search(r"ez-greedy[^.]*n \+ 1 steps", " ".join(differs.split()))
    assert "Sec. 4.2" not in module_of(script).__doc__


def test_what_teams_that_follow_rules_earn_is_one_figure_everywhere():
    """by_hand.json has it; the report measures runs by it, and the page of results shows it."""
    readme = " ".join((ROOT / "benchmark" / "README.md").read_text().split())
    kept = json.loads((ROOT / "benchmark" / "results" / "by_hand.json").read_text())["rows"]
    earned = {(row["environment"], row["continuous_actions"], row["team"]): row["episodic_return"] for row in kept}
    for (environment, continuous, team), value in earned.items():
        shown = report.REFERENCES.get(f"{environment}, continuous" if continuous else environment)
        if team == "random actions" and shown:
            assert shown[0] == pytest.approx(value, abs=0.051), environment
            assert f"{value:.1f}" in readme
        if team in ("the best assignment", "perfect messages") and shown:
            assert shown[1] == pytest.approx(value, abs=0.051), environment
            assert f"{value:.1f}" in readme
    assert not re.search(r"-\d\d\.\d", module_of("maddpg").__doc__), "no figure of its own"


# ---- Found by trying strangers' environments again


@pytest.mark.parametrize("script", [s if s in ("ppo", "dqn") else pytest.param(s, marks=slow) for s in FACTS])
def test_a_run_whose_checkpoint_was_deleted_is_not_begun_anew(script, cli, tmp_path):
    """It would overwrite the model and all metrics."""

    def contents():
        return {path: path.read_bytes() for path in sorted(run_dir.rglob("*")) if path.is_file()}

    run_dir = tmp_path / "run"
    assert cli(script, *tiny(script), "--run-dir", run_dir)[0] == 0
    (run_dir / "checkpoint.pt").unlink()
    before = contents()
    code, _, err = cli(script, "--run-dir", run_dir, "--resume", "--total-timesteps", 10**6 * 1024)
    assert (code, is_one_line(err)) == (2, True)
    assert "checkpoint.pt is missing" in err
    (run_dir / "config.json").unlink()
    code, _, err = cli(script, *tiny(script), "--run-dir", run_dir)
    assert (code, is_one_line(err)) == (2, True)
    assert "holds a run" in err
    del before[run_dir / "config.json"]
    assert contents() == before


class HalvesActions(gym.Env):
    """It changes the action that it is given, in place."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 0.0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        action *= 0.5
        self.place += action.item()
        return np.array([self.place], np.float32), action.item(), False, False, {}


gym.register("HalvesActions-v0", HalvesActions, max_episode_steps=50)


@pytest.mark.parametrize("script", [s for s in ("ppo", "sac", "td3", "reinforce") if s in ACTING])
def test_an_action_that_the_environment_changes_is_replayed_as_it_was_sent(script):
    module = module_of(script)
    with closing(module.Run(module.Args(env_id="HalvesActions-v0"))) as run:
        run.global_step = len(run.envs) * 3
        sent = np.array([[0.8], [-0.4], [0.2]], np.float32)
        assert run.begin_episode(0, sent.copy())
        assert run.obs[0].item() == pytest.approx(0.3)
        np.testing.assert_array_equal(run.actions[0], sent)


@pytest.mark.parametrize("script", [s for s in ("ppo", "dqn") if s in ACTING])
@pytest.mark.parametrize(("high", "image"), [(255, True), (10, False), (1, False)])
def test_bytes_that_do_not_reach_255_are_codes_and_no_picture(script, high, image):
    assert module_of(script).is_image(gym.spaces.Box(0, high, (48, 48), np.uint8)) == image


class OtherRewards(gym.Wrapper):
    """Of a goal environment: 0 and 1 in the place of -1 and 0."""

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        return obs, reward + 1, *rest

    def compute_reward(self, achieved, desired, info):
        return self.env.unwrapped.compute_reward(achieved, desired, info) + 1


@pytest.mark.parametrize("script", [s for s in ("her",) if s in ACTING])
def test_rewards_for_other_goals_are_those_of_the_environments_own_wrapper(script):
    gym.register("OtherRewards-v0", lambda **options: OtherRewards(gym.make("goal_env:Point-v0", **options)))
    her = module_of(script)
    for env_id, rewards in ("goal_env:Point-v0", [0, -1]), ("OtherRewards-v0", [1, 0]):
        args = her.Args(env_id=env_id)
        with closing(her.make_env(args)) as env:
            env.reset(seed=1)
            goals = her.Goals(args, env.env)
            here = np.zeros((2, goals.desired.stop - goals.desired.start), np.float32)
            got, _ = goals.outcomes(here, np.array([[0.0], [9.0]]), np.zeros(2, bool))
            assert np.ravel(got).tolist() == rewards, env_id


NUMPYS = {"seed": np.int64(3), "total_timesteps": np.arange(2)[1] * 1024, "eval_episodes": np.int32(2)}


@pytest.mark.parametrize("script", [path.stem for path in SCRIPTS])
@pytest.mark.parametrize("name", ["seed", "total_timesteps"])
def test_a_number_of_numpys_is_refused_before_it_makes_a_run_that_cannot_be_loaded(script, name):
    module = module_of(script)
    with pytest.raises(module.UsageError, match=rf"--{name.replace('_', '-')} is np.int64"):
        module.Args(**{name: NUMPYS[name]})


@pytest.mark.parametrize("script", [s for s in ACTING if s == "ppo"])
def test_a_run_whose_film_fails_goes_on_without_films(script, cli, tmp_path):
    flags = ["--env-id", "CartPole-v1", "--run-dir", tmp_path / "run"]
    assert cli(script, *tiny(script), *flags, "--capture-video")[0] == 0
    longer = 2 * int(tiny(script)[tiny(script).index("--total-timesteps") + 1])
    code, _, err = cli(
        script, "--run-dir", tmp_path / "run", "--resume", "--no-capture-video", "--total-timesteps", longer
    )
    assert code == 0, err


@pytest.mark.parametrize("script", [s for s in ("q_learning",) if s in ACTING])
@pytest.mark.parametrize("fickle", [False, True])
def test_exact_returns_are_left_out_where_the_table_does_not_tell_all(script, fickle):
    q_learning = module_of(script)
    args = q_learning.Args(env_id="Taxi-v4")
    with closing(q_learning.make_env(args)) as env:
        env.unwrapped.fickle_passenger = fickle
        agent = q_learning.make_agent(args, env.observation_space.shape, env.action_space)
        assert bool(q_learning.exact_returns(agent, env, args)) != fickle


def test_the_first_signal_says_what_happens_next(tmp_path):
    flags = tiny("ppo", "--total-timesteps", 10**7, "--run-dir", tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, ROOT / "algorithms" / "ppo.py", *flags],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopping after this batch or evaluation" in err
    assert "To go on" in out
