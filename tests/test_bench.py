"""The benchmark: everybody computes the same before anybody is timed, and what is counted is what is there."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from launch.bench import epoch, works
from launch.bench.measure import Contestant, differ, take_turns, warm_up
from launch.bench.suite import contestant, measure_work, path_length
from launch.bench.theirs import rows
from launch.bench.works import WORKS, Bench, made_records, make_bench, make_work, word_tokenizer

from helpers import random_tree
from rdo.sequences.layout import PrefixTree
from rdo.settings import EngineConfig, ModelConfig

CPU = torch.device("cpu")
VOCABULARY = 300
SIZES = {"vocabulary_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 4}
HAS_TRL = pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed (requirements-bench.txt)")
ROW = {
    "work", "against", "threads", "difference", "time_ratio", "ratios", "seconds_ours", "seconds_other", "memory_ours",
    "memory_other",
}  # fmt: skip
COUNTED = {"tokens_naive", "tokens_padded", "tokens_unique", "bound_share", "gflops"}


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    model = ModelConfig(tokenizer="byte_pair", key_value_heads=2, max_positions=2048, **SIZES)
    engine = EngineConfig(device="cpu", tokens_per_micro_batch=512)
    with make_bench(model, engine, CPU, against=["padded", "unpadded"], rounds=1, pairs=3) as made:
        yield made


def test_made_records_have_the_lengths_of_hh():
    records = made_records(2000, 2, VOCABULARY)
    queries = np.array([len(record.prompt) for record in records])
    responses = np.array([len(ids) for record in records for ids in record.responses])
    assert queries.mean() == pytest.approx(works.QUERY, rel=0.02)
    assert responses.mean() == pytest.approx(works.RESPONSE, rel=0.02)
    assert max(len(r.prompt) + max(map(len, r.responses)) for r in records) == works.LONGEST
    assert np.mean([len(record.prompt) for record in made_records(8, 2, VOCABULARY)]) == pytest.approx(164, rel=0.1)
    assert all(ids[-1] == works.END and works.END not in ids[:-1] for record in records for ids in record.responses)


@pytest.mark.parametrize("name", WORKS)
def test_all_layouts_of_a_work_compute_the_same(bench: Bench, name: str):
    """Ours, padded rows, and one sequence at a time: loss and gradient norm, or every output."""
    found = measure_work(make_work(name, bench), bench)
    assert [row["against"] for row in found] == [other for other in WORKS[name][2] if other in bench.against]
    for row in found:
        assert row.keys() == (ROW if name == "generation" else ROW | COUNTED)
        assert row["difference"] < 1e-5
        assert row["time_ratio"] > 0
        if name != "generation":
            assert 0 < row["tokens_unique"] < row["tokens_naive"] <= row["tokens_padded"]
            assert min(row["bound_share"], row["gflops"]) > 0


def test_who_computes_anything_else_gets_no_ratio(bench: Bench, capsys: pytest.CaptureFixture[str]):
    work = make_work("dpo", bench)
    other = replace(work, run=lambda layout: work.run(layout) * (1.001 if layout == "padded" else 1.0))
    assert not any("time_ratio" in row for row in measure_work(other, bench))
    assert capsys.readouterr().out.count(", more than 0.0001\n") == 2


def test_one_by_one_runs_every_sequence_alone(bench: Bench):
    work, seen = make_work("dpo", bench), []
    hook = work.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    contestant("unpadded", work, bench).run()
    hook.remove()
    work.model.zero_grad()
    assert sorted(seen) == sorted((1, len(ids)) for ids in work.passes[0].sequences)


def test_rows_of_the_bound_have_paths_as_long_as_ours():
    sequences = [ids for ids in random_tree(3, count=30, longest=60) if ids]
    ours = PrefixTree(sequences).positions.double().mean()
    assert abs(float(ours - torch.arange(path_length(sequences)).double().mean())) <= 0.5


def test_the_peak_of_memory_is_what_was_taken():
    size = 64 << 20
    one = Contestant("one", lambda: torch.ones(size // 4).sum()[None], torch.nn.Linear(1, 1))
    warm_up(one, CPU)
    assert 0.9 * size < one.bytes < 1.5 * size


def test_turns_alternate_and_gradients_are_cleared():
    model, order = torch.nn.Linear(1, 1, bias=False), []

    def made(name: str, length: int) -> Contestant:
        def run() -> torch.Tensor:
            assert model.weight.grad is None
            model(torch.ones(1)).sum().backward()
            order.append(name)
            return torch.ones(length)

        return Contestant(name, run, model)

    one, other = made("one", 2), made("other", 3)
    warm_up(one, CPU)
    warm_up(other, CPU)
    order.clear()
    take_turns([one, other], 2, CPU)
    assert order == ["one", *2 * ["one", "other"]]
    assert (len(one.seconds), one.numbers.tolist(), differ(one, other)) == (2, [1.0, 1.0, 1.0], float("inf"))


@HAS_TRL
@pytest.mark.parametrize(
    ("name", "other"), [(work, other) for work in WORKS for other in WORKS[work][2] if other.startswith("trl")]
)
def test_trl_computes_the_same(bench: Bench, name: str, other: str):
    """Loss and gradient norm of TRL's own trainers, as shipped and at their best, from the same token ids."""
    work = make_work(name, bench)
    ours, theirs = contestant("ours", work, bench), contestant(other, work, bench)
    for one in (ours, theirs):
        warm_up(one, CPU)
    assert differ(ours, theirs) < 2e-5
    # Not the loss that anything has at the start.
    assert name == "reference" or abs(float(theirs.numbers[0]) - np.log(2)) > 1e-5


