"""Tiny runs of every stage that were tracked by wandb, and what they logged; and what a .wandb file holds."""

import json
import os
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import wandb
from wandb.proto.wandb_internal_pb2 import Record

from rdo.stages.align import aligned_policy
from rdo.stages.evaluate import evaluate_policy, evaluate_scorers
from tiny import tiny_run

SHORT = ("tracker=wandb", "rm.max_steps=3", "diffmodel.max_steps=3", "align.batch_size=8", "align.max_steps=3")


@dataclass
class Logged:
    """In the place of wandb's run: what it was given."""

    asked: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)

    def log(self, values: dict[str, Any]) -> None:
        self.steps.append(values)

    def finish(self, exit_code: int = 0) -> None:
        self.exit_codes.append(exit_code)

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "global_step")

    @property
    def folder(self) -> Path:
        return Path(self.asked["dir"])

    @property
    def history(self) -> set[str]:
        return {name for step in self.steps for name in step}


@cache
def tracked_runs() -> list[Logged]:
    """The runs of a folder with every stage: DPO with a difference model, KTO, RRHF, and evaluations."""
    found: list[Logged] = []

    def init(**asked: Any) -> Logged:
        found.append(Logged(asked))
        return found[-1]

    run_dir = Path(tempfile.mkdtemp()) / "world-model"
    with mock.patch.dict(os.environ, {"WANDB_MODE": "offline"}), mock.patch.object(wandb, "init", init):
        difference = tiny_run(run_dir, *SHORT, "loss=dpo", "rc=diff", "rc.negative=abs", "rc.alpha=0.25")
        evaluate_policy(difference, "policy")
        evaluate_scorers(difference, "diff")
        aligned_policy(tiny_run(run_dir, *SHORT, "loss=kto", "rc=none"))
        ranked = ["loss=rrhf", "loss.ranking=scores", "loss.sft_weight=1", "rc=none", "align.min_responses=6"]
        aligned_policy(tiny_run(run_dir, *SHORT, *ranked))
        evaluate_policy(difference, "policy")  # which is there
    return found


def the_run(stage: str, label: str) -> Logged:
    """What the one tracked run of this stage and label was given."""
    (run,) = (run for run in tracked_runs() if f"/{stage}/{label}-" in run.asked["dir"])
    return run


def records_in(folder: Path) -> list[Record]:
    """The records of the files of all wandb runs in a stage's folder, in the order of their beginning."""
    wandb.teardown()  # waits until what this process has logged is written
    records = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in wandb_records(file.read_bytes()):
            records.append(Record())
            records[-1].ParseFromString(data)
    return records


def steps_in(folder: Path) -> list[dict[str, Any]]:
    """The steps among these records."""
    histories = [record.history for record in records_in(folder) if record.WhichOneof("record_type") == "history"]
    return [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in each.item} for each in histories]


def wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log: pieces with a header of checksum, length and kind, after wandb's own header; none
    crosses a block of 32768 bytes. A kill may cut the last one short."""
    position, record = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + length > len(data):
            return
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield record
            record = b""
