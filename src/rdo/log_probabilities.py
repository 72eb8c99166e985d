"""Log-probabilities of records' responses, without gradients: a reference's, and those that an evaluation compares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from rdo import interrupts
from rdo.data.encoding import EncodedRecord
from rdo.forest import LayoutName, TokenIds, make_layout
from rdo.models import read_log_probabilities
from rdo.packing import pack
from rdo.readout import Span

# A record, and the responses that are read under its prompt.
Item = tuple[EncodedRecord, Sequence[TokenIds]]


def read_under(
    bar: tqdm, model: PreTrainedModel, layout: LayoutName, items: Sequence[Item], budget: int
) -> list[list[float]]:
    """Log-probability of each response given its record's prompt, in the order given, under a bar that counts items.
    Raises Stopped between two batches when the process is asked to stop."""
    sequences = [[(*record.prompt, *ids) for ids in responses] for record, responses in items]
    results: list[list[float]] = [[] for _ in items]
    with torch.no_grad():
        for batch in pack(sequences, layout, budget):
            interrupts.check()
            flat = [ids for n in batch for ids in sequences[n]]
            starts = [len(items[n][0].prompt) for n in batch for _ in sequences[n]]
            spans = [Span(number, start) for number, start in enumerate(starts)]
            numbers = read_log_probabilities(model, make_layout(layout, flat), spans)[0].tolist()
            for n in batch:
                results[n], numbers = numbers[: len(sequences[n])], numbers[len(sequences[n]) :]
            bar.update(len(batch))
    return results
