"""Kernel distance (KID) of two sets of images: squared maximum mean discrepancy, cubic kernel.

Bińkowski et al., 2018, https://arxiv.org/abs/1801.01401. The estimate is unbiased: its mean does
not depend on the numbers of images, unlike that of FID. It is below 0 about half of the time if the
two sets have the same distribution. metrics/features.py has the networks.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.processes import is_first_process
from common.progress import show_progress
from common.rng import make_rng
from metrics.features import EFFICIENTNET, PUBLISHED, RANDOM

KERNEL_METRICS = {
    PUBLISHED: "KID × 1,000",
    EFFICIENTNET: "EfficientNet KID × 1,000",
    RANDOM: "random-feature KID × 1,000",
}
BLOCK = 1_000  # images whose kernel values are in memory at once


class KernelDistance(NamedTuple):
    """The kernel distance × 1,000 of two sets of images."""

    value: float  # of all images
    mean: float  # over random subsets
    sd: float  # over random subsets, with the number of subsets as the divisor


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy of features (m, d) and (n, d).

    Equation 4: the mean kernel value of two images of x, and of two of y, less twice that of an
    image of x and one of y. No image is compared with itself. Both are float64.
    """
    between = kernel_sum(x, y) / (len(x) * len(y))
    return mean_of_pairs(x) + mean_of_pairs(y) - 2 * between


def mean_of_pairs(x: Tensor) -> float:
    """Mean kernel value of two different rows of x (m, d)."""
    with_itself = cubic_kernel(x.square().sum(1), x.shape[1]).sum().item()
    return (kernel_sum(x, x) - with_itself) / (len(x) * (len(x) - 1))


def kernel_sum(x: Tensor, y: Tensor) -> float:
    """Sum of the kernel values of every row of x (m, d) with every row of y (n, d)."""
    total = 0.0
    for block in x.split(BLOCK):
        total += cubic_kernel(block @ y.T, x.shape[1]).sum().item()
    return total


def cubic_kernel(products: Tensor, features: int) -> Tensor:
    """(x·y / d + 1)³, from the scalar products x·y of rows of d features."""
    return (products / features + 1) ** 3


def kernel_distance(
    x: Tensor, y: Tensor, subsets: int, subset_size: int, seed: int
) -> KernelDistance:
    """Kernel distance × 1,000 of features (m, d) and (n, d): of all, and of random subsets.

    A subset has `subset_size` rows of x and as many of y, each at most once.
    """
    rng = make_rng(seed, "subsets")
    values = []
    for _ in show_progress(range(subsets), subsets, "subsets"):
        rows_x = torch.randperm(len(x), generator=rng)[:subset_size]
        rows_y = torch.randperm(len(y), generator=rng)[:subset_size]
        values.append(1_000 * squared_mmd(x[rows_x], y[rows_y]))
    return KernelDistance(1_000 * squared_mmd(x, y), float(np.mean(values)), float(np.std(values)))


def size_of_subsets(wanted: int, counts: dict[str, int]) -> int:
    """The wanted size, or the number of images of the smallest set, with a note.

    `counts` maps the name of each set to its number of images.
    """
    name = min(counts, key=lambda key: counts[key])
    if wanted <= counts[name]:
        return wanted
    if is_first_process():
        print(
            f"note: --subset-size {wanted:,}: {name} has {counts[name]:,} images, "
            f"so the subsets have {counts[name]:,}",
            file=sys.stderr,
        )
    return counts[name]
