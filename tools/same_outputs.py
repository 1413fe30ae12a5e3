"""Compare two output directories file by file, to show that a change of the code changed no result.

Run the same commands with the same paths before and after the change, moving the first directory
away in between. Then compare:

    PROFILE=smoke bash run_all.sh /tmp/same/data /tmp/same/out && mv /tmp/same /tmp/before
    (change the code)
    PROFILE=smoke bash run_all.sh /tmp/same/data /tmp/same/out
    python tools/same_outputs.py /tmp/before /tmp/same

Images, csv, jsonl, npz and safetensors files (their metadata too) must be the same byte for byte.
In json files, what describes the run rather than its result is left out: command, arguments,
seconds, commit. last.pt is compared tensor by tensor without its seconds. Text that people read
(pages, logs, notes of steps, tables of commands) and PDF files, which contain a date, are listed
but not compared. Exit status 1 if anything differs.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from tyro.conf import Positional, arg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.cli import UserError, run_cli

FREE_KEYS = {"command", "arguments", "seconds", "git_commit"}
FREE_SUFFIXES = {".pdf", ".html", ".log", ".txt", ".tex", ".md"}
FREE_FOLDERS = {"report", "steps", "cache"}  # of run_all.py: words about the run, and caches


@dataclass
class Compare:
    """Compare all files of two output directories."""

    before: Annotated[Positional[Path], arg(metavar="BEFORE")]
    """The directory that the old code wrote."""
    after: Annotated[Positional[Path], arg(metavar="AFTER")]
    """The directory that the new code wrote."""


def without_free_keys(value: Any) -> Any:
    """A json value without the keys that describe the run."""
    if isinstance(value, dict):
        return {key: without_free_keys(v) for key, v in value.items() if key not in FREE_KEYS}
    if isinstance(value, list):
        return [without_free_keys(v) for v in value]
    return value


def same_states(before: Any, after: Any) -> bool:
    """Whether two contents of last.pt are equal, apart from the seconds."""
    if isinstance(before, torch.Tensor):
        return before.dtype == after.dtype and torch.equal(before, after)
    if isinstance(before, dict):
        if before.keys() != after.keys():
            return False
        keys = before.keys() - {"seconds"}
        return all(same_states(before[key], after[key]) for key in keys)
    if isinstance(before, list | tuple):
        if len(before) != len(after):
            return False
        return all(same_states(one, two) for one, two in zip(before, after, strict=True))
    return before == after


def same(before: Path, after: Path) -> bool:
    """Whether two files have the same result in them."""
    if before.suffix == ".json":
        one, two = (json.loads(path.read_text()) for path in (before, after))
        return without_free_keys(one) == without_free_keys(two)
    if before.suffix == ".pt":
        one, two = (torch.load(path, weights_only=True) for path in (before, after))
        return same_states(one, two)
    return before.read_bytes() == after.read_bytes()


def is_free(name: Path) -> bool:
    """Whether a file, named within its directory, may differ."""
    return name.suffix in FREE_SUFFIXES or bool(FREE_FOLDERS & set(name.parts[:-1]))


def files_of(folder: Path) -> set[Path]:
    """The names of all files within a folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def main(args: Compare) -> None:
    """Print what differs, and how many files are the same."""
    before, after = files_of(args.before), files_of(args.after)
    problems = [f"only before: {name}" for name in sorted(before - after) if not is_free(name)]
    problems += [f"only after: {name}" for name in sorted(after - before) if not is_free(name)]
    compared = 0
    not_compared = 0
    for name in sorted(before & after):
        if is_free(name):
            not_compared += 1
            continue
        compared += 1
        if not same(args.before / name, args.after / name):
            problems.append(f"differs: {name}")
    for problem in problems:
        print(problem)
    print(f"{compared:,} files compared, {len(problems)} problems; {not_compared:,} not compared")
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(Compare, main)
