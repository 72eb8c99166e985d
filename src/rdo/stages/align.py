"""Stage align: a policy trained by any loss of conf/loss, with reference and coefficients read from files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from rdo.data.encoding import EncodedRecord
from rdo.data.records import Record
from rdo.evaluation.numbers import LAST, movement_hint
from rdo.models.lora import check_trained, choose_trained, lora_settings
from rdo.objectives import coefficients
from rdo.objectives.choice import LossChoice, choose_loss
from rdo.objectives.losses import best_response, rrhf_pairs
from rdo.runtime.errors import UserError
from rdo.runtime.files import read_json_lines
from rdo.runtime.processes import is_rank0
from rdo.runtime.store import Artifact, stable_seed
from rdo.sequences.forward import Reads
from rdo.settings import RcConfig
from rdo.stages.reference import Reference, partners, read_reference, reference
from rdo.stages.run import Run, select
from rdo.stages.score import Scores, read_scores, scores
from rdo.stages.scorer import STAGE_OF, check_labels
from rdo.stages.sft import base_policy
from rdo.stages.training import train_and_save
from rdo.tracking import METRICS
from rdo.training.alignment import AlignmentRecord, AlignmentTask, Mismatched, Pair, Sample
from rdo.training.tasks import ById

RANKING_SCORER: dict[str, str] = {"reward": "reward", "diff": "diff", "diff_baseline": "diff"}


def aligned_policy(run: Run) -> Artifact:
    """The policy that the config's loss and coefficients make of the base policy."""
    config = run.config
    loss = choose_loss(config.loss)
    check_trained(config)
    check_data(run, loss)
    inputs = {"base": base_policy(run)}
    kinds, both_orders = needed_scores(run, loss)
    for kind in kinds:
        inputs[kind] = scores(run, kind, "train", both_orders, config.align)
    if loss.needs_reference:
        inputs["reference"] = reference(run, mismatched=loss.needs_kl)
    settings = run.settings(
        "train",
        loss=loss.described(),
        rc=rc_settings(config.rc),
        training=asdict(config.align),
        seed=config.seed,
        **lora_settings(config.model),
    )
    return run.produce("align", label(loss, config.rc), settings, inputs, partial(train_policy, run, loss, inputs))


def needed_scores(run: Run, loss: LossChoice) -> tuple[list[str], bool]:
    """Which scorers' scores of the training split this loss and these coefficients read, and whether in both orders:
    for a ranking by the difference model, and for rc.order=antisymmetric."""
    rc = run.config.rc
    kinds = {str(rc.name)} & STAGE_OF.keys()
    ranked = loss.pairs == "ranking" and loss.ranking in RANKING_SCORER
    if ranked:
        kinds.add(RANKING_SCORER[loss.ranking])
    both_orders = (ranked and loss.ranking.startswith("diff")) or (rc.name == "diff" and rc.order == "antisymmetric")
    return sorted(kinds), both_orders


def check_data(run: Run, loss: LossChoice) -> None:
    """What the data must bring for this loss, said before anything is trained for it."""
    records, dataset, rc = run.records("train"), run.config.dataset.name, run.config.rc.name
    if loss.takes_unpaired and rc != "none":
        unpaired = (record for record in records if supervision(record, loss, {}).samples)
        if found := next(unpaired, None):
            raise UserError(
                f"rc={rc} weighs a pair by the difference of its two rewards, and record {found.id} of "
                f"dataset={dataset} is unpaired (it labels each response alone): use rc=none, or paired data"
            )
    needed = "loss.ranking=scores" if loss.pairs == "ranking" and loss.ranking == "scores" else None
    if rc == "gold":
        needed = "rc=gold"
    if needed and (lacking := next((record for record in records if record.scores is None), None)):
        way_out = "use loss.ranking=reward, diff or labels" if needed.startswith("loss") else "use rc=reward or rc=diff"
        raise UserError(f"{needed}: {lacking.place or f'record {lacking.id}'} brings no scores; {way_out}")
    if loss.reads_labels:
        reads = "learns from labelled pairs or responses" if loss.takes_unpaired else "compares labelled pairs"
        lacks = "has none"
        labels = (supervision(record, loss, {}) for record in records)
        usable = any(entry.pairs or entry.samples for entry in labels)
    else:
        reads, lacks = "ranks the responses of a query", "has one response a query"
        usable = any(len(record.responses) > 1 for record in records)
    if not usable:
        if any(record.desirable is not None for record in records):
            lacks = "is unpaired (it labels each response alone): use loss=kto rc=none, or paired data"
        raise UserError(f"loss={loss.name} {reads}, and dataset={dataset} {lacks}")
    if not select(records, run.config.align):
        fewest = run.config.align.min_responses
        raise UserError(f"align.min_responses={fewest}: no record of dataset={dataset} has so many responses")
    for kind in needed_scores(run, loss)[0]:
        check_labels(run, kind)


