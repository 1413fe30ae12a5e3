r"""Faces from given noises with DDIM: the graders' images, a grid over η, and interpolation.

DDIM goes from noise to an image in a few of the steps of a trained diffusion model, with as much
new noise on the way as η says (none for η = 0, so that the same noise gives the same face).

Paper: Song et al., Denoising Diffusion Implicit Models, 2020, https://arxiv.org/abs/2010.02502

    python p2_ddim.py generate --noise-dir hw2_data/face/noise --checkpoint hw2_data/face/UNet.pt \
        --output-dir ddim
    python p2_ddim.py eta-grid --noise-dir hw2_data/face/noise --checkpoint hw2_data/face/UNet.pt \
        --output-dir eta
    python p2_ddim.py interpolate --noise-dir hw2_data/face/noise \
        --checkpoint hw2_data/face/UNet.pt --output-dir paths
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from common.checkpoints import load_net
from common.cli import UserError, above, at_least, in_range, is_seed, run_cli
from common.data import to_uint8
from common.device import Device, Precision, make_accelerator, peak_memory, place
from common.figures import save_image, save_labelled
from common.files import make_output_dir
from common.noises import find_noises, load_noise, problem_of_noise
from common.processes import my_share
from common.progress import show_progress
from common.rng import ImageNoise
from diffusion.guidance import predict_eps
from diffusion.samplers import Clamp, clamp_x0, ddim_step, step_pairs
from diffusion.schedule import Schedule, Spacing, spaced_steps
from models.ddim_unet import DdimUnet

if TYPE_CHECKING:
    from accelerate import Accelerator

ETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
SaveRange = Literal["minmax", "fixed"]


@dataclass(kw_only=True)
class Options:
    """Options of all commands. The defaults are those of course reports with the best scores."""

    noise_dir: Path
    """Folder of noises 00.pt, 01.pt, …, each a tensor (1, 3, height, width)."""
    output_dir: Path
    """Folder for the images."""
    checkpoint: Path
    """The course's UNet.pt, or model.safetensors of p2_ddpm_train.py --net ddim."""
    timesteps: int = 1_000
    """Training steps T of a published checkpoint, whose file does not say it."""
    betas: tuple[float, float] = (1e-4, 2e-2)
    """First and last β of a published checkpoint, whose schedule is linear."""
    steps: int = 50
    """Steps of DDIM for each image, at most T."""
    spacing: Spacing | None = None
    """Spacing of the steps, by default the checkpoint's, else the course's even one (leading)."""
    offset: int = 1
    """With --spacing leading, the lowest step is 1 + offset (the course's is 2); not with all T."""
    clamp: Clamp | None = None
    """How predicted images are kept in [-1, 1], by default the checkpoint's way, else static."""
    final_alpha: Literal["one", "first"] = "one"
    """ᾱ of the clean image: 1, or that of the first step, as some published samplers have it."""
    save_range: SaveRange | None = None
    """Range that becomes 0 … 255, by default the checkpoint's, else each image's own (minmax)."""
    seed: int = 0
    """Seed of the noise that is added on the way if η > 0."""
    batch_size: int = 10
    """Images computed at a time; halved where memory is short."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "fp32"
    """Graders compare pixels, so the default is fp32 without TF32."""

    def __post_init__(self) -> None:
        in_range("--timesteps", self.timesteps, 2, 1_000_000)
        for beta in self.betas:
            above("--betas", beta, 0, 0.999)
        at_least("--steps", self.steps, 1)
        at_least("--offset", self.offset, 0)
        is_seed("--seed", self.seed)
        at_least("--batch-size", self.batch_size, 1)


@dataclass(kw_only=True)
class Generate(Options):
    """Write one image for each noise: 00.png for 00.pt, and so on."""

    eta: float = 0.0
    """Randomness: 0 is deterministic DDIM, 1 has the variance of DDPM."""

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("--eta", self.eta, 0, 1)


@dataclass(kw_only=True)
class EtaGrid(Options):
    """Draw the first four noises (rows) at η = 0, 0.25, 0.5, 0.75 and 1 (columns)."""


@dataclass(kw_only=True)
class Interpolate(Options):
    """Draw 11 images on the way from the first noise to the second."""

    method: Literal["slerp", "lerp", "both"] = "both"
    """The way: along the sphere (slerp.png), along the straight line (lerp.png), or both."""


class Conventions(NamedTuple):
    """How a network's images are sampled and saved; the defaults are those of the course."""

    spacing: Spacing = "leading"
    save_range: SaveRange = "minmax"
    clamp: Clamp = "static"


