"""The graders' metrics of generated images: Fréchet inception distance (FID), rate of images with exactly one face.

FID: Heusel et al. 2017, https://arxiv.org/abs/1706.08500, by the net of https://github.com/mseitzer/pytorch-fid, whose
figures are met to 1e-3. Where its weights cannot be had, `--features random` takes a net with random ones, which tells
sets of images apart too (Naeem et al. 2020, https://arxiv.org/abs/2002.09797); its distances have a scale of their own.

    python score.py fid SAMPLES hw2_data/face/val --floor hw2_data/face/train --output-dir runs/p1/score/fid
    python score.py fid SAMPLES hw2_data/face/val --features random
    python score.py faces SAMPLES --real hw2_data/face/val
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import dlib
import numpy as np
import torch
from accelerate import Accelerator
from pytorch_fid import inception
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from tyro.conf import Positional

from common import run as runs
from common.data import SUFFIXES, decode_image, decode_images, normalise
from common.run import UserError, generator

PUBLISHED = "inception-6726825d"  # FID's features: the net, and the first digits of the SHA-256 of its weights
RANDOM = "random-1"  # raise the number when the random net changes
METRICS = {PUBLISHED: "FID", RANDOM: "random-feature Fréchet distance"}
LOCAL = threading.local()  # each thread's own face detector
Embedding = Callable[[Tensor], Tensor]  # uint8 (batch, 3, height, width) → float32 (batch, features)


@dataclass
class Fid:
    """Fréchet distance of two sets of images: FID as pytorch-fid computes it, or the one of random features."""

    generated: Positional[Path]  # Folder of PNG or JPEG images of one size, sub-folders included; or statistics (.npz).
    real: Positional[Path]  # The same, to compare with.
    features: Literal["inception", "random"] = "inception"  # The net of FID, or one that needs no weights (not FID).
    weights: Path | None = None  # pt_inception-2015-12-05-6726825d.pth; else torch's hub cache or a download.
    floor: Path | None = None  # Folder of other real images: as many as are in the first are compared with the second.
    save_stats: Path | None = None  # Keep the second's statistics here (.npz), to be given in its place next time.
    batch_size: int = 50  # Images at a time.
    device: runs.Device = "auto"  # Where the inception net computes; the random one always takes the CPU.
    seed: int = 0  # Of the choice of the images of --floor.
    output_dir: Path | None = None  # Where result.json is written; without it the result is only printed.


@dataclass
class Faces:
    """Rate of images in which dlib's frontal HOG detector, upsampled once, finds exactly one face."""

    images: Positional[Path]  # Folder of PNG or JPEG images, sub-folders included.
    real: Path | None = None  # Folder of real images, whose rate is told beside it.
    num_workers: int = os.cpu_count() or 1  # Threads.
    output_dir: Path | None = None  # Where result.json is written; without it the result is only printed.


def find_images(folder: Path) -> list[Path]:
    """PNG and JPEG files in `folder` and its sub-folders, sorted; hidden ones are left out. UserError if none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES)
    paths = [path for path in found if "/." not in f"/{path.relative_to(folder).as_posix()}"]
    if not paths:
        raise UserError(f"{folder}: no PNG or JPEG image in it")
    return paths


def watch(items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
    """Yield `items` beside a bar on a terminal; elsewhere the time left is told after 10 s and then each minute."""
    start, told = time.monotonic(), 0.0
    for done, item in enumerate(tqdm(items, what, total, leave=False, disable=None), 1):
        yield item
        spent = time.monotonic() - start
        if spent - told > (60 if told else 10) and not sys.stderr.isatty():
            told, left = spent, tqdm.format_interval(spent / done * (total - done))
            print(f"{what}: {done:,}/{total:,}, about {left} left", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------- Fréchet distance


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
        state = runs.load_weights(path)[0]
        with mock.patch.object(inception, "load_state_dict_from_url", return_value=state):  # no network
            net = inception.InceptionV3().to(device).eval()
    except UserError as error:
        raise UserError(str(error).replace("--checkpoint", "--weights", 1)) from None
    except RuntimeError:
        raise UserError(f"--weights {path}: is not pytorch-fid's InceptionV3 ({Path(url).name})") from None
    name = f"inception-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"
    if name != PUBLISHED:
        print(f"warning: {path}: not the published weights, so the distance is not FID", file=sys.stderr)

    def embed(pixels: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):  # the CPU's figures
            return net(pixels.to(device).float() / 255)[0].flatten(1)  # (batch, 2048, 1, 1) → (batch, 2048)

    return name, embed


@torch.inference_mode()
def measure(folder: Path, paths: list[Path], name: str, embed: Embedding, batch_size: int) -> Statistics:
    """Statistics of images in `folder`, all of one size. UserError names a broken or odd-sized one."""
    if len(paths) < 2:
        raise UserError(f"{folder}: one image has no covariance, at least 2 are needed")
    batches = decode_images(paths).split(batch_size)
    features = torch.cat([embed(batch).cpu().double() for batch in watch(batches, len(batches), f"{folder}, batches")])
    if len(features) < features.shape[1]:
        told = f"fewer than the {features.shape[1]:,} features; compare distances of equal numbers only"
        print(f"warning: {folder}: {len(features):,} images are {told}", file=sys.stderr)
    return Statistics(features.mean(0).numpy(), np.cov(features.numpy(), rowvar=False), name, len(features))


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


def fid(args: Fid, accelerator: Accelerator) -> tuple[dict[str, Any], str]:
    """The distance; beside it the floor, that of other real images, which no generator can honestly beat."""
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: at least one is needed")
    if args.save_stats and args.save_stats.suffix != ".npz":
        raise UserError(f"--save-stats {args.save_stats}: must end in .npz")
    folders = {"generated": args.generated, "real": args.real}
    sources = {k: load_statistics(path) if path.suffix == ".npz" else find_images(path) for k, path in folders.items()}
    counts = {k: source.count if isinstance(source, Statistics) else len(source) for k, source in sources.items()}
    if args.floor:
        if (count := counts["generated"]) is None:
            raise UserError(f"--floor: {args.generated} does not tell its number of images; give their folder")
        found = find_images(args.floor)
        rows = torch.randperm(len(found), generator=generator(args.seed, "floor"))[:count]
        folders["floor"], sources["floor"], counts["floor"] = args.floor, [found[row] for row in rows], len(rows)
        if len(rows) < count:
            print(f"warning: --floor {args.floor}: has {len(rows):,} images, not {count:,}", file=sys.stderr)

    if all(isinstance(source, Statistics) for source in sources.values()):
        name, embed = sources["real"].features, None
    elif args.features == "random":
        name, embed = random_features()
    else:
        name, embed = inception_features(args.weights, accelerator.device)
    for k, source in sources.items():
        if isinstance(source, Statistics) and source.features != name:
            raise UserError(f"{folders[k]}: has features {source.features}, which do not compare with {name}")
    for k, source in sources.items():
        if isinstance(source, list):
            sources[k] = measure(folders[k], source, name, embed, args.batch_size)
    real = sources["real"]
    if args.save_stats:
        keys = {"mu": real.mean, "sigma": real.covariance, "features": name, "count": real.count or 0}
        runs.atomic_write(args.save_stats, lambda path: np.savez(path, **keys))

    distances = {k: frechet_distance(*sources[k][:2], *real[:2]) for k in sources if k != "real"}
    told = {k: f"{f'{counts[k]:,}' if counts[k] else 'unknown'} images of {folders[k]}" for k in sources}
    metric = METRICS.get(name, f"Fréchet distance of {name} features")
    line = f"{metric} {distances['generated']:.3f}: {told['generated']} against {told['real']} ({name})"
    line += f"; floor {distances['floor']:.3f}: {told['floor']}" if args.floor else ""
    result = {"metric": metric, "distance": distances["generated"], "floor": distances.get("floor")}
    return result | {"features": name, "images": counts}, line


# ---------------------------------------------------------------------------------------------------------------- faces


def count_faces(path: Path) -> int | None:
    """Faces that dlib's frontal HOG detector finds in an image upsampled once; None if the file is unreadable."""
    if not hasattr(LOCAL, "detector"):
        LOCAL.detector = dlib.get_frontal_face_detector()  # it releases the GIL while it looks, and serves one thread
    try:
        image = decode_image(path).transpose(1, 2, 0)  # (channels, height, width) → (height, width, channels)
    except UserError:
        return None
    return len(LOCAL.detector(np.ascontiguousarray(image), 1))


