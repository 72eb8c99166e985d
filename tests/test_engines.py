"""Several processes under DeepSpeed: the same numbers as plain PyTorch on one, and failures that end all of them.

RDO_ENGINES=all tries every engine with 1, 2 and 4 processes on every kind of task; `pytest -s` prints the differences.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine_worker import trained
from rdo.artifacts import MANIFEST
from rdo.engine.deepspeed_engine import DESCRIPTION, ZeroEngine
from rdo.errors import UserError
from rdo.files import read_json_lines, replace_sealed, write_json
from tiny import TINY

HERE = Path(__file__).parent
TRAIN = HERE.parent / "train.py"
TASKS = ("dpo", "kto", "rrhf", "pointwise", "paper", "kto-lora", "pointwise-lora")
ALL = ("zero1", "zero2", "zero3", "zero3_offload")
# Processes, engines, tasks.
SOME = [
    (2, ("zero1", "zero2", "zero3", "zero2+bfloat16"), ("kto", "paper", "pointwise-lora")),
    (4, ("zero2",), ("rrhf",)),
]
MATRIX = (
    [(count, (*ALL, "zero2+bfloat16"), TASKS) for count in (1, 2, 4)]
    if os.environ.get("RDO_ENGINES") == "all"
    else SOME
)
KILLS = int(os.environ.get("RDO_KILLS", "1"))
# What was measured over the whole matrix: losses and norms differ by 8e-7, weights by 8e-6 of the way that they went.
LOSS, WEIGHTS = 3e-6, 5e-5


def launched(count: int, *command: object) -> subprocess.Popen[str]:
    """So many processes of a Python program, as torchrun starts them on one machine."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", "0"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*torchrun, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str], seconds: float = 120.0) -> tuple[int, str, str]:
    """Exit code, standard output and standard error; a process that hangs fails the test."""
    try:
        out, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"hangs after {seconds} seconds")
    return process.returncode, out, error


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return sum(float((one[name].double() - other[name].double()).square().sum()) for name in one) ** 0.5


