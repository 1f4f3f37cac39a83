"""Breaks the scripts, one line at a time, and counts how many of the broken ones the tests notice.

    python tests/mutants.py --scripts ppo dqn --sample 50

A mutant is a script with one wrong sign, operator, comparison, index, constant, mask, detach, reduction or order of
arguments, or without one of its statements, somewhere between its flags and the ruled line. It is killed if one of the
tests with the script's name in theirs or in their file's fails, or if they take far longer than for the sound script.
The quickest tests come first. Survivors are printed: look at each one. Some are no mistakes (x / 1 for x * 1), the
others ask for a test.

Exit codes: 0 all mutants were tried, however many survived; 2 a mistake in what was asked.
"""

import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
RULED_LINE = "# ---- Below this line"
NOT_MUTATED = ("Args", "nature_cnn")  # settings, and sizes
HARMLESS = ("spawn_key", "strict", "validate_args", "fused")  # as good a stream; checks of what is right anyway; speed
OPERATORS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.Pow: "*", ast.FloorDiv: "*", ast.Mod: "//",
    ast.BitAnd: "|", ast.BitOr: "&", ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=",
    ast.NotEq: "==", ast.And: "or", ast.Or: "and", ast.MatMult: "*",
}  # fmt: skip
METHODS = {
    "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "argmax": "argmin", "mean": "sum",
    "sum": "mean", "any": "all", "all": "any", "no_grad": "enable_grad", "exp": "log", "log": "exp",
}  # fmt: skip
DROPPED = ("detach", "clamp", "clip", "copy", "clone", "square", "abs")  # x.clamp(...) becomes x


@dataclass
class Args:
    scripts: tuple[str, ...] = ()  # names without .py; none: all
    sample: int = 40  # mutants of each script, drawn at random
    seed: int = 1  # which ones
    output: Path | None = None  # a JSON file for the result


@dataclass
class Mutant:
    line: int
    before: str
    after: str
    source: str  # of the whole script


def mutants(source: str) -> Iterator[Mutant]:
    """All mutants of the lines between Args and the ruled line."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    text = source.encode()  # positions in the syntax tree count bytes
    end = next(number for number, line in enumerate(lines, 1) if line.startswith(RULED_LINE))

    def span(node: ast.AST) -> tuple[int, int]:
        low, high = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        return low, high

    def code(node: ast.AST) -> str:
        return text[slice(*span(node))].decode()

    def replace(node: ast.AST, new: str) -> Mutant:
        low, high = span(node)
        return Mutant(node.lineno, code(node), new, (text[:low] + new.encode() + text[high:]).decode())

    def between(node: ast.AST, left: ast.AST, right: ast.AST, operator: ast.AST) -> Iterator[Mutant]:
        """The operator that stands between two parts of a node."""
        if new := OPERATORS.get(type(operator)):
            old = text[span(left)[1] : span(right)[0]].decode()
            sign = old.strip(" ()\n").split()[0] if old.strip(" ()\n") else ""
            if sign and sign in old:
                head = text[span(node)[0] : span(left)[1]].decode()
                tail = text[span(right)[0] : span(node)[1]].decode()
                yield replace(node, head + old.replace(sign, new, 1) + tail)

    def visit(node: ast.AST) -> Iterator[Mutant]:
        match node:
            case ast.BinOp():
                yield from between(node, node.left, node.right, node.op)
            case ast.Compare(ops=[operator], comparators=[right]):
                yield from between(node, node.left, right, operator)
            case ast.BoolOp():
                yield from between(node, node.values[0], node.values[1], node.op)
            case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert()):
                yield replace(node, f"({code(node.operand)})")
            case ast.Constant(value=bool()):
                yield replace(node, str(not node.value))
            case ast.Constant(value=float()) if node.value:
                yield replace(node, f"({2 * node.value!r})")
            case ast.Constant(value=int()) if abs(node.value) <= 2:
                yield replace(node, str(node.value + 1))
            case ast.Call(func=ast.Attribute(value=value, attr=name)) if name in DROPPED:
                yield replace(node, f"({code(value)})")
            case ast.Call(func=ast.Attribute(attr=name)) if name in METHODS:
                yield replace(node.func, code(node.func).removesuffix(name) + METHODS[name])
            case ast.Expr(value=ast.Call()) | ast.AugAssign():
                yield replace(node, "pass")
        if isinstance(node, ast.Call) and len(node.args) > 1 and not any(isinstance(a, ast.Starred) for a in node.args):
            first, second = node.args[:2]
            named = isinstance(first, ast.Name | ast.Attribute) and isinstance(second, ast.Name | ast.Attribute)
            if named and code(first) != code(second) and code(node.func) not in ("min", "max"):
                low, high = span(first)[0], span(second)[1]
                middle = text[span(first)[1] : span(second)[0]].decode()
                swapped = code(second) + middle + code(first)
                new = (text[:low] + swapped.encode() + text[high:]).decode()
                yield Mutant(node.lineno, text[low:high].decode(), swapped, new)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            children = node.body  # not its annotations and defaults
        elif isinstance(node, ast.AnnAssign):
            children = [node.value] if node.value else []
        else:
            children = ast.iter_child_nodes(node)
        for child in children:
            is_message = isinstance(child, ast.Raise) or (isinstance(child, ast.Expr) and "refuse(" in code(child))
            is_harmless = isinstance(child, ast.keyword) and child.arg in HARMLESS
            if not isinstance(child, ast.Assert | ast.JoinedStr) and not is_message and not is_harmless:
                yield from visit(child)

    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in NOT_MUTATED and node.lineno < end:
            yield from visit(node)


def run_tests(folder: Path, *chosen: str, timeout: float | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", "--durations=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    options = {"cwd": folder, "env": environment, "timeout": timeout}
    return subprocess.run([*command, *chosen], capture_output=True, text=True, **options)


def tests_of(folder: Path, script: str) -> list[str]:
    """The names of the tests that have the script's name in theirs or in their file's; her is not in other."""
    collected = run_tests(folder, "tests", "--collect-only", "-q", "-o", "addopts=").stdout.splitlines()
    return [line for line in collected if re.search(f"(?<![a-z]){script}(?![a-z])", line)]


def quickest_first(folder: Path, script: str, tests: Path) -> list[str]:
    """The names of the script's tests, by the time that they take for the sound script; none if one of them fails."""
    names = tests_of(folder, script)
    tests.write_text("\n".join(names))
    process, seconds = run_tests(folder, f"@{tests}", "-vv"), Counter(dict.fromkeys(names, 0))  # pytest hides some
    for line in process.stdout.splitlines():  # such as: 0.53s call     tests/test_ppo.py::test_gae[2]
        if match := re.fullmatch(r"([\d.]+)s (?:setup|call|teardown) +(tests/.*)", line):
            seconds[match[2]] += float(match[1])
    return sorted(seconds, key=seconds.get) if process.returncode == 0 else []


