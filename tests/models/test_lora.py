"""LoRA: only an adapter is trained and saved, whatever loads it scores the same, and what follows starts from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from helpers import TEXTS, configuration, from_configuration, policy, scorer
from rdo.models.given import given
from rdo.models.lora import choose_trained, trained_state
from rdo.models.pretrained import load_policy, load_scorer, load_tokenizer, new_scorer
from rdo.models.scorers import check_form
from rdo.models.traits import head_names
from rdo.runtime.errors import UserError
from rdo.sequences.preparation import set_layout
from rdo.settings import EngineConfig, LoraConfig, ModelConfig
from rdo.stages.align import aligned_policy
from rdo.stages.evaluate import evaluate_policy
from rdo.stages.scorer import scorer as scorer_artifact
from rdo.stages.sft import base_policy
from rdo.training.engine import TorchEngine
from saved import FLAT, TOKENIZER, Touch, close, outputs, plain_logits, read, saved
from tiny import tiny_run

CONFIG = ModelConfig(lora=LoraConfig(rank=8))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A saved policy."""
    return saved(policy(), tmp_path / "base")


def learned(model: PreTrainedModel, config: ModelConfig = CONFIG, seed: int = 0) -> tuple[PreTrainedModel, Any]:
    """The model after three steps of training what model.lora says, and what is to be saved of it."""
    trained = choose_trained(model, config, seed)
    aim = 1.0 if hasattr(model.config, "rdo_form") else 0.0  # a new head gives 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        (read(model) - aim).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, trained


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("name", ["llama-grouped", "gpt2", "mistral-window", "qwen2"])
@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_is_trained_alone_and_what_is_saved_scores_the_same(tmp_path: Path, name: str, merge: bool):
    path = saved(policy(name), tmp_path / "base")
    model, untouched = load_policy(path, CONFIG), load_policy(path, CONFIG)
    start = trained_state(model)
    model, trained = learned(model)
    wanted = outputs(model)
    assert not close(wanted, outputs(untouched), 0.05)
    assert close(outputs(model, "tree"), outputs(model, "padded"))
    assert all("lora_" in name for name in trained_state(model))
    kept = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(kept[name], tensor) for name, tensor in start.items())

    folder = saved(trained, tmp_path / "saved", merge=merge)
    assert names_in(folder) >= ({"config.json", "model.safetensors"} if merge else ADAPTER)
    assert not merge or not ADAPTER & names_in(folder)
    for layout in ("tree", "padded"):
        assert close(outputs(load_policy(folder, CONFIG), layout), wanted)
    for alone in (AutoModelForCausalLM.from_pretrained(folder), *([] if merge else [by_peft(path, folder)])):
        assert close(plain_logits(alone), plain_logits(model))
    assert load_tokenizer(folder, CONFIG)(TEXTS[0]).input_ids == TOKENIZER(TEXTS[0]).input_ids


def by_peft(base: Path, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


@pytest.mark.parametrize(
    ("name", "form"),
    [("llama", "pointwise"), ("gpt2", "paper"), ("qwen2", "residual"), ("bert", "pointwise"), ("deberta", "pointwise")],
)
@pytest.mark.parametrize("merge", [False, True])
def test_a_scorers_head_is_trained_whole_and_saved_with_its_adapter(tmp_path: Path, name: str, form: str, merge: bool):
    encoder = AutoModelForMaskedLM if name in ("bert", "deberta") else AutoModelForCausalLM
    # A pre-trained backbone: neither a head nor, for an encoder, what pools for it.
    path = saved(from_configuration(configuration(name), encoder), tmp_path / "base")
    model, trained = learned(new_scorer(path, form, CONFIG, seed=0))
    whole = {name for name in trained_state(model) if "lora_" not in name}
    assert whole & head_names(model)
    assert all("pooler" in name or name in head_names(model) for name in whole)
    wanted = outputs(model)
    folder = saved(trained, tmp_path / "saved", merge=merge)
    loaded = load_scorer(folder, CONFIG)
    assert (check_form(loaded), loaded.config.num_labels) == (form, 2 if form == "residual" else 1)
    assert close(outputs(loaded), wanted)
    alone = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=loaded.config.num_labels)
    assert close(plain_logits(alone)[:, 0], wanted, 1e-5)


