"""Unsupervised domain adaptation of digits by a domain-adversarial network (DANN).

A feature extractor learns to classify labelled source images (MNIST-M) while a domain classifier, behind a gradient
reversal layer, makes its features of source and unlabelled target images (SVHN, USPS) look alike.
Paper: Ganin et al., Domain-Adversarial Training of Neural Networks, 2016, https://arxiv.org/abs/1505.07818

    python p3_dann.py train --target svhn --method dann --output-dir runs/p3/svhn/dann
    python p3_dann.py predict --checkpoint runs/p3/svhn/dann/model.safetensors --image-dir IMAGES --output-csv pred.csv
    python p3_dann.py embed --checkpoint runs/p3/svhn/dann/model.safetensors --output-dir runs/p3/svhn/dann/figures
    python p3_dann.py table --output-dir runs/p3 --seeds 0 1 2
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn import functional as F

from common import run as runs
from common.augment import augment_digits
from common.data import DIGIT_DOMAINS, DIGIT_SIZE, Images, decode_images, list_images, load_digits, normalise, shuffled
from common.figures import save_curves, save_table, save_tsne
from common.metrics import accuracy, classify
from common.run import Run, UserError, generator
from models.dann import NETS

METHODS = {"source": "trained on source", "dann": "adapted by DANN", "target": "trained on target"}
REPORTED = {  # what three course reports state of their own nets, in %
    "source": {"svhn": (37.74, 33.7, 35.50), "usps": (75.25, 76.0, 74.40)},
    "dann": {"svhn": (42.06, 49.6, 61.57), "usps": (82.51, 82.6, 89.05)},
    "target": {"svhn": (98.40, 91.5, 94.15), "usps": (90.87, 98.3, 99.26)},
}
RECIPES = {  # what options left at None become, by net
    "deep": {"epochs": 10, "lr": 1.5e-3, "lambda_max": 0.7, "augmentation": 0.85, "forward": "joint"},
    "cnn": {"epochs": 10, "lr": 1e-3, "lambda_max": 1.0, "augmentation": 0.0, "forward": "separate"},
}
# USPS is nearly black and white: its batch statistics are far from MNIST-M's, and mixing them costs accuracy.
SCENARIO_RECIPES = {("deep", "usps"): {"forward": "separate", "lambda_max": 0.5}}


@dataclass(kw_only=True)
class Options:
    """What `train`, `embed` and `table` share."""

    output_dir: Path  # Where everything is written; the same command again continues an interrupted run.
    data_dir: Path = Path("hw2_data")  # Folder with digits/DOMAIN/{data,train.csv,val.csv}.
    seed: int = 0  # Seed of initialisation, order, augmentation and choice of images.
    device: runs.Device = "auto"  # Where to compute.
    precision: runs.Precision = "auto"  # bf16 autocast where the hardware is fast at it, or fp32.


@dataclass(kw_only=True)
class Recipe:
    """What `train` and `table` share; None stands for the recipe of the net."""

    source: str = "mnistm"  # Labelled domain.
    epochs: int | None = None  # Epochs of --images-per-epoch images of each domain.
    images_per_epoch: int = 16_000  # Whatever the size of the data.
    batch_size: int = 64  # Images of each domain in a step, over all processes.
    lr: float | None = None  # Peak learning rate of AdamW.
    lambda_max: float | None = None  # Weight of the reversed gradient at the end of its ramp.
    augmentation: float | None = None  # Strength, the same for both domains; 0 is none.
    zoom: float = 1.0  # Mean magnification of augmented source images, for a target with larger digits.
    forward: Literal["joint", "separate"] | None = None  # Batch statistics over both domains together, or of each.
    weight_decay: float = 0.01  # Of AdamW.
    label_smoothing: float = 0.05  # Of the class loss.
    ema_decay: float = 0.99  # Of the averaged net, the one that is judged and saved.


@dataclass(kw_only=True)
class Train(Recipe, Options):
    """Train one net on one scenario. The last epoch counts: no epoch is chosen by target labels."""

    target: str = "svhn"  # Domain to adapt to; its labels are used by --method target only.
    method: Literal["source", "dann", "target"] = "dann"  # Source labels only, DANN, or target labels (the ceiling).
    net: Literal["cnn", "deep"] = "deep"  # The reports' small net, or the stronger one of this project.


@dataclass(kw_only=True)
class Table(Recipe, Options):
    """Train what is missing of source / DANN / target in every scenario; tabulate the mean ± sd over seeds."""

    targets: tuple[str, ...] = ("svhn", "usps")  # Domains to adapt to.
    nets: tuple[Literal["cnn", "deep"], ...] = ("deep",)  # Nets to compare.
    seeds: tuple[int, ...] = (0, 1, 2)  # One run for each, instead of --seed.


@dataclass(kw_only=True)
class Predict:
    """Label every image of a folder and write the grader's csv."""

    checkpoint: Path  # model.safetensors of `train`, or a published DannCNN .pth.
    image_dir: Path  # PNG or JPEG images, grey or RGB, any size.
    output_csv: Path  # Rows image_name,label, sorted by name.
    device: runs.Device = "auto"  # Where to compute.


