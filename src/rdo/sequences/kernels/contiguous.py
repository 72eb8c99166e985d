"""Tree attention on a CPU, by rectangles of contiguous rows: nothing is gathered, padded or masked.

In depth-first order a segment's rows are contiguous, and so are all rows that descend from a token. So two kinds of
rectangle (rows of queries x rows of keys) cover every token's path exactly once:

- each segment against itself, causal, in halves where it is long: causal each, and the second against all of the first;
- each stretch of a segment whose tokens have the same later rows below them, against those rows, all of it visible.

A row's attention is the merge, by their log-sum-exps, of the rectangles that it is a query of. Going backward, each
rectangle is given the merged output and log-sum-exp, which is all that its share of the gradients needs (Liu et al.
2023, ring attention, do the same over devices).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rdo.sequences.kernels.gathered import GatheredPlan
from rdo.sequences.layout import PrefixTree

# Below so many tokens a segment, on average, padding segments together is faster than a call each (measured at widths
# 64 to 512 on one core: 1.4 times at 30 tokens, equal at 60, 0.95 at 145 and more).
SHORT = 64
# PyTorch's kernel computes whole blocks of 512 keys and masks what is not visible, so that the causal attention of
# fewer tokens costs twice as much as it need. In halves, 512 tokens take 30 % less time, 300 tokens 12 % (one core).
LONG = 192
FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Rectangle:
    """Queries in the rows [start, stop) see the keys in the rows [key_start, key_stop)."""

    start: int
    stop: int
    key_start: int
    key_stop: int

    @property
    def causal(self) -> bool:
        """Rows against themselves."""
        return self.start == self.key_start


def causal_rectangles(start: int, stop: int) -> list[Rectangle]:
    """Rows of one segment against themselves."""
    if stop - start <= LONG:
        return [Rectangle(start, stop, start, stop)]
    middle = (start + stop + 1) // 2
    return [*causal_rectangles(start, middle), *causal_rectangles(middle, stop), Rectangle(middle, stop, start, middle)]


def contiguous_rectangles(tree: PrefixTree) -> list[Rectangle]:
    """The rectangles of a tree, the causal ones first."""
    ends = subtree_ends(tree)
    found = [r for segment in tree.segments for r in causal_rectangles(segment.start, segment.stop)]
    for segment in tree.segments:
        own = ends[segment.start : segment.stop]
        borders = np.flatnonzero(np.diff(own, prepend=-1, append=-1)).tolist()
        for first, last in pairwise(borders):
            if own[first] > segment.stop:
                keys = segment.start + first, segment.start + last
                found.append(Rectangle(segment.stop, int(own[first]), *keys))
    return sorted(found, key=lambda r: not r.causal)


def subtree_ends(tree: PrefixTree) -> np.ndarray:
    """For every row of a tree, one more than the last row that descends from it, [tokens]."""
    ends = np.empty(len(tree), dtype=np.int64)
    for segment in tree.segments:
        ends[segment.path] = segment.stop  # depth first: of those below a row, the last segment comes last
    return ends


class ContiguousPlan:
    """See `attention.Plan`."""

    def __init__(self, tree: PrefixTree, device: torch.device):
        self.rectangles = contiguous_rectangles(tree)
        self.longest = max(len(segment.path) for segment in tree.segments)
        self.short = len(tree) < SHORT * len(tree.segments)
        self.tree, self.device = tree, device

    @cached_property
    def padded(self) -> GatheredPlan:
        """What runs short segments, and windows that cut a path, which need masks."""
        return GatheredPlan(self.tree, self.device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
        if self.short or (window is not None and window < self.longest):
            return self.padded.attend(query, key, value, scaling, window)
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.to(query.dtype) for tensor in (key, value))
        if groups > 1:
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        return ContiguousAttention.apply(query, key, value, self.rectangles, scaling)


class ContiguousAttention(torch.autograd.Function):
    """query, key and value [1, heads, tokens, width] -> [1, tokens, heads, width]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rectangles: list[Rectangle], scaling: float | None
    ) -> Tensor:
        merged = rows_first(query)
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        log_sum_exp = query.new_empty(query.shape[:-1], dtype=wide)
        for r in rectangles:
            rows, keys = slice(r.start, r.stop), slice(r.key_start, r.key_stop)
            part, size = FORWARD(query[:, :, rows], key[:, :, keys], value[:, :, keys], 0.0, r.causal, scale=scaling)
            if r.causal:  # comes first of all that its queries are in
                merged[:, :, rows], log_sum_exp[:, :, rows] = part, size
                continue
            before = log_sum_exp[:, :, rows]
            share = torch.sigmoid(size - before)[..., None]  # exp(size) / (exp(before) + exp(size))
            merged[:, :, rows].lerp_(part, share.to(part.dtype))
            log_sum_exp[:, :, rows] = torch.logaddexp(before, size)
        ctx.save_for_backward(query, key, value, merged, log_sum_exp)
        ctx.rectangles, ctx.scaling = rectangles, scaling
        return merged.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, merged, log_sum_exp = ctx.saved_tensors
        gradient = gradient.transpose(1, 2)
        results = tuple(rows_first(tensor) for tensor in (query, key, value))
        for r in ctx.rectangles:
            rows, keys = slice(r.start, r.stop), slice(r.key_start, r.key_stop)
            saved = query[:, :, rows], key[:, :, keys], value[:, :, keys], merged[:, :, rows], log_sum_exp[:, :, rows]
            parts = BACKWARD(gradient[:, :, rows], *saved, 0.0, r.causal, scale=ctx.scaling)
            for result, part, at in zip(results, parts, (rows, keys, keys), strict=True):
                if r.causal:
                    result[:, :, at] = part
                else:
                    result[:, :, at] += part
        return *results, None, None


def rows_first(like: Tensor) -> Tensor:
    """An empty [1, heads, tokens, width] whose memory is [tokens, heads, width], as projections read and write it."""
    return torch.empty_like(like.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def why_not_contiguous(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """What keeps the kernel from a device, or None."""
    return None if device.type == "cpu" else f"runs on a CPU, and the model is on {device.type}"
