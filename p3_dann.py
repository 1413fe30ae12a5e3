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

import copy
import itertools
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import run as runs
from common.augment import augment_digits
from common.data import DIGIT_DOMAINS, DIGIT_SIZE, Images, draw_batch, is_grey, load_digits, load_folder, normalise
from common.figures import save_curves, save_table, save_tsne
from common.metrics import accuracy, classify
from common.run import Run, UserError, generator
from models.dann import NETS, ClassPrior

METHODS = {"source": "trained on source", "dann": "adapted by DANN", "target": "trained on target"}
REPORTED = {  # what three course reports state of their own nets, in %
    "source": {"svhn": (37.74, 33.7, 35.50), "usps": (75.25, 76.0, 74.40)},
    "dann": {"svhn": (42.06, 49.6, 61.57), "usps": (82.51, 82.6, 89.05)},
    "target": {"svhn": (98.40, 91.5, 94.15), "usps": (90.87, 98.3, 99.26)},
}
RECIPES = {  # what options left at None become, by net
    "deep": {"epochs": 20, "lr": 1.5e-3, "lambda_max": 0.7, "prior": 1.0, "augmentation": 0.85, "forward": "joint"},
    "cnn": {"epochs": 20, "lr": 1e-3, "lambda_max": 1.0, "prior": 0.5, "augmentation": 0.0, "forward": "joint"},
}
SCENARIO_RECIPES = {("deep", "usps"): {"prior": 0.5}}


@dataclass(kw_only=True)
class Recipe:
    """What `train` and `table` share; None stands for the recipe of the net."""

    output_dir: Path  # Where everything is written; the same command again continues an interrupted run.
    data_dir: Path = Path("hw2_data")  # Folder with digits/DOMAIN/{data,train.csv,val.csv}.
    device: runs.Device = "auto"  # Where to compute.
    precision: runs.Precision = "auto"  # bf16 autocast where the hardware is fast at it, or fp32.
    source: str = "mnistm"  # Labelled domain.
    epochs: int | None = None  # Epochs of --images-per-epoch images of each domain.
    images_per_epoch: int = 16_000  # Whatever the size of the data.
    batch_size: int = 64  # Images of each domain in a step, over all processes.
    lr: float | None = None  # Peak learning rate of AdamW.
    lambda_max: float | None = None  # Weight of the reversed gradient at the end of its ramp.
    prior: float | None = None  # Trust in predicted class frequencies of the target, 0 to 1; even ones in the source.
    augmentation: float | None = None  # Strength, the same for both domains; 0 is none.
    forward: Literal["joint", "separate"] | None = None  # Batch statistics over both domains together, or of each.
    label_smoothing: float = 0.05  # Of the class loss.
    ema_decay: float = 0.998  # Of the averaged net, the one that is judged and saved.


@dataclass(kw_only=True)
class Train(Recipe):
    """Train one net on one scenario. The last epoch counts: no epoch is chosen by target labels."""

    target: str = "svhn"  # Domain to adapt to; its labels are used by --method target only.
    seed: int = 0  # Seed of initialisation, order and augmentation.
    method: Literal["source", "dann", "target"] = "dann"  # Source labels only, DANN, or target labels (the ceiling).
    net: Literal["cnn", "deep"] = "deep"  # The reports' small net, or the stronger one of this project.


@dataclass(kw_only=True)
class Table(Recipe):
    """Train what is missing of source / DANN / target in every scenario; tabulate the mean ± sd over seeds."""

    targets: tuple[str, ...] = ("svhn", "usps")  # Domains to adapt to.
    nets: tuple[Literal["cnn", "deep"], ...] = ("deep",)  # Nets to compare.
    seeds: tuple[int, ...] = (0, 1, 2)  # One run for each.


@dataclass(kw_only=True)
class Predict:
    """Label every image of a folder and write the grader's csv."""

    checkpoint: Path  # model.safetensors of `train`, or a published DannCNN .pth.
    image_dir: Path  # PNG or JPEG images, grey or RGB, any size.
    output_csv: Path  # Rows image_name,label, sorted by name.
    device: runs.Device = "auto"  # Where to compute.


