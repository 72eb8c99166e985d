"""How often a scorer is right, shown the two responses of a pair in random order.

A difference model that is always shown the preferred response first can reach an accuracy of 1.0 by knowing nothing
but the position. So a fair coin decides the order of every pair here, and what position alone does is printed beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rdo.objectives.intervals import Estimate, wilson

GOLD_TIE = 1e-9  # true rewards closer than this differ by rounding only: no answer is the right one
GOLD_FIELDS = (
    "gold_accuracy",
    "gold_accuracy_both_orders",
    "labels_gold_accuracy",
    "mislabelled_share_where_contradicted",
    "mislabelled_share_elsewhere",
)
HISTOGRAM_VALUES = 2000
QUARTILES = 4

Numbers = np.ndarray[Any, np.dtype[np.float64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


def evaluate_scorer(
    forward: Sequence[float] | Numbers,
    backward: Sequence[float] | Numbers,
    labels: Sequence[float] | Numbers,
    gold: Sequence[float | None] | Numbers | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything the report says about a scorer, from its outputs on labelled pairs (chosen, rejected).

    forward: f(chosen, rejected). backward: f(rejected, chosen); for a pointwise model it is -forward.
    labels: target for "chosen is preferred": 1.0, or 0.5 for a tie (counted, and left out of every accuracy).
    gold: true reward of chosen minus that of rejected, None where unknown. Pairs that are equal under the gold
    have no right answer and are left out of the gold's accuracies. An output of exactly 0 counts as half right.
    """
    ahead, behind = _outputs(forward, "forward"), _outputs(backward, "backward")
    targets = np.asarray(labels, dtype=np.float64)
    if not len(ahead) == len(behind) == len(targets):
        raise ValueError(f"{len(ahead)} forward, {len(behind)} backward values and {len(targets)} labels")
    if not np.all((targets == 1.0) | (targets == 0.5)):
        raise ValueError("labels must be 1.0 (chosen is preferred) or 0.5 (a tie)")
    truth = None if gold is None else _gold(gold, len(ahead))

    random = np.random.default_rng(seed)
    chosen_first = random.random(len(ahead)) < 0.5
    shown = np.where(chosen_first, ahead, behind)  # positive: the response shown first is better
    for_chosen = np.where(chosen_first, shown, -shown)  # the same answer, as an opinion on the chosen response
    both_orders = (ahead - behind) / 2
    decided = targets == 1.0

    result: dict[str, Any] = {
        "pairs": len(ahead),
        "ties": int(np.sum(~decided)),
        "label_accuracy": _share(_credit(for_chosen), decided),
        "label_accuracy_both_orders": _share(_credit(both_orders), decided),
        "accuracy_chosen_first": _share(_credit(ahead), decided),
        "accuracy_chosen_second": _share(_credit(-behind), decided),
        "first_preferred_share": _share(_credit(shown), np.ones(len(ahead), dtype=bool)),
        "antisymmetry_gap": float(np.mean(np.abs(ahead + behind))) if len(ahead) else None,
        "negative_share": float(np.mean(ahead[decided] < 0)) if decided.any() else None,
        "by_confidence": _by_confidence(for_chosen, decided, truth),
        "differences": _sample(ahead, random),
    }
    result.update(_against_gold(ahead, for_chosen, both_orders, decided, truth))
    return result


def _outputs(values: Sequence[float] | Numbers, name: str) -> Numbers:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one number a pair, not an array of shape {array.shape}")
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{name}[{int(np.argmin(np.isfinite(array)))}] is not a finite number")
    return array


def _gold(values: Sequence[float | None] | Numbers, count: int) -> Numbers:
    array = np.array([np.nan if value is None else float(value) for value in values], dtype=np.float64)
    if len(array) != count:
        raise ValueError(f"{len(array)} gold values for {count} pairs")
    return array


def _credit(opinion: Numbers) -> Numbers:
    """1 for a positive opinion, 0 for a negative one, 0.5 for none."""
    return (np.sign(opinion) + 1) / 2


def _share(credit: Numbers, mask: Mask) -> Estimate:
    return wilson(float(np.sum(credit[mask])), int(np.sum(mask)))


def _with_answer(decided: Mask, truth: Numbers) -> Mask:
    """Pairs that have both a label and a right answer: one set for scorer and labels, so the two compare."""
    return decided & (np.abs(truth) > GOLD_TIE)  # NaN (unknown) compares as False


def _gold_credit(opinion: Numbers, truth: Numbers) -> Numbers:
    return _credit(opinion * np.sign(truth))


def _against_gold(
    ahead: Numbers, for_chosen: Numbers, both_orders: Numbers, decided: Mask, truth: Numbers | None
) -> dict[str, Estimate | None]:
    """The fields that need the true reward; all None without it."""
    if truth is None:
        return dict.fromkeys(GOLD_FIELDS)
    known = _with_answer(decided, truth)
    mislabelled = _credit(-truth)
    return {
        "gold_accuracy": _share(_gold_credit(for_chosen, truth), known),
        "gold_accuracy_both_orders": _share(_gold_credit(both_orders, truth), known),
        "labels_gold_accuracy": _share(_credit(truth), known),
        "mislabelled_share_where_contradicted": _share(mislabelled, known & (ahead < 0)),
        "mislabelled_share_elsewhere": _share(mislabelled, known & (ahead >= 0)),
    }


def _by_confidence(for_chosen: Numbers, decided: Mask, truth: Numbers | None) -> list[dict[str, Any]]:
    """Accuracy in four equal parts of the decided pairs, from the smallest |f| to the largest (RDO, Table 15)."""
    index = np.flatnonzero(decided)
    index = index[np.argsort(np.abs(for_chosen[index]), kind="stable")]
    parts: list[dict[str, Any]] = []
    for part in np.array_split(index, QUARTILES):
        mask = np.zeros(len(for_chosen), dtype=bool)
        mask[part] = True
        size = np.abs(for_chosen[part])
        gold_accuracy = None
        if truth is not None:
            gold_accuracy = _share(_gold_credit(for_chosen, truth), _with_answer(mask, truth))
        parts.append(
            {
                "low": float(size.min()) if len(part) else None,
                "high": float(size.max()) if len(part) else None,
                "count": len(part),
                "label_accuracy": _share(_credit(for_chosen), mask),
                "gold_accuracy": gold_accuracy,
            }
        )
    return parts


def _sample(values: Numbers, random: np.random.Generator) -> list[float]:
    """Values for a histogram; drawn at random when there are too many, since the file's order may mean something."""
    if len(values) > HISTOGRAM_VALUES:
        values = random.choice(values, HISTOGRAM_VALUES, replace=False)
    return [round(float(value), 6) for value in values]
