"""A full disk costs a checkpoint, or waiting: nothing that was saved is lost, and a run ends as it would have."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import rdo.checkpoints
import rdo.files
import rdo.stages.training
from engines import save_when_due, torch_engine
from rdo.artifacts import Provenance, is_finished, produce
from rdo.checkpoints import Checkpoints
from rdo.errors import UserError
from rdo.files import DiskFull, Sealing, append_text, patiently, replace_file, replace_folder, write_errors
from rdo.interrupts import Stopped, handled
from rdo.schema import EngineConfig
from rdo.stages.reference import reference
from rdo.stages.sft import base_policy
from rdo.tracking import METRICS
from tiny import tiny_run, weights

torch.set_num_threads(1)


def full(number: int = errno.ENOSPC) -> OSError:
    return OSError(number, os.strerror(number))


class Disk:
    """Stands in for writes to a disk that is full from one write on, for so many writes."""

    def __init__(self, function: Callable[..., Any], start: int, count: int, said: Callable[[], Exception] = full):
        self.function, self.start, self.end, self.said, self.calls = function, start, start + count, said, 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.start <= self.calls < self.end:
            raise self.said()
        return self.function(*arguments)

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        return lambda *arguments: self(instance, *arguments)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries come one after the other."""
    monkeypatch.setattr(rdo.files, "RETRY_SECONDS", 0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        full(errno.ENOSPC),
        full(errno.EDQUOT),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # as tokenizers have it
    ],
)
def test_a_full_disk_is_told_from_other_errors_and_names_the_file(error, tmp_path):

    def write() -> None:
        with replace_file(tmp_path / "model.bin") as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(DiskFull, match=r"model\.bin cannot be written: .*(space|quota).* MiB free"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_torch_and_parquet_say_that_the_disk_is_full(tmp_path):
    """The error that names the reason is somewhere behind the one that the library raises."""
    for fails_at in (1, 2, 5):
        disk = Disk(lambda *_: 1000, fails_at, 100)
        with pytest.raises(DiskFull), write_errors(tmp_path):
            torch.save({"a": torch.zeros(1000), "b": torch.zeros(1000)}, type("File", (), {"write": disk})())


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO])
def test_what_the_system_refuses_is_one_line_that_names_the_path(number, tmp_path):
    reason = os.strerror(number).lower()
    for writing in (replace_file, replace_folder, write_errors):
        with (
            pytest.raises(UserError, match=f"model cannot be written: {reason}") as caught,
            writing(tmp_path / "model"),
        ):
            raise full(number)
        assert not isinstance(caught.value, DiskFull)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="other"), replace_file(tmp_path / "model"):
        raise OSError("other")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(tmp_path):
    (tmp_path / "sft").mkdir(mode=0o555)
    with pytest.raises(UserError, match="cannot be written: permission denied"):
        base_policy(tiny_run(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Waiting for room
# ---------------------------------------------------------------------------------------------------------------------


def no_room() -> DiskFull:
    return DiskFull("it cannot be written")


def out_of_room() -> None:
    with write_errors(Path("model.bin")):
        raise full()


def test_waiting_ends_with_the_room(capsys):
    disk = Disk(lambda: "written", 1, 3)

    def write() -> str:
        with write_errors(Path("model.bin")):
            return disk()

    assert patiently(write, 1.0) == "written"
    assert disk.calls == 4
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "model.bin cannot be written: no space left on device (" in lines[0]
    assert "make room: it is tried again for 1 more minutes" in lines[0]


@pytest.mark.parametrize("minutes", [0.0, 0.0005])
def test_waiting_ends_with_the_time(minutes):
    with pytest.raises(UserError, match=r"after .* minutes \(engine\.disk_full_minutes\).*the same command goes on"):
        patiently(out_of_room, minutes)


def test_waiting_ends_with_a_signal():
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Stopped), handled():
        patiently(out_of_room, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and metrics
# ---------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_for_which_there_is_no_room_costs_no_other(tmp_path, monkeypatch, capsys):
    engine = torch_engine()
    checkpoints = Checkpoints(tmp_path, EngineConfig(checkpoint_every_steps=1, keep_checkpoints=2))
    for step in (1, 2, 3):
        save_when_due(checkpoints, step, engine)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(before) == 2
    disk = Disk(Sealing.write, 5, 10**6)
    with monkeypatch.context() as patched:
        patched.setattr(Sealing, "write", disk)
        save_when_due(checkpoints, 4, engine)
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
        said = capsys.readouterr().err
        assert "step_00000004.pt cannot be written: no space left on device" in said
        assert "MiB free" in said
        assert f"the last good checkpoint is {tmp_path / 'step_00000003.pt'}" in said
        calls = disk.calls
        save_when_due(checkpoints, 5, engine)  # at most once a minute
        assert disk.calls == calls
        assert capsys.readouterr().err == ""
    save_when_due(checkpoints, 6, engine)
    assert len(list(tmp_path.iterdir())) == 2
    checkpoints.retry_at -= 60
    save_when_due(checkpoints, 7, engine)
    assert [file.name for file in checkpoints.files()] == ["step_00000003.pt", "step_00000007.pt"]
    assert "there is room again" in capsys.readouterr().out


def test_what_a_disk_took_before_it_said_that_it_was_full_is_not_there_twice(tmp_path):
    """Network disks may say so when a file is closed."""
    file = tmp_path / METRICS
    end = append_text(file, "1\n", None)
    file.write_text("1\n2")  # what a failed close may leave
    assert append_text(file, "2\n", end) == 4
    assert file.read_text() == "1\n2\n"


# ---------------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------------


def test_a_model_for_which_no_room_is_made_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    settings = ("sft.max_steps=4", "engine.checkpoint_every_steps=1", "engine.disk_full_minutes=0")
    whole = base_policy(tiny_run(tmp_path / "whole", *settings))
    run = tiny_run(tmp_path / "run", *settings)
    with monkeypatch.context() as patched:
        patched.setattr(rdo.stages.training, "save_model", lambda *_: out_of_room())
        with pytest.raises(UserError, match="what was saved before is kept, and the same command goes on from there"):
            base_policy(run)
    folder = tmp_path / "run" / "sft" / whole.folder.name
    assert (folder / "checkpoints" / "step_00000003.pt").exists()
    assert not is_finished(folder)
    assert weights(base_policy(run)) == weights(whole)


def test_shards_wait_for_room(tmp_path, monkeypatch):
    run = tiny_run(tmp_path, "engine.records_per_shard=8")
    base_policy(run)
    wanted = (reference(run, mismatched=True).folder / "reference.parquet").read_bytes()
    (folder,) = (tmp_path / "reference").iterdir()
    shutil.rmtree(folder)
    disk = Disk(Sealing.write, 2, 3)
    monkeypatch.setattr(Sealing, "write", disk)
    assert (reference(run, mismatched=True).folder / "reference.parquet").read_bytes() == wanted
    assert disk.calls == 4 + 3


def test_the_holders_note_is_not_worth_a_run(tmp_path, monkeypatch):
    notes = Disk(rdo.files.write_json, 1, 1, no_room)
    monkeypatch.setattr(rdo.files, "write_json", notes)
    made = produce(Provenance(tmp_path, "python train.py", {}), "rm", "pointwise", {}, {}, lambda _: {})
    assert is_finished(made.folder)
    assert notes.calls == 1


# ---------------------------------------------------------------------------------------------------------------------
# A real disk that is full
# ---------------------------------------------------------------------------------------------------------------------

NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000
NOT_ALLOWED = 77


def mount(folder: Path, size: str) -> bool:
    """Puts a disk of its own memory at a folder, seen by this process alone; whether the system allows that."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(NEW_USER | NEW_MOUNTS if user else NEW_MOUNTS):
        return False
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    libc.mount(b"none", b"/", None, ctypes.c_ulong(0x4000 | 0x40000), None)  # private, and all below it
    return not libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", ctypes.c_ulong(0), f"size={size}".encode())
