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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
from accelerate import Accelerator
from sklearn.manifold import TSNE
from torch import Tensor, nn
from torch.nn import functional as F

from common import run as runs
from common.augment import augment_digits
from common.data import DIGIT_DOMAINS, DIGIT_SIZE, Images, decode_images, list_images, load_digits, normalise, shuffled
from common.figures import save_curves, save_figure, save_table
from common.run import Run, UserError, generator
from models.dann import NETS

METHODS = {"source": "trained on source", "dann": "adapted by DANN", "target": "trained on target"}
REPORTED = {  # what the five course reports state of their own nets, in %
    "source": {"svhn": (37.74, 33.7, 35.50), "usps": (75.25, 76.0, 74.40)},
    "dann": {"svhn": (42.06, 49.6, 61.57), "usps": (82.51, 82.6, 89.05)},
    "target": {"svhn": (98.40, 91.5, 94.15), "usps": (90.87, 98.3, 99.26)},
}
RECIPES = {  # what the options left at None become, by net
    "deep": {"epochs": 20, "lr": 2e-3, "lambda_max": 0.3, "augmentation": 1.0},
    "cnn": {"epochs": 20, "lr": 1e-3, "lambda_max": 0.3, "augmentation": 0.0},
}


@dataclass(kw_only=True)
class Options:
    """What every command but `predict` takes."""

    output_dir: Path  # Where everything is written; the same command again continues an interrupted run.
    data_dir: Path = Path("hw2_data")  # Folder with digits/DOMAIN/{data,train.csv,val.csv}.
    seed: int = 0  # Seed of initialisation, order, augmentation and choice of images.
    device: runs.Device = "auto"  # Where to compute.
    precision: runs.Precision = "auto"  # bf16 autocast where the hardware is fast at it, or fp32.


@dataclass(kw_only=True)
class Train(Options):
    """Train one net on one scenario. The last epoch counts: no epoch is chosen by target labels."""

    source: str = "mnistm"  # Labelled domain.
    target: str = "svhn"  # Domain to adapt to; its labels are used by --method target only.
    method: Literal["source", "dann", "target"] = "dann"  # Train on source labels only, adapt (DANN), or train on target labels (the ceiling).
    net: Literal["cnn", "deep"] = "deep"  # The reports' small net, or the stronger one of this project.
    epochs: int | None = None  # Epochs of --images-per-epoch labelled images; None, here and below: the recipe of the net.
    images_per_epoch: int = 16_000  # Images of each domain in an epoch, whatever the size of the data.
    batch_size: int = 128  # Images of each domain in a step, over all processes.
    lr: float | None = None  # Peak learning rate of AdamW.
    lambda_max: float | None = None  # Weight of the reversed gradient at the end of its ramp.
    augmentation: float | None = None  # Strength of the augmentation of both domains; 0 is none.
    weight_decay: float = 0.01  # Of AdamW.
    label_smoothing: float = 0.05  # Of the class loss.
    ema_decay: float = 0.99  # Of the averaged net, the one that is judged and saved.


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


@dataclass(kw_only=True)
class Table(Options):
    """Train what is missing of source / DANN / target in both scenarios, and tabulate the mean ± sd over seeds."""

    source: str = "mnistm"  # Labelled domain.
    targets: tuple[str, ...] = ("svhn", "usps")  # Domains to adapt to.
    nets: tuple[Literal["cnn", "deep"], ...] = ("deep",)  # Nets to compare.
    seeds: tuple[int, ...] = (0, 1, 2)  # One run for each, instead of --seed.
    epochs: int | None = None  # Epochs of every run.
    images_per_epoch: int = 16_000  # As in train.


def lambda_at(progress: float, lambda_max: float) -> float:
    """Weight of the reversed gradient at progress p in [0, 1]: from 0 up to lambda_max (section 5.2.2)."""
    return lambda_max * (2 / (1 + math.exp(-10 * progress)) - 1)


