"""What stages leave behind: one folder each, named by a key over everything that determined it.

The key hashes the stage's settings and the keys of its inputs. So what is done is found again and skipped, a changed
setting upstream leads to new folders downstream, points of a sweep never overwrite each other and share what they
have in common, and a stale result cannot be taken for a fresh one. The manifest is written last: a folder that has one
is finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rdo.runtime import stopping
from rdo.runtime.errors import UserError
from rdo.runtime.files import held, read_json, remove_leftovers, write_json
from rdo.runtime.processes import barrier, broadcast, is_rank0

MANIFEST = "manifest.json"
# Raised whenever a stage's output changes its meaning, so that older folders are not mistaken for it.
ARTIFACT_VERSION = 4
# What a stage that was interrupted goes on from; removed when it is finished.
PARTIAL = ("checkpoints", "shards")
# A result that has no stage of its own, and the stage that makes it.
PART_OF = {"reference": "align", "generate": "eval"}


@dataclass(frozen=True)
class Artifact:
    """A finished result: the folder that holds it, and the key that later stages hash into theirs."""

    folder: Path
    key: str

    def manifest(self) -> dict[str, Any]:
        """What `produce` wrote of it."""
        return read_manifest(self.folder)


@dataclass(frozen=True)
class Provenance:
    """What every manifest records beside its settings, and how inputs that are missing come about."""

    run_dir: Path
    command: str
    config: dict[str, Any]
    build_inputs: bool = True


def produce(
    provenance: Provenance,
    stage: str,
    label: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Artifact],
    make: Callable[[Path], dict[str, Any] | None],
    requested: bool = True,
    together: bool = True,
) -> Artifact:
    """The artifact of a stage: found if it is there, made by `make(folder)` if not.

    Every process of the run calls this. All of them run `make` (together=False: the first alone), and the results
    that count are the first one's.

    `make` may find a part-way state of its own in the folder and go on from it; what it returns goes into the
    manifest, which is written last and alone marks the folder as finished. `requested` is false for the inputs of
    the stage that was asked for. Raises UserError where an input is missing and build_inputs is off, and Stopped
    when the process is asked to stop.
    """
    artifact = artifact_of(provenance, stage, label, settings, inputs)
    folder, first = artifact.folder, is_rank0()
    if broadcast(lambda: found(folder)):
        if requested:
            print(f"[{stage}] done already: {folder}", flush=True)
        if first:
            remove_partial(folder)
        return artifact
    if not requested and not provenance.build_inputs:
        kept = [text for text in shlex.split(provenance.command) if not text.startswith(("build_inputs=", "stage="))]
        command = shlex.join([*kept[:2], f"stage={PART_OF.get(stage, stage)}", *kept[2:]])
        raise UserError(f"the input {stage} ({label}) is not there; make it: {command}")
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder) if first else nullcontext():
        if broadcast(lambda: found(folder)):
            return artifact
        if first:
            remove_leftovers(folder)
        barrier()
        print(f"[{stage}] {folder}", flush=True)
        started = time.perf_counter()
        results = (make(folder) if together else broadcast(lambda: make(folder))) or {}
        barrier()
        manifest = {
            **described(stage, settings),
            "label": label,
            "key": artifact.key,
            "inputs": {name: {"folder": shown(a.folder, provenance), "key": a.key} for name, a in inputs.items()},
            "results": results,
            "seconds": round(time.perf_counter() - started, 3),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": provenance.command,
            "config": provenance.config,
            "code_revision": code_revision(),
            "versions": library_versions(),
        }
        with stopping.postponed():
            if first:
                write_json(folder / MANIFEST, manifest)
                remove_partial(folder)
            barrier()
        stopping.check(f"{folder} is finished, and the same command goes on")
    return artifact


def artifact_of(
    provenance: Provenance, stage: str, label: str, settings: Mapping[str, Any], inputs: Mapping[str, Artifact]
) -> Artifact:
    """Where a stage's result lies, or will, and its key; whether it is there says `found`."""
    keys = {name: artifact.key for name, artifact in sorted(inputs.items())}
    key = fingerprint([described(stage, settings), keys])
    return Artifact(provenance.run_dir / stage / f"{label}-{key[:10]}", key)


def described(stage: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of a result, beside its inputs, its key is made of."""
    return {"version": ARTIFACT_VERSION, "stage": stage, "settings": settings}


def remove_partial(folder: Path) -> None:
    """Removes the part-way state of a finished stage; a process killed just then may have left some."""
    for name in PARTIAL:
        shutil.rmtree(folder / name, ignore_errors=True)


def shown(folder: Path, provenance: Provenance) -> str:
    """A folder as manifests name it: from the run folder on where it lies in there, so that the whole may move."""
    if folder.is_relative_to(provenance.run_dir):
        return str(folder.relative_to(provenance.run_dir))
    return str(folder.absolute() if folder.is_dir() else folder)


def found(folder: Path) -> bool:
    """Whether a folder of `produce` is finished. Raises UserError where its manifest is none of this version."""
    return (folder / MANIFEST).exists() and bool(read_manifest(folder))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished folder. Raises UserError where it cannot be read, or another version wrote it."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = read_json(path)
        same = manifest["version"] == ARTIFACT_VERSION
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}); delete {folder}, and run again") from error
    if not same:
        raise UserError(f"{path} was made by another version of rdo; delete {folder}, and run again")
    return manifest


def fingerprint(data: Any) -> str:
    """Hash of plain data, independent of the order of mappings."""
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def stable_seed(*parts: object) -> int:
    """A seed from any parts, the same in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


@cache
def code_revision() -> str:
    """The git commit of the code, marked where its files were changed; 'unknown' outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@cache
def library_versions() -> dict[str, str]:
    """Versions that figures may depend on."""
    names = ("torch", "transformers", "tokenizers", "numpy", "deepspeed", "peft")
    return {"python": platform.python_version(), "cores": str(os.cpu_count()), **{n: version(n) for n in names}}
