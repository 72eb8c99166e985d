"""Errors that a user is meant to read, each shown as one line: what is wrong, where, and what to do about it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# Control, format (bidirectional overrides, zero-width characters, tags), surrogates, line and paragraph separators.
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
NO_MEMORY = re.compile(r"(?i)can('t|not) allocate memory|not enough memory|out of memory|ALLOC_FAILED")


class UserError(Exception):
    """Something the user can mend: a setting, a file, a row. `train.py` prints the message alone and exits with 1."""

    def __str__(self) -> str:
        return single_line(super().__str__())


class DataError(UserError):
    """A row or file of input data cannot be used; the message names the file, the line and the field."""


class NotFiniteError(UserError):
    """A number that came out as NaN or infinite; `record_ids` are the records that it came from."""

    def __init__(self, what: str, record_ids: Sequence[str], way_out: str):
        super().__init__(f"{what}; records {', '.join(record_ids)}; {way_out}")
        self.what, self.record_ids, self.way_out = what, record_ids, way_out


def described(error: BaseException) -> str:
    """Any error as one line: a user's own message alone, another's with its type, and a hint where memory ran out."""
    if isinstance(error, UserError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or NO_MEMORY.search(text):
        text += "; lower engine.tokens_per_micro_batch (training, scoring) or eval.batch_size (generation)"
    return single_line(text)


def single_line(text: object) -> str:
    """The text on one line, printable."""
    return printable(" ".join(line.strip() for line in str(text).splitlines() if line.strip()), keep="")


def printable(text: object, keep: str = "\n\t") -> str:
    r"""The text with every character that a terminal would act upon, or that cannot be seen, as an escape (\x1b,
    \u202e); `keep` are the control characters that stay."""
    return "".join(c if c in keep or unicodedata.category(c) not in HIDDEN else ascii(c)[1:-1] for c in str(text))
