"""The noise that a network predicts: plainly, with classifier-free or with classifier guidance.

Classifier-free guidance: Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598. A network is
called as `net(x, time, labels, drop)`; its output (noise or v) is converted to noise here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


# Attributes: networks called as net(x, time, attributes=…) with 1, -1 and 0 for unknown


def attribute_eps(
    net: nn.Module, schedule: Schedule, x: Tensor, t: int, attributes: Tensor | None
) -> Tensor:
    """The noise in x_t, float32, for attributes (batch, attributes), or none for all unknown."""
    steps = torch.full((len(x),), t, device=x.device)
    output = net(x, schedule.time(steps, net), attributes=attributes).float()
    return schedule.eps_from_output(x, steps, output)


def composed_eps(
    net: nn.Module, schedule: Schedule, x: Tensor, t: int, terms: Tensor, weights: Tensor
) -> Tensor:
    """The noise of several conditions together: ε_0 + Σ w_k (ε_k - ε_0).

    Equation 11 of Liu et al., 2022, https://arxiv.org/abs/2206.01714; ε_0 knows no attribute. One
    term is classifier-free guidance, for which w = 1 is the network's own answer.

    `terms` is (terms, batch, attributes), `weights` is (terms,). All are computed in one batch.
    """
    count = len(terms) + 1
    steps = torch.full((len(x),), t, device=x.device)
    attributes = torch.cat((torch.zeros_like(terms[:1]), terms)).flatten(0, 1)
    time = schedule.time(steps, net).repeat(count)
    output = net(x.repeat(count, 1, 1, 1), time, attributes=attributes).float()
    unconditional, *others = output.chunk(count)
    composed = unconditional
    for weight, other in zip(weights, others, strict=True):
        composed = composed + weight * (other - unconditional)
    return schedule.eps_from_output(x, steps, composed)


# A classifier of noisy images: Dhariwal and Nichol, 2021, https://arxiv.org/abs/2105.05233


def log_probability(logits: Tensor, asked: Tensor) -> Tensor:
    """Σ_k w_k log p(attribute k is as asked), (batch,), of logits (batch, attributes).

    `asked` is (batch, attributes): its sign is what is asked, its size is w_k; 0 is not asked.
    """
    return (asked.abs() * F.logsigmoid(asked.sign() * logits)).sum(1)


def classifier_gradient(
    classifier: nn.Module, schedule: Schedule, x: Tensor, t: int, asked: Tensor
) -> Tensor:
    """∇ log p(asked | x_t) with respect to x_t: float32, in the shape of x.

    `asked` is that of `log_probability`. It also works where gradients are off, in inference mode,
    which has to be left for that, and it computes in float32 under autocast.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(x.device.type, None, False),
    ):
        x = x.detach().clone().float().requires_grad_()
        asked = asked.clone()
        steps = torch.full((len(x),), t, device=x.device)
        logits = classifier(x, schedule.time(steps, classifier))
        (gradient,) = torch.autograd.grad(log_probability(logits, asked).sum(), x)
    return gradient


def shifted_eps(schedule: Schedule, eps: Tensor, gradient: Tensor, t: int) -> Tensor:
    """The noise after classifier guidance: ε - √(1 - ᾱ_t) ∇ Σ w_k log p_k.

    Algorithm 2 of the paper, whose scale s is in the weights w_k: the score is -ε / √(1 - ᾱ_t), and
    the gradient is added to it.
    """
    return eps - math.sqrt(1 - schedule.alpha_bar[t]) * gradient
