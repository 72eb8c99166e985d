"""Every loss as a pure function of tensors, unreduced: one value per pair, sample or response.

The caller multiplies by the coefficients (coefficients.py), sums, and divides by the count of the GLOBAL batch;
a mean taken here would be wrong under gradient accumulation and over ranks.

Log-probabilities are in nats. Unless said otherwise they are sums over a response's tokens, its end-of-sequence
token included and the query's tokens left out. Half precision and integers are computed in float32; float64 stays
float64. "RDO" is the paper that this project implements.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rdo.runtime.errors import UserError


def _wide(values: Tensor) -> Tensor:
    """At least float32: log-probabilities are sums of hundreds of terms, and their differences are small."""
    return values if values.dtype == torch.float64 else values.float()


# Policies


def dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    robust: bool = False,
) -> Tensor:
    """Direct preference optimization: four summed log-probabilities [pairs] -> loss [pairs].

    With h = beta * [(policy - reference)(chosen) - (policy - reference)(rejected)] and e = label_smoothing:

        e = 0           -log sigmoid(h)                                            (Rafailov et al. 2023, eq. 7)
        conservative    -(1 - e) log sigmoid(h) - e log sigmoid(-h)                (Mitchell 2023, cDPO)
        robust          [-(1 - e) log sigmoid(h) + e log sigmoid(-h)] / (1 - 2 e)  (Chowdhury et al. 2024)

    `beta` is per nat. RDO, section 2 ("DPO+rc") multiplies the result by R^alpha.
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise UserError(f"label_smoothing = {label_smoothing}: it is a share of wrong labels, from 0 to below 0.5")
    # Each response against its own reference first: at step 0 both differences are exactly 0, and the loss is ln 2.
    chosen = _wide(policy_chosen) - _wide(reference_chosen)
    rejected = _wide(policy_rejected) - _wide(reference_rejected)
    logit = beta * (chosen - rejected)
    as_labelled = -F.logsigmoid(logit)
    if label_smoothing == 0.0:
        return as_labelled
    turned_round = -F.logsigmoid(-logit)
    if robust:
        return ((1.0 - label_smoothing) * as_labelled - label_smoothing * turned_round) / (1.0 - 2.0 * label_smoothing)
    return (1.0 - label_smoothing) * as_labelled + label_smoothing * turned_round


