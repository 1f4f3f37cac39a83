"""The three READMEs: their commands and programs run, their links lead somewhere, their numbers are the kept ones."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, SCRIPTS, rows, start

from benchmark import report

PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "algorithms/README.md", "benchmark/README.md")}
README, GUIDE, BENCHMARK = PAGES.values()
SMALL = {  # flags of a run of seconds, for the scripts that have them
    "total_timesteps": 800, "eval_episodes": 1, "eval_max_steps": 100, "num_steps": 32, "num_minibatches": 2,
    "learning_starts": 64, "num_pairs": 200, "eval_pairs": 8, "eval_replies": 8, "eval_positions": 8,
}  # fmt: skip
ELSEWHERE = {  # commands that are not run here as they stand, and what is in their place
    "make train": "test_make_train_and_the_commands_that_follow_it",
    "make train TORCH=cpu": "test_without_cuda",
    "source .venv/bin/activate": "before every command here",
    "uv run algorithms/ppo.py": "test_a_script_alone_in_a_folder_runs_with_uv",
    "make install": "what make test does",
    "wandb leet runs/tracked/wandb": "needs a terminal: test_wandb_shows_a_run",
    "wandb sync runs/tracked/wandb/latest-run": "needs an account",
    "wandb sweep sweep.yaml": "needs an account: test_the_sweep_sends_flags_that_exist",
    "wandb agent ENTITY/PROJECT/SWEEP": "the same",
    "python benchmark/run.py --suite classic --workers 2": "test_run.py: its runs begin",
    "python benchmark/run.py --suite mujoco --workers 2": "the same",
    "python benchmark/run.py --suite multiagent --workers 2": "the same",
    "python benchmark/run.py --suite multiagent --start-seed 1 --num-seeds 1 --workers 2": "the same",
    "python benchmark/run.py --suite preference --workers 2": "the same",
    "python benchmark/run.py --suite games --workers 2": "the same",
    "python benchmark/report.py runs/games": "test_report.py",
    "python benchmark/run.py --suite atari --workers 1": "the same",
    "python benchmark/run.py --suite frontier --workers 2": "the same",
    "python benchmark/report.py runs/frontier": "test_report.py",
    "python benchmark/run.py --suite offline --workers 2": "test_run.py: its runs begin",
    "python benchmark/report.py runs/offline": "test_report.py",
    "python benchmark/peer.py --algorithm cql --reward-scale 1 --cql-alpha 0.005 "
    "--total-timesteps 5000": "test_peer.py",
    "python benchmark/run.py --suite offline_mujoco --workers 2": "test_run.py: its runs begin",
    "python benchmark/report.py runs/offline_mujoco": "test_report.py",
    "python benchmark/run.py --suite offline_size --workers 2": "test_run.py: its runs begin",
    "python benchmark/report.py runs/offline_size": "test_report.py",
    "make rlhf": "test_make_rlhf_ends_with_replies_and_goes_on",
    "python benchmark/run.py --suite smoke --workers 2": "test_the_smoke_suite_and_its_report",
    "python benchmark/report.py runs/smoke": "the same",
    'python benchmark/run.py --command "python algorithms/ppo.py" --env-ids LunarLander-v3 --num-seeds 5 --workers 5 '
    "--slurm --slurm-parameters partition cpu account rl": "test_run.py, without a cluster",
    'python benchmark/run.py --command "python algorithms/ppo.py" --env-ids LunarLander-v3 --num-seeds 5 '
    "--ray-address auto": "the same",
    "python benchmark/report.py --compare runs/one runs/other": "test_report.py",
    "python algorithms/maddpg.py --run-dir runs/ONE --evaluate --opponent-dir runs/OTHER "
    "--eval-episodes 1000": "test_maddpg.py",
    "python benchmark/throughput.py --steps 30000 --output runs/throughput": "test_throughput.py",
    "DEATHS=20 python -m pytest tests/test_contract.py -k killed_and_resumed": "test_contract.py",
    "python tests/mutants.py --scripts ppo --sample 50": "test_mutants.py",
}
SUITE = "python benchmark/run.py --suite mine.toml --workers 2 --output runs/mine"  # the page's own


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Those in its shell blocks, without comments."""
    lines = [line.split("  #")[0].strip() for block in blocks(text, "sh") for line in block.splitlines()]
    return [line for line in lines if line]


