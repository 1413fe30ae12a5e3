"""A training step of DANN with a ResNet: p3_dann_resnet.py against the usual code.

The usual code is written as public libraries for domain adaptation do: torchvision's ResNet, fp32,
contiguous tensors. Ours is channels-last, in the precision that --precision auto chooses, and also
keeps the averaged network. Both train the same layers on the same random images.

    python benchmarks/dann_resnet_training.py
    python benchmarks/dann_resnet_training.py --net resnet18 --steps 20 --size 112
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.harness import synchronise
from common.cli import at_least, in_range, run_cli
from common.device import Device, Precision, make_accelerator, place
from common.training import update_ema
from models.adaptation import SMALL, AdaptationNet
from p3_dann_resnet import DomainAdversarial, ReverseGradient, Train, adaptation_losses, total_loss

CLASSES = 65  # as Office-Home has


@dataclass
class Benchmark:
    """Time the steps of both and print their ratio."""

    net: Literal["resnet18", "resnet50"] = "resnet50"
    """Backbone."""
    size: int = 224
    """Side of the images."""
    batch_size: int = 32
    """Images of each domain in a step."""
    steps: int = 10
    """Steps that are timed, of each in turn."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """Precision of ours: bf16 autocast where the hardware is fast at it, or fp32."""

    def __post_init__(self) -> None:
        in_range("--size", self.size, SMALL + 1, 4_096)
        at_least("--batch-size", self.batch_size, 2)
        at_least("--steps", self.steps, 1)


def usual_step(args: Benchmark, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """A function that takes one step of the usual code and returns its loss."""
    from torchvision.models import get_model

    net = get_model(args.net, weights=None)
    features = net.fc.in_features
    net.fc = nn.Identity()
    dense = nn.Sequential(nn.Linear(features, 256), nn.BatchNorm1d(256), nn.ReLU())
    label = nn.Linear(256, CLASSES)
    domain = nn.Sequential(
        nn.Linear(features, 1024),
        nn.BatchNorm1d(1024),
        nn.ReLU(),
        nn.Linear(1024, 1024),
        nn.BatchNorm1d(1024),
        nn.ReLU(),
        nn.Linear(1024, 1),
        nn.Sigmoid(),
    )
    parts = nn.ModuleList([net, dense, label, domain]).to(images.device).train()
    optimizer = torch.optim.SGD(
        parts.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3
    )
    count = len(labels)
    truth = torch.cat([torch.zeros(count, 1), torch.ones(count, 1)]).to(images.device)

    def step() -> Tensor:
        found = net(images)
        scores = label(dense(found))[:count]
        p = domain(ReverseGradient.apply(found, 1.0))
        loss = F.cross_entropy(scores, labels) + F.binary_cross_entropy(p, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def our_step(args: Benchmark, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """A function that takes one step of p3_dann_resnet.py and returns its loss."""
    accelerator = make_accelerator(args.device, args.precision)
    bare_net = place(AdaptationNet(args.net, CLASSES, "backbone", args.size), images.device)
    ema = copy.deepcopy(bare_net)
    optimizer = torch.optim.SGD(
        bare_net.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3
    )
    net, optimizer = accelerator.prepare(DomainAdversarial(bare_net), optimizer)
    options = Train(output_dir=Path())
    images = images.contiguous(memory_format=torch.channels_last)
    net.train()

    def step() -> Tensor:
        source, target = bare_net.lower(images).chunk(2)
        loss = total_loss(adaptation_losses(net, source, labels, target, 1.0, options))
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        update_ema(ema, bare_net, 0.99, 1_000)
        return loss

    return step


def seconds_of(step: Callable[[], Tensor], device: torch.device) -> float:
    """The seconds of one step."""
    started = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - started


def main(args: Benchmark) -> None:
    """Take the steps in turn, so that both meet the same other programs."""
    device = make_accelerator(args.device, args.precision).device
    torch.manual_seed(0)
    images = torch.rand(2 * args.batch_size, 3, args.size, args.size, device=device) * 2 - 1
    labels = torch.randint(CLASSES, (args.batch_size,), device=device)
    steps = {"usual": usual_step(args, images, labels), "ours": our_step(args, images, labels)}
    for step in steps.values():
        assert step().isfinite()  # this also warms up
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.steps):
        for name, step in steps.items():
            times[name].append(seconds_of(step, device))
    medians = {name: statistics.median(some) for name, some in times.items()}
    for name, seconds in medians.items():
        print(f"{name}: {1_000 * seconds:.0f} ms a step, {len(images) / seconds:.1f} images/s")
    ratio = medians["usual"] / medians["ours"]
    print(f"ours is {ratio:.2f}x as fast ({args.net}, {args.size} pixels, {device.type})")


if __name__ == "__main__":
    run_cli(Benchmark, main)
