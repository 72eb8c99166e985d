"""What can be watched of a run: metrics.jsonl in every trained folder, and with tracker=wandb a wandb run for it.

The file is what counts. wandb's x-axis is our own step, `global_step`: a run that goes on from a checkpoint goes on in
its curve, and steps that it does again lie, with the same numbers, on those of before. Only the first process writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rdo.runtime.errors import UserError
from rdo.runtime.files import replace_file, synchronize
from rdo.runtime.processes import is_rank0
from rdo.runtime.progress import warn
from rdo.runtime.stopping import Stopped
from rdo.settings import TrackerConfig

METRICS = "metrics.jsonl"


class Tracker:
    """Logs the steps of one training run; use it as a context so that wandb is always closed."""

    def __init__(self, config: TrackerConfig, folder: Path, name: str, settings: Mapping[str, Any]):
        """Raises UserError where wandb is wanted and cannot be reached."""
        self.file = folder / METRICS
        self.writes = is_rank0()
        self.run = start(config, folder, name, settings) if self.writes and config.name == "wandb" else None

    def resume(self, steps: int) -> None:
        """Drops what was logged after the checkpoint that the run goes on from, so that each step stands once."""
        if self.writes and self.file.exists():
            lines = self.file.read_text(errors="replace").splitlines(keepends=True)
            with replace_file(self.file) as temporary:
                temporary.write_text("".join(line for line in lines if step_of(line) <= steps))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs the values of a step, counted from 1."""
        if not self.writes:
            return
        values = with_effective_sample(values)
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.run is not None:
            self.run.log({"global_step": step, **values})

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Shows numbers of the run as a whole in wandb."""
        if self.run is not None:
            self.run.summary.update(dict(values))

    def synchronize(self) -> None:
        """Brings every line to the disk, so that a checkpoint may count on them."""
        if self.writes and self.file.exists():
            synchronize(self.file)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if self.run is not None:
            if failure is Stopped:  # it is to go on
                self.run.mark_preempting()
            self.run.finish(exit_code=0 if failure is None else 1)


def step_of(line: str) -> float:
    """The step of a whole line; infinite of one that a crash cut short, or left garbage in place of."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


def with_effective_sample(values: Mapping[str, Any]) -> dict[str, Any]:
    """A step's values, the mean square of its weights turned into what it is measured for: the effective sample size
    (sum w)^2 / sum w^2 as a share of the number of pairs. Both means are of the whole step, over all processes."""
    values = dict(values)
    square = values.pop("weight_square_mean", None)
    if square:
        values["effective_sample_share"] = values["weight_mean"] ** 2 / square
    return values


def show(
    config: TrackerConfig,
    folder: Path,
    settings: Mapping[str, Any],
    numbers: Mapping[str, float],
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[Any]]]],
) -> None:
    """Shows what a finished stage has found in wandb, if tracker=wandb: numbers in the summary, tables (columns and
    rows). The stage is finished whether or not that works: what goes wrong is a warning."""
    if config.name != "wandb" or not is_rank0():
        return
    import wandb

    try:
        run = start(config, folder, folder.name, settings)
        run.summary.update(dict(numbers))
        shown: dict[str, Any] = {"global_step": 1}
        shown |= {name: wandb.Table(columns=list(columns), data=list(rows)) for name, (columns, rows) in tables.items()}
        run.log(shown)
        run.finish()
    except Exception as error:  # wandb's errors and its transport's have no common class
        warn(f"{folder} is finished, but not shown in wandb: {error}")


def start(config: TrackerConfig, folder: Path, name: str, settings: Mapping[str, Any]) -> Any:
    """wandb's run of a folder, always the same: online when logged in, else offline, never asking.

    Raises UserError where wandb refuses, or cannot be reached.
    """
    # wandb would report errors of its own to its makers, with what it finds around them.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # What it keeps of tables until they are sent: in the run folder, not in the home folder.
    os.environ.setdefault("WANDB_DATA_DIR", str(folder.resolve().parents[1] / "wandb"))
    import wandb

    place = folder.resolve()
    name_as_id = re.sub(r"[^\w.-]", "-", folder.name, flags=re.ASCII)
    mode: Any = os.environ.get("WANDB_MODE")
    try:
        run = wandb.init(
            project=config.project,
            group=config.group or place.parents[1].name,
            job_type=place.parent.name,
            name=name,
            id=f"{name_as_id}-{hashlib.blake2b(str(place).encode(), digest_size=4).hexdigest()}",
            resume="allow",
            reinit="create_new",  # the default would hand out a run that is still open, whatever its id
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
            mode=mode or ("online" if wandb.login(prompt=False, verify=False) else "offline"),
            config=dict(settings),
        )
    except (wandb.Error, ValueError) as error:
        way_out = "set WANDB_MODE=offline to log into the run's folder, or tracker=none"
        raise UserError(f"tracker=wandb: {str(error).rstrip('.')}; {way_out}") from error
    run.define_metric("*", step_metric="global_step")
    return run
