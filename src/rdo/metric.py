"""The number that a stage returns to a sweep: what `metric` names among all that its folder says in numbers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from rdo.artifacts import Artifact
from rdo.errors import UserError
from rdo.files import read_json, read_json_lines
from rdo.stages.eval import EVALUATION
from rdo.tracking import METRICS

# Of a training run, its last tenth of steps is averaged: one step alone is noise.
LAST = 0.1
UNCOMPARED = ("step", "epoch", "seconds")


def stage_metric(artifact: Artifact, name: str | None) -> float | None:
    """The number of a finished artifact that a sweep compares. None: the stage's own, where it has one.

    Raises UserError where there is none of this name, or it has no value.
    """
    if name is None:
        own: float | None = artifact.manifest()["results"].get("metric")
        return own
    numbers = dict(found_numbers(artifact))
    if name not in numbers:
        raise UserError(
            f"metric={name}: there is no such number in {artifact.folder}; it has {', '.join(sorted(numbers))}"
        )
    value = numbers[name]
    if value is None or not math.isfinite(value):
        raise UserError(f"metric={name} has no value in {artifact.folder}; see {EVALUATION} there")
    return value


def found_numbers(artifact: Artifact) -> Iterator[tuple[str, float | None]]:
    """All numbers of a finished folder by name: of the evaluation (`rewards.oracle`; of an estimate, its value), what
    training has logged (`loss`, over its last tenth), and the manifest's results (`coefficients.mean`)."""
    files = artifact.manifest()["files"]
    results = {key: value for key, value in artifact.manifest()["results"].items() if key not in ("last", "metric")}
    yield from leaves(results)
    if METRICS in files:
        lines = read_json_lines(artifact.folder / METRICS)
        columns: dict[str, list[float]] = defaultdict(list)
        for line in lines[-math.ceil(LAST * len(lines)) :]:
            for key, value in line.items():
                if key not in UNCOMPARED and isinstance(value, int | float):
                    columns[key].append(value)
        yield from ((key, sum(values) / len(values)) for key, values in columns.items())
    if EVALUATION in files:
        yield from leaves(read_json(artifact.folder / EVALUATION))


def leaves(data: Any, name: str = "") -> Iterator[tuple[str, float | None]]:
    """The numbers of nested mappings by their dotted names; an estimate with its interval counts as its value."""
    if isinstance(data, dict) and "value" in data:
        yield name, data["value"]
    elif isinstance(data, dict):
        for key, member in data.items():
            yield from leaves(member, f"{name}.{key}".lstrip("."))
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield name, data
