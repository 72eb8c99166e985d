"""Engines that tests drive by themselves, and runs of several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from rdo.sequences.forward import Reads, read
from rdo.settings import EngineConfig
from rdo.training.engine import TorchEngine
from rdo.training.step import Task, deal_step, training_step


class PlainEngine:
    """Leaves the gradients where they are."""

    def __init__(self, model: Any):
        self.model = model

    def read(self, layout: str, reads: Reads) -> torch.Tensor:
        return read(self.model, layout, reads)  # type: ignore[arg-type]

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()


def one_step(task: Task, model: Any, layout: str, examples: Sequence[Any], budget: int) -> dict[str, float]:
    """The measures of one step that leaves its gradients in the model (or an engine's); without those of speed."""
    engine = model if hasattr(model, "backward") else PlainEngine(model)
    measured = training_step(task, engine, layout, deal_step(examples, layout, budget))  # type: ignore[arg-type]
    return {name: value for name, value in measured.items() if name not in ("tokens", "unique_token_share")}


def torch_engine(width: int = 2, groups: Callable[[torch.nn.Module], Any] | None = None) -> TorchEngine:
    """A linear layer that has taken one step of AdamW."""
    model: Any = torch.nn.Linear(width, width)
    model.device = torch.device("cpu")
    optimizer = torch.optim.AdamW(model.parameters() if groups is None else groups(model))
    model(torch.ones(width)).sum().backward()
    optimizer.step()
    return TorchEngine(model, optimizer, None, EngineConfig())


def launched(count: int, *command: object) -> subprocess.Popen[str]:
    """So many processes of a Python program, as torchrun starts them on one machine."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", "0"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return subprocess.Popen(
        [*torchrun, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str], seconds: float = 240.0) -> tuple[int, str, str]:
    """Exit code, standard output and standard error; a process that hangs fails the test."""
    try:
        out, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"hangs after {seconds} seconds")
    return process.returncode, out, error
