"""train.py in the tests' own process, and which tests `make quick` leaves out: those that start processes, train for
long, or make whole pipelines. `make test` begins with them, so that no worker is left alone with a long file when the
others are done."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TRAIN = Path(__file__).parents[1] / "train.py"
# Longest first.
SLOW = (
    "test_engines", "test_slurm", "test_ranks", "test_kills", "test_recorded", "test_command_line", "test_stopping",
    "test_resume", "test_malformed", "test_comparison", "test_gpu_check", "test_bench", "test_tracking", "test_lora",
    "test_errors", "test_report", "test_launch",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(SLOW)}
    for item in items:
        if item.path.stem in places:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: places.get(item.path.stem, len(SLOW)))


@pytest.fixture
def train_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs train.py in this process, which spares the seconds of importing everything."""

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(TRAIN), *arguments])
        runpy.run_path(str(TRAIN), run_name="__main__")

    return run


@pytest.fixture
def refused(train_here: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command that cannot run leaves on standard error."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            train_here(*arguments)
        assert ended.value.code == 1
        return capsys.readouterr().err

    return run
