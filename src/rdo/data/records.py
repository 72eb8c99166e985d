"""The one record type that every reader produces and every stage consumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

SPLITS = ("demonstrations", "train", "validation", "test")
ROLES = ("system", "user", "assistant")


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
    """One turn of a conversation; role is one of `ROLES`."""

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


def digest(record: Record) -> tuple[int, int]:
    """Hash of everything that a stage can see of a record, as two numbers below 2^64."""
    preferences = [(p.chosen, p.rejected, p.tie, p.strength) for p in record.preferences]
    messages = [(message.role, message.content) for message in record.messages]
    seen = [record.id, record.query, record.responses, preferences, record.scores, messages, record.desirable]
    value = hashlib.blake2b(json.dumps(seen).encode(), digest_size=16).digest()
    return int.from_bytes(value[:8], "big"), int.from_bytes(value[8:], "big")
