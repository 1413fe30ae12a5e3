"""Images compared one by one with the images that they should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common.data import decode_image, list_images
from common.run import UserError


def squared_errors(predicted: Path, truth: Path) -> dict[str, float]:
    """Mean squared error, on the scale 0 to 255, of each image of `predicted` against that of its name in `truth`.

    UserError names an image that is in one folder only, and one of another size than its fellow.
    """
    names, expected = ({path.name for path in list_images(folder)} for folder in (predicted, truth))
    for name in sorted(names ^ expected):
        there, missing = (predicted, truth) if name in names else (truth, predicted)
        raise UserError(f"{missing / name}: no such file, though {there} has one")
    errors = {}
    for name in sorted(names):
        pair = [decode_image(folder / name).astype(np.float64) for folder in (predicted, truth)]
        if pair[0].shape != pair[1].shape:
            sizes = [f"{width}x{height}" for _, height, width in (image.shape for image in pair)]
            raise UserError(f"{predicted / name}: is {sizes[0]}, {truth / name} is {sizes[1]}")
        errors[name] = float(np.square(pair[0] - pair[1]).mean())
    return errors
