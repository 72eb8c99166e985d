"""One epoch of DPO from a file and a model's folder to a saved policy: ours, and TRL's `Trainer.train()`.

Both read the same JSON lines, tokenize, need the reference's log-probabilities, train with AdamW, log, and save.
Starting Python and importing libraries are left out on both sides.
"""

from __future__ import annotations

import gc
import json
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from launch.bench.measure import timed
from launch.bench.theirs import rows, settings
from launch.bench.works import BETA, Bench, made_records

from rdo.checks import compose_config
from rdo.main import run_config
from rdo.runtime.files import read_json_lines

BATCH, RATE = 8, 1e-6
HEAD = f"{'an epoch of DPO':<20} {'th':>2} {'ours s':>8} {'TRL s':>8} {'ratio':>7}"


def ours(file: Path, bench: Bench) -> list[float]:
    """stage=align, with all that it needs; the losses of its steps."""
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
    return [step["loss"] for step in read_json_lines(metrics)]


def theirs(file: Path, bench: Bench) -> list[float]:
    """TRL's trainer as shipped; the losses that it has logged."""
    import trl
    from datasets import load_dataset

    more = {"beta": BETA, "learning_rate": RATE, "num_train_epochs": 1, "logging_steps": 1, "save_strategy": "no"}
    given = load_dataset("json", data_files=str(file), split="train", cache_dir=str(file.parent / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = trl.DPOConfig(**settings(bench, False, BATCH), **more, model_init_kwargs={"dtype": "float32"})
        trainer = trl.DPOTrainer(
            model=str(bench.folder / "policy"), args=arguments, train_dataset=given, processing_class=bench.tokenizer
        )
        trainer.train()
    trainer.save_model(str(file.parent / "policy"))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def measure_epoch(bench: Bench, pairs: int) -> list[dict[str, Any]]:
    """Rows by number of threads: ours, TRL's, ours again. Both must have taken as many steps, at losses about ln 2,
    where DPO starts."""
    records, found = rows(made_records(pairs, 2, bench.policy.config.vocab_size)), []
    print(f"\n{HEAD}")
    for count in bench.threads:
        torch.set_num_threads(count)
        seconds, losses = [], []
        for turn, train in enumerate((ours, theirs, ours)):
            file = bench.folder / f"epoch-{count}-{turn}" / "pairs.jsonl"
            file.parent.mkdir()
            file.write_text("".join(f"{json.dumps(row)}\n" for row in records))
            gc.collect()
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # progress bars would part the table
                took, made = timed(lambda train=train, file=file: train(file, bench), bench.device)
            seconds.append(took)
            losses.append(made)
        own, other = mean(seconds[::2]), seconds[1]
        row = {"threads": count, "pairs": pairs, "seconds_ours": own, "seconds_other": other, "time_ratio": other / own}
        if len(losses[0]) != len(losses[1]) or abs(mean(losses[0]) - mean(losses[1])) > 1e-3:
            row = {"threads": count, "pairs": pairs, "refused": f"losses of steps differ: {losses[0]}, {losses[1]}"}
        ratio = f"{own:8.2f} {other:8.2f} {other / own:7.2f}"
        print(f"{pairs:>14} pairs {count:>2} {row.get('refused', ratio)}")
        found.append(row)
    return found
