"""Metrics: a JSON-lines file of every run, and in wandb what that file says and what evaluations find."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
from launch import dashboards

from rdo import tracking
from rdo.runtime.errors import UserError
from rdo.runtime.files import read_json, read_json_lines
from rdo.runtime.stopping import Stopped
from rdo.settings import TrackerConfig
from rdo.stages.evaluate import evaluate_policy
from rdo.stages.sft import base_policy
from rdo.tracking import METRICS, Tracker
from tiny import metrics, tiny_run
from tracked import SHORT, records_in, steps_in, the_run, tracked_runs

WANDB = TrackerConfig("wandb")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_json_lines(folder / METRICS)]


def test_without_a_tracker_the_metrics_are_a_file_and_nothing_else(tmp_path):
    """Weights 1, 1, 0, 0 have a mean of 1/2 and a mean square of 1/2, so half of the pairs count; without a weight
    there is no such share."""
    with Tracker(TrackerConfig(), tmp_path, "a run", {}) as tracker:
        tracker.log(1, {"loss": 0.5, "weight_mean": 0.5, "weight_square_mean": 0.5})
        tracker.log(2, {"loss": 0.25, "weight_mean": 0.0, "weight_square_mean": 0.0})
        tracker.summarize({"mean": 1.0})
    assert read_json_lines(tmp_path / METRICS) == [
        {"step": 1, "loss": 0.5, "weight_mean": 0.5, "effective_sample_share": 0.5},
        {"step": 2, "loss": 0.25, "weight_mean": 0.0},
    ]
    assert [file.name for file in tmp_path.iterdir()] == [METRICS]


@pytest.mark.parametrize(("done", "kept"), [(0, []), (2, [1, 2]), (9, [1, 2, 3])])
@pytest.mark.parametrize("left", [b"", b'{"step": 4, "lo', b"\0" * 40, b'{"step": "x"}\n', b"\xff\xfe\n"])
def test_resuming_drops_the_steps_after_the_checkpoint_and_what_a_crash_left(tmp_path, done, kept, left):
    tracker = Tracker(TrackerConfig(), tmp_path, "a run", {})
    tracker.resume(done)  # before there is a file
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 0.5})
    with (tmp_path / METRICS).open("ab") as file:
        file.write(left)
    tracker.resume(done)
    assert steps(tmp_path) == kept
    tracker.log(done + 1, {"loss": 0.5})
    assert steps(tmp_path) == [*kept, done + 1]


@pytest.mark.parametrize("config", [TrackerConfig(), WANDB])
def test_only_the_first_process_writes(tmp_path, offline, monkeypatch, config):
    monkeypatch.setattr(tracking, "is_rank0", lambda: False)
    with Tracker(config, tmp_path, "a run", {}) as tracker:
        tracker.resume(0)
        tracker.log(1, {"loss": 0.5})
        tracker.summarize({"mean": 1.0})
        tracker.synchronize()
    tracking.show(config, tmp_path, {}, {"reward": 1.0}, {})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# ---------------------------------------------------------------------------------------------------------------------
# wandb itself, offline
# ---------------------------------------------------------------------------------------------------------------------

# Without a login, and then with a key.
TWO_RUNS = """# planted-code
import os, sys
from pathlib import Path
from rdo.settings import TrackerConfig
from rdo.tracking import Tracker

print("planted-text")
for name in ("without", "with"):
    folder = Path("run", "align", name)
    folder.mkdir(parents=True)
    with Tracker(TrackerConfig("wandb", "own", "group"), folder, "a name", {"align": {"epochs": 3}}) as tracker:
        for step in (1, 2):
            tracker.log(step, {"loss": step / 8})
    os.environ |= {"WANDB_MODE": "offline", "WANDB_API_KEY": f"{'planted':0<40}"}
