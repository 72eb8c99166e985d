"""The training step: the same loss, gradient and weights for any micro-batch budget, layout and order of records."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from engines import one_step
from made_tasks import SETTINGS, TASKS, alignment_task, encoded, make_task, task_of
from rdo.data.encoding import EncodedRecord
from rdo.models.pretrained import load_tokenizer
from rdo.objectives import losses
from rdo.objectives.choice import choose_loss
from rdo.sequences.forward import read_log_probabilities
from rdo.sequences.layout import make_layout
from rdo.sequences.preparation import set_layout
from rdo.sequences.readout import Span
from rdo.settings import EngineConfig, TrackerConfig, TrainingConfig
from rdo.stages.align import aligned_policy
from rdo.stages.reference import reference
from rdo.stages.run import Run, model_path
from rdo.stages.scorer import scorer
from rdo.stages.sft import base_policy
from rdo.tracking import Tracker
from rdo.training.alignment import AlignmentRecord, Pair
from rdo.training.loop import learning_rate_factor, make_plan, train
from rdo.training.tasks import ById
from tiny import tiny_run

torch.set_num_threads(1)


def llama(scorer_labels: int | None = None) -> torch.nn.Module:
    """A small Llama with grouped queries; with labels, a scorer whose head is not zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        num_labels=scorer_labels or 1,
    )
    factory = AutoModelForCausalLM if scorer_labels is None else AutoModelForSequenceClassification
    return factory.from_config(config).eval()


def model_of(name: str) -> torch.nn.Module:
    if name in SETTINGS or name == "sft":
        return llama()
    return llama(scorer_labels=2 if name == "residual" else 1)


def step(name: str, records: list[EncodedRecord], layout: str, budget: int) -> tuple[dict, dict[str, torch.Tensor]]:
    """Measures and gradients of one step over all records."""
    model = model_of(name)
    task = make_task(name, records)
    chosen = set_layout(model, layout)
    examples = [task.example(index, 0) for index in range(len(task.record_ids))]
    measures = one_step(task, model, chosen, examples, budget)
    return measures, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradient(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Equal to float32 rounding, relative to the whole gradient's norm."""
    assert first.keys() == second.keys()
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in first.values()))
    distance = math.sqrt(sum(float((first[n] - second[n]).double().square().sum()) for n in first))
    assert norm > 1e-3
    assert distance <= 2e-6 * norm + 1e-9


@pytest.mark.parametrize("name", TASKS)
def test_any_budget_and_layout_gives_the_same_step(name: str) -> None:
    """One record a micro-batch, all at once, tree or padded: accumulation 9x1 = 1x9, KTO's KL included."""
    records = encoded(9, 6 if name == "rrhf" else 2)
    expected, gradient = step(name, records, "padded", 10**9)
    for layout in ("padded", "tree"):
        for budget in (1, 60, 10**9):
            measures, other = step(name, records, layout, budget)
            assert measures == pytest.approx(expected, rel=2e-5, abs=2e-6)
            assert_same_gradient(gradient, other)


@pytest.mark.parametrize("name", TASKS)
def test_order_of_records_changes_nothing(name: str) -> None:
    records = encoded(9, 2)
    expected, gradient = step(name, records, "tree", 60)
    shuffled = list(records)
    random.Random(5).shuffle(shuffled)
    measures, other = step(name, shuffled, "tree", 60)
    assert measures == expected  # records are sorted by id, so not one bit differs
    assert all(torch.equal(gradient[n], other[n]) for n in gradient)


