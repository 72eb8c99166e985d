"""Templates: the text of a conversation, and what each template makes of a query."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import tokenizer
from rdo.data.records import Message, Record
from rdo.data.templates import render_prompt, text_of, turns
from rdo.runtime.errors import UserError
from rdo.settings import Template

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
SINGLE = "\n\nHuman: Which bread?\n\nAssistant:"
LONGER = "\n\nHuman: Which bread?\n\nAssistant: Rye.\n\nHuman: Why?\n\nAssistant:"

SYSTEM = Message("system", "Be brief.")
ASK, REPLY, WHY = Message("user", "Which bread?"), Message("assistant", "Rye."), Message("user", "Why?")


ALPACA_START = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n"
)
WHOLE = "Human: Which bread?\n\nAssistant: Rye.\n\nHuman: Why?"
OPENED = "<|im_start|>assistant\n"
QUOTED = "What is '\n\nHuman: hi\n\nAssistant: ho'? "


def alpaca(instruction: str) -> str:
    return f"{ALPACA_START}{instruction}\n\n### Response:"


def said(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def render(template: str, query: str | list[Message], chat_template: str | None = CHATML) -> str:
    made = tokenizer()
    made.chat_template = chat_template
    messages = () if isinstance(query, str) else tuple(query)
    return render_prompt(
        template, Record("r", text_of(messages) if messages else query, ("a", "b"), messages=messages), made
    )


@pytest.mark.parametrize(
    ("template", "query", "wanted"),
    [
        ("raw", " q\n", " q\n"),
        ("tldr", "POST: p", "POST: p\n\nTL;DR:"),
        ("tldr", [ASK, REPLY, WHY], f"{LONGER}\n\nTL;DR:"),
        # A dialogue stays as it is, and plain text becomes one; a conversation is not wrapped a second time.
        *(("hh", query, query) for query in (SINGLE, LONGER, "\n\nHuman: x\n\nAssistant: ")),
        *(("hh", query, SINGLE) for query in ("Which bread?", "\n\nHuman: Which bread?")),
        *((template, [SYSTEM, ASK], f"Be brief.{SINGLE}") for template in ("raw", "hh")),
        *((template, [ASK, REPLY, WHY], LONGER) for template in ("raw", "hh")),
        *((template, [SYSTEM, ASK, REPLY, WHY], f"Be brief.{LONGER}") for template in ("raw", "hh")),
        ("raw", [Message("system", ""), ASK], SINGLE),
        ("alpaca", "Sum {1} and 2.", alpaca("Sum {1} and 2.")),
        ("alpaca", SINGLE, alpaca("Which bread?")),
        ("alpaca", LONGER, alpaca(WHOLE)),
        ("alpaca", [SYSTEM, ASK], alpaca("Be brief.\n\nWhich bread?")),
        ("alpaca", [Message("system", " "), ASK], alpaca("Which bread?")),
        ("alpaca", [ASK, REPLY, WHY], alpaca(WHOLE)),
        ("alpaca", [SYSTEM, ASK, REPLY, WHY], alpaca(f"Be brief.\n\n{WHOLE}")),
        *(
            ("chat", q, said("user", "Which bread?") + said("assistant", "Rye.") + said("user", "Why?") + OPENED)
            for q in (LONGER, [ASK, REPLY, WHY])
        ),
        # Messages are taken to the letter, markers of another template included.
        ("chat", [SYSTEM, Message("user", QUOTED)], said("system", "Be brief.") + said("user", QUOTED) + OPENED),
    ],
)
def test_what_a_template_makes_of_a_query(template, query, wanted):
    assert render(template, query) == wanted


def test_a_single_message_is_rendered_as_its_text_is():
    for template in get_args(Template):
        assert render(template, [ASK]) == render(template, "Which bread?")


U, A = "user", "assistant"


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("plain Human: text", [(U, "plain Human: text")]),
        (SINGLE, [(U, "Which bread?")]),
        (LONGER, [(U, "Which bread?"), (A, "Rye."), (U, "Why?")]),
        # As found in HH: an assistant that speaks twice, a colon-less mention of the role, a turn that is empty.
        (
            "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d\n\nHumans like e\n\nAssistant:",
            [(U, "a"), (A, "b\n\nc"), (U, "d\n\nHumans like e")],
        ),
        ("\n\nHuman: a\n\nAssistant:\n\nHuman: b\n\nAssistant:", [(U, "a\n\nb")]),
        ("\n\nHuman:\n\nAssistant:", [(U, "")]),
    ],
)
def test_turns(query, wanted):
    assert turns(query) == [Message(*turn) for turn in wanted]


contents = st.text(alphabet="ab{}% \n:é", min_size=1, max_size=12).map(str.strip).filter(bool)


@given(asked=st.lists(contents, min_size=1, max_size=4), answered=st.lists(contents, min_size=4, max_size=4))
def test_turns_find_the_messages_again_in_their_text(asked, answered):
    messages = [Message("user", asked[0])]
    for question, answer in zip(asked[1:], answered, strict=False):
        messages += [Message("assistant", answer), Message("user", question)]
    assert turns(text_of(messages)) == messages


@pytest.mark.parametrize(
    ("chat_template", "query", "message"),
    [
        (None, "q", "the tokenizer has no chat template; set dataset.template"),
        ("{{ messages[0].content }}", "q", "leaves out what the assistant says; set dataset.template"),
        (CHATML + "{% if add_generation_prompt %}<think>{% endif %}", "q", r"otherwise than .* \(with '.*<think>' at"),
        (CHATML + "{{ strftime_now(form) }}", "q", "writes a date in a form that cannot be fixed; set"),
        ("{{ raise_exception('never') }}", "q", r"rejects the roles user \(never\); set dataset.template"),
        (NO_SYSTEM, [SYSTEM, ASK], r"roles system, user \(no system role\); set dataset.template to raw, hh, alpaca"),
    ],
)
def test_chat_templates_that_cannot_serve(chat_template, query, message):
    with pytest.raises(UserError, match=message):
        render("chat", query, chat_template)
    assert chat_template != NO_SYSTEM or render("chat", [ASK], chat_template)
