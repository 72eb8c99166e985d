"""The benchmark: everybody computes the same before anybody is timed, and what is counted is what is there."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import tree
from rdo.bench import data, measure, suite, trl
from rdo.bench.bound import mean_length, path_length
from rdo.bench.epoch import compare
from rdo.bench.measure import Contestant, differ, ratios, take_turns, warm_up
from rdo.bench.run import make_work, records_of
from rdo.bench.subjects import Subjects, make_subjects
from rdo.bench.suite import Setting, measure_work, opponents, prepared
from rdo.bench.works import rotated
from rdo.errors import UserError
from rdo.forest import Forest
from rdo.schema import BENCH_WORKS, BenchConfig, EngineConfig, ModelConfig
from rdo.stages.bench import benchmark
from tiny import tiny_run

CPU = torch.device("cpu")
VOCABULARY = 300
CONFIG = ModelConfig(
    tokenizer="byte_pair",
    hidden_size=32,
    intermediate_size=48,
    layers=2,
    heads=4,
    key_value_heads=2,
    max_positions=2048,
)
READ = [name for name in BENCH_WORKS if name != "generation"]
HAS_TRL = pytest.mark.skipif(find_spec("trl") is None, reason=f"TRL is not installed: {trl.INSTALL}")


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    tokenizer = trl.word_tokenizer(VOCABULARY, data.END)
    return make_subjects(CONFIG, tokenizer, tmp_path_factory.mktemp("models"), CPU)


def setting(subjects: Subjects, *against: str, budget: int = 512) -> Setting:
    engine = EngineConfig(device="cpu", tokens_per_micro_batch=budget)
    return Setting(engine, BenchConfig(against=list(against), rounds=1), CPU, subjects.folder, lambda line: None)


def test_made_records_have_the_lengths_of_hh():
    records = data.made_records(2000, 2, VOCABULARY)
    queries = np.array([len(record.prompt) for record in records])
    responses = np.array([len(ids) for record in records for ids in record.responses])
    assert queries.mean() == pytest.approx(data.QUERY, rel=0.02)
    assert responses.mean() == pytest.approx(data.RESPONSE, rel=0.02)
    longest = max(len(record.prompt) + max(map(len, record.responses)) for record in records)
    assert longest == data.LONGEST
    few = data.made_records(8, 2, VOCABULARY)
    assert np.mean([len(record.prompt) for record in few]) == pytest.approx(data.QUERY, rel=0.1)
    assert len(data.made_records(1, 6, VOCABULARY)[0].prompt) == data.QUERY
    # Skewed: most are shorter than the mean.
    assert np.median(queries) < 0.9 * queries.mean()
    assert all(ids[-1] == data.END and data.END not in ids[:-1] for record in records for ids in record.responses)
    assert [r.prompt for r in data.made_records(5, 2, VOCABULARY)] == [r.prompt for r in data.made_records(5, 2, 300)]


def test_records_of_a_data_set_get_as_many_responses_as_a_work_compares():
    records = data.made_records(3, 2, VOCABULARY)
    six = records_of("rrhf", 8, records, VOCABULARY)
    assert [len(record.responses) for record in six] == [6, 6]
    assert six[0].responses == (*records[0].responses, *records[1].responses, *records[2].responses)
    assert [len(record.responses) for record in records_of("dpo", 2, six, VOCABULARY)] == [2, 2]


@pytest.mark.parametrize("name", READ)
def test_all_layouts_of_a_work_compute_the_same(subjects: Subjects, name: str):
    """Ours, padded rows, and one sequence at a time: loss and gradient norm, or every output."""
    shared = setting(subjects, "padded", "unpadded")
    work = make_work(name, subjects, records_of(name, 4, None, VOCABULARY), shared)
    rows = measure_work(work, shared, [1])
    assert [row["against"] for row in rows] == ["padded", "unpadded"]
    for row in rows:
        assert row["difference"] < 1e-5
        assert row["time_ratio"] > 0
        assert row["bound_share"] > 0
        assert row["tokens_unique"] < row["tokens_naive"] <= row["tokens_padded"]


def test_what_computes_anything_else_gets_no_ratio(subjects: Subjects, monkeypatch: pytest.MonkeyPatch):
    shared = setting(subjects, "padded")
    work = make_work("dpo", subjects, records_of("dpo", 2, None, VOCABULARY), shared)

    def wrong(*arguments: Any) -> list[Contestant]:
        made = opponents(*arguments)
        run = made[0].run
        made[0].run = lambda: run() * 1.001
        return made

    monkeypatch.setattr(suite, "opponents", wrong)
    (row,) = measure_work(work, shared, [1])
    assert row["time_ratio"] is None
    assert row["seconds_other"] is None
    assert "differ by 1" in row["refused"] or "differ by 9" in row["refused"]
    assert "no ratio" in suite.line(row | {"threads": 1})


def test_one_by_one_pads_nothing_and_shares_nothing(subjects: Subjects):
    """Every sequence goes through the model in a row of its own."""
    shared = setting(subjects)
    work = make_work("dpo", subjects, records_of("dpo", 2, None, VOCABULARY), shared)
    attention = suite.implementations(work.model, shared)
    seen: list[tuple[int, ...]] = []
    hook = work.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    contestant = prepared(work, "flat", attention, alone=True)
    contestant.prepare()
    contestant.run()
    hook.remove()
    work.after()
    assert sorted(seen) == sorted((1, len(ids)) for ids in work.sequences)


def test_mismatched_responses_are_those_that_trl_takes():
    records = data.made_records(3, 2, VOCABULARY)
    chosen, rejected = zip(*(record.responses for record in records), strict=True)
    assert rotated(records) == [
        (rejected[2], chosen[2]),
        (chosen[0], rejected[0]),
        (chosen[1], rejected[1]),
    ]


def test_rows_of_the_bound_have_paths_as_long_as_ours():
    sequences = [ids for ids in tree(3, count=30, longest=60) if ids]
    ours = Forest(sequences).positions.double().mean()
    rows = torch.arange(path_length(sequences)).double().mean()
    assert abs(float(ours - rows)) <= 0.5
    assert mean_length(sequences) == round(np.mean([len(ids) for ids in sequences]))


def test_the_peak_of_memory_is_what_was_taken():
    size = 64 << 20

    def run() -> torch.Tensor:
        return torch.ones(size // 4).sum()[None]

    contestant = Contestant("one", run)
    warm_up(contestant, CPU)
    assert contestant.bytes is not None
    assert 0.9 * size < contestant.bytes < 1.5 * size


def test_turns_alternate_and_what_is_prepared_is_not_timed():
    order: list[str] = []

    def made(name: str) -> Contestant:
        def note(what: str) -> torch.Tensor:
            order.append(f"{what} {name}")
            return torch.zeros(1)

        return Contestant(name, lambda: note("run"), lambda: note("prepare") and None, lambda: note("after"))

    one, other = made("one"), made("other")
    take_turns([one, other], 2, CPU)
    turn = [f"{what} {name}" for name in ("one", "other") for what in ("prepare", "run", "after")]
    assert order == 2 * turn
    one.seconds, other.seconds = [1.0, 2.0], [3.0, 3.0]
    assert ratios(one, other) == [3.0, 1.5]
    one.numbers, other.numbers = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])
    assert differ(one, other) == float("inf")


def test_a_gemm_is_measured():
    assert 0.1 < measure.gemm_gflops(64, 128, CPU, torch.float32) < 1e5


@HAS_TRL
@pytest.mark.parametrize("name", ["dpo", "kto", "rm", "reference"])
def test_trl_computes_the_same(subjects: Subjects, name: str):
    """Loss and gradient norm of TRL's own trainers, as shipped and at their best, from the same token ids."""
    shared = setting(subjects, "trl", "trl_best")
    work = make_work(name, subjects, records_of(name, 3, None, VOCABULARY), shared)
    attention = suite.implementations(work.model, shared)
    ours = prepared(work, "forest", attention)
    warm_up(ours, CPU)
    others = opponents(work, attention, shared)
    assert [other.name for other in others] == (["trl"] if name == "reference" else ["trl", "trl_best"])
    for other in others:
        warm_up(other, CPU)
        assert other.numbers is not None
        assert differ(ours, other) < 2e-5
        # Not the loss that anything has at the start.
        assert name == "reference" or abs(float(other.numbers[0]) - np.log(2)) > 1e-5


