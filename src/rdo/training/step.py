"""One step of training: what a task is, and how its losses become the gradient of one mean over the global batch.

A step's examples are dealt to the processes and packed into micro-batches by a token budget. Losses are divided by
denominators of the whole step, over all processes, known before the first forward pass; so loss and gradient are the
same for any budget, layout, number of processes and order of records.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from transformers import PreTrainedModel

from rdo.runtime import stopping
from rdo.runtime.processes import all_gather, all_reduce_sum, world
from rdo.sequences.layout import LayoutName, TokenIds
from rdo.sequences.packing import cost, deal
from rdo.training.engine.surface import Engine

T = TypeVar("T")
Denominators = dict[str, float]
Metrics = dict[str, tuple[torch.Tensor, float]]  # name -> (sum, count)


class Example(Protocol):
    """One record's part of a step."""

    @property
    def record_id(self) -> str: ...

    @property
    def sequences(self) -> Sequence[TokenIds]: ...


@dataclass(frozen=True)
class Preparation:
    """What every micro-batch needs of the whole step (KTO's KL estimate), computed without gradients beforehand.

    values(model, layout, examples): one micro-batch's part of it, [any number]. combined: what `losses` is given, made
    of the parts of all micro-batches.
    """

    values: Callable[..., torch.Tensor]
    combined: Callable[[torch.Tensor], dict[str, Any]]


class Task(Protocol):
    """What a stage trains: records to examples, examples to losses."""

    @property
    def record_ids(self) -> Sequence[str]:
        """Ids of the training records, sorted, so that the order of a file changes nothing."""

    def example(self, index: int, epoch: int) -> Any:
        """The example of one record in one epoch."""

    def denominators(self, examples: Sequence[Any]) -> Denominators:
        """Denominators of a step's means, from its examples alone."""

    preparation: Preparation | None  # where a step's losses need something of the whole step

    def losses(
        self,
        model: PreTrainedModel,
        layout: LayoutName,
        examples: Sequence[Any],
        denominators: Denominators,
        prepared: dict[str, Any],
    ) -> tuple[torch.Tensor, Metrics]:
        """This micro-batch's share of the step's mean loss (a scalar), and sums and counts of what to log."""


@dataclass(frozen=True)
class Wishes:
    """What any process asks of all when a step is done: to stop, or to save a checkpoint."""

    stop: bool = False
    save: bool = False


NOTHING = Wishes()


@dataclass(frozen=True)
class Dealt:
    """A step's examples, and this process's micro-batches of them: as many as every process runs, of which the first
    `real` count."""

    examples: list[Any]
    batches: list[list[Any]]
    real: int


def training_step(
    task: Task, engine: Engine, layout: LayoutName, step: Dealt, wishes: Wishes = NOTHING
) -> tuple[dict[str, float], Wishes]:
    """Accumulates the gradient of the step's mean loss; the step's metrics, over all processes, and their wishes.

    A GPU is waited for once, at the end. One process alone raises Stopped between two micro-batches when it is asked to
    stop.
    """
    batches, real = step.batches, step.real
    denominators = task.denominators(step.examples)
    prepared: dict[str, Any] = {}
    if task.preparation is not None:
        values = task.preparation.values
        with torch.no_grad():
            parts = [engine.forward(partial(values, layout=layout, examples=batch)) for batch in batches]
        prepared = task.preparation.combined(joined(parts[:real]))
    sums = Sums()
    for number, batch in enumerate(batches):
        if world().size == 1:
            stopping.check()
        work = partial(task.losses, layout=layout, examples=batch, denominators=denominators, prepared=prepared)
        share, metrics = engine.forward(work)
        # A process with fewer micro-batches than another runs one more for nothing, for all must run equally many.
        engine.backward(share if number < real else 0.0 * share, last=number == len(batches) - 1)
        sums.add(share, metrics, 1.0 if number < real else 0.0)
    sums.add_number("tokens_unique", sum(computed_tokens(batch, layout) for batch in batches[:real]))
    sums.add_number(
        "tokens", sum(len(ids) for batch in batches[:real] for example in batch for ids in example.sequences)
    )
    return sums.agreed(wishes)


def deal_step(examples: Sequence[Any], layout: LayoutName, budget: int) -> Dealt:
    """Deals a step's examples to the processes and packs this one's."""
    dealt = deal([example.sequences for example in examples], layout, budget, world().size)
    own = dealt[world().rank]
    idle = max(map(len, dealt)) - len(own)
    smallest = min(range(len(examples)), key=lambda number: cost(examples[number].sequences, layout)) if idle else 0
    batches = [[examples[n] for n in batch] for batch in own]
    return Dealt(list(examples), batches + [[examples[smallest]]] * idle, len(own))


def ahead(make: Callable[[int], T], numbers: Iterable[int]) -> Iterator[tuple[int, T]]:
    """What `make` makes of each number, the next one in a thread while the current one is worked on: reading, encoding
    and packing a step's records takes no time from the one before it."""
    with ThreadPoolExecutor(1) as thread:
        begun = ((number, thread.submit(make, number)) for number in numbers)
        waiting = deque(islice(begun, 1))
        while waiting:
            waiting.extend(islice(begun, 1))
            number, made = waiting.popleft()
            yield number, made.result()


def computed_tokens(examples: Sequence[Any], layout: LayoutName) -> int:
    """Tokens that the model computes of a micro-batch: unique ones of a tree, padded rows of the padded layout."""
    sequences = [ids for example in examples for ids in example.sequences]
    return cost(sequences, layout)[0]


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """The values of all micro-batches of all processes, [any number]."""
    own = torch.cat(parts) if parts else torch.zeros(0)
    return own if world().size == 1 else own.new_tensor(all_gather(own.tolist()))


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

    def add_number(self, name: str, value: float) -> None:
        """A number that is summed over the processes, and no mean."""
        self.values[name], self.counts[name] = torch.tensor(value, dtype=torch.float64), 0.0

    def agreed(self, wishes: Wishes) -> tuple[dict[str, float], Wishes]:
        """Loss, means and sums over all processes, and what any of them wishes."""
        names = sorted(self.values)
        values = torch.stack([self.values[name].reshape(()).to("cpu") for name in names])
        denominators = torch.tensor([self.counts[name] for name in names], dtype=torch.float64)
        asked = torch.tensor([wishes.stop, wishes.save], dtype=torch.float64)
        numbers = all_reduce_sum(torch.cat([values, denominators, asked])).tolist()
        found = dict(zip(names, zip(numbers, numbers[len(names) :], strict=False), strict=False))
        means = {name: value / count for name, (value, count) in found.items() if count and name != "loss"}
        tokens, unique = found["tokens"][0], found["tokens_unique"][0]
        means |= {"loss": found["loss"][0], "tokens": tokens, "unique_token_share": unique / tokens}
        return means, Wishes(*(bool(number) for number in numbers[-2:]))
