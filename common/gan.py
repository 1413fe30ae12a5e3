"""What the two GAN scripts share: the `sample` command and what happens after each epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoints import load_net
from common.cli import UserError, at_least, is_seed
from common.data import decode_images, to_uint8
from common.device import Device, make_accelerator
from common.figures import read_grids, save_curves, save_gif, save_grid, save_image
from common.files import make_output_dir
from common.processes import my_share
from common.progress import show_progress
from common.rng import ImageNoise
from common.run import Run
from models.gan import GENERATORS, Generator, ProjectionGenerator
from models.network import Network

FIRST = 32  # images of a grid


@dataclass(kw_only=True)
class Sample:
    """Write faces 0000.png, 0001.png, …; image k depends on the seed and on k alone."""

    checkpoint: Path
    """model.safetensors of a training run."""
    output_dir: Path
    """Folder for the images; nothing else may lie in it, because graders read all of it."""
    num_images: int = 1_000
    """Number of images."""
    grid: Path | None = None
    """PNG file for a grid of the first 32 images, 8 in a row; outside --output-dir."""
    seed: int = 0
    """Seed of the latents."""
    batch_size: int = 50
    """Images computed at a time; it does not change them."""
    device: Device = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        at_least("--num-images", self.num_images, 1)
        at_least("--batch-size", self.batch_size, 1)
        is_seed("--seed", self.seed)
        if self.grid is None:
            return
        if self.grid.suffix != ".png":
            raise UserError(f"--grid {self.grid}: must end in .png")
        if self.output_dir.resolve() in self.grid.resolve().parents:
            raise UserError(f"--grid {self.grid}: must not lie in --output-dir")


@torch.inference_mode()
def sample(args: Sample) -> None:
    """Generate the images in float64; processes share the batches.

    Another batch size adds numbers in another order. In float64 that never changes a rounded pixel.
    """
    accelerator = make_accelerator(args.device, "fp32")
    device = accelerator.device
    if device.type == "mps":  # has no float64
        device = torch.device("cpu")
    net, _ = load_net(args.checkpoint, GENERATORS)
    generator = net.to(device, torch.float64)
    digits = max(4, len(str(args.num_images - 1)))
    names = [f"{number:0{digits}}.png" for number in range(args.num_images)]
    make_output_dir(args.output_dir, only=names)
    if args.grid is not None:
        make_output_dir(args.grid.parent, "--grid", alone=False)
    accelerator.wait_for_everyone()  # all have looked before the first one writes

    mine = my_share(range(0, args.num_images, args.batch_size), accelerator)
    for start in show_progress(mine, len(mine), "faces, batches"):
        numbers = range(start, min(start + args.batch_size, args.num_images))
        latents = ImageNoise(args.seed, numbers, (net.latent,))()
        pixels = to_uint8(generator(latents.to(device, torch.float64))).cpu()
        for number, image in zip(numbers, pixels, strict=True):
            save_image(image, args.output_dir / names[number])
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    if args.grid is not None:
        first = [args.output_dir / name for name in names[:FIRST]]
        save_grid(decode_images(first), args.grid, columns=8)
    print(f"{args.num_images:,} faces: {args.output_dir}")


def spread(images: Tensor) -> float:
    """Mean over pixels of the standard deviation over images (n, 3, height, width).

    0 if all images are the same.
    """
    return images.float().std(0).mean().item()


@torch.inference_mode()
def end_epoch(
    run: Run,
    ema: Generator | ProjectionGenerator,
    real: Tensor,
    row: dict[str, Any],
    panels: Mapping[str, Sequence[str]],
) -> None:
    """Draw the curves and 32 fixed latents with the averaged generator; log; warn of a collapse.

    `real` is some training images, uint8 (n, 3, 64, 64). A generator whose images vary less than a
    quarter as much has collapsed. `row` is the epoch's row of metrics.jsonl; `panels` are those of
    `save_curves`.
    """
    if not run.is_main:
        return
    with run.accelerator.autocast():
        latents = ImageNoise(0, range(FIRST), (ema.latent,), run.accelerator.device)()
        pixels = to_uint8(ema.eval()(latents)).cpu()
    save_grid(pixels, run.dir / "samples" / f"epoch_{row['epoch']:04d}.png", columns=8)
    row["variety"] = spread(pixels) / spread(real)
    run.log_metrics(row)
    run.log_row(row)
    panels = {**panels, "variety, real = 1": ["variety"]}
    save_curves(run.history(), panels, run.dir / "figures" / "curves.png")
    if row["variety"] < 0.25 and row["step"] >= 1_000:  # before that all faces are grey
        run.log("warning: the generated faces are nearly the same: the generator collapsed")


def finish(run: Run, ema: Network, extra: dict[str, Any]) -> None:
    """Write the averaged generator, the film of the fixed latents and result.json."""
    if not run.is_main:
        return
    save_gif(read_grids(run.dir / "samples"), run.dir / "figures" / "training.gif")
    run.save_model(ema, ema.config | extra)
    result = run.history()[-1]
    del result["step"]
    run.finish(result)
