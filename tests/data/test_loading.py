"""Splits: no query in two of them, whatever the source; what was moved or left out is counted."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdo.data.loading import INVALID, PARQUET_BRANCH, Splits, load_splits
from rdo.data.records import SPLITS, content_id, query_key
from rdo.runtime.errors import DataError, UserError
from rdo.runtime.store import Provenance
from rdo.settings import DatasetConfig, ToyConfig
from tiny import is_finished

REAL = Path(__file__).parents[3] / "shared" / "data"
CONFIGURATIONS = Path(__file__).parents[2] / "conf" / "dataset"


def row(query: str, chosen: str = "good", rejected: str = "bad", **more: object) -> dict[str, object]:
    return {"prompt": query, "chosen": chosen, "rejected": rejected, **more}


def own(query: str, split: str | None = None, answer: str = "good", **more: object) -> dict[str, object]:
    return {"query": query, "responses": [answer, "bad"], "preferences": [[0, 1]], "split": split, **more}


def load(folder: Path, **settings: object) -> Splits:
    return load_splits(DatasetConfig(**settings), Provenance(folder / "runs", "python train.py", {}))


def load_file(folder: Path, rows: list[dict[str, object]], **settings: object) -> Splits:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return load(folder, source="file", path=str(path), **settings)


def queries(loaded, split: str) -> list[str]:
    return [record.query for record in loaded.splits[split]]


def where(loaded) -> dict[str, str]:
    return {query_key(record.query): split for split, records in loaded.splits.items() for record in records}


NONE_HELD_OUT = {"test_share": 0.0, "validation_share": 0.0}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Serve rows as `datasets.load_dataset` would; returns the calls it got."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def serve(**splits: list[dict[str, object]]):
        found = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})
        calls = []

        def load_dataset(path, **settings):
            calls.append((path, settings))
            return found

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return serve


@pytest.fixture
def from_hub(tmp_path):
    """Load a hub data set with these settings."""
    return partial(load, tmp_path / "hub", source="hub", hub_name="owner/set")


# Our own splits


def test_shares_decide_the_size_of_the_splits(tmp_path):
    loaded = load_file(tmp_path, [row(f"query {number}") for number in range(2000)])
    sizes = {split: len(records) for split, records in loaded.splits.items()}
    assert list(sizes) == list(SPLITS)
    assert sizes["test"] == pytest.approx(200, abs=45)  # over 3 standard deviations
    assert sizes["validation"] == pytest.approx(100, abs=33)
    assert (sum(sizes.values()), sizes["demonstrations"]) == (2000, 0)
    counts = {"rows_read": 2000} | {f"records_{split}": size for split, size in sizes.items()}
    assert {name: count for name, count in loaded.counts.items() if count} == {n: c for n, c in counts.items() if c}


@given(
    words=st.lists(st.sampled_from("abcdefgh"), min_size=5, max_size=40),
    spaces=st.lists(st.sampled_from(["", " ", "\n"]), min_size=40, max_size=40),
    seed=st.integers(0, 5),
)
def test_no_query_is_in_two_splits(tmp_path_factory, words, spaces, seed):
    spaced = zip(words, spaces, strict=False)
    rows = [row(f"{space}say {word}{space}", chosen=str(number)) for number, (word, space) in enumerate(spaced)]
    rows += [row(f"filler {number}") for number in range(30)]  # so that something is left to train on
    shares = {"test_share": 0.3, "validation_share": 0.3, "split_seed": seed}
    loaded = load_file(tmp_path_factory.mktemp("data"), rows, **shares)
    keys = [{query_key(query) for query in queries(loaded, split)} for split in SPLITS]
    assert sum(map(len, keys)) == len(set.union(*keys))
    assert sum(map(len, loaded.splits.values())) == len(rows)


def test_more_rows_move_no_query_and_the_seed_moves_many(tmp_path):
    rows = [row(f"query {number}") for number in range(300)]
    few, many = load_file(tmp_path, rows[100:]), load_file(tmp_path, rows[::-1])
    assert where(few).items() <= where(many).items()
    assert where(load_file(tmp_path, rows, split_seed=1)) != where(many)
    some = load_file(tmp_path, rows[::-1], max_records=3)  # cuts every split and changes no choice
    assert {split: list(records) for split, records in some.splits.items()} == {
        split: records[:3] for split, records in many.splits.items()
    }
    assert some.counts == many.counts


# The source's splits


def test_official_splits_stay_and_train_loses_what_is_held_out(tmp_path):
    rows = [own(f"query {number}", "train") for number in range(50)]
    rows += [own(f"query {number}", "test", answer="other") for number in (3, 100, 101)]
    rows += [own(f"query {number}", "validation", answer="third") for number in (4, 101, 102)]
    rows += [own(f"query {number}", "demonstrations", answer="fourth") for number in (5, 100, 102)]
    loaded = load_file(tmp_path, rows)
    assert queries(loaded, "test") == ["query 3", "query 100", "query 101"]
    assert queries(loaded, "validation") == ["query 4", "query 102"]
    assert queries(loaded, "train") == [f"query {number}" for number in range(50) if number not in (3, 4)]
    assert queries(loaded, "demonstrations") == ["query 5"]
    assert loaded.counts["dropped_query_in_test"] == 3
    assert loaded.counts["dropped_query_in_validation"] == 2


def test_a_missing_validation_split_comes_out_of_train_by_the_same_hash(tmp_path):
    rows = [f"query {number}" for number in range(400)]
    unsplit = load_file(tmp_path, [own(query) for query in rows])
    loaded = load_file(tmp_path, [own(query, "train") for query in rows] + [own("test query", "test")])
    assert queries(loaded, "test") == ["test query"]
    assert queries(loaded, "validation") == queries(unsplit, "validation") != []
    assert set(queries(loaded, "train")) == set(queries(unsplit, "train") + queries(unsplit, "test"))


def test_rows_with_and_without_a_split_are_an_error(tmp_path):
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: no 'split' while other rows have one"):
        load_file(tmp_path, [own("a", "train"), own("b", id="x")])


# What is read is kept


def test_ids_are_unique_and_do_not_depend_on_the_order_of_other_rows(tmp_path):
    rows = [row("a"), row("b"), row("a"), row("a")]
    loaded = load_file(tmp_path, rows, **NONE_HELD_OUT)
    base, other = (content_id(query, ("good", "bad")) for query in "ab")
    assert loaded.splits["train"].ids() == [base, other, f"{base}-2", f"{base}-3"]
    turned = load_file(tmp_path, rows[::-1], **NONE_HELD_OUT)
    assert turned.splits["train"].fingerprint() == loaded.splits["train"].fingerprint()


def test_an_id_given_twice_is_an_error_or_an_invalid_row(tmp_path):
    rows = [own("a", id="x"), own("b", id="y"), own("c", id="x")]
    with pytest.raises(DataError, match=r"rows\.jsonl, line 3, field 'id': 'x' is taken by a row before; make"):
        load_file(tmp_path, rows)
    loaded = load_file(tmp_path, rows, on_invalid="skip", max_invalid_share=0.5, **NONE_HELD_OUT)
    assert queries(loaded, "train") == ["a", "b"]
    assert loaded.counts["invalid_repeated_id"] == 1


def test_invalid_rows_are_listed_in_a_file(tmp_path):
    rows = [row(f"query {number}") for number in range(50)] + [row("x", rejected=" "), {"prompt": 3}]
    loaded = load_file(tmp_path, rows, on_invalid="skip", max_invalid_share=0.1)
    entries = [json.loads(line) for line in (loaded.source.folder / INVALID).read_text().splitlines()]
    assert [entry["reason"] for entry in entries] == ["blank_responses", "broken"]
    assert "rows.jsonl, line 51, field 'rejected': the response is empty" in entries[0]["message"]
    with pytest.raises(DataError, match=r"first of 2 invalid rows.*listed in (.*invalid\.jsonl)") as caught:
        load_file(tmp_path, rows, on_invalid="skip", max_invalid_share=0.01)
    listed = Path(str(caught.value).rsplit(" ", 1)[1])
    assert len(listed.read_text().splitlines()) == 2
    assert not is_finished(listed.parent)
    assert not (load_file(tmp_path, rows[:50]).source.folder / INVALID).exists()


def test_a_file_is_read_once_until_its_content_or_the_reading_changes(tmp_path, monkeypatch):
    rows = [row(f"query {number}") for number in range(20)]
    first = load_file(tmp_path, rows)
    path = tmp_path / "rows.jsonl"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_text(path.read_text().replace("good", "fine"))
    os.utime(path, ns=times)
    changed = load(tmp_path, source="file", path=str(path))
    assert {record.responses for record in changed.splits["train"]} == {("fine", "bad")}
    assert changed.source != first.source
    os.utime(path, ns=(0, 0))
    monkeypatch.setattr("rdo.data.loading.read_into", None)
    assert load(tmp_path, source="file", path=str(path), validation_share=0.2).source == changed.source
    with pytest.raises(TypeError):
        load(tmp_path, source="file", path=str(path), on_invalid="skip")


def test_several_files_make_one_set_and_rows_are_named_by_their_file(tmp_path):
    for name, numbers in {"a.jsonl": range(5), "b.jsonl": range(5, 9)}.items():
        (tmp_path / name).write_text("\n".join(json.dumps(row(f"query {number}")) for number in numbers))
    loaded = load(tmp_path, source="file", path=str(tmp_path / "*.jsonl"), **NONE_HELD_OUT)
    assert queries(loaded, "train") == [f"query {number}" for number in range(9)]
    assert loaded.splits["train"][8].place.endswith("b.jsonl, line 4")


# The hub


def test_hub_through_the_real_client(tmp_path, monkeypatch, from_hub):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"  # the client takes a folder for a data set on the hub
    folder.mkdir()
    for split, size in {"train": 40, "test": 3}.items():
        lines = [json.dumps(row(f"{split} {number}")) for number in range(size)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    loaded = from_hub(hub_name=str(folder))
    assert queries(loaded, "test") == ["test 0", "test 1", "test 2"]
    assert loaded.counts["rows_read"] == 43
    with pytest.raises(UserError, match=r"cannot load .*gone from the hub"):
        from_hub(hub_name=str(tmp_path / "gone"))


def test_hub_tldr_uses_the_official_validation_as_test(hub, from_hub):
    def comparison(number: int, confidence: int | None, article: str | None = None) -> dict[str, object]:
        post = None if article else f"post {number}"
        info = {"post": post, "title": post, "subreddit": post, "article": article}
        summaries = [{"text": " one", "policy": "sup"}, {"text": " two", "policy": "ref"}]
        return {"info": info, "summaries": summaries, "choice": 1, "extra": {"confidence": confidence}}

    calls = hub(
        train=[comparison(number, None) for number in (*range(40), 900)],
        validation=[comparison(900, 9), comparison(901, 6), comparison(902, 6, article="news")],
    )
    loaded = from_hub(hub_config="comparisons")
    assert calls == [("owner/set", {"name": "comparisons", "revision": None})]
    assert [record.preferences[0].strength for record in loaded.splits["test"]] == [4.0, 1.0]
    assert len(loaded.splits["train"]) + len(loaded.splits["validation"]) == 40
    assert len(loaded.splits["validation"]) > 0
    for count in ("dropped_articles", "dropped_query_in_test", "validation_used_as_test"):
        assert loaded.counts[count] == 1


def test_hub_with_train_alone_is_split_as_a_file_is(hub, tmp_path, from_hub):
    rows = [row(f"query {number}") for number in range(100)]
    hub(train=rows)
    here, there = from_hub().splits, load_file(tmp_path, rows).splits
    assert {split: list(here[split]) for split in SPLITS} == {split: list(there[split]) for split in SPLITS}


def test_hub_rows_are_named_in_errors(hub, from_hub):
    hub(train=[row("a"), row(" ")], test=[row("c")])
    with pytest.raises(DataError, match=r"^owner/set, split train, row 2, field 'prompt': the query is empty"):
        from_hub()


def test_hub_splits_of_other_names_are_named_by_settings(hub, from_hub):
    rows = [row(f"query {number}") for number in range(60)]
    hub(train_prefs=rows, test_prefs=rows[:2], train_sft=rows)
    with pytest.raises(UserError, match=r"owner/set has the splits test_prefs, train_prefs, train_sft: set dataset\."):
        from_hub()
    with pytest.raises(UserError, match=r"dataset\.hub_test_split=test: owner/set has the splits"):
        from_hub(hub_split="train_prefs", hub_test_split="test")
    loaded = from_hub(hub_split="train_prefs", hub_test_split="test_prefs")
    assert queries(loaded, "test") == ["query 0", "query 1"]
    assert loaded.counts["rows_read"] == 62
    alone = from_hub(hub_split="train_prefs")
    assert alone.counts["rows_read"] == 60
    assert len(alone.splits["test"]) > 2  # ours to choose


def test_hub_out_of_reach_says_the_way_out(monkeypatch, from_hub):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'owner/set' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        UserError, match=r"cannot load owner/set.*Couldn't reach.*dataset=file dataset\.path="
    ) as caught:
        from_hub()
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_hub_set_published_as_a_script_is_read_from_its_conversion(hub, monkeypatch, from_hub):
    calls = hub(train=[row(f"query {number}") for number in range(20)])
    serve = datasets.load_dataset

    def refusing(path, **settings):
        if settings.get("revision") != PARQUET_BRANCH:
            raise RuntimeError("Dataset scripts are no longer supported, but found set.py")
        return serve(path, **settings)

    monkeypatch.setattr(datasets, "load_dataset", refusing)
    assert from_hub(hub_config="comparisons").counts["rows_read"] == 20
    assert calls == [("owner/set", {"data_dir": "comparisons", "revision": PARQUET_BRANCH})]
    with pytest.raises(UserError, match="scripts are no longer supported"):
        from_hub(hub_revision="main")


# Settings


def test_no_training_data_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nothing is left to train on"):
        load_file(tmp_path, [own("a", "test")])


def test_toy_world_brings_its_own_splits(tmp_path):
    toy = ToyConfig(pairs=48, test_pairs=18, demonstrations=24, candidate_queries=4)
    loaded = load(tmp_path, toy=toy, max_records=20)
    assert loaded.counts["records_train"] == 48
    assert loaded.counts["records_test"] == 18
    assert [len(loaded.splits[split]) for split in SPLITS] == [20, 20, 20, 18]
    assert set(queries(loaded, "test")).isdisjoint(queries(loaded, "train"))
