"""What is left of a query that is too long: whole old turns go first, then text of the turn that is left, from its
start. A system message and whatever a template puts around turns stay."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace

from rdo.data.records import Message, Record
from rdo.data.templates import ASSISTANT, HUMAN, text_of


def shorten(record: Record, count: Callable[[Record], int], most: int, least: int, limit: int) -> tuple[Record, int]:
    """The record with a query whose prompt has at most `most` tokens, as `count` counts them, and how many of them are
    more than those of a query without text. To get to `most`, the last turn keeps its last `least` tokens; to get to
    `limit`, one character. A frame that is longer yet stays."""
    turns = [record]
    while (shorter := without_oldest(turns[-1])) is not turns[-1]:
        turns.append(shorter)
    text, put = last_turn(turns[-1])
    frame = count(put(""))
    found = next((one for one in turns if count(one) <= most), None)
    if found is None:
        most = max(most, min(limit, frame + min(least, count(turns[-1]) - frame)))
        start = bisect_left(range(len(text) - 1), True, key=lambda n: count(put(text[n:])) <= most)
        found = put(text[start:])
    return found, count(found) - frame


def without_oldest(record: Record) -> Record:
    """The record without its oldest turn and what was replied; the same one where no other turn is left."""
    if not record.messages:
        later = record.query.find(HUMAN, 1) if record.query.startswith(HUMAN) else -1
        return record if later < 0 else replace(record, query=record.query[later:])
    kept = int(record.messages[0].role == "system")
    for n, message in enumerate(record.messages[kept + 1 :], kept + 1):
        if message.role == "user":
            messages = (*record.messages[:kept], *record.messages[n:])
            return replace(record, query=text_of(messages), messages=messages)
    return record


def last_turn(record: Record) -> tuple[str, Callable[[str], Record]]:
    """The text of a query's only turn of the user's, and what makes the record with another text in its place."""
    if record.messages:
        *before, last = record.messages

        def as_message(text: str) -> Record:
            messages = (*before, Message(last.role, text))
            return replace(record, query=text_of(messages), messages=messages)

        return last.content, as_message
    found = re.match(rf"({HUMAN}\s*)(.*?)(?={ASSISTANT}|\Z)", record.query, re.DOTALL)
    head, text = found.groups() if found else ("", record.query)
    tail = record.query[len(head) + len(text) :]
    return text, lambda text: replace(record, query=f"{head}{text}{tail}")
