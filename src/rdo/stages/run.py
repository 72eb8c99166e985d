"""One run: its configuration, and the data it works on, loaded and encoded once however many stages read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm

from rdo.data.encoding import (
    TOKENS_VERSION,
    EncodedRecord,
    begin_ids,
    check_cuts,
    encode,
    encode_into,
    encoded_in,
    left_out,
    order_fingerprint,
)
from rdo.data.loading import Splits, load_splits
from rdo.data.records import Record, Records
from rdo.models.pretrained import load_policy, load_scorer, load_tokenizer
from rdo.models.traits import stop_between_layers
from rdo.runtime.errors import NotFiniteError, UserError
from rdo.runtime.processes import broadcast, dealt, world
from rdo.runtime.progress import progress_bar
from rdo.runtime.store import PART_OF, Artifact, Provenance, artifact_of, fingerprint, found, produce
from rdo.sequences.budget import tokens_per_micro_batch
from rdo.sequences.forward import Reads, read_all
from rdo.sequences.preparation import computing_in, set_layout
from rdo.settings import Config, TrainingConfig
from rdo.tracking import Tracker
from rdo.training.engine import precision_of


@dataclass
class Cache:
    """Data that is loaded, shared by the stages and rows of one process."""

    splits: dict[str, Splits] = field(default_factory=dict)
    fingerprints: dict[tuple[str, str], str] = field(default_factory=dict)
    encoded: dict[tuple[str, ...], Sequence[EncodedRecord]] = field(default_factory=dict)


@dataclass
class Run:
    """A configuration with its data; `requested` is the stage that the user asked for."""

    config: Config
    provenance: Provenance
    requested: str
    cache: Cache = field(default_factory=Cache)
    missing: list[tuple[str, str]] | None = None  # where it is a list, results that are missing are noted, not made

    @property
    def dataset_key(self) -> str:
        """Under which the cache holds this configuration's data."""
        return fingerprint(asdict(self.config.dataset))

    def splits(self) -> Splits:
        """The data set's records by split."""
        if self.dataset_key not in self.cache.splits:
            splits = load_splits(self.config.dataset, self.provenance)
            self.cache.splits[self.dataset_key] = splits
            counts = ", ".join(f"{len(records)} {name}" for name, records in splits.splits.items())
            lost = {name: n for name, n in splits.counts.items() if n and name.startswith(("dropped_", "invalid_"))}
            without = f"; left out: {', '.join(f'{n} {name}' for name, n in lost.items())}" if lost else ""
            print(f"[data] {self.config.dataset.name} (format {splits.format}): {counts}{without}", flush=True)
        return self.cache.splits[self.dataset_key]

    def records(self, split: str) -> Records:
        """The records of a split; UserError where it has none."""
        records = self.splits().splits[split]
        if not len(records):
            raise UserError(f"dataset={self.config.dataset.name} has no record in its split {split}")
        return records

    def data_settings(self, split: str) -> dict[str, Any]:
        """What of the data and its encoding determines a result."""
        key = (self.dataset_key, split)
        if key not in self.cache.fingerprints:
            self.cache.fingerprints[key] = self.records(split).fingerprint()
        dataset = self.config.dataset
        return {
            "split": split,
            "records": self.cache.fingerprints[key],
            "template": dataset.template,
            **({"template_date": dataset.template_date} if dataset.template == "chat" else {}),
            **{name: getattr(dataset, name) for name in ("max_length", "too_long", "min_prompt_tokens")},
        }

    def encoding(self) -> dict[str, Any]:
        """How texts become token ids: options of `encode`."""
        dataset = self.config.dataset
        return {
            "template": dataset.template,
            "max_length": dataset.max_length,
            "today": dataset.template_date,
            "min_prompt": dataset.min_prompt_tokens,
        }

    def encoded(self, split: str, tokenizer: transformers.PreTrainedTokenizerBase) -> Sequence[EncodedRecord]:
        """Token ids of a split's records, in the order of `records(split)`: in memory for the toy world, else from a
        file that is made once."""
        key = (self.dataset_key, split, tokenizer_key(tokenizer))
        if key not in self.cache.encoded:
            encoded, dataset = self._encode(split, tokenizer), self.config.dataset
            said = [check_cuts(encoded, dataset.max_length, dataset.max_truncated_share)]
            if split in ("demonstrations", "train") and (without := len(left_out(encoded, dataset.too_long))):
                said.append(f"{without} records are not trained on: too long, or of responses with the same tokens")
            if any(said):
                print(f"[data] {split}: {'; '.join(filter(None, said))}", flush=True)
            self.cache.encoded[key] = encoded
        return self.cache.encoded[key]

    def fitting(self, encoded: Sequence[EncodedRecord], places: Sequence[int]) -> list[int]:
        """Those of the places whose records are trained on: `left_out` are the others."""
        dataset = self.config.dataset
        without = left_out(encoded, dataset.too_long)
        kept = [n for n in places if n not in without]
        if places and not kept:
            raise UserError(
                f"dataset.max_length={dataset.max_length}: every record is too long to be trained on; raise it"
            )
        return kept

    def _encode(self, split: str, tokenizer: transformers.PreTrainedTokenizerBase) -> Sequence[EncodedRecord]:
        dataset, records = self.config.dataset, self.records(split)
        options = {"tokenizer": tokenizer, **self.encoding()}
        if dataset.source == "toy":
            # The toy world's demonstrations hold an <end> between note and review, which is meant.
            return encode(records, **options, parse_special=split == "demonstrations")
        settings = {
            "data": self.data_settings(split),
            "order": order_fingerprint(records),
            "tokenizer": tokenizer_key(tokenizer),
            "version": TOKENS_VERSION,
        }

        def make(folder: Path) -> dict[str, Any]:
            encode_into(folder, records, dataset.workers, **options)
            return {"records": len(records)}

        always = replace(self.provenance, build_inputs=True)
        return encoded_in(produce(always, "tokens", split, settings, {}, make, False, together=False).folder)

    def device(self) -> torch.device:
        """The device of engine.device; UserError where CUDA is asked for and there is none."""
        wanted = self.config.engine.device
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        if wanted == "cuda" and not torch.cuda.is_available():
            raise UserError("engine.device=cuda: there is no CUDA device here; use engine.device=cpu (or auto)")
        return torch.device(wanted, world().local_rank) if wanted == "cuda" else torch.device(wanted)

    def precision(self) -> torch.dtype:
        """What this run computes in, be it a training step or a forward pass."""
        return precision_of(self.config.engine, self.device())

    def dtype(self) -> str:
        """The numbers that results depend on, of weights and, where they are others, of computation."""
        weights, computed = self.config.model.dtype, str(self.precision()).removeprefix("torch.")
        return weights if computed == "float32" else f"{weights}, computed in {computed}"

    def policy(
        self, artifact: Artifact, trained: bool = False
    ) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
        """A policy and its tokenizer, on the run's device; with the weights that it computes with, or with those that
        training starts from."""
        return self._loaded(artifact, load_policy(model_path(artifact), self.config.model), trained)

    def autocasts(self) -> bool:
        """Whether this run computes in half precision under autocast, as engine=torch trains; under DeepSpeed the
        weights are in half precision and nothing else, and the two round differently."""
        return self.config.engine.name == "torch" and self.precision() != torch.float32

    def scorer(self, artifact: Artifact) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
        """A scorer and its tokenizer, on the run's device, with the weights that it computes with."""
        return self._loaded(artifact, load_scorer(model_path(artifact), self.config.model), trained=False)

    def _loaded(
        self, artifact: Artifact, model: transformers.PreTrainedModel, trained: bool
    ) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
        tokenizer = load_tokenizer(model_path(artifact), self.config.model)
        if not trained and self.precision() != torch.float32:
            model = model.to(self.precision())
        return self.on_device(model), tokenizer

    def on_device(self, model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
        """The model, moved to the run's device."""
        return model.to(self.device())

    def reader(self, model: transformers.PreTrainedModel) -> Callable[[tqdm, Sequence[Reads]], list[list[float]]]:
        """`forward.read_all` with the model, in the layout that it can run, as the config has it."""
        engine = self.config.engine
        layout = set_layout(model, engine.layout, engine.attention, self.precision())
        stop_between_layers(model)
        budget = tokens_per_micro_batch(model, engine, trained=False)

        def read(bar: tqdm, items: Sequence[Reads]) -> list[list[float]]:
            with computing_in(self.precision(), model) if self.autocasts() else nullcontext():
                return read_all(bar, model, layout, items, budget)

        return read

    def read_all(self, model: transformers.PreTrainedModel, items: Sequence[Reads], title: str) -> list[list[float]]:
        """What the model reads off all items, dealt to the processes, in the order given."""
        read = self.reader(model)
        with progress_bar(len(items), title) as bar:
            return dealt(len(items), self.config.eval.batch_size, lambda part: read(bar, items[part.start : part.stop]))

    def settings(self, split: str, **own: Any) -> dict[str, Any]:
        """What, beside its inputs, determines a result that is made of a split's records: the data, the numbers that it
        is computed in, and what is the stage's own. Its key, its manifest and the report go by these."""
        return {"data": self.data_settings(split), "dtype": self.dtype(), **own}

    def produce(
        self,
        stage: str,
        label: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, Artifact],
        make: Callable[[Path], dict[str, Any]],
    ) -> Artifact:
        """`store.produce` as this run has it. What only stage=align or eval reads is a part of it, never missing."""
        if self.missing is not None:
            artifact = artifact_of(self.provenance, stage, label, settings, inputs)
            if not broadcast(lambda: found(artifact.folder)) and (stage, label) not in self.missing:
                self.missing.append((stage, label))
            return artifact
        part = PART_OF.get(stage) == self.requested
        if stage == "score" and settings["data"]["split"] != "train":
            part = self.requested == "eval"
        provenance = replace(self.provenance, build_inputs=True) if part else self.provenance
        return produce(provenance, stage, label, settings, inputs, make, self.requested == stage)

    def tracker(self, folder: Path, name: str) -> Tracker:
        """Where a training run in this folder logs to."""
        return Tracker(self.config.tracker, folder, name, self.provenance.config)

    @contextmanager
    def locating(self, split: str) -> Iterator[None]:
        """Work on a split's records: a NotFiniteError gets the places of its records, where they have any."""
        try:
            yield
        except NotFiniteError as error:
            records = self.records(split)
            number = {record_id: n for n, record_id in enumerate(records.ids())}
            named = [records[number[record_id]] for record_id in error.record_ids]
            names = [f"{record.id} ({record.place})" if record.place else record.id for record in named]
            raise NotFiniteError(error.what, names, error.way_out) from error


def tokenizer_key(tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """Fingerprint of everything that decides a text's ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return fingerprint([rules, begin_ids(tokenizer), tokenizer.eos_token_id, str(tokenizer.chat_template)])


def model_path(artifact: Artifact) -> Path:
    """Where an artifact's model lies: in a stage's subfolder, or where the user said."""
    own = artifact.folder / "model"
    return own if own.is_dir() else artifact.folder


def select(records: Sequence[Record], config: TrainingConfig) -> list[int]:
    """Positions of the records that a stage trains on, chosen by a hash of their ids, whatever their order."""
    records = records if isinstance(records, Records) else Records.in_memory(records)
    enough = np.flatnonzero(records.known("response_count") >= config.min_responses)
    order = np.argsort(records.known("id_key")[enough], kind="stable")
    return [int(n) for n in enough[order][: config.max_records]]
