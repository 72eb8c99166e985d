"""Reference log-probabilities of the training responses, computed once and read by every alignment run.

Written to reference.parquet: one row (record_id, response, mismatched, log_probability) a response. The rows marked
mismatched are another record's responses under this record's query, for KTO's KL estimate: each record's partner is
fixed by a hash of the ids, not by the batch it happens to be in, so neither shuffling nor small batches break it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rdo.data.records import Record, Records
from rdo.runtime.errors import UserError
from rdo.runtime.store import Artifact
from rdo.sequences.forward import Reads
from rdo.settings import TrainingConfig
from rdo.stages.run import Run, select
from rdo.stages.sft import base_policy
from rdo.stages.tables import Body, read_table, reading, table

TABLE = pa.schema(
    {"record_id": pa.string(), "response": pa.int64(), "mismatched": pa.bool_(), "log_probability": pa.float64()}
)


@dataclass(frozen=True)
class Reference:
    """Reference log-probabilities by (record id, response): the record's own responses, and its partner's."""

    own: dict[tuple[str, int], float]
    mismatched: dict[tuple[str, int], float]


def partners(records: Sequence[Record], chosen: list[int]) -> dict[int, int]:
    """For each selected record another one, whose query differs, in a cycle through the hash order of `select`."""
    count = len(chosen)
    queries = (records if isinstance(records, Records) else Records.in_memory(records)).known("query_key")
    found: dict[int, int] = {}
    for position, n in enumerate(chosen):
        for step in range(1, count):
            other = chosen[(position + step) % count]
            if queries[other] != queries[n]:
                found[n] = other
                break
        else:
            raise UserError("KTO's KL estimate pairs a query with another query's response: there is only one query")
    return found


def reference(run: Run, mismatched: bool, split: str, selection: TrainingConfig) -> Artifact:
    """Log-probabilities under the base policy of the responses of a split's selected records, computed as the first
    step of training computes them: else that would begin with log-ratios of another rounding."""
    base = base_policy(run)
    kept = [selection.min_responses, selection.max_records]
    settings = run.settings(split, selection=kept, mismatched=mismatched)
    if run.autocasts():
        settings["autocast"] = True

    def begin() -> Body:
        model, tokenizer = run.policy(base, trained=run.autocasts())
        records, encoded = run.records(split), run.encoded(split, tokenizer)
        chosen = select(records, selection)
        other = partners(records, chosen) if mismatched else {}

        def listed(part: range) -> Iterator[tuple[Reads, list[tuple[Any, ...]]]]:
            for place in chosen[part.start : part.stop]:
                own = encoded[place]
                theirs = encoded[other[place]].responses if mismatched else ()
                keys = [(own.id, n, False) for n in range(len(own.responses))]
                keys += [(own.id, n, True) for n in range(len(theirs))]
                yield Reads.of(own.prompt, (*own.responses, *theirs)), keys

        ids: list[Any] = records.only(np.array(chosen, int)).ids()
        if mismatched:
            ids = list(zip(ids, records.only(np.array([other[n] for n in chosen], int)).ids(), strict=True))
        return reading(run, model, "reference log-probabilities", ids, listed)

    label = "mismatched" if mismatched else "responses"
    return table(run, "reference", label, settings, {"policy": base}, TABLE, begin)


def read_reference(artifact: Artifact) -> Reference:
    """The log-probabilities that `reference` wrote. Raises UserError where they are damaged."""
    found = Reference({}, {})
    for record_id, response, mismatched, value in zip(*read_table(artifact).values(), strict=True):
        (found.mismatched if mismatched else found.own)[record_id, response] = value
    return found
