"""What the training stages share: the loop within a run, and what is left of it in the artifact's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers

from rdo.models.pretrained import save_model
from rdo.runtime import stopping
from rdo.runtime.errors import UserError
from rdo.runtime.files import read_json_lines
from rdo.runtime.processes import barrier, is_rank0
from rdo.settings import TrainingConfig
from rdo.stages.run import Run
from rdo.tracking import METRICS
from rdo.training.loop import train
from rdo.training.step import Task


def validation_selection(section: TrainingConfig) -> TrainingConfig | None:
    """Which records of the validation split are validated on; None where that is off."""
    return replace(section, max_records=section.validation_records) if section.validate_every_steps else None


def validation_settings(run: Run, section: TrainingConfig) -> dict[str, Any]:
    """What of the validation split may determine a result. Raises UserError where there is none to validate on."""
    if section.validate_every_steps is None:
        return {}
    if not len(run.splits().splits["validation"]):
        raise UserError(
            "validate_every_steps needs a validation split, and there is no record in it: see dataset.validation_share"
        )
    return {"validation": run.data_settings("validation")}


def train_and_save(
    run: Run,
    task: Task,
    model: transformers.PreTrainedModel,
    trained: Any,
    tokenizer: transformers.PreTrainedTokenizerBase,
    section: TrainingConfig,
    split: str,
    folder: Path,
    title: str,
    results: Mapping[str, Mapping[str, float] | None] | None = None,
    validation: Task | None = None,
) -> dict[str, Any]:
    """Trains a model on the run's device, and saves what `choose_trained` returned (`trained`) with its tokenizer in
    the artifact's folder. Returns parameters, steps, last metrics and `results`, which the dashboard shows too; nothing
    but on the first process. Raises as `train` does."""
    config, results = run.config, results or {}
    with run.locating(split), run.tracker(folder, f"{folder.parent.name}/{folder.name}") as tracker:
        named = {f"{name}/{key}": value for name, values in results.items() for key, value in (values or {}).items()}
        tracker.summarize(named)
        state = train(task, model, section, config.engine, config.seed, folder, tracker, title, validation)
    with stopping.postponed():  # a stop waits until the manifest is written, too
        if is_rank0():
            save_model(trained, tokenizer, folder / "model", state, config.model.lora.merge)
        barrier()
    if not is_rank0():
        return {}
    lines = [line for line in read_json_lines(folder / METRICS) if "loss" in line]  # and not of a validation
    last = lines[-1] if lines else {}
    # Where weights are divided among processes, what is left of them here is empty.
    parameters = sum(getattr(weight, "ds_numel", weight.numel()) for weight in model.parameters())
    return {"parameters": parameters, "steps": last.get("step", 0), "last": last, **results}
