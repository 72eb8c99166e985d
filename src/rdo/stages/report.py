"""Stage report, and the end of every comparison: what is evaluated in the run folder, as tables, figures and a page.

Nothing is made for it and nothing composed anew: manifests say which settings led to a result.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from rdo.report import page
from rdo.report.results import frame_of, rows_of
from rdo.runtime.errors import UserError
from rdo.runtime.files import replace_file
from rdo.runtime.processes import is_rank0
from rdo.runtime.store import code_revision
from rdo.settings import Config


def make_report(config: Config, failed: Mapping[str, str] | None = None) -> None:
    """Writes report.html, report.md, results.parquet and results.csv into report.folder, and prints a summary.

    failed: why points could not run, by name. Raises UserError where nothing is evaluated. One process does it.
    """
    if not is_rank0():
        return
    frame, problems = frame_of(Path(config.run_dir))
    if frame.empty:
        reason = f" ({problems[0]})" if problems else ""
        if failed:
            return  # which has been said
        raise UserError(f"run_dir={config.run_dir}: nothing is evaluated there{reason}; make something with stage=eval")
    rows = rows_of(frame)
    facts = {
        "Made": datetime.now(UTC).isoformat(timespec="seconds"),
        "Code": code_revision()[:10],
        "Folder": config.run_dir,
    }
    missing = {**(failed or {}), **{problem.partition(": ")[0]: problem for problem in problems}}
    view = page.view_of(config.report.title, facts, rows, missing, config.eval.samples)
    folder = Path(config.run_dir) / config.report.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.html", page.html(view)), ("report.md", page.markdown(view))):
        with replace_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    with replace_file(folder / "results.parquet") as temporary:
        frame.to_parquet(temporary)
    with replace_file(folder / "results.csv") as temporary:
        frame.to_csv(temporary, index=False)
    print(f"{page.text(view)}\nreport: {folder / 'report.html'}", flush=True)
