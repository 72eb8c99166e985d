"""oneDNN's matrix products are PyTorch's, to rounding, forward and backward, and only where they are chosen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import linear

from helpers import policy, relative_error, scorer, tree
from rdo import processor
from rdo.errors import UserError
from rdo.forest import make_layout
from rdo.models import read_log_probabilities, set_layout
from rdo.processor import Product, choose_products, is_ours, keep_memory, why_not_onednn
from rdo.readout import Span

here = pytest.mark.skipif(why_not_onednn() is not None, reason=f"oneDNN {why_not_onednn()}")
SEQUENCES = [ids for ids in tree(1, count=8) if len(ids) > 1]
SPANS = [Span(s, 1) for s in range(len(SEQUENCES))]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = processor.chosen
    yield
    processor.chosen = before


def patched(model: torch.nn.Module) -> list[bool]:
    linears = [module for module in model.modules() if type(module) is torch.nn.Linear]
    return [is_ours(vars(module).get("forward")) for module in linears]


@here
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (1, 5), (2, 3, 4)])
def test_a_product_and_its_gradients_are_those_of_linear(bias: bool, shape: tuple[int, ...]):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(*shape, 12, generator=generator, requires_grad=True)
    weight = torch.randn(9, 12, generator=generator, requires_grad=True)
    added = torch.randn(9, generator=generator, requires_grad=True) if bias else None
    inputs = [states, weight, *([added] if added is not None else [])]
    wanted, found = linear(states, weight, added), Product.apply(states, weight, added)
    assert relative_error([found], [wanted]) < 1e-6
    factor = torch.randn(wanted.shape, generator=generator)
    gradients = [torch.autograd.grad((factor * out).sum(), inputs) for out in (found, wanted)]
    for one, other in zip(*gradients, strict=True):
        assert one.shape == other.shape
        assert relative_error([one], [other]) < 1e-6


@here
def test_frozen_weights_get_no_gradient():
    states, weight = torch.ones(3, 4, requires_grad=True), torch.ones(2, 4)
    Product.apply(states, weight, None).sum().backward()
    assert weight.grad is None
    assert states.grad is not None


@here
@pytest.mark.parametrize("layout", ["forest", "flat"])
def test_a_model_computes_the_same(layout: str):
    """Log-probabilities and all gradients, in both layouts."""
    results = {}
    for products in ("torch", "onednn"):
        choose_products(products)
        model = policy("llama-grouped")
        assert set_layout(model, layout) == layout
        assert set(patched(model)) == {products == "onednn"}
        sums, _ = read_log_probabilities(model, make_layout(layout, SEQUENCES), SPANS)  # type: ignore[arg-type]
        results[products] = [sums, *torch.autograd.grad(sums.sum(), list(model.parameters()))]
    assert relative_error(results["onednn"], results["torch"]) < 1e-6


@here
def test_other_precisions_are_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise AssertionError("oneDNN's product ran")

    choose_products("onednn")
    monkeypatch.setattr(Product, "apply", refuse)
    double = policy("llama", torch.float64)
    brain = policy("llama")
    for model in (double, brain):
        set_layout(model, "flat")
    layout = make_layout("flat", SEQUENCES)
    with torch.no_grad():
        assert read_log_probabilities(double, layout, SPANS)[0].dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            read_log_probabilities(brain, layout, SPANS)
        with pytest.raises(AssertionError, match="ran"):
            read_log_probabilities(brain, layout, SPANS)


@here
def test_the_choice_can_be_taken_back():
    model = scorer("llama")
    choose_products("onednn")
    set_layout(model, "flat")
    assert all(patched(model))
    choose_products("torch")
    set_layout(model, "flat")
    assert not any(patched(model))


def test_auto_follows_the_processor(monkeypatch: pytest.MonkeyPatch):
    for amd, reason, expected in ((True, None, "onednn"), (False, None, "torch"), (True, "lacks it", "torch")):
        monkeypatch.setattr(processor, "is_amd", lambda amd=amd: amd)
        monkeypatch.setattr(processor, "why_not_onednn", lambda reason=reason: reason)
        choose_products("auto")
        assert processor.chosen == expected
    with pytest.raises(UserError, match=r"engine\.products=onednn lacks it; use engine\.products=auto"):
        choose_products("onednn")


def test_memory_is_kept_without_a_word():
    keep_memory()
    assert torch.ones(1 << 20).sum() == 1 << 20
