"""Dashboards as code: they build offline, and every name in them is one that runs really log."""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tracked import tracked_runs

SCRIPT = Path(__file__).parents[1] / "launch" / "dashboards.py"


@pytest.fixture(scope="module")
def dashboards() -> ModuleType:
    """launch/dashboards.py as a module; launch is no package."""
    specification = importlib.util.spec_from_file_location("dashboards", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def names(settings: dict, prefix: str = "") -> set[str]:
    """The dotted names of all settings."""
    found = {f"{prefix}{name}" for name in settings}
    return found.union(*(names(v, f"{prefix}{k}.") for k, v in settings.items() if isinstance(v, dict)))


def test_every_name_is_one_that_runs_log(dashboards):
    shown = {name for names in dashboards.CURVES.values() for name in names}
    shown |= {dashboards.STEP, *dashboards.COMPARED_CURVES, *dashboards.TABLES}
    assert shown <= set().union(*(run.history for run in tracked_runs()))
    summary = set().union(*(run.summary for run in tracked_runs()))
    assert {*dashboards.RESULTS, *dashboards.COEFFICIENTS, "label_accuracy"} <= summary
    evaluated = [run for run in tracked_runs() if run.asked["job_type"] == "eval"]
    assert {*dashboards.SWEPT, *dashboards.GROUPS} <= set().union(*(names(run.asked["config"]) for run in evaluated))


def test_the_runs_of_one_group_are_chosen(dashboards):
    options = argparse.Namespace(project="mine", entity="me", group="toy-toy")
    workspace = dashboards.sweep(options)
    assert (workspace.project, workspace.entity) == ("mine", "me")
    assert "toy-toy" in str(workspace.runset_settings.filters)
    assert "eval" in str(workspace.runset_settings.filters)


def test_checking_needs_no_login_and_saving_says_that_it_does(tmp_path):
    bare = {"PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), *arguments]
        return subprocess.run(command, env=bare, cwd=tmp_path, capture_output=True, text=True, timeout=100)

    checked = run("--check")
    assert checked.returncode == 0, checked.stderr
    assert [line.split(":")[1].strip() for line in checked.stdout.splitlines()] == ["one run", "sweep", "coefficients"]
    saved = run()
    assert saved.returncode == 1
    assert saved.stderr == "error: saving needs a login: run `wandb login` first (--check needs none)\n"
