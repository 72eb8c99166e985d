"""The alignment task: any loss of rdo/losses.py, over labelled pairs or ranked candidates, with coefficients.

A loss asks for its inputs by parameter name (see `inputs_of`), and its keyword-only parameters are its settings in
conf/loss/NAME.yaml. So a new loss is one function, one YAML file and one golden test.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rdo import losses
from rdo.data.encoding import EncodedRecord
from rdo.devices import tensor_on
from rdo.errors import UserError
from rdo.forest import LayoutName, make_layout
from rdo.models import read_log_probabilities
from rdo.readout import Span
from rdo.step import Counts, Measures, Preparation
from rdo.tasks import ById

# What a loss may ask for, one value for each pair; log_ratio and desirable one for each sample, kl one for all.
INPUTS = {
    "policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected", "chosen_length", "rejected_length",
    "row_length", "log_ratio", "desirable", "kl",
}  # fmt: skip
# Log-ratios that differ by less than this, in nats, are equal: sums of a few hundred float32 numbers round by as much.
TIE = 1e-4
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
        raise UserError(f"loss.name={name}: there is no such alignment loss in rdo/losses.py")
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


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses of a record, and the weight of their loss."""

    chosen: int
    rejected: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Sample:
    """A response of unpaired data, labelled alone; its weight is 1, for there is no reward difference to weigh by."""

    response: int
    desirable: bool


@dataclass(frozen=True)
class AlignmentRecord:
    """What training needs to know of a record.

    reference: log-probability of each response under the reference (NaN where the loss reads none).
    samples: responses that are labelled alone, for a loss that takes them.
    best: the response that the cross-entropy term imitates, or None where the loss has no such term.
    mismatched: the responses of another record for this query, and their reference log-probabilities: KTO's KL.
    """

    encoded: EncodedRecord
    pairs: tuple[Pair, ...]
    reference: tuple[float, ...]
    samples: tuple[Sample, ...] = ()
    best: int | None = None
    mismatched: tuple[tuple[tuple[int, ...], float], ...] = ()

    @property
    def record_id(self) -> str:
        return self.encoded.id

    @property
    def row_length(self) -> int:
        """Tokens that a model predicts on the record's longest row: all but the first."""
        return len(self.encoded.prompt) + max(map(len, self.encoded.responses)) - 1

    @property
    def responses(self) -> list[int]:
        """The responses that the loss reads, in order."""
        used = {r for pair in self.pairs for r in (pair.chosen, pair.rejected)}
        used |= {sample.response for sample in self.samples}
        return sorted(used | ({self.best} if self.best is not None else set()))

    @property
    def sequences(self) -> list[tuple[int, ...]]:
        return [(*self.encoded.prompt, *self.encoded.responses[r]) for r in self.responses]


