"""How fast every computation is, against TRL, padding, and no sharing (docs/benchmarks.md). Prints its tables as it
goes, and leaves every number in bench.json in --folder."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
# ruff: noqa: E402

import torch
from launch.bench.epoch import measure_epoch
from launch.bench.suite import measure_all
from launch.bench.works import RIVALS, WORKS, make_bench

from rdo.checks import compose_config
from rdo.main import prepare_process
from rdo.runtime.errors import UserError
from rdo.runtime.files import write_json
from rdo.sequences import preparation

# A Llama of 46M parameters with random weights. Its vocabulary is small, so that the head's share of the work is more
# like a large model's. Memory before speed: at 2048 tokens a step of DPO is 4 % faster, and takes half as much again.
OVERRIDES = (
    "model.vocabulary_size=16384", "model.hidden_size=512", "model.intermediate_size=1408", "model.layers=9",
    "model.heads=8", "model.max_positions=8192", "engine.tokens_per_micro_batch=512",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the options name. Raises UserError where TRL takes part and is not installed."""
    parser = argparse.ArgumentParser(prog="launch/bench", description=__doc__)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--against", nargs="+", choices=RIVALS, default=RIVALS)
    parser.add_argument("--threads", nargs="+", type=int, help="default: one, and one a core")
    parser.add_argument("--rounds", type=int, default=3, help="that everybody is timed in")
    parser.add_argument("--pairs", type=int, default=8, help="of a step of DPO; what costs more takes a part of them")
    parser.add_argument("--growth", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--epoch-pairs", type=int, default=16, help="of an epoch against Trainer.train(); 0: none")
    parser.add_argument("--products", choices=("auto", "torch"), default="auto", help="torch: never oneDNN's")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of train.py: model, engine")
    options = parser.parse_args(arguments)
    if ({"trl", "trl_best"} & {*options.against} or options.epoch_pairs) and find_spec("trl") is None:
        install = "pip install -r requirements-bench.txt, or --against padded unpadded --epoch-pairs 0"
        raise UserError(f"TRL is not installed: {install}")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of TRL's calls into transformers
    sys.stdout.reconfigure(line_buffering=True)
    config = compose_config([*OVERRIDES, *options.set])
    prepare_process(config.engine)
    if options.products == "torch":
        preparation.onednn_pays = lambda: False
    chosen = {name: getattr(options, name) for name in ("against", "rounds", "pairs")}
    chosen["threads"] = options.threads or sorted({1, torch.get_num_threads()})
    device = {"auto": "cuda" if torch.cuda.is_available() else "cpu"}.get(config.engine.device, config.engine.device)
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / "bench.json"
    with make_bench(config.model, config.engine, torch.device(device), **chosen) as bench:
        found = measure_all(bench, file, options.works, options.growth)
        if options.epoch_pairs:
            write_json(file, found | {"epoch": measure_epoch(bench, options.epoch_pairs)})
    print(f"bench: {file}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
