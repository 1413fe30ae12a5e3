"""Attributes of faces, from a file in the layout of CelebA's list_attr_celeba.txt.

Its first line is the number of images, its second the names of the attributes, and each further
line has an image and one value, 1 or -1, for each name (Liu et al., 2015,
https://arxiv.org/abs/1411.7766). Values are found by the names of images and attributes, never by
their places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.cli import UserError
from common.data import list_images
from common.json_files import read_text

ATTRIBUTES_FILE = "list_attr_celeba.txt"  # in the folder face/ of a data folder
VALUES = {"1", "-1"}
# The ten of the course's task.
TEN_ATTRIBUTES = (
    "Bald",
    "Black_Hair",
    "Blond_Hair",
    "Brown_Hair",
    "Eyeglasses",
    "Male",
    "Mustache",
    "No_Beard",
    "Smiling",
    "Young",
)
MOST_EVALUATOR_VAL = 1_000  # faces of val that train the classifier that measures


class AttributeTable(NamedTuple):
    """The attributes of a file: `values` is int8 (images, names), 1 or -1."""

    path: Path
    names: list[str]
    images: list[str]
    values: Tensor

    def of(self, files: Sequence[str], names: Sequence[str]) -> Tensor:
        """The values of some images and attributes, int8 (files, names), 1 or -1.

        Images are found by their names without the ending: CelebA lists 000001.jpg, of which a data
        folder may have 000001.png.

        Raises UserError for an image or an attribute that the file does not have.
        """
        columns = []
        for name in names:
            if name not in self.names:
                known = " ".join(self.names)
                raise UserError(f"{self.path}: has no attribute {name!r}; it has {known}")
            columns.append(self.names.index(name))
        row_of = {Path(image).stem: row for row, image in enumerate(self.images)}
        rows = []
        for file in files:
            stem = Path(file).stem
            if stem not in row_of:
                raise UserError(f"{self.path}: has no row for the image {file}")
            rows.append(row_of[stem])
        return self.values[rows][:, columns]


def attributes_of(data_dir: Path) -> AttributeTable:
    """The attributes of the faces of a data folder, in face/list_attr_celeba.txt.

    Raises UserError if the file is missing or not in CelebA's layout.
    """
    return read_attributes(data_dir / "face" / ATTRIBUTES_FILE)


def read_attributes(path: Path) -> AttributeTable:
    """Read a file in the layout of list_attr_celeba.txt; lines may end in LF or CRLF.

    Raises UserError, with the number of the line, for a file that is missing or not in that layout:
    another number of rows, values other than 1 and -1, or a name that is there twice.
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such file of attributes")
    lines = read_text(path).splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    if len(lines) < 3:
        raise UserError(
            f"{path}: needs a line with the number of images, one with the names of the "
            "attributes, and one for each image"
        )
    rows = lines[2:]
    if lines[0].strip() != str(len(rows)):
        raise UserError(
            f"{path}: line 1 should be {len(rows)}, the number of rows, not {lines[0].strip()[:40]}"
        )
    names = lines[1].split()
    if not names:
        raise UserError(f"{path}: line 2 has no names of attributes")
    refuse_twice(names, f"{path}: line 2 has the attribute")
    images = []
    values = []
    for number, line in enumerate(rows, 3):
        image, *cells = line.split() or [""]
        if len(cells) != len(names):
            raise UserError(
                f"{path}: line {number} has {len(cells)} values, but line 2 has {len(names)} names"
            )
        if not VALUES.issuperset(cells):
            wrong = next(cell for cell in cells if cell not in VALUES)
            name = names[cells.index(wrong)]
            raise UserError(
                f"{path}: line {number} has {wrong[:20]!r} for {name}; values are 1 and -1"
            )
        images.append(image)
        values.append([cell == "1" for cell in cells])
    refuse_twice([Path(image).stem for image in images], f"{path}: has rows for the image")
    return AttributeTable(path, names, images, 2 * torch.tensor(values, dtype=torch.int8) - 1)


def refuse_twice(words: Sequence[str], what: str) -> None:
    """Raise UserError if a word is there more than once."""
    word, count = Counter(words).most_common(1)[0]
    if count > 1:
        raise UserError(f"{what} {word} {count} times")


def shares_of(names: Sequence[str], values: Tensor) -> dict[str, float]:
    """The percentage of faces that have each attribute, from values (n, attributes)."""
    return dict(zip(names, (100 * (values == 1).float().mean(0)).tolist(), strict=True))


def positive_weights(values: Tensor, largest: float) -> Tensor:
    """Weights in a loss (attributes,) of faces that have an attribute, from values (n, attributes).

    Negatives for each positive, so that both count alike, but between 1 / `largest` and `largest`.
    """
    positives = (values == 1).sum(0)
    negatives = len(values) - positives
    return (negatives / positives.clamp(min=1)).clamp(1 / largest, largest)


# Who sees which faces


class Split(NamedTuple):
    """Four sets of faces without a common one: names of files in face/train and face/val.

    The classifier that guides a diffusion model and the one that measures its images must not
    learn from the same faces, or the second would share the mistakes of the first.
    """

    guidance: list[str]  # of train, for the classifier that guides
    evaluator_train: list[str]  # of train, for the classifier that measures
    evaluator_val: list[str]  # of val, for it too
    measure: list[str]  # of val: nothing learns from them


def split_faces(train: Sequence[str], val: Sequence[str] = ()) -> Split:
    """Split the names of the files in face/train and face/val, in sorted order.

    The first 5/7 of the training faces are for guidance, the rest for the evaluator. Of the val
    faces the evaluator gets the first half, at most 1,000; the rest measures. The course's 7,000
    and 2,025 faces give 5,000, 2,000 + 1,000, and 1,025.

    Raises UserError for fewer than two training faces, and for a name that is there twice.
    """
    if len(train) < 2:
        raise UserError(f"face/train: has {len(train)} image, but a split needs at least 2")
    refuse_twice([Path(name).stem for name in (*train, *val)], "face/train and face/val: have")
    train = sorted(train)
    val = sorted(val)
    cut_train = len(train) * 5 // 7
    cut_val = min(len(val) // 2, MOST_EVALUATOR_VAL)
    return Split(train[:cut_train], train[cut_train:], val[:cut_val], val[cut_val:])


def split_of(data_dir: Path) -> Split:
    """`split_faces` of the files in face/train and face/val of a data folder.

    Raises UserError if one of them has fewer than two.
    """
    names = []
    for part in ("train", "val"):
        folder = data_dir / "face" / part
        names.append([file.name for file in list_images(folder)])
        if len(names[-1]) < 2:
            raise UserError(f"{folder}: has one image, but a split needs at least 2")
    return split_faces(*names)
