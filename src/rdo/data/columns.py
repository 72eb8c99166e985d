"""What a column may hold, as types of pydantic, and what is wrong with a row, as one line for its reader."""

from __future__ import annotations

import re
from functools import cache, partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from rdo.data.records import Record
from rdo.runtime.errors import DataError

LONGEST_SHOWN = 60
# What is said in place of pydantic's own words, by the type of its error.
WORDS = {
    **{"string_type": "must be text", "list_type": "must be a list", "bool_type": "must be true or false"},
    **dict.fromkeys(("dict_type", "model_type"), "must be an object"),
    **{"float_type": "must be a finite number", "recursion_depth_exceeded": "is nested too deep"},
    "extra_forbidden": "is no column that is known here",
}


class RowError(DataError, ValueError):
    """A row cannot be used, or, raised by a check of pydantic's, a value within it, of which `field` is a part then.

    reason: `broken`, or, of a row that is well formed but says nothing about which response is better, why not
    (blank_responses, unranked, ...): the name of the count that it goes to.
    """

    def __init__(self, field: str, problem: str, reason: str = "broken") -> None:
        super().__init__(f", field '{field}': {problem}" if field else f": {problem}")  # goes on from the row's place
        self.field, self.problem, self.reason = field, problem, reason


class Columns(BaseModel):
    """An object within a row. Values are taken as they are: text is no number; what is null is not there."""

    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, row: object) -> object:
        return {name: value for name, value in row.items() if value is not None} if isinstance(row, dict) else row


class Row(Columns):
    """A row in one layout of a format's columns; the required ones tell it from others.

    reads: of columns that are no fields, which are read.
    """

    layouts: ClassVar[dict[str, list[type[Row]]]] = {}
    reads: ClassVar[re.Pattern[str]] = re.compile("(?!)")

    def __init_subclass__(cls, format: str = "", **others: Any) -> None:
        """Where a row fits several layouts of a format, the one that was written first counts."""
        super().__init_subclass__(**others)
        if format:
            Row.layouts.setdefault(format, []).append(cls)

    def records(self) -> list[Record]:
        """The records of the row, at least one. Raises RowError where its values do not go together."""
        raise NotImplementedError


def row_error(error: ValidationError) -> RowError:
    """The first thing that pydantic found wrong; its path is written as in `summaries[1].text`."""
    first = error.errors(include_url=False)[0]
    value, cause, reason = first["input"], first.get("ctx", {}).get("error"), "broken"
    path = [f"[{part}]" if isinstance(part, int) else f".{_key(part)}" for part in first["loc"]]
    problem = re.sub("^(Input|List) should", "must", WORDS.get(first["type"], first["msg"]))
    problem = f"{problem}, found {shown(value)}; correct it or delete the row"
    if value is None or first["type"] == "missing":
        problem = "missing; add it or delete the row"
    elif isinstance(cause, RowError):
        problem, reason = cause.problem, cause.reason
        path += [cause.field if cause.field.startswith("[") or not cause.field else f".{cause.field}"]
    field = "".join(path).removeprefix(".")
    return RowError(field if len(field) < 200 else f"{field[:100]}...", problem, reason)


def _key(part: str) -> str:
    return part if part.isprintable() else shown(part)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def checked(kind: Any, value: object) -> Any:
    """A value of a type that is not a column's. Raises RowError."""
    try:
        return _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        raise row_error(error) from error


def shown(value: object) -> str:
    """A value of the data for a message: its beginning, printable; of lists and objects the type alone."""
    if isinstance(value, list | dict):
        return type(value).__name__
    text = repr(value[:LONGEST_SHOWN] if isinstance(value, str) else value)
    return text if len(text) < LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def utf8(text: str) -> str:
    """Text that can be written to a file."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"character {error.start} is half of a surrogate pair, or a byte that is not UTF-8"
        raise RowError("", problem) from error
    return text


def not_blank(text: str, field: str = "", what: str = "response") -> str:
    """Text that says something."""
    if not text.strip():
        reason = "blank_responses" if what == "response" else "broken"
        raise RowError(field, f"the {what} is empty; fill it in or delete the row", reason)
    return text


def _finite(value: float) -> float:
    if not abs(value) < 1e300:  # so that differences are finite, too
        raise RowError("", f"must be a finite number, found {value}; correct it or delete the row")
    return value


def _flag(value: object) -> object:
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else value


def _named(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Text = Annotated[str, AfterValidator(utf8)]
QueryText = Annotated[Text, AfterValidator(partial(not_blank, what="query"))]
Response = Annotated[Text, AfterValidator(not_blank)]
Finite = Annotated[float, AfterValidator(_finite)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Choice = Annotated[Literal[0, 1], AfterValidator(int)]  # true and 1.0, too
Id = Annotated[Text, BeforeValidator(_named)]  # "": one is to be made
