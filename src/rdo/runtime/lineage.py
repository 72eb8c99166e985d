"""What a finished result follows from: the settings of its own stage and of everything upstream, by their manifests."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from rdo.runtime.files import read_json
from rdo.runtime.store import MANIFEST

# What differs between seeds alone, in the toy world the data, too: its settings stand for it.
LEFT_OUT = (".seed", ".data.records")
# Of an evaluation's inputs what it is about, and not who judged.
SUBJECT = ("policy", "scorer")


def determinants(run_dir: Path, manifest: Mapping[str, Any], inputs: Collection[str] | None = None) -> dict[str, Any]:
    """Every setting that a result follows from, its data's and inputs' included (`inputs`: of these alone), by stage:
    "align.rc.alpha". Seeds are none of them: results that differ in their seed alone are of one kind."""
    found: dict[str, Any] = {}
    for name, entry in manifest["inputs"].items():
        if inputs is not None and name not in inputs:
            continue
        path = run_dir / entry["folder"] / MANIFEST
        if path.is_file():
            found |= determinants(run_dir, read_json(path))
        else:
            found[f"{manifest['stage']}.{name}"] = entry["folder"]
    found |= flat(manifest["config"].get("dataset", {}), "dataset")
    return found | dict(flat(manifest["settings"], manifest["stage"]))


def flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Nested settings as pairs of dotted name and value, without seeds and what follows from them."""
    if isinstance(value, Mapping):
        for name, member in value.items():
            yield from flat(member, f"{path}.{name}")
    elif not path.endswith(LEFT_OUT):
        yield path, value
