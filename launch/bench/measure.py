"""Seconds, bytes and GFLOP/s: contestants that take turns, and what a machine could do at best."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

from rdo.sequences.preparation import prepare_products

T = TypeVar("T")


@dataclass
class Contestant:
    """Somebody to be measured. numbers: what `run` returns (a loss or outputs) and the norm of the gradient that it
    leaves in `model`, on which all contestants of one work must agree."""

    name: str
    run: Callable[[], torch.Tensor]
    model: torch.nn.Module
    tokens: int = 0  # of a dense pass
    seconds: list[float] = field(default_factory=list)
    bytes: int = 0  # at its peak, above what was there before
    numbers: torch.Tensor | None = None


def warm_up(one: Contestant, device: torch.device) -> None:
    """Runs once: notes the numbers and the peak of memory."""
    before = memory_now(device)
    outputs = one.run().detach().reshape(-1)
    one.bytes = max(0, peak_memory(device) - before)
    norms = [weight.grad.norm() for weight in one.model.parameters() if weight.grad is not None]
    one.model.zero_grad(set_to_none=True)
    norm = [torch.stack(norms).norm()[None]] if norms else []
    one.numbers = torch.cat([numbers.double().cpu() for numbers in (outputs, *norm)])


def take_turns(contestants: Sequence[Contestant], rounds: int, device: torch.device) -> None:
    """Times everybody anew, once a round, in turn, so that a machine that slows down slows all of them."""
    contestants[0].run()  # measuring memory gave it back to the system, and the first to take it pays for that
    contestants[0].model.zero_grad(set_to_none=True)
    for one in contestants:
        one.seconds = []
    for _ in range(rounds):
        for one in contestants:
            one.seconds.append(timed(one.run, device)[0])
            one.model.zero_grad(set_to_none=True)


def timed(run: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds until the device is done, and what the function returns."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    result = run()
    wait()
    return time.perf_counter() - started, result


def differ(ours: Contestant, other: Contestant) -> float:
    """How far apart two contestants' numbers are: the norm of the difference over the norm."""
    if ours.numbers.shape != other.numbers.shape:
        return float("inf")
    return float((ours.numbers - other.numbers).norm() / other.numbers.norm())


def memory_now(device: torch.device) -> int:
    """Bytes in use, after what the C library keeps for later is given back; the next peak begins here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM
    return status_bytes("VmRSS")


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak since `memory_now`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status_bytes("VmHWM")


def status_bytes(name: str) -> int:
    """A number of /proc/self/status, which is in KiB there."""
    return 1024 * int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def gemm_gflops(width: int, inner: int, device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of the layers' own kind of matrix product, [2048, width] x [width, inner]."""
    layer = torch.nn.Linear(width, inner, bias=False, device=device, dtype=dtype)
    prepare_products(layer)
    states = torch.randn(2048, width, device=device, dtype=dtype)
    with torch.no_grad():
        seconds = median([timed(lambda: layer(states), device)[0] for _ in range(9)][2:])
    return 2 * 2048 * width * inner / seconds / 1e9
