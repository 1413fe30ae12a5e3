"""Damage files at random, and see what their readers do.

    python -m tests.fuzz --minutes 10 --seed 3
    python -m tests.fuzz --targets data run --first 1234 --count 1

A reader must read a file, or raise UserError with one line. Anything else is a failure: another
exception, a message of several lines, more than ten seconds, or a file outside the folder.
"""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import UserError, above, at_least, run_cli
from tests.fuzz.targets import TARGETS, Target

LONGEST = 10.0  # seconds of one reading
LONGEST_SLOW = 90.0  # the same where a training goes on
LONGEST_MESSAGE = 1_000  # characters


@dataclass(kw_only=True)
class Fuzz:
    """Damage files and read them until the time is over."""

    minutes: float = 1.0
    """How long."""
    seed: int = 0
    """Seed of the damages."""
    targets: tuple[str, ...] = tuple(TARGETS)
    """Readers to test; those that train or write a page take seconds for each file."""
    first: int = 0
    """Number of the first damage."""
    count: int = 10**9
    """Number of damages at most."""

    def __post_init__(self) -> None:
        above("--minutes", self.minutes, 0, 100_000)
        at_least("--first", self.first, 0)
        at_least("--count", self.count, 1)
        for name in self.targets:
            if name not in TARGETS:
                raise UserError(f"--targets {name}: none of {', '.join(TARGETS)}")


class TooLong(BaseException):
    """A reading took too long. Not an Exception, so that no reader takes it for a broken file."""


def too_long(*_: Any) -> None:
    raise TooLong


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooLong in what is inside after some seconds."""
    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def try_one(target: Target, example: Path, seed: int, name: str, number: int) -> tuple[str, str]:
    """Damage number `number` of a target: "read", "refused" or "failed", and what was done."""
    rng = random.Random(f"{seed} {name} {number}")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "inside" / "example"
        shutil.copytree(example, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        file = rng.choice(files)
        done = f"{target.damage(file, rng)} of {file.relative_to(folder)}"
        outcome = "read"
        limit = LONGEST_SLOW if target.is_slow else LONGEST
        try:
            with time_limit(limit), contextlib.redirect_stdout(io.StringIO()):
                target.read(folder)
        except UserError as error:
            message = str(error)
            outcome = "refused"
            if "\n" in message or len(message) > LONGEST_MESSAGE:
                outcome, done = "failed", f"{done}: the message is {message[:300]!r}"
        except OSError as error:  # `run_cli` prints it as one line with the name of the file
            outcome = "refused"
            if str(folder) not in str(error):
                outcome, done = "failed", f"{done}: {traceback.format_exc()}"
        except TooLong:
            outcome, done = "failed", f"{done}: more than {limit:g} seconds"
        except Exception:  # which is what is looked for
            outcome, done = "failed", f"{done}: {traceback.format_exc()}"
        around = {path.name for path in (*Path(root).iterdir(), *folder.parent.iterdir())}
        if around != {"inside", "example"}:
            outcome, done = "failed", f"{done}: wrote outside its folder: {sorted(around)}"
    return outcome, done


def fuzz(args: Fuzz) -> tuple[Counter[str], list[str]]:
    """Take turns at the targets until the time is over; returns counts and the failures."""
    warnings.filterwarnings("ignore")
    deadline = time.monotonic() + 60 * args.minutes
    counts: Counter[str] = Counter()
    failures = []
    with tempfile.TemporaryDirectory() as root:
        examples = {}
        for name in args.targets:
            examples[name] = Path(root) / name
            examples[name].mkdir()
            TARGETS[name].make(examples[name])
        for number in range(args.first, args.first + args.count):
            for name, example in examples.items():
                outcome, done = try_one(TARGETS[name], example, args.seed, name, number)
                counts[outcome] += 1
                if outcome == "failed":
                    failures.append(f"--targets {name} --first {number} --count 1: {done}")
            if time.monotonic() > deadline:
                break
    return counts, failures


def main(args: Fuzz) -> None:
    """Print the failures and the counts; exit status 1 if there is a failure."""
    counts, failures = fuzz(args)
    for failure in failures:
        print(f"--seed {args.seed} {failure}\n")
    words = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(counts.items()))
    print(f"{counts.total():,} damaged files: {words}")
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(Fuzz, main)
