"""One epoch of GAN training: this project's scripts against the textbook loops, same nets, in one run.

The textbook loops decode with PIL in a DataLoader and train in fp32 with contiguous tensors; DCGAN's has three backward
passes a step, as PyTorch's well-known example has, and WGAN-GP's critic sees real, generated and mixed images one after
the other. Each loop runs in a process of its own, so that its peak memory is its own.

    python benchmarks/gan_training.py
    python benchmarks/gan_training.py --methods wgangp --images 640
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import p1_dcgan
import p1_wgangp
from common.metrics import peak_memory
from common.run import UserError, command_line, make_accelerator
from models.gan import Critic, Discriminator, Generator

SCRIPTS = {"dcgan": p1_dcgan, "wgangp": p1_wgangp}


@dataclass
class Benchmark:
    """Time both loops of each method over one epoch; print their ratio and peak memory."""

    methods: tuple[Literal["dcgan", "wgangp"], ...] = ("dcgan", "wgangp")  # Which to time.
    images: int = 1_920  # Images of the epoch.
    batch_size: int = 64  # Images of a step.
    num_workers: int = 2  # Workers of the textbook loops' DataLoader.


class Folder(Dataset):
    """A folder's images, opened one by one."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.png"))
        self.transform = transforms.Compose(
            [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def textbook_dcgan(loader: DataLoader, device: torch.device) -> None:
    """The example's loop: real, fake and generator, a backward pass each."""
    g, d, bce = Generator().to(device), Discriminator().to(device), nn.BCEWithLogitsLoss()
    g_adam, d_adam = (torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (g, d))
    for images in loader:
        real = images.to(device)
        ones, zeros = torch.ones(len(real), device=device), torch.zeros(len(real), device=device)
        d.zero_grad()
        bce(d(real), ones).backward()
        fake = g(torch.randn(len(real), 100, device=device))
        bce(d(fake.detach()), zeros).backward()
        d_adam.step()
        g.zero_grad()
        bce(d(fake), ones).backward()
        g_adam.step()


def textbook_wgangp(loader: DataLoader, device: torch.device) -> None:
    """The usual loop: three passes of the critic, the generator every fifth step."""
    g, critic = Generator().to(device), Critic().to(device)
    g_adam, c_adam = (torch.optim.Adam(net.parameters(), 1e-4, (0.0, 0.9)) for net in (g, critic))
    for step, images in enumerate(loader):
        real = images.to(device)
        fake = g(torch.randn(len(real), 100, device=device)).detach()
        mixed = torch.lerp(fake, real, torch.rand(len(real), 1, 1, 1, device=device)).requires_grad_(True)
        (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        critic.zero_grad()
        (critic(fake).mean() - critic(real).mean() + 10 * penalty).backward()
        c_adam.step()
        if (step + 1) % 5 == 0:
            g.zero_grad()
            (-critic(g(torch.randn(len(real), 100, device=device))).mean()).backward()
            g_adam.step()


def timed(method: str, ours: bool, data_dir: Path, args: Benchmark) -> tuple[float, float]:
    """Seconds of one epoch, start included, and peak memory of this process (or of the GPU) in MiB."""
    device = make_accelerator().device
    start = time.perf_counter()
    if ours:
        output_dir = data_dir / f"run-{method}"
        options = {"data_dir": data_dir, "epochs": 1, "batch_size": args.batch_size}
        SCRIPTS[method].train(SCRIPTS[method].Train(output_dir=output_dir, **options))
    else:
        folder = Folder(data_dir / "face" / "train")
        loader = DataLoader(folder, args.batch_size, shuffle=True, drop_last=True, num_workers=args.num_workers)
        {"dcgan": textbook_dcgan, "wgangp": textbook_wgangp}[method](loader, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, peak_memory(device)


def main(args: Benchmark) -> None:
    """Run each method's two loops, ours second."""
    if args.images < 2 * args.batch_size:
        raise UserError(f"--images {args.images}: fewer than two steps of --batch-size {args.batch_size}")
    rng, told = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        faces = Path(folder) / "face" / "train"
        faces.mkdir(parents=True)
        for index in range(args.images):
            coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            coarse.resize((64, 64), Image.Resampling.BICUBIC).save(faces / f"{index:05d}.png")
        for method in args.methods:
            seconds = []
            for ours in (False, True):
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    spent, peak = pool.submit(timed, method, ours, Path(folder), args).result()
                seconds.append(spent)
                name = f"{method} {'ours' if ours else 'textbook'}"
                told.append(f"{name:16} {spent:7.1f} s, {args.images / spent:6.0f} images/s, peak {peak:,.0f} MiB")
            told.append(f"{method}: ours is {seconds[0] / seconds[1]:.1f}x as fast")
    print("\n".join(told))


if __name__ == "__main__":
    command_line(Benchmark, main)
