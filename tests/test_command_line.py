"""Mistakes in the flags of the tools of benchmark/: one line, and exit code 2."""

import pytest
from conftest import ROOT, call

MISTAKES = {
    "run.py --wokers 2": "--wokers",
    "report.py --tabel long": "--tabel",
    "record.py": "--output",
    "record.py --output a --steps many": "many",
    "by_hand.py --episodes few": "few",
    "throughput.py --repeats few": "few",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_in_the_flags_is_one_line(command, tmp_path):
    tool, *flags = command.split()
    ended = call(ROOT / "benchmark" / tool, *flags, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert MISTAKES[command] in ended.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("tool", sorted({command.split()[0] for command in MISTAKES}))
def test_help_says_what_the_tool_does(tool, tmp_path):
    ended = call(ROOT / "benchmark" / tool, "--help", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"benchmark/{tool}" in ended.stdout
