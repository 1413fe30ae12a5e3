"""Two pieces of every training loop: the learning-rate schedule and the averaged network."""

from __future__ import annotations

import math

import torch
from torch import nn


def warmup_cosine(progress: float, warm_up: float) -> float:
    """Factor of the learning rate at `progress` in [0, 1].

    It rises linearly to 1 at `warm_up`, then falls along half a cosine to 0.
    """
    if progress < warm_up:
        return progress / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (progress - warm_up) / (1 - warm_up))


@torch.no_grad()
def update_ema(ema: nn.Module, net: nn.Module, decay: float, step: int) -> None:
    """Move the averaged network `ema` towards `net` after step 0, 1, ….

    Parameters become decay * ema + (1 - decay) * net, with the decay warmed up as
    min(decay, (1 + step) / (10 + step)). Buffers, such as BatchNorm's statistics, are copied.
    """
    decay = min(decay, (1 + step) / (10 + step))
    averages = list(ema.parameters())
    torch._foreach_lerp_(averages, list(net.parameters()), 1 - decay)  # pyright: ignore
    for ours, theirs in zip(ema.buffers(), net.buffers(), strict=True):
        ours.copy_(theirs)
