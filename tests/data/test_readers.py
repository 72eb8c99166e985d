"""From rows to records: rows that are left out, counted and listed, and files that are not what they were taken for."""

from __future__ import annotations

import io
import json
from typing import Any, NamedTuple

import pytest

from rdo.data.columns import RowError
from rdo.data.files import TextRow
from rdo.data.readers import Reading
from rdo.data.records import Preference, Record
from rdo.runtime.errors import DataError, UserError

ASK = "\n\nHuman: Which bread?\n\nAssistant: Rye.\n\nHuman: Why?\n\nAssistant:"
HH = {"chosen": f"{ASK} It keeps.", "rejected": f"{ASK} No idea."}
TRL = {"prompt": ASK, "chosen": " It keeps.", "rejected": " No idea."}
IMPLICIT = {"chosen": "The sky is blue.", "rejected": "The sky is red."}
OPENAI = {
    "info": {"id": "t3_1", "post": "My cat sings.", "title": "Cat", "subreddit": "cats"},
    "summaries": [{"text": " Cat sings."}, {"text": " Dog?"}],
    "choice": 0,
    "extra": {"confidence": 2},
}
ARTICLE = {**OPENAI, "info": {"id": "x", "post": None, "title": None, "subreddit": None, "article": "News."}}


class Listed(io.StringIO):
    name = "invalid.jsonl"


class Result(NamedTuple):
    records: list[Record]
    counts: dict[str, int]
    listed: list[dict[str, str]]
    ignored: set[str]


def read(*rows: object, **settings: Any) -> Result:
    """Rows of data.jsonl, or (file, row) pairs."""
    listed = Listed()
    reading = Reading(**settings, listed=listed)
    named = [row if isinstance(row, tuple) else ("data", row) for row in rows]
    placed = ((f"{name}.jsonl, line {number}", row) for number, (name, row) in enumerate(named, 1))
    records = list(reading.records(placed))
    reading.judge()
    entries = [json.loads(line) for line in listed.getvalue().splitlines()]
    counts = {name: n for name, n in reading.counts.items() if n}
    return Result(records, counts, entries, reading.columns - reading.read)


def only(row: object, **settings: Any) -> Record:
    (record,) = read(row, **settings).records
    return record


def test_rows_of_another_task_are_left_out_and_counted_but_not_when_they_are_all_there_is():
    found = read(ARTICLE, OPENAI, ARTICLE)
    assert (len(found.records), found.counts, found.listed) == (1, {"rows_read": 3, "dropped_articles": 2}, [])
    with pytest.raises(DataError, match=r"line 1, field 'info'.*news.*no row of 2 can be used"):
        read(ARTICLE, ARTICLE)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_dialogues_that_end_with_the_human_are_left_out_and_counted(side):
    found = read({**HH, side: f"{HH[side]}\n\nHuman: And tea?"}, HH)
    assert (len(found.records), found.counts) == (1, {"rows_read": 2, "dropped_human_turns": 1})


def test_a_preference_between_identical_texts_is_left_out_of_a_larger_row():
    found = read({"query": "q", "responses": ["a", "a", "b"], "preferences": [[0, 1], [0, 2], [1, 2]]})
    assert found.records[0].preferences == (Preference(0, 2), Preference(1, 2))
    assert found.counts == {"rows_read": 1, "dropped_identical_preferences": 1}


DEFECTS = {
    "identical_responses": ({**HH, "rejected": HH["chosen"]}, HH),
    "blank_responses": ({**TRL, "rejected": " "}, TRL),
    "different_queries": ({**HH, "rejected": "\n\nHuman: Tea?\n\nAssistant: Yes."}, HH),
    "contradicting_confidences": ({**OPENAI, "extra": {"confidence": 8}}, OPENAI),
    "broken": ({**TRL, "rejected": 7}, TRL),
}


@pytest.mark.parametrize("reason", DEFECTS)
def test_one_invalid_row_in_a_hundred_is_left_out_counted_and_listed_but_two_are_an_error(reason):
    bad, good = DEFECTS[reason]
    found = read(*[good] * 99, bad, on_invalid="skip")
    assert len(found.records) == 99
    assert found.counts == {"rows_read": 100, f"invalid_{reason}": 1}
    (entry,) = found.listed
    assert (entry["place"], entry["reason"]) == ("data.jsonl, line 100", reason)
    assert entry["message"].startswith("data.jsonl, line 100")
    with pytest.raises(DataError, match=r"line 99.*first of 2 invalid rows of 100.*max_invalid_share=0\.01.*listed in"):
        read(*[good] * 98, bad, bad, on_invalid="skip")
    with pytest.raises(DataError, match=r"^data\.jsonl, line 1\b.*; dataset\.on_invalid=skip leaves such rows out"):
        read(bad, good)


