"""Ctrl-C, SIGTERM and a scheduler's notice: the first stops where nothing is lost, a second Ctrl-C stops at once.

A stretch of work that can be broken off only at certain points runs as `postponed()` and asks `check()` at these
points; everywhere else the first signal ends the work right away. Either way `Stopped` is raised, and `stoppable`
turns it into one line and an exit code. SIGUSR2 is heeded where a scheduler's library handles it (submitit, which puts
the job back into the queue): its own handler follows once everything is saved.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from types import FrameType
from typing import Any, ParamSpec, TypeVar

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTE = "what is finished is kept, and the same command goes on"
SLICE_SECONDS = 0.2
PARENT_DEATH_SIGNAL = 1  # of Linux' prctl

P = ParamSpec("P")
T = TypeVar("T")


class Stopped(BaseException):
    """The process was asked to stop; no Exception, so that nothing takes it for a failure that it can handle."""

    def __init__(self, number: int, note: str = NOTE):
        super().__init__(number, note)
        self.number = number
        self.note = note

    @property
    def exit_code(self) -> int:
        """What shells expect of a process that a signal ended: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}: {self.note}"


@dataclass
class State:
    """The process whose handlers these are, the first signal that came, how many `postponed()` are open, and whether
    the last fork was the main thread's."""

    process: int = 0
    requested: int | None = None
    postponed: int = 0
    forked_by_main: bool = False


_state = State()


@contextmanager
def handled() -> Iterator[dict[int, Any]]:
    """Handles SIGINT and SIGTERM while it is open, in the main thread, and SIGUSR2 where Python code did; what was
    ignored (nohup) stays ignored. Yields the handlers that it stands in for."""
    global _state
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    outer, _state = _state, State(process=os.getpid())
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    if callable(notice := signal.getsignal(signal.SIGUSR2)):
        before[signal.SIGUSR2] = notice
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield before
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _state = outer


def handle(number: int, frame: FrameType | None) -> None:
    """The handler of both signals. Raises Stopped unless that is postponed."""
    if _state.requested is not None and number == signal.SIGINT:
        for child in multiprocessing.active_children():
            child.kill()
        os.write(2, b"\nstopped at once\n")
        os._exit(128 + number)
    _state.requested = _state.requested or number
    if not _state.postponed:
        raise Stopped(number)
    # Not by print, which must not be entered a second time from within itself.
    os.write(2, b"\nstopping where nothing is lost; Ctrl-C (once more) stops at once\n")


def before_fork() -> None:
    """Holds signals back: one that reached a new process before its Python runs would be lost."""
    if _state.process == os.getpid():
        _state.forked_by_main = threading.current_thread() is threading.main_thread()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def after_fork_in_parent() -> None:
    """Lets the signals in again."""
    if _state.process == os.getpid():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def after_fork_in_child() -> None:
    """In a worker process that is forked while signals are handled: they end it, as does the end of its parent.

    Else the workers of a process that was killed would wait for work for ever.
    """
    if _state.process != os.getppid():
        return
    # The system counts the end of the forking thread as the parent's.
    if sys.platform == "linux" and _state.forked_by_main:
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


os.register_at_fork(before=before_fork, after_in_parent=after_fork_in_parent, after_in_child=after_fork_in_child)


@contextmanager
def postponed() -> Iterator[None]:
    """While it is open a first signal raises nothing by itself, but makes `check()` raise, also after it is closed."""
    _state.postponed += 1
    try:
        yield
    finally:
        _state.postponed -= 1


def is_postponed() -> bool:
    """Whether a stop is held back just now, until someone asks `check()`."""
    return _state.postponed > 0


def requested() -> bool:
    """Whether the process was asked to stop."""
    return _state.requested is not None


def request(number: int = signal.SIGTERM) -> int:
    """Asks this process to stop, if nobody has; the number of the signal that did."""
    _state.requested = _state.requested or number
    return _state.requested


def check(note: str = NOTE) -> None:
    """Raises Stopped if the process was asked to stop."""
    if _state.requested is not None:
        raise Stopped(_state.requested, note)


def wait(seconds: float) -> None:
    """Sleeps. Raises Stopped as soon as the process is asked to stop."""
    end = time.monotonic() + seconds
    check()
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(SLICE_SECONDS, left))
        check()


def stoppable(function: Callable[P, T]) -> Callable[P, T]:
    """The function with signals handled; a stop is printed as one line, and the process exits with its code."""

    @wraps(function)
    def wrapped(*arguments: P.args, **named: P.kwargs) -> T:
        with handled() as before:
            try:
                return function(*arguments, **named)
            except Stopped as stop:
                print(stop, file=sys.stderr, flush=True)
                if stop.number == signal.SIGUSR2:
                    # Puts the job back into the queue, which may answer with SIGTERM at once.
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
                    before[stop.number](stop.number, None)
                sys.exit(stop.exit_code)
            except BaseException as error:
                # Libraries that wait for their processes may raise something else while Stopped passes through them.
                if _state.requested is None:
                    raise
                meant = Stopped(_state.requested)
                print(meant, file=sys.stderr, flush=True)
                raise SystemExit(meant.exit_code) from error

    return wrapped
