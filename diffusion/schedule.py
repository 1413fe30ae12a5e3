"""The noise schedule of a diffusion model and what follows from it.

Steps t run from 1 to T; t = 0 is the clean image. With ᾱ_t = Π_{s≤t} (1 - β_s),

    x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε        (equation 4 of DDPM)

DDPM: Ho et al., 2020, https://arxiv.org/abs/2006.11239.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Kind = Literal["linear", "cosine"]
AnyKind = Literal["linear", "cosine", "scaled-linear"]  # the third is Stable Diffusion's
Rule = Literal["as-given", "scaled", "respaced"]
Prediction = Literal["eps", "v", "x0"]
Spacing = Literal["leading", "trailing", "beta"]
USUAL_T = 1_000  # the T for which the range of the linear schedule is meant


class Schedule:
    """β_t and ᾱ_t for t = 0 … T.

    `alpha_bar[t]` are Python floats (float64), for the samplers. `betas` and `alpha_bars` are
    float32 tensors (T + 1,), for training.
    """

    def __init__(
        self,
        timesteps: int = 1_000,
        kind: AnyKind = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        rule: Rule = "scaled",
        prediction: Prediction = "eps",
        counted_to: int = USUAL_T,
    ) -> None:
        """Compute the schedule in float64.

        kind "linear": β rises from beta_start to beta_end. That range belongs to T = 1000, and
        `rule` says what becomes of it for another T:

        - "as-given": nothing. ᾱ_T is then 0.904 at T = 10, so that training never shows pure noise,
          from which sampling starts.
        - "scaled": β times 1000 / T. β reaches 1 for T ≤ 20.
        - "respaced": ᾱ_t is that of step 1000 t / T of the 1,000 steps, as if a sampler took only T
          of them (Nichol and Dhariwal, 2021). It needs a T of at most 1,000.

        kind "cosine": Nichol and Dhariwal, 2021, https://arxiv.org/abs/2102.09672.

        kind "scaled-linear": √β rises linearly, as in Stable Diffusion, whatever T is.

        prediction: what a network learns to return for x_t. "eps" is the noise, "v" the velocity
        √ᾱ_t ε - √(1-ᾱ_t) x_0, which depends on the image at every noise level (Salimans and Ho,
        2022, https://arxiv.org/abs/2202.00512). "x0" is the clean image: a narrow network that sees
        large patches can draw it more easily than noise.

        counted_to: a network that counts steps reads up to this number for every T (see `time`).

        Raises ValueError for T < 2, for a β outside (0, 1), and for T > 1000 steps respaced.
        """
        self.kind = kind
        self.beta_start = beta_start
        self.beta_end = beta_end
        self.rule: Rule = rule
        self.prediction = prediction
        self.T = timesteps
        self.counted_to = counted_to
        if timesteps < 2:
            raise ValueError(f"a noise schedule needs at least 2 steps, not {timesteps}")
        if kind not in get_args(AnyKind) or prediction not in get_args(Prediction):
            raise ValueError(
                f"no noise schedule is called {kind!r} with the prediction {prediction!r}"
            )
        betas = self._betas()
        lowest, highest = betas.min().item(), betas.max().item()
        if lowest <= 0 or highest >= 1:
            raise ValueError(
                f"β would go from {lowest:.3g} to {highest:.3g}, but must lie between 0 and 1"
            )
        exact = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
        self.alpha_bar: list[float] = exact.tolist()
        self.betas = torch.cat([torch.zeros(1), betas.float()])
        self.alpha_bars = exact.float()

    def _betas(self) -> Tensor:
        if self.kind == "linear":
            return self._linear_betas()
        if self.kind == "cosine":
            return self._cosine_betas()
        first, last = math.sqrt(self.beta_start), math.sqrt(self.beta_end)
        return torch.linspace(first, last, self.T, dtype=torch.float64) ** 2

    def _linear_betas(self) -> Tensor:
        if self.rule == "respaced":
            return self._respaced_betas()
        scale = USUAL_T / self.T if self.rule == "scaled" else 1.0
        first, last = scale * self.beta_start, scale * self.beta_end
        return torch.linspace(first, last, self.T, dtype=torch.float64)

    def _respaced_betas(self) -> Tensor:
        """β_t = 1 - ᾱ_t / ᾱ_{t-1}, with the ᾱ of T evenly spread ones of the 1,000 steps."""
        betas = torch.linspace(self.beta_start, self.beta_end, USUAL_T, dtype=torch.float64)
        if self.T == USUAL_T:
            return betas
        if self.T > USUAL_T:
            raise ValueError(f"the respaced schedule has at most {USUAL_T:,} steps, not {self.T:,}")
        every = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
        kept = [0, *reversed(spaced_steps(USUAL_T, self.T))]
        alpha_bar = every[kept]
        return 1 - alpha_bar[1:] / alpha_bar[:-1]

    def _cosine_betas(self) -> Tensor:
        progress = torch.arange(self.T + 1, dtype=torch.float64) / self.T
        f = torch.cos((progress + 0.008) / 1.008 * math.pi / 2) ** 2  # ᾱ_t up to a factor
        return (1 - f[1:] / f[:-1]).clamp(max=0.999)

    def to_config(self) -> dict[str, Any]:
        """What a checkpoint keeps of the schedule; `from_config` reads it."""
        return {
            "steps": self.T,
            "kind": self.kind,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "rule": self.rule,
            "prediction": self.prediction,
            "counted_to": self.counted_to,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Schedule:
        """The schedule that a checkpoint's configuration describes.

        Older checkpoints have `as_given`, true or false, in place of `rule`; their networks counted
        the steps to T.
        """
        options = dict(config)
        timesteps = options.pop("steps", USUAL_T)
        if "as_given" in options:
            as_given = options.pop("as_given")
            options["rule"] = "as-given" if as_given else "scaled"
            options["counted_to"] = timesteps
        return cls(timesteps, **options)

    # Training

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1-ᾱ_t), each (batch, 1, 1, 1), for steps t (batch,)."""
        self.alpha_bars = self.alpha_bars.to(t.device)
        alpha_bar = self.alpha_bars[t].view(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def time(self, t: Tensor, net: nn.Module) -> Tensor:
        """What a network reads for steps t (batch,).

        t / T, or with the attribute `counts_steps` the number of the step from 0 among 1,000: that
        is 1000 t / T - 1, so that networks for any T share one embedding of the time.
        """
        if getattr(net, "counts_steps", False):
            return t * (self.counted_to / self.T) - 1
        return t / self.T

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t of images x0 (batch, channels, height, width) at steps t (batch,): equation 4."""
        signal, sigma = self.coefficients(t)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should return for q_sample(x0, t, noise): the noise, v, or x0."""
        if self.prediction == "eps":
            return noise
        if self.prediction == "x0":
            return x0
        signal, sigma = self.coefficients(t)
        return signal * noise - sigma * x0

    def min_snr_weight(self, t: Tensor, gamma: float = 5.0) -> Tensor:
        """Weights (batch,) that make the loss min(SNR, γ) times the squared error of the image.

        min(SNR, γ) / SNR if the noise is predicted, min(SNR, γ) / (SNR + 1) for v, and min(SNR, γ)
        for the image (Hang et al., 2023, https://arxiv.org/abs/2303.09556). SNR = ᾱ_t / (1 - ᾱ_t).
        """
        alpha_bar = self.alpha_bars.to(t.device)[t]
        weight = (gamma * (1 - alpha_bar) / alpha_bar).clamp(max=1.0)
        if self.prediction == "v":
            return weight * alpha_bar  # SNR / (SNR + 1) = ᾱ
        if self.prediction == "x0":
            return weight * alpha_bar / (1 - alpha_bar)
        return weight

    # Conversions between what a network predicts

    def eps_from_output(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The noise in x_t according to the network's output for steps t (batch,)."""
        if self.prediction == "eps":
            return output
        signal, sigma = self.coefficients(t)
        if self.prediction == "x0":
            return (x - signal * output) / sigma
        return signal * output + sigma * x

    def x0_from_output(self, x: Tensor, t: int, output: Tensor) -> Tensor:
        """The clean image according to the network's output for step t."""
        if self.prediction == "x0":
            return output
        if self.prediction == "eps":
            return self.x0_from_eps(x, t, output)
        alpha_bar = self.alpha_bar[t]
        return math.sqrt(alpha_bar) * x - math.sqrt(1 - alpha_bar) * output

    def x0_from_eps(self, x: Tensor, t: int, eps: Tensor) -> Tensor:
        """The clean image that x_t and its noise imply: equation 15 of DDPM."""
        alpha_bar = self.alpha_bar[t]
        return (x - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)

    def score_from_eps(self, t: int, eps: Tensor) -> Tensor:
        """∇ log q(x_t) ≈ -ε / √(1-ᾱ_t) (Song et al., 2021, https://arxiv.org/abs/2011.13456)."""
        return -eps / math.sqrt(1 - self.alpha_bar[t])


def spaced_steps(
    timesteps: int, count: int, spacing: Spacing = "trailing", offset: int = 0
) -> list[int]:
    """Exactly `count` of the steps 1 … T, falling. A sampler goes from each to the next, then to 0.

    "trailing": evenly spread, starts at T.
    "leading": evenly spread, ends at 1 + offset, as in DDIM's code (offset 0) and the course's (1).
    "beta": starts at T and is dense at both ends, where the brightness and the details of an image
    are settled: quantiles of Beta(0.6, 0.6) (Lee et al., 2024, https://arxiv.org/abs/2407.12173).

    Raises ValueError for a count outside 1 … T, and for an offset that leads beyond T.
    """
    if not 1 <= count <= timesteps:
        raise ValueError(f"the number of steps must be between 1 and {timesteps:,}, not {count}")
    if spacing == "trailing":
        return [round(timesteps * number / count) for number in range(count, 0, -1)]
    if spacing == "beta":
        return _beta_spaced(timesteps, count)
    steps = [1 + offset + timesteps * number // count for number in range(count - 1, -1, -1)]
    if steps[0] > timesteps:
        raise ValueError(
            f"{count} steps would start at {steps[0]}, but the last step is {timesteps:,}"
        )
    return steps


def _beta_spaced(timesteps: int, count: int) -> list[int]:
    from scipy.special import betaincinv  # the quantile function of the Beta distribution

    steps = []
    for number in range(1, count + 1):
        step = round(timesteps * betaincinv(0.6, 0.6, number / count))
        # Where many steps would coincide near an end, they follow one another there.
        step = max(step, number)
        step = min(step, timesteps - count + number)
        steps.append(step)
    return steps[::-1]
