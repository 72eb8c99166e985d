"""Reference log-probabilities of the training responses, computed once and read by every alignment run.

Written to reference.parquet: one row (record_id, response, mismatched, log_probability) a response. The rows marked
mismatched are another record's responses under this record's query, for KTO's KL estimate: each record's partner is
fixed by a hash of the ids, not by the batch it happens to be in, so neither shuffling nor small batches break it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm
from transformers import PreTrainedModel

from rdo.data.records import Record
from rdo.data.table import Records
from rdo.runtime.errors import UserError
from rdo.runtime.parts import Shards
from rdo.runtime.store import Artifact, produce
from rdo.sequences.forward import Prompted, read_under
from rdo.sequences.preparation import set_layout
from rdo.stages.run import Run, select
from rdo.stages.score import read_table
from rdo.stages.sft import base_policy

REFERENCE = "reference.parquet"
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
    queries = (records if isinstance(records, Records) else Records.in_memory(records)).query_keys()
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


def reference(run: Run, mismatched: bool) -> Artifact:
    """Log-probabilities under the base policy of the responses that `align` selects."""
    base = base_policy(run)
    selection = run.config.align
    settings = {
        "data": run.data_settings("train"),
        "dtype": run.dtype(),
        "selection": [selection.min_responses, selection.max_records],
        "mismatched": mismatched,
    }

    def make(folder: Path) -> dict[str, Any]:
        return write_reference(run, base, mismatched, folder)

    label = "mismatched" if mismatched else "responses"
    return produce(run.provenance, "reference", label, settings, {"policy": base}, make, run.requested == "reference")


def write_reference(run: Run, base: Artifact, mismatched: bool, folder: Path) -> dict[str, Any]:
    """Runs the reference over the training responses, shard by shard, and joins them to the Parquet file.

    Raises as `Shards.make` does.
    """
    model, tokenizer = run.policy(base)
    engine = run.config.engine
    layout = set_layout(model, engine.layout, engine.attention)
    records, encoded = run.records("train"), run.encoded("train", tokenizer)
    chosen = select(records, run.config.align)
    other = partners(records, chosen) if mismatched else {}

    def rows(part: range, bar: tqdm) -> list[tuple[Any, ...]]:
        items: list[Prompted] = []
        keys: list[tuple[Any, ...]] = []
        for place in chosen[part.start : part.stop]:
            own = encoded[place]
            entries = [(response, False, ids) for response, ids in enumerate(own.responses)]
            if mismatched:
                entries += [(response, True, ids) for response, ids in enumerate(encoded[other[place]].responses)]
            items.append((own.prompt, [ids for _, _, ids in entries]))
            keys += [(own.id, response, is_other) for response, is_other, _ in entries]
        values = read_under(bar, model, layout, items, engine.tokens_per_micro_batch)
        return [(*key, value) for key, value in zip(keys, (n for group in values for n in group), strict=True)]

    def inputs(part: range) -> list[str]:
        places = chosen[part.start : part.stop]
        return records.only(np.array(places + [other[n] for n in places if mismatched], int)).ids()

    shards = Shards(folder, TABLE, len(chosen), engine.records_per_shard)
    with run.locating("train"):
        shards.make("reference log-probabilities", inputs, rows)
    return {"records": len(chosen), "values": shards.join(folder / REFERENCE)}


def log_probabilities(run: Run, model: PreTrainedModel, items: Sequence[Prompted], title: str) -> list[list[float]]:
    """Log-probability of each response given its record's prompt, without gradients, in the order given. Raises
    Stopped between two batches when the process is asked to stop."""
    return run.read_all(model, items, title, read_under)


def read_reference(artifact: Artifact) -> Reference:
    """The log-probabilities that `reference` wrote. Raises UserError where they are damaged."""
    table = read_table(artifact, REFERENCE)
    found = Reference({}, {})
    columns = zip(table["record_id"], table["response"], table["mismatched"], table["log_probability"], strict=True)
    for record_id, response, mismatched, value in columns:
        (found.mismatched if mismatched else found.own)[record_id, response] = value
    return found