@dataclass(kw_only=True)
class Embed(Options):
    """t-SNE of validation features, one figure by class and one by domain (PNG and PDF), and the features as npz."""

    checkpoint: Path  # model.safetensors of `train`.
    per_domain: int = 1_000  # Validation images of each domain.


def lambda_at(progress: float, lambda_max: float) -> float:
    """Weight of the reversed gradient at progress p in [0, 1]: from 0 up to lambda_max (section 5.2.2)."""
    return lambda_max * (2 / (1 + math.exp(-10 * progress)) - 1)


def losses_of(
    net: nn.Module, images: Tensor, labels: Tensor, unlabelled: Tensor | None, lambd: float, args: Recipe
) -> dict[str, Tensor]:
    """Class loss of labelled images (batch, 3, 28, 28) and, given unlabelled ones of the target, domain loss."""
    if unlabelled is None:
        class_log_p, domain_log_p = net(images, lambd)
    elif args.forward == "joint":  # batch normalisation sees the mixture of both domains
        class_log_p, domain_log_p = net(torch.cat([images, unlabelled]), lambd)
    else:  # each domain is normalised by its own batch
        (class_log_p, source_domain), (_, target_domain) = net(images, lambd), net(unlabelled, lambd)
        domain_log_p = torch.cat([source_domain, target_domain])
    class_log_p = class_log_p[: len(labels)]
    # Equation 1. cross_entropy takes log-probabilities as they are, for their log_softmax is themselves.
    losses = {"class_loss": F.cross_entropy(class_log_p, labels, label_smoothing=args.label_smoothing)}
    losses["class_accuracy"] = (class_log_p.argmax(1) == labels).float().mean()
    if unlabelled is not None:
        domain = torch.cat([labels.new_zeros(len(images)), labels.new_ones(len(unlabelled))])
        losses["domain_loss"] = F.nll_loss(domain_log_p, domain)  # equation 2
        losses["domain_accuracy"] = (domain_log_p.argmax(1) == domain).float().mean()
    return losses


def draw(count: int, stream: str, step: int, args: Recipe) -> Tensor:
    """Indices of a step's images, from endless shuffled passes over `count`; all processes draw the same."""
    return shuffled(count, step * args.batch_size, args.batch_size, args.seed, stream)


def to_batch(pixels: Tensor, args: Recipe, rng: torch.Generator, zoom: float = 1.0) -> Tensor:
    """uint8 (batch, 3, 28, 28) → augmented float images of the same shape."""
    images = augment_digits(normalise(pixels), rng, args.augmentation, zoom)
    return images.contiguous(memory_format=torch.channels_last)


