"""What the tests share: running a script as a user would, and reading what it left."""

import atexit
import functools
import gc
import importlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from facts import FACTS

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "algorithms").glob("*.py"))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"  # what isn't here is nowhere: no test waits for a network
os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # for environments that the tests register
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


def call(script: str | Path, *flags: object, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess:
    """Runs a script to its end, in an interpreter as a user starts it: call("ppo", "--seed", 2)."""
    path = script if isinstance(script, Path) else ROOT / "algorithms" / f"{script}.py"
    command = [sys.executable, str(path), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, env=os.environ | environ, capture_output=True, text=True, timeout=280)


def tiny(script: str, *flags: object) -> list[str]:
    """The flags of a script's run of seconds, and others: the last of equal flags counts."""
    return [*FACTS[script].tiny, *map(str, flags)]


# Below the ruled line these have the text of td3.py and of dpo.py: test_consistency.py sees to that
COPIES = re.compile(
    r"\[(sac|reinforce|alphazero|muzero|iql|cql|decision_transformer|reward_model|sft|grpo)\b|\[ppo-box"
)
EACH_ITS_OWN = "killed_and_resumed", "same_seed", "changes_something"  # what depends on the text above it as well
COMMON_FLAGS = re.compile(
    r"-(seed|total_timesteps|eval_\w+|checkpoint_frequency|num_envs|capture_video)-"
    r"|\[(reward_model|sft|grpo)-(learning_rate|warmup|batch_size|max_\w+|weight_decay|lora_rank|dataset_split)-"
    r"|\[(her|sac)-(policy_lr|q_lr|gamma|tau|buffer_size|batch_size|learning_starts|utd|num_critics)-"
)


OF_ALL = re.compile("help_explains|keeps_its_other_arguments|train_returns_its_last")  # of the shared text alone
# What takes minutes, and where another test of the same code stays in `make test-slow` (its name in the comment)
LONGEST = re.compile(
    "the_maker_makes_the_same_bits|peers_that_are_solved|the_model_alone_has_the_head|a_tiny_run_end_to_end"
    "|the_smoke_suite_and_its_report|make_rlhf_ends"  # the_commands_of_the_results, replies_of_the_reference
    r"|the_default_run_comes_within|pendulum_is_learned\[sac|test_reinforce.py::test_learns_(cartpole|a_point)"
    r"|test_dpo.py::test_two_processes_learn"  # sft, grpo
    r"|commands_of_the_guide\[(dqn|dpo)|printed_commands\S+\[(maddpg|q_learning)|every_metric_that_a_run_logs"
    r"|test_contract.py::test_killed_and_resumed\S+\[(q_learning|reinforce|td3|her|sft|grpo|ppo_rlhf|reward_model)-"
    # for these, tests of the same name beside each script's
    r"|watching_a_run\S+\[(maddpg|her|td3|dpo)|same_seed_same_bits\S+\[(q|r|td3|sac|her|sft|grpo|dqn|ppo_rlhf)"
    r"|(made_longer|full_disk|terminal_shows|notebooks_interrupt|beside_resume)\S*\[(maddpg|her)"  # ppo, dpo
    r"|kinds_of_problems\[python algorithms/(sft|ppo).py"  # the_readme_from_top_to_bottom
    r"|(module_in_the_current|break_of_the_environment)\S+\[(her|maddpg|dqn)"  # ppo
)


def pytest_collection_modifyitems(items):
    """Marks slow tests of what another script's test covers: `make test-all` runs them, `make test-slow` does not."""
    last = {}  # of the runs of a script that are killed and resumed: one stays
    for item in items:
        if item.get_closest_marker("slow") and LONGEST.search(item.nodeid):
            item.add_marker("again")
        if item.nodeid.startswith("tests/test_contract.py::test_killed_and_resumed"):
            if (script := item.callspec.params["script"]) in last:
                last[script].add_marker("again")
            last[script] = item
        if "commands_of_the_guide" in item.name and not re.search(r"\[(ppo|dqn|dpo)\.py", item.name):
            item.add_marker("again")  # a quick test reads the flags of all
        if item.path.stem == "test_contract" and OF_ALL.search(item.name) and COPIES.search(item.name):
            item.add_marker("slow")
        if item.get_closest_marker("slow") and item.path.stem in ("test_contract", "test_faults"):
            copied = COPIES.search(item.name) and not any(name in item.name for name in EACH_ITS_OWN)
            copied = copied or ("[td3-box" in item.name and not re.search("arrays|replay", item.name))  # as dqn's
            copied = copied or ("DiceEnd" in item.name and re.search(r"\[(her|maddpg)-", item.name))
            if copied or ("changes_something" in item.name and COMMON_FLAGS.search(item.name)):
                item.add_marker("again")


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs a script's command line inside this process: cli("ppo", "--seed", 2) -> (exit code, stdout, stderr)."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(script: str, *flags: object) -> tuple[int, str, str]:
        module = importlib.import_module(f"algorithms.{script}")
        capsys.readouterr()
        gc.freeze()  # so that the collection after the run need not search a million objects of PyTorch
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [f"algorithms/{script}.py", *map(str, flags)])
            patch.setattr(sys, "path", [*sys.path])
            patch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
            if hasattr(module.Run, "stop_signal"):
                patch.setattr(module.Run, "stop_signal", 0)
            try:
                module.main()
                code = 0
            except SystemExit as end:
                code = end.code
            finally:  # also after what is no business of main: an error in a user's environment
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        # Where a run locks its folder, the lock lives as long as the run
        gc.collect()
        gc.unfreeze()
        return code or 0, *capsys.readouterr()

    return run