@pytest.mark.parametrize("name", ["kto", "rrhf", "paper"])
def test_weights_after_training_do_not_depend_on_the_budget(name: str, tmp_path) -> None:
    weights = []
    for budget, layout in ((1, "tree"), (10**9, "tree"), (10**9, "padded")):
        model = model_of(name)
        folder = tmp_path / f"{budget}-{layout}"
        folder.mkdir()
        config = TrainingConfig(learning_rate=1e-3, batch_size=4, epochs=3, schedule="cosine")
        engine = EngineConfig(tokens_per_micro_batch=budget, layout=layout)
        with Tracker(TrackerConfig(), folder, "test", {}) as tracker:
            task = make_task(name, encoded(10, 6 if name == "rrhf" else 2))
            train(task, model, config, engine, 0, folder, tracker, "test")
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in model_of(name).parameters()])
    moved = float((weights[0] - start).norm())
    assert moved > 1e-2
    # Adam divides by the gradient's own size, so rounding in tiny gradients is magnified: compare with the distance.
    for other in weights[1:]:
        assert float((weights[0] - other).norm()) < 1e-3 * moved


def test_loss_is_ln2_where_policy_is_the_reference() -> None:
    """At step 0 every pair's DPO loss is ln 2, its implicit reward margin 0, and accuracy counts ties as half."""
    records = encoded(6, 2)
    model = llama()
    layout = set_layout(model, "tree")
    examples = []
    for record in records:
        sequences = [(*record.prompt, *ids) for ids in record.responses]
        spans = [Span(n, len(record.prompt)) for n in range(2)]
        with torch.no_grad():
            reference, _ = read_log_probabilities(model, make_layout(layout, sequences), spans)
        examples.append(AlignmentRecord(record, (Pair(0, 1),), tuple(reference.tolist())))
    task = task_of(examples, choose_loss(SETTINGS["dpo"]))
    for budget in (1, 10**9):
        measures = one_step(task, model, layout, examples, budget)
        assert measures["loss"] == pytest.approx(math.log(2), abs=2e-6)
        assert measures["implicit_reward_margin"] == pytest.approx(0, abs=2e-5)


def test_kto_estimates_its_kl_over_the_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """z0 = max(0, mean over ALL mismatched responses), not a mean of each micro-batch's maximum."""
    model = llama()
    layout = set_layout(model, "padded")
    task = alignment_task("kto", encoded(6, 2))
    records = list(task.records)
    seen: list[torch.Tensor] = []
    assert task.kl_ratios is not None
    with torch.no_grad():
        parts = [task.kl_ratios(model, layout, [record]) for record in records]
    whole = losses.kto_kl(torch.cat(parts))
    monkeypatch.setattr(losses, "kto_kl", lambda ratios: seen.append(ratios) or whole)
    for budget in (1, 10**9):
        one_step(task, model, layout, records, budget)
    assert [len(ratios) for ratios in seen] == [12, 12]
    assert all(torch.allclose(ratios.sort().values, torch.cat(parts).sort().values, atol=1e-5) for ratios in seen)
    assert float(whole) > 0.0
    ratios = []
    for record in records:
        for ids, known in record.mismatched:
            row = torch.tensor([[*record.encoded.prompt, *ids]])
            with torch.no_grad():
                logits = model(row).logits[0, :-1].log_softmax(-1)
            tokens = logits.gather(-1, row[0, 1:, None])[len(record.encoded.prompt) - 1 :, 0]
            ratios.append(float(tokens.sum()) - known)
    assert float(whole) == pytest.approx(max(0.0, sum(ratios) / len(ratios)), abs=1e-4)


def test_dpo_step_equals_the_naive_formula() -> None:
    """The whole path (packing, tree, read-outs, weights, means) against a loop over plain forward passes."""
    model = llama()
    task = alignment_task("dpo", encoded(5, 2))
    expected = 0.0
    examples = list(task.records)
    for example in examples:
        sums = []
        for ids in example.encoded.responses:
            row = torch.tensor([[*example.encoded.prompt, *ids]])
            with torch.no_grad():
                logits = model(row).logits[0, :-1].log_softmax(-1)
            sums.append(float(logits.gather(-1, row[0, 1:, None])[len(example.encoded.prompt) - 1 :].sum()))
        margin = (sums[0] - example.reference[0]) - (sums[1] - example.reference[1])
        expected += example.pairs[0].weight * math.log1p(math.exp(-0.2 * margin)) / 5
    layout = set_layout(model, "tree")
    assert one_step(task, model, layout, examples, 50)["loss"] == pytest.approx(expected, rel=1e-5)