def face_rate(folder: Path, workers: int) -> dict[str, Any]:
    """Images of `folder` with no, one and several faces, the rate of one in %, the unreadable files (no part of it)."""
    paths = find_images(folder)
    with ThreadPoolExecutor(workers) as pool:
        found = list(watch(pool.map(count_faces, paths), len(paths), f"{folder}, images"))
    unreadable = [str(path) for path, number in zip(paths, found, strict=True) if number is None]
    readable = [number for number in found if number is not None]
    if not readable:
        raise UserError(f"{folder}: none of its {len(paths):,} images can be read")
    none, one = readable.count(0), readable.count(1)
    counts = {"images": len(readable), "none": none, "one": one, "several": len(readable) - none - one}
    return {"one_face_percent": 100 * one / len(readable), **counts, "unreadable": unreadable}


def faces(args: Faces, accelerator: Accelerator) -> tuple[dict[str, Any], str]:
    """The rate, and that of real images beside it."""
    if args.num_workers < 1:
        raise UserError(f"--num-workers {args.num_workers}: at least one is needed")
    rates = {folder: face_rate(folder, args.num_workers) for folder in (args.images, args.real) if folder}
    lines = [
        f"{rate['one_face_percent']:.2f} % of {rate['images']:,} images of {folder} (none in {rate['none']:,}, several "
        f"in {rate['several']:,}; {len(rate['unreadable']):,} unreadable)"
        for folder, rate in rates.items()
    ]
    result = {"metric": "exactly one face", **rates[args.images], "real": rates.get(args.real)}
    return result, "exactly one face in " + ", in ".join(lines)


# ----------------------------------------------------------------------------------------------------------------------


def claim_result(folder: Path, score: str) -> Path:
    """`folder`/result.json, if nothing but the same score stands there. UserError otherwise, before any work."""
    file = runs.make_output_dir(folder) / "result.json"
    if (folder / "config.json").exists() or (file.exists() and f'"score": "{score}"' not in file.read_text()):
        raise UserError(f"--output-dir {folder}: holds a run or another score; each needs a directory of its own")
    return file


def main(args: Fid | Faces) -> dict[str, Any]:
    """Run one sub-command: print its line, write result.json; returns what is in there."""
    started, (score, command) = time.monotonic(), {Fid: ("fid", fid), Faces: ("faces", faces)}[type(args)]
    file = claim_result(args.output_dir, score) if args.output_dir else None
    on_cpu = getattr(args, "features", "") == "random"
    accelerator = runs.make_accelerator("cpu" if on_cpu else getattr(args, "device", "cpu"), "fp32")
    result, line = command(args, accelerator)
    print(line)
    result = {"score": score, **result, "seconds": round(time.monotonic() - started, 1)}
    result |= {"arguments": asdict(args), **runs.environment(accelerator)}
    if file:
        runs.atomic_write(file, json.dumps(result, indent=1, default=str) + "\n")
    return result


if __name__ == "__main__":
    runs.command_line(Fid | Faces, main)
