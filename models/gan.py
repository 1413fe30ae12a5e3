"""Generators and discriminators of 64x64 faces, DCGAN's and WGAN-GP's as reports print them.

A generator maps latents (batch, 100) to images (batch, 3, 64, 64) in [-1, 1]. A discriminator or
critic maps images to one unbounded number each, (batch,).

DCGAN: Radford et al., 2015, https://arxiv.org/abs/1511.06434. WGAN-GP: Gulrajani et al., 2017,
https://arxiv.org/abs/1704.00028.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from models.network import Network

Norm = Literal["instance", "layer", "none"]


def initialise(net: nn.Module) -> None:
    """Initialise as DCGAN does (section 4).

    Convolutions: weights from normal(0, 0.02). BatchNorm: scales from normal(1, 0.02), shifts 0.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)


class Generator(Network):
    """The generator of DCGAN: five 4x4 transposed convolutions, 3.6 M parameters at width 64."""

    def __init__(self, latent: int = 100, width: int = 64) -> None:
        super().__init__()
        self.config = {"net": "generator", "arguments": {"latent": latent, "width": width}}
        self.latent = latent
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(latent, 8 * width, 4, bias=False),  # 1 → 4 pixels
            nn.BatchNorm2d(8 * width),
            nn.ReLU(inplace=True),
        ]
        for factor in (8, 4, 2):  # 4 → 8 → 16 → 32 pixels
            before, after = factor * width, factor * width // 2
            layers += [
                nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]
        layers += [nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh()]  # 32 → 64 pixels
        self.main = nn.Sequential(*layers)
        initialise(self)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (batch, latent) → images (batch, 3, 64, 64) in [-1, 1]."""
        return self.main(latents[:, :, None, None])  # (batch, latent) → (batch, latent, 1, 1)


class ProjectionGenerator(Network):
    """A larger generator: projection to 1024x4x4, then 5x5 transposed convolutions.

    18.8 M parameters at width 64.
    """

    def __init__(self, latent: int = 100, width: int = 64) -> None:
        super().__init__()
        self.config = {"net": "projection", "arguments": {"latent": latent, "width": width}}
        self.latent = latent

        def upsample(before: int, after: int) -> nn.Module:  # twice the height and width
            return nn.ConvTranspose2d(before, after, 5, 2, padding=2, output_padding=1, bias=False)

        wide = 16 * width
        self.project = nn.Sequential(
            nn.ConvTranspose2d(latent, wide, 4, bias=False),  # 1 → 4 pixels
            nn.BatchNorm2d(wide),
            nn.ReLU(inplace=True),
        )
        blocks = []
        for after in (8 * width, 4 * width, 2 * width):  # 4 → 8 → 16 → 32 pixels
            block = nn.Sequential(
                upsample(2 * after, after), nn.BatchNorm2d(after), nn.ReLU(inplace=True)
            )
            blocks.append(block)
        self.conv = nn.Sequential(*blocks)
        self.last = nn.Sequential(upsample(2 * width, 3), nn.Tanh())  # 32 → 64 pixels
        initialise(self)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (batch, latent) → images (batch, 3, 64, 64) in [-1, 1]."""
        x = self.project(latents[:, :, None, None])  # (batch, 16 width, 4, 4)
        return self.last(self.conv(x))


class InstanceNorm(nn.Module):
    """nn.InstanceNorm2d without parameters, written with mean and variance.

    Its second derivative, which the gradient penalty needs, is many times as fast.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width), normalised over height and width."""
        variance, mean = torch.var_mean(x.float(), dim=(2, 3), correction=0, keepdim=True)
        return ((x - mean) * (variance + 1e-5).rsqrt()).to(x.dtype)


def _downwards(width: int, norm: Callable[[int, int], nn.Module]) -> nn.Sequential:
    """Five 4x4 convolutions from 64 pixels to 1.

    `norm(channels, size)` makes the normalisation that follows all but the first and the last.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 4, 2, 1, bias=False),  # 64 → 32 pixels
        nn.LeakyReLU(0.2, inplace=True),
    ]
    for factor, size in ((1, 16), (2, 8), (4, 4)):  # 32 → 16 → 8 → 4 pixels
        before, after = factor * width, 2 * factor * width
        layers += [
            nn.Conv2d(before, after, 4, 2, 1, bias=False),
            norm(after, size),
            nn.LeakyReLU(0.2, inplace=True),
        ]
    layers.append(nn.Conv2d(8 * width, 1, 4, bias=False))  # 4 → 1 pixels
    return nn.Sequential(*layers)


class Discriminator(nn.Module):
    """The discriminator of DCGAN.

    It returns logits: the sigmoid that reports print as its last layer is part of the loss.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.main = _downwards(width, lambda channels, size: nn.BatchNorm2d(channels))
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 3, 64, 64) in [-1, 1] → logits (batch,), positive for real."""
        return self.main(images).flatten()  # (batch, 1, 1, 1) → (batch,)


class Critic(nn.Module):
    """The critic of WGAN-GP: DCGAN's discriminator without batch statistics.

    Those would mix the gradient penalties of the images of a batch.
    """

    def __init__(self, width: int = 64, norm: Norm = "layer", spectral: bool = False) -> None:
        super().__init__()

        def make_norm(channels: int, size: int) -> nn.Module:
            if norm == "instance":
                return InstanceNorm()
            if norm == "layer":
                return nn.LayerNorm([channels, size, size])
            return nn.Identity()

        self.main = _downwards(width, make_norm)
        initialise(self)
        if spectral:  # Miyato et al., 2018, https://arxiv.org/abs/1802.05957
            for module in self.main:
                if isinstance(module, nn.Conv2d):
                    parametrizations.spectral_norm(module)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 3, 64, 64) in [-1, 1] → scores (batch,), higher for real."""
        return self.main(images).flatten()  # (batch, 1, 1, 1) → (batch,)


GENERATORS = {"generator": Generator, "projection": ProjectionGenerator}
