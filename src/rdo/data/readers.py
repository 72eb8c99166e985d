"""Rows become records; a row that cannot be used ends the run, or is counted and listed.

dataset.on_invalid=error ends the run with the first such row, skip leaves them out, up to a share beyond which the file
is not what it was taken for. Published sets hold such rows: the test set of HH helpful-base has 2 pairs of identical
responses, 4 empty replies and 2 pairs that answer different queries. Rows of another task that a published set holds by
design (`BY_DESIGN`) are counted and left out in either case.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from rdo.data.columns import RowError
from rdo.data.files import TextRow
from rdo.data.formats import FORMATS, columns_read, find_format, read_row, structured
from rdo.data.records import Record
from rdo.runtime.errors import DataError, UserError

BY_DESIGN = ("articles", "unranked", "separate_conversations")


@dataclass
class Reading:
    """What reading has met so far.

    counts: `rows_read`, `dropped_<reason>` for rows of BY_DESIGN and for preferences between identical responses, and
    `invalid_<reason>`. listed: called with place, reason and message of each invalid row. columns, read: the columns
    that rows had a value in, and those of them that the format looks at.
    """

    format: str = "auto"
    on_invalid: str = "error"
    max_invalid_share: float = 0.01
    listed: Callable[[str, str, str], None] = lambda place, reason, message: None
    counts: Counter[str] = field(default_factory=Counter)
    invalid: int = 0
    first: str = ""
    columns: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)

    def ignored(self) -> list[str]:
        """Columns that nothing was read from."""
        return sorted(map(str, self.columns - self.read))

    def refuse(self, place: str, error: RowError) -> None:
        """Raises, lists or only counts, as the row's fault and the settings demand."""
        message = f"{place}{error}"
        self.first = self.first or message
        if error.reason in BY_DESIGN:
            self.counts[f"dropped_{error.reason}"] += 1
        elif self.on_invalid == "error":
            raise DataError(f"{message}; dataset.on_invalid=skip leaves such rows out and lists them") from error
        else:
            self.counts[f"invalid_{error.reason}"] += 1
            self.invalid += 1
            self.listed(place, error.reason, message)

    def judge(self, usable: int) -> None:
        """Raises DataError where too many rows were invalid, or none is left."""
        rows = self.counts["rows_read"]
        if self.invalid > self.max_invalid_share * rows:
            raise DataError(
                f"{self.first} (this is the first of {self.invalid} invalid rows of {rows}, more than "
                f"dataset.max_invalid_share={self.max_invalid_share:g} allows)"
            )
        if rows and not usable:
            raise DataError(f"{self.first} (no row of {rows} can be used; this is said of the first)")


def read_records(rows: Iterable[tuple[str, Any]], reading: Reading) -> Iterator[Record]:
    """Records of the rows, in their order, ids as the data gives them ("" where it gives none).

    rows: pairs of a place for messages ("FILE, line 12") and the row, a dict of columns, or the RowError that stands
    in its place. The format, if it is "auto", is told from the first row; other files must be in it, too (UserError).
    Raises DataError for a row that cannot be used (see `Reading`), for too many of them, and when no row is left.
    """
    if reading.format not in ("auto", *FORMATS):
        raise DataError(f"dataset.format={reading.format} is not known; choose auto, {', '.join(FORMATS)}")
    told, usable, last = reading.format == "auto", 0, ""
    for place, row in rows:
        reading.counts["rows_read"] += 1
        file = place.rpartition(", ")[0]
        try:
            if told and file != last and isinstance(row, dict):
                _tell(row, place, reading)
            records = [_informative(record, place, reading) for record in _row_records(row, reading)]
        except RowError as error:
            reading.refuse(place, error)
            continue
        last = file
        usable += 1
        yield from records
    reading.judge(usable)


def _tell(row: dict[str, Any], place: str, reading: Reading) -> None:
    """Sets the format by the first row of a file. Raises UserError where the files before were in another one."""
    found = find_format(row)
    if reading.format == "auto":
        reading.format = found
    if found != reading.format and {found, reading.format} != {"rrhf", "records"}:
        raise UserError(
            f"{place}: looks like format '{found}', and the rows before are '{reading.format}'; read them in separate "
            "runs, or set dataset.format to the one that all are meant to be"
        )


def _row_records(row: Any, reading: Reading) -> list[Record]:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError("", f"must be an object of columns, found {type(row).__name__}")
    if isinstance(row, TextRow):
        row = {n: _cell(text) if n in structured(row, reading.format) else text for n, text in row.items()}
    if not reading.columns.issuperset(row):
        reading.columns.update(name for name, value in row.items() if value is not None)
        reading.read |= columns_read(row, reading.format)
    return read_row(row, reading.format)


def _informative(record: Record, place: str, reading: Reading) -> Record:
    """The record with its place, and without preferences between identical texts."""
    texts = record.responses
    if len(texts) > 1 and len(set(texts)) == 1:
        problem = "all responses are identical, so there is no preference; delete the row"
        raise RowError("", problem, "identical_responses")
    kept = tuple(p for p in record.preferences if p.tie or texts[p.chosen] != texts[p.rejected])
    reading.counts["dropped_identical_preferences"] += len(record.preferences) - len(kept)
    return replace(record, preferences=kept, place=place)


def _cell(text: str) -> Any:
    """A cell of a table of text that holds no text: JSON (or True and False), an empty one is missing."""
    text = text.strip()
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text) if text else None
    except (ValueError, RecursionError):
        return text
