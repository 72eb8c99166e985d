"""Stage inspect: what was understood of the data, and what a model will see of it. Nothing else is made."""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import transformers

from rdo.data.encoding import EncodedRecord, encode
from rdo.data.loading import INVALID
from rdo.data.records import SPLITS, Record
from rdo.models.given import given
from rdo.models.pretrained import load_tokenizer
from rdo.models.tokenizers import make_tokenizer, train_byte_pair
from rdo.runtime.errors import printable
from rdo.stages.run import Run, model_path
from rdo.stages.sft import training_texts

EXAMPLES = 3
LONGEST_SHOWN = 700  # characters; a longer text loses its middle
# Of a byte-pair tokenizer that is trained for the inspection alone, where the configured model has none for this data.
VOCABULARY_SIZE = 4096
UNLIMITED = 1 << 40  # tokens
QUANTILES = {"min": 0.0, "5%": 0.05, "50%": 0.5, "95%": 0.95, "99%": 0.99, "max": 1.0}


def inspect_data(run: Run) -> None:
    """Reads, counts and tokenizes the data, and prints what was found, bad rows too."""
    dataset = replace(run.config.dataset, on_invalid="skip", max_invalid_share=1.0)
    run = replace(run, config=replace(run.config, dataset=dataset))
    for line in described(run):
        print(printable(line), flush=True)  # what a terminal would act upon as escapes


def described(run: Run) -> Iterator[str]:
    """Lines for the reader; parts of them come from the data."""
    splits, dataset = run.splits(), run.config.dataset
    yield f"Data set {dataset.name}: {dataset.path or dataset.hub_name or 'made'}"
    yield f"  format {splits.format}" + ("" if dataset.format == "auto" else " (as dataset.format says)")
    if splits.ignored:
        yield f"  ignored columns: {', '.join(splits.ignored)}"
    if "rows_read" in splits.counts:
        left = {name: n for name, n in splits.counts.items() if n and name.startswith(("dropped_", "invalid_"))}
        yield f"  {splits.counts['rows_read']} rows read; {listing(left) or 'nothing'} left out"
        if (listed := splits.source.folder / INVALID).exists():
            yield f"  invalid rows, which dataset.on_invalid=skip leaves out, are listed in {listed}; the first:"
            with listed.open() as lines:
                yield from (f"    {json.loads(line)['message']}" for line in islice(lines, EXAMPLES))
    examined: dict[str, list[Record]] = {}
    for name in SPLITS:
        if records := splits.splits[name]:
            examined[name] = evenly(records, run.config.inspect.records)
            queries, few = len(np.unique(records.known("query_key"))), len(examined[name])
            partly = f" (of which {few} examined, evenly spaced)" if few < len(records) else ""
            yield f"\nSplit {name}: {len(records)} records of {queries} queries{partly}"
            yield from label_lines(examined[name])
    tokenizer, origin = choose_tokenizer(run, examined["train"])
    yield f"\nTokens (tokenizer {origin}; template {dataset.template})"
    yield f"  {'':<32}{''.join(f'{name:>8}' for name in QUANTILES)}"
    for name, some in examined.items():
        # The toy world's demonstrations hold an <end> between note and review, which is meant.
        parse_special = dataset.source == "toy" and name == "demonstrations"
        encoded = encode(some, tokenizer, **run.encoding() | {"max_length": UNLIMITED}, parse_special=parse_special)
        prompts = np.array([len(record.prompt) for record in encoded])
        longest = np.array([max(map(len, record.responses)) for record in encoded])
        for part, lengths in (("prompt", prompts), ("longest response", longest), ("both", prompts + longest)):
            numbers = np.quantile(lengths, list(QUANTILES.values()), method="nearest")
            yield f"  {f'{name}, {part}':<32}{''.join(f'{number:>8}' for number in numbers)}"
        cut = int((prompts + longest > dataset.max_length).sum())
        yield f"  dataset.max_length={dataset.max_length} cuts {share(cut, len(encoded))}"
    for record in evenly(examined["train"], EXAMPLES):
        yield from example_lines(tokenizer, record, *encode([record], tokenizer, **run.encoding()))


