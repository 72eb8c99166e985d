"""What stages leave behind: one folder each, named by a key over everything that determined it.

The key hashes the stage's settings and the keys of its inputs. So what is done is found again and skipped, a changed
setting upstream leads to new folders downstream, points of a sweep never overwrite each other and share what they
have in common, and a stale result cannot be taken for a fresh one. The manifest, written last, lists the folder's
files, so that one that is missing, cut short or edited is found before anything is made of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
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

from rdo import interrupts
from rdo.adapters import adapter_base, is_adapter
from rdo.distributed import from_first, meet, world
from rdo.errors import UserError
from rdo.files import held, patiently, read_json, remove_leftovers, write_errors, write_json
from rdo.lineage import MANIFEST
from rdo.progress import progress_bar
from rdo.schema import EngineConfig

# Raised whenever a stage's output changes its meaning, so that older folders are not mistaken for it.
ARTIFACT_VERSION = 2
# What a stage that was interrupted goes on from; removed when it is finished.
PARTIAL = ("checkpoints", "shards")
# Not results either: wandb goes on writing there.
UNLISTED = (*PARTIAL, "wandb")
# Files up to this size are listed with a hash of their content, larger ones with their size alone.
HASHED_BYTES = 64 * 2**20


class MissingInput(UserError):
    """An input is not there, and the run was told not to make it."""


@dataclass(frozen=True)
class Artifact:
    """A finished result: the folder that holds it, and the key that later stages hash into theirs."""

    folder: Path
    key: str

    def manifest(self) -> dict[str, Any]:
        """What `produce` wrote of it. Raises UserError where that is damaged."""
        return read_manifest(self.folder)

    def file(self, name: str) -> Path:
        """One of its files, to be read. Raises UserError where its content is not what was written."""
        listed = self.manifest()["files"].get(name)
        path = self.folder / name
        check_size(self.folder, name, listed)
        if "blake2b" in listed and file_hash(path) != listed["blake2b"]:
            raise damaged(self.folder, f"{path} has been changed since it was made")
        return path


@dataclass(frozen=True)
class Provenance:
    """What every manifest records beside its settings, and how inputs that are missing come about."""

    run_dir: Path
    command: str
    config: dict[str, Any]
    build_inputs: bool = True
    disk_full_minutes: float = EngineConfig.disk_full_minutes


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
    the stage that was asked for. Raises MissingInput where an input is missing and build_inputs is off, UserError
    where a finished folder is damaged, and Stopped when the process is asked to stop.
    """
    described = {"version": ARTIFACT_VERSION, "stage": stage, "settings": settings}
    key = fingerprint([described, {name: artifact.key for name, artifact in sorted(inputs.items())}])
    folder = provenance.run_dir / stage / f"{label}-{key[:10]}"
    artifact = Artifact(folder, key)
    first = world().first
    if from_first(lambda: found(folder)):
        if requested:
            print(f"[{stage}] done already: {folder}", flush=True)
        if first:
            remove_partial(folder)
        return artifact
    if not requested and not provenance.build_inputs:
        command = provenance.command.replace(" build_inputs=false", "")
        raise MissingInput(f"the input {stage} ({label}) is not there; make it: {command}")
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with held(folder, provenance.command) if first else nullcontext():
        if from_first(lambda: found(folder)):
            return artifact
        if first:
            remove_leftovers(folder)
        meet()
        print(f"[{stage}] {folder}", flush=True)
        started = time.perf_counter()
        results = (make(folder) if together else from_first(lambda: make(folder))) or {}
        meet()
        manifest = {
            **described,
            "label": label,
            "key": key,
            "inputs": {name: {"folder": shown(a.folder, provenance), "key": a.key} for name, a in inputs.items()},
            "results": results,
        }
        with interrupts.postponed():
            if first:
                finish(folder, manifest, started, provenance)
            meet()
        interrupts.check(f"{folder} is finished, and the same command goes on")
    return artifact


