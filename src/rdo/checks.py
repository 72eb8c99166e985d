"""From the command line and conf/ to a checked Config: what cannot run is one clear line before any work."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from datetime import date
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from pydantic import TypeAdapter, ValidationError

from rdo.objectives.choice import LossChoice, choose_loss
from rdo.runtime.errors import UserError
from rdo.settings import Config, LoraConfig, register

CONF = Path(__file__).parents[2] / "conf"

# Settings that only some choices of another setting read: given for any other, they would be ignored without a word.
READ_BY: dict[str, tuple[str, tuple[str, ...]]] = {
    "dataset.path": ("dataset.source", ("file",)),
    **{
        f"dataset.hub_{name}": ("dataset.source", ("hub",))
        for name in ("name", "config", "revision", "split", "test_split")
    },
    "dataset.template_date": ("dataset.template", ("chat",)),
    "dataset.format": ("dataset.source", ("file", "hub")),
    "dataset.on_invalid": ("dataset.source", ("file", "hub")),
    "dataset.max_invalid_share": ("dataset.on_invalid", ("skip",)),
    "rc.order": ("rc.name", ("diff",)),
    "rc.ablation": ("rc.name", ("reward", "diff", "gold")),
    "rc.epsilon": ("rc.negative", ("floor",)),
    "eval.temperature": ("eval.decoding", ("sample",)),
    "tracker.project": ("tracker.name", ("wandb",)),
    "tracker.group": ("tracker.name", ("wandb",)),
    "diffmodel.beta0": ("diffmodel.form", ("paper",)),  # the others are antisymmetric by construction
    "diffmodel.beta1": ("diffmodel.form", ("paper",)),
}
# The same, but a sweep or a comparison over rc has reason to give them for rc=none, too: these are only said.
READ_WITH_COEFFICIENTS = ("rc.alpha", "rc.negative", "rc.scale", "rc.min_effective_share")

register()

# ---------------------------------------------------------------------------------------------------------------------
# Composing
# ---------------------------------------------------------------------------------------------------------------------


def typed(composed: DictConfig) -> Config:
    """The composed config without hydra's part, checked. Raises UserError, in one line that names the setting."""
    try:
        settings = {key: value for key, value in composed.items() if key != "hydra"}
        values = OmegaConf.to_container(OmegaConf.create(settings), resolve=True)
    except Exception as error:  # an interpolation may fail in any way that its resolver does
        raise UserError(one_line(error)) from error
    try:
        config = TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        raise UserError(invalid(error.errors()[-1])) from error
    check(config)
    return config


def compose_config(overrides: Sequence[str]) -> Config:
    """The config of a command line, composed in this process. Raises UserError as `typed`."""
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("config", overrides=list(overrides))
    except Exception as error:  # all that hydra works on is the command line and conf/: theirs is the mistake
        raise UserError(one_line(error, overrides)) from error
    return typed(composed)


def plain(config: Config) -> dict[str, Any]:
    """The config as it goes into manifests."""
    return asdict(config)


# ---------------------------------------------------------------------------------------------------------------------
# What to say of a mistake
# ---------------------------------------------------------------------------------------------------------------------


def invalid(problem: Any) -> str:
    """One of pydantic's errors in one line: the setting, its value, and what is allowed."""
    names = {part for name in setting_names() for part in (name, name.rpartition(".")[0])}
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "unexpected_keyword_argument":
        return unknown_setting(key)
    while key not in names and "." in key:  # places in lists, members of unions
        key = key.rpartition(".")[0]
    value = problem["input"]
    if problem["type"] == "literal_error":
        return not_one_of(key, value, re.findall("'([^']*)'", problem["ctx"]["expected"]))
    if problem["type"] == "string_too_short":
        return f"{key} is empty: give it a value, or {key}=null for none"
    said = problem["msg"].replace("Input should be ", "").removeprefix("List should ")
    return f"{key}={value}: must {'' if said.startswith('have') else 'be '}{said}"


