"""Scores of generated images, the graders' and more, and the training of a judge of digits.

    python score.py fid SAMPLES hw2_data/face/val --floor hw2_data/face/train --output-dir runs/p1/score/fid
    python score.py fid SAMPLES hw2_data/face/val --features random
    python score.py faces SAMPLES --real hw2_data/face/val
    python score.py digits SAMPLES --classifier Classifier.pth --real hw2_data --domain mnistm
    python score.py train-classifier --domain svhn --output-dir runs/judge/svhn
    python score.py mse SAMPLES hw2_data/face/GT

FID: Heusel et al. 2017, https://arxiv.org/abs/1706.08500, by the net of https://github.com/mseitzer/pytorch-fid, whose
figures are met to 1e-3. Where its weights cannot be had, `--features random` takes a net with random ones, which tells
sets of images apart too (Naeem et al. 2020, https://arxiv.org/abs/2002.09797); its distances have a scale of their own.
Diversity of digits: the Vendi score, Friedman and Dieng 2022, https://arxiv.org/abs/2210.02410.
"""

from __future__ import annotations

import copy
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from tyro.conf import Positional

from common import run as runs
from common.augment import augment_digits
from common.data import draw_batch, is_grey, load_digits, normalise
from common.figures import save_curves
from common.metrics import accuracy
from common.run import Run, UserError, generator
from models.digit_classifier import DigitResNet
from scoring import digits as judging
from scoring import frechet
from scoring.faces import face_rate
from scoring.pairs import squared_errors

Score = tuple[dict[str, Any], str]  # what result.json holds, and the lines that are printed


@dataclass
class Fid:
    """Fréchet distance of two sets of images: FID as pytorch-fid computes it, or the one of random features."""

    generated: Positional[Path]  # Folder of PNG or JPEG images of one size, sub-folders included; or statistics (.npz).
    real: Positional[Path]  # The same, to compare with.
    features: Literal["inception", "random"] = "inception"  # The net of FID, or one that needs no weights (not FID).
    weights: Path | None = None  # pt_inception-2015-12-05-6726825d.pth; else torch's hub cache or a download.
    floor: Path | None = None  # Folder of other real images: as many as are in the first are compared with the second.
    save_stats: Path | None = None  # Keep the second's statistics here (.npz), to be given in its place next time.
    batch_size: int = 50  # Images at a time.
    device: runs.Device = "auto"  # Where the inception net computes; the random one always takes the CPU.
    seed: int = 0  # Of the choice of the images of --floor.
    output_dir: Path | None = None  # Where result.json is written; without it the result is only printed.


@dataclass
class Faces:
    """Rate of images in which dlib's frontal HOG detector, upsampled once, finds exactly one face."""

    images: Positional[Path]  # Folder of PNG or JPEG images, sub-folders included.
    real: Path | None = None  # Folder of real images, whose rate is told beside it.
    num_workers: int = os.cpu_count() or 1  # Threads.
    output_dir: Path | None = None  # Where result.json is written; without it the result is only printed.


@dataclass
class Digits:
    """Accuracy of generated digits before a classifier, overall and by digit, and how diverse they are."""

    images: Positional[Path]  # Folder of nothing but 28x28 images DIGIT_NAME.png, read as the graders read it.
    classifier: Path  # The course's Classifier.pth, or model.safetensors of train-classifier.
    real: Path | None = None  # Data folder whose validation images' accuracy and diversity are told beside it.
    domain: str = "mnistm"  # The domain of --real.
    seed: int = 0  # Of the choice of real images.
    device: runs.Device = "auto"  # Where to compute.
    output_dir: Path | None = None  # Where result.json and confusion.png are written; without it nothing is.


@dataclass(kw_only=True)
class TrainClassifier:
    """Train a residual net on a domain's digits: a judge independent of the course's. The last epoch counts."""

    output_dir: Path  # Where everything is written; the same command again continues an interrupted run.
    data_dir: Path = Path("hw2_data")  # Folder with digits/DOMAIN/{data,train.csv,val.csv}.
    domain: str = "mnistm"  # Whose digits.
    width: int = 32  # Channels of the net's first stage; half of them cost a quarter.
    epochs: int = 20  # Epochs of --images-per-epoch images.
    images_per_epoch: int = 16_000  # Whatever the size of the data.
    batch_size: int = 128  # Images of a step, over all processes.
    lr: float = 3e-3  # Peak learning rate of AdamW.
    augmentation: float = 0.5  # Strength; 0 is none.
    label_smoothing: float = 0.05  # Of the loss.
    ema_decay: float = 0.998  # Of the averaged net, the one that is judged and saved.
    seed: int = 0  # Of initialisation, order and augmentation.
    device: runs.Device = "auto"  # Where to compute.
    precision: runs.Precision = "auto"  # bf16 autocast where the hardware is fast at it, or fp32.


