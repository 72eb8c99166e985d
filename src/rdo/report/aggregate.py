"""Mean and spread over seeds for every row of the report, and what may be said about differences between rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from rdo.evaluation.statistics import Estimate, mean_interval, standard_deviation

Row = Mapping[str, Any]


class Summary(TypedDict):
    """One quantity of one row. With one seed `low` and `high` are that run's own interval and `sd` is None; with
    several they are the t interval of the mean over seeds and `sd` is the spread between them."""

    mean: float | None
    sd: float | None
    low: float | None
    high: float | None
    seeds: int


class Difference(TypedDict):
    """One row minus another. `verdict`: higher, lower, indistinguishable, or unknown (no interval to judge by)."""

    value: float
    sd: float | None
    low: float | None
    high: float | None
    seeds: int
    verdict: str


def summarise(values: Iterable[Estimate | float | None]) -> Summary:
    """Summary over one value (an estimate or a plain number) per seed; seeds without a value are left out."""
    present = [value for value in (_estimate(value) for value in values) if value["value"] is not None]
    if len(present) == 1:
        only = present[0]
        return {"mean": only["value"], "sd": None, "low": only["low"], "high": only["high"], "seeds": 1}
    numbers = [value["value"] for value in present if value["value"] is not None]
    over_seeds = mean_interval(numbers)
    return {
        "mean": over_seeds["value"],
        "sd": standard_deviation(numbers),
        "low": over_seeds["low"],
        "high": over_seeds["high"],
        "seeds": len(numbers),
    }


def compare(first: Mapping[int, Estimate], second: Mapping[int, Estimate]) -> Difference | None:
    """First minus second, seed by seed, or None when they share no seed.

    With several shared seeds the paired differences decide: their t interval must exclude zero. With one seed the two
    intervals must not overlap. The second rule knows nothing of the spread between seeds.
    """
    shared = [seed for seed in first if seed in second]
    pairs = [(first[seed], second[seed]) for seed in shared]
    values = [a["value"] - b["value"] for a, b in pairs if a["value"] is not None and b["value"] is not None]
    if not values:
        return None
    if len(values) == 1:
        a, b = next((a, b) for a, b in pairs if a["value"] is not None and b["value"] is not None)
        return {"value": values[0], "sd": None, "low": None, "high": None, "seeds": 1, "verdict": _overlap(a, b)}
    over_seeds = mean_interval(values)
    low, high = over_seeds["low"], over_seeds["high"]
    verdict = "indistinguishable"
    if low is not None and high is not None and (low > 0 or high < 0):
        verdict = "higher" if low > 0 else "lower"
    mean = sum(values) / len(values)
    return {
        "value": mean,
        "sd": standard_deviation(values),
        "low": low,
        "high": high,
        "seeds": len(values),
        "verdict": verdict,
    }


def _overlap(a: Estimate, b: Estimate) -> str:
    if a["low"] is None or a["high"] is None or b["low"] is None or b["high"] is None:
        return "unknown"
    if a["low"] > b["high"]:
        return "higher"
    return "lower" if a["high"] < b["low"] else "indistinguishable"


def _estimate(value: Estimate | Row | float | None) -> Estimate:
    """A plain number as an estimate without an interval; anything not finite as an estimate without a value."""
    if isinstance(value, Mapping):
        count = value.get("count") or 0
        number, low, high = (_finite(value.get(key)) for key in ("value", "low", "high"))
        return {"value": number, "low": low, "high": high, "count": count}
    return {"value": _finite(value), "low": None, "high": None, "count": 1}


def _finite(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    # A diverged run is reported as having no value: it must not take the whole page down with it.
    return number if abs(number) < float("inf") else None


def aggregate(data: Row) -> list[dict[str, Any]]:
    """Per world, in the order of first appearance: its scorers and policies, each with its numbers over seeds."""
    scorers, policies = data.get("scorers") or [], data.get("policies") or []
    worlds = dict.fromkeys(str(row.get("world") or "") for row in [*scorers, *policies])
    return [
        {
            "world": world,
            "scorers": [_scorer(name, runs) for name, runs in _by_name(scorers, world).items()],
            "best_scorer": _best_scorer(_by_name(scorers, world)),
            "policies": _policies(_by_name(policies, world)),
        }
        for world in worlds
    ]


def _by_name(rows: Sequence[Row], world: str) -> dict[str, dict[int, Row]]:
    """Runs of one world: name, then seed."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if str(row.get("world") or "") != world:
            continue
        name, seed = str(row.get("name")), int(row.get("seed") or 0)
        if seed in found.setdefault(name, {}):
            raise ValueError(f"two rows named {name!r} with seed {seed} in world {world!r}: one would hide the other")
        found[name][seed] = row
    return found


def _evaluation(row: Row) -> Row:
    return row.get("evaluation") or {}


SCORER_FIELDS = (
    "label_accuracy",
    "oracle_accuracy",
    "labels_oracle_accuracy",
    "label_accuracy_both_orders",
    "oracle_accuracy_both_orders",
    "accuracy_chosen_first",
    "accuracy_chosen_second",
    "first_preferred_share",
    "antisymmetry_gap",
    "negative_share",
    "mislabelled_share_where_contradicted",
    "mislabelled_share_elsewhere",
)


