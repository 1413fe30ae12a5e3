"""Progress of long work other than training, which has its own in common/run.py."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from common.processes import is_first_process


def show_progress(items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
    """Yield the items beside a progress bar on a terminal, which appears after a second.

    Elsewhere a line with the time left is printed to stderr after 10 seconds and then each minute.
    Of the processes of torchrun only the first one shows its progress.
    """
    if not is_first_process():
        yield from items
        return
    start = time.monotonic()
    next_report = 10.0
    bar = tqdm(items, what, total, leave=False, disable=None, delay=1.0)
    for done, item in enumerate(bar, 1):
        yield item
        spent = time.monotonic() - start
        if spent > next_report and not sys.stderr.isatty():
            next_report = spent + 60
            left = tqdm.format_interval(spent / done * (total - done))
            print(f"{what}: {done:,}/{total:,}, about {left} left", file=sys.stderr)
