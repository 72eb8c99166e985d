"""Models that the user brings, as artifacts: a folder by the content of its files, a hub name by itself."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from rdo.models.lora import adapter_base, is_adapter
from rdo.runtime.errors import UserError
from rdo.runtime.processes import broadcast
from rdo.runtime.progress import progress_bar
from rdo.runtime.store import Artifact, fingerprint


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
    key = broadcast(lambda: content_hash(facts))
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
