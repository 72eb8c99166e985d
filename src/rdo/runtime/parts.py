"""Tables that are made in parts: what is finished is kept, and an interrupted run goes on from there.

A part is a range of records, of a size that depends on no budget; so the results are the same, interrupted or not, and
whatever the number of processes that the parts are dealt to. Each part is a Parquet file, with checksums of its pages,
that names its range and what it was made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from rdo.runtime import stopping
from rdo.runtime.errors import NotFiniteError
from rdo.runtime.files import replace_file
from rdo.runtime.processes import barrier, broadcast, is_rank0, world
from rdo.runtime.progress import progress_bar, say, warn
from rdo.runtime.store import fingerprint

FOLDER = "shards"  # one of store.PARTIAL
INPUTS = b"rdo_inputs"


class Shards:
    """The parts of one artifact's computation: rows of a table, made range by range."""

    def __init__(self, folder: Path, schema: pa.Schema, items: Sequence[Any], size: int):
        """folder: the artifact's. items: plain data that says what each item is made of; `size` of them are a part."""
        self.folder = folder / FOLDER
        self.schema = schema
        self.items = items
        self.parts = [range(start, min(start + size, len(items))) for start in range(0, len(items), size)]

    def make(self, title: str, rows: Callable[[range, tqdm], list[tuple[Any, ...]]]) -> None:
        """Makes every part that is not there yet, and returns when the other processes have made theirs.

        rows: makes a part's rows, and moves the bar on. Raises Stopped, and keeps the finished parts, when the process
        is asked to stop; NotFiniteError as `check_finite`.
        """
        all_missing = broadcast(lambda: [n for n, part in enumerate(self.parts) if not self.is_made(part)])
        done = len(self.parts) - len(all_missing)
        if done:
            say(f"going on: {done} of {len(self.parts)} shards are in {self.folder}")
        kept = sum(len(part) for n, part in enumerate(self.parts) if n not in all_missing)
        missing = [self.parts[n] for n in all_missing[world().rank :: world().size]]
        with stopping.postponed(), progress_bar(kept + sum(map(len, missing)), title, kept) as bar:
            for part in missing:
                try:
                    stopping.check()
                    made = rows(part, bar)
                except stopping.Stopped:
                    note = f"{done} of {len(self.parts)} shards are kept in {self.folder}"
                    raise stopping.Stopped(f"{note}; the same command goes on from there") from None
                self.write(part, made)
                done += 1
        barrier()

    def made_of(self, part: range) -> bytes:
        """What a part is made of: one that was made of something else is not taken. (A file whose rows were shuffled
        has the same key, and its records in other places.)"""
        return fingerprint(self.items[part.start : part.stop]).encode()

    def is_made(self, part: range) -> bool:
        """Whether a part is there, whole, and made of its items; one that is damaged is said."""
        if not self.file(part).exists():
            return False
        try:
            found = self.read(part).schema.metadata or {}
        except (OSError, pa.ArrowException) as error:
            warn(f"{self.file(part)} is damaged ({error}); it is made again")
            return False
        return found.get(INPUTS) == self.made_of(part)

    def write(self, part: range, rows: list[tuple[Any, ...]]) -> None:
        """Keeps a finished part. Raises NotFiniteError as `check_finite`."""
        check_finite(rows)
        columns = list(zip(*rows, strict=True)) or [()] * len(self.schema)
        arrays = [pa.array(values, field.type) for values, field in zip(columns, self.schema, strict=True)]
        table = pa.Table.from_arrays(arrays, schema=self.schema.with_metadata({INPUTS: self.made_of(part)}))
        with replace_file(self.file(part)) as temporary:
            pq.write_table(table, temporary, write_page_checksum=True)

    def read(self, part: range) -> pa.Table:
        """The rows of a finished part. Raises OSError or pyarrow's own where they are not as written."""
        return pq.ParquetFile(self.file(part), page_checksum_verification=True).read()

    def join(self, path: Path) -> None:
        """Writes the rows of all parts, in order, to one Parquet file, one part in memory at a time. The first process
        writes, for all."""
        if is_rank0():
            with (
                replace_file(path) as temporary,
                pq.ParquetWriter(temporary, self.schema, write_page_checksum=True) as writer,
            ):
                for part in self.parts:
                    writer.write_table(self.read(part).replace_schema_metadata(None))

    def file(self, part: range) -> Path:
        """Where a part lies."""
        return self.folder / f"{part.start:09d}-{part.stop:09d}.parquet"


def check_finite(rows: list[tuple[Any, ...]]) -> None:
    """Raises NotFiniteError, with the record ids of the first column, where a number of the last is NaN or infinite."""
    wrong = [row[0] for row in rows if isinstance(row[-1], float) and not math.isfinite(row[-1])]
    if wrong:
        what = f"{len(wrong)} of {len(rows)} values are no finite number"
        names = list(dict.fromkeys(wrong))[:20]
        raise NotFiniteError(what, names, "look at the model that computed them, and at these records")
