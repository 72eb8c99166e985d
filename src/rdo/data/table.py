"""Records in memory or in a memory-mapped file: one sequence, which holds numbers of its records and not their texts.

A file is a data set of `datasets`, one row a record. Beside the record stand the hashes that splits, orders and
fingerprints are made of, so that none of them needs the texts again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pyarrow as pa

from rdo.data.records import SPLITS, Message, Preference, Record, digest, query_key

if TYPE_CHECKING:
    import datasets

ROWS_PER_BATCH = 1000
# What is known of every record without its texts. split: number in SPLITS, or -1. chance: in [0, 1), from split seed
# and query.
NUMBERS = {
    **{"split": pa.int8(), "response_count": pa.int32(), "chance": pa.float64()},
    **dict.fromkeys(("id_key", "query_key", "digest_first", "digest_second"), pa.uint64()),
}
TEXT = pa.string()
MESSAGE = pa.struct({"role": TEXT, "content": TEXT})
PREFERENCE = pa.struct({"chosen": pa.int32(), "rejected": pa.int32(), "tie": pa.bool_(), "strength": pa.float64()})
SCHEMA = pa.schema(
    {
        **{"id": TEXT, "query": TEXT, "place": TEXT, "responses": pa.list_(TEXT), "scores": pa.list_(pa.float64())},
        **{"messages": pa.list_(MESSAGE), "desirable": pa.list_(pa.bool_()), "preferences": pa.list_(PREFERENCE)},
        **NUMBERS,
    }
)


def id_key(identifier: str) -> int:
    """By which records are put into an order that has nothing to do with the file's."""
    return int.from_bytes(hashlib.blake2b(identifier.encode()).digest()[:8], "big")


def hashed(text: str) -> int:
    """A number below 2^64 that looks random, the same for the same text everywhere."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def describe(record: Record, split_seed: int) -> dict[str, Any]:
    """The `NUMBERS` of a record."""
    key = query_key(record.query)
    first, second = digest(record)
    return {
        "split": SPLITS.index(record.split) if record.split else -1,
        "id_key": id_key(record.id),
        "query_key": hashed(key),
        "chance": hashed(f"{split_seed}:{key}") / 2**64,
        "digest_first": first,
        "digest_second": second,
        "response_count": len(record.responses),
    }


class Records(Sequence[Record]):
    """Some of the records of a source, in the source's order."""

    def __init__(
        self, source: Sequence[Record] | datasets.Dataset, numbers: Mapping[str, np.ndarray], rows: np.ndarray
    ) -> None:
        """numbers: `NUMBERS` of the whole source. rows: which of the source these are."""
        self.source, self.numbers, self.rows = source, numbers, rows

    @classmethod
    def in_memory(cls, records: Iterable[Record], split_seed: int = 0) -> Records:
        """Records that are in memory as they are."""
        source = list(records)
        described = [describe(record, split_seed) for record in source]
        kinds = {name: kind.to_pandas_dtype() for name, kind in NUMBERS.items()}
        numbers = {name: np.array([d[name] for d in described], kind) for name, kind in kinds.items()}
        return cls(source, numbers, np.arange(len(source)))

    @classmethod
    def in_file(cls, file: Path) -> Records:
        """All records of a file that `write_records` wrote, each made when it is asked for."""
        import datasets  # takes a second to import, which the toy world need not wait for

        source = datasets.Dataset.from_file(str(file))
        numbers = {name: source.data.column(name).to_numpy() for name in NUMBERS}
        return cls(source, numbers, np.arange(len(source)))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> list[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | list[Record]:
        if isinstance(place, slice):
            rows, source = self.rows[place].tolist(), self.source
            return [source[n] for n in rows] if isinstance(source, Sequence) else as_records(source[rows])
        found = self.source[int(self.rows[place])]
        return found if isinstance(found, Record) else as_record(found)

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), ROWS_PER_BATCH):
            yield from self[start : start + ROWS_PER_BATCH]

    def only(self, kept: np.ndarray | slice) -> Records:
        """The records at these places (numbers, a mask or a slice)."""
        return Records(self.source, self.numbers, self.rows[kept])

    def ids(self) -> list[str]:
        """The ids of all records."""
        if isinstance(self.source, Sequence):
            return [record.id for record in self]
        return list(self.source.select_columns("id")[self.rows.tolist()]["id"])

    def known(self, name: str) -> np.ndarray:
        """One of `NUMBERS` of every record."""
        return self.numbers[name][self.rows]

    def query_keys(self) -> np.ndarray:
        """One number a record, a hash of its query."""
        return self.known("query_key")

    def fingerprint(self) -> str:
        """Hash of everything a stage can see of the records; independent of their order."""
        sums = [int(self.known(name).sum(dtype=np.uint64)) for name in ("digest_first", "digest_second")]
        return "".join(f"{value:016x}" for value in sums)


def as_record(row: Mapping[str, Any]) -> Record:
    """A row of the file as a record."""
    return Record(
        id=row["id"],
        query=row["query"],
        responses=tuple(row["responses"]),
        preferences=tuple(Preference(**preference) for preference in row["preferences"]),
        scores=None if row["scores"] is None else tuple(row["scores"]),
        split=None if row["split"] < 0 else SPLITS[row["split"]],
        messages=tuple(Message(**message) for message in row["messages"]),
        desirable=None if row["desirable"] is None else tuple(row["desirable"]),
        place=row["place"],
    )


def as_records(columns: Mapping[str, Sequence[Any]]) -> list[Record]:
    """A batch of rows as records."""
    return [as_record(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def write_records(records: Iterable[Record], file: Path, split_seed: int) -> None:
    """Writes records with ids to a file, one batch in memory at a time."""
    rows = ({**vars(record), **_plain(record), **describe(record, split_seed)} for record in records)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for batch in iter(lambda: list(islice(rows, ROWS_PER_BATCH)), []):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, SCHEMA))


def _plain(record: Record) -> dict[str, Any]:
    return {name: [vars(entry) for entry in getattr(record, name)] for name in ("preferences", "messages")}
