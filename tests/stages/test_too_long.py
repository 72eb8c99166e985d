"""Records that are too long: which are trained on, and what a policy is asked and shown to have been asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rdo.runtime.files import read_json_lines
from rdo.stages.align import aligned_policy
from rdo.stages.evaluate import GENERATIONS, evaluate_policy
from rdo.stages.run import Run
from rdo.stages.scorer import scorer
from rdo.stages.sft import base_policy
from tiny import tiny_run

# Of every four queries one is cut, and one has a response that is too long.
ROWS = [
    {
        "prompt": f"{'Tell me. ' * 8 if n % 4 == 1 else ''}Which bread {n}?",
        "chosen": " Rye." * (30 if n % 4 == 2 else 1),
        "rejected": " No.",
    }
    for n in range(40)
]


def file_run(folder: Path, *overrides: str) -> Run:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tiny_run(
        folder / "runs", "dataset=file", f"dataset.path={file}", "dataset.max_length=60", "dataset.validation_share=0",
        "dataset.max_truncated_share=1", "dataset.min_prompt_tokens=8", "model=small", "model.vocabulary_size=258",
        "model.hidden_size=16", "model.heads=2", "model.layers=1", "model.key_value_heads=null", "align.batch_size=8",
        "sft.max_steps=1", "rm.max_steps=1", "align.max_steps=9", "eval.judges=[]", "eval.max_new_tokens=20",
        "loss=kto", "align.max_records=null", "dataset.test_share=0.3",
        *overrides,
    )  # fmt: skip


@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_what_is_too_long_is_left_out_of_training_and_said(tmp_path, capsys, too_long):
    run = file_run(tmp_path, f"dataset.too_long={too_long}")
    records = run.records("train")
    queries = sum(len(record.query) > 50 for record in records)
    responses = sum(len(record.responses[0]) > 50 for record in records)
    assert min(queries, responses) > 2
    without = responses if too_long == "cut" else queries + responses
    assert aligned_policy(run).manifest()["results"]["records"] == len(records) - without
    said = capsys.readouterr().out
    assert (
        f"[data] train: {queries + responses} of {len(records)} records are longer than dataset.max_length=60" in said
    )
    assert f"tokens were cut); {without} of them are not trained on\n" in said
    assert f"[sft] {len(records) - without} records" in said
    # Each is another result.
    other = file_run(tmp_path, f"dataset.too_long={'drop' if too_long == 'cut' else 'cut'}")
    assert base_policy(other).key != base_policy(run).key
    assert scorer(other, "reward").key != scorer(run, "reward").key


def test_a_policy_is_shown_with_the_query_that_it_saw(tmp_path):
    run = file_run(tmp_path)
    lines = read_json_lines(evaluate_policy(run, "base").folder / GENERATIONS)
    whole = {record.id: record.query for record in run.records("test")}
    for line in lines:  # a token a byte, of which there is room for 40
        assert line["query"] == whole[line["id"]][-40:]
    assert max(map(len, whole.values())) > 50
