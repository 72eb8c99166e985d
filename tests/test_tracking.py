"""Metrics: a JSON-lines file of every run, and an offline wandb run where nobody is logged in."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import wandb
from filelock import FileLock

from rdo import distributed, tracking
from rdo.files import read_json, read_json_lines
from rdo.interrupts import Stopped
from rdo.schema import TrackerConfig
from rdo.stages.sft import base_policy
from rdo.tracking import METRICS, Tracker, wandb_run
from rdo.tracking.publish import LOCK
from rdo.tracking.wandb_run import last_step, run_id
from tiny import metrics, tiny_run
from tracked import SHORT, Logged, read_run, the_run, tracked_runs

RUN = """
import sys
from pathlib import Path
from rdo.schema import TrackerConfig
from rdo.tracking import Tracker

with Tracker(TrackerConfig("wandb", "own", "group"), Path(sys.argv[1]), "a name", {"align": {"epochs": 3}}) as tracker:
    for step in (1, 2):
        tracker.log(step, {"loss": step / 8})
"""


def test_without_a_tracker_the_metrics_are_a_file_and_nothing_else(tmp_path):
    with Tracker(TrackerConfig(), tmp_path, "a run", {}) as tracker:
        tracker.log(1, {"loss": 0.5})
        tracker.log(2, {"loss": 0.25})
    assert read_json_lines(tmp_path / METRICS) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    assert [file.name for file in tmp_path.iterdir()] == [METRICS]
    assert tracker.run is None


@pytest.mark.parametrize(("done", "kept"), [(0, []), (2, [1, 2]), (9, [1, 2, 3])])
def test_resuming_drops_the_steps_after_the_checkpoint(tmp_path, done, kept):
    tracker = Tracker(TrackerConfig(), tmp_path, "a run", {})
    tracker.resume(done)  # before there is a file
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 0.5})
    tracker.resume(done)
    assert [line["step"] for line in read_json_lines(tmp_path / METRICS)] == kept


def test_resuming_drops_a_line_that_a_crash_cut_short(tmp_path):
    """A full disk or a power cut may leave half a line; the steps before it stand."""
    tracker = Tracker(TrackerConfig(), tmp_path, "a run", {})
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 0.5})
    text = (tmp_path / METRICS).read_text()
    (tmp_path / METRICS).write_text(text[:-9])
    tracker.resume(2)
    tracker.log(3, {"loss": 0.125})
    assert read_json_lines(tmp_path / METRICS)[1:] == [{"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.125}]


@pytest.mark.parametrize("damage", [b"\0" * 40, b'{"step": "x"}\n', b"\xff\xfe\n", b'{"step": 3, "loss": 1}\n{"st'])
def test_resuming_drops_what_is_no_line_and_what_stands_twice(tmp_path, damage):
    """A power cut may leave anything behind what was brought to the disk with the checkpoint."""
    tracker = Tracker(TrackerConfig(), tmp_path, "a run", {})
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 0.5})
    text = (tmp_path / METRICS).read_bytes()
    (tmp_path / METRICS).write_bytes(text + damage)
    tracker.resume(3)
    assert (tmp_path / METRICS).read_bytes() == text
    tracker.log(4, {"loss": 0.5})
    assert [line["step"] for line in read_json_lines(tmp_path / METRICS)] == [1, 2, 3, 4]


def test_lost_lines_are_said(tmp_path, capsys):
    tracker = Tracker(TrackerConfig(), tmp_path, "a run", {})
    for step in (1, 4):
        tracker.log(step, {"loss": 0.5})
    tracker.resume(4)
    assert "metrics.jsonl lacks 2 of the 4 steps up to the checkpoint" in capsys.readouterr().err


def test_wandb_runs_offline_without_a_login_and_without_asking(tmp_path):
    folder = tmp_path / "align-123"
    folder.mkdir()
    bare = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder)],
        env=bare,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 30  # nothing waited for a network
    assert "(1)" not in done.stdout + done.stderr  # the menu of `wandb login`
    assert read_json_lines(folder / METRICS) == [{"step": 1, "loss": 0.125}, {"step": 2, "loss": 0.25}]
    logged = read_run(folder)
    assert [(step["global_step"], step["loss"]) for step in logged.steps] == [(1, 0.125), (2, 0.25)]
    named = {"project": "own", "run_group": "group", "display_name": "a name", "job_type": tmp_path.name}
    assert logged.facts == {**named, "run_id": run_id(folder)}
    assert logged.config["align"] == {"epochs": 3}
    assert logged.exit_codes == [0]


# ---------------------------------------------------------------------------------------------------------------------
# Whatever happens to the process, wandb gets every step once
# ---------------------------------------------------------------------------------------------------------------------

WANDB = TrackerConfig("wandb")
# A training run that kills itself when it has logged its fifth step; it saves a checkpoint at every second.
KILLED = """
import os, signal, sys
from pathlib import Path
from rdo.stages.sft import base_policy
from rdo.tracking import Tracker
from tiny import tiny_run

