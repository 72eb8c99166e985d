"""From reward differences R to pair weights w = R^alpha (RDO, section 2, eq. 2), in this one place.

R(x, y_w, y_l) is a raw model output (a logit): positive where the scorer agrees that y_w is the better response.
Weights are data: no gradient flows through them. They are computed in float64 and returned in float32 (float64 where R
is float64), so that a pair's weight does not depend on the batch it comes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from rdo.runtime.errors import UserError

NEGATIVE = ("clip", "abs", "flip", "floor", "error")  # what `coefficients` can make of R < 0


class Coefficients(NamedTuple):
    """One entry per pair, in the order of the reward differences: both [pairs]."""

    weight: Tensor  # multiplies the pair's alignment loss
    flipped: Tensor  # of bool: train on the pair with its two responses swapped


def coefficients(
    difference: Tensor,
    *,
    alpha: float,
    negative: str = "clip",
    epsilon: float = 1e-3,
    scale: float = 1.0,
) -> Coefficients:
    """Reward differences R [pairs] -> weights and flips [pairs]. `negative` says what R < 0 means:

        clip     w = max(R, 0)^alpha: the pair is left out of the alignment loss
        abs      w = |R|^alpha
        flip     w = |R|^alpha, and the pair is swapped: the scorer is believed, not the label
        floor    w = max(R, epsilon)^alpha: also for 0 <= R < epsilon, so that w never falls as R grows
        error    a UserError that counts them

    0 <= alpha <= 1; epsilon and scale are above 0. Weights are divided by `scale`: `mean_weight` over the training set
    keeps the average learning rate that of no coefficients. alpha = 0 gives w = 1 to every pair and flips none,
    whatever the other settings: "the coefficient has no effect" (RDO, section 2). For alpha > 0 a pair with R = 0 has
    w = 0, but for `floor`.
    """
    values = _checked(difference)
    if alpha == 0.0:
        return Coefficients(_narrow(torch.ones_like(values), difference), torch.zeros_like(values, dtype=torch.bool))
    disagrees = values < 0
    if negative == "error" and disagrees.any():
        raise UserError(
            f"{int(disagrees.sum())} of {values.numel()} pairs have a negative reward difference: the scorer disagrees "
            "with their label. Set rc.negative to clip, abs, flip or floor"
        )
    base = {
        "clip": values.clamp(min=0.0),
        "abs": values.abs(),
        "flip": values.abs(),
        "floor": values.clamp(min=epsilon),
        "error": values,
    }[negative]
    return Coefficients(_narrow(base**alpha / scale, difference), disagrees & (negative == "flip"))


def mean_weight(weights: Tensor) -> float:
    """Mean weight over the TRAINING SET [pairs], the `scale` to divide by (config option `mean`).

    The sum is exact, so the result does not depend on the order of the records.
    """
    values = _checked(weights)
    mean = fsum(values.tolist()) / values.numel()
    if mean <= 0.0:
        raise UserError("every coefficient is 0: no reward difference is positive, so there is nothing to train on")
    return mean


def statistics(difference: Tensor, weight: Tensor) -> dict[str, float]:
    """What to report of a training set's R and w, [pairs] both, with w before or after scaling.

    negative_share           share of pairs with R < 0, where the scorer disagrees with the label
    mean                     mean weight
    effective_sample_size    (sum w)^2 / sum w^2: how many equally weighted pairs would average out as much noise
    effective_sample_share   the same over the number of pairs
    """
    values, weights = _checked(difference), _checked(weight)
    count = values.numel()
    total, squares = fsum(weights.tolist()), fsum((weights**2).tolist())
    effective = total**2 / squares if squares > 0.0 else 0.0
    return {
        "negative_share": int((values < 0).sum()) / count,
        "mean": total / count,
        "effective_sample_size": effective,
        "effective_sample_share": effective / count,
    }


# Ablations: what the gain of rc should be measured against


def shuffle(difference: Tensor, ids: Sequence[str], seed: int) -> Tensor:
    """Control: the same reward differences [pairs], dealt to other pairs. The weights keep their distribution alone.

    The permutation depends on `seed` and on the pairs' ids, which differ, not on the order of the records.
    """
    values = _checked(difference)
    receivers = sorted(range(len(ids)), key=lambda position: ids[position])
    givers = list(receivers)
    Random(seed).shuffle(givers)
    shuffled = torch.empty_like(values)
    shuffled[receivers] = values[givers]
    return _narrow(shuffled, difference)


def filter_only(difference: Tensor) -> Tensor:
    """Control: weight 1 where R > 0, else 0 [pairs]. It drops what `clip` drops and does not weigh the rest."""
    return _narrow((_checked(difference) > 0).double(), difference)


def _checked(values: Tensor) -> Tensor:
    """Detached, float64 and finite: NaN would pass through a clip and end in the model."""
    wide = values.detach().double()
    bad = int((~wide.isfinite()).sum())
    if bad:
        raise UserError(f"{bad} of {wide.numel()} reward differences are NaN or infinite: score the data again")
    return wide


def _narrow(values: Tensor, like: Tensor) -> Tensor:
    """float64 where the input was float64, else float32: half precision would round the weights."""
    return values if like.dtype == torch.float64 else values.float()
