r"""Unconditional 64x64 faces with a deep convolutional GAN (DCGAN).

A generator turns random latents into faces. A discriminator learns to tell them from real ones,
and the generator learns to fool it.

DCGAN: Radford et al., Unsupervised Representation Learning with Deep Convolutional Generative
Adversarial Networks, 2015, https://arxiv.org/abs/1511.06434. The losses: Goodfellow et al.,
Generative Adversarial Networks, 2014, https://arxiv.org/abs/1406.2661.

    python p1_dcgan.py train --output-dir runs/p1/dcgan
    python p1_dcgan.py sample --checkpoint runs/p1/dcgan/model.safetensors --output-dir faces \
        --grid first32.png
    python evaluate.py fid faces hw2_data/face/val
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.augment import augment_faces, diff_augment
from common.cli import UserError, above, at_least, below, each_once, in_range, is_seed, run_cli
from common.data import Fit, draw_batch, load_folder, normalise
from common.device import Device, Precision, make_accelerator, place
from common.gan import Sample, end_epoch, finish, sample
from common.rng import derive_seed, make_rng
from common.run import Run
from common.trackers import Tracker
from common.training import update_ema
from models.gan import Discriminator, Generator


@dataclass(kw_only=True)
class Train:
    """Train on DATA_DIR/face/train. The last epoch is the result: none is chosen afterwards."""

    output_dir: Path
    """Run directory. The same command again continues an interrupted run."""
    data_dir: Path = Path("hw2_data")
    """Data folder, with face/train in it."""
    fit: Fit = "crop"
    """How images of another shape fit: their middle is cut out, or all is squashed or padded."""
    epochs: int = 100
    """Epochs of --images-per-epoch images."""
    images_per_epoch: int | None = None
    """Images in an epoch, after which a grid is drawn; all images once if not given."""
    batch_size: int = 64
    """Images of a step, over all processes."""
    width: int = 64
    """Channels of the layers next to the images; deeper layers have 2, 4 and 8 times as many."""
    lr: float = 2e-4
    """Learning rate of both Adam optimizers."""
    beta1: float = 0.5
    """First-moment decay of both Adam optimizers."""
    real_label: float = 0.9
    """Target of the discriminator for real images (1 means no label smoothing)."""
    fake_label: float = 0.1
    """Target of the discriminator for generated images (0 means no label smoothing)."""
    batches: Literal["joint", "separate"] = "joint"
    """Whether the discriminator's BatchNorm sees real and generated images in one batch."""
    instance_noise: float = 0.01
    """Standard deviation of the noise added to the discriminator's images; it falls to 0."""
    augment: tuple[Literal["color", "translation", "cutout"], ...] = ("color", "translation")
    """Differentiable augmentation of the discriminator's images; list none to switch it off."""
    flip: bool = True
    """Mirror half of the real images."""
    ema_decay: float = 0.999
    """Decay of the averaged generator, which is the one that is sampled and saved."""
    seed: int = 0
    """Seed of initialisation, order, noise and augmentation."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """bf16 autocast where the hardware is fast at it, or fp32."""
    log_with: tuple[Tracker, ...] = ()
    """Trackers that get the metrics too: tensorboard, wandb or mlflow."""

    def __post_init__(self) -> None:
        at_least("--epochs", self.epochs, 1)
        at_least("--images-per-epoch", self.images_per_epoch, 1)
        at_least("--batch-size", self.batch_size, 2)
        in_range("--width", self.width, 1, 4_096)
        above("--lr", self.lr, 0, 1)
        below("--beta1", self.beta1, 0, 1)
        in_range("--real-label", self.real_label, 0, 1)
        in_range("--fake-label", self.fake_label, 0, 1)
        if self.real_label <= self.fake_label:
            raise UserError(
                f"--real-label {self.real_label}: must be above --fake-label {self.fake_label}"
            )
        in_range("--instance-noise", self.instance_noise, 0, 10)
        each_once("--augment", self.augment, at_least_one=False)
        below("--ema-decay", self.ema_decay, 0, 1)
        is_seed("--seed", self.seed)


def binary_cross_entropy(logits: Tensor, target: float) -> Tensor:
    """-target log D - (1 - target) log(1 - D), averaged, with D = sigmoid(logits).

    The sigmoid that the paper puts at the end of the discriminator is in here.
    """
    targets = torch.full_like(logits, target, dtype=torch.float32)
    return F.binary_cross_entropy_with_logits(logits.float(), targets)


def disturb(images: Tensor, rng: torch.Generator, noise: float, args: Train) -> Tensor:
    """Augment images (batch, 3, 64, 64) and add noise of this standard deviation."""
    images = diff_augment(images, rng, args.augment)
    images = images + noise * torch.randn(images.shape, generator=rng, device=images.device)
    return images.contiguous(memory_format=torch.channels_last)


def discriminate(
    discriminator: nn.Module,
    real: Tensor,
    fake: Tensor,
    rng: torch.Generator,
    noise: float,
    args: Train,
) -> tuple[Tensor, Tensor]:
    """Logits (batch,) of real and of generated images, disturbed by augmentation and noise.

    "joint" batches share the statistics of BatchNorm. In a batch of its own an image's contrast
    would be normalised away: the discriminator has no bias before its first BatchNorm.
    """
    if args.batches == "joint":
        images = disturb(torch.cat([real, fake]), rng, noise, args)
        logits_real, logits_fake = discriminator(images).chunk(2)
    else:
        logits_real = discriminator(disturb(real, rng, noise, args))
        logits_fake = discriminator(disturb(fake, rng, noise, args))
    return logits_real, logits_fake


def train(args: Train) -> dict[str, Any]:
    """Train one run; returns the content of result.json (on the main process)."""
    accelerator = make_accelerator(args.device, args.precision, args.log_with, args.output_dir)
    device = accelerator.device
    run = Run(args, accelerator)
    if run.result is not None:
        return run.result if run.is_main else {}
    cache = args.output_dir.parent / "cache"
    faces = load_folder(args.data_dir / "face" / "train", (64, 64), cache, args.fit)
    pixels = faces.pixels.to(device)

    torch.manual_seed(derive_seed(args.seed, "init"))
    bare_generator = place(Generator(width=args.width), device)
    bare_discriminator = place(Discriminator(width=args.width), device)
    ema = copy.deepcopy(bare_generator)
    betas = (args.beta1, 0.999)
    generator_adam = torch.optim.Adam(bare_generator.parameters(), args.lr, betas, fused=True)
    discriminator_adam = torch.optim.Adam(
        bare_discriminator.parameters(), args.lr, betas, fused=True
    )
    generator, discriminator, generator_adam, discriminator_adam = accelerator.prepare(
        bare_generator, bare_discriminator, generator_adam, discriminator_adam
    )
    parts = {
        "generator": bare_generator,
        "discriminator": bare_discriminator,
        "ema": ema,
        "g_adam": generator_adam,
        "d_adam": discriminator_adam,
    }

    steps_per_epoch = max(1, (args.images_per_epoch or len(pixels)) // args.batch_size)
    last = args.epochs * steps_per_epoch
    first = run.load_state(parts)
    for step in run.steps(first, last, args.batch_size):
        generator.train()
        discriminator.train()
        rng = make_rng(args.seed, "step", step, accelerator.process_index, device=device)
        rows = draw_batch(len(pixels), step, args.batch_size, accelerator, args.seed, "order")
        real = augment_faces(normalise(pixels[rows]), rng, args.flip)
        latents = torch.randn((len(rows), bare_generator.latent), generator=rng, device=device)
        fake = generator(latents)
        noise = args.instance_noise * (1 - step / last)

        # Discriminator: minimise -log D(x) - log(1 - D(G(z))), with smoothed labels.
        # The generated images are detached: this step does not change the generator.
        logits_real, logits_fake = discriminate(
            discriminator, real, fake.detach(), rng, noise, args
        )
        discriminator_loss = binary_cross_entropy(
            logits_real, args.real_label
        ) + binary_cross_entropy(logits_fake, args.fake_label)
        discriminator_adam.zero_grad()
        accelerator.backward(discriminator_loss)
        discriminator_adam.step()

        # Generator: minimise -log D(G(z)), whose gradient does not vanish where D is sure.
        # Its own gradients are not needed, so torchrun need not average them: `bare`.
        bare_discriminator.requires_grad_(False)
        with accelerator.autocast():
            _, logits = discriminate(bare_discriminator, real, fake, rng, noise, args)
            generator_loss = binary_cross_entropy(logits, 1.0)
        generator_adam.zero_grad()
        accelerator.backward(generator_loss)
        generator_adam.step()
        bare_discriminator.requires_grad_(True)
        update_ema(ema, bare_generator, args.ema_decay, step)

        losses = {
            "d_loss": discriminator_loss,
            "g_loss": generator_loss,
            "score_real": logits_real.sigmoid().mean(),
            "score_fake": logits_fake.sigmoid().mean(),
        }
        run.add_losses(step, losses)
        epoch, rest = divmod(step + 1, steps_per_epoch)
        epoch_ends = rest == 0
        if epoch_ends:
            row = {"step": step + 1, "epoch": epoch} | run.epoch_means(steps_per_epoch)
            panels = {
                "losses": ["d_loss", "g_loss"],
                "mean D of images": ["score_real", "score_fake"],
            }
            end_epoch(run, ema, pixels[:32].cpu(), row, panels)
            warn_of_perfect_discriminator(run, row, args)
        if run.save_due() or epoch_ends:
            run.save_state(step + 1, parts)
    finish(run, ema, {"method": "dcgan", "seed": args.seed})
    return run.result or {}


def warn_of_perfect_discriminator(run: Run, row: dict[str, Any], args: Train) -> None:
    """Log a warning if the mean outputs of an epoch are as good as the targets."""
    real_is_right = row["score_real"] > 0.98 * args.real_label
    fake_is_right = row["score_fake"] < args.fake_label + 0.02
    if real_is_right and fake_is_right:
        run.log("warning: the discriminator is never wrong, so the generator learns nothing")


def main(args: Train | Sample) -> Any:
    """Run one command."""
    match args:
        case Train():
            return train(args)
        case Sample():
            return sample(args)


if __name__ == "__main__":
    run_cli(Train | Sample, main, shared=Train | Sample)
