"""Reference log-probabilities of the training responses, computed once and read by every alignment run.

Written to reference.parquet: one row (record_id, response, mismatched, log_probability) a response. The rows marked
mismatched are another record's responses under this record's query, for KTO's KL estimate: each record's partner is
fixed by a hash of the ids, not by the batch it happens to be in, so neither shuffling nor small batches break it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from rdo.artifacts import Artifact, produce
from rdo.data.encoding import EncodedRecord
from rdo.data.records import Record
from rdo.errors import UserError
from rdo.forest import make_layout
from rdo.models import read_log_probabilities, set_layout
from rdo.packing import pack
from rdo.progress import progress_bar
from rdo.readout import Span
from rdo.run import Run, select
from rdo.stages.score import write_table
from rdo.stages.sft import base_policy

REFERENCE = "reference.parquet"


@dataclass(frozen=True)
class Reference:
    """Reference log-probabilities by (record id, response): the record's own responses, and its partner's."""

    own: dict[tuple[str, int], float]
    mismatched: dict[tuple[str, int], float]


def partners(records: list[Record], chosen: list[int]) -> dict[int, int]:
    """For each selected record another one, whose query differs, in a cycle through the hash order of `select`."""
    count = len(chosen)
    found: dict[int, int] = {}
    for position, n in enumerate(chosen):
        for step in range(1, count):
            other = chosen[(position + step) % count]
            if records[other].query != records[n].query:
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
        "dtype": run.config.model.dtype,
        "selection": [selection.min_responses, selection.max_records],
        "mismatched": mismatched,
    }

    def make(folder: Path) -> dict[str, Any]:
        return write_reference(run, base, mismatched, folder)

    label = "mismatched" if mismatched else "responses"
    return produce(run.provenance, "reference", label, settings, {"policy": base}, make, run.requested == "reference")


def write_reference(run: Run, base: Artifact, mismatched: bool, folder: Path) -> dict[str, Any]:
    """Runs the reference over the training responses and writes the Parquet file."""
    model, tokenizer = run.policy(base)
    records, encoded = run.records("train"), run.encoded("train", tokenizer)
    chosen = select(records, run.config.align)
    other = partners(records, chosen) if mismatched else {}
    items, keys = [], []
    for n in chosen:
        entries = [(response, False, ids) for response, ids in enumerate(encoded[n].responses)]
        if mismatched:
            entries += [(response, True, ids) for response, ids in enumerate(encoded[other[n]].responses)]
        items.append((encoded[n], [ids for _, _, ids in entries]))
        keys.append([(records[n].id, response, is_other) for response, is_other, _ in entries])
    title = "reference log-probabilities"
    numbers = log_probabilities(run, model, items, title)
    flat = [value for values in numbers for value in values]
    rows = [(*key, value) for key, value in zip((key for group in keys for key in group), flat, strict=True)]
    write_table(folder / REFERENCE, ["record_id", "response", "mismatched", "log_probability"], rows)
    return {"records": len(chosen), "values": len(rows)}


def log_probabilities(
    run: Run, model: Any, items: list[tuple[EncodedRecord, list[tuple[int, ...]]]], title: str
) -> list[list[float]]:
    """Log-probability of each response given its record's prompt, without gradients, in the order given."""
    layout = set_layout(model, run.config.engine.layout)
    sequences = [[(*record.prompt, *ids) for ids in responses] for record, responses in items]
    results: list[list[float]] = [[] for _ in items]
    with torch.no_grad(), progress_bar(len(items), title) as bar:
        for batch in pack(sequences, layout, run.config.engine.tokens_per_micro_batch, by_length=True):
            flat = [ids for n in batch for ids in sequences[n]]
            starts = [len(items[n][0].prompt) for n in batch for _ in sequences[n]]
            spans = [Span(number, start) for number, start in enumerate(starts)]
            numbers = read_log_probabilities(model, make_layout(layout, flat), spans)[0].tolist()
            for n in batch:
                results[n], numbers = numbers[: len(sequences[n])], numbers[len(sequences[n]) :]
            bar.update(len(batch))
    return results


def read_reference(artifact: Artifact) -> Reference:
    """The log-probabilities that `reference` wrote."""
    table = pq.read_table(artifact.folder / REFERENCE).to_pydict()
    found = Reference({}, {})
    columns = zip(table["record_id"], table["response"], table["mismatched"], table["log_probability"], strict=True)
    for record_id, response, mismatched, value in columns:
        (found.mismatched if mismatched else found.own)[record_id, response] = value
    return found
