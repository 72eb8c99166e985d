"""Tiny models, tokenizers and token sequences that several tests share; nothing here touches the network."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from rdo.models.tokenizers import train_byte_pair
from rdo.models.traits import without_dropout

torch.set_num_threads(1)

# As many ids as `tokenizer` has; its padding is 0, its end of sequence 1, and it has no beginning of sequence.
VOCABULARY = 300
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
SHORT_WINDOW = 5
COUNTS = ("layers", "heads", "n_layer", "n_head")  # sizes that are no widths

TEXTS = [
    "\n\nHuman: Which bread keeps for a week?\n\nAssistant:",
    " Rye does. Bake it dark, and wrap it in linen.",
    " I do not know; ask a baker.",
]


def configuration(name: str, scale: int = 1) -> PreTrainedConfig:
    """A small configuration of every architecture that the tests run; scale: times its widths, positions and window."""
    sizes, grouped, gpt2 = (
        {key: value if key.endswith(COUNTS) else scale * value for key, value in given.items()}
        for given in (SIZES, GROUPED, GPT2_SIZES)
    )
    head = {"head_dim": 8 * scale}
    made: dict[str, Any] = {
        "llama": lambda: LlamaConfig(**COMMON, **sizes),
        "llama-grouped": lambda: LlamaConfig(**COMMON, **grouped),
        "mistral-window": lambda: MistralConfig(**COMMON, **grouped, sliding_window=SHORT_WINDOW * scale),
        "qwen2": lambda: Qwen2Config(**COMMON, **grouped),
        "gpt2": lambda: GPT2Config(**COMMON, **gpt2),
        "gpt2-by-layer": lambda: GPT2Config(**COMMON, **gpt2, scale_attn_by_inverse_layer_idx=True),
        "gpt-neox": lambda: GPTNeoXConfig(**COMMON, **sizes),
        "gemma": lambda: GemmaConfig(**COMMON, **grouped, **head),
        # Layers that see everything and layers that see a window take turns.
        "gemma3": lambda: Gemma3TextConfig(
            **COMMON,
            **grouped,
            **head,
            sliding_window=SHORT_WINDOW * scale,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "gemma2": lambda: Gemma2Config(**COMMON, **grouped, **head, final_logit_softcapping=None),
        "bert": lambda: BertConfig(**COMMON, **sizes),
        "deberta": lambda: DebertaV2Config(**COMMON, **sizes, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    }
    return made[name]()


def randomise(model: PreTrainedModel, seed: int = 0, scale: float = 0.2) -> PreTrainedModel:
    """Weights large enough that attention, positions and heads all show in the outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            # Norms keep their scale of about one, only not exactly one.
            parameter.copy_(scale * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model


def policy(name: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, scale: int = 1) -> PreTrainedModel:
    """A causal language model with random weights and no dropout."""
    return from_configuration(configuration(name, scale), AutoModelForCausalLM, dtype, seed, scale)


def scorer(
    name: str = "llama", form: str = "pointwise", dtype: torch.dtype = torch.float32, scale: int = 1
) -> PreTrainedModel:
    """A scorer with random weights, its head included."""
    config = configuration(name, scale)
    config.num_labels = 2 if form == "residual" else 1
    model = from_configuration(config, AutoModelForSequenceClassification, dtype, scale=scale)
    model.config.rdo_form = form
    return model


def from_configuration(
    config: PreTrainedConfig, factory: Any, dtype: torch.dtype = torch.float32, seed: int = 0, scale: int = 1
) -> PreTrainedModel:
    """A model of a configuration and its scale."""
    model = without_dropout(factory.from_config(config, dtype=dtype))
    if dtype == torch.float64:
        keep_double(model)
    return randomise(model, seed, 0.2 * scale**-0.75)  # so that attention is as sharp as in a narrow one


def keep_double(model: PreTrainedModel) -> None:
    """transformers' RMSNorm rounds to float32 in passing, whatever the dtype; this keeps a float64 model exact."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(root_mean_square_norm, module)


def root_mean_square_norm(norm: Any, states: torch.Tensor) -> torch.Tensor:
    epsilon = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    scale = 1.0 + norm.weight if type(norm).__name__.startswith("Gemma") else norm.weight
    return scale * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + epsilon)


def tokenizer(vocabulary_size: int = VOCABULARY) -> PreTrainedTokenizerBase:
    """A byte-pair tokenizer as a run from scratch would train it."""
    return train_byte_pair(TEXTS, vocabulary_size)


def random_tree(seed: int, count: int = 8, longest: int = 20) -> list[tuple[int, ...]]:
    """Random sequences, most of which go on from some prefix of an earlier one; some are prefixes or duplicates."""
    coin = random.Random(seed)
    sequences: list[tuple[int, ...]] = []
    for _ in range(count):
        parent = coin.choice(sequences) if sequences and coin.random() < 0.8 else ()
        kept = parent[: coin.randint(0, len(parent))]
        tail = words(coin, coin.randint(0 if kept else 1, longest - len(kept)) if len(kept) < longest else 0)
        sequences.append(kept + tail)
    return sequences


def words(coin: random.Random, count: int) -> tuple[int, ...]:
    """Random ids, none of them special."""
    return tuple(coin.randrange(2, VOCABULARY) for _ in range(count))


def relative_error(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """Norm of the difference over the norm of what is wanted, all tensors taken as one vector."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(found, wanted, strict=True)]
    difference = torch.stack([(a - b).norm() for a, b in pairs]).norm()
    return float(difference / torch.stack([b.norm() for _, b in pairs]).norm())
