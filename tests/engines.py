"""Engines that tests drive by themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rdo.settings import EngineConfig
from rdo.training.checkpoints import Checkpoints
from rdo.training.engine.torch_engine import TorchEngine
from rdo.training.step import Task, deal_step, training_step


class PlainEngine:
    """Runs forward and backward passes of anything that stands for a model, and leaves the gradients where they are."""

    def __init__(self, model: Any):
        self.model = model

    def forward(self, function: Callable[[Any], Any]) -> Any:
        return function(self.model)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()


def one_step(task: Task, model: Any, layout: str, examples: Sequence[Any], budget: int) -> dict[str, float]:
    """The measures of one step that leaves its gradients in the model; without those of speed."""
    measured, _ = training_step(task, PlainEngine(model), layout, deal_step(examples, layout, budget))  # type: ignore[arg-type]
    return {name: value for name, value in measured.items() if name not in ("tokens", "unique_token_share")}


def torch_engine(width: int = 2, groups: Callable[[torch.nn.Module], Any] | None = None) -> TorchEngine:
    """A linear layer that has taken one step of AdamW."""
    model: Any = torch.nn.Linear(width, width)
    model.device = torch.device("cpu")
    optimizer = torch.optim.AdamW(model.parameters() if groups is None else groups(model))
    model(torch.ones(width)).sum().backward()
    optimizer.step()
    return TorchEngine(model, optimizer, None, EngineConfig())


def save_when_due(checkpoints: Checkpoints, step: int, engine: TorchEngine) -> None:
    """What the training loop does after a step that is not the last."""
    if checkpoints.is_due(step):
        checkpoints.save(step, engine)
