r"""Train a denoising diffusion model (DDPM): digits of one or more domains by class, or faces.

A U-Net learns to predict the noise in images that were noised to a random degree. Sampling then
goes from noise to an image (p2_ddpm_infer.py, p2_ddim.py). A class is sometimes withheld, so that
the same network also knows images without a class; this makes classifier-free guidance possible.

DDPM: Ho et al., Denoising Diffusion Probabilistic Models, 2020, https://arxiv.org/abs/2006.11239.
Guidance: Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598.
In the latents of an autoencoder: Rombach et al., 2022, https://arxiv.org/abs/2112.10752.

    python p2_ddpm_train.py --output-dir runs/p2/digits --domains mnistm svhn
    python p2_ddpm_train.py --output-dir runs/p2/faces --domains faces --net ddim --width 64
    python p2_ddpm_train.py --output-dir runs/p2/latents --domains faces --net ddim --width 64 \
        --autoencoder runs/p2/autoencoder/model.safetensors
    torchrun --nproc_per_node 2 p2_ddpm_train.py --output-dir runs/p2/digits --domains mnistm svhn
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.checkpoints import digest_of, load_net, save_net
from common.cli import (
    UserError,
    above,
    at_least,
    below,
    each_once,
    in_range,
    is_domain,
    is_seed,
    run_cli,
)
from common.data import (
    Fit,
    Images,
    draw_batch,
    labels_of,
    load_digits,
    normalise,
    to_uint8,
)
from common.device import Device, Precision, make_accelerator, place
from common.faces import (
    FaceStates,
    load_faces,
    make_face_net,
    make_pixel_net,
    refuse_other_autoencoder,
)
from common.figures import read_grids, save_gif, save_grid
from common.progress import show_progress
from common.quarters import add_quarters, end_epoch, quarter_of
from common.rng import ImageNoise, derive_seed, make_rng, seed_dropout
from common.run import Run
from common.trackers import Tracker
from common.training import update_ema, warmup_cosine
from diffusion.guidance import predict_eps
from diffusion.noise_levels import NoiseLevels
from diffusion.samplers import Clamp, clamp_x0, ddim_step, step_pairs
from diffusion.schedule import Kind, Prediction, Rule, Schedule, spaced_steps
from models.attention_unet import AttentionUnet
from models.context_unet import ContextUnet
from models.ddim_unet import DdimUnet
from models.latent_unet import LatentUnet
from models.network import Network

FACES = "faces"  # the domain that is a folder without labels
FACE_SIZE = 64
GRID_COLUMNS = 10  # images of each digit in a grid
SIGNAL_LEFT = 0.01  # ᾱ_T above which there is a warning


@dataclass(kw_only=True)
class Train:
    """Train one noise predictor on the training images of one or more domains.

    The last epoch is the result: none is chosen afterwards.
    """

    output_dir: Path
    """Run directory. The same command again continues an interrupted run."""
    data_dir: Path = Path("hw2_data")
    """Data folder, with digits/DOMAIN or face/train in it; for faces also any folder of images."""
    domains: tuple[str, ...] = ("mnistm",)
    """Digit domains for one network with classes, or "faces" for one without."""
    size: int = FACE_SIZE
    """Side to which faces are resized; digits are 28x28."""
    fit: Fit = "crop"
    """How faces of another shape fit: their middle is cut out, or all is squashed or padded."""
    flip: bool = False
    """Mirror each face with probability one half."""
    net: Literal["context", "attention", "ddim"] = "context"
    """U-Net: the reports' two for 28x28 digits, or the course's (ddim) for any size."""
    width: int = 128
    """Channels of the U-Net's first level."""
    blocks: int = 2
    """Residual blocks of each level of the ddim network."""
    patch: int = 1
    """Side of the squares of pixels that the ddim network sees as one position; 2 is faster."""
    dropout: float = 0.0
    """Dropout in the residual blocks of the ddim network."""
    autoencoder: Path | None = None
    """Work in the latents of this model.safetensors of p2_autoencoder.py (or a latent network)."""
    init: Path | None = None
    """Network to start from: of this script, or with --prediction v of p2_score.py in latents."""
    shares: tuple[int, ...] = ()
    """Ratio of the domains' images in a batch, such as 1 3; equal shares if not given."""
    balance_classes: bool = False
    """Draw the rarer digits of a domain as often as its most frequent one."""
    epochs: int = 100
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
    timesteps: int = 1_000
    """T, the number of steps of the noise schedule."""
    schedule: Kind = "linear"
    """Noise schedule."""
    rule: Rule = "scaled"
    """Linear β for another T: as given; times 1000 / T; or T of the 1,000 noise levels."""
    prediction: Prediction = "eps"
    """What the network learns to predict: the noise (eps), or the velocity (v)."""
    drop: float = 0.1
    """Probability that the class of an image is withheld."""
    min_snr: float | None = None
    """Min-SNR loss weighting with this γ; without it every noise level has the same weight."""
    ema_decay: float = 0.9995
    """Decay of the averaged network, which is the one that is sampled and saved."""
    grid_every: int = 10
    """Epochs between grids of samples from fixed noise."""
    grid_columns: int = GRID_COLUMNS
    """Images of each digit, side by side, in a grid of samples; one of faces always has 32."""
    keep_every: int | None = None
    """Epochs between copies of the averaged network, epochs/0010.safetensors; none without it."""
    seed: int = 0
    """Seed of initialisation, order and noise."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """bf16 autocast where the hardware is fast at it, or fp32."""
    log_with: tuple[Tracker, ...] = ()
    """Trackers that get the metrics too: tensorboard, wandb or mlflow."""

    def __post_init__(self) -> None:
        each_once("--domains", self.domains)
        is_domain("--domains", *self.domains)
        if self.width < 32 or self.width % 32 or self.width > 4_096:
            raise UserError(f"--width {self.width}: must be a multiple of 32, up to 4,096")
        in_range("--blocks", self.blocks, 1, 100)
        in_range("--patch", self.patch, 1, 1_024)
        below("--dropout", self.dropout, 0, 1)
        if self.net != "ddim" and (self.patch, self.blocks, self.dropout) != (1, 2, 0.0):
            raise UserError(
                f"--net {self.net}: has no --patch, --blocks and --dropout; only ddim has them"
            )
        self._check_faces()
        for share in self.shares:
            at_least("--shares", share, 1)
        if self.shares and len(self.shares) != len(self.domains):
            given = " ".join(map(str, self.shares))
            raise UserError(f"--shares {given}: needs one number for each of --domains")
        at_least("--epochs", self.epochs, 1)
        at_least("--images-per-epoch", self.images_per_epoch, 1)
        at_least("--batch-size", self.batch_size, 2)
        above("--lr", self.lr, 0, 1)
        in_range("--weight-decay", self.weight_decay, 0, 100)
        above("--clip", self.clip, 0, 1e6)
        self._check_timesteps()
        in_range("--drop", self.drop, 0, 1)
        above("--min-snr", self.min_snr, 0, 1e6)
        below("--ema-decay", self.ema_decay, 0, 1)
        at_least("--grid-every", self.grid_every, 1)
        in_range("--grid-columns", self.grid_columns, 1, 1_000)
        at_least("--keep-every", self.keep_every, 1)
        is_seed("--seed", self.seed)

    def _check_faces(self) -> None:
        in_range("--size", self.size, 8, 1_024)
        domains = " ".join(self.domains)
        if FACES not in self.domains:
            for flag, is_given in (
                ("--size", self.size != FACE_SIZE),
                ("--flip", self.flip),
                ("--autoencoder", self.autoencoder is not None),
            ):
                if is_given:
                    raise UserError(f"{flag}: is for --domains faces, not {domains}")
            return
        if len(self.domains) > 1:
            raise UserError(f"--domains {domains}: faces have no digits; train them on their own")
        if self.balance_classes:
            raise UserError("--balance-classes: faces have no classes")
        if self.grid_columns != GRID_COLUMNS:
            raise UserError(
                f"--grid-columns {self.grid_columns}: is for digits; a grid of faces has rows of 8"
            )
        if self.net != "ddim":
            raise UserError(f"--net {self.net}: is for 28x28 digits; take --net ddim for faces")

    def _check_timesteps(self) -> None:
        in_range("--timesteps", self.timesteps, 2, 1_000_000)
        if self.schedule != "linear" and self.rule != "scaled":
            raise UserError(f"--rule {self.rule}: is for --schedule linear, not {self.schedule}")
        try:
            make_schedule(self)
        except ValueError as error:
            other = "scaled" if self.rule == "respaced" else "respaced"
            raise UserError(f"--timesteps {self.timesteps}: {error}; take --rule {other}") from None


def make_schedule(args: Train) -> Schedule:
    """The noise schedule of the options."""
    return Schedule(args.timesteps, args.schedule, rule=args.rule, prediction=args.prediction)


def train(args: Train) -> dict[str, Any]:
    """Train one run; returns the content of result.json (on the main process)."""
    accelerator = make_accelerator(args.device, args.precision, args.log_with, args.output_dir)
    device = accelerator.device
    counts = images_of_a_step(args, accelerator.num_processes)
    schedule = make_schedule(args)
    run = Run(args, accelerator)
    if run.result is not None:
        return run.result if run.is_main else {}
    data = load_data(args)
    pixels = [images.pixels.to(device) for images in data]
    labels = domain_labels(data, device)
    classes = 10 * len(labels)
    shape = tuple(pixels[0].shape[1:])  # (channels, height, width)

    torch.manual_seed(derive_seed(args.seed, "init"))
    bare_net = make_net(args, shape, classes)
    origin = load_init(args, bare_net, schedule) if args.init else {}
    place(bare_net, device)
    ema = copy.deepcopy(bare_net)
    trained = [parameter for parameter in bare_net.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, weight_decay=args.weight_decay, fused=True)
    net, adam = accelerator.prepare(bare_net, adam)
    parts = {"net": bare_net, "ema": ema, "adam": adam}
    steps_per_epoch = max(1, args.images_per_epoch // args.batch_size)
    last = args.epochs * steps_per_epoch
    faces = None
    if isinstance(bare_net, DdimUnet | LatentUnet) and not classes:
        faces = FaceStates(bare_net, pixels[0], args.flip, last * args.batch_size)
        shape = bare_net.shape  # of the images, or of their latents
    config = config_of(args, bare_net, pixels[0].shape[2], schedule) | origin

    first = run.load_state(parts)
    warn_of_signal_left(run, schedule)
    for step in run.steps(first, last, args.batch_size):
        net.train()
        learning_rate = args.lr * warmup_cosine(step / last, warm_up=0.02)
        adam.param_groups[0]["lr"] = learning_rate
        rng = make_rng(args.seed, "step", step, accelerator.process_index, device=device)
        seed_dropout(args.seed, step, accelerator.process_index)

        # The batch: a fixed number of images from each domain.
        images = []
        classes_of_images = []
        for domain, count in enumerate(counts):
            key = (args.seed, "order", domain)
            rows = draw_batch(len(pixels[domain]), step, count, accelerator, *key)
            if faces is not None:
                images.append(faces.draw(rows, rng))
            else:
                images.append(normalise(pixels[domain][rows]))
                classes_of_images.append(labels[domain][rows])
        x0 = torch.cat(images).contiguous(memory_format=torch.channels_last)
        y = torch.cat(classes_of_images) if labels else None

        losses = noise_losses(net, schedule, x0, y, rng, args)
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
                draw_samples(run, ema, schedule, shape, classes, epoch, args.grid_columns)
            if args.keep_every and epoch % args.keep_every == 0 and run.is_main:
                save_net(run.dir / "epochs" / f"{epoch:04d}.safetensors", ema, config)
        if run.save_due() or epoch_ends:
            run.save_state(step + 1, parts)
    if run.is_main:
        save_gif(read_grids(run.dir / "samples"), run.dir / "figures" / "training.gif", 400)
        run.save_model(ema, config)
        run.finish(run.history()[-1])
    return run.result or {}


def noise_losses(
    net: nn.Module,
    schedule: Schedule,
    x0: Tensor,
    labels: Tensor | None,
    rng: torch.Generator,
    args: Train,
) -> dict[str, Tensor]:
    """The loss: mean squared error of the predicted noise (or v) at random t, equation 14.

    `x0` is (batch, channels, height, width) in [-1, 1], `labels` int64 (batch,) or None. With
    --min-snr the errors are weighted by t. The unweighted errors are also summed and counted by
    quarter of t, for the record.
    """
    batch, device = len(x0), x0.device
    t = torch.randint(1, schedule.T + 1, (batch,), generator=rng, device=device)
    eps = torch.randn(x0.shape, generator=rng, device=device)
    drop = None  # which images lose their class
    if labels is not None:
        drop = torch.rand(batch, generator=rng, device=device) < args.drop

    x_t = schedule.q_sample(x0, t, eps)
    bare_net = getattr(net, "module", net)
    output = net(x_t, schedule.time(t, bare_net), labels, drop).float()
    target = schedule.target(x0, t, eps)
    errors = F.mse_loss(output, target, reduction="none").flatten(1).mean(1)  # (batch,)
    weights = torch.ones_like(errors)
    if args.min_snr is not None:
        weights = schedule.min_snr_weight(t, args.min_snr)

    losses = {"loss": (weights * errors).mean()}
    add_quarters(losses, errors, quarter_of(t, schedule.T), "t")
    return losses


def clamp_of(net: nn.Module) -> Clamp:
    """How predicted x_0 are kept in range: images in [-1, 1]; latents have no range."""
    return "none" if isinstance(net, LatentUnet) else "static"


def config_of(args: Train, net: Network, size: int, schedule: Schedule) -> dict[str, Any]:
    """What a checkpoint keeps besides the weights; for faces also defaults for their sampling."""
    config = net.config | {
        "domains": args.domains,
        "size": size,
        "schedule": schedule.to_config(),
        "seed": args.seed,
    }
    if args.domains == (FACES,):
        config["sampling"] = {
            "spacing": "trailing",
            "save_range": "fixed",
            "clamp": clamp_of(net),
        }
    return config


def warn_of_signal_left(run: Run, schedule: Schedule) -> None:
    """Print a warning if the noisiest images of training still show something."""
    left = schedule.alpha_bar[schedule.T]
    if left > SIGNAL_LEFT:
        run.log(
            f"warning: ᾱ_T is {left:.3g}; sampling would start from a state that training never "
            "shows (--rule respaced gives another schedule)"
        )


def images_of_a_step(args: Train, processes: int) -> list[int]:
    """How many images of each domain a batch holds, over all processes.

    Raises UserError for a batch that cannot be shared in the ratio of --shares.
    """
    shares = args.shares or (1,) * len(args.domains)
    if args.batch_size % (sum(shares) * processes):
        raise UserError(
            f"--batch-size {args.batch_size}: must be a multiple of {sum(shares) * processes}, "
            f"the sum of --shares ({sum(shares)}) times the number of processes ({processes})"
        )
    return [args.batch_size * share // sum(shares) for share in shares]


def make_net(args: Train, shape: tuple[int, ...], classes: int) -> Network:
    """The network for images of `shape` (channels, height, width).

    It is called as `net(x, time, labels, drop)` and returns the noise (or v) in the shape of x.
    """
    channels, size, _ = shape
    if args.net == "ddim":
        options = (args.width, args.blocks, args.patch, args.dropout)
        if classes:
            return make_pixel_net(size, *options, channels, classes)
        return make_face_net(size, *options, args.autoencoder)
    if args.net == "attention":
        return AttentionUnet(channels, args.width, classes)
    return ContextUnet(channels, args.width, classes)


def load_init(args: Train, net: Network, schedule: Schedule) -> dict[str, str]:
    """Copy the weights of --init into the network; returns their hash, for the new checkpoint.

    Those of a score-based model in latents become a network that predicts v (`negate_output`).

    Raises UserError if they are another network's, another schedule's, other domains' or for the
    latents of another autoencoder, or those of a score-based model that does not predict -v.
    """
    assert args.init is not None
    kind = net.config["net"]
    found, config = load_net(args.init, {kind: type(net)}, "--init")
    theirs = {
        "arguments": found.config["arguments"],
        "domains": config.get("domains"),
        "schedule": Schedule.from_config(config.get("schedule", {})).to_config(),
    }
    ours = {
        "arguments": net.config["arguments"],
        "domains": list(args.domains),
        "schedule": schedule.to_config(),
    }
    is_score_based = "noise_levels" in config
    if is_score_based:
        theirs["domains"] = [FACES]
        theirs["schedule"] = ours["schedule"]  # it has seen all levels from sigma_min to sigma_max
    for name, value in ours.items():
        if theirs[name] != value:
            raise UserError(
                f"--init {args.init}: has the {name} {theirs[name]}, but this run has {value}"
            )
    if isinstance(net, LatentUnet):
        refuse_other_autoencoder(net, found, args.init)
    if is_score_based:
        refuse_other_outputs(args, NoiseLevels(**config["noise_levels"]))
    net.load_state_dict(found.state_dict())
    if is_score_based:
        negate_output(net)
    return {"init": digest_of(args.init)}


def refuse_other_outputs(args: Train, levels: NoiseLevels) -> None:
    """Raise UserError if a score-based model in --init does not predict -v (see negate_output)."""
    if levels.parametrization != "edm":
        raise UserError(f"--init {args.init}: is {levels.parametrization}; only edm fits a DDPM")
    if abs(levels.sigma_data - 1) > 0.05:
        raise UserError(
            f"--init {args.init}: its data has the deviation {levels.sigma_data:.3g}, but a DDPM "
            "can only start from a model of latents, whose deviation is 1"
        )
    if args.prediction != "v":
        raise UserError(
            f"--prediction {args.prediction}: the score-based model in --init predicts -v; "
            "take --prediction v"
        )


def negate_output(net: Network) -> None:
    """Make a network that predicts v of one that EDM's preconditioning was trained with.

    For data of deviation 1 the network of EDM reads c_in x = x / √(1 + σ²), which is x_t with
    ᾱ_t = 1 / (1 + σ²). Its x_0 is √ᾱ_t x_t + √(1 - ᾱ_t) F, and that of v-prediction is
    √ᾱ_t x_t - √(1 - ᾱ_t) v, so that v = -F. Only the time is another: the score-based model reads
    log σ and the DDPM reads t, which the training has to learn.
    """
    unet = net.unet if isinstance(net, LatentUnet) else net
    assert isinstance(unet, DdimUnet)
    with torch.no_grad():
        for parameter in unet.out[-1].parameters():
            parameter.neg_()


def load_data(args: Train) -> list[Images]:
    """The training images of every domain."""
    cache = args.output_dir.parent / "cache"
    if args.domains == (FACES,):
        pixels = load_faces(args.data_dir, args.size, cache, args.fit)
        return [Images(pixels, None, [])]
    data = [load_digits(args.data_dir, domain, "train", cache) for domain in args.domains]
    if args.balance_classes:
        data = [balance(images) for images in data]
    return data


def balance(images: Images) -> Images:
    """Repeat the images of the rarer classes in turn until all classes have as many."""
    labels = labels_of(images)
    rows_of_class = [torch.where(labels == label)[0] for label in labels.unique()]
    most = max(len(rows) for rows in rows_of_class)
    chosen = []
    for rows in rows_of_class:
        passes = -(-most // len(rows))  # rounded up
        chosen.append(rows.repeat(passes)[:most])
    rows = torch.cat(chosen)
    names = [images.names[row] for row in rows]
    return Images(images.pixels[rows], labels[rows], names)


def domain_labels(data: list[Images], device: torch.device) -> list[Tensor]:
    """The label of each image by domain: its digit + 10 times the number of its domain.

    Empty for images without labels.
    """
    labels = []
    for number, images in enumerate(data):
        if images.labels is not None:
            labels.append((images.labels + 10 * number).to(device))
    return labels


@torch.inference_mode()
def draw_samples(
    run: Run,
    ema: nn.Module,
    schedule: Schedule,
    shape: tuple[int, ...],
    classes: int,
    epoch: int,
    columns: int,
) -> None:
    """Draw a grid of samples from fixed noise with 25 steps of DDIM.

    A class has a row of `columns` images; without classes there are 32 images. `shape` is that of
    the noise of an image, or of its latents.
    """
    if not run.is_main:
        return
    device = run.accelerator.device
    labels = None
    count = 32
    if classes:
        labels = torch.arange(classes, device=device).repeat_interleave(columns)
        count = columns * classes
    ema.eval()
    steps = spaced_steps(schedule.T, min(25, schedule.T))
    x = ImageNoise(0, range(count), shape, device)()
    with run.accelerator.autocast():
        pairs = step_pairs(steps)
        for t, previous in show_progress(pairs, len(steps), "samples, steps"):
            eps = predict_eps(ema, schedule, x, t, labels)
            x0 = clamp_x0(schedule.x0_from_eps(x, t, eps), clamp_of(ema))
            x = ddim_step(schedule, x0, eps, t, previous)
    if isinstance(ema, LatentUnet):
        x = ema.decode(x)
    file = run.dir / "samples" / f"epoch_{epoch:04d}.png"
    save_grid(to_uint8(x), file, columns=columns if classes else 8)


def main(args: Train) -> dict[str, Any]:
    """Train."""
    return train(args)


if __name__ == "__main__":
    run_cli(Train, main, shared=Train)
