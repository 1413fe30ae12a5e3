"""Train a denoising diffusion model (DDPM): digits of one or more domains by class, or faces without any.

A U-Net learns to predict the noise in images noised to a random degree; sampling then goes from noise to an image.
Paper: Ho et al., Denoising Diffusion Probabilistic Models, 2020, https://arxiv.org/abs/2006.11239; classes are dropped
at times for classifier-free guidance, Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598

    python p2_ddpm_train.py --output-dir runs/p2/digits --domains mnistm svhn
    python p2_ddpm_train.py --output-dir runs/p2/faces --domains faces --net ddim --width 64
    torchrun --nproc_per_node 2 p2_ddpm_train.py --output-dir runs/p2/digits --domains mnistm svhn
"""

from __future__ import annotations

import copy
import hashlib
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import run as runs
from common.data import Images, draw_batch, load_digits, load_folder, normalise, to_uint8
from common.diffusion import Kind, Prediction, Schedule, predictor, sample
from common.figures import read_grids, save_curves, save_gif, save_grid
from common.run import Run, UserError, generator
from models.attention_unet import AttentionUnet
from models.context_unet import ContextUnet
from models.ddim_unet import DdimUnet

FACES = "faces"  # the domain that is a folder without labels
BUCKETS = 4  # of t, for the losses on record


@dataclass(kw_only=True)
class Train:
    """Train one noise predictor on the training images of one or more domains. The last epoch counts."""

    output_dir: Path  # Where everything is written; the same command again continues an interrupted run.
    data_dir: Path = Path("hw2_data")  # Folder with digits/DOMAIN, or face/train.
    domains: tuple[str, ...] = ("mnistm",)  # Digit domains, as many images of each; or "faces", without classes.
    net: Literal["context", "attention", "ddim"] = "context"  # The U-Net.
    width: int = 128  # Channels of its first level.
    blocks: int = 2  # Of each level of the ddim net.
    patch: int = 1  # Side of the squares of pixels that the ddim net takes as one position: 2 costs a quarter.
    init: Path | None = None  # Begin with the weights of this model.safetensors of such a net, not at random.
    shares: tuple[int, ...] = ()  # Images of the domains in a batch, as ratios (1 3); as many of each if none.
    balance_classes: bool = False  # Draw the rarer digits of a domain as often as its commonest.
    epochs: int = 100  # Epochs of --images-per-epoch images.
    images_per_epoch: int = 56_000  # Whatever the size of the data.
    batch_size: int = 128  # Images of a step, over all processes.
    lr: float = 4e-4  # Peak learning rate of AdamW: warmed up over 2 % of the steps, then half a cosine.
    weight_decay: float = 0.01  # Of AdamW.
    clip: float = 1.0  # Largest norm of the gradient.
    steps: int = 1_000  # T, the steps of the noise schedule.
    schedule: Kind = "linear"  # Of β; the linear one is scaled to T.
    prediction: Prediction = "eps"  # What the net learns to give: the noise, or v (see Schedule).
    drop: float = 0.1  # Probability that an image's class is withheld.
    min_snr: float | None = None  # γ of min-SNR weighting; None weights all t alike.
    ema_decay: float = 0.9995  # Of the averaged net, the one that is sampled and saved.
    grid_every: int = 10  # Epochs between grids from fixed noise.
    seed: int = 0  # Seed of initialisation, order and noise.
    device: runs.Device = "auto"  # Where to compute.
    precision: runs.Precision = "auto"  # bf16 autocast where the hardware is fast at it, or fp32.