def losses_of(
    net: nn.Module, labelled: Tensor, labels: Tensor, unlabelled: Tensor | None, lambd: float, smoothing: float
):
    """Class loss of labelled images (batch, 3, 28, 28) and, given unlabelled ones of the target, domain loss of both.

    One forward over both domains, so that batch normalisation sees in training the mixture that it keeps statistics of.
    """
    images = labelled if unlabelled is None else torch.cat([labelled, unlabelled])
    class_logits, domain_logits = net(images.contiguous(memory_format=torch.channels_last), lambd)
    class_logits = class_logits[: len(labelled)]
    losses = {"class_loss": F.cross_entropy(class_logits, labels, label_smoothing=smoothing)}  # equation 1
    losses["source_accuracy"] = (class_logits.argmax(1) == labels).float().mean()
    if unlabelled is not None:
        domain = torch.cat([labels.new_zeros(len(labelled)), labels.new_ones(len(unlabelled))])
        losses["domain_loss"] = F.cross_entropy(domain_logits, domain)  # equation 2
        losses["domain_accuracy"] = (domain_logits.argmax(1) == domain).float().mean()
    return losses


def train(args: Train) -> dict[str, Any]:
    """Train one run; returns the content of result.json."""
    args = replace(args, **{key: value for key, value in RECIPES[args.net].items() if getattr(args, key) is None})
    accelerator = runs.make_accelerator(args.device, args.precision)
    device, rank, processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    for flag, domain in (("--source", args.source), ("--target", args.target)):
        if not (args.data_dir / "digits" / domain).is_dir():
            raise UserError(f"{flag} {domain}: no such domain in --data-dir {args.data_dir}")
    if not 1 < args.batch_size <= args.images_per_epoch or args.batch_size % processes:
        raise UserError(f"--batch-size {args.batch_size}: must be shared by {processes} processes and fit in an epoch")
    run = Run(args, accelerator)
    if run.result is not None:
        return run.result
    cache = args.output_dir.parent / "cache"
    labelled = load_digits(args.data_dir, args.target if args.method == "target" else args.source, "train", cache)
    pixels, labels = labelled.pixels.to(device), labelled.labels.to(device)
    target_pixels = load_digits(args.data_dir, args.target, "train", cache).pixels.to(device)  # its labels stay unread
    validation = load_validation(args, cache)

    torch.manual_seed(runs.derive_seed(args.seed, "init"))
    raw_net = NETS[args.net]().to(device, memory_format=torch.channels_last)
    raw_net.domain_classifier.requires_grad_(args.method == "dann")
    optimizer = torch.optim.AdamW([p for p in raw_net.parameters() if p.requires_grad], weight_decay=args.weight_decay)
    ema, done, sums = runs.make_ema(raw_net, args.ema_decay), 0, {}
    net, optimizer = accelerator.prepare(raw_net, optimizer)
    if (state := run.load_state()) is not None:
        raw_net.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        done, sums = state["step"], {key: value.to(device) for key, value in state["sums"].items()}

    steps_per_epoch = args.images_per_epoch // args.batch_size
    last_step = args.epochs * steps_per_epoch
    for step in run.steps(done, last_step, args.batch_size * (2 if args.method == "dann" else 1)):
        net.train()
        lambd = lambda_at(step / last_step, args.lambda_max)
        optimizer.param_groups[0]["lr"] = args.lr * runs.warmup_cosine(step / last_step, warm_up=0.1)
        torch.manual_seed(runs.derive_seed(args.seed, "dropout", step, rank))
        rng = generator(args.seed, "augment", step, rank, device=device)
        span = (step * args.batch_size, args.batch_size, args.seed)
        rows = shuffled(len(pixels), *span, "labelled")[rank::processes].to(device)
        images, unlabelled = augment_digits(normalise(pixels[rows]), rng, args.augmentation), None
        if args.method == "dann":
            target_rows = shuffled(len(target_pixels), *span, "unlabelled")[rank::processes].to(device)
            unlabelled = augment_digits(normalise(target_pixels[target_rows]), rng, args.augmentation)

        losses = losses_of(net, images, labels[rows], unlabelled, lambd, args.label_smoothing)
        optimizer.zero_grad()
        # Equation 9: the extractor descends class loss - lambda * domain loss; the reversal layer carries the minus.
        accelerator.backward(losses["class_loss"] + losses.get("domain_loss", 0.0))
        optimizer.step()
        ema.update_parameters(raw_net)

        sums = {key: sums.get(key, 0.0) + value.detach() for key, value in losses.items()}
        epoch, inside = divmod(step + 1, steps_per_epoch)
        if inside == 0:
            means = {key: value.item() / steps_per_epoch for key, value in sums.items()}
            schedules = {"lambda": lambd, "learning_rate": optimizer.param_groups[0]["lr"]}
            end_epoch(run, args, ema.module, validation, {"step": step + 1, "epoch": epoch} | schedules | means)
            sums = {}
        if inside == 0 or run.save_due():
            state = {"net": raw_net.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            run.save_state(step + 1, sums=sums, **state)
    return finish(run, args, ema.module, validation)


def load_validation(args: Train, cache: Path) -> dict[str, Images]:
    """Validation images by domain: target and source; for source-only, which has no target, every domain there is."""
    others = [d for d in DIGIT_DOMAINS if (args.data_dir / "digits" / d).is_dir()] if args.method == "source" else []
    return {d: load_digits(args.data_dir, d, "val", cache) for d in dict.fromkeys([args.target, *others, args.source])}


@torch.inference_mode()
def classify(net: nn.Module, pixels: Tensor, accelerator: Accelerator) -> Tensor:
    """The class of uint8 images (n, 3, 28, 28), as int64 (n,)."""
    net.eval()
    with accelerator.autocast():
        return torch.cat([net(normalise(some.to(accelerator.device)))[0].argmax(1).cpu() for some in pixels.split(500)])


def accuracy(net: nn.Module, images: Images, accelerator: Accelerator) -> float:
    """Share of `images` classified right, in %."""
    return 100 * (classify(net, images.pixels, accelerator) == images.labels).double().mean().item()


def end_epoch(run: Run, args: Train, net: nn.Module, validation: dict[str, Images], row: dict[str, Any]) -> None:
    """Judge the averaged net on the validation images (for the record: nothing is chosen by it), log, warn."""
    if not run.is_main:
        return
    before = run.history()
    judged = {d: images for d, images in validation.items() if d != args.source}
    row |= {f"accuracy_{d}": accuracy(net, images, run.accelerator) for d, images in judged.items()}
    run.metrics(row)
    told = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in row.items() if k not in ("step", "epoch"))
    run.log(f"epoch {row['epoch']}/{args.epochs}: {told}")
    if row["source_accuracy"] < max((r["source_accuracy"] for r in before), default=0) - 0.05:
        run.log("warning: source accuracy fell by 5 points or more; a smaller --lambda-max or --lr may help")
    if args.method == "dann" and row["epoch"] > args.epochs // 2 and not 0.45 < row["domain_accuracy"] < 0.98:
        run.log(f"warning: domain accuracy is {row['domain_accuracy']:.0%}: the domain classifier collapsed or wins")


