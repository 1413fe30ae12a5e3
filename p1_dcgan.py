"""Unconditional 64x64 faces by a deep convolutional GAN (DCGAN).

A generator turns latents into faces that a discriminator should not tell from real ones; both are trained in turn.
Paper: Radford et al., Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks,
2015, https://arxiv.org/abs/1511.06434; the losses are those of Goodfellow et al., 2014,
https://arxiv.org/abs/1406.2661

    python p1_dcgan.py train --output-dir runs/p1/dcgan
    python p1_dcgan.py sample --checkpoint runs/p1/dcgan/model.safetensors --output-dir faces --grid first32.png
    python score.py fid faces hw2_data/face/val
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import run as runs
from common.augment import augment_faces, diff_augment
from common.data import draw_batch, load_folder, normalise
from common.gan import Sample, end_epoch, finish, sample
from common.run import Run, generator
from models.gan import Discriminator, Generator


@dataclass(kw_only=True)
class Train:
    """Train on DATA_DIR/face/train. The last epoch counts: no epoch is chosen by validation images."""

    output_dir: Path  # Where everything is written; the same command again continues an interrupted run.
    data_dir: Path = Path("hw2_data")  # Folder with face/train.
    epochs: int = 100  # Passes over the images.
    batch_size: int = 64  # Images of a step, over all processes.
    width: int = 64  # Channels of the layers next to the images; deeper ones have 2, 4 and 8 times as many.
    lr: float = 2e-4  # Learning rate of both Adams.
    beta1: float = 0.5  # First moment's decay of both Adams.
    real_label: float = 0.9  # The discriminator's target for real images (label smoothing; 1 is none) ...
    fake_label: float = 0.1  # ... and for generated ones (0 is none).
    batches: Literal["joint", "separate"] = "joint"  # Real and generated images, for the discriminator's BatchNorm.
    instance_noise: float = 0.01  # Standard deviation of the noise on the discriminator's images; falls to 0.
    augment: tuple[Literal["color", "translation", "cutout"], ...] = ("color", "translation")  # Of those images.
    flip: bool = True  # Show real images mirrored half of the time.
    ema_decay: float = 0.999  # Of the averaged generator, the one that is sampled and saved.
    seed: int = 0  # Seed of initialisation, order, noise and augmentation.
    device: runs.Device = "auto"  # Where to compute.
    precision: runs.Precision = "auto"  # bf16 autocast where the hardware is fast at it, or fp32.


def bce(logits: Tensor, target: float) -> Tensor:
    """-target log D - (1 - target) log(1 - D), D = sigmoid(logits): the Sigmoid of the net lives here."""
    return F.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits, target, dtype=torch.float32))


def judged(d: nn.Module, real: Tensor, fake: Tensor, seen: Callable[[Tensor], Tensor], batches: str) -> Tensor:
    """Logits (2, batch) of real and of generated images, in one BatchNorm batch ("joint") or one each ("separate").

    The discriminator up to its first BatchNorm has no bias, so a batch of its own hides an image's contrast.
    """
    if batches == "joint":
        return d(seen(torch.cat([real, fake]))).view(2, -1)  # (2 · batch,) → (2, batch)
    return torch.stack([d(seen(real)), d(seen(fake))])


def train(args: Train) -> dict[str, Any]:
    """Train one run; returns the content of result.json (on the main process)."""
    accelerator = runs.make_accelerator(args.device, args.precision)
    device, rank = accelerator.device, accelerator.process_index
    run = Run(args, accelerator)
    if run.result is not None:
        return run.result if run.is_main else {}
    pixels = load_folder(args.data_dir / "face" / "train", (64, 64), args.output_dir.parent / "cache").pixels.to(device)

    torch.manual_seed(runs.derive_seed(args.seed, "init"))
    bare_g, bare_d = (
        net(width=args.width).to(device, memory_format=torch.channels_last) for net in (Generator, Discriminator)
    )
    ema = copy.deepcopy(bare_g)
    adams = [torch.optim.Adam(n.parameters(), args.lr, (args.beta1, 0.999), fused=True) for n in (bare_g, bare_d)]
    g, d, g_adam, d_adam = accelerator.prepare(bare_g, bare_d, *adams)
    parts = {"generator": bare_g, "discriminator": bare_d, "ema": ema, "g_adam": g_adam, "d_adam": d_adam}
    done = run.load_state(parts)

    steps_per_epoch = max(1, len(pixels) // args.batch_size)
    last = args.epochs * steps_per_epoch
    for step in run.steps(done, last, args.batch_size):
        g.train(), d.train()
        rng = generator(args.seed, "step", step, rank, device=device)
        rows = draw_batch(len(pixels), step, args.batch_size, accelerator, args.seed, "order")
        real = augment_faces(normalise(pixels[rows]), rng, args.flip)
        fake = g(torch.randn((len(rows), bare_g.latent), generator=rng, device=device))
        noise = args.instance_noise * (1 - step / last)

        def seen(images: Tensor, rng: torch.Generator = rng, noise: float = noise) -> Tensor:
            """What the discriminator is shown of images: augmented, and with noise."""
            images = diff_augment(images, rng, args.augment)
            images = images + noise * torch.randn(images.shape, generator=rng, device=device)
            return images.contiguous(memory_format=torch.channels_last)

        # The discriminator descends -log D(x) - log(1 - D(G(z))) with smoothed labels. The fakes carry no gradient.
        logits_real, logits_fake = judged(d, real, fake.detach(), seen, args.batches)
        d_loss = bce(logits_real, args.real_label) + bce(logits_fake, args.fake_label)
        d_adam.zero_grad()
        accelerator.backward(d_loss)
        d_adam.step()

        # The generator descends -log D(G(z)), which does not saturate as log(1 - D(G(z))) does.
        bare_d.requires_grad_(False)
        with accelerator.autocast():
            g_loss = bce(judged(bare_d, real, fake, seen, args.batches)[1], 1.0)
        g_adam.zero_grad()
        accelerator.backward(g_loss)
        g_adam.step()
        bare_d.requires_grad_(True)
        runs.update_ema(ema, bare_g, args.ema_decay, step)

        values = {"d_loss": d_loss, "g_loss": g_loss}
        values |= {"score_real": logits_real.sigmoid().mean(), "score_fake": logits_fake.sigmoid().mean()}
        run.add(step, values)
        epoch, inside = divmod(step + 1, steps_per_epoch)
        if inside == 0:
            row = {"step": step + 1, "epoch": epoch} | run.means(steps_per_epoch)
            panels = {"losses": ["d_loss", "g_loss"], "mean D of images": ["score_real", "score_fake"]}
            end_epoch(run, ema, pixels[:32].cpu(), row, panels)
            if row["score_real"] > 0.98 * args.real_label and row["score_fake"] < args.fake_label + 0.02:
                run.log("warning: the discriminator is right about everything: the generator learns nothing")
        if run.save_due() or inside == 0:
            run.save_state(step + 1, parts)
    finish(run, ema, {"method": "dcgan", "seed": args.seed})
    return run.result or {}


def main(args: Train | Sample) -> Any:
    """Run one sub-command."""
    return {Train: train, Sample: sample}[type(args)](args)


if __name__ == "__main__":
    runs.command_line(Train | Sample, main)
