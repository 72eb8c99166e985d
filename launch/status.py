#!/usr/bin/env python3
"""What is running, done and failed in a run folder, and where its logs are.

    launch/status.py [RUN_DIR]          (without: every folder of runs/)

Results are read from the folders themselves, jobs of sweeps (hydra/launcher=slurm) from what was
noted when they were submitted; what has become of them SLURM says, or, once it has forgotten them, their logs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from filelock import FileLock, Timeout

from rdo.runtime.errors import UserError
from rdo.runtime.failing import fail
from rdo.runtime.files import LOCK, read_json
from rdo.runtime.slurm import FAILED, FORGOTTEN, NOTE, last_error, queue
from rdo.runtime.store import MANIFEST, PARTIAL, read_manifest
from rdo.tracking import METRICS

# Folders of a run folder that hold no stage's results.
OTHERS = ("hydra", "slurm")


def results(run_dir: Path) -> Iterator[tuple[str, str]]:
    """Every result of a run folder, finished or begun: its state, and the rest of its line."""
    for folder in sorted(path for path in run_dir.glob("*/*") if path.is_dir() and path.parent.name not in OTHERS):
        name = f"{folder.relative_to(run_dir)!s:<44}"
        if (folder / MANIFEST).exists():
            try:
                manifest = read_manifest(folder)
            except UserError as error:
                yield "damaged", f"{name}  {error}"
                continue
            metric = manifest["results"].get("metric")
            value = "" if metric is None else f", metric {metric:g}"
            yield "done", f"{name}  {manifest['finished']}, {manifest['seconds']:.0f} s{value}"
        elif (folder / LOCK).exists():
            lines = (folder / METRICS).read_bytes().count(b"\n") if (folder / METRICS).exists() else 0
            steps = f"step {lines}; " if lines else ""
            if is_held(folder):
                yield "running", f"{name}  {steps}".rstrip("; ")
            else:
                kept = any((folder / part).is_dir() for part in PARTIAL)
                yield (
                    "stopped",
                    f"{name}  {steps}{'goes on from there' if kept else 'starts again'} when it is asked for",
                )


def is_held(folder: Path) -> bool:
    """Whether a process is making this result now."""
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True


def jobs(run_dir: Path) -> Iterator[tuple[str, str]]:
    """Every job that was submitted for a run folder: its state, and the rest of its line."""
    noted: dict[str, tuple[str, Path]] = {}
    for note in sorted(run_dir.glob(f"hydra/*/slurm/{NOTE}*.json")):
        noted |= {number: (title, Path(log)) for number, (title, log) in read_json(note).items()}
    if not noted:
        return
    states = known_states(sorted({number.partition("_")[0] for number in noted}))
    for number, (title, log) in sorted(noted.items(), key=lambda entry: [int(part) for part in entry[0].split("_")]):
        state = states.get(number, FORGOTTEN)
        error = last_error(log) if state in (*FAILED, FORGOTTEN) else None
        where = f"log: {log}" if log.exists() else "no log yet"
        yield state.lower(), f"{number} {title:<32}  {f'{error}; ' if error else ''}{where}"


def known_states(numbers: list[str]) -> dict[str, str]:
    """The states of jobs by number: as the queue has them, and those that it has forgotten as the accounts do."""
    try:
        states = queue(numbers) or {}
        command = [
            "sacct",
            "--noheader",
            "--parsable2",
            "--allocations",
            "--format=JobID,State",
            "-j",
            ",".join(numbers),
        ]
        accounts = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return {}
    kept = (line.split("|") for line in accounts.stdout.splitlines() if "|" in line)
    return {number: state.split()[0] for number, state in kept} | states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", nargs="*", type=Path)
    try:
        for run_dir in parser.parse_args().run_dir or sorted(Path("runs").glob("*")):
            if not run_dir.is_dir():
                raise UserError(f"{run_dir}: there is no such run folder")
            print(run_dir)
            for title, found in (("results", results(run_dir)), ("jobs", jobs(run_dir))):
                lines = [f"  {state:<20} {text}" for state, text in found]
                print(*([f" {title}", *lines] if lines else [f" no {title}"]), sep="\n")
    except Exception as error:
        fail(error)


if __name__ == "__main__":
    main()
