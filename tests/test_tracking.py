"""Metrics: a JSON-lines file of every run, and an offline wandb run where nobody is logged in."""

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rdo.files import read_json_lines
from rdo.schema import TrackerConfig
from rdo.tracking import METRICS, Tracker

BLOCK = 32768  # of a .wandb file: LevelDB's log, whose pieces never cross a block
HEADER = 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4

RUN = """
import sys
from pathlib import Path
from rdo.schema import TrackerConfig
from rdo.tracking import Tracker

with Tracker(TrackerConfig("wandb", "own", "group"), Path(sys.argv[1]), "a name", {"align": {"epochs": 3}}) as tracker:
    for step in (1, 2):
        tracker.log(step, {"loss": step / 8})
"""


def test_without_a_tracker_the_metrics_are_a_file_and_nothing_else(tmp_path):
    with Tracker(TrackerConfig(), tmp_path, "a run", {}) as tracker:
        tracker.log(1, {"loss": 0.5})
        tracker.log(2, {"loss": 0.25})
    assert read_json_lines(tmp_path / METRICS) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    assert [file.name for file in tmp_path.iterdir()] == [METRICS]
    assert tracker.run is None


@pytest.mark.parametrize(("done", "kept"), [(0, []), (2, [1, 2]), (9, [1, 2, 3])])
def test_resuming_drops_the_steps_after_the_checkpoint(tmp_path, done, kept):
    tracker = Tracker(TrackerConfig(), tmp_path, "a run", {})
    tracker.resume(done)  # before there is a file
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 0.5})
    tracker.resume(done)
    assert [line["step"] for line in read_json_lines(tmp_path / METRICS)] == kept


def test_resuming_drops_a_line_that_a_crash_cut_short(tmp_path):
    """A full disk or a power cut may leave half a line; the steps before it stand."""
    tracker = Tracker(TrackerConfig(), tmp_path, "a run", {})
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 0.5})
    text = (tmp_path / METRICS).read_text()
    (tmp_path / METRICS).write_text(text[:-9])
    tracker.resume(2)
    tracker.log(3, {"loss": 0.125})
    assert read_json_lines(tmp_path / METRICS)[1:] == [{"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.125}]


@pytest.mark.parametrize("damage", [b"\0" * 40, b'{"step": "x"}\n', b"\xff\xfe\n", b'{"step": 3, "loss": 1}\n{"st'])
def test_resuming_drops_what_is_no_line_and_what_stands_twice(tmp_path, damage):
    """A power cut may leave anything behind what was brought to the disk with the checkpoint."""
    tracker = Tracker(TrackerConfig(), tmp_path, "a run", {})
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 0.5})
    text = (tmp_path / METRICS).read_bytes()
    (tmp_path / METRICS).write_bytes(text + damage)
    tracker.resume(3)
    assert (tmp_path / METRICS).read_bytes() == text
    tracker.log(4, {"loss": 0.5})
    assert [line["step"] for line in read_json_lines(tmp_path / METRICS)] == [1, 2, 3, 4]


def test_lost_lines_are_said(tmp_path, capsys):
    tracker = Tracker(TrackerConfig(), tmp_path, "a run", {})
    for step in (1, 4):
        tracker.log(step, {"loss": 0.5})
    tracker.resume(4)
    assert "metrics.jsonl lacks 2 of the 4 steps up to the checkpoint" in capsys.readouterr().err


def test_wandb_runs_offline_without_a_login_and_without_asking(tmp_path):
    folder = tmp_path / "align-123"
    folder.mkdir()
    bare = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder)],
        env=bare,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 30  # nothing waited for a network
    assert "(1)" not in done.stdout + done.stderr  # the menu of `wandb login`
    assert read_json_lines(folder / METRICS) == [{"step": 1, "loss": 0.125}, {"step": 2, "loss": 0.25}]
    (file,) = folder.glob("wandb/offline-run-*/run-align-123-*.wandb")
    logged, run = read_wandb(file)
    assert [(step["global_step"], step["loss"]) for step in logged] == [(1, 0.125), (2, 0.25)]
    assert (run["project"], run["run_group"], run["display_name"]) == ("own", "group", "a name")
    assert run["config"]["align"] == {"epochs": 3}


def read_wandb(file: Path) -> tuple[list[dict], dict]:
    """What a .wandb file holds: the logged steps, and what it says of the run."""
    from wandb.proto.wandb_internal_pb2 import Record

    logged, run = [], {}
    for data in wandb_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = record.history.item
            logged.append({(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in items})
        elif kind == "run":
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            names = ("project", "run_group", "display_name")
            run = {**{name: getattr(record.run, name) for name in names}, "config": config}
    return logged, run


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
        record += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (WHOLE, LAST):
            yield record
            record = b""
        else:
            assert kind in (FIRST, MIDDLE)
