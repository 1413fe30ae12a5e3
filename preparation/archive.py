"""The course's own archives: fetched from its Google Drive, checked, and unpacked into a folder."""

from __future__ import annotations

import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from common.cli import UserError

DRIVE_IDS = {
    2022: "1YxkObGDlqZM0-9Zq-QMjk7q1vND4UJl3",
    2023: "1XUl4tqq3kKyWRe2lyHZ8s7U9yc_x3mWT",
    2024: "1W6Y1OmjzNw2qHoGDCpGOwGpw27wLg1fi",
}
# What zipfile and the file system raise for a damaged archive or one that cannot be unpacked.
ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    UnicodeDecodeError,  # the name of an entry
)


def unpack(archive: Path, data_dir: Path) -> None:
    """Unpack one of the course's zip files into `data_dir`.

    All of it is checked before anything is moved to its place. Raises UserError for a file that is
    broken or is no such archive, and for one with files that are already in `data_dir`.
    """
    if not archive.is_file():
        raise UserError(f"{archive}: no such file")
    staging = data_dir / ".partial-archive"
    shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed
    try:
        extract(archive, staging)
        moves = list(plan_moves(find_layout(archive, staging), data_dir))
        for source, target in moves:
            source.rename(target)
    except ZIP_ERRORS as error:
        raise UserError(f"{archive}: not a whole zip file, or unreadable ({error})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def extract(archive: Path, folder: Path) -> None:
    """Extract a zip file. Raises UserError if an entry is damaged or points out of `folder`."""
    with zipfile.ZipFile(archive) as file:
        for name in file.namelist():
            target = (folder / name).resolve()
            if not target.is_relative_to(folder.resolve()):
                raise UserError(
                    f"{archive}: refused, because its entry {name!r} points out of the folder"
                )
        broken = file.testzip()
        if broken is not None:
            raise UserError(f"{archive}: its entry {broken!r} is broken; fetch it again")
        file.extractall(folder)


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


def fetch(year: int, data_dir: Path) -> Path:
    """Download the archive of a year from the course's Google Drive to a hidden file in `data_dir`.

    Raises UserError that says how to fetch it by hand.
    """
    import gdown

    target = data_dir / f".partial-{year}.zip"
    try:
        if gdown.download(id=DRIVE_IDS[year], output=str(target)) and target.is_file():
            return target
        reason = "no file arrived"
    except Exception as error:  # gdown passes on whatever requests, urllib3 and bs4 raise
        reason = first_line(error)
    target.unlink(missing_ok=True)
    raise UserError(
        f"--year {year}: the download failed ({reason}); fetch "
        f"https://drive.google.com/uc?id={DRIVE_IDS[year]} with a browser and give it as "
        "--archive FILE.zip"
    )


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its type if it has none."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0]
