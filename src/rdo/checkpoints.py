"""Checkpoints of a training run: written whole or not at all, the last few kept, exact on resuming.

A full disk costs a checkpoint and not the run; a damaged checkpoint is refused, and the one before it is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rdo.errors import UserError
from rdo.files import Damaged, DiskFull, check_seal, replace_sealed
from rdo.progress import say, warn
from rdo.schema import EngineConfig

# While the disk is full, a checkpoint is tried once in so long at most.
RETRY_SECONDS = 60.0


class Checkpoints:
    """The checkpoints of one run: `step_00000200.pt` and so on in one folder."""

    def __init__(self, folder: Path, engine: EngineConfig, before_saving: Callable[[], None] = lambda: None):
        """before_saving: brings to the disk what a checkpoint implies (the metrics up to its step)."""
        self.folder = folder
        self.engine = engine
        self.before_saving = before_saving
        self.last_saved = time.monotonic()
        self.retry_at = 0.0
        self.newest: Path | None = None

    def restore(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> int:
        """Loads the newest whole checkpoint into model and optimizer; the steps it had done (0: there is none).

        Raises UserError where it is another model's.
        """
        damaged: list[str] = []
        for file in reversed(self.files()):
            try:
                check_seal(file)
            except Damaged as reason:
                damaged.append(f"{file} is damaged ({reason})")
                continue
            state = torch.load(file, map_location=model.device, weights_only=True)
            self.check_fits(file, state["model"], model)
            model.load_state_dict(state["model"])
            try:
                optimizer.load_state_dict(state["optimizer"])
            except ValueError as error:
                raise self.foreign(file, str(error)) from error
            torch.set_rng_state(state["random"].cpu())
            if damaged:
                warn(f"{'; '.join(damaged)}; going on from {file}, step {state['step']}")
            else:
                say(f"going on from {file}")
            self.newest = file
            return int(state["step"])
        if damaged:
            warn(f"{'; '.join(damaged)}; there is no other checkpoint: training starts again from step 0")
        return 0

    def check_fits(self, file: Path, saved: dict[str, torch.Tensor], model: PreTrainedModel) -> None:
        """Raises UserError unless the saved weights are those of such a model."""
        there = {name: tuple(tensor.shape) for name, tensor in saved.items()}
        here = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for name in (*here, *there):
            if there.get(name) != here.get(name):
                raise self.foreign(
                    file, f"{name}: {there.get(name, 'nothing')} there, {here.get(name, 'nothing')} here"
                )

    def foreign(self, file: Path, reason: str) -> UserError:
        """What to say of another model's checkpoint."""
        return UserError(
            f"{file} is a checkpoint of another model ({reason}); delete {self.folder}: the same command then starts "
            "from step 0"
        )

    def maybe_save(self, step: int, steps: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        """Saves when enough steps or minutes have passed; not after the last step, when the model itself is saved.

        A full disk is said, and costs this checkpoint alone.
        """
        now = time.monotonic()
        minutes = (now - self.last_saved) / 60
        due = step % self.engine.checkpoint_every_steps == 0 or minutes >= self.engine.checkpoint_every_minutes
        if step == steps or not due or now < self.retry_at:
            return
        try:
            self.save(step, model, optimizer)
        except DiskFull as error:
            self.retry_at = time.monotonic() + RETRY_SECONDS
            last = f"the last good checkpoint is {self.newest}" if self.newest else "there is no checkpoint yet"
            warn(f"{error}; {last}; training goes on, and saving is tried again")

    def save(self, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        """Saves now, and removes the oldest when that is done. Raises DiskFull, and leaves everything as it is."""
        path = self.file(step)
        state: dict[str, Any] = {
            "step": step,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        self.before_saving()
        with replace_sealed(path) as file:
            torch.save(state, file)  # type: ignore[arg-type]
        if self.retry_at:
            say(f"there is room again: {path} is saved")
        self.retry_at = 0.0
        self.last_saved = time.monotonic()
        self.newest = path
        files = self.files()
        upto = files.index(path) + 1
        # Of a later step are only those that were damaged when this run began.
        for other in (*files[:upto][: -self.engine.keep_checkpoints], *files[upto:]):
            other.unlink(missing_ok=True)

    def file(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"step_{step:08d}.pt"

    def files(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(self.folder.glob("step_*.pt"))
