"""Gradient checkpointing: layers do run again going backward, and loss and gradients are those without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from helpers import policy, random_tree, relative_error, scorer, tokenizer
from rdo.models.lora import choose_trained
from rdo.models.pretrained import load_policy, new_scorer, save_model
from rdo.models.traits import recompute_activations, without_dropout
from rdo.sequences.forward import Reads, read
from rdo.sequences.preparation import set_layout
from rdo.sequences.readout import Scalar, Span
from rdo.settings import LoraConfig, ModelConfig

SEQUENCES = [ids for ids in random_tree(4, count=6, longest=24) if len(ids) > 1]
CONFIG = ModelConfig(lora=LoraConfig(rank=8))


def adapted(folder: Path, made: PreTrainedModel, of_scorer: bool) -> PreTrainedModel:
    """The model as a base with an adapter that is no longer zero."""
    save_model(made, tokenizer(), folder)
    model = new_scorer(folder, "paper", CONFIG, 0) if of_scorer else load_policy(folder, CONFIG)
    choose_trained(model, CONFIG, seed=0)
    for number, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.1, generator=torch.Generator().manual_seed(number))
    return model


def measured(model: PreTrainedModel, layout: str) -> tuple[float, list[torch.Tensor], list[int]]:
    """Loss, gradients of all that is trained, and how often each layer ran going forward and then in all."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    runs = [0] * len(layers)
    # What runs within a layer counts: transformers runs the layer's own forward again, around which no hook is.
    inner = [
        next(
            module
            for module in layer.modules()
            if isinstance(module, torch.nn.LayerNorm | torch.nn.Linear)
            or type(module).__name__.endswith(("RMSNorm", "Conv1D"))
        )
        for layer in layers
    ]

    def count(number: int) -> Callable:
        def hook(*_: object) -> None:
            runs[number] += 1

        return hook

    handles = [module.register_forward_hook(count(number)) for number, module in enumerate(inner)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    reads = Reads(SEQUENCES, [Span(s, 1) for s in range(len(SEQUENCES))])
    if hasattr(model.config, "rdo_form"):
        reads = Reads(SEQUENCES, scalars=[[Scalar(s, len(ids) - 1)] for s, ids in enumerate(SEQUENCES)])
    values = read(model, layout, reads)  # type: ignore[arg-type]
    loss = (torch.linspace(-1.0, 1.5, len(values)) * values).sum()
    forward = list(runs)
    gradients = list(torch.autograd.grad(loss, trained))
    for handle in handles:
        handle.remove()
    assert len(set(forward)) == len(set(runs)) == 1
    return float(loss), gradients, [forward[0], runs[0]]


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("name", ["llama-grouped", "gpt2", "mistral-window", "qwen2", "gemma3", "scorer", "bert"])
def test_layers_run_again_and_nothing_else_changes(tmp_path: Path, name: str, layout: str, lora: bool):
    if name == "bert" and layout == "tree":
        pytest.skip("an encoder runs padded")
    of_scorer = name in ("scorer", "bert")
    model = scorer("llama" if name == "scorer" else name) if of_scorer else policy(name)
    if lora:
        model = adapted(tmp_path / "base", policy() if name == "scorer" else model, of_scorer)
    assert set_layout(model, layout) == layout
    loss, gradients, (once, in_all) = measured(model, layout)
    assert in_all == once
    recompute_activations(model)
    again, found, (going_forward, in_all) = measured(model, layout)
    assert (going_forward, in_all) == (once, 2 * once)
    assert again == pytest.approx(loss, rel=1e-6)
    assert relative_error(found, gradients) < 1e-6
    assert any(gradient.norm() > 0 for gradient in found)
    with torch.no_grad():
        set_layout(model, layout)  # asks the model itself, without gradients
    model.eval()
    assert measured(model, layout)[2] == [once, once]


def test_frozen_embeddings_get_no_gradients_of_their_own(tmp_path: Path):
    """transformers would make the first layer's input require gradients, which costs and serves nothing."""
    model = adapted(tmp_path / "base", policy(), False)
    recompute_activations(model)
    assert not model.get_input_embeddings()(torch.tensor([[3]])).requires_grad


def test_dropout_stays_off_in_layers_that_run_again():
    """A layer in training mode whose dropout is a number, not a module."""
    config = OPTConfig(
        vocab_size=300, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, dropout=0.5,
        attention_dropout=0.5, layerdrop=0.5, max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    model = without_dropout(AutoModelForCausalLM.from_config(config))
    set_layout(model, "padded")
    loss, gradients, _ = measured(model, "padded")
    recompute_activations(model)
    again, found, _ = measured(model, "padded")
    assert again == pytest.approx(loss, rel=1e-6)
    assert relative_error(found, gradients) < 1e-6
