"""The run contract: what every script promises of a run, its folder, its end, and its answers to mistakes."""

import dataclasses
import fcntl
import importlib
import json
import os
import pickle
import pty
import random
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Literal, get_args, get_origin

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, SCRIPTS, call, rows, start, timeless, tiny
from facts import FACTS
from safetensors.numpy import load_file as load_safetensors

ALL = [path.stem for path in SCRIPTS]
ACTING = [script for script in ALL if FACTS[script].acts]  # in an environment: it has episodes and films
ON_DATA = [script for script in ALL if not FACTS[script].acts]
# For what is the same text in all scripts of a kind: one agent or several, tables, data
KINDS = [script for script in ALL if script in ("ppo", "maddpg", "q_learning", "dpo")]
IN_GYMNASIUM = [script for script in ALL if FACTS[script].env_class]
IN_TORCH = [script for script in ALL if script != "q_learning"]
slow = pytest.mark.slow


def scripts(names, quick=("ppo",)):
    """A test for each of them, of which `make test` runs the quick ones."""
    return pytest.mark.parametrize(
        "script", [name if name in quick else pytest.param(name, marks=slow) for name in names]
    )


def module_of(script):
    return importlib.import_module(f"algorithms.{script}")


def arguments(script, *flags):
    """Args as the command line makes them."""
    return tyro.cli(module_of(script).Args, args=tiny(script, *flags))


def weights(script, run_dir):
    path = run_dir / FACTS[script].model
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    return module_of(script).load_file(path)["model"]


