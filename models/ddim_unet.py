"""The U-Net of the course's DDIM problem (256x256 faces): keys, shapes and outputs of its weights.

It follows https://github.com/rosinality/denoising-diffusion-pytorch. The network: Ho et al., 2020,
appendix B, https://arxiv.org/abs/2006.11239. Smaller settings of the same code serve 64x64 faces
and 28x28 digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.network import Network


class Sinusoid(nn.Module):
    """Sines, then cosines, of numbers at channels / 2 frequencies from 1 down to 1/10000."""

    inv_freq: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        frequencies = [10_000 ** (-channel / channels) for channel in range(0, channels, 2)]
        self.register_buffer("inv_freq", torch.tensor(frequencies))

    def forward(self, t: Tensor) -> Tensor:
        """(batch,) → (batch, channels)."""
        angles = t.float()[:, None] * self.inv_freq
        return torch.cat((angles.sin(), angles.cos()), 1)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups, or fewer where a group would have less than 4 channels.

    Groups of one channel would remove the time that was added to it.
    """
    return nn.GroupNorm(math.gcd(32, channels // 4), channels)


class ResidualBlock(nn.Module):
    """Normalise, SiLU, convolve; add the time; normalise, SiLU, convolve; add the input."""

    def __init__(self, before: int, after: int, time: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm1 = group_norm(before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(time, after))
        self.norm2 = group_norm(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(batch, before, height, width), (batch, time) → (batch, after, height, width)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(time)[:, :, None, None]
        h = F.silu(self.norm2(h))
        h = F.dropout(h, self.dropout, self.training)
        return self.conv2(h) + self.skip(x)


class SelfAttention(nn.Module):
    """Attention of all positions to all positions with one head, residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) → the same shape."""
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (batch, positions, 3 channels)
        q, k, v = qkv[:, None].chunk(3, dim=-1)  # (batch, 1 head, positions, channels) each
        attended = F.scaled_dot_product_attention(q, k, v)  # softmax(q kᵀ / √channels) v
        attended = attended[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.out(attended)


class Block(nn.Module):
    """A residual block, followed by attention if asked for."""

    def __init__(self, before: int, after: int, time: int, dropout: float, attention: bool) -> None:
        super().__init__()
        self.resblocks = ResidualBlock(before, after, time, dropout)
        self.attention = SelfAttention(after) if attention else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(batch, before, height, width), (batch, time) → (batch, after, height, width)."""
        return self.attention(self.resblocks(x, time))


class AttributeEmbedding(nn.Module):
    """Attributes, 1, -1 or 0 for unknown, as a vector that is added to the time's.

    The network sees each value and whether it is known. The last layer starts with zeros, so that
    a network that is trained further begins as it was.
    """

    def __init__(self, count: int, time: int) -> None:
        super().__init__()
        self.count = count
        self.first = nn.Linear(2 * count, time)
        self.last = nn.Linear(time, time)

    def forward(self, attributes: Tensor) -> Tensor:
        """(batch, count) → (batch, time)."""
        values = attributes.to(self.first.weight.dtype)
        hidden = self.first(torch.cat((values, values.abs()), 1))
        return self.last(F.silu(hidden))


class DdimUnet(Network):
    """Predicts the noise (or v) in images of `size` pixels.

    The default has 113.7 M parameters. Level i is `width * multipliers[i]` wide and half as large
    as the level before. It has `blocks` blocks on the way down and one more on the way up, with
    attention where its size is in `attention`. `size` is a multiple of patch * 2 ** (levels - 1),
    widths are multiples of 4.

    With `patch` > 1, each square of patch x patch pixels becomes one position with in_channels *
    patch ** 2 values, so that the first level is `size` / patch pixels wide and costs accordingly
    less (Hoogeboom et al., 2023, https://arxiv.org/abs/2301.11093).

    `n_classes` > 0 adds a label embedding to that of the time; a dropped class adds nothing.
    `n_attributes` > 0 adds an embedding of attributes (AttributeEmbedding).
    """

    counts_steps = True  # its t is the number of the step, from 0; the digits' networks read t / T

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
        n_attributes: int = 0,
    ) -> None:
        super().__init__()
        self.config = {
            "net": "ddim_unet",
            "arguments": {
                "in_channels": in_channels,
                "size": size,
                "width": width,
                "multipliers": list(multipliers),
                "attention": list(attention),
                "blocks": blocks,
                "dropout": dropout,
                "n_classes": n_classes,
                "patch": patch,
                "n_attributes": n_attributes,
            },
        }
        smallest = patch * 2 ** (len(multipliers) - 1)
        if size % smallest:
            raise ValueError(f"the size of the images must be a multiple of {smallest}, not {size}")
        self.patch = patch
        self.shape = (in_channels, size, size)  # of the images, without the batch
        self.image_size = size
        pixels = in_channels * patch**2
        time = 4 * width
        self.time = nn.Sequential(
            Sinusoid(width), nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time)
        )
        self.label = nn.Embedding(n_classes, time) if n_classes else None
        self.attributes = AttributeEmbedding(n_attributes, time) if n_attributes else None
        self.lengths = {"down": 0, "mid": 0, "up": 0}

        levels = []  # (width, whether it has attention)
        for level, multiplier in enumerate(multipliers):
            level_size = size // patch >> level
            levels.append((width * multiplier, level_size in attention))

        # The way down. `kept` are the widths of what it leaves for the way up.
        now = width
        self._append("down", nn.Conv2d(pixels, now, 3, padding=1))
        kept = [now]
        for level, (after, attends) in enumerate(levels):
            if level > 0:
                halve = nn.Conv2d(now, now, 3, 2, padding=1)  # half the height and width
                self._append("down", nn.Sequential(halve))
                kept.append(now)
            for _ in range(blocks):
                self._append("down", Block(now, after, time, dropout, attends))
                now = after
                kept.append(now)

        self._append("mid", Block(now, now, time, dropout, attention=True))
        self._append("mid", Block(now, now, time, dropout, attention=False))

        # The way up.
        for level, (after, attends) in reversed(list(enumerate(levels))):
            for _ in range(blocks + 1):
                self._append("up", Block(now + kept.pop(), after, time, dropout, attends))
                now = after
            if level > 0:
                double = nn.Upsample(scale_factor=2)  # twice the height and width
                self._append("up", nn.Sequential(double, nn.Conv2d(now, now, 3, padding=1)))
        self.out = nn.Sequential(group_norm(now), nn.SiLU(), nn.Conv2d(now, pixels, 3, padding=1))
        self._initialise()

    def _append(self, part: str, layer: nn.Module) -> None:
        """Number the layers as the published keys do: down1, down2, …."""
        self.lengths[part] += 1
        self.add_module(f"{part}{self.lengths[part]}", layer)

    def layers(self, part: str) -> Iterator[nn.Module]:
        """The layers of a part, "down", "mid" or "up", in order."""
        return (getattr(self, f"{part}{i}") for i in range(1, self.lengths[part] + 1))

    def _initialise(self) -> None:
        """Xavier's weights, but zeros where a residual branch or the network ends.

        Every branch then starts as the identity.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, SelfAttention):
                nn.init.zeros_(module.out.weight)
            elif isinstance(module, AttributeEmbedding):
                nn.init.zeros_(module.last.weight)
        last = self.out[2]
        assert isinstance(last, nn.Conv2d)
        nn.init.zeros_(last.weight)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        classes: Tensor | None = None,
        drop: Tensor | None = None,
        attributes: Tensor | None = None,
    ) -> Tensor:
        """Noisy images (batch, in_channels, height, width) → the noise in them, same shape.

        `t`, float (batch,), is the number of the step itself, not divided. It counts from 0: step
        1 … T of a schedule enters as 0 … T - 1, and the caller subtracts. The course's numbers
        1, 21, …, 981 are such. `classes` is int64 (batch,), or None for no class. `drop` is bool
        (batch,), True where the class of a row is withheld. `attributes` is (batch, n_attributes)
        with 1, -1 or 0 for unknown; None is unknown for all. Raises ValueError for classes or
        attributes given to a network without them.
        """
        time = self._embed(t, classes, drop)
        time = self._embed_attributes(attributes, time)
        # (batch, in_channels, height, width) → (batch, pixels, height / patch, width / patch)
        x = F.pixel_unshuffle(x, self.patch)
        kept = []
        for layer in self.layers("down"):
            x = layer(x, time) if isinstance(layer, Block) else layer(x)
            kept.append(x)
        for layer in self.layers("mid"):
            x = layer(x, time)
        for layer in self.layers("up"):
            if isinstance(layer, Block):
                x = layer(torch.cat((x, kept.pop()), 1), time)
            else:
                x = layer(x)
        return F.pixel_shuffle(self.out(x), self.patch)

    def encode(self, images: Tensor) -> Tensor:
        """The images themselves: this network has no latents (LatentUnet has)."""
        return images

    def decode(self, x: Tensor) -> Tensor:
        """The state of a sampler as images, which it is already."""
        return x

    def _embed(self, t: Tensor, classes: Tensor | None, drop: Tensor | None) -> Tensor:
        """Embeddings (batch, 4 width) of times and of the classes that are not dropped."""
        time = self.time(t)
        if classes is None:
            return time
        if self.label is None:
            raise ValueError("this network has no classes (n_classes is 0)")
        labels = self.label(classes)
        if drop is not None:
            labels = labels.masked_fill(drop[:, None], 0.0)
        return time + labels

    def _embed_attributes(self, attributes: Tensor | None, time: Tensor) -> Tensor:
        """`time` (batch, 4 width) with the embedding of the attributes added to it."""
        if self.attributes is None:
            if attributes is not None:
                raise ValueError("this network has no attributes (n_attributes is 0)")
            return time
        if attributes is None:
            attributes = time.new_zeros(len(time), self.attributes.count)
        return time + self.attributes(attributes)
