"""From records to token ids: one rule by which prompt and response are joined, and one by which they are cut."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rdo.data.cutting import shorten
from rdo.data.records import ROWS_PER_BATCH, Mapped, Record, Records, write_rows
from rdo.data.templates import TEMPLATE_DATE, around_response, render_prompt
from rdo.runtime.errors import UserError
from rdo.runtime.files import replace_file
from rdo.runtime.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Raised whenever the same records would be encoded otherwise, or written otherwise.
TOKENS_VERSION = 4
# A part of the records is a file of token ids, which one process makes.
FEWEST_PER_PART, MOST_PARTS = 2000, 64


@dataclass(frozen=True)
class EncodedRecord:
    """Token ids of a record: the model sees `prompt + responses[k]`; each response ends with its `Ending`.

    too_long: whether it is good for no training, see `encode`. alike: whether responses of different texts have the
    same ids, because of a cut or of the tokenizer: nothing can be learnt of their difference. query_cut, response_cut:
    tokens that were cut, the query's once, however many responses share it.
    """

    id: str
    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    too_long: bool = field(default=False, compare=False)
    alike: bool = field(default=False, compare=False)
    query_cut: int = field(default=0, compare=False)
    response_cut: int = field(default=0, compare=False)


def encode(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length: int,
    parse_special: bool = False,
    today: str = TEMPLATE_DATE,
    min_prompt: int = 1,
) -> list[EncodedRecord]:
    """Token ids of the records, in their order, cut to fit `max_length`.

    Prompt: as `PromptEncoder` has it. Response: its text's ids, and the ids of `find_ending`. Prompt and response are
    tokenized apart, so a response's ids never depend on the query's last characters, and no space is put between that
    no template has (the replies of HH and TL;DR bring theirs with them).

    Special tokens written out in the data's texts ("</s>") stay text, unless parse_special is set, as the toy world's
    demonstrations need it; a response's end, written out behind it, is no second one. What the chat template writes is
    always parsed, for its markers are the point; there a special token inside a user's message becomes one too, a
    known limitation.

    Cutting: the query loses old turns, then text (`cutting.shorten`), the same for all responses of the record, so that
    the longest fits. A record is too long where fewer than `min_prompt` tokens of the query's text would be left: its
    responses lose their last words and keep their end, and where what is not text is too long already, that is cut.

    Raises UserError if the tokenizer has no EOS, a prompt no token, or `max_length` no room for one token of each, and
    as `render_prompt`.
    """
    prompter, records = PromptEncoder(tokenizer, template, today, parse_special), list(records)
    end, around = list(find_ending(template, tokenizer, today).ids), around_response(template, tokenizer, today)
    texts = [around.text(response, record) for record in records for response in record.responses]
    replies = iter(_ids_behind(texts, tokenizer, parse_special))
    fewest, limit = len(prompter.begin) + 2 + len(end), max_length - 1 - len(end)
    if max_length < fewest:
        raise UserError(f"dataset.max_length={max_length} is too small; it must be at least {fewest}")
    made = []
    for record, whole in zip(records, prompter.whole(records), strict=True):
        responses = [next(replies) for _ in record.responses]
        responses = [ids if ids[-len(end) :] == end else [*ids, *end] for ids in responses]
        most = max_length - max(map(len, responses))
        prompt, left = whole, min_prompt
        if len(whole) > most:
            shorter, left = shorten(record, prompter.count, most, min_prompt, limit)
            prompt = prompter.ids([shorter])[0]
        crowded = len(prompt) > max(most, limit)
        if crowded:
            prompt = [*prompter.begin, *prompt[len(prompter.begin) - limit :]]
        room = max_length - len(prompt)
        fitting = tuple(tuple(ids if len(ids) <= room else [*ids[: room - len(end)], *end]) for ids in responses)
        lost = sum(max(0, len(ids) - room) for ids in responses)
        cut, too_long = len(whole) - len(prompt), crowded or lost > 0 or left < min_prompt
        alike = len(set(fitting)) < len(set(record.responses))
        made.append(EncodedRecord(record.id, tuple(prompt), fitting, too_long, alike, cut, lost))
    return made


@dataclass(frozen=True)
class PromptEncoder:
    """From queries to the ids of prompts: those of the rendered prompt, with what the tokenizer puts in front of any
    text, such as BOS, unless they start with it."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    today: str = TEMPLATE_DATE
    parse_special: bool = False

    @cached_property
    def begin(self) -> tuple[int, ...]:
        return begin_ids(self.tokenizer)

    def whole(self, records: Sequence[Record]) -> list[list[int]]:
        """The prompts of all records as they are. Raises UserError where one has no token."""
        prompts = self.ids(records)
        for record, prompt in zip(records, prompts, strict=True):
            if not prompt:
                where = record.place or f"record {record.id}"
                raise UserError(f"{where}: the prompt has no token; correct the query or the template")
        return prompts

    def ids(self, records: Sequence[Record]) -> list[list[int]]:
        rendered = [render_prompt(self.template, record, self.tokenizer, self.today) for record in records]
        prompts = _ids(rendered, self.tokenizer, self.parse_special or self.template == "chat")
        return [ids if tuple(ids[: len(self.begin)]) == self.begin else [*self.begin, *ids] for ids in prompts]

    def count(self, record: Record) -> int:
        """How many tokens the prompt has."""
        return len(self.ids([record])[0])