def train(args: Train) -> dict[str, Any]:
    """Train one run; returns the content of result.json (on the main process)."""
    recipe = RECIPES[args.net] | SCENARIO_RECIPES.get((args.net, args.target), {})
    args = replace(args, **{key: value for key, value in recipe.items() if getattr(args, key) is None})
    accelerator = runs.make_accelerator(args.device, args.precision)
    device, rank, processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    check_arguments(args, processes)
    run = Run(args, accelerator)
    if run.result is not None:
        return run.result
    labelled, target_pixels, validation = load_data(args)
    pixels, labels, target_pixels = (data.to(device) for data in (labelled.pixels, labelled.labels, target_pixels))

    torch.manual_seed(runs.derive_seed(args.seed, "init"))
    bare_net = NETS[args.net]().to(device, memory_format=torch.channels_last)
    bare_net.domain_classifier.requires_grad_(args.method == "dann")
    parameters = [p for p in bare_net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=args.weight_decay, fused=True)
    ema, done, sums = runs.make_ema(bare_net, args.ema_decay), 0, {}
    net, optimizer = accelerator.prepare(bare_net, optimizer)
    parts = {"net": bare_net, "ema": ema, "optimizer": optimizer}
    if (state := run.load_state()) is not None:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        done, sums = state["step"], {key: value.to(device) for key, value in state["sums"].items()}

    steps_per_epoch = args.images_per_epoch // args.batch_size
    last = args.epochs * steps_per_epoch
    for step in run.steps(done, last, args.batch_size * (2 if args.method == "dann" else 1)):
        net.train()
        lambd = lambda_at(step / last, args.lambda_max)
        learning_rate = optimizer.param_groups[0]["lr"] = args.lr * runs.warmup_cosine(step / last, warm_up=0.1)
        torch.manual_seed(runs.derive_seed(args.seed, "dropout", step, rank))
        rng = generator(args.seed, "augment", step, rank, device=device)
        rows = draw(len(pixels), "labelled", step, args)[rank::processes].to(device)
        images, unlabelled = to_batch(pixels[rows], args, rng, zoom=1.0 if args.method == "target" else args.zoom), None
        if args.method == "dann":
            target_rows = draw(len(target_pixels), "unlabelled", step, args)[rank::processes].to(device)
            unlabelled = to_batch(target_pixels[target_rows], args, rng)

        losses = losses_of(net, images, labels[rows], unlabelled, lambd, args)
        optimizer.zero_grad()
        # Equation 9: the extractor descends class loss - lambda * domain loss; the reversal layer carries the minus.
        accelerator.backward(losses["class_loss"] + losses.get("domain_loss", 0.0))
        optimizer.step()
        ema.update_parameters(bare_net)

        sums = {key: sums.get(key, 0.0) + value.detach() for key, value in losses.items()}
        epoch, inside = divmod(step + 1, steps_per_epoch)
        if inside == 0:
            row = {"step": step + 1, "epoch": epoch, "lambda": lambd, "learning_rate": learning_rate}
            row |= {key: value.item() / steps_per_epoch for key, value in sums.items()}
            sums = {}
            end_epoch(run, args, ema.module, validation, row)
        if run.save_due() or inside == 0:
            run.save_state(step + 1, sums=sums, **{name: part.state_dict() for name, part in parts.items()})
    if run.is_main:
        finish(run, args, ema.module, validation)
    return run.result or {}


def check_arguments(args: Train, processes: int) -> None:
    """Refuse what cannot work before anything is read or written."""
    for flag, domain in (("--source", args.source), ("--target", args.target)):
        if not (args.data_dir / "digits" / domain).is_dir():
            raise UserError(f"{flag} {domain}: no such domain in --data-dir {args.data_dir}")
    if args.batch_size % processes or not 2 * processes <= args.batch_size <= args.images_per_epoch:
        raise UserError(f"--batch-size {args.batch_size}: must be shared by {processes} processes and fit in an epoch")
    if args.epochs < 1:
        raise UserError(f"--epochs {args.epochs}: at least one is needed")


