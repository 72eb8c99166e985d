"""What is given as a model and is none, is damaged or would run code: refused in one line, and nothing runs."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from helpers import configuration, policy, tokenizer
from rdo.checks import compose_config
from rdo.models.pretrained import load_policy, load_scorer, load_tokenizer
from rdo.runtime.errors import UserError
from rdo.settings import EngineConfig, ModelConfig
from rdo.training.engine import Checkpoints, TorchEngine
from saved import Touch, saved

CONFIG = ModelConfig()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved policy."""
    return saved(policy(), tmp_path / "policy")


def changed(file: Path, **settings: Any) -> None:
    """Other settings in a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def cut(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])


BROKEN: dict[str, tuple[Callable[[Path], Any], Callable, str]] = {
    "empty weights": (lambda f: cut(f / "model.safetensors", 0), load_policy, "no model .*SafetensorError"),
    "cut weights": (lambda f: cut(f / "model.safetensors", 1000), load_policy, "no model .*SafetensorError"),
    "other shapes": (lambda f: changed(f / "config.json", vocab_size=7), load_policy, "no model .*mismatched_sizes"),
    "more layers": (
        lambda f: changed(f / "config.json", num_hidden_layers=3),
        load_policy,
        r"lacks weights of LlamaForCausalLM: model\.layers\.2",
    ),
    # Reward heads that got lost on saving must not come back as random numbers.
    "no head": (
        lambda f: changed(f / "config.json", num_labels=1),
        load_scorer,
        r"lacks weights of .*score\.weight; .*train one on it \(rm\.backbone",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), load_policy, r"no model .*config\.json"),
    "odd config": (lambda f: changed(f / "config.json", hidden_size="wide"), load_policy, "no model"),
    "no object": (lambda f: (f / "config.json").write_text("[1]"), load_policy, "no model"),
    "nothing": (lambda f: [file.unlink() for file in f.iterdir()], load_policy, "no model"),
    "gone": (shutil.rmtree, load_policy, "no model .*Repo id must be"),
    "cut tokenizer": (lambda f: cut(f / "tokenizer.json", 20), load_tokenizer, "no tokenizer"),
    "no tokenizer": (lambda f: [file.unlink() for file in f.glob("token*")], load_tokenizer, "no tokenizer"),
    "no end": (lambda f: endless(f), load_tokenizer, "has no end-of-sequence token, .*: set eos_token"),
    "many outputs": (lambda f: classifier(f), load_scorer, "one output, this one has 2"),
}


def endless(folder: Path) -> None:
    without = tokenizer()
    without.eos_token = None
    without.save_pretrained(folder)


def classifier(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_config(configuration("llama"))
    model.config.num_labels = 2
    saved(model, folder)


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_one_clear_line(folder: Path, what: str):
    damage, load, said = BROKEN[what]
    damage(folder)
    with pytest.raises(UserError, match=said) as caught:
        load(folder, CONFIG)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_in_place_of_a_folder_is_refused(folder: Path):
    with pytest.raises(UserError, match=r"no model can be loaded from .*model\.safetensors"):
        load_policy(folder / "model.safetensors", CONFIG)
    for key in ("model.path", "rm.path", "diffmodel.backbone"):
        with pytest.raises(UserError, match=rf"^{key}=.*model\.safetensors: is a file; give the model's folder$"):
            compose_config([f"{key}={folder}/model.safetensors"])


# What would run code


@pytest.mark.parametrize("save", ["torch", "legacy", "pickle"])
def test_a_pickle_runs_no_code(folder: Path, tmp_path: Path, save: str):
    touched = tmp_path / "touched"
    weights = {"model.norm.weight": Touch(touched)}
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        if save == "pickle":
            pickle.dump(weights, file)
        else:
            torch.save(weights, file, _use_new_zipfile_serialization=save == "torch")
    with pytest.raises(UserError, match="no model can be loaded") as caught:
        load_policy(folder, CONFIG)
    assert "weights_only" not in str(caught.value)  # torch's message recommends to switch that off
    assert not touched.exists()
    # The trap is a live one.
    with suppress(RuntimeError):
        torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert touched.exists()


def test_weights_of_an_older_model_without_code_load(folder: Path):
    """pytorch_model.bin, as most models on the hub were saved once, the paper's initial policy among them."""
    wanted = load_policy(folder, CONFIG).state_dict()
    torch.save(wanted, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for name, tensor in load_policy(folder, CONFIG).state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("part", ["model", "optimizer", "random"])
def test_a_checkpoint_runs_no_code(tmp_path: Path, part: str):
    touched, model = tmp_path / "touched", policy()
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    torch.save({"step": 1, **state, part: Touch(touched)}, tmp_path / "step_00000001.pt")
    with pytest.raises(pickle.UnpicklingError):
        Checkpoints(tmp_path, EngineConfig()).restore(TorchEngine(model, optimizer, None, EngineConfig()))
    assert not touched.exists()


def test_no_code_of_a_folder_runs_unasked(folder: Path, tmp_path: Path):
    """Of a model, of one whose architecture transformers knows, of a way to generate, of a tokenizer."""
    touched = tmp_path / "touched"
    code = f"from pathlib import Path\nPath({str(touched)!r}).touch()\nfrom transformers import LlamaConfig as Made\n"
    (folder / "custom_generate").mkdir()
    for file in (folder / "made.py", folder / "custom_generate" / "generate.py"):
        file.write_text(code + "def generate(model, **_): return None\n")
    names = {"AutoConfig": "made.Made", "AutoModelForCausalLM": "made.Made", "AutoTokenizer": "made.Made"}
    changed(folder / "config.json", auto_map=names)
    model = load_policy(folder, CONFIG)
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        model.generate(torch.tensor([[2, 3]]), max_new_tokens=2, pad_token_id=0)
    changed(folder / "config.json", model_type="made_up")
    changed(folder / "tokenizer_config.json", tokenizer_class="Made", auto_map={"AutoTokenizer": ["made.Made", None]})
    for load in (load_policy, load_tokenizer):
        with pytest.raises(UserError, match=r"model\.trust_remote_code=true"):
            load(folder, CONFIG)
    assert not touched.exists()
