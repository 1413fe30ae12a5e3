"""One epoch of DANN training, start included: this project's step against the textbook loop, same net, in one run.

The textbook loop decodes with PIL in a DataLoader, augments each image with torchvision transforms, and trains in fp32
with contiguous tensors and one forward pass for each domain. Ours decodes once into one uint8 tensor, augments whole
batches as tensors, and trains channels-last in the precision that --precision auto chooses.

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

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.run import UserError, command_line, make_accelerator
from models.dann import NETS
from p3_dann import RECIPES, Train, lambda_at, train


@dataclass
class Benchmark:
    """Time both loops over one epoch and print their ratio."""

    net: Literal["cnn", "deep"] = "deep"
    """Net to train."""
    images: int = 20_000
    """Images of the epoch, half of each domain."""
    batch_size: int = 64
    """Images of each domain in a step."""
    num_workers: int = 2
    """Workers of the textbook loop's DataLoader."""


class Folder(Dataset):
    """A csv's images, opened one by one."""

    def __init__(self, folder: Path, augmented: bool) -> None:
        rows = [line.split(",") for line in (folder / "train.csv").read_text().splitlines()[1:]]
        self.items = [(folder / "data" / name, int(label)) for name, label in rows]
        augmentation = [
            transforms.RandomGrayscale(),
            transforms.RandomAffine(12, (0.1, 0.1), (0.7, 1.3), 12),
            transforms.RandomApply([transforms.GaussianBlur(3)]),
            transforms.RandomInvert(),
        ]
        convert = [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
        self.transform = transforms.Compose((augmentation if augmented else []) + convert)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.items[index]
        return self.transform(Image.open(path).convert("RGB")), label


def write_domain(folder: Path, count: int, seed: int) -> None:
    """A domain of smooth random colours, which PNG compresses about as it does MNIST-M, with random labels."""
    rng = np.random.default_rng(seed)
    (folder / "data").mkdir(parents=True)
    rows = ["image_name,label"]
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (10, 10, 3), dtype=np.uint8))
        coarse.resize((28, 28), Image.Resampling.BICUBIC).save(folder / "data" / f"{index:05d}.png")
        rows.append(f"{index:05d}.png,{rng.integers(10)}")
    text = "\n".join(rows) + "\n"
    (folder / "train.csv").write_text(text)
    (folder / "val.csv").write_text("\n".join(rows[:101]) + "\n")


def textbook(args: Benchmark, data_dir: Path, device: torch.device) -> float:
    """Seconds of one epoch of the textbook loop."""
    start = time.perf_counter()
    augmented = RECIPES[args.net]["augmentation"] > 0
    source, target = (
        DataLoader(
            Folder(data_dir / "digits" / domain, augmented),
            args.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=args.num_workers,
        )
        for domain in ("mnistm", "svhn")
    )
    net: nn.Module = NETS[args.net]().to(device).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step, ((images, labels), (target_images, _)) in enumerate(zip(source, target, strict=True)):
        lambd = lambda_at(step / len(source), 1.0)
        labels = labels.to(device)
        classes, domains = net(images.to(device), lambd)
        loss = F.nll_loss(classes, labels) + F.nll_loss(domains, torch.zeros_like(labels))
        _, target_domains = net(target_images.to(device), lambd)
        loss = loss + F.nll_loss(target_domains, torch.ones_like(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()  # waits for the device
    return time.perf_counter() - start


def main(args: Benchmark) -> None:
    """Run both, ours second, and print seconds, images/s and the ratio."""
    if args.images < 4 * args.batch_size:
        raise UserError(f"--images {args.images}: fewer than two steps of --batch-size {args.batch_size}")
    device = make_accelerator().device
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder) / "hw2_data"
        for seed, domain in enumerate(("mnistm", "svhn")):
            write_domain(data_dir / "digits" / domain, args.images // 2, seed)
        NETS[args.net]().to(device)(torch.zeros(4, 3, 28, 28, device=device))  # starts the device, for both alike
        seconds = {"textbook": textbook(args, data_dir, device)}
        start = time.perf_counter()
        options = {"net": args.net, "epochs": 1, "images_per_epoch": args.images // 2, "batch_size": args.batch_size}
        train(Train(data_dir=data_dir, output_dir=Path(folder) / "run", **options))
        seconds["ours"] = time.perf_counter() - start
    for name, value in seconds.items():
        print(f"{name:9} {value:7.1f} s, {args.images / value:6.0f} images/s, start included")
    print(f"ours is {seconds['textbook'] / seconds['ours']:.1f}x as fast ({args.net} net, {device.type})")


if __name__ == "__main__":
    command_line(Benchmark, main)
