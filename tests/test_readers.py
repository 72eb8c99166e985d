"""Readers: every format on rows of its real shape, every kind of bad row, and the real files where they are at hand."""

from __future__ import annotations

import gzip
import itertools
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
from rdo.data.containers import TextRow, rows

from rdo.data.readers import HOPELESS, Reading, read_records
from rdo.data.records import Preference, Record
from rdo.errors import DataError

REAL = Path(__file__).parents[2] / "shared" / "data"
ASK = "\n\nHuman: Which bread?\n\nAssistant: Rye.\n\nHuman: Why?\n\nAssistant:"

HH = {"chosen": f"{ASK} It keeps.", "rejected": f"{ASK} No idea."}
TRL = {"prompt": ASK, "chosen": " It keeps.", "rejected": " No idea."}
SCORED = {"query": "q", "responses": ["a", "b", "c"], "scores": [0.5, -1, 2.25]}
OPENAI = {
    "info": {"id": "t3_1", "post": "My cat sings.", "title": "Cat", "subreddit": "cats"},
    "split": "train",
    "summaries": [{"text": " Cat sings.", "policy": "sup2", "note": None}, {"text": " Dog?", "policy": "ref"}],
    "choice": 0,
    "worker": "w",
    "batch": "batch13",
    "extra": {"confidence": 2},
}


class Result(NamedTuple):
    records: list[Record]
    counts: dict[str, int]
    listed: list[tuple[str, str, str]]


def read(*rows: object, **settings: object) -> Result:
    return result([(f"data.jsonl, line {number}", row) for number, row in enumerate(rows, 1)], **settings)


def result(rows: Iterable[tuple[str, object]], **settings: object) -> Result:
    listed: list[tuple[str, str, str]] = []
    reading = Reading(**{"listed": lambda *entry: listed.append(entry), **settings})
    records = list(read_records(rows, reading))
    return Result(records, {name: count for name, count in reading.counts.items() if count}, listed)


def read_file(path: Path, **settings: object) -> Result:
    return result(rows(path), **settings)


def only(row: object, **settings: object) -> Record:
    (record,) = read(row, **settings).records
    return record


def need(name: str) -> Path:
    path = REAL / name
    if not path.exists():
        pytest.skip(f"the real data file {name} is not at hand (looked in ../shared/data)")
    return path


def test_hh_query_ends_at_the_last_assistant_marker_of_chosen():
    record = only(HH)
    assert record.query == ASK
    assert record.responses == (" It keeps.", " No idea.")
    assert record.preferences == (Preference(0, 1),)
    assert (record.id, record.place) == ("", "data.jsonl, line 1")
    assert (record.scores, record.split) == (None, None)


def test_hh_marker_inside_the_rejected_reply_stays_in_the_reply():
    rejected = f"{ASK} No.\n\nHumans: Thanks.\n\nAssistant: Welcome."
    assert only({**HH, "rejected": rejected}).responses[1] == " No.\n\nHumans: Thanks.\n\nAssistant: Welcome."


def test_hh_row_whose_dialogues_ask_different_things_is_named():
    with pytest.raises(DataError, match=r"data\.jsonl, line 2, field 'rejected'.*query"):
        read(HH, {**HH, "rejected": "\n\nHuman: Which tea?\n\nAssistant: Green."})


@pytest.mark.parametrize("extra", [{}, {"response": " It keeps."}], ids=["trl", "rm-static"])
def test_trl_and_rm_static_rows_are_read_alike(extra):
    record = only({**TRL, **extra})
    assert (record.query, record.responses) == (ASK, (" It keeps.", " No idea."))
    assert record == only(HH)


def test_trl_rows_that_repeat_the_prompt_are_refused():
    with pytest.raises(DataError, match=r"line 1, field 'chosen'.*dataset\.format=hh"):
        read({**TRL, **HH})


def test_rrhf_rows_keep_scores_and_make_no_preferences():
    record = only({**SCORED, "prompt_id": 7})
    assert record.responses == ("a", "b", "c")
    assert record.scores == (0.5, -1.0, 2.25)
    assert record.preferences == ()


def test_own_format_with_preferences_id_and_split():
    preferences = [[2, 0], {"chosen": 0, "rejected": 1, "tie": True}, {"chosen": 2, "rejected": 1, "strength": 3}]
    row = {"id": 41, "query": "q", "responses": ["a", "b", "c"], "preferences": preferences, "split": "test"}
    record = only(row)
    assert (record.id, record.split, record.scores) == ("41", "test", None)
    assert record.preferences == (Preference(2, 0), Preference(0, 1, tie=True), Preference(2, 1, strength=3.0))


