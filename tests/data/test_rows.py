"""Rows of every format and the records that they were before the readers were rewritten; splits of the real sets."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from rdo.data.loading import load_splits
from rdo.data.readers import Reading, read_records
from rdo.data.records import Record
from rdo.runtime.errors import DataError
from rdo.runtime.store import Provenance
from rdo.settings import DatasetConfig

HERE = Path(__file__).parent
REAL = HERE.parents[2] / "shared" / "data"
# One line a case: format, row, records (what is None, or (), is left out), and "found" where `auto` says otherwise.
ROWS = [json.loads(line) for line in (HERE / "formats.jsonl").read_text().splitlines()]
SETS = json.loads((HERE / "real_sets.json").read_text())


def as_json(record: Record) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": record.id, "query": record.query, "responses": list(record.responses)}
    if record.preferences:
        entry["preferences"] = [[p.chosen, p.rejected, p.tie, p.strength] for p in record.preferences]
    for name in ("scores", "desirable"):
        if (values := getattr(record, name)) is not None:
            entry[name] = list(values)
    if record.split is not None:
        entry["split"] = record.split
    if record.messages:
        entry["messages"] = [[message.role, message.content] for message in record.messages]
    return entry


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{n}-{case['format']}") for n, case in enumerate(ROWS)])
def test_rows_are_found_and_read_as_they_were(case: dict[str, Any]) -> None:
    rows = [("rows, line 7", case["row"])]
    records = [as_json(record) for record in read_records(rows, Reading(case["format"]))]
    assert records == case["records"]
    found = Reading()
    if case.get("found", case["format"]) is None:
        with pytest.raises(DataError, match=r"^rows, line 7"):
            list(read_records(rows, found))
        return
    again = read_records(rows, found)
    if "found" not in case:
        assert [as_json(record) for record in again] == records
    else:
        with pytest.raises(DataError):
            list(again)
    assert found.format == case.get("found", case["format"])


@pytest.mark.parametrize("name", SETS)
def test_real_sets_have_the_ids_order_and_splits_that_they_had(name: str, tmp_path: Path) -> None:
    if not (REAL / name).exists():
        pytest.skip(f"the real data file {name} is not at hand (looked in ../shared/data)")
    dataset = DatasetConfig(name="real", source="file", path=str(REAL / name), on_invalid="skip")
    found = load_splits(dataset, Provenance(tmp_path, "", {}))
    splits = {
        split: [
            len(records),
            records.fingerprint(),
            hashlib.blake2b("\n".join(records.ids()).encode(), digest_size=8).hexdigest(),
        ]
        for split, records in found.splits.items()
        if len(records)
    }
    counts = {reason: count for reason, count in found.counts.items() if count}
    assert {"format": found.format, "counts": counts, "ignored": found.ignored, "splits": splits} == SETS[name]
