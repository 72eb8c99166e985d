"""Writing so that nothing half-written is ever seen under its real name: temporary name first, then rename.

What is renamed has reached the disk before, and the rename has when the call returns: a power cut keeps the order.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from filelock import FileLock, Timeout

from rdo import interrupts
from rdo.errors import UserError
from rdo.printable import single_line
from rdo.progress import say

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
# What a process that was killed may leave behind; the last are those of `datasets`.
LEFTOVERS = (".*.part", ".*.old", "tmp????????")
# How often a run that waits for another asks whether it is done.
POLL_SECONDS = 0.5
# While a disk is full, how long until the next try.
RETRY_SECONDS = 30.0

# A sealed file ends with this and a checksum of all that stands before.
SEAL = b"rdo-seal"
DIGEST_BYTES = 16

# In a folder that a process holds: the lock, and a note of who that is.
LOCK, HOLDER = ".lock", ".holder.json"

T = TypeVar("T")


class DiskFull(UserError):
    """There is no room for a file: on the disk, or in the user's quota."""


class Damaged(Exception):
    """A sealed file is not what was written; the message says why."""


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns what the system refuses while `path` is written into DiskFull, or a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = error_number(error)
        if number in FULL:
            raise DiskFull(f"{path} cannot be written: {os.strerror(number).lower()} ({free_space(path)})") from error
        if number in REFUSED:
            raise UserError(
                f"{path} cannot be written: {os.strerror(number).lower()}; mend that, or choose another run_dir"
            ) from error
        raise


def error_number(error: BaseException) -> int | None:
    """The system's number of what went wrong, also where a library has wrapped it; None if it was something else."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno
        if found := re.search(r"\(os error (\d+)\)", str(cause)):  # safetensors and tokenizers
            return int(found[1])
        cause = cause.__cause__ or cause.__context__
    return None


def free_space(path: Path) -> str:
    """What is free on the disk of a path, in words."""
    existing = next((folder for folder in (path, *path.parents) if folder.exists()), Path("."))
    return f"{shutil.disk_usage(existing).free / 2**20:,.1f} MiB free"


def patiently(write: Callable[[], T], minutes: float) -> T:
    """What `write` returns; while the disk is full it is tried again, for so many minutes, and said so.

    Raises UserError when they are over, and Stopped when the process is asked to stop meanwhile.
    """
    end = time.monotonic() + 60 * minutes
    while True:
        try:
            return write()
        except DiskFull as error:
            left = end - time.monotonic()
            if left <= 0:
                raise UserError(
                    f"{error}, after {minutes:g} minutes (engine.disk_full_minutes) of waiting for room; what was "
                    "saved before is kept, and the same command goes on from there"
                ) from error
            say(f"{error}; make room: it is tried again for {max(1, round(left / 60))} more minutes")
            interrupts.wait(min(RETRY_SECONDS, left))


def synchronize(path: Path) -> None:
    """Waits until a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot do that for folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path; on success it takes the place of `path` at once, on failure it is removed.

    Raises DiskFull, and UserError where the system refuses.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            yield temporary
            synchronize(temporary)
            temporary.replace(path)
            synchronize(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """The same for a whole folder; an old one is moved away only when the new one is complete."""
    with write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            readable = temporary.stat().st_mode & 0o666  # what the umask grants; safetensors asks for less
            for path in (*temporary.rglob("*"), temporary):
                if path.is_file():
                    path.chmod(readable)
                synchronize(path)
            old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            shutil.rmtree(old, ignore_errors=True)  # a killed process of the same number may have left one
            if folder.exists():
                folder.rename(old)
            try:
                temporary.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
            synchronize(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left half-written anywhere in a folder that this process alone writes to."""
    for pattern in LEFTOVERS:
        for path in list(folder.rglob(pattern)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


class Sealing:
    """A file that adds up the checksum of what is written to it."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.checksum = hashlib.blake2b(digest_size=DIGEST_BYTES)

    def write(self, data: Any) -> int:
        self.checksum.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


@contextmanager
def replace_sealed(path: Path) -> Iterator[Sealing]:
    """Like `replace_file`, but yields an open binary file, which is sealed at the end."""
    with replace_file(path) as temporary, temporary.open("wb") as file:
        sealing = Sealing(file)
        yield sealing
        file.write(SEAL + sealing.checksum.digest())
        file.flush()


def check_seal(path: Path) -> int:
    """How many bytes of a sealed file stand before its seal. Raises Damaged where a single bit is not as written."""
    checksum = hashlib.blake2b(digest_size=DIGEST_BYTES)
    try:
        size = left = path.stat().st_size - len(SEAL) - DIGEST_BYTES
        with path.open("rb") as file:
            while left > 0 and (block := file.read(min(left, 1 << 22))):
                checksum.update(block)
                left -= len(block)
            end = file.read()
    except OSError as error:
        raise Damaged(f"it cannot be read: {error.strerror}") from error
    if size < 0 or not end.startswith(SEAL):
        raise Damaged("it is cut short or overwritten")
    if end != SEAL + checksum.digest():
        raise Damaged("its checksum is wrong")
    return size


def read_sealed(path: Path) -> bytes:
    """What was written to a sealed file. Raises Damaged where a single bit is not as written."""
    size = check_seal(path)
    return path.read_bytes()[:size]


def write_json(path: Path, data: Any) -> None:
    """JSON with indentation and sorted keys, written whole or not at all. Raises as `replace_file` does."""
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, sort_keys=True, default=str) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text())


