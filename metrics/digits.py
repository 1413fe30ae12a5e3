"""Generated digits before a classifier: accuracy by digit, and diversity beside real images.

A folder is read as the graders read it. Diversity is the Vendi score: Friedman and Dieng, 2022,
https://arxiv.org/abs/2210.02410
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from common.checkpoints import load_net
from common.classification import accuracy, classify, in_batches
from common.cli import UserError
from common.data import DIGIT_SIZE, Images, decode_image, decode_images, labels_of, size_of
from common.figures import pyplot, save_figure
from common.rng import make_rng
from models.digit_classifier import DigitClassifier, DigitResNet

if TYPE_CHECKING:
    from accelerate import Accelerator

# The course's file names no network, so it is taken for the first.
NETS = {"digit_classifier": DigitClassifier, "digit_resnet": DigitResNet}
MOST_REAL_SETS = 10  # of real images, whose diversity is averaged


# Reading


def load_classifier(path: Path, device: torch.device, flag: str = "--classifier") -> nn.Module:
    """The network of Classifier.pth, or of a run of train-classifier, in eval mode."""
    net, _ = load_net(path, NETS, flag)
    return net.to(device)


def read_digits(folder: Path) -> Images:
    """Read images DIGIT_NAME.png as the graders do: every file, labelled by its first character.

    Raises UserError for a file of another name, and for another size than 28x28, because nothing is
    resized.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    paths = sorted(folder.iterdir())
    if not paths:
        raise UserError(f"{folder}: no image in it")
    for path in paths:
        if not re.fullmatch(r"[0-9]_.+\.png", path.name):
            raise UserError(
                f"{path}: is not named DIGIT_NAME.png, but every file here is read as a digit; "
                "remove it first"
            )
    first = decode_image(paths[0])
    if first.shape[1:] != DIGIT_SIZE:
        raise UserError(
            f"{paths[0]}: is {size_of(first)}, but a digit must be 28x28 (nothing is resized)"
        )
    labels = torch.tensor([int(path.name[0]) for path in paths])
    return Images(decode_images(paths), labels, [path.name for path in paths])


# Diversity


@torch.inference_mode()
def features_of(net: nn.Module, pixels: Tensor, accelerator: Accelerator) -> np.ndarray:
    """What the last layer of `net` reads of uint8 images (n, 3, 28, 28): float64 (n, features).

    Processes share the batches.
    """
    (features,) = in_batches(lambda batch: (net.features(batch),), pixels, accelerator, shared=True)
    return features.double().numpy()


def vendi_score(features: np.ndarray, bandwidth: float) -> float:
    """The effective number of different images among features (n, d).

    1 if all are alike, n if none is like another: the exponential of the entropy of the eigenvalues
    of K / n, where K is the Gaussian kernel of that bandwidth.
    """
    from scipy.special import entr
    from sklearn.metrics.pairwise import rbf_kernel

    kernel = rbf_kernel(features, gamma=0.5 / bandwidth**2)  # (n, n)
    eigenvalues = np.linalg.eigvalsh(kernel / len(kernel)).clip(0)
    return math.exp(entr(eigenvalues).sum())


