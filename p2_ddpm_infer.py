r"""Generate digits or faces with a diffusion model: the graders' folders and the report's plots.

DDPM: Ho et al., Denoising Diffusion Probabilistic Models, 2020, https://arxiv.org/abs/2006.11239.
Fewer steps with DDIM (Song et al., 2020, https://arxiv.org/abs/2010.02502) or DPM-Solver++ (Lu et
al., 2022, https://arxiv.org/abs/2211.01095). Guidance: Ho and Salimans, 2022,
https://arxiv.org/abs/2207.12598.

    python p2_ddpm_infer.py --checkpoint runs/p2/digits/model.safetensors --output-dir digits \
        --per-class 100
    python p2_ddpm_infer.py --checkpoint runs/p2/digits/model.safetensors --output-dir few \
        --plots-dir plots
    python p2_ddpm_infer.py --checkpoint runs/p2/faces/model.safetensors --output-dir faces \
        --num-images 1000 --sampler ddpm --plots-dir plots
    torchrun --nproc_per_node 2 p2_ddpm_infer.py --output-dir faces \
        --checkpoint runs/p2/faces/model.safetensors
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, assert_never

import torch
from torch import Tensor

from common.checkpoints import load_net
from common.cli import UserError, at_least, each_once, in_range, is_domain, is_seed, run_cli
from common.data import to_uint8
from common.device import Device, Precision, make_accelerator, place
from common.faces import FACE_NETS, face_names
from common.figures import save_image, save_labelled
from common.files import make_output_dir
from common.processes import my_share
from common.progress import show_progress
from common.reverse_process import Digits, State, draw_digits, draw_faces
from common.rng import ImageNoise
from diffusion.guidance import guided_eps, predict_eps
from diffusion.samplers import (
    Clamp,
    ancestral_step,
    clamp_x0,
    ddim_step,
    dpm_solver_step,
    step_pairs,
)
from diffusion.schedule import Schedule, Spacing, spaced_steps
from models.attention_unet import AttentionUnet
from models.context_unet import ContextUnet
from models.network import Network

if TYPE_CHECKING:
    from accelerate import Accelerator

Sampler = Literal["ddpm", "ddim", "dpm-solver++"]
NETS = {"context_unet": ContextUnet, "attention_unet": AttentionUnet, **FACE_NETS}
SHAPE = (3, 28, 28)  # of a digit
LARGEST_GUIDANCE = 100.0
# Options that say something about classes or about published networks of digits.
OF_DIGITS = (
    "domains",
    "per_class",
    "guidance",
    "interval",
    "guidance_sweep",
    "plain_one_hot",
    "unit_range",
)


@dataclass(kw_only=True)
class Generate:
    """Write DIGIT_NUMBER.png (0_001.png …) for every digit; of a network for faces 0000.png, ….

    Image k (of a domain) depends on the seed and on k alone.
    """

    checkpoint: Path
    """model.safetensors of p2_ddpm_train.py, or a published ContextUnet .pth."""
    output_dir: Path
    """Folder for the images and nothing else; with several domains, a sub-folder for each."""
    domains: tuple[str, ...] = ()
    """Domains to generate; all that the model knows if none is named."""
    per_class: int | None = None
    """Images of each digit; 100 for one domain and 50 each for several if not given."""
    num_images: int | None = None
    """Faces of a network without classes; 1,000 if not given."""
    sampler: Sampler = "dpm-solver++"
    """Sampler: ancestral, deterministic or with --eta, or a fast solver of second order."""
    steps: int | None = None
    """Steps of the sampler; T for ddpm, 50 for ddim and 12 for dpm-solver++ if not given."""
    spacing: Spacing | None = None
    """Spacing of the steps, by default the checkpoint's, else dense at both ends (beta)."""
    eta: float = 0.0
    """Randomness of ddim: 0 adds no noise, 1 as much as ddpm."""
    large_sigma: bool = False
    """Let ddpm add noise of variance β, not of the posterior's variance."""
    guidance: float = 1.0
    """Strength w of classifier-free guidance; 0 uses the conditional network alone."""
    interval: tuple[float, float] = (0.0, 1.0)
    """The range of t / T in which guidance is on (Kynkäänniemi et al., 2024,
    https://arxiv.org/abs/2404.07724)."""
    clamp: Clamp | None = None
    """How predicted images are kept in [-1, 1], by default the checkpoint's way, else static."""
    plain_one_hot: bool = False
    """For a published checkpoint that was trained with 1, not -1, at its class."""
    unit_range: bool = False
    """For a published checkpoint that was trained on images in [0, 1], not [-1, 1]."""
    timesteps: int = 400
    """Training steps T of a published checkpoint, whose file does not say it (β 1e-4 to 0.02)."""
    plots_dir: Path | None = None
    """Folder for plots: grids and the reverse process. None are drawn without it."""
    guidance_sweep: tuple[float, ...] = ()
    """Strengths of guidance to compare in a strip of ten digits each, drawn in --plots-dir."""
    seed: int = 0
    """Seed of the noise."""
    batch_size: int = 250
    """Images computed at a time."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """bf16 autocast where the hardware is fast at it, or fp32."""

    def __post_init__(self) -> None:
        each_once("--domains", self.domains, at_least_one=False)
        is_domain("--domains", *self.domains)
        at_least("--per-class", self.per_class, 1)
        at_least("--num-images", self.num_images, 1)
        at_least("--steps", self.steps, 1)
        in_range("--eta", self.eta, 0, 1)
        if self.eta > 0 and self.sampler != "ddim":
            raise UserError(f"--eta {self.eta:g}: only --sampler ddim adds noise in this way")
        if self.large_sigma and self.sampler != "ddpm":
            raise UserError(f"--large-sigma: is for --sampler ddpm, not {self.sampler}")
        in_range("--guidance", self.guidance, -LARGEST_GUIDANCE, LARGEST_GUIDANCE)
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"--interval {low:g} {high:g}: must rise and lie between 0 and 1")
        in_range("--timesteps", self.timesteps, 2, 1_000_000)
        for guidance in self.guidance_sweep:
            in_range("--guidance-sweep", guidance, -LARGEST_GUIDANCE, LARGEST_GUIDANCE)
        if self.guidance_sweep and self.plots_dir is None:
            raise UserError("--guidance-sweep: needs --plots-dir, where its strip is drawn")
        is_seed("--seed", self.seed)
        at_least("--batch-size", self.batch_size, 1)


class Model(NamedTuple):
    """A noise predictor with its schedule, the falling steps of the sampler, and its domains.

    A network for faces has no domains.
    """

    net: Network
    schedule: Schedule
    steps: list[int]
    domains: list[str]
    accelerator: Accelerator
    clamp: Clamp = "static"


@torch.inference_mode()
def sample(
    model: Model, draw: ImageNoise, labels: Tensor | None, guidance: float, args: Generate
) -> Iterator[State]:
    """Sample images with labels int64 (n,) or none; yields the noise and the state of every step.

    `draw()` returns the noise that sampling starts from, then that of each step.
    """
    net = model.net
    schedule = model.schedule
    low, high = args.interval
    x = draw().contiguous(memory_format=torch.channels_last)
    yield State(schedule.T, x, None)

    before = None  # t and x0 of the step before, which DPM-Solver++ extrapolates from
    for t, previous in step_pairs(model.steps):
        with model.accelerator.autocast():
            if labels is not None and guidance != 0 and low <= t / schedule.T <= high:
                eps = guided_eps(net, schedule, x, t, labels, guidance)
            else:
                eps = predict_eps(net, schedule, x, t, labels)
        x0 = clamp_x0(schedule.x0_from_eps(x, t, eps), model.clamp)
        if args.sampler == "ddpm":
            noise = draw() if previous > 0 else None
            x = ancestral_step(schedule, x, x0, t, previous, noise, args.large_sigma)
        elif args.sampler == "ddim":
            noise = draw() if previous > 0 and args.eta > 0 else None
            x = ddim_step(schedule, x0, eps, t, previous, args.eta, noise)
        elif args.sampler == "dpm-solver++":
            x = dpm_solver_step(schedule, x, x0, t, previous, before)
            before = (t, x0)
        else:
            assert_never(args.sampler)
        yield State(previous, x, x0)


def sample_digits(
    model: Model,
    domain: str,
    digits: list[int],
    numbers: list[int],
    guidance: float,
    args: Generate,
) -> Iterator[Digits]:
    """Sample digits of a domain; yields the noise (t = T) and the digits after every step.

    `digits` are the classes of the images and `numbers` their k: the noise of an image depends on
    the seed and k alone, so that image k of every digit starts from the same noise.
    """
    device = model.accelerator.device
    labels = torch.tensor(digits, device=device) + 10 * model.domains.index(domain)
    draw = ImageNoise(args.seed, numbers, SHAPE, device)
    for state in sample(model, draw, labels, guidance, args):
        yield Digits(state.t, to_pixels(state.x, args))


def sample_faces(model: Model, numbers: Sequence[int], args: Generate) -> Iterator[State]:
    """Sample faces number k; yields the noise and the state of every step, latents or images."""
    net: Any = model.net  # one of FACE_NETS, which have a shape
    draw = ImageNoise(args.seed, numbers, net.shape, model.accelerator.device)
    yield from sample(model, draw, None, 0.0, args)


@torch.inference_mode()
def face_pixels(model: Model, x: Tensor) -> Tensor:
    """Images of a state (n, *shape), decoded where it is latents: uint8 on the CPU."""
    net: Any = model.net
    with model.accelerator.autocast():
        return to_uint8(net.decode(x)).cpu()


def to_pixels(x: Tensor, args: Generate) -> Tensor:
    """Images in the range that the network was trained on → uint8 on the CPU."""
    if args.unit_range:
        x = 2 * x - 1
    return to_uint8(x).cpu()


def last_of(states: Iterator[Any]) -> Any:
    """Run a sampler to its end; returns the last state, without keeping the others."""
    last = next(states)  # the noise
    for state in states:
        last = state
    return last


def final_pixels(states: Iterator[Digits], steps: list[int], what: str) -> Tensor:
    """Run a sampler to its end beside a progress bar; returns the images, uint8 (n, 3, 28, 28)."""
    return last_of(show_progress(states, len(steps) + 1, f"{what}, steps")).pixels


def load_model(args: Generate) -> Model:
    """Load a checkpoint with its schedule.

    Raises UserError for a network that makes neither digits by class nor faces, and for options
    that are for others.
    """
    accelerator = make_accelerator(args.device, args.precision)
    net, config = load_net(args.checkpoint, NETS)
    if makes_faces(net):
        check_faces(config, args)
        domains = []
    else:
        domains = check_digits(net, config, args)
    schedule = read_schedule(config, args)
    count = default_steps(args.sampler, schedule.T) if args.steps is None else args.steps
    if count > schedule.T:
        raise UserError(f"--steps {count}: the network was trained with {schedule.T:,} steps")
    sampling = config.get("sampling", {})
    spacing = args.spacing or sampling.get("spacing", "beta")
    clamp = args.clamp or sampling.get("clamp", "static")
    steps = spaced_steps(schedule.T, count, spacing)
    return Model(place(net, accelerator.device), schedule, steps, domains, accelerator, clamp)


def makes_faces(net: Network) -> bool:
    """Whether a network is one of those for faces, and has no classes."""
    is_for_faces = isinstance(net, tuple(FACE_NETS.values()))
    return is_for_faces and not net.config["arguments"].get("n_classes")


def check_faces(config: dict[str, Any], args: Generate) -> None:
    """Raise UserError for a network without a schedule, and for options that are for digits."""
    if "noise_levels" in config:
        raise UserError(
            f"--checkpoint {args.checkpoint}: is a score-based model; "
            "p2_score.py sample makes its images"
        )
    if "schedule" not in config:
        raise UserError(
            f"--checkpoint {args.checkpoint}: has no noise schedule; p2_ddim.py makes the images "
            "of the course's UNet.pt"
        )
    for field in fields(args):
        if field.name in OF_DIGITS and getattr(args, field.name) != field.default:
            flag = "--" + field.name.replace("_", "-")
            raise UserError(f"{flag}: is for digits, but {args.checkpoint} makes faces")


def check_digits(net: Any, config: dict[str, Any], args: Generate) -> list[str]:
    """The domains of a network for digits. Raises UserError for what the options want besides."""
    classes = check_makes_digits(net, args.checkpoint)
    if args.num_images is not None:
        raise UserError(
            f"--num-images: is for faces, but {args.checkpoint} makes digits; take --per-class"
        )
    if args.plain_one_hot:
        if not getattr(net, "flipped_one_hot", False):
            raise UserError(f"--plain-one-hot: {args.checkpoint} is not a published ContextUnet")
        net.flipped_one_hot = False
    if config and args.unit_range:
        raise UserError(
            f"--unit-range: {args.checkpoint} is from p2_ddpm_train.py, whose images are in [-1, 1]"
        )
    numbered = [f"domain{number}" for number in range(classes // 10)]
    domains = config.get("domains", numbered)
    for domain in args.domains:
        if domain not in domains:
            known = " ".join(domains)
            raise UserError(f"--domains {domain}: {args.checkpoint} only knows {known}")
    return domains


def check_makes_digits(net: Network, checkpoint: Path) -> int:
    """The number of classes of the network; UserError if it does not make 28x28 digits by class."""
    arguments = net.config["arguments"]
    classes = arguments.get("n_classes")
    if not classes:
        raise UserError(
            f"--checkpoint {checkpoint}: this network has no class labels; p2_ddpm_infer.py needs "
            "one trained on digits (p2_ddpm_train.py)"
        )
    if classes % 10:
        raise UserError(
            f"--checkpoint {checkpoint}: has {classes} classes, but digits have 10 in each domain"
        )
    channels = arguments["in_channels"]
    size = arguments.get("size", 28)  # ContextUnet and AttentionUnet have no other size
    if (channels, size) != (3, 28):
        raise UserError(
            f"--checkpoint {checkpoint}: makes {size}x{size} images with {channels} channels, "
            "but digits are 28x28 with 3 channels"
        )
    return classes


def read_schedule(config: dict[str, Any], args: Generate) -> Schedule:
    """The schedule in a checkpoint's configuration, or that of a published checkpoint."""
    if "schedule" in config:
        return Schedule.from_config(config["schedule"])
    return Schedule(args.timesteps, "linear", rule="as-given")


