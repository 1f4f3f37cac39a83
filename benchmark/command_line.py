"""What the tools of this folder share: their flags, and the one line about a user's mistake."""

import io
import re
import sys
from contextlib import redirect_stderr
from typing import NoReturn, TypeVar

import tyro

Args = TypeVar("Args")


def refuse(message: object) -> NoReturn:
    """A mistake of the user: one line that says what to do, and exit code 2."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def parse(args: type[Args], description: str | None) -> Args:
    """The flags of the command line. args: a dataclass; description: what --help prints above them."""
    with redirect_stderr(io.StringIO()) as printed:
        try:
            return tyro.cli(args, description=description)
        except SystemExit as end:
            if not end.code:  # after --help
                raise
    refuse(re.sub("[^ -~]+", " ", printed.getvalue()))  # tyro draws a box around its message
