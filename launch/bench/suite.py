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
from launch.bench.works import NEW_TOKENS, QUERY, WORKS, Bench, Work, made_records, make_work, one_by_one
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from rdo.runtime.files import write_json
from rdo.sequences.forward import is_decoder_scorer
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
    """Measures the works and writes the file. ends: the time.monotonic() after which no work is begun."""
    found: dict[str, Any] = {"machine": machine(bench), "rows": [], "growth": [], "left_out": []}
    bench.say(HEAD)
    for name in works:
        if time.monotonic() > ends:
            bench.say(f"{name:<11} left out: no time")
            found["left_out"].append(name)
            continue
        started = time.perf_counter()
        found["rows"] += measure_work(make_work(name, bench), bench)
        found["machine"]["seconds"][name] = round(time.perf_counter() - started, 1)
        write_json(file, found)
        gc.collect()  # TRL's trainers refer to themselves in circles
    torch.set_num_threads(bench.threads[-1])
    if growth and time.monotonic() < ends:
        bench.say(f"\n{GROWTH_HEAD}")
        found["growth"] = measure_growth(bench)
    write_json(file, found)
    return found


def contestant(name: str, work: Work, bench: Bench) -> Contestant:
    """Somebody who does a work: ours, padded, unpadded, trl or trl_best."""
    if name.startswith("trl"):
        return trl_contestant(name, work, bench)
    layout = "tree" if name == "ours" else "padded"

    def run() -> torch.Tensor:
        work.model.set_attn_implementation(bench.attention[layout if work.sequences else "padded"])
        with one_by_one() if name == "unpadded" else nullcontext():
            return work.run(layout)

    return Contestant(name, run, work.model)


def measure_work(work: Work, bench: Bench) -> list[dict[str, Any]]:
    """The rows of one work: for each number of threads, one a contestant. A contestant that computes anything else
    than we do gets no ratio, but the reason."""
    ours, passes = contestant("ours", work, bench), dense_passes(work, bench)
    others = [contestant(name, work, bench) for name in WORKS[work.name][2] if name in bench.against]
    torch.set_num_threads(bench.threads[0])
    for one in [ours, *passes.values(), *others]:
        warm_up(one, bench.device)
    tolerance = SAME[bench.precision] if work.sequences else 0.0  # first tokens are the same or not
    same = [other for other in others if differ(ours, other) <= tolerance]
    rows = []
    for count in bench.threads:
        torch.set_num_threads(count)
        take_turns([ours, *passes.values(), *same], bench.rounds, bench.device)
        for other in others:
            row = compared(ours, other, tolerance) | counted(work, ours, passes)
            rows.append({"work": work.name, "threads": count, **row})
            bench.say(line(rows[-1]))
    return rows


def compared(ours: Contestant, other: Contestant, tolerance: float) -> dict[str, Any]:
    """What a row of bench.json says of the two."""
    row: dict[str, Any] = {
        "against": other.name, "time_ratio": None, "seconds_ours": median(ours.seconds), "seconds_other": None,
        "difference": differ(ours, other), "memory_ours": ours.bytes, "memory_other": other.bytes,
    }  # fmt: skip
    if not other.seconds:
        return row | {"refused": f"its numbers differ by {row['difference']:.1e}, more than {tolerance}"}
    each = [theirs / own for own, theirs in zip(ours.seconds, other.seconds, strict=True)]
    row |= {"seconds_other": median(other.seconds), "time_ratio": median(each), "ratios": each}
    return row | ({"memory_ratio": other.bytes / ours.bytes} if ours.bytes and other.bytes else {})


def path_length(sequences: Sequence[TokenIds]) -> int:
    """The length of equal rows whose tokens attend to as many others as those of the tree do on average."""
    return 1 + round(2 * float(PrefixTree(sequences).positions.double().mean()))


def dense_passes(work: Work, bench: Bench) -> dict[str, Contestant]:
    """Dense passes over rows of the path's length, of the mean length, and without gradients."""
    if not work.sequences:
        return {}
    path, mean = path_length(work.sequences), round(sum(map(len, work.sequences)) / len(work.sequences))
    passes = {"path": dense_pass(work, bench, path, work.trained), "mean": dense_pass(work, bench, mean, work.trained)}
    return passes | ({"beforehand": dense_pass(work, bench, path, False)} if work.beforehand else {})


def dense_pass(work: Work, bench: Bench, length: int, trained: bool) -> Contestant:
    """The dense pass over rows of a length."""
    model, unique = work.model, count_unique(work.sequences)
    count = max(1, round(min(unique, bench.engine.tokens_per_micro_batch) / length))
    read = min(length, max(1, round(length * work.reads / unique)))
    ids = torch.randint(2, model.config.vocab_size, (count, length), generator=torch.Generator().manual_seed(0))
    ids, head = ids.to(model.device), head_of(model)

    def run() -> torch.Tensor:
        model.set_attn_implementation(bench.attention["padded"])
        with torch.set_grad_enabled(trained), computing_in(bench.precision, model):
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            outputs = in_full_precision(head(states[:, -read:].flatten(0, 1)))
        loss = outputs.mean() if len(head.weight) == 1 else cross_entropy(outputs, ids[:, -read:].flatten())
        if trained:
            loss.backward()
        return loss.detach()

    return Contestant("dense", run, model, tokens=ids.numel())


