"""The README's commands, as a newcomer runs them: from a clean clone, with a small budget."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, rows

from benchmark import report

README = (ROOT / "README.md").read_text()
SMALL = ["--total-timesteps", "8192", "--eval-episodes", "2", "--num-steps", "128", "--num-minibatches", "8"]
TESTED = {
    "make train": "test_make_train_and_the_commands_that_follow_it",
    "make test": "what runs this test",
    "python algorithms/ppo.py --env-id LunarLander-v3 --seed 3": "test_make_train_and_the_commands_that_follow_it",
    "python algorithms/ppo.py --run-dir runs/... --evaluate --capture-video": "the same",
    "python algorithms/ppo.py --run-dir runs/... --resume": "the same",
    "uv run algorithms/ppo.py --env-id CartPole-v1": "test_a_script_alone_in_a_folder_runs_with_uv",
    "python benchmark/run.py --suite smoke --workers 2": "test_the_smoke_suite_and_its_report",
    "python benchmark/report.py runs/smoke": "the same",
    'python benchmark/run.py --command "python algorithms/ppo.py" --env-ids CartPole-v1 LunarLander-v3 --num-seeds 5 '
    "--workers 2": "test_run.py",
    "python benchmark/run.py --suite classic --workers 2": "test_run.py: its runs begin",
    "python benchmark/run.py --suite multiagent --num-seeds 1 --workers 2": "test_run.py: its runs begin",
    "python algorithms/maddpg.py --run-dir runs/... --evaluate --opponent-dir runs/... "
    "--eval-episodes 1000": "test_maddpg.py",
    "python benchmark/throughput.py": "test_throughput.py",
    "pip install torch --index-url https://download.pytorch.org/whl/cpu": "needs another index",
    "pip install -r requirements.txt": "what make does",
}


def shell(command, cwd, **environ):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # uv is installed beside this python
    return subprocess.run(command, cwd=cwd, env=os.environ | {"PATH": path} | environ, capture_output=True, text=True)


def test_every_command_of_the_readme_is_tested():
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    commands = {line.split("  #")[0].strip() for block in blocks for line in block.splitlines()}
    assert commands - {""} == set(TESTED)


def test_flags_in_the_readme_exist():
    for line in README.splitlines():
        line = line.split("  #")[0]
        if line.startswith(("python algorithms/ppo.py", "| MuJoCo", "| Atari", "| A2C")):
            flags = re.findall(r"--[a-z][a-z0-9-]+", line)
            text = (ROOT / "algorithms" / "ppo.py").read_text()
            for flag in flags:
                assert f"    {flag[2:].removeprefix('no-').replace('-', '_')}: " in text, flag


def test_links_in_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", README):
        target = "".join(target)
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_table_of_results_is_what_the_kept_runs_reached():
    """Each row is an experiment whose seeds are kept, five if it doesn't say otherwise, and each of these has a row."""
    row = r"^\| (\w+) \| (\S+?)(,? .*?)\| ([\d.]+)([kM]).*? \| (.*?) \| (\S+) \|.*\|$"
    shown = defaultdict(list)
    for script, env_id, notes, steps, unit, result, worst in re.findall(row, README, re.MULTILINE):
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", result.split(";")[0])]
        env_id = env_id if re.search(r"[-_]v\d", env_id) else "preferences"
        seeds = next((n for n, words in enumerate(("one seed", "two seeds"), 1) if words in notes), 5)
        shown[script, env_id, float(steps) * {"k": 1e3, "M": 1e6}[unit], seeds].append([float(worst), *numbers[:3]])
    kept = defaultdict(list)
    for e in report.sort_out(report.find_runs(str(ROOT / "benchmark" / "results" / "returns" / "*.json"), ""), ()):
        assert [run.seed for run in e.done] == list(range(1, len(e.done) + 1)), (e.label, e.env_id)
        numbers = [e.scores.min(), e.scores.mean(), *(report.interval(np.mean, e.scores) or ())]
        kept[e.group, e.env_id.split(",")[0], e.done[0].curve[-1, 0], len(e.done)].append(numbers)
    assert shown.keys() == kept.keys()
    for key, experiments in kept.items():
        for row, experiment in zip(sorted(shown[key]), sorted(experiments), strict=True):
            for number, exact in zip(row, experiment, strict=False):  # not all rows show an interval
                digits = len(str(number).partition(".")[2]) if number % 1 else 0
                assert abs(number - exact) <= 0.501 * 10**-digits, (key, row, experiment)


