"""Writing the course's layout: its parts, csv files, attributes and noises.

A part (digits/mnistm, …, face) is written into a hidden folder first, so that it is there whole or
not at all.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from common.cli import UserError
from common.json_files import read_json
from common.rng import make_rng

CONCEPT_IMAGES = 5  # of each concept that textual inversion learns
MANIFEST = "made.json"  # in each part: the settings that made it


def is_finished(data_dir: Path, part: str, settings: dict[str, Any]) -> bool:
    """Whether the part was made with exactly these settings.

    Raises UserError if something else is in its place.
    """
    folder = data_dir / part
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        made = read_json(folder / MANIFEST)
    except UserError:
        made = None
    if made != settings:
        found = made or "not made by this script"
        raise UserError(
            f"--data-dir {data_dir}: {part} holds other data ({found}); remove it first"
        )
    return True


@contextlib.contextmanager
def new_part(data_dir: Path, part: str, settings: dict[str, Any]) -> Iterator[Path]:
    """Give an empty hidden folder to write a part into, which is then renamed to its place.

    If anything goes wrong the hidden folder is removed. Raises UserError for a full disk and the
    like.
    """
    staging = data_dir / f".partial-{part.replace('/', '-')}"
    shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed
    try:
        staging.mkdir(parents=True)
        yield staging
        (staging / MANIFEST).write_text(json.dumps(settings) + "\n")
        (data_dir / part).parent.mkdir(exist_ok=True)
        staging.rename(data_dir / part)
    except OSError as error:
        raise UserError(f"--data-dir {data_dir}: {part} cannot be written ({error})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def image_name(number: int) -> str:
    """The file name of an image of the digits or faces, e.g. 00042.png."""
    return f"{number:05d}.png"


def save_image(image: np.ndarray, path: Path) -> None:
    """Write uint8 (height, width) or (height, width, 3) as PNG."""
    Image.fromarray(image).save(path, compress_level=1)


def write_labels(folder: Path, split: str, first: int, labels: Iterable[int]) -> None:
    """Write train.csv or val.csv for images that are numbered from `first` on."""
    lines = ["image_name,label\n"]
    for number, label in enumerate(labels, first):
        lines.append(f"{image_name(number)},{label}\n")
    (folder / f"{split}.csv").write_text("".join(lines))


def write_attributes(
    folder: Path, names: Sequence[str], rows: Sequence[tuple[str, Sequence[int]]]
) -> None:
    """Write list_attr_celeba.txt as CelebA has it.

    The number of rows, the attributes' names, then `image 1 -1 …` for each row (image, values).
    """
    lines = [str(len(rows)), " ".join(names) + " "]
    for image, values in rows:
        cells = [f"{value:2d}" for value in values]
        lines.append(f"{image} " + " ".join(cells))
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")


def write_captions(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write metadata.jsonl: a line {"file_name": …, "text": …, …} for each image.

    Hugging Face's `imagefolder` data sets have the same file.
    """
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metadata.jsonl").write_text("".join(lines))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file of json that people read."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_names(folder: Path, names: Sequence[str]) -> None:
    """Write id2label.json, which maps class ids (as strings) to names."""
    id_to_label = {str(number): name for number, name in enumerate(names)}
    (folder / "id2label.json").write_text(json.dumps(id_to_label, indent=1) + "\n")


def write_noises(folder: Path, seed: int, count: int = 10, size: int = 64) -> None:
    """Write 00.pt, 01.pt, …: standard normal noise (1, 3, size, size).

    Noise k depends on the seed, k and the size only. The names have one length.
    """
    folder.mkdir(exist_ok=True)
    digits = max(2, len(str(count - 1)))
    for number in range(count):
        rng = make_rng(seed, "face noise", number)
        noise = torch.randn((1, 3, size, size), generator=rng)
        torch.save(noise, folder / f"{number:0{digits}d}.pt")
