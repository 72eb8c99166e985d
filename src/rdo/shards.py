"""Long computations in parts: what is finished of one is kept, and an interrupted run goes on from there.

A part is a range of records or prompts, of a size that depends on no budget; so the results are the same, interrupted
or not, and whatever the number of processes that the parts are dealt to. Each part is a sealed Parquet file that names
its range and what it was made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from rdo import interrupts
from rdo.artifacts import fingerprint
from rdo.distributed import from_first, meet, world
from rdo.errors import NotFiniteError
from rdo.files import Damaged, patiently, read_sealed, replace_file, replace_sealed
from rdo.progress import progress_bar, say, warn

FOLDER = "shards"  # one of artifacts.PARTIAL
INPUTS = b"rdo_inputs"


class Shards:
    """The parts of one artifact's computation: rows of a table, made range by range."""

    def __init__(self, folder: Path, schema: pa.Schema, count: int, size: int, disk_full_minutes: float):
        """folder: the artifact's. count: records or prompts in all, `size` of them a part."""
        self.folder = folder / FOLDER
        self.schema = schema
        self.parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
        self.disk_full_minutes = disk_full_minutes

    def make(
        self, title: str, inputs: Callable[[range], Any], rows: Callable[[range, tqdm], list[tuple[Any, ...]]]
    ) -> None:
        """Makes every part that is not there yet, and returns when the other processes have made theirs.

        inputs: plain data that says what a part is made of; a part that was made of something else is not taken.
        rows: makes a part's rows, and moves the bar on. Raises Stopped, and keeps the finished parts, when the process
        is asked to stop; UserError where the disk has been full for engine.disk_full_minutes.
        """
        all_missing = from_first(lambda: self.missing(inputs))
        done = len(self.parts) - len(all_missing)
        if done:
            say(f"going on: {done} of {len(self.parts)} shards are in {self.folder}")
        missing = [self.parts[n] for n in all_missing[world().rank :: world().size]]
        left = sum(map(len, missing))
        total = left + sum(len(part) for n, part in enumerate(self.parts) if n not in all_missing)
        with interrupts.postponed(), progress_bar(total, title, total - left) as bar:
            for part in missing:
                try:
                    interrupts.check()
                    made = rows(part, bar)
                except interrupts.Stopped as stop:
                    kept = f"{done} of {len(self.parts)} shards are kept in {self.folder}"
                    raise interrupts.Stopped(stop.number, f"{kept}; the same command goes on from there") from None
                self.write(part, inputs(part), made)
                done += 1
        meet()

    def missing(self, inputs: Callable[[range], Any]) -> list[int]:
        """Numbers of the parts that are not there."""
        return [n for n, part in enumerate(self.parts) if not self.finished(part, inputs(part))]

    def finished(self, part: range, inputs: Any) -> bool:
        """Whether a part is there, whole, and made of these inputs; one that is not is said and made again."""
        if not self.file(part).exists():
            return False
        try:
            found = self.read(part).schema.metadata
        except Damaged as reason:
            warn(f"{self.file(part)} is damaged ({reason}); it is made again")
            return False
        return (found or {}).get(INPUTS) == fingerprint(inputs).encode()

    def write(self, part: range, inputs: Any, rows: list[tuple[Any, ...]]) -> None:
        """Keeps a finished part, waiting for room where the disk is full. Raises NotFiniteError as `check_finite`."""
        check_finite(rows)
        columns = list(zip(*rows, strict=True)) or [()] * len(self.schema)
        arrays = [pa.array(values, field.type) for values, field in zip(columns, self.schema, strict=True)]
        table = pa.Table.from_arrays(arrays, schema=self.schema.with_metadata({INPUTS: fingerprint(inputs)}))
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)

        def save() -> None:
            with replace_sealed(self.file(part)) as file:
                file.write(sink.getvalue())

        patiently(save, self.disk_full_minutes)

    def read(self, part: range) -> pa.Table:
        """The rows of a finished part. Raises Damaged where a bit of them is not as written."""
        return pq.read_table(pa.BufferReader(read_sealed(self.file(part))))

    def tables(self) -> Iterator[pa.Table]:
        """The rows of every part, in order, when all are made."""
        for part in self.parts:
            yield self.read(part).replace_schema_metadata(None)

    def join(self, path: Path) -> int:
        """Writes the rows of all parts to one Parquet file, one part in memory at a time; how many they are. The first
        process writes, for all."""
        if not world().first:
            return 0

        def write() -> int:
            count = 0
            with (
                replace_file(path) as temporary,
                pq.ParquetWriter(temporary, self.schema, write_page_checksum=True) as writer,
            ):
                for table in self.tables():
                    writer.write_table(table)
                    count += len(table)
            return count

        return patiently(write, self.disk_full_minutes)

    def file(self, part: range) -> Path:
        """Where a part lies."""
        return self.folder / f"{part.start:09d}-{part.stop:09d}.parquet"


def check_finite(rows: list[tuple[Any, ...]]) -> None:
    """Raises NotFiniteError, with the record ids of the first column, where a number of the last is NaN or infinite."""
    wrong = [row[0] for row in rows if isinstance(row[-1], float) and not math.isfinite(row[-1])]
    if wrong:
        names = list(dict.fromkeys(wrong))[:20]
        what = f"{len(wrong)} of {len(rows)} values are no finite number"
        raise NotFiniteError(what, names, "look at the model that computed them, and at these records")
