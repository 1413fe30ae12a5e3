"""Run a script in two processes that share its work, as torchrun does, in a few seconds.

torchrun starts Python three times, and each imports torch. Here both processes are forked from one
that has imported everything (multiprocessing's forkserver), with the environment variables that
torchrun sets. tests/test_dann.py has torchrun itself.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import cli
from common.files import ROOT

TIMEOUT = 180  # seconds
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "accelerate", "tyro", "matplotlib.pyplot"])


def run_with_two_processes(script: str, *words: object) -> str:
    """Run a script of this project; returns what the first process printed. Fails if one fails."""
    return run_all_with_two_processes([[script, *words]])


def run_all_with_two_processes(commands: Sequence[Sequence[object]]) -> str:
    """Run several scripts, each with its arguments, one after the other in the same two processes.

    They need not start again for each, which would take most of the time.
    """
    port = free_port()
    texts = [[str(word) for word in command] for command in commands]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{rank}.txt" for rank in range(2)]
        processes = [
            CONTEXT.Process(target=run_one, args=(rank, port, texts, log))
            for rank, log in enumerate(logs)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT)
            if process.is_alive():
                process.kill()
                process.join()
        printed = [log.read_text() if log.exists() else "" for log in logs]
    assert [process.exitcode for process in processes] == [0, 0], "\n".join(printed)
    return printed[0]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


def run_one(rank: int, port: int, commands: list[list[str]], log: Path) -> None:
    """Run the scripts as the process `rank` of two; they print to `log`."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    for name, value in ranks.items():
        os.environ[name] = str(value)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["MASTER_PORT"] = str(port)
    leave = cli.leave_process_group
    for number, command in enumerate(commands, 1):
        script = command[0]
        sys.argv = command
        # The last command ends the process.
        cli.leave_process_group = leave if number == len(commands) else lambda: None
        runpy.run_path(str(ROOT / script), run_name="__main__")
