"""`python train.py` as a user runs it: whole pipelines on a tiny world, sweeps, and errors of one line."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from rdo.artifacts import Provenance
from rdo.checks import CONF, compose_config, plain
from rdo.errors import UserError
from rdo.main import check_command_line, score
from rdo.run import Run
from rdo.schema import Stage
from rdo.stages.align import aligned_policy
from rdo.stages.report import make_report
from rdo.stages.scorer import scorer
from tiny import CACHE, TINY, tiny_run, weights

ROOT = Path(__file__).parents[1]
# The rows of the toy world set align.max_records themselves.
PIPELINE = [setting for setting in TINY if not setting.startswith("align.")]
Stamps = dict[Path, int]


def train_apart(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs train.py in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def train_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs train.py in this process, which spares the seconds of importing everything."""

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), *arguments])
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")

    return run


def artifacts(run_dir: Path) -> Stamps:
    """When each finished folder was finished."""
    return {file.parent.relative_to(run_dir): file.stat().st_mtime_ns for file in run_dir.glob("*/*/manifest.json")}


def names(folders: set[Path]) -> list[str]:
    """Stage and label of artifact folders, without the keys."""
    return sorted(str(folder).rpartition("-")[0] for folder in folders)


def report(run_dir: Path, *overrides: str, build: bool) -> dict[str, Any]:
    """Makes a report in this process; what report.json holds."""
    given = [*PIPELINE, f"run_dir={run_dir}", *overrides]
    config = compose_config(given)
    run = Run(config, Provenance(run_dir, "python train.py", plain(config), build), "report", CACHE)
    make_report(run, given, build=build)
    return json.loads((run_dir / "report" / "report.json").read_text())


