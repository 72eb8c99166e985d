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
    (rb"(?i)\s*<(!doctype|html|head|!--|\?xml)", "a web page", "the download brought a page: check its link, or log in"),
    (rb"\x1f\x8b", "gzipped twice", "gunzip it once"),
    (rb"PK\x03\x04.{0,4000}?(xl/|\[Content_Types\]\.xml)", "an Excel workbook", "save its sheet as CSV UTF-8"),
    (rb"\xd0\xcf\x11\xe0", "an old Excel or other Office file", "save its sheet as CSV UTF-8"),
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive", "unzip it and name the files in it"),
    (rb".{257}ustar", "a tar archive", "unpack it (tar -xf) and name the files in it"),
    (rb"\xfd7zXZ\0", "an xz file", "unpack it with xz -d"),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "a bzip2 file", "unpack it with bunzip2"),
    (rb"\x28\xb5\x2f\xfd", "a zstd file", "unpack it with zstd -d"),
    (rb"\x80[\x02-\x05]", "a pickle, which could run any code", "where it comes from, write it as JSON lines or Parquet"),
    (rb"FEA1", "a Feather file of version 1", "write it again with pyarrow.feather.write_feather"),
    (rb"PARE", "an encrypted Parquet file", "decrypt it first"),
)
_UTF16 = (  # with a byte-order mark, or, for most texts, by the zeros between the letters
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16"),
    (rb"([^\0]\0){4}", "UTF-16LE"),
    (rb"(\0[^\0]){4}", "UTF-16BE"),
)


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
    for entry in entries:
        if entry is not None and not isinstance(entry, str | Path):
            raise DataError(f"dataset.path: {shown(repr(entry))} is not the name of a file; write names as text")
        if entry is None or not str(entry).strip():
            entries.clear()
            break
        for file in _matches(os.path.expanduser(entry)):
            files.setdefault(os.path.realpath(file), file)
    if not entries:
        raise DataError("dataset.path: no file is given; name a file, a glob ('data/*.parquet'), or a list of them")
    return list(files.values())


def _matches(name: str) -> list[Path]:
    if os.path.lexists(name) or not any(character in name for character in "*?["):
        found = [name]
    else:
        found = sorted(match for match in glob.glob(name, recursive=True) if not os.path.isdir(match))
    if not found:
        raise DataError(f"dataset.path: '{shown(name)}' matches no file in {shown(os.getcwd())}; correct the pattern")
    for match in found:
        _check_file(Path(match))
    return [Path(match) for match in found]


def _check_file(file: Path) -> None:
    if os.path.isdir(file):
        raise DataError(f"{file}: is a folder; {_name_files(file)}")
    if os.path.islink(file) and not os.path.exists(file):
        hint = "run `git annex get` on it" if "annex/objects" in os.readlink(file) else "mend the link"
        raise DataError(f"{file}: is a link to a file that is not there; {hint}")
    if not os.path.exists(file):
        if not os.path.isdir(file.parent):
            raise DataError(f"{file}: no such file, and no folder {file.parent}; check dataset.path")
        try:
            near = difflib.get_close_matches(file.name, os.listdir(file.parent), n=1)
        except OSError:
            near = []
        raise DataError(f"{file}: no such file; {f'did you mean {near[0]}?' if near else 'check dataset.path'}")
    if not os.path.isfile(file):
        raise DataError(f"{file}: is a pipe or device; write the data to a file first")


def _name_files(folder: Path) -> str:
    """The advice to name the folder's files, by the suffix that most of them have."""
    for pattern in ("*", "**/*"):
        names = (found.name for found in itertools.islice(folder.glob(pattern), 10_000) if os.path.isfile(found))
        suffixes = Counter(name[len(_stem(name)) :] for name in names if not name.startswith("."))
        if suffixes:
            best = max(suffixes, key=lambda suffix: (_container_of("x" + suffix) is not None, suffixes[suffix]))
            return f"name its files, '{folder}/{pattern}{best}'"
    return "there is no file in it, check dataset.path"


def _stem(name: str) -> str:
    """The name without .gz and the suffix before it."""
    return os.path.splitext(name[:-3] if name.lower().endswith(".gz") else name)[0]


def _container_of(name: str) -> str | None:
    return SUFFIXES.get(os.path.splitext(name.lower().removesuffix(".gz"))[1])


def rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Pairs of a place for messages ("FILE, line 12") and a row.

    A row is a dict, a TextRow (CSV), or a DataError: a broken row behind which reading can go on, for the caller to
    raise or to count. Raises DataError for all else that is wrong with the file, one that holds no row included.
    """
    place = ""
    try:
        gzipped, head = _read_head(file)
        container = _find_container(file, head)
        for place, row in _read(file, gzipped, container, head):
            yield place, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        behind = f" behind {place.removeprefix(f'{file}, ')}" if place else ""
        problem = "the gzip data end early" if isinstance(error, EOFError) else f"the gzip data are damaged ({error})"
        raise DataError(f"{file}: {problem}{behind}; {_AGAIN}") from error
    except OSError as error:
        hint = "check dataset.path, and whether you may read it"
        if error.errno == errno.ENOSPC:
            hint = f"unpacking it needs room in {tempfile.gettempdir()}: set TMPDIR to a folder that has it"
        raise DataError(f"{file}: cannot be read ({error.strerror or error}); {hint}") from error
    if not place:
        raise DataError(f"{file}: there are no rows; check dataset.path")


def _read_head(file: Path) -> tuple[bool, bytes]:
    """Whether the file is gzipped, and its first bytes, unpacked; behind a byte-order mark and blanks that fill it."""
    with file.open("rb") as raw:
        gzipped = raw.read(2) == b"\x1f\x8b"
    with _open(file, gzipped) as stream:
        head = stream.read(HEAD)
        if not head:
            raise DataError(f"{file}: is empty; {_AGAIN}")
        head = head.removeprefix(codecs.BOM_UTF8)
        while not head.strip():
            head = stream.read(HEAD)
            if not head:
                raise DataError(f"{file}: holds only blank lines; check dataset.path")
    return gzipped, head


def _open(file: Path, gzipped: bool) -> io.BufferedIOBase:
    return gzip.open(file) if gzipped else file.open("rb")


def _find_container(file: Path, head: bytes) -> str:
    """The container by the file's suffix, else by its first bytes. Raises DataError if it is none, or another one."""
    for first, what, way_out in _FOREIGN:
        if re.match(first, head, re.DOTALL):
            raise DataError(f"{file}: is {what}; {way_out}")
    for first, encoding in _UTF16:
        if re.match(first, head, re.DOTALL):
            command = f"iconv -f {encoding} -t UTF-8 {file.name}"
            raise DataError(f"{file}: is {encoding}; convert it (unpack .gz first): {command} > NEW{file.suffix}")
    named = _container_of(file.name)
    found = None
    if head.startswith(b"PAR1"):
        found, suffix = "Parquet", ".parquet"
    elif head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        found, suffix = "Arrow", ".arrow"
    elif re.match(rb'\s*(\{\s*["}]|\[\s*[\[{"\]])' if named == "CSV" else rb"\s*[{[]", head):
        found, suffix = "JSON", ".json" if head.lstrip().startswith(b"[") else ".jsonl"
    elif named in ("Parquet", "Arrow"):
        if _is_text(head):
            raise DataError(f"{file}: is text, not {named}; if it is CSV, rename it to {_renamed(file, '.csv')}")
        raise DataError(f"{file}: does not start as {named} does, so it is damaged or something else; {_AGAIN}")
    if named and found in (None, named):
        return named
    if named:
        raise DataError(f"{file}: is {found}, not {named}; rename it to {_renamed(file, suffix)}")
    if not found:
        raise DataError(f"{file}: neither its suffix nor its start says what it is; name it {', '.join(SUFFIXES)}")
    return found


def _renamed(file: Path, suffix: str) -> str:
    return _stem(file.name) + suffix + (".gz" if file.name.lower().endswith(".gz") else "")


def _is_text(head: bytes) -> bool:
    try:
        return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False


def _read(file: Path, gzipped: bool, container: str, head: bytes) -> Iterator[tuple[str, Any]]:
    if container in ("Parquet", "Arrow"):
        with _unpacked(file, gzipped) as plain:
            yield from _read_table(file, _parquet_batches(plain) if container == "Parquet" else _arrow_batches(plain))
        return
    suffix = os.path.splitext(file.name.lower().removesuffix(".gz"))[1]
    with _open(file, gzipped) as stream:
        if container == "CSV":
            yield from _read_csv(file, stream, "\t" if suffix == ".tsv" else ",")
        elif head.lstrip().startswith(b"["):
            yield from _read_array(file, stream)
        else:
            _refuse_long_document(file, head)
            pairs = _read_lines(file, stream)
            first = list(itertools.islice(pairs, 2)) if suffix == ".json" else []
            if len(first) == 1 and (key := _rows_key(first[0][1])):
                raise DataError(f"{file}: is one object with its rows in a list; {_take_out(key)}")
            yield from itertools.chain(first, pairs)


class _Lines(Iterator[str]):
    """The lines of a stream as text; `number` is that of the last one, `take_problem` what is wrong since it was asked.

    What is broken in a line stays in it as lone surrogates, and what is too long leaves a quote if it held an odd
    number, so that CSV records begin and end where they did.
    """

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self.number = 0
        self._stream = stream
        self._problem: str | None = None

    def __next__(self) -> str:
        line = self._stream.readline(LONGEST_LINE + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if self.number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > LONGEST_LINE:
            self._note(f"is longer than {LONGEST_LINE} bytes; write one row per line, or delete it")
            quotes = line.count(b'"')
            while line and not line.endswith(b"\n"):
                line = self._stream.readline(CHUNK)
                quotes += line.count(b'"')
            return '"' * (quotes % 2) + "\n"
        if b"\0" in line:
            self._note(f"holds a NUL byte, at offset {line.index(0)} of the line, as in a damaged file; {_AGAIN}")
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            byte = f"byte 0x{line[error.start]:02x} at offset {error.start} of the line"
            self._note(f"is not UTF-8 ({byte}); convert the file to UTF-8 or delete the row")
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

    def judge(self, value: Any) -> str | None:
        """What is wrong with a row that was just decoded."""
        if not isinstance(value, dict):
            kinds = {list: "an array", str: "text", bool: "true or false", type(None): "null"}
            return f"is {kinds.get(type(value), 'a number')}, not an object of columns; mend or delete it"
        return f"has the key '{shown(self.repeated[0])}' twice in one object; keep one" if self.repeated else None


def _explain(error: Exception, where: str) -> str:
    """What is wrong with JSON; `where` in the row it is."""
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON ({error.msg}, {where}); mend or delete it"
    if isinstance(error, RecursionError):
        return "is nested too deep; flatten or delete it"
    return "holds a number of too many digits; shorten or delete it"


def _read_lines(file: Path, stream: io.BufferedIOBase) -> Iterator[tuple[str, Any]]:
    lines, decoder = _Lines(stream), _Decoder()
    for text in lines:
        place, row, problem = f"{file}, line {lines.number}", None, lines.take_problem()
        if not problem and not text.strip():
            continue
        if not problem:
            try:
                decoder.repeated.clear()
                row = decoder.decode(text)
                problem = decoder.judge(row)
            except json.JSONDecodeError as error:
                problem = f"is not JSON ({error.msg}, column {error.colno}); write one JSON object per line"
            except (ValueError, RecursionError) as error:
                problem = _explain(error, "")
        yield place, DataError(f"{place}: {problem}") if problem else row


def _take_out(key: str) -> str:
    return f"""take it out of its key '{shown(key)}' (jq -c '.["{shown(key)}"][]')"""


def _rows_key(value: Any) -> str | None:
    """The key of the first list of objects in a document whose lists all hold objects, and none a chat's messages."""
    lists = {key: item for key, item in value.items() if isinstance(item, list)} if isinstance(value, dict) else {}
    for item in itertools.chain.from_iterable(lists.values()):
        if not isinstance(item, dict) or "role" in item or "from" in item:
            return None
    if not all(lists.values()) or any(isinstance(item, dict) for item in value.values()):
        return None
    return next(iter(lists), None)


def _refuse_long_document(file: Path, head: bytes) -> None:
    """Raise if the first object goes on over several lines, as no line of JSON lines does."""
    text = head.decode(errors="ignore").lstrip()
    if len(head) >= HEAD - len(codecs.BOM_UTF8):
        text = text[: text.rfind("\n") + 1]  # so that it ends between two tokens
    first, key = text.find("\n"), None
    try:
        document, end = json.JSONDecoder().raw_decode(text)
        if end <= first or first < 0:
            return
        key = None if text[end:].strip() else _rows_key(document)
    except json.JSONDecodeError as error:
        if error.pos < len(text.rstrip()) or "\n" not in text.rstrip():
            return
        if found := re.search(r'"((?:[^"\\]|\\.)*)"\s*:\s*\[\s*\{', text):
            key = found[1]
    except (ValueError, RecursionError):
        return
    place = f"{file}, line {head[: len(head) - len(head.lstrip())].count(bytes([10])) + 1}"
    hint = f"; if its rows are in a list, {_take_out(key)}" if key else ""
    raise DataError(f"{place}: an object goes on over several lines; write one object per line (jq -c .){hint}")


class _Window:
    """The part of a stream's text that is looked at: it moves forward only, and counts the lines it left behind."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self.text, self.at, self.line, self.ended = "", 0, 1, False
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode

    def more(self) -> bool:
        """Read as much again as is left (so that a long element is not parsed at every chunk), if there is more."""
        if not self.ended:
            chunk = self._stream.read(max(CHUNK, len(self.text) - self.at))
            self.text, self.at, self.ended = self.text[self.at :] + self._decode(chunk, not chunk), 0, not chunk
        return not self.ended

    def move(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def next(self) -> str:
        """The character behind blanks, or none at the end."""
        while True:
            blanks = re.compile(r"[ \t\n\r]*").match(self.text, self.at)
            self.move(blanks.end() if blanks else self.at)
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def take(self) -> str:
        character = self.next()
        self.move(self.at + len(character))
        return character


def _read_array(file: Path, stream: io.BufferedIOBase) -> Iterator[tuple[str, Any]]:
    window, decoder, number = _Window(stream), _Decoder(), 0
    try:
        mark = window.take()
        if window.next() == "]":
            mark = window.take()
        while mark != "]":
            number += 1
            window.next()
            place = f"{file}, line {window.line}"
            yield place, _take_element(window, decoder, f"{place}: element {number} of the array")
            mark = window.take()
            if not mark:
                raise DataError(f"{file}, line {window.line}: the array ends early, behind element {number}; {_AGAIN}")
            if mark not in ",]":
                problem = f"no comma behind element {number} of the array; mend it there"
                raise DataError(f"{file}, line {window.line}: {problem}")
        if window.next():
            problem = "the file goes on behind the end of the array; make it one array, or one object per line"
            raise DataError(f"{file}, line {window.line}: {problem}")
    except UnicodeDecodeError as error:
        line = window.line + window.text.count("\n", window.at) + error.object[: error.start].count(b"\n")
        problem = f"is not UTF-8 (byte 0x{error.object[error.start]:02x}); convert the file to UTF-8"
        raise DataError(f"{file}, line {line}: {problem}") from error


def _take_element(window: _Window, decoder: _Decoder, name: str) -> Any:
    """The next element, or a DataError in its place. Raises DataError if it is not known where the element ends."""
    while True:
        decoder.repeated.clear()
        failure: Exception | None = None
        try:
            row, end = decoder.raw_decode(window.text, window.at)
            if end < len(window.text) or not window.more():  # what a number is at the end of the text, it may not stay
                window.move(end)
                problem = decoder.judge(row)
                return DataError(f"{name} {problem}") if problem else row
        except json.JSONDecodeError as error:
            failure = error
            length = len(window.text) - window.at
            if length <= LONGEST_LINE and window.more():
                continue
            if length > LONGEST_LINE:
                raise DataError(f"{name} is longer than {LONGEST_LINE} characters, or broken; mend or delete it") from error
            if error.pos >= len(window.text.rstrip()) or error.msg.startswith("Unterminated"):
                raise DataError(f"{name} is cut off by the end of the file; {_AGAIN}") from error
            raise DataError(f"{name} {_explain(error, f'at its character {error.pos - window.at + 1}')}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name} {_explain(error, '')}") from error


def _read_csv(file: Path, stream: io.BufferedIOBase, delimiter: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(LONGEST_LINE)
    lines = _Lines(stream)
    records = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    place = ""
    while True:
        start = f"{file}, line {lines.number + 1}"
        cells: list[str] = []
        try:
            cells = next(records)
            problem = lines.take_problem()
        except StopIteration:
            break
        except csv.Error as error:
            reason = str(error).partition(" - ")[0]
            if reason.startswith(("unexpected end", "field larger")):
                problem = "a quote that is opened is not closed" if reason[0] == "u" else "a cell"
        yield from ()