def test_columns_that_are_null_count_as_absent():
    record = only({"query": "q", "responses": ["a", "b"], "scores": None, "preferences": None, "id": None})
    assert (record.scores, record.preferences) == (None, ())


def test_a_demonstration_may_have_one_response():
    assert only({"query": "q", "responses": ["a"], "split": "demonstrations"}).responses == ("a",)
    with pytest.raises(DataError, match=r"field 'responses': needs at least 2, found 1"):
        only({"query": "q", "responses": ["a"], "split": "train"})


@pytest.mark.parametrize(
    ("confidence", "preference"),
    [
        (1, Preference(0, 1, strength=4.0)),
        (4, Preference(0, 1, strength=1.0)),
        (5, Preference(0, 1, tie=True, strength=0.0)),
        (6, Preference(1, 0, strength=1.0)),
        (9, Preference(1, 0, strength=4.0)),
    ],
)
def test_openai_strength_is_the_distance_of_the_confidence_from_5(confidence, preference):
    record = only({**OPENAI, "choice": int(confidence > 5), "extra": {"confidence": confidence}})
    assert record.query == "SUBREDDIT: r/cats\n\nTITLE: Cat\n\nPOST: My cat sings."
    assert record.responses == (" Cat sings.", " Dog?")
    assert record.preferences == (preference,)


@pytest.mark.parametrize("extra", [None, {}, {"confidence": None}])
def test_openai_without_confidence_has_no_strength(extra):
    assert only({**OPENAI, "choice": 1, "extra": extra}).preferences == (Preference(1, 0),)


def test_openai_subreddit_is_not_prefixed_twice():
    row = {**OPENAI, "info": {**OPENAI["info"], "subreddit": "r/cats"}}
    assert only(row).query == only(OPENAI).query


def test_openai_articles_are_left_out_and_counted_but_not_when_they_are_all_there_is():
    article = {**OPENAI, "info": {"id": "x", "post": None, "title": None, "subreddit": None, "article": "News."}}
    reading = read(article, OPENAI, article)
    assert len(reading.records) == 1
    assert reading.counts == {"rows_read": 3, "dropped_articles": 2}
    with pytest.raises(DataError, match=r"line 1, field 'info\.article'.*news"):
        read(article)


def test_openai_single_summary_rows_get_a_clear_error():
    with pytest.raises(DataError, match="single-summary rows"):
        read({"info": OPENAI["info"], "split": "test", "summary": {"text": "s", "axes": {}}, "worker": "w"})


def test_rows_of_identical_responses_are_an_error_or_are_left_out_and_counted():
    same = {**HH, "rejected": HH["chosen"]}
    with pytest.raises(DataError, match=r"line 2: all responses are identical.*dataset\.on_invalid=skip"):
        read(HH, same)
    found = read(same, HH, same, on_invalid="skip", max_invalid_share=0.7)
    assert [record.query for record in found.records] == [ASK]
    assert found.counts == {"rows_read": 3, "invalid_identical_responses": 2}
    assert [entry[:2] for entry in found.listed] == [
        ("data.jsonl, line 1", "identical_responses"),
        ("data.jsonl, line 3", "identical_responses"),
    ]


def test_a_preference_between_identical_texts_is_left_out_of_a_larger_row():
    row = {"query": "q", "responses": ["a", "a", "b"], "preferences": [[0, 1], [0, 2], {"chosen": 1, "rejected": 2}]}
    reading = read(row)
    assert reading.records[0].preferences == (Preference(0, 2), Preference(1, 2))
    assert reading.counts == {"rows_read": 1, "dropped_identical_preferences": 1}


DEFECTS = [
    ({**TRL, "rejected": " "}, "blank_responses"),
    ({**HH, "rejected": "\n\nHuman: Tea?\n\nAssistant: Yes."}, "different_queries"),
    ({**OPENAI, "extra": {"confidence": 8}}, "contradicting_confidences"),
    ({**TRL, "rejected": 7}, "broken"),
]


@pytest.mark.parametrize(("row", "reason"), DEFECTS, ids=[reason for _, reason in DEFECTS])
def test_one_invalid_row_in_a_hundred_is_left_out_counted_and_listed_but_two_are_an_error(row, reason):
    good = next(sound for sound in (TRL, HH, OPENAI) if sound.keys() == row.keys())
    found = read(*[good] * 99, row, on_invalid="skip")
    assert len(found.records) == 99
    assert found.counts == {"rows_read": 100, f"invalid_{reason}": 1}
    ((place, listed_reason, message),) = found.listed
    assert (place, listed_reason) == ("data.jsonl, line 100", reason)
    assert message.startswith("data.jsonl, line 100, field")
    with pytest.raises(DataError, match=r"line 99, field.*first of 2 invalid rows of 100.*max_invalid_share=0\.01"):
        read(*[good] * 98, row, row, on_invalid="skip")
    with pytest.raises(DataError, match=r"line 1, field.*; dataset\.on_invalid=skip leaves such rows out"):
        read(row, good)


