"""Models on disk: what is saved comes back, in transformers too; what must not be loaded is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    CohereConfig,
    ModernBertDecoderConfig,
    PreTrainedModel,
    RobertaConfig,
)

from helpers import COMMON, SIZES, TEXTS, configuration, policy, randomise, scorer, tokenizer
from rdo.errors import UserError
from rdo.forest import make_layout
from rdo.models import (
    check_vocabulary,
    head_names,
    hidden_states,
    load_policy,
    load_scorer,
    load_tokenizer,
    new_policy,
    new_scorer,
    read_log_probabilities,
    read_scalars,
    save_model,
    set_layout,
    torch_dtype,
    without_dropout,
)
from rdo.readout import Scalar, Span
from rdo.schema import ModelConfig

TOKENIZER = tokenizer()
CONFIG = ModelConfig()
SEQUENCES = [(*TOKENIZER(text).input_ids, 1) for text in TEXTS]
SPANS = [Span(s, 5) for s in range(len(SEQUENCES))]
ENDS = [[Scalar(s, len(ids) - 1)] for s, ids in enumerate(SEQUENCES)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved policy."""
    return saved(policy(), tmp_path / "policy")


def saved(model: PreTrainedModel, folder: Path) -> Path:
    save_model(model, TOKENIZER, folder)
    return folder


def log_probabilities(model: PreTrainedModel, layout: str) -> torch.Tensor:
    with torch.no_grad():
        return read_log_probabilities(model, make_layout(set_layout(model, layout), SEQUENCES), SPANS)[0]


def scores(model: PreTrainedModel, layout: str) -> torch.Tensor:
    with torch.no_grad():
        return read_scalars(model, make_layout(set_layout(model, layout), SEQUENCES), ENDS)


@pytest.mark.parametrize("name", ["llama-grouped", "gpt2", "gemma3"])
def test_a_policy_comes_back_as_it_was(tmp_path: Path, name: str):
    model = policy(name)
    wanted = log_probabilities(model, "forest")
    # Saved in the middle of a run, so under forest attention: none of that may reach the files.
    path = saved(model, tmp_path / "policy")
    assert "rdo_forest" not in (path / "config.json").read_text()
    assert torch.equal(log_probabilities(load_policy(path, CONFIG), "forest"), wanted)
    flat = make_layout("flat", SEQUENCES)
    set_layout(model, "flat")
    with torch.no_grad():
        ours = model(input_ids=flat.ids, attention_mask=flat.mask).logits  # type: ignore[union-attr]
        plain = AutoModelForCausalLM.from_pretrained(path)
        theirs = plain(input_ids=flat.ids, attention_mask=flat.mask).logits  # type: ignore[union-attr]
    assert torch.equal(ours, theirs)
    assert [file.name for file in path.iterdir() if file.suffix in (".bin", ".pt")] == []
    assert (path / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["llama-grouped", "gpt2", "bert", "deberta"])
def test_a_scorer_comes_back_as_it_was_and_transformers_reads_the_same_score(tmp_path: Path, name: str):
    model = scorer(name)
    wanted = scores(model, "auto")
    path = saved(model, tmp_path / "scorer")
    loaded = load_scorer(path, CONFIG)
    assert loaded.config.rdo_form == "pointwise"
    for key, parameter in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], parameter)
    # Weights lie in the mapped file wherever its header ends, and BLAS rounds by alignment: copied, all is bit-equal.
    torch.testing.assert_close(scores(loaded, "auto"), wanted, rtol=1e-6, atol=1e-6)
    for parameter in loaded.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(scores(loaded, "auto"), wanted)
    flat = make_layout("flat", SEQUENCES)
    plain = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        # Padding on the right, with id 0: transformers finds the last token that is not padding by its id.
        theirs = plain(input_ids=flat.ids, attention_mask=flat.mask).logits[:, 0]  # type: ignore[union-attr]
    torch.testing.assert_close(theirs, wanted, rtol=1e-5, atol=1e-5)


def test_a_form_is_saved_with_its_scorer(tmp_path: Path):
    loaded = load_scorer(saved(scorer("llama", "residual"), tmp_path / "scorer"), CONFIG)
    assert loaded.config.rdo_form == "residual"
    assert loaded.config.num_labels == 2


@pytest.mark.parametrize(("form", "outputs"), [("pointwise", 1), ("paper", 1), ("antisymmetric", 1), ("residual", 2)])
def test_a_new_scorer_starts_at_zero_on_the_policys_backbone(folder: Path, form: str, outputs: int):
    model = new_scorer(folder, form, CONFIG, seed=0)
    assert model.config.rdo_form == form
    assert model.score.weight.shape == (outputs, 32)
    assert torch.equal(scores(model, "forest"), torch.zeros(len(SEQUENCES)))
    for name, parameter in load_policy(folder, CONFIG).model.named_parameters():
        assert torch.equal(model.get_parameter(f"model.{name}"), parameter)


