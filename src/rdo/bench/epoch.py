"""One epoch of DPO from a file and a model's folder to a saved policy: ours, and TRL's `Trainer.train()`.

Both read the same JSON lines, tokenize, need the reference's log-probabilities, train with AdamW, log, and save.
Starting Python and importing libraries are left out on both sides.
"""

from __future__ import annotations

import gc
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

import torch

from rdo.artifacts import Provenance
from rdo.bench import trl
from rdo.bench.measure import timed
from rdo.bench.subjects import Subjects
from rdo.bench.suite import Setting
from rdo.bench.works import BETA
from rdo.checks import compose_config, plain
from rdo.data.encoding import EncodedRecord
from rdo.files import read_json_lines
from rdo.run import Run
from rdo.stages.align import aligned_policy

T = TypeVar("T")

BATCH = 8
RATE = 1e-6
HEAD = f"{'an epoch of DPO':<20} {'th':>2} {'ours s':>8} {'TRL s':>8} {'ratio':>7}"


def write_pairs(records: Sequence[EncodedRecord], subjects: Subjects, folder: Path) -> Path:
    """The records as TRL's columns, which this project reads as they are."""
    file = folder / "pairs.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in trl.rows(records, subjects.tokenizer)))
    return file


def ours(file: Path, subjects: Subjects, setting: Setting, folder: Path) -> Path:
    """stage=align, with all that it needs; the folder of the saved policy."""
    shutil.rmtree(folder, ignore_errors=True)
    engine = setting.config
    config = compose_config(
        [
            "stage=align", "loss=dpo", "rc=none", "model=hub", "sft.enabled=false", "dataset=file",
            f"model.path={subjects.folder / 'policy'}", f"dataset.path={file}", f"run_dir={folder}",
            "dataset.validation_share=0", "dataset.test_share=0", "dataset.max_length=100000", "dataset.workers=1",
            f"align.batch_size={BATCH}", f"align.learning_rate={RATE}", f"loss.beta={BETA}",
            f"engine.tokens_per_micro_batch={engine.tokens_per_micro_batch}", f"engine.device={engine.device}",
            f"engine.precision={engine.precision}", f"engine.attention={engine.attention}",
        ]
    )  # fmt: skip
    provenance = Provenance(folder, "stage=bench", plain(config), True)
    return aligned_policy(Run(config, provenance, "align")).folder


def theirs(file: Path, subjects: Subjects, setting: Setting, folder: Path) -> list[dict[str, Any]]:
    """TRL's trainer as shipped; what it has logged."""
    library = trl.imported()
    from datasets import load_dataset

    shutil.rmtree(folder, ignore_errors=True)
    arguments = trl.settings(False, BATCH, setting.device, folder, setting.precision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = library.DPOTrainer(
            model=str(subjects.folder / "policy"),
            args=library.DPOConfig(
                **arguments, beta=BETA, learning_rate=RATE, num_train_epochs=1, logging_steps=1, save_strategy="no",
                model_init_kwargs={"dtype": "float32"},
            ),
            train_dataset=load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "cache")),
            processing_class=subjects.tokenizer,
        )  # fmt: skip
        trainer.train()
    trainer.save_model(str(folder / "policy"))
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def measure_epoch(
    records: Sequence[EncodedRecord], subjects: Subjects, setting: Setting, threads: Sequence[int], folder: Path
) -> dict[str, Any]:
    """Rows by number of threads: ours, TRL's, ours again."""
    file = write_pairs(records, subjects, folder)
    rows = []
    setting.say(f"\n{HEAD}")
    for count in threads:
        torch.set_num_threads(count)
        before, _ = clocked(partial(ours, file, subjects, setting, folder / "ours"), setting)
        other, logged = clocked(partial(theirs, file, subjects, setting, folder / "theirs"), setting)
        after, saved = clocked(partial(ours, file, subjects, setting, folder / "ours"), setting)
        metrics = read_json_lines(saved / "metrics.jsonl")
        row = compare(mean([before, after]), other, metrics, logged)
        row |= {"threads": count, "pairs": len(records)}
        ratio = "no ratio: steps or losses differ" if row["time_ratio"] is None else f"{row['time_ratio']:7.2f}"
        setting.say(f"{len(records):>14} pairs {count:>2} {row['seconds_ours']:8.2f} {other:8.2f} {ratio}")
        rows.append(row)
    return {"epoch": rows}


def clocked(run: Callable[[], T], setting: Setting) -> tuple[float, T]:
    """Seconds, and what the function returns; what it prints would part the table."""
    gc.collect()
    results: list[T] = []
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        seconds = timed(lambda: results.append(run()), setting.device)
    return seconds, results[0]


def compare(
    own: float, other: float, metrics: Sequence[dict[str, Any]], logged: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """A row of bench.json. Both must have taken as many steps, at losses about ln 2, where DPO starts."""
    losses = [mean(entry["loss"] for entry in entries) for entries in (metrics, logged)]
    same = len(metrics) == len(logged) and abs(losses[0] - losses[1]) < 1e-3
    return {
        "work": "epoch",
        "against": "trl",
        "time_ratio": other / own if same else None,
        "seconds_ours": own,
        "seconds_other": other,
        "loss_ours": losses[0],
        "loss_other": losses[1],
    }
