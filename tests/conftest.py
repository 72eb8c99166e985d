"""Which tests `make quick` leaves out: those that start processes, train for long, or make whole pipelines. `make test`
begins with them, so that no worker is left alone with a long file when the others are done."""

import pytest

# Longest first.
SLOW = (
    "test_engines", "test_slurm", "test_ranks", "test_kills", "test_recorded", "test_command_line", "test_stopping",
    "test_resume",
    "test_malformed", "test_comparison", "test_gpu_check", "test_bench", "test_tracking", "test_lora", "test_errors",
    "test_safety", "test_report", "test_dashboards", "test_launch",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(SLOW)}
    for item in items:
        if item.path.stem in places:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: places.get(item.path.stem, len(SLOW)))
