"""Two commands never write to one output directory at a time.

A command that runs from a command line locks each directory that it writes to, until it ends. The
lock is the operating system's (flock): it leaves no file, and it goes when the process goes. There
is none on Windows, and none between machines that share a file system without locks.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from common.cli import UserError
from common.processes import is_first_process

PATIENCE = 10.0  # seconds that the workers of a process that was killed may take to end
POLL = 0.1  # seconds

# The open directories that this command has locked, by device and inode; None outside a command.
_held: dict[tuple[int, int], int] | None = None


@contextlib.contextmanager
def command_locks() -> Iterator[None]:
    """While this is open, `claim` locks directories. All locks go at the end."""
    global _held
    _held = {}
    try:
        yield
    finally:
        for descriptor in _held.values():
            os.close(descriptor)
        _held = None


def claim(folder: Path, flag: str) -> None:
    """Lock a directory for this command. Raises UserError if another command has it.

    Of the processes of torchrun only the first one locks.
    """
    if _held is None or os.name != "posix" or not is_first_process():
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    about = os.fstat(descriptor)
    key = about.st_dev, about.st_ino
    if key in _held:
        os.close(descriptor)
        return
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise UserError(
                    f"{flag} {folder}: another command writes there ({holder(about.st_ino)})"
                ) from None
            time.sleep(POLL)
        except OSError:  # a file system without locks
            break
    _held[key] = descriptor


def holder(inode: int) -> str:
    """Which process holds the lock of an inode, in words, as far as /proc/locks says so."""
    import psutil

    with contextlib.suppress(OSError, ValueError, IndexError, psutil.Error):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()  # 1: FLOCK ADVISORY WRITE 4711 fe:00:1234 0 EOF
            if words[1] == "FLOCK" and words[5].endswith(f":{inode}"):
                command = " ".join(" ".join(psutil.Process(int(words[4])).cmdline()).split())
                return f"process {words[4]}: {command[:100]}"
    return "its process is not known"
