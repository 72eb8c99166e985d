"""Rows become records; a row that cannot be used ends the run, or is counted and listed.

dataset.on_invalid=error ends the run with the first such row, skip leaves them out, up to a share beyond which the file
is not what it was taken for. Published sets hold such rows: the test set of HH helpful-base has 2 pairs of identical
responses, 4 empty replies and 2 pairs that answer different queries. Rows of another task that a published set holds by
design (`BY_DESIGN`) are counted and left out in either case.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import IO, Any

from rdo.data.columns import RowError
from rdo.data.files import Placed, TextRow
from rdo.data.formats import FORMATS, columns_read, find_format, read_row, structured
from rdo.data.records import Preference, Record, content_id, id_key
from rdo.runtime.errors import DataError, UserError

BY_DESIGN = ("articles", "unranked", "separate_conversations")


@dataclass
class Reading:
    """The settings by which rows are read, and what reading has met so far.

    format: "auto" until it is told from the first row. listed: where a line of JSON is written for each invalid row.
    counts: `rows_read`, `dropped_<reason>` for rows of BY_DESIGN and for preferences between identical responses, and
    `invalid_<reason>`. columns, read: the columns that rows had a value in, and those of them that the format looks at.
    """

    format: str = "auto"
    on_invalid: str = "error"
    max_invalid_share: float = 0.01
    listed: IO[str] | None = None
    counts: Counter[str] = field(default_factory=Counter)
    usable: int = 0
    invalid: int = 0
    first: str = ""
    columns: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    taken: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.told = self.format == "auto"
        if not self.told and self.format not in FORMATS:
            raise DataError(f"dataset.format={self.format} is not known; choose auto, {', '.join(FORMATS)}")

    def records(self, rows: Placed, split: str | None = None) -> Iterator[Record]:
        """Records of the rows, in their order, with ids of their own.

        rows: pairs of a place for messages ("FILE, line 12") and the row, a dict of columns, or the RowError that
        stands in its place. split: of all rows; None: the one that a row names itself, if it does. Raises DataError for
        a row that cannot be used, and UserError where a file is of another format than those before.
        """
        last = None
        for place, row in rows:
            self.counts["rows_read"] += 1
            file = place.rpartition(", ")[0]
            try:
                if self.told and file != last and isinstance(row, dict):
                    self._tell(row, place)
                found = [(record, self._informative(record)) for record in self._read(row)]
                records = [
                    replace(record, id=self._id(record), preferences=kept, place=place, split=split or record.split)
                    for record, kept in found
                ]
            except RowError as error:
                self._refuse(place, error)
                continue
            last = file
            self.usable += 1
            yield from records

    def judge(self) -> None:
        """Raises DataError where too many of the rows were invalid, or none could be used."""
        rows = self.counts["rows_read"]
        if self.invalid > self.max_invalid_share * rows:
            raise DataError(
                f"{self.first} (this is the first of {self.invalid} invalid rows of {rows}, more than "
                f"dataset.max_invalid_share={self.max_invalid_share:g} allows)"
                + (f"; all of them are listed in {self.listed.name}" if self.listed else "")
            )
        if rows and not self.usable:
            raise DataError(f"{self.first} (no row of {rows} can be used; this is said of the first)")

    def _tell(self, row: dict[str, Any], place: str) -> None:
        """Sets the format by the first row of a file."""
        found = find_format(row)
        if self.format == "auto":
            self.format = found
        if found != self.format and {found, self.format} != {"rrhf", "records"}:
            raise UserError(
                f"{place}: looks like format '{found}', and the rows before are '{self.format}'; read them in separate "
                "runs, or set dataset.format to the one that all are meant to be"
            )

    def _read(self, row: Any) -> list[Record]:
        if isinstance(row, RowError):
            raise row
        if not isinstance(row, dict):
            raise RowError("", f"must be an object of columns, found {type(row).__name__}")
        if isinstance(row, TextRow):
            row = {n: _cell(text) if n in structured(row, self.format) else text for n, text in row.items()}
        if not self.columns.issuperset(row):
            self.columns.update(name for name, value in row.items() if value is not None)
            self.read |= columns_read(row, self.format)
        return read_row(row, self.format)

    def _informative(self, record: Record) -> tuple[Preference, ...]:
        """The record's preferences but those between identical texts."""
        texts = record.responses
        if len(texts) > 1 and len(set(texts)) == 1:
            problem = "all responses are identical, so there is no preference; delete the row"
            raise RowError("", problem, "identical_responses")
        kept = tuple(p for p in record.preferences if p.tie or texts[p.chosen] != texts[p.rejected])
        self.counts["dropped_identical_preferences"] += len(record.preferences) - len(kept)
        return kept

    def _id(self, record: Record) -> str:
        """An id of the record's own: the data's must differ; one that we made and is taken gets "-2"."""
        name = record.id or content_id(record.query, record.responses)
        key = id_key(name)
        self.taken[key] += 1
        if self.taken[key] == 1:
            return name
        if record.id:
            raise RowError("id", f"{name!r:.60} is taken by a row before; make ids unique", "repeated_id")
        return f"{name}-{self.taken[key]}"

    def _refuse(self, place: str, error: RowError) -> None:
        """Raises, lists or only counts, as the row's fault and the settings demand."""
        message = f"{place}{error}"
        self.first = self.first or message
        if error.reason in BY_DESIGN:
            self.counts[f"dropped_{error.reason}"] += 1
            return
        if self.on_invalid == "error":
            raise DataError(f"{message}; dataset.on_invalid=skip leaves such rows out and lists them") from error
        self.counts[f"invalid_{error.reason}"] += 1
        self.invalid += 1
        if self.listed:
            self.listed.write(json.dumps({"place": place, "reason": error.reason, "message": message}) + "\n")


def _cell(text: str) -> Any:
    """A cell of a table of text that holds no text: JSON (or True and False), an empty one is missing."""
    text = text.strip()
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text) if text else None
    except (ValueError, RecursionError):
        return text