def kto(
    log_ratio: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    *,
    beta: float,
    lambda_desirable: float = 1.0,
    lambda_undesirable: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimization: log_ratio [samples], desirable [samples] of bool, kl [] -> loss [samples].

    With h = log_ratio = policy - reference, in nats, and z0 = kl (see `kto_kl`; no gradient flows through it):

        desirable      lambda_desirable   * (1 - sigmoid(beta * (h - z0)))
        undesirable    lambda_undesirable * (1 - sigmoid(beta * (z0 - h)))

    Ethayarajh et al. 2024, section 4.1 (lambda_y minus the value). RDO, appendix A.1 multiplies it by R^alpha, the
    same for both responses of a pair.
    """
    baseline = kl.detach() if isinstance(kl, Tensor) else kl
    advantage = beta * (_wide(log_ratio) - baseline)
    # 1 - sigmoid(a) = sigmoid(-a), without the cancellation
    return torch.where(
        desirable, lambda_desirable * torch.sigmoid(-advantage), lambda_undesirable * torch.sigmoid(advantage)
    )


def kto_kl(mismatched_log_ratio: Tensor) -> Tensor:
    """KTO's z0 = max(0, mean of policy - reference over mismatched pairs (x, y')), in nats, detached: [samples] -> [].

    The samples are those of the global batch: the maximum comes after the mean, so a mean of each rank's z0 would be
    something else.
    """
    values = _wide(mismatched_log_ratio.detach())
    return (values.sum() / values.numel()).clamp(min=0.0)


def length_normalised(log_probability: Tensor, length: Tensor, length_penalty: float = 1.0) -> Tensor:
    """RRHF's p = log_probability / length^length_penalty: [responses], [responses] -> [responses].

    `length` is in tokens, at least 1, of the response itself and not of its padded row (where RRHF's published code
    differs from its paper). length_penalty = 1 gives nats per token, 0 the sum. Yuan et al. 2023, section 3.1.
    """
    return _wide(log_probability) / _wide(length) ** length_penalty


def rrhf_ranking(better: Tensor, worse: Tensor) -> Tensor:
    """RRHF's hinge on a pair that the policy ranks the wrong way round: max(0, worse - better), [pairs] -> [pairs].

    Both are length-normalised log-probabilities (`length_normalised`). Yuan et al. 2023, section 3.1. Its sign is
    misprinted in RDO, section 2 ("RRHF+rc"), whose coefficient R^alpha multiplies it.
    """
    # relu and not clamp: a pair exactly on the kink gets no gradient, as one that is ranked rightly
    return F.relu(_wide(worse) - _wide(better))


def rrhf(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    row_length: Tensor,
    *,
    length_penalty: float = 1.0,
    normalise_by: Literal["response", "row"] = "response",
) -> Tensor:
    """RRHF's ranking loss of a query's ordered pairs: summed log-probabilities and lengths [pairs] -> loss [pairs].

    The hinge of `rrhf_ranking` on length-normalised log-probabilities; the caller sums a query's pairs (the loss is a
    mean over QUERIES) and adds the cross-entropy of the best response. Yuan et al. 2023, section 3.1; RDO, section 2
    ("RRHF+rc"), whose printed sign would reward ranking wrongly.

    normalise_by="row" divides every response by `row_length`, the predicted tokens of the query's longest row, as
    RRHF's published code does by overwriting its labels in place: for comparison only.
    """
    if normalise_by == "row":
        chosen_length = rejected_length = row_length
    return rrhf_ranking(
        length_normalised(policy_chosen, chosen_length, length_penalty),
        length_normalised(policy_rejected, rejected_length, length_penalty),
    )


def rrhf_pairs(rewards: Sequence[float]) -> list[tuple[int, int]]:
    """All (better, worse) positions among one query's candidates with rewards[better] > rewards[worse]; ties give none.

    In order of `better`, then of `worse`. Yuan et al. 2023, section 3.1.
    """
    _require_finite(rewards)
    return [(i, j) for i, better in enumerate(rewards) for j, worse in enumerate(rewards) if better > worse]


def best_response(rewards: Sequence[float]) -> int:
    """Position of the highest reward among one query's candidates, the first one on ties: RRHF's target for `sft`."""
    _require_finite(rewards)
    return max(range(len(rewards)), key=lambda position: rewards[position])


def _require_finite(rewards: Sequence[float]) -> None:
    """NaN compares false with everything: it would drop out of the ranking without a word."""
    for position, reward in enumerate(rewards):
        if not isfinite(reward):
            raise UserError(f"the reward of candidate {position} is {reward}: score the data again")


def sft(log_probability: Tensor, length: Tensor, *, reduction: Literal["sum", "mean"] = "sum") -> Tensor:
    """Negative log-likelihood of each response: log_probability, length [responses] -> [responses].

    "sum" is in nats; "mean" divides by `length`, in tokens, and is in nats per token. The cross-entropy that RRHF
    (Yuan et al. 2023, section 3.1) and RDO, section 2 (the term L^sft) add for the best response.
    """
    total = -_wide(log_probability)
    return total if reduction == "sum" else total / _wide(length)


# Scorers


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """Pointwise reward model: rewards chosen, rejected [pairs] (logits) -> loss [pairs].

    -log sigmoid(chosen - rejected - margin). RDO, section 2, eq. 3; the margin is Llama 2's (Touvron et al. 2023).
    """
    return -F.logsigmoid(_wide(chosen) - _wide(rejected) - margin)


def difference(
    forward: Tensor,
    target: Tensor,
    duplicate: Tensor | None = None,
    reverse: Tensor | None = None,
    *,
    beta0: float = 0.0,
    beta1: float = 0.0,
) -> Tensor:
    """Difference model: outputs f (logits) -> loss [pairs].

        BCE(sigmoid(f(y1, y2)), target) + beta0 * f(yi, yi)^2 + beta1 * (f(y1, y2) + f(y2, y1))^2

    forward [pairs] is f(y1, y2) in the random order in which the pair was shown, target [pairs] is 1 where y1 is
    preferred, 0 where y2 is, 0.5 for a tie; duplicate [pairs] is f(yi, yi), i one of the two at random; reverse
    [pairs] is f(y2, y1). RDO, section 3.2, eq. 4 to 6, with the targets of eq. 4 printed as 1 and -1.
    """
    output = _wide(forward)
    loss = F.binary_cross_entropy_with_logits(output, target.to(output.dtype), reduction="none")
    if beta0 != 0.0:
        if duplicate is None:
            raise ValueError("beta0 needs duplicate, the outputs f(yi, yi)")
        loss = loss + beta0 * _wide(duplicate) ** 2
    if beta1 != 0.0:
        if reverse is None:
            raise ValueError("beta1 needs reverse, the outputs f(y2, y1)")
        loss = loss + beta1 * (output + _wide(reverse)) ** 2
    return loss
