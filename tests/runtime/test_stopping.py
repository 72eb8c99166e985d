"""Ctrl-C and SIGTERM: the first stops where nothing is lost and says so, a second Ctrl-C stops at once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rdo.runtime.files import held
from rdo.runtime.stopping import Stopped, check, handled, postponed, requested, stoppable
from rdo.stages.evaluate import evaluate_policy
from rdo.stages.reference import reference
from rdo.stages.score import scores
from rdo.stages.scorer import scorer
from rdo.stages.sft import base_policy
from rdo.tracking import Tracker
from rdo.training.tasks import SftTask
from tiny import TINY, is_finished, metrics, tiny_run, weights

ROOT = Path(__file__).parents[2]
ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """SIGINT is heard also where the tests run in the background of a shell, and every handler is left as it was."""
    before = [signal.signal(number, signal.default_int_handler) for number in ALL]
    yield
    assert all(signal.getsignal(number) is signal.default_int_handler for number in ALL)
    for number, handler in zip(ALL, before, strict=True):
        signal.signal(number, handler)


def send(number: int) -> None:
    """A signal to this process, handled when the call returns."""
    os.kill(os.getpid(), number)
    time.sleep(0)


def send_twice() -> None:
    send(signal.SIGTERM)
    send(signal.SIGTERM)


def library() -> None:
    """As `datasets`, whose own error in a `finally` replaces ours."""
    try:
        send(signal.SIGINT)
    finally:
        raise TimeoutError


def after_a_loop(then: Callable[[], Any]) -> Callable[[], None]:
    def work() -> None:
        with postponed():
            then()
            assert requested()
        check("all is saved")

    return work


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        (lambda: send(signal.SIGINT), 130, "stopped by SIGINT: what is finished is kept, and the same command goes on"),
        (lambda: send(signal.SIGTERM), 143, "stopped by SIGTERM: what is finished is kept, and the same command goes"),
        (after_a_loop(lambda: send(signal.SIGTERM)), 143, "stopped by SIGTERM: all is saved"),
        (after_a_loop(send_twice), 143, "stopped by SIGTERM: all is saved"),  # no second Ctrl-C
        (library, 130, "stopped by SIGINT: what is finished is kept"),
    ],
)
def test_a_stop_is_one_line_and_an_exit_code(work, code, said, capsys):
    with pytest.raises(SystemExit) as caught:
        stoppable(work)()
    assert caught.value.code == code
    assert capsys.readouterr().err.startswith(said)
    assert not issubclass(Stopped, Exception)


def test_a_schedulers_notice_is_passed_on_when_everything_is_saved(capsys):
    """submitit's handler of SIGUSR2 puts the job back into the queue."""
    heard: list[int] = []

    def loop() -> None:
        send(signal.SIGUSR2)
        assert not heard

    signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    with pytest.raises(SystemExit):
        stoppable(after_a_loop(loop))()
    signal.signal(signal.SIGUSR2, signal.default_int_handler)
    assert heard == [signal.SIGUSR2]
    assert "stopped by SIGUSR2: all is saved" in capsys.readouterr().err


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup, or a background job, has it
    with handled():
        send(signal.SIGINT)
        assert not requested()
    signal.signal(signal.SIGINT, signal.default_int_handler)


