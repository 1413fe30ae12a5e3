"""Generate digits with a trained diffusion model: the graders' folders, and the figures of the report.

DDPM: Ho et al., 2020, https://arxiv.org/abs/2006.11239. Fewer steps by DDIM (Song et al., 2020,
https://arxiv.org/abs/2010.02502) or DPM-Solver++ (Lu et al., 2022, https://arxiv.org/abs/2211.01095).

    python p2_ddpm_infer.py --checkpoint runs/p2/digits/model.safetensors --output-dir digits --per-class 100
    python p2_ddpm_infer.py --checkpoint runs/p2/digits/model.safetensors --output-dir few --figures-dir figures
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common import run as runs
from common.data import to_uint8
from common.diffusion import Clamp, Sampler, Schedule, Spacing, predictor, sample
from common.figures import grid_of, save_gif, save_grid, save_image, save_labelled
from common.progress import watch
from common.run import UserError
from models.attention_unet import AttentionUnet
from models.context_unet import ContextUnet
from models.ddim_unet import DdimUnet

NETS = {"context_unet": ContextUnet, "attention_unet": AttentionUnet, "ddim_unet": DdimUnet}


@dataclass(kw_only=True)
class Generate:
    """Write DIGIT_NUMBER.png (0_001.png …) for every digit; image k of a domain depends on the seed and k alone."""

    checkpoint: Path  # model.safetensors of p2_ddpm_train.py, or a published ContextUnet .pth.
    output_dir: Path  # Receives the images and nothing else; with several domains, a folder for each.
    domains: tuple[str, ...] = ()  # Of those the model knows; all of them if none is named.
    per_class: int | None = None  # Images of each digit; None is 100 for one domain, 50 for several.
    sampler: Sampler = "dpm-solver++"  # ddpm takes all steps if --steps does not say, the others few.
    steps: int | None = None  # Of the sampler; None is all for ddpm, 50 for ddim, 12 for dpm-solver++.
    spacing: Spacing = "beta"  # Of few steps: leading, even down to 1; trailing, even from T; beta, dense at both ends.
    eta: float = 0.0  # Noise of ddim: 0 none, 1 that of ddpm.
    large_sigma: bool = False  # ddpm adds variance β instead of the posterior's.
    guidance: float = 1.0  # w of classifier-free guidance; 0 is the conditional net alone, one pass a step.
    interval: tuple[float, float] = (0.0, 1.0)  # The t / T between which guidance is on.
    clamp: Clamp = "static"  # What keeps the predicted images in [-1, 1].
    plain_one_hot: bool = False  # Of a published checkpoint that was trained with 1 for its class, not -1.
    unit_range: bool = False  # Of a published checkpoint whose images were in [0, 1], not [-1, 1].
    noise_steps: int = 400  # T of a published checkpoint, which does not say it; its β are 1e-4 to 0.02.
    figures_dir: Path | None = None  # Also draw the grid, the reverse process and its film here.
    guidance_sweep: tuple[float, ...] = ()  # Also draw a strip of these strengths into --figures-dir.
    seed: int = 0  # Of the noise.
    batch_size: int = 250  # Images at a time.
    device: runs.Device = "auto"  # Where to compute.
    precision: runs.Precision = "auto"  # bf16 autocast where the hardware is fast at it, or fp32.


class Model:
    """A noise predictor with its schedule and classes; generates image number i of a digit from noise number i."""

    def __init__(self, args: Generate) -> None:
        self.args, self.accelerator = args, runs.make_accelerator(args.device, args.precision)
        net, config = runs.load_net(args.checkpoint, NETS)
        self.net: nn.Module = net.to(self.accelerator.device, memory_format=torch.channels_last)
        arguments = net.config["arguments"]
        classes, channels, size = (arguments.get(name) for name in ("n_classes", "in_channels", "size"))
        if not classes or classes % 10:
            raise UserError(f"--checkpoint {args.checkpoint}: knows {classes or 'no'} classes, digits take 10 a domain")
        if channels != 3 or size not in (None, 28):  # ContextUnet and AttentionUnet know no other size
            told = f"{channels} channels{f' of {size}x{size}' if size else ''}"
            raise UserError(f"--checkpoint {args.checkpoint}: makes images of {told}, digits have 3 of 28x28")
        if args.plain_one_hot:
            if not getattr(net, "flipped_one_hot", False):
                raise UserError(f"--plain-one-hot: {args.checkpoint} is no published ContextUnet")
            net.flipped_one_hot = False
        if config and args.unit_range:
            raise UserError(f"--unit-range: {args.checkpoint} is of p2_ddpm_train.py, whose images are in [-1, 1]")
        self.domains = config.get("domains", [f"domain{number}" for number in range(classes // 10)])
        self.schedule = Schedule(**config.get("schedule", {"steps": args.noise_steps, "as_given": True}))
        steps = {"ddpm": self.schedule.T, "ddim": min(50, self.schedule.T), "dpm-solver++": min(12, self.schedule.T)}
        self.steps = self.schedule.subset(steps[args.sampler] if args.steps is None else args.steps, args.spacing)

    @torch.inference_mode()
    def states(
        self, domain: str, digits: list[int], numbers: list[int], guidance: float
    ) -> Iterator[tuple[int, Tensor]]:
        """(t, uint8 images (n, 3, 28, 28)) from the noise at T down to t = 0."""
        args, device = self.args, self.accelerator.device
        labels = torch.tensor(digits, device=device) + 10 * self.domains.index(domain)
        draw = runs.ImageNoise(args.seed, numbers, (3, 28, 28), device)
        x = draw().contiguous(memory_format=torch.channels_last)
        yield self.schedule.T, self.pixels(x)
        predict = predictor(self.net, self.schedule, labels, guidance, args.interval)
        options = {"eta": args.eta, "large_sigma": args.large_sigma, "clamp": args.clamp, "draw": draw}
        with self.accelerator.autocast():
            for step in sample(self.schedule, predict, x, self.steps, args.sampler, **options):
                yield step.t, self.pixels(step.x)

    def pixels(self, x: Tensor) -> Tensor:
        """Images as the net knows them → uint8."""
        return to_uint8(2 * x - 1 if self.args.unit_range else x).cpu()


def in_batches(per_class: int, batch_size: int) -> list[tuple[list[int], list[int]]]:
    """Digits and numbers of the images to make, `per_class` of each digit, batch by batch."""
    digits, numbers = [d for d in range(10) for _ in range(per_class)], list(range(1, per_class + 1)) * 10
    starts = range(0, len(digits), batch_size)
    return [(digits[start : start + batch_size], numbers[start : start + batch_size]) for start in starts]


def write_digits(model: Model, domain: str, per_class: int, folder: Path, args: Generate) -> None:
    """Write the images of one domain under the graders' names."""
    done, total = 0, 10 * per_class
    for digits, numbers in in_batches(per_class, args.batch_size):
        what = f"{domain}, digits {done + 1:,} to {done + len(digits):,} of {total:,}, steps"
        states = model.states(domain, digits, numbers, args.guidance)
        _, pixels = deque(watch(states, len(model.steps) + 1, what), maxlen=1)[0]
        done += len(digits)
        for digit, number, image in zip(digits, numbers, pixels, strict=True):
            save_image(image, folder / file_name(digit, number))
    print(f"{domain}: {total:,} digits: {folder}")


