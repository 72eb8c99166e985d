"""What launch/gpu_check.py checks: numbers of a device against float32 on the CPU, waiting, transfers.

Every check yields lines: what, an error, and how large it may be. What is wanted is the `padded` layout (one row a
sequence, transformers' own attention) on the CPU in float32. In half precision nothing comes close to that; so what the
padded layout is off by on the device in the same precision is the yardstick.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.attention.varlen
from transformers import PreTrainedModel

import emulated
import rdo.sequences.kernels.varlen
from helpers import policy, random_tree, relative_error, scorer, words
from made_tasks import SETTINGS, encoded, make_task
from rdo.models.traits import recompute_activations
from rdo.sequences.attention import OBSTACLES, attention_name, choose_kernel
from rdo.sequences.forward import Reads, hidden_states, merge
from rdo.sequences.kernels.varlen import HALF
from rdo.sequences.layout import LayoutName, make_layout, to_device
from rdo.sequences.preparation import head_width, set_layout
from rdo.sequences.readout import LOGITS_BUDGET, Span, span_log_probabilities
from rdo.settings import EngineConfig
from rdo.training.engine import TorchEngine
from rdo.training.step import deal_step, training_step

# The dtype of the weights, and of autocast where it is on.
MODES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "autocast": (torch.float32, torch.bfloat16),
}
# Times the widths of the tests' tiny models: on a GPU heads of a width of 64, which every kernel takes.
SCALES = {"cuda": 8, "cpu": 2}
FACTOR = 1.5  # a tree's error over that of the padded layout on the same device, at most
FLOOR = {"float32": 1e-5, "bfloat16": 2e-3, "float16": 5e-4, "autocast": 2e-3}  # errors below are rounding
SANE = {"float32": 1e-4, "bfloat16": 0.2, "float16": 0.1, "autocast": 0.2}  # beyond it the yardstick itself is broken

Lines = Iterator[tuple[str, float, float]]
Errors = dict[str, float]


@dataclass(frozen=True)
class Numbers:
    """Hidden states of every sequence, log-probabilities, and gradients, on the CPU."""

    states: list[torch.Tensor]
    sums: list[torch.Tensor]
    gradients: list[torch.Tensor]

    def off(self, wanted: Numbers) -> Errors:
        """Relative errors of the parts."""
        return {
            "hidden states": relative_error(self.states, wanted.states),
            "log-probabilities": relative_error(self.sums, wanted.sums),
            "gradients": relative_error(self.gradients, wanted.gradients),
        }


@cache
def sequences() -> list[tuple[int, ...]]:
    """A tree of sequences that are long, and some that part late, early or not at all."""
    coin = random.Random(4)
    query, first, second = words(coin, 150), words(coin, 60), words(coin, 61)
    return [*random_tree(11, count=10, longest=200), query + first, query + second, query, query + first, (7,)]


def numbers(
    model: PreTrainedModel, layout: LayoutName, autocast: torch.dtype | None, budget: int = LOGITS_BUDGET
) -> Numbers:
    """What a model makes of the sequences in a layout that it is prepared for."""
    laid_out = make_layout(layout, sequences())
    spans = [Span(s, max(1, len(ids) // 2)) for s, ids in enumerate(sequences()) if len(ids) > 1]
    with computing(model.device, autocast):
        hidden = hidden_states(model, laid_out)
        sums = span_log_probabilities(hidden, model.get_output_embeddings(), laid_out, spans, budget)
        counts = torch.tensor(Reads(sequences(), spans).lengths, device=sums.device)
        loss = (torch.linspace(-1.0, 1.5, len(sums), device=sums.device) / counts * sums).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    states = [hidden[laid_out.index(s, np.arange(len(ids)))] for s, ids in enumerate(sequences())]
    return Numbers(*([t.detach().float().cpu() for t in ts] for ts in (states, [sums], gradients)))


def computing(device: torch.device, autocast: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast, where it is on."""
    return nullcontext() if autocast is None else torch.autocast(device.type, autocast)


def made(name: str, mode: str, device: torch.device, scale: int) -> PreTrainedModel:
    """A model with the same weights in every mode, but for their rounding."""
    return policy(name, MODES[mode][0], scale=scale).to(device)  # type: ignore[arg-type]


@cache
def wanted(name: str, scale: int) -> Numbers:
    """The padded layout in float32 on the CPU."""
    model = made(name, "float32", torch.device("cpu"), scale)
    set_layout(model, "padded")
    return numbers(model, "padded", None)


@cache
def yardstick(name: str, mode: str, device: torch.device) -> Errors:
    """What the padded layout is off by on the device."""
    scale = SCALES[device.type]
    model = made(name, mode, device, scale)
    set_layout(model, "padded")
    return numbers(model, "padded", MODES[mode][1]).off(wanted(name, scale))


def compared(found: Errors, flat: Errors, mode: str, floor: float = 1.0) -> Lines:
    """Errors with what they may be; floor: times that of the mode."""
    for part, error in found.items():
        yield part, error, max(FACTOR * flat[part], floor * FLOOR[mode])


def prepare(model: PreTrainedModel, kernel: str, mode: str) -> None:
    """A tree under a kernel; an emulation would be refused on a CPU."""
    if kernel == "varlen" and model.device.type == "cpu":
        model.set_attn_implementation(attention_name(kernel))
    else:
        set_layout(model, "tree", kernel, MODES[mode][1])


def check_padded(name: str, mode: str, device: torch.device) -> Lines:
    """The yardstick itself, which in float32 must agree with the CPU."""
    for part, error in yardstick(name, mode, device).items():
        yield part, error, SANE[mode]


