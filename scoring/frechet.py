"""Fréchet distance of two sets of images: embeddings, statistics of their features, the distance.

Heusel et al. 2017, https://arxiv.org/abs/1706.08500, by the net of https://github.com/mseitzer/pytorch-fid, whose
figures are met to 1e-3; or by a net with random weights, after Naeem et al. 2020, https://arxiv.org/abs/2002.09797.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from pytorch_fid import inception
from torch import Tensor
from torch.nn import functional as F

from common import run as runs
from common.data import decode_images, list_images, normalise
from common.progress import watch
from common.run import UserError, generator

PUBLISHED = "inception-6726825d"  # FID's features: the net, and the first digits of the SHA-256 of its weights
RANDOM = "random-1"  # raise the number when the random net changes
METRICS = {PUBLISHED: "FID", RANDOM: "random-feature Fréchet distance"}
Embedding = Callable[[Tensor], Tensor]  # uint8 (batch, 3, height, width) → float32 (batch, features)


class Statistics(NamedTuple):
    """Mean (d,) and covariance (d, d), float64, of the features of a set; their name; how many images, if known."""

    mean: np.ndarray
    covariance: np.ndarray
    features: str
    count: int | None


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """Squared Fréchet distance (≥ 0) of two Gaussians with means (d,) and covariances (d, d) in float64.

    |m1 - m2|² + tr S1 + tr S2 - 2 tr √(S1 S2) (Dowson and Landau 1982). With S = W Wᵀ for both, the last trace is the
    sum of the singular values of W1ᵀ W2: no root of an unsymmetric matrix. W leaves out the directions in which S is
    zero but for rounding, so that fewer images than features do no harm.
    """
    roots = []
    for values, vectors in map(np.linalg.eigh, (cov1, cov2)):
        kept = values > values[-1] * len(values) * np.finfo(float).eps
        roots.append(vectors[:, kept] * np.sqrt(values[kept]))  # (d, rank)
    trace = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    return max(0.0, float(np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * trace))


def random_features() -> tuple[str, Embedding]:
    """Name and embedding of a fixed random net: four strided convolutions (He et al. 2015), each layer's means.

    480 features, float32 on the CPU. The first filters keep 0.3 of their means, for else brightness would drown all
    other differences; the factor 10 brings the distances to the order of FID's.
    """
    rng, widths = torch.Generator().manual_seed(0), itertools.pairwise((3, 64, 96, 128, 192))
    filters = [torch.randn(to, of, 3, 3, generator=rng) * math.sqrt(2 / (9 * of)) for of, to in widths]
    filters[0] -= 0.7 * filters[0].mean((2, 3), keepdim=True)

    def embed(pixels: Tensor) -> Tensor:
        x, features = normalise(pixels), []
        for weight in filters:
            x = F.relu(F.conv2d(x, weight, stride=2, padding=1))
            features.append(10 * x.mean((2, 3)))  # (batch, channels, height, width) → (batch, channels)
        return torch.cat(features, 1)

    return RANDOM, embed


def inception_features(weights: Path | None, device: torch.device) -> tuple[str, Embedding]:
    """Name and embedding of pytorch-fid's InceptionV3: 2,048 features, its own resize. UserError without weights."""
    url = inception.FID_WEIGHTS_URL
    path = weights or Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if weights is None and not path.is_file():
        print(f"downloading {url}", file=sys.stderr)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), PUBLISHED.split("-")[1], progress=sys.stderr.isatty())
        except Exception:  # what the network raises is anybody's guess
            told = f"put {url} at {path} or name it by --weights; --features random needs none"
            raise UserError(f"--features inception: no weights, and they cannot be downloaded: {told}") from None
    try:
        state = runs.load_weights(path, "--weights")[0]
        with mock.patch.object(inception, "load_state_dict_from_url", return_value=state):  # no network
            net = inception.InceptionV3().to(device).eval()
    except RuntimeError:
        raise UserError(f"--weights {path}: is not pytorch-fid's InceptionV3 ({Path(url).name})") from None
    name = f"inception-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"
    if name != PUBLISHED:
        print(f"warning: {path}: not the published weights, so the distance is not FID", file=sys.stderr)

    def embed(pixels: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):  # the CPU's figures
            return net(pixels.to(device).float() / 255)[0].flatten(1)  # (batch, 2048, 1, 1) → (batch, 2048)

    return name, embed