def _scorer(name: str, runs: Mapping[int, Row]) -> dict[str, Any]:
    evaluations = {seed: _evaluation(row) for seed, row in runs.items()}
    parts = max((len(found.get("by_confidence") or []) for found in evaluations.values()), default=0)
    curve = []
    for part in range(parts):
        here = [found["by_confidence"][part] for found in evaluations.values() if found.get("by_confidence")]
        curve.append({key: summarise(q.get(key) for q in here) for key in ("label_accuracy", "oracle_accuracy")})
    right = {seed: _estimate(found.get("oracle_accuracy")) for seed, found in evaluations.items()}
    labels = {seed: _estimate(found.get("labels_oracle_accuracy")) for seed, found in evaluations.items()}
    first = {seed: _estimate(found.get("accuracy_chosen_first")) for seed, found in evaluations.items()}
    second = {seed: _estimate(found.get("accuracy_chosen_second")) for seed, found in evaluations.items()}
    return {
        "name": name,
        "form": next(iter(runs.values())).get("form"),
        "sweep": next(iter(runs.values())).get("sweep"),
        "seeds": list(runs),
        "metrics": {key: summarise(found.get(key) for found in evaluations.values()) for key in SCORER_FIELDS},
        "by_confidence": curve,
        "against_labels": compare(right, labels),
        "order_bias": compare(first, second),
    }


def _best_scorer(named: Mapping[str, Mapping[int, Row]]) -> dict[str, Any] | None:
    """The scorer with the highest accuracy (by the oracle where there is one) and what sets it apart from the rest."""
    if len(named) < 2:
        return None
    every = [_evaluation(row) for runs in named.values() for row in runs.values()]
    metric = "oracle_accuracy" if any(found.get("oracle_accuracy") for found in every) else "label_accuracy"
    found = {name: _field(runs, metric) for name, runs in named.items()}
    means = {name: summarise(values.values())["mean"] for name, values in found.items()}
    known = {name: mean for name, mean in means.items() if mean is not None}
    if len(known) < 2:
        return None
    best = max(known, key=lambda name: known[name])
    others = {name: compare(found[name], found[best]) for name in known if name != best}
    return {"metric": metric, "name": best, "others": others}


def control_of(row: Row) -> str | None:
    """What a row controls for, in words, or None for an ordinary row."""
    kinds = {"shuffle": "R shuffled over pairs", "filter": "pairs with R < 0 dropped, no coefficient"}
    if row.get("control") not in (None, "none"):
        return kinds.get(str(row["control"]), str(row["control"]))
    return "R from the true reward" if row.get("rc") == "oracle" else None


def _policies(named: Mapping[str, Mapping[int, Row]]) -> list[dict[str, Any]]:
    rows = []
    for name, runs in named.items():
        row = _policy(name, runs)
        vanilla = _vanilla_of(name, named)
        row["compared_with"] = vanilla
        row["difference"], row["kl_difference"] = {}, None
        if vanilla is not None:
            other = named[vanilla]
            for judge in row["rewards"]:
                row["difference"][judge] = compare(_rewards(runs, judge), _rewards(other, judge))
            row["kl_difference"] = compare(_field(runs, "kl"), _field(other, "kl"))
        rows.append(row)
    return rows


def _vanilla_of(name: str, named: Mapping[str, Mapping[int, Row]]) -> str | None:
    """The row with the same loss and no coefficient; None if it is this row, if there is none, or if it is unclear.

    A group with several plain rows (two learning rates, say) is unclear: its rows say `compare_with` themselves.
    """
    first = next(iter(named[name].values()))
    group, stated = first.get("group"), first.get("compare_with")
    if stated is not None:
        return str(stated) if stated in named and stated != name else None
    if group in (None, "base"):
        return None
    plain = []
    for other, runs in named.items():
        row = next(iter(runs.values()))
        if row.get("group") == group and row.get("rc") in (None, "none") and control_of(row) is None:
            plain.append(other)
    return plain[0] if len(plain) == 1 and plain[0] != name else None


def _rewards(runs: Mapping[int, Row], judge: str) -> dict[int, Estimate]:
    return {seed: _estimate((_evaluation(row).get("rewards") or {}).get(judge)) for seed, row in runs.items()}


def _field(runs: Mapping[int, Row], key: str) -> dict[int, Estimate]:
    return {seed: _estimate(_evaluation(row).get(key)) for seed, row in runs.items()}


def _judges(runs: Mapping[int, Row], key: str) -> list[str]:
    return list(dict.fromkeys(judge for row in runs.values() for judge in (_evaluation(row).get(key) or {})))


def _policy(name: str, runs: Mapping[int, Row]) -> dict[str, Any]:
    first = next(iter(runs.values()))
    against: dict[str, Any] = {}
    for judge in _judges(runs, "against_base"):
        found = [(_evaluation(row).get("against_base") or {}).get(judge) or {} for row in runs.values()]
        against[judge] = {key: summarise(one.get(key) for one in found) for key in ("win", "tie", "lose")}
    coefficients = [row.get("coefficients") or {} for row in runs.values()]
    return {
        "name": name,
        "group": first.get("group"),
        "rc": first.get("rc"),
        "alpha": first.get("alpha"),
        "sweep": first.get("sweep"),
        "control": control_of(first),
        "seeds": list(runs),
        "prompts": _evaluation(first).get("prompts"),
        "rewards": {judge: summarise(_rewards(runs, judge).values()) for judge in _judges(runs, "rewards")},
        "kl": summarise(_field(runs, "kl").values()),
        "length": summarise(_field(runs, "length").values()),
        "against_base": against,
        "negative_share": summarise(one.get("negative_share") for one in coefficients),
        "mean_coefficient": summarise(one.get("mean") for one in coefficients),
        "effective_sample_size": summarise(one.get("effective_sample_size") for one in coefficients),
    }
