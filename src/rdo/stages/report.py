"""Stages report and pipeline: the rows of a comparison, each a name and the overrides that make it.

`pipeline` makes whatever is missing, row by row, then reports; `report` shows what is finished and names what is not.
Every row is an ordinary command line, shown in the report. After a sweep, report.found=true takes as rows whatever
evaluations are finished in the run folder.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rdo import distributed
from rdo.artifacts import MANIFEST, Artifact, MissingInput, code_revision, is_finished
from rdo.checks import compose_config, plain
from rdo.errors import UserError
from rdo.files import read_json, read_json_lines
from rdo.lineage import swept
from rdo.objectives.choice import choose_loss
from rdo.report.console import describe_comparison
from rdo.report.page import write_report
from rdo.report.plots import draw_overview
from rdo.report.sweep import draw_sweep
from rdo.run import Run
from rdo.schema import Config
from rdo.stages.eval import EVALUATION, GENERATIONS, evaluate_policy, evaluate_scorers
from rdo.stages.found import finished_evaluations
from rdo.stages.scorer import STAGE_OF
from rdo.tracking import METRICS

# A training curve is thinned to this many points.
CURVE_POINTS = 200


@dataclass(frozen=True)
class Row:
    """One line of the comparison in one world and for one seed."""

    name: str
    world: str
    seed: int
    command: str
    config: Config


def rows(config: Config, overrides: list[str]) -> Iterator[Row]:
    """The rows of config.report, composed on top of the user's own overrides."""
    given = [text for text in overrides if not text.lstrip("+~").startswith(("stage=", "report."))]
    if any(text.startswith("seed=") for text in given) and any(text.startswith("report.seeds=") for text in overrides):
        raise UserError("seed and report.seeds both say which seeds to run: give one of them")
    given = [text for text in given if not text.startswith("seed=")]
    keys = {text.split("=")[0].lstrip("+") for text in given}
    for world, world_overrides in (config.report.worlds or {"": []}).items():
        for seed in config.report.seeds:
            for name, row_overrides in config.report.rows.items():
                own = [*world_overrides, *row_overrides]
                clash = sorted(keys & {text.split("=")[0].lstrip("+") for text in own})
                if clash:
                    raise UserError(
                        f"{clash[0]} is what the rows of the comparison differ in (row {name!r}); change report.rows, "
                        "or run one row alone with stage=align or stage=eval"
                    )
                everything = [*given, f"seed={seed}", *own]
                try:
                    row_config = compose_config(everything)
                except UserError as error:
                    raise UserError(f"row {name!r}: {error}") from error
                command = shlex.join(["python", "train.py", "stage=eval", *everything])
                yield Row(name, world, seed, command, row_config)


@dataclass
class Results:
    """What rows came to: entries of the report, names of rows not finished, and why rows failed."""

    scorers: list[dict[str, Any]] = field(default_factory=list)
    policies: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def evaluate_rows(run: Run, entries: list[Row], build: bool) -> Results:
    """Runs (build) or finds every row's evaluation; one that cannot run costs no other, unless none can."""
    found = Results()
    for number, row in enumerate(entries):
        if build:
            print(f"\n=== {number + 1}/{len(entries)} {title(row)}\n    {row.command}", flush=True)
        provenance = replace(run.provenance, command=row.command, config=plain(row.config), build_inputs=build)
        row_run = Run(row.config, provenance, requested="", cache=run.cache)
        try:
            if row.config.eval.subject in STAGE_OF:
                artifact = evaluate_scorers(row_run, row.config.eval.subject)
                found.scorers.append(scorer_entry(row_run, row, artifact))
            else:
                artifact = evaluate_policy(row_run, row.config.eval.subject)
                found.policies.append(policy_entry(row_run, row, artifact, vanilla_of(row, entries)))
        except MissingInput:
            found.missing.append(title(row))
        except UserError as error:
            if distributed.world().size > 1:  # the other processes may be in the middle of the row
                raise
            print(f"row failed: {error}", flush=True)
            found.failed[title(row)] = str(error)
    if found.failed and not (found.scorers or found.policies or found.missing):
        raise UserError(next(iter(found.failed.values())))
    return found


def found_rows(run: Run) -> tuple[list[Row], Results]:
    """The rows that a run folder's finished evaluations make. Raises UserError where there are none."""
    evaluations, problems = finished_evaluations(run.provenance.run_dir)
    if not evaluations:
        reason = f" ({problems[0]})" if problems else ""
        raise UserError(
            f"report.found=true reports the evaluations that are finished in run_dir={run.config.run_dir}, and there "
            f"is none{reason}; make some with stage=eval"
        )
    entries = [Row(found.name, "", found.config.seed, found.command, found.config) for found in evaluations]
    results = Results(missing=problems)
    for row, evaluation in zip(entries, evaluations, strict=True):
        row_run = replace(run, config=row.config)
        if row.config.eval.subject in STAGE_OF:
            results.scorers.append(scorer_entry(row_run, row, evaluation.artifact))
        else:
            results.policies.append(policy_entry(row_run, row, evaluation.artifact, vanilla_of(row, entries)))
    return entries, results


