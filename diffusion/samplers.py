"""One step of each sampler, from step t to an earlier step `previous` (0 is the clean image).

Each function is pure: it takes the state and returns the next one. The loop over the steps is in
the scripts. `x` is x_t, `eps` the predicted noise and `x0` the predicted clean image, all
(batch, channels, height, width); `noise` is standard normal, or None for a step without noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from diffusion.schedule import Schedule

Clamp = Literal["static", "dynamic", "none"]


def step_pairs(steps: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(t, previous) for falling steps: 981, 961, …, 1 gives (981, 961), …, (1, 0)."""
    return zip(steps, [*steps[1:], 0], strict=True)


def clamp_x0(x0: Tensor, clamp: Clamp) -> Tensor:
    """Bring predicted images back to [-1, 1].

    "static" cuts values off. "dynamic" first finds the 99.5th percentile of each image's absolute
    values, cuts off there and divides by it (Imagen, Saharia et al., 2022,
    https://arxiv.org/abs/2205.11487). "none" changes nothing.
    """
    if clamp == "static":
        return x0.clamp(-1, 1)
    if clamp == "dynamic":
        limit = torch.quantile(x0.abs().flatten(1), 0.995, dim=1).clamp(min=1)
        limit = limit.view(-1, 1, 1, 1)
        return x0.clamp(-limit, limit) / limit
    return x0


def ancestral_step(
    schedule: Schedule,
    x: Tensor,
    x0: Tensor,
    t: int,
    previous: int,
    noise: Tensor | None,
    large_sigma: bool = False,
) -> Tensor:
    """DDPM: a draw from q(x_previous | x_t, x_0), equation 7 of Ho et al., 2020.

    The variance is β̃, or β with `large_sigma` (section 3.2). `previous` may be any earlier step:
    ᾱ_t / ᾱ_previous takes the place of α_t.
    """
    a_t = schedule.alpha_bar[t]
    a_prev = schedule.alpha_bar[previous]
    alpha = a_t / a_prev
    beta = 1 - alpha
    mean = (math.sqrt(a_prev) * beta * x0 + math.sqrt(alpha) * (1 - a_prev) * x) / (1 - a_t)
    if noise is None:
        return mean
    shrink = 1.0 if large_sigma else (1 - a_prev) / (1 - a_t)
    return mean + math.sqrt(beta * shrink) * noise


def ddim_step(
    schedule: Schedule,
    x0: Tensor,
    eps: Tensor,
    t: int,
    previous: int,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """DDIM: equation 12 of Song et al., 2020, https://arxiv.org/abs/2010.02502.

    σ is that of equation 16: eta = 0 is deterministic, eta = 1 has the variance of DDPM.
    """
    a_t = schedule.alpha_bar[t]
    a_prev = schedule.alpha_bar[previous]
    sigma = eta * math.sqrt(max(0.0, (1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)))
    direction = math.sqrt(max(0.0, 1 - a_prev - sigma**2)) * eps  # points back to x_t
    x_prev = math.sqrt(a_prev) * x0 + direction
    if noise is not None:
        x_prev = x_prev + sigma * noise
    return x_prev


def dpm_solver_step(
    schedule: Schedule,
    x: Tensor,
    x0: Tensor,
    t: int,
    previous: int,
    before: tuple[int, Tensor] | None,
) -> Tensor:
    """DPM-Solver++(2M): algorithm 2 of Lu et al., 2022, https://arxiv.org/abs/2211.01095.

    `before` is t and x0 of the step before this one, from which x0 is extrapolated. The first step,
    where it is None, is of first order; the last one returns x0.
    """
    if previous == 0:
        return x0
    a_t = schedule.alpha_bar[t]
    a_prev = schedule.alpha_bar[previous]
    h = half_log_snr(a_prev) - half_log_snr(a_t)
    extrapolated = x0
    if before is not None:
        t_before, x0_before = before
        h_before = half_log_snr(a_t) - half_log_snr(schedule.alpha_bar[t_before])
        extrapolated = x0 + (x0 - x0_before) * h / (2 * h_before)
    shrink = math.sqrt((1 - a_prev) / (1 - a_t))
    return shrink * x - math.sqrt(a_prev) * math.expm1(-h) * extrapolated


def half_log_snr(alpha_bar: float) -> float:
    """λ = log(√ᾱ / √(1-ᾱ)), the time of DPM-Solver++."""
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))


# Score-based models: x is x_0 + σ z, `denoised` is D(x, σ), and `sigma` falls to `following`.


def score_of(x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    """∇ log p(x; σ) = (D - x) / σ²: Tweedie's formula."""
    return (denoised - x) / sigma**2


def langevin_step(x: Tensor, score: Tensor, step: float | Tensor, noise: Tensor) -> Tensor:
    """One step of Langevin dynamics, which stays at its noise level.

    x + α s + √(2α) z (NCSN, Song and Ermon, 2019, https://arxiv.org/abs/1907.05600, whose ε is 2α).
    `step` is α, one number or one for each image (batch, 1, 1, 1).
    """
    return x + step * score + (2 * step) ** 0.5 * noise


def corrector_length(score: Tensor, noise: Tensor, snr: float) -> Tensor:
    """α of the corrector for each image, (batch, 1, 1, 1): 2 (r |z| / |s|)².

    Algorithm 4 of Song et al., 2021, https://arxiv.org/abs/2011.13456. Their code takes the mean
    norms of the batch. Here each image has its own, so that it does not depend on its neighbours.
    """
    noise_norm = noise.flatten(1).norm(dim=1)
    score_norm = score.flatten(1).norm(dim=1).clamp(min=1e-12)
    return (2 * (snr * noise_norm / score_norm) ** 2).view(-1, 1, 1, 1)


def ve_ancestral_step(
    x: Tensor, denoised: Tensor, sigma: float, following: float, noise: Tensor | None
) -> Tensor:
    """A draw from q(x_following | x, x_0) with D for x_0 (Song et al., 2021, appendix F).

    The mean is D + (σ'² / σ²) (x - D), the variance σ'² (σ² - σ'²) / σ². At σ' = 0 this is D.
    """
    kept = following**2 / sigma**2
    mean = denoised + kept * (x - denoised)
    if noise is None:
        return mean
    return mean + math.sqrt(following**2 * (1 - kept)) * noise


def ode_slope(x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    """dx/dσ = (x - D) / σ along the probability-flow ODE: equations 1 and 3 of EDM, σ(t) = t."""
    return (x - denoised) / sigma


def euler_step(x: Tensor, slope: Tensor, sigma: float, following: float) -> Tensor:
    """One step of Euler's method along the ODE; at `following` = 0 it returns D."""
    return x + (following - sigma) * slope


def heun_step(
    x: Tensor, slope: Tensor, following_slope: Tensor, sigma: float, following: float
) -> Tensor:
    """One step of Heun's method: the mean of the slopes at both ends (algorithm 1 of EDM).

    `following_slope` is that at the point where Euler's step ends.
    """
    return x + (following - sigma) * (slope + following_slope) / 2