@pytest.mark.parametrize("config", [configuration("bert"), RobertaConfig(**COMMON, **SIZES), configuration("deberta")])
def test_a_new_scorer_takes_an_encoder_that_never_had_a_head(tmp_path: Path, config):
    """A pre-trained encoder brings no pooler and no classifier: both are new, and the seed fixes them."""
    encoder = randomise(AutoModelForMaskedLM.from_config(config))
    one, other = (new_scorer(saved(encoder, tmp_path / "encoder"), "paper", CONFIG, seed=3) for _ in range(2))
    assert torch.equal(scores(one, "auto"), torch.zeros(len(SEQUENCES)))
    for (name, parameter), (_, twin) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(parameter, twin), name


def test_a_scorer_without_its_head_is_refused(tmp_path: Path):
    """Reward heads that got lost on saving must not come back as random numbers."""
    path = saved(policy(), tmp_path / "scorer")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_labels": 1}))
    with pytest.raises(UserError, match=r"lacks weights of .*score\.weight"):
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
    with pytest.raises(UserError, match="no model can be loaded"):
        load(folder, CONFIG)
    assert not touched.exists()
    # The trap is a live one.
    with suppress(RuntimeError):
        torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert touched.exists()


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


@pytest.mark.parametrize("damage", ["empty", "truncated", "other shape", "no config", "odd config"])
def test_a_broken_folder_is_one_clear_line(folder: Path, damage: str):
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "empty":
        weights.write_bytes(b"")
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "no config":
        config.unlink()
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
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        load_tokenizer(folder, CONFIG)


def test_ids_without_an_embedding_are_refused(folder: Path):
    model = policy()
    check_vocabulary(model, load_tokenizer(folder, CONFIG), folder)
    with pytest.raises(UserError, match="301 ids, the model only 300"):
        check_vocabulary(model, tokenizer(301), folder)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (configuration("gemma2"), None),
        (CohereConfig(**COMMON, **SIZES), "logit_scale"),
        # Nothing in its config says so, but a layer of its own stands before the head.
        (ModernBertDecoderConfig(**{**COMMON, "bos_token_id": 1}, **SIZES), "around the head"),
    ],
)
def test_logits_that_are_not_the_heads_are_refused(tmp_path: Path, config, reason: str | None):
    model = randomise(AutoModelForCausalLM.from_config(config))
    if reason is None:
        load_policy(saved(model, tmp_path / "neutral"), CONFIG)
        model.config.final_logit_softcapping, reason = 30.0, "final_logit_softcapping"
    with pytest.raises(UserError, match=reason):
        load_policy(saved(model, tmp_path / "model"), CONFIG)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_dropout_is_off_even_in_training_mode(tmp_path: Path, name: str):
    config = configuration(name)
    for key in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, key):
            setattr(config, key, 0.5)
    layout = make_layout("flat", SEQUENCES)
    model = randomise(AutoModelForCausalLM.from_config(config)).train()
    assert not torch.equal(hidden_states(model, layout), hidden_states(model, layout))
    path = saved(model, tmp_path / "policy")
    for quiet in (without_dropout(model), load_policy(path, CONFIG), new_scorer(path, "paper", CONFIG, 0)):
        quiet.train()
        assert torch.equal(hidden_states(quiet, layout), hidden_states(quiet, layout))


def test_the_seed_fixes_a_new_policy():
    one, same, other = (new_policy(CONFIG, TOKENIZER, seed) for seed in (0, 0, 1))
    weights = [model.lm_head.weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert one.config.eos_token_id == TOKENIZER.eos_token_id


def test_the_dtype_is_the_configs(folder: Path):
    assert load_policy(folder, ModelConfig(dtype="bfloat16")).dtype == torch.bfloat16
    assert load_policy(folder, ModelConfig(dtype="float64")).dtype == torch.float64
    with pytest.raises(UserError, match=r"model\.dtype=float8"):
        torch_dtype("float8")


def test_the_head_is_found():
    assert head_names(scorer("llama")) == {"score.weight"}
    assert head_names(scorer("bert")) == {"classifier.weight", "classifier.bias"}
    roberta = AutoModelForSequenceClassification.from_config(RobertaConfig(**COMMON, **SIZES))
    assert head_names(roberta) == {"classifier.out_proj.weight", "classifier.out_proj.bias"}
