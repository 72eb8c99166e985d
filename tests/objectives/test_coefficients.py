"""Coefficients: R -> w and what R < 0 means, the scale, the statistics and the ablations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdo.objectives import losses
from rdo.objectives.coefficients import NEGATIVE, coefficients, filter_only, mean_weight, shuffle, statistics
from rdo.runtime.errors import UserError

repeatable = settings(derandomize=True, deadline=None)  # the same cases everywhere, on slow machines too
differences = st.lists(st.floats(-1e4, 1e4, allow_nan=False, width=32), min_size=1, max_size=20).map(torch.tensor)
alphas = st.floats(0.01, 1.0)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize(
    ("negative", "expected", "flipped"),
    [
        ("clip", [2.0, 0.0, 0.0, 0.0], [False] * 4),
        ("abs", [2.0, 0.0, 0.5, 3.0], [False] * 4),
        ("flip", [2.0, 0.0, 0.5, 3.0], [False, False, True, True]),
        ("floor", [2.0, 0.1, 0.1, 0.1], [False] * 4),  # nor does it fall as R grows
    ],
)
def test_negative_differences(negative: str, expected: list[float], flipped: list[bool]) -> None:
    result = coefficients(tensor(4, 0, -0.25, -9), alpha=0.5, negative=negative, epsilon=0.01)
    assert torch.allclose(result.weight, torch.tensor(expected), rtol=1e-6, atol=0)
    assert result.flipped.tolist() == flipped


def test_error_counts_the_negative_ones() -> None:
    with pytest.raises(UserError, match=r"^2 of 4 pairs .*rc\.negative"):
        coefficients(tensor(1, -1, 0, -2), alpha=0.5, negative="error")
    assert coefficients(tensor(1, 0, 4), alpha=0.5, negative="error").weight.tolist() == [1.0, 0.0, 2.0]


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_differences_that_are_not_finite(alpha: float, bad: float) -> None:
    """Also for alpha = 0, where they would do no harm: the file of scores is broken."""
    with pytest.raises(UserError, match="1 of 3 reward differences"):
        coefficients(tensor(1, bad, 2), alpha=alpha)


@pytest.mark.parametrize(
    ("given_dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_precision(given_dtype: torch.dtype, expected: torch.dtype, alpha: float) -> None:
    result = coefficients(torch.tensor([2.0, 3.0], dtype=given_dtype), alpha=alpha)
    assert result.weight.dtype == expected
    assert result.weight.tolist() == pytest.approx(
        [2**alpha, 3**alpha], rel=1e-6 if expected == torch.float32 else 1e-15
    )


def test_no_gradient_through_the_weight() -> None:
    """d/dR of R^0.5 is infinite at 0: it would turn a whole step into NaN."""
    assert not coefficients(tensor(0, 1).requires_grad_(), alpha=0.5).weight.requires_grad


@repeatable
@given(differences, st.sampled_from(NEGATIVE), st.floats(0.0, 10.0))
def test_alpha_zero_is_exactly_no_coefficient(values: Tensor, negative: str, scale: float) -> None:
    weight, flipped = coefficients(values, alpha=0.0, negative=negative, scale=scale)
    assert torch.equal(weight, torch.ones_like(values))
    assert not flipped.any()
    loss = losses.dpo(values, values.flip(0), 0 * values, 0 * values, beta=0.2)
    assert torch.equal((weight * loss).sum(), loss.sum())


@repeatable
@given(differences, alphas, st.sampled_from(["clip", "abs", "flip", "floor"]))
def test_weights_are_finite_and_never_negative(values: Tensor, alpha: float, negative: str) -> None:
    weight, flipped = coefficients(values, alpha=alpha, negative=negative)
    assert weight.isfinite().all()
    assert (weight >= 0).all()
    assert negative == "flip" or not flipped.any()
    assert torch.equal(coefficients(values.double(), alpha=alpha).weight > 0, values > 0)  # what clip keeps
    agreed = values >= 1e-3  # where the scorer agrees with the label, the rule makes no difference
    assert torch.equal(weight[agreed], coefficients(values[agreed], alpha=alpha).weight)


@repeatable
@given(differences, alphas, st.integers(0, 19))
def test_weight_does_not_depend_on_the_batch(values: Tensor, alpha: float, position: int) -> None:
    position %= values.numel()
    alone = coefficients(values[position : position + 1], alpha=alpha, negative="abs").weight
    assert torch.equal(alone, coefficients(values, alpha=alpha, negative="abs").weight[position : position + 1])


# Scale and statistics


def test_mean_weight_does_not_depend_on_the_order() -> None:
    weights = torch.tensor([1e16, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert mean_weight(weights) == mean_weight(weights.flip(0)) == (1e16 + 4.0) / 5


@repeatable
@given(differences.filter(lambda values: bool((values > 1e-3).any())), alphas)
def test_scaled_by_the_mean_the_weights_average_one(values: Tensor, alpha: float) -> None:
    values = values.double()
    scale = mean_weight(coefficients(values, alpha=alpha).weight)
    assert coefficients(values, alpha=alpha, scale=scale).weight.mean().item() == pytest.approx(1.0, rel=1e-9)


def test_there_is_nothing_to_train_on_without_a_positive_difference() -> None:
    with pytest.raises(UserError, match="every coefficient is 0"):
        mean_weight(coefficients(tensor(-1, 0), alpha=0.5).weight)


def test_statistics() -> None:
    values = tensor(4, 1, -1, 0, -9)
    wanted = {"negative_share": 0.4, "mean": 0.6, "effective_sample_size": 9 / 5, "effective_sample_share": 9 / 25}
    assert statistics(values, coefficients(values, alpha=0.5).weight) == pytest.approx(wanted)
    assert statistics(values, coefficients(values, alpha=0).weight)["effective_sample_share"] == 1.0
    assert statistics(values, 0 * values)["effective_sample_size"] == 0.0


# Ablations

IDS = [f"pair-{position}" for position in range(12)]
VALUES = torch.arange(12.0)


def test_shuffle_deals_the_same_differences_to_other_pairs() -> None:
    shuffled = shuffle(VALUES, IDS, seed=0)
    assert shuffled.sort().values.equal(VALUES)
    assert not shuffled.equal(VALUES)
    assert shuffled.equal(shuffle(VALUES, IDS, seed=0))
    assert not shuffled.equal(shuffle(VALUES, IDS, seed=1))


@repeatable
@given(st.permutations(range(12)))
def test_shuffle_does_not_depend_on_the_order_of_the_records(order: list[int]) -> None:
    shuffled = shuffle(VALUES[order], [IDS[position] for position in order], seed=3)
    assert shuffled.equal(shuffle(VALUES, IDS, seed=3)[order])


def test_filter_only() -> None:
    assert filter_only(tensor(0.01, 0, -3, 9)).tolist() == [1.0, 0.0, 0.0, 1.0]
    with pytest.raises(UserError, match="NaN"):
        filter_only(tensor(1, math.nan))
