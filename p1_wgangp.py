r"""Unconditional 64x64 faces with a Wasserstein GAN with gradient penalty (WGAN-GP).

A critic estimates the Wasserstein distance between real and generated faces, and the generator
reduces it. The estimate holds for a 1-Lipschitz critic, so a penalty keeps the norm of the
critic's gradient near 1.

Paper: Gulrajani et al., Improved Training of Wasserstein GANs, 2017,
https://arxiv.org/abs/1704.00028

    python p1_wgangp.py train --output-dir runs/p1/wgangp
    python p1_wgangp.py sample --checkpoint runs/p1/wgangp/model.safetensors --output-dir faces \
        --grid first32.png
    torchrun --nproc_per_node 2 p1_wgangp.py train --output-dir runs/p1/wgangp
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from common.augment import augment_faces, diff_augment
from common.cli import above, at_least, below, each_once, in_range, is_seed, run_cli
from common.data import Fit, draw_batch, load_folder, normalise
from common.device import Device, Precision, make_accelerator, place
from common.gan import Sample, end_epoch, finish, sample
from common.rng import derive_seed, make_rng
from common.run import Run
from common.trackers import Tracker
from common.training import update_ema
from models.gan import GENERATORS, Critic, Norm


@dataclass(kw_only=True)
class Train:
    """Train on DATA_DIR/face/train. The last epoch is the result: none is chosen afterwards."""

    output_dir: Path
    """Run directory. The same command again continues an interrupted run."""
    data_dir: Path = Path("hw2_data")
    """Data folder, with face/train in it."""
    fit: Fit = "crop"
    """How images of another shape fit: their middle is cut out, or all is squashed or padded."""
    epochs: int = 200
    """Epochs of --images-per-epoch images for the critic."""
    images_per_epoch: int | None = None
    """Images in an epoch, after which a grid is drawn; all images once if not given."""
    batch_size: int = 64
    """Images of a step, over all processes."""
    width: int = 64
    """Channels of the layers next to the images; deeper layers have 2, 4 and 8 times as many."""
    lr: float = 1e-4
    """Learning rate of both Adam optimizers."""
    beta1: float = 0.0
    """First-moment decay of both Adam optimizers."""
    n_critic: int = 5
    """Steps of the critic for each step of the generator, counted over the whole run."""
    penalty: float = 10.0
    """Weight of the gradient penalty (λ in the paper)."""
    drift: float = 0.0
    """Weight of the squared scores of real images, which keeps them near 0 (the paper has none)."""
    net: Literal["generator", "projection"] = "generator"
    """Generator: DCGAN's, or a larger one that starts with a projection."""
    norm: Norm = "layer"
    """Normalisation in the critic. Batch statistics would mix the penalties of the images."""
    spectral: bool = False
    """Add spectral normalisation to the critic's convolutions."""
    augment: tuple[Literal["color", "translation", "cutout"], ...] = ("color", "translation")
    """Differentiable augmentation of the critic's images; list none to switch it off."""
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
        in_range("--n-critic", self.n_critic, 1, 1_000)
        in_range("--penalty", self.penalty, 0, 1e6)
        in_range("--drift", self.drift, 0, 1e6)
        each_once("--augment", self.augment, at_least_one=False)
        below("--ema-decay", self.ema_decay, 0, 1)
        is_seed("--seed", self.seed)


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, epsilon: Tensor
) -> Tensor:
    """E[(‖∇ D(x̂)‖ - 1)²] at x̂ = ε x + (1 - ε) G(z): equation 3 of the paper without its weight.

    `real` and `fake` are (batch, 3, height, width), `epsilon` is (batch, 1, 1, 1) in [0, 1]. The
    norm is taken over all pixels and channels of an image. The small number under the root keeps
    its derivative finite where the gradient is 0.
    """
    between = torch.lerp(fake, real, epsilon).requires_grad_(True)
    scores = critic(between)
    (gradient,) = torch.autograd.grad(scores.sum(), between, create_graph=True)
    squares = gradient.float().flatten(1).square()  # (batch, 3 · height · width)
    norms = (squares.sum(1) + 1e-12).sqrt()  # (batch,)
    return (norms - 1).square().mean()


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
    bare_generator = place(GENERATORS[args.net](width=args.width), device)
    bare_critic = place(Critic(args.width, args.norm, args.spectral), device)
    ema = copy.deepcopy(bare_generator)
    betas = (args.beta1, 0.9)
    generator_adam = torch.optim.Adam(bare_generator.parameters(), args.lr, betas, fused=True)
    critic_adam = torch.optim.Adam(bare_critic.parameters(), args.lr, betas, fused=True)
    generator, critic, generator_adam, critic_adam = accelerator.prepare(
        bare_generator, bare_critic, generator_adam, critic_adam
    )
    parts = {
        "generator": bare_generator,
        "critic": bare_critic,
        "ema": ema,
        "g_adam": generator_adam,
        "c_adam": critic_adam,
    }

    def augment(images: Tensor, rng: torch.Generator) -> Tensor:
        images = diff_augment(images, rng, args.augment)
        return images.contiguous(memory_format=torch.channels_last)

    steps_per_epoch = max(1, (args.images_per_epoch or len(pixels)) // args.batch_size)
    last = args.epochs * steps_per_epoch
    first = run.load_state(parts)
    for step in run.steps(first, last, args.batch_size):
        generator.train()
        rng = make_rng(args.seed, "step", step, accelerator.process_index, device=device)
        rows = draw_batch(len(pixels), step, args.batch_size, accelerator, args.seed, "order")
        real = augment_faces(normalise(pixels[rows]), rng, args.flip)
        latent_shape = (2, len(rows), bare_generator.latent)
        latents = torch.randn(latent_shape, generator=rng, device=device)
        critic_latents, generator_latents = latents  # (batch, latent) each
        with torch.no_grad():
            fake = generator(critic_latents)

        # Critic: minimise D(G(z)) - D(x) + penalty (equation 3).
        real = augment(real, rng)
        fake = augment(fake, rng)
        score_real, score_fake = critic(torch.cat([real, fake])).float().chunk(2)
        epsilon = torch.rand((len(rows), 1, 1, 1), generator=rng, device=device)
        penalty = gradient_penalty(critic, real, fake, epsilon)
        distance = score_real.mean() - score_fake.mean()  # the estimated Wasserstein distance
        drift = score_real.square().mean()
        critic_loss = args.penalty * penalty - distance + args.drift * drift
        critic_adam.zero_grad()
        accelerator.backward(critic_loss)
        critic_adam.step()

        # Generator: after every n_critic-th step of the run, minimise -D(G(z)).
        if (step + 1) % args.n_critic == 0:
            # Its own gradients are not needed, so torchrun need not average them: `bare`.
            bare_critic.requires_grad_(False)
            with accelerator.autocast():
                fake = diff_augment(generator(generator_latents), rng, args.augment)
                generator_loss = -bare_critic(fake).float().mean()
            generator_adam.zero_grad()
            accelerator.backward(generator_loss)
            generator_adam.step()
            bare_critic.requires_grad_(True)
            update_ema(ema, bare_generator, args.ema_decay, step // args.n_critic)

        losses = {
            "c_loss": critic_loss,
            "distance": distance,
            "penalty": penalty,
            "score_real": score_real.mean(),
            "score_fake": score_fake.mean(),
        }
        run.add_losses(step, losses)
        epoch, rest = divmod(step + 1, steps_per_epoch)
        epoch_ends = rest == 0
        if epoch_ends:
            row = {"step": step + 1, "epoch": epoch} | run.epoch_means(steps_per_epoch)
            panels = {
                "critic's loss": ["c_loss"],
                "estimated distance": ["distance"],
                "penalty": ["penalty"],
                "mean score of images": ["score_real", "score_fake"],
            }
            end_epoch(run, ema, pixels[:32].cpu(), row, panels)
        if run.save_due() or epoch_ends:
            run.save_state(step + 1, parts)
    finish(run, ema, {"method": "wgangp", "seed": args.seed})
    return run.result or {}


def main(args: Train | Sample) -> Any:
    """Run one command."""
    match args:
        case Train():
            return train(args)
        case Sample():
            return sample(args)


if __name__ == "__main__":
    run_cli(Train | Sample, main, shared=Train | Sample)
