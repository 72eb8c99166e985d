"""One run: its configuration, and the data it works on, loaded and encoded once however many stages read them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rdo.artifacts import Artifact, Provenance, fingerprint
from rdo.data.encoding import EncodedRecord, TruncationReport, encode
from rdo.data.loading import Splits, load_splits
from rdo.data.records import Record, fingerprint_records
from rdo.errors import UserError
from rdo.models import check_vocabulary, load_policy, load_scorer, load_tokenizer
from rdo.schema import Config, TrainingConfig
from rdo.tracking import Tracker


@dataclass
class Cache:
    """Data in memory, shared by the stages and rows of one process."""

    splits: dict[str, Splits] = field(default_factory=dict)
    fingerprints: dict[tuple[str, str], str] = field(default_factory=dict)
    encoded: dict[tuple[str, ...], tuple[list[EncodedRecord], TruncationReport]] = field(default_factory=dict)


@dataclass
class Run:
    """A configuration with its data; `requested` is the stage that the user asked for."""

    config: Config
    provenance: Provenance
    requested: str
    cache: Cache = field(default_factory=Cache)

    @property
    def dataset_key(self) -> str:
        """Under which the cache holds this configuration's data."""
        return fingerprint(asdict(self.config.dataset))

    def splits(self) -> Splits:
        """The data set's records by split."""
        if self.dataset_key not in self.cache.splits:
            splits = load_splits(self.config.dataset)
            self.cache.splits[self.dataset_key] = splits
            counts = ", ".join(f"{len(records)} {name}" for name, records in splits.splits.items())
            print(f"[data] {self.config.dataset.name}: {counts}", flush=True)
        return self.cache.splits[self.dataset_key]

    def records(self, split: str) -> list[Record]:
        """The records of a split; UserError where it has none."""
        records = self.splits().splits.get(split, [])
        if not records:
            raise UserError(f"dataset={self.config.dataset.name} has no record in its split {split}")
        return records

    def data_settings(self, split: str) -> dict[str, Any]:
        """What of the data and its encoding determines a result."""
        key = (self.dataset_key, split)
        if key not in self.cache.fingerprints:
            self.cache.fingerprints[key] = fingerprint_records(self.records(split))
        dataset = self.config.dataset
        return {
            "split": split,
            "records": self.cache.fingerprints[key],
            "template": dataset.template,
            "max_length": dataset.max_length,
        }

    def encoded(self, split: str, tokenizer: PreTrainedTokenizerBase) -> list[EncodedRecord]:
        """Token ids of a split's records, in the order of `records(split)`."""
        key = (self.dataset_key, split, tokenizer_key(tokenizer))
        if key not in self.cache.encoded:
            dataset = self.config.dataset
            self.cache.encoded[key] = encode(
                self.records(split),
                tokenizer,
                dataset.template,
                dataset.max_length,
                dataset.max_truncated_share,
                # The toy world's demonstrations hold an <end> between note and review, which is meant.
                parse_special=dataset.source == "toy" and split == "demonstrations",
            )
            report = self.cache.encoded[key][1]
            if report.truncated:
                print(
                    f"[data] {split}: {report.truncated} of {report.records} records cut to {dataset.max_length} "
                    f"tokens ({report.query_tokens_cut} query, {report.response_tokens_cut} response tokens)",
                    flush=True,
                )
        return self.cache.encoded[key][0]

    def truncation(self) -> dict[str, Any] | None:
        """What encoding has cut so far, by split."""
        reports = {key[1]: asdict(report) for key, (_, report) in self.cache.encoded.items()}
        return reports or None

    def device(self) -> torch.device:
        """The device of engine.device; UserError where CUDA is asked for and there is none."""
        wanted = self.config.engine.device
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        if wanted == "cuda" and not torch.cuda.is_available():
            raise UserError("engine.device=cuda: there is no CUDA device here; use engine.device=cpu (or auto)")
        return torch.device(wanted)

    def policy(self, artifact: Artifact) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A policy and its tokenizer, on the run's device."""
        return self._loaded(artifact, load_policy(model_path(artifact), self.config.model))

    def scorer(self, artifact: Artifact) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A scorer and its tokenizer, on the run's device."""
        return self._loaded(artifact, load_scorer(model_path(artifact), self.config.model))

    def _loaded(self, artifact: Artifact, model: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        tokenizer = load_tokenizer(model_path(artifact), self.config.model)
        check_vocabulary(model, tokenizer, model_path(artifact))
        return self.on_device(model), tokenizer

    def on_device(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model, moved to the run's device."""
        return model.to(self.device())  # type: ignore[arg-type]

    def tracker(self, folder: Path, name: str) -> Tracker:
        """Where a training run in this folder logs to."""
        return Tracker(self.config.tracker, folder, name, self.provenance.config)


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint of everything that decides a text's ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return fingerprint([rules, tokenizer.bos_token_id, tokenizer.eos_token_id, str(tokenizer.chat_template)])


def model_path(artifact: Artifact) -> Path:
    """Where an artifact's model lies: in a stage's subfolder, or where the user said."""
    own = artifact.folder / "model"
    return own if own.is_dir() else artifact.folder


def select(records: Sequence[Record], config: TrainingConfig) -> list[int]:
    """Positions of the records that a stage trains on, chosen by a hash of their ids, whatever their order."""
    enough = [n for n, record in enumerate(records) if len(record.responses) >= config.min_responses]
    enough.sort(key=lambda n: (hashlib.blake2b(records[n].id.encode()).digest(), records[n].id))
    return enough[: config.max_records]
