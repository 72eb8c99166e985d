"""How a run fails: one line, an exit code, and, of a sweep, a list of the points that could not run."""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import NoReturn

from rdo.runtime import processes
from rdo.runtime.errors import described, printable

# Points of a sweep that could not run: their overrides, and why.
FAILED: list[tuple[list[str], str]] = []
DEBUG = "RDO_DEBUG"  # which --debug sets to 1
# Seconds that the other processes leave the first to show an error that may be everyone's, and to end with it.
FIRST_SAYS_SO = 2.0


def show(error: Exception) -> None:
    """Shows an error as one line, with --debug its traceback before it."""
    if os.environ.get(DEBUG) == "1":
        print(printable("".join(traceback.format_exception(error))), file=sys.stderr)
    rank = processes.found_world().rank
    print(f"error: {f'process {rank}: ' if rank else ''}{described(error)}", file=sys.stderr, flush=True)


def fail(error: Exception) -> NoReturn:
    """Shows an error, and exits with 1."""
    rank = processes.found_world().rank
    if processes.peer_ended(error):
        print(f"process {rank}: another process of this run has ended", file=sys.stderr, flush=True)
        sys.exit(1)
    if rank:
        time.sleep(FIRST_SAYS_SO)  # once it has, the launcher ends the others
    show(error)
    sys.exit(1)