class Model(NamedTuple):
    """A noise predictor with its schedule, its conventions and the falling steps of DDIM."""

    net: DdimUnet
    schedule: Schedule
    steps: list[int]
    accelerator: Accelerator
    conventions: Conventions


@torch.inference_mode()
def ddim(
    model: Model, noise: Tensor, draw: ImageNoise, eta: float, clamp: Clamp, what: str
) -> Tensor:
    """Sample with DDIM: noises (n, 3, height, width) → images of that shape.

    `draw()` returns the noise of one step, if η > 0; `what` names the images in the progress bar.
    """
    net = model.net
    schedule = model.schedule
    steps = model.steps
    x = noise
    for t, previous in show_progress(step_pairs(steps), len(steps), f"{what}, steps"):
        eps = predict_eps(net, schedule, x, t)  # the predicted noise
        x0 = clamp_x0(schedule.x0_from_eps(x, t, eps), clamp)  # the predicted image
        noise_of_step = None
        if eta > 0 and previous > 0:
            noise_of_step = draw()
        x = ddim_step(schedule, x0, eps, t, previous, eta, noise_of_step)
    return x


def in_batches_that_fit(
    model: Model, noises: Tensor, numbers: range, eta: float, args: Options
) -> Tensor:
    """Sample the noises (n, 3, height, width) with these numbers.

    Batches are halved where memory is short. Raises UserError if not even one image fits.
    """
    images = []
    start = numbers.start
    batch_size = args.batch_size
    clamp = model.conventions.clamp
    while start < numbers.stop:
        some = range(start, min(start + batch_size, numbers.stop))
        batch = noises[some.start : some.stop].to(model.accelerator.device)
        batch = batch.contiguous(memory_format=torch.channels_last)
        draw = ImageNoise(args.seed, some, batch.shape[1:], batch.device)
        what = f"noises {start + 1} to {some.stop} of {len(noises)}"
        try:
            with model.accelerator.autocast():
                images.append(ddim(model, batch, draw, eta, clamp, what).cpu())
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise UserError(
                    f"--device {args.device}: too little memory for one image"
                ) from None
            batch_size = batch_size // 2
            torch.cuda.empty_cache()
            continue
        start += len(batch)
    return torch.cat(images)


def load_model(args: Options, size: tuple[int, ...]) -> Model:
    """Load the checkpoint with its schedule, for noises of `size` (height, width).

    Raises UserError if it makes images of another size, or has too few steps.
    """
    torch.backends.cudnn.allow_tf32 = False  # graders compare pixels
    accelerator = make_accelerator(args.device, args.precision)
    net, config = load_net(args.checkpoint, {"ddim_unet": DdimUnet})
    if "noise_levels" in config:
        raise UserError(
            f"--checkpoint {args.checkpoint}: is a score-based model; "
            "p2_score.py sample makes its images"
        )
    side = net.config["arguments"]["size"]
    if size != (side, side):
        raise UserError(
            f"--noise-dir {args.noise_dir}: the noises are {size[1]}x{size[0]}, "
            f"but the network in {args.checkpoint} makes {side}x{side} images"
        )
    schedule = read_schedule(config, args)
    conventions = read_conventions(config, args)
    if args.steps > schedule.T:
        raise UserError(f"--steps {args.steps}: the network was trained with {schedule.T:,} steps")
    # All T steps leave no room for an offset.
    offset = 0 if args.steps == schedule.T else args.offset
    try:
        steps = spaced_steps(schedule.T, args.steps, conventions.spacing, offset)
    except ValueError as error:
        raise UserError(f"--offset {args.offset}: {error}") from None
    net = place(net, accelerator.device)
    return Model(net, schedule, steps, accelerator, conventions)


