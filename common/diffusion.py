"""Diffusion: noise schedule, forward process, guidance and samplers, shared by training and inference.

Steps t run from 1 to T; t = 0 is the clean image. With ᾱ_t = Π_{s≤t} (1 - β_s), x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε.
DDPM: Ho et al., 2020, https://arxiv.org/abs/2006.11239. DDIM: Song et al., 2020, https://arxiv.org/abs/2010.02502.
DPM-Solver++: Lu et al., 2022, https://arxiv.org/abs/2211.01095. Guidance: Ho and Salimans, 2022,
https://arxiv.org/abs/2207.12598
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from scipy.special import betaincinv
from torch import Tensor, nn

from common.run import UserError

Kind = Literal["linear", "cosine"]
Prediction = Literal["eps", "v"]
Sampler = Literal["ddpm", "ddim", "dpm-solver++"]
Clamp = Literal["static", "dynamic", "none"]
Spacing = Literal["leading", "trailing", "beta"]


class Schedule:
    """β_t and ᾱ_t for t = 0 … T, computed in float64; `betas` and `alpha_bars` are float32 tensors (T + 1,).

    kind "linear": β from beta_start to beta_end, as stated for T = 1000; for another T the range is scaled by 1000 / T,
    for else little noise would be left at T (or the signal be gone early), unless `as_given`. kind "cosine": Nichol and
    Dhariwal, 2021, https://arxiv.org/abs/2102.09672. Raises UserError for a range that leaves (0, 1).

    `prediction` is what a net learns to give for x_t: the noise "eps", or the velocity "v" = √ᾱ_t ε - √(1-ᾱ_t) x_0,
    which tells as much of the image in strong noise as in weak (Salimans and Ho, 2022,
    https://arxiv.org/abs/2202.00512).
    """

    def __init__(
        self,
        steps: int = 1_000,
        kind: Kind = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        as_given: bool = False,
        prediction: Prediction = "eps",
    ) -> None:
        self.config = {"steps": steps, "kind": kind, "beta_start": beta_start, "beta_end": beta_end}
        self.config |= {"as_given": as_given, "prediction": prediction}
        if steps < 2:
            raise UserError(f"--steps {steps}: a noise schedule has at least 2")
        self.T, self.prediction = steps, prediction
        if kind == "linear":
            scale = 1.0 if as_given else 1_000 / steps
            betas = torch.linspace(scale * beta_start, scale * beta_end, steps, dtype=torch.float64)
        else:
            f = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        if betas.min() <= 0 or betas.max() >= 1:
            told = f"β would go from {betas.min():.3g} to {betas.max():.3g}, and must lie between 0 and 1"
            raise UserError(f"--steps {steps}: {told}")
        exact = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
        self.a = exact.tolist()  # ᾱ_t as Python floats, for the samplers
        self.betas = torch.cat([torch.zeros(1), betas.float()])
        self.alpha_bars = exact.float()

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1-ᾱ_t) as (batch, 1, 1, 1), for steps t (batch,)."""
        self.alpha_bars = self.alpha_bars.to(t.device)
        alpha_bar = self.alpha_bars[t].view(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def time(self, t: Tensor, net: nn.Module) -> Tensor:
        """What a net reads for steps t (batch,): t - 1 if it counts steps from 0 (`counts_steps`), else t / T."""
        return (t - 1).float() if getattr(net, "counts_steps", False) else t / self.T

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t of images x0 (batch, channels, height, width), steps t (batch,) and standard normal noise (eq. 4)."""
        signal, sigma = self.coefficients(t)
        return signal * x0 + sigma * noise

    def x0_of(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The clean image that x_t and its noise eps imply (equation 15 of DDPM)."""
        signal, sigma = self.coefficients(t)
        return (x - sigma * eps) / signal

    def score_of(self, t: Tensor, eps: Tensor) -> Tensor:
        """∇ log q(x_t) ≈ -eps / √(1-ᾱ_t) (Song et al., 2021, https://arxiv.org/abs/2011.13456)."""
        return -eps / self.coefficients(t)[1]

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What a net is to give for q_sample(x0, t, noise): the noise, or v."""
        if self.prediction == "eps":
            return noise
        signal, sigma = self.coefficients(t)
        return signal * noise - sigma * x0

    def eps_of(self, x: Tensor, t: Tensor, predicted: Tensor) -> Tensor:
        """The noise in x_t by what a net gave for it."""
        if self.prediction == "eps":
            return predicted
        signal, sigma = self.coefficients(t)
        return signal * predicted + sigma * x

    def min_snr_weight(self, t: Tensor, gamma: float = 5.0) -> Tensor:
        """Weight (batch,) of the loss that makes it min(SNR, γ) times the squared error of the clean image.

        min(SNR, γ) / SNR for the noise, min(SNR, γ) / (SNR + 1) for v (Hang et al., 2023, arxiv.org/abs/2303.09556).
        """
        alpha_bar = self.alpha_bars.to(t.device)[t]
        weight = (gamma * (1 - alpha_bar) / alpha_bar).clamp(max=1.0)
        return weight if self.prediction == "eps" else weight * alpha_bar  # SNR / (SNR + 1) = ᾱ

    def subset(self, count: int, spacing: Spacing = "trailing", offset: int = 0) -> list[int]:
        """Exactly `count` of the steps 1 … T, falling; a sampler goes from each to the next, then to 0.

        "trailing" and "leading" are evenly spread; the first begins at T, the second ends at 1 + offset, as DDIM's code
        (offset 0) and the course's (1) do. "beta" begins at T and is dense at both ends, where the brightness and the
        details of an image are settled: quantiles of Beta(0.6, 0.6) (Lee et al., 2024, arxiv.org/abs/2407.12173).
        """
        if not 1 <= count <= self.T:
            raise UserError(f"--steps {count}: must be 1 to {self.T:,}, those of the noise schedule")
        if spacing == "trailing":
            steps = [round(self.T * number / count) for number in range(count, 0, -1)]
        elif spacing == "beta":
            quantiles = [round(self.T * betaincinv(0.6, 0.6, number / count)) for number in range(1, count + 1)]
            # Many steps lie so densely at the ends that they would coincide: there they follow one on the other.
            steps = [min(max(q, n), self.T - count + n) for n, q in enumerate(quantiles, 1)][::-1]
        else:
            steps = [1 + offset + self.T * number // count for number in range(count - 1, -1, -1)]
        if steps[0] > self.T:
            raise UserError(f"--offset {offset}: {count} steps would begin at {steps[0]}, after {self.T:,}, the last")
        return steps


class Step(NamedTuple):
    """What a sampler yields: the step it has reached, its image there, and the clean image it predicts."""

    t: int
    x: Tensor
    x0: Tensor


def predictor(
    net: nn.Module,
    schedule: Schedule,
    labels: Tensor | None = None,
    guidance: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Callable[[Tensor, int], Tensor]:
    """A function (x, t) → noise, with classifier-free guidance: (1 + w) ε(x, class) - w ε(x, nothing).

    w = 0 is the conditional net alone, one pass; else both are one batch of twice the size. Guidance is on while t / T
    lies in `interval` (Kynkäänniemi et al., 2024, https://arxiv.org/abs/2404.07724). The net is called as
    `net(x, time, labels, drop)`; what it gives is what the schedule says, here made the noise.
    """

    def predict(x: Tensor, t: int) -> Tensor:
        steps = torch.full((len(x),), t, device=x.device)
        time = schedule.time(steps, net)
        if labels is None or guidance == 0 or not interval[0] <= t / schedule.T <= interval[1]:
            return schedule.eps_of(x, steps, net(x, time, labels).float())
        drop = torch.arange(2 * len(x), device=x.device) >= len(x)
        both = net(x.repeat(2, 1, 1, 1), time.repeat(2), labels.repeat(2), drop).float()
        conditional, unconditional = both.chunk(2)
        return schedule.eps_of(x, steps, torch.lerp(unconditional, conditional, 1 + guidance))

    return predict


def clamp_x0(x0: Tensor, clamp: Clamp) -> Tensor:
    """Bring predicted images back to [-1, 1]; "dynamic" scales by the 99.5th percentile of each (Imagen, 2022)."""
    if clamp == "static":
        return x0.clamp(-1, 1)
    if clamp == "dynamic":
        limit = torch.quantile(x0.abs().flatten(1), 0.995, dim=1).clamp(min=1).view(-1, 1, 1, 1)
        return x0.clamp(-limit, limit) / limit
    return x0


def sample(
    schedule: Schedule,
    predict: Callable[[Tensor, int], Tensor],
    x: Tensor,
    steps: Sequence[int],
    sampler: Sampler = "ddpm",
    *,
    eta: float = 0.0,
    large_sigma: bool = False,
    clamp: Clamp = "static",
    final_alpha: float = 1.0,
    draw: Callable[[], Tensor] | None = None,
) -> Iterator[Step]:
    """Go from x at steps[0] down the falling `steps` to 0; yields after each, so len(steps) times.

    ddpm: ancestral sampling, the posterior between any two steps, with the variance β̃ or, for `large_sigma`, β
    (section 3.2). ddim: equation 12 with σ by equation 16, eta = 1 being DDPM's. dpm-solver++: second order, two steps
    of memory, the last step of first order. `draw()` gives the noise of one step; no noise is added at the last.
    `final_alpha` is the ᾱ of the clean image, of ddpm and ddim: 1, or ᾱ_1 as some published samplers have it.
    """
    x0_before, log_snr_before = None, math.nan
    for t, s in zip(steps, [*steps[1:], 0], strict=True):
        a_t, a_s = schedule.a[t], schedule.a[s] if s else final_alpha
        eps = predict(x, t)
        x0 = clamp_x0((x - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t), clamp)
        if sampler == "ddpm":
            ratio = a_t / a_s  # ᾱ_t / ᾱ_s, which is α_t for neighbours
            mean = (math.sqrt(a_s) * (1 - ratio) * x0 + math.sqrt(ratio) * (1 - a_s) * x) / (1 - a_t)  # eq. 7
            variance = (1 - ratio) * (1.0 if large_sigma else (1 - a_s) / (1 - a_t))
            x = mean + math.sqrt(variance) * draw() if s else mean
        elif sampler == "ddim":
            sigma = eta * math.sqrt(max(0.0, (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)))
            x = math.sqrt(a_s) * x0 + math.sqrt(max(0.0, 1 - a_s - sigma**2)) * eps
            if sigma > 0 and s:
                x = x + sigma * draw()
        else:
            log_snr = 0.5 * math.log(a_t / (1 - a_t))
            data = x0
            if s == 0:
                x = x0
            else:
                h = 0.5 * math.log(a_s / (1 - a_s)) - log_snr
                if x0_before is not None:
                    data = x0 + (x0 - x0_before) * h / (2 * (log_snr - log_snr_before))
                x = math.sqrt((1 - a_s) / (1 - a_t)) * x - math.sqrt(a_s) * math.expm1(-h) * data
            x0_before, log_snr_before = x0, log_snr
        yield Step(s, x, x0)
