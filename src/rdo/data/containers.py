"""Containers: a file of JSON lines, a JSON array, CSV, Parquet or Arrow, gzipped or not, becomes a stream of rows.

No file is ever in memory as a whole. What is wrong with a file is raised; what is wrong with a single row, behind which
reading can go on, is handed out in the row's place, so that the caller decides whether to stop or to count it.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import errno
import glob
import gzip
import io
import itertools
import json
import os
import re
import shlex
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rdo.errors import DataError

LONGEST_LINE = 64 * 2**20  # bytes of a line or cell, characters of an element: what one row may take of the memory
CHUNK = 2**20
HEAD = 2**16
BATCH = 256  # rows of Parquet and Arrow that are Python objects at a time

SUFFIXES = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "JSON"),
    **dict.fromkeys((".csv", ".tsv"), "CSV"),
    ".parquet": "Parquet",
    **dict.fromkeys((".arrow", ".feather", ".ipc"), "Arrow"),
}

_AGAIN = "download or copy it again"
_FOREIGN = (  # first bytes, what they say the file is, the way out
    (rb"version https://git-lfs\.github\.com/spec/", "a Git LFS pointer, not the data", "run `git lfs pull`"),
    (rb"((\.\./)*\.git)?/annex/objects/", "a git-annex pointer, not the data", "run `git annex get` on it"),
    (rb"(?i)\s*<(!doctype|html|head|!--|\?xml)", "a web page", "the download went wrong: check its link, or log in"),
    (rb"\x1f\x8b", "gzipped twice", "gunzip it once"),
    (rb"PK\x03\x04.{0,4000}?(xl/|\[Content_Types\]\.xml)", "an Excel workbook", "save its sheet as CSV UTF-8"),
    (rb"\xd0\xcf\x11\xe0", "an old Excel or other Office file", "save its sheet as CSV UTF-8"),
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive", "unzip it and name the files in it"),
    (rb".{257}ustar", "a tar archive", "unpack it (tar -xf) and name the files in it"),
    (rb"\xfd7zXZ\0", "an xz file", "unpack it with xz -d"),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "a bzip2 file", "unpack it with bunzip2"),
    (rb"\x28\xb5\x2f\xfd", "a zstd file", "unpack it with zstd -d"),
    (rb"\x80[\x02-\x05]", "a pickle, which may run any code", "have it written as JSON lines or Parquet"),
    (rb"FEA1", "a Feather file of version 1", "write it again with pyarrow.feather.write_feather"),
    (rb"PARE", "an encrypted Parquet file", "decrypt it first"),
)
_ENCODINGS = (  # with a byte-order mark, or, for most texts, by the zeros between the letters
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16"),
    (rb"([^\0]\0){4}", "UTF-16LE"),
    (rb"(\0[^\0]){4}", "UTF-16BE"),
)
_BLANKS = re.compile(r"[ \t\n\r]*")


class _Broken(Exception):
    """What is wrong with a file, or a row of it: a message to be put behind the file's name or the row's place."""

    def __init__(self, problem: str, where: str = "") -> None:
        super().__init__(f", {where}: {problem}" if where else f": {problem}")


class TextRow(dict[str, Any]):
    """A row whose cells are all text (CSV): numbers and lists in it are still to be parsed."""


def shown(text: str, width: int = 60) -> str:
    """Text of the data for a message: control characters escaped, shortened."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: width + 1])
    return escaped if len(escaped) <= width else escaped[: width - 1] + "…"


def resolve(path: Any) -> list[Path]:
    """The files that dataset.path names: a file, a glob ('data/*.parquet', '**' too), or a list of either.

    Sorted within a glob, no file twice, `~` is the home folder. Raises DataError where a file is missing or none.
    """
    entries = list(path) if isinstance(path, Sequence) and not isinstance(path, str | bytes) else [path]
    files: dict[str, Path] = {}
    for entry in entries or [None]:
        if entry is None or (isinstance(entry, str) and not entry.strip()):
            raise DataError("dataset.path: no file is given; name a file, a glob ('data/*.parquet'), or a list of them")
        if not isinstance(entry, str | Path):
            raise DataError(f"dataset.path: {shown(repr(entry))} is no text; write names of files in quotes")
        for file in _matches(os.path.expanduser(entry)):
            files.setdefault(os.path.realpath(file), file)
    return list(files.values())