def not_one_of(key: str, value: object, allowed: Sequence[str]) -> str:
    """What to say of a value that is none of those allowed, with the nearest of them as a suggestion."""
    return f"{key}={value}: must be one of {', '.join(allowed)}{did_you_mean(str(value), allowed)}"


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The end of a message that suggests the nearest of the known names; nothing where none is near."""
    near = get_close_matches(word, known, n=1, cutoff=0.7)
    return f" (did you mean {near[0]}?)" if near else ""


def unknown_setting(key: str) -> str:
    """What to say of a key that there is not: the nearest of its section, or those of its name in others."""
    names = setting_names()
    section, _, name = key.rpartition(".")
    own = [known for known in names if known.rpartition(".")[0] == section]
    hint = did_you_mean(key, own or names)
    if not hint and (named := [known for known in names if known.rpartition(".")[2] == name]) and len(named) < 4:
        hint = f" (did you mean {' or '.join(named)}?)"
    return f"{key}: there is no such setting{hint or '; see --cfg job'}"


def setting_names(section: Any = None, prefix: str = "") -> list[str]:
    """The dotted names of every setting."""
    section = section or Config()
    found: list[str] = []
    for field in fields(section):
        value, own = getattr(section, field.name), f"{prefix}{field.name}"
        found += setting_names(value, f"{own}.") if is_dataclass(value) else [own]
    return found


def one_line(error: BaseException, overrides: Sequence[str] = ()) -> str:
    """Hydra and OmegaConf spread an error over several lines and causes; this keeps what a user needs of it."""
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        said = str(cause).partition("Config search path")[0].partition("To append")[0]
        lines += [line.strip().rstrip(".") for line in said.splitlines() if line.strip() and line.strip() not in lines]
        cause = cause.__cause__
    noise = ("object_type", "reference_type", "Set the env", "^")
    text = "; ".join(line for line in lines if not line.startswith(noise))
    if found := re.search(r"Could not find '([\w/]+)/([^'/]*)'; Available options in '[\w/]+':; (.*)", text):
        return not_one_of(f"{found[1]}", found[2], found[3].split("; "))
    if (found := re.search(r"Key '.*' (?:is )?not in .*; ?full_key: ([\w.]+)", text)) and found[1][:6] != "hydra.":
        return unknown_setting(found[1])
    if isinstance(error, OverrideParseException):
        text = f"{error.override}: {text.partition('; See https')[0]}"
    if isinstance(error, ValueError):  # hydra's answer to GROUP=null and GROUP=3
        text = f"{shlex.join(overrides)}: {text}"
    return text or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# What does not go together
# ---------------------------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Raises UserError for settings that exclude each other, or that nothing would read."""
    loss = choose_loss(config.loss)
    about = (loss_problems, data_problems, model_problems, scorer_problems, validation_problems, report_problems)
    for rule in (*about, unread):
        for problem in rule(config, loss):
            raise UserError(problem)
    try_loss(loss)


