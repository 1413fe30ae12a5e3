r"""Train the autoencoder in whose latents the diffusion models of faces can work.

Diffusion spends most of its time on the grain of an image. An autoencoder takes that over: it makes
latents with a twelfth of the numbers, and decodes them. The diffusion model then learns only
what a face is like, at a fraction of the cost.

Paper: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022,
https://arxiv.org/abs/2112.10752. Its loss has three parts, here too: the difference of the pixels,
that of the features of a trained network (Zhang et al., 2018, https://arxiv.org/abs/1801.03924),
and what a critic of small patches objects to.

    python p2_autoencoder.py train --output-dir runs/p2/autoencoder
    python p2_autoencoder.py reconstruct --checkpoint runs/p2/autoencoder/model.safetensors \
        --image-dir hw2_data/face/val --output-dir reconstructed
    python p2_score.py train --autoencoder runs/p2/autoencoder/model.safetensors \
        --output-dir runs/p2/score
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from common.cli import UserError, above, at_least, below, in_range, is_seed, run_cli
from common.data import Fit, draw_batch, load_folder, normalise, to_uint8
from common.device import Device, Precision, make_accelerator, place
from common.faces import AT_A_TIME, load_autoencoder, load_faces, mirror_some
from common.figures import save_curves, save_grid, save_image
from common.files import make_output_dir
from common.processes import my_share
from common.progress import show_progress
from common.rng import derive_seed, make_rng
from common.run import Run
from common.trackers import Tracker
from common.training import update_ema, warmup_cosine
from metrics.features import find_efficientnet, load_efficientnet
from models.autoencoder import FACTOR, Autoencoder, PatchCritic

STAGES = 4  # of the EfficientNet's, whose features are compared


@dataclass(kw_only=True)
class Train:
    """Train an autoencoder on a folder of images. The last epoch is the result."""

    output_dir: Path
    """Run directory. The same command again continues an interrupted run."""
    data_dir: Path = Path("hw2_data")
    """Data folder with face/train in it, or any folder of images."""
    size: int = 64
    """Images are resized to this height and width."""
    fit: Fit = "crop"
    """How images of another shape fit: their middle is cut out, or all is squashed or padded."""
    latent_channels: int = 4
    """Channels of the latents."""
    encoder_width: int = 32
    """Channels of the encoder's first level."""
    decoder_width: int = 48
    """Channels of the decoder's middle level."""
    latent_noise: float = 0.1
    """Deviation of the noise on the latents, which teaches the decoder to forgive small errors."""
    perceptual: Literal["efficientnet", "none"] = "efficientnet"
    """Network whose features are compared; without one only the pixels and the critic count."""
    perceptual_weight: float = 1.0
    """Weight of the difference of the features."""
    critic_weight: float = 0.1
    """Weight of the critic's opinion; 0 trains without a critic."""
    flip: bool = True
    """Mirror each image with probability one half."""
    init: Path | None = None
    """Autoencoder (or a network in its latents) whose weights the training starts from."""
    decoder_only: bool = False
    """Train the decoder of --init alone, so that its latents stay what they are."""
    epochs: int = 40
    """Passes over the images."""
    batch_size: int = 16
    """Images of a step, over all processes."""
    lr: float = 1e-3
    """Peak learning rate of AdamW: warmed up over 3 % of the steps, then a half cosine to 0."""
    critic_lr: float = 4e-4
    """Learning rate of the critic's AdamW."""
    ema_decay: float = 0.995
    """Decay of the averaged network, which is the one that is saved."""
    seed: int = 0
    """Seed of initialisation, order and noise."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """bf16 autocast where the hardware is fast at it, or fp32."""
    log_with: tuple[Tracker, ...] = ()
    """Trackers that get the metrics too: tensorboard, wandb or mlflow."""

    def __post_init__(self) -> None:
        in_range("--size", self.size, 16, 1_024)
        if self.size % (2 * FACTOR):
            raise UserError(f"--size {self.size}: must be a multiple of {2 * FACTOR}")
        in_range("--latent-channels", self.latent_channels, 1, 1_024)
        for flag, width in (
            ("--encoder-width", self.encoder_width),
            ("--decoder-width", self.decoder_width),
        ):
            if width < 16 or width % 16 or width > 1_024:
                raise UserError(f"{flag} {width}: must be a multiple of 16, up to 1,024")
        in_range("--latent-noise", self.latent_noise, 0, 10)
        in_range("--perceptual-weight", self.perceptual_weight, 0, 1e3)
        in_range("--critic-weight", self.critic_weight, 0, 1e3)
        if self.decoder_only and self.init is None:
            raise UserError("--decoder-only: needs --init, whose encoder stays as it is")
        at_least("--epochs", self.epochs, 1)
        at_least("--batch-size", self.batch_size, 2)
        above("--lr", self.lr, 0, 1)
        above("--critic-lr", self.critic_lr, 0, 1)
        below("--ema-decay", self.ema_decay, 0, 1)
        is_seed("--seed", self.seed)


@dataclass(kw_only=True)
class Reconstruct:
    """Encode and decode the images of a folder: the best that a model in these latents could do."""

    checkpoint: Path
    """model.safetensors of train, or of a network that works in the latents."""
    image_dir: Path
    """Folder of images."""
    output_dir: Path
    """Folder for the decoded images, under the same names as PNG."""
    device: Device = "auto"
    """Where to compute."""


Perceptual = Callable[[Tensor, Tensor], Tensor]


def train(args: Train) -> dict[str, Any]:
    """Train one run; returns the content of result.json (on the main process)."""
    accelerator = make_accelerator(args.device, args.precision, args.log_with, args.output_dir)
    device = accelerator.device
    run = Run(args, accelerator)
    if run.result is not None:
        return run.result if run.is_main else {}
    cache = args.output_dir.parent / "cache"
    pixels = load_faces(args.data_dir, args.size, cache, args.fit).to(device)
    perceptual = perceptual_distance(args, device)

    torch.manual_seed(derive_seed(args.seed, "init"))
    bare_net = place(make_net(args), device)
    bare_critic = place(PatchCritic(), device)
    ema = copy.deepcopy(bare_net)
    weights = [weight for weight in bare_net.parameters() if weight.requires_grad]
    adam = torch.optim.AdamW(weights, betas=(0.9, 0.99), weight_decay=1e-4)
    critic_adam = torch.optim.AdamW(
        bare_critic.parameters(), args.critic_lr, betas=(0.5, 0.99), weight_decay=0
    )
    net, critic, adam, critic_adam = accelerator.prepare(bare_net, bare_critic, adam, critic_adam)
    parts = {
        "net": bare_net,
        "critic": bare_critic,
        "ema": ema,
        "adam": adam,
        "critic_adam": critic_adam,
    }

    steps_per_epoch = max(1, len(pixels) // args.batch_size)
    last = args.epochs * steps_per_epoch
    first = run.load_state(parts)
    for step in run.steps(first, last, args.batch_size):
        net.train()
        if args.decoder_only:
            bare_net.standard.eval()  # the mean and variance of the latents stay, too
        learning_rate = args.lr * warmup_cosine(step / last, warm_up=0.03)
        adam.param_groups[0]["lr"] = learning_rate
        rng = make_rng(args.seed, "step", step, accelerator.process_index, device=device)
        rows = draw_batch(len(pixels), step, args.batch_size, accelerator, args.seed, "order")
        images = normalise(pixels[rows])
        if args.flip:
            images = mirror_some(images, rng)
        images = images.contiguous(memory_format=torch.channels_last)
        latent_shape = (len(rows), *bare_net.latent_shape)
        noise = args.latent_noise * torch.randn(latent_shape, generator=rng, device=device)

        decoded = net(images, noise).float()
        losses = {}
        if args.critic_weight > 0:
            # The critic: real patches above 1, decoded ones below -1 (hinge loss).
            score_real, score_decoded = critic(torch.cat([images, decoded.detach()])).chunk(2)
            critic_loss = F.relu(1 - score_real).mean() + F.relu(1 + score_decoded).mean()
            critic_adam.zero_grad()
            accelerator.backward(critic_loss)
            critic_adam.step()
            losses["critic_loss"] = critic_loss

        # The autoencoder: near to the image, to its features, and to what the critic likes.
        losses["pixels"] = (decoded - images).abs().mean()
        losses["features"] = perceptual(decoded, images)
        loss = losses["pixels"] + args.perceptual_weight * losses["features"]
        if args.critic_weight > 0:
            bare_critic.requires_grad_(False)
            with accelerator.autocast():
                losses["adversarial"] = -bare_critic(decoded).float().mean()
            loss = loss + args.critic_weight * losses["adversarial"]
        adam.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(weights, 1.0)
        adam.step()
        bare_critic.requires_grad_(True)
        update_ema(ema, bare_net, args.ema_decay, step)

        run.add_losses(step, losses)
        epoch, rest = divmod(step + 1, steps_per_epoch)
        epoch_ends = rest == 0
        if epoch_ends:
            row = {"step": step + 1, "epoch": epoch} | run.epoch_means(steps_per_epoch)
            end_epoch(run, ema, pixels, row)
        if run.save_due() or epoch_ends:
            run.save_state(step + 1, parts)
    if run.is_main:
        run.save_model(ema, ema.config | {"seed": args.seed})
        run.finish(run.history()[-1])
    return run.result or {}


def make_net(args: Train) -> Autoencoder:
    """The autoencoder of the options, with the weights of --init.

    Raises UserError if those are another network's.
    """
    net = Autoencoder(
        size=args.size,
        latent_channels=args.latent_channels,
        encoder_width=args.encoder_width,
        decoder_width=args.decoder_width,
    )
    if args.init is not None:
        found = load_autoencoder(args.init, "--init")
        if found.config != net.config:
            raise UserError(f"--init {args.init}: its sizes are not those of the options")
        net.load_state_dict(found.state_dict())
    if args.decoder_only:
        net.encoder.requires_grad_(False)
    return net


def perceptual_distance(args: Train, device: torch.device) -> Perceptual:
    """The difference of two batches of images in the features of --perceptual, or 0.

    The features of a position are brought to length 1, as in LPIPS. Their squared difference is
    averaged over positions and images, and over the first stages of the network.
    """
    if args.perceptual == "none":
        return lambda images, others: images.new_zeros(())
    flag = "--perceptual efficientnet"
    network = load_efficientnet(find_efficientnet(flag, "--perceptual none"), flag)
    network = place(network, device).requires_grad_(False)

    def features(images: Tensor) -> list[Tensor]:
        x = (127.5 * images + 0.5) / 128  # the network's normalisation, for images in [-1, 1]
        x = network.bn1(network.conv_stem(x))
        stages = []
        for block in network.blocks[:STAGES]:
            x = block(x)
            stages.append(F.normalize(x.float(), dim=1))
        return stages

    def distance(images: Tensor, others: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = features(others)
        total = images.new_zeros(())
        for ours, theirs in zip(features(images), wanted, strict=True):
            total = total + (ours - theirs).square().sum(1).mean()
        return total / STAGES

    return distance


@torch.inference_mode()
def end_epoch(run: Run, ema: Autoencoder, pixels: Tensor, row: dict[str, Any]) -> None:
    """Log the epoch; draw the curves, and images beside their reconstructions."""
    if not run.is_main:
        return
    run.log_metrics(row)
    run.log_row(row)
    panels = {
        "difference of pixels": ["pixels"],
        "difference of features": ["features"],
        "critic": ["critic_loss", "adversarial"],
    }
    save_curves(run.history(), panels, run.dir / "figures" / "curves.png")
    some = pixels[:16]
    ema.eval()
    with run.accelerator.autocast():
        decoded = to_uint8(ema.decode(ema.encode(normalise(some))))
    pairs = torch.stack([some, decoded], dim=1)  # (16 images, 2, 3, height, width)
    file = run.dir / "samples" / f"epoch_{row['epoch']:04d}.png"
    save_grid(pairs.flatten(0, 1).cpu(), file, columns=8)


@torch.inference_mode()
def reconstruct(args: Reconstruct) -> None:
    """Write the decoded images; processes share the batches."""
    accelerator = make_accelerator(args.device, "fp32")
    device = accelerator.device
    net = place(load_autoencoder(args.checkpoint, "--checkpoint"), device).eval()
    size = net.config["arguments"]["size"]
    images = load_folder(args.image_dir, (size, size))
    names = [Path(name).with_suffix(".png").name for name in images.names]
    make_output_dir(args.output_dir, only=names)
    accelerator.wait_for_everyone()  # all have looked before the first one writes
    mine = my_share(range(0, len(names), AT_A_TIME), accelerator)
    for start in show_progress(mine, len(mine), "images, batches"):
        batch = normalise(images.pixels[start : start + AT_A_TIME]).to(device)
        decoded = to_uint8(net.decode(net.encode(batch))).cpu()
        for name, image in zip(names[start : start + AT_A_TIME], decoded, strict=True):
            save_image(image, args.output_dir / name)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(f"{len(names):,} images: {args.output_dir}")


def main(args: Train | Reconstruct) -> Any:
    """Run one command."""
    match args:
        case Train():
            return train(args)
        case Reconstruct():
            return reconstruct(args)


if __name__ == "__main__":
    run_cli(Train | Reconstruct, main, shared=Train | Reconstruct)
