"""algorithms/README.md, the reader's guide: all that a script logs and computes is in it, and nothing else."""

import ast
import importlib
import re
import shlex
import sys
from fnmatch import fnmatchcase

import pytest
from conftest import ROOT, SCRIPTS, rows, start, tiny
from test_consistency import RULED_LINE_OF_TEXT

from benchmark import equations

GUIDE = (ROOT / "algorithms" / "README.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", GUIDE, re.MULTILINE | re.DOTALL))
KINDS = "losses", "charts", "eval", "rewards", "logps", "objective"
each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)


def metrics_explained(section: str) -> set[str]:
    """Names and patterns of names: all code in the first cells of the tables of metrics."""
    found = set()
    for table in re.findall(r"^\| (?:watch|metric) \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", SECTIONS[section], re.MULTILINE):
        for row in table.splitlines():
            name, _, healthy, otherwise = (cell.strip() for cell in row.strip("|").split("|"))
            assert name and healthy, row
            found |= set(re.findall(r"`([^`]+)`", name))
            assert otherwise or "one number" in row, f"what does it mean when it isn't healthy? {row}"
    return found


def metrics_in_source(path) -> set[str]:
    """Whole names, and patterns for those that are put together."""
    found, parts = set(), set()
    own, _, _ = path.read_text().partition(RULED_LINE_OF_TEXT)
    tree = ast.parse(own)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts |= {id(value) for value in node.values}
            pieces = [part.value if isinstance(part, ast.Constant) else "*" for part in node.values]
            found.add("".join(pieces))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            found.add(node.value)
    kinds = "|".join(KINDS)
    return {name for name in found if re.fullmatch(rf"({kinds})/[\w*/]+", name)}


def explained(metric: str, entries: set[str]) -> bool:
    return any(fnmatchcase(metric, entry) for entry in entries)


@each_script
def test_every_metric_in_a_script_is_explained_and_no_other(path):
    in_source, own = metrics_in_source(path), metrics_explained(path.name)
    entries = own | metrics_explained("What every script logs")
    whole = {name for name in in_source if "*" not in name}
    assert not {name for name in whole if not explained(name, entries)}, "in the script, not in the guide"
    if "losses/*" not in in_source:  # else names are put together, and only a run can show them
        known = {entry for entry in own for name in in_source if fnmatchcase(name, entry) or fnmatchcase(entry, name)}
        assert own <= known | {"loss"}, "in the guide, not in the script"


@pytest.mark.parametrize(
    "script",
    [pytest.param(p.stem, marks=[] if p.stem in ("ppo", "q_learning") else [pytest.mark.slow]) for p in SCRIPTS],
)
def test_every_metric_that_a_run_logs_is_explained(script, tmp_path):
    assert start(script, *tiny(script), "--run-dir", tmp_path / "run").wait() == 0
    logged = {name for row in rows(tmp_path / "run") for name in row} - {"global_step", "time"}
    entries = metrics_explained(f"{script}.py") | metrics_explained("What every script logs")
    assert {"charts/learning_rate"} < logged
    assert not {name for name in logged if not explained(name, entries)}
    if script == "ppo":
        assert metrics_explained("ppo.py") == {name for name in logged if name.startswith("losses/")}


def test_a_metric_without_an_entry_is_found(tmp_path):
    """The test above would see it, in each way in which scripts name their metrics."""
    script = tmp_path / "script.py"
    script.write_text('a = {"losses/new": 1, f"eval/{b}_more": 2}\nc["charts/other"] = 3\n"losses"\nf"losses/{d}"')
    assert metrics_in_source(script) == {"losses/new", "eval/*_more", "charts/other", "losses/*"}
    assert explained("losses/qf3_loss", {"losses/qf*_loss"})
    assert not explained("losses/new", metrics_explained("ppo.py"))


@each_script
def test_every_script_has_its_section(path):
    """The idea, the metrics, failures, flags and three exercises, with a command for each; and its hour."""
    section = SECTIONS[path.name]
    for part in "**The idea.**", "| watch | range | healthy |", "**Failures.**", "| flags |", "**Exercises.**":
        assert section.count(part) == 1, part
    assert len(re.search(r"\*\*The idea\.\*\*(.*?)\n\n", section, re.DOTALL)[1].split()) > 60
    exercises = section.split("**Exercises.**")[1]
    assert re.findall(r"^(\d)\. ", exercises, re.MULTILINE) == ["1", "2", "3"]
    assert exercises.count(f"\npython algorithms/{path.name} ") == 3
    order = re.findall(r"^\| \d+ \| \[(\w+\.py)\]", SECTIONS["A reading order"], re.MULTILINE)
    assert path.name in order
    assert len(order) == len(SCRIPTS)


@each_script
def test_flags_for_kinds_of_environments_are_understood(path, monkeypatch):
    module, taken = importlib.import_module(f"algorithms.{path.stem}"), 0
    section = SECTIONS[path.name]
    table = re.search(r"^\| kind of .*?\n\n", section, re.MULTILINE | re.DOTALL)[0]
    for flags in re.findall(r"`(--[^`]+)`", table):
        monkeypatch.setattr(sys, "argv", [f"algorithms/{path.name}", *shlex.split(flags)])
        if " " in flags or flags.startswith("--no-"):  # others are spoken of, without a value
            assert module.parse_args(), flags
            taken += 1
    assert taken
    names = {name.replace("_", "-") for name in vars(module.Args())}
    for flag in re.findall(r"`--([a-z][a-z0-9-]+)", section):
        assert flag.removeprefix("no-") in names, f"--{flag}"


def test_the_table_of_equations_is_up_to_date():
    assert equations.with_table(GUIDE) == GUIDE, "run: python benchmark/equations.py"


OPTIMUM = "what the algorithm aims at; benchmark/reviews/make.py computes it"
NOT_COMPUTED = {"dpo": {2: OPTIMUM}, "ppo_rlhf": {4: OPTIMUM}, "grpo": {4: OPTIMUM}}


@each_script
def test_every_equation_has_a_line(path):
    script = path.read_text()
    numbers = equations.equations(script.split('"""')[1])
    assert [*numbers] == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 2
    lines = script.splitlines()
    for number in numbers.keys() - NOT_COMPUTED.get(path.stem, {}).keys():
        found = equations.lines_of(script, number)
        assert found, f"[{number}] is computed nowhere"
        assert all(f"[{number}]" in lines[line - 1] for line in found)


def test_equations_are_read_as_they_stand():
    docstring = """Idea [9].

    [1] x = a + b  with  a = 1          Paper, Eq. 2
        y     = x^2                     Paper, Eq. 3; an aside
    [2] all         Q <- Q + 1

    The rest, where [1] comes again.
    """
    assert equations.equations(docstring) == {
        1: [("x = a + b with a = 1", "Paper, Eq. 2"), ("y = x^2", "Paper, Eq. 3; an aside")],
        2: [("all Q <- Q + 1", "")],
    }
    script = (
        '"""[1]"""\nclass Args:\n    a: int  # [1] not here\n\ndef f():\n    """Also [1]."""\n    return 1  # [1]\n'
    )
    script += "# see [1]\n# [2], [1]\n# ---- Below this line nothing learns\n# [1]\n"
    assert equations.lines_of(script, 1) == [7, 9]
    assert equations.lines_of(script.replace("# [", "# see ["), 1) == []
    assert equations.lines_of(script.replace("# [", "# see [").replace("Also [1]", "[1]"), 1) == [6]
