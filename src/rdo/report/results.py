"""What is evaluated in a run folder, as one pandas frame: a row an evaluation; and rows of a comparison, over seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import hypot, nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rdo.evaluation import EVALUATION, GENERATIONS
from rdo.objectives.intervals import mean_interval
from rdo.report.tables import Number, as_number
from rdo.runtime.errors import UserError
from rdo.runtime.files import read_json, read_json_lines
from rdo.runtime.lineage import SUBJECT, determinants
from rdo.runtime.store import MANIFEST, read_manifest
from rdo.tracking import METRICS

ENDS = ("low", "high")
ABLATIONS = {"shuffle": "R shuffled over pairs", "filter": "pairs with R < 0 left out, no coefficient"}
CURVE_POINTS = 100  # of a training curve, each a mean of the steps since the last
CURVES = ("loss", "accuracy", "implicit_reward_accuracy")
SHOWN_LENGTH = 16  # of a setting's value in a name: fingerprints are longer


@dataclass
class Row:
    """One row of a comparison. kind: policy, base, reward or diff; runs: its evaluations, rows of the frame by seed;
    settings: those that differ between the rows on the same data, by their names on the command line."""

    name: str
    data: str
    kind: str
    loss: str
    rc: str
    ablation: str
    runs: pd.DataFrame
    settings: dict[str, Any]
    baseline: Row | None = None

    @property
    def ablation_in_words(self) -> str | None:
        """What the row is without, in words; None of an ordinary one."""
        return ABLATIONS.get(self.ablation) or ("R from the true reward" if self.rc == "gold" else None)

    @property
    def judges(self) -> list[str]:
        """Who has given its responses rewards; the true reward first."""
        found = self.runs.filter(regex=r"^rewards\..*\.value$").dropna(axis=1, how="all")
        return sorted((name.split(".")[1] for name in found), key=lambda judge: judge != "gold")

    def number(self, key: str) -> Number | None:
        """A quantity ("rewards.gold"): with one seed and its own interval, with several their mean and t interval."""
        values = self.runs.get(f"{key}.value", pd.Series(dtype=float)).dropna()
        if len(values) != 1:
            return as_number(mean_interval(values))
        ends = (self.runs.at[values.index[0], f"{key}.{end}"] if f"{key}.{end}" in self.runs else nan for end in ENDS)
        return Number(float(values.iloc[0]), *(float(nan if end is None else end) for end in ends))


def frame_of(run_dir: Path) -> tuple[pd.DataFrame, list[str]]:
    """Every finished evaluation of a run folder, and why others cannot be shown. Columns: folder, row, data, kind,
    loss, rc, ablation, seed, baseline (its folder), `settings.*`, and of each quantity `.value`, `.low`, `.high`."""
    records, problems = [], []
    for path in sorted((run_dir / "eval").glob(f"*/{MANIFEST}")):
        try:
            records.append(record_of(run_dir, path.parent, read_manifest(path.parent)))
        except (UserError, OSError) as error:
            problems.append(str(error))
    for record in records:
        if other := baseline_of(record, records):
            record |= {"baseline": other["folder"], "difference": paired(record, other)}
    return pd.json_normalize(records), problems


def record_of(run_dir: Path, folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """One evaluation: what it is of, and its numbers."""
    evaluation, inputs = read_json(folder / EVALUATION), manifest["inputs"]
    quarters = {str(n): quarter for n, quarter in enumerate(evaluation.pop("by_confidence", []), start=1)}
    evaluation.pop("differences", None)
    config = manifest["config"]
    record = {
        "folder": str(folder),
        "row": config.get("row", "none"),
        "label": manifest["label"],
        "data": config["dataset"]["name"],
        "source": " ".join(
            str(config["dataset"][key]) for key in ("source", "path", "hub_name") if config["dataset"][key]
        ),
        "template": config["dataset"]["template"],
        "max_length": config["dataset"]["max_length"],
        "seed": config["seed"],
        "split": manifest["settings"]["data"]["split"],
        "finished": manifest["finished"],
        "command": manifest["command"],
        "baseline": None,
        **dict.fromkeys(("loss", "rc", "ablation"), "none"),
        # As JSON texts, which compare whatever they are: all, and without those of the judges.
        "judged": {short(key): json.dumps(value) for key, value in determinants(run_dir, manifest).items()},
        "settings": {short(key): json.dumps(value) for key, value in determinants(run_dir, manifest, SUBJECT).items()},
        **numbers({**evaluation, "by_confidence": quarters}),
    }
    subject = run_dir / inputs[next(name for name in SUBJECT if name in inputs)]["folder"]
    if "scorer" in inputs:
        return record | {"kind": manifest["label"].removeprefix("scorer-"), "trained": str(subject)}
    if "base" not in inputs:  # others are compared with it, and whichever came first has made it
        return record | {"kind": "base", "row": "base", "trained": str(subject)}
    policy = read_json(subject / MANIFEST)
    rc = policy["settings"]["rc"] or {"name": "none", "ablation": "none"}
    shared = [{key: value for key, value in policy["settings"].items() if key != "rc"}]
    shared += [{k: v for k, v in manifest["settings"].items() if k not in ("judges", "difference_template")}]
    return record | {
        "kind": "policy",
        "loss": policy["settings"]["loss"]["name"],
        "rc": rc["name"],
        "ablation": rc["ablation"],
        "trained": str(subject),
        "records": {"value": policy["results"].get("records")},
        "coefficients": numbers(policy["results"].get("coefficients") or {}),
        "alike": json.dumps(shared, sort_keys=True),
        "parents": [f"{name} {entry['key']}" for name, entry in policy["inputs"].items()],
    }


def numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested numbers, each with its value, and where it is an estimate with its ends."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found[name] = value if "value" in value else numbers(value)
        elif isinstance(value, int | float):
            found[name] = {"value": value}
    return found


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
    judges = record["judged"].get("eval.judges")
    return min(found, key=lambda other: other["judged"].get("eval.judges") != judges, default=None)


def paired(record: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """How much better one policy's responses are than another's to the same prompts, by judge; and how much its KL."""
    found: dict[str, Any] = {}
    for judge in record["rewards"].keys() & other["rewards"].keys():
        own, base = (rewards(one["folder"], judge) for one in (record, other))
        found[judge] = mean_interval((own - base).dropna())
    kl = [one["kl"]["value"] for one in (record, other)]
    return found | ({"kl": {"value": kl[0] - kl[1]}} if None not in kl else {})


@cache
def rewards(folder: str, judge: str) -> pd.Series[float]:
    """The rewards of a policy's responses, by prompt."""
    lines = read_json_lines(Path(folder) / GENERATIONS)
    return pd.Series({line["id"]: line["rewards"][judge] for line in lines}, dtype=float)


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


