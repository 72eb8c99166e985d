"""One process of plain PyTorch, weights in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from rdo.models.lora import trained_state
from rdo.runtime.errors import UserError
from rdo.runtime.files import Damaged, check_zip, replace_file
from rdo.settings import EngineConfig
from rdo.training.engine.surface import precision_of

T = TypeVar("T")


class TorchEngine:
    """See `Engine`."""

    suffix = ".pt"

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        max_gradient_norm: float | None,
        config: EngineConfig,
    ):
        self.model, self.optimizer = model, optimizer
        self.largest = math.inf if max_gradient_norm is None else max_gradient_norm
        self.precision = precision_of(config, model.device)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def forward(self, function: Callable[[PreTrainedModel], T]) -> T:
        if self.precision == torch.float32:
            return function(self.model)
        with torch.autocast(self.model.device.type, self.precision):
            return function(self.model)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def step(self) -> float | None:
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.largest))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def save(self, path: Path, step: int) -> None:
        state: dict[str, Any] = {
            "step": step,
            "model": trained_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        with replace_file(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> int:
        check_zip(path)
        try:
            state = torch.load(path, map_location=self.model.device, weights_only=True)
        except RuntimeError as error:  # which takes the zip's directory more strictly
            raise Damaged(str(error)) from error
        try:
            self.model.load_state_dict({**self.model.state_dict(), **state["model"]})  # the rest is frozen
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise foreign(path, str(error)) from error
        torch.set_rng_state(state["random"].cpu())
        return int(state["step"])

    def full_state(self) -> dict[str, torch.Tensor] | None:
        return None

    def close(self) -> None:
        pass


def foreign(path: Path, reason: str) -> UserError:
    """What to say of another model's checkpoint."""
    return UserError(
        f"{path} is a checkpoint of another model ({reason}); delete {path.parent}: the same command then starts from "
        "step 0"
    )