def default_steps(sampler: Sampler, timesteps: int) -> int:
    """How many steps a sampler takes if --steps is not given."""
    if sampler == "ddpm":
        return timesteps
    if sampler == "ddim":
        return min(50, timesteps)
    if sampler == "dpm-solver++":
        return min(12, timesteps)
    assert_never(sampler)


def in_batches(per_class: int, batch_size: int) -> list[tuple[list[int], list[int]]]:
    """The digits and numbers of all images to make, `per_class` of each digit, batch by batch."""
    digits = []
    numbers = []
    for digit in range(10):
        for number in range(1, per_class + 1):
            digits.append(digit)
            numbers.append(number)
    batches = []
    for start in range(0, len(digits), batch_size):
        end = start + batch_size
        batches.append((digits[start:end], numbers[start:end]))
    return batches


def write_digits(model: Model, folders: dict[str, Path], per_class: int, args: Generate) -> None:
    """Write the images of each domain under the graders' names; processes share the batches."""
    batches = []
    for domain in folders:
        for digits, numbers in in_batches(per_class, args.batch_size):
            batches.append((domain, digits, numbers))
    total = len(batches)
    for batch in my_share(range(total), model.accelerator):
        domain, digits, numbers = batches[batch]
        states = sample_digits(model, domain, digits, numbers, args.guidance, args)
        pixels = final_pixels(states, model.steps, f"{domain}, batch {batch + 1:,} of {total:,}")
        for digit, number, image in zip(digits, numbers, pixels, strict=True):
            save_image(image, folders[domain] / file_name(digit, number))


