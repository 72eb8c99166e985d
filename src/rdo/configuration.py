"""From command line and conf/ to a checked Config; what cannot run is one clear line before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rdo.alignment import choose_loss
from rdo.coefficients import NEGATIVE
from rdo.data.templates import TEMPLATES
from rdo.errors import UserError
from rdo.models import torch_dtype
from rdo.schema import Config, TrainingConfig
from rdo.scorers import FORMS

CONF = Path(__file__).parents[2] / "conf"
STAGES = ("sft", "rm", "diffmodel", "score", "align", "eval", "report", "pipeline")
SUBJECTS = ("policy", "base", "reward", "diff")

ConfigStore.instance().store(name="schema", node=Config)


def typed(config: DictConfig) -> Config:
    """The composed config as dataclasses, checked."""
    try:
        made = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from error
    assert isinstance(made, Config)
    check(made)
    return made


def compose_config(overrides: Sequence[str]) -> Config:
    """The config of a command line, composed in this process."""
    try:
        if GlobalHydra.instance().is_initialized():
            return typed(compose("config", overrides=list(overrides)))
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return typed(compose("config", overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_line(error)) from error


def one_line(error: Exception) -> str:
    """Hydra and OmegaConf spread an error over several lines and causes; this keeps what a user needs of it."""
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        for line in str(cause).splitlines():
            text = line.strip().rstrip(".")
            if text.startswith("Config search path"):
                break
            skipped = text.startswith(("To append", "object_type", "reference_type", "Set the env"))
            if text and not skipped and text not in lines:
                lines.append(text)
        cause = cause.__cause__
    return "; ".join(lines)


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{key}={value}: must be one of {', '.join(allowed)}")


def within(key: str, value: float | None, low: float, high: float = float("inf"), above: bool = False) -> None:
    """Raises UserError unless low <= value <= high (above: low < value); None is always fine."""
    if value is not None and not ((low < value if above else low <= value) and value <= high):
        bound = f"{'above' if above else 'at least'} {low:g}" + (f" and at most {high:g}" if high < 1e9 else "")
        raise UserError(f"{key}={value}: must be {bound}")


def check(config: Config) -> None:
    """Raises UserError for values out of range and for settings that exclude each other."""
    one_of("stage", config.stage.name, STAGES)
    check_choices(config)
    for section in ("sft", "rm", "diffmodel", "align"):
        check_training(section, getattr(config, section))
    loss = choose_loss(config.loss)
    within("rc.alpha", config.rc.alpha, 0.0, 1.0)
    for key in ("max_length",):
        within(f"dataset.{key}", getattr(config.dataset, key), 3)
    within("dataset.validation_share", config.dataset.validation_share, 0.0, 0.9)
    within("dataset.test_share", config.dataset.test_share, 0.0, 0.9)
    within("engine.tokens_per_micro_batch", config.engine.tokens_per_micro_batch, 1)
    within("engine.checkpoint_every_steps", config.engine.checkpoint_every_steps, 1)
    within("engine.keep_checkpoints", config.engine.keep_checkpoints, 1)
    within("eval.temperature", config.eval.temperature, 0.0, above=True)
    for key in ("prompts", "max_new_tokens", "batch_size"):
        within(f"eval.{key}", getattr(config.eval, key), 1)
    toy = config.dataset.source == "toy"
    if config.rc.name == "oracle" and not toy:
        raise UserError("rc=oracle knows the true reward, which only dataset=toy has; use rc=reward or rc=diff")
    if config.rc.control == "filter" and config.rc.negative != "clip":
        raise UserError("rc.control=filter drops the pairs with R < 0, so rc.negative must be clip")
    if config.rc.name == "none" and config.rc.control != "none":
        raise UserError(f"rc.control={config.rc.control} is a control of coefficients, but rc=none has none")
    if config.rm.form != "pointwise":
        raise UserError(f"rm.form={config.rm.form}: the reward model is pointwise; see diffmodel.form")
    if config.diffmodel.form == "pointwise":
        raise UserError("diffmodel.form=pointwise is the reward model: use stage=rm and rc=reward")
    if config.diffmodel.form in ("antisymmetric", "residual") and (config.diffmodel.beta0 or config.diffmodel.beta1):
        raise UserError(
            f"diffmodel.form={config.diffmodel.form} is antisymmetric by construction: "
            "set diffmodel.beta0=0 diffmodel.beta1=0"
        )
    if config.model.tokenizer == "toy" and not toy and config.model.path is None:
        raise UserError(
            f"model={config.model.name} reads the toy world's 90 words only: with dataset={config.dataset.name} use "
            "model=small (from scratch), or model=hub model.path=NAME"
        )
    if loss.name == "rrhf" and loss.pairs == "ranking" and loss.ranking == "labels" and config.align.min_responses > 2:
        raise UserError(
            "loss.ranking=labels ranks by the labelled pairs alone: use loss.ranking=reward, diff or scores"
        )


def check_choices(config: Config) -> None:
    """Settings that name one of a few things."""
    one_of("rc.name", config.rc.name, ("none", "reward", "diff", "oracle"))
    one_of("rc.negative", config.rc.negative, NEGATIVE)
    one_of("rc.scale", config.rc.scale, ("none", "mean"))
    one_of("rc.order", config.rc.order, ("forward", "antisymmetric"))
    one_of("rc.control", config.rc.control, ("none", "shuffle", "filter"))
    one_of("engine.layout", config.engine.layout, ("auto", "forest", "flat"))
    one_of("engine.device", config.engine.device, ("auto", "cpu", "cuda"))
    one_of("dataset.source", config.dataset.source, ("toy", "file", "hub"))
    one_of("dataset.template", config.dataset.template, tuple(TEMPLATES))
    one_of("tracker.name", config.tracker.name, ("none", "wandb"))
    one_of("eval.subject", config.eval.subject, SUBJECTS)
    one_of("eval.decoding", config.eval.decoding, ("greedy", "sample"))
    for section in ("rm", "diffmodel"):
        one_of(f"{section}.form", getattr(config, section).form, FORMS)
    for judge in config.eval.judges:
        one_of("eval.judges", judge, ("oracle", "reward", "diff"))
    torch_dtype(config.model.dtype)


def check_training(section: str, training: TrainingConfig) -> None:
    """Ranges of a training section."""
    one_of(f"{section}.schedule", training.schedule, ("constant", "linear", "cosine"))
    for key in ("learning_rate", "head_learning_rate", "max_gradient_norm"):
        within(f"{section}.{key}", getattr(training, key), 0.0, above=True)
    for key in ("batch_size", "epochs", "max_steps", "min_responses", "max_records"):
        within(f"{section}.{key}", getattr(training, key), 1)
    within(f"{section}.warmup_share", training.warmup_share, 0.0, 1.0)
    within(f"{section}.weight_decay", training.weight_decay, 0.0)
    for key in ("beta0", "beta1"):
        within(f"{section}.{key}", getattr(training, key, None), 0.0)


def plain(config: Config) -> dict[str, Any]:
    """The config as it goes into manifests."""
    return asdict(config)
