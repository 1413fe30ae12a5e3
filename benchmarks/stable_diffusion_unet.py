"""Seconds of one call of Stable Diffusion's U-Net: ours against diffusers' UNet2DConditionModel.

Both have the same random weights, the same precision and the same inputs. Theirs has contiguous
tensors, as its pipelines run it; ours is channels-last. The calls are made in turn, so that both
meet the same other programs. The ratio is the median of those of the pairs. The outputs are
compared, too.

The default is the network at its full width, 859.5 M parameters, which takes 7 GB in fp32.

    python benchmarks/stable_diffusion_unet.py
    python benchmarks/stable_diffusion_unet.py --width 128 --repeats 20
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.harness import synchronise
from common.cli import UserError, at_least, in_range, run_cli
from common.device import Device, Precision, make_accelerator, place
from models.stable_diffusion.unet import Unet

TOKENS = 77  # of a text


@dataclass(kw_only=True)
class Benchmark:
    """Time the calls of both; print milliseconds, the ratio and the largest difference."""

    width: int = 320
    """Channels of the first level, a multiple of 32; the published network has 320."""
    size: int = 32
    """Side of the latents, a multiple of 8; an image of 512x512 pixels has 64."""
    batch_size: int = 2
    """Latents of a call; an image with guidance takes two."""
    repeats: int = 5
    """Calls of each that are timed."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "fp32"
    """Precision of the weights of both."""

    def __post_init__(self) -> None:
        in_range("--width", self.width, 32, 4_096)
        if self.width % 32:
            raise UserError(f"--width {self.width}: must be a multiple of 32")
        in_range("--size", self.size, 8, 4_096)
        if self.size % 8:
            raise UserError(f"--size {self.size}: must be a multiple of 8")
        at_least("--batch-size", self.batch_size, 1)
        at_least("--repeats", self.repeats, 1)


def random_unet(width: int) -> Unet:
    """Ours in which no layer is zero, as some of a new Unet are."""
    net = Unet(width=width)
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return net.eval()


def unet_of_diffusers(net: Unet) -> nn.Module:
    """The network of diffusers; its weights are the very tensors of ours."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    width = net.width
    with torch.device("meta"):  # no weights of its own
        theirs = UNet2DConditionModel(
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            attention_head_dim=8,  # the number of heads, in spite of its name
            cross_attention_dim=768,
        )
    weights = {f"model.diffusion_model.{key}": value for key, value in net.state_dict().items()}
    converted = convert_ldm_unet_checkpoint(weights, dict(theirs.config))
    theirs.load_state_dict(converted, assign=True)
    return theirs.eval()


def seconds_of(net: nn.Module, inputs: tuple[Tensor, ...], device: torch.device) -> float:
    """The seconds of one call."""
    synchronise(device)
    started = time.perf_counter()
    net(*inputs)
    synchronise(device)
    return time.perf_counter() - started


@torch.inference_mode()
def main(args: Benchmark) -> None:
    """Call both in turn."""
    accelerator = make_accelerator(args.device, args.precision)
    device = accelerator.device
    precision = accelerator.mixed_precision.replace("no", "fp32")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    ours = random_unet(args.width).to(device, dtype)
    theirs: Any = unet_of_diffusers(ours)
    ours = place(ours, device)  # channels-last: its convolutions get copies of their own
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(args.batch_size, 4, args.size, args.size, generator=rng).to(device, dtype)
    context = torch.randn(args.batch_size, TOKENS, 768, generator=rng).to(device, dtype)
    t = torch.full((args.batch_size,), 500, device=device)
    inputs = (x, t, context)

    expected = theirs(*inputs).sample.float()  # this also warms up
    error = (ours(*inputs).float() - expected).abs().max() / expected.abs().max()
    their_seconds = []
    our_seconds = []
    for _ in range(args.repeats):
        their_seconds.append(seconds_of(theirs, inputs, device))
        our_seconds.append(seconds_of(ours, inputs, device))
    pairs = zip(their_seconds, our_seconds, strict=True)
    ratio = statistics.median(theirs / ours for theirs, ours in pairs)
    print(f"{'diffusers':10} {1_000 * statistics.median(their_seconds):8.0f} ms a call")
    print(f"{'ours':10} {1_000 * statistics.median(our_seconds):8.0f} ms a call")
    print(
        f"ours is {ratio:.2f}x as fast (width {args.width}, {args.batch_size} latents of "
        f"{args.size}x{args.size}, {precision}, {device.type}); "
        f"largest difference {error:.1e} of the largest output"
    )


if __name__ == "__main__":
    run_cli(Benchmark, main)
