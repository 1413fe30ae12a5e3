"""What both GAN scripts share: sampling image k from (seed, k) alone, the record of an epoch, signs of collapse."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import run as runs
from common.data import to_uint8
from common.figures import read_grids, save_curves, save_gif, save_grid, save_image
from common.run import Run, UserError
from models.gan import GENERATORS


@dataclass(kw_only=True)
class Sample:
    """Write faces 0000.png, 0001.png, …; image k depends on the seed and k alone."""

    checkpoint: Path  # model.safetensors of `train`.
    output_dir: Path  # Receives the images and nothing else.
    num_images: int = 1_000  # How many.
    grid: Path | None = None  # PNG of the first 32, 8 in a row; not in output_dir, which graders read whole.
    seed: int = 0  # Of the latents.
    batch_size: int = 50  # Images at a time: no influence on them.
    device: runs.Device = "auto"  # Where to compute.


@torch.inference_mode()
def sample(args: Sample) -> None:
    """Generate in float64: sums in another order, as other batch sizes have, then never change a rounded pixel."""
    if args.num_images < 1 or args.batch_size < 1:
        raise UserError("--num-images and --batch-size: at least 1")
    inside = args.grid is not None and args.output_dir.resolve() in args.grid.resolve().parents
    if args.grid is not None and (args.grid.suffix != ".png" or inside):
        raise UserError(f"--grid {args.grid}: must end in .png, and not lie in --output-dir")
    device = runs.make_accelerator(args.device, "fp32").device
    device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    net = runs.load_net(args.checkpoint, GENERATORS)[0].to(device, torch.float64)
    digits, first = max(4, len(str(args.num_images - 1))), []
    names = [f"{number:0{digits}}.png" for number in range(args.num_images)]
    runs.make_output_dir(args.output_dir, only=set(names))
    if args.grid is not None:
        runs.make_output_dir(args.grid.parent, "--grid")
    for start in range(0, args.num_images, args.batch_size):
        numbers = range(start, min(start + args.batch_size, args.num_images))
        pixels = to_uint8(net(runs.ImageNoise(args.seed, numbers, (net.latent,))().to(device, torch.float64))).cpu()
        for number, image in zip(numbers, pixels, strict=True):
            save_image(image, args.output_dir / names[number])
        first += [image for number, image in zip(numbers, pixels, strict=True) if number < 32]
    if args.grid is not None:
        save_grid(torch.stack(first), args.grid, columns=8)
    print(f"{args.num_images:,} faces: {args.output_dir}")


def spread(images: Tensor) -> float:
    """Mean over pixels of the standard deviation over images (n, 3, height, width): 0 if all are the same."""
    return images.float().std(0).mean().item()


@torch.inference_mode()
def end_epoch(run: Run, net: nn.Module, real: Tensor, row: dict[str, Any], panels: dict[str, list[str]]) -> None:
    """Draw the 32 fixed latents by the averaged generator and the curves; log; warn of collapse.

    `real` is some training images, uint8: a generator that varies less than a quarter of them has collapsed.
    """
    if not run.is_main:
        return
    with run.accelerator.autocast():
        latents = runs.ImageNoise(0, range(32), (net.latent,), run.accelerator.device)()
        pixels = to_uint8(net.eval()(latents)).cpu()
    save_grid(pixels, run.dir / "samples" / f"epoch_{row['epoch']:04d}.png", columns=8)
    row["variety"] = spread(pixels) / spread(real)
    run.metrics(row)
    run.log(", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in row.items() if k != "step"))
    save_curves(run.history(), panels | {"variety, real = 1": ["variety"]}, run.dir / "figures" / "curves.png")
    if row["variety"] < 0.25 and row["step"] >= 1_000:  # the first faces are all grey
        run.log("warning: the generated faces are nearly the same: the generator collapsed")


def finish(run: Run, net: nn.Module, extra: dict[str, Any]) -> None:
    """Write the averaged generator, the film of the fixed latents and result.json."""
    if not run.is_main:
        return
    save_gif(read_grids(run.dir / "samples"), run.dir / "figures" / "training.gif")
    run.save_model(net, net.config | extra)
    last = run.history()[-1]
    run.finish({key: value for key, value in last.items() if key not in ("step",)})