def file_name(digit: int, number: int) -> str:
    """The graders' name of an image: its first character is the label."""
    return f"{digit}_{number:03d}.png"


def draw_plots(model: Model, domain: str, per_class: int, folder: Path, args: Generate) -> None:
    """Draw a grid (rows are digits, columns noises), the reverse process and its film.

    The grid has the first images of each digit: ten, or `per_class` if that is less.
    """
    columns = min(10, per_class)
    digits, numbers = in_batches(columns, batch_size=100)[0]  # all of them
    sampling = sample_digits(model, domain, digits, numbers, args.guidance, args)
    total = len(model.steps) + 1
    states = list(show_progress(sampling, total, f"{domain}, grid, steps"))
    draw_digits(states, columns, model.schedule.T, domain, folder)
    if args.guidance_sweep:
        draw_guidance_sweep(model, domain, folder, args)


def draw_guidance_sweep(model: Model, domain: str, folder: Path, args: Generate) -> None:
    """Draw the first image of every digit (columns) with several strengths of guidance (rows)."""
    rows = []
    for guidance in args.guidance_sweep:
        states = sample_digits(model, domain, list(range(10)), [1] * 10, guidance, args)
        rows.append(final_pixels(states, model.steps, f"{domain}, guidance {guidance:g}"))
    row_names = [f"w = {guidance:g}" for guidance in args.guidance_sweep]
    column_names = [str(digit) for digit in range(10)]
    save_labelled(torch.cat(rows), folder / f"{domain}_guidance.png", row_names, column_names)


