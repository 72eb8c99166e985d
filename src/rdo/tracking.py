"""Metrics of a run: a JSON-lines file always, and wandb where the config says so."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from rdo.files import append_json_line, replace_file
from rdo.schema import TrackerConfig

METRICS = "metrics.jsonl"


class Tracker:
    """Logs the steps of one training run; use it as a context so that wandb is always closed."""

    def __init__(self, config: TrackerConfig, folder: Path, name: str, settings: dict[str, Any]):
        self.file = folder / METRICS
        self.run = start_wandb(config, folder, name, settings) if config.name == "wandb" else None

    def resume(self, steps: int) -> None:
        """Drops what was logged after the checkpoint that the run goes on from, so that each step stands once."""
        if not self.file.exists():
            return
        # A crash may have cut the last line short: it is behind the checkpoint in any case.
        whole = [line for line in self.file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        with replace_file(self.file) as temporary:
            temporary.write_text("".join(line for line in whole if json.loads(line)["step"] <= steps))

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Logs the values of a step, counted from 1."""
        append_json_line(self.file, {"step": step, **values})
        if self.run is not None:
            self.run.log({"global_step": step, **values})

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if self.run is not None:
            self.run.finish(exit_code=1 if failure else 0)


def start_wandb(config: TrackerConfig, folder: Path, name: str, settings: dict[str, Any]) -> Any:
    """A wandb run: online when logged in, else offline, never asking; the same folder gives the same run id."""
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
        settings=wandb.Settings(silent=True),
        mode=mode,  # type: ignore[arg-type]
        config=settings,
    )
    run.define_metric("*", step_metric="global_step")
    return run