def encode_prompts(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, template: str, today: str, most: int, setting: str
) -> list[tuple[str, tuple[int, ...]]]:
    """What a model is asked, for it to respond: of each record the query, cut so that its prompt has at most `most`
    tokens (as `setting` has it), and the prompt. Raises UserError as `encode`."""
    prompter, made = PromptEncoder(tokenizer, template, today), []
    for record, whole in zip(records, prompter.whole(records), strict=True):
        where = record.place or f"record {record.id}"
        asked = shorten(record, prompter.count, most, 1, most)[0] if len(whole) > most else record
        prompt = prompter.ids([asked])[0]
        if len(prompt) > most:
            problem = f"the prompt has {len(prompt)} tokens with all of the query cut that may be"
            raise UserError(f"{where}: {problem}, and {setting} leaves {most}: raise the first or lower the second")
        made.append((asked.query, tuple(prompt)))
    return made


def begin_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer itself puts in front of every text: BOS, an encoder's CLS, nothing, or several ids."""
    plain, whole = (list(tokenizer("a", add_special_tokens=added).input_ids) for added in (False, True))
    return tuple(whole[: next(n for n in range(len(whole) + 1) if whole[n : n + len(plain)] == plain)])


@dataclass(frozen=True)
class Ending:
    """What ends a response: its text, and its ids."""

    text: str
    ids: tuple[int, ...]


def find_ending(template: str, tokenizer: PreTrainedTokenizerBase, today: str = TEMPLATE_DATE) -> Ending:
    """What ends a response, in training and in scoring: what the chat template writes behind an assistant's message,
    else EOS, or what encoders use in its place. Raises UserError where there is neither, and as `render_prompt`."""
    text = around_response(template, tokenizer, today).end
    if not text:
        raise UserError("the tokenizer has no end-of-sequence token, so no response could end; set its eos_token")
    own = {tokenizer.sep_token: tokenizer.sep_token_id, tokenizer.eos_token: tokenizer.eos_token_id}
    return Ending(text, (own[text],) if text in own else tuple(_ids_behind([text], tokenizer, parse_special=True)[0]))


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase, parse_special: bool) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: the warning that a text is longer than the model's context; what is too long is cut and counted.
    batch = tokenizer(texts, add_special_tokens=False, split_special_tokens=not parse_special, verbose=False)
    return list(batch["input_ids"])


def _ids_behind(texts: list[str], tokenizer: PreTrainedTokenizerBase, parse_special: bool) -> list[list[int]]:
    """Ids of texts that stand behind another: without the space that tokenizers of Llama 2's kind put before any."""
    line, word, both = _ids(["\n", "a", "\na"], tokenizer, parse_special)
    if both[: len(line)] != line or both[len(line) :] == word:
        return _ids(texts, tokenizer, parse_special)
    return [ids[len(line) :] for ids in _ids([f"\n{text}" for text in texts], tokenizer, parse_special)]


