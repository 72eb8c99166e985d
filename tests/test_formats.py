"""Row formats: each on rows of its real shape, told apart, and every kind of bad row."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rdo.data.formats.pairs import PROMPTS

from rdo.data.formats import READERS, UnusableRow, find_format
from rdo.data.records import Message, Preference, Record
from rdo.data.templates import text_of
from rdo.errors import DataError

REAL = Path(__file__).parents[2] / "shared" / "data"
HALF = "a\ud800"
NAN = float("nan")

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
DIALOGUE = "\n\nHuman: Which bread?\n\nAssistant: Rye.\n\nHuman: Why?\n\nAssistant:"


def says(role: str, content: object, **others: object) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


ASK, REPLY, WHY = says(USER, "Which bread?"), says(ASSISTANT, "Rye."), says(USER, "Why?")
QUERY = [ASK, REPLY, WHY]
KEEPS, DUNNO = says(ASSISTANT, "It keeps."), says(ASSISTANT, "No idea.")
MESSAGES = (Message(USER, "Which bread?"), Message(ASSISTANT, "Rye."), Message(USER, "Why?"))


def node(role: str, text: str, *replies: dict[str, Any], **others: object) -> dict[str, Any]:
    return {"text": text, "role": role, "replies": list(replies), "rank": None, **others}


def asked(text: str, *replies: dict[str, Any], **others: object) -> dict[str, Any]:
    return node("prompter", text, *replies, **others)


def answered(text: str, rank: object, *replies: dict[str, Any], **others: object) -> dict[str, Any]:
    return node("assistant", text, *replies, rank=rank, **others)


TREE = asked(
    "Which bread?",
    answered("White.", 1, message_id="m2"),
    answered(
        "Rye.",
        0,
        asked("Why?", answered("It keeps.", 0), answered("No idea.", 1), answered("Because.", None), message_id="m4"),
        asked("Where?", answered("In Riga.", None), message_id="m5"),
        message_id="m3",
    ),
    answered("Spam.", None, message_id="m6"),
    message_id="m1",
)
ANNOTATIONS = {
    "helpfulness": {"Rating": "4", "Rationale": "r"},
    "honesty": {"Rating": "N/A", "Rationale": "r"},
    "truthfulness": {"Rating": "3", "Type": ["1"]},
}
COMPLETIONS = [
    {"model": "m", "response": "Rye.", "overall_score": 8.5, "fine-grained_score": 4.25, "annotations": ANNOTATIONS},
    {"model": "n", "response": "White.", "overall_score": 6.0, "fine-grained_score": 4.0, "annotations": ANNOTATIONS},
    {"model": "o", "response": "Bread.", "overall_score": 8.5, "fine-grained_score": 3.0, "annotations": ANNOTATIONS},
]
TLDR = {
    "info": {"id": "t3_1", "post": "My cat sings.", "title": "Cat", "subreddit": "cats"},
    "split": "train",
    "summaries": [{"text": " Cat sings.", "policy": "sup2", "note": None}, {"text": " Dog?", "policy": "ref"}],
    "choice": 0,
    "worker": "w",
    "extra": {"confidence": 2},
}
QA = {
    "question": "Which bread?",
    "passages": [["Rye", "Rye\n\nRye is a grain.", "It  keeps."], ["Wheat", "Wheat does not."]],
    "gold": "Rye.",
    **{f"prediction {k}": text for k, text in enumerate(("Rye.", "White.", "Bread.", "None."), 1)},
    "feedback": {"errors": []},
    "preference": [1, 0, 2, 2, 1, 1],
}
SHP = {
    "post_id": "p",
    "history": "Which bread?",
    "human_ref_A": "Rye.",
    "human_ref_B": "White.",
    "labels": 1,
    "score_A": 9,
    "score_B": 3,
    "score_ratio": 3.0,
}
ARENA = {
    "question_id": "58",
    "model_a": "x",
    "model_b": "y",
    "winner": "model_b",
    "conversation_a": [ASK, REPLY],
    "conversation_b": [ASK, says(ASSISTANT, "White.")],
    "turn": 1,
}

ORCA = {"system": "Be brief.", "question": "Which bread?", "chosen": "Rye.", "rejected": "White."}
LLAMA_FACTORY = {
    "instruction": "Translate into German.",
    "input": "bread",
    "chosen": "Brot",
    "rejected": "Rot",
    "history": [["Which bread?", "Rye."]],
}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "Which bread?"}],
    "chosen": {"from": "gpt", "value": "Rye."},
    "rejected": {"from": "gpt", "value": "White."},
}
STACK = {
    "qid": 5,
    "question": "Which bread?",
    "answers": [
        {"answer_id": 1, "pm_score": 1, "selected": False, "text": "White."},
        {"answer_id": 2, "pm_score": 4, "selected": True, "text": "Rye."},
    ],
    "date": "2014/05/14",
}
ALPACA_FARM = {
    "instruction": "Translate.",
    "input": "",
    "output_1": "Brot",
    "output_2": "Rot",
    "preference": 2,
    "raw_preference": 2,
}
SAFE = {
    "prompt": "Which bread?",
    "response_0": "White.",
    "response_1": "Rye.",
    "is_response_0_safe": True,
    "is_response_1_safe": True,
    "better_response_id": 1,
    "safer_response_id": 0,
}
HELPSTEER2 = {
    "split": "train",
    "prompt": "Which bread?",
    "response_1": "Rye.",
    "response_2": "White.",
    "preference_strength": -2,
    "preference_statement": "Response 1 is better.",
}
HELPSTEER3 = {
    "domain": "general",
    "language": "english",
    "context": QUERY,
    "response1": "Because.",
    "response2": "It keeps.",
    "overall_preference": 1,
    "individual_preference": [{"score": 1, "reasoning": "r"}],
}
WEBGPT = {
    "question": {"dataset": "eli5", "id": "x", "full_text": "Which bread?"},
    "quotes_0": {"title": [], "extract": []},
    "answer_0": "Rye.",
    "score_0": 0.5,
    "answer_1": "White.",
    "score_1": -0.5,
}
VOTES = {
    "id": 30192,
    "model_a": "x",
    "model_b": "y",
    "prompt": '["Which bread?"]',
    "response_a": '["Rye."]',
    "response_b": '["White."]',
    "winner_model_a": 1,
    "winner_model_b": 0,
    "winner_tie": 0,
}

# One row, or more, of every format.
ROWS: dict[str, list[dict[str, Any]]] = {
    "hh": [{"chosen": f"{DIALOGUE} It keeps.", "rejected": f"{DIALOGUE} No idea."}],
    "trl": [
        {"prompt": "Which bread?", "chosen": "Rye.", "rejected": "White."},
        {"prompt": DIALOGUE, "response": " It keeps.", "chosen": " It keeps.", "rejected": " No idea."},
        {"prompt": QUERY, "chosen": [KEEPS], "rejected": [DUNNO], "score_chosen": 2, "score_rejected": -0.5},
        {
            "prompt": "Which bread?",
            "prompt_id": "f00",
            "chosen": [ASK, REPLY],
            "rejected": [ASK, DUNNO],
            "messages": [ASK, REPLY],
            "score_chosen": 8.0,
            "score_rejected": 5.0,
        },
        ORCA,
        LLAMA_FACTORY,
        SHAREGPT,
    ],
    "trl_implicit": [
        {"chosen": [*QUERY, KEEPS], "rejected": [*QUERY, DUNNO]},
        {"chosen": "The sky is blue.", "rejected": "The sky is green.", "score_chosen": 1, "score_rejected": 0},
    ],
    "trl_unpaired": [
        {"prompt": "Which bread?", "completion": "Rye.", "label": True},
        {"prompt": QUERY, "completion": [DUNNO], "label": False},
    ],
    "rrhf": [
        {"query": "Which bread?", "responses": ["Rye.", "White."], "scores": [0.5, -1], "prompt_id": 7},
        {"messages": QUERY, "responses": ["It keeps.", "No idea."], "scores": [0.5, -1]},
    ],
    "records": [
        {"query": "Which bread?", "responses": ["Rye.", "White.", "Bread."], "preferences": [[0, 1]]},
        {"messages": QUERY, "responses": ["It keeps."], "desirable": [True]},
    ],
    "ranked": [
        {"prompt": "Which bread?", "ranked_responses": ["Rye.", "White.", "Bread."]},
        {"query": QUERY, "responses": ["No idea.", "It keeps.", "Because."], "ranks": [2, 1, 2]},
        {"prompt": DIALOGUE, "answers": [{"answer": "a", "rank": 2.0, "model": "m"}, {"answer": "b", "rank": 1.0}]},
        STACK,
    ],
    "openai": [TLDR],
    "qa_feedback": [QA],
    "ultrafeedback": [
        {"source": "s", "instruction": "Which bread?", "models": ["m"], "completions": COMPLETIONS},
        {"instruction": "Which bread?", "responses": ["Rye.", "White."], "ratings": ["5", 3.5]},
    ],
    "oasst": [{"message_tree_id": "m1", "tree_state": "ready_for_export", "prompt": TREE}],
    "shp": [SHP],
    "arena": [ARENA],
    "arena_votes": [VOTES],
    "alpaca": [ALPACA_FARM, {"instruction": "Translate.", "input": "Brot", "output": ["Bread", "Rye"], "system": ""}],
    "safe_rlhf": [SAFE],
    "helpsteer": [HELPSTEER2, HELPSTEER3],
    "webgpt": [WEBGPT],
    "stack_paired": [{"qid": 1, "question": "Which bread?", "response_j": "Rye.", "response_k": "White."}],
}
EVERY_ROW = [pytest.param(name, row, id=f"{name}-{n}") for name, rows in ROWS.items() for n, row in enumerate(rows)]


def read(row: dict[str, Any], name: str | None = None) -> list[Record]:
    records = READERS[name or find_format(row, "rows, line 7")].read(row, "rows, line 7")
    check(records)
    return records


def only(row: dict[str, Any], name: str | None = None) -> Record:
    (record,) = read(row, name)
    return record


def check(records: list[Record]) -> None:
    """What holds of every record that was read."""
    assert records
    for record in records:
        assert record.query.strip()
        assert record.responses
        assert all(isinstance(text, str) and text.strip() for text in record.responses)
        count = len(record.responses)
        for preference in record.preferences:
            assert 0 <= preference.chosen < count
            assert 0 <= preference.rejected < count
            assert preference.chosen != preference.rejected
            assert preference.strength is None or 0 <= preference.strength < float("inf")
        assert record.scores is None or len(record.scores) == count
        assert record.desirable is None or len(record.desirable) == count
        assert count > 1 or record.desirable or record.split == "demonstrations"
        if record.messages:
            assert record.messages[-1].role == USER
            assert record.query == text_of(record.messages)


# Told apart


@pytest.mark.parametrize(("name", "row"), EVERY_ROW)
def test_every_format_is_told_from_the_others_whatever_the_order_of_its_columns_and_however_many_more(name, row):
    check(read(row))
    more = {**row, "worker": "w", "tags": ["x"], "summary": None, "response": "r", "score_ratio": 2, "url": ""}
    for seed in range(3):
        columns = list(more)
        random.Random(seed).shuffle(columns)
        assert find_format({column: more[column] for column in columns}, "x") == name


@pytest.mark.parametrize(("name", "row"), EVERY_ROW)
def test_a_row_that_lacks_an_identifying_column_is_not_taken_for_its_format(name, row):
    reader = READERS[name]
    identifying = {*reader.columns, *(column for other in reader.either for column in other)} & set(row)
    for column in identifying - ({"input"} if "instruction" in row else set()):  # with an instruction it is optional
        less = {other: value for other, value in row.items() if other != column}
        try:
            found = find_format(less, "rows, line 7")
        except DataError:
            found = "none"
        assert found != name or (name == "trl" and set(PROMPTS) & set(less))  # `input` is left of an instruction
        if column not in reader.columns:  # the caller looks after those
            with pytest.raises(DataError, match=r"^rows, line 7, field"):
                reader.read({**row, column: None}, "rows, line 7")


def test_formats_share_no_example():
    assert set(ROWS) == set(READERS)
    assert [find_format(row, "x") for rows in ROWS.values() for row in rows] == [
        name for name, rows in ROWS.items() for _ in rows
    ]


def test_the_values_tell_dialogues_from_texts_and_messages():
    assert find_format({"chosen": "a b", "rejected": "a c"}, "x") == "trl_implicit"
    assert find_format({"chosen": f"{DIALOGUE} a", "rejected": "a c"}, "x") == "hh"
    assert find_format({"chosen": "a b", "rejected": f"{DIALOGUE} a"}, "x") == "hh"
    assert find_format({"chosen": [*QUERY, KEEPS], "rejected": "x"}, "x") == "trl_implicit"


def test_a_prompt_that_only_the_first_row_lacks_makes_no_implicit_one():
    assert find_format({"prompt": None, "chosen": "a b", "rejected": "a c"}, "x") == "trl"
    assert find_format({"prompt": None, "chosen": [ASK, REPLY], "rejected": [ASK, DUNNO]}, "x") == "trl_implicit"


def test_texts_beside_a_column_that_may_be_the_query_are_refused():
    row = {"context": "Which bread?", "chosen": "The rye.", "rejected": "The white."}
    with pytest.raises(DataError, match=r"^rows, line 7: the query seems to stand in 'context'.*rename.*trl_implicit"):
        find_format(row, "rows, line 7")
    assert only(row, "trl_implicit").query == "The"


@pytest.mark.parametrize("columns", [("Prompt", "CHOSEN", "rejected"), (" prompt", "chosen ", "rejected")])
def test_columns_that_differ_in_case_or_spaces_alone_are_named(columns):
    row = dict(zip(columns, ("The bread is", "The bread is rye.", "The bread is white."), strict=True))
    with pytest.raises(DataError, match=rf"^x: columns .* did you mean: .*'{columns[0]}' \('prompt'\)"):
        find_format(row, "x")
    assert find_format({"prompt": "x", "chosen": "a", "rejected": "b", "Question": "q", "LABEL": 1}, "x") == "trl"


def test_whole_conversations_or_dialogues_beside_a_question_hold_the_query_themselves():
    assert find_format({"question": "Why?", "chosen": [*QUERY, KEEPS], "rejected": [*QUERY, DUNNO]}, "x") == (
        "trl_implicit"
    )
    assert find_format({"question": "Why?", "chosen": [KEEPS], "rejected": [DUNNO]}, "x") == "trl"
    assert find_format({"question": "Why?", **HH}, "x") == "hh"


def test_columns_of_two_formats_are_refused():
    row = {**ROWS["trl"][0], **ROWS["trl_unpaired"][0]}
    with pytest.raises(DataError, match=r"^x: columns \['chosen'.*fit trl and trl_unpaired; set dataset\.format"):
        find_format(row, "x")


def test_columns_of_no_format_are_refused_with_the_known_ones():
    with pytest.raises(DataError) as caught:
        find_format({"instruction": "x", "out\x1b[31m" + "y" * 100: "y"}, "x")
    message = str(caught.value)
    assert message.startswith("x: columns ['instruction', 'out\\x1b[31myyy")
    assert "y" * 60 not in message
    assert all(f"{name}: " in message for name in READERS)
    assert "records: responses, query or messages;" in message
    with pytest.raises(DataError, match=r"'c019', \.\.\.\] fit no known format"):
        find_format({f"c{number:03}": 1 for number in range(1000)}, "x")


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"info": TLDR["info"], "split": "test", "summary": {"text": "s"}}, "single-summary rows"),
        ({"message_id": "m1", "parent_id": None, "text": "Hi", "role": "prompter", "rank": None}, "file of trees"),
        ({"message_id": "m2", "parent_id": "m1", "text": "Ho", "role": "assistant", "rank": 0}, "file of trees"),
    ],
)
def test_rows_that_only_look_like_a_known_format_get_a_hint(row, hint):
    with pytest.raises(DataError, match=hint):
        find_format(row, "x")


@pytest.mark.parametrize("written", [json.dumps(QUERY), str(QUERY), "[ {'from': 'human', 'value': 'x'}]"])
@pytest.mark.parametrize("column", ["chosen", "prompt"])
def test_messages_written_out_as_text_are_refused(written, column):
    with pytest.raises(DataError, match=rf"^x, field '{column}': is a list of messages written out as text.*=trl if"):
        find_format({**ROWS["trl"][0], column: written}, "x")
    assert only({**ROWS["trl"][0], column: written}, "trl")  # a text may look like that


def test_structured_columns_are_those_that_never_hold_text_of_the_data():
    for name, reader in READERS.items():
        identifying = {*reader.columns, *(column for other in reader.either for column in other)}
        for column in identifying | set(reader.structured):
            values = [row[column] for row in ROWS[name] if row.get(column) is not None]
            if column in reader.structured:
                assert not any(isinstance(value, str) for value in values), (name, column)
            elif column != "query":  # text in most rows, so in CSV it is always text
                assert any(isinstance(value, str) for value in values), (name, column)
    assert READERS["trl_implicit"].structured == ("score_chosen", "score_rejected")
    assert READERS["trl"].structured == ("score_chosen", "score_rejected", "conversations")
    assert READERS["hh"].structured == ()
    assert {"preferences", "scores", "desirable", "messages"} < set(READERS["records"].structured)
    assert "extra" in READERS["openai"].structured


# Each format


def test_hh_query_ends_at_the_last_marker_of_chosen_and_a_marker_in_rejected_stays():
    record = only({"chosen": f"{DIALOGUE} It keeps.", "rejected": f"{DIALOGUE} No.\n\nAssistant: Yes."})
    assert record == Record("", DIALOGUE, (" It keeps.", " No.\n\nAssistant: Yes."), (Preference(0, 1),))


def test_trl_texts():
    plain, rm_static = ROWS["trl"][:2]
    assert only(plain) == Record("", "Which bread?", ("Rye.", "White."), (Preference(0, 1),))
    assert only(rm_static) == Record("", DIALOGUE, (" It keeps.", " No idea."), (Preference(0, 1),))


def test_trl_messages():
    wanted = Record("", DIALOGUE, ("It keeps.", "No idea."), (Preference(0, 1),), (2.0, -0.5), messages=MESSAGES)
    row = ROWS["trl"][2]
    assert only(row) == wanted
    assert only({**row, "chosen": [*QUERY, KEEPS], "rejected": [*QUERY, DUNNO]}) == wanted
    assert only({**row, "chosen": "It keeps.", "rejected": [DUNNO]}) == wanted
    assert only({**row, "prompt": [*QUERY, says(ASSISTANT, "")]}) == wanted
    assert only({**row, "prompt": [ASK], "chosen": [REPLY, WHY, KEEPS], "rejected": [REPLY, WHY, DUNNO]}) == wanted


def test_trl_whole_conversations_beside_a_prompt_in_text():
    messages = (Message(USER, "Which bread?"),)
    wanted = Record("", "Which bread?", ("Rye.", "No idea."), (Preference(0, 1),), (8.0, 5.0), messages=messages)
    row = ROWS["trl"][3]
    assert only(row) == wanted
    assert only({**row, "chosen": [REPLY], "rejected": [DUNNO]}) == wanted
    brief = says(SYSTEM, "Be brief.")
    record = only({**row, "chosen": [brief, ASK, REPLY], "rejected": [brief, ASK, DUNNO]})
    assert record.messages == (Message(SYSTEM, "Be brief."), *messages)
    assert record.query == "Be brief.\n\nHuman: Which bread?\n\nAssistant:"


def test_orca_pairs_with_a_system_column():
    messages = (Message(SYSTEM, "Be brief."), Message(USER, "Which bread?"))
    wanted = Record("", text_of(messages), ("Rye.", "White."), (Preference(0, 1),), messages=messages)
    assert only(ORCA) == wanted
    assert only({**ORCA, "question": [ASK]}) == wanted
    assert only({**ORCA, "question": [says(SYSTEM, "Be brief."), ASK]}) == wanted
    for nothing in ("", None):
        assert only({**ORCA, "system": nothing}) == Record("", "Which bread?", ("Rye.", "White."), (Preference(0, 1),))
    with pytest.raises(DataError, match=r"field 'system': stands beside another system's message; keep one"):
        only({**ORCA, "question": [says(SYSTEM, "Be long."), ASK]})


@pytest.mark.parametrize("column", ["question", "query", "instruction", "input"])
def test_the_prompt_may_be_called_otherwise(column):
    row = {column: "Which bread?", "chosen": "Rye.", "rejected": "White."}
    assert only(row) == only({"prompt": "Which bread?", "chosen": "Rye.", "rejected": "White."})
    assert only({**row, "prompt": "Which?"}).query == "Which?"


def test_llama_factory_rows():
    said = (Message(USER, "Which bread?"), Message(ASSISTANT, "Rye."), Message(USER, "Translate into German.\nbread"))
    assert only(LLAMA_FACTORY) == Record("", text_of(said), ("Brot", "Rot"), (Preference(0, 1),), messages=said)
    alone = only({**LLAMA_FACTORY, "history": [], "input": ""})
    assert alone == Record("", "Translate into German.", ("Brot", "Rot"), (Preference(0, 1),))
    asked = (Message(USER, "Which bread?"),)
    wanted = Record("", "Which bread?", ("Rye.", "White."), (Preference(0, 1),), messages=asked)
    assert only(SHAREGPT) == wanted
    assert only({"prompt": [ASK], "chosen": REPLY, "rejected": says(ASSISTANT, "White.")}) == wanted
    system = only({**SHAREGPT, "system": "Be brief."})
    assert system.messages == (Message(SYSTEM, "Be brief."), *asked)


def test_alpaca():
    farm, factory = ROWS["alpaca"]
    assert only(farm) == Record("", "Translate.", ("Brot", "Rot"), (Preference(1, 0),))
    assert only({**farm, "preference": 1.0}).preferences == (Preference(0, 1),)
    assert only({**farm, "preference": 1.5}).preferences == (Preference(0, 1, tie=True),)
    assert only(factory) == Record("", "Translate.\nBrot", ("Bread", "Rye"), (Preference(0, 1),))


def test_two_responses_and_a_verdict():
    assert only(SAFE) == Record("", "Which bread?", ("White.", "Rye."), (Preference(1, 0),))
    assert only({**SAFE, "better_response_id": 0}).preferences == (Preference(0, 1),)
    assert only(HELPSTEER2) == Record("", "Which bread?", ("Rye.", "White."), (Preference(0, 1, strength=2.0),))
    tie = Preference(0, 1, tie=True, strength=0.0)
    assert only({**HELPSTEER2, "preference_strength": 0}).preferences == (tie,)
    wanted = Record("", DIALOGUE, ("Because.", "It keeps."), (Preference(1, 0, strength=1.0),), messages=MESSAGES)
    assert only(HELPSTEER3) == wanted
    assert only(WEBGPT) == Record(
        "", "Which bread?", ("Rye.", "White."), (Preference(0, 1, strength=1.0),), (0.5, -0.5)
    )
    assert only({**WEBGPT, "score_0": 0, "score_1": 0}).preferences == (tie,)
    assert only(ROWS["stack_paired"][0]) == Record("", "Which bread?", ("Rye.", "White."), (Preference(0, 1),))


def test_stack_exchange_answers_are_ordered_by_their_votes():
    record = only(STACK)
    assert record == Record("", "Which bread?", ("White.", "Rye."), (Preference(1, 0, strength=3.0),), (1.0, 4.0))


def test_arena_votes_in_a_table():
    record = only(VOTES)
    messages = (Message(USER, "Which bread?"),)
    assert record == Record("", "Which bread?", ("Rye.", "White."), (Preference(0, 1),), messages=messages)
    assert only({**VOTES, "prompt": "Which bread?", "response_a": ["Rye."]}) == record
    assert only({**VOTES, "winner_model_a": 0, "winner_tie": 1}).preferences == (Preference(0, 1, tie=True),)
    assert only({**VOTES, "winner_model_a": 0, "winner_model_b": 1}).preferences == (Preference(1, 0),)


def test_trl_rows_that_repeat_the_prompt_are_refused():
    with pytest.raises(DataError, match=r"field 'chosen': repeats the prompt.*dataset\.format=hh"):
        only({"prompt": DIALOGUE, **ROWS["hh"][0]})


def test_implicit_prompt_of_conversations():
    record = only(ROWS["trl_implicit"][0])
    assert record == Record("", DIALOGUE, ("It keeps.", "No idea."), (Preference(0, 1),), messages=MESSAGES)
    same = only({"chosen": [*QUERY, KEEPS], "rejected": [*QUERY, KEEPS]})  # for the reader to leave out
    assert same.responses == ("It keeps.", "It keeps.")


@pytest.mark.parametrize(
    ("chosen", "rejected", "query"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is bl"),
        ("Sky:\nblue", "Sky:\ngreen", "Sky:\n"),
        ("é  a", "é  b", "é "),
    ],
)
def test_implicit_prompt_of_texts(chosen, rejected, query):
    record = only({"chosen": chosen, "rejected": rejected})
    assert record == Record("", query, (chosen[len(query) :], rejected[len(query) :]), (Preference(0, 1),))


def test_unpaired_rows_have_one_response_and_no_preference():
    text, messages = ROWS["trl_unpaired"]
    assert only(text) == Record("", "Which bread?", ("Rye.",), desirable=(True,))
    assert only(messages) == Record("", DIALOGUE, ("No idea.",), messages=MESSAGES, desirable=(False,))
    assert only({**messages, "completion": [*QUERY, DUNNO]}) == only(messages)
    for label, wanted in ((1, True), (0, False), (1.0, True)):
        assert only({**text, "label": label}).desirable == (wanted,)


def test_own_format():
    preferences = [[2, 0], {"chosen": 0, "rejected": 1, "tie": True}, {"chosen": 2, "rejected": 1, "strength": 3}]
    row = {"id": 41, "query": "q", "responses": ["a", "b", "c"], "preferences": preferences, "split": "test"}
    wanted = (Preference(2, 0), Preference(0, 1, tie=True), Preference(2, 1, strength=3.0))
    assert only(row) == Record("41", "q", ("a", "b", "c"), wanted, split="test")
    nothing = dict.fromkeys(("scores", "preferences", "desirable", "id", "split", "messages"))
    for empty in (nothing, {"id": "", "split": ""}):
        assert only({"query": "q", "responses": ["a", "b"], **empty}) == Record("", "q", ("a", "b"))
    scored = only({"query": "q", "responses": ["a", "b"], "scores": [1, 2.5], "desirable": [True, 0]})
    assert scored == Record("", "q", ("a", "b"), scores=(1.0, 2.5), desirable=(True, False))


def test_own_format_takes_messages_in_place_of_the_query_and_one_response_where_none_is_compared():
    row = {"messages": QUERY, "responses": ["It keeps."]}
    assert only({**row, "desirable": [False]}) == Record(
        "", DIALOGUE, ("It keeps.",), messages=MESSAGES, desirable=(False,)
    )
    assert only({**row, "query": "", "split": "demonstrations"}).responses == ("It keeps.",)


def test_ranked_best_first():
    record = only(ROWS["ranked"][0])
    pairs = (Preference(0, 1), Preference(0, 2), Preference(1, 2))
    assert record == Record("", "Which bread?", ("Rye.", "White.", "Bread."), pairs)


def test_ranked_by_number():
    _, ranks, nectar, _ = (only(row) for row in ROWS["ranked"])
    assert ranks.messages == MESSAGES
    assert ranks.responses == ("No idea.", "It keeps.", "Because.")
    assert ranks.preferences == (Preference(1, 0), Preference(0, 2, tie=True), Preference(1, 2))
    assert nectar == Record("", DIALOGUE, ("a", "b"), (Preference(1, 0),))


def test_openai_strength_is_the_distance_of_the_confidence_from_5():
    record = only(TLDR)
    query = "SUBREDDIT: r/cats\n\nTITLE: Cat\n\nPOST: My cat sings."
    assert record == Record("", query, (" Cat sings.", " Dog?"), (Preference(0, 1, strength=3.0),))
    tie = only({**TLDR, "extra": {"confidence": 5}})
    assert tie.preferences == (Preference(0, 1, tie=True, strength=0.0),)


def test_qa_feedback():
    record = only(QA)
    assert record.query == (
        "CONTEXT: Rye\nRye is a grain. It keeps.\n\nCONTEXT: Wheat\nWheat does not.\n\nQUESTION: Which bread?"
    )
    assert record.responses == ("Rye.", "White.", "Bread.", "None.")
    assert record.preferences == (
        Preference(0, 1),
        Preference(0, 2, tie=True),
        Preference(3, 0),
        Preference(2, 1),
        Preference(1, 3),
        Preference(2, 3),
    )


def test_qa_feedback_of_any_number_of_predictions():
    pair = {name: QA[name] for name in ("question", "prediction 1", "prediction 2")}
    record = only({**pair, "passages": [], "preference": [2]})
    assert record == Record("", "QUESTION: Which bread?", ("Rye.", "White."), (Preference(1, 0),))


def test_real_qa_feedback():
    path = REAL / "fgrlhf_qa_dev_feedback.jsonl.gz"
    if not path.exists():
        pytest.skip(f"the real data file {path.name} is not at hand (looked in ../shared/data)")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        records = [only(json.loads(line)) for line in lines]
    assert len(records) == 500
    assert {len(record.responses) for record in records} == {4}
    compared = Counter("tie" if p.tie else p.chosen < p.rejected for r in records for p in r.preferences)
    assert compared == {"tie": 384, True: 1577, False: 1039}  # counted in the file: 0, 1 and 2
    assert all(record.query.count("\n\nQUESTION: ") == (record.query[:1] == "C") for record in records)


def test_ultrafeedback_scores_are_the_first_kind_that_every_completion_has():
    row = ROWS["ultrafeedback"][0]
    record = only(row)
    assert record.responses == ("Rye.", "White.", "Bread.")
    assert record.scores == (8.5, 6.0, 8.5)
    tie = Preference(0, 2, tie=True, strength=0.0)
    assert record.preferences == (Preference(0, 1, strength=2.5), tie, Preference(2, 1, strength=2.5))
    first, *others = COMPLETIONS
    assert only({**row, "completions": [{**first, "overall_score": None}, *others]}).scores == (4.25, 4.0, 3.0)
    bare = [{"response": f"a{n}", "annotations": ANNOTATIONS, "overall_score": 5} for n in range(2)]
    bare[1] = {"response": "b", "annotations": {"honesty": {"Rating": 2}, "aspect": {"Rating": "2.5"}}}
    assert only({**row, "completions": bare}).scores == (3.5, 2.25)


def test_ultrafeedback_as_flat_columns():
    record = only(ROWS["ultrafeedback"][1])
    preference = Preference(0, 1, strength=1.5)
    assert record == Record("", "Which bread?", ("Rye.", "White."), (preference,), (5.0, 3.5))


def tree(prompt: object, **others: object) -> dict[str, Any]:
    return {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": prompt, **others}


def test_oasst_gives_a_record_for_every_message_with_ranked_replies():
    first, second = read(tree(TREE))
    assert first == Record(
        "m1", "Which bread?", ("Rye.", "White."), (Preference(0, 1),), messages=(Message(USER, "Which bread?"),)
    )
    assert second == Record("m4", DIALOGUE, ("It keeps.", "No idea."), (Preference(0, 1),), messages=MESSAGES)


def test_oasst_ids_fall_back_to_the_tree_at_the_root_alone():
    replies = (answered("Rye.", 0, asked("Why?", answered("a", 0), answered("b", 1))), answered("White.", 1))
    assert [record.id for record in read(tree(asked("Which bread?", *replies)))] == ["t", ""]


def test_oasst_equal_ranks_are_ties():
    record = only(tree(asked("q", answered("a", 1), answered("b", 0), answered("c", 1))))
    assert record.responses == ("b", "a", "c")
    assert record.preferences == (Preference(0, 1), Preference(0, 2), Preference(1, 2, tie=True))


@pytest.mark.parametrize("gone", [{"deleted": True}, {"review_result": False}])
def test_oasst_leaves_out_what_was_removed_with_all_that_follows_it(gone):
    below = asked("Why?", answered("x", 0), answered("y", 1))
    record = only(tree(asked("q", answered("a", 1), answered("b", 0, below, **gone), answered("c", 2))))
    assert record.responses == ("a", "c")
    with pytest.raises(UnusableRow) as caught:
        read(tree({**TREE, **gone}))
    assert caught.value.reason == "unranked"


def test_oasst_trees_may_be_deep():
    replies = answered("a", 0), answered("b", 1)
    prompt = asked("q", *replies)
    for _ in range(3000):
        prompt = asked("q", node("assistant", "r", prompt))
    record = only(tree(prompt))
    assert len(record.messages) == 6001
    broken = tree(
        asked("q", node("assistant", "r", asked("q", *replies, node("assistant", "c", node("prompter", "")))))
    )
    field = r"prompt\.replies\[0\]\.replies\[0\]\.replies\[2\]\.replies\[0\]\.text"
    with pytest.raises(DataError, match=rf"^rows, line 7, field '{field}': the prompter's message is empty"):
        read(broken)


def test_shp():
    assert only(SHP) == Record("", "Which bread?", ("Rye.", "White."), (Preference(0, 1, strength=3.0),))
    assert only({**SHP, "labels": 0, "score_ratio": None}).preferences == (Preference(1, 0),)


@pytest.mark.parametrize(
    ("winner", "preference"),
    [
        ("model_a", Preference(0, 1)),
        ("model_b", Preference(1, 0)),
        ("tie", Preference(0, 1, tie=True)),
        ("tie (bothbad)", Preference(0, 1, tie=True)),
    ],
)
def test_arena(winner, preference):
    messages = (Message(USER, "Which bread?"),)
    wanted = Record("", "Which bread?", ("Rye.", "White."), (preference,), messages=messages)
    assert only({**ARENA, "winner": winner}) == wanted


# Messages


def asking(*messages: object) -> dict[str, Any]:
    return {"messages": list(messages), "responses": ["a", "b"]}


def test_messages_may_be_written_as_sharegpt_or_oasst_do_and_in_parts():
    parts = [{"type": "text", "text": "Which "}, {"type": "text", "text": "bread?", "image": None}]
    for first in (says("human", "Which bread?"), {"from": "human", "value": "Which bread?"}, says("user", parts)):
        for reply in (says("gpt", "Rye."), {"from": "gpt", "value": "Rye.", "role": None}, says("assistant", "Rye.")):
            assert only(asking(first, reply, says("prompter", "Why?", tool_calls=[], name=None))).messages == MESSAGES


def test_content_is_kept_to_the_letter():
    given = (Message(SYSTEM, ""), Message(USER, " a\n"), Message(ASSISTANT, ""), Message(USER, "\n\nHuman: b "))
    assert only(asking(*(says(m.role, m.content) for m in given))).messages == given


# What is wrong

IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
BAD_MESSAGES = {
    "no list": ("hello", "messages", "must be of type list, found str"),
    "empty list": ([], "messages", "needs at least 1, found 0"),
    "no object": ([ASK, "x"], "messages[1]", "must be of type dict, found str"),
    "no role": ([{"content": "x"}], "messages[0].role", "missing"),
    "role no text": ([says(3, "x")], "messages[0].role", "must be of type str, found int"),
    "tool": ([ASK, says("tool", "x"), WHY], "messages[1].role", "the role 'tool' cannot be read, only system, user"),
    "function": ([{"from": "function", "value": "x"}], "messages[0].from", "the role 'function' cannot"),
    "long role": ([says("\x1b" + "r" * 99, "x")], "messages[0].role", r"the role '\\x1b" + "r" * 59 + r"'\.\.\. can"),
    "late system": ([ASK, says(SYSTEM, "x"), WHY], "messages[1]", "the system may only speak first"),
    "tool call": ([ASK, says(ASSISTANT, "x", tool_calls=[{}]), WHY], "messages[1].tool_calls", "tools and their calls"),
    "call alone": (
        [ASK, says(ASSISTANT, None, function_call={"a": 1})],
        "messages[1].function_call",
        "tools and their",
    ),
    "no content": ([says(USER, None)], "messages[0].content", "missing"),
    "sharegpt no content": ([{"from": "human"}], "messages[0].value", "missing"),
    "content no text": ([says(USER, 1)], "messages[0].content", "must be of type str, found int"),
    "image": ([says(USER, [IMAGE])], "messages[0].content[0].type", "a part of type 'image_url' cannot be read"),
    "part no object": ([says(USER, ["x"])], "messages[0].content[0]", "must be of type dict, found str"),
    "part no text": ([says(USER, [{"type": "text"}])], "messages[0].content[0].text", "missing"),
    "part no type": ([says(USER, [{"text": "x"}])], "messages[0].content[0].type", "missing"),
    "blank user": ([says(USER, " \n")], "messages[0].content", "the user's message is empty"),
    "no part": ([says(USER, [])], "messages[0].content", "the user's message is empty"),
    "half a surrogate": ([says(USER, HALF)], "messages[0].content", "character 1 is half of a surrogate pair"),
    "half in a role": ([says(HALF, "x")], "messages[0].role", "character 1 is half of a surrogate pair"),
    "answered": ([ASK, REPLY], "messages", "must end with a user's message, and ends with the assistant's"),
    "system alone": ([says(SYSTEM, "x")], "messages", "must end with a user's message, and ends with the system's"),
    "nobody": ([says(ASSISTANT, "")], "messages", "must end with a user's message, and ends with the assistant's"),
}


def preferring(*preferences: object) -> dict[str, Any]:
    return {"query": "q", "responses": ["a", "b"], "preferences": list(preferences)}


HH, TRL, CHAT = ROWS["hh"][0], ROWS["trl"][0], ROWS["trl"][2]
IMPLICIT, UNPAIRED, UNPAIRED_CHAT = ROWS["trl_implicit"][0], *ROWS["trl_unpaired"]
SCORED = {"query": "q", "responses": ["a", "b", "c"], "scores": [0.5, -1, 2.25]}
RANKED, RANKS, NECTAR, _ = ROWS["ranked"]
ULTRA, FLAT = ROWS["ultrafeedback"]


def rated(**annotations: object) -> dict[str, Any]:
    first = {"response": "a", "annotations": {"x": {"Rating": "1"}}}
    return {**ULTRA, "completions": [first, {"response": "b", "annotations": annotations}]}


# Name of the format, row, field, problem.
BAD_ROWS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    **{
        f"messages: {name}": ("records", {"messages": messages, "responses": ["a", "b"]}, field, problem)
        for name, (messages, field, problem) in BAD_MESSAGES.items()
    },
    "hh no dialogue": (
        "hh",
        {"chosen": "x", "rejected": "y"},
        "chosen",
        r"no '\\n\\nAssistant:' in it; rows of prompt",
    ),
    "hh messages": ("hh", IMPLICIT, "chosen", "must be of type str, found list"),
    "trl number": ("trl", {**TRL, "chosen": 3}, "chosen", "must be text or a list of messages, found int; corr"),
    "trl prompt missing": ("trl", {**CHAT, "prompt": None}, "prompt", "missing"),
    "trl prompt an object": ("trl", {**TRL, "prompt": {}}, "prompt", "must be text or a list of messages, found dict"),
    "trl empty prompt": ("trl", {**TRL, "prompt": " \n"}, "prompt", "the query is empty"),
    "trl empty prompt of messages": ("trl", {**CHAT, "prompt": " "}, "prompt", "the query is empty"),
    "trl half a surrogate": ("trl", {**TRL, "chosen": HALF}, "chosen", "character 1 is half of a surrogate pair"),
    "trl tool": ("trl", {**CHAT, "chosen": [says("tool", "x")]}, "chosen[0].role", "the role 'tool' cannot be read"),
    "trl other query": ("trl", {**CHAT, "chosen": [WHY, KEEPS]}, "chosen", "neither begins .*format=trl_implicit to"),
    "trl other prompt": ("trl", {**CHAT, "prompt": "x", "rejected": [ASK, KEEPS]}, "rejected", "neither begins with"),
    "trl ends with the assistant": ("trl", {**CHAT, "prompt": [ASK, REPLY]}, "prompt", "must end with a user's"),
    "trl one score": ("trl", {**TRL, "score_chosen": 1}, "score_rejected", "must be a finite number"),
    "trl score NaN": ("trl", {**TRL, "score_chosen": NAN, "score_rejected": 1}, "score_chosen", "must be a finite"),
    "trl score text": ("trl", {**CHAT, "score_chosen": "1"}, "score_chosen", "must be a finite number; correct it"),
    "implicit mixed": ("trl_implicit", {**IMPLICIT, "rejected": "x"}, "rejected", "must be of type list, found str"),
    "implicit mixed otherwise": ("trl_implicit", {**IMPLICIT, "chosen": "x"}, "rejected", "must be of type str, found"),
    "implicit nothing shared": ("trl_implicit", {"chosen": "a", "rejected": "b"}, "rejected", "has no beginning in c"),
    "implicit space shared": ("trl_implicit", {"chosen": " \na", "rejected": " \nb"}, "rejected", "has no beginning"),
    "implicit no query": ("trl_implicit", {"chosen": [KEEPS], "rejected": [DUNNO]}, "chosen", "and has none"),
    "implicit twice": (
        "trl_implicit",
        {"chosen": [ASK, REPLY, KEEPS], "rejected": [ASK, REPLY, DUNNO]},
        "chosen",
        "must end with a user's message, and ends with the assistant's",
    ),
    "label text": ("trl_unpaired", {**UNPAIRED, "label": "true"}, "label", "must be true or false"),
    "label 2": ("trl_unpaired", {**UNPAIRED, "label": 2}, "label", "must be true or false; correct it"),
    "label NaN": ("trl_unpaired", {**UNPAIRED, "label": NAN}, "label", "must be true or false"),
    "label missing": ("trl_unpaired", {**UNPAIRED, "label": None}, "label", "must be true or false"),
    "completion number": ("trl_unpaired", {**UNPAIRED, "completion": 1}, "completion", "must be text or a list"),
    "completion of the user": (
        "trl_unpaired",
        {**UNPAIRED_CHAT, "completion": QUERY},
        "completion",
        "must end with the",
    ),
    "query and messages": ("records", {**asking(ASK), "query": "q"}, "messages", "stands beside 'query'; keep one"),
    "neither": ("records", {"responses": ["a", "b"]}, "query", "missing"),
    "responses no list": ("rrhf", {**SCORED, "responses": "ab"}, "responses", "must be of type list, found str"),
    "response no text": ("rrhf", {**SCORED, "responses": ["a", 1, "c"]}, "responses[1]", "must be of type str"),
    "response missing": ("rrhf", {**SCORED, "responses": ["a", None, "c"]}, "responses[1]", "missing"),
    "one response": ("rrhf", {**SCORED, "responses": ["a"]}, "responses", "needs at least 2, found 1"),
    "no response": (
        "records",
        {"query": "q", "responses": [], "desirable": []},
        "responses",
        "needs at least 1, found 0",
    ),
    "too few scores": ("rrhf", {**SCORED, "scores": [1, 2]}, "scores", "2 scores for 3 responses; give one for each"),
    "score infinite": ("rrhf", {**SCORED, "scores": [1, float("inf"), 2]}, "scores[1]", "must be a finite number"),
    "score too large": ("rrhf", {**SCORED, "scores": [1, 10**400, 2]}, "scores[1]", "must be a finite number"),
    "score boolean": ("rrhf", {**SCORED, "scores": [True, 2, 3]}, "scores[0]", "must be a finite number"),
    "too few labels": ("records", {**SCORED, "desirable": [True]}, "desirable", "1 desirable for 3 responses"),
    "label no boolean": ("records", {**SCORED, "desirable": [True, "x", 0]}, "desirable[1]", "must be true or false"),
    "preferences no list": ("records", {**SCORED, "preferences": {}}, "preferences", "must be of type list"),
    "index too large": ("records", preferring([0, 2]), "preferences[0].rejected", "must be an index from 0 to 1"),
    "index boolean": ("records", preferring([True, 0]), "preferences[0].chosen", "must be an index"),
    "three indices": ("records", preferring([0, 1, 0]), "preferences[0]", r"must be \[chosen, rejected\] or"),
    "misspelt key": ("records", preferring({"chosen": 0, "rejected": 1, "stength": 2}), "preferences[0]", "must be"),
    "over itself": ("records", preferring([0, 1], [1, 1]), "preferences[1]", "prefers a response over itself; name"),
    "tie no boolean": ("records", preferring({"chosen": 0, "rejected": 1, "tie": 1}), "preferences[0].tie", "must be"),
    "strength NaN": (
        "records",
        preferring({"chosen": 0, "rejected": 1, "strength": NAN}),
        "preferences[0].strength",
        "must be a finite number",
    ),
    "strength negative": (
        "records",
        preferring({"chosen": 0, "rejected": 1, "strength": -1}),
        "preferences[0].strength",
        "is negative; swap",
    ),
    "id a list": ("records", {**SCORED, "id": ["x"]}, "id", "must be text or a whole number; leave it out"),
    "id blank": ("records", {**SCORED, "id": " "}, "id", "must be text"),
    "id half a surrogate": ("records", {**SCORED, "id": HALF}, "id", "character 1 is half"),
    "unknown split": ("records", {**SCORED, "split": "dev"}, "split", "must be one of demonstrations, train"),
    "ranked no list": ("ranked", {**RANKED, "ranked_responses": "ab"}, "ranked_responses", "must be of type list"),
    "ranked one": ("ranked", {**RANKED, "ranked_responses": ["a"]}, "ranked_responses", "needs at least 2, found 1"),
    "ranked number": ("ranked", {**RANKED, "ranked_responses": ["a", 1]}, "ranked_responses[1]", "must be of type str"),
    "ranked no ranking": ("ranked", {"prompt": "p"}, "ranked_responses", "missing; give ranked_responses, or resp"),
    "ranked no prompt": ("ranked", {"answers": NECTAR["answers"]}, "query", "missing"),
    "ranked prompt": ("ranked", {**RANKED, "prompt": [REPLY]}, "prompt", "must end with a user's message"),
    "ranks too few": ("ranked", {**RANKS, "ranks": [1, 2]}, "ranks", "2 ranks for 3 responses; give one for each"),
    "ranks missing": ("ranked", {**RANKS, "ranks": None}, "ranks", "missing"),
    "rank text": ("ranked", {**RANKS, "ranks": [1, "2", 3]}, "ranks[1]", "must be a finite number"),
    "answers one": ("ranked", {**NECTAR, "answers": [{}]}, "answers", "needs at least 2, found 1"),
    "answer no object": (
        "ranked",
        {**NECTAR, "answers": [{"answer": "a", "rank": 1}, "x"]},
        "answers[1]",
        "must be of",
    ),
    "answer missing": ("ranked", {**NECTAR, "answers": [{"rank": 1}, {"rank": 2}]}, "answers[0].answer", "missing"),
    "answer unranked": (
        "ranked",
        {**NECTAR, "answers": [{"answer": "a", "rank": 1}, {"answer": "b"}]},
        "answers[1].rank",
        "must be a finite number",
    ),
    "info no object": ("openai", {**TLDR, "info": "x"}, "info", "must be of type dict, found str"),
    "no post": ("openai", {**TLDR, "info": {"title": "x"}}, "info.post", "missing"),
    "no title": ("openai", {**TLDR, "info": {"post": "x"}}, "info.title", "missing"),
    "three summaries": ("openai", {**TLDR, "summaries": [{"text": "x"}] * 3}, "summaries", "must be two objects"),
    "summary without text": ("openai", {**TLDR, "summaries": [{"text": "x"}, {}]}, "summaries[1].text", "missing"),
    "choice 2": ("openai", {**TLDR, "choice": 2}, "choice", "must be 0 or 1"),
    "choice boolean": ("openai", {**TLDR, "choice": True}, "choice", "must be of type int, found bool"),
    "extra no object": ("openai", {**TLDR, "extra": 1}, "extra", "must be of type dict, found int"),
    "confidence 10": ("openai", {**TLDR, "extra": {"confidence": 10}}, "extra.confidence", "must be from 1 to 9"),
    "question blank": ("qa_feedback", {**QA, "question": " "}, "question", "the query is empty"),
    "passages no list": ("qa_feedback", {**QA, "passages": "x"}, "passages", "must be of type list, found str"),
    "passage no list": ("qa_feedback", {**QA, "passages": [["a"], "x"]}, "passages[1]", "must be of type list"),
    "passage empty": ("qa_feedback", {**QA, "passages": [[]]}, "passages[0]", "needs at least 1, found 0"),
    "sentence no text": ("qa_feedback", {**QA, "passages": [["a", 1]]}, "passages[0][1]", "must be of type str"),
    "prediction missing": ("qa_feedback", {**QA, "prediction 2": None}, "prediction 2", "missing"),
    "one prediction": (
        "qa_feedback",
        {"question": "q", "passages": [], "prediction 1": "x"},
        "prediction 2",
        "missing",
    ),
    "preference no list": ("qa_feedback", {**QA, "preference": 1}, "preference", "must be of type list, found int"),
    "too few preferences": (
        "qa_feedback",
        {**QA, "preference": [1, 2]},
        "preference",
        "2 for 4 predictions, which make 6 pairs",
    ),
    "preference 3": ("qa_feedback", {**QA, "preference": [1, 3, 0, 0, 0, 0]}, "preference[1]", "must be 0, 1 or 2"),
    "completions no list": ("ultrafeedback", {**ULTRA, "completions": {}}, "completions", "must be of type list"),
    "completion no object": (
        "ultrafeedback",
        {**ULTRA, "completions": ["a", "b"]},
        "completions[0]",
        "must be of type",
    ),
    "completion no response": (
        "ultrafeedback",
        {**ULTRA, "completions": [{}, {}]},
        "completions[0].response",
        "missing",
    ),
    "overall score NaN": (
        "ultrafeedback",
        {**ULTRA, "completions": [COMPLETIONS[0], {**COMPLETIONS[1], "overall_score": NAN}]},
        "completions[1].overall_score",
        "must be a finite number",
    ),
    "no annotations": (
        "ultrafeedback",
        {**ULTRA, "completions": [{"response": "a"}, {"response": "b"}]},
        "completions[0].annotations",
        "missing",
    ),
    "no rating": ("ultrafeedback", rated(x={"Rating": "N/A"}), "completions[1].annotations", "there is no rating"),
    "aspect no object": ("ultrafeedback", rated(x="4"), "completions[1].annotations.x", "must be of type dict"),
    "rating no number": (
        "ultrafeedback",
        rated(x={"Rating": "good\n" * 30}),
        "completions[1].annotations.x.Rating",
        r"'good\\n.*'\.\.\. is no number",
    ),
    "rating nan": (
        "ultrafeedback",
        rated(x={"Rating": "nan"}),
        "completions[1].annotations.x.Rating",
        "'nan' is no num",
    ),
    "rating huge": (
        "ultrafeedback",
        rated(x={"Rating": "9" * 400}),
        "completions[1].annotations.x.Rating",
        "must be a",
    ),
    "rating missing": ("ultrafeedback", rated(x={}), "completions[1].annotations.x.Rating", "must be a finite number"),
    "ratings too few": ("ultrafeedback", {**FLAT, "ratings": ["5"]}, "ratings", "1 ratings for 2 responses"),
    "scores too far apart": (
        "ultrafeedback",
        {**FLAT, "ratings": [1e308, -1e308]},
        "ratings",
        "must be a finite number",
    ),
    "tree no object": ("oasst", tree("x"), "prompt", "must be of type dict, found str"),
    "tree missing": ("oasst", tree(None), "prompt", "missing"),
    "tree id": ("oasst", tree(TREE, message_tree_id=[]), "message_tree_id", "must be text or a whole number"),
    "replies no list": ("oasst", tree({**TREE, "replies": {}}), "prompt.replies", "must be of type list, found dict"),
    "reply no object": ("oasst", tree(asked("q", answered("a", 0), "b")), "prompt.replies[1]", "must be of type dict"),
    "reply no text": ("oasst", tree(asked("q", {"role": "assistant"})), "prompt.replies[0].text", "missing"),
    "reply no role": ("oasst", tree(asked("q", {"text": "a"})), "prompt.replies[0].role", "missing"),
    "root answered": ("oasst", tree(answered("q", 0)), "prompt.role", "must be prompter: prompter and assistant take"),
    "no turns": ("oasst", tree(asked("q", asked("q"))), "prompt.replies[0].role", "must be assistant: prompter and"),
    "prompter blank": ("oasst", tree(asked(" ")), "prompt.text", "the prompter's message is empty"),
    "rank no number": (
        "oasst",
        tree(asked("q", answered("a", 0), answered("b", "1"))),
        "prompt.replies[1].rank",
        "must be a finite number",
    ),
    "message id": ("oasst", tree({**TREE, "message_id": {}}), "prompt.message_id", "must be text or a whole number"),
    "history blank": ("shp", {**SHP, "history": ""}, "history", "the query is empty"),
    "labels 2": ("shp", {**SHP, "labels": 2}, "labels", "must be 0 or 1; correct it or delete the row"),
    "labels text": ("shp", {**SHP, "labels": "1"}, "labels", "must be of type int, found str"),
    "ratio negative": ("shp", {**SHP, "score_ratio": -2}, "score_ratio", "is negative"),
    "winner unknown": ("arena", {**ARENA, "winner": "both"}, "winner", "must be one of model_a, model_b, tie, tie"),
    "winner no text": ("arena", {**ARENA, "winner": 1}, "winner", "must be of type str, found int"),
    "conversation no list": ("arena", {**ARENA, "conversation_b": "x"}, "conversation_b", "must be of type list"),
    "trl other name missing": ("trl", {**ORCA, "question": None}, "question", "missing"),
    "trl system no text": ("trl", {**ORCA, "system": 1}, "system", "must be of type str, found int"),
    "trl history": ("trl", {**LLAMA_FACTORY, "history": [["a"]]}, "history[0]", "must be .the user's text, the reply"),
    "trl message empty": ("trl", {**SHAREGPT, "chosen": {}}, "chosen[0].role", "missing"),
    "one output": ("alpaca", {"instruction": "i", "output": "a"}, "output", "is one text, so there is no preference"),
    "three outputs": ("alpaca", {"instruction": "i", "output": ["a", "b", "c"]}, "output", "must be .chosen, rejected"),
    "farm 3": ("alpaca", {**ALPACA_FARM, "preference": 3}, "preference", "must be 1, 2 or 1.5"),
    "better 2": ("safe_rlhf", {**SAFE, "better_response_id": 2}, "better_response_id", "must be 0 or 1"),
    "helpsteer text": ("helpsteer", {**HELPSTEER2, "preference_strength": "2"}, "preference_strength", "must be a fin"),
    "webgpt text": ("webgpt", {**WEBGPT, "question": "q"}, "question", "must be of type dict, found str"),
    "webgpt NaN": ("webgpt", {**WEBGPT, "score_1": NAN}, "score_1", "must be a finite number"),
    "no score": ("ranked", {**STACK, "answers": [{"text": "a"}, {"text": "b"}]}, "answers[0].pm_score", "must be a f"),
    "two winners": ("arena_votes", {**VOTES, "winner_tie": 1}, "winner_tie", "exactly one of winner_model_a, winner_m"),
    "null reply": ("arena_votes", {**VOTES, "response_b": "[null]"}, "response_b", "missing"),
}


@pytest.mark.parametrize(("name", "row", "field", "problem"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_broken_row_is_an_error_that_names_place_and_field(name, row, field, problem):
    with pytest.raises(DataError, match=rf"^rows, line 7, field '{re.escape(field)}': .*{problem}") as caught:
        READERS[name].read(row, "rows, line 7")
    assert not isinstance(caught.value, UnusableRow)
    assert len(str(caught.value)) < 300


OTHER = says(USER, "Tea?")
UNUSABLE: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "hh": ("hh", {**HH, "rejected": "\n\nHuman: Tea?\n\nAssistant: Yes."}, "rejected", "different_queries"),
    "hh blank": ("hh", {**HH, "rejected": f"{DIALOGUE} "}, "rejected", "blank_responses"),
    "trl blank": ("trl", {**TRL, "chosen": "\n"}, "chosen", "blank_responses"),
    "trl message blank": ("trl", {**CHAT, "rejected": [says(ASSISTANT, " ")]}, "rejected", "blank_responses"),
    "trl several turns": ("trl", {**CHAT, "chosen": [KEEPS, OTHER, KEEPS]}, "rejected", "different_queries"),
    "trl no reply": ("trl", {**CHAT, "chosen": QUERY, "rejected": QUERY}, "rejected", "different_queries"),
    "implicit early": (
        "trl_implicit",
        {"chosen": [*QUERY, KEEPS], "rejected": [OTHER, REPLY, WHY, KEEPS]},
        "rejected",
        "different_queries",
    ),
    "implicit late": ("trl_implicit", {**IMPLICIT, "rejected": [ASK, REPLY]}, "rejected", "different_queries"),
    "implicit user": ("trl_implicit", {"chosen": QUERY, "rejected": QUERY}, "rejected", "different_queries"),
    "implicit prefix": ("trl_implicit", {"chosen": "The sky", "rejected": "The"}, "rejected", "blank_responses"),
    "implicit same": ("trl_implicit", {"chosen": "The sky", "rejected": "The sky"}, "rejected", "identical_responses"),
    "unpaired blank": ("trl_unpaired", {**UNPAIRED, "completion": ""}, "completion", "blank_responses"),
    "unpaired message": (
        "trl_unpaired",
        {**UNPAIRED_CHAT, "completion": [says(ASSISTANT, "")]},
        "completion",
        "blank_responses",
    ),
    "rrhf": ("rrhf", {**SCORED, "responses": ["a", " ", "c"]}, "responses[1]", "blank_responses"),
    "ranked": ("ranked", {**RANKED, "ranked_responses": ["a", ""]}, "ranked_responses[1]", "blank_responses"),
    "openai": ("openai", {**TLDR, "extra": {"confidence": 8}}, "extra.confidence", "contradicting_confidences"),
    "article": ("openai", {**TLDR, "info": {"post": None, "article": "News."}}, "info.article", "articles"),
    "qa_feedback": ("qa_feedback", {**QA, "prediction 3": "\n"}, "prediction 3", "blank_responses"),
    "ultrafeedback": ("ultrafeedback", {**ULTRA, "completions": COMPLETIONS[:1]}, "completions", "too_few_responses"),
    "oasst": ("oasst", tree(asked("q", answered("a", 0), answered("b", None))), "prompt", "unranked"),
    "oasst blank": (
        "oasst",
        tree(asked("q", answered("a", 0), answered(" ", 1))),
        "prompt.replies[1].text",
        "blank_responses",
    ),
    "shp": ("shp", {**SHP, "human_ref_B": " "}, "human_ref_B", "blank_responses"),
    "arena": (
        "arena",
        {**ARENA, "conversation_a": [*QUERY, KEEPS], "conversation_b": [ASK, DUNNO, WHY, KEEPS]},
        "conversation_b",
        "separate_conversations",
    ),
    "arena_votes": (
        "arena_votes",
        {**VOTES, "prompt": '["a", "b"]', "response_a": '["a", "b"]', "response_b": '["a", "b"]'},
        "prompt",
        "separate_conversations",
    ),
    "helpsteer": ("helpsteer", {**HELPSTEER3, "response2": ""}, "response2", "blank_responses"),
}


@pytest.mark.parametrize(("name", "row", "field", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_sound_row_that_says_nothing_is_unusable_for_a_reason(name, row, field, reason):
    with pytest.raises(UnusableRow) as caught:
        READERS[name].read(row, "rows, line 7")
    assert str(caught.value).startswith(f"rows, line 7, field '{field}': ")
    assert caught.value.reason == reason


# Anything at all

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.floats(),
    st.sampled_from(["", " ", "a", "b", "The sky", HALF, "N/A", "4", "tie", "model_a", "user", "assistant", DIALOGUE]),
    st.text(max_size=5),
)
KEYS = ["role", "content", "from", "value", "text", "type", "rank", "replies", "answer", "response", "annotations"]
anything = st.recursive(
    scalars | st.sampled_from([ASK, KEEPS, TREE, COMPLETIONS[0], TLDR["info"]]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*KEYS, "x"]), inner, max_size=4),
    max_leaves=8,
)


def places(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """The path to everything inside a row."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(*path, key) for key, _ in inside] + [found for key, v in inside for found in places(v, (*path, key))]


def with_value(row: Any, path: tuple[Any, ...], value: object) -> Any:
    if not path:
        return value
    copy = dict(row) if isinstance(row, dict) else list(row)
    copy[path[0]] = with_value(row[path[0]], path[1:], value)
    return copy


def try_reading(row: dict[str, Any], name: str) -> None:
    problems = []
    try:
        check(READERS[name].read(row, "x"))
    except DataError as error:
        problems.append((error, "x, field '"))
    try:
        assert find_format(row, "x") in READERS
    except DataError as error:
        problems.append((error, "x"))
    for problem, start in problems:
        assert problem.args[0].startswith(start)
        assert problem.args[0].isprintable()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
def test_any_value_in_any_column_gives_records_or_an_error(name, data):
    columns = {column for row in ROWS[name] for column in row} | set(READERS[name].structured)
    row = {column: data.draw(anything) for column in sorted(columns)}
    try_reading(row, name)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
def test_any_value_in_one_place_of_a_sound_row_gives_records_or_an_error(name, data):
    row = data.draw(st.sampled_from(ROWS[name]))
    for path in data.draw(st.lists(st.sampled_from(places(row)), min_size=1, max_size=1)):
        row = with_value(row, path, data.draw(anything))
    try_reading(row, name)
