"""Train a small text-to-image model on captioned images, so that all runs without a download.

Latent diffusion with a text encoder that is trained jointly: Rombach et al., 2022,
https://arxiv.org/abs/2112.10752, section 4.3. The network predicts the clean image, which suits
patches of many pixels (Li and He, 2025, https://arxiv.org/abs/2511.13720). The command is
`python p3_textual_inversion.py train-model`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.captions import read_captioned
from common.checkpoints import load_net
from common.cli import UserError, above, at_least, below, in_range, is_seed
from common.data import draw_batch, normalise, to_uint8
from common.device import Device, Precision, make_accelerator, place
from common.figures import save_grid
from common.quarters import add_quarters, end_epoch, quarter_of
from common.rng import derive_seed, make_rng
from common.run import Run
from common.trackers import Tracker
from common.training import update_ema, warmup_cosine
from diffusion.schedule import Schedule
from inversion.models import image_errors, random_steps
from inversion.sampling import Sampling, sample
from inversion.tokens import END, START, Tokenizer
from models.text_to_image import TextToImage

SHOWN = 32  # captions in the grid of samples of each epoch


@dataclass(kw_only=True)
class TrainModel:
    """Train a small text-to-image model on DATA_DIR/captioned/train.

    The averaged network of the last epoch is the result: none is chosen afterwards.
    """

    output_dir: Path
    """Run directory. The same command again continues an interrupted run."""
    data_dir: Path = Path("hw2_data")
    """Data folder with captioned/train/{*.png, metadata.jsonl}, or such a train folder itself."""
    init: Path | None = None
    """Model of this command to start from."""
    size: int = 64
    """Side to which images are resized."""
    patch: int = 4
    """Side of the squares of pixels that the network sees as one position."""
    width: int = 64
    """Channels of the U-Net's first level; a multiple of 32."""
    text_width: int = 128
    """Width of the text encoder."""
    text_layers: int = 3
    """Layers of the text encoder."""
    length: int = 24
    """Tokens of a prompt, start and end included."""
    epochs: int = 20
    """Epochs of --images-per-epoch images."""
    images_per_epoch: int = 24_000
    """Images of an epoch, whatever the size of the data."""
    batch_size: int = 64
    """Images of a step, over all processes."""
    lr: float = 1e-3
    """Peak learning rate of AdamW: warmed up over 2 % of the steps, then a half cosine to 0."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    drop: float = 0.1
    """Probability that an image's caption is replaced with an empty one."""
    step_power: float = 0.0
    """Steps t are drawn with a density proportional to t to this power: 0 draws all equally often,
    more prefers noisy steps."""
    ema_decay: float = 0.999
    """Decay of the averaged network, which is the one that is sampled and saved."""
    seed: int = 0
    """Seed of initialisation, order and noise."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """bf16 autocast where the hardware is fast at it, or fp32."""
    log_with: tuple[Tracker, ...] = ()
    """Trackers that get the metrics too: tensorboard, wandb or mlflow."""

    def __post_init__(self) -> None:
        in_range("--patch", self.patch, 1, 64)
        in_range("--size", self.size, 16, 1_024)
        if self.size % (4 * self.patch):
            raise UserError(f"--size {self.size}: must be a multiple of {4 * self.patch}")
        for flag, value in (("--width", self.width), ("--text-width", self.text_width)):
            if value < 32 or value % 32 or value > 4_096:
                raise UserError(f"{flag} {value}: must be a multiple of 32, up to 4,096")
        in_range("--text-layers", self.text_layers, 1, 100)
        in_range("--length", self.length, 3, 1_024)
        at_least("--epochs", self.epochs, 1)
        at_least("--images-per-epoch", self.images_per_epoch, 1)
        at_least("--batch-size", self.batch_size, 2)
        above("--lr", self.lr, 0, 1)
        in_range("--weight-decay", self.weight_decay, 0, 100)
        above("--clip", self.clip, 0, 1e6)
        in_range("--drop", self.drop, 0, 1)
        in_range("--step-power", self.step_power, 0, 10)
        below("--ema-decay", self.ema_decay, 0, 1)
        is_seed("--seed", self.seed)


def train_model(args: TrainModel) -> dict[str, Any]:
    """Train one run; returns the content of result.json (on the main process)."""
    accelerator = make_accelerator(args.device, args.precision, args.log_with, args.output_dir)
    device = accelerator.device
    run = Run(args, accelerator)
    if run.result is not None:
        return run.result if run.is_main else {}
    folder = args.data_dir / "captioned" / "train"
    if not folder.is_dir():
        folder = args.data_dir
    pixels, captions = read_captioned(folder, args.size, args.output_dir.parent / "cache")
    tokens = Tokenizer(args.length)(captions)  # (n, length)
    vocabulary = sorted({START, END, *tokens.flatten().tolist()})
    run.print(f"{len(captions):,} captioned images, {len(vocabulary)} different tokens")

    torch.manual_seed(derive_seed(args.seed, "init"))
    bare_net = make_net(args, vocabulary)
    place(bare_net, device)
    ema = copy.deepcopy(bare_net)
    adam = torch.optim.AdamW(bare_net.parameters(), weight_decay=args.weight_decay, fused=True)
    net, adam = accelerator.prepare(bare_net, adam)
    parts = {"net": bare_net, "ema": ema, "adam": adam}
    schedule = Schedule(kind="cosine", prediction="x0")
    config = bare_net.config | {"schedule": schedule.to_config(), "seed": args.seed}
    pixels = pixels.to(device)
    tokens = tokens.to(device)
    empty = Tokenizer(args.length)([""]).to(device)

    steps_per_epoch = max(1, args.images_per_epoch // args.batch_size)
    last = args.epochs * steps_per_epoch
    first = run.load_state(parts)
    for step in run.steps(first, last, args.batch_size):
        net.train()
        learning_rate = args.lr * warmup_cosine(step / last, warm_up=0.02)
        adam.param_groups[0]["lr"] = learning_rate
        rng = make_rng(args.seed, "step", step, accelerator.process_index, device=device)
        rows = draw_batch(len(pixels), step, args.batch_size, accelerator, args.seed, "order")
        ids = tokens[rows]
        is_dropped = torch.rand(len(ids), generator=rng, device=device) < args.drop
        ids = torch.where(is_dropped[:, None], empty, ids)

        t = random_steps(schedule.T, len(ids), args.step_power, rng)
        losses = caption_losses(net, bare_net, schedule, normalise(pixels[rows]), ids, t, rng)
        adam.zero_grad()
        accelerator.backward(losses["loss"])
        norm = accelerator.clip_grad_norm_(bare_net.parameters(), args.clip)
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
            draw_samples(run, ema, schedule, captions, epoch)
        if run.save_due() or epoch_ends:
            run.save_state(step + 1, parts)
    if run.is_main:
        run.save_model(ema, config)
        run.finish(run.history()[-1])
    return run.result or {}


@torch.inference_mode()
def draw_samples(
    run: Run, ema: TextToImage, schedule: Schedule, captions: list[str], epoch: int
) -> None:
    """Draw the first captions, one image each, as samples/EPOCH.png."""
    if not run.is_main:
        return
    device = run.accelerator.device
    shown = captions[:SHOWN]
    tokenizer = Tokenizer(ema.length)
    states = ema.encode_text(ema.embed(tokenizer(shown).to(device)))
    empty = ema.encode_text(ema.embed(tokenizer([""]).to(device)))
    sampling = Sampling(steps=20, guidance=3.0)
    images = sample(ema, schedule, states, empty, 0, range(len(shown)), sampling)
    save_grid(to_uint8(images), run.dir / "samples" / f"{epoch:04d}.png", columns=8)


def make_net(args: TrainModel, vocabulary: list[int]) -> TextToImage:
    """The model of the options, or the one of --init."""
    if args.init is None:
        return TextToImage(
            vocabulary,
            size=args.size,
            patch=args.patch,
            width=args.width,
            text_width=args.text_width,
            text_layers=args.text_layers,
            length=args.length,
        )
    net, _ = load_net(args.init, {"text_to_image": TextToImage}, "--init")
    for name in ("size", "patch", "width", "text_width", "text_layers", "length"):
        ours, theirs = getattr(args, name), net.config["arguments"].get(name)
        if theirs != ours:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {ours}: --init {args.init} has {theirs}")
    new = set(vocabulary) - set(net.config["arguments"]["vocabulary"])
    if new:
        raise UserError(f"--init {args.init}: does not know {len(new)} tokens of the captions")
    return net


def caption_losses(
    net: nn.Module,
    bare_net: TextToImage,
    schedule: Schedule,
    images: Tensor,
    ids: Tensor,
    t: Tensor,
    rng: torch.Generator,
) -> dict[str, Tensor]:
    """The loss of the predicted images at the steps t, also by quarter of t for the record.

    `images` is (batch, 3, size, size) in [-1, 1], `ids` int64 (batch, length), `t` int64 (batch,)
    from 1 to T.
    """
    x0 = bare_net.encode(images)[0].contiguous(memory_format=torch.channels_last)
    eps = torch.randn(x0.shape, generator=rng, device=x0.device)
    x_t = schedule.q_sample(x0, t, eps)
    output = net(x_t, schedule.time(t, bare_net), ids=ids)
    errors = image_errors(schedule, output, x0, t, eps)
    losses = {"loss": errors.mean()}
    add_quarters(losses, errors, quarter_of(t, schedule.T), "t")
    return losses
