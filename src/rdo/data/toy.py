"""The toy world: short notes written to order, whose true reward is known.

A query asks for a short, medium or long note (2, 3 or 4 sentences) in one of three styles about one of four topics.
A response is an opener, a comma and sentences of the form `the {adjective} {noun} {verb} .`.

Random numbers: every draw comes from a stream of its own, keyed by (seed, split, purpose), and every stream is read
row by row. So the size of one split never reaches another, more pairs extend a split without changing its first
ones, and labels, which have their own stream, can change without any text changing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from rdo.data.records import SPLITS, Preference, Record, query_key
from rdo.runtime.errors import DataError
from rdo.settings import ToyConfig

PAD, UNKNOWN, END = "<pad>", "<unk>", "<end>"

LENGTHS = {"short": 2, "medium": 3, "long": 4}  # sentences asked for
POLITE = ("sure", "gladly", "certainly")
RUDE = ("whatever", "ugh", "fine")
ADJECTIVES = {
    "kind": ("gentle", "warm", "sweet", "caring", "friendly"),
    "grim": ("bleak", "dark", "cruel", "bitter", "gloomy"),
    "funny": ("silly", "goofy", "wacky", "clumsy", "dizzy"),
}
NOUNS = {
    "farm": ("cow", "barn", "tractor", "hen", "goat", "field"),
    "sea": ("wave", "boat", "whale", "sailor", "crab", "gull"),
    "city": ("tram", "tower", "street", "taxi", "market", "bridge"),
    "forest": ("oak", "fox", "owl", "moss", "deer", "squirrel"),
}
VERBS = ("sings", "waits", "sleeps", "falls", "runs", "shines", "dances", "hides", "dreams", "rests")

_STYLE_OF = {word: style for style, words in ADJECTIVES.items() for word in words}
_TOPIC_OF = {word: topic for topic, words in NOUNS.items() for word in words}
_CONTENT = {*_STYLE_OF, *_TOPIC_OF, *VERBS}

_QUERY = "human : please write a {} {} note about the {} . assistant :"
_REVIEW = "style {} topic {} manners {}"
_GRADES = ("poor", "fair", "good")
_COMPARISON = "query first second response"  # the words of the difference model's template

_MOST_SENTENCES = max(LENGTHS.values()) + 1  # a note that misses the asked length misses it by one
_PURPOSES = ("first", "second", "redraw", "candidates", "labels", "reviews")


class Query(NamedTuple):
    """What one of the 36 queries asks for."""

    length: str
    style: str
    topic: str

    @property
    def text(self) -> str:
        return _QUERY.format(*self)

    @property
    def split(self) -> str:
        """`test`, `validation` or `train`: 9, 3 and 24 queries, in each of which the lengths, the styles and, as nearly
        as can be, the topics are equally frequent."""
        length = tuple(LENGTHS).index(self.length)
        style = tuple(ADJECTIVES).index(self.style)
        remainder = (length + style + tuple(NOUNS).index(self.topic)) % 4
        if remainder == 0:
            return "test"
        return "validation" if remainder == 2 and style == (length + 1) % 3 else "train"


QUERIES = tuple(Query(length, style, topic) for length in LENGTHS for style in ADJECTIVES for topic in NOUNS)
_QUERY_OF = {query.text: query for query in QUERIES}


def _judge(query: Query, response: str) -> tuple[float, float, int, int, int]:
    """What the true reward looks at in the words up to the first `<end>`.

    Style share: of the adjectives that occur, those of the asked style; 0 if none occurs. Topic share: the same of the
    nouns. Repeats: adjectives, nouns and verbs beyond the first occurrence of each. Length error: the distance of the
    number of full stops from the asked 2, 3 or 4. Manners: 1 if the first word is a polite opener, -1 a rude one.
    """
    words = response.split()
    words = words[: words.index(END)] if END in words else words
    styles = [_STYLE_OF[word] for word in words if word in _STYLE_OF]
    topics = [_TOPIC_OF[word] for word in words if word in _TOPIC_OF]
    content = [word for word in words if word in _CONTENT]
    opener = words[0] if words else ""
    return (
        styles.count(query.style) / max(len(styles), 1),
        topics.count(query.topic) / max(len(topics), 1),
        len(content) - len(set(content)),
        abs(words.count(".") - LENGTHS[query.length]),
        (opener in POLITE) - (opener in RUDE),
    )


def reward(query: str, response: str, *, stopped: bool = True) -> float:
    """The true reward r* of any text as an answer to one of the world's queries.

    r* = 2 * style share + 2 * topic share - 0.3 * repeats - 0.3 * length error + 0.4 * manners - 1 unless stopped,
    which says whether the writer ended the text; rounded, so that texts of equal merit are exactly equal.
    """
    asked = _QUERY_OF.get(query_key(query))
    if asked is None:
        raise DataError(f"not a query of the toy world: {query!r}; they read {QUERIES[0].text!r}")
    style_share, topic_share, repeats, length_error, manners = _judge(asked, response)
    value = 2.0 * style_share + 2.0 * topic_share - 0.3 * repeats - 0.3 * length_error + 0.4 * manners
    return round(value - (0.0 if stopped else 1.0), 9)


def _stream(seed: int, split: str, purpose: str) -> np.random.Generator:
    key = (SPLITS.index(split), _PURPOSES.index(purpose))
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _queries(split: str, count: int) -> list[Query]:
    """`count` queries of the split, each as often as the others: taken in turn, not drawn."""
    home = "train" if split == "demonstrations" else split
    own = [query for query in QUERIES if query.split == home]
    return [own[index % len(own)] for index in range(count)]


def _slots(groups: Mapping[str, tuple[str, ...]], right: np.ndarray, hit: np.ndarray, pick: np.ndarray) -> np.ndarray:
    """The words of the slots: where `hit`, one of the group number `right`; elsewhere any word, which may be right too.

    pick: uniform numbers in [0, 1); right: one group number a row.
    """
    words = np.array(list(groups.values()))
    size = words.shape[1]
    drawn = np.where(hit, right[:, None] * size + (pick * size).astype(int), (pick * words.size).astype(int))
    return words.reshape(-1)[drawn]


def _notes(queries: Sequence[Query], rng: np.random.Generator) -> list[str]:
    """One note for each query, by a writer whose quality is q ~ Beta(0.8, 0.8) anew for each note.

    An adjective or noun is of the asked style or topic with probability 0.1 + 0.8 q and otherwise any of the world's;
    the opener is polite and the length as asked with probability 0.2 + 0.6 q each, otherwise the opener is rude and
    the length one sentence too short or too long.
    """
    count = len(queries)
    # Beta draws take a varying amount of their stream: with one of their own, both streams stay aligned to rows.
    quality_rng, slot_rng = rng.spawn(2)
    quality = quality_rng.beta(0.8, 0.8, count)
    uniform = slot_rng.random((count, 4 + 5 * _MOST_SENTENCES))
    polite, opener, as_asked, shorter = uniform[:, :4].T
    adjective_hit, adjective_pick, noun_hit, noun_pick, verb_pick = np.split(uniform[:, 4:], 5, axis=1)

    manners_chance, slot_chance = 0.2 + 0.6 * quality, (0.1 + 0.8 * quality)[:, None]
    openers = np.array([RUDE, POLITE])[(polite < manners_chance).astype(int), (opener * 3).astype(int)]
    asked = np.array([LENGTHS[query.length] for query in queries], dtype=int)
    sentences = asked + np.where(as_asked < manners_chance, 0, np.where(shorter < 0.5, -1, 1))
    style = np.array([tuple(ADJECTIVES).index(query.style) for query in queries], dtype=int)
    topic = np.array([tuple(NOUNS).index(query.topic) for query in queries], dtype=int)
    adjectives = _slots(ADJECTIVES, style, adjective_hit < slot_chance, adjective_pick)
    nouns = _slots(NOUNS, topic, noun_hit < slot_chance, noun_pick)
    verbs = np.array(VERBS)[(verb_pick * len(VERBS)).astype(int)]
    rows = zip(openers.tolist(), sentences.tolist(), adjectives.tolist(), nouns.tolist(), verbs.tolist(), strict=True)
    return [
        " ".join([first, ",", *(f"the {a} {n} {v} ." for a, n, v in list(zip(*words, strict=True))[:length])])
        for first, length, *words in rows
    ]


def _review(query: Query, note: str) -> str:
    """A reader's verdict in words: a share is good from two thirds, fair from one third, else poor; manners are good
    if polite, poor if rude."""
    *shares, _, _, manners = _judge(query, note)
    grades = [_GRADES[(share >= 1 / 3) + (share >= 2 / 3)] for share in shares]
    return _REVIEW.format(*grades, _GRADES[1 + manners])


def _demonstrations(config: ToyConfig) -> list[Record]:
    """Notes for the base policy to learn from, 70 % of them followed by `<end>` and a reader's review.

    The reviews let a model that starts from nothing learn what there is to judge. They judge one note at a time, so
    they favour scorers that read one response at a time over those that compare two.
    """
    split = "demonstrations"
    queries = _queries(split, config.demonstrations)
    notes = _notes(queries, _stream(config.seed, split, "first"))
    reviewed = _stream(config.seed, split, "reviews").random(len(notes)) < 0.7
    texts = [f"{n} {END} {_review(q, n)}" if r else n for q, n, r in zip(queries, notes, reviewed, strict=True)]
    return [
        Record(f"toy-{split}-{index}", query.text, (text,), scores=(reward(query.text, text),), split=split)
        for index, (query, text) in enumerate(zip(queries, texts, strict=True))
    ]


def _labels(rewards: np.ndarray, config: ToyConfig, rng: np.random.Generator) -> np.ndarray:
    """For rows of two true rewards, whether the first is labelled the better one: Bradley-Terry, then flips."""
    uniform = rng.random((len(rewards), 2))
    gap = (rewards[:, 0] - rewards[:, 1]) / config.temperature
    first_wins = uniform[:, 0] < 0.5 * (1.0 + np.tanh(gap / 2.0))  # the sigmoid, without its overflow
    return first_wins ^ (uniform[:, 1] < config.flip_share)


def _pairs(config: ToyConfig, split: str, count: int, with_candidates: int = 0) -> list[Record]:
    """Records with one labelled pair, their last two responses; the first ones have further responses before them.

    Both responses of a pair are drawn alike and labelled afterwards, so either place is as likely to win.
    """
    first_rng, second_rng, redraw, extra_rng, label_rng = (_stream(config.seed, split, p) for p in _PURPOSES[:5])
    queries = _queries(split, count)
    first, second = _notes(queries, first_rng), _notes(queries, second_rng)
    for index, query in enumerate(queries):
        while second[index] == first[index]:
            second[index] = _notes([query], redraw)[0]
    others = config.candidates - 2
    extra = _notes([query for query in queries[:with_candidates] for _ in range(others)], extra_rng)
    responses = [(*extra[i * others : (i + 1) * others], first[i], second[i]) for i in range(count)]
    scores = [tuple(reward(q.text, text) for text in texts) for q, texts in zip(queries, responses, strict=True)]
    first_wins = _labels(np.array([row[-2:] for row in scores]), config, label_rng)
    records = []
    for index, (query, texts, wins) in enumerate(zip(queries, responses, first_wins, strict=True)):
        last = len(texts) - 1
        label = Preference(last - 1, last) if wins else Preference(last, last - 1)
        records.append(Record(f"toy-{split}-{index}", query.text, texts, (label,), scores[index], split))
    return records


def load(config: ToyConfig) -> dict[str, list[Record]]:
    """The four splits: demonstrations and train share 24 queries, validation has 3 others and test 9 others.

    The first `candidate_queries` records of train have `candidates` responses, all others two. Validation has a quarter
    of `test_pairs`, at least 64. `Record.scores` are the true rewards.
    """
    return {
        "demonstrations": _demonstrations(config),
        "train": _pairs(config, "train", config.pairs, config.candidate_queries),
        "validation": _pairs(config, "validation", max(64, config.test_pairs // 4)),
        "test": _pairs(config, "test", config.test_pairs),
    }


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A word-level tokenizer of the whole world; `<end>` is its end of sequence, and it adds nothing by itself."""
    texts = [query.text for query in QUERIES]
    texts += [*POLITE, *RUDE, ",", *_STYLE_OF, *_TOPIC_OF, *VERBS, _REVIEW.replace("{}", ""), *_GRADES, _COMPARISON]
    words = dict.fromkeys(word for text in texts for word in text.split())
    vocabulary = {token: number for number, token in enumerate((PAD, UNKNOWN, END, *words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    # This one also parts brackets from letters. So where special tokens are not recognised (split_special_tokens=True)
    # a typed "<end>" comes out as unknown words; whole, it would be found in the vocabulary and end the sequence.
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
