"""What carries out a training step: plain PyTorch for one process, DeepSpeed (zero.py) for any number, both behind one
small surface, with the same numbers; and the checkpoints that they write."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

from rdo.models.lora import trained_state
from rdo.models.traits import stop_between_layers
from rdo.runtime.errors import UserError
from rdo.runtime.files import Damaged, check_zip, replace_file
from rdo.runtime.processes import barrier, broadcast, is_rank0
from rdo.runtime.progress import say, warn
from rdo.sequences.forward import Reads, read
from rdo.sequences.layout import LayoutName
from rdo.sequences.preparation import computing_in
from rdo.settings import EngineConfig


class Engine(Protocol):
    """A model, its optimizer, and how they are run."""

    model: transformers.PreTrainedModel
    suffix: str  # what a checkpoint's name ends with

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, whose learning rates the loop sets."""

    def read(self, layout: LayoutName, reads: Reads) -> torch.Tensor:
        """What the model says of a micro-batch, [values]. Every forward pass goes through here, on all processes
        alike."""

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Adds the gradient of a share of the step's loss; `last`: it is this process's last share of the step."""

    def step(self) -> float | None:
        """Clips by the global norm, updates, and clears the gradients. The norm before clipping; None where float16
        overflowed and the step was left out. With a norm that is not finite nothing is updated."""

    def save(self, path: Path, step: int) -> None:
        """Writes a checkpoint, whole or not at all."""

    def load(self, path: Path) -> int:
        """Takes up a checkpoint; the steps it had done. Raises Damaged, and UserError where it is another run's."""

    def finish(self) -> dict[str, torch.Tensor] | None:
        """Lets go of what was held beside the model. All weights, whole, on the first process (None on the others);
        None everywhere where the model has them."""


class TorchEngine:
    """One process of plain PyTorch, weights in float32."""

    suffix = ".pt"

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        max_gradient_norm: float | None,
        config: EngineConfig,
    ):
        self.model, self.optimizer = model, optimizer
        stop_between_layers(model)
        self.largest = math.inf if max_gradient_norm is None else max_gradient_norm
        self.precision = precision_of(config, model.device)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def read(self, layout: LayoutName, reads: Reads) -> torch.Tensor:
        with computing_in(self.precision, self.model):
            return read(self.model, layout, reads)

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

    def finish(self) -> None:
        return None


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


def foreign(path: Path, reason: str) -> UserError:
    """What to say of another model's checkpoint."""
    return UserError(
        f"{path} is a checkpoint of another model ({reason}); delete {path.parent}: the same command then starts from "
        "step 0"
    )


class Checkpoints:
    """The checkpoints of one run: which there are, which is taken up (the newest that is whole), which are kept.

    `step_00000200.pt`, or of several processes a folder `step_00000200`.
    """

    def __init__(self, folder: Path, config: EngineConfig, before_saving: Callable[[], None] = lambda: None):
        """before_saving: brings to the disk what a checkpoint implies (the metrics up to its step)."""
        self.folder, self.config, self.before_saving = folder, config, before_saving
        self.last_saved = time.monotonic()
        self.newest: Path | None = None
        self.kept: int | None = None  # the step whose checkpoint stays, however old it is

    def path(self, step: int, engine: Engine) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"step_{step:08d}{engine.suffix}"

    def restore(self, engine: Engine) -> int:
        """Takes up the newest whole checkpoint; the steps it had done (0: there is none).

        Raises UserError where it is another model's, engine's or number of processes'.
        """
        for name in broadcast(lambda: [path.name for path in reversed(self.files())]):
            path = self.folder / name
            try:
                step = engine.load(path)
            except Damaged as reason:
                warn(f"{path} is damaged ({reason}) and left out")
                continue
            say(f"going on from {path}")
            self.newest = path
            return step
        return 0

    def is_due(self, step: int) -> bool:
        """Whether this step, or the time since the last one, asks for a checkpoint."""
        minutes = (time.monotonic() - self.last_saved) / 60
        return step % self.config.checkpoint_every_steps == 0 or minutes >= self.config.checkpoint_every_minutes

    def save(self, step: int, engine: Engine) -> None:
        """Saves, unless this step is saved already, and then removes all but the last few."""
        path = self.path(step, engine)
        if self.newest == path:
            return
        self.before_saving()
        engine.save(path, step)
        self.last_saved, self.newest = time.monotonic(), path
        if is_rank0():
            files = self.files()
            upto = files.index(path) + 1
            # Of a later step are only those that were damaged when this run began.
            for other in (*files[:upto][: -self.config.keep_checkpoints], *files[upto:]):
                if self.kept is not None and other == self.path(self.kept, engine):
                    continue
                if other.is_dir():
                    other = other.rename(other.with_name(f".{other.name}.old"))  # whole or not at all
                    shutil.rmtree(other, ignore_errors=True)
                else:
                    other.unlink(missing_ok=True)
        barrier()

    def files(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(self.folder.glob("step_*"), key=lambda path: path.stem)
