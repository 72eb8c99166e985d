"""What models do to logits behind the backbone (scales, caps, layers of their own) is computed, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Cohere2Config,
    CohereConfig,
    CpmAntConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3nTextConfig,
    GraniteConfig,
    LlamaForCausalLM,
    ModernBertDecoderConfig,
    NanoChatConfig,
    PreTrainedConfig,
    ProphetNetConfig,
    RecurrentGemmaConfig,
)

from helpers import COMMON, GROUPED, SIZES, configuration, from_configuration, policy, randomise, relative_error
from rdo.models.pretrained import load_policy
from rdo.runtime.errors import UserError
from rdo.sequences.forward import Reads, language_head, read
from rdo.sequences.preparation import set_layout
from rdo.sequences.readout import Span, token_log_probabilities
from rdo.settings import ModelConfig
from saved import SEQUENCES, saved

TOLERANCE = 1e-5
HEADS: dict[str, tuple[PreTrainedConfig, bool]] = {}  # a configuration, and whether the head alone gives other logits


def kind(name: str, config: PreTrainedConfig, own: bool = True) -> None:
    HEADS[name] = config, own


CAPPED: dict[str, Any] = {**COMMON, **GROUPED, "head_dim": 8, "final_logit_softcapping": 3.0}
kind("plain", configuration("llama"), False)
kind("gemma2", Gemma2Config(**CAPPED))
kind("gemma2 without a cap", Gemma2Config(**{**CAPPED, "final_logit_softcapping": None}), False)
kind(
    "gemma3n",
    Gemma3nTextConfig(
        **{**CAPPED, "num_hidden_layers": 5},
        num_kv_shared_layers=0,
        laurel_rank=4,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=300,
        activation_sparsity_pattern=[0.0] * 5,
    ),
)
kind("recurrent gemma", RecurrentGemmaConfig(**COMMON, **GROUPED, lru_width=32, logits_soft_cap=3.0))
kind("nanochat", NanoChatConfig(**{**COMMON, "bos_token_id": 0}, **SIZES, final_logit_softcapping=3.0))
kind("cohere", CohereConfig(**COMMON, **SIZES, logit_scale=0.3))
kind("cohere2", Cohere2Config(**COMMON, **GROUPED, logit_scale=0.3))
kind("granite", GraniteConfig(**COMMON, **GROUPED, logits_scaling=3.0))
falcon = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "lm_head_multiplier": 0.3}
kind("falcon h1", FalconH1Config(**COMMON, **GROUPED, **falcon))
# Nothing in its config says so, but a layer of its own stands before the head.
kind("modernbert decoder", ModernBertDecoderConfig(**{**COMMON, "bos_token_id": 1}, **SIZES))
kind("bert as a decoder", BertConfig(**COMMON, **SIZES, is_decoder=True))


@pytest.mark.parametrize("name", HEADS)
def test_log_probabilities_and_gradients_are_those_of_the_models_own_logits(tmp_path: Path, name: str):
    config, own = HEADS[name]
    model = load_policy(saved(from_configuration(config, AutoModelForCausalLM), tmp_path / "model"), ModelConfig())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    spans = [Span(s, 4) for s in range(len(SEQUENCES))]

    def gradients(sums: torch.Tensor) -> list[torch.Tensor]:
        weights = torch.linspace(-1.0, 1.5, len(sums))
        return list(torch.autograd.grad((weights * sums).sum(), parameters, materialize_grads=True, allow_unused=True))

    wanted = []
    for ids in SEQUENCES:
        log_probabilities = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        wanted.append(sum(log_probabilities[place - 1, ids[place]] for place in range(4, len(ids))))
    slope = gradients(torch.stack(wanted))
    for wanted_layout in ("padded", "auto"):
        layout = set_layout(model, wanted_layout)
        found = read(model, layout, Reads(SEQUENCES, spans))
        assert relative_error(list(found), wanted) < TOLERANCE
        assert relative_error(gradients(found), slope) < TOLERANCE
    # In chunks; and the head alone gives other numbers where more than a head makes the logits.
    states, targets = torch.randn(7, 32), torch.arange(7)
    heads = language_head(model), model.get_output_embeddings()
    whole, chunks, alone = (
        token_log_probabilities(states, head, targets, budget)
        for head, budget in ((heads[0], 2**20), (heads[0], 600), (heads[1], 2**20))
    )
    assert relative_error([chunks], [whole]) < TOLERANCE
    assert (relative_error([alone], [whole]) > 1e-3) == own


PLAIN = LlamaForCausalLM.forward


def mixed(self: LlamaForCausalLM, *inputs: Any, **named: Any) -> Any:
    """Logits that depend on tokens before, behind the backbone."""
    output = PLAIN(self, *inputs, **named)
    output.logits = output.logits + output.logits.cumsum(1)
    return output


REFUSED = {
    "mixed": (policy, "the logits of LlamaForCausalLM are no function of its last hidden states"),
    "prophetnet": (
        lambda: AutoModelForCausalLM.from_config(
            ProphetNetConfig(**COMMON, hidden_size=32, decoder_ffn_dim=48, num_decoder_attention_heads=4)
        ),
        "the logits of ProphetNetForCausalLM are no function",
    ),
    "cpmant": (
        lambda: AutoModelForCausalLM.from_config(
            CpmAntConfig(**COMMON, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, dim_head=8, dim_ff=48)
        ),
        "CpmAntForCausalLM lets tokens see those that follow",
    ),
    "bert": (
        lambda: AutoModelForCausalLM.from_config(configuration("bert")),
        "BertLMHeadModel lets tokens see those that follow: it is no causal language model",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_computed_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    make, said = REFUSED[name]
    folder = saved(randomise(make()), tmp_path / "model")
    if name == "mixed":
        monkeypatch.setattr(LlamaForCausalLM, "forward", mixed)
    with pytest.raises(UserError, match=rf"^{folder}: .*{said}"):
        load_policy(folder, ModelConfig())
