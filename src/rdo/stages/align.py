"""Stage align: a policy trained by any loss of conf/loss, with reference and coefficients read from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rdo import coefficients
from rdo.alignment import AlignmentRecord, AlignmentTask, LossChoice, Pair, choose_loss
from rdo.artifacts import Artifact, produce
from rdo.data.records import Record
from rdo.errors import UserError
from rdo.losses import best_response, rrhf_pairs
from rdo.models import save_model
from rdo.run import Run, select
from rdo.schema import RcConfig
from rdo.stages.reference import Reference, partners, read_reference, reference
from rdo.stages.score import Scores, read_scores, scores
from rdo.stages.scorer import STAGE_OF, check_labels
from rdo.stages.sft import base_policy
from rdo.stages.training import finish
from rdo.training import stable_seed, train

RANKING_SCORER: dict[str, str] = {"reward": "reward", "diff": "diff", "diff_baseline": "diff"}


def aligned_policy(run: Run) -> Artifact:
    """The policy that the config's loss and coefficients make of the base policy."""
    config = run.config
    loss = choose_loss(config.loss)
    check_data(run, loss)
    inputs = {"base": base_policy(run)}
    kinds, both_orders = needed_scores(run, loss)
    for kind in kinds:
        inputs[kind] = scores(run, kind, "train", both_orders, config.align)
    if loss.needs_reference:
        inputs["reference"] = reference(run, mismatched=loss.needs_kl)
    settings = {
        "loss": {key: value for key, value in asdict(loss).items() if key != "function"},
        "rc": rc_settings(config.rc),
        "training": asdict(config.align),
        "data": run.data_settings("train"),
        "dtype": config.model.dtype,
        "seed": config.seed,
    }

    def make(folder: Path) -> dict[str, Any]:
        return train_policy(run, loss, inputs, folder)

    return produce(run.provenance, "align", label(loss, config.rc), settings, inputs, make, run.requested == "align")


def needed_scores(run: Run, loss: LossChoice) -> tuple[list[str], bool]:
    """Which scorers' scores of the training split this loss and these coefficients read, and whether in both orders:
    for a ranking by the difference model, and for rc.order=antisymmetric."""
    rc = run.config.rc
    kinds = {rc.name} & STAGE_OF.keys()
    ranked = loss.pairs == "ranking" and loss.ranking in RANKING_SCORER
    if ranked:
        kinds.add(RANKING_SCORER[loss.ranking])
    both_orders = (ranked and loss.ranking.startswith("diff")) or (rc.name == "diff" and rc.order == "antisymmetric")
    return sorted(kinds), both_orders


def check_data(run: Run, loss: LossChoice) -> None:
    """What the data must bring for this loss, said before anything is trained for it."""
    needed = "loss.ranking=scores" if loss.pairs == "ranking" and loss.ranking == "scores" else None
    if run.config.rc.name == "oracle":
        needed = "rc=oracle"
    lacking = next((record for record in run.records("train") if record.scores is None), None)
    if needed and lacking:
        way_out = "use loss.ranking=reward, diff or labels" if needed.startswith("loss") else "use rc=reward or rc=diff"
        raise UserError(f"{needed}: record {lacking.id} brings no scores; {way_out}")
    labelled = loss.pairs == "preferences" or loss.ranking == "labels"
    if labelled and not any(record.preferences for record in run.records("train")):
        raise UserError(f"loss={loss.name} compares labelled pairs, and dataset={run.config.dataset.name} has none")
    for kind in needed_scores(run, loss)[0]:
        check_labels(run, kind)


def rc_settings(rc: RcConfig) -> dict[str, Any] | None:
    """The settings of the coefficients that have an effect, so that the others make no second run of the same."""
    if rc.name == "none":
        return None
    ignored = {"order"} if rc.name != "diff" else set()
    if rc.negative != "floor":
        ignored.add("epsilon")
    if rc.control == "filter":
        ignored |= {"alpha", "negative", "scale"}
    return {key: value for key, value in asdict(rc).items() if key not in ignored}


def label(loss: LossChoice, rc: RcConfig) -> str:
    """What a person recognises the run by: loss, coefficients, alpha, control."""
    parts = [loss.name, rc.name]
    if rc.name != "none" and rc.control != "filter":
        parts.append(f"{rc.alpha:g}")
    return "-".join(parts if rc.control == "none" else [*parts, rc.control])


