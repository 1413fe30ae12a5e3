"""What more than one script measures."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common.data import Images, normalise


def normalised_batches(pixels: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Images for `device`, normalised: 500 at a time for a GPU, else 50, whose features stay in the CPU's cache."""
    for some in pixels.split(500 if device.type == "cuda" else 50):
        yield normalise(some.to(device))


@torch.inference_mode()
def classify(net: nn.Module, pixels: Tensor, accelerator: Accelerator) -> Tensor:
    """The class of uint8 images (n, 3, height, width), as int64 (n,).

    `net` takes float images in [-1, 1]; it gives (batch, classes), or a tuple whose first part is that.
    """
    net.eval()
    parts = []
    with accelerator.autocast():
        for some in normalised_batches(pixels, accelerator.device):
            output = net(some)
            scores = output[0] if isinstance(output, tuple) else output
            parts.append(scores.argmax(1).cpu())
    return torch.cat(parts)


def accuracy(net: nn.Module, images: Images, accelerator: Accelerator) -> float:
    """Share of labelled `images` classified right, in %."""
    return 100 * (classify(net, images.pixels, accelerator) == images.labels).double().mean().item()


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has had, in MiB: of tensors on a CUDA device, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
