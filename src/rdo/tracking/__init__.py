"""Metrics of a run: a JSON-lines file always, and wandb where the config says so.

The file is what counts: wandb is shown what stands in it, every step once, however often the run is interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rdo import interrupts
from rdo.distributed import world
from rdo.files import append_json_line, replace_file, synchronize
from rdo.progress import warn
from rdo.schema import TrackerConfig
from rdo.tracking.wandb_run import WandbRun

METRICS = "metrics.jsonl"


class Tracker:
    """Logs the steps of one training run; use it as a context so that wandb is always closed.

    Only the run's first process writes, in the others nothing happens.
    """

    def __init__(self, config: TrackerConfig, folder: Path, name: str, settings: Mapping[str, Any]):
        """Raises UserError where wandb is wanted and cannot be reached."""
        self.file = folder / METRICS
        self.writes = world().first
        wanted = self.writes and config.name == "wandb"
        self.run = WandbRun(config, folder, name, settings) if wanted else None

    def resume(self, steps: int) -> None:
        """Drops what was logged after the checkpoint that the run goes on from, so that each step stands once, and
        shows wandb the steps before it that a crash kept from it."""
        if not self.writes:
            return
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
        if self.run is not None:
            self.run.catch_up(json.loads(kept[step]) for step in sorted(kept))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs the values of a step, counted from 1."""
        if not self.writes:
            return
        values = with_effective_sample(values)
        append_json_line(self.file, {"step": step, **values})
        if self.run is not None:
            self.run.log(step, values)

    def synchronize(self) -> None:
        """Brings every line to the disk, so that a checkpoint may count on them."""
        if self.writes and self.file.exists():
            synchronize(self.file)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if self.run is not None:
            self.run.finish(failed=failure is not None, preempted=failure is interrupts.Stopped)


def step_of(line: str) -> int | None:
    """The step of a whole line; None of one that a crash cut short, or left garbage in place of."""
    try:
        step = json.loads(line)["step"] if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def with_effective_sample(values: Mapping[str, Any]) -> dict[str, Any]:
    """A step's values, the mean square of its weights turned into what it is measured for: the effective sample size
    (sum w)^2 / sum w^2 as a share of the number of pairs. Both means are of the whole step, over all processes."""
    values = dict(values)
    square = values.pop("weight_square_mean", None)
    if square:
        values["effective_sample_share"] = values["weight_mean"] ** 2 / square
    return values
