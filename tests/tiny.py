"""Runs on a toy world so small that a whole pipeline takes seconds."""

import json
from pathlib import Path
from typing import Any

from rdo.checks import compose_config, plain
from rdo.main import prepare_process
from rdo.runtime.errors import UserError
from rdo.runtime.files import read_json_lines
from rdo.runtime.store import Artifact, Provenance, found
from rdo.stages.run import Cache, Run

TINY = (
    "dataset.toy.pairs=64",
    "dataset.toy.test_pairs=64",
    "dataset.toy.demonstrations=256",
    "dataset.toy.candidate_queries=32",
    "sft.max_steps=5",
    "eval.prompts=8",
    "eval.max_new_tokens=8",
    "align.max_records=32",
    "engine.threads=1",
    "engine.device=cpu",
)
CACHE = Cache()


def tiny_run(run_dir: Path, *overrides: str, requested: str = "") -> Run:
    """A run of these overrides on top of the tiny ones; data is shared by all of a process."""
    config = compose_config([*TINY, f"run_dir={run_dir}", *overrides])
    prepare_process(config.engine)
    provenance = Provenance(run_dir, "python train.py", plain(config), config.build_inputs)
    return Run(config, provenance, requested, CACHE)


def weights(artifact: Artifact) -> bytes:
    """The saved weights, byte for byte."""
    return (artifact.folder / "model" / "model.safetensors").read_bytes()


def metrics(artifact: Artifact) -> list[dict[str, Any]]:
    """What was logged, without what a clock or the machine says."""
    lines = read_json_lines(artifact.folder / "metrics.jsonl")
    machine = {"seconds", "tokens_per_second", "memory_bytes"}
    return [{key: value for key, value in line.items() if key not in machine} for line in lines]


def is_finished(folder: Path) -> bool:
    """Whether a stage of ours ran to its end there; any folder may be asked about."""
    try:
        return found(folder)
    except UserError:
        return False


def append_json_line(path: Path, data: dict[str, Any]) -> None:
    """One more line of a JSON-lines file."""
    with path.open("a") as file:
        file.write(json.dumps(data) + "\n")