def finish(run: Run, args: Train, net: nn.Module, validation: dict[str, Images]) -> dict[str, Any]:
    """Judge the last epoch on every validation set, write the model and result.json."""
    run.accelerator.wait_for_everyone()
    rows = run.history()
    recorded = [row[f"accuracy_{args.target}"] for row in rows]
    result = {
        "accuracy": {d: accuracy(net, images, run.accelerator) for d, images in validation.items()},
        "validation_images": {d: len(images.names) for d, images in validation.items()},
        "grey": {d: bool((images.pixels == images.pixels[:, :1]).all()) for d, images in validation.items()},
        "largest_swing_of_last_5_epochs": max((abs(a - b) for a, b in itertools.pairwise(recorded[-5:])), default=0.0),
        "oracle_best_epoch": max(recorded, default=0.0),
    }
    domains = {"source": args.source, "target": args.target, "method": args.method, "seed": args.seed}
    run.save_model(net, net.config | domains)
    panels = {"losses": ["class_loss", "domain_loss"], "training accuracy": ["source_accuracy", "domain_accuracy"]}
    panels |= {"validation accuracy, %": [k for k in rows[-1] if k.startswith("accuracy_")], "schedule": ["lambda"]}
    if run.is_main:
        save_curves(rows, panels, run.dir / "figures" / "curves.png")
    run.log(f"{run.dir}: " + ", ".join(f"{d} {value:.2f} %" for d, value in result["accuracy"].items()))
    return run.finish(result)


