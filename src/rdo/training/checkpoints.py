"""Checkpoints of a training run: written whole or not at all, the last few kept, exact on resuming.

A damaged checkpoint is refused, and the one before it taken. What is in a checkpoint is the engine's matter; which
there are, and which is taken, is decided here, for all processes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from rdo.runtime.files import Damaged
from rdo.runtime.processes import barrier, broadcast, is_rank0
from rdo.runtime.progress import say, warn
from rdo.settings import EngineConfig
from rdo.training.engine.surface import Engine


class Checkpoints:
    """The checkpoints of one run: `step_00000200.pt`, or a folder `step_00000200` of several processes, and so on."""

    def __init__(self, folder: Path, config: EngineConfig, before_saving: Callable[[], None] = lambda: None):
        """before_saving: brings to the disk what a checkpoint implies (the metrics up to its step)."""
        self.folder = folder
        self.config = config
        self.before_saving = before_saving
        self.last_saved = time.monotonic()
        self.newest: Path | None = None

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
        """Saves now, and removes the oldest when that is done."""
        path = self.file(step, engine)
        self.before_saving()
        engine.save(path, step)
        self.last_saved = time.monotonic()
        self.newest = path
        if is_rank0():
            self.remove_others(path)
        barrier()

    def remove_others(self, path: Path) -> None:
        """Removes all but the last few up to this one."""
        files = self.files()
        upto = files.index(path) + 1
        # Of a later step are only those that were damaged when this run began.
        for other in (*files[:upto][: -self.config.keep_checkpoints], *files[upto:]):
            if other.is_dir():
                other = other.rename(other.with_name(f".{other.name}.old"))  # whole or not at all
                shutil.rmtree(other, ignore_errors=True)
            else:
                other.unlink(missing_ok=True)

    def file(self, step: int, engine: Engine) -> Path:
        """Where an engine's checkpoint of a step lies."""
        return self.folder / f"step_{step:08d}{engine.suffix}"

    def files(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(self.folder.glob("step_*"), key=lambda path: path.stem)
