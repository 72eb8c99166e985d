"""The same work in TRL: its own trainers, their data preparation, collators and losses, as shipped and at their best.

TRL is given the very token ids of this project's records, written as text in which every word is one id, so that its
tokenization runs and cannot differ. Its models are copies of ours, loaded from a folder as a user would.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rdo.bench.data import PAD
from rdo.bench.measure import Contestant
from rdo.bench.works import BETA, Work, gradient_norm
from rdo.data.encoding import EncodedRecord
from rdo.errors import UserError
from rdo.forest import TokenIds

INSTALL = "pip install -r requirements-bench.txt"
SUPPORTED = ("dpo", "kto", "rm", "reference")


def word_tokenizer(vocabulary: int, end: int) -> PreTrainedTokenizerBase:
    """A tokenizer whose every word is one id: "w7" is 7; `end` ends a sequence, PAD (or the next id) is padding."""
    names = {PAD if end != PAD else PAD + 1: "<pad>", end: "<eos>"}
    ids = {names.get(n, f"w{n}"): n for n in range(vocabulary)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<pad>", bos_token=None
    )


def text(ids: TokenIds, tokenizer: PreTrainedTokenizerBase) -> str:
    """The words of token ids, without the end of the sequence, which TRL adds itself."""
    kept = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
    return " ".join(tokenizer.convert_ids_to_tokens(list(kept)))


def imported() -> Any:
    """TRL. Raises UserError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import trl
    except ImportError as error:
        raise UserError(
            f"stage=bench compares with TRL, which is not installed ({error}): {INSTALL}, or leave trl and trl_best "
            "out of bench.against"
        ) from error
    return trl


def rows(records: Sequence[EncodedRecord], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """Records as TRL's preference data: the text of prompt, chosen and rejected."""
    return [
        {
            "prompt": text(record.prompt, tokenizer),
            "chosen": " " + text(record.responses[0], tokenizer),
            "rejected": " " + text(record.responses[1], tokenizer),
        }
        for record in records
    ]


def unpaired_rows(records: Sequence[EncodedRecord], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The same for KTO: all chosen responses, then all rejected ones, as `works.rotated` expects them."""
    pairs = rows(records, tokenizer)
    return [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for name in ("chosen", "rejected")
        for pair in pairs
    ]


def settings(best: bool, batch: int, device: torch.device, folder: Path, precision: torch.dtype) -> dict[str, Any]:
    """Arguments of a trainer: TRL's own defaults but for what makes the two sides comparable (precision, no cut, no
    files); at its best without recomputing activations."""
    changed: dict[str, Any] = {"gradient_checkpointing": False} if best else {}
    return {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": batch,
        "bf16": precision == torch.bfloat16,
        "use_cpu": device.type == "cpu",
        "report_to": "none",
        "max_length": None,
        "disable_tqdm": True,
        **changed,
    }


def make_trainer(work: Work, best: bool, folder: Path, device: torch.device, precision: torch.dtype) -> Any:
    """TRL's trainer for a work, its model in training mode, as its own `train` would set it up."""
    trl = imported()
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()

    tokenizer = word_tokenizer(work.model.config.vocab_size, work.records[0].responses[0][-1])
    examples = (unpaired_rows if work.name == "kto" else rows)(work.records, tokenizer)
    arguments = settings(best, len(examples), device, folder, precision)
    given: dict[str, Any] = {"train_dataset": Dataset.from_list(examples), "processing_class": tokenizer}
    if work.name == "rm":
        model = AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1)
        trainer = trl.RewardTrainer(model=model, args=trl.RewardConfig(**arguments), **given)
    else:
        load = AutoModelForCausalLM.from_pretrained
        # At its best the reference's log-probabilities are there before training, and its weights are gone.
        arguments |= {"beta": BETA, "precompute_ref_log_probs": best}
        kind = (trl.KTOTrainer, trl.KTOConfig) if work.name == "kto" else (trl.DPOTrainer, trl.DPOConfig)
        trainer = kind[0](
            model=load(folder / "policy"), ref_model=load(folder / "reference"), args=kind[1](**arguments), **given
        )
        if best:
            trainer.ref_model = None
    if not best:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trainer.model.train()
    return trainer


def contestant(
    name: str, work: Work, folder: Path, device: torch.device, precision: torch.dtype = torch.float32
) -> Contestant:
    """A step of TRL's trainer (name: trl, or trl_best): its collator, its loss, and the backward pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(work, name == "trl_best", folder, device, precision)
    trainer._set_signature_columns_if_needed()
    kept = set(trainer._signature_columns)
    examples = [{key: row[key] for key in row if key in kept} for row in trainer.train_dataset]

    def inputs() -> dict[str, torch.Tensor]:
        return {key: value.to(device) for key, value in trainer.data_collator(examples).items()}

    def step() -> torch.Tensor:
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model, inputs())
        loss.backward()
        return loss.detach()

    def references() -> torch.Tensor:
        return torch.stack(trainer.compute_ref_log_probs(trainer.ref_model, inputs()), dim=1)

    if work.name == "reference":
        return Contestant(name, references)
    return Contestant(name, step, after=lambda: gradient_norm(trainer.model))
