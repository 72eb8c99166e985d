"""Containers: every kind of file read back, every way in which one can be broken, and damage at random."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import re
import tempfile
import tracemalloc
import zipfile
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rdo.data.containers import TextRow, contents, csv_rows, json_rows, resolve, rows, shown, tables, text

from rdo.errors import DataError

ROWS = [{"prompt": "What?", "chosen": "Ä, \"b\"\n'c'", "score": 1.5}, {"prompt": "Why?", "chosen": "no", "score": -2.0}]
TEXTS = [{"prompt": "What?", "chosen": "Ä, \"b\"\n'c'"}, {"prompt": "Why?", "chosen": "no"}]
ANY_SUFFIX = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".ipc", ".dat", "")


def lines_of(items: list) -> bytes:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode()


def csv_of(items: list[dict], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(items[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(items)
    return text.getvalue().encode()


def parquet_of(table: pa.Table, **settings: object) -> bytes:
    data = io.BytesIO()
    pq.write_table(table, data, **settings)
    return data.getvalue()


def arrow_of(table: pa.Table, new=pa.ipc.new_file) -> bytes:
    data = io.BytesIO()
    with new(data, table.schema) as writer:
        writer.write_table(table)
    return data.getvalue()


def put(folder: Path, name: str, data: bytes | str) -> Path:
    file = folder / name
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    return file


@pytest.fixture
def read(tmp_path):
    """Write a file and read it: pairs of what is behind its name in each place, and the row."""

    def write_and_read(name: str, data: bytes | str) -> list[tuple[str, object]]:
        file = put(tmp_path, name, data)
        return [(place.removeprefix(f"{file}, "), row) for place, row in rows(file)]

    return write_and_read


@pytest.fixture
def refused(read):
    """The message with which a file is refused, without its folder."""

    def message(name: str, data: bytes | str) -> str:
        with pytest.raises(DataError) as error:
            read(name, data)
        return str(error.value).rpartition(f"/{name}")[2] if "> NEW" not in str(error.value) else str(error.value)

    return message


def errors(found: list[tuple[str, object]]) -> dict[str, str]:
    """Messages by place of the broken rows; each message begins with its place."""
    broken = {place: str(row) for place, row in found if isinstance(row, DataError)}
    for place, message in broken.items():
        assert f", {place}" in message
    return {place: message.partition(f", {place}")[2] for place, message in broken.items()}


def good(found: list[tuple[str, object]]) -> list[object]:
    return [row for _, row in found if not isinstance(row, DataError)]


TABLE = pa.Table.from_pylist(ROWS)
CONTAINERS = {
    "a.jsonl": lines_of(ROWS),
    "a.ndjson": lines_of(ROWS),
    "lines.json": lines_of(ROWS),
    "compact.json": json.dumps(ROWS).encode(),
    "pretty.json": json.dumps(ROWS, indent=2).encode(),
    "array.jsonl": json.dumps(ROWS, indent=2).encode(),
    "a.csv": csv_of(TEXTS),
    "a.tsv": csv_of(TEXTS, "\t"),
    "a.parquet": parquet_of(TABLE),
    "a.arrow": arrow_of(TABLE),
    "a.feather": arrow_of(TABLE),
    "a.ipc": arrow_of(TABLE, pa.ipc.new_stream),
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("ending", ["", ".gz", " with .gz, not gzipped", " gzipped, without .gz"])
def test_every_container_is_read_gzipped_or_not(read, name, ending):
    data = CONTAINERS[name]
    zipped = gzip.compress(data) if ending in (".gz", " gzipped, without .gz") else data
    found = read(name + (".gz" if ".gz" in ending and "without" not in ending else ""), zipped)
    text = name.endswith((".csv", ".tsv"))
    assert [row for _, row in found] == (TEXTS if text else ROWS)
    assert {type(row) for _, row in found} == {TextRow if text else dict}


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("a.jsonl", ["line 1", "line 2"]),
        ("compact.json", ["line 1", "line 1"]),
        ("pretty.json", ["line 2", "line 7"]),
        ("a.csv", ["line 2", "line 4"]),
        ("a.parquet", ["row 1", "row 2"]),
        ("a.ipc", ["row 1", "row 2"]),
    ],
)
def test_places_say_where_the_row_starts(read, name, places):
    assert [place for place, _ in read(name, CONTAINERS[name])] == places


@pytest.mark.parametrize("name", ["a.jsonl", "pretty.json", "a.parquet", "a.arrow", "a.ipc"])
@pytest.mark.parametrize("suffix", ["", ".txt", ".data.gz"])
def test_without_a_known_suffix_the_first_bytes_tell(read, name, suffix):
    assert good(read("file" + suffix, CONTAINERS[name])) == ROWS


def test_suffixes_are_known_in_capitals(read):
    assert good(read("A.CSV.GZ", gzip.compress(CONTAINERS["a.csv"]))) == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "pretty.json", "a.csv"])
def test_byte_order_mark_is_skipped(read, name):
    assert good(read(name, b"\xef\xbb\xbf" + CONTAINERS[name])) == (TEXTS if name == "a.csv" else ROWS)


def test_blank_lines_and_crlf_are_nothing_special(read):
    assert read("a.jsonl", b'\r\n{"a": 1}\r\n  \r\n\r\n{"a": 2}') == [("line 2", {"a": 1}), ("line 5", {"a": 2})]
    assert read("a.csv", b"\r\na,b\r\n\r\n1,\r\n \r\n3,4") == [
        ("line 4", {"a": "1", "b": ""}),
        ("line 6", {"a": "3", "b": "4"}),
    ]
    assert read("a.json", b' \n [ \n\n {"a": 1}\n,\n{"a": 2} ]\n\n') == [("line 4", {"a": 1}), ("line 6", {"a": 2})]


def test_a_head_full_of_blanks_is_looked_behind(read):
    assert good(read("a.json", b"\n" * 100_000 + b'[{"a": 1}]')) == [{"a": 1}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_line_of_megabytes_is_read(read, name):
    row = {"a": "x" * 3_000_000, "b": "y"}
    data = {"a.jsonl": lines_of([row, row]), "a.json": json.dumps([row, row]).encode(), "a.csv": csv_of([row, row])}
    assert good(read(name, data[name])) == [row, row]


def test_surrogates_and_nan_are_left_to_the_formats(read):
    (row,) = good(read("a.jsonl", r'{"a": "\ud800", "b": NaN}'))
    assert row["a"] == "\ud800"
    assert row["b"] != row["b"]


def test_tables_hold_what_json_would_hold(read):
    table = pa.table(
        {
            "when": pa.array([1, None], pa.timestamp("ns", "UTC")),
            "score": [Decimal("1.5"), None],
            "half": np.array([0.5, 1], dtype=np.float16),
            "kind": pa.array(["x", "y"]).dictionary_encode(),
            "turns": [[{"role": "user", "content": "?"}], []],
        }
    )
    for name, data in (("a.parquet", parquet_of(table)), ("a.arrow", arrow_of(table))):
        first, second = good(read(name, data))
        assert json.loads(json.dumps(first)) == first
        assert first.pop("when").startswith("1970-01-01 00:00:00.000000001")
        assert first == {"score": 1.5, "half": 0.5, "kind": "x", "turns": [{"role": "user", "content": "?"}]}
        assert json.loads(json.dumps(second)) == {"when": None, "score": None, "half": 1, "kind": "y", "turns": []}


def test_files_may_be_larger_than_memory(tmp_path):
    many = [{"a": str(number).zfill(2000)} for number in range(8_000)]
    table = pa.Table.from_pylist(many)
    files = [
        put(tmp_path, "a.jsonl", lines_of(many)),
        put(tmp_path, "a.json.gz", gzip.compress(json.dumps(many).encode(), 1)),
        put(tmp_path, "a.csv", csv_of(many)),
        put(tmp_path, "a.arrow", arrow_of(table)),
        put(tmp_path, "a.parquet", parquet_of(table, compression="none", use_dictionary=False)),
    ]
    del many, table
    for file in files:
        tracemalloc.start()
        before = pa.total_allocated_bytes()
        most = 0
        for count, (_, row) in enumerate(rows(file)):
            assert row["a"] == str(count).zfill(2000)
            most = max(most, pa.total_allocated_bytes() - before) if count % 100 == 0 else most
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 7_999
        assert peak + most < 8_000_000, file.name


# Files that cannot be used at all.


@pytest.mark.parametrize("name", ["a" + suffix for suffix in ANY_SUFFIX])
def test_an_empty_file_is_refused(refused, name):
    assert refused(name, b"") == ": is empty; download or copy it again"
    assert refused(name, gzip.compress(b"")) == ": is empty; download or copy it again"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_file_of_blank_lines_is_refused(refused, name):
    assert refused(name, b"\n \r\n" * 50_000).startswith(": holds only blank lines;")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.json", b"[ ]\n"),
        ("a.parquet", parquet_of(TABLE.slice(0, 0))),
        ("a.arrow", arrow_of(TABLE.slice(0, 0))),
        ("a.ipc", arrow_of(TABLE.slice(0, 0), pa.ipc.new_stream)),
    ],
)
def test_a_container_without_rows_is_refused(refused, name, data):
    assert refused(name, data).startswith(": there are no rows;")


def test_a_header_without_rows_is_refused(refused):
    assert refused("a.csv", b"a,b\n\n").startswith(": holds a header and no rows;")


@pytest.mark.parametrize("name", ["a.jsonl", "pretty.json", "a.csv", "a.parquet"])
def test_truncated_and_damaged_gzip_is_named(refused, name):
    zipped = gzip.compress(CONTAINERS[name])
    assert refused(name + ".gz", zipped[:-12]).startswith(": the gzip data end early;")
    assert refused(name + ".gz", zipped[:-8] + b"oops" + zipped[-4:]).startswith(": the gzip data are damaged (CRC")
    assert "gzip data are damaged" in refused(name + ".gz", zipped + b"trailing")


def test_truncated_gzip_says_behind_which_row(tmp_path):
    noise = np.random.default_rng(0).integers(0, 2**60, 40_000).tolist()
    file = put(tmp_path, "a.jsonl.gz", gzip.compress(lines_of([{"a": number} for number in noise]))[:-1000])
    found = []
    with pytest.raises(DataError, match=r"line \d+: the gzip data end early behind it; ") as error:
        found.extend(rows(file))
    assert len(found) > 30_000
    assert str(error.value).startswith(f"{found[-1][0]}: ")


XLSX = io.BytesIO()
with zipfile.ZipFile(XLSX, "w") as archive:
    archive.writestr("[Content_Types].xml", "<Types/>")
    archive.writestr("xl/workbook.xml", "<workbook/>")
ZIP = io.BytesIO()
with zipfile.ZipFile(ZIP, "w") as archive:
    archive.writestr("train.jsonl", lines_of(ROWS))
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
FOREIGN = {
    "lfs": (LFS, "is a Git LFS pointer, not the data; run `git lfs pull`"),
    "annex": (b"/annex/objects/SHA256E-s12--ab.jsonl\n", "is a git-annex pointer, not the data; run `git annex get`"),
    "annex link": (
        b"../../.git/annex/objects/a/b/SHA256E-s1",
        "is a git-annex pointer, not the data; run `git annex get`",
    ),
    "html": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "is a web page; the download went wrong"),
    "xml": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is a web page; the download went wrong"),
    "pickle": (pickle.dumps(ROWS), "is a pickle"),
    "xlsx": (XLSX.getvalue(), "is an Excel workbook; save its sheet as CSV"),
    "zip": (ZIP.getvalue(), "is a zip archive; unzip it"),
    "xz": (lzma.compress(b"{}"), "is an xz file; unpack it with xz -d"),
    "bz2": (bz2.compress(b"{}"), "is a bzip2 file; unpack it with bunzip2"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x58\x19", "is a zstd file; unpack it with zstd -d"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.arrow", "a"])
def test_what_is_no_data_file_is_named(refused, kind, name):
    data, message = FOREIGN[kind]
    assert refused(name, data).startswith(f": {message}")
    assert refused(name + ".gz", gzip.compress(data)).startswith(f": {message}")


def test_gzipped_twice_is_named(refused):
    assert refused("a.jsonl.gz", gzip.compress(gzip.compress(b"{}"))) == ": is gzipped twice; gunzip it once"


@pytest.mark.parametrize(
    ("name", "holds", "message"),
    [
        ("x.jsonl", "a.parquet", "is Parquet, though its suffix says JSON; rename it to x.parquet"),
        ("x.jsonl.gz", "a.parquet", "is Parquet, though its suffix says JSON; rename it to x.parquet.gz"),
        ("x.csv", "a.arrow", "is Arrow, though its suffix says CSV; rename it to x.arrow"),
        ("x.json", "a.ipc", "is Arrow, though its suffix says JSON; rename it to x.arrow"),
        ("x.csv", "a.jsonl", "is JSON, though its suffix says CSV; rename it to x.jsonl"),
        ("x.tsv", "pretty.json", "is JSON, though its suffix says CSV; rename it to x.json"),
        ("x.parquet", "a.jsonl", "is JSON, though its suffix says Parquet; rename it to x.jsonl"),
        ("x.parquet", "a.csv", "is text, not Parquet; if it is CSV, rename it to x.csv"),
        ("x.parquet", "a.arrow", "is Arrow, though its suffix says Parquet; rename it to x.arrow"),
        ("x.arrow", "a.parquet", "is Parquet, though its suffix says Arrow; rename it to x.parquet"),
        ("x.feather", "compact.json", "is JSON, though its suffix says Arrow; rename it to x.json"),
    ],
)
def test_a_suffix_that_contradicts_the_content_is_named(refused, name, holds, message):
    assert refused(name, CONTAINERS[holds]) == f": {message}"


def test_a_csv_header_in_brackets_is_still_csv(read):
    assert good(read("a.csv", b"[prompt],[chosen]\n1,2\n")) == [{"[prompt]": "1", "[chosen]": "2"}]


def test_text_that_nothing_tells_is_refused(refused):
    assert "neither its suffix nor its start says what it is; name it .jsonl, " in refused(
        "a.dat", b"prompt,chosen\n1,2\n"
    )


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a b.txt"])
def test_other_encodings_are_named_with_the_way_to_utf8(refused, tmp_path, encoding, name):
    text = '{"a": "b"}\n' if "json" in name else "a,b\n1,2\n"
    message = refused(name, text.encode(encoding))
    assert (
        f"is {encoding.replace('-le', 'LE').replace('-be', 'BE').upper()}; convert it to UTF-8: iconv -f UTF-"
        in message
    )
    command = message.partition("UTF-8: ")[2].replace("NEW", f"{tmp_path}/new")
    assert os.system(command) == 0
    (new,) = tmp_path.glob("new*")
    assert new.read_bytes().removeprefix(b"\xef\xbb\xbf").decode() == text


def test_other_encodings_are_named_in_gzip(refused):
    message = refused("a.csv.gz", gzip.compress("a,b\n1,2\n".encode("utf-16")))
    assert "gzip -dc " in message
    assert "| iconv -f UTF-16 -t UTF-8 > NEW.csv" in message


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.ipc"])
def test_truncated_and_damaged_tables_are_named(refused, name):
    data = CONTAINERS[name]
    kind = "Parquet" if name == "a.parquet" else "Arrow"
    for broken in (data[:20], data[: len(data) // 2]):
        message = refused(name, broken)
        assert f": {kind} that is cut off or damaged" in message
        assert message.endswith("; download or copy it again")
    assert "does not start as" in refused(name, b"\0\1\2" + data)


def test_damage_behind_good_rows_says_how_far(tmp_path):
    table = pa.table({"a": [str(number) for number in range(5000)]})
    whole = bytearray(parquet_of(table, row_group_size=1000, use_dictionary=False, compression="gzip"))
    start = pq.ParquetFile(io.BytesIO(whole)).metadata.row_group(2).column(0).data_page_offset
    whole[start + 40 : start + 80] = bytes(40)
    found = []
    with pytest.raises(DataError, match=r"Parquet that is cut off or damaged at row 1793 or behind it"):
        found.extend(rows(put(tmp_path, "a.parquet", whole)))
    assert len(found) == 1792  # seven batches, which do not end where groups of rows do


def test_checksums_of_parquet_are_looked_at(refused):
    table = pa.table({"a": ["some text"] * 3})
    data = parquet_of(table, compression="none", use_dictionary=False, write_page_checksum=True, write_statistics=False)
    assert "cut off or damaged" in refused("a.parquet", data.replace(b"some", b"same", 1))


def test_offsets_that_lead_out_of_an_arrow_file_are_refused(refused):
    data = bytearray(arrow_of(pa.table({"a": ["abc", "def"]})))
    at = data.index(np.array([0, 3, 6], np.int32).tobytes())
    data[at + 8 : at + 12] = (2**30).to_bytes(4, "little")
    assert "Arrow that is cut off or damaged" in refused("a.arrow", bytes(data))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_two_columns_of_one_name_are_refused(refused, name):
    table = pa.table([[1], [2]], names=["a", "a"])
    message = refused(name, parquet_of(table) if name == "a.parquet" else arrow_of(table))
    assert message == ", row 1, field 'a': two columns have this name; rename one"


def test_a_cell_that_is_no_text_breaks_its_row_alone(read):
    texts = pa.array([b"good", b"b\xe4d", b"good"]).view(pa.string())
    found = read("a.parquet", parquet_of(pa.table({"a": [1, 2, 3], "b": texts})))
    assert good(found) == [{"a": 1, "b": "good"}, {"a": 3, "b": "good"}]
    assert errors(found)["row 2"].startswith(", field 'b': cannot be read ('utf-8' codec can't decode")


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.arrow.gz"])
def test_the_unpacked_copy_is_removed_even_on_error(read, refused, tmp_path, monkeypatch, name):
    folder = tmp_path / "unpacked"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    data = CONTAINERS[name.removesuffix(".gz")]
    assert len(read(name, gzip.compress(data))) == 2
    refused(name, gzip.compress(data[:-20]))
    refused(name, gzip.compress(data + os.urandom(100_000))[:-30])
    reading = rows(put(tmp_path, name, gzip.compress(data)))
    next(reading)
    assert len(list(folder.iterdir())) == 1
    reading.close()
    assert list(folder.iterdir()) == []


def test_no_room_for_the_unpacked_copy_names_the_way_out(refused, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(contents.shutil, "copyfileobj", full)
    message = refused("a.parquet.gz", gzip.compress(CONTAINERS["a.parquet"]))
    assert "No space left on device" in message
    assert "set TMPDIR" in message


@pytest.mark.parametrize("failure", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, failure):
    file = put(tmp_path, "a.jsonl", b"{}")

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(DataError) as error:
        list(rows(file))
    assert str(error.value).startswith(f"{file}: cannot be read ({failure.strerror}); ")


def test_a_failing_disk_is_no_damaged_table(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(tables.pq, "ParquetFile", fail)
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read \(Input/output error\)"):
        list(rows(put(tmp_path, "a.parquet", CONTAINERS["a.parquet"])))


def test_a_file_that_went_away_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.parquet: cannot be read \(No such file or directory\)"):
        list(rows(tmp_path / "gone.parquet"))


# JSON that is not one object a line.


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('[\n{"a": 1},\n{"a": 2}\n', ", line 4: the array ends early, behind element 2; download"),
        ('[\n{"a": 1},\n', ", line 3: element 2 of the array is cut off by the end of the file"),
        ('[\n{"a": 1},\n{"a": "x', ", line 3: element 2 of the array is cut off by the end of the file"),
        ('[\n{"a": 1},\n{"a": {"b": [1, ', ", line 3: element 2 of the array is cut off by the end of the file"),
        ("[", ", line 1: element 1 of the array is cut off by the end of the file"),
        ('[{"a": 1},\n{"a": nope}, {"a": 3}]', ", line 2: element 2 of the array is not JSON (Expecting value, at its"),
        ('[{"a": 1},\n]', ", line 2: element 2 of the array is not JSON (Expecting value, at its character 1)"),
        ('[{"a": 1}\n{"a": 2}]', ", line 2: a comma is missing behind element 1"),
        ('[{"a": 1}]\n[{"a": 2}]', ", line 2: text behind the end of the array; write one array"),
        ('[{"a": 1},\n{"a": ' + "9" * 5000 + "}]", ", line 2: element 2 of the array holds a number of"),
        ('[{"a": 1},\n{"a": ' + "[" * 100_000, ", line 2: element 2 of the array is nested too deep"),
        (b'[{"a": 1},\n{"a":\n"\xe4"}]', ", line 3: is not UTF-8 (byte 0xe4)"),
        (b'[{"a": "\xc3', ", line 1: is not UTF-8 (byte 0xc3)"),
    ],
)  # fmt: skip
def test_a_broken_array_says_where(refused, data, message):
    assert refused("a.json", data).startswith(message)


def test_a_broken_element_far_from_the_end_is_no_long_element(refused):
    data = '[{"a" 1},' + json.dumps([{"a": "x" * 1000}] * 5000)[1:]
    assert refused("a.json", data).startswith(", line 1: element 1 of the array is not JSON (Expecting ':' delimiter")


def test_elements_that_can_be_skipped_are(read):
    found = read("a.json", '[{"a": 1},\n12,\n{"b": {"a": 1, "a": 2}},\n[],\n{"a": 3}]')
    assert good(found) == [{"a": 1}, {"a": 3}]
    assert errors(found) == {
        "line 2": ": element 2 of the array is a number, not an object; write one object of columns per row",
        "line 3": ": element 3 of the array has the key 'a' twice in one object; keep one",
        "line 4": ": element 4 of the array is an array, not an object; write one object of columns per row",
    }


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_arrays_do_not_depend_on_where_chunks_end(read, monkeypatch, chunk):
    monkeypatch.setattr(text, "CHUNK", chunk)
    items = [{"ä": [1.25e3, None, "\\u00e4\n"], "b": {}}, {"c": "€" * 50}, {}]
    for indent in (None, 1):
        assert good(read("a.json", json.dumps(items, ensure_ascii=False, indent=indent))) == items
    assert errors(read("b.json", "[{}, 12345, -1.5e10, true]")).keys() == {"line 1"}
    assert len(read("b.json", "[{}, 12345, -1.5e10, true]")) == 4


def test_a_long_element_is_not_parsed_at_every_chunk(read, monkeypatch):
    parsed = []
    plain = json_rows.Decoder.raw_decode
    monkeypatch.setattr(text, "CHUNK", 100)
    monkeypatch.setattr(json_rows.Decoder, "raw_decode", lambda *given: parsed.append(1) or plain(*given))
    assert len(good(read("a.json", json.dumps([{"a": "x" * 1_000_000}])))) == 1
    assert len(parsed) < 20


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("more", [{}, {"version": "1.0", "total": 2}])
def test_one_object_with_the_rows_in_a_list_is_named(refused, name, more):
    document = {**more, "my data": ROWS}
    message = refused(name, json.dumps(document))
    assert message == (
        ", line 1: is one object with the rows in a list; take it out of its key 'my data' (jq -c '.[\"my data\"][]')"
    )


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("count", [2, 5000])
def test_a_pretty_printed_document_is_named(refused, name, count):
    message = refused(name, "\n" + json.dumps({"version": "1", "data": ROWS * count}, indent=2))
    assert message.startswith(", line 2: an object goes on over several lines; write one object per line (jq -c .); ")
    assert "if its list 'data' holds the rows, take it out of its key 'data' (jq -c '.[\"data\"][]')" in message


def test_pretty_printed_rows_are_named(refused):
    text = "\n".join(json.dumps(row, indent=4) for row in ROWS)
    assert (
        refused("a.jsonl", text)
        == ", line 1: an object goes on over several lines; write one object per line (jq -c .)"
    )
    assert refused("a.json", json.dumps({"prompt": "?", "responses": ["a"]}, indent=1)).endswith("(jq -c .)")


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "responses": ["a", "b"], "preferences": [{"chosen": 0, "rejected": 1}]},
        {"messages": [{"role": "user", "content": "?"}], "label": True},
        {"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0},
        {"prompt": "p", "chosen": "a", "rejected": "b", "tags": []},
    ],
)
def test_a_single_row_is_no_document(read, row):
    assert good(read("a.json", json.dumps(row))) == [row]


ASK = {"role": "user", "content": "x"}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(
    "document",
    [
        {"prompt": ["p", "q"], "chosen": ["a", "b"], "rejected": ["c", "d"]},  # frame.to_dict("list")
        {"prompt": {"0": "p", "1": "q"}, "chosen": {"0": "a", "1": "b"}},  # frame.to_json()
        {"prompt": ["p"], "chosen": [[ASK]]},
    ],
)
def test_an_object_of_columns_is_named(refused, name, document, indent):
    data = json.dumps(document, indent=indent).encode()
    message = refused(name, gzip.compress(data) if name.endswith("gz") else data)
    assert "is one object of whole columns; write one object per row (pandas: frame.to_json(" in message


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [ASK], "rejected": [ASK]},
        {"prompt": "p", "ranked_responses": ["a", "b"]},
        {"responses": ["a", "b"], "ranks": [1]},
        {"info": {"0": "x"}, "choice": 1},
    ],
)
def test_a_row_of_lists_is_no_object_of_columns(read, row):
    assert list(read("a.jsonl", json.dumps(row).encode())) == [("line 1", row)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz", "a"])
def test_lines_that_end_in_carriage_returns_alone_are_named(refused, name):
    data = b"prompt,chosen\rp,c\rq,d\r" if name == "a.csv" else b'{"prompt": 1}\r{"prompt": 2}\r'
    message = refused(name, gzip.compress(data) if name.endswith("gz") else data)
    assert "its lines end in carriage returns alone" in message
    assert "tr '\\r' '\\n'" in message


@pytest.mark.parametrize("data", [b'[{"a": 1},\r{"a": 2}]', b'{"a": 1}\r\n{"a": 2}\r\n', b'{"a": 1}\r\n\r\n{"a": 2}'])
def test_carriage_returns_elsewhere_are_nothing_special(read, data):
    assert [row for _, row in read("a.json", data)] == [{"a": 1}, {"a": 2}]


def test_several_documents_in_lines_are_rows(read):
    assert len(good(read("a.json", lines_of([{"data": ROWS}] * 3)))) == 3


# Rows behind which reading goes on.


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": 1', "is not JSON (Expecting ',' delimiter, column 8)"),
        ("{'a': 1}", "is not JSON (Expecting property name enclosed in double quotes, column 2)"),
        ('{"a": 1} {"a": 2}', "is not JSON (Extra data, column 10)"),
        ('{"a": "b\\x"}', "is not JSON (Invalid \\escape, column 9)"),
        ("prompt,chosen", "is not JSON (Expecting value, column 1)"),
        ("[1, 2]", "is an array, not an object"),
        ('"x"', "is text, not an object"),
        ("12", "is a number, not an object"),
        ("1.5", "is a number, not an object"),
        ("true", "is true or false, not an object"),
        ("null", "is null, not an object"),
        (b'{"a": "\xe4\xf6"}', "is not UTF-8 (byte 0xe4 at offset 7 of the line); convert"),
        ('{"a": ' + "[" * 100_000, "is nested too deep"),
        ('{"a": ' + "9" * 5000 + "}", "holds a number of too many digits"),
        ('{"a": 1, "b": 2, "a": 1}', "has the key 'a' twice in one object"),
        ('{"b": [{"x\\ty": 1, "x\\ty": 2}]}', r"has the key 'x\ty' twice in one object"),
        (b'{"a": "\0"}', "holds a NUL byte (offset 7 of the line)"),
        (b"\0\0\0\0", "holds a NUL byte (offset 0 of the line)"),
    ],
)
def test_a_broken_line_of_json_breaks_its_row_alone(read, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    found = read("a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    assert good(found) == [{"a": 1}, {"a": 3}]
    (broken,) = errors(found).items()
    assert broken[0] == "line 2"
    assert broken[1].startswith(f": {message}")
    assert "; " in broken[1]


@pytest.mark.parametrize("first", ['{"a": nope}', '{"a": 1', '{"a": "b', '{"a": {"b": 1, "b": 2}, 3}'])
def test_a_broken_first_line_is_no_document(read, first):
    found = read("a.jsonl", first + '\n{"a": 2}\n{"a": 3}\n')
    assert good(found) == [{"a": 2}, {"a": 3}]
    assert errors(found)["line 1"].startswith(": is not JSON (")


def test_the_offset_counts_a_byte_order_mark(read):
    found = read("a.jsonl", b'\xef\xbb\xbf{"a": "\xe4"}\n{}\n')
    assert "byte 0xe4 at offset 10 of the line" in errors(found)["line 1"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"1", "1 cells under a header of 2; quote cells that hold separators or line breaks"),
        (b"1,2,3", "3 cells under a header of 2; quote"),
        (b'"1\n2",2,', "3 cells under a header of 2; quote"),
        (b"1,\xe4", "is not UTF-8 (byte 0xe4 at offset 2 of the line)"),
        (b'1,"a\nb\xe4\nc"', "is not UTF-8 (byte 0xe4 at offset 1 of the line)"),
        (b"1,\0", "holds a NUL byte (offset 2 of the line)"),
        (b'1,"a"b', "is not CSV (',' expected after '\"')"),
        (b'1,"a"b\xe4', "is not UTF-8 (byte 0xe4 at offset 6 of the line)"),
        (b"1,a\rb", "is not CSV (new-line character seen in unquoted field)"),
    ],
)
def test_a_broken_record_of_csv_breaks_its_row_alone(read, line, message):
    found = read("a.csv", b"a,b\n1,2\n" + line + b"\n3,4\n")
    assert good(found) == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    (broken,) = errors(found).items()
    assert broken[0] == "line 3"
    assert broken[1].startswith(f": {message}")


def test_csv_places_count_lines_within_quotes(read):
    found = read("a.csv", b'"a\nx",b\n"1\n\n",2\n3\n"\n",4\n')
    assert [place for place, _ in found] == ["line 3", "line 6", "line 7"]
    assert good(found) == [{"a\nx": "1\n\n", "b": "2"}, {"a\nx": "\n", "b": "4"}]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"a,b,a", "has the column 'a' twice; rename one"),
        (b",a,b", "has no name for column 1; name it"),
        (b"a,b, ", "has no name for column 3; name it"),
        (b"a,\xe4", "is not UTF-8 (byte 0xe4 at offset 2 of the line)"),
        (b'a,"b"c', "is not CSV ("),
        (b"a;b", "seems to be separated by ';'"),
        (b"a\tb", r"seems to be separated by '\t'"),
        (b"a\x1b[1m" + b"x" * 200 + b",a\x1b[1m" + b"x" * 200, r"has the column 'a\x1b[1m" + "x" * 51 + "…' twice"),
    ],
)
def test_a_broken_header_is_refused(refused, header, message):
    assert refused("a.csv", b"\n" + header + b"\n1,2,3\n").startswith(f", line 2: the header {message}")


def shorten_lines(monkeypatch) -> None:
    for module in (text, json_rows, csv_rows):
        monkeypatch.setattr(module, "LONGEST_LINE", 100)


def test_a_quote_that_is_never_closed_is_refused(refused, monkeypatch):
    data = b'a,b\n1,2\n3,"4\n' + b"5,6\n" * 100
    message = ", line 3: a quote that opens in this row is never closed"
    assert refused("a.csv", data).startswith(message)
    shorten_lines(monkeypatch)
    assert refused("a.csv", data).startswith(message)


def test_lines_that_are_too_long_are_skipped_to_their_end(read, refused, monkeypatch):
    shorten_lines(monkeypatch)
    monkeypatch.setattr(text, "CHUNK", 64)
    long = "x" * 1000
    found = read("a.jsonl", lines_of([{"a": 1}, {"a": long}, {"a": 2}, {"a": long}]))
    assert good(found) == [{"a": 1}, {"a": 2}]
    assert errors(found) == dict.fromkeys(("line 2", "line 4"), ": is longer than 100 bytes; write one row per line")
    found = read("a.csv", csv_of([{"a": "1"}, {"a": long}, {"a": f'"{long}\n"{long}'}, {"a": "2"}]))
    assert good(found) == [{"a": "1"}, {"a": "2"}]
    assert list(errors(found)) == ["line 3", "line 4"]
    message = refused("a.json", json.dumps([{"a": 1}, {"a": long}, {"a": 2}]))
    assert message.startswith(", line 1: element 2 of the array is longer than 100 characters;")


# dataset.path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.jsonl", "c.parquet", "deep/er/d.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("a.jsonl", ["a.jsonl"]),
        (Path("a.jsonl"), ["a.jsonl"]),
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("**/*.parquet", ["c.parquet", "deep/er/d.parquet"]),
        ("*", ["a.jsonl", "b.jsonl", "c.parquet"]),
        (["c.parquet", "*.jsonl"], ["c.parquet", "a.jsonl", "b.jsonl"]),
        (["b.jsonl", "*.jsonl", "./b.jsonl"], ["b.jsonl", "a.jsonl"]),
        (("a.jsonl",), ["a.jsonl"]),
    ],
)
def test_paths_name_files(folder, path, names):
    assert resolve(path) == [Path(name) for name in names]


def test_paths_from_the_configuration_name_files(folder):
    from omegaconf import OmegaConf

    assert resolve(OmegaConf.create({"path": ["a.jsonl", "c.*"]}).path) == [Path("a.jsonl"), Path("c.parquet")]


def test_home_and_names_with_brackets(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert resolve("~/a.jsonl") == [folder / "a.jsonl"]
    assert resolve(Path("~/*.parquet")) == [folder / "c.parquet"]
    put(folder, "x[1].jsonl", "{}")
    assert resolve("x[1].jsonl") == [Path("x[1].jsonl")]


def test_a_link_and_its_file_are_one(folder):
    (folder / "link.jsonl").symlink_to("a.jsonl")
    assert resolve("[al]*.jsonl") == [Path("a.jsonl")]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "dataset.path: no file is given; name a file"),
        ("", "dataset.path: no file is given; name a file"),
        ([], "dataset.path: no file is given; name a file"),
        (["a.jsonl", " "], "dataset.path: no file is given; name a file"),
        (12, "dataset.path: 12 is no text; write names of files in quotes"),
        (["a.jsonl", {"b": 1}], "dataset.path: {'b': 1} is no text; write"),
        (b"a.jsonl", "dataset.path: b'a.jsonl' is no text; write"),
        ("a\0.jsonl", r"dataset.path: 'a\x00.jsonl' holds a NUL character"),
        ("a.json", "a.json: there is no such file; did you mean a.jsonl?"),
        ("zzz", "zzz: there is no such file; check dataset.path"),
        ("x" * 300, "x" * 300 + ": there is no such file; check dataset.path"),
        ("nowhere/a.jsonl", "nowhere/a.jsonl: there is no folder nowhere; check dataset.path"),
        ("*.csv", "*.csv: the pattern matches no file; correct it"),
        ("dee*", "dee*: the pattern matches no file; correct it"),
        (".", ".: is a folder; name its files, './*.jsonl'"),
        ("deep", "deep: is a folder; name its files, 'deep/**/*.parquet'"),
    ],
)
def test_paths_that_name_no_file_are_refused(folder, path, message):
    with pytest.raises(DataError) as error:
        resolve(path)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.org/a.jsonl", "dataset.source=hub dataset.hub_name=OWNER/NAME"),
        ("https://huggingface.co/datasets/Intel/orca_dpo_pairs/blob/main/a.jsonl", "hub_name=Intel/orca_dpo_pairs"),
        ("hf://datasets/Intel/orca_dpo_pairs@main/a.jsonl", "hub_name=Intel/orca_dpo_pairs"),
        ("s3://bucket/a*.parquet", "download the file and name it"),
        ("file:///tmp/a.jsonl", "write the path alone"),
    ],
)
def test_urls_are_refused(url, message):
    with pytest.raises(DataError, match=rf"^{re.escape(url)}: is a URL; .*{re.escape(message)}"):
        resolve(url)


def test_folders_pipes_and_lost_links_are_refused(folder):
    (folder / "empty").mkdir()
    (folder / "zipped").mkdir()
    put(folder, "zipped/x.csv.gz", "")
    put(folder, "zipped/LICENSE.txt", "")
    os.mkfifo(folder / "pipe")
    (folder / "lost.jsonl").symlink_to("nowhere.jsonl")
    (folder / "annex.jsonl").symlink_to(".git/annex/objects/x/SHA256E-s1")
    for path, message in (
        ("empty", "is a folder; there is no file in it"),
        ("zipped/", "is a folder; name its files, 'zipped/*.csv.gz'"),
        ("pipe", "is a pipe or device, not a file"),
        ("lost.jsonl", "is a link to a file that is not there; mend the link"),
        ("a*.jsonl", "is a link to a file that is not there; run `git annex get` on it"),
    ):
        with pytest.raises(DataError, match="^[^:]*: " + message.replace("*", r"\*")):
            resolve(path)


def test_shown_is_short_and_printable():
    assert shown("plain Ä 'text'") == "plain Ä 'text'"
    assert shown("a\n\x1b[31m\u202e\ud800\\") == r"a\n\x1b[31m\u202e\ud800" + "\\"
    assert shown("x" * 60) == "x" * 60
    assert shown("x" * 61) == "x" * 59 + "…"
    assert len(shown("\U000e0001" * 100)) == 60


# Damage at random.

FUZZ = settings(max_examples=60, deadline=None)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.lists(st.dictionaries(st.text(), JSON, max_size=4), min_size=1, max_size=6)
NAMES = st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=4, unique=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def check_only_rows_or_data_errors(file: Path) -> None:
    failures = []
    try:
        for where, row in rows(file):
            assert where.startswith(f"{file}, ")
            assert isinstance(row, dict | DataError)
            failures += [row] if isinstance(row, DataError) else []
    except DataError as error:
        failures.append(error)
    for failure in failures:
        assert str(failure).startswith(str(file))
        assert "; " in str(failure)


TOKENS = st.sampled_from(
    [b"{", b"}", b"[", b"]", b'"', b",", b":", b"\n", b"\r", b"\0", b"\t", b" ", b"1", b"\\", b"\xff", b"null"]
)


@FUZZ
@given(
    data=st.binary(max_size=300) | st.lists(TOKENS | st.binary(max_size=3), max_size=40).map(b"".join),
    start=st.sampled_from(
        [b"", b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff", b"\x1f\x8b\x08", b"{", b"[", b"[{}", b"a,b\n"]
    ),
    suffix=st.sampled_from(ANY_SUFFIX),
    ending=st.sampled_from(["", ".gz"]),
    zipped=st.booleans(),
)
def test_random_bytes_are_rows_or_errors(place, data, start, suffix, ending, zipped):
    data = start + data
    check_only_rows_or_data_errors(put(place, f"random{suffix}{ending}", gzip.compress(data) if zipped else data))


@FUZZ
@given(items=OBJECTS, indent=st.sampled_from([None, 0, 3]), ascii_only=st.booleans(), chunk=st.integers(1, 100))
def test_random_objects_are_read_back_from_json(place, items, indent, ascii_only, chunk):
    lines = "".join(json.dumps(item, ensure_ascii=ascii_only) + "\n" for item in items)
    array = json.dumps(items, ensure_ascii=ascii_only, indent=indent)
    whole, text.CHUNK = text.CHUNK, chunk
    try:
        assert [row for _, row in rows(put(place, "a.jsonl", lines))] == items
        assert [row for _, row in rows(put(place, "a.json", array))] == items
    finally:
        text.CHUNK = whole


@FUZZ
@given(names=NAMES, data=st.data(), delimiter=st.sampled_from([",", "\t"]))
def test_random_texts_are_read_back_from_tables(place, names, data, delimiter):
    cell = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
    items = data.draw(st.lists(st.fixed_dictionaries(dict.fromkeys(names, cell)), min_size=1, max_size=5))
    table = pa.Table.from_pylist(items)
    files = {
        "a.tsv" if delimiter == "\t" else "a.csv": csv_of(items, delimiter),
        "a.parquet": parquet_of(table),
        "a.arrow": arrow_of(table),
        "a.ipc": arrow_of(table, pa.ipc.new_stream),
    }
    if "\0" in "".join(names):
        del files["a.tsv" if delimiter == "\t" else "a.csv"]
    for name, written in files.items():
        assert [row for _, row in rows(put(place, name, written))] == items, name


@settings(FUZZ, max_examples=200)
@given(
    name=st.sampled_from(list(CONTAINERS)),
    zipped=st.booleans(),
    cut=st.none() | st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), max_size=4),
)
def test_random_damage_is_rows_or_errors(place, name, zipped, cut, flips):
    damaged = bytearray(gzip.compress(CONTAINERS[name], mtime=0) if zipped else CONTAINERS[name])
    for at, bit in flips:
        damaged[int(at * len(damaged))] ^= 1 << bit
    if cut is not None:
        del damaged[int(cut * len(damaged)) :]
    check_only_rows_or_data_errors(put(place, name + ".gz" * zipped, damaged))
