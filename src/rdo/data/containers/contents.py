"""What a file's first bytes say about it, and its bytes as a stream, gzipped or not."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rdo.data.containers.paths import SUFFIXES, stem_of, suffix_of
from rdo.data.containers.problems import AGAIN, Broken
from rdo.data.containers.text import CHUNK

HEAD = 2**16  # bytes by which a file is judged

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


@contextmanager
def opened(file: Path) -> Iterator[io.BufferedIOBase]:
    """The file's bytes, unpacked if they are gzipped, whatever its name says."""
    with file.open("rb") as raw:
        gzipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        with gzip.open(raw) if gzipped else raw as stream:
            yield stream


@contextmanager
def unpacked(file: Path, stream: io.BufferedIOBase) -> Iterator[Path]:
    """The file, or an unpacked copy that is removed afterwards: Parquet and Arrow are not read from front to back."""
    if not isinstance(stream, gzip.GzipFile):
        yield file
        return
    with tempfile.NamedTemporaryFile(prefix="rdo-") as copy:
        shutil.copyfileobj(stream, copy, CHUNK)
        copy.flush()
        yield Path(copy.name)


def read_head(stream: io.BufferedIOBase) -> bytes:
    """The first bytes, behind a byte-order mark; of a file that begins with very many blanks, those behind them."""
    head = stream.read(HEAD)
    if not head:
        raise Broken(f"is empty; {AGAIN}")
    head = head.removeprefix(codecs.BOM_UTF8)
    while not head.strip():
        head = stream.read(HEAD)
        if not head:
            raise Broken("holds only blank lines; check dataset.path")
    return head


def find_container(file: Path, head: bytes) -> str:
    """The container by the file's suffix, else by its first bytes; raises Broken if it is none, or another one."""
    for first, what, way_out in _FOREIGN:
        if re.match(first, head, re.DOTALL):
            raise Broken(f"is {what}; {way_out}")
    suffix, name, zipped = suffix_of(file), shlex.quote(str(file)), file.suffix.lower() == ".gz"
    for first, encoding in _ENCODINGS:
        if re.match(first, head, re.DOTALL):
            convert = f"iconv -f {encoding} -t UTF-8"
            command = f"gzip -dc {name} | {convert}" if zipped else f"{convert} {name}"
            raise Broken(f"is {encoding}; convert it to UTF-8: {command} > NEW{suffix}")
    if re.fullmatch(rb"\s*[^[\0-\x08\n][^\0-\x08\n]*\r[^\0-\x08\n]*", head.rstrip()):
        command = f"gzip -dc {name} | tr '\\r' '\\n'" if zipped else f"tr '\\r' '\\n' < {name}"
        raise Broken(f"its lines end in carriage returns alone, as on old Macs; convert it: {command} > NEW{suffix}")
    named = SUFFIXES.get(suffix, "")
    found, right = _tell(head, strictly=named == "CSV")
    if not named and not found:
        raise Broken(f"neither its suffix nor its start says what it is; name it {', '.join(SUFFIXES)}")
    if named in ("", found) or (not found and named in ("JSON", "CSV")):
        return named or found
    problem = f"is {found}, though its suffix says {named}; rename it"
    if not found:
        if re.search(rb"[\0-\x08\x0e-\x1f]", head):
            raise Broken(f"does not start as {named} does, so it is damaged or something else; {AGAIN}")
        problem, right = f"is text, not {named}; if it is CSV, rename it", ".csv"
    raise Broken(f"{problem} to {stem_of(file)}{right}{file.suffix if zipped else ''}")


def _tell(head: bytes, strictly: bool) -> tuple[str, str]:
    """The container and its suffix by the first bytes, or nothing; `strictly`: a bracket alone makes no JSON."""
    if head.startswith(b"PAR1"):
        return "Parquet", ".parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "Arrow", ".arrow"
    if re.match(rb'\s*(\{\s*["}]|\[\s*[\[{"\]])' if strictly else rb"\s*[{[]", head):
        return "JSON", ".json" if head.lstrip().startswith(b"[") else ".jsonl"
    return "", ""