def test_a_new_adapter_changes_nothing_and_its_seed_fixes_it(base: Path):
    states = []
    for seed in (0, 0, 1):
        model = load_policy(base, CONFIG)
        before = outputs(model)
        choose_trained(model, CONFIG, seed)
        assert close(outputs(model), before)
        states.append(trained_state(model))
    one, same, other = states
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_settings_are_those_of_model_lora(base: Path, tmp_path: Path):
    config = ModelConfig(lora=LoraConfig(rank=2, alpha=3.5, target_modules=["q_proj", "v_proj"]))
    model, trained = learned(load_policy(base, config), config)
    assert {name.split(".")[-4] for name in trained_state(model)} == {"q_proj", "v_proj"}
    described = json.loads((saved(trained, tmp_path / "saved") / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["lora_dropout"]) == (2, 3.5, 0.0)
    assert described["target_modules"] == ["q_proj", "v_proj"]
    assert described["base_model_name_or_path"] == str(base)
    config.lora.target_modules = ["c_attn"]
    with pytest.raises(ValueError, match=r"Target modules .*c_attn.* not found in the base"):
        choose_trained(load_policy(base, config), config, seed=0)


@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("of_scorer", [False, True])
def test_what_starts_from_an_adapter_starts_from_it_merged(
    base: Path, tmp_path: Path, rank: int | None, of_scorer: bool
):
    """And is saved whole, for no file holds what a new adapter would belong to."""
    first = saved(learned(load_policy(base, CONFIG))[1], tmp_path / "first")
    whole = load_policy(first, CONFIG)
    assert {name for name, _ in whole.named_parameters()} == {name for name, _ in policy().named_parameters()}
    config = ModelConfig(lora=LoraConfig(rank=rank))
    start = new_scorer(first, "paper", config, 0) if of_scorer else load_policy(first, config)
    ids, mask = FLAT.ids, FLAT.mask
    hidden = [model.base_model(input_ids=ids, attention_mask=mask)[0] for model in (start, whole)]  # type: ignore[union-attr]
    assert torch.equal(*hidden)
    model, trained = learned(start, config, seed=1)
    second = saved(trained, tmp_path / "second")
    shutil.rmtree(first)
    shutil.rmtree(base)
    load, factory = (load_policy, AutoModelForCausalLM)
    if of_scorer:
        load, factory = load_scorer, AutoModelForSequenceClassification
    assert close(outputs(load(second, config)), outputs(model))
    assert close(plain_logits(factory.from_pretrained(second)), plain_logits(model), 1e-5)


def test_a_run_folder_may_move_and_a_base_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = tmp_path / "runs"
    saved(policy(), runs / "sft" / "model")
    monkeypatch.chdir(tmp_path)
    model, trained = learned(load_policy(Path("runs/sft/model"), CONFIG))  # which is not relative to anything later
    saved(trained, runs / "align" / "model")
    monkeypatch.chdir("/")
    assert close(plain_logits(AutoModelForCausalLM.from_pretrained(runs / "align" / "model")), plain_logits(model))
    runs.rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "align" / "model"
    assert close(outputs(load_policy(moved, CONFIG)), outputs(model))
    # The key of a given adapter counts its base.
    key = given(str(moved)).key
    saved(policy(seed=1), tmp_path / "moved" / "sft" / "model")
    assert given(str(moved)).key != key
    shutil.rmtree(tmp_path / "moved" / "sft")
    with pytest.raises(UserError, match=rf"no model can be loaded from {moved}: .*'{tmp_path}/moved/sft/model'"):
        load_policy(moved, CONFIG)


# Adapters that others saved


def test_an_adapter_from_the_hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Laid out as a download leaves it; no network is needed for what is there."""
    model, trained = learned(load_policy(base, CONFIG))
    cached = tmp_path / "hub" / "models--someone--adapter"
    saved(trained, cached / "snapshots" / ("a" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert close(outputs(load_policy("someone/adapter", CONFIG)), outputs(model))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("other base", "size mismatch"),
        ("lost adapter", "missing adapter keys"),
        ("lost head", r"score\.weight"),
        ("policy", r"lacks weights of .*score\.weight; .*train one on it"),
        ("cut", "header"),
        ("pickle", "a pickle of it is damaged or would run code"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(base: Path, tmp_path: Path, damage: str, said: str):
    start = load_policy(base, CONFIG) if damage == "policy" else new_scorer(base, "paper", CONFIG, 0)
    folder, touched = saved(learned(start)[1], tmp_path / "adapter"), tmp_path / "touched"
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    if damage == "other base":
        wide = configuration("llama")
        wide.hidden_size = 64
        saved(from_configuration(wide, AutoModelForCausalLM), base)
    elif damage.startswith("lost"):
        part = "score" if damage == "lost head" else "v_proj.lora_B"
        save_file({name: tensor for name, tensor in weights.items() if part not in name}, file)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "pickle":
        file.unlink()
        torch.save({**weights, "more": Touch(touched)}, folder / "adapter_model.bin")
    with pytest.raises(UserError, match=said) as caught:
        load_scorer(folder, CONFIG)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not touched.exists()


# What is saved of a run, and from where


def test_a_checkpoint_of_an_adapter_is_taken_up_and_another_ranks_refused(base: Path, tmp_path: Path):
    engines = []
    for rank in (8, 8, 4):
        model, _ = learned(load_policy(base, CONFIG), ModelConfig(lora=LoraConfig(rank=rank)), seed=len(engines))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engines.append(TorchEngine(model, torch.optim.AdamW(trained), None, EngineConfig()))
    one, same, other = engines
    one.save(tmp_path / "step.pt", 3)
    assert (tmp_path / "step.pt").stat().st_size < (base / "model.safetensors").stat().st_size
    assert not torch.equal(outputs(one.model), outputs(same.model))
    assert same.load(tmp_path / "step.pt") == 3
    assert torch.equal(outputs(one.model), outputs(same.model))
    with pytest.raises(UserError, match=r"checkpoint of another model .*size mismatch"):
        other.load(tmp_path / "step.pt")


ADAPTED = [(name, merge) for name in ("adapter", "scorer's adapter") for merge in (False, True)]
WHOLE = [(name, False) for name in ("llama", "gpt2", "gemma3", "scorer", "encoder", "sharded")]


@pytest.mark.parametrize(("name", "merge"), [*ADAPTED, *WHOLE])
def test_models_are_saved_from_a_given_state(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, merge: bool
):
    """What a sharded engine gives: plain tensors, while the model holds rounded ones, or none."""
    if "adapter" in name:
        model, kept = learned(
            load_policy(base, CONFIG) if name == "adapter" else new_scorer(base, "residual", CONFIG, 0)
        )
    else:
        made = {"scorer": lambda: scorer("llama", "residual"), "encoder": lambda: scorer("deberta"), "sharded": policy}
        model = kept = made.get(name, lambda: policy(name))()
        set_layout(model, "auto")
    if name == "sharded":
        monkeypatch.setattr("rdo.models.pretrained.LARGEST_FILE", "20KB")
    wanted = saved(kept, tmp_path / "wanted", merge=merge)
    assert (wanted / "model.safetensors.index.json").exists() == (name == "sharded")
    # Each name a tensor of its own: those of tied weights are two here.
    state = {name: tensor.clone() for name, tensor in trained_state(model).items()}
    if not merge:
        model.to(torch.bfloat16)  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
    found = saved(kept, tmp_path / "found", state=state, merge=merge)
    assert names_in(found) == names_in(wanted)
    for file in wanted.iterdir():
        assert (found / file.name).read_bytes() == file.read_bytes(), file.name


# Whole stages

FEW = ("align.max_steps=2", "rm.max_steps=2", "sft.max_steps=2", "model.lora.rank=4", "loss=kto")


def test_stages_on_a_model_from_scratch(tmp_path: Path):
    """What is made from scratch is trained whole; what follows adapts it."""
    few = (*FEW, "align.learning_rate=0.01")
    run = tiny_run(tmp_path, *few, "rc=reward", "rc.negative=abs", "eval.judges=[reward]")
    base, aligned, reward = base_policy(run), aligned_policy(run), scorer_artifact(run, "reward")
    assert (base.folder / "model" / "model.safetensors").exists()
    for artifact in (aligned, reward):
        described = json.loads((artifact.folder / "model" / "adapter_config.json").read_text())
        assert described["base_model_name_or_path"] == str(base.folder / "model")
    evaluation = json.loads((evaluate_policy(run, "policy").folder / "evaluation.json").read_text())
    assert evaluation["rewards"]["reward"]["count"] == 8
    assert evaluation["log_ratio"]["value"] != 0.0
    # Another rank, or merging, is another policy.
    others = (("model.lora.rank=null",), ("model.lora.rank=2",), ("model.lora.merge=true",))
    runs = [tiny_run(tmp_path, *few, *more) for more in others]
    assert {base_policy(other).folder for other in runs} == {base.folder}
    assert len({aligned_policy(other).folder for other in (*runs, tiny_run(tmp_path, *few))}) == 4
    assert (aligned_policy(runs[-1]).folder / "model" / "model.safetensors").exists()


def test_stages_that_go_on_from_an_adapter(tmp_path: Path):
    """sft of a given model is an adapter of it; align and rm start from that, and load alone."""
    given_model = base_policy(tiny_run(tmp_path / "before")).folder / "model"
    run = tiny_run(tmp_path / "run", *FEW, f"model.path={given_model}", "rc=reward", "rc.negative=abs")
    sft, aligned, reward = base_policy(run), aligned_policy(run), scorer_artifact(run, "reward")
    assert names_in(sft.folder / "model") >= ADAPTER
    assert "model.safetensors" in names_in(aligned.folder / "model") & names_in(reward.folder / "model")
    for artifact in (sft, aligned):
        alone = AutoModelForCausalLM.from_pretrained(artifact.folder / "model")
        ids = torch.tensor([[2, 3, 4, 5]])
        found, wanted = (model(input_ids=ids).logits for model in (alone, run.policy(artifact)[0]))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
