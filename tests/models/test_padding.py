"""A saved scorer gives our scores in plain transformers: one text at a time, and several of other lengths at once."""

from __future__ import annotations

from ast import literal_eval
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from helpers import TEXTS, policy, relative_error
from rdo.models.lora import choose_trained
from rdo.models.pretrained import load_scorer, new_scorer, save_model
from rdo.sequences.forward import Reads, read
from rdo.sequences.preparation import set_layout
from rdo.sequences.readout import Scalar
from rdo.settings import LoraConfig, ModelConfig

TOLERANCE = 1e-5
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
# The tiny models have 300 embeddings; the layouts below leave some of them without a token, or none.
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
# What public models have: special tokens in front of the bytes, behind them, what is declared, and the pad token that a
# saved scorer should name.
LAYOUTS = {
    "own pad token": (["<pad>", "<end>"], [], {"eos_token": "<end>", "pad_token": "<pad>"}, "<pad>"),
    "pythia": (["<|endoftext|>", "<|padding|>"], [], {"eos_token": "<|endoftext|>"}, "<|padding|>"),
    "qwen2": ([], ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {"eos_token": "<|endoftext|>"}, "<|pad|>"),
    "qwen2 base": (
        [],
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        "<|pad|>",
    ),
    "qwen2 chat": (
        [],
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML},
        "<|endoftext|>",
    ),
    # Its padding is the end of a turn, which its chat template writes.
    "chatml": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        [],
        {"eos_token": "<|endoftext|>", "pad_token": "<|im_end|>", "chat_template": CHATML},
        "<|pad|>",
    ),
    "llama 3": (
        [],
        ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{n}|>" for n in range(42))],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        "<|reserved_special_token_0|>",
    ),
    "llama 3.1": (
        [],
        ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", *(f"<|r{n}|>" for n in range(41))],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        "<|finetune_right_pad_id|>",
    ),
    "llama 2": (
        ["<unk>", "<s>", "</s>", *(f"<{n}>" for n in range(41))],
        [],
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"},
        "<unk>",
    ),
    # Its one special token is the end, and every embedding has a token: nothing is left to pad with.
    "gpt2": (
        [f"a{n}" for n in range(43)],
        ["<|endoftext|>"],
        dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
        None,
    ),
}
BASES = ["qwen2", "llama-grouped", "gpt-neox", "gpt2"]


def laid_out(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with a public model's layout of special tokens."""
    before, after, declared, _ = LAYOUTS[name]
    words = [*before, *BYTES, *after]
    core = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([word for word in (*before, *after) if word[0] == "<"])
    return PreTrainedTokenizerFast(tokenizer_object=core, **declared)


def ours(model: PreTrainedModel, sequences: list[list[int]]) -> torch.Tensor:
    reads = Reads(sequences, scalars=[[Scalar(s, len(ids) - 1)] for s, ids in enumerate(sequences)])  # type: ignore[arg-type]
    with torch.no_grad():
        return read(model, set_layout(model, "auto"), reads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("base", "lora"), [*((base, None) for base in BASES), ("qwen2", 4)])
def test_plain_transformers_gives_our_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], base: str, layout: str, lora: int | None
):
    tokens, padding = laid_out(layout), LAYOUTS[layout][3]
    given = policy(base)
    given.config.pad_token_id, given.config.eos_token_id = tokens.pad_token_id, tokens.eos_token_id
    save_model(given, tokens, tmp_path / "base")
    config = ModelConfig(lora=LoraConfig(rank=lora))
    model = new_scorer(tmp_path / "base", "pointwise", config, seed=0)
    trained = choose_trained(model, config, seed=0)
    with torch.no_grad():
        for number, weight in enumerate(w for w in model.parameters() if w.requires_grad):
            weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    texts = [text + str(tokens.eos_token) for text in TEXTS]
    wanted = ours(model, tokens(texts).input_ids)
    capsys.readouterr()
    save_model(trained, tokens, tmp_path / "scorer")

    said, how = capsys.readouterr().out, {"num_labels": 1}
    assert said.count("\n") <= 1
    if lora is not None and "pad_token_id=" in said:
        how["pad_token_id"] = literal_eval(said.rpartition("pad_token_id=")[2].strip().rstrip(")"))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer", **how).eval()
    words = AutoTokenizer.from_pretrained(tmp_path / "scorer")
    with torch.no_grad():
        single = torch.cat([plain(**words(text, return_tensors="pt")).logits[:, 0] for text in texts])
        assert relative_error([single], [wanted]) < TOLERANCE
        assert words.pad_token == padding
        if padding is not None:
            batch = plain(**words(texts, return_tensors="pt", padding=True)).logits[:, 0]
            assert relative_error([batch], [wanted]) < TOLERANCE
        else:
            assert "one text at a time" in said
    again = ours(load_scorer(tmp_path / "scorer", config), words(texts).input_ids)
    assert relative_error([again], [wanted]) < TOLERANCE
