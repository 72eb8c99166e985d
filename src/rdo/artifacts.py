"""What stages leave behind: one folder each, named by a key over everything that determined it.

The key hashes the stage's settings and the keys of its inputs. So what is done is found again and skipped, a changed
setting upstream leads to new folders downstream, points of a sweep never overwrite each other and share what they
have in common, and a stale result cannot be taken for a fresh one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rdo.errors import UserError
from rdo.files import read_json, write_json
from rdo.progress import progress_bar

# Raised whenever a stage's output changes its meaning, so that older folders are not mistaken for it.
ARTIFACT_VERSION = 1
MANIFEST = "manifest.json"


class MissingInput(UserError):
    """An input is not there, and the run was told not to make it."""


@dataclass(frozen=True)
class Artifact:
    """A finished result: the folder that holds it, and the key that later stages hash into theirs."""

    folder: Path
    key: str

    def manifest(self) -> dict[str, Any]:
        return read_json(self.folder / MANIFEST)


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
) -> Artifact:
    """The artifact of a stage: found if it is there, made by `make(folder)` if not.

    `make` may find a part-way state of its own in the folder and go on from it; what it returns goes into the
    manifest, which is written last and alone marks the folder as finished. `requested` is false for the inputs of
    the stage that was asked for. Raises MissingInput where an input is missing and build_inputs is off.
    """
    described = {"version": ARTIFACT_VERSION, "stage": stage, "settings": settings}
    key = fingerprint([described, {name: artifact.key for name, artifact in sorted(inputs.items())}])
    folder = provenance.run_dir / stage / f"{label}-{key[:10]}"
    artifact = Artifact(folder, key)
    if is_finished(folder):
        if requested:
            print(f"[{stage}] done already: {folder}", flush=True)
        return artifact
    if not requested and not provenance.build_inputs:
        command = provenance.command.replace(" build_inputs=false", "")
        raise MissingInput(f"the input {stage} ({label}) is not there; make it: {command}")
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        if is_finished(folder):
            return artifact
        print(f"[{stage}] {folder}", flush=True)
        started = time.perf_counter()
        results = make(folder) or {}
        manifest = {
            **described,
            "label": label,
            "key": key,
            "inputs": {name: {"folder": shown(a.folder, provenance), "key": a.key} for name, a in inputs.items()},
            "results": results,
            "seconds": round(time.perf_counter() - started, 3),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": provenance.command,
            "config": provenance.config,
            "code_revision": code_revision(),
            "versions": library_versions(),
        }
        write_json(folder / MANIFEST, manifest)
    return artifact


def shown(folder: Path, provenance: Provenance) -> str:
    """A folder as manifests name it: from the run folder on where it lies in there, so that the whole may move."""
    inside = folder.is_relative_to(provenance.run_dir)
    if inside:
        return str(folder.relative_to(provenance.run_dir))
    return str(folder.absolute() if folder.is_dir() else folder)


def is_finished(folder: Path) -> bool:
    """Whether the folder's stage ran to its end."""
    return (folder / MANIFEST).exists()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds a folder for this process; a second one that wants it says so and waits, then finds the result."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another run that is making {folder}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def given(path: str, revision: str | None = None, setting: str = "model.path") -> Artifact:
    """A model that the user brings, as an artifact: its key hashes its files, or its hub name and revision.

    Raises UserError, naming the setting, where the path reads like a folder and there is none.
    """
    folder = Path(path)
    if not folder.is_dir():
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise UserError(f"{setting}={path}: there is no such folder")
        return Artifact(folder, fingerprint(["hub", path, revision]))
    # A finished folder of ours has its model in a subfolder, which alone counts.
    own = folder / "model"
    files = sorted(f for f in (own if own.is_dir() else folder).iterdir() if f.is_file() and f.name[0] != ".")
    return Artifact(folder, content_hash(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files)))


@cache
def content_hash(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Hash of names and contents; each file comes with size and time of change, so that it is read again only then."""
    digest = hashlib.blake2b(digest_size=16)
    with progress_bar(sum(size for _, size, _ in files), "hashing model files", unit="B") as bar:
        for file, size, _ in files:
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as handle:
                for block in iter(lambda: handle.read(1 << 24), b""):
                    digest.update(block)
                    bar.update(len(block))
    return digest.hexdigest()


def fingerprint(data: Any) -> str:
    """Hash of plain data, independent of the order of mappings."""
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@cache
def code_revision() -> str:
    """The git commit of the code, marked where files differ from it; 'unknown' outside a checkout."""
    here = Path(__file__).parent
    git = shutil.which("git")
    if git is None:
        return "unknown"
    try:
        commit = subprocess.run([git, "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        status = subprocess.run([git, "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError:
        return "unknown"
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")


@cache
def library_versions() -> dict[str, str]:
    """Versions that figures may depend on."""
    names = ("torch", "transformers", "tokenizers", "numpy")
    return {"python": platform.python_version(), "cores": str(os.cpu_count()), **{n: version(n) for n in names}}
