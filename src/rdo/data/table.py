"""Records in memory or in a memory-mapped file: one sequence, which holds numbers of its records and not their texts.

A file is Arrow's stream format, one row a record, read through `datasets`. Beside the record stand the hashes that
splits, orders and fingerprints are made of, so that none of them needs the texts again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pyarrow as pa

from rdo.data.records import SPLITS, Message, Preference, Record, content_id, digest, fingerprint_digests, query_key

if TYPE_CHECKING:
    import datasets

ROWS_PER_BATCH = 1000

PREFERENCE = pa.struct({"chosen": pa.int32(), "rejected": pa.int32(), "tie": pa.bool_(), "strength": pa.float64()})
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "query": pa.string(),
        "responses": pa.list_(pa.string()),
        "preferences": pa.list_(PREFERENCE),
        "scores": pa.list_(pa.float64()),
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "desirable": pa.list_(pa.bool_()),
        "place": pa.string(),
        "split": pa.int8(),  # number in SPLITS; -1: ours to choose
        "own_id": pa.bool_(),  # the data brought the id
        "id_key": pa.uint64(),
        "query_key": pa.uint64(),
        "chance": pa.float64(),
        "digest_first": pa.uint64(),
        "digest_second": pa.uint64(),
    }
)
NUMBERS = ("split", "own_id", "id_key", "query_key", "chance", "digest_first", "digest_second")


@dataclass
class Columns:
    """What is known of every record without its texts; arrays of one length.

    split: number in SPLITS, or -1. chance: in [0, 1), from split seed and query. digests: [n, 2] (records.digest).
    """

    split: np.ndarray
    own_id: np.ndarray
    id_key: np.ndarray
    query_key: np.ndarray
    chance: np.ndarray
    digests: np.ndarray
    responses: np.ndarray


def id_key(identifier: str) -> int:
    """By which records are put into an order that has nothing to do with the file's."""
    return int.from_bytes(hashlib.blake2b(identifier.encode()).digest()[:8], "big")


def chance(seed: int, key: str) -> float:
    """A number in [0, 1) that looks random, the same for the same seed and text everywhere."""
    value = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(value, "big") / 2**64


def describe(record: Record, split_seed: int) -> dict[str, Any]:
    """The numbers of a record that go into `Columns`."""
    key = query_key(record.query)
    first, second = digest(record)
    return {
        "split": SPLITS.index(record.split) if record.split else -1,
        "id_key": id_key(record.id),
        "query_key": int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big"),
        "chance": chance(split_seed, key),
        "digest_first": first,
        "digest_second": second,
    }


class Records(Sequence[Record]):
    """Some of the records of a source, in the source's order."""

    def __init__(self, source: Sequence[Record], columns: Columns, rows: np.ndarray, renamed: dict[int, str]):
        """rows: which of the source. renamed: row → its id, where the source's own is taken by an earlier row."""
        self.source, self.columns, self.rows, self.renamed = source, columns, rows, renamed

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> list[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | list[Record]:
        if isinstance(place, slice):
            rows = self.rows[place].tolist()
            found = (
                self.source.fetch(rows) if isinstance(self.source, MappedRecords) else [self.source[n] for n in rows]
            )
            return [self._renamed(row, record) for row, record in zip(rows, found, strict=True)]
        row = int(self.rows[place])
        return self._renamed(row, self.source[row])

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), ROWS_PER_BATCH):
            yield from self[start : start + ROWS_PER_BATCH]

    def _renamed(self, row: int, record: Record) -> Record:
        return replace(record, id=self.renamed[row]) if row in self.renamed else record

    def only(self, kept: np.ndarray | slice) -> Records:
        """The records at these places (numbers, a mask or a slice)."""
        return Records(self.source, self.columns, self.rows[kept], self.renamed)

    def ids(self) -> list[str]:
        """The ids of all records."""
        if not isinstance(self.source, MappedRecords):
            return [record.id for record in self]
        found = self.source.ids(self.rows)
        return [self.renamed.get(row, name) for row, name in zip(self.rows.tolist(), found, strict=True)]

    def response_counts(self) -> np.ndarray:
        """How many responses each record has."""
        return self.columns.responses[self.rows]

    def order_keys(self) -> np.ndarray:
        """One number a record, a hash of its id."""
        return self.columns.id_key[self.rows]

    def query_keys(self) -> np.ndarray:
        """One number a record, a hash of its query."""
        return self.columns.query_key[self.rows]

    def fingerprint(self) -> str:
        """Hash of everything a stage can see of the records; independent of their order."""
        return fingerprint_digests(self.columns.digests[self.rows])

    @classmethod
    def in_memory(cls, records: Iterable[Record], split_seed: int = 0) -> Records:
        """Records that are in memory as they are."""
        source = list(records)
        numbers = [describe(record, split_seed) for record in source]
        arrays = {
            name: np.array([entry[name] for entry in numbers], dtype=SCHEMA.field(name).type.to_pandas_dtype())
            for name in NUMBERS
            if name != "own_id"
        }
        arrays["own_id"] = np.ones(len(source), dtype=bool)
        responses = np.array([len(record.responses) for record in source], dtype=np.int64)
        return cls(source, _columns(arrays, responses), np.arange(len(source)), {})


