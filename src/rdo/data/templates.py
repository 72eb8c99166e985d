"""Templates: how a query is laid out as the prompt that a model sees."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from rdo.data.records import Message, Record
from rdo.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ROLES = {HUMAN: "user", ASSISTANT: "assistant"}
MARKERS = {"system": "{content}", "user": f"{HUMAN} {{content}}", "assistant": f"{ASSISTANT} {{content}}"}

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

# Stands for a response where a chat template is asked what it puts around one.
REPLY = "Reply8417"
# Llama 3.1's own date, where it is not told of another.
TEMPLATE_DATE = "2024-07-26"
OTHER_TEMPLATES = "set dataset.template to raw, hh, alpaca or tldr, or take a tokenizer whose chat template has one"


def turns(query: str) -> list[Message]:
    """The messages of a dialogue in Anthropic HH's form, "\\n\\nHuman: ...\\n\\nAssistant: ..."; else one user message.

    Texts are stripped. Empty assistant turns (the one that asks for the answer) are left out, and turns of one role in
    a row, which HH has here and there, are joined: most chat templates insist that roles alternate.
    """
    if not query.startswith(HUMAN):
        return [Message("user", query)]
    messages: list[Message] = []
    _, *pieces = re.split(f"({HUMAN}|{ASSISTANT})", query)
    for marker, text in zip(pieces[::2], pieces[1::2], strict=True):
        role, content = ROLES[marker], text.strip()
        if marker == ASSISTANT and not content:
            continue
        if messages and messages[-1].role == role:
            content = f"{messages.pop().content}\n\n{content}"
        messages.append(Message(role, content))
    return messages


def text_of(messages: Sequence[Message]) -> str:
    """The text of a query that is given as messages: `Record.query`, which every template but `chat` renders.

    One user's message alone is its content. Any other conversation takes HH's form and ends with "\\n\\nAssistant:"; a
    system's text stands in front of the first "\\n\\nHuman:". Content that holds such a marker itself can then no
    longer be told from a turn, so the messages are what counts.
    """
    if len(messages) == 1 and messages[0].role == "user":
        return messages[0].content
    texts = [MARKERS[message.role].format(content=message.content) for message in messages]
    return "".join([*texts, ASSISTANT])


def render_prompt(template: str, record: Record, tokenizer: PreTrainedTokenizerBase, today: str = TEMPLATE_DATE) -> str:
    """The record's query as a prompt.

    raw: as it is. hh: an HH dialogue as it is; plain text as its one human turn. alpaca: Alpaca's prompt without input;
    the instruction is the text of a dialogue's only turn (behind the system's), or a longer dialogue as a whole.
    tldr: followed by "TL;DR:". chat: all that the tokenizer's chat template writes in front of a response to the
    messages (of a text: to its turns), but for a space right before it; BOS, markers and an empty thought included.
    `today` is the date (ISO) that it may write; the other templates use no tokenizer.
    Raises UserError for a tokenizer whose chat template is missing, fails, or opens an answer otherwise than it renders
    one that is finished.
    """
    if template == "hh":
        return _as_dialogue(record)
    if template == "alpaca":
        return ALPACA.format(instruction=_instruction(record))
    if template == "tldr":
        return f"{record.query}\n\nTL;DR:"
    if template != "chat":
        return record.query
    opened, before, _ = _rendered(record.messages or turns(record.query), tokenizer, today)
    return opened + before.rstrip(" ")


@dataclass(frozen=True)
class Around:
    """What a template puts around a response: a space or nothing before it, and what ends it ("": the tokenizer's end
    of sequence). strips: white space at a response's own ends is left out."""

    template: str
    before: str = ""
    end: str = ""
    strips: bool = False

    def text(self, response: str, record: Record) -> str:
        """A response as the template writes it, without its end, which some data sets bring along. A reply in text has
        the space that parts it from the query (HH, TL;DR), a message has not: the template decides."""
        said = response.rstrip()
        if self.end and said.endswith(self.end.strip()):
            response = said.removesuffix(self.end if said.endswith(self.end) else self.end.strip())
        if self.template == "chat":
            response = response if record.messages else re.sub(r"^ (?=\S)", "", response)
            return self.before + (response.strip() if self.strips else response.removeprefix(self.before))
        return self.before + response if record.messages and response[:1].strip() else response