class AlignmentTask:
    """Trains a policy on alignment records; see training.Task."""

    def __init__(self, records: ById[AlignmentRecord], loss: LossChoice):
        self.records, self.record_ids, self.loss = records, records.keys, loss
        kto = Preparation(self.mismatched_ratios, lambda ratios: {"kl": losses.kto_kl(ratios)})
        self.preparation = kto if loss.needs_kl else None

    def item(self, index: int, epoch: int) -> AlignmentRecord:
        return self.records[index]

    def counts(self, items: Sequence[AlignmentRecord]) -> Counts:
        pairs = sum(len(item.pairs) for item in items)
        samples = 2 * pairs + sum(len(item.samples) for item in items)
        best = sum(item.best is not None for item in items)
        return {"pairs": max(1, pairs), "samples": max(1, samples), "queries": len(items), "best": max(1, best)}

    def mismatched_ratios(self, model: PreTrainedModel, layout: LayoutName, items: Sequence[AlignmentRecord]) -> Tensor:
        """Log-ratios [mismatched responses] of which KTO's z0 = max(0, mean) is made, over the whole step."""
        sequences: list[tuple[int, ...]] = []
        spans, references = [], []
        for item in items:
            for response, reference in item.mismatched:
                spans.append(Span(len(sequences), len(item.encoded.prompt)))
                sequences.append((*item.encoded.prompt, *response))
                references.append(reference)
        policy, _ = read_log_probabilities(model, make_layout(layout, sequences), spans)
        return policy - tensor_on(policy.device, references, policy.dtype)

    def losses(
        self,
        model: PreTrainedModel,
        layout: LayoutName,
        items: Sequence[AlignmentRecord],
        counts: Counts,
        prepared: dict[str, Any],
    ) -> tuple[Tensor, Measures]:
        read = read_responses(model, layout, items)
        values, measures = self.pair_losses(items, read, prepared)
        loss = values.sum() / counts[self.loss.mean_over]
        if self.loss.sft_weight:
            best = read.index((n, item.best) for n, item in enumerate(items) if item.best is not None)
            cross_entropy = losses.sft(read.policy[best], read.length[best], reduction=self.loss.sft_reduction)
            loss = loss + self.loss.sft_weight * cross_entropy.sum() / counts["best"]
            measures["sft_loss"] = (cross_entropy.sum(), len(best))
        return loss, measures

    def pair_losses(
        self, items: Sequence[AlignmentRecord], read: Responses, prepared: dict[str, Any]
    ) -> tuple[Tensor, Measures]:
        """Weighted losses, one a pair or a sample, and what to log of them."""
        pairs = [(n, pair) for n, item in enumerate(items) for pair in item.pairs]
        chosen = read.index((n, pair.chosen) for n, pair in pairs)
        rejected = read.index((n, pair.rejected) for n, pair in pairs)
        policy, device = read.policy, read.policy.device
        weight = tensor_on(device, [pair.weight for _, pair in pairs], policy.dtype)
        tensors = {
            "policy_chosen": read.policy[chosen],
            "policy_rejected": read.policy[rejected],
            "reference_chosen": read.reference[chosen],
            "reference_rejected": read.reference[rejected],
            "chosen_length": read.length[chosen],
            "rejected_length": read.length[rejected],
            "row_length": tensor_on(device, [items[n].row_length for n, _ in pairs], read.length.dtype),
            **prepared,
        }
        desirable: list[bool] = []
        if self.loss.mean_over == "samples":
            alone = [(n, sample) for n, item in enumerate(items) for sample in item.samples]
            every = torch.cat([chosen, rejected, read.index((n, sample.response) for n, sample in alone)])
            desirable = [*(True for _ in pairs), *(False for _ in pairs), *(s.desirable for _, s in alone)]
            tensors["log_ratio"] = policy[every] - read.reference[every]
            tensors["desirable"] = tensor_on(device, desirable, torch.bool)
            weight = torch.cat([weight, weight, weight.new_ones(len(alone))])
        values = self.loss.function(**{name: tensors[name] for name in self.loss.inputs}, **self.loss.settings)
        return weight * values, self.measure(tensors, weight, values, prepared, desirable)

    def measure(
        self,
        tensors: dict[str, Tensor],
        weight: Tensor,
        values: Tensor,
        prepared: dict[str, Any],
        desirable: Sequence[bool],
    ) -> Measures:
        """Sums and counts of what the dashboards show; what no pair or sample is there for has the count 0. desirable:
        of the samples, known on the host, which therefore need not wait for a GPU to count them."""
        policy = tensors["policy_chosen"] - tensors["policy_rejected"]
        pairs = len(policy)
        measures: Measures = {
            "alignment_loss": (values.sum(), len(values)),
            "weight_mean": (weight.sum(), len(weight)),
            "weight_square_mean": (weight.square().sum(), len(weight)),
            "weight_zero_share": ((weight == 0).sum(), len(weight)),
            "policy_margin": (policy.sum(), pairs),
            "policy_chosen": (tensors["policy_chosen"].sum(), pairs),
            "policy_rejected": (tensors["policy_rejected"].sum(), pairs),
            "chosen_length": (tensors["chosen_length"].sum(), pairs),
            "rejected_length": (tensors["rejected_length"].sum(), pairs),
        }
        if self.loss.needs_reference:
            for name in ("chosen", "rejected"):
                # In nats. The data's responses are not the policy's own, so this is no KL: stage eval estimates that.
                log_ratio = tensors[f"policy_{name}"] - tensors[f"reference_{name}"]
                measures[f"log_ratio_{name}"] = (log_ratio.sum(), pairs)
            margin = policy - (tensors["reference_chosen"] - tensors["reference_rejected"])
            # A tie counts as half right: at the first step policy and reference are the same, but for rounding.
            tie = margin.abs() < TIE
            measures["implicit_reward_accuracy"] = (torch.where(tie, 0.5, (margin > 0).to(margin.dtype)).sum(), pairs)
            measures["implicit_reward_margin"] = (self.loss.settings.get("beta", 1.0) * margin.sum(), pairs)
        if "log_ratio" in tensors:
            reward = self.loss.settings.get("beta", 1.0) * tensors["log_ratio"]
            gains = torch.where(tensors["desirable"], reward, 0.0)
            measures["implicit_reward_desirable"] = (gains.sum(), sum(desirable))
            measures["implicit_reward_undesirable"] = ((reward - gains).sum(), len(desirable) - sum(desirable))
        if "kl" in prepared:
            measures["kl_estimate"] = (prepared["kl"] * len(values), len(values))
        return measures


@dataclass(frozen=True)
class Responses:
    """Read-outs of a micro-batch, [responses] each; `place` finds (item, response) in them, `index` many."""

    policy: Tensor
    reference: Tensor
    length: Tensor
    place: dict[tuple[int, int | None], int]

    def index(self, wanted: Iterable[tuple[int, int | None]]) -> Tensor:
        """Where the read-outs of (item, response) stand, [wanted]."""
        return tensor_on(self.policy.device, [self.place[one] for one in wanted], torch.int64)


def read_responses(model: PreTrainedModel, layout: LayoutName, items: Sequence[AlignmentRecord]) -> Responses:
    """Log-probabilities and lengths of every response that the items' losses read."""
    sequences: list[tuple[int, ...]] = []
    spans: list[Span] = []
    reference: list[float] = []
    place: dict[tuple[int, int | None], int] = {}
    for number, item in enumerate(items):
        for response, ids in zip(item.responses, item.sequences, strict=True):
            place[number, response] = len(sequences)
            spans.append(Span(len(sequences), len(item.encoded.prompt)))
            sequences.append(ids)
            reference.append(item.reference[response])
    policy, length = read_log_probabilities(model, make_layout(layout, sequences), spans)
    return Responses(policy, tensor_on(policy.device, reference, policy.dtype), length, place)
