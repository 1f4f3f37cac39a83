"""The launcher, driven as its users drive it, with a stand-in for the training scripts that fails in every way."""

import importlib.util
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import filelock
import psutil
import pytest
import tyro
from conftest import start
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = ROOT / "benchmark" / "run.py"
FAKE = Path(__file__).with_name("fake_script.py")
TEXT_MODEL = ROOT / "benchmark" / "reviews" / "model"


def launch(output: Path, *words: str, script: Path = FAKE, **options: object) -> subprocess.Popen:
    """Starts the launcher. The last of the words may be flags of the script, after --."""
    words, flags = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, ())
    if "--suite" not in words:
        words = ("--command", " ".join([sys.executable, str(script), *flags]), *words)
    if "--probe-seconds" not in words:
        words = (*words, "--probe-seconds", "0")
    command = [sys.executable, str(LAUNCHER), *words, "--output", str(output)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=output.parent, **pipes | options)


def run(output: Path, *words: str, code: int = 0, **options: object) -> str:
    process = launch(output, *words, **options)
    text, _ = process.communicate(timeout=90)
    assert process.returncode == code, text
    return text


def ledger(output: Path) -> dict[str, dict]:
    return json.loads((output / "ledger.json").read_text())["runs"]


def by_env(output: Path) -> dict[str, dict]:
    return {row["env_id"]: row for row in ledger(output).values()}


def calls(folder: Path) -> list[str]:
    return (folder / "calls.txt").read_text().split()


def check_steps(folder: Path, total: int = 10) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["global_step"] for row in rows] == list(range(1, total + 1))


def wait_for(condition: Callable[[], object], seconds: float = 20) -> object:
    deadline = time.time() + seconds
    while time.time() < deadline:
        if result := condition():
            return result
        time.sleep(0.02)
    raise TimeoutError(condition)


