"""Checks that every format shares: a field's value comes back with its type, or an error says where and why not."""

from __future__ import annotations

import math
from typing import Any

from rdo.errors import DataError

LONGEST_SHOWN = 60


class UnusableRow(DataError):
    """A well-formed row that says nothing about which response is better; `reason` names the count it goes to."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def describe(place: str, field: str, problem: str) -> str:
    return f"{place}, field '{field}': {problem}"


def shown(value: str) -> str:
    """Text of the data for a message: in quotes, its beginning only, whatever cannot be printed escaped."""
    return f"{value[:LONGEST_SHOWN]!r}" + ("..." if len(value) > LONGEST_SHOWN else "")


def typed(value: object, kind: type, place: str, field: str) -> Any:
    """The value, checked to be there and of the type (a bool is no int)."""
    if value is None:
        raise DataError(describe(place, field, "missing; add it or delete the row"))
    if not isinstance(value, kind) or isinstance(value, bool):
        problem = f"must be of type {kind.__name__}, found {type(value).__name__}; correct it or delete the row"
        raise DataError(describe(place, field, problem))
    return value


def text(value: object, place: str, field: str) -> str:
    checked: str = typed(value, str, place, field)
    try:
        checked.encode()
    except UnicodeEncodeError as error:
        problem = f"character {error.start} is half of a surrogate pair; replace it"
        raise DataError(describe(place, field, problem)) from error
    return checked


def query_text(value: object, place: str, field: str) -> str:
    checked = text(value, place, field)
    if not checked.strip():
        raise DataError(describe(place, field, "the query is empty; fill it in or delete the row"))
    return checked


def response(value: object, place: str, field: str) -> str:
    checked = text(value, place, field)
    if not checked.strip():
        problem = "the response is empty; fill it in or delete the row"
        raise UnusableRow(describe(place, field, problem), "blank_responses")
    return checked


def listed(value: object, place: str, field: str, fewest: int = 0, count: int | None = None) -> list[Any]:
    """A list of at least `fewest` entries, or of as many as there are responses (`count`)."""
    values: list[Any] = typed(value, list, place, field)
    if len(values) < fewest:
        raise DataError(describe(place, field, f"needs at least {fewest}, found {len(values)}; delete the row"))
    if count is not None and len(values) != count:
        problem = f"{len(values)} {field} for {count} responses; give one for each"
        raise DataError(describe(place, field, problem))
    return values


def responses(value: object, place: str, field: str, fewest: int = 2) -> tuple[str, ...]:
    values = listed(value, place, field, fewest)
    return tuple(response(entry, place, f"{field}[{index}]") for index, entry in enumerate(values))


def number(value: object, place: str, field: str) -> float:
    try:
        checked = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        checked = math.inf
    if not math.isfinite(checked):
        raise DataError(describe(place, field, "must be a finite number; correct it or delete the row"))
    return checked


def numbers(value: object, place: str, field: str, count: int) -> tuple[float, ...]:
    values = listed(value, place, field, count=count)
    return tuple(number(entry, place, f"{field}[{index}]") for index, entry in enumerate(values))


def flag(value: object, place: str, field: str) -> bool:
    """True or False, also written as 1 or 0."""
    if not isinstance(value, int | float) or value not in (0, 1):
        raise DataError(describe(place, field, "must be true or false; correct it or delete the row"))
    return bool(value)


def choice(value: object, options: tuple[int, ...], place: str, field: str) -> int:
    checked: int = typed(value, int, place, field)
    if checked not in options:
        known = f"{', '.join(map(str, options[:-1]))} or {options[-1]}"
        raise DataError(describe(place, field, f"must be {known}; correct it or delete the row"))
    return checked


def strength(value: object, place: str, field: str) -> float | None:
    if value is None:
        return None
    if (checked := number(value, place, field)) < 0:
        raise DataError(describe(place, field, "is negative; swap chosen and rejected instead"))
    return checked


def identifier(value: object, place: str, field: str) -> str:
    """The id that the data bring, or "" for one to be made."""
    if value is None or value == "":
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise DataError(describe(place, field, "must be text or a whole number; leave it out to have one made"))
    return text(str(value), place, field)
