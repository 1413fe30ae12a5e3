"""Fréchet distance of two sets of images: the statistics of their features, the distance.

FID: Heusel et al., 2017, https://arxiv.org/abs/1706.08500, with the network of
https://github.com/mseitzer/pytorch-fid, whose numbers are met to 1e-3. metrics/features.py has the
networks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from common.cli import LARGEST_COUNT, UserError
from common.data import list_images
from common.files import atomic_write
from common.names import is_label
from common.processes import is_first_process
from common.rng import make_rng
from metrics.features import EFFICIENTNET, PUBLISHED, RANDOM, Embedding, embed_images

if TYPE_CHECKING:
    from accelerate import Accelerator

PUBLISHED_FEATURES = 2048
LARGEST_STATISTIC = 1e30  # beyond it, products of them are infinite
FRECHET_METRICS = {
    PUBLISHED: "FID",
    EFFICIENTNET: "EfficientNet Fréchet distance",
    RANDOM: "random-feature Fréchet distance",
}


class Statistics(NamedTuple):
    """What the distance needs of a set of images."""

    mean: np.ndarray  # of the features, float64 (d,)
    covariance: np.ndarray  # float64 (d, d)
    features: str  # the name of the features
    count: int | None  # of images, if known


class Source(NamedTuple):
    """A set of images: the files of a folder, or statistics that were kept in a file."""

    path: Path
    files: list[Path] | None
    statistics: Statistics | None
    count: int | None  # of images, if known


# The distance


def frechet_distance(
    mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray
) -> float:
    """Squared Fréchet distance (≥ 0) of two Gaussians: means (d,), covariances (d, d), float64.

    |m1 - m2|² + tr S1 + tr S2 - 2 tr √(S1 S2) (Dowson and Landau, 1982). With S = W Wᵀ for both,
    the last trace is the sum of the singular values of W1ᵀ W2, so no square root of an asymmetric
    matrix is needed.
    """
    root1 = root_of(cov1)
    root2 = root_of(cov2)
    trace = np.linalg.svd(root1.T @ root2, compute_uv=False).sum()
    between_means = np.square(mean1 - mean2).sum()
    return max(0.0, float(between_means + np.trace(cov1) + np.trace(cov2) - 2 * trace))


def root_of(covariance: np.ndarray) -> np.ndarray:
    """W (d, rank) with W Wᵀ = S.

    Directions in which S is zero but for rounding are left out, so that fewer images than features
    do no harm.
    """
    values, vectors = np.linalg.eigh(covariance)  # ascending
    kept = values > values[-1] * len(values) * np.finfo(float).eps
    return vectors[:, kept] * np.sqrt(values[kept])


# Sets of images


def open_source(path: Path) -> Source:
    """The images of a folder and its sub-folders, or the statistics in a .npz file.

    Raises UserError if it is missing or broken.
    """
    if path.suffix == ".npz":
        statistics = load_statistics(path)
        return Source(path, None, statistics, statistics.count)
    files = list_images(path, recursive=True)
    return Source(path, files, None, len(files))


def draw_floor(folder: Path, generated: Source, seed: int) -> Source:
    """As many images of `folder`, drawn at random, as there are generated ones.

    If it has fewer, all of them, with a warning.
    """
    if generated.count is None:
        raise UserError(
            f"--floor: the number of images in {generated.path} is unknown; give their folder"
        )
    found = list_images(folder, recursive=True)
    order = torch.randperm(len(found), generator=make_rng(seed, "floor"))
    files = [found[row] for row in order[: generated.count]]
    if len(files) < generated.count and is_first_process():
        print(
            f"warning: --floor {folder}: has {len(files):,} images, not {generated.count:,}",
            file=sys.stderr,
        )
    return Source(folder, files, None, len(files))


def load_statistics(path: Path) -> Statistics:
    """Statistics of --save-stats, or of pytorch-fid, whose files have mu and sigma alone.

    Raises UserError for a broken file, and for another number of features than FID's.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with np.load(path) as file:
            mean = real_numbers(file["mu"])
            covariance = real_numbers(file["sigma"])
            features = str(file["features"]) if "features" in file else PUBLISHED
            count = float(file["count"]) if "count" in file else 0  # 0 is unknown
        if not are_statistics(mean, covariance) or not is_label(features):
            raise ValueError
        if not 0 <= count <= LARGEST_COUNT or count != int(count):
            raise ValueError
    except Exception:  # a damaged archive can raise anything
        raise UserError(
            f"{path}: not a whole file of statistics (finite mu, and sigma as a covariance)"
        ) from None
    if features == PUBLISHED and len(mean) != PUBLISHED_FEATURES:
        raise UserError(
            f"{path}: has {len(mean)} features, but FID has {PUBLISHED_FEATURES} "
            "(pytorch-fid's --dims)"
        )
    return Statistics(mean, covariance, features, int(count) or None)