def train_policy(run: Run, loss: LossChoice, inputs: dict[str, Artifact], folder: Path) -> dict[str, Any]:
    """Gathers pairs, coefficients and reference from the inputs, trains, and saves the policy."""
    config = run.config
    model, tokenizer = run.policy(inputs["base"])
    records, encoded = run.records("train"), run.encoded("train", tokenizer)
    chosen = select(records, config.align)
    read = {kind: read_scores(inputs[kind]) for kind in STAGE_OF if kind in inputs}
    pairs = [ordered_pairs(records[n], loss, read) for n in chosen]
    weighted, statistics = weigh([records[n] for n in chosen], [p.pairs for p in pairs], config.rc, read, config.seed)
    known = read_reference(inputs["reference"]) if loss.needs_reference else None
    others = partners(records, chosen) if loss.needs_kl else {}
    items = []
    for n, ordered, weights in zip(chosen, pairs, weighted, strict=True):
        if not weights and not (loss.sft_weight and ordered.best is not None):
            continue
        own, mismatched = reference_of(records[n], known)
        partner = encoded[others[n]].responses if n in others else ()
        items.append(
            AlignmentRecord(
                encoded[n],
                weights,
                own,
                best=ordered.best if loss.sft_weight else None,
                mismatched=tuple(zip(partner, mismatched, strict=True)),
            )
        )
    task = AlignmentTask(items, loss)
    with run.tracker(folder, folder.name) as tracker:
        train(task, model, config.align, config.engine, config.seed, folder, tracker, label(loss, config.rc))
    save_model(model, tokenizer, folder / "model")
    return {**finish(folder, model), "coefficients": statistics, "records": len(items)}


def reference_of(record: Record, known: Reference | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Reference log-probabilities of a record's own responses and of its partner's; NaN where the loss reads none."""
    if known is None:
        return tuple(float("nan") for _ in record.responses), ()
    own = tuple(known.own[record.id, response] for response in range(len(record.responses)))
    mismatched: list[float] = []
    while (record.id, len(mismatched)) in known.mismatched:
        mismatched.append(known.mismatched[record.id, len(mismatched)])
    return own, tuple(mismatched)


@dataclass(frozen=True)
class OrderedPairs:
    """(better, worse) pairs of a record's responses, and its best response, where one is known."""

    pairs: tuple[tuple[int, int], ...]
    best: int | None


def ordered_pairs(record: Record, loss: LossChoice, read: Mapping[str, Scores]) -> OrderedPairs:
    """The pairs that the loss compares: the labelled ones, or all strict ones of a ranking."""
    labelled = tuple((p.chosen, p.rejected) for p in record.preferences if not p.tie)
    if loss.pairs == "preferences" or loss.ranking == "labels":
        wins = [sum(i == response for i, _ in labelled) for response in range(len(record.responses))]
        return OrderedPairs(labelled, wins.index(max(wins)) if labelled else None)
    if loss.ranking == "scores":
        assert record.scores is not None  # see check_data
        ranks = list(record.scores)
    else:
        kind = RANKING_SCORER[loss.ranking]
        ranks = read[kind].ranking(record, baseline=loss.ranking == "diff_baseline")
    return OrderedPairs(tuple(rrhf_pairs(ranks)), best_response(ranks))


def weigh(
    records: Sequence[Record],
    pairs: Sequence[Sequence[tuple[int, int]]],
    rc: RcConfig,
    read: Mapping[str, Scores],
    seed: int,
) -> tuple[list[tuple[Pair, ...]], dict[str, float] | None]:
    """The pairs with their coefficients w = R^alpha, and what to report of R and w (None without coefficients)."""
    if rc.name == "none":
        return [tuple(Pair(i, j) for i, j in group) for group in pairs], None
    flat = [(record, i, j) for record, group in zip(records, pairs, strict=True) for i, j in group]
    if not flat:
        raise UserError("there is no pair to weigh: the selected records have no preference")
    difference = torch.tensor([reward_difference(rc, read, *entry) for entry in flat], dtype=torch.float64)
    if rc.control == "shuffle":
        # Several annotators may have labelled one pair: number a record's pairs.
        ids = [f"{record.id}/{k}" for record, group in zip(records, pairs, strict=True) for k in range(len(group))]
        difference = coefficients.shuffle(difference, ids, stable_seed(seed, "shuffle"))
    if rc.control == "filter":
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
    if not weight.any():
        raise UserError(
            "every coefficient is 0, for the scorer contradicts every label: train it longer, or set rc.negative"
        )
    entries = iter(zip(flat, weight.tolist(), flipped.tolist(), strict=True))
    weighted = []
    for group in pairs:
        members = [next(entries) for _ in group]
        weighted.append(tuple(Pair(j, i, w) if flip else Pair(i, j, w) for (_, i, j), w, flip in members))
    return weighted, statistics


def reward_difference(rc: RcConfig, read: Mapping[str, Scores], record: Record, chosen: int, rejected: int) -> float:
    """R(chosen, rejected) of a record: the true one in the toy world, else what the scorer says."""
    if rc.name == "oracle":
        assert record.scores is not None  # see check_data
        return record.scores[chosen] - record.scores[rejected]
    return read[rc.name].difference(record.id, chosen, rejected, rc.order)
