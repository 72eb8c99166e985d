"""The training loop: one optimizer step is `batch_size` records, whatever the hardware.

Everything random is a function of (seed, epoch, record id), so that a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch
from transformers import PreTrainedModel

from rdo.models.traits import head_parameters, recompute_activations
from rdo.runtime import stopping
from rdo.runtime.errors import NotFiniteError, UserError
from rdo.runtime.processes import world
from rdo.runtime.progress import progress_bar
from rdo.sequences.forward import check_positions
from rdo.sequences.layout import LayoutName
from rdo.sequences.preparation import described_layout, set_layout
from rdo.settings import EngineConfig, ScorerConfig, TrainingConfig
from rdo.tracking import Tracker
from rdo.training.checkpoints import Checkpoints
from rdo.training.engine.surface import Engine, precision_of
from rdo.training.engine.torch_engine import TorchEngine
from rdo.training.plan import Plan, learning_rate_factor, make_plan
from rdo.training.step import Dealt, Example, Task, Wishes, ahead, deal_step, training_step


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
    engine_config: EngineConfig,
    seed: int,
    folder: Path,
    tracker: Tracker,
    title: str,
) -> dict[str, torch.Tensor] | None:
    """Trains the model, going on from the folder's last checkpoint if there is one. Every process calls this.

    Returns the trained weights, on the first process, where the engine has divided them; else the model has them.
    Raises UserError where training is impossible, and Stopped, with a checkpoint of the last whole step, when the
    process is asked to stop.
    """
    if model.dtype not in (torch.float32, torch.float64):
        # An update below 1/256 of a weight is lost in bfloat16, and at 1e-6 nearly all are.
        raise UserError(f"weights of {model.dtype} cannot be trained exactly: use model.dtype=float32")
    precision = precision_of(engine_config, model.device)
    layout = set_layout(model, engine_config.layout, engine_config.attention, precision)
    if engine_config.gradient_checkpointing:
        recompute_activations(model)
    plan = make_plan(config, len(task.record_ids), seed)
    check_positions(model, max(len(ids) for n in range(plan.records) for ids in task.example(n, 0).sequences))
    engine = make_engine(model, config, engine_config)
    checkpoints = Checkpoints(folder / "checkpoints", engine_config, tracker.synchronize)
    done = checkpoints.restore(engine)
    tracker.resume(done)
    how = described_layout(model, layout) + described(engine_config)
    print(f"[{title}] {plan.records} records, {plan.steps} steps, layout {how}", flush=True)
    make_step = partial(dealt_step, task, plan, layout, engine_config.tokens_per_micro_batch)
    with stopping.postponed(), progress_bar(plan.steps, title, initial=done) as bar:
        for step, dealt in ahead(make_step, range(done, plan.steps)):
            started = time.perf_counter()
            set_learning_rates(engine.param_groups, learning_rate_factor(step, plan.steps, config))
            wishes = Wishes(stopping.requested(), checkpoints.is_due(step + 1))
            try:
                measured, wishes = training_step(task, engine, layout, dealt, wishes)
            except stopping.Stopped:
                raise stopping.Stopped(part(checkpoints, engine, step, plan)) from None
            measured["gradient_norm"] = update(engine, measured["loss"], dealt.examples, step)
            seconds = time.perf_counter() - started
            rates = learning_rates(engine.param_groups)
            tracker.log(step + 1, {"epoch": plan.epoch(step), **measured, **rates, **speed(measured, seconds)})
            bar.update(1)
            bar.set_postfix(loss=f"{measured['loss']:.4f}", refresh=False)
            if step + 1 < plan.steps:  # after the last, the model itself is saved
                if wishes.stop:
                    raise stopping.Stopped(part(checkpoints, engine, step + 1, plan))
                if wishes.save:
                    checkpoints.save(step + 1, engine)
        tracker.synchronize()
    state = engine.full_state()
    engine.close()
    return state


def make_engine(model: PreTrainedModel, config: TrainingConfig, engine: EngineConfig) -> Engine:
    """The engine of engine.name around a model that is on its device, with its optimizer."""
    optimizer = make_optimizer(model, config)
    if engine.name == "torch":
        return TorchEngine(model, optimizer, config.max_gradient_norm, engine)
    from rdo.training.engine.deepspeed_engine import ZeroEngine  # which takes seconds to import

    return ZeroEngine(model, optimizer, config.max_gradient_norm, engine)


def dealt_step(task: Task, plan: Plan, layout: LayoutName, budget: int, step: int) -> Dealt:
    """The records of a step, dealt and packed."""
    epoch, numbers = plan.batch(step)
    return deal_step([task.example(number, epoch) for number in numbers], layout, budget)


def described(config: EngineConfig) -> str:
    """The engine, where it is another than plain PyTorch."""
    count = world().size
    return "" if config.name == "torch" else f", {config.name} on {count} process{'es' if count > 1 else ''}"


def part(checkpoints: Checkpoints, engine: Engine, step: int, plan: Plan) -> str:
    """Saves what a run that is asked to stop has done (a step that was broken off changed nothing); says what it is."""
    if step and checkpoints.newest != checkpoints.file(step, engine):
        checkpoints.save(step, engine)
    if checkpoints.newest is None:
        return f"after {step} of {plan.steps} steps, none of them saved; the same command starts again"
    return f"after {step} of {plan.steps} steps; {checkpoints.newest} is saved, and the same command goes on from there"


def set_learning_rates(groups: list[dict[str, Any]], factor: float) -> None:
    """Sets each group's learning rate to a factor of its top rate."""
    for group in groups:
        group["lr"] = group["top_rate"] * factor


def learning_rates(groups: list[dict[str, Any]]) -> dict[str, float]:
    """The learning rates as metrics name them."""
    rates = [group["lr"] for group in groups]
    return dict(zip(("learning_rate", "head_learning_rate"), rates, strict=False))


def speed(measured: dict[str, float], seconds: float) -> dict[str, float]:
    """What the step's seconds say, and the largest memory that it has taken so far on the first process."""
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    return {
        "seconds": round(seconds, 4),
        "tokens_per_second": round(measured["tokens"] / seconds, 1),
        "memory_bytes": memory,
    }


def update(engine: Engine, loss: float, examples: Sequence[Example], step: int) -> float:
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
