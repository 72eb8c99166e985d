"""Validation: what is measured, the best weights are kept, training stops early, and goes on to the same bits."""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rdo.training.validation
from rdo.checks import compose_config
from rdo.runtime.errors import UserError
from rdo.runtime.stopping import Stopped, handled
from rdo.runtime.store import Artifact
from rdo.stages.align import aligned_policy
from rdo.stages.run import Cache, Run
from rdo.stages.scorer import scorer
from rdo.stages.sft import base_policy
from rdo.tracking import Tracker
from rdo.training.step import training_step
from tiny import TINY, metrics, tiny_run, weights

STAGES: dict[str, tuple[str, Callable[[Run], Artifact], list[str]]] = {
    "sft": ("sft", base_policy, []),
    "rm": ("rm", lambda run: scorer(run, "reward"), []),
    "diffmodel": ("diffmodel", lambda run: scorer(run, "diff"), []),
    "dpo": ("align", aligned_policy, ["loss=dpo", "rc=gold"]),
    "kto": ("align", aligned_policy, ["loss=kto"]),
    "rrhf": ("align", aligned_policy, ["loss=rrhf", "rm.max_steps=2"]),
}
LOSS, ACCURACY = "validation/loss", "validation/accuracy"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all runs, so that inputs are made once."""
    return tmp_path_factory.mktemp("validation")


def made(name: str, run_dir: Path, *settings: str) -> tuple[Run, Callable[[Run], Artifact]]:
    """A run of six steps that validates every two of them, and its stage; `settings` of its section, and `engine.`."""
    section, stage, overrides = STAGES[name]
    own = ["batch_size=8", "epochs=3", "max_steps=6", "validate_every_steps=2", "validation_records=16", *settings]
    named = [text if text.startswith("engine.") else f"{section}.{text}" for text in own]
    return tiny_run(run_dir, *overrides, *named), stage


def validations(artifact: Artifact) -> list[dict[str, Any]]:
    return [line for line in metrics(artifact) if LOSS in line]


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_validates_every_few_steps_and_at_the_end(name: str, run_dir: Path) -> None:
    run, stage = made(name, run_dir, "validate_every_steps=4")
    artifact = stage(run)
    found = validations(artifact)
    assert [line["step"] for line in found] == [4, 6]
    assert all(math.isfinite(line[LOSS]) for line in found)
    assert all((ACCURACY in line) == (name not in ("sft", "rrhf")) for line in found)
    assert found[0][LOSS] != found[1][LOSS]
    results = artifact.manifest()["results"]
    assert results["steps"] == results["last"]["step"] == 6
    assert "loss" in results["last"]


def test_it_changes_nothing_of_the_training(run_dir: Path) -> None:
    run, stage = made("dpo", run_dir)
    without, _ = made("dpo", run_dir, "validate_every_steps=null")
    assert weights(stage(run)) == weights(stage(without))


def test_a_policy_that_has_not_moved_has_the_loss_ln2_on_the_validation_split(run_dir: Path) -> None:
    run, stage = made("dpo", run_dir, "learning_rate=1e-12")
    for line in validations(stage(run)):
        assert [line[LOSS], line[ACCURACY]] == pytest.approx([math.log(2), 0.5], abs=1e-5)


@pytest.mark.parametrize(("name", "by"), [("sft", LOSS), ("dpo", ACCURACY)])
def test_the_best_weights_are_kept_training_stops_early_and_goes_on_to_the_same_bits(
    name: str, by: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a rate at which it gets worse. The weights are those of a shorter run, though older checkpoints go."""
    best = ["learning_rate=0.3", "schedule=constant", "warmup_share=0", f"keep_best={by}"]
    best += ["engine.checkpoint_every_steps=1", "engine.keep_checkpoints=1"]
    run, stage = made(name, run_dir, *best)
    whole = stage(run)
    found = {line["step"]: line[by] * (-1 if by == ACCURACY else 1) for line in validations(whole)}
    step = min(found, key=found.__getitem__)
    assert list(found) == [2, 4, 6]
    assert step < 6
    short, _ = made(name, run_dir, *best, f"max_steps={step}")
    assert weights(whole) == weights(stage(short))

    patient, _ = made(name, run_dir, *best, "patience=1")
    early = stage(patient)
    last = next(n for n in found if n > 2 and found[n] >= min(found[m] for m in found if m < n))
    assert [line["step"] for line in validations(early)] == list(range(2, last + 1, 2))

    for stopped, again in ((whole, run), (early, patient)):
        wanted = weights(stopped), metrics(stopped)
        shutil.rmtree(stopped.folder)
        log = Tracker.log

        def stopping(tracker: Tracker, number: int, values: dict[str, Any], log: Any = log) -> None:
            log(tracker, number, values)
            if number == 4:
                raise InterruptedError

        with monkeypatch.context() as patched:
            patched.setattr(Tracker, "log", stopping)
            with pytest.raises(InterruptedError):
                stage(again)
        assert stage(again) == stopped
        assert (weights(stopped), metrics(stopped)) == wanted


def test_a_stop_within_a_validation_keeps_the_steps_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, stage = made("sft", tmp_path)
    whole = stage(run)
    wanted = weights(whole), metrics(whole)
    shutil.rmtree(whole.folder)

    def stopped(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return training_step(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(rdo.training.validation, "training_step", stopped)
        with handled(), pytest.raises(Stopped, match=r"after 2 of 6 steps; .*step_00000002\.pt is saved"):
            stage(run)
    assert stage(run) == whole
    assert (weights(whole), metrics(whole)) == wanted


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["align.keep_best=validation/loss"], "align.keep_best=validation/loss needs align.validate_every_steps"),
        (["rm.patience=2", "rm.validate_every_steps=5"], "rm.patience=2 needs rm.keep_best"),
        (["sft.validate_every_steps=5", "sft.keep_best=validation/accuracy"], "sft has no accuracy"),
        (["align.validate_every_steps=5", "align.keep_best=validation/accuracy", "loss=rrhf"], "loss=rrhf has no acc"),
    ],
)
def test_what_cannot_be_validated_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        compose_config([*TINY, *settings])


def test_without_a_validation_split_it_is_refused(tmp_path: Path) -> None:
    run, stage = made("sft", tmp_path)
    run.cache = Cache()
    run.splits().splits["validation"] = run.records("validation").only([])
    with pytest.raises(UserError, match="validate_every_steps needs a validation split"):
        stage(run)
