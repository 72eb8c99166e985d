"""Forest attention on a GPU: variable-length flash attention (`varlen`), and FlexAttention (`flex`).

| kernel | runs | computes in |
|---|---|---|
| varlen | one flash attention over all segments; the keys of a path are gathered | float16 and bfloat16 |
| flex | one compiled kernel that skips blocks of the mask which are empty; nothing is gathered | all but float64 |

Neither has been run on a GPU yet; launch/gpu_check.py compares them with the CPU there. Neither is in every PyTorch, so
that both are imported when they are first asked for. What a layer passes may be of several dtypes: under autocast,
queries and keys leave the rotary embedding in float32, and values do not go through it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from rdo.devices import to_device
from rdo.errors import UserError
from rdo.forest import Forest, Segment, subtree_ends
from rdo.readout import in_full_precision

HALF = (torch.float16, torch.bfloat16)
BLOCK = 128  # rows of a block of FlexAttention's mask: its default, that its kernels are tuned for
# The tensors of a BlockMask, [1, 1, blocks] and [1, 1, blocks, blocks].
BLOCK_TENSORS = tuple(
    f"{full}{side}_{what}" for full in ("", "full_") for side in ("kv", "q") for what in ("num_blocks", "indices")
)
COMPILATIONS = 64  # of FlexAttention in one process: one for each dtype, width, and so on, but none for a new length


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
    try:
        varlen = importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return f"needs PyTorch 2.11 or newer, and this is {torch.__version__}"
    # cuDNN's causal mask is aligned at the top left: a segment's first token would see the first of its path alone.
    cudnn = getattr(varlen, "_should_use_cudnn", None)
    if cudnn is not None and cudnn(device.index or 0):
        return "needs flash attention, and this PyTorch takes cuDNN's, whose causal mask is aligned at the top left"
    return None


def why_not_flex(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """What keeps `flex` from running here, said of it, or None."""
    if device.type != "cuda":
        return "needs a GPU: elsewhere it cannot go backward"
    if dtype == torch.float64:
        return "does not compute in float64"
    if head_width < 16:
        return f"takes heads of a width of 16 or more, and the model's is {head_width}"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed here"
    return None


class VarlenPlan:
    """One call a layer: each segment is a sequence whose queries are its own rows, and whose keys are its path.

    Segments lie in the order of their rows and together are all rows, so that the queries are the flat row as it is.
    The last own token sees the whole path, the one before it a key less: causal, aligned at the bottom right.
    """

    def __init__(self, forest: Forest, device: torch.device | str):
        own = [segment.stop - segment.start for segment in forest.segments]
        keys = [len(segment.path) for segment in forest.segments]
        self.longest_own, self.longest_path = max(own), max(keys)
        self.query_offsets = to_device(offsets(own), device)
        self.key_offsets = to_device(offsets(keys), device)
        # Where nothing is shared, the paths are the rows themselves.
        shared = sum(keys) > len(forest)
        self.rows = to_device(np.concatenate([s.path for s in forest.segments]), device) if shared else None

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """See `attention.Plan`. Raises UserError where that is not to be computed in half precision."""
        dtype = computed_dtype(value)
        if dtype not in HALF:
            raise UserError(f"engine.attention=varlen does not compute in {dtype}; use engine.attention=auto")
        # [tokens, heads, width]
        q = query[0].transpose(0, 1).to(dtype).contiguous()
        k, v = (self.gathered(tensor[0].transpose(0, 1).to(dtype)) for tensor in (key, value))
        attention, knows_groups = variable_length_attention()
        grouped = {"enable_gqa": True} if k.shape[1] != q.shape[1] and knows_groups else {}
        if k.shape[1] != q.shape[1] and not knows_groups:
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        # How many tokens before and after its own a token sees; -1: all of them.
        seen = (-1, 0) if window is None or window >= self.longest_path else (window - 1, 0)
        out = attention(
            q,
            k,
            v,
            self.query_offsets,
            self.key_offsets,
            self.longest_own,
            self.longest_path,
            scale=scaling,
            window_size=seen,
            **grouped,
        )
        return out[None]

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the paths read of [tokens, heads, width], one after the other."""
        return tensor.contiguous() if self.rows is None else GatherRows.apply(tensor, self.rows)


class GatherRows(torch.autograd.Function):
    """tensor[rows], [rows, ...] of [tokens, ...]. The gradients of a token that many paths read are added up in
    float32: half precision would round after each of them."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.tokens = len(tensor)
        return tensor.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,), (rows,) = gradients, ctx.saved_tensors
        exact = in_full_precision(gradient)
        total = exact.new_zeros(ctx.tokens, *exact.shape[1:]).index_add_(0, rows, exact)
        return total.to(gradient.dtype), None


def offsets(lengths: Sequence[int]) -> np.ndarray:
    """Where each of some sequences begins in one row, and where the last ends, [sequences + 1], int32."""
    return np.cumsum([0, *lengths], dtype=np.int32)


@cache
def variable_length_attention() -> tuple[Callable[..., torch.Tensor], bool]:
    """PyTorch's variable-length attention, and whether it takes fewer key heads than query heads (2.11 does not)."""
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return function, "enable_gqa" in inspect.signature(function).parameters


