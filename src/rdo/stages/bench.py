"""Stage bench: how fast every computation is, against TRL, padding, and no sharing.

Prints its tables as it goes, and leaves in `run_dir`/bench: bench.json (every number), bench.txt (what was printed).
"""

from __future__ import annotations

import tempfile
import warnings
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig

from rdo.bench import trl
from rdo.bench.data import END, made_records, with_responses
from rdo.bench.epoch import measure_epoch
from rdo.bench.run import measure_all
from rdo.bench.subjects import make_subjects
from rdo.bench.suite import Setting
from rdo.data.encoding import EncodedRecord, encode_batch
from rdo.errors import UserError
from rdo.progress import say
from rdo.run import Run, select
from rdo.schema import TrainingConfig
from rdo.stages.inspect import choose_tokenizer


def benchmark(run: Run) -> Path:
    """Measures what section bench names; the file with all numbers.

    With dataset=toy, the default, records are made up, of HH-like lengths; else they are the first of the training
    split, by a hash of their ids. Raises UserError where TRL is asked for and not installed.
    """
    config, device = run.config, run.device()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of TRL's calls into transformers
    if {"trl", "trl_best"} & set(config.bench.against) or config.bench.epoch_pairs:
        trl.imported()
    given, end = (None, END) if config.dataset.source == "toy" else given_records(run)
    path = config.model.path
    vocabulary = AutoConfig.from_pretrained(path).vocab_size if path else config.model.vocabulary_size
    threads = config.bench.threads or sorted({1, torch.get_num_threads()})
    folder = run.provenance.run_dir / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.txt").unlink(missing_ok=True)

    def show(line: str) -> None:
        with (folder / "bench.txt").open("a") as file:
            file.write(f"{line}\n")
        say(line)

    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        subjects = make_subjects(config.model, trl.word_tokenizer(vocabulary, end), Path(temporary), device)
        setting = Setting(config.engine, config.bench, device, subjects.folder, show)
        pairs = config.bench.epoch_pairs
        records = made_records(pairs, 2, vocabulary) if given is None else with_responses(given, 2)[:pairs]
        epoch = partial(measure_epoch, records, subjects, setting, threads, Path(temporary)) if pairs else dict
        measure_all(subjects, setting, given, threads, folder / "bench.json", epoch)
    return folder / "bench.json"


def given_records(run: Run) -> tuple[list[EncodedRecord], int]:
    """Encoded records of the training split, as many as the largest work takes, and the id that ends a sequence.
    Raises UserError where there are fewer."""
    bench, dataset, records = run.config.bench, run.config.dataset, run.records("train")
    count = max(2 * bench.pairs, bench.epoch_pairs)
    chosen = [records[n] for n in select(records, TrainingConfig(min_responses=2))[:count]]
    if len(chosen) < count:
        raise UserError(
            f"dataset={dataset.name} has {len(chosen)} records with two responses, and stage=bench takes {count}: "
            "lower bench.pairs and bench.epoch_pairs"
        )
    tokenizer, _ = choose_tokenizer(run, records)
    whole = encode_batch(chosen, tokenizer, dataset.template, dataset.max_length, False)
    return [encoded for encoded, _ in whole], int(tokenizer.eos_token_id)