def worst(found: list[dict[str, float]], wanted: list[dict[str, float]], name: str) -> float:
    """The largest relative difference of a metric."""
    return max(abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(found, wanted, strict=True))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What plain PyTorch makes of each task, in one process."""
    known: dict[str, dict[str, Any]] = {}

    def get(task: str) -> dict[str, Any]:
        if task not in known:
            known[task] = trained(task, "torch", tmp_path_factory.mktemp(task))
        return known[task]

    return get


@pytest.mark.parametrize(("count", "engines", "tasks"), MATRIX)
def test_losses_and_weights_are_those_of_one_process_of_pytorch(
    count: int, engines: Sequence[str], tasks: Sequence[str], plain: Any, tmp_path: Path
) -> None:
    """Clipping, two learning rates, uneven micro-batches, a last batch smaller than the number of processes."""
    code, _, error = finished(
        launched(count, HERE / "engine_worker.py", tmp_path, ",".join(engines), ",".join(tasks)), 400
    )
    assert code == 0, error
    for engine in engines:
        for task in tasks:
            wanted, found = plain(task), torch.load(tmp_path / f"{engine}-{task}.pt", weights_only=True)
            moved = distance(wanted["weights"], wanted["start"])
            apart = distance(wanted["weights"], found["weights"]) / moved
            metrics = found["metrics"], wanted["metrics"]
            loss, norm = worst(*metrics, "loss"), worst(*metrics, "gradient_norm")
            print(f"| {engine} | {count} | {task} | {loss:.1e} | {norm:.1e} | {apart:.1e} |")
            assert moved > 0.1
            half = engine.endswith("+bfloat16")  # three significant digits
            assert max(loss, norm) < (2e-2 if half else LOSS)
            assert apart < (0.2 if half else WEIGHTS)
            assert all(weight.dtype == torch.float32 for weight in found["weights"].values())
            for name in ("step", "learning_rate", "tokens"):
                assert [line[name] for line in metrics[0]] == [line[name] for line in metrics[1]]


# ---------------------------------------------------------------------------------------------------------------------
# Whole commands
# ---------------------------------------------------------------------------------------------------------------------

SETTINGS = (
    *TINY,
    "stage=eval",
    "loss=kto",
    "rc=reward",
    "eval.judges=[oracle,reward]",
    "eval.batch_size=4",
    "engine.records_per_shard=8",
    "engine.checkpoint_every_steps=1",
    "sft.max_steps=3",
    "rm.max_steps=2",
    "align.batch_size=4",
    "align.epochs=3",
)


def files_of(run_dir: Path) -> dict[str, bytes]:
    """Every file that is a result and depends on no clock and no rounding of a training step."""
    patterns = ("score/*/scores.parquet", "reference/*/*.parquet", "eval/*/generations.jsonl")
    return {str(file.relative_to(run_dir)): file.read_bytes() for p in patterns for file in run_dir.glob(p)}


def test_scores_references_and_generations_are_the_same_files_whatever_the_number_of_processes(tmp_path: Path) -> None:
    """Models of one process, read by one and by two."""
    one, two = tmp_path / "one", tmp_path / "two"
    code, _, error = finished(launched(1, TRAIN, *SETTINGS, f"run_dir={one}"))
    assert code == 0, error
    for stage in ("sft", "rm", "align"):
        shutil.copytree(one / stage, two / stage)
    code, out, error = finished(launched(2, TRAIN, *SETTINGS, f"run_dir={two}", "engine=zero2"))
    assert code == 0, error
    wanted = files_of(one)
    assert len(wanted) == 4
    assert files_of(two) == wanted
    assert out.count("[data]") == 1  # one process talks


def checkpoint(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("align/*/checkpoints/step_*"))


def weights(run_dir: Path) -> bytes:
    (model,) = run_dir.glob("align/*/model/model.safetensors")
    return model.read_bytes()


def steps(run_dir: Path) -> list[dict[str, Any]]:
    clock = {"seconds", "tokens_per_second", "memory_bytes"}
    (file,) = run_dir.glob("align/*/metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in clock} for line in read_json_lines(file)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    code, _, error = finished(launched(2, TRAIN, *SETTINGS, "stage=align", f"run_dir={run_dir}", "engine=zero2"))
    assert code == 0, error
    return run_dir


def prepared(whole: Path, run_dir: Path) -> tuple[Path, list[str]]:
    """A run folder in which all is done but the alignment, and the command that does it."""
    shutil.copytree(whole, run_dir, ignore=shutil.ignore_patterns("align"))
    return run_dir, [str(TRAIN), *SETTINGS, "stage=align", f"run_dir={run_dir}", "engine=zero2"]


def children(process: subprocess.Popen[str]) -> list[int]:
    listed = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True)
    return [int(number) for number in listed.stdout.split()]


def logged(run_dir: Path) -> int:
    """Steps that the metrics know."""
    return sum(file.read_text().count("\n") for file in run_dir.glob("align/*/metrics.jsonl"))


@pytest.mark.parametrize(("how", "kills"), [(signal.SIGKILL, KILLS), (signal.SIGTERM, 1)])
def test_a_rank_that_is_killed_ends_the_job_and_the_same_command_goes_on(
    how: int, kills: int, whole: Path, tmp_path: Path
) -> None:
    """At random steps, within them, and on either rank; metrics and weights are those of the run without kills."""
    run_dir, command = prepared(whole, tmp_path / "run")
    draw, hits = random.Random(how), 0
    while hits < kills:
        process = launched(2, *command)
        until = logged(run_dir) + draw.randrange(1, 5)
        while process.poll() is None and logged(run_dir) < until:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        if alive := children(process):
            with suppress(ProcessLookupError):
                os.kill(draw.choice(alive), how)
        code, _, error = finished(process, 60)
        done = list(run_dir.glob(f"align/*/{MANIFEST}"))
        assert done or code, error
        if done:  # before it was killed
            assert weights(run_dir) == weights(whole)
            assert steps(run_dir) == steps(whole)
            shutil.rmtree(run_dir / "align")
            continue
        hits += 1
    code, out, error = finished(launched(2, *command))
    assert code == 0, error
    assert how == signal.SIGKILL or "going on from" in out
    assert weights(run_dir) == weights(whole)
    assert steps(run_dir) == steps(whole)
    assert not checkpoint(run_dir)


@pytest.mark.parametrize(
    ("what", "then", "now"),
    [("engine", "zero2", "zero3"), ("processes", 2, 1), ("precision", "torch.bfloat16", "torch.float32")],
)
def test_a_checkpoint_of_another_kind_of_run_is_refused_with_a_way_out(
    what: str, then: Any, now: Any, tmp_path: Path
) -> None:
    described = {"engine": "zero3", "processes": 1, "precision": "torch.float32", "files": [], what: then}
    write_json(tmp_path / "step_00000001" / DESCRIPTION, described)
    engine: Any = SimpleNamespace(name="zero3", precision=torch.float32)
    with pytest.raises(
        UserError, match=f"with {what} {then}, and this run has {now}: start it with the same .* delete"
    ):
        ZeroEngine.examine(engine, tmp_path / "step_00000001")


def test_a_damaged_checkpoint_of_several_processes_is_found(tmp_path: Path) -> None:
    engine: Any = SimpleNamespace(name="zero3", precision=torch.float32)
    described = {"engine": "zero3", "processes": 1, "precision": "torch.float32", "files": ["part.pt"]}
    assert "cannot be read (FileNotFoundError)" in str(ZeroEngine.examine(engine, tmp_path))
    write_json(tmp_path / DESCRIPTION, described)
    assert "cannot be read" in str(ZeroEngine.examine(engine, tmp_path))
    with replace_sealed(tmp_path / "state" / "part.pt") as file:
        file.write(bytes(1000))
    assert ZeroEngine.examine(engine, tmp_path) is None
    part = tmp_path / "state" / "part.pt"
    part.write_bytes(part.read_bytes().replace(bytes(8), b"\1" * 8, 1))
    assert "checksum" in str(ZeroEngine.examine(engine, tmp_path))


def test_several_processes_of_plain_pytorch_are_refused(tmp_path: Path) -> None:
    code, _, error = finished(launched(2, TRAIN, *SETTINGS, "stage=sft", f"run_dir={tmp_path}"))
    assert code != 0
    assert error.count("error: engine=torch is one process, and 2 were started: use engine=zero2") == 1


FAILING = """
import sys
sys.path[:0] = [{source!r}, {tests!r}]
import rdo.step
from rdo import distributed
from rdo.errors import UserError

