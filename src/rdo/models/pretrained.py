"""Models in Hugging Face format: made from scratch, loaded (whole, or an adapter merged into its base), and saved."""

from __future__ import annotations

import copy
import json
import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from rdo.models.lora import NOTES, adapter_base, is_adapter, merge_saved, read_notes, save_adapter
from rdo.models.traits import beside_backbone, check_logits, head_names, head_parameters, without_dropout
from rdo.runtime.errors import UserError
from rdo.runtime.files import replace_folder
from rdo.settings import ModelConfig

# Settings by which some decoders change logits after the head; we read the head itself, so they would be lost.
LOGIT_CHANGES = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
# Larger models are saved in several files.
LARGEST_FILE = "5GB"


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
    return without_dropout(AutoModelForCausalLM.from_config(llama, dtype=getattr(torch, config.dtype)))


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
    """The tokenizer of a model folder or hub name (an adapter without one has its base's); UserError where there is
    none that can end a sequence."""
    at = revision(path, config)
    if is_adapter(Path(path)) and not any(Path(path).glob("tokenizer*")):
        path, at = adapter_base(Path(path)), "main"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code, revision=at)
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
    """Loads a whole model, or an adapter merged into its base. All weights must be there (new_head: but for those of
    the head and what pools for it).

    No code from the hub runs unless the user says so, and none from a pickle ever does. Raises UserError, naming the
    path, for whatever cannot be loaded.
    """
    how = {"dtype": getattr(torch, config.dtype), "trust_remote_code": config.trust_remote_code, **others}
    try:
        model, missing = load_whole(factory, path, revision(path, config), **how)
    except Exception as error:  # a damaged file may end in anything
        raise unloadable(path, "model", error) from error
    lacking = sorted(name for name in missing if not (new_head and beside_backbone(model, name)))
    if lacking:
        hint = "; a language model is no scorer yet: train one on it (rm.backbone or diffmodel.backbone)"
        hint = hint if set(lacking) <= head_names(model) else ""
        raise UserError(f"{path} lacks weights of {type(model).__name__}: {', '.join(lacking[:5])}{hint}")
    return model


def load_whole(factory: Any, path: str | Path, at: str, **how: Any) -> tuple[PreTrainedModel, set[str]]:
    """A model at a revision, or an adapter merged into its base, and the names of the weights that the files lack."""
    if not os.path.isdir(path) and (str(path).startswith((".", "/", "~")) or str(path).count("/") > 1):
        raise FileNotFoundError(f"there is no folder {path}")  # the hub would be asked for it
    description = find_adapter_config_file(str(path), revision=at)
    if description is None:
        options = {"revision": at, "weights_only": True, "output_loading_info": True}
        model, loading = factory.from_pretrained(path, **options, **how)
        return model, set(loading["missing_keys"])
    if not os.path.isdir(path):
        path = snapshot_download(str(path), revision=at, allow_patterns=["adapter_*", NOTES])
    folder, form = Path(path), read_notes(Path(path)).get("form")
    if "config" not in how and factory is AutoModelForSequenceClassification:
        how = {"num_labels": 2 if form == "residual" else 1, **how}
    at = json.loads(Path(description).read_bytes()).get("revision") or "main"  # the base's
    model, lacking = merge_saved(*load_whole(factory, adapter_base(folder), at, **how), folder)
    model.name_or_path = str(path)
    if form is not None:
        model.config.rdo_form = form
    return model, lacking


def unloadable(path: str | Path, what: str, error: Exception) -> UserError:
    """What a library's error on loading a model or tokenizer says, in one line with the path."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, pickle.UnpicklingError):  # whose own message tells how to run it all the same
        text = "a pickle of it is damaged or would run code, so it is not loaded; take the model as safetensors"
    elif "trust_remote_code" in str(error):
        text = "it brings code of its own; model.trust_remote_code=true runs it"
    return UserError(f"no {what} can be loaded from {path}: {type(error).__name__}: {text}")


def revision(path: str | Path, config: ModelConfig) -> str:
    """model.revision belongs to model.path; any other folder or hub name is taken as it is."""
    return config.revision or "main" if str(path) == config.path and not os.path.isdir(path) else "main"


def save_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state: Mapping[str, torch.Tensor] | None = None,
    merge: bool = False,
) -> None:
    """Writes model and tokenizer in Hugging Face format (safetensors), all or nothing; what `choose_trained` returned
    of an adapted model, as an adapter in peft's. merge: merged into its base, and saved whole; as is an adapter whose
    base was merged from another, and lies nowhere.

    state: the weights, by the names of `state_dict`, where the model itself has them not (of an adapter those that are
    trained); they are saved in their own dtype.
    """
    with replace_folder(folder) as temporary:
        if isinstance(model, PreTrainedModel):
            save_whole(model if state is None else with_weights(model, state), temporary)
        elif merge or is_adapter(Path(model.get_base_model().name_or_path)):
            with tempfile.TemporaryDirectory(dir=temporary) as part:
                save_adapter(model, state, Path(part), Path(part))
                whole = merged(model, Path(part))
            save_whole(whole, temporary)
        else:
            save_adapter(model, state, temporary, folder)
        tokenizer.save_pretrained(temporary)


def save_whole(model: PreTrainedModel, folder: Path) -> None:
    """All weights of a model, large ones in several files."""
    model.save_pretrained(folder, max_shard_size=LARGEST_FILE)


def with_weights(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A model like this one with other weights, which are not copied."""
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
    twin.load_state_dict(dict(state), assign=True)
    twin.tie_weights()
    if twin.can_generate():
        twin.generation_config = model.generation_config
    # By which names some architectures' weights go in files, as they were loaded.
    twin._weight_conversions = getattr(model, "_weight_conversions", None)  # type: ignore[assignment]
    return twin


def merged(adapted: Any, adapter: Path) -> PreTrainedModel:
    """What a peft.PeftModel started from, from its files, with its saved adapter merged in. (Under ZeRO-3 the weights
    themselves are divided.)"""
    model, described = adapted.get_base_model(), adapted.peft_config["default"]
    how = {"config": copy.deepcopy(model.config), "dtype": model.dtype}
    return merge_saved(*load_whole(type(model), model.name_or_path, described.revision or "main", **how), adapter)[0]
