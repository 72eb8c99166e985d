"""The tasks of supervised fine-tuning and of scorers (pointwise reward model, difference model); see step.Task."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from rdo.data.encoding import EncodedRecord
from rdo.data.records import Preference
from rdo.models.scorers import ComparisonTemplate, add_value
from rdo.objectives import losses
from rdo.runtime.store import stable_seed
from rdo.sequences.forward import Reads
from rdo.sequences.layout import tensor_on
from rdo.training.step import Denominators, Metrics, Task

T = TypeVar("T")


class ById(Generic[T]):
    """Items in the order of their keys, each made when it is asked for: token ids stay on disk until their step."""

    def __init__(self, keys: Sequence[Any], make: Callable[[int], T]):
        """keys: of each example its record's id, or a tuple that begins with it. make: example number n of `keys`."""
        self.order = sorted(range(len(keys)), key=keys.__getitem__)
        self.make = make

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> T:
        return self.make(self.order[place])


@dataclass(frozen=True)
class Example:
    """What is read of one record in one epoch: responses to imitate, or a scorer's values of a pair, and who is better
    in it."""

    record_id: str
    reads: Reads
    target: float = 1.0
    counts: ClassVar[bool] = True


class SftTask(Task):
    """Cross-entropy of responses given their query: a mean over response tokens of the whole step."""

    def denominators(self, examples: Sequence[Example]) -> Denominators:
        return {"tokens": sum(length for example in examples for length in example.reads.lengths)}

    def losses(
        self, examples: Sequence[Example], values: Tensor, denominators: Denominators, kl: Tensor | None
    ) -> tuple[Tensor, Metrics]:
        length = tensor_on(values.device, [length for example in examples for length in example.reads.lengths])
        cross_entropy = losses.sft(values, length, reduction="sum").sum()
        return cross_entropy / denominators["tokens"], {"response_length": (length.sum(), len(values))}


def learns_from(form: str, preference: Preference) -> bool:
    """Whether a form of scorer can be trained on a pair: Bradley-Terry has no place for ties."""
    return not (form == "pointwise" and preference.tie)


class ScorerTask(Task):
    """Trains a scorer on labelled pairs: Bradley-Terry for the pointwise form, RDO's equation 6 for the others.

    The order of a pair is a fair coin, reseeded every epoch, as is the response that the duplication regulariser
    reads. Ties have target 0.5.
    """

    def __init__(
        self,
        pairs: ById[tuple[EncodedRecord, Preference]],
        form: str,
        template: ComparisonTemplate | None,
        beta0: float,
        beta1: float,
        seed: int,
    ):
        """pairs: those that the form `learns_from`, with the keys (record id, chosen, rejected)."""
        super().__init__(pairs)
        self.form, self.template, self.beta0, self.beta1, self.seed = form, template, beta0, beta1, seed

    def example(self, index: int, epoch: int) -> Example:
        encoded, preference = self.records[index]
        add = partial(add_value, reads := Reads(), self.form, self.template, encoded)
        if self.form == "pointwise":
            add(preference.chosen)
            add(preference.rejected)
            return Example(encoded.id, reads)
        coin = random.Random(stable_seed(self.seed, "pair", epoch, encoded.id, preference.chosen, preference.rejected))
        first, second, target = preference.chosen, preference.rejected, 1.0
        if coin.random() < 0.5:
            first, second, target = second, first, 0.0
        twice = coin.choice((first, second))
        add(first, second)
        if self.beta0:
            add(twice, twice)
        if self.beta1:
            add(second, first)
        return Example(encoded.id, reads, 0.5 if preference.tie else target)

    def denominators(self, examples: Sequence[Example]) -> Denominators:
        return {"pairs": len(examples)}

    def losses(
        self, examples: Sequence[Example], values: Tensor, denominators: Denominators, kl: Tensor | None
    ) -> tuple[Tensor, Metrics]:
        outputs = values.view(len(examples), -1)
        target = tensor_on(outputs.device, [example.target for example in examples], outputs.dtype)
        if self.form == "pointwise":
            forward = outputs[:, 0] - outputs[:, 1]
            per_pair = losses.bradley_terry(outputs[:, 0], outputs[:, 1])
            metrics: Metrics = {}
        else:
            forward = outputs[:, 0]
            duplicate = outputs[:, 1] if self.beta0 else None
            reverse = outputs[:, -1] if self.beta1 else None
            per_pair = losses.difference(forward, target, duplicate, reverse, beta0=self.beta0, beta1=self.beta1)
            # Without the regularisers, whose sizes follow.
            metrics = {"comparison_loss": (losses.difference(forward, target).sum(), len(examples))}
            if duplicate is not None:
                metrics["duplication"] = (duplicate.square().sum(), len(examples))
            if reverse is not None:
                metrics["reverse"] = ((forward + reverse).square().sum(), len(examples))
        right = torch.where(target == 0.5, 0.5, ((forward > 0) == (target > 0.5)).to(forward.dtype))
        right = torch.where(forward == 0, 0.5, right)
        metrics["accuracy"] = (right.sum(), len(examples))
        metrics["difference_size"] = (forward.abs().sum(), len(examples))
        lengths = [len(ids) for example in examples for ids in example.reads.sequences]
        metrics["sequence_length"] = (torch.tensor(float(sum(lengths))), len(lengths))
        return per_pair.sum() / denominators["pairs"], metrics