def processes_in(output: Path) -> list[psutil.Process]:
    """Those that have the folder on their command line: the scripts, their shells, and launchers."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(output) in " ".join(p.info["cmdline"] or ())]


@pytest.fixture
def launcher_module(monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("benchmark_run", LAUNCHER)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_run", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def output(tmp_path: Path):
    """An output folder; whatever a failed test leaves alive in it dies with the test."""
    yield tmp_path / "out"
    for process in processes_in(tmp_path):
        process.kill()


KINDS = {  # what becomes of a run: status, exit code, and what its last lines say
    "fine-0": ("done", 0, ""),
    "crash-1": ("failed", 1, "something broke"),
    "mistake-1": ("failed", 2, "--env-id is unknown"),
    "kill-1": ("killed", 137, "Killed"),
    "nan-1": ("NaN", 1, "NaN or infinity at step 5"),
    "nanresult-1": ("NaN", 0, ""),
    "silent-1": ("no result", 0, "no eval/episodic_return at step 10"),
    "nothing-1": ("no result", 0, "no eval/episodic_return at step 10"),
    "hang-1": ("timed out", 137, "attempt 1, hang"),
    "memory-1": ("done", 0, ""),
}


def test_every_kind_of_failure_is_named_and_only_failures_run_again(output):
    words = ("--num-seeds", "1", "--workers", "5", "--timeout", "4", "--grace", "0.3", "--env-ids", *KINDS)
    text = run(output, *words, "--", "--delay", "0.01", code=1)
    rows = by_env(output)
    for env_id, (status, code, words_of_it) in KINDS.items():
        row = rows[env_id]
        assert (row["status"], row["exit_code"], row["attempts"]) == (status, code, 1), env_id
        assert words_of_it in " ".join(row["last_lines"]), env_id
        assert (f"{status}: {row['name']}" in text) == (status != "done"), env_id
    assert "2 of 10 runs are done" in text
    assert 4 < rows["hang-1"]["wall_s"] < 9
    assert rows["memory-1"]["peak_mb"] > 190 > 100 > rows["fine-0"]["peak_mb"] > 1
    assert rows["fine-0"]["final"] == 7
    hanging_child = int((output / rows["hang-1"]["name"] / "child.pid").read_text())
    assert not psutil.pid_exists(hanging_child) or psutil.Process(hanging_child).status() == "zombie"

    run(output, *words, "--", "--delay", "0.01", code=1)  # what has written no result, at its end, still has none
    assert by_env(output)["hang-1"]["wall_s"] > 4  # of both attempts
    for env_id, row in by_env(output).items():
        folder = output / row["name"]
        once = KINDS[env_id][0] == "done"
        assert row["status"] == {"nothing-1": "no result", "nanresult-1": "NaN"}.get(env_id, "done"), env_id
        assert calls(folder).count("begin") == row["attempts"] == (1 if once else 2), env_id
        assert calls(folder).count("end") == 1
        check_steps(folder)
        if not once:
            assert "--resume --run-dir" in (folder / "output.log").read_text()


@pytest.mark.slow
def test_forty_runs_a_fifth_in_trouble_and_the_launcher_killed_twice(output):
    entries = [("fine-0", 32), ("crash-1", 2), ("kill-1", 2), ("hang-1", 2), ("nan-1", 2)]
    suite = output.with_name("sweep.toml")
    suite.write_text(
        "".join(
            f'[[run]]\nscript = "{FAKE}"\nenv_ids = ["{env_id}"]\nseeds = {seeds}\n'
            f"total_timesteps = 10\nflags = {{ delay = 0.04 }}\n"
            for env_id, seeds in reversed(entries)
        )
    )
    words = ("--suite", str(suite), "--workers", "6", "--timeout", "4", "--grace", "0.3")

    def begun() -> int:
        return len(list(output.glob("*/calls.txt")))

    for some in 8, 20:
        launcher = launch(output, *words)
        wait_for(lambda some=some: begun() >= some)
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
        assert len(ledger(output)) == 40  # whole, at whatever moment
        assert begun() < 40
    statuses = {}
    for _ in range(3):
        process = launch(output, *words)
        text, _ = process.communicate(timeout=60)
        statuses = [row["status"] for row in ledger(output).values()]
        assert (process.returncode == 0) == (statuses == ["done"] * 40)
        assert f"{statuses.count('done')} of 40 runs are done" in text
        for row in ledger(output).values():
            assert (f"{row['status']}: {row['name']}, exit" in text) == (row["status"] != "done")
        if process.returncode == 0:
            break
    assert statuses == ["done"] * 40
    for row in ledger(output).values():
        folder = output / row["name"]
        assert calls(folder).count("end") == 1, row["name"]
        assert calls(folder).count("begin") == row["attempts"] == (1 if row["env_id"] == "fine-0" else 2), row["name"]
        check_steps(folder)
    assert processes_in(output) == []


def test_runs_that_survive_their_launcher_are_joined_and_those_that_ended_are_judged(output):
    words = ("--env-ids", "fine-0", "crash-1", "--num-seeds", "1", "--workers", "2", "--", "--delay", "0.2")
    launcher = launch(output, *words)
    wait_for(lambda: len(list(output.glob("*/metrics.jsonl"))) == 2)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    assert {row["status"] for row in ledger(output).values()} <= {"pending", "running"}
    wait_for(lambda: list(output.glob("crash*/exit_code")))  # nobody watches when this one fails
    assert any("fine-0" in " ".join(p.cmdline()) for p in processes_in(output))
    run(output, *words)
    rows = by_env(output)
    fine, crash = output / rows["fine-0"]["name"], output / rows["crash-1"]["name"]
    assert (rows["fine-0"]["attempts"], calls(fine)) == (1, ["begin", "end"])
    assert (rows["crash-1"]["attempts"], calls(crash)) == (2, ["begin", "begin", "end"])
    assert rows["fine-0"]["exit_code"] == 0
    assert 2 < rows["fine-0"]["wall_s"] < 6


def test_more_survivors_than_workers(output):
    words = ("--env-ids", "fine-0", "--num-seeds", "3", "--workers")
    launcher = launch(output, *words, "3", "--", "--delay", "0.2")
    wait_for(lambda: len(list(output.glob("*/metrics.jsonl"))) == 3)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    run(output, *words, "1", "--", "--delay", "0.2")  # while it joins the first, the others end
    assert [calls(output / name) for name in ledger(output)] == [["begin", "end"]] * 3


def test_a_launcher_that_dies_before_it_has_noted_a_process_starts_nothing(output, launcher_module):
    for word, begun in ("", False), ("go\n", True):
        command = ["sh", "-c", launcher_module.SHELL, "exit_code", "touch", "begun"]
        subprocess.run(command, input=word, text=True)
        assert Path("begun").exists() == Path("exit_code").exists() == begun


def test_a_survivor_without_its_shell_is_joined_too_and_trains_nothing_twice(output):
    words = ("--env-ids", "fine-0", "--num-seeds", "1", "--", "--delay", "0.2")
    launcher = launch(output, *words)
    folder = wait_for(lambda: list(output.glob("*/metrics.jsonl")))[0].parent
    os.kill(launcher.pid, signal.SIGKILL)
    os.kill(json.loads((folder / "process.json").read_text())["pid"], signal.SIGKILL)
    launcher.wait()
    run(output, *words)
    assert calls(folder) == ["begin", "end", "begin"]  # the second time only to hear that all is well
    check_steps(folder)


def test_a_hanging_survivor_is_timed_out_by_the_next_launcher(output):
    words = ("--env-ids", "hang-1", "--num-seeds", "1", "--timeout", "1.5", "--grace", "0.2")
    launcher = launch(output, *words)
    wait_for(lambda: list(output.glob("*/child.pid")))
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    run(output, *words, code=1)
    assert [row["status"] for row in ledger(output).values()] == ["timed out"]


def test_a_run_that_lives_on_another_host_is_not_begun_twice(output):
    """Two processes in one folder would spoil its files. What has been silent for long is lost, and goes on here."""
    words = ("--env-ids", "kill-1", "--num-seeds", "1")
    run(output, *words, code=1)
    folder = next(output.glob("*/process.json")).parent
    note = json.loads((folder / "process.json").read_text())
    (folder / "process.json").write_text(json.dumps(note | {"host": "elsewhere"}))
    (folder / "exit_code").unlink()
    launcher = launch(output, *words)
    try:
        wait_for(lambda: [row["status"] for row in ledger(output).values()] == ["running"])
        time.sleep(1.5)
        assert calls(folder) == ["begin"]
        for file in folder.iterdir():
            os.utime(file, (time.time() - 700,) * 2)
        wait_for(lambda: calls(folder) == ["begin", "begin", "end"])
        assert launcher.wait() == 0
    finally:
        launcher.kill()
    check_steps(folder)


def test_a_recycled_process_number_is_neither_joined_nor_killed(output):
    words = ("--env-ids", "kill-1", "--num-seeds", "1")
    run(output, *words, code=1)
    note_file = next(output.glob("*/process.json"))
    (note_file.parent / "exit_code").unlink()
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as stranger:
        note = json.loads(note_file.read_text())
        note_file.write_text(json.dumps(note | {"pid": stranger.pid, "created": note["created"] - 60}))
        try:
            run(output, *words)
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_a_clock_that_is_set_ends_no_run(output, launcher_module, monkeypatch):
    """With it moves what psutil says of the time at which a process was created."""

    def set_forward(clock: Callable) -> Callable:
        return lambda *words: clock(*words) + 3600 * bool(list(output.glob("*/metrics.jsonl")))

    for owner, name in (time, "time"), (psutil.Process, "create_time"):
        monkeypatch.setattr(owner, name, set_forward(getattr(owner, name)))
    command = f"{sys.executable} {FAKE} --delay 0.1"
    (planned,) = launcher_module.plan(launcher_module.Args(command=command, env_ids=("fine-0",), num_seeds=1))
    call = launcher_module.Call(output, {}, timeout=60, grace=1, commit="")
    assert launcher_module.execute(planned, call).status == "done"


def test_a_child_that_outlives_its_script_ends_with_it(output):
    script = output.with_name("fake.py")
    child = '(args.run_dir / "child.pid").write_text(str(subprocess.Popen(["sleep", "60"]).pid))'
    script.write_text(f"{FAKE.read_text()}\n{child}\n")
    launcher = launch(output, "--env-ids", "fine-0", "--num-seeds", "1", script=script)
    wait_for(lambda: launcher.poll() == 0)
    child = int(next(output.glob("*/child.pid")).read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"


DAMAGES = {  # what stands in a file of a run that was done, and what the next call makes of it
    ("metrics.jsonl", '{"global_step": 10, "eval/episodic_return": "7.0"}\n'): "failed",
    ("metrics.jsonl", '{"global_step": "10", "time": 1.0}\n'): "failed",
    ("metrics.jsonl", "5\n"): "failed",
    ("config.json", "[]"): "failed",
    ("config.json", '{"args": null}'): "failed",
    ("exit_code", "garbage"): "done",  # it runs again, which writes a new one
    ("process.json", '{"host": "x"}'): "done",
    ("process.json", "[]"): "done",
}


def test_a_damaged_file_is_a_trouble_of_its_run_alone(output, launcher_module):
    words = ("--num-seeds", "1", "--workers", "4", "--env-ids", *(f"fine-{i}" for i, _ in enumerate(DAMAGES)))
    run(output, *words)
    for (name, content), row in zip(DAMAGES, ledger(output).values(), strict=True):
        (output / row["name"] / name).write_text(content)
    for _ in range(2):
        assert "3 of 8 runs are done" in run(output, *words, code=1)
        for row, (damage, status) in zip(ledger(output).values(), DAMAGES.items(), strict=True):
            assert row["status"] == status, damage
            assert ("are damaged" in " ".join(row["last_lines"][-1:])) == (status == "failed"), damage
    assert [launcher_module.clock(seconds) for seconds in (None, float("nan"), 1e16)] == ["?"] * 3


def test_a_long_name_of_an_environment_or_a_script_ends_no_call(output):
    words = ("--num-seeds", "1", "--env-ids", "fine-" + "0" * 400)
    assert "1 of 1 runs are done" in run(output, *words)
    script = output.with_name("a" * 240 + ".py")
    shutil.copy(FAKE, script)
    text = run(output, *words, script=script, code=1)
    assert "0 of 1 runs are done" in text
    assert "File name too long" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_launcher_stops_its_runs_and_the_next_goes_on(output, number):
    words = ("--env-ids", "fine-0", "--num-seeds", "3", "--workers", "2", "--", "--delay", "0.15")
    launcher = launch(output, *words)
    wait_for(lambda: len(list(output.glob("*/metrics.jsonl"))) == 2)
    launcher.send_signal(number)
    text, _ = launcher.communicate(timeout=10)
    assert launcher.returncode == 128 + number
    assert "0 of 3 runs are done" in text
    assert processes_in(output) == []
    rows = list(ledger(output).values())
    assert sorted(row["status"] for row in rows) == ["killed", "killed", "pending"]
    assert {row["exit_code"] for row in rows} == {143, None}  # they had time to write their checkpoints
    for row in rows:  # of those that never began there is no more to say than their number
        assert (f"\nkilled: {row['name']}, exit code 143:" in text) == (row["status"] == "killed")
    assert "\nruns not begun by this call: 1\n" in text
    last = text.splitlines()[-1]
    assert last.startswith("the same command goes on with the others: ")
    assert shlex.split(last.split(": ", 1)[1]) == launcher.args  # with the interpreter that has the packages
    run(output, *words)
    for row in ledger(output).values():
        assert calls(output / row["name"]).count("end") == 1
        check_steps(output / row["name"])


def test_a_stopped_call_tells_only_of_what_itself_has_begun(output):
    words = ("--env-ids", "slow-9", "mistake-9", "--num-seeds", "1", "--", "--delay", "0.1")
    only_the_mistake = ("--env-ids", "mistake-9", "--num-seeds", "1", "--", "--delay", "0.1")
    assert "\nfailed: mistake-9__fake" in run(output, *only_the_mistake, code=1)
    launcher = launch(output, *words)  # of one worker: the mistake's turn is the second one
    wait_for(lambda: list(output.glob("slow*/metrics.jsonl")))
    launcher.send_signal(signal.SIGINT)
    text, _ = launcher.communicate(timeout=10)
    assert launcher.returncode == 130
    assert "\nkilled: slow-9__fake" in text
    assert "failed" not in text
    assert "--env-id is unknown" not in text
    assert "\nruns not begun by this call: 1\n" in text
    assert by_env(output)["mistake-9"]["attempts"] == 1


def test_the_last_line_is_a_command_that_works_when_pasted(output, tmp_path):
    """By name alone, python may be one without the packages, as in a shell that has activated no environment."""
    (tmp_path / "python").write_text("#!/bin/sh\necho ModuleNotFoundError >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ("--env-ids", "crash-1", "--num-seeds", "1")
    command = run(output, *words, code=1, env=environment).splitlines()[-1].split(": ", 1)[1]
    again = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1].startswith("to sum them up: ")
    report = again.stdout.splitlines()[-1].split(": ", 1)[1]
    told = subprocess.run(report, shell=True, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert "script and args" in told.stderr  # report.py began, and missed what fake_script.py's config.json lacks


@pytest.mark.parametrize("python", ["python", "python3"])
def test_python_in_a_command_is_the_launchers_own(output, tmp_path, python):
    (tmp_path / python).write_text("#!/bin/sh\necho ModuleNotFoundError >&2\nexit 1\n")
    (tmp_path / python).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ("--command", f"{python} {FAKE}", "--env-ids", "fine-0", "--num-seeds", "1")
    flags = ["--probe-seconds", "0", "--output", str(output)]
    for more in [], ["--dry-run"]:
        done = subprocess.run(
            [sys.executable, str(LAUNCHER), *words, *flags, *more],
            env=environment, text=True, capture_output=True, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
    assert next(iter(ledger(output).values()))["launch"] == [sys.executable, str(FAKE)]
    shutil.rmtree(output)
    done = subprocess.run(
        [sys.executable, str(LAUNCHER), *words, *flags, "--dry-run"], text=True, capture_output=True, cwd=tmp_path
    )
    assert f"{sys.executable} {FAKE} --env-id=fine-0 --seed=1" in done.stdout  # a printed command names it


@pytest.mark.slow
def test_another_script_text_or_flag_is_another_run(output):
    script = output.with_name("fake.py")
    shutil.copy(FAKE, script)
    words = ("--env-ids", "fine-0", "--num-seeds", "1")
    run(output, *words, script=script)
    assert "1 of them done" in run(output, *words, script=script)
    script.write_text(script.read_text() + "# a change\n")
    assert "0 of them done" in run(output, *words, script=script)
    assert "0 of them done" in run(output, *words, "--", "--learning-rate", "0.2", script=script)
    assert "1 of them done" in run(output, *words, script=script)
    assert len(ledger(output)) == 3
    assert len({row["group"] for row in ledger(output).values()}) == 3
    assert [calls(folder.parent) for folder in output.glob("*/calls.txt")] == [["begin", "end"]] * 3
    asked = json.loads((output / "ledger.json").read_text())["asked"]
    assert len(asked) == 1  # whoever reads the ledger can tell what the last call was about


def test_what_has_vanished_runs_again(output):
    words = ("--env-ids", "fine-0", "--num-seeds", "2")
    run(output, *words)
    gone, kept = (output / name for name in ledger(output))
    shutil.rmtree(gone)
    assert "1 of them done" in run(output, *words)
    assert calls(gone) == calls(kept) == ["begin", "end"]


def test_retry_tries_again_in_the_same_call(output):
    run(output, "--env-ids", "crash-2", "--num-seeds", "1", "--retry", "1", code=1)
    assert [row["attempts"] for row in ledger(output).values()] == [2]
    run(output, "--env-ids", "crash-2", "--num-seeds", "1", "--retry", "1")
    assert [row["attempts"] for row in ledger(output).values()] == [3]


def test_every_flag_reaches_the_script_and_each_worker_has_its_share_of_the_machine(output):
    flags = ("--", "--learning-rate", "0.3", "--no-norm-obs", "--total-timesteps=6", "--delay", "0.1")
    words = ("--env-ids", "fine-0", "--num-seeds", "4", "--start-seed", "5", "--workers", "2", "--track", *flags)
    surroundings = {"CUDA_VISIBLE_DEVICES": "3,5", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "77"}
    run(output, *words, env=os.environ | surroundings)
    configs = {row["seed"]: json.loads((output / name / "config.json").read_text()) for name, row in
               ledger(output).items()}  # fmt: skip
    assert sorted(configs) == [5, 6, 7, 8]
    for seed, config in configs.items():
        args = {"env_id": "fine-0", "seed": seed, "total_timesteps": 6, "delay": 0.1, "learning_rate": 0.3}
        assert config["args"] == args | {"norm_obs": False, "track": True, "files": []}
        environment = config["environment"]
        assert int(environment["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
        assert environment["WANDB_RUN_GROUP"] == next(iter(ledger(output).values()))["group"]
        assert environment["WANDB_JOB_TYPE"] == "fake_script"
        assert environment["WANDB_TAGS"] == next(iter(ledger(output).values()))["commit"]
        assert environment["WANDB_MODE"] == "offline"
    assert {config["environment"]["CUDA_VISIBLE_DEVICES"] for config in configs.values()} == {"3", "5"}
    # never three at a time
    spans = [((folder / "config.json").stat().st_mtime, (folder / "calls.txt").stat().st_mtime)
             for folder in map(output.joinpath, ledger(output))]  # fmt: skip
    assert max(sum(begin <= moment < end for begin, end in spans) for moment, _ in spans) == 2


@pytest.mark.slow
def test_the_estimate_comes_from_a_probe_that_is_made_once(output):
    words = ("--env-ids", "fine-0", "--num-seeds", "2", "--workers", "1", "--track", "--probe-seconds", "2")
    flags = ("--", "--total-timesteps", "30", "--delay", "0.1")
    launcher = launch(output, *words, *flags)
    text = wait_for(lambda: list(output.glob("fine*/metrics.jsonl"))) and ""
    launcher.send_signal(signal.SIGINT)
    text, _ = launcher.communicate(timeout=10)
    assert "1 trial runs of 2 s each show how long the runs will take" in text
    estimate = next(line for line in text.splitlines() if line.startswith("estimate: 0:00:"))
    assert 6 <= int(estimate.split(":")[3][:2]) <= 10  # two runs of three seconds and a start
    (probe,) = json.loads((output / "ledger.json").read_text())["probes"].values()
    assert 3 <= probe["seconds"] < 5
    assert 1000 < probe["bytes"] < 20_000
    assert not list(output.glob("probe*"))
    text = run(output, *words, *flags)
    assert "trial runs" not in text
    took, estimated = re.search(r"took 0:00:(\d\d) \(estimate 0:00:(\d\d)\)", text).groups()
    assert 3 <= int(took) <= 14  # one whole run at least, and the rest of the other
    assert 3 <= int(estimated) <= 10
    assert all(len(calls(output / name)) <= 3 for name in ledger(output))


def test_an_estimate_says_what_it_leaves_out(output):
    """One kind of run that says nothing within its trial spoils no estimate of the others."""
    words = ("--env-ids", "fine-0", "hang-1", "--num-seeds", "1", "--timeout", "4", "--grace", "0.1")
    text = run(output, *words, "--probe-seconds", "1.5", "--workers", "2", "--", "--total-timesteps", "1", code=1)
    assert "no estimate for hang-1__fake_script__" in text
    assert re.search(r"\nestimate: 0:00:0\d, without 1 of unknown length, and 0.0 MB\n", text)
    assert "(estimate ?)" not in text


def test_a_suite_may_do_without_trial_runs(output, launcher_module):
    """The smoke suite does: its runs are as short as trials, which would take most of its minute."""
    suite = output.with_name("short.toml")
    entry = f'[[run]]\nscript = "{FAKE}"\nenv_ids = ["fine-0"]\nseeds = 1\ntotal_timesteps = 12\n'
    for head, flags, seconds in (
        ("probe_seconds = 0\n", {}, 0),
        ("probe_seconds = 0\n", {"probe_seconds": 3.0}, 3),
        ("", {}, 20),
    ):
        suite.write_text(head + entry)
        args = launcher_module.Args(suite=str(suite), **flags)
        launcher_module.plan(args)
        assert args.probe_seconds == seconds
    smoke = launcher_module.Args(suite="smoke")
    launcher_module.plan(smoke)
    assert smoke.probe_seconds == 0
    suite.write_text("probe_seconds = 0\n" + entry)
    command = [sys.executable, str(LAUNCHER), "--suite", str(suite), "--output", str(output)]
    text = subprocess.run(command, text=True, capture_output=True, cwd=output.parent).stdout
    assert "1 of 1 runs are done" in text
    assert "trial runs" not in text
    assert "estimate" not in text


def test_a_probe_left_by_a_killed_launcher_ends(output):
    words = ("--env-ids", "hang-1", "--num-seeds", "1", "--timeout", "1", "--grace", "0.2", "--probe-seconds")
    launcher = launch(output, *words, "50")
    wait_for(lambda: list(output.glob("probe~*/child.pid")))
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    run(output, *words, "0", code=1)
    assert processes_in(output) == []
    assert not list(output.glob("probe*"))


def test_a_run_whose_environment_is_named_like_a_trial_is_kept(output):
    words = ("--env-ids", "probe-0", "--num-seeds", "1")
    run(output, *words)
    assert "1 runs, 1 of them done" in run(output, *words)
    assert [calls(output / name) for name in ledger(output)] == [["begin", "end"]]


def test_a_full_disk_is_one_line_and_stops_the_runs(output):
    words = ("--env-ids", "fine-0", "--num-seeds", "2", "--", "--delay", "0.1")
    launcher = launch(output, *words)
    wait_for(lambda: list(output.glob("*/metrics.jsonl")))
    (output / "ledger.tmp").mkdir()  # the ledger can't be written from here on
    text, _ = launcher.communicate(timeout=20)
    assert launcher.returncode == 1
    assert text.count("error:") == 1
    assert "Traceback" not in text
    assert processes_in(output) == []
    (output / "ledger.tmp").rmdir()
    run(output, *words)
    for row in ledger(output).values():
        check_steps(output / row["name"])


def test_a_disk_without_room_for_the_sign_to_stop_lets_runs_end_and_none_begin(output):
    """Until they have ended the folder is locked: another launcher would begin them a second time."""
    launcher = launch(output, "--env-ids", "fine-0", "--num-seeds", "4", "--", "--delay", "0.2")
    wait_for(lambda: list(output.glob("*/metrics.jsonl")))
    (output / "ledger.tmp").mkdir()
    (output / "stop").symlink_to("nowhere/stop")
    while "error:" not in launcher.stdout.readline():
        pass
    with pytest.raises(filelock.Timeout):
        filelock.FileLock(output / "ledger.lock", timeout=0).acquire()
    text, _ = launcher.communicate(timeout=20)
    assert launcher.returncode == 1
    assert "Traceback" not in text
    assert [calls(file.parent) for file in output.glob("*/calls.txt")] == [["begin", "end"]] * 2


def test_two_launchers_do_not_share_a_ledger(output):
    words = (
        "--env-ids",
        "fine-0",
        "--num-seeds",
        "1",
        "--",
        "--delay",
        "0.5",
    )  # long enough for the second one to start
    first = launch(output, *words)
    wait_for(lambda: list(output.glob("*/metrics.jsonl")))
    assert "is in use by another launcher" in run(output, *words, code=2)
    first.communicate(timeout=20)
    assert first.returncode == 0


def test_dry_run_only_speaks(output):
    text = run(output, "--env-ids", "fine-0", "--num-seeds", "2", "--dry-run")
    assert text.count("pending: fine-0__fake_script__") == 2
    assert not output.exists()


def with_logs(flag, env_id, folder):
    """The same flag; in place of logs that are not there it names some of random actions."""
    logs = Path(flag.removeprefix("--dataset="))
    if not flag.startswith("--dataset=") or (logs / "data.npz").exists():
        return flag
    if not (folder / logs.name).exists():
        words = "--policy", "random", "--env-id", env_id, "--steps", "300", "--output", folder / logs.name
        subprocess.run([sys.executable, ROOT / "benchmark" / "record.py", *words], check=True)
    return f"--dataset={folder / logs.name}"


@pytest.mark.slow
@pytest.mark.parametrize("suite", sorted(file.stem for file in (ROOT / "benchmark" / "suites").glob("*.toml")))
def test_each_run_of_a_suite_passes_the_checks_of_its_script(suite, launcher_module, tmp_path):
    """Its flags and its environment are good: it begins, with its folder's config.json.

    In place of the model that another run would have made it gets the task's own, with a random head for rewards, and
    in place of logs that are missing some of random actions. Of runs that differ in numbers or logs alone only the
    first is tried. test_peer.py tries peers.
    """
    reward_model = tmp_path / "reward_model"
    AutoTokenizer.from_pretrained(TEXT_MODEL).save_pretrained(reward_model)
    AutoModelForSequenceClassification.from_pretrained(TEXT_MODEL, num_labels=1).save_pretrained(reward_model)
    tried = set()
    for planned in launcher_module.plan(launcher_module.Args(suite=suite, num_seeds=1)):
        words = str(planned.command(Path())).replace(planned.name, "")
        without_numbers = re.sub(r"=[\d.e-]+'|(?<=--dataset=)[^']*", "=", words)
        if without_numbers in tried or Path(planned.launch[-1]).stem == "peer":
            continue
        tried.add(without_numbers)
        folder = tmp_path / planned.name
        for needed in planned.needs.values():
            model = reward_model if "__reward_model__" in needed else TEXT_MODEL
            (tmp_path / needed).mkdir(exist_ok=True)
            with suppress(FileExistsError):
                (tmp_path / needed / "model").symlink_to(model)
        flags = [with_logs(flag, planned.env_id, tmp_path) for flag in planned.command(tmp_path)[2:]]
        script = start(Path(planned.launch[-1]).stem, *flags, f"--run-dir={folder}")
        deadline = time.time() + 60
        while script.poll() is None and not (folder / "config.json").exists() and time.time() < deadline:
            time.sleep(0.02)
        script.send_signal(signal.SIGKILL)
        _, complaint = script.communicate(timeout=10)
        assert (folder / "config.json").exists(), complaint


def test_a_suite_leaves_out_scripts_that_do_not_exist(output):
    suite = output.with_name("mine.toml")
    suite.write_text(
        f'[[run]]\nscript = "{FAKE}"\nenv_ids = ["fine-0"]\ntotal_timesteps = 12\nseeds = 2\nresult = "charts/SPS"\n'
        "flags = { norm_obs = false, learning_rate = 1e-3 }\n"
        '[[run]]\nscript = "algorithms/not_yet.py"\ntotal_timesteps = 5\n'
    )
    dry = run(output, "--suite", str(suite), "--dry-run")
    command = f"{FAKE} --total-timesteps=12 --no-norm-obs --learning-rate=0.001 --env-id=fine-0 --seed=2\n"
    assert command in dry, "what is run, but for its folder"
    text = run(output, "--suite", str(suite))
    assert "left out, for there is no such script yet: not_yet.py" in text
    assert sorted(row["seed"] for row in ledger(output).values()) == [1, 2]
    config = json.loads((output / next(iter(ledger(output))) / "config.json").read_text())
    assert (config["args"]["norm_obs"], config["args"]["learning_rate"]) == (False, 0.001)
    assert {row["final"] for row in ledger(output).values()} == {1000.0}
    assert "1 runs, 1 of them done" in run(output, "--suite", str(suite), "--num-seeds", "1")


NEEDY = """
[[run]]
name = "judge"
script = "{script}"
env_ids = ["{kind}"]
total_timesteps = 10
seeds = 2
flags = {{ learning_rate = {rate} }}

