"""Figures and tables that more than one script writes, each file whole or not at all."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from common.cli import UserError
from common.data import decode_image
from common.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = 2  # pixels between the images of a grid, and around them
# Of t-SNE, measured on one core of a CPU with 2,000 points.
SECONDS_A_POINT = 0.006


def pyplot() -> Any:
    """matplotlib.pyplot, which needs no display here. It takes a second to import."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


# Pictures of true pixels


def image_of(pixels: torch.Tensor) -> Image.Image:
    """A uint8 image (3, height, width) as a PIL image."""
    array = pixels.permute(1, 2, 0).contiguous().cpu().numpy()  # → (height, width, 3)
    return Image.fromarray(array)


def grid_of(pixels: torch.Tensor, columns: int) -> Image.Image:
    """uint8 images (n, 3, height, width) as one PIL image, filled row by row, on white.

    torchvision's `make_grid` draws the same grid of two or more images, but takes three seconds to
    import.
    """
    count, _, height, width = pixels.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    across, down = width + GAP, height + GAP
    grid = Image.new("RGB", (columns * across + GAP, rows * down + GAP), "white")
    for number, image in enumerate(pixels.cpu()):
        row, column = divmod(number, columns)
        grid.paste(image_of(image), (GAP + column * across, GAP + row * down))
    return grid


def save_image(pixels: torch.Tensor, path: Path) -> None:
    """Write a uint8 image (3, height, width) as PNG."""
    atomic_write(path, image_of(pixels).save)


def save_grid(pixels: torch.Tensor, path: Path, columns: int) -> None:
    """Write uint8 images (n, 3, height, width) as one PNG, filled row by row."""
    atomic_write(path, grid_of(pixels, columns).save)


def save_gif(frames: Sequence[Image.Image], path: Path, milliseconds: int = 200) -> None:
    """Write pictures of one size as an animation that rests on the last one for two seconds.

    Without pictures, because somebody removed them, there is no animation.
    """
    if not frames:
        return
    images = [frame.convert("P", palette=Image.Palette.ADAPTIVE) for frame in frames]
    durations = [milliseconds] * (len(images) - 1) + [2_000]

    def write(file: Path) -> None:
        images[0].save(file, save_all=True, append_images=images[1:], duration=durations, loop=0)

    atomic_write(path, write)


def read_grids(folder: Path) -> list[Image.Image]:
    """The grids epoch_0001.png, … of a training run, in order."""
    files = sorted(folder.glob("epoch_*.png"))
    return [Image.fromarray(decode_image(file).transpose(1, 2, 0)) for file in files]


# Plots


def save_figure(figure: Figure, path: Path, formats: Sequence[str] = ("png",)) -> None:
    """Write a matplotlib figure as `path`, once with each of the suffixes, and close it.

    The same figure gives the same bytes: a PDF has no date.
    """
    for suffix in formats:
        about = {"CreationDate": None} if suffix == "pdf" else {}
        atomic_write(
            path.with_suffix(f".{suffix}"),
            lambda file, about=about: figure.savefig(
                file, dpi=150, bbox_inches="tight", metadata=about
            ),
        )
    pyplot().close(figure)


def save_labelled(
    pixels: torch.Tensor,
    path: Path,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
) -> None:
    """Draw images in rows and columns with names at the left and on top.

    `pixels` is uint8 (len(rows) * len(columns), 3, height, width), row by row.
    """
    height, width = len(rows), len(columns)
    figure, axes = pyplot().subplots(
        height, width, figsize=(1.1 * width + 0.6, 1.1 * height + 0.5), squeeze=False
    )
    for number, (axis, image) in enumerate(zip(axes.flat, pixels, strict=True)):
        axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        row, column = divmod(number, width)
        if row == 0:
            axis.set_title(columns[column], fontsize=9)
        if column == 0:
            axis.set_ylabel(rows[row], fontsize=9, rotation=0, ha="right", va="center")
    above = 0.35 / figure.get_figheight()  # 0.35 inch, room for the names of the columns
    figure.suptitle(title, fontsize=10, y=figure.subplotpars.top + above, va="bottom")
    save_figure(figure, path)