def _matches(name: str) -> list[Path]:
    if "\0" in name:
        raise DataError(f"dataset.path: '{shown(name)}' holds a NUL character; correct the name")
    found = [name]
    if any(character in name for character in "*?[") and not os.path.lexists(name):
        found = sorted(match for match in glob.glob(name, recursive=True) if not os.path.isdir(match))
    if not found:
        raise DataError(f"{name}: the pattern matches no file; correct it, seen from {os.getcwd()}")
    for match in found:
        _check_file(Path(match))
    return [Path(match) for match in found]


def _check_file(file: Path) -> None:
    if os.path.isdir(file):
        raise DataError(f"{file}: is a folder; {_name_files(file)}")
    if os.path.islink(file) and not os.path.exists(file):
        way_out = "run `git annex get` on it" if "annex/objects" in os.readlink(file) else "mend the link"
        raise DataError(f"{file}: is a link to a file that is not there; {way_out}")
    if not os.path.exists(file):
        try:
            near = difflib.get_close_matches(file.name, os.listdir(file.parent), n=1)
        except OSError:
            near = []
        way_out = f"did you mean {shown(near[0])}?" if near else "check dataset.path"
        missing = "such file" if os.path.isdir(file.parent) else f"folder {file.parent}"
        raise DataError(f"{file}: there is no {missing}; {way_out}")
    if not os.path.isfile(file):
        raise DataError(f"{file}: is a pipe or device, not a file; write the data to a file first")


def _name_files(folder: Path) -> str:
    """The advice to name the folder's files, by the suffix that most of them have."""
    for pattern in ("*", "**/*"):
        files = (file for file in itertools.islice(folder.glob(pattern), 10_000) if os.path.isfile(file))
        suffixes = Counter(file.name[len(_stem(file)) :] for file in files if not file.name.startswith("."))
        if suffixes:
            best = max(suffixes, key=lambda suffix: (_suffix(Path("x" + suffix)) in SUFFIXES, suffixes[suffix]))
            return f"name its files, '{folder}/{pattern}{best}'"
    return "there is no file in it, check dataset.path"


def _stem(file: Path) -> str:
    """The file's name without .gz and the suffix before it."""
    return os.path.splitext(file.name[: -3 if file.suffix.lower() == ".gz" else None])[0]


def _suffix(file: Path) -> str:
    return os.path.splitext(file.name.lower().removesuffix(".gz"))[1]


def rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Pairs of a place for messages ("FILE, line 12") and a row.

    A row is a dict, a TextRow (CSV), or a DataError: a broken row behind which reading can go on, for the caller to
    raise or to count. Raises DataError for all else that is wrong with the file, one that holds no row included.
    """
    place = ""
    try:
        for where, row in _rows(file):
            place = f"{file}, {where}"
            yield place, DataError(f"{place}{row}") if isinstance(row, _Broken) else row
    except _Broken as broken:
        raise DataError(f"{file}{broken}") from broken
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problem = "the gzip data end early" if isinstance(error, EOFError) else f"the gzip data are damaged ({error})"
        raise DataError(f"{place or file}: {problem}{' behind it' if place else ''}; {_AGAIN}") from error
    except OSError as error:
        way_out = "check dataset.path, and whether you may read it"
        if error.errno == errno.ENOSPC:
            way_out = f"it is unpacked to {tempfile.gettempdir()}: make room, or set TMPDIR to a folder with room"
        raise DataError(f"{file}: cannot be read ({error.strerror or error}); {way_out}") from error
    if not place:
        raise DataError(f"{file}: there are no rows; check dataset.path")


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Pairs of a place within the file ("line 12") and a row, or _Broken in its place."""
    with file.open("rb") as raw:
        gzipped = raw.read(2) == b"\x1f\x8b"
    with _open(file, gzipped) as stream:
        head = _read_head(stream)
    container, suffix = _find_container(file, head), _suffix(file)
    if container in ("Parquet", "Arrow"):
        with _unpacked(file, gzipped) as plain:
            yield from _read_table(plain, container)
        return
    with _open(file, gzipped) as stream:
        if container == "CSV":
            yield from _read_csv(stream, "\t" if suffix == ".tsv" else ",")
        elif head.lstrip().startswith(b"["):
            yield from _read_array(stream)
        else:
            _refuse_long_object(head)
            pairs = _read_lines(stream)
            first = list(itertools.islice(pairs, 2)) if suffix == ".json" else []
            if len(first) == 1 and (key := _rows_key(first[0][1])):
                raise _Broken(f"is one object with the rows in a list; {_take_out(key)}", first[0][0])
            yield from itertools.chain(first, pairs)


