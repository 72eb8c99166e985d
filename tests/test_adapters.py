"""LoRA: only an adapter is trained and saved, whatever loads it scores the same, and what follows starts from it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import rdo.adapters
from helpers import TEXTS, configuration, from_configuration, policy, randomise, relative_error, scorer, tokenizer
from rdo.adapters import choose_trained, has_adapter, load_trained_state, trained_state
from rdo.artifacts import Artifact
from rdo.checks import compose_config
from rdo.errors import UserError
from rdo.forest import make_layout
from rdo.given import given
from rdo.models import head_names, read_log_probabilities, read_scalars, set_layout
from rdo.pretrained import load_policy, load_scorer, load_tokenizer, new_scorer, save_model
from rdo.readout import Scalar, Span
from rdo.schema import LoraConfig, ModelConfig
from rdo.scorers import check_form
from rdo.stages.align import aligned_policy
from rdo.stages.eval import evaluate_policy
from rdo.stages.scorer import scorer as scorer_artifact
from rdo.stages.sft import base_policy
from tiny import tiny_run

TOKENIZER = tokenizer()
CONFIG = ModelConfig(lora=LoraConfig(rank=8))
SEQUENCES = [(*TOKENIZER(text).input_ids, 1) for text in TEXTS]
SPANS = [Span(s, 5) for s in range(len(SEQUENCES))]
ENDS = [[Scalar(s, len(ids) - 1)] for s, ids in enumerate(SEQUENCES)]
FLAT = make_layout("flat", SEQUENCES)
DECODERS = ["llama-grouped", "gpt2", "mistral-window", "qwen2"]


def saved(model: PreTrainedModel, folder: Path, **how) -> Path:
    save_model(model, TOKENIZER, folder, **how)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A saved policy."""
    return saved(policy(), tmp_path / "base")


def adapted(path: Path, config: ModelConfig = CONFIG) -> PreTrainedModel:
    """A policy with a trained adapter."""
    model = load_policy(path, config)
    choose_trained(model, config, seed=0)
    return learn(model)


def adapted_scorer(path: Path, form: str = "pointwise", config: ModelConfig = CONFIG) -> PreTrainedModel:
    model = new_scorer(path, form, config, seed=0)
    choose_trained(model, config, seed=0)
    return learn(model)


def learn(model: PreTrainedModel, layout: str = "auto") -> PreTrainedModel:
    """Three steps of training."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    name = set_layout(model, layout)
    for _ in range(3):
        read(model, name).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def read(model: PreTrainedModel, layout: str) -> torch.Tensor:
    """What the model says of the sequences: log-probabilities, or the difference of a scorer's values from 1."""
    name = set_layout(model, layout)
    if hasattr(model.config, "rdo_form"):
        return read_scalars(model, make_layout(name, SEQUENCES), ENDS) - 1.0
    return read_log_probabilities(model, make_layout(name, SEQUENCES), SPANS)[0]


def outputs(model: PreTrainedModel, layout: str = "auto") -> torch.Tensor:
    with torch.no_grad():
        return read(model, layout)