def test_words_are_ids_and_come_back():
    tokenizer = trl.word_tokenizer(50, 7)
    ids = [3, 8, 12, 0, 49, 7]
    assert tokenizer(trl.text(ids, tokenizer) + tokenizer.eos_token).input_ids == ids
    assert tokenizer.eos_token_id == 7
    # Where the end has the id that is padding elsewhere.
    assert (trl.word_tokenizer(50, 0).eos_token_id, trl.word_tokenizer(50, 0).pad_token_id) == (0, 1)


def test_without_trl_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "trl", None)
    run = tiny_run(tmp_path, "stage=bench")
    with pytest.raises(UserError, match=r"requirements-bench\.txt, or leave trl and trl_best out of bench\.against"):
        benchmark(run)


def test_an_epoch_of_other_steps_or_losses_gets_no_ratio():
    one = [{"loss": 0.69}]
    assert compare(1.0, 3.0, one, one)["time_ratio"] == 3.0
    assert compare(1.0, 3.0, one, [{"loss": 0.70}])["time_ratio"] is None
    two = [{"loss": 0.69}, {"loss": 0.69}]
    assert compare(1.0, 3.0, one, two)["time_ratio"] is None


SMALL = [
    "stage=bench", "bench.against=[padded]", "bench.pairs=1", "bench.rounds=1", "bench.epoch_pairs=0",
    "bench.growth=false", "bench.threads=[1]", "model.layers=1", "model.hidden_size=32", "model.heads=2",
    "model.intermediate_size=32", "model.vocabulary_size=300",
]  # fmt: skip