def test_the_table_of_cross_play_is_what_was_kept():
    kept = json.loads((ROOT / "benchmark" / "results" / "cross_play.json").read_text())["rows"]
    assert {row["episodes"] for row in kept} == {1000}
    kept = {(row["environment"], row["adversaries"], row["others"]): row for row in kept}
    number = r"(-?[\d.]+)"
    cells = rf" {number} \({number}\) \| {number} \({number}\) \| {number} % \({number}\) \| {number} % \({number}\) "
    for adversaries in "maddpg", "ddpg":
        shown = re.search(rf"^\| adversaries of {adversaries.upper()} \|{cells}\|$", README, re.MULTILINE)
        exact = []
        for env_id, name, unit in ("simple_tag_v3", "touches", 1), ("simple_adversary_v3", "agent_success", 100):
            for others in "maddpg", "ddpg":
                row = kept[env_id, adversaries, others]
                exact += [row[name] * unit, row["episodic_return/agent_0"]]
        assert [float(number) for number in shown.groups()] == pytest.approx(exact, abs=0.0501)


def test_what_is_said_of_teams_by_hand_is_what_was_kept():
    kept = json.loads((ROOT / "benchmark" / "results" / "by_hand.json").read_text())["rows"]
    text = " ".join(re.search(r"^Teams that follow a rule.*?\n\n", README, re.MULTILINE | re.DOTALL)[0].split())
    shown = [float(number) for number in re.findall(r"-\d+\.\d", text)]
    by_hand = {(row["environment"], row["continuous_actions"], row["team"]): row["episodic_return"] for row in kept}
    spread, talk, names = "simple_spread_v3", "simple_speaker_listener_v4", ("perfect messages", "random actions")
    talks = [(talk, False), (talk, True), ("simple_reference_v3", False)]
    rows = [(spread, False, "the best assignment"), (spread, False, "random actions")]
    rows += [(*task, name) for name in names for task in talks]
    assert shown == pytest.approx([by_hand[row] for row in rows], abs=0.0501)
    shares = [100 * row["agent_success"] for row in kept if "push until" in row["team"]]
    assert f"end there in {min(shares):.0f} to {max(shares):.0f} % of {kept[-1]['episodes']} episodes" in " ".join(
        README.split()
    )
    assert kept[-1]["agent_success"] == 1


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clean clone with everything that is tracked as it is in this working tree."""
    folder = tmp_path_factory.mktemp("newcomer") / "plainrl"
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    for name in subprocess.run(["git", "ls-files", "-m"], cwd=ROOT, capture_output=True, text=True).stdout.split():
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_make_train_and_the_commands_that_follow_it(clone):
    result = shell(["make", "train", f"ARGS={' '.join(SMALL)}"], clone)
    assert result.returncode == 0, result.stdout + result.stderr
    (run_dir,) = (clone / "runs").iterdir()
    assert rows(run_dir)[-1]["global_step"] == 8192
    assert f"--run-dir runs/{run_dir.name} --evaluate --capture-video" in result.stdout
    python = clone / ".venv" / "bin" / "python"
    script = [python, "algorithms/ppo.py"]
    watched = shell([*script, "--run-dir", run_dir, "--evaluate", "--capture-video", "--eval-episodes", "1"], clone)
    assert watched.returncode == 0, watched.stderr
    assert list((run_dir / "videos").glob("*.mp4"))
    assert shell([*script, "--run-dir", run_dir, "--resume"], clone).returncode == 0
    assert shell([*script, "--env-id", "LunarLander-v3", "--seed", "3", *SMALL], clone).returncode == 0
    assert len(list((clone / "runs").iterdir())) == 2
    untracked = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard"], cwd=clone, capture_output=True, text=True
    )
    assert untracked.stdout == "", "a run leaves no clutter in the repository"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_script_alone_in_a_folder_runs_with_uv(tmp_path):
    shutil.copy(ROOT / "algorithms" / "ppo.py", tmp_path)
    result = shell(["uv", "run", "ppo.py", "--env-id", "CartPole-v1", *SMALL], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert rows(run_dir)[-1]["global_step"] == 8192


@pytest.mark.slow
def test_the_smoke_suite_and_its_report(tmp_path):
    output = tmp_path / "runs" / "smoke"
    run = [sys.executable, ROOT / "benchmark" / "run.py", "--suite", "smoke", "--workers", "2", "--output", output]
    result = shell([*run, "--probe-seconds", "0"], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    result = shell([sys.executable, ROOT / "benchmark" / "report.py", output], tmp_path)
    assert "CartPole-v1" in result.stdout
    assert list((output / "report").glob("*.png"))


def test_make_help_lists_every_target():
    result = shell(["make"], ROOT)
    assert result.returncode == 0
    for target in "help", "train", "test", "lint", "format", "benchmark":
        assert f"\n{target} " in "\n" + result.stdout
