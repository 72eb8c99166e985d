"""Tree attention by PyTorch's scaled dot product: any device, any dtype.

Every segment of a tree is one rectangle: its own tokens as queries, its whole path as keys, causal from the bottom
right. Small rectangles are padded together into one call, because on a CPU a call costs more than a little padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rdo.sequences.layout import PrefixTree, Segment, to_device

# One more call is worth about this many query-key cells (measured at widths 64 to 512 on one CPU core).
CALL_COST = 4096


@dataclass(frozen=True)
class Rectangles:
    """Segments that run in one call: `queries` [g, n] and `keys` [g, k] hold flat rows, padded with row 0.

    real: where in [g, n] the queries are that are not padding, as an index (a mask would have to be counted, which on a
    GPU the host waits for). key_positions: [g, k], huge where padded, so that the causal rule masks them. causal: all
    segments start at their root, so that plain causal attention needs no mask.
    """

    queries: Tensor
    keys: Tensor
    real: tuple[Tensor, Tensor]
    query_positions: Tensor
    key_positions: Tensor
    causal: bool

    def mask(self, window: int | None) -> Tensor:
        """[g, 1, n, k], true where a query may look; `window` counts distance along the path."""
        distance = self.query_positions[:, :, None] - self.key_positions[:, None, :]
        allowed = distance >= 0
        if window is not None:
            allowed = allowed & (distance < window)
        return allowed[:, None]


class GatheredPlan:
    """See `attention.Plan`."""

    def __init__(self, tree: PrefixTree, device: torch.device | str = "cpu"):
        groups = group_segments(tree.segments)
        self.rectangles = [make_rectangles(group, device) for group in groups]
        order = np.concatenate([np.arange(s.start, s.stop) for group in groups for s in group])
        self.inverse = to_device(np.argsort(order), device)
        self.longest = max(len(segment.path) for segment in tree.segments)
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def mask(self, number: int, window: int | None) -> Tensor | None:
        """The mask of a group, or None where plain causal attention does."""
        if window is not None and window >= self.longest:
            window = None
        rectangles = self.rectangles[number]
        if rectangles.causal and window is None:
            return None
        if (number, window) not in self._masks:
            self._masks[number, window] = rectangles.mask(window)
        return self._masks[number, window]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        # [tokens, heads, width]: rows first, so that gathering rows copies contiguous memory.
        q, k, v = (tensor[0].transpose(0, 1).to(query.dtype) for tensor in (query, key, value))
        outputs = []
        for number, rectangles in enumerate(self.rectangles):
            mask = self.mask(number, window)
            rows_q = q[rectangles.queries].transpose(1, 2)
            rows_k, rows_v = (tensor[rectangles.keys].transpose(1, 2) for tensor in (k, v))
            if groups > 1:
                rows_k, rows_v = (tensor.repeat_interleave(groups, dim=1) for tensor in (rows_k, rows_v))
            # Without a mask queries and keys are the same rows, and padding only follows.
            out = scaled_dot_product_attention(
                rows_q, rows_k, rows_v, attn_mask=mask, is_causal=mask is None, scale=scaling
            )
            outputs.append(out.transpose(1, 2)[rectangles.real])
        return torch.cat(outputs)[self.inverse][None]


def group_segments(segments: list[Segment]) -> list[list[Segment]]:
    """Puts segments of similar size into one call as long as the padding costs less than another call."""
    groups: list[list[Segment]] = []
    width = height = 0
    # Whole sequences and tails apart, because whole ones need no mask; then by size.
    for segment in sorted(segments, key=lambda s: (s.shared > 0, len(s.path), s.stop - s.start)):
        keys, queries = len(segment.path), segment.stop - segment.start
        if groups and (groups[-1][0].shared > 0) == (segment.shared > 0):
            wider, higher = max(width, keys), max(height, queries)
            padded = (len(groups[-1]) + 1) * wider * higher
            if padded - len(groups[-1]) * width * height - keys * queries <= CALL_COST:
                groups[-1].append(segment)
                width, height = wider, higher
                continue
        groups.append([segment])
        width, height = keys, queries
    return groups


def make_rectangles(segments: list[Segment], device: torch.device | str) -> Rectangles:
    """Pads a group of segments to one shape."""
    height = max(s.stop - s.start for s in segments)
    width = max(len(s.path) for s in segments)
    queries = np.zeros((len(segments), height), dtype=np.int64)
    keys = np.zeros((len(segments), width), dtype=np.int64)
    valid = np.zeros((len(segments), height), dtype=bool)
    # A padded query may see the first key, so that its softmax is a number; its output is dropped.
    query_positions = np.zeros((len(segments), height), dtype=np.int64)
    key_positions = np.full((len(segments), width), np.iinfo(np.int64).max // 2)
    for g, segment in enumerate(segments):
        own, path = segment.stop - segment.start, len(segment.path)
        queries[g, :own] = np.arange(segment.start, segment.stop)
        keys[g, :path] = segment.path
        valid[g, :own] = True
        query_positions[g, :own] = np.arange(segment.shared, path)
        key_positions[g, :path] = np.arange(path)
    moved = [to_device(array, device) for array in (queries, keys, *np.nonzero(valid), query_positions, key_positions)]
    causal = all(s.shared == 0 for s in segments)
    return Rectangles(moved[0], moved[1], (moved[2], moved[3]), moved[4], moved[5], causal)
