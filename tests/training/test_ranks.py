"""Whole commands on several processes: the same files as one process makes, and failures that end all of them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from engines import finished, launched
from rdo.checks import compose_config
from rdo.main import run_config
from rdo.runtime.errors import UserError
from rdo.runtime.files import read_json_lines
from rdo.runtime.store import MANIFEST
from tiny import TINY

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "train.py"
KILLS = int(os.environ.get("RDO_KILLS", "1"))
SETTINGS = (
    *TINY,
    "loss=kto",
    "rc=reward",
    "eval.judges=[gold,reward]",
    "eval.batch_size=4",
    "engine.records_per_shard=8",
    "engine.checkpoint_every_steps=1",
    "sft.max_steps=3",
    "rm.max_steps=2",
    "align.batch_size=4",
    "align.epochs=3",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything, made by two processes that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    code, out, error = finished(launched(2, TRAIN, *SETTINGS, "stage=eval", f"run_dir={run_dir}", "engine=zero2"))
    assert code == 0, error
    assert out.count("[data] toy (") == 1  # one process talks
    return run_dir


def files_of(run_dir: Path) -> dict[str, bytes]:
    """Every file that is a result and depends on no clock and no rounding of a training step."""
    patterns = ("score/*/score.parquet", "reference/*/*.parquet", "eval/*/generations.jsonl")
    return {str(file.relative_to(run_dir)): file.read_bytes() for p in patterns for file in run_dir.glob(p)}


def test_scores_references_and_generations_are_the_same_files_whatever_the_number_of_processes(
    whole: Path, tmp_path: Path
) -> None:
    """Models of two processes, read by two and by one."""
    for stage in ("sft", "rm", "align"):
        shutil.copytree(whole / stage, tmp_path / stage)
    command = [*SETTINGS, "stage=eval", f"run_dir={tmp_path}"]
    run_config(compose_config(command), command)
    wanted = files_of(whole)
    assert len(wanted) == 4
    assert files_of(tmp_path) == wanted


def test_several_processes_of_plain_pytorch_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    command = [*SETTINGS, "stage=sft", f"run_dir={tmp_path}"]
    with pytest.raises(UserError, match="engine=torch is one process, and 2 were started: use engine=zero2"):
        run_config(compose_config(command), command)


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions
# ---------------------------------------------------------------------------------------------------------------------


def weights(run_dir: Path) -> bytes:
    (model,) = run_dir.glob("align/*/model/model.safetensors")
    return model.read_bytes()


def steps(run_dir: Path) -> list[dict[str, Any]]:
    clock = {"seconds", "tokens_per_second", "memory_bytes"}
    (file,) = run_dir.glob("align/*/metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in clock} for line in read_json_lines(file)]


def logged(run_dir: Path) -> int:
    """Steps that the metrics know."""
    return sum(file.read_text().count("\n") for file in run_dir.glob("align/*/metrics.jsonl"))


def interrupted(command: list[str], run_dir: Path, how: int, draw: random.Random) -> tuple[str, str]:
    """Sends a signal to either rank, three to five steps on and anywhere within them; what the job then said."""
    for _ in range(5):
        process = launched(2, *command)
        until = logged(run_dir) + draw.randrange(3, 6)
        while process.poll() is None and logged(run_dir) < until:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        ranks = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True)
        with suppress(ProcessLookupError, IndexError):
            os.kill(int(draw.choice(ranks.stdout.split())), how)
        code, out, error = finished(process)
        if code:
            return out, error
        shutil.rmtree(run_dir / "align")  # it was done before the signal
    pytest.fail("it is always done before it can be interrupted")


def test_a_run_that_is_killed_damaged_and_stopped_ends_as_one_that_nothing_interrupts(
    whole: Path, tmp_path: Path
) -> None:
    """A rank that is killed ends the job; a damaged checkpoint is left out, and another number of processes does not
    take up the one before; a rank that is to stop stops all of them; and the same command goes on to the same bits."""
    run_dir, draw = tmp_path / "run", random.Random(0)
    shutil.copytree(whole, run_dir, ignore=shutil.ignore_patterns("align", "eval"))
    command = [str(TRAIN), *SETTINGS, "stage=align", f"run_dir={run_dir}", "engine=zero2"]
    for _ in range(KILLS):
        interrupted(command, run_dir, signal.SIGKILL, draw)
        assert not list(run_dir.glob(f"align/*/{MANIFEST}"))
    *_, before, last = sorted(run_dir.glob("align/*/checkpoints/step_*"))
    file = max((last / "state").iterdir(), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    alone = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert alone.returncode == 1
    assert f"warning: {last} is damaged ({file.name}: " in alone.stderr
    assert f"error: {before} was saved with processes 2, and this run has 1: start it with the same" in alone.stderr
    out, error = interrupted(command, run_dir, signal.SIGTERM, draw)
    assert f"warning: {last} is damaged ({file.name}: " in error
    assert f"going on from {before}" in out
    assert "is saved, and the same command goes on from there" in error
    code, out, error = finished(launched(2, *command))
    assert code == 0, error
    assert "going on from" in out
    assert weights(run_dir) == weights(whole)
    assert steps(run_dir) == steps(whole)
    assert not list(run_dir.glob("align/*/checkpoints/step_*"))


FAILING = """
import os, runpy, sys
sys.path[:0] = [{source!r}]
import rdo.training.loop
from rdo.runtime import processes
from rdo.runtime.errors import UserError

real = rdo.training.loop.training_step
def failing(*arguments):
    if processes.world().rank == {rank}:
        {what}
    return real(*arguments)

rdo.training.loop.training_step = failing
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("rank", "what", "said"),
    [
        (1, "raise OSError(28, 'No space left', 'x')", "error: process 1: OSError: [Errno 28] No space left: 'x'"),
        (1, "os._exit(7)", "exitcode  : 7"),  # as torchrun has it
    ],
)
def test_a_rank_that_fails_brings_the_job_down_with_its_own_error(
    rank: int, what: str, said: str, tmp_path: Path
) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(source=str(ROOT / "src"), rank=rank, what=what))
    process = launched(2, script, TRAIN, *SETTINGS, "stage=sft", f"run_dir={tmp_path}/run", "engine=zero2")
    code, _, error = finished(process)
    assert code != 0
    assert said in error
    assert error.count("error: ") == said.count("error: ")
    assert not list((tmp_path / "run").glob(f"sft/*/{MANIFEST}"))
