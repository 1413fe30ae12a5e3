"""Progress of work that is no training: that has its own, in run.py."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm


def watch(items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
    """Yield `items` beside a bar on a terminal; elsewhere the time left is told after 10 s and then each minute."""
    start, told = time.monotonic(), 0.0
    for done, item in enumerate(tqdm(items, what, total, leave=False, disable=None), 1):
        yield item
        spent = time.monotonic() - start
        if spent - told > (60 if told else 10) and not sys.stderr.isatty():
            told, left = spent, tqdm.format_interval(spent / done * (total - done))
            print(f"{what}: {done:,}/{total:,}, about {left} left", file=sys.stderr)