def _open(file: Path, gzipped: bool) -> io.BufferedIOBase:
    return gzip.open(file) if gzipped else file.open("rb")


@contextmanager
def _unpacked(file: Path, gzipped: bool) -> Iterator[Path]:
    """The file, or an unpacked copy that is removed afterwards: Parquet and Arrow are not read from front to back."""
    if not gzipped:
        yield file
        return
    with tempfile.NamedTemporaryFile(prefix="rdo-") as copy:
        with gzip.open(file) as stream:
            shutil.copyfileobj(stream, copy, CHUNK)
        copy.flush()
        yield Path(copy.name)


def _read_head(stream: io.BufferedIOBase) -> bytes:
    """The first bytes, behind a byte-order mark; of a file that begins with very many blanks, those behind them."""
    head = stream.read(HEAD)
    if not head:
        raise _Broken(f"is empty; {_AGAIN}")
    head = head.removeprefix(codecs.BOM_UTF8)
    while not head.strip():
        head = stream.read(HEAD)
        if not head:
            raise _Broken("holds only blank lines; check dataset.path")
    return head


def _find_container(file: Path, head: bytes) -> str:
    """The container by the file's suffix, else by its first bytes; _Broken if it is none, or another one."""
    for first, what, way_out in _FOREIGN:
        if re.match(first, head, re.DOTALL):
            raise _Broken(f"is {what}; {way_out}")
    suffix, name, zipped = _suffix(file), shlex.quote(str(file)), file.suffix.lower() == ".gz"
    for first, encoding in _ENCODINGS:
        if re.match(first, head, re.DOTALL):
            convert = f"iconv -f {encoding} -t UTF-8"
            command = f"gzip -dc {name} | {convert}" if zipped else f"{convert} {name}"
            raise _Broken(f"is {encoding}; convert it to UTF-8: {command} > NEW{suffix}")
    named = SUFFIXES.get(suffix, "")
    found, right = _tell(head, strictly=named == "CSV")
    if named in ("", found) or (named in ("JSON", "CSV") and not found):
        if named or found:
            return named or found
        raise _Broken(f"neither its suffix nor its start says what it is; name it {', '.join(SUFFIXES)}")
    if found:
        problem, right = f"is {found}, though its suffix says {named}; rename it", right
    elif re.search(rb"[\0-\x08\x0e-\x1f]", head):
        raise _Broken(f"does not start as {named} does, so it is damaged or something else; {_AGAIN}")
    else:
        problem, right = f"is text, not {named}; if it is CSV, rename it", ".csv"
    raise _Broken(f"{problem} to {_stem(file)}{right}{file.suffix if zipped else ''}")


def _tell(head: bytes, strictly: bool) -> tuple[str, str]:
    """The container and its suffix by the first bytes, or nothing; `strictly`: a bracket alone makes no JSON."""
    if head.startswith(b"PAR1"):
        return "Parquet", ".parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "Arrow", ".arrow"
    if re.match(rb'\s*(\{\s*["}]|\[\s*[\[{"\]])' if strictly else rb"\s*[{[]", head):
        return "JSON", ".json" if head.lstrip().startswith(b"[") else ".jsonl"
    return "", ""


