"""A run that is stopped goes on from its last checkpoint and ends exactly as if it had not been stopped."""

import os
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import torch_engine
from rdo.runtime.errors import UserError
from rdo.runtime.store import Artifact
from rdo.settings import EngineConfig
from rdo.stages.align import aligned_policy
from rdo.stages.run import Run
from rdo.stages.scorer import scorer
from rdo.stages.sft import base_policy
from rdo.tracking import Tracker
from rdo.training.engine import Checkpoints
from tiny import is_finished, metrics, tiny_run, weights

OFTEN = "engine.checkpoint_every_steps=2"
ALIGN = ["align.batch_size=8", "align.epochs=2", "align.max_steps=7", "align.learning_rate=1e-3"]
SCORER = ["batch_size=16", "epochs=2", "max_steps=7", "schedule=linear"]

RUNS: dict[str, tuple[Callable[[Run], Artifact], list[str]]] = {
    "sft": (base_policy, ["sft.max_steps=7", "sft.batch_size=48"]),  # the last batch of an epoch is smaller
    "rm": (lambda run: scorer(run, "reward"), [f"rm.{setting}" for setting in SCORER]),
    "diffmodel": (lambda run: scorer(run, "diff"), [f"diffmodel.{setting}" for setting in SCORER]),
    "dpo": (aligned_policy, ["loss=dpo", "rc=gold", *ALIGN]),
    "kto": (aligned_policy, ["loss=kto", "rc=none", *ALIGN]),
    "rrhf": (aligned_policy, ["loss=rrhf", "loss.ranking=scores", "rc=none", "align.min_responses=6", *ALIGN]),
}


class Stopped(Exception):
    """Stands in for whatever ends a process."""


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> list[int]:
    """Ends a run once it has logged a step; lists the steps that are logged from now on."""
    logged: list[int] = []
    log = Tracker.log

    def stopping(tracker: Tracker, number: int, values: dict[str, Any]) -> None:
        log(tracker, number, values)
        logged.append(number)
        if number == step and len(logged) == step:
            raise Stopped

    monkeypatch.setattr(Tracker, "log", stopping)
    return logged


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all runs, so that inputs are made once."""
    return tmp_path_factory.mktemp("resume")


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_ends_as_an_uninterrupted_one(name, run_dir, monkeypatch):
    stage, overrides = RUNS[name]
    run = tiny_run(run_dir, OFTEN, *overrides)
    whole = stage(run)
    wanted, wanted_metrics = weights(whole), metrics(whole)
    assert [line["step"] for line in wanted_metrics] == list(range(1, 8))
    # The last measures follow from everything before them, so the losses must have moved.
    assert wanted_metrics[0]["loss"] != wanted_metrics[6]["loss"]
    shutil.rmtree(whole.folder)

    logged = stop_after(monkeypatch, 5)
    with pytest.raises(Stopped):
        stage(run)
    assert not is_finished(whole.folder)
    assert [line["step"] for line in metrics(whole)] == [1, 2, 3, 4, 5]
    saved = [file.name for file in (whole.folder / "checkpoints").iterdir()]
    assert sorted(saved) == ["step_00000002.pt", "step_00000004.pt"]

    torch.manual_seed(99)  # another process has other random numbers
    again = stage(run)
    assert logged == [1, 2, 3, 4, 5, 5, 6, 7]
    assert again == whole
    assert weights(again) == wanted
    assert metrics(again) == wanted_metrics
    assert not (whole.folder / "checkpoints").exists()


@pytest.mark.parametrize("where", ["rdo.stages.training.save_model", "rdo.runtime.store.library_versions"])
def test_a_run_that_is_stopped_after_training_does_not_train_again(where, run_dir, monkeypatch):
    """Between the last step and the manifest: the last checkpoint serves, and the result is the same."""
    run = tiny_run(run_dir, OFTEN, "sft.max_steps=4")
    whole = base_policy(run)
    wanted = weights(whole)
    shutil.rmtree(whole.folder)
    with monkeypatch.context() as patched:
        patched.setattr(where, lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            base_policy(run)
    logged = stop_after(monkeypatch, -1)
    assert weights(base_policy(run)) == wanted
    assert logged == [3, 4]


def save_when_due(checkpoints: Checkpoints, steps: Iterable[int]) -> None:
    """What the training loop does after steps that are not the last."""
    for step in filter(checkpoints.is_due, steps):
        checkpoints.save(step, torch_engine())


@pytest.mark.parametrize(("keep", "kept"), [(1, [8]), (3, [4, 6, 8])])
def test_checkpoints_are_saved_every_few_steps_and_only_the_last_are_kept(tmp_path, keep, kept):
    checkpoints = Checkpoints(tmp_path / "checkpoints", EngineConfig(checkpoint_every_steps=2, keep_checkpoints=keep))
    save_when_due(checkpoints, range(1, 10))
    assert [file.name for file in checkpoints.files()] == [f"step_{step:08d}.pt" for step in kept]


def test_a_checkpoint_is_saved_when_enough_minutes_have_passed(tmp_path):
    config = EngineConfig(checkpoint_every_steps=1000, checkpoint_every_minutes=1.0)
    checkpoints = Checkpoints(tmp_path / "checkpoints", config)
    checkpoints.last_saved -= 61
    save_when_due(checkpoints, [2, 3])
    assert [file.name for file in checkpoints.files()] == ["step_00000002.pt"]


# ---------------------------------------------------------------------------------------------------------------------
# Damaged checkpoints
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> tuple[Checkpoints, dict[int, dict[str, torch.Tensor]]]:
    """Checkpoints of three steps, and the weights of each."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", EngineConfig(checkpoint_every_steps=1, keep_checkpoints=3))
    states = {}
    for step in (1, 2, 3):
        engine = torch_engine()
        checkpoints.save(step, engine)
        states[step] = engine.model.state_dict()
    return checkpoints, states