def _columns(arrays: dict[str, np.ndarray], responses: np.ndarray) -> Columns:
    digests = np.stack([arrays.pop("digest_first"), arrays.pop("digest_second")], axis=1)
    return Columns(**arrays, digests=digests, responses=responses)


class MappedRecords(Sequence[Record]):
    """Every record of a file that `write_records` wrote, made when it is asked for."""

    def __init__(self, file: Path):
        import datasets  # takes a second to import, which the toy world need not wait for

        self.rows: datasets.Dataset = datasets.Dataset.from_file(str(file))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> list[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | list[Record]:
        if isinstance(place, slice):
            return self.fetch(list(range(*place.indices(len(self)))))
        return as_record(self.rows[place])

    def fetch(self, rows: list[int]) -> list[Record]:
        """The records of these rows."""
        found = self.rows[rows]
        return [as_record({name: found[name][n] for name in found}) for n in range(len(rows))]

    def ids(self, rows: np.ndarray) -> list[str]:
        """The ids in the file of these rows."""
        return self.rows.data.column("id").take(pa.array(rows)).to_pylist()

    def columns(self) -> Columns:
        """The numbers of all rows."""
        table = self.rows.data
        arrays = {name: table.column(name).to_numpy().copy() for name in NUMBERS}
        counts = [chunk.value_lengths().to_numpy() for chunk in table.column("responses").chunks]
        return _columns(arrays, np.concatenate([np.zeros(0, dtype=np.int64), *counts]))


def as_record(row: dict[str, Any]) -> Record:
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


def as_row(record: Record, split_seed: int) -> dict[str, Any]:
    """A record as a row of the file; one without an id gets a hash of its texts."""
    own_id = bool(record.id)
    if not own_id:
        record = replace(record, id=content_id(record.query, record.responses))
    return {
        "id": record.id,
        "query": record.query,
        "responses": record.responses,
        "preferences": [vars(preference) for preference in record.preferences],
        "scores": record.scores,
        "messages": [vars(message) for message in record.messages],
        "desirable": record.desirable,
        "place": record.place,
        "own_id": own_id,
        **describe(record, split_seed),
    }


def write_records(records: Iterable[Record], file: Path, split_seed: int) -> int:
    """Writes the records to a file, one batch in memory at a time; how many there were."""
    count = 0
    rows: list[dict[str, Any]] = []
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for record in records:
            rows.append(as_row(record, split_seed))
            if len(rows) == ROWS_PER_BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
                count, rows = count + len(rows), []
        writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
    return count + len(rows)


def repeated_ids(mapped: MappedRecords, columns: Columns) -> dict[int, list[int]]:
    """Rows whose id an earlier row has: first row → the later ones, in order."""
    order = np.argsort(columns.id_key, kind="stable")
    sorted_keys = columns.id_key[order]
    same = np.flatnonzero(sorted_keys[1:] == sorted_keys[:-1])
    suspects = np.unique(np.concatenate([order[same], order[same + 1]])).astype(np.int64)
    firsts: dict[str, int] = {}
    repeated: dict[int, list[int]] = {}
    for row, name in zip(suspects.tolist(), mapped.ids(suspects), strict=True):
        first = firsts.setdefault(name, row)
        if first != row:
            repeated.setdefault(first, []).append(row)
    return repeated
