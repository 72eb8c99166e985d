"""Intervals against numbers worked out by hand or taken from published tables."""

import math

import pytest

from rdo.objectives.intervals import empty_estimate, mean_interval, share_interval, t_quantile, wilson, win_tie_lose

Z2, T2 = 3.841459, 4.30265  # the normal quantile squared, Student's with 2 degrees of freedom


@pytest.mark.parametrize(
    ("successes", "count", "value", "low", "high"),
    [
        # centre = (0.8 + 0.192073) / 1.384146, half = 0.226606
        (8, 10, 0.8, 0.490162, 0.943318),
        (0, 10, 0.0, 0.0, Z2 / (10 + Z2)),
        (10, 10, 1.0, 10 / (10 + Z2), 1.0),
        # a tie: half = sqrt(Z2 / 4 + Z2^2 / 4) / (1 + Z2)
        (0.5, 1, 0.5, 0.5 - 0.445387, 0.5 + 0.445387),
    ],
)
def test_wilson_by_hand(successes: float, count: int, value: float, low: float, high: float) -> None:
    wanted = {"value": value, "low": low, "high": high, "count": count}
    assert wilson(successes, count) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.7062), (2, 4.3027), (9, 2.2622), (10, 2.2281), (12, 2.1788), (30, 2.0423), (120, 1.9799), (10**6, 1.95996)],
)
def test_t_quantile_is_the_published_table(degrees: int, expected: float) -> None:
    assert t_quantile(degrees) == pytest.approx(expected, abs=1e-4)


def test_mean_interval_by_hand() -> None:
    half = T2 / math.sqrt(3)  # the standard deviation is 1
    wanted = {"value": 2.0, "low": 2 - half, "high": 2 + half, "count": 3}
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx(wanted)
    assert mean_interval([4.0]) == {"value": 4.0, "low": None, "high": None, "count": 1}
    with pytest.raises(ValueError, match="of 2 values some are NaN"):
        mean_interval([1.0, math.nan])


def test_values_of_one_query_count_as_one_observation_if_they_are_alike() -> None:
    values, queries = [1.0, 2.0, 3.0], ["a", "b", "c"]
    alone = mean_interval(values)
    assert mean_interval(values, queries) == alone
    repeated = mean_interval(values * 5, queries * 5)  # the same fifteen times: nothing new was learnt
    assert repeated == pytest.approx({**alone, "count": 15})
    # sums of deviations -1 - 1 and 1 + 0 + 1 around 2.2: (-2.4, 2.4), so 2.4 * sqrt(2) / sqrt(2) * 2 / 5
    found = mean_interval([1, 1, 3, 3, 3], ["a", "a", "b", "b", "b"])
    assert found["high"] - found["value"] == pytest.approx(12.7062 * 0.96, abs=1e-4)
    assert mean_interval([1.0, 2.0], ["a", "a"]) == {"value": 1.5, "low": None, "high": None, "count": 2}


def test_shares_over_queries() -> None:
    shares, queries = [1, 0, 1, 1, 0, 1, 1, 1, 0, 1], list("abcdefghij")
    alone = wilson(7, 10)
    assert share_interval(shares, queries) == share_interval(shares) == alone
    assert share_interval(shares * 20, queries * 20) == pytest.approx({**alone, "count": 200})
    assert share_interval([1] * 50, [n % 10 for n in range(50)]) == {**wilson(10, 10), "count": 50}
    # One query decides nothing: its fifty answers are one observation.
    assert share_interval([1, 0] * 25, ["a"] * 50) == pytest.approx({**wilson(0.5, 1), "count": 50})
    # Answers that do not go with the query are as good as of fifty queries.
    mixed = share_interval([n % 2 for n in range(60)], [n // 2 for n in range(60)])
    assert mixed == wilson(30, 60)


def test_win_tie_lose() -> None:
    found = win_tie_lose([0.5, 0.1, -0.1, 0.0, -2.0])
    assert [found[name]["value"] for name in ("win", "tie", "lose")] == [0.4, 0.2, 0.4]


def test_of_nothing() -> None:
    nothing = {"value": None, "low": None, "high": None, "count": 0}
    assert wilson(0, 0) == mean_interval([]) == win_tie_lose([])["win"] == empty_estimate() == nothing
