"""The noise that a network predicts, plainly or with classifier-free guidance.

Guidance: Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598. A network is called as
`net(x, time, labels, drop)`; its output (noise or v) is converted to noise here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffusion.schedule import Schedule


def predict_eps(
    net: nn.Module, schedule: Schedule, x: Tensor, t: int, labels: Tensor | None = None
) -> Tensor:
    """The noise in x_t, float32, for labels int64 (batch,) or none.

    `x` is (batch, channels, height, width), at the same step t for all.
    """
    steps = torch.full((len(x),), t, device=x.device)
    output = net(x, schedule.time(steps, net), labels).float()
    return schedule.eps_from_output(x, steps, output)


def guided_eps(
    net: nn.Module, schedule: Schedule, x: Tensor, t: int, labels: Tensor, guidance: float
) -> Tensor:
    """The noise with classifier-free guidance w: (1 + w) ε(x, class) - w ε(x, no class).

    Equation 6 of the paper. Both predictions are computed in one batch of twice the size.
    """
    steps = torch.full((len(x),), t, device=x.device)
    time = schedule.time(steps, net)
    drop = torch.arange(2 * len(x), device=x.device) >= len(x)  # the second half has no class
    output = net(x.repeat(2, 1, 1, 1), time.repeat(2), labels.repeat(2), drop).float()
    with_class, without_class = output.chunk(2)
    guided = torch.lerp(without_class, with_class, 1 + guidance)
    return schedule.eps_from_output(x, steps, guided)