@dataclass(kw_only=True)
class Embed:
    """t-SNE of validation features, one figure by class and one by domain (PNG and PDF), and the features as npz."""

    checkpoint: Path  # model.safetensors of `train`.
    output_dir: Path  # Where the figures are written.
    data_dir: Path = Path("hw2_data")  # Folder with digits/DOMAIN/{data,val.csv}.
    per_domain: int = 1_000  # Validation images of each domain.
    target: str | None = None  # The other domain; None is the one that was adapted to.
    seed: int = 0  # Seed of the choice of images and of t-SNE.
    device: runs.Device = "auto"  # Where to compute.


def lambda_at(progress: float, lambda_max: float) -> float:
    """Weight of the reversed gradient at progress p in [0, 1]: from 0 up to lambda_max (section 5.2.2)."""
    return lambda_max * (2 / (1 + math.exp(-10 * progress)) - 1)


def losses_of(net: nn.Module, images: Tensor, labels: Tensor, lambd: float, args: Recipe, prior: ClassPrior) -> dict:
    """Class loss of the labelled images, which come first in (batch, 3, 28, 28); domain loss if others follow."""
    labelled = len(labels)
    if args.forward == "joint" or len(images) == labelled:  # batch normalisation sees the mixture of both domains
        class_log_p, domain_log_p = net(images, lambd)
        class_log_p, target_log_p = class_log_p[:labelled], class_log_p[labelled:]
    else:  # each domain is normalised by its own batch; the running statistics are of both
        (class_log_p, source), (target_log_p, target) = net(images[:labelled], lambd), net(images[labelled:], lambd)
        domain_log_p = torch.cat([source, target])
    losses = {"class_loss": F.cross_entropy(class_log_p, labels, label_smoothing=args.label_smoothing)}
    losses["class_accuracy"] = (class_log_p.argmax(1) == labels).float().mean()
    if len(images) > labelled:
        domain = (torch.arange(len(images), device=images.device) >= labelled).long()  # 0 source, 1 target
        # One mean over both domains, half of equation 9's sum of two: lambda = 1 is the paper's 0.5.
        weights = torch.cat([prior.weights(labels), torch.ones_like(target_log_p[:, 0])])
        prior.update(target_log_p)
        losses["domain_loss"] = (weights * F.nll_loss(domain_log_p, domain, reduction="none")).mean()
        losses["domain_accuracy"] = (domain_log_p.argmax(1) == domain).float().mean()
    return losses


