"""The one record type that every reader produces and every stage consumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SPLITS = ("demonstrations", "train", "validation", "test")


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
class Record:
    """One query with its responses.

    id: stable key under which stages exchange scores and log-probabilities.
    query: the text before template and tokenizer (an HH dialogue keeps its "\\n\\nHuman: ...\\n\\nAssistant:" form).
    responses: K >= 2 texts for preference data, K >= 1 in the split `demonstrations`.
    scores: one reward per response that came with the data (HH+ rows, the toy world's true reward), or None.
    split: the split that the source itself assigned ("train", "test", ...), or None when it is ours to choose.
    """

    id: str
    query: str
    responses: tuple[str, ...]
    preferences: tuple[Preference, ...] = ()
    scores: tuple[float, ...] | None = None
    split: str | None = None


def content_id(query: str, responses: Sequence[str]) -> str:
    """Stable id of a row that brings none: a hash of its texts, so that reordering the file changes no id."""
    text = json.dumps([query, *responses], ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def query_key(query: str) -> str:
    """What counts as the same query when splits are made: the text with runs of white space folded."""
    return " ".join(query.split())


def fingerprint_records(records: Iterable[Record]) -> str:
    """Hash of everything a stage can see of the records; independent of their order."""
    total = 0
    for record in records:
        row = json.dumps(
            [
                record.id,
                record.query,
                record.responses,
                [(p.chosen, p.rejected, p.tie, p.strength) for p in record.preferences],
                record.scores,
            ]
        )
        digest = hashlib.blake2b(row.encode(), digest_size=16).digest()
        total = (total + int.from_bytes(digest, "big")) % (1 << 128)
    return f"{total:032x}"
