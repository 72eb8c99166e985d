"""Dashboards as code: they build offline, and every name in them is one that runs really log."""

import argparse

import pytest
import wandb
from launch import dashboards

from tracked import tracked_runs


def names(settings: dict, prefix: str = "") -> set[str]:
    """The dotted names of all settings."""
    found = {f"{prefix}{name}" for name in settings}
    return found.union(*(names(v, f"{prefix}{k}.") for k, v in settings.items() if isinstance(v, dict)))


def test_every_name_is_one_that_runs_log():
    shown = {name for names in dashboards.CURVES.values() for name in names}
    shown |= {dashboards.STEP, *dashboards.COMPARED_CURVES, *dashboards.TABLES}
    assert shown <= set().union(*(run.history for run in tracked_runs()))
    summary = set().union(*(run.summary for run in tracked_runs()))
    assert {*dashboards.RESULTS, *dashboards.COEFFICIENTS, "label_accuracy"} <= summary
    evaluated = [run for run in tracked_runs() if run.asked["job_type"] == "eval"]
    assert {*dashboards.SWEPT, *dashboards.GROUPS} <= set().union(*(names(run.asked["config"]) for run in evaluated))


def test_the_runs_of_one_group_are_chosen():
    options = argparse.Namespace(project="mine", entity="me", group="toy-toy")
    workspace = dashboards.sweep(options)
    assert (workspace.project, workspace.entity) == ("mine", "me")
    assert "toy-toy" in str(workspace.runset_settings.filters)
    assert "eval" in str(workspace.runset_settings.filters)


def test_checking_needs_no_login_and_saving_says_that_it_does(monkeypatch, capsys):
    monkeypatch.setattr(wandb, "login", lambda **settings: False)
    dashboards.main(["--check"])
    said = [line.split(":")[1].strip() for line in capsys.readouterr().out.splitlines()]
    assert said == ["one run", "sweep", "coefficients"]
    with pytest.raises(SystemExit, match="error: saving needs a login: run `wandb login` first"):
        dashboards.main([])
