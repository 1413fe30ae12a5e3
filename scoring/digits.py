"""Generated digits before a judge: the graders' reading of a folder, accuracy by digit, diversity beside real images'.

Diversity is the Vendi score: Friedman and Dieng, 2022, https://arxiv.org/abs/2210.02410
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from accelerate import Accelerator
from scipy.spatial.distance import pdist
from scipy.special import entr
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix
from sklearn.metrics.pairwise import rbf_kernel
from torch import Tensor, nn

from common.data import DIGIT_SIZE, Images, decode_image, decode_images
from common.figures import save_figure
from common.metrics import accuracy, classify, normalised_batches
from common.run import UserError, generator
from models.digit_classifier import DigitClassifier, DigitResNet

NETS = {"digit_classifier": DigitClassifier, "digit_resnet": DigitResNet}  # the course's file names no net: the first
REAL_SETS = 10  # of real images, at most, whose diversity is averaged


def read_digits(folder: Path) -> Images:
    """Images DIGIT_NAME.png of `folder`, read as the graders do: every file, its label the first character of its name.

    UserError for anything of another name, and for another size than 28x28: nothing is resized.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    paths = sorted(folder.iterdir())
    if not paths:
        raise UserError(f"{folder}: no image in it")
    for path in paths:
        if not re.fullmatch(r"[0-9]_.+\.png", path.name):
            raise UserError(f"{path}: is not named DIGIT_NAME.png, and every file here is read as a digit")
    if (size := decode_image(paths[0]).shape[1:]) != DIGIT_SIZE:
        raise UserError(f"{paths[0]}: is {size[1]}x{size[0]}, a digit must be 28x28 (nothing is resized)")
    return Images(decode_images(paths), torch.tensor([int(path.name[0]) for path in paths]), [p.name for p in paths])


@torch.inference_mode()
def features_of(net: nn.Module, pixels: Tensor, accelerator: Accelerator) -> np.ndarray:
    """What the last layer of `net` reads of uint8 images (n, 3, 28, 28), as float64 (n, features)."""
    parts = [net.features(some).cpu().double() for some in normalised_batches(pixels, accelerator.device)]
    return torch.cat(parts).numpy()


def vendi_score(features: np.ndarray, bandwidth: float) -> float:
    """The effective number of different images among features (n, d): 1 if all are alike, n if none is like another.

    The exponential of the entropy of the eigenvalues of K / n, with K the Gaussian kernel of that bandwidth.
    """
    kernel = rbf_kernel(features, gamma=0.5 / bandwidth**2)  # (n, n)
    return math.exp(entr(np.linalg.eigvalsh(kernel / len(kernel)).clip(0)).sum())


def diversity(generated: np.ndarray, real: np.ndarray, *key: int | str) -> dict[str, Any] | None:
    """Vendi scores of features (n, d) and (m, d) of one digit; percent_of_real is (generated - 1) / (real - 1) in %.

    Why this measure: of 100 real MNIST-M images, 5 in turn keep 0.3 to 0.4 of the diversity, and the 100 nearest to the
    mean of 1,000, which is what strong guidance makes, 0.25. The mean pairwise distance gives the first 0.9, and
    coverage (Naeem et al., 2020, https://arxiv.org/abs/2002.09797) the second 0.6 to 0.9. But noise is diverse too:
    this figure asks how different the images are, the accuracy how good.

    A score grows with the number of images, so equal numbers are compared: min(n, m) drawn by `key`, and as many real
    ones in each of up to 10 disjoint sets, whose mean and standard deviation are given. The kernel's bandwidth is the
    median distance of the real images, which frees the ratio of the scale of the features. None if there are fewer than
    two images, or if the real ones are all alike.
    """
    rng = generator(*key)
    generated, real = (rows[torch.randperm(len(rows), generator=rng).numpy()] for rows in (generated, real))
    count = min(len(generated), len(real))
    if count < 2 or not (bandwidth := float(np.median(pdist(real)))):
        return None
    sets = range(min(REAL_SETS, len(real) // count))
    scores = [vendi_score(real[k * count : (k + 1) * count], bandwidth) for k in sets]
    score, mean = vendi_score(generated[:count], bandwidth), float(np.mean(scores))
    if mean - 1 < 1e-6:
        return None
    compared = {"images": count, "generated": score, "real": mean}
    compared["real_sd"] = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
    return {"percent_of_real": 100 * (score - 1) / (mean - 1), **compared}


def judge(net: nn.Module, images: Images, real: Images | None, accelerator: Accelerator, seed: int) -> dict[str, Any]:
    """Accuracy in %, overall and by digit; diversity beside that of `real` images; confusion matrix (10, 10)."""
    matrix = confusion_matrix(images.labels, classify(net, images.pixels, accelerator), labels=range(10))
    digits = []
    for count, right in zip(matrix.sum(1).tolist(), matrix.diagonal().tolist(), strict=True):
        digits.append({"images": count, "accuracy": 100 * right / count if count else None, "diversity": None})
    if real:
        parts = [(features_of(net, some.pixels, accelerator), some.labels.numpy()) for some in (images, real)]
        for digit, row in enumerate(digits):
            row["diversity"] = diversity(*(f[labels == digit] for f, labels in parts), seed, "diversity", digit)
    found = [row["diversity"] for row in digits if row["diversity"]]
    spread = [100 * d["real_sd"] / (d["real"] - 1) for d in found if d["real_sd"] is not None]  # of one digit, in %
    return {
        "accuracy": 100 * float(matrix.trace() / matrix.sum()),
        "real_accuracy": accuracy(net, real, accelerator) if real else None,
        "diversity_percent_of_real": float(np.mean([d["percent_of_real"] for d in found])) if found else None,
        "real_diversity_sd": float(np.linalg.norm(spread)) / len(spread) if spread else None,  # of such a mean, in %
        "images": len(images.names),
        "digits": digits,  # the position is the digit
        "confusion": matrix.tolist(),
    }


def table_of(digits: list[dict[str, Any]]) -> str:
    """The lines that tell accuracy and diversity of each digit."""
    lines = ["digit  images  accuracy, %  diversity  real images'    ratio, %"]
    for digit, row in enumerate(digits):
        right = "none" if row["accuracy"] is None else f"{row['accuracy']:.2f}"
        line = f"{digit:5}  {row['images']:6,}  {right:>11}"
        if found := row["diversity"]:
            told = f"{found['real']:.2f}" + (f" ± {found['real_sd']:.2f}" if found["real_sd"] is not None else "")
            line += f"  {found['generated']:9.2f}  {told:>12}  {found['percent_of_real']:11.1f}"
        lines.append(line)
    return "\n".join(lines)


def save_confusion(matrix: list[list[int]], path: Path, title: str) -> None:
    """Draw a confusion matrix (10, 10): rows are the digits asked for, columns those the judge sees."""
    figure, axis = plt.subplots(figsize=(6, 6))
    ConfusionMatrixDisplay(np.array(matrix), display_labels=range(10)).plot(ax=axis, colorbar=False, cmap="Blues")
    axis.set(title=title, xlabel="digit seen by the classifier", ylabel="digit asked for")
    save_figure(figure, path)
