"""Seconds of one pass of the course's DDIM U-Net: as p2_ddim.py runs it against a plain pass.

The network is the course's (113.7 M parameters, 256x256 images) with random weights of a fixed
seed, or --checkpoint. The plain pass has the same weights in fp32, contiguous tensors, and
attention with an explicit softmax. "Ours" is the network as p2_ddim.py runs it, channels-last, in
--precision fp32 (its default) and bf16. Each runs in a process of its own. Its seconds are the
least of --repeats passes after a first one.

The error of bf16 is that of ε against ours in fp32, beside the standard deviation of ε; that of
fp32 is against the plain pass. Random weights show its size; --checkpoint measures it for trained
ones.

    python benchmarks/ddim_unet.py
    python benchmarks/ddim_unet.py --checkpoint hw2_data/face/UNet.pt --batch-size 10
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.harness import in_own_process
from common.checkpoints import save_net
from common.cli import UserError, at_least, in_range, run_cli
from common.device import peak_memory
from models.ddim_unet import Block, DdimUnet, ResidualBlock, SelfAttention
from p2_ddim import Generate, load_model

Way = Literal["plain", "fp32", "bf16"]
T = 500  # the step of the schedule at which the network is asked


@dataclass(kw_only=True)
class Benchmark:
    """Time the three passes; print seconds, ratios, peak memory and errors."""

    checkpoint: Path | None = None
    """The course's UNet.pt; random weights without it."""
    size: int = 256
    """Side of the images, a multiple of 32."""
    width: int = 128
    """Channels of the random network's first level, a multiple of 4."""
    batch_size: int = 1
    """Images of a pass."""
    repeats: int = 3
    """Passes that are timed."""

    def __post_init__(self) -> None:
        in_range("--size", self.size, 32, 4_096)
        if self.size % 32:
            raise UserError(f"--size {self.size}: must be a multiple of 32")
        in_range("--width", self.width, 4, 4_096)
        if self.width % 4:
            raise UserError(f"--width {self.width}: must be a multiple of 4")
        at_least("--batch-size", self.batch_size, 1)
        at_least("--repeats", self.repeats, 1)


class Timed(NamedTuple):
    """ε (batch, 3, size, size), the seconds of a pass, and peak memory in MiB."""

    eps: Tensor
    seconds: float
    peak: float


def write_random(path: Path, args: Benchmark) -> None:
    """Write a network in which no layer is zero, as some of a new DdimUnet are."""
    net = DdimUnet(size=args.size, width=args.width)
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    save_net(path, net, net.config)


def plain_residual(block: ResidualBlock, x: Tensor, time: Tensor) -> Tensor:
    """The residual block as in most code."""
    h = block.conv1(F.silu(block.norm1(x)))
    h = h + block.time(time)[:, :, None, None]
    h = block.conv2(F.silu(block.norm2(h)))
    return h + block.skip(x)


def plain_attention(attention: SelfAttention, x: Tensor) -> Tensor:
    """Attention with the matrix of all pairs of positions."""
    qkv = attention.qkv(attention.norm(x)).flatten(2)
    q, k, v = qkv.chunk(3, dim=1)  # (batch, channels, positions) each
    weights = (q.mT @ k / x.shape[1] ** 0.5).softmax(-1)  # (batch, positions, positions)
    return x + attention.out((v @ weights.mT).reshape(x.shape))


def plain_layer(layer: nn.Module, x: Tensor, time: Tensor) -> Tensor:
    """One layer of the U-Net."""
    if not isinstance(layer, Block):
        return layer(x)
    x = plain_residual(layer.resblocks, x, time)
    if isinstance(layer.attention, SelfAttention):
        x = plain_attention(layer.attention, x)
    return x


def plain(net: DdimUnet, x: Tensor, t: Tensor) -> Tensor:
    """The forward pass of DdimUnet, layer by layer."""
    time = net.time(t)
    x = F.pixel_unshuffle(x, net.patch)
    kept = []
    for number in range(1, net.lengths["down"] + 1):
        x = plain_layer(getattr(net, f"down{number}"), x, time)
        kept.append(x)
    for number in range(1, net.lengths["mid"] + 1):
        x = plain_layer(getattr(net, f"mid{number}"), x, time)
    for number in range(1, net.lengths["up"] + 1):
        layer = getattr(net, f"up{number}")
        if isinstance(layer, Block):
            x = torch.cat((x, kept.pop()), 1)
        x = plain_layer(layer, x, time)
    return F.pixel_shuffle(net.out(x), net.patch)


@torch.inference_mode()
def time_pass(way: Way, checkpoint: Path, args: Benchmark) -> Timed:
    """Time one way of running the network."""
    options = Generate(
        noise_dir=Path(),
        output_dir=Path(),
        checkpoint=checkpoint,
        precision="bf16" if way == "bf16" else "fp32",
    )
    model = load_model(options, (args.size, args.size))
    device = model.accelerator.device
    layout = torch.contiguous_format if way == "plain" else torch.channels_last
    net = model.net.to(memory_format=layout)
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(args.batch_size, 3, args.size, args.size, generator=rng)
    noise = noise.to(device).contiguous(memory_format=layout)
    times = torch.full((args.batch_size,), T - 1.0, device=device)  # the course counts from 0
    seconds = []
    with model.accelerator.autocast():
        for _ in range(1 + args.repeats):
            start = time.perf_counter()
            output = plain(net, noise, times) if way == "plain" else net(noise, times)
            eps = output.float().cpu()  # waits for the GPU
            seconds.append(time.perf_counter() - start)
    return Timed(eps.contiguous(), min(seconds[1:]), peak_memory(device))


def main(args: Benchmark) -> None:
    """Run the plain pass, then ours in both precisions."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint
        if checkpoint is None:
            checkpoint = Path(folder) / "model.safetensors"
            write_random(checkpoint, args)
        plain_pass = in_own_process(time_pass, "plain", checkpoint, args)
        fp32 = in_own_process(time_pass, "fp32", checkpoint, args)
        bf16 = in_own_process(time_pass, "bf16", checkpoint, args)
    print_pass("plain", plain_pass, args)
    print_pass("ours fp32", fp32, args)
    print_comparison(fp32, plain_pass, plain_pass, "plain")
    print_pass("ours bf16", bf16, args)
    print_comparison(bf16, plain_pass, fp32, "ours fp32")


def print_pass(name: str, timed: Timed, args: Benchmark) -> None:
    """Print the seconds and the memory of a pass."""
    print(
        f"{name:10} {timed.seconds:8.3f} s a pass of {args.batch_size}, peak {timed.peak:,.0f} MiB"
    )


def print_comparison(timed: Timed, baseline: Timed, reference: Timed, name: str) -> None:
    """Print how much faster than the baseline a pass is, and its error against the reference."""
    error = (timed.eps - reference.eps).abs()
    sd = reference.eps.std()
    print(
        f"{'':10} {baseline.seconds / timed.seconds:.2f}x as fast as plain; error of ε against "
        f"{name}: at most {error.max():.2g}, mean {error.mean():.2g}, which is "
        f"{100 * error.mean() / sd:.2g} % of the sd {sd:.2f}"
    )


if __name__ == "__main__":
    run_cli(Benchmark, main)