def load_data(args: Train) -> tuple[Images, Tensor, dict[str, Images]]:
    """Labelled training images, target training images without their labels, and validation images by domain.

    The domains to judge are target and source; for source-only, which has no target, every domain there is.
    """
    cache = args.output_dir.parent / "cache"
    labelled = load_digits(args.data_dir, args.target if args.method == "target" else args.source, "train", cache)
    target_pixels = load_digits(args.data_dir, args.target, "train", cache).pixels
    others = [d for d in DIGIT_DOMAINS if (args.data_dir / "digits" / d).is_dir()] if args.method == "source" else []
    judged = dict.fromkeys([args.target, *others, args.source])
    return labelled, target_pixels, {domain: load_digits(args.data_dir, domain, "val", cache) for domain in judged}


def end_epoch(run: Run, args: Train, net: nn.Module, validation: dict[str, Images], row: dict[str, Any]) -> None:
    """Judge the averaged net on the validation images (for the record: nothing is chosen by it), log, warn."""
    if not run.is_main:
        return
    best_before = max((before["class_accuracy"] for before in run.history()), default=0)
    judged = {d: images for d, images in validation.items() if d != args.source}
    row |= {f"accuracy_{d}": accuracy(net, images, run.accelerator) for d, images in judged.items()}
    run.metrics(row)
    told = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in row.items() if k not in ("step", "epoch"))
    run.log(f"epoch {row['epoch']}/{args.epochs}: {told}")
    if row["class_accuracy"] < best_before - 0.05:
        run.log("warning: class accuracy fell by 5 points or more; a smaller --lambda-max or --lr may help")
    if args.method == "dann" and row["epoch"] > args.epochs // 2 and not 0.45 < row["domain_accuracy"] < 0.98:
        run.log(f"warning: domain accuracy is {row['domain_accuracy']:.0%}: the domain classifier collapsed or wins")


def max_swing(values: list[float]) -> float:
    """The largest change from one epoch to the next."""
    return max((abs(after - before) for before, after in itertools.pairwise(values)), default=0.0)


def finish(run: Run, args: Train, net: nn.Module, validation: dict[str, Images]) -> None:
    """Judge the last epoch on every validation set; write curves, model and result.json."""
    rows = run.history()
    recorded = {d: [row[f"accuracy_{d}"] for row in rows] for d in validation if d != args.source}
    result = {
        "accuracy": {d: accuracy(net, images, run.accelerator) for d, images in validation.items()},
        "validation_images": {d: len(images.names) for d, images in validation.items()},
        "grey": {d: bool((images.pixels == images.pixels[:, :1]).all()) for d, images in validation.items()},
        "largest_swing_of_last_5_epochs": {d: max_swing(values[-5:]) for d, values in recorded.items()},
        "oracle_best_accuracy": {d: max(values) for d, values in recorded.items()},  # chosen by labels: not a result
    }
    panels = {"losses": ["class_loss", "domain_loss"], "training accuracy": ["class_accuracy", "domain_accuracy"]}
    panels |= {"validation accuracy, %": [k for k in rows[-1] if k.startswith("accuracy_")], "schedule": ["lambda"]}
    save_curves(rows, panels, run.dir / "figures" / "curves.png")
    names = ("source", "target", "method", "seed")
    run.save_model(net, net.config | {name: getattr(args, name) for name in names})
    run.log(f"{run.dir}: " + ", ".join(f"{d} {value:.2f} %" for d, value in result["accuracy"].items()))
    run.finish(result)


