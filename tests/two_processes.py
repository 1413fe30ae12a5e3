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
from pathlib import Path

from common.files import ROOT

TIMEOUT = 180  # seconds
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "accelerate", "tyro", "matplotlib.pyplot"])


def run_with_two_processes(script: str, *words: object) -> str:
    """Run a script of this project; returns what the first process printed. Fails if one fails."""
    port = free_port()
    arguments = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{rank}.txt" for rank in range(2)]
        processes = [
            CONTEXT.Process(target=run_one, args=(rank, port, script, arguments, log))
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


def run_one(rank: int, port: int, script: str, arguments: list[str], log: Path) -> None:
    """Run the script as the process `rank` of two; it prints to `log`."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    for name, value in ranks.items():
        os.environ[name] = str(value)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["MASTER_PORT"] = str(port)
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")
