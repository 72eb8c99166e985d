"""Ctrl-C, SIGTERM and a scheduler's notice set a flag, which long work reads where nothing is lost.

Such work runs as `postponed()` and asks `check()` between two steps, parts or batches; anywhere else the first signal
ends the work right away. Either way `Stopped` is raised, which `stoppable` turns into one line and an exit code.
SIGUSR2 is heeded where a scheduler's library handles it (submitit, which puts the job back into the queue): its own
handler is called once everything is saved.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from types import FrameType
from typing import Any, ParamSpec, TypeVar

from rdo.runtime.processes import is_rank0

NOTE = "what is finished is kept, and the same command goes on"

P = ParamSpec("P")
T = TypeVar("T")


class Stopped(BaseException):
    """The process was asked to stop; no Exception, so that nothing takes it for a failure that it can handle."""

    def __init__(self, number: int, note: str = NOTE):
        super().__init__(f"stopped by {signal.Signals(number).name}: {note}")
        self.number = number


@dataclass
class State:
    """The process that handles signals, the first that came, and how many `postponed()` are open."""

    process: int = 0
    requested: int | None = None
    postponed: int = 0


_state = State()


@contextmanager
def handled() -> Iterator[dict[int, Any]]:
    """Handles the signals while it is open, in the main thread; what was ignored (nohup) stays ignored. Yields the
    handlers that it stands in for."""
    global _state
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    outer, _state = _state, State(os.getpid())
    before: dict[int, Any] = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    }
    if not callable(before[signal.SIGUSR2]):
        del before[signal.SIGUSR2]
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        _state = outer


def handle(number: int, frame: FrameType | None) -> None:
    """The handler of all signals. Raises Stopped unless that is postponed; a second Ctrl-C ends the process."""
    # A forked worker has the handler, too, and nothing to save.
    if os.getpid() != _state.process or (_state.requested is not None and number == signal.SIGINT):
        os._exit(128 + number)
    _state.requested = _state.requested or number
    if not _state.postponed:
        raise Stopped(_state.requested)
    if is_rank0():
        os.write(2, b"\nstopping where nothing is lost; Ctrl-C (once more) stops at once\n")


@contextmanager
def postponed() -> Iterator[None]:
    """While it is open a first signal raises nothing by itself, but makes `check()` raise, also after it is closed."""
    _state.postponed += 1
    try:
        yield
    finally:
        _state.postponed -= 1


def requested() -> bool:
    """Whether the process was asked to stop."""
    return _state.requested is not None


def check(note: str = NOTE) -> None:
    """Raises Stopped if the process was asked to stop."""
    if _state.requested is not None:
        raise Stopped(_state.requested, note)


def stop(note: str) -> Stopped:
    """What ends this process when any process of the run was asked to stop."""
    _state.requested = _state.requested or signal.SIGTERM
    return Stopped(_state.requested, note)


def stoppable(function: Callable[P, T]) -> Callable[P, T]:
    """The function with signals handled; a stop is printed as one line, and the process exits as shells expect of one
    that a signal ended: with 130 after Ctrl-C, 143 after SIGTERM."""

    @wraps(function)
    def wrapped(*arguments: P.args, **named: P.kwargs) -> T:
        with handled() as before:
            try:
                return function(*arguments, **named)
            except BaseException as error:
                # Libraries that wait for their processes may raise something else while Stopped passes through them.
                if _state.requested is None:
                    raise
                number = _state.requested
                if is_rank0():
                    print(error if isinstance(error, Stopped) else Stopped(number), file=sys.stderr, flush=True)
                if number == signal.SIGUSR2:
                    # Puts the job back into the queue, which may answer with SIGTERM at once.
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
                    before[number](number, None)
                raise SystemExit(128 + number) from error

    return wrapped
