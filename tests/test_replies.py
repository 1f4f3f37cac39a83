"""replies.py with models whose replies are known."""

import re
import shutil

import pytest
from conftest import ROOT, call

SCRIPT, REVIEWS = ROOT / "benchmark" / "replies.py", ROOT / "benchmark" / "reviews"


@pytest.mark.slow
def test_replies_of_the_reference_and_of_a_copy(tmp_path):
    """The same model writes the same, at no distance from itself; its mean reward is -0.61, its deviation 1.6."""
    shutil.copytree(REVIEWS / "model", tmp_path / "again" / "model")
    result = call(SCRIPT, REVIEWS, tmp_path / "again")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    prompts = [i for i, line in enumerate(lines) if line.startswith("review the ")]
    assert len(prompts) == 3
    for i in prompts:
        first, second = (re.fullmatch(r"    (\w+) +(-?\d\.\d)  (.*)", line).groups() for line in lines[i + 1 : i + 3])
        assert (first[0], second[0]) == ("reviews", "again")
        assert first[1:] == second[1:]
    found = [re.fullmatch(r" +\w+ +(\S+)  KL divergence +(\S+), (\d+)% .*", line).groups() for line in lines[-2:]]
    assert found[0] == found[1]
    assert float(found[0][0]) == pytest.approx(-0.61, abs=4 * 1.6 / 512**0.5)
    assert found[0][1] == "0.00"
    assert 95 < int(found[0][2]) <= 100


@pytest.mark.slow
def test_what_is_not_finished_is_said_in_one_line(tmp_path):
    result = call(SCRIPT, REVIEWS, tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {tmp_path} holds no model/, which a finished run has\n"
