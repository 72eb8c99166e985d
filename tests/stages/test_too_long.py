"""Records that are too long: which are trained on, and what a policy is asked and shown to have been asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rdo.evaluation import EVALUATION
from rdo.runtime.files import read_json, read_json_lines
from rdo.stages.align import aligned_policy
from rdo.stages.evaluate import GENERATIONS, evaluate_policy, evaluate_scorers
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


def file_run(folder: Path, *overrides: str, rows: list[dict[str, str]] = ROWS) -> Run:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tiny_run(
        folder / "runs", "dataset=file", f"dataset.path={file}", "dataset.max_length=60", "dataset.validation_share=0",
        "dataset.max_truncated_share=1", "dataset.min_prompt_tokens=8", "model=small", "model.vocabulary_size=258",
        "model.hidden_size=16", "model.heads=2", "model.layers=1", "model.key_value_heads=null", "align.batch_size=8",
        "sft.max_steps=1", "rm.max_steps=1",
        "diffmodel.max_steps=1", "align.max_steps=9", "eval.judges=[]", "eval.max_new_tokens=20",
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
    assert f"tokens were cut); {without} records are not trained on: too long, or of responses with the same" in said
    assert f"[sft] {len(records) - without} records" in said
    # Each is another result.
    other = file_run(tmp_path, f"dataset.too_long={'drop' if too_long == 'cut' else 'cut'}")
    assert base_policy(other).key != base_policy(run).key
    assert scorer(other, "reward").key != scorer(run, "reward").key


def test_pairs_that_are_equal_once_they_are_cut_are_in_no_training_and_no_accuracy(tmp_path, capsys):
    alike = [{"prompt": f"Which {n}?", "chosen": " a" * 30 + f" {n}", "rejected": " a" * 30 + " no"} for n in range(20)]
    different = [{"prompt": f"What {n}?", "chosen": f" a {n}", "rejected": " b"} for n in range(20)]
    run = file_run(tmp_path, "dataset.max_length=40", "dataset.min_prompt_tokens=1", rows=[*alike, *different])
    counts = {split: sum(r.query.startswith("Which") for r in run.records(split)) for split in ("train", "test")}
    assert min(counts.values()) > 3
    for subject in ("reward", "diff"):
        found = read_json(evaluate_scorers(run, subject).folder / EVALUATION)
        assert (found["pairs"], found["pairs_alike"]) == (len(run.records("test")) - counts["test"], counts["test"])
    said, trained = capsys.readouterr().out, len(run.records("train")) - counts["train"]
    assert f"{counts['train']} records are not trained on" in said
    assert f"[rm] {trained} records" in said
    assert f"[diffmodel] {trained} records" in said


def test_a_policy_is_shown_with_the_query_that_it_saw(tmp_path):
    run = file_run(tmp_path)
    lines = read_json_lines(evaluate_policy(run, "base").folder / GENERATIONS)
    whole = {record.id: record.query for record in run.records("test")}
    for line in lines:  # a token a byte, of which there is room for 40
        assert line["query"] == whole[line["id"]][-40:]
    assert max(map(len, whole.values())) > 50
