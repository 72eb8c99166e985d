"""A micro-batch through a model: hidden states, and what is read off policies and scorers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutput

from rdo.runtime import stopping
from rdo.runtime.errors import UserError
from rdo.sequences.attention import KERNELS, kernel_of
from rdo.sequences.layout import Layout, LayoutName, Padded, TokenIds, make_layout, pack, to_device
from rdo.sequences.readout import Scalar, Span, combine, in_full_precision, scalar_values, span_log_probabilities

OWN_HEAD = "rdo_own_head"  # a mark on models


@dataclass
class Reads:
    """Token sequences of one record, or of several, and what is read off them: log-probabilities of spans, or values of
    a scorer, each a sum of scalars; one of the two is empty."""

    sequences: list[TokenIds] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    scalars: list[list[Scalar]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.spans) + len(self.scalars)

    def add(self, *parts: TokenIds) -> int:
        """Lists a sequence, made of parts; its number."""
        self.sequences.append(tuple(chain(*parts)))
        return len(self.sequences) - 1

    @classmethod
    def of(cls, prompt: TokenIds, responses: Iterable[TokenIds]) -> Reads:
        """The log-probability of each response given its prompt."""
        reads = cls()
        reads.spans = [Span(reads.add(prompt, response), len(prompt)) for response in responses]
        return reads

    @property
    def lengths(self) -> list[int]:
        """How many tokens each span reads."""
        return [len(self.sequences[span.sequence]) - span.start for span in self.spans]


def merge(items: Sequence[Reads]) -> Reads:
    """The reads of several items as those of one."""
    merged = Reads()
    for item in items:
        offset = len(merged.sequences)
        merged.sequences += item.sequences
        merged.spans += [Span(span.sequence + offset, span.start) for span in item.spans]
        merged.scalars += [
            [Scalar(read.sequence + offset, read.position, read.label, read.factor) for read in value]
            for value in item.scalars
        ]
    return merged


def hidden_states(model: transformers.PreTrainedModel, layout: Layout) -> torch.Tensor:
    """Last hidden states of a micro-batch, [rows, width], in the order that `layout.index` speaks of."""
    output = forward_pass(backbone(model), model, layout, use_cache=False)
    if getattr(output, "last_hidden_state", None) is None:
        raise UserError(f"{type(model).__name__} does not give its last hidden states: not supported")
    return output.last_hidden_state.flatten(0, 1)


def backbone(model: transformers.PreTrainedModel) -> torch.nn.Module:
    """What of a model gives its last hidden states; a few (Llama 4) do not have it under the name that they declare."""
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


def forward_pass(module: torch.nn.Module, model: transformers.PreTrainedModel, layout: Layout, **options: Any) -> Any:
    """What a model, or its backbone, makes of a micro-batch. Raises UserError where that does not fit the model."""
    check_positions(model, max(map(len, layout.sequences)))
    check_ids(model, layout.ids)
    device = model.device
    if isinstance(layout, Padded):
        ids, mask = to_device(layout.ids, device), to_device(layout.mask, device)
        return module(input_ids=ids, attention_mask=mask, **options)
    ids, positions = to_device(layout.ids[None], device), to_device(layout.positions[None], device)
    kernel = kernel_of(model)
    plan = None if kernel is None else KERNELS[kernel](layout, device)
    return module(input_ids=ids, position_ids=positions, tree=plan, **options)


def read(model: transformers.PreTrainedModel, layout: LayoutName, reads: Reads) -> torch.Tensor:
    """What is read off a micro-batch, [values]; an encoder pools by its own rule and is read once a sequence."""
    laid_out = make_layout(layout, reads.sequences)
    if reads.spans:
        return span_log_probabilities(hidden_states(model, laid_out), language_head(model), laid_out, reads.spans)
    if (scalar_head := decoder_head(model)) is not None:
        return scalar_values(hidden_states(model, laid_out), scalar_head, laid_out, reads.scalars)
    if layout == "tree":
        raise UserError(f"{type(model).__name__} cannot run in a tree; use engine.layout=padded")
    outputs = forward_pass(model, model, laid_out).logits
    rows = to_device(np.array([scalar.sequence for value in reads.scalars for scalar in value]), model.device)
    return combine(in_full_precision(outputs[rows]), reads.scalars)


def read_all(
    bar: tqdm, model: transformers.PreTrainedModel, layout: LayoutName, items: Sequence[Reads], budget: int
) -> list[list[float]]:
    """What is read off each item, without gradients, in the order given, under a bar that counts items. Raises Stopped
    between two micro-batches when the process is asked to stop."""
    results: list[list[float]] = [[] for _ in items]
    with torch.no_grad():
        for batch in pack([item.sequences for item in items], layout, budget):
            stopping.check()
            values = iter(read(model, layout, merge([items[n] for n in batch])).tolist())
            for n in batch:
                results[n] = list(islice(values, len(items[n])))
            bar.update(len(batch))
    return results


@dataclass
class Given(BaseModelOutput):
    """What a backbone gives; of all that it may give besides, nothing."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class OwnHead:
    """All that a causal language model does behind its backbone, be it that it projects, scales or caps: its own
    forward pass, whose backbone gives the hidden states that are given."""

    def __init__(self, model: transformers.PreTrainedModel):
        self.model = model

    @property
    def weight(self) -> torch.Tensor:
        """The output embeddings [ids, width]."""
        return self.model.get_output_embeddings().weight

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [rows, ids] of last hidden states [rows, width]."""
        given = Given(last_hidden_state=states[None])
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        attributes = vars(backbone(self.model))  # which come before those of its class
        own = {name: value for name, value in attributes.items() if name == "forward"}
        attributes["forward"] = lambda *_, **__: given
        try:
            return self.model(input_ids=ids, use_cache=False).logits[0]
        finally:
            del attributes["forward"]
            attributes.update(own)


def language_head(model: transformers.PreTrainedModel) -> torch.nn.Linear | OwnHead:
    """What makes logits of last hidden states: the output embeddings, or what `traits.choose_head` found instead."""
    return OwnHead(model) if getattr(model, OWN_HEAD, False) else model.get_output_embeddings()


def decoder_head(model: transformers.PreTrainedModel) -> torch.nn.Linear | None:
    """A scorer's head where it sits on a causal decoder, so that it may be read at any position; else None."""
    head: Any = getattr(model, "score", None)
    if hasattr(head, "modules_to_save"):  # peft's wrapper of what is trained whole beside an adapter
        head = head.modules_to_save["default"]
    return head if isinstance(head, torch.nn.Linear) else None


