"""Checkpoints of a training run: written whole or not at all, the last few kept, exact on resuming.

A full disk costs a checkpoint and not the run; a damaged checkpoint is refused, and the one before it is taken. What
is in a checkpoint is the engine's matter; which there are, and which is taken, is decided here, for all processes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from rdo.distributed import from_first, meet, world
from rdo.engine import Engine
from rdo.files import Damaged, DiskFull
from rdo.progress import say, warn
from rdo.schema import EngineConfig

# While the disk is full, a checkpoint is tried once in so long at most.
RETRY_SECONDS = 60.0


class Checkpoints:
    """The checkpoints of one run: `step_00000200.pt`, or a folder `step_00000200` of several processes, and so on."""

    def __init__(self, folder: Path, config: EngineConfig, before_saving: Callable[[], None] = lambda: None):
        """before_saving: brings to the disk what a checkpoint implies (the metrics up to its step)."""
        self.folder = folder
        self.config = config
        self.before_saving = before_saving
        self.last_saved = time.monotonic()
        self.retry_at = 0.0
        self.newest: Path | None = None

    def restore(self, engine: Engine) -> int:
        """Takes up the newest whole checkpoint; the steps it had done (0: there is none).

        Raises UserError where it is another model's, engine's or number of processes'.
        """
        damaged: list[str] = []
        for name in from_first(lambda: [path.name for path in reversed(self.files())]):
            path = self.folder / name
            try:
                step = engine.load(path)
            except Damaged as reason:
                damaged.append(f"{path} is damaged ({reason})")
                continue
            if damaged:
                warn(f"{'; '.join(damaged)}; going on from {path}, step {step}")
            else:
                say(f"going on from {path}")
            self.newest = path
            return step
        if damaged:
            warn(f"{'; '.join(damaged)}; there is no other checkpoint: training starts again from step 0")
        return 0

    def minutes_are_over(self) -> bool:
        """Whether engine.checkpoint_every_minutes have passed since the last checkpoint."""
        return time.monotonic() - self.last_saved >= 60 * self.config.checkpoint_every_minutes

    def is_due(self, step: int) -> bool:
        """Whether this step, or the time, asks for a checkpoint, and the disk is not known to be full."""
        due = step % self.config.checkpoint_every_steps == 0 or self.minutes_are_over()
        return due and time.monotonic() >= self.retry_at

    def try_saving(self, step: int, engine: Engine) -> None:
        """Saves; a full disk is said, and costs this checkpoint alone."""
        try:
            self.save(step, engine)
        except DiskFull as error:
            self.retry_at = time.monotonic() + RETRY_SECONDS
            last = f"the last good checkpoint is {self.newest}" if self.newest else "there is no checkpoint yet"
            warn(f"{error}; {last}; training goes on, and saving is tried again")

    def save(self, step: int, engine: Engine) -> None:
        """Saves now, and removes the oldest when that is done. Raises DiskFull, and leaves everything as it is."""
        path = self.file(step, engine)
        if reason := from_first(self.not_ready):
            raise DiskFull(reason)
        engine.save(path, step)
        if self.retry_at:
            say(f"there is room again: {path} is saved")
        self.retry_at = 0.0
        self.last_saved = time.monotonic()
        self.newest = path
        if world().first:
            self.remove_others(path)
        meet()

    def not_ready(self) -> str | None:
        """What keeps `before_saving` from being done, if anything."""
        try:
            self.before_saving()
        except DiskFull as error:
            return str(error)
        return None

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