def real_numbers(array: np.ndarray) -> np.ndarray:
    """An array of numbers as float64. Raises ValueError for texts, objects and complex numbers."""
    if array.dtype.kind not in "fiu":
        raise ValueError(array.dtype)
    return array.astype(np.float64)


def are_statistics(mean: np.ndarray, covariance: np.ndarray) -> bool:
    """Whether these are a mean and a covariance: finite, symmetric, without negative variance."""
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not len(mean):
        return False
    if not np.isfinite(mean).all() or not np.isfinite(covariance).all():
        return False
    largest = np.abs(covariance).max()
    if max(largest, np.abs(mean).max()) > LARGEST_STATISTIC:
        return False
    if np.abs(covariance - covariance.T).max() > 1e-5 * largest:
        return False
    return np.linalg.eigvalsh(covariance)[0] >= -1e-4 * largest


def save_statistics(path: Path, kept: Statistics) -> None:
    """Write a file that `load_statistics` and pytorch-fid can read."""
    arrays = {
        "mu": kept.mean,
        "sigma": kept.covariance,
        "features": kept.features,
        "count": kept.count or 0,
    }
    atomic_write(path, lambda file: np.savez(file, **arrays))


def measure_images(
    source: Source, embedding: Embedding, batch_size: int, accelerator: Accelerator | None
) -> Statistics:
    """Statistics of images, all of one size. Raises UserError that names a broken or odd one."""
    assert source.files is not None
    features = embed_images(source.path, source.files, embedding, batch_size, accelerator)
    if len(features) < features.shape[1] and is_first_process():
        print(
            f"warning: {source.path}: {len(features):,} images are fewer than the "
            f"{features.shape[1]:,} features; compare only distances of equally many images",
            file=sys.stderr,
        )
    mean = features.mean(0).numpy()
    covariance = np.cov(features.numpy(), rowvar=False)
    return Statistics(mean, covariance, embedding.name, len(features))


def measure(
    sources: dict[str, Source],
    embedding: Embedding | None,
    batch_size: int,
    accelerator: Accelerator | None = None,
) -> dict[str, Statistics]:
    """Statistics of all sources, one of which is "real", under the same keys.

    `embedding` computes the features; it may be None if all sources are statistics already. The
    processes of `accelerator` share the images. Raises UserError for statistics of other features.
    """
    measured = {}  # those that are statistics already
    for key, source in sources.items():
        if source.statistics is not None:
            measured[key] = source.statistics
    name = embedding.name if embedding is not None else measured["real"].features
    for key, statistics in measured.items():
        if statistics.features != name:
            raise UserError(
                f"{sources[key].path}: has features {statistics.features}, "
                f"which cannot be compared with {name}"
            )
    for key, source in sources.items():
        if embedding is not None and key not in measured:
            measured[key] = measure_images(source, embedding, batch_size, accelerator)
    size = len(measured["real"].mean)
    for key, statistics in measured.items():
        if len(statistics.mean) != size:
            raise UserError(
                f"{sources[key].path}: has {len(statistics.mean):,} features, but "
                f"{sources['real'].path} has {size:,}"
            )
    return measured
