"""Which loss a config chooses: any function of losses.py, with its settings from conf/loss.

A loss asks for its inputs by parameter name, and its keyword-only parameters are its settings in conf/loss/NAME.yaml.
So a new loss is one function, one YAML file and one golden test.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import ConfigDict, Field, ValidationError, create_model
from pydantic.dataclasses import dataclass
from torch import Tensor

from rdo.objectives import losses
from rdo.runtime.errors import UserError

# What a loss may ask for, one value for each pair; log_ratio and desirable one for each sample, kl one for all.
INPUTS = {
    "policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected", "chosen_length", "rejected_length",
    "row_length", "log_ratio", "desirable", "kl",
}  # fmt: skip
REFERENCE_INPUTS = {"reference_chosen", "reference_rejected", "log_ratio"}
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # but 1 is taken for 1.0


@dataclass(frozen=True, config=STRICT)
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
    pairs: Literal["preferences", "ranking"] = "preferences"
    ranking: Literal["reward", "diff", "diff_baseline", "scores", "labels"] = "labels"
    mean_over: Literal["pairs", "samples", "queries"] = "pairs"
    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    sft_reduction: Literal["mean", "sum"] = "mean"

    @property
    def inputs(self) -> set[str]:
        """Names of the tensors that the loss reads."""
        return parameters(self.function)[0]

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


def parameters(function: Callable[..., Tensor]) -> tuple[set[str], dict[str, tuple[Any, Any]]]:
    """Of a loss, the names of its inputs, and type and default (... for none) of its settings by name."""
    hints = get_type_hints(function)
    inputs, settings = set(), {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            default = ... if parameter.default is parameter.empty else parameter.default
            settings[name] = (hints.get(name, Any), default)
        else:
            inputs.add(name)
    return inputs, settings


def choose_loss(config: Mapping[str, Any]) -> LossChoice:
    """Checks the group `loss` against the function that it names; UserError names the key and what is allowed."""
    name = str(config.get("name"))
    function = getattr(losses, name, None)
    if not inspect.isfunction(function) or not parameters(function)[0] <= INPUTS:
        raise UserError(f"loss.name={name}: there is no such alignment loss in rdo/objectives/losses.py")
    declared = parameters(function)[1]
    general = {field.name for field in fields(LossChoice)} - {"function", "settings"}
    own = {key: value for key, value in config.items() if key not in general}
    try:
        settings = create_model(name, __config__=STRICT, **declared).model_validate(own)  # type: ignore[call-overload]
        chosen = {key: value for key, value in config.items() if key in general}
        return LossChoice(**chosen, function=function, settings=settings.model_dump(exclude_unset=True))
    except ValidationError as error:
        problem = error.errors()[0]
    key, said = problem["loc"][0], problem["msg"].replace("Input should be ", "must be ")
    if problem["type"] == "extra_forbidden":
        said = f"loss={name} has no such setting; it has {', '.join(sorted(general | set(declared)))}"
    elif problem["type"] == "missing":
        said = f"loss={name} needs a value for it"
    else:
        key = f"{key}={problem['input']}"
    raise UserError(f"loss.{key}: {said}")
