"""Labelled digits in the formats in which people have them.

idx files (MNIST and its relatives), SVHN's train_32x32.mat, USPS as usps.bz2 or usps.h5, and a
folder for each digit.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.cli import UserError
from common.data import DIGIT_SIZE, decode_image, list_images
from common.progress import show_progress
from preparation import mnist
from preparation.downloads import first_line
from preparation.public import resize_digits

MOST_DIGITS = 2_000_000  # in a file
LARGEST_SIDE = 256  # in pixels, in an idx file
USPS_SIDE = 16
VAL_NAMES = ("val", "valid", "validation", "test", "t10k")
IDX_IMAGES = re.compile(r"(.+)-images[-.]idx3-ubyte(\.gz)?")


class Digits(NamedTuple):
    """The images of a split, uint8 (n, height, width) or (n, height, width, 3), and their labels.

    The labels are int64 (n,), 0 to 9.
    """

    images: np.ndarray
    labels: np.ndarray


class Source(NamedTuple):
    """What was found: the name that the domain usually has, and one or two splits.

    There is no name for what could be anything. `val` is None if there is one split only.
    """

    domain: str | None
    train: Digits
    val: Digits | None


def read_digits(source: Path, domain: str | None = None) -> Source:
    """Read a file of digits, or a folder with a training and perhaps a validation or test file.

    Four files with MNIST's names must be MNIST's, unless `domain` is another name: Fashion-MNIST
    and others use the names too. Raises UserError that names a missing, damaged or unknown file.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if source.is_file():
        reader = reader_of(source)
        if reader is None:
            raise UserError(
                f"{source}: not one of the known files of digits (*-images-idx3-ubyte, *.mat, "
                "*.bz2, *.h5), and not a folder"
            )
        return reader(source)
    has_mnist_names = any(mnist.find_file(source, name) for name in mnist.FILES)
    if has_mnist_names and domain in (None, "mnist"):
        return read_mnist(source)
    files = [path for path in sorted(source.iterdir()) if reader_of(path) is not None]
    packed_too = {path.with_name(f"{path.name}.gz") for path in files}
    files = [path for path in files if path not in packed_too]
    if not files:
        return read_folders(source)
    return read_split_files(source, files)


def reader_of(path: Path) -> Callable[[Path], Source] | None:
    """The function that reads a file of this name."""
    if IDX_IMAGES.fullmatch(path.name):
        return read_idx
    readers = {".mat": read_svhn, ".bz2": read_libsvm, ".h5": read_h5, ".hdf5": read_h5}
    return readers.get(path.suffix.lower()) if path.is_file() else None


def read_split_files(folder: Path, files: list[Path]) -> Source:
    """Read the file for training in a folder and, if there is one, that for validation or testing.

    Raises UserError if it is not clear which is which.
    """
    if len(files) == 1:
        return read_digits(files[0])
    val = [path for path in files if is_for_validation(path.name)]
    train = [path for path in files if path not in val and not path.name.startswith("extra")]
    if len(train) != 1 or len(val) > 1:
        names = ", ".join(path.name for path in files)
        raise UserError(f"{folder}: has several files of digits ({names}); name one of them")
    first = read_digits(train[0])
    if not val:
        return first
    return first._replace(val=read_digits(val[0]).train)


def is_for_validation(name: str) -> bool:
    """Whether a file is for validation or testing by its name.

    Such as test_32x32.mat, usps.t.bz2 and emnist-digits-test-images-idx3-ubyte.
    """
    name = name.lower()
    return name.startswith(VAL_NAMES) or ".t." in name or "-test-" in name


def split(digits: Digits, share: float, seed: int) -> tuple[Digits, Digits]:
    """Digits for training and, chosen by the seed, a share of them for validation.

    Raises UserError if there are too few.
    """
    count = len(digits.labels)
    val_count = round(share * count)
    if not 0 < val_count < count:
        raise UserError(f"--val {share:g}: of {count:,} digits, one split would be empty")
    order = np.random.default_rng(seed).permutation(count)
    val = np.sort(order[:val_count])
    train = np.sort(order[val_count:])
    return (
        Digits(digits.images[train], digits.labels[train]),
        Digits(digits.images[val], digits.labels[val]),
    )


def at_size(images: np.ndarray) -> Iterable[np.ndarray]:
    """Images (n, height, width[, 3]) at 28x28, as they are if they have that size."""
    return images if images.shape[1:3] == DIGIT_SIZE else resize_digits(images)


# One reader for each format


def read_mnist(folder: Path) -> Source:
    """MNIST's four files."""
    train = Digits(*mnist.read_mnist(folder, "train"))
    val = Digits(*mnist.read_mnist(folder, "t10k"))
    return Source("mnist", train, val)


def read_idx(path: Path) -> Source:
    """An idx file of images, and the one of labels beside it."""
    shape = idx_shape(path)
    count, height, width = shape
    if not 1 <= count <= MOST_DIGITS or not 1 <= max(height, width) <= LARGEST_SIDE:
        raise UserError(f"{path}: its header says {count:,} images of {width}x{height}")
    name = path.name.removesuffix(".gz").replace("-images", "-labels").replace("idx3", "idx1")
    label_file = mnist.find_file(path.parent, name)
    if label_file is None:
        raise UserError(f"{path}: its labels are missing ({name}, as it is or as .gz)")
    images = mnist.read_idx(path, (mnist.IMAGES, *shape))
    if path.name.startswith("emnist-"):  # its images are stored with rows and columns exchanged
        images = images.transpose(0, 2, 1)
    labels = mnist.read_idx(label_file, (mnist.LABELS, count))
    return Source(None, checked(images, labels, label_file), None)