def train(args: Train) -> dict[str, Any]:
    """Train one run; returns the content of result.json (on the main process)."""
    recipe = RECIPES[args.net] | SCENARIO_RECIPES.get((args.net, args.target), {})
    args = replace(args, **{key: value for key, value in recipe.items() if getattr(args, key) is None})
    accelerator = runs.make_accelerator(args.device, args.precision)
    run = Run(args, accelerator)
    if run.result is not None:
        return run.result if run.is_main else {}
    pixels, labels, target_pixels, validation = load_data(args, accelerator.device)

    torch.manual_seed(runs.derive_seed(args.seed, "init"))
    bare_net = NETS[args.net]().to(accelerator.device, memory_format=torch.channels_last)
    bare_net.domain_classifier.requires_grad_(args.method == "dann")
    parameters = [p for p in bare_net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, fused=True)
    ema = copy.deepcopy(bare_net)
    net, optimizer = accelerator.prepare(bare_net, optimizer)
    prior = ClassPrior(trust=args.prior).to(accelerator.device)
    parts = {"net": bare_net, "ema": ema, "optimizer": optimizer, "prior": prior}

    steps_per_epoch = max(1, args.images_per_epoch // args.batch_size)
    last = args.epochs * steps_per_epoch
    for step in run.steps(run.load_state(parts), last, args.batch_size * (2 if args.method == "dann" else 1)):
        net.train()
        lambd = lambda_at(step / last, args.lambda_max)
        learning_rate = optimizer.param_groups[0]["lr"] = args.lr * runs.warmup_cosine(step / last, warm_up=0.1)
        torch.manual_seed(runs.derive_seed(args.seed, "dropout", step, accelerator.process_index))
        rng = generator(args.seed, "augment", step, accelerator.process_index, device=accelerator.device)
        rows = draw_batch(len(pixels), step, args.batch_size, accelerator, args.seed, "labelled")
        images = pixels[rows]
        if args.method == "dann":
            target_rows = draw_batch(len(target_pixels), step, args.batch_size, accelerator, args.seed, "unlabelled")
            images = torch.cat([images, target_pixels[target_rows]])
        images = augment_digits(normalise(images), rng, args.augmentation).contiguous(memory_format=torch.channels_last)
        losses = losses_of(net, images, labels[rows], lambd, args, prior)
        optimizer.zero_grad()
        prior.frequencies.copy_(accelerator.reduce(prior.frequencies, "mean"))  # the same for all processes
        # Equation 9: the extractor descends class loss - lambda * domain loss; the reversal layer carries the minus.
        accelerator.backward(losses["class_loss"] + losses.get("domain_loss", 0.0))
        optimizer.step()
        runs.update_ema(ema, bare_net, args.ema_decay, step)

        run.add(step, losses)
        epoch, inside = divmod(step + 1, steps_per_epoch)
        if inside == 0:
            row = {"step": step + 1, "epoch": epoch, "lambda": lambd, "learning_rate": learning_rate}
            end_epoch(run, args, ema, validation, row | run.means(steps_per_epoch))
        if run.save_due() or inside == 0:
            run.save_state(step + 1, parts)
    if run.is_main:
        finish(run, args, ema, validation)
    return run.result or {}


def load_data(args: Train, device: torch.device) -> tuple[Tensor, Tensor, Tensor, dict[str, Images]]:
    """Training images, their labels, unlabelled ones of the target; validation images by domain (source-only: all)."""
    cache = args.output_dir.parent / "cache"
    labelled = load_digits(args.data_dir, args.target if args.method == "target" else args.source, "train", cache)
    target_pixels = load_digits(args.data_dir, args.target, "train", cache).pixels
    others = [d for d in DIGIT_DOMAINS if (args.data_dir / "digits" / d).is_dir()] if args.method == "source" else []
    judged = dict.fromkeys([args.target, *others, args.source])
    validation = {domain: load_digits(args.data_dir, domain, "val", cache) for domain in judged}
    return labelled.pixels.to(device), labelled.labels.to(device), target_pixels.to(device), validation


def end_epoch(run: Run, args: Train, net: nn.Module, validation: dict[str, Images], row: dict[str, Any]) -> None:
    """Judge the averaged net on the validation images (for the record: nothing is chosen by it), log, warn."""
    if not run.is_main:
        return
    row |= {f"accuracy_{d}": accuracy(net, i, run.accelerator) for d, i in validation.items() if d != args.source}
    run.metrics(row)
    told = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in row.items() if k not in ("step", "epoch"))
    run.log(f"epoch {row['epoch']}/{args.epochs}: {told}")
    if row["class_accuracy"] < max(before["class_accuracy"] for before in run.history()) - 0.05:
        run.log("warning: class accuracy fell by 5 points or more; a smaller --lambda-max or --lr may help")
    if args.method == "dann" and row["epoch"] > args.epochs // 2 and not 0.45 < row["domain_accuracy"] < 0.98:
        run.log(f"warning: domain accuracy is {row['domain_accuracy']:.0%}: the domain classifier collapsed or wins")


