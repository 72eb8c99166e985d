"""The toy world: its true reward by hand, its statistics, what depends on which setting, and its tokenizer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rdo.data import toy
from rdo.data.records import Record, Records
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


RIGHT = "sure , the warm cow sings . the sweet hen waits ."
FOUR = "fine , the dark wave falls . the dark boat runs . the bleak owl hides . the silly tram rests ."


@pytest.mark.parametrize(
    ("response", "value"),
    [
        (RIGHT, 4.4),  # 2 + 2 + 0.4
        (RIGHT.replace("sure", "ugh"), 3.6),
        # No opener, so no manners; an opener counts in the first place only.
        (RIGHT.removeprefix("sure , "), 4.0),
        (RIGHT.removeprefix("sure , ").replace("the sweet", "sure the sweet"), 4.0),
        (RIGHT.replace("sweet", "bleak"), 3.4),  # one of two adjectives of another style
        (RIGHT.replace("cow", "crab").replace("hen", "owl"), 2.4),  # no noun on the topic
        # Cow and sings repeated once: 4.4 - 2 * 0.3; the, full stops and commas are no repeats.
        (RIGHT.replace("hen waits", "cow sings"), 3.8),
        (f"{RIGHT} the gentle goat falls .", 4.1),  # one sentence too many; one too few
        ("sure , the warm cow sings .", 4.1),
        # No parse needed: the shares are of what occurs, an unended sentence does not count.
        ("warm warm cow", 2 + 2 - 0.3 - 0.6),
        ("warm .", 2 - 0.3),
        ("", -0.6),
        (f"{RIGHT} <end> style poor cow cow .", 4.4),  # a review is not part of the note
    ],
)
def test_reward_by_hand(response: str, value: float) -> None:
    assert toy.reward(SHORT_KIND_FARM, response) == pytest.approx(value)
    assert toy.reward(f"  {SHORT_KIND_FARM}".replace(" ", "\n"), response, stopped=False) == pytest.approx(value - 1)


def test_reward_goes_by_the_query() -> None:
    assert toy.reward(LONG_GRIM_SEA, "certainly , the dark wave falls .") == pytest.approx(2 + 2 - 0.9 + 0.4)
    # Three of four adjectives, two of four nouns, dark twice.
    assert toy.reward(LONG_GRIM_SEA, FOUR) == pytest.approx(1.5 + 1 - 0.3 - 0.4)
    with pytest.raises(DataError, match="not a query of the toy world"):
        toy.reward("human : hello . assistant :", "sure ,")


def test_statistics(world: dict[str, list[Record]]) -> None:
    rewards = np.array([record.scores for record in world["demonstrations"]])
    assert rewards.mean() == pytest.approx(2.15, abs=0.04)
    assert rewards.std() == pytest.approx(1.24, abs=0.03)
    differences = [scores[-2] - scores[-1] for scores in (record.scores or () for record in world["train"])]
    assert np.std(differences) == pytest.approx(1.75, abs=0.04)
    first = [record.preferences[0].chosen < record.preferences[0].rejected for record in world["train"]]
    assert np.mean(first) == pytest.approx(0.5, abs=0.018)  # four standard deviations of a fair coin


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


# Hashes of every record of each split: the world that all recorded numbers come from.
WORLD = {
    "demonstrations": "c305cb7dd9c55039aca5582a7d155991",
    "train": "50152243af31c830635c4b7e3a2ef314",
    "validation": "751db46155a5c1425c588442cc17c6f3",
    "test": "d2fd1f26151f95ff0c7fe3469a5232c0",
}


def test_the_same_seed_gives_the_same_world_and_another_does_not(small: dict[str, list[Record]]) -> None:
    assert {split: Records.in_memory(records).fingerprint() for split, records in small.items()} == WORLD
    other = toy.load(replace(SMALL, seed=1))
    assert all(texts(other[split]) != texts(small[split]) for split in small)


def test_label_noise_changes_labels_only(small: dict[str, list[Record]]) -> None:
    for change in ({"temperature": 4.0}, {"flip_share": 0.5}):
        noisy = toy.load(replace(SMALL, **change))
        assert {split: texts(records) for split, records in noisy.items()} == {s: texts(r) for s, r in small.items()}
        for split in ("train", "validation", "test"):
            assert [r.preferences for r in noisy[split]] != [r.preferences for r in small[split]]


def test_a_larger_split_begins_as_the_smaller_one_and_reaches_no_other(small: dict[str, list[Record]]) -> None:
    for larger in (replace(SMALL, pairs=500, demonstrations=300), replace(SMALL, test_pairs=300)):
        found = toy.load(larger)
        assert {split: found[split][: len(records)] for split, records in small.items()} == small


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


def test_demonstrations_and_their_reviews(world: dict[str, list[Record]]) -> None:
    reviewed = [record for record in world["demonstrations"] if toy.END in record.responses[0]]
    assert len(reviewed) / len(world["demonstrations"]) == pytest.approx(0.7, abs=0.015)
    for record in reviewed[:500]:
        words, asked = record.responses[0].split(f" {toy.END} ")[0].split(), record.query.split()
        grades = []
        for groups, wanted in ((toy.ADJECTIVES, asked[6]), (toy.NOUNS, asked[10])):
            found = [group for word in words for group, own in groups.items() if word in own]
            grades.append(
                "poor"
                if 3 * found.count(wanted) < len(found)
                else "fair"
                if 3 * found.count(wanted) < 2 * len(found)
                else "good"
            )
        manners = "good" if words[0] in toy.POLITE else "poor"
        assert record.responses[0].endswith(f" {toy.END} style {grades[0]} topic {grades[1]} manners {manners}")


@pytest.fixture(params=["made", "saved"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedTokenizerBase:
    made = toy.tokenizer()
    made.save_pretrained(tmp_path)
    return made if request.param == "made" else AutoTokenizer.from_pretrained(tmp_path)


def test_the_tokenizer_has_a_word_for_everything(
    world: dict[str, list[Record]], tokenizer: PreTrainedTokenizerBase
) -> None:
    special = (tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token)
    assert special == ("<end>", "<pad>", "<unk>", None)
    assert tokenizer.get_vocab() == toy.tokenizer().get_vocab()
    assert len(tokenizer) == tokenizer.vocab_size == 89
    said = [t for records in world.values() for record in records[:1000] for t in (record.query, *record.responses)]
    for text in ("query :", "first response :", "second response :", *said):
        encoded = tokenizer(text)
        assert set(encoded) == {"input_ids", "attention_mask"}
        assert len(encoded["input_ids"]) == len(text.split()) <= 34
        assert tokenizer.unk_token_id not in encoded["input_ids"]
        assert tokenizer.decode(encoded["input_ids"]) == text


def test_a_typed_end_is_special_only_where_special_tokens_are_read(tokenizer: PreTrainedTokenizerBase) -> None:
    for parsed, count in ((True, 1), (False, 0), (True, 1)):
        ids = tokenizer("the <end> cow", split_special_tokens=not parsed)["input_ids"]
        assert ids.count(tokenizer.eos_token_id) == count
