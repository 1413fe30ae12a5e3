"""How fast the convolutions of DCGAN and of the DDPM are, beside a product of large matrices.

Convolutions take most of the time of a training step, so they limit how fast it can become. Each
line is one layer with its forward pass and its two gradients, in 10^9 additions and multiplications
a second, with contiguous and with channels-last tensors.

    python benchmarks/convolutions.py
    python benchmarks/convolutions.py --precision bf16
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.cli import above, at_least, run_cli

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


class Layer(NamedTuple):
    """A convolution, with the height and width of its input."""

    before: int
    after: int
    kernel: int
    stride: int
    size: int


# DCGAN's discriminator: the layers after the first. The DDPM's ContextUnet: those of both levels.
LAYERS = [
    Layer(64, 128, kernel=4, stride=2, size=32),
    Layer(128, 256, kernel=4, stride=2, size=16),
    Layer(256, 512, kernel=4, stride=2, size=8),
    Layer(128, 128, kernel=3, stride=1, size=28),
    Layer(256, 256, kernel=3, stride=1, size=14),
]


@dataclass
class Benchmark:
    """Print the speed of each layer, and of the product of two large matrices."""

    batch_size: int = 64
    """Images in a batch."""
    matrix: int = 2_048
    """Rows and columns of the two matrices."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format to compute in."""
    seconds: float = 0.5
    """Seconds for which each pass is measured; the median is printed."""

    def __post_init__(self) -> None:
        at_least("--batch-size", self.batch_size, 1)
        at_least("--matrix", self.matrix, 1)
        above("--seconds", self.seconds, 0, 60)


def speed(run: Callable[[], object], operations: float, args: Benchmark) -> float:
    """10^9 operations a second of a function that does `operations` of them, on all cores."""
    from torch.utils.benchmark import Timer  # it may warn of CUDA when it is imported

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    median = timer.blocked_autorange(min_run_time=args.seconds).median
    return operations / median / 1e9


def layer_speeds(layer: Layer, layout: str, args: Benchmark) -> list[float]:
    """Speed of the forward pass, of the input's gradient and of the weights' gradient."""
    dtype = DTYPES[args.precision]
    padding = 1
    x = torch.randn(args.batch_size, layer.before, layer.size, layer.size, dtype=dtype)
    weights = torch.randn(layer.after, layer.before, layer.kernel, layer.kernel, dtype=dtype)
    x = x.contiguous(memory_format=FORMATS[layout])
    weights = weights.contiguous(memory_format=FORMATS[layout])
    y = F.conv2d(x, weights, None, layer.stride, padding)
    dy = torch.randn_like(y)

    def forward() -> Tensor:
        return F.conv2d(x, weights, None, layer.stride, padding)

    def backward(input_wanted: bool, weights_wanted: bool) -> tuple[Tensor | None, ...]:
        return torch.ops.aten.convolution_backward(
            grad_output=dy,
            input=x,
            weight=weights,
            bias_sizes=None,
            stride=[layer.stride, layer.stride],
            padding=[padding, padding],
            dilation=[1, 1],
            transposed=False,
            output_padding=[0, 0],
            groups=1,
            output_mask=[input_wanted, weights_wanted, False],
        )

    # Each of the three passes has as many.
    operations = 2 * y.numel() * layer.before * layer.kernel**2
    return [
        speed(forward, operations, args),
        speed(lambda: backward(True, False), operations, args),
        speed(lambda: backward(False, True), operations, args),
    ]


def main(args: Benchmark) -> None:
    """Print the table."""
    a = torch.randn(args.matrix, args.matrix, dtype=DTYPES[args.precision])
    product = speed(lambda: a @ a, 2 * args.matrix**3, args)
    print(f"{args.precision}, {torch.get_num_threads()} threads, 10^9 operations a second")
    print(f"product of two {args.matrix:,} x {args.matrix:,} matrices: {product:,.0f}")
    print("channels        kernel  stride  size  layout         forward  d input  d weights")
    for layer in LAYERS:
        for layout in FORMATS:
            forward, d_input, d_weights = layer_speeds(layer, layout, args)
            print(
                f"{layer.before:3} to {layer.after:3}  {layer.kernel:10}  {layer.stride:6}"
                f"  {layer.size:4}  {layout:13} {forward:8,.0f} {d_input:8,.0f} {d_weights:10,.0f}"
            )


if __name__ == "__main__":
    run_cli(Benchmark, main)
