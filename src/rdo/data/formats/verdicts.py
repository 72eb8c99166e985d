"""Formats of two responses in columns of their own, and a verdict on them."""

from __future__ import annotations

import json
from typing import Any

from rdo.data.formats.checks import (
    UnusableRow,
    choice,
    describe,
    flag,
    listed,
    number,
    query_text,
    response,
    text,
    typed,
)
from rdo.data.formats.conversations import query
from rdo.data.records import Message, Preference, Record
from rdo.data.templates import text_of
from rdo.errors import DataError

Row = dict[str, Any]

# Of an AlpacaFarm judge: the better output's number, or between the two.
ALPACA_VERDICTS = {1: Preference(0, 1), 1.5: Preference(0, 1, tie=True), 2: Preference(1, 0)}
WINNERS = {
    "winner_model_a": Preference(0, 1),
    "winner_model_b": Preference(1, 0),
    "winner_tie": Preference(0, 1, tie=True),
}


def _by_sign(lead: float) -> Preference:
    """The second response is better where its lead is positive; the strength is how large the lead is."""
    first, second = (1, 0) if lead > 0 else (0, 1)
    return Preference(first, second, tie=lead == 0, strength=abs(lead))


def with_input(row: Row, place: str) -> str:
    """Alpaca's query: the instruction, and on lines behind it the input, if there is one."""
    instruction = query_text(row.get("instruction"), place, "instruction")
    given = "" if row.get("input") is None else text(row.get("input"), place, "input")
    return f"{instruction}\n{given}" if given.strip() else instruction


def read_alpaca(row: Row, place: str) -> list[Record]:
    """instruction, optional input, and either AlpacaFarm's output_1, output_2 and preference (1, 2, or 1.5 for a tie),
    or LLaMA-Factory's output: [chosen, rejected]."""
    asked = with_input(row, place)
    if row.get("output_1") is not None or row.get("output_2") is not None:
        texts = tuple(response(row.get(name), place, name) for name in ("output_1", "output_2"))
        verdict = number(row.get("preference"), place, "preference")
        if verdict not in ALPACA_VERDICTS:
            raise DataError(describe(place, "preference", "must be 1, 2 or 1.5; correct it or delete the row"))
        return [Record("", asked, texts, (ALPACA_VERDICTS[verdict],))]
    if isinstance(row.get("output"), str):
        problem = "is one text, so there is no preference; give [chosen, rejected], or columns of these names"
        raise DataError(describe(place, "output", problem))
    outputs = listed(row.get("output"), place, "output", fewest=2)
    if len(outputs) != 2:
        raise DataError(describe(place, "output", f"must be [chosen, rejected], found {len(outputs)}; delete the row"))
    texts = tuple(response(value, place, f"output[{index}]") for index, value in enumerate(outputs))
    return [Record("", asked, texts, (Preference(0, 1),))]


def read_safe_rlhf(row: Row, place: str) -> list[Record]:
    """PKU-SafeRLHF: prompt, response_0, response_1, better_response_id; which is safer is another question."""
    asked = query_text(row.get("prompt"), place, "prompt")
    texts = tuple(response(row.get(name), place, name) for name in ("response_0", "response_1"))
    better = choice(row.get("better_response_id"), (0, 1), place, "better_response_id")
    return [Record("", asked, texts, (Preference(better, 1 - better),))]


def read_helpsteer(row: Row, place: str) -> list[Record]:
    """HelpSteer2-preference: prompt, response_1, response_2, preference_strength; HelpSteer3: context (messages),
    response1, response2, overall_preference. Both from -3 (the first is much better) over 0 (a tie) to 3."""
    second = row.get("overall_preference") is None
    asked_in, verdict = ("prompt", "preference_strength") if second else ("context", "overall_preference")
    names = ("response_1", "response_2") if second else ("response1", "response2")
    asked, messages = query(row.get(asked_in), place, asked_in)
    texts = tuple(response(row.get(name), place, name) for name in names)
    preference = _by_sign(number(row.get(verdict), place, verdict))
    return [Record("", asked, texts, (preference,), messages=messages)]


def read_webgpt(row: Row, place: str) -> list[Record]:
    """OpenAI's WebGPT comparisons: question: {full_text}, answer_0, answer_1, and their scores, from -1 to 1."""
    question = typed(row.get("question"), dict, place, "question")
    asked = query_text(question.get("full_text"), place, "question.full_text")
    texts = tuple(response(row.get(name), place, name) for name in ("answer_0", "answer_1"))
    first, second = (number(row.get(name), place, name) for name in ("score_0", "score_1"))
    return [Record("", asked, texts, (_by_sign(number(second - first, place, "score_1")),), (first, second))]


def read_stack_paired(row: Row, place: str) -> list[Record]:
    """lvwerra/stack-exchange-paired: question, response_j (more votes), response_k."""
    asked = query_text(row.get("question"), place, "question")
    texts = tuple(response(row.get(name), place, name) for name in ("response_j", "response_k"))
    return [Record("", asked, texts, (Preference(0, 1),))]


def read_arena_votes(row: Row, place: str) -> list[Record]:
    """LMSYS arena-55k: prompt, response_a, response_b, each a JSON list of the turns, and three columns of 0 and 1.

    After the first turn each model answers in its own conversation, so longer ones are left out as in `read_arena`.
    """
    names = ("prompt", "response_a", "response_b")
    turns = [_turns(row.get(name), place, name) for name in names]
    if any(len(texts) != 1 for texts in turns):
        problem = "several turns: each model answered in a conversation of its own; delete the row"
        raise UnusableRow(describe(place, "prompt", problem), "separate_conversations")
    asked, *replies = (texts[0] for texts in turns)
    messages = (Message("user", query_text(asked, place, "prompt")),)
    texts = tuple(response(reply, place, name) for reply, name in zip(replies, names[1:], strict=True))
    won = [preference for name, preference in WINNERS.items() if flag(row.get(name), place, name)]
    if len(won) != 1:
        raise DataError(describe(place, "winner_tie", f"exactly one of {', '.join(WINNERS)} must be 1; delete the row"))
    return [Record("", text_of(messages), texts, (won[0],), messages=messages)]


def _turns(value: object, place: str, field: str) -> list[Any]:
    """The texts of a conversation's turns, of which a table has the JSON."""
    if isinstance(value, list):
        return value
    written = text(value, place, field)
    try:
        parsed = json.loads(written)
    except (ValueError, RecursionError):
        parsed = None
    return parsed if isinstance(parsed, list) else [written]
