"""How often a scorer is right, shown the two responses of a pair in random order.

A difference model that is always shown the preferred response first can reach an accuracy of 1.0 by knowing nothing
but the position. So a fair coin decides the order of every pair here, and what position alone does is printed beside.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rdo.objectives.intervals import Estimate, share_interval

GOLD_TIE = 1e-9  # true rewards closer than this differ by rounding only: no answer is the right one
GOLD_FIELDS = (
    "gold_accuracy",
    "gold_accuracy_both_orders",
    "labels_gold_accuracy",
    "mislabelled_share_where_contradicted",
    "mislabelled_share_elsewhere",
)
QUARTILES = 4

Numbers = NDArray[np.float64]
Mask = NDArray[np.bool_]


def evaluate_scorer(
    forward: ArrayLike,
    backward: ArrayLike,
    labels: ArrayLike,
    gold: ArrayLike | Sequence[float | None] | None = None,
    seed: int = 0,
    queries: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """Everything the report says about a scorer, from its outputs on labelled pairs (chosen, rejected), each [pairs].

    forward: f(chosen, rejected). backward: f(rejected, chosen); for a pointwise model it is -forward.
    labels: target for "chosen is preferred": 1.0, or 0.5 for a tie (counted, and left out of every accuracy).
    gold: true reward of chosen minus that of rejected, None where unknown. Pairs that are equal under the gold
    have no right answer and are left out of the gold's accuracies. An output of exactly 0 counts as half right.
    queries: of each pair the query, over which intervals are; None: each has its own.
    """
    ahead, behind, targets = (np.asarray(values, dtype=np.float64) for values in (forward, backward, labels))
    truth = None if gold is None else np.array(gold, dtype=np.float64)  # None becomes NaN
    numbered = np.arange(len(ahead)) if queries is None else np.unique(list(map(str, queries)), return_inverse=True)[1]
    share = partial(share_of, numbered)

    random = np.random.default_rng(seed)
    chosen_first = random.random(len(ahead)) < 0.5
    shown = np.where(chosen_first, ahead, behind)  # positive: the response shown first is better
    for_chosen = np.where(chosen_first, shown, -shown)  # the same answer, as an opinion on the chosen response
    both_orders = (ahead - behind) / 2
    decided = targets == 1.0

    result: dict[str, Any] = {
        "pairs": len(ahead),
        "ties": int(np.sum(~decided)),
        "label_accuracy": share(credit(for_chosen), decided),
        "label_accuracy_both_orders": share(credit(both_orders), decided),
        "accuracy_chosen_first": share(credit(ahead), decided),
        "accuracy_chosen_second": share(credit(-behind), decided),
        "first_preferred_share": share(credit(shown), np.ones_like(decided)),
        "antisymmetry_gap": float(np.mean(np.abs(ahead + behind))) if len(ahead) else None,
        "negative_share": float(np.mean(ahead[decided] < 0)) if decided.any() else None,
        "by_confidence": by_confidence(for_chosen, decided, truth, share),
    }
    if truth is None:
        return result | dict.fromkeys(GOLD_FIELDS)
    known = with_answer(decided, truth)
    mislabelled = credit(-truth)
    fields = (
        share(gold_credit(for_chosen, truth), known),
        share(gold_credit(both_orders, truth), known),
        share(credit(truth), known),
        share(mislabelled, known & (ahead < 0)),
        share(mislabelled, known & (ahead >= 0)),
    )
    return result | dict(zip(GOLD_FIELDS, fields, strict=True))


def credit(opinion: Numbers) -> Numbers:
    """1 for a positive opinion, 0 for a negative one, 0.5 for none."""
    return (np.sign(opinion) + 1) / 2


def gold_credit(opinion: Numbers, truth: Numbers) -> Numbers:
    """The same, of an opinion that should have the sign of the truth."""
    return credit(opinion * np.sign(truth))


def share_of(queries: NDArray[np.intp], credits: Numbers, mask: Mask) -> Estimate:
    """The mean credit of some pairs."""
    return share_interval(credits[mask].tolist(), queries[mask].tolist())


def with_answer(decided: Mask, truth: Numbers) -> Mask:
    """Pairs that have both a label and a right answer: one set for scorer and labels, so the two compare."""
    return decided & (np.abs(truth) > GOLD_TIE)  # NaN (unknown) compares as False


def by_confidence(
    for_chosen: Numbers, decided: Mask, truth: Numbers | None, share: Callable[[Numbers, Mask], Estimate]
) -> list[dict[str, Any]]:
    """Accuracy in four equal parts of the decided pairs, from the smallest |f| to the largest (RDO, Table 15)."""
    index = np.flatnonzero(decided)
    index = index[np.argsort(np.abs(for_chosen[index]), kind="stable")]
    parts: list[dict[str, Any]] = []
    for part in np.array_split(index, QUARTILES):
        mask = np.zeros_like(decided)
        mask[part] = True
        size = np.abs(for_chosen[part])
        right = None if truth is None else share(gold_credit(for_chosen, truth), with_answer(mask, truth))
        parts.append(
            {
                "low": float(size.min()) if len(part) else None,
                "high": float(size.max()) if len(part) else None,
                "count": len(part),
                "label_accuracy": share(credit(for_chosen), mask),
                "gold_accuracy": right,
            }
        )
    return parts