[[run]]
script = "{script}"
env_ids = ["fine-0"]
total_timesteps = 10
seeds = {seeds}
flags = {{ files = ["{{judge}}/checkpoint.pt", "{{root}}/LICENSE", "{{other}}-{{seed}}"] }}
"""


def write_needy(output: Path, **words: object) -> tuple[str, str]:
    suite = output.with_name("needy.toml")
    suite.write_text(NEEDY.format(**{"script": FAKE, "kind": "fine-1", "rate": 0.1, "seeds": 2} | words))
    return "--suite", str(suite)


def test_a_run_that_needs_another_gets_its_folder_and_waits_for_it(output):
    text = run(output, *write_needy(output), "--workers", "4", "--probe-seconds", "0.1")
    rows = {(row["env_id"], row["seed"]): row for row in ledger(output).values()}
    assert [row["status"] for row in rows.values()] == ["done"] * 4
    assert "1 trial runs of" in text  # what it needs is not there yet
    for seed in 1, 2:
        judge, needy = (output / rows[kind, seed]["name"] for kind in ("fine-1", "fine-0"))
        files = json.loads((needy / "config.json").read_text())["args"]["files"]
        assert files == [str(judge / "checkpoint.pt"), str(ROOT / "LICENSE"), f"{{other}}-{seed}"]
        ended, began = (judge / "exit_code").stat().st_mtime, (needy / "config.json").stat().st_mtime
        assert ended < began
        assert rows["fine-0", seed]["flags"] == rows["fine-0", 1]["flags"]  # runs of one kind, for report.py
    assert shlex.join(["--files", *files])[:30] in run(output.with_name("dry"), *write_needy(output), "--dry-run")


def test_another_run_that_is_needed_makes_another_run(output, launcher_module):
    names = []
    for rate in 0.1, 0.2:
        _, suite = write_needy(output, rate=rate)
        names.append([planned.name for planned in launcher_module.plan(launcher_module.Args(suite=suite))])
    assert not {*names[0]} & {*names[1]}


def test_flags_with_several_values_are_combined(output, launcher_module):
    suite = output.with_name("each.toml")
    each = "each = { learning_rate = [0.1, 0.2], norm_obs = [true, false] }"
    suite.write_text(
        f'[[run]]\nscript = "{FAKE}"\nenv_ids = ["fine-0"]\ntotal_timesteps = 9\n{each}\nflags = {{ delay = 0 }}\n'
    )
    runs = launcher_module.plan(launcher_module.Args(suite=str(suite), num_seeds=2))
    assert len({planned.name for planned in runs}) == len(runs) == 8
    flags = [planned.flags for planned in runs if planned.seed == 1]
    ends = [["0.1", "--norm-obs"], ["0.1", "--no-norm-obs"], ["0.2", "--norm-obs"], ["0.2", "--no-norm-obs"]]
    start = ["--total-timesteps=9", "--delay=0"]
    assert flags == [[*start, f"--learning-rate={rate}", norm] for rate, norm in ends]


def test_what_needs_a_run_that_failed_never_begins_until_that_is_done(output):
    words = write_needy(output, kind="crash-1")
    assert "runs not begun by this call: 2" in run(output, *words, code=1)
    assert not list(output.glob("fine*"))
    run(output, *words)
    assert [row["attempts"] for row in ledger(output).values()] == [2, 2, 1, 1]


def test_the_table_in_a_terminal(output):
    here, there = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "150", "LINES": "40"}
    words = ("--env-ids", "fine-0", "--num-seeds", "1", "--", "--delay", "0.05")
    launcher = launch(output, *words, stdout=there, stderr=there, env=environment)
    os.close(there)
    text = ""
    with suppress(OSError):  # the end of a terminal
        while True:
            text += os.read(here, 1 << 16).decode(errors="replace")
    assert launcher.wait() == 0
    for word in (
        "1 running; time left 0:00:0",
        "1 done; time left 0:00:00",
        "SPS",
        "│ running",
        "│ done",
        "20.0",  # of fake_script.py, which says that it sleeps 0.05 seconds a step and does nothing else
        "7.0",
    ):
        assert word in text, text


MISTAKES = {
    "--suite nothing": "no suite 'nothing', but atari, classic, frontier, games, mujoco, multiagent, offline",
    "--suite broken.toml": "is not a suite",
    "--suite letters.toml": "env_ids = 'A-v1' must be a list",
    "--suite single.toml": "mode = 'adam' must be a list",
    "--suite none.toml": "seeds = 0 must be a whole number of at least 1",
    "--suite below.toml": "start_seed = -1 must be a whole number of at least 0",
    "--suite unreadable.toml": "unreadable.toml",
    "--suite endless.toml": "probe_seconds, a number of at least 0",
    "--suite never.toml": "is not a suite",
    "--suite head.toml": "and nothing else",
    "--suite typo.toml": "a [[run]] has no seed, but script, total_timesteps, env_ids, seeds",
    "--suite short.toml": "each [[run]] needs a total_timesteps",
    "--suite seedless.toml": "no run of judge with seed 3",
    "--suite twice.toml": "name = 'judge' must be a new word",
    "--suite taken.toml": "name = 'seed' must be a new word",
    "--suite smoke --env-ids A": "a suite names its own environments",
    "--suite smoke --command x": "give either --command",
    "": "give either --command",
    "--command fake_script.py": "needs --env-ids",
    "--command none.py --env-ids A": "no script that exists",
    "--command python --env-ids A": "no script that exists",
    "--command 'python{' --env-ids A": "no script that exists",
    '--command "python \'fake_script.py" --env-ids A': "No closing quotation",
    "--command 'nopython fake_script.py' --env-ids A": "no program 'nopython'",
    "--command 'python fake_script.py --seed=3' --env-ids A": "leave out --seed",
    "--command 'python fake_script.py --run_dir x' --env-ids A": "leave out --run-dir",
    "--command 'python unreadable.py' --env-ids A": "unreadable.py",
    "OK --workers two": "--workers",
    "OK --num-seeds 0": "--num-seeds is 0 but must be a finite number of at least 1",
    "OK --workers -1": "--workers is -1",
    "OK --threads 0": "--threads is 0",
    "OK --retry -1": "--retry is -1",
    "OK --timeout nan": "--timeout is nan",
    "OK --timeout 0": "--timeout is 0.0 but must be a finite number above 0",
    "OK --start-seed -1": "--start-seed is -1",
    "OK --output fake_script.py": "--output",
    "OK --output damaged": "ledger.json is damaged",
    "OK --output trials": "ledger.json is damaged",
    "OK --output row": "ledger.json is damaged",
    "OK --output stopped": "stopped/stop",
    "OK --output loop": "loop",
    "OK --slurm": "--slurm:",
    "OK --slurm --ray-address auto": "either --slurm or --ray-address",
    "OK --ray-address 127.0.0.1:1": "--ray-address",
    "OK --ray-address x no ray": "--ray-address needs the package ray: pip install ray",
    "OK --slurm no submitit": "--slurm needs the package submitit",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(words, launcher_module, monkeypatch, capsys):
    shutil.copy(FAKE, "fake_script.py")
    Path("broken.toml").write_text("[[run]\n")
    Path("typo.toml").write_text(f'[[run]]\nscript = "{FAKE}"\ntotal_timesteps = 5\nseed = 3\n')
    Path("short.toml").write_text(f'[[run]]\nscript = "{FAKE}"\n')
    Path("letters.toml").write_text(f'[[run]]\nscript = "{FAKE}"\ntotal_timesteps = 5\nenv_ids = "A-v1"\n')
    for name, line in ("single", 'each = { mode = "adam" }'), ("none", "seeds = 0"), ("below", "start_seed = -1"):
        Path(f"{name}.toml").write_text(f'[[run]]\nscript = "{FAKE}"\ntotal_timesteps = 5\n{line}\n')
    heads = {"endless": "probe_seconds = inf", "never": "probe_seconds = 'no'", "head": "probe_second = 0"}
    for name, head in heads.items():
        Path(f"{name}.toml").write_text(f'{head}\n[[run]]\nscript = "{FAKE}"\ntotal_timesteps = 5\n')
    needy = NEEDY.format(script=FAKE, kind="fine-1", rate=0.1, seeds=3)
    Path("seedless.toml").write_text(needy)
    Path("twice.toml").write_text(NEEDY.format(script=FAKE, kind="fine-1", rate=0.1, seeds=2) * 2)
    Path("taken.toml").write_text(needy.replace('"judge"', '"seed"'))
    row = vars(launcher_module.Run("a", "a", [], [], "", 1, "", "")) | {"wall_s": None}
    ledgers = {"damaged": '{"runs": ', "trials": '{"runs": {}, "probes": "xx"}'}
    for name, content in (ledgers | {"row": json.dumps({"runs": {"a": row}, "probes": {}})}).items():
        Path(name).mkdir()
        Path(name, "ledger.json").write_text(content)
    Path("stopped/stop").mkdir(parents=True)
    Path("loop").symlink_to("loop")
    for name in "unreadable.toml", "unreadable.py":  # even by root, for whom there are no secrets
        Path(name).symlink_to("/proc/self/mem")
    argv = words.replace("OK", "--command 'python fake_script.py' --env-ids fine-0 --probe-seconds 0")
    for package in "ray", "submitit":
        if f"no {package}" in argv:
            argv = argv.replace(f"no {package}", "")
            monkeypatch.setitem(sys.modules, package, None)  # import it and it is not there
    monkeypatch.setattr(sys, "argv", ["run.py", *shlex.split(argv)])
    with pytest.raises(SystemExit) as stop:
        launcher_module.main()
    complaint = capsys.readouterr().err
    assert stop.value.code == 2
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1
    assert MISTAKES[words] in complaint


def test_what_is_asked_for_twice_runs_once(output):
    text = run(output, "--env-ids", "fine-0", "fine-0", "--num-seeds", "1", "--workers", "2")
    assert "1 of 1 runs are done" in text
    assert [calls(output / name) for name in ledger(output)] == [["begin", "end"]]


def test_logging_elsewhere_is_no_other_run(output):
    """What is done is not trained again for --track; what begins anew is tracked."""
    words = ("--env-ids", "fine-0", "--num-seeds", "1")
    run(output, *words)
    assert "1 of them done" in run(output, *words, "--track")
    shutil.rmtree(output / next(iter(ledger(output))))
    assert "--track" in run(output, *words, "--track", "--dry-run")


def test_sbatch_that_refuses(output):
    tools = output.with_name("tools")
    tools.mkdir()
    for name, script in ("srun", ""), ("sbatch", "echo sbatch: error: invalid partition >&2; exit 1"):
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    text = run(output, "--env-ids", "fine-0", "--slurm", code=2, env=environment)
    assert text.splitlines()[-1].startswith("error: --slurm: ")
    assert "invalid partition" in text.splitlines()[-1]
    assert "Traceback" not in text


def test_threads_of_a_run(launcher_module, monkeypatch):
    """Here they share the cores; other machines have other cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    for flags, threads in {"": 8, "--workers 3": 2, "--workers 9": 1, "--slurm": 1, "--ray-address auto": 1}.items():
        args = tyro.cli(launcher_module.Args, args=flags.split())
        launcher_module.check(args)
        assert args.threads == threads, flags