"""


def test_wandb_runs_offline_without_asking_and_gets_no_secret(tmp_path):
    """In a checkout whose remote holds a token, with secrets in the environment and among the arguments."""
    for command in (
        "init -q",
        "-c user.name=n -c user.email=planted@example.org commit -q --allow-empty -m planted-message",
        "remote add origin https://planted@example.org/planted-repository.git",
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command.split()], check=True)
    (tmp_path / "script.py").write_text(TWO_RUNS)
    bare = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "script.py", "--argument=planted-argument"],
        env={**bare, "HF_TOKEN": "planted-token", "MY_VARIABLE": "planted-variable"},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,  # and nothing waits for an answer
    )
    assert done.returncode == 0, done.stderr
    assert "(1)" not in done.stdout + done.stderr  # the menu of `wandb login`
    for folder in (tmp_path / "run" / "align").iterdir():
        assert steps(folder) == [1, 2]
        assert [(step["global_step"], step["loss"]) for step in steps_in(folder)] == [(1, 0.125), (2, 0.25)]
        runs = [record.run for record in records_in(folder) if record.WhichOneof("record_type") == "run"]
        named = [(run.project, run.run_group, run.display_name, run.job_type, run.host) for run in runs]
        assert named == [("own", "group", "a name", "align", "")]
        assert {item.key: item.value_json for item in runs[0].config.update}["align"] == '{"epochs":3}'
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert not [file for file in files if b"planted" in file.read_bytes()]
    names = {file.name for file in files}
    assert not names & {"wandb-metadata.json", "requirements.txt", "output.log", "script.py", "diff.patch"}


def test_a_run_that_ended_goes_on_in_its_curve(tmp_path, offline, monkeypatch):
    """The same run, by its id; what is done again since the last checkpoint has the same numbers."""
    run = tiny_run(tmp_path, "tracker=wandb", "engine.checkpoint_every_steps=2", "sft.max_steps=7")
    log = Tracker.log

    def failing(tracker: Tracker, step: int, values: dict) -> None:
        log(tracker, step, values)
        if step == 5:
            raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(Tracker, "log", failing)
        with pytest.raises(ZeroDivisionError):
            base_policy(run)
    artifact = base_policy(run)
    assert steps(artifact.folder) == [1, 2, 3, 4, 5, 6, 7]
    losses = {line["step"]: line["loss"] for line in metrics(artifact)}
    found = [(step["global_step"], step["loss"]) for step in steps_in(artifact.folder)]
    assert sorted(found) == [(step, losses[step]) for step in (1, 2, 3, 4, 5, 5, 6, 7)]
    attempts = [folder.name.split("-", 3)[3] for folder in artifact.folder.glob("wandb/offline-run-*")]
    assert len(attempts) == 2
    assert len(set(attempts)) == 1


def test_a_login_that_is_missing_is_one_line_and_costs_no_finished_stage(tmp_path, monkeypatch, capsys):
    for name, value in (("WANDB_MODE", "online"), ("WANDB_API_KEY", ""), ("NETRC", str(tmp_path / "none"))):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^tracker=wandb: .*; set WANDB_MODE=offline") as caught:
        base_policy(tiny_run(tmp_path, *SHORT))
    assert "\n" not in str(caught.value)
    base_policy(tiny_run(tmp_path))
    artifact = evaluate_policy(tiny_run(tmp_path, "tracker=wandb", "eval.judges=[gold]"), "base")
    assert (artifact.folder / "manifest.json").exists()
    assert "is finished, but not shown in wandb: tracker=wandb:" in capsys.readouterr().err


@pytest.mark.parametrize(("end", "preempted"), [(ValueError(), False), (Stopped(), True)])
def test_a_run_that_fails_is_marked_as_failed_and_one_that_was_stopped_as_preempted(tmp_path, offline, end, preempted):
    folder = tmp_path / "align" / "dpo-123"
    folder.mkdir(parents=True)
    with pytest.raises(type(end)), Tracker(WANDB, folder, "a run", {}):
        raise end
    records = records_in(folder)
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [1]
    assert any(record.WhichOneof("record_type") == "preempting" for record in records) == preempted


def test_results_reach_wandb(tmp_path, offline):
    folder = tmp_path / "eval" / "dpo-123"
    folder.mkdir(parents=True)
    table = (["name", "value"], [["kl", 0.5], ["reward", None]])
    tracking.show(WANDB, folder, {}, {"rewards/gold": 1.5}, {"tables/x": table})
    summaries = [record.summary for record in records_in(folder) if record.WhichOneof("record_type") == "summary"]
    found = {item.key: item.value_json for summary in summaries for item in summary.update}
    assert found["rewards/gold"] == "1.5"
    assert any(name.startswith("tables/x") for step in steps_in(folder) for name in step)
    files = list(folder.glob("wandb/offline-run-*/files/media/table/tables/x*.json"))
    assert [read_json(file)["data"] for file in files] == [table[1]]


# ---------------------------------------------------------------------------------------------------------------------
# What a whole pipeline hands to wandb
# ---------------------------------------------------------------------------------------------------------------------

ALWAYS = {
    "loss", "epoch", "gradient_norm", "learning_rate", "seconds", "tokens_per_second", "unique_token_share",
    "memory_bytes",
}  # fmt: skip
PAIRS = {
    "alignment_loss", "weight_mean", "weight_zero_share", "effective_sample_share", "policy_margin", "chosen_length",
    "rejected_length",
}  # fmt: skip
REFERENCE = {
    "implicit_reward_accuracy", "implicit_reward_margin", "log_ratio_chosen", "log_ratio_rejected", "log_ratio_size",
}  # fmt: skip


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
    assert [step["global_step"] for step in logged.steps] == list(range(1, len(logged.steps) + 1))
    assert all(step.keys() >= ALWAYS | names for step in logged.steps)
    lines = read_json_lines(logged.folder / METRICS)
    assert lines == [{"step": step["global_step"], **{k: v for k, v in step.items() if k != "global_step"}}
                     for step in logged.steps]  # fmt: skip
    assert (logged.asked["job_type"], logged.asked["group"], logged.exit_codes) == (stage, "world-model", [0])


def test_the_parts_of_the_losses_add_up():
    for step in the_run("diffmodel", "paper").steps:
        parts = step["comparison_loss"] + 0.1 * step["duplication"] + 0.1 * step["reverse"]
        assert step["loss"] == pytest.approx(parts, rel=1e-5)
    for step in the_run("align", "dpo-diff").steps:
        assert step["implicit_reward_margin"] == pytest.approx(
            0.2 * (step["log_ratio_chosen"] - step["log_ratio_rejected"]), abs=1e-6
        )


def test_each_stage_that_was_made_has_one_run_and_shows_its_results():
    assert len({run.asked["id"] for run in tracked_runs()}) == len(tracked_runs()) == 9
    logged = the_run("align", "dpo-diff")
    statistics = read_json(logged.folder / "manifest.json")["results"]["coefficients"]
    assert logged.summary == {f"coefficients/{name}": value for name, value in statistics.items()}


def test_an_evaluated_policy_comes_with_numbers_samples_and_tables():
    logged = the_run("eval", "dpo-diff")
    evaluation = read_json(logged.folder / "evaluation.json")
    lines = read_json_lines(logged.folder / "generations.jsonl")
    reward = evaluation["rewards"]["gold"]
    assert logged.summary["reward"] == logged.summary["rewards/gold"] == reward["value"]
    assert logged.summary["reward_low"] == reward["low"]
    assert logged.summary["against_base/diff/win"] == evaluation["against_base"]["diff"]["win"]["value"]
    assert logged.summary["prompts"] == 8
    assert logged.asked["config"]["made"] == {"alpha": 0.25, "beta": 0.2, "beta0": 0.1, "beta1": 0.1}
    (shown,) = logged.steps
    assert shown.keys() == {"global_step", "tables/evaluation", "tables/against_base", "tables/samples"}
    samples = shown["tables/samples"]
    assert samples.columns == ["id", "query", "response", "stopped", "reward/gold", "reward/reward"]
    assert [row[:4] for row in samples.data] == [
        [line["id"], line["query"], line["response"], line["stopped"]] for line in lines
    ]
    rows = {row[0]: row[1:] for row in shown["tables/evaluation"].data}
    assert rows["rewards/gold"] == [reward["value"], reward["low"], reward["high"], reward["count"]]
    assert [row[0] for row in shown["tables/against_base"].data] == ["diff", "gold", "reward"]
    assert "reward" not in the_run("eval", "base").summary  # no point of a sweep


def test_an_evaluated_scorer_comes_with_its_accuracy_by_confidence():
    logged = the_run("eval", "scorer-diff")
    evaluation = read_json(logged.folder / "evaluation.json")
    assert logged.summary["label_accuracy"] == evaluation["label_accuracy"]["value"]
    (shown,) = logged.steps
    found = [row[3:5] for row in shown["tables/by_confidence"].data]
    assert found == [[part["count"], part["label_accuracy"]["value"]] for part in evaluation["by_confidence"]]


# ---------------------------------------------------------------------------------------------------------------------
# Dashboards as code
# ---------------------------------------------------------------------------------------------------------------------


def names_of(settings: dict, prefix: str = "") -> set[str]:
    """The dotted names of all settings."""
    found = {f"{prefix}{name}" for name in settings}
    return found.union(*(names_of(v, f"{prefix}{k}.") for k, v in settings.items() if isinstance(v, dict)))


def test_every_name_in_a_dashboard_is_one_that_runs_log():
    shown = {name for names in dashboards.CURVES.values() for name in names}
    shown |= {dashboards.STEP, *dashboards.COMPARED_CURVES, *dashboards.TABLES}
    assert shown <= set().union(*(run.history for run in tracked_runs()))
    summary = set().union(*(run.summary for run in tracked_runs()))
    assert {*dashboards.RESULTS, *dashboards.COEFFICIENTS, "label_accuracy"} <= summary
    evaluated = [run.asked["config"] for run in tracked_runs() if run.asked["job_type"] == "eval"]
    assert {*dashboards.SWEPT, *dashboards.GROUPS} <= set().union(*map(names_of, evaluated))


def test_the_runs_of_one_group_are_chosen():
    workspace = dashboards.sweep(argparse.Namespace(project="mine", entity="me", group="toy-toy"))
    assert (workspace.project, workspace.entity) == ("mine", "me")
    assert "toy-toy" in str(workspace.runset_settings.filters)
    assert "eval" in str(workspace.runset_settings.filters)


def test_checking_dashboards_needs_no_login_and_saving_says_that_it_does(monkeypatch, capsys):
    monkeypatch.setattr(wandb, "login", lambda **settings: False)
    dashboards.main(["--check"])
    said = [line.split(":")[1].strip() for line in capsys.readouterr().out.splitlines()]
    assert said == ["one run", "sweep", "coefficients"]
    with pytest.raises(SystemExit, match="error: saving needs a login: run `wandb login` first"):
        dashboards.main([])
