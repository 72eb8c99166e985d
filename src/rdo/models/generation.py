"""Batched greedy and sampled generation, by transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers

from rdo.sequences.forward import check_ids
from rdo.sequences.layout import to_device
from rdo.sequences.preparation import set_layout
from rdo.settings import EvalConfig


@dataclass(frozen=True)
class Generation:
    """One generated response: its text, its ids with the end of sequence if it has one, and whether it stopped."""

    text: str
    ids: tuple[int, ...]
    stopped: bool


def generate_batch(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    batch: Sequence[tuple[int, ...]],
    config: EvalConfig,
    seed: int,
) -> list[Generation]:
    """The responses to a few prompts, in order; with the same seed the same ones. Leaves the model padded."""
    set_layout(model, "padded")
    torch.manual_seed(seed)
    # Rows are padded on the left; without a pad token of its own the model never sees the id that stands there.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    sampling = {"do_sample": False}
    if config.decoding == "sample":
        sampling = {"do_sample": True, "temperature": config.temperature, "top_k": 0, "top_p": 1.0}  # type: ignore[dict-item]
    width = max(map(len, batch))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in batch])
    check_ids(model, ids)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
    with torch.no_grad(), no_generation_defaults(model):
        output = model.generate(  # type: ignore[operator]
            input_ids=to_device(ids, model.device),
            attention_mask=to_device(mask, model.device),
            max_new_tokens=config.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            **sampling,
        )
    return [cut(row, tokenizer) for row in output[:, width:].tolist()]


@contextmanager
def no_generation_defaults(model: transformers.PreTrainedModel) -> Iterator[None]:
    """Sets aside what a model's generation_config.json would add unasked, such as repetition penalties."""
    own, model.generation_config = model.generation_config, transformers.GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def cut(row: list[int], tokenizer: transformers.PreTrainedTokenizerBase) -> Generation:
    """A generated row up to and including its first end of sequence."""
    end = tokenizer.eos_token_id
    stopped = end in row
    ids = row[: row.index(end) + 1] if stopped else row
    text = tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True)
    return Generation(str(text), tuple(ids), stopped)
