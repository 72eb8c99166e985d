"""From unpaired data to a run: what each loss and stage takes of it, and what it says where it cannot."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rdo.data.records import Preference, Record, Records
from rdo.objectives.choice import LossChoice, choose_loss
from rdo.runtime.errors import UserError
from rdo.settings import Config, DifferenceConfig, RcConfig, ScorerConfig, SftConfig, TrainingConfig
from rdo.stages.align import aligned_policy, check_data
from rdo.stages.evaluate import evaluate_policy
from rdo.stages.scorer import check_labels
from rdo.stages.sft import base_policy, demonstrations, to_imitate
from rdo.stages.supervision import count_samples, supervision
from rdo.training.alignment import AlignmentTask, Pair, Sample
from tiny import metrics, tiny_run, weights

KTO = {"name": "kto", "beta": 0.1, "mean_over": "samples"}
DPO = {"name": "dpo", "beta": 0.1}
RRHF = {"name": "rrhf", "pairs": "ranking", "mean_over": "queries"}


def kto(**others: Any) -> LossChoice:
    return choose_loss({**KTO, **others})


def alone(identifier: str, *desirable: bool, **others: Any) -> Record:
    texts = tuple(f"response {n}" for n in range(len(desirable)))
    return Record(identifier, f"query {identifier}", texts, desirable=desirable, **others)


PAIR = Record("pair", "query", ("a", "b"), (Preference(1, 0),))
BARE = Record("bare", "q", ("a", "b"))
TIED = Record("tied", "q", ("a", "b"), (Preference(0, 1, tie=True),))
SEVERAL = alone("several", False, True, True)
UNPAIRED = [alone("good", True), alone("bad", False)]


@pytest.mark.parametrize(
    ("record", "pairs", "samples", "best"),
    [
        (SEVERAL, (), ((0, False), (1, True), (2, True)), 1),
        (alone("bad", False), (), ((0, False),), None),
        (PAIR, ((1, 0),), (), 1),
        # A response of a pair is not counted again, one of a tie is.
        (alone("both", True, False, True, preferences=(Preference(0, 1),)), ((0, 1),), ((2, True),), 0),
        (alone("tied", True, False, preferences=TIED.preferences), (), ((0, True), (1, False)), 0),
    ],
    ids=lambda value: value.id if isinstance(value, Record) else "",
)
def test_what_a_loss_learns_from(record: Record, pairs: Any, samples: Any, best: int | None) -> None:
    found = supervision(record, kto(), {})
    assert (found.pairs, found.samples, found.best) == (pairs, tuple(Sample(*sample) for sample in samples), best)
    for other in (choose_loss(DPO), choose_loss({**RRHF, "ranking": "labels", "sft_weight": 1.0})):
        found = supervision(record, other, {})
        assert (found.pairs, found.samples) == (pairs, ())
        assert pairs or found.best is None


@pytest.mark.parametrize(
    ("good", "bad", "settings", "advised"),
    [
        (1, 1, {}, None),
        (4, 3, {}, None),
        (3, 2, {}, "3 : 2"),
        (3, 4, {}, "3 : 4"),
        (3, 4, {"lambda_desirable": 1.5}, None),
        (3, 2, {"lambda_undesirable": 0.5}, "3 : 1"),
        (1, 0, {}, "1 : 0"),
        (0, 2, {}, "0 : 2"),
    ],
)
def test_labels_are_counted_and_their_balance_is_told(
    good: int, bad: int, settings: dict[str, float], advised: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    paired = min(good, bad, 1)  # a pair is one of each
    labels = [*[True] * (good - paired), *[False] * (bad - paired)]
    records = [*[PAIR] * paired, *(alone(f"r{n}", label) for n, label in enumerate(labels))]
    entries = [supervision(record, kto(), {}) for record in records]
    pairs = [tuple(Pair(i, j) for i, j in entry.pairs) for entry in entries]
    assert count_samples(choose_loss(DPO), pairs, entries) is None
    assert count_samples(kto(**settings), pairs, entries) == {"desirable": good, "undesirable": bad}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"[align] {good} desirable, {bad} undesirable samples")
    assert ("weighted" in line) == (advised is not None)
    assert advised is None or f"weighted {advised}, outside" in line


# What unpaired data cannot do, said before any work


def data_run(*records: Record, **sections: Any) -> Any:
    """What the checks read of a run."""
    config = Config(**sections)
    config.dataset.name = "labelled"
    held = Records.in_memory(records)
    return SimpleNamespace(config=config, records=lambda split: held)


SCORERS: dict[str, Any] = {"rm": ScorerConfig(path="finished"), "diffmodel": DifferenceConfig(path="finished")}
BY_REWARD = {"rc": RcConfig("reward")}
COEFFICIENT = r"rc={} .* difference of its two rewards, .* record good .* use rc=none"
MIXED = [PAIR, *UNPAIRED]
REFUSED = [
    (
        UNPAIRED,
        DPO,
        SCORERS,
        r"loss=dpo compares labelled pairs, and dataset=labelled is unpaired.*use loss=kto rc=none",
    ),
    (UNPAIRED, {**RRHF, "ranking": "labels"}, SCORERS, "loss=rrhf compares labelled pairs, and"),
    (UNPAIRED, {**RRHF, "ranking": "reward"}, SCORERS, "loss=rrhf ranks the responses of a query, and"),
    *(
        (records, KTO, SCORERS | {"rc": RcConfig(rc)}, COEFFICIENT.format(rc))
        for rc in ("reward", "diff", "gold")
        for records in (UNPAIRED, MIXED)
    ),
    ([BARE], KTO, {}, r"loss=kto learns from labelled pairs or responses, and .* has none"),
    (UNPAIRED, KTO, {"align": TrainingConfig(min_responses=2)}, r"align\.min_responses=2: no record"),
]
TAKEN = [
    *((MIXED, DPO, {}), (MIXED, DPO, BY_REWARD), (MIXED, KTO, {})),
    *((UNPAIRED, KTO, {}), ([PAIR], KTO, BY_REWARD)),
]


@pytest.mark.parametrize(("records", "loss", "sections", "message"), REFUSED)
def test_what_a_loss_refuses(records: Any, loss: Any, sections: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_data(data_run(*records, **sections), choose_loss(loss))


@pytest.mark.parametrize(("records", "loss", "sections"), TAKEN)
def test_what_a_loss_takes(records: Any, loss: Any, sections: Any) -> None:
    check_data(data_run(*records, **sections), choose_loss(loss))


@pytest.mark.parametrize(("kind", "stage"), [("reward", "rm"), ("diff", "diffmodel")])
def test_what_scorers_refuse(kind: str, stage: str) -> None:
    refused: dict[str, list[Record]] = {
        rf"is unpaired .* stage={stage} has .*set {stage}\.path.*loss=kto rc=none eval\.judges=\[\]": UNPAIRED,
        r"has no labelled pair.*rc=none loss\.ranking=scores eval\.judges=\[\]": [BARE],
    }
    if kind == "diff":
        check_labels(data_run(TIED), kind)
    else:
        refused["has no labelled pair"] = [TIED]
    for message, records in refused.items():
        with pytest.raises(UserError, match=message):
            check_labels(data_run(*records), kind)
        check_labels(data_run(*records, **SCORERS), kind)
    check_labels(data_run(*UNPAIRED, PAIR), kind)


def test_imitation_is_of_desirable_responses() -> None:
    bad = alone("bad", False)
    assert [to_imitate(record, "chosen") for record in (SEVERAL, bad)] == [(1, 2), ()]
    assert [to_imitate(record, "all") for record in (SEVERAL, bad)] == [(0, 1, 2), (0,)]
    run = data_run(bad, SEVERAL, PAIR)
    places, ids, responses = demonstrations(run, "train", run.config.sft)
    assert dict(zip(ids, responses, strict=True)) == {"several": (1, 2), "pair": (1,)}
    assert [run.records("train")[n].id for n in places] == ids
    with pytest.raises(UserError, match=r"sft\.responses=chosen .*has none in its split train: set sft\.responses=all"):
        demonstrations(data_run(bad), "train", run.config.sft)
    everything = SftConfig(responses="all")
    assert len(demonstrations(data_run(bad, sft=everything), "train", everything)[0]) == 1


# A whole run

SMALL = [
    "model=small", "model.vocabulary_size=300", "model.hidden_size=24", "model.layers=1", "sft.epochs=1",
    "align.batch_size=5", "align.epochs=2", "align.learning_rate=1e-3", "dataset=file", "loss=kto", "rc=none",
]  # fmt: skip
ROWS = [{"prompt": f"question {n}", "completion": f" answer {n}", "label": n % 3 > 0} for n in range(40)]


def file_run(folder: Path, rows: list[dict[str, Any]], *overrides: str) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "labels.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tiny_run(folder / "run", *SMALL, f"dataset.path={file}", *overrides)


def test_a_run_from_a_file(tmp_path: Path) -> None:
    run = file_run(tmp_path, ROWS, "eval.judges=[]", "align.max_records=null")
    policy = aligned_policy(run)
    labels = [record.desirable for record in run.records("train")]
    counts = {"desirable": labels.count((True,)), "undesirable": labels.count((False,))}
    assert policy.manifest()["results"]["samples"] == counts
    lines = metrics(policy)
    assert len(lines) == 2 * math.ceil(len(labels) / 5)
    # Policy and reference are the same at first: each sample's loss is 1/2.
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert lines[0]["kl_estimate"] == pytest.approx(0, abs=1e-4)
    assert lines[-1]["implicit_reward_desirable"] != 0
    assert all("policy_margin" not in line and "implicit_reward_accuracy" not in line for line in lines)
    evaluation = evaluate_policy(run, "policy")
    assert json.loads((evaluation.folder / "evaluation.json").read_text())["rewards"] == {}

    turned = aligned_policy(file_run(tmp_path / "turned", ROWS[::-1], "align.max_records=null"))
    assert weights(turned) == weights(policy)


class Handed(Exception):
    """Ends a stage once it has made its task."""


def test_every_item_has_its_own_reference_and_another_query_s_response(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers that the task hands out are the base policy's, of these very tokens after this very prompt."""
    tasks: list[AlignmentTask] = []

    def hand(run: Any, task: AlignmentTask, *others: Any) -> None:
        tasks.append(task)
        raise Handed

    monkeypatch.setattr("rdo.stages.align.train_and_save", hand)
    rows = [{**row, "completion": f"{row['completion']}{n % 5 * ' more'}"} for n, row in enumerate(ROWS)]
    run = file_run(tmp_path, rows)
    with pytest.raises(Handed):
        aligned_policy(run)
    (task,) = tasks
    model, tokenizer = run.policy(base_policy(run))
    by_id = {record.id: record for record in run.records("train")}
    items = [task.example(place, 0) for place in range(len(task))]
    assert [item.record_id for item in items] == sorted(item.record_id for item in items)
    assert len(items) == 32  # align.max_records
    for item in items:
        record = by_id[item.record_id]
        assert item.encoded.prompt == tuple(tokenizer(record.query).input_ids)
        assert item.samples == (Sample(0, record.desirable[0]),)
        assert item.mismatched is not None
        (other,), (other_reference,) = item.mismatched.reads.sequences, item.mismatched.reference
        other = other[len(item.encoded.prompt) :]
        assert tokenizer.decode(other[:-1]) in {r.responses[0] for r in by_id.values() if r.query != record.query}
        known = [(item.encoded.responses[0], item.reference[0]), (other, other_reference)]
        for ids, reference in known:
            row = torch.tensor([[*item.encoded.prompt, *ids]])
            with torch.no_grad():
                logits = model(row).logits[0, :-1].log_softmax(-1)
            tokens = logits.gather(-1, row[0, 1:, None])[len(item.encoded.prompt) - 1 :]
            assert reference == pytest.approx(float(tokens.sum()), abs=1e-3)


