"""Ctrl-C and SIGTERM: the first stops where nothing is lost and says so, a second Ctrl-C stops at once."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rdo import interrupts
from rdo.artifacts import Provenance, is_finished, produce
from rdo.checkpoints import Checkpoints
from rdo.files import DiskFull
from rdo.interrupts import Stopped, check, handled, postponed, requested, stoppable, wait
from rdo.stages.eval import evaluate_policy
from rdo.stages.reference import reference
from rdo.stages.score import scores
from rdo.stages.scorer import scorer
from rdo.stages.sft import base_policy
from rdo.tasks import SftTask
from rdo.tracking import Tracker
from tiny import TINY, metrics, tiny_run, weights

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """SIGINT is heard also where the tests run in the background of a shell, and every handler is left as it was."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in interrupts.SIGNALS}
    yield
    assert all(signal.getsignal(number) is signal.default_int_handler for number in interrupts.SIGNALS)
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    """A signal to this process, handled when the call returns."""
    os.kill(os.getpid(), number)
    time.sleep(0)


# ---------------------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------------------


def test_a_schedulers_notice_is_passed_on_when_everything_is_saved(capsys):
    """submitit's handler of SIGUSR2 puts the job back into the queue."""
    heard = []

    @interrupts.stoppable
    def work() -> None:
        with postponed():
            send(signal.SIGUSR2)
            assert requested()
            assert not heard
        check("all is saved")

    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        with pytest.raises(SystemExit):
            work()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [signal.SIGUSR2]
    assert "stopped by SIGUSR2: all is saved" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_outside_of_postponed_work_the_first_signal_ends_it_at_once(number, code):
    assert not issubclass(Stopped, Exception)
    with pytest.raises(Stopped, match="the same command goes on") as caught, handled():
        send(number)
    assert caught.value.exit_code == code
    assert not requested()


def test_postponed_work_goes_on_until_it_asks(capfd):
    done = []
    with handled():
        with postponed():
            send(signal.SIGTERM)
            assert requested()
            done.append("the step")
        done.append("what is between two loops")
        with pytest.raises(Stopped, match="stopped by SIGTERM: all is well"):
            check("all is well")
    assert done == ["the step", "what is between two loops"]
    assert "stopping where nothing is lost" in capfd.readouterr().err


def test_a_repeated_sigterm_is_no_second_ctrl_c():
    with handled(), postponed():
        for _ in range(3):
            send(signal.SIGTERM)
        assert requested()


def test_waiting_ends_when_asked_to_stop():
    started = time.monotonic()
    with handled(), postponed():
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(Stopped):
            wait(30)
    assert time.monotonic() - started < 5