def plain_logits(model: PreTrainedModel) -> torch.Tensor:
    """The logits of the flat layout through the model's own forward."""
    set_layout(model, "flat")
    with torch.no_grad():
        return model(input_ids=FLAT.ids, attention_mask=FLAT.mask).logits[FLAT.mask.bool()]  # type: ignore[union-attr]


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return relative_error([found], [wanted]) < 1e-6


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_is_trained_alone_and_what_is_saved_scores_the_same(tmp_path: Path, name: str, merge: bool):
    path = saved(policy(name), tmp_path / "base")
    model, untouched = load_policy(path, CONFIG), load_policy(path, CONFIG)
    choose_trained(model, CONFIG, seed=0)
    assert close(outputs(model), outputs(untouched))  # a new adapter changes nothing
    learn(model)
    wanted = outputs(model)
    assert relative_error([wanted], [outputs(untouched)]) > 0.05
    for key, weight in untouched.state_dict().items():
        found = model.state_dict().get(key, model.state_dict().get(key.replace(".weight", ".base_layer.weight")))
        found = model.state_dict()[key.replace(".bias", ".base_layer.bias")] if found is None else found
        assert torch.equal(found, weight), key
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) < untouched.num_parameters()
    assert close(outputs(model, "forest"), outputs(model, "flat"))

    folder = saved(model, tmp_path / "saved", merge=merge)
    names = {"adapter_config.json", "adapter_model.safetensors"}
    assert names <= {file.name for file in folder.iterdir()} if not merge else (folder / "config.json").exists()
    assert not merge or not names & {file.name for file in folder.iterdir()}
    for layout in ("forest", "flat"):
        assert close(outputs(load_policy(folder, CONFIG), layout), wanted)
    alone = AutoModelForCausalLM.from_pretrained(folder)
    assert close(plain_logits(alone), plain_logits(model))
    assert not plain_logits(alone).equal(plain_logits(untouched))
    assert load_tokenizer(folder, CONFIG)(TEXTS[0]).input_ids == TOKENIZER(TEXTS[0]).input_ids
    assert close(outputs(model), wanted)  # saving has changed nothing


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "bert", "deberta"])
@pytest.mark.parametrize("merge", [False, True])
def test_a_scorers_head_is_trained_whole_and_saved_with_its_adapter(tmp_path: Path, name: str, merge: bool):
    encoder = AutoModelForMaskedLM if name in ("bert", "deberta") else AutoModelForCausalLM
    # A pre-trained backbone: neither a head nor, for an encoder, what pools for it.
    path = saved(from_configuration(configuration(name), encoder), tmp_path / "base")
    model = new_scorer(path, "pointwise", CONFIG, seed=0)
    choose_trained(model, CONFIG, seed=0)
    assert outputs(model).equal(torch.full((len(SEQUENCES),), -1.0))  # the head starts at zero
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole = {name for name in trained if "lora_" not in name}
    assert head_names(model) <= whole
    assert all(".pooler." in f".{name}" or name in head_names(model) for name in whole)
    assert trained - whole
    learn(model)
    wanted = outputs(model)
    folder = saved(model, tmp_path / "saved", merge=merge)
    loaded = load_scorer(folder, CONFIG)
    assert check_form(loaded) == "pointwise"
    assert close(outputs(loaded), wanted)
    alone = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    with torch.no_grad():
        theirs = alone(input_ids=FLAT.ids, attention_mask=FLAT.mask).logits[:, 0]  # type: ignore[union-attr]
    torch.testing.assert_close(theirs - 1.0, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["paper", "residual"])
def test_a_form_is_saved_with_its_adapter(base: Path, tmp_path: Path, form: str):
    model = adapted_scorer(base, form)
    loaded = load_scorer(saved(model, tmp_path / "saved"), CONFIG)
    assert (loaded.config.rdo_form, loaded.config.num_labels) == (form, 2 if form == "residual" else 1)
    assert close(outputs(loaded), outputs(model))


