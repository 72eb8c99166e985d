#!/usr/bin/env python3
"""Checks every path of a GPU against float32 on the CPU, then measures how fast they are.

    launch/gpu_check.py [--seconds 520] [--out FOLDER] [--device cuda] [--only TEXT]

One line a check (tests/gpu_checks.py has them): what, its error, how large that may be. All of it is in
FOLDER/gpu_check.json after every line, so that a kill loses nothing. What no longer fits into the time is left out, and
said. Exit status: 1 where a check failed, 2 where there is no such device. `--device cpu` runs what a CPU can, varlen
under an emulation.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests")]
# ruff: noqa: E402

import torch
import transformers
from launch.bench.suite import measure_all
from launch.bench.works import RIVALS, WORKS, make_bench

import gpu_checks as suite
from rdo.sequences.attention import KERNELS, OBSTACLES
from rdo.sequences.readout import LOGITS_BUDGET
from rdo.settings import EngineConfig, ModelConfig

MODELS = ("llama-grouped", "llama", "mistral-window", "gpt2", "gpt-neox", "qwen2", "gemma", "gemma3", "gpt2-by-layer")
TASKS = ("dpo", "rrhf", "kto", "pointwise", "paper")
CHECK_SHARE = 0.6  # of the time, that the checks may take; what they leave is the benchmark's
USUAL = 6.0  # seconds that must be left for a check to begin
# Seconds that making the benchmark's models, and one work, may take at the most.
MODELS_SECONDS, WORK_SECONDS = 90.0, 40.0
LARGE = ModelConfig(  # 1.1B parameters, grouped queries
    vocabulary_size=32000, hidden_size=2048, intermediate_size=5632, layers=22, heads=32, key_value_heads=4,
    max_positions=8192,
)  # fmt: skip


class Checks:
    """What was checked, printed and written as it goes."""

    def __init__(self, out: Path, ends: float, only: str, machine: dict[str, Any]):
        """ends: the time.monotonic() at which checks must be done. only: what must be in a check's name."""
        self.file, self.ends, self.only = out / "gpu_check.json", ends, only
        self.found: dict[str, Any] = {"machine": machine, "checks": [], "left_out": {}, "benchmark": None}
        out.mkdir(parents=True, exist_ok=True)
        self.write()

    @property
    def failed(self) -> list[str]:
        return [row["name"] for row in self.found["checks"] if not row["ok"]]

    def run(self, name: str, check: Callable[[], suite.Lines], seconds: float = USUAL) -> None:
        """Runs a check if there are so many seconds left; whatever it raises is its failure alone."""
        if self.only not in name:
            return
        if time.monotonic() + seconds > self.ends:
            return self.leave_out(name, "no time")
        started = time.monotonic()
        try:
            for part, error, tolerance in check():
                self.record(f"{name}: {part}", error, tolerance, time.monotonic() - started)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # so that this check's failure is not the next one's
        except Exception as error:  # the checks that follow are worth as much
            self.record(name, math.nan, 0.0, time.monotonic() - started, traceback.format_exc())
            print(f"    {type(error).__name__}: {str(error).strip()[:2000]}", flush=True)

    def record(self, name: str, error: float, tolerance: float, seconds: float, trace: str | None = None) -> None:
        """One line; an error that is no number has failed."""
        ok = error <= tolerance
        row = {"name": name, "error": error if math.isfinite(error) else str(error), "tolerance": tolerance, "ok": ok}
        self.found["checks"].append({**row, "seconds": round(seconds, 2), **({"trace": trace} if trace else {})})
        print(f"{name:<58} {error:9.2e} {tolerance:9.2e}  {'ok' if ok else 'FAIL'}", flush=True)
        self.write()

    def leave_out(self, name: str, reason: str) -> None:
        """Says what is not checked."""
        if self.only in name:
            self.found["left_out"][name] = reason
            print(f"{name:<58} left out: {reason}", flush=True)
            self.write()

    def write(self) -> None:
        """The file is whole at any moment."""
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.found, indent=1))
        part.replace(self.file)


