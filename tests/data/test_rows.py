"""Rows of every format: told apart, read as they always were, or refused by name; real sets too."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rdo.data.columns import RowError
from rdo.data.loading import load_splits
from rdo.data.readers import FORMATS, columns_read, find_format, needed, read_row, structured
from rdo.data.records import Record
from rdo.data.templates import text_of
from rdo.runtime.errors import DataError
from rdo.runtime.store import Provenance
from rdo.settings import DatasetConfig

HERE = Path(__file__).parent
REAL = HERE.parents[2] / "shared" / "data"
# One line a case: format, row, records (what is None, or (), is left out), and "found" where `auto` says otherwise.
ROWS = [json.loads(line) for line in (HERE / "formats.jsonl").open()]
GOOD = [case for case in ROWS if "found" not in case]
# One line a case: format, row, and field, words and reason ("broken" is left out) of the message.
BAD = [json.loads(line) for line in (HERE / "bad_rows.jsonl").open()]
SETS = json.loads((HERE / "real_sets.json").read_text())
ASK, REPLY = {"role": "user", "content": "Which bread?"}, {"role": "assistant", "content": "Rye."}
KEEPS = {"role": "assistant", "content": "It keeps."}
DIALOGUE = "\n\nHuman: Which bread?\n\nAssistant:"


def numbered(cases: list[dict[str, Any]]) -> list[Any]:
    return [pytest.param(case, id=f"{number}-{case['format']}") for number, case in enumerate(cases)]


def as_json(record: Record) -> dict[str, Any]:
    """What `ROWS` hold of a record."""
    preferences = [[p.chosen, p.rejected, p.tie, p.strength] for p in record.preferences]
    messages = [[message.role, message.content] for message in record.messages]
    entry = {"id": record.id, "query": record.query, "responses": list(record.responses)}
    values = {"scores": record.scores, "desirable": record.desirable, "split": record.split}
    others = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    others |= {"preferences": preferences or None, "messages": messages or None}
    return entry | {name: value for name, value in others.items() if value is not None}


def told(row: dict[str, Any]) -> str | None:
    try:
        return find_format(row)
    except RowError:
        return None


@pytest.mark.parametrize("case", numbered(ROWS))
def test_rows_are_told_and_read_as_they_were(case):
    assert [as_json(record) for record in read_row(case["row"], case["format"])] == case["records"]
    assert told(case["row"]) == case.get("found", case["format"])
    if "found" not in case:  # whatever the order of columns, and however many more
        more = [*case["row"].items(), ("worker", "w"), ("tags", ["x"]), ("summary", None), ("url", "")]
        random.Random(0).shuffle(more)
        assert find_format(dict(more)) == case["format"]


@pytest.mark.parametrize("case", numbered(BAD))
def test_a_row_that_cannot_be_used_names_the_field_and_says_why(case):
    with pytest.raises(RowError) as caught:
        read_row(case["row"], case["format"])
    message = str(caught.value)
    assert message.startswith(f", field '{case['field']}': " if case["field"] else ": ")
    assert case["words"] in caught.value.args[0]
    assert caught.value.reason == case.get("reason", "broken")
    assert len(message) < 400


def test_every_format_has_good_and_bad_rows():
    assert {case["format"] for case in GOOD} == {case["format"] for case in BAD} == set(FORMATS)


@pytest.mark.parametrize("name", SETS)
def test_real_sets_have_the_ids_order_and_splits_that_they_had(name: str, tmp_path: Path) -> None:
    if not (REAL / name).exists():
        pytest.skip(f"the real data file {name} is not at hand (looked in ../shared/data)")
    dataset = DatasetConfig(name="real", source="file", path=str(REAL / name), on_invalid="skip")
    found = load_splits(dataset, Provenance(tmp_path, "", {}))
    splits = {
        split: [
            len(records),
            records.fingerprint(),
            hashlib.blake2b("\n".join(records.ids()).encode(), digest_size=8).hexdigest(),
        ]
        for split, records in found.splits.items()
        if len(records)
    }
    counts = {reason: count for reason, count in found.counts.items() if count}
    assert {"format": found.format, "counts": counts, "ignored": found.ignored, "splits": splits} == SETS[name]


PAIR = {"chosen": "The bread is rye.", "rejected": "The bread is white."}
WHOLE = {"chosen": [ASK, REPLY], "rejected": [ASK, KEEPS]}
TOLD = [
    (PAIR, "trl_implicit"),
    ({"chosen": f"{DIALOGUE} a", "rejected": "a c"}, "hh"),
    ({"chosen": "a b", "rejected": f"{DIALOGUE} a"}, "hh"),
    ({"chosen": [ASK, REPLY], "rejected": "x"}, "trl_implicit"),
    ({"prompt": None, **WHOLE}, "trl_implicit"),
    ({"question": "Why?", **WHOLE}, "trl_implicit"),
    ({"question": "Why?", "chosen": [REPLY], "rejected": [KEEPS]}, "trl"),
    ({"question": "Why?", "chosen": f"{DIALOGUE} a", "rejected": f"{DIALOGUE} b"}, "hh"),
    ({"prompt": "x", "chosen": "a", "rejected": "b", "Question": "q", "LABEL": 1}, "trl"),
]


@pytest.mark.parametrize(("row", "name"), TOLD)
def test_where_columns_are_shared_the_values_decide(row, name):
    assert find_format(row) == name


UNTOLD = [
    ({"instruction": "x", "out\x1b[31m": "y"}, r"^: columns \['instruction', 'out\\x1b.* no known format"),
    ({f"column_{n}": n for n in range(40)}, r"fit no known format \(the nearest is"),
    ({"prompt": "p", **PAIR, "completion": "c", "label": True}, r"fit trl and trl_unpaired; set dataset\.format"),
    ({"prompt": json.dumps([ASK]), **PAIR}, r"^, field 'prompt': is messages written out as text.*format=trl"),
    ({"prompt": "p", **PAIR, "chosen": str([ASK])}, "^, field 'chosen': is messages written out as text"),
    ({"conversations": "[ {'from': 'human'}]", **PAIR}, "^, field 'conversations': is messages written out"),
]


@pytest.mark.parametrize(("row", "message"), UNTOLD)
def test_rows_of_no_format_or_of_several_are_refused(row, message):
    with pytest.raises(RowError, match=message) as error:
        find_format(row)
    assert len(str(error.value)) < 300


def test_trees_may_be_as_deep_as_any_that_was_published_and_deeper_ones_are_refused():
    def tree(depth: int) -> dict[str, Any]:
        node = {"text": "q", "role": "prompter", "replies": [{"text": t, "role": "assistant", "rank": 0} for t in "ab"]}
        for _ in range(depth):
            node = {"text": "q", "role": "prompter", "replies": [{"text": "r", "role": "assistant", "replies": [node]}]}
        return {"message_tree_id": "t", "prompt": node}

    (record,) = read_row(tree(60), "oasst")
    assert len(record.messages) == 121
    with pytest.raises(RowError, match="is nested too deep"):
        read_row(tree(3000), "oasst")


def test_columns_are_known_that_are_read_and_those_that_hold_no_text():
    for case in GOOD:
        row, layouts = case["row"], FORMATS[case["format"]]
        read = columns_read(row, case["format"])
        assert any(all(not read.isdisjoint(names) for names in needed(layout)) for layout in layouts)
        for column in (structured(row, case["format"]) - {"history"}) & row.keys():
            assert not isinstance(row[column], str) or case["format"] == "arena_votes", case
    qa = {"question": 1, "passages": 1, "prediction 1": 1, "prediction 12": 1, "preference": 1, "gold": 1}
    assert columns_read(qa, "qa_feedback") == qa.keys() - {"gold"}
    assert structured({}, "trl") == {"score_chosen", "score_rejected", "history"}
    assert structured({}, "records") == {"preferences", "scores", "desirable", "responses"}


# Anything at all


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.floats(),
    st.sampled_from(["", " ", "a", "The sky", "a\ud800", "N/A", "4", "tie", "model_a", "user", "assistant", DIALOGUE]),
    st.text(max_size=5),
)
KEYS = ["role", "content", "from", "value", "text", "type", "rank", "replies", "answer", "response"]
anything = st.recursive(
    scalars | st.sampled_from([ASK, KEEPS, GOOD[0]["row"]]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*KEYS, "x"]), inner, max_size=4),
    max_leaves=8,
)


def paths(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """The path to everything inside a row."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(*path, key) for key, _ in inside] + [found for key, v in inside for found in paths(v, (*path, key))]