def restored(checkpoints: Checkpoints) -> tuple[int, dict[str, torch.Tensor]]:
    """The step that a run goes on from, and its weights."""
    engine = torch_engine()
    step = checkpoints.restore(engine)
    return step, engine.model.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_no_flipped_bit_goes_unnoticed(saved, capsys):
    """Either the checkpoint before is taken, and that is said, or the bit has no meaning."""
    checkpoints, states = saved
    last = checkpoints.files()[-1]
    data = last.read_bytes()
    draw = random.Random(0)
    found = 0
    for place in [*draw.sample(range(len(data)), 200), *range(len(data) - 200, len(data))]:
        last.write_bytes(data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :])
        step, weights = restored(checkpoints)
        assert same(weights, states[step])
        assert (f"warning: {last} is damaged (" in capsys.readouterr().err) == (step == 2)
        found += step == 2
    assert found > 100
    last.write_bytes(data)
    assert restored(checkpoints)[0] == 3


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "tail", "folder"])
def test_checkpoints_that_are_no_longer_whole_are_left_out_aloud(damage, count, saved, capsys):
    """The newest, or all: then training starts again."""
    checkpoints, _ = saved
    for file in checkpoints.files()[-count:]:
        data = file.read_bytes()
        if damage == "folder":
            file.unlink()
            file.mkdir()
        else:
            broken = {"cut": data[: len(data) // 2], "empty": b"", "garbage": os.urandom(5000), "tail": data[-24:]}
            file.write_bytes(broken[damage])
    assert restored(checkpoints)[0] == 3 - count
    said = capsys.readouterr().err
    assert all(f"{file} is damaged ({file.name}: " in said for file in checkpoints.files()[-count:])


def test_a_damaged_checkpoint_never_displaces_a_good_one(tmp_path):
    """It has the highest step, and the ones that are kept are the highest."""
    checkpoints = Checkpoints(tmp_path, EngineConfig(checkpoint_every_steps=1, keep_checkpoints=1))
    checkpoints.save(4, torch_engine())
    (tmp_path / "step_00000009.pt").write_bytes(b"garbage")
    assert restored(checkpoints)[0] == 4
    checkpoints.save(5, torch_engine())
    assert [file.name for file in checkpoints.files()] == ["step_00000005.pt"]
    assert restored(checkpoints)[0] == 5


def test_a_checkpoint_of_another_model_is_one_clear_error(tmp_path):
    checkpoints = Checkpoints(tmp_path, EngineConfig())
    checkpoints.save(4, torch_engine())
    with pytest.raises(UserError, match=r"(?s)another model .*size mismatch for weight.*; delete .*: the same"):
        checkpoints.restore(torch_engine(3))
    grouped = torch_engine(groups=lambda model: [{"params": [model.weight]}, {"params": [model.bias]}])
    with pytest.raises(UserError, match="another model"):
        checkpoints.restore(grouped)
