"""Stage report, and the end of every comparison: what is evaluated in the run folder, as tables, figures and a page.

Nothing is made for it and nothing composed anew: manifests say which settings led to a result.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from rdo.runtime.errors import UserError
from rdo.runtime.files import read_json, replace_file, write_json
from rdo.runtime.processes import is_rank0
from rdo.runtime.store import MANIFEST, code_revision, fingerprint
from rdo.settings import Config

# Beside the report: what it was made of, and what it said in short.
MADE = ".made.json"


def make_report(config: Config, failed: Mapping[str, str] | None = None, anew: bool = True) -> None:
    """Writes report.html, report.md, results.parquet and results.csv into report.folder, and prints a summary.

    failed: why points could not run, by name. anew=False: a report of the same results is not written again. Raises
    UserError where nothing is evaluated. One process does it.
    """
    if not is_rank0():
        return
    folder = Path(config.run_dir) / config.report.folder
    manifests = sorted((Path(config.run_dir) / "eval").glob(f"*/{MANIFEST}"))
    times = {str(file): file.stat().st_mtime_ns for file in manifests}
    key = fingerprint([times, failed or {}, config.report.title, config.eval.samples, code_revision()])
    made = read_json(folder / MADE) if (folder / MADE).exists() else {}
    if anew or made.get("key") != key:
        made = {"key": key, "said": write_report(config, folder, failed or {})}
        write_json(folder / MADE, made)
    print(made["said"], flush=True)


def write_report(config: Config, folder: Path, failed: Mapping[str, str]) -> str:
    """Writes the four files; what they say in short."""
    from rdo.report import page  # these load pandas and matplotlib
    from rdo.report.results import frame_of, rows_of

    frame, problems = frame_of(Path(config.run_dir))
    if frame.empty:
        if failed:
            return ""  # which has been said
        reason = f" ({problems[0]})" if problems else ""
        raise UserError(f"run_dir={config.run_dir}: nothing is evaluated there{reason}; make something with stage=eval")
    made = datetime.now(UTC).isoformat(timespec="seconds")
    facts = {"Made": made, "Code": code_revision()[:10], "Folder": config.run_dir}
    missing = {**failed, **{problem.partition(": ")[0]: problem for problem in problems}}
    view = page.view_of(config.report.title, facts, rows_of(frame), missing, config.eval.samples)
    for name, text in (("report.html", page.html(view)), ("report.md", page.markdown(view))):
        with replace_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    with replace_file(folder / "results.parquet") as temporary:
        frame.to_parquet(temporary)
    with replace_file(folder / "results.csv") as temporary:
        frame.to_csv(temporary, index=False)
    return f"{page.in_short(view)}\nreport: {folder / 'report.html'}"