def test_judges_that_cannot_be_trained_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    run = file_run(tmp_path, ROWS, "eval.judges=[reward]")
    for subject in ("policy", "base"):
        with pytest.raises(UserError, match=r"stage=rm has nothing to learn from.*eval\.judges=\[\]"):
            evaluate_policy(run, subject)
    assert not (tmp_path / "run" / "sft").exists()


def test_mixed_data_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pairs and labelled responses in one file of the project's own format; a loss over pairs takes the pairs."""
    labels = [{"preferences": [[0, 1]]} if n % 2 else {"desirable": [n % 3 > 0, False]} for n in range(40)]
    rows = [{"query": f"q {n}", "responses": [" yes", f" {n}"], **label} for n, label in enumerate(labels)]
    run = file_run(tmp_path, rows, "align.max_records=null", "align.batch_size=64")
    records = run.records("train")
    paired = sum(bool(record.preferences) for record in records)
    desirable = paired + sum(sum(record.desirable or ()) for record in records)
    policy = aligned_policy(run)
    counts = {"desirable": desirable, "undesirable": 2 * len(records) - desirable}
    assert policy.manifest()["results"]["samples"] == counts
    assert {"policy_margin", "implicit_reward_desirable", "implicit_reward_undesirable"} <= metrics(policy)[0].keys()
    dpo = aligned_policy(file_run(tmp_path, rows, "loss=dpo", "align.max_records=null"))
    assert dpo.manifest()["results"]["records"] == paired
    left = f"[align] {len(records) - paired} of {len(records)} records have nothing for loss=dpo: left out"
    assert left in capsys.readouterr().out.splitlines()