def make_report(run: Run, overrides: list[str], build: bool) -> Path:
    """Runs (build) or finds the evaluations of all rows, and writes report.html, report.md and report.json.

    Raises UserError where no row can run, and, after the report of the others is written, where some cannot.
    """
    started = time.perf_counter()
    if run.config.report.found:
        if build:
            raise UserError(
                "report.found=true reports what is finished, and stage=pipeline makes rows: use stage=report"
            )
        entries, found = found_rows(run)
    else:
        entries = list(rows(run.config, overrides))
        if not entries:
            raise UserError("report.rows is empty: there is nothing to compare")
        found = evaluate_rows(run, entries, build)
    data = {
        "title": run.config.report.title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "code_revision": code_revision(),
        "seconds": time.perf_counter() - started if build else None,
        "missing": [*found.missing, *(f"{name}: {message}" for name, message in found.failed.items())],
        "commands": {title(row): row.command for row in entries},
        "dataset": {"name": run.config.dataset.name, "counts": run.splits().counts, "truncation": run.truncation()},
        "scorers": found.scorers,
        "policies": found.policies,
    }
    folder = run.provenance.run_dir / run.config.report.folder
    if not distributed.world().first:
        return folder
    written = write_report(data, folder)
    draw_overview(data, folder / "overview.png")
    draw_sweep(data, folder / "sweep.png")
    print(f"\n{describe_comparison(data)}\n\nreport: {written['html']}", flush=True)
    if found.failed:
        raise UserError(f"{len(found.failed)} of {len(entries)} rows failed: {'; '.join(found.failed)} (see above)")
    return written["html"]


def title(row: Row) -> str:
    """A row's name, with world and seed where there are several."""
    return ", ".join([row.name, *([row.world] if row.world else []), f"seed {row.seed}"])


def input_manifest(run: Run, artifact: Artifact, name: str) -> tuple[Path, dict[str, Any]] | None:
    """Folder and manifest of one of an artifact's inputs, if a stage of ours made it."""
    entry = artifact.manifest()["inputs"].get(name)
    if entry is None:
        return None
    folder = run.provenance.run_dir / entry["folder"]
    return (folder, read_json(folder / MANIFEST)) if is_finished(folder) else None


def sweep_of(run: Run, artifact: Artifact) -> dict[str, Any]:
    """What report.sweep needs of an evaluation: its `values` of the settings that are swept, and the `others`."""
    values, others = swept(run.provenance.run_dir, artifact.manifest())
    return {"values": values, "others": others}


def scorer_entry(run: Run, row: Row, artifact: Artifact) -> dict[str, Any]:
    """A line of the report's table of scorers."""
    kind = row.config.eval.subject
    trained, scored = input_manifest(run, artifact, "scorer"), input_manifest(run, artifact, "scores")
    section = getattr(row.config, STAGE_OF[kind])
    shown = ("epochs", "max_steps", "beta0", "beta1") if trained else ("path",)
    return {
        "world": row.world,
        "seed": row.seed,
        "name": row.name,
        "form": scored[1]["results"]["form"] if scored else None,
        "sweep": sweep_of(run, artifact),
        "evaluation": read_json(artifact.folder / EVALUATION),
        "settings": {name: value for name in shown if (value := getattr(section, name, None)) is not None},
        "curve": curve(trained[0], ("loss", "accuracy")) if trained else None,
    }


def policy_settings(config: Config) -> dict[str, Any]:
    """What the report says of how a policy was made, beside its coefficients."""
    training = {key: getattr(config.align, key) for key in ("learning_rate", "batch_size", "epochs", "max_records")}
    return {**{key: value for key, value in config.loss.items() if key != "name"}, **training}


def vanilla_of(row: Row, entries: list[Row]) -> str | None:
    """The row that differs from this one in its coefficients alone, and has none."""
    for other in entries:
        alike = policy_settings(other.config) == policy_settings(row.config)
        same = other.config.loss["name"] == row.config.loss["name"] and other.config.eval.subject == "policy"
        if alike and same and other.config.rc.name == "none":
            return other.name
    return None


def policy_entry(run: Run, row: Row, artifact: Artifact, vanilla: str | None) -> dict[str, Any]:
    """A line of the report's table of policies."""
    trained = input_manifest(run, artifact, "policy")
    evaluation = read_json(artifact.folder / EVALUATION)
    evaluation["samples"] = read_json_lines(artifact.folder / GENERATIONS)[: row.config.eval.samples]
    base = row.config.eval.subject == "base"
    rc = row.config.rc
    names = ("loss",) if base else ("loss", "implicit_reward_accuracy", "gradient_norm")
    return {
        "world": row.world,
        "seed": row.seed,
        "name": row.name,
        "group": "base" if base else choose_loss(row.config.loss).name,
        "rc": "none" if base else rc.name,
        "alpha": None if base or rc.name == "none" else rc.alpha,
        "control": "none" if base else rc.control,
        "compare_with": None if base else vanilla,
        "sweep": None if base else sweep_of(run, artifact),
        "settings": {} if base else policy_settings(row.config),
        "evaluation": evaluation,
        "coefficients": None if base or trained is None else trained[1]["results"].get("coefficients"),
        "curve": curve(trained[0], names) if trained else None,
    }


def curve(folder: Path, names: tuple[str, ...]) -> dict[str, list[list[float]]]:
    """Metrics of a training run by step, each point the mean of the steps since the last, thinned for plotting."""
    lines = read_json_lines(folder / METRICS)
    width = max(1, len(lines) // CURVE_POINTS)
    curves: dict[str, list[list[float]]] = {}
    for name in names:
        values = [(line["step"], line[name]) for line in lines if name in line]
        groups = [values[start : start + width] for start in range(0, len(values), width)]
        curves[name] = [[group[-1][0], sum(value for _, value in group) / len(group)] for group in groups]
    return {name: points for name, points in curves.items() if points}
