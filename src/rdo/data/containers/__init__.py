"""Containers: a file of JSON lines, a JSON array, CSV, Parquet or Arrow, gzipped or not, becomes a stream of rows.

No file is ever in memory as a whole. What is wrong with a file is raised; what is wrong with a single row, behind which
reading can go on, is handed out in the row's place, so that the caller decides whether to stop or to count it.
"""

from __future__ import annotations

import errno
import gzip
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rdo.data.containers.contents import find_container, opened, read_head, unpacked
from rdo.data.containers.csv_rows import TextRow, read_csv
from rdo.data.containers.identity import Identity
from rdo.data.containers.json_rows import read_json
from rdo.data.containers.paths import SUFFIXES, resolve, suffix_of
from rdo.data.containers.problems import AGAIN, Broken, shown, unreadable
from rdo.data.containers.tables import read_table
from rdo.data.containers.text import LONGEST_LINE
from rdo.errors import DataError

__all__ = ["LONGEST_LINE", "SUFFIXES", "Identity", "TextRow", "resolve", "rows", "shown"]


def rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Pairs of a place for messages ("FILE, line 12") and a row.

    A row is a dict, a TextRow (CSV), or a DataError: a broken row behind which reading can go on, for the caller to
    raise or to count. Raises DataError for all else that is wrong with the file, one that holds no row included.
    """
    place = ""
    try:
        for where, row in _rows(file):
            place = f"{file}, {where}"
            yield place, DataError(f"{place}{row}") if isinstance(row, Broken) else row
    except Broken as broken:
        raise DataError(f"{file}{broken}") from broken
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problem = "the gzip data end early" if isinstance(error, EOFError) else f"the gzip data are damaged ({error})"
        raise DataError(f"{place or file}: {problem}{' behind it' if place else ''}; {AGAIN}") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            way_out = f"it is unpacked to {tempfile.gettempdir()}: make room, or set TMPDIR to a folder with room"
            raise unreadable(file, error, way_out) from error
        raise unreadable(file, error) from error
    if not place:
        raise DataError(f"{file}: there are no rows; check dataset.path")


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Pairs of a place within the file ("line 12") and a row, or Broken in its place."""
    with opened(file) as stream:
        head = read_head(stream)
        container, suffix = find_container(file, head), suffix_of(file)
        stream.seek(0)
        if container == "CSV":
            yield from read_csv(stream, "\t" if suffix == ".tsv" else ",")
        elif container == "JSON":
            yield from read_json(stream, head, suffix)
        else:
            with unpacked(file, stream) as plain:
                yield from read_table(plain, container)