def diversity(generated: np.ndarray, real: np.ndarray, *key: int | str) -> dict[str, Any] | None:
    """Vendi scores of the features (n, d) and (m, d) of one digit's images.

    "percent_of_real" is 100 (generated - 1) / (real - 1).

    A score grows with the number of images, so equal numbers are compared: min(n, m) images drawn
    with `key`, and as many real ones in each of up to 10 disjoint sets, of which the mean and the
    standard deviation are given. The kernel's bandwidth is the median distance between real images,
    so the scale of the features does not matter. None if there are fewer than two images, or if the
    real ones are all alike.

    Why this measure: 5 of 100 real MNIST-M images, repeated, keep 0.3 to 0.4 of the diversity, and
    the 100 nearest to the mean of 1,000, which is what strong guidance makes, 0.25. The mean
    pairwise distance gives the former 0.9, and coverage (Naeem et al., 2020,
    https://arxiv.org/abs/2002.09797) gives the latter 0.6 to 0.9. But noise is diverse too: this
    number says how different the images are, and the accuracy how good.
    """
    rng = make_rng(*key)
    generated = generated[torch.randperm(len(generated), generator=rng).numpy()]
    real = real[torch.randperm(len(real), generator=rng).numpy()]
    count = min(len(generated), len(real))
    if count < 2:
        return None
    bandwidth = median_distance(real)
    if bandwidth == 0:
        return None
    score = vendi_score(generated[:count], bandwidth)
    real_scores = []
    for number in range(min(MOST_REAL_SETS, len(real) // count)):
        some = real[number * count : (number + 1) * count]
        real_scores.append(vendi_score(some, bandwidth))
    mean = float(np.mean(real_scores))
    if mean - 1 < 1e-6:
        return None
    deviation = float(np.std(real_scores, ddof=1)) if len(real_scores) > 1 else None
    return {
        "percent_of_real": 100 * (score - 1) / (mean - 1),
        "images": count,
        "generated": score,
        "real": mean,
        "real_sd": deviation,
    }


def median_distance(points: np.ndarray) -> float:
    """The median of the distances between all pairs of points (n, d)."""
    from scipy.spatial.distance import pdist

    return float(np.median(pdist(points)))


# All numbers of a folder


def evaluate_digits(
    net: nn.Module, images: Images, real: Images | None, accelerator: Accelerator, seed: int
) -> dict[str, Any]:
    """Accuracy in %, overall and by digit, and the confusion matrix (10, 10).

    With `real` images, also their accuracy, and the diversity beside theirs. Processes share the
    batches, and each gets all results.
    """
    from sklearn.metrics import confusion_matrix

    seen = classify(net, images.pixels, accelerator, shared=True)
    matrix = confusion_matrix(labels_of(images), seen, labels=range(10))
    digits = []  # the position is the digit
    for digit in range(10):
        count = int(matrix[digit].sum())
        right = int(matrix[digit, digit])
        percent = 100 * right / count if count else None
        digits.append({"images": count, "accuracy": percent, "diversity": None})
    if real is not None:
        found = diversity_by_digit(net, images, real, accelerator, seed)
        for row, value in zip(digits, found, strict=True):
            row["diversity"] = value
    compared = [row["diversity"] for row in digits if row["diversity"] is not None]
    share, deviation = mean_diversity(compared)
    real_accuracy = None
    if real is not None:
        real_accuracy = accuracy(net, real, accelerator, shared=True)
    return {
        "accuracy": 100 * float(matrix.trace() / matrix.sum()),
        "real_accuracy": real_accuracy,
        "diversity_percent_of_real": share,
        "real_diversity_sd": deviation,
        "images": len(images.names),
        "digits": digits,
        "confusion": matrix.tolist(),
    }


def diversity_by_digit(
    net: nn.Module, images: Images, real: Images, accelerator: Accelerator, seed: int
) -> list[dict[str, Any] | None]:
    """What `diversity` finds for each of the ten digits."""
    labels = labels_of(images).numpy()
    real_labels = labels_of(real).numpy()
    features = features_of(net, images.pixels, accelerator)
    real_features = features_of(net, real.pixels, accelerator)
    found = []
    for digit in range(10):
        ours = features[labels == digit]
        theirs = real_features[real_labels == digit]
        found.append(diversity(ours, theirs, seed, "diversity", digit))
    return found


def mean_diversity(compared: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """The mean over digits of the diversity in % of real images', and its standard deviation.

    The deviation is that of such a mean between sets of real images, in %.
    """
    if not compared:
        return None, None
    share = float(np.mean([row["percent_of_real"] for row in compared]))
    known = [row for row in compared if row["real_sd"] is not None]
    if not known:
        return share, None
    spread = [100 * row["real_sd"] / (row["real"] - 1) for row in known]  # of each digit, in %
    return share, float(np.linalg.norm(spread)) / len(spread)


# Output


def table_of(digits: list[dict[str, Any]]) -> str:
    """Accuracy and diversity of each digit, as lines of text."""
    lines = ["digit  images  accuracy, %  diversity  real images'    ratio, %"]
    for digit, row in enumerate(digits):
        percent = "none" if row["accuracy"] is None else f"{row['accuracy']:.2f}"
        line = f"{digit:5}  {row['images']:6,}  {percent:>11}"
        found = row["diversity"]
        if found is not None:
            real = f"{found['real']:.2f}"
            if found["real_sd"] is not None:
                real += f" ± {found['real_sd']:.2f}"
            line += f"  {found['generated']:9.2f}  {real:>12}  {found['percent_of_real']:11.1f}"
        lines.append(line)
    return "\n".join(lines)


def save_confusion(matrix: list[list[int]], path: Path, title: str) -> None:
    """Draw a confusion matrix (10, 10): a row for each digit asked for, a column for each seen."""
    from sklearn.metrics import ConfusionMatrixDisplay

    figure, axis = pyplot().subplots(figsize=(6, 6))
    display = ConfusionMatrixDisplay(np.array(matrix), display_labels=range(10))
    display.plot(ax=axis, colorbar=False, cmap="Blues")
    axis.set(title=title, xlabel="digit seen by the classifier", ylabel="digit asked for")
    save_figure(figure, path)