def row_names(data: dict[str, Any]) -> set[str]:
    return {row["name"] for row in [*data["scorers"], *data["policies"]]}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole pipeline, which the tests below copy or leave as it is."""
    run_dir = tmp_path_factory.mktemp("pipeline") / "run"
    done = train_apart(*PIPELINE, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    assert f"report: {run_dir / 'report' / 'report.html'}" in done.stdout
    return run_dir


@pytest.fixture
def copied(pipeline: Path, tmp_path: Path) -> Path:
    """A copy with the same times, to be changed."""
    return shutil.copytree(pipeline, tmp_path / "run")


def test_a_pipeline_reports_every_row(pipeline):
    rows = compose_config([]).report.rows
    data = json.loads((pipeline / "report" / "report.json").read_text())
    assert row_names(data) == set(rows)
    assert len(data["scorers"]) + len(data["policies"]) == len(rows)
    assert data["missing"] == []
    for file in ("report.html", "report.md"):
        text = (pipeline / "report" / file).read_text()
        assert all(name in text for name in rows)
    evaluation = next(row for row in data["policies"] if row["name"] == "dpo + diff")["evaluation"]
    assert evaluation["prompts"] == 8
    assert {"oracle", "reward"} <= evaluation["rewards"].keys()
    assert not list(pipeline.rglob("*.part"))
    assert not list(pipeline.rglob("checkpoints"))


def test_manifests_name_the_command_of_their_row(pipeline):
    folder = min(
        (pipeline / "align").glob("dpo-diff-*"), key=lambda folder: (folder / "manifest.json").stat().st_mtime_ns
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["config"]["rc"]["name"] == "diff"
    assert manifest["command"].startswith("python train.py stage=eval ")
    assert manifest["command"].endswith("loss=dpo rc=diff")
    for entry in manifest["inputs"].values():
        assert json.loads((pipeline / entry["folder"] / "manifest.json").read_text())["key"] == entry["key"]


def test_a_second_pipeline_makes_nothing_again(copied, monkeypatch):
    before = artifacts(copied)
    monkeypatch.setattr("rdo.artifacts.held", lambda folder: pytest.fail(f"{folder} is made again"))
    data = report(copied, build=True)
    assert data["missing"] == []
    assert artifacts(copied) == before


def test_a_changed_setting_remakes_what_depends_on_it_and_nothing_else(copied):
    before = artifacts(copied)
    report(copied, "diffmodel.beta0=0.2", build=True)
    after = artifacts(copied)
    assert {folder: after[folder] for folder in before} == before
    # The difference model judges every policy against the base policy, so these evaluations depend on it; neither the
    # base policy's own nor the reward model nor the policies that know nothing of it do.
    policies = ["dpo-none", "dpo-oracle-0.5", "dpo-reward-0.5", "dpo-reward-filter", "dpo-reward-0.5-shuffle"]
    policies += ["dpo-none", "dpo-reward-0.5"]  # at a second learning rate
    policies += ["rrhf-none", "rrhf-oracle-0.5", "rrhf-diff-0.5", "rrhf-reward-0.5", "rrhf-reward-0.5-shuffle"]
    dpo_diff = 2 * ["dpo-diff-0.5"]  # forward, and both orders
    assert names(after.keys() - before.keys()) == sorted(
        ["diffmodel/paper", "score/diff-test", *(3 * ["score/diff-train"])]
        + ["align/rrhf-diff-0.5", "eval/scorer-diff", *(f"align/{policy}" for policy in dpo_diff)]
        + [f"eval/{policy}" for policy in [*policies, *dpo_diff]]
    )


def test_a_report_alone_makes_nothing_and_names_what_is_missing(copied):
    shutil.rmtree(next((copied / "eval").glob("dpo-reward-0.5-shuffle-*")))
    (gone,) = (copied / "rm").iterdir()
    manifest = (gone / "manifest.json").read_text()
    (gone / "manifest.json").unlink()
    before = artifacts(copied)
    data = report(copied, build=False)
    assert artifacts(copied) == before
    rows = set(compose_config([]).report.rows)
    # Every row but the difference model's own needs the reward model, as scorer or as judge.
    assert row_names(data) == {"difference model"}
    assert set(data["missing"]) == {f"{name}, seed 0" for name in rows - {"difference model"}}
    (gone / "manifest.json").write_text(manifest)
    data = report(copied, build=False)
    assert data["missing"] == ["dpo + reward shuffled, seed 0"]
    assert "dpo + reward shuffled, seed 0" in (copied / "report" / "report.md").read_text()


def test_a_row_that_fails_costs_no_other_row(tmp_path):
    """The second row cannot run (a head on no such folder); the others are reported, and the end is an error."""
    config = compose_config([*PIPELINE, f"run_dir={tmp_path}"])
    config.report.rows = {
        "base": ["eval.subject=base", "eval.judges=[oracle]"],
        "bad": ["eval.subject=reward", "rm.path=./nowhere"],
    }
    run = Run(config, Provenance(tmp_path, "python train.py", plain(config)), "pipeline")
    with pytest.raises(UserError, match="1 of 2 rows failed: bad, seed 0"):
        make_report(run, [*PIPELINE, f"run_dir={tmp_path}"], build=True)
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [row["name"] for row in data["policies"]] == ["base"]
    assert data["missing"] == ["bad, seed 0: rm.path=./nowhere: there is no such folder"]
    config.report.rows = {"bad": config.report.rows["bad"]}
    with pytest.raises(UserError, match=r"^rm\.path=\./nowhere: there is no such folder"):
        make_report(run, [*PIPELINE, f"run_dir={tmp_path}"], build=True)


def test_a_report_of_nothing_names_every_row_with_the_seed_that_was_given(tmp_path):
    data = report(tmp_path, "seed=5", build=False)
    assert data["missing"] == [f"{name}, seed 5" for name in compose_config([]).report.rows]
    for command in data["commands"].values():
        assert compose_config(command.split()[2:]).seed == 5
    assert artifacts(tmp_path) == {}


def test_a_sweep_over_alpha_scores_once_and_alpha_0_changes_nothing(pipeline, tmp_path, train_here):
    run_dir = tmp_path / "run"
    for stage in ("sft", "diffmodel"):
        shutil.copytree(pipeline / stage, run_dir / stage)
    before = artifacts(run_dir)
    arguments = ["rc=diff", "rc.alpha=0,0.25,1", "stage=align", *PIPELINE, f"run_dir={run_dir}"]
    train_here("-m", *arguments)
    after = artifacts(run_dir)
    policies = ["align/dpo-diff-0", "align/dpo-diff-0.25", "align/dpo-diff-1"]
    assert names(after.keys() - before.keys()) == sorted([*policies, "reference/responses", "score/diff-train"])
    found = {name: next(run_dir.glob(f"{name}-??????????")) / "model/model.safetensors" for name in policies}
    without = {file.read_bytes() for file in pipeline.glob("align/dpo-none-*/model/model.safetensors")}
    assert len(without) == 2  # at two learning rates
    assert found["align/dpo-diff-0"].read_bytes() in without
    assert len({file.read_bytes() for file in found.values()}) == 3


def test_a_scorer_that_the_user_brings_is_used_as_it_is(pipeline, tmp_path):
    (own,) = (pipeline / "rm").iterdir()
    run = tiny_run(tmp_path, f"rm.path={own}")
    brought = scorer(run, "reward")
    assert brought.folder == own
    assert weights(brought)
    assert not (tmp_path / "rm").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Errors and help
# ---------------------------------------------------------------------------------------------------------------------


def test_a_mistake_is_one_line_on_stderr(tmp_path):
    done = train_apart("rc.alhpa=0.5", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: rc.alhpa: there is no such setting (did you mean rc.alpha?)")
    assert not (tmp_path / "run").exists()


def test_an_error_of_the_data_is_one_line_and_a_traceback_on_demand(tmp_path, train_here, capsys, monkeypatch):
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"query": "a", "responses": ["b", "c"], "preferences": [[0, 7]]}\n')
    arguments = ["stage=sft", "dataset=file", f"dataset.path={data}", "model=small", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as ended:
        train_here(*arguments)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "pairs.jsonl, line 1" in line
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    for given, named in ((arguments, "pairs.jsonl, line 1"), (["rc.alhpa=0.5"], "rc.alhpa")):
        with pytest.raises(SystemExit):
            train_here(*given)
        first, *_, last = capsys.readouterr().err.strip().splitlines()
        assert first == "Traceback (most recent call last):"
        assert named in last


def test_a_ranking_by_scores_that_the_data_has_not_is_refused(tmp_path):
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"question {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["model=small", "model.vocabulary_size=300", "model.hidden_size=24", "model.layers=1", "sft.epochs=1"]
    given = ["dataset=file", f"dataset.path={data}", *small, "loss=rrhf", "loss.ranking=scores"]
    with pytest.raises(UserError, match=r"loss.ranking=scores: .*pairs\.jsonl, line 1 brings no scores"):
        aligned_policy(tiny_run(tmp_path / "run", *given))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-m", "rc=diff", "rc.alpha=0.5,2"], "rc.alpha=2: must be"),
        (["--multirun", "loss=dpo,dpoo"], "loss=dpoo: must be one of"),
        (["loss=dpo,kto"], "add --multirun"),
        (["stage=align", "seed=one"], "seed"),
    ],
)
def test_mistakes_of_sweeps_are_found_before_the_first_job(capsys, arguments, named):
    with pytest.raises(SystemExit) as ended:
        check_command_line(arguments)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert named in line


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["-m", "rc.alpha=0,1"], ["stage=align"], []])
def test_a_command_line_without_mistake_is_let_through(capsys, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_command_line(arguments) == arguments
    assert capsys.readouterr().err == ""


def test_help_shows_every_stage_and_group(train_here, capsys):
    with pytest.raises(SystemExit) as ended:
        train_here("--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for stage in get_args(Stage):
        assert f"\n  {stage} " in shown
    for group in (folder for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra"):
        assert f"\n{group.name}: {', '.join(sorted(file.stem for file in group.iterdir()))}\n" in shown
    assert "--debug" in shown
    assert "hydra/launcher=slurm" in shown


def test_a_score_stage_needs_a_scorer():
    with pytest.raises(UserError, match="rc=reward or rc=diff"):
        score(tiny_run(Path("unused"), "rc=none"))
