"""What the training stages share once the loop is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from rdo.checkpoints import Checkpoints
from rdo.files import read_json_lines
from rdo.schema import EngineConfig
from rdo.tracking import METRICS


def finish(folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    """Clears the checkpoints of a run whose model is saved; its parameters, steps and last measures."""
    Checkpoints(folder / "checkpoints", EngineConfig()).clear()
    lines = read_json_lines(folder / METRICS)
    return {"parameters": model.num_parameters(), "steps": len(lines), "last": lines[-1] if lines else {}}
