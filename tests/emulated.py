"""PyTorch's variable-length attention as it is documented, in the slowest and most obvious way, on any device."""

from __future__ import annotations

import math
from itertools import pairwise

import torch


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """query [queries, heads, width], key and value [keys, kv heads, width] give [queries, heads, width].

    cu_seq_q, cu_seq_k: [sequences + 1], int32, where each sequence begins and the last ends. window_size: how many keys
    a query sees to the left and to the right of its own place, which is counted from the ends of the two; -1 for all.
    """
    assert query.dtype == key.dtype == value.dtype
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    groups, rest = divmod(query.shape[1], key.shape[1])
    assert rest == 0
    assert groups == 1 or enable_gqa, "fewer key heads than query heads need enable_gqa"
    begin_q, begin_k = checked(cu_seq_q, query, max_q), checked(cu_seq_k, key, max_k)
    assert len(begin_q) == len(begin_k)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    parts = []
    for (q0, q1), (k0, k1) in zip(spans(begin_q), spans(begin_k), strict=True):
        q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (query[q0:q1], key[k0:k1], value[k0:k1]))
        k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
        scores = scale * torch.einsum("qhw,khw->hqk", q, k)
        place = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None]
        other = torch.arange(k1 - k0)[None]
        left, right = window_size
        seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        if left >= 0:
            seen &= other >= place - left
        if right >= 0:
            seen &= other <= place + right
        weights = scores.masked_fill(~seen.to(scores.device), -math.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khw->qhw", weights, v).to(query.dtype))
    return torch.cat(parts)


def checked(offsets: torch.Tensor, rows: torch.Tensor, longest: int) -> list[int]:
    """The offsets, which the kernel itself would believe."""
    assert offsets.dtype == torch.int32
    assert offsets.is_contiguous()
    begin = offsets.tolist()
    assert begin[0] == 0
    assert begin[-1] == len(rows)
    assert max(stop - start for start, stop in spans(begin)) == longest
    return begin


def spans(begin: list[int]) -> list[tuple[int, int]]:
    """Where each sequence begins and ends."""
    return list(pairwise(begin))


def varlen_attn_of_2_11(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """The same with the signature of PyTorch 2.11, which documents one number of heads for all three."""
    return varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=False
    )
