"""Losses: the golden numbers of the reference implementations, gradients in float64, and properties."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdo.objectives import losses
from rdo.objectives.coefficients import coefficients, mean_weight
from rdo.runtime.errors import UserError

repeatable = settings(derandomize=True, deadline=None)  # the same cases everywhere, on slow machines too
EXTREMES = torch.tensor([-1e4, -100.0, -1.0, 0.0, 1.0, 100.0, 1e4])
log_probabilities = st.floats(-1e4, 0.0, allow_nan=False, width=32)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def close(actual: Tensor | float, *expected: float, tolerance: float = 6e-7) -> None:
    """Equal to the digits given: half of the sixth decimal, and float32's own rounding."""
    values = actual.tolist() if isinstance(actual, Tensor) else actual
    values = values if isinstance(values, list) else [values]
    assert values == pytest.approx(expected, abs=tolerance, rel=0)


def gradient_is_right(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    leaves = [values.double().requires_grad_() for values in inputs]
    assert torch.autograd.gradcheck(function, leaves)


# DPO

CHOSEN, REJECTED = tensor(-10, -20), tensor(-12, -18)
REFERENCE = tensor(-11, -19)


def golden_dpo(beta: float, **options: float) -> Tensor:
    return losses.dpo(CHOSEN, REJECTED, REFERENCE, REFERENCE, beta=beta, **options)  # type: ignore[arg-type]


def test_dpo_golden() -> None:
    close(golden_dpo(0.1), 0.598139, 0.798139)
    close(golden_dpo(0.2), 0.513015, 0.913015)
    close(golden_dpo(0.1, label_smoothing=0.1), 0.618139, 0.778139)
    close(golden_dpo(0.1, label_smoothing=0.1, robust=True), 0.573139, 0.823139)
    at_the_start = losses.dpo(CHOSEN, REJECTED, CHOSEN, REJECTED, beta=0.2)
    assert torch.equal(at_the_start, tensor(math.log(2), math.log(2)))  # to the bit


def test_dpo_with_coefficients_golden() -> None:
    loss, reward_difference = golden_dpo(0.2), tensor(0.25, 4)
    half = coefficients(reward_difference, alpha=0.5).weight
    full = coefficients(reward_difference, alpha=1).weight
    close(half * loss, 0.256508, 1.826030)
    close((half * loss).mean(), 1.041269)
    close(full * loss, 0.128254, 3.652061)
    close((full * loss).mean(), 1.890157)
    for alpha, weight, expected in ((0.5, half, 0.833015), (1.0, full, 0.889486)):
        scaled = coefficients(reward_difference, alpha=alpha, scale=mean_weight(weight)).weight
        close((scaled * loss).mean(), expected)


def test_dpo_with_coefficients_golden_gradient() -> None:
    policy = CHOSEN.clone().requires_grad_()
    loss = losses.dpo(policy, REJECTED, REFERENCE, REFERENCE, beta=0.2)
    (coefficients(tensor(0.25, 4), alpha=0.5).weight * loss).sum().backward()
    assert policy.grad is not None
    close(policy.grad, -0.040131, -0.239475)


@pytest.mark.parametrize(("negative", "expected"), [("clip", 0.362757), ("abs", 0.685556), ("flip", 0.544135)])
def test_dpo_with_negative_differences_golden(negative: str, expected: float) -> None:
    weight, flipped = coefficients(tensor(2, -0.5), alpha=0.5, negative=negative)
    chosen, rejected = torch.where(flipped, REJECTED, CHOSEN), torch.where(flipped, CHOSEN, REJECTED)
    close((weight * losses.dpo(chosen, rejected, REFERENCE, REFERENCE, beta=0.2)).mean(), expected)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "robust": True}])
def test_dpo_gradient(options: dict[str, float]) -> None:
    def loss(*inputs: Tensor) -> Tensor:
        return losses.dpo(*inputs, beta=0.3, **options)  # type: ignore[arg-type]

    gradient_is_right(loss, CHOSEN, REJECTED, REFERENCE, REFERENCE + 0.5)