def test_no_usable_row_is_an_error_whatever_share_is_allowed():
    with pytest.raises(DataError, match=r"line 1, field 'chosen'.*no row of 2 can be used"):
        read({**TRL, "chosen": 1}, {**TRL, "chosen": 2}, on_invalid="skip", max_invalid_share=1.0)


@pytest.mark.parametrize("row", [RowError("", "is not JSON"), [1, 2], None])
def test_rows_that_are_none_are_invalid_rows(row):
    with pytest.raises(DataError, match=r"^data\.jsonl, line 2: .*; dataset"):
        read(TRL, row)
    found = read(TRL, row, TRL, on_invalid="skip", max_invalid_share=0.5)
    assert (len(found.records), found.counts) == (2, {"rows_read": 3, "invalid_broken": 1})


def test_a_later_row_that_lacks_a_column_is_named():
    with pytest.raises(DataError, match="line 3, field 'rejected': missing; a row of format 'trl' needs prompt"):
        read(TRL, TRL, {"prompt": "p", "chosen": "c"})


def test_columns_that_nothing_is_read_from_are_known():
    row = {**TRL, "margin": 2, "source": "web", "score_chosen": 2, "score_rejected": 1, "empty": None}
    assert read(row, TRL | {"note": "n"}).ignored == {"margin", "note", "source"}


@pytest.mark.parametrize(("first", "second"), [(IMPLICIT, TRL), (IMPLICIT, HH), (HH, OPENAI)])
@pytest.mark.parametrize("on_invalid", ["error", "skip"])
def test_files_of_different_formats_are_refused(first, second, on_invalid):
    with pytest.raises(UserError, match=r"^b\.jsonl, line 3: looks like format .* read them in separate") as caught:
        read(("a", first), ("a", first), ("b", second), on_invalid=on_invalid)
    assert "on_invalid" not in str(caught.value)
    assert len(read(("a", first), ("b", first), ("c", first)).records) == 3


def test_a_second_file_that_begins_with_a_broken_row_is_read_as_the_first():
    found = read(("a", TRL), ("b", {"prompt": None}), ("b", TRL), on_invalid="skip", max_invalid_share=0.5)
    assert len(found.records) == 2


def test_the_format_can_be_forced_and_must_be_known():
    assert only({**TRL, **HH}, format="hh").query == ASK
    with pytest.raises(DataError, match="field 'scores': missing"):
        only({"query": "q", "responses": ["a", "b"]}, format="rrhf")
    with pytest.raises(DataError, match=r"dataset\.format=csv is not known; choose auto,"):
        only(TRL, format="csv")


VOTES = dict.fromkeys(("winner_model_a", "winner_tie"), "0") | {"winner_model_b": "1"}
# Cells, and of the record: responses, scores, labels, preferences.
TABLES = [
    (
        {"query": "q", "responses": '["a", "b"]', "scores": "[1, 2.5]", "id": "x"},
        (("a", "b"), (1.0, 2.5), None, ()),
    ),
    ({"prompt": "p", "chosen": "[1, 2]", "rejected": "b"}, (("[1, 2]", "b"), None, None, (Preference(0, 1),))),
    *(
        ({"prompt": "p", "completion": "c", "label": text}, (("c",), None, (value,), ()))
        for text, value in {"True": True, "false": False, "1": True}.items()
    ),
    (
        {"prompt": '["Which bread?"]', "response_a": '["Rye."]', "response_b": '["White."]', **VOTES},
        (("Rye.", "White."), None, None, (Preference(1, 0),)),
    ),
]


@pytest.mark.parametrize(("cells", "wanted"), TABLES)
def test_cells_of_a_text_table_are_parsed_where_the_format_wants_no_text(cells, wanted):
    record = only(TextRow(cells))
    assert (record.responses, record.scores, record.desirable, record.preferences) == wanted


def test_cells_of_a_text_table_that_should_be_json():
    with pytest.raises(DataError, match="line 1, field 'responses': must be a list, found 'a, b'"):
        only(TextRow(query="q", responses="a, b", scores="[1, 2]"))
