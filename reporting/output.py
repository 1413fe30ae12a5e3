"""What run_all.sh left: reads it, and notes what is not there and where the data came from."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from common.run import ROOT, UserError

Row = list[str]
Table = tuple[str, list[Row]]  # the title, and the rows, of which the first is the header
COURSE_COUNTS = {"digits/mnistm/data": 56_000, "digits/svhn/data": 79_431, "digits/usps/data": 7_438}  # PNG files
COURSE_COUNTS |= {"face/train": 38_464, "face/val": 2_025, "face/GT": 10}
COURSE, SYNTHETIC, OTHER, UNKNOWN = "the course's", "synthetic", "other data", "data not found"
LARGEST_FILM = 4_000_000  # bytes; of a larger one the page holds the end only


class Output:
    """An output directory: reads what is there, and notes in `missing` what is not. UserError names a broken file."""

    def __init__(self, folder: Path) -> None:
        if not any((folder / name).is_dir() for name in ("p1", "p2", "p3")):
            raise UserError(f"{folder}: holds none of p1, p2, p3, which run_all.sh writes")
        self.folder = folder.absolute()
        self.missing: list[Row] = []  # part, why
        self.origins: dict[tuple[str, str], tuple[str, dict]] = {}  # (data folder, part) → origin, made.json

    def json(self, name: str | Path) -> dict[str, Any]:
        """The object in a json file; an empty one if there is no file."""
        path = self.folder / name
        try:
            return dict(json.loads(path.read_text())) if path.is_file() else {}
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: not a whole json object ({error})") from None

    def arguments(self, name: str) -> dict[str, Any]:
        """The arguments of a run."""
        return self.json(f"{name}/config.json").get("arguments", {})

    def table(self, name: str, title: str) -> Table:
        """A table that another script wrote as csv; without rows if it is not there."""
        path = self.folder / name
        return title, list(csv.reader(path.read_text().splitlines())) if path.is_file() else []

    def image(self, name: str, what: str, kind: str) -> dict[str, Any] | None:
        """An image as a data URI, with its size and kind: "plot", "pixels" or "film". None, and noted, if missing."""
        path = self.folder / name
        if not path.is_file():
            self.missing.append([f"figure: {what}", f"not run ({name} is not there)"])
            return None
        try:
            with Image.open(path) as image:
                image.load()
                content, size, mime = path.read_bytes(), image.size, image.get_format_mimetype()
                if kind == "film" and len(content) > LARGEST_FILM:
                    image.seek(image.n_frames - 1)
                    image.convert("RGB").save(still := io.BytesIO(), "png")
                    content, mime, kind = still.getvalue(), "image/png", "pixels"
        except (OSError, SyntaxError):
            raise UserError(f"{path}: not a whole image") from None
        source = f"data:{mime};base64,{base64.b64encode(content).decode()}"
        return {"source": source, "width": size[0], "height": size[1], "kind": kind}

    def origin_of(self, score: dict[str, Any], flag: str) -> str:
        """The origin of the folder DATA_DIR/face/… that a score was given by `flag`."""
        folder = Path(score.get("arguments", {}).get(flag) or "")
        return self.origin(str(folder.parent.parent), "/".join(folder.parts[-2:])) if folder.name else UNKNOWN

    def origin(self, data_dir: str | None, *parts: str) -> str:
        """Where parts of the data come from: made.json tells, or the number of files does. Of several, the worst."""
        found = set()
        for part in parts:
            folder = ROOT / (data_dir or "") / part
            made = self.json(folder / "made.json") or self.json(folder.parent / "made.json")
            origin = SYNTHETIC if made.get("made_by") == "synthetic" else OTHER
            if not data_dir or not folder.is_dir():
                origin = UNKNOWN
            elif not made and all(
                sum(1 for _ in (ROOT / data_dir / one).glob("*.png")) == COURSE_COUNTS.get(one)
                for one in ({part, "face/train"} if part == "face/val" else {part})  # 2,025 others are soon found
            ):
                origin = COURSE
            self.origins[str(data_dir), part] = origin, made
            found.add(origin)
        return next((origin for origin in (SYNTHETIC, UNKNOWN, OTHER) if origin in found), COURSE)