def test_difference_pairs_are_shown_in_random_order_reseeded_every_epoch() -> None:
    records = encoded(200, 2)
    task = make_task("paper", records)
    targets = [[task.example(n, epoch).target for n in range(len(records))] for epoch in (0, 1)]
    for drawn in targets:
        assert 70 < sum(target == 1.0 for target in drawn) < 130
    assert targets[0] != targets[1]
    assert targets[0] == [task.example(n, 0).target for n in range(len(records))]


def test_items_are_made_when_they_are_asked_for_and_in_the_order_of_their_keys() -> None:
    made: list[int] = []

    def make(number: int) -> int:
        made.append(number)
        return 10 * number

    examples = ById([("b", 1), ("a", 2), ("b", 0), ("a", 2)], make)
    assert (len(examples), made) == (4, [])
    assert examples.keys == [("a", 2), ("a", 2), ("b", 0), ("b", 1)]
    assert list(examples) == [10, 30, 20, 0]  # equal keys in the order given
    assert examples[2] == 20
    assert made == [1, 3, 2, 0, 2]


class Fleeting(Sequence[Any]):
    """Copies of some objects, each made when it is asked for; counts how many are alive at once."""

    def __init__(self, held: Sequence[Any]):
        self.held, self.alive, self.most, self.made = held, 0, 0, 0

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, place: Any) -> Any:
        copy = replace(self.held[place])
        weakref.finalize(copy, self.gone)
        self.alive, self.made = self.alive + 1, self.made + 1
        self.most = max(self.most, self.alive)
        return copy

    def gone(self) -> None:
        self.alive -= 1


STAGES: dict[str, Callable[[Run], object]] = {
    "sft": base_policy,
    "rm": lambda run: scorer(run, "reward"),
    "diffmodel": lambda run: scorer(run, "diff"),
    "align": aligned_policy,
}


@pytest.mark.parametrize("name", STAGES)
def test_no_stage_holds_the_texts_or_token_ids_of_all_records(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 64 records at most those of two batches are alive at once, and the texts of a few being read."""
    sections = [f"{section}.{key}" for section in STAGES for key in ("batch_size=4", "max_steps=3", "max_records=64")]
    run = tiny_run(tmp_path, "dataset.toy.demonstrations=64", "loss=kto", "rc=gold", "model=small", *sections)
    split = "demonstrations" if name == "sft" else "train"
    records = run.records(split)
    tokenizer = load_tokenizer(model_path(base_policy(run)), run.config.model)
    reference(run, mismatched=True)
    texts, ids = Fleeting(records), Fleeting(run.encoded(split, tokenizer))
    lazy = type(records)(texts, records.numbers, records.rows)
    monkeypatch.setattr(Run, "records", lambda self, split: lazy)
    monkeypatch.setattr(Run, "encoded", lambda self, split, tokenizer: ids)
    if name == "sft":
        run.provenance = replace(run.provenance, run_dir=tmp_path / "again")
    STAGES[name](run)
    assert len(records) == 64
    assert min(texts.made, ids.made) >= 64
    assert texts.most <= 8  # a batch, and the one being read
    assert ids.most <= 2 * 4 * 2  # each with its partner for KTO's KL


def test_schedule_and_plan() -> None:
    config = TrainingConfig(warmup_share=0.1, schedule="linear", batch_size=4, epochs=2)
    factors = [learning_rate_factor(step, 20, config) for step in range(20)]
    assert factors[:2] == [0.5, 1.0]
    assert factors[2] == 1.0
    assert factors[-1] == pytest.approx(1 / 18)
    plan = make_plan(config, 10, seed=1)
    assert plan.steps == 6
    seen = [n for step in range(3) for n in plan.batch(step)[1]]
    assert sorted(seen) == list(range(10))
    assert len(plan.batch(2)[1]) == 2
    assert plan.batch(3)[0] == 1
    assert [plan.batch(step)[1] for step in range(3)] != [plan.batch(step)[1] for step in range(3, 6)]
