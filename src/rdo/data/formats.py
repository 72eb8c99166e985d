"""The row formats: one small function for each turns a row into a record, or says which field is wrong and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rdo.data.records import SPLITS, Preference, Record
from rdo.data.templates import ASSISTANT
from rdo.errors import DataError


class UnusableRow(DataError):
    """A well-formed row that says nothing about which response is better; `reason` names the count it goes to."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def _describe(place: str, field: str, problem: str) -> str:
    return f"{place}, field '{field}': {problem}"


def _typed(row: dict[str, Any], name: str, kind: type, place: str, within: str = "") -> Any:
    """row[name], checked to be there and of the type; `within` is the path of `row` inside its line."""
    value = row.get(name)
    if value is None:
        raise DataError(_describe(place, within + name, "missing; add it or delete the row"))
    if not isinstance(value, kind) or isinstance(value, bool):
        found = type(value).__name__
        raise DataError(_describe(place, within + name, f"must be of type {kind.__name__}, found {found}"))
    return value


def _text(row: dict[str, Any], name: str, place: str, within: str = "") -> str:
    value: str = _typed(row, name, str, place, within)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        problem = f"character {error.start} is half of a surrogate pair; replace it"
        raise DataError(_describe(place, within + name, problem)) from error
    return value


def _query(row: dict[str, Any], name: str, place: str, within: str = "") -> str:
    value = _text(row, name, place, within)
    if not value.strip():
        raise DataError(_describe(place, within + name, "the query is empty; fill it in or delete the row"))
    return value


def _number(value: object, place: str, field: str) -> float:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise DataError(_describe(place, field, "must be a finite number; correct it or delete the row"))
    return number


def _check_response(text: str, place: str, field: str) -> str:
    if not text.strip():
        problem = "the response is empty; fill it in or delete the row"
        raise UnusableRow(_describe(place, field, problem), "blank_responses")
    return text


def _pair(query: str, chosen: str, rejected: str, place: str) -> Record:
    responses = (_check_response(chosen, place, "chosen"), _check_response(rejected, place, "rejected"))
    return Record("", query, responses, (Preference(0, 1),))


def read_hh(row: dict[str, Any], place: str) -> Record:
    """Anthropic HH: two whole dialogues; the query is `chosen` up to and including its last "\\n\\nAssistant:"."""
    chosen, rejected = _text(row, "chosen", place), _text(row, "rejected", place)
    end = chosen.rfind(ASSISTANT)
    if end < 0:
        problem = r"no '\n\nAssistant:' in it; rows of prompt, chosen and rejected are format 'trl'"
        raise DataError(_describe(place, "chosen", problem))
    query = chosen[: end + len(ASSISTANT)]
    if not rejected.startswith(query):
        problem = r"does not start with the query, which is 'chosen' up to its last '\n\nAssistant:'; delete the row"
        raise UnusableRow(_describe(place, "rejected", problem), "different_queries")
    return _pair(query, chosen[len(query) :], rejected[len(query) :], place)


def read_trl(row: dict[str, Any], place: str) -> Record:
    """TRL's explicit-prompt rows, and Dahoas/rm-static: the replies alone are in `chosen` and `rejected`."""
    prompt = _query(row, "prompt", place)
    chosen, rejected = _text(row, "chosen", place), _text(row, "rejected", place)
    if prompt.rstrip().endswith(ASSISTANT) and chosen.startswith(prompt) and rejected.startswith(prompt):
        problem = "repeats the prompt: these are whole dialogues, set dataset.format=hh"
        raise DataError(_describe(place, "chosen", problem))
    return _pair(prompt, chosen, rejected, place)


def read_scored(row: dict[str, Any], place: str) -> Record:
    """RRHF's rows and the project's own: query, responses; optional scores, preferences, id, split.

    preferences: [[chosen, rejected], ...] or [{"chosen": 0, "rejected": 1, "tie": false, "strength": 2.0}, ...],
    indices into responses. split: one of `records.SPLITS`. Other columns are ignored.
    """
    query = _query(row, "query", place)
    values = _typed(row, "responses", list, place)
    split = row.get("split")
    if split is not None and split not in SPLITS:
        raise DataError(_describe(place, "split", f"must be one of {', '.join(SPLITS)}"))
    fewest = 1 if split == "demonstrations" else 2
    if len(values) < fewest:
        raise DataError(_describe(place, "responses", f"needs at least {fewest}, found {len(values)}"))
    fields = {f"responses[{index}]": value for index, value in enumerate(values)}
    responses = tuple(_check_response(_text(fields, field, place), place, field) for field in fields)
    preferences = _preferences(row, len(responses), place)
    return Record(_given_id(row, place), query, responses, preferences, _scores(row, len(responses), place), split)


def _given_id(row: dict[str, Any], place: str) -> str:
    value = row.get("id")
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise DataError(_describe(place, "id", "must be text or a whole number; leave it out to have one made"))
    return str(value)


def _scores(row: dict[str, Any], count: int, place: str) -> tuple[float, ...] | None:
    if row.get("scores") is None:
        return None
    values = _typed(row, "scores", list, place)
    if len(values) != count:
        raise DataError(_describe(place, "scores", f"{len(values)} scores for {count} responses; give one for each"))
    return tuple(_number(value, place, f"scores[{index}]") for index, value in enumerate(values))


