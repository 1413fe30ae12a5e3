"""Classes and accuracy of a trained classifier on whole sets of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from common.data import Images, labels_of, normalise
from common.processes import gather_shares, my_share
from common.progress import show_progress

if TYPE_CHECKING:
    from accelerate import Accelerator


def in_batches(
    compute: Callable[[Tensor], tuple[Tensor, ...]],
    pixels: Tensor,
    accelerator: Accelerator,
    shared: bool = False,
) -> list[Tensor]:
    """What `compute` makes of normalised batches of uint8 images (n, 3, height, width).

    Each of its outputs is put together for all images, on the CPU. A batch has 500 images on a GPU,
    else 50, whose features stay in the CPU's cache. With `shared`, which all processes must then
    call, each process computes its share of the batches, and gets the results of all.
    """
    size = 500 if accelerator.device.type == "cuda" else 50
    batches = pixels.split(size)
    sharing = accelerator if shared else None
    mine = my_share(batches, sharing)
    results = []
    for batch in show_progress(mine, len(mine), "images, batches"):
        outputs = compute(normalise(batch.to(accelerator.device)))
        results.append([output.cpu() for output in outputs])
    results = gather_shares(results, sharing)
    return [torch.cat(parts) for parts in zip(*results, strict=True)]


@torch.inference_mode()
def scores_of(
    net: nn.Module, pixels: Tensor, accelerator: Accelerator, shared: bool = False
) -> Tensor:
    """The scores (n, classes) that `net` gives to uint8 images (n, 3, height, width), on the CPU.

    `net` takes float images in [-1, 1] and returns scores (batch, classes), or a tuple that starts
    with them. `shared` is that of `in_batches`.
    """

    def scores(batch: Tensor) -> tuple[Tensor]:
        output = net(batch)
        return (output[0] if isinstance(output, tuple) else output,)

    net.eval()
    with accelerator.autocast():
        (found,) = in_batches(scores, pixels, accelerator, shared)
    return found


def classify(
    net: nn.Module, pixels: Tensor, accelerator: Accelerator, shared: bool = False
) -> Tensor:
    """The classes, int64 (n,), that `net` finds in uint8 images (n, 3, height, width)."""
    return scores_of(net, pixels, accelerator, shared).argmax(1)


def accuracy(
    net: nn.Module, images: Images, accelerator: Accelerator, shared: bool = False
) -> float:
    """Percentage of the labelled images that are classified correctly."""
    correct = classify(net, images.pixels, accelerator, shared) == labels_of(images)
    return 100 * correct.double().mean().item()
