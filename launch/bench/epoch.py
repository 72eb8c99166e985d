"""One epoch of DPO from a file and a model's folder to a saved policy: ours, and TRL's `Trainer.train()`.

Both read the same JSON lines, tokenize, need the reference's log-probabilities, train with AdamW, log, and save.
Starting Python and importing libraries are left out on both sides.
"""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from launch.bench.measure import timed
from launch.bench.theirs import imported, rows, settings
from launch.bench.works import BETA, Bench, made_records

from rdo.checks import compose_config
from rdo.main import run_config

BATCH, RATE = 8, 1e-6
HEAD = f"{'an epoch of DPO':<20} {'th':>2} {'ours s':>8} {'TRL s':>8} {'ratio':>7}"


def ours(file: Path, bench: Bench) -> list[dict[str, Any]]:
    """stage=align, with all that it needs; the metrics of its steps."""
    engine = bench.engine
    overrides = [
        "stage=align", "loss=dpo", "rc=none", "model=hub", "sft.enabled=false", "dataset=file", f"dataset.path={file}",
        f"model.path={bench.folder / 'policy'}", f"run_dir={file.parent}", "dataset.validation_share=0",
        "dataset.test_share=0", "dataset.max_length=100000", "dataset.workers=1", f"align.batch_size={BATCH}",
        f"align.learning_rate={RATE}", f"loss.beta={BETA}", f"engine.device={engine.device}",
        f"engine.precision={engine.precision}", f"engine.attention={engine.attention}",
        f"engine.tokens_per_micro_batch={engine.tokens_per_micro_batch}",
    ]  # fmt: skip
    run_config(compose_config(overrides), overrides)
    (metrics,) = file.parent.rglob("metrics.jsonl")
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def theirs(file: Path, bench: Bench) -> list[dict[str, Any]]:
    """TRL's trainer as shipped; what it has logged of its steps."""
    from datasets import load_dataset

    trl, policy = imported(), str(bench.folder / "policy")
    more = {"beta": BETA, "learning_rate": RATE, "num_train_epochs": 1, "logging_steps": 1, "save_strategy": "no"}
    given = load_dataset("json", data_files=str(file), split="train", cache_dir=str(file.parent / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = trl.DPOConfig(**settings(bench, False, BATCH), **more, model_init_kwargs={"dtype": "float32"})
        trainer = trl.DPOTrainer(model=policy, args=arguments, train_dataset=given, processing_class=bench.tokenizer)
        trainer.train()
    trainer.save_model(str(file.parent / "policy"))
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def measure_epoch(bench: Bench, pairs: int) -> list[dict[str, Any]]:
    """Rows by number of threads: ours, TRL's, ours again. What they print would part the table."""
    records, found = made_records(pairs, 2, bench.policy.config.vocab_size), []
    bench.say(f"\n{HEAD}")
    for count in bench.threads:
        torch.set_num_threads(count)
        seconds, steps = [], []
        for turn, train in enumerate((ours, theirs, ours)):
            file = bench.folder / f"epoch-{count}-{turn}" / "pairs.jsonl"
            file.parent.mkdir()
            file.write_text("".join(f"{json.dumps(row)}\n" for row in rows(records)))
            gc.collect()
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                took, made = timed(lambda train=train, file=file: train(file, bench), bench.device)
            seconds.append(took)
            steps.append(made)
        row = compare(mean(seconds[::2]), seconds[1], steps[2], steps[1]) | {"threads": count, "pairs": pairs}
        ratio = f"{row['time_ratio']:7.2f}" if row["time_ratio"] else "no ratio: steps or losses differ"
        bench.say(f"{pairs:>14} pairs {count:>2} {row['seconds_ours']:8.2f} {seconds[1]:8.2f} {ratio}")
        found.append(row)
    return found


def compare(
    own: float, other: float, mine: Sequence[dict[str, Any]], logged: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """A row of bench.json. Both must have taken as many steps, at losses about ln 2, where DPO starts."""
    losses = [mean(entry["loss"] for entry in entries) for entries in (mine, logged)]
    same = len(mine) == len(logged) and abs(losses[0] - losses[1]) < 1e-3
    return {
        "work": "epoch", "against": "trl", "time_ratio": other / own if same else None, "seconds_ours": own,
        "seconds_other": other, "loss_ours": losses[0], "loss_other": losses[1],
    }  # fmt: skip
