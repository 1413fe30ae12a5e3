"""Reads what run_all.sh wrote; notes what is not there and where the data came from."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
from PIL import Image

from common.cli import UserError
from common.files import ROOT
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
LARGEST_FILM = 4_000_000  # bytes; of a larger one the page shows the last frame only


class Table(NamedTuple):
    """A table with its title; the first row is the header. Without rows there is no table."""

    title: str
    rows: list[Row]


class Output:
    """An output directory. Raises UserError that names a broken file in it.

    `missing` collects what is not there, as rows of part and reason. `origins` maps (data folder,
    part) to where that data came from and to the content of its made.json.
    """

    def __init__(self, folder: Path) -> None:
        if not any((folder / name).is_dir() for name in ("p1", "p2", "p3")):
            raise UserError(f"{folder}: contains none of p1, p2, p3, which run_all.sh writes")
        self.folder = folder.absolute()
        self.missing: list[Row] = []
        self.origins: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}

    def json(self, name: str | Path) -> dict[str, Any]:
        """The object in a json file; empty if there is no file."""
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: not a whole json object ({error})") from None

    def arguments(self, name: str) -> dict[str, Any]:
        """The arguments of a run."""
        return self.json(f"{name}/config.json").get("arguments", {})

    def table(self, name: str, title: str) -> Table:
        """A table that another script wrote as csv."""
        path = self.folder / name
        if not path.is_file():
            return Table(title, [])
        return Table(title, list(csv.reader(path.read_text().splitlines())))

    def metadata(self, name: str) -> dict[str, Any]:
        """The configuration in a network's file; empty if there is no file."""
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                return json.loads(file.metadata()["config"])
        except (safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
            raise UserError(f"{path}: not a whole network ({error})") from None

    # Images

    def faces(self, name: str, what: str) -> dict[str, Any] | None:
        """The first 32 images of a folder as one image, 8 in a row; else as `image`."""
        found = (self.folder / name).glob("*.png")
        files = sorted(path for path in found if not is_hidden(path.name))[:32]
        if not files:
            self.missing.append([f"figure: {what}", f"not run ({name} is not there)"])
            return None
        try:
            tiles = [Image.open(file).convert("RGB") for file in files]
        except (OSError, SyntaxError):
            raise UserError(f"{self.folder / name}: has a file that is not a whole image") from None
        width, height = tiles[0].size
        rows = -(-len(tiles) // COLUMNS)
        grid = Image.new("RGB", (width * min(COLUMNS, len(tiles)), height * rows))
        for number, tile in enumerate(tiles):
            row, column = divmod(number, COLUMNS)
            grid.paste(tile, (column * width, row * height))
        content = io.BytesIO()
        grid.save(content, "png")
        return as_found(content.getvalue(), "image/png", *grid.size, kind="pixels")

    def image(self, name: str, what: str, kind: str) -> dict[str, Any] | None:
        """An image as a data URI, with its size and its kind: "plot", "pixels" or "film".

        None, and noted in `missing`, if it is not there.
        """
        path = self.folder / name
        if not path.is_file():
            self.missing.append([f"figure: {what}", f"not run ({name} is not there)"])
            return None
        content = path.read_bytes()
        try:
            with Image.open(path) as image:
                image.load()
                width, height = image.size
                mime = image.get_format_mimetype()
                if kind == "film" and len(content) > LARGEST_FILM:
                    kind = "pixels"
                    mime = "image/png"
                    content = last_frame(image)
        except (OSError, SyntaxError):
            raise UserError(f"{path}: not a whole image") from None
        return as_found(content, mime, width, height, kind)

    # Data

    def origin_of(self, score: dict[str, Any], flag: str) -> str:
        """The origin of the folder DATA_DIR/face/… that a score was given with `flag`."""
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
