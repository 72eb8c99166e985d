"""LoRA (Hu et al. 2021) by peft: small trained matrices beside frozen weights. peft is imported only where one is.

An adapter goes into the model in place, so that whatever computes with the model sees the same class, backbone and
heads. What starts from a saved adapter starts from its base with the adapter merged in (see pretrained.py).
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from rdo.models.traits import beside_backbone
from rdo.runtime.errors import UserError
from rdo.runtime.files import write_json
from rdo.settings import Config, ModelConfig

CONFIG = "adapter_config.json"
# What peft's format has no place for: a scorer's form, and where the base lies from here, for folders that move.
NOTES = "rdo.json"
PREFIX = "base_model.model."  # what peft puts before the names of a model's weights


def is_adapter(folder: Path) -> bool:
    """Whether a local folder holds an adapter."""
    return (folder / CONFIG).is_file()


def read_notes(folder: Path) -> dict[str, Any]:
    """Our own notes of an adapter; none where someone else saved it."""
    return json.loads((folder / NOTES).read_bytes()) if (folder / NOTES).is_file() else {}


def adapter_base(folder: Path) -> str:
    """The model that an adapter belongs to: where it was when the adapter was saved, else where it lies from here."""
    base = str(json.loads((folder / CONFIG).read_bytes())["base_model_name_or_path"])
    nearby = read_notes(folder).get("base")
    return os.path.normpath(folder / nearby) if nearby and not os.path.isdir(base) else base


def lora_settings(config: ModelConfig) -> dict[str, Any]:
    """What of model.lora determines a trained stage's result; nothing where it is off."""
    return {} if config.lora.rank is None else {"lora": asdict(config.lora)}


def check_trained(config: Config) -> None:
    """Raises UserError where weights in half precision would be trained, or stay frozen beside an adapter in a way that
    no engine can compute."""
    model, engine = config.model, config.engine
    if model.dtype in ("float32", "float64"):
        return
    frozen = model.dtype == "bfloat16" and model.lora.rank is not None
    if not frozen or engine.name != "torch" or engine.precision not in ("bfloat16", "auto"):
        # An update below 1/256 of a weight is lost in bfloat16, and at 1e-6 nearly all are.
        raise UserError(
            f"model.dtype={model.dtype}: what is trained is trained in float32; set model.dtype=float32 (with "
            "engine.precision=bfloat16 to compute in half precision), or freeze it in bfloat16 under an adapter: "
            "model.lora.rank=8 engine=torch engine.precision=bfloat16"
        )


def choose_trained(model: transformers.PreTrainedModel, config: ModelConfig, seed: int) -> Any:
    """Decides by model.lora which weights are trained: all, or a new adapter's, and of a scorer also its head's.

    Returns what is to be saved of it: the model, or the peft.PeftModel around it. The seed fixes a new adapter, which
    changes no output until it is trained. Raises what peft does of target_modules that the model lacks.
    """
    lora = config.lora
    if lora.rank is None:
        model.requires_grad_(True)
        return model
    from peft import LoraConfig, get_peft_model

    own = own_modules(model)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # any number
        lora_dropout=0.0,
        target_modules="all-linear" if lora.target_modules == ["all-linear"] else list(lora.target_modules),
        modules_to_save=own or None,
        task_type="SEQ_CLS" if own else "CAUSAL_LM",
        revision=config.revision if model.name_or_path == config.path else None,
    )
    if is_adapter(Path(str(model.name_or_path))):
        print("[lora] it starts from an adapter, merged into its base: so the whole model will be saved", flush=True)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, settings)
    settings.target_modules = sorted(settings.target_modules or ())  # a set's order is another in every process
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))  # a head beside a half base
    trained, total = adapted.get_nb_trainable_parameters()
    print(f"[lora] {trained} of {total} parameters are trained", flush=True)
    return adapted


def own_modules(model: transformers.PreTrainedModel) -> list[str]:
    """What of a scorer its base lacks (head and pooler), and is trained whole; nothing of a policy."""
    if not hasattr(model.config, "rdo_form"):
        return []
    own = [name for name, _ in model.named_parameters() if beside_backbone(model, name)]
    return sorted({"pooler" if ".pooler." in name else name.split(".")[0] for name in own})


def trained_state(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's state without what is frozen, by the names of `state_dict`: all of it where nothing is."""
    frozen = {name for name, weight in model.named_parameters(remove_duplicate=False) if not weight.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def save_adapter(adapted: Any, folder: Path, final: Path) -> None:
    """Writes the adapter of a peft.PeftModel, in peft's format, into a folder that will be `final`."""
    base, described = adapted.get_base_model(), adapted.peft_config["default"]
    notes = {}
    if os.path.isdir(described.base_model_name_or_path):
        described.base_model_name_or_path = os.path.abspath(described.base_model_name_or_path)
        notes["base"] = os.path.relpath(described.base_model_name_or_path, final.absolute())
    if hasattr(base.config, "rdo_form"):
        notes["form"] = base.config.rdo_form
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()  # a form to be filled in
    write_json(folder / NOTES, notes)


def merge_saved(
    base: transformers.PreTrainedModel, lacking: set[str], folder: Path
) -> tuple[transformers.PreTrainedModel, set[str]]:
    """A base with a saved adapter merged into it, and which of the weights that the base lacks the adapter lacks, too.

    Raises what peft raises on damaged files, and on weights that do not fit; a pickle among them runs no code.
    """
    from peft import PeftConfig, PeftModel
    from peft.utils import load_peft_weights

    settings = PeftConfig.from_pretrained(str(folder))
    settings.task_type = None  # a scorer may start from a policy's
    weights = load_peft_weights(str(folder), device="cpu")
    fit_embeddings(base, weights)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")  # else they would start anew
        model = PeftModel.from_pretrained(base, str(folder), config=settings, torch_device="cpu").merge_and_unload()
    brought = {name.removeprefix(PREFIX) for name in weights}
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(model.config, "tie_word_embeddings", False) and head is not None:  # it may have replaced one of the two
        model.config.tie_word_embeddings = head.weight is embeddings.weight
    return model.requires_grad_(False), lacking - brought


def fit_embeddings(base: transformers.PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Gives a base as many embeddings as an adapter's weights have, where tokens were added before it was trained; and
    a head of its own, where its embeddings are adapted and are the head, too: merging would change both.

    Raises ValueError where the adapter does not bring all that has other rows.
    """
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    names = {id(module): name for name, module in base.named_modules()}
    adapted = weights.get(f"{PREFIX}{names[id(embeddings)]}.lora_embedding_A")  # [rank, ids]

    def whole(module: Any) -> torch.Tensor | None:
        own = PREFIX + names[id(module)]
        return weights.get(f"{own}.weight", weights.get(f"{own}.base_layer.weight"))

    found = whole(embeddings)
    rows = found.shape[0] if found is not None else adapted.shape[1] if adapted is not None else None
    tied = head is not None and head.weight is embeddings.weight
    if rows not in (None, base.config.get_text_config().vocab_size):
        lost = [names[id(m)] for m in (embeddings, None if tied else head) if m is not None and whole(m) is None]
        if lost:
            raise ValueError(f"it was trained with {rows} embeddings, and brings no weights of that size for {lost}")
        base.resize_token_embeddings(rows, mean_resizing=False)
    if tied and adapted is not None:
        head.weight = torch.nn.Parameter((head.weight if found is None else found).to(head.weight.dtype, copy=True))
