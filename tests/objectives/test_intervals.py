"""Intervals against numbers worked out by hand or taken from published tables."""

import math

import pytest

from rdo.objectives.intervals import empty_estimate, mean_interval, standard_deviation, t_quantile, wilson, win_tie_lose


def test_wilson_by_hand() -> None:
    # p = 0.8, n = 10, z^2 = 3.841459: centre = (0.8 + 0.192073) / 1.384146, half = 0.226606
    found = wilson(8, 10)
    assert found["value"] == pytest.approx(0.8)
    assert found["low"] == pytest.approx(0.490162, abs=1e-5)
    assert found["high"] == pytest.approx(0.943318, abs=1e-5)
    assert found["count"] == 10


def test_wilson_at_the_ends_and_with_a_half() -> None:
    # 0 of 10: the upper bound is z^2 / (n + z^2)
    none = wilson(0, 10)
    assert none["low"] == 0.0
    assert none["high"] == pytest.approx(3.841459 / 13.841459, abs=1e-6)
    every = wilson(10, 10)
    assert every["high"] == 1.0
    assert every["low"] == pytest.approx(10 / 13.841459, abs=1e-6)
    half = wilson(0.5, 1)
    assert half["value"] == 0.5
    assert half["low"] + half["high"] == pytest.approx(1.0)


def test_wilson_of_nothing_and_of_nonsense() -> None:
    assert wilson(0, 0) == empty_estimate() == {"value": None, "low": None, "high": None, "count": 0}
    for successes, count in [(2, 1), (-1, 4), (math.nan, 4)]:
        with pytest.raises(ValueError, match="successes"):
            wilson(successes, count)


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.7062), (2, 4.3027), (9, 2.2622), (10, 2.2281), (12, 2.1788), (30, 2.0423), (120, 1.9799), (10**6, 1.95996)],
)
def test_t_quantile_is_the_published_table(degrees: int, expected: float) -> None:
    assert t_quantile(degrees) == pytest.approx(expected, abs=1e-4)


def test_mean_interval_by_hand() -> None:
    # mean 2, sd 1, half width 4.30265 / sqrt(3)
    found = mean_interval([1.0, 2.0, 3.0])
    assert found["value"] == 2.0
    assert found["high"] == pytest.approx(2 + 4.30265 / math.sqrt(3))
    assert found["low"] == pytest.approx(2 - 4.30265 / math.sqrt(3))
    assert found["count"] == 3


def test_mean_interval_of_few_values() -> None:
    assert mean_interval([]) == empty_estimate()
    assert mean_interval([4.0]) == {"value": 4.0, "low": None, "high": None, "count": 1}
    with pytest.raises(ValueError, match="value 1 of 2 is nan"):
        mean_interval([1.0, math.nan])


def test_standard_deviation() -> None:
    assert standard_deviation([1.0, 2.0, 3.0, 4.0]) == pytest.approx(math.sqrt(5 / 3))
    assert standard_deviation([1.0]) is None


def test_win_tie_lose() -> None:
    found = win_tie_lose([0.5, 0.1, -0.1, 0.0, -2.0], tie_margin=0.1)
    assert [found[name]["value"] for name in ("win", "tie", "lose")] == [0.2, 0.6, 0.2]
    without = win_tie_lose([0.5, 0.1, -0.1, 0.0, -2.0])
    assert [without[name]["value"] for name in ("win", "tie", "lose")] == [0.4, 0.2, 0.4]
    assert win_tie_lose([])["win"] == empty_estimate()
    with pytest.raises(ValueError, match="tie_margin"):
        win_tie_lose([1.0], tie_margin=-1)
    with pytest.raises(ValueError, match="NaN"):
        win_tie_lose([math.nan])
