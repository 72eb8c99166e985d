"""A training step of KTO on responses that are labelled alone, desirable or not, with pairs among them or without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_loop import assert_same_gradient, llama

from engines import one_step
from made_tasks import alignment_task, encoded, references, task_of
from rdo.data.encoding import EncodedRecord
from rdo.objectives.choice import LossChoice, choose_loss
from rdo.sequences.preparation import set_layout
from rdo.sequences.readout import Span
from rdo.training.alignment import AlignmentRecord, Pair, Sample


def kto(**others: Any) -> LossChoice:
    return choose_loss({"name": "kto", "beta": 0.1, "mean_over": "samples", **others})


# ---------------------------------------------------------------------------------------------------------------------
# Golden numbers: one step with known log-ratios
# ---------------------------------------------------------------------------------------------------------------------

# Log-ratios of four samples, whether each is desirable, and those of the four mismatched responses: z0 = 0.75.
SAMPLES = [(1.0, True), (-1.0, True), (-1.0, False), (4.0, False)]
MISMATCHED = [1.0, 1.0, -1.0, 2.0]
GOLDEN = [0.493750, 0.543639, 0.456361, 0.580542]
REFERENCE = -3.0


class KnownRatios:
    """Stands in for a policy: response n (one token, 10 + n) has log-ratio n of SAMPLES and then of MISMATCHED."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        ratios = torch.tensor([ratio for ratio, _ in SAMPLES] + MISMATCHED)
        self.policy = (ratios + REFERENCE).requires_grad_()
        monkeypatch.setattr("rdo.training.alignment.read_log_probabilities", self.read)

    def read(self, model: None, layout: Any, spans: Sequence[Span]) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = [layout.sequences[span.sequence][span.start] - 10 for span in spans]
        return self.policy[numbers], torch.ones(len(numbers), dtype=torch.int64)


def golden_item(name: str, responses: Sequence[int], pairs: tuple[Pair, ...] = ()) -> AlignmentRecord:
    """A record of some of SAMPLES, by number, each with the mismatched response of its number; alone but for pairs."""
    paired = {response for pair in pairs for response in (pair.chosen, pair.rejected)}
    return AlignmentRecord(
        EncodedRecord(name, (2, 3), tuple((10 + n,) for n in responses)),
        pairs,
        tuple(REFERENCE for _ in responses),
        tuple(Sample(place, SAMPLES[n][1]) for place, n in enumerate(responses) if place not in paired),
        mismatched=tuple(((10 + len(SAMPLES) + n,), REFERENCE) for n in responses),
    )


ARRANGED = {
    "unpaired": [golden_item(f"r{n}", [n]) for n in range(4)],
    "several responses a record": [golden_item("a", [0, 3, 1]), golden_item("b", [2])],
    "mixed": [golden_item("a", [0, 2], (Pair(0, 1),)), golden_item("b", [1]), golden_item("c", [3])],
    "paired": [golden_item("a", [0, 2], (Pair(0, 1),)), golden_item("b", [1, 3], (Pair(0, 1),))],
}