def inline_commands(text: str) -> list[str]:
    return re.findall(r"`(python [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def sections(page: str) -> dict[str, str]:
    """By heading of the second level."""
    parts = re.split(r"^## (.*)\n", re.sub(r"^# .*\n", "", page), flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def script_and_flags(command: str) -> tuple[str, list[str]] | None:
    """Of a command that runs one of the scripts."""
    found = re.search(r"^(?:\w+=\w+ )?python algorithms/(\w+)\.py(.*)", command)
    return (found[1], shlex.split(found[2])) if found else None


def small_flags(script: str) -> str:
    text = (ROOT / "algorithms" / f"{script}.py").read_text()
    small = SMALL | ({"total_timesteps": 512} if script in ("ppo_rlhf", "grpo") else {})  # a whole batch
    flags = [(name, value) for name, value in small.items() if f"\n    {name}: " in text]
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags)


def made_small(command: str) -> str:
    """The same command, for seconds: of equal flags the last one counts."""
    if command == SUITE:
        return f"{command} --num-seeds 3 --probe-seconds 0"
    if command.startswith("python benchmark/run.py"):
        command = re.sub(r"--num-seeds \d+", "--num-seeds 3", command) + " --probe-seconds 0"
        command = re.sub(r"(--env-ids \S+)( \w\S+)*", r"\1", command)  # the first of them
        script = {"mine": "dqn"}.get(name := re.search(r"python (?:algorithms/)?(\w+)\.py", command)[1], name)
        return re.sub(r'(--command "[^"]*)"', rf'\1 {small_flags(script)}"', command)
    if not (found := script_and_flags(command)):
        return command
    if "--evaluate" in command:
        return f"{command} --eval-episodes 1"
    return f"{command} --total-timesteps 1600" if "--resume" in command else f"{command} {small_flags(found[0])}"


# ---- What is said


def test_every_command_is_run_here_or_elsewhere():
    """A command that is neither is a mistake of the page or of the table; so is one in the table that no page has."""
    found = {command for page in PAGES.values() for command in commands(page)}
    assert not ELSEWHERE.keys() - found
    runs = (
        "python algorithms/",
        "python benchmark/run.py --command",
        SUITE,
        "python benchmark/report.py",
        "python benchmark/record.py",
        "WANDB_MODE=offline",
    )
    others = {command for command in found - ELSEWHERE.keys() if not command.startswith(runs)}
    assert {shlex.split(command)[0] for command in others} <= {"cp", "tail", "ls"}


def test_all_commands_of_scripts_are_understood(monkeypatch):
    for name, page in PAGES.items():
        for command in (*commands(page), *inline_commands(page)):
            if (found := script_and_flags(command)) and not re.search("--evaluate|--resume", command):  # of no run
                module = importlib.import_module(f"algorithms.{found[0]}")
                monkeypatch.setattr(sys, "argv", [f"algorithms/{found[0]}.py", *found[1]])
                assert module.parse_args(), f"{name}: {command}"


def slug(heading: str) -> str:
    """How GitHub names a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_links_lead_somewhere():
    anchors = {name: {slug(h) for h in re.findall(r"^#+ (.*)", page, re.MULTILINE)} for name, page in PAGES.items()}
    for name, page in PAGES.items():
        for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", re.sub(r"```.*?```", "", page, flags=re.DOTALL)):
            path, _, anchor = "".join(link).partition("#")
            if path.startswith("http"):
                continue
            target = (ROOT / name).parent / path if path else ROOT / name
            assert target.exists(), f"{name}: {path}"
            if anchor and not re.fullmatch(r"L\d+", anchor):
                assert anchor in anchors[str(target.resolve().relative_to(ROOT))], f"{name}: #{anchor}"


def test_the_readme_is_short_enough_to_be_read():
    """About a thousand words, without code and marks."""
    text = re.sub(r"```.*?```|<[^>]*>|\]\([^)]*\)", " ", README, flags=re.DOTALL)
    assert len(re.findall(r"\w[\w'.,%-]*", text)) < 1150


def test_the_lines_of_the_scripts_are_counted():
    """Down to the ruled line, to within ten: a small change of a script is no change of the page."""
    shown = re.findall(r"^\| \[(\w+)\]\(algorithms/\w+\.py\) \|.*\| (\d+) \|.*\|$", README, re.MULTILINE)
    own = {path.stem: path.read_text().split("# ---- Below this line")[0].count("\n") for path in SCRIPTS}
    assert {name for name, _ in shown} == own.keys()
    for name, lines in shown:
        assert abs(int(lines) - own[name]) <= 10, f"{name} has {own[name]} lines"


def test_every_script_is_chosen_for_something():
    table = sections(README)["Which algorithm?"]
    assert {path.name for path in SCRIPTS} <= set(re.findall(r"`(\w+\.py)`", table))


def test_without_cuda():
    """TORCH=cpu reaches uv and pip by variables that they read."""
    for choice, expected in ("cpu", ["cpu", "https://download.pytorch.org/whl/cpu"]), ("", ["", ""]):
        program = f"include {ROOT}/Makefile\nshow:\n\t@echo [$$UV_TORCH_BACKEND] [$$PIP_EXTRA_INDEX_URL]\n"
        command = ["make", "-s", "-f", "-", "show", f"TORCH={choice}"]
        environ = {k: v for k, v in os.environ.items() if k not in ("UV_TORCH_BACKEND", "PIP_EXTRA_INDEX_URL")}
        shown = subprocess.run(command, input=program, env=environ, capture_output=True, text=True)
        assert re.findall(r"\[(.*?)\]", shown.stdout) == expected, shown.stderr


def test_the_sweep_sends_flags_that_exist(monkeypatch):
    """As W&B's agent makes a command out of the file, with each value of each parameter."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    (text,) = blocks(GUIDE, "yaml")
    sweep = yaml.safe_load(text)
    assert sweep["command"][-1] == "${args_no_boolean_flags}"
    module = importlib.import_module(sweep["program"].removesuffix(".py").replace("/", "."))
    for number in range(3):
        given = {}
        for name, choice in sweep["parameters"].items():
            values = choice.get("values") or [value for key, value in choice.items() if key in ("value", "min", "max")]
            given[name] = {"value": values[number % len(values)]}
        flags = create_sweep_command_args({"args": given})["args_no_boolean_flags"]
        monkeypatch.setattr(sys, "argv", [sweep["program"], *flags])
        args = vars(module.parse_args())
        for name, choice in given.items():
            wanted = not choice["value"] if name.startswith("no_") else choice["value"]
            assert args[name.removeprefix("no_")] == wanted
    assert sweep["metric"]["name"] == "eval/episodic_return"


# ---- Numbers


def experiments_kept():
    pattern = str(ROOT / "benchmark" / "results" / "returns" / "*.json")
    for e in report.sort_out(report.find_runs(pattern, ""), ()):
        numbers = [e.scores.min(), e.scores.mean(), *(report.interval(np.mean, e.scores) or ())]
        yield (e.group, e.env_id.split(",")[0], e.done[0].curve[-1, 0], report.seeds_of(e)), numbers


def experiments_shown(page: str):
    row = r"^\| (\w+) \| (\S+?),? .*?\| ([\d.]+)([kM]).*? \| (\d[^|]*) \| (.*?) \| (\S+) \|.*\|$"
    page = page.partition("<!-- results:")[2].partition("<!-- end of results -->")[0]
    for script, env_id, steps, unit, seeds, result, worst in re.findall(row, page, re.MULTILINE):
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", result.split(";")[0])]
        env_id = env_id if re.search(r"[-_]v\d", env_id) else "preferences"
        yield (script, env_id, float(steps) * {"k": 1e3, "M": 1e6}[unit], seeds), [float(worst), *numbers[:3]]


def agree(shown: list[float], exact: list[float]) -> bool:
    """To the digits that are shown. Not all rows show an interval."""
    digits = [len(str(number).partition(".")[2]) if number % 1 else 0 for number in shown]
    return all(abs(a - b) <= 0.501 * 10**-n for a, b, n in zip(shown, exact, digits, strict=False))


def test_the_table_of_results_is_what_the_kept_runs_reached():
    """Each row is an experiment that is kept, of the seeds that it names, and each of these has a row."""
    shown, kept = defaultdict(list), defaultdict(list)
    for key, numbers in experiments_shown(BENCHMARK):
        shown[key].append(numbers)
    for key, numbers in experiments_kept():
        kept[key].append(numbers)
    assert shown.keys() == kept.keys()
    for key in kept:
        pairs = zip(sorted(shown[key]), sorted(kept[key]), strict=True)
        assert all(agree(row, experiment) for row, experiment in pairs), (key, shown[key], kept[key])


def test_the_short_table_has_a_row_of_every_script():
    kept = defaultdict(list)
    for key, numbers in experiments_kept():
        kept[key].append(numbers)
    shown = dict(experiments_shown(README))
    assert sorted(script for script, *_ in shown) == sorted({script for script, *_ in kept})
    for key, row in shown.items():
        assert any(agree(row, experiment) for experiment in kept[key]), (key, row, kept[key])


def test_the_tables_of_results_can_be_made_anew():
    """They stand between marks that say which command makes them."""
    for page, length in (README, "short"), (BENCHMARK, "long"):
        begin = f"<!-- results: python benchmark/report.py 'benchmark/results/returns/*.json' --table {length} -->\n\n|"
        assert page.count(begin) == page.count("|\n\n<!-- end of results -->\n") == 1


@pytest.mark.parametrize(
    ("name", "table"), [("frontier", "frontier"), ("games", "long"), ("offline", "long"), ("offline_mujoco", "long")]
)
def test_the_tables_of_kept_experiments_are_what_report_prints(name, table):
    command = f"python benchmark/report.py benchmark/results/{name}.json --table {table}"
    marks = rf"<!-- {name}: {re.escape(command)} -->\n\n(.*?)\n\n<!-- end of {name} -->"
    words = [sys.executable, *command.split()[1:]]
    printed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(marks, BENCHMARK, re.DOTALL)[1] == printed.strip()


def test_the_table_of_cross_play_is_what_was_kept():
    kept = json.loads((ROOT / "benchmark" / "results" / "cross_play.json").read_text())["rows"]
    assert {row["episodes"] for row in kept} == {1000}
    kept = {(row["environment"], row["adversaries"], row["others"]): row for row in kept}
    number = r"(-?[\d.]+)"
    cells = rf" {number} \({number}\) \| {number} \({number}\) \| {number} % \({number}\) \| {number} % \({number}\) "
    for adversaries in "maddpg", "ddpg":
        shown = re.search(rf"^\| adversaries of {adversaries.upper()} \|{cells}\|$", BENCHMARK, re.MULTILINE)
        exact = []
        for env_id, name, unit in ("simple_tag_v3", "touches", 1), ("simple_adversary_v3", "agent_success", 100):
            for others in "maddpg", "ddpg":
                row = kept[env_id, adversaries, others]
                exact += [row[name] * unit, row["episodic_return/agent_0"]]
        assert [float(number) for number in shown.groups()] == pytest.approx(exact, abs=0.0501)


def test_what_is_said_of_teams_by_hand_is_what_was_kept():
    kept = json.loads((ROOT / "benchmark" / "results" / "by_hand.json").read_text())["rows"]
    text = " ".join(re.search(r"Teams that follow a rule.*?\n\n", BENCHMARK, re.DOTALL)[0].split())
    shown = [float(number) for number in re.findall(r"-\d+\.\d", text)]
    by_hand = {(row["environment"], row["continuous_actions"], row["team"]): row["episodic_return"] for row in kept}
    spread, talk, names = "simple_spread_v3", "simple_speaker_listener_v4", ("perfect messages", "random actions")
    talks = [(talk, False), (talk, True), ("simple_reference_v3", False)]
    rows = [(spread, False, "the best assignment"), (spread, False, "random actions")]
    rows += [(*task, name) for name in names for task in talks]
    assert shown == pytest.approx([by_hand[row] for row in rows], abs=0.0501)
    shares = [100 * row["agent_success"] for row in kept if "push until" in row["team"]]
    sentence = f"end there in {min(shares):.0f} to {max(shares):.0f} % of {kept[-1]['episodes']} episodes"
    assert sentence in " ".join(BENCHMARK.split())
    assert kept[-1]["agent_success"] == 1


# ---- What is run


def new_clone(folder: Path) -> Path:
    """A clean clone with everything that is tracked as it is in this working tree."""
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    for name in subprocess.run(["git", "ls-files", "-m"], cwd=ROOT, capture_output=True, text=True).stdout.split():
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def clone(tmp_path):
    return new_clone(tmp_path / "plainrl")


@pytest.fixture
def activated(clone):
    """The clone with this environment as its own: run(command) is a command in a shell that has activated it."""
    (clone / ".venv").symlink_to(Path(sys.executable).parent.parent)

    def run(command: str) -> str:
        line = f"source .venv/bin/activate && {command}"
        environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        result = subprocess.run(["bash", "-c", line], cwd=clone, env=environ, capture_output=True, text=True)
        assert result.returncode == 0, f"{line}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        return result.stdout

    run.folder = clone
    return run


def run_all(text: str, run) -> None:
    """The commands of a text in their order, as small runs."""
    for command in commands(text):
        if command not in ELSEWHERE:
            run(made_small(command))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readme_from_top_to_bottom(activated):
    """Commands in a shell, programs in one Python session, files where the page says."""
    programs = blocks(README, "python")
    (own_env,) = (program for program in programs if "(gym.Env)" in program)
    programs.remove(own_env)
    (activated.folder / "my_env.py").write_text(own_env)
    run_all(README, activated)
    exports = [program for program in programs if "onnx" in program]
    assert len(exports) == 1
    if find_spec("onnxscript") is None:
        programs.remove(*exports)
    checks = "assert action in range(4), action\nassert result['eval/episodic_return'] > 20, result\n"
    (activated.folder / "program.py").write_text("\n".join([*programs, checks]))
    activated("python program.py")
    assert list((activated.folder / "runs" / "lander" / "videos").glob("*.mp4"))
    assert rows(activated.folder / "runs" / "lander")[-1]["global_step"] == 1600, "the run was made longer"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_exported_agent_acts_as_the_agent_does(activated):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    activated(made_small("python algorithms/ppo.py --env-id LunarLander-v3 --run-dir runs/lander"))
    load, export = (program for program in blocks(README, "python") if "ppo.load" in program or "onnx" in program)
    check = """
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession("agent.onnx")
for obs in np.random.default_rng(1).normal(size=(20, 1, 8)).astype(np.float32):
    scores, value = session.run(None, {session.get_inputs()[0].name: obs})
    assert scores.argmax() == agent.act(obs[0])
"""
    (activated.folder / "program.py").write_text(load + export + check)
    activated("python program.py")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("heading", [heading for heading, text in sections(GUIDE).items() if commands(text)])
def test_the_commands_of_the_guide(heading, activated):
    run_all(sections(GUIDE)[heading], activated)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_of_the_results(activated):
    (suite,) = blocks(BENCHMARK, "toml")
    small = "num_steps = 32, num_minibatches = 2", "learning_starts = 64"
    for flags in small:
        suite = suite.replace("{ eval_episodes = 100", f"{{ eval_episodes = 1, {flags}", 1)
    (activated.folder / "mine.toml").write_text(suite.replace("50_000", "800"))
    run_all(BENCHMARK, activated)


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in inline_commands(README) if script_and_flags(c)])
def test_commands_for_kinds_of_problems(command, tmp_path):
    script, flags = script_and_flags(made_small(command))
    assert start(script, *flags, "--run-dir", tmp_path / "run").wait() == 0
    assert rows(tmp_path / "run")[-1]["global_step"] == int(flags[flags.index("--total-timesteps") + 1])


