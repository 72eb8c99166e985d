"""Which tests `make quick` leaves out: those that start processes, train for long, or make whole pipelines."""

from pathlib import Path

import pytest

SLOW = {
    "test_bench", "test_command_line", "test_comparison", "test_dashboards", "test_engines", "test_errors",
    "test_gpu_check", "test_kills", "test_launch", "test_lora", "test_malformed", "test_recorded", "test_report",
    "test_ranks", "test_resume", "test_safety", "test_slurm", "test_stopping", "test_tracking",
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.path).stem in SLOW:
            item.add_marker(pytest.mark.slow)
