"""Noise levels σ of score-based models, and what a network with them says about an image.

An image x_0 with noise of standard deviation σ is x = x_0 + σ z. The network estimates the mean of
the clean images that x could have come from, D(x, σ). By Tweedie's formula the score is

    ∇ log p(x; σ) = (D(x, σ) - x) / σ²

EDM: Karras et al., 2022, https://arxiv.org/abs/2206.00364.
NCSN: Song and Ermon, 2019, https://arxiv.org/abs/1907.05600, and NCSNv2, 2020,
https://arxiv.org/abs/2006.09011.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

Parametrization = Literal["edm", "ncsn"]


class NoiseLevels:
    """The range of σ, the deviation of the data, and how the network's output becomes D(x, σ)."""

    def __init__(
        self,
        sigma_min: float,
        sigma_max: float,
        sigma_data: float,
        parametrization: Parametrization = "edm",
    ) -> None:
        """Keep the range sigma_min < sigma_max and the data's standard deviation sigma_data.

        parametrization "edm": D = c_skip x + c_out F, which asks the network F for a target of
        variance 1 at every σ (table 1 of EDM). "ncsn": the score is F / σ, so D = x + σ F.

        Raises ValueError unless 0 < sigma_min < sigma_max and 0 < sigma_data, all finite.
        """
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(
                f"σ must rise from sigma_min > 0 to a finite sigma_max, "
                f"not from {sigma_min:g} to {sigma_max:g}"
            )
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data must be above 0 and finite, not {sigma_data:g}")
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.sigma_data = sigma_data
        self.parametrization = parametrization

    def to_config(self) -> dict[str, Any]:
        """What a checkpoint keeps of the noise levels; the constructor's arguments."""
        return {
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "sigma_data": self.sigma_data,
            "parametrization": self.parametrization,
        }

    # Training

    def draw(self, count: int, rng: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
        """Random σ (count,) for training, within the range.

        "edm": log-normal around 0.6 times the data's deviation, with deviation 1.2 in log σ, where
        there is most to learn. That is EDM's choice (-1.2, for a deviation of 0.5). The few σ
        beyond the range become its ends. "ncsn": log-uniform.
        """
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        if self.parametrization == "edm":
            centre = math.log(self.sigma_data) + math.log(2) - 1.2
            log_sigma = centre + 1.2 * torch.randn(count, generator=rng, device=device)
            log_sigma = log_sigma.clamp(low, high)
        else:
            log_sigma = low + (high - low) * torch.rand(count, generator=rng, device=device)
        return log_sigma.exp()

    def weight(self, sigma: Tensor) -> Tensor:
        """Weights (batch,) of the squared error of D at σ (batch,).

        "edm": (σ² + σ_data²) / (σ σ_data)², after which all levels cost the same for an untrained
        network. "ncsn": 1 / σ². The error of the score, (D - x_0) / σ², then has the weight σ².
        """
        if self.parametrization == "edm":
            return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        return 1 / sigma**2

    # The network

    def time(self, sigma: Tensor) -> Tensor:
        """What the network reads for σ (batch,): the position of log σ in its range, 0 … 1000.

        The sinusoids of a U-Net tell steps from 0 to 1,000 apart, but not σ from 0.02 to 100.
        """
        span = math.log(self.sigma_max / self.sigma_min)
        return 1_000 * (sigma / self.sigma_min).log() / span

    def denoise(self, net: nn.Module, x: Tensor, sigma: Tensor) -> Tensor:
        """D(x, σ), float32, for x (batch, channels, height, width) and σ (batch,).

        `net` is called as net(c_in x, time), with c_in = 1 / √(σ² + σ_data²).
        """
        s = sigma.view(-1, 1, 1, 1)
        total = s**2 + self.sigma_data**2  # the variance of x
        output = net(x / total.sqrt(), self.time(sigma)).float()
        if self.parametrization == "ncsn":
            return x + s * output
        c_skip = self.sigma_data**2 / total
        c_out = s * self.sigma_data / total.sqrt()
        return c_skip * x + c_out * output


# The levels of a sampler, from high to low


def geometric_levels(sigma_max: float, sigma_min: float, count: int) -> list[float]:
    """`count` levels with a constant ratio, from sigma_max to exactly sigma_min (NCSN).

    One level is sigma_max alone. Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"a sampler needs at least one noise level, not {count}")
    if count == 1:
        return [sigma_max]
    span = math.log(sigma_min / sigma_max)
    inner = [sigma_max * math.exp(span * i / (count - 1)) for i in range(1, count - 1)]
    return [sigma_max, *inner, sigma_min]


def karras_levels(sigma_max: float, sigma_min: float, count: int, rho: float = 7.0) -> list[float]:
    """`count` levels, evenly spread in σ^(1/ρ): equation 5 of EDM, without the 0 at its end.

    A large ρ makes the steps near sigma_min shorter. One level is sigma_max alone. Raises
    ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"a sampler needs at least one noise level, not {count}")
    if count == 1:
        return [sigma_max]
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    inner = [(high + (low - high) * i / (count - 1)) ** rho for i in range(1, count - 1)]
    return [sigma_max, *inner, sigma_min]


