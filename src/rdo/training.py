"""The training loop: one optimizer step is `batch_size` records, whatever the hardware.

A task turns records into items (token sequences and what to read off them) and items into unreduced losses. The loop
packs a step's items into micro-batches by a token budget and divides by the step's GLOBAL counts, known before the
first forward pass; so loss, gradient and weights are the same for any budget, layout and order of records.
Everything random is a function of (seed, epoch, record id), so that a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from rdo import interrupts
from rdo.checkpoints import Checkpoints
from rdo.errors import NotFiniteError, UserError
from rdo.files import DiskFull, patiently
from rdo.forest import LayoutName, TokenIds
from rdo.models import check_positions, head_parameters, set_layout
from rdo.packing import pack
from rdo.progress import progress_bar, warn
from rdo.schema import EngineConfig, ScorerConfig, TrainingConfig
from rdo.tracking import Tracker

Counts = dict[str, float]
Measures = dict[str, tuple[torch.Tensor, float]]  # name -> (sum, count)


class Item(Protocol):
    """One record's part of a step."""

    @property
    def record_id(self) -> str: ...

    @property
    def sequences(self) -> Sequence[TokenIds]: ...


class Task(Protocol):
    """What a stage trains: records to items, items to losses."""

    @property
    def record_ids(self) -> Sequence[str]:
        """Ids of the training records, sorted, so that the order of a file changes nothing."""

    def item(self, index: int, epoch: int) -> Any:
        """The item of one record in one epoch."""

    def counts(self, items: Sequence[Any]) -> Counts:
        """Denominators of a step's means, from its items alone."""

    def prepare(self, model: PreTrainedModel, layout: LayoutName, batches: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """What every micro-batch needs of the whole step (KTO's KL estimate), computed without gradients."""

    def losses(
        self, model: PreTrainedModel, layout: LayoutName, items: Sequence[Any], counts: Counts, prepared: dict[str, Any]
    ) -> tuple[torch.Tensor, Measures]:
        """This micro-batch's share of the step's mean loss (a scalar), and sums and counts of what to log."""


@dataclass(frozen=True)
class Plan:
    """How many steps a run takes, and which records are in each."""

    records: int
    batch_size: int
    steps: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.records / self.batch_size)

    def batch(self, step: int) -> tuple[int, list[int]]:
        """Epoch and record numbers of a step; the last batch of an epoch may be smaller."""
        epoch, within = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "order", epoch))
        order = torch.randperm(self.records, generator=generator).tolist()
        return epoch, order[within * self.batch_size : (within + 1) * self.batch_size]


