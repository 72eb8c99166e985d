"""Adapters that others saved, by peft: they load, merged, as peft itself runs them, or are refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from helpers import configuration, from_configuration, policy
from rdo.models.pretrained import load_policy, load_tokenizer, new_scorer
from rdo.runtime.errors import UserError
from rdo.settings import ModelConfig
from saved import TOKENIZER, close, plain_logits, saved

CONFIG = ModelConfig()

THEIRS = [
    ("llama", {"use_rslora": True, "lora_dropout": 0.1, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}),
    # A head that is its model's embeddings, and that the adapter unties: as tokens are added, say.
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["lm_head"]}),
]


# How what was resized is adapted: not at all, whole, or by matrices of its own.
RESIZED: dict[str, dict[str, Any]] = {
    "frozen": {"target_modules": ["q_proj", "v_proj"]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "adapted": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize(("name", "settings"), THEIRS)
def test_an_adapter_by_peft_loads_without_a_tokenizer_of_its_own(tmp_path: Path, name: str, settings: dict[str, Any]):
    path, folder = saved(policy(name), tmp_path / "base"), tmp_path / "theirs"
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(path), PeftLora(r=4, **settings))
    for number, parameter in enumerate(theirs.parameters()):
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.2, generator=torch.Generator().manual_seed(number))
    theirs.save_pretrained(folder)
    model = load_policy(folder, CONFIG)
    assert close(plain_logits(model), plain_logits(theirs))
    assert load_tokenizer(folder, CONFIG).get_vocab() == TOKENIZER.get_vocab()
    again = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / "saved"))
    assert close(plain_logits(again), plain_logits(theirs))


@pytest.mark.parametrize("rows", [300, 310])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", RESIZED)
def test_an_adapter_whose_embeddings_were_resized_loads(tmp_path: Path, name: str, tied: bool, rows: int):
    """As tokens are added (a chat format's, say) before an adapter is trained."""
    config = configuration("llama")
    config.tie_word_embeddings = tied
    path, folder = saved(from_configuration(config, AutoModelForCausalLM), tmp_path / "base"), tmp_path / "theirs"
    resized = AutoModelForCausalLM.from_pretrained(path)
    resized.resize_token_embeddings(rows, mean_resizing=False)
    theirs = get_peft_model(resized, PeftLora(r=4, **RESIZED[name]))
    for number, parameter in enumerate(theirs.parameters()):
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.2, generator=torch.Generator().manual_seed(number))
    theirs.save_pretrained(folder)
    if name == "adapted" and rows != 300 and not tied:  # peft does not save the head's new rows
        with pytest.raises(UserError, match=r"trained with 310 embeddings, and brings no weights .* \['lm_head'\]"):
            load_policy(folder, CONFIG)
        return
    loaded = load_policy(folder, CONFIG)
    assert len(loaded.get_input_embeddings().weight) == loaded.config.vocab_size == rows
    assert close(plain_logits(loaded), plain_logits(theirs))
    again = AutoModelForCausalLM.from_pretrained(saved(loaded, tmp_path / "saved"))
    assert close(plain_logits(again), plain_logits(theirs))
    score = new_scorer(folder, "pointwise", CONFIG, 0)
    assert torch.equal(score.model.embed_tokens.weight, loaded.model.embed_tokens.weight)
