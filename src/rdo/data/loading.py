"""From the dataset part of the configuration to the records of each split."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from rdo.data.files import Placed, content_hash, name_of, resolve, rows
from rdo.data.readers import Reading
from rdo.data.records import SPLITS, Record, Records, write_records
from rdo.runtime.errors import UserError
from rdo.runtime.files import replace_file
from rdo.runtime.processes import broadcast
from rdo.runtime.progress import progress_bar
from rdo.runtime.store import Artifact, Provenance, produce
from rdo.settings import DatasetConfig

logger = logging.getLogger(__name__)

# The hub's own conversion of data sets published as a script, which `datasets` has stopped running.
PARQUET_BRANCH = "refs/convert/parquet"
RECORDS, INVALID = "records.arrow", "invalid.jsonl"
# Raised whenever the same rows would be read as other records, or these written otherwise.
READING_VERSION = 4


@dataclass
class Splits:
    """splits: the records of each of `records.SPLITS`, in the source's order; possibly none.

    counts: of rows, those of `readers.Reading`; of records, `dropped_query_in_<split>` (one that is held out) and
    `records_<split>`, before `max_records`; `validation_used_as_test`. source: the artifact that holds the records.
    format: what the rows were read as. ignored: columns that nothing was read from.
    """

    splits: dict[str, Records]
    counts: dict[str, int]
    source: Artifact
    format: str
    ignored: list[str] = field(default_factory=list)


def load_splits(dataset: DatasetConfig, provenance: Provenance) -> Splits:
    """Records of the configured data, split so that no query is in two of train, validation and test.

    What files, the hub or the toy world hold is read once, into a memory-mapped file under `provenance.run_dir`/data.

    A hash of (split_seed, query) decides where a query goes, so more rows move none. Splits of the source's own stay:
    the hash takes out of train only what is missing, and what is held out is taken out of all others. A hub data set of
    train and validation alone (OpenAI's TL;DR) gives its validation as test, for that is what others report on.

    Raises UserError for a hub that cannot be reached and an empty train split, and DataError for the data's own faults.
    """
    found = _load(dataset, provenance)
    if not len(found.splits["train"]):
        raise UserError(
            f"dataset={dataset.name}: nothing is left to train on "
            f"({', '.join(f'{count} {name}' for name, count in found.counts.items() if count)}); "
            "check dataset.path, dataset.validation_share and dataset.test_share"
        )
    for split in SPLITS:
        found.counts[f"records_{split}"] = len(found.splits[split])
        found.splits[split] = found.splits[split].only(slice(dataset.max_records))
    return found


def _load(dataset: DatasetConfig, provenance: Provenance) -> Splits:
    """The splits of a file or a hub data set."""
    hub = _fetch(dataset) if dataset.source == "hub" else {}
    ours = _hub_splits(dataset, list(hub)) if hub else {}
    files = resolve(dataset.path) if dataset.source == "file" else []
    settings = {
        "toy": asdict(dataset.toy) if dataset.source == "toy" else None,
        "files": broadcast(lambda: [[name_of(file), content_hash(file)] for file in files]),
        "hub": [dataset.hub_name, {split: getattr(hub[split], "_fingerprint", None) for split in ours}],
        "format": dataset.format,
        "on_invalid": [dataset.on_invalid, dataset.max_invalid_share],
        "split_seed": dataset.split_seed,
        "version": READING_VERSION,
    }

    def make(folder: Path) -> dict[str, Any]:
        if dataset.source == "toy":
            from rdo.data import toy  # which needs a tokenizer

            with replace_file(folder / RECORDS) as file:
                write_records(chain.from_iterable(toy.load(dataset.toy).values()), file, dataset.split_seed)
            return {"counts": {}, "format": "toy", "ignored": []}
        parts = [(split, _hub_rows(dataset, name, hub[name])) for name, split in ours.items()]
        return read_into(folder, parts or [(None, chain.from_iterable(map(rows, files)))], dataset)

    # Whatever the stage, its data is read: there is no command to make it beforehand.
    always = replace(provenance, build_inputs=True)
    artifact = produce(always, "data", dataset.name, settings, {}, make, False, together=False)
    results = artifact.manifest()["results"]
    counts = Counter(results["counts"])
    if ours.get("validation") == "test" and not dataset.hub_split:
        counts["validation_used_as_test"] = 1
    if invalid := sum(count for name, count in counts.items() if name.startswith("invalid_")):
        logger.warning("%d invalid rows left out: %s", invalid, artifact.folder / INVALID)
    splits = _separate(_assign(Records.in_file(artifact.folder / RECORDS), dataset), counts)
    return Splits(splits, dict(counts), artifact, results["format"], results["ignored"])


def read_into(folder: Path, parts: Iterable[tuple[str | None, Placed]], dataset: DatasetConfig) -> dict[str, Any]:
    """Reads rows into the folder's records.arrow; what was counted, the format, and columns that were not read.

    parts: rows, and the split that all of them belong to (None: the one that a row names itself, if it does). Leaves
    invalid.jsonl where rows were left out, also when there were too many of them.
    """
    with (folder / INVALID).open("w") as invalid, progress_bar(None, "reading rows", unit=" rows") as bar:
        reading = Reading(dataset.format, dataset.on_invalid, dataset.max_invalid_share, invalid)

        def records() -> Iterator[Record]:
            for split, rows in parts:
                for record in reading.records(rows, split):
                    bar.update(reading.counts["rows_read"] - bar.n)
                    yield record
            reading.judge()

        with replace_file(folder / RECORDS) as file:
            write_records(records(), file, dataset.split_seed)
    if not reading.invalid:
        (folder / INVALID).unlink()
    counts = {name: count for name, count in reading.counts.items() if count or name == "rows_read"}
    return {"counts": counts, "format": reading.format, "ignored": sorted(map(str, reading.columns - reading.read))}


def _hub_rows(dataset: DatasetConfig, split: str, held: Iterable[dict[str, Any]]) -> Placed:
    return ((f"{dataset.hub_name}, split {split}, row {number}", row) for number, row in enumerate(held, 1))


def _hub_splits(dataset: DatasetConfig, found: list[str]) -> dict[str, str | None]:
    """The hub's splits that are read, and which of ours each becomes; None: ours to choose."""
    has = f"{dataset.hub_name} has the splits {', '.join(sorted(found))}"
    for setting in ("hub_split", "hub_test_split"):
        if (split := getattr(dataset, setting)) and split not in found:
            raise UserError(f"dataset.{setting}={split}: {has}")
    if dataset.hub_split and dataset.hub_test_split:
        return {dataset.hub_split: "train", dataset.hub_test_split: "test"}
    if dataset.hub_split or found == ["train"]:
        return {dataset.hub_split or "train": None}
    if "train" not in found or not {"train", "validation", "test"}.issuperset(found):
        raise UserError(
            f"{has}: set dataset.hub_split to the one to train on, and dataset.hub_test_split to the one to test on, "
            "if there is one"
        )
    return {split: "test" if split == "validation" and "test" not in found else split for split in found}


def _fetch(dataset: DatasetConfig) -> Mapping[str, Any]:
    """The hub's splits, each an iterable of rows."""
    import datasets  # takes a second to import, and most runs read no hub

    name, config, revision = dataset.hub_name, dataset.hub_config, dataset.hub_revision
    try:
        try:
            return datasets.load_dataset(name, name=config, revision=revision)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error) or revision is not None:
                raise
            logger.warning("%s is published as a script; reading the hub's conversion of it, %s", name, PARQUET_BRANCH)
            return datasets.load_dataset(name, data_dir=config, revision=PARQUET_BRANCH)
    except Exception as error:  # whatever the network, the hub and its client may raise: the way out is the same
        raise UserError(
            f"cannot load {name} from the hub ({type(error).__name__}: {error}); check dataset.hub_name, hub_config, "
            "hub_revision and the network, or download its file elsewhere and set dataset=file dataset.path=FILE"
        ) from error


