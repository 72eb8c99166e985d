"""The scripts of launch/, and what a launcher says, without a cluster: tests/test_slurm.py has one."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from launch import pipeline, status

from hydra_plugins.rdo_slurm import names
from rdo import slurm
from rdo.artifacts import Provenance, produce
from rdo.errors import UserError

PROFILES = {"slurm": (1, 1, 1), "slurm_node": (1, 8, 8), "slurm_nodes": (2, 8, 8), "slurm_cpu": (1, None, 1)}


# Whose comparison is config.yaml's own.
FEW_ROWS = ["dataset=hh", "model=hub", "model.path=a/model"]


def by_name(jobs: list[pipeline.Job]) -> dict[str, list[pipeline.Job]]:
    found: dict[str, list[pipeline.Job]] = {}
    for job in jobs:
        found.setdefault(job.name, []).append(job)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline
# ---------------------------------------------------------------------------------------------------------------------


def test_every_job_comes_after_what_it_needs_and_shared_work_is_one_job():
    jobs = pipeline.planned([*FEW_ROWS, "report.seeds=[0,1]"], "report")
    found = by_name(jobs)
    for place, job in enumerate(jobs):
        assert all(jobs.index(needed) < place for needed in job.after)
    for shared in ("sft", "rm", "diffmodel", "eval-base", "eval-reward", "eval-diff"):
        assert len(found[shared]) == 2, shared  # one a seed
    assert [job.after for job in found["sft"]] == [[], []]
    evaluation = found["eval-dpo-reward-0.5"][0]
    assert {job.name for job in evaluation.after} == {"align-dpo-reward-0.5", "eval-base", "rm", "diffmodel"}
    aligned = next(job for job in evaluation.after if job.name.startswith("align"))
    assert {job.name for job in aligned.after} == {"score-reward", "sft"}
    assert jobs[-1].name == "report"
    assert jobs[-1].whatever
    evaluations = [job for name, members in found.items() if name.startswith("eval") for job in members]
    assert {id(job) for job in jobs[-1].after} == {id(job) for job in evaluations}


def test_a_row_with_a_difference_model_of_its_own_has_a_job_for_it():
    jobs = pipeline.planned(['+report.rows.own=["loss=dpo","rc=diff","diffmodel.beta0=1"]'], "align")
    models = by_name(jobs)["diffmodel"]
    assert len(models) == 2
    own = [job for job in jobs if "diffmodel.beta0=1" in job.overrides]
    assert [job.name for job in own] == ["diffmodel", "score-diff", "align-dpo-diff-0.5"]
    assert [job.after[0] for job in own[1:]] == own[:2]


def test_until_leaves_out_what_comes_after(capsys, tmp_path):
    jobs = pipeline.planned(FEW_ROWS, "score")
    assert {job.name.partition("-")[0] for job in jobs} == {"sft", "rm", "diffmodel", "score"}
    pipeline.submit(jobs, pipeline.profile([]), tmp_path, dry_run=True)
    assert "--dependency=afterok:<rm>" in capsys.readouterr().out


def test_a_job_is_given_what_the_profile_says(tmp_path):
    settings = pipeline.profile(
        ["hydra/launcher=slurm_nodes", "hydra.launcher.partition=long", "hydra.launcher.mem_gb=64"]
    )
    first, last = pipeline.Job("rm", [], number="7"), pipeline.Job("report", [])
    last.after, last.whatever = [first, first], True
    given = pipeline.options(settings, last, tmp_path)
    expected = ["--nodes=2", "--gpus-per-node=8", "--ntasks-per-node=8", "--partition=long", "--mem=64G", "--time=1440"]
    assert set(expected) <= set(given)
    assert "--requeue" in given
    assert "--signal=B:USR2@300" in given
    assert "--dependency=afterany:7:7" in given
    assert not any("None" in option or "_" in option.split("=")[0] for option in given)


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_start_one_process_a_gpu(name):
    settings = pipeline.profile([f"hydra/launcher={name}"])
    assert (settings["nodes"], settings["gpus_per_node"], settings["tasks_per_node"]) == PROFILES[name]
    # Each is given: with fewer requeues than these a job that reaches its time limit often would not come back.
    assert settings["max_num_timeout"] >= 1000
    assert "export SLURM_KILL_BAD_EXIT=1" in settings["setup"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rc.alfa=1"], "rc.alfa"),
        (["hydra/launcher=basic"], "give one of the SLURM profiles"),
        (["--until", "sft"], "there is no SLURM here"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["pipeline.py", f"run_dir={tmp_path}", *arguments])
    with pytest.raises(SystemExit) as caught:
        pipeline.main()
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said


# ---------------------------------------------------------------------------------------------------------------------
# Status
# ---------------------------------------------------------------------------------------------------------------------


def test_status_tells_done_running_stopped_and_failed(tmp_path, monkeypatch, capsys):
    produce(Provenance(tmp_path, "train", {}), "eval", "policy", {}, {}, lambda folder: {"metric": 0.5})
    for name in ("running", "stopped"):
        (tmp_path / "align" / name / "checkpoints").mkdir(parents=True)
        (tmp_path / "align" / name / ".lock").touch()
        (tmp_path / "align" / name / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "7.log").write_text("[align] x\nerror: the disk is full\nsrun: error: task 0\n")
    titles = {"7": "align", "8_0": "#0 rc.alpha=0", "8_10": "#10 rc.alpha=1"}
    slurm.record(tmp_path / "slurm", "7", {n: (title, tmp_path / "slurm" / f"{n}.log") for n, title in titles.items()})
    monkeypatch.setattr(status, "known_states", lambda numbers: {"7": "FAILED", "8_0": "RUNNING"})
    monkeypatch.setattr(sys, "argv", ["status.py", str(tmp_path)])
    with FileLock(tmp_path / "align" / "running" / ".lock"):
        capsys.readouterr()
        status.main()
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[2].startswith("running align/running step 2")
    assert lines[3] == "stopped align/stopped step 2; goes on from there when it is asked for"
    assert lines[4].startswith("done eval/policy-")
    assert lines[4].endswith("metric 0.5")
    assert lines[6:] == [
        f"failed 7 align the disk is full; log: {tmp_path}/slurm/7.log",
        "running 8_0 #0 rc.alpha=0 no log yet",
        "forgotten 8_10 #10 rc.alpha=1 no log yet",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The launcher
# ---------------------------------------------------------------------------------------------------------------------


def test_points_are_named_by_what_they_differ_in():
    points = [["stage=align", "rc.alpha=0", "seed=1"], ["stage=align", "rc.alpha=1", "seed=1"]]
    assert names(points) == ["rc.alpha=0", "rc.alpha=1"]
    assert names(points[:1]) == [""]


def test_without_slurm_the_way_out_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"there is no SLURM here \(no srun in PATH\); leave hydra/launcher out"):
        slurm.submitted(print, [()], str(tmp_path / "%j"), 1, {})


def test_a_job_that_left_no_result_is_waited_for_as_long_as_one_may_come(tmp_path, monkeypatch):
    states: list[Any] = [{"7": "RUNNING"}, None, {"7": "PENDING (BeginTime)"}, {"7": "COMPLETED"}, {}, {}]
    monkeypatch.setattr(slurm, "queue", lambda numbers: states.pop(0))
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + 15))
    monkeypatch.setattr(slurm, "time", clock)
    paths = SimpleNamespace(
        folder=tmp_path / "7", result_pickle=tmp_path / "none", stdout=tmp_path / "7" / "7_0_log.out"
    )
    job = SimpleNamespace(job_id="7", paths=paths, num_tasks=2, task=lambda rank: SimpleNamespace(paths=paths))
    outcome = slurm.Jobs([job], ["rc.alpha=0"], 0).wait()[0]  # type: ignore[list-item]
    assert str(outcome) == f"ended without a result (forgotten); log: {paths.stdout}"
    assert not states  # a busy controller and a requeue ended nothing
    assert json.loads((tmp_path / "jobs-7.json").read_text()) == {"7": ["#0 rc.alpha=0", str(paths.stdout)]}
