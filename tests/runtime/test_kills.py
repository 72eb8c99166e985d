"""Whatever kills a process, the same command again ends as if nothing had happened, bit for bit.

A stage runs in a forked child, which is killed: at random moments, and at every single rename and removal. RDO_KILLS=20
kills each stage so often at random.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from rdo.runtime.store import MANIFEST, Artifact
from rdo.stages.align import aligned_policy
from rdo.stages.evaluate import evaluate_policy
from rdo.stages.run import Run
from rdo.stages.score import scores
from rdo.stages.scorer import scorer
from rdo.stages.sft import base_policy
from tiny import is_finished, metrics, tiny_run

torch.set_num_threads(1)
tqdm.monitor_interval = 0  # no thread beside the one that forks

KILLS = int(os.environ.get("RDO_KILLS", "3"))

ALWAYS = (
    "engine.checkpoint_every_steps=1",
    "engine.records_per_shard=16",
    *(f"{section}.max_steps=4" for section in ("sft", "rm", "diffmodel", "align")),
    *(f"{section}.batch_size=8" for section in ("rm", "diffmodel", "align")),
    "eval.batch_size=2",
    "eval.judges=[gold]",
)


@dataclass(frozen=True)
class Stage:
    """A stage, its settings, and what it reads."""

    make: Callable[[Run], Artifact]
    overrides: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ("sft",)


STAGES: dict[str, Stage] = {
    "sft": Stage(base_policy, inputs=()),
    "diffmodel": Stage(lambda run: scorer(run, "diff")),
    "kto": Stage(aligned_policy, ("loss=kto", "rc=none"), ("sft", "reference")),
    "score": Stage(lambda run: scores(run, "diff", "train", True, None), inputs=("sft", "diffmodel")),
    "generation": Stage(lambda run: evaluate_policy(run, "base")),
}


def maker(name: str, run_dir: Path) -> Callable[[], Artifact]:
    """Makes a stage in a run folder; the children find the data made."""
    stage = STAGES[name]
    run = tiny_run(run_dir, *ALWAYS, *stage.overrides)
    run.splits()
    return lambda: stage.make(run)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Artifact, float]]:
    """Each stage's result without interruption, and the seconds that it takes a child."""
    run_dir = tmp_path_factory.mktemp("whole")
    found: dict[str, tuple[Artifact, float]] = {}

    def get(name: str) -> tuple[Artifact, float]:
        if name not in found:
            make = maker(name, run_dir)
            artifact = make()
            shutil.rmtree(artifact.folder)
            started = time.monotonic()
            assert in_child(make) == 0
            found[name] = (artifact, time.monotonic() - started)
        return found[name]

    return get


def prepared(name: str, whole: Artifact, run_dir: Path) -> tuple[Callable[[], Artifact], Path]:
    """Makes a stage in a copy of the run folder without it; and where the result belongs."""
    origin = whole.folder.parents[1]
    for stage in STAGES[name].inputs:
        shutil.copytree(origin / stage, run_dir / stage)
    return maker(name, run_dir), run_dir / whole.folder.relative_to(origin)


def start(work: Callable[[], Any]) -> int:
    """Runs it in a child of its own; the child's process number."""
    child = os.fork()
    if child:
        return child
    report = os.dup(2)
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        work()
        os._exit(0)
    except BaseException:
        os.write(report, traceback.format_exc().encode())
    finally:
        os._exit(1)


def in_child(work: Callable[[], Any]) -> int:
    """Runs it in a child to its end: 0, 1 after a failure, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(start(work), 0)[1])


def content(folder: Path) -> dict[str, Any]:
    """Everything that a stage left, but for the clock's part."""
    listed = json.loads((folder / MANIFEST).read_text())
    logged = metrics(Artifact(folder, "")) if (folder / "metrics.jsonl").exists() else []
    results = {key: value for key, value in listed["results"].items() if key != "last"}
    return {"metrics": logged, "results": results} | {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (MANIFEST, "metrics.jsonl", ".lock")
    }


def check(folder: Path, wanted: Artifact) -> None:
    """That the folder holds what the uninterrupted run left, and nothing of what an interrupted one goes on from."""
    found, right = content(folder), content(wanted.folder)
    assert found.keys() == right.keys()
    assert [name for name in found if found[name] != right[name]] == []
    steps = [line["step"] for line in found["metrics"]]
    assert steps == list(range(1, len(steps) + 1))
    left = {path.name for path in folder.iterdir()} - {path.name for path in wanted.folder.iterdir()}
    assert not left


@pytest.mark.parametrize("name", STAGES)
def test_kills_at_random_moments_change_nothing(name, whole, tmp_path):
    wanted, seconds = whole(name)
    make, folder = prepared(name, wanted, tmp_path)
    moments = random.Random(name)
    killed = 0
    while killed < KILLS:
        child = start(make)
        time.sleep(moments.uniform(0.0, seconds))
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        killed += status != 0
        if folder.exists() and is_finished(folder):
            make()  # finds it, and tidies up what the last kill left
            check(folder, wanted)
            shutil.rmtree(folder)
    assert make().folder == folder
    check(folder, wanted)


def killed_at(call: int, functions: tuple[str, ...], after: bool, work: Callable[[], Any]) -> Callable[[], None]:
    """Work whose process is killed at its so-manieth call of these functions of `os`: instead of it, or right after."""

    def run() -> None:
        calls = 0

        def fatal(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any, **named: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls < call:
                    return function(*arguments, **named)
                if after:
                    function(*arguments, **named)
                os.kill(os.getpid(), signal.SIGKILL)

            return wrapped

        for name in functions:
            setattr(os, name, fatal(getattr(os, name)))
        work()

    return run


RENAMES, REMOVALS = ("rename", "replace"), ("unlink", "rmdir")


@pytest.mark.parametrize(
    ("name", "functions", "fewest"),
    # Three checkpoints or four shards, the model or the scores, the manifest.
    [("sft", RENAMES, 5), ("score", RENAMES, 6), ("sft", REMOVALS, 5)],
    ids=["sft-renames", "score-renames", "sft-removals"],
)
def test_a_kill_at_any_rename_or_removal_changes_nothing(name, functions, fewest, whole, tmp_path):
    """Between a temporary file and its place, for checkpoints, shards, the model folder and the manifest."""
    wanted, _ = whole(name)
    make, folder = prepared(name, wanted, tmp_path)
    for call in itertools.count(1):
        status = in_child(killed_at(call, functions, call % 2 == 0, make))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        make()
        check(folder, wanted)
        shutil.rmtree(folder)
    check(folder, wanted)
    assert call > fewest