@pytest.mark.parametrize("budget", [1, 10**6])
@pytest.mark.parametrize("arranged", ARRANGED)
def test_a_step_golden(arranged: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the samples come, loss, gradient and z0 are KTO's; pairs are measured where there are some."""
    known, examples = KnownRatios(monkeypatch), ARRANGED[arranged]
    measures = one_step(task_of(examples, kto()), None, "padded", examples, budget)
    assert measures["loss"] == pytest.approx(0.518573, abs=6e-7)
    assert measures["alignment_loss"] == pytest.approx(sum(GOLDEN) / 4, abs=6e-7)
    assert measures["kl_estimate"] == pytest.approx(0.75)
    assert measures["implicit_reward_desirable"] == pytest.approx(0.1 * (1 - 1) / 2)
    assert measures["implicit_reward_undesirable"] == pytest.approx(0.1 * (4 - 1) / 2)
    about_pairs = {"policy_margin", "policy_chosen", "implicit_reward_accuracy", "implicit_reward_margin"}
    found = about_pairs if arranged in ("mixed", "paired") else set()
    assert about_pairs & measures.keys() == found
    # d/dh of 1 - sigmoid(beta (h - z0)), and of 1 - sigmoid(beta (z0 - h)), over four samples
    sign = torch.tensor([-1.0, -1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    value = torch.tensor([*GOLDEN, 0.0, 0.0, 0.0, 0.0])
    assert known.policy.grad is not None
    torch.testing.assert_close(known.policy.grad, sign * 0.1 * value * (1 - value) / 4, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("settings", "expected"), [({"lambda_desirable": 1.33}, 0.604158), ({"lambda_undesirable": 2.0}, 0.777799)]
)
def test_a_step_golden_with_lambda(
    settings: dict[str, float], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    KnownRatios(monkeypatch)
    examples = ARRANGED["unpaired"]
    measures = one_step(task_of(examples, kto(**settings)), None, "padded", examples, 10**6)
    assert measures["loss"] == pytest.approx(expected, abs=6e-7)


def test_only_pairs_carry_coefficients(monkeypatch: pytest.MonkeyPatch) -> None:
    """[2 (0.493750 + 0.456361) + 0.543639 + 0.580542] / 4: both members of the pair, and no one else."""
    KnownRatios(monkeypatch)
    examples = [golden_item("a", [0, 2], (Pair(0, 1, 2.0),)), golden_item("b", [1]), golden_item("c", [3])]
    measures = one_step(task_of(examples, kto()), None, "padded", examples, 10**6)
    assert measures["loss"] == pytest.approx(0.756101, abs=6e-7)
    assert measures["weight_mean"] == 1.5


@pytest.mark.parametrize(("number", "label"), [(0, "desirable"), (3, "undesirable")])
def test_a_step_of_one_kind_only(number: int, label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = KnownRatios(monkeypatch)
    examples = [golden_item("a", [number])]
    measures = one_step(task_of(examples, kto()), None, "padded", examples, 10**6)
    z0 = max(0.0, MISMATCHED[number])
    ratio, desirable = SAMPLES[number]
    expected = 1 / (1 + math.exp(0.1 * (ratio - z0) * (1 if desirable else -1)))
    assert measures["loss"] == pytest.approx(expected, abs=6e-7)
    assert all(math.isfinite(value) for value in measures.values())
    assert {name for name in measures if name.startswith("implicit_reward")} == {f"implicit_reward_{label}"}
    assert known.policy.grad is not None
    assert int((known.policy.grad != 0).sum()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The whole step of a model
# ---------------------------------------------------------------------------------------------------------------------


def step(examples: Sequence[AlignmentRecord], layout: str, loss: LossChoice) -> tuple[dict, dict]:
    """Measures and gradients of one step over the examples."""
    model = llama()
    measures = one_step(task_of(examples, loss), model, set_layout(model, layout), examples, 10**9)
    return measures, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_step_of_mixed_data_equals_the_naive_formula() -> None:
    """Packing, tree, read-outs, z0, weights, means and the cross-entropy against a loop over plain forward passes."""
    model, task = llama(), alignment_task("mixed", encoded(9, 2))
    examples = list(task.records)

    def log_probability(prompt: tuple[int, ...], ids: tuple[int, ...]) -> float:
        row = torch.tensor([[*prompt, *ids]])
        with torch.no_grad():
            logits = model(row).logits[0, :-1].log_softmax(-1)
        return float(logits.gather(-1, row[0, 1:, None])[len(prompt) - 1 :].sum())

    ratios = [log_probability(i.encoded.prompt, ids) - known for i in examples for ids, known in i.mismatched]
    z0 = max(0.0, sum(ratios) / len(ratios))
    assert z0 > 0
    losses, imitated = [], []
    for example in examples:
        taken = [(r, good, p.weight) for p in example.pairs for r, good in ((p.chosen, True), (p.rejected, False))]
        for response, good, weight in [*taken, *((s.response, s.desirable, 1.0) for s in example.samples)]:
            ids = example.encoded.responses[response]
            ratio = log_probability(example.encoded.prompt, ids) - example.reference[response]
            losses.append(weight / (1 + math.exp(0.1 * (ratio - z0) * (1 if good else -1))))
        if example.best is not None:
            ids = example.encoded.responses[example.best]
            imitated.append(-log_probability(example.encoded.prompt, ids) / len(ids))
    assert (len(losses), len(imitated)) == (3 * 2 + 3 * 2 + 3, 3)
    expected = sum(losses) / len(losses) + 0.5 * sum(imitated) / len(imitated)
    measures = one_step(task, model, set_layout(model, "tree"), examples, 50)
    assert measures["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layout", ["padded", "tree"])
def test_pairs_split_up_give_the_step_of_the_pairs(layout: str) -> None:
    """With rc=none, and each half paired with its half of the mismatched responses."""
    records = encoded(6, 2)
    known = references(records)
    pairs, halves = [], []
    for n, record in enumerate(records):
        mismatched = tuple((ids, -4.1 * len(ids)) for ids in records[n - 1].responses)
        pairs.append(AlignmentRecord(record, (Pair(0, 1),), known[record.id], mismatched=mismatched))
        for response, desirable in ((0, True), (1, False)):
            half = EncodedRecord(f"{record.id}-{response}", record.prompt, (record.responses[response],))
            own, other = known[record.id][response], mismatched[response]
            halves.append(AlignmentRecord(half, (), (own,), (Sample(0, desirable),), mismatched=(other,)))
    expected, gradient = step(pairs, layout, kto())
    measures, other = step(halves, layout, kto())
    assert expected["kl_estimate"] > 0
    for name in ("loss", "kl_estimate", "implicit_reward_desirable", "implicit_reward_undesirable"):
        assert measures[name] == pytest.approx(expected[name], rel=1e-6)
    assert_same_gradient(gradient, other)
