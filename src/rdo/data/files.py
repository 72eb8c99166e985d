"""Rows of any file that fsspec opens: JSON lines, a JSON array, CSV, TSV, Parquet or Arrow, compressed or not.

No file is ever in memory as a whole, but a JSON array. What is wrong with a file is raised; what is wrong with a row,
behind which reading can go on, is handed out in its place, to be raised or counted.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import OpenFile

from rdo.data.columns import RowError
from rdo.runtime.errors import DataError

CHUNK = 2**20  # bytes that are read at a time
BATCH = 256  # rows of a table that are Python objects at a time
LONGEST = 2**26  # characters of a cell of CSV
Placed = Iterable[tuple[str, Any]]


class TextRow(dict[str, Any]):
    """A row whose cells are all text (CSV): numbers and lists in it are still to be parsed."""


def resolve(path: Any) -> list[OpenFile]:
    """The files that dataset.path names: a file, a glob ('data/*.parquet', '**' too), or a list of either.

    Sorted within a glob, no file twice. Raises DataError where one is missing or cannot be read.
    """
    files: dict[str, OpenFile] = {}
    for entry in [path] if isinstance(path, str) else path or []:
        try:
            found = [file for file in fsspec.open_files(entry, compression="infer") if not file.fs.isdir(file.path)]
            missing = not found or not all(file.fs.exists(file.path) for file in found)
        except Exception as error:  # whatever a file system may raise
            raise DataError(f"{entry}: cannot be opened ({error}); check dataset.path") from error
        if missing:
            raise DataError(f"{entry}: there is no such file; check dataset.path (a folder's files: 'FOLDER/*.jsonl')")
        files |= {name_of(file): file for file in found}
    if not files:
        raise DataError("dataset.path: no file is given; name a file, a glob ('data/*.parquet'), or a list of them")
    return list(files.values())


def name_of(file: OpenFile) -> str:
    return str(file.full_name).removeprefix("file://")


def content_hash(file: OpenFile) -> str:
    """Hash of a file's content. Time of change and size would not do: tools that copy files keep the time (cp -p, rsync
    -t), and a copy of the same content has another."""
    with file.fs.open(file.path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def rows(file: OpenFile) -> Iterator[tuple[str, Any]]:
    """Pairs of a place for messages ("FILE, line 12") and a row.

    A row is a dict, a TextRow (CSV), or a RowError: a broken row behind which reading can go on, for the caller to
    raise or to count. Raises DataError for all else that is wrong with the file, one that holds no row included.
    """
    name = name_of(file)
    suffix = PurePath(PurePath(name).stem if file.compression else name).suffix.lower()
    if suffix not in READERS:
        raise DataError(f"{name}: its name must end in {', '.join(READERS)}, or one of these and .gz")
    place = name
    try:
        with file as stream:
            for where, row in READERS[suffix](stream):
                place = f"{name}, {where}"
                yield place, row
    except Exception as error:  # of damaged bytes, decompressors and pyarrow raise nearly anything
        behind = "" if place == name else " or behind it"
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        raise DataError(f"{place}{behind}: cannot be read as {suffix} ({reason}); copy the file again") from error
    if place == name:
        raise DataError(f"{name}: there are no rows; check dataset.path")


def _json(stream: IO[bytes]) -> Placed:
    head = stream.read(CHUNK).removeprefix(b"\xef\xbb\xbf")
    stream.seek(0)
    if head.lstrip().startswith(b"["):
        for number, row in enumerate(json.load(stream), 1):
            yield f"element {number}", row
        return
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                problem = f"is not JSON, of which each line must be an object ({error}); mend or delete it"
                yield f"line {number}", RowError("", problem)


def _csv(stream: IO[bytes], delimiter: str = ",") -> Placed:
    csv.field_size_limit(LONGEST)
    # Bytes that are no text become lone surrogates, which no column may hold.
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    records = csv.reader(lines, delimiter=delimiter, strict=True)  # strict: a quote that is never closed is an error
    header = next(records, [])
    if len(set(header)) < len(header):
        raise ValueError("two columns of the header have the same name")
    where = f"line {records.line_num + 1}"
    for cells in records:
        if len(cells) == len(header):
            yield where, TextRow(zip(header, cells, strict=True))
        elif cells:
            problem = f"has {len(cells)} cells under a header of {len(header)}; mend or delete it"
            yield where, RowError("", problem)
        where = f"line {records.line_num + 1}"


def _parquet(stream: IO[bytes]) -> Placed:
    # Buffers, and none in advance: otherwise all of a row group is read at once, and a file may be one row group.
    with pq.ParquetFile(stream, buffer_size=CHUNK, pre_buffer=False) as table:
        yield from _numbered(table.iter_batches(BATCH))


def _arrow(stream: IO[bytes]) -> Placed:
    by_number = stream.read(6) == b"ARROW1"
    stream.seek(0)
    if by_number:
        reader = pa.ipc.open_file(stream)
        yield from _numbered(map(reader.get_batch, range(reader.num_record_batches)))
    else:
        yield from _numbered(pa.ipc.open_stream(stream))


def _numbered(batches: Iterable[pa.RecordBatch]) -> Placed:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # or damaged offsets would be followed out of the file
        for start in range(0, batch.num_rows, BATCH):
            for row in batch.slice(start, BATCH).to_pylist():
                number += 1
                yield f"row {number}", row


READERS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _json),
    **{".csv": _csv, ".tsv": lambda stream: _csv(stream, "\t"), ".parquet": _parquet},
    **dict.fromkeys((".arrow", ".feather", ".ipc"), _arrow),
}
