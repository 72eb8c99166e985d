"""The alignment task: any loss, over labelled pairs or ranked candidates, with coefficients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rdo.data.encoding import EncodedRecord
from rdo.objectives import losses
from rdo.objectives.choice import LossChoice
from rdo.sequences.devices import tensor_on
from rdo.sequences.forward import read_log_probabilities
from rdo.sequences.layout import LayoutName, make_layout
from rdo.sequences.readout import Span
from rdo.training.step import Denominators, Metrics, Preparation
from rdo.training.tasks import ById

# Log-ratios that differ by less than this, in nats, are equal: sums of a few hundred float32 numbers round by as much.
TIE = 1e-4


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

    def example(self, index: int, epoch: int) -> AlignmentRecord:
        return self.records[index]

    def denominators(self, examples: Sequence[AlignmentRecord]) -> Denominators:
        pairs = sum(len(example.pairs) for example in examples)
        samples = 2 * pairs + sum(len(example.samples) for example in examples)
        best = sum(example.best is not None for example in examples)
        return {"pairs": max(1, pairs), "samples": max(1, samples), "queries": len(examples), "best": max(1, best)}

    def mismatched_ratios(
        self, model: PreTrainedModel, layout: LayoutName, examples: Sequence[AlignmentRecord]
    ) -> Tensor:
        """Log-ratios [mismatched responses] of which KTO's z0 = max(0, mean) is made, over the whole step."""
        sequences: list[tuple[int, ...]] = []
        spans, references = [], []
        for example in examples:
            for response, reference in example.mismatched:
                spans.append(Span(len(sequences), len(example.encoded.prompt)))
                sequences.append((*example.encoded.prompt, *response))
                references.append(reference)
        policy, _ = read_log_probabilities(model, make_layout(layout, sequences), spans)
        return policy - tensor_on(policy.device, references, policy.dtype)

    def losses(
        self,
        model: PreTrainedModel,
        layout: LayoutName,
        examples: Sequence[AlignmentRecord],
        denominators: Denominators,
        prepared: dict[str, Any],
    ) -> tuple[Tensor, Metrics]:
        read = read_responses(model, layout, examples)
        values, metrics = self.pair_losses(examples, read, prepared)
        loss = values.sum() / denominators[self.loss.mean_over]
        if self.loss.sft_weight:
            best = read.index((n, example.best) for n, example in enumerate(examples) if example.best is not None)
            cross_entropy = losses.sft(read.policy[best], read.length[best], reduction=self.loss.sft_reduction)
            loss = loss + self.loss.sft_weight * cross_entropy.sum() / denominators["best"]
            metrics["sft_loss"] = (cross_entropy.sum(), len(best))
        return loss, metrics

    def pair_losses(
        self, examples: Sequence[AlignmentRecord], read: Responses, prepared: dict[str, Any]
    ) -> tuple[Tensor, Metrics]:
        """Weighted losses, one a pair or a sample, and what to log of them."""
        pairs = [(n, pair) for n, example in enumerate(examples) for pair in example.pairs]
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
            "row_length": tensor_on(device, [examples[n].row_length for n, _ in pairs], read.length.dtype),
            **prepared,
        }
        desirable: list[bool] = []
        if self.loss.mean_over == "samples":
            alone = [(n, sample) for n, example in enumerate(examples) for sample in example.samples]
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
    ) -> Metrics:
        """Sums and counts of what the dashboards show; what no pair or sample is there for has the count 0. desirable:
        of the samples, known on the host, which therefore need not wait for a GPU to count them."""
        policy = tensors["policy_chosen"] - tensors["policy_rejected"]
        pairs = len(policy)
        metrics: Metrics = {
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
                metrics[f"log_ratio_{name}"] = (log_ratio.sum(), pairs)
            margin = policy - (tensors["reference_chosen"] - tensors["reference_rejected"])
            # A tie denominators as half right: at the first step policy and reference are the same, but for rounding.
            tie = margin.abs() < TIE
            metrics["implicit_reward_accuracy"] = (torch.where(tie, 0.5, (margin > 0).to(margin.dtype)).sum(), pairs)
            metrics["implicit_reward_margin"] = (self.loss.settings.get("beta", 1.0) * margin.sum(), pairs)
        if "log_ratio" in tensors:
            reward = self.loss.settings.get("beta", 1.0) * tensors["log_ratio"]
            gains = torch.where(tensors["desirable"], reward, 0.0)
            metrics["implicit_reward_desirable"] = (gains.sum(), sum(desirable))
            metrics["implicit_reward_undesirable"] = ((reward - gains).sum(), len(desirable) - sum(desirable))
        if "kl" in prepared:
            metrics["kl_estimate"] = (prepared["kl"] * len(values), len(values))
        return metrics


@dataclass(frozen=True)
class Responses:
    """Read-outs of a micro-batch, [responses] each; `place` finds (example, response) in them, `index` many."""

    policy: Tensor
    reference: Tensor
    length: Tensor
    place: dict[tuple[int, int | None], int]

    def index(self, wanted: Iterable[tuple[int, int | None]]) -> Tensor:
        """Where the read-outs of (example, response) stand, [wanted]."""
        return tensor_on(self.policy.device, [self.place[one] for one in wanted], torch.int64)


def read_responses(model: PreTrainedModel, layout: LayoutName, examples: Sequence[AlignmentRecord]) -> Responses:
    """Log-probabilities and lengths of every response that the examples' losses read."""
    sequences: list[tuple[int, ...]] = []
    spans: list[Span] = []
    reference: list[float] = []
    place: dict[tuple[int, int | None], int] = {}
    for number, example in enumerate(examples):
        for response, ids in zip(example.responses, example.sequences, strict=True):
            place[number, response] = len(sequences)
            spans.append(Span(len(sequences), len(example.encoded.prompt)))
            sequences.append(ids)
            reference.append(example.reference[response])
    policy, length = read_log_probabilities(model, make_layout(layout, sequences), spans)
    return Responses(policy, tensor_on(policy.device, reference, policy.dtype), length, place)
