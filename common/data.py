"""Reading the course's data: image folders and csv files become one uint8 tensor.

Images are decoded once, cached beside the output, and kept on the device. All scripts share one
normalisation and one way of drawing batches.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from common.cache import read_cached, write_cached
from common.cli import UserError, note_once
from common.names import is_folder_name, is_hidden, natural_order
from common.progress import show_progress
from common.rng import make_rng

if TYPE_CHECKING:
    from accelerate import Accelerator

DIGIT_DOMAINS = ("mnistm", "svhn", "usps")  # of the hand-out; load_digits reads others too
DIGIT_SIZE = (28, 28)
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
# Pictures that are not read; it is said how many there are.
OTHER_SUFFIXES = {".avif", ".eps", ".heic", ".heif", ".jp2", ".jxl", ".psd", ".svg", ".tga"}
# What image files may contain, whatever their names say. Pillow knows more formats; for one of them
# (EPS) it would run another program.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
Fit = Literal["crop", "squash", "pad"]  # what becomes of an image of another shape
CACHE_VERSION = 5  # raise it when decoding changes


class Images(NamedTuple):
    """Images uint8 (n, 3, height, width), labels int64 (n,) or None, and file names, in order."""

    pixels: torch.Tensor
    labels: torch.Tensor | None
    names: list[str]


def take(images: Images, rows: torch.Tensor) -> Images:
    """The labelled images of these rows, int64 (n,), in their order."""
    names = [images.names[row] for row in rows.tolist()]
    return Images(images.pixels[rows], labels_of(images)[rows], names)


def some_rows(count: int, most: int | None) -> torch.Tensor:
    """At most `most` of the rows 0 … count - 1 in a random but fixed order, int64; all for None."""
    return torch.randperm(count, generator=make_rng(0, "criteria"))[:most]


def take_some(images: Images, most: int | None) -> Images:
    """At most `most` of the labelled images, drawn at random but always the same; all for None."""
    if most is None:
        return images
    return take(images, some_rows(len(images.names), most))


# Pixels


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] → float32 in [-1, 1]; the only normalisation, for every domain."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1] → uint8, rounded; the inverse of `normalise`."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte()


def is_grey(pixels: torch.Tensor) -> bool:
    """Whether images (n, 3, height, width) have no colour."""
    return bool((pixels == pixels[:, :1]).all())


def labels_of(images: Images) -> torch.Tensor:
    """The labels of images that have some, int64 (n,)."""
    assert images.labels is not None
    return images.labels


# Files


def list_images(folder: Path, recursive: bool = False) -> list[Path]:
    """The image files in `folder` (and its sub-folders), in natural order, without hidden ones.

    If the folder has none of its own, but a single one of the folders below it has some, those are
    taken: archives often have one folder more than expected. Links are followed. Raises UserError
    for a folder that is missing or has no images.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    paths = []
    others = []
    for place in folders_below(folder) if recursive else [folder]:
        for path in place.iterdir():
            suffix = path.suffix.lower()
            if is_hidden(path.name) or path.is_dir():
                continue
            if suffix in SUFFIXES:
                paths.append(path)
            elif suffix in OTHER_SUFFIXES:
                others.append(path)
    if others:
        kinds = ", ".join(sorted({path.suffix.lower() for path in others}))
        note_once(f"{folder}: {len(others):,} files are left out, which cannot be read ({kinds})")
    if paths:
        return sorted(paths, key=natural_order)
    inner = [place for place in folders_below(folder) if not recursive and has_images(place)]
    if len(inner) == 1:
        note_once(f"{folder}: its images are in {inner[0]}")
        return list_images(inner[0])
    if inner:
        raise UserError(
            f"{folder}: contains no image itself, but {len(inner)} folders below it do, "
            f"as {inner[0]}"
        )
    raise UserError(f"{folder}: contains no image")


