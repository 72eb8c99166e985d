"""Ctrl-C, SIGTERM and a scheduler's SIGUSR2 set a flag, which long work reads where nothing is lost.

Such work runs as `postponed()` and asks `check()` between two parts or batches, or `check_together()` where processes
work hand in hand; anywhere else the first signal ends the work right away. Either way `Stopped` is raised, which
`handled` turns into one line and an exit code.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from rdo.runtime.processes import all_reduce_sum, is_rank0, world

NOTE = "what is finished is kept, and the same command goes on"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
PROCESS = os.getpid()

_first: int | None = None  # the signal that came first
_postponed = 0  # how many `postponed()` are open


class Stopped(BaseException):
    """This process, or another of the run, was asked to stop; no Exception, so that nothing takes it for a failure that
    it can handle."""


@contextmanager
def handled() -> Iterator[None]:
    """Handles the signals while it is open; what was ignored (nohup) stays ignored. A stop is printed as one line, and
    the process exits as shells expect of one that a signal ended: with 130 after Ctrl-C, 143 after SIGTERM."""
    global _first
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield
    except BaseException as error:
        # Libraries that wait for their processes may raise something else while Stopped passes through them.
        if _first is None and not isinstance(error, Stopped):
            raise
        number, note = _first or signal.SIGTERM, error if isinstance(error, Stopped) else NOTE
        requeued = number == signal.SIGUSR2 and callable(before[number])
        if requeued:  # by submitit's handler; the queue may answer with SIGTERM at once
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if is_rank0():
            print(f"stopped by {signal.Signals(number).name}: {note}", file=sys.stderr, flush=True)
        if requeued:
            before[number](number, None)
        # That ends the first process. With an error of another's SLURM would end the first before it comes to that.
        raise SystemExit(0 if requeued else 128 + number) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        _first = None


def handle(number: int, frame: FrameType | None) -> None:
    """The handler of all signals. Raises Stopped unless that is postponed; a second Ctrl-C ends the process."""
    global _first
    # A forked worker has the handler, too, and nothing to save.
    if os.getpid() != PROCESS or (_first is not None and number == signal.SIGINT):
        os._exit(128 + number)
    _first = _first or number
    if not _postponed:
        raise Stopped(NOTE)
    if is_rank0():
        os.write(2, b"\nstopping where nothing is lost; Ctrl-C (once more) stops at once\n")


@contextmanager
def postponed() -> Iterator[None]:
    """While it is open a first signal raises nothing by itself, but makes `check()` raise, also after it is closed."""
    global _postponed
    _postponed += 1
    try:
        yield
    finally:
        _postponed -= 1


def requested() -> bool:
    """Whether this process was asked to stop."""
    return _first is not None


def check(note: str = NOTE) -> None:
    """Raises Stopped if this process was asked to stop."""
    if requested():
        raise Stopped(note)


def check_alone(*_: object) -> None:
    """`check`, where there is one process: a hook for the midst of a pass, which several must not leave one by one."""
    if world().size == 1:
        check()


def check_together() -> None:
    """Raises Stopped in every process if any of them was asked to stop; all call it at the same point of their work."""
    if int(all_reduce_sum(torch.tensor(int(requested())))):
        raise Stopped(NOTE)