def make_net(args: Train, channels: int, size: int, classes: int) -> nn.Module:
    """The noise predictor: `net(x, time, labels, drop)` → noise (or v) of the shape of x."""
    if args.net == "ddim":  # half as large at each level while it is even, attention at the last
        if args.patch < 1 or size % args.patch or args.blocks < 1:
            raise UserError(f"--patch {args.patch}: must divide {size}, the images' size; --blocks: at least 1")
        size_of = [size // args.patch]
        while len(size_of) < 4 and size_of[-1] % 2 == 0:
            size_of.append(size_of[-1] // 2)
        levels, options = (1, 2, 2, 4)[: len(size_of)], {"n_classes": classes, "patch": args.patch}
        return DdimUnet(channels, size, args.width, levels, size_of[-1:], args.blocks, **options)
    if not classes or size != 28:
        raise UserError(f"--net {args.net}: is for 28x28 digits; take ddim for {' and '.join(args.domains)}")
    if (args.patch, args.blocks) != (1, 2):
        raise UserError(f"--net {args.net}: has no --patch and no --blocks; ddim has")
    return {"context": ContextUnet, "attention": AttentionUnet}[args.net](channels, args.width, classes)


def load_init(args: Train, net: nn.Module, schedule: Schedule) -> dict[str, str]:
    """Copy the weights of --init into the net; returns what the new weights tell of them.

    Raises UserError if they are another net's, another schedule's or other domains'.
    """
    found, config = runs.load_net(args.init, {net.config["net"]: type(net)}, "--init")
    theirs = {"arguments": found.config["arguments"], "domains": config.get("domains")}
    theirs["schedule"] = Schedule(**config.get("schedule", {})).config
    ours = {"arguments": net.config["arguments"], "domains": list(args.domains), "schedule": schedule.config}
    for name, value in ours.items():
        if theirs[name] != value:
            raise UserError(f"--init {args.init}: has {name} {theirs[name]}, this run has {value}")
    net.load_state_dict(found.state_dict())
    return {"init": hashlib.sha256(args.init.read_bytes()).hexdigest()}


def loss_of(
    net: nn.Module, schedule: Schedule, x0: Tensor, labels: Tensor | None, args: Train, rng: torch.Generator
) -> dict[str, Tensor]:
    """Mean squared error of the predicted noise (equation 14), or v, at random t, with --min-snr weighted by t.

    Beside it the sums and counts of the unweighted errors by quarter of t; their ratio is logged.
    `x0` is (batch, channels, height, width) in [-1, 1], `labels` int64 (batch,) or None.
    """
    t = torch.randint(1, schedule.T + 1, (len(x0),), generator=rng, device=x0.device)
    eps = torch.randn(x0.shape, generator=rng, device=x0.device)
    drop = None if labels is None else torch.rand(len(x0), generator=rng, device=x0.device) < args.drop
    predicted = net(schedule.q_sample(x0, t, eps), schedule.time(t, getattr(net, "module", net)), labels, drop).float()
    errors = F.mse_loss(predicted, schedule.target(x0, t, eps), reduction="none").flatten(1).mean(1)  # (batch,)
    weights = torch.ones_like(errors) if args.min_snr is None else schedule.min_snr_weight(t, args.min_snr)
    losses = {"loss": (weights * errors).mean()}
    bucket = (t - 1) * BUCKETS // schedule.T
    for number in range(BUCKETS):
        inside = bucket == number
        losses[f"loss_t{number}"] = errors.where(inside, 0).sum()
        losses[f"count_t{number}"] = inside.float().sum()
    return losses


def images_of_a_step(args: Train, processes: int) -> list[int]:
    """How many images of each domain a batch holds, over all processes. UserError for settings that cannot be meant."""
    if not args.domains or len(set(args.domains)) < len(args.domains):
        raise UserError(f"--domains {' '.join(args.domains)}: at least one, and each once")
    shares = args.shares or (1,) * len(args.domains)
    if len(shares) != len(args.domains) or min(shares) < 1:
        raise UserError(f"--shares {' '.join(map(str, shares))}: one for each of --domains, at least 1")
    if args.batch_size % (sum(shares) * processes):
        raise UserError(
            f"--batch-size {args.batch_size}: is no multiple of {sum(shares)} shares and {processes} processes"
        )
    if args.balance_classes and FACES in args.domains:
        raise UserError("--balance-classes: faces have no classes")
    if args.width < 32 or args.width % 32:
        raise UserError(f"--width {args.width}: must be a multiple of 32")
    if not 0 <= args.drop <= 1:
        raise UserError(f"--drop {args.drop}: must be a probability, 0 to 1")
    if args.min_snr is not None and not args.min_snr > 0:
        raise UserError(f"--min-snr {args.min_snr}: must be above 0")
    return [args.batch_size * share // sum(shares) for share in shares]


def train(args: Train) -> dict[str, Any]:
    """Train one run; returns the content of result.json (on the main process)."""
    accelerator = runs.make_accelerator(args.device, args.precision)
    device, rank = accelerator.device, accelerator.process_index
    counts = images_of_a_step(args, accelerator.num_processes)
    schedule = Schedule(args.steps, args.schedule, prediction=args.prediction)
    run = Run(args, accelerator)
    if run.result is not None:
        return run.result if run.is_main else {}
    data = [balance(images) if args.balance_classes else images for images in load_data(args)]
    classes = 0 if data[0].labels is None else 10 * len(data)
    pixels = [images.pixels.to(device) for images in data]
    labels = [(images.labels + 10 * n).to(device) for n, images in enumerate(data)] if classes else None

    torch.manual_seed(runs.derive_seed(args.seed, "init"))
    bare_net = make_net(args, *pixels[0].shape[1:3], classes)
    origin = load_init(args, bare_net, schedule) if args.init else {}
    bare_net = bare_net.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(bare_net)
    net, adam = accelerator.prepare(
        bare_net, torch.optim.AdamW(bare_net.parameters(), weight_decay=args.weight_decay, fused=True)
    )
    parts = {"net": bare_net, "ema": ema, "adam": adam}

    steps_per_epoch = max(1, args.images_per_epoch // args.batch_size)
    last = args.epochs * steps_per_epoch
    for step in run.steps(run.load_state(parts), last, args.batch_size):
        net.train()
        learning_rate = adam.param_groups[0]["lr"] = args.lr * runs.warmup_cosine(step / last, warm_up=0.02)
        rng = generator(args.seed, "step", step, rank, device=device)
        drawn = enumerate(zip(pixels, counts, strict=True))
        rows = [draw_batch(len(p), step, count, accelerator, args.seed, "order", n) for n, (p, count) in drawn]
        x0 = normalise(torch.cat([p[r] for p, r in zip(pixels, rows, strict=True)]))
        y = torch.cat([y[r] for y, r in zip(labels, rows, strict=True)]) if labels else None  # digit + 10 · domain

        losses = loss_of(net, schedule, x0.contiguous(memory_format=torch.channels_last), y, args, rng)
        adam.zero_grad()
        accelerator.backward(losses["loss"])
        losses["gradient_norm"] = accelerator.clip_grad_norm_(bare_net.parameters(), args.clip)
        adam.step()
        runs.update_ema(ema, bare_net, args.ema_decay, step)

        run.add(step, losses)
        epoch, inside = divmod(step + 1, steps_per_epoch)
        if inside == 0:
            row = {"step": step + 1, "epoch": epoch, "learning_rate": learning_rate} | run.means(steps_per_epoch)
            end_epoch(run, args, ema, schedule, pixels[0].shape[1:], classes, row)
        if run.save_due() or inside == 0:
            run.save_state(step + 1, parts)
    if run.is_main:
        save_gif(read_grids(run.dir / "samples"), run.dir / "figures" / "training.gif", 400)
        extra = {"domains": args.domains, "size": pixels[0].shape[2], "schedule": schedule.config, "seed": args.seed}
        run.save_model(ema, ema.config | extra | origin)
        run.finish(run.history()[-1])
    return run.result or {}


def load_data(args: Train) -> list[Images]:
    """The training images of every domain. UserError for a mixture of digits and faces."""
    cache = args.output_dir.parent / "cache"
    if args.domains == (FACES,):
        return [load_folder(args.data_dir / "face" / "train", None, cache)]
    if FACES in args.domains:
        raise UserError(f"--domains {' '.join(args.domains)}: faces have no digits; train a model of their own")
    return [load_digits(args.data_dir, domain, "train", cache) for domain in args.domains]


def balance(images: Images) -> Images:
    """Repeat the images of the rarer classes in turn until every class has as many."""
    rows = [torch.where(images.labels == label)[0] for label in images.labels.unique()]
    most = max(map(len, rows))
    chosen = torch.cat([r.repeat(-(-most // len(r)))[:most] for r in rows])
    return Images(images.pixels[chosen], images.labels[chosen], [images.names[row] for row in chosen])


@torch.inference_mode()
def end_epoch(
    run: Run, args: Train, net: nn.Module, schedule: Schedule, shape: tuple[int, ...], classes: int, row: dict[str, Any]
) -> None:
    """Log, draw the curves and, every --grid-every epochs and at the last, a grid of 25 DDIM steps from fixed noise."""
    if not run.is_main:
        return
    for number in range(BUCKETS):  # sums and counts → a mean
        row[f"loss_t{number}"] /= max(row.pop(f"count_t{number}"), 1e-9)
    run.metrics(row)
    run.log(", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in row.items() if k != "step"))
    panels = {"loss": ["loss"], "loss by quarter of t": [f"loss_t{number}" for number in range(BUCKETS)]}
    panels |= {"gradient's norm": ["gradient_norm"], "learning rate": ["learning_rate"]}
    save_curves(run.history(), panels, run.dir / "figures" / "curves.png")
    if row["epoch"] % args.grid_every == 0 or row["epoch"] == args.epochs:
        device = run.accelerator.device
        labels = torch.arange(classes, device=device).repeat_interleave(10) if classes else None
        noise = runs.ImageNoise(0, range(10 * classes or 32), shape, device)
        steps = schedule.subset(min(25, schedule.T))
        with run.accelerator.autocast():
            predict = predictor(net.eval(), schedule, labels)
            final = deque(sample(schedule, predict, noise(), steps, "ddim"), maxlen=1)[0]
        file = run.dir / "samples" / f"epoch_{row['epoch']:04d}.png"
        save_grid(to_uint8(final.x), file, columns=10 if classes else 8)


def main(args: Train) -> dict[str, Any]:
    """Train."""
    return train(args)


if __name__ == "__main__":
    runs.command_line(Train, main)