def shell(command, cwd, **environ):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # uv is installed beside this python
    return subprocess.run(command, cwd=cwd, env=os.environ | {"PATH": path} | environ, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_make_train_and_the_commands_that_follow_it(clone):
    small = small_flags("ppo")
    result = shell(["make", "train", f"ARGS={small}"], clone)
    assert result.returncode == 0, result.stdout + result.stderr
    (run_dir,) = (clone / "runs").iterdir()
    assert rows(run_dir)[-1]["global_step"] == 800
    printed = re.search(r"^    (.*--evaluate --capture-video)$", result.stdout, re.MULTILINE)[1]
    watched = shell(shlex.split(printed), clone)  # as printed: the environment need not be activated
    assert watched.returncode == 0, watched.stderr
    assert list((run_dir / "videos").glob("*.mp4"))
    untracked = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard"], cwd=clone, capture_output=True, text=True
    )
    assert untracked.stdout == "", "a run leaves no clutter in the repository"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_make_rlhf_ends_with_replies_and_goes_on(clone):
    """Each stage begins with what the one before it made; what is begun is resumed by the next call."""
    (clone / ".venv").symlink_to(Path(sys.executable).parent.parent)
    flags = "--total-timesteps 512 --eval-frequency 512 --device cpu"
    command = ["make", "-o", ".venv/scripts", "rlhf", "RLHF=runs/whole", f"ARGS={flags}"]
    result = shell(command, clone)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in "sft", "reward_model", "dpo", "ppo_rlhf", "grpo":
        assert rows(clone / "runs" / "whole" / name)[-1]["global_step"] == 512
    replies = result.stdout.split("replies.py")[-1]
    assert re.findall(r"^    (\w+) +-?\d\.\d  \w", replies, re.MULTILINE) == ["sft", "dpo", "ppo_rlhf", "grpo"] * 3
    assert "true reward, the mean of 512 replies" in replies
    shutil.rmtree(clone / "runs" / "whole" / "dpo")
    again = shell([*command, "-n"], clone).stdout
    stages = re.findall(
        r"algorithms/(\w+)\.py --run-dir runs/whole/\w+ (--resume|--model-name runs/whole/sft/model)?", again
    )
    assert dict(stages) == {
        "sft": "--resume", "reward_model": "--resume", "dpo": "--model-name runs/whole/sft/model",
        "ppo_rlhf": "--resume", "grpo": "--resume",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_script_alone_in_a_folder_runs_with_uv(tmp_path):
    shutil.copy(ROOT / "algorithms" / "ppo.py", tmp_path)
    result = shell(["uv", "run", "ppo.py", *small_flags("ppo").split()], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert rows(run_dir)[-1]["global_step"] == 800


@pytest.mark.slow
def test_the_smoke_suite_and_its_report(tmp_path):
    output = tmp_path / "runs" / "smoke"
    run = [sys.executable, ROOT / "benchmark" / "run.py", "--suite", "smoke", "--workers", "2", "--output", output]
    result = shell([*run, "--probe-seconds", "0"], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    result = shell([sys.executable, ROOT / "benchmark" / "report.py", output], tmp_path)
    assert "CartPole-v1" in result.stdout
    assert list((output / "report").glob("*.png"))


@pytest.mark.slow
def test_wandb_shows_a_run(activated):
    """In the folder that the guide names; the terminal's program has a subcommand that needs no terminal."""
    import wandb

    wandb.setup()  # as in a notebook: the command inherits W&B's service, which works in another folder
    (tracked,) = (command for command in commands(GUIDE) if command.startswith("WANDB_MODE=offline"))
    activated(made_small(tracked))
    for _ in range(60):  # W&B's own process writes the file, on a busy machine after the run has ended
        if list((activated.folder / "runs/tracked/wandb/latest-run").glob("*.wandb")):
            break
        time.sleep(0.5)
    assert "eval/episodic_return" in activated("wandb leet inspect --json runs/tracked/wandb/latest-run")


def test_make_help_lists_every_target():
    result = shell(["make"], ROOT)
    assert result.returncode == 0
    for target in "help", "train", "test", "lint", "format", "benchmark":
        assert f"\n{target} " in "\n" + result.stdout
