"""What the benchmarks share: child processes, made images, a textbook data set, printed lines."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def import_heavy_packages() -> None:
    """Import what either loop imports when it first needs it, before the clock starts."""
    import torchvision.transforms
    import torchvision.utils  # noqa: F401

    from common.figures import pyplot

    pyplot()


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has finished; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def write_smooth_image(path: Path, coarse: int, size: int, rng: np.random.Generator) -> None:
    """Write an image of smooth random colours; PNG compresses it about as well as a photograph."""
    pixels = rng.integers(0, 256, (coarse, coarse, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(path)


def write_domain(folder: Path, count: int, seed: int) -> None:
    """Write a digit domain of smooth random 28x28 images with random labels.

    Its val.csv lists the first 100 images again.
    """
    rng = np.random.default_rng(seed)
    (folder / "data").mkdir(parents=True)
    rows = ["image_name,label"]
    for index in range(count):
        name = f"{index:05d}.png"
        write_smooth_image(folder / "data" / name, 10, 28, rng)
        rows.append(f"{name},{rng.integers(10)}")
    (folder / "train.csv").write_text("\n".join(rows) + "\n")
    (folder / "val.csv").write_text("\n".join(rows[:101]) + "\n")


class TextbookDigits(Dataset):
    """The images and labels of a domain's train.csv, opened one by one, as most code reads them."""

    def __init__(self, folder: Path, augmented: bool) -> None:
        from torchvision import transforms

        self.items = []
        for line in (folder / "train.csv").read_text().splitlines()[1:]:
            name, label = line.split(",")
            self.items.append((folder / "data" / name, int(label)))
        steps: list[Any] = []
        if augmented:
            steps = [
                transforms.RandomGrayscale(),
                transforms.RandomAffine(12, (0.1, 0.1), (0.7, 1.3), 12),
                transforms.RandomApply([transforms.GaussianBlur(3)]),
                transforms.RandomInvert(),
            ]
        steps += [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.items[index]
        return self.transform(Image.open(path).convert("RGB")), label


def print_rate(name: str, images: int, seconds: float, peak: float | None = None) -> None:
    """Print how fast a loop was, and its peak memory in MiB if it is known."""
    line = f"{name:16} {seconds:7.1f} s, {images / seconds:7.1f} images/s"
    if peak is not None:
        line += f", peak {peak:,.0f} MiB"
    print(line)
