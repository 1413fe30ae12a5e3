"""Downloads that continue where an earlier one stopped, also inside a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

from common.cli import UserError

TIMEOUT = 60  # seconds without a byte, after which a download has failed


class DownloadError(Exception):
    """A file did not arrive. The message is one line."""


def fetch(target: Path, md5: str, url: str) -> None:
    """Download `url` to `target`, unless it is there. What arrives must have the MD5 `md5`.

    Raises UserError for another file in its place, and DownloadError as `download` does.
    """
    if target.exists():
        if not has_md5(target, md5):
            raise UserError(f"{target}: not the file of {url}, or not all of it; remove it")
        remove_parts(target)  # someone may have put the file there after a download had failed
        return
    download(target, url)
    if not has_md5(target, md5):
        target.unlink()
        raise DownloadError(f"{url} sent another file than the published one")


def download(target: Path, url: str) -> None:
    """Download `url`, also one of Google Drive, to `target`.

    Until it is complete, what has arrived lies beside it as TARGET????????.part. It stays there
    after an error or Ctrl-C, and the next call asks the server for the rest alone. If the server
    cannot continue, the whole file is downloaded again. Raises DownloadError.
    """
    import gdown  # also reads ordinary URLs

    target.parent.mkdir(parents=True, exist_ok=True)
    before = arrived(target)
    try:
        try:
            gdown.download(url, str(target), resume=True, timeout=TIMEOUT)
        except gdown.exceptions.FileURLRetrievalError:  # too many users, for example
            raise
        except gdown.exceptions.DownloadError:
            if before == 0 or arrived(target) > before:
                raise
            # Perhaps the server cannot continue. The old part stays until a new one is complete.
            gdown.download(url, str(target), timeout=TIMEOUT)
            remove_parts(target)
    except Exception as error:  # gdown passes on whatever requests, urllib3 and bs4 raise
        raise DownloadError(first_line(error)) from None
    if not target.is_file():
        raise DownloadError("no file arrived")


def arrived(target: Path) -> int:
    """How many bytes of a file have arrived. Of several parts, which gdown refuses, one stays."""
    parts = sorted(find_parts(target), key=lambda path: path.stat().st_size)
    for path in parts[:-1]:
        path.unlink()
    return parts[-1].stat().st_size if parts else 0


def find_parts(target: Path) -> list[Path]:
    """The files in which gdown keeps what has arrived: TARGET, eight characters, and .part."""
    length = len(target.name) + len("????????.part")
    return [
        path
        for path in target.parent.iterdir()
        if path.name.startswith(target.name)
        and path.name.endswith(".part")
        and len(path.name) == length
    ]


def remove_parts(target: Path) -> None:
    """Remove what has arrived."""
    for path in find_parts(target):
        path.unlink()


def has_md5(path: Path, md5: str) -> bool:
    """Whether a file has this MD5, which is what torchvision publishes of its data sets."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest() == md5


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its type if it has none."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0]
