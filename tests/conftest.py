"""What the tests share: running a script as a user would, and reading what it left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "algorithms").glob("*.py"))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # for environments that the tests register
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


def call(script: str | Path, *flags: object, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess:
    """Runs a script to its end: call("ppo", "--seed", 2)."""
    path = script if isinstance(script, Path) else ROOT / "algorithms" / f"{script}.py"
    command = [sys.executable, str(path), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, env=os.environ | environ, capture_output=True, text=True, timeout=280)


def start(script: str, *flags: object) -> subprocess.Popen:
    """Starts a script and does not wait for it."""
    command = [sys.executable, str(ROOT / "algorithms" / f"{script}.py"), *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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
