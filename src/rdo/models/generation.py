"""Batched greedy and sampled generation, by transformers' own `generate`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers

from rdo.data.encoding import Ending
from rdo.sequences.forward import check_ids
from rdo.sequences.layout import to_device
from rdo.sequences.preparation import set_layout
from rdo.settings import EvalConfig


@dataclass(frozen=True)
class Generation:
    """One generated response: its text without its end, its ids with the end if it has one, and whether it has."""

    text: str
    ids: tuple[int, ...]
    stopped: bool


@dataclass(frozen=True)
class Stops:
    """What ends a generated response: any of these ids or texts. ending: that of the template, whole."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    ending: Ending


def find_stops(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    ending: Ending,
    texts: Sequence[str] = (),
) -> Stops:
    """What model, tokenizer and template each say ends a response, and texts that do. An ending of several ids counts
    by its last where that is a token of its own kind (" </s>"), else as a text."""
    last, own = ending.ids[-1], model.generation_config.eos_token_id
    known = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    if len(ending.ids) == 1 or last in tokenizer.added_tokens_decoder:
        known.append(last)
    else:
        texts = (*texts, ending.text)
    return Stops(tuple(sorted({n for n in known if n is not None})), tuple(texts), ending)


def generate_batch(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    batch: Sequence[tuple[int, ...]],
    config: EvalConfig,
    seed: int,
    stops: Stops,
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
        output = model.generate(
            input_ids=to_device(ids, model.device),
            attention_mask=to_device(mask, model.device),
            max_new_tokens=config.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=list(stops.ids) or None,
            **({"stop_strings": list(stops.texts), "tokenizer": tokenizer} if stops.texts else {}),
            **sampling,
        )
    return [cut(row, tokenizer, stops) for row in output[:, width:].tolist()]


@contextmanager
def no_generation_defaults(model: transformers.PreTrainedModel) -> Iterator[None]:
    """Sets aside what a model's generation_config.json would add unasked, such as repetition penalties."""
    own, model.generation_config = model.generation_config, transformers.GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def cut(row: list[int], tokenizer: transformers.PreTrainedTokenizerBase, stops: Stops) -> Generation:
    """A generated row up to and including what ends it first."""

    def text_of(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    at = next((n for n, one in enumerate(row) if one in stops.ids), len(row))
    said, ids = row[:at], row[: at + 1]
    # By the template, an end of several ids begins before the one that stops (" </s>").
    before = list(stops.ending.ids[:-1])
    if before and ids[-len(before) - 1 :] == list(stops.ending.ids):
        said = said[: -len(before)]
    text = text_of(said)
    if found := [text.index(stop) for stop in stops.texts if stop in text]:
        text = text[: min(found)]
        # The fewest ids that hold one of the texts.
        holds = range(at + 1)
        at = bisect_left(holds, True, key=lambda n: any(stop in text_of(row[:n]) for stop in stops.texts))
        return Generation(text, tuple(row[:at]), True)
    return Generation(text, tuple(ids), at < len(row))
