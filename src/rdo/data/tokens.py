"""Token ids of records in a memory-mapped file: made by several processes through `datasets`, once for all runs."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from rdo.data.encoding import RECORDS_PER_CALL, EncodedRecord, TruncationReport, encode_batch, report_cuts
from rdo.data.table import Records, as_records

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

TOKENS = "tokens"
# Fewer records than this are not worth a second process.
RECORDS_PER_WORKER = 2000


class MappedTokens(Sequence[EncodedRecord]):
    """The token ids of every record of a split, in its order, made into objects when they are asked for."""

    def __init__(self, folder: Path):
        import datasets

        files = [str(file) for file in sorted(folder.glob(f"{TOKENS}*.arrow"))]
        self.rows: datasets.Dataset = datasets.concatenate_datasets([datasets.Dataset.from_file(f) for f in files])

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> EncodedRecord: ...
    @overload
    def __getitem__(self, place: slice) -> list[EncodedRecord]: ...
    def __getitem__(self, place: int | slice) -> EncodedRecord | list[EncodedRecord]:
        if isinstance(place, slice):
            return [self[n] for n in range(*place.indices(len(self)))]
        row = self.rows[place]
        return EncodedRecord(row["id"], tuple(row["prompt"]), tuple(map(tuple, row["responses"])))

    def report(self) -> TruncationReport:
        """What had to be cut."""
        table = self.rows.data
        columns = [table.column(name).to_numpy() for name in ("query_cut", "response_cut")]
        return report_cuts(np.stack(columns, axis=1))


def order_fingerprint(records: Records) -> str:
    """Hash of which record stands where: token ids are found by place."""
    return hashlib.blake2b(records.order_keys().tobytes(), digest_size=16).hexdigest()


def encode_into(
    folder: Path,
    records: Records,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length: int,
    parse_special: bool,
    workers: int | None,
) -> dict[str, Any]:
    """Writes the token ids of a file's records into the folder; finished parts of an earlier try are kept.

    Raises UserError as `encode` does.
    """
    import datasets

    assert not isinstance(records.source, list)
    workers = min(workers or len(os.sched_getaffinity(0)), 1 + len(records) // RECORDS_PER_WORKER)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    print(f"[tokens] {len(records)} records, {workers} process{'es' if workers > 1 else ''}", flush=True)
    integers = datasets.Sequence(datasets.Value("int32"))
    records.source.select(records.rows, keep_in_memory=True).map(
        tokenize_rows,
        batched=True,
        batch_size=RECORDS_PER_CALL,
        writer_batch_size=RECORDS_PER_CALL,
        num_proc=workers if workers > 1 else None,
        remove_columns=records.source.column_names,
        features=datasets.Features(
            id=datasets.Value("string"),
            prompt=integers,
            responses=datasets.Sequence(integers),
            query_cut=datasets.Value("int64"),
            response_cut=datasets.Value("int64"),
        ),
        fn_kwargs={
            "tokenizer": tokenizer, "template": template, "max_length": max_length, "parse_special": parse_special
        },
        cache_file_name=str(folder / f"{TOKENS}.arrow"),
        new_fingerprint=folder.name,
        desc="tokenizing",
    )  # fmt: skip
    return {"records": len(records)}


def tokenize_rows(columns: dict[str, list[Any]], **options: Any) -> dict[str, list[Any]]:
    """A batch of rows of the records' file as rows of the tokens' file."""
    made = [
        (record.id, record.prompt, record.responses, *cut) for record, cut in encode_batch(as_records(columns), **options)
    ]
    names = ("id", "prompt", "responses", "query_cut", "response_cut")
    return dict(zip(names, map(list, zip(*made, strict=True)), strict=True))
