"""Stage inspect: prints what was understood of a data set, before anything is trained on it. Nothing is written."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rdo.data.encoding import EncodedRecord, encode
from rdo.data.loading import INVALID, Splits
from rdo.data.records import SPLITS, Record
from rdo.models.given import given
from rdo.models.pretrained import load_tokenizer
from rdo.models.tokenizers import make_tokenizer, train_byte_pair
from rdo.runtime.errors import printable
from rdo.settings import DatasetConfig
from rdo.stages.run import Run, model_path
from rdo.stages.sft import training_texts

EXAMPLES = 3
LONGEST_SHOWN = 700  # characters; a longer text loses its middle
# Of a byte-pair tokenizer that is trained for the inspection alone, where the configured model has none for this data.
VOCABULARY_SIZE = 4096
UNLIMITED = 1 << 40  # tokens
QUANTILES = {"min": 0.0, "5%": 0.05, "50%": 0.5, "95%": 0.95, "99%": 0.99, "max": 1.0}


def inspect_data(run: Run) -> None:
    """Reads, counts and tokenizes the data, and prints what was found."""
    splits, dataset = run.splits(), run.config.dataset
    show(overview_lines(dataset, splits))
    examined: dict[str, list[Record]] = {}
    for name in SPLITS:
        records = splits.splits[name]
        if not len(records):
            continue
        examined[name] = evenly(records, run.config.inspect.records)
        queries, few = len(set(records.query_keys().tolist())), len(examined[name])
        partly = f" (of which {few} examined, evenly spaced)" if few < len(records) else ""
        show(["", f"Split {name}: {len(records)} records of {queries} queries{partly}", *label_lines(examined[name])])
    tokenizer, origin = choose_tokenizer(run, examined["train"])
    show(["", f"Tokens (tokenizer {origin}; template {dataset.template})"])
    show([f"  {'':<32}{''.join(f'{name:>8}' for name in QUANTILES)}"])
    for name, some in examined.items():
        # The toy world's demonstrations hold an <end> between note and review, which is meant.
        parse_special = dataset.source == "toy" and name == "demonstrations"
        encoded, _ = encode(some, tokenizer, dataset.template, UNLIMITED, parse_special=parse_special)
        show(length_lines(name, encoded, dataset.max_length))
    for record in evenly(examined["train"], EXAMPLES):
        (whole,), _ = encode([record], tokenizer, dataset.template, UNLIMITED)
        (cut,), _ = encode([record], tokenizer, dataset.template, dataset.max_length)
        show(example_lines(tokenizer, record, whole, cut))


def show(lines: Iterable[str]) -> None:
    """Prints lines of which parts come from the data, with what a terminal would act upon as escapes."""
    for line in lines:
        print(printable(line), flush=True)


def evenly(records: Sequence[Record], count: int) -> list[Record]:
    """So many of the records, evenly spaced from the first to the last; all where there are no more."""
    count = min(count, len(records))
    return [records[n * (len(records) - 1) // max(1, count - 1)] for n in range(count)]


def choose_tokenizer(run: Run, records: Sequence[Record]) -> tuple[PreTrainedTokenizerBase, str]:
    """The configured model's tokenizer, and what it is; trained on these records where the model has none for them."""
    config = run.config.model
    if config.path:
        return load_tokenizer(model_path(given(config.path, config.revision)), config), f"of {config.path}"
    if config.tokenizer == "toy" and run.config.dataset.source == "toy":
        return make_tokenizer(config, []), "the toy world's"
    size = config.vocabulary_size if config.tokenizer == "byte_pair" else VOCABULARY_SIZE
    origin = f"byte-pair, {size} ids, trained on these records; model=hub model.path=NAME shows another model's view"
    return train_byte_pair(training_texts(records), size), origin


def overview_lines(dataset: DatasetConfig, splits: Splits) -> Iterator[str]:
    """Where the data comes from, how it was read, and what was left out."""
    counts = splits.counts
    yield f"Data set {dataset.name}: {dataset.path or dataset.hub_name or 'made'}"
    yield f"  format {splits.format}" + ("" if dataset.format == "auto" else " (as dataset.format says)")
    if splits.ignored:
        yield f"  ignored columns: {', '.join(splits.ignored)}"
    if splits.source:
        left = {name: n for name, n in counts.items() if n and name.startswith(("dropped_", "invalid_"))}
        yield f"  {counts['rows_read']} rows read; {listing(left) or 'nothing'} left out"
        if (splits.source.folder / INVALID).exists():
            yield f"  the invalid rows are listed in {splits.source.folder / INVALID}"


