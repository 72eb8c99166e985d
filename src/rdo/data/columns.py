"""What a column may hold, as types of pydantic, and what is wrong with a row, as one line for its reader."""

from __future__ import annotations

import re
from decimal import Decimal
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from rdo.data.records import Record
from rdo.runtime.errors import DataError

LONGEST_SHOWN = 60
# What is said in place of pydantic's own words, by the type of its error.
WORDS = {
    **{"string_type": "must be text", "list_type": "must be a list", "bool_type": "must be true or false"},
    **dict.fromkeys(("dict_type", "model_type"), "must be an object"),
    **dict.fromkeys(("float_type", "finite_number"), "must be a finite number"),
    **{"recursion_depth_exceeded": "is nested too deep", "extra_forbidden": "is no column that is known here"},
}


class RowError(DataError):
    """A row cannot be used. reason: `broken`, or, of a row that is well formed but says nothing about which response is
    better, why not (blank_responses, unranked, ...): the name of the count that it goes to."""

    def __init__(self, field: str, problem: str, reason: str = "broken") -> None:
        super().__init__(f", field '{field}': {problem}" if field else f": {problem}")  # goes on from the row's place
        self.reason = reason


class Columns(BaseModel):
    """An object within a row. Values are taken as they are: text is no number."""

    model_config = ConfigDict(strict=True)


class Row(Columns):
    """A row in one layout of a format's columns; the required ones tell it from others.

    either: columns of which one is required, too. reads: of columns that are no fields, which are read.
    """

    layouts: ClassVar[dict[str, list[type[Row]]]] = {}
    either: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[re.Pattern[str] | None] = None

    def __init_subclass__(cls, format: str = "", **others: Any) -> None:
        """Where a row fits several layouts of a format, the one that was written first counts."""
        super().__init_subclass__(**others)
        if format:
            Row.layouts.setdefault(format, []).append(cls)

    def records(self) -> list[Record]:
        """The records of the row, at least one. Raises RowError where its values do not go together."""
        raise NotImplementedError


def row_error(error: ValidationError, inside: str = "") -> RowError:
    """The first thing that pydantic found wrong; its path is written as in `summaries[1].text`."""
    first = error.errors(include_url=False)[0]
    value, field = first["input"], inside
    for part in first["loc"]:
        if isinstance(part, int):
            field += f"[{part}]"
        elif not part.startswith("<"):  # <text>, <chat>: which of a union's types it is
            field += f"{'.' if field else ''}{part if part.isprintable() else shown(part)}"
    field = field if len(field) < 200 else f"{field[:100]}..."
    if value is None or first["type"] == "missing":
        return RowError(field, "missing; add it or delete the row")
    if first["type"] == "wrong":
        return RowError(field, first["msg"], first["ctx"]["reason"])
    problem = re.sub("^(Input|List) should", "must", WORDS.get(first["type"], first["msg"]))
    return RowError(field, f"{problem}, found {shown(value)}; correct it or delete the row")


def wrong(problem: str, reason: str = "broken") -> PydanticCustomError:
    """For a type's own check to raise."""
    return PydanticCustomError("wrong", "{problem}", {"problem": problem, "reason": reason})


@cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def checked(kind: Any, value: object, field: str) -> Any:
    """A value of a type that is only known, or only looked at, when the row's others are. Raises RowError."""
    try:
        return adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        raise row_error(error, field) from error


def shown(value: object) -> str:
    """A value of the data for a message: its beginning, printable; of lists and objects the type alone."""
    if isinstance(value, list | dict):
        return type(value).__name__
    text = repr(value[:LONGEST_SHOWN] if isinstance(value, str) else value)
    return text if len(text) < LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise wrong(f"character {error.start} is half of a surrogate pair, or a byte that is not UTF-8") from error
    return text


def _not_blank(what: str, reason: str) -> AfterValidator:
    def check(text: str) -> str:
        if not text.strip():
            raise wrong(f"the {what} is empty; fill it in or delete the row", reason)
        return text

    return AfterValidator(check)


def _flag(value: object) -> object:
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else value


def _named(value: object) -> object:
    return "" if value is None else str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _undecimal(value: object) -> object:
    return float(value) if isinstance(value, Decimal) else value


Text = Annotated[str, AfterValidator(_utf8)]
QueryText = Annotated[Text, _not_blank("query", "broken")]
Response = Annotated[Text, _not_blank("response", "blank_responses")]
Finite = Annotated[float, BeforeValidator(_undecimal), Field(allow_inf_nan=False)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Choice = Annotated[Literal[0, 1], AfterValidator(int)]  # true and 1.0, too
Identifier = Annotated[Text, BeforeValidator(_named)]  # "": one is to be made
