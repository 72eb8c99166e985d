"""Stage inspect: what was understood of a data set, before anything is trained on it.

Prints, and leaves in `run_dir`/inspect: inspect.txt (what is printed), inspect.json (the numbers), lengths.png.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from rdo.data.encoding import RECORDS_PER_CALL, EncodedRecord, encode_batch
from rdo.data.inspection import cut_at, histogram, label_statistics, summary
from rdo.data.loading import INVALID, Splits
from rdo.data.records import SPLITS, Record
from rdo.data.table import Records
from rdo.data.templates import is_dialogue
from rdo.models.given import given
from rdo.models.pretrained import load_tokenizer
from rdo.models.tokenizers import make_tokenizer, train_byte_pair
from rdo.report.figures import COLOURS, style
from rdo.runtime.errors import printable
from rdo.runtime.files import replace_file, write_json
from rdo.runtime.progress import progress_bar
from rdo.stages.run import Run, model_path
from rdo.stages.sft import training_texts

EXAMPLES = 3
# So many of the ignored columns are named.
MOST_COLUMNS = 30
# An example's texts are shortened in their middle to so many characters.
EXAMPLE_LENGTH = 700
# Of a byte-pair tokenizer that is trained for the inspection alone, where the configured model has none for this data.
VOCABULARY_SIZE = 4096
UNLIMITED = 1 << 40  # tokens


def inspect_data(run: Run) -> Path:
    """Reads, counts and tokenizes the data, prints what was found, and returns the folder with the same in files."""
    splits = run.splits()
    examined = {name: evenly(records, run.config.inspect.records) for name, records in splits.splits.items()}
    tokenizer, origin = choose_tokenizer(run, examined["train"])
    found: dict[str, Any] = {
        "dataset": run.config.dataset.name,
        "format": splits.format,
        "counts": splits.counts,
        "ignored_columns": splits.ignored,
        "tokenizer": origin,
        "splits": {},
    }
    lengths: dict[str, np.ndarray] = {}
    examples: list[tuple[Record, EncodedRecord, tuple[int, int]]] = []
    for name in SPLITS:
        if len(examined[name]):
            measured, shown = measure(run, tokenizer, name, examined[name])
            lengths[name] = measured
            examples = examples or shown if name != "train" else shown
            found["splits"][name] = describe_split(run, splits.splits[name], examined[name], measured)
    text = "\n".join(
        [
            *overview_lines(run, splits, found),
            *length_lines(run, found, lengths),
            *example_lines(tokenizer, examples),
            *advice_lines(run, splits, examined["train"], lengths["train"]),
        ]
    )
    folder = run.provenance.run_dir / "inspect"
    with replace_file(folder / "inspect.txt") as file:
        file.write_text(text + "\n")
    write_json(folder / "inspect.json", found)
    draw_lengths(lengths, run.config.dataset.max_length, folder / "lengths.png")
    print(f"{text}\n\n{folder}/: inspect.txt, inspect.json, lengths.png", flush=True)
    return folder


def evenly(records: Records, count: int) -> Records:
    """So many of the records, evenly spaced; all where there are no more."""
    return records.only(np.unique(np.linspace(0, len(records) - 1, min(count, len(records))).round().astype(int)))


def choose_tokenizer(run: Run, records: Records) -> tuple[PreTrainedTokenizerBase, str]:
    """The configured model's tokenizer, and what it is; trained on these records where the model has none for them."""
    config = run.config.model
    if config.path:
        return load_tokenizer(model_path(given(config.path, config.revision)), config), f"of {config.path}"
    if config.tokenizer == "toy" and run.config.dataset.source == "toy":
        return make_tokenizer(config, []), "the toy world's"
    size = config.vocabulary_size if config.tokenizer == "byte_pair" else VOCABULARY_SIZE
    origin = f"byte-pair, {size} ids, trained on these records; model=hub model.path=NAME shows another model's view"
    return train_byte_pair(training_texts(records), size), origin


