"""Rows of JSON: one object per line, or one array of objects."""

from __future__ import annotations

import codecs
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rdo.data.containers.contents import HEAD
from rdo.data.containers.problems import AGAIN, Broken, shown
from rdo.data.containers.text import LONGEST_LINE, Lines, Window

BY_ROWS = "write one object per row (pandas: frame.to_json(FILE, orient='records', lines=True))"


class Decoder(json.JSONDecoder):
    """A JSON decoder that remembers keys given twice, of which the module would silently keep the last."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._pairs)
        self.repeated: list[str] = []

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            self.repeated.append(Counter(key for key, _ in pairs).most_common(1)[0][0])
        return value

    def take_problem(self, value: Any) -> str | None:
        """What is wrong with a row that was just decoded."""
        repeated, self.repeated = self.repeated, []
        if not isinstance(value, dict):
            names = {list: "an array", str: "text", bool: "true or false", type(None): "null"}
            return f"is {names.get(type(value), 'a number')}, not an object; write one object of columns per row"
        return f"has the key '{shown(repeated[0])}' twice in one object; keep one" if repeated else None


def read_json(stream: io.BufferedIOBase, head: bytes, suffix: str) -> Iterator[tuple[str, Any]]:
    """Pairs of a place and a row, or Broken in its place. `head`: the first bytes; `suffix`: of the file's name."""
    if head.lstrip().startswith(b"["):
        yield from _read_array(stream)
        return
    _refuse_long_object(head)
    pairs = _read_lines(stream)
    first = list(itertools.islice(pairs, 2))
    if len(first) == 1:
        where, document = first[0]
        if suffix == ".json" and (key := _rows_key(document)):
            raise Broken(f"is one object with the rows in a list; {_take_out(key)}", where)
        if _holds_columns(document):
            raise Broken(f"is one object of whole columns; {BY_ROWS}", where)
    yield from itertools.chain(first, pairs)


def _explain(error: Exception, where: str) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON ({error.msg}, {where}); mend or delete it"
    if isinstance(error, RecursionError):
        return "is nested too deep; flatten or delete it"
    return "holds a number of too many digits; shorten or delete it"


def _read_lines(stream: io.BufferedIOBase) -> Iterator[tuple[str, Any]]:
    lines, decoder = Lines(stream), Decoder()
    for text in lines:
        row, problem = None, lines.take_problem()
        if not problem:
            if not text.strip():
                continue
            try:
                row = decoder.decode(text.rstrip("\r\n"))
                problem = decoder.take_problem(row)
            except (ValueError, RecursionError) as error:
                problem = _explain(error, f"column {getattr(error, 'pos', 0) + 1}")
                decoder.repeated.clear()
        yield f"line {lines.number}", Broken(problem) if problem else row


def _rows_key(value: Any) -> str | None:
    """The key under which the only object of a file seems to hold the rows: all its lists hold objects, no messages."""
    if not isinstance(value, dict) or any(isinstance(part, dict) for part in value.values()):
        return None
    lists = {key: part for key, part in value.items() if isinstance(part, list)}
    parts = list(itertools.chain.from_iterable(lists.values()))
    if all(lists.values()) and all(isinstance(part, dict) and not {"role", "from"} & part.keys() for part in parts):
        return next(iter(lists), None)
    return None


def _holds_columns(value: Any) -> bool:
    """Whether the only object of a file is a table by columns, as pandas' to_json() and to_dict("list") make it."""
    if not isinstance(value, dict) or len(value) < 2:
        return False
    columns = list(value.values())
    if all(isinstance(column, dict) for column in columns):
        return all(column and [*column] == [*map(str, range(len(column)))] for column in columns)
    return (
        all(isinstance(column, list) and column for column in columns)
        and len({len(column) for column in columns}) == 1
        and not any(isinstance(part, dict) for column in columns for part in column)
    )


def _take_out(key: str) -> str:
    return f"""take it out of its key '{shown(key)}' (jq -c '.["{shown(key)}"][]')"""


def _refuse_long_object(head: bytes) -> None:
    """Raise if the first object goes on over several lines, as none of JSON lines does."""
    text = head.decode(errors="ignore")
    if len(head) >= HEAD - len(codecs.BOM_UTF8):
        text = text[: text.rfind("\n") + 1]  # cut between two tokens
    line, text = text[: len(text) - len(text.lstrip())].count("\n") + 1, text.strip()
    try:
        document, end = json.JSONDecoder().raw_decode(text)
        key = None if text[end:] else _rows_key(document)
        columns = not text[end:] and _holds_columns(document)
        text = text[:end]
    except json.JSONDecodeError as error:
        if error.pos < len(text):  # broken, not unfinished
            return
        found = re.search(r'"((?:[^"\\]|\\.)*)"\s*:\s*\[\s*\{', text)
        key, columns = found[1] if found else None, False
    except (ValueError, RecursionError):
        return
    if columns:
        raise Broken(f"is one object of whole columns; {BY_ROWS}", f"line {line}")
    if "\n" in text:
        way_out = f"; if its list '{shown(key)}' holds the rows, {_take_out(key)}" if key else ""
        problem = "an object goes on over several lines; write one object per line (jq -c .)"
        raise Broken(f"{problem}{way_out}", f"line {line}")


def _read_array(stream: io.BufferedIOBase) -> Iterator[tuple[str, Any]]:
    window, decoder, number = Window(stream), Decoder(), 0
    mark = window.take()
    if window.next() == "]":
        mark = window.take()
    while mark != "]":
        number += 1
        window.next()
        yield f"line {window.line}", _take_element(window, decoder, f"element {number} of the array")
        mark = window.take()
        if not mark:
            raise Broken(f"the array ends early, behind element {number}; {AGAIN}", f"line {window.line}")
        if mark not in ",]":
            raise Broken(f"a comma is missing behind element {number}; mend the array", f"line {window.line}")
    if window.next():
        problem = "text behind the end of the array; write one array, or one object per line"
        raise Broken(problem, f"line {window.line}")


def _take_element(window: Window, decoder: Decoder, name: str) -> Any:
    """The next element, or Broken in its place. Raises Broken if nobody can tell where it ends."""
    while True:
        try:
            row, end = decoder.raw_decode(window.text, window.at)
        except (ValueError, RecursionError) as error:
            problem = _explain(error, f"at its character {getattr(error, 'pos', 0) - window.at + 1}")
            if isinstance(error, json.JSONDecodeError):
                # 16: more than any token that the end of the text may have broken
                rest = 0 if error.msg.startswith("Unterminated") else len(window.text.rstrip()) - error.pos
                if rest < 16 and len(window.text) - window.at > LONGEST_LINE:
                    problem = f"is longer than {LONGEST_LINE:,} characters; shorten or delete it"
                elif rest < 16 and window.more():
                    continue
                elif rest <= 0:
                    problem = f"is cut off by the end of the file; {AGAIN}"
            raise Broken(f"{name} {problem}", f"line {window.line}") from error
        if len(window.text) - end < 3 and window.more():  # a number may go on, also behind "e+"
            continue
        window.move(end)
        found = decoder.take_problem(row)
        return Broken(f"{name} {found}") if found else row