def read_schedule(config: dict[str, Any], args: Options) -> Schedule:
    """The schedule in a checkpoint's configuration, or that of the options."""
    if "schedule" in config:
        schedule = Schedule.from_config(config["schedule"])
    else:
        first, last = args.betas
        schedule = Schedule(
            args.timesteps, "linear", first, last, rule="as-given", counted_to=args.timesteps
        )
    if args.final_alpha == "first":
        schedule.alpha_bar[0] = schedule.alpha_bar[1]
    return schedule


def read_conventions(config: dict[str, Any], args: Options) -> Conventions:
    """The given options, else what a checkpoint's configuration says, else the course's."""
    usual = Conventions(**config.get("sampling", {}))
    return Conventions(
        spacing=args.spacing or usual.spacing,
        save_range=args.save_range or usual.save_range,
        clamp=args.clamp or usual.clamp,
    )


def read_noises(folder: Path, minimum: int = 1) -> tuple[list[str], Tensor]:
    """Read the *.pt files of a folder, in natural order.

    Returns their names without suffix and the noises (n, 3, height, width), float32. Raises
    UserError for fewer than `minimum` files, and names one that is broken or of another shape.
    """
    if not folder.is_dir():
        raise UserError(f"--noise-dir {folder}: no such folder")
    paths = find_noises(folder)
    if len(paths) < minimum:
        raise UserError(
            f"--noise-dir {folder}: contains {len(paths)} noises (*.pt), at least {minimum} needed"
        )
    noises = [read_noise(path) for path in paths]
    for path, noise in zip(paths, noises, strict=True):
        expected = (3, *noises[0].shape[-2:])
        if tuple(noise.shape) != expected:
            sizes = " x ".join(map(str, expected))
            raise UserError(f"{path}: has shape {list(noise.shape)}, expected 1 x {sizes}")
    return [path.stem for path in paths], torch.stack(noises)


def read_noise(path: Path) -> Tensor:
    """One noise as float32 (3, height, width); a batch of one is unpacked."""
    try:
        noise = load_noise(path)
    except Exception:  # a damaged or hostile pickle can raise anything
        raise UserError(f"{path}: not a whole file of one tensor") from None
    problem = problem_of_noise(noise)
    if problem:
        raise UserError(f"{path}: {problem}")
    noise = noise.detach().float()
    if noise.ndim == 4:
        noise = noise.squeeze(0)
    if noise.ndim != 3:
        raise UserError(f"{path}: has shape {list(noise.shape)}, expected 1 x 3 x height x width")
    return noise


def to_pixels(images: Tensor, save_range: SaveRange) -> Tensor:
    """Images (n, 3, height, width) → uint8.

    "minmax" maps each image's own range to 0 … 255, as torchvision's save_image(normalize=True)
    does; "fixed" maps [-1, 1].
    """
    if save_range == "fixed":
        return to_uint8(images)
    low = images.amin((1, 2, 3), keepdim=True)
    high = images.amax((1, 2, 3), keepdim=True)
    return (255 * (images - low) / (high - low).clamp(min=1e-5) + 0.5).clamp(0, 255).byte()


def slerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Interpolate between tensors a (alpha = 0) and b (alpha = 1) along the sphere, in float64.

    The direction moves along the arc between those of a and b, the length changes evenly. Parallel
    tensors leave no arc: the straight line joins them. For opposite ones any arc would do, and the
    one through a fixed direction is taken.
    """
    x = a.double().flatten()
    y = b.double().flatten()
    length = (1 - alpha) * x.norm() + alpha * y.norm()
    x = x / x.norm()
    y = y / y.norm()
    cosine = (x @ y).clamp(-1, 1)
    if cosine > 1 - 1e-9:
        direction = (1 - alpha) * x + alpha * y
        direction = direction / direction.norm()
    else:
        if cosine < -1 + 1e-9:
            rng = torch.Generator().manual_seed(0)
            y = torch.randn(x.shape, dtype=x.dtype, generator=rng)
        across = y - (x @ y) * x  # at a right angle to x
        angle = alpha * torch.acos(cosine)
        direction = angle.cos() * x + angle.sin() * across / across.norm()
    return (length * direction).view_as(a).to(a.dtype)


def generate(args: Generate) -> None:
    """Write one image per noise; print the seconds an image took and the peak memory.

    Processes share the batches.
    """
    names, noises = read_noises(args.noise_dir)
    model = load_model(args, tuple(noises.shape[-2:]))
    accelerator = model.accelerator
    make_output_dir(args.output_dir)
    accelerator.wait_for_everyone()  # all have looked before the first one writes
    started = time.monotonic()
    for start in my_share(range(0, len(names), args.batch_size), accelerator):
        numbers = range(start, min(start + args.batch_size, len(names)))
        images = in_batches_that_fit(model, noises, numbers, args.eta, args)
        pixels = to_pixels(images, model.conventions.save_range)
        for number, image in zip(numbers, pixels, strict=True):
            save_image(image, args.output_dir / f"{names[number]}.png")
    accelerator.wait_for_everyone()
    seconds = (time.monotonic() - started) / len(names)
    if not accelerator.is_main_process:
        return
    peak = peak_memory(accelerator.device) / 2**10
    print(
        f"{len(names)} images: {args.output_dir} "
        f"({seconds:.1f} s an image, peak memory {peak:.1f} GiB)"
    )


def eta_grid(args: EtaGrid) -> None:
    """Draw eta_grid.png: rows are noises, columns are values of η."""
    names, noises = read_noises(args.noise_dir, minimum=4)
    model = load_model(args, tuple(noises.shape[-2:]))
    make_output_dir(args.output_dir)
    columns = []
    for eta in ETAS:
        images = in_batches_that_fit(model, noises, range(4), eta, args)
        pixels = to_pixels(images, model.conventions.save_range)
        columns.append(pixels)  # (4 noises, 3, height, width)
    grid = torch.stack(columns, dim=1)  # (4 noises, 5 values of η, 3, height, width)
    file = args.output_dir / "eta_grid.png"
    column_names = [f"eta = {eta:g}" for eta in ETAS]
    save_labelled(grid.flatten(0, 1), file, names[:4], column_names)
    print(file)


def interpolate(args: Interpolate) -> None:
    """Draw the images along one way or both; print the norms of the noises on it."""
    _, noises = read_noises(args.noise_dir, minimum=2)
    model = load_model(args, tuple(noises.shape[-2:]))
    make_output_dir(args.output_dir)
    alphas = [number / 10 for number in range(11)]
    if args.method in ("slerp", "both"):
        way = [slerp(noises[0], noises[1], alpha) for alpha in alphas]
        draw_way("slerp", way, alphas, model, args)
    if args.method in ("lerp", "both"):
        way = [torch.lerp(noises[0], noises[1], alpha) for alpha in alphas]
        draw_way("lerp", way, alphas, model, args)


def draw_way(
    name: str, way: Sequence[Tensor], alphas: Sequence[float], model: Model, args: Interpolate
) -> None:
    """Draw NAME.png from noises (3, height, width); their norms explain what is seen in it."""
    noises = torch.stack(list(way))
    norms = noises.flatten(1).norm(dim=1).tolist()
    usual = noises[0].numel() ** 0.5
    listed = ", ".join(f"{norm:.0f}" for norm in norms)
    print(f"{name}: |noise| = {listed}; standard normal noise has {usual:.0f}")
    images = in_batches_that_fit(model, noises, range(len(noises)), 0.0, args)
    pixels = to_pixels(images, model.conventions.save_range)
    save_labelled(pixels, args.output_dir / f"{name}.png", [name], [f"{a:g}" for a in alphas])


def main(args: Generate | EtaGrid | Interpolate) -> None:
    """Run one command."""
    match args:
        case Generate():
            generate(args)
        case EtaGrid():
            eta_grid(args)
        case Interpolate():
            interpolate(args)


if __name__ == "__main__":
    run_cli(Generate | EtaGrid | Interpolate, main, shared=Generate)
