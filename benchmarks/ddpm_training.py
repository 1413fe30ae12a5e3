"""One epoch of DDPM training, start included: p2_ddpm_train.py against the textbook loop.

The textbook loop decodes with PIL in a DataLoader and trains in fp32 with contiguous tensors, Adam
and the plain mean squared error, whose value it asks for in every step. Ours decodes once into one
uint8 tensor, trains channels-last in the precision that --precision auto chooses, and also averages
the network. The time of the grid of samples and the curves that ours draws after the epoch is
subtracted, because the textbook loop draws none. Both train the same network.

    python benchmarks/ddpm_training.py
    python benchmarks/ddpm_training.py --width 256 --images 20000 --batch-size 128
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import p2_ddpm_train
from benchmarks.harness import (
    TextbookDigits,
    import_heavy_packages,
    in_own_process,
    print_rate,
    synchronise,
    write_domain,
)
from common.cli import UserError, at_least, in_range, run_cli
from common.device import make_accelerator, peak_memory
from models.context_unet import ContextUnet

T = 1_000  # steps of noise, the default of p2_ddpm_train.py
DROP = 0.1  # probability that a class is withheld, likewise


@dataclass
class Benchmark:
    """Time both loops over one epoch; print images/s, their ratio and peak memory."""

    width: int = 128
    """Channels of the network's first level."""
    images: int = 1_280
    """Images of the epoch."""
    batch_size: int = 64
    """Images of a step."""
    num_workers: int = 2
    """Workers of the textbook loop's DataLoader."""

    def __post_init__(self) -> None:
        in_range("--width", self.width, 32, 4_096)
        at_least("--images", self.images, 1)
        at_least("--batch-size", self.batch_size, 2)
        in_range("--num-workers", self.num_workers, 0, 64)
        if self.images < 2 * self.batch_size:
            raise UserError(f"--images {self.images}: fewer than two steps of --batch-size")


def textbook(args: Benchmark, folder: Path, device: torch.device) -> float:
    """One epoch as in the public scripts: algorithm 1 of DDPM. Returns the mean loss."""
    loader = DataLoader(
        TextbookDigits(folder, augmented=False),
        args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.num_workers,
    )
    net = ContextUnet(3, args.width, 10).to(device).train()
    adam = torch.optim.Adam(net.parameters(), lr=1e-4)
    alpha_bars = (1 - torch.linspace(1e-4, 0.02, T)).cumprod(0).to(device)
    total = 0.0
    for images, labels in loader:
        x0 = images.to(device)
        labels = labels.to(device)
        t = torch.randint(1, T + 1, (len(x0),), device=device)
        noise = torch.randn_like(x0)
        alpha_bar = alpha_bars[t - 1][:, None, None, None]
        x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
        drop = torch.rand(len(x0), device=device) < DROP
        loss = F.mse_loss(net(x_t, t / T, labels, drop), noise)
        adam.zero_grad()
        loss.backward()
        adam.step()
        total += loss.item()
    return total / len(loader)


def time_textbook(args: Benchmark, data_dir: Path) -> tuple[float, float]:
    """Seconds of one epoch of the textbook loop, and peak memory in MiB."""
    import_heavy_packages()
    device = make_accelerator().device
    start = time.perf_counter()
    textbook(args, data_dir / "digits" / "mnistm", device)
    synchronise(device)
    return time.perf_counter() - start, peak_memory(device)


class Stopwatch:
    """Calls a function and adds up the seconds that it takes."""

    def __init__(self, function: Any, device: torch.device) -> None:
        self.function = function
        self.device = device
        self.seconds = 0.0

    def __call__(self, *arguments: Any) -> Any:
        """Call the function and return its result."""
        synchronise(self.device)
        start = time.perf_counter()
        result = self.function(*arguments)
        synchronise(self.device)
        self.seconds += time.perf_counter() - start
        return result


def time_ours(args: Benchmark, data_dir: Path) -> tuple[float, float]:
    """Seconds of one epoch of p2_ddpm_train.py without its plots, and peak memory in MiB."""
    import_heavy_packages()
    device = make_accelerator().device
    curves = Stopwatch(p2_ddpm_train.end_epoch, device)
    samples = Stopwatch(p2_ddpm_train.draw_samples, device)
    p2_ddpm_train.end_epoch = curves  # in this process only
    p2_ddpm_train.draw_samples = samples
    start = time.perf_counter()
    p2_ddpm_train.train(
        p2_ddpm_train.Train(
            data_dir=data_dir,
            output_dir=data_dir / "run",
            width=args.width,
            epochs=1,
            images_per_epoch=args.images,
            batch_size=args.batch_size,
            timesteps=T,
            drop=DROP,
        )
    )
    synchronise(device)
    seconds = time.perf_counter() - start - curves.seconds - samples.seconds
    return seconds, peak_memory(device)


def main(args: Benchmark) -> None:
    """Run both loops, ours second, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder)
        write_domain(data_dir / "digits" / "mnistm", args.images, seed=0)
        seconds_textbook, peak_textbook = in_own_process(time_textbook, args, data_dir)
        seconds_ours, peak_ours = in_own_process(time_ours, args, data_dir)
    print_rate("textbook", args.images, seconds_textbook, peak_textbook)
    print_rate("ours", args.images, seconds_ours, peak_ours)
    ratio = seconds_textbook / seconds_ours
    print(f"ours is {ratio:.1f}x as fast (width {args.width}, batches of {args.batch_size})")


if __name__ == "__main__":
    run_cli(Benchmark, main)