def _preferences(row: dict[str, Any], count: int, place: str) -> tuple[Preference, ...]:
    if row.get("preferences") is None:
        return ()
    values = _typed(row, "preferences", list, place)
    return tuple(_preference(value, count, place, f"preferences[{index}]") for index, value in enumerate(values))


def _preference(value: object, count: int, place: str, field: str) -> Preference:
    if isinstance(value, list) and len(value) == 2:
        value = {"chosen": value[0], "rejected": value[1]}
    if not isinstance(value, dict) or not {"chosen", "rejected"} <= set(value) <= set(Preference.__dataclass_fields__):
        problem = "must be [chosen, rejected] or an object of chosen, rejected and, optionally, tie and strength"
        raise DataError(_describe(place, field, problem))
    for name in ("chosen", "rejected"):
        index = value[name]
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
            problem = f"must be an index from 0 to {count - 1}, one of the {count} responses"
            raise DataError(_describe(place, f"{field}.{name}", problem))
    if value["chosen"] == value["rejected"]:
        raise DataError(_describe(place, field, "prefers a response over itself; name two responses"))
    tie, strength = value.get("tie"), value.get("strength")
    if tie is not None and not isinstance(tie, bool):
        raise DataError(_describe(place, f"{field}.tie", "must be true or false"))
    if strength is not None and (strength := _number(strength, place, f"{field}.strength")) < 0:
        raise DataError(_describe(place, f"{field}.strength", "is negative; swap chosen and rejected instead"))
    return Preference(value["chosen"], value["rejected"], bool(tie), strength)


def read_openai(row: dict[str, Any], place: str) -> Record:
    """OpenAI's TL;DR comparisons: a Reddit post, two summaries, a choice, and how sure the worker was.

    The confidence runs from 1 (the first is much better) over 5 (a tie) to 9 (the second is much better), so the
    strength is its distance from 5: 4 is strongest. Some batches carry none. The responses keep the data's order.
    Comparisons of news articles, which the same published files hold, are another task and are left out.
    """
    info = _typed(row, "info", dict, place)
    if info.get("post") is None and info.get("article") is not None:
        problem = "a comparison of news summaries: only those of Reddit posts (info.post) can be read"
        raise UnusableRow(_describe(place, "info.article", problem), "articles")
    post = _query(info, "post", place, "info.")
    title, subreddit = _text(info, "title", place, "info."), _text(info, "subreddit", place, "info.")
    # The batches of edited summaries write "r/name" where all others write "name".
    query = f"SUBREDDIT: r/{subreddit.removeprefix('r/')}\n\nTITLE: {title}\n\nPOST: {post}"

    summaries = _typed(row, "summaries", list, place)
    if len(summaries) != 2 or not all(isinstance(summary, dict) for summary in summaries):
        raise DataError(_describe(place, "summaries", 'must be two objects {"text": ...}'))
    texts = [_text(summary, "text", place, f"summaries[{index}].") for index, summary in enumerate(summaries)]
    responses = tuple(_check_response(text, place, f"summaries[{index}].text") for index, text in enumerate(texts))
    choice = _typed(row, "choice", int, place)
    if choice not in (0, 1):
        raise DataError(_describe(place, "choice", "must be 0 or 1"))

    extra = {} if row.get("extra") is None else _typed(row, "extra", dict, place)
    if extra.get("confidence") is None:
        return Record("", query, responses, (Preference(choice, 1 - choice),))
    confidence = _typed(extra, "confidence", int, place, "extra.")
    if not 1 <= confidence <= 9:
        raise DataError(_describe(place, "extra.confidence", "must be from 1 to 9"))
    if confidence != 5 and choice != int(confidence > 5):
        problem = f"{confidence} contradicts choice {choice}: 1..4 say the first is better, 6..9 the second"
        raise UnusableRow(_describe(place, "extra.confidence", problem), "contradicting_confidences")
    strength = float(abs(confidence - 5))
    return Record("", query, responses, (Preference(choice, 1 - choice, tie=confidence == 5, strength=strength),))


@dataclass(frozen=True)
class Reader:
    columns: tuple[str, ...]  # that identify the format, and that every row must have
    read: Callable[[dict[str, Any], str], Record]


READERS = {
    "hh": Reader(("chosen", "rejected"), read_hh),
    "trl": Reader(("prompt", "chosen", "rejected"), read_trl),
    "rrhf": Reader(("query", "responses", "scores"), read_scored),
    "records": Reader(("query", "responses"), read_scored),
    "openai": Reader(("info", "summaries", "choice"), read_openai),
}


def find_format(columns: Iterable[str], place: str) -> str:
    """The format whose identifying columns are all there, the one with most of them. Raises DataError if none is."""
    present = set(columns)
    fitting = [name for name, reader in READERS.items() if present.issuperset(reader.columns)]
    if fitting:
        return max(fitting, key=lambda name: len(READERS[name].columns))
    known = "; ".join(f"{name}: {', '.join(reader.columns)}" for name, reader in READERS.items())
    hint = ""
    if present.issuperset(("info", "summary")):
        hint = " These are OpenAI's single-summary rows (axis, evals): take the comparisons instead."
    raise DataError(f"{place}: columns {sorted(present)} fit no known format ({known}); rename them.{hint}")
