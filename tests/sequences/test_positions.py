"""The longest sequence that a model takes, and no more: what is longer is refused by name, and changes no number."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CamembertConfig,
    Data2VecTextConfig,
    IBertConfig,
    LongformerConfig,
    MPNetConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
    XmodConfig,
)

from helpers import COMMON, GROUPED, SIZES, configuration, from_configuration, relative_error, words
from rdo.runtime.errors import UserError
from rdo.sequences.forward import Reads, read
from rdo.sequences.layout import Padded
from rdo.sequences.preparation import set_layout
from rdo.sequences.readout import Scalar, Span

COIN = random.Random(0)
# RoBERTa's own ids: padding is 1.
ENCODER: dict[str, Any] = {**COMMON, **SIZES, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
THETA = {"rope_theta": 10000.0}


def longrope() -> dict[str, Any]:
    """Positions that turn otherwise in all of a batch, once a sequence of it has more than 64 tokens."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    return {**THETA, **factors, "rope_type": "longrope", "original_max_position_embeddings": 64}


def roped(config: PreTrainedConfig, rope: dict[str, Any]) -> PreTrainedConfig:
    config.rope_parameters = rope
    return config


BY_LAYER = {"sliding_attention": {**THETA, "rope_type": "default"}, "full_attention": longrope()}
DYNAMIC = {**THETA, "rope_type": "dynamic", "factor": 4.0}
COUNTED = (RobertaConfig, XLMRobertaConfig, CamembertConfig, Data2VecTextConfig, MPNetConfig, IBertConfig)
# A configuration, the longest sequence, and what a longer one is told.
LIMITS: dict[str, tuple[PreTrainedConfig, int, str]] = {
    **{made.model_type: (made(**ENCODER), 254, "takes 254, as it counts positions from 2") for made in COUNTED},
    "xmod": (XmodConfig(**ENCODER, languages=["en"], default_language="en"), 254, "takes 254, as it counts"),
    "longformer": (LongformerConfig(**ENCODER, attention_window=8), 254, "takes 254, as it counts"),
    "bert": (configuration("bert"), 256, "takes 256; lower"),
    "gpt2": (configuration("gpt2"), 256, "takes 256; lower"),
    "opt": (OPTConfig(**COMMON, **SIZES, word_embed_proj_dim=32, ffn_dim=48), 256, "takes 256; lower"),
    "longrope": (
        Phi3Config(**COMMON, **GROUPED, rope_parameters=longrope(), original_max_position_embeddings=64),
        64,
        "takes 64, because more would change its rope_type=longrope for all",
    ),
    "longrope by layer": (roped(configuration("gemma3"), BY_LAYER), 64, "takes 64, because .* rope_type=longrope"),
    "dynamic rope": (roped(configuration("llama-grouped"), DYNAMIC), 256, "takes 256; lower"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_longest_sequence_runs_beside_a_short_one_and_one_more_token_is_refused(name: str):
    config, longest, said = LIMITS[name]
    encoder = "rope" not in name and name not in ("gpt2", "opt")
    config.num_labels = 1
    factory = AutoModelForSequenceClassification if encoder else AutoModelForCausalLM
    model = from_configuration(config, factory)
    set_layout(model, "padded")

    def reads(*sequences: tuple[int, ...]) -> Reads:
        if encoder:
            return Reads(list(sequences), scalars=[[Scalar(s, 0)] for s in range(len(sequences))])
        return Reads(list(sequences), [Span(s, 1) for s in range(len(sequences))])

    sequences = words(COIN, 20), words(COIN, longest)
    with torch.no_grad():
        alone = torch.cat([read(model, "padded", reads(sequence)) for sequence in sequences])
        assert relative_error([read(model, "padded", reads(*sequences))], [alone]) < 1e-5
        more = (*sequences[1], 5)
        with pytest.raises(UserError, match=f"a sequence of {longest + 1} tokens, but .* {said}"):
            read(model, "padded", reads(sequences[0], more))
        # The limit is the model's own: past it there is no position, or a longer sequence changes a shorter one.
        layout = Padded([sequences[0], more])
        try:
            both = model(input_ids=layout.ids, attention_mask=layout.mask)[0][0, : 1 if encoder else 20]
        except (IndexError, RuntimeError):
            return
        single = model(input_ids=layout.ids[:1, :20])[0][0]
        assert relative_error([both], [single]) > 1e-3
