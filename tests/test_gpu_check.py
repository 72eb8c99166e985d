"""launch/gpu_check.py without a GPU: what a CPU can run of it, with next to nothing installed, and how it fails."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launch import gpu_check

from rdo.sequences.attention import KERNELS
from rdo.settings import ModelConfig

ROOT = Path(__file__).parents[1]
# A machine with a GPU that is lent for minutes may have no more than PyTorch and transformers.
ABSENT = (
    "hydra", "omegaconf", "wandb", "deepspeed", "datasets", "pyarrow", "peft", "matplotlib", "pytest", "hypothesis",
)  # fmt: skip
WITHOUT = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
sys.argv = ["gpu_check.py", *sys.argv[1:]]
runpy.run_path({str(ROOT / "launch" / "gpu_check.py")!r}, run_name="__main__")
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def lines(ends: float, only: str, folder: Path) -> gpu_check.Checks:
    return gpu_check.Checks(folder, time.monotonic() + ends, only, {})


def written(folder: Path) -> dict:
    return json.loads((folder / "gpu_check.json").read_text())


def test_a_cpu_runs_what_it_can_of_it_with_next_to_nothing_installed(tmp_path: Path):
    done = run("--device", "cpu", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = written(tmp_path)
    assert found["left_out"] == {}
    names = {row["name"] for row in found["checks"]}
    for kernel in KERNELS:
        wanted = [f"{model} float32 {kernel}" for model in gpu_check.MODELS] + [f"recomputing float32 {kernel}"]
        assert {f"{name}: gradients" for name in wanted} <= names
    assert {f"task {task} float32: losses" for task in gpu_check.TASKS} <= names
    # A tree that is not computed apart from what it is compared with would be off by nothing at all.
    assert all(row["error"] > 0 for row in found["checks"] if row["name"].endswith("varlen: gradients"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = run()
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout == "there is no CUDA device here; --device cpu runs what a CPU can\n"


def test_it_goes_on_after_a_failure_and_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def broken(*arguments: object, **others: object) -> gpu_check.suite.Lines:
        yield "first", 0.0, 0.0
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu_check.suite, "emulate", lambda: None)  # it is for the whole process
    monkeypatch.setattr(gpu_check.suite, "check_transfers", broken)
    monkeypatch.setattr(gpu_check.suite, "check_model", lambda *arguments, **others: iter([("numbers", math.nan, 1.0)]))
    monkeypatch.setattr(gpu_check.suite, "check_padded", lambda *arguments: iter([("numbers", 0.5, 0.5)]))
    monkeypatch.setattr(gpu_check.suite, "check_task", lambda *arguments: iter([("numbers", 0.6, 0.5)]))
    assert gpu_check.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    rows = {row["name"]: row for row in written(tmp_path)["checks"]}
    assert rows["transfers: first"]["ok"]
    assert "no kernel image" in rows["transfers"]["trace"]
    assert not rows["transfers"]["ok"]
    assert rows["gpt2 float32 padded: numbers"]["ok"]
    assert rows["gpt2 float32 varlen: numbers"]["error"] == "nan"
    assert not rows["gpt2 float32 varlen: numbers"]["ok"]
    assert not rows["task dpo float32: numbers"]["ok"]
    said = capsys.readouterr().out
    assert "RuntimeError: no kernel image" in said
    assert "FAIL transfers\n" in said


def test_what_no_longer_fits_is_left_out_and_said(tmp_path: Path, capsys):
    checks = lines(30.0, "", tmp_path)
    checks.run("long", lambda: iter([("numbers", 0.0, 0.0)]), seconds=60.0)
    checks.run("short", lambda: iter([("numbers", 0.0, 0.0)]), seconds=1.0)
    assert written(tmp_path)["left_out"] == {"long": "no time"}
    assert [row["name"] for row in written(tmp_path)["checks"]] == ["short: numbers"]
    assert "left out: no time" in capsys.readouterr().out


def test_results_are_written_line_by_line(tmp_path: Path):
    def check() -> gpu_check.suite.Lines:
        yield "first", 0.0, 0.0
        assert len(written(tmp_path)["checks"]) == 1
        yield "second", 0.0, 0.0

    checks = lines(30.0, "", tmp_path)
    checks.run("both", check)
    assert checks.failed == []
    assert len(written(tmp_path)["checks"]) == 2


def test_the_benchmark_measures_what_fits_into_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)  # without TRL
    cpu, model = torch.device("cpu"), ModelConfig(vocabulary_size=300, hidden_size=32, intermediate_size=32, layers=1)
    assert gpu_check.benchmark(cpu, 129.0, tmp_path) is None
    assert "no benchmark: 129 s are left" in capsys.readouterr().out
    monkeypatch.setattr(gpu_check, "WORK_SECONDS", gpu_check.WORK_SECONDS + 90.0)  # one work begins
    monkeypatch.setattr(gpu_check, "MODELS_SECONDS", 0.0)
    found = gpu_check.benchmark(cpu, 132.0, tmp_path, model)
    assert found is not None
    assert {row["work"] for row in found["rows"]}.isdisjoint(found["left_out"])
    assert "score30" in found["left_out"]
    assert json.loads((tmp_path / "bench.json").read_text())["left_out"] == found["left_out"]


def test_only_what_is_asked_for_is_run(tmp_path: Path):
    checks = lines(30.0, "varlen", tmp_path)
    for name in ("llama spans", "llama varlen"):
        checks.run(name, lambda: iter([("numbers", 0.0, 0.0)]))
    assert [row["name"] for row in checks.found["checks"]] == ["llama varlen: numbers"]