def finish(folder: Path, manifest: dict[str, Any], started: float, provenance: Provenance) -> None:
    """Completes and writes the manifest, and removes what an interrupted run would have gone on from."""
    manifest |= {
        "files": listed_files(folder),
        "seconds": round(time.perf_counter() - started, 3),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": provenance.command,
        "config": provenance.config,
        "code_revision": code_revision(),
        "versions": library_versions(),
    }
    patiently(lambda: write_json(folder / MANIFEST, manifest), provenance.disk_full_minutes)
    remove_partial(folder)


def remove_partial(folder: Path) -> None:
    """Removes the part-way state of a finished stage; a process killed just then may have left some."""
    for name in PARTIAL:
        shutil.rmtree(folder / name, ignore_errors=True)


def listed_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size, and hash where it is small, of every file that is a result, by its path in the folder."""
    listed: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or parts[0] in (*UNLISTED, MANIFEST) or any(part.startswith(".") for part in parts):
            continue
        size = path.stat().st_size
        listed["/".join(parts)] = {"bytes": size, **({"blake2b": file_hash(path)} if size <= HASHED_BYTES else {})}
    return listed


def file_hash(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def shown(folder: Path, provenance: Provenance) -> str:
    """A folder as manifests name it: from the run folder on where it lies in there, so that the whole may move."""
    inside = folder.is_relative_to(provenance.run_dir)
    if inside:
        return str(folder.relative_to(provenance.run_dir))
    return str(folder.absolute() if folder.is_dir() else folder)


def is_finished(folder: Path) -> bool:
    """Whether a stage of ours ran to its end there; any folder may be asked about, such as a model's that the user
    brings. Raises UserError where a file that the manifest lists is not what it was."""
    try:
        manifest = read_manifest(folder)
    except UserError:
        return False
    for name, listed in manifest["files"].items():
        check_size(folder, name, listed)
    return True


def found(folder: Path) -> bool:
    """Whether a folder of `produce` is finished. Raises UserError where it was, and no longer is what it was."""
    if not (folder / MANIFEST).exists():
        return False
    read_manifest(folder)
    return is_finished(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished folder. Raises UserError where it cannot be read, or another version wrote it."""
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
    except (OSError, ValueError) as error:
        raise damaged(folder, f"{path} cannot be read ({type(error).__name__})") from error
    if not isinstance(manifest, dict) or "version" not in manifest:
        raise damaged(folder, f"{path} is no manifest")
    if manifest["version"] != ARTIFACT_VERSION:
        raise damaged(folder, f"{path} was made by another version of rdo")
    if not isinstance(manifest.get("files"), dict):
        raise damaged(folder, f"{path} lists no files")
    return manifest


def check_size(folder: Path, name: str, listed: dict[str, Any] | None) -> None:
    """Raises UserError unless the file is there, and as large as the manifest has it."""
    path = folder / name
    if listed is None:
        raise damaged(folder, f"{path} is not in the manifest")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise damaged(folder, f"{path} is missing") from error
    if size != listed["bytes"]:
        raise damaged(folder, f"{path} has {size} bytes, and had {listed['bytes']} when it was made")


def damaged(folder: Path, reason: str) -> UserError:
    """What to say of a finished folder that is not what it was."""
    return UserError(f"{reason}; delete {folder}: the same command makes it again")


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
    own = folder / "model" if (folder / "model").is_dir() else folder
    files = sorted(f for f in own.iterdir() if f.is_file() and f.name[0] != ".")
    facts = tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    key = from_first(lambda: content_hash(facts))
    if is_adapter(own):  # its base counts, too
        key = fingerprint([key, given(adapter_base(own), setting=setting).key])
    return Artifact(folder, key)


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
    names = ("torch", "transformers", "tokenizers", "numpy", "deepspeed", "peft")
    return {"python": platform.python_version(), "cores": str(os.cpu_count()), **{n: version(n) for n in names}}
