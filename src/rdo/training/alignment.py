"""The alignment task: any loss, over labelled pairs or ranked candidates, with coefficients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rdo.data.encoding import EncodedRecord
from rdo.objectives import losses
from rdo.objectives.choice import LossChoice
from rdo.sequences.forward import Reads
from rdo.sequences.layout import tensor_on
from rdo.training.step import Denominators, Metrics, Task
from rdo.training.tasks import ById

# Log-ratios that differ by less than this, in nats, are equal: sums of a few hundred float32 numbers round by as much.
TIE = 1e-4

Name = tuple[int, int]


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
class Mismatched:
    """Responses to another query than their own, and their log-probabilities under the reference."""

    reads: Reads
    reference: tuple[float, ...]


@dataclass(frozen=True)
class AlignmentRecord:
    """What training needs to know of a record.

    reference: log-probability of each response under the reference (NaN where the loss reads none).
    samples: responses that are labelled alone, for a loss that takes them.
    best: the response that the cross-entropy term imitates, or None where the loss has no such term.
    mismatched: another record's responses to this query, for KTO's KL.
    """

    encoded: EncodedRecord
    pairs: tuple[Pair, ...]
    reference: tuple[float, ...]
    samples: tuple[Sample, ...] = ()
    best: int | None = None
    mismatched: Mismatched | None = None

    @property
    def record_id(self) -> str:
        return self.encoded.id

    @property
    def row_length(self) -> int:
        """Tokens that a model predicts on the record's longest row: all but the first."""
        return len(self.encoded.prompt) + max(map(len, self.encoded.responses)) - 1

    @cached_property
    def weighted(self) -> list[Pair]:
        """The pairs that move the policy: what has the weight 0 is counted, and not read."""
        return [pair for pair in self.pairs if pair.weight]

    @property
    def counts(self) -> bool:
        """Whether the loss reads any response."""
        return bool(self.weighted or self.samples or self.best is not None)

    @cached_property
    def responses(self) -> list[int]:
        """The responses that the loss reads, in order; the first of a record that does not count, which may have to be
        read for nothing (see step.deal_step)."""
        used = {r for pair in self.weighted for r in (pair.chosen, pair.rejected)}
        used |= {sample.response for sample in self.samples}
        return sorted(used | ({self.best} if self.best is not None else set())) or [0]

    @cached_property
    def reads(self) -> Reads:
        return Reads.of(self.encoded.prompt, [self.encoded.responses[r] for r in self.responses])