def stable_seed(*parts: object) -> int:
    """A seed from any parts, the same in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def make_plan(config: TrainingConfig, records: int, seed: int) -> Plan:
    """Raises UserError where there is nothing to train on."""
    if records == 0:
        raise UserError("there is no record to train on: see dataset.*, min_responses and max_records of the stage")
    steps = config.epochs * math.ceil(records / config.batch_size)
    if config.max_steps is not None:
        steps = min(steps, config.max_steps)
    return Plan(records, config.batch_size, steps, seed)


def learning_rate_factor(step: int, steps: int, config: TrainingConfig) -> float:
    """The schedule at a step (from 0), as a factor of the learning rate: linear warm-up, then the chosen curve."""
    warmup = math.ceil(config.warmup_share * steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    curves = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return curves[config.schedule]


def make_optimizer(model: PreTrainedModel, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with two learning rates: a scorer's head has its own."""
    head = {id(parameter) for parameter in head_parameters(model)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    head_rate = (config.head_learning_rate if isinstance(config, ScorerConfig) else None) or config.learning_rate
    groups = [
        {"params": [p for p in trained if id(p) not in head], "top_rate": config.learning_rate},
        {"params": [p for p in trained if id(p) in head], "top_rate": head_rate},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def train(
    task: Task,
    model: PreTrainedModel,
    config: TrainingConfig,
    engine: EngineConfig,
    seed: int,
    folder: Path,
    tracker: Tracker,
    title: str,
) -> None:
    """Trains the model in place, going on from the folder's last checkpoint if there is one.

    Raises UserError where training is impossible, and Stopped, with a checkpoint of the last whole step, when the
    process is asked to stop.
    """
    if model.dtype not in (torch.float32, torch.float64):
        # An update below 1/256 of a weight is lost in bfloat16, and at 1e-6 nearly all are.
        raise UserError(f"weights of {model.dtype} cannot be trained exactly: use model.dtype=float32")
    layout = set_layout(model, engine.layout)
    plan = make_plan(config, len(task.record_ids), seed)
    check_positions(model, max(len(ids) for n in range(plan.records) for ids in task.item(n, 0).sequences))
    optimizer = make_optimizer(model, config)
    checkpoints = Checkpoints(folder / "checkpoints", engine, tracker.synchronize)
    done = checkpoints.restore(model, optimizer)
    patiently(lambda: tracker.resume(done), engine.disk_full_minutes)
    print(f"[{title}] {plan.records} records, {plan.steps} steps, layout {layout}", flush=True)
    with interrupts.postponed(), progress_bar(plan.steps, title, initial=done) as bar:
        for step in range(done, plan.steps):
            started = time.perf_counter()
            epoch, numbers = plan.batch(step)
            items = [task.item(number, epoch) for number in numbers]
            set_learning_rates(optimizer, learning_rate_factor(step, plan.steps, config))
            try:
                measured = training_step(task, model, layout, items, engine.tokens_per_micro_batch)
            except interrupts.Stopped as stop:
                raise interrupts.Stopped(stop.number, part(checkpoints, step, plan, model, optimizer)) from None
            measured["gradient_norm"] = clip(model, config.max_gradient_norm)
            check_finite(measured, items, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds = round(time.perf_counter() - started, 4)
            tracker.log(step + 1, {"epoch": epoch, **measured, **learning_rates(optimizer), "seconds": seconds})
            bar.update(1)
            bar.set_postfix(loss=f"{measured['loss']:.4f}", refresh=False)
            checkpoints.maybe_save(step + 1, plan.steps, model, optimizer)
        patiently(tracker.synchronize, engine.disk_full_minutes)


def part(
    checkpoints: Checkpoints, step: int, plan: Plan, model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> str:
    """Saves what a run that is asked to stop has done (a step that was broken off changed nothing); says what it is."""
    if step and checkpoints.newest != checkpoints.file(step):
        try:
            checkpoints.save(step, model, optimizer)
        except DiskFull as error:
            warn(str(error))
    if checkpoints.newest is None:
        return f"after {step} of {plan.steps} steps, none of them saved; the same command starts again"
    return f"after {step} of {plan.steps} steps; {checkpoints.newest} is saved, and the same command goes on from there"


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets each group's learning rate to a factor of its top rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["top_rate"] * factor


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The learning rates as metrics name them."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return dict(zip(("learning_rate", "head_learning_rate"), rates, strict=False))


def training_step(
    task: Task, model: PreTrainedModel, layout: LayoutName, items: Sequence[Any], budget: int
) -> dict[str, float]:
    """Accumulates the gradient of the step's mean loss, and returns the step's measures.

    Raises Stopped between two micro-batches when the process is asked to stop.
    """
    batches = [[items[n] for n in batch] for batch in pack([item.sequences for item in items], layout, budget)]
    counts = task.counts(items)
    prepared = task.prepare(model, layout, batches)
    loss = torch.zeros((), dtype=torch.float64)
    sums: dict[str, torch.Tensor] = {}
    totals: Counts = {}
    for batch in batches:
        interrupts.check()
        share, measures = task.losses(model, layout, batch, counts, prepared)
        share.backward()
        loss += share.detach().double().cpu()
        for name, (value, count) in measures.items():
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value.detach().double().cpu()
            totals[name] = totals.get(name, 0.0) + count
    means = {name: float(sums[name]) / totals[name] for name in sums if totals[name]}
    return {"loss": float(loss), **means}


def clip(model: PreTrainedModel, largest: float | None) -> float:
    """Clips the gradient to a global norm (None: not at all); the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf if largest is None else largest)
    return float(norm)


def check_finite(measured: dict[str, float], items: Sequence[Item], step: int) -> None:
    """A loss or gradient that is not a number ends the run and names the records of its step."""
    if not (math.isfinite(measured["loss"]) and math.isfinite(measured["gradient_norm"])):
        raise NotFiniteError(
            f"step {step + 1}: loss {measured['loss']}, gradient norm {measured['gradient_norm']}",
            [item.record_id for item in items[:20]],
            "lower the learning rate, or look at these records",
        )