def is_killed(folder: Path, tests: Path, timeout: float) -> bool:
    try:
        return run_tests(folder, f"@{tests}", timeout=timeout).returncode != 0
    except subprocess.TimeoutExpired:
        return True


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    known = sorted(path.stem for path in (ROOT / "algorithms").glob("*.py") if path.stem != "__init__")
    if unknown := [name for name in args.scripts if name not in known]:
        print(f"error: --scripts {unknown[0]}: there is {', '.join(known)}", file=sys.stderr)
        raise SystemExit(2)
    result = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, tests = Path(temporary) / "plainrl", Path(temporary) / "tests"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "wandb", "__pycache__"))
        for script in args.scripts or known:
            path = folder / "algorithms" / f"{script}.py"
            source = path.read_text()
            everything = list(mutants(source))
            chosen = random.Random(args.seed).sample(everything, min(args.sample, len(everything)))
            started = time.perf_counter()
            tests.write_text("\n".join(quickest_first(folder, script, tests)))
            if not tests.read_text():
                print(f"error: {script}.py does not pass its tests as it is", file=sys.stderr)
                raise SystemExit(2)
            timeout = 3 * (time.perf_counter() - started) + 30
            survivors = []
            for i, mutant in enumerate(chosen, 1):
                path.write_text(mutant.source)
                if not is_killed(folder, tests, timeout):
                    survivors.append({"line": mutant.line, "before": mutant.before, "after": mutant.after})
                    print(f"{script}.py:{mutant.line} survived: {mutant.before}  ->  {mutant.after}", flush=True)
                print(f"{script}: {i - len(survivors)} of {i} killed", end="\r", flush=True)
            path.write_text(source)
            result[script] = {
                "possible": len(everything), "tried": len(chosen), "killed": len(chosen) - len(survivors),
                "survivors": survivors,
            }  # fmt: skip
            print(f"{script}: {result[script]['killed']} of {len(chosen)} killed ({len(everything)} are possible)")
            if args.output:
                args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
