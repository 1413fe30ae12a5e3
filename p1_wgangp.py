"""Unconditional 64x64 faces by a Wasserstein GAN with gradient penalty (WGAN-GP).

A critic, kept nearly 1-Lipschitz by a penalty on its gradient, estimates the distance between real and generated
faces, which the generator reduces.
Paper: Gulrajani et al., Improved Training of Wasserstein GANs, 2017, https://arxiv.org/abs/1704.00028

    python p1_wgangp.py train --output-dir runs/p1/wgangp
    python p1_wgangp.py sample --checkpoint runs/p1/wgangp/model.safetensors --output-dir faces --grid first32.png
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

from common import run as runs
from common.augment import augment_faces, diff_augment
from common.data import draw_batch, load_folder, normalise
from common.gan import Sample, end_epoch, finish, sample
from common.run import Run, UserError, generator
from models.gan import GENERATORS, Critic, Norm


@dataclass(kw_only=True)
class Train:
    """Train on DATA_DIR/face/train. The last epoch counts: no epoch is chosen by validation images."""

    output_dir: Path  # Where everything is written; the same command again continues an interrupted run.
    data_dir: Path = Path("hw2_data")  # Folder with face/train.
    epochs: int = 200  # Passes of the critic over the images.
    batch_size: int = 64  # Images of a step, over all processes.
    width: int = 64  # Channels of the layers next to the images; deeper ones have 2, 4 and 8 times as many.
    lr: float = 1e-4  # Learning rate of both Adams.
    beta1: float = 0.0  # First moment's decay of both Adams ...
    beta2: float = 0.9  # ... and second moment's.
    n_critic: int = 5  # Steps of the critic for one of the generator, counted over the whole run.
    penalty: float = 10.0  # Weight of the gradient penalty.
    drift: float = 0.0  # Weight of the squared scores of real images, which keeps them near 0; 0 is the paper's.
    net: Literal["generator", "projection"] = "generator"  # DCGAN's generator, or the larger one.
    norm: Norm = "layer"  # Normalisation of the critic; batch statistics would mix the images' penalties.
    spectral: bool = False  # Spectral normalisation of the critic's convolutions, besides the penalty.
    augment: tuple[Literal["color", "translation", "cutout"], ...] = ("color", "translation")  # Of the critic's images.
    flip: bool = True  # Show real images mirrored half of the time.
    ema_decay: float = 0.999  # Of the averaged generator, the one that is sampled and saved.
    seed: int = 0  # Seed of initialisation, order, noise and augmentation.
    device: runs.Device = "auto"  # Where to compute.
    precision: runs.Precision = "auto"  # bf16 autocast where the hardware is fast at it, or fp32.


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, epsilon: Tensor) -> Tensor:
    """E[(|∇ D(x̂)| - 1)²] at x̂ = ε x + (1 - ε) G(z), equation 3 of the paper without its weight.

    `real`, `fake`: (batch, 3, height, width); `epsilon`: (batch, 1, 1, 1) in [0, 1]. The norm is taken over all pixels
    and channels of an image; the small number under the root keeps its derivative finite where the gradient is 0.
    """
    between = torch.lerp(fake, real, epsilon).requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    norms = (gradient.float().flatten(1).square().sum(1) + 1e-12).sqrt()  # (batch, 3, height, width) → (batch,)
    return (norms - 1).square().mean()


def train(args: Train) -> dict[str, Any]:
    """Train one run; returns the content of result.json (on the main process)."""
    accelerator = runs.make_accelerator(args.device, args.precision)
    device, rank = accelerator.device, accelerator.process_index
    if args.n_critic < 1:
        raise UserError(f"--n-critic {args.n_critic}: at least one is needed")
    run = Run(args, accelerator)
    if run.result is not None:
        return run.result if run.is_main else {}
    pixels = load_folder(args.data_dir / "face" / "train", (64, 64), args.output_dir.parent / "cache").pixels.to(device)

    torch.manual_seed(runs.derive_seed(args.seed, "init"))
    bare_g, bare_c = GENERATORS[args.net](width=args.width), Critic(args.width, args.norm, args.spectral)
    bare_g, bare_c = (net.to(device, memory_format=torch.channels_last) for net in (bare_g, bare_c))
    ema = copy.deepcopy(bare_g)
    betas = (args.beta1, args.beta2)
    adams = [torch.optim.Adam(net.parameters(), args.lr, betas, fused=True) for net in (bare_g, bare_c)]
    g, critic, g_adam, c_adam = accelerator.prepare(bare_g, bare_c, *adams)
    parts = {"generator": bare_g, "critic": bare_c, "ema": ema, "g_adam": g_adam, "c_adam": c_adam}
    done = run.load_state(parts)

    steps_per_epoch = max(1, len(pixels) // args.batch_size)
    for step in run.steps(done, args.epochs * steps_per_epoch, args.batch_size):
        g.train()
        rng = generator(args.seed, "step", step, rank, device=device)
        rows = draw_batch(len(pixels), step, args.batch_size, accelerator, args.seed, "order")
        real = augment_faces(normalise(pixels[rows]), rng, args.flip)
        latents = torch.randn((2, len(rows), bare_g.latent), generator=rng, device=device)
        with torch.no_grad():
            fake = g(latents[0])
        real, fake = (
            diff_augment(images, rng, args.augment).contiguous(memory_format=torch.channels_last)
            for images in (real, fake)
        )

        # The critic descends D(G(z)) - D(x) + penalty (equation 3).
        score_real, score_fake = critic(torch.cat([real, fake])).float().chunk(2)
        epsilon = torch.rand((len(rows), 1, 1, 1), generator=rng, device=device)
        penalty = gradient_penalty(critic, real, fake, epsilon)
        distance = score_real.mean() - score_fake.mean()  # the estimate of Wasserstein's
        c_loss = args.penalty * penalty - distance + args.drift * score_real.square().mean()
        c_adam.zero_grad()
        accelerator.backward(c_loss)
        c_adam.step()
        values = {"c_loss": c_loss, "distance": distance, "penalty": penalty}
        run.add(step, values | {"score_real": score_real.mean(), "score_fake": score_fake.mean()})

        # After every n_critic-th step of the whole run, the generator descends -D(G(z)).
        if (step + 1) % args.n_critic == 0:
            bare_c.requires_grad_(False)
            with accelerator.autocast():
                g_loss = -bare_c(diff_augment(g(latents[1]), rng, args.augment)).float().mean()
            g_adam.zero_grad()
            accelerator.backward(g_loss)
            g_adam.step()
            bare_c.requires_grad_(True)
            runs.update_ema(ema, bare_g, args.ema_decay, step // args.n_critic)

        epoch, inside = divmod(step + 1, steps_per_epoch)
        if inside == 0:
            row = {"step": step + 1, "epoch": epoch} | run.means(steps_per_epoch)
            panels = {"critic's loss": ["c_loss"], "estimated distance": ["distance"], "penalty": ["penalty"]}
            panels |= {"mean score of images": ["score_real", "score_fake"]}
            end_epoch(run, ema, pixels[:32].cpu(), row, panels)
        if run.save_due() or inside == 0:
            run.save_state(step + 1, parts)
    finish(run, ema, {"method": "wgangp", "seed": args.seed})
    return run.result or {}


def main(args: Train | Sample) -> Any:
    """Run one sub-command."""
    return {Train: train, Sample: sample}[type(args)](args)


if __name__ == "__main__":
    runs.command_line(Train | Sample, main)
