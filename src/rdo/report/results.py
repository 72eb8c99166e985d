"""What is evaluated in a run folder, as one pandas frame: a row an evaluation; and rows of a comparison, over seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import hypot, isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rdo.evaluation import EVALUATION, GENERATIONS
from rdo.evaluation.numbers import Number, as_number, estimates
from rdo.objectives.intervals import mean_interval
from rdo.runtime.errors import UserError
from rdo.runtime.files import read_json, read_json_lines
from rdo.runtime.lineage import SUBJECT, determinants
from rdo.runtime.store import MANIFEST, read_manifest
from rdo.tracking import METRICS

ABLATIONS = {"shuffle": "R shuffled over pairs", "filter": "pairs with R < 0 left out, no coefficient"}
KINDS = ["reward", "diff", "base", "policy"]
CURVES = ["loss", "accuracy", "implicit_reward_accuracy"]
CURVE_POINTS = 100  # of a training curve, each a mean of the steps since the last
SHOWN_LENGTH = 16  # of a setting's value in a name: fingerprints are longer

Run = Mapping[str, Any]  # a line of the frame: one evaluation


@dataclass
class Row:
    """One row of a comparison. kind: policy, base, reward or diff; runs: its evaluations, lines of the frame by seed;
    settings: those that are not the same in all rows, by their names on the command line."""

    name: str
    data: str
    kind: str
    loss: str
    rc: str
    ablation: str
    runs: dict[int, Run]
    settings: dict[str, Any]
    baseline: Row | None = None

    @property
    def ablation_in_words(self) -> str | None:
        """What the row is without, in words; None of an ordinary one."""
        return ABLATIONS.get(self.ablation) or ("R from the true reward" if self.rc == "gold" else None)

    def number(self, key: str) -> Number | None:
        """A quantity ("rewards.gold"): with one seed and its own interval, with several their mean and t interval."""
        return over_seeds(number_of(run, key) for run in self.runs.values())


def over_seeds(numbers: Iterable[Number]) -> Number | None:
    """Several seeds' mean with its t interval, or one seed's own."""
    known = [one for one in numbers if not isnan(one.value)]
    return known[0] if len(known) == 1 else as_number(mean_interval(one.value for one in known)) if known else None


def number_of(run: Run, key: str) -> Number:
    """A quantity of one evaluation."""
    return Number(*(run.get(f"{key}.{end}", nan) for end in Number._fields))


def difference(first: Row, second: Row, key: str) -> Number | None:
    """One row minus another: seed by seed where they share several, else as `between` has it."""
    seeds = first.runs.keys() & second.runs.keys()
    return over_seeds(between(first.runs[seed], second.runs[seed], key) for seed in sorted(seeds))


def between(run: Run, other: Run, key: str) -> Number:
    """One evaluation minus another: rewards prompt by prompt, anything else as independent quantities."""
    if key.startswith("rewards."):
        own, others = (rewards(one["folder"], key.removeprefix("rewards.")) for one in (run, other))
        changes = (own - others).dropna()
        return as_number(mean_interval(changes, list(changes.index.get_level_values("query"))))
    own, others = number_of(run, key), number_of(other, key)
    value, half = own.value - others.value, hypot(own.high - own.low, others.high - others.low) / 2
    return Number(value, value - half, value + half)


@cache
def rewards(folder: str, judge: str) -> pd.Series[float]:
    """The rewards of a policy's responses, by prompt: its record's id, and the query."""
    lines = read_json_lines(Path(folder) / GENERATIONS)
    prompts = pd.MultiIndex.from_tuples([(line["id"], line["query"]) for line in lines], names=["id", "query"])
    return pd.Series([line["rewards"][judge] for line in lines], prompts, dtype=float)


# ---------------------------------------------------------------------------------------------------------------------
# The frame
# ---------------------------------------------------------------------------------------------------------------------


def frame_of(run_dir: Path) -> tuple[pd.DataFrame, list[str]]:
    """Every finished evaluation of a run folder, and why others cannot be shown. Columns: name, folder, row, data,
    kind, loss, rc, ablation, seed, baseline (its folder), `settings.*` (as JSON; those that differ), and of each
    quantity `.value`, `.low`, `.high`."""
    records, problems = [], []
    for path in sorted((run_dir / "eval").glob(f"*/{MANIFEST}")):
        try:
            records.append(record_of(run_dir, path.parent, read_manifest(path.parent)))
        except (UserError, OSError) as error:
            problems.append(str(error))
    for record in records:
        if other := baseline_of(record, records):
            record["baseline"] = other["folder"]
            judges = [key.split(".")[1] for key in record if key.startswith("rewards.") and key.endswith(".value")]
            differences = {judge: between(record, other, f"rewards.{judge}") for judge in judges}
            record |= columns({"difference": {judge: one._asdict() for judge, one in differences.items()}})
    frame = pd.DataFrame(records)
    if records:
        frame.insert(0, "name", names(frame))
    same = [column for column in frame.filter(regex=r"^settings\.") if frame[column].nunique() < 2]
    return frame.drop(columns=["alike", "parents", *same], errors="ignore"), problems


def columns(results: Mapping[str, Any]) -> dict[str, float]:
    """Every number of nested results, with the ends of its interval where it has one."""
    found = {name: as_number(estimate)._asdict() for name, estimate in estimates(results)}
    ends = {f"{name}.{end}": value for name, number in found.items() for end, value in number.items()}
    return {name: value for name, value in ends.items() if name.endswith(".value") or not isnan(value)}


def record_of(run_dir: Path, folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """One evaluation: what it is of, and its numbers."""
    config, inputs = manifest["config"], manifest["inputs"]
    dataset = config["dataset"]
    subject = run_dir / inputs[next(name for name in SUBJECT if name in inputs)]["folder"]
    record = {
        "folder": str(folder),
        "trained": str(subject),
        "row": config.get("row", "none"),
        "label": manifest["label"],
        "kind": manifest["label"].removeprefix("scorer-") if "scorer" in inputs else "policy",
        "data": dataset["name"],
        "source": " ".join(str(dataset[key]) for key in ("source", "path", "hub_name") if dataset[key]),
        "template": dataset["template"],
        "max_length": dataset["max_length"],
        "seed": config["seed"],
        "split": manifest["settings"]["data"]["split"],
        "finished": manifest["finished"],
        "command": manifest["command"],
        "baseline": None,
        **dict.fromkeys(("loss", "rc", "ablation"), "none"),
        # As JSON texts, which compare whatever they are.
        **{
            f"settings.{short(key)}": json.dumps(value)
            for key, value in determinants(run_dir, manifest, SUBJECT).items()
        },
        **columns(read_json(folder / EVALUATION)),
    }
    if "scorer" in inputs:
        return record
    if "base" not in inputs:  # others are compared with it, and whichever came first has made it
        return record | {"kind": "base", "row": "base"}
    policy = read_json(subject / MANIFEST)
    rc = policy["settings"]["rc"] or {"name": "none", "ablation": "none"}
    shared = [{key: value for key, value in policy["settings"].items() if key != "rc"}]
    shared += [{k: v for k, v in manifest["settings"].items() if k not in ("judges", "difference_template")}]
    trained = {key: policy["results"].get(key) for key in ("records", "coefficients")}
    return record | {
        "loss": policy["settings"]["loss"]["name"],
        "rc": rc["name"],
        "ablation": rc["ablation"],
        "alike": json.dumps(shared, sort_keys=True),
        "parents": [f"{name} {entry['key']}" for name, entry in policy["inputs"].items()],
        **columns(trained),
    }


def short(key: str) -> str:
    """A setting of a manifest by its name on the command line, or near to it."""
    for old, new in (("align.loss.settings.", "loss."), ("align.rc.", "rc."), ("align.loss.", "loss.")):
        key = key.replace(old, new)
    return key.replace(".training.", ".")


def baseline_of(record: Mapping[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The evaluation that a row is compared with: of a policy with the same loss, training, data and seed, made of the
    same models and scores as far as it reads any, and evaluated alike, but without coefficients. Of several, which
    differ in their judges alone, the one with this row's."""
    if record["kind"] != "policy" or record["rc"] == "none":
        return None
    found = [
        other
        for other in records
        if other["kind"] == "policy" and other["rc"] == "none" and other["alike"] == record["alike"]
        if set(other["parents"]) <= set(record["parents"])
    ]
    judges = record["settings.eval.judges"]
    return min(found, key=lambda other: other["settings.eval.judges"] != judges, default=None)


