"""The course's 2022 layout from public data sets: how many images, which ones, and at what size.

The course's digit counts are those of one rule: 80 % of a data set's training and test images together (the rest is the
graders' own test set), of which again 80 % train and 20 % validate. Which images fell where is not known; here a
permutation with a fixed seed decides. The functions work on arrays, whatever file they came from.
"""

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from common.run import UserError, atomic_write
from synthesis.digits import SIZE, mnistm_blend, random_patch

COURSE_FACES = (38464, 2025)  # train, val
BSDS_URL = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/BSR/BSR_bsds500.tgz"
FACE_CROP, FACE_SIZE = 160, 64  # CelebA's aligned images are 178x218


def split_rows(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows for train and val of a data set of `count` images, training and test images together.

    MNIST's 70,000 give 44,800 and 11,200, SVHN's 99,289 give 63,544 and 15,887, USPS's 9,298 give 5,950 and 1,488.
    """
    used = count * 4 // 5
    train = used * 4 // 5
    order = np.random.default_rng(seed).permutation(count)
    return order[:train], order[train:used]


def make_mnistm(digits: np.ndarray, rows: np.ndarray, photos: list[np.ndarray], seed: int) -> Iterator[np.ndarray]:
    """MNIST-M from MNIST: |patch − digit| with a random 28x28 patch of a random photograph for each digit,
    any ink of which counts as full ink.

    digits: uint8 (n, 28, 28), of which `rows` are made. photos: uint8 (height, width, 3) each; BSDS500 in the paper.
    Yields uint8 (28, 28, 3) in the order of `rows`; the patch of a row depends on (seed, row) only.
    """
    for row in rows:
        patch = random_patch(photos, np.random.default_rng([seed, row]))
        yield mnistm_blend(np.where(digits[row] > 0, np.uint8(255), np.uint8(0)), patch)


def resize_digits(images: np.ndarray) -> Iterator[np.ndarray]:
    """SVHN (n, 32, 32, 3) or USPS (n, 16, 16), uint8 → the same at 28x28, antialiased bicubic."""
    for image in images:
        yield np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def crop_face(image: Image.Image) -> np.ndarray:
    """An aligned CelebA image (178x218): its central square of 160, resized to uint8 (64, 64, 3)."""
    left, top = (image.width - FACE_CROP) // 2, (image.height - FACE_CROP) // 2
    square = image.convert("RGB").crop((left, top, left + FACE_CROP, top + FACE_CROP))
    return np.asarray(square.resize((FACE_SIZE, FACE_SIZE), Image.Resampling.LANCZOS))


def load_digits(domain: str, raw_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Training and test images of MNIST (for mnistm), SVHN or USPS by torchvision, downloaded if not in raw_dir.

    Returns uint8 (n, height, width[, 3]) and labels int64 (n,). UserError if they cannot be had.
    """
    from torchvision import datasets  # slow to import: only where it is needed

    try:
        if domain == "svhn":
            halves = [datasets.SVHN(raw_dir / "svhn", split, download=True) for split in ("train", "test")]
            images = np.concatenate([half.data for half in halves]).transpose(0, 2, 3, 1)  # → (n, 32, 32, 3)
            return images, np.concatenate([half.labels for half in halves])
        for packed in (raw_dir / "MNIST" / "raw").glob("*-ubyte.gz"):  # mirrors pack them anew: torchvision would
            if not packed.with_suffix("").exists():  # refuse their checksums, but takes the files inside
                atomic_write(packed.with_suffix(""), gzip.decompress(packed.read_bytes()))
        data_set, place = (datasets.MNIST, raw_dir) if domain == "mnistm" else (datasets.USPS, raw_dir / "usps")
        halves = [data_set(place, train=train, download=True) for train in (True, False)]
    except (OSError, EOFError, RuntimeError) as error:
        raise UserError(not_to_be_had(domain, raw_dir, error)) from None
    images = np.concatenate([np.asarray(half.data) for half in halves])
    return images, np.concatenate([np.asarray(half.targets) for half in halves])


def load_celeba(raw_dir: Path, seed: int) -> tuple[list[Path], list[str], np.ndarray]:
    """CelebA's image files in an order fixed by the seed, its attributes' names, and their values (n, 40), 1 or -1."""
    from torchvision import datasets

    try:
        celeba = datasets.CelebA(raw_dir, split="all", target_type="attr", download=True)
    except Exception as error:  # the download is gdown's, which raises what its libraries raise
        raise UserError(not_to_be_had("face", raw_dir, error)) from None
    order = np.random.default_rng(seed).permutation(len(celeba.filename))
    files = [raw_dir / "celeba" / "img_align_celeba" / celeba.filename[k] for k in order]
    return files, [name for name in celeba.attr_names if name], celeba.attr.numpy()[order] * 2 - 1


def not_to_be_had(part: str, raw_dir: Path, error: Exception) -> str:
    """One line on what to fetch by hand, and where to put it."""
    needed = {
        "mnistm": "MNIST's four *-ubyte.gz files into MNIST/raw",
        "svhn": "train_32x32.mat and test_32x32.mat of http://ufldl.stanford.edu/housenumbers into svhn",
        "usps": "usps.bz2 and usps.t.bz2 of https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets into usps",
        "face": "CelebA's img_align_celeba.zip and the five *_celeba.txt files beside it into celeba",
    }[part]
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{part}: the download failed ({reason}); put {needed} under --raw-dir {raw_dir}"
