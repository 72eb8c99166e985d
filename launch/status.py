#!/usr/bin/env python3
"""What is done, running and stopped in a run folder, and what the jobs of its sweeps (hydra/launcher=slurm) do.

launch/status.py [RUN_DIR]          (without: every folder of runs/)
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from filelock import FileLock, Timeout

from rdo.runtime.files import LOCK
from rdo.runtime.store import MANIFEST, read_manifest
from rdo.tracking import METRICS


def results(run_dir: Path) -> Iterator[tuple[str, str]]:
    """Every result of a run folder, finished or begun: its state, and the rest of its line."""
    for folder in sorted({file.parent for name in (MANIFEST, LOCK) for file in run_dir.glob(f"*/*/{name}")}):
        name = f"{folder.relative_to(run_dir)!s:<44}"
        if (folder / MANIFEST).exists():
            manifest = read_manifest(folder)
            metric = manifest["results"].get("metric")
            value = "" if metric is None else f", metric {metric:g}"
            yield "done", f"{name}  {manifest['finished']}, {manifest['seconds']:.0f} s{value}"
            continue
        lines = (folder / METRICS).read_text(errors="replace").splitlines() if (folder / METRICS).exists() else []
        try:
            with FileLock(folder / LOCK, timeout=0):
                state = "stopped"
        except Timeout:
            state = "running"
        yield state, f"{name}  {lines[-1][:80] if lines else ''}".rstrip()


def jobs(run_dir: Path) -> Iterator[tuple[str, str]]:
    """Every job that was begun for a run folder: its state, and the rest of its line."""
    states = {}
    if found := shutil.which("squeue"):
        command = [found, "--me", "--array", "--noheader", "--format=%i %T"]
        asked = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
        states = dict(line.split() for line in asked.stdout.splitlines())
    for log in sorted(run_dir.glob("hydra/*/slurm/*/*_0_log.out")):
        number, text = log.parent.name, log.read_text(errors="replace")
        ended = "done" if (log.parent / f"{number}_0_result.pkl").exists() else "failed" if found else "not done"
        state = states.get(number, ended).lower()
        # Why it failed, or the result that it makes.
        wanted = r"^(error: .*)" if state == "failed" else r"^\[\w+\] (?:done already: )?(\S*/\S+)$"
        said = re.findall(wanted, text, re.M)
        yield state, f"{number}  {''.join(f'{line}; ' for line in said[-1:])}log: {log}"


def main() -> None:
    for run_dir in [Path(given) for given in sys.argv[1:]] or sorted(Path("runs").glob("*")):
        if not run_dir.is_dir():
            sys.exit(f"error: {run_dir}: there is no such run folder")
        print(run_dir)
        for title, found in (("results", results(run_dir)), ("jobs", jobs(run_dir))):
            lines = [f"  {state:<12} {text}" for state, text in found]
            print(*([f" {title}", *lines] if lines else [f" no {title}"]), sep="\n")


if __name__ == "__main__":
    main()
