"""The course's own archives: fetched from its Google Drive, checked, and unpacked into a folder."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.files import atomic_write, reason_of
from common.json_files import read_object
from preparation.downloads import DownloadError, download
from preparation.zip_files import extract

DRIVE_IDS = {
    2022: "1YxkObGDlqZM0-9Zq-QMjk7q1vND4UJl3",
    2023: "1XUl4tqq3kKyWRe2lyHZ8s7U9yc_x3mWT",
    2024: "1W6Y1OmjzNw2qHoGDCpGOwGpw27wLg1fi",
}
RECORD = ".archives.json"  # in the data folder: hash and size of the archive of each year


def unpack_and_record(year: int, archive: Path, data_dir: Path) -> None:
    """Unpack the archive of a year into `data_dir`; print and record its hash and its size.

    Warns if another archive of that year was unpacked there before. Raises UserError as `unpack`
    and `read_record` do.
    """
    record = read_record(data_dir)
    found = measure(archive)
    before = record.get(str(year))
    if before is not None and before != found:
        print(
            f"warning: {archive}: has {in_words(found)}, but the archive of {year} that was "
            f"unpacked here before had {in_words(before)}",
            file=sys.stderr,
        )
    unpack(archive, data_dir)
    record[str(year)] = found
    atomic_write(data_dir / RECORD, json.dumps(record, indent=2) + "\n")
    print(f"archive of {year}: {in_words(found)}")


def unpack(archive: Path, data_dir: Path) -> None:
    """Unpack one of the course's zip files into `data_dir`.

    All of it is checked before anything is moved to its place. Raises UserError for a file that is
    broken, refused, or no such archive, for one with files that are already in `data_dir`, and for
    a full disk. Nothing of the archive is then left in `data_dir`.
    """
    refuse_no_file(archive)
    staging = data_dir / ".partial-archive"
    shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        extract(archive, staging)
        moves = list(plan_moves(find_layout(archive, staging), data_dir))
        move_all(moves)
    except OSError as error:
        reason = reason_of(error, data_dir)
        raise UserError(f"{archive}: cannot be unpacked into {data_dir} ({reason})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def refuse_no_file(archive: Path) -> None:
    """Raise UserError unless an archive is there and is a plain file."""
    if not archive.is_file():
        raise UserError(f"{archive}: no such file")


def find_layout(archive: Path, folder: Path) -> Path:
    """The extracted folder with digits/ or face/ in it: `folder` itself or one of its children."""
    for candidate in (folder, *sorted(folder.iterdir())):
        if (candidate / "digits").is_dir() or (candidate / "face").is_dir():
            return candidate
    raise UserError(f"{archive}: holds neither digits/ nor face/; is it the course's archive?")


def plan_moves(source: Path, target: Path) -> Iterator[tuple[Path, Path]]:
    """The renames that merge one folder into another. Raises UserError if a file is in the way."""
    for child in sorted(source.iterdir()):
        place = target / child.name
        if not place.exists():
            yield child, place
        elif child.is_dir() and place.is_dir():
            yield from plan_moves(child, place)
        elif child.name != "README.md":
            raise UserError(f"--data-dir {target}: {place} is there already; remove it first")


def move_all(moves: list[tuple[Path, Path]]) -> None:
    """Rename (source, target) pairs, all of them or none. Raises OSError."""
    try:
        for source, target in moves:
            source.rename(target)
    except BaseException:  # Ctrl-C too
        for source, target in moves:
            if not source.exists():
                target.rename(source)
        raise


# The record of what was unpacked


def measure(archive: Path) -> dict[str, Any]:
    """The sha256 and the size in bytes of a file.

    Raises UserError if it is not there, OSError if it cannot be read.
    """
    refuse_no_file(archive)
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"sha256": digest, "size": file.tell()}


def read_record(data_dir: Path) -> dict[str, dict[str, Any]]:
    """The sha256 and the size of the archives that were unpacked into `data_dir`, by year.

    Raises UserError for a damaged file.
    """
    path = data_dir / RECORD
    if not path.exists():
        return {}
    record = read_object(path)
    if not all(map(is_measured, record.values())):
        raise UserError(f"{path}: damaged; remove it")
    return record


def is_measured(value: object) -> bool:
    """Whether a value read from json is what `measure` gives."""
    if not isinstance(value, dict) or set(value) != {"sha256", "size"}:
        return False
    digest = value["sha256"]
    is_digest = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None
    return is_digest and type(value["size"]) is int


def in_words(measured: dict[str, Any]) -> str:
    """The hash and the size for a sentence."""
    return f"sha256 {measured['sha256']} and {measured['size']:,} bytes"


# The download


def fetch(year: int, data_dir: Path) -> Path:
    """Download the archive of a year from the course's Google Drive to a hidden file in `data_dir`.

    Raises UserError that says how to fetch it by hand. What has arrived by then is continued by the
    next call.
    """
    arriving = data_dir / f".partial-download-{year}.zip"
    url = f"https://drive.google.com/uc?id={DRIVE_IDS[year]}"
    try:
        download(arriving, url)
    except DownloadError as error:
        raise UserError(
            f"--year {year}: the download failed ({error}); the same command continues it, or "
            f"fetch {url} with a browser and give it as --archive FILE.zip"
        ) from None
    return arriving.replace(data_dir / f".partial-{year}.zip")