def check_all(checks: Checks, device: torch.device) -> None:
    """Every check that the device can run."""
    gpu = device.type == "cuda"
    modes = tuple(suite.MODES) if gpu else ("float32",)
    checks.run("transfers", partial(suite.check_transfers, device))
    if gpu:
        check_choices(checks, device)
    for mode in modes:
        for name in MODELS:
            checks.run(f"{name} {mode} padded", partial(suite.check_padded, name, mode, device))
    for mode in modes:
        for kernel in KERNELS:
            check_kernel(checks, mode, kernel, MODELS, device)
    for mode in modes:
        for budget in (LOGITS_BUDGET, 20_000, 1_000):
            check = partial(suite.check_model, "llama-grouped", mode, "gathered", device, budget)
            checks.run(f"head {mode} {budget} logits", check)
    for precision in ("float32", "bfloat16") if gpu else ("float32",):
        for task in TASKS:
            checks.run(f"task {task} {precision}", partial(suite.check_task, task, precision, device))
    for kernel in KERNELS:
        check_recomputing(checks, "autocast" if gpu else "float32", kernel, device)
    if gpu:
        check_waiting(checks, device)


def check_kernel(checks: Checks, mode: str, kernel: str, models: Sequence[str], device: torch.device) -> None:
    """Models in a tree under a kernel, where the device has it."""
    why_not = suite.obstacle(kernel, mode, device)
    if why_not is not None:
        return checks.leave_out(f"{mode} {kernel}", why_not)
    for name in models:
        checks.run(f"{name} {mode} {kernel}", partial(suite.check_model, name, mode, kernel, device))


def check_recomputing(checks: Checks, mode: str, kernel: str, device: torch.device) -> None:
    """Gradient checkpointing under a kernel, where the device has it."""
    if suite.obstacle(kernel, mode, device) is None:
        check = partial(suite.check_model, "llama-grouped", mode, kernel, device, recomputing=True)
        checks.run(f"recomputing {mode} {kernel}", check)


def check_choices(checks: Checks, device: torch.device) -> None:
    """What engine.attention=auto takes: any GPU since 2020 runs varlen."""
    recent = torch.cuda.get_device_capability(device) >= (8, 0)
    for mode in suite.MODES:
        expected = "varlen" if recent and mode != "float32" else None
        checks.run(f"choice {mode}", partial(suite.check_choice, mode, expected, device))


def check_waiting(checks: Checks, device: torch.device) -> None:
    """What only a GPU can get wrong."""
    for precision in ("float32", "bfloat16"):
        for task in TASKS:
            check = partial(suite.check_waiting, task, "auto", precision, device)
            checks.run(f"waiting {task} {precision} auto", check)


def benchmark(device: torch.device, seconds: float, out: Path, model: ModelConfig = LARGE) -> dict[str, Any] | None:
    """Everything of bench.json that fits into the time; it is in out/bench.json as it comes. TRL takes part if it is
    installed. None where there is no time at all."""
    ends = time.monotonic() + seconds - WORK_SECONDS
    if seconds < MODELS_SECONDS + WORK_SECONDS:
        print(f"no benchmark: {seconds:.0f} s are left, and it needs {MODELS_SECONDS + WORK_SECONDS:.0f}", flush=True)
        return None
    engine = EngineConfig(precision="auto", device=device.type, tokens_per_micro_batch=16384)
    against = [name for name in RIVALS if find_spec("trl") or not name.startswith("trl")]
    chosen = {"against": against, "threads": [torch.get_num_threads()], "rounds": 5, "pairs": 16}
    with make_bench(model, engine, device, say=partial(print, flush=True), **chosen) as bench:
        works = [name for name in WORKS if name != "generation"]  # which needs pyarrow
        return measure_all(bench, out / "bench.json", works, growth=True, ends=ends)


def described(device: torch.device) -> dict[str, str]:
    """What the checks ran on."""
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
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        suite.emulate()
    else:
        torch.set_num_threads(os.cpu_count() or 1)  # what is wanted is computed on the CPU
    share = CHECK_SHARE if device.type == "cuda" and not options.only else 1.0
    checks = Checks(options.out, started + share * options.seconds, options.only, described(device))
    print(", ".join(f"{name} {value}" for name, value in checks.found["machine"].items()))
    print(f"{'check':<58} {'error':>9} {'at most':>9}", flush=True)
    check_all(checks, device)
    if device.type == "cuda" and not options.only:
        try:
            checks.found["benchmark"] = benchmark(device, started + options.seconds - time.monotonic(), options.out)
        except Exception:  # what was checked stands
            checks.record("benchmark", math.nan, 0.0, 0.0, traceback.format_exc())
            traceback.print_exc()
        checks.write()
    lines, left_out, took = len(checks.found["checks"]), len(checks.found["left_out"]), time.monotonic() - started
    for name in checks.failed:
        print(f"FAIL {name}")
    print(f"{lines} lines, {len(checks.failed)} failed, {left_out} left out, {took:.0f} s; {checks.file}")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
