"""Which layout and which kernel a model runs in: decided by one rule, and tried on the model itself."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from rdo.runtime.errors import UserError
from rdo.sequences.attention import attention_name, choose_kernel, kernel_of
from rdo.sequences.forward import hidden_states, input_embeddings
from rdo.sequences.kernels.varlen import HALF
from rdo.sequences.layout import LayoutName, Padded, PrefixTree
from rdo.sequences.processor import prepare_products
from rdo.sequences.readout import in_full_precision

# Three sequences of one length, so that no padding is needed: two share four tokens, two share eight.
TRIAL = [(*range(1, 17),), (*range(1, 5), *range(17, 29)), (*range(1, 5), *range(17, 21), *range(29, 37))]


def set_layout(
    model: PreTrainedModel, wanted: str, attention: str = "auto", precision: torch.dtype | None = None
) -> LayoutName:
    """Decides by the one rule which layout a model runs in, prepares its attention (on a CPU also its products),
    and returns the layout.

    auto: tree wherever the model can, else padded. attention: engine.attention, the kernel of a tree. precision: what
    the model will compute in where that is half precision, be it under autocast; else it is the weights' dtype. Raises
    UserError where `tree`, or a kernel, is demanded in vain.
    """
    prepare_products(model)
    if wanted == "padded":
        model.set_attn_implementation(model.get_correct_attn_implementation(None))
        return "padded"
    dtype = precision if precision in HALF else model.dtype
    reason = why_not_tree(model, "gathered", dtype)
    if reason is None:
        set_kernel(model, attention, dtype)
        return "tree"
    if wanted == "tree":
        raise UserError(f"engine.layout=tree cannot run this model; use engine.layout=padded (or auto): {reason}")
    print(f"[layout] padded, because {reason}", flush=True)
    return "padded"


def why_not_tree(model: PreTrainedModel, kernel: str, dtype: torch.dtype) -> str | None:
    """What keeps a model out of a tree under a kernel, or None; leaves it prepared for the layout that it can run.

    Declaring transformers' attention interface is not enough: models that do also mix tokens elsewhere (convolutions,
    linear attention), look both ways, or ask for soft caps and sinks. So the model itself is asked, on a tiny tree,
    computing in `dtype` as it will.
    """
    usual = model.get_correct_attn_implementation(None)
    model.set_attn_implementation(usual)
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not use transformers' attention interface"
    ids = [[token % len(input_embeddings(model)) for token in sequence] for sequence in TRIAL]
    tree, flat = PrefixTree(ids), Padded(ids)
    try:
        with torch.no_grad(), computing_in(dtype, model):
            alone = in_full_precision(hidden_states(model, flat))
            model.set_attn_implementation(attention_name(kernel))
            together = in_full_precision(hidden_states(model, tree))[np.concatenate(tree.rows)]
    except Exception as error:  # whatever the code of an architecture that we do not know may raise
        model.set_attn_implementation(usual)
        return str(error) if isinstance(error, UserError) else f"{type(model).__name__} fails: {error}"
    # A wrong path shows in tens of per cent; half precision rounds by a few.
    tolerance = 5e-2 if dtype in HALF else 1e-3
    if not float((together - alone).norm()) <= tolerance * float(alone.norm()):
        model.set_attn_implementation(usual)
        return f"{type(model).__name__} lets tokens see more than their own path"
    return None


def set_kernel(model: PreTrainedModel, attention: str, dtype: torch.dtype) -> None:
    """Prepares a model that runs in a tree for the kernel of engine.attention; UserError where it cannot run that."""
    kernel = choose_kernel(attention, model.device, dtype, head_width(model))
    if kernel == "gathered":
        return
    reason = why_not_tree(model, kernel, dtype)
    if reason is None:
        return
    if attention != "auto":
        raise UserError(f"engine.attention={kernel} cannot run this model; use engine.attention=auto: {reason}")
    print(f"[layout] engine.attention=gathered, because of {kernel}: {reason}", flush=True)
    model.set_attn_implementation(attention_name("gathered"))


def described_layout(model: PreTrainedModel, layout: LayoutName) -> str:
    """A layout as a person reads it: on a GPU with the kernel of a tree."""
    kernel = kernel_of(model.config._attn_implementation or "")
    return f"{layout} ({kernel})" if kernel is not None and model.device.type == "cuda" else layout


def head_width(model: PreTrainedModel) -> int:
    """The width of an attention head, as the config has it."""
    config = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def computing_in(dtype: torch.dtype, model: PreTrainedModel) -> AbstractContextManager[Any]:
    """Autocast, where a model is to compute in another dtype than its weights are in."""
    return nullcontext() if dtype == model.dtype else torch.autocast(model.device.type, dtype)
