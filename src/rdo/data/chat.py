"""Messages and conversations as chat data write them, and where a query ends and a response begins.

A message is {"role", "content"}, or ShareGPT's {"from", "value"}. Content is text, or a list of parts of which all are
{"type": "text", "text": ...}; these are joined. Images, tools and their calls cannot be read. Other keys are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Discriminator, Field, Tag, model_validator

from rdo.data.columns import Columns, RowError, Text, checked, wrong
from rdo.data.records import Message, Preference, Record
from rdo.data.templates import text_of

ALIASES = {"human": "user", "prompter": "user", "gpt": "assistant"}

Chat = tuple[Message, ...]


def _role(value: object) -> object:
    return ALIASES.get(value, value) if isinstance(value, str) else value


def _refuse_tools(value: object) -> None:
    if value:
        raise wrong("tools and their calls cannot be read; delete the row")


def _form(value: object) -> str | None:
    return "<text>" if isinstance(value, str) else "<chat>" if isinstance(value, list) else None


def _text_or_list(kind: Any, what: str) -> Any:
    """The type of a text or of a list of `kind`, told apart so that an error is said of the one that is there."""
    found = Discriminator(_form, custom_error_type="form", custom_error_message=f"must be text or a list of {what}")
    return Annotated[Annotated[Text, Tag("<text>")] | Annotated[kind, Tag("<chat>")], found]


class Part(Columns):
    type: Literal["text"]
    text: Text


if TYPE_CHECKING:
    Content = str | list[Part]
else:
    Content = _text_or_list(list[Part], "parts")


class Turn(Columns):
    """One message as it is written."""

    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(_role)] = Field(
        validation_alias=AliasChoices("role", "from")
    )
    tool_calls: Annotated[Any, AfterValidator(_refuse_tools)] = None
    function_call: Annotated[Any, AfterValidator(_refuse_tools)] = None
    content: Content = Field(validation_alias=AliasChoices("content", "value"))

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: object) -> object:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value

    def message(self) -> Message:
        """The same as a record has it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(self.role, content)


def _conversation(turns: list[Turn]) -> Chat:
    messages = tuple(turn.message() for turn in turns)
    if not messages:
        raise wrong("needs at least one message, found none; delete the row")
    if any(message.role == "system" for message in messages[1:]):
        raise wrong("the system may only speak first; move its message to the front or delete the row")
    if any(message.role == "user" and not message.content.strip() for message in messages):
        raise wrong("a user's message is empty; delete the row")
    return messages


class Query(NamedTuple):
    """A query as `Record.query` and `Record.messages`, which are empty where it came as text."""

    text: str
    messages: Chat = ()

    def record(self, responses: Sequence[str], *preferences: Preference, **others: Any) -> Record:
        """A record of this query; others: further fields of `Record`."""
        return Record(others.pop("id", ""), self.text, tuple(responses), preferences, messages=self.messages, **others)


def asking(messages: Chat) -> Query:
    """The messages as a query; an empty message at their end, which opens the reply, is dropped.

    Raises where they do not end with a user's message.
    """
    if len(messages) > 1 and messages[-1].role == "assistant" and not messages[-1].content.strip():
        messages = messages[:-1]
    if not messages or messages[-1].role != "user":
        found = f"ends with the {messages[-1].role}'s" if messages else "has none"
        raise wrong(f"the query must end with a user's message, and {found}; delete the row")
    return Query(text_of(messages), messages)


def _as_query(value: str | Chat) -> Query:
    if not isinstance(value, str):
        return asking(value)
    if not value.strip():
        raise wrong("the query is empty; fill it in or delete the row")
    return Query(value)


Asking = Annotated[Any, AfterValidator(asking)]  # of messages that are checked already
if TYPE_CHECKING:  # what comes out
    Conversation = Chat
    Said = str | Chat
    Reply = str | Chat
    Asked = Query
else:  # how it comes about
    Conversation = Annotated[list[Turn], AfterValidator(_conversation)]
    Said = _text_or_list(Conversation, "messages")
    # A column that has the reply alone may hold it as one message.
    Reply = Annotated[Said, BeforeValidator(lambda value: [value] if isinstance(value, dict) else value)]
    Asked = Annotated[Said, AfterValidator(_as_query)]


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
    both: tuple[Chat, Chat], fields: tuple[str, str], reason: str = "different_queries"
) -> tuple[Query, tuple[str, str]]:
    """The query of two conversations, which is all but their last messages, and these: the two replies."""
    first, second = both
    shared = shared_length(first[:-1], second[:-1])
    if not len(first) == len(second) == shared + 1 or {first[-1].role, second[-1].role} != {"assistant"}:
        problem = f"must differ from '{fields[0]}' in one last message of the assistant alone; delete the row"
        raise RowError(fields[1], problem, reason)
    return checked(Asking, first[:shared], fields[0]), (first[-1].content, second[-1].content)
