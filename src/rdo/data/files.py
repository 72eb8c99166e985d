"""Rows of any file that fsspec opens: JSON lines, a JSON array, CSV, TSV, Parquet or Arrow, compressed or not.

No file is ever in memory as a whole. What is wrong with a file is raised; what is wrong with a single row, behind which
reading can go on, is handed out in the row's place, so that the caller decides whether to stop or to count it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from rdo.errors import DataError
from rdo.progress import progress_bar

CHUNK = 2**20  # bytes or characters that are read at a time
BATCH = 256  # rows of a table that are Python objects at a time
LONGEST_CELL = 2**26  # characters of CSV
COMPRESSED = re.compile(r"\.(gz|bz2|xz|zst)$", re.IGNORECASE)


class TextRow(dict[str, Any]):
    """A row whose cells are all text (CSV): numbers and lists in it are still to be parsed."""


def resolve(path: Any) -> list[str]:
    """The files that dataset.path names: a file, a glob ('data/*.parquet', '**' too), or a list of either.

    Sorted within a glob, no file twice. Raises DataError where a file is missing, or none is named.
    """
    files: dict[str, None] = {}
    for entry in [path] if isinstance(path, str) else path or []:
        with refused(entry):
            system, name = fsspec.url_to_fs(entry)
            found = sorted(system.glob(name)) if re.search(r"[*?[]", name) and not system.exists(name) else [name]
            found = [file for file in found if not system.isdir(file)]
            if not found or not all(map(system.exists, found)):
                raise DataError(f"{entry}: there is no such file; check dataset.path")
            files.update(dict.fromkeys(map(system.unstrip_protocol, found)))
    if not files:
        raise DataError("dataset.path: no file is given; name a file, a glob ('data/*.parquet'), or a list of them")
    return [file.removeprefix("file://") for file in files]


def state(file: str) -> str:
    """What tells a file that was written to, or replaced, from the one before."""
    with refused(file):
        system, name = fsspec.url_to_fs(file)
        return str(system.ukey(name))


def content_hash(files: list[str]) -> list[list[str]]:
    """Path and hash of the content of every file. Time of change and size would not do: tools that copy files keep the
    time (cp -p, rsync -t), and a copy of the same content has another."""
    hashes = []
    with progress_bar(None, "hashing data files", unit="B") as bar:
        for file in files:
            digest = hashlib.blake2b(digest_size=16)
            with refused(file), fsspec.open(file, "rb") as stream:
                while block := stream.read(4 * CHUNK):
                    digest.update(block)
                    bar.update(len(block))
            hashes.append([file, digest.hexdigest()])
    return hashes


def rows(file: str) -> Iterator[tuple[str, Any]]:
    """Pairs of a place for messages ("FILE, line 12") and a row.

    A row is a dict, a TextRow (CSV), or a DataError: a broken row behind which reading can go on, for the caller to
    raise or to count. Raises DataError for all else that is wrong with the file, one that holds no row included.
    """
    suffix = COMPRESSED.sub("", file).rpartition(".")[2].lower()
    if suffix not in READERS:
        raise DataError(f"{file}: must be named {', '.join(f'.{known}' for known in READERS)} (and .gz behind it)")
    place = ""
    with refused(lambda: place or file), fsspec.open(file, "rb", compression="infer") as stream:
        for where, row in READERS[suffix](stream):
            place = f"{file}, {where}"
            yield place, DataError(f"{place}: {row}; mend or delete it") if isinstance(row, ValueError) else row
    if not place:
        raise DataError(f"{file}: there are no rows; check dataset.path")


@contextmanager
def refused(place: Any) -> Iterator[None]:
    """Whatever the system, a decompressor or pyarrow says of a file becomes one line; the place is a text, or makes it."""
    try:
        yield
    except (DataError, GeneratorExit):
        raise
    except Exception as error:  # on damaged bytes, pyarrow raises nearly anything
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        where = f"{place()}, or behind it" if callable(place) and ", " in place() else place() if callable(place) else place
        raise DataError(f"{where}: cannot be read ({reason}); check it, or copy it again") from error


def _json(stream: IO[bytes]) -> Iterator[tuple[str, Any]]:
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
                yield f"line {number}", ValueError(f"is not an object of JSON, as each line must be ({error})")


def _array(stream: IO[str]) -> Iterator[tuple[str, Any]]:
    """The elements of an array; behind one that is damaged nobody knows where the next begins."""
    decoder, text, number, ended = json.JSONDecoder(), "", 0, False
    while True:
        number += 1
        while True:  # until an element, and what is behind it, is in memory
            text = text.lstrip("[, \t\r\n") if number == 1 else text.lstrip(", \t\r\n")
            try:
                if text.startswith("]") and (number > 1 or ended):
                    return
                row, end = decoder.raw_decode(text)
                if end < len(text) - 2 or ended:
                    break
            except ValueError as error:
                if ended:
                    raise ValueError(f"element {number} of the array: {error}") from error
            more = stream.read(max(CHUNK, len(text)))
            text, ended = text + more, not more
        text = text[end:]
        yield f"element {number}", row


def _csv(stream: IO[bytes], delimiter: str = ",") -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(LONGEST_CELL)
    # Bytes that are no text become lone surrogates, which no column may hold.
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    records = csv.reader(lines, delimiter=delimiter, strict=True)
    header = next(records, [])
    if len(set(header)) < len(header):
        raise ValueError("two columns of the header have the same name")
    while True:
        where = f"line {records.line_num + 1}"
        try:
            cells = next(records, None)
            if cells is None:
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


def _tsv(stream: IO[bytes]) -> Iterator[tuple[str, Any]]:
    return _csv(stream, "\t")


def _parquet(stream: IO[bytes]) -> Iterator[tuple[str, Any]]:
    # Buffers, and none in advance: otherwise all of a row group is read at once, and a file may be one row group.
    with _seekable(stream) as file, pq.ParquetFile(file, buffer_size=CHUNK, pre_buffer=False) as table:
        yield from _table(table.iter_batches(BATCH))


def _arrow(stream: IO[bytes]) -> Iterator[tuple[str, Any]]:
    with _seekable(stream) as file:
        by_number = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = pa.ipc.open_file(file) if by_number else pa.ipc.open_stream(file)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if by_number else reader
        yield from _table(part for batch in batches for part in _slices(batch))


def _slices(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    batch.validate(full=True)  # or damaged offsets would be followed out of the file
    return (batch.slice(start, BATCH) for start in range(0, batch.num_rows, BATCH))


def _table(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[str, Any]]:
    return ((f"row {number}", row) for number, row in enumerate((row for b in batches for row in b.to_pylist()), 1))


@contextmanager
def _seekable(stream: IO[bytes]) -> Iterator[Any]:
    """The stream, or a copy of what it unpacks: Parquet and Arrow are not read from front to back."""
    if isinstance(getattr(stream, "raw", stream), io.FileIO) or type(stream).__name__ == "LocalFileOpener":
        yield stream
        return
    with tempfile.TemporaryFile(prefix="rdo-") as copy:
        shutil.copyfileobj(stream, copy, CHUNK)
        copy.seek(0)
        yield copy


READERS: dict[str, Callable[[IO[bytes]], Iterator[tuple[str, Any]]]] = {
    **dict.fromkeys(("jsonl", "ndjson", "json"), _json),
    "csv": _csv,
    "tsv": _tsv,
    "parquet": _parquet,
    **dict.fromkeys(("arrow", "feather", "ipc"), _arrow),
}