class _Lines(Iterator[str]):
    """The lines of a stream as text; `take_problem` says what was wrong since it was last asked.

    Bytes that are no text stay in a line as lone surrogates, and of a line that is too long a quote stays if it held an
    odd number: so CSV records begin and end where they did.
    """

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self.number = 0  # of the last line
        self._stream = stream
        self._problem: str | None = None

    def __next__(self) -> str:
        line = self._stream.readline(LONGEST_LINE + 1)
        if not line:
            raise StopIteration
        self.number += 1
        mark = codecs.BOM_UTF8 if self.number == 1 and line.startswith(codecs.BOM_UTF8) else b""
        if len(line) > LONGEST_LINE:
            self._note(f"is longer than {LONGEST_LINE:,} bytes; write one row per line")
            quotes = line.count(b'"')
            while line and not line.endswith(b"\n"):
                line = self._stream.readline(CHUNK)
                quotes += line.count(b'"')
            return '"' * (quotes % 2) + "\n"
        if b"\0" in line:
            self._note(f"holds a NUL byte (offset {line.index(0)} of the line), as damaged files do; {_AGAIN}")
        try:
            return line.removeprefix(mark).decode()
        except UnicodeDecodeError as error:
            at = error.start + len(mark)
            self._note(f"is not UTF-8 (byte 0x{line[at]:02x} at offset {at} of the line); convert the file to UTF-8")
            return line.decode(errors="surrogateescape")

    def _note(self, problem: str) -> None:
        self._problem = self._problem or problem

    def take_problem(self) -> str | None:
        problem, self._problem = self._problem, None
        return problem


