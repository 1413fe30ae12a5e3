"""What is asked of generated faces: attributes with their values, and what the others are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from common.attributes import AttributeTable
from common.cli import UserError, each_once
from common.rng import make_rng

Others = Literal["unknown", "real", "absent"]
ASKED_FILE = "asked.json"  # beside generated images: {image: {attribute: 1 or -1}}


class Asked(NamedTuple):
    """An attribute that is asked for: 1 or -1, and a weight of its own or None."""

    name: str
    value: int
    weight: float | None = None

    @property
    def words(self) -> str:
        """As it is written after --attributes."""
        weight = "" if self.weight is None else f":{self.weight:g}"
        return f"{self.name}={self.value}{weight}"


def read_request(words: Sequence[str]) -> list[Asked]:
    """The attributes in the words after --attributes, such as Smiling=1 or Male=-1:3.

    Raises UserError for other words, and for an attribute that is asked for twice.
    """
    asked = []
    for word in words:
        name, _, rest = word.partition("=")
        value, colon, weight = rest.partition(":")
        if not name or value not in ("1", "-1"):
            raise UserError(f"--attributes {word}: must be NAME=1 or NAME=-1, such as Smiling=1")
        number = None
        if colon:
            try:
                number = float(weight)
            except ValueError:
                raise UserError(f"--attributes {word}: {weight!r} is not a weight") from None
            if not 0 <= number <= 1_000:
                raise UserError(f"--attributes {word}: the weight must be between 0 and 1,000")
        asked.append(Asked(name, int(value), number))
    each_once("--attributes", [item.name for item in asked], at_least_one=False)
    return asked


def values_of(asked: Sequence[Asked], names: Sequence[str]) -> Tensor:
    """What is asked of the attributes `names`: float32 (names,), 1, -1 or 0 for not asked."""
    values = torch.zeros(len(names))
    for item in asked:
        values[names.index(item.name)] = item.value
    return values


def weights_of(asked: Sequence[Asked], names: Sequence[str], weight: float) -> Tensor:
    """The weights of the attributes `names`: float32 (names,), 0 where one is not asked.

    `weight` is that of attributes without one of their own.
    """
    weights = torch.zeros(len(names))
    for item in asked:
        weights[names.index(item.name)] = weight if item.weight is None else item.weight
    return weights


def refuse_unknown(asked: Sequence[Asked], names: Sequence[str], what: str) -> None:
    """Raise UserError for an attribute that `what` does not know."""
    for item in asked:
        if item.name not in names:
            known = " ".join(names)
            raise UserError(f"--attributes {item.words}: {what} knows only {known}")


class RealRows(NamedTuple):
    """The attributes of the training images, from which those that are not asked can be drawn."""

    names: list[str]
    values: Tensor  # int8 (images, names), 1 or -1

    @classmethod
    def read(cls, table: AttributeTable, files: Sequence[str]) -> RealRows:
        """Those of some images of a file of attributes."""
        return cls(table.names, table.of(files, table.names))

    def matching(self, asked: Sequence[Asked]) -> Tensor:
        """The rows, int64, of the images that have everything that is asked."""
        has_all = torch.ones(len(self.values), dtype=torch.bool)
        for item in asked:
            has_all &= self.values[:, self.names.index(item.name)] == item.value
        return has_all.nonzero().flatten()

    def sentence(self, asked: Sequence[Asked]) -> str:
        """How many of the training images have what is asked."""
        words = " ".join(f"{item.name}={item.value}" for item in asked)
        count = len(self.matching(asked))
        return f"{words}: {count:,} of {len(self.values):,} training images"

    def draw(
        self, asked: Sequence[Asked], names: Sequence[str], seed: int, numbers: Sequence[int]
    ) -> Tensor:
        """For each image number the attributes of a random real one that has what is asked.

        float32 (numbers, names). Image k depends on the seed and on k alone.

        Raises UserError if there is none.
        """
        rows = self.matching(asked)
        if not len(rows):
            raise UserError(f"--others real: {self.sentence(asked)}")
        columns = [self.names.index(name) for name in names]
        chosen = []
        for number in numbers:
            pick = torch.randint(len(rows), (1,), generator=make_rng(seed, "others", number))
            chosen.append(rows[pick])
        return self.values[torch.cat(chosen)][:, columns].float()
