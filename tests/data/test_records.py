"""Records in a memory-mapped file are the records in memory: the same objects, hashes, orders and fingerprints."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdo.data.records import NUMBERS, SPLITS, Message, Preference, Record, Records, write_records
from rdo.settings import TrainingConfig
from rdo.stages.run import select

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def records(draw):
    count = draw(st.integers(1, 4))
    index = st.integers(0, count - 1)
    preference = st.builds(Preference, index, index, st.booleans(), st.none() | NUMBER)
    each = {"min_size": count, "max_size": count}
    return Record(
        draw(TEXT),
        draw(TEXT),
        tuple(draw(st.lists(TEXT, **each))),
        tuple(draw(st.lists(preference, max_size=3))),
        draw(st.none() | st.lists(NUMBER, **each).map(tuple)),
        draw(st.none() | st.sampled_from(SPLITS)),
        tuple(draw(st.lists(st.builds(Message, st.sampled_from(["user", "assistant"]), TEXT), max_size=3))),
        draw(st.none() | st.lists(st.booleans(), **each).map(tuple)),
        draw(TEXT),
    )


def mapped(folder, wanted, seed=0) -> Records:
    write_records(iter(wanted), folder / "records.arrow", seed)
    return Records.in_file(folder / "records.arrow")


@settings(max_examples=60, deadline=None)
@given(wanted=st.lists(records(), min_size=1, max_size=8), seed=st.integers(0, 3))
def test_what_is_written_is_read_back_and_described_alike(tmp_path_factory, wanted, seed):
    found = mapped(tmp_path_factory.mktemp("table"), wanted, seed)
    assert list(found) == [found[n] for n in range(len(wanted))] == wanted
    assert [record.place for record in found] == [record.place for record in wanted]
    memory = Records.in_memory(wanted, seed)
    for name in NUMBERS:
        np.testing.assert_array_equal(found.known(name), memory.known(name))
    assert found.ids() == memory.ids() == [record.id for record in wanted]
    assert found.fingerprint() == memory.fingerprint()


def test_many_batches_slices_and_parts(tmp_path):
    wanted = [Record(f"id {n}", f"query {n}", ("a",) * (1 + n % 3)) for n in range(2500)]
    found = mapped(tmp_path, wanted)
    assert list(found) == wanted
    assert found[995:1005] == wanted[995:1005]
    assert found[-1] == wanted[-1]
    part = found.only(np.array([2400, 7, 1000]))
    assert list(part) == [wanted[2400], wanted[7], wanted[1000]]
    assert part.ids() == ["id 2400", "id 7", "id 1000"]
    assert part.known("response_count").tolist() == [1, 2, 2]
    with pytest.raises(IndexError):
        part[3]


def test_selection_is_the_same_from_memory_and_file_and_whatever_the_order(tmp_path):
    wanted = [Record(f"id {n}", "q", ("a",) * (1 + n % 3)) for n in range(300)]
    config = TrainingConfig(min_responses=2, max_records=50)
    chosen = [wanted[n].id for n in select(wanted, config)]
    assert len(chosen) == 50
    assert [wanted[n].id for n in select(mapped(tmp_path, wanted), config)] == chosen
    turned = wanted[::-1]
    assert [turned[n].id for n in select(turned, config)] == chosen
    assert chosen != sorted(chosen)
