"""What an engine must do. PyTorch and DeepSpeed are both behind one small surface, with the same numbers.

`forward` runs a function of the model, `backward` adds up gradients, `step` clips and updates, `save` and `load` keep a
checkpoint, `full_state` gives the weights to be saved.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from transformers import PreTrainedModel

from rdo.runtime.errors import UserError
from rdo.settings import EngineConfig

T = TypeVar("T")


class Engine(Protocol):
    """A model, its optimizer, and how they are run."""

    model: PreTrainedModel
    # What a checkpoint's name ends with.
    suffix: str

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, whose learning rates the loop sets."""

    def forward(self, function: Callable[[PreTrainedModel], T]) -> T:
        """What the function computes with the model. Every forward pass goes through here, on all processes alike."""

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Adds the gradient of a share of the step's loss; `last`: it is this process's last share of the step."""

    def step(self) -> float | None:
        """Clips by the global norm, updates, and clears the gradients. The norm before clipping; None where float16
        overflowed and the step was left out. With a norm that is not finite nothing is updated."""

    def save(self, path: Path, step: int) -> None:
        """Writes a checkpoint, whole or not at all."""

    def load(self, path: Path) -> int:
        """Takes up a checkpoint; the steps it had done. Raises Damaged, and UserError where it is another run's."""

    def full_state(self) -> dict[str, torch.Tensor] | None:
        """All weights, whole, on the first process (None on the others); None everywhere where the model has them."""

    def close(self) -> None:
        """Lets go of what was held beside the model."""


def precision_of(config: EngineConfig, device: torch.device) -> torch.dtype:
    """What a training step computes in. auto: on a GPU bfloat16, or float16 where it has no bfloat16, else float32.

    Raises UserError where the device or the engine cannot do it.
    """
    if config.precision == "auto" and device.type != "cuda":
        return torch.float32
    if config.precision == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    precision = getattr(torch, config.precision)
    if precision == torch.float16 and (device.type == "cpu" or config.name == "torch"):
        needs = "a GPU" if device.type == "cpu" else "the loss scaling of engine=zero1 (or zero2, zero3)"
        raise UserError(f"engine.precision=float16 needs {needs}: use float32 or bfloat16")
    return precision
