"""Every task on random records, for tests that take steps of training."""

from __future__ import annotations

import random

from rdo.data.encoding import EncodedRecord
from rdo.data.records import Preference
from rdo.models.scorers import ComparisonTemplate
from rdo.objectives.choice import choose_loss
from rdo.objectives.losses import rrhf_pairs
from rdo.training.alignment import AlignmentRecord, AlignmentTask, Pair
from rdo.training.tasks import ById, Demonstration, ScorerTask, SftTask, learns_from

SETTINGS = {
    "dpo": {"name": "dpo", "beta": 0.2},
    "kto": {"name": "kto", "beta": 0.1, "mean_over": "samples"},
    "rrhf": {"name": "rrhf", "pairs": "ranking", "ranking": "scores", "mean_over": "queries", "sft_weight": 1.0},
}


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


def alignment_task(name: str, records: list[EncodedRecord]) -> AlignmentTask:
    """The task of a loss, with made-up references, coefficients and (for KTO) mismatched responses."""
    loss = choose_loss(SETTINGS[name])
    draw = random.Random(1)
    ranks = {record.id: [draw.random() for _ in record.responses] for record in sorted(records, key=lambda r: r.id)}
    reference = {
        record.id: tuple(-4.0 * len(ids) + draw.random() for ids in record.responses)
        for record in sorted(records, key=lambda r: r.id)
    }
    by_id = {record.id: record for record in records}
    names = sorted(by_id)
    examples = []
    for record in records:
        order = rrhf_pairs(ranks[record.id]) if name == "rrhf" else [(0, 1)]
        partner = by_id[names[(names.index(record.id) + 1) % len(names)]]
        examples.append(
            AlignmentRecord(
                record,
                tuple(Pair(i, j, 0.5 + ranks[record.id][i]) for i, j in order),
                reference[record.id],
                best=ranks[record.id].index(max(ranks[record.id])) if loss.sft_weight else None,
                mismatched=tuple((ids, -4.1 * len(ids)) for ids in partner.responses) if loss.needs_kl else (),
            )
        )
    return AlignmentTask(ById([example.record_id for example in examples], examples.__getitem__), loss)


class Words:
    """Stands in for a tokenizer where only the comparison template is needed."""

    bos_token_id = cls_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> object:
        return type("Ids", (), {"input_ids": [2 + ord(letter) % 40 for letter in text]})()


def make_task(name: str, records: list[EncodedRecord]) -> object:
    if name in SETTINGS:
        return alignment_task(name, records)
    if name == "sft":
        shown = [Demonstration(record, (0, 1)) for record in records]
        return SftTask(ById([example.record_id for example in shown], shown.__getitem__))
    pairs = [(record, Preference(0, 1, tie=record.id == "r03")) for record in records]
    pairs = [pair for pair in pairs if learns_from(name, pair[1])]
    keys = [(record.id, preference.chosen, preference.rejected) for record, preference in pairs]
    template = ComparisonTemplate(["q", "a", "b"], Words())  # type: ignore[arg-type]
    beta = 0.1 if name == "paper" else 0.0
    return ScorerTask(ById(keys, pairs.__getitem__), name, template, beta, beta, seed=3)


TASKS = ["dpo", "kto", "rrhf", "sft", "pointwise", "paper", "antisymmetric", "residual"]
