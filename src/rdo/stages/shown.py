"""What wandb shows of a finished evaluation: numbers and tables, handed to the tracker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rdo import tracking
from rdo.evaluation import EVALUATION, GENERATIONS
from rdo.evaluation.numbers import estimates
from rdo.runtime.files import read_json, read_json_lines
from rdo.runtime.lineage import SUBJECT, determinants
from rdo.runtime.processes import is_rank0
from rdo.runtime.store import Artifact
from rdo.stages.run import Run

SAMPLES = 256  # rows of the table of samples
# What sweeps run over, as manifests name it.
SWEPT = ("align.rc.alpha", "align.loss.settings.beta", "diffmodel.training.beta0", "diffmodel.training.beta1")
Table = tuple[list[str], list[list[Any]]]


def show_evaluation(run: Run, artifact: Artifact) -> None:
    """Shows a finished evaluation in wandb, if tracker=wandb. `made` in its config holds what sweeps run over, where it
    has an effect on it; the rest of the config is that of the job that came first."""
    if run.config.tracker.name != "wandb" or not is_rank0():
        return
    manifest, evaluation = artifact.manifest(), read_json(artifact.folder / EVALUATION)
    settings = determinants(run.provenance.run_dir, manifest, SUBJECT)
    made = {name.rpartition(".")[2]: settings[name] for name in SWEPT if name in settings}
    tables = scorer_shown(evaluation) if "label_accuracy" in evaluation else policy_shown(artifact, evaluation)
    columns = ["value", "low", "high", "count"]
    rows = [[name.replace(".", "/"), *map(found.get, columns)] for name, found in estimates(evaluation)]
    tables["tables/evaluation"] = ["quantity", *columns], rows
    tracking.show(
        run.config.tracker,
        artifact.folder,
        {**run.provenance.config, "made": made},
        numbers(evaluation) | main_reward(manifest, evaluation),
        tables,
    )


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Every number of nested results by its path, "rewards/gold", with the ends of its interval, "rewards/gold_low"."""
    return {
        name.replace(".", "/") + suffix: estimate[end]
        for name, estimate in estimates(values)
        for end, suffix in (("value", ""), ("low", "_low"), ("high", "_high"))
        if estimate.get(end) is not None
    }


def main_reward(manifest: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, float]:
    """An aligned policy's mean reward by the first of eval.judges that gives rewards, under one name for every data
    set. The base policy has none: it is no point of a sweep."""
    judges = manifest["settings"]["judges"] if "base" in manifest["inputs"] else []
    rewards = [evaluation["rewards"][judge] for judge in judges if judge in evaluation["rewards"]]
    return numbers({"reward": rewards[0]}) if rewards else {}


def policy_shown(artifact: Artifact, evaluation: Mapping[str, Any]) -> dict[str, Table]:
    """Samples with their rewards, and wins against the base policy."""
    lines = read_json_lines(artifact.folder / GENERATIONS)[:SAMPLES]
    judges, names = list(evaluation["rewards"]), ["id", "query", "response", "stopped"]
    samples = [[*map(line.get, names), *(line["rewards"][judge] for judge in judges)] for line in lines]
    tables: dict[str, Table] = {"tables/samples": ([*names, *(f"reward/{judge}" for judge in judges)], samples)}
    if compared := evaluation["against_base"]:
        parts = ("win", "tie", "lose")
        rows = [[judge, *(counts[part]["value"] for part in parts)] for judge, counts in compared.items()]
        tables["tables/against_base"] = ["judge", *parts], rows
    return tables


def scorer_shown(evaluation: Mapping[str, Any]) -> dict[str, Table]:
    """Accuracy in the four quarters of |R|."""
    columns = ["quarter of |R|", "low", "high", "pairs", "label accuracy", "gold accuracy"]
    rows = [
        [quarter, *map(part.get, ("low", "high", "count")), part["label_accuracy"]["value"], gold and gold["value"]]
        for quarter, part in enumerate(evaluation["by_confidence"], start=1)
        for gold in [part["gold_accuracy"]]
    ]
    return {"tables/by_confidence": (columns, rows)}
