"""Every work against everybody who can do it: who computes the same, how long it takes, how much memory, and how close
ours is to its token bound.

The token bound of a work is its unique tokens times the time that a plain dense forward (and backward) pass of the same
model takes per token: rows of one length, nothing padded, the same share of positions read by the head, with the same
matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rdo.bench import trl
from rdo.bench.measure import Contestant, differ, ratios, take_turns, warm_up
from rdo.bench.works import Work, one_by_one
from rdo.engine import precision_of
from rdo.forest import LayoutName, count_unique
from rdo.models import computing_in, is_decoder_scorer, set_layout
from rdo.readout import in_full_precision
from rdo.schema import EngineConfig

# Two sides compute the same if their numbers differ by less, relatively: float32 rounds sums of thousands by 1e-6.
SAME = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}


@dataclass
class Setting:
    """What all measurements share. against: names of contestants. folder: where TRL's copies of the models lie."""

    config: EngineConfig
    device: torch.device
    against: Sequence[str]
    rounds: int
    folder: Path
    say: Callable[[str], None]

    @property
    def precision(self) -> torch.dtype:
        return precision_of(self.config, self.device)


def implementations(model: PreTrainedModel, setting: Setting) -> dict[str, str]:
    """The attention of each layout that the model can run, by name; setting it later costs nothing."""
    config = setting.config
    found = {}
    for layout in ("auto", "flat"):
        chosen = set_layout(model, layout, config.attention, setting.precision)
        found[chosen] = str(model.config._attn_implementation)
    return found


def prepared(work: Work, layout: LayoutName, attention: dict[str, str], alone: bool = False) -> Contestant:
    """A work in a layout, as a contestant."""

    def prepare() -> None:
        work.model.set_attn_implementation(attention[layout])

    def run() -> torch.Tensor:
        if not alone:
            return work.run(layout)
        with one_by_one():
            return work.run(layout)

    return Contestant("unpadded" if alone else "ours" if layout == "forest" else "padded", run, prepare, work.after)


def dense(work: Work, attention: dict[str, str], setting: Setting) -> Contestant:
    """The pass that the token bound is made of, over about as many tokens as a micro-batch of ours has."""
    model = work.model
    length = round(mean(map(len, work.sequences)))
    unique = count_unique(work.sequences)
    budget = setting.config.tokens_per_micro_batch
    count = max(1, round(min(unique, budget) / length))
    read = min(length, max(1, round(length * work.reads / unique)))
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocabulary, (count, length), generator=generator).to(setting.device)
    head = model.score if is_decoder_scorer(model) else model.get_output_embeddings()

    def run() -> torch.Tensor:
        with torch.set_grad_enabled(work.trained), computing_in(setting.precision, model):
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            outputs = in_full_precision(head(states[:, -read:]).flatten(0, 1))
            targets = ids[:, -read:].flatten()
            loss = outputs.mean() if is_decoder_scorer(model) else cross_entropy(outputs, targets)
        if work.trained:
            loss.backward()
        return loss.detach()

    def after() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        return torch.tensor([float(ids.numel())])

    return Contestant("dense", run, lambda: model.set_attn_implementation(attention["flat"]), after)


def opponents(work: Work, attention: dict[str, str], setting: Setting) -> list[Contestant]:
    """Everybody of bench.against who can do this work."""
    found = []
    for name in setting.against:
        if name == "padded":
            found.append(prepared(work, "flat", attention))
        elif name == "unpadded":
            found.append(prepared(work, "flat", attention, alone=True))
        elif work.name in trl.SUPPORTED and not (work.name == "reference" and name == "trl_best"):
            found.append(trl.contestant(name, work, setting.folder, setting.device, setting.precision))
    return found


