"""`python train.py` as a user runs it: whole pipelines on a tiny world, sweeps, and help."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest
import torch

from rdo.checks import CONF, compose_config
from rdo.settings import Stage
from rdo.stages.scorer import scorer
from rdo.stages.sft import base_policy
from tiny import TINY, tiny_run, weights

ROOT = Path(__file__).parents[1]
# The rows of the toy world set align.max_records themselves.
PIPELINE = [setting for setting in TINY if not setting.startswith("align.")]
Stamps = dict[Path, int]


def artifacts(run_dir: Path) -> Stamps:
    """When each finished folder was finished."""
    return {file.parent.relative_to(run_dir): file.stat().st_mtime_ns for file in run_dir.glob("*/*/manifest.json")}


def names(folders: set[Path]) -> list[str]:
    """Stage and label of artifact folders, without the keys."""
    return sorted(str(folder).rpartition("-")[0] for folder in folders)


def results(run_dir: Path) -> pd.DataFrame:
    """The frame that a comparison has left."""
    return pd.read_parquet(run_dir / "report" / "results.parquet")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole pipeline, made in a process of its own, which the tests below copy or leave as it is."""
    run_dir = tmp_path_factory.mktemp("pipeline") / "run"
    command = [sys.executable, str(ROOT / "train.py"), *PIPELINE, f"run_dir={run_dir}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_TOKEN": "planted", "WANDB_API_KEY": "planted"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"report: {run_dir / 'report' / 'report.html'}" in done.stdout
    assert "planted" not in done.stdout + done.stderr
    return run_dir


@pytest.fixture
def copied(pipeline: Path, tmp_path: Path) -> Path:
    """A copy with the same times, to be changed."""
    return shutil.copytree(pipeline, tmp_path / "run")


def test_a_pipeline_reports_every_row(pipeline):
    rows = compose_config([]).rows.split(",")
    found = results(pipeline)
    assert sorted(found["name"]) == sorted(rows)
    for file in ("report.html", "report.md"):
        text = (pipeline / "report" / file).read_text().replace("\\", "")
        assert all(name in text for name in rows)
    row = found.set_index("name").loc["dpo_diff"]
    assert row["prompts.value"] == 8
    assert (row["data"], row["loss"], row["rc"], row["seed"]) == ("toy", "dpo", "diff", 0)
    assert row["baseline"] == found.set_index("name").loc["dpo", "folder"]
    numbers = ("rewards.gold", "rewards.reward", "difference.gold", "kl", "against_base.diff.win")
    assert row[[f"{name}.{part}" for name in numbers for part in ("value", "low", "high")]].notna().all()
    assert not list(pipeline.rglob("*.part"))
    assert not list(pipeline.rglob("checkpoints"))


def test_no_file_of_a_run_holds_a_secret_of_the_environment(pipeline):
    files = [file for file in pipeline.rglob("*") if file.is_file()]
    assert {"overrides.yaml", "hydra.yaml", "manifest.json"} <= {file.name for file in files}
    assert not [file for file in files if b"planted" in file.read_bytes()]


def test_manifests_name_the_command_of_their_row(pipeline):
    folder = min(
        (pipeline / "align").glob("dpo-diff-*"), key=lambda folder: (folder / "manifest.json").stat().st_mtime_ns
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["config"]["rc"]["name"] == "diff"
    assert manifest["config"]["row"] == "dpo_diff"
    assert manifest["command"].startswith("python train.py row=dpo_diff ")
    for entry in manifest["inputs"].values():
        assert json.loads((pipeline / entry["folder"] / "manifest.json").read_text())["key"] == entry["key"]


def test_two_runs_on_several_threads_end_with_the_same_bits(tmp_path):
    """Without deterministic algorithms threads add up gradients in the order in which they come."""
    runs = [tiny_run(tmp_path / name, "engine.threads=2", "sft.max_steps=20") for name in ("one", "another")]
    try:
        assert weights(base_policy(runs[0])) == weights(base_policy(runs[1]))
    finally:
        torch.set_num_threads(1)


def test_a_second_pipeline_makes_nothing_again(copied, train_here):
    before = artifacts(copied)
    train_here(*PIPELINE, f"run_dir={copied}")
    assert artifacts(copied) == before
    assert len(results(copied)) == len(compose_config([]).rows.split(","))


def test_a_changed_setting_remakes_what_depends_on_it_and_nothing_else(copied, train_here):
    before = artifacts(copied)
    train_here(
        *PIPELINE, f"run_dir={copied}", "row=reward_model,difference_model,base,dpo,dpo_diff", "diffmodel.beta0=0.2"
    )
    after = artifacts(copied)
    assert {folder: after[folder] for folder in before} == before
    # The difference model judges every policy against the base policy, so these evaluations depend on it; neither the
    # base policy's own nor the reward model nor the policies that know nothing of it do.
    assert names(after.keys() - before.keys()) == [
        "align/dpo-diff-0.5", "diffmodel/paper", "eval/dpo-diff-0.5", "eval/dpo-none", "eval/scorer-diff",
        "generate/dpo-diff-0.5", "score/diff-test", "score/diff-train",
    ]  # fmt: skip
    # Whatever is evaluated there is reported, and told apart by what it differs in.
    found = results(copied).set_index("name")
    assert {"dpo_diff, diffmodel.beta0=0.1", "dpo_diff, diffmodel.beta0=0.2", "dpo_reward"} <= set(found.index)


def test_a_report_alone_makes_nothing_and_shows_what_is_finished(copied, train_here):
    shutil.rmtree(next((copied / "eval").glob("dpo-reward-0.5-shuffle-*")))
    before = artifacts(copied)
    train_here("stage=report", *PIPELINE, f"run_dir={copied}")
    assert artifacts(copied) == before
    assert set(results(copied)["name"]) == set(compose_config([]).rows.split(",")) - {"dpo_reward_shuffled"}


def test_a_point_that_fails_costs_no_other(tmp_path, train_here, capsys):
    """The first row cannot run (a head on no such folder); the other is reported, and the end is an error."""
    with pytest.raises(SystemExit) as ended:
        train_here(*PIPELINE, f"run_dir={tmp_path}", "row=reward_model,base", "eval.judges=[gold]", "rm.path=./nowhere")
    assert ended.value.code == 1
    said = capsys.readouterr().err.splitlines()
    assert "error: rm.path=./nowhere: there is no such folder" in said
    assert said[-1] == "error: these points could not run: row=reward_model"
    assert list(results(tmp_path)["name"]) == ["base"]
    assert "rm.path=./nowhere: there is no such folder" in (tmp_path / "report" / "report.html").read_text()


def test_seeds_are_swept_like_rows(tmp_path, train_here, capsys):
    short = ["align.max_steps=2", "eval.judges=[gold]"]
    train_here(*TINY, *short, f"run_dir={tmp_path}", "row=dpo,dpo_gold", "seed=0,1")
    found = results(tmp_path)
    policies = found[found["kind"] == "policy"]
    assert sorted(zip(policies["name"], policies["seed"], strict=True)) == [
        ("dpo", 0), ("dpo", 1), ("dpo_gold", 0), ("dpo_gold", 1)
    ]  # fmt: skip
    baselines = policies.set_index("folder")["name"].reindex(policies["baseline"].dropna())
    assert list(baselines) == ["dpo", "dpo"]
    assert "(over 2 seeds)" not in capsys.readouterr().out  # the true reward's coefficients are an ablation
    # The words of any sweep: rows are one of the things that are swept. What is finished is reported, too.
    train_here("-m", "stage=eval", *TINY, *short, f"run_dir={tmp_path}", "row=dpo,kto", "loss.beta=0.1,0.3")
    policies = results(tmp_path).query("kind == 'policy'")
    assert len(policies) == 8
    assert {"kto, loss.beta=0.1", "kto, loss.beta=0.3", "dpo, loss.beta=0.2"} <= set(policies["name"])
    assert "loss.beta, by rewards.gold: " in capsys.readouterr().out


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


def test_help_shows_every_stage_and_group(train_here, capsys):
    with pytest.raises(SystemExit) as ended:
        train_here("--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for stage in (*get_args(Stage), "pipeline"):
        assert f"\n  {stage} " in shown
    for group in (folder for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra"):
        assert f"\n{group.name}: {', '.join(sorted(file.stem for file in group.iterdir()))}\n" in shown
    assert "--debug" in shown
    assert "hydra/launcher=slurm" in shown
