"""From command line and conf/ to a checked Config; what cannot run is one clear line before any work."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rdo.alignment import LossChoice, choose_loss
from rdo.coefficients import NEGATIVE
from rdo.data.formats import READERS
from rdo.data.templates import TEMPLATES
from rdo.errors import UserError
from rdo.schema import Config
from rdo.scorers import DIFFERENCE_FORMS

CONF = Path(__file__).parents[2] / "conf"
TRAINING = ("sft", "rm", "diffmodel", "align")
UNBOUNDED = float("inf")

# Settings that name one of a few things, or list some of them.
CHOICES: dict[str, tuple[str, ...]] = {
    "stage.name": ("sft", "rm", "diffmodel", "score", "align", "eval", "report", "pipeline"),
    "rc.name": ("none", "reward", "diff", "oracle"),
    "rc.negative": NEGATIVE,
    "rc.scale": ("none", "mean"),
    "rc.order": ("forward", "antisymmetric"),
    "rc.control": ("none", "shuffle", "filter"),
    "engine.name": ("torch",),
    "engine.layout": ("auto", "forest", "flat"),
    "engine.device": ("auto", "cpu", "cuda"),
    "dataset.source": ("toy", "file", "hub"),
    "dataset.format": ("auto", *READERS),
    "dataset.template": tuple(TEMPLATES),
    "dataset.on_invalid": ("error", "skip"),
    "model.dtype": ("float32", "bfloat16", "float16", "float64"),
    "model.tokenizer": ("toy", "byte_pair", "path"),
    "tracker.name": ("none", "wandb"),
    "eval.subject": ("policy", "base", "reward", "diff"),
    "eval.split": ("test", "validation"),
    "eval.decoding": ("greedy", "sample"),
    "eval.judges": ("oracle", "reward", "diff"),
    "sft.responses": ("chosen", "all"),
    "diffmodel.form": DIFFERENCE_FORMS,
    **{f"{section}.schedule": ("constant", "linear", "cosine") for section in TRAINING},
}

# Smallest and largest value of a setting; null is fine wherever the type allows it.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, UNBOUNDED),
    "report.seeds": (0, UNBOUNDED),
    "rc.alpha": (0, 1),
    "dataset.max_length": (3, UNBOUNDED),
    "dataset.max_truncated_share": (0, 1),
    "dataset.max_invalid_share": (0, 1),
    "dataset.validation_share": (0, 0.9),
    "dataset.test_share": (0, 0.9),
    "dataset.toy.flip_share": (0, 1),
    "dataset.toy.candidate_queries": (0, UNBOUNDED),
    "dataset.toy.candidates": (2, UNBOUNDED),
    "model.vocabulary_size": (258, UNBOUNDED),  # every byte and two special tokens
    "eval.samples": (0, UNBOUNDED),
    "diffmodel.beta0": (0, UNBOUNDED),
    "diffmodel.beta1": (0, UNBOUNDED),
    **{f"{section}.warmup_share": (0, 1) for section in TRAINING},
    **{f"{section}.weight_decay": (0, UNBOUNDED) for section in TRAINING},
}
AT_LEAST_1 = (
    "dataset.max_records", "dataset.workers", "dataset.toy.pairs", "dataset.toy.test_pairs", "dataset.toy.demonstrations",
    "model.hidden_size", "model.intermediate_size", "model.layers", "model.heads", "model.key_value_heads",
    "model.max_positions", "eval.prompts", "eval.max_new_tokens", "eval.batch_size", "engine.tokens_per_micro_batch",
    "engine.checkpoint_every_steps", "engine.keep_checkpoints", "engine.threads",
    *(f"{section}.{key}" for section in TRAINING
      for key in ("batch_size", "epochs", "max_steps", "min_responses", "max_records")),
)  # fmt: skip
ABOVE_0 = (
    "rc.epsilon", "dataset.toy.temperature", "eval.temperature", "engine.checkpoint_every_minutes",
    *(f"{section}.{key}" for section in TRAINING
      for key in ("learning_rate", "max_gradient_norm")),
    "rm.head_learning_rate", "diffmodel.head_learning_rate",
)  # fmt: skip


def schema() -> DictConfig:
    """The typed config; the keys of a loss are the parameters of its function, which `choose_loss` checks."""
    node = OmegaConf.structured(Config)
    OmegaConf.set_struct(node.loss, False)
    return node


ConfigStore.instance().store(name="schema", node=schema())


def typed(config: DictConfig) -> Config:
    """The composed config as dataclasses, checked."""
    try:
        made = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from error
    assert isinstance(made, Config)
    check_keys(made)
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
    except ValueError as error:  # hydra's answer to GROUP=null and GROUP=3
        raise UserError(f"{shlex.join(overrides)}: {one_line(error)}") from error


def sweep_points(overrides: Sequence[str]) -> Iterator[list[str]]:
    """Command lines that together hold every value of a sweep: the first of all, then each other one in turn."""
    choices: list[list[str]] = []
    try:
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            texts = [override.input_line or ""]
            if override.is_sweep_override():
                if not override.is_discrete_sweep():
                    return  # a range that a sweeper of its own draws from
                texts = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
            choices.append(texts)
    except HydraException as error:
        raise UserError(one_line(error)) from error
    first = [texts[0] for texts in choices]
    yield first
    for number, texts in enumerate(choices):
        for text in texts[1:]:
            yield [*first[:number], text, *first[number + 1 :]]


def one_line(error: Exception) -> str:
    """Hydra and OmegaConf spread an error over several lines and causes; this keeps what a user needs of it."""
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        for line in str(cause).splitlines():
            text = line.strip().rstrip(".")
            if text.startswith("Config search path"):
                break
            skipped = text.startswith(("To append", "object_type", "reference_type", "Set the env", "^", "See https"))
            if text and not skipped and text not in lines:
                lines.append(text)
        cause = cause.__cause__
    text = "; ".join(lines)
    if isinstance(error, OverrideParseException) and error.override not in text:
        text = f"{error.override}: {text}"
    if found := re.search(r"Could not find '(\w+)/([^']*)'; Available options in '[\w/]+':; (.*)", text):
        group, name, allowed = found.groups()
        return f"{group}={name}: must be one of {allowed.replace('; ', ', ')}"
    if (found := re.search(r"Key '.*' (?:is )?not in .*; full_key: ([\w.]+)", text)) and found[1][:6] != "hydra.":
        return unknown_setting(found[1])
    return text


def unknown_setting(key: str) -> str:
    """What to say of a key that the schema has not: where it goes wrong, and what there is."""
    section: Any = Config()
    where = ""
    for part in key.split("."):
        known = [field.name for field in fields(section)] if is_dataclass(section) else []
        if isinstance(section, dict):
            return f"{key}: there is no such setting yet; add it with +{key}=VALUE"
        if part not in known:
            has = f"{where or 'the config'} has {', '.join(known)}" if known else f"{where} is a single value"
            return f"{key}: there is no such setting; {has}"
        section, where = getattr(section, part), f"{where}.{part}".lstrip(".")
    return f"{key}: there is no such setting"


def check_keys(section: Any, prefix: str = "") -> None:
    """Refuses keys that `+KEY=VALUE` added to a typed section: nothing would read them."""
    known = {field.name for field in fields(section)}
    for name, value in vars(section).items():
        if name not in known:
            raise UserError(unknown_setting(prefix + name))
        if is_dataclass(value):
            check_keys(value, f"{prefix}{name}.")


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    """Raises UserError unless the value is one of those allowed."""
    if value not in allowed:
        raise UserError(f"{key}={value}: must be one of {', '.join(allowed)}")


def within(key: str, value: float | None, low: float, high: float = UNBOUNDED, above: bool = False) -> None:
    """Raises UserError unless low <= value <= high (above: low < value), and for infinity; None is always fine."""
    if value is not None and not ((low < value if above else low <= value) and value <= high and value < UNBOUNDED):
        bound = f"{'above' if above else 'at least'} {low:g}" + (f" and at most {high:g}" if high < UNBOUNDED else "")
        raise UserError(f"{key}={value}: must be {bound}")


def values_at(config: Config, key: str) -> list[Any]:
    """The value of a dotted key; the members of a list."""
    value = reduce(getattr, key.split("."), config)
    return value if isinstance(value, list) else [value]


def check(config: Config) -> None:
    """Raises UserError for values out of range and for settings that exclude each other."""
    for key, allowed in CHOICES.items():
        for value in values_at(config, key):
            one_of(key, value, allowed)
    bounds = [(key, low, high, False) for key, (low, high) in RANGES.items()]
    bounds += [(key, 1.0, UNBOUNDED, False) for key in AT_LEAST_1] + [(key, 0.0, UNBOUNDED, True) for key in ABOVE_0]
    for key, low, high, above in bounds:
        for value in values_at(config, key):
            within(key, value, low, high, above)
    check_loss(config, choose_loss(config.loss))
    check_sources(config)
    check_rc(config)
    check_scorers(config)


def check_loss(config: Config, loss: LossChoice) -> None:
    """The loss: calls it on made-up numbers, so that what it refuses is refused now, and not after hours of work."""
    within("loss.beta", loss.settings.get("beta"), 0.0, above=True)
    within("loss.sft_weight", loss.sft_weight, 0.0)
    by_sample = bool(loss.inputs & {"log_ratio", "desirable"})
    if by_sample != (loss.mean_over == "samples"):
        kind, wanted = ("response", "samples") if by_sample else ("pair", "pairs or queries")
        raise UserError(
            f"loss.mean_over={loss.mean_over}: loss={loss.name} has a value a {kind}, so it must be {wanted}"
        )
    if loss.pairs == "ranking" and loss.ranking == "labels" and config.align.min_responses > 2:
        raise UserError(
            "loss.ranking=labels ranks by the labelled pairs alone: use loss.ranking=reward, diff or scores"
        )
    if loss.sft_weight and (loss.pairs == "preferences" or loss.ranking == "labels") and config.rc.negative == "flip":
        raise UserError(
            "rc.negative=flip believes the scorer, but loss.sft_weight imitates the label's best response: use "
            "loss.ranking=reward or diff, or loss.sft_weight=0"
        )
    inputs: dict[str, torch.Tensor] = {name: torch.ones(2) for name in loss.inputs - {"kl", "desirable"}}
    if "kl" in loss.inputs:
        inputs["kl"] = torch.zeros(())
    if "desirable" in loss.inputs:
        inputs["desirable"] = torch.tensor([True, False])
    try:
        loss.function(**inputs, **loss.settings)
    except (UserError, ValueError) as error:
        raise UserError(f"loss={loss.name}: {error}") from error


def check_sources(config: Config) -> None:
    """Where data and models come from, and whether they fit together."""
    dataset, model = config.dataset, config.model
    if dataset.source == "file" and not dataset.path:
        raise UserError(f"dataset={dataset.name} needs dataset.path, a file of JSON lines (also .gz)")
    if dataset.source == "hub" and not dataset.hub_name:
        raise UserError(f"dataset={dataset.name} needs dataset.hub_name, for example Dahoas/rm-static")
    if dataset.validation_share + dataset.test_share >= 1:
        raise UserError("dataset.validation_share + dataset.test_share must be below 1: nothing is left to train on")
    if len(model.difference_template) != 3:
        raise UserError("model.difference_template: must be three texts, before query, first and second response")
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
    if model.tokenizer == "toy" and dataset.source != "toy":
        raise UserError(
            f"model={model.name} reads the toy world's words only: with dataset={dataset.name} use "
            "model=small (from scratch), or model=hub model.path=NAME"
        )


def check_rc(config: Config) -> None:
    """Coefficients and their controls."""
    rc = config.rc
    if rc.name == "oracle" and config.dataset.source != "toy":
        raise UserError("rc=oracle knows the true reward, which only dataset=toy has; use rc=reward or rc=diff")
    if rc.name == "none" and rc.control != "none":
        raise UserError(f"rc.control={rc.control} is a control of coefficients, but rc=none has none")
    if rc.control == "filter" and rc.negative != "clip":
        raise UserError("rc.control=filter drops the pairs with R < 0, so rc.negative must be clip")
    if rc.control == "filter" and rc.scale != "none":
        raise UserError("rc.control=filter weighs no pair, so rc.scale must be none")


def check_scorers(config: Config) -> None:
    """The regularisers, which only one form of difference model has a use for."""
    form = config.diffmodel.form
    if form != "paper" and (config.diffmodel.beta0 or config.diffmodel.beta1):
        raise UserError(
            f"diffmodel.form={form} is antisymmetric by construction: set diffmodel.beta0=0 diffmodel.beta1=0"
        )


def plain(config: Config) -> dict[str, Any]:
    """The config as it goes into manifests."""
    return asdict(config)
