"""Progress bars for long work, on standard error; where that is no terminal, a line every few seconds at most."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress_bar(total: int, title: str, initial: int = 0, unit: str = "it") -> tqdm:
    """A bar for work of known length, in steps of `unit`."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        desc=f"{title:<28.28}",
        initial=initial,
        unit=unit,
        unit_scale=unit != "it",
        mininterval=interval,
        dynamic_ncols=True,
        delay=1.0,
    )