def measure(
    run: Run, tokenizer: PreTrainedTokenizerBase, split: str, records: Records
) -> tuple[np.ndarray, list[tuple[Record, EncodedRecord, tuple[int, int]]]]:
    """Token counts [records, 3] before anything is cut (prompt; longest response; both), and a few encoded examples."""
    dataset = run.config.dataset
    parse_special = dataset.source == "toy" and split == "demonstrations"
    wanted = set(np.linspace(0, len(records) - 1, min(EXAMPLES, len(records))).round().astype(int).tolist())
    examples, lengths = [], []
    with progress_bar(len(records), f"tokenizing {split}") as bar:
        for start in range(0, len(records), RECORDS_PER_CALL):
            part = records[start : start + RECORDS_PER_CALL]
            whole = encode_batch(part, tokenizer, dataset.template, UNLIMITED, parse_special)
            for number, (record, (encoded, _)) in enumerate(zip(part, whole, strict=True), start):
                longest = max(map(len, encoded.responses))
                lengths.append((len(encoded.prompt), longest, len(encoded.prompt) + longest))
                if number in wanted:
                    cut = encode_batch([record], tokenizer, dataset.template, dataset.max_length, parse_special)
                    examples.append((record, *next(cut)))
            bar.update(len(part))
    return np.array(lengths), examples


def describe_split(run: Run, records: Records, examined: Records, lengths: np.ndarray) -> dict[str, Any]:
    """The numbers of one split."""
    max_length = run.config.dataset.max_length
    return {
        "records": len(records),
        "queries": len(np.unique(records.query_keys())),
        "examined": len(examined),
        "labels": label_statistics(examined),
        "tokens": {
            name: summary(column)
            for name, column in zip(("prompt", "longest response", "prompt + response"), lengths.T, strict=True)
        },
        "cut": cut_at(lengths[:, 2], max_length),
        "tokens_cut": int(np.maximum(lengths[:, 2] - max_length, 0).sum()),
    }


def overview_lines(run: Run, splits: Splits, found: dict[str, Any]) -> list[str]:
    """Where the data comes from, what was left out, and what the labels say."""
    dataset, counts = run.config.dataset, splits.counts
    origin = dataset.path or dataset.hub_name or "made"
    lines = [
        printable(f"Data set {dataset.name}: {origin}"),
        f"  format {splits.format}" + ("" if dataset.format == "auto" else " (as dataset.format says)"),
    ]
    if "rows_read" in counts:
        left = {name: n for name, n in counts.items() if n and name.startswith(("dropped_", "invalid_"))}
        lines.append(f"  {counts['rows_read']} rows read; {listing(left) or 'nothing'} left out")
    if splits.source and (splits.source.folder / INVALID).exists():
        lines.append(f"  the invalid rows are listed in {splits.source.folder / INVALID}")
    if splits.ignored:
        named = ", ".join(splits.ignored[:MOST_COLUMNS]) + (", ..." if len(splits.ignored) > MOST_COLUMNS else "")
        lines.append(printable(f"  ignored columns: {named}"))
    lines.append("")
    for name, split in found["splits"].items():
        labels = split["labels"]
        partly = (
            f" (of which {split['examined']} examined, evenly spaced)" if split["examined"] < split["records"] else ""
        )
        lines.append(f"Split {name}: {split['records']} records of {split['queries']} queries{partly}")
        lines.append(f"  responses a record: {listing(labels['responses'], '{1} with {0}')}")
        if labels["preferences"]:
            lines.append(f"  preferences: {labels['preferences']}, of which {labels['ties']} ties")
            lines.append(
                f"  near-identical pairs: {labels['near_identical']}; contradicting labels: {labels['contradictions']}"
            )
            lines.append(f"  the longer response is the chosen one in {percent(labels['chosen_longer'])}")
        if labels["desirable"] or labels["undesirable"]:
            lines.append(f"  unpaired: {labels['desirable']} desirable, {labels['undesirable']} undesirable responses")
        if labels["strengths"]:
            lines.append(f"  strengths: {listing(labels['strengths'], '{1} of {0:g}')}")
        if labels["scored"]:
            agree = percent(labels["scores_agree"])
            lines.append(f"  scores with {labels['scored']} records; they agree with {agree} of the labels")
            if labels["scores_contradict"]:
                lines.append(f"  chosen has the lower score in {labels['scores_contradict']} preferences")
        lines.append(f"  records that repeat another's texts: {labels['repeated_texts']}")
        lines += [
            f"  first of {name.replace('_', ' ')}: {printable(where)}" for name, where in labels["examples"].items()
        ]
    shared = [counts.get(f"dropped_query_in_{name}", 0) for name in ("test", "validation")]
    lines.append(
        f"Queries shared by splits: {shared[0]} records left out for a query that is in test, {shared[1]} for one that "
        "is in validation"
    )
    return lines


def listing(counts: dict[Any, int], form: str = "{1} {0}") -> str:
    """Counts in a row."""
    return ", ".join(form.format(name, count) for name, count in counts.items())


def percent(value: float | None) -> str:
    """A share as a person reads it."""
    return "no pair" if value is None else f"{value:.1%}"


