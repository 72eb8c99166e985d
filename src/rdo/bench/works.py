"""The work of every stage, as this project does it: a step's loss and gradient, scores, reference log-probabilities,
generations. Each runs in any layout, and one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rdo import models, scorers
from rdo.alignment import AlignmentRecord, AlignmentTask, Pair
from rdo.data.encoding import EncodedRecord
from rdo.data.records import Preference
from rdo.engine.torch_engine import TorchEngine
from rdo.forest import Flat, Layout, LayoutName, TokenIds
from rdo.log_probabilities import read_under
from rdo.models import is_decoder_scorer
from rdo.objectives.choice import choose_loss
from rdo.objectives.losses import best_response, rrhf_pairs
from rdo.schema import EngineConfig
from rdo.scorers import ComparisonTemplate, Reading, add_difference
from rdo.step import Task, deal_step, training_step
from rdo.tasks import ById, ScorerTask

BETA = 0.1
# Texts around the parts of a difference model's input, in words of the tokenizer of `trl.word_tokenizer`.
COMPARISON = ("w2 w3 w4", "w5 w6 w7 w8 w9", "w10 w11 w12 w13 w14")
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "beta": BETA},
    "kto": {"name": "kto", "beta": BETA, "mean_over": "samples"},
    "rrhf": {"name": "rrhf", "pairs": "ranking", "ranking": "scores", "mean_over": "queries", "sft_weight": 1.0},
}


@dataclass
class Work:
    """One kind of work on some records.

    run(layout): its numbers, [any number]: the loss, or all outputs. after: the gradient's norm, [1], which it clears
    (nothing, [0], where there is none). reads: at how many positions of `sequences` a head is read. beforehand:
    sequences that a forward pass reads before (KTO's mismatched pairs), all of whose responses' tokens are read.
    """

    name: str
    model: PreTrainedModel
    sequences: Sequence[TokenIds]
    reads: int
    trained: bool
    run: Callable[[LayoutName], torch.Tensor]
    after: Callable[[], torch.Tensor] = lambda: torch.zeros(0)
    beforehand: Sequence[TokenIds] = ()
    records: list[EncodedRecord] = field(default_factory=list)  # what others need to do the same


def head_of(model: PreTrainedModel) -> torch.nn.Linear:
    """What is read off the hidden states: a scorer's scalar head, or a policy's language-model head."""
    head = model.score if is_decoder_scorer(model) else model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    return head


def gradient_norm(model: PreTrainedModel) -> torch.Tensor:
    """The norm [1] of all gradients, which are cleared."""
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.stack(norms).norm()[None]


def training_work(name: str, model: PreTrainedModel, task: Task, config: EngineConfig, reads: int, **more: Any) -> Work:
    """Forward and backward pass of one step over all records of a task, through the product's own step."""
    items = [task.item(n, 0) for n in range(len(task.record_ids))]
    engine = TorchEngine(model, torch.optim.SGD(model.parameters()), None, config)

    def run(layout: LayoutName) -> torch.Tensor:
        measured, _ = training_step(task, engine, layout, deal_step(items, layout, config.tokens_per_micro_batch))
        return torch.tensor([measured["loss"]])

    sequences = [ids for item in items for ids in item.sequences]
    return Work(name, model, sequences, reads, True, run, partial(gradient_norm, model), **more)


def alignment_work(
    name: str,
    model: PreTrainedModel,
    reference: PreTrainedModel,
    records: list[EncodedRecord],
    config: EngineConfig,
) -> Work:
    """A step of DPO or KTO on pairs, or of RRHF on ranked responses."""
    loss = choose_loss(LOSSES[name])
    mismatched: list[tuple[tuple[int, ...], ...]] = rotated(records) if loss.needs_kl else [()] * len(records)
    known = [[0.0] * len(record.responses) for record in records]
    if loss.needs_reference:
        models.set_layout(reference, "flat")
        read = [(record, (*record.responses, *others)) for record, others in zip(records, mismatched, strict=True)]
        known = read_under(tqdm(disable=True), reference, "flat", read, config.tokens_per_micro_batch)
    items = []
    for record, others, values in zip(records, mismatched, known, strict=True):
        count = len(record.responses)
        ranks = [float(len(response) % 7) + n / 10 for n, response in enumerate(record.responses)]
        order = rrhf_pairs(ranks) if loss.pairs == "ranking" else [(0, 1)]
        items.append(
            AlignmentRecord(
                record,
                tuple(Pair(i, j) for i, j in order),
                tuple(values[:count]),
                best=best_response(ranks) if loss.sft_weight else None,
                mismatched=tuple(zip(others, values[count:], strict=True)),
            )
        )
    task = AlignmentTask(ById([item.record_id for item in items], items.__getitem__), loss)
    reads = sum(len(record.responses[r]) for record, item in zip(records, items, strict=True) for r in item.responses)
    before = [
        (*record.prompt, *response) for record, others in zip(records, mismatched, strict=True) for response in others
    ]
    return training_work(name, model, task, config, reads, records=records, beforehand=before)


def rotated(records: Sequence[EncodedRecord]) -> list[tuple[tuple[int, ...], ...]]:
    """Two mismatched responses a record: of all chosen, then all rejected ones, the response before its own."""
    samples = [record.responses[0] for record in records] + [record.responses[1] for record in records]
    before = [samples[-1], *samples[:-1]]
    return list(zip(before[: len(records)], before[len(records) :], strict=True))


def scorer_work(
    name: str,
    model: PreTrainedModel,
    records: list[EncodedRecord],
    config: EngineConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Work:
    """A step of the reward model, or of the difference model with both regularisers: three f a pair."""
    pairs = [(record, Preference(0, 1)) for record in records]
    form = "pointwise" if name == "rm" else "paper"
    beta = 0.0 if name == "rm" else 0.1
    keys = [(record.id, 0, 1) for record in records]
    template = ComparisonTemplate(COMPARISON, tokenizer)
    task = ScorerTask(ById(keys, pairs.__getitem__), form, template, beta, beta, seed=0)
    reads = len(records) * (2 if name == "rm" else 3)
    return training_work(name, model, task, config, reads, records=records)


def scoring_work(
    name: str,
    model: PreTrainedModel,
    records: list[EncodedRecord],
    config: EngineConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Work:
    """f of all pairs of a record's responses, in one order (score15 of six) or both (score30)."""
    template = ComparisonTemplate(COMPARISON, tokenizer)
    readings = []
    for record in records:
        reading, count = Reading(), len(record.responses)
        for i in range(count):
            for j in range(count):
                if i < j or (i != j and name == "score30"):
                    add_difference(reading, "paper", template, record, i, j)
        readings.append(reading)

    def run(layout: LayoutName) -> torch.Tensor:
        found = scorers.read_under(tqdm(disable=True), model, layout, readings, config.tokens_per_micro_batch)
        return torch.tensor([number for values in found for number in values])

    sequences = [ids for reading in readings for ids in reading.sequences]
    return Work(name, model, sequences, len(sequences), False, run, records=records)


def reference_work(model: PreTrainedModel, records: list[EncodedRecord], config: EngineConfig) -> Work:
    """Log-probabilities of all responses, without gradients."""
    items = [(record, record.responses) for record in records]

    def run(layout: LayoutName) -> torch.Tensor:
        found = read_under(tqdm(disable=True), model, layout, items, config.tokens_per_micro_batch)
        return torch.tensor([number for values in found for number in values])

    sequences = [(*record.prompt, *response) for record in records for response in record.responses]
    reads = sum(len(response) for record in records for response in record.responses)
    return Work("reference", model, sequences, reads, False, run, records=records)


@contextmanager
def one_by_one() -> Iterator[None]:
    """Under it the flat layout runs every sequence alone, in a row of its own length: no padding, nothing shared."""

    def alone(model: PreTrainedModel, layout: Layout) -> torch.Tensor:
        assert isinstance(layout, Flat)
        device = model.device
        rows = [torch.from_numpy(ids)[None].to(device) for ids in layout.sequences]
        states = [model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0] for ids in rows]
        return pad_sequence(states, batch_first=True).flatten(0, 1)

    with patch.object(models, "hidden_states", alone):
        yield
