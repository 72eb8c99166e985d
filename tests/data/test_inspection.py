"""Stage inspect: what it prints of files as a user would bring them."""

from __future__ import annotations

import json

import pytest

from rdo.data.records import Preference, Record
from rdo.stages.inspect import evenly, inspect_data, label_lines
from tiny import tiny_run

PAIRS = [
    {"prompt": f"Which bread {n}?", "chosen": " Rye keeps\n for a week." * (1 + n % 5), "rejected": " No."}
    for n in range(60)
]
HOSTILE = {"prompt": "\x1b[2JWhich\u202e?", "chosen": " a</end>", "rejected": " b\x07"}
MORE = {"margin": 1, "so\x1b[2Jurce": "web", "score_chosen": 1, "score_rejected": 2}
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which bread?"}]
CASES = {
    "invalid and hostile rows": (
        [HOSTILE, *PAIRS, {"prompt": "x"}],
        [
            "format trl\n",
            "62 rows read; 1 invalid_broken left out",
            "rows.jsonl, line 62, field 'chosen': missing",
            "61 records of 61 queries",
        ],
        ["preferences: 61, of which 0 ties", "in 61 of 61 (100.0%)", "tokenizer byte-pair", "train, both"],
        ["dataset.max_length=12 cuts ", "rows.jsonl, line 1\n", "<end>", "↵", "␣", "\\x1b[2J", "\\u202e"],
    ),
    "unread columns and contradicting scores": (
        [row | MORE for row in PAIRS[:12]],
        [
            "ignored columns: margin, so\\x1b[2Jurce\n",
            "chosen has the lower score in 12 of 12",
            "labels: response 0 over 1; scores (1.0, 2.0)",
        ],
    ),
    "unpaired conversations": (
        [
            {"prompt": CHAT, "completion": [{"role": "assistant", "content": f"Rye {n}."}], "label": n % 3 == 0}
            for n in range(12)
        ],
        ["format trl_unpaired", "4 desirable, 8 undesirable responses", "conversations: 12; dataset.template=chat"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_printed_of_a_file(tmp_path, capsys, case):
    rows, *wanted = CASES[case]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tiny_run(
        tmp_path / "runs", "stage=inspect", "dataset=file", f"dataset.path={file}", "dataset.max_length=12",
        "dataset.test_share=0", "dataset.validation_share=0",
    )  # fmt: skip
    inspect_data(run)
    printed = capsys.readouterr().out
    assert [text for texts in wanted for text in texts if text not in printed] == []
    assert "\x1b" not in printed
    assert "\u202e" not in printed
    assert printed.count("\nExample ") == 3
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["data"]


def test_the_toy_world_and_a_few_records_of_many(tmp_path, capsys):
    inspect_data(tiny_run(tmp_path, "stage=inspect", "inspect.records=20"))
    printed = capsys.readouterr().out
    assert "tokenizer the toy world's" in printed
    assert "64 records of" in printed
    assert "(of which 20 examined, evenly spaced)" in printed
    assert "Split demonstrations: 256 records" in printed


def test_labels_by_hand():
    first = Preference(0, 1, strength=2.0)
    records = [
        Record("a", "q", ("long answer", "no"), (first,), scores=(1.0, 2.0)),
        Record("b", "q", ("no", "long answer"), (first,)),
        Record("c", "r", ("x y", "X y", "z"), (Preference(0, 1), Preference(0, 2, tie=True)), scores=(3.0, 1.0, 1.0)),
        Record("d", "s", ("good",), desirable=(True,)),
    ]
    assert list(label_lines(records)) == [
        "  responses a record: 1 with 1, 2 with 2, 1 with 3",
        "  preferences: 4, of which 1 ties",
        "  where lengths differ, the longer response is the chosen one in 1 of 2 (50.0%)",
        "  strengths: 2 of 2",
        "  chosen has the lower score in 1 of 2 (50.0%)",
        "  unpaired: 1 desirable, 0 undesirable responses",
    ]


@pytest.mark.parametrize(("count", "wanted"), [(3, [0, 5, 10]), (1, [0]), (50, [*range(11)])])
def test_examined_records_are_evenly_spaced(count, wanted):
    records = [Record(str(n), "q", ("a", "b")) for n in range(11)]
    assert evenly(records, count) == [records[n] for n in wanted]