def test_words_are_ids_and_come_back():
    tokenizer, (record,) = word_tokenizer(VOCABULARY), made_records(1, 2, VOCABULARY)
    (row,) = rows([record])
    ids = tokenizer(row["prompt"] + row["chosen"] + tokenizer.eos_token).input_ids
    assert tuple(ids) == (*record.prompt, *record.responses[0])


@pytest.mark.parametrize(("losses", "same"), [([0.69], True), ([0.70], False), ([0.69, 0.69], False)])
def test_an_epoch_of_other_steps_or_losses_gets_no_ratio(bench: Bench, monkeypatch, tmp_path, losses, same):
    monkeypatch.setattr(epoch, "ours", lambda file, bench: [0.69])
    monkeypatch.setattr(epoch, "theirs", lambda file, bench: losses)
    (row,) = epoch.measure_epoch(replace(bench, folder=tmp_path), 2)
    assert ("time_ratio" in row, "refused" in row) == (same, not same)


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    """The command, in this process, from anywhere."""
    small = [f"model.{name}={size}" for name, size in SIZES.items()]
    few = ["--rounds", "1", "--pairs", "1", "--threads", "1", "--no-growth", *more]
    command = ["bench", "--folder", str(folder), *few, "--set", *small, "engine.device=cpu", "engine.threads=1"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.chdir(folder)
    runpy.run_path(str(Path(__file__).parents[1] / "launch" / "bench"), run_name="__main__")


def test_without_trl_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match=r"error: .*requirements-bench\.txt, or --against padded unpadded"):
        run(tmp_path, monkeypatch)


@HAS_TRL
def test_it_leaves_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    run(tmp_path, monkeypatch, "--works", "dpo", "score15", "--against", "trl", "padded", "--epoch-pairs", "2")
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found.keys() == {"machine", "rows", "growth", "epoch"}
    wanted = [("dpo", "trl"), ("dpo", "padded"), ("score15", "padded")]
    assert [(row["work"], row["against"]) for row in found["rows"]] == wanted
    (row,) = found["epoch"]
    assert row["time_ratio"] > 0
    printed = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line]
    assert [list(pair) for pair in wanted] == [start for start in printed if tuple(start) in wanted]
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