def rows_of(frame: pd.DataFrame) -> list[Row]:
    """The rows of a frame: evaluations that differ in their seed alone are one. Gives the frame their names, and leaves
    of the settings those that differ in it."""
    frame["name"] = frame["row"].where(frame["row"] != "none", frame["label"])
    for _, group in frame.groupby(["data", "name"]):
        for key in varying(group, "judged"):
            said = frame.loc[group.index, f"judged.{key}"].fillna("-").str.strip('"').str[:SHOWN_LENGTH]
            frame.loc[group.index, "name"] += f", {key}=" + said
    twice = frame.duplicated(["data", "name", "seed"], keep=False)  # on models of the user's, say
    frame.loc[twice, "name"] += ", " + frame.loc[twice, "folder"].str[-10:]
    found: dict[str, Row] = {}
    for (data, name), runs in frame.groupby(["data", "name"]):
        first = runs.iloc[0]
        own = varying(frame[(frame["data"] == data) & (frame["kind"] == first["kind"])], "settings")
        texts = {key: first[f"settings.{key}"] for key in own}
        settings = {key: json.loads(text) for key, text in texts.items() if isinstance(text, str)}
        kind, loss, rc, ablation = (str(first[key]) for key in ("kind", "loss", "rc", "ablation"))
        row = Row(str(name), str(data), kind, loss, rc, ablation, runs.set_index("seed"), settings)
        found |= dict.fromkeys(runs["folder"], row)
    for folder, base in frame.set_index("folder")["baseline"].dropna().items():
        found[str(folder)].baseline = found[base]
    alike = [name for name in frame if name.startswith("settings.") and frame[name].nunique() < 2]
    gone = [*alike, *frame.filter(regex=r"^judged\."), "alike", "parents"]
    frame.drop(columns=gone, errors="ignore", inplace=True)
    kinds = ["reward", "diff", "base", "policy"]
    rows = {id(row): row for row in found.values()}.values()
    return sorted(
        rows, key=lambda r: (r.data, kinds.index(r.kind), r.loss, r.ablation_in_words or "", r.rc != "none", r.name)
    )