def evenly(records: Sequence[Record], count: int) -> list[Record]:
    """So many of the records, evenly spaced from the first to the last; all where there are no more."""
    return [records[n] for n in np.linspace(0, len(records) - 1, min(count, len(records)), dtype=int).tolist()]


def choose_tokenizer(run: Run, records: Sequence[Record]) -> tuple[transformers.PreTrainedTokenizerBase, str]:
    """The configured model's tokenizer, and what it is; trained on these records where the model has none for them."""
    config = run.config.model
    if config.path:
        return load_tokenizer(model_path(given(config.path, config.revision)), config), f"of {config.path}"
    if config.tokenizer == "toy" and run.config.dataset.source == "toy":
        return make_tokenizer(config, []), "the toy world's"
    size = config.vocabulary_size if config.tokenizer == "byte_pair" else VOCABULARY_SIZE
    origin = f"byte-pair, {size} ids, trained on these records; model=hub model.path=NAME shows another model's view"
    return train_byte_pair(training_texts(records), size), origin


def label_lines(records: Sequence[Record]) -> Iterator[str]:
    """How many responses and what labels records have, and what the labels go with."""
    yield f"  responses a record: {listing(Counter(len(record.responses) for record in records), '{1} with {0}')}"
    if conversations := sum(bool(record.messages) for record in records):
        yield f"  conversations: {conversations}; dataset.template=chat (or hh) marks who speaks"
    preferences = [(record, preference) for record in records for preference in record.preferences]
    if preferences:
        decided = [(record, p) for record, p in preferences if not p.tie]
        yield f"  preferences: {len(preferences)}, of which {len(preferences) - len(decided)} ties"
        leads = np.array([len(r.responses[p.chosen]) - len(r.responses[p.rejected]) for r, p in decided])
        longer = share((leads > 0).sum(), (leads != 0).sum())
        yield f"  where lengths differ, the longer response is the chosen one in {longer}"
        if strengths := Counter(p.strength for _, p in preferences if p.strength is not None):
            yield f"  strengths: {listing(strengths, '{1} of {0:g}')}"
        if gains := [r.scores[p.chosen] - r.scores[p.rejected] for r, p in decided if r.scores is not None]:
            yield f"  chosen has the lower score in {share(sum(gain < 0 for gain in gains), len(gains))}"
    if labels := Counter(label for record in records for label in record.desirable or ()):
        yield f"  unpaired: {labels[True]} desirable, {labels[False]} undesirable responses"


def listing(counts: Mapping[Any, int], form: str = "{1} {0}") -> str:
    """Counts in a row, by what is counted."""
    return ", ".join(form.format(name, count) for name, count in sorted(counts.items()))


def share(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({part / whole:.1%})" if whole else "")


def example_lines(
    tokenizer: transformers.PreTrainedTokenizerBase, record: Record, encoded: EncodedRecord
) -> Iterator[str]:
    """A record as the model will see it, special tokens and line breaks visible."""
    yield f"\nExample {record.place or record.id}"
    if encoded.query_cut or encoded.response_cut:
        yield f"  cut: {encoded.query_cut} query and {encoded.response_cut} response tokens"
    labels = [f"response {p.chosen} {'ties with' if p.tie else 'over'} {p.rejected}" for p in record.preferences]
    labels += [f"{name} {values}" for name in ("scores", "desirable") if (values := getattr(record, name)) is not None]
    yield f"  labels: {'; '.join(labels) or 'none'}"
    for name, ids in [("prompt", encoded.prompt), *((f"response {n}", ids) for n, ids in enumerate(encoded.responses))]:
        yield f"  {name}, {len(ids)} tokens:"
        text = str(tokenizer.decode(list(ids), skip_special_tokens=False))
        if len(text) > LONGEST_SHOWN:
            half = LONGEST_SHOWN // 2
            text = f"{text[:half]} [… {len(text) - 2 * half} characters …] {text[-half:]}"
        # A space at either end is easily lost, and much depends on the one between prompt and response.
        text = printable(re.sub("^ | $", "␣", text.replace("\n", "↵")))
        yield from textwrap.wrap(text, 112, initial_indent="    ", subsequent_indent="    ")
