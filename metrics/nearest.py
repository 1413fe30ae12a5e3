"""How near images are to their nearest training image: has a generator memorised its training set?

Real images that were not used for training show which distances are normal. Smaller distances
suggest copying, but smooth images also give them. Larger ones are of another kind, and may also be
broken.

Meehan et al., 2020, https://arxiv.org/abs/2004.05675, test the same by the ranks of the distances.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from common.data import decode_images
from common.figures import save_labelled
from metrics.features import Embedding, efficientnet_features, embed_images

if TYPE_CHECKING:
    from accelerate import Accelerator

NearestFeatures = Literal["efficientnet", "pixels"]
SIDE = 32  # pixels to which images are shrunk before their pixels are compared
BLOCK = 500  # images whose distances to all training images are in memory at once
SHOWN = 10  # images of each kind in the figure


class Neighbours(NamedTuple):
    """Of each image of a folder, the nearest training image."""

    files: list[Path]
    distances: Tensor  # float64 (n,)
    rows: Tensor  # int64 (n,), among the training images


def open_features(features: NearestFeatures, device: torch.device) -> Embedding:
    """EfficientNet-Lite0's features, or the pixels of the image at 32x32, between 0 and 1."""
    if features == "efficientnet":
        return efficientnet_features(device, instead="--features pixels")
    return Embedding("pixels at 32x32", shrunk_pixels)


def shrunk_pixels(pixels: Tensor) -> Tensor:
    """Images uint8 (n, 3, height, width) → float32 (n, 3072), between 0 and 1."""
    shrunk = F.interpolate(pixels.float(), (SIDE, SIDE), mode="bilinear", antialias=True)
    return shrunk.flatten(1) / 255  # (n, 3, 32, 32) → (n, 3072)


def find_neighbours(
    folder: Path,
    files: list[Path],
    train: Tensor,
    embedding: Embedding,
    batch_size: int,
    accelerator: Accelerator,
) -> Neighbours:
    """The training image that is nearest to each image of a folder, or to its mirror image.

    Training mirrors images, so a copy may be mirrored too. `train` are the features (m, d) of the
    training images. Distances are Euclidean.
    """
    mirrored = Embedding(embedding.name, lambda pixels: embedding.embed(pixels.flip(3)))
    distances = torch.full((len(files),), torch.inf, dtype=torch.float64)
    rows = torch.zeros(len(files), dtype=torch.int64)
    for kind in (embedding, mirrored):
        features = embed_images(folder, files, kind, batch_size, accelerator)
        for first in range(0, len(files), BLOCK):
            part = slice(first, first + BLOCK)
            nearest = torch.cdist(features[part], train).min(1)
            nearer = nearest.values < distances[part]
            distances[part] = torch.where(nearer, nearest.values, distances[part])
            rows[part] = torch.where(nearer, nearest.indices, rows[part])
    return Neighbours(files, distances, rows)


def share_nearer(generated: Tensor, real: Tensor) -> float:
    """How often a generated image is nearer to a training image than a real one is, in %.

    Of all pairs of a distance of `generated` (n,) and one of `real` (m,); equal ones count half. It
    is 50 if both have the same distribution.
    """
    from scipy.stats import mannwhitneyu

    nearer = mannwhitneyu(real.numpy(), generated.numpy()).statistic  # a number of pairs
    return 100 * float(nearer) / (len(generated) * len(real))


def draw_neighbours(
    generated: Neighbours, real: Neighbours, train_files: list[Path], path: Path
) -> None:
    """Draw the images that are nearest to a training image, each above that image.

    The generated ones are the likeliest copies; the real ones show how alike different people are.
    """
    shown = min(SHOWN, len(generated.files), len(real.files))
    files = []
    for found in (generated, real):
        order = found.distances.argsort(stable=True)[:shown].tolist()
        files += [found.files[number] for number in order]
        files += [train_files[found.rows[number]] for number in order]
    first = decode_images(files[:1])
    pixels = decode_images(files, size=(first.shape[2], first.shape[3]))
    names = ["generated", "training", "real, not trained on", "training"]
    columns = [f"{rank}" for rank in range(1, shown + 1)]
    save_labelled(pixels, path, names, columns, "the smallest distances to a training image")
