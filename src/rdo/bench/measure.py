"""Seconds, bytes and GFLOP/s: contestants that take turns, and what a machine could do at best."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch.nn.functional import linear

from rdo import processor


@dataclass
class Contestant:
    """Something to be measured: `prepare` and `after` are not timed; `after` clears gradients.

    Both `run` and `after` return numbers (a loss or outputs; the gradient's norm), which all contestants of one work
    must agree on.
    """

    name: str
    run: Callable[[], torch.Tensor]
    prepare: Callable[[], None] = lambda: None
    after: Callable[[], torch.Tensor] = lambda: torch.zeros(0)
    seconds: list[float] = field(default_factory=list)
    bytes: int | None = None  # at its peak, above what was there before
    numbers: torch.Tensor | None = None


def warm_up(contestant: Contestant, device: torch.device) -> None:
    """Runs once: notes the numbers and the peak of memory above what was there before."""
    contestant.prepare()
    before = memory_now(device)
    reset_peak(device)
    outputs = contestant.run().detach().double().cpu().reshape(-1)
    contestant.bytes = max(0, peak_memory(device) - before)
    contestant.numbers = torch.cat([outputs, contestant.after().double().cpu().reshape(-1)])


def take_turns(contestants: Sequence[Contestant], rounds: int, device: torch.device) -> None:
    """Times everybody anew, once a round, in turn, so that a machine that slows down slows all of them."""
    for contestant in contestants:
        contestant.seconds = []
    for _ in range(rounds):
        for contestant in contestants:
            contestant.prepare()
            contestant.seconds.append(timed(contestant.run, device))
            contestant.after()


def untimed(contestant: Contestant) -> None:
    """Runs once more, for nothing."""
    contestant.prepare()
    contestant.run()
    contestant.after()


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds, until the device is done."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(ours: Contestant, other: Contestant) -> list[float]:
    """How many times as long the other took, round by round."""
    return [theirs / own for own, theirs in zip(ours.seconds, other.seconds, strict=True)]


def differ(ours: Contestant, other: Contestant) -> float:
    """How far apart two contestants' numbers are: the norm of the difference over the norm."""
    assert ours.numbers is not None
    assert other.numbers is not None
    if ours.numbers.shape != other.numbers.shape:
        return float("inf")
    return float((ours.numbers - other.numbers).norm() / other.numbers.norm())


def memory_now(device: torch.device) -> int:
    """Bytes in use; what the C library keeps for later is given back before."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    library = processor.glibc()
    if library is not None:
        library.malloc_trim(0)
    return status_bytes("VmRSS")


def reset_peak(device: torch.device) -> None:
    """Makes the peak that is asked for next begin now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status_bytes("VmHWM")


def status_bytes(name: str) -> int:
    """A number of /proc/self/status, which is in KiB there."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")


def gemm_gflops(width: int, inner: int, device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of the layers' own kind of matrix product: [2048, width] x [width, inner]."""
    states = torch.randn(2048, width, device=device, dtype=dtype)
    weight = torch.randn(inner, width, device=device, dtype=dtype)
    ours = processor.chosen == "onednn" and device.type == "cpu" and dtype == torch.float32
    multiply = processor.product if ours else linear
    seconds = median([timed(lambda: multiply(states, weight), device) for _ in range(9)][2:])
    return 2 * 2048 * width * inner / seconds / 1e9
