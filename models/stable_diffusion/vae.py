"""The autoencoder of Stable Diffusion v1: images as latents an eighth as large, and back.

Latent diffusion: Rombach et al., 2022, https://arxiv.org/abs/2112.10752. The modules have the names
that give the keys of the published file (https://github.com/CompVis/stable-diffusion) without their
prefix `first_stage_model.`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.network import Network

LATENT_SCALE = 0.18215  # the U-Net's latents are the autoencoder's times this: about unit variance


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    """The normalisation of the autoencoder, with an ε of 1e-6 instead of PyTorch's 1e-5."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Normalise, SiLU, convolve; the same again; add the input."""

    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(groups, before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.norm2 = group_norm(groups, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, before, height, width) → (batch, after, height, width)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


def as_rows(x: Tensor) -> Tensor:
    """(batch, channels, height, width) → (batch, 1 head, positions, channels)."""
    return x.flatten(2).transpose(1, 2)[:, None]


class SelfAttention(nn.Module):
    """Attention of all positions to all positions with one head, residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(groups, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) → the same shape."""
        h = self.norm(x)
        q = as_rows(self.q(h))
        k = as_rows(self.k(h))
        v = as_rows(self.v(h))
        attended = F.scaled_dot_product_attention(q, k, v)  # softmax(q kᵀ / √channels) v
        attended = attended[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(attended)


class Downsample(nn.Module):
    """Half the height and width. Only the right and the lower edge are padded."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) → (batch, channels, height / 2, width / 2)."""
        padded = F.pad(x, (0, 1, 0, 1))  # left, right, top, bottom
        return self.conv(padded)


class Upsample(nn.Module):
    """Twice the height and width: every pixel becomes four, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) → (batch, channels, 2 height, 2 width)."""
        return self.conv(F.interpolate(x, scale_factor=2))


def residual_blocks(count: int, before: int, after: int, groups: int) -> nn.ModuleList:
    """`count` residual blocks, of which the first changes the width."""
    blocks = nn.ModuleList([ResidualBlock(before, after, groups)])
    for _ in range(count - 1):
        blocks.append(ResidualBlock(after, after, groups))
    return blocks


class DownLevel(nn.Module):
    """Residual blocks; then half the size, except on the last level."""

    def __init__(self, count: int, before: int, after: int, groups: int, halve: bool) -> None:
        super().__init__()
        self.block = residual_blocks(count, before, after, groups)
        self.downsample = Downsample(after) if halve else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, before, height, width) → (batch, after, ...), half as large with `halve`."""
        for block in self.block:
            x = block(x)
        return self.downsample(x)


class UpLevel(nn.Module):
    """Residual blocks; then twice the size, except on the finest level."""

    def __init__(self, count: int, before: int, after: int, groups: int, double: bool) -> None:
        super().__init__()
        self.block = residual_blocks(count, before, after, groups)
        self.upsample = Upsample(after) if double else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, before, height, width) → (batch, after, ...), twice as large with `double`."""
        for block in self.block:
            x = block(x)
        return self.upsample(x)


class Middle(nn.Module):
    """Two residual blocks with attention between them, where the image is smallest."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, groups)
        self.attn_1 = SelfAttention(channels, groups)
        self.block_2 = ResidualBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) → the same shape."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images → means and log variances of latents, before the last 1x1 convolution."""

    def __init__(
        self, channels: int, latent_channels: int, widths: Sequence[int], blocks: int, groups: int
    ) -> None:
        super().__init__()
        now = widths[0]
        self.conv_in = nn.Conv2d(channels, now, 3, padding=1)
        self.down = nn.ModuleList()
        for level, after in enumerate(widths):
            halve = level < len(widths) - 1
            self.down.append(DownLevel(blocks, now, after, groups, halve))
            now = after
        self.mid = Middle(now, groups)
        self.norm_out = group_norm(groups, now)
        self.conv_out = nn.Conv2d(now, 2 * latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, channels, height, width) → (batch, 2 latent_channels, height / 8, width / 8)."""
        h = self.conv_in(images)
        for level in self.down:
            h = level(h)
        h = self.mid(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latents, after the first 1x1 convolution, → images."""

    def __init__(
        self, channels: int, latent_channels: int, widths: Sequence[int], blocks: int, groups: int
    ) -> None:
        super().__init__()
        now = widths[-1]
        self.conv_in = nn.Conv2d(latent_channels, now, 3, padding=1)
        self.mid = Middle(now, groups)
        levels: list[nn.Module] = []
        for level, after in reversed(list(enumerate(widths))):
            levels.append(UpLevel(blocks + 1, now, after, groups, double=level > 0))
            now = after
        self.up = nn.ModuleList(reversed(levels))  # the published keys count from the finest level
        self.norm_out = group_norm(groups, now)
        self.conv_out = nn.Conv2d(now, channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """(batch, latent_channels, height, width) → (batch, channels, 8 height, 8 width)."""
        h = self.conv_in(latents)
        h = self.mid(h)
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Vae(Network):
    """Images in [-1, 1] → a normal distribution of latents, and latents → images.

    The default has 83.7 M parameters and makes 64x64 latents of 512x512 images. Each of
    `multipliers` is a level of `width` times that many channels, with `blocks` residual blocks in
    the encoder and one more in the decoder; each level after the first is half as large. Widths are
    multiples of `groups`.

    The latents here are not scaled. The U-Net knows them multiplied by LATENT_SCALE.
    """

    def __init__(
        self,
        channels: int = 3,
        latent_channels: int = 4,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        blocks: int = 2,
        groups: int = 32,
    ) -> None:
        super().__init__()
        self.config = {
            "net": "stable_diffusion_vae",
            "arguments": {
                "channels": channels,
                "latent_channels": latent_channels,
                "width": width,
                "multipliers": list(multipliers),
                "blocks": blocks,
                "groups": groups,
            },
        }
        widths = [width * multiplier for multiplier in multipliers]
        self.encoder = Encoder(channels, latent_channels, widths, blocks, groups)
        self.decoder = Decoder(channels, latent_channels, widths, blocks, groups)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (batch, channels, height, width) in [-1, 1] → mean and log variance of latents.

        Both are (batch, latent_channels, height / 8, width / 8); height and width are multiples of
        2 ** (levels - 1), which is 8. The log variance is clamped to [-30, 20]. A sample is
        `mean + (log_variance / 2).exp() * noise`.
        """
        moments = self.quant_conv(self.encoder(images))
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, torch.clamp(log_variance, -30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (batch, latent_channels, height, width) → images, about in [-1, 1].

        The images are (batch, channels, 8 height, 8 width).
        """
        return self.decoder(self.post_quant_conv(latents))