# ---------------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stop", "steps"), [("after a step", 3), ("within a step", 2), ("in the first step", 0)])
def test_training_saves_the_last_whole_step(stop, steps, tmp_path, monkeypatch):
    run = tiny_run(tmp_path, "sft.max_steps=5", "engine.tokens_per_micro_batch=256")
    whole = base_policy(run)
    wanted, wanted_metrics = weights(whole), metrics(whole)
    shutil.rmtree(whole.folder)
    losses, log = SftTask.losses, Tracker.log
    micro_batches = [0]

    def counting(*arguments: Any, **named: Any) -> Any:
        micro_batches[-1] += 1
        if micro_batches[-1] == 2 and len(micro_batches) == steps + 1 and stop != "after a step":
            send(signal.SIGTERM)
        return losses(*arguments, **named)

    def logging(*arguments: Any) -> None:
        log(*arguments)
        micro_batches.append(0)
        if len(micro_batches) == steps + 1 and stop == "after a step":
            send(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(SftTask, "losses", counting)
        patched.setattr(Tracker, "log", logging)
        with handled(), pytest.raises(Stopped) as caught:
            base_policy(run)
    assert len(micro_batches) == steps + 1
    assert micro_batches[-1] == (0 if stop == "after a step" else 2)  # and not all that the step has
    if steps:
        saved = whole.folder / "checkpoints" / f"step_0000000{steps}.pt"
        assert f"after {steps} of 5 steps; {saved} is saved, and the same command goes on" in str(caught.value)
        assert [line["step"] for line in metrics(whole)] == list(range(1, steps + 1))
    else:
        assert "after 0 of 5 steps, none of them saved; the same command starts again" in str(caught.value)
    assert weights(base_policy(run)) == wanted
    assert metrics(whole) == wanted_metrics


def test_a_stop_while_the_model_is_saved_waits_for_the_manifest(tmp_path, monkeypatch):
    import rdo.stages.training

    run = tiny_run(tmp_path, "sft.max_steps=2")
    save = rdo.stages.training.save_model

    def stopping(*arguments: Any) -> None:
        send(signal.SIGTERM)
        save(*arguments)

    monkeypatch.setattr(rdo.stages.training, "save_model", stopping)
    with handled(), pytest.raises(Stopped, match="is finished"):
        base_policy(run)
    (folder,) = (tmp_path / "sft").iterdir()
    assert is_finished(folder)


STAGES: dict[str, Any] = {
    "score": lambda run: scores(run, "reward", "train", False, None),
    "reference": lambda run: reference(run, mismatched=True),
    "eval": lambda run: evaluate_policy(run, "base"),
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the stages that need a base policy, so that it is made once."""
    return tmp_path_factory.mktemp("interrupts")


@pytest.mark.parametrize("name", STAGES)
def test_finished_shards_are_kept_and_used(name, run_dir, monkeypatch):
    settings = ["rm.max_steps=2", "engine.records_per_shard=8", "eval.batch_size=2", "eval.judges=[gold]"]
    run = tiny_run(run_dir, *settings)
    scorer(run, "reward")
    whole = STAGES[name](run)
    wanted = {file.name: file.read_bytes() for file in whole.folder.iterdir() if file.suffix in (".parquet", ".jsonl")}
    assert wanted
    shutil.rmtree(whole.folder)
    target = "rdo.stages.generate.generate_batch" if name == "generate" else "rdo.stages.run.read_all"
    module, _, attribute = target.rpartition(".")
    function = getattr(sys.modules[module], attribute)
    made: list[int] = []

    def stopping(*arguments: Any) -> Any:
        made.append(len(arguments))
        result = function(*arguments)
        if len(made) == 3:
            send(signal.SIGINT)
        return result

    monkeypatch.setattr(target, stopping)
    with handled(), pytest.raises(Stopped, match=r"3 of \d shards are kept in .*shards; the same command"):
        STAGES[name](run)
    assert len(list((whole.folder / "shards").iterdir())) == 3
    assert STAGES[name](run) == whole
    assert len(made) == {"score": 8, "reference": 4, "eval": 4}[name]
    assert {file: (whole.folder / file).read_bytes() for file in wanted} == wanted
    assert not (whole.folder / "shards").exists()


# ---------------------------------------------------------------------------------------------------------------------
# train.py as a user runs it
# ---------------------------------------------------------------------------------------------------------------------


class Process:
    """train.py in a process of its own."""

    def __init__(self, *overrides: str):
        command = [sys.executable, str(ROOT / "train.py"), *TINY, *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)

    def until(self, text: str) -> str:
        """What it says until something is said, or to its end."""
        said = ""
        assert self.process.stdout is not None
        while text not in said and (line := self.process.stdout.readline()):
            said += line
        return said

    def ends_after(self, number: int) -> tuple[int, list[str]]:
        """Exit code and last lines of a process that gets a signal, as all of its group from a terminal; within
        seconds."""
        os.killpg(self.process.pid, number)
        said, _ = self.process.communicate(timeout=20)
        assert "Traceback" not in said
        return self.process.returncode, [line for line in said.splitlines() if line]


@pytest.fixture
def train() -> Iterator[Callable[..., Process]]:
    """Starts train.py, and ends it with the test."""
    started: list[Process] = []

    def start(*overrides: str) -> Process:
        started.append(Process(*overrides))
        return started[-1]

    yield start
    for process in started:
        process.process.kill()
        process.process.communicate()


LONG = ["stage=sft", "sft.max_steps=60", "sft.epochs=100", "sft.batch_size=16", "engine.checkpoint_every_steps=1000"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_the_same_command_goes_on(number, tmp_path, train):
    whole = base_policy(tiny_run(tmp_path / "whole", *LONG))
    process = train(*LONG, f"run_dir={tmp_path / 'run'}")
    folder = tmp_path / "run" / "sft" / whole.folder.name
    assert "60 steps" in process.until("60 steps")
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.01)
    code, said = process.ends_after(number)
    assert code == 128 + number
    assert said[-1].startswith(f"stopped by {signal.Signals(number).name}: after ")
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert str(checkpoint) in said[-1]
    resumed = base_policy(tiny_run(tmp_path / "run", *LONG))
    assert weights(resumed) == weights(whole)
    assert metrics(resumed) == metrics(whole)


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path, train):
    """All demonstrations are one micro-batch, which takes many seconds."""
    huge = ["dataset.toy.demonstrations=20480", "sft.batch_size=20480", "engine.tokens_per_micro_batch=100000000"]
    process = train("stage=sft", *huge, "sft.epochs=20", f"run_dir={tmp_path}")
    assert "5 steps" in process.until("5 steps")
    time.sleep(0.5)
    os.killpg(process.process.pid, signal.SIGINT)
    assert "stopping where nothing is lost" in process.until("stopping where")
    assert process.ends_after(signal.SIGINT)[0] == 130
    assert not list(tmp_path.rglob("step_*.pt"))


def test_waiting_for_another_run_can_be_stopped(tmp_path, train):
    folder = base_policy(tiny_run(tmp_path, *LONG)).folder
    (folder / "manifest.json").unlink()
    with held(folder):
        process = train(*LONG, f"run_dir={tmp_path}")
        assert f"{folder} is being made by another run; waiting for it" in process.until("waiting for it")
        code, said = process.ends_after(signal.SIGINT)
    assert code == 130
    assert said == ["stopped by SIGINT: what is finished is kept, and the same command goes on"]
