"""Rows of Parquet and Arrow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rdo.data.containers.problems import AGAIN, Broken, shown
from rdo.data.containers.text import CHUNK

BATCH = 256  # rows that are Python objects at a time


def read_table(file: Path, container: str) -> Iterator[tuple[str, Any]]:
    """Pairs of a place and a row, or Broken in its place. `container`: Parquet or Arrow."""
    number = 0
    try:
        for batch in _parquet_batches(file) if container == "Parquet" else _arrow_batches(file):
            name, count = Counter(batch.schema.names).most_common(1)[0]
            if count > 1:
                raise Broken("two columns have this name; rename one", f"row 1, field '{shown(name)}'")
            for row in _python_rows(batch):
                number += 1
                yield f"row {number}", row
    except Exception as error:  # on damaged bytes, pyarrow raises nearly anything
        if isinstance(error, Broken) or (isinstance(error, OSError) and error.errno):
            raise
        where = f" at row {number + 1} or behind it" if number else ""
        reason = shown(str(error).partition("\n")[0], 120)
        raise Broken(f"{container} that is cut off or damaged{where} ({reason}); {AGAIN}") from error


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
    """The rows as JSON would hold them (dates as text, decimals as numbers), or Broken for one that cannot be read."""
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
            return Broken(f"cannot be read ({shown(str(error))}); mend or delete it", f"field '{shown(name)}'")
    return row
