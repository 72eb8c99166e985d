"""A micro-batch through a model: layouts, hidden states, and what is read off policies and scorers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from rdo.attention import attention_name, choose_kernel, kernel_of, make_plan
from rdo.cuda_attention import HALF
from rdo.devices import to_device
from rdo.errors import UserError
from rdo.forest import Flat, Forest, Layout, LayoutName
from rdo.processor import prepare_products
from rdo.readout import Scalar, Span, combine, in_full_precision, scalar_values, span_log_probabilities

# Three sequences of one length, so that no padding is needed: two share four tokens, two share eight.
TRIAL = [(*range(1, 17),), (*range(1, 5), *range(17, 29)), (*range(1, 5), *range(17, 21), *range(29, 37))]


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Turns dropout off for good, in training mode too: it would put noise into every log-ratio."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    for name, value in list(vars(model.config).items()):
        if "drop" in name and isinstance(value, float):
            setattr(model.config, name, 0.0)
    return model.eval()


def recompute_activations(model: PreTrainedModel) -> None:
    """Gradient checkpointing: layers keep their inputs alone, and run once more in the backward pass.

    transformers does so in layers in training mode only, and these alone are put there; the model stays in evaluation
    mode otherwise (`eval()` takes all of it back). Raises UserError where a model has no such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not model.supports_gradient_checkpointing:
        raise UserError(
            f"engine.gradient_checkpointing=true: {type(model).__name__} has no layers that can be run again; leave it "
            "out, and lower engine.tokens_per_micro_batch"
        )
    # Before transformers 5.23 it had the second name, of which that warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # What it adds for frozen embeddings, only reentrant checkpointing needs: inputs that require gradients.
    model.disable_input_require_grads()
    for layer in layers:
        layer.training = True


def decoder_head(model: PreTrainedModel) -> torch.nn.Linear | None:
    """A scorer's head where it sits on a causal decoder, so that it may be read at any position; else None."""
    head: Any = getattr(model, "score", None)
    if hasattr(head, "modules_to_save"):  # peft's wrapper of what is trained whole beside an adapter
        head = head.modules_to_save["default"]
    return head if isinstance(head, torch.nn.Linear) else None


def is_decoder_scorer(model: PreTrainedModel) -> bool:
    """Whether a scorer's head sits on a causal decoder."""
    return decoder_head(model) is not None


