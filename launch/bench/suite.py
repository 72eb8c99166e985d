"""Every work against everybody who can do it: who computes the same, how long it takes, how much memory, and how close
ours is to its token bound; then how time and memory grow. All of it is in bench.json after each work.

The bound of a work is its unique tokens times what a token costs a plain dense pass of the same model: transformers'
own forward (and backward) pass over rows of one length, nothing padded, nothing shared, with the same matrix products,
a head that is read at the same share of the positions, and about as many tokens as a micro-batch of ours has. The rows
are so long that a token attends to as many others as ours do on average: attention costs by the path, and of uneven
sequences most tokens are in the long ones.
"""

from __future__ import annotations

import gc
import math
import platform
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import metadata
from importlib.util import find_spec
from operator import mul
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from launch.bench.measure import Contestant, differ, gemm_gflops, take_turns, warm_up
from launch.bench.theirs import trl_contestant
from launch.bench.works import QUERY, WORKS, Bench, Pass, Work, made_records, make_work, one_by_one
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from rdo.runtime.files import write_json
from rdo.sequences import preparation
from rdo.sequences.forward import decoder_head
from rdo.sequences.layout import PrefixTree, TokenIds, count_unique
from rdo.sequences.preparation import computing_in
from rdo.sequences.readout import in_full_precision

# Two sides compute the same if their numbers differ by less, relatively: float32 rounds sums of thousands by 1e-6.
SAME = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}
# What grows: the work, and records, responses and query tokens of a step for each value.
GROWTH: dict[str, tuple[str, dict[int, tuple[int, int, int]]]] = {
    "records per step": ("dpo", {n: (n, 2, QUERY) for n in (1, 2, 4, 8, 16)}),
    "responses per query": ("rrhf", {n: (1, n, QUERY) for n in (2, 4, 8, 16)}),
    "query length": ("dpo", {n: (1, 2, n) for n in (64, 256, 1024, 4096)}),
}
HEAD = (
    f"{'work':<11} {'against':<9} {'th':>2}  {'ours s':>8} {'other s':>8}  {'ratio':>6} {'(spread)':<13}{'bound':>7} "
    f"{'GFLOP/s':>8}  {'MB ours / other':>15}"
)
GROWTH_HEAD = f"{'grows':<20} {'':>6}  {'unique tokens':>13} {'seconds':>8} {'ms a token':>10} {'MB':>7}"


def measure_all(bench: Bench, file: Path, works: Sequence[str], growth: bool, ends: float = math.inf) -> dict[str, Any]:
    """Measures the works and writes the file. ends: the time.monotonic() after which nothing is begun."""
    found: dict[str, Any] = {"machine": machine(bench), "rows": [], "growth": []}
    print(HEAD)
    for name in works:
        if time.monotonic() > ends:
            print(f"{name:<11} left out: no time")
            continue
        found["rows"] += measure_work(make_work(name, bench), bench)
        write_json(file, found)
        gc.collect()  # TRL's trainers refer to themselves in circles
    if growth and time.monotonic() < ends:
        found["growth"] = measure_growth(bench)
        write_json(file, found)
    return found


def contestant(name: str, work: Work, bench: Bench) -> Contestant:
    """Somebody who does a work: ours, padded, unpadded, trl or trl_best."""
    if name.startswith("trl"):
        return trl_contestant(name, work, bench)
    layout = "tree" if name == "ours" else "padded"

    def run() -> torch.Tensor:
        work.model.set_attn_implementation(bench.attention[layout])
        with one_by_one() if name == "unpadded" else nullcontext():
            return work.run(layout)

    return Contestant(name, run, work.model)


def measure_work(work: Work, bench: Bench) -> list[dict[str, Any]]:
    """The rows of one work: for each number of threads, one a contestant. A contestant that computes anything else
    than we do gets no ratio, but the reason."""
    ours = contestant("ours", work, bench)
    others = [contestant(name, work, bench) for name in WORKS[work.name][2] if name in bench.against]
    dense = [dense_pass(one, work.model, bench) for one in work.passes]
    torch.set_num_threads(bench.threads[0])
    for one in [ours, *dense, *others]:
        warm_up(one, bench.device)
    tolerance = SAME[bench.precision] if work.passes else 0.0  # first tokens are the same or not
    same = [other for other in others if differ(ours, other) <= tolerance]
    rows = []
    for count in bench.threads:
        torch.set_num_threads(count)
        take_turns([ours, *dense, *same], bench.rounds, bench.device)
        for other in others:
            row = {"work": work.name, "against": other.name, "threads": count, "difference": differ(ours, other)}
            row |= compared(ours, other) if other in same else {"refused": f"more than {tolerance}"}
            rows.append(row | counted(work, ours, dense))
            print(line(rows[-1]))
    return rows


def compared(ours: Contestant, other: Contestant) -> dict[str, Any]:
    """What a row of bench.json says of two who compute the same."""
    ratios = [theirs / own for own, theirs in zip(ours.seconds, other.seconds, strict=True)]
    return {
        "time_ratio": median(ratios), "ratios": ratios, "seconds_ours": median(ours.seconds),
        "seconds_other": median(other.seconds), "memory_ours": ours.bytes, "memory_other": other.bytes,
    }  # fmt: skip


def path_length(sequences: Sequence[TokenIds]) -> int:
    """The length of equal rows whose tokens attend to as many others as those of the tree do on average."""
    return 1 + round(2 * float(PrefixTree(sequences).positions.double().mean()))


