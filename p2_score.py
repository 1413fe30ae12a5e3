r"""Score-based models of faces: train by denoising score matching, sample with Langevin dynamics.

A U-Net learns the mean of the clean images that a noisy one could come from, at every noise level σ
at once. From it follows the score, the direction in which images become more probable. Sampling
starts from pure noise and follows the score to lower and lower σ: with Langevin dynamics, or faster
with a stochastic or ordinary differential equation.

Denoising score matching: Vincent, 2011, https://doi.org/10.1162/NECO_a_00142; with many noise
levels: Song and Ermon, 2019, https://arxiv.org/abs/1907.05600.
Differential equations: Song et al., 2021, https://arxiv.org/abs/2011.13456.
EDM, the default network and solver: Karras et al., 2022, https://arxiv.org/abs/2206.00364.

    python p2_score.py train --output-dir runs/p2/score
    python p2_score.py sample --checkpoint runs/p2/score/model.safetensors --output-dir faces
    python p2_score.py table --checkpoint runs/p2/score/model.safetensors --output-dir table
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, assert_never

import torch
from torch import Tensor

from common.checkpoints import digest_of, load_net, save_net
from common.cli import UserError, above, at_least, below, each_once, in_range, is_seed, run_cli
from common.data import Fit, decode_images, draw_batch, to_uint8
from common.device import Device, Precision, make_accelerator, place
from common.faces import (
    FACE_NETS,
    FaceNet,
    FaceStates,
    face_names,
    load_faces,
    make_face_net,
    refuse_other_autoencoder,
)
from common.figures import read_grids, save_gif, save_grid, save_image
from common.files import make_output_dir
from common.processes import my_share
from common.progress import show_progress
from common.quarters import QUARTERS, add_quarters, end_epoch
from common.reverse_process import draw_way, evenly_chosen
from common.rng import ImageNoise, derive_seed, make_rng, seed_dropout
from common.run import Run
from common.trackers import Tracker
from common.training import update_ema, warmup_cosine
from diffusion.noise_levels import (
    NoiseLevels,
    Parametrization,
    annealed_variance,
    geometric_levels,
    karras_levels,
    langevin_length,
    largest_distance,
    level_ratio,
    levels_needed,
)
from diffusion.samplers import (
    corrector_length,
    euler_step,
    heun_step,
    langevin_step,
    ode_slope,
    score_of,
    ve_ancestral_step,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

Sampler = Literal["langevin", "pc", "ancestral", "euler", "heun"]
FIRST = 32  # images of a grid
SNR = 0.16  # of the corrector, as for CIFAR-10 in Song et al., 2021
PAIRS = 2_000  # of images, whose largest distance is sigma_max


@dataclass(kw_only=True)
class Train:
    """Train a denoiser on a folder of images. The last epoch is the result."""

    output_dir: Path
    """Run directory. The same command again continues an interrupted run."""
    data_dir: Path = Path("hw2_data")
    """Data folder with face/train in it, or any folder of images."""
    size: int = 64
    """Images are resized to this height and width."""
    fit: Fit = "crop"
    """How images of another shape fit: their middle is cut out, or all is squashed or padded."""
    autoencoder: Path | None = None
    """Work in the latents of this model.safetensors of p2_autoencoder.py (or a latent network)."""
    parametrization: Parametrization = "edm"
    """What the network's output means: EDM's preconditioning, or the score times σ (ncsn)."""
    sigma_min: float = 0.02
    """Smallest noise level, for images in [-1, 1]."""
    sigma_max: float | None = None
    """Largest noise level; by default the largest distance of 2,000 pairs of training images."""
    width: int = 64
    """Channels of the U-Net's first level."""
    blocks: int = 2
    """Residual blocks of each level."""
    patch: int = 1
    """Side of the squares of pixels that the network sees as one position; 2 is faster."""
    dropout: float = 0.0
    """Dropout in the residual blocks."""
    flip: bool = True
    """Mirror each image with probability one half."""
    init: Path | None = None
    """model.safetensors of the same architecture, whose weights the training starts from."""
    epochs: int = 100
    """Epochs of --images-per-epoch images."""
    images_per_epoch: int = 56_000
    """Images of an epoch, whatever the size of the data."""
    batch_size: int = 128
    """Images of a step, over all processes."""
    lr: float = 4e-4
    """Peak learning rate of AdamW: warmed up over 2 % of the steps, then a half cosine to 0."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema_decay: float = 0.9995
    """Decay of the averaged network, which is the one that is sampled and saved."""
    grid_every: int = 10
    """Epochs between grids of samples from fixed noise."""
    keep_every: int | None = None
    """Epochs between copies of the averaged network, epochs/0010.safetensors; none without it."""
    seed: int = 0
    """Seed of initialisation, order and noise."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """bf16 autocast where the hardware is fast at it, or fp32."""
    log_with: tuple[Tracker, ...] = ()
    """Trackers that get the metrics too: tensorboard, wandb or mlflow."""

    def __post_init__(self) -> None:
        in_range("--size", self.size, 8, 1_024)
        above("--sigma-min", self.sigma_min, 0, 1e6)
        above("--sigma-max", self.sigma_max, 0, 1e6)
        if self.sigma_max is not None and self.sigma_min >= self.sigma_max:
            raise UserError(
                f"--sigma-min {self.sigma_min:g}: must be below --sigma-max {self.sigma_max:g}"
            )
        if self.width < 32 or self.width % 32 or self.width > 4_096:
            raise UserError(f"--width {self.width}: must be a multiple of 32, up to 4,096")
        in_range("--blocks", self.blocks, 1, 100)
        in_range("--patch", self.patch, 1, 1_024)
        below("--dropout", self.dropout, 0, 1)
        at_least("--epochs", self.epochs, 1)
        at_least("--images-per-epoch", self.images_per_epoch, 1)
        at_least("--batch-size", self.batch_size, 2)
        above("--lr", self.lr, 0, 1)
        in_range("--weight-decay", self.weight_decay, 0, 100)
        above("--clip", self.clip, 0, 1e6)
        below("--ema-decay", self.ema_decay, 0, 1)
        at_least("--grid-every", self.grid_every, 1)
        at_least("--keep-every", self.keep_every, 1)
        is_seed("--seed", self.seed)


@dataclass(kw_only=True)
class Sampling:
    """Options of every command that samples."""

    checkpoint: Path
    """model.safetensors of p2_score.py train."""
    output_dir: Path
    """Folder for the result."""
    final_denoising: bool = True
    """Remove the noise of sigma_min with a last step; without it that noise stays in the image."""
    snr: float = SNR
    """Signal-to-noise ratio r of the corrector's steps, for --sampler pc."""
    rho: float = 7.0
    """Spacing of the levels of ancestral, euler and heun; larger is denser near sigma_min."""
    seed: int = 0
    """Seed of the noise. Image k depends on it and on k alone."""
    batch_size: int = 50
    """Images computed at a time."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """bf16 autocast of the network where the hardware is fast at it; the sums are fp32."""

    def __post_init__(self) -> None:
        above("--snr", self.snr, 0, 10)
        in_range("--rho", self.rho, 1, 100)
        is_seed("--seed", self.seed)
        at_least("--batch-size", self.batch_size, 1)


@dataclass(kw_only=True)
class Sample(Sampling):
    """Write faces 0000.png, 0001.png, …; image k depends on the seed and on k alone."""

    num_images: int = 1_000
    """Number of images."""
    sampler: Sampler = "ancestral"
    """Langevin dynamics, with a predictor (pc), the ancestral chain, or the ODE by two solvers."""
    calls: int = 50
    """Calls of the network for an image, at most."""
    grid: Path | None = None
    """PNG file for a grid of the first 32 images, 8 in a row; outside --output-dir."""
    plots_dir: Path | None = None
    """Folder for the plots of ten images at ten noise levels. None are drawn without it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("--num-images", self.num_images, 1)
        at_least("--calls", self.calls, 1)
        for flag, path in (("--grid", self.grid), ("--plots-dir", self.plots_dir)):
            if path is None:
                continue
            place_of_it = path.resolve()
            if self.output_dir.resolve() in (place_of_it, *place_of_it.parents):
                raise UserError(f"{flag} {path}: must not lie in --output-dir")
        if self.grid is not None and self.grid.suffix != ".png":
            raise UserError(f"--grid {self.grid}: must end in .png")


