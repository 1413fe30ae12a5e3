r"""Unsupervised domain adaptation of digits with a domain-adversarial network (DANN).

A feature extractor learns to classify labelled source images (MNIST-M). At the same time a domain
classifier tries to tell its features of source images from those of unlabelled target images
(SVHN, USPS). A gradient reversal layer between the two makes the extractor hide the difference.

Paper: Ganin et al., Domain-Adversarial Training of Neural Networks, 2016,
https://arxiv.org/abs/1505.07818
Options beside it: information maximisation (Liang et al., 2020, https://arxiv.org/abs/2002.08546)
and minimum class confusion (Jin et al., 2020, https://arxiv.org/abs/1912.03699).

    python p3_dann.py train --target svhn --method dann --output-dir runs/p3/svhn/dann
    python p3_dann.py predict --checkpoint runs/p3/svhn/dann/model.safetensors \
        --image-dir IMAGES --output-csv pred.csv
    python p3_dann.py embed --checkpoint runs/p3/svhn/dann/model.safetensors \
        --output-dir runs/p3/svhn/dann/figures
    python p3_dann.py table --output-dir runs/p3 --seeds 0 1 2
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.augment import add_neighbours, augment_digits, tint
from common.checkpoints import load_net
from common.classification import accuracy, classify, scores_of
from common.cli import (
    UserError,
    above,
    at_least,
    below,
    each_once,
    in_range,
    is_domain,
    is_seed,
    note_once,
    run_cli,
    two_domains,
)
from common.data import (
    DIGIT_DOMAINS,
    DIGIT_SIZE,
    Images,
    draw_batch,
    is_grey,
    labels_of,
    load_digits,
    load_folder,
    normalise,
    some_rows,
    take_some,
)
from common.device import Device, Precision, make_accelerator, place
from common.figures import mean_and_sd, save_csv, save_curves, save_table, save_tsne
from common.files import make_output_dir
from common.rng import derive_seed, make_rng
from common.run import Run
from common.target_losses import confusion_loss, infomax_loss
from common.trackers import Tracker
from common.training import update_ema, warmup_cosine
from metrics.unlabelled import CRITERIA, Selection, all_criteria, selected_epoch
from models.dann import NETS, DannCNN, DannDeep, DannNet
from models.network import Network

METHODS = {
    "source": "trained on source",
    "dann": "adapted by DANN",
    "target": "trained on target",
}
# What three course reports state of their own networks, accuracy in %.
REPORTED = {
    "source": {"svhn": (37.74, 33.7, 35.50), "usps": (75.25, 76.0, 74.40)},
    "dann": {"svhn": (42.06, 49.6, 61.57), "usps": (82.51, 82.6, 89.05)},
    "target": {"svhn": (98.40, 91.5, 94.15), "usps": (90.87, 98.3, 99.26)},
}
# The values of options that are not given, by network and, where it differs, by target.
RECIPES = {
    "deep": {
        "epochs": 20,
        "lr": 1.5e-3,
        "lambda_max": 0.7,
        "prior": 1.0,
        "augmentation": 0.85,
        "forward": "joint",
    },
    "cnn": {
        "epochs": 20,
        "lr": 1e-3,
        "lambda_max": 1.0,
        "prior": 0.5,
        "augmentation": 0.0,
        "forward": "joint",
    },
}
SCENARIO_RECIPES = {("deep", "usps"): {"prior": 0.5}}
MOST_MEASURED = 2_000  # images of each domain by which --select chooses


@dataclass(kw_only=True)
class Recipe:
    """Options of `train` and `table`. Those without a value are the recipe's for the network."""

    output_dir: Path
    """Run directory. The same command again continues an interrupted run."""
    data_dir: Path = Path("hw2_data")
    """Data folder, with digits/DOMAIN/{data,train.csv,val.csv} in it."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """bf16 autocast where the hardware is fast at it, or fp32."""
    log_with: tuple[Tracker, ...] = ()
    """Trackers that get the metrics too: tensorboard, wandb or mlflow."""
    source: str = "mnistm"
    """Labelled domain."""
    epochs: int | None = None
    """Epochs of --images-per-epoch images of each domain."""
    images_per_epoch: int = 16_000
    """Images of each domain in an epoch, whatever the size of the data."""
    batch_size: int = 64
    """Images of each domain in a step, over all processes."""
    lr: float | None = None
    """Peak learning rate of AdamW."""
    lambda_max: float | None = None
    """Weight λ of the reversed gradient at the end of its ramp."""
    prior: float | None = None
    """How far source images are weighted by the target's predicted class frequencies, 0 to 1."""
    augmentation: float | None = None
    """Strength of the augmentation, the same for both domains; 0 switches it off."""
    neighbours: float = 0.0
    """Share of source images with another digit at a side, as house numbers have."""
    tint: float = 0.0
    """Share of images whose channels get contrasts of their own, so that colour matters less."""
    grey: bool = False
    """Let the deep network see the mean of the channels only, so that colour cannot matter."""
    forward: Literal["joint", "separate"] | None = None
    """Whether BatchNorm sees both domains in one batch; the domain classifier's always does."""
    infomax: bool = False
    """Add information maximisation on the target: certain of each image, balanced over all."""
    mcc: bool = False
    """Add minimum class confusion on the target."""
    label_smoothing: float = 0.05
    """Label smoothing of the class loss."""
    ema_decay: float = 0.998
    """Decay of the averaged network, which is the one that is evaluated and saved."""
    select: Selection = "last"
    """Which epoch is the result. No choice uses labels of the target."""
    measured_images: int | None = None
    """Most images of a set that is measured; by default all, or 2,000 where an epoch is chosen."""

    def __post_init__(self) -> None:
        at_least("--epochs", self.epochs, 1)
        at_least("--images-per-epoch", self.images_per_epoch, 1)
        at_least("--batch-size", self.batch_size, 2)
        above("--lr", self.lr, 0, 1)
        in_range("--lambda-max", self.lambda_max, 0, 1_000)
        in_range("--prior", self.prior, 0, 1)
        in_range("--augmentation", self.augmentation, 0, 10)
        in_range("--neighbours", self.neighbours, 0, 1)
        in_range("--tint", self.tint, 0, 1)
        below("--label-smoothing", self.label_smoothing, 0, 1)
        below("--ema-decay", self.ema_decay, 0, 1)
        at_least("--measured-images", self.measured_images, 1)