def head_parameters(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Parameters of a scorer's head: those with their own learning rate."""
    names = head_names(model)
    return [parameter for name, parameter in model.named_parameters() if name in names]


def head_names(model: PreTrainedModel) -> set[str]:
    """Names of the scalar head's parameters: `score` on decoders, the last `classifier` layer on encoders."""
    names = {name for name, _ in model.named_parameters()}
    for head in ("score.", "classifier.out_proj.", "classifier."):
        found = {name for name in names if name.startswith(head)}
        if found:
            return found
    return set()


def beside_backbone(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight is a head's, or one that pools for it: what a pre-trained backbone brings not."""
    return not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name


def why_not_forest(model: PreTrainedModel, kernel: str, dtype: torch.dtype) -> str | None:
    """What keeps a model out of a forest under a kernel, or None; leaves it prepared for the layout that it can run.

    Declaring transformers' attention interface is not enough: models that do also mix tokens elsewhere (convolutions,
    linear attention), look both ways, or ask for soft caps and sinks. So the model itself is asked, on a tiny forest,
    computing in `dtype` as it will.
    """
    usual = model.get_correct_attn_implementation(None)
    model.set_attn_implementation(usual)
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not use transformers' attention interface"
    ids = [[token % len(input_embeddings(model)) for token in sequence] for sequence in TRIAL]
    forest, flat = Forest(ids), Flat(ids)
    try:
        with torch.no_grad(), computing_in(dtype, model):
            alone = in_full_precision(hidden_states(model, flat))
            model.set_attn_implementation(attention_name(kernel))
            together = in_full_precision(hidden_states(model, forest))[np.concatenate(forest.rows)]
    except Exception as error:  # whatever the code of an architecture that we do not know may raise
        model.set_attn_implementation(usual)
        return str(error) if isinstance(error, UserError) else f"{type(model).__name__} fails: {error}"
    # A wrong path shows in tens of per cent; half precision rounds by a few.
    tolerance = 5e-2 if dtype in HALF else 1e-3
    if not float((together - alone).norm()) <= tolerance * float(alone.norm()):
        model.set_attn_implementation(usual)
        return f"{type(model).__name__} lets tokens see more than their own path"
    return None


def computing_in(dtype: torch.dtype, model: PreTrainedModel) -> AbstractContextManager[Any]:
    """Autocast, where a model is to compute in another dtype than its weights are in."""
    return nullcontext() if dtype == model.dtype else torch.autocast(model.device.type, dtype)


def set_layout(
    model: PreTrainedModel, wanted: str, attention: str = "auto", precision: torch.dtype | None = None
) -> LayoutName:
    """Decides by the one rule which layout a model runs in, prepares its attention (on a CPU also its products),
    and returns the layout.

    auto: forest wherever the model can, else flat. attention: engine.attention, the kernel of a forest. precision: what
    the model will compute in where that is half precision, be it under autocast; else it is the weights' dtype. Raises
    UserError where `forest`, or a kernel, is demanded in vain.
    """
    prepare_products(model)
    if wanted == "flat":
        model.set_attn_implementation(model.get_correct_attn_implementation(None))
        return "flat"
    dtype = precision if precision in HALF else model.dtype
    reason = why_not_forest(model, "rectangles", dtype)
    if reason is None:
        set_kernel(model, attention, dtype)
        return "forest"
    if wanted == "forest":
        raise UserError(f"engine.layout=forest cannot run this model; use engine.layout=flat (or auto): {reason}")
    print(f"[layout] flat, because {reason}", flush=True)
    return "flat"


def set_kernel(model: PreTrainedModel, attention: str, dtype: torch.dtype) -> None:
    """Prepares a model that runs in a forest for the kernel of engine.attention; UserError where it cannot run that."""
    kernel = choose_kernel(attention, model.device, dtype, head_width(model))
    if kernel == "rectangles":
        return
    reason = why_not_forest(model, kernel, dtype)
    if reason is None:
        return
    if attention != "auto":
        raise UserError(f"engine.attention={kernel} cannot run this model; use engine.attention=auto: {reason}")
    print(f"[layout] engine.attention=rectangles, because of {kernel}: {reason}", flush=True)
    model.set_attn_implementation(attention_name("rectangles"))


def head_width(model: PreTrainedModel) -> int:
    """The width of an attention head, as the config has it."""
    config = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def described_layout(model: PreTrainedModel, layout: LayoutName) -> str:
    """A layout as a person reads it: on a GPU with the kernel of a forest."""
    kernel = kernel_of(model.config._attn_implementation or "")
    return f"{layout} ({kernel})" if kernel is not None and model.device.type == "cuda" else layout


def check_positions(model: PreTrainedModel, longest: int, remedy: str = "lower dataset.max_length") -> None:
    """Raises UserError where a sequence has more tokens than the model has positions for."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise UserError(
            f"a sequence of {longest} tokens, but {type(model).__name__} takes {positions}; {remedy} (the difference "
            "model reads the query and both responses, up to twice dataset.max_length)"
        )


def hidden_states(model: PreTrainedModel, layout: Layout) -> torch.Tensor:
    """Last hidden states of a micro-batch, [rows, width], in the order that `layout.index` speaks of."""
    backbone = model.base_model
    check_positions(model, max(map(len, layout.sequences)))
    check_ids(model, layout)
    device = model.device
    if isinstance(layout, Forest):
        output = backbone(
            input_ids=to_device(layout.ids[None], device),
            position_ids=to_device(layout.positions[None], device),
            use_cache=False,
            forest=make_plan(model.config._attn_implementation or "", layout, device),
        )
        return output.last_hidden_state[0]
    ids, mask = to_device(layout.ids, device), to_device(layout.mask, device)
    output = backbone(input_ids=ids, attention_mask=mask, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)


def read_log_probabilities(
    model: PreTrainedModel, layout: Layout, spans: Sequence[Span]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probabilities [spans] and token counts [spans] under a causal language model."""
    return span_log_probabilities(hidden_states(model, layout), model.get_output_embeddings(), layout, spans)


def read_scalars(model: PreTrainedModel, layout: Layout, values: Sequence[Sequence[Scalar]]) -> torch.Tensor:
    """Values [values] of a scorer; an encoder pools by its own rule and is read once a sequence."""
    head = decoder_head(model)
    if head is not None:
        return scalar_values(hidden_states(model, layout), head, layout, values)
    if isinstance(layout, Forest):
        raise UserError(f"{type(model).__name__} cannot run in a forest; use engine.layout=flat")
    check_positions(model, max(map(len, layout.sequences)))
    check_ids(model, layout)
    ids, mask = to_device(layout.ids, model.device), to_device(layout.mask, model.device)
    outputs = model(input_ids=ids, attention_mask=mask).logits
    rows = to_device(np.array([read.sequence for value in values for read in value]), model.device)
    return combine(in_full_precision(outputs[rows]), values)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Raises UserError where the tokenizer knows ids that the model has no embedding for."""
    rows = len(input_embeddings(model))
    if len(tokenizer) > rows:
        raise UserError(f"{path}: the tokenizer has {len(tokenizer)} ids, the model only {rows} embeddings")


def check_ids(model: PreTrainedModel, layout: Layout) -> None:
    """Raises UserError for an id that the model has no embedding for, which would end in an index out of range."""
    rows, largest = len(input_embeddings(model)), int(layout.ids.max())
    if largest >= rows:
        raise UserError(
            f"the token id {largest}, but {model.name_or_path or type(model).__name__} has {rows} embeddings only: its "
            "tokenizer belongs to another model"
        )


def check_logits(model: PreTrainedModel, path: str | Path) -> None:
    """Raises UserError where the model's logits are not what its output embeddings make of its last hidden states."""
    head = model.get_output_embeddings()
    ids = torch.tensor([[token % len(input_embeddings(model)) for token in TRIAL[0]]], device=model.device)
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
        ours = None if head is None or hidden is None else head(hidden)
    if ours is None or not float((ours - wanted).float().norm()) <= 1e-4 * float(wanted.float().norm()):
        raise UserError(f"model.path={path}: {type(model).__name__} changes its logits around the head: not supported")


def input_embeddings(model: PreTrainedModel) -> torch.Tensor:
    """The matrix [ids, width] that token ids are looked up in."""
    return model.get_input_embeddings().get_parameter("weight")
