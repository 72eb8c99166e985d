"""What makes a CPU faster at the same numbers: kept memory, and oneDNN's matrix products where MKL's are slow.

Both are settings of the process, as the number of threads is, made by `main.prepare_process`.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers import PreTrainedModel

from rdo.errors import UserError

# glibc's parameters of malloc (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

# Which matrix products the linear layers of models run that are prepared from now on: torch | onednn.
chosen = "torch"


def keep_memory() -> None:
    """Memory that was taken once is kept for the next tensor, and not given back to the system in between.

    glibc maps every large tensor anew, and each of its pages costs a fault; on virtual machines these took a fifth of
    a training step. Peaks are as they were. Where the C library is another, nothing is changed.
    """
    library = glibc()
    if library is not None:
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, -1)


def glibc() -> ctypes.CDLL | None:
    """The process's C library, where it is glibc."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def choose_products(wanted: str) -> None:
    """Sets engine.products for the models that are prepared from now on. Raises UserError where onednn is demanded in
    vain.

    auto: onednn on AMD's processors, whose vector units PyTorch's MKL leaves half unused (measured on a Zen 5: 250
    against 115 GFLOP/s a core); elsewhere PyTorch's own.
    """
    global chosen
    reason = why_not_onednn()
    if wanted == "onednn" and reason is not None:
        raise UserError(f"engine.products=onednn {reason}; use engine.products=auto")
    chosen = "onednn" if wanted == "onednn" or (wanted == "auto" and reason is None and is_amd()) else "torch"


def why_not_onednn() -> str | None:
    """What keeps oneDNN's products from this machine, or None."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return "needs an x86 processor and a PyTorch with oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "needs an operator that this version of PyTorch does not have"
    return None


@cache
def is_amd() -> bool:
    """Whether the processor is AMD's, where the system says."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "AMD" in platform.processor()


def prepare_products(model: PreTrainedModel) -> None:
    """Makes the model's linear layers run the chosen matrix products where it computes on a CPU in float32."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            if chosen == "onednn" and module.weight.device.type == "cpu":
                module.forward = partial(onednn_forward, module)  # type: ignore[method-assign]
            elif "forward" in vars(module) and is_ours(vars(module)["forward"]):
                del module.forward


def is_ours(forward: Any) -> bool:
    """Whether a layer's forward pass is one that `prepare_products` has set."""
    return isinstance(forward, partial) and forward.func is onednn_forward


def onednn_forward(module: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """What `torch.nn.Linear` computes: states [..., width] -> [..., outputs]. Half precision is oneDNN's in PyTorch
    anyway, and float64 it does not have."""
    full = states.dtype == module.weight.dtype == torch.float32
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
