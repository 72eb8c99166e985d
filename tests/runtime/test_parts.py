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
from rdo.runtime.errors import UserError
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
    for _ in range(2):
        shards = numbers(tmp_path, made)
    assert made == [range(0, 4), range(4, 8), range(8, 10)]
    shards.join(tmp_path / "all.parquet")
    table = pq.read_table(tmp_path / "all.parquet", page_checksum_verification=True)
    assert table.schema == NUMBERS
    assert table.to_pylist() == [{"name": name, "value": n / 3} for n, name in enumerate("abcdefghij")]


def test_a_shard_may_have_no_row(tmp_path):
    shards = numbers(tmp_path, [], "abABCDab", size=2)
    shards.join(tmp_path / "all.parquet")
    assert pq.read_table(tmp_path / "all.parquet")["name"].to_pylist() == ["a", "b", "a", "b"]


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


def test_damaged_scores_are_refused(tmp_path):
    made = scores(tiny_run(tmp_path, "sft.max_steps=1", "rm.max_steps=1"), "reward", "train", False, None)
    path = made.folder / "score.parquet"
    data = path.read_bytes()
    read_scores(made)
    path.write_bytes(data[:300] + bytes([data[300] ^ 1]) + data[301:])
    with pytest.raises(UserError, match=rf"score\.parquet cannot be read \(.*; delete {made.folder}, and run again"):
        read_scores(made)


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


def test_only_one_shard_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """Readings of millions of records would not fit."""
    run = tiny_run(tmp_path, "sft.max_steps=1", "rm.max_steps=1", "engine.records_per_shard=8")
    asked: list[int] = []
    read = rdo.stages.run.read_all

    def counting(bar: Any, model: Any, layout: Any, readings: Any, budget: int) -> Any:
        asked.append(len(readings))
        return read(bar, model, layout, readings, budget)

    monkeypatch.setattr(rdo.stages.run, "read_all", counting)
    scores(run, "reward", "train", False, None)
    assert asked == [8] * 8


@pytest.mark.parametrize("size", [3, 64])
def test_the_size_of_a_shard_changes_no_score_beyond_rounding(size, tmp_path_factory):
    run_dir = tmp_path_factory.getbasetemp() / "sizes"
    settings = ["sft.max_steps=1", "rm.max_steps=4", "rm.learning_rate=1e-3"]
    wanted = read_scores(scores(tiny_run(run_dir, *settings), "reward", "train", False, None)).rewards
    shutil.rmtree(run_dir / "score")
    run = tiny_run(run_dir, *settings, f"engine.records_per_shard={size}")
    found = read_scores(scores(run, "reward", "train", False, None)).rewards
    assert list(found) == list(wanted)
    assert list(found.values()) == pytest.approx(list(wanted.values()), abs=1e-5)