def left_out(encoded: Sequence[EncodedRecord], too_long: str) -> set[int]:
    """Places of the records that nothing is trained on: those that are too long or alike, and with too_long=drop all
    that were cut."""
    left = _column(encoded, "too_long") | _column(encoded, "alike")
    return set(np.flatnonzero(left | (_column(encoded, "query_cut") > 0) if too_long == "drop" else left).tolist())


def _column(encoded: Sequence[EncodedRecord], name: str) -> np.ndarray:
    if isinstance(encoded, Mapped):
        return encoded.numbers(name)
    return np.array([getattr(record, name) for record in encoded])


def check_cuts(encoded: Sequence[EncodedRecord], max_length: int, max_truncated_share: float) -> str:
    """How many records were cut, and by how many tokens; "" where none was. Raises UserError where too many were."""
    query, response = _column(encoded, "query_cut"), _column(encoded, "response_cut")
    truncated = int(((query > 0) | (response > 0)).sum())
    found = (
        f"{truncated} of {len(encoded)} records are longer than dataset.max_length={max_length} tokens "
        f"({query.sum()} query and {response.sum()} response tokens were cut)"
    )
    if truncated > max_truncated_share * len(encoded):
        raise UserError(
            f"{found}, more than dataset.max_truncated_share={max_truncated_share} allows; raise one of the two"
        )
    return found if truncated else ""


def encoded_in(folder: Path) -> Mapped:
    """What `encode_into` wrote: a sequence of EncodedRecord."""
    return Mapped(sorted(folder.glob("part-*.arrow")), _as_encoded)


def _as_encoded(row: dict[str, Any]) -> EncodedRecord:
    return EncodedRecord(**row | {"prompt": tuple(row["prompt"]), "responses": tuple(map(tuple, row["responses"]))})


def order_fingerprint(records: Records) -> str:
    """Hash of which record stands where: token ids are found by place."""
    return hashlib.blake2b(records.known("id_key").tobytes(), digest_size=16).hexdigest()


def encode_into(folder: Path, records: Records, workers: int | None, **options: Any) -> None:
    """Writes the token ids of a file's records into the folder, in several processes; finished parts are kept.

    options: those of `encode`, which says what is raised.
    """
    size = max(FEWEST_PER_PART, -(-len(records) // MOST_PARTS))
    parts = {folder / f"part-{n:03}.arrow": records.rows[n * size :][:size] for n in range(-(-len(records) // size))}
    files = [file for file in parts if not file.exists()]
    jobs = (files, [parts[file] for file in files], repeat(records.source), repeat(options))
    workers = min(workers or len(os.sched_getaffinity(0)), len(files))
    print(f"[tokens] {len(records)} records, {workers} process{'es' if workers > 1 else ''}", flush=True)
    # Or each process that is forked says that its tokenizer has one thread alone.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with progress_bar(len(files), "tokenizing") as bar, ProcessPoolExecutor(max(workers, 1)) as pool:
        for _ in (pool.map if workers > 1 else map)(_encode_part, *jobs):
            bar.update()


def _encode_part(file: Path, rows: np.ndarray, source: Sequence[Record], options: dict[str, Any]) -> None:
    import pyarrow as pa

    records = Records(source, {}, rows)
    ids, text, count = pa.list_(pa.int32()), pa.string(), pa.int64()
    columns = {"id": text, "prompt": ids, "responses": pa.list_(ids), "query_cut": count, "response_cut": count}
    columns |= {"too_long": pa.bool_(), "alike": pa.bool_()}
    batches = (records[start : start + ROWS_PER_BATCH] for start in range(0, len(records), ROWS_PER_BATCH))
    made = (vars(record) for batch in batches for record in encode(batch, **options))
    with replace_file(file) as temporary:
        write_rows(made, temporary, pa.schema(columns))
