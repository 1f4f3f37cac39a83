"""mutants.py: what it changes, what it leaves alone, and that it tells the killed from the survivors."""

import sys

import mutants
import pytest

SOURCE = '''
class Args:
    gamma: float = 0.5


def f(x: int = 1, y: int = 2):
    """A docstring 1 + 1."""
    assert x > 1
    if not y:
        raise UsageError(f"{x + 1}", x + 1)
    x.append(min(x, y), spawn_key=(1, 2), strict=True, fused=True)
    return g(x, y) - h(x.detach(), -y) * 0.5  # a comment 1 + 1


# ---- Below this line
def shared(x):
    return x + 1
'''


def test_one_place_is_changed_in_each_mutant():
    found = list(mutants.mutants(SOURCE))
    for mutant in found:
        assert mutant.source != SOURCE
        compile(mutant.source, "mutant", "exec")
        pairs = zip(SOURCE.splitlines(), mutant.source.splitlines(), strict=True)
        assert [number for number, (before, after) in enumerate(pairs, 1) if before != after] == [mutant.line]
    returned = "g(x, y) - h(x.detach(), -y) * 0.5"
    assert sorted((mutant.line, mutant.source.splitlines()[mutant.line - 1].strip()) for mutant in found) == sorted([
        (9, "if (y):"),
        (11, "pass"),
        (12, f"return {returned.replace(' - ', ' + ')}  # a comment 1 + 1"),
        (12, f"return {returned.replace(' * ', ' / ')}  # a comment 1 + 1"),
        (12, f"return {returned.replace('g(x, y)', 'g(y, x)')}  # a comment 1 + 1"),
        (12, f"return {returned.replace('x.detach()', '(x)')}  # a comment 1 + 1"),
        (12, f"return {returned.replace('-y', '(y)')}  # a comment 1 + 1"),
        (12, f"return {returned.replace('0.5', '(1.0)')}  # a comment 1 + 1"),
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("expression", "mutant"),
    [
        ("a <= b", "a < b"),
        ("a == (b)", "a != (b)"),
        ("a and b", "a or b"),
        ("a & ~b", "a | ~b"),
        ("(a - b).mean()", "(a - b).sum()"),
        ("torch.minimum(a.x, b)", "torch.maximum(a.x, b)"),
        ("a[1:]", "a[2:]"),
        ("a[-1]", "a[(1)]"),
        ("f(True)", "f(False)"),
        ("(a - b).clamp(0, 1)", "(a - b)"),
    ],
)
def test_kinds_of_mistakes(expression, mutant):
    sources = [m.source for m in mutants.mutants(f"def f():\n    return {expression}\n{mutants.RULED_LINE}\n")]
    assert f"def f():\n    return {mutant}\n{mutants.RULED_LINE}\n" in sources


@pytest.mark.slow
def test_a_mistake_is_killed_or_survives(tmp_path, monkeypatch, capsys):
    for folder in "algorithms", "tests":
        (tmp_path / folder).mkdir()
    body = "def double(x):\n    x = x * 2\n    return x - 0\n"
    (tmp_path / "algorithms" / "fake.py").write_text(f"{body}\n\n{mutants.RULED_LINE}\n")
    test = "import runpy\ndef test():\n    assert runpy.run_path('algorithms/fake.py')['double'](3) in (5, 6)\n"
    (tmp_path / "tests" / "test_fake.py").write_text(test)
    other = "import time\n" + test.replace("test()", "test_fake()").replace("(3) in (5, 6)", "(0) == 0")
    other += "    time.sleep(0.3)\ndef test_fakes(): raise AssertionError('of another script')\n"
    (tmp_path / "tests" / "test_all.py").write_text(other)
    (tmp_path / ".pytest.ini").write_text("[pytest]\naddopts = -q\n")  # hides the quickest tests from -vv too
    names = mutants.quickest_first(tmp_path, "fake", tmp_path / "names")
    assert names == ["tests/test_fake.py::test", "tests/test_all.py::test_fake"]
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["mutants.py", "--scripts", "fake"])
    mutants.main()
    out = capsys.readouterr().out
    assert "fake.py:3 survived: x - 0  ->  x + 0" in out
    assert "fake: 3 of 4 killed (4 are possible)" in out
    assert (tmp_path / "algorithms" / "fake.py").read_text().startswith(body)
    monkeypatch.setattr(sys, "argv", ["mutants.py", "--scripts", "nothing"])
    with pytest.raises(SystemExit) as exit:
        mutants.main()
    assert exit.value.code == 2
    (tmp_path / "algorithms" / "fake.py").write_text(f"{body.replace('2', '4')}\n\n{mutants.RULED_LINE}\n")
    monkeypatch.setattr(sys, "argv", ["mutants.py", "--scripts", "fake"])
    with pytest.raises(SystemExit) as exit:
        mutants.main()
    assert exit.value.code == 2
    assert "fake.py does not pass its tests as it is" in capsys.readouterr().err
