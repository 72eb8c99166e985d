"""What is cut of what is too long: whole old turns, then text, and never what a template puts around it."""

from __future__ import annotations

from functools import partial

import pytest

from layouts import layout_tokenizer
from rdo.data.encoding import encode, encode_prompts, left_out
from rdo.data.records import Message, Record
from rdo.data.templates import ALPACA, TEMPLATE_DATE, text_of
from rdo.runtime.errors import UserError

CHATML, GEMMA, PLAIN = (layout_tokenizer(name) for name in ("Qwen2 base", "Gemma", "Pythia"))
SYSTEM, ASK, REPLY, WHY = (
    *(Message("system", "Be brief."), Message("user", "Which bread?")),
    *(Message("assistant", "Rye. It keeps for a week."), Message("user", "Why rye and not wheat?")),
)
HH = "\n\nHuman: Which bread?\n\nAssistant: Rye. It keeps for a week.\n\nHuman: Why rye and not wheat?\n\nAssistant:"


def said(*messages: Message) -> Record:
    return Record("r", text_of(messages), ("Ask.",), messages=messages)


def text(query: str) -> Record:
    return Record("r", query, ("Ask.",))


def opened(system: str, asked: str) -> str:
    first = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{first}<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"


# Tokenizer, template, record, the prompt that is left, and for how many tokens more there is room.
CUT = {
    "an old turn goes whole": (PLAIN, "hh", text(HH), "\n\nHuman: Why rye and not wheat?\n\nAssistant:", 30),
    "then text of the one that is left": (PLAIN, "hh", text(HH), "\n\nHuman: not wheat?\n\nAssistant:", 0),
    "a dialogue that is a prompt already": (PLAIN, "raw", text(HH), "\n\nHuman: not wheat?\n\nAssistant:", 0),
    "plain text": (PLAIN, "raw", text("Why rye and not wheat?"), "not wheat?", 0),
    "plain text in HH's form": (PLAIN, "hh", text("Why not wheat?"), "\n\nHuman: wheat?\n\nAssistant:", 0),
    "TL;DR": (PLAIN, "tldr", text("POST: Wheat."), "Wheat.\n\nTL;DR:", 0),
    "Alpaca": (PLAIN, "alpaca", text(HH), ALPACA.format(instruction="wheat?"), 0),
    "the system's message stays": (
        *(CHATML, "chat", said(SYSTEM, ASK, REPLY, WHY), opened("Be brief.", "not wheat?"), 0),
    ),
    "turns of a text": (CHATML, "chat", text(HH), opened("", "Why rye and not wheat?"), 5),
    "BOS and what the template writes": (
        *(GEMMA, "chat", said(ASK, REPLY, WHY)),
        *("<bos><start_of_turn>user\nwheat?<end_of_turn>\n<start_of_turn>model\n", 0),
    ),
}


@pytest.mark.parametrize("case", CUT)
def test_what_is_left_of_a_prompt(case):
    tokenizer, template, record, wanted, more = CUT[case]
    (whole,) = encode([record], tokenizer, template, 1000)
    left = tokenizer(wanted, add_special_tokens=False).input_ids
    room = len(left) + more
    (made,) = encode([record], tokenizer, template, room + len(whole.responses[0]))
    assert tokenizer.decode(made.prompt) == wanted
    assert made.prompt == tuple(left)
    assert made.responses == whole.responses
    assert (made.too_long, made.query_cut, made.response_cut) == (False, len(whole.prompt) - len(left), 0)
    # What a model is asked is cut by its own needs, and the query is shown as the model saw it.
    ((query, prompt),) = encode_prompts([record], tokenizer, template, TEMPLATE_DATE, room, "")
    assert prompt == made.prompt
    if SYSTEM not in record.messages:
        assert encode([text(query)], tokenizer, template, 1000)[0].prompt == prompt


WHEAT = text("Why rye and not wheat?")  # 22 tokens; the response has 5


@pytest.mark.parametrize(
    ("max_length", "prompt", "response", "too_long"),
    [
        (27, "Why rye and not wheat?", "Ask.", False),
        (15, "not wheat?", "Ask.", False),
        (14, "not wheat?", "Ask", True),  # ten tokens of the query stay
        (12, "not wheat?", "A", True),
        (11, "ot wheat?", "A", True),
    ],
)
def test_a_query_keeps_its_fewest_tokens_or_the_record_is_left_out(max_length, prompt, response, too_long):
    encoded = encode([WHEAT], PLAIN, "raw", max_length, min_prompt=10)
    assert PLAIN.decode(encoded[0].prompt) == prompt
    assert PLAIN.decode(encoded[0].responses[0]) == f"{response}<|endoftext|>"
    assert left_out(encoded, "cut") == ({0} if too_long else set())
    assert left_out(encoded, "drop") == ({0} if max_length < 27 else set())


def test_a_last_turn_that_says_little_without_the_others_is_left_out():
    records = [text("\n\nHuman: Why?\n\nAssistant:"), text(f"{HH} Because.\n\nHuman: Why?\n\nAssistant:")]
    encoded = encode(records, PLAIN, "hh", 60, min_prompt=10)
    assert encoded[0].prompt == encoded[1].prompt
    assert left_out(encoded, "cut") == {1}


def test_what_has_no_room_for_its_template_is_left_out_of_training_and_not_asked():
    record = said(Message("system", "Be brief. " * 20), ASK)
    encoded = encode([record, said(ASK)], CHATML, "chat", 100)
    assert left_out(encoded, "cut") == {0}
    assert len(encoded[0].prompt) + len(encoded[0].responses[0]) == 100
    ask = partial(encode_prompts, [record], CHATML, "chat", TEMPLATE_DATE)
    with pytest.raises(UserError, match=r"record r: the prompt has 2\d\d tokens .*, and a less b leaves 100: raise"):
        ask(100, "a less b")
    assert len(ask(300, "")[0][1]) > 200
