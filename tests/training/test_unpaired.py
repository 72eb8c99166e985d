"""A step of KTO whose log-ratios are known: golden numbers, however the samples are labelled and arranged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from engines import PlainEngine, one_step
from made_tasks import task_of
from rdo.data.encoding import EncodedRecord
from rdo.objectives.choice import choose_loss
from rdo.sequences.forward import Reads
from rdo.training.alignment import AlignmentRecord, Mismatched, Pair, Sample

# Log-ratios of four samples, whether each is desirable, and those of the four mismatched responses: z0 = 0.75.
SAMPLES = [(1.0, True), (-1.0, True), (-1.0, False), (4.0, False)]
MISMATCHED = [1.0, 1.0, -1.0, 2.0]
GOLDEN = [0.493750, 0.543639, 0.456361, 0.580542]
REFERENCE = -3.0


class KnownRatios(PlainEngine):
    """A policy under which response n (one token, 10 + n) has log-ratio n of SAMPLES and then of MISMATCHED."""

    def __init__(self) -> None:
        ratios = torch.tensor([ratio for ratio, _ in SAMPLES] + MISMATCHED)
        self.policy = (ratios + REFERENCE).requires_grad_()

    def read(self, layout: str, reads: Reads) -> torch.Tensor:
        return self.policy[[reads.sequences[span.sequence][span.start] - 10 for span in reads.spans]]


def golden_item(name: str, responses: Sequence[int], pairs: tuple[Pair, ...] = ()) -> AlignmentRecord:
    """A record of some of SAMPLES, by number, each with the mismatched response of its number; alone but for pairs."""
    paired = {response for pair in pairs for response in (pair.chosen, pair.rejected)}
    reference = tuple(REFERENCE for _ in responses)
    return AlignmentRecord(
        EncodedRecord(name, (2, 3), tuple((10 + n,) for n in responses)),
        pairs,
        reference,
        tuple(Sample(place, SAMPLES[n][1]) for place, n in enumerate(responses) if place not in paired),
        mismatched=Mismatched(Reads.of((2, 3), [(10 + len(SAMPLES) + n,) for n in responses]), reference),
    )


def golden_step(
    examples: list[AlignmentRecord], budget: int = 10**6, **settings: Any
) -> tuple[dict[str, float], torch.Tensor]:
    """The measures, and the gradient of every log-ratio."""
    known, loss = KnownRatios(), choose_loss({"name": "kto", "beta": 0.1, "mean_over": "samples", **settings})
    measures = one_step(task_of(examples, loss), known, "padded", examples, budget)
    assert known.policy.grad is not None
    return measures, known.policy.grad


ARRANGED = {
    "unpaired": [golden_item(f"r{n}", [n]) for n in range(4)],
    "several responses a record": [golden_item("a", [0, 3, 1]), golden_item("b", [2])],
    "mixed": [golden_item("a", [0, 2], (Pair(0, 1),)), golden_item("b", [1]), golden_item("c", [3])],
    "paired": [golden_item("a", [0, 2], (Pair(0, 1),)), golden_item("b", [1, 3], (Pair(0, 1),))],
}


@pytest.mark.parametrize("budget", [1, 10**6])
@pytest.mark.parametrize("arranged", ARRANGED)
def test_a_step_golden(arranged: str, budget: int) -> None:
    """However the samples come, loss, gradient and z0 are KTO's; pairs are measured where there are some."""
    measures, gradient = golden_step(ARRANGED[arranged], budget)
    assert measures["loss"] == pytest.approx(0.518573, abs=6e-7)
    assert measures["alignment_loss"] == pytest.approx(sum(GOLDEN) / 4, abs=6e-7)
    assert measures["kl_estimate"] == pytest.approx(0.75)
    assert measures["implicit_reward_desirable"] == pytest.approx(0.1 * (1 - 1) / 2)
    assert measures["implicit_reward_undesirable"] == pytest.approx(0.1 * (4 - 1) / 2)
    about_pairs = {"policy_margin", "policy_chosen", "implicit_reward_accuracy", "implicit_reward_margin"}
    assert about_pairs & measures.keys() == (about_pairs if arranged in ("mixed", "paired") else set())
    # d/dh of 1 - sigmoid(beta (h - z0)), and of 1 - sigmoid(beta (z0 - h)), over four samples
    sign = torch.tensor([-1.0, -1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    value = torch.tensor([*GOLDEN, 0.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(gradient, sign * 0.1 * value * (1 - value) / 4, rtol=1e-5, atol=1e-8)


WEIGHTED = [golden_item("a", [0, 2], (Pair(0, 1, 2.0),)), *ARRANGED["mixed"][1:]]
DESIRABLE, UNDESIRABLE = ([golden_item("a", [n])] for n in (0, 3))


@pytest.mark.parametrize(
    ("examples", "settings", "expected"),
    [
        (ARRANGED["unpaired"], {"lambda_desirable": 1.33}, 0.604158),
        (ARRANGED["unpaired"], {"lambda_undesirable": 2.0}, 0.777799),
        # Only pairs carry coefficients: [2 (0.493750 + 0.456361) + 0.543639 + 0.580542] / 4
        (WEIGHTED, {}, 0.756101),
        # One kind alone: sigmoid(-0.1 (1 - 1)) and sigmoid(0.1 (4 - 2))
        (DESIRABLE, {}, 0.5),
        (UNDESIRABLE, {}, 0.549834),
    ],
)
def test_weights_and_one_kind_alone_golden(
    examples: list[AlignmentRecord], settings: dict[str, float], expected: float
) -> None:
    measures, gradient = golden_step(examples, **settings)
    assert measures["loss"] == pytest.approx(expected, abs=6e-7)
    samples = sum(len(example.encoded.responses) for example in examples)
    assert int((gradient != 0).sum()) == samples
    wanted = {"desirable", "undesirable"} if samples > 1 else {"desirable" if examples is DESIRABLE else "undesirable"}
    assert {label for label in ("desirable", "undesirable") if f"implicit_reward_{label}" in measures} == wanted
