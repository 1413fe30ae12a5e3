"""CPU seconds that each script needs before its first line of work, beyond `import torch`.

The measure is the user CPU time of `python SCRIPT --help` in a new process; the baseline is that of
`python -c "import torch"`. Both are the least of several runs, taken in turn.

    python benchmarks/startup.py
    python benchmarks/startup.py --repeats 5
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.cli import at_least, run_cli
from common.files import ROOT


@dataclass
class Benchmark:
    """Time the start of every script at the top of the repository."""

    repeats: int = 3
    """Runs of each command; the least of them counts."""

    def __post_init__(self) -> None:
        at_least("--repeats", self.repeats, 1)


def user_seconds(arguments: list[str]) -> float:
    """User CPU seconds of a Python process. Raises CalledProcessError if it fails."""
    before = os.times().children_user
    command = [sys.executable, *arguments]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return os.times().children_user - before


def main(args: Benchmark) -> None:
    """Print a table: script, seconds, seconds beyond `import torch`."""
    commands = {"import torch": ["-c", "import torch"]}
    for script in sorted(ROOT.glob("*.py")):
        commands[script.name] = [script.name, "--help"]
    seconds = dict.fromkeys(commands, float("inf"))
    for _ in range(args.repeats):
        for name, command in commands.items():
            seconds[name] = min(seconds[name], user_seconds(command))
    baseline = seconds["import torch"]
    for name, value in seconds.items():
        print(f"{name:22} {value:5.2f} s, {value - baseline:+5.2f} s")


if __name__ == "__main__":
    run_cli(Benchmark, main)