def load_net(checkpoint: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A net of `train`, or a published DannCNN, with its configuration."""
    weights, config = runs.load_weights(checkpoint)
    net = NETS[config.get("net", "cnn")]()
    runs.load_into(net, weights, checkpoint)
    return net.eval(), config


def predict(args: Predict) -> None:
    """Write the class of every image of a folder as csv."""
    accelerator = runs.make_accelerator(args.device, "fp32")
    net, _ = load_net(args.checkpoint)
    paths = list_images(args.image_dir)
    labels = classify(net.to(accelerator.device), decode_images(paths, DIGIT_SIZE), accelerator).tolist()
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
    points = TSNE(init="pca", random_state=args.seed).fit_transform(features)  # (images, 2)
    arrays = {"features": features, "labels": labels, "domain": domain, "points": points}
    runs.atomic_write(args.output_dir / "features.npz", lambda path: np.savez(path, **arrays))
    for kind, values, names in (("class", labels, range(10)), ("domain", domain, domains)):
        figure, axis = plt.subplots(figsize=(7, 6))
        for value, name in enumerate(names):
            axis.scatter(*points[values == value].T, s=5, color=f"C{value}", alpha=0.6, label=name)
        axis.set(title=f"{' → '.join(domains)}, {METHODS[config['method']]}: t-SNE by {kind}", xticks=[], yticks=[])
        axis.legend(title=kind, markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))
        save_figure(figure, args.output_dir / f"tsne_{kind}.png", ("png", "pdf"))
    print(f"t-SNE of {len(points):,} images: {args.output_dir}/tsne_class.png and tsne_domain.png")


def table(args: Table) -> None:
    """Train the missing runs; write table.csv, table.md and table.png beside them."""
    common = {
        name: getattr(args, name)
        for name in ("data_dir", "device", "precision", "source", "epochs", "images_per_epoch")
    }
    rows, grey = [], {}
    for net, method in itertools.product(args.nets, METHODS):
        cells = []
        for target in args.targets:
            scenario = "source" if method == "source" else target  # one source-only run serves every target
            trained = args.targets[0] if method == "source" else target
            folders = {seed: args.output_dir / scenario / f"{net}-{method}-seed{seed}" for seed in args.seeds}
            options = {"target": trained, "method": method, "net": net, **common}
            results = [train(Train(output_dir=folder, seed=seed, **options)) for seed, folder in folders.items()]
            values = [result["accuracy"][target] for result in results]
            grey |= results[0]["grey"]
            cells.append(f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""))
        rows.append([f"{METHODS[method]}, {net} net", *cells])
    for method, reported in REPORTED.items():
        told = [" / ".join(f"{value:.2f}" for value in reported.get(target, ())) for target in args.targets]
        rows.append([f"{METHODS[method]}, the reports", *told])
    names = [
        f"{args.source} → {'grey ' if grey.get(target) and target != 'usps' else ''}{target}, %"
        for target in args.targets
    ]
    save_table(
        [["last epoch, validation accuracy", *names], *rows],
        args.output_dir / "table",
        f"mean ± sd, seeds {args.seeds}",
    )
    print((args.output_dir / "table.md").read_text())


def main(args: Train | Predict | Embed | Table) -> Any:
    """Run one sub-command."""
    return {Train: train, Predict: predict, Embed: embed, Table: table}[type(args)](args)


if __name__ == "__main__":
    runs.command_line(Train | Predict | Embed | Table, main)
