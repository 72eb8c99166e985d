#!/usr/bin/env python3
"""Checks every path of a GPU against float32 on the CPU, then measures how fast they are.

    launch/gpu_check.py [--seconds 520] [--out FOLDER] [--device cuda] [--only TEXT]

One line a check (tests/gpu_checks.py has them): what, its error, how large that may be. All of it is in
FOLDER/gpu_check.json after every line, and the benchmark in FOLDER/bench.json, so that a kill loses nothing. What no
longer fits into the time is left out, and said. Exit status: 1 where a check failed, 2 where there is no such device.
`--device cpu` runs what a CPU can, varlen under an emulation.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests")]
# ruff: noqa: E402

import torch
import transformers
from launch.bench.suite import measure_all
from launch.bench.works import RIVALS, WORKS, make_bench

import gpu_checks as suite
from rdo.runtime.files import write_json
from rdo.sequences.attention import KERNELS, OBSTACLES
from rdo.sequences.readout import LOGITS_BUDGET
from rdo.settings import EngineConfig, ModelConfig

MODELS = ("llama-grouped", "llama", "mistral-window", "gpt2", "gpt-neox", "qwen2", "gemma", "gemma3", "gpt2-by-layer")
TASKS = ("dpo", "rrhf", "kto", "pointwise", "paper")
# Seconds that making the benchmark's models, and one work, may take at the most.
MODELS_SECONDS, WORK_SECONDS = 90.0, 40.0
LARGE = ModelConfig(  # 1.1B parameters, grouped queries
    vocabulary_size=32000, hidden_size=2048, intermediate_size=5632, layers=22, heads=32, key_value_heads=4,
    max_positions=8192,
)  # fmt: skip


def checks(device: torch.device) -> Iterator[tuple[str, Callable[[], suite.Lines] | str]]:
    """Every check of a device by its name, or why it cannot run there."""
    gpu = device.type == "cuda"
    yield "transfers", partial(suite.check_transfers, device)
    for mode in suite.MODES if gpu else ("float32",):
        if gpu:  # any since 2020 runs varlen
            varlen = torch.cuda.get_device_capability(device) >= (8, 0) and mode != "float32"
            yield f"choice {mode}", partial(suite.check_choice, mode, "varlen" if varlen else None, device)
        for name in MODELS:
            yield f"{name} {mode} padded", partial(suite.check_padded, name, mode, device)
        for kernel in KERNELS:
            if why_not := suite.obstacle(kernel, mode, device):
                yield f"{mode} {kernel}", why_not
                continue
            for name in MODELS:
                yield f"{name} {mode} {kernel}", partial(suite.check_model, name, mode, kernel, device)
        for budget in (LOGITS_BUDGET, 20_000, 1_000):
            check = partial(suite.check_model, "llama-grouped", mode, "gathered", device, budget)
            yield f"head {mode} {budget} logits", check
    mode = "autocast" if gpu else "float32"
    for kernel in KERNELS:
        check = partial(suite.check_model, "llama-grouped", mode, kernel, device, recomputing=True)
        yield f"recomputing {mode} {kernel}", suite.obstacle(kernel, mode, device) or check
    for precision in ("float32", "bfloat16") if gpu else ("float32",):
        for task in TASKS:
            yield f"task {task} {precision}", partial(suite.check_task, task, precision, device)
            if gpu:
                yield f"waiting {task} {precision}", partial(suite.check_waiting, task, "auto", precision, device)


class Found:
    """What was found, printed and written as it comes."""

    def __init__(self, out: Path, device: torch.device):
        out.mkdir(parents=True, exist_ok=True)
        self.file, self.lines, self.left_out, self.machine = out / "gpu_check.json", [], {}, described(device)
        print(", ".join(f"{name} {value}" for name, value in self.machine.items()))
        print(f"{'check':<58} {'error':>9} {'at most':>9}", flush=True)

    def run(self, name: str, check: Callable[[], suite.Lines] | str, ends: float = math.inf) -> None:
        """Runs a check if it can be run and time.monotonic() is not past `ends`; what it raises is its failure alone,
        for the checks that follow are worth as much."""
        if time.monotonic() > ends:
            check = "no time"
        if isinstance(check, str):
            self.left_out[name] = check
            print(f"{name:<58} left out: {check}", flush=True)
            return self.write()
        try:
            for part, error, tolerance in check():
                self.add(f"{name}: {part}", error, tolerance)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # so that this check's failure is not the next one's
        except Exception:
            self.add(name, math.nan, 0.0, trace=traceback.format_exc())
            traceback.print_exc()

    def add(self, name: str, error: float, tolerance: float, **more: str) -> None:
        """One line; an error that is no number has failed."""
        ok, shown = error <= tolerance, error if math.isfinite(error) else str(error)
        self.lines.append({"name": name, "error": shown, "tolerance": tolerance, "ok": ok, **more})
        print(f"{name:<58} {error:9.2e} {tolerance:9.2e}  {'ok' if ok else 'FAIL'}", flush=True)
        self.write()

    def write(self) -> None:
        write_json(self.file, {"machine": self.machine, "checks": self.lines, "left_out": self.left_out})


def benchmark(device: torch.device, out: Path, ends: float, model: ModelConfig = LARGE) -> suite.Lines:
    """Every work that can begin before the end, in out/bench.json. TRL takes part if it is installed."""
    engine = EngineConfig(precision="auto", device=device.type, tokens_per_micro_batch=16384)
    against = [name for name in RIVALS if find_spec("trl") or not name.startswith("trl")]
    works = [name for name in WORKS if name != "generation"]  # which needs pyarrow
    chosen = {"against": against, "threads": [torch.get_num_threads()], "rounds": 5, "pairs": 16}
    with make_bench(model, engine, device, **chosen) as bench:
        measure_all(bench, out / "bench.json", works, growth=True, ends=ends)
    yield "measured", 0.0, 0.0


def described(device: torch.device) -> dict[str, str]:
    """What the checks run on."""
    found = {"device": str(device), "torch": torch.__version__, "transformers": transformers.__version__}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        reasons = {kernel: why_not(device, torch.bfloat16, 64) for kernel, why_not in OBSTACLES.items()}
        found |= {kernel: f"no: it {reason}" if reason else "yes" for kernel, reason in reasons.items()}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Checks every GPU path against float32 on the CPU, then measures.")
    parser.add_argument("--seconds", type=float, default=520, help="how long all of it may take")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="where gpu_check.json goes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default="", help="only checks with this in their names, and no benchmark")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here; --device cpu runs what a CPU can")
        return 2
    started = time.monotonic()
    ends = started + options.seconds
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        suite.emulate()
    else:
        torch.set_num_threads(os.cpu_count() or 1)  # what is wanted is computed on the CPU
    found = Found(options.out, device)
    for name, check in checks(device):
        if options.only in name:
            found.run(name, check, ends)
    if device.type == "cuda" and not options.only:
        works = partial(benchmark, device, options.out, ends - WORK_SECONDS)
        found.run("benchmark", works, ends - MODELS_SECONDS - WORK_SECONDS)
    failed = [line["name"] for line in found.lines if not line["ok"]]
    for name in failed:
        print(f"FAIL {name}")
    took = time.monotonic() - started
    print(f"{len(found.lines)} lines, {len(failed)} failed, {len(found.left_out)} left out, {took:.0f} s; {found.file}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
