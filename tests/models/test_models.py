"""Models on disk: what is saved comes back, in transformers too, and what cannot be read exactly is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    RobertaConfig,
)

from helpers import COMMON, SIZES, configuration, policy, randomise, scorer, tokenizer
from rdo.data.encoding import find_ending
from rdo.models.generation import find_stops, generate_batch
from rdo.models.pretrained import load_policy, load_scorer, load_tokenizer, new_policy, new_scorer, save_model
from rdo.models.traits import head_names, without_dropout
from rdo.runtime.errors import UserError
from rdo.sequences.forward import Reads, hidden_states, read
from rdo.sequences.readout import Scalar
from rdo.settings import EvalConfig, ModelConfig
from rdo.stages.evaluate import evaluate_policy
from saved import FLAT, SEQUENCES, TOKENIZER, outputs, plain_logits, saved
from tiny import tiny_run

CONFIG = ModelConfig()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved policy."""
    return saved(policy(), tmp_path / "policy")


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, None) for name in ("llama-grouped", "gpt2", "gemma3")),
        *((name, "pointwise") for name in ("llama-grouped", "gpt2", "bert", "deberta")),
        ("llama", "residual"),
    ],
)
def test_a_model_comes_back_as_it_was_and_transformers_reads_the_same(tmp_path: Path, name: str, form: str | None):
    model = policy(name) if form is None else scorer(name, form)
    wanted = outputs(model)
    # Saved in the middle of a run, so under tree attention: none of that may reach the files.
    path = saved(model, tmp_path / "model")
    assert "rdo_tree" not in (path / "config.json").read_text()
    assert (path / "model.safetensors").exists()
    loaded = load_policy(path, CONFIG) if form is None else load_scorer(path, CONFIG)
    if form is not None:
        assert (loaded.config.rdo_form, loaded.config.num_labels) == (form, 2 if form == "residual" else 1)
    # Weights lie in the mapped file wherever its header ends, and BLAS rounds by alignment: copied, all is bit-equal.
    for parameter in loaded.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(outputs(loaded), wanted)
    # Padding is on the right, with id 0: transformers finds the last token of a row by that.
    factory = AutoModelForCausalLM if form is None else AutoModelForSequenceClassification
    theirs = plain_logits(factory.from_pretrained(path))
    torch.testing.assert_close(theirs, plain_logits(model), rtol=1e-6, atol=1e-6)
    if form is not None:
        torch.testing.assert_close(theirs[:, 0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("form", "labels"), [("pointwise", 1), ("paper", 1), ("antisymmetric", 1), ("residual", 2)])
def test_a_new_scorer_starts_at_zero_on_the_policys_backbone(folder: Path, form: str, labels: int):
    model = new_scorer(folder, form, CONFIG, seed=0)
    assert model.config.rdo_form == form
    assert model.score.weight.shape == (labels, 32)
    assert torch.equal(outputs(model, "tree"), torch.zeros(len(SEQUENCES)))
    for name, parameter in load_policy(folder, CONFIG).model.named_parameters():
        assert torch.equal(model.get_parameter(f"model.{name}"), parameter)


@pytest.mark.parametrize("config", [configuration("bert"), RobertaConfig(**COMMON, **SIZES), configuration("deberta")])
def test_a_new_scorer_takes_an_encoder_that_never_had_a_head(tmp_path: Path, config):
    """A pre-trained encoder brings no pooler and no classifier: both are new, and the seed fixes them."""
    encoder = randomise(AutoModelForMaskedLM.from_config(config))
    one, other = (new_scorer(saved(encoder, tmp_path / "encoder"), "paper", CONFIG, seed=3) for _ in range(2))
    assert torch.equal(outputs(one), torch.zeros(len(SEQUENCES)))
    for (name, parameter), (_, twin) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(parameter, twin), name


def test_a_tokenizer_without_padding_is_enough(tmp_path: Path):
    """Neither the tokenizer nor the model's config has a padding token: a scorer is trained, scores, and is a judge."""
    words, model = tokenizer(), policy()
    words.pad_token = None
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    save_model(model, words, tmp_path / "policy")
    assert load_tokenizer(tmp_path / "policy", CONFIG).pad_token_id is None
    given = [f"model.path={tmp_path}/policy", "sft.enabled=false", "rm.max_steps=2", "dataset.max_length=240"]
    run = tiny_run(tmp_path / "run", *given, "eval.judges=[reward]", "eval.batch_size=3")
    evaluation = json.loads((evaluate_policy(run, "base").folder / "evaluation.json").read_text())
    assert evaluation["rewards"]["reward"]["count"] == 8


def test_ids_without_an_embedding_are_refused():
    """Which would otherwise end in an index out of range in the middle of training."""
    for model in (policy(), scorer("bert")):
        with pytest.raises(UserError, match=r"the token id 300, but .* has 300 embeddings only"):
            read(model, "padded", Reads([(5, 300), (6, 7)], scalars=[[Scalar(0, 1)]]))
    model = policy()
    stops = find_stops(model, TOKENIZER, find_ending("raw", TOKENIZER))
    with pytest.raises(UserError, match="the token id 300"):
        generate_batch(model, TOKENIZER, [(5, 300)], EvalConfig(), 0, stops)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_dropout_is_off_even_in_training_mode(tmp_path: Path, name: str):
    config = configuration(name)
    for key in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, key):
            setattr(config, key, 0.5)
    model = randomise(AutoModelForCausalLM.from_config(config)).train()
    assert not torch.equal(hidden_states(model, FLAT), hidden_states(model, FLAT))
    path = saved(model, tmp_path / "policy")
    for quiet in (without_dropout(model), load_policy(path, CONFIG), new_scorer(path, "paper", CONFIG, 0)):
        quiet.train()
        assert torch.equal(hidden_states(quiet, FLAT), hidden_states(quiet, FLAT))


def test_the_seed_fixes_a_new_policy():
    one, same, other = (new_policy(CONFIG, TOKENIZER, seed) for seed in (0, 0, 1))
    weights = [model.lm_head.weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert one.config.eos_token_id == TOKENIZER.eos_token_id


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_is_the_configs(folder: Path, dtype: torch.dtype):
    assert load_policy(folder, ModelConfig(dtype=str(dtype).removeprefix("torch."))).dtype == dtype


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("llama", {"score.weight"}),
        ("bert", {"classifier.weight", "classifier.bias"}),
        ("roberta", {"classifier.out_proj.weight", "classifier.out_proj.bias"}),
    ],
)
def test_the_head_is_found(name: str, names: set[str]):
    roberta = RobertaConfig(**COMMON, **SIZES)
    model = AutoModelForSequenceClassification.from_config(roberta) if name == "roberta" else scorer(name)
    assert head_names(model) == names
