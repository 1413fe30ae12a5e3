"""Reads what run_all.sh wrote; notes what is not there and where the data came from."""

from __future__ import annotations

import base64
import csv
import io
import os
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from common.cli import UserError
from common.data import FORMATS
from common.files import ROOT
from common.json_files import FileError, object_of, text_of
from common.metadata import MetadataError, read_config
from common.names import is_hidden

Row = list[str]

# The numbers of PNG files in the course's hand-outs.
COURSE_COUNTS = {
    "digits/mnistm/data": 56_000,
    "digits/svhn/data": 79_431,
    "digits/usps/data": 7_438,
    "face/train": 38_464,
    "face/val": 2_025,
    "face/GT": 10,
}
COURSE = "the course's"
SYNTHETIC = "synthetic"
OTHER = "other data"
UNKNOWN = "data not found"
COLUMNS = 8  # of faces in a row
RELEASED = "released"  # the folder of what released networks drew; its names are those of p1 to p3
RELEASED_TITLE = ", released network"  # the end of the title of such a table
LARGEST_IMAGE = 2**26  # pixels
LARGEST_FACE = 2**20  # pixels of a face that is shown beside others
LARGEST_FILM = 4_000_000  # bytes; of a larger one the page shows the last frame only


class Table(NamedTuple):
    """A table with its title; the first row is the header. Without rows there is no table."""

    title: str
    rows: list[Row]


