"""From records to token ids: one rule by which prompt and response are joined, and one by which they are cut.

In memory, or once for all runs in a memory-mapped file that several processes make through `datasets`.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rdo.data.records import Record
from rdo.data.templates import render_prompt
from rdo.runtime.errors import UserError
from rdo.runtime.progress import progress_bar

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from rdo.data.table import Records

RECORDS_PER_CALL = 500
TOKENS = "tokens"
# Fewer records than this are not worth a second process.
RECORDS_PER_WORKER = 2000


@dataclass(frozen=True)
class EncodedRecord:
    """Token ids of a record: the model sees `prompt + responses[k]`; each response ends with end-of-sequence.

    query_cut, response_cut: tokens that were cut, the query's once, however many responses share it.
    """

    id: str
    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    query_cut: int = field(default=0, compare=False)
    response_cut: int = field(default=0, compare=False)


@dataclass
class TruncationReport:
    """What was cut off the records of a split."""

    records: int = 0
    truncated: int = 0
    query_tokens_cut: int = 0
    response_tokens_cut: int = 0

    @classmethod
    def of(cls, query_cut: Any, response_cut: Any) -> TruncationReport:
        """Of the tokens cut from each record's query and responses."""
        query, response = np.asarray(query_cut, np.int64), np.asarray(response_cut, np.int64)
        return cls(len(query), int(((query > 0) | (response > 0)).sum()), int(query.sum()), int(response.sum()))

    def check(self, max_length: int, max_truncated_share: float) -> None:
        """Raises UserError where more than `max_truncated_share` of the records had to be cut."""
        if self.truncated > max_truncated_share * self.records:
            raise UserError(
                f"{self.truncated} of {self.records} records are longer than dataset.max_length={max_length} tokens "
                f"({self.query_tokens_cut} query and {self.response_tokens_cut} response tokens were cut), more than "
                f"dataset.max_truncated_share={max_truncated_share} allows; raise one of the two"
            )


def encode(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length: int,
    parse_special: bool = False,
) -> tuple[list[EncodedRecord], TruncationReport]:
    """Token ids of the records, in their order, and what had to be cut to fit `max_length`.

    Prompt: the rendered prompt's ids, with the tokenizer's BOS, if it has one, in front unless they start with it.
    Response: its text's ids and one EOS. Prompt and response are tokenized apart, so a response's ids never depend on
    the query's last characters, and no space is put between (the replies of HH and TL;DR bring theirs with them).

    Special tokens written out in the data's texts ("</s>") stay text, unless parse_special is set, as the toy world's
    demonstrations need it. What the chat template writes is always parsed, for its markers are the point; there a
    special token inside a user's message becomes one too, a known limitation.

    Cutting: the query loses tokens first, from the left (BOS stays), the same for all responses of the record, so that
    the longest fits; at least one token of it stays. Responses that are still too long lose their end and keep EOS.

    Raises UserError if the tokenizer has no EOS, a prompt no token, or `max_length` no room for one token of each.
    """
    made: list[EncodedRecord] = []
    with progress_bar(len(records), "tokenizing") as bar:
        for start in range(0, len(records), RECORDS_PER_CALL):
            part = records[start : start + RECORDS_PER_CALL]
            made += encode_batch(part, tokenizer, template, max_length, parse_special)
            bar.update(len(part))
    return made, TruncationReport.of([record.query_cut for record in made], [record.response_cut for record in made])


def encode_batch(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length: int,
    parse_special: bool = False,
) -> list[EncodedRecord]:
    """Token ids of a few records; see `encode`."""
    begin, end = begin_id(tokenizer), end_id(tokenizer)
    rendered = [render_prompt(template, record, tokenizer) for record in records]
    prompts = _ids(rendered, tokenizer, parse_special or template == "chat")
    replies = iter(_ids([response for record in records for response in record.responses], tokenizer, parse_special))
    made = []
    for record, prompt in zip(records, prompts, strict=True):
        if begin is not None and prompt[:1] != [begin]:
            prompt.insert(0, begin)
        responses = [next(replies) for _ in record.responses]
        responses = [ids if ids[-1:] == [end] else [*ids, end] for ids in responses]
        made.append(_fit(record, prompt, responses, head=int(begin is not None), max_length=max_length))
    return made


