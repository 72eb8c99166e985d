"""What is finished in a run folder, for a report of a sweep: every evaluation, and what it was made with.

Nothing is composed anew: manifests say which settings, of a stage and of everything upstream, led to a result.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rdo.artifacts import MANIFEST, Artifact, is_finished, read_manifest
from rdo.checks import schema, typed
from rdo.errors import UserError
from rdo.lineage import SWEPT, determinants
from rdo.schema import Config

SHOWN_LENGTH = 16  # of a value in a row's name: fingerprints are longer


@dataclass(frozen=True)
class Found:
    """A finished evaluation: its name among the others, its config, with the right eval.subject, and its command."""

    name: str
    config: Config
    command: str
    artifact: Artifact


def finished_evaluations(run_dir: Path) -> tuple[list[Found], list[str]]:
    """The finished evaluations of a run folder, each with a name of its own, and why others cannot be shown.

    A name is the folder's label and what else tells it from those of the same label: "dpo-diff-0.5, loss.beta=0.3".
    """
    artifacts, problems = [], []
    for path in sorted((run_dir / "eval").glob(f"*/{MANIFEST}")):
        try:
            if is_finished(path.parent):
                artifacts.append(Artifact(path.parent, read_manifest(path.parent)["key"]))
            else:
                read_manifest(path.parent)  # says why not
        except UserError as error:
            problems.append(str(error))
    found = []
    for artifact, name in zip(artifacts, names(run_dir, artifacts), strict=True):
        manifest = artifact.manifest()
        try:
            config = typed(DictConfig(OmegaConf.merge(schema(), manifest["config"])))
        except (OmegaConfBaseException, UserError) as error:
            problems.append(f"{artifact.folder}: its settings are those of another version of rdo ({error})")
            continue
        config.eval.subject = subject_of(manifest)
        found.append(Found(name, config, manifest["command"], artifact))
    return found, problems


def subject_of(manifest: Mapping[str, Any]) -> Any:
    """The eval.subject of an evaluation, which may have been made for another's sake."""
    if "scorer" in manifest["inputs"]:
        return str(manifest["label"]).removeprefix("scorer-")
    return "policy" if "base" in manifest["inputs"] else "base"


def names(run_dir: Path, artifacts: list[Artifact]) -> list[str]:
    """One name for each evaluation; those that differ in their seed alone have the same."""
    manifests = [artifact.manifest() for artifact in artifacts]
    settings = [determinants(run_dir, manifest) for manifest in manifests]
    found = []
    for manifest, own in zip(manifests, settings, strict=True):
        alike = [other for one, other in zip(manifests, settings, strict=True) if one["label"] == manifest["label"]]
        keys = dict.fromkeys(key for other in alike for key in other)
        differing = [key for key in keys if len({json.dumps(other.get(key)) for other in alike}) > 1]
        parts = [f"{short(key)}={str(own.get(key))[:SHOWN_LENGTH]}" for key in differing]
        found.append(", ".join([manifest["label"], *parts]))
    seeds = [manifest["config"]["seed"] for manifest in manifests]
    repeated = Counter(zip(found, seeds, strict=True))
    # The same settings on different models of the user's, say: the folder tells them apart.
    return [
        f"{name}, {artifact.folder.name}" if repeated[name, seed] > 1 else name
        for name, seed, artifact in zip(found, seeds, artifacts, strict=True)
    ]


def short(key: str) -> str:
    """A setting's name nearer to what it is called on the command line."""
    return SWEPT.get(key, key.replace(".training.", ".").replace(".settings.", "."))