def test_what_is_ignored_stays_ignored_and_other_signals_are_left_alone():
    others = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup, or a background job, has it
    with handled():
        send(signal.SIGINT)
        assert not requested()
        assert [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)] == others
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_in_another_thread_nothing_is_installed():
    found: list[Any] = []

    def work() -> None:
        with handled():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def in_child(work: Callable[[], Any], *numbers: int) -> tuple[int, str]:
    """Exit code and standard error of work in a forked child that gets these signals, each when it has written a
    line."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 2)
        os.close(read)
        os.close(write)
        sys.stdout = sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        code = 1
        try:
            work()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    said = b""
    for number in numbers:
        while not said.endswith(b"\n"):
            byte = os.read(read, 1)
            assert byte, said
            said += byte
        os.kill(child, number)
        said += os.read(read, 1)
    with os.fdopen(read, "rb") as rest:
        said += rest.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.decode()


def test_a_second_ctrl_c_stops_at_once():
    def stubborn() -> None:
        with handled(), postponed():
            os.write(2, b"working\n")
            while True:
                time.sleep(0.01)

    started = time.monotonic()
    code, said = in_child(stubborn, signal.SIGINT, signal.SIGINT)
    assert code == 130
    assert said.split("\n") == [
        "working", "", "stopping where nothing is lost; Ctrl-C (once more) stops at once", "", "stopped at once", ""
    ]  # fmt: skip
    assert time.monotonic() - started < 10


def test_a_worker_process_dies_without_a_word_of_ours():
    def parent() -> None:
        with handled():
            code, said = in_child(lambda: (os.write(2, b"worker\n"), time.sleep(30)), signal.SIGTERM)
            assert (code, said) == (-signal.SIGTERM, "worker\n")
            assert not requested()

    assert in_child(parent) == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux' prctl")
def test_a_worker_process_does_not_outlive_a_parent_that_is_killed():
    def parent() -> None:
        with handled():
            worker = os.fork()
            if worker:
                os.write(2, f"{worker}\n".encode())
            time.sleep(60)
            os._exit(0)

    started = time.monotonic()
    code, said = in_child(parent, signal.SIGKILL)  # which waits until the worker has closed the pipe, too
    assert time.monotonic() - started < 30
    assert code == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while alive(int(said)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(int(said))


def alive(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def test_a_stop_is_one_line_and_an_exit_code(capsys):
    @stoppable
    def work() -> None:
        send(signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        work()
    assert caught.value.code == 143
    assert capsys.readouterr().err == (
        "stopped by SIGTERM: what is finished is kept, and the same command goes on\n"
    )  # fmt: skip


def test_what_a_library_makes_of_a_stop_is_a_stop_all_the_same(capsys):
    """`datasets` waits for its processes in a `finally`, whose own error replaces ours."""

    @stoppable
    def work() -> None:
        try:
            send(signal.SIGINT)
        finally:
            raise TimeoutError

    with pytest.raises(SystemExit) as caught:
        work()
    assert caught.value.code == 130
    assert capsys.readouterr().err.startswith("stopped by SIGINT")


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


def test_a_stop_on_a_full_disk_names_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    run = tiny_run(tmp_path, "sft.max_steps=5", "engine.checkpoint_every_steps=2")
    log, save = Tracker.log, Checkpoints.save

    def logging(tracker: Tracker, step: int, values: dict[str, Any]) -> None:
        log(tracker, step, values)
        if step == 3:
            send(signal.SIGTERM)

    def saving(checkpoints: Checkpoints, step: int, *parts: Any) -> None:
        if step == 3:
            raise DiskFull("there is no room")
        save(checkpoints, step, *parts)

    monkeypatch.setattr(Tracker, "log", logging)
    monkeypatch.setattr(Checkpoints, "save", saving)
    with handled(), pytest.raises(Stopped, match=r"after 3 of 5 steps; .*/step_00000002\.pt is saved, and the same"):
        base_policy(run)
    assert "warning: there is no room" in capsys.readouterr().err


def test_a_stop_while_the_model_is_saved_waits_for_the_manifest(tmp_path, monkeypatch):
    import rdo.stages.training

    run = tiny_run(tmp_path, "sft.max_steps=2")
    save = rdo.stages.training.save_model

    def stopping(*arguments: Any) -> None:
        send(signal.SIGTERM)
        save(*arguments)

    monkeypatch.setattr(rdo.stages.training, "save_model", stopping)
    with handled(), pytest.raises(Stopped, match="is finished") as caught:
        base_policy(run)
    assert caught.value.exit_code == 143
    (folder,) = (tmp_path / "sft").iterdir()
    assert is_finished(folder)


STAGES: dict[str, Any] = {
    "score": lambda run: scores(run, "reward", "train", False, None),
    "reference": lambda run: reference(run, mismatched=True),
    "eval": lambda run: evaluate_policy(run, "base"),
}
READS = {"score": "rdo.stages.score.read_under", "reference": "rdo.stages.reference.read_under"}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the stages that need a base policy, so that it is made once."""
    return tmp_path_factory.mktemp("interrupts")


@pytest.mark.parametrize("name", STAGES)
def test_finished_shards_are_kept_and_used(name, run_dir, monkeypatch):
    settings = ["rm.max_steps=2", "engine.records_per_shard=8", "eval.batch_size=2", "eval.judges=[oracle]"]
    run = tiny_run(run_dir, *settings)
    scorer(run, "reward")
    whole = STAGES[name](run)
    wanted = {file.name: file.read_bytes() for file in whole.folder.iterdir() if file.suffix in (".parquet", ".jsonl")}
    assert wanted
    shutil.rmtree(whole.folder)
    target = READS.get(name, "rdo.generation.generate_batch")
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
    with handled(), pytest.raises(Stopped, match=r"3 of \d shards are kept in .*shards; the same command") as caught:
        STAGES[name](run)
    assert caught.value.exit_code == 130
    assert len(list((whole.folder / "shards").iterdir())) == 3
    assert STAGES[name](run) == whole
    assert len(made) == {"score": 8, "reference": 4, "eval": 4}[name]
    assert {file: (whole.folder / file).read_bytes() for file in wanted} == wanted
    assert not (whole.folder / "shards").exists()


