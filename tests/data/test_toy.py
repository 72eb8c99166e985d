"""The toy world: its true reward by hand, its statistics, what depends on which setting, and its tokenizer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from rdo.data import toy
from rdo.data.records import Record
from rdo.runtime.errors import DataError
from rdo.settings import ToyConfig

SHORT_KIND_FARM = "human : please write a short kind note about the farm . assistant :"
LONG_GRIM_SEA = "human : please write a long grim note about the sea . assistant :"
SMALL = ToyConfig(pairs=300, test_pairs=200, demonstrations=240, candidate_queries=20)


@pytest.fixture(scope="module")
def world() -> dict[str, list[Record]]:
    return toy.load(ToyConfig())


@pytest.fixture(scope="module")
def small() -> dict[str, list[Record]]:
    return toy.load(SMALL)


def gaps(records: list[Record]) -> np.ndarray:
    """True reward of the chosen minus that of the rejected response."""
    rows = [(record.scores or (), record.preferences[0]) for record in records]
    return np.array([scores[label.chosen] - scores[label.rejected] for scores, label in rows])


def texts(records: list[Record]) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(record.id, record.query, record.responses) for record in records]


@pytest.mark.parametrize(
    ("query", "response", "value"),
    [
        # everything right: 2 + 2 + 0.4
        (SHORT_KIND_FARM, "sure , the warm cow sings . the sweet hen waits .", 4.4),
        # rude instead of polite
        (SHORT_KIND_FARM, "ugh , the warm cow sings . the sweet hen waits .", 3.6),
        # no opener, so no manners; an opener counts in the first place only
        (SHORT_KIND_FARM, "the warm cow sings . the sweet hen waits .", 4.0),
        (SHORT_KIND_FARM, "the warm cow sings . sure the sweet hen waits .", 4.0),
        # one of two adjectives of another style: 1 + 2 + 0.4
        (SHORT_KIND_FARM, "sure , the warm cow sings . the bleak hen waits .", 3.4),
        # no noun on the topic: 2 + 0 + 0.4
        (SHORT_KIND_FARM, "sure , the warm crab sings . the sweet owl waits .", 2.4),
        # cow and sings repeated once: 4.4 - 2 * 0.3; the, full stops and commas are no repeats
        (SHORT_KIND_FARM, "sure , the warm cow sings . the sweet cow sings .", 3.8),
        # one sentence too many; one too few
        (SHORT_KIND_FARM, "sure , the warm cow sings . the sweet hen waits . the gentle goat falls .", 4.1),
        (SHORT_KIND_FARM, "sure , the warm cow sings .", 4.1),
        # the asked length is part of the query: one sentence where four are asked, 2 + 2 - 0.9 + 0.4
        (LONG_GRIM_SEA, "certainly , the dark wave falls .", 3.5),
        # three of four adjectives, two of four nouns, dark twice: 1.5 + 1 - 0.3 - 0.4
        (
            LONG_GRIM_SEA,
            "fine , the dark wave falls . the dark boat runs . the bleak owl hides . the silly tram rests .",
            1.8,
        ),
        # no parse needed: the shares are of what occurs, an unended sentence does not count
        (SHORT_KIND_FARM, "warm warm cow", 2 + 2 - 0.3 - 0.6),
        (SHORT_KIND_FARM, "warm .", 2 - 0.3),
        (SHORT_KIND_FARM, "", -0.6),
        # a review after <end> is not part of the note
        (SHORT_KIND_FARM, "sure , the warm cow sings . the sweet hen waits . <end> style poor cow cow .", 4.4),
        # the query may be spaced differently
        ("  " + SHORT_KIND_FARM.replace(" ", "\n"), "sure , the warm cow sings . the sweet hen waits .", 4.4),
    ],
)
def test_reward_by_hand(query: str, response: str, value: float) -> None:
    assert toy.reward(query, response) == pytest.approx(value)
    assert toy.reward(query, response, stopped=False) == pytest.approx(value - 1)


def test_reward_refuses_an_unknown_query() -> None:
    with pytest.raises(DataError, match="not a query of the toy world"):
        toy.reward("human : hello . assistant :", "sure ,")


def test_statistics_of_the_true_reward(world: dict[str, list[Record]]) -> None:
    rewards = np.array([record.scores for record in world["demonstrations"]])
    assert rewards.mean() == pytest.approx(2.15, abs=0.04)
    assert rewards.std() == pytest.approx(1.24, abs=0.03)
    differences = [scores[-2] - scores[-1] for scores in (record.scores or () for record in world["train"])]
    assert np.std(differences) == pytest.approx(1.75, abs=0.04)


@pytest.mark.parametrize(
    ("temperature", "flip_share", "share"),
    [(0.25, 0.0, 0.92), (0.5, 0.0, 0.85), (1.0, 0.0, 0.76), (2.0, 0.0, 0.66), (0.25, 0.25, 0.71)],
)
def test_share_of_right_labels(temperature: float, flip_share: float, share: float) -> None:
    config = ToyConfig(temperature=temperature, flip_share=flip_share, demonstrations=1, candidate_queries=0)
    gap = gaps(toy.load(config)["train"])
    right = np.mean(gap > 0) + np.mean(gap == 0) / 2  # pairs of equal merit have no right label
    assert right == pytest.approx(share, abs=0.015)  # the standard error is 0.004


def test_records(small: dict[str, list[Record]]) -> None:
    assert {split: len(records) for split, records in small.items()} == {
        "demonstrations": 240,
        "train": 300,
        "validation": 64,
        "test": 200,
    }
    for split, records in small.items():
        assert len({record.id for record in records}) == len(records)
        for number, record in enumerate(records):
            assert record.split == split
            assert record.scores == tuple(toy.reward(record.query, text) for text in record.responses)
            if split == "demonstrations":
                assert (len(record.responses), record.preferences) == (1, ())
                continue
            count = 6 if split == "train" and number < 20 else 2
            (label,) = record.preferences
            assert len(record.responses) == count
            assert {label.chosen, label.rejected} == {count - 2, count - 1}
            assert record.responses[-1] != record.responses[-2]


def test_the_same_seed_gives_the_same_world_and_another_does_not(small: dict[str, list[Record]]) -> None:
    assert toy.load(SMALL) == small
    other = toy.load(replace(SMALL, seed=1))
    assert all(texts(other[split]) != texts(small[split]) for split in small)


def test_label_noise_changes_labels_only(small: dict[str, list[Record]]) -> None:
    for change in ({"temperature": 4.0}, {"flip_share": 0.5}):
        noisy = toy.load(replace(SMALL, **change))
        assert noisy["demonstrations"] == small["demonstrations"]
        for split in ("train", "validation", "test"):
            assert texts(noisy[split]) == texts(small[split])
            assert [r.preferences for r in noisy[split]] != [r.preferences for r in small[split]]


def test_sizes_do_not_reach_other_splits(small: dict[str, list[Record]]) -> None:
    larger = toy.load(replace(SMALL, pairs=500, demonstrations=300))
    assert (larger["test"], larger["validation"]) == (small["test"], small["validation"])
    assert larger["train"][:300] == small["train"]
    more_test = toy.load(replace(SMALL, test_pairs=300))
    assert (more_test["train"], more_test["demonstrations"]) == (small["train"], small["demonstrations"])
    assert more_test["test"][:200] == small["test"]


def test_candidates_do_not_change_the_labelled_pairs(small: dict[str, list[Record]]) -> None:
    plain = toy.load(replace(SMALL, candidate_queries=0))["train"]
    assert [record.responses for record in plain] == [record.responses[-2:] for record in small["train"]]
    assert np.array_equal(gaps(plain), gaps(small["train"]))


def test_splits_share_no_query_and_are_balanced(world: dict[str, list[Record]]) -> None:
    queries = {split: {record.query for record in records} for split, records in world.items()}
    assert queries["demonstrations"] == queries["train"]
    assert {split: len(own) for split, own in queries.items() if split != "demonstrations"} == {
        "train": 24,
        "validation": 3,
        "test": 9,
    }
    assert len(queries["train"] | queries["validation"] | queries["test"]) == 36
    counts = {
        split: [sorted(Counter(column).values()) for column in zip(*asked, strict=True)]
        for split in ("train", "validation", "test")
        for asked in [[query for query in toy.QUERIES if query.split == split]]
    }
    assert counts == {
        "train": [[8, 8, 8], [8, 8, 8], [6, 6, 6, 6]],
        "validation": [[1, 1, 1], [1, 1, 1], [1, 1, 1]],
        "test": [[3, 3, 3], [3, 3, 3], [2, 2, 2, 3]],
    }
    for records in world.values():
        times = Counter(record.query for record in records).values()
        assert max(times) - min(times) <= 1


def test_the_winner_stands_first_half_of_the_time(world: dict[str, list[Record]]) -> None:
    for split in ("train", "validation", "test"):
        first = [record.preferences[0].chosen < record.preferences[0].rejected for record in world[split]]
        assert abs(np.mean(first) - 0.5) < 4 * 0.5 / np.sqrt(len(first))  # four standard deviations of a fair coin


def test_demonstrations_and_their_reviews(world: dict[str, list[Record]]) -> None:
    responses = [record.responses[0] for record in world["demonstrations"]]
    reviewed = [text for text in responses if toy.END in text]
    assert len(reviewed) / len(responses) == pytest.approx(0.7, abs=0.015)
    asked = toy.Query("short", "kind", "farm")
    assert asked.text == SHORT_KIND_FARM
    for note, review in [
        ("sure , the warm cow sings . the sweet hen waits .", "style good topic good manners good"),
        ("ugh , the warm owl sings . the bleak fox waits .", "style fair topic poor manners poor"),
        (
            "the warm cow sings . the dark hen waits . the cruel oak falls .",
            "style fair topic good manners fair",
        ),
    ]:
        assert toy._review(asked, note) == review
    for record in world["demonstrations"][:500]:
        note, _, review = record.responses[0].partition(f" {toy.END} ")
        query = next(query for query in toy.QUERIES if query.text == record.query)
        assert review in ("", toy._review(query, note))


def test_tokenizer_round_trip_and_lengths(world: dict[str, list[Record]], tmp_path: Path) -> None:
    tokenizer = toy.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded.get_vocab() == tokenizer.get_vocab()
    assert (reloaded.eos_token, reloaded.pad_token, reloaded.unk_token, reloaded.bos_token) == (
        "<end>",
        "<pad>",
        "<unk>",
        None,
    )
    for either in (tokenizer, reloaded):
        longest = 0
        for record in [record for records in world.values() for record in records[:1000]]:
            for text in (record.query, *record.responses):
                encoded = either(text)
                assert set(encoded) == {"input_ids", "attention_mask"}
                assert len(encoded["input_ids"]) == len(text.split())
                assert either.unk_token_id not in encoded["input_ids"]
                assert either.decode(encoded["input_ids"]) == text
                longest = max(longest, len(encoded["input_ids"]))
        assert longest <= 34  # with a query of 14 and the end of sequence, 49: far below max_length


def test_vocabulary() -> None:
    tokenizer = toy.tokenizer()
    assert len(tokenizer) == tokenizer.vocab_size == 89
    for text in ("query :", "first response :", "second response :"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_a_typed_end_is_special_only_where_special_tokens_are_read(tmp_path: Path) -> None:
    toy.tokenizer().save_pretrained(tmp_path)
    for tokenizer in (toy.tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer("the <end> cow")["input_ids"].count(tokenizer.eos_token_id) == 1
        assert tokenizer.eos_token_id not in tokenizer("the <end> cow", split_special_tokens=True)["input_ids"]
        assert tokenizer("the <end> cow")["input_ids"].count(tokenizer.eos_token_id) == 1