def names(frame: pd.DataFrame) -> pd.Series[str]:
    """What each evaluation's row is called: its file of conf/row or its label, with the settings that tell it from
    others of that name, and where nothing does (models of the user's, say) with the end of its folder's name."""
    found = frame["row"].where(frame["row"] != "none", frame["label"])
    settings = frame.filter(regex=r"^settings\.")
    for _, group in settings.groupby([frame["data"], found]):
        for key in group.columns[group.nunique(dropna=False) > 1]:
            said = group[key].fillna("-").str.strip('"').str[:SHOWN_LENGTH]
            found[group.index] += f", {key.removeprefix('settings.')}=" + said
    twice = pd.concat([frame["data"], found, frame["seed"]], axis=1).duplicated(keep=False)
    return found.where(~twice, found + ", " + frame["folder"].str[-10:])


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


def rows_of(frame: pd.DataFrame) -> list[Row]:
    """The rows of a frame: evaluations that differ in their seed alone are one."""
    lines: dict[Any, Run] = frame.astype(object).T.to_dict()  # much faster to read than a frame of so many columns
    found: dict[str, Row] = {}
    rows = []
    for places in frame.groupby(["data", "name"]).groups.values():
        runs = [lines[place] for place in places]
        first, prefix = runs[0], "settings."
        texts = {key.removeprefix(prefix): text for key, text in first.items() if key.startswith(prefix)}
        settings = {key: json.loads(text) for key, text in texts.items() if isinstance(text, str)}
        told = {key: first[key] for key in ("name", "data", "kind", "loss", "rc", "ablation")}
        rows.append(Row(**told, runs={run["seed"]: run for run in runs}, settings=settings))
        found |= {run["folder"]: rows[-1] for run in runs}
    for run in lines.values():
        if run["baseline"] in found:
            found[run["folder"]].baseline = found[run["baseline"]]
    return sorted(
        rows, key=lambda r: (r.data, KINDS.index(r.kind), r.loss, r.ablation_in_words or "", r.rc != "none", r.name)
    )


