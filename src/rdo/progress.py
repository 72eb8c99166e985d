"""Progress bars for long work, on standard error; quiet where nobody watches a terminal for them."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress_bar(total: int, title: str, initial: int = 0) -> tqdm:
    """A bar for work of known length; outside a terminal it prints a line every few seconds at most."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, desc=f"{title:<28.28}", initial=initial, mininterval=interval, dynamic_ncols=True)