def around_response(template: str, tokenizer: PreTrainedTokenizerBase, today: str = TEMPLATE_DATE) -> Around:
    """What the template puts around every response. A chat template's end is what it writes behind a reply, up to the
    first special token: Phi 3's writes what ends the conversation, too. Raises UserError as `render_prompt`."""
    if template != "chat":
        end = tokenizer.sep_token if tokenizer.eos_token is None else tokenizer.eos_token
        return Around(template, before=" " if template == "hh" else "", end=str(end or ""))
    asked = [Message("user", "Why?")]
    plain, padded = (_rendered(asked, tokenizer, today, reply) for reply in (REPLY, f"\n{REPLY}\n"))
    _, before, end = plain
    special = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    if special and (first := re.search("|".join(map(re.escape, special)), end)):
        end = end[: first.end()]
    return Around(template, before[len(before.rstrip(" ")) :], end or str(tokenizer.eos_token or ""), plain == padded)


def _as_dialogue(record: Record) -> str:
    query = record.query
    # The text of several messages is a dialogue already, even where the system's text stands in front.
    if len(record.messages) < 2 and not query.startswith(HUMAN):
        return f"{HUMAN} {query}{ASSISTANT}"
    return query if query.rstrip().endswith(ASSISTANT) else f"{query}{ASSISTANT}"


def _instruction(record: Record) -> str:
    messages = record.messages or turns(record.query)
    if [message.role for message in messages] in (["user"], ["system", "user"]):
        return "\n\n".join(message.content for message in messages if message.content.strip())
    return record.query.rstrip().removesuffix(ASSISTANT).strip()


def _rendered(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, today: str, reply: str = REPLY
) -> tuple[str, str, str]:
    """By the chat template: the prompt that asks for a reply, what stands between it and the reply, and what ends the
    reply, white space behind left out."""
    said = [vars(message) for message in messages]
    how: dict[str, Any] = {"chat_template": _dated(tokenizer, today), "tokenize": False}
    try:
        opened = str(tokenizer.apply_chat_template(said, add_generation_prompt=True, **how))
        whole = str(tokenizer.apply_chat_template([*said, {"role": "assistant", "content": reply}], **how))
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise UserError(f"the chat template rejects the roles {roles} ({error}); {OTHER_TEMPLATES}") from error
    before, found, end = whole.rpartition(REPLY)
    if not found:
        problem = "leaves out what the assistant says"
    elif not before.startswith(opened):
        problem = f"renders a finished answer otherwise than it asks for one (with {opened[-40:]!r} at the end)"
    else:
        return opened, before[len(opened) :], end.rstrip()
    raise UserError(f"dataset.template=chat, but the tokenizer's chat template {problem}; {OTHER_TEMPLATES}")


def _dated(tokenizer: PreTrainedTokenizerBase, today: str) -> str:
    """The tokenizer's chat template with a date in place of the day's; transformers lets no one pass another clock."""
    if tokenizer.chat_template is None:
        raise UserError(f"dataset.template=chat, but the tokenizer has no chat template; {OTHER_TEMPLATES}")
    day = date.fromisoformat(today)
    call = r"""strftime_now\(\s*(["'])(.*?)\1\s*\)"""
    dated = re.sub(call, lambda found: repr(day.strftime(found[2])), tokenizer.get_chat_template())
    if "strftime_now(" in dated:
        problem = "writes a date in a form that cannot be fixed"
        raise UserError(f"dataset.template=chat, but the tokenizer's chat template {problem}; {OTHER_TEMPLATES}")
    return dated
