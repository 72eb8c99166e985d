"""What a loss learns from: pairs or a ranking, samples that are labelled alone, and the weights of pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from rdo.data.records import Record
from rdo.objectives import coefficients
from rdo.objectives.choice import LossChoice
from rdo.objectives.losses import best_response, rrhf_pairs
from rdo.runtime.errors import UserError
from rdo.runtime.store import stable_seed
from rdo.settings import RcConfig
from rdo.stages.score import Scores
from rdo.training.alignment import Pair, Sample

RANKING_SCORER: dict[str, str] = {"reward": "reward", "diff": "diff", "diff_baseline": "diff"}


@dataclass(frozen=True, slots=True)
class Supervision:
    """What a loss learns from in one record: (better, worse) pairs of its responses, responses that are labelled
    alone (and in no pair, which would count them twice), and the best response, where one is known."""

    record_id: str
    pairs: tuple[tuple[int, int], ...]
    samples: tuple[Sample, ...]
    best: int | None


def supervision(record: Record, loss: LossChoice, read: Mapping[str, Scores]) -> Supervision:
    """The pairs that the loss compares, the labelled ones or all strict ones of a ranking, and the samples it takes."""
    if loss.reads_labels:
        labelled = tuple((p.chosen, p.rejected) for p in record.preferences if not p.tie)
        alone = (record.desirable or ()) if loss.takes_unpaired else ()
        wins = [sum(i == response for i, _ in labelled) for response in range(len(record.responses))]
        best = wins.index(max(wins)) if labelled else None
        if not labelled and True in alone:
            best = alone.index(True)
        paired = {response for pair in labelled for response in pair}
        samples = tuple(Sample(n, desirable) for n, desirable in enumerate(alone) if n not in paired)
        return Supervision(record.id, labelled, samples, best)
    if loss.ranking == "scores":
        assert record.scores is not None  # see check_data
        ranks = list(record.scores)
    else:
        kind = RANKING_SCORER[loss.ranking]
        ranks = read[kind].ranking(record, baseline=loss.ranking == "diff_baseline")
    return Supervision(record.id, tuple(rrhf_pairs(ranks)), (), best_response(ranks))


def own_scores(records: Iterable[Record]) -> Scores:
    """The scores that the data brings, as those of a pointwise scorer: of the toy world, the true rewards."""
    # check_data has seen that every record has some
    return Scores({(r.id, response): score for r in records for response, score in enumerate(r.scores or ())}, {})


def count_samples(
    loss: LossChoice, pairs: Sequence[Sequence[Pair]], labels: Sequence[Supervision]
) -> dict[str, int] | None:
    """How many samples are desirable and undesirable, for a loss that knows the two; says so, and whether its weights
    balance them as KTO's authors advise: lambda_D n_D : lambda_U n_U from 1 to 4/3 (Ethayarajh et al. 2024, eq. 8)."""
    if "desirable" not in loss.inputs:
        return None
    paired, alone = sum(map(len, pairs)), [sample.desirable for entry in labels for sample in entry.samples]
    counts = {"desirable": paired + sum(alone), "undesirable": paired + len(alone) - sum(alone)}
    gains, losses = (counts[name] * loss.settings.get(f"lambda_{name}", 1.0) for name in counts)
    advice = ""
    if not losses <= gains <= 4 / 3 * losses:
        advice = (
            f"; weighted {gains:g} : {losses:g}, outside the 1 : 1 to 4 : 3 that KTO's authors advise (see "
            "loss.lambda_desirable and loss.lambda_undesirable)"
        )
    print(f"[align] {counts['desirable']} desirable, {counts['undesirable']} undesirable samples{advice}", flush=True)
    return counts


def weigh(
    ids: Sequence[str],
    pairs: Sequence[Sequence[tuple[int, int]]],
    rc: RcConfig,
    read: Mapping[str, Scores],
    seed: int,
) -> tuple[list[tuple[Pair, ...]], dict[str, float] | None]:
    """The pairs, grouped by record (`ids`), with their coefficients w = R^alpha, and what to report of R and w (None
    without coefficients)."""
    if rc.name == "none":
        return [tuple(Pair(i, j) for i, j in group) for group in pairs], None
    flat = [(record_id, i, j) for record_id, group in zip(ids, pairs, strict=True) for i, j in group]
    if not flat:
        raise UserError("there is no pair to weigh: the selected records have no preference")
    difference = torch.tensor([read[rc.name].difference(*entry, rc.order) for entry in flat], dtype=torch.float64)
    if rc.ablation == "shuffle":
        # Several annotators may have labelled one pair: number a record's pairs.
        names = [f"{record_id}/{k}" for record_id, group in zip(ids, pairs, strict=True) for k in range(len(group))]
        difference = coefficients.shuffle(difference, names, stable_seed(seed, "shuffle"))
    if rc.ablation == "filter":
        weight, flipped = coefficients.filter_only(difference), torch.zeros(len(flat), dtype=torch.bool)
    else:
        settled = partial(
            coefficients.coefficients, difference, alpha=rc.alpha, negative=rc.negative, epsilon=rc.epsilon
        )
        weight, flipped = settled()
        if rc.scale == "mean":
            weight, flipped = settled(scale=coefficients.mean_weight(weight))
    statistics = coefficients.statistics(difference, weight)
    print(
        f"[align] {len(flat)} pairs, R < 0 in {statistics['negative_share']:.1%}; mean weight "
        f"{statistics['mean']:.3f}; effective sample size {statistics['effective_sample_size']:.0f}",
        flush=True,
    )
    if (share := statistics["effective_sample_share"]) < rc.min_effective_share:
        # The paper's form may have learnt nothing but which response it reads first.
        one_sided = rc.name == "diff" and rc.order == "forward" and rc.ablation == "none"
        raise UserError(
            f"rc={rc.name}: the weights count for {share:.2%} of the pairs (R < 0 in "
            f"{statistics['negative_share']:.1%}), under rc.min_effective_share={rc.min_effective_share:g}: "
            f"{'try rc.order=antisymmetric or diffmodel.form=residual, ' if one_sided else ''}"
            "train the scorer longer, set rc.negative=abs or flip, or lower that setting"
        )
    entries = iter(zip(flat, weight.tolist(), flipped.tolist(), strict=True))
    weighted = []
    for group in pairs:
        members = [next(entries) for _ in group]
        weighted.append(tuple(Pair(j, i, w) if flip else Pair(i, j, w) for (_, i, j), w, flip in members))
    return weighted, statistics
