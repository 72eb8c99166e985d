"""LoRA (Hu et al. 2021): small trained matrices beside frozen weights, by peft, which is imported only for them.

Adapters are put into a model in place, so that its class, its backbone and its heads stay where they are. An adapter
is saved with all that its base lacks (the head of a scorer), and it is always one of a whole model: what starts from an
adapter goes on training that one (with LoRA), or trains all weights with the adapter merged into them (without). So
transformers loads any of them alone.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rdo.adapter_files import NOTES, PREFIX, WEIGHTS, Adapter, weights_of
from rdo.errors import UserError
from rdo.files import write_json
from rdo.models import beside_backbone
from rdo.schema import ModelConfig

# The name of the one adapter within a model.
NAME = "default"
ALL_LINEAR = "all-linear"


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether an adapter is in the model."""
    return bool(getattr(model, "peft_config", None))


def description(model: PreTrainedModel) -> Any:
    """What peft knows of the model's adapter, a peft.PeftConfig."""
    return model.peft_config[NAME]


def lora_settings(config: ModelConfig) -> dict[str, Any]:
    """What of model.lora determines a trained stage's result; nothing where it is off."""
    return {} if config.lora.rank is None else {"lora": asdict(config.lora)}


def choose_trained(model: PreTrainedModel, config: ModelConfig, seed: int) -> None:
    """Decides by model.lora which weights are trained: all, or an adapter's, and of a scorer also its head's.

    The seed fixes a new adapter's weights; it changes no output until it is trained. Raises UserError where the
    model cannot take such an adapter, or has another one.
    """
    if config.lora.rank is None:
        if has_adapter(model):
            merge_adapter(model)
        model.requires_grad_(True)
        return
    own = sorted(own_modules(model))
    if has_adapter(model):
        check_same(model, config)
    else:
        add_adapter(model, config, own, seed)
    adapter = description(model)
    adapter.task_type = "SEQ_CLS" if own else "CAUSAL_LM"
    adapter.modules_to_save = sorted({*(adapter.modules_to_save or ()), *own}) or None
    whole = whole_weights(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name in whole)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"[lora] {trained} of {model.num_parameters()} parameters are trained", flush=True)


def own_modules(model: PreTrainedModel) -> set[str]:
    """The modules of a scorer that its base lacks; none of a policy."""
    if not hasattr(model.config, "rdo_form"):
        return set()
    return {name.rpartition(".")[0] for name, _ in model.named_parameters() if beside_backbone(model, name)}


def add_adapter(model: PreTrainedModel, config: ModelConfig, excluded: list[str], seed: int) -> None:
    """Puts a new adapter into the modules that model.lora.target_modules names."""
    from peft import LoraConfig

    lora = config.lora
    assert lora.rank is not None
    if not model.name_or_path:
        raise UserError(
            f"model.lora.rank={lora.rank} adapts a saved model, and this one is made from scratch: leave it out"
        )
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number
        lora_dropout=0.0,
        target_modules=ALL_LINEAR if lora.target_modules == [ALL_LINEAR] else list(lora.target_modules),
        exclude_modules=excluded or None,
        task_type="SEQ_CLS" if excluded else "CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    torch.manual_seed(seed)
    try:
        model.add_adapter(settings, NAME)
    except ValueError as error:
        linear = (torch.nn.Linear, Conv1D)
        names = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, linear)}
        raise UserError(
            f"model.lora.target_modules=[{','.join(lora.target_modules)}] cannot be adapted in {type(model).__name__}; "
            f"it has {', '.join(sorted(names))} ({str(error).splitlines()[0]})"
        ) from error
    base = str(model.name_or_path)
    if os.path.isdir(base):
        settings.base_model_name_or_path = os.path.abspath(base)
    elif base == config.path:
        settings.revision = config.revision


def check_same(model: PreTrainedModel, config: ModelConfig) -> None:
    """Raises UserError unless the adapter that the model has is one that model.lora speaks of."""
    lora, adapter = config.lora, description(model)
    here = {"rank": lora.rank, "alpha": lora.alpha}
    there = {"rank": getattr(adapter, "r", None), "alpha": getattr(adapter, "lora_alpha", None)}
    if lora.target_modules != [ALL_LINEAR]:
        here["target_modules"] = sorted(lora.target_modules)  # type: ignore[assignment]
        there["target_modules"] = adapter.target_modules and sorted(adapter.target_modules)
    for name, value in here.items():
        if there[name] != value:
            raise UserError(
                f"model.lora.{name}={value}, but the model to start from is an adapter with {name} {there[name]}, and "
                f"that one is trained on: set model.lora.{name} to the same, or merge it into its model first "
                "(model.lora.merge=true where it is made)"
            )


