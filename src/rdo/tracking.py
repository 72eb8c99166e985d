"""Metrics of a run: a JSON-lines file always, and wandb where the config says so."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from rdo.files import DiskFull, append_text, replace_file, synchronize
from rdo.progress import say, warn
from rdo.schema import TrackerConfig

METRICS = "metrics.jsonl"


class Tracker:
    """Logs the steps of one training run; use it as a context so that wandb is always closed."""

    def __init__(self, config: TrackerConfig, folder: Path, name: str, settings: dict[str, Any]):
        self.file = folder / METRICS
        self.size: int | None = None
        self.unwritten: list[str] = []  # lines for which the disk has no room yet
        self.run = start_wandb(config, folder, name, settings) if config.name == "wandb" else None

    def resume(self, steps: int) -> None:
        """Drops what was logged after the checkpoint that the run goes on from, so that each step stands once."""
        text = self.file.read_text(errors="replace") if self.file.exists() else ""
        kept: dict[int, str] = {}
        for line in text.splitlines(keepends=True):
            step = step_of(line)
            if step is not None and step <= steps:
                kept.setdefault(step, line)
        lost = steps - len(kept)
        if lost > 0:
            warn(f"{self.file} lacks {lost} of the {steps} steps up to the checkpoint: it was damaged or removed")
        wanted = "".join(kept[step] for step in sorted(kept))
        if wanted != text:
            with replace_file(self.file) as temporary:
                temporary.write_text(wanted)
        self.size = None

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Logs the values of a step, counted from 1. While the disk is full, lines are kept in memory."""
        waiting = bool(self.unwritten)
        self.unwritten.append(json.dumps({"step": step, **values}) + "\n")
        try:
            self.write()
        except DiskFull as error:
            if not waiting:
                warn(f"{error}; its lines are kept in memory until there is room")
        if self.run is not None:
            self.run.log({"global_step": step, **values})

    def write(self) -> None:
        """Writes the lines that are not written yet. Raises DiskFull and keeps them if that cannot be."""
        if not self.unwritten:
            return
        self.size = append_text(self.file, "".join(self.unwritten), self.size)
        if len(self.unwritten) > 1:
            say(f"there is room again: {len(self.unwritten)} lines of {self.file} are written")
        self.unwritten.clear()

    def synchronize(self) -> None:
        """Brings every line to the disk, so that a checkpoint may count on them. Raises DiskFull if that cannot be."""
        self.write()
        if self.file.exists():
            synchronize(self.file)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if self.run is not None:
            self.run.finish(exit_code=1 if failure else 0)


def step_of(line: str) -> int | None:
    """The step of a whole line; None of one that a crash cut short, or left garbage in place of."""
    try:
        step = json.loads(line)["step"] if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def start_wandb(config: TrackerConfig, folder: Path, name: str, settings: dict[str, Any]) -> Any:
    """A wandb run: online when logged in, else offline, never asking; the same folder gives the same run id."""
    # wandb would report errors of its own to its makers, with what it finds around them.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if not mode:
        mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
    run = wandb.init(
        project=config.project,
        group=config.group,
        name=name,
        id=f"{folder.name}-{hashlib.blake2b(str(folder.resolve()).encode(), digest_size=4).hexdigest()}",
        resume="allow",
        dir=str(folder),
        # Metrics and our config go, and nothing that wandb finds by itself: an address of a git remote may hold a
        # token, the terminal's text what the data says, and the rest tells of the machine.
        settings=wandb.Settings(
            silent=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            console="off",
            x_disable_meta=True,
            x_save_requirements=False,
            host="",
        ),
        mode=mode,  # type: ignore[arg-type]
        config=settings,
    )
    run.define_metric("*", step_metric="global_step")
    return run
