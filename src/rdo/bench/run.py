"""The whole benchmark: the works in turn, then growth; everything measured is in bench.json after each of them."""

from __future__ import annotations

import gc
import math
import platform
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from rdo import processor
from rdo.bench import suite
from rdo.bench.data import made_records, with_responses
from rdo.bench.growth import HEAD as GROWTH_HEAD
from rdo.bench.growth import measure_growth
from rdo.bench.measure import differ, gemm_gflops, ratios, take_turns, warm_up
from rdo.bench.subjects import Subjects
from rdo.bench.suite import Setting
from rdo.bench.works import Work, alignment_work, reference_work, scorer_work, scoring_work
from rdo.data.encoding import EncodedRecord
from rdo.files import write_json
from rdo.schema import BENCH_WORKS

# Of bench.pairs, how many records a work takes: those that cost more take fewer.
SHARE = {
    "kto": 1 / 4, "rrhf": 1 / 4, "rm": 1 / 4, "difference": 3 / 8, "score15": 1 / 8, "score30": 1 / 8,
    "reference": 1 / 2,
}  # fmt: skip


def make_work(name: str, subjects: Subjects, records: list[EncodedRecord], setting: Setting) -> Work:
    """One work by its name."""
    config, tokenizer = setting.config, subjects.tokenizer
    if name in ("dpo", "kto", "rrhf"):
        return alignment_work(name, subjects.policy, subjects.reference, records, config)
    if name in ("rm", "difference"):
        return scorer_work(name, subjects.reward, records, config, tokenizer)
    if name == "reference":
        return reference_work(subjects.reference, records, config)
    return scoring_work(name, subjects.reward, records, config, tokenizer)


def records_of(name: str, pairs: int, given: Sequence[EncodedRecord] | None, vocabulary: int) -> list[EncodedRecord]:
    """The records of a work: made up, or of a data set; six responses where the work compares six."""
    count = max(1, round(pairs * SHARE.get(name, 1)))
    six = name in ("rrhf", "score15", "score30")
    if name == "kto":
        count = max(2, count)  # whose estimate needs another's responses
    if given is None:
        return made_records(count, 6 if six else 2, vocabulary, seed=BENCH_WORKS.index(name))
    return with_responses(given, 6 if six else 2)[:count]


def measure_all(
    subjects: Subjects,
    setting: Setting,
    given: Sequence[EncodedRecord] | None,
    threads: Sequence[int],
    file: Path,
    more: Callable[[], dict[str, Any]] = dict,
    ends: float = math.inf,
) -> dict[str, Any]:
    """Measures what the setting names and writes it to the file. more: what else is measured, last. ends: the
    time.monotonic() after which nothing is begun that is not said to be left out."""
    found: dict[str, Any] = {"machine": machine(setting, subjects, threads), "rows": [], "growth": [], "left_out": []}
    setting.say(f"{introduction(found['machine'])}\n\n{suite.HEAD}")
    for name in setting.bench.works:
        if time.monotonic() > ends:
            setting.say(f"{name:<11} left out: no time")
            found["left_out"].append(name)
            continue
        records = records_of(name, setting.bench.pairs, given, subjects.policy.config.vocab_size)
        started = time.perf_counter()
        if name == "generation":
            found["rows"] += measure_generation(subjects, records, setting, threads)
        else:
            found["rows"] += suite.measure_work(make_work(name, subjects, records, setting), setting, threads)
        found["machine"]["seconds"][name] = round(time.perf_counter() - started, 1)
        write_json(file, found)
        gc.collect()  # TRL's trainers refer to themselves in circles
    torch.set_num_threads(threads[-1])
    if setting.bench.growth and time.monotonic() < ends:
        setting.say(f"\n{GROWTH_HEAD}")
        found["growth"] = measure_growth(subjects.policy, subjects.reference, setting)
        write_json(file, found)
    found |= more()
    write_json(file, found)
    return found


def measure_generation(
    subjects: Subjects, records: Sequence[EncodedRecord], setting: Setting, threads: Sequence[int]
) -> list[dict[str, Any]]:
    """The row of generation, for each number of threads. It reads on and on, so that it has no token bound."""
    from rdo.bench.generating import NEW_TOKENS, generation

    ours, other = generation(subjects.policy, subjects.tokenizer, records)
    for contestant in (ours, other):
        warm_up(contestant, setting.device)
    rows = []
    for count in threads:
        torch.set_num_threads(count)
        take_turns([ours, other], setting.bench.rounds, setting.device)
        each, same = ratios(ours, other), differ(ours, other) == 0
        row = {
            "work": "generation",
            "against": other.name,
            "threads": count,
            "time_ratio": median(each) if same else None,
            "ratios": each,
            "seconds_ours": median(ours.seconds),
            "seconds_other": median(other.seconds),
            "tokens_generated": len(records) * NEW_TOKENS,
            "refused": None if same else "the first tokens differ",
            "bound_share": None,
            "gflops": None,
        }
        setting.say(suite.line(row))
        rows.append(row)
    return rows


def machine(setting: Setting, subjects: Subjects, threads: Sequence[int]) -> dict[str, Any]:
    """What the figures were made on, and with."""
    config = subjects.policy.config.get_text_config()
    gemm = {}
    for count in threads:
        torch.set_num_threads(count)
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        gemm[str(count)] = round(gemm_gflops(config.hidden_size, inner, setting.device, setting.precision), 1)
    on_gpu = setting.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(setting.device) if on_gpu else cpu_name(),
        "threads": list(threads),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": version("trl"),
        "precision": str(setting.precision).removeprefix("torch."),
        "parameters": sum(weight.numel() for weight in subjects.policy.parameters()),
        "tokens_per_micro_batch": setting.config.tokens_per_micro_batch,
        "products": "torch" if on_gpu else processor.chosen,
        "attention": setting.config.attention,
        "gemm_gflops": gemm,
        "seconds": {},
    }


def introduction(machine: dict[str, Any]) -> str:
    """The machine as the terminal shows it."""
    gemm = ", ".join(f"{gflops:.0f} on {count}" for count, gflops in machine["gemm_gflops"].items())
    size, budget = machine["parameters"] / 1e6, machine["tokens_per_micro_batch"]
    return (
        f"{machine['device']}, {machine['date']}: {size:.0f}M parameters, {machine['precision']}, {budget} tokens a "
        f"micro-batch\ntorch {machine['torch']}, transformers {machine['transformers']}, TRL {machine['trl']}; "
        f"products by {machine['products']}, GFLOP/s of a GEMM by threads: {gemm}"
    )


def version(package: str) -> str | None:
    """A package's version, or None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
