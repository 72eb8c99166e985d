"""Generation for evaluation: the product's batches against one prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rdo.bench.measure import Contestant
from rdo.data.encoding import EncodedRecord
from rdo.generation import generate_batch, no_generation_defaults
from rdo.models import set_layout
from rdo.schema import EvalConfig

NEW_TOKENS = 32


def generation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[EncodedRecord]
) -> tuple[Contestant, Contestant]:
    """Greedy responses to all prompts at once, as stage eval makes them, and one by one. What they must agree on are
    the first tokens: later ones follow from earlier ones, and a tie may break either way."""
    config = EvalConfig(decoding="greedy", max_new_tokens=NEW_TOKENS)
    prompts = [record.prompt for record in records]

    def prepare() -> None:
        set_layout(model, "flat")

    def run(size: int) -> torch.Tensor:
        first = []
        with torch.no_grad(), no_generation_defaults(model):
            for start in range(0, len(prompts), size):
                made = generate_batch(model, tokenizer, prompts[start : start + size], config)
                first += [one.ids[0] for one in made]
        return torch.tensor(first)

    return (
        Contestant("ours", lambda: run(config.batch_size), prepare),
        Contestant("unpadded", lambda: run(1), prepare),
    )
