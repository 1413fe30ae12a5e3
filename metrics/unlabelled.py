"""How good is a classifier on images without labels? Numbers that guess at its accuracy.

They are for choosing an epoch of domain adaptation: the target domain has no labels to choose by.
All read the class probabilities p (n, classes) that the classifier gives to n images, and more is
better. Each has a weakness. `CRITERIA` are those that do not prefer a classifier that puts all
images into one class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Criterion = Literal["infomax", "bnm", "corr_c"]
Selection = Literal["last", "source_accuracy", "infomax", "bnm", "corr_c"]
TEMPERATURE = 0.05  # of SND, as its authors have it
MOST_NEIGHBOURS = 3_000  # SND compares each of at most so many images with each other


def certainty(p: Tensor) -> float:
    """Minus the mean entropy of the images' probabilities, at most 0.

    A classifier that puts all images into one class with certainty reaches 0.
    """
    return -entropy(p).mean().item()


def infomax(p: Tensor) -> float:
    """Entropy of the mean probabilities, minus the mean entropy; from 0 to log(classes).

    Certain about each image, and balanced over all (Shi and Sha, 2012,
    https://arxiv.org/abs/1206.6438). It assumes that all classes are about equally frequent.
    """
    return (entropy(p.mean(0, keepdim=True)).mean() - entropy(p).mean()).item()


def bnm(p: Tensor) -> float:
    """Nuclear norm of p, divided by its largest value √(n · classes) (Cui et al., 2020).

    https://arxiv.org/abs/2003.12237. A classifier that puts all images into one class has
    1 / √classes. One that is right but very unsure, as in a first epoch, can have less.
    """
    largest = (p.shape[0] * p.shape[1]) ** 0.5
    return torch.linalg.matrix_norm(p.double(), "nuc").item() / largest


def corr_c(p: Tensor) -> float:
    """Cosine between the class correlation pᵀp and the identity (Tu et al., 2024).

    https://arxiv.org/abs/2406.09908. It is 1 for certain and balanced predictions, and 1 / √classes
    if all images are put into one class.
    """
    correlation = p.double().T @ p.double()  # (classes, classes)
    return (correlation.trace() / (p.shape[1] ** 0.5 * correlation.norm())).item()


def snd(p: Tensor) -> float:
    """Soft neighbourhood density (Saito et al., 2021, https://arxiv.org/abs/2108.10860).

    The mean entropy of the similarities of an image to the others: images of one class should be
    close together. A classifier that puts all images into one class has the largest value.
    """
    some = F.normalize(p[:MOST_NEIGHBOURS].float(), dim=1)
    similarities = some @ some.T / TEMPERATURE  # (n, n)
    similarities.fill_diagonal_(-torch.inf)  # an image is not its own neighbour
    return entropy(similarities.softmax(1)).mean().item()


def entropy(p: Tensor) -> Tensor:
    """The entropy of each row of probabilities (n, classes), in nats: (n,)."""
    return torch.special.entr(p.double()).sum(1)


# Those to choose an epoch by.
CRITERIA: dict[Criterion, Callable[[Tensor], float]] = {
    "infomax": infomax,
    "bnm": bnm,
    "corr_c": corr_c,
}


def all_criteria(p: Tensor) -> dict[str, float]:
    """Every number of this module for probabilities (n, classes), by name."""
    found = {name: criterion(p) for name, criterion in CRITERIA.items()}
    return found | {"certainty": certainty(p), "snd": snd(p)}


def selected_epoch(rows: list[dict[str, Any]], selection: Selection) -> dict[str, Any]:
    """The row of the last epoch, or of the first one with the largest value of `selection`.

    `rows` has one row for each epoch, with the criteria and "source_accuracy" in it.
    """
    if selection == "last":
        return rows[-1]
    return max(rows, key=lambda row: row[selection])
