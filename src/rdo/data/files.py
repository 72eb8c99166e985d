"""Rows of any file that fsspec opens: JSON lines, a JSON array, CSV, TSV, Parquet or Arrow, compressed or not.

No file is ever in memory as a whole, but a Parquet or Arrow file that is gzipped on top. What is wrong with a file is
raised; what is wrong with a row, behind which reading can go on, is handed out in its place, to be raised or counted.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import OpenFile
from fsspec.implementations.local import LocalFileOpener

from rdo.data.columns import RowError
from rdo.runtime.errors import DataError

CHUNK = 2**20  # bytes or characters that are read at a time
BATCH = 256  # rows of a table that are Python objects at a time
LONGEST = 2**26  # characters of a cell of CSV, or an element of an array
Placed = Iterator[tuple[str, Any]]
_BETWEEN = re.compile(r"[, \t\r\n]*")


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


def rows(file: OpenFile) -> Placed:
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
            for where, row in READERS[suffix](stream, bool(file.compression)):
                place = f"{name}, {where}"
                yield place, RowError("", f"{row}; mend or delete it") if isinstance(row, ValueError) else row
    except Exception as error:  # of damaged bytes, decompressors and pyarrow raise nearly anything
        behind = "" if place == name else " or behind it"
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise DataError(f"{place}{behind}: cannot be read as {suffix} ({reason}); copy the file again") from error
    if place == name:
        raise DataError(f"{name}: there are no rows; check dataset.path")


def _json(stream: IO[bytes], _: bool) -> Placed:
    head = stream.read(CHUNK).removeprefix(b"\xef\xbb\xbf")
    stream.seek(0)
    if head.lstrip().startswith(b"["):
        yield from _array(io.TextIOWrapper(stream, encoding="utf-8-sig"))
        return
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"line {number}", ValueError(f"is not JSON, of which each line must be an object ({error})")


def _array(stream: IO[str]) -> Placed:
    """The elements of an array; behind one that is damaged nobody knows where the next begins."""
    decoder, text, at, number, more = json.JSONDecoder(), stream.read(CHUNK).lstrip()[1:], 0, 0, "?"
    while True:
        at += len(_BETWEEN.match(text, at)[0])  # type: ignore[index]
        if text.startswith("]", at):
            return
        try:
            row, end = decoder.raw_decode(text, at)
        except ValueError:
            if not more or len(text) - at > LONGEST:
                raise
            end = len(text)
        if more and end > len(text) - 2:  # what is broken, or ends here, may go on
            more = stream.read(max(CHUNK, len(text) - at))
            text, at = text[at:] + more, 0
            continue
        number, at = number + 1, end
        yield f"element {number}", row


def _csv(stream: IO[bytes], _: bool, delimiter: str = ",") -> Placed:
    csv.field_size_limit(LONGEST)
    # Bytes that are no text become lone surrogates, which no column may hold.
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    records = csv.reader(lines, delimiter=delimiter, strict=True)
    header = next(records, [])
    if len(set(header)) < len(header):
        raise ValueError("two columns of the header have the same name")
    while True:
        where = f"line {records.line_num + 1}"
        try:
            cells = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            if str(error).startswith(("unexpected end", "field larger")):  # it swallowed rows, nobody knows how many
                raise ValueError(f"a quote that opens in {where} is never closed") from error
            yield where, ValueError(f"is not CSV ({error})")
            continue
        if len(cells) == len(header):
            yield where, TextRow(zip(header, cells, strict=True))
        elif cells:
            yield where, ValueError(f"has {len(cells)} cells under a header of {len(header)}")


def _parquet(stream: IO[bytes], packed: bool) -> Placed:
    # Buffers, and none in advance: otherwise all of a row group is read at once, and a file may be one row group.
    file = io.BytesIO(stream.read()) if packed else stream
    with pq.ParquetFile(file, buffer_size=CHUNK, pre_buffer=False) as table:
        yield from _numbered(table.iter_batches(BATCH))


def _arrow(stream: IO[bytes], packed: bool) -> Placed:
    whole = io.BytesIO(stream.read()) if packed else stream
    file = pa.memory_map(stream.path) if isinstance(stream, LocalFileOpener) else whole
    by_number = file.read(6) == b"ARROW1"
    file.seek(0)
    reader = pa.ipc.open_file(file) if by_number else pa.ipc.open_stream(file)
    yield from _numbered(map(reader.get_batch, range(reader.num_record_batches)) if by_number else reader)


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
    **{".csv": _csv, ".tsv": lambda stream, _: _csv(stream, _, "\t"), ".parquet": _parquet},
    **dict.fromkeys((".arrow", ".feather", ".ipc"), _arrow),
}
