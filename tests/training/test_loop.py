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
from made_tasks import SETTINGS, TASKS, alignment_task, encoded, make_task, mismatch, references, task_of
from rdo.data.encoding import EncodedRecord
from rdo.models.pretrained import load_tokenizer
from rdo.objectives.choice import choose_loss
from rdo.sequences.forward import Reads, read
from rdo.sequences.preparation import set_layout
from rdo.settings import EngineConfig, TrackerConfig, TrainingConfig
from rdo.stages.align import aligned_policy
from rdo.stages.reference import reference
from rdo.stages.run import Run, model_path
from rdo.stages.scorer import scorer
from rdo.stages.sft import base_policy
from rdo.tracking import Tracker
from rdo.training.alignment import AlignmentRecord, Pair, Sample
from rdo.training.loop import learning_rate_factor, make_plan, train
from rdo.training.step import Task
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


def step_of(
    task: Task, model: torch.nn.Module, examples: Sequence[Any], layout: str, budget: int = 10**9
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Measures and gradients of one step over the examples."""
    measures = one_step(task, model, set_layout(model, layout), examples, budget)
    return measures, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(
    name: str, records: list[EncodedRecord], layout: str, budget: int
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The same of a task, over all records."""
    task = make_task(name, records)
    examples = [task.example(index, 0) for index in range(len(task))]
    return step_of(task, model_of(name), examples, layout, budget)


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
    model = llama()
    layout = set_layout(model, "tree")
    examples = []
    for record in encoded(6, 2):
        with torch.no_grad():
            reference = read(model, layout, Reads.of(record.prompt, record.responses))
        examples.append(AlignmentRecord(record, (Pair(0, 1),), tuple(reference.tolist())))
    task = task_of(examples, choose_loss(SETTINGS["dpo"]))
    for budget in (1, 10**9):
        measures = one_step(task, model, layout, examples, budget)
        assert measures["loss"] == pytest.approx(math.log(2), abs=2e-6)
        assert measures["implicit_reward_margin"] == pytest.approx(0, abs=2e-5)


def naive_log_probability(model: torch.nn.Module, prompt: Sequence[int], ids: Sequence[int]) -> float:
    """A response's, by a plain forward pass of the one sequence."""
    row = torch.tensor([[*prompt, *ids]])
    with torch.no_grad():
        logits = model(row).logits[0, :-1].log_softmax(-1)
    return float(logits.gather(-1, row[0, 1:, None])[len(prompt) - 1 :].sum())


def test_dpo_step_equals_the_naive_formula() -> None:
    """The whole path (packing, tree, read-outs, weights, means) against a loop over plain forward passes."""
    model, task = llama(), alignment_task("dpo", encoded(5, 2))
    expected = 0.0
    examples = list(task.records)
    for example in examples:
        sums = [naive_log_probability(model, example.encoded.prompt, ids) for ids in example.encoded.responses]
        margin = (sums[0] - example.reference[0]) - (sums[1] - example.reference[1])
        expected += example.pairs[0].weight * math.log1p(math.exp(-0.2 * margin)) / 5
    layout = set_layout(model, "tree")
    assert one_step(task, model, layout, examples, 50)["loss"] == pytest.approx(expected, rel=1e-5)


def test_kto_step_of_mixed_data_equals_the_naive_formula() -> None:
    """Also z0 = max(0, mean over ALL mismatched responses), not a mean of each micro-batch's maximum; and the
    cross-entropy of some responses."""
    model, task = llama(), alignment_task("mixed", encoded(9, 2))
    examples = list(task.records)
    ratios = []
    for reads, known in ((example.mismatched.reads, example.mismatched.reference) for example in examples):
        for ids, span, value in zip(reads.sequences, reads.spans, known, strict=True):
            ratios.append(naive_log_probability(model, ids[: span.start], ids[span.start :]) - value)
    z0 = max(0.0, sum(ratios) / len(ratios))
    assert z0 > 0
    losses, imitated = [], []
    for example in examples:
        sums = [naive_log_probability(model, example.encoded.prompt, ids) for ids in example.encoded.responses]
        taken = [(r, good, p.weight) for p in example.pairs for r, good in ((p.chosen, True), (p.rejected, False))]
        for response, good, weight in [*taken, *((s.response, s.desirable, 1.0) for s in example.samples)]:
            ratio = sums[response] - example.reference[response]
            losses.append(weight / (1 + math.exp(0.1 * (ratio - z0) * (1 if good else -1))))
        if example.best is not None:
            imitated.append(-sums[example.best] / len(example.encoded.responses[example.best]))
    assert (len(losses), len(imitated)) == (3 * 2 + 3 * 2 + 3, 3)
    expected = sum(losses) / len(losses) + 0.5 * sum(imitated) / len(imitated)
    layout = set_layout(model, "tree")
    for budget in (1, 50, 10**9):
        measures = one_step(task, model, layout, examples, budget)
        assert measures["loss"] == pytest.approx(expected, rel=1e-5)
        assert measures["kl_estimate"] == pytest.approx(z0, rel=1e-5)


@pytest.mark.parametrize("layout", ["padded", "tree"])
def test_pairs_split_up_give_the_step_of_the_pairs(layout: str) -> None:
    """KTO with rc=none, each half paired with its half of the mismatched responses."""
    records = encoded(6, 2)
    known = references(records)
    pairs, halves = [], []
    for n, record in enumerate(records):
        others = records[n - 1].responses
        pairs.append(AlignmentRecord(record, (Pair(0, 1),), known[record.id], mismatched=mismatch(record, others)))
        for response, desirable in ((0, True), (1, False)):
            half = EncodedRecord(f"{record.id}-{response}", record.prompt, (record.responses[response],))
            own, other = (known[record.id][response],), mismatch(record, others[response : response + 1])
            halves.append(AlignmentRecord(half, (), own, (Sample(0, desirable),), mismatched=other))
    kto = choose_loss(SETTINGS["kto"])
    (expected, gradient), (measures, other) = (
        step_of(task_of(examples, kto), llama(), examples, layout) for examples in (pairs, halves)
    )
    assert expected["kl_estimate"] > 0
    for name in ("loss", "kl_estimate", "implicit_reward_desirable", "implicit_reward_undesirable"):
        assert measures[name] == pytest.approx(expected[name], rel=1e-6)
    assert_same_gradient(gradient, other)


def test_difference_pairs_are_shown_in_random_order_reseeded_every_epoch() -> None:
    records = encoded(200, 2)
    task = make_task("paper", records)
    targets = [[task.example(n, epoch).target for n in range(len(records))] for epoch in (0, 1)]
    for drawn in targets:
        assert 70 < sum(target == 1.0 for target in drawn) < 130
    assert targets[0] != targets[1]
    assert targets[0] == [task.example(n, 0).target for n in range(len(records))]


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
    reference(run, True, "train", run.config.align)
    texts, ids = Fleeting(records.source), Fleeting(run.encoded(split, tokenizer))
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