def largest_distance(data: Tensor, pairs: int, rng: torch.Generator) -> float:
    """The largest distance of `pairs` random pairs of images (n, channels, height, width).

    NCSNv2 (technique 1) takes it for sigma_max: from there, noise carries a sample from any image
    to any other, so that brightness and layout can still be decided. Raises ValueError for fewer
    than two images, or if no two of the drawn images differ.
    """
    if len(data) < 2:
        raise ValueError(f"needs at least two images, not {len(data)}")
    first = torch.randint(len(data), (pairs,), generator=rng)
    shift = torch.randint(1, len(data), (pairs,), generator=rng)
    second = (first + shift) % len(data)  # never the same image
    largest = 0.0
    for a, b in zip(first.split(100), second.split(100), strict=True):
        distances = (data[a].float() - data[b].float()).flatten(1).norm(dim=1)
        largest = max(largest, distances.max().item())
    if largest == 0:
        raise ValueError("all images are the same")
    return largest


# Annealed Langevin dynamics: how many levels it needs, and how long its steps are


def level_ratio(dimensions: int) -> float:
    """The largest ratio γ of two levels between which Langevin dynamics can pass (NCSNv2).

    Noise of deviation σ in D dimensions lies on a thin shell: its length is about normal, with mean
    σ √D and deviation σ / √2. The shells of two levels must overlap, or a sample of the higher
    level is improbable at the lower one. Technique 2 asks that a sample of the lower level σ lies
    within three deviations of the shell of the higher level γ σ with probability one half:

        Φ(√(2D) (γ - 1) + 3γ) - Φ(√(2D) (γ - 1) - 3γ) = 0.5

    The difference falls as γ grows, so bisection finds γ. For a 64x64 colour image, D is 12,288 and
    γ is 1.0195.
    """
    low, high = 1.0, 3.0
    for _ in range(100):
        gamma = (low + high) / 2
        shift = math.sqrt(2 * dimensions) * (gamma - 1)
        overlap = normal_cdf(shift + 3 * gamma) - normal_cdf(shift - 3 * gamma)
        if overlap > 0.5:
            low = gamma
        else:
            high = gamma
    return low


def normal_cdf(x: float) -> float:
    """Φ: the probability that a standard normal number is below x."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


def levels_needed(sigma_max: float, sigma_min: float, dimensions: int) -> int:
    """How many levels technique 2 of NCSNv2 asks for between sigma_max and sigma_min."""
    steps = math.log(sigma_max / sigma_min) / math.log(level_ratio(dimensions))
    return 1 + round(steps)


def langevin_variance(e: float, ratio: float, steps: int) -> float:
    """The variance, relative to σ², after `steps` Langevin steps from one `ratio`² times as large.

    For noise alone the score is -x / σ². A step of length e σ² then turns the variance v σ² into
    ((1 - e)² v + 2e) σ², whose fixed point is a = 2 / (2 - e). After T steps from γ² (equation 4
    of NCSNv2) that is (1 - e)^(2T) (γ² - a) + a. Exact sampling would leave 1.
    """
    a = 2 / (2 - e)
    return (1 - e) ** (2 * steps) * (ratio**2 - a) + a


def langevin_length(ratio: float, steps: int) -> float:
    """The step length e, as a share of σ², that leaves the variance nearest to 1 (technique 4).

    `ratio` is that of neighbouring levels, `steps` the number of steps at each. The variance first
    falls with e, because the rest of the higher level fades, then rises with a: the search is for
    the lowest point, which lies above 1.
    """
    from scipy.optimize import minimize_scalar

    found: Any = minimize_scalar(
        lambda e: langevin_variance(e, ratio, steps), bounds=(1e-6, 1.0), options={"xatol": 1e-9}
    )
    return float(found.x)


def annealed_variance(ratio: float, steps: int, levels: int) -> float:
    """The variance, relative to σ_min², that annealed Langevin dynamics leaves of noise alone.

    The rule for e acts as if each level began with exactly the variance of the level before. In
    truth it begins with what was left there, so that the excess adds up over the levels. With one
    step at each level it comes to 2, whatever the ratio.
    """
    e = langevin_length(ratio, steps)
    variance = langevin_variance(e, 1.0, steps)  # the first level starts from its own noise
    for _ in range(levels - 1):
        variance = langevin_variance(e, ratio * math.sqrt(variance), steps)
    return variance
