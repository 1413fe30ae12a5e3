r"""Why faces fail with T = 10 and 100 steps of noise, and what mends it: one table of trainings.

The linear schedule as given leaves 90 % of ᾱ at T = 10 and 36 % at T = 100, so that sampling starts
from noise that training never shows. Respaced, it ends in noise for every T. Each of both rules is
trained for every --timesteps, with one network, seed and number of images; at T = 1000 the rules
are the same. Rows: ancestral sampling with the variances β and β̃, and DDIM without noise, in all T
steps; the network of T = 1000 also in --steps; the GANs; and real training images, which no
generator can honestly beat.

Columns: KID × 1,000 (EfficientNet features; – without the package), the Fréchet distance of random
features and with --weights FID, the share of images with exactly one face, and the seconds an image
takes, start included. All sets are compared with the validation images, resized as for training.
Distances compare only with those of as many images.

Beside the table there are samples.png with the first faces of every row, and curve.png and
curve.csv with the distance by epoch: the averaged network, DDIM, the same noises each time. The
same command again continues; trainings and rows that are there are kept.

    python experiments/faces_by_timesteps.py --output-dir runs/p2/timesteps --width 64
    python experiments/faces_by_timesteps.py --output-dir runs/p2/timesteps-latents --width 128 \
        --autoencoder runs/p2/autoencoder/model.safetensors
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import evaluate
import p2_ddpm_infer
import p2_ddpm_train
from common import gan
from common.cli import UserError, at_least, each_once, in_range, is_seed, run_cli
from common.data import decode_images, load_folder
from common.device import Device, Precision
from common.faces import face_names, load_faces
from common.figures import save_csv, save_curves, save_image, save_labelled, save_table
from common.files import ROOT, atomic_write, make_output_dir
from common.rng import make_rng
from diffusion.schedule import USUAL_T, Prediction, Rule
from p2_ddpm_infer import Sampler

GANS = tuple(ROOT / "checkpoints" / f"{name}_faces.safetensors" for name in ("dcgan", "wgangp"))
CURVE_STEPS = 50  # of DDIM, or T
STRIP = 10  # faces of a row in samples.png
# What all rows must share; a training run itself refuses other options of training.
SHARED = ("count", "seed", "size", "data_dir", "device", "precision")


@dataclass(kw_only=True)
class Table:
    """Train and evaluate what is missing; write the table after each row."""

    output_dir: Path
    """Folder for everything. The same command again continues."""
    data_dir: Path = Path("hw2_data")
    """Data folder with face/train and face/val."""
    autoencoder: Path | None = None
    """model.safetensors of p2_autoencoder.py, in whose latents the networks work."""
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


class Reference(NamedTuple):
    """Folders of real images, resized as for training: to compare with, and for the last row."""

    val: Path
    train: Path
    description: str


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
    """Write the faces of a row, with the same noises as in every other."""
    p2_ddpm_infer.main(
        p2_ddpm_infer.Generate(
            checkpoint=checkpoint,
            output_dir=folder,
            num_images=args.count,
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


def write_reference(args: Table) -> Reference:
    """Write the validation images and --count training images as the training sees them."""
    cache = args.output_dir / "cache"
    val = load_folder(args.data_dir / "face" / "val", (args.size, args.size), cache).pixels
    train = load_faces(args.data_dir, args.size, cache)
    if len(train) < args.count:
        raise UserError(f"--count {args.count}: there are only {len(train):,} training images")
    order = torch.randperm(len(train), generator=make_rng(args.seed, "reference"))
    chosen = train[order[: args.count]]
    folder = args.output_dir / "reference"
    for name, pixels in (("val", val), ("train", chosen)):
        for file, image in zip(face_names(len(pixels)), pixels, strict=True):
            if not (folder / name / file).exists():
                save_image(image, folder / name / file)
    description = (
        f"{args.count:,} images a row, seed {args.seed}, against {len(val):,} validation images of "
        f"{args.data_dir}, all resized to {args.size}x{args.size} (PIL, bicubic)"
    )
    return Reference(folder / "val", folder / "train", description)


def measure(args: Table, images: Path, folder: Path, reference: Reference) -> dict[str, Any]:
    """The scores of a folder of images by column, computed unless `folder` has them."""
    fid = evaluate.Fid(
        images,
        reference.val,
        output_dir=folder / "distance",
        features="random",
        device=args.device,
    )
    faces = evaluate.Faces(images, output_dir=folder / "faces")
    kid = evaluate.Kid(images, reference.val, output_dir=folder / "kid", device=args.device)
    scores = {
        "distance": read_or_compute(fid)["distance"],
        "one face": read_or_compute(faces)["one_face_percent"],
    }
    try:
        scores["kid"] = read_or_compute(kid)["distance"]
    except UserError as error:  # the package of its network is missing
        print(f"left out: KID ({error})", file=sys.stderr)
    if args.weights is not None:
        inception = evaluate.Fid(
            images,
            reference.val,
            output_dir=folder / "fid",
            weights=args.weights,
            device=args.device,
        )
        scores["fid"] = read_or_compute(inception)["distance"]
    return scores


def read_or_compute(command: Any) -> dict[str, Any]:
    """The result.json of a score, computed if it is not there."""
    file = command.output_dir / "result.json"
    if not file.exists():
        evaluate.main(command)
    return json.loads(file.read_text())


def timed(args: Table, folder: Path, write: Callable[[], None]) -> float:
    """Let `write()` write the images of a row, unless that is done; returns seconds an image."""
    file = folder / "seconds.json"
    if not file.exists():
        started = time.monotonic()
        write()
        seconds = (time.monotonic() - started) / args.count
        atomic_write(file, json.dumps(seconds) + "\n")
    return json.loads(file.read_text())


# The table


class Lines:
    """The lines of the table so far, and the folder of images of each."""

    def __init__(self, args: Table, reference: Reference) -> None:
        self.args = args
        self.reference = reference
        self.header = ["T", "rule", "sampler", "steps", "KID × 1,000", "random-feature distance"]
        if args.weights is not None:
            self.header.append("FID")
        self.header += ["exactly one face, %", "seconds an image"]
        self.rows: list[list[str]] = []
        self.folders: dict[str, Path] = {}

    def add(self, words: list[str], folder: Path, images: Path, seconds: float | None) -> None:
        """Measure a folder of images and add its line; `words` are the first four cells."""
        scores = measure(self.args, images, folder, self.reference)
        cells = [decimals(scores.get("kid"), 2), decimals(scores["distance"], 2)]
        if self.args.weights is not None:
            cells.append(decimals(scores["fid"], 2))
        cells += [decimals(scores["one face"], 1), "" if seconds is None else f"{seconds:.3g}"]
        self.rows.append([*words, *cells])
        self.folders[" · ".join(word for word in words if word)] = images
        save_table([self.header, *self.rows], self.args.output_dir / "table.png", self.title())

    def title(self) -> str:
        """What the numbers are about."""
        return f"{self.args.images:,} images a training; {self.reference.description}"

    def draw_samples(self) -> None:
        """Draw the first faces of every row."""
        names = face_names(self.args.count)[:STRIP]
        strips = []
        for images in self.folders.values():
            files = [images / name for name in names]
            strips.append(decode_images(files, (self.args.size, self.args.size)))
        columns = [str(number) for number in range(len(names))]
        file = self.args.output_dir / "samples.png"
        save_labelled(torch.cat(strips), file, list(self.folders), columns, self.title())


def decimals(value: float | None, digits: int) -> str:
    """A number in a cell; – if it was not measured."""
    return "–" if value is None else f"{value:.{digits}f}"


# The curve


def draw_curve(args: Table, reference: Reference) -> None:
    """Measure the copies of every training; write curve.csv and curve.png, with the floor."""
    floor = curve_distance(args, reference.train, args.output_dir / "real" / "curve", reference)
    points: dict[int, dict[str, Any]] = {}
    names = [net.name for net in nets_of(args)]
    for net in nets_of(args):
        copies = training(args, net).output_dir / "epochs"
        for file in sorted(copies.glob("*.safetensors")):
            row = Row(net, "ddim", min(CURVE_STEPS, net.timesteps))
            folder = args.output_dir / "curve" / net.name / file.stem
            images = folder / "images"
            if not (folder / "result.json").exists():
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


def curve_distance(args: Table, images: Path, folder: Path, reference: Reference) -> float:
    """The Fréchet distance of a folder of images: FID with --weights, else of random features."""
    command = evaluate.Fid(
        images,
        reference.val,
        output_dir=folder,
        features="random" if args.weights is None else "inception",
        weights=args.weights,
        device=args.device,
    )
    return read_or_compute(command)["distance"]


def check_shared(args: Table) -> None:
    """Raise UserError if the output directory holds a table with other options."""
    shared = {name: str(getattr(args, name)) for name in SHARED}
    about = make_output_dir(args.output_dir) / "about.json"
    if about.exists():
        before = json.loads(about.read_text())
        for name, value in shared.items():
            if before.get(name) != value:
                raise UserError(
                    f"--output-dir {args.output_dir}: holds a table of something else "
                    f"({name} was {before.get(name)}, is {value})"
                )
    atomic_write(about, json.dumps(shared, indent=1) + "\n")


def main(args: Table) -> list[list[str]]:
    """Train, sample and evaluate what is missing; returns the lines of the table."""
    check_shared(args)
    reference = write_reference(args)
    lines = Lines(args, reference)
    for net in nets_of(args):
        options = training(args, net)
        p2_ddpm_train.train(options)
        checkpoint = options.output_dir / "model.safetensors"
        for row in rows_of(args, net):
            folder = args.output_dir / "rows" / row.name
            images = folder / "images"
            seconds = timed(args, folder, partial(sample, args, row, checkpoint, images))
            words = [str(net.timesteps), net.rules, row.method, str(row.steps)]
            lines.add(words, folder, images, seconds)
    for checkpoint in args.gans:
        folder = args.output_dir / "rows" / checkpoint.stem
        images = folder / "images"
        seconds = timed(args, folder, partial(sample_gan, args, checkpoint, images))
        lines.add(["", "", checkpoint.stem, ""], folder, images, seconds)
    lines.add(["", "", "real images", ""], args.output_dir / "real", reference.train, None)
    lines.draw_samples()
    draw_curve(args, reference)
    table = args.output_dir / "table.md"
    print(f"{lines.title()}\n\n{table.read_text()}{table.with_suffix('.png')}")
    return lines.rows


if __name__ == "__main__":
    run_cli(Table, main)
