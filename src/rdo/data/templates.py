"""Templates: how a query is laid out as the prompt that a model sees."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

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


def render_prompt(template: str, record: Record, tokenizer: PreTrainedTokenizerBase) -> str:
    """The record's query as a prompt.

    raw: as it is. hh: an HH dialogue as it is; plain text as its one human turn. alpaca: Alpaca's prompt without input;
    the instruction is the text of a dialogue's only turn (behind the system's), or a longer dialogue as a whole.
    tldr: followed by "TL;DR:". chat: the messages, or the turns of a text, through the tokenizer's chat template,
    markers and generation prompt included (BOS too if the template has it); the other templates use no tokenizer.
    Raises UserError for a tokenizer whose chat template is missing, fails, or does not open an answer.
    """
    if template == "hh":
        return _as_dialogue(record)
    if template == "alpaca":
        return ALPACA.format(instruction=_instruction(record))
    if template == "tldr":
        return f"{record.query}\n\nTL;DR:"
    return _render_chat(record.messages or turns(record.query), tokenizer) if template == "chat" else record.query


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


def _render_chat(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise UserError(f"dataset.template=chat, but the tokenizer has no chat template; {OTHER_TEMPLATES}")
    said = [vars(message) for message in messages]
    try:
        prompt = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        closed = tokenizer.apply_chat_template(said, add_generation_prompt=False, tokenize=False)
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise UserError(f"the chat template rejects the roles {roles} ({error}); {OTHER_TEMPLATES}") from error
    if prompt == closed:
        problem = "ignores add_generation_prompt, so the prompt would not open an answer"
        raise UserError(f"dataset.template=chat, but the tokenizer's chat template {problem}; {OTHER_TEMPLATES}")
    return str(prompt)