def with_value(row: Any, path: tuple[Any, ...], value: object) -> Any:
    if not path:
        return value
    copy = dict(row) if isinstance(row, dict) else list(row)
    copy[path[0]] = with_value(row[path[0]], path[1:], value)
    return copy


def check(record: Record) -> None:
    """What holds of every record that was read."""
    count = len(record.responses)
    assert record.query.strip()
    assert all(isinstance(text, str) and text.strip() for text in record.responses)
    for preference in record.preferences:
        assert preference.chosen != preference.rejected
        assert {preference.chosen, preference.rejected} <= set(range(count))
        assert preference.strength is None or 0 <= preference.strength < float("inf")
    assert record.scores is None or len(record.scores) == count
    assert record.desirable is None or len(record.desirable) == count
    assert count > 1 or record.desirable or record.split == "demonstrations"
    if record.messages:
        assert record.messages[-1].role == "user"
        assert record.query == text_of(record.messages)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_any_value_anywhere_gives_records_or_an_error(name, data):
    row = data.draw(st.sampled_from([case["row"] for case in GOOD if case["format"] == name]))
    changed = data.draw(st.sampled_from([row.keys(), *([path] for path in paths(row))]))
    for path in changed:
        row = with_value(row, path if isinstance(path, tuple) else (path,), data.draw(anything))
    problems = []
    try:
        for record in read_row(row, name):
            check(record)
    except DataError as error:
        problems.append(error.args[0])
    try:
        assert find_format(row) in FORMATS
    except DataError as error:
        problems.append(error.args[0])
    assert all(problem.startswith((", field '", ": ")) and problem.isprintable() for problem in problems)
