"""Settings that do not go together, or that nothing would read: refused in one line, before any work."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import reduce
from math import isfinite
from typing import Any

import torch

from rdo.alignment import LossChoice
from rdo.errors import UserError, printable
from rdo.refusals import hinted
from rdo.schema import Config, LoraConfig

UNBOUNDED = float("inf")

# Settings that only one choice of another setting reads: given for any other, they would be ignored without a word.
READ_BY: dict[str, tuple[str, tuple[str, ...]]] = {
    "dataset.path": ("dataset.source", ("file",)),
    **{
        f"dataset.hub_{name}": ("dataset.source", ("hub",))
        for name in ("name", "config", "revision", "split", "test_split")
    },
    "dataset.format": ("dataset.source", ("file", "hub")),
    "dataset.on_invalid": ("dataset.source", ("file", "hub")),
    "dataset.max_invalid_share": ("dataset.on_invalid", ("skip",)),
    "rc.order": ("rc.name", ("diff",)),
    "rc.control": ("rc.name", ("reward", "diff", "oracle")),
    "rc.epsilon": ("rc.negative", ("floor",)),
    "eval.temperature": ("eval.decoding", ("sample",)),
    "tracker.project": ("tracker.name", ("wandb",)),
    "tracker.group": ("tracker.name", ("wandb",)),
}
# The same, but a sweep or a comparison over rc has reason to give them for rc=none, too: these are only said.
READ_WITH_COEFFICIENTS = ("rc.alpha", "rc.negative", "rc.scale")
# Texts for a model, in which line breaks have their place.
MODEL_TEXTS = ("model.difference_template",)
MODEL_PATHS = ("model.path", "rm.path", "rm.backbone", "diffmodel.path", "diffmodel.backbone")
# They name folders.
NAMES = ("model.name", "dataset.name")
NAME_LENGTH = 100
# What a row of a comparison cannot set: it would be ignored, or part it from the row that the report shows.
NOT_A_ROWS = ("stage", "seed", "run_dir", "build_inputs", "report")


def value_at(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    return reduce(getattr, key.split("."), config)


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    """Raises UserError unless the value is one of those allowed."""
    if value not in allowed:
        raise UserError(hinted(f"{key}={value}: must be one of {', '.join(allowed)}"))


def within(key: str, value: float | None, low: float, high: float = UNBOUNDED, above: bool = False) -> None:
    """Raises UserError unless low <= value <= high (above: low < value), and for infinity; None is always fine."""
    if value is not None and not ((low < value if above else low <= value) and value <= high and value < UNBOUNDED):
        bound = f"{'above' if above else 'at least'} {low:g}" + (f" and at most {high:g}" if high < UNBOUNDED else "")
        bound += " and finite" if value == UNBOUNDED == high else ""
        raise UserError(f"{key}={value}: must be {bound}")


def texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a config with the key of its setting, names of rows included."""
    if is_dataclass(value):
        for field in fields(value):
            yield from texts(getattr(value, field.name), f"{key}.{field.name}".lstrip("."))
    elif isinstance(value, dict):
        for name, member in value.items():
            yield key, str(name)
            yield from texts(member, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for member in value:
            yield from texts(member, key)
    elif isinstance(value, str):
        yield key, value


def check_texts(config: Config) -> None:
    """No text is empty, or holds a control character."""
    for key, text in texts(config):
        if key in MODEL_TEXTS:
            continue
        if not text:
            raise UserError(f"{key} is empty: give it a value, or {key}=null for none")
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
            raise UserError(f"{key}={printable(text, keep='')}: holds a control character")
    for key in NAMES:
        name = value_at(config, key)
        if not re.fullmatch(rf"[^/\\.][^/\\]{{0,{NAME_LENGTH - 1}}}", name):
            raise UserError(f"{key}={name}: names a folder, so no / or \\, no dot in front, {NAME_LENGTH} characters")
    if config.run_dir.startswith("~"):
        raise UserError(f"run_dir={config.run_dir}: ~ is not expanded here; write $HOME")


def check_unread(config: Config) -> None:
    """Raises UserError for a setting that has no effect under what another one chooses."""
    for key, (chooser, readers) in READ_BY.items():
        value, default, choice = value_at(config, key), value_at(Config(), key), value_at(config, chooser)
        if value != default and choice not in readers:
            allowed = " or ".join(f"{chooser}={reader}" for reader in readers)
            raise UserError(
                f"{key}={value} has no effect with {chooser}={choice}, only with {allowed}; leave it out, or set "
                f"{key}={'null' if default is None else default}"
            )


def without_effect(config: Config) -> list[str]:
    """Settings of coefficients that are given and not read, for a note to the user."""
    if config.rc.name != "none" or config.stage.name not in ("align", "score", "eval"):
        return []
    given = [key for key in READ_WITH_COEFFICIENTS if value_at(config, key) != value_at(Config(), key)]
    return [f"{key}={value_at(config, key)} has no effect with rc=none" for key in given]


def check_loss(config: Config, loss: LossChoice) -> None:
    """The loss: calls it on made-up numbers, so that what it refuses is refused now, and not after hours of work."""
    for key, value in loss.settings.items():
        if isinstance(value, float) and not isfinite(value):
            raise UserError(f"loss.{key}={value}: must be finite")
    within("loss.beta", loss.settings.get("beta"), 0.0, above=True)
    within("loss.sft_weight", loss.sft_weight, 0.0)
    by_sample = bool(loss.inputs & {"log_ratio", "desirable"})
    if by_sample != (loss.mean_over == "samples"):
        kind, wanted = ("response", "samples") if by_sample else ("pair", "pairs or queries")
        raise UserError(
            f"loss.mean_over={loss.mean_over}: loss={loss.name} has a value a {kind}, so it must be {wanted}"
        )
    check_ranking(config, loss)
    if not loss.sft_weight and loss.sft_reduction != "mean":
        raise UserError(f"loss.sft_reduction={loss.sft_reduction} has no effect without loss.sft_weight above 0")
    if loss.settings.get("robust") and not loss.settings.get("label_smoothing"):
        raise UserError("loss.robust=true has no effect without loss.label_smoothing above 0")
    inputs: dict[str, torch.Tensor] = {name: torch.ones(2) for name in loss.inputs - {"kl", "desirable"}}
    if "kl" in loss.inputs:
        inputs["kl"] = torch.zeros(())
    if "desirable" in loss.inputs:
        inputs["desirable"] = torch.tensor([True, False])
    try:
        loss.function(**inputs, **loss.settings)
    except (UserError, ValueError, ArithmeticError) as error:
        raise UserError(f"loss={loss.name}: {error}") from error


def check_ranking(config: Config, loss: LossChoice) -> None:
    """What ranks the responses, if anything does."""
    if loss.pairs != "ranking" and loss.ranking != "labels":
        raise UserError(f"loss.ranking={loss.ranking} has no effect with loss.pairs={loss.pairs}, only with ranking")
    if loss.pairs == "ranking" and loss.ranking == "labels" and config.align.min_responses > 2:
        raise UserError(
            "loss.ranking=labels ranks by the labelled pairs alone: use loss.ranking=reward, diff or scores"
        )
    if loss.sft_weight and (loss.pairs == "preferences" or loss.ranking == "labels") and config.rc.negative == "flip":
        raise UserError(
            "rc.negative=flip believes the scorer, but loss.sft_weight imitates the label's best response: use "
            "loss.ranking=reward or diff, or loss.sft_weight=0"
        )


def check_data(config: Config) -> None:
    """Where the data comes from."""
    dataset = config.dataset
    if dataset.source == "file":
        paths = dataset.path if isinstance(dataset.path, list) else [dataset.path]
        if not paths or paths == [None]:
            raise UserError(f"dataset={dataset.name} needs dataset.path: a file, a glob in quotes, or a list of them")
        for path in paths:
            if not isinstance(path, str):
                raise UserError(f"dataset.path={path}: must be a file or a list of files (write ./{path} for a number)")
    if dataset.source == "hub" and not dataset.hub_name:
        raise UserError(f"dataset={dataset.name} needs dataset.hub_name, for example Dahoas/rm-static")
    if dataset.hub_test_split and not dataset.hub_split:
        raise UserError(f"dataset.hub_test_split={dataset.hub_test_split} needs dataset.hub_split, what to train on")
    if dataset.hub_split and dataset.hub_split == dataset.hub_test_split:
        raise UserError(f"dataset.hub_split={dataset.hub_split} is dataset.hub_test_split, too: test on another")
    if dataset.validation_share + dataset.test_share >= 1:
        raise UserError("dataset.validation_share + dataset.test_share must be below 1: nothing is left to train on")


def check_lora(config: Config) -> None:
    """Settings of an adapter without one, and an adapter without a model to adapt."""
    lora, default = config.model.lora, LoraConfig()
    if lora.rank is None:
        for field in fields(lora):
            value = getattr(lora, field.name)
            if value != getattr(default, field.name):
                raise UserError(f"model.lora.{field.name}={value} has no effect without model.lora.rank, such as 8")
        return
    if not lora.target_modules:
        raise UserError("model.lora.target_modules is empty: name modules, such as [q_proj,v_proj], or [all-linear]")
    if config.stage.name == "sft" and not config.model.path:
        raise UserError(
            f"model.lora.rank={lora.rank} adapts a trained model, and stage=sft makes model={config.model.name} from "
            "scratch, whole: leave it out, or set model.path"
        )


def check_model(config: Config) -> None:
    """Where models come from, and whether they fit the data."""
    dataset, model = config.dataset, config.model
    if len(model.difference_template) != 3:
        raise UserError("model.difference_template: must be three texts, before query, first and second response")
    for key in MODEL_PATHS:
        path = value_at(config, key)
        if path and os.path.isfile(path):
            hint = " (GGUF cannot be trained: take the model it was made from)" if path.endswith(".gguf") else ""
            raise UserError(f"{key}={path}: is a file; give the model's folder{hint}")
    if model.revision and (not model.path or os.path.isdir(model.path)):
        what = f"model.path={model.path} is a folder" if model.path else "model.path is not set"
        raise UserError(f"model.revision={model.revision} is a revision on the hub, but {what}; leave it out")
    if model.path:
        return
    if model.tokenizer == "path":
        raise UserError(f"model={model.name} needs model.path, a folder or the name of a model on the hub")
    if not config.sft.enabled:
        raise UserError("sft.enabled=false takes model.path as the base policy, but model.path is not set")
    if model.hidden_size % (2 * model.heads):
        raise UserError(f"model.hidden_size={model.hidden_size}: must be an even multiple of model.heads={model.heads}")
    if model.key_value_heads and model.heads % model.key_value_heads:
        raise UserError(f"model.key_value_heads={model.key_value_heads}: must divide model.heads={model.heads}")
    if config.stage.name in ("inspect", "bench"):
        return  # which make a tokenizer for any data
    if model.tokenizer == "toy" and dataset.source != "toy":
        raise UserError(
            f"model={model.name} reads the toy world's words only: with dataset={dataset.name} use "
            "model=small (from scratch), or model=hub model.path=NAME"
        )
    if dataset.template == "chat":
        raise UserError(
            f"dataset.template=chat is the template of a model's own tokenizer, and model={model.name} starts from "
            "scratch: set model.path, or dataset.template to raw, hh, alpaca or tldr"
        )


def check_rc(config: Config) -> None:
    """Coefficients and their controls."""
    rc = config.rc
    if rc.name == "oracle" and config.dataset.source != "toy":
        raise UserError("rc=oracle knows the true reward, which only dataset=toy has; use rc=reward or rc=diff")
    if rc.control == "filter" and rc.negative != "clip":
        raise UserError("rc.control=filter drops the pairs with R < 0, so rc.negative must be clip")
    if rc.control == "filter" and rc.scale != "none":
        raise UserError("rc.control=filter weighs no pair, so rc.scale must be none")
    if rc.scores and rc.name not in ("reward", "diff"):
        raise UserError(f"rc.scores names scores to read R from, but rc={rc.name} reads none: use rc=reward or rc=diff")
    if rc.scores and config.stage.name == "score":
        raise UserError("stage=score makes scores, but rc.scores names finished ones: leave one out")


def check_scorers(config: Config) -> None:
    """Where scorers come from, and the regularisers, which only one form of difference model has a use for."""
    for name in ("rm", "diffmodel"):
        section = getattr(config, name)
        if section.path and section.backbone:
            raise UserError(f"{name}.path is a finished scorer, {name}.backbone one to train: give one of the two")
        if section.path and config.stage.name == name:
            raise UserError(f"stage={name} trains a scorer, but {name}.path names a finished one: leave one out")
    if config.stage.name == "sft" and not config.sft.enabled:
        raise UserError("stage=sft has nothing to do with sft.enabled=false, which takes model.path as it is")
    form = config.diffmodel.form
    if form != "paper" and (config.diffmodel.beta0 or config.diffmodel.beta1):
        raise UserError(
            f"diffmodel.form={form} is antisymmetric by construction: set diffmodel.beta0=0 diffmodel.beta1=0"
        )
    if len(set(config.eval.judges)) < len(config.eval.judges):
        raise UserError(f"eval.judges={','.join(config.eval.judges)}: names a judge twice")


def check_metric(config: Config) -> None:
    """What a stage is to return to a sweep; whether it is there, `stage_metric` says when the stage is done."""
    if config.metric is None:
        return
    if config.stage.name in ("inspect", "report", "pipeline", "bench"):
        raise UserError(
            f"metric={config.metric} is what one stage returns to a sweep, and stage={config.stage.name} returns "
            "nothing: leave it out, or sweep over stage=eval"
        )
    first, _, judge = config.metric.partition(".")
    if config.stage.name == "eval" and first in ("rewards", "mean_difference_to_base", "against_base"):
        one_of(f"the judge of metric={config.metric}", judge.partition(".")[0], config.eval.judges)


def check_report(config: Config) -> None:
    """The rows of a comparison, where one is made."""
    if config.stage.name not in ("report", "pipeline"):
        return
    report = config.report
    if not report.rows or not report.seeds:
        raise UserError(f"report.{'seeds' if report.rows else 'rows'} is empty: there is nothing to compare")
    if len(set(report.seeds)) < len(report.seeds):
        raise UserError(f"report.seeds={report.seeds}: names a seed twice")
    if os.path.isabs(report.folder) or ".." in report.folder.split("/"):
        raise UserError(f"report.folder={report.folder}: must be a folder within run_dir")
    for part in ("worlds", "rows"):
        for name, overrides in getattr(report, part).items():
            for override in overrides:
                key = override.lstrip("+~").partition("=")[0]
                if key.split(".")[0] in NOT_A_ROWS:
                    raise UserError(f"report.{part}.{name}: {key} is the same for all rows; set it on the command line")