def check_positions(
    model: transformers.PreTrainedModel, longest: int, remedy: str = "lower dataset.max_length"
) -> None:
    """Raises UserError where a sequence has more tokens than the model takes."""
    most, reason = longest_sequence(model)
    if longest > most:
        raise UserError(
            f"a sequence of {longest} tokens, but {type(model).__name__} takes {most:.0f}{reason}; {remedy} (the "
            "difference model reads the query and both responses, up to twice dataset.max_length)"
        )


def longest_sequence(model: transformers.PreTrainedModel) -> tuple[float, str]:
    """How many tokens a sequence may have, be it without an end, and why, where that is fewer than its positions.

    RoBERTa and its kin count positions from behind that of padding. Past its first length, longrope turns the positions
    of a whole micro-batch otherwise, so that a long sequence would change the numbers of a short one.
    """
    config = model.config.get_text_config()
    most, reason = getattr(config, "max_position_embeddings", None) or math.inf, ""
    most = most if most > 0 else math.inf  # XLNet's are -1
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and (padding := getattr(module, "padding_idx", None)) is not None:
            return most - padding - 1, f", as it counts positions from {padding + 1}"
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *rope.values()):  # one of all layers, or one of each type of layer
        if isinstance(kind, dict) and kind.get("rope_type") == "longrope":
            most = min(most, kind["original_max_position_embeddings"])
            reason = ", because more would change its rope_type=longrope for all sequences of a micro-batch"
    return most, reason


def check_ids(model: transformers.PreTrainedModel, ids: torch.Tensor) -> None:
    """Raises UserError where the model has no embedding for a token id."""
    rows, largest = len(input_embeddings(model)), int(ids.max())
    if largest >= rows:
        raise UserError(
            f"the token id {largest}, but {model.name_or_path or type(model).__name__} has {rows} embeddings only: its "
            "tokenizer belongs to another model"
        )


def input_embeddings(model: transformers.PreTrainedModel) -> torch.Tensor:
    """The matrix [ids, width] that token ids are looked up in."""
    return model.get_input_embeddings().get_parameter("weight")
