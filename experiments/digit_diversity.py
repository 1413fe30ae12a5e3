r"""How much the diversity of generated digits depends on whose features measure it.

Rows: each folder of generated digits, and two sets of real ones that are poor on purpose: each
digit's images that lie nearest to its mean (of the first classifier's features), and a few images
repeated. Columns: accuracy by the first classifier, then diversity as in evaluate.py digits (real
images = 100) with the features of each classifier, of EfficientNet-Lite0, and of the pixels.

Every measure must see that repeated images are poor. The other set is poor with the features that
chose it; how poor it is with the others shows whether they count the same.

Writes table.csv, table.md and table.png; spread.png, where each digit's images lie in the two main
directions of each kind of features; and nearest.png, generated digits of the first folder above the
real ones that are nearest to them.

    python experiments/digit_diversity.py --folders runs/mnistm --domain mnistm \
        --output-dir runs/p2/diversity --classifiers CLASSIFIER Classifier.pth
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.classification import accuracy
from common.cli import UserError, at_least, each_once, is_domain, is_seed, run_cli
from common.data import Images, labels_of, load_digits, normalise, take
from common.device import Device, make_accelerator
from common.figures import pyplot, save_figure, save_labelled, save_table
from common.files import make_output_dir
from common.rng import make_rng
from metrics.digits import diversity, features_of, load_classifier, mean_diversity, read_digits
from metrics.features import efficientnet_features

if TYPE_CHECKING:
    from accelerate import Accelerator

# Generated digits in nearest.png, one of each class.
SHOWN = 10
# So many points of each kind are in a panel of spread.png at most.
MOST_POINTS = 150
BATCH = 100
# Columns beside those of the classifiers.
OTHER_KINDS = ("EfficientNet", "pixels")


@dataclass(kw_only=True)
class Compare:
    """Measure the diversity of each folder with several kinds of features."""

    folders: tuple[Path, ...]
    """Folders with 28x28 images DIGIT_NAME.png, as p2_ddpm_infer.py writes them."""
    classifiers: tuple[Path, ...]
    """Files of evaluate.py train-classifier or the course's Classifier.pth."""
    output_dir: Path
    """Folder for the table and the figures."""
    data_dir: Path = Path("hw2_data")
    """Data folder with the real images."""
    domain: str = "mnistm"
    """Digit domain of --data-dir to compare with."""
    few: int = 5
    """Images of each digit that are repeated in the last row."""
    real_images: int = 2_000
    """Real validation images that are compared, a tenth of them of each digit."""
    seed: int = 0
    """Seed of the choice of real images."""
    device: Device = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        each_once("--folders", self.folders)
        each_once("--classifiers", self.classifiers)
        names = [name_of(file) for file in self.classifiers]
        for file, name in zip(self.classifiers, names, strict=True):
            if name in OTHER_KINDS or names.count(name) > 1:
                raise UserError(
                    f"--classifiers {file}: another column is called {name} too; rename the file"
                )
        is_domain("--domain", self.domain)
        at_least("--few", self.few, 1)
        at_least("--real-images", self.real_images, 20)
        is_seed("--seed", self.seed)


def name_of(file: Path) -> str:
    """The name of a classifier's column: the file's, or the run's for model.safetensors."""
    return file.stem if file.stem != "model" else file.absolute().parent.name


class Set(NamedTuple):
    """A set of images, and their features of each kind, (n, features) each."""

    name: str
    images: Images
    features: dict[str, np.ndarray]


def pixels_as_features(images: Images) -> np.ndarray:
    """Grey pixels without each image's brightness and contrast: float64 (n, 784)."""
    grey = normalise(images.pixels).double().mean(1).flatten(1)  # (n, 3, 28, 28) → (n, 784)
    grey = grey - grey.mean(1, keepdim=True)
    return (grey / grey.std(1, keepdim=True).clamp(min=1e-6)).numpy()


def feature_readers(
    classifiers: dict[str, Any], accelerator: Accelerator
) -> dict[str, Callable[[Images], np.ndarray]]:
    """For each kind of features a function from images to (n, features)."""
    readers: dict[str, Callable[[Images], np.ndarray]] = {}
    for name, net in classifiers.items():
        readers[name] = lambda images, net=net: features_of(net, images.pixels, accelerator)
    embed = efficientnet_features(accelerator.device).embed

    @torch.inference_mode()
    def embedded(images: Images) -> np.ndarray:
        parts = [embed(some).cpu().double() for some in images.pixels.split(BATCH)]
        return torch.cat(parts).numpy()

    readers["EfficientNet"] = embedded
    readers["pixels"] = pixels_as_features
    return readers