def begin_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that starts a sequence: BOS, or what encoders use in its place; None where the tokenizer has neither."""
    return tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a response: EOS, or what encoders use in its place; UserError where there is neither."""
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if end is None:
        raise UserError("the tokenizer has no end-of-sequence token, so no response could end; set its eos_token")
    return int(end)


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase, parse_special: bool) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: the warning that a text is longer than the model's context; what is too long is cut and counted.
    batch = tokenizer(texts, add_special_tokens=False, split_special_tokens=not parse_special, verbose=False)
    return list(batch["input_ids"])


def _fit(record: Record, prompt: list[int], responses: list[list[int]], head: int, max_length: int) -> EncodedRecord:
    """One record cut to max_length. head: tokens of the prompt that stay, whatever is cut."""
    if not prompt:
        where = record.place or f"record {record.id}"
        raise UserError(f"{where}: the prompt has no token; correct the query or the template")
    fewest = min(head + 1, len(prompt))
    # Room for the head, one token of the query, one of the response, and end-of-sequence.
    if max_length < fewest + 2:
        raise UserError(f"dataset.max_length={max_length} is too small; it must be at least {fewest + 2}")
    kept = min(len(prompt), max(fewest, max_length - max(len(ids) for ids in responses)))
    room, cut = max_length - kept, len(prompt) - kept
    fitting = tuple(tuple(ids if len(ids) <= room else [*ids[: room - 1], ids[-1]]) for ids in responses)
    lost = sum(max(0, len(ids) - room) for ids in responses)
    return EncodedRecord(record.id, (*prompt[:head], *prompt[head + cut :]), fitting, cut, lost)


class MappedTokens(Sequence[EncodedRecord]):
    """The token ids of every record of a split, in its order, made into objects when they are asked for."""

    def __init__(self, folder: Path):
        import datasets

        files = [str(file) for file in sorted(folder.glob(f"{TOKENS}*.arrow"))]
        self.rows: datasets.Dataset = datasets.concatenate_datasets([datasets.Dataset.from_file(f) for f in files])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        row = self.rows[place]
        return EncodedRecord(row["id"], tuple(row["prompt"]), tuple(map(tuple, row["responses"])))

    def report(self) -> TruncationReport:
        """What had to be cut."""
        return TruncationReport.of(*(self.rows.data.column(name).to_numpy() for name in ("query_cut", "response_cut")))


def order_fingerprint(records: Records) -> str:
    """Hash of which record stands where: token ids are found by place."""
    return hashlib.blake2b(records.known("id_key").tobytes(), digest_size=16).hexdigest()


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

    assert not isinstance(records.source, Sequence)
    workers = min(workers or len(os.sched_getaffinity(0)), 1 + len(records) // RECORDS_PER_WORKER)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    print(f"[tokens] {len(records)} records, {workers} process{'es' if workers > 1 else ''}", flush=True)
    options = {"tokenizer": tokenizer, "template": template, "max_length": max_length, "parse_special": parse_special}
    count, ids = datasets.Value("int64"), datasets.Sequence(datasets.Value("int32"))
    columns = {"id": datasets.Value("string"), "prompt": ids, "responses": datasets.Sequence(ids)}
    records.source.select(records.rows, keep_in_memory=True).map(
        tokenize_rows,
        batched=True,
        batch_size=RECORDS_PER_CALL,
        writer_batch_size=RECORDS_PER_CALL,
        num_proc=workers if workers > 1 else None,
        remove_columns=records.source.column_names,
        features=datasets.Features({**columns, "query_cut": count, "response_cut": count}),
        fn_kwargs=options,
        cache_file_name=str(folder / f"{TOKENS}.arrow"),
        new_fingerprint=folder.name,
        desc="tokenizing",
    )
    return {"records": len(records)}


def tokenize_rows(columns: dict[str, list[Any]], **options: Any) -> dict[str, list[Any]]:
    """A batch of rows of the records' file as rows of the tokens' file."""
    from rdo.data.table import as_records  # needs pyarrow, which what only computes has no use for

    made = encode_batch(as_records(columns), **options)
    names = ("id", "prompt", "responses", "query_cut", "response_cut")
    return {name: [getattr(record, name) for record in made] for name in names}
