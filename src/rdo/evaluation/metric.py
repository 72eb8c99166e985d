"""The number that a stage returns to a sweep: what `metric` names among all that its folder says in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rdo.evaluation import EVALUATION
from rdo.runtime.errors import UserError
from rdo.runtime.files import read_json, read_json_lines
from rdo.runtime.store import Artifact
from rdo.tracking import METRICS

LAST = 0.1  # of a training run's steps are averaged: one step alone is noise


def stage_metric(artifact: Artifact, name: str | None) -> float | None:
    """The number of a finished artifact that a sweep compares: of its evaluation (`rewards.gold`), its training log
    (`loss`) or its manifest's results (`coefficients.mean`). None: the stage's own, where it has one.

    Raises UserError where there is none of this name, or it has no value.
    """
    manifest = artifact.manifest()
    if name is None:
        own: float | None = manifest["results"].get("metric")
        return own
    numbers = dict(leaves({key: value for key, value in manifest["results"].items() if key not in ("last", "metric")}))
    if (artifact.folder / METRICS).exists():
        lines = read_json_lines(artifact.folder / METRICS)
        for line in (last := lines[-math.ceil(LAST * len(lines)) :]):
            for key in dict(leaves(line)).keys() - {"step", "epoch", "seconds"}:
                found = [other[key] for other in last if key in other]
                numbers[key] = sum(found) / len(found)
    if (artifact.folder / EVALUATION).exists():
        numbers |= dict(leaves(read_json(artifact.folder / EVALUATION)))
    if name not in numbers:
        known = ", ".join(sorted(numbers))
        raise UserError(f"metric={name}: there is no such number in {artifact.folder}; it has {known}")
    value = numbers[name]
    if value is None or not math.isfinite(value):
        raise UserError(f"metric={name} has no value in {artifact.folder}; see {EVALUATION} there")
    return value


def leaves(data: Any, name: str = "") -> Iterator[tuple[str, float | None]]:
    """The numbers of nested mappings by their dotted names; an estimate with its interval counts as its value."""
    if isinstance(data, dict) and "value" in data:
        yield name, data["value"]
    elif isinstance(data, dict):
        for key, member in data.items():
            yield from leaves(member, f"{name}.{key}".lstrip("."))
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield name, data
