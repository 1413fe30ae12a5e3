"""Reading MNIST's four idx files.

An idx file starts with 32-bit numbers, the highest byte first: a magic number (2051 for images,
2049 for labels), how many there are and, for images, their height and width. Then come the pixels
or the labels, a byte each.

LeCun et al., 1998, http://yann.lecun.com/exdb/mnist
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Literal

import numpy as np

from common.cli import UserError

IMAGES = 2051  # the magic numbers
LABELS = 2049
COUNTS = {"train": 60_000, "t10k": 10_000}
SIZE = 28
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def read_mnist(folder: Path, split: Literal["train", "t10k"]) -> tuple[np.ndarray, np.ndarray]:
    """MNIST's training or test images, uint8 (n, 28, 28), and their labels, uint8 (n,), 0 to 9.

    The files are SPLIT-images-idx3-ubyte and SPLIT-labels-idx1-ubyte, each as it is or as .gz.
    Raises UserError that names a file that is missing, cut short, too long, or something else.
    """
    count = COUNTS[split]
    image_file = required(folder, f"{split}-images-idx3-ubyte")
    label_file = required(folder, f"{split}-labels-idx1-ubyte")
    images = read_idx(image_file, (IMAGES, count, SIZE, SIZE))
    labels = read_idx(label_file, (LABELS, count))
    if labels.max() > 9:
        raise UserError(f"{label_file}: has the label {labels.max()}")
    return images, labels


def find_file(folder: Path, name: str) -> Path | None:
    """NAME or NAME.gz in a folder, or None."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def required(folder: Path, name: str) -> Path:
    """NAME or NAME.gz in a folder. Raises UserError if neither is there."""
    path = find_file(folder, name)
    if path is None:
        raise UserError(f"{folder}: has neither {name} nor {name}.gz")
    return path


def read_idx(path: Path, expected: tuple[int, ...]) -> np.ndarray:
    """The content of an idx file, packed or not, in the shape of its header, uint8.

    `expected` is what the header must say: the magic number and the shape. No more than that is
    read or unpacked. Raises UserError.
    """
    length = 4 * len(expected)
    shape = expected[1:]
    size = math.prod(shape)
    content = read_start(path, length + size + 1)
    if len(content) < length:
        raise UserError(f"{path}: is too short for an idx file")
    header = struct.unpack(f">{len(expected)}I", content[:length])
    if header != expected:
        raise UserError(
            f"{path}: starts with {words(header)} instead of {words(expected)} (magic number and "
            "shape)"
        )
    found = len(content) - length
    if found > size:
        raise UserError(f"{path}: holds more than {size:,} bytes after its header")
    if found < size:
        raise UserError(f"{path}: holds {found:,} bytes after its header instead of {size:,}")
    return np.frombuffer(content, np.uint8, offset=length).reshape(shape)


def read_start(path: Path, count: int) -> bytes:
    """Up to `count` bytes of a file, of what is in it if it is a .gz. Raises UserError."""
    if path.suffix != ".gz":
        with path.open("rb") as file:
            return file.read(count)
    try:
        with gzip.open(path) as file:
            return file.read(count)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise UserError(f"{path}: not a whole gzip file") from None


def words(numbers: tuple[int, ...]) -> str:
    """Numbers as in a sentence, without brackets."""
    return ", ".join(str(number) for number in numbers)
