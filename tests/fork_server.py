"""Starts scripts as `python script.py` does, only sooner: forked from a process that has imported what takes seconds.

    python tests/fork_server.py gymnasium torch

It reads orders, one a line, and answers each with two lines: the pid of the script's process and, once that has ended,
how. This process is the script's own: its arguments, environment, output, signals, and end. Only what an
interpreter draws at its start, such as the order of strings in a set, is the same in all processes of one server.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import sys
from pathlib import Path


def next_order() -> dict:
    """Returns in a new process for each order; in the server itself it never does."""
    for line in sys.stdin:
        if not (pid := os.fork()):
            return json.loads(line)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)
    sys.exit()


given = dict(os.environ)
for module in sys.argv[1:]:
    importlib.import_module(module)
set_by_imports = {name: value for name, value in os.environ.items() if given.get(name) != value}
gc.freeze()  # so that no collection goes through all of these modules, which would copy their shared memory,
atexit.register(gc.unfreeze)  # except for those of the interpreter's end, which miss nothing
order = next_order()
for number, path in enumerate((os.devnull, order["stdout"], order["stderr"])):
    os.dup2(os.open(path, os.O_RDWR), number)
os.environ.clear()
os.environ.update(set_by_imports | order["environ"])
sys.argv = order["argv"]
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")  # as the last line, so that the interpreter itself ends the script
