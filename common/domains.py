"""The images of two domains for domain adaptation, and how a network with frozen stages reads them.

The source has labels. Those of the target only measure: its training images come without.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from common.augment import crop_and_flip, turn_zoom_and_shift
from common.class_folders import find_domain, load_domain, match_classes, split_by_class
from common.data import Images, load_digits, normalise, take
from common.processes import gather_shares, my_share
from common.progress import show_progress
from common.rng import make_rng
from models.adaptation import AdaptationNet

if TYPE_CHECKING:
    from accelerate import Accelerator

LARGER = 8 / 7  # photographs are kept at this multiple of the size that is cut out of them


class Domains(NamedTuple):
    """Square images, uint8 (n, 3, side, side); those of photographs larger than the network's.

    `target` has no labels. Those of `target_val` only measure.
    """

    source: Images
    source_val: Images
    target: Images
    target_val: Images
    classes: list[str]


def load_digit_domains(
    data_dir: Path, source: str, target: str, size: int, cache_dir: Path
) -> Domains:
    """Two domains of digits, with their own train and val splits, at `size` pixels.

    Raises UserError for a domain that is missing or broken.
    """
    parts = []
    for flag, domain in (("--source", source), ("--target", target)):
        for split in ("train", "val"):
            images = load_digits(data_dir, domain, split, cache_dir, f"{flag} {domain}: --data-dir")
            parts.append(images._replace(pixels=resize(images.pixels, size)))
    train, val, target_train, target_val = parts
    classes = [str(digit) for digit in range(10)]
    return Domains(train, val, target_train._replace(labels=None), target_val, classes)


def load_photograph_domains(
    source_dir: Path,
    target_dir: Path,
    classes: Literal["equal", "shared"],
    size: int,
    cache_dir: Path,
) -> Domains:
    """Two folders of photographs, CLASS/*.jpg.

    Every fifth image of a class of the source is for validation. All of the target are unlabelled
    training images and validation images at once, as in the benchmarks of the field. Their order
    depends on their pixels alone, not on their folders. Raises UserError for folders that do not
    fit, and for a broken file.
    """
    source = find_domain(source_dir, "--source-dir")
    target = find_domain(target_dir, "--target-dir")
    source, target = match_classes(source, target, classes)
    larger = round(LARGER * size)
    images = load_domain(source, larger, cache_dir)
    target_val = load_domain(target, larger, cache_dir)
    digests = [hashlib.sha256(pixels.numpy().tobytes()).digest() for pixels in target_val.pixels]
    target_val = take(
        target_val, torch.tensor(sorted(range(len(digests)), key=digests.__getitem__))
    )
    train_rows, val_rows = split_by_class(source)
    return Domains(
        take(images, train_rows),
        take(images, val_rows),
        target_val._replace(labels=None),
        target_val,
        source.classes,
    )


def resize(pixels: Tensor, size: int) -> Tensor:
    """uint8 images (n, 3, height, width) at another size (bilinear, antialiased)."""
    some = [
        F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True).round().byte()
        for part in pixels.split(1_000)
    ]
    return torch.cat(some)


class Inputs:
    """Images as `AdaptationNet.upper` reads them.

    With frozen stages their output is computed once, in half precision, for `views` augmented
    versions of each image.
    """

    def __init__(
        self,
        net: AdaptationNet,
        pixels: Tensor,
        augment: Literal["none", "digits", "photographs"],
        views: int = 1,
        key: tuple[int | str, ...] = (),
    ) -> None:
        """`pixels` are uint8 (n, 3, side, side) on the network's device.

        Larger images than the network's are cut. `key` is for the random numbers of the views.
        """
        self.net = net
        self.pixels = pixels
        self.augment = augment
        self.stored: Tensor | None = None
        if net.frozen:
            rng = make_rng(*key, "views", device=pixels.device)
            count = 1 if augment == "none" else views
            self.stored = torch.stack([self._view(rng) for _ in range(count)])

    def __len__(self) -> int:
        return len(self.pixels)

    def draw(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        """The images `rows`, int64, each augmented with random numbers of `rng`."""
        if self.stored is None:
            return self._lower(self.pixels[rows], rng)
        views = torch.randint(len(self.stored), rows.shape, generator=rng, device=rows.device)
        return self.stored[views, rows].float()

    @torch.no_grad()
    def _view(self, rng: torch.Generator) -> Tensor:
        """The output of the frozen stages for one version of every image."""
        self.net.eval()
        batches = self.pixels.split(50)
        shown = show_progress(batches, len(batches), "frozen stages, batches")
        return torch.cat([self._lower(some, rng).half() for some in shown])

    def _lower(self, pixels: Tensor, rng: torch.Generator) -> Tensor:
        """Augment images, cut them to the network's size, and pass them through frozen stages."""
        images = normalise(pixels)
        size = self.net.size
        if self.augment == "digits":
            images = turn_zoom_and_shift(images, rng)
        if self.augment == "photographs":
            images = crop_and_flip(images, size, rng)
        elif images.shape[2] > size:
            start = (images.shape[2] - size) // 2
            images = images[:, :, start : start + size, start : start + size]
        return self.net.lower(images.contiguous(memory_format=torch.channels_last))


@torch.inference_mode()
def probabilities(
    net: AdaptationNet, inputs: Inputs, accelerator: Accelerator, shared: bool = False
) -> tuple[Tensor, Tensor]:
    """The class probabilities of images without augmentation, and what the domain classifier reads.

    Both are float32 on the CPU, (n, classes) and (n, d). With `shared`, which all processes must
    then call, each process computes its share of the batches, and gets the results of all.
    """
    net.eval()
    device = accelerator.device
    rng = make_rng(0, device=device)  # images that are not augmented need none
    found = []
    read = []
    sharing = accelerator if shared else None
    batches = torch.arange(len(inputs), device=device).split(100)
    mine = my_share(batches, sharing)
    for rows in show_progress(mine, len(mine), "images, batches"):
        with accelerator.autocast():
            scores, features = net.upper(inputs.draw(rows, rng))
        found.append(scores.float().softmax(1).cpu())
        read.append(features.float().cpu())
    return torch.cat(gather_shares(found, sharing)), torch.cat(gather_shares(read, sharing))
