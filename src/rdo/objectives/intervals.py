"""Estimates with 95 % intervals, for shares and for means, without a dependency on scipy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import NormalDist
from typing import TypedDict

Z = NormalDist().inv_cdf(0.975)

# Student's t, 97.5 % quantile for 1 to 9 degrees of freedom; from 10 on the expansion below is right to 4 digits.
T_SMALL = (12.70620, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216)


class Estimate(TypedDict):
    """A number with its 95 % interval (`low`, `high` are None where it cannot be known) and what it rests on."""

    value: float | None
    low: float | None
    high: float | None
    count: int


def empty_estimate() -> Estimate:
    """The estimate of something that was never observed."""
    return {"value": None, "low": None, "high": None, "count": 0}


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t (Cornish-Fisher expansion around the normal quantile from 10 degrees on)."""
    if degrees < 1:
        raise ValueError(f"degrees of freedom must be at least 1, not {degrees}")
    if degrees <= len(T_SMALL):
        return T_SMALL[degrees - 1]
    first = (Z**3 + Z) / 4
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    fourth = (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160
    return Z + first / degrees + second / degrees**2 + third / degrees**3 + fourth / degrees**4


def wilson(successes: float, count: int) -> Estimate:
    """Share of successes with Wilson's 95 % interval, which stays inside [0, 1]; a tie counts as 0.5 success."""
    if not 0 <= successes <= count:  # also refuses NaN
        raise ValueError(f"{successes} successes in {count} trials")
    if count == 0:
        return empty_estimate()
    share = successes / count
    scale = 1 + Z * Z / count
    centre = (share + Z * Z / (2 * count)) / scale
    half = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count)) / scale
    # At 0 and at 1 the bound equals the share exactly; rounding must not put the share outside its own interval.
    return {
        "value": share,
        "low": max(0.0, min(share, centre - half)),
        "high": min(1.0, max(share, centre + half)),
        "count": count,
    }


def standard_deviation(values: Iterable[float]) -> float | None:
    """Sample standard deviation (divided by n - 1), or None for fewer than two values."""
    numbers = [float(value) for value in values]
    if len(numbers) < 2:
        return None
    mean = math.fsum(numbers) / len(numbers)
    return math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1))


def mean_interval(values: Iterable[float]) -> Estimate:
    """Mean with its 95 % t interval; one value alone has no interval, none at all has no mean."""
    numbers = [float(value) for value in values]
    for position, number in enumerate(numbers):
        if not math.isfinite(number):
            raise ValueError(f"value {position} of {len(numbers)} is {number}: a mean over it would mean nothing")
    if not numbers:
        return empty_estimate()
    mean = math.fsum(numbers) / len(numbers)
    deviation = standard_deviation(numbers)
    if deviation is None:
        return {"value": mean, "low": None, "high": None, "count": 1}
    half = t_quantile(len(numbers) - 1) * deviation / math.sqrt(len(numbers))
    return {"value": mean, "low": mean - half, "high": mean + half, "count": len(numbers)}


def win_tie_lose(differences: Iterable[float], tie_margin: float = 0.0) -> dict[str, Estimate]:
    """Shares of differences above `tie_margin`, within it and below its negative; the three values add up to 1."""
    if tie_margin < 0:
        raise ValueError(f"tie_margin must not be negative, not {tie_margin}")
    numbers = [float(difference) for difference in differences]
    if any(math.isnan(number) for number in numbers):
        raise ValueError("a difference is NaN: it is neither a win nor a tie nor a loss")
    wins = sum(number > tie_margin for number in numbers)
    losses = sum(number < -tie_margin for number in numbers)
    count = len(numbers)
    return {
        "win": wilson(wins, count),
        "tie": wilson(count - wins - losses, count),
        "lose": wilson(losses, count),
    }