def check_model(
    name: str, mode: str, kernel: str, device: torch.device, budget: int = LOGITS_BUDGET, recomputing: bool = False
) -> Lines:
    """A tree under a kernel against the padded layout; with the head in chunks of so many logits, or with layers that
    run again going backward."""
    flat, scale = yardstick(name, mode, device), SCALES[device.type]
    model = made(name, mode, device, scale)
    prepare(model, kernel, mode)
    if recomputing:
        recompute_activations(model)
    found = numbers(model, "tree", MODES[mode][1], budget)
    yield from compared(found.off(wanted(name, scale)), flat, mode)


def engine_of(task: str, precision: str, device: torch.device, scale: int) -> TorchEngine:
    """A model for a task, and the engine of one process."""
    model = policy("llama-grouped", scale=scale) if task in SETTINGS else scorer("llama-grouped", task, scale=scale)
    model = model.to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return TorchEngine(model, optimizer, 1.0, EngineConfig(precision=precision))


def examples_of(task: str) -> tuple[Any, list[Any]]:
    """A task on random records, and all of its examples."""
    made_up = make_task(task, encoded(6, 6 if task == "rrhf" else 2, scale=6))
    return made_up, [made_up.example(n, 0) for n in range(len(made_up))]


def steps(task: str, layout: str, precision: str, device: torch.device, scale: int) -> dict[str, list[torch.Tensor]]:
    """Losses of three steps of training in several micro-batches, and the gradients of the first."""
    engine = engine_of(task, precision, device, scale)
    how = set_layout(engine.model, layout, "auto", engine.precision)
    made_up, examples = examples_of(task)
    losses: list[float] = []
    gradients: list[torch.Tensor] = []
    for _ in range(3):
        measured = training_step(made_up, engine, how, deal_step(examples, how, 700))
        gradients = gradients or [p.grad.float().cpu() for p in engine.model.parameters() if p.grad is not None]
        losses.append(measured["loss"])
        engine.step()
    return {"losses": [torch.tensor(losses)], "gradients": gradients}


@cache
def wanted_steps(task: str, scale: int) -> dict[str, list[torch.Tensor]]:
    """The padded layout in float32 on the CPU."""
    return steps(task, "padded", "float32", torch.device("cpu"), scale)


def check_task(task: str, precision: str, device: torch.device) -> Lines:
    """Steps in a tree, under the kernel that engine.attention=auto takes."""
    scale = SCALES[device.type]
    right = wanted_steps(task, scale)
    off = {}
    for layout in ("padded", "tree"):
        found = steps(task, layout, precision, device, scale)
        off[layout] = {part: relative_error(found[part], right[part]) for part in right}
    # Steps of Adam magnify what is rounded.
    mode = "float32" if precision == "float32" else "autocast"
    yield from compared(off["tree"], off["padded"], mode, floor=10.0)


def check_waiting(task: str, kernel: str, precision: str, device: torch.device) -> Lines:
    """A micro-batch, forward and backward, in which the host never waits for the GPU (the first may)."""
    engine = engine_of(task, precision, device, SCALES[device.type])
    set_layout(engine.model, "tree", kernel, engine.precision)
    made_up, examples = examples_of(task)
    kl = torch.zeros((), device=device) if task == "kto" else None
    reads, denominators = merge([example.reads for example in examples]), made_up.denominators(examples)
    for mode in ("default", "error"):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss, _ = made_up.losses(examples, engine.read("tree", reads), denominators, kl)
            engine.backward(loss, last=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    yield "never", 0.0, 0.0


def check_choice(mode: str, expected: str | None, device: torch.device) -> Lines:
    """What engine.attention=auto takes, and that the model then runs it."""
    model = made("llama-grouped", mode, device, SCALES[device.type])
    weights, autocast = MODES[mode]
    kernel = choose_kernel("auto", device, autocast or weights, head_width(model))
    set_layout(model, "tree", "auto", autocast)
    runs = model.config._attn_implementation
    right = runs == attention_name(kernel) and expected in (None, kernel)
    yield f"auto takes {kernel}, the model runs {runs}", float(not right), 0.0


def check_transfers(device: torch.device) -> Lines:
    """Copies that nobody waits for bring what was sent, though the host lets go of it at once."""
    busy = torch.ones(1024, 1024, device=device)
    arrays = [np.full(1 + 997 * (n % 50), n, dtype=np.int64) for n in range(400)]
    moved = []
    for number, array in enumerate(arrays):
        busy = busy @ busy / 1024 if number % 20 == 0 else busy
        moved.append(to_device(array.copy(), device))
    wrong = sum(not np.array_equal(one.cpu().numpy(), other) for one, other in zip(moved, arrays, strict=True))
    yield "wrong arrays", float(wrong), 0.0


def obstacle(kernel: str, mode: str, device: torch.device) -> str | None:
    """What keeps a kernel from a mode; nothing keeps an emulation."""
    if kernel == "varlen" and device.type == "cpu":
        return None
    weights, autocast = MODES[mode]
    return OBSTACLES[kernel](device, autocast or weights, 64) if kernel in OBSTACLES else None


def emulate() -> None:
    """On a CPU, varlen under an emulation of PyTorch's function, in float32 too."""
    torch.nn.attention.varlen.varlen_attn = emulated.varlen_attn
    rdo.sequences.kernels.varlen.HALF = (*HALF, torch.float32)  # type: ignore[assignment]
