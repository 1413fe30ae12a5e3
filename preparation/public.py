"""The course's 2022 layout from public data sets: how many images, which ones, and at what size.

The course's digit counts follow one rule. Of a data set's training and test images together, 80 %
are handed out (the rest is the graders' own test set), and of these 80 % are for training and 20 %
for validation. Which image went where is not known; here a permutation with a fixed seed decides.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from common.cli import UserError
from common.data import FORMATS, decode_image, list_images
from common.progress import show_progress
from preparation import mnist
from preparation.downloads import DownloadError, arrived, fetch, first_line
from preparation.layout import image_name, save_image, write_attributes, write_labels
from preparation.synthetic.digits import SIZE, SPLITS, mnistm_blend, random_patch

COURSE_FACES = (38464, 2025)  # train, val
BSDS_URL = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/BSR/BSR_bsds500.tgz"
FACE_CROP = 160  # pixels, the central square of CelebA's aligned images of 178x218
FACE_SIZE = 64


# Which images, and how they are changed


def split_rows(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows for train and val of a data set of `count` images, training and test images together.

    MNIST's 70,000 give 44,800 and 11,200, SVHN's 99,289 give 63,544 and 15,887, USPS's 9,298 give
    5,950 and 1,488.
    """
    used = count * 4 // 5
    train = used * 4 // 5
    order = np.random.default_rng(seed).permutation(count)
    return order[:train], order[train:used]


def make_mnistm(
    digits: np.ndarray, rows: np.ndarray, photos: Sequence[np.ndarray], seed: int
) -> Iterator[np.ndarray]:
    """MNIST-M from MNIST: |patch − digit| with a random 28x28 patch of a random photograph.

    Any ink of a digit counts as full ink. `digits` is uint8 (n, 28, 28), of which `rows` are made;
    `photos` are uint8 (height, width, 3) each, those of BSDS500 in the paper. Yields uint8
    (28, 28, 3) in the order of `rows`; the patch of a row depends on (seed, row) only.
    """
    for row in rows:
        patch = random_patch(photos, np.random.default_rng([seed, row]))
        ink = np.where(digits[row] > 0, np.uint8(255), np.uint8(0))
        yield mnistm_blend(ink, patch)


def resize_digits(images: np.ndarray) -> Iterator[np.ndarray]:
    """SVHN (n, 32, 32, 3) or USPS (n, 16, 16), uint8 → the same at 28x28, antialiased bicubic."""
    for image in images:
        yield np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def crop_face(image: Image.Image) -> np.ndarray:
    """The central square of an aligned CelebA image, resized to uint8 (64, 64, 3)."""
    left = (image.width - FACE_CROP) // 2
    top = (image.height - FACE_CROP) // 2
    square = image.convert("RGB").crop((left, top, left + FACE_CROP, top + FACE_CROP))
    return np.asarray(square.resize((FACE_SIZE, FACE_SIZE), Image.Resampling.LANCZOS))


# Writing the parts


def fill_part(folder: Path, part: str, raw_dir: Path, textures: Path | None, seed: int) -> None:
    """Write a part of the layout from torchvision's data sets in `raw_dir`.

    `textures` is the folder of photographs, which digits/mnistm alone needs.
    """
    if part == "face":
        files, names, values = load_celeba(raw_dir, seed)
        fill_faces(folder, files, names, values, COURSE_FACES)
        return
    domain = part.removeprefix("digits/")
    images, labels = load_digits(domain, raw_dir)
    photos = []
    if domain == "mnistm" and textures is not None:
        photos = read_photos(textures)
    splits = []
    for rows in split_rows(len(labels), seed):
        if domain == "mnistm":
            made = make_mnistm(images, rows, photos, seed)
        else:
            made = resize_digits(images[rows])
        splits.append((made, labels[rows].tolist()))
    fill_digits(folder, splits)


def fill_digits(folder: Path, splits: Sequence[tuple[Iterable[np.ndarray], Sequence[int]]]) -> None:
    """Write data/, train.csv and val.csv.

    `splits` are the images (uint8, grey or RGB) and the labels of train and of val.
    """
    (folder / "data").mkdir()
    first = 0
    for split, (images, labels) in zip(SPLITS, splits, strict=True):
        shown = show_progress(images, len(labels), f"{folder.name} {split}, images")
        for number, image in enumerate(shown, first):
            save_image(image, folder / "data" / image_name(number))
        write_labels(folder, split, first, labels)
        first += len(labels)


def fill_faces(
    folder: Path,
    files: Sequence[Path],
    names: Sequence[str],
    values: np.ndarray,
    counts: Sequence[int],
) -> None:
    """Crop aligned CelebA images: the first counts[0] to train/, the next counts[1] to val/.

    `values` are the attributes (len(files), len(names)), 1 or -1.
    """
    rows = []
    chosen = files[: sum(counts)]
    for number, path in enumerate(show_progress(chosen, len(chosen), "face, images")):
        split = "train" if number < counts[0] else "val"
        target = folder / split / image_name(number)
        target.parent.mkdir(exist_ok=True)
        with Image.open(path, formats=FORMATS) as image:
            save_image(crop_face(image), target)
        rows.append((target.name, values[number].tolist()))
    write_attributes(folder, names, rows)


# Reading the data sets


def read_photos(folder: Path) -> list[np.ndarray]:
    """The photographs in a folder, uint8 (height, width, 3).

    Raises UserError for one that is smaller than a digit.
    """
    photos = []
    for path in list_images(folder):
        photo = decode_image(path).transpose(1, 2, 0)  # → (height, width, 3)
        if min(photo.shape[:2]) < SIZE:
            raise UserError(f"{path}: a texture needs at least {SIZE}x{SIZE} pixels; remove it")
        photos.append(photo)
    return photos