@repeatable
@given(log_probabilities, log_probabilities, log_probabilities, log_probabilities, st.floats(0.01, 1.0))
def test_dpo_swapped_differs_by_the_logit(
    chosen: float, rejected: float, ref_c: float, ref_r: float, beta: float
) -> None:
    """-log sigmoid(-h) + log sigmoid(h) = h; and label smoothing e is that share of the swapped loss."""
    inputs = [torch.tensor([value], dtype=torch.float64) for value in (chosen, rejected, ref_c, ref_r)]
    swapped = [inputs[position] for position in (1, 0, 3, 2)]
    loss, other = losses.dpo(*inputs, beta=beta), losses.dpo(*swapped, beta=beta)
    logit = beta * ((chosen - ref_c) - (rejected - ref_r))
    assert (other - loss).item() == pytest.approx(logit, rel=1e-9, abs=1e-9)
    conservative = losses.dpo(*inputs, beta=beta, label_smoothing=0.25)
    assert conservative.item() == pytest.approx((0.75 * loss + 0.25 * other).item(), rel=1e-9, abs=1e-9)
    # the robust loss is unbiased: labels that are wrong with probability e give back the plain loss
    robust = losses.dpo(*inputs, beta=beta, label_smoothing=0.25, robust=True)
    robust_other = losses.dpo(*swapped, beta=beta, label_smoothing=0.25, robust=True)
    assert (0.75 * robust + 0.25 * robust_other).item() == pytest.approx(loss.item(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("share", [-0.1, 0.5, math.nan])
def test_dpo_refuses_a_label_smoothing_out_of_range(share: float) -> None:
    with pytest.raises(UserError, match="label_smoothing"):
        golden_dpo(0.1, label_smoothing=share)


# RRHF


def rrhf(p: Tensor, rewards: list[float], alpha: float = 0.0) -> tuple[Tensor, int]:
    """One query's weighted hinges, and how many pairs there are."""
    pairs = losses.rrhf_pairs(rewards)
    better, worse = (torch.tensor(side) for side in zip(*pairs, strict=True))
    reward = torch.tensor(rewards)
    weight = coefficients(reward[better] - reward[worse], alpha=alpha).weight
    return weight * losses.rrhf_ranking(p[better], p[worse]), len(pairs)


def normalised(token_log_probabilities: list[list[float]]) -> Tensor:
    total = torch.tensor([sum(tokens) for tokens in token_log_probabilities])
    return losses.length_normalised(total, torch.tensor([len(tokens) for tokens in token_log_probabilities]))


def test_rrhf_golden() -> None:
    p, rewards = normalised([[-1, -1, -1], [-2, -2], [-0.5]]), [0.2, 1.0, -0.5]
    close(p, -1, -2, -0.5)
    close(losses.length_normalised(tensor(-6, -6), torch.tensor([4, 9]), 0.5), -3, -2)
    close(rrhf(p, rewards)[0].sum(), 3.0)
    close(rrhf(p, rewards, alpha=0.5)[0].sum(), 3.149875)
    close(rrhf(p, rewards, alpha=1.0)[0].sum(), 3.4)
    assert losses.best_response(rewards) == 1
    close(losses.sft(tensor(-4), tensor(2), reduction="mean"), 2.0)
    close(losses.sft(tensor(-4), tensor(2), reduction="sum"), 4.0)


@pytest.mark.parametrize(("normalise_by", "expected"), [("response", 0.0), ("row", 0.8)])
def test_rrhf_golden_by_lengths(normalise_by: str, expected: float) -> None:
    """RRHF's published code divides every candidate by the padded length, here a row of 5 predicted tokens."""
    policy, length, rewards = tensor(-6, -2, -2), tensor(3, 2, 1), [0.2, 1.0, -0.5]
    pairs = losses.rrhf_pairs(rewards)
    better, worse = [i for i, _ in pairs], [j for _, j in pairs]
    inputs = (policy[better], policy[worse], length[better], length[worse], torch.full((len(pairs),), 5.0))
    close(losses.rrhf(*inputs, normalise_by=normalise_by).sum(), expected)  # type: ignore[arg-type]


def test_rrhf_golden_six_candidates() -> None:
    p, rewards = tensor(-1, -1.2, -0.9, -0.8, -1.5, -1.1), [0.1, 0.7, -0.4, 0.7, 1.5, -1.0]
    hinges, pairs = rrhf(p, rewards)
    assert pairs == 14  # of 15: the tie is skipped
    assert int((hinges > 0).sum()) == 9
    close(hinges.sum(), 3.2)
    close(rrhf(p, rewards, alpha=0.5)[0].sum(), 3.616190)
    close(rrhf(p, rewards, alpha=1.0)[0].sum(), 4.31)
    assert losses.best_response(rewards) == 4


def test_rrhf_ranking_has_no_gradient_for_a_tie() -> None:
    better = tensor(-1, -1).requires_grad_()
    losses.rrhf_ranking(better, tensor(-1, -0.5)).sum().backward()
    assert better.grad is not None
    close(better.grad, 0, -1)


def test_rrhf_gradients() -> None:
    gradient_is_right(losses.rrhf_ranking, tensor(-1, -2, -3), tensor(-2, -1, -0.5))
    gradient_is_right(lambda total: losses.length_normalised(total, torch.tensor([3, 7]), 0.7), tensor(-4, -9))
    for reduction in ("sum", "mean"):
        gradient_is_right(
            lambda total, r=reduction: losses.sft(total, torch.tensor([3, 7]), reduction=r), tensor(-4, -9)
        )


@repeatable
@given(st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=8))
def test_rrhf_pairs_are_every_untied_pair_once(rewards: list[float]) -> None:
    pairs = losses.rrhf_pairs(rewards)
    assert all(rewards[better] > rewards[worse] for better, worse in pairs)
    count = len(rewards)
    ties = sum(rewards[i] == rewards[j] for i in range(count) for j in range(i + 1, count))
    assert len(set(pairs)) == len(pairs) == count * (count - 1) // 2 - ties
    assert losses.best_response(rewards) == rewards.index(max(rewards))


@pytest.mark.parametrize("function", [losses.rrhf_pairs, losses.best_response])
def test_rrhf_refuses_rewards_that_cannot_be_ordered(function: Callable[[list[float]], object]) -> None:
    with pytest.raises(UserError, match="candidate 1 is nan"):
        function([0.5, math.nan])


# KTO

LOG_RATIO = tensor(1, -1, -1, 4)
DESIRABLE = torch.tensor([True, True, False, False])
MISMATCHED = tensor(1, 1, -1, 2)


def test_kto_golden() -> None:
    kl = losses.kto_kl(MISMATCHED)
    assert kl == 0.75
    loss = losses.kto(LOG_RATIO, DESIRABLE, kl, beta=0.1)
    close(loss, 0.493750, 0.543639, 0.456361, 0.580542)
    close(loss.mean(), 0.518573)
    close(losses.kto(LOG_RATIO, DESIRABLE, kl, beta=0.1, lambda_desirable=1.33).mean(), 0.604158)
    undesirable = losses.kto(LOG_RATIO, DESIRABLE, kl, beta=0.1, lambda_undesirable=2.0)
    close(undesirable, 0.493750, 0.543639, 2 * 0.456361, 2 * 0.580542, tolerance=1.2e-6)
    assert losses.kto_kl(-MISMATCHED) == 0.0  # never negative
    close(losses.kto(LOG_RATIO, DESIRABLE, losses.kto_kl(-MISMATCHED), beta=0.1).mean(), 0.518427)


@pytest.mark.parametrize(("alpha", "expected"), [(0.5, 0.680854), (1.0, 1.183563)])
def test_kto_with_coefficients_golden(alpha: float, expected: float) -> None:
    """Both responses of a pair carry the pair's weight."""
    weight = coefficients(tensor(0.25, 4), alpha=alpha).weight.repeat(2)
    loss = losses.kto(LOG_RATIO, DESIRABLE, losses.kto_kl(MISMATCHED), beta=0.1)
    close((weight * loss).mean(), expected)


def test_kto_divergence_carries_no_gradient() -> None:
    mismatched = MISMATCHED.clone().requires_grad_()
    assert not losses.kto_kl(mismatched).requires_grad
    assert not losses.kto(LOG_RATIO, DESIRABLE, mismatched.mean(), beta=0.1).requires_grad


def test_kto_gradient() -> None:
    gradient_is_right(lambda ratio: losses.kto(ratio, DESIRABLE, 0.75, beta=0.3, lambda_desirable=1.33), LOG_RATIO)


# Scorers


def test_bradley_terry_golden() -> None:
    chosen, rejected = tensor(1, -0.5), tensor(0, 0.5)
    loss = losses.bradley_terry(chosen, rejected)
    close(loss, 0.313262, 1.313262)
    close(loss.mean(), 0.813262)
    close(losses.bradley_terry(chosen, rejected, margin=0.5).mean(), 1.087745)
    close(losses.bradley_terry(chosen, rejected, margin=tensor(0.5, 0.5)).mean(), 1.087745)


FORWARD, TARGET = tensor(1.2, -0.3), tensor(1, 0)
DUPLICATE, REVERSE = tensor(0.4, -0.2), tensor(-1, 0.5)


def test_difference_golden() -> None:
    plain = losses.difference(FORWARD, TARGET)
    close(plain, 0.263282, 0.554355)
    close(plain.mean(), 0.408819)
    close((losses.difference(FORWARD, TARGET, DUPLICATE, beta0=1.0) - plain).mean(), 0.1)
    close((losses.difference(FORWARD, TARGET, reverse=REVERSE, beta1=1.0) - plain).mean(), 0.04)
    close(losses.difference(FORWARD, TARGET, DUPLICATE, REVERSE, beta0=0.1, beta1=0.1).mean(), 0.422819)


def test_difference_of_a_constant_output_and_of_a_tie() -> None:
    """A constant f = 5 looks perfect on rows that always show the chosen response first."""
    constant = tensor(5, 5, 5, 5)
    close(losses.difference(constant, torch.ones(4)).mean(), 0.0067, tolerance=5e-5)
    close(losses.difference(constant, tensor(1, 0, 0, 1)).mean(), 2.507, tolerance=5e-4)
    at, below, above = losses.difference(tensor(0, -0.1, 0.1), tensor(0.5, 0.5, 0.5))
    assert at < below == above  # a tie's loss is least at 0


def test_difference_needs_what_it_weighs() -> None:
    with pytest.raises(ValueError, match="duplicate"):
        losses.difference(FORWARD, TARGET, beta0=0.1)
    with pytest.raises(ValueError, match="reverse"):
        losses.difference(FORWARD, TARGET, DUPLICATE, beta0=0.1, beta1=0.1)


def test_scorer_gradients() -> None:
    gradient_is_right(lambda c, r: losses.bradley_terry(c, r, margin=0.2), tensor(1, -0.5), tensor(0, 0.5))

    def loss(forward: Tensor, duplicate: Tensor, reverse: Tensor) -> Tensor:
        return losses.difference(forward, tensor(1, 0.5), duplicate, reverse, beta0=0.1, beta1=0.2)

    gradient_is_right(loss, FORWARD, DUPLICATE, REVERSE)


# All of them


def every_loss(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    ones, odd = torch.ones_like(first), torch.arange(first.numel()) % 2 == 1
    return {
        "dpo": losses.dpo(first, second, 0 * first, 0 * second, beta=0.2),
        "conservative": losses.dpo(first, second, 0 * first, 0 * second, beta=0.2, label_smoothing=0.1),
        "robust": losses.dpo(first, second, 0 * first, 0 * second, beta=0.2, label_smoothing=0.1, robust=True),
        "kto": losses.kto(first, odd, losses.kto_kl(second), beta=0.1),
        "rrhf": losses.rrhf_ranking(losses.length_normalised(first, ones), losses.length_normalised(second, ones)),
        "sft": losses.sft(first, 2 * ones, reduction="mean"),
        "bradley_terry": losses.bradley_terry(first, second),
        "difference": losses.difference(first, 0.5 * ones, second, second, beta0=0.1, beta1=0.1),
    }


def test_extreme_inputs_stay_finite_with_finite_gradients() -> None:
    first = EXTREMES.repeat(EXTREMES.numel()).requires_grad_()
    second = EXTREMES.repeat_interleave(EXTREMES.numel()).requires_grad_()
    for name, loss in every_loss(first, second).items():
        assert loss.isfinite().all(), name
        gradients = torch.autograd.grad(loss.sum(), (first, second), allow_unused=True)
        assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None), name


def test_wrong_by_far_costs_in_proportion() -> None:
    """A naive log(sigmoid(x)) is infinite, or floored, from x = -104 on."""
    close(losses.bradley_terry(tensor(-1e4), tensor(0)), 1e4)
    close(losses.difference(tensor(-1e4), tensor(1)), 1e4)
    close(losses.dpo(tensor(-1e4), tensor(0), tensor(0), tensor(0), beta=1.0), 1e4)


@pytest.mark.parametrize(
    ("given_dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision_inside(given_dtype: torch.dtype, expected: torch.dtype) -> None:
    """Half precision is widened before the arithmetic: -300 + 1.5 is exact in float32 and not in bfloat16."""
    first, second = tensor(-300, -2).to(given_dtype), tensor(-1.5, -7).to(given_dtype)
    wide = every_loss(first.double(), second.double())
    for name, loss in every_loss(first, second).items():
        assert loss.dtype == expected, name
        assert loss.shape == first.shape, name
        assert torch.allclose(loss.double(), wide[name], rtol=1e-6, atol=1e-7), name