class Source(NamedTuple):
    """A set of images: its folder and its files, or a file and the statistics in it; how many images, if known."""

    path: Path
    content: list[Path] | Statistics
    count: int | None


def open_source(path: Path) -> Source:
    """The images of a folder and its sub-folders, or a file of statistics (.npz). UserError if missing or broken."""
    content = load_statistics(path) if path.suffix == ".npz" else list_images(path, recursive=True)
    return Source(path, content, content.count if isinstance(content, Statistics) else len(content))


def draw_floor(folder: Path, generated: Source, seed: int) -> Source:
    """As many images of `folder`, drawn by `seed`, as are generated; all, with a warning, if it has fewer."""
    if generated.count is None:
        raise UserError(f"--floor: {generated.path} does not tell its number of images; give their folder")
    found = list_images(folder, recursive=True)
    rows = torch.randperm(len(found), generator=generator(seed, "floor"))[: generated.count]
    if len(rows) < generated.count:
        print(f"warning: --floor {folder}: has {len(rows):,} images, not {generated.count:,}", file=sys.stderr)
    return Source(folder, [found[row] for row in rows], len(rows))


def load_statistics(path: Path) -> Statistics:
    """Statistics of --save-stats or of pytorch-fid, whose files hold mu and sigma alone. UserError if broken."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with np.load(path) as file:
            mean, covariance = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
            features = str(file["features"]) if "features" in file else PUBLISHED
            count = (int(file["count"]) or None) if "count" in file else None
        if mean.ndim != 1 or covariance.shape != 2 * mean.shape or not np.isfinite(mean.sum() + covariance.sum()):
            raise ValueError
    except Exception:  # what a damaged archive raises is anybody's guess
        raise UserError(f"{path}: not a whole file of statistics (finite mu and sigma)") from None
    if features == PUBLISHED and len(mean) != 2048:
        raise UserError(f"{path}: has {len(mean)} features, FID's are 2048 (pytorch-fid's --dims)")
    return Statistics(mean, covariance, features, count)


def save_statistics(path: Path, kept: Statistics) -> None:
    """Write a file that `load_statistics` and pytorch-fid read."""
    keys = {"mu": kept.mean, "sigma": kept.covariance, "features": kept.features, "count": kept.count or 0}
    runs.atomic_write(path, lambda file: np.savez(file, **keys))


@torch.inference_mode()
def measure_images(folder: Path, paths: list[Path], name: str, embed: Embedding, batch_size: int) -> Statistics:
    """Statistics of images in `folder`, all of one size. UserError names a broken or odd-sized one."""
    if len(paths) < 2:
        raise UserError(f"{folder}: one image has no covariance, at least 2 are needed")
    batches = decode_images(paths).split(batch_size)
    features = torch.cat([embed(batch).cpu().double() for batch in watch(batches, len(batches), f"{folder}, batches")])
    if len(features) < features.shape[1]:
        told = f"fewer than the {features.shape[1]:,} features; compare distances of equal numbers only"
        print(f"warning: {folder}: {len(features):,} images are {told}", file=sys.stderr)
    return Statistics(features.mean(0).numpy(), np.cov(features.numpy(), rowvar=False), name, len(features))


def measure(
    sources: dict[str, Source], embedding: Callable[[], tuple[str, Embedding]], batch_size: int
) -> dict[str, Statistics]:
    """Statistics of all sources, by one embedding, made if any images are given. UserError if features differ."""
    kept = {key: source.content for key, source in sources.items() if isinstance(source.content, Statistics)}
    name, embed = (sources["real"].content.features, None) if len(kept) == len(sources) else embedding()
    for key, statistics in kept.items():
        if statistics.features != name:
            raise UserError(
                f"{sources[key].path}: has features {statistics.features}, which do not compare with {name}"
            )
    return {
        key: kept.get(key) or measure_images(source.path, source.content, name, embed, batch_size)
        for key, source in sources.items()
    }
