"""Estimates with 95 % intervals, for shares and for means, without a dependency on scipy."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
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
    if degrees <= len(T_SMALL):
        return T_SMALL[degrees - 1]
    first = (Z**3 + Z) / 4
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    fourth = (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160
    return Z + first / degrees + second / degrees**2 + third / degrees**3 + fourth / degrees**4


def wilson(successes: float, count: float) -> Estimate:
    """Share of successes with Wilson's 95 % interval, which stays inside [0, 1]; a tie counts as 0.5 success."""
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
        "count": round(count),
    }


def share_interval(credits: Iterable[float], queries: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of numbers from 0 to 1 with Wilson's interval; queries: which of them belong together, as below.

    What belongs together counts as fewer observations, by the design effect: how much wider the mean's own interval is
    than of independent ones (Kish 1965). Where the share is 0 or 1, and so nothing varies, a query counts once.
    """
    numbers = list(credits)
    count, clusters = len(numbers), len(numbers) if queries is None else len(set(queries))
    if count == clusters:
        return wilson(sum(numbers), count)
    share = sum(numbers) / count
    independent = share * (1 - share) / count
    effect = standard_error(numbers, share, queries) ** 2 / independent if independent and clusters > 1 else math.inf
    effect = min(max(effect, 1.0), count / clusters)
    return {**wilson(sum(numbers) / effect, count / effect), "value": share, "count": count}


def mean_interval(values: Iterable[float], queries: Sequence[Hashable] | None = None) -> Estimate:
    """Mean with its 95 % t interval; one value alone has no interval, none at all has no mean.

    queries: of each value the query that it belongs to: values of one query are not independent, so the interval is
    over queries (Liang and Zeger 1986). None: each has its own.
    """
    numbers = [float(value) for value in values]
    count, clusters = len(numbers), len(numbers) if queries is None else len(set(queries))
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"of {count} values some are NaN or infinite: a mean over them would mean nothing")
    if not numbers:
        return empty_estimate()
    mean = math.fsum(numbers) / count
    if clusters == 1:
        return {"value": mean, "low": None, "high": None, "count": count}
    half = t_quantile(clusters - 1) * standard_error(numbers, mean, queries)
    return {"value": mean, "low": mean - half, "high": mean + half, "count": count}


def standard_error(numbers: Sequence[float], mean: float, queries: Sequence[Hashable] | None) -> float:
    """Of a mean over at least two queries."""
    sums: dict[Hashable, float] = defaultdict(float)
    for query, number in zip(range(len(numbers)) if queries is None else queries, numbers, strict=True):
        sums[query] += number - mean
    deviation = math.sqrt(math.fsum(number**2 for number in sums.values()) / (len(sums) - 1))
    return deviation / math.sqrt(len(sums)) * (len(sums) / len(numbers))


def win_tie_lose(differences: Iterable[float], queries: Sequence[Hashable] | None = None) -> dict[str, Estimate]:
    """Shares of differences above, at and below 0; the three values add up to 1. queries: as above."""
    numbers = list(differences)
    shares = {"win": [n > 0 for n in numbers], "tie": [n == 0 for n in numbers], "lose": [n < 0 for n in numbers]}
    return {name: share_interval(found, queries) for name, found in shares.items()}