class Output:
    """An output directory. Anyone may have written it: what is broken is left out and noted.

    A name is looked for in the directory, and if it is not there, among the results of released
    networks. What was found there says so.

    `missing` collects what is not there or broken, as rows of part and reason. `broken` has a line
    for each broken file. `origins` maps (data folder, part) to where that data came from and to the
    content of its made.json.
    """

    def __init__(self, folder: Path) -> None:
        if not any((folder / name).is_dir() for name in ("p1", "p2", "p3", RELEASED)):
            raise UserError(
                f"{folder}: contains none of p1, p2, p3 and released, which run_all.sh writes"
            )
        self.folder = folder.absolute()
        self.missing: list[Row] = []
        self.broken: list[str] = []
        self.origins: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}

    def find(self, name: str | Path) -> tuple[Path, bool]:
        """Where a file or folder is, and whether that is among the results of released networks."""
        path = self.folder / name
        other = self.folder / RELEASED / name
        is_released = not path.exists() and other.exists()
        return (other if is_released else path), is_released

    def note_broken(self, what: str, line: str, reason: str) -> None:
        """Note that a part is left out, once: for the page, and as a line for the terminal."""
        if line not in self.broken:
            self.broken.append(line)
            self.missing.append([what, f"broken: {reason}"])

    def note_file(self, path: Path, reason: str) -> None:
        """Note that a file is left out."""
        name = os.path.relpath(path, self.folder)
        self.note_broken(f"file: {name}", f"{path}: {reason}", reason)

    def json(self, name: str | Path) -> dict[str, Any]:
        """The object in a json file; empty if there is no file, or a broken one.

        One of a released network also has a key of that name.
        """
        path, is_released = self.find(name)
        if not path.exists():
            return {}
        try:
            content = object_of(path, half_characters=True)  # `clean` shows them as question marks
            return content | {RELEASED: is_released}
        except FileError as error:
            self.note_file(path, f"not a whole json object ({error})")
            return {}

    def arguments(self, name: str) -> dict[str, Any]:
        """The arguments of a run."""
        arguments = self.json(f"{name}/config.json").get("arguments", {})
        if isinstance(arguments, dict):
            return arguments
        self.note_file(self.folder / name / "config.json", "its arguments are not an object")
        return {}

    def table(self, name: str, title: str) -> Table:
        """A table that another script wrote as csv; all its rows are as long as its header."""
        path, is_released = self.find(name)
        if is_released:
            title += RELEASED_TITLE
        if not path.exists():
            return Table(title, [])
        try:
            rows = list(csv.reader(text_of(path).splitlines()))
        except (FileError, csv.Error) as error:
            self.note_file(path, f"not a whole csv table ({one_line(error)})")
            return Table(title, [])
        rows = [row for row in rows if row]
        if any(len(row) != len(rows[0]) for row in rows):
            self.note_file(path, "its rows are not all as long as its header")
            return Table(title, [])
        return Table(title, rows)

    def metadata(self, name: str) -> dict[str, Any]:
        """The configuration in a network's file; empty if there is no file, or a broken one."""
        path = self.folder / name
        if not path.exists():
            return {}
        try:
            return read_config(path)
        except MetadataError as error:
            self.note_file(path, f"not a whole network ({error})")
            return {}

    # Images

    def faces(self, name: str, what: str) -> dict[str, Any] | None:
        """The first 32 images of a folder as one image, 8 in a row; else as `image`."""
        folder, is_released = self.find(name)
        files = sorted(path for path in folder.glob("*.png") if not is_hidden(path.name))[:32]
        if not files:
            self.missing.append([f"figure: {what}", f"not run ({name} is not there)"])
            return None
        tiles = []
        for file in files:
            try:
                with open_image(file, LARGEST_FACE) as tile:
                    tiles.append(tile.convert("RGB"))
            except Exception:  # a damaged or hostile image can raise anything
                self.note_file(file, "not a whole image")
        if not tiles:
            return None
        width, height = tiles[0].size
        rows = -(-len(tiles) // COLUMNS)
        grid = Image.new("RGB", (width * min(COLUMNS, len(tiles)), height * rows))
        for number, tile in enumerate(tiles):
            row, column = divmod(number, COLUMNS)
            grid.paste(tile, (column * width, row * height))
        content = io.BytesIO()
        grid.save(content, "png")
        found = as_found(content.getvalue(), "image/png", *grid.size, kind="pixels")
        return found | {RELEASED: is_released}

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return self.find(name)[0].is_file()

    def image(self, name: str, what: str, kind: str) -> dict[str, Any] | None:
        """An image as a data URI, with its size and its kind: "plot", "pixels" or "film".

        None, and noted in `missing`, if it is not there or broken.
        """
        path, is_released = self.find(name)
        if not path.exists():
            self.missing.append([f"figure: {what}", f"not run ({name} is not there)"])
            return None
        try:
            refuse_special(path)
            content = path.read_bytes()
            with open_image(path, LARGEST_IMAGE) as image:
                image.load()
                width, height = image.size
                mime = image.get_format_mimetype()
                if kind == "film" and len(content) > LARGEST_FILM:
                    kind = "pixels"
                    mime = "image/png"
                    content = last_frame(image)
        except Exception:  # a damaged or hostile image can raise anything
            self.note_file(path, "not a whole image")
            return None
        return as_found(content, mime, width, height, kind) | {RELEASED: is_released}

    # Data

    def origin_of(self, score: dict[str, Any], flag: str) -> str:
        """The origin of the folder DATA_DIR/face/… that a score was given with `flag`.

        A released network learned from other data than that of this page.
        """
        if score.get(RELEASED):
            return OTHER
        given = score.get("arguments", {}).get(flag)
        if not given:
            return UNKNOWN
        folder = Path(given)
        data_dir = str(folder.parent.parent)
        part = "/".join(folder.parts[-2:])
        return self.origin(data_dir, part)

    def origin(self, data_dir: str | None, *parts: str) -> str:
        """Where parts of the data come from; of several origins the least comparable one."""
        found = {self.origin_of_part(data_dir, part) for part in parts}
        for origin in (SYNTHETIC, UNKNOWN, OTHER):
            if origin in found:
                return origin
        return COURSE

    def origin_of_part(self, data_dir: str | None, part: str) -> str:
        """Where one part comes from: its made.json says so, or the number of its files."""
        folder = ROOT / (data_dir or "") / part
        made = self.json(folder / "made.json") or self.json(folder.parent / "made.json")
        if not data_dir or not folder.is_dir():
            origin = UNKNOWN
        elif made.get("made_by") == "synthetic":
            origin = SYNTHETIC
        elif not made and has_course_counts(ROOT / data_dir, part):
            origin = COURSE
        else:
            origin = OTHER
        self.origins[str(data_dir), part] = origin, made
        return origin


def has_course_counts(data_dir: Path, part: str) -> bool:
    """Whether a part has as many PNG files as the course's.

    Any 2,025 faces are easily found, so face/val is the course's only beside its face/train.
    """
    parts = {part}
    if part == "face/val":
        parts.add("face/train")
    for name in parts:
        count = sum(not is_hidden(path.name) for path in (data_dir / name).glob("*.png"))
        if count != COURSE_COUNTS.get(name):
            return False
    return True


def open_image(path: Path, most: int) -> Image.Image:
    """Open an image of at most `most` pixels. Raises ValueError for a larger one."""
    refuse_special(path)
    image = Image.open(path, formats=FORMATS)
    if image.width * image.height > most:
        image.close()
        raise ValueError("the image is too large")
    return image


def refuse_special(path: Path) -> None:
    """Raise ValueError for a pipe, which would be waited for, or a device, which never ends."""
    if not path.is_file():
        raise ValueError("not a file")


def one_line(error: Exception) -> str:
    """What an exception says, in one line and not too much of it."""
    return " ".join(str(error).split())[:200]


def as_found(
    content: bytes, mime: str | None, width: int, height: int, kind: str
) -> dict[str, Any]:
    """An image for the page, with its content as a data URI."""
    source = f"data:{mime};base64,{base64.b64encode(content).decode()}"
    return {"source": source, "width": width, "height": height, "kind": kind}


def last_frame(image: Image.Image) -> bytes:
    """The last frame of an animation as a PNG file."""
    image.seek(image.n_frames - 1)
    still = io.BytesIO()
    image.convert("RGB").save(still, "png")
    return still.getvalue()
