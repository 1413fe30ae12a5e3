"""Figures that more than one script draws: image grids and training curves. Written whole or not at all."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from common.run import UserError, atomic_write


def save_figure(figure: Figure, path: Path, formats: Sequence[str] = ("png",)) -> None:
    """Write a matplotlib figure as `path` with each of the suffixes, and close it."""
    for suffix in formats:
        atomic_write(path.with_suffix(f".{suffix}"), lambda file: figure.savefig(file, dpi=150, bbox_inches="tight"))
    plt.close(figure)


def grid_of(pixels: torch.Tensor, columns: int) -> Image.Image:
    """uint8 images (n, 3, height, width), row by row, as one picture of their true pixels."""
    from torchvision.utils import make_grid  # two seconds to import: only where a grid is drawn

    return image_of(make_grid(pixels, nrow=columns, pad_value=255))


def image_of(pixels: torch.Tensor) -> Image.Image:
    """A uint8 image (3, height, width) as a picture of its true pixels."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())  # (height, width, channels)


def save_image(pixels: torch.Tensor, path: Path) -> None:
    """Write `image_of` as PNG."""
    atomic_write(path, image_of(pixels).save)


def save_grid(pixels: torch.Tensor, path: Path, columns: int) -> None:
    """Write `grid_of` as PNG."""
    atomic_write(path, grid_of(pixels, columns).save)


def save_gif(frames: Sequence[Image.Image], path: Path, milliseconds: int = 200) -> None:
    """Write pictures of one size as an animation that rests on the last one for two seconds."""
    images = [frame.convert("P", palette=Image.Palette.ADAPTIVE) for frame in frames]
    durations = [milliseconds] * (len(images) - 1) + [2_000]
    options = {"save_all": True, "append_images": images[1:], "duration": durations, "loop": 0}
    atomic_write(path, lambda file: images[0].save(file, **options))


def read_grids(folder: Path) -> list[Image.Image]:
    """The grids epoch_0001.png, … of a training run, in order."""
    return [Image.open(file).convert("RGB") for file in sorted(folder.glob("epoch_*.png"))]


def save_labelled(
    pixels: torch.Tensor, path: Path, rows: Sequence[str], columns: Sequence[str], title: str = ""
) -> None:
    """Draw uint8 images (len(rows) * len(columns), 3, height, width), row by row, with the names of both."""
    height, width = len(rows), len(columns)
    figure, axes = plt.subplots(height, width, figsize=(1.1 * width + 0.6, 1.1 * height + 0.5), squeeze=False)
    for number, (axis, image) in enumerate(zip(axes.flat, pixels, strict=True)):
        axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        if number < width:
            axis.set_title(columns[number], fontsize=9)
        if number % width == 0:
            axis.set_ylabel(rows[number // width], fontsize=9, rotation=0, ha="right", va="center")
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def save_curves(rows: list[dict[str, Any]], panels: dict[str, Sequence[str]], path: Path, x: str = "epoch") -> None:
    """Draw columns of metrics.jsonl against `x`: a panel for each title of `panels`, a line for each of its columns."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.2), squeeze=False)
    for axis, (title, columns) in zip(axes[0], panels.items(), strict=True):
        for column in columns:
            points = [(row[x], row[column]) for row in rows if row.get(column) is not None]
            if points:
                marker = "o" if len(points) == 1 else None  # a line through one point is nothing to see
                axis.plot(*zip(*points, strict=True), marker=marker, label=column.replace("_", " "))
        axis.set(title=title, xlabel=x)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    save_figure(figure, path)


def save_csv(rows: list[list[str]], path: Path) -> None:
    """Write a table (its first row is the header) as csv."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    atomic_write(path, text.getvalue())


def save_table(rows: list[list[str]], path: Path, title: str = "") -> None:
    """Write a table (its first row is the header) as `path` with .csv, .md and .png."""
    save_csv(rows, path.with_suffix(".csv"))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    atomic_write(path.with_suffix(".md"), "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]) + "\n")
    figure, axis = plt.subplots(figsize=(2.2 * len(rows[0]), 0.32 * len(rows) + 0.4))
    axis.axis("off")
    drawn = axis.table(rows[1:], colLabels=rows[0], loc="center", cellLoc="center")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    drawn.auto_set_column_width(range(len(rows[0])))
    drawn.scale(1, 1.3)
    axis.set_title(title, fontsize=10)
    save_figure(figure, path.with_suffix(".png"))


def save_tsne(
    features: np.ndarray, kinds: dict[str, tuple[np.ndarray, Sequence[Any]]], title: str, folder: Path, seed: int
) -> None:
    """Embed features (n, d) by t-SNE (van der Maaten and Hinton, 2008); scatter the points for each kind of colour.

    `kinds` maps a name to values (n,) and what each value is called. Writes tsne_NAME.png and .pdf, and features.npz.
    """
    from sklearn.manifold import TSNE  # a second or two to import

    if len(features) < 4:
        raise UserError(f"t-SNE of {len(features)} images: at least 4 are needed")
    points = TSNE(init="pca", perplexity=min(30, (len(features) - 1) / 3), random_state=seed).fit_transform(
        features
    )  # (n, 2)
    arrays = {name: values for name, (values, _) in kinds.items()}
    atomic_write(folder / "features.npz", lambda path: np.savez(path, features=features, points=points, **arrays))
    for kind, (values, names) in kinds.items():
        figure, axis = plt.subplots(figsize=(7, 6))
        for value, name in enumerate(names):
            axis.scatter(*points[values == value].T, s=5, color=f"C{value}", alpha=0.6, label=name)
        axis.set(title=f"{title}: t-SNE by {kind}", xticks=[], yticks=[])
        axis.legend(title=kind, markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))
        save_figure(figure, folder / f"tsne_{kind}.png", ("png", "pdf"))
