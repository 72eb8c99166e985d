"""Stage inspect: counts by hand, and what it prints of a file as a user would bring it."""

import json
import re

import numpy as np
import pytest

from rdo.data.inspection import cut_at, histogram, label_statistics, near_identical, summary
from rdo.data.records import Preference, Record
from rdo.data.table import Records
from rdo.stages.inspect import evenly, inspect_data
from tiny import tiny_run


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        ("Rye, it keeps.", "rye it   keeps", True),
        ("word " * 40 + "end", "word " * 40 + "stop", True),
        ("word " * 10 + "end", "word " * 10 + "stop", False),
        ("one two three", "three two one", False),
        ("", "?!", True),
        ("yes", "no", False),
    ],
)
def test_near_identical(one, other, wanted):
    assert near_identical(one, other) is wanted
    assert near_identical(other, one) is wanted


def test_label_statistics_by_hand():
    first = Preference(0, 1, strength=2.0)
    pair = Record("a", "q", ("long answer", "no"), (first,), scores=(1.0, 2.0), place="f, line 1")
    records = [
        pair,
        Record("b", "q ", ("no", "long answer"), (first,), place="f, line 2"),  # the reverse
        Record("c", "r", ("x y", "X, y!", "z"), (Preference(0, 1), Preference(0, 2, tie=True)), scores=(3.0, 1.0, 1.0)),
        Record("d", "s", ("good",), desirable=(True,)),
        Record("e", "t", ("bad",), desirable=(False,)),
    ]
    found = label_statistics(records)
    wanted = {"records": 5, "preferences": 4, "ties": 1, "scored": 2, "desirable": 1, "undesirable": 1}
    wanted |= {"near_identical": 1, "repeated_texts": 1, "contradictions": 1, "conversations": 0}
    assert {name: found[name] for name in wanted} == wanted
    assert found["chosen_longer"] == pytest.approx((1 + 0 + 0) / 3)  # "x y" is shorter than "X, y!"
    assert found["scores_agree"] == pytest.approx(1 / 2)
    assert found["responses"] == {1: 2, 2: 2, 3: 1}
    assert found["strengths"] == {2.0: 2}
    assert found["scores_contradict"] == 1
    assert found["examples"] == {
        "repeated_texts": "f, line 2",
        "contradictions": "f, line 2",
        "near_identical": "c",
        "scores_contradict": "f, line 1",
    }
    assert label_statistics([pair, pair])["contradictions"] == 0
    assert label_statistics([])["chosen_longer"] is None


def test_lengths():
    assert summary([1, 2, 3, 10])["50%"] == 2.5
    assert (summary([7])["min"], summary([7])["max"], summary([7])["99%"]) == (7, 7, 7.0)
    assert cut_at(np.array([4, 5, 6, 7]), 5) == 0.5


def test_a_histogram_counts_everything_once_and_points_at_the_mark():
    values = np.array([0, 1, 5, 9, 10, 11, 300])
    lines = histogram(values, bins=4, width=10, mark=10)
    counts = [int(re.search(r"(\d+)  [█▏▎▍▌▋▊▉]|(\d+) *$", line).group(0).split()[0]) for line in lines]
    assert sum(counts) == len(values)
    (marked,) = [line for line in lines if "max_length" in line]
    low, high = (int(number) for number in re.findall(r"\d+", marked)[:2])
    assert low <= 10 <= high


def test_examined_records_are_evenly_spaced():
    records = Records.in_memory([Record(str(n), "q", ("a", "b")) for n in range(11)])
    assert evenly(records, 3).ids() == ["0", "5", "10"]
    assert evenly(records, 50).ids() == records.ids()
    assert len(evenly(records.only(slice(0)), 3)) == 0


def rows(count: int) -> list[dict[str, object]]:
    keeps = " Rye keeps\n for a week."
    return [{"prompt": f"Which bread {n}?", "chosen": keeps * (1 + n % 5), "rejected": " No."} for n in range(count)]


def test_what_is_printed_and_written_of_a_file(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    hostile = {"prompt": "\x1b[2JWhich\u202e?", "chosen": " a</end>", "rejected": " b\x07"}
    file.write_text("".join(json.dumps(row) + "\n" for row in [hostile, *rows(60), {"prompt": "x"}]))
    run = tiny_run(
        tmp_path / "runs", "stage=inspect", "dataset=file", f"dataset.path={file}", "dataset.on_invalid=skip",
        "dataset.max_invalid_share=0.1", "dataset.max_length=12", "dataset.test_share=0", "dataset.validation_share=0",
    )  # fmt: skip
    folder = inspect_data(run)
    printed = capsys.readouterr().out
    for wanted in (
        "format trl",
        "62 rows read; 1 invalid_broken left out",
        "invalid.jsonl",
        "61 records of 61 queries",
    ):
        assert wanted in printed
    for wanted in (
        "tokenizer byte-pair",
        "← max_length",
        "rows.jsonl, line 1",
        "<end>",
        "↵",
        "␣",
        "\\x1b[2J",
        "\\u202e",
    ):
        assert wanted in printed
    assert "\x1b" not in printed
    assert "\u202e" not in printed
    assert (folder / "inspect.txt").read_text().strip() in printed
    found = json.loads((folder / "inspect.json").read_text())
    assert found["splits"]["train"]["labels"]["preferences"] == 61
    assert found["splits"]["train"]["cut"] > 0
    assert (folder / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_the_toy_world_and_a_few_records_of_many(tmp_path, capsys):
    inspect_data(tiny_run(tmp_path, "stage=inspect", "inspect.records=20"))
    printed = capsys.readouterr().out
    assert "tokenizer the toy world's" in printed
    assert "64 records of" in printed
    assert "(of which 20 examined, evenly spaced)" in printed
    assert "Split demonstrations: 256 records" in printed


def test_unread_columns_and_contradicting_scores_are_shown(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    more = {"margin": 1, "so\x1b[2Jurce": "web", "score_chosen": 1, "score_rejected": 2}
    file.write_text("".join(json.dumps(row | more) + "\n" for row in rows(12)))
    shares = ("dataset.test_share=0", "dataset.validation_share=0")
    run = tiny_run(tmp_path / "runs", "stage=inspect", "dataset=file", f"dataset.path={file}", *shares)
    folder = inspect_data(run)
    printed = capsys.readouterr().out
    assert "ignored columns: margin, so\\x1b[2Jurce\n" in printed
    assert "chosen has the lower score in 12 preferences" in printed
    assert "first of scores contradict" in printed
    assert json.loads((folder / "inspect.json").read_text())["ignored_columns"] == ["margin", "so\x1b[2Jurce"]


def test_unpaired_and_conversational_data(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which bread?"}]
    lines = [
        {"prompt": messages, "completion": [{"role": "assistant", "content": f"Rye {n}."}], "label": n % 3 == 0}
        for n in range(12)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in lines))
    overrides = [
        "stage=inspect",
        "dataset=file",
        f"dataset.path={file}",
        "dataset.test_share=0",
        "dataset.validation_share=0",
    ]
    inspect_data(tiny_run(tmp_path / "runs", *overrides))
    printed = capsys.readouterr().out
    assert "format trl_unpaired" in printed
    assert "unpaired: 4 desirable, 8 undesirable responses" in printed
    assert "Advice: the queries are conversations: dataset.template=chat" in printed
