"""Every task on random records, for tests that take steps of training."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rdo.data.encoding import EncodedRecord
from rdo.data.records import Preference
from rdo.models.scorers import ComparisonTemplate
from rdo.objectives.choice import LossChoice, choose_loss
from rdo.objectives.losses import rrhf_pairs
from rdo.sequences.forward import Reads
from rdo.training.alignment import AlignmentRecord, AlignmentTask, Mismatched, Pair, Sample
from rdo.training.tasks import ById, Example, ScorerTask, SftTask, learns_from

SETTINGS = {
    "dpo": {"name": "dpo", "beta": 0.2},
    "kto": {"name": "kto", "beta": 0.1, "mean_over": "samples"},
    "rrhf": {"name": "rrhf", "pairs": "ranking", "ranking": "scores", "mean_over": "queries", "sft_weight": 1.0},
    "mixed": {"name": "kto", "beta": 0.1, "mean_over": "samples", "sft_weight": 0.5},
}
TASKS = [*SETTINGS, "sft", "pointwise", "paper", "antisymmetric", "residual"]


def encoded(count: int, responses: int, seed: int = 0, scale: int = 1) -> list[EncodedRecord]:
    """Random records of uneven length, times the scale; some responses share their beginning."""
    draw = random.Random(seed)
    made = []
    for n in range(count):
        prompt = tuple(draw.randrange(2, 50) for _ in range(scale * draw.randrange(3, 12)))
        start = tuple(draw.randrange(2, 50) for _ in range(2 * scale))
        tails = [tuple(draw.randrange(2, 50) for _ in range(scale * draw.randrange(1, 9))) for _ in range(responses)]
        made.append(EncodedRecord(f"r{n:02d}", prompt, tuple((*start, *tail, 1) for tail in tails)))
    return made


def task_of(examples: Sequence[AlignmentRecord], loss: LossChoice) -> AlignmentTask:
    """A loss on records that are ready for it."""
    return AlignmentTask(ById([example.record_id for example in examples], examples.__getitem__), loss)


def references(records: Sequence[EncodedRecord]) -> dict[str, tuple[float, ...]]:
    """Made-up log-probabilities of every response under the reference."""
    draw = random.Random(2)
    ordered = sorted(records, key=lambda record: record.id)
    return {r.id: tuple(-4.0 * len(ids) + draw.random() for ids in r.responses) for r in ordered}


def mismatch(record: EncodedRecord, responses: Sequence[tuple[int, ...]]) -> Mismatched:
    """Another record's responses, with made-up log-probabilities under the reference."""
    return Mismatched(Reads.of(record.prompt, responses), tuple(-4.1 * len(ids) for ids in responses))


def alignment_task(name: str, records: list[EncodedRecord]) -> AlignmentTask:
    """The task of a loss, with made-up references, coefficients and (for KTO) mismatched responses.

    mixed: pairs with weights, both responses labelled alone, and one response labelled alone, by turns.
    """
    loss, draw, known = choose_loss(SETTINGS[name]), random.Random(1), references(records)
    ordered = sorted(records, key=lambda record: record.id)
    ranks = {record.id: [draw.random() for _ in record.responses] for record in ordered}
    examples = []
    for record in records:
        n, rank, reference = ordered.index(record), ranks[record.id], known[record.id]
        partner = ordered[(n + 1) % len(ordered)]
        mismatched = mismatch(record, partner.responses) if loss.needs_kl else None
        order = rrhf_pairs(rank) if name == "rrhf" else [(0, 1)]
        pairs = tuple(Pair(i, j, 0.5 + rank[i]) for i, j in order)
        best = rank.index(max(rank)) if loss.sft_weight else None
        alone: tuple[Sample, ...] = ()
        if name == "mixed":
            kept = 1 if n % 3 == 2 else 2
            record, reference = EncodedRecord(record.id, record.prompt, record.responses[:kept]), reference[:kept]
            if n % 3:
                pairs, alone = (), tuple(Sample(r, (n + r) % 2 == 0) for r in range(kept))
            best = 0 if n % 3 == 1 else None
        examples.append(AlignmentRecord(record, pairs, reference, alone, best, mismatched))
    return task_of(examples, loss)


class Words:
    """Stands in for a tokenizer where only the comparison template is needed."""

    bos_token_id = cls_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> object:
        return type("Ids", (), {"input_ids": [2 + ord(letter) % 40 for letter in text]})()


def make_task(name: str, records: list[EncodedRecord]) -> object:
    if name in SETTINGS:
        return alignment_task(name, records)
    if name == "sft":
        shown = [Example(record.id, Reads.of(record.prompt, record.responses[:2])) for record in records]
        return SftTask(ById([example.record_id for example in shown], shown.__getitem__))
    pairs = [(record, Preference(0, 1, tie=record.id == "r03")) for record in records]
    pairs = [pair for pair in pairs if learns_from(name, pair[1])]
    keys = [(record.id, preference.chosen, preference.rejected) for record, preference in pairs]
    template = ComparisonTemplate(["q", "a", "b"], Words())  # type: ignore[arg-type]
    beta = 0.1 if name == "paper" else 0.0
    return ScorerTask(ById(keys, pairs.__getitem__), name, template, beta, beta, seed=3)
