"""Several processes under DeepSpeed: the same numbers as plain PyTorch on one, and failures that end all of them.

RDO_ENGINES=all tries every engine with 1, 2 and 4 processes on every kind of task; `pytest -s` prints the differences.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_worker import trained

from rdo.runtime.files import read_json_lines
from rdo.runtime.store import MANIFEST
from tiny import TINY

HERE = Path(__file__).parents[1]
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
        launched(count, Path(__file__).parent / "engine_worker.py", tmp_path, ",".join(engines), ",".join(tasks)), 400
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
    "eval.judges=[gold,reward]",
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
    patterns = ("score/*/score.parquet", "reference/*/*.parquet", "eval/*/generations.jsonl")
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


def test_a_damaged_checkpoint_is_left_out_and_another_runs_is_refused(whole: Path, tmp_path: Path) -> None:
    """Of two checkpoints the newer has a flipped bit; and another engine, or number of processes, takes neither."""
    run_dir, command = prepared(whole, tmp_path / "run")
    process = launched(2, *command)
    while process.poll() is None and len(checkpoint(run_dir)) < 2:
        time.sleep(0.002)
    for number in children(process):
        os.kill(number, signal.SIGKILL)
    finished(process, 60)
    for count, other in ((2, "engine=zero1"), (1, "engine=zero2")):
        code, _, error = finished(launched(count, *command[:-1], other))
        assert code != 0
        assert re.search(r"error: .* was saved with (engine|processes) .*: start it with the same .* or delete", error)
    *_, before, last = checkpoint(run_dir)
    file = max((last / "state").iterdir(), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    code, out, error = finished(launched(2, *command))
    assert code == 0, error
    assert f"warning: {last} is damaged ({file.name}: " in error
    assert f"going on from {before}" in out
    assert weights(run_dir) == weights(whole)
    assert steps(run_dir) == steps(whole)


def test_several_processes_of_plain_pytorch_are_refused(tmp_path: Path) -> None:
    code, _, error = finished(launched(2, TRAIN, *SETTINGS, "stage=sft", f"run_dir={tmp_path}"))
    assert code != 0
    assert error.count("error: engine=torch is one process, and 2 were started: use engine=zero2") == 1


FAILING = """
import runpy, sys
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
        (0, "raise UserError('I have had enough')", "error: I have had enough"),
        (1, "raise UserError('I have had enough')", "error: process 1: I have had enough"),
        (1, "raise OSError(28, 'No space left', 'x')", "error: process 1: OSError: [Errno 28] No space left: 'x'"),
        (1, "import os; os._exit(7)", "exitcode  : 7"),  # as torchrun has it
    ],
)
def test_a_rank_that_fails_brings_the_job_down_with_its_own_error(
    rank: int, what: str, said: str, tmp_path: Path
) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(source=str(HERE.parent / "src"), rank=rank, what=what))
    process = launched(2, script, TRAIN, *SETTINGS, "stage=sft", f"run_dir={tmp_path}/run", "engine=zero2")
    code, _, error = finished(process, 60)
    assert code != 0
    assert said in error
    assert error.count("error: ") == said.count("error: ")
    assert not list((tmp_path / "run").glob(f"sft/*/{MANIFEST}"))