# Of these, two are imported late: with the first optimizer, with the first model
SLOW_IMPORTS = ("gymnasium", "torch._dynamo", "transformers.models.gpt2.modeling_gpt2", "tyro")


def start(script: str, *flags: object) -> "Forked":
    """Has the fork server start a script and does not wait for it; most of a short run would be its imports."""
    path = ROOT / "algorithms" / f"{script}.py"
    imported = re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
    server = fork_server(*(module for module in SLOW_IMPORTS if module.split(".")[0] in imported))
    return Forked(server, path, *flags)


@functools.cache
def fork_server(*modules: str) -> subprocess.Popen:
    command = [sys.executable, str(Path(__file__).with_name("fork_server.py")), *modules]
    server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    atexit.register(server.communicate)  # closes its input, at which it ends
    return server


class Forked:
    """A script that the fork server runs, with that part of subprocess.Popen which the tests use."""

    def __init__(self, server: subprocess.Popen, path: Path, *flags: object):
        self.server, self.returncode = server, None
        self.stdout, self.stderr = tempfile.NamedTemporaryFile("r"), tempfile.NamedTemporaryFile("r")
        order = {
            "argv": [str(path), *map(str, flags)],
            "environ": dict(os.environ),
            "stdout": self.stdout.name,
            "stderr": self.stderr.name,
        }
        server.stdin.write(json.dumps(order).encode() + b"\n")
        self.pid = int(server.stdout.readline())
        RUNNING.append(self)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.server.stdout], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.pid, timeout)
            self.returncode = os.waitstatus_to_exitcode(int(self.server.stdout.readline()))
        return self.returncode

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has just ended
            if self.poll() is None:
                os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read()


RUNNING: list[Forked] = []


def rows(run_dir: Path) -> list[dict]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def timeless(run_dir: Path) -> list[dict]:
    """The rows without what the clock says."""
    return [{k: v for k, v in row.items() if k not in ("time", "charts/SPS")} for row in rows(run_dir)]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Whatever a test forgets to place lands here."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def leave_nothing_running():
    """The server runs one script at a time: one that a failed test has left ends here."""
    yield
    while RUNNING:
        RUNNING[-1].send_signal(signal.SIGKILL)
        RUNNING.pop().wait()