def dense_pass(one: Pass, model: PreTrainedModel, bench: Bench) -> Contestant:
    """What a pass would be without anything to share, which its bound is made of."""
    length, unique = path_length(one.sequences), count_unique(one.sequences)
    rows = max(1, round(min(unique, bench.engine.tokens_per_micro_batch) / length))
    read, head = min(length, max(1, round(length * one.reads / unique))), head_of(model)
    ids = torch.randint(2, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)

    def run() -> torch.Tensor:
        model.set_attn_implementation(bench.attention["padded"])
        with torch.set_grad_enabled(one.trained), computing_in(bench.precision, model):
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            outputs = in_full_precision(head(states[:, -read:].flatten(0, 1)))
        loss = outputs.mean() if len(head.weight) == 1 else cross_entropy(outputs, ids[:, -read:].flatten())
        if one.trained:
            loss.backward()
        return loss.detach()

    return Contestant("dense", run, model, tokens=ids.numel())


def head_of(model: PreTrainedModel) -> torch.nn.Module:
    """What is read off the hidden states: a scorer's scalar head, or a policy's language-model head."""
    return decoder_head(model) or model.get_output_embeddings()


def counted(work: Work, ours: Contestant, dense: Sequence[Contestant]) -> dict[str, Any]:
    """What a row of bench.json says of the tokens of a work, of our share of its bound, and of our operations."""
    if not work.passes:
        return {}
    config = work.model.config.get_text_config()
    named = work.model.base_model.named_parameters()
    layers = sum(weight.numel() for name, weight in named if weight.dim() > 1 and "embed" not in name)
    unique = [count_unique(one.sequences) for one in work.passes]
    operations = 0.0  # two a weight that a token meets
    for one, tokens in zip(work.passes, unique, strict=True):
        # A token attends to half of a row: scores and values, two operations each.
        attention = 4.0 * tokens * path_length(one.sequences) / 2 * config.hidden_size * config.num_hidden_layers
        forward = 2.0 * layers * tokens + 2.0 * head_of(work.model).weight.numel() * one.reads + attention
        operations += (3.0 if one.trained else 1.0) * forward
    weights = [tokens / other.tokens for tokens, other in zip(unique, dense, strict=True)]
    bounds = [sum(map(mul, weights, seconds)) for seconds in zip(*(other.seconds for other in dense), strict=True)]
    return {
        "tokens_naive": sum(len(ids) for one in work.passes for ids in one.sequences),
        "tokens_padded": sum(len(one.sequences) * max(map(len, one.sequences)) for one in work.passes),
        "tokens_unique": sum(unique), "gflops": operations / median(ours.seconds) / 1e9,
        "bound_share": median(bound / own for bound, own in zip(bounds, ours.seconds, strict=True)),
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row as the terminal shows it."""
    where = f"{row['work']:<11} {row['against']:<9} {row['threads']:>2}"
    if "refused" in row:
        return f"{where}  no ratio: its numbers differ by {row['difference']:.1e}, {row['refused']}"
    spread = f"({min(row['ratios']):.2f}-{max(row['ratios']):.2f})"
    bound = f"{row['bound_share']:>7.1%} {row['gflops']:>8.0f}" if "bound_share" in row else f"{'-':>7} {'-':>8}"
    memory = f"{row['memory_ours'] / 1e6:,.0f} / {row['memory_other'] / 1e6:,.0f}"
    seconds = f"{row['seconds_ours']:8.3f} {row['seconds_other']:8.3f}"
    return f"{where}  {seconds}  {row['time_ratio']:6.2f} {spread:<13}{bound}  {memory:>15}"


def measure_growth(bench: Bench) -> list[dict[str, Any]]:
    """Rows of the growth table: ours alone, on all threads, all records alike."""
    torch.set_num_threads(bench.threads[-1])
    print(f"\n{GROWTH_HEAD}")
    rows, config = [], bench.policy.config
    for grows, (name, values) in GROWTH.items():
        for value, (count, responses, query) in values.items():
            if query + 2 * QUERY > config.max_position_embeddings:
                continue
            work = make_work(name, bench, made_records(count, responses, config.vocab_size, query=query))
            ours, tokens = contestant("ours", work, bench), count_unique(work.passes[0].sequences)
            warm_up(ours, bench.device)
            take_turns([ours], 3, bench.device)
            seconds, memory = median(ours.seconds), ours.bytes
            each = f"{seconds:>8.3f} {1e3 * seconds / tokens:>10.3f} {memory / 1e6:>7,.0f}"
            print(f"{grows:<20} {value:>6}  {tokens:>13,} {each}")
            rows.append({"grows": grows, "value": value, "tokens_unique": tokens, "seconds": seconds, "memory": memory})
    return rows


def machine(bench: Bench) -> dict[str, Any]:
    """What the figures were made on, and with; says so."""
    config = bench.policy.config.get_text_config()
    inner, gemm = getattr(config, "intermediate_size", None) or 4 * config.hidden_size, {}
    for count in bench.threads:
        torch.set_num_threads(count)
        gemm[count] = round(gemm_gflops(config.hidden_size, inner, bench.device, bench.precision))
    named = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    found = {
        "device": named[1] if named else platform.machine(), "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__, "transformers": transformers.__version__,
        "TRL": metadata.version("trl") if find_spec("trl") else "none",
        "parameters": sum(weight.numel() for weight in bench.policy.parameters()),
        "precision": str(bench.precision), "tokens a micro-batch": bench.engine.tokens_per_micro_batch,
        "oneDNN's products": preparation.onednn_pays(), "GFLOP/s of a GEMM by threads": gemm,
    }  # fmt: skip
    if bench.device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(bench.device)
    print(*(f"{name}: {value}" for name, value in found.items()), "", sep="\n")
    return found
