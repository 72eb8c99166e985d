"""Readers: rows of any format, from files or the hub, become records; a row that cannot be used says where and why.

Such a row ends the run (dataset.on_invalid=error), or is left out, counted and listed (skip), up to a share of the rows
beyond which the file is not what it was taken for. Published sets hold such rows: the test set of HH helpful-base has 2
pairs of identical responses, 4 empty replies and 2 pairs that answer different queries. Rows of another task that a
published set holds by design (`BY_DESIGN`) are counted and left out in either case.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

from rdo.data.containers import TextRow
from rdo.data.formats import READERS, UnusableRow, find_format, needed, other_spelling
from rdo.data.records import Record
from rdo.errors import DataError

BY_DESIGN = ("articles", "unranked", "separate_conversations")
# A file whose first so many rows are all invalid is read as something that it is not.
HOPELESS = 1000
LEAVE_OUT = "; dataset.on_invalid=skip leaves such rows out and lists them"
# So many rows are looked at for one that can be used, before leaving out the others is advised.
SAMPLE = 100
MOST_COLUMNS = 1000


class Noticed(dict[str, Any]):
    """A row that notes which of its columns are asked for."""

    def __init__(self, row: dict[str, Any], read: set[str]):
        super().__init__(row)
        self.read = read

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


@dataclass
class Reading:
    """What reading has met so far.

    counts: `rows_read`, `dropped_<reason>` for rows of BY_DESIGN and for preferences between identical responses, and
    `invalid_<reason>`. listed: called with place, reason and message of each invalid row. columns, read: the columns
    that rows had a value in (of MOST_COLUMNS at most), and those of them that the format's reader looked at.
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

    def refuse(self, place: str, error: DataError, others: Callable[[], bool] = lambda: True) -> None:
        """Raises, lists or only counts, as the row's fault and the settings demand; `others` tells whether there are
        rows without a fault: otherwise leaving them out is no advice."""
        reason = error.reason if isinstance(error, UnusableRow) else "broken"
        if reason in BY_DESIGN:
            self.counts[f"dropped_{reason}"] += 1
            self.first = self.first or str(error)
            return
        if self.on_invalid == "error":
            raise DataError(f"{error}{LEAVE_OUT if others() else ''}") from error
        self.counts[f"invalid_{reason}"] += 1
        self.invalid += 1
        self.first = self.first or str(error)
        self.listed(place, reason, str(error))

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

    rows: pairs of a place for messages ("FILE, line 12") and the row, a dict of columns, or the DataError that stands
    in its place. The format, if `reading.format` is "auto", is told from the first row. Raises DataError, naming place
    and field, for a row that cannot be used (see `Reading`), for too many of them, and when no row is left.
    """
    if reading.format != "auto" and reading.format not in READERS:
        raise DataError(f"dataset.format={reading.format} is not known; choose auto, {', '.join(READERS)}")
    usable, rows, found_in = 0, iter(rows), ""
    told = reading.format == "auto"
    for place, row in rows:
        reading.counts["rows_read"] += 1
        source = place.rpartition(", ")[0]
        if told and source != found_in and reading.format != "auto":
            _check_alike(row, place, found_in, reading.format)
        try:
            found = list(_row_records(row, place, reading))
        except DataError as error:
            reading.refuse(place, error, partial(_any_usable, usable, rows, reading))
            if reading.invalid == HOPELESS and not usable:
                reading.judge(usable)
            continue
        found_in = source
        usable += 1
        yield from found
    reading.judge(usable)


def _check_alike(row: Any, place: str, before: str, format: str) -> None:
    """Raises DataError where the first row of another file looks like another format than the files before."""
    try:
        own = find_format(row, place)
    except (DataError, AttributeError):  # it is a broken row, or none of any format: which reading it will say
        return
    if READERS[own].read is not READERS[format].read:
        raise DataError(
            f"{place}: looks like format '{own}', and {before or 'what was read before'} is '{format}'; read them in "
            "separate runs, or set dataset.format to the one that all are meant to be"
        )


def _any_usable(before: int, rows: Iterator[tuple[str, Any]], reading: Reading) -> bool:
    """Whether any row can be used: one of those before, or one of the next few, which are read for that."""
    if before:
        return True
    trial = Reading(reading.format)
    try:
        for place, row in islice(rows, SAMPLE):
            with suppress(DataError):
                list(_row_records(row, place, trial))
                return True
    except DataError:  # the file's
        pass
    return False


def _row_records(row: Any, place: str, reading: Reading) -> Iterator[Record]:
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"{place}: must be an object of columns, found {type(row).__name__}; write one object a row")
    if reading.format == "auto":
        reading.format = find_format(row, place)
    reader = READERS[reading.format]
    if isinstance(row, TextRow):
        row = {name: _cell(name, text, reader.structured, place) for name, text in row.items()}
    if len(reading.columns) < MOST_COLUMNS and not reading.columns.issuperset(row):
        reading.columns.update(name for name, value in row.items() if value is not None)
    row = Noticed(row, reading.read)
    for name in reader.columns:
        if row.get(name) is None:
            needs = f"a row of format '{reading.format}' needs {needed(reader)}"
            raise DataError(f"{place}, field '{name}': missing; {needs}{other_spelling(name, row)}")
    for record in reader.read(row, place):
        if len(record.responses) > 1 and len(set(record.responses)) == 1:
            problem = "all responses are identical, so there is no preference; delete the row"
            raise UnusableRow(f"{place}: {problem}", "identical_responses")
        informative = tuple(p for p in record.preferences if p.tie or _differ(record, p.chosen, p.rejected))
        reading.counts["dropped_identical_preferences"] += len(record.preferences) - len(informative)
        yield replace(record, preferences=informative, place=place)


def _differ(record: Record, chosen: int, rejected: int) -> bool:
    return record.responses[chosen] != record.responses[rejected]


def _cell(name: str, text: str, structured: tuple[str, ...], place: str) -> Any:
    """A cell of a text table: text as it is, anything else as JSON (or True and False), an empty one as missing."""
    if name not in structured:
        return text
    text = text.strip()
    if not text:
        return None
    if re.fullmatch("(?i)true|false", text):
        text = text.lower()
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}, field '{name}': the cell is not JSON ({error}); quote it as JSON would") from error