def test_the_stage_leaves_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = benchmark(
        tiny_run(tmp_path, *SMALL, "bench.works=[dpo,score15,generation]", "bench.against=[padded,unpadded]")
    )
    found = json.loads(file.read_text())
    rows = [(row["work"], row["against"]) for row in found["rows"]]
    assert rows == [(w, a) for w in ("dpo", "score15") for a in ("padded", "unpadded")] + [("generation", "unpadded")]
    assert found["machine"]["gemm_gflops"]["1"] > 0
    printed = capsys.readouterr().out
    assert printed.count("\n") >= len(rows)
    assert (tmp_path / "bench" / "bench.txt").read_text().splitlines()[0] in printed
    # The models that it measured with are gone.
    assert sorted(path.name for path in (tmp_path / "bench").iterdir()) == ["bench.json", "bench.txt"]


def test_a_data_set_can_be_measured_with(tmp_path: Path):
    pairs = [{"prompt": f"Which bread {n}?", "chosen": f" Rye, {n} days.", "rejected": " None."} for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    given = ["dataset=file", f"dataset.path={tmp_path / 'pairs.jsonl'}", "bench.works=[rrhf]"]
    run = tiny_run(tmp_path / "run", *SMALL, *given)
    (row,) = json.loads(benchmark(run).read_text())["rows"]
    assert row["tokens_unique"] < row["tokens_naive"]
    with pytest.raises(UserError, match=r"lower bench\.pairs"):
        benchmark(tiny_run(tmp_path / "run", *SMALL, *given, "bench.pairs=50"))
