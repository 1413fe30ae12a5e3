"""One epoch of GAN training, start included: our scripts against the textbook loops, same networks.

The textbook loops decode with PIL in a DataLoader and train in fp32 with contiguous tensors.
DCGAN's has three backward passes a step, as PyTorch's well-known example. WGAN-GP's critic sees
real, generated and mixed images one after the other.

    python benchmarks/gan_training.py
    python benchmarks/gan_training.py --methods wgangp --images 640
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
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import p1_dcgan
import p1_wgangp
from benchmarks.harness import (
    import_heavy_packages,
    in_own_process,
    print_rate,
    synchronise,
    write_smooth_image,
)
from common.cli import UserError, at_least, each_once, in_range, run_cli
from common.device import make_accelerator, peak_memory
from models.gan import Critic, Discriminator, Generator

LATENT = 100


@dataclass
class Benchmark:
    """Time both loops of each method over one epoch; print their ratio and peak memory."""

    methods: tuple[Literal["dcgan", "wgangp"], ...] = ("dcgan", "wgangp")
    """Methods to time."""
    images: int = 1_920
    """Images of the epoch."""
    batch_size: int = 64
    """Images of a step."""
    num_workers: int = 2
    """Workers of the textbook loops' DataLoader."""

    def __post_init__(self) -> None:
        each_once("--methods", self.methods)
        at_least("--images", self.images, 1)
        at_least("--batch-size", self.batch_size, 2)
        in_range("--num-workers", self.num_workers, 0, 64)
        if self.images < 2 * self.batch_size:
            raise UserError(f"--images {self.images}: fewer than two steps of --batch-size")


class TextbookFaces(Dataset):
    """The images of a folder, opened one by one."""

    def __init__(self, folder: Path) -> None:
        from torchvision import transforms

        self.paths = sorted(folder.glob("*.png"))
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def textbook_dcgan(loader: DataLoader, device: torch.device) -> None:
    """The loop of PyTorch's example: a backward pass each for real, fake and generator."""
    generator = Generator().to(device)
    discriminator = Discriminator().to(device)
    cross_entropy = nn.BCEWithLogitsLoss()
    generator_adam = torch.optim.Adam(generator.parameters(), 2e-4, (0.5, 0.999))
    discriminator_adam = torch.optim.Adam(discriminator.parameters(), 2e-4, (0.5, 0.999))
    for images in loader:
        real = images.to(device)
        ones = torch.ones(len(real), device=device)
        zeros = torch.zeros(len(real), device=device)
        discriminator.zero_grad()
        cross_entropy(discriminator(real), ones).backward()
        fake = generator(torch.randn(len(real), LATENT, device=device))
        cross_entropy(discriminator(fake.detach()), zeros).backward()
        discriminator_adam.step()
        generator.zero_grad()
        cross_entropy(discriminator(fake), ones).backward()
        generator_adam.step()


def textbook_wgangp(loader: DataLoader, device: torch.device) -> None:
    """The usual loop: three passes of the critic, and the generator every fifth step."""
    generator = Generator().to(device)
    critic = Critic().to(device)
    generator_adam = torch.optim.Adam(generator.parameters(), 1e-4, (0.0, 0.9))
    critic_adam = torch.optim.Adam(critic.parameters(), 1e-4, (0.0, 0.9))
    for step, images in enumerate(loader):
        real = images.to(device)
        fake = generator(torch.randn(len(real), LATENT, device=device)).detach()
        epsilon = torch.rand(len(real), 1, 1, 1, device=device)
        mixed = torch.lerp(fake, real, epsilon).requires_grad_(True)
        (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        loss = critic(fake).mean() - critic(real).mean() + 10 * penalty
        critic.zero_grad()
        loss.backward()
        critic_adam.step()
        if (step + 1) % 5 == 0:
            generator.zero_grad()
            fake = generator(torch.randn(len(real), LATENT, device=device))
            (-critic(fake).mean()).backward()
            generator_adam.step()


def time_textbook(method: str, data_dir: Path, args: Benchmark) -> tuple[float, float]:
    """Seconds of one epoch of a textbook loop, and peak memory in MiB."""
    import_heavy_packages()
    device = make_accelerator().device
    start = time.perf_counter()
    loader = DataLoader(
        TextbookFaces(data_dir / "face" / "train"),
        args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.num_workers,
    )
    if method == "dcgan":
        textbook_dcgan(loader, device)
    else:
        textbook_wgangp(loader, device)
    synchronise(device)
    return time.perf_counter() - start, peak_memory(device)


def time_ours(method: str, data_dir: Path, args: Benchmark) -> tuple[float, float]:
    """Seconds of one epoch of our script, and peak memory in MiB."""
    import_heavy_packages()
    device = make_accelerator().device
    script = p1_dcgan if method == "dcgan" else p1_wgangp
    start = time.perf_counter()
    script.train(
        script.Train(
            data_dir=data_dir,
            output_dir=data_dir / f"run-{method}",
            epochs=1,
            batch_size=args.batch_size,
        )
    )
    synchronise(device)
    return time.perf_counter() - start, peak_memory(device)


def main(args: Benchmark) -> None:
    """Run the two loops of each method, ours second, each in a process of its own."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder)
        faces = data_dir / "face" / "train"
        faces.mkdir(parents=True)
        for index in range(args.images):
            write_smooth_image(faces / f"{index:05d}.png", 16, 64, rng)
        for method in args.methods:
            textbook, textbook_peak = in_own_process(time_textbook, method, data_dir, args)
            ours, our_peak = in_own_process(time_ours, method, data_dir, args)
            print_rate(f"{method} textbook", args.images, textbook, textbook_peak)
            print_rate(f"{method} ours", args.images, ours, our_peak)
            print(f"{method}: ours is {textbook / ours:.1f}x as fast")


if __name__ == "__main__":
    run_cli(Benchmark, main)
