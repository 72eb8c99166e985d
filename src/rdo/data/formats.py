"""The row formats: which of them a row is in, and its records, or what is wrong with it."""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AliasChoices, ValidationError

from rdo.data import candidates, pairs, verdicts  # noqa: F401 (which register their formats)
from rdo.data.chat import ALIASES, Query
from rdo.data.columns import Row, RowError, row_error, shown
from rdo.data.pairs import PROMPTS
from rdo.data.records import Record
from rdo.data.templates import ASSISTANT

FORMATS = Row.layouts
# What a table makes of messages when they are written as text.
WRITTEN_OUT = re.compile(r"\s*\[?\s*\{\s*['\"](role|content|from|value)['\"]\s*:")


def read_row(row: dict[str, Any], format: str) -> list[Record]:
    """The records of a row, at least one. Raises RowError, which names the field."""
    layout = _layout(row, format)
    for names in needed(layout):
        if all(row.get(name) is None for name in names):
            field = next((name for name in names if name in row), names[0])
            raise RowError(field, f"missing; a row of format '{format}' needs {in_words(format)}")
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
    columns = f"columns [{', '.join(shown(name) for name in sorted(map(str, row))[:20])}]"
    if not found:
        known = "; ".join(f"{name}: {in_words(name)}" for name in FORMATS)
        raise RowError("", f"{columns} fit no known format ({known}); rename them")
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


def _missing(layout: type[Row], row: dict[str, Any]) -> int:
    return sum(all(row.get(name) is None for name in names) for names in needed(layout))


def _layout(row: dict[str, Any], format: str) -> type[Row]:
    """The layout of the format that the row is in, or the one of which least is missing."""
    return min(FORMATS[format], key=lambda layout: _missing(layout, row))


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
