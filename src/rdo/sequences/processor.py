"""What makes a CPU faster at the same numbers: kept memory, and oneDNN's matrix products where MKL's are slow."""

from __future__ import annotations

import ctypes
import platform
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

# glibc's parameters of malloc (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


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
    if platform.machine() != "x86_64" or not facts.exists() or "AuthenticAMD" not in facts.read_text():
        return False
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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
