"""The same work in TRL: its own trainers, their data preparation, collators and losses, as shipped and at their best.

TRL is given the very token ids of this project's records, written as text in which every word is one id, so that its
tokenization runs and cannot differ. Its models are copies of ours, loaded from a folder as a user would.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from launch.bench.measure import Contestant
from launch.bench.works import BETA, Bench, Work
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rdo.data.encoding import EncodedRecord


def rows(records: Sequence[EncodedRecord]) -> list[dict[str, Any]]:
    """Records as TRL's preference data, without the ends of sequences, which it adds itself."""
    texts = [[" ".join(f"w{n}" for n in ids) for ids in (r.prompt, *(a[:-1] for a in r.responses))] for r in records]
    return [{"prompt": prompt, "chosen": f" {a}", "rejected": f" {b}"} for prompt, a, b in texts]


def settings(bench: Bench, best: bool, batch: int) -> dict[str, Any]:
    """Arguments of a trainer: TRL's own defaults but for what makes the two sides comparable (precision, order, no cut,
    no files); at its best without recomputing activations."""
    return {
        "output_dir": str(bench.folder / "trl"), "per_device_train_batch_size": batch, "report_to": "none",
        "bf16": bench.precision == torch.bfloat16, "use_cpu": bench.device.type == "cpu", "max_length": None,
        "disable_tqdm": True, "train_sampling_strategy": "sequential",
        **({"gradient_checkpointing": False} if best else {}),
    }  # fmt: skip


def make_trainer(work: Work, best: bool, bench: Bench) -> Any:
    """TRL's trainer for a work, its model in training mode, as its own `train` would set it up."""
    import trl
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    arguments = settings(bench, best, 2 * len(work.records))  # KTO parts the pairs
    given = {"train_dataset": Dataset.from_list(rows(work.records)), "processing_class": bench.tokenizer}
    if work.name == "rm":
        model = AutoModelForSequenceClassification.from_pretrained(bench.folder / "reward", num_labels=1)
        trainer = trl.RewardTrainer(model=model, args=trl.RewardConfig(**arguments), **given)
    else:
        load = AutoModelForCausalLM.from_pretrained
        model, reference = load(bench.folder / "policy"), load(bench.folder / "reference")
        kind, config = (trl.KTOTrainer, trl.KTOConfig) if work.name == "kto" else (trl.DPOTrainer, trl.DPOConfig)
        args = config(**arguments, beta=BETA, precompute_ref_log_probs=best)
        trainer = kind(model=model, ref_model=reference, args=args, **given)
        if best:  # the reference's log-probabilities are there before training, and its weights are gone
            trainer.ref_model = None
    if not best:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trainer.model.train()
    return trainer


def trl_contestant(name: str, work: Work, bench: Bench) -> Contestant:
    """A step of TRL's trainer (name: trl, or trl_best): its collator, its loss, and the backward pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(work, name == "trl_best", bench)
    batches = trainer.get_train_dataloader()

    def step() -> torch.Tensor:
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model, next(iter(batches)))
        loss.backward()
        return loss.detach()

    def references() -> torch.Tensor:
        return torch.stack(trainer.compute_ref_log_probs(trainer.ref_model, next(iter(batches))), dim=1)

    return Contestant(name, references if work.name == "reference" else step, trainer.model)