def measure_work(work: Work, setting: Setting, threads: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of one work: for each number of threads, one a contestant. A contestant that computes anything else
    than we do gets no ratio, but the reason."""
    attention = implementations(work.model, setting)
    ours, bound = prepared(work, "forest", attention), dense(work, attention, setting)
    everybody = [ours, bound, *opponents(work, attention, setting)]
    rows = []
    for number, count in enumerate(threads):
        torch.set_num_threads(count)
        for contestant in everybody:
            contestant.seconds = []
            if number == 0:
                warm_up(contestant, setting.device)
        same = [c for c in everybody if c in (ours, bound) or differ(ours, c) <= SAME[setting.precision]]
        take_turns(same, setting.rounds, setting.device)
        for other in everybody[2:]:
            row = describe(work, ours, bound, other, setting) | {"threads": count}
            setting.say(line(row))
            rows.append(row)
    return rows


def describe(
    work: Work, ours: Contestant, bound: Contestant, other: Contestant, setting: Setting
) -> dict[str, Any]:
    """One row of bench.json."""
    assert bound.numbers is not None
    unique = count_unique(work.sequences)
    seconds, dense_seconds = median(ours.seconds), median(bound.seconds)
    row: dict[str, Any] = {
        "work": work.name,
        "against": other.name,
        "seconds_ours": seconds,
        "tokens_naive": sum(map(len, work.sequences)),
        "tokens_padded": len(work.sequences) * max(map(len, work.sequences)),
        "tokens_unique": unique,
        "bound_share": median(
            unique * each / float(bound.numbers[-1]) / own
            for own, each in zip(ours.seconds, bound.seconds, strict=True)
        ),
        "dense_seconds_per_token": dense_seconds / float(bound.numbers[-1]),
        "gflops": flops(work) / seconds / 1e9,
        "difference": differ(ours, other),
        "memory_ours": ours.bytes,
        "memory_other": other.bytes,
    }
    if not other.seconds:
        tolerance = SAME[setting.precision]
        return row | {"time_ratio": None, "refused": f"numbers differ by {row['difference']:.1e}, above {tolerance}"}
    each = ratios(ours, other)
    row |= {"seconds_other": median(other.seconds), "time_ratio": median(each), "ratios": each}
    if ours.bytes and other.bytes:
        row["memory_ratio"] = other.bytes / ours.bytes
    return row


def flops(work: Work) -> float:
    """Floating-point operations of a work over its unique tokens: matrix products of layers, attention and head."""
    model = work.model
    config = model.config.get_text_config()
    layers = sum(p.numel() for name, p in model.base_model.named_parameters() if p.dim() > 1 and "embed" not in name)
    head = model.score if is_decoder_scorer(model) else model.get_output_embeddings()
    # A token attends to its path, half the sequence on average: scores and values, two operations each.
    pairs = count_unique(work.sequences) * mean(map(len, work.sequences)) / 2
    attention = 4.0 * pairs * config.hidden_size * config.num_hidden_layers
    once = 2.0 * layers * count_unique(work.sequences) + 2.0 * head.weight.numel() * work.reads + attention
    return (3.0 if work.trained else 1.0) * once


def line(row: dict[str, Any]) -> str:
    """A row as the terminal shows it."""
    where = f"{row['work']:<11} {row['against']:<9} {row['threads']:>2}"
    if row["time_ratio"] is None:
        return f"{where}  no ratio: {row['refused']}"
    spread = f"({min(row['ratios']):.2f}-{max(row['ratios']):.2f})"
    memory = f"{row['memory_ours'] / 1e6:,.0f} / {row['memory_other'] / 1e6:,.0f}" if row.get("memory_ratio") else "-"
    return (
        f"{where}  {row['seconds_ours']:8.3f} {row['seconds_other']:8.3f}  {row['time_ratio']:6.2f} {spread:<13}"
        f"{row['bound_share']:7.1%} {row['gflops']:8.0f}  {memory:>15}"
    )


HEAD = (
    f"{'work':<11} {'against':<9} {'th':>2}  {'ours s':>8} {'other s':>8}  {'ratio':>6} {'(spread)':<13}{'bound':>7} "
    f"{'GFLOP/s':>8}  {'MB ours / other':>15}"
)


def check_finite(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether every ratio is a number."""
    return all(row["time_ratio"] is not None and math.isfinite(row["time_ratio"]) for row in rows)