def length_lines(run: Run, found: dict[str, Any], lengths: dict[str, np.ndarray]) -> list[str]:
    """Token counts, what truncation would cut, and the histogram."""
    max_length = run.config.dataset.max_length
    lines = ["", f"Tokens (tokenizer {printable(found['tokenizer'])}; template {run.config.dataset.template})"]
    names = ("min", "5%", "50%", "mean", "95%", "99%", "max")
    lines.append(f"  {'':<32}" + "".join(f"{name:>8}" for name in names))
    for split, entry in found["splits"].items():
        for part, values in entry["tokens"].items():
            lines.append(f"  {split + ', ' + part:<32}" + "".join(f"{values[name]:>8.0f}" for name in names))
    for split, entry in found["splits"].items():
        lines.append(
            f"dataset.max_length={max_length} cuts {percent(entry['cut'])} of {split} ({entry['tokens_cut']} tokens)"
        )
    lines += ["", "Tokens of prompt + longest response, train"]
    return [*lines, *(f"  {line}" for line in histogram(lengths["train"][:, 2], mark=max_length))]


def example_lines(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[tuple[Record, EncodedRecord, tuple[int, int]]]
) -> list[str]:
    """Records as the model will see them, special tokens and line breaks visible."""
    lines = []
    for record, encoded, (query_cut, response_cut) in examples:
        cut = f"; {query_cut} query and {response_cut} response tokens cut" if query_cut or response_cut else ""
        lines += ["", printable(f"Example {record.place or record.id} ({len(encoded.prompt)} prompt tokens{cut})")]
        lines += shown(tokenizer, "prompt", encoded.prompt)
        for number, ids in enumerate(encoded.responses):
            lines += shown(tokenizer, f"response {number}{role_of(record, number)}, {len(ids)} tokens", ids)
    return lines


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


def shown(tokenizer: PreTrainedTokenizerBase, title: str, ids: Sequence[int]) -> list[str]:
    """A text of token ids under its title, line breaks as ↵, a space at either end as ␣, shortened in its middle."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=False))
    if len(text) > EXAMPLE_LENGTH:
        half = EXAMPLE_LENGTH // 2
        text = f"{text[:half]} [… {len(text) - 2 * half} characters …] {text[-half:]}"
    text = printable(re.sub("^ | $", "␣", text.replace("\n", "↵")))
    return [f"  {title}:", *textwrap.wrap(text, 112, initial_indent="    ", subsequent_indent="    ")]


def advice_lines(run: Run, splits: Splits, train: Records, lengths: np.ndarray) -> list[str]:
    """What a person who knows the code would say of these settings, if anything."""
    dataset = run.config.dataset
    lines = []
    first = train[:100]
    if dataset.template == "raw" and any(record.messages for record in first):
        lines.append("the queries are conversations: dataset.template=chat (or hh) marks who speaks")
    elif dataset.template == "raw" and not any(is_dialogue(record.query) for record in first):
        spaced = sum(response[:1].isspace() for record in first for response in record.responses)
        if not spaced:
            lines.append("responses join their prompt without a space: a template (alpaca, chat) would part them")
    longest = int(np.quantile(lengths[:, 2], 0.99))
    if cut_at(lengths[:, 2], dataset.max_length) > 0.01:
        lines.append(f"dataset.max_length={longest} would cut 1 % of the records only")
    return ["", *(f"Advice: {line}" for line in lines)] if lines else []


def draw_lengths(lengths: dict[str, np.ndarray], max_length: int, path: Path) -> None:
    """A histogram of prompt and response tokens of every split, as a picture."""
    with style(), replace_file(path) as temporary:
        figure = Figure(figsize=(8.0, 2.2 * len(lengths)), layout="constrained")
        for axes, (split, counts) in zip(
            figure.subplots(len(lengths), squeeze=False)[:, 0], lengths.items(), strict=True
        ):
            top = max(max_length, int(np.quantile(counts[:, 2], 0.995)))
            bins = np.linspace(0, top, 60).tolist()
            for column, name in enumerate(("prompt", "longest response", "prompt + response")):
                axes.hist(np.minimum(counts[:, column], top), bins, histtype="step", color=COLOURS[column], label=name)
            axes.axvline(max_length, color="#3A3A3A", linestyle=":", label="max_length")
            axes.set_title(f"{split}: {len(counts)} records")
            axes.set_xlabel("tokens")
        axes.legend()
        figure.savefig(temporary, format="png", dpi=130)
