"""Tokenizers for models from scratch: lossless, and no text can end a sequence."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import TEXTS
from rdo.data.encoding import encode
from rdo.data.records import Record
from rdo.models.tokenizers import END, make_tokenizer
from rdo.runtime.errors import UserError
from rdo.settings import ModelConfig

BYTE_PAIR = make_tokenizer(ModelConfig(tokenizer="byte_pair", vocabulary_size=280), TEXTS)
odd_texts = st.lists(st.one_of(st.text(max_size=20), st.sampled_from([END, "<pad>", "<", "end>", " ", "\n"]))).map(
    "".join
)


@given(odd_texts)
@settings(max_examples=200)
def test_byte_pairs_lose_nothing_and_no_text_ends_a_sequence(text: str):
    query = f"{text} Assistant:"
    (record,) = encode([Record("r", query, (text,))], BYTE_PAIR, "raw", max_length=10_000)
    (response,) = record.responses
    assert BYTE_PAIR.decode(record.prompt) == query
    # An end that is written out behind a text is its end.
    ended = text.rstrip().endswith(END)
    assert BYTE_PAIR.decode(response[:-1]) == (text.rstrip().removesuffix(END) if ended else text)
    assert response[-1] == BYTE_PAIR.eos_token_id
    special = {BYTE_PAIR.eos_token_id, BYTE_PAIR.pad_token_id}
    assert special.isdisjoint(record.prompt)
    assert special.isdisjoint(response[:-1])


def test_tokenizers_go_by_name(tmp_path: Path):
    assert len(BYTE_PAIR) == 280
    assert BYTE_PAIR.bos_token_id is None
    assert END in make_tokenizer(ModelConfig(tokenizer="toy"), []).get_vocab()
    BYTE_PAIR.save_pretrained(tmp_path)
    found = make_tokenizer(ModelConfig(tokenizer="path", path=str(tmp_path)), [])
    assert found.get_vocab() == BYTE_PAIR.get_vocab()
    with pytest.raises(UserError, match=r"model\.path"):
        make_tokenizer(ModelConfig(tokenizer="path"), [])
