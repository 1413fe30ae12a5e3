"""Losses on images of the target, which need no labels. They read the scores of the classes.

InfoMax: Liang et al. (SHOT), 2020, https://arxiv.org/abs/2002.08546.
Minimum class confusion: Jin et al., 2020, https://arxiv.org/abs/1912.03699.
"""

from __future__ import annotations

import torch
from torch import Tensor


def infomax_loss(scores: Tensor) -> Tensor:
    """Mean entropy of the images, minus the entropy of their mean (SHOT's equations 3 and 4).

    `scores` are those of the classes for target images, (batch, classes).
    """
    log_p = scores.log_softmax(1)
    each = -(log_p.exp() * log_p).sum(1).mean()
    mean = log_p.exp().mean(0).clamp(min=1e-8)
    of_mean = -(mean * mean.log()).sum()
    return each - of_mean


def confusion_loss(scores: Tensor, temperature: float = 2.5) -> Tensor:
    """Minimum class confusion: how much classes share the images, between 0 and 1.

    `scores` are those of the classes for target images, (batch, classes). Images of which the
    network is certain weigh more (equations 4 to 8 of Jin et al.).
    """
    p = (scores / temperature).softmax(1)
    weights = 1 + torch.exp(-torch.special.entr(p).sum(1).detach())  # (batch,)
    weights = weights / weights.mean()
    confusion = p.T @ (weights[:, None] * p)  # (classes, classes)
    confusion = confusion / confusion.sum(1, keepdim=True).clamp(min=1e-8)
    return 1 - confusion.trace() / len(confusion)