def draw_real(images: Images, args: Compare) -> Images:
    """A tenth of --real-images of each digit, or all that there are, drawn with the seed."""
    labels = labels_of(images)
    drawn = []
    for digit in range(10):
        rows = (labels == digit).nonzero().flatten()
        order = torch.randperm(len(rows), generator=make_rng(args.seed, "real", digit))
        drawn.append(rows[order[: args.real_images // 10]])
    return take(images, torch.cat(drawn).sort().values)


def part_of(name: str, real: Set, rows: np.ndarray) -> Set:
    """A set of some of the real images."""
    features = {kind: values[rows] for kind, values in real.features.items()}
    return Set(name, take(real.images, torch.from_numpy(rows)), features)


def poor_sets(real: Set, per_class: int, args: Compare) -> list[Set]:
    """Two sets of real images, `per_class` of each digit, without the diversity of the others."""
    labels = labels_of(real.images).numpy()
    first = next(iter(real.features.values()))
    nearest = []
    repeated = []
    for digit in range(10):
        rows = np.flatnonzero(labels == digit)
        distances = np.linalg.norm(first[rows] - first[rows].mean(0), axis=1)
        nearest.append(rows[np.argsort(distances)[:per_class]])
        rng = make_rng(args.seed, "few", digit)
        few = rows[torch.randperm(len(rows), generator=rng)[: args.few].numpy()]
        repeated.append(np.resize(few, per_class))
    return [
        part_of("real, nearest to the mean", real, np.concatenate(nearest)),
        part_of(f"real, {args.few} of each repeated", real, np.concatenate(repeated)),
    ]


def diversity_of(made: Set, real: Set, kind: str, args: Compare) -> float | None:
    """The diversity in % of real images', averaged over the digits."""
    labels = labels_of(made.images).numpy()
    real_labels = labels_of(real.images).numpy()
    found = []
    for digit in range(10):
        ours = made.features[kind][labels == digit]
        theirs = real.features[kind][real_labels == digit]
        found.append(diversity(ours, theirs, args.seed, "diversity", digit))
    share, _ = mean_diversity([row for row in found if row is not None])
    return share


def draw_spread(made: Set, real: Set, path: Path) -> None:
    """Draw every digit's images in the two main directions of its real images' features."""
    from sklearn.decomposition import PCA

    kinds = list(real.features)
    labels = labels_of(made.images).numpy()
    real_labels = labels_of(real.images).numpy()
    figure, axes = pyplot().subplots(len(kinds), 10, figsize=(15, 1.6 * len(kinds)), squeeze=False)
    for row, kind in enumerate(kinds):
        for digit in range(10):
            theirs = real.features[kind][real_labels == digit]
            ours = made.features[kind][labels == digit][:MOST_POINTS]
            directions = PCA(2).fit(theirs)
            axis = axes[row, digit]
            axis.scatter(*directions.transform(theirs[:MOST_POINTS]).T, s=4, label="real")
            axis.scatter(*directions.transform(ours).T, s=4, label=made.name)
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(str(digit), fontsize=9)
        axes[row, 0].set_ylabel(kind, fontsize=9)
    axes[0, 0].legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, 1.6), ncols=2)
    save_figure(figure, path)


def draw_nearest(made: Set, real: Set, path: Path) -> None:
    """Draw one generated digit of each class above its nearest real image in each kind."""
    labels = labels_of(made.images).numpy()
    shown = [int(np.flatnonzero(labels == digit)[0]) for digit in range(SHOWN)]
    pixels = [made.images.pixels[shown]]
    for kind, theirs in real.features.items():
        rows = []
        for number in shown:
            distances = np.linalg.norm(theirs - made.features[kind][number], axis=1)
            rows.append(int(distances.argmin()))
        pixels.append(real.images.pixels[rows])
    names = [made.name, *(f"nearest, {kind}" for kind in real.features)]
    columns = [str(digit) for digit in range(SHOWN)]
    save_labelled(torch.cat(pixels), path, names, columns)


def main(args: Compare) -> list[list[str]]:
    """Measure all rows, then write the table and the figures; returns the table."""
    make_output_dir(args.output_dir)
    folders = [(folder.name, read_digits(folder)) for folder in args.folders]
    for folder, (_, images) in zip(args.folders, folders, strict=True):
        if labels_of(images).bincount(minlength=10).min() < 2:
            raise UserError(f"{folder}: needs two images of each digit")
    validation = draw_real(load_digits(args.data_dir, args.domain, "val"), args)
    accelerator = make_accelerator(args.device, "fp32")
    classifiers = {}
    for file in args.classifiers:
        classifiers[name_of(file)] = load_classifier(file, accelerator.device, "--classifiers")
    readers = feature_readers(classifiers, accelerator)
    sets = []
    for name, images in (("real", validation), *folders):
        features = {kind: read(images) for kind, read in readers.items()}
        sets.append(Set(name, images, features))
    real = sets.pop(0)
    per_class = len(sets[0].images.names) // 10
    sets += poor_sets(real, per_class, args)

    net = next(iter(classifiers.values()))
    table = [["digits", "accuracy, %", *real.features]]
    for made in sets:
        cells = [made.name, f"{accuracy(net, made.images, accelerator):.2f}"]
        for kind in real.features:
            share = diversity_of(made, real, kind, args)
            cells.append("none" if share is None else f"{share:.1f}")
        table.append(cells)
    table.append(
        ["real", f"{accuracy(net, real.images, accelerator):.2f}"] + ["100.0"] * len(real.features)
    )
    save_table(table, args.output_dir / "table.png", f"diversity, {args.domain}, real = 100")
    draw_spread(sets[0], real, args.output_dir / "spread.png")
    draw_nearest(sets[0], real, args.output_dir / "nearest.png")
    print((args.output_dir / "table.md").read_text(encoding="utf-8"))
    return table


if __name__ == "__main__":
    run_cli(Compare, main)