def idx_shape(path: Path) -> tuple[int, int, int]:
    """Count, height and width in the header of an idx file of images. Raises UserError."""
    start = mnist.read_start(path, 16)
    if len(start) < 16:
        raise UserError(f"{path}: is too short for an idx file")
    magic, count, height, width = struct.unpack(">4I", start)
    if magic != mnist.IMAGES:
        raise UserError(f"{path}: starts with {magic} instead of {mnist.IMAGES}, as idx images do")
    return count, height, width


def read_svhn(path: Path) -> Source:
    """SVHN's train_32x32.mat or test_32x32.mat: X (32, 32, 3, n), y with 10 for the digit 0."""
    from scipy.io import loadmat

    try:
        content = loadmat(path, variable_names=["X", "y"])
    except Exception as error:  # scipy lets many kinds of error through
        raise UserError(f"{path}: not a whole .mat file ({first_line(error)})") from None
    images = content.get("X")
    labels = content.get("y")
    if images is None or labels is None:
        raise UserError(f"{path}: has no X and y, as SVHN's train_32x32.mat has")
    if images.ndim != 4 or images.shape[2] != 3 or images.dtype != np.uint8:
        raise UserError(f"{path}: X must be uint8 (height, width, 3, n), not {images.shape}")
    labels = np.asarray(labels).reshape(-1)
    if labels.dtype.kind in "iuf":
        labels = np.where(labels == 10, 0, labels)
    return Source("svhn", checked(images.transpose(3, 0, 1, 2), labels, path), None)


def read_libsvm(path: Path) -> Source:
    """usps.bz2 or usps.t.bz2 of the LIBSVM collection: pixels from -1 to 1, labels from 1 to 10."""
    from sklearn.datasets import load_svmlight_file

    try:
        rows, labels = load_svmlight_file(str(path), n_features=USPS_SIDE**2)
    except Exception as error:  # bz2, numpy and scikit-learn have errors of their own
        raise UserError(f"{path}: not a whole LIBSVM file ({first_line(error)})") from None
    images = (rows.toarray() + 1) / 2
    return Source("usps", of_usps(images, labels - 1, path), None)


def read_h5(path: Path) -> Source:
    """usps.h5: the groups train and test, with data (n, 256) from 0 to 1 and target (n,)."""
    try:
        import h5py  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"{path}: reading .h5 needs a package: pip install h5py; usps.bz2 of LIBSVM needs none"
        ) from None
    splits: dict[str, Digits | None] = {"train": None, "test": None}
    try:
        with h5py.File(path, "r") as file:
            content: Any = file
            for split in splits:
                if split in content:
                    images = np.asarray(content[split]["data"])
                    labels = np.asarray(content[split]["target"])
                    splits[split] = of_usps(images, labels, path)
    except (OSError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"{path}: not an .h5 file of USPS ({first_line(error)})") from None
    train = splits["train"]
    if train is None:
        raise UserError(f"{path}: has no group train with data and target")
    return Source("usps", train, splits["test"])


def of_usps(images: np.ndarray, labels: np.ndarray, path: Path) -> Digits:
    """Check 16x16 images (n, 256) from 0 to 1, and turn them into bytes."""
    if images.ndim != 2 or images.shape[1] != USPS_SIDE**2:
        raise UserError(f"{path}: its images must have {USPS_SIDE**2} pixels each (16x16)")
    if not (np.isfinite(images).all() and images.min() >= -1e-3 and images.max() <= 1.001):
        raise UserError(f"{path}: its pixels are not in the range of USPS")
    pixels = np.rint(images.clip(0, 1) * 255).astype(np.uint8)
    return checked(pixels.reshape(-1, USPS_SIDE, USPS_SIDE), labels, path)


def read_folders(folder: Path) -> Source:
    """A folder for each digit, DIGIT/*.png, or the same in train/ and in val/ or test/."""
    names = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    if "train" not in names:
        return Source(None, read_class_folders(folder), None)
    found = [names[name] for name in VAL_NAMES if name in names]
    val = read_class_folders(found[0]) if found else None
    return Source(None, read_class_folders(names["train"]), val)


def read_class_folders(folder: Path) -> Digits:
    """The images of the folders 0 to 9, resized to 28x28."""
    paths = []
    labels = []
    for digit in range(10):
        inner = folder / str(digit)
        if inner.is_dir():
            found = list_images(inner)
            paths += found
            labels += [digit] * len(found)
    if not paths:
        raise UserError(
            f"{folder}: has no known file of digits (idx, .mat, .bz2, .h5), and no folder for each "
            "digit (0/*.png to 9/*.png)"
        )
    images = [
        decode_image(path, DIGIT_SIZE).transpose(1, 2, 0)  # → (28, 28, 3)
        for path in show_progress(paths, len(paths), f"{folder}, images")
    ]
    return Digits(np.stack(images), np.array(labels))


def checked(images: np.ndarray, labels: np.ndarray, path: Path) -> Digits:
    """Images with their labels. Raises UserError for other counts, and labels beyond 0 to 9."""
    labels = np.asarray(labels).reshape(-1)
    if labels.dtype.kind not in "iuf":
        raise UserError(f"{path}: its labels are no numbers")
    if len(labels) != len(images):
        raise UserError(f"{path}: has {len(images):,} images and {len(labels):,} labels")
    if len(images) > MOST_DIGITS:
        raise UserError(f"{path}: has more than {MOST_DIGITS:,} images")
    if len(labels) == 0:
        raise UserError(f"{path}: has no image")
    for label in np.unique(labels):
        if label not in range(10):
            raise UserError(f"{path}: has the label {label:g}")
    return Digits(images, labels.astype(np.int64))
