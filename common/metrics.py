"""What more than one script measures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from common.data import Images, normalise


@torch.inference_mode()
def classify(classifier: Callable[[Tensor], Tensor], pixels: Tensor, accelerator: Accelerator) -> Tensor:
    """The class of uint8 images (n, 3, height, width), as int64 (n,).

    `classifier` takes float images in [-1, 1] and gives (batch, classes); its net must be in eval mode.
    """
    with accelerator.autocast():
        parts = [classifier(normalise(some.to(accelerator.device))).argmax(1).cpu() for some in pixels.split(500)]
    return torch.cat(parts)


def accuracy(classifier: Callable[[Tensor], Tensor], images: Images, accelerator: Accelerator) -> float:
    """Share of labelled `images` classified right, in %."""
    return 100 * (classify(classifier, images.pixels, accelerator) == images.labels).double().mean().item()
