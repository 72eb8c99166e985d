"""Encoding: how prompt and response are joined, and what is cut."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rdo.data import encoding
from rdo.data.encoding import EncodedRecord, MappedTokens, TruncationReport, encode, encode_into, order_fingerprint
from rdo.data.records import Record
from rdo.data.table import Records, write_records
from rdo.runtime.errors import UserError

PAD, BOS, EOS, UNKNOWN, IM_START, IM_END = range(6)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(bos: bool = True, eos: bool = True, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, so that every text survives and lengths are easy to see; special tokens are 0..5."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>" if bos else None,
        eos_token="</s>" if eos else None,
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


TOKENIZER = byte_tokenizer()


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False, split_special_tokens=True).input_ids)


def encode_one(query: str, *responses: str, tokenizer=TOKENIZER, template="raw", max_length=1000, **options):
    records = [Record("r", query, responses)]
    (record,), report = encode(records, tokenizer, template, max_length, **options)
    return record, report


def with_chat(template: str, **options: bool) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(**options)
    tokenizer.chat_template = template
    return tokenizer


# Joining


def test_prompt_begins_with_bos_and_responses_end_with_eos():
    record, report = encode_one("ab", " c", "d\n")
    assert record.id == "r"
    assert record.prompt == (BOS, *ids("ab"))
    assert record.responses == ((*ids(" c"), EOS), (*ids("d\n"), EOS))
    assert report == TruncationReport(records=1)
    assert encode_one("ab", "", tokenizer=byte_tokenizer(bos=False))[0] == EncodedRecord("r", ids("ab"), ((EOS,),))


def test_a_tokenizer_that_adds_bos_itself_gets_it_once():
    tokenizer = byte_tokenizer(adds_bos=True)
    assert tokenizer("a").input_ids[0] == BOS  # else the test would test nothing
    record, _ = encode_one("ab", "c", "d", tokenizer=tokenizer)
    assert record.prompt == (BOS, *ids("ab"))
    assert record.responses == ((*ids("c"), EOS), (*ids("d"), EOS))


def test_bos_written_by_the_chat_template_is_not_doubled():
    record, _ = encode_one("ab", "c", "d", tokenizer=with_chat("{{ bos_token }}" + CHATML), template="chat")
    assert record.prompt.count(BOS) == 1
    assert record.prompt[:2] == (BOS, IM_START)


def test_special_tokens_in_data_stay_text():
    record, _ = encode_one("<s>a<|im_end|>", "b</s>", "</s>c")
    assert record.prompt == (BOS, *ids("<s>a<|im_end|>"))
    assert record.responses == ((*ids("b</s>"), EOS), (*ids("</s>c"), EOS))
    assert len(ids("</s>")) == 4


def test_special_tokens_count_in_the_chat_template_but_not_in_responses():
    record, _ = encode_one("ab", "c<|im_end|>", "d", tokenizer=with_chat(CHATML), template="chat")
    opening = (IM_START, *ids("assistant\n"))
    assert record.prompt == (BOS, IM_START, *ids("user\nab"), IM_END, *ids("\n"), *opening)
    assert record.responses[0] == (*ids("c<|im_end|>"), EOS)


def test_parse_special_makes_tokens_of_them_and_ends_once():
    record, _ = encode_one("<s>a", "b</s>c", "d</s>", parse_special=True)
    assert record.prompt == (BOS, *ids("a"))
    assert record.responses == ((*ids("b"), EOS, *ids("c"), EOS), (*ids("d"), EOS))


def test_what_cannot_be_encoded():
    with pytest.raises(UserError, match="no end-of-sequence token"):
        encode_one("a", "b", "c", tokenizer=byte_tokenizer(eos=False))
    with pytest.raises(UserError, match="record r: the prompt has no token"):
        encode_one("", "b", "c", tokenizer=byte_tokenizer(bos=False))


def test_many_records_keep_their_order():
    records = [Record(str(number), f"q{number}", (f"a{number}", f"b{number}")) for number in range(1203)]
    encoded, report = encode(records, TOKENIZER, "raw", 100)
    assert [record.id for record in encoded] == [record.id for record in records]
    assert encoded[1100].prompt == (BOS, *ids("q1100"))
    assert encoded[1100].responses[1] == (*ids("b1100"), EOS)
    assert report.records == 1203
    assert encode([], TOKENIZER, "raw", 100) == ([], TruncationReport())


# Cutting


def test_the_query_is_cut_from_the_left_by_what_the_longest_response_needs():
    record, report = encode_one("abcdef", "123", "12345", max_length=10)
    assert record.prompt == (BOS, *ids("def"))  # 10 - 5 - EOS leaves BOS and three
    assert record.responses == ((*ids("123"), EOS), (*ids("12345"), EOS))
    assert report == TruncationReport(records=1, truncated=1, query_tokens_cut=3, response_tokens_cut=0)


def test_a_response_that_is_too_long_loses_its_end_but_not_eos():
    record, report = encode_one("abc", "1", "123456789", max_length=6)
    assert record.prompt == (BOS, *ids("c"))
    assert record.responses == ((*ids("1"), EOS), (*ids("123"), EOS))
    assert report == TruncationReport(records=1, truncated=1, query_tokens_cut=2, response_tokens_cut=6)


def test_the_smallest_possible_length():
    record, _ = encode_one("abc", "123", "4", max_length=4)
    assert (record.prompt, record.responses) == ((BOS, *ids("c")), ((*ids("1"), EOS), (*ids("4"), EOS)))
    with pytest.raises(UserError, match=r"dataset.max_length=3 is too small; it must be at least 4"):
        encode_one("abc", "123", "4", max_length=3)


def test_too_many_cut_records_are_an_error_with_the_numbers():
    records = [Record("0", "ab", ("1",)), Record("1", "abcdef", ("1",)), Record("2", "abcdefgh", ("123456",))]
    message = r"2 of 3 .*max_length=6 .*\(10 query and 3 response .*max_truncated_share=0.5"
    _, report = encode(records, TOKENIZER, "raw", 6)
    with pytest.raises(UserError, match=message):
        report.check(6, 0.5)
    report.check(6, 0.67)


texts = st.text(alphabet="abé <s>/", max_size=30)


@given(
    query=texts.filter(bool),
    responses=st.lists(texts, min_size=1, max_size=4),
    max_length=st.integers(4, 60),
    bos=st.booleans(),
)
def test_cutting_keeps_its_promises(query, responses, max_length, bos):
    tokenizer = TOKENIZER if bos else WITHOUT_BOS
    whole, _ = encode_one(query, *responses, tokenizer=tokenizer, max_length=10_000)
    record, report = encode_one(query, *responses, tokenizer=tokenizer, max_length=max_length)

    head = int(bos)
    longest = max(len(ids_of) for ids_of in whole.responses)
    assert len(record.prompt) + max(map(len, record.responses)) == min(max_length, len(whole.prompt) + longest)
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
        assert len(query_ids) == 1  # the query gives way first
    assert report == TruncationReport(1, int(bool(query_cut or response_cut)), query_cut, response_cut)


WITHOUT_BOS = byte_tokenizer(bos=False)


# In a file


@pytest.fixture
def records(tmp_path, monkeypatch) -> Records:
    monkeypatch.setattr("rdo.data.encoding.RECORDS_PER_WORKER", 10)
    monkeypatch.setattr("rdo.data.encoding.RECORDS_PER_CALL", 5)
    made = [Record(f"id {n}", f"Which bread {n}? " + "x " * (n % 60), (" Rye.", "Oats" * (n % 9))) for n in range(40)]
    write_records(iter(made), tmp_path / "records.arrow", 0)
    return Records.in_file(tmp_path / "records.arrow").only(np.array([5, 3, *range(8, 40), 1]))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_file_holds_what_memory_would_whatever_the_number_of_processes(records, tmp_path, workers):
    encode_into(tmp_path, records, TOKENIZER, "hh", 100, False, workers)
    wanted, report = encode(records, TOKENIZER, "hh", 100)
    found = MappedTokens(tmp_path)
    assert [found[n] for n in range(len(found))] == wanted
    assert found.report() == report
    assert 0 < report.truncated < len(wanted)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_worker_is_the_users_one_line(records, tmp_path, workers):
    with pytest.raises(UserError, match=r"dataset\.max_length=2 is too small"):
        encode_into(tmp_path, records, TOKENIZER, "hh", 2, False, workers)


def test_a_killed_worker_ends_the_work_and_what_was_finished_is_kept(records, tmp_path, monkeypatch):
    parent, real = os.getpid(), encoding.encode_batch

    def dying(batch, *arguments, **options):
        if os.getpid() != parent and records[-1].id in [record.id for record in batch]:
            time.sleep(1)  # until the other half is finished
            os.kill(os.getpid(), signal.SIGKILL)
        return real(batch, *arguments, **options)

    monkeypatch.setattr(encoding, "encode_batch", dying)
    with pytest.raises(RuntimeError, match="abruptly died"):
        encode_into(tmp_path, records, TOKENIZER, "hh", 100, False, 2)
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("tokens*.arrow")}
    assert kept
    monkeypatch.setattr(encoding, "encode_batch", real)
    encode_into(tmp_path, records, TOKENIZER, "hh", 100, False, 2)
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())
    assert list(MappedTokens(tmp_path)) == encode(records, TOKENIZER, "hh", 100)[0]


def test_the_order_of_records_is_part_of_what_tokens_are_found_by(records):
    turned = records.only(np.arange(len(records))[::-1])
    assert turned.fingerprint() == records.fingerprint()
    assert order_fingerprint(turned) != order_fingerprint(records)
