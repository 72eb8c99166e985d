"""What wandb shows of an evaluation: numbers and tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rdo.evaluation import EVALUATION, GENERATIONS
from rdo.files import read_json, read_json_lines

SAMPLES = 256  # rows of the table of samples


def numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of nested results by its path, "rewards/oracle"; an estimate brings its interval, and nothing where
    it has no value."""
    found: dict[str, float] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        if is_estimate(value):
            ends = {path: value["value"], f"{path}_low": value["low"], f"{path}_high": value["high"]}
            found |= {end: number for end, number in ends.items() if number is not None}
        elif isinstance(value, Mapping):
            found |= numbers(value, f"{path}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[path] = value
    return found


def is_estimate(value: Any) -> bool:
    """Whether it is a number with its interval (evaluation.statistics.Estimate)."""
    return isinstance(value, Mapping) and {"value", "low", "high", "count"} <= value.keys()


def media(folder: Path, manifest: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Numbers for the summary, and tables, of a finished stage; empty unless it is an evaluation."""
    if EVALUATION not in manifest["files"]:
        return {}, {}
    evaluation = read_json(folder / EVALUATION)
    shown = {"tables/evaluation": estimates_table(evaluation)}
    if "label_accuracy" in evaluation:
        shown |= scorer_media(evaluation)
    else:
        shown |= policy_media(evaluation)
        shown["tables/samples"] = samples_table(read_json_lines(folder / GENERATIONS))
    return {**numbers(evaluation), **main_reward(manifest, evaluation)}, shown


def main_reward(manifest: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, float]:
    """An aligned policy's mean reward by the first of eval.judges that gives rewards, under one name for every data
    set. The base policy has none: it is no point of a sweep."""
    judges = manifest["settings"]["judges"] if "base" in manifest["inputs"] else []
    rewards = [evaluation["rewards"][judge] for judge in judges if judge in evaluation["rewards"]]
    return numbers({"reward": rewards[0]}) if rewards else {}


def estimates_table(evaluation: Mapping[str, Any]) -> Any:
    """Every estimate, a row each, with its 95 % interval and what it rests on."""
    return table(["quantity", "value", "low", "high", "count"], [[name, *row] for name, row in estimates(evaluation)])


def table(columns: list[str], rows: list[list[Any]]) -> Any:
    """A table as wandb shows it."""
    import wandb

    return wandb.Table(columns=[*columns], data=rows)


def estimates(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Names and numbers of all estimates in nested results."""
    for name, value in values.items():
        if is_estimate(value):
            yield f"{prefix}{name}", [value[key] for key in ("value", "low", "high", "count")]
        elif isinstance(value, Mapping):
            yield from estimates(value, f"{prefix}{name}/")


def samples_table(generations: list[dict[str, Any]]) -> Any:
    """Prompts, responses and their rewards."""
    judges = list(generations[0]["rewards"]) if generations else []
    columns = ["id", "query", "response", "stopped", *(f"reward/{judge}" for judge in judges)]
    rows = [
        [line["id"], line["query"], line["response"], line["stopped"], *(line["rewards"][judge] for judge in judges)]
        for line in generations[:SAMPLES]
    ]
    return table(columns, rows)


def policy_media(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Wins, ties and losses against the base policy."""
    compared = evaluation.get("against_base") or {}
    rows = [[judge, *(parts[part]["value"] for part in ("win", "tie", "lose"))] for judge, parts in compared.items()]
    return {"tables/against_base": table(["judge", "win", "tie", "lose"], rows)} if rows else {}


def scorer_media(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy in the four quarters of |R|."""
    columns = ["quarter of |R|", "low", "high", "pairs", "label accuracy", "oracle accuracy"]
    rows = [
        [
            quarter,
            part["low"],
            part["high"],
            part["count"],
            part["label_accuracy"]["value"],
            part["oracle_accuracy"]["value"] if part["oracle_accuracy"] else None,
        ]
        for quarter, part in enumerate(evaluation["by_confidence"], start=1)
    ]
    return {"tables/by_confidence": table(columns, rows)}
