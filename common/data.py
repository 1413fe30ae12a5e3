"""Reading the course's data: folders and csv files → one uint8 tensor, decoded once, cached, kept on the device."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from accelerate import Accelerator
from PIL import Image

from common.run import UserError, atomic_write, generator

DIGIT_DOMAINS = ("mnistm", "svhn", "usps")
DIGIT_SIZE = (28, 28)
SUFFIXES = {".png", ".jpg", ".jpeg"}
CACHE_VERSION = 1  # raise it when decoding changes


class Images(NamedTuple):
    """Images as uint8 (n, 3, height, width), labels as int64 (n,) or None, and the file names, in that order."""

    pixels: torch.Tensor
    labels: torch.Tensor | None
    names: list[str]


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] → float32 in [-1, 1]. The one normalisation, for every domain."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1] → uint8, rounded; the inverse of `normalise`."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte()


def is_grey(pixels: torch.Tensor) -> bool:
    """Whether images (n, 3, height, width) have no colour."""
    return bool((pixels == pixels[:, :1]).all())


def list_images(folder: Path, recursive: bool = False) -> list[Path]:
    """PNG and JPEG files in `folder` (and its sub-folders), sorted, no hidden one. UserError if missing or empty."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    paths = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        paths += [Path(parent, n) for n in names if Path(n).suffix.lower() in SUFFIXES and not n.startswith(".")]
    if not paths:
        raise UserError(f"{folder}: no PNG or JPEG image in it")
    return sorted(paths)


def decode_image(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """One image file as uint8 (3, height, width): grey repeated, resized to (height, width) with antialias."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # PIL would clip the 16-bit values at 255
                raise UserError(f"{path}: is a 16-bit image; 8-bit ones are read")
            image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "not a whole image"
        raise UserError(f"{path}: {reason}") from None
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)  # (height, width, channels) → (channels, height, width)


def decode_images(paths: list[Path], size: tuple[int, int] | None = None) -> torch.Tensor:
    """Image files → uint8 (n, 3, height, width), decoded in parallel. UserError names a broken or odd-sized file."""
    first = decode_image(paths[0], size)
    pixels = np.empty((len(paths), *first.shape), dtype=np.uint8)

    def decode_some(start: int) -> None:
        for index in range(start, min(start + 512, len(paths))):
            image = decode_image(paths[index], size)
            if image.shape != first.shape:
                shape, expected = (f"{s[2]}x{s[1]}" for s in (image.shape, first.shape))
                raise UserError(f"{paths[index]}: is {shape}, {paths[0].name} is {expected}")
            pixels[index] = image

    workers = None if first.size > 3 * 32 * 32 else 1  # threads that decode tiny images wait for Python's lock only
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(decode_some, range(0, len(paths), 512)))
    return torch.from_numpy(pixels)


def read_labels(csv_file: Path, folder: Path) -> tuple[list[Path], torch.Tensor]:
    """A csv of `image_name,label` rows → image paths in `folder` and labels int64 (n,). UserError names a bad row."""
    if not csv_file.is_file():
        raise UserError(f"{csv_file}: no such file")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    there = {entry.name for entry in os.scandir(folder)}
    names, labels = [], []
    with csv_file.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.reader(line.replace("\0", "?") for line in file)
        if (header := next(rows, [])) != ["image_name", "label"]:
            raise UserError(f"{csv_file}: line 1 is {','.join(header)!r}, expected 'image_name,label'")
        for row in filter(None, rows):
            where = f"{csv_file}: line {rows.line_num}"
            if len(row) != 2:
                raise UserError(f"{where} is {','.join(row)!r}, expected 'image_name,label'")
            if not (row[1].isdecimal() and int(row[1]) <= 9):
                raise UserError(f"{where}: label {row[1]!r} of {row[0]} is not a digit 0-9")
            if row[0] not in there:
                raise UserError(f"{where}: {row[0]} is not in {folder}")
            names.append(row[0])
            labels.append(int(row[1]))
    if not names:
        raise UserError(f"{csv_file}: no image in it")
    return [folder / name for name in names], torch.tensor(labels)


def split_80_20(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Train and validation rows of a csv without a split (2024): the first 80 % of a fixed permutation, the rest."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    cut = count * 4 // 5
    return order[:cut].sort().values, order[cut:].sort().values


def load_digits(
    data_dir: Path, domain: str, split: str, cache_dir: Path | None = None, flag: str = "--data-dir"
) -> Images:
    """One split ("train" or "val") of a digit domain, as 28x28 RGB. UserError if it is missing or broken."""
    folder = data_dir / "digits" / domain
    if not folder.is_dir():
        raise UserError(f"{flag} {data_dir}: has no digit domain '{domain}' (no folder {folder})")
    if (folder / "val.csv").is_file():
        paths, labels = read_labels(folder / f"{split}.csv", folder / "data")
    else:  # 2024's layout: one csv, split by us
        paths, labels = read_labels(folder / "train.csv", folder / "data")
        if len(paths) < 2:
            raise UserError(f"{folder / 'train.csv'}: one image cannot be split into train and val")
        rows = split_80_20(len(paths))[split == "val"]
        paths, labels = [paths[row] for row in rows], labels[rows]
    return _cached(paths, labels, DIGIT_SIZE, cache_dir, f"{domain}-{split}")


def load_folder(folder: Path, size: tuple[int, int] | None, cache_dir: Path | None = None) -> Images:
    """All images of a folder, unlabelled, sorted by name."""
    return _cached(list_images(folder), None, size, cache_dir, folder.name)


def _cached(
    paths: list[Path], labels: torch.Tensor | None, size: tuple[int, int] | None, cache_dir: Path | None, name: str
) -> Images:
    """Decode `paths`, or read the tensor cached under the same names, sizes and times of change.

    Hashing what 56,000 files hold would take longer than the second that a cached start may take.
    """
    names = [path.name for path in paths]
    if cache_dir is None:
        return Images(decode_images(paths, size), labels, names)
    stats = {entry.name: entry.stat() for entry in os.scandir(paths[0].parent)}
    key = hashlib.sha256(json.dumps([CACHE_VERSION, size, str(paths[0].parent.resolve())]).encode())
    for file in names:
        key.update(f"{file} {stats[file].st_size} {stats[file].st_mtime_ns}\n".encode())
    cache = cache_dir / f"{name}-{key.hexdigest()[:16]}.safetensors"
    try:
        return Images(safetensors.torch.load_file(cache)["pixels"], labels, names)
    except (OSError, safetensors.SafetensorError):
        pixels = decode_images(paths, size)
    with contextlib.suppress(UserError):  # no room or no right to write there: the next start decodes again
        atomic_write(cache, lambda path: safetensors.torch.save_file({"pixels": pixels}, path))
    return Images(pixels, labels, names)


def shuffled(count: int, start: int, size: int, *key: int | str) -> torch.Tensor:
    """Indices number start … start + size - 1 of an endless stream of shuffled passes over `count` images.

    Any position can be asked for at any time, so a resumed run goes on where it stopped. `key` as in `generator`.
    """
    passes = range(start // count, (start + size - 1) // count + 1)
    order = torch.cat([torch.randperm(count, generator=generator(*key, number)) for number in passes])
    offset = start - passes[0] * count
    return order[offset : offset + size]


def draw_batch(count: int, step: int, batch_size: int, accelerator: Accelerator, *key: int | str) -> torch.Tensor:
    """Rows of a step's batch on the device: this process's share of a batch of `batch_size` over all processes."""
    rows = shuffled(count, step * batch_size, batch_size, *key)
    return rows[accelerator.process_index :: accelerator.num_processes].to(accelerator.device)
