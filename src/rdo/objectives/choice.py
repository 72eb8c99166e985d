"""Which loss a config chooses: any function of losses.py, with its settings from conf/loss.

A loss asks for its inputs by parameter name (see `inputs_of`), and its keyword-only parameters are its settings in
conf/loss/NAME.yaml. So a new loss is one function, one YAML file and one golden test.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rdo.objectives import losses
from rdo.runtime.errors import UserError

# What a loss may ask for, one value for each pair; log_ratio and desirable one for each sample, kl one for all.
INPUTS = {
    "policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected", "chosen_length", "rejected_length",
    "row_length", "log_ratio", "desirable", "kl",
}  # fmt: skip
REFERENCE_INPUTS = {"reference_chosen", "reference_rejected", "log_ratio"}


@dataclass(frozen=True)
class LossChoice:
    """A loss of conf/loss: the function, its settings, and how its values are averaged.

    pairs: `preferences` (the labelled pairs) or `ranking` (every strictly ordered pair of the ranked responses).
    ranking: what ranks them: reward, diff (mean f against the others), diff_baseline (f against the first response),
    scores (the data set's own), or labels.
    mean_over: pairs, samples (both members of each pair, and each response that is labelled alone) or queries.
    sft_weight: times the cross-entropy of the best response, a mean over the queries that have one.
    """

    name: str
    function: Callable[..., Tensor]
    settings: dict[str, Any]
    pairs: str = "preferences"
    ranking: str = "labels"
    mean_over: str = "pairs"
    sft_weight: float = 0.0
    sft_reduction: str = "mean"

    @property
    def inputs(self) -> set[str]:
        return inputs_of(self.function)

    @property
    def needs_reference(self) -> bool:
        return bool(self.inputs & REFERENCE_INPUTS)

    @property
    def needs_kl(self) -> bool:
        return "kl" in self.inputs

    @property
    def reads_labels(self) -> bool:
        """Whether the data's labels say which response is better, and not a ranking."""
        return self.pairs == "preferences" or self.ranking == "labels"

    @property
    def takes_unpaired(self) -> bool:
        """Whether it learns from responses that are labelled alone, desirable or not."""
        return self.mean_over == "samples" and self.reads_labels


CHOICES = {
    "pairs": ("preferences", "ranking"),
    "ranking": ("reward", "diff", "diff_baseline", "scores", "labels"),
    "mean_over": ("pairs", "samples", "queries"),
    "sft_reduction": ("mean", "sum"),
}


def inputs_of(function: Callable[..., Tensor]) -> set[str]:
    """Names of the tensors that a loss reads: its parameters that are not keyword-only."""
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY}


def choose_loss(config: Mapping[str, Any]) -> LossChoice:
    """Checks the group `loss` against the function that it names; UserError names the key and what is allowed."""
    general = {"pairs", "ranking", "mean_over", "sft_weight", "sft_reduction"}
    name = str(config.get("name"))
    function = getattr(losses, name, None)
    if not inspect.isfunction(function) or not inputs_of(function) <= INPUTS:
        raise UserError(f"loss.name={name}: there is no such alignment loss in rdo/objectives/losses.py")
    parameters = {
        p.name: p for p in inspect.signature(function).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    settings = {key: value for key, value in config.items() if key not in general | {"name"}}
    for key, value in settings.items():
        if key not in parameters:
            known = ", ".join(sorted(general | set(parameters)))
            raise UserError(f"loss.{key}: loss={name} has no such setting; it has {known}")
        settings[key] = checked_setting(key, value, parameters[key].annotation)
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in settings]
    if missing:
        raise UserError(f"loss.{missing[0]}: loss={name} needs a value for it")
    for key, allowed in CHOICES.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(f"loss.{key}={config[key]}: must be one of {', '.join(allowed)}")
    chosen = {key: config[key] for key in general if key in config}
    if "sft_weight" in chosen:
        chosen["sft_weight"] = checked_setting("sft_weight", chosen["sft_weight"], "float")
    return LossChoice(name, function, settings, **chosen)


def checked_setting(key: str, value: Any, annotation: Any) -> Any:
    """A loss's setting, which must be of its parameter's type; 1 and 1.0 are the same number."""
    kinds: dict[str, tuple[type, ...]] = {"float": (int, float), "int": (int,), "bool": (bool,), "str": (str,)}
    wanted = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "float")
    allowed = kinds.get(wanted, (int, float, str, bool))
    if wanted == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise UserError(f"loss.{key}={value!r}: must be of type {wanted}")
    return value
