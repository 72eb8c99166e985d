"""What a folder or hub name holds that is given as a model, where it is none that can be loaded: in one line."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

from safetensors import SafetensorError

from rdo import adapter_files
from rdo.errors import UserError

CONFIG = "config.json"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
# What the libraries raise on files that are not what their names say.
DAMAGE = (json.JSONDecodeError, LookupError, TypeError, AttributeError, SafetensorError)
TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "merges.txt", "*.tiktoken", "tekken.json")


def check_folder(path: str | Path, what: str = "model") -> None:
    """Raises UserError for a local path that is no folder of a model in Hugging Face format; `what` is loaded from it.

    A name that no local path has is the hub's.
    """
    folder, refusal = Path(path), f"no {what} can be loaded from {path}"
    if os.path.isfile(folder):
        raise UserError(f"{refusal}: it is a file; give the folder that holds {CONFIG} and the weights{gguf([folder])}")
    if not os.path.isdir(folder):
        if str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
            raise UserError(f"there is no model folder {path}")
        return
    files = sorted(folder.iterdir())
    if adapter_files.is_adapter(folder):
        check_adapter(folder, refusal)
        return
    if what == "tokenizer":
        if not has_tokenizer(folder):
            raise UserError(f"{refusal}: it has no tokenizer (tokenizer.json); save the model's tokenizer there, too")
        return
    if not (folder / CONFIG).exists():
        nested = next((file for file in files if (file / CONFIG).exists()), None)
        hint = f"; did you mean {nested}?" if nested else gguf(files)
        raise UserError(f"{refusal}: it has no {CONFIG}, so it is not a model in Hugging Face format{hint}")
    check_json(folder / CONFIG, refusal)


def check_adapter(folder: Path, refusal: str) -> None:
    """Raises UserError unless the folder holds an adapter's weights, and no whole model beside them."""
    if not any((folder / name).exists() for name in adapter_files.WEIGHTS):
        raise UserError(f"{refusal}: it is an adapter (LoRA) without its weights, {adapter_files.WEIGHTS[0]}")
    others = {file.name for pattern in WEIGHTS for file in folder.glob(pattern)} - {*adapter_files.WEIGHTS}
    if others:
        raise UserError(
            f"{refusal}: it holds an adapter ({adapter_files.CONFIG}) and a whole model ({min(others)}); move one of "
            "them elsewhere"
        )


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer's files."""
    return any(file for pattern in TOKENIZERS for file in folder.glob(pattern))


def check_json(file: Path, refusal: str) -> None:
    """Raises UserError unless the file holds a JSON object."""
    try:
        whole = isinstance(json.loads(file.read_bytes()), dict)
    except ValueError:
        whole = False
    except OSError as error:
        raise UserError(f"{refusal}: {error}") from error
    if not whole:
        raise UserError(f"{refusal}: its {file.name} is damaged: not a JSON object")


def gguf(files: list[Path]) -> str:
    """What to say of GGUF files, which are for inference alone."""
    if not any(file.suffix == ".gguf" for file in files):
        return ""
    return "; a GGUF file cannot be trained: take the model that it was made from, in safetensors"


def unloadable(path: str | Path, what: str, error: Exception) -> UserError:
    """What a library's error on loading a model or tokenizer means to the user."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0].strip(" .:")
    if not text or isinstance(error, LookupError):
        text = f"{type(error).__name__} {text}".strip()
    if isinstance(error, pickle.UnpicklingError):  # whose own message tells how to run it all the same
        text = "a pickle of it is damaged or would run code, so it is not loaded; take the model as safetensors"
    elif "trust_remote_code" in str(error):
        text += "; model.trust_remote_code=true runs it"
    elif isinstance(error, DAMAGE):
        text += "; a file of it is damaged"
    elif not os.path.isdir(path):
        text += "; check the name, and the network; private models need HF_TOKEN in the environment"
    return UserError(f"no {what} can be loaded from {path}: {text}")