def whole_weights(model: PreTrainedModel) -> set[str]:
    """Names of the weights that are not adapted but trained and saved whole."""
    modules = getattr(description(model), "modules_to_save", None) or ()
    names = [name for name, _ in model.named_parameters() if ".lora_" not in name]
    return {name for name in names if any(f".{module}." in f".{name}" for module in modules)}


def attach(model: PreTrainedModel, adapter: Adapter, ignore_others: bool = False) -> set[str]:
    """Puts a saved adapter into its base, frozen; names of the whole weights that it brought.

    ignore_others: it may hold weights that this model has no place for (a language model's head, for a scorer).
    Raises UserError unless it fits, and what peft and transformers raise on damaged files.
    """
    from peft import get_peft_model_state_dict
    from peft.utils import ModulesToSaveWrapper

    conversions = getattr(model, "_weight_conversions", None)
    safe = (adapter.folder / WEIGHTS[0]).exists()  # transformers looks for no other file unless told so
    loaded = model.load_adapter(str(adapter.folder), NAME, use_safetensors=safe)
    # transformers now holds the adapter's conversions of names for the model's, which saving it would then apply.
    model._weight_conversions = conversions  # type: ignore[assignment]
    wanted = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False).keys()
    # transformers reports no missing ones, but starts them anew; where it converts names, names do not tell.
    missing = set() if conversions else wanted - weights_of(adapter).keys()
    wrong = [f"lacks {name}" for name in sorted(missing)]
    if not ignore_others:
        wrong += [f"has {name}, which the model has not" for name in sorted(loaded.unexpected_keys)]
    if wrong:
        raise UserError(f"it does not fit, for it {wrong[0]}")
    brought = set()
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            # What is replaced whole needs no wrapper, and heads stay what they are.
            own = module.modules_to_save[NAME]
            model.set_submodule(name, own)
            brought |= {f"{name}.{weight}" for weight, _ in own.named_parameters()}
    untie(model)
    model.requires_grad_(False)
    local = os.path.isdir(adapter.base)
    description(model).base_model_name_or_path = os.path.abspath(adapter.base) if local else adapter.base
    return brought


def untie(model: PreTrainedModel) -> None:
    """Says in the config that embeddings and head are two, where an adapter has replaced one of them."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(model.config, "tie_word_embeddings", False) and head is not None:
        model.config.tie_word_embeddings = head.weight is embeddings.weight


def merge_adapter(model: PreTrainedModel) -> None:
    """Adds the adapter to the weights it belongs to, and takes it out: the model is a plain one again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(adapter_names=[NAME])
            model.set_submodule(name, module.get_base_layer())
    model.delete_adapter(NAME)


def trained_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's state without what is frozen, by the names of `state_dict`: all of it where nothing is."""
    frozen = {name for name, weight in model.named_parameters(remove_duplicate=False) if not weight.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def load_trained_state(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> None:
    """Takes up what `trained_state` gave. Raises ValueError, and changes nothing, where it is another model's."""
    there = {name: tuple(tensor.shape) for name, tensor in state.items()}
    here = {name: tuple(tensor.shape) for name, tensor in trained_state(model).items()}
    for name in (*here, *there):
        if there.get(name) != here.get(name):
            raise ValueError(f"{name}: {there.get(name, 'nothing')} there, {here.get(name, 'nothing')} here")
    model.load_state_dict(dict(state), strict=False)


def save_adapter(
    model: PreTrainedModel, folder: Path, final: Path, state: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Writes the model's adapter into a folder that will be `final`.

    state: the weights, by the names of `state_dict`, where the model itself has them not (those that are trained are
    enough); else the model's.
    """
    from peft import get_peft_model_state_dict

    state = dict(model.state_dict() if state is None else state)
    weights = get_peft_model_state_dict(model, state, NAME, save_embedding_layers=False)
    weights |= {name: state[name] for name in whole_weights(model)}
    plain = {f"{PREFIX}{name}": weights[name].detach().cpu().contiguous().clone() for name in sorted(weights)}
    save_file(plain, folder / WEIGHTS[0], {"format": "pt"})
    adapter = copy.copy(description(model))
    adapter.inference_mode = True
    if isinstance(adapter.target_modules, set):
        adapter.target_modules = sorted(adapter.target_modules)  # sets have another order in every process
    adapter.save_pretrained(str(folder))
    notes, base = {}, adapter.base_model_name_or_path
    if os.path.isdir(base):
        notes["base"] = os.path.relpath(base, final.absolute())
    if hasattr(model.config, "rdo_form"):
        notes["form"] = model.config.rdo_form
    if notes:
        write_json(folder / NOTES, notes)