def finish(run: Run, args: Train, net: nn.Module, validation: dict[str, Images]) -> None:
    """Judge the last epoch on every validation set; write curves, model and result.json."""
    rows = run.history()
    recorded = {d: [row[f"accuracy_{d}"] for row in rows] for d in validation if d != args.source}
    result = {
        "accuracy": {d: accuracy(net, images, run.accelerator) for d, images in validation.items()},
        "grey": {d: is_grey(images.pixels) for d, images in validation.items()},
        "largest_swing_of_last_5_epochs": {d: np.abs(np.diff(v[-5:])).max(initial=0) for d, v in recorded.items()},
        "oracle_best_accuracy": {d: max(values) for d, values in recorded.items()},  # chosen by labels: not a result
    }
    panels = {"losses": ["class_loss", "domain_loss"], "training accuracy": ["class_accuracy", "domain_accuracy"]}
    panels |= {"validation accuracy, %": [k for k in rows[-1] if k.startswith("accuracy_")], "schedule": ["lambda"]}
    save_curves(rows, panels, run.dir / "figures" / "curves.png")
    run.save_model(net, net.config | {key: getattr(args, key) for key in ("source", "target", "method", "seed")})
    run.log(f"{run.dir}: " + ", ".join(f"{d} {value:.2f} %" for d, value in result["accuracy"].items()))
    run.finish(result)


def predict(args: Predict) -> None:
    """Write the class of every image of a folder as csv."""
    accelerator = runs.make_accelerator(args.device, "fp32")
    runs.make_output_dir(args.output_csv.parent, "--output-csv")
    net = runs.load_net(args.checkpoint, NETS)[0].to(accelerator.device)
    images = load_folder(args.image_dir, DIGIT_SIZE)
    labels = classify(net, images.pixels, accelerator).tolist()
    rows = [f"{name},{label}\n" for name, label in zip(images.names, labels, strict=True)]
    runs.atomic_write(args.output_csv, "image_name,label\n" + "".join(rows))
    print(f"{len(rows):,} images labelled: {args.output_csv}")


@torch.inference_mode()
def embed(args: Embed) -> None:
    """Draw t-SNE of the features of both domains' validation images, by class and by domain."""
    device = runs.make_accelerator(args.device, "fp32").device
    net, config = runs.load_net(args.checkpoint, NETS)
    domains, parts = [config.get("source"), args.target or config.get("target")], []
    if None in domains or domains[0] == domains[1]:
        raise UserError(f"--checkpoint {args.checkpoint}: does not say its domains; --target names the other one")
    runs.make_output_dir(args.output_dir)
    for number, name in enumerate(domains):
        images = load_digits(args.data_dir, name, "val")
        rows = torch.randperm(len(images.names), generator=generator(args.seed, "embed", name))[: args.per_domain]
        features = net.to(device).features(normalise(images.pixels[rows]).to(device)).cpu()
        parts.append((features, images.labels[rows], torch.full((len(rows),), number)))
    features, labels, domain = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    kinds = {"class": (labels, range(10)), "domain": (domain, domains)}
    save_tsne(features, kinds, f"{' → '.join(domains)}, {METHODS[config['method']]}", args.output_dir, args.seed)
    print(f"t-SNE of {len(features):,} images: {args.output_dir}/tsne_class.png and tsne_domain.png")


def table(args: Table) -> None:
    """Train the missing runs; write table.csv, table.md and table.png beside them."""
    if not args.seeds:
        raise UserError("--seeds: at least one is needed")
    shared = {field.name: getattr(args, field.name) for field in fields(Recipe) if field.name != "output_dir"}
    rows, grey = [], {}
    for net, method in itertools.product(args.nets, METHODS):
        rows.append([f"{METHODS[method]}, {net} net"])
        for target in args.targets:
            scenario = args.source if method == "source" else target  # source-only training has no target
            shared |= {"target": scenario, "method": method, "net": net}
            name = f"{scenario}-{net}-{method}-seed"
            results = [train(Train(**shared, seed=s, output_dir=args.output_dir / f"{name}{s}")) for s in args.seeds]
            if all(results):  # only the main process has them
                values = [result["accuracy"].get(target, math.nan) for result in results]
                rows[-1].append(f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if values[1:] else ""))
                grey |= results[0]["grey"]
    if not grey:
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
