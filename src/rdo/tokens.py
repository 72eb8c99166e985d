"""How many tokens the work on a data set takes: naively, padded, and shared in a forest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rdo.data.encoding import EncodedRecord
from rdo.data.records import Record
from rdo.forest import TokenIds, count_unique
from rdo.scorers import ComparisonTemplate, Reading, add_difference
from rdo.stages.score import pairs_to_score

# Rows that are padded to one width, as many as a usual batch of pairs has.
PADDED_ROWS = 16


def token_counts(
    records: Sequence[Record], encoded: Sequence[EncodedRecord], template: ComparisonTemplate
) -> list[dict[str, Any]]:
    """For one epoch of each kind of work: tokens of the sequences one by one (naive), padded in batches of
    `PADDED_ROWS` rows in the data's order (padded), and with every shared prefix counted once a record (unique)."""
    work: dict[str, list[list[TokenIds]]] = {
        "DPO: both responses": [],
        "RRHF: all responses": [],
        "reward model: both responses": [],
        "difference training: f(a, b), f(b, a), f(a, a)": [],
        "difference scoring: one order": [],
        "difference scoring: both orders": [],
    }
    for record, ids in zip(records, encoded, strict=True):
        rows = [(*ids.prompt, *response) for response in ids.responses]
        work["RRHF: all responses"].append([*rows])
        work["difference scoring: one order"].append(comparisons(template, ids, pairs_to_score(record, False)))
        work["difference scoring: both orders"].append(comparisons(template, ids, pairs_to_score(record, True)))
        for preference in record.preferences:
            a, b = preference.chosen, preference.rejected
            work["DPO: both responses"].append([rows[a], rows[b]])
            work["reward model: both responses"].append([rows[a], rows[b]])
            three = comparisons(template, ids, [(a, b), (b, a), (a, a)])
            work["difference training: f(a, b), f(b, a), f(a, a)"].append(three)
    size = f"{len(records):,} records"
    return [{"work": f"{name} ({size})", **count(items)} for name, items in work.items() if items]


def comparisons(
    template: ComparisonTemplate, record: EncodedRecord, pairs: Sequence[tuple[int, int]]
) -> list[TokenIds]:
    """The difference model's sequences of some ordered pairs of a record."""
    reading = Reading()
    for first, second in pairs:
        add_difference(reading, "paper", template, record, first, second)
    return list(reading.sequences)


def count(items: Sequence[Sequence[TokenIds]]) -> dict[str, int]:
    """Tokens of all items by the three ways of counting."""
    lengths = [len(ids) for item in items for ids in item]
    batches = [lengths[start : start + PADDED_ROWS] for start in range(0, len(lengths), PADDED_ROWS)]
    return {
        "naive": sum(lengths),
        "padded": sum(len(batch) * max(batch) for batch in batches),
        "unique": sum(count_unique(item) for item in items),
    }