def head_of(model: PreTrainedModel) -> torch.nn.Module:
    """What is read off the hidden states: a scorer's scalar head, or a policy's language-model head."""
    return model.score if is_decoder_scorer(model) else model.get_output_embeddings()


def counted(work: Work, ours: Contestant, passes: dict[str, Contestant]) -> dict[str, Any]:
    """What a row of bench.json says of the tokens of a work, of our share of its bound, and of our operations."""
    if not work.sequences:
        return {"tokens_generated": len(work.records) * NEW_TOKENS, "bound_share": None, "gflops": None}
    unique, before = count_unique(work.sequences), count_unique(work.beforehand)

    def share(kind: str) -> float:
        work_of = {kind: unique, "beforehand": before} if before else {kind: unique}
        rounds = zip(ours.seconds, *(passes[name].seconds for name in work_of), strict=True)
        times = [tokens / passes[name].tokens for name, tokens in work_of.items()]
        return median(sum(map(mul, times, dense)) / own for own, *dense in rounds)

    config = work.model.config.get_text_config()
    named = work.model.base_model.named_parameters()
    layers = sum(weight.numel() for name, weight in named if weight.dim() > 1 and "embed" not in name)
    # A token attends to its path: scores and values, two operations each.
    attention = 4.0 * unique * path_length(work.sequences) / 2 * config.hidden_size * config.num_hidden_layers
    once = 2.0 * layers * unique + 2.0 * head_of(work.model).weight.numel() * work.reads + attention
    operations = (3.0 if work.trained else 1.0) * once + 2.0 * layers * before
    every = [sequences for sequences in (work.sequences, work.beforehand) if sequences]
    return {
        "tokens_naive": sum(len(ids) for sequences in every for ids in sequences),
        "tokens_padded": sum(len(sequences) * max(map(len, sequences)) for sequences in every),
        "tokens_unique": unique + before, "bound_share": share("path"), "bound_share_mean_length": share("mean"),
        "gflops": operations / median(ours.seconds) / 1e9,
    }  # fmt: skip


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


def measure_growth(bench: Bench) -> list[dict[str, Any]]:
    """Rows of the growth table: ours alone, all records alike."""
    rows, config = [], bench.policy.config
    for grows, (name, values) in GROWTH.items():
        for value, (count, responses, query) in values.items():
            if query + 2 * QUERY > config.max_position_embeddings:
                continue
            work = make_work(name, bench, made_records(count, responses, config.vocab_size, query=query))
            ours, tokens = contestant("ours", work, bench), count_unique(work.sequences)
            warm_up(ours, bench.device)
            take_turns([ours], 3, bench.device)
            seconds, memory = median(ours.seconds), ours.bytes
            each = f"{seconds:>8.3f} {1e3 * seconds / tokens:>10.3f} {memory / 1e6:>7,.0f}"
            bench.say(f"{grows:<20} {value:>6}  {tokens:>13,} {each}")
            rows.append({"grows": grows, "value": value, "tokens_unique": tokens, "seconds": seconds, "memory": memory})
    return rows


def machine(bench: Bench) -> dict[str, Any]:
    """What the figures were made on, and with; says so."""
    config = bench.policy.config.get_text_config()
    gemm, products = {}, "torch"
    for count in bench.threads:
        torch.set_num_threads(count)
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        gflops, products = gemm_gflops(config.hidden_size, inner, bench.device, bench.precision)
        gemm[str(count)] = round(gflops, 1)
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    device = found[1] if found else platform.processor()
    device = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else device
    size, budget = sum(weight.numel() for weight in bench.policy.parameters()), bench.engine.tokens_per_micro_batch
    date, precision = time.strftime("%Y-%m-%d"), str(bench.precision).removeprefix("torch.")
    trl = metadata.version("trl") if find_spec("trl") else None
    bench.say(
        f"{device}, {date}: {size / 1e6:.0f}M parameters, {precision}, {budget} tokens a micro-batch\n"
        f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl}; products by {products}, "
        f"GFLOP/s of a GEMM by threads: {', '.join(f'{gflops:.0f} on {count}' for count, gflops in gemm.items())}\n"
    )
    return {
        "device": device, "threads": list(bench.threads), "date": date, "torch": torch.__version__,
        "transformers": transformers.__version__, "trl": trl, "precision": precision, "parameters": size,
        "tokens_per_micro_batch": budget, "products": products, "attention": bench.engine.attention,
        "gemm_gflops": gemm, "seconds": {},
    }  # fmt: skip
