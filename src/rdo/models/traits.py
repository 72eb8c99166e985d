"""What the rest must know of a model, or change in it: its head, its dropout."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from rdo.runtime import stopping
from rdo.runtime.errors import UserError
from rdo.sequences.forward import OWN_HEAD, OwnHead, forward_pass, hidden_states, input_embeddings
from rdo.sequences.kernels.varlen import HALF
from rdo.sequences.layout import Padded
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


def check_rows(model: transformers.PreTrainedModel, path: str | Path, causal: bool) -> None:
    """Raises UserError where a row's last hidden states depend on the padding behind it, or, in a language model
    (causal), on tokens that follow."""
    long = [token % len(input_embeddings(model)) for token in TRIAL[0]]
    rows = [long, long[: len(long) // 2]]
    with torch.no_grad():
        whole, part = (hidden_states(model, Padded([row])) for row in rows)
        padded = hidden_states(model, Padded(rows))

    # A wrong row shows in per cent; half precision rounds by a few, and may choose another expert.
    tolerance = 0.2 if model.dtype in HALF else 1e-3
    name = type(model).__name__
    if causal and not close(whole[: len(part)], part, tolerance):
        raise UserError(f"{path}: {name} lets tokens see those that follow: it is no causal language model")
    if not close(padded[: len(whole) + len(part)], torch.cat([whole, part]), tolerance):
        raise UserError(f"{path}: {name} lets the padding behind a row change it: not supported")


def choose_head(model: transformers.PreTrainedModel, path: str | Path) -> None:
    """Asks the model how its logits come from its last hidden states: by its output embeddings alone, or by its own
    code around them (see `OwnHead`). Raises UserError where they are no function of each token's last hidden state."""
    ids = [[token % len(input_embeddings(model)) for token in TRIAL[0]]]
    alone, own = model.get_output_embeddings(), OwnHead(model)
    with torch.no_grad():
        states = hidden_states(model, Padded(ids))
        wanted = forward_pass(model, model, Padded(ids), use_cache=False).logits[0]
        plain = makes(alone, states, wanted, 1e-4)
        # Turned round, so that tokens which see each other show.
        if makes(own, states.flip(0), wanted.flip(0), 1e-2 if model.dtype in HALF else 1e-4):
            large = 100 * states  # at which any cap shows
            setattr(model, OWN_HEAD, not makes(alone, large, own(large), 1e-4))
            return
    if plain:
        return
    name = type(model).__name__
    raise UserError(f"{path}: the logits of {name} are no function of its last hidden states: not supported")


def makes(head: Any, states: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> bool:
    """Whether a head makes these logits of these hidden states."""
    with suppress(Exception):  # whatever the code of an architecture that we do not know may raise
        return close(head(states), wanted, tolerance)
    return False


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by less than that share of the norm of what is wanted."""
    return float((found - wanted).float().norm()) <= tolerance * float(wanted.float().norm())
