"""Every malformed input ends with one line that names what, where and what to do, and leaves nothing half-done."""

import re
import runpy
import signal
import sys
from pathlib import Path

import pytest

from malformed import CASES, Case

TRAIN = Path(__file__).parents[2] / "train.py"
LIMIT = 60  # seconds: an input that is taken for a good one starts real work


@pytest.fixture(autouse=True)
def limited():
    def ended(*_: object) -> None:
        pytest.fail("no error, but work")

    before = signal.signal(signal.SIGALRM, ended)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_no_name_stands_for_two_cases():
    assert len({(case.area, case.name) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=[f"{case.area}: {case.name}" for case in CASES])
def test_a_malformed_input(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    run_dir = tmp_path / "runs"
    overrides = case.make(tmp_path, monkeypatch)
    monkeypatch.setattr(sys, "argv", [str(TRAIN), *overrides, f"run_dir={run_dir}"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(TRAIN), run_name="__main__")
    printed, shown = capfd.readouterr()
    assert stopped.value.code == 1
    errors = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, shown
    assert shown.rstrip().endswith(errors[0])  # one line, and nothing behind it
    assert re.search(case.message, errors[0]), errors[0]
    assert "Traceback" not in shown + printed
    assert not list(run_dir.rglob("*.part"))
