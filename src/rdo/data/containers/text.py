"""The text of a stream: line by line, or as a window that moves over it."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator

from rdo.data.containers.problems import AGAIN, Broken

LONGEST_LINE = 64 * 2**20  # bytes of a line or cell, characters of an element: what one row may take of the memory
CHUNK = 2**20  # bytes that are read at a time

_BLANKS = re.compile(r"[ \t\n\r]*")


class Lines(Iterator[str]):
    """The lines of a stream as text; `take_problem` says what was wrong since it was last asked.

    Bytes that are no text stay in a line as lone surrogates, and of a line that is too long a quote stays if it held an
    odd number: so CSV records begin and end where they did.
    """

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self.number = 0  # of the last line
        self._stream = stream
        self._problem: str | None = None

    def __next__(self) -> str:
        line = self._stream.readline(LONGEST_LINE + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > LONGEST_LINE:
            self._note(f"is longer than {LONGEST_LINE:,} bytes; write one row per line")
            quotes = line.count(b'"')
            while line and not line.endswith(b"\n"):
                line = self._stream.readline(CHUNK)
                quotes += line.count(b'"')
            return '"' * (quotes % 2) + "\n"
        if b"\0" in line:
            self._note(f"holds a NUL byte (offset {line.index(0)} of the line), as damaged files do; {AGAIN}")
        encoding = "utf-8-sig" if self.number == 1 else "utf-8"
        try:
            return line.decode(encoding)
        except UnicodeDecodeError as error:
            at = error.start + len(line) - len(error.object)  # which is without the byte-order mark
            self._note(f"is not UTF-8 (byte 0x{line[at]:02x} at offset {at} of the line); convert the file to UTF-8")
            return line.decode(errors="surrogateescape")

    def _note(self, problem: str) -> None:
        self._problem = self._problem or problem

    def take_problem(self) -> str | None:
        """The first problem since the last call."""
        problem, self._problem = self._problem, None
        return problem


class Window:
    """The part of a stream's text that is looked at; it only moves forward, and counts the lines that it left.

    text, at: what is in memory, and where in it the part begins. line: the number of the line there.
    """

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self.text, self.at, self.line = "", 0, 1
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def more(self) -> bool:
        """Read as much again as is left, so that a long element is not parsed at every chunk; False at the end."""
        chunk = self._stream.read(max(CHUNK, len(self.text) - self.at))
        try:
            more = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n", self.at) + error.object.count(b"\n", 0, error.start)
            problem = f"is not UTF-8 (byte 0x{error.object[error.start]:02x}); convert the file to UTF-8"
            raise Broken(problem, f"line {line}") from error
        if chunk:
            self.text, self.at = self.text[self.at :] + more, 0
        return bool(chunk)

    def move(self, to: int) -> None:
        """Go forward to a place in `text`."""
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def next(self) -> str:
        """The next character that is not blank, or nothing at the end."""
        while True:
            blanks = _BLANKS.match(self.text, self.at)
            self.move(blanks.end() if blanks else self.at)
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def take(self) -> str:
        """The next character that is not blank, and go behind it."""
        character = self.next()
        self.move(self.at + len(character))
        return character
