"""How a model is prepared to run here: its layout and kernel, by one rule and tried on the model itself; and what makes
a CPU faster at the same numbers, kept memory and oneDNN's matrix products where MKL's are slow."""

from __future__ import annotations

import ctypes
import platform
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from rdo.runtime.errors import UserError
from rdo.sequences.attention import attention_name, choose_kernel, kernel_of
from rdo.sequences.forward import hidden_states, input_embeddings
from rdo.sequences.kernels.varlen import HALF
from rdo.sequences.layout import LayoutName, Padded, PrefixTree
from rdo.sequences.readout import in_full_precision

# Three sequences of one length, so that no padding is needed: two share four tokens, two share eight.
TRIAL = [(*range(1, 17),), (*range(1, 5), *range(17, 29)), (*range(1, 5), *range(17, 21), *range(29, 37))]
# glibc's parameters of malloc (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def set_layout(
    model: transformers.PreTrainedModel, wanted: str, attention: str = "auto", precision: torch.dtype | None = None
) -> LayoutName:
    """The layout that a model runs in, its attention (on a CPU also its products) prepared for it.

    auto: tree wherever the model can, else padded. attention: engine.attention, the kernel of a tree. precision: what
    the model will compute in where that is half precision, be it under autocast; else it is the weights' dtype. Raises
    UserError where `tree`, or a kernel, is demanded in vain.
    """
    prepare_products(model)
    if wanted == "padded":
        restore_attention(model)
        return "padded"
    dtype = precision if precision in HALF else model.dtype
    reason = why_not_tree(model, "gathered", dtype)
    if reason is None:
        set_kernel(model, attention, dtype)
        return "tree"
    if wanted == "tree":
        raise UserError(f"engine.layout=tree cannot run this model; use engine.layout=padded (or auto): {reason}")
    print(f"[layout] padded, because {reason}", flush=True)
    return "padded"


def why_not_tree(model: transformers.PreTrainedModel, kernel: str, dtype: torch.dtype) -> str | None:
    """What keeps a model out of a tree under a kernel, or None; leaves it prepared for the layout that it can run.

    Declaring transformers' attention interface is not enough: models that do also mix tokens elsewhere (convolutions,
    linear attention), look both ways, or ask for soft caps and sinks. So the model itself is asked, on a tiny tree,
    computing in `dtype` as it will.
    """
    restore_attention(model)
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not use transformers' attention interface"
    ids = [[token % len(input_embeddings(model)) for token in sequence] for sequence in TRIAL]
    tree = PrefixTree(ids)
    try:
        with torch.no_grad(), computing_in(dtype, model):
            alone = in_full_precision(hidden_states(model, Padded(ids)))
            model.set_attn_implementation(attention_name(kernel))
            together = in_full_precision(hidden_states(model, tree))[np.concatenate(tree.rows)]
        # A wrong path shows in tens of per cent; half precision rounds by a few.
        if float((together - alone).norm()) <= (5e-2 if dtype in HALF else 1e-3) * float(alone.norm()):
            return None
        reason = f"{type(model).__name__} lets tokens see more than their own path"
    except Exception as error:  # whatever the code of an architecture that we do not know may raise
        reason = str(error) if isinstance(error, UserError) else f"{type(model).__name__} fails: {error}"
    restore_attention(model)
    return reason


def restore_attention(model: transformers.PreTrainedModel) -> None:
    """Gives a model that ran in a tree transformers' attention back."""
    if kernel_of(model) is not None:
        try:
            model.set_attn_implementation(model.get_correct_attn_implementation(None))
        except ValueError:  # a part of it, for images or sound, cannot have what the whole has
            model.set_attn_implementation("eager")


def set_kernel(model: transformers.PreTrainedModel, attention: str, dtype: torch.dtype) -> None:
    """Prepares a model that runs in a tree for the kernel of engine.attention; UserError where it cannot run that."""
    kernel = choose_kernel(attention, model.device, dtype, head_width(model))
    if kernel == "gathered" or (reason := why_not_tree(model, kernel, dtype)) is None:
        return
    if attention != "auto":
        raise UserError(f"engine.attention={kernel} cannot run this model; use engine.attention=auto: {reason}")
    print(f"[layout] engine.attention=gathered, because of {kernel}: {reason}", flush=True)
    model.set_attn_implementation(attention_name("gathered"))


def head_width(model: transformers.PreTrainedModel) -> int:
    """The width of the widest attention head: layers may differ."""
    config = model.config.get_text_config()
    widths = [module.head_dim for module in model.modules() if isinstance(getattr(module, "head_dim", None), int)]
    return max(widths, default=config.hidden_size // config.num_attention_heads)


def described_layout(model: transformers.PreTrainedModel, layout: LayoutName) -> str:
    """A layout as a person reads it: on a GPU with the kernel of a tree."""
    kernel = kernel_of(model)
    return f"{layout} ({kernel})" if kernel is not None and model.device.type == "cuda" else layout


def computing_in(dtype: torch.dtype, model: transformers.PreTrainedModel) -> AbstractContextManager[Any]:
    """Autocast, where a model is to compute in half precision."""
    return torch.autocast(model.device.type, dtype) if dtype in HALF else nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# A CPU
# ---------------------------------------------------------------------------------------------------------------------


def keep_memory() -> None:
    """Memory that was taken once is kept for the next tensor, and not given back to the system in between.

    glibc maps every large tensor anew, and each of its pages costs a fault; on virtual machines these took a fifth of
    a training step. Peaks are as they were. Where the C library is another, nothing is changed.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, -1)


def prepare_products(model: torch.nn.Module) -> None:
    """Makes linear layers on a CPU multiply by oneDNN on AMD's processors, whose vector units PyTorch's MKL leaves half
    unused (measured on a Zen 5: 250 against 115 GFLOP/s a core). Half precision is oneDNN's in PyTorch anyway."""
    for module in model.modules() if onednn_pays() else ():
        if type(module) is torch.nn.Linear and module.weight.is_cpu:
            module.forward = partial(onednn_forward, module)  # type: ignore[method-assign]


@cache
def onednn_pays() -> bool:
    """Whether this is an AMD processor, and PyTorch has the operator."""
    facts = Path("/proc/cpuinfo")
    amd = facts.exists() and "AuthenticAMD" in facts.read_text()
    return amd and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_forward(module: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """What `torch.nn.Linear` computes: states [..., width] -> [..., outputs]."""
    full = states.is_cpu and states.dtype == module.weight.dtype == torch.float32
    if not full or torch.is_autocast_enabled("cpu") or states.numel() == 0:
        return linear(states, module.weight, module.bias)
    return Product.apply(states, module.weight, module.bias)


class Product(torch.autograd.Function):
    """states [..., width], weight [outputs, width], bias [outputs] or None -> states weight^T + bias [..., outputs]."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        return product(states, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        of_states = of_weight = of_bias = None
        rows = gradient.reshape(-1, gradient.shape[-1])
        if ctx.needs_input_grad[0]:
            of_states = product(rows, weight.t()).view(states.shape)
        if ctx.needs_input_grad[1]:
            of_weight = product(rows.t(), states.reshape(-1, states.shape[-1]).t())
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_states, of_weight, of_bias


def product(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """states weight^T + bias by oneDNN: an operator of PyTorch's own compiler, which has no gradient."""
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
