"""Conversations: lists of messages as chat data write them, and where a query ends and a response begins.

A message is {"role", "content"}, or ShareGPT's {"from", "value"}. Content is text, or a list of parts of which all are
{"type": "text", "text": ...}; these are joined. Images, tools and their calls cannot be read. Other keys are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from rdo.data.formats.checks import UnusableRow, describe, listed, query_text, shown, text, typed
from rdo.data.records import ROLES, Message
from rdo.data.templates import text_of
from rdo.errors import DataError

ALIASES = {"human": "user", "prompter": "user", "gpt": "assistant"}

Conversation = tuple[Message, ...]


def is_text(value: object, place: str, field: str) -> bool:
    """Whether the field is text rather than a list of messages; an error if it is neither."""
    if not isinstance(value, str | list | None):
        problem = f"must be text or a list of messages, found {type(value).__name__}; correct it or delete the row"
        raise DataError(describe(place, field, problem))
    return not isinstance(value, list)


def is_whole(value: object) -> bool:
    """Whether a value is a list of messages that holds the query, too: one that does not begin with the reply."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    role = value[0].get("role") or value[0].get("from")
    return ALIASES.get(str(role), role) != "assistant"


def conversation(value: object, place: str, field: str) -> Conversation:
    """The messages of a list, at least one; a system's message only in front, no user's message blank."""
    values = listed(value, place, field, fewest=1)
    messages = tuple(_message(entry, place, f"{field}[{index}]") for index, entry in enumerate(values))
    for index, message in enumerate(messages):
        if index and message.role == "system":
            problem = "the system may only speak first; move the message to the front or delete the row"
            raise DataError(describe(place, f"{field}[{index}]", problem))
    return messages


def _message(value: object, place: str, field: str) -> Message:
    fields = typed(value, dict, place, field)
    role_key, content_key = "role", "content"
    if fields.get("role") is None and fields.get("from") is not None:
        role_key, content_key = "from", "value"
    given = text(fields.get(role_key), place, f"{field}.{role_key}")
    role = ALIASES.get(given, given)
    if role not in ROLES:
        problem = f"the role {shown(given)} cannot be read, only {', '.join(ROLES)} can; delete the row"
        raise DataError(describe(place, f"{field}.{role_key}", problem))
    for calls in ("tool_calls", "function_call"):
        if fields.get(calls):
            raise DataError(describe(place, f"{field}.{calls}", "tools and their calls cannot be read; delete the row"))
    content = _content(fields.get(content_key), place, f"{field}.{content_key}")
    if role == "user" and not content.strip():
        raise DataError(describe(place, f"{field}.{content_key}", "the user's message is empty; delete the row"))
    return Message(role, content)


def _content(value: object, place: str, field: str) -> str:
    if not isinstance(value, list):
        return text(value, place, field)
    parts = [typed(part, dict, place, f"{field}[{index}]") for index, part in enumerate(value)]
    for index, part in enumerate(parts):
        kind = text(part.get("type"), place, f"{field}[{index}].type")
        if kind != "text":
            problem = f"a part of type {shown(kind)} cannot be read, only text can; delete the row"
            raise DataError(describe(place, f"{field}[{index}].type", problem))
    return "".join(text(part.get("text"), place, f"{field}[{index}].text") for index, part in enumerate(parts))


def asking(messages: Conversation, place: str, field: str) -> Conversation:
    """The messages as a query, checked to end with the user's; an empty message that opens the reply is dropped."""
    if len(messages) > 1 and messages[-1].role == "assistant" and not messages[-1].content.strip():
        messages = messages[:-1]
    if not messages or messages[-1].role != "user":
        found = f"ends with the {messages[-1].role}'s" if messages else "has none"
        raise DataError(
            describe(place, field, f"the query must end with a user's message, and {found}; delete the row")
        )
    return messages


def query(value: object, place: str, field: str) -> tuple[str, Conversation]:
    """A query, given as text or as messages, as `Record.query` and `Record.messages`."""
    if is_text(value, place, field):
        return query_text(value, place, field), ()
    messages = asking(conversation(value, place, field), place, field)
    return text_of(messages), messages


def continued(prompt: object, value: object, place: str, field: str, asked: str = "prompt") -> Conversation:
    """The whole conversation out of its prompt and what `value` says of the rest.

    prompt: the value of the column `asked`, text or messages. value: the reply's text, the messages after the prompt,
    or the whole conversation once more. A prompt in text need not stand first in that, as long as it is one of the
    user's messages.
    """
    as_text = is_text(prompt, place, asked)
    if as_text:
        start: Conversation = (Message("user", query_text(prompt, place, asked)),)
    else:
        start = asking(conversation(prompt, place, asked), place, asked)
    if is_text(value, place, field):
        return (*start, Message("assistant", text(value, place, field)))
    messages = conversation(value, place, field)
    if messages[: len(start)] == start:
        return messages
    if messages[0].role == "assistant":
        return (*start, *messages)
    if as_text and any(m.role == "user" and m.content.strip() == start[0].content.strip() for m in messages):
        return messages
    problem = (
        f"neither begins with the messages of '{asked}' nor is a reply; correct one of the two, "
        f"or set dataset.format=trl_implicit to leave '{asked}' aside"
    )
    raise DataError(describe(place, field, problem))


def shared_length(first: Sequence[object], second: Sequence[object]) -> int:
    """How many entries (of texts: characters) two sequences have in common before they part."""
    same = (a == b for a, b in zip(first, second, strict=False))
    return sum(takewhile(bool, same))


def parted(
    first: Conversation, second: Conversation, place: str, fields: tuple[str, str], reason: str = "different_queries"
) -> tuple[Conversation, tuple[str, str]]:
    """The query of two conversations, which is all but their last messages, and these: the two replies."""
    shared = shared_length(first[:-1], second[:-1])
    if not len(first) == len(second) == shared + 1 or {first[-1].role, second[-1].role} != {"assistant"}:
        problem = f"must differ from '{fields[0]}' in one last message of the assistant alone; delete the row"
        raise UnusableRow(describe(place, fields[1], problem), reason)
    return asking(first[:shared], place, fields[0]), (first[-1].content, second[-1].content)
