"""The alignment task: any loss, over labelled pairs or ranked candidates, with coefficients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

from rdo.data.encoding import EncodedRecord
from rdo.objectives import losses
from rdo.objectives.choice import LossChoice
from rdo.sequences.forward import read_log_probabilities
from rdo.sequences.layout import LayoutName, make_layout, tensor_on
from rdo.sequences.readout import Span
from rdo.training.step import Denominators, Metrics
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
    """Trains a policy on alignment records; see step.Task."""

    def __init__(self, records: ById[AlignmentRecord], loss: LossChoice):
        self.records, self.record_ids, self.loss = records, records.keys, loss
        self.kl_ratios: Callable[..., Tensor] | None = mismatched_ratios if loss.needs_kl else None

    def example(self, index: int, epoch: int) -> AlignmentRecord:
        return self.records[index]

    def denominators(self, examples: Sequence[AlignmentRecord]) -> Denominators:
        pairs = sum(len(example.pairs) for example in examples)
        samples = 2 * pairs + sum(len(example.samples) for example in examples)
        best = sum(example.best is not None for example in examples)
        return {"pairs": max(1, pairs), "samples": max(1, samples), "queries": len(examples), "best": max(1, best)}

    def losses(
        self,
        model: transformers.PreTrainedModel,
        layout: LayoutName,
        examples: Sequence[AlignmentRecord],
        denominators: Denominators,
        kl: Tensor | None,
    ) -> tuple[Tensor, Metrics]:
        read = read_responses(model, layout, examples)
        inputs, weight, desirable = self.inputs(examples, read)
        if kl is not None:
            inputs["kl"] = kl
        # One a pair, or one a sample.
        values = self.loss.function(**{name: inputs[name] for name in self.loss.inputs}, **self.loss.settings)
        loss = (weight * values).sum() / denominators[self.loss.mean_over]
        metrics = self.measure(inputs, weight, values, desirable)
        if self.loss.sft_weight:
            best = read.index((n, example.best) for n, example in enumerate(examples) if example.best is not None)
            cross_entropy = losses.sft(read.policy[best], read.length[best], reduction=self.loss.sft_reduction)
            loss = loss + self.loss.sft_weight * cross_entropy.sum() / denominators["best"]
            metrics["sft_loss"] = (cross_entropy.sum(), len(best))
        return loss, metrics

    def inputs(
        self, examples: Sequence[AlignmentRecord], read: Responses
    ) -> tuple[dict[str, Tensor], Tensor, list[bool]]:
        """What losses ask for (see objectives/choice.py), the weights, [pairs] or [samples], and which samples are
        desirable, known on the host, which need not wait for a GPU to count them."""
        pairs = [(n, pair) for n, example in enumerate(examples) for pair in example.pairs]
        chosen = read.index((n, pair.chosen) for n, pair in pairs)
        rejected = read.index((n, pair.rejected) for n, pair in pairs)
        policy, device = read.policy, read.policy.device
        weight = tensor_on(device, [pair.weight for _, pair in pairs], policy.dtype)
        inputs = {
            "policy_chosen": policy[chosen],
            "policy_rejected": policy[rejected],
            "reference_chosen": read.reference[chosen],
            "reference_rejected": read.reference[rejected],
            "chosen_length": read.length[chosen],
            "rejected_length": read.length[rejected],
            "row_length": tensor_on(device, [examples[n].row_length for n, _ in pairs], read.length.dtype),
        }
        if self.loss.mean_over != "samples":
            return inputs, weight, []
        alone = [(n, sample) for n, example in enumerate(examples) for sample in example.samples]
        every = torch.cat([chosen, rejected, read.index((n, sample.response) for n, sample in alone)])
        desirable = [*(True for _ in pairs), *(False for _ in pairs), *(s.desirable for _, s in alone)]
        inputs["log_ratio"] = policy[every] - read.reference[every]
        inputs["desirable"] = tensor_on(device, desirable, torch.bool)
        return inputs, torch.cat([weight, weight, weight.new_ones(len(alone))]), desirable

    def measure(self, inputs: dict[str, Tensor], weight: Tensor, values: Tensor, desirable: Sequence[bool]) -> Metrics:
        """Sums and counts of what the dashboards show; what no pair or sample is there for has the count 0."""
        policy, beta = inputs["policy_chosen"] - inputs["policy_rejected"], self.loss.settings.get("beta", 1.0)
        pairs = len(policy)
        metrics: Metrics = {
            "alignment_loss": (values.sum(), len(values)),
            "weight_mean": (weight.sum(), len(weight)),
            "weight_square_mean": (weight.square().sum(), len(weight)),
            "weight_zero_share": ((weight == 0).sum(), len(weight)),
            "policy_margin": (policy.sum(), pairs),
        }
        for name in ("policy_chosen", "policy_rejected", "chosen_length", "rejected_length"):
            metrics[name] = (inputs[name].sum(), pairs)
        if self.loss.needs_reference:
            for name in ("chosen", "rejected"):
                # In nats. The data's responses are not the policy's own, so this is no KL: stage eval estimates that.
                log_ratio = inputs[f"policy_{name}"] - inputs[f"reference_{name}"]
                metrics[f"log_ratio_{name}"] = (log_ratio.sum(), pairs)
            margin = policy - (inputs["reference_chosen"] - inputs["reference_rejected"])
            # A tie counts as half right: at the first step policy and reference are the same, but for rounding.
            right = torch.where(margin.abs() < TIE, 0.5, (margin > 0).to(margin.dtype))
            metrics["implicit_reward_accuracy"] = (right.sum(), pairs)
            metrics["implicit_reward_margin"] = (beta * margin.sum(), pairs)
        if "log_ratio" in inputs:
            reward = beta * inputs["log_ratio"]
            gains = torch.where(inputs["desirable"], reward, 0.0)
            metrics["implicit_reward_desirable"] = (gains.sum(), sum(desirable))
            metrics["implicit_reward_undesirable"] = ((reward - gains).sum(), len(desirable) - sum(desirable))
        if "kl" in inputs:
            metrics["kl_estimate"] = (inputs["kl"] * len(values), len(values))
        return metrics


def mismatched_ratios(
    model: transformers.PreTrainedModel, layout: LayoutName, examples: Sequence[AlignmentRecord]
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


def read_responses(
    model: transformers.PreTrainedModel, layout: LayoutName, examples: Sequence[AlignmentRecord]
) -> Responses:
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
