"""What a zero-shot classification shows: accuracy, tables, confusion, similarities and cases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from common.data import FORMATS
from common.figures import pyplot, save_csv, save_figure
from zeroshot.loading import Labelled


class Case(NamedTuple):
    """One classified image: its file, its true class, and the probabilities (classes,)."""

    path: Path
    label: int
    probabilities: np.ndarray


def measure(scores: Tensor, labels: Tensor) -> dict[str, Any]:
    """Accuracy in % with its 95 % interval (Wilson, 1927) and top-5 accuracy.

    `scores` is (n, classes), `labels` int64 (n,).
    """
    from scipy.stats import binomtest  # takes a second or two to import

    correct = int((scores.argmax(1) == labels).sum())
    interval = binomtest(correct, len(labels)).proportion_ci(method="wilson")
    best = scores.topk(min(5, scores.shape[1]), 1).indices
    among_best = best.eq(labels[:, None]).any(1)
    return {
        "accuracy": 100 * correct / len(labels),
        "interval": [100 * interval.low, 100 * interval.high],
        "top5": 100 * among_best.double().mean().item(),
    }


def write_evidence(
    output_dir: Path, found: Labelled, cosines: np.ndarray, probabilities: np.ndarray, seed: int
) -> None:
    """Write the evidence for one set of prompts.

    predictions.csv, per_class.csv, confusion.png, similarity.png and cases.png. `cosines` and
    `probabilities` are (n, classes). The cases that are drawn are a random choice with `seed`.
    """
    from sklearn.metrics import confusion_matrix  # takes a second or two to import

    predicted = cosines.argmax(1)
    save_csv(prediction_rows(found, predicted, probabilities), output_dir / "predictions.csv")
    matrix = confusion_matrix(found.labels, predicted, labels=range(len(found.names)))
    save_csv(per_class_rows(found.names, matrix), output_dir / "per_class.csv")
    names = [name.replace("$", r"\$") for name in found.names]  # matplotlib would read formulas
    save_matrix(
        matrix, names, names, output_dir / "confusion.png", ("confusion", "class", "predicted")
    )
    draw_similarity(output_dir / "similarity.png", found.labels, cosines, names)

    right = []
    wrong = []
    for k in np.random.default_rng(seed).permutation(len(found.labels)):
        case = Case(found.paths[k], found.labels[k], probabilities[k])
        cases = right if predicted[k] == found.labels[k] else wrong
        if len(cases) < 5:
            cases.append(case)
    title = "right cases (left) and wrong ones, drawn at random"
    save_cases(right, wrong, names, output_dir / "cases.png", title)


def prediction_rows(
    found: Labelled, predicted: np.ndarray, probabilities: np.ndarray
) -> list[list[str]]:
    """A table of every image with its class, the predicted one, and the five most probable ones."""
    names = found.names
    in_one_folder = len({path.parent for path in found.paths}) == 1
    top = probabilities.argsort(1)[:, ::-1][:, :5]  # (n, 5)
    header = ["image_name", "label", "predicted", "right"]
    for rank in range(1, top.shape[1] + 1):
        header += [f"name{rank}", f"p{rank}"]
    rows = [header]
    for k, path in enumerate(found.paths):
        name = path.name if in_one_folder else f"{path.parent.name}/{path.name}"
        label, best = found.labels[k], predicted[k]
        row = [name, names[label], names[best], str(int(best == label))]
        for candidate in top[k]:
            row += [names[candidate], f"{probabilities[k, candidate]:.4f}"]
        rows.append(row)
    return rows


def per_class_rows(names: Sequence[str], matrix: np.ndarray) -> list[list[str]]:
    """A table of the accuracy of each class, from a confusion matrix (classes, classes)."""
    rows = [["class", "images", "right", "accuracy, %"]]
    for name, count, right in zip(names, matrix.sum(1), matrix.diagonal(), strict=True):
        accuracy = f"{100 * right / count:.2f}" if count else "no image"
        rows.append([name, str(count), str(right), accuracy])
    return rows


def draw_similarity(
    path: Path, labels: np.ndarray, cosines: np.ndarray, names: Sequence[str]
) -> None:
    """Draw the mean cosine of the images of each class with the captions of each class."""
    present = [k for k in range(len(names)) if (labels == k).any()]
    similarity = np.stack([cosines[labels == k].mean(0) for k in present])
    titles = ("mean cosine of images and captions", "images of", "caption of")
    save_matrix(similarity, [names[k] for k in present], names, path, titles)


def save_cases(
    right: Sequence[Case], wrong: Sequence[Case], names: Sequence[str], path: Path, title: str
) -> None:
    """Draw up to five right cases at the left and five wrong ones at the right.

    Each stands beside its five most probable classes; the bar of the true class is green.
    """
    figure, axes = pyplot().subplots(
        5, 4, figsize=(12, 11), gridspec_kw={"width_ratios": [1, 1.3, 1, 1.3]}
    )
    for axis in axes.flat:
        axis.axis("off")
    for cases, pictures, bars in ((right, axes[:, 0], axes[:, 1]), (wrong, axes[:, 2], axes[:, 3])):
        for case, picture, bar in zip(cases, pictures, bars, strict=False):
            draw_case(case, names, picture, bar)
    figure.suptitle(title)
    figure.tight_layout()
    save_figure(figure, path)


def draw_case(case: Case, names: Sequence[str], picture: Any, bars: Any) -> None:
    """Draw an image on the axis `picture` and its most probable classes on the axis `bars`."""
    with Image.open(case.path, formats=FORMATS) as image:
        picture.imshow(image.convert("RGB"))
    picture.set_title(f"{case.path.name}: {names[case.label]}", fontsize=9)
    top = case.probabilities.argsort()[::-1][:5]
    colours = ["C2" if k == case.label else "C0" for k in top]
    bars.axis("on")
    bars.barh(range(len(top)), case.probabilities[top], color=colours)
    bars.set(xlim=(0, 1), xticks=[0, 0.5, 1], yticks=range(len(top)))
    bars.set_yticklabels([names[k] for k in top], fontsize=9)
    bars.invert_yaxis()
    bars.spines[["top", "right"]].set_visible(False)


def save_matrix(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    path: Path,
    labels: tuple[str, str, str],
) -> None:
    """Draw a matrix (len(rows), len(columns)) in colours, with its numbers where there is room.

    `labels` are the title, the name of the rows and the name of the columns.
    """
    title, row_label, column_label = labels
    size = min(3 + 0.32 * max(values.shape), 40)
    figure, axis = pyplot().subplots(figsize=(size, size))
    drawn = axis.imshow(values, cmap="viridis")
    axis.set(xticks=range(len(columns)), yticks=range(len(rows)))
    axis.set(title=title, ylabel=row_label, xlabel=column_label)
    axis.set_xticklabels(columns, rotation=90, fontsize=8)
    axis.set_yticklabels(rows, fontsize=8)
    figure.colorbar(drawn, fraction=0.046, pad=0.04)
    if max(values.shape) <= 20:
        middle = (values.min() + values.max()) / 2
        for (row, column), value in np.ndenumerate(values):
            text = str(value) if values.dtype.kind == "i" else f"{value:.2f}".replace("0.", ".")
            colour = "k" if value > middle else "w"
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    save_figure(figure, path)
