"""The training loop: one optimizer step is `batch_size` records, whatever the hardware.

Everything random is a function of (seed, epoch, record id), so that a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch
import transformers

from rdo.models.traits import head_parameters, recompute_activations
from rdo.runtime import stopping
from rdo.runtime.errors import NotFiniteError, UserError
from rdo.runtime.files import read_json, write_json
from rdo.runtime.processes import all_reduce_sum, broadcast, is_rank0, world
from rdo.runtime.progress import progress_bar
from rdo.runtime.store import stable_seed
from rdo.sequences.budget import tokens_per_micro_batch
from rdo.sequences.forward import check_positions
from rdo.sequences.preparation import described_layout, set_layout
from rdo.settings import EngineConfig, ScorerConfig, TrainingConfig
from rdo.tracking import Tracker
from rdo.training.engine import Checkpoints, Engine, TorchEngine, precision_of
from rdo.training.step import Dealt, Task, deal_step, training_step
from rdo.training.validation import Validation


@dataclass(frozen=True)
class Plan:
    """How many steps a run takes, and which records are in each: a function of the seed and the step alone."""

    records: int
    batch_size: int
    steps: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.records / self.batch_size)

    def batch(self, step: int) -> tuple[int, list[int]]:
        """Epoch (from 0) and record numbers of a step; the last batch of an epoch may be smaller."""
        epoch, within = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "order", epoch))
        order = torch.randperm(self.records, generator=generator).tolist()
        return epoch, order[within * self.batch_size : (within + 1) * self.batch_size]


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


def make_optimizer(model: transformers.PreTrainedModel, config: TrainingConfig) -> torch.optim.AdamW:
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


def make_engine(model: transformers.PreTrainedModel, config: TrainingConfig, engine: EngineConfig) -> Engine:
    """The engine of engine.name around a model that is on its device, with its optimizer."""
    optimizer = make_optimizer(model, config)
    if engine.name == "torch":
        return TorchEngine(model, optimizer, config.max_gradient_norm, engine)
    from rdo.training.zero import ZeroEngine  # which takes seconds to import

    return ZeroEngine(model, optimizer, config.max_gradient_norm, engine)


def train(
    task: Task,
    model: transformers.PreTrainedModel,
    config: TrainingConfig,
    engine_config: EngineConfig,
    seed: int,
    folder: Path,
    tracker: Tracker,
    title: str,
    validation_task: Task | None = None,
) -> dict[str, torch.Tensor] | None:
    """Trains the model, going on from the folder's last checkpoint if there is one. Every process calls this.
    validation_task: what the config has validated, over records that are not trained on.

    Returns the trained weights, on the first process, where the engine has divided them; else the model has them.
    Raises UserError where training is impossible, and Stopped, with a checkpoint of the last whole step, when the
    process is asked to stop.
    """
    layout = set_layout(model, engine_config.layout, engine_config.attention, precision_of(engine_config, model.device))
    if engine_config.gradient_checkpointing:
        recompute_activations(model)
    plan = make_plan(config, len(task), seed)
    check_positions(model, max(len(ids) for n in range(plan.records) for ids in task.example(n, 0).reads.sequences))
    engine = make_engine(model, config, engine_config)
    checkpoints = Checkpoints(folder / "checkpoints", engine_config, tracker.synchronize)
    done = checkpoints.restore(engine)
    tracker.resume(done)
    validation = Validation(validation_task, config, tracker, checkpoints)
    budget = engine_config.tokens_per_micro_batch or kept_budget(
        checkpoints.folder, lambda: tokens_per_micro_batch(model, engine_config, trained=True)
    )
    how = f"layout {described_layout(model, layout)}, {budget} tokens a micro-batch"
    if engine_config.name != "torch":
        how += f", {engine_config.name} on {world().size} process{'es' if world().size > 1 else ''}"
    print(f"[{title}] {plan.records} records, {plan.steps} steps, {how}", flush=True)

    def dealt_step(step: int) -> Dealt:
        epoch, numbers = plan.batch(step)
        examples = [task.example(number, epoch) for number in numbers]
        return deal_step(examples, layout, budget)

    bar = progress_bar(plan.steps, title, initial=done)
    # Reading, encoding and packing a step's records takes no time from the step before it.
    with stopping.postponed(), bar, ThreadPoolExecutor(1) as thread:
        coming = thread.submit(dealt_step, done)
        for step in range(done, plan.steps + 1):
            try:
                validation.after(step, step == plan.steps, engine, layout, budget, title)
            except stopping.Stopped:
                raise stopping.Stopped(part(checkpoints, engine, step, plan)) from None
            if step == plan.steps or validation.exhausted:
                break
            started = time.perf_counter()
            dealt, coming = coming.result(), thread.submit(dealt_step, step + 1)
            for group in engine.param_groups:
                group["lr"] = group["top_rate"] * learning_rate_factor(step, plan.steps, config)
            try:
                measured = training_step(task, engine, layout, dealt)
            except stopping.Stopped:
                raise stopping.Stopped(part(checkpoints, engine, step, plan)) from None
            measured["gradient_norm"] = update(engine, measured["loss"], dealt.examples, step)
            seconds = time.perf_counter() - started
            rates = [group["lr"] for group in engine.param_groups]
            measured |= dict(zip(("learning_rate", "head_learning_rate"), rates, strict=False))
            tracker.log(step + 1, {"epoch": step // plan.steps_per_epoch, **measured, **speed(measured, seconds)})
            bar.update(1)
            bar.set_postfix(loss=f"{measured['loss']:.4f}", refresh=False)
            # What any process asks of all.
            stop, save = all_reduce_sum(torch.tensor([stopping.requested(), checkpoints.is_due(step + 1)]).int())
            if stop and step + 1 < plan.steps:  # after the last, the model itself is saved
                raise stopping.Stopped(part(checkpoints, engine, step + 1, plan))
            if save and step + 1 < plan.steps:
                checkpoints.save(step + 1, engine)
        tracker.synchronize()
        validation.take_best(step, engine, title)
    return engine.finish()


def kept_budget(folder: Path, choose: Callable[[], int]) -> int:
    """The budget that a run began with: what goes on from its checkpoint has the same bits, whatever is free then."""
    file = folder / "budget.json"
    if not broadcast(file.exists):
        budget = choose()
        if is_rank0():
            file.parent.mkdir(exist_ok=True)
            write_json(file, budget)
    return int(broadcast(lambda: read_json(file)))


def part(checkpoints: Checkpoints, engine: Engine, step: int, plan: Plan) -> str:
    """Saves what a run that is asked to stop has done (a step that was broken off changed nothing); says what it is."""
    if step:
        checkpoints.save(step, engine)
    if checkpoints.newest is None:
        return f"after {step} of {plan.steps} steps, none of them saved; the same command starts again"
    return f"after {step} of {plan.steps} steps; {checkpoints.newest} is saved, and the same command goes on from there"


def speed(measured: dict[str, float], seconds: float) -> dict[str, float]:
    """What the step's seconds say, and the largest memory that it has taken so far on the first process."""
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    return {
        "seconds": round(seconds, 4),
        "tokens_per_second": round(measured["tokens"] / seconds, 1),
        "memory_bytes": memory,
    }


def update(engine: Engine, loss: float, examples: Sequence[Any], step: int) -> float:
    """Updates the weights; the gradient's norm before clipping. Raises NotFiniteError, with the records of the step,
    where loss or gradient are no numbers."""
    norm = engine.step() if math.isfinite(loss) else math.nan
    if norm is None:  # float16 overflowed: the loss is scaled down for the next step
        return math.inf
    if not math.isfinite(norm):
        raise NotFiniteError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}",
            [example.record_id for example in examples[:20]],
            "lower the learning rate, or look at these records",
        )
    return norm
