r"""Teach a diffusion model of faces to read attributes, each there, not there or unknown.

The embedding of the attributes is added to that of the time, and starts with zeros: the network
begins as it was.

    python p2_guided.py train --init checkpoints/ddpm_faces.safetensors --output-dir runs/p2/guided
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.attributes import TEN_ATTRIBUTES, shares_of
from common.cli import UserError, above, at_least, below, each_once, in_range, is_seed
from common.data import draw_batch, to_uint8
from common.device import Device, Precision, make_accelerator, place
from common.faces import FaceModel, FaceNet, FaceStates, load_face_model, load_labelled
from common.figures import save_grid
from common.progress import show_progress
from common.quarters import add_quarters, end_epoch, quarter_of
from common.rng import ImageNoise, derive_seed, make_rng, seed_dropout
from common.run import Run
from common.trackers import Tracker
from common.training import update_ema, warmup_cosine
from diffusion.guidance import attribute_eps
from diffusion.samplers import clamp_x0, ddim_step, step_pairs
from diffusion.schedule import Schedule, spaced_steps
from models.latent_unet import LatentUnet


@dataclass(kw_only=True)
class Train:
    """Teach a diffusion model of faces to read attributes. The last epoch is the result."""

    output_dir: Path
    """Run directory. The same command again continues an interrupted run."""
    init: Path
    """Network for faces of p2_ddpm_train.py that the training starts from, with its schedule."""
    data_dir: Path = Path("hw2_data")
    """Data folder with face/train and face/list_attr_celeba.txt."""
    attributes: tuple[str, ...] = TEN_ATTRIBUTES
    """Attributes to learn, by the names in the file."""
    drop_each: float = 0.3
    """Probability that an attribute of an image is unknown, each on its own."""
    drop_all: float = 0.1
    """Probability that all attributes of an image are unknown."""
    largest_weight: float = 5.0
    """How much more often images with rare attributes are drawn, at most; 1 draws all alike."""
    flip: bool = True
    """Mirror each face with probability one half."""
    epochs: int = 20
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
    """Epochs between grids of samples from fixed noise, a row for each attribute."""
    grid_columns: int = 8
    """Noises of such a grid, one in each column."""
    seed: int = 0
    """Seed of the new weights, order and noise."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """bf16 autocast where the hardware is fast at it, or fp32."""
    log_with: tuple[Tracker, ...] = ()
    """Trackers that get the metrics too: tensorboard, wandb or mlflow."""

    def __post_init__(self) -> None:
        each_once("--attributes", self.attributes)
        in_range("--drop-each", self.drop_each, 0, 1)
        in_range("--drop-all", self.drop_all, 0, 1)
        in_range("--largest-weight", self.largest_weight, 1, 1_000)
        at_least("--epochs", self.epochs, 1)
        at_least("--images-per-epoch", self.images_per_epoch, 1)
        at_least("--batch-size", self.batch_size, 2)
        above("--lr", self.lr, 0, 1)
        in_range("--weight-decay", self.weight_decay, 0, 100)
        above("--clip", self.clip, 0, 1e6)
        below("--ema-decay", self.ema_decay, 0, 1)
        at_least("--grid-every", self.grid_every, 1)
        in_range("--grid-columns", self.grid_columns, 1, 1_000)
        is_seed("--seed", self.seed)


def train(args: Train) -> dict[str, Any]:
    """Train one run; returns the content of result.json (on the main process)."""
    accelerator = make_accelerator(args.device, args.precision, args.log_with, args.output_dir)
    device = accelerator.device
    run = Run(args, accelerator)
    if run.result is not None:
        return run.result if run.is_main else {}
    start = load_face_model(args.init, "--init")
    refuse_other_attributes(args, start)
    schedule = start.schedule
    images, labels = load_labelled(args.data_dir, start.size, args.attributes, args.output_dir)
    weights = weights_of_values(labels, args.largest_weight)
    drawn = repeat_rare(labels, weights).to(device)  # rows, those of rare faces more than once

    torch.manual_seed(derive_seed(args.seed, "init"))
    bare_net = place(with_attributes(start.net, len(args.attributes)), device)
    ema = copy.deepcopy(bare_net)
    trained = [parameter for parameter in bare_net.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, weight_decay=args.weight_decay, fused=True)
    net, adam = accelerator.prepare(bare_net, adam)
    parts = {"net": bare_net, "ema": ema, "adam": adam}
    labels = labels.to(device)

    steps_per_epoch = max(1, args.images_per_epoch // args.batch_size)
    last = args.epochs * steps_per_epoch
    draws = last * args.batch_size
    states = FaceStates(bare_net, images.pixels.to(device), args.flip, draws)
    first = run.load_state(parts)
    of_each = {
        "shares": shares_of(args.attributes, labels),
        "weights": dict(zip(args.attributes, weights.tolist(), strict=True)),
    }
    log_shares(run, **of_each)
    for step in run.steps(first, last, args.batch_size):
        net.train()
        learning_rate = args.lr * warmup_cosine(step / last, warm_up=0.02)
        adam.param_groups[0]["lr"] = learning_rate
        rng = make_rng(args.seed, "step", step, accelerator.process_index, device=device)
        seed_dropout(args.seed, step, accelerator.process_index)
        turns = draw_batch(len(drawn), step, args.batch_size, accelerator, args.seed, "order")
        rows = drawn[turns]
        x0 = states.draw(rows, rng).contiguous(memory_format=torch.channels_last)
        attributes = drop_some(labels[rows], args.drop_each, args.drop_all, rng)

        losses = noise_losses(net, schedule, x0, attributes, rng)
        adam.zero_grad()
        accelerator.backward(losses["loss"])
        norm = accelerator.clip_grad_norm_(trained, args.clip)
        losses["gradient_norm"] = torch.as_tensor(norm)
        adam.step()
        update_ema(ema, bare_net, args.ema_decay, step)

        run.add_losses(step, losses)
        epoch, rest = divmod(step + 1, steps_per_epoch)
        epoch_ends = rest == 0
        if epoch_ends:
            row = {"step": step + 1, "epoch": epoch, "learning_rate": learning_rate}
            row |= run.epoch_means(steps_per_epoch)
            end_epoch(run, row, "t", "loss by quarter of t")
            if epoch % args.grid_every == 0 or epoch == args.epochs:
                draw_samples(run, ema, start, args, epoch)
        if run.save_due() or epoch_ends:
            run.save_state(step + 1, parts)
    if run.is_main:
        run.save_model(ema, config_of(args, ema, start) | of_each)
        run.finish(run.history()[-1])
    return run.result or {}


def noise_losses(
    net: torch.nn.Module,
    schedule: Schedule,
    x0: Tensor,
    attributes: Tensor,
    rng: torch.Generator,
) -> dict[str, Tensor]:
    """The loss: mean squared error of the predicted noise (or v) at random t, as for DDPM.

    `x0` is (batch, channels, height, width), `attributes` (batch, attributes) with 0 for unknown.
    The errors are also summed and counted by quarter of t, for the record.
    """
    t = torch.randint(1, schedule.T + 1, (len(x0),), generator=rng, device=x0.device)
    eps = torch.randn(x0.shape, generator=rng, device=x0.device)
    x_t = schedule.q_sample(x0, t, eps)
    bare_net = getattr(net, "module", net)
    output = net(x_t, schedule.time(t, bare_net), attributes=attributes).float()
    errors = (output - schedule.target(x0, t, eps)).square().flatten(1).mean(1)  # (batch,)

    losses = {"loss": errors.mean()}
    add_quarters(losses, errors, quarter_of(t, schedule.T), "t")
    return losses


def drop_some(labels: Tensor, drop_each: float, drop_all: float, rng: torch.Generator) -> Tensor:
    """Make some attributes unknown: float32 (batch, attributes) with 1, -1 and 0 for unknown."""
    known = torch.rand(labels.shape, generator=rng, device=labels.device) >= drop_each
    any_known = torch.rand(len(labels), 1, generator=rng, device=labels.device) >= drop_all
    return labels.float() * known * any_known


def weights_of_values(labels: Tensor, largest: float) -> Tensor:
    """How much more often the rarer value of each attribute is drawn: (attributes,), at least 1.

    It is the square root of how rare that value is, at most `largest`: a value that one image in
    fifty has is drawn five times as often.
    """
    share = (labels == 1).float().mean(0)
    rarer = torch.minimum(share, 1 - share)
    return (0.5 / rarer.clamp(min=1e-9)).sqrt().clamp(max=largest)


def repeat_rare(labels: Tensor, weights: Tensor) -> Tensor:
    """Rows of images, int64, with those of rare faces repeated; 4 times for a weight of 1.

    An image has the largest weight among its rare values.
    """
    rarer_value = torch.where((labels == 1).float().mean(0) <= 0.5, 1, -1)
    of_images = torch.where(labels == rarer_value, weights, 1.0).amax(1)
    repeats = (4 * of_images).round().long()
    return torch.repeat_interleave(torch.arange(len(labels)), repeats)


def log_shares(run: Run, shares: dict[str, float], weights: dict[str, float]) -> None:
    """Print how frequent each attribute is, and how much more often its rarer value is drawn."""
    words = [f"{name} {share:.1f} % (weight {weights[name]:.2f})" for name, share in shares.items()]
    run.log("attributes of the training images: " + ", ".join(words))


def refuse_other_attributes(args: Train, start: FaceModel) -> None:
    """Raise UserError if --init has learned other attributes than this run shall."""
    if start.names and start.names != list(args.attributes):
        raise UserError(f"--init {args.init}: has learned {' '.join(start.names)}; ask for those")


def with_attributes(net: FaceNet, count: int) -> FaceNet:
    """The same network with an embedding of `count` attributes, which adds nothing as yet."""
    arguments = copy.deepcopy(net.config["arguments"])
    of_unet = arguments["unet"] if isinstance(net, LatentUnet) else arguments
    of_unet["n_attributes"] = count
    wider = type(net)(**arguments)
    missing, unexpected = wider.load_state_dict(net.state_dict(), strict=False)
    assert not unexpected
    assert all("attributes." in name for name in missing)
    return wider


def config_of(args: Train, net: FaceNet, start: FaceModel) -> dict[str, Any]:
    """What the checkpoint keeps besides the weights and the shares of the attributes."""
    return net.config | {
        "domains": ["faces"],
        "size": start.size,
        "schedule": start.schedule.to_config(),
        "sampling": start.sampling,
        "attributes": list(args.attributes),
        "init": start.digest,
        "seed": args.seed,
    }


@torch.inference_mode()
def draw_samples(run: Run, ema: FaceNet, start: FaceModel, args: Train, epoch: int) -> None:
    """Draw a grid of samples with 25 steps of DDIM: a row for each attribute, the same noises."""
    if not run.is_main:
        return
    device = run.accelerator.device
    schedule = start.schedule
    ema.eval()
    rows, columns = len(args.attributes), args.grid_columns
    asked = torch.eye(rows, device=device).repeat_interleave(columns, dim=0)
    x = ImageNoise(0, range(columns), ema.shape, device)().repeat(rows, 1, 1, 1)
    steps = spaced_steps(schedule.T, min(25, schedule.T), start.sampling["spacing"])
    with run.accelerator.autocast():
        pairs = step_pairs(steps)
        for t, previous in show_progress(pairs, len(steps), "samples, steps"):
            eps = attribute_eps(ema, schedule, x, t, asked)
            x0 = clamp_x0(schedule.x0_from_eps(x, t, eps), start.sampling["clamp"])
            x = ddim_step(schedule, x0, eps, t, previous)
        pixels = to_uint8(ema.decode(x))
    save_grid(pixels, run.dir / "samples" / f"epoch_{epoch:04d}.png", columns)