def file_name(digit: int, number: int) -> str:
    """The graders' name of an image: its first sign is the label."""
    return f"{digit}_{number:03d}.png"


def draw_figures(model: Model, domain: str, folder: Path, args: Generate) -> None:
    """The 10x10 grid (rows digits, columns noises), its film, six states of the first 0, and the guidance strip."""
    states = model.states(domain, *in_batches(10, 100)[0], args.guidance)
    states = list(watch(states, len(model.steps) + 1, f"{domain}, grid, steps"))
    save_grid(states[-1][1], folder / f"{domain}_grid.png", columns=10)
    frames = [*states[: -1 : -(-len(states) // 50)], states[-1]]
    save_gif([grid_of(pixels, 10) for _, pixels in frames], folder / f"{domain}_reverse.gif", 150)
    evenly = (model.schedule.T * number / 5 for number in range(5, -1, -1))
    nearest = (min(range(len(states)), key=lambda number: abs(states[number][0] - t)) for t in evenly)
    six = [states[number] for number in dict.fromkeys(nearest)]  # fewer if there are fewer steps
    first = torch.stack([pixels[0] for _, pixels in six])
    save_labelled(first, folder / f"{domain}_reverse.png", [domain], [f"t = {t}" for t, _ in six])
    if args.guidance_sweep:
        rows = []
        for guidance in args.guidance_sweep:
            states = model.states(domain, list(range(10)), [1] * 10, guidance)
            states = watch(states, len(model.steps) + 1, f"{domain}, guidance {guidance:g}, steps")
            rows.append(deque(states, maxlen=1)[0][1])
        names = [f"w = {guidance:g}" for guidance in args.guidance_sweep]
        save_labelled(torch.cat(rows), folder / f"{domain}_guidance.png", names, [str(d) for d in range(10)])


def main(args: Generate) -> None:
    """Check everything, then generate."""
    if args.batch_size < 1 or (args.per_class is not None and args.per_class < 1):
        raise UserError("--batch-size and --per-class: at least 1")
    if args.guidance_sweep and args.figures_dir is None:
        raise UserError("--guidance-sweep: needs --figures-dir, where its strip is drawn")
    if not all(map(math.isfinite, (args.guidance, *args.guidance_sweep))):
        raise UserError("--guidance and --guidance-sweep: must be numbers")
    if not 0 <= args.interval[0] <= args.interval[1] <= 1:
        raise UserError(f"--interval {args.interval[0]:g} {args.interval[1]:g}: must rise, within 0 and 1")
    if not 0 <= args.eta <= 1 or (args.eta and args.sampler != "ddim"):
        raise UserError(f"--eta {args.eta:g}: must be 0 to 1, and 0 but for --sampler ddim")
    if args.large_sigma and args.sampler != "ddpm":
        raise UserError(f"--large-sigma: is for --sampler ddpm, not {args.sampler}")
    if args.noise_steps < 2:
        raise UserError(f"--noise-steps {args.noise_steps}: must be at least 2")
    if len(set(args.domains)) < len(args.domains):
        raise UserError(f"--domains {' '.join(args.domains)}: each once")
    model = Model(args)
    unknown = [domain for domain in args.domains if domain not in model.domains]
    if unknown:
        raise UserError(f"--domains {unknown[0]}: {args.checkpoint} knows {' '.join(model.domains)}")
    domains = args.domains or tuple(model.domains)
    per_class = args.per_class or (50 if len(domains) > 1 else 100)
    names = {file_name(digit, number) for digit in range(10) for number in range(1, per_class + 1)}
    folders = {domain: args.output_dir / domain if len(domains) > 1 else args.output_dir for domain in domains}
    figures = args.figures_dir and args.figures_dir.resolve()
    if figures and any(folder.resolve() in (figures, *figures.parents) for folder in folders.values()):
        raise UserError(f"--figures-dir {args.figures_dir}: lies among the digits, where graders would read it too")
    for folder in folders.values():
        runs.make_output_dir(folder, only=names)
    if figures:
        runs.make_output_dir(args.figures_dir, "--figures-dir")
    for domain, folder in folders.items():
        write_digits(model, domain, per_class, folder, args)
        if args.figures_dir is not None:
            draw_figures(model, domain, args.figures_dir, args)


if __name__ == "__main__":
    runs.command_line(Generate, main)
