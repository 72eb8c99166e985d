"""From command line and conf/ to a checked Config; what cannot run is one clear line before any work."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from rdo import checks
from rdo.alignment import choose_loss
from rdo.attention import KERNELS
from rdo.checks import UNBOUNDED, one_of, value_at, within
from rdo.coefficients import NEGATIVE
from rdo.data.formats import READERS
from rdo.data.templates import TEMPLATES
from rdo.errors import UserError
from rdo.refusals import check_keys, hinted, one_line
from rdo.schema import BENCH_WORKS, Config
from rdo.scorers import DIFFERENCE_FORMS

CONF = Path(__file__).parents[2] / "conf"
TRAINING = ("sft", "rm", "diffmodel", "align")
# Settings that name one of a few things, or list some of them.
CHOICES: dict[str, tuple[str, ...]] = {
    "stage.name": ("sft", "rm", "diffmodel", "score", "align", "eval", "report", "pipeline", "inspect", "bench"),
    "bench.works": BENCH_WORKS,
    "bench.against": ("trl", "trl_best", "padded", "unpadded"),
    "rc.name": ("none", "reward", "diff", "oracle"),
    "rc.negative": NEGATIVE,
    "rc.scale": ("none", "mean"),
    "rc.order": ("forward", "antisymmetric"),
    "rc.control": ("none", "shuffle", "filter"),
    "engine.name": ("torch", "zero1", "zero2", "zero3", "zero3_offload"),
    "engine.precision": ("float32", "bfloat16", "float16", "auto"),
    "engine.layout": ("auto", "forest", "flat"),
    "engine.products": ("auto", "torch", "onednn"),
    "engine.attention": ("auto", *KERNELS),
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
    "seed": (0, 2**63 - 1),  # what torch takes
    "report.seeds": (0, 2**63 - 1),
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
    "engine.threads": (1, 1024),  # more than the system has, and the process dies without a word
    "dataset.workers": (1, 1024),
    "bench.threads": (1, 1024),
    "bench.epoch_pairs": (0, UNBOUNDED),
    "diffmodel.beta0": (0, UNBOUNDED),
    "diffmodel.beta1": (0, UNBOUNDED),
    **{f"{section}.warmup_share": (0, 1) for section in TRAINING},
    **{f"{section}.weight_decay": (0, UNBOUNDED) for section in TRAINING},
}
LARGEST = 2**31 - 1  # of a count; beyond it libraries fail in ways of their own
AT_LEAST_1 = (
    "dataset.max_records", "dataset.toy.pairs", "dataset.toy.test_pairs",
    "dataset.toy.demonstrations", "inspect.records", "model.lora.rank",
    "model.hidden_size", "model.intermediate_size", "model.layers", "model.heads", "model.key_value_heads",
    "model.max_positions", "eval.prompts", "eval.max_new_tokens", "eval.batch_size", "engine.tokens_per_micro_batch",
    "bench.rounds", "bench.pairs",
    "engine.checkpoint_every_steps", "engine.keep_checkpoints", "engine.records_per_shard",
    *(f"{section}.{key}" for section in TRAINING
      for key in ("batch_size", "epochs", "max_steps", "min_responses", "max_records")),
)  # fmt: skip
ABOVE_0 = (
    "model.lora.alpha", "rc.epsilon", "dataset.toy.temperature", "eval.temperature", "engine.checkpoint_every_minutes",
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
    except Exception as error:  # an interpolation may fail in any way that its resolver does
        raise UserError(one_line(error)) from error
    if not isinstance(made, Config):
        raise UserError("the composed config is not one of rdo's: conf/config.yaml must have the default `schema`")
    check_keys(made)
    check(made)
    return made


def compose_config(overrides: Sequence[str]) -> Config:
    """The config of a command line, composed in this process."""
    try:
        if GlobalHydra.instance().is_initialized():
            composed = compose("config", overrides=list(overrides))
        else:
            with initialize_config_dir(str(CONF), version_base="1.3"):
                composed = compose("config", overrides=list(overrides))
    except ValueError as error:  # hydra's answer to GROUP=null and GROUP=3
        raise UserError(f"{shlex.join(overrides)}: {one_line(error)}") from error
    except Exception as error:  # all that hydra works on is the command line and conf/: theirs is the mistake
        raise UserError(one_line(error)) from error
    return typed(composed)


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
    except Exception as error:  # see compose_config
        raise UserError(one_line(error)) from error
    first = [texts[0] for texts in choices]
    yield first
    for number, texts in enumerate(choices):
        for text in texts[1:]:
            yield [*first[:number], text, *first[number + 1 :]]


def values_at(config: Config, key: str) -> list[Any]:
    """The value of a dotted key; the members of a list."""
    value = value_at(config, key)
    return value if isinstance(value, list) else [value]


def check(config: Config) -> None:
    """Raises UserError for what a text cannot be, for values out of range, and for settings that exclude each other."""
    checks.check_texts(config)
    check_values(config)
    try:
        loss = choose_loss(config.loss)
    except UserError as error:
        raise UserError(hinted(str(error))) from error
    checks.check_loss(config, loss)
    checks.check_data(config)
    checks.check_model(config)
    checks.check_lora(config)
    checks.check_rc(config)
    checks.check_scorers(config)
    checks.check_unread(config)
    checks.check_metric(config)
    checks.check_report(config)


def check_values(config: Config) -> None:
    """Raises UserError for a value that is none of its setting's choices, or out of its range."""
    for key, allowed in CHOICES.items():
        for value in values_at(config, key):
            one_of(key, value, allowed)
    bounds = [(key, low, high, False) for key, (low, high) in RANGES.items()]
    bounds += [(key, 1.0, LARGEST, False) for key in AT_LEAST_1] + [(key, 0.0, UNBOUNDED, True) for key in ABOVE_0]
    for key, low, high, above in bounds:
        for value in values_at(config, key):
            within(key, value, low, high, above)


def plain(config: Config) -> dict[str, Any]:
    """The config as it goes into manifests."""
    return asdict(config)
