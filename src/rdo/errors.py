"""The one error a user is meant to read: its message says what is wrong, where, and what to do about it."""

from __future__ import annotations

import errno
import re
import select
import sys
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

from rdo.printable import single_line

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_FULL_TEXTS = re.compile(r"No space left on device|Disk quota exceeded|os error (28|122)\b|StreamWriter failed")
MEMORY_TEXTS = re.compile(r"(?i)can('t|not) allocate memory|not enough memory|out of memory|ALLOC_FAILED")
# What gloo and NCCL say in a process whose peer has ended.
PEER_TEXTS = re.compile(r"Connection (closed|reset) by peer|remote process exited|NCCL communicator was aborted")
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


class UserError(Exception):
    """Something the user can mend: a setting, a file, a row. `train.py` prints the message alone and exits with 1.

    Whatever a message quotes, it is shown as one printable line without credentials.
    """

    def __str__(self) -> str:
        return single_line(super().__str__())


class DataError(UserError):
    """A row or file of input data cannot be used; the message names the file, the line and the field."""


class NotFiniteError(UserError):
    """A number that came out as NaN or infinite; `record_ids` are the records that it came from."""

    def __init__(self, what: str, record_ids: Sequence[str], way_out: str):
        super().__init__(f"{what}; records {', '.join(record_ids)}; {way_out}")
        self.what, self.record_ids, self.way_out = what, record_ids, way_out


def explained(error: BaseException, run_dir: Path | None = None) -> UserError | None:
    """What the machine ran out of or refused, in a user's words; None where the error is a mistake of ours."""
    if isinstance(error, UserError):
        return error
    system = isinstance(error, RuntimeError | OSError)
    if isinstance(error, MemoryError) or (system and MEMORY_TEXTS.search(str(error))):
        return UserError(
            "out of memory: lower engine.tokens_per_micro_batch (training, scoring) or eval.batch_size (generation), "
            "or take a smaller model; nothing finished is lost, and the same command goes on from there"
        )
    if system and PEER_TEXTS.search(str(error)):
        return UserError(
            "another process of this run ended: its own error says why, if it could say anything (a process that the "
            "system kills for want of memory cannot); the same command goes on from the last checkpoint"
        )
    if isinstance(error, UnpicklingError):
        return UserError(
            f"{run_dir or 'run_dir'}: a checkpoint there holds something else than numbers, which could run code, and "
            "was not loaded; remove it (checkpoints/ in the stage's folder), and run again"
        )
    if isinstance(error, BrokenPipeError) and standard_output_closed():
        return UserError("standard output was closed by its reader; write it to a file instead: ... > log.txt")
    number = error.errno if isinstance(error, OSError) else None
    place = str(error.filename) if isinstance(error, OSError) and error.filename is not None else None
    if number in DISK_FULL or DISK_FULL_TEXTS.search(str(error)):
        return UserError(
            f"{place or run_dir or 'run_dir'}: the disk is full, or its quota used up; make room: nothing finished is "
            "lost, and the same command goes on from there"
        )
    if number in (errno.EMFILE, errno.ENFILE):
        return UserError(f"{place or 'run_dir'}: too many open files; raise the limit (ulimit -n 4096) and run again")
    if number is None or place is None:
        return explained(error.__cause__, run_dir) if error.__cause__ is not None else None
    if number in DENIED:
        return UserError(f"{place}: permission denied; correct its permissions, or choose another path")
    if number == errno.ENOENT:
        return missing_file(Path(place), run_dir)
    if number in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.EIO):
        reason = (getattr(error, "strerror", None) or type(error).__name__).lower()
        return UserError(f"{place}: {reason}; correct the path, or choose another one")
    return None


def standard_output_closed() -> bool:
    """Whether standard output is a pipe whose reader has gone; a connection to another process may break as well."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # errors are reported unasked
    except (OSError, ValueError, AttributeError):
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def missing_file(file: Path, run_dir: Path | None) -> UserError | None:
    """A finished result that has lost a file; None for any other file that is not there."""
    if run_dir is None or not file.is_relative_to(run_dir) or len(file.relative_to(run_dir).parts) < 3:
        return None
    folder = run_dir.joinpath(*file.relative_to(run_dir).parts[:2])
    return UserError(f"{file}: there is no such file; its folder is incomplete: remove {folder} and run again")
