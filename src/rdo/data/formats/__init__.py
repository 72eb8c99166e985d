"""The row formats: one small function for each turns a row into records, or says which field is wrong and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rdo.data.formats import candidates, pairs, trees, verdicts
from rdo.data.formats.checks import UnusableRow, shown
from rdo.data.formats.conversations import is_whole
from rdo.data.records import Record
from rdo.data.templates import ASSISTANT
from rdo.errors import DataError

__all__ = ["READERS", "Reader", "UnusableRow", "find_format", "needed", "other_spelling"]


@dataclass(frozen=True)
class Reader:
    """How rows of a format are told from others, and read.

    columns: that identify the format, and that every row must have.
    read: the records of a row at a place (at least one). Raises DataError for a broken row, UnusableRow for one that is
    well formed but says nothing about which response is better.
    structured: the columns that are not text; in CSV their cells are parsed as JSON before `read` sees them.
    either: further columns, in alternatives: a row has all those of one of them.
    """

    columns: tuple[str, ...]
    read: Callable[[dict[str, Any], str], list[Record]]
    structured: tuple[str, ...] = ()
    either: tuple[tuple[str, ...], ...] = ((),)


PAIR_SCORES = ("score_chosen", "score_rejected")
RECORD = ("messages", "responses", "scores", "preferences", "desirable")
ASKED = (("query",), ("messages",))

READERS = {
    "hh": Reader(("chosen", "rejected"), pairs.read_hh),
    "trl": Reader(
        ("chosen", "rejected"),
        pairs.read_trl,
        (*PAIR_SCORES, "conversations"),
        tuple((column,) for column in pairs.PROMPTS),
    ),
    "trl_implicit": Reader(("chosen", "rejected"), pairs.read_trl_implicit, PAIR_SCORES),
    "trl_unpaired": Reader(("prompt", "completion", "label"), pairs.read_trl_unpaired, ("label",)),
    "rrhf": Reader(("responses", "scores"), candidates.read_scored, RECORD, ASKED),
    "records": Reader(("responses",), candidates.read_scored, RECORD, ASKED),
    "ranked": Reader(
        (), candidates.read_ranked, ("ranked_responses", "responses", "ranks", "answers"), candidates.RANKED
    ),
    "openai": Reader(("info", "summaries", "choice"), pairs.read_openai, ("info", "summaries", "choice", "extra")),
    "qa_feedback": Reader(
        ("question", "passages", "preference"), candidates.read_qa_feedback, ("passages", "preference")
    ),
    "ultrafeedback": Reader(
        ("instruction",),
        candidates.read_ultrafeedback,
        ("completions", "responses", "ratings"),
        (("completions",), ("responses", "ratings")),
    ),
    "oasst": Reader(("message_tree_id", "prompt"), trees.read_oasst, ("prompt",)),
    "shp": Reader(("history", "human_ref_A", "human_ref_B", "labels"), pairs.read_shp, ("labels", "score_ratio")),
    "arena": Reader(
        ("conversation_a", "conversation_b", "winner"), pairs.read_arena, ("conversation_a", "conversation_b")
    ),
    "arena_votes": Reader(
        ("prompt", "response_a", "response_b", *verdicts.WINNERS), verdicts.read_arena_votes, tuple(verdicts.WINNERS)
    ),
    "alpaca": Reader(
        ("instruction",),
        verdicts.read_alpaca,
        ("output", "preference"),
        (("output",), ("output_1", "output_2", "preference")),
    ),
    "safe_rlhf": Reader(
        ("prompt", "response_0", "response_1", "better_response_id"), verdicts.read_safe_rlhf, ("better_response_id",)
    ),
    "helpsteer": Reader(
        (),
        verdicts.read_helpsteer,
        ("context", "preference_strength", "overall_preference"),
        (
            ("prompt", "response_1", "response_2", "preference_strength"),
            ("context", "response1", "response2", "overall_preference"),
        ),
    ),
    "webgpt": Reader(
        ("question", "answer_0", "answer_1", "score_0", "score_1"),
        verdicts.read_webgpt,
        ("question", "score_0", "score_1"),
    ),
    "stack_paired": Reader(("question", "response_j", "response_k"), verdicts.read_stack_paired),
}

# Columns that may hold a query: beside texts `chosen` and `rejected` they mean that these do not hold it, too.
QUERIES = ("context", "history", "post")
# Columns as a person may write them: in other letters, or with spaces around.
SPELLINGS = {
    column.lower(): column
    for reader in READERS.values()
    for column in {*reader.columns, *(column for other in reader.either for column in other)}
}

# What a table makes of a list of messages when it is written as text.
WRITTEN_OUT = re.compile(r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:")


def find_format(row: dict[str, Any], place: str) -> str:
    """The format whose identifying columns are all there, the one with most of them; a column that is null is not.

    Where two formats share their columns, the values decide. Raises DataError if no format fits, if several do, and for
    rows that only look like those of a known one.
    """
    present = {name for name, value in row.items() if value is not None}
    found, size = _fitting(present)
    meant = {name: SPELLINGS.get(str(name).strip().lower(), name) for name in present}
    if _fitting(set(meant.values()))[1] > size:
        changed = ", ".join(
            f"{shown(str(name))} ('{other}')" for name, other in sorted(meant.items(), key=str) if name != other
        )
        raise DataError(f"{place}: columns in other letters or with spaces; did you mean: {changed}? Rename them")
    if found == ["hh", "trl_implicit"] or (found == ["trl"] and "prompt" not in row):
        found = [_format_of_pair(row, place)]
    if len(found) > 1:
        both = " and ".join(found)
        raise DataError(f"{place}: columns {_listing(present)} fit {both}; set dataset.format to the one that is meant")
    if not found:
        known = "; ".join(f"{name}: {needed(reader)}" for name, reader in READERS.items())
        hint = _hint(present)
        raise DataError(f"{place}: columns {_listing(present)} fit no known format ({known}); rename them.{hint}")
    for column in {"prompt", "completion", "chosen", "rejected"} & present:
        if isinstance(row[column], str) and WRITTEN_OUT.match(row[column]):
            raise DataError(
                f"{place}, field '{column}': is a list of messages written out as text; store the rows as JSON lines "
                f"or Parquet, or set dataset.format={found[0]} if it is meant as text"
            )
    return found[0]


def other_spelling(column: str, row: dict[str, Any]) -> str:
    """The end of a message on a missing column, where the row has it in other letters or with spaces around."""
    found = next((name for name in row if SPELLINGS.get(str(name).strip().lower()) == column != name), None)
    return f" (did you mean its {shown(str(found))}?)" if found is not None else ""


def _fitting(present: set[str]) -> tuple[list[str], int]:
    """The formats with most columns among those whose identifying columns are all there, and how many these are."""
    sizes: dict[str, int] = {}
    for name, reader in READERS.items():
        fitting = [columns for other in reader.either if present.issuperset(columns := (*reader.columns, *other))]
        if fitting:
            sizes[name] = max(map(len, fitting))
    largest = max(sizes.values(), default=0)
    return [name for name, size in sizes.items() if size == largest], largest


def _format_of_pair(row: dict[str, Any], place: str) -> str:
    """The format of a row of chosen and rejected without a prompt, at least not in a column of this name."""
    pair = (row["chosen"], row["rejected"])
    texts = [value for value in pair if isinstance(value, str)]
    if any(ASSISTANT in value for value in texts):
        return "hh"
    if texts and "prompt" in row:  # the column is there, and only this row's is null
        return "trl"
    asked = pairs.prompt_column(row)
    if row.get(asked) is not None and (asked == "conversations" or not all(map(is_whole, pair))):
        return "trl"
    others = [name for name in QUERIES if name in row]
    if texts and others:
        raise DataError(
            f"{place}: the query seems to stand in '{others[0]}', not in the texts 'chosen' and 'rejected'; rename it "
            "to 'prompt', or set dataset.format=trl_implicit to take it from how the two texts begin"
        )
    return "trl_implicit"


def _hint(present: set[str]) -> str:
    if present.issuperset(("info", "summary")):
        return " These are OpenAI's single-summary rows (axis, evals): take the comparisons instead."
    if present.issuperset(("message_id", "text", "role")):
        return " These are OpenAssistant's messages, one a row: take the file of trees (.trees.jsonl.gz) instead."
    return ""


def _listing(columns: set[str]) -> str:
    names = [shown(str(name)) for name in sorted(columns, key=str)]
    return f"[{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}]"


def needed(reader: Reader) -> str:
    """The identifying columns of a format, in words."""
    if all(len(other) == 1 for other in reader.either):
        return f"{', '.join(reader.columns)}, {' or '.join(other[0] for other in reader.either)}"
    return " | ".join(", ".join((*reader.columns, *other)) for other in reader.either)
