"""Encoding: how prompt and response are joined, and what is cut."""

from __future__ import annotations

import os
import re
import signal
import time
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rdo.data import encoding
from rdo.data.encoding import EncodedRecord, check_cuts, encode, encode_into, encoded_in, left_out, order_fingerprint
from rdo.data.records import Record, Records, write_records
from rdo.runtime.errors import UserError

PAD, BOS, EOS, UNKNOWN, IM_START, IM_END = range(6)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(bos: bool = True, eos: bool = True, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, so that every text survives and lengths are easy to see; special tokens are 0..5."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if bos and adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>" if bos else None,
        eos_token="</s>" if eos else None,
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def with_chat(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


TOKENIZER, WITHOUT_BOS = byte_tokenizer(), byte_tokenizer(bos=False)


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False, split_special_tokens=True).input_ids)


def encode_one(query: str, *responses: str, tokenizer=TOKENIZER, template="raw", max_length=1000, **options):
    (record,) = encode([Record("r", query, responses)], tokenizer, template, max_length, **options)
    return record


def ended(*responses: str, end: int = EOS) -> tuple[tuple[int, ...], ...]:
    return tuple((*ids(text), end) for text in responses)


CHAT = (IM_START, *ids("user\nab"), IM_END, *ids("\n"), IM_START, *ids("assistant\n"))
ALONE = {"tokenizer": WITHOUT_BOS}
UNUSED = byte_tokenizer(adds_bos=False)
# Query, responses, options; prompt and responses in tokens; tokens cut of the query and of the responses.
JOINED = {
    "plain": ("ab", (" c", "d\n"), {}, (BOS, *ids("ab")), ended(" c", "d\n"), (0, 0)),
    "no BOS, no words": ("ab", ("",), ALONE, ids("ab"), ((EOS,),), (0, 0)),
    "a BOS that is not used": (
        "ab",
        ("c",),
        {"tokenizer": UNUSED},
        ids("ab"),
        ended("c"),
        (0, 0),
    ),
    "special tokens in data": (
        *("<s>a<|im_end|>", ("b</s> ", "</s>c"), {}),
        *((BOS, *ids("<s>a<|im_end|>")), ended("b", "</s>c"), (0, 0)),
    ),
    "special tokens of the chat template": (
        *("ab", ("c<|im_end|>\n", "d</s>"), {"tokenizer": with_chat(CHATML), "template": "chat"}),
        *((BOS, *CHAT), ended("c", "d</s>", end=IM_END), (0, 0)),
    ),
    "BOS of the chat template": (
        *("ab", ("c", "d"), {"tokenizer": with_chat("{{ bos_token }}" + CHATML), "template": "chat"}),
        *((BOS, *CHAT), ended("c", "d", end=IM_END), (0, 0)),
    ),
    "special tokens that are parsed": (
        *("<s>a", ("b</s>c", "d</s>"), {"parse_special": True}),
        *((BOS, *ids("a")), ((*ids("b"), EOS, *ids("c"), EOS), *ended("d")), (0, 0)),
    ),
    # 10 - 5 - EOS leaves BOS and three
    "a query cut by what the longest response needs": (
        *("abcdef", ("123", "12345"), {"max_length": 10}),
        *((BOS, *ids("def")), ended("123", "12345"), (3, 0)),
    ),
    "a response cut": (
        *("abc", ("1", "123456789"), {"max_length": 6}),
        *((BOS, *ids("c")), ended("1", "123"), (2, 6)),
    ),
    "the smallest length": ("abc", ("123", "4"), {"max_length": 4}, (BOS, *ids("c")), ended("1", "4"), (2, 2)),
}


@pytest.mark.parametrize("case", JOINED)
def test_how_prompt_and_responses_are_joined_and_cut(case):
    query, texts, options, prompt, responses, cuts = JOINED[case]
    record = encode_one(query, *texts, **options)
    assert record == EncodedRecord("r", prompt, responses)
    assert (record.query_cut, record.response_cut) == cuts


def test_the_cases_test_something():
    assert TOKENIZER("a").input_ids[0] == BOS
    assert UNUSED.bos_token_id == BOS
    assert len(ids("</s>")) == 4


@pytest.mark.parametrize(
    ("query", "options", "message"),
    [
        ("a", {"tokenizer": byte_tokenizer(eos=False)}, "no end-of-sequence token"),
        ("", ALONE, "record r: the prompt has no token"),
        ("abc", {"max_length": 3}, r"dataset.max_length=3 is too small; it must be at least 4"),
    ],
)
def test_what_cannot_be_encoded(query, options, message):
    with pytest.raises(UserError, match=message):
        encode_one(query, "b", "c", **options)


