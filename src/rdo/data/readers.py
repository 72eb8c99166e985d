"""Readers: rows of any format, from files or the hub, become records; a bad row says where and why.

A row that is broken (a missing field, a wrong type, a score that is no number) is an error at once: the file is not
what it was taken for. A row that is well formed but says nothing about which response is better is left out, counted
and, where it is a defect, named in the log. Published sets hold such rows, and nobody should have to mend them by hand:
the test set of HH helpful-base has 2 pairs of identical responses, 4 empty replies and 2 pairs that answer different
queries. More defects than `MAX_DEFECT_SHARE` of the rows mean that the file is damaged or read as the wrong format.
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rdo.data.formats import READERS, UnusableRow, find_format
from rdo.data.records import Preference, Record, content_id
from rdo.errors import DataError

logger = logging.getLogger(__name__)

MAX_DEFECT_SHARE = 0.01

# Rows that published sets hold by design, however many; every other reason to leave a row out counts as a defect.
BY_DESIGN = ("identical_responses", "articles")


class Reading(NamedTuple):
    """The records of a file or hub split, and counts: `rows_read` and `dropped_...` for each reason met."""

    records: list[Record]
    counts: dict[str, int]


def rows_to_records(rows: Iterable[tuple[str, Any]], format: str = "auto") -> Reading:
    """Records of the rows, in their order.

    rows: pairs of a place for messages ("FILE, line 12") and the row, a dict of columns.
    format: one of READERS, or "auto" to tell it from the columns of the first row.
    A record without an id in the data gets a hash of its texts; further rows with the same texts get "-2", "-3", ...
    Raises DataError, naming place and field, for a broken row, for an id given twice, for more defects than
    MAX_DEFECT_SHARE, and when every row had to be left out.
    """
    if format != "auto" and format not in READERS:
        raise DataError(f"dataset.format={format} is not known; choose auto, {', '.join(READERS)}")
    records: list[Record] = []
    counts: Counter[str] = Counter(rows_read=0)
    dropped: list[tuple[str, UnusableRow]] = []
    places: dict[str, str] = {}
    for place, row in rows:
        counts["rows_read"] += 1
        if not isinstance(row, dict):
            raise DataError(f"{place}: must be an object of columns, found {type(row).__name__}")
        if format == "auto":
            format = find_format((name for name, value in row.items() if value is not None), place)
        try:
            record = _read_row(row, place, format)
        except UnusableRow as unusable:
            dropped.append((place, unusable))
            continue
        informative = tuple(p for p in record.preferences if p.tie or _differ(record, p))
        counts["dropped_identical_preferences"] += len(record.preferences) - len(informative)
        records.append(replace(record, id=_claim_id(record, place, places), preferences=informative))
    _judge_dropped(dropped, counts, bool(records))
    return Reading(records, {name: count for name, count in counts.items() if count or name == "rows_read"})


def _read_row(row: dict[str, Any], place: str, format: str) -> Record:
    reader = READERS[format]
    for name in reader.columns:
        if row.get(name) is None:
            needs = ", ".join(reader.columns)
            raise DataError(f"{place}, field '{name}': missing; a row of format '{format}' needs {needs}")
    record = reader.read(row, place)
    if len(record.responses) > 1 and len(set(record.responses)) == 1:
        raise UnusableRow(f"{place}: all responses are identical, so there is no preference", "identical_responses")
    return record


def _differ(record: Record, preference: Preference) -> bool:
    return record.responses[preference.chosen] != record.responses[preference.rejected]


def _claim_id(record: Record, place: str, places: dict[str, str]) -> str:
    """The record's id, entered into `places` (id → place)."""
    identifier = record.id
    if identifier and identifier in places:
        raise DataError(f"{place}, field 'id': '{identifier}' is taken by {places[identifier]}; make ids unique")
    if not identifier:
        base = identifier = content_id(record.query, record.responses)
        copies = 1
        while identifier in places:
            copies += 1
            identifier = f"{base}-{copies}"
    places[identifier] = place
    return identifier


def _judge_dropped(dropped: list[tuple[str, UnusableRow]], counts: Counter[str], any_record: bool) -> None:
    """Count the rows left out, log where the defects are, and raise if there are too many or nothing is left."""
    for _, unusable in dropped:
        counts[f"dropped_{unusable.reason}"] += 1
    defects = [(place, unusable) for place, unusable in dropped if unusable.reason not in BY_DESIGN]
    if len(defects) > MAX_DEFECT_SHARE * counts["rows_read"]:
        share = f"{len(defects)} of {counts['rows_read']} rows cannot be used (at most {MAX_DEFECT_SHARE:.0%} may)"
        raise DataError(f"{defects[0][1]}\n{share}; the message is the first one's.")
    if dropped and not any_record:
        raise DataError(f"{dropped[0][1]}\nNo row of {len(dropped)} can be used; the message is the first one's.")
    for place, unusable in defects[:20]:
        logger.warning("left out %s (%s)", place, unusable.reason)
    if len(defects) > 20:
        logger.warning("left out %d more rows like these", len(defects) - 20)


def read_file(path: Path, format: str = "auto") -> Reading:
    """Records of a file of JSON lines, plain or .gz; empty lines are skipped. Raises DataError as rows_to_records."""
    try:
        return rows_to_records(_json_lines(path), format)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); check dataset.path") from error


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    empty = True
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            empty = False
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: is not JSON ({error}); write one JSON object per line") from error
            yield place, row
    if empty:
        raise DataError(f"{path}: there are no rows; check dataset.path")
