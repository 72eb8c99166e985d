"""Adapters on disk, in peft's format: where the model lies that an adapter belongs to, and what it brings itself."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from rdo.errors import UserError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# What peft's format has no place for: a scorer's form, and where the base lies from here, for folders that move.
NOTES = "rdo.json"
# What stands before the names of weights in files.
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """A saved adapter: the local folder of its files, and the model that it belongs to (a folder or a hub name)."""

    folder: Path
    base: str
    revision: str | None
    form: str | None  # of a scorer that we saved


def is_adapter(folder: Path) -> bool:
    """Whether a local folder holds an adapter."""
    return (folder / CONFIG).is_file()


def find_adapter(path: str | Path, revision: str) -> Adapter | None:
    """The adapter in a folder or under a hub name; None for anything else. Raises UserError where its base is gone."""
    folder = Path(path)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(path), revision=revision, allow_patterns=[CONFIG, *WEIGHTS, NOTES]))
        except Exception:  # what is wrong with a name, or the network, is said when the model itself is asked for
            return None
    if not is_adapter(folder):
        return None
    config, notes = read_config(folder), read_notes(folder)
    return Adapter(folder, adapter_base(folder), config.get("revision"), notes.get("form"))


def read_config(folder: Path) -> dict[str, Any]:
    """An adapter's description. Raises UserError where it is damaged or names no base."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        if isinstance(config, dict) and isinstance(config.get("base_model_name_or_path"), str):
            return config
    except ValueError:
        pass
    raise UserError(f"no model can be loaded from {folder}: its {CONFIG} names no model that it is an adapter of")


def read_notes(folder: Path) -> dict[str, Any]:
    """Our own notes of an adapter; none where someone else saved it."""
    try:
        notes = json.loads((folder / NOTES).read_bytes())
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def adapter_base(folder: Path) -> str:
    """The model that an adapter belongs to: where it was when the adapter was saved, else where it lies from here.

    Raises UserError where it is in neither place, or is an adapter itself.
    """
    named = read_config(folder)["base_model_name_or_path"]
    base, nearby = named, read_notes(folder).get("base")
    if not os.path.isdir(base) and nearby is not None:
        base = os.path.normpath(folder / nearby)
    if os.path.isdir(base):
        if is_adapter(Path(base)):
            raise UserError(f"no model can be loaded from {folder}: it is an adapter of {base}, an adapter itself")
        return base
    if nearby is not None or named.startswith((".", "/", "~")) or named.count("/") > 1 or not named:
        raise UserError(
            f"no model can be loaded from {folder}: it is an adapter (LoRA) of {named or 'nothing'}, which is not "
            f"there; set base_model_name_or_path in its {CONFIG} to where that model lies"
        )
    return named


def outputs_of(adapter: Adapter) -> int | None:
    """How many outputs the head has that an adapter brings; None where it brings none."""
    heads = ("score.weight", "classifier.out_proj.weight", "classifier.weight")
    found = (len(tensor) for name, tensor in weights_of(adapter).items() if name.endswith(heads))
    return next(found, None)


def dtype_of(adapter: Adapter) -> torch.dtype:
    """The dtype of an adapter's weights."""
    return next(iter(weights_of(adapter).values())).dtype


def weights_of(adapter: Adapter) -> dict[str, torch.Tensor]:
    """A saved adapter's weights by their names within the model; a pickle among them runs no code."""
    from peft.utils import load_peft_weights

    loaded = load_peft_weights(str(adapter.folder), device="cpu")
    return {name.removeprefix(PREFIX): tensor for name, tensor in loaded.items()}
