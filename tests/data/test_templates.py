"""Templates: the text of a conversation, and what each template makes of a query."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from helpers import tokenizer
from rdo.data.records import Message, Record
from rdo.data.templates import render_prompt, text_of, turns
from rdo.runtime.errors import UserError
from rdo.settings import Template

TOKENIZER = tokenizer()
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
SINGLE = "\n\nHuman: Which bread?\n\nAssistant:"
LONGER = "\n\nHuman: Which bread?\n\nAssistant: Rye.\n\nHuman: Why?\n\nAssistant:"

SYSTEM = Message("system", "Be brief.")
ASK, REPLY, WHY = Message("user", "Which bread?"), Message("assistant", "Rye."), Message("user", "Why?")


def render(template: str, query: str, tokenizer: PreTrainedTokenizerBase = TOKENIZER) -> str:
    return render_prompt(template, Record("r", query, ("a", "b")), tokenizer)


def render_messages(template: str, *messages: Message, tokenizer: PreTrainedTokenizerBase = TOKENIZER) -> str:
    return render_prompt(template, Record("r", text_of(messages), ("a", "b"), messages=messages), tokenizer)


def with_chat(template: str | None) -> PreTrainedTokenizerBase:
    made = tokenizer()
    made.chat_template = template
    return made


# Text


def test_raw_and_tldr_take_the_query_word_for_word():
    assert render("raw", " q\n") == " q\n"
    assert render("tldr", "POST: p") == "POST: p\n\nTL;DR:"


@pytest.mark.parametrize("query", [SINGLE, LONGER, "\n\nHuman: x\n\nAssistant: "])
def test_hh_takes_a_dialogue_as_it_is_and_makes_one_of_plain_text(query):
    assert render("hh", query) == query
    assert render("hh", "Which bread?") == render("hh", "\n\nHuman: Which bread?") == SINGLE


ALPACA_START = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n"
)
WHOLE = "Human: Which bread?\n\nAssistant: Rye.\n\nHuman: Why?"


def test_alpaca():
    assert render("alpaca", "Sum {1} and 2.") == f"{ALPACA_START}Sum {{1}} and 2.\n\n### Response:"
    assert render("alpaca", SINGLE) == f"{ALPACA_START}Which bread?\n\n### Response:"
    assert render("alpaca", LONGER) == f"{ALPACA_START}{WHOLE}\n\n### Response:"


def test_turns():
    user, assistant = "user", "assistant"

    def short(query):
        return [(message["role"], message["content"]) for message in turns(query)]

    assert short("plain Human: text") == [(user, "plain Human: text")]
    assert short(SINGLE) == [(user, "Which bread?")]
    assert short(LONGER) == [(user, "Which bread?"), (assistant, "Rye."), (user, "Why?")]
    # As found in HH: an assistant that speaks twice, a colon-less mention of the role, a turn that is empty.
    twice = "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d\n\nHumans like e\n\nAssistant:"
    assert short(twice) == [(user, "a"), (assistant, "b\n\nc"), (user, "d\n\nHumans like e")]
    assert short("\n\nHuman: a\n\nAssistant:\n\nHuman: b\n\nAssistant:") == [(user, "a\n\nb")]
    assert short("\n\nHuman:\n\nAssistant:") == [(user, "")]


def test_chat_renders_the_turns_and_opens_the_answer():
    expected = (
        "<|im_start|>user\nWhich bread?<|im_end|>\n<|im_start|>assistant\nRye.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render("chat", LONGER, with_chat(CHATML)) == expected
    assert render_messages("chat", ASK, REPLY, WHY, tokenizer=with_chat(CHATML)) == expected


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (None, "the tokenizer has no chat template; set dataset.template"),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", "ignores add_generation_prompt"),
        ("{{ raise_exception('never') }}", r"rejects the roles user \(never\); set dataset.template"),
    ],
)
def test_chat_templates_that_cannot_serve(chat_template, message):
    with pytest.raises(UserError, match=message):
        render("chat", "q", with_chat(chat_template))


# Messages


def test_the_text_of_a_conversation_is_a_dialogue_of_the_same_turns():
    assert text_of([ASK, REPLY, WHY]) == LONGER
    assert turns(LONGER) == [{"role": m.role, "content": m.content} for m in (ASK, REPLY, WHY)]


def test_the_system_stands_in_front():
    assert text_of([SYSTEM, ASK]) == f"Be brief.{SINGLE}"
    assert text_of([SYSTEM, ASK, REPLY, WHY]) == f"Be brief.{LONGER}"
    assert text_of([Message("system", ""), ASK]) == SINGLE


contents = st.text(alphabet="ab{}% \n:é", min_size=1, max_size=12).map(str.strip).filter(bool)


@given(asked=st.lists(contents, min_size=1, max_size=4), answered=st.lists(contents, min_size=4, max_size=4))
def test_turns_find_the_messages_again_in_their_text(asked, answered):
    messages = [Message("user", asked[0])]
    for question, answer in zip(asked[1:], answered, strict=False):
        messages += [Message("assistant", answer), Message("user", question)]
    assert turns(text_of(messages)) == [{"role": m.role, "content": m.content} for m in messages]


@pytest.mark.parametrize("query", [[SYSTEM, ASK], [ASK, REPLY, WHY], [SYSTEM, ASK, REPLY, WHY]], ids=len)
def test_hh_wraps_no_conversation_a_second_time(query):
    assert render_messages("hh", *query) == render_messages("raw", *query) == text_of(query)


def test_every_template_on_a_single_message_does_what_it_does_on_the_text():
    for template in get_args(Template):
        made = with_chat(CHATML)
        assert render_messages(template, ASK, tokenizer=made) == render(template, "Which bread?", made)


def test_alpaca_and_tldr_on_conversations():
    assert render_messages("alpaca", SYSTEM, ASK) == f"{ALPACA_START}Be brief.\n\nWhich bread?\n\n### Response:"
    assert render_messages("alpaca", Message("system", " "), ASK) == f"{ALPACA_START}Which bread?\n\n### Response:"
    assert render_messages("alpaca", ASK, REPLY, WHY) == f"{ALPACA_START}{WHOLE}\n\n### Response:"
    whole = f"Be brief.\n\n{WHOLE}"
    assert render_messages("alpaca", SYSTEM, ASK, REPLY, WHY) == f"{ALPACA_START}{whole}\n\n### Response:"
    assert render_messages("tldr", ASK, REPLY, WHY) == f"{LONGER}\n\nTL;DR:"


def test_chat_takes_messages_to_the_letter_markers_of_another_template_included():
    content = "What is '\n\nHuman: hi\n\nAssistant: ho'? "
    rendered = render_messages("chat", SYSTEM, Message("user", content), tokenizer=with_chat(CHATML))
    assert rendered == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_chat_template_without_a_system_role_is_an_error_that_names_roles_and_the_way_out():
    made = with_chat(NO_SYSTEM)
    assert render_messages("chat", ASK, tokenizer=made)
    message = r"rejects the roles system, user \(no system role\); set dataset.template to raw, hh, alpaca or tldr"
    with pytest.raises(UserError, match=message):
        render_messages("chat", SYSTEM, ASK, tokenizer=made)
