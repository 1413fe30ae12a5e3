"""What a zero-shot classification is judged by: accuracy, tables, confusion, similarities, right and wrong cases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix
from torch import Tensor

from common.figures import save_csv, save_figure
from zeroshot.loading import Labelled

Case = tuple[Path, int, np.ndarray]  # image file, true class, probabilities (classes,)


def judge(scores: Tensor, labels: Tensor) -> dict[str, Any]:
    """Accuracy in % with its 95 % interval (Wilson 1927) and top-5 accuracy, of scores (n, classes)."""
    right = int((scores.argmax(1) == labels).sum())
    interval = binomtest(right, len(labels)).proportion_ci(method="wilson")
    top5 = scores.topk(min(5, scores.shape[1]), 1).indices.eq(labels[:, None]).any(1).double().mean().item()
    return {
        "accuracy": 100 * right / len(labels),
        "interval": [100 * interval.low, 100 * interval.high],
        "top5": 100 * top5,
    }


def write_evidence(
    output_dir: Path, found: Labelled, cosines: np.ndarray, probabilities: np.ndarray, seed: int
) -> None:
    """Write predictions.csv, per_class.csv, confusion.png, similarity.png and cases.png of one set of prompts.

    cosines, probabilities: (n, classes). The cases drawn are a random choice by `seed`.
    """
    names, labels, predicted = found.names, found.labels, cosines.argmax(1)
    in_one_folder = len({path.parent for path in found.paths}) == 1
    top = probabilities.argsort(1)[:, ::-1][:, :5]
    ranks = [f"{what}{k}" for k in range(1, top.shape[1] + 1) for what in ("name", "p")]
    table = [["image_name", "label", "predicted", "right", *ranks]]
    for path, label, best, row, p in zip(found.paths, labels, predicted, top, probabilities, strict=True):
        ranked = [cell for k in row for cell in (names[k], f"{p[k]:.4f}")]
        name = path.name if in_one_folder else f"{path.parent.name}/{path.name}"
        table.append([name, names[label], names[best], str(int(best == label)), *ranked])
    save_csv(table, output_dir / "predictions.csv")
    matrix = confusion_matrix(labels, predicted, labels=range(len(names)))
    counts = matrix.sum(1)
    table = [["class", "images", "right", "accuracy, %"]]
    for name, count, hit in zip(names, counts, matrix.diagonal(), strict=True):
        table.append([name, str(count), str(hit), f"{100 * hit / count:.2f}" if count else "no image"])
    save_csv(table, output_dir / "per_class.csv")
    names = [name.replace("$", r"\$") for name in names]  # matplotlib would read formulas
    save_matrix(matrix, names, names, output_dir / "confusion.png", ("confusion", "class", "predicted"))
    there = [k for k, count in enumerate(counts) if count]
    similarity = np.stack([cosines[labels == k].mean(0) for k in there])  # (classes with images, classes)
    titles = ("mean cosine of images and captions", "images of", "caption of")
    save_matrix(similarity, [names[k] for k in there], names, output_dir / "similarity.png", titles)
    order = np.random.default_rng(seed).permutation(len(labels))
    kinds = ([k for k in order if (predicted[k] == labels[k]) == right][:5] for right in (True, False))
    right, wrong = ([(found.paths[k], labels[k], probabilities[k]) for k in rows] for rows in kinds)
    save_cases(right, wrong, names, output_dir / "cases.png", "right cases (left) and wrong ones, drawn at random")


def save_cases(right: Sequence[Case], wrong: Sequence[Case], names: Sequence[str], path: Path, title: str) -> None:
    """Draw up to five cases of each kind, each beside its five most probable classes; the true one's bar is green."""
    figure, axes = plt.subplots(5, 4, figsize=(12, 11), gridspec_kw={"width_ratios": [1, 1.3, 1, 1.3]})
    for axis in axes.flat:
        axis.axis("off")
    for left, cases in ((0, right), (2, wrong)):
        for (picture, bars), (file, label, probabilities) in zip(axes[:, left : left + 2], cases, strict=False):
            with Image.open(file) as image:
                picture.imshow(image.convert("RGB"))
            picture.set_title(f"{file.name}: {names[label]}", fontsize=9)
            top = probabilities.argsort()[::-1][:5]
            bars.axis("on")
            bars.barh(range(len(top)), probabilities[top], color=["C2" if k == label else "C0" for k in top])
            bars.set(xlim=(0, 1), xticks=[0, 0.5, 1], yticks=range(len(top)))
            bars.set_yticklabels([names[k] for k in top], fontsize=9)
            bars.invert_yaxis()
            bars.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.tight_layout()
    save_figure(figure, path)


def save_matrix(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[str], path: Path, labels: tuple[str, str, str]
) -> None:
    """Draw a matrix (len(rows), len(columns)) in colours, with its numbers where there is room.

    `labels`: title, name of the rows, name of the columns.
    """
    size = min(3 + 0.32 * max(values.shape), 40)
    figure, axis = plt.subplots(figsize=(size, size))
    drawn = axis.imshow(values, cmap="viridis")
    axis.set(xticks=range(len(columns)), yticks=range(len(rows)), title=labels[0], ylabel=labels[1], xlabel=labels[2])
    axis.set_xticklabels(columns, rotation=90, fontsize=8)
    axis.set_yticklabels(rows, fontsize=8)
    figure.colorbar(drawn, fraction=0.046, pad=0.04)
    if max(values.shape) <= 20:
        middle = (values.min() + values.max()) / 2
        for (row, column), value in np.ndenumerate(values):
            told = str(value) if values.dtype.kind == "i" else f"{value:.2f}".replace("0.", ".")
            axis.text(column, row, told, ha="center", va="center", fontsize=7, color="wk"[int(value > middle)])
    save_figure(figure, path)
