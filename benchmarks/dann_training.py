"""One epoch of DANN training, start included: p3_dann.py against the textbook loop, same network.

The textbook loop decodes with PIL in a DataLoader, augments each image with torchvision transforms,
and trains in fp32 with contiguous tensors and one forward pass for each domain. Ours decodes once
into one uint8 tensor, augments whole batches as tensors, and trains channels-last in the precision
that --precision auto chooses.

    python benchmarks/dann_training.py
    python benchmarks/dann_training.py --net cnn --images 20000
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.harness import (
    TextbookDigits,
    import_heavy_packages,
    print_rate,
    write_domain,
)
from common.cli import UserError, at_least, in_range, run_cli
from common.device import make_accelerator
from models.dann import NETS
from p3_dann import RECIPES, DomainAdversarial, Train, lambda_at, train


@dataclass
class Benchmark:
    """Time both loops over one epoch and print their ratio."""

    net: Literal["cnn", "deep"] = "deep"
    """Network to train."""
    images: int = 20_000
    """Images of the epoch, half of each domain."""
    batch_size: int = 64
    """Images of each domain in a step."""
    num_workers: int = 2
    """Workers of the textbook loop's DataLoader."""

    def __post_init__(self) -> None:
        at_least("--images", self.images, 1)
        at_least("--batch-size", self.batch_size, 2)
        in_range("--num-workers", self.num_workers, 0, 64)
        if self.images < 4 * self.batch_size:
            raise UserError(f"--images {self.images}: fewer than two steps of --batch-size")


def textbook(args: Benchmark, data_dir: Path, device: torch.device) -> float:
    """Seconds of one epoch of the textbook loop."""
    start = time.perf_counter()
    augmented = RECIPES[args.net]["augmentation"] > 0
    loaders = []
    for domain in ("mnistm", "svhn"):
        dataset = TextbookDigits(data_dir / "digits" / domain, augmented)
        loaders.append(
            DataLoader(
                dataset,
                args.batch_size,
                shuffle=True,
                drop_last=True,
                num_workers=args.num_workers,
            )
        )
    source, target = loaders
    net = DomainAdversarial(NETS[args.net]()).to(device).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step, ((images, labels), (target_images, _)) in enumerate(zip(source, target, strict=True)):
        lambd = lambda_at(step / len(source), 1.0)
        labels = labels.to(device)
        class_log_p, source_log_p = net(images.to(device), lambd)
        _, target_log_p = net(target_images.to(device), lambd)
        loss = F.nll_loss(class_log_p, labels)
        loss = loss + F.nll_loss(source_log_p, torch.zeros_like(labels))
        loss = loss + F.nll_loss(target_log_p, torch.ones_like(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()  # waits for the device
    return time.perf_counter() - start


def ours(args: Benchmark, data_dir: Path, output_dir: Path) -> float:
    """Seconds of one epoch of p3_dann.py."""
    start = time.perf_counter()
    train(
        Train(
            data_dir=data_dir,
            output_dir=output_dir,
            net=args.net,
            epochs=1,
            images_per_epoch=args.images // 2,
            batch_size=args.batch_size,
        )
    )
    return time.perf_counter() - start


def main(args: Benchmark) -> None:
    """Run both loops, ours second."""
    import_heavy_packages()
    device = make_accelerator().device
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder) / "hw2_data"
        for seed, domain in enumerate(("mnistm", "svhn")):
            write_domain(data_dir / "digits" / domain, args.images // 2, seed)
        NETS[args.net]().to(device)(torch.zeros(4, 3, 28, 28, device=device))  # starts the device
        seconds_textbook = textbook(args, data_dir, device)
        seconds_ours = ours(args, data_dir, Path(folder) / "run")
    print_rate("textbook", args.images, seconds_textbook)
    print_rate("ours", args.images, seconds_ours)
    ratio = seconds_textbook / seconds_ours
    print(f"ours is {ratio:.1f}x as fast, start included ({args.net} network, {device.type})")


if __name__ == "__main__":
    run_cli(Benchmark, main)