def write_faces(model: Model, folder: Path, names: Sequence[str], args: Generate) -> None:
    """Write the faces under their names; processes share the batches."""
    accelerator = model.accelerator
    total = len(names)
    for start in my_share(range(0, total, args.batch_size), accelerator):
        numbers = range(start, min(start + args.batch_size, total))
        what = f"faces {start + 1:,} to {numbers.stop:,} of {total:,}, steps"
        states = sample_faces(model, numbers, args)
        last = last_of(show_progress(states, len(model.steps) + 1, what))
        for number, image in zip(numbers, face_pixels(model, last.x), strict=True):
            save_image(image, folder / names[number])
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(f"{total:,} faces: {folder}")


def draw_face_grids(model: Model, folder: Path, args: Generate) -> None:
    """Draw the first ten faces at ten steps of the sampler."""
    steps = model.steps
    states = show_progress(sample_faces(model, range(10), args), len(steps) + 1, "grid, steps")
    about = f"{args.sampler}, {len(steps)} of {model.schedule.T:,} steps, seed {args.seed}"
    draw_faces(states, steps, lambda x: face_pixels(model, x), about, folder)


def make_faces(model: Model, args: Generate) -> None:
    """Check the folders, then write faces and grids."""
    names = face_names(args.num_images or 1_000)
    make_output_dir(args.output_dir, only=names)
    if args.plots_dir is not None:
        refuse_plots_among_images(args.plots_dir, [args.output_dir])
        make_output_dir(args.plots_dir, "--plots-dir")
    model.accelerator.wait_for_everyone()  # all have looked before the first one writes
    write_faces(model, args.output_dir, names, args)
    if args.plots_dir is not None and model.accelerator.is_main_process:
        draw_face_grids(model, args.plots_dir, args)


