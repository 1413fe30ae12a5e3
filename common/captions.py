"""Captioned images: a folder with metadata.jsonl, as Hugging Face's `imagefolder` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from common.cli import UserError
from common.data import decode_cached
from common.json_files import FileError, parse_json, read_text


def read_captioned(folder: Path, size: int, cache_dir: Path | None) -> tuple[Tensor, list[str]]:
    """Images, uint8 (n, 3, size, size), and their captions.

    Raises UserError that names the file and the line for anything but {"file_name": …, "text": …}.
    """
    rows = read_metadata(folder)
    paths = paths_of(folder, rows)
    images = decode_cached(paths, None, (size, size), cache_dir, "captioned")
    return images.pixels, [row["text"] for row in rows]


def paths_of(folder: Path, rows: list[dict[str, Any]]) -> list[Path]:
    """The image of each row. Raises UserError for one that is not there."""
    paths = [folder / row["file_name"] for row in rows]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{folder / 'metadata.jsonl'}: names {path.name}, which is not there")
    return paths


def read_metadata(folder: Path) -> list[dict[str, Any]]:
    """The lines of FOLDER/metadata.jsonl. Raises UserError for a line without image or caption."""
    file = folder / "metadata.jsonl"
    if not file.exists():
        raise UserError(f"{file}: no such file; it gives each image's caption")
    lines = read_text(file).split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(read_line(line, f"{file}, line {number}"))
    if not rows:
        raise UserError(f"{file}: has no line")
    return rows


def read_line(line: str, where: str) -> dict[str, Any]:
    """One line as a dictionary. The image must lie in the folder itself."""
    try:
        row = parse_json(line)
        name = row["file_name"]
        text = row["text"]
    except (FileError, KeyError, TypeError):
        raise UserError(f'{where}: not of the form {{"file_name": …, "text": …}}') from None
    if not isinstance(name, str) or not isinstance(text, str):
        raise UserError(f"{where}: file_name and text must be strings")
    if Path(name).name != name:
        raise UserError(f"{where}: file_name {name!r} is not the name of a file in the folder")
    return row
