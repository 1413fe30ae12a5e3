"""The U-Net of the course's DDIM problem, 256x256 faces: keys, shapes and outputs of the weights it hands out.

It follows https://github.com/rosinality/denoising-diffusion-pytorch. The net: Ho et al., 2020, appendix B,
https://arxiv.org/abs/2006.11239. Smaller settings of the same code serve 64x64 images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Sinusoid(nn.Module):
    """Numbers (batch,) → their sines, then cosines, at `channels` / 2 frequencies from 1 down to 1/10000."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.exp(torch.arange(0, channels, 2) * (-math.log(10000) / channels)))

    def forward(self, t: Tensor) -> Tensor:
        """(batch,) → (batch, channels)."""
        angles = t.float()[:, None] * self.inv_freq
        return torch.cat((angles.sin(), angles.cos()), 1)


def _norm(channels: int) -> nn.GroupNorm:
    """32 groups, fewer where they would hold less than 4 channels: groups of 1 would take the time out again."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels)


class ResidualBlock(nn.Module):
    """Normalise, rectify, convolve; add the time; normalise, rectify, convolve; add the input."""

    def __init__(self, before: int, after: int, time: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm1 = _norm(before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(time, after))
        self.norm2 = _norm(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(batch, before, height, width), (batch, time) → (batch, after, height, width)."""
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        h = F.dropout(F.silu(self.norm2(h)), self.dropout, self.training)
        return self.conv2(h) + self.skip(x)


class SelfAttention(nn.Module):
    """Attention of all positions to all positions, one head, residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width), same shape."""
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (batch, positions, 3 channels)
        q, k, v = qkv[:, None].chunk(3, dim=-1)  # (batch, 1 head, positions, channels) each
        attended = F.scaled_dot_product_attention(q, k, v)  # softmax(q k / root of channels) v
        return x + self.out(attended[:, 0].transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """A residual block, with attention behind it if asked for."""

    def __init__(self, before: int, after: int, time: int, dropout: float, attention: bool) -> None:
        super().__init__()
        self.resblocks = ResidualBlock(before, after, time, dropout)
        self.attention = SelfAttention(after) if attention else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(batch, before, height, width), (batch, time) → (batch, after, height, width)."""
        return self.attention(self.resblocks(x, time))


class DdimUnet(nn.Module):
    """Predicts noise in images of `size` pixels, a multiple of patch * 2 ** (levels - 1).

    The default has 113.7 M parameters. Level i is `width * multipliers[i]` wide and half as large as the level before;
    it has `blocks` blocks on the way down, one more on the way up, and attention where its size is in `attention`.
    Widths are multiples of 4. `patch` > 1 makes each square of patch x patch pixels one position of in_channels *
    patch ** 2 values, so that the first level is `size` / patch wide and costs as much less (Hoogeboom et al., 2023,
    https://arxiv.org/abs/2301.11093). `n_classes` > 0 adds a label embedding to the time's; nothing is added for a
    dropped class.
    """

    counts_steps = True  # its t is the number of the step, from 0; the digits' nets read t / T

    def __init__(
        self,
        in_channels: int = 3,
        size: int = 256,
        width: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4, 4),
        attention: Sequence[int] = (16,),
        blocks: int = 2,
        dropout: float = 0.0,
        n_classes: int = 0,
        patch: int = 1,
    ) -> None:
        super().__init__()
        arguments = {"in_channels": in_channels, "size": size, "width": width, "multipliers": list(multipliers)}
        arguments |= {"attention": list(attention), "blocks": blocks, "dropout": dropout, "n_classes": n_classes}
        self.config = {"net": "ddim_unet", "arguments": arguments | {"patch": patch}}
        self.patch, pixels = patch, in_channels * patch**2
        levels = [(width * factor, size // patch >> i in attention) for i, factor in enumerate(multipliers)]
        time = 4 * width
        self.time = nn.Sequential(Sinusoid(width), nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.label = nn.Embedding(n_classes, time) if n_classes else None
        self.lengths = {"down": 0, "mid": 0, "up": 0}

        now = width
        self._append("down", nn.Conv2d(pixels, now, 3, padding=1))
        kept = [now]  # the widths of what the way down leaves for the way up
        for i, (after, attends) in enumerate(levels):
            if i > 0:  # half the height and width
                self._append("down", nn.Sequential(nn.Conv2d(now, now, 3, 2, padding=1)))
                kept.append(now)
            for _ in range(blocks):
                self._append("down", Block(now, after, time, dropout, attends))
                kept.append(now := after)
        self._append("mid", Block(now, now, time, dropout, attention=True))
        self._append("mid", Block(now, now, time, dropout, attention=False))
        for i, (after, attends) in reversed(list(enumerate(levels))):
            for _ in range(blocks + 1):
                self._append("up", Block(now + kept.pop(), after, time, dropout, attends))
                now = after
            if i > 0:  # twice the height and width
                self._append("up", nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(now, now, 3, padding=1)))
        self.out = nn.Sequential(_norm(now), nn.SiLU(), nn.Conv2d(now, pixels, 3, padding=1))
        self._initialise()

    def _append(self, part: str, layer: nn.Module) -> None:
        """Number the layers as the published keys do: down1, down2, …"""
        self.lengths[part] += 1
        self.add_module(f"{part}{self.lengths[part]}", layer)

    def _layers(self, part: str) -> Iterator[nn.Module]:
        return (getattr(self, f"{part}{i}") for i in range(1, self.lengths[part] + 1))

    def _initialise(self) -> None:
        """Xavier's weights; zeros where a residual branch or the net ends, so that every branch begins as identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResidualBlock | SelfAttention):
                nn.init.zeros_((module.conv2 if isinstance(module, ResidualBlock) else module.out).weight)
        nn.init.zeros_(self.out[2].weight)

    def forward(self, x: Tensor, t: Tensor, classes: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        """Noisy images (batch, in_channels, height, width) → the noise in them, same shape.

        `t`, float (batch,), is the number of the step itself, not divided. The public code counts steps from 0: step
        1 … T of a schedule enters as 0 … T - 1, and the caller subtracts; the course's 1, 21, …, 981 are such numbers.
        `classes`, int64 (batch,), None for no class; `drop`, bool (batch,), True where a row's class is withheld.
        """
        time = self.time(t)
        if classes is not None:
            if self.label is None:
                raise ValueError("classes given to a net without them (n_classes is 0)")
            labels = self.label(classes)
            time = time + (labels if drop is None else labels.masked_fill(drop[:, None], 0.0))
        # (batch, in_channels, height, width) → (batch, in_channels * patch², height / patch, width / patch)
        x, kept = F.pixel_unshuffle(x, self.patch), []
        for layer in self._layers("down"):
            x = layer(x, time) if isinstance(layer, Block) else layer(x)
            kept.append(x)
        for layer in self._layers("mid"):
            x = layer(x, time)
        for layer in self._layers("up"):
            x = layer(torch.cat((x, kept.pop()), 1), time) if isinstance(layer, Block) else layer(x)
        return F.pixel_shuffle(self.out(x), self.patch)