def main(args: Generate) -> None:
    """Check everything, then generate."""
    model = load_model(args)
    if makes_faces(model.net):
        make_faces(model, args)
        return
    domains = args.domains or tuple(model.domains)
    per_class = args.per_class or (50 if len(domains) > 1 else 100)
    folders = {}
    for domain in domains:
        folders[domain] = args.output_dir / domain if len(domains) > 1 else args.output_dir
    if args.plots_dir is not None:
        refuse_plots_among_images(args.plots_dir, list(folders.values()))
    names = []
    for digit in range(10):
        names += [file_name(digit, number) for number in range(1, per_class + 1)]
    for folder in folders.values():
        make_output_dir(folder, only=names)
    if args.plots_dir is not None:
        make_output_dir(args.plots_dir, "--plots-dir")
    model.accelerator.wait_for_everyone()  # all have looked before the first one writes
    write_digits(model, folders, per_class, args)
    model.accelerator.wait_for_everyone()
    if not model.accelerator.is_main_process:
        return
    for domain, folder in folders.items():
        print(f"{domain}: {10 * per_class:,} digits: {folder}")
        if args.plots_dir is not None:
            draw_plots(model, domain, per_class, args.plots_dir, args)


def refuse_plots_among_images(plots_dir: Path, folders: list[Path]) -> None:
    """Raise UserError if the plots would lie in a folder of images, which graders read whole."""
    plots = plots_dir.resolve()
    for folder in folders:
        if folder.resolve() in (plots, *plots.parents):
            raise UserError(
                f"--plots-dir {plots_dir}: lies among the images, where graders would read it too"
            )


if __name__ == "__main__":
    run_cli(Generate, main, shared=Generate)
