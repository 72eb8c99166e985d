"""Tokens a micro-batch, by the memory that is free."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

import rdo.sequences.budget
from rdo.runtime.stopping import Stopped
from rdo.sequences.budget import fitting, free_memory
from rdo.settings import EngineConfig
from rdo.stages.sft import base_policy
from rdo.tracking import Tracker
from tiny import metrics, tiny_run, weights

SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
SMALL = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)


def made(config: LlamaConfig | GPT2Config) -> PreTrainedModel:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("config", "gigabytes", "trained", "checkpointed", "tokens"),
    [
        # Measured: 5,200 tokens of it take 9.4 GB in all, 1.4 MB a token.
        (SMOLLM2, 24, True, False, 4096),
        (SMOLLM2, 8, True, False, 1024),
        (SMOLLM2, 4, True, False, 256),
        (SMOLLM2, 128, True, False, 16384),
        (SMOLLM2, 8, True, True, 16384),
        (SMOLLM2, 8, False, False, 16384),
        (SMALL, 2, True, False, 16384),
        (GPT2Config(), 24, True, False, 8192),
    ],
)
def test_the_budget_suits_the_model_and_the_memory(
    config: LlamaConfig, gigabytes: float, trained: bool, checkpointed: bool, tokens: int
) -> None:
    engine = EngineConfig(gradient_checkpointing=checkpointed)
    assert fitting(made(config), engine, trained, gigabytes * 1e9) == tokens


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = free_memory(torch.device("cpu"))
    for text, expected in (("max", None), ("1000000", 1e6), (str(2**62), None)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr(rdo.sequences.budget, "LIMITS", [tmp_path / "memory.max", tmp_path / "none"])
        found = free_memory(torch.device("cpu"))
        assert found == (expected or pytest.approx(whole, rel=0.5))


def test_a_run_that_goes_on_keeps_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is free then; so it has the same bits."""
    run = tiny_run(tmp_path, "sft.max_steps=4", "engine.tokens_per_micro_batch=null")
    monkeypatch.setattr(rdo.sequences.budget, "free_memory", lambda device: 1e12)
    whole = base_policy(run)
    wanted = weights(whole), metrics(whole)
    shutil.rmtree(whole.folder)
    log = Tracker.log

    def stopping(tracker: Tracker, step: int, values: dict[str, float]) -> None:
        log(tracker, step, values)
        if step == 2:
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(Tracker, "log", stopping)
        with pytest.raises(Stopped):
            base_policy(run)
    monkeypatch.setattr(rdo.sequences.budget, "free_memory", lambda device: 1e6)
    assert (weights(base_policy(run)), metrics(whole)) == wanted
    assert capsys.readouterr().out.count("layout tree, 16384 tokens a micro-batch") == 3
