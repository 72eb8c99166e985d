"""Tree attention by contiguous rows: its rectangles are every token's path exactly once, and its numbers those of
the padded rectangles, which tests/sequences/test_layouts.py holds against each sequence alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from test_layouts import DECODERS, FLOAT32, FLOAT64, LISTS, check
from transformers import PreTrainedModel

import rdo.sequences.kernels.contiguous
from helpers import policy, random_tree, relative_error, words
from rdo.sequences.forward import hidden_states
from rdo.sequences.kernels.contiguous import ContiguousPlan, contiguous_rectangles
from rdo.sequences.kernels.gathered import GatheredPlan
from rdo.sequences.layout import PrefixTree
from rdo.sequences.preparation import set_layout

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def every_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees of short segments, too, which padding would run otherwise, and halves of segments that are not long."""
    monkeypatch.setattr(rdo.sequences.kernels.contiguous, "SHORT", 0)
    monkeypatch.setattr(rdo.sequences.kernels.contiguous, "LONG", 5)


@pytest.mark.parametrize("sequences", [*LISTS.values(), *(random_tree(seed, count=12) for seed in range(40))])
def test_rectangles_are_every_path_exactly_once(sequences: list[tuple[int, ...]]):
    tree = PrefixTree(sequences)
    seen = np.zeros((len(tree), len(tree)), dtype=int)
    for r in contiguous_rectangles(tree):
        rows = np.ones((r.stop - r.start, r.key_stop - r.key_start), dtype=int)
        seen[r.start : r.stop, r.key_start : r.key_stop] += np.tril(rows) if r.causal else rows
    wanted = np.zeros_like(seen)
    for rows in tree.rows:
        for position, row in enumerate(rows):
            wanted[row, rows[: position + 1]] = 1
    assert (seen == wanted).all()


def test_a_causal_rectangle_comes_before_all_that_its_queries_are_in():
    """The merge relies on it: the first rectangle of a row starts its sum."""
    for seed in range(20):
        done: set[int] = set()
        for r in contiguous_rectangles(PrefixTree(random_tree(seed, count=12))):
            rows = set(range(r.start, r.stop))
            assert done.isdisjoint(rows) if r.causal else rows <= done
            done |= rows if r.causal else set()


def attended(plan: ContiguousPlan | GatheredPlan, dtype: torch.dtype, heads: int, seed: int) -> list[torch.Tensor]:
    """Output and gradients of an attention over random queries, keys and values, `heads` of queries for 4 of keys."""
    generator = torch.Generator().manual_seed(seed)
    tokens = len(plan.tree) if isinstance(plan, ContiguousPlan) else len(plan.inverse)
    query, key, value = (
        torch.randn(1, tokens, number, 8, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_()
        for number in (heads, 4, 4)
    )
    out = plan.attend(query, key, value, 0.3, None)
    weight = torch.randn(out.shape, generator=generator, dtype=dtype)
    return [out, *torch.autograd.grad((weight * out).sum(), [query, key, value])]


@pytest.mark.parametrize("heads", [4, 12])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_attention_and_gradients_are_those_of_padded_rectangles(heads: int, dtype: torch.dtype, tolerance: float):
    for seed in range(10):
        tree = PrefixTree(random_tree(seed, count=10, longest=60))
        found = attended(ContiguousPlan(tree, CPU), dtype, heads, seed)
        wanted = attended(GatheredPlan(tree, CPU), dtype, heads, seed)
        for one, other in zip(found, wanted, strict=True):
            assert relative_error([one], [other]) < tolerance


def test_gradients_are_those_of_finite_differences():
    plan = ContiguousPlan(PrefixTree(random_tree(3, count=5, longest=6)), CPU)
    shape = (1, 2, len(plan.tree), 3)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda q, k, v: plan.attend(q, k, v, None, None), inputs)


@pytest.mark.parametrize(
    ("model", "dtype", "name"),
    [
        *(("llama-grouped", torch.float64, name) for name in LISTS),
        *((model, torch.float32, "three differences") for model in DECODERS[2:] if model != "gpt2-by-layer"),
    ],
)
def test_models_agree_with_sequences_alone(model: str, dtype: torch.dtype, name: str):
    check(policy(model, dtype), LISTS[name], FLOAT64 if dtype == torch.float64 else FLOAT32)


def computed_by(model: PreTrainedModel, sequences: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The plans that ran the attention of a tree."""
    ran: set[str] = set()
    for plan in (ContiguousPlan, GatheredPlan):
        attend = plan.attend

        def noted(self, *arguments, name=plan.__name__, attend=attend):
            ran.add(name)
            return attend(self, *arguments)

        monkeypatch.setattr(plan, "attend", noted)
    with torch.no_grad():
        hidden_states(model, PrefixTree(sequences))
    return ran


def test_short_segments_and_windows_are_padded(monkeypatch: pytest.MonkeyPatch):
    coin = random.Random(0)
    query = words(coin, 70)
    long, short = [query + words(coin, 70) for _ in range(2)], [query[:10] + words(coin, 9) for _ in range(6)]
    monkeypatch.setattr(rdo.sequences.kernels.contiguous, "SHORT", 64)
    for name, sequences, padded in (("llama", long, False), ("llama", short, True), ("mistral-window", long, True)):
        model = policy(name)
        assert set_layout(model, "tree") == "tree"
        with monkeypatch.context() as patch:
            ran = computed_by(model, sequences, patch)
        assert ran == ({"ContiguousPlan", "GatheredPlan"} if padded else {"ContiguousPlan"})
