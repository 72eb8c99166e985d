"""Finished stages in wandb: what came out, tables of evaluations, and which folder was made of which others.

Every finished folder becomes an artifact, by reference: wandb is told names, sizes and places of the files and gets
none of them. Its run uses the artifacts of the folder's inputs, so that the way from the data to an evaluation can be
followed. All of it is made from manifests; so a stage that was made without wandb is shown when it is next used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rdo.errors import UserError
from rdo.files import read_json, read_json_lines, replace_file
from rdo.lineage import MANIFEST, swept
from rdo.printable import single_line
from rdo.progress import warn
from rdo.schema import TrackerConfig
from rdo.tracking import METRICS
from rdo.tracking.evaluations import media, numbers
from rdo.tracking.wandb_run import WandbRun

# In the folder's wandb folder: that it is published, and who is publishing it.
PUBLISHED, LOCK = "published", ".publish.lock"
# What only spares reading the data again; the data itself is an artifact by its own fingerprint.
CACHES = ("data", "tokens")
NAME_LENGTH = 128  # of wandb's artifacts


def publish(folder: Path, run_dir: Path, config: Mapping[str, Any]) -> None:
    """Shows a finished stage in wandb, once, if the config says tracker=wandb. The first process alone calls this.

    The stage is done whether or not that works: what goes wrong is a warning, and tried again when it is next used.
    """
    tracker = TrackerConfig(**config.get("tracker", {}))
    if tracker.name != "wandb" or folder.parent.name in CACHES:
        return
    own = folder / "wandb"
    if (own / PUBLISHED).exists():
        return
    import wandb

    try:
        own.mkdir(exist_ok=True)
        with FileLock(own / LOCK, timeout=0):
            show(tracker, folder, run_dir)
            with replace_file(own / PUBLISHED) as temporary:
                temporary.write_text(f"{tracker.project}\n")
    except Timeout:
        return  # another job is at it
    except (wandb.Error, UserError, OSError) as error:
        warn(f"{folder} is finished, but not shown in wandb, which is tried again when it is next used: "
             f"{single_line(str(error))}")  # fmt: skip


def show(tracker: TrackerConfig, folder: Path, run_dir: Path) -> None:
    """Logs a finished stage into its run: what training logged and wandb lacks, results, tables, artifacts."""
    manifest = read_json(folder / MANIFEST)
    run = WandbRun(tracker, folder, folder.name, manifest["config"])
    failed = True
    try:
        if METRICS in manifest["files"]:
            run.catch_up(read_json_lines(folder / METRICS))
        run.run.config.update({"made": made(manifest, run_dir)}, allow_val_change=True)
        run.run.summary.update({**numbers(results_of(manifest)), "stage_seconds": manifest["seconds"]})
        shown, figures = media(folder, manifest)
        run.run.summary.update(shown)
        if figures:
            run.log(run.last + 1, figures)
        for artifact in inputs_of(manifest, run_dir):
            # What use_artifact does with an artifact that is given as an object; it refuses to when offline.
            run.run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
        run.run.log_artifact(stage_artifact(folder, manifest))
        failed = False
    finally:
        run.finish(failed=failed)


def made(manifest: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """What dashboards draw results against: which stage it is, and alpha and the betas where they have an effect on it.
    (The config holds them always, and of a stage that jobs share it is that of the job that came first.)"""
    facts = {name: manifest[name] for name in ("stage", "label", "key", "code_revision")}
    return facts | {name.split(".")[-1]: value for name, value in swept(run_dir, manifest)[0].items()}


def results_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's results, without the last step's values, which wandb has by their own names."""
    return {name: value for name, value in manifest["results"].items() if name != "last"}


# ---------------------------------------------------------------------------------------------------------------------
# Artifacts
# ---------------------------------------------------------------------------------------------------------------------


def inputs_of(manifest: Mapping[str, Any], run_dir: Path) -> Iterator[Any]:
    """The artifacts of what a stage was made of: its data, stages of ours, and models that the user brought."""
    if data := manifest["settings"].get("data"):
        yield data_artifact(data, manifest["config"]["dataset"])
    for entry in manifest["inputs"].values():
        folder = run_dir / entry["folder"]
        if (folder / MANIFEST).is_file():
            yield stage_artifact(folder, read_json(folder / MANIFEST))
        else:
            yield model_artifact(folder, entry)


def stage_artifact(folder: Path, manifest: Mapping[str, Any]) -> Any:
    """A finished stage: its folder's name, and of its files names, sizes and places."""
    import wandb

    facts = {name: manifest[name] for name in ("key", "label", "code_revision", "command", "finished", "seconds")}
    inputs = {name: entry["folder"] for name, entry in manifest["inputs"].items()}
    artifact = wandb.Artifact(artifact_name(folder.name), manifest["stage"], metadata={**facts, "inputs": inputs})
    for name in manifest["files"]:
        refer(artifact, folder / name, name)
    return artifact


def data_artifact(data: Mapping[str, Any], dataset: Mapping[str, Any]) -> Any:
    """The records of a split, by their fingerprint, whatever file or folder they lie in."""
    import wandb

    shown = ("source", "path", "hub_name", "hub_config", "hub_revision")
    source = {name: str(dataset[name]) for name in shown if dataset.get(name) is not None}
    metadata = {**source, "split": data["split"], "records": data["records"]}
    return wandb.Artifact(
        artifact_name(f"{dataset['name']}-{data['split']}-{data['records'][:10]}"), "data", metadata=metadata
    )


def model_artifact(folder: Path, entry: Mapping[str, Any]) -> Any:
    """A model that the user brought: a folder, or a name on the hub."""
    import wandb

    name = Path(entry["folder"]).name
    artifact = wandb.Artifact(artifact_name(f"{name}-{entry['key'][:10]}"), "model", metadata=dict(entry))
    if folder.is_dir():
        for file in sorted(folder.iterdir()):
            if file.is_file() and not file.name.startswith("."):
                refer(artifact, file, file.name)
    return artifact


def refer(artifact: Any, path: Path, name: str) -> None:
    """Adds a file to an artifact by where it lies; one that was removed since is left out."""
    if path.is_file():
        artifact.add_reference(path.resolve().as_uri(), name=name, checksum=False)


def artifact_name(name: str) -> str:
    """A name as wandb takes it, its end kept, which tells it from others."""
    return re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)[-NAME_LENGTH:]
