"""Writing so that nothing half-written is ever seen under its real name: temporary name first, then rename.

What is renamed has reached the disk before, and the rename has when the call returns: a power cut keeps the order.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rdo.runtime.progress import say

# What a process that was killed may leave behind.
LEFTOVERS = (".*.part", ".*.old")
# In a folder that a process holds, and how often a run that waits for it looks.
LOCK, POLL_SECONDS = ".lock", 0.5


class Damaged(Exception):
    """A file is not what was written; the message says why."""


def synchronize(path: Path) -> None:
    """Waits until a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path; on success it takes the place of `path` at once, on failure it is removed."""
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
    """The same for a whole folder; an old one goes when the new one is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # a killed process of the same number may have left one
    temporary.mkdir()
    try:
        yield temporary
        readable = temporary.stat().st_mode & 0o666  # what the umask grants; safetensors asks for less
        for path in (*temporary.rglob("*"), temporary):
            if path.is_file():
                path.chmod(readable)
            synchronize(path)
        move_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_folder(complete: Path, folder: Path) -> None:
    """Gives a complete folder its name, in place of one that has it."""
    shutil.rmtree(folder, ignore_errors=True)
    complete.rename(folder)
    synchronize(folder.parent)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left half-written anywhere in a folder that this process alone writes to."""
    for path in [path for pattern in LEFTOVERS for path in folder.rglob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_zip(path: Path) -> None:
    """Raises Damaged unless a file of torch.save, a zip with a checksum of every member, is whole."""
    try:
        with zipfile.ZipFile(path) as file:
            # torch.load takes what is marked as a folder for whatever stands in memory.
            marked = [member.filename for member in file.infolist() if member.external_attr]
            wrong = file.testzip() or next(iter(marked), None)
    except Exception as error:  # a damaged directory may lead zipfile anywhere
        raise Damaged(f"{path.name}: {error}") from error
    if wrong:
        raise Damaged(f"{path.name}: {wrong} in it is not what was written")


def write_json(path: Path, data: Any) -> None:
    """JSON with indentation and sorted keys, written whole or not at all."""
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, sort_keys=True, default=str) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, blank lines skipped."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds a folder for this process, to its end at most; a second one that wants it says so and waits."""
    # Without locks of the system a lock would be a mere file, which a machine that died would hold for ever.
    lock = FileLock(folder / LOCK, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{folder} is being made by another run; waiting for it")
        lock.acquire(poll_interval=POLL_SECONDS)
    try:
        yield
    finally:
        lock.release()