class _Decoder(json.JSONDecoder):
    """A JSON decoder that remembers keys given twice, of which the module would silently keep the last."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._pairs)
        self.repeated: list[str] = []

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            self.repeated.append(Counter(key for key, _ in pairs).most_common(1)[0][0])
        return value

    def take_problem(self, value: Any) -> str | None:
        """What is wrong with a row that was just decoded."""
        repeated, self.repeated = self.repeated, []
        if not isinstance(value, dict):
            names = {list: "an array", str: "text", bool: "true or false", type(None): "null"}
            return f"is {names.get(type(value), 'a number')}, not an object; write one object of columns per row"
        return f"has the key '{shown(repeated[0])}' twice in one object; keep one" if repeated else None


def _explain(error: Exception, where: str) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON ({error.msg}, {where}); mend or delete it"
    if isinstance(error, RecursionError):
        return "is nested too deep; flatten or delete it"
    return "holds a number of too many digits; shorten or delete it"


def _read_lines(stream: io.BufferedIOBase) -> Iterator[tuple[str, Any]]:
    lines, decoder = _Lines(stream), _Decoder()
    for text in lines:
        row, problem = None, lines.take_problem()
        if not problem and not text.strip():
            continue
        if not problem:
            try:
                row = decoder.decode(text.rstrip("\r\n"))
                problem = decoder.take_problem(row)
            except (ValueError, RecursionError) as error:
                problem = _explain(error, f"column {getattr(error, 'pos', 0) + 1}")
                decoder.repeated.clear()
        yield f"line {lines.number}", _Broken(problem) if problem else row


def _rows_key(value: Any) -> str | None:
    """The key under which the only object of a file seems to hold the rows: all its lists hold objects, no messages."""
    if not isinstance(value, dict) or any(isinstance(part, dict) for part in value.values()):
        return None
    lists = {key: part for key, part in value.items() if isinstance(part, list)}
    parts = list(itertools.chain.from_iterable(lists.values()))
    if all(lists.values()) and all(isinstance(part, dict) and not {"role", "from"} & part.keys() for part in parts):
        return next(iter(lists), None)
    return None


def _take_out(key: str) -> str:
    return f"""take it out of its key '{shown(key)}' (jq -c '.["{shown(key)}"][]')"""


def _refuse_long_object(head: bytes) -> None:
    """Raise if the first object goes on over several lines, as none of JSON lines does."""
    text = head.decode(errors="ignore")
    if len(head) >= HEAD - len(codecs.BOM_UTF8):
        text = text[: text.rfind("\n") + 1]  # cut between two tokens
    line, text = text[: len(text) - len(text.lstrip())].count("\n") + 1, text.strip()
    try:
        document, end = json.JSONDecoder().raw_decode(text)
        key = None if text[end:] else _rows_key(document)
        text = text[:end]
    except json.JSONDecodeError as error:
        if error.pos < len(text):  # broken, not unfinished
            return
        found = re.search(r'"((?:[^"\\]|\\.)*)"\s*:\s*\[\s*\{', text)
        key = found[1] if found else None
    except (ValueError, RecursionError):
        return
    if "\n" in text:
        way_out = f"; if its list '{shown(key)}' holds the rows, {_take_out(key)}" if key else ""
        problem = "an object goes on over several lines; write one object per line (jq -c .)"
        raise _Broken(f"{problem}{way_out}", f"line {line}")


class _Window:
    """The part of a stream's text that is looked at; it only moves forward, and counts the lines that it left."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self.text, self.at, self.line = "", 0, 1
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def more(self) -> bool:
        """Read as much again as is left, so that a long element is not parsed at every chunk; False at the end."""
        chunk = self._stream.read(max(CHUNK, len(self.text) - self.at))
        try:
            more = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n", self.at) + error.object.count(b"\n", 0, error.start)
            problem = f"is not UTF-8 (byte 0x{error.object[error.start]:02x}); convert the file to UTF-8"
            raise _Broken(problem, f"line {line}") from error
        if chunk:
            self.text, self.at = self.text[self.at :] + more, 0
        return bool(chunk)

    def move(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def next(self) -> str:
        """The next character that is not blank, or nothing at the end."""
        while True:
            blanks = _BLANKS.match(self.text, self.at)
            self.move(blanks.end() if blanks else self.at)
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def take(self) -> str:
        character = self.next()
        self.move(self.at + len(character))
        return character


def _read_array(stream: io.BufferedIOBase) -> Iterator[tuple[str, Any]]:
    window, decoder, number = _Window(stream), _Decoder(), 0
    mark = window.take()
    if window.next() == "]":
        mark = window.take()
    while mark != "]":
        number += 1
        window.next()
        yield f"line {window.line}", _take_element(window, decoder, f"element {number} of the array")
        mark = window.take()
        if not mark:
            raise _Broken(f"the array ends early, behind element {number}; {_AGAIN}", f"line {window.line}")
        if mark not in ",]":
            raise _Broken(f"a comma is missing behind element {number}; mend the array", f"line {window.line}")
    if window.next():
        problem = "text behind the end of the array; write one array, or one object per line"
        raise _Broken(problem, f"line {window.line}")


def _take_element(window: _Window, decoder: _Decoder, name: str) -> Any:
    """The next element, or _Broken in its place. Raises _Broken if nobody can tell where it ends."""
    while True:
        length = len(window.text) - window.at
        try:
            row, end = decoder.raw_decode(window.text, window.at)
        except (ValueError, RecursionError) as error:
            problem = _explain(error, f"at its character {getattr(error, 'pos', 0) - window.at + 1}")
            if isinstance(error, json.JSONDecodeError):
                # 16: more than any token that the end of the text may have broken
                rest = 0 if error.msg.startswith("Unterminated") else len(window.text.rstrip()) - error.pos
                if rest < 16 and length > LONGEST_LINE:
                    problem = f"is longer than {LONGEST_LINE:,} characters; shorten or delete it"
                elif rest < 16 and window.more():
                    continue
                elif rest <= 0:
                    problem = f"is cut off by the end of the file; {_AGAIN}"
            raise _Broken(f"{name} {problem}", f"line {window.line}") from error
        if len(window.text) - end < 3 and window.more():  # a number may go on, also behind "e+"
            continue
        window.move(end)
        found = decoder.take_problem(row)
        return _Broken(f"{name} {found}") if found else row


def _read_csv(stream: io.BufferedIOBase, delimiter: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(LONGEST_LINE)
    lines, header, any_row = _Lines(stream), list[str](), False
    records = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        where, cells = f"line {lines.number + 1}", list[str]()
        try:
            cells = next(records)
            problem = lines.take_problem()
        except StopIteration:
            break
        except csv.Error as error:
            reason = str(error).partition(" - ")[0]
            if reason.startswith(("unexpected end", "field larger")):  # it swallowed rows, nobody knows how many
                problem = f"a quote that opens in this row is never closed; mend it, or {_AGAIN}"
                raise _Broken(problem, where) from error
            problem = lines.take_problem() or f"is not CSV ({reason}); quote the cell, and double the quotes in it"
        if not problem and len(cells) < 2 and not "".join(cells).strip():
            continue
        if not header:
            header, problem = cells, problem or _judge_header(cells, delimiter)
            if problem:
                raise _Broken(f"the header {problem}", where)
            continue
        if not problem and len(cells) != len(header):
            problem = (
                f"{len(cells)} cells under a header of {len(header)}; quote cells that hold separators or line breaks"
            )
        any_row = True
        yield where, _Broken(problem) if problem else TextRow(zip(header, cells, strict=True))
    if not any_row:
        raise _Broken(f"holds a header and no rows; {_AGAIN}")


def _judge_header(header: list[str], delimiter: str) -> str | None:
    for number, name in enumerate(header, start=1):
        if not name.strip():
            return f"has no name for column {number}; name it (pandas: write with index=False)"
        if name in header[: number - 1]:
            return f"has the column '{shown(name)}' twice; rename one"
    other = next((sign for sign in ";\t,|" if sign in header[0] and sign != delimiter), None)
    if len(header) == 1 and other:
        return f"seems to be separated by '{shown(other)}'; separate by commas in .csv, by tabs in .tsv"
    return None


def _read_table(file: Path, container: str) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        for batch in _parquet_batches(file) if container == "Parquet" else _arrow_batches(file):
            name, count = Counter(batch.schema.names).most_common(1)[0]
            if count > 1:
                raise _Broken("two columns have this name; rename one", f"row 1, field '{shown(name)}'")
            for row in _python_rows(batch):
                number += 1
                yield f"row {number}", row
    except _Broken:
        raise
    except Exception as error:  # on damaged bytes, pyarrow raises nearly anything
        if isinstance(error, OSError) and error.errno:
            raise
        where = f" at row {number + 1} or behind it" if number else ""
        reason = shown(str(error).partition("\n")[0], 120)
        raise _Broken(f"{container} that is cut off or damaged{where} ({reason}); {_AGAIN}") from error


def _parquet_batches(file: Path) -> Iterator[pa.RecordBatch]:
    # Buffers, and none in advance: otherwise all of a row group is read at once, and a file may be one row group.
    with pq.ParquetFile(file, buffer_size=CHUNK, pre_buffer=False, page_checksum_verification=True) as table:
        yield from table.iter_batches(BATCH)


def _arrow_batches(file: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(file)) as source:
        seekable = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pa.ipc.open_file(source) if seekable else pa.ipc.open_stream(source)
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if seekable else reader:
            batch.validate(full=True)  # or damaged offsets would be followed out of the file
            for start in range(0, batch.num_rows, BATCH):
                yield batch.slice(start, BATCH)


def _python_rows(batch: pa.RecordBatch) -> Iterator[Any]:
    """The rows as JSON would hold them (dates as text, decimals as numbers), or _Broken for one that cannot be read."""
    for index, field in enumerate(batch.schema):
        if pa.types.is_temporal(field.type) or pa.types.is_decimal(field.type):
            kind = pa.float64() if pa.types.is_decimal(field.type) else pa.string()
            batch = batch.set_column(index, field.name, batch.column(index).cast(kind))
    try:
        yield from batch.to_pylist()
    except Exception:
        for number in range(batch.num_rows):
            yield _python_row(batch.slice(number, 1))


def _python_row(batch: pa.RecordBatch) -> Any:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column.to_pylist()[0]
        except Exception as error:
            return _Broken(f"cannot be read ({shown(str(error))}); mend or delete it", f"field '{shown(name)}'")
    return row
