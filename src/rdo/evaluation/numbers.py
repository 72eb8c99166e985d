"""The numbers of nested results by their dotted names, as they are read by programs, by people, and by a sweep."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rdo.evaluation import EVALUATION
from rdo.runtime.errors import UserError, printable
from rdo.runtime.files import read_json, read_json_lines
from rdo.runtime.store import Artifact
from rdo.tracking import METRICS

LAST = 0.1  # of a training run's steps are averaged: one step alone is noise
HARDLY, FAR = 0.01, 20.0  # nats between a policy and its reference
# What a terminal shows of an evaluation.
SHOWN = re.compile(
    r"pairs|prompts|length|kl|rewards\..*|against_base\..*\.win|(label|gold|labels_gold)_accuracy|negative_share|"
    r"accuracy_chosen_(first|second)|by_confidence\.\d\.label_accuracy"
)


class Number(NamedTuple):
    """A quantity and its 95 % interval, whose ends are NaN where it has none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def verdict(self) -> str:
        """Whether a difference can be told from zero."""
        if math.isnan(self.low):
            return "without an interval"
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "indistinguishable"


def as_number(estimate: Mapping[str, Any]) -> Number:
    """An estimate of `intervals`, or a plain value; NaN where it has none."""
    ends = (estimate.get(end) for end in Number._fields)
    return Number(*(math.nan if end is None else float(end) for end in ends))


def estimates(values: Any, name: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every number of nested results: "rewards.gold", "by_confidence.1.low". A plain one has a `value` alone, an
    estimate its `low`, `high` and `count`, too."""
    if isinstance(values, Mapping) and "value" in values:
        yield name, values
    elif isinstance(values, int | float) and not isinstance(values, bool):
        yield name, {"value": values}
    elif isinstance(values, Mapping | list):
        for key, member in values.items() if isinstance(values, Mapping) else enumerate(values, start=1):
            yield from estimates(member, f"{name}.{key}".lstrip("."))


def number(value: float, digits: int = 2, signed: bool = False) -> str:
    """A number with a real minus sign; one that rounds to nothing has none."""
    if math.isnan(value):
        return "–"
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("+-")


def interval(found: Number | None, digits: int = 2, signed: bool = False, between: str = " ") -> str:
    """A value with its interval, where it has one."""
    if found is None:
        return "–"
    value, low, high = (number(end, digits, signed) for end in found)
    return value if math.isnan(found.low) else f"{value}{between}[{low}, {high}]"


def shortened(name: str, longest: int = 44) -> str:
    """A name without its middle, where it is longer."""
    return name if len(name) <= longest else f"{name[: longest // 2]}…{name[1 - longest // 2 :]}"


def describe(evaluation: Mapping[str, Any]) -> str:
    """The main numbers of an evaluation in lines, of whose text a terminal acts upon nothing."""
    found = {name: as_number(estimate) for name, estimate in estimates(evaluation) if SHOWN.fullmatch(name)}
    lines = [f"  {name:<34}{interval(value, 0 if value.value > 99 else 3)}" for name, value in found.items()]
    # A base policy, which is compared with nothing, has not moved.
    if evaluation.get("against_base") and not math.isnan(found["kl"].value):
        lines += [f"  kl{hint}" for hint in [movement_hint(found["kl"].value)] if hint]
    return "\n".join(printable(line, keep="") for line in lines)


def movement_hint(nats: float) -> str:
    """What to do about a policy that is so far from its reference: nothing, mostly."""
    if nats < HARDLY:
        return ": it hardly moved; raise align.learning_rate (docs/recipes.md has rates by model size)"
    return ": it ran away; lower align.learning_rate, or raise loss.beta" if nats > FAR else ""


def stage_metric(artifact: Artifact, name: str | None) -> float | None:
    """The number of a finished artifact that a sweep compares: of its evaluation (`rewards.gold`), its training log
    (`loss`) or its manifest's results (`coefficients.mean`). None: the stage's own, where it has one.

    Raises UserError where there is none of this name, or it has no value.
    """
    manifest = artifact.manifest()
    if name is None:
        own: float | None = manifest["results"].get("metric")
        return own
    results = {key: value for key, value in manifest["results"].items() if key not in ("last", "metric")}
    numbers = dict(estimates(results))
    if (artifact.folder / METRICS).exists():
        lines = read_json_lines(artifact.folder / METRICS)
        for line in (last := lines[-math.ceil(LAST * len(lines)) :]):
            for key in dict(estimates(line)).keys() - {"step", "epoch", "seconds"}:
                found = [other[key] for other in last if key in other]
                numbers[key] = {"value": sum(found) / len(found)}
    if (artifact.folder / EVALUATION).exists():
        numbers |= dict(estimates(read_json(artifact.folder / EVALUATION)))
    if name not in numbers:
        known = ", ".join(sorted(numbers))
        raise UserError(f"metric={name}: there is no such number in {artifact.folder}; it has {known}")
    value: float | None = numbers[name]["value"]
    if value is None or not math.isfinite(value):
        raise UserError(f"metric={name} has no value in {artifact.folder}; see {EVALUATION} there")
    return value