@pytest.mark.slow
def test_slurm_through_submitit(output):
    words = ("--env-ids", "fine-0", "crash-1", "--num-seeds", "2", "--slurm", "--slurm-cluster", "local")
    text = run(output, *words, "--slurm-parameters", "partition", "gpu", code=1)
    assert "2 of 4 runs are done" in text
    run(output, *words)
    for row in ledger(output).values():
        assert row["status"] == "done"
        assert calls(output / row["name"]).count("begin") == (1 if row["env_id"] == "fine-0" else 2)
        check_steps(output / row["name"])


def test_a_slurm_array_outlives_its_launcher(output):
    """sbatch and its like are played by a few lines of shell; the array's jobs are real processes."""
    tools, jobs = output.with_name("tools"), output.with_name("jobs")
    tools.mkdir()
    jobs.mkdir()
    (tools / "srun").write_text("#!/bin/sh\n")
    (tools / "scancel").write_text("#!/bin/sh\n")
    (tools / "sbatch").write_text(
        f"""#!/bin/bash
echo submitted >>{jobs}/log
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
for i in $(seq 0 "${{last:-0}}"); do
    touch {jobs}/7_$i
    export SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$i SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0
    export SUBMITIT_EXECUTOR=slurm SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=here
    (setsid {sys.executable} -u -m submitit.core._submit {output}/slurm; rm {jobs}/7_$i) >>{jobs}/out 2>&1 </dev/null &
done
echo Submitted batch job 7
"""
    )
    (tools / "sacct").write_text(
        f"""#!/bin/bash
echo "JobID|State|NodeList"
for i in 0 1 2; do [ -e {jobs}/7_$i ] && echo "7_$i|RUNNING|here" || echo "7_$i|COMPLETED|here"; done
"""
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    words = ("--env-ids", "fine-0", "--num-seeds", "3", "--workers", "3", "--slurm", "--", "--delay", "0.4")
    launcher = launch(output, *words, env=environment)
    wait_for(lambda: len(list(output.glob("*/metrics.jsonl"))) == 3)
    assert {row["job"] for row in ledger(output).values()} == {"7_0", "7_1", "7_2"}
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    run(output, *words, env=environment)
    assert (jobs / "log").read_text() == "submitted\n"
    assert [calls(output / name) for name in ledger(output)] == [["begin", "end"]] * 3


@pytest.mark.slow
def test_ray_loses_a_node_and_finishes_every_run_once(output, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        nodes = [cluster.add_node(wait=False, **node) for _ in range(2)]
        cluster.wait_for_nodes()
        words = ("--env-ids", "fine-0", "--num-seeds", "5", "--threads", "1", "--ray-address", cluster.address)
        launcher = launch(output, *words, "--", "--delay", "0.2")
        wait_for(lambda: len(list(output.glob("*/metrics.jsonl"))) == 3, seconds=40)
        cluster.remove_node(nodes[0], allow_graceful=False)
        text, _ = launcher.communicate(timeout=60)
    finally:
        cluster.shutdown()
    assert launcher.returncode == 0, text
    assert [row["status"] for row in ledger(output).values()] == ["done"] * 5
    for name in ledger(output):
        assert calls(output / name).count("end") == 1  # a second beginning may have asked how the first one ended
        check_steps(output / name)
