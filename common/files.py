"""Files that are written whole or not at all, and output directories that are checked first."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.locks import claim

ROOT = Path(__file__).resolve().parent.parent  # of the repository
TEMPORARY = re.compile(r"\.(\d+)-.+")  # what `atomic_write` calls a file while it writes it


def atomic_write(path: Path, write: bytes | str | Callable[[Path], Any]) -> None:
    """Write `path` under a temporary name, flush it to disk, then rename it.

    `write` is the content, or a function that writes the content to the path it is given (which has
    the same suffix). Raises UserError that names the file if it cannot be written; the old file is
    then still there.
    """
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if callable(write):
                write(temporary)
            elif isinstance(write, str):
                temporary.write_bytes(write.encode(errors="surrogateescape"))  # names of files
            else:
                temporary.write_bytes(write)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except UnicodeEncodeError:  # of a name in another file, for example
        reason = "its text has half of a character, which cannot be encoded"
        raise UserError(f"{path}: cannot be written ({reason})") from None
    except Exception as error:
        if not is_write_error(error):
            raise
        raise UserError(f"{path}: cannot be written ({reason_of(error, path.parent)})") from None


def reason_of(error: Exception, folder: Path) -> str:
    """Why something cannot be written; for a full disk, how much of it is free."""
    reason = str(getattr(error, "strerror", None) or error)
    is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if (is_full or "No space left" in reason) and folder.exists():
        reason = f"{reason}; {shutil.disk_usage(folder).free / 1e6:,.1f} MB are free"
    return reason


def is_write_error(error: Exception) -> bool:
    """Whether an exception is how Python, torch or safetensors report a full or read-only disk."""
    if isinstance(error, OSError | RuntimeError):
        return True
    return type(error).__name__ == "SafetensorError"  # without importing safetensors


def make_output_dir(
    folder: Path,
    flag: str = "--output-dir",
    only: Collection[str] | None = None,
    alone: bool = True,
) -> Path:
    """Create `folder` and check that files can be written in it, before any work is done.

    With `alone`, no other command may write there at the same time. What a process left that was
    killed while it wrote is removed.

    Graders read every file in a folder of images. `only` lists the names that may lie there; any
    other file that is not hidden is a UserError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = reason_of(error, folder)
        raise UserError(f"{flag} {folder}: cannot be written ({reason})") from None
    if alone:
        claim(folder, flag)
    remove_leftovers(folder)
    if only is not None:
        visible = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        strays = sorted(visible - set(only))
        if strays:
            raise UserError(
                f"{flag} {folder}: contains {strays[0]}, which graders would read too; "
                "remove it first"
            )
    return folder


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that are gone."""
    import psutil

    for path in folder.iterdir():
        found = TEMPORARY.fullmatch(path.name)
        if found and path.is_file() and not psutil.pid_exists(int(found[1])):
            path.unlink(missing_ok=True)
