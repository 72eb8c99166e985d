"""Tree attention: a token attends to its own path from the root and to nothing else.

Registered with transformers' AttentionInterface, one name a kernel (see kernels/), so that every decoder that goes
through the interface works unpatched: the tree travels to the attention layers as the extra forward argument `tree`, as
the plan of the kernel that runs it.

No mask function is registered: transformers then builds no mask, which is what a tree wants. Padded rows (`Padded`)
need their mask and therefore never run under this attention (see preparation.set_layout).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor

from rdo.runtime.errors import UserError
from rdo.sequences.kernels.contiguous import ContiguousPlan, why_not_contiguous
from rdo.sequences.kernels.gathered import GatheredPlan
from rdo.sequences.kernels.varlen import VarlenPlan, why_not_varlen
from rdo.sequences.layout import PrefixTree

# What a decoder may pass beside query, key and value without changing what attention means.
HARMLESS = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "is_causal"}
PREFIX = "rdo_tree_"


class Plan(Protocol):
    """How a kernel runs the attention of one tree; made once for a micro-batch and shared by all layers."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
        """Attention of one flat row: query [1, heads, tokens, width], key and value [1, kv heads, tokens, width] give
        [1, tokens, heads, width]. scaling: of the scores, null for 1 / sqrt(width). window: how many tokens of its own
        path a token sees, itself included; null for all. The dtypes may differ, under autocast."""


KERNELS: dict[str, Callable[[PrefixTree, torch.device], Plan]] = {
    "gathered": GatheredPlan,
    "contiguous": ContiguousPlan,
    "varlen": VarlenPlan,
}
# What keeps a kernel from a device, a dtype and a head width; `gathered` runs everywhere.
OBSTACLES: dict[str, Callable[[torch.device, torch.dtype, int], str | None]] = {
    "contiguous": why_not_contiguous,
    "varlen": why_not_varlen,
}


def choose_kernel(wanted: str, device: torch.device, dtype: torch.dtype, head_width: int) -> str:
    """The kernel that runs a tree under engine.attention. dtype: what attention computes in, under autocast, too.

    auto: on a CPU contiguous, on a GPU in half precision varlen, where they run, else gathered. Raises UserError where
    what is demanded does not run.
    """
    reasons = {kernel: why_not(device, dtype, head_width) for kernel, why_not in OBSTACLES.items()}
    if wanted == "auto":
        return next((kernel for kernel, reason in reasons.items() if reason is None), "gathered")
    if reason := reasons.get(wanted):
        raise UserError(f"engine.attention={wanted} {reason}; use engine.attention=auto")
    return wanted


def attention_name(kernel: str) -> str:
    """The name of a kernel's tree attention in transformers' AttentionInterface, where it is registered from then on:
    models are imported with that, for seconds, and what is done already needs none."""
    transformers.AttentionInterface.register(f"{PREFIX}{kernel}", tree_attention)
    return f"{PREFIX}{kernel}"


def kernel_of(model: transformers.PreTrainedModel) -> str | None:
    """The kernel that a model's attention runs, or None where it is none of ours."""
    implementation = model.config._attn_implementation or ""
    return implementation.removeprefix(PREFIX) if implementation.startswith(PREFIX) else None


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    tree: Plan | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What attention layers call: shapes as in `Plan.attend`.

    Raises UserError where a model asks for something that tree attention does not do (soft caps, attention sinks,
    learned biases), naming the way out.
    """
    unknown = sorted(name for name, given in others.items() if given is not None and name not in HARMLESS)
    if tree is None or attention_mask is not None or dropout or unknown:
        what = f"passes {', '.join(unknown)} to" if unknown else "needs a mask or dropout in"
        what = f"{type(module).__name__} {what} its attention"
        raise UserError(f"{what}, which engine.layout=tree cannot do; use engine.layout=padded")
    return tree.attend(query, key, value, scaling, sliding_window), None
