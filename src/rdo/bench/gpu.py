"""The benchmark of one GPU, without hydra, and within a time: launch/gpu_check.py ends with it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from rdo.bench import trl
from rdo.bench.data import END
from rdo.bench.run import measure_all
from rdo.bench.subjects import make_subjects
from rdo.bench.suite import Setting
from rdo.errors import UserError
from rdo.progress import say
from rdo.schema import BENCH_WORKS, BenchConfig, EngineConfig, ModelConfig

VOCABULARY = 32000
# 1.1B parameters, grouped queries. A small one where there is no GPU, to try all of it.
LARGE = ModelConfig(
    hidden_size=2048, intermediate_size=5632, layers=22, heads=32, key_value_heads=4, max_positions=8192
)
SMALL = ModelConfig(hidden_size=64, intermediate_size=128, layers=2, heads=4, key_value_heads=2, max_positions=8192)
# Seconds that making the models, and one work, may take at the most.
MODELS, WORK = 90.0, 40.0


def run(device: torch.device, seconds: float, out: Path) -> dict[str, Any] | None:
    """Everything of bench.json that fits into the time; it is in out/bench.json as it comes. TRL takes part if it is
    installed. None where there is no time at all."""
    ends, on_gpu = time.monotonic() + seconds, device.type == "cuda"
    if seconds < MODELS + WORK and on_gpu:
        say(f"no benchmark: {max(0.0, seconds):.0f} s are left, and it needs {MODELS + WORK:.0f}")
        return None
    against = ["padded", "unpadded"]
    if on_gpu:
        try:
            trl.imported()
            against = ["trl", "trl_best", *against]
        except UserError as error:
            say(f"without TRL: {error}")
    engine = EngineConfig(precision="auto", device=device.type, tokens_per_micro_batch=16384)
    config = BenchConfig(
        works=[name for name in BENCH_WORKS if name != "generation"],  # which needs pyarrow
        against=against,
        rounds=5 if on_gpu else 1,
        pairs=16 if on_gpu else 1,
        growth=on_gpu,
    )
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = trl.word_tokenizer(VOCABULARY if on_gpu else 500, END)
        subjects = make_subjects(LARGE if on_gpu else SMALL, tokenizer, Path(temporary), device)
        setting = Setting(engine, config, device, subjects.folder, say)
        threads = [torch.get_num_threads()]
        return measure_all(subjects, setting, None, threads, out / "bench.json", ends=ends - WORK)