def varying(frame: pd.DataFrame, part: str) -> list[str]:
    """The settings (of `settings` or `judged`) that are not the same in all rows."""
    names = [name for name in frame if str(name).startswith(f"{part}.")]
    return [name.partition(".")[2] for name in names if frame[name].nunique(dropna=False) > 1]


def difference(first: Row, second: Row, key: str) -> Number | None:
    """One row minus another: seed by seed where they share several, else prompt by prompt, or as independent ones."""
    own, other = (row.runs.get(f"{key}.value", pd.Series(dtype=float)) for row in (first, second))
    values = (own - other).dropna()
    if len(values) != 1:
        return as_number(mean_interval(values))
    if key.startswith("rewards."):
        judge = key.split(".")[1]
        ours, theirs = (rewards(row.runs["folder"][values.index[0]], judge) for row in (first, second))
        return as_number(mean_interval((ours - theirs).dropna()))
    half = hypot(*(number.high - number.low for row in (first, second) if (number := row.number(key)))) / 2
    return Number(float(values.iloc[0]), float(values.iloc[0]) - half, float(values.iloc[0]) + half)


def sweeps(rows: Iterable[Row]) -> dict[str, list[list[Row]]]:
    """By setting with numbers for values: the lines along it, each of rows that differ in nothing else, in order."""
    lines: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        for name, value in row.settings.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                others = {key: other for key, other in row.settings.items() if key != name}
                key = json.dumps(
                    [row.data, row.kind, row.loss, row.rc, row.ablation, others], sort_keys=True, default=str
                )
                lines.setdefault(name, {}).setdefault(key, []).append(row)
    found = {
        name: [sorted(line, key=lambda row: row.settings[name]) for line in groups.values() if len(line) > 1]
        for name, groups in lines.items()
    }
    return {name: found_lines for name, found_lines in found.items() if found_lines}


def at_equal_kl(line: Sequence[Row], judge: str) -> tuple[float, float, float] | None:
    """How much higher a method's curve of reward against KL lies than its baselines' where both are known (the mean, by
    interpolation), and from which KL to which; None where the curves do not overlap."""
    bases = list({row.baseline.name: row.baseline for row in line if row.baseline}.values())
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


def training_curves(row: Row) -> dict[str, pd.Series[float]]:
    """What training logged, by step: the mean over seeds, thinned."""
    found: dict[str, pd.Series[float]] = {}
    logs = [
        pd.DataFrame(read_json_lines(Path(folder) / METRICS))
        for folder in row.runs["trained"]
        if (Path(folder) / METRICS).exists()
    ]
    if not logs:
        return found
    mean = pd.concat(logs).groupby("step").mean(numeric_only=True)
    width = max(1, len(mean) // CURVE_POINTS)
    for name in CURVES:
        if name in mean:
            found[name] = mean[name].groupby(np.arange(len(mean)) // width).mean()
            found[name].index = mean.index[width - 1 :: width].append(mean.index[-1:])[: len(found[name])]
    return found