def save_curves(
    rows: list[dict[str, Any]], panels: Mapping[str, Sequence[str]], path: Path, x: str = "epoch"
) -> None:
    """Draw columns of metrics.jsonl against the column `x`.

    `panels` maps the title of each panel to the columns drawn in it, one line each.
    """
    figure, axes = pyplot().subplots(
        1, len(panels), figsize=(4.5 * len(panels), 3.2), squeeze=False
    )
    for axis, (title, columns) in zip(axes[0], panels.items(), strict=True):
        for column in columns:
            points = [(row[x], row[column]) for row in rows if row.get(column) is not None]
            if not points:
                continue
            marker = "o" if len(points) == 1 else None  # one point makes no visible line
            xs, ys = zip(*points, strict=True)
            axis.plot(xs, ys, marker=marker, label=column.replace("_", " "))
        axis.set(title=title, xlabel=x)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    save_figure(figure, path)


def save_tsne(
    features: np.ndarray,
    colourings: Mapping[str, tuple[np.ndarray, Sequence[Any]]],
    title: str,
    folder: Path,
    seed: int,
) -> None:
    """Embed features (n, d) with t-SNE (van der Maaten and Hinton, 2008) and draw the points.

    `colourings` maps a name, such as "class", to values (n,) and the names of the values. Writes
    tsne_NAME.png and .pdf for each, and features.npz. Raises UserError for fewer than 4 images.
    """
    from sklearn.manifold import TSNE  # takes a second or two to import

    if len(features) < 4:
        raise UserError(f"t-SNE of {len(features)} images: needs at least 4")
    perplexity = min(30, (len(features) - 1) / 3)
    seconds = SECONDS_A_POINT * len(features)
    if seconds > 5:
        print(f"t-SNE of {len(features):,} images: about {seconds:.0f} s", file=sys.stderr)
    tsne = TSNE(init="pca", perplexity=perplexity, random_state=seed)
    points = tsne.fit_transform(features)  # (n, 2)
    arrays: dict[str, Any] = {name: values for name, (values, _) in colourings.items()}
    atomic_write(
        folder / "features.npz",
        lambda path: np.savez(path, features=features, points=points, **arrays),
    )
    for name, (values, value_names) in colourings.items():
        figure, axis = pyplot().subplots(figsize=(7, 6))
        count = len(value_names)
        for value, value_name in enumerate(value_names):
            xs, ys = points[values == value].T
            color: Any = f"C{value}"  # the usual ten colours, then some of the rainbow
            if count > 10:
                color = pyplot().get_cmap("turbo")(value / (count - 1))
            axis.scatter(xs, ys, s=5, color=color, alpha=0.6, label=value_name)
        axis.set(title=f"{title}: t-SNE by {name}", xticks=[], yticks=[])
        columns = 1 + (count - 1) // 20
        axis.legend(
            title=name, markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5), ncols=columns
        )
        save_figure(figure, folder / f"tsne_{name}.png", ("png", "pdf"))


# Tables


def save_csv(rows: list[list[str]], path: Path) -> None:
    """Write a table, whose first row is the header, as csv."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    atomic_write(path, text.getvalue())


def mean_and_sd(values: Sequence[float]) -> str:
    """The mean, with the standard deviation if there are several values."""
    text = f"{np.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.2f}"
    return text


def save_table(rows: list[list[str]], path: Path, title: str = "") -> None:
    """Write a table, whose first row is the header, as `path` with .csv, .md and .png."""
    save_csv(rows, path.with_suffix(".csv"))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    atomic_write(path.with_suffix(".md"), "\n".join(lines) + "\n")
    figure, axis = pyplot().subplots(figsize=(2.2 * len(rows[0]), 0.32 * len(rows) + 0.4))
    axis.axis("off")
    drawn = axis.table(rows[1:], colLabels=rows[0], loc="center", cellLoc="center")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    drawn.auto_set_column_width(range(len(rows[0])))
    drawn.scale(1, 1.3)
    axis.set_title(title, fontsize=10)
    save_figure(figure, path.with_suffix(".png"))
