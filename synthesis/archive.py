"""The course's own archives: fetched from its Google Drive, checked, and unpacked into a data folder."""

import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from common.run import UserError

DRIVE_IDS = {
    2022: "1YxkObGDlqZM0-9Zq-QMjk7q1vND4UJl3",
    2023: "1XUl4tqq3kKyWRe2lyHZ8s7U9yc_x3mWT",
    2024: "1W6Y1OmjzNw2qHoGDCpGOwGpw27wLg1fi",
}


def unpack(archive: Path, data_dir: Path) -> None:
    """Check a zip of the course's and move what it holds into data_dir; UserError if it is broken or not that."""
    staging = data_dir / ".partial-archive"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            for name in file.namelist():
                if not (staging / name).resolve().is_relative_to(staging.resolve()):
                    raise UserError(f"{archive}: refused, its entry {name!r} points out of the folder")
            if (broken := file.testzip()) is not None:
                raise UserError(f"{archive}: its entry {broken!r} is broken, fetch it again")
            file.extractall(staging)
        roots = [f for f in (staging, *sorted(staging.iterdir())) if (f / "digits").is_dir() or (f / "face").is_dir()]
        if not roots:
            raise UserError(f"{archive}: holds neither digits/ nor face/")
        moves = list(plan_moves(roots[0], data_dir))
        for source, target in moves:
            source.rename(target)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{archive}: not a whole zip file, or it cannot be read ({error})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def plan_moves(source: Path, target: Path) -> Iterator[tuple[Path, Path]]:
    """The renames that merge one folder into another; UserError if a file is in the way."""
    for child in sorted(source.iterdir()):
        place = target / child.name
        if not place.exists():
            yield child, place
        elif child.is_dir() and place.is_dir():
            yield from plan_moves(child, place)
        elif child.name != "README.md":
            raise UserError(f"--data-dir {target}: {place} is there already, remove it first")


def fetch(year: int, data_dir: Path) -> Path:
    """The course's archive from Google Drive, as a temporary file in data_dir."""
    import gdown

    target = data_dir / f".partial-{year}.zip"
    try:
        if gdown.download(id=DRIVE_IDS[year], output=str(target)) and target.is_file():
            return target
        reason = "nothing came"
    except Exception as error:  # gdown raises what requests, urllib3 and bs4 raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    target.unlink(missing_ok=True)
    raise UserError(
        f"--year {year}: the download failed ({reason}); fetch https://drive.google.com/uc?id={DRIVE_IDS[year]} "
        f"with a browser and give it as --archive FILE.zip"
    )
