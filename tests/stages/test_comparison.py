"""Ready-made sweeps, and the number that a stage returns to a sweeper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from rdo.checks import CONF, compose_config
from rdo.evaluation.numbers import stage_metric
from rdo.main import run_config
from rdo.runtime.errors import UserError
from rdo.runtime.files import write_json
from rdo.runtime.store import Provenance, produce
from tiny import TINY, append_json_line


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=True)


# ---------------------------------------------------------------------------------------------------------------------
# Ready-made sweeps
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch, train_here: Callable[..., None]) -> Callable[..., list[str]]:
    """The points that train.py would run, with their configs checked."""

    def run(*arguments: str) -> list[str]:
        def launch(_: Any, points: list[list[str]], initial_job_idx: int) -> None:
            found.extend(" ".join(point) for point in points)
            raise SystemExit

        found: list[str] = []
        launchers = {found.__name__: found for found in Plugins.instance().discover(Launcher)}
        monkeypatch.setattr(launchers["BasicLauncher"], "launch", launch)
        with pytest.raises(SystemExit):
            train_here(*arguments)
        return found

    return run


@pytest.mark.parametrize(("name", "count"), [("alpha", 5), ("beta", 4), ("diffmodel", 16)])
def test_every_point_of_a_ready_made_sweep_is_a_config(points, tmp_path, name, count):
    assert len(points(f"experiment=sweep_{name}", f"run_dir={tmp_path}")) == count


@pytest.mark.parametrize("name", ["none", "paper_hh"])
def test_every_row_of_a_comparison_is_a_config(points, tmp_path, name):
    found = points(f"experiment={name}", f"run_dir={tmp_path}")
    rows = composed(f"experiment={name}").rows.split(",")
    assert [point.split()[0] for point in found] == [f"row={row}" for row in rows]


def test_values_on_the_command_line_take_the_place_of_the_experiments(points, tmp_path):
    found = points("experiment=sweep_diffmodel", "diffmodel.beta0=0.5", "row=difference_model", f"run_dir={tmp_path}")
    assert len(found) == 4
    assert all("diffmodel.beta0=0.5" in point and "row=difference_model" in point for point in found)


def test_only_a_comparison_is_a_sweep_by_itself():
    for stage in ("align", "report", "eval"):
        assert composed("experiment=toy_study", f"stage={stage}").hydra.mode is None


def test_a_bayesian_sweep_finds_the_same_points_again(tmp_path, train_here, capsys):
    settings = [f"run_dir={tmp_path}", *TINY, "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2"]
    settings += ["metric=rewards.gold", f"hydra.sweep.dir={tmp_path}/sweep"]
    said, found = [], []
    for _ in range(2):
        train_here("experiment=sweep_bayes", *settings)
        said.append(capsys.readouterr().out)
        found.append(OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml"))
    assert found[0] == found[1]
    assert {"rc.alpha", "loss.beta", "diffmodel.beta0", "diffmodel.beta1"} == set(found[0].best_params)
    assert "[align] " in said[0]
    assert "[align] " not in said[1]


# ---------------------------------------------------------------------------------------------------------------------
# The metric
# ---------------------------------------------------------------------------------------------------------------------


def artifact(folder: Path, **results: Any):
    """A finished folder with a log of 20 steps and an evaluation."""

    def make(made: Path) -> dict[str, Any]:
        for step in range(1, 21):
            append_json_line(made / "metrics.jsonl", {"step": step, "loss": float(step), "seconds": 1.0})
        rewards = {"gold": {"value": 1.5, "low": 1.0, "high": 2.0}}
        write_json(made / "evaluation.json", {"rewards": rewards, "kl": {"value": None}, "pairs": 7, "text": "x"})
        return results

    return produce(Provenance(folder, "python train.py", {}), "eval", "policy", {}, {}, make)


def test_a_metric_is_any_number_that_the_folder_says(tmp_path):
    made = artifact(tmp_path, metric=1.5, coefficients={"mean": 0.25}, last={"loss": 9.0})
    assert stage_metric(made, None) == 1.5
    assert stage_metric(made, "rewards.gold") == 1.5
    assert stage_metric(made, "pairs") == 7
    assert stage_metric(made, "coefficients.mean") == 0.25
    assert stage_metric(made, "loss") == 19.5  # of the last two steps of 20


def test_a_metric_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    made = artifact(tmp_path)
    assert stage_metric(made, None) is None
    with pytest.raises(UserError, match=r"metric=rewards: there is no such .* it has kl, loss, pairs, rewards.gold$"):
        stage_metric(made, "rewards")
    with pytest.raises(UserError, match="metric=kl has no value"):
        stage_metric(made, "kl")


def test_every_stage_returns_what_the_config_names_also_when_it_was_done_already(tmp_path):
    wanted = {
        "sft": "loss",
        "rm": "loss",
        "diffmodel": "gradient_norm",
        "score": "records",
        "align": "coefficients.mean",
        "eval": "rewards.gold",
    }
    for stage, metric in wanted.items():
        overrides = [*TINY, f"run_dir={tmp_path}", f"stage={stage}", "rc=reward", f"metric={metric}"]
        first, again = (run_config(compose_config(overrides), overrides) for _ in range(2))
        assert isinstance(first, int | float)
        assert first == again


def test_what_cannot_be_a_metric_is_refused_before_any_work():
    with pytest.raises(UserError, match="stage=report returns nothing"):
        compose_config(["stage=report", "metric=loss"])
    with pytest.raises(UserError, match=r"the judge of metric=rewards\.human"):
        compose_config(["stage=eval", "metric=rewards.human"])