def test_target_modules_are_the_configs_and_unknown_ones_are_refused(base: Path, tmp_path: Path):
    config = ModelConfig(lora=LoraConfig(rank=2, alpha=3.5, target_modules=["q_proj", "v_proj"]))
    model = load_policy(base, config)
    choose_trained(model, config, seed=0)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-4] for name in names} == {"q_proj", "v_proj"}
    described = json.loads((saved(model, tmp_path / "saved") / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["lora_dropout"]) == (2, 3.5, 0.0)
    assert described["target_modules"] == ["q_proj", "v_proj"]
    config.lora.target_modules = ["c_attn"]
    with pytest.raises(UserError, match=r"target_modules=\[c_attn\] cannot be adapted in Llama.*it has .*q_proj"):
        choose_trained(load_policy(base, config), config, seed=0)


def test_the_seed_fixes_a_new_adapter(base: Path):
    def made(seed: int) -> dict[str, torch.Tensor]:
        model = load_policy(base, CONFIG)
        choose_trained(model, CONFIG, seed)
        return trained_state(model)

    one, same, other = made(0), made(0), made(1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


# What starts from an adapter


def test_an_adapter_is_trained_on_and_is_still_one_of_the_first_model(base: Path, tmp_path: Path):
    first = saved(adapted(base), tmp_path / "first")
    model = load_policy(first, CONFIG)
    choose_trained(model, CONFIG, seed=1)
    assert close(outputs(model), outputs(load_policy(first, CONFIG)))  # it starts where the first one ended
    second = saved(learn(model), tmp_path / "second")
    wanted = outputs(model)
    assert relative_error([wanted], [outputs(load_policy(first, CONFIG))]) > 0.05
    assert json.loads((second / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    shutil.rmtree(first)  # which the second needs no more
    assert close(outputs(load_policy(second, CONFIG)), wanted)
    assert close(plain_logits(AutoModelForCausalLM.from_pretrained(second)), plain_logits(model))


def test_a_scorer_on_an_adapter_is_an_adapter_with_a_head(base: Path, tmp_path: Path):
    first = saved(adapted(base), tmp_path / "first")
    model = new_scorer(first, "paper", CONFIG, seed=0)
    backbone, other = model.base_model, load_policy(first, CONFIG).base_model
    hidden = [m(input_ids=FLAT.ids, attention_mask=FLAT.mask)[0] for m in (backbone, other)]  # type: ignore[union-attr]
    assert torch.equal(*hidden)
    choose_trained(model, CONFIG, seed=0)
    folder = saved(learn(model), tmp_path / "scorer")
    assert close(outputs(load_scorer(folder, CONFIG)), outputs(model))
    weights = load_file(folder / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in weights
    assert not any("embed_tokens" in name or "lm_head" in name for name in weights)


def test_training_all_weights_merges_the_adapter_first(base: Path, tmp_path: Path):
    first = saved(adapted(base), tmp_path / "first")
    model, whole = load_policy(first, ModelConfig()), ModelConfig()
    wanted = outputs(model)
    choose_trained(model, whole, seed=0)
    assert not has_adapter(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in policy().named_parameters()}
    assert close(outputs(model), wanted)
    folder = saved(model, tmp_path / "saved")
    assert close(plain_logits(AutoModelForCausalLM.from_pretrained(folder)), plain_logits(model))


@pytest.mark.parametrize(("key", "value"), [("rank", 4), ("alpha", 32.0), ("target_modules", ["q_proj"])])
def test_another_adapter_than_the_configs_is_refused(base: Path, tmp_path: Path, key: str, value):
    first = saved(adapted(base), tmp_path / "first")
    lora = LoraConfig(**{"rank": 8, key: value})
    with pytest.raises(UserError, match=rf"^model\.lora\.{key}=.*an adapter with {key} .*model\.lora\.merge=true"):
        choose_trained(load_policy(first, CONFIG), ModelConfig(lora=lora), seed=0)


# Where the base lies


def test_a_run_folder_may_move_and_a_base_that_is_gone_is_named(tmp_path: Path):
    runs = tmp_path / "runs"
    saved(adapted(saved(policy(), runs / "sft" / "model")), runs / "align" / "model")
    wanted = outputs(load_policy(runs / "align" / "model", CONFIG))
    runs.rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "align" / "model"
    assert close(outputs(load_policy(moved, CONFIG)), wanted)
    assert given(str(moved)).key
    # What is made of a moved one knows where its base is now.
    again = load_policy(moved, CONFIG)
    choose_trained(again, CONFIG, seed=0)
    assert close(plain_logits(AutoModelForCausalLM.from_pretrained(saved(again, tmp_path / "x"))), plain_logits(again))
    shutil.rmtree(tmp_path / "moved" / "sft")
    for load in (load_policy, load_scorer):
        with pytest.raises(
            UserError, match=rf"{moved}: it is an adapter \(LoRA\) of {runs}/sft/model, .*set base_model"
        ):
            load(moved, CONFIG)


def test_a_relative_path_leads_to_the_base_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved(policy(), tmp_path / "runs" / "base")
    monkeypatch.chdir(tmp_path)
    model = adapted(Path("runs/base"))
    saved(model, Path("runs/adapter"))
    monkeypatch.chdir("/")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "adapter")
    assert close(plain_logits(alone), plain_logits(model))


def test_the_key_of_a_given_adapter_counts_its_base(base: Path, tmp_path: Path):
    folder = saved(adapted(base), tmp_path / "adapter")
    before = given(str(folder)).key
    assert given(str(folder)).key == before
    saved(policy(seed=1), base)
    assert given(str(folder)).key != before


def test_an_adapter_of_an_adapter_is_refused(base: Path, tmp_path: Path):
    first = saved(adapted(base), tmp_path / "first")
    second = shutil.copytree(first, tmp_path / "second")
    described = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps({**described, "base_model_name_or_path": str(first)}))
    with pytest.raises(UserError, match="an adapter itself"):
        load_policy(second, CONFIG)


def test_a_model_that_was_never_saved_cannot_be_adapted():
    with pytest.raises(UserError, match=r"model\.lora\.rank=8 .*from scratch"):
        choose_trained(policy(), CONFIG, seed=0)


# Adapters that others saved


def test_an_adapter_by_peft_loads_without_a_tokenizer_of_its_own(base: Path, tmp_path: Path):
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        PeftLora(r=4, target_modules=["q_proj", "down_proj"], use_rslora=True, lora_dropout=0.1, task_type="CAUSAL_LM"),
    )
    randomise(theirs.base_model)
    theirs.save_pretrained(tmp_path / "theirs")
    theirs.base_model.model.load_state_dict(
        {**theirs.base_model.model.state_dict(), **based(theirs.base_model.model, base)}, strict=False
    )
    model = load_policy(tmp_path / "theirs", CONFIG)
    assert close(plain_logits(model), plain_logits(theirs.base_model.model.eval()))
    assert all(module.p == 0.0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    assert load_tokenizer(tmp_path / "theirs", CONFIG).get_vocab() == TOKENIZER.get_vocab()


def based(model: PreTrainedModel, base: Path) -> dict[str, torch.Tensor]:
    """The base's weights under the names that they have within an adapted model."""
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    return {name: plain[key] for name in model.state_dict() if (key := name.replace(".base_layer", "")) in plain}


@pytest.mark.parametrize("merge", [False, True])
def test_a_head_that_an_adapter_unties_stays_untied(tmp_path: Path, merge: bool):
    """modules_to_save=[lm_head] on a model whose head is its embeddings: as tokens are added, say."""
    path = saved(policy("gpt2"), tmp_path / "base")
    settings = PeftLora(r=4, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["lm_head"])
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(path), settings)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = plain_logits(theirs.base_model.model.eval())
    config = ModelConfig(lora=LoraConfig(rank=4, alpha=8.0, merge=merge))
    model = load_policy(tmp_path / "theirs", config)
    assert close(plain_logits(model), wanted)
    choose_trained(model, config, seed=0)
    assert model.lm_head.weight.requires_grad
    assert not model.transformer.wte.weight.requires_grad
    folder = saved(model, tmp_path / "saved", merge=merge)
    assert close(plain_logits(load_policy(folder, config)), wanted)
    assert close(plain_logits(AutoModelForCausalLM.from_pretrained(folder)), wanted)


def test_an_adapter_from_the_hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Laid out as a download leaves it; no network is needed for what is there."""
    model = adapted(base)
    cached = tmp_path / "hub" / "models--someone--adapter"
    saved(model, cached / "snapshots" / ("a" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert close(outputs(load_policy("someone/adapter", CONFIG)), outputs(model))


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path):
    folder = saved(adapted(base), tmp_path / "adapter")
    for key, value, reason in (
        ("hidden_size", 64, "no model can be loaded"),
        ("num_hidden_layers", 1, "it has model."),
    ):
        config = configuration("llama")
        setattr(config, key, value)
        saved(from_configuration(config, AutoModelForCausalLM), base)
        with pytest.raises(UserError, match=reason) as caught:
            load_policy(folder, CONFIG)
        assert "\n" not in str(caught.value)


def test_an_adapter_without_all_of_its_weights_is_refused(base: Path, tmp_path: Path):
    folder = saved(adapted(base), tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    lost = next(name for name in weights if name.endswith("v_proj.lora_B.weight"))
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"does not fit, for it lacks {lost.removeprefix('base_model.model.')}"):
        load_policy(folder, CONFIG)


def test_a_pickled_adapter_loads_and_runs_no_code(base: Path, tmp_path: Path):
    model = adapted(base)
    folder, touched = saved(model, tmp_path / "adapter"), tmp_path / "touched"
    weights = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(weights, folder / "adapter_model.bin")
    assert close(outputs(load_policy(folder, CONFIG)), outputs(model))
    torch.save({**weights, "more": Touch(touched)}, folder / "adapter_model.bin")
    for load in (load_policy, load_scorer):
        with pytest.raises(UserError, match="no model can be loaded"):
            load(folder, CONFIG)
    assert not touched.exists()


class Touch:
    """Unpickling this would run code: it touches a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_policys_adapter_is_no_scorer(base: Path, tmp_path: Path):
    folder = saved(adapted(base), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"lacks weights of .*score\.weight; .*train one on it"):
        load_scorer(folder, CONFIG)


# What is saved of a run, and from where


def test_the_trained_state_is_all_that_a_checkpoint_needs(base: Path):
    model, other = adapted(base), load_policy(base, CONFIG)
    choose_trained(other, CONFIG, seed=5)
    state = trained_state(model)
    assert all("lora_" in name for name in state)
    load_trained_state(other, state)
    assert outputs(other).equal(outputs(model))
    whole = policy("gpt2")
    assert trained_state(whole).keys() == whole.state_dict().keys()
    fewer = ModelConfig(lora=LoraConfig(rank=4))
    smaller = load_policy(base, fewer)
    choose_trained(smaller, fewer, seed=0)
    before = outputs(smaller)
    with pytest.raises(ValueError, match=r"lora_A.*: \(8, 32\) there, \(4, 32\) here"):
        load_trained_state(smaller, state)
    assert outputs(smaller).equal(before)


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_is_saved_from_a_given_state(base: Path, tmp_path: Path, merge: bool):
    """What a sharded engine gives: plain tensors, while the model holds rounded ones, or none."""
    for model in (adapted(base), adapted_scorer(base, "residual")):
        wanted = saved(model, tmp_path / "wanted", merge=merge)
        state = {name: tensor.clone() for name, tensor in trained_state(model).items()}
        live = model.to(torch.bfloat16)  # type: ignore[arg-type]
        for parameter in live.parameters():
            parameter.data = parameter.data.new_empty(0)
        found = saved(live, tmp_path / "found", state=state, merge=merge)
        same_files(found, wanted)


def same_files(found: Path, wanted: Path) -> None:
    assert sorted(file.name for file in found.iterdir()) == sorted(file.name for file in wanted.iterdir())
    for file in wanted.iterdir():
        assert (found / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "scorer", "encoder"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_whole_model_is_saved_from_a_given_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, sharded: bool
):
    made = {"scorer": lambda: scorer("llama", "residual"), "encoder": lambda: scorer("deberta")}
    model = made.get(name, lambda: policy(name))()
    set_layout(model, "auto")
    if sharded:
        monkeypatch.setattr("rdo.pretrained.LARGEST_FILE", "20KB")
    wanted = saved(model, tmp_path / "wanted")
    assert (wanted / "model.safetensors.index.json").exists() == sharded
    # Each name a tensor of its own: those of tied weights are two here.
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
    found = saved(model, tmp_path / "found", state=state)
    same_files(found, wanted)
    assert json.loads((found / "config.json").read_text())["dtype"] == "float32"


# Whole stages

FEW = (
    "align.max_steps=2",
    "rm.max_steps=2",
    "sft.max_steps=2",
    "model.lora.rank=4",
    "loss=kto",
    "align.learning_rate=0.01",
)


def adapter_of(artifact: Artifact) -> dict[str, Any]:
    return json.loads((artifact.folder / "model" / "adapter_config.json").read_text())


def test_stages_on_a_model_from_scratch(tmp_path: Path):
    """What is made from scratch is trained whole; what follows adapts it."""
    run = tiny_run(tmp_path, *FEW, "rc=reward", "rc.negative=abs", "eval.judges=[reward]")
    base, policy, reward = base_policy(run), aligned_policy(run), scorer_artifact(run, "reward")
    assert (base.folder / "model" / "model.safetensors").exists()
    for artifact in (policy, reward):
        assert Path(adapter_of(artifact)["base_model_name_or_path"]) == base.folder / "model"
    evaluation = json.loads((evaluate_policy(run, "policy").folder / "evaluation.json").read_text())
    assert evaluation["rewards"]["reward"]["count"] == 8
    assert evaluation["log_ratio"]["value"] != 0.0
    # Without LoRA the base is the same one; another rank, or merging, makes another policy.
    others = (("model.lora.rank=null",), ("model.lora.rank=2",), ("model.lora.merge=true",))
    runs = [tiny_run(tmp_path, *FEW, *more) for more in others]
    assert {base_policy(other).folder for other in runs} == {base.folder}
    assert len({aligned_policy(other).folder for other in (*runs, tiny_run(tmp_path, *FEW))}) == 4
    assert (aligned_policy(runs[-1]).folder / "model" / "model.safetensors").exists()


def test_stages_that_go_on_from_one_adapter(tmp_path: Path):
    """sft, align and rm of a given model, each with LoRA: every one is an adapter of that model, and loads alone."""
    given_model = base_policy(tiny_run(tmp_path / "before")).folder / "model"
    run = tiny_run(tmp_path / "run", *FEW, f"model.path={given_model}", "rc=reward", "rc.negative=abs")
    artifacts = [base_policy(run), aligned_policy(run), scorer_artifact(run, "reward")]
    for artifact in artifacts:
        assert Path(adapter_of(artifact)["base_model_name_or_path"]) == given_model
    first, second = (load_file(a.folder / "model" / "adapter_model.safetensors") for a in artifacts[:2])
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for artifact in artifacts[:2]:
        alone = AutoModelForCausalLM.from_pretrained(artifact.folder / "model")
        ids = torch.tensor([[2, 3, 4, 5]])
        ours, _ = run.policy(artifact)
        assert close(alone(input_ids=ids).logits, ours(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.lora.alpha=32"], r"model\.lora\.alpha=32\.0 has no effect without model\.lora\.rank"),
        (["model.lora.merge=true"], r"model\.lora\.merge=True has no effect without"),
        (["model.lora.rank=0"], r"model\.lora\.rank=0: must be at least 1"),
        (["model.lora.rank=8", "model.lora.alpha=0"], r"model\.lora\.alpha=0\.0: must be above 0"),
        (["model.lora.rank=8", "model.lora.target_modules=[]"], r"model\.lora\.target_modules is empty"),
        (["model.lora.rank=8", "model.lora.target_modules=q_proj"], r"must be a list, such as \[a,b\]"),
        (["model.lora.rank=8", "stage=sft"], r"stage=sft makes model=toy from scratch"),
    ],
)
def test_settings_that_cannot_be_are_refused(overrides: list[str], message: str):
    with pytest.raises(UserError, match=message) as caught:
        compose_config(overrides)
    assert "\n" not in str(caught.value)


def test_peft_is_imported_only_where_an_adapter_is():
    """It takes most of a second, which no other command should wait for."""
    code = "import sys, rdo.main, rdo.stages.align; print('rdo.adapters' in sys.modules, 'peft' in sys.modules)"
    source = Path(rdo.adapters.__file__).parents[1]
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=source, check=True, capture_output=True, text=True
    ).stdout
    assert printed.split() == ["True", "False"]
