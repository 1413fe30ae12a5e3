"""Faces from given noises by DDIM: the graders' images, a grid over eta, interpolation between two noises.

Paper: Song et al., Denoising Diffusion Implicit Models, 2020, https://arxiv.org/abs/2010.02502

    python p2_ddim.py generate --noise-dir hw2_data/face/noise --checkpoint hw2_data/face/UNet.pt --output-dir ddim
    python p2_ddim.py eta-grid --noise-dir hw2_data/face/noise --checkpoint hw2_data/face/UNet.pt --output-dir eta
    python p2_ddim.py interpolate --noise-dir hw2_data/face/noise --checkpoint hw2_data/face/UNet.pt --output-dir paths
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from common import run as runs
from common.data import to_uint8
from common.diffusion import Schedule, Spacing, predictor, sample
from common.figures import save_image, save_labelled
from common.metrics import peak_memory
from common.progress import watch
from common.run import UserError
from models.ddim_unet import DdimUnet

ETAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(kw_only=True)
class Options:
    """What all commands share. The defaults are what scores best with the course's UNet.pt."""

    noise_dir: Path  # 00.pt, 01.pt, …: noise (1, 3, height, width) each.
    output_dir: Path  # Where the images are written.
    checkpoint: Path  # The course's UNet.pt, or model.safetensors of p2_ddpm_train.py --net ddim.
    noise_steps: int = 1_000  # T of a published checkpoint, which does not say it ...
    betas: tuple[float, float] = (1e-4, 2e-2)  # ... and its first and last β, of a linear schedule.
    steps: int = 50  # Of DDIM.
    spacing: Spacing = "leading"  # Even, as the course's; even from T, where noise is whole; dense at both ends.
    offset: int = 1  # Of leading, the lowest step is 1 + offset (the course counts from 0: t = 1, 21, …, 981).
    clamp: bool = True  # Keep predicted images in [-1, 1].
    final_alpha: Literal["one", "first"] = "one"  # ᾱ of the clean image: 1, or that of the first step.
    save_range: Literal["minmax", "fixed"] = "minmax"  # Each image's own range becomes 0 … 255, or [-1, 1] does.
    seed: int = 0  # Of the noise that eta > 0 adds.
    batch_size: int = 10  # Images at a time; halved where memory is short.
    device: runs.Device = "auto"  # Where to compute.
    precision: runs.Precision = "fp32"  # Graders compare pixels: fp32, without TF32.


@dataclass(kw_only=True)
class Generate(Options):
    """Write 00.png for 00.pt and so on."""

    eta: float = 0.0  # 0 is deterministic, 1 as random as DDPM.


@dataclass(kw_only=True)
class EtaGrid(Options):
    """Draw the first four noises (rows) at eta 0, 0.25, 0.5, 0.75 and 1 (columns): eta_grid.png."""


@dataclass(kw_only=True)
class Interpolate(Options):
    """Draw 11 images between the first two noises: slerp.png, lerp.png."""

    method: Literal["slerp", "lerp", "both"] = "both"  # On the sphere, along the straight line, or one after the other.


def read_noises(folder: Path, at_least: int = 1) -> tuple[list[str], Tensor]:
    """Names and noises (n, 3, height, width) of the *.pt files of a folder, sorted. UserError names a bad one."""
    if not folder.is_dir():
        raise UserError(f"--noise-dir {folder}: no such folder")
    paths, noises = sorted(folder.glob("*.pt")), []
    if len(paths) < at_least:
        raise UserError(f"--noise-dir {folder}: has {len(paths)} noises (*.pt), at least {at_least} needed")
    for path in paths:
        try:
            noise = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # what a damaged or hostile pickle raises is anybody's guess
            raise UserError(f"{path}: not a whole file of one tensor") from None
        if not isinstance(noise, Tensor):
            raise UserError(f"{path}: holds a {type(noise).__name__}, not a tensor")
        noise = noise.float().squeeze(0) if noise.ndim == 4 else noise.float()
        expected = noises[0].shape if noises else (3, *noise.shape[-2:])
        if noise.ndim != 3 or tuple(noise.shape) != tuple(expected):
            raise UserError(f"{path}: has shape {list(noise.shape)}, expected 1 x {' x '.join(map(str, expected))}")
        noises.append(noise)
    return [path.stem for path in paths], torch.stack(noises)


