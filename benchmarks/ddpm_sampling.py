"""Digits a second from a diffusion model: p2_ddpm_infer.py as it is released against the textbook sampler.

Ours is p2_ddpm_infer.py with --sampler and --steps, by default 12 of DPM-Solver++ as the graders' scripts have it for
MNIST-M, channels-last, in the precision that --precision auto chooses (the graders' scripts take fp32). The textbook
sampler is algorithm 2 of DDPM over all T steps with noise of variance β, as the public scripts have it, in fp32 with
contiguous tensors. Both have the same weights and the same strength of guidance, by a batch of twice the size in which
half of the rows have no class. Time is that from noise to uint8 pixels, with the net loaded and after one step to warm
up; each sampler runs in a process of its own, so that its peak memory is its own.

As T steps are slow, the textbook sampler makes fewer images, --textbook-images in one batch. On a CPU 20 (the net sees
40) are as fast an image as more would be; a GPU needs large batches, so there it makes as many as ours, 250 at most.
Its accuracy is that of these few images: of 20, one is 5 %.

    python benchmarks/ddpm_sampling.py --checkpoint runs/p2/digits/model.safetensors \\
        --classifier runs/p2/judge-mnistm/model.safetensors --domain mnistm
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.data import Images, to_uint8
from common.diffusion import Sampler
from common.metrics import accuracy, peak_memory
from common.run import UserError, command_line, load_net, make_accelerator
from p2_ddpm_infer import Generate, Model, in_batches
from scoring.digits import NETS


@dataclass(kw_only=True)
class Benchmark:
    """Time both samplers on one domain; print images/s, accuracy, peak memory and the ratio."""

    checkpoint: Path  # model.safetensors of p2_ddpm_train.py, or a published ContextUnet .pth.
    classifier: Path  # The course's Classifier.pth, or model.safetensors of score.py train-classifier.
    domain: str = "mnistm"  # Whose digits.
    sampler: Sampler = "dpm-solver++"  # Of ours.
    steps: int = 12  # Of ours.
    guidance: float = 2.0  # w, of both.
    per_class: int = 10  # Images of each digit by ours.
    textbook_images: int | None = None  # Images of the textbook sampler; None is 20 on a CPU, ours' (≤ 250) on a GPU.


def ours(args: Benchmark, model: Model) -> tuple[Tensor, Tensor, float]:
    """uint8 images (n, 3, 28, 28), their digits (n,) and the seconds they took, by p2_ddpm_infer.py."""
    batches = in_batches(args.per_class, model.args.batch_size)
    deque(islice(model.states(args.domain, *batches[0], model.args.guidance), 2), maxlen=0)  # the noise and one step
    start = time.perf_counter()
    parts = [deque(model.states(args.domain, *batch, model.args.guidance), maxlen=1)[0][1] for batch in batches]
    seconds = time.perf_counter() - start
    return torch.cat(parts), torch.tensor([digit for digits, _ in batches for digit in digits]), seconds


@torch.inference_mode()
def textbook(args: Benchmark, model: Model) -> tuple[Tensor, Tensor, float]:
    """The same by algorithm 2 of DDPM; of `model` only the weights, the schedule's β and the classes are used."""
    device, w, T = model.accelerator.device, model.args.guidance, model.schedule.T
    net = model.net.to(memory_format=torch.contiguous_format)
    count = args.textbook_images or (20 if device.type == "cpu" else min(250, 10 * args.per_class))
    digits = torch.arange(count) % 10
    labels = (digits + 10 * model.domains.index(args.domain)).to(device).repeat(2)
    withheld = torch.arange(2 * count, device=device) >= count
    beta = model.schedule.betas.to(device)  # number t; β_0 is 0
    alpha = 1 - beta
    alpha_bar = alpha.cumprod(0)

    def step(x: Tensor, t: int) -> Tensor:
        steps, both = torch.full((2 * count,), t, device=device), torch.cat((x, x))
        predicted = net(both, model.schedule.time(steps, net), labels, withheld)
        eps_class, eps_none = model.schedule.eps_of(both, steps, predicted).chunk(2)
        eps = (1 + w) * eps_class - w * eps_none
        mean = (x - beta[t] / (1 - alpha_bar[t]).sqrt() * eps) / alpha[t].sqrt()
        return mean + beta[t].sqrt() * torch.randn_like(x) if t > 1 else mean

    torch.manual_seed(0)
    step(torch.randn(count, 3, 28, 28, device=device), T).cpu()
    start = time.perf_counter()
    x = torch.randn(count, 3, 28, 28, device=device)
    for t in range(T, 0, -1):
        x = step(x, t)
    pixels = to_uint8(x).cpu()
    return pixels, digits, time.perf_counter() - start


def timed(args: Benchmark, is_ours: bool) -> tuple[Tensor, Tensor, float, float, str]:
    """Images, digits, seconds, peak memory of this process (or of the GPU) in MiB, and what the sampler is."""
    options = {"sampler": args.sampler, "steps": args.steps} if is_ours else {"precision": "fp32"}
    model = Model(Generate(checkpoint=args.checkpoint, output_dir=Path(), guidance=args.guidance, **options))
    if args.domain not in model.domains:
        raise UserError(f"--domain {args.domain}: {args.checkpoint} knows {' '.join(model.domains)}")
    pixels, digits, seconds = (ours if is_ours else textbook)(args, model)
    name = f"ours ({model.args.sampler}, {len(model.steps)} steps)" if is_ours else f"textbook ({model.schedule.T})"
    return pixels, digits, seconds, peak_memory(model.accelerator.device), name


def main(args: Benchmark) -> None:
    """Run both, ours second, and judge their images."""
    if args.per_class < 1 or (args.textbook_images is not None and args.textbook_images < 1):
        raise UserError("--per-class and --textbook-images: at least 1")
    accelerator = make_accelerator(precision="fp32")
    judge = load_net(args.classifier, NETS, "--classifier")[0].to(accelerator.device)
    rates = []
    for is_ours in (False, True):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pixels, digits, seconds, peak, name = pool.submit(timed, args, is_ours).result()
        right = accuracy(judge, Images(pixels, digits, [""] * len(digits)), accelerator)
        rates.append(len(digits) / seconds)
        told = f"{name:31} {len(digits):5,} images, {seconds:7.1f} s, {rates[-1]:8.3f} images/s"
        print(f"{told}, accuracy {right:6.2f} %, peak {peak:,.0f} MiB")
    print(f"ours is {rates[1] / rates[0]:.1f}x as fast an image ({args.domain}, {accelerator.device.type})")


if __name__ == "__main__":
    command_line(Benchmark, main)