def value_at(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    return reduce(getattr, key.split("."), config)


def unread(config: Config, _: LossChoice) -> Iterator[str]:
    """Settings that have no effect under what another one chooses."""
    for key, (chooser, readers) in READ_BY.items():
        value, default, choice = value_at(config, key), value_at(Config(), key), value_at(config, chooser)
        if value != default and choice not in readers:
            allowed = " or ".join(f"{chooser}={reader}" for reader in readers)
            wanted = "null" if default is None else default
            yield f"{key}={value} has no effect with {chooser}={choice}, only with {allowed}: set {key}={wanted}"


def without_effect(config: Config) -> list[str]:
    """Settings of coefficients that are given and not read, for a note to the user."""
    if config.rc.name != "none" or config.stage.name not in ("align", "score", "eval"):
        return []
    given = [key for key in READ_WITH_COEFFICIENTS if value_at(config, key) != value_at(Config(), key)]
    return [f"{key}={value_at(config, key)} has no effect with rc=none" for key in given]


def loss_problems(config: Config, loss: LossChoice) -> Iterator[str]:
    """The loss, and what ranks the responses, if anything does."""
    if not loss.settings.get("beta", 1.0) > 0:
        yield f"loss.beta={loss.settings['beta']}: must be above 0"
    by_sample = bool(loss.inputs & {"log_ratio", "desirable"})
    if by_sample != (loss.mean_over == "samples"):
        kind, wanted = ("response", "samples") if by_sample else ("pair", "pairs or queries")
        yield f"loss.mean_over={loss.mean_over}: loss={loss.name} has a value a {kind}, so it must be {wanted}"
    if loss.pairs != "ranking" and loss.ranking != "labels":
        yield f"loss.ranking={loss.ranking} has no effect with loss.pairs={loss.pairs}, only with ranking"
    if loss.pairs == "ranking" and loss.ranking == "labels" and config.align.min_responses > 2:
        yield "loss.ranking=labels ranks by the labelled pairs alone: use loss.ranking=reward, diff or scores"
    if loss.sft_weight and loss.reads_labels and config.rc.negative == "flip":
        yield (
            "rc.negative=flip believes the scorer, but loss.sft_weight imitates the label's best response: use "
            "loss.ranking=reward or diff, or loss.sft_weight=0"
        )
    if not loss.sft_weight and loss.sft_reduction != "mean":
        yield f"loss.sft_reduction={loss.sft_reduction} has no effect without loss.sft_weight above 0"
    if loss.settings.get("robust") and not loss.settings.get("label_smoothing"):
        yield "loss.robust=true has no effect without loss.label_smoothing above 0"


def try_loss(loss: LossChoice) -> None:
    """Calls the loss on made-up numbers: what it refuses is refused now, and not after hours of work."""
    inputs: dict[str, torch.Tensor] = {name: torch.ones(2) for name in loss.inputs - {"kl", "desirable"}}
    if "kl" in loss.inputs:
        inputs["kl"] = torch.zeros(())
    if "desirable" in loss.inputs:
        inputs["desirable"] = torch.tensor([True, False])
    try:
        loss.function(**inputs, **loss.settings)
    except (UserError, ValueError, ArithmeticError) as error:
        raise UserError(f"loss={loss.name}: {error}") from error


def data_problems(config: Config, _: LossChoice) -> Iterator[str]:
    """Where the data comes from."""
    dataset = config.dataset
    if dataset.source == "file" and not dataset.path:
        yield f"dataset={dataset.name} needs dataset.path: a file, a glob in quotes, or a list of them"
    if dataset.source == "hub" and not dataset.hub_name:
        yield f"dataset={dataset.name} needs dataset.hub_name, for example Dahoas/rm-static"
    if dataset.hub_test_split and not dataset.hub_split:
        yield f"dataset.hub_test_split={dataset.hub_test_split} needs dataset.hub_split, what to train on"
    if dataset.hub_split and dataset.hub_split == dataset.hub_test_split:
        yield f"dataset.hub_split={dataset.hub_split} is dataset.hub_test_split, too: test on another"
    try:
        date.fromisoformat(dataset.template_date)
    except ValueError as error:
        yield f"dataset.template_date={dataset.template_date}: {error}"
    if dataset.validation_share + dataset.test_share >= 1:
        yield "dataset.validation_share + dataset.test_share must be below 1: nothing is left to train on"


def model_problems(config: Config, _: LossChoice) -> Iterator[str]:
    """Where models come from, whether they fit the data, and their adapters."""
    dataset, model, lora = config.dataset, config.model, config.model.lora
    for key in ("model.path", "rm.path", "rm.backbone", "diffmodel.path", "diffmodel.backbone"):
        if (path := value_at(config, key)) and os.path.isfile(path):
            yield f"{key}={path}: is a file; give the model's folder"
    if model.revision and (not model.path or os.path.isdir(model.path)):
        what = f"model.path={model.path} is a folder" if model.path else "model.path is not set"
        yield f"model.revision={model.revision} is a revision on the hub, but {what}; leave it out"
    for field in fields(lora) if lora.rank is None else ():
        if (value := getattr(lora, field.name)) != getattr(LoraConfig(), field.name):
            yield f"model.lora.{field.name}={value} has no effect without model.lora.rank, such as 8"
    if lora.rank is not None and not lora.target_modules:
        yield "model.lora.target_modules is empty: name modules, such as [q_proj,v_proj], or [all-linear]"
    if config.stage.name == "sft" and not config.sft.enabled:
        yield "stage=sft has nothing to do with sft.enabled=false, which takes model.path as it is"
    if model.path:
        return
    if lora.rank is not None and config.stage.name == "sft":
        yield f"model.lora.rank={lora.rank} adapts a trained model, and stage=sft makes one: set model.path"
    if model.tokenizer == "path":
        yield f"model={model.name} needs model.path, a folder or the name of a model on the hub"
    if not config.sft.enabled:
        yield "sft.enabled=false takes model.path as the base policy, but model.path is not set"
    if model.hidden_size % (2 * model.heads):
        yield f"model.hidden_size={model.hidden_size}: must be an even multiple of model.heads={model.heads}"
    if model.key_value_heads and model.heads % model.key_value_heads:
        yield f"model.key_value_heads={model.key_value_heads}: must divide model.heads={model.heads}"
    if config.stage.name == "inspect":
        return  # which makes a tokenizer for any data
    if model.tokenizer == "toy" and dataset.source != "toy":
        yield (
            f"model={model.name} reads the toy world's words only: with dataset={dataset.name} use "
            "model=small (from scratch), or model=hub model.path=NAME"
        )
    if dataset.template == "chat":
        yield (
            f"dataset.template=chat is the template of a model's own tokenizer, and model={model.name} starts from "
            "scratch: set model.path, or dataset.template to raw, hh, alpaca or tldr"
        )


def scorer_problems(config: Config, _: LossChoice) -> Iterator[str]:
    """Coefficients, and where scorers come from."""
    rc = config.rc
    if rc.name == "gold" and config.dataset.source != "toy":
        yield "rc=gold knows the true reward, which only dataset=toy has; use rc=reward or rc=diff"
    if rc.ablation == "filter" and rc.negative != "clip":
        yield "rc.ablation=filter drops the pairs with R < 0, so rc.negative must be clip"
    if rc.ablation == "filter" and rc.scale != "none":
        yield "rc.ablation=filter weighs no pair, so rc.scale must be none"
    for name in ("rm", "diffmodel"):
        section = getattr(config, name)
        if section.path and section.backbone:
            yield f"{name}.path is a finished scorer, {name}.backbone one to train: give one of the two"
        if section.path and config.stage.name == name:
            yield f"stage={name} trains a scorer, but {name}.path names a finished one: leave one out"
    if len(set(config.eval.judges)) < len(config.eval.judges):
        yield f"eval.judges={','.join(config.eval.judges)}: names a judge twice"


def validation_problems(config: Config, loss: LossChoice) -> Iterator[str]:
    """What is measured on the validation split, and what for."""
    for name in ("sft", "rm", "diffmodel", "align"):
        section = getattr(config, name)
        if section.keep_best and section.validate_every_steps is None:
            yield f"{name}.keep_best={section.keep_best} needs {name}.validate_every_steps"
        if section.patience and not section.keep_best:
            yield f"{name}.patience={section.patience} needs {name}.keep_best, which says by what"
        measured = name != "sft" and (name != "align" or loss.needs_reference)
        if section.keep_best == "validation/accuracy" and not measured:
            what = "sft" if name == "sft" else f"loss={loss.name}"
            yield f"{name}.keep_best=validation/accuracy: {what} has no accuracy; use validation/loss"


def report_problems(config: Config, _: LossChoice) -> Iterator[str]:
    """What a stage returns to a sweep (whether it is there, `stage_metric` says), and where the report goes."""
    stage, folder = config.stage.name, config.report.folder
    if config.metric is not None and stage in ("inspect", "report"):
        yield f"metric={config.metric} is what one stage returns to a sweep, and stage={stage} returns nothing"
    judged = re.match(r"(?:rewards|mean_difference_to_base|against_base)\.(\w+)", config.metric or "")
    if stage == "eval" and judged and judged[1] not in config.eval.judges:
        yield not_one_of(f"the judge of metric={config.metric}", judged[1], config.eval.judges)
    if os.path.isabs(folder) or ".." in folder.split("/"):
        yield f"report.folder={folder}: must be a folder within run_dir"
