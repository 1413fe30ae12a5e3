"""Seconds of one pass of the course's DDIM U-Net: as p2_ddim.py runs it, in fp32 and bf16, against a plain pass.

The net is the course's (113.7 M parameters, 256x256 images) with random weights of a fixed seed, or --checkpoint. The
plain pass has the same weights in fp32, contiguous tensors and attention by an explicit softmax; "ours" is the net of
p2_ddim.Model as that script runs it, channels-last, in its --precision fp32 (its default) and bf16. Each runs in a
process of its own, so that its peak memory is its own; its seconds are the least of --repeats passes after a first one.

bf16's error is that of ε against ours in fp32, beside the sd of ε; fp32's is against the plain pass. Random weights
tell its size; with trained ones ask for it by --checkpoint.

    python benchmarks/ddim_unet.py
    python benchmarks/ddim_unet.py --checkpoint hw2_data/face/UNet.pt --batch-size 10
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import p2_ddim
from common.metrics import peak_memory
from common.run import UserError, atomic_write, command_line
from models.ddim_unet import Block, DdimUnet, ResidualBlock, SelfAttention

Way = Literal["plain", "fp32", "bf16"]
T = 500  # the step of the schedule at which the net is asked


@dataclass(kw_only=True)
class Benchmark:
    """Time the three passes; print seconds, ratios, peak memory and errors."""

    checkpoint: Path | None = None  # The course's UNet.pt; without it the weights are random.
    size: int = 256  # Side of the images, a multiple of 32.
    width: int = 128  # Of the random net's first level, a multiple of 4.
    batch_size: int = 1  # Images of a pass.
    repeats: int = 3  # Passes that are timed.


def write_random(path: Path, args: Benchmark) -> None:
    """A net in which no layer is zero, as those of a new DdimUnet are, so that every branch counts."""
    net = DdimUnet(size=args.size, width=args.width)
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    metadata = {"config": json.dumps(net.config)}
    atomic_write(path, lambda file: safetensors.torch.save_file(net.state_dict(), file, metadata))


def plain_residual(block: ResidualBlock, x: Tensor, time: Tensor) -> Tensor:
    """The residual block as most code has it."""
    h = block.conv1(F.silu(block.norm1(x)))
    h = h + block.time(time)[:, :, None, None]
    h = block.conv2(F.silu(block.norm2(h)))
    return h + block.skip(x)


def plain_attention(attention: SelfAttention, x: Tensor) -> Tensor:
    """Attention by the matrix of all pairs of positions."""
    q, k, v = attention.qkv(attention.norm(x)).flatten(2).chunk(3, dim=1)  # (batch, channels, positions) each
    weights = (q.mT @ k / x.shape[1] ** 0.5).softmax(-1)  # (batch, positions, positions)
    return x + attention.out((v @ weights.mT).reshape(x.shape))


def plain(net: DdimUnet, x: Tensor, t: Tensor) -> Tensor:
    """The pass of DdimUnet, layer by layer."""
    time, x, kept = net.time(t), F.pixel_unshuffle(x, net.patch), []

    def through(layer: nn.Module, x: Tensor) -> Tensor:
        if not isinstance(layer, Block):
            return layer(x)
        x = plain_residual(layer.resblocks, x, time)
        return plain_attention(layer.attention, x) if isinstance(layer.attention, SelfAttention) else x

    for number in range(1, net.lengths["down"] + 1):
        x = through(getattr(net, f"down{number}"), x)
        kept.append(x)
    for number in range(1, net.lengths["mid"] + 1):
        x = through(getattr(net, f"mid{number}"), x)
    for number in range(1, net.lengths["up"] + 1):
        layer = getattr(net, f"up{number}")
        x = through(layer, torch.cat((x, kept.pop()), 1) if isinstance(layer, Block) else x)
    return F.pixel_shuffle(net.out(x), net.patch)


@torch.inference_mode()
def timed(way: Way, checkpoint: Path, args: Benchmark) -> tuple[Tensor, float, float]:
    """ε (batch, 3, size, size), the least seconds of a pass, and peak memory of this process (or of the GPU) in MiB."""
    options = {"noise_dir": Path(), "output_dir": Path(), "precision": "bf16" if way == "bf16" else "fp32"}
    model = p2_ddim.Model(p2_ddim.Generate(checkpoint=checkpoint, **options), (args.size, args.size))
    device = model.accelerator.device
    noise = torch.randn(args.batch_size, 3, args.size, args.size, generator=torch.Generator().manual_seed(0)).to(device)
    times = torch.full((args.batch_size,), T - 1.0, device=device)  # the course counts from 0
    layout = torch.contiguous_format if way == "plain" else torch.channels_last
    net, noise = model.net.to(memory_format=layout), noise.contiguous(memory_format=layout)
    seconds = []
    with model.accelerator.autocast():
        for _ in range(1 + args.repeats):
            start = time.perf_counter()
            eps = (plain(net, noise, times) if way == "plain" else net(noise, times)).float().cpu()  # waits for the GPU
            seconds.append(time.perf_counter() - start)
    return eps.contiguous(), min(seconds[1:]), peak_memory(device)


def main(args: Benchmark) -> None:
    """Run the plain pass, then ours in both precisions."""
    if args.repeats < 1 or args.batch_size < 1 or args.size % 32 or args.width % 4:
        raise UserError("--repeats, --batch-size: at least 1; --size: a multiple of 32; --width: a multiple of 4")
    found: dict[str, tuple[Tensor, float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or Path(folder) / "model.safetensors"
        if args.checkpoint is None:
            write_random(checkpoint, args)
        for way in ("plain", "fp32", "bf16"):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found[way] = pool.submit(timed, way, checkpoint, args).result()
    for way, (eps, seconds, peak) in found.items():
        name = "plain" if way == "plain" else f"ours {way}"
        line = f"{name:10} {seconds:8.3f} s a pass of {args.batch_size}, peak {peak:,.0f} MiB"
        if way != "plain":
            reference = found["plain" if way == "fp32" else "fp32"][0]
            error = (eps - reference).abs()
            line += f", {found['plain'][1] / seconds:.2f}x as fast; error of ε: at most {error.max():.2g}, mean"
            line += f" {error.mean():.2g}, which is {100 * error.mean() / reference.std():.2g} % of its sd"
            line += f" {reference.std():.2f} (against {'plain' if way == 'fp32' else 'ours fp32'})"
        print(line)


if __name__ == "__main__":
    command_line(Benchmark, main)
