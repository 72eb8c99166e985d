"""Stage align: a policy trained by any loss of conf/loss, with reference and coefficients read from files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import transformers

from rdo.data.encoding import EncodedRecord
from rdo.evaluation.numbers import LAST, movement_hint
from rdo.models.lora import check_trained, choose_trained, lora_settings
from rdo.objectives.choice import LossChoice, choose_loss
from rdo.runtime.errors import UserError
from rdo.runtime.files import read_json_lines
from rdo.runtime.processes import is_rank0
from rdo.runtime.store import Artifact
from rdo.sequences.forward import Reads
from rdo.settings import RcConfig, TrainingConfig
from rdo.stages.reference import Reference, partners, read_reference, reference
from rdo.stages.run import Run, select
from rdo.stages.score import read_scores, scores
from rdo.stages.scorer import STAGE_OF, check_labels
from rdo.stages.sft import base_policy
from rdo.stages.supervision import RANKING_SCORER, Supervision, count_samples, own_scores, supervision, weigh
from rdo.stages.training import train_and_save, validation_selection, validation_settings
from rdo.tracking import METRICS
from rdo.training.alignment import AlignmentRecord, AlignmentTask, Mismatched, Pair, Sample
from rdo.training.tasks import ById


def aligned_policy(run: Run) -> Artifact:
    """The policy that the config's loss and coefficients make of the base policy."""
    config = run.config
    loss = choose_loss(config.loss)
    check_trained(config)
    check_data(run, loss)
    validation = validation_settings(run, config.align)
    inputs = {"base": base_policy(run)}
    kinds, both_orders = needed_scores(run, loss)
    for kind in kinds:
        inputs[kind] = scores(run, kind, "train", both_orders, config.align)
    if loss.needs_reference:
        inputs["reference"] = reference(run, loss.needs_kl, "train", config.align)
    if validated := validation_selection(config.align):
        ranked, both_orders = ranking_scores(loss)
        for kind in ranked:
            inputs[f"validation_{kind}"] = scores(run, kind, "validation", both_orders, validated)
        if loss.needs_reference:
            inputs["validation_reference"] = reference(run, loss.needs_kl, "validation", validated)
    settings = run.settings(
        "train",
        loss=loss.described(),
        rc=rc_settings(config.rc),
        training=asdict(config.align),
        seed=config.seed,
        **validation,
        **lora_settings(config.model),
    )
    return run.produce("align", label(loss, config.rc), settings, inputs, partial(train_policy, run, loss, inputs))


def needed_scores(run: Run, loss: LossChoice) -> tuple[list[str], bool]:
    """Which scorers' scores of the training split this loss and these coefficients read, and whether in both orders:
    for a ranking by the difference model, and for rc.order=antisymmetric."""
    rc = run.config.rc
    ranked, both_orders = ranking_scores(loss)
    kinds = {str(rc.name)} & STAGE_OF.keys()
    return sorted(kinds | ranked), both_orders or (rc.name == "diff" and rc.order == "antisymmetric")


def ranking_scores(loss: LossChoice) -> tuple[set[str], bool]:
    """The same of the ranking alone."""
    if loss.pairs != "ranking" or loss.ranking not in RANKING_SCORER:
        return set(), False
    return {RANKING_SCORER[loss.ranking]}, loss.ranking.startswith("diff")


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
    made = alignment(run, loss, "train", config.align, config.rc, inputs, tokenizer)
    validation = None
    if validated := validation_selection(config.align):
        named = {name.removeprefix("validation_"): found for name, found in inputs.items() if "validation_" in name}
        validation = alignment(run, loss, "validation", validated, RcConfig(), named, tokenizer).task
    name, section = label(loss, config.rc), config.align
    results = {"coefficients": made.statistics}
    done = train_and_save(
        run, made.task, model, trained, tokenizer, section, "train", folder, name, results, validation
    )
    say_movement(folder, name)
    return {**done, "records": len(made.task), "samples": made.samples}


class Alignment(NamedTuple):
    """An alignment task, what is reported of its coefficients, and how many samples of either kind it has."""

    task: AlignmentTask
    statistics: dict[str, float] | None
    samples: dict[str, int] | None


def alignment(
    run: Run,
    loss: LossChoice,
    split: str,
    selection: TrainingConfig,
    rc: RcConfig,
    inputs: Mapping[str, Artifact],
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> Alignment:
    """The task of a loss on the selected records of a split, with coefficients and reference from the inputs."""
    seed = run.config.seed
    records, encoded = run.records(split), run.encoded(split, tokenizer)
    chosen = select(records, selection)
    read = {kind: read_scores(inputs[kind]) for kind in STAGE_OF if kind in inputs}
    selected = records.only(np.array(chosen, int))
    if rc.name == "gold":
        read["gold"] = own_scores(selected)
    fitting = set(run.fitting(encoded, chosen))
    labels = [
        supervision(record, loss, read) if place in fitting else Supervision(record.id, (), (), None)
        for place, record in zip(chosen, selected, strict=True)
    ]
    weighted, statistics = weigh([s.record_id for s in labels], [s.pairs for s in labels], rc, read, seed)
    known = read_reference(inputs["reference"]) if loss.needs_reference else None
    others = partners(records, chosen) if loss.needs_kl else {}
    used = [n for n, s in enumerate(labels) if weighted[n] or s.samples or (loss.sft_weight and s.best is not None)]
    if len(used) < len(labels):
        without = f"{len(labels) - len(used)} of {len(labels)} records have nothing for loss={loss.name}: left out"
        print(f"[align] {without}", flush=True)
    if not used and split == "validation":
        raise UserError(f"the split {split} has no record for loss={loss.name}")

    def make(number: int) -> AlignmentRecord:
        n = used[number]
        partner = encoded[others[chosen[n]]] if chosen[n] in others else None
        best = labels[n].best if loss.sft_weight else None
        return alignment_record(encoded[chosen[n]], partner, known, weighted[n], labels[n].samples, best)

    task = AlignmentTask(ById([labels[n].record_id for n in used], make), loss)
    return Alignment(task, statistics, count_samples(loss, weighted, labels) if split == "train" else None)


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
