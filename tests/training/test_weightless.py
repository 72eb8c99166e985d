"""Pairs of weight 0 are in every denominator, and no model reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_loop import assert_same_gradient, model_of

from engines import PlainEngine
from made_tasks import SETTINGS, alignment_task, encoded, task_of
from rdo.objectives.choice import choose_loss
from rdo.sequences.preparation import set_layout
from rdo.training.alignment import AlignmentRecord
from rdo.training.step import deal_step, training_step

SAME = ("loss", "weight_mean", "weight_square_mean", "chosen_length", "kl_estimate", "sft_loss")
MEASURED = ("alignment_loss", "policy_margin", "log_ratio_chosen", "implicit_reward_margin")


def step(name: str, examples: list[AlignmentRecord], layout: str, budget: int) -> tuple[dict[str, float], dict]:
    """Measures and gradients of one step."""
    model = model_of(name)
    task = task_of(examples, choose_loss(SETTINGS[name]))
    dealt = deal_step(examples, set_layout(model, layout), budget)
    measures = training_step(task, PlainEngine(model), layout, dealt)
    return measures, {name: weight.grad for name, weight in model.named_parameters()}


def weighed(name: str, weight: Callable[[int, float], float]) -> list[AlignmentRecord]:
    """Records whose pairs have the weights that are said of their number and their own weight; nothing but pairs in a
    record whose number is a multiple of 4."""
    found, number = [], 0
    for place, example in enumerate(alignment_task(name, encoded(9, 6 if name == "rrhf" else 2)).records):
        pairs = []
        for pair in example.pairs:
            pairs.append(replace(pair, weight=weight(number, pair.weight)))
            number += 1
        found.append(replace(example, pairs=tuple(pairs), best=example.best if place % 4 else None))
    return found


def is_left_out(number: int) -> bool:
    return number % 3 == 0 or number < 16


@pytest.mark.parametrize("layout", ["padded", "tree"])
@pytest.mark.parametrize(("name", "budget"), [("dpo", 60), ("kto", 1), ("kto", 10**9), ("rrhf", 60), ("mixed", 60)])
def test_the_step_is_that_of_weights_next_to_0_which_are_read(name: str, budget: int, layout: str) -> None:
    left_out = is_left_out if name == "rrhf" else lambda number: number % 3 == 0
    examples = weighed(name, lambda n, w: 0.0 if left_out(n) else w)
    read, gradient = step(name, weighed(name, lambda n, w: 1e-30 if left_out(n) else w), layout, budget)
    found, other = step(name, examples, layout, budget)
    assert {name: found[name] for name in SAME if name in read} == pytest.approx(
        {name: read[name] for name in SAME if name in read}, rel=1e-6
    )
    assert_same_gradient(gradient, other)
    assert found["tokens"] < 0.9 * read["tokens"]
    assert (read["weight_zero_share"], found["weight_zero_share"] > 0.1) == (0, True)
    # What the policy says is a mean over the pairs that count, whatever else is in the step.
    kept = [replace(e, pairs=tuple(e.weighted), mismatched=None) for e in examples if e.weighted or e.samples]
    if "kl_estimate" not in found:
        alone, _ = step(name, kept, layout, budget)
        known = [measure for measure in MEASURED if measure in alone]
        assert [found[measure] for measure in known] == pytest.approx([alone[measure] for measure in known], rel=1e-5)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_step_in_which_no_pair_counts_has_the_gradient_0(name: str) -> None:
    """And not none at all: the optimizer's means decay as they would."""
    measures, gradient = step(name, weighed(name, lambda n, w: 0.0), "tree", 60)
    assert (measures["loss"], measures["tokens"], measures["weight_zero_share"]) == (0, 0, 1)
    assert "policy_margin" not in measures
    assert all(torch.equal(value, torch.zeros_like(value)) for value in gradient.values())
