"""One wandb run for each folder of a stage: online when logged in, else offline, never asking.

The same folder gives the same run id, so a run that was killed goes on in its curve. wandb's own step is our step, and
what wandb has already is not logged again: online its server says up to where, offline the files of earlier attempts
do, which are read back, since every attempt writes a file of its own and a kill may cut its end off.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rdo.errors import UserError, single_line
from rdo.schema import TrackerConfig

# A .wandb file is LevelDB's log: after 7 bytes pieces of records, each with a header of checksum, length and kind;
# none crosses a block, and a block's last bytes stay empty where no header fits.
BLOCK, HEADER = 32768, 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4
# The last steps of runs that this process has closed, whose files wandb may still be writing.
_reached: dict[str, int] = {}


class WandbRun:
    """The wandb run of a stage's folder. Raises UserError where wandb cannot be reached."""

    def __init__(self, config: TrackerConfig, folder: Path, name: str, settings: Mapping[str, Any]):
        self.id = run_id(folder)
        earlier = max(last_step(folder / "wandb", self.id), _reached.get(self.id, 0))
        self.run = start(config, folder, name, self.id, settings)
        # The server counts from 0, and a run that it does not know starts there.
        self.last = earlier if self.run.offline else self.run.starting_step - 1

    def catch_up(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Logs the lines of metrics.jsonl that wandb has not got."""
        for line in lines:
            self.log(line["step"], {name: value for name, value in line.items() if name != "step"})

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs a step, unless wandb has it: it was done before a kill, and gives the same numbers again."""
        if step > self.last:
            self.run.log({"global_step": step, **values}, step=step)
            self.last = _reached[self.id] = step

    def finish(self, failed: bool = False, preempted: bool = False) -> None:
        """Closes the run; one that was asked to stop is marked as preempted, for it is to go on."""
        if preempted:
            self.run.mark_preempting()
        self.run.finish(exit_code=1 if failed else 0)


def run_id(folder: Path) -> str:
    """The id of a folder's run: the folder's name, which wandb allows few signs in, and a hash of where it lies."""
    name = re.sub(r"[^\w.-]", "-", folder.name, flags=re.ASCII)
    return f"{name}-{hashlib.blake2b(str(folder.resolve()).encode(), digest_size=4).hexdigest()}"


def start(config: TrackerConfig, folder: Path, name: str, identity: str, settings: Mapping[str, Any]) -> Any:
    """wandb's own object of a run. Raises UserError where wandb refuses, or cannot be reached."""
    # wandb would report errors of its own to its makers, with what it finds around them.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # What it keeps of artifacts until they are sent: in the run folder, not in the home folder.
    os.environ.setdefault("WANDB_DATA_DIR", str(folder.resolve().parents[1] / "wandb"))
    import wandb

    mode = os.environ.get("WANDB_MODE")
    try:
        if not mode:
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        run = wandb.init(
            project=config.project,
            group=config.group or folder.resolve().parents[1].name,
            job_type=folder.resolve().parent.name,
            name=name,
            id=identity,
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
            mode=mode,  # type: ignore[arg-type]
            config=dict(settings),
        )
    except (wandb.Error, ValueError) as error:
        reason = single_line(str(error)).rstrip(".")
        way_out = "set WANDB_MODE=offline to log into the run's folder, or tracker=none"
        raise UserError(f"tracker=wandb: {reason}; {way_out}") from error
    run.define_metric("*", step_metric="global_step")
    return run


# ---------------------------------------------------------------------------------------------------------------------
# What earlier attempts left
# ---------------------------------------------------------------------------------------------------------------------


def last_step(folder: Path, identity: str) -> int:
    """The last step that the files of a run's earlier attempts hold; 0 if there are none."""
    steps = (
        json.loads(item.value_json)
        for file in folder.glob(f"*run-*-{identity}*/run-*.wandb")
        for record in records_of(file)
        for item in record.history.item
        if key_of(item) == "global_step"
    )
    return max(steps, default=0)


def logged_names(run_dir: Path) -> set[str]:
    """What the runs of a folder have logged: "history:", "summary:" and "config:" with the names of metrics, settings,
    tables and pictures."""
    found: set[str] = set()
    for file in sorted(run_dir.glob("*/*/wandb/*run-2*/run-*.wandb")):
        for record in records_of(file):
            found |= {f"history:{key_of(item)}" for item in record.history.item}
            found |= {f"summary:{key_of(item)}" for item in record.summary.update}
            for item in (*record.run.config.update, *record.config.update):
                found |= {f"config:{name}" for name in settings_in(key_of(item), json.loads(item.value_json))}
    # Of a table or a picture several facts are logged, under its name.
    return found | {name.rpartition("/")[0] for name in found if name.endswith("/_type")}


def key_of(item: Any) -> str:
    """The name of a logged value."""
    return item.key or "/".join(item.nested_key)


def settings_in(name: str, value: Any) -> Iterator[str]:
    """The dotted names of a setting and all that is nested in it."""
    yield name
    if isinstance(value, Mapping):
        for key, member in value.items():
            yield from settings_in(f"{name}.{key}", member)


def records_of(file: Path) -> Iterator[Any]:
    """The records of a .wandb file; what a kill cut short is left out."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    for data in whole_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        try:
            record.ParseFromString(data)
        except DecodeError:
            return
        yield record


def whole_records(data: bytes) -> Iterator[bytes]:
    """The whole records of LevelDB's log, up to the first that is cut short or damaged."""
    position, record = HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        piece = data[position + HEADER : position + HEADER + length]
        if len(piece) < length or kind not in (WHOLE, FIRST, MIDDLE, LAST):
            return
        record = piece if kind in (WHOLE, FIRST) else record + piece
        position += HEADER + length
        if kind in (WHOLE, LAST):
            yield record
