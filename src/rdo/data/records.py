"""The one record type that every reader produces and every stage consumes, and sequences of records.

In a file a record is a row of Arrow. Beside it stand the hashes that splits, orders and fingerprints are made of, so
that none of them needs the texts again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = ("demonstrations", "train", "validation", "test")
ROWS_PER_BATCH = 500
# What is known of every record without its texts. split: number in SPLITS, or -1. chance: in [0, 1), from split seed
# and query.
NUMBERS = {
    **{"split": np.int8, "response_count": np.int32, "chance": np.float64},
    **dict.fromkeys(("id_key", "query_key", "digest_first", "digest_second"), np.uint64),
}


@dataclass(frozen=True)
class Preference:
    """One comparison of two of a record's responses.

    chosen, rejected: indices into `Record.responses`; for a tie the order carries no meaning.
    tie: the judge found them equally good (target 0.5 for the difference model; skipped by the alignment losses).
    strength: how much better, in the data set's own unit (for example 1..4), or None.
    """

    chosen: int
    rejected: int
    tie: bool = False
    strength: float | None = None


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; role is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """One query with its responses.

    id: stable key under which stages exchange scores and log-probabilities; "" until one is made (readers.py).
    query: the text before template and tokenizer (an HH dialogue keeps its "\\n\\nHuman: ...\\n\\nAssistant:" form).
    responses: K >= 2 texts for preference data, K >= 1 for demonstrations and unpaired data.
    scores: one reward per response that came with the data (HH+ rows, the toy world's true reward), or None.
    split: the split that the source itself assigned ("train", "test", ...), or None when it is ours to choose.
    messages: the query as a conversation that ends with a user's message, where the source has it in that form; `query`
    is then its text (templates.text_of). The template `chat` renders these, every other template renders `query`.
    desirable: of unpaired data, whether each response is a good one (KTO); None for preference data.
    place: where the row stands ("FILE, line 12"), for messages; no part of what the record is.
    """

    id: str
    query: str
    responses: tuple[str, ...]
    preferences: tuple[Preference, ...] = ()
    scores: tuple[float, ...] | None = None
    split: str | None = None
    messages: tuple[Message, ...] = ()
    desirable: tuple[bool, ...] | None = None
    place: str = field(default="", compare=False)


def content_id(query: str, responses: Sequence[str]) -> str:
    """Stable id of a row that brings none: a hash of its texts, so that reordering the file changes no id."""
    text = json.dumps([query, *responses], ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def query_key(query: str) -> str:
    """What counts as the same query when splits are made: the text with runs of white space folded."""
    return " ".join(query.split())


def id_key(identifier: str) -> int:
    """By which records are put into an order that has nothing to do with the file's."""
    return int.from_bytes(hashlib.blake2b(identifier.encode()).digest()[:8], "big")


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _describe(record: Record, split_seed: int) -> dict[str, Any]:
    """The `NUMBERS` of a record."""
    key = query_key(record.query)
    preferences = [(p.chosen, p.rejected, p.tie, p.strength) for p in record.preferences]
    messages = [(message.role, message.content) for message in record.messages]
    seen = [record.id, record.query, record.responses, preferences, record.scores, messages, record.desirable]
    digest = hashlib.blake2b(json.dumps(seen).encode(), digest_size=16).digest()
    return {
        "split": SPLITS.index(record.split) if record.split else -1,
        "id_key": id_key(record.id),
        "query_key": _hashed(key),
        "chance": _hashed(f"{split_seed}:{key}") / 2**64,
        "digest_first": int.from_bytes(digest[:8], "big"),
        "digest_second": int.from_bytes(digest[8:], "big"),
        "response_count": len(record.responses),
    }


class Mapped(Sequence[Any]):
    """The rows of Arrow files, mapped into memory; `make` makes each into an object when it is asked for."""

    def __init__(self, files: Iterable[Path], make: Callable[[dict[str, Any]], Any]) -> None:
        import pyarrow as pa  # which what only computes does without

        self.files, self.make = list(files), make
        self.table = pa.concat_tables(pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in self.files)
        self.batches = self.table.to_batches()
        self.ends = np.cumsum([batch.num_rows for batch in self.batches])

    def __reduce__(self) -> Any:
        return Mapped, (self.files, self.make)  # another process maps the files itself

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, place: Any) -> Any:
        batch = int(np.searchsorted(self.ends, place, side="right"))
        rows = self.batches[batch]
        return self.make(rows.slice(place - self.ends[batch] + rows.num_rows, 1).to_pylist()[0])

    def at(self, places: np.ndarray) -> Iterator[Any]:
        """The rows at these places, in their order; read many at a time, which is several times faster: ever more of
        them, for many a reader has enough after the first."""
        steps = [0, *(10**power for power in range(4)), *range(10_000, len(places), 10_000)]
        for start, end in pairwise([*steps, len(places)]):
            wanted = places[start:end]
            batches = np.searchsorted(self.ends, wanted, side="right")
            rows: dict[int, Any] = {}
            for batch in np.unique(batches):
                found = wanted[batches == batch]
                first = self.ends[batch] - self.batches[batch].num_rows
                rows.update(zip(found.tolist(), self.batches[batch].take(found - first).to_pylist(), strict=True))
            yield from (self.make(rows[place]) for place in wanted.tolist())

    def numbers(self, column: str) -> np.ndarray:
        """One column of numbers."""
        return np.asarray(self.table.column(column).to_numpy())


