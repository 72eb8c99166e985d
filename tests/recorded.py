"""Twenty steps of everything that is trained, and what is scored and evaluated with it: recorded once, compared after.

    python tests/recorded.py            compares this code with docs/recorded.json; exits with 1 where a number differs
    python tests/recorded.py --record   writes docs/recorded.json anew, and with it the machine that it was made on

Numbers are the same to the last bit on the machine that recorded them; on another processor they are only near. Real
data (HH helpful-base) is read from ../shared/data, and left out where that is not.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402

from rdo.checks import compose_config  # noqa: E402
from rdo.main import run_config  # noqa: E402

RECORDED = ROOT / "docs" / "recorded.json"
HH = ROOT.parent / "shared" / "data" / "hh_helpful-base_test.jsonl.gz"
COMMON = (
    "engine.threads=1", "engine.device=cpu", "sft.max_steps=20", "rm.max_steps=20", "diffmodel.max_steps=20",
    "align.max_steps=20", "eval.prompts=16", "eval.max_new_tokens=24", "eval.batch_size=16",
)  # fmt: skip
TOY = (
    "dataset=toy", "model=toy", "dataset.toy.pairs=768", "dataset.toy.test_pairs=64",
    "dataset.toy.demonstrations=1280", "dataset.toy.candidate_queries=128", "align.max_records=640",
)  # fmt: skip
REAL = (
    "dataset=file", f"dataset.path={HH}", "dataset.name=hh", "dataset.on_invalid=skip", "dataset.template=hh",
    "dataset.max_length=192", "dataset.max_truncated_share=1", "dataset.max_records=400", "dataset.workers=1",
    "model=small", "model.vocabulary_size=512", "model.hidden_size=64", "model.intermediate_size=128",
    "model.layers=2", "model.heads=4", "engine.tokens_per_micro_batch=2048",
    *(f"{stage}.batch_size=8" for stage in ("sft", "rm", "diffmodel", "align")),
)  # fmt: skip
PAPER = ("diffmodel.form=paper", "diffmodel.beta0=0.1", "diffmodel.beta1=0.1")
ANTISYMMETRIC, RESIDUAL = (
    (f"diffmodel.form={form}", "diffmodel.beta0=0", "diffmodel.beta1=0") for form in ("antisymmetric", "residual")
)
RUNS: dict[str, tuple[str, ...]] = {
    "base": ("stage=eval", "eval.subject=base", "eval.judges=[]"),
    "rm": ("stage=eval", "eval.subject=reward"),
    "paper": ("stage=eval", "eval.subject=diff", *PAPER),
    "antisymmetric": ("stage=eval", "eval.subject=diff", *ANTISYMMETRIC),
    "residual": ("stage=eval", "eval.subject=diff", *RESIDUAL),
    "dpo": ("stage=eval", "loss=dpo", "rc=none", "eval.judges=[reward]"),
    "dpo-reward": ("stage=eval", "loss=dpo", "rc=reward", "eval.judges=[reward]"),
    "dpo-diff": ("stage=eval", "loss=dpo", "rc=diff", "rc.order=antisymmetric", *PAPER, "eval.judges=[reward,diff]"),
    "dpo-residual": ("stage=eval", "loss=dpo", "rc=diff", *RESIDUAL, "eval.judges=[reward]"),
    "kto": ("stage=eval", "loss=kto", "rc=reward", "eval.judges=[reward]"),
    "rrhf": ("stage=eval", "loss=rrhf", "rc=diff", *ANTISYMMETRIC, "eval.judges=[reward]"),
}


def digest(data: bytes) -> str:
    """Sixteen digits that tell any two results apart."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def numbers(value: Any) -> Any:
    """The numbers of an evaluation, without names, texts and folders."""
    if isinstance(value, dict):
        found = {key: numbers(entry) for key, entry in value.items()}
        return {key: entry for key, entry in found.items() if entry not in (None, {}, [])}
    if isinstance(value, list):
        return [entry for entry in map(numbers, value) if entry not in (None, {}, [])]
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def result(folder: Path) -> dict[str, Any]:
    """What a finished folder holds."""
    found: dict[str, Any] = {}
    if (metrics := folder / "metrics.jsonl").exists():
        found["losses"] = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
    if (weights := folder / "model" / "model.safetensors").exists():
        found["weights"] = digest(weights.read_bytes())
    for table in sorted(folder.glob("*.parquet")):
        rows = sorted(pq.read_table(table).to_pylist(), key=lambda row: json.dumps(row, sort_keys=True))
        found[table.stem] = digest(json.dumps(rows, sort_keys=True).encode())
    if (evaluation := folder / "evaluation.json").exists():
        found["evaluation"] = numbers(json.loads(evaluation.read_text()))
    return found


def run_all(settings: tuple[str, ...], run_dir: Path) -> dict[str, Any]:
    """Runs everything in one folder; what each run has made new, by run and stage."""
    results: dict[str, Any] = {}
    seen: set[Path] = set()
    for name, overrides in RUNS.items():
        command = [*settings, *COMMON, *overrides, f"run_dir={run_dir}"]
        run_config(compose_config(command), command)
        for manifest in sorted(set(run_dir.glob("*/*/manifest.json")) - seen):
            seen.add(manifest)
            if found := result(manifest.parent):
                stage, label = manifest.parts[-3], manifest.parts[-2].rpartition("-")[0]
                results[f"{name}/{stage}/{label}"] = found
    return results


def as_text(content: dict[str, Any]) -> str:
    """As JSON, a line a result."""
    worlds = []
    for world, results in content["results"].items():
        lines = [f"{json.dumps(name)}: {json.dumps(entry, sort_keys=True)}" for name, entry in results.items()]
        worlds.append(f"{json.dumps(world)}: {{\n" + ",\n".join(lines) + "\n}")
    return f'{{"machine": {json.dumps(content["machine"])}, "results": {{\n' + ",\n".join(worlds) + "\n}}\n"


def machine() -> str:
    """Processor and library, on which the last bits depend."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{processor}, {platform.machine()}, torch {torch.__version__}"


def measured() -> dict[str, Any]:
    """All results of this code."""
    worlds = {"toy": TOY, **({"hh": REAL} if HH.exists() else {})}
    with tempfile.TemporaryDirectory() as folder:
        return {world: run_all(settings, Path(folder) / world) for world, settings in worlds.items()}


def differences(recorded: Any, found: Any, where: str = "") -> list[str]:
    """Every place where two results are not equal; what the second lacks altogether (a world) is none."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        names = sorted(recorded.keys() | found.keys())
        pairs = [(recorded.get(name), found.get(name), f"{where}/{name}") for name in names]
        return [line for pair in pairs for line in differences(*pair)]
    return [] if recorded == found else [f"{where[1:]}: recorded {recorded!s:.100}, found {found!s:.100}"]


def main() -> None:
    found = measured()
    if "--record" in sys.argv:
        RECORDED.write_text(as_text({"machine": machine(), "results": found}))
        return
    recorded = json.loads(RECORDED.read_text())
    lines = differences({world: recorded["results"][world] for world in found}, found)
    print(
        "\n".join([f"recorded on {recorded['machine']}, compared on {machine()}", *lines, f"{len(lines)} differences"])
    )
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
