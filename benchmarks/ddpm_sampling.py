r"""Digits a second: p2_ddpm_infer.py as it is released against the textbook sampler.

Ours is p2_ddpm_infer.py with the sampler, steps and guidance of the graders' script for MNIST-M
(grading/common.sh): 9 steps of DPM-Solver++, guided where t / T is from 0.1 to 0.45. Its tensors
are channels_last, in the precision that --precision auto chooses. The textbook sampler is algorithm
2 of DDPM over all T steps with noise of variance β, as in the public scripts, in fp32 with
contiguous tensors. It is guided in every step, with a smaller w. Both have the same weights. Time
is from noise to uint8 pixels, with the network loaded and after one step to warm up.

As T steps are slow, the textbook sampler makes fewer images (--textbook-images). On a CPU 20 images
are as fast, each, as more would be. A GPU needs large batches, so there it makes as many as ours,
up to 250. Its accuracy is that of these few images: of 20, one is 5 %.

    python benchmarks/ddpm_sampling.py --checkpoint runs/p2/digits/model.safetensors \
        --classifier runs/p2/judge-mnistm/model.safetensors --domain mnistm
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.harness import in_own_process
from common.checkpoints import load_net
from common.classification import accuracy
from common.cli import UserError, at_least, in_range, run_cli
from common.data import Images, to_uint8
from common.device import make_accelerator, peak_memory
from metrics.digits import NETS
from p2_ddpm_infer import (
    LARGEST_GUIDANCE,
    Generate,
    Model,
    Sampler,
    in_batches,
    last_of,
    load_model,
    sample_digits,
)


@dataclass(kw_only=True)
class Benchmark:
    """Time both samplers on one domain; print images/s, accuracy, peak memory and the ratio."""

    checkpoint: Path
    """model.safetensors of p2_ddpm_train.py, or a published ContextUnet .pth."""
    classifier: Path
    """The course's Classifier.pth, or model.safetensors of evaluate.py train-classifier."""
    domain: str = "mnistm"
    """Domain to generate."""
    sampler: Sampler = "dpm-solver++"
    """Our sampler."""
    steps: int = 9
    """Our sampler's steps."""
    guidance: float = 8.0
    """Our guidance w."""
    interval: tuple[float, float] = (0.1, 0.45)
    """The range of t / T in which ours is guided."""
    textbook_guidance: float = 2.0
    """Guidance w of the textbook sampler."""
    per_class: int = 10
    """Images of each digit that ours makes."""
    textbook_images: int | None = None
    """Images of the textbook sampler; 20 on a CPU, and up to 250 on a GPU, if not given."""

    def __post_init__(self) -> None:
        our_options(self)  # Generate checks the sampler's options
        guidance = self.textbook_guidance
        in_range("--textbook-guidance", guidance, -LARGEST_GUIDANCE, LARGEST_GUIDANCE)
        at_least("--per-class", self.per_class, 1)
        at_least("--textbook-images", self.textbook_images, 1)


class Timed(NamedTuple):
    """A sampler's name, images uint8 (n, 3, 28, 28), digits (n,), seconds and peak MiB."""

    name: str
    pixels: Tensor
    digits: Tensor
    seconds: float
    peak: float


def our_options(args: Benchmark) -> Generate:
    """The options of p2_ddpm_infer.py that our sampler is timed with."""
    return Generate(
        checkpoint=args.checkpoint,
        output_dir=Path(),
        guidance=args.guidance,
        interval=args.interval,
        sampler=args.sampler,
        steps=args.steps,
    )


def open_model(args: Benchmark, options: Generate) -> Model:
    """The model; UserError if it does not know the domain."""
    model = load_model(options)
    if args.domain not in model.domains:
        known = " ".join(model.domains)
        raise UserError(f"--domain {args.domain}: {args.checkpoint} only knows {known}")
    return model


