"""Half a minute of damaged files; `python -m tests.fuzz --minutes 60` goes on.

It also damages run directories whose training then goes on, and whole reports.
"""

from pathlib import Path

import pytest

from common.cli import UserError
from tests.fuzz import __main__ as fuzzing
from tests.fuzz.__main__ import Fuzz, fuzz
from tests.fuzz.targets import QUICK, Target


def test_no_damaged_file_ends_in_a_traceback_or_in_a_wait():
    counts, failures = fuzz(Fuzz(minutes=0.5, seed=0, targets=QUICK))
    assert failures == []
    assert counts["refused"] > len(QUICK)
    assert counts["read"] > 0


def test_the_harness_notices_what_it_looks_for(tmp_path, monkeypatch):
    """A traceback, a wait, a message of several lines, and a file outside the folder."""
    monkeypatch.setattr(fuzzing, "LONGEST", 0.2)

    def divide(folder: Path) -> None:
        _ = 1 / 0

    def wait(folder: Path) -> None:
        while True:
            pass

    def write_outside(folder: Path) -> None:
        (folder.parent / "evil").touch()

    def refuse(folder: Path) -> None:
        raise UserError("a.txt: broken")

    def make(folder: Path) -> None:
        (folder / "a.txt").write_text("text")

    example = tmp_path / "example"
    example.mkdir()
    make(example)
    for read, words in ((divide, "ZeroDivision"), (wait, "seconds"), (write_outside, "evil")):
        outcome, done = fuzzing.try_one(Target(make, read), example, 0, "x", 0)
        assert outcome == "failed"
        assert words in done
    assert fuzzing.try_one(Target(make, refuse), example, 0, "x", 0)[0] == "refused"


def test_the_same_seed_damages_alike():
    runs = [fuzz(Fuzz(seed=5, targets=("input.json",), count=40)) for _ in range(2)]
    assert runs[0] == runs[1]
    with pytest.raises(UserError, match="--targets nothing: none of generator"):
        Fuzz(targets=("nothing",))
