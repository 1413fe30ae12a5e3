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

ATTRIBUTES_FILE = "list_attr_celeba.txt"  # in the folder face/ of a data folder
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
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file of attributes") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
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
    refuse_twice(names, f"{path}: line 2 has the attribute")
    images = []
    values = []
    for number, line in enumerate(rows, 3):
        image, *cells = line.split() or [""]
        if len(cells) != len(names):
            raise UserError(
                f"{path}: line {number} has {len(cells)} values, but line 2 has {len(names)} names"
            )
        for name, cell in zip(names, cells, strict=True):
            if cell not in ("1", "-1"):
                raise UserError(
                    f"{path}: line {number} has {cell[:20]!r} for {name}; values are 1 and -1"
                )
        images.append(image)
        values.append([int(cell) for cell in cells])
    refuse_twice([Path(image).stem for image in images], f"{path}: has rows for the image")
    return AttributeTable(path, names, images, torch.tensor(values, dtype=torch.int8))


def refuse_twice(words: Sequence[str], what: str) -> None:
    """Raise UserError if a word is there more than once."""
    word, count = Counter(words).most_common(1)[0]
    if count > 1:
        raise UserError(f"{what} {word} {count} times")
