"""Tree attention on a GPU (`varlen`): one variable-length flash attention over all segments, in half precision; the
keys of a path are gathered.

It has not been run on a GPU yet; launch/gpu_check.py compares it with the CPU there. What a layer passes may be of
several dtypes: under autocast, queries and keys leave the rotary embedding in float32, and values do not go through it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rdo.runtime.errors import UserError
from rdo.sequences.layout import PrefixTree, to_device
from rdo.sequences.readout import in_full_precision

HALF = (torch.float16, torch.bfloat16)
VARLEN = "torch.nn.attention.varlen"  # which takes seconds to import


def why_not_varlen(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """What keeps `varlen` from running here, said of it, or None."""
    if device.type != "cuda" or torch.version.hip:
        return "needs an NVIDIA GPU"
    if dtype not in HALF:
        named = str(dtype).removeprefix("torch.")
        return f"computes in half precision alone, and this is {named} (see engine.precision and model.dtype)"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0) or not torch.backends.cuda.is_flash_attention_available():
        return "needs a GPU of compute capability 8.0, and a PyTorch that was built with flash attention"
    # Going backward, wide heads take more shared memory than the smaller cards of a generation have.
    widest = 192 if (8, 0) < capability < (9, 0) or capability >= (12, 0) else 256
    if head_width % 8 or head_width > widest:
        return f"takes heads whose width is a multiple of 8 up to {widest}, and the model's is {head_width}"
    # cuDNN's causal mask is aligned at the top left: a segment's first token would see the first of its path alone.
    cudnn = getattr(importlib.import_module(VARLEN), "_should_use_cudnn", None)
    if cudnn is not None and cudnn(device.index or 0):
        return "needs flash attention, and this PyTorch takes cuDNN's, whose causal mask is aligned at the top left"
    return None


class VarlenPlan:
    """One call a layer: each segment is a sequence whose queries are its own rows, and whose keys are its path.

    Segments lie in the order of their rows and together are all rows, so that the queries are the flat row as it is.
    The last own token sees the whole path, the one before it a key less: causal, aligned at the bottom right.
    """

    def __init__(self, tree: PrefixTree, device: torch.device | str):
        own = [segment.stop - segment.start for segment in tree.segments]
        keys = [len(segment.path) for segment in tree.segments]
        self.longest_own, self.longest_path = max(own), max(keys)
        self.query_offsets = to_device(offsets(own), device)
        self.key_offsets = to_device(offsets(keys), device)
        # Where nothing is shared, the paths are the rows themselves.
        shared = sum(keys) > len(tree)
        self.rows = to_device(np.concatenate([s.path for s in tree.segments]), device) if shared else None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
        """Raises UserError where that is not to be computed in half precision."""
        dtype = computed_dtype(value)
        if dtype not in HALF:
            raise UserError(f"engine.attention=varlen does not compute in {dtype}; use engine.attention=auto")
        # [tokens, heads, width]
        q = query[0].transpose(0, 1).to(dtype).contiguous()
        k, v = (self.gathered(tensor[0].transpose(0, 1).to(dtype)) for tensor in (key, value))
        attention, grouped = importlib.import_module(VARLEN).varlen_attn, {}
        if k.shape[1] != q.shape[1] and "enable_gqa" in inspect.signature(attention).parameters:
            grouped = {"enable_gqa": True}
        elif k.shape[1] != q.shape[1]:  # PyTorch 2.11
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        # How many tokens before and after its own a token sees; -1: all of them.
        seen = (-1, 0) if window is None or window >= self.longest_path else (window - 1, 0)
        lengths = self.query_offsets, self.key_offsets, self.longest_own, self.longest_path
        return attention(q, k, v, *lengths, scale=scaling, window_size=seen, **grouped)[None]

    def gathered(self, tensor: Tensor) -> Tensor:
        """What the paths read of [tokens, heads, width], one after the other."""
        return tensor.contiguous() if self.rows is None else GatherRows.apply(tensor, self.rows)


class GatherRows(torch.autograd.Function):
    """tensor[rows], [rows, ...] of [tokens, ...]. The gradients of a token that many paths read are added up in
    float32: half precision would round after each of them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.tokens = len(tensor)
        return tensor.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), (rows,) = gradients, ctx.saved_tensors
        exact = in_full_precision(gradient)
        total = exact.new_zeros(ctx.tokens, *exact.shape[1:]).index_add_(0, rows, exact)
        return total.to(gradient.dtype), None


def offsets(lengths: Sequence[int]) -> np.ndarray:
    """Where each of some sequences begins in one row, and where the last ends, [sequences + 1], int32."""
    return np.cumsum([0, *lengths], dtype=np.int32)


def computed_dtype(value: Tensor) -> torch.dtype:
    """What attention computes in, and the next layer expects: autocast's dtype where it is on, else that of the values,
    which come straight from a layer's weights."""
    kind = value.device.type
    on = torch.is_autocast_enabled(kind) and value.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if on else value.dtype
