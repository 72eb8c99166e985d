"""Stage sft: the base policy, from scratch or from model.path, by supervised fine-tuning on demonstrations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from rdo.data.records import Record
from rdo.models.given import given
from rdo.models.lora import check_trained, choose_trained, lora_settings
from rdo.models.pretrained import load_policy, load_tokenizer, new_policy
from rdo.models.tokenizers import make_tokenizer
from rdo.objectives.losses import best_response
from rdo.runtime.errors import UserError
from rdo.runtime.store import Artifact
from rdo.sequences.forward import Reads
from rdo.settings import TrainingConfig
from rdo.stages.run import Run, model_path, select
from rdo.stages.training import train_and_save, validation_selection, validation_settings
from rdo.training.tasks import ById, Example, SftTask


def base_policy(run: Run) -> Artifact:
    """The policy that alignment starts from, scorers are built on, and references come from."""
    config = run.config
    inputs = {"model": given(config.model.path, config.model.revision)} if config.model.path else {}
    if not config.sft.enabled:
        if not inputs:
            raise UserError("sft.enabled=false takes model.path as the base policy, but model.path is not set")
        return inputs["model"]
    check_trained(config)
    unread = ("name", "path", "difference_template", "lora")
    split = "demonstrations" if run.splits().splits.get("demonstrations") else "train"
    settings = run.settings(
        split,
        model={k: v for k, v in asdict(config.model).items() if k not in unread},
        training=asdict(config.sft),
        seed=config.seed,
        **validation_settings(run, config.sft),
        **(lora_settings(config.model) if config.model.path else {}),
    )
    return run.produce("sft", config.model.name, settings, inputs, partial(train_base, run, split))


def train_base(run: Run, split: str, folder: Path) -> dict[str, Any]:
    """Builds tokenizer and model, trains on the split's responses, and saves both."""
    config = run.config
    records = run.records(split)
    if config.model.path:
        path = model_path(given(config.model.path, config.model.revision))
        model = load_policy(path, config.model)
        tokenizer = load_tokenizer(path, config.model)
        trained = choose_trained(model, config.model, config.seed)
    else:
        if config.model.lora.rank is not None:
            print("[sft] a model from scratch is trained whole; model.lora adapts it in what follows", flush=True)
        tokenizer = make_tokenizer(config.model, training_texts(records))
        trained = model = new_policy(config.model, tokenizer, config.seed)
    task = imitation(run, split, config.sft, tokenizer)
    validated = validation_selection(config.sft)
    return train_and_save(
        run,
        task,
        run.on_device(model),
        trained,
        tokenizer,
        config.sft,
        split,
        folder,
        "sft",
        validation=imitation(run, "validation", validated, tokenizer) if validated else None,
    )


def imitation(
    run: Run, split: str, selection: TrainingConfig, tokenizer: transformers.PreTrainedTokenizerBase
) -> SftTask:
    """The task of imitating a split's responses."""
    places, ids, imitated = demonstrations(run, split, selection)
    encoded = run.encoded(split, tokenizer)
    fitting = set(run.fitting(encoded, places))
    kept = [number for number, place in enumerate(places) if place in fitting]

    def make(number: int) -> Example:
        record = encoded[places[kept[number]]]
        return Example(record.id, Reads.of(record.prompt, [record.responses[r] for r in imitated[kept[number]]]))

    return SftTask(ById([ids[number] for number in kept], make))


def training_texts(records: Iterable[Record]) -> Iterator[str]:
    """What a tokenizer is trained on: the texts of the training split."""
    return (text for record in records for text in (record.query, *record.responses))


def demonstrations(
    run: Run, split: str, selection: TrainingConfig
) -> tuple[list[int], list[str], list[tuple[int, ...]]]:
    """Of the records that are selected and that bring something to imitate: places, ids, and which responses."""
    records, config = run.records(split), run.config.sft
    selected = select(records, selection)
    found = [(record.id, to_imitate(record, config.responses)) for record in records.only(np.array(selected, int))]
    kept = [number for number, (_, responses) in enumerate(found) if responses]
    if selected and not kept:
        raise UserError(
            f"sft.responses=chosen imitates the desirable responses, and dataset={run.config.dataset.name} "
            f"has none in its split {split}: set sft.responses=all, or sft.enabled=false with model.path"
        )
    return [selected[n] for n in kept], [found[n][0] for n in kept], [found[n][1] for n in kept]


def to_imitate(record: Record, which: str) -> tuple[int, ...]:
    """The responses of a record that supervised fine-tuning imitates; none where all of them are undesirable."""
    if which not in ("chosen", "all"):
        raise UserError(f"sft.responses={which}: must be chosen or all")
    if which == "chosen" and record.desirable is not None:
        return tuple(number for number, desirable in enumerate(record.desirable) if desirable)
    if which == "all" or len(record.responses) == 1:
        return tuple(range(len(record.responses)))
    if record.preferences:
        return tuple(sorted({p.chosen for p in record.preferences if not p.tie})) or (0,)
    if record.scores is not None:
        return (best_response(record.scores),)
    raise UserError(f"record {record.id} has neither preferences nor scores: set sft.responses=all")
