"""Token ids in a memory-mapped file are those in memory, whatever the number of processes, and are made once."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from rdo.data.tokens import MappedTokens, encode_into, order_fingerprint

from helpers import tokenizer
from rdo.data import tokens
from rdo.data.encoding import encode
from rdo.data.records import Record
from rdo.data.table import MappedRecords, Records, write_records
from rdo.errors import UserError


@pytest.fixture
def records(tmp_path, monkeypatch) -> Records:
    monkeypatch.setattr(tokens, "RECORDS_PER_WORKER", 10)
    made = [Record("", f"Which bread number {n}? " + "x " * (n % 60), (" Rye.", " Oats" * (n % 9))) for n in range(40)]
    write_records(made, tmp_path / "records.arrow", 0)
    source = MappedRecords(tmp_path / "records.arrow")
    # Some rows are missing, one is renamed, and they are out of order.
    return Records(source, source.columns(), np.array([5, 3, *range(8, 40), 1]), {3: "renamed"})


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_same_as_in_memory(records, tmp_path, workers):
    folder = tmp_path / "tokens"
    folder.mkdir()
    encode_into(folder, records, tokenizer(), "hh", 60, False, workers)
    wanted, report = encode(records, tokenizer(), "hh", 60)
    found = MappedTokens(folder)
    assert [found[n] for n in range(len(found))] == wanted
    assert found[3:5] == wanted[3:5]
    assert found[1].id == "renamed"
    assert found.report() == report
    assert 0 < report.truncated < len(wanted)


def test_the_order_of_records_is_part_of_what_tokens_are_found_by(records):
    turned = records.only(np.arange(len(records))[::-1])
    assert turned.fingerprint() == records.fingerprint()
    assert order_fingerprint(turned) != order_fingerprint(records)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_worker_is_the_users_one_line(records, tmp_path, workers):
    with pytest.raises(UserError, match=r"dataset\.max_length=2 is too small"):
        encode_into(tmp_path, records, tokenizer(), "hh", 2, False, workers)


def test_a_killed_worker_is_named_and_the_rest_is_kept(records, tmp_path, monkeypatch):
    parent = os.getpid()
    real = tokens.encode_batch

    def dying(batch, *arguments, **options):
        if os.getpid() != parent and records[20].id in [record.id for record in batch]:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(batch, *arguments, **options)

    monkeypatch.setattr(tokens, "encode_batch", dying)
    monkeypatch.setattr(tokens, "RECORDS_PER_CALL", 5)
    with pytest.raises(UserError, match=r"was killed.*dataset\.workers=1"):
        encode_into(tmp_path, records, tokenizer(), "hh", 60, False, 2)
    monkeypatch.setattr(tokens, "encode_batch", real)
    encode_into(tmp_path, records, tokenizer(), "hh", 60, False, 2)
    assert [MappedTokens(tmp_path)[n] for n in range(len(records))] == encode(records, tokenizer(), "hh", 60)[0]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_whichever_process_is_killed_the_message_is_the_same(records, tmp_path, monkeypatch, number):
    """Two workers, and the manager process that `datasets` starts last."""
    parent = os.getpid()
    real = tokens.encode_batch

    def killing(batch, *arguments, **options):
        if os.getpid() != parent:
            with suppress(FileExistsError):
                (tmp_path / "killed").touch(exist_ok=False)
                children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
                assert len(children) == 3
                os.kill(int(sorted(children, key=int)[number]), signal.SIGKILL)
            time.sleep(0.2)
        return real(batch, *arguments, **options)

    monkeypatch.setattr(tokens, "encode_batch", killing)
    monkeypatch.setattr(tokens, "RECORDS_PER_CALL", 5)
    with pytest.raises(UserError, match=r"was killed.*dataset\.workers=1"):
        encode_into(tmp_path, records, tokenizer(), "hh", 60, False, 2)
    assert (tmp_path / "killed").exists()