def load_digits(domain: str, raw_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Training and test images of MNIST (for mnistm), SVHN or USPS, read with torchvision.

    They are downloaded if they are not in `raw_dir`. Returns uint8 (n, height, width[, 3]) and
    labels int64 (n,). Raises UserError that says what to fetch by hand if the download fails, and
    for a file that is another than the published one.
    """
    try:
        if domain == "mnistm":
            return load_mnist(raw_dir)
        if domain == "usps":
            return load_usps(raw_dir)
        return load_svhn(raw_dir)
    except (DownloadError, OSError, EOFError, RuntimeError) as error:
        raise UserError(how_to_fetch(domain, raw_dir, error)) from None


def load_mnist(raw_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """MNIST's images uint8 (70000, 28, 28) and their labels.

    Files that are there need not have the published MD5, because some mirrors compress them again.
    Raises UserError for a file that is not MNIST's.
    """
    from torchvision import datasets  # takes two seconds to import

    folder = raw_dir / "MNIST" / "raw"
    for name, md5 in datasets.MNIST.resources:
        if mnist.find_file(folder, name.removesuffix(".gz")) is None:
            fetch_from_any(folder / name, md5, [mirror + name for mirror in datasets.MNIST.mirrors])
    train_images, train_labels = mnist.read_mnist(folder, "train")
    test_images, test_labels = mnist.read_mnist(folder, "t10k")
    labels = np.concatenate([train_labels, test_labels]).astype(np.int64)
    return np.concatenate([train_images, test_images]), labels


def fetch_from_any(target: Path, md5: str, urls: Sequence[str]) -> None:
    """Download a file from the first address that has it.

    What one server has begun, the same one continues: another may have packed the file differently.
    Raises the last one's DownloadError.
    """
    for url in urls[:-1]:
        try:
            fetch(target, md5, url)
        except DownloadError as error:
            if arrived(target):
                raise
            print(f"warning: {url}: {error}; trying another server", file=sys.stderr)
        else:
            return
    fetch(target, md5, urls[-1])


def load_usps(raw_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """USPS's images uint8 (9298, 16, 16) and their labels."""
    from torchvision import datasets

    folder = raw_dir / "usps"
    parts = []
    for split in ("train", "test"):
        url, name, md5 = datasets.USPS.split_list[split]
        fetch(folder / name, md5, url)
        parts.append(datasets.USPS(folder, train=split == "train"))
    train, test = parts
    images = np.concatenate([np.asarray(train.data), np.asarray(test.data)])
    return images, np.concatenate([np.asarray(train.targets), np.asarray(test.targets)])


def load_svhn(raw_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """SVHN's images uint8 (99289, 32, 32, 3) and their labels."""
    from torchvision import datasets

    folder = raw_dir / "svhn"
    parts = []
    for split in ("train", "test"):
        url, name, md5 = datasets.SVHN.split_list[split]
        fetch(folder / name, md5, url)
        parts.append(datasets.SVHN(folder, split))
    train, test = parts
    images = np.concatenate([train.data, test.data])  # (n, 3, 32, 32)
    return images.transpose(0, 2, 3, 1), np.concatenate([train.labels, test.labels])


def load_celeba(raw_dir: Path, seed: int) -> tuple[list[Path], list[str], np.ndarray]:
    """CelebA's image files in an order fixed by the seed, and their attributes.

    Returns the files, the names of the attributes, and their values (n, 40), 1 or -1.
    """
    from torchvision import datasets

    folder = raw_dir / "celeba"
    images = folder / "img_align_celeba"
    try:
        for drive_id, md5, name in datasets.CelebA.file_list:
            if not (name == "img_align_celeba.zip" and images.exists()):  # it may be removed then
                fetch(folder / name, md5, f"https://drive.google.com/uc?id={drive_id}")
        with removed_on_failure(images):
            celeba = datasets.CelebA(raw_dir, split="all", target_type="attr", download=True)
    except (DownloadError, OSError, RuntimeError) as error:
        raise UserError(how_to_fetch("face", raw_dir, error)) from None
    order = np.random.default_rng(seed).permutation(len(celeba.filename))
    files = [images / celeba.filename[row] for row in order]
    names = [name for name in celeba.attr_names if name]
    values = celeba.attr.numpy()[order] * 2 - 1  # 0 or 1 → -1 or 1
    return files, names, values


@contextlib.contextmanager
def removed_on_failure(folder: Path) -> Iterator[None]:
    """Remove a folder that appears before an error or Ctrl-C.

    torchvision unpacks into it, and would take half of the images for all of them.
    """
    is_new = not folder.exists()
    try:
        yield
    except BaseException:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def how_to_fetch(part: str, raw_dir: Path, error: Exception) -> str:
    """One line that says what to fetch by hand and where to put it."""
    needed = {
        "mnistm": "MNIST's four *-ubyte.gz files into MNIST/raw",
        "svhn": "train_32x32.mat and test_32x32.mat of "
        "http://ufldl.stanford.edu/housenumbers into svhn",
        "usps": "usps.bz2 and usps.t.bz2 of "
        "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets into usps",
        "face": "CelebA's img_align_celeba.zip and the five *_celeba.txt files into celeba",
    }
    return (
        f"{part}: the download failed ({first_line(error)}); the same command continues it, or "
        f"put {needed[part]} under --raw-dir {raw_dir}"
    )
