"""Progress bars for long work, on standard error; where that is no terminal, a line every few seconds at most."""

from __future__ import annotations

import sys
import threading

from tqdm import tqdm

from rdo.runtime.processes import is_rank0

# tqdm's own lock is shared with forked processes: one that is killed while it holds the lock would stop all others.
tqdm.set_lock(threading.RLock())


def progress_bar(total: int | None, title: str, initial: int = 0, unit: str = "it") -> tqdm:
    """A bar for work of known length, in steps of `unit`."""
    return tqdm(
        total=total,
        desc=f"{title:<28.28}",
        initial=initial,
        unit=unit,
        unit_scale=unit != "it",
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
        dynamic_ncols=True,
        delay=1.0,
        disable=not is_rank0(),
    )


def say(text: str) -> None:
    """One line on standard output, between progress bars."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def warn(text: str) -> None:
    """The same on standard error, for what went wrong and was mended; of several processes one says it."""
    if is_rank0():
        tqdm.write(f"warning: {text}", file=sys.stderr)