def load_net(checkpoint: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A net of `train`, or a published DannCNN, with its configuration."""
    weights, config = runs.load_weights(checkpoint)
    name = config.get("net", "cnn")
    if name not in NETS:
        raise UserError(f"--checkpoint {checkpoint}: is a {name}, not one of {', '.join(NETS)}")
    net = NETS[name](**{key: config[key] for key in ("classes", "width") if key in config})
    runs.load_into(net, weights, checkpoint)
    return net.eval(), config


def predict(args: Predict) -> None:
    """Write the class of every image of a folder as csv."""
    accelerator = runs.make_accelerator(args.device, "fp32")
    runs.make_output_dir(args.output_csv.parent, "--output-csv")
    net = load_net(args.checkpoint)[0].to(accelerator.device)
    paths = list_images(args.image_dir)
    labels = classify(net, decode_images(paths, DIGIT_SIZE), accelerator).tolist()
    rows = [f"{path.name},{label}\n" for path, label in zip(paths, labels, strict=True)]
    runs.atomic_write(args.output_csv, "image_name,label\n" + "".join(rows))
    print(f"{len(paths):,} images labelled: {args.output_csv}")


@torch.inference_mode()
def embed(args: Embed) -> None:
    """Draw t-SNE of the features of both domains' validation images, by class and by domain."""
    device = runs.make_accelerator(args.device, "fp32").device
    net, config = load_net(args.checkpoint)
    if "target" not in config:
        raise UserError(f"--checkpoint {args.checkpoint}: does not say its domains (a model.safetensors of train does)")
    runs.make_output_dir(args.output_dir)
    domains, parts = [config["source"], config["target"]], []
    for number, name in enumerate(domains):
        images = load_digits(args.data_dir, name, "val")
        rows = shuffled(len(images.names), 0, min(args.per_domain, len(images.names)), args.seed, "embed", name)
        features = net.to(device).features(normalise(images.pixels[rows]).to(device)).cpu()
        parts.append((features, images.labels[rows], torch.full((len(rows),), number)))
    features, labels, domain = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    title = f"{' → '.join(domains)}, {METHODS[config['method']]}"
    kinds = {"class": (labels, range(10)), "domain": (domain, domains)}
    save_tsne(features, kinds, title, args.output_dir, args.seed)
    print(f"t-SNE of {len(features):,} images: {args.output_dir}/tsne_class.png and tsne_domain.png")


def table(args: Table) -> None:
    """Train the missing runs; write table.csv, table.md and table.png beside them."""
    if not args.seeds:
        raise UserError("--seeds: at least one is needed")
    shared = {key: value for key, value in asdict(args).items() if key in Train.__dataclass_fields__}
    rows, grey = [], {}
    for net, method in itertools.product(args.nets, METHODS):
        row = [f"{METHODS[method]}, {net} net"]
        for target in args.targets:
            scenario = args.source if method == "source" else target  # source-only training has no target
            results = []
            for seed in args.seeds:
                folder = args.output_dir / f"{scenario}-{net}-{method}-seed{seed}"
                own = {"target": scenario, "method": method, "net": net, "seed": seed, "output_dir": folder}
                results.append(train(Train(**shared | own)))
            if PartialState().is_main_process:
                values = [result["accuracy"].get(target, math.nan) for result in results]
                grey |= results[0]["grey"]
                row.append(f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""))
        rows.append(row)
    if not PartialState().is_main_process:
        return
    for method, reported in REPORTED.items():
        told = [" / ".join(f"{value:.2f}" for value in reported.get(target, ())) for target in args.targets]
        rows.append([f"{METHODS[method]}, the reports", *told])
    names = [f"{'grey ' if grey.get(target) and target != 'usps' else ''}{target}" for target in args.targets]
    rows.insert(0, ["last epoch, validation accuracy", *(f"{args.source} → {name}, %" for name in names)])
    save_table(rows, args.output_dir / "table", f"mean ± sd over seeds {', '.join(map(str, args.seeds))}")
    print((args.output_dir / "table.md").read_text())


def main(args: Train | Predict | Embed | Table) -> Any:
    """Run one sub-command."""
    return {Train: train, Predict: predict, Embed: embed, Table: table}[type(args)](args)


if __name__ == "__main__":
    runs.command_line(Train | Predict | Embed | Table, main)