class Records(Sequence[Record]):
    """Some of the records of a source, in the source's order: in memory are numbers of them, and not their texts."""

    def __init__(self, source: Sequence[Record], numbers: Mapping[str, np.ndarray], rows: np.ndarray) -> None:
        """numbers: `NUMBERS` of the whole source. rows: which of the source these are."""
        self.source, self.numbers, self.rows = source, numbers, rows

    @classmethod
    def in_memory(cls, records: Iterable[Record], split_seed: int = 0) -> Records:
        """Records that are in memory as they are."""
        source = list(records)
        described = [_describe(record, split_seed) for record in source]
        numbers = {name: np.array([d[name] for d in described], kind) for name, kind in NUMBERS.items()}
        return cls(source, numbers, np.arange(len(source)))

    @classmethod
    def in_file(cls, file: Path) -> Records:
        """All records of a file that `write_records` wrote."""
        source = Mapped([file], _as_record)
        return cls(source, {name: source.numbers(name) for name in NUMBERS}, np.arange(len(source)))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> list[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | list[Record]:
        return list(self.only(place)) if isinstance(place, slice) else self.source[int(self.rows[place])]

    def __iter__(self) -> Iterator[Record]:
        if isinstance(self.source, Mapped):
            return self.source.at(self.rows)
        return (self.source[row] for row in self.rows.tolist())

    def only(self, kept: np.ndarray | slice) -> Records:
        """The records at these places (numbers, a mask or a slice)."""
        return Records(self.source, self.numbers, self.rows[kept])

    def ids(self) -> list[str]:
        """The ids of all records."""
        if isinstance(self.source, Mapped):
            return list(self.source.table.column("id").take(self.rows).to_pylist())
        return [record.id for record in self]

    def known(self, name: str) -> np.ndarray:
        """One of `NUMBERS` of every record."""
        return self.numbers[name][self.rows]

    def fingerprint(self) -> str:
        """Hash of everything a stage can see of the records; independent of their order."""
        sums = [int(self.known(name).sum(dtype=np.uint64)) for name in ("digest_first", "digest_second")]
        return "".join(f"{value:016x}" for value in sums)


def _as_record(row: dict[str, Any]) -> Record:
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


def write_records(records: Iterable[Record], file: Path, split_seed: int) -> None:
    """Writes records with ids to a file."""
    import pyarrow as pa

    text = pa.string()
    message = pa.struct({"role": text, "content": text})
    preference = pa.struct({"chosen": pa.int32(), "rejected": pa.int32(), "tie": pa.bool_(), "strength": pa.float64()})
    schema = pa.schema(
        {
            **{"id": text, "query": text, "place": text, "responses": pa.list_(text), "scores": pa.list_(pa.float64())},
            **{"messages": pa.list_(message), "desirable": pa.list_(pa.bool_()), "preferences": pa.list_(preference)},
            **{name: pa.from_numpy_dtype(kind) for name, kind in NUMBERS.items()},
        }
    )
    write_rows(({**vars(r), **_plain(r), **_describe(r, split_seed)} for r in records), file, schema)


def _plain(record: Record) -> dict[str, Any]:
    return {name: [vars(entry) for entry in getattr(record, name)] for name in ("preferences", "messages")}


def write_rows(rows: Iterator[dict[str, Any]], file: Path, schema: pa.Schema) -> None:
    """Writes rows to an Arrow file, one batch in memory at a time."""
    import pyarrow as pa

    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in iter(lambda: list(islice(rows, ROWS_PER_BATCH)), []):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
