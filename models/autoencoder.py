"""An autoencoder of images and a critic of small patches, for diffusion in its latents.

The latents of a 64x64 image are 16x16 with four channels: twelve times fewer numbers, in which a
diffusion model learns the layout of a face at a fraction of the cost (Rombach et al., 2022,
https://arxiv.org/abs/2112.10752). The fine grain of the image is the decoder's work.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from models.network import Network

FACTOR = 4  # pixels of an image's side to a position of the latents


def _norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 16 groups, or fewer where they would be unequal or under 4 channels."""
    groups = min(16, channels // 4)
    if channels % groups:
        groups = math.gcd(16, channels)
    return nn.GroupNorm(groups, channels)


class ResidualBlock(nn.Module):
    """Normalise, SiLU, convolve; the same again; add the input. It starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = _norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        assert self.conv2.bias is not None
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) → the same shape."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return x + h


class Autoencoder(Network):
    """Images in [-1, 1] → latents a quarter as large, and back. `size` is a multiple of 4.

    Every channel of the latents has mean 0 and variance 1 over the training images, because a batch
    norm without weights stands between the encoder and the decoder.
    """

    def __init__(
        self,
        in_channels: int = 3,
        size: int = 64,
        latent_channels: int = 4,
        encoder_width: int = 32,
        decoder_width: int = 48,
    ) -> None:
        super().__init__()
        self.config = {
            "net": "autoencoder",
            "arguments": {
                "in_channels": in_channels,
                "size": size,
                "latent_channels": latent_channels,
                "encoder_width": encoder_width,
                "decoder_width": decoder_width,
            },
        }
        if size % FACTOR:
            raise ValueError(f"the size of the images must be a multiple of {FACTOR}, not {size}")
        self.latent_shape = (latent_channels, size // FACTOR, size // FACTOR)
        e = encoder_width
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),  # (12, size / 2, size / 2)
            nn.Conv2d(4 * in_channels, e, 3, padding=1),
            ResidualBlock(e),
            nn.Conv2d(e, 2 * e, 4, 2, padding=1),  # (2 e, size / 4, size / 4)
            ResidualBlock(2 * e),
            ResidualBlock(2 * e),
            _norm(2 * e),
            nn.SiLU(),
            nn.Conv2d(2 * e, latent_channels, 3, padding=1),
        )
        self.standard = nn.BatchNorm2d(latent_channels, affine=False, momentum=0.01)
        d = decoder_width
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, 2 * d, 3, padding=1),
            ResidualBlock(2 * d),
            ResidualBlock(2 * d),
            ResidualBlock(2 * d),
            nn.Conv2d(2 * d, 4 * d, 3, padding=1),
            nn.PixelShuffle(2),  # (d, size / 2, size / 2)
            ResidualBlock(d),
            ResidualBlock(d),
            nn.Conv2d(d, 4 * (d // 2), 3, padding=1),
            nn.PixelShuffle(2),  # (d / 2, size, size)
            ResidualBlock(d // 2),
            _norm(d // 2),
            nn.SiLU(),
            nn.Conv2d(d // 2, in_channels, 3, padding=1),
        )

    def encode(self, images: Tensor) -> Tensor:
        """(batch, in_channels, size, size) in [-1, 1] → latents (batch, *latent_shape)."""
        return self.standard(self.encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (batch, *latent_shape) → images (batch, in_channels, size, size)."""
        return self.decoder(latents)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Encode, add `noise` (batch, *latent_shape), decode: what training compares."""
        return self.decode(self.encode(images) + noise)


class PatchCritic(nn.Module):
    """Scores of overlapping patches of an image: positive for real ones.

    Isola et al., 2017, https://arxiv.org/abs/1611.07004, with group normalisation.
    """

    def __init__(self, in_channels: int = 3, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            _norm(2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1),
            _norm(4 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 3, 1, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(batch, in_channels, size, size) → scores (batch, 1, size / 8, size / 8)."""
        return self.net(images)
