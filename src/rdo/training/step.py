"""One step of training: what a task is, and how its losses become the gradient of one mean over the global batch.

A step's examples are dealt to the processes and packed into micro-batches by a token budget. Losses are divided by
denominators of the whole step, over all processes, known before the first forward pass; so loss and gradient are the
same for any budget, layout, number of processes and order of records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import transformers

from rdo.objectives import losses
from rdo.runtime import stopping
from rdo.runtime.processes import all_gather, all_reduce_sum, world
from rdo.sequences.layout import LayoutName, cost, pack
from rdo.training.engine import Engine

Denominators = dict[str, float]
Metrics = dict[str, tuple[torch.Tensor, float]]  # name -> (sum, count), of a mean


class Task(Protocol):
    """What a stage trains: records to examples, examples to losses."""

    @property
    def record_ids(self) -> Sequence[str]:
        """Ids of the training records, sorted, so that the order of a file changes nothing."""

    # KTO's log-ratios of mismatched responses, [any number], of one micro-batch: kl_ratios(model, layout, examples).
    kl_ratios: Callable[..., torch.Tensor] | None

    def example(self, index: int, epoch: int) -> Any:
        """The example of one record in one epoch: anything with a `record_id` and the `sequences` that are read."""

    def denominators(self, examples: Sequence[Any]) -> Denominators:
        """Denominators of a step's means, from its examples alone."""

    def losses(
        self,
        model: transformers.PreTrainedModel,
        layout: LayoutName,
        examples: Sequence[Any],
        denominators: Denominators,
        kl: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Metrics]:
        """This micro-batch's share of the step's mean loss (a scalar), and sums and counts of what to log. kl: KTO's
        estimate over the whole step, of a task with `kl_ratios`."""


@dataclass(frozen=True)
class Dealt:
    """A step's examples, and this process's micro-batches of them: as many as every process runs, of which the first
    `real` count."""

    examples: list[Any]
    batches: list[list[Any]]
    real: int


def training_step(task: Task, engine: Engine, layout: LayoutName, step: Dealt) -> dict[str, float]:
    """Accumulates the gradient of the step's mean loss; returns the step's metrics, over all processes.

    A GPU is waited for once, at the end. One process alone raises Stopped between two micro-batches when it is asked to
    stop.
    """
    batches, real = step.batches, step.real
    denominators, kl = task.denominators(step.examples), None
    if task.kl_ratios is not None:
        with torch.no_grad():
            parts = [engine.forward(partial(task.kl_ratios, layout=layout, examples=batch)) for batch in batches]
        own = torch.cat(parts[:real]) if real else torch.zeros(0)
        kl = losses.kto_kl(own if world().size == 1 else own.new_tensor(all_gather(own.tolist())))
    sums = Sums()
    for number, batch in enumerate(batches):
        if world().size == 1:
            stopping.check()
        work = partial(task.losses, layout=layout, examples=batch, denominators=denominators, kl=kl)
        share, metrics = engine.forward(work)
        ids = [ids for example in batch for ids in example.sequences]
        metrics["tokens"] = torch.tensor(float(sum(map(len, ids)))), 0.0
        metrics["tokens_unique"] = torch.tensor(float(cost(ids, layout)[0])), 0.0
        # A process with fewer micro-batches than another runs one more for nothing, for all must run equally many.
        engine.backward(share if number < real else 0.0 * share, last=number == len(batches) - 1)
        sums.add(share, metrics, 1.0 if number < real else 0.0)
    return sums.agreed()


def deal_step(examples: Sequence[Any], layout: LayoutName, budget: int) -> Dealt:
    """Deals a step's examples to the processes and packs this one's.

    The largest goes first, always to who has least to do (longest processing time first, Graham 1969).
    """
    costs = [cost(example.sequences, layout) for example in examples]
    hands: list[list[int]] = [[] for _ in range(world().size)]
    loads = [0] * len(hands)
    for number in sorted(range(len(examples)), key=lambda number: -costs[number][0]):
        least = loads.index(min(loads))
        hands[least].append(number)
        loads[least] += costs[number][0]
    packed = []
    for hand in ([examples[n] for n in sorted(hand)] for hand in hands):
        packed.append([[hand[n] for n in batch] for batch in pack([e.sequences for e in hand], layout, budget)])
    own = packed[world().rank]
    smallest = examples[min(range(len(examples)), key=costs.__getitem__)]
    idle = max(map(len, packed)) - len(own)
    return Dealt(list(examples), own + [[smallest]] * idle, len(own))


class Sums:
    """Adds up a step's loss and metrics: where they are computed, in float64, and over processes only at the end."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}
        self.counts: Denominators = {}

    def add(self, loss: torch.Tensor, metrics: Metrics, factor: float) -> None:
        """A micro-batch; factor 0 if it does not count."""
        for name, (value, count) in {**metrics, "loss": (loss, 1.0)}.items():
            value = value.detach().double() if factor else torch.zeros((), dtype=torch.float64, device=value.device)
            self.values[name] = self.values[name] + value if name in self.values else value
            self.counts[name] = self.counts.get(name, 0.0) + factor * count

    def agreed(self) -> dict[str, float]:
        """Loss, means and sums over all processes."""
        names = sorted(self.values)
        values = torch.stack([self.values[name].reshape(()).to("cpu") for name in names])
        counts = torch.tensor([self.counts[name] for name in names], dtype=torch.float64)
        sums, over = (part.tolist() for part in all_reduce_sum(torch.stack([values, counts])))
        found = dict(zip(names, zip(sums, over, strict=True), strict=True))
        means = {name: value / count for name, (value, count) in found.items() if count and name != "loss"}
        tokens, unique = found["tokens"][0], found["tokens_unique"][0]
        return means | {"loss": found["loss"][0], "tokens": tokens, "unique_token_share": unique / tokens}
