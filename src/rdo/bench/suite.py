"""Every work against everybody who can do it: who computes the same, how long it takes, how much memory, and how close
ours is to its token bound (bound.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from rdo.bench import trl
from rdo.bench.bound import Bound
from rdo.bench.measure import Contestant, differ, ratios, take_turns, untimed, warm_up
from rdo.bench.works import Work, head_of, one_by_one
from rdo.engine import precision_of
from rdo.forest import LayoutName, TokenIds
from rdo.models import set_layout
from rdo.schema import BenchConfig, EngineConfig

# Two sides compute the same if their numbers differ by less, relatively: float32 rounds sums of thousands by 1e-6.
SAME = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}


@dataclass
class Setting:
    """What all measurements share. folder: where TRL's copies of the models lie."""

    config: EngineConfig
    bench: BenchConfig
    device: torch.device
    folder: Path
    say: Callable[[str], None]

    @property
    def precision(self) -> torch.dtype:
        return precision_of(self.config, self.device)


def implementations(model: PreTrainedModel, setting: Setting) -> dict[str, str]:
    """The attention of each layout that the model can run, by name; setting it later costs nothing."""
    config = setting.config
    found: dict[str, str] = {}
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


def opponents(work: Work, attention: dict[str, str], setting: Setting) -> list[Contestant]:
    """Everybody of bench.against who can do this work."""
    found = []
    for name in setting.bench.against:
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
    ours = prepared(work, "forest", attention)
    bound = Bound(work, attention["flat"], setting.precision, setting.config.tokens_per_micro_batch)
    others = opponents(work, attention, setting)
    torch.set_num_threads(threads[0])
    for contestant in [ours, *bound.contestants, *others]:
        warm_up(contestant, setting.device)
    same = [other for other in others if differ(ours, other) <= SAME[setting.precision]]
    rows = []
    for count in threads:
        torch.set_num_threads(count)
        untimed(ours)  # measuring memory gave it back to the system, and the first to take it pays for that
        take_turns([ours, *bound.contestants, *same], setting.bench.rounds, setting.device)
        for other in others:
            row = describe(work, ours, bound, other, setting) | {"threads": count}
            setting.say(line(row))
            rows.append(row)
    return rows


def describe(work: Work, ours: Contestant, bound: Bound, other: Contestant, setting: Setting) -> dict[str, Any]:
    """One row of bench.json."""
    seconds = median(ours.seconds)
    row: dict[str, Any] = {
        "work": work.name,
        "against": other.name,
        "time_ratio": None,
        "seconds_ours": seconds,
        "seconds_other": None,
        "tokens_naive": sum(map(len, [*work.sequences, *work.beforehand])),
        "tokens_padded": padded(work.sequences) + padded(work.beforehand),
        "tokens_unique": bound.unique + bound.beforehand,
        "bound_share": bound.share(ours),
        "bound_share_mean_length": bound.share(ours, "mean"),
        "gflops": flops(work, bound) / seconds / 1e9,
        "difference": differ(ours, other),
        "memory_ours": ours.bytes,
        "memory_other": other.bytes,
    }
    if not other.seconds:
        return row | {"refused": f"its numbers differ by {row['difference']:.1e}, more than {SAME[setting.precision]}"}
    each = ratios(ours, other)
    row |= {"seconds_other": median(other.seconds), "time_ratio": median(each), "ratios": each}
    if ours.bytes and other.bytes:
        row["memory_ratio"] = other.bytes / ours.bytes
    return row


def padded(sequences: Sequence[TokenIds]) -> int:
    """Tokens of all sequences in one padded batch."""
    return len(sequences) * max(map(len, sequences), default=0)


def flops(work: Work, bound: Bound) -> float:
    """Floating-point operations of a work over its unique tokens: matrix products of layers, attention and head."""
    model = work.model
    config = model.config.get_text_config()
    layers = sum(p.numel() for name, p in model.base_model.named_parameters() if p.dim() > 1 and "embed" not in name)
    # A token attends to its path: scores and values, two operations each.
    pairs = bound.unique * bound.path / 2
    attention = 4.0 * pairs * config.hidden_size * config.num_hidden_layers
    once = 2.0 * layers * bound.unique + 2.0 * head_of(model).weight.numel() * work.reads + attention
    return (3.0 if work.trained else 1.0) * once + 2.0 * layers * bound.beforehand


def line(row: dict[str, Any]) -> str:
    """A row as the terminal shows it."""
    where = f"{row['work']:<11} {row['against']:<9} {row['threads']:>2}"
    if row["time_ratio"] is None:
        return f"{where}  no ratio: {row['refused']}"
    spread = f"({min(row['ratios']):.2f}-{max(row['ratios']):.2f})"
    memory = f"{row['memory_ours'] / 1e6:,.0f} / {row['memory_other'] / 1e6:,.0f}" if row.get("memory_ratio") else "-"
    bound = "-" if row["bound_share"] is None else f"{row['bound_share']:.1%}"
    gflops = "-" if row["gflops"] is None else f"{row['gflops']:.0f}"
    return (
        f"{where}  {row['seconds_ours']:8.3f} {row['seconds_other']:8.3f}  {row['time_ratio']:6.2f} {spread:<13}"
        f"{bound:>7} {gflops:>8}  {memory:>15}"
    )


HEAD = (
    f"{'work':<11} {'against':<9} {'th':>2}  {'ours s':>8} {'other s':>8}  {'ratio':>6} {'(spread)':<13}{'bound':>7} "
    f"{'GFLOP/s':>8}  {'MB ours / other':>15}"
)
