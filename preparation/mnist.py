"""Reading MNIST's four idx files.

An idx file starts with 32-bit numbers, the highest byte first: a magic number (2051 for images,
2049 for labels), how many there are and, for images, their height and width. Then come the pixels
or the labels, a byte each.

LeCun et al., 1998, http://yann.lecun.com/exdb/mnist
"""

from __future__ import annotations

import gzip
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


def read_mnist(folder: Path, split: Literal["train", "t10k"]) -> tuple[np.ndarray, np.ndarray]:
    """MNIST's training or test images, uint8 (n, 28, 28), and their labels, uint8 (n,), 0 to 9.

    The files are SPLIT-images-idx3-ubyte and SPLIT-labels-idx1-ubyte, each as it is or as .gz.
    Raises UserError that names a file that is missing, cut short, or something else.
    """
    count = COUNTS[split]
    images = read_idx(folder, f"{split}-images-idx3-ubyte", (IMAGES, count, SIZE, SIZE))
    labels = read_idx(folder, f"{split}-labels-idx1-ubyte", (LABELS, count))
    if labels.max() > 9:
        raise UserError(f"{folder}/{split}-labels-idx1-ubyte: has the label {labels.max()}")
    return images, labels


def read_idx(folder: Path, name: str, expected: tuple[int, ...]) -> np.ndarray:
    """The content of an idx file in the shape of its header, uint8.

    `expected` is what the header must say: the magic number and the shape. Raises UserError.
    """
    path, content = read_plain_or_gz(folder, name)
    length = 4 * len(expected)
    if len(content) < length:
        raise UserError(f"{path}: is too short for an idx file")
    header = struct.unpack(f">{len(expected)}I", content[:length])
    if header != expected:
        raise UserError(
            f"{path}: starts with {words(header)} instead of {words(expected)} (magic number and "
            "shape of MNIST)"
        )
    values = np.frombuffer(content, np.uint8, offset=length)
    shape = header[1:]
    if len(values) != np.prod(shape):
        raise UserError(
            f"{path}: holds {len(values):,} bytes after its header instead of {np.prod(shape):,}"
        )
    return values.reshape(shape)


def read_plain_or_gz(folder: Path, name: str) -> tuple[Path, bytes]:
    """The path and the unpacked content of NAME or NAME.gz in a folder. Raises UserError."""
    plain = folder / name
    packed = folder / f"{name}.gz"
    if plain.is_file():
        return plain, plain.read_bytes()
    if not packed.is_file():
        raise UserError(f"--mnist {folder}: has neither {name} nor {packed.name}")
    try:
        return packed, gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error):
        raise UserError(f"{packed}: not a whole gzip file") from None


def words(numbers: tuple[int, ...]) -> str:
    """Numbers as in a sentence, without brackets."""
    return ", ".join(str(number) for number in numbers)