class AlignmentTask(Task):
    """Trains a policy on alignment records; see step.Task."""

    def __init__(self, records: ById[AlignmentRecord], loss: LossChoice):
        super().__init__(records)
        self.loss = loss

    def denominators(self, examples: Sequence[AlignmentRecord]) -> Denominators:
        pairs = sum(len(example.pairs) for example in examples)
        samples = 2 * pairs + sum(len(example.samples) for example in examples)
        best = sum(example.best is not None for example in examples)
        return {"pairs": max(1, pairs), "samples": max(1, samples), "queries": len(examples), "best": max(1, best)}

    def described(self, examples: Sequence[AlignmentRecord]) -> dict[str, float]:
        named = [(example, pair) for example in examples for pair in example.pairs]
        weights = [pair.weight for _, pair in named]
        if self.loss.mean_over == "samples":
            weights = 2 * weights + [1.0 for example in examples for _ in example.samples]
        logged: dict[str, list[float]] = {
            "weight_mean": weights,
            "weight_square_mean": [weight**2 for weight in weights],
            "weight_zero_share": [float(weight == 0) for weight in weights],
            "chosen_length": [float(len(example.encoded.responses[pair.chosen])) for example, pair in named],
            "rejected_length": [float(len(example.encoded.responses[pair.rejected])) for example, pair in named],
        }
        return {name: math.fsum(values) / len(values) for name, values in logged.items() if values}

    def losses(
        self, examples: Sequence[AlignmentRecord], values: Tensor, denominators: Denominators, kl: Tensor | None
    ) -> tuple[Tensor, Metrics]:
        read = Responses(examples, values)
        inputs, weight, desirable = self.inputs(read)
        if kl is not None:
            inputs["kl"] = kl
        # One a pair, or one a sample.
        unreduced = self.loss.function(**{name: inputs[name] for name in self.loss.inputs}, **self.loss.settings)
        loss = (weight * unreduced).sum() / denominators[self.loss.mean_over]
        metrics = self.measure(inputs, unreduced, desirable)
        if self.loss.sft_weight:
            best = [(n, example.best) for n, example in enumerate(examples) if example.best is not None]
            cross_entropy = losses.sft(read.policy(best), read.length(best), reduction=self.loss.sft_reduction)
            loss = loss + self.loss.sft_weight * cross_entropy.sum() / denominators["best"]
            metrics["sft_loss"] = (cross_entropy.sum(), len(best))
        return loss, metrics

    def inputs(self, read: Responses) -> tuple[dict[str, Tensor], Tensor, list[bool]]:
        """What losses ask for (see objectives/choice.py), the weights, [pairs] or [samples], and which samples are
        desirable, known on the host, which need not wait for a GPU to count them."""
        pairs = [(n, pair) for n, example in enumerate(read.examples) for pair in example.weighted]
        chosen = [(n, pair.chosen) for n, pair in pairs]
        rejected = [(n, pair.rejected) for n, pair in pairs]
        weight = read.tensor([pair.weight for _, pair in pairs])
        inputs = {
            "policy_chosen": read.policy(chosen),
            "policy_rejected": read.policy(rejected),
            "reference_chosen": read.reference(chosen),
            "reference_rejected": read.reference(rejected),
            "chosen_length": read.length(chosen),
            "rejected_length": read.length(rejected),
            "row_length": read.tensor([read.examples[n].row_length for n, _ in pairs], torch.int64),
        }
        if self.loss.mean_over != "samples":
            return inputs, weight, []
        alone = [(n, sample) for n, example in enumerate(read.examples) for sample in example.samples]
        every = [*chosen, *rejected, *((n, sample.response) for n, sample in alone)]
        desirable = [*(True for _ in pairs), *(False for _ in pairs), *(s.desirable for _, s in alone)]
        inputs["log_ratio"] = read.policy(every) - read.reference(every)
        inputs["desirable"] = read.tensor(desirable, torch.bool)
        return inputs, torch.cat([weight, weight, weight.new_ones(len(alone))]), desirable

    def measure(self, inputs: dict[str, Tensor], values: Tensor, desirable: Sequence[bool]) -> Metrics:
        """Sums and counts, over what the loss reads, of what the dashboards show; what no pair or sample is there for
        has the count 0."""
        policy, beta = inputs["policy_chosen"] - inputs["policy_rejected"], self.loss.settings.get("beta", 1.0)
        pairs = len(policy)
        metrics: Metrics = {
            "alignment_loss": (values.sum(), len(values)),
            "policy_margin": (policy.sum(), pairs),
        }
        for name in ("policy_chosen", "policy_rejected"):
            metrics[name] = (inputs[name].sum(), pairs)
        if self.loss.needs_reference:
            ratios: list[Tensor] = []
            for name in ("chosen", "rejected"):
                # In nats. The data's responses are not the policy's own, so this is no KL: stage eval estimates that.
                log_ratio = inputs[f"policy_{name}"] - inputs[f"reference_{name}"]
                metrics[f"log_ratio_{name}"] = (log_ratio.sum(), pairs)
                ratios.append(log_ratio)
            sizes = inputs.get("log_ratio", torch.cat(ratios)).abs()
            metrics["log_ratio_size"] = (sizes.sum(), len(sizes))
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


class Responses:
    """What is known of a micro-batch's responses, each named by the number of its example and its own; as tensors on
    the policy's device, in the order of the names."""

    def __init__(self, examples: Sequence[AlignmentRecord], values: Tensor):
        """values: log-probabilities under the policy, as `AlignmentRecord.reads` lists them."""
        self.examples, self.values = examples, values
        names = [(n, response) for n, example in enumerate(examples) for response in example.responses]
        self.place = {name: place for place, name in enumerate(names)}

    def policy(self, names: Sequence[Name]) -> Tensor:
        return self.values[self.tensor([self.place[name] for name in names], torch.int64)]

    def reference(self, names: Sequence[Name]) -> Tensor:
        return self.tensor([self.examples[n].reference[response] for n, response in names])

    def length(self, names: Sequence[Name]) -> Tensor:
        return self.tensor([len(self.examples[n].encoded.responses[response]) for n, response in names], torch.int64)

    def tensor(self, numbers: Sequence[float] | Sequence[bool], dtype: torch.dtype | None = None) -> Tensor:
        """Numbers beside those of the policy, and unless said otherwise of their dtype."""
        return tensor_on(self.values.device, numbers, dtype or self.values.dtype)