def append_text(path: Path, text: str, end: int | None = None) -> int:
    """Adds to a file, all or nothing; its new size. What a full disk took in part is cut off again.

    end: the size after the last call that succeeded, for a disk that says only afterwards that it was full. Raises
    DiskFull, and UserError where the system refuses.
    """
    with write_errors(path), path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        size = file.truncate(size if end is None else min(size, end))
        left = memoryview(text.encode())
        try:
            while left:
                left = left[file.write(left) :]
        except BaseException:
            file.truncate(size)
            raise
        return file.tell()


def append_json_line(path: Path, data: dict[str, Any]) -> None:
    """One more line of a JSON-lines file; see `append_text`."""
    append_text(path, json.dumps(data) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, blank lines skipped."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


@contextmanager
def held(folder: Path, command: str) -> Iterator[None]:
    """Holds a folder for this process; a second one that wants it says who has it and waits, then finds the result.

    The lock goes with the process that holds it, however that ends; the note of who it is may outlive it.
    """
    # Without locks of the system a lock would be a mere file, which a machine that died would hold for ever.
    lock, note = FileLock(folder / LOCK, fallback_to_soft=False), folder / HOLDER
    with write_errors(folder / LOCK):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"{folder} is being made by {holder(note)}; waiting for it")
            lock.acquire(poll_interval=POLL_SECONDS)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            raise UserError(
                f"{folder}: its file system has no locks (flock), which keep two runs from making the same; choose "
                "another run_dir, or have it mounted with them"
            ) from error
    try:
        since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
        job = os.environ.get("SLURM_JOB_ID")
        facts = {"process": os.getpid(), "host": platform.node(), "job": job, "since": since, "command": command}
        with suppress(OSError, UserError):  # it only helps others to understand
            write_json(note, facts)
        yield
    finally:
        with suppress(OSError):
            note.unlink(missing_ok=True)
        lock.release()


def holder(note: Path) -> str:
    """Who wrote a holder's note, in words."""
    try:
        facts = read_json(note)
        job = f", job {facts['job']}," if facts.get("job") else ""
        known = f"process {facts['process']} on {facts['host']}{job} since {facts['since']} ({facts['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # which has the lock, and has not written its note yet
    return single_line(known)