def rc_settings(rc: RcConfig) -> dict[str, Any] | None:
    """The settings of the coefficients that have an effect, so that the others make no second run of the same."""
    if rc.name == "none":
        return None
    ignored = {"min_effective_share"} if rc.name == "diff" else {"min_effective_share", "order"}
    if rc.negative != "floor":
        ignored.add("epsilon")
    if rc.ablation == "filter":
        ignored |= {"alpha", "negative", "scale"}
    return {key: value for key, value in asdict(rc).items() if key not in ignored}


def label(loss: LossChoice, rc: RcConfig) -> str:
    """What a person recognises the run by: loss, coefficients, alpha, ablation."""
    parts = [loss.name, rc.name]
    if rc.name != "none" and rc.ablation != "filter":
        parts.append(f"{rc.alpha:g}")
    return "-".join(parts if rc.ablation == "none" else [*parts, rc.ablation])


def train_policy(run: Run, loss: LossChoice, inputs: dict[str, Artifact], folder: Path) -> dict[str, Any]:
    """Gathers pairs, coefficients and reference from the inputs, trains, and saves the policy."""
    config = run.config
    model, tokenizer = run.policy(inputs["base"], trained=True)
    trained = choose_trained(model, config.model, config.seed)
    records, encoded = run.records("train"), run.encoded("train", tokenizer)
    chosen = select(records, config.align)
    read = {kind: read_scores(inputs[kind]) for kind in STAGE_OF if kind in inputs}
    selected = records.only(np.array(chosen, int))
    if config.rc.name == "gold":
        read["gold"] = own_scores(selected)
    labels = [supervision(record, loss, read) for record in selected]
    weighted, statistics = weigh([s.record_id for s in labels], [s.pairs for s in labels], config.rc, read, config.seed)
    known = read_reference(inputs["reference"]) if loss.needs_reference else None
    others = partners(records, chosen) if loss.needs_kl else {}
    used = [n for n, s in enumerate(labels) if weighted[n] or s.samples or (loss.sft_weight and s.best is not None)]
    if len(used) < len(labels):
        without = f"{len(labels) - len(used)} of {len(labels)} records have nothing for loss={loss.name}: left out"
        print(f"[align] {without}", flush=True)
    samples = count_samples(loss, weighted, labels)

    def make(number: int) -> AlignmentRecord:
        n = used[number]
        partner = encoded[others[chosen[n]]] if chosen[n] in others else None
        best = labels[n].best if loss.sft_weight else None
        return alignment_record(encoded[chosen[n]], partner, known, weighted[n], labels[n].samples, best)

    task = AlignmentTask(ById([labels[n].record_id for n in used], make), loss)
    name = label(loss, config.rc)
    done = train_and_save(
        run, task, model, trained, tokenizer, config.align, "train", folder, name, {"coefficients": statistics}
    )
    say_movement(folder, name)
    return {**done, "records": len(used), "samples": samples}


def say_movement(folder: Path, title: str) -> None:
    """Prints how far the policy is from its reference on what it was trained on, from the last steps that were logged.
    Those are no samples of its own: stage=eval estimates its KL."""
    lines = read_json_lines(folder / METRICS) if is_rank0() else []
    last = [line for line in lines[-math.ceil(LAST * len(lines)) :] if "log_ratio_size" in line]
    if not last:
        return
    size = fmean(line["log_ratio_size"] for line in last)
    chosen = [line["log_ratio_chosen"] for line in last if "log_ratio_chosen" in line]
    of_chosen = f"; of chosen responses {fmean(chosen):+.3f}" if chosen else ""
    hint = movement_hint(size)
    print(f"[{title}] moved by {size:.3f} nats a response (mean |log-ratio|{of_chosen}){hint}", flush=True)


def alignment_record(
    encoded: EncodedRecord,
    partner: EncodedRecord | None,
    known: Reference | None,
    pairs: tuple[Pair, ...],
    samples: tuple[Sample, ...],
    best: int | None,
) -> AlignmentRecord:
    """A record with its reference log-probabilities, which are NaN where the loss reads none, and KTO's partner."""
    responses = range(len(encoded.responses))
    own = tuple(float("nan") if known is None else known.own[encoded.id, response] for response in responses)
    mismatched = None
    if partner is not None and known is not None:
        values = tuple(known.mismatched[encoded.id, n] for n in range(len(partner.responses)))
        mismatched = Mismatched(Reads.of(encoded.prompt, partner.responses), values)
    return AlignmentRecord(encoded, pairs, own, samples, best, mismatched)


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
