"""Runs a script, whose path and flags follow, and prints the threads of torch.distributed that are left at its end.

A thread that outlives destroy_process_group may abort the process while Python shuts down.
"""

import atexit
import runpy
import sys
from contextlib import suppress
from pathlib import Path


@atexit.register
def tell() -> None:
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has ended meanwhile
            names.append(path.read_text().strip())
    print(f"left: {[name for name in names if 'gloo' in name]}\n", end="")  # one write, which none comes between


del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
