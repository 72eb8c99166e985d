"""Models in Hugging Face format: made from scratch, loaded (whole, or an adapter merged into its base), and saved."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers.utils import find_adapter_config_file

from rdo.models.lora import NOTES, adapter_base, is_adapter, merge_saved, read_notes, save_adapter
from rdo.models.padding import name_padding
from rdo.models.traits import beside_backbone, check_rows, choose_head, head_names, head_parameters, without_dropout
from rdo.runtime.errors import UserError
from rdo.runtime.files import replace_folder
from rdo.settings import ModelConfig

# Larger models are saved in several files.
LARGEST_FILE = "5GB"


def new_policy(
    config: ModelConfig, tokenizer: transformers.PreTrainedTokenizerBase, seed: int
) -> transformers.PreTrainedModel:
    """A Llama with random weights, from the sizes in the config; the seed fixes the weights."""
    torch.manual_seed(seed)
    llama = transformers.LlamaConfig(
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
    return without_dropout(transformers.AutoModelForCausalLM.from_config(llama, dtype=getattr(torch, config.dtype)))


def load_policy(path: str | Path, config: ModelConfig) -> transformers.PreTrainedModel:
    """A causal language model from a folder or the hub, without dropout."""
    model = from_pretrained(transformers.AutoModelForCausalLM, path, config)
    check_rows(without_dropout(model), path, causal=True)
    choose_head(model, path)
    return model


def load_tokenizer(path: str | Path, config: ModelConfig) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name (an adapter without one has its base's); UserError where there is
    none that can end a sequence."""
    at = revision(path, config)
    if is_adapter(Path(path)) and not any(Path(path).glob("tokenizer*")):
        path, at = adapter_base(Path(path)), "main"
    with loading("tokenizer", path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, trust_remote_code=config.trust_remote_code, revision=at
        )
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is None:
        raise UserError(
            f"the tokenizer of {path} has no end-of-sequence token, so no response could end: set eos_token in its "
            "tokenizer_config.json"
        )
    return tokenizer


def new_scorer(policy: str | Path, form: str, config: ModelConfig, seed: int) -> transformers.PreTrainedModel:
    """A scorer of the given form (see scorers.FORMS) on the backbone of a policy; its head starts at zero.

    The residual form reads two outputs of one head: 0 the pointwise reward, 1 the comparison.
    """
    torch.manual_seed(seed)
    model = from_pretrained(
        transformers.AutoModelForSequenceClassification,
        policy,
        config,
        new_head=True,
        num_labels=2 if form == "residual" else 1,
    )
    with torch.no_grad():
        for parameter in head_parameters(model):
            parameter.zero_()
    model.config.rdo_form = form
    check_rows(without_dropout(model), policy, causal=False)
    return model


def load_scorer(path: str | Path, config: ModelConfig) -> transformers.PreTrainedModel:
    """A scorer that we saved, or any sequence classifier with one output (then: a pointwise reward model)."""
    model = from_pretrained(transformers.AutoModelForSequenceClassification, path, config)
    if not hasattr(model.config, "rdo_form"):
        if model.config.num_labels != 1:
            raise UserError(f"{path}: a reward model has one output, this one has {model.config.num_labels}")
        model.config.rdo_form = "pointwise"
    check_rows(without_dropout(model), path, causal=False)
    return model


def from_pretrained(
    factory: Any, path: str | Path, config: ModelConfig, new_head: bool = False, **others: Any
) -> transformers.PreTrainedModel:
    """Loads a whole model, or an adapter merged into its base. All weights must be there (new_head: but for those of
    the head and what pools for it).

    No code from the hub runs unless the user says so, and none from a pickle ever does. Raises UserError, naming the
    path, for whatever cannot be loaded.
    """
    how = {"dtype": getattr(torch, config.dtype), "trust_remote_code": config.trust_remote_code, **others}
    with loading("model", path):
        model, missing = load_whole(factory, path, revision(path, config), **how)
    lacking = sorted(name for name in missing if not (new_head and beside_backbone(model, name)))
    if lacking:
        hint = "; a language model is no scorer yet: train one on it (rm.backbone or diffmodel.backbone)"
        hint = hint if set(lacking) <= head_names(model) else ""
        raise UserError(f"{path} lacks weights of {type(model).__name__}: {', '.join(lacking[:5])}{hint}")
    return model


