"""Tiny runs of every stage that were tracked by wandb, offline, and what their files hold."""

import atexit
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import wandb

from rdo.stages.align import aligned_policy
from rdo.stages.eval import evaluate_policy, evaluate_scorers
from tiny import tiny_run

BLOCK = 32768  # of a .wandb file: LevelDB's log, whose pieces never cross a block
HEADER = 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4
SHORT = ("tracker=wandb", "rm.max_steps=3", "diffmodel.max_steps=3", "align.batch_size=8", "align.max_steps=3")


@dataclass
class Logged:
    """What the files of one wandb run hold, in the order in which they were begun."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    made: list[tuple[str, str]] = field(default_factory=list)  # artifacts: type and name
    used: list[tuple[str, str]] = field(default_factory=list)
    references: dict[str, list[str]] = field(default_factory=dict)  # of artifacts, by name: where their files lie
    exit_codes: list[int] = field(default_factory=list)
    preempted: bool = False


@cache
def tracked_runs() -> Path:
    """A run folder with every stage of tiny runs: DPO with a difference model, KTO, RRHF, and evaluations."""
    run_dir = Path(tempfile.mkdtemp()) / "world-model"
    atexit.register(shutil.rmtree, run_dir.parent, ignore_errors=True)
    with mock.patch.dict(os.environ, {"WANDB_MODE": "offline"}):
        difference = tiny_run(run_dir, *SHORT, "loss=dpo", "rc=diff", "rc.negative=abs", "rc.alpha=0.25")
        evaluate_policy(difference, "policy")
        evaluate_scorers(difference, "diff")
        aligned_policy(tiny_run(run_dir, *SHORT, "loss=kto", "rc=none"))
        ranked = ["loss=rrhf", "loss.ranking=scores", "loss.sft_weight=1", "rc=none", "align.min_responses=6"]
        aligned_policy(tiny_run(run_dir, *SHORT, *ranked))
    return run_dir


def the_run(stage: str, label: str) -> Logged:
    """What the one tracked run of this stage and label has logged."""
    (folder,) = (tracked_runs() / stage).glob(f"{label}-*")
    return read_run(folder)


def read_run(folder: Path) -> Logged:
    """What the wandb files of a stage's folder hold together."""
    wandb.teardown()  # waits until what this process has logged is written
    found = Logged()
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.parent.name):
        read_file(file, found)
    return found


def read_file(file: Path, found: Logged) -> None:
    """Adds what a .wandb file holds."""
    from wandb.proto.wandb_internal_pb2 import Record

    for data in wandb_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            found.steps.append({key(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "summary":
            found.summary |= {key(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "run":
            names = ("run_id", "project", "run_group", "display_name", "job_type")
            found.facts |= {name: getattr(record.run, name) for name in names}
            found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            found.config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "artifact" and record.artifact.type != "run_table":
            artifact = record.artifact
            (found.used if artifact.use_after_commit else found.made).append((artifact.type, artifact.name))
            found.references[artifact.name] = [entry.ref for entry in artifact.manifest.contents]
        elif kind == "exit":
            found.exit_codes.append(record.exit.exit_code)
        elif kind == "preempting":
            found.preempted = True


def key(item: Any) -> str:
    """The name of a logged value."""
    return item.key or "/".join(item.nested_key)


def wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log: pieces with a header of checksum, length and kind, after wandb's own header."""
    position, record = HEADER, b""
    assert data[:4] == b":W&B"
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        if position + HEADER + length > len(data):  # a kill cut it short
            return
        record += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (WHOLE, LAST):
            yield record
            record = b""
        else:
            assert kind in (FIRST, MIDDLE)