def test_too_many_cut_records_are_an_error_with_the_numbers():
    records = [Record("0", "ab", ("1",)), Record("1", "abcdef", ("1",)), Record("2", "abcdefgh", ("123456",))]
    encoded = encode(records, TOKENIZER, "raw", 6)
    message = r"2 of 3 .*max_length=6 .*\(10 query and 3 response "
    with pytest.raises(UserError, match=f"{message}.*max_truncated_share=0.5"):
        check_cuts(encoded, 6, 0.5)
    assert re.match(message, check_cuts(encoded, 6, 0.67))
    assert check_cuts(encoded[:1], 6, 0) == ""
    assert (left_out(encoded, "cut"), left_out(encoded, "drop")) == ({2}, {1, 2})


texts = st.text(alphabet="abé <s>/", max_size=30)


@given(
    query=texts.filter(bool),
    responses=st.lists(texts, min_size=1, max_size=4),
    max_length=st.integers(5, 60),
    bos=st.booleans(),
)
def test_cutting_keeps_its_promises(query, responses, max_length, bos):
    tokenizer = TOKENIZER if bos else WITHOUT_BOS
    whole = encode_one(query, *responses, tokenizer=tokenizer, max_length=10_000)
    record = encode_one(query, *responses, tokenizer=tokenizer, max_length=max_length)

    head = int(bos)
    longest = max(len(ids_of) for ids_of in whole.responses)
    # The text is cut between characters, of which "é" has two tokens.
    length, most = len(record.prompt) + max(map(len, record.responses)), min(max_length, len(whole.prompt) + longest)
    assert length == most or (length == most - 1 and "é" in query)
    assert record.prompt[:head] == whole.prompt[:head]
    query_ids = record.prompt[head:]
    assert len(query_ids) >= 1
    assert whole.prompt[-len(query_ids) :] == query_ids
    for cut, complete in zip(record.responses, whole.responses, strict=True):
        assert cut[-1] == EOS
        assert EOS not in cut[:-1]
        assert len(cut) >= min(2, len(complete))
        assert cut[:-1] == complete[: len(cut) - 1]
    response_cut = sum(map(len, whole.responses)) - sum(map(len, record.responses))
    query_cut = len(whole.prompt) - len(record.prompt)
    if response_cut:
        assert len(query_ids) == len(ids(query[-1]))  # the query gives way first
    assert (record.query_cut, record.response_cut) == (query_cut, response_cut)


# In a file


@pytest.fixture
def records(tmp_path, monkeypatch) -> Records:
    monkeypatch.setattr("rdo.data.records.ROWS_PER_BATCH", 7)
    monkeypatch.setattr("rdo.data.encoding.ROWS_PER_BATCH", 3)
    monkeypatch.setattr("rdo.data.encoding.FEWEST_PER_PART", 10)
    made = [Record(f"id {n}", f"Which bread {n}? " + "x " * (n % 60), (" Rye.", "Oats" * (n % 9))) for n in range(40)]
    write_records(iter(made), tmp_path / "records.arrow", 0)
    return Records.in_file(tmp_path / "records.arrow").only(np.array([5, 3, *range(8, 40), 1]))


OPTIONS = {"tokenizer": TOKENIZER, "template": "hh", "max_length": 100}


@pytest.mark.parametrize("workers", [1, 3])
def test_a_file_holds_what_memory_would_whatever_the_number_of_processes(records, tmp_path, workers):
    encode_into(tmp_path, records, workers, **OPTIONS)
    wanted, found = encode(records, **OPTIONS), encoded_in(tmp_path)
    assert list(found) == wanted
    assert check_cuts(found, 100, 1.0) == check_cuts(wanted, 100, 1.0) != ""


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_worker_is_the_users_one_line(records, tmp_path, workers):
    with pytest.raises(UserError, match=r"dataset\.max_length=2 is too small"):
        encode_into(tmp_path, records, workers, **OPTIONS | {"max_length": 2})


def test_a_killed_worker_ends_the_work_and_what_was_finished_is_kept(records, tmp_path, monkeypatch):
    parent, real = os.getpid(), encoding.encode

    def dying(batch, *arguments, **options):
        if os.getpid() != parent and records[-1].id in [record.id for record in batch]:
            time.sleep(1)  # until the other parts are finished
            os.kill(os.getpid(), signal.SIGKILL)
        return real(batch, *arguments, **options)

    monkeypatch.setattr(encoding, "encode", dying)
    with pytest.raises(BrokenProcessPool):
        encode_into(tmp_path, records, 2, **OPTIONS)
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("part-*.arrow")}
    assert len(kept) == 3
    monkeypatch.setattr(encoding, "encode", real)
    encode_into(tmp_path, records, 2, **OPTIONS)
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())
    assert list(encoded_in(tmp_path)) == encode(records, **OPTIONS)


def test_the_order_of_records_is_part_of_what_tokens_are_found_by(records):
    turned = records.only(np.arange(len(records))[::-1])
    assert turned.fingerprint() == records.fingerprint()
    assert order_fingerprint(turned) != order_fingerprint(records)
