"""Files of rows: every kind read back, and what is said of those that are not what their name says."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rdo.data.columns import RowError
from rdo.data.files import TextRow, content_hash, resolve, rows
from rdo.runtime.errors import DataError

ROWS = [{"prompt": "What?", "chosen": "Ä, \"b\"\n'c'", "score": 1.5}, {"prompt": "Why?", "chosen": "no", "score": -2.0}]
TEXTS = [{"prompt": "What?", "chosen": "Ä, \"b\"\n'c'"}, {"prompt": "Why?", "chosen": "no"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
TABLE = pa.Table.from_pylist(ROWS)


def csv_of(delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(TEXTS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(TEXTS)
    return text.getvalue().encode()


def parquet_of(table: pa.Table, **settings: object) -> bytes:
    data = io.BytesIO()
    pq.write_table(table, data, **settings)
    return data.getvalue()


def arrow_of(table: pa.Table, new=pa.ipc.new_file) -> bytes:
    data = io.BytesIO()
    with new(data, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    return data.getvalue()


# Name → content, and the place of the second row.
FILES = {
    "a.jsonl": (LINES, "line 2"),
    "bom.ndjson": (b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n"), "line 3"),
    "lines.json": (LINES, "line 2"),
    "compact.json": (json.dumps(ROWS).encode(), "element 2"),
    "pretty.json": (b"\xef\xbb\xbf\n " + json.dumps(ROWS, indent=2).encode(), "element 2"),
    "a.csv": (b"\xef\xbb\xbf" + csv_of(), "line 4"),
    "a.TSV": (csv_of("\t"), "line 4"),
    "a.parquet": (parquet_of(TABLE), "row 2"),
    "a.arrow": (arrow_of(TABLE), "row 2"),
    "a.feather": (arrow_of(TABLE), "row 2"),
    "a.ipc": (arrow_of(TABLE, pa.ipc.new_stream), "row 2"),
}


def read(folder: Path, name: str, data: bytes) -> list[tuple[str, object]]:
    """What is behind the file's name in each place, and the row."""
    (folder / name).write_bytes(data)
    (file,) = resolve(str(folder / name))
    return [(place.removeprefix(f"{folder / name}, "), row) for place, row in rows(file)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_read_gzipped_or_not(tmp_path, name, packed):
    data, place = FILES[name]
    found = read(tmp_path, f"{name}.gz", gzip.compress(data)) if packed else read(tmp_path, name, data)
    text = name.lower().endswith(("csv", "tsv"))
    assert [row for _, row in found] == (TEXTS if text else ROWS)
    assert {type(row) for _, row in found} == {TextRow if text else dict}
    assert found[1][0] == place


DAMAGED = {
    "empty": ("a.jsonl", b"", "there are no rows"),
    "blank": ("a.jsonl", b"\n  \n\n", "there are no rows"),
    "an empty array": ("a.json", b"[]", "there are no rows"),
    "a header alone": ("a.csv", b"a,b\n", "there are no rows"),
    "an unknown name": ("a.xlsx", LINES, r"its name must end in \.jsonl"),
    "not gzipped": ("a.jsonl.gz", LINES, "Not a gzipped file"),
    "gzip cut off": ("a.jsonl.gz", gzip.compress(LINES * 99)[:-20], "cannot be read as .jsonl .*ended before"),
    "Parquet cut off": ("a.parquet", parquet_of(TABLE)[:-30], "cannot be read as .parquet"),
    "Arrow cut off": ("a.arrow", arrow_of(TABLE)[:-30], "cannot be read as .arrow"),
    "an array cut off": (
        "a.json",
        json.dumps(ROWS).encode()[:-9],
        "cannot be read as .json .*JSONDecodeError: Unterminated",
    ),
    "a broken element": ("a.json", b'[{"a": 1},\n{"b": x}]', "Expecting value: line 2 column 7"),
    "a quote never closed": ("a.csv", b'a,b\n1,"x\n2,3\n', "unexpected end of data"),
    "a quote within": ("a.csv", b'a,b\n1,2\n"4"x,5\n', "line 2 or behind it: .*expected after"),
    "a column twice": ("a.csv", b"a,a\n1,2\n", "two columns of the header have the same name"),
    "no header of UTF-8": ("a.json", b'[{"a": "\xff"}]', "utf-8"),
}


@pytest.mark.parametrize(("name", "data", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, data, message):
    with pytest.raises(DataError, match=rf"{name}\b.*{message}"):
        read(tmp_path, name, data)


def test_what_is_wrong_with_a_line_stands_in_its_place(tmp_path):
    lines = b'{"a": 1}\n{"a":\n\xff\n' + b"[" * 100_000 + b'\n[1]\n"x"\n{"a": 2}'
    found = dict(read(tmp_path, "a.jsonl", lines))
    errors = {place: str(row) for place, row in found.items() if isinstance(row, RowError)}
    assert list(errors) == ["line 2", "line 3", "line 4"]
    assert all(message.startswith(": is not JSON") for message in errors.values())
    assert [found[f"line {n}"] for n in (1, 5, 6, 7)] == [{"a": 1}, [1], "x", {"a": 2}]
    cells = dict(read(tmp_path, "a.csv", b"a,b\n1\n6,7\n8,\xff\n"))
    assert "has 1 cells under a header of 2" in str(cells["line 2"])
    assert cells["line 3"] == {"a": "6", "b": "7"}
    assert cells["line 4"] == {"a": "8", "b": "\udcff"}  # which no column may hold


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.arrow", "a.ipc"])
def test_files_may_be_larger_than_memory(tmp_path, name):
    many = [{"a": "x" * 1000, "b": str(n)} for n in range(40_000)]
    table = pa.Table.from_pylist(many)
    data = {
        "a.jsonl": lambda: "\n".join(map(json.dumps, many)).encode(),
        "a.csv": lambda: ("a,b\n" + "\n".join(f"{row['a']},{row['b']}" for row in many)).encode(),
        "a.parquet": lambda: parquet_of(table, use_dictionary=False, compression="none"),
        "a.arrow": lambda: arrow_of(table),
        "a.ipc": lambda: arrow_of(table, pa.ipc.new_stream),
    }[name]()
    (tmp_path / name).write_bytes(data)
    (file,) = resolve(str(tmp_path / name))
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    highest = 0
    for number, (_, row) in enumerate(rows(file)):
        assert row["b"] == str(number)
        highest = max(highest, pa.total_allocated_bytes() - before)
    assert tracemalloc.get_traced_memory()[1] < 12e6
    assert highest < 45e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        (["sub/*", "a.jsonl", "*.jsonl"], ["c.jsonl", "a.jsonl", "b.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "c.jsonl"]),
    ],
)
def test_paths_are_files_globs_and_lists_of_them(tmp_path, monkeypatch, path, found):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(LINES)
    assert [Path(file.path).name for file in resolve(path)] == found


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone.jsonl", "there is no such file"),
        ("*.csv", "there is no such file"),
        (".", r"there is no such file; .*a folder's files"),
        (["a.jsonl", "gone.jsonl"], "gone.jsonl: there is no such file"),
        ([], "no file is given"),
        (None, "no file is given"),
        ("nothing://a.jsonl", "cannot be opened"),
    ],
)
def test_files_that_are_not_there_are_named(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(LINES)
    with pytest.raises(DataError, match=message):
        resolve(path)


def test_a_file_in_another_place_is_read_as_well(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (file,) = resolve(f"file://{tmp_path / 'a.jsonl'}")
    assert [row for _, row in rows(file)] == ROWS
    import fsspec

    with fsspec.open("memory://here/a.jsonl", "wb") as stream:
        stream.write(LINES)
    (remote,) = resolve("memory://here/*.jsonl")
    assert [(place.rpartition("/")[2], row) for place, row in rows(remote)][1] == ("a.jsonl, line 2", ROWS[1])
    assert content_hash(remote) == content_hash(file)
