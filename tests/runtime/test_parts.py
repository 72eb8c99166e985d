"""Long computations in parts: made once, kept whole, joined to what they would be without parts."""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rdo.stages.run
from rdo.runtime.parts import Shards
from rdo.stages.score import read_scores, scores
from tiny import tiny_run

NUMBERS = pa.schema({"name": pa.string(), "value": pa.float64()})


def numbers(folder: Path, made: list[range], names: str = "abcdefghij", size: int = 4) -> Shards:
    """Shards of one row a name, or of none for names in capitals; notes the ranges that are made."""

    def rows(part: range, bar: Any) -> list[tuple[str, float]]:
        made.append(part)
        return [(names[n], n / 3) for n in part if names[n].islower()]

    shards = Shards(folder, NUMBERS, names, size)
    shards.make("numbers", rows)
    return shards


def test_shards_are_made_once_and_joined_in_order(tmp_path):
    made: list[range] = []
    names = "abcdEFGHij"  # the second has no row
    for _ in range(2):
        shards = numbers(tmp_path, made, names)
    assert made == [range(0, 4), range(4, 8), range(8, 10)]
    shards.join(tmp_path / "all.parquet")
    table = pq.read_table(tmp_path / "all.parquet", page_checksum_verification=True)
    assert table.schema == NUMBERS
    assert table.to_pylist() == [{"name": name, "value": n / 3} for n, name in enumerate(names) if name.islower()]


def test_a_damaged_shard_is_made_again(tmp_path, capsys):
    """Whatever bit is flipped of its rows, and whatever else makes it unreadable; other bits have no meaning."""
    names = "".join(chr(97 + n % 26) for n in range(4000))
    made: list[range] = []
    shards = numbers(tmp_path, made, names, size=2000)
    path, rows = shards.file(range(2000, 4000)), [shards.read(part) for part in shards.parts]
    data, draw = path.read_bytes(), random.Random(0)
    broken = [data[:-1], b"", data[:100], os.urandom(300)]
    for place in draw.sample(range(len(data)), 200):
        broken.append(data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :])
    found = 0
    for content in broken:
        made.clear()
        path.write_bytes(content)
        again = numbers(tmp_path, made, names, size=2000)
        assert [again.read(part).equals(rows[n]) for n, part in enumerate(again.parts)] == [True, True]
        assert made in ([], [range(2000, 4000)])
        found += f"{path} is damaged (" in capsys.readouterr().err
    assert found > 180


def test_a_shard_of_other_inputs_or_of_another_range_is_not_taken(tmp_path):
    """A file whose rows were shuffled between two tries has the same key, and its records in other places."""
    made: list[range] = []
    numbers(tmp_path, made)
    made.clear()
    numbers(tmp_path, made, "abcdhgfeij")
    assert made == [range(4, 8)]
    made.clear()
    numbers(tmp_path, made, size=5)
    assert made == [range(0, 5), range(5, 10)]


def test_the_size_of_a_shard_changes_no_score_beyond_rounding(tmp_path, monkeypatch):
    """And only one shard is in memory at a time: readings of millions of records would not fit."""
    read, asked = rdo.stages.run.read_all, []

    def counting(bar: Any, model: Any, layout: Any, readings: Any, budget: int) -> Any:
        asked.append(len(readings))
        return read(bar, model, layout, readings, budget)

    def scored(size: int) -> dict[str, Any]:
        settings = ["sft.max_steps=1", "rm.max_steps=4", "rm.learning_rate=1e-3", f"engine.records_per_shard={size}"]
        shutil.rmtree(tmp_path / "score", ignore_errors=True)
        return read_scores(scores(tiny_run(tmp_path, *settings), "reward", "train", False, None)).rewards

    monkeypatch.setattr(rdo.stages.run, "read_all", counting)
    wanted, found = scored(64), scored(3)
    assert asked == [64, *[3] * 21, 1]
    assert list(found) == list(wanted)
    assert list(found.values()) == pytest.approx(list(wanted.values()), abs=1e-5)