@dataclass(kw_only=True)
class Table(Sampling):
    """Compare the samplers by number of network calls: quality and seconds, in one table."""

    data_dir: Path = Path("hw2_data")
    """Data folder: its face/val is compared with, its face/train gives the last row."""
    samplers: tuple[Sampler, ...] = ("langevin", "pc", "ancestral", "euler", "heun")
    """Samplers to compare."""
    calls: tuple[int, ...] = (10, 25, 35, 100, 300, 1_000, 2_500)
    """Numbers of calls of the network."""
    count: int = 1_000
    """Images of each row."""
    count_above: int = 128
    """Images of a row with more than 100 calls, on a CPU."""
    weights: Path | None = None
    """Weights of the Inception network (pt_inception-2015-12-05-6726825d.pth), for a column FID."""

    def __post_init__(self) -> None:
        super().__post_init__()
        each_once("--samplers", self.samplers)
        each_once("--calls", self.calls)
        for calls in self.calls:
            at_least("--calls", calls, 1)
        at_least("--count", self.count, 2)
        at_least("--count-above", self.count_above, 2)


# Training


def train(args: Train) -> dict[str, Any]:
    """Train one run; returns the content of result.json (on the main process)."""
    accelerator = make_accelerator(args.device, args.precision, args.log_with, args.output_dir)
    device = accelerator.device
    run = Run(args, accelerator)
    if run.result is not None:
        return run.result if run.is_main else {}
    cache = args.output_dir.parent / "cache"
    pixels = load_faces(args.data_dir, args.size, cache, args.fit).to(device)

    torch.manual_seed(derive_seed(args.seed, "init"))
    bare_net = place(make_net(args), device)
    initial = load_init(args, bare_net) if args.init else None
    steps_per_epoch = max(1, args.images_per_epoch // args.batch_size)
    last = args.epochs * steps_per_epoch
    states = FaceStates(bare_net, pixels, args.flip, last * args.batch_size)
    levels = initial.levels if initial else measure_levels(states, args)
    config = bare_net.config | {
        "noise_levels": levels.to_config(),
        "size": args.size,
        "seed": args.seed,
    }
    if initial:
        config["init"] = initial.digest
    ema = copy.deepcopy(bare_net)
    weights = [weight for weight in bare_net.parameters() if weight.requires_grad]
    adam = torch.optim.AdamW(weights, weight_decay=args.weight_decay, fused=True)
    net, adam = accelerator.prepare(bare_net, adam)
    parts = {"net": bare_net, "ema": ema, "adam": adam}

    first = run.load_state(parts)
    log_levels(run, levels, bare_net.shape)
    for step in run.steps(first, last, args.batch_size):
        net.train()
        learning_rate = args.lr * warmup_cosine(step / last, warm_up=0.02)
        adam.param_groups[0]["lr"] = learning_rate
        rng = make_rng(args.seed, "step", step, accelerator.process_index, device=device)
        seed_dropout(args.seed, step, accelerator.process_index)
        rows = draw_batch(states.count, step, args.batch_size, accelerator, args.seed, "order")
        x0 = states.draw(rows, rng).contiguous(memory_format=torch.channels_last)

        losses = denoising_losses(net, levels, x0, rng)
        adam.zero_grad()
        accelerator.backward(losses["loss"])
        norm = accelerator.clip_grad_norm_(weights, args.clip)
        losses["gradient_norm"] = torch.as_tensor(norm)
        adam.step()
        update_ema(ema, bare_net, args.ema_decay, step)

        run.add_losses(step, losses)
        epoch, rest = divmod(step + 1, steps_per_epoch)
        epoch_ends = rest == 0
        if epoch_ends:
            row = {"step": step + 1, "epoch": epoch, "learning_rate": learning_rate}
            row |= run.epoch_means(steps_per_epoch)
            end_epoch(run, row, "sigma", "loss by quarter of log σ")
            if epoch % args.grid_every == 0 or epoch == args.epochs:
                draw_samples(run, ema, levels, epoch)
            if args.keep_every and epoch % args.keep_every == 0 and run.is_main:
                save_net(run.dir / "epochs" / f"{epoch:04d}.safetensors", ema, config)
        if run.save_due() or epoch_ends:
            run.save_state(step + 1, parts)
    if run.is_main:
        save_gif(read_grids(run.dir / "samples"), run.dir / "figures" / "training.gif", 400)
        run.save_model(ema, config)
        run.finish(run.history()[-1])
    return run.result or {}


def make_net(args: Train) -> FaceNet:
    """The network that --autoencoder, --size, --width and so on ask for."""
    return make_face_net(
        args.size, args.width, args.blocks, args.patch, args.dropout, args.autoencoder
    )


def denoising_losses(
    net: torch.nn.Module, levels: NoiseLevels, x0: Tensor, rng: torch.Generator
) -> dict[str, Tensor]:
    """The loss: the weighted squared error of D(x_0 + σ z, σ), in expectation least at the score.

    `x0` is (batch, channels, height, width). The weighted errors are also summed and counted by
    quarter of log σ, for the record.
    """
    sigma = levels.draw(len(x0), rng, x0.device)
    noise = torch.randn(x0.shape, generator=rng, device=x0.device)
    x = x0 + sigma.view(-1, 1, 1, 1) * noise
    denoised = levels.denoise(net, x, sigma)
    errors = (denoised - x0).square().flatten(1).mean(1)  # (batch,)
    weighted = levels.weight(sigma) * errors

    losses = {"loss": weighted.mean()}
    quarter = (levels.time(sigma) * QUARTERS / 1_000).long().clamp(0, QUARTERS - 1)
    add_quarters(losses, weighted, quarter, "sigma")
    return losses


def measure_levels(states: FaceStates, args: Train) -> NoiseLevels:
    """The noise levels for this folder of images: what is not given is measured."""
    some = states.sample(PAIRS, make_rng(args.seed, "sample")).cpu()
    sigma_max = args.sigma_max
    try:
        if sigma_max is None:
            sigma_max = largest_distance(some, PAIRS, make_rng(args.seed, "pairs"))
        if args.sigma_min >= sigma_max:
            raise UserError(
                f"--sigma-min {args.sigma_min:g}: must be below {sigma_max:.4g}, the largest "
                f"distance of two images in {args.data_dir}"
            )
        return NoiseLevels(args.sigma_min, sigma_max, some.std().item(), args.parametrization)
    except ValueError as error:
        raise UserError(f"--data-dir {args.data_dir}: {error}") from None


def log_levels(run: Run, levels: NoiseLevels, shape: tuple[int, ...]) -> None:
    """Print the measured levels, and how many Langevin dynamics would need (NCSNv2's rule)."""
    dimensions = math.prod(shape)
    needed = levels_needed(levels.sigma_max, levels.sigma_min, dimensions)
    run.log(
        f"σ from {levels.sigma_max:.4g} to {levels.sigma_min:g}, data's deviation "
        f"{levels.sigma_data:.3g}; {dimensions:,} dimensions: Langevin dynamics needs {needed} "
        f"levels at a ratio of {level_ratio(dimensions):.4f}"
    )


class Initial(NamedTuple):
    """What the weights of --init bring along: their noise levels, and the hash of the file."""

    levels: NoiseLevels
    digest: str


def load_init(args: Train, net: FaceNet) -> Initial:
    """Copy the weights of --init into the network. They only fit the noise levels they know.

    Raises UserError if they are another network's, for other latents, or if an option asks for
    other noise levels.
    """
    assert args.init is not None
    kind = net.config["net"]
    found, config = load_net(args.init, {kind: type(net)}, "--init")
    if "noise_levels" not in config:
        raise UserError(f"--init {args.init}: is not a score-based model")
    if found.config != net.config:
        raise UserError(
            f"--init {args.init}: has the arguments {found.config['arguments']}, "
            f"but this run has {net.config['arguments']}"
        )
    refuse_other_autoencoder(net, found, args.init)
    levels = NoiseLevels(**config["noise_levels"])
    for name in ("parametrization", "sigma_min", "sigma_max"):
        asked = getattr(args, name)
        known = getattr(levels, name)
        if asked is not None and asked != known:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {asked}: the network in --init {args.init} has {known}")
    net.load_state_dict(found.state_dict())
    return Initial(levels, digest_of(args.init))


def draw_samples(run: Run, ema: FaceNet, levels: NoiseLevels, epoch: int) -> None:
    """Draw 32 samples from fixed noise with the ancestral sampler in 50 calls."""
    if not run.is_main:
        return
    model = Model(ema.eval(), levels, run.accelerator)
    plan = make_plan(model, "ancestral", 50)
    states = sample_faces(model, range(FIRST), plan, seed=0)
    states = show_progress(states, plan.states, "samples, steps")
    file = run.dir / "samples" / f"epoch_{epoch:04d}.png"
    save_grid(final_pixels(model, states), file, columns=8)


# Sampling


class Model(NamedTuple):
    """A trained denoiser with its noise levels."""

    net: FaceNet
    levels: NoiseLevels
    accelerator: Accelerator

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        """D(x, σ) at one σ for all images. The network may be bf16, the rest is fp32."""
        sigmas = torch.full((len(x),), sigma, device=x.device)
        with self.accelerator.autocast():
            return self.levels.denoise(self.net, x, sigmas)


class State(NamedTuple):
    """A state of a sampler: the noise level σ, x, and what the network makes of it, D(x, σ)."""

    sigma: float
    x: Tensor
    denoised: Tensor


Denoise = Callable[[Tensor, float], Tensor]


def langevin(
    denoise: Denoise, x: Tensor, sigmas: list[float], steps: int, e: float, draw: ImageNoise
) -> Iterator[State]:
    """Annealed Langevin dynamics: `steps` steps of length e σ² at each level (NCSNv2)."""
    for sigma in sigmas:
        for _ in range(steps):
            denoised = denoise(x, sigma)
            score = score_of(x, denoised, sigma)
            yield State(sigma, x, denoised)
            x = langevin_step(x, score, e * sigma**2, draw())
    yield State(sigmas[-1], x, denoise(x, sigmas[-1]))  # D is the final denoising


def predictor_corrector(
    denoise: Denoise, x: Tensor, sigmas: list[float], snr: float, draw: ImageNoise
) -> Iterator[State]:
    """At each level an ancestral step to the next, then a Langevin step there (algorithm 2)."""
    for number, sigma in enumerate(sigmas):
        denoised = denoise(x, sigma)
        yield State(sigma, x, denoised)
        if number + 1 == len(sigmas):
            return
        following = sigmas[number + 1]
        x = ve_ancestral_step(x, denoised, sigma, following, draw())
        score = score_of(x, denoise(x, following), following)
        noise = draw()
        x = langevin_step(x, score, corrector_length(score, noise, snr), noise)


def ancestral(
    denoise: Denoise, x: Tensor, sigmas: list[float], draw: ImageNoise
) -> Iterator[State]:
    """The reverse of the chain that adds noise level by level: DDPM's sampler for these models."""
    for number, sigma in enumerate(sigmas):
        denoised = denoise(x, sigma)
        yield State(sigma, x, denoised)
        if number + 1 < len(sigmas):
            x = ve_ancestral_step(x, denoised, sigma, sigmas[number + 1], draw())


def euler(denoise: Denoise, x: Tensor, sigmas: list[float]) -> Iterator[State]:
    """The probability-flow ODE by Euler's method. It adds no noise, and is DDIM by another name."""
    for number, sigma in enumerate(sigmas):
        denoised = denoise(x, sigma)
        yield State(sigma, x, denoised)
        if number + 1 < len(sigmas):
            slope = ode_slope(x, denoised, sigma)
            x = euler_step(x, slope, sigma, sigmas[number + 1])


def heun(denoise: Denoise, x: Tensor, sigmas: list[float]) -> Iterator[State]:
    """The ODE by Heun's method: two calls a step, and an error that falls with its square."""
    for number, sigma in enumerate(sigmas):
        denoised = denoise(x, sigma)
        yield State(sigma, x, denoised)
        if number + 1 < len(sigmas):
            following = sigmas[number + 1]
            slope = ode_slope(x, denoised, sigma)
            guess = euler_step(x, slope, sigma, following)
            following_slope = ode_slope(guess, denoise(guess, following), following)
            x = heun_step(x, slope, following_slope, sigma, following)


class Plan(NamedTuple):
    """How a sampler spends its calls: the levels, and for Langevin the steps at each."""

    sampler: Sampler
    sigmas: list[float]
    steps: int
    calls: int

    @property
    def states(self) -> int:
        """How many states the sampler yields."""
        return self.calls if self.sampler == "langevin" else len(self.sigmas)


def make_plan(model: Model, sampler: Sampler, calls: int, rho: float = 7.0) -> Plan:
    """The noise levels of a sampler for at most `calls` calls of the network.

    Langevin dynamics takes as many levels as it needs, if the calls suffice, and more steps at each
    if there are calls left. Its final denoising is a call of its own, so that it takes at least 2.
    """
    levels = model.levels
    high, low = levels.sigma_max, levels.sigma_min
    if sampler == "langevin":
        needed = levels_needed(high, low, math.prod(model.net.shape))
        steps = max(1, (calls - 1) // needed)
        count = max(1, (calls - 1) // steps)
        return Plan(sampler, geometric_levels(high, low, count), steps, count * steps + 1)
    if sampler == "pc":
        count = (calls + 1) // 2
        return Plan(sampler, geometric_levels(high, low, count), 1, 2 * count - 1)
    if sampler == "ancestral":
        return Plan(sampler, karras_levels(high, low, calls, rho), 1, calls)
    if sampler == "euler":
        return Plan(sampler, karras_levels(high, low, calls, rho), 1, calls)
    if sampler == "heun":
        count = (calls + 1) // 2
        return Plan(sampler, karras_levels(high, low, count, rho), 1, 2 * count - 1)
    assert_never(sampler)


@torch.inference_mode()
def sample_faces(
    model: Model, numbers: range, plan: Plan, seed: int, snr: float = SNR
) -> Iterator[State]:
    """Sample the images with these numbers; yields the state at every call but the correctors'.

    The last state is at sigma_min (at sigma_max if that is the only level). Its `denoised` is the
    result of the final denoising: by Tweedie's formula the mean of the clean images that x could
    come from.
    """
    device = model.accelerator.device
    draw = ImageNoise(seed, numbers, model.net.shape, device)
    x = plan.sigmas[0] * draw()
    if plan.sampler == "langevin":
        ratio = plan.sigmas[0] / plan.sigmas[1] if len(plan.sigmas) > 1 else 1.0
        e = langevin_length(ratio, plan.steps)
        yield from langevin(model.denoise, x, plan.sigmas, plan.steps, e, draw)
    elif plan.sampler == "pc":
        yield from predictor_corrector(model.denoise, x, plan.sigmas, snr, draw)
    elif plan.sampler == "ancestral":
        yield from ancestral(model.denoise, x, plan.sigmas, draw)
    elif plan.sampler == "euler":
        yield from euler(model.denoise, x, plan.sigmas)
    elif plan.sampler == "heun":
        yield from heun(model.denoise, x, plan.sigmas)
    else:
        assert_never(plan.sampler)


def final_pixels(model: Model, states: Iterator[State], final_denoising: bool = True) -> Tensor:
    """Run a sampler to its end; returns the images, uint8 (n, 3, height, width), on the CPU."""
    last = next(states)
    for state in states:
        last = state
    x = last.denoised if final_denoising else last.x
    return decode_pixels(model, x)


@torch.inference_mode()
def decode_pixels(model: Model, x: Tensor) -> Tensor:
    """States (n, *net.shape) as images, uint8 (n, 3, height, width), on the CPU."""
    return to_uint8(model.net.decode(x)).cpu()


def load_model(args: Sampling) -> Model:
    """Load a checkpoint. Raises UserError if it was not trained by this script."""
    accelerator = make_accelerator(args.device, args.precision)
    net, config = load_net(args.checkpoint, FACE_NETS)
    if "noise_levels" not in config:
        raise UserError(
            f"--checkpoint {args.checkpoint}: is not a score-based model; "
            "p2_ddim.py and p2_ddpm_infer.py sample networks of p2_ddpm_train.py"
        )
    levels = NoiseLevels(**config["noise_levels"])
    return Model(place(net, accelerator.device), levels, accelerator)


def sample(args: Sample) -> None:
    """Write the images; print how the calls were spent and the seconds an image took."""
    model = load_model(args)
    accelerator = model.accelerator
    plan = make_plan(model, args.sampler, args.calls, args.rho)
    names = face_names(args.num_images)
    make_output_dir(args.output_dir, only=names)
    if args.grid is not None:
        make_output_dir(args.grid.parent, "--grid", alone=False)
    if args.plots_dir is not None:
        make_output_dir(args.plots_dir, "--plots-dir")
    describe(model, plan)
    accelerator.wait_for_everyone()  # all have looked before the first one writes

    started = time.monotonic()
    mine = my_share(range(0, args.num_images, args.batch_size), accelerator)
    for start in show_progress(mine, len(mine), f"{args.sampler}, batches"):
        numbers = range(start, min(start + args.batch_size, args.num_images))
        states = sample_faces(model, numbers, plan, args.seed, args.snr)
        pixels = final_pixels(model, states, args.final_denoising)
        for number, image in zip(numbers, pixels, strict=True):
            save_image(image, args.output_dir / names[number])
    accelerator.wait_for_everyone()
    seconds = (time.monotonic() - started) / args.num_images
    if not accelerator.is_main_process:
        return
    if args.grid is not None:
        first = [args.output_dir / name for name in names[:FIRST]]
        save_grid(decode_images(first), args.grid, columns=8)
    if args.plots_dir is not None:
        draw_denoising(model, plan, args.plots_dir, args)
    print(f"{args.num_images:,} faces: {args.output_dir} ({seconds:.3g} s an image)")


def describe(model: Model, plan: Plan) -> None:
    """Print the levels and the length of Langevin's steps, with the variance that they leave."""
    if not model.accelerator.is_main_process:
        return
    text = f"{plan.sampler}: {len(plan.sigmas)} noise levels, {plan.calls:,} calls of the network"
    if plan.sampler == "langevin" and len(plan.sigmas) > 1:
        ratio = plan.sigmas[0] / plan.sigmas[1]
        e = langevin_length(ratio, plan.steps)
        left = annealed_variance(ratio, plan.steps, len(plan.sigmas))
        text += (
            f"; steps of {e:.4g} σ², {plan.steps} at each level, "
            f"which leave {left:.3g} times the variance of sigma_min"
        )
    print(text)


def draw_denoising(model: Model, plan: Plan, folder: Path, args: Sampling) -> None:
    """Draw ten images (rows) at ten noise levels (columns): x, and in a second plot D(x, σ).

    x is multiplied by σ_data / √(σ² + σ_data²), which gives it the range of the data.
    """
    shown = evenly_chosen(plan.states, 10)
    noisy = []
    denoised = []
    columns = []
    states = sample_faces(model, range(10), plan, args.seed, args.snr)
    states = show_progress(states, plan.states, "plots, steps")
    for number, (sigma, x, clean) in enumerate(states):
        if number not in shown:
            continue
        shrink = model.levels.sigma_data / math.hypot(sigma, model.levels.sigma_data)
        noisy.append(decode_pixels(model, shrink * x))
        denoised.append(decode_pixels(model, clean))
        columns.append(f"σ = {sigma:.3g}")
    about = f"{plan.sampler}, {plan.calls:,} calls of the network"
    draw_way(noisy, columns, f"x: {about}", folder / "noisy.png")
    draw_way(denoised, columns, f"D(x, σ): {about}", folder / "denoised.png")


def main(args: Train | Sample | Table) -> Any:
    """Run one command."""
    match args:
        case Train():
            return train(args)
        case Sample():
            return sample(args)
        case Table():
            from experiments import score_samplers  # which imports this script

            return score_samplers.main(args)


if __name__ == "__main__":
    run_cli(Train | Sample | Table, main, shared=Train | Sample)