class FlexPlan:
    """FlexAttention under a mask that is known block by block; nothing is gathered.

    Rows are a depth-first walk of the trie, so that the tokens below a token are the rows that follow it, up to `end`:
    row k is row q or lies on the path to it if and only if k <= q < end[k]. For what a walk visits between entering k
    and leaving it is k's subtree and nothing else, and a token's path are those whose subtrees hold it.

    Rows are padded to whole blocks, at least two: PyTorch compiles the lengths 0 and 1 apart, and no other.
    """

    def __init__(self, forest: Forest, device: torch.device | str):
        self.segments, self.device, self.tokens = forest.segments, device, len(forest)
        self.rows = BLOCK * max(2, -(-len(forest) // BLOCK))
        self.longest_path = max(len(segment.path) for segment in forest.segments)
        padding = (0, self.rows - len(forest))
        ends = subtree_ends(forest.segments)
        # Nothing sees what is padded.
        self.ends = vary(to_device(np.pad(ends, padding).astype(np.int32), device))
        self.positions = vary(to_device(np.pad(forest.positions.numpy(), padding).astype(np.int32), device))
        self.masks: dict[int | None, Any] = {}

    def mask(self, window: int | None) -> Any:
        """The BlockMask of a window, made when it is first asked for."""
        if window is not None and window >= self.longest_path:
            window = None
        if window not in self.masks:
            flex = importlib.import_module("torch.nn.attention.flex_attention")
            counts = seen_by_blocks(self.segments, self.rows, window)
            full = counts == BLOCK * BLOCK
            blocks = [*ordered((counts > 0) & ~full), *ordered(full)]
            visible = subtree_mask(self.ends)
            if window is not None:
                visible = window_mask(self.ends, self.positions, vary(self.positions - (window - 1)))
            moved = (to_device(array, self.device) for array in blocks)
            lengths = (self.rows, self.rows)
            mask = flex.BlockMask.from_kv_blocks(*moved, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=lengths)
            for part in (getattr(mask, name) for name in BLOCK_TENSORS):
                vary(part, *range(2, part.dim()))
            self.masks[window] = mask
        return self.masks[window]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """See `attention.Plan`."""
        dtype = computed_dtype(value)
        usual = 1 / math.sqrt(query.shape[-1])
        if scaling is not None and not math.isclose(scaling, usual):
            query = query * (scaling / usual)  # as a number of its own, each would be compiled for
        padding = (0, 0, 0, self.rows - self.tokens)
        q, k, v = (vary(pad(tensor.to(dtype), padding), 2) for tensor in (query, key, value))
        # Compiled code holds for one state of autocast, and everything is cast already.
        with torch.autocast(query.device.type, enabled=False):
            out = flex_attention()(q, k, v, block_mask=self.mask(window), enable_gqa=q.shape[1] != k.shape[1])
        return out[:, :, : self.tokens].transpose(1, 2)


@cache
def flex_attention() -> Callable[..., torch.Tensor]:
    """FlexAttention, compiled once for all lengths. An error, not slow and large eager code, where that fails."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, COMPILATIONS)
    module = importlib.import_module("torch.nn.attention.flex_attention")
    return torch.compile(module.flex_attention, dynamic=True, fullgraph=True)


def vary(tensor: torch.Tensor, *dimensions: int) -> torch.Tensor:
    """Tells the compiler that these dimensions (without any, the first) vary, each for itself: what happens to be equal
    at first, such as the numbers of blocks and of heads, it would take for the same, and compile again later."""
    for dimension in dimensions or (0,):
        torch._dynamo.maybe_mark_dynamic(tensor, dimension)
    return tensor


def computed_dtype(value: torch.Tensor) -> torch.dtype:
    """What attention computes in, and the next layer expects: autocast's dtype where it is on, else that of the values,
    which come straight from a layer's weights."""
    kind = value.device.type
    on = torch.is_autocast_enabled(kind) and value.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if on else value.dtype


def subtree_mask(ends: torch.Tensor) -> Callable[..., torch.Tensor]:
    """FlexAttention's mask: whether row q sees row k."""

    def visible(batch: Any, head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q < ends[k])

    return visible


def window_mask(ends: torch.Tensor, positions: torch.Tensor, first: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The same for a window; first: the earliest position that each row sees, so that no number is compiled in."""

    def visible(batch: Any, head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q < ends[k]) & (positions[k] >= first[q])

    return visible


def seen_by_blocks(segments: Sequence[Segment], rows: int, window: int | None) -> np.ndarray:
    """How many pairs of rows see each other in every block, [blocks of queries, blocks of keys]."""
    counts = np.zeros((rows // BLOCK, rows // BLOCK), dtype=np.int64)
    for segment in segments:
        # A path's rows only grow, so that each block holds one run of its positions.
        key_blocks, begin = np.unique(segment.path // BLOCK, return_index=True)
        end = np.append(begin[1:], len(segment.path))
        own = np.arange(segment.start, segment.stop)
        last = np.arange(segment.shared, len(segment.path))[:, None] + 1
        first = np.zeros_like(last) if window is None else np.maximum(last - window, 0)
        seen = np.maximum(np.minimum(end, last) - np.maximum(begin, first), 0)  # [own rows, runs]
        query_blocks, starts = np.unique(own // BLOCK, return_index=True)
        counts[np.ix_(query_blocks, key_blocks)] += np.add.reduceat(seen, starts, axis=0)
    return counts


def ordered(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many blocks are set in each row [1, 1, rows], and the columns with these first [1, 1, rows, columns]."""
    columns = np.argsort(~blocks, axis=-1, kind="stable")
    return blocks.sum(-1, dtype=np.int32)[None, None], columns.astype(np.int32)[None, None]