real = rdo.step.training_step
def failing(*arguments):
    if distributed.world().rank == 1:
        raise UserError("the second process has had enough")
    return real(*arguments)

import rdo.training
rdo.training.training_step = failing
sys.argv = sys.argv[1:]
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_rank_that_fails_brings_the_job_down_with_its_own_error(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(source=str(HERE.parent / "src"), tests=str(HERE)))
    started = time.monotonic()
    process = launched(2, script, TRAIN, *SETTINGS, "stage=sft", f"run_dir={tmp_path}/run", "engine=zero2")
    code, _, error = finished(process, 60)
    assert code != 0
    assert error.count("error: ") == 1
    assert "error: process 1: the second process has had enough" in error
    assert not list((tmp_path / "run").glob(f"sft/*/{MANIFEST}"))
    assert time.monotonic() - started < 60


LATE = """
import atexit, os, sys, threading, time
sys.path[:0] = [{source!r}]
from rdo import distributed

def look_back():
    if threading.active_count() > 1:
        os._exit(9)

class LateStore(distributed.PrefixStore):
    def check(self, keys):
        time.sleep(0.5)
        return super().check(keys)

atexit.register(look_back)  # called last
distributed.WATCH, distributed.PrefixStore = 0.0, LateStore
distributed.start("cpu")
time.sleep(0.2)
"""


def test_no_thread_is_left_in_the_store_when_python_ends(tmp_path: Path) -> None:
    """A thread that returns from C++ while Python ends is unwound through it, which aborts the process."""
    script = tmp_path / "late.py"
    script.write_text(LATE.format(source=str(HERE.parent / "src")))
    code, _, error = finished(launched(2, script), 60)
    assert code == 0, error


def test_a_full_disk_on_one_rank_costs_a_checkpoint_and_nothing_else(whole: Path, tmp_path: Path) -> None:
    run_dir, command = prepared(whole, tmp_path / "run")
    script = tmp_path / "full.py"
    script.write_text(
        FAILING.split("real =")[0].format(source=str(HERE.parent / "src"), tests=str(HERE))
        + "import errno\nfrom rdo.files import Sealing\nreal, seen = Sealing.write, []\n"
        + "def write(self, data):\n    seen.append(1)\n"
        + "    if distributed.world().rank == 1 and len(seen) < 30:\n        raise OSError(errno.ENOSPC, 'full')\n"
        + "    return real(self, data)\n"
        + "Sealing.write = write\nimport rdo.checkpoints\nrdo.checkpoints.RETRY_SECONDS = 0.0\n"
        + "sys.argv = sys.argv[1:]\nimport runpy\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    code, _, error = finished(launched(2, script, *command))
    assert code == 0, error
    assert "cannot be written: no space left on device" in error
    assert weights(run_dir) == weights(whole)
    assert json.dumps(steps(run_dir)) == json.dumps(steps(whole))
