"""Stages rm and diffmodel: the pointwise reward model and the difference model, trained on labelled pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from rdo.data.encoding import EncodedRecord
from rdo.data.records import Preference
from rdo.models.given import given
from rdo.models.lora import check_trained, choose_trained, lora_settings
from rdo.models.pretrained import load_tokenizer, new_scorer
from rdo.models.scorers import ComparisonTemplate, add_value, check_form
from rdo.runtime.errors import UserError
from rdo.runtime.store import Artifact
from rdo.sequences.forward import Reads
from rdo.settings import DifferenceConfig, ScorerConfig, TrainingConfig
from rdo.stages.run import Run, model_path, select
from rdo.stages.sft import base_policy
from rdo.stages.training import train_and_save, validation_selection, validation_settings
from rdo.training.tasks import ById, ScorerTask, learns_from

# The two kinds of scorer, by the name that rc and eval.subject call them, and the stage that makes each.
STAGE_OF: dict[str, str] = {"reward": "rm", "diff": "diffmodel"}


def scorer(run: Run, kind: str) -> Artifact:
    """The finished scorer of a kind: the one that rm.path or diffmodel.path names, or the one that we train."""
    stage = STAGE_OF[kind]
    section = getattr(run.config, stage)
    if section.path:
        return given(section.path, setting=f"{stage}.path")
    check_trained(run.config)
    check_labels(run, kind)
    form = form_of(section)
    base = given(section.backbone, setting=f"{stage}.backbone") if section.backbone else base_policy(run)
    settings = run.settings(
        "train",
        training=asdict(section),
        seed=run.config.seed,
        **validation_settings(run, section),
        **lora_settings(run.config.model),
    )
    if form != "pointwise":
        settings["difference_template"] = list(run.config.model.difference_template)

    return run.produce(stage, form, settings, {"base": base}, partial(train_scorer, run, kind, base))


def check_labels(run: Run, kind: str) -> None:
    """Raises UserError where a scorer would have to be trained and the data has no pair to train it on."""
    stage, records = STAGE_OF[kind], run.records("train")
    section = getattr(run.config, stage)
    form = form_of(section)
    if section.path or any(learns_from(form, p) for record in records for p in record.preferences):
        return
    unpaired = any(record.desirable is not None for record in records)
    raise UserError(
        f"dataset={run.config.dataset.name} "
        f"{'is unpaired (it labels each response alone)' if unpaired else 'has no labelled pair'}, so stage={stage} "
        f"has nothing to learn from; set {stage}.path to a finished scorer, or do without: "
        f"{'loss=kto rc=none' if unpaired else 'rc=none loss.ranking=scores'} eval.judges=[]"
    )


@dataclass(frozen=True)
class LoadedScorer:
    """A finished scorer, and how it reads a record."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    form: str
    template: ComparisonTemplate

    def reads(self, record: EncodedRecord, listed: Sequence[Sequence[int]]) -> Reads:
        """The values of a record: of each response (n,) its reward, of each ordered pair (i, j) its f(i, j)."""
        reads = Reads()
        for responses in listed:
            add_value(reads, self.form, self.template, record, *responses)
        return reads


def load_kind(run: Run, artifact: Artifact, kind: str) -> LoadedScorer:
    """A scorer on the run's device; UserError where what rm.path or diffmodel.path names is of the other kind."""
    model, tokenizer = run.scorer(artifact)
    form = check_form(model)
    if (form == "pointwise") != (kind == "reward"):
        here, there = (STAGE_OF[kind], *(stage for other, stage in STAGE_OF.items() if other != kind))
        raise UserError(f"{here}.path: {artifact.folder} is a scorer of the form {form}: see {there}.path")
    return LoadedScorer(model, tokenizer, form, ComparisonTemplate(run.config.model.difference_template, tokenizer))


def form_of(section: ScorerConfig) -> str:
    """The form of scorer that a section of the config trains."""
    return section.form if isinstance(section, DifferenceConfig) else "pointwise"


def train_scorer(run: Run, kind: str, base: Artifact, folder: Path) -> dict[str, Any]:
    """Puts a scalar head on the base policy, trains it on the labelled pairs, and saves it."""
    config, stage = run.config, STAGE_OF[kind]
    section = getattr(config, stage)
    form = form_of(section)
    tokenizer = load_tokenizer(model_path(base), config.model)
    model = new_scorer(model_path(base), form, config.model, config.seed)
    check_form(model)
    trained = choose_trained(model, config.model, config.seed)
    task, validated = comparison(run, "train", section, section, tokenizer), validation_selection(section)
    return train_and_save(
        run,
        task,
        run.on_device(model),
        trained,
        tokenizer,
        section,
        "train",
        folder,
        stage,
        validation=comparison(run, "validation", section, validated, tokenizer) if validated else None,
    )


def comparison(
    run: Run,
    split: str,
    section: ScorerConfig,
    selection: TrainingConfig,
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> ScorerTask:
    """The task of a section on a split's labelled pairs."""
    config, form = run.config, form_of(section)
    records, encoded = run.records(split), run.encoded(split, tokenizer)
    places = run.fitting(encoded, select(records, selection))
    pairs = [
        (record.id, place, preference)
        for place, record in zip(places, records.only(np.array(places, int)), strict=True)
        for preference in record.preferences
        if learns_from(form, preference)
    ]

    def make(number: int) -> tuple[EncodedRecord, Preference]:
        _, place, preference = pairs[number]
        return encoded[place], preference

    template, betas = None, (0.0, 0.0)
    if isinstance(section, DifferenceConfig):
        template = ComparisonTemplate(config.model.difference_template, tokenizer)
        betas = (section.beta0, section.beta1)
    keys = [(record_id, preference.chosen, preference.rejected) for record_id, _, preference in pairs]
    return ScorerTask(ById(keys, make), form, template, *betas, config.seed)
