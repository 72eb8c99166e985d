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
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import rdo.stages.run
import rdo.stages.training
import rdo.training.loop
from rdo.runtime.stopping import SIGNALS, Stopped, check, handled, postponed, requested
from rdo.sequences.readout import LogProbability
from rdo.stages.align import aligned_policy
from rdo.stages.score import scores
from rdo.stages.sft import base_policy
from rdo.tracking import Tracker
from rdo.training.tasks import SftTask
from tiny import TINY, is_finished, metrics, tiny_run, weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """SIGINT is heard also where the tests run in the background of a shell, and every handler is left as it was."""
    before = [signal.signal(number, signal.default_int_handler) for number in SIGNALS]
    yield
    assert all(signal.getsignal(number) is signal.default_int_handler for number in SIGNALS)
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def send(number: int) -> None:
    """A signal to this process, handled when the call returns."""
    os.kill(os.getpid(), number)
    time.sleep(0)


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
        # No second Ctrl-C.
        (after_a_loop(lambda: (send(signal.SIGTERM), send(signal.SIGTERM))), 143, "stopped by SIGTERM: all is saved"),
        (library, 130, "stopped by SIGINT: what is finished is kept"),
    ],
)
def test_a_stop_is_one_line_and_an_exit_code(work, code, said, capsys):
    with pytest.raises(SystemExit) as caught, handled():
        work()
    assert caught.value.code == code
    assert capsys.readouterr().err.startswith(said)


def test_a_second_ctrl_c_does_not_wait_for_the_step(monkeypatch, capfd):
    ended: list[int] = []

    def step() -> None:
        send(signal.SIGINT)
        assert "stopping where nothing is lost" in capfd.readouterr().err
        assert not ended
        send(signal.SIGINT)
        assert ended == [130]

    monkeypatch.setattr(os, "_exit", ended.append)
    with pytest.raises(SystemExit), handled():
        after_a_loop(step)()


def test_a_schedulers_notice_is_passed_on_when_everything_is_saved(capsys):
    """submitit's handler of SIGUSR2 puts the job back into the queue and ends the first process; in the others it
    returns, and SLURM would end the job at once if one of them failed."""
    heard: list[int] = []

    def loop() -> None:
        send(signal.SIGUSR2)
        assert not heard

    signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    with pytest.raises(SystemExit) as ended, handled():
        after_a_loop(loop)()
    signal.signal(signal.SIGUSR2, signal.default_int_handler)
    assert (heard, ended.value.code) == ([signal.SIGUSR2], 0)
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


@pytest.mark.parametrize("where", ["reference", "kl", "forward", "backward"])
def test_a_stop_does_not_wait_for_the_end_of_a_micro_batch(where, tmp_path, monkeypatch):
    """It comes in the first of two layers, or when the head's gradient is known: no layer is run, or
    learns, after that. The same command does the step again."""
    run = tiny_run(tmp_path, "loss=kto", "rc=none", "align.batch_size=8")
    whole = aligned_policy(run)
    wanted, wanted_metrics = weights(whole), metrics(whole)
    shutil.rmtree(whole.folder)
    if where == "reference":
        shutil.rmtree(tmp_path / "reference")
    passes: list[str] = []  # that are under way
    ran: list[str] = []  # since the signal

    def within(name: str, works: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **named: (passes.append(name), works(*arguments, **named), passes.pop())[1]

    def part(name: str, works: Callable[..., Any]) -> Callable[..., Any]:
        def run_part(*arguments: Any, **named: Any) -> Any:
            ran.append(name)
            names = {"read_all": "reference", "step": "forward" if torch.is_grad_enabled() else "kl"}
            place = name if name != "layer" else names.get(passes[-1]) if passes else None
            if place == where and not requested():
                send(signal.SIGTERM)
                ran.clear()
            return works(*arguments, **named)

        return run_part

    with monkeypatch.context() as patched:
        patched.setattr(rdo.training.loop, "training_step", within("step", rdo.training.loop.training_step))
        patched.setattr(rdo.stages.run, "read_all", within("read_all", rdo.stages.run.read_all))
        patched.setattr(LlamaDecoderLayer, "forward", part("layer", LlamaDecoderLayer.forward))
        patched.setattr(LogProbability, "backward", staticmethod(part("backward", LogProbability.backward)))
        patched.setattr(rdo.training.loop, "update", lambda *_: pytest.fail("half a gradient is used"))
        with handled(), pytest.raises(Stopped):
            aligned_policy(run)
    assert ran == []
    assert aligned_policy(run) == whole
    assert (weights(whole), metrics(whole)) == (wanted, wanted_metrics)


def test_a_stop_while_the_model_is_saved_waits_for_the_manifest(tmp_path, monkeypatch):
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


def test_finished_shards_are_kept_and_used(tmp_path, monkeypatch):
    run = tiny_run(tmp_path, "rm.max_steps=2", "engine.records_per_shard=8")
    whole = scores(run, "reward", "train", False, None)
    wanted = (whole.folder / "score.parquet").read_bytes()
    shutil.rmtree(whole.folder)
    read_all, made = rdo.stages.run.read_all, []

    def stopping(*arguments: Any) -> Any:
        made.append(read_all(*arguments))
        if len(made) == 3:
            send(signal.SIGINT)
        return made[-1]

    monkeypatch.setattr(rdo.stages.run, "read_all", stopping)
    with handled(), pytest.raises(Stopped, match=r"3 of 8 shards are kept in .*shards; the same command"):
        scores(run, "reward", "train", False, None)
    assert len(list((whole.folder / "shards").iterdir())) == 3
    assert scores(run, "reward", "train", False, None) == whole
    assert len(made) == 8
    assert (whole.folder / "score.parquet").read_bytes() == wanted
    assert not (whole.folder / "shards").exists()


LONG = ["stage=sft", "sft.max_steps=60", "sft.epochs=100", "sft.batch_size=16", "engine.checkpoint_every_steps=1000"]


def test_ctrl_c_saves_a_checkpoint_and_the_same_command_goes_on(tmp_path):
    whole = base_policy(tiny_run(tmp_path / "whole", *LONG))
    folder = tmp_path / "run" / "sft" / whole.folder.name
    command = [sys.executable, str(ROOT / "train.py"), *TINY, *LONG, f"run_dir={tmp_path / 'run'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (folder / "metrics.jsonl").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert "Traceback" not in said
    (checkpoint,) = (folder / "checkpoints").iterdir()
    last = said.splitlines()[-1]
    assert last.startswith("stopped by SIGINT: after ")
    assert str(checkpoint) in last
    resumed = base_policy(tiny_run(tmp_path / "run", *LONG))
    assert weights(resumed) == weights(whole)
    assert metrics(resumed) == metrics(whole)
