"""What the rest must know of a model, or change in it: its head, its dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from rdo.runtime import stopping
from rdo.runtime.errors import UserError
from rdo.sequences.forward import input_embeddings
from rdo.sequences.preparation import TRIAL


def without_dropout(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Turns dropout off for good, in training mode too: it would put noise into every log-ratio."""
    for thing in (model.config, *model.modules()):
        for name, value in vars(thing).items():
            is_share = "drop" in name or (name == "p" and isinstance(thing, torch.nn.Dropout))
            if is_share and isinstance(value, float):
                setattr(thing, name, 0.0)
    return model.eval()


def recompute_activations(model: transformers.PreTrainedModel) -> None:
    """Gradient checkpointing: layers keep their inputs alone, and run once more in the backward pass.

    transformers does so in layers in training mode only, and these alone are put there; the model stays in evaluation
    mode otherwise (`eval()` takes all of it back). Raises ValueError where a model has no such layers.
    """
    # Before transformers 5.23 it had the second name, of which that warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # What it adds for frozen embeddings, only reentrant checkpointing needs: inputs that require gradients.
    model.disable_input_require_grads()
    for module in model.modules():
        if isinstance(module, transformers.GradientCheckpointingLayer):
            module.training = True


def stop_between_layers(model: torch.nn.Module) -> None:
    """Lets one process stop within a pass, between two layers, forward or backward: a micro-batch of a CPU may take
    minutes. The pass raises Stopped, and leaves gradients that are of no use."""
    for module in model.modules():
        is_layer = isinstance(module, transformers.GradientCheckpointingLayer)
        if is_layer and stop_after not in module._forward_hooks.values():
            module.register_forward_hook(stop_after)


def stop_after(module: torch.nn.Module, inputs: Any, output: Any) -> None:
    """The hook of a layer that was run."""
    stopping.check_alone()
    states = output[0] if isinstance(output, tuple) else output
    if states.requires_grad:
        states.register_hook(stopping.check_alone)


def head_parameters(model: transformers.PreTrainedModel) -> list[torch.nn.Parameter]:
    """Parameters of a scorer's head: those with their own learning rate."""
    names = head_names(model)
    return [parameter for name, parameter in model.named_parameters() if name in names]


def head_names(model: transformers.PreTrainedModel) -> set[str]:
    """Names of the scalar head's parameters: `score` on decoders, the last `classifier` layer on encoders."""
    names = {name for name, _ in model.named_parameters()}
    for head in ("score.", "classifier.out_proj.", "classifier."):
        found = {name for name in names if name.startswith(head)}
        if found:
            return found
    return set()


def beside_backbone(model: transformers.PreTrainedModel, name: str) -> bool:
    """Whether a weight is a head's, or one that pools for it: what a pre-trained backbone brings not."""
    return not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name


def check_logits(model: transformers.PreTrainedModel, path: str | Path) -> None:
    """Raises UserError where the model's logits are not what its output embeddings make of its last hidden states."""
    head = model.get_output_embeddings()
    ids = torch.tensor([[token % len(input_embeddings(model)) for token in TRIAL[0]]], device=model.device)
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
        ours = None if head is None or hidden is None else head(hidden)
    if ours is None or not float((ours - wanted).float().norm()) <= 1e-4 * float(wanted.float().norm()):
        raise UserError(f"model.path={path}: {type(model).__name__} changes its logits around the head: not supported")