@dataclass
class Mse:
    """Mean squared error of images, 0 to 255, against given ones of the same names: the graders' measure of DDIM."""

    predicted: Positional[Path]  # Folder of PNG or JPEG images.
    truth: Positional[Path]  # The same, with the images to compare with.
    output_dir: Path | None = None  # Where result.json is written; without it the result is only printed.


def fid(args: Fid, accelerator: Accelerator) -> Score:
    """The distance; beside it the floor, that of other real images, which no generator can honestly beat."""
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: at least one is needed")
    if args.save_stats and args.save_stats.suffix != ".npz":
        raise UserError(f"--save-stats {args.save_stats}: must end in .npz")
    sources = {"generated": frechet.open_source(args.generated), "real": frechet.open_source(args.real)}
    if args.floor:
        sources["floor"] = frechet.draw_floor(args.floor, sources["generated"], args.seed)

    def embedding() -> tuple[str, frechet.Embedding]:
        if args.features == "random":
            return frechet.random_features()
        return frechet.inception_features(args.weights, accelerator.device)

    found = frechet.measure(sources, embedding, args.batch_size)
    real = found["real"]
    if args.save_stats:
        frechet.save_statistics(args.save_stats, real)
    distances = {k: frechet.frechet_distance(*found[k][:2], *real[:2]) for k in found if k != "real"}
    told = {k: f"{f'{s.count:,}' if s.count else 'unknown'} images of {s.path}" for k, s in sources.items()}
    metric = frechet.METRICS.get(real.features, f"Fréchet distance of {real.features} features")
    line = f"{metric} {distances['generated']:.3f}: {told['generated']} against {told['real']} ({real.features})"
    line += f"; floor {distances['floor']:.3f}: {told['floor']}" if args.floor else ""
    result = {"metric": metric, "distance": distances["generated"], "floor": distances.get("floor")}
    return result | {"features": real.features, "images": {k: source.count for k, source in sources.items()}}, line


def faces(args: Faces, accelerator: Accelerator) -> Score:
    """The rate, and that of real images beside it."""
    if args.num_workers < 1:
        raise UserError(f"--num-workers {args.num_workers}: at least one is needed")
    rates = {folder: face_rate(folder, args.num_workers) for folder in (args.images, args.real) if folder}
    lines = [
        f"{rate['one_face_percent']:.2f} % of {rate['images']:,} images of {folder} (none in {rate['none']:,}, several "
        f"in {rate['several']:,}; {len(rate['unreadable']):,} unreadable)"
        for folder, rate in rates.items()
    ]
    result = {"metric": "exactly one face", **rates[args.images], "real": rates.get(args.real)}
    return result, "exactly one face in " + ", in ".join(lines)


def digits(args: Digits, accelerator: Accelerator) -> Score:
    """Accuracy and diversity, those of real validation images beside them; draws the confusion matrix."""
    net = runs.load_net(args.classifier, judging.NETS, "--classifier")[0].to(accelerator.device)
    images = judging.read_digits(args.images)
    real = load_digits(args.real, args.domain, "val", flag="--real") if args.real else None
    result = judging.judge(net, images, real, accelerator, args.seed)
    title = f"accuracy {result['accuracy']:.2f} % of {len(images.names):,} images"
    line = f"{title} of {args.images} ({type(net).__name__})"
    if real:
        name = f"{'grey ' if is_grey(real.pixels) else ''}{args.domain}"
        line += f", {result['real_accuracy']:.2f} % of {len(real.names):,} real ones ({name}, val)"
        share, spread = result["diversity_percent_of_real"], result["real_diversity_sd"]
        line += f"; diversity {share:.1f} % of real images'" if share is not None else "; diversity undefined"
        line += f" (which vary by ± {spread:.1f} %)" if spread is not None else ""
    if args.output_dir:
        judging.save_confusion(result["confusion"], args.output_dir / "confusion.png", title)
    result = {"metric": "accuracy", "net": type(net).__name__, **result}
    return result, f"{line}\n{judging.table_of(result['digits'])}"


def mse(args: Mse, accelerator: Accelerator) -> Score:
    """The error of each image, and their mean."""
    errors = squared_errors(args.predicted, args.truth)
    mean = float(np.mean(list(errors.values())))
    lines = [f"{name} {error:.3f}" for name, error in errors.items()]
    lines.append(f"mean squared error {mean:.3f} (0-255) of {len(errors):,} images of {args.predicted}")
    return {"metric": "mean squared error, 0-255", "mse": mean, "images": errors}, "\n".join(lines)