@dataclass(kw_only=True)
class Train(Recipe):
    """Train one network, and report the last epoch, or the one that --select names."""

    target: str = "svhn"
    """Domain to adapt to. Only --method target uses its labels."""
    seed: int = 0
    """Seed of initialisation, order and augmentation."""
    method: Literal["source", "dann", "target"] = "dann"
    """Train on the source's labels only, with DANN, or on the target's labels (the upper limit)."""
    net: Literal["cnn", "deep"] = "deep"
    """The course reports' small network (cnn), or the stronger one of this project."""

    def __post_init__(self) -> None:
        super().__post_init__()
        is_domain("--source", self.source)
        is_domain("--target", self.target)
        if self.method == "dann":
            two_domains(self.source, [self.target])
        if self.method != "dann" and (self.mcc or self.infomax):
            flag = "--mcc" if self.mcc else "--infomax"
            raise UserError(f"{flag}: goes with --method dann, not {self.method}")
        if self.method == "target" and self.neighbours > 0:
            raise UserError(f"--neighbours {self.neighbours:g}: is for images of the source")
        if self.grey and self.net != "deep":
            raise UserError(f"--grey: is for --net deep, not {self.net}")
        is_seed("--seed", self.seed)


@dataclass(kw_only=True)
class Table(Recipe):
    """Train the missing runs of source / DANN / target in every scenario and tabulate them.

    The table has the mean ± standard deviation over the seeds.
    """

    targets: tuple[str, ...] = ("svhn", "usps")
    """Domains to adapt to."""
    nets: tuple[Literal["cnn", "deep"], ...] = ("deep",)
    """Networks to compare."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run for each of these seeds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        each_once("--targets", self.targets)
        two_domains(self.source, self.targets, "--targets")
        each_once("--nets", self.nets)
        if self.grey and self.nets != ("deep",):
            raise UserError("--grey: is for --nets deep alone")
        each_once("--seeds", self.seeds)
        for seed in self.seeds:
            is_seed("--seeds", seed)


@dataclass(kw_only=True)
class Predict:
    """Label every image of a folder and write the graders' csv."""

    checkpoint: Path
    """model.safetensors of `train`, or a published DannCNN .pth."""
    image_dir: Path
    """Folder of images, grey or RGB, of any size."""
    output_csv: Path
    """Csv file to write, with rows image_name,label sorted by name."""
    device: Device = "auto"
    """Where to compute."""


