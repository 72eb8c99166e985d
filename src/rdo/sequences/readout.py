"""What is read off the hidden states: log-probabilities of token spans, and scalars at single positions.

Rows are gathered BEFORE the language-model head, and the head runs in chunks under recomputation once its logits
would no longer fit a budget, so that full logits never exist for a whole batch. All in float32, whatever the model's
dtype (float64 stays float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from rdo.runtime import stopping
from rdo.sequences.layout import Layout, tensor_on, to_device

# Logits that may exist at once, in elements: 64 Mi of float32 are 256 MiB.
LOGITS_BUDGET = 64 * 2**20


class Head(Protocol):
    """What makes logits [rows, ids] of last hidden states [rows, width], by the embeddings `weight` [ids, width]."""

    @property
    def weight(self) -> torch.Tensor: ...

    def __call__(self, states: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Span:
    """Read the log-probability of tokens [start, end of sequence) of a sequence, each given all before it."""

    sequence: int
    start: int


@dataclass(frozen=True)
class Scalar:
    """Read output `label` of the scalar head at one position of a sequence, times `factor`."""

    sequence: int
    position: int
    label: int = 0
    factor: float = 1.0


def span_log_probabilities(
    hidden: torch.Tensor,
    head: Head,
    layout: Layout,
    spans: Sequence[Span],
    logits_budget: int = LOGITS_BUDGET,
) -> torch.Tensor:
    """Summed log-probabilities of the spans, [spans].

    hidden: [rows, width] as the layout flattens them. Tokens before `start` (the query's) never count.
    """
    rows, targets, lengths = [], [], []
    for span in spans:
        ids = layout.sequences[span.sequence]
        rows.append(layout.index(span.sequence, np.arange(span.start - 1, len(ids) - 1)))
        targets.append(ids[span.start :])
        lengths.append(len(ids) - span.start)
    device = hidden.device
    index, target = to_device(np.concatenate(rows), device), to_device(np.concatenate(targets), device)
    tokens = token_log_probabilities(hidden[index], head, target, logits_budget)
    owner = to_device(np.repeat(np.arange(len(spans)), lengths), device)
    return torch.zeros(len(spans), dtype=tokens.dtype, device=device).index_add(0, owner, tokens)


def token_log_probabilities(
    hidden: torch.Tensor, head: Head, target: torch.Tensor, logits_budget: int = LOGITS_BUDGET
) -> torch.Tensor:
    """log softmax(head(hidden))[target] for hidden [tokens, width] and target [tokens]."""

    def chunk_log_probabilities(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        stopping.check_alone()  # a chunk takes as long as several layers
        return LogProbability.apply(in_full_precision(head(rows)), wanted)

    step = max(1, logits_budget // head.weight.shape[0])
    if len(target) <= step:
        return chunk_log_probabilities(hidden, target)
    parts = []
    for start in range(0, len(target), step):
        part = slice(start, start + step)
        parts.append(checkpoint(chunk_log_probabilities, hidden[part], target[part], use_reentrant=False))
    return torch.cat(parts)


class LogProbability(torch.autograd.Function):
    """log softmax(logits)[target] for logits [tokens, ids], which it takes over, and target [tokens].

    A vocabulary's worth of numbers for every token is the largest tensor of a step. It exists once: going forward the
    probabilities take its place, going backward the gradients. (PyTorch's own functions hold it three times.)
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        wanted = logits.gather(-1, target[:, None])
        largest = logits.amax(-1, keepdim=True)
        total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
        ctx.save_for_backward(logits, total, target)
        return (wanted - largest - total.log())[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        exponentials, total, target = ctx.saved_tensors
        gradient = gradient[:, None]
        exponentials.mul_(-gradient / total)
        return exponentials.scatter_add_(-1, target[:, None], gradient), None


def scalar_values(
    hidden: torch.Tensor, head: torch.nn.Linear, layout: Layout, values: Sequence[Sequence[Scalar]]
) -> torch.Tensor:
    """One number for each value [values]: the sum of its scalar reads."""
    reads = [read for value in values for read in value]
    rows = np.concatenate([layout.index(read.sequence, read.position) for read in reads])
    index = to_device(rows, hidden.device)
    bias = None if head.bias is None else in_full_precision(head.bias)
    outputs = linear(in_full_precision(hidden[index]), in_full_precision(head.weight), bias)
    return combine(outputs, values)


def combine(outputs: torch.Tensor, values: Sequence[Sequence[Scalar]]) -> torch.Tensor:
    """Sums the reads [reads, labels], given in order, into their values [values].

    What is added and what is taken away are summed apart: so f(y, y) is 0 and f(a, b) is -f(b, a) without rounding.
    """
    device = outputs.device
    reads = [read for value in values for read in value]
    label = tensor_on(device, [read.label for read in reads])
    factor = tensor_on(device, [read.factor for read in reads], outputs.dtype)
    owner = tensor_on(device, [number for number, value in enumerate(values) for _ in value])
    picked = outputs.gather(-1, label[:, None])[:, 0] * factor
    sums = torch.zeros(2 * len(values), dtype=outputs.dtype, device=device)
    gains, losses = sums.index_add(0, 2 * owner + (factor < 0), picked).view(-1, 2).unbind(1)
    return gains + losses


def in_full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """float32, but float64 where the model runs in it."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
