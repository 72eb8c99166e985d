"""Rows of CSV, whose first row is the header."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from rdo.data.containers.problems import AGAIN, Broken, shown
from rdo.data.containers.text import LONGEST_LINE, Lines


class TextRow(dict[str, Any]):
    """A row whose cells are all text (CSV): numbers and lists in it are still to be parsed."""


def read_csv(stream: io.BufferedIOBase, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Pairs of a place and a TextRow, or Broken in its place."""
    csv.field_size_limit(LONGEST_LINE)
    lines, header, any_row = Lines(stream), list[str](), False
    records = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        where, cells = f"line {lines.number + 1}", list[str]()
        try:
            cells = next(records)
            problem = lines.take_problem()
        except StopIteration:
            break
        except csv.Error as error:
            reason = str(error).partition(" - ")[0]
            if reason.startswith(("unexpected end", "field larger")):  # it swallowed rows, nobody knows how many
                problem = f"a quote that opens in this row is never closed; mend it, or {AGAIN}"
                raise Broken(problem, where) from error
            problem = lines.take_problem() or f"is not CSV ({reason}); quote the cell, and double the quotes in it"
        if not problem and len(cells) < 2 and not "".join(cells).strip():
            continue
        if not header:
            header, problem = cells, problem or _judge_header(cells, delimiter)
            if problem:
                raise Broken(f"the header {problem}", where)
            continue
        if not problem and len(cells) != len(header):
            counts = f"{len(cells)} cells under a header of {len(header)}"
            problem = f"{counts}; quote cells that hold separators or line breaks"
        any_row = True
        yield where, Broken(problem) if problem else TextRow(zip(header, cells, strict=True))
    if not any_row:
        raise Broken(f"holds a header and no rows; {AGAIN}")


def _judge_header(header: list[str], delimiter: str) -> str | None:
    for number, name in enumerate(header, start=1):
        if not name.strip():
            return f"has no name for column {number}; name it (pandas: write with index=False)"
        if name in header[: number - 1]:
            return f"has the column '{shown(name)}' twice; rename one"
    other = next((sign for sign in ";\t,|" if sign in header[0] and sign != delimiter), None)
    if len(header) == 1 and other:
        return f"seems to be separated by '{shown(other)}'; separate by commas in .csv, by tabs in .tsv"
    return None