log = Tracker.log
def killing(tracker, step, values):
    log(tracker, step, values)
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
Tracker.log = killing
base_policy(tiny_run(Path(sys.argv[1]), *sys.argv[2:]))
"""


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def wandb_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.parent.name)


def global_steps(logged: Logged) -> list[int]:
    return [step["global_step"] for step in logged.steps]


def stage_folder(run_dir: Path) -> Path:
    folder = run_dir / "align" / "dpo-none-123"
    folder.mkdir(parents=True)
    return folder


def log_until(folder: Path, last: int, end: Exception) -> None:
    """A run that logs so many steps and ends with an error."""

    def run() -> None:
        with Tracker(WANDB, folder, "a run", {}) as tracker:
            for step in range(1, last + 1):
                tracker.log(step, {"loss": step / 8})
            raise end

    with pytest.raises(type(end)):
        run()


def test_a_killed_run_goes_on_in_its_curve(tmp_path, offline):
    """A kill takes from wandb what it had not written yet, steps of before the checkpoint among it."""
    overrides = ["tracker=wandb", "engine.checkpoint_every_steps=2", "sft.max_steps=7"]
    paths = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), *overrides],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    artifact = base_policy(tiny_run(tmp_path, *overrides))
    assert [line["step"] for line in metrics(artifact)] == [1, 2, 3, 4, 5, 6, 7]
    logged = read_run(artifact.folder)
    assert len(wandb_files(artifact.folder)) == 3  # the killed one, the one that went on, and what came at the end
    assert global_steps(logged) == [1, 2, 3, 4, 5, 6, 7]
    assert [step["_step"] for step in logged.steps] == [1, 2, 3, 4, 5, 6, 7]
    assert [step["loss"] for step in logged.steps] == [line["loss"] for line in metrics(artifact)]


def test_steps_that_a_kill_took_from_wandb_are_logged_again(tmp_path, offline, monkeypatch):
    folder = stage_folder(tmp_path)
    log_until(folder, 5, Stopped(signal.SIGTERM))
    wandb.teardown()
    cut_after_step(wandb_files(folder)[0], folder, 2)
    monkeypatch.setattr(wandb_run, "_reached", {})  # another process
    with Tracker(WANDB, folder, "a run", {}) as tracker:
        tracker.resume(4)
        assert tracker.run is not None
        assert tracker.run.last == 4
        for step in (5, 6):
            tracker.log(step, {"loss": step / 8})
    assert [(step["global_step"], step["loss"]) for step in read_run(folder).steps] == [
        (step, step / 8) for step in range(1, 7)
    ]


def cut_after_step(file: Path, folder: Path, step: int) -> None:
    """Cuts a .wandb file inside the record of the next step, so that this is the last one that it holds."""
    data, wanted = file.read_bytes(), folder / "wandb"
    assert last_step(wanted, run_id(folder)) > step
    length = len(data)
    while last_step(wanted, run_id(folder)) > step:
        length -= 5
        file.write_bytes(data[:length])
    assert last_step(wanted, run_id(folder)) == step


def test_steps_that_wandb_has_are_not_logged_again(tmp_path, offline):
    """A run that was stopped had shown wandb steps behind its last checkpoint: they are done again, with the same
    numbers, and stand in wandb once."""
    folder = stage_folder(tmp_path)
    log_until(folder, 3, Stopped(signal.SIGTERM))
    with Tracker(WANDB, folder, "a run", {}) as tracker:
        tracker.resume(2)
        for step in (3, 4):
            tracker.log(step, {"loss": step / 8})
    logged = read_run(folder)
    assert global_steps(logged) == [1, 2, 3, 4]
    assert [line["step"] for line in read_json_lines(folder / METRICS)] == [1, 2, 3, 4]
    assert logged.exit_codes == [1, 0]
    assert logged.preempted


def test_a_run_that_fails_is_marked_as_failed(tmp_path, offline):
    folder = stage_folder(tmp_path)
    log_until(folder, 1, ValueError())
    assert read_run(folder).exit_codes == [1]
    assert not read_run(folder).preempted


@pytest.mark.parametrize("config", [TrackerConfig(), WANDB])
def test_only_the_first_process_writes(tmp_path, offline, monkeypatch, config):
    monkeypatch.setattr(tracking, "world", lambda: distributed.World(rank=1, size=2))
    with Tracker(config, stage_folder(tmp_path), "a run", {}) as tracker:
        tracker.resume(0)
        tracker.log(1, {"loss": 0.5})
        tracker.synchronize()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_group_is_the_run_folder_unless_it_is_set(tmp_path, offline):
    folder = stage_folder(tmp_path / "toy-toy")
    with Tracker(WANDB, folder, "a run", {}):
        pass
    assert read_run(folder).facts["run_group"] == "toy-toy"


def test_the_effective_sample_size_of_a_step_by_hand(tmp_path):
    """Weights 1, 1, 0, 0: a mean of 1/2, a mean square of 1/2, so half of the pairs count. Without a weight there is no
    such share."""
    tracker = Tracker(TrackerConfig(), tmp_path, "a run", {})
    tracker.log(1, {"weight_mean": 0.5, "weight_square_mean": 0.5})
    tracker.log(2, {"weight_mean": 0.0, "weight_square_mean": 0.0})
    tracker.log(3, {"loss": 1.0})
    first, second, third = read_json_lines(tmp_path / METRICS)
    assert first == {"step": 1, "weight_mean": 0.5, "effective_sample_share": 0.5}
    assert second == {"step": 2, "weight_mean": 0.0}
    assert third == {"step": 3, "loss": 1.0}


# ---------------------------------------------------------------------------------------------------------------------
# What a whole pipeline leaves in wandb
# ---------------------------------------------------------------------------------------------------------------------

ALWAYS = {
    "loss", "epoch", "gradient_norm", "learning_rate", "seconds", "tokens_per_second", "unique_token_share",
    "memory_bytes",
}  # fmt: skip
PAIRS = {
    "alignment_loss", "weight_mean", "weight_zero_share", "effective_sample_share", "policy_margin", "chosen_length",
    "rejected_length",
}  # fmt: skip
REFERENCE = {"implicit_reward_accuracy", "implicit_reward_margin", "log_ratio_chosen", "log_ratio_rejected"}


@pytest.mark.parametrize(
    ("stage", "label", "names"),
    [
        ("sft", "toy", {"response_length"}),
        ("rm", "pointwise", {"accuracy", "difference_size", "head_learning_rate", "sequence_length"}),
        ("diffmodel", "paper", {"accuracy", "comparison_loss", "duplication", "reverse", "head_learning_rate"}),
        ("align", "dpo-diff", PAIRS | REFERENCE),
        ("align", "kto-none", PAIRS | REFERENCE | {"kl_estimate", "implicit_reward_desirable"}),
        ("align", "rrhf-none", PAIRS | {"sft_loss"}),
    ],
)
def test_every_measure_of_training_is_there_at_every_step(stage, label, names):
    logged = the_run(stage, label)
    assert global_steps(logged) == list(range(1, len(logged.steps) + 1))
    for step in logged.steps:
        assert step.keys() >= ALWAYS | names
    (folder,) = (tracked_runs() / stage).glob(f"{label}-*")
    for line, step in zip(read_json_lines(folder / METRICS), logged.steps, strict=True):
        assert {key: step[key] for key in line if key != "step"} == {k: v for k, v in line.items() if k != "step"}
    assert logged.facts["job_type"] == stage
    assert logged.facts["run_group"] == "world-model"
    assert logged.exit_codes == [0, 0]


def test_the_parts_of_the_losses_add_up():
    for step in the_run("diffmodel", "paper").steps:
        parts = step["comparison_loss"] + 0.1 * step["duplication"] + 0.1 * step["reverse"]
        assert step["loss"] == pytest.approx(parts, rel=1e-5)
    for step in the_run("align", "dpo-diff").steps:
        assert step["implicit_reward_margin"] == pytest.approx(
            0.2 * (step["log_ratio_chosen"] - step["log_ratio_rejected"]), abs=1e-6
        )


def test_coefficients_of_the_training_set_stand_in_the_summary():
    (folder,) = (tracked_runs() / "align").glob("dpo-diff-*")
    statistics = read_json(folder / "manifest.json")["results"]["coefficients"]
    logged = the_run("align", "dpo-diff")
    assert {name: logged.summary[f"coefficients/{name}"] for name in statistics} == pytest.approx(statistics)
    assert logged.config["made"]["alpha"] == 0.25
    assert logged.config["made"]["beta"] == 0.2
    assert logged.config["made"]["beta0"] == 0.1
    assert "alpha" not in the_run("align", "kto-none").config["made"]


def test_lineage_leads_from_the_data_to_the_evaluation():
    """Each run uses the artifacts of what its stage was made of; only names and places are sent, and no file."""
    runs = [read_run(folder) for folder in tracked_runs().glob("*/*") if (folder / "wandb").is_dir()]
    made = {artifact: run for run in runs for artifact in run.made}
    assert len(made) == len(runs) == 13
    (evaluation,) = (artifact for artifact in made if artifact[1].startswith("dpo-diff") and artifact[0] == "eval")
    upstream: set[tuple[str, str]] = set()
    front = [evaluation]
    while front:
        used = [artifact for one in front if one in made for artifact in made[one].used]
        upstream |= set(used)
        front = used
    assert {kind for kind, _ in upstream} == {"data", "sft", "diffmodel", "rm", "score", "reference", "align", "eval"}
    assert all(artifact in made for artifact in upstream if artifact[0] != "data")
    policy = next(artifact for artifact in upstream if artifact[0] == "align")
    assert {kind for kind, _ in made[policy].used} == {"data", "sft", "score", "reference"}
    folder = tracked_runs() / "align" / policy[1]
    assert (folder / "model" / "model.safetensors").as_uri() in made[policy].references[policy[1]]
    assert all(place.startswith("file://") for run in runs for places in run.references.values() for place in places)
    sent = [path.name for path in tracked_runs().rglob("*") if "wandb" in path.parts and path.is_file()]
    assert not [name for name in sent if name.endswith((".safetensors", ".parquet"))]


def tables(logged: Logged, folder: Path) -> dict[str, dict[str, Any]]:
    """The tables that a run has logged, by their names."""
    (step,) = logged.steps
    paths = {name.rpartition("/")[0]: path for name, path in step.items() if name.endswith("/path")}
    files = {name: next(folder.glob(f"wandb/offline-run-*/files/{path}")) for name, path in paths.items()}
    return {name: read_json(file) for name, file in files.items() if name.startswith("tables/")}


def test_an_evaluated_policy_comes_with_numbers_samples_and_tables():
    (folder,) = (tracked_runs() / "eval").glob("dpo-diff-*")
    evaluation, logged = read_json(folder / "evaluation.json"), read_run(folder)
    reward = evaluation["rewards"]["oracle"]
    assert logged.summary["reward"] == logged.summary["rewards/oracle"] == reward["value"]
    assert logged.summary["reward_low"] == reward["low"]
    assert logged.summary["against_base/diff/win"] == evaluation["against_base"]["diff"]["win"]["value"]
    assert logged.summary["kl"] == evaluation["kl"]["value"]
    found = tables(logged, folder)
    assert found.keys() == {"tables/evaluation", "tables/against_base", "tables/samples"}
    lines = read_json_lines(folder / "generations.jsonl")
    samples = found["tables/samples"]
    assert samples["columns"] == ["id", "query", "response", "stopped", "reward/oracle", "reward/reward"]
    assert [row[:4] for row in samples["data"]] == [
        [line["id"], line["query"], line["response"], line["stopped"]] for line in lines
    ]
    rows = {row[0]: row[1:] for row in found["tables/evaluation"]["data"]}
    assert rows["rewards/oracle"] == [reward["value"], reward["low"], reward["high"], reward["count"]]
    assert [row[0] for row in found["tables/against_base"]["data"]] == ["diff", "oracle", "reward"]
    assert "reward" not in the_run("eval", "base").summary  # no point of a sweep


def test_an_evaluated_scorer_comes_with_its_accuracy_by_confidence():
    (folder,) = (tracked_runs() / "eval").glob("scorer-diff-*")
    evaluation, logged = read_json(folder / "evaluation.json"), read_run(folder)
    assert logged.summary["label_accuracy"] == evaluation["label_accuracy"]["value"]
    rows = tables(logged, folder)["tables/by_confidence"]["data"]
    assert [row[3] for row in rows] == [part["count"] for part in evaluation["by_confidence"]]
    assert [row[4] for row in rows] == [part["label_accuracy"]["value"] for part in evaluation["by_confidence"]]


def test_a_stage_that_was_made_without_wandb_is_shown_when_it_is_used_with_it(tmp_path, offline):
    """And only once; a folder that wandb did not take is tried again."""
    artifact = base_policy(tiny_run(tmp_path))
    assert not (artifact.folder / "wandb").exists()
    for _ in range(2):
        base_policy(tiny_run(tmp_path, *SHORT))
        logged = read_run(artifact.folder)
        assert global_steps(logged) == [1, 2, 3, 4, 5]
        assert logged.made == [("sft", artifact.folder.name)]
        assert len(wandb_files(artifact.folder)) == 1


def test_of_two_jobs_that_find_a_stage_one_shows_it(tmp_path, offline):
    artifact = base_policy(tiny_run(tmp_path))
    (artifact.folder / "wandb").mkdir()
    with FileLock(artifact.folder / "wandb" / LOCK):  # the other job
        assert base_policy(tiny_run(tmp_path, *SHORT)) == artifact
    assert wandb_files(artifact.folder) == []
    base_policy(tiny_run(tmp_path, *SHORT))
    assert len(wandb_files(artifact.folder)) == 1


def test_a_stage_stays_finished_when_wandb_does_not_take_it(tmp_path, monkeypatch, capsys):
    artifact = base_policy(tiny_run(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert base_policy(tiny_run(tmp_path, *SHORT)) == artifact
    assert "is finished, but not shown in wandb" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_MODE", "offline")
    base_policy(tiny_run(tmp_path, *SHORT))
    assert read_run(artifact.folder).made == [("sft", artifact.folder.name)]