def sweeps(rows: Iterable[Row]) -> dict[str, list[list[Row]]]:
    """By setting with numbers for values: the lines along it, each of rows that differ in nothing else, in order."""
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        for name, value in row.settings.items():
            if type(value) in (int, float):
                others = [row.data, row.kind, row.loss, row.rc, row.ablation, {**row.settings, name: None}]
                lines.setdefault((name, json.dumps(others, sort_keys=True)), []).append(row)
    found: dict[str, list[list[Row]]] = {}
    for (name, _), line in lines.items():
        if len(line) > 1:
            found.setdefault(name, []).append(sorted(line, key=lambda row: row.settings[name]))
    return found


def at_equal_kl(line: Sequence[Row], judge: str) -> tuple[float, float, float] | None:
    """How much higher a method's curve of reward against KL lies than its baselines' where both are known (the mean, by
    interpolation), and from which KL to which; None where the curves do not overlap."""
    bases = {row.baseline.name: row.baseline for row in line if row.baseline}.values()
    curves = []
    for rows in (line, bases):
        points = [(row.number("kl"), row.number(f"rewards.{judge}")) for row in rows]
        known = sorted((kl.value, reward.value) for kl, reward in points if kl and reward)
        if not known:
            return None
        curves.append(np.array(known, float).T)
    low, high = max(curve[0][0] for curve in curves), min(curve[0][-1] for curve in curves)
    if low > high:
        return None
    grid = np.linspace(low, high, 9)
    own, base = (np.interp(grid, *curve) for curve in curves)
    return float((own - base).mean()), low, high


def training_curves(row: Row) -> pd.DataFrame:
    """What training logged, by step: the mean over seeds, thinned."""
    files = [Path(run["trained"]) / METRICS for run in row.runs.values()]
    logs = [pd.DataFrame(read_json_lines(file)) for file in files if file.exists()]
    if not logs:
        return pd.DataFrame()
    mean = pd.concat(logs).groupby("step").mean(numeric_only=True)
    width = max(1, len(mean) // CURVE_POINTS)
    thinned = mean.filter(CURVES).groupby(np.arange(len(mean)) // width).mean()
    return thinned.set_axis(mean.index[width - 1 :: width].union(mean.index[-1:]))
