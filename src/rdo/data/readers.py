"""From rows to records: which format a row is in, its records, or what is wrong with it.

dataset.on_invalid=error ends the run with the first row that cannot be used, skip leaves them out, up to a share beyond
which the file is not what it was taken for. Published sets hold such rows: the test set of HH helpful-base has 2 pairs
of identical responses, 4 empty replies and 2 pairs that answer different queries. Rows of another task that a published
set holds by design (`BY_DESIGN`) are counted and left out in either case.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import IO, Annotated, Any, Literal, get_args, get_origin

from pydantic import AliasChoices, ValidationError

from rdo.data import candidates, verdicts  # noqa: F401 (which register their formats, as pairs does)
from rdo.data.chat import ALIASES, Query
from rdo.data.columns import Row, RowError, row_error, shown
from rdo.data.files import Placed, TextRow
from rdo.data.pairs import PROMPTS
from rdo.data.records import Preference, Record, content_id, id_key
from rdo.data.templates import ASSISTANT, HUMAN
from rdo.runtime.errors import DataError, UserError

FORMATS = Row.layouts
# What a table makes of messages when they are written as text.
WRITTEN_OUT = re.compile(r"\s*\[?\s*\{\s*['\"](role|content|from|value)['\"]\s*:")
BY_DESIGN = ("articles", "unranked", "separate_conversations", "human_turns")


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
        """The record's preferences but those between identical texts. Raises RowError where none could be of use."""
        texts = record.responses
        # HH's dialogues that end with the human, whose words would be imitated.
        if ASSISTANT in record.query and any(HUMAN in text for text in texts):
            raise RowError("", "a response goes on with the human's next turn; delete the row", "human_turns")
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


def read_row(row: dict[str, Any], format: str) -> list[Record]:
    """The records of a row, at least one. Raises RowError, which names the field."""
    layout = _layout(row, format)
    for names in _missing(layout, row):
        column = next((name for name in names if name in row), names[0])
        raise RowError(column, f"missing; a row of format '{format}' needs {in_words(format)}")
    try:
        return layout.model_validate(row).records()
    except ValidationError as error:
        raise row_error(error) from error


def find_format(row: dict[str, Any]) -> str:
    """The format whose required columns are all there, the one with most of them; a column that is null is not.

    Where formats share their columns, the values decide. Raises RowError if no format fits, or several do.
    """
    row = {name: value for name, value in row.items() if value is not None}
    layouts = {name: _layout(row, name) for name in FORMATS}
    sizes = {name: len(needed(layout)) for name, layout in layouts.items() if not _missing(layout, row)}
    found = [name for name, size in sizes.items() if size == max(sizes.values())]
    if found == ["hh", "trl_implicit"] or (found == ["trl"] and "prompt" not in row):
        found = [_format_of_pair(row)]
    columns = f"columns [{', '.join(shown(name) for name in sorted(map(str, row)))[:120]}]"
    if not found:
        nearest = min(FORMATS, key=lambda name: len(_missing(layouts[name], row)) / len(needed(layouts[name])))
        near = f"the nearest is {nearest}, which needs {in_words(nearest)[:100]}"
        raise RowError("", f"{columns} fit no known format ({near}); rename them to those of one of docs/data.md")
    if len(found) > 1:
        raise RowError("", f"{columns} fit {' and '.join(found)}; set dataset.format to the one that is meant")
    for column in {"prompt", "completion", "chosen", "rejected", "conversations"} & row.keys():
        if isinstance(row[column], str) and WRITTEN_OUT.match(row[column]):
            way_out = f"store the rows as JSON lines or Parquet, or set dataset.format={found[0]} if text is meant"
            raise RowError(column, f"is messages written out as text; {way_out}")
    return found[0]


def in_words(format: str) -> str:
    """The required columns of a format."""
    return " | ".join(", ".join(" or ".join(names) for names in needed(layout)) for layout in FORMATS[format])


def columns_read(row: dict[str, Any], format: str) -> set[str]:
    """The columns of a row that the format looks at."""
    layout = _layout(row, format)
    return {name for name in row if name in fields(layout) or layout.reads.fullmatch(str(name))}


def structured(row: dict[str, Any], format: str) -> set[str]:
    """The columns of a row of text cells that are no text, but JSON."""
    return {name for name, is_text in fields(_layout(row, format)).items() if not is_text}


@cache
def fields(layout: type[Row]) -> dict[str, bool]:
    """Every column of a layout, and whether it may hold a text."""
    columns = layout.model_fields.items()
    return {name: _may_be_text(f.annotation) for key, f in columns for name in _names(key, f.validation_alias)}


@cache
def needed(layout: type[Row]) -> list[tuple[str, ...]]:
    """The names of each required column, one of which must be there."""
    return [_names(key, f.validation_alias) for key, f in layout.model_fields.items() if f.is_required()]


def _names(key: str, alias: object) -> tuple[str, ...]:
    return tuple(map(str, alias.choices)) if isinstance(alias, AliasChoices) else (str(alias or key),)


def _may_be_text(kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(isinstance(value, str) for value in get_args(kind))
    inner = get_args(kind)[:1] if get_origin(kind) is Annotated else get_args(kind)
    return kind in (str, Query) or (get_origin(kind) is not list and any(map(_may_be_text, inner)))


def _missing(layout: type[Row], row: dict[str, Any]) -> list[tuple[str, ...]]:
    return [names for names in needed(layout) if all(row.get(name) is None for name in names)]


def _layout(row: dict[str, Any], format: str) -> type[Row]:
    """The layout of the format that the row is in, or the one of which least is missing."""
    return min(FORMATS[format], key=lambda layout: len(_missing(layout, row)))


def _format_of_pair(row: dict[str, Any]) -> str:
    """The format of a row of chosen and rejected without a column `prompt`."""
    both = (row["chosen"], row["rejected"])
    if any(isinstance(value, str) and ASSISTANT in value for value in both):
        return "hh"
    return "trl" if row.keys() & set(PROMPTS) and not all(map(_is_whole, both)) else "trl_implicit"


def _is_whole(value: object) -> bool:
    """Whether a value is a list of messages that holds the query, too: one that does not begin with the reply."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    role = value[0].get("role") or value[0].get("from")
    return ALIASES.get(str(role), role) != "assistant"
