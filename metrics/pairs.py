"""Images compared one by one with the images that they should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common.cli import UserError
from common.data import decode_image, list_images, size_of


def squared_errors(predicted: Path, truth: Path) -> dict[str, float]:
    """Mean squared error, on the scale 0 to 255, of each image against the one of its name.

    Raises UserError that names an image that is in one folder only, or whose size differs.
    """
    errors = {}
    for name in common_names(predicted, truth):
        image = decode_image(predicted / name)  # uint8, in which differences would wrap around
        expected = decode_image(truth / name)
        if image.shape != expected.shape:
            raise UserError(
                f"{predicted / name}: is {size_of(image)}, but {truth / name} is "
                f"{size_of(expected)}"
            )
        difference = image.astype(np.float64) - expected.astype(np.float64)
        errors[name] = float(np.square(difference).mean())
    return errors


def common_names(predicted: Path, truth: Path) -> list[str]:
    """The sorted names of the images. Raises UserError unless both folders have the same ones."""
    names = {path.name for path in list_images(predicted)}
    expected = {path.name for path in list_images(truth)}
    for name in sorted(names ^ expected):
        if name in names:
            raise UserError(f"{truth / name}: no such file, although {predicted} has one")
        raise UserError(f"{predicted / name}: no such file, although {truth} has one")
    return sorted(names)
