"""Generators and discriminators of 64x64 faces: DCGAN's and WGAN-GP's, as course reports print them.

DCGAN: Radford et al., 2015, https://arxiv.org/abs/1511.06434. WGAN-GP: Gulrajani et al., 2017,
https://arxiv.org/abs/1704.00028. A generator maps latents (batch, 100) to images (batch, 3, 64, 64) in [-1, 1]; a
discriminator or critic maps images to one unbounded number each, (batch,).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

Norm = Literal["instance", "layer", "none"]


def initialise(net: nn.Module) -> None:
    """DCGAN's initialisation: weights normal(0, 0.02) (section 4); BatchNorm scales normal(1, 0.02), shifts 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)


class Generator(nn.Module):
    """The generator of DCGAN: 4x4 transposed convolutions, 1 → 4 → 8 → 16 → 32 → 64 pixels, 3.6 M parameters."""

    def __init__(self, latent: int = 100, width: int = 64) -> None:
        super().__init__()
        self.config = {"net": "generator", "arguments": {"latent": latent, "width": width}}
        self.latent = latent
        layers: list[nn.Module] = []
        for before, after in ((latent, 8 * width), (8 * width, 4 * width), (4 * width, 2 * width), (2 * width, width)):
            stride, padding = (2, 1) if layers else (1, 0)
            layers.append(nn.ConvTranspose2d(before, after, 4, stride, padding, bias=False))
            layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh())
        initialise(self)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (batch, latent) → images (batch, 3, 64, 64) in [-1, 1]."""
        return self.main(latents[:, :, None, None])  # (batch, latent) → (batch, latent, 1, 1)


class ProjectionGenerator(nn.Module):
    """The larger generator: projection to 1024x4x4, then 5x5 transposed convolutions, 18.8 M parameters."""

    def __init__(self, latent: int = 100, width: int = 64) -> None:
        super().__init__()
        self.config = {"net": "projection", "arguments": {"latent": latent, "width": width}}
        self.latent = latent

        def double(before: int, after: int) -> nn.Module:  # twice the height and width
            return nn.ConvTranspose2d(before, after, 5, 2, padding=2, output_padding=1, bias=False)

        wide = 16 * width
        self.project = nn.Sequential(
            nn.ConvTranspose2d(latent, wide, 4, bias=False), nn.BatchNorm2d(wide), nn.ReLU(inplace=True)
        )
        self.conv = nn.Sequential(
            *(
                nn.Sequential(double(2 * after, after), nn.BatchNorm2d(after), nn.ReLU(inplace=True))
                for after in (8 * width, 4 * width, 2 * width)
            )
        )
        self.last = nn.Sequential(double(2 * width, 3), nn.Tanh())
        initialise(self)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (batch, latent) → images (batch, 3, 64, 64) in [-1, 1]."""
        return self.last(self.conv(self.project(latents[:, :, None, None])))


class InstanceNorm(nn.Module):
    """nn.InstanceNorm2d without parameters, by mean and variance: its second derivative is many times as fast."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width), normalised over height and width."""
        variance, mean = torch.var_mean(x.float(), dim=(2, 3), correction=0, keepdim=True)
        return ((x - mean) * (variance + 1e-5).rsqrt()).to(x.dtype)


def _downwards(width: int, norm: Callable[[int, int], nn.Module]) -> nn.Sequential:
    """4x4 convolutions, 64 → 32 → 16 → 8 → 4 → 1 pixels; `norm(channels, size)` follows all but the first and last."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    for before, after, size in ((width, 2 * width, 16), (2 * width, 4 * width, 8), (4 * width, 8 * width, 4)):
        layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), norm(after, size), nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, bias=False))


class Discriminator(nn.Module):
    """The discriminator of DCGAN. It answers with logits: the Sigmoid that reports print last lives in the loss."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.main = _downwards(width, lambda channels, size: nn.BatchNorm2d(channels))
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 3, 64, 64) in [-1, 1] → logits (batch,), positive for real."""
        return self.main(images).flatten()  # (batch, 1, 1, 1) → (batch,)


class Critic(nn.Module):
    """The critic of WGAN-GP: DCGAN's discriminator without batch statistics, which would mix the images' penalties."""

    def __init__(self, width: int = 64, norm: Norm = "layer", spectral: bool = False) -> None:
        super().__init__()
        norms = {
            "instance": lambda channels, size: InstanceNorm(),
            "layer": lambda channels, size: nn.LayerNorm((channels, size, size)),
            "none": lambda channels, size: nn.Identity(),
        }
        self.main = _downwards(width, norms[norm])
        initialise(self)
        if spectral:  # Miyato et al., 2018, https://arxiv.org/abs/1802.05957
            for module in self.main:
                if isinstance(module, nn.Conv2d):
                    parametrizations.spectral_norm(module)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 3, 64, 64) in [-1, 1] → scores (batch,), higher for real."""
        return self.main(images).flatten()  # (batch, 1, 1, 1) → (batch,)


GENERATORS = {"generator": Generator, "projection": ProjectionGenerator}
