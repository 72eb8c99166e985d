"""Checkpoints of a training run: written whole or not at all, the last few kept, exact on resuming."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rdo.files import replace_file
from rdo.schema import EngineConfig


class Checkpoints:
    """The checkpoints of one run: `step_00000200.pt` and so on in one folder."""

    def __init__(self, folder: Path, engine: EngineConfig):
        self.folder = folder
        self.engine = engine
        self.last_saved = time.monotonic()

    def restore(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> int:
        """Loads the newest checkpoint into model and optimizer; the steps it had done (0: there is none)."""
        files = self.files()
        if not files:
            return 0
        state = torch.load(files[-1], map_location=model.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"].cpu())
        print(f"going on from {files[-1]}", flush=True)
        return int(state["step"])

    def maybe_save(self, step: int, steps: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        """Saves when enough steps or minutes have passed; not after the last step, when the model itself is saved."""
        minutes = (time.monotonic() - self.last_saved) / 60
        due = step % self.engine.checkpoint_every_steps == 0 or minutes >= self.engine.checkpoint_every_minutes
        if step == steps or not due:
            return
        state = {
            "step": step,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        with replace_file(self.folder / f"step_{step:08d}.pt") as temporary:
            torch.save(state, temporary)
        for old in self.files()[: -self.engine.keep_checkpoints]:
            old.unlink()
        self.last_saved = time.monotonic()

    def files(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(self.folder.glob("step_*.pt"))

    def clear(self) -> None:
        """Removes all checkpoints, and what a killed process left half-written, once the finished model is saved."""
        shutil.rmtree(self.folder, ignore_errors=True)