def load_whole(factory: Any, path: str | Path, at: str, **how: Any) -> tuple[transformers.PreTrainedModel, set[str]]:
    """A model at a revision, or an adapter merged into its base, and the names of the weights that the files lack."""
    description = find_adapter_config_file(str(path), revision=at)
    if description is None:
        options = {"revision": at, "weights_only": True, "output_loading_info": True}
        model, loading = factory.from_pretrained(path, **options, **how)
        return model, set(loading["missing_keys"])
    if not os.path.isdir(path):
        path = snapshot_download(str(path), revision=at, allow_patterns=["adapter_*", NOTES])
    folder, form = Path(path), read_notes(Path(path)).get("form")
    if "config" not in how and factory is transformers.AutoModelForSequenceClassification:
        how = {"num_labels": 2 if form == "residual" else 1, **how}
    at = json.loads(Path(description).read_bytes()).get("revision") or "main"  # the base's
    model, lacking = merge_saved(*load_whole(factory, adapter_base(folder), at, **how), folder)
    model.name_or_path = str(path)
    if form is not None:
        model.config.rdo_form = form
    return model, lacking


@contextmanager
def loading(what: str, path: str | Path) -> Iterator[None]:
    """Turns whatever a library raises on loading into a UserError of one line, with the path."""
    try:
        yield
    except Exception as error:  # a damaged file may end in anything
        text = " ".join(str(error).split())[:300]
        if isinstance(error, pickle.UnpicklingError):  # whose own message tells how to run it all the same
            text = "a pickle of it is damaged or would run code, so it is not loaded; take the model as safetensors"
        elif "trust_remote_code" in str(error):
            text = "it brings code of its own; model.trust_remote_code=true runs it"
        raise UserError(f"no {what} can be loaded from {path}: {type(error).__name__}: {text}") from error


def revision(path: str | Path, config: ModelConfig) -> str:
    """model.revision belongs to model.path; any other folder or hub name is taken as it is."""
    return config.revision or "main" if str(path) == config.path and not os.path.isdir(path) else "main"


def save_model(
    model: Any,
    tokenizer: transformers.PreTrainedTokenizerBase,
    folder: Path,
    state: Mapping[str, torch.Tensor] | None = None,
    merge: bool = False,
) -> None:
    """Writes model and tokenizer in Hugging Face format (safetensors), all or nothing; what `choose_trained` returned
    of an adapted model, as an adapter in peft's. merge: merged into its base, and saved whole; as is an adapter whose
    base was merged from another, and lies nowhere.

    state: the weights, by the names of `state_dict`, where the model itself has them not (of an adapter those that are
    trained); the model takes them up, and they are saved in their own dtype.
    """
    own = model if isinstance(model, transformers.PreTrainedModel) else model.get_base_model()
    for name, weight in (*own.named_parameters(remove_duplicate=False), *own.named_buffers(remove_duplicate=False)):
        if state is not None and name in state:
            weight.data = state[name]
    tokenizer, said = name_padding(own, tokenizer, adapter=model is not own)
    with replace_folder(folder) as temporary:
        if model is own:
            model.save_pretrained(temporary, max_shard_size=LARGEST_FILE)
        else:
            save_adapter(model, temporary, folder)
        tokenizer.save_pretrained(temporary)
    if model is not own and (merge or is_adapter(Path(str(own.name_or_path)))):
        # Read back, for under ZeRO-3 each process has a part of the base alone.
        how = {"config": copy.deepcopy(own.config), "dtype": own.dtype}
        save_model(load_whole(type(own), folder, "main", **how)[0], tokenizer, folder)
    elif said:
        print(f"[saved] {folder}: {said}", flush=True)
