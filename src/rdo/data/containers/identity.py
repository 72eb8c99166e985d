"""Which content a file has, and whether it stayed the same while it was read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rdo.data.containers.problems import unreadable
from rdo.errors import DataError
from rdo.progress import progress_bar

BLOCK = 2**22  # bytes that are hashed at a time


class Identity:
    """The content of files, from the moment that this is made: what is read later must be the same.

    Raises DataError for a file that cannot be read.
    """

    def __init__(self, files: Sequence[Path]):
        self.states = {file: _state(file) for file in files}

    def hashes(self) -> list[list[str]]:
        """Path and hash of the content of every file. Time of change and size would not do: tools that copy files
        keep the time (cp -p, rsync -t), and a copy of the same content has another."""
        size = sum(state[1] for state in self.states.values())
        with progress_bar(size, "hashing data files", unit="B") as bar:
            return [[str(file.resolve()), _hash(file, bar.update)] for file in self.states]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Raises DataError where a file has changed by the end, whatever else was wrong with it."""
        try:
            yield
        except DataError as error:
            self._check(error)
            raise
        self._check(None)

    def _check(self, cause: DataError | None) -> None:
        for file, before in self.states.items():
            if not file.exists() or _state(file) != before:
                raise DataError(f"{file}: changed while it was read; run again when nothing writes to it") from cause


def _state(file: Path) -> tuple[int, int, int]:
    """What tells a file that was written to, or replaced, from the one before: inode, bytes, nanoseconds."""
    try:
        found = os.stat(file)
    except OSError as error:
        raise unreadable(file, error) from error
    return found.st_ino, found.st_size, found.st_mtime_ns


def _hash(file: Path, report: Callable[[int], object]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with file.open("rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
                report(len(block))
    except OSError as error:
        raise unreadable(file, error) from error
    return digest.hexdigest()
