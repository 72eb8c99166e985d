"""Dashboards as code: they build offline, and every panel refers to what runs really log."""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rdo.errors import UserError
from rdo.tracking.wandb_run import logged_names
from tracked import read_run, tracked_runs

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


def options(**more: str) -> argparse.Namespace:
    return argparse.Namespace(**{"project": "rdo", "entity": None, "group": None, "check": None, **more})


def test_every_panel_refers_to_what_runs_log(dashboards):
    for build in dashboards.DASHBOARDS:
        assert dashboards.missing(build(options()), tracked_runs()) == []


def test_what_no_run_logs_is_found(dashboards):
    """Whatever the panel, and also in a grouping: otherwise the test above could not fail."""
    panels, workspaces = dashboards.panels, dashboards.workspaces
    members = [
        panels.LinePlot(x="steps", y=["los"]),
        panels.ScatterPlot(x=panels.Config("made.alfa"), y=panels.SummaryMetric("rewardd")),
        panels.ParallelCoordinatesPlot(
            columns=[panels.ParallelCoordinatesPlotColumn(metric=panels.SummaryMetric("parallel"))]
        ),
        panels.BarPlot(metrics=["bar"], groupby="rc.nam"),
        panels.ParameterImportancePlot(with_respect_to="importance"),
        panels.MediaBrowser(media_keys=["plots/none"]),
        panels.WeavePanelSummaryTable(table_name="tables/none"),
    ]
    runs = {"groupby": [workspaces.Config("group.none")], "pinned_columns": ["summary:pinned"]}
    workspace = dashboards.view("wrong", [dashboards.section("all", members)], ["eval"], options(), **runs)
    assert dashboards.missing(workspace, tracked_runs()) == [
        "config:group.none",
        "config:made.alfa",
        "config:rc.nam",
        "history:los",
        "history:plots/none",
        "history:steps",
        "history:tables/none",
        "summary:bar",
        "summary:importance",
        "summary:parallel",
        "summary:pinned",
        "summary:rewardd",
    ]


def test_names_are_read_back_as_they_were_logged():
    """Against the tests' own reading of the same files."""
    found = logged_names(tracked_runs())
    runs = [read_run(folder) for folder in tracked_runs().glob("*/*") if (folder / "wandb").is_dir()]
    assert {
        name for name in found if name.startswith("history:") and not name.startswith(("history:t", "history:p"))
    } == {f"history:{name}" for run in runs for step in run.steps for name in step if not name.startswith(("t", "p"))}
    assert {f"summary:{name}" for run in runs for name in run.summary} <= found
    assert {"config:made.beta0", "config:rc.name", "history:tables/samples"} <= found


def test_the_runs_of_one_group_are_chosen(dashboards):
    workspace = dashboards.sweep(options(group="toy-toy", project="mine", entity="me"))
    assert (workspace.project, workspace.entity) == ("mine", "me")
    assert "toy-toy" in str(workspace.runset_settings.filters)
    assert "eval" in str(workspace.runset_settings.filters)


def test_checking_needs_no_login_and_saving_says_that_it_does(tmp_path):
    bare = {"PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), *arguments]
        return subprocess.run(command, env=bare, cwd=tmp_path, capture_output=True, text=True, timeout=100)

    checked = run("--check", str(tracked_runs()))
    assert checked.returncode == 0, checked.stderr
    assert [line.split(":")[1].strip() for line in checked.stdout.splitlines()] == ["one run", "sweep", "coefficients"]
    saved = run()
    assert saved.returncode == 1
    assert saved.stderr == "error: saving needs a login: run `wandb login` first (--check needs none)\n"


def test_a_folder_without_runs_is_said(dashboards, tmp_path):
    with pytest.raises(UserError, match="no run there has logged to wandb"):
        dashboards.check(options(check=str(tmp_path)))
