"""Which loss a config chooses: any function of losses.py, with its settings from conf/loss.

A loss asks for its inputs by parameter name, and its keyword-only parameters are its settings in conf/loss/NAME.yaml.
So a new loss is one function, one YAML file and one golden test.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from torch import Tensor

from rdo.objectives import losses
from rdo.runtime.errors import UserError

# What a loss may ask for, one value for each pair; log_ratio and desirable one for each sample, kl one for all.
INPUTS = {
    "policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected", "chosen_length", "rejected_length",
    "row_length", "log_ratio", "desirable", "kl",
}  # fmt: skip
REFERENCE_INPUTS = {"reference_chosen", "reference_rejected", "log_ratio"}


class LossChoice(BaseModel):
    """A loss of conf/loss: which function, and how its values are averaged. A subclass adds the function's settings.

    pairs: `preferences` (the labelled pairs) or `ranking` (every strictly ordered pair of the ranked responses).
    ranking: what ranks them: reward, diff (mean f against the others), diff_baseline (f against the first response),
    scores (the data set's own), or labels.
    mean_over: pairs, samples (both members of each pair, and each response that is labelled alone) or queries.
    sft_weight: times the cross-entropy of the best response, a mean over the queries that have one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)  # but 1 is taken for 1.0

    name: str
    pairs: Literal["preferences", "ranking"] = "preferences"
    ranking: Literal["reward", "diff", "diff_baseline", "scores", "labels"] = "labels"
    mean_over: Literal["pairs", "samples", "queries"] = "pairs"
    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    sft_reduction: Literal["mean", "sum"] = "mean"

    @property
    def function(self) -> Callable[..., Tensor]:
        return getattr(losses, self.name)

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of the function."""
        return {name: value for name, value in self if name not in LossChoice.model_fields}

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

    def described(self) -> dict[str, Any]:
        """What of it determines a result."""
        return {**{name: getattr(self, name) for name in LossChoice.model_fields}, "settings": self.settings}


def inputs_of(function: Callable[..., Tensor]) -> set[str]:
    """Names of the tensors that a loss reads: its parameters that are not keyword-only."""
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY}


def choose_loss(config: Mapping[str, Any]) -> LossChoice:
    """Checks the group `loss` against the function that it names; UserError names the key and what is allowed."""
    name = str(config.get("name"))
    function = getattr(losses, name, None)
    if not inspect.isfunction(function) or not inputs_of(function) <= INPUTS:
        raise UserError(f"loss.name={name}: there is no such alignment loss in rdo/objectives/losses.py")
    types, settings = get_type_hints(function), {}
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY:
            settings[p.name] = (types.get(p.name, Any), ... if p.default is p.empty else p.default)
    model: type[LossChoice] = create_model(name, __base__=LossChoice, **settings)  # type: ignore[call-overload]
    try:
        return model.model_validate(dict(config))
    except ValidationError as error:
        problem = error.errors()[0]
    key = problem["loc"][0]
    if problem["type"] == "extra_forbidden":
        raise UserError(f"loss.{key}: loss={name} has no such setting; it has {', '.join(sorted(model.model_fields))}")
    if problem["type"] == "missing":
        raise UserError(f"loss.{key}: loss={name} needs a value for it")
    raise UserError(f"loss.{key}={problem['input']}: {problem['msg'].replace('Input should be', 'must be')}")
