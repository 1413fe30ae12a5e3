r"""What guidance costs: seconds of a guided DDIM step of p2_guided.py against an unguided one.

Ours computes all conditions in one batch, and one gradient for all attributes that are asked. The
naive loop calls the network once for each condition and takes one gradient for each attribute.
Both have the same networks, the same noise and fp32 gradients; their states after the steps differ
by rounding alone, which is printed. Each row is a guidance of --attributes; the ratio is that to
the unguided row, the median of --repeats.

    python benchmarks/guided_sampling.py --checkpoint runs/p2/guided/model.safetensors \
        --classifier runs/p2/noisy-classifier/model.safetensors --attributes Smiling=1 Male=-1
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.harness import synchronise
from common.asked import Asked, read_request
from common.cli import at_least, each_once, run_cli
from common.device import Device, Precision
from common.rng import ImageNoise
from diffusion.guidance import attribute_eps, classifier_gradient, shifted_eps
from diffusion.samplers import clamp_x0, ddim_step, step_pairs
from p2_guided import (
    Guidance,
    Model,
    Request,
    Sample,
    check_request,
    load_model,
    make_request,
    sample_faces,
)


@dataclass(kw_only=True)
class Benchmark:
    """Time a few steps of each kind of guidance; print ms a step and the ratio to no guidance."""

    checkpoint: Path
    """Network with attributes, of p2_guided.py train."""
    classifier: Path
    """Classifier of noisy faces, of p2_guided.py train-classifier."""
    attributes: tuple[str, ...] = ("Smiling=1", "Male=-1")
    """What is asked, each with a weight of its own in the last row."""
    batch_size: int = 50
    """Images computed at a time."""
    steps: int = 4
    """Steps of DDIM."""
    repeats: int = 3
    """Times that each row is measured."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """bf16 autocast of the network where the hardware is fast at it, or fp32."""

    def __post_init__(self) -> None:
        each_once("--attributes", self.attributes)
        read_request(self.attributes)
        at_least("--batch-size", self.batch_size, 1)
        at_least("--steps", self.steps, 1)
        at_least("--repeats", self.repeats, 1)


def options_of(args: Benchmark, guidance: Guidance) -> Sample:
    """The options of `p2_guided.py sample`."""
    return Sample(
        checkpoint=args.checkpoint,
        output_dir=Path(),
        classifier=args.classifier if guidance in ("classifier", "both") else None,
        guidance=guidance,
        sampler="ddim",
        steps=args.steps,
        attributes=args.attributes,
        device=args.device,
        precision=args.precision,
    )


def our_loop(model: Model, request: Request, options: Sample, count: int) -> Tensor:
    """The last state of p2_guided.py's sampler."""
    x = torch.empty(0)
    for state in sample_faces(model, request, range(count), options):
        x = state.x
    return x


@torch.inference_mode()
def naive_loop(model: Model, request: Request, options: Sample, count: int) -> Tensor:
    """The same, with a call for each condition and a gradient for each attribute."""
    schedule = model.schedule
    x = ImageNoise(options.seed, range(count), model.net.shape, model.accelerator.device)()
    x = x.contiguous(memory_format=torch.channels_last)
    for t, previous in step_pairs(model.steps):
        with model.accelerator.autocast():
            if request.terms is None or request.weights is None:
                eps = attribute_eps(model.net, schedule, x, t, request.known)
            else:
                unconditional = attribute_eps(model.net, schedule, x, t, None)
                eps = unconditional
                for weight, term in zip(request.weights, request.terms, strict=True):
                    conditional = attribute_eps(model.net, schedule, x, t, term)
                    eps = eps + weight * (conditional - unconditional)
        if request.for_classifier is not None:
            assert model.classifier is not None
            for column in request.for_classifier[0].nonzero().flatten():
                alone = torch.zeros_like(request.for_classifier)
                alone[:, column] = request.for_classifier[:, column]
                gradient = classifier_gradient(model.classifier, schedule, x, t, alone)
                eps = shifted_eps(schedule, eps, gradient, t)
        x0 = clamp_x0(schedule.x0_from_eps(x, t, eps), model.clamp)
        x = ddim_step(schedule, x0, eps, t, previous)
    return x


def milliseconds(args: Benchmark, model: Model, work: Callable[[], Tensor]) -> float:
    """The median time of a step in ms."""
    times = []
    for _ in range(args.repeats):
        synchronise(model.accelerator.device)
        started = time.perf_counter()
        work()
        synchronise(model.accelerator.device)
        times.append(time.perf_counter() - started)
    return 1_000 * statistics.median(times) / args.steps


def main(args: Benchmark) -> None:
    """Print a row for each kind of guidance."""
    plain = read_request(args.attributes)
    weighted = [Asked(item.name, item.value, 2.0) for item in plain]
    rows: list[tuple[str, Guidance, list[Asked]]] = [
        ("unguided", "none", plain),
        ("free", "free", plain),
        ("classifier", "classifier", plain),
        ("both", "both", plain),
        ("each with a weight of its own", "free", weighted),
    ]
    print(f"{args.batch_size} images at a time, asked for {' '.join(args.attributes)}")
    unguided = 0.0
    for words, guidance, asked in rows:
        options = options_of(args, guidance)
        model = load_model(options)
        check_request(model, asked, options)
        request = make_request(model, asked, range(args.batch_size), options, None)
        loops = {"ours": our_loop, "naive": naive_loop}
        states = {}
        times = {}
        for name, loop in loops.items():
            work = partial(loop, model, request, options, args.batch_size)
            states[name] = work()  # this also warms up
            times[name] = milliseconds(args, model, work)
        unguided = unguided or times["ours"]
        largest = (states["ours"] - states["naive"]).abs().max().item()
        print(
            f"{words}: {times['ours']:.0f} ms a step, {times['ours'] / unguided:.2f} of unguided; "
            f"naive {times['naive']:.0f} ms, {times['naive'] / unguided:.2f}; "
            f"largest difference {largest:.1e}"
        )


if __name__ == "__main__":
    run_cli(Benchmark, main)
