"""The scripts of launch/, and what a launcher says, without a cluster: tests/runtime/test_slurm.py has one."""

from __future__ import annotations

import sys

import pytest
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from launch import status
from omegaconf import DictConfig

from rdo.checks import CONF
from rdo.runtime.failing import FAILED
from rdo.runtime.store import Provenance, produce

PROFILES = {"slurm": (1, 1, 1), "slurm_node": (1, 8, 8), "slurm_nodes": (2, 8, 8), "slurm_cpu": (1, None, 1)}


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Writes stand-ins for SLURM's commands, all that is in PATH."""
    (folder := tmp_path / "programs").mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def write(**scripts: str) -> None:
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)

    return write


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_start_one_process_a_gpu(name):
    settings = composed(f"hydra/launcher={name}").hydra.launcher
    assert (settings["nodes"], settings["gpus_per_node"], settings["tasks_per_node"]) == PROFILES[name]
    # Each is given: with fewer requeues than these a job that reaches its time limit often would not come back.
    assert settings["max_num_timeout"] >= 1000
    assert "export SLURM_KILL_BAD_EXIT=1" in settings["setup"]


def test_status_tells_done_running_stopped_and_failed(tmp_path, monkeypatch, capsys, programs):
    produce(Provenance(tmp_path, "train", {}), "eval", "policy", {}, {}, lambda folder: {"metric": 0.5})
    for name in ("running", "stopped"):
        (tmp_path / "align" / name).mkdir(parents=True)
        (tmp_path / "align" / name / ".lock").touch()
        (tmp_path / "align" / name / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    said = "[align] runs/x/align/a\n[align] 8 records\nerror: no room\nsrun: error: task 0\n"
    for number in ("7", "8_0", "8_1"):
        (folder := tmp_path / "hydra" / "sweep" / "slurm" / number).mkdir(parents=True)
        (folder / f"{number}_0_log.out").write_text(said)
    (folder / "8_1_0_result.pkl").touch()
    programs(squeue="echo 8_0 RUNNING")
    monkeypatch.setattr(sys, "argv", ["status.py", str(tmp_path)])
    with FileLock(tmp_path / "align" / "running" / ".lock"):
        capsys.readouterr()
        status.main()
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[2:4] == ['running align/running {"step": 2}', 'stopped align/stopped {"step": 2}']
    assert lines[4].startswith("done eval/policy-")
    assert lines[4].endswith("metric 0.5")
    assert [line.partition("log: ")[0].strip() for line in lines[6:]] == [
        "failed 7 error: no room;",
        "running 8_0 runs/x/align/a;",
        "done 8_1 runs/x/align/a;",
    ]


@pytest.mark.parametrize(
    ("scripts", "said"),
    [
        ({}, "error: RuntimeError: Could not detect"),
        ({"sbatch": "echo no such partition >&2; exit 1"}, "error: FailedJobError: no such partition\n"),
        (
            {"sbatch": "echo Submitted batch job 7", "squeue": "kill -INT $PPID; /bin/sleep 1"},
            "error: no longer waiting for job 7, which goes on; `scancel 7` ends it\n",
        ),
    ],
)
def test_where_nothing_can_be_waited_for_one_line_says_so(tmp_path, capfd, programs, scripts, said):
    if scripts:
        programs(srun="", **scripts)
    with pytest.raises(SystemExit) as ended:
        launched(tmp_path)
    assert ended.value.code == 1
    assert said in capfd.readouterr().err


def test_a_job_that_left_the_queue_without_a_result_has_failed(tmp_path, capfd, programs):
    programs(srun="", sbatch="echo Submitted batch job 7", squeue="exit 0")
    for returned in launched(tmp_path):
        assert returned.return_value is None
    assert [said.partition(";")[0] for _, said in FAILED] == ["ended without a result"] * 2
    assert "[slurm] 7_1 seed=1: failed: ended without a result; log: " in capfd.readouterr().out


def launched(folder):
    """What the launcher returns for a sweep of two points."""
    FAILED.clear()
    config = composed("hydra/launcher=slurm_cpu", f"hydra.sweep.dir={folder}")
    launcher = instantiate(config.hydra.launcher)
    launcher.setup(hydra_context=None, task_function=print, config=config)
    return launcher.launch([["seed=0"], ["seed=1"]], 0)
