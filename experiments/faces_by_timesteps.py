r"""Why faces fail with T = 10 and 100 steps of noise, and what mends it: one table of trainings.

As given, the linear schedule ends at ᾱ_T = 0.904 for T = 10 and 0.364 for T = 100: sampling starts
from noise that training never shows. Respaced, it ends in noise for every T. Each of both rules is
trained for every --timesteps, with one network, seed and number of images; at T = 1000 the rules
are the same. Rows: ancestral sampling with the variances β and β̃, and DDIM without noise, in all T
steps; the network of T = 1000 also in --steps; the GANs; and real training images, which no
generator can honestly beat.

Columns: KID × 1,000 (EfficientNet features; – without the package), the Fréchet distance of random
features and with --weights FID, the share of images with exactly one face, and the seconds an image
takes, start included. All sets are compared with the validation images, resized as for training.
Distances compare only with those of as many images; on a CPU, rows of more than 100 steps have
fewer.

Beside the table there are samples.png with the first faces of every row, and curve.png and
curve.csv with the distance by epoch: the averaged network, DDIM, the same noises each time. The
same command again continues; trainings and rows that are there are kept.

    python experiments/faces_by_timesteps.py --output-dir runs/p2/timesteps --width 64
    python experiments/faces_by_timesteps.py --output-dir runs/p2/timesteps-latents --width 128 \
        --autoencoder runs/p2/autoencoder/model.safetensors
    python experiments/faces_by_timesteps.py --output-dir runs/p2/timesteps-from --blocks 1 \
        --autoencoder checkpoints/score_faces.safetensors --prediction v \
        --init checkpoints/score_faces.safetensors
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import p2_ddpm_infer
import p2_ddpm_train
from common import gan
from common.cli import at_least, each_once, in_range, is_seed, run_cli
from common.device import Device, Precision
from common.figures import save_csv, save_curves
from common.files import ROOT
from diffusion.schedule import USUAL_T, Prediction, Rule
from experiments.face_rows import (
    Lines,
    Reference,
    check_shared,
    count_of,
    read_or_compute,
    timed,
    write_reference,
)
from p2_ddpm_infer import Sampler

GANS = tuple(ROOT / "checkpoints" / f"{name}_faces.safetensors" for name in ("dcgan", "wgangp"))
CURVE_STEPS = 50  # of DDIM, or T
COLUMNS = ["T", "rule", "sampler", "steps", "images"]
# What all rows must share; a training run itself refuses other options of training.
SHARED = ("count", "count_above", "seed", "size", "data_dir", "device", "precision")


@dataclass(kw_only=True)
class Table:
    """Train and evaluate what is missing; write the table after each row."""

    output_dir: Path
    """Folder for everything. The same command again continues."""
    data_dir: Path = Path("hw2_data")
    """Data folder with face/train and face/val."""
    autoencoder: Path | None = None
    """model.safetensors of p2_autoencoder.py, in whose latents the networks work."""
    init: Path | None = None
    """Score-based model in the same latents that every training starts from."""
    timesteps: tuple[int, ...] = (10, 100, 1_000)
    """Numbers T of steps of noise, each trained with both rules."""
    steps: tuple[int, ...] = (10, 100)
    """Numbers of steps in which the network of T = 1000 is sampled too."""
    gans: tuple[Path, ...] = GANS
    """Checkpoints of GANs, a row each."""
    images: int = 256_000
    """Images that each training sees."""
    epochs: int = 20
    """Epochs of a training."""
    keep_every: int = 2
    """Epochs between the points of the curve."""
    count: int = 1_000
    """Generated images of each row, and of each point of the curve."""
    count_above: int = 128
    """Images of a row with more than 100 calls of the network, on a CPU."""
    size: int = p2_ddpm_train.FACE_SIZE
    """Side of the images."""
    width: int = 64
    """Channels of the U-Net's first level."""
    blocks: int = 2
    """Residual blocks of each level."""
    patch: int = 1
    """Side of the squares that the network sees as one position."""
    prediction: Prediction = "eps"
    """What the networks learn to predict: the noise (eps), or the velocity (v)."""
    batch_size: int = 128
    """Images of a training step."""
    lr: float = 4e-4
    """Peak learning rate."""
    sampling_batch: int = 100
    """Images sampled at a time."""
    weights: Path | None = None
    """Weights of the Inception network (pt_inception-2015-12-05-6726825d.pth), for a column FID."""
    seed: int = 0
    """Seed of the trainings and of the noise."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """bf16 autocast where the hardware is fast at it, or fp32."""

    def __post_init__(self) -> None:
        each_once("--timesteps", self.timesteps)
        for timesteps in self.timesteps:
            in_range("--timesteps", timesteps, 2, USUAL_T)
        each_once("--steps", self.steps, at_least_one=False)
        for steps in self.steps:
            in_range("--steps", steps, 1, USUAL_T)
        each_once("--gans", self.gans, at_least_one=False)
        at_least("--images", self.images, 1)
        at_least("--epochs", self.epochs, 1)
        at_least("--keep-every", self.keep_every, 1)
        at_least("--count", self.count, 2)
        at_least("--count-above", self.count_above, 2)
        at_least("--sampling-batch", self.sampling_batch, 1)
        is_seed("--seed", self.seed)
        training(self, Net("respaced", 2))  # checks the options that it shares


class Net(NamedTuple):
    """A network to train: the rule of its schedule, and T."""

    rule: Rule
    timesteps: int

    @property
    def rules(self) -> str:
        """The rule in words."""
        if self.timesteps == USUAL_T:
            return "as given = respaced"
        return self.rule.replace("-", " ")

    @property
    def name(self) -> str:
        """The name of its folder and of its curve."""
        return f"{self.rule}-{self.timesteps}".replace("-", "_")


class Row(NamedTuple):
    """A way to sample a network."""

    net: Net
    sampler: Sampler
    steps: int
    large_sigma: bool = False

    @property
    def method(self) -> str:
        """The sampler in words."""
        if self.sampler == "ddim":
            return "DDIM, η = 0"
        return "ancestral, β" if self.large_sigma else "ancestral, β̃"

    @property
    def name(self) -> str:
        """The name of its folder."""
        sampler = "beta" if self.large_sigma else self.sampler
        return f"{self.net.name}-{sampler}-{self.steps}"


def nets_of(args: Table) -> list[Net]:
    """The networks to train. With T = 1000 both rules are the same."""
    nets = []
    for timesteps in args.timesteps:
        if timesteps != USUAL_T:
            nets.append(Net("as-given", timesteps))
        nets.append(Net("respaced", timesteps))
    return nets


def rows_of(args: Table, net: Net) -> list[Row]:
    """The ways in which a network is sampled."""
    counts = [net.timesteps]
    if net.timesteps == USUAL_T:
        counts += [steps for steps in args.steps if steps != USUAL_T]
    rows = []
    for steps in counts:
        rows.append(Row(net, "ddpm", steps, large_sigma=True))
        rows.append(Row(net, "ddpm", steps))
        rows.append(Row(net, "ddim", steps))
    return rows


# Trainings


def training(args: Table, net: Net) -> p2_ddpm_train.Train:
    """The options of p2_ddpm_train.py for a network."""
    return p2_ddpm_train.Train(
        output_dir=args.output_dir / "trainings" / net.name,
        data_dir=args.data_dir,
        domains=(p2_ddpm_train.FACES,),
        size=args.size,
        flip=True,
        net="ddim",
        width=args.width,
        blocks=args.blocks,
        patch=args.patch,
        autoencoder=args.autoencoder,
        init=args.init,
        epochs=args.epochs,
        images_per_epoch=max(1, args.images // args.epochs),
        batch_size=args.batch_size,
        lr=args.lr,
        timesteps=net.timesteps,
        rule=net.rule,
        prediction=args.prediction,
        keep_every=args.keep_every,
        grid_every=args.keep_every,
        seed=args.seed,
        device=args.device,
        precision=args.precision,
    )


# Images and their scores


def sample(args: Table, row: Row, checkpoint: Path, folder: Path) -> None:
    """Write the faces of a row; image k starts from the same noise in every row."""
    p2_ddpm_infer.main(
        p2_ddpm_infer.Generate(
            checkpoint=checkpoint,
            output_dir=folder,
            num_images=count_of(args, row.steps),
            sampler=row.sampler,
            steps=row.steps,
            large_sigma=row.large_sigma,
            seed=args.seed,
            batch_size=args.sampling_batch,
            device=args.device,
            precision=args.precision,
        )
    )


def sample_gan(args: Table, checkpoint: Path, folder: Path) -> None:
    """Write the faces of a GAN."""
    gan.sample(
        gan.Sample(
            checkpoint=checkpoint,
            output_dir=folder,
            num_images=args.count,
            seed=args.seed,
            device=args.device,
        )
    )


# The curve


def draw_curve(args: Table, reference: Reference) -> None:
    """Measure the copies of every training; write curve.csv and curve.png, with the floor."""
    real = args.output_dir / f"real-{args.count}" / "curve"
    floor = curve_distance(args, reference.train[args.count], real, reference)
    points: dict[int, dict[str, Any]] = {}
    names = [net.name for net in nets_of(args)]
    for net in nets_of(args):
        copies = training(args, net).output_dir / "epochs"
        for file in sorted(copies.glob("*.safetensors")):
            row = Row(net, "ddim", min(CURVE_STEPS, net.timesteps))
            folder = args.output_dir / "curve" / net.name / file.stem
            images = folder / "images"
            if not (folder / kind_of(args) / "result.json").exists():
                sample(args, row, file, images)
            point = points.setdefault(int(file.stem), {"epoch": int(file.stem)})
            point[net.name] = curve_distance(args, images, folder, reference)
            shutil.rmtree(images, ignore_errors=True)  # thousands of files that nobody looks at
    rows = [points[epoch] | {"real_images": floor} for epoch in sorted(points)]
    columns = ["epoch", *names, "real_images"]
    cells = [[str(row.get(column, "")) for column in columns] for row in rows]
    save_csv([columns, *cells], args.output_dir / "curve.csv")
    kind = "FID" if args.weights is not None else "random-feature distance"
    title = f"{kind} of {args.count:,} images, seed {args.seed}"
    save_curves(rows, {title: columns[1:]}, args.output_dir / "curve.png")


def kind_of(args: Table) -> Literal["random", "inception"]:
    """The features of the curve's distance: Inception's where there are weights of it."""
    return "random" if args.weights is None else "inception"


def curve_distance(args: Table, images: Path, folder: Path, reference: Reference) -> float:
    """The Fréchet distance of a folder of images: FID with --weights, else of random features."""
    command = evaluate.Fid(
        images,
        reference.val,
        output_dir=folder / kind_of(args),
        features=kind_of(args),
        weights=args.weights,
        device=args.device,
    )
    return read_or_compute(command)["distance"]


def main(args: Table) -> list[list[str]]:
    """Train, sample and evaluate what is missing; returns the lines of the table."""
    check_shared(args.output_dir, {name: getattr(args, name) for name in SHARED})
    longest = max(args.timesteps)
    counts = sorted({args.count, count_of(args, longest)}, reverse=True)
    reference = write_reference(args.output_dir, args.data_dir, args.size, counts, args.seed)
    started = f", which starts from {args.init}" if args.init else ""
    title = f"{args.images:,} images a training{started}; {reference.description}"
    lines = Lines(COLUMNS, args.output_dir, reference, title, args.device, args.weights)
    for net in nets_of(args):
        options = training(args, net)
        p2_ddpm_train.train(options)
        checkpoint = options.output_dir / "model.safetensors"
        for row in rows_of(args, net):
            folder = args.output_dir / "rows" / row.name
            images = folder / "images"
            count = count_of(args, row.steps)
            seconds = timed(folder, count, partial(sample, args, row, checkpoint, images))
            words = [str(net.timesteps), net.rules, row.method, str(row.steps), f"{count:,}"]
            lines.add(words, folder, images, seconds)
    for checkpoint in args.gans:
        folder = args.output_dir / "rows" / checkpoint.stem
        images = folder / "images"
        seconds = timed(folder, args.count, partial(sample_gan, args, checkpoint, images))
        lines.add(["", "", checkpoint.stem, "", f"{args.count:,}"], folder, images, seconds)
    for count in counts:
        words = ["", "", "real images", "", f"{count:,}"]
        lines.add(words, args.output_dir / f"real-{count}", reference.train[count], None)
    lines.draw_samples(args.size)
    draw_curve(args, reference)
    lines.print()
    return lines.rows


if __name__ == "__main__":
    run_cli(Table, main)