def time_ours(args: Benchmark) -> Timed:
    """Time the sampler of p2_ddpm_infer.py."""
    options = our_options(args)
    model = open_model(args, options)
    batches = in_batches(args.per_class, options.batch_size)
    warm_up = sample_digits(model, args.domain, *batches[0], args.guidance, options)
    list(islice(warm_up, 2))  # the noise and one step
    pixels = []
    labels = []
    start = time.perf_counter()
    for digits, numbers in batches:
        states = sample_digits(model, args.domain, digits, numbers, args.guidance, options)
        pixels.append(last_of(states).pixels)
        labels += digits
    seconds = time.perf_counter() - start
    name = f"ours ({args.sampler}, {len(model.steps)} steps)"
    peak = peak_memory(model.accelerator.device)
    return Timed(name, torch.cat(pixels), torch.tensor(labels), seconds, peak)


@torch.inference_mode()
def time_textbook(args: Benchmark) -> Timed:
    """Time algorithm 2 of DDPM, with only the weights, the β and the classes of our model."""
    options = Generate(
        checkpoint=args.checkpoint,
        output_dir=Path(),
        precision="fp32",
    )
    model = open_model(args, options)
    device = model.accelerator.device
    count = args.textbook_images
    if count is None:
        count = 20 if device.type == "cpu" else min(250, 10 * args.per_class)
    digits = torch.arange(count) % 10
    labels = (digits + 10 * model.domains.index(args.domain)).to(device).repeat(2)

    torch.manual_seed(0)
    sampler = TextbookSampler(model, labels, args.textbook_guidance)
    noise = torch.randn(count, 3, 28, 28, device=device)
    sampler.step(noise, model.schedule.T).cpu()  # to warm up
    start = time.perf_counter()
    x = torch.randn(count, 3, 28, 28, device=device)
    for t in range(model.schedule.T, 0, -1):
        x = sampler.step(x, t)
    pixels = to_uint8(x).cpu()
    seconds = time.perf_counter() - start
    return Timed(f"textbook ({model.schedule.T})", pixels, digits, seconds, peak_memory(device))


class TextbookSampler:
    """Algorithm 2 of DDPM with classifier-free guidance, as in the public scripts."""

    def __init__(self, model: Model, labels: Tensor, guidance: float) -> None:
        """`labels` are those of the images, twice (2 · batch,)."""
        self.net = model.net.to(memory_format=torch.contiguous_format)
        self.schedule = model.schedule
        self.labels = labels
        self.withheld = torch.arange(len(labels), device=labels.device) >= len(labels) // 2
        self.guidance = guidance
        self.beta = model.schedule.betas.to(labels.device)  # number t; β_0 is 0
        self.alpha = 1 - self.beta
        self.alpha_bar = self.alpha.cumprod(0)

    def step(self, x: Tensor, t: int) -> Tensor:
        """x_t → x_{t-1}."""
        steps = torch.full((len(self.labels),), t, device=x.device)
        both = torch.cat((x, x))
        output = self.net(both, self.schedule.time(steps, self.net), self.labels, self.withheld)
        eps_class, eps_none = self.schedule.eps_from_output(both, steps, output).chunk(2)
        w = self.guidance
        eps = (1 + w) * eps_class - w * eps_none
        slope = self.beta[t] / (1 - self.alpha_bar[t]).sqrt()
        mean = (x - slope * eps) / self.alpha[t].sqrt()
        if t == 1:
            return mean
        return mean + self.beta[t].sqrt() * torch.randn_like(x)


def main(args: Benchmark) -> None:
    """Run both samplers, ours second, each in a process of its own; classify their images."""
    accelerator = make_accelerator(precision="fp32")
    classifier, _ = load_net(args.classifier, NETS, "--classifier")
    classifier.to(accelerator.device)
    rates = []
    for function in (time_textbook, time_ours):
        timed = in_own_process(function, args)
        count = len(timed.digits)
        images = Images(timed.pixels, timed.digits, [""] * count)
        correct = accuracy(classifier, images, accelerator)
        rate = count / timed.seconds
        rates.append(rate)
        print(
            f"{timed.name:31} {count:5,} images, {timed.seconds:7.1f} s, {rate:8.3f} images/s, "
            f"accuracy {correct:6.2f} %, peak {timed.peak:,.0f} MiB"
        )
    ratio = rates[1] / rates[0]
    print(f"ours is {ratio:.1f}x as fast an image ({args.domain}, {accelerator.device.type})")


if __name__ == "__main__":
    run_cli(Benchmark, main)
