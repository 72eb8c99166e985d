"""Tokenizers for models that are built from scratch: the toy world's, or a byte-pair one trained on the queries."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rdo.data import toy
from rdo.models.pretrained import load_tokenizer
from rdo.runtime.errors import UserError
from rdo.settings import ModelConfig

PAD, END = "<pad>", "<end>"


def make_tokenizer(config: ModelConfig, texts: Iterable[str]) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer that model.tokenizer names; `texts` are what a byte-pair one is trained on."""
    if config.tokenizer == "toy":
        return toy.tokenizer()
    if config.tokenizer == "byte_pair":
        return train_byte_pair(texts, config.vocabulary_size)
    if config.path is None:
        raise UserError("model.tokenizer=path takes the tokenizer of model.path, which is not set")
    return load_tokenizer(config.path, config)


def train_byte_pair(texts: Iterable[str], vocabulary_size: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level byte-pair tokenizer: lossless on any text, `<end>` ends a sequence, no beginning-of-sequence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )
