"""One step of training: what a task is, and how its losses become the gradient of one mean over the global batch.

A step's examples are dealt to the processes and packed into micro-batches by a token budget. Losses are divided by
denominators of the whole step, over all processes, known before the first forward pass; so loss and gradient are the
same for any budget, layout, number of processes and order of records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rdo.objectives import losses
from rdo.runtime import stopping
from rdo.runtime.processes import all_gather, all_reduce_sum, world
from rdo.sequences.forward import Reads, merge
from rdo.sequences.layout import LayoutName, cost, pack, tensor_on
from rdo.training.engine import Engine

Denominators = dict[str, float]
Metrics = dict[str, tuple[torch.Tensor, float]]  # name -> (sum, count), of a mean


class Task:
    """What a stage trains: records to examples, which list what is read of them; what was read to losses."""

    def __init__(self, records: Any):
        """records: what `example` makes examples of, in an order that no order of a file changes (see tasks.ById)."""
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def example(self, index: int, epoch: int) -> Any:
        """The example of one record in one epoch: anything with a `record_id` and its `reads`. One that does not count
        (`counts`) is in the denominators, and is not read."""
        return self.records[index]

    def denominators(self, examples: Sequence[Any]) -> Denominators:
        """Denominators of a step's means, from its examples alone."""
        raise NotImplementedError

    def described(self, examples: Sequence[Any]) -> dict[str, float]:
        """What is logged of a step's examples themselves, those that do not count included."""
        return {}

    def losses(
        self, examples: Sequence[Any], values: torch.Tensor, denominators: Denominators, kl: torch.Tensor | None
    ) -> tuple[torch.Tensor, Metrics]:
        """A micro-batch's share of the step's mean loss (a scalar), and sums and counts of what to log.

        values: what was read of the examples, one after the other. kl: KTO's estimate over the whole step, where the
        examples have `mismatched` responses.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Hand:
    """This process's micro-batches: as many as every process runs, of which the first `real` count."""

    batches: list[list[Any]]
    real: int


@dataclass(frozen=True)
class Dealt:
    """A step's examples, what this process learns from, and what it reads for KTO's estimate (None: there is none)."""

    examples: list[Any]
    learnt: Hand
    mismatched: Hand | None


def training_step(task: Task, engine: Engine, layout: LayoutName, step: Dealt, learns: bool = True) -> dict[str, float]:
    """Accumulates the gradient of the step's mean loss (where it `learns`); returns the step's metrics,
    over all processes.

    A GPU is waited for once, at the end. Raises Stopped between two micro-batches, in every process, when one is asked
    to stop.
    """
    batches, real = step.learnt.batches, step.learnt.real
    denominators, sums = task.denominators(step.examples), Sums()
    kl = kl_estimate(engine, layout, step.mismatched) if step.mismatched else None
    for number, batch in enumerate(batches):
        stopping.check_together()
        reads = merge([example.reads for example in batch])
        with torch.set_grad_enabled(learns):
            share, metrics = task.losses(batch, engine.read(layout, reads), denominators, kl)
        ids = reads.sequences
        metrics["tokens"] = torch.tensor(float(sum(map(len, ids)))), 0.0
        metrics["tokens_unique"] = torch.tensor(float(cost(ids, layout)[0])), 0.0
        # A process with fewer micro-batches than another runs one more for nothing, for all must run equally many.
        if learns:
            engine.backward(share if number < real else 0.0 * share, last=number == len(batches) - 1)
        sums.add(share, metrics, 1.0 if number < real else 0.0)
    return task.described(step.examples) | sums.agreed()


def kl_estimate(engine: Engine, layout: LayoutName, hand: Hand) -> torch.Tensor:
    """KTO's z0 = max(0, mean log-ratio of the mismatched responses), over the whole step."""
    parts = []
    with torch.no_grad():
        for batch in hand.batches:
            stopping.check_together()
            policy = engine.read(layout, merge([example.mismatched.reads for example in batch]))
            known = [value for example in batch for value in example.mismatched.reference]
            parts.append(policy - tensor_on(policy.device, known, policy.dtype))
    own = torch.cat(parts[: hand.real]) if hand.real else torch.zeros(0)
    return losses.kto_kl(own if world().size == 1 else own.new_tensor(all_gather(own.tolist())))


def deal_step(examples: Sequence[Any], layout: LayoutName, budget: int) -> Dealt:
    """Deals a step's examples to the processes and packs this one's. Those that do not count take part in KTO's
    estimate alone; where none does, one is run for nothing, as every step updates the optimizer."""
    counted = [example for example in examples if example.counts]
    learnt = deal(counted or examples, lambda example: example.reads, layout, budget)
    if not counted:
        learnt = Hand(learnt.batches[:1], 0)
    paired = [example for example in examples if getattr(example, "mismatched", None)]
    mismatched = deal(paired, lambda example: example.mismatched.reads, layout, budget) if paired else None
    return Dealt(list(examples), learnt, mismatched)


def deal(examples: Sequence[Any], reads: Callable[[Any], Reads], layout: LayoutName, budget: int) -> Hand:
    """Deals examples, by what is read of each, and packs this process's.

    The largest goes first, always to who has least to do (longest processing time first, Graham 1969).
    """
    costs = [cost(reads(example).sequences, layout) for example in examples]
    hands: list[list[int]] = [[] for _ in range(world().size)]
    loads = [0] * len(hands)
    for number in sorted(range(len(examples)), key=lambda number: -costs[number][0]):
        least = loads.index(min(loads))
        hands[least].append(number)
        loads[least] += costs[number][0]
    packed = []
    for hand in ([examples[n] for n in sorted(hand)] for hand in hands):
        batches = pack([reads(example).sequences for example in hand], layout, budget)
        packed.append([[hand[n] for n in batch] for batch in batches])
    own = packed[world().rank]
    smallest = examples[min(range(len(examples)), key=costs.__getitem__)]
    idle = max(map(len, packed)) - len(own)
    return Hand(own + [[smallest]] * idle, len(own))


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
        return means | {"loss": found["loss"][0], "tokens": tokens, "unique_token_share": unique / max(1.0, tokens)}