def test_waiting_for_another_run_can_be_stopped(tmp_path):
    def make() -> None:
        produce(Provenance(tmp_path, "python train.py seed=0", {}), "rm", "pointwise", {}, {}, lambda _: time.sleep(60))

    holding = os.fork()
    if not holding:
        try:
            make()
        finally:
            os._exit(1)
    while not list(tmp_path.glob("rm/*/.holder.json")):
        time.sleep(0.01)
    code, said = in_child(stoppable(make), signal.SIGINT)
    os.kill(holding, signal.SIGKILL)
    os.waitpid(holding, 0)
    assert code == 130
    waiting, stopped = said.splitlines()
    assert f"is being made by process {holding} on {platform.node()} since 2" in waiting
    assert "(python train.py seed=0); waiting for it" in waiting
    assert stopped.startswith("stopped by SIGINT")


# ---------------------------------------------------------------------------------------------------------------------
# train.py as a user runs it
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def train() -> Iterator[Callable[..., tuple[subprocess.Popen[str], Callable[[str], str]]]]:
    """Starts train.py in a process of its own; that, and a function that reads what it says until something is said."""
    started: list[subprocess.Popen[str]] = []

    def start(*overrides: str) -> tuple[subprocess.Popen[str], Callable[[str], str]]:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *TINY, *overrides],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)

        def until(text: str) -> str:
            said = ""
            assert process.stdout is not None
            while text not in said and (line := process.stdout.readline()):
                said += line
            return said

        return process, until

    yield start
    for process in started:
        process.kill()
        process.communicate()


LONG = ["stage=sft", "sft.max_steps=60", "sft.epochs=100", "sft.batch_size=16", "engine.checkpoint_every_steps=1000"]


def test_ctrl_c_saves_a_checkpoint_and_the_same_command_goes_on(tmp_path, train):
    whole = base_policy(tiny_run(tmp_path / "whole", *LONG))
    process, until = train(*LONG, f"run_dir={tmp_path / 'run'}")
    folder = tmp_path / "run" / "sft" / whole.folder.name
    assert "60 steps" in until("60 steps")
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    said = until("never said").splitlines()
    assert process.wait() == 130
    assert time.monotonic() - started < 20
    assert [line for line in said if line][-1].startswith("stopped by SIGINT: after ")
    assert "Traceback" not in "".join(said)
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert str(checkpoint) in said[-1]
    resumed = base_policy(tiny_run(tmp_path / "run", *LONG))
    assert weights(resumed) == weights(whole)
    assert metrics(resumed) == metrics(whole)


def test_sigterm_before_training_stops_at_once(tmp_path, train):
    """The toy world is made when its configuration is checked, and said when it is there."""
    process, until = train("stage=sft", "dataset.toy.demonstrations=400000", f"run_dir={tmp_path}")
    wait_for_handler(process)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    said = until("never said")
    assert process.wait() == 143
    assert said == "stopped by SIGTERM: what is finished is kept, and the same command goes on\n"
    assert time.monotonic() - started < 20


def wait_for_handler(process: subprocess.Popen[str]) -> None:
    """Until the process handles SIGTERM itself."""
    mask = 1 << (signal.SIGTERM - 1)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        (caught,) = (line for line in status.splitlines() if line.startswith("SigCgt"))
        if int(caught.split()[1], 16) & mask:
            return
        time.sleep(0.01)


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path, train):
    """All demonstrations are one micro-batch, which takes many seconds."""
    huge = ["dataset.toy.demonstrations=20480", "sft.batch_size=20480", "engine.tokens_per_micro_batch=100000000"]
    process, until = train("stage=sft", *huge, "sft.epochs=20", f"run_dir={tmp_path}")
    assert "5 steps" in until("5 steps")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert "stopping where nothing is lost" in until("stopping where")
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert "stopped at once" in until("stopped at once")
    assert process.wait() == 130
    assert time.monotonic() - started < 10
    assert not list(tmp_path.rglob("step_*.pt"))
