"""oneDNN's matrix products are PyTorch's, to rounding, forward and backward, and only where they pay."""

from __future__ import annotations

import platform

import pytest
import torch
from torch.nn.functional import linear

from helpers import policy, random_tree, relative_error
from rdo.sequences import preparation
from rdo.sequences.forward import Reads, read
from rdo.sequences.preparation import set_layout
from rdo.sequences.readout import Span

HERE = platform.machine() == "x86_64" and torch.backends.mkldnn.is_available()
SEQUENCES = [ids for ids in random_tree(1, count=8) if len(ids) > 1]
READS = Reads(SEQUENCES, [Span(s, 1) for s in range(len(SEQUENCES))])


@pytest.fixture
def pays(monkeypatch: pytest.MonkeyPatch) -> None:
    if not HERE:
        pytest.skip("oneDNN needs an x86 processor and a PyTorch that has it")
    monkeypatch.setattr(preparation, "onednn_pays", lambda: True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("shape", [(7,), (1, 5), (2, 3, 4), (0, 3)])
def test_a_layer_and_its_gradients_are_as_before(pays: None, shape: tuple[int, ...], trained: bool, bias: bool):
    torch.manual_seed(0)
    layer = torch.nn.Linear(12, 9, bias=bias).requires_grad_(trained)
    preparation.prepare_products(layer)
    states = torch.randn(*shape, 12, requires_grad=True)
    inputs = [states, *(weight for weight in layer.parameters() if trained)]
    wanted, found = linear(states, layer.weight, layer.bias), layer(states)
    factor = torch.randn(wanted.shape)
    gradients = [torch.autograd.grad((factor * out).sum(), inputs) for out in (found, wanted)]
    for one, other in zip([found, *gradients[0]], [wanted, *gradients[1]], strict=True):
        assert one.shape == other.shape
        assert one.numel() == 0 or float((one - other).norm()) <= 1e-6 * float(other.norm())


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_a_model_computes_the_same(pays: None, layout: str, monkeypatch: pytest.MonkeyPatch):
    """Log-probabilities and all gradients, in both layouts; twice prepared is as once."""
    results = {}
    for products in ("onednn", "torch"):
        monkeypatch.setattr(preparation, "onednn_pays", lambda products=products: products == "onednn")
        model = policy("llama-grouped")
        assert set_layout(model, layout) == set_layout(model, layout) == layout
        sums = read(model, layout, READS)  # type: ignore[arg-type]
        results[products] = [sums, *torch.autograd.grad(sums.sum(), list(model.parameters()))]
    assert relative_error(results["onednn"], results["torch"]) < 1e-6


def test_other_precisions_are_left_to_torch(pays: None, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise AssertionError("oneDNN's product ran")

    monkeypatch.setattr(preparation, "product", refuse)
    double, single = policy("llama", torch.float64), policy("llama")
    for model in (double, single):
        preparation.prepare_products(model)
    with torch.no_grad():
        assert read(double, "padded", READS).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            read(single, "padded", READS)
        with pytest.raises(AssertionError, match="ran"):
            read(single, "padded", READS)