def folders_below(folder: Path) -> list[Path]:
    """`folder` and all folders below it that are not hidden.

    Links are followed, but no folder is there twice.
    """
    found = [folder]
    seen = {folder.resolve()}
    for parent in found:
        children = [child for child in parent.iterdir() if child.is_dir()]
        # Of a folder and a link to it, the folder itself is taken.
        children.sort(key=lambda child: (child.is_symlink(), natural_order(child)))
        for child in children:
            place = child.resolve()
            if not is_hidden(child.name) and place not in seen:
                seen.add(place)
                found.append(child)  # the loop comes to it later
    return found


def has_images(folder: Path) -> bool:
    """Whether images lie in the folder itself."""
    return any(
        path.suffix.lower() in SUFFIXES and not is_hidden(path.name) for path in folder.iterdir()
    )


def decode_image(path: Path, size: tuple[int, int] | None = None, fit: Fit = "crop") -> np.ndarray:
    """Read one image file as uint8 (3, height, width).

    Grey becomes three equal channels, palettes and CMYK become RGB, and what is transparent lies on
    white. A photograph is turned as its EXIF data says. With `size` (height, width) the image is
    resized (bicubic, antialiased): of one of another shape, `fit` says whether the largest centred
    part is taken, all of it is squashed, or all of it gets a black border. Raises UserError that
    names a file that is missing, broken, or grey with more than 8 bits.
    """
    if not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path}: no such file")
    try:
        with Image.open(path, formats=FORMATS) as file:
            kind = {"I": "16-bit", "F": "floating-point"}.get(file.mode[0])
            if kind:  # PIL would clip its values at 255
                raise UserError(f"{path}: is a {kind} image; only 8-bit images can be read")
            turn_upright(file)
            image = on_white(file, path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise UserError(f"{path}: not a whole image") from None
    if size is not None:
        height, width = size
        if image.width * height != image.height * width:
            note_once(
                f"{path}: is {image.width}x{image.height}; {FITS[fit]} for {width}x{height}",
                kind=f"another shape than {size}",
            )
        if image.size != (width, height):
            image = RESIZERS[fit](image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)  # (height, width, 3) → (3, height, width)


# The kinds of `fit`, what they do, and how it is said.
RESIZERS: dict[Fit, Callable[..., Image.Image]] = {
    "crop": ImageOps.fit,
    "squash": Image.Image.resize,
    "pad": ImageOps.pad,
}
FITS = {"crop": "its middle is cut out", "squash": "it is squashed", "pad": "it gets a border"}


def on_white(image: Image.Image, path: Path) -> Image.Image:
    """The image as RGB; what is transparent in it lies on white, as a browser shows it."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema() == (255, 255):  # nothing is transparent
        return image.convert("RGB")
    note_once(f"{path}: is transparent in part, which becomes white", kind="transparent")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def turn_upright(image: Image.Image) -> None:
    """Turn or mirror an image, in place, as the orientation in its EXIF data says.

    Damaged EXIF data is ignored.
    """
    with contextlib.suppress(Exception):  # it may raise anything, and the pixels are whole
        ImageOps.exif_transpose(image, in_place=True)


def decode_images(
    paths: list[Path], size: tuple[int, int] | None = None, fit: Fit = "crop"
) -> torch.Tensor:
    """Read image files as one uint8 tensor (n, 3, height, width), several at a time.

    Raises UserError that names a broken file, or one of another size than the first.
    """
    first = decode_image(paths[0], size, fit)
    pixels = np.empty((len(paths), *first.shape), dtype=np.uint8)
    chunk = 512

    def decode_some(start: int) -> None:
        for index in range(start, min(start + chunk, len(paths))):
            image = decode_image(paths[index], size, fit)
            if image.shape != first.shape:
                raise UserError(
                    f"{paths[index]}: is {size_of(image)}, but {paths[0].name} is {size_of(first)}"
                )
            pixels[index] = image

    # Threads that decode tiny images only wait for Python's global lock.
    workers = None if first.size > 3 * 32 * 32 else 1
    with ThreadPoolExecutor(workers) as pool:
        starts = range(0, len(paths), chunk)
        what = f"reading {paths[0].parent}, times {chunk} images"
        for _ in show_progress(pool.map(decode_some, starts), len(starts), what):
            pass
    return torch.from_numpy(pixels)


def size_of(image: np.ndarray) -> str:
    """The size of an image (3, height, width) in words, as "64x48" (width first)."""
    return f"{image.shape[2]}x{image.shape[1]}"


# Data sets


def load_digits(
    data_dir: Path,
    domain: str,
    split: str,
    cache_dir: Path | None = None,
    flag: str = "--data-dir",
    needs_labels: bool = True,
) -> Images:
    """Load a split ("train" or "val") of a digit domain, as 28x28 RGB.

    The 2024 hand-out has train.csv alone, which is split 80/20 by a fixed rule. Without
    `needs_labels` the csv files may have no column of labels. Raises UserError, which names `flag`
    or the file, if the domain is missing or broken.
    """
    if not is_folder_name(domain):
        raise UserError(f"{flag} {data_dir}: {domain!r} is not the name of a digit domain")
    folder = data_dir / "digits" / domain
    if not folder.is_dir():
        raise UserError(f"{flag} {data_dir}: has no digit domain '{domain}' (no folder {folder})")
    if (folder / "val.csv").is_file():
        paths, labels = read_labels(folder / f"{split}.csv", folder / "data", needs_labels)
    else:
        paths, labels = read_labels(folder / "train.csv", folder / "data", needs_labels)
        if len(paths) < 2:
            raise UserError(f"{folder / 'train.csv'}: one image cannot be split into train and val")
        train_rows, val_rows = split_80_20(len(paths))
        rows = val_rows if split == "val" else train_rows
        paths = [paths[row] for row in rows]
        labels = labels[rows] if labels is not None else None
    return decode_cached(paths, labels, DIGIT_SIZE, cache_dir, f"{domain}-{split}")


def read_labels(
    csv_file: Path, folder: Path, needs_labels: bool = True
) -> tuple[list[Path], torch.Tensor | None]:
    """Read a csv of `image_name,label` rows.

    Returns the image paths in `folder` and the labels, int64 (n,). Without `needs_labels` the file
    may have the column `image_name` alone; then there are no labels. Raises UserError that names
    the line of a bad row.
    """
    if not csv_file.is_file():
        raise UserError(f"{csv_file}: no such file")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    existing = {entry.name for entry in os.scandir(folder)}
    names = []
    labels = []
    header: list[str] = []
    for line, row in csv_rows(csv_file):
        where = f"{csv_file}: line {line}"
        if not header:
            header = row
            if header != ["image_name", "label"] and (needs_labels or header != ["image_name"]):
                raise UserError(f"{where} is {shortened(row)}, expected 'image_name,label'")
            continue
        if len(row) != len(header):
            raise UserError(f"{where} is {shortened(row)}, expected {','.join(header)!r}")
        name = row[0]
        if name not in existing:
            raise UserError(f"{where}: {name[:80]} is not in {folder}")
        names.append(name)
        if len(header) == 2:
            label = row[1]
            if not (label.isascii() and label.isdecimal() and len(label) < 9 and int(label) <= 9):
                raise UserError(f"{where}: label {label[:80]!r} of {name[:80]} is not a digit 0-9")
            labels.append(int(label))
    if not names:
        raise UserError(f"{csv_file}: lists no image")
    paths = [folder / name for name in names]
    return paths, torch.tensor(labels) if len(header) == 2 else None


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv file that are not empty, each with the number of its first line.

    Names of files that are no UTF-8 are kept as Python has them (surrogateescape). Raises UserError
    for a quote that nothing closes, and for a file without a row.
    """
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = csv.reader((line.replace("\0", "?") for line in file), strict=True)
        first = 1
        try:
            for row in rows:
                if row:
                    yield first, row
                first = rows.line_num + 1
        except csv.Error as error:
            what = f"is no row of a csv file ({error})"
            if "unexpected end" in str(error):
                what = "a quote opens here that nothing closes"
            if "field larger" in str(error):
                what = f"has more than {csv.field_size_limit():,} characters; is a quote left open?"
            raise UserError(f"{path}: line {first}: {what}") from None
    if first == 1:
        raise UserError(f"{path}: is empty")


def shortened(row: list[str]) -> str:
    """A row of a csv file in quotes, its end cut off if it is long."""
    text = ",".join(row)
    return repr(text if len(text) <= 80 else text[:80] + "…")


def split_80_20(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows for training and for validation: the first 80 % of a fixed permutation, and the rest."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    cut = count * 4 // 5
    return order[:cut].sort().values, order[cut:].sort().values


def load_folder(
    folder: Path,
    size: tuple[int, int] | None,
    cache_dir: Path | None = None,
    fit: Fit = "crop",
) -> Images:
    """Load all images of a folder, without labels, in natural order."""
    return decode_cached(list_images(folder), None, size, cache_dir, folder.name, fit)


def decode_cached(
    paths: list[Path],
    labels: torch.Tensor | None,
    size: tuple[int, int] | None,
    cache_dir: Path | None,
    name: str,
    fit: Fit = "crop",
) -> Images:
    """Decode the files, or read the tensor that an earlier run cached for them.

    A cache is used if folders, names, file sizes and times of change are the same, and if the
    first, the middle and the last image are those of the files. Hashing the contents of 56,000
    files would take longer than decoding them saves.
    """
    names = [path.name for path in paths]
    if cache_dir is None:
        return Images(decode_images(paths, size, fit), labels, names)
    key = cache_key(paths, size, fit)
    cache = cache_dir / f"{name}-{key}.safetensors"
    shape = (len(paths), 3, *(size or (None, None)))
    pixels = read_cached(cache, key, shape, torch.uint8)
    if pixels is None or not is_of_files(pixels, paths, size, fit):
        pixels = decode_images(paths, size, fit)
        write_cached(cache, key, pixels)
    return Images(pixels, labels, names)


def is_of_files(
    pixels: torch.Tensor, paths: list[Path], size: tuple[int, int] | None, fit: Fit
) -> bool:
    """Whether the first, the middle and the last of some images are those of the files."""
    for row in {0, len(paths) // 2, len(paths) - 1}:
        image = decode_image(paths[row], size, fit)
        if not np.array_equal(image, pixels[row].numpy()):
            return False
    return True


def cache_key(paths: list[Path], size: tuple[int, int] | None, fit: Fit) -> str:
    """Sixteen letters and digits that change with the files and with how they are decoded."""
    key = hashlib.sha256(json.dumps([CACHE_VERSION, size, fit]).encode())
    for folder, files in itertools.groupby(paths, key=lambda path: path.parent):
        stats = {entry.name: entry.stat() for entry in os.scandir(folder)}
        key.update(f"{folder.resolve()}\n".encode())
        for file in files:
            stat = stats[file.name]
            times = f"{stat.st_mtime_ns} {stat.st_ctime_ns}"  # no program can set the second one
            key.update(f"{file.name} {stat.st_size} {times}\n".encode())
    return key.hexdigest()[:16]


# Batches


def shuffled(count: int, start: int, size: int, *key: int | str) -> torch.Tensor:
    """Rows number start … start + size - 1 of an endless stream of shuffled passes over `count`.

    Any position can be asked for at any time, so a resumed run continues where it stopped. `key` is
    that of `make_rng`.
    """
    first_pass = start // count
    last_pass = (start + size - 1) // count
    passes = [
        torch.randperm(count, generator=make_rng(*key, number))
        for number in range(first_pass, last_pass + 1)
    ]
    offset = start - first_pass * count
    return torch.cat(passes)[offset : offset + size]


def draw_batch(
    count: int, step: int, batch_size: int, accelerator: Accelerator, *key: int | str
) -> torch.Tensor:
    """Rows of a step's batch, on the device: this process's share of `batch_size` rows."""
    rows = shuffled(count, step * batch_size, batch_size, *key)
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    return mine.to(accelerator.device)
