"""What is given as a model and is none, is damaged or would run code: refused in one line, and nothing runs."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from helpers import configuration, policy, tokenizer
from rdo.checkpoints import Checkpoints
from rdo.checks import compose_config
from rdo.engine.torch_engine import TorchEngine
from rdo.errors import UserError
from rdo.pretrained import load_policy, load_scorer, load_tokenizer, new_scorer, save_model
from rdo.schema import EngineConfig, ModelConfig

CONFIG = ModelConfig()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved policy."""
    return saved(policy(), tmp_path / "policy")


def saved(model: PreTrainedModel, folder: Path) -> Path:
    save_model(model, tokenizer(), folder)
    return folder


def test_a_scorer_without_its_head_is_refused(tmp_path: Path):
    """Reward heads that got lost on saving must not come back as random numbers."""
    path = saved(policy(), tmp_path / "scorer")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_labels": 1}))
    with pytest.raises(UserError, match=r"lacks weights of .*score\.weight; .*train one on it \(rm\.backbone"):
        load_scorer(path, CONFIG)


def test_a_classifier_of_many_outputs_is_no_reward_model(tmp_path: Path):
    model = AutoModelForSequenceClassification.from_config(configuration("llama"))
    model.config.num_labels = 2
    with pytest.raises(UserError, match="one output, this one has 2"):
        load_scorer(saved(model, tmp_path / "classifier"), CONFIG)


def test_missing_weights_are_named(folder: Path):
    deeper = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**deeper, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"lacks weights of LlamaForCausalLM: model\.layers\.2"):
        load_policy(folder, CONFIG)