@dataclass(kw_only=True)
class Embed:
    """Draw t-SNE of validation features, once by class and once by domain (PNG and PDF)."""

    checkpoint: Path
    """model.safetensors of `train`."""
    output_dir: Path
    """Folder for the plots and for features.npz."""
    data_dir: Path = Path("hw2_data")
    """Data folder, with digits/DOMAIN/{data,val.csv} in it."""
    per_domain: int = 1_000
    """Validation images of each domain."""
    target: str | None = None
    """The other domain; the one that the network was adapted to if not given."""
    seed: int = 0
    """Seed of the choice of images and of t-SNE."""
    device: Device = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        is_domain("--target", self.target)
        at_least("--per-domain", self.per_domain, 1)
        is_seed("--seed", self.seed)


# The method


class ReverseGradient(torch.autograd.Function):
    """The gradient reversal layer R_λ: equations 16 and 17 of the paper.

    Forward: R_λ(x) = x. Backward: dR_λ/dx = -λ I.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, lambd: float) -> Tensor:
        """Return x as it is."""
        ctx.lambd = lambd
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return -λ times the gradient for x, and none for λ."""
        return -ctx.lambd * gradient, None


class DomainAdversarial(nn.Module):
    """Both heads of a network in one forward pass, as data parallelism needs it."""

    def __init__(self, net: DannNet) -> None:
        super().__init__()
        self.net = net

    def forward(
        self, images: Tensor, lambd: float, sizes: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Images (batch, 3, 28, 28) → log-probabilities of classes (batch, 10) and domains.

        The domains are (batch, 2): 0 is the source, 1 the target.

        `sizes` splits the batch: BatchNorm normalises each part with its own statistics. The domain
        classifier has BatchNorm layers too, but it always reads the whole batch. If it normalised
        each domain on its own, both would have the same mean and variance there.
        """
        batches = images.split(sizes) if sizes else [images]
        parts = [self.net.features(batch) for batch in batches]
        class_log_p = torch.cat([self.net.classify(part) for part in parts])
        features = torch.cat(parts)
        reversed_features = ReverseGradient.apply(features, lambd)
        domain_log_p = self.net.discriminate(reversed_features)
        return class_log_p, domain_log_p


def lambda_at(progress: float, lambda_max: float) -> float:
    """λ at progress p in [0, 1]: λ_max (2 / (1 + exp(-10 p)) - 1), section 5.2.2."""
    return lambda_max * (2 / (1 + math.exp(-10 * progress)) - 1)


class ClassPrior(nn.Module):
    """The class frequencies of the target, as the network predicts them.

    Aligning features moves images of one class to another where the class frequencies of the two
    domains differ. Weighting the source images with the target's frequencies takes that incentive
    away, without any label of the target (Tachet des Combes et al., 2020,
    https://arxiv.org/abs/2003.04475). The source's own frequencies are taken as equal, as MNIST-M's
    nearly are (9.1 to 11.3 %).
    """

    frequencies: Tensor

    def __init__(self, classes: int = 10, trust: float = 1.0, momentum: float = 0.01) -> None:
        """`trust` in [0, 1] says how far the weights follow the predicted frequencies."""
        super().__init__()
        self.trust = trust
        self.momentum = momentum
        self.register_buffer("frequencies", torch.full((classes,), 1 / classes))

    @torch.no_grad()
    def update(self, log_p: Tensor) -> None:
        """Move towards the mean of the target's class probabilities; log_p is (batch, classes)."""
        self.frequencies.lerp_(log_p.float().exp().mean(0), self.momentum)

    def weights(self, labels: Tensor) -> Tensor:
        """Weights of source images with these labels (batch,), 1 on average.

        All are 1 for a trust of 0, which is plain DANN.
        """
        even = torch.full_like(self.frequencies, 1 / len(self.frequencies))
        weights = torch.lerp(even, self.frequencies, self.trust)[labels]
        return weights / weights.mean()


def dann_losses(
    net: nn.Module, images: Tensor, labels: Tensor, lambd: float, args: Recipe, prior: ClassPrior
) -> dict[str, Tensor]:
    """Class loss of the labelled images, and the domain loss if unlabelled ones follow them.

    `images` is (batch, 3, 28, 28) with the labelled ones first, `labels` int64 (labelled,). The
    accuracies of both classifiers are returned for the record.
    """
    labelled = len(labels)
    has_target = len(images) > labelled
    separate = args.forward == "separate" and has_target
    sizes = (labelled, len(images) - labelled) if separate else ()
    log_p, domain_log_p = net(images, lambd, sizes)
    class_log_p, target_log_p = log_p[:labelled], log_p[labelled:]

    smoothing = args.label_smoothing
    losses = {
        "class_loss": F.cross_entropy(class_log_p, labels, label_smoothing=smoothing),
        "class_accuracy": (class_log_p.argmax(1) == labels).float().mean(),
    }
    if has_target:
        # 0 for the source, 1 for the target. One mean over both domains is half of the sum in
        # equation 9: λ = 1 here is the paper's 0.5.
        domain = (torch.arange(len(images), device=images.device) >= labelled).long()
        weights = torch.cat([prior.weights(labels), torch.ones_like(target_log_p[:, 0])])
        prior.update(target_log_p)
        errors = F.nll_loss(domain_log_p, domain, reduction="none")
        losses["domain_loss"] = (weights * errors).mean()
        losses["domain_accuracy"] = (domain_log_p.argmax(1) == domain).float().mean()
        if args.infomax:
            losses["infomax_loss"] = infomax_loss(target_log_p)
        if args.mcc:
            losses["confusion_loss"] = confusion_loss(target_log_p)
    return losses


# Training


def train(args: Train) -> dict[str, Any]:
    """Train one run; returns the content of result.json (on the main process)."""
    settings = settings_of(args)
    args = replace(args, **settings._asdict())
    accelerator = make_accelerator(args.device, args.precision, args.log_with, args.output_dir)
    device, rank = accelerator.device, accelerator.process_index
    run = Run(args, accelerator)
    if run.result is not None:
        return run.result if run.is_main else {}
    data = load_data(args)
    pixels = data.labelled.pixels.to(device)
    labels = labels_of(data.labelled).to(device)

    torch.manual_seed(derive_seed(args.seed, "init"))
    bare_net = place(make_net(args), device)
    assert bare_net.domain_classifier is not None
    bare_net.domain_classifier.requires_grad_(args.method == "dann")
    trained = [p for p in bare_net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.01, fused=True)
    ema = copy.deepcopy(bare_net)
    net, optimizer = accelerator.prepare(DomainAdversarial(bare_net), optimizer)
    prior = ClassPrior(trust=settings.prior).to(device)
    chosen = copy.deepcopy(ema)
    parts = {"net": bare_net, "ema": ema, "chosen": chosen, "optimizer": optimizer, "prior": prior}

    steps_per_epoch = max(1, args.images_per_epoch // args.batch_size)
    last = settings.epochs * steps_per_epoch
    first = run.load_state(parts)
    images_per_step = 2 * args.batch_size if args.method == "dann" else args.batch_size
    for step in run.steps(first, last, images_per_step):
        net.train()
        lambd = lambda_at(step / last, settings.lambda_max)
        learning_rate = settings.lr * warmup_cosine(step / last, warm_up=0.1)
        optimizer.param_groups[0]["lr"] = learning_rate
        torch.manual_seed(derive_seed(args.seed, "dropout", step, rank))
        rng = make_rng(args.seed, "augment", step, rank, device=device)

        # The batch: labelled images first, then unlabelled ones of the target.
        rows = draw_batch(len(pixels), step, args.batch_size, accelerator, args.seed, "labelled")
        images = add_neighbours(normalise(pixels[rows]), rng, args.neighbours)
        if args.method == "dann":
            target = data.target_pixels
            key = (args.seed, "unlabelled")
            target_rows = draw_batch(len(target), step, args.batch_size, accelerator, *key)
            images = torch.cat([images, normalise(target[target_rows])])
        images = augment_digits(images, rng, settings.augmentation)
        images = tint(images, rng, args.tint)
        images = images.contiguous(memory_format=torch.channels_last)

        losses = dann_losses(net, images, labels[rows], lambd, args, prior)
        loss = losses["class_loss"]
        if args.method == "dann":
            # Equation 9: the domain classifier minimises the domain loss. Behind the reversal
            # layer the extractor minimises class loss - λ · domain loss.
            loss = loss + losses["domain_loss"]
        if args.method == "dann" and args.infomax:
            loss = loss + losses["infomax_loss"]
        if args.method == "dann" and args.mcc:
            loss = loss + losses["confusion_loss"]
        optimizer.zero_grad()
        shared: Any = accelerator.reduce(prior.frequencies, "mean")  # of all processes
        prior.frequencies.copy_(shared)
        accelerator.backward(loss)
        optimizer.step()
        update_ema(ema, bare_net, args.ema_decay, step)

        run.add_losses(step, losses)
        epoch, rest = divmod(step + 1, steps_per_epoch)
        epoch_ends = rest == 0
        if epoch_ends:
            row = {"step": step + 1, "epoch": epoch, "lambda": lambd}
            row["learning_rate"] = learning_rate
            row |= run.epoch_means(steps_per_epoch)
            run.check_weights(step + 1, parts)
            end_epoch(run, args, ema, chosen, data, row)
        if run.save_due() or epoch_ends:
            run.save_state(step + 1, parts)
    if run.is_main:
        finish(run, args, chosen, data.validation)
    return run.result or {}


def make_net(args: Train) -> DannNet:
    """The network of --net, with random weights."""
    if args.net == "deep":
        return DannDeep(grey=args.grey)
    return DannCNN()


class Settings(NamedTuple):
    """The options that a recipe has values for."""

    epochs: int
    lr: float
    lambda_max: float
    prior: float
    augmentation: float
    forward: Literal["joint", "separate"]


def settings_of(args: Train) -> Settings:
    """The recipe of the network and the target, with the options that are given in its place."""
    recipe: dict[str, Any] = {**RECIPES[args.net]}
    recipe |= SCENARIO_RECIPES.get((args.net, args.target), {})
    for name in recipe:
        given = getattr(args, name)
        if given is not None:
            recipe[name] = given
    return Settings(**recipe)


class Data(NamedTuple):
    """What a run reads: labelled images, unlabelled ones of the target, validation sets."""

    labelled: Images
    target_pixels: Tensor
    validation: dict[str, Images]


def load_data(args: Train) -> Data:
    """Load the images of a run.

    The validation sets are those of source and target; after source-only training, of all domains.
    A target without labels is not measured.
    """
    cache = args.output_dir.parent / "cache"
    labelled_domain = args.target if args.method == "target" else args.source
    labelled = load_digits(args.data_dir, labelled_domain, "train", cache)
    target = load_digits(args.data_dir, args.target, "train", cache, needs_labels=False)
    domains = [args.target]
    if args.method == "source":
        domains += [d for d in DIGIT_DOMAINS if (args.data_dir / "digits" / d).is_dir()]
    domains.append(args.source)
    validation = {}
    for domain in domains:
        if domain not in validation:
            trains_on_it = domain == labelled_domain or domain == args.source
            images = load_digits(args.data_dir, domain, "val", cache, needs_labels=trains_on_it)
            if images.labels is None:
                note_once(f"{domain}: val has no labels, so no accuracy is measured on it")
            else:
                validation[domain] = take_some(images, args.measured_images)
    return Data(labelled, target.pixels, validation)


def end_epoch(
    run: Run, args: Train, ema: nn.Module, chosen: nn.Module, data: Data, row: dict[str, Any]
) -> None:
    """Measure the averaged network, log it, keep it if --select prefers it, and warn of bad signs.

    The accuracies on other domains than the source are for the record: nothing is chosen with them.
    """
    if not run.is_main:
        return
    most = args.measured_images or MOST_MEASURED
    source = take_some(data.validation[args.source], most)
    row["source_accuracy"] = accuracy(ema, source, run.accelerator)
    unlabelled = data.target_pixels[some_rows(len(data.target_pixels), most)]
    row |= all_criteria(scores_of(ema, unlabelled, run.accelerator).float().softmax(1))
    for domain, images in data.validation.items():
        if domain != args.source:
            row[f"accuracy_{domain}"] = accuracy(ema, images, run.accelerator)
    run.log_metrics(row)
    run.log_row(row)
    if selected_epoch(run.history(), args.select)["epoch"] == row["epoch"]:
        chosen.load_state_dict(ema.state_dict())
    best = max(before["class_accuracy"] for before in run.history())
    if row["class_accuracy"] < best - 0.05:
        run.log(
            "warning: the class accuracy fell by 5 points or more; "
            "a smaller --lambda-max or --lr may help"
        )
    assert args.epochs is not None  # the recipe's, if it was not given
    late = row["epoch"] > args.epochs // 2
    domain_accuracy = row.get("domain_accuracy", 0.5)  # only DANN has one
    collapsed = domain_accuracy <= 0.45
    always_right = domain_accuracy >= 0.98
    if late and (collapsed or always_right):
        run.log(
            f"warning: the domain accuracy is {domain_accuracy:.0%}: "
            "the domain classifier collapsed, or is nearly always right"
        )


def finish(run: Run, args: Train, chosen: Network, validation: dict[str, Images]) -> None:
    """Measure the chosen epoch on every validation set; write curves, model and result.json."""
    rows = run.history()
    epoch = selected_epoch(rows, args.select)["epoch"]
    result: dict[str, Any] = {"select": args.select, "epoch": epoch, "accuracy": {}, "grey": {}}
    for domain, images in validation.items():
        result["accuracy"][domain] = accuracy(chosen, images, run.accelerator)
        result["grey"][domain] = is_grey(images.pixels)
    swings = {}
    best = {}  # chosen with labels of the target, so it is not a result
    for domain in validation:
        if domain != args.source:
            recorded = [row[f"accuracy_{domain}"] for row in rows]
            swings[domain] = np.abs(np.diff(recorded[-5:])).max(initial=0)
            best[domain] = max(recorded)
    result["largest_swing_of_last_5_epochs"] = swings
    result["oracle_best_accuracy"] = best

    panels = {
        "losses": ["class_loss", "domain_loss", "infomax_loss", "confusion_loss"],
        "training accuracy": ["class_accuracy", "domain_accuracy"],
        "validation accuracy, %": [key for key in rows[-1] if key.startswith("accuracy_")],
        "target without labels": list(CRITERIA),
        "schedule": ["lambda"],
    }
    save_curves(rows, panels, run.dir / "figures" / "curves.png")
    extra = {
        "source": args.source,
        "target": args.target,
        "method": args.method,
        "seed": args.seed,
    }
    run.save_model(chosen, chosen.config | extra)
    found = [f"{domain} {value:.2f} %" for domain, value in result["accuracy"].items()]
    run.log(f"{run.dir}: {', '.join(found)}")
    run.finish(result)


# Other commands


def predict(args: Predict) -> None:
    """Write the class of every image of a folder as csv; processes share the batches."""
    accelerator = make_accelerator(args.device, "fp32")
    make_output_dir(args.output_csv.parent, "--output-csv", alone=False)
    net, _ = load_net(args.checkpoint, NETS)
    net.to(accelerator.device)
    images = load_folder(args.image_dir, DIGIT_SIZE)
    labels = classify(net, images.pixels, accelerator, shared=True).tolist()
    if not accelerator.is_main_process:
        return
    rows = [[name, str(label)] for name, label in zip(images.names, labels, strict=True)]
    save_csv([["image_name", "label"], *sorted(rows)], args.output_csv)
    print(f"{len(labels):,} images labelled: {args.output_csv}")


@torch.inference_mode()
def embed(args: Embed) -> None:
    """Draw t-SNE of the features of both domains' validation images."""
    device = make_accelerator(args.device, "fp32").device
    net, config = load_net(args.checkpoint, NETS)
    net.to(device)
    source = config.get("source")
    target = args.target or config.get("target")
    method = METHODS.get(config.get("method", ""))
    if source is None or target is None or source == target or method is None:
        raise UserError(
            f"--checkpoint {args.checkpoint}: does not say its two domains; "
            "--target names the other one"
        )
    make_output_dir(args.output_dir)
    features = []
    labels = []
    domains = []
    for number, domain in enumerate((source, target)):
        images = load_digits(args.data_dir, domain, "val")
        rng = make_rng(args.seed, "embed", domain)
        rows = torch.randperm(len(images.names), generator=rng)[: args.per_domain]
        batch = normalise(images.pixels[rows]).to(device)
        features.append(net.features(batch).cpu())
        labels.append(labels_of(images)[rows])
        domains.append(torch.full((len(rows),), number))
    colourings = {
        "class": (torch.cat(labels).numpy(), range(10)),
        "domain": (torch.cat(domains).numpy(), [source, target]),
    }
    points = torch.cat(features).numpy()
    title = f"{source} → {target}, {method}"
    save_tsne(points, colourings, title, args.output_dir, args.seed)
    print(f"t-SNE of {len(points):,} images: {args.output_dir}/tsne_class.png and tsne_domain.png")


def table(args: Table) -> None:
    """Train the missing runs; write table.csv, table.md and table.png beside them."""
    for target in args.targets:  # a mistake comes before hours of training: one row needs labels
        load_digits(args.data_dir, target, "train", args.output_dir / "cache")
    rows = []
    grey: dict[str, bool] = {}  # which targets have no colour
    for net in args.nets:
        for method in METHODS:
            row = [f"{METHODS[method]}, {net} net"]
            for target in args.targets:
                results = train_seeds(args, net, method, target)
                if all(results):  # only the main process has them
                    values = [found["accuracy"].get(target, math.nan) for found in results]
                    row.append(mean_and_sd(values))
                    grey |= results[0]["grey"]
            rows.append(row)
    if not grey:
        return
    for method, reported in REPORTED.items():
        row = [f"{METHODS[method]}, the reports"]
        for target in args.targets:
            row.append(" / ".join(f"{value:.2f}" for value in reported.get(target, ())))
        rows.append(row)
    chosen = "last epoch"
    if args.select != "last":
        chosen += f", of DANN the epoch chosen by {args.select}"
    header = [f"{chosen}, validation accuracy"]
    for target in args.targets:
        # USPS has no colour anyway; other targets say so.
        name = f"grey {target}" if grey.get(target) and target != "usps" else target
        header.append(f"{args.source} → {name}, %")
    seeds = ", ".join(map(str, args.seeds))
    save_table([header, *rows], args.output_dir / "table", f"mean ± sd over seeds {seeds}")
    print((args.output_dir / "table.md").read_text())


def train_seeds(args: Table, net: str, method: str, target: str) -> list[dict[str, Any]]:
    """The results of one row and target of the table, for each seed.

    Source-only training does not depend on the target: one run serves all of them. Only DANN
    chooses an epoch with --select.
    """
    shared = {}
    for field in fields(Recipe):
        if field.name != "output_dir":
            shared[field.name] = getattr(args, field.name)
    scenario = args.source if method == "source" else target
    results = []
    for seed in args.seeds:
        folder = args.output_dir / f"{scenario}-{net}-{method}-seed{seed}"
        choice = {"target": scenario, "method": method, "net": net, "seed": seed}
        if method != "dann":
            choice |= {"select": "last", "mcc": False, "infomax": False}
        if method == "target":
            choice["neighbours"] = 0.0
        results.append(train(Train(output_dir=folder, **shared | choice)))
    return results


def main(args: Train | Predict | Embed | Table) -> Any:
    """Run one command."""
    match args:
        case Train():
            return train(args)
        case Predict():
            return predict(args)
        case Embed():
            return embed(args)
        case Table():
            return table(args)


if __name__ == "__main__":
    run_cli(Train | Predict | Embed | Table, main, shared=Train | Predict | Table)
