"""The fork server of the tests: to a script, it is as if `python script.py` had started it."""

import pytest
from conftest import Forked, call, fork_server

SURROUNDINGS = """
import atexit, gc, gymnasium, json, os, random, signal, sys, threading, warnings
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "cwd": os.getcwd(), "environ": dict(os.environ), "name": __name__,
    "file": __file__, "main": vars(sys.modules["__main__"]) is globals(), "umask": os.umask(0o22),
    "signals": [str(signal.getsignal(number)) for number in signal.valid_signals()],
    "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "warnings": str(warnings.filters),
    "threads": threading.active_count(), "stdin": sys.stdin.read(), "flags": str(sys.flags), "gc": gc.get_threshold(),
    "terminals": [file.isatty() for file in (sys.stdin, sys.stdout, sys.stderr)],
    "buffered": [file.line_buffering for file in (sys.stdout, sys.stderr)], "encoding": sys.stdout.encoding,
}, sort_keys=True))
"""
ENDINGS = {
    "return": "",
    "code": "sys.exit(3)",
    "message": "sys.exit('sorry')",
    "exception": "1 / 0",
    "interrupt": "raise KeyboardInterrupt",
    "killed": "sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)",
    "stopped": "sys.stdout.flush(); os.kill(os.getpid(), signal.SIGTERM)",
    "at exit": "atexit.register(lambda: print('the last word'))",
    "thread": "threading.Timer(0.2, lambda: print('the last word')).start()",
}


def forked(path, *flags):
    process = Forked(fork_server("gymnasium"), path, *flags)
    return process, process.communicate(timeout=60)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_forked_script_is_as_a_started_one(ending, tmp_path, monkeypatch):
    monkeypatch.setenv("OF_THIS_TEST", "yes")
    path = tmp_path / "script.py"
    path.write_text(f"{SURROUNDINGS}\n{ENDINGS[ending]}\n")
    expected, (process, (out, err)) = call(path, "--flag", "with space"), forked(path, "--flag", "with space")
    assert out == expected.stdout
    assert process.returncode == expected.returncode
    assert err.splitlines()[-1:] == expected.stderr.splitlines()[-1:]


def test_forked_scripts_know_nothing_of_each_other(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("import os, gymnasium as gym\nprint(os.getpid(), vars(gym).setdefault('mark', os.getpid()))\n")
    for process, (out, _) in forked(path), forked(path):
        assert out == f"{process.pid} {process.pid}\n"
