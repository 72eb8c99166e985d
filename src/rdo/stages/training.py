"""What the training stages share once the loop is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rdo.models.pretrained import save_model
from rdo.runtime import stopping
from rdo.runtime.files import read_json_lines
from rdo.runtime.processes import barrier, is_rank0
from rdo.settings import Config
from rdo.tracking import METRICS


def save_finished(
    trained: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    config: Config,
    state: dict[str, torch.Tensor] | None,
) -> None:
    """Saves a trained model in its artifact's folder; the first process does. A stop waits until the manifest is
    written, too.

    trained: what `choose_trained` returned; state: what `train` did.
    """
    with stopping.postponed():
        if is_rank0():
            save_model(trained, tokenizer, folder / "model", state, config.model.lora.merge)
        barrier()


def finish(folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    """Parameters, steps and last measures of a run whose model is saved; nothing but on the first process."""
    if not is_rank0():
        return {}
    lines = read_json_lines(folder / METRICS)
    last = lines[-1] if lines else {}
    # Where weights are divided among processes, what is left of them here is empty.
    parameters = sum(getattr(weight, "ds_numel", weight.numel()) for weight in model.parameters())
    return {"parameters": parameters, "steps": last.get("step", 0), "last": last}
