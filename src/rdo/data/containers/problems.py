"""How a message says what is wrong with a file, or with a row of it."""

from __future__ import annotations

from pathlib import Path

from rdo.errors import DataError

AGAIN = "download or copy it again"


class Broken(Exception):
    """What is wrong with a file, or a row of it: a message to be put behind the file's name or the row's place."""

    def __init__(self, problem: str, where: str = "") -> None:
        super().__init__(f", {where}: {problem}" if where else f": {problem}")


def unreadable(
    file: Path, error: OSError, way_out: str = "check dataset.path, and whether you may read it"
) -> DataError:
    """What the system refuses of a file, as a message."""
    return DataError(f"{file}: cannot be read ({error.strerror or error}); {way_out}")


def shown(text: str, width: int = 60) -> str:
    """Text of the data for a message: control characters escaped, shortened."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: width + 1])
    return escaped if len(escaped) <= width else escaped[: width - 1] + "…"
