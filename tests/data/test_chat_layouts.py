"""What models are trained on and asked is what their own tokenizer and chat template make of a conversation."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from layouts import LAYOUTS, layout_tokenizer
from rdo.data.encoding import begin_ids, encode, find_ending
from rdo.data.records import Message, Record
from rdo.data.templates import text_of
from rdo.runtime.errors import UserError
from rdo.stages.run import tokenizer_key
from tiny import tiny_run

DAY = "2025-03-04"
ASK, REPLY, WHY = Message("user", "Which bread?"), Message("assistant", "Rye."), Message("user", "Why?")
CHATS = [name for name, layout in LAYOUTS.items() if layout.template]
# What ends a reply, in text.
ENDS = {
    **{"Gemma": "<end_of_turn>", "Qwen2 base": "<|im_end|>", "SmolLM2": "<|im_end|>", "Llama 3": "<|eot_id|>"},
    **{"Phi 3": "<|end|>", "Mistral": "</s>", "Llama 2": " </s>", "Qwen3": "<|im_end|>", "an end in text": "\n###"},
}


def sequence(tokenizer: PreTrainedTokenizerFast, record: Record, template: str = "chat") -> list[int]:
    (made,) = encode([record], tokenizer, template, 10_000, today=DAY)
    return [*made.prompt, *made.responses[0]]


def rendered(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> str:
    """By the template alone, on another day than any test runs on."""
    said = [vars(message) for message in messages]
    return tokenizer.apply_chat_template(said, tokenize=False, date_string="04 Mar 2025").rstrip()


def conversation(*messages: Message, response: str) -> Record:
    return Record("r", text_of(messages), (response,), messages=messages)


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("asked", [(ASK,), (ASK, REPLY, WHY)], ids=len)
def test_a_chat_is_trained_on_as_its_template_renders_it(name, asked):
    tokenizer = layout_tokenizer(name)
    end = find_ending("chat", tokenizer, DAY)
    assert end.text == ENDS[name]
    whole = rendered(tokenizer, [*asked, Message("assistant", "It keeps.")])
    whole = whole[: whole.rindex("It keeps.") + len("It keeps." + end.text)]
    wanted = tokenizer(whole, add_special_tokens=False).input_ids
    if LAYOUTS[name].adds_bos and wanted[0] != tokenizer.bos_token_id:
        wanted = [tokenizer.bos_token_id, *wanted]
    found = sequence(tokenizer, conversation(*asked, response="It keeps."))
    assert tokenizer.decode(found) == tokenizer.decode(wanted)
    assert found == wanted
    # The end that a data set brings along is no second one.
    assert sequence(tokenizer, conversation(*asked, response=f"It keeps.{end.text}\n")) == wanted
    # HH's replies have the space that parts them from "Assistant:"; the template has its own, or none.
    if asked == (ASK,):
        assert sequence(tokenizer, Record("r", "\n\nHuman: Which bread?\n\nAssistant:", (" It keeps.",))) == wanted


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_plain_text_begins_as_the_tokenizer_begins_one(name):
    tokenizer = layout_tokenizer(name)
    wanted = [*tokenizer("Which bread? Rye.").input_ids, tokenizer.eos_token_id]
    assert sequence(tokenizer, Record("r", "Which bread?", (" Rye.",)), "raw") == wanted
    # A text that the tokenizer would put a space before stands behind another here.
    assert sequence(tokenizer, Record("r", "Which bread? ", ("Rye.",)), "raw") == wanted
    assert begin_ids(tokenizer) == ((tokenizer.bos_token_id,) if LAYOUTS[name].adds_bos else ())


def test_a_message_gets_the_space_of_its_template():
    tokenizer = layout_tokenizer("Pythia")
    wanted = [*tokenizer("\n\nHuman: Which bread?\n\nAssistant: Rye.").input_ids, tokenizer.eos_token_id]
    assert sequence(tokenizer, conversation(ASK, response="Rye."), "hh") == wanted
    assert sequence(tokenizer, Record("r", "Which bread?", (" Rye.",)), "hh") == wanted


def test_a_template_that_forbids_a_system_message_says_so():
    record = conversation(Message("system", "Be brief."), ASK, response="Rye.")
    with pytest.raises(UserError, match=r"rejects the roles system, user \(System role not supported\); set"):
        sequence(layout_tokenizer("Gemma"), record)


def test_a_date_is_the_one_that_is_set_whatever_the_day(monkeypatch):
    class Tomorrow:
        @staticmethod
        def now() -> object:
            raise AssertionError("the template read the clock")

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    tokenizer = layout_tokenizer("Llama 3")
    (made,) = encode([conversation(ASK, response="Rye.")], tokenizer, "chat", 1000)
    assert "Today Date: 26 Jul 2024\n" in tokenizer.decode(made.prompt)
    (made,) = encode([conversation(ASK, response="Rye.")], tokenizer, "chat", 1000, today=DAY)
    assert "Today Date: 04 Mar 2025\n" in tokenizer.decode(made.prompt)


def test_another_date_is_another_result(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"prompt": "Why {n}?", "chosen": "Rye.", "rejected": "No."}}\n' for n in range(20)))

    def settings(day: str) -> dict[str, object]:
        chat = ("dataset.template=chat", "model=hub", f"model.path={tmp_path}", f"dataset.template_date={day}")
        return tiny_run(tmp_path / "runs", "dataset=file", f"dataset.path={file}", *chat).data_settings("train")

    assert settings("2025-01-01") == settings("2025-01-01") != settings("2025-01-02")


def test_another_beginning_is_another_tokenizer():
    one, other = layout_tokenizer("Mistral"), layout_tokenizer("Mistral")
    assert tokenizer_key(one) == tokenizer_key(other)
    other.backend_tokenizer.post_processor = None
    assert begin_ids(other) == ()
    assert tokenizer_key(one) != tokenizer_key(other)
