"""Policies (causal language models) and scorers (a scalar head on a decoder or an encoder), in Hugging Face format."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rdo.attention import ATTENTION_NAME, AttentionPlan
from rdo.errors import UserError
from rdo.files import replace_folder
from rdo.forest import Flat, Forest, Layout, LayoutName
from rdo.model_files import check_folder, unloadable
from rdo.readout import Scalar, Span, combine, in_full_precision, scalar_values, span_log_probabilities
from rdo.schema import ModelConfig

# Settings by which some decoders change logits after the head; we read the head itself, so they would be lost.
LOGIT_CHANGES = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
# Three sequences of one length, so that no padding is needed: two share four tokens, two share eight.
TRIAL = [(*range(1, 17),), (*range(1, 5), *range(17, 29)), (*range(1, 5), *range(17, 21), *range(29, 37))]


def new_policy(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A Llama with random weights, from the sizes in the config; the seed fixes the weights."""
    torch.manual_seed(seed)
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_value_heads or config.heads,
        max_position_embeddings=config.max_positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return without_dropout(AutoModelForCausalLM.from_config(llama, dtype=torch_dtype(config.dtype)))


def load_policy(path: str | Path, config: ModelConfig) -> PreTrainedModel:
    """A causal language model from a folder or the hub, without dropout."""
    model = from_pretrained(AutoModelForCausalLM, path, config)
    for name, neutral in LOGIT_CHANGES.items():
        if getattr(model.config, name, neutral) not in (neutral, None):
            raise UserError(f"model.path={path}: its {name} changes the logits after the head: not supported")
    without_dropout(model)
    check_logits(model, path)
    return model