def train_classifier(args: TrainClassifier) -> dict[str, Any]:
    """Train the judge; returns the content of result.json (on the main process)."""
    accelerator = runs.make_accelerator(args.device, args.precision)
    run = Run(args, accelerator)
    if run.result is not None:
        return run.result if run.is_main else {}
    cache = args.output_dir.parent / "cache"
    images, validation = (load_digits(args.data_dir, args.domain, split, cache) for split in ("train", "val"))
    pixels, labels = images.pixels.to(accelerator.device), images.labels.to(accelerator.device)

    torch.manual_seed(runs.derive_seed(args.seed, "init"))
    bare_net = DigitResNet(width=args.width).to(accelerator.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(bare_net)
    net, optimizer = accelerator.prepare(
        bare_net, torch.optim.AdamW(bare_net.parameters(), weight_decay=0.05, fused=True)
    )
    parts = {"net": bare_net, "ema": ema, "optimizer": optimizer}
    steps_per_epoch = max(1, args.images_per_epoch // args.batch_size)
    last = args.epochs * steps_per_epoch
    for step in run.steps(run.load_state(parts), last, args.batch_size):
        net.train()
        learning_rate = optimizer.param_groups[0]["lr"] = args.lr * runs.warmup_cosine(step / last, warm_up=0.1)
        rng = generator(args.seed, "augment", step, accelerator.process_index, device=accelerator.device)
        rows = draw_batch(len(pixels), step, args.batch_size, accelerator, args.seed, "order")
        # Inverted digits stay digits: MNIST-M holds the inverse of each, and house numbers may be dark or bright.
        some = augment_digits(normalise(pixels[rows]), rng, args.augmentation)
        logits = net(some.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=args.label_smoothing)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        runs.update_ema(ema, bare_net, args.ema_decay, step)

        run.add(step, {"loss": loss, "accuracy": 100 * (logits.argmax(1) == labels[rows]).float().mean()})
        epoch, inside = divmod(step + 1, steps_per_epoch)
        if inside == 0:
            row = {"step": step + 1, "epoch": epoch, "learning_rate": learning_rate, **run.means(steps_per_epoch)}
            run.metrics(row)
            run.log(f"epoch {epoch}/{args.epochs}: loss {row['loss']:.4f}, accuracy {row['accuracy']:.2f} %")
        if run.save_due() or inside == 0:
            run.save_state(step + 1, parts)
    if run.is_main:
        found = {"accuracy": accuracy(ema, validation, accelerator), "grey": is_grey(validation.pixels)}
        name = f"{'grey ' if found['grey'] else ''}{args.domain}"
        panels = {"loss": ["loss"], "accuracy of the augmented images, %": ["accuracy"]}
        save_curves(run.history(), panels, run.dir / "figures" / "curves.png")
        run.save_model(ema, ema.config | {"domain": args.domain, "seed": args.seed})
        run.log(f"{run.dir}: {found['accuracy']:.2f} % of {len(validation.names):,} val images of {name}")
        run.finish(found)
    return run.result or {}


COMMANDS = {Fid: fid, Faces: faces, Digits: digits, Mse: mse}


def claim_result(args: Fid | Faces | Digits | Mse, score: str) -> Path:
    """result.json in --output-dir, if nothing but the same score stands there. UserError otherwise, before any work."""
    folder = args.output_dir
    if isinstance(args, Digits) and args.images.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise UserError(f"--output-dir {folder}: lies in {args.images}, where nothing but digits may lie")
    file = runs.make_output_dir(folder) / "result.json"
    if (folder / "config.json").exists() or (file.exists() and f'"score": "{score}"' not in file.read_text()):
        raise UserError(f"--output-dir {folder}: holds a run or another score; each needs a directory of its own")
    return file


def main(args: Fid | Faces | Digits | TrainClassifier | Mse) -> dict[str, Any]:
    """Run one sub-command: print its lines, write result.json; returns what is in there."""
    if isinstance(args, TrainClassifier):
        return train_classifier(args)
    started, score = time.monotonic(), type(args).__name__.lower()
    file = claim_result(args, score) if args.output_dir else None
    on_cpu = getattr(args, "features", "") == "random"
    accelerator = runs.make_accelerator("cpu" if on_cpu else getattr(args, "device", "cpu"), "fp32")
    result, lines = COMMANDS[type(args)](args, accelerator)
    print(lines)
    result = {"score": score, **result, "seconds": round(time.monotonic() - started, 1)}
    result |= {"arguments": asdict(args), **runs.environment(accelerator)}
    if file:
        runs.atomic_write(file, json.dumps(result, indent=1, default=str) + "\n")
    return result


if __name__ == "__main__":
    runs.command_line(Fid | Faces | Digits | TrainClassifier | Mse, main)