def _assign(records: Records, dataset: DatasetConfig) -> dict[str, Records]:
    """The records by split: the source's own, and by chance for those of its train split or of none."""
    code = records.known("split").astype(np.int64)
    if (code < 0).any() and (code >= 0).any():
        without = records[int(np.flatnonzero(code < 0)[0])]
        raise UserError(f"{without.place}: no 'split' while other rows have one; give every row one, or none")
    official = {SPLITS[number] for number in np.unique(code[code >= 0])}
    train, validation, test = (SPLITS.index(split) for split in ("train", "validation", "test"))
    code[code < 0] = train
    # Test's share of the range stays test's even where it is not needed, so that both cases agree.
    point = records.known("chance") - dataset.test_share
    open_to_choice = code == train
    if "test" not in official:
        code[open_to_choice & (point < 0)] = test
    if "validation" not in official:
        code[open_to_choice & (point >= 0) & (point < dataset.validation_share)] = validation
    return {split: records.only(code == number) for number, split in enumerate(SPLITS)}


def _separate(splits: dict[str, Records], counts: Counter[str]) -> dict[str, Records]:
    """Without the records whose query is in a split that is held out from theirs; counts how many."""
    splits = dict(splits)
    others = ("train", "demonstrations")
    for held_out, fuller in (("test", ("validation", *others)), ("validation", others)):
        queries = splits[held_out].known("query_key")
        for split in fuller:
            kept = ~np.isin(splits[split].known("query_key"), queries)
            counts[f"dropped_query_in_{held_out}"] += int((~kept).sum())
            splits[split] = splits[split].only(kept)
    return splits
