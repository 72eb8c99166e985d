"""Splits: no query in two of them, whatever the source; what was moved or left out is counted."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from rdo.data.loading import PARQUET_BRANCH, load_splits
from rdo.data.records import SPLITS, query_key
from rdo.data.templates import TEMPLATES
from rdo.errors import DataError, UserError
from rdo.schema import DatasetConfig, ToyConfig

REAL = Path(__file__).parents[2] / "shared" / "data"
CONFIGURATIONS = Path(__file__).parents[1] / "conf" / "dataset"


def row(query: str, chosen: str = "good", rejected: str = "bad", **more: object) -> dict[str, object]:
    return {"prompt": query, "chosen": chosen, "rejected": rejected, **more}


def own(query: str, split: str | None = None, answer: str = "good", **more: object) -> dict[str, object]:
    return {"query": query, "responses": [answer, "bad"], "preferences": [[0, 1]], "split": split, **more}


def load_file(folder: Path, rows: list[dict[str, object]], **settings: object):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return load_splits(DatasetConfig(source="file", path=str(path), **settings))


def queries(loaded, split: str) -> list[str]:
    return [record.query for record in loaded.splits[split]]


def where(loaded) -> dict[str, str]:
    return {query_key(record.query): split for split, records in loaded.splits.items() for record in records}


@pytest.fixture
def hub(monkeypatch):
    """Serve rows as `datasets.load_dataset` would; returns the calls it got."""

    def serve(**splits: list[dict[str, object]]):
        found = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})
        calls = []

        def load_dataset(path, **settings):
            calls.append((path, settings))
            return found

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return serve


def from_hub(**settings: object):
    return load_splits(DatasetConfig(source="hub", **{"hub_name": "owner/set", **settings}))


# Our own splits


def test_shares_decide_the_size_of_the_splits(tmp_path):
    loaded = load_file(tmp_path, [row(f"query {number}") for number in range(2000)])
    assert set(loaded.splits) == set(SPLITS)
    sizes = {split: len(records) for split, records in loaded.splits.items()}
    assert sizes["test"] == pytest.approx(200, abs=45)  # over 3 standard deviations
    assert sizes["validation"] == pytest.approx(100, abs=33)
    assert sum(sizes.values()) == 2000
    assert sizes["demonstrations"] == 0
    assert loaded.counts == {"rows_read": 2000} | {f"records_{split}": size for split, size in sizes.items()} | {
        "dropped_query_in_test": 0,
        "dropped_query_in_validation": 0,
    }


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


def test_max_records_cuts_every_split_and_changes_no_choice(tmp_path):
    rows = [row(f"query {number}") for number in range(200)]
    whole, some = load_file(tmp_path, rows), load_file(tmp_path, rows, max_records=3)
    for split in ("train", "validation", "test"):
        assert some.splits[split] == whole.splits[split][:3]
    assert some.counts == whole.counts


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
    with pytest.raises(UserError, match="record x has no 'split' while others have"):
        load_file(tmp_path, [own("a", "train"), own("b", id="x")])


# The hub


def test_hub_rm_static(hub):
    ask = "\n\nHuman: number {}\n\nAssistant:"
    rows = [row(ask.format(number), " good", " bad", response=" good") for number in range(60)]
    calls = hub(train=rows, test=rows[:2])
    loaded = from_hub(hub_name="Dahoas/rm-static", hub_revision="abc")
    assert calls == [("Dahoas/rm-static", {"name": None, "revision": "abc"})]
    assert queries(loaded, "test") == [ask.format(0), ask.format(1)]
    assert loaded.splits["test"][0].responses == (" good", " bad")
    assert {record.split for record in loaded.splits["validation"]} <= {"train"}
    assert len(loaded.splits["train"]) + len(loaded.splits["validation"]) == 58
    assert loaded.counts["rows_read"] == 62
    assert loaded.counts["dropped_query_in_test"] == 2


def test_hub_through_the_real_client(tmp_path, monkeypatch):
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


def test_hub_whole_dialogues(hub):
    ask = "\n\nHuman: number {}\n\nAssistant:"
    rows = [{"chosen": ask.format(n) + " good", "rejected": ask.format(n) + " bad"} for n in range(30)]
    rows.append({"chosen": ask.format(9) + " same", "rejected": ask.format(9) + " same"})
    hub(train=rows, test=rows[:1])
    loaded = from_hub()
    assert queries(loaded, "test") == [ask.format(0)]
    assert loaded.counts["dropped_identical_responses"] == 1


def test_hub_tldr_uses_the_official_validation_as_test(hub):
    def comparison(number: int, confidence: int | None, article: str | None = None) -> dict[str, object]:
        post = None if article else f"post {number}"
        info = {"id": f"t3_{number}", "post": post, "title": post, "subreddit": post, "site": None, "article": article}
        summaries = [{"text": " one", "policy": "sup", "note": None}, {"text": " two", "policy": "ref", "note": "n"}]
        extra = {"confidence": confidence}
        base = {"info": info, "summaries": summaries, "choice": 1, "worker": "w", "batch": "b", "split": "valid1"}
        return {**base, "extra": extra}

    calls = hub(
        train=[comparison(number, None) for number in range(40)] + [comparison(900, None)],
        validation=[comparison(900, 9), comparison(901, 6), comparison(902, 6, article="news")],
    )
    loaded = from_hub(hub_config="comparisons")
    assert calls == [("owner/set", {"name": "comparisons", "revision": None})]
    assert [record.preferences[0].strength for record in loaded.splits["test"]] == [4.0, 1.0]
    assert {record.split for record in loaded.splits["test"]} == {"test"}
    assert len(loaded.splits["train"]) + len(loaded.splits["validation"]) == 40
    assert len(loaded.splits["validation"]) > 0
    assert loaded.counts["dropped_articles"] == 1
    assert loaded.counts["dropped_query_in_test"] == 1
    assert loaded.counts["validation_used_as_test"] == 1


def test_hub_with_train_alone_is_split_as_a_file_is(hub, tmp_path):
    rows = [row(f"query {number}") for number in range(100)]
    hub(train=rows)
    assert from_hub().splits == load_file(tmp_path, rows).splits


def test_hub_rows_are_named_in_errors(hub):
    hub(train=[row("a"), row(" ")], test=[row("c")])
    with pytest.raises(DataError, match=r"^owner/set, split train, row 2, field 'prompt': the query is empty"):
        from_hub()


def test_hub_splits_that_repeat_an_id_are_an_error(hub):
    hub(train=[own("a", id="1"), own("b", id="2")], test=[own("c", id="2")])
    with pytest.raises(UserError, match="id '2' is in train and in test"):
        from_hub(validation_share=0.0)


def test_hub_splits_of_unknown_names_are_an_error(hub):
    hub(train_prefs=[row("a")], train=[row("b")])
    with pytest.raises(UserError, match=r"owner/set has the splits train, train_prefs;.*dataset=file"):
        from_hub()


def test_hub_out_of_reach_says_the_way_out(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'owner/set' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        UserError, match=r"cannot load owner/set.*Couldn't reach.*dataset=file dataset\.path="
    ) as caught:
        from_hub()
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_hub_set_published_as_a_script_is_read_from_its_conversion(hub, monkeypatch):
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "web"}, "dataset.source=web is not known"),
        ({"source": "file"}, "needs dataset.path"),
        ({"source": "hub"}, "needs dataset.hub_name"),
        ({"test_share": 0.6, "validation_share": 0.4}, "must leave something to train on"),
        ({"test_share": -0.1}, "must not be negative"),
        ({"max_records": 0}, "dataset.max_records=0 must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_together(settings, message):
    with pytest.raises(UserError, match=message):
        load_splits(DatasetConfig(**settings))


def test_no_training_data_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nothing to train on"):
        load_file(tmp_path, [own("a", "test")])


def test_toy_world_brings_its_own_splits():
    toy = ToyConfig(pairs=48, test_pairs=18, demonstrations=24, candidate_queries=4)
    loaded = load_splits(DatasetConfig(toy=toy, max_records=20))
    assert loaded.counts["records_train"] == 48
    assert loaded.counts["records_test"] == 18
    assert [len(loaded.splits[split]) for split in SPLITS] == [20, 20, 20, 18]
    assert set(queries(loaded, "test")).isdisjoint(queries(loaded, "train"))


@pytest.mark.parametrize("name", ["file", "hh", "tldr", "hh_plus"])
def test_configurations_fit_the_schema(name):
    merged = OmegaConf.merge(OmegaConf.structured(DatasetConfig), OmegaConf.load(CONFIGURATIONS / f"{name}.yaml"))
    config = OmegaConf.to_object(merged)
    assert config.name == name
    assert config.template in TEMPLATES
    assert (config.source == "hub") == (config.hub_name is not None)


def test_real_tldr_file_is_split_by_post():
    path = REAL / "tldr_openai_comparisons_b13_b18_edit.jsonl.gz"
    if not path.exists():
        pytest.skip(f"the real data file {path.name} is not at hand (looked in ../shared/data)")
    loaded = load_splits(DatasetConfig(source="file", path=str(path)))
    sizes = {split: len(records) for split, records in loaded.splits.items()}
    assert sum(sizes.values()) == loaded.counts["rows_read"] == 1776
    assert 0.05 < sizes["test"] / 1776 < 0.16
    assert set(queries(loaded, "test")).isdisjoint(queries(loaded, "train") + queries(loaded, "validation"))
