"""Formats of K responses to a query, with preferences, scores, ratings or ranks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from rdo.data.formats.checks import (
    UnusableRow,
    choice,
    describe,
    flag,
    identifier,
    listed,
    number,
    numbers,
    query_text,
    response,
    responses,
    shown,
    strength,
    text,
    typed,
)
from rdo.data.formats.conversations import Conversation, query
from rdo.data.records import SPLITS, Preference, Record
from rdo.errors import DataError

Row = dict[str, Any]

# Every layout of the format `ranked`: how the query is called, and what says which response is better.
RANKED = (
    *(
        (asked, *ranked)
        for asked in ("prompt", "query")
        for ranked in (("ranked_responses",), ("responses", "ranks"), ("answers",))
    ),
    ("question", "answers"),
)


def by_rank(ranks: Sequence[float]) -> tuple[Preference, ...]:
    """All pairs, the lower rank first; equal ranks are ties."""
    pairs = (sorted(pair, key=lambda k: ranks[k]) for pair in combinations(range(len(ranks)), 2))
    return tuple(Preference(better, worse, tie=ranks[better] == ranks[worse]) for better, worse in pairs)


def _by_score(scores: Sequence[float], place: str, field: str) -> tuple[Preference, ...]:
    """All pairs, the higher score first, their difference as strength; equal scores are ties."""
    pairs = by_rank([-score for score in scores])
    return tuple(replace(p, strength=number(scores[p.chosen] - scores[p.rejected], place, field)) for p in pairs)


def read_scored(row: Row, place: str) -> list[Record]:
    """RRHF's rows and the project's own: query, responses; optional scores, preferences, desirable, id, split.

    messages: the query as a conversation, in place of `query`. preferences: [[chosen, rejected], ...] or
    [{"chosen": 0, "rejected": 1, "tie": false, "strength": 2.0}, ...], indices into responses. desirable: of unpaired
    data, whether each response is a good one; one response is enough then. split: one of `records.SPLITS`. An empty
    query, id or split is none. Other columns are ignored.
    """
    if row.get("query") not in (None, "") and row.get("messages") is not None:
        raise DataError(describe(place, "messages", "stands beside 'query'; keep one of the two"))
    if row.get("messages") is None:
        asked, messages = query(typed(row.get("query"), str, place, "query"), place, "query")
    else:
        asked, messages = query(typed(row.get("messages"), list, place, "messages"), place, "messages")
    split = None if row.get("split") == "" else row.get("split")
    if split is not None and split not in SPLITS:
        raise DataError(describe(place, "split", f"must be one of {', '.join(SPLITS)}; correct it or delete the row"))
    alone = split == "demonstrations" or row.get("desirable") is not None
    texts = responses(row.get("responses"), place, "responses", fewest=1 if alone else 2)
    count = len(texts)
    scores = None if row.get("scores") is None else numbers(row.get("scores"), place, "scores", count)
    desirable = None
    if row.get("desirable") is not None:
        labels = listed(row.get("desirable"), place, "desirable", count=count)
        desirable = tuple(flag(label, place, f"desirable[{index}]") for index, label in enumerate(labels))
    given = [] if row.get("preferences") is None else listed(row.get("preferences"), place, "preferences")
    preferences = tuple(_preference(entry, count, place, f"preferences[{n}]") for n, entry in enumerate(given))
    own_id = identifier(row.get("id"), place, "id")
    return [Record(own_id, asked, texts, preferences, scores, split, messages, desirable)]


def _preference(value: object, count: int, place: str, field: str) -> Preference:
    if isinstance(value, list) and len(value) == 2:
        value = {"chosen": value[0], "rejected": value[1]}
    if not isinstance(value, dict) or not {"chosen", "rejected"} <= set(value) <= set(Preference.__dataclass_fields__):
        problem = "must be [chosen, rejected] or an object of chosen, rejected and, optionally, tie and strength"
        raise DataError(describe(place, field, problem))
    for name in ("chosen", "rejected"):
        index = value[name]
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
            problem = f"must be an index from 0 to {count - 1}, one of the {count} responses"
            raise DataError(describe(place, f"{field}.{name}", problem))
    if value["chosen"] == value["rejected"]:
        raise DataError(describe(place, field, "prefers a response over itself; name two responses"))
    tie = value.get("tie")
    if tie is not None and not isinstance(tie, bool):
        raise DataError(describe(place, f"{field}.tie", "must be true or false; correct it or delete the row"))
    margin = strength(value.get("strength"), place, f"{field}.strength")
    return Preference(value["chosen"], value["rejected"], bool(tie), margin)


def read_ranked(row: Row, place: str) -> list[Record]:
    """Ranked responses: the query in prompt or query, text or messages, and the ranking in one of three ways.

    ranked_responses: texts, best first. responses and ranks: texts, and the rank of each; the lowest number is best,
    equal numbers are ties. answers: objects of answer and rank (berkeley-nest/Nectar), or, beside the query in
    question, of text and pm_score, the highest of which is best (HuggingFaceH4/stack-exchange-preferences).
    """
    name = next((name for name in ("prompt", "query", "question") if row.get(name) is not None), "query")
    asked, messages = query(row.get(name), place, name)
    if name == "question":
        return _read_votes(row, asked, messages, place)
    if row.get("ranked_responses") is not None:
        texts = responses(row.get("ranked_responses"), place, "ranked_responses")
        ranks: tuple[float, ...] = tuple(range(len(texts)))
    elif row.get("answers") is not None:
        values = listed(row.get("answers"), place, "answers", fewest=2)
        answers = [typed(entry, dict, place, f"answers[{n}]") for n, entry in enumerate(values)]
        texts = tuple(response(entry.get("answer"), place, f"answers[{n}].answer") for n, entry in enumerate(answers))
        ranks = tuple(number(entry.get("rank"), place, f"answers[{n}].rank") for n, entry in enumerate(answers))
    elif row.get("responses") is not None:
        texts = responses(row.get("responses"), place, "responses")
        ranks = numbers(row.get("ranks"), place, "ranks", len(texts))
    else:
        problem = "missing; give ranked_responses, or responses and ranks, or answers"
        raise DataError(describe(place, "ranked_responses", problem))
    return [Record("", asked, texts, by_rank(ranks), messages=messages)]


def _read_votes(row: Row, asked: str, messages: Conversation, place: str) -> list[Record]:
    values = listed(row.get("answers"), place, "answers", fewest=2)
    answers = [typed(entry, dict, place, f"answers[{n}]") for n, entry in enumerate(values)]
    texts = tuple(response(entry.get("text"), place, f"answers[{n}].text") for n, entry in enumerate(answers))
    scores = tuple(number(entry.get("pm_score"), place, f"answers[{n}].pm_score") for n, entry in enumerate(answers))
    return [Record("", asked, texts, _by_score(scores, place, "answers"), scores, messages=messages)]


def read_ultrafeedback(row: Row, place: str) -> list[Record]:
    """openbmb/UltraFeedback: instruction, completions: [{response, overall_score, annotations, ...}, ...].

    Scores are overall_score, else fine-grained_score, else the mean of the annotations' ratings ("N/A" left out): the
    first of these that every completion has. Also read: instruction, responses and ratings, one rating a response.
    """
    asked = query_text(row.get("instruction"), place, "instruction")
    if row.get("completions") is None:
        texts = responses(row.get("responses"), place, "responses")
        ratings = listed(row.get("ratings"), place, "ratings", count=len(texts))
        scores = [_rating(rating, place, f"ratings[{index}]") for index, rating in enumerate(ratings)]
        return [Record("", asked, texts, _by_score(scores, place, "ratings"), tuple(scores))]
    values = listed(row.get("completions"), place, "completions")
    fields = [f"completions[{index}]" for index in range(len(values))]
    completions = [typed(value, dict, place, field) for value, field in zip(values, fields, strict=True)]
    if len(completions) < 2:
        problem = f"needs at least 2, found {len(completions)}; delete the row"
        raise UnusableRow(describe(place, "completions", problem), "too_few_responses")
    named = list(zip(completions, fields, strict=True))
    texts = tuple(response(entry.get("response"), place, f"{field}.response") for entry, field in named)
    for name in ("overall_score", "fine-grained_score"):
        if all(entry.get(name) is not None for entry in completions):
            scores = [number(entry[name], place, f"{field}.{name}") for entry, field in named]
            break
    else:
        scores = [_mean_rating(entry, place, f"{field}.annotations") for entry, field in named]
    return [Record("", asked, texts, _by_score(scores, place, "completions"), tuple(scores))]


def _mean_rating(completion: Row, place: str, field: str) -> float:
    ratings = []
    for aspect, value in typed(completion.get("annotations"), dict, place, field).items():
        path = f"{field}.{aspect if aspect.isidentifier() else shown(aspect)}"
        rating = typed(value, dict, place, path).get("Rating")
        if rating != "N/A":
            ratings.append(_rating(rating, place, f"{path}.Rating"))
    if not ratings:
        raise DataError(describe(place, field, "there is no rating, and no overall_score; delete the row"))
    return number(sum(ratings) / len(ratings), place, field)


def _rating(value: object, place: str, field: str) -> float:
    """A number, which UltraFeedback writes as text."""
    if isinstance(value, str):
        if not re.fullmatch(r"-?\d+(\.\d+)?", value, re.ASCII):
            raise DataError(describe(place, field, f"{shown(value)} is no number; correct it or delete the row"))
        value = float(value)
    return number(value, place, field)


def read_qa_feedback(row: Row, place: str) -> list[Record]:
    """Fine-Grained RLHF's questions: question, passages, "prediction 1" to "prediction K", and preference.

    preference: for the pairs in the order 12, 13, ..., 1K, 23, ...: 0 for a tie, 1 or 2 for the better one.
    passages: [[title, sentence, ...], ...]. The query is laid out as "CONTEXT: title\\nsentences", passages parted by
    empty lines, and last "QUESTION: question": what is too long loses its beginning, and so never the question.
    """
    question = query_text(row.get("question"), place, "question")
    passages = listed(row.get("passages"), place, "passages")
    context = [_passage(passage, place, f"passages[{index}]") for index, passage in enumerate(passages)]
    asked = "\n\n".join([*context, f"QUESTION: {question}"])

    found = (re.fullmatch(r"prediction ([1-9]\d?)", name) for name, value in row.items() if value is not None)
    count = max((int(match[1]) for match in found if match), default=0)
    names = [f"prediction {k}" for k in range(1, max(count, 2) + 1)]
    texts = tuple(response(row.get(name), place, name) for name in names)
    pairs = list(combinations(range(len(texts)), 2))
    values = listed(row.get("preference"), place, "preference")
    if len(values) != len(pairs):
        problem = f"{len(values)} for {len(texts)} predictions, which make {len(pairs)} pairs; give one for each"
        raise DataError(describe(place, "preference", problem))
    choices = [choice(value, (0, 1, 2), place, f"preference[{index}]") for index, value in enumerate(values)]
    preferences = tuple(
        Preference(*(pair[::-1] if better == 2 else pair), tie=better == 0)
        for pair, better in zip(pairs, choices, strict=True)
    )
    return [Record("", asked, texts, preferences)]


def _passage(value: object, place: str, field: str) -> str:
    entries = listed(value, place, field, fewest=1)
    title, *sentences = (text(entry, place, f"{field}[{index}]") for index, entry in enumerate(entries))
    # An article's first sentence has the title in front of it.
    plain = (" ".join(sentence.removeprefix(f"{title}\n\n").split()) for sentence in sentences)
    return f"CONTEXT: {title}\n{' '.join(plain)}"