class Touch:
    """Unpickling this would run code: it touches a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("load", [load_policy, load_scorer])
@pytest.mark.parametrize("save", ["torch", "legacy", "pickle"])
def test_a_pickle_runs_no_code(folder: Path, tmp_path: Path, save: str, load: Callable):
    touched = tmp_path / "touched"
    weights = {"model.norm.weight": Touch(touched)}
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        if save == "pickle":
            pickle.dump(weights, file)
        else:
            torch.save(weights, file, _use_new_zipfile_serialization=save == "torch")
    with pytest.raises(UserError, match="no model can be loaded") as caught:
        load(folder, CONFIG)
    assert "weights_only" not in str(caught.value)  # torch's message recommends to switch that off
    assert not touched.exists()
    # The trap is a live one.
    with suppress(RuntimeError):
        torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert touched.exists()


def test_weights_of_an_older_model_without_code_load(folder: Path):
    """pytorch_model.bin, as most models on the hub were saved once."""
    wanted = load_policy(folder, CONFIG).state_dict()
    torch.save(wanted, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for name, tensor in load_policy(folder, CONFIG).state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    assert torch.equal(new_scorer(folder, "paper", CONFIG, 0).model.norm.weight, wanted["model.norm.weight"])


def test_no_other_pickle_of_a_folder_is_opened(folder: Path, tmp_path: Path):
    touched = tmp_path / "touched"
    names = ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "vocab.pkl", "tokenizer.pkl"]
    for name in names:
        torch.save({"state": Touch(touched)}, folder / name)
    for name in ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    load_policy(folder, CONFIG)
    load_tokenizer(folder, CONFIG)
    new_scorer(folder, "paper", CONFIG, 0)
    assert not touched.exists()


@pytest.mark.parametrize("part", ["model", "optimizer", "random"])
def test_a_checkpoint_runs_no_code(tmp_path: Path, part: str):
    touched, model = tmp_path / "touched", policy()
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    torch.save({"step": 1, **state, part: Touch(touched)}, tmp_path / "step_00000001.pt")
    with pytest.raises(pickle.UnpicklingError):
        Checkpoints(tmp_path, EngineConfig()).restore(TorchEngine(model, optimizer, None, EngineConfig()))
    assert not touched.exists()


@pytest.mark.parametrize("model_type", ["llama", "made_up"])
def test_no_code_of_a_model_folder_runs_unasked(folder: Path, tmp_path: Path, model_type: str):
    touched = tmp_path / "touched"
    code = f"from pathlib import Path\nPath({str(touched)!r}).touch()\nfrom transformers import LlamaConfig as Made\n"
    (folder / "made.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "made.Made", "AutoModelForCausalLM": "made.Made", "AutoTokenizer": "made.Made"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": names}))
    if model_type == "llama":
        # transformers knows the architecture itself: its own code is used.
        assert type(load_policy(folder, CONFIG)).__name__ == "LlamaForCausalLM"
    else:
        with pytest.raises(UserError, match=r"model\.trust_remote_code=true"):
            load_policy(folder, CONFIG)
    assert not touched.exists()


def test_no_code_of_a_tokenizer_or_of_a_way_to_generate_runs_unasked(folder: Path, tmp_path: Path):
    touched = tmp_path / "touched"
    code = f"from pathlib import Path\nPath({str(touched)!r}).touch()\ndef generate(model, **_): return None\n"
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    (folder / "made.py").write_text(code)
    model = load_policy(folder, CONFIG)
    with torch.no_grad():
        model.generate(torch.tensor([[2, 3]]), max_new_tokens=2, pad_token_id=0)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Made", "auto_map": {"AutoTokenizer": ["made.Made", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"model\.trust_remote_code=true"):
        load_tokenizer(folder, CONFIG)
    assert not touched.exists()


@pytest.mark.parametrize("damage", ["empty", "truncated", "other shape", "no config", "odd config", "no object"])
def test_a_broken_folder_is_one_clear_line(folder: Path, damage: str):
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "empty":
        weights.write_bytes(b"")
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "no config":
        config.unlink()
    elif damage == "no object":
        config.write_text("[1]")
    else:
        key, value = ("vocab_size", 7) if damage == "other shape" else ("hidden_size", "wide")
        config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    with pytest.raises(UserError, match="no model can be loaded from") as caught:
        load_policy(folder, CONFIG)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["{}/nowhere", "./nowhere", "some/path/nowhere"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(tmp_path: Path, path: str):
    with pytest.raises(UserError, match="there is no model folder"):
        load_policy(path.format(tmp_path), CONFIG)
    with pytest.raises(UserError, match="nowhere"):
        load_tokenizer(path.format(tmp_path), CONFIG)


def test_a_folder_without_a_tokenizer_is_refused(folder: Path):
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match=r"no tokenizer can be loaded .* a file of it is damaged"):
        load_tokenizer(folder, CONFIG)
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(UserError, match=r"no tokenizer can be loaded .* it has no tokenizer"):
        load_tokenizer(folder, CONFIG)


def test_a_tokenizer_that_cannot_end_a_sequence_is_refused(folder: Path):
    endless = tokenizer()
    endless.eos_token = None
    endless.save_pretrained(folder)
    with pytest.raises(UserError, match="has no end-of-sequence token, so no response could end: set eos_token"):
        load_tokenizer(folder, CONFIG)


@pytest.mark.parametrize("kind", ["adapter without weights", "adapter and model", "gguf", "nothing", "nested"])
def test_what_is_no_model_is_named(folder: Path, tmp_path: Path, kind: str):
    given = tmp_path / "given"
    given.mkdir()
    named = {
        "adapter without weights": r"is an adapter \(LoRA\) without its weights, adapter_model\.safetensors$",
        "adapter and model": r"holds an adapter \(adapter_config\.json\) and a whole model \(model\.safeten.*; move",
        "gguf": r"has no config\.json, .*; a GGUF file cannot be trained",
        "nothing": r"has no config\.json, so it is not a model in Hugging Face format$",
        "nested": rf"has no config\.json, .*; did you mean {given}/checkpoint-7\?$",
    }[kind]
    if kind.startswith("adapter"):
        (given / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "a/b"}')
        if kind == "adapter and model":
            shutil.copytree(folder, given, dirs_exist_ok=True)
            (given / "adapter_model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    elif kind == "gguf":
        (given / "model.gguf").write_bytes(b"GGUF")
    elif kind == "nested":
        folder.rename(given / "checkpoint-7")
    for load in (load_policy, load_scorer):
        with pytest.raises(UserError, match=f"no model can be loaded from {given}: it {named}"):
            load(given, CONFIG)


@pytest.mark.parametrize("text", ["[1]", "{", '{"peft_type": "LORA"}', '{"base_model_name_or_path": null}'])
def test_a_damaged_description_of_an_adapter_is_named(folder: Path, text: str):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(
        UserError, match=rf"no model can be loaded from {folder}: its adapter_config\.json names no model"
    ):
        load_policy(folder, CONFIG)


def test_a_file_in_place_of_a_folder_is_refused_before_any_work(folder: Path):
    with pytest.raises(UserError, match=r"it is a file; give the folder that holds config\.json and the weights$"):
        load_policy(folder / "model.safetensors", CONFIG)
    for key in ("model.path", "rm.path", "diffmodel.backbone"):
        with pytest.raises(UserError, match=rf"^{key}=.*model\.safetensors: is a file; give the model's folder$"):
            compose_config([f"{key}={folder}/model.safetensors"])
