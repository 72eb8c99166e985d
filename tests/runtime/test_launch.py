"""The scripts of launch/, and what a launcher says, without a cluster: tests/runtime/test_slurm.py has one."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from hydra import compose, initialize_config_dir
from launch import status

from hydra_plugins.rdo_slurm import names
from rdo.checks import CONF
from rdo.runtime import slurm
from rdo.runtime.errors import UserError
from rdo.runtime.store import Provenance, produce

PROFILES = {"slurm": (1, 1, 1), "slurm_node": (1, 8, 8), "slurm_nodes": (2, 8, 8), "slurm_cpu": (1, None, 1)}


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_start_one_process_a_gpu(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [f"hydra/launcher={name}"], return_hydra_config=True)
    settings = config.hydra.launcher
    assert (settings["nodes"], settings["gpus_per_node"], settings["tasks_per_node"]) == PROFILES[name]
    # Each is given: with fewer requeues than these a job that reaches its time limit often would not come back.
    assert settings["max_num_timeout"] >= 1000
    assert "export SLURM_KILL_BAD_EXIT=1" in settings["setup"]


# ---------------------------------------------------------------------------------------------------------------------
# Status
# ---------------------------------------------------------------------------------------------------------------------


def test_status_tells_done_running_stopped_and_failed(tmp_path, monkeypatch, capsys):
    produce(Provenance(tmp_path, "train", {}), "eval", "policy", {}, {}, lambda folder: {"metric": 0.5})
    for name in ("running", "stopped"):
        (tmp_path / "align" / name / "checkpoints").mkdir(parents=True)
        (tmp_path / "align" / name / ".lock").touch()
        (tmp_path / "align" / name / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (jobs := tmp_path / "hydra" / "sweep" / "slurm").mkdir(parents=True)
    (jobs / "7.log").write_text("[align] x\nerror: the disk is full\nsrun: error: task 0\n")
    titles = {"7": "align", "8_0": "#0 rc.alpha=0", "8_10": "#10 rc.alpha=1"}
    slurm.record(jobs, "7", {n: (title, jobs / f"{n}.log") for n, title in titles.items()})
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
        f"failed 7 align the disk is full; log: {jobs}/7.log",
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