def load_tokenizer(path: str | Path, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name; UserError where there is none that can end a sequence."""
    check_folder(path, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=config.trust_remote_code, revision=revision(path, config)
        )
    except Exception as error:  # a damaged file may end in anything
        raise unloadable(path, "tokenizer", error) from error
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is None:
        raise UserError(
            f"the tokenizer of {path} has no end-of-sequence token, so no response could end: set eos_token in its "
            "tokenizer_config.json"
        )
    return tokenizer


def new_scorer(policy: str | Path, form: str, config: ModelConfig, seed: int) -> PreTrainedModel:
    """A scorer of the given form (see scorers.FORMS) on the backbone of a policy; its head starts at zero.

    The residual form reads two outputs of one head: 0 the pointwise reward, 1 the comparison.
    """
    torch.manual_seed(seed)
    model = from_pretrained(
        AutoModelForSequenceClassification, policy, config, new_head=True, num_labels=2 if form == "residual" else 1
    )
    with torch.no_grad():
        for parameter in head_parameters(model):
            parameter.zero_()
    model.config.rdo_form = form
    return without_dropout(model)


def load_scorer(path: str | Path, config: ModelConfig) -> PreTrainedModel:
    """A scorer that we saved, or any sequence classifier with one output (then: a pointwise reward model)."""
    model = from_pretrained(AutoModelForSequenceClassification, path, config)
    if not hasattr(model.config, "rdo_form"):
        if model.config.num_labels != 1:
            raise UserError(f"{path}: a reward model has one output, this one has {model.config.num_labels}")
        model.config.rdo_form = "pointwise"
    return without_dropout(model)


def from_pretrained(
    factory: Any, path: str | Path, config: ModelConfig, new_head: bool = False, **others: Any
) -> PreTrainedModel:
    """Loads weights, which must all be there (new_head: but for the head and what pools for it).

    No code from the hub runs unless the user says so, and none from a pickle ever does.
    """
    check_folder(path)
    try:
        model, loading = factory.from_pretrained(
            path,
            dtype=torch_dtype(config.dtype),
            trust_remote_code=config.trust_remote_code,
            revision=revision(path, config),
            weights_only=True,
            output_loading_info=True,
            **others,
        )
    except Exception as error:  # a damaged file may end in anything
        raise unloadable(path, "model", error) from error
    backbone = f"{model.base_model_prefix}."
    missing = [
        name
        for name in sorted(loading["missing_keys"])
        if not new_head or (name.startswith(backbone) and ".pooler." not in name)
    ]
    if missing:
        headless = set(missing) <= head_names(model)
        hint = "; a language model is no scorer yet: train one on it (rm.backbone or diffmodel.backbone)"
        raise UserError(
            f"{path} lacks weights of {type(model).__name__}: {', '.join(missing[:5])}{hint if headless else ''}"
        )
    return model


def revision(path: str | Path, config: ModelConfig) -> str:
    """model.revision belongs to model.path; any other folder or hub name is taken as it is."""
    return config.revision or "main" if str(path) == config.path and not os.path.isdir(path) else "main"


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes model and tokenizer in Hugging Face format (safetensors), all or nothing."""
    with replace_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Turns dropout off for good: it would put noise into every log-ratio."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name, value in list(vars(model.config).items()):
        if "dropout" in name and isinstance(value, float):
            setattr(model.config, name, 0.0)
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    return model.eval()


def is_decoder_scorer(model: PreTrainedModel) -> bool:
    """Whether the scorer's head sits on a causal decoder, so that it may be read at any position."""
    return isinstance(getattr(model, "score", None), torch.nn.Linear)


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


def why_not_forest(model: PreTrainedModel) -> str | None:
    """What keeps a model out of a forest, or None; leaves the model prepared for the layout that it can run.

    Declaring transformers' attention interface is not enough: models that do also mix tokens elsewhere (convolutions,
    linear attention), look both ways, or ask for soft caps and sinks. So the model itself is asked, on a tiny forest.
    """
    usual = model.get_correct_attn_implementation(None)
    model.set_attn_implementation(usual)
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not use transformers' attention interface"
    ids = [[token % len(input_embeddings(model)) for token in sequence] for sequence in TRIAL]
    forest, flat = Forest(ids), Flat(ids)
    try:
        with torch.no_grad():
            alone = in_full_precision(hidden_states(model, flat))
            model.set_attn_implementation(ATTENTION_NAME)
            together = in_full_precision(hidden_states(model, forest))[np.concatenate(forest.rows)]
    except Exception as error:  # whatever the code of an architecture that we do not know may raise
        model.set_attn_implementation(usual)
        return str(error) if isinstance(error, UserError) else f"{type(model).__name__} fails: {error}"
    # A wrong path shows in tens of per cent; half precision rounds by a few.
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2
    if not float((together - alone).norm()) <= tolerance * float(alone.norm()):
        model.set_attn_implementation(usual)
        return f"{type(model).__name__} lets tokens see more than their own path"
    return None


def set_layout(model: PreTrainedModel, wanted: str) -> LayoutName:
    """Decides by the one rule which layout a model runs in, prepares its attention, and returns the layout.

    auto: forest wherever the model can, else flat. Raises UserError where `forest` is demanded in vain.
    """
    if wanted == "flat":
        model.set_attn_implementation(model.get_correct_attn_implementation(None))
        return "flat"
    reason = why_not_forest(model)
    if reason is None:
        return "forest"
    if wanted == "forest":
        raise UserError(f"engine.layout=forest cannot run this model; use engine.layout=flat (or auto): {reason}")
    print(f"[layout] flat, because {reason}", flush=True)
    return "flat"


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
            input_ids=layout.ids[None].to(device),
            position_ids=layout.positions[None].to(device),
            use_cache=False,
            forest=AttentionPlan(layout, device),
        )
        return output.last_hidden_state[0]
    output = backbone(input_ids=layout.ids.to(device), attention_mask=layout.mask.to(device), use_cache=False)
    return output.last_hidden_state.flatten(0, 1)


def read_log_probabilities(
    model: PreTrainedModel, layout: Layout, spans: Sequence[Span]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probabilities [spans] and token counts [spans] under a causal language model."""
    return span_log_probabilities(hidden_states(model, layout), model.get_output_embeddings(), layout, spans)


def read_scalars(model: PreTrainedModel, layout: Layout, values: Sequence[Sequence[Scalar]]) -> torch.Tensor:
    """Values [values] of a scorer; an encoder pools by its own rule and is read once a sequence."""
    head = model.score if is_decoder_scorer(model) else None
    if isinstance(head, torch.nn.Linear):
        return scalar_values(hidden_states(model, layout), head, layout, values)
    if isinstance(layout, Forest):
        raise UserError(f"{type(model).__name__} cannot run in a forest; use engine.layout=flat")
    check_positions(model, max(map(len, layout.sequences)))
    check_ids(model, layout)
    outputs = model(input_ids=layout.ids.to(model.device), attention_mask=layout.mask.to(model.device)).logits
    rows = torch.tensor([read.sequence for value in values for read in value], device=model.device)
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


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of model.dtype."""
    known = {"float32", "bfloat16", "float16", "float64"}
    if name not in known:
        raise UserError(f"model.dtype={name}: must be one of {', '.join(sorted(known))}")
    return getattr(torch, name)
