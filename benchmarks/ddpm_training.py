"""One epoch of DDPM training, start included: p2_ddpm_train.py against the textbook loop, same net, in one run.

The textbook loop decodes with PIL in a DataLoader and trains in fp32 with contiguous tensors by Adam and the plain mean
squared error, whose value it asks for at every step. Ours decodes once into one uint8 tensor, trains channels-last in
the precision that --precision auto chooses, and averages the net besides. The time of the grid of samples that ours
draws after the epoch is subtracted: the textbook loop draws none. Each loop runs in a process of its own, so that its
peak memory is its own.

    python benchmarks/ddpm_training.py
    python benchmarks/ddpm_training.py --width 256 --images 20000 --batch-size 128
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import p2_ddpm_train
from benchmarks.dann_training import Folder, write_domain
from common.metrics import peak_memory
from common.run import UserError, command_line, make_accelerator
from models.context_unet import ContextUnet

T, DROP = 1_000, 0.1  # steps of noise, and the probability that a class is withheld: the defaults of p2_ddpm_train.py


@dataclass
class Benchmark:
    """Time both loops over one epoch; print images/s, their ratio and peak memory."""

    width: int = 128  # Channels of the net's first level.
    images: int = 1_280  # Images of the epoch.
    batch_size: int = 64  # Images of a step.
    num_workers: int = 2  # Workers of the textbook loop's DataLoader.


def textbook(args: Benchmark, folder: Path, device: torch.device) -> float:
    """One epoch as the public scripts have it: algorithm 1 of DDPM, a step's images decoded as they come."""
    dataset = Folder(folder, augmented=False)
    loader = DataLoader(dataset, args.batch_size, shuffle=True, drop_last=True, num_workers=args.num_workers)
    net = ContextUnet(3, args.width, 10).to(device).train()
    adam = torch.optim.Adam(net.parameters(), lr=1e-4)
    alpha_bars = (1 - torch.linspace(1e-4, 0.02, T)).cumprod(0).to(device)
    total = 0.0
    for images, labels in loader:
        x0, labels = images.to(device), labels.to(device)
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


def synchronise(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def train_ours(args: Benchmark, data_dir: Path, device: torch.device) -> float:
    """One epoch of p2_ddpm_train.train; returns the seconds that its grid of samples and its curves took."""
    end_epoch, spent = p2_ddpm_train.end_epoch, 0.0

    def timed_end(*arguments) -> None:
        nonlocal spent
        synchronise(device)
        start = time.perf_counter()
        end_epoch(*arguments)
        synchronise(device)
        spent += time.perf_counter() - start

    p2_ddpm_train.end_epoch = timed_end  # in this process only
    options = {"width": args.width, "epochs": 1, "images_per_epoch": args.images, "batch_size": args.batch_size}
    options |= {"steps": T, "drop": DROP}
    p2_ddpm_train.train(p2_ddpm_train.Train(data_dir=data_dir, output_dir=data_dir / "run", **options))
    return spent


def timed(ours: bool, data_dir: Path, args: Benchmark) -> tuple[float, float]:
    """Seconds of one epoch, start included, and peak memory of this process (or of the GPU) in MiB."""
    device = make_accelerator().device
    start = time.perf_counter()
    if ours:
        start += train_ours(args, data_dir, device)
    else:
        textbook(args, data_dir / "digits" / "mnistm", device)
    synchronise(device)
    seconds = time.perf_counter() - start
    return seconds, peak_memory(device)


def main(args: Benchmark) -> None:
    """Run both, ours second."""
    if args.images < 2 * args.batch_size:
        raise UserError(f"--images {args.images}: fewer than two steps of --batch-size {args.batch_size}")
    seconds, told = [], []
    with tempfile.TemporaryDirectory() as folder:
        write_domain(Path(folder) / "digits" / "mnistm", args.images, seed=0)
        for ours in (False, True):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                spent, peak = pool.submit(timed, ours, Path(folder), args).result()
            seconds.append(spent)
            name = "ours" if ours else "textbook"
            told.append(f"{name:9} {spent:7.1f} s, {args.images / spent:6.0f} images/s, peak {peak:,.0f} MiB")
    print("\n".join(told))
    print(f"ours is {seconds[0] / seconds[1]:.1f}x as fast (width {args.width}, batches of {args.batch_size})")


if __name__ == "__main__":
    command_line(Benchmark, main)