def label_lines(records: Sequence[Record]) -> Iterator[str]:
    """How many responses and what labels records have, and what the labels go with."""
    yield f"  responses a record: {listing(Counter(len(record.responses) for record in records), '{1} with {0}')}"
    if conversations := sum(bool(record.messages) for record in records):
        yield f"  conversations: {conversations}; dataset.template=chat (or hh) marks who speaks"
    preferences = [preference for record in records for preference in record.preferences]
    if preferences:
        yield f"  preferences: {len(preferences)}, of which {sum(p.tie for p in preferences)} ties"
        decided = [(record, p) for record in records for p in record.preferences if not p.tie]
        leads = [len(r.responses[p.chosen]) - len(r.responses[p.rejected]) for r, p in decided]
        longer, differ = sum(lead > 0 for lead in leads), sum(lead != 0 for lead in leads)
        won = f"{longer} of {differ}{share(longer, differ)}"
        yield f"  where lengths differ, the longer response is the chosen one in {won}"
        strengths = Counter(p.strength for p in preferences if p.strength is not None)
        if strengths:
            yield f"  strengths: {listing(strengths, '{1} of {0:g}')}"
        gains = [r.scores[p.chosen] - r.scores[p.rejected] for r, p in decided if r.scores is not None]
        if gains:
            below = sum(gain < 0 for gain in gains)
            yield f"  chosen has the lower score in {below} of {len(gains)}{share(below, len(gains))}"
    labels = Counter(label for record in records for label in record.desirable or ())
    if labels:
        yield f"  unpaired: {labels[True]} desirable, {labels[False]} undesirable responses"


def listing(counts: Mapping[Any, int], form: str = "{1} {0}") -> str:
    """Counts in a row, by what is counted."""
    return ", ".join(form.format(name, count) for name, count in sorted(counts.items()))


def share(part: int, whole: int) -> str:
    return f" ({part / whole:.1%})" if whole else ""


def length_lines(split: str, encoded: Sequence[EncodedRecord], max_length: int) -> Iterator[str]:
    """Quantiles of the token counts of a split before anything is cut, and what dataset.max_length cuts."""
    prompts = [len(record.prompt) for record in encoded]
    longest = [max(map(len, record.responses)) for record in encoded]
    both = [prompt + response for prompt, response in zip(prompts, longest, strict=True)]
    for part, values in {"prompt": prompts, "longest response": longest, "prompt + response": both}.items():
        ranked = sorted(values)
        numbers = "".join(f"{ranked[round(q * (len(ranked) - 1))]:>8}" for q in QUANTILES.values())
        yield f"  {split + ', ' + part:<32}{numbers}"
    cut = sum(length > max_length for length in both)
    yield f"  dataset.max_length={max_length} cuts {cut} of {len(both)}{share(cut, len(both))}"


def example_lines(
    tokenizer: PreTrainedTokenizerBase, record: Record, whole: EncodedRecord, cut: EncodedRecord
) -> Iterator[str]:
    """A record as the model will see it, special tokens and line breaks visible. whole: before it was cut."""
    yield from ("", f"Example {record.place or record.id}")
    texts = {"prompt": (whole.prompt, cut.prompt)}
    for number, both in enumerate(zip(whole.responses, cut.responses, strict=True)):
        texts[f"response {number}{role_of(record, number)}"] = both
    for title, (full, ids) in texts.items():
        yield f"  {title}, {len(ids)} {'' if len(ids) == len(full) else f'of {len(full)} '}tokens:"
        text = str(tokenizer.decode(list(ids), skip_special_tokens=False))
        if len(text) > LONGEST_SHOWN:
            half = LONGEST_SHOWN // 2
            text = f"{text[:half]} [… {len(text) - 2 * half} characters …] {text[-half:]}"
        # A space at either end is easily lost, and much depends on the one between prompt and response.
        text = printable(re.sub("^ | $", "␣", text.replace("\n", "↵")))
        yield from textwrap.wrap(text, 112, initial_indent="    ", subsequent_indent="    ")


def role_of(record: Record, response: int) -> str:
    """What the labels say of a response."""
    won = sum(p.chosen == response for p in record.preferences if not p.tie)
    lost = sum(p.rejected == response for p in record.preferences if not p.tie)
    parts = []
    if won or lost:
        parts.append("chosen" if not lost else "rejected" if not won else f"chosen {won} times, rejected {lost}")
    if record.desirable is not None:
        parts.append("desirable" if record.desirable[response] else "undesirable")
    if record.scores is not None:
        parts.append(f"score {record.scores[response]:g}")
    return f" ({', '.join(parts)})" if parts else ""