def contents(run_dir):
    """Of each file in the folder and in the folders within."""
    return {path.relative_to(run_dir): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def is_evaluation(row):
    return any(name.startswith("eval/") for name in row)


def quarters(script, run_dir):
    """In which quarters of a tiny run it evaluated: a script that plays whole episodes is there some steps later."""
    return [row["global_step"] // FACTS[script].quarter for row in rows(run_dir) if FACTS[script].result in row]


def step_of_checkpoint(script, run_dir):
    path = run_dir / FACTS[script].checkpoint
    return (torch.load(path, weights_only=True) if script in ON_DATA else module_of(script).load_file(path))["step"]


def is_one_line(err):
    return err.startswith("error: ") and err.count("\n") == 1 and len(err) < 700


@pytest.fixture
def finished(cli, tmp_path, tmp_path_factory):
    """A finished tiny run of a script; one run serves all tests, each has a copy."""

    def make(script, name="run"):
        if script not in FINISHED:
            run_dir = tmp_path_factory.mktemp("finished") / "run"
            code, _, err = cli(script, *tiny(script), "--run-dir", run_dir)
            assert code == 0, err
            FINISHED[script] = run_dir
        return shutil.copytree(FINISHED[script], tmp_path / name)

    return make


FINISHED = {}


# ---- A run and its folder


@scripts(ALL, quick=ALL)
def test_a_run_folder_holds_all_it_should(script, cli, tmp_path):
    code, out, err = cli(script, *tiny(script), "--seed", 7)
    assert code == 0, err
    (run_dir,) = (tmp_path / "runs").iterdir()
    facts = FACTS[script]
    assert re.fullmatch(rf"{facts.task}__{script}__7__[\d-]+", run_dir.name)
    files = {"config.json", "metrics.jsonl", facts.checkpoint, Path(facts.model).parts[0], *facts.files}
    assert {path.name for path in run_dir.iterdir()} == files
    config = json.loads((run_dir / "config.json").read_text())
    assert config["script"] == script
    assert config["args"]["seed"] == 7
    assert config["args"].get("device", "auto") in ("auto", "cpu")
    assert config["command"][1:3] == facts.tiny[:2]
    assert config["versions"]["numpy"] == np.__version__
    assert config["versions"]["gymnasium"] == gym.__version__
    assert config["hardware"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert (config["commit"] or "").removesuffix("-dirty") == commit
    metrics = rows(run_dir)
    assert all({"global_step", "time"} < row.keys() for row in metrics)
    steps = [row["global_step"] for row in metrics]
    assert steps == sorted(steps)
    assert quarters(script, run_dir) == [1, 2, 3, 4]
    for name in [*facts.logged, "charts/SPS", "charts/learning_rate"]:
        assert any(name in row for row in metrics), name
    assert step_of_checkpoint(script, run_dir) == 4 * facts.quarter
    assert str(run_dir.relative_to(tmp_path)) in out
    assert facts.goes_on in out
    assert "%|" not in err, "no progress bar where there is no terminal"


def register_as(name, script, **kwargs):
    """The environment of a script's tiny run under another name."""
    module, cls = FACTS[script].env_class.rsplit(".", 1)
    gym.register(name, f"{module}:{cls}", **kwargs)


@scripts([script for script in KINDS if script in IN_GYMNASIUM])
def test_folders_of_runs_never_collide_and_have_safe_names(script, cli, tmp_path):
    register_as("space/Short-v1", script, max_episode_steps=9)
    for _ in range(2):
        assert cli(script, *tiny(script), "--env-id", "space/Short-v1", "--total-timesteps", 128)[0] == 0
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    assert all(folder.name.startswith("space-Short-v1__") for folder in folders)


@scripts(ALL)
def test_same_seed_same_bits_in_another_process_and_another_seed_another_run(script, cli, finished, tmp_path):
    a, b, c = tmp_path / "a", finished(script, "b"), tmp_path / "c"
    result = call(script, *tiny(script), "--seed", 1, "--run-dir", a)  # as it is without this flag
    assert result.returncode == 0, result.stderr
    assert cli(script, *tiny(script), "--seed", 2, "--run-dir", c)[0] == 0
    assert timeless(a) == timeless(b)
    assert same(weights(script, a), weights(script, b))
    assert timeless(a) != timeless(c)
    assert not same(weights(script, a), weights(script, c))


@pytest.mark.parametrize(
    ("script", "flags", "name"),
    [(script, [], "make_agent") for script in IN_TORCH if script in ACTING]
    + [(script, [], "load") for script in ON_DATA],
)
def test_first_weights_are_drawn_with_the_seed(script, flags, name, cli, monkeypatch):
    seeds = []

    def make(*_):
        seeds.append(torch.initial_seed())
        raise SystemExit

    monkeypatch.setattr(f"algorithms.{script}.{name}", make)
    for seed in 1, 2:
        cli(script, *tiny(script), *flags, "--seed", seed)
    assert seeds == [1, 2]


@pytest.mark.parametrize(
    ("script", "env_id", "device"),
    [(script, None, "cpu") for script in IN_TORCH if script in ACTING]
    + [(script, "ALE/Pong-v5", "cuda") for script in ("ppo", "dqn")],
)
def test_only_small_networks_are_kept_from_a_gpu(script, env_id, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = arguments(script, *(["--env-id", env_id] if env_id else []))
    with closing(module_of(script).Run(args)) as run:
        assert run.device == device


@pytest.mark.parametrize(
    ("script", "flags", "threads"),
    [(script, [], 1) for script in IN_TORCH if script in ACTING]
    + [(script, ["--threads", 2], 2) for script in IN_TORCH if script in ACTING]
    + [("ppo", ["--env-id", "ALE/Pong-v5"], 3), ("dqn", ["--env-id", "ALE/Pong-v5", "--threads", 2], 2)],
)
def test_threads_of_pytorch(script, flags, threads, monkeypatch):
    """Vectors get one, images all that PyTorch would take, unless the user wants another number."""
    chosen = []
    monkeypatch.setattr(module_of(script).Run, "all_threads", 3)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    with closing(module_of(script).Run(arguments(script, *flags))):
        assert chosen == [threads]


@pytest.mark.parametrize(("flags", "threads"), [([], 1), (["--threads", 2], 2)])
@pytest.mark.parametrize("script", ON_DATA)
def test_threads_of_small_language_models(script, flags, threads, cli, monkeypatch):
    chosen = []

    def stop(*_):
        raise SystemExit

    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(f"algorithms.{script}.make_trainable", stop)
    cli(script, *tiny(script), *flags)
    assert {*chosen} == {threads}


@pytest.mark.parametrize("script", ON_DATA)
def test_a_large_model_gets_all_threads_also_after_a_small_one(script, cli, monkeypatch):
    chosen = []

    def stop(*_):
        raise SystemExit

    monkeypatch.setattr(module_of(script).Run, "all_threads", 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # as a small one has left it
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr("transformers.PreTrainedModel.num_parameters", lambda *_: 20_000_000)
    monkeypatch.setattr(f"algorithms.{script}.make_trainable", stop)
    cli(script, *tiny(script))
    assert {*chosen} == {3}


@scripts(IN_TORCH, quick=["sac"])
def test_a_run_goes_on_with_other_threads(script, cli, tmp_path):
    quarter, run_dir = FACTS[script].quarter, tmp_path / "run"
    assert cli(script, *tiny(script), "--total-timesteps", quarter, "--threads", 2, "--run-dir", run_dir)[0] == 0
    code, _, err = cli(script, "--resume", "--total-timesteps", 2 * quarter, "--threads", 1, "--run-dir", run_dir)
    assert code == 0, err
    assert timeless(run_dir)[-1]["global_step"] == 2 * quarter


# ---- What must not change a run


@scripts(ALL)
def test_watching_a_run_does_not_change_it(script, cli, finished, tmp_path):
    facts, plain = FACTS[script], finished(script, "plain")
    variants = {
        "often": ["--eval-frequency", facts.quarter // 4],
        "never": ["--eval-frequency", 10**9],
        "tracked": ["--track"],
    }
    films = "capture_video" in module_of(script).Args.__dataclass_fields__
    if films:
        variants["filmed"] = ["--capture-video", "--eval-frequency", 2 * facts.quarter]
    for name, flags in variants.items():
        code, _, err = cli(script, *tiny(script), "--run-dir", tmp_path / name, *flags)
        assert code == 0, err
    for name in variants:
        assert same(weights(script, plain), weights(script, tmp_path / name)), name
        if films:
            training = [[row for row in timeless(run) if not is_evaluation(row)] for run in (plain, tmp_path / name)]
            assert training[0] == training[1], name
    assert rows(tmp_path / "never")[-1][facts.result] == rows(plain)[-1][facts.result]
    names = [path.name for path in (tmp_path / "filmed").glob("videos/step-*.mp4")]
    assert sorted(int(re.match(r"step-(\d+)", name)[1]) // facts.quarter for name in names) == ([2, 4] if films else [])


@scripts(ACTING, quick=["q_learning", "reinforce", "ppo", "dqn", "sac", "maddpg"])
def test_checkpoints_change_nothing(script, cli, tmp_path, monkeypatch):
    """Not a row of the log, whether there are many, one or none; nor do they cut episodes."""
    module, quarter = module_of(script), FACTS[script].quarter
    save, saved = module.Run.save, []
    monkeypatch.setattr(module.Run, "save", lambda self: (saved.append(self.global_step), save(self)))
    short = ["--total-timesteps", 2 * quarter, "--eval-frequency", quarter]
    for name, frequency in ("many", quarter // 8), ("one", 10**9):
        code, _, err = cli(script, *tiny(script), *short, "--checkpoint-frequency", frequency, "--run-dir", name)
        assert code == 0, err
    # Whoever collects a batch, or whole episodes, is asked after each of them only
    assert len(saved) > 2, "many, then one"
    assert saved[-1] == 2 * quarter
    assert saved[-2] == 2 * quarter, "both have the last one"
    monkeypatch.setattr(module.Run, "save", lambda self: None)
    code, _, err = cli(script, *tiny(script), *short, "--run-dir", "none")
    assert code == 0, err
    assert timeless(Path("many")) == timeless(Path("one")) == timeless(Path("none"))
    assert same(weights(script, Path("many")), weights(script, Path("one")))


DEATHS = os.environ.get("DEATHS")  # DEATHS=20 python -m pytest tests/test_contract.py -k killed_and_resumed


@slow
@pytest.mark.timeout(100 * int(DEATHS or 3))
@pytest.mark.parametrize(("script", "flags"), [(script, flags) for script in ALL for flags in FACTS[script].resumed])
def test_killed_and_resumed_equals_unbroken(script, flags, cli, tmp_path):
    flags = tiny(script, *flags)
    total = int(flags[len(flags) - flags[::-1].index("--total-timesteps")])
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    assert cli(script, *flags, "--run-dir", unbroken)[0] == 0  # here, in another interpreter than those that die
    process = start(script, *flags, "--run-dir", killed)
    rng = np.random.default_rng(0)
    deaths = 0
    while True:
        goal = reached(killed) + rng.uniform(0.1, 0.4) * total  # where it dies next
        if goal > 0.9 * total:  # too near to its end to be sure of that: some time after its start
            with suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, 0.5))
        else:
            while process.poll() is None and reached(killed) < goal:
                time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        code = process.wait()
        if code == 0:
            break
        assert code == -signal.SIGKILL, process.stderr.read()
        deaths += 1
        if (killed / "config.json").exists():
            process = start(script, "--run-dir", killed, "--resume")
        else:
            process = start(script, *flags, "--run-dir", killed)
        if deaths == int(DEATHS or FACTS[script].deaths):
            assert process.wait() == 0, process.stderr.read()
            break
    print(f"{script} died {deaths} times")
    assert deaths, "it was killed at least once"
    assert timeless(killed) == timeless(unbroken)
    assert same(weights(script, killed), weights(script, unbroken))


def reached(run_dir):
    """The step of the last whole row."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(-min(9999, os.fstat(file.fileno()).st_size), os.SEEK_END)  # it is asked often, of long files
            return json.loads(file.read().splitlines()[-1])["global_step"]
    except (OSError, IndexError, ValueError):
        return 0


@scripts(ACTING)
def test_stopped_and_resumed_again_and_again_equals_unbroken(script, cli, finished, tmp_path, monkeypatch):
    """Wherever it asks whether to go on, at first at step 0, but twice as late each time: often in mid-episode."""
    module, run_dir = module_of(script), tmp_path / "stopped"
    goes_on, stops = module.Run.goes_on, []

    def stopping(self):
        if self.global_step >= 2 ** len(stops) - 1:
            stops.append(self.global_step)
            signal.raise_signal(signal.SIGTERM)
        return goes_on(self)

    monkeypatch.setattr(module.Run, "goes_on", stopping)
    code, _, err = cli(script, *tiny(script), "--run-dir", run_dir)
    while code == 143:
        code, _, err = cli(script, "--run-dir", run_dir, "--resume")
    assert code == 0, err
    assert stops[0] == 0
    assert len(set(stops)) > 3
    assert timeless(run_dir) == timeless(finished(script))
    assert same(weights(script, run_dir), weights(script, finished(script, "unbroken")))


# ---- Signals


@pytest.mark.parametrize(
    ("script", "number", "code"),
    [
        pytest.param(script, number, code, marks=[] if script == "ppo" else slow)
        for script, number, code in [(script, signal.SIGTERM, 143) for script in ALL] + [("ppo", signal.SIGINT, 130)]
    ],
)
def test_a_signal_saves_says_how_to_go_on_and_nothing_is_lost(script, number, code, tmp_path):
    run_dir, enough = tmp_path / "run", 2 * FACTS[script].quarter
    process = start(
        script, *tiny(script), "--total-timesteps", 10**6, "--checkpoint-frequency", 10**6, "--run-dir", run_dir
    )
    while process.poll() is None and reached(run_dir) < enough:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert f"--run-dir {run_dir} --resume" in out
    assert "Traceback" not in err
    before, step = rows(run_dir), step_of_checkpoint(script, run_dir)
    assert step >= enough
    assert before[-1]["global_step"] <= step
    if script == "ppo":  # it writes a row of losses in each turn of its loop, others in some
        assert before[-1]["global_step"] == step
    process = start(script, "--run-dir", run_dir, "--resume")
    while process.poll() is None and reached(run_dir) < step + enough:
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    after = rows(run_dir)
    assert after[: len(before)] == before
    assert len(after) > len(before)
    assert [row["time"] for row in after] == sorted(row["time"] for row in after), "the clock goes on where it stopped"


@pytest.mark.parametrize("quarter", [2, 4])
@scripts(ACTING)
def test_a_signal_does_not_wait_for_an_evaluation_which_is_repeated_when_the_run_goes_on(
    script, quarter, cli, finished, tmp_path, monkeypatch
):
    module, evaluations = module_of(script), []
    evaluate = module.evaluate

    def interrupted(*args):
        evaluations.append(args)
        if len(evaluations) == quarter:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr(module, "evaluate", interrupted)
    code, out, err = cli(script, *tiny(script), "--run-dir", tmp_path / "run")
    assert code == 143, err
    assert "Stopped at step" in out
    assert quarters(script, tmp_path / "run") == list(range(1, quarter))
    monkeypatch.setattr(module, "evaluate", evaluate)
    assert cli(script, "--run-dir", tmp_path / "run", "--resume")[0] == 0
    assert timeless(tmp_path / "run") == timeless(finished(script, "unbroken"))


@scripts(ACTING)
def test_a_run_that_was_killed_then_resumed_then_stopped_at_once_goes_on(script, cli, finished, monkeypatch):
    """The rows that the kill left behind the checkpoint are gone, whatever has been written since."""
    module, run_dir = module_of(script), finished(script)
    save, start_run = module.Run.save, module.Run.start
    shutil.rmtree(run_dir)
    monkeypatch.setattr(module.Run, "save", lambda self: save(self) if self.global_step <= 1100 else None)
    assert cli(script, *tiny(script), "--run-dir", run_dir)[0] == 0, "but its last half was not saved"
    monkeypatch.setattr(module.Run, "save", save)

    def start_and_stop(self, **parts):
        start_run(self, **parts)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(module.Run, "start", start_and_stop)
    for _ in range(2):
        code, _, err = cli(script, "--run-dir", run_dir, "--resume")
        assert code == 143, err
    monkeypatch.setattr(module.Run, "start", start_run)
    code, _, err = cli(script, "--run-dir", run_dir, "--resume")
    assert code == 0, err
    assert timeless(run_dir) == timeless(finished(script, "unbroken"))


@scripts(ACTING)
def test_a_signal_ends_an_evaluation_of_a_finished_run(script, cli, finished, monkeypatch):
    module, evaluate, run_dir = module_of(script), module_of(script).evaluate, finished(script)

    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr(module, "evaluate", interrupted)
    code, out, err = cli(script, "--run-dir", run_dir, "--evaluate")
    assert code == 143, (out, err)
    assert "Traceback" not in err
    assert "episodes" not in out, "there is no result"


# ---- The commands that it prints, and what they do


def run_last_line(text, cwd):
    command = next(line for line in reversed(text.splitlines()) if line.startswith(f"    {sys.executable}"))
    return subprocess.run(command, shell=True, cwd=cwd, capture_output=True, text=True), command


@slow
@scripts([script for script in KINDS if script in ACTING])
def test_printed_commands_work_where_they_are_pasted(script, tmp_path):
    """From a terminal that stands anywhere, in a shell without the virtual environment, and from another program."""
    result = call(script, *tiny(script), "--run-dir", "it's a folder", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    result, command = run_last_line(result.stdout, tmp_path)
    assert shlex.split(command)[3:] == ["it's a folder", *FACTS[script].goes_on.split()]
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "it's a folder" / "videos").glob("*.mp4"))
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import tyro; from algorithms.{script} import Args, train\n"
        f"train(tyro.cli(Args, args={tiny(script, '--run-dir', 'other')}))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    result, command = run_last_line(result.stdout, tmp_path)
    assert result.returncode == 0, (command, result.stderr)


@scripts(ALL)
def test_evaluate_repeats_the_last_evaluation_and_changes_nothing(script, cli, finished):
    run_dir = finished(script)
    last, before = [row for row in rows(run_dir) if FACTS[script].result in row][-1], contents(run_dir)
    code, out, err = cli(script, "--run-dir", run_dir, "--evaluate")
    assert code == 0, err
    shown = dict(re.findall(r"(eval/\S+) ([-+.\de]+)", out))
    all_of_it = {name for name in last if name.startswith("eval/")}
    assert shown.keys() >= ({"eval/episodic_return", "eval/return_std"} if script in ACTING else all_of_it)
    for name, value in shown.items():
        assert value == f"{last[name]:.4g}"
    assert before == contents(run_dir), "evaluating changes nothing"


@scripts(ACTING)
def test_evaluate_films_says_where_and_keeps_the_films_of_before(script, cli, finished):
    run_dir = finished(script)
    assert "2 episodes" in cli(script, "--run-dir", run_dir, "--evaluate")[1]
    for number in 1, 2:
        code, out, err = cli(script, "--run-dir", run_dir, "--evaluate", "--capture-video", "--eval-episodes", 1)
        assert code == 0, err
        assert "1 episodes" in out
        films = list((run_dir / "videos").glob("*.mp4"))
        assert len(films) == number
        assert any(str(film) in out for film in films)
    frames = film_of(films[0])
    assert len(frames) > 5
    assert frames[0].std() > 5, "something is to be seen"
    assert (frames[0] != frames[-1]).any(), "and it moves"


def film_of(path):
    from moviepy import VideoFileClip

    with VideoFileClip(str(path)) as clip:
        return list(clip.iter_frames())


@scripts(ALL)
def test_resuming_a_finished_run_adds_nothing(script, cli, finished):
    run_dir, module = finished(script), module_of(script)
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert cli(script, "--run-dir", run_dir, "--resume")[0] == 0
    result = module.train(module.saved_args(run_dir, resume=True))  # as when a notebook's cell is run again
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    last = [row for row in rows(run_dir) if is_evaluation(row)][-1]
    assert result == {name: value for name, value in last.items() if name.startswith("eval/")}


@scripts(ALL)
def test_a_run_killed_before_its_first_checkpoint_begins_anew(script, cli, finished):
    whole, cut = finished(script, "whole"), finished(script, "cut")
    cut_before_its_first_checkpoint(script, cut)
    assert cli(script, "--run-dir", cut, "--resume")[0] == 0
    assert timeless(cut) == timeless(whole)


@slow
@pytest.mark.parametrize("script", ON_DATA)
def test_such_a_run_draws_the_same_lora(script, cli, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trained = ["--from-scratch", "False"] if script == "sft" else []  # LoRA is for weights that have learned before
    assert cli(script, *tiny(script), *trained, "--lora-rank", 2, "--run-dir", whole)[0] == 0
    shutil.copytree(whole, cut)
    cut_before_its_first_checkpoint(script, cut)
    assert cli(script, "--run-dir", cut, "--resume")[0] == 0
    assert timeless(cut) == timeless(whole)


def cut_before_its_first_checkpoint(script, run_dir):
    (run_dir / FACTS[script].checkpoint).unlink()
    path = run_dir / Path(FACTS[script].model).parts[0]  # the checkpoint is written first
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"global_step": 99')  # half a row


def without_schedules(script):
    """Flags with which nothing in a run depends on how long it will be."""
    fields = module_of(script).Args.__dataclass_fields__
    flags = ["--no-anneal-lr"] if "anneal_lr" in fields else []
    flags += ["--final-temperature", "1"] if "final_temperature" in fields else []
    return [*flags, *(["--start-e", "0.3", "--end-e", "0.3"] if "start_e" in fields else [])]


@scripts(ACTING)
def test_a_run_can_be_made_longer(script, cli, tmp_path):
    """It is the long run then, where nothing depends on the length; what does follows the new one."""
    module, quarter = module_of(script), FACTS[script].quarter
    flags = tiny(script, *without_schedules(script))
    assert cli(script, *flags, "--run-dir", tmp_path / "long")[0] == 0
    run_dir = tmp_path / "longer"
    assert cli(script, *flags, "--total-timesteps", 2 * quarter, "--run-dir", run_dir)[0] == 0
    code, _, err = cli(script, "--run-dir", run_dir, "--resume", "--total-timesteps", 4 * quarter)
    assert code == 0, err
    assert timeless(run_dir) == timeless(tmp_path / "long")
    assert json.loads((run_dir / "config.json").read_text())["args"]["total_timesteps"] == 4 * quarter
    result = module.train(module.saved_args(run_dir, resume=True, total_timesteps=6 * quarter))
    assert rows(run_dir)[-1]["global_step"] == 6 * quarter
    assert (
        result[FACTS[script].result] == [row for row in rows(run_dir) if is_evaluation(row)][-1][FACTS[script].result]
    )


@scripts([script for script in ACTING if "anneal_lr" in module_of(script).Args.__dataclass_fields__])
def test_the_learning_rate_of_a_longer_run_follows_the_new_length(script, cli, tmp_path):
    quarter, run_dir = FACTS[script].quarter, tmp_path / "run"
    assert cli(script, *tiny(script, "--anneal-lr"), "--total-timesteps", 2 * quarter, "--run-dir", run_dir)[0] == 0
    assert cli(script, "--run-dir", run_dir, "--resume", "--total-timesteps", 4 * quarter)[0] == 0
    rates = [
        (row["global_step"], row["charts/learning_rate"]) for row in rows(run_dir) if "charts/learning_rate" in row
    ]
    before = [rate for step, rate in rates if step <= 2 * quarter]
    after = [rate for step, rate in rates if step > 2 * quarter]
    assert before[0] > before[-1], "it fell"
    assert before[0] > after[0] > before[-1], "it is back at half of its way"
    assert after[0] > after[-1]


@scripts(ACTING, quick=ACTING)
def test_a_resumed_run_keeps_its_other_arguments_whoever_asks(script, cli, finished):
    run_dir, module = finished(script), module_of(script)
    before, rate = contents(run_dir), FACTS[script].rate
    shorter = {"total_timesteps": 2 * FACTS[script].quarter}
    for changes in {rate.replace("-", "_"): 0.5}, {"seed": 3}, {"checkpoint_frequency": 3}, shorter:
        ((name, value),) = changes.items()
        flag = f"--{name.replace('_', '-')}"
        code, _, err = cli(script, "--run-dir", run_dir, "--resume", flag, value)
        assert code == 2
        assert is_one_line(err)
        assert flag in err or name in err
        with pytest.raises(module.UsageError, match=f"{flag}|{name}"):
            module.train(module.saved_args(run_dir, resume=True, **changes))
    assert before == contents(run_dir)
    code, _, err = cli(script, "--run-dir", run_dir, "--resume", "--seed", 1)
    assert code == 0, "the same is no change"


@scripts([script for script in ACTING if "num_envs" in module_of(script).Args.__dataclass_fields__])
def test_flags_beside_resume_and_evaluate_are_checked_together_with_the_runs_own_ones(script, cli, tmp_path):
    """With the run's number of environments, for one, and not with the default's."""
    num_envs = module_of(script).Args().num_envs - 1 or 3
    flags = tiny(script, "--num-envs", num_envs, "--total-timesteps", 129 * num_envs, "--run-dir", tmp_path / "run")
    flags += ["--num-minibatches", "1"] if script == "ppo" else []
    assert cli(script, *flags)[0] == 0
    longer = ["--resume", "--total-timesteps", 258 * num_envs]
    for action in longer, ["--evaluate"], ["--evaluate", "--total-timesteps", 516 * num_envs]:
        code, _, err = cli(script, "--run-dir", tmp_path / "run", *action)
        assert code == 0, err
    code, _, err = cli(script, "--run-dir", tmp_path / "run", "--resume", "--total-timesteps", 258 * num_envs + 1)
    assert code == 2
    assert f"--num-envs {num_envs}" in err


# ---- Flags

# Tested by themselves, above and below
ELSEWHERE = {"device", "threads", "track", "wandb_project_name", "run_dir", "resume", "evaluate"}
ELSEWHERE |= {"checkpoint_frequency"}
CHANGES = [
    (script, name, value)
    for script in ALL
    for name, value in (({"eval_max_steps": 3} if FACTS[script].acts else {}) | FACTS[script].changes).items()
    if value is not None and (name != "checkpoint_frequency" or script in ON_DATA)
]


@pytest.mark.parametrize(
    ("script", "name", "value"), [pytest.param(*case, marks=[] if case[0] == "ppo" else slow) for case in CHANGES]
)
def test_every_flag_is_recorded_and_changes_something(script, name, value, cli, base_of, tmp_path):
    flag = name.replace("_", "-")
    given = [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", value]
    given = [f"--{flag}", value] if name == "from_scratch" else given  # it can be None as well
    quarter = FACTS[script].quarter
    short = ["--total-timesteps", quarter, "--checkpoint-frequency", quarter // 2, "--eval-frequency", quarter // 2]
    changed = tmp_path / "changed"
    code, _, err = cli(script, *tiny(script), *short, *given, "--run-dir", changed)
    assert code == 0, err
    assert json.loads((changed / "config.json").read_text())["args"][name] == value
    assert trace(script, changed) != base_of(script, short)


def trace(script, run_dir):
    """What a flag may change: the log, the files, or what was learned, which is not in the log of every run."""
    learned = weights(script, run_dir) if script in ACTING else {}
    learned = {name: values.tolist() for name, values in learned.items()}
    return timeless(run_dir), sorted(path.name for path in run_dir.iterdir()), learned


@pytest.fixture
def base_of(cli, tmp_path_factory):
    """What a script's run with these flags leaves; one run serves all tests."""

    def make(script, flags):
        if script not in BASES:
            run_dir = tmp_path_factory.mktemp("base") / "run"
            assert cli(script, *tiny(script), *flags, "--run-dir", run_dir)[0] == 0
            BASES[script] = trace(script, run_dir)
        return BASES[script]

    return make


BASES = {}


@scripts(ALL, quick=ALL)
def test_no_flag_is_left_out(script):
    flags, changes = module_of(script).Args.__dataclass_fields__, FACTS[script].changes
    assert set(changes) | ELSEWHERE | ({"eval_max_steps"} if FACTS[script].acts else set()) >= set(flags)
    assert set(changes) <= set(flags)


@scripts(ALL, quick=["ppo", "ppo_rlhf"])
def test_help_explains_itself_and_every_flag(script):
    result = call(script, "--help")
    assert result.returncode == 0
    for name in module_of(script).Args.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in result.stdout
    assert re.search(r"arXiv:|\b(19|20)\d\d\b", result.stdout), "the paper"


@scripts(ACTING, quick=ACTING)
def test_help_is_in_three_groups_and_short(script, monkeypatch, capsys):
    module = module_of(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "-h"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert not end.value.code
    lines = capsys.readouterr().out.splitlines()
    heads = [number for number, line in enumerate(lines) if line in ("Run", "Evaluation", "Algorithm")]
    assert [lines[number] for number in heads] == ["Run", "Evaluation", "Algorithm"]
    flags = [re.match(r"  --([\w-]+)", line) for line in lines[heads[0] :]]
    assert [flag[1].replace("-", "_") for flag in flags if flag] == list(module.Args.__dataclass_fields__)
    assert len(lines) - heads[0] < len(module.Args.__dataclass_fields__) + 8, "a line a flag"
    assert lines.index("Evaluation") < next(i for i, line in enumerate(lines) if "--eval-episodes" in line)
    assert next(i for i, line in enumerate(lines) if "--eval-episodes" in line) < lines.index("Algorithm")
    assert heads[0] < 20, "the idea in a few lines"
    assert "[2]" not in "\n".join(lines[: heads[0]]), "without the equations"
    assert "" not in [line.split("#")[-1].strip() for line in lines[heads[0] :] if line.startswith("  --")]
    assert max(map(len, lines)) <= 120


@scripts(ALL, quick=ALL)
def test_help_names_the_paper_in_whole_sentences(script, monkeypatch, capsys):
    module = module_of(script)
    (papers,) = re.findall(r"(?s)\nPapers?: .*?\n\n", module.__doc__)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "-h"])
    with pytest.raises(SystemExit):
        module.main()
    assert papers.strip() in capsys.readouterr().out


# ---- Mistakes


class Odd(gym.Env):
    """An environment with the spaces that it is given."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, True, False, {}


BOX, DISCRETE = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(2)
for name, spaces in {
    "Sequence": (gym.spaces.Sequence(DISCRETE), DISCRETE),
    "Graph": (gym.spaces.Graph(BOX, None), DISCRETE),
    "MultiBinaryAction": (BOX, gym.spaces.MultiBinary(3)),
    "IntegerAction": (BOX, gym.spaces.Box(0, 9, (2,), np.int64)),
    "TupleAction": (BOX, gym.spaces.Tuple([DISCRETE, BOX])),
}.items():
    gym.register(f"Odd{name}-v0", Odd, disable_env_checker=True,
                 kwargs={"observation_space": spaces[0], "action_space": spaces[1]})  # fmt: skip

MISTAKES = {  # of any script
    "--{rate} -1": "--{rate}",
    "--{rate} nan": "--{rate}",
    "--{rate} inf": "--{rate}",
    "--{rate} fast": "--{rate}",
    "--{rate}s 1": "--{rate}",
    "--total-timesteps 0": "--total-timesteps",
    "--total-timesteps -5": "--total-timesteps",
    "--total-timesteps 1e5": "--total-timesteps",
    "--seed -1": "--seed",
    "--seed 18446744073709551616": "--seed",
    "--seed 1.5": "--seed",
    "--eval-frequency 0": "--eval-frequency",
    "--checkpoint-frequency 0": "--checkpoint-frequency",
    "--resume": "--run-dir",
    "--evaluate": "--run-dir",
    "--resume --run-dir nothing-here": "nothing-here",
    "--evaluate --run-dir nothing-here": "nothing-here",
    "--unknown-flag": "--unknown-flag",
    "stray": "stray",
}
MISTAKES_WITH = {  # of any script with this flag
    "device": {"--device cuda:99": "cpu", "--device tpu": "cpu", "--device mps": "cpu"},
    "threads": {"--threads 0": "--threads", "--threads 99999999999": "--threads", "--threads all": "--threads"},
    "gamma": {"--gamma 1.5": "--gamma", "--gamma -0.1": "--gamma"},
    "num_envs": {"--num-envs 0": "--num-envs", "--total-timesteps 2047 --num-envs 2": "--num-envs"},
    "eval_episodes": {"--eval-episodes 0": "--eval-episodes"},
    "eval_max_steps": {"--eval-max-steps 0": "--eval-max-steps"},
}
MISTAKES_IN_GYMNASIUM = {
    "--env-id CartPol-v1": "Did you mean: `CartPole`",
    "--env-id LunarLander-v2": "LunarLander-v3",
    "--env-id Taxi-v3": "Taxi-v4",
    "--env-id CartPole-v7": "v1",
    "--env-id nowhere:Thing-v0": "nowhere",
    "--env-id not/there-v0": "not",
    "--env-id spaces_in_it": None,
    "--env-id OddSequence-v0": "Sequence",
    "--env-id OddGraph-v0": "Graph",
    "--env-id GymV26Environment-v0": "install",
}


def mistakes_of(script):
    fields, facts = module_of(script).Args.__dataclass_fields__, FACTS[script]
    all_ = MISTAKES | facts.mistakes
    for name in MISTAKES_WITH.keys() & fields.keys():
        all_ |= MISTAKES_WITH[name]
    if facts.env_class:
        all_ |= MISTAKES_IN_GYMNASIUM
    return [(flags.replace("{rate}", facts.rate), word and word.replace("{rate}", facts.rate))
            for flags, word in sorted(all_.items())]  # fmt: skip


@pytest.mark.parametrize(
    ("script", "flags", "word"), [(script, *mistake) for script in ALL for mistake in mistakes_of(script)]
)
def test_a_mistake_gets_a_clear_answer_and_exit_code_2(script, flags, word, cli, tmp_path):
    code, out, err = cli(script, *tiny(script), *flags.split(" "))
    assert code == 2, (out, err)
    assert "Traceback" not in err
    assert (word or "") in err
    assert is_one_line(err)
    assert not list(tmp_path.rglob("metrics.jsonl"))


@scripts(ACTING, quick=ACTING)
def test_a_mistake_in_python_is_an_exception_that_names_the_flag(script, finished, tmp_path):
    module, run_dir = module_of(script), finished(script)
    before = contents(run_dir)
    with pytest.raises(module.UsageError, match="--seed"):
        module.Args(seed=-1)
    for go in module.saved_args, module.load:
        with pytest.raises(module.UsageError, match="nothing-here"):
            go("nothing-here")
    with pytest.raises(module.UsageError, match="--resume"):
        module.train(arguments(script, "--run-dir", run_dir))
    with pytest.raises(module.UsageError, match="no-such-thing"):
        module.train(arguments(script, "--env-id", "no-such-thing"))
    assert before == contents(run_dir)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@scripts(KINDS)
def test_a_folder_with_a_run_is_not_overwritten(script, cli, finished):
    run_dir = finished(script)
    before = contents(run_dir)
    code, _, err = cli(script, *tiny(script), "--run-dir", run_dir)
    assert code == 2
    assert "--resume" in err
    assert before == contents(run_dir)


@scripts(KINDS)
def test_a_folder_whose_parts_do_not_fit_together_is_refused(script, cli, finished):
    run_dir = finished(script)
    whole = (run_dir / "metrics.jsonl").read_bytes()
    (run_dir / "metrics.jsonl").write_bytes(whole[:99])
    code, _, err = cli(script, "--run-dir", run_dir, "--resume")
    assert code == 2
    assert "metrics.jsonl" in err
    assert (run_dir / "metrics.jsonl").read_bytes() == whole[:99]
    (run_dir / "metrics.jsonl").write_bytes(whole)
    (run_dir / "config.json").unlink()
    code, _, err = cli(script, *tiny(script), "--run-dir", run_dir)
    assert code == 2
    assert "holds a run" in err


@scripts(KINDS)
def test_a_folder_of_another_script_is_refused(script, cli, finished):
    run_dir = finished(script)
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(config | {"script": "zzz"}))
    for action in "--resume", "--evaluate":
        code, _, err = cli(script, "--run-dir", run_dir, action)
        assert code == 2
        assert "zzz.py" in err


@scripts(ALL, quick=ALL)
def test_a_word_that_no_flag_knows_and_numbers_as_python_has_them(script):
    """On the command line tyro refuses such a word; Args(optimizer="Adam") must not quietly train something else."""
    module = module_of(script)
    for name, kind in module.Args.__annotations__.items():
        if get_origin(kind) is Literal:
            with pytest.raises(module.UsageError, match=f"--{name.replace('_', '-')} is .*none of"):
                module.Args(**{name: get_args(kind)[0].upper() + "s"})
        if kind is float and getattr(module.Args, name) == 0.0:
            module.Args(**{name: 0})  # an integer for a number


@scripts(KINDS, quick=["ppo"])
def test_a_folder_may_be_a_path_and_a_cpu_asks_no_gpu(script, finished, tmp_path, monkeypatch):
    def touched():
        raise RuntimeError("a GPU was asked")

    module = module_of(script)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", touched)
    flags = ["--device", "cpu"] if "device" in module.Args.__annotations__ else []
    args = dataclasses.replace(arguments(script, *flags), run_dir=tmp_path / "path")
    module.train(args)
    assert timeless(tmp_path / "path") == timeless(finished(script))
    module.train(module.saved_args(tmp_path / "path", resume=True))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    "damage", ["cut short", "empty", "garbage", "code", "another model", "another version", "a list", "missing"]
)
@scripts(KINDS)
def test_a_damaged_checkpoint_is_refused_and_stays_as_it_is(script, damage, cli, finished):
    run_dir = finished(script)
    for name, action in (FACTS[script].checkpoint, "--resume"), (FACTS[script].model, "--evaluate"):
        path = run_dir / name
        whole = path.read_bytes()
        if damage == "missing":
            if action == "--resume":  # as if it had been killed before its first checkpoint: tested above
                continue
            path.unlink()
        elif damage == "code":
            path.write_bytes(pickle.dumps(Bomb()))
        elif damage == "another model":
            write_another_model(script, path)
        elif path.suffix == ".safetensors" and damage in ("another version", "a list"):
            continue
        elif damage == "another version":
            state = torch.load(path, weights_only=True)
            torch.save({k: v for k, v in state.items() if k not in ("bytes", "action_space")}, path)
        elif damage == "a list":
            torch.save([1, 2], path)
        else:
            path.write_bytes({"cut short": whole[: len(whole) // 2], "empty": b"", "garbage": b"x" * 999}[damage])
        before = contents(run_dir)
        code, _, err = cli(script, "--run-dir", run_dir, action)
        assert code == 2, err
        assert Path(name).parts[0] in err
        assert is_one_line(err)
        assert not Path("exploded").exists(), "no code was run"
        assert before == contents(run_dir)
        path.write_bytes(whole)


def write_another_model(script, path):
    if script in ON_DATA:
        torch.save({"model": {"weight": torch.zeros(3)}}, path)
    else:
        state = module_of(script).load_file(path)
        torch.save(state | {"model": {"weight": torch.zeros(3)}}, path)


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (lambda text: text[: len(text) // 2], "{run}"),
        (lambda text: "[]", "{run}"),
        (lambda text: text.replace('"seed": ', '"seed": "high", "old": '), None),
        (lambda text: re.sub(r'"seed": \d+', '"seed": -1', text), "--seed"),
        (lambda text: re.sub(r'"seed": \d+', '"sed": 1', text), "sed"),
    ],
)
@scripts(KINDS)
def test_a_config_damaged_by_hand_is_refused(script, edit, word, cli, finished):
    run_dir = finished(script)
    path = run_dir / "config.json"
    path.write_text(edit(path.read_text()))
    code, _, err = cli(script, "--run-dir", run_dir, "--resume")
    assert code == 2
    assert (word or "").replace("{run}", str(run_dir)) in err
    assert is_one_line(err)
    assert "Traceback" not in err


# ---- Troubles of the machine


@scripts(KINDS)
def test_a_full_disk_spares_the_last_checkpoint(script, cli, finished, tmp_path):
    """A limit on the size of files stands for the disk: the operating system refuses to write, in the middle of one."""
    run_dir = tmp_path / "run"
    start_full = (
        f"import resource, runpy, signal, sys, algorithms.{script} as script\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "save = script.Run.save\n"
        "def full(self, *step):\n"
        f"    if (*step, self.global_step)[0] // {FACTS[script].quarter} == 2:\n"
        f"        size = (self.dir / {FACTS[script].model!r}).stat().st_size\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))\n"
        "    save(self, *step)\n"
        "script.Run.save = full\n"
        "script.main()\n"
    )
    command = [sys.executable, "-c", start_full, *tiny(script), "--run-dir", run_dir]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert step_of_checkpoint(script, run_dir) // FACTS[script].quarter == 1
    assert cli(script, "--run-dir", run_dir, "--resume")[0] == 0
    assert timeless(run_dir) == timeless(finished(script, "unbroken"))
    assert not list(run_dir.glob("*.tmp"))


@scripts(KINDS)
def test_a_disk_that_is_full_when_a_run_goes_on_spares_its_config(script, cli, finished, monkeypatch):
    run_dir, write_text = finished(script), Path.write_text

    def half(self, text, *others):
        write_text(self, text[: len(text) // 2], *others)
        raise OSError(28, "No space left on device")

    config = (run_dir / "config.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        code, _, err = cli(script, "--run-dir", run_dir, "--resume")
    assert code == 2
    assert "No space left" in err
    assert (run_dir / "config.json").read_text() == config
    assert cli(script, "--run-dir", run_dir, "--resume")[0] == 0


@scripts(KINDS)
def test_a_folder_that_cannot_be_written_is_one_line(script, cli, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = cli(script, *tiny(script), "--run-dir", tmp_path / "file" / "run")
    assert code == 2
    assert is_one_line(err)
    assert str(tmp_path / "file") in err


@scripts(ALL)
def test_nan_in_the_weights_ends_the_run_and_spares_the_last_checkpoint(script, cli, tmp_path, monkeypatch):
    module = module_of(script)
    save, saves = module.Run.save, []

    def poisoned(self, *step):
        saves.append(step)
        if len(saves) == 2:
            model = self.bare if script in ON_DATA else self.parts["model"]
            state = model.state_dict()
            next(values for values in state.values() if values.ndim and values.numel())[:] = np.nan
            model.load_state_dict(state)
        save(self, *step)

    monkeypatch.setattr(module.Run, "save", poisoned)
    code, _, err = cli(script, *tiny(script), "--run-dir", tmp_path / "run")
    assert code == 1
    assert "NaN" in err
    assert "Traceback" not in err
    assert step_of_checkpoint(script, tmp_path / "run") // FACTS[script].quarter == 1


def test_nan_in_the_gradient_ends_the_run_before_an_environment_sees_it(cli, tmp_path, monkeypatch):
    from algorithms import ppo

    calls, loss = [], ppo.ppo_loss

    def poisoned(log_prob, *rest):
        calls.append(1)
        value, metrics = loss(log_prob, *rest)
        if len(calls) == 4:  # the last of the two minibatches of two epochs
            value = value + (0 * log_prob).sum().sqrt()  # the root has no slope at 0
        return value, metrics

    monkeypatch.setattr(ppo, "ppo_loss", poisoned)
    code, _, err = cli("ppo", *tiny("ppo"), "--run-dir", tmp_path / "run")
    assert code == 1
    assert "NaN" in err
    assert re.search(r"^error: .*in losses/grad_norm$", err, re.MULTILINE)
    assert "Traceback" not in err


@scripts([script for script in KINDS if script in IN_GYMNASIUM])
def test_a_film_that_cannot_be_made_is_one_line_before_the_run(script, cli, monkeypatch, tmp_path):
    for render in lambda self: 1 / 0, lambda self: None:
        monkeypatch.setattr(f"{FACTS[script].env_class}.render", render)
        code, _, err = cli(script, *tiny(script), "--capture-video", "--run-dir", tmp_path / "run")
        assert code == 2
        assert is_one_line(err)
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


@scripts(KINDS)
def test_a_terminal_shows_progress(script, tmp_path):
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [sys.executable, ROOT / "algorithms" / f"{script}.py", *tiny(script), "--run-dir", tmp_path / "run"]
    process = subprocess.Popen(command, stdout=follower, stderr=follower)
    os.close(follower)
    shown = b""
    while select.select([leader], [], [], 60)[0]:
        try:
            shown += os.read(leader, 65536)
        except OSError:  # the other side is closed
            break
    assert process.wait() == 0
    assert b"%|" in shown
    assert b"{0}/{0}".replace(b"{0}", str(4 * FACTS[script].quarter).encode()) in shown
    assert b"steps/s" in shown


# ---- Weights & Biases


def wandb_records(offline_run):
    inspect = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", offline_run]
    out = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in out.splitlines()]


def wandb_history(offline_run):
    """The rows of an offline W&B run: [(number, row)]"""
    history = [record["history"]["item"] for record in wandb_records(offline_run) if record["type"] == "history"]
    return [(row["_step"], {k: v for k, v in row.items() if k[0] != "_"}) for row in history]


@scripts(KINDS)
def test_offline_wandb_has_the_rows_of_metrics_jsonl(script, cli, tmp_path):
    run_dir = tmp_path / "run"
    assert cli(script, *tiny(script), "--run-dir", run_dir, "--track", "--wandb-project-name", "a-project")[0] == 0
    (offline,) = (run_dir / "wandb").glob("offline-run-*")
    records = wandb_records(offline)
    (about,) = (record["run"] for record in records if record["type"] == "run")
    assert about["project"] == "a-project"
    assert about["config"]["update"]["total_timesteps"] == 4 * FACTS[script].quarter
    (metric,) = (record["metric"] for record in records if record["type"] == "metric")
    assert metric["step_metric"] == "global_step"
    assert [row for _, row in wandb_history(offline)] == rows(run_dir)


@scripts([script for script in KINDS if script in ACTING], quick=())
def test_wandb_gets_every_row_also_when_a_killed_run_goes_on(script, cli, tmp_path, monkeypatch):
    import wandb

    module, run_dir = module_of(script), tmp_path / "run"
    save = module.Run.save

    def dying(self):
        if self.global_step // FACTS[script].quarter == 2:
            raise SystemExit(-9)
        save(self)

    monkeypatch.setattr(module.Run, "save", dying)
    assert cli(script, *tiny(script), "--run-dir", run_dir, "--track")[0] == -9
    monkeypatch.setattr(module.Run, "save", save)
    wandb.finish()
    assert cli(script, "--run-dir", run_dir, "--resume", "--track")[0] == 0
    offline = sorted((run_dir / "wandb").glob("offline-run-*"))
    wandb_id = json.loads((run_dir / "config.json").read_text())["wandb_id"]
    assert all(wandb_id in path.name for path in offline), "both belong to one run of W&B"
    first, second = ([row for _, row in wandb_history(path)] for path in offline)
    assert [row for row in first if row["global_step"] < second[0]["global_step"]] + second == rows(run_dir)


@scripts(KINDS, quick=())
def test_wandb_that_fails_in_mid_run_does_not_stop_it(script, cli, finished, tmp_path, monkeypatch):
    import wandb

    calls, log = [], wandb.Run.log

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 3:
            raise ConnectionError("the line is dead")
        log(self, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "log", failing)
    assert cli(script, *tiny(script), "--track", "--run-dir", tmp_path / "tracked")[0] == 0
    assert timeless(tmp_path / "tracked") == timeless(finished(script, "plain"))


@scripts(KINDS, quick=())
def test_wandb_that_cannot_start_is_one_line_and_leaves_nothing_behind(script, cli, tmp_path, monkeypatch):
    import wandb

    run_dir = tmp_path / "run"

    def fail(**_):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", fail)
    code, _, err = cli(script, *tiny(script), "--track", "--run-dir", run_dir)
    assert code == 2
    assert is_one_line(err)
    assert "No API key" in err
    assert "WANDB_MODE=offline" in err
    monkeypatch.undo()
    assert cli(script, *tiny(script), "--track", "--run-dir", run_dir)[0] == 0, "the same command works when W&B does"


# ---- In a notebook, or another program


@scripts(ACTING, quick=ACTING)
def test_train_returns_its_last_evaluation_and_leaves_the_program_as_it_was(script, finished, tmp_path, monkeypatch):
    """Also in a thread, and in a program that has drawn random numbers."""
    _ = random.random(), np.random.random(), torch.rand(3)
    module, save, seen = module_of(script), module_of(script).Run.save, []
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    path = [*sys.path]

    def looking(self):
        seen.append([signal.getsignal(number) for number in signal.valid_signals()])
        save(self)

    monkeypatch.setattr(module.Run, "save", looking)
    args = arguments(script, "--run-dir", tmp_path / "run")
    before, results = dataclasses.asdict(args), []
    thread = threading.Thread(target=lambda: results.append(module.train(args)))
    thread.start()
    thread.join()
    last = [row for row in rows(tmp_path / "run") if is_evaluation(row)][-1]
    assert results == [{name: value for name, value in last.items() if name.startswith("eval/")}]
    assert seen
    assert all(now == handlers for now in seen), "a notebook's Ctrl-C is its own"
    assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers
    assert dataclasses.asdict(args) == before
    assert sys.path == path
    assert timeless(tmp_path / "run") == timeless(finished(script, "another"))
    with pytest.raises(module.UsageError):
        module.train(args)  # into the same folder


@scripts(ACTING)
def test_a_notebooks_interrupt_ends_the_run_which_goes_on_later(script, finished, tmp_path, monkeypatch):
    module, evaluate = module_of(script), module_of(script).evaluate
    evaluations = []

    def interrupted(*args):
        evaluations.append(1)
        if len(evaluations) == 3:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(module, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt) as end:
        module.train(arguments(script, "--run-dir", tmp_path / "interrupted"))
    open_files = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if number.isdigit()
                  and os.path.exists(f"/proc/self/fd/{number}")]  # fmt: skip
    assert end.value, "a notebook keeps the exception, and with it all that the run had"
    assert not [name for name in open_files if name.startswith(str(tmp_path))]
    module.train(module.saved_args(tmp_path / "interrupted", resume=True))
    assert timeless(tmp_path / "interrupted") == timeless(finished(script))


@scripts([script for script in ACTING if script not in ("maddpg", "q_learning")], quick=ACTING)
def test_a_trained_agent_acts_without_its_environment(script, finished, monkeypatch):
    """On one observation or on many, of any type of number."""
    module, run_dir = module_of(script), finished(script)
    monkeypatch.setattr(gym, "make", None)
    agent = module.load(run_dir)
    assert same(agent.state_dict(), weights(script, run_dir))
    batch = np.random.default_rng(0).uniform(-1, 1, (5, *agent.obs_shape)).astype(np.float32)
    actions = agent.act(batch)
    assert len({str(action) for action in actions}) > 1, "they depend on the observation"
    for obs, action in zip(batch, actions, strict=True):
        alone = agent.act(obs)
        assert agent.action_space.contains(alone) or agent.action_space.contains(alone.item())
        assert alone.shape == agent.action_space.shape
        assert alone == pytest.approx(action, abs=1e-6)
    for other in batch.astype(np.float64), batch.tolist(), torch.from_numpy(batch):
        assert np.array_equal(agent.act(other), actions)
    integers = np.arange(agent.obs_shape[0])
    assert np.array_equal(agent.act(integers), agent.act(integers.astype(np.float32)))
    for wrong in batch[:, :1], batch[0, :1]:
        with pytest.raises((ValueError, RuntimeError, AssertionError)):  # no number is taken for several equal ones
            agent.act(wrong)
    assert torch.is_grad_enabled()
    assert module.load(str(run_dir)).act(batch).tolist() == actions.tolist()


@pytest.mark.parametrize("script", ["ppo", "dqn"])
def test_a_trained_agent_acts_on_pictures(script):
    module = module_of(script)
    agent = module.make_agent(module.Args(env_id="ALE/Pong-v5"), (4, 84, 84), gym.spaces.Discrete(6))
    batch = np.random.default_rng(0).integers(0, 256, (2, 4, 84, 84), dtype=np.uint8)
    assert agent.act(batch).shape == (2,)
    assert agent.act(batch[1]).shape == ()
    assert np.array_equal(agent.act(batch.astype(np.float64)), agent.act(batch))


SPACES = {
    "discrete": gym.spaces.Discrete(3, start=-1),
    "large": gym.spaces.Discrete(5, dtype=np.int32),
    "multi": gym.spaces.MultiDiscrete([2, 4], start=[1, 0]),
    "matrix": gym.spaces.MultiDiscrete([[2, 4], [3, 3]]),
    "box": gym.spaces.Box(np.array([-1, 0, -5]), np.array([3, 10, 0]), dtype=np.float32),
    "float64": gym.spaces.Box(-2, 2, (2, 2), np.float64),
    "unbounded": gym.spaces.Box(-np.inf, np.inf, (1,), np.float32),
}


class Reach(gym.Env):
    """Acts in the space that it is given; three steps an episode."""

    observation_space = gym.spaces.Box(-1, 1, (2,))

    def __init__(self, space):
        self.action_space = SPACES[space]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.t += 1
        assert self.action_space.contains(action), action
        return self.observation_space.sample(), 0.0, False, self.t == 3, {}


for name in SPACES:
    gym.register(f"Reach-{name}-v0", Reach, kwargs={"space": name})


@pytest.mark.parametrize("space", SPACES)
def test_a_saved_agent_has_the_action_space_of_the_trained_one(space):
    module = module_of("ppo")
    module.train(arguments("ppo", "--env-id", f"Reach-{space}-v0", "--total-timesteps", 128, "--run-dir", "run"))
    agent = module.load("run")
    assert agent.action_space == SPACES[space]
    assert agent.action_space.dtype == SPACES[space].dtype
    assert agent.obs_shape == (2,)
    action = agent.act(np.zeros(2))
    assert SPACES[space].contains(action if action.shape else action[()])


# ---- What only the scripts on data promise


@slow
@pytest.mark.parametrize("script", ON_DATA)
def test_a_resumed_run_keeps_its_arguments(script, cli, finished):
    run_dir = finished(script)
    for flags in [f"--{FACTS[script].rate}", 0.5], ["--seed", 3], ["--total-timesteps", 64]:
        code, _, err = cli(script, "--run-dir", run_dir, "--resume", *flags)
        assert code == 2
        assert flags[0].strip("-").replace("-", "_") in err
    assert cli(script, "--run-dir", run_dir, "--resume", "--seed", 1)[0] == 0, "the same is no change"


@slow
@pytest.mark.parametrize("script", ON_DATA)
def test_a_script_that_was_copied_alone_says_what_to_give_it(script, tmp_path):
    copied = shutil.copy(ROOT / "algorithms" / f"{script}.py", tmp_path)
    result = call(Path(copied), cwd=tmp_path)
    assert result.returncode == 2
    assert is_one_line(result.stderr)
    assert "--model-name and --dataset" in result.stderr
