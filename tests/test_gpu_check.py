"""launch/gpu_check.py without a GPU: what a CPU can run of it, with next to nothing installed, and how it fails."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import gpu_check
from launch.bench import suite as bench_suite

from rdo.sequences.attention import KERNELS
from rdo.settings import ModelConfig

SCRIPT = Path(__file__).parents[1] / "launch" / "gpu_check.py"
# A machine with a GPU that is lent for minutes may have no more than PyTorch and transformers.
ABSENT = (
    "hydra", "omegaconf", "wandb", "deepspeed", "datasets", "pyarrow", "peft", "matplotlib", "pytest", "hypothesis",
)  # fmt: skip
WITHOUT = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
sys.argv = ["gpu_check.py", *sys.argv[1:]]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


@pytest.fixture
def on_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs it here: its exit status, and what it has written."""
    monkeypatch.setattr(gpu_check.suite, "emulate", lambda: None)  # it is for the whole process

    def run(*arguments: str) -> tuple[int, dict]:
        code = gpu_check.main(["--device", "cpu", "--out", str(tmp_path), *arguments])
        return code, json.loads((tmp_path / "gpu_check.json").read_text())

    return run


def test_a_cpu_runs_what_it_can_of_it_with_next_to_nothing_installed(tmp_path: Path):
    command = [sys.executable, "-c", WITHOUT, "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert found["left_out"] == {}
    names = {row["name"] for row in found["checks"]}
    for kernel in KERNELS:
        wanted = [f"{model} float32 {kernel}" for model in gpu_check.MODELS] + [f"recomputing float32 {kernel}"]
        assert {f"{name}: gradients" for name in wanted} <= names
    assert {f"task {task} float32: losses" for task in gpu_check.TASKS} <= names
    # A tree that is not computed apart from what it is compared with would be off by nothing at all.
    assert all(row["error"] > 0 for row in found["checks"] if row["name"].endswith("varlen: gradients"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().out == "there is no CUDA device here; --device cpu runs what a CPU can\n"


def test_it_goes_on_after_a_failure_and_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, on_cpu):
    def broken(*arguments: object) -> gpu_check.suite.Lines:
        yield "first", 0.0, 0.0
        assert len(json.loads((tmp_path / "gpu_check.json").read_text())["checks"]) == 1  # line by line
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu_check.suite, "check_transfers", broken)
    for name, error in (("check_model", math.nan), ("check_padded", 0.5), ("check_task", 0.6)):
        found = [("numbers", error, 0.5)]
        monkeypatch.setattr(gpu_check.suite, name, lambda *_, found=found, **__: iter(found))
    code, written = on_cpu()
    rows = {row["name"]: row for row in written["checks"]}
    assert code == 1
    assert {name: rows[name]["ok"] for name in ("transfers: first", "transfers")} == {
        "transfers: first": True, "transfers": False
    }  # fmt: skip
    assert "no kernel image" in rows["transfers"]["trace"]
    assert rows["gpt2 float32 padded: numbers"]["ok"]
    assert rows["gpt2 float32 varlen: numbers"]["error"] == "nan"
    assert not rows["gpt2 float32 varlen: numbers"]["ok"]
    assert not rows["task dpo float32: numbers"]["ok"]
    assert "FAIL transfers\n" in capsys.readouterr().out


def test_what_no_longer_fits_is_left_out_and_said(capsys, on_cpu):
    code, written = on_cpu("--seconds", "-1")
    assert (code, written["checks"], set(written["left_out"].values())) == (0, [], {"no time"})
    assert "gpt2 float32 padded" in written["left_out"]
    assert "left out: no time" in capsys.readouterr().out


def test_only_what_is_asked_for_is_run(on_cpu):
    code, written = on_cpu("--only", "transfers")
    assert (code, [row["name"] for row in written["checks"]]) == (0, ["transfers: wrong arrays"])


def test_the_benchmark_runs_without_trl_and_begins_nothing_after_the_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_check, "WORKS", ["reference"])
    monkeypatch.setattr(bench_suite, "GROWTH", {})
    model = ModelConfig(vocabulary_size=300, hidden_size=32, intermediate_size=32, layers=1)
    for ends in (-math.inf, math.inf):
        list(gpu_check.benchmark(torch.device("cpu"), tmp_path, ends, model))
        assert ("reference   left out: no time" in capsys.readouterr().out) == (ends < 0)
        assert (tmp_path / "bench.json").exists() == (ends > 0)
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [(row["work"], row["against"]) for row in rows] == [("reference", "padded"), ("reference", "unpadded")]