def test_reading_gives_up_early_on_a_file_that_is_something_else():
    rows = ((f"line {number}", {**TRL, "chosen": 1}) for number in itertools.count(1))
    with pytest.raises(DataError, match=f"first of {HOPELESS} invalid rows of {HOPELESS}"):
        result(rows, on_invalid="skip", max_invalid_share=0.5)


def test_no_usable_row_is_an_error_whatever_share_is_allowed():
    with pytest.raises(DataError, match=r"line 1, field 'chosen'.*no row of 2 can be used"):
        read({**TRL, "chosen": 1}, {**TRL, "chosen": 2}, on_invalid="skip", max_invalid_share=1.0)


def test_rows_that_a_container_could_not_read_are_invalid_rows():
    broken = DataError("data.jsonl, line 2: is not JSON")
    with pytest.raises(DataError, match="line 2: is not JSON; dataset"):
        read(TRL, broken)
    found = read(TRL, broken, TRL, on_invalid="skip", max_invalid_share=0.5)
    assert (len(found.records), found.counts) == (2, {"rows_read": 3, "invalid_broken": 1})


def preferring(*preferences: object) -> dict[str, object]:
    return {"query": "q", "responses": ["a", "b"], "preferences": list(preferences)}


BAD_ROWS = {
    "not an object": ([1, 2], "must be an object"),
    "unknown columns": ({"instruction": "x", "result": "y"}, "fit no known format"),
    "demonstrations": ({"instruction": "x", "output": "y"}, "field 'output': is one text, so there is no preference"),
    "wrong type": ({**TRL, "chosen": 3}, "field 'chosen': must be text or a list of messages, found int"),
    "conversational": ({**TRL, "chosen": [{"role": "assistant"}]}, r"field 'chosen\[0\]\.content': missing"),
    "empty query": ({**TRL, "prompt": " \n"}, "field 'prompt': the query is empty"),
    "empty response": ({**TRL, "chosen": "\n"}, "field 'chosen': the response is empty"),
    "no dialogue": ({"chosen": "x", "rejected": "y"}, "field 'rejected': has no beginning in common"),
    "half a surrogate": ({**TRL, "chosen": "a\ud800"}, "field 'chosen': character 1 is half of a surrogate"),
    "responses no list": ({**SCORED, "responses": "ab"}, "field 'responses': must be of type list, found str"),
    "response no text": ({**SCORED, "responses": ["a", "b", 1]}, r"field 'responses\[2\]': must be of type str"),
    "response missing": ({**SCORED, "responses": ["a", None, "c"]}, r"field 'responses\[1\]': missing"),
    "response empty": ({**SCORED, "responses": ["a", " ", "c"]}, r"field 'responses\[1\]': the response is empty"),
    "one response": ({**SCORED, "responses": ["a"], "scores": [1]}, "field 'responses': needs at least 2, found 1"),
    "too few scores": ({**SCORED, "scores": [1, 2]}, "field 'scores': 2 scores for 3 responses"),
    "score NaN": ({**SCORED, "scores": [1, float("nan"), 2]}, r"field 'scores\[1\]': must be a finite number"),
    "score infinite": ({**SCORED, "scores": [1, 2, float("inf")]}, r"field 'scores\[2\]': must be a finite number"),
    "score too large": ({**SCORED, "scores": [1, 2, 10**400]}, r"field 'scores\[2\]': must be a finite number"),
    "score text": ({**SCORED, "scores": ["1", 2, 3]}, r"field 'scores\[0\]': must be a finite number"),
    "score boolean": ({**SCORED, "scores": [True, 2, 3]}, r"field 'scores\[0\]': must be a finite number"),
    "preferences no list": ({**SCORED, "preferences": {}}, "field 'preferences': must be of type list"),
    "index too large": (preferring([0, 2]), r"field 'preferences\[0\].rejected': must be an index from 0 to 1"),
    "index negative": (preferring([-1, 0]), r"field 'preferences\[0\].chosen': must be an index"),
    "index boolean": (preferring([True, 0]), r"field 'preferences\[0\].chosen': must be an index"),
    "index text": (preferring([0, 1], {"chosen": "a", "rejected": 0}), r"field 'preferences\[1\].chosen'"),
    "three indices": (preferring([0, 1, 0]), r"field 'preferences\[0\]': must be \[chosen, rejected\]"),
    "misspelt key": (preferring({"chosen": 0, "rejected": 1, "stength": 2}), r"field 'preferences\[0\]': must be"),
    "over itself": (preferring([1, 1]), r"field 'preferences\[0\]': prefers a response over itself"),
    "tie no boolean": (preferring({"chosen": 0, "rejected": 1, "tie": 1}), r"field 'preferences\[0\].tie'"),
    "strength NaN": (preferring({"chosen": 0, "rejected": 1, "strength": float("nan")}), r"\.strength': must be a fin"),
    "strength negative": (preferring({"chosen": 0, "rejected": 1, "strength": -1}), r"\.strength': is negative"),
    "id a list": ({**SCORED, "id": ["x"]}, "field 'id': must be text"),
    "id blank": ({**SCORED, "id": " "}, "field 'id': must be text"),
    "unknown split": ({**SCORED, "split": "dev"}, "field 'split': must be one of demonstrations, train"),
    "info no object": ({**OPENAI, "info": "x"}, "field 'info': must be of type dict"),
    "no post": ({**OPENAI, "info": {"title": "x"}}, "field 'info.post': missing"),
    "three summaries": ({**OPENAI, "summaries": [{"text": "x"}] * 3}, "field 'summaries': must be two objects"),
    "summary without text": ({**OPENAI, "summaries": [{"text": "x"}, {}]}, r"field 'summaries\[1\].text': missing"),
    "choice 2": ({**OPENAI, "choice": 2}, "field 'choice': must be 0 or 1"),
    "choice boolean": ({**OPENAI, "choice": True}, "field 'choice': must be of type int, found bool"),
    "confidence 10": ({**OPENAI, "extra": {"confidence": 10}}, "field 'extra.confidence': must be from 1 to 9"),
    "contradiction": ({**OPENAI, "extra": {"confidence": 8}}, "field 'extra.confidence': 8 contradicts choice 0"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_an_error_that_names_place_and_field(row, message):
    with pytest.raises(DataError, match=rf"^data\.jsonl, line 1\b.*{message}"):
        read(row)


def test_a_later_row_that_lacks_a_column_is_named():
    needs = "a row of format 'trl' needs chosen, rejected, prompt or question"
    with pytest.raises(DataError, match=f"line 3, field 'rejected': missing; {needs}"):
        read(TRL, TRL, {"prompt": "p", "chosen": "c"})
    with pytest.raises(DataError, match=r"line 2, field 'rejected': missing.* \(did you mean its 'Rejected '\?\)"):
        read(TRL, {"prompt": "p", "chosen": "c", "Rejected ": "r"})


def test_columns_that_nothing_is_read_from_are_known():
    reading = Reading()
    row = {**TRL, "margin": 2, "source": "web", "score_chosen": 2, "score_rejected": 1, "empty": None}
    assert len(list(read_records([("a, line 1", row), ("a, line 2", TRL | {"note": "n"})], reading))) == 2
    assert reading.ignored() == ["margin", "note", "source"]
    reading = Reading()
    list(read_records([("a, line 1", TRL | {"history": "p"}), ("a, line 2", TRL | {"history": None})], reading))
    assert reading.ignored() == ["history"]
    predictions = {"prediction 1": "a", "prediction 2": "b"}
    answers = {"question": "q", "passages": [], "preference": [1], "gold": "a", **predictions}
    reading = Reading()
    list(read_records([("a, line 1", answers)], reading))
    assert reading.ignored() == ["gold"]


def files(*rows: tuple[str, dict[str, object]]) -> list[tuple[str, dict[str, object]]]:
    return [(f"{name}.jsonl, line {number}", row) for number, (name, row) in enumerate(rows, 1)]


@pytest.mark.parametrize(("first", "second"), [("trl_implicit", "trl"), ("trl_implicit", "hh"), ("hh", "openai")])
def test_files_of_different_formats_are_refused_with_both_named(first, second):
    rows = {
        "trl_implicit": {"chosen": "The sky is blue.", "rejected": "The sky is red."},
        "trl": {"prompt": "Sky?", "chosen": "The sky is blue.", "rejected": "The sky is red."},
        "hh": HH,
        "openai": OPENAI,
    }
    mixed = files(("a", rows[first]), ("a", rows[first]), ("b", rows[second]))
    expected = rf"^b\.jsonl, line 3: looks like format '{second}', and a\.jsonl is '{first}'; read them in separate"
    for on_invalid in ("error", "skip"):
        with pytest.raises(DataError, match=expected) as caught:
            list(read_records(mixed, Reading(on_invalid=on_invalid)))
        assert "on_invalid" not in str(caught.value)
    alike = files(("a", rows[first]), ("b", rows[first]), ("c", rows[first]))
    assert len(list(read_records(alike, Reading()))) == 3


def test_a_second_file_that_begins_with_a_broken_row_is_read_as_the_first():
    rows = files(("a", TRL), ("b", {"prompt": None}), ("b", TRL))
    with pytest.raises(DataError, match=r"b\.jsonl, line 2, field 'chosen': missing"):
        list(read_records(rows, Reading()))
    assert len(list(read_records(rows, Reading(on_invalid="skip", max_invalid_share=0.5)))) == 2


def test_skipping_is_advised_only_where_rows_are_left():
    bad = {**TRL, "rejected": 3}
    advice = r"dataset\.on_invalid=skip leaves such rows out"
    for some in ([TRL, bad], [bad, TRL], [bad] * 50 + [TRL]):
        with pytest.raises(DataError, match=advice):
            read(*some)
    for none in ([bad], [bad] * 300):
        with pytest.raises(DataError, match=r"line 1, field 'rejected'") as caught:
            read(*none)
        assert "on_invalid" not in str(caught.value)


def test_the_format_can_be_forced_and_must_be_known():
    assert only({**TRL, **HH}, format="hh").query == ASK
    with pytest.raises(DataError, match="field 'scores': missing"):
        only(preferring(), format="rrhf")
    with pytest.raises(DataError, match=r"dataset\.format=csv is not known"):
        only(TRL, format="csv")


def test_cells_of_a_text_table_are_parsed_where_the_format_wants_no_text():
    cells = TextRow(query="q", responses='["a", "b"]', scores="[1, 2.5]", id="", split="")
    assert only(cells) == Record("", "q", ("a", "b"), (), (1.0, 2.5))
    assert only(TextRow(prompt="p", chosen="[1, 2]", rejected="b")).responses == ("[1, 2]", "b")
    for text, wanted in {"True": True, "false": False, "1": True}.items():
        assert only(TextRow(prompt="p", completion="c", label=text)).desirable == (wanted,)
    with pytest.raises(DataError, match="line 1, field 'responses': the cell is not JSON"):
        only(TextRow(query="q", responses="a, b", scores="[1, 2]"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_files_plain_and_compressed(tmp_path, name):
    path = tmp_path / name
    text = json.dumps(TRL) + "\n\n" + json.dumps({**TRL, "chosen": " Café\u2028 ."}, ensure_ascii=False)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    reading = read_file(path)
    assert [record.responses[0] for record in reading.records] == [" It keeps.", " Café\u2028 ."]
    assert reading.counts == {"rows_read": 2}


def test_real_hh_helpful_base():
    reading = read_file(need("hh_helpful-base_test.jsonl.gz"), on_invalid="skip")
    assert reading.counts == {
        "rows_read": 2354,
        "invalid_identical_responses": 2,
        "invalid_blank_responses": 4,
        "invalid_different_queries": 2,
    }
    assert len(reading.records) == 2354 - 8 == 2354 - len(reading.listed)
    assert all(record.query.startswith("\n\nHuman:") for record in reading.records)
    words = [len(response.split()) for record in reading.records for response in record.responses]
    assert sum(words) / len(words) == pytest.approx(39, abs=1)  # as the data's own description says


def test_real_hh_harmless_base():
    reading = read_file(need("hh_harmless-base_test.jsonl.gz"), on_invalid="skip")
    assert reading.counts == {"rows_read": 2312, "invalid_blank_responses": 4, "invalid_different_queries": 4}
    assert len(reading.records) == 2312 - 8


def test_real_tldr_comparisons():
    reading = read_file(need("tldr_openai_comparisons_b13_b18_edit.jsonl.gz"))
    assert reading.counts == {"rows_read": 1776}
    records = reading.records
    assert len(records) == 1776
    assert Counter(record.preferences[0].strength for record in records) == {4: 539, 3: 357, 2: 482, 1: 398}
    assert not any(record.preferences[0].tie or "r/r/" in record.query for record in records)
    longer = [len(r.responses[r.preferences[0].chosen]) > len(r.responses[r.preferences[0].rejected]) for r in records]
    assert sum(longer) / len(longer) == pytest.approx(0.64, abs=0.02)  # the known bias: a swapped label would show
