"""How much memory reading a large set takes: `python tests/memory.py [PAIRS] [FOLDER]` (2 million pairs: 2.2 GB).

Generates pairs of HH-like length as JSON lines, reads them as a run would, and prints rows, seconds, and the peak of
the process's own memory. Pages of mapped files, which the system takes back when it needs them, are not its own.
"""

import json
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from rdo.data.loading import load_splits
from rdo.runtime.store import Provenance
from rdo.settings import DatasetConfig

QUERY_WORDS, RESPONSE_WORDS = 94, 39  # means of HH helpful-base


def generate(file: Path, pairs: int) -> None:
    """Writes pairs of random words; every fourth query is asked twice."""
    coin = random.Random(0)
    words = ["".join(coin.choices("abcdefghijklmnopqrstuvwxyz", k=coin.randint(2, 8))) for _ in range(5000)]

    def text(mean: int) -> str:
        return " ".join(coin.choices(words, k=1 + int(coin.expovariate(1 / mean))))

    with file.open("w") as lines:
        for number in range(pairs):
            row = {"chosen": f" {text(RESPONSE_WORDS)}", "rejected": f" {text(RESPONSE_WORDS)}."}
            lines.write(json.dumps({"prompt": f"{number * 3 // 4} {text(QUERY_WORDS)}", **row}) + "\n")


def own_memory(name: str) -> int:
    """A line of /proc/self/status, in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) // 1024


def main(pairs: int, folder: Path) -> None:
    file = folder / "pairs.jsonl"
    generate(file, pairs)
    peak = [own_memory("RssAnon")]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], own_memory("RssAnon"))

    threading.Thread(target=watch, daemon=True).start()
    before, started = own_memory("RssAnon"), time.perf_counter()
    found = load_splits(DatasetConfig(name="memory", source="file", path=str(file)), Provenance(folder, "", {}))
    seconds = time.perf_counter() - started
    done.set()
    sizes = {split: len(records) for split, records in found.splits.items()}
    print(f"{pairs} pairs, {file.stat().st_size / 1e9:.2f} GB of JSON lines, read in {seconds:.0f} s: {sizes}")
    print(f"own memory: {before} MB before, {peak[0]} MB at its peak; with mapped pages {own_memory('VmHWM')} MB")


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2_000_000
    if len(sys.argv) > 2:
        main(count, Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(count, Path(made))
