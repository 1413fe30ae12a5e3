"""Classes and accuracy of a trained classifier on whole sets of images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from common.data import Images, labels_of, normalise

if TYPE_CHECKING:
    from accelerate import Accelerator


def normalised_batches(pixels: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Split uint8 images (n, 3, height, width) into normalised batches on `device`.

    500 at a time for a GPU, else 50, whose features stay in the CPU's cache.
    """
    size = 500 if device.type == "cuda" else 50
    for batch in pixels.split(size):
        yield normalise(batch.to(device))


@torch.inference_mode()
def scores_of(net: nn.Module, pixels: Tensor, accelerator: Accelerator) -> Tensor:
    """The scores (n, classes) that `net` gives to uint8 images (n, 3, height, width), on the CPU.

    `net` takes float images in [-1, 1] and returns scores (batch, classes), or a tuple that starts
    with them.
    """
    net.eval()
    scores = []
    with accelerator.autocast():
        for batch in normalised_batches(pixels, accelerator.device):
            output = net(batch)
            scores.append((output[0] if isinstance(output, tuple) else output).cpu())
    return torch.cat(scores)


def classify(net: nn.Module, pixels: Tensor, accelerator: Accelerator) -> Tensor:
    """The classes, int64 (n,), that `net` finds in uint8 images (n, 3, height, width)."""
    return scores_of(net, pixels, accelerator).argmax(1)


def accuracy(net: nn.Module, images: Images, accelerator: Accelerator) -> float:
    """Percentage of the labelled images that are classified correctly."""
    correct = classify(net, images.pixels, accelerator) == labels_of(images)
    return 100 * correct.double().mean().item()
