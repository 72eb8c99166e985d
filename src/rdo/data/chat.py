"""Messages and conversations as chat data write them, and where a query ends and a response begins.

A message is {"role", "content"}, or ShareGPT's {"from", "value"}. Content is text, or a list of parts of which all are
{"type": "text", "text": ...}; these are joined. Images, tools and their calls cannot be read. Other keys are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, PlainValidator

from rdo.data.columns import Columns, RowError, Text, checked, not_blank, shown, utf8
from rdo.data.records import Message, Preference, Record
from rdo.data.templates import text_of

ALIASES = {"human": "user", "prompter": "user", "gpt": "assistant"}

Chat = tuple[Message, ...]


class Query(NamedTuple):
    """A query as `Record.query` and `Record.messages`, which are empty where it came as text."""

    text: str
    messages: Chat = ()

    def record(self, responses: Sequence[str], *preferences: Preference, **others: Any) -> Record:
        """A record of this query; others: further fields of `Record`."""
        return Record(others.pop("id", ""), self.text, tuple(responses), preferences, messages=self.messages, **others)

    def pair(self, replies: tuple[str, str], preference: Preference, fields: tuple[str, str], **others: Any) -> Record:
        """A record of two responses, which stand in these columns."""
        return self.record([not_blank(*reply) for reply in zip(replies, fields, strict=True)], preference, **others)


class Part(Columns):
    type: Literal["text"]
    text: Text


def _content(value: object) -> str:
    parts = _text_or_list(value, "parts")
    return parts if isinstance(parts, str) else "".join(part.text for part in checked(list[Part], parts))


def _text_or_list(value: object, what: str) -> str | list[Any]:
    if not isinstance(value, str | list):
        problem = f"must be text or a list of {what}, found {shown(value)}; correct it or delete the row"
        raise RowError("", problem)
    return utf8(value) if isinstance(value, str) else value


def _role(value: object) -> object:
    return ALIASES.get(value, value) if isinstance(value, str) else value


def _refuse_tools(value: object) -> None:
    if value:
        raise RowError("", "tools and their calls cannot be read; delete the row")


class Turn(Columns):
    """One message as it is written."""

    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(_role)] = Field(
        validation_alias=AliasChoices("role", "from")
    )
    tool_calls: Annotated[Any, AfterValidator(_refuse_tools)] = None
    function_call: Annotated[Any, AfterValidator(_refuse_tools)] = None
    content: Annotated[str, PlainValidator(_content)] = Field(validation_alias=AliasChoices("content", "value"))


def _conversation(value: object) -> Chat:
    messages = tuple(Message(turn.role, turn.content) for turn in checked(list[Turn], value))
    if not messages:
        raise RowError("", "needs at least one message, found none; delete the row")
    if any(message.role == "system" for message in messages[1:]):
        raise RowError("", "the system may only speak first; move its message to the front or delete the row")
    if any(message.role == "user" and not message.content.strip() for message in messages):
        raise RowError("", "a user's message is empty; delete the row")
    return messages


def asking(messages: Chat, field: str = "") -> Query:
    """The messages as a query; an empty message at their end, which opens the reply, is dropped.

    Raises RowError where they do not end with a user's message.
    """
    if len(messages) > 1 and messages[-1].role == "assistant" and not messages[-1].content.strip():
        messages = messages[:-1]
    if not messages or messages[-1].role != "user":
        found = f"ends with the {messages[-1].role}'s" if messages else "has none"
        raise RowError(field, f"the query must end with a user's message, and {found}; delete the row")
    return Query(text_of(messages), messages)


def _said(value: object) -> str | Chat:
    said = _text_or_list(value, "messages")
    return said if isinstance(said, str) else _conversation(said)


def _asked(value: object) -> Query:
    said = _said(value)
    return Query(not_blank(said, what="query")) if isinstance(said, str) else asking(said)


Conversation = Annotated[Chat, PlainValidator(_conversation)]
Said = Annotated[str | Chat, PlainValidator(_said)]
# A column that has the reply alone may hold it as one message.
Reply = Annotated[str | Chat, PlainValidator(lambda value: _said([value] if isinstance(value, dict) else value))]
Asked = Annotated[Query, PlainValidator(_asked)]


def continued(query: Query, value: str | Chat, field: str) -> Chat:
    """The whole conversation out of its query and what the column `field` says of the rest: the reply's text, the
    messages after the query, or the whole conversation once more. A query in text need not stand first in that, as long
    as it is one of the user's messages. Raises RowError."""
    start = query.messages or (Message("user", query.text),)
    if isinstance(value, str):
        return (*start, Message("assistant", value))
    if value[: len(start)] == start:
        return value
    if value[0].role == "assistant":
        return (*start, *value)
    said = [message.content.strip() for message in value if message.role == "user"]
    if not query.messages and query.text.strip() in said:
        return value
    problem = "neither begins with the messages of the prompt nor is a reply; correct one of the two"
    raise RowError(field, f"{problem}, or set dataset.format=trl_implicit to leave the prompt aside")


def shared_length(first: Sequence[object], second: Sequence[object]) -> int:
    """How many entries (of texts: characters) two sequences have in common before they part."""
    same = (a == b for a, b in zip(first, second, strict=False))
    return sum(takewhile(bool, same))


def parted(
    first: Chat, second: Chat, fields: tuple[str, str], reason: str = "different_queries"
) -> tuple[Query, tuple[str, str]]:
    """The query of two conversations, which is all but their last messages, and these: the two replies."""
    shared = shared_length(first[:-1], second[:-1])
    if not len(first) == len(second) == shared + 1 or {first[-1].role, second[-1].role} != {"assistant"}:
        problem = f"must differ from '{fields[0]}' in one last message of the assistant alone; delete the row"
        raise RowError(fields[1], problem, reason)
    return asking(first[:shared], fields[0]), (first[-1].content, second[-1].content)
