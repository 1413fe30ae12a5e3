"""Writing the course's layout: parts (digits/mnistm … face) that are there whole or not at all, csv, attributes."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.run import UserError, generator
from synthesis.digits import SPLITS
from synthesis.public import crop_face

MANIFEST = "made.json"  # in each part: the settings that made it


def is_finished(data_dir: Path, part: str, settings: dict[str, Any]) -> bool:
    """Whether the part was made with these very settings; UserError if something else is in its place."""
    folder = data_dir / part
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        made = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        made = None
    if made != settings:
        raise UserError(f"--data-dir {data_dir}: {part} holds other data ({made or 'not made here'}), remove it first")
    return True


def write_part(data_dir: Path, part: str, settings: dict[str, Any], fill: Callable[[Path], None]) -> None:
    """Have `fill(folder)` write a part into a hidden folder, then rename that to its place."""
    staging = data_dir / f".partial-{part.replace('/', '-')}"
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    try:
        staging.mkdir(parents=True)
        fill(staging)
        (staging / MANIFEST).write_text(json.dumps(settings) + "\n")
        (data_dir / part).parent.mkdir(exist_ok=True)
        staging.rename(data_dir / part)
    except OSError as error:
        raise UserError(f"--data-dir {data_dir}: {part} cannot be written ({error})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_labels(folder: Path, split: str, first: int, labels: Iterable[int]) -> None:
    """train.csv or val.csv; the images are numbered from `first` on."""
    rows = [f"{first + k:05d}.png,{label}\n" for k, label in enumerate(labels)]
    (folder / f"{split}.csv").write_text("image_name,label\n" + "".join(rows))


def write_attributes(folder: Path, names: Sequence[str], rows: Sequence[tuple[str, Sequence[int]]]) -> None:
    """CelebA's list_attr_celeba.txt: the number of rows, the attributes' names, then `image 1 -1 …`."""
    lines = [f"{image} " + " ".join(f"{value:2d}" for value in values) for image, values in rows]
    text = "\n".join([str(len(rows)), " ".join(names) + " ", *lines]) + "\n"
    (folder / "list_attr_celeba.txt").write_text(text)


def write_noises(folder: Path, seed: int, count: int = 10, size: int = 64) -> None:
    """00.pt, 01.pt, …: standard normal (1, 3, size, size), each of its own generator; names of one length."""
    folder.mkdir(exist_ok=True)
    digits = max(2, len(str(count - 1)))
    for k in range(count):
        noise = torch.randn((1, 3, size, size), generator=generator(seed, "face noise", k))
        torch.save(noise, folder / f"{k:0{digits}d}.pt")


def write_names(folder: Path, names: Sequence[str]) -> None:
    """id2label.json: class ids as strings, and the names."""
    (folder / "id2label.json").write_text(json.dumps({str(k): name for k, name in enumerate(names)}, indent=1) + "\n")


def save_image(image: np.ndarray, path: Path) -> None:
    Image.fromarray(image).save(path, compress_level=1)


def fill_digits(folder: Path, splits: Sequence[tuple[Iterable[np.ndarray], Sequence[int]]]) -> None:
    """Write data/, train.csv and val.csv from (images, labels) of train and of val; images uint8, grey or RGB."""
    (folder / "data").mkdir()
    first = 0
    for split, (images, labels) in zip(SPLITS, splits, strict=True):
        bar = tqdm(images, f"{folder.name} {split}", len(labels), leave=False, disable=None)
        for k, (image, _) in enumerate(zip(bar, labels, strict=True)):
            save_image(image, folder / "data" / f"{first + k:05d}.png")
        write_labels(folder, split, first, labels)
        first += len(labels)


def fill_faces(
    folder: Path, files: Sequence[Path], names: Sequence[str], values: np.ndarray, counts: Sequence[int]
) -> None:
    """Crop aligned CelebA images: the first counts[0] of `files` to train/, the next counts[1] to val/.

    values: (len(files), len(names)) attributes, 1 or -1.
    """
    rows = []
    for k, path in enumerate(tqdm(files[: sum(counts)], "face", leave=False, disable=None)):
        target = folder / ("train" if k < counts[0] else "val") / f"{k:05d}.png"
        target.parent.mkdir(exist_ok=True)
        with Image.open(path) as image:
            save_image(crop_face(image), target)
        rows.append((target.name, values[k].tolist()))
    write_attributes(folder, names, rows)
