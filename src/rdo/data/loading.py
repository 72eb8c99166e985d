"""From the dataset part of the configuration to the records of each split."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rdo.data.readers import Reading, read_file, rows_to_records
from rdo.data.records import SPLITS, Record, query_key
from rdo.errors import UserError
from rdo.schema import DatasetConfig

logger = logging.getLogger(__name__)

# The hub's own conversion of data sets published as a script, which `datasets` has stopped running.
PARQUET_BRANCH = "refs/convert/parquet"


@dataclass
class Splits:
    """splits: the records of each of `records.SPLITS`, in the source's order; possibly none.

    counts: of rows, `rows_read` and `dropped_<reason>` (readers.Reading), and `validation_used_as_test`; of records,
    `dropped_query_in_test` and `dropped_query_in_validation` (their query is in a held-out split too) and
    `records_<split>`, before `max_records`. The toy world, made to order, has only the last.
    """

    splits: dict[str, list[Record]]
    counts: dict[str, int]


def load_splits(dataset: DatasetConfig) -> Splits:
    """Records of the configured data, split so that no query is in two of train, validation and test.

    Which query goes where: a hash of (split_seed, query) decides, so the choice depends on nothing else and more rows
    move no query. Where the source has splits of its own, they stay: the hash takes out of train only what is missing,
    train, validation and demonstrations lose the records whose query is in test, and train and demonstrations those
    whose query is in validation. A hub data set of train and validation alone (OpenAI's TL;DR) gives its validation
    as test, for that is the set on which others report.

    Raises UserError for settings that do not fit together, a hub that cannot be reached, and an empty train split, and
    DataError for the data's own faults.
    """
    if min(dataset.validation_share, dataset.test_share) < 0 or dataset.validation_share + dataset.test_share >= 1:
        raise UserError(
            f"dataset.validation_share={dataset.validation_share} and dataset.test_share={dataset.test_share} "
            "must not be negative and must leave something to train on"
        )
    if dataset.max_records is not None and dataset.max_records < 1:
        raise UserError(f"dataset.max_records={dataset.max_records} must be at least 1, or null for all")
    if dataset.source == "toy":
        from rdo.data import toy

        splits, counts = toy.load(dataset.toy), Counter[str]()
    elif dataset.source in ("file", "hub"):
        reading = _read_file(dataset) if dataset.source == "file" else _read_hub(dataset)
        counts = Counter(reading.counts)
        splits = _separate(_assign(reading.records, dataset), counts)
    else:
        raise UserError(f"dataset.source={dataset.source} is not known; choose toy, file or hub")

    if not splits["train"]:
        raise UserError(f"there is nothing to train on: records read {dict(counts)}; check dataset.path and the shares")
    _check_ids(splits)
    for split in SPLITS:
        counts[f"records_{split}"] = len(splits[split])
    return Splits({split: splits[split][: dataset.max_records] for split in SPLITS}, dict(counts))


def _read_file(dataset: DatasetConfig) -> Reading:
    if dataset.path is None:
        raise UserError("dataset.source=file needs dataset.path, a file of JSON lines (also .gz)")
    return read_file(Path(dataset.path), dataset.format)


def _read_hub(dataset: DatasetConfig) -> Reading:
    if dataset.hub_name is None:
        raise UserError("dataset.source=hub needs dataset.hub_name, for example Dahoas/rm-static")
    found = _fetch(dataset)
    unknown = sorted(set(found) - {"train", "validation", "test"})
    if unknown or "train" not in found:
        raise UserError(
            f"{dataset.hub_name} has the splits {', '.join(sorted(found))}; train, and optionally validation and test, "
            "can be used: download the right one and set dataset=file dataset.path=FILE"
        )
    names: dict[str, str | None] = {split: split for split in found}
    if len(found) == 1:
        names["train"] = None  # no split of its own: ours to choose
    records: list[Record] = []
    counts: Counter[str] = Counter()
    if "test" not in found and "validation" in found:
        names["validation"] = "test"
        counts["validation_used_as_test"] = 1
    for split, rows in found.items():
        place = f"{dataset.hub_name}, split {split}, row"
        reading = rows_to_records(((f"{place} {number}", row) for number, row in enumerate(rows, 1)), dataset.format)
        counts.update(reading.counts)
        records += [replace(record, split=names[split]) for record in reading.records]
    return Reading(records, dict(counts))


def _fetch(dataset: DatasetConfig) -> Mapping[str, Iterable[dict[str, Any]]]:
    """The hub's splits, each an iterable of rows."""
    import datasets  # takes seconds to import, and most runs read no hub

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


def _chance(seed: int, key: str) -> float:
    """A number in [0, 1) that looks random, the same for the same seed and text everywhere."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _assign(records: list[Record], dataset: DatasetConfig) -> dict[str, list[Record]]:
    """The records by split: the source's own, and by chance for those of its train split or of none."""
    official = {record.split for record in records}
    if None in official and len(official) > 1:
        named = next(record.id for record in records if record.split is None)
        raise UserError(f"record {named} has no 'split' while others have; give every row one, or none")
    splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for record in records:
        split = record.split or "train"
        if split == "train":
            # Test's share of the range stays test's even where it is not needed, so that both cases agree.
            point = _chance(dataset.split_seed, query_key(record.query)) - dataset.test_share
            if point < 0 and "test" not in official:
                split = "test"
            elif 0 <= point < dataset.validation_share and "validation" not in official:
                split = "validation"
        splits[split].append(record)
    return splits


def _separate(splits: dict[str, list[Record]], counts: Counter[str]) -> dict[str, list[Record]]:
    """Without the records whose query is in a split that is held out from theirs; counts how many."""
    splits = dict(splits)
    for held_out, others in (
        ("test", ("validation", "train", "demonstrations")),
        ("validation", ("train", "demonstrations")),
    ):
        queries = {query_key(record.query) for record in splits[held_out]}
        for split in others:
            kept = [record for record in splits[split] if query_key(record.query) not in queries]
            counts[f"dropped_query_in_{held_out}"] += len(splits[split]) - len(kept)
            splits[split] = kept
    return splits


def _check_ids(splits: dict[str, list[Record]]) -> None:
    """Stages exchange numbers by record id, whatever the split: the hub's splits may not repeat each other's ids."""
    splits_of: dict[str, str] = {}
    for split, records in splits.items():
        for record in records:
            if splits_of.setdefault(record.id, split) != split:
                raise UserError(f"id '{record.id}' is in {splits_of[record.id]} and in {split}; make ids unique")