class Model:
    """A noise predictor with its schedule, on its device."""

    def __init__(self, args: Options, size: tuple[int, ...]) -> None:
        torch.backends.cudnn.allow_tf32 = False
        self.args, self.accelerator = args, runs.make_accelerator(args.device, args.precision)
        net, config = runs.load_net(args.checkpoint, {"ddim_unet": DdimUnet})
        side = net.config["arguments"]["size"]
        if size != (side, side):
            raise UserError(f"--noise-dir {args.noise_dir}: is {size[0]}x{size[1]}, {args.checkpoint} {side}x{side}")
        self.net = net.to(self.accelerator.device, memory_format=torch.channels_last)
        published = {"steps": args.noise_steps, "beta_start": args.betas[0], "beta_end": args.betas[1]}
        self.schedule = Schedule(**config.get("schedule", published | {"as_given": True}))
        offset = 0 if args.steps == self.schedule.T else args.offset  # all steps leave no room for one
        self.steps = self.schedule.subset(args.steps, args.spacing, offset)

    @torch.inference_mode()
    def generate(self, noises: Tensor, eta: float) -> Tensor:
        """Noises (n, 3, height, width) → images in [-1, 1], in as large batches as memory allows."""
        args, parts, start = self.args, [], 0
        options = {"eta": eta, "clamp": "static" if args.clamp else "none"}
        options["final_alpha"] = 1.0 if args.final_alpha == "one" else self.schedule.a[1]
        while start < len(noises):
            some = noises[start : start + args.batch_size].to(self.accelerator.device)
            draw = runs.ImageNoise(args.seed, range(start, start + len(some)), some.shape[1:], some.device)
            x = some.contiguous(memory_format=torch.channels_last)
            try:
                with self.accelerator.autocast():
                    predict = predictor(self.net, self.schedule)
                    states = sample(self.schedule, predict, x, self.steps, "ddim", draw=draw, **options)
                    told = f"noises {start + 1} to {start + len(some)} of {len(noises)}, steps"
                    parts.append(deque(watch(states, len(self.steps), told), maxlen=1)[0].x.cpu())
            except torch.OutOfMemoryError:
                if args.batch_size == 1:
                    raise UserError(f"--device {args.device}: too little memory for one image") from None
                args.batch_size = max(1, args.batch_size // 2)
                torch.cuda.empty_cache()
                continue
            start += len(some)
        return torch.cat(parts)

    def to_pixels(self, images: Tensor) -> Tensor:
        """Images (n, 3, height, width) → uint8, by --save-range."""
        if self.args.save_range == "fixed":
            return to_uint8(images)
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        return (255 * (images - low) / (high - low).clamp(min=1e-5) + 0.5).clamp(0, 255).byte()  # torchvision's


def slerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """From a (alpha 0) to b (alpha 1) along the arc between their directions, in float64; lengths go evenly.

    Parallel vectors leave no arc and are joined by the straight line; for opposite ones any arc would do, and one
    through a fixed direction is taken.
    """
    x, y = a.double().flatten(), b.double().flatten()
    length = (1 - alpha) * x.norm() + alpha * y.norm()
    x, y = x / x.norm(), y / y.norm()
    cosine = (x @ y).clamp(-1, 1)
    if cosine > 1 - 1e-9:
        direction = (1 - alpha) * x + alpha * y
        direction = direction / direction.norm()
    else:
        if cosine < -1 + 1e-9:
            y = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
        across = y - (x @ y) * x  # at a right angle to x
        angle = alpha * torch.acos(cosine)
        direction = angle.cos() * x + angle.sin() * across / across.norm()
    return (length * direction).view_as(a).to(a.dtype)


def generate(args: Generate) -> None:
    """Write the images; tell time and memory."""
    names, noises = read_noises(args.noise_dir)
    model, started = Model(args, tuple(noises.shape[-2:])), time.monotonic()
    runs.make_output_dir(args.output_dir)
    pixels = model.to_pixels(model.generate(noises, args.eta))
    for name, image in zip(names, pixels, strict=True):
        save_image(image, args.output_dir / f"{name}.png")
    seconds = (time.monotonic() - started) / len(names)
    peak = peak_memory(model.accelerator.device) / 2**10
    print(f"{len(names)} images: {args.output_dir} ({seconds:.1f} s an image, peak memory {peak:.1f} GiB)")


def eta_grid(args: EtaGrid) -> None:
    """Draw eta_grid.png."""
    names, noises = read_noises(args.noise_dir, at_least=4)
    model = Model(args, tuple(noises.shape[-2:]))
    runs.make_output_dir(args.output_dir)
    pixels = torch.stack([model.to_pixels(model.generate(noises[:4], eta)) for eta in ETAS], dim=1).flatten(0, 1)
    save_labelled(pixels, args.output_dir / "eta_grid.png", names[:4], [f"eta = {eta:g}" for eta in ETAS])
    print(f"{args.output_dir / 'eta_grid.png'}")


def interpolate(args: Interpolate) -> None:
    """Draw the images along one path or both; tell the noises' norms along it, which explain what is seen."""
    _, noises = read_noises(args.noise_dir, at_least=2)
    model = Model(args, tuple(noises.shape[-2:]))
    runs.make_output_dir(args.output_dir)
    alphas = [number / 10 for number in range(11)]
    for method in ("slerp", "lerp") if args.method == "both" else (args.method,):
        join = slerp if method == "slerp" else torch.lerp
        path = torch.stack([join(noises[0], noises[1], alpha) for alpha in alphas])
        norms = ", ".join(f"{norm:.0f}" for norm in path.flatten(1).norm(dim=1).tolist())
        print(f"{method}: |noise| = {norms}; of standard normal noise it is {path[0].numel() ** 0.5:.0f}")
        pixels = model.to_pixels(model.generate(path, eta=0.0))
        save_labelled(pixels, args.output_dir / f"{method}.png", [method], [f"{alpha:g}" for alpha in alphas])


def main(args: Generate | EtaGrid | Interpolate) -> None:
    """Run one sub-command."""
    if args.batch_size < 1 or args.offset < 0:
        raise UserError("--batch-size: at least 1; --offset: at least 0")
    {Generate: generate, EtaGrid: eta_grid, Interpolate: interpolate}[type(args)](args)


if __name__ == "__main__":
    runs.command_line(Generate | EtaGrid | Interpolate, main)
