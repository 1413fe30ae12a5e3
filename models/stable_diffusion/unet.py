"""The U-Net of Stable Diffusion v1: the noise in latents, given the time and a text.

Latent diffusion: Rombach et al., 2022, https://arxiv.org/abs/2112.10752. The modules have the names
that give the keys of the published file (https://github.com/CompVis/stable-diffusion) without their
prefix `model.diffusion_model.`. Smaller settings of the same code are trained from scratch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.network import Network


def time_embedding(t: Tensor, channels: int) -> Tensor:
    """Cosines, then sines, of t at channels / 2 frequencies from 1 down to 1/10000.

    (batch,) → float32 (batch, channels). Other networks of this project have the sines first.
    """
    half = channels // 2
    exponents = torch.arange(half, device=t.device) * (-math.log(10000) / half)
    angles = t.float()[:, None] * torch.exp(exponents)
    return torch.cat((angles.cos(), angles.sin()), 1)


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """The same layer with zeros as weights: a branch that ends in it adds nothing at first."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """Normalise, SiLU, convolve; add the time; normalise, SiLU, convolve; add the input."""

    def __init__(self, before: int, after: int, time: int, groups: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, before),
            nn.SiLU(),
            nn.Conv2d(before, after, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, after))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, after),
            nn.SiLU(),
            nn.Identity(),  # the published network has a dropout here, of probability 0
            zeroed(nn.Conv2d(after, after, 3, padding=1)),
        )
        self.skip_connection = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(batch, before, height, width), (batch, time) → (batch, after, height, width)."""
        h = self.in_layers(x)
        h = h + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √channels) v for q, k and v of shape (batch, heads, rows, channels).

    On a CPU it is computed in float32: the backward pass of PyTorch's bfloat16 attention takes
    three times as long there.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


class Attention(nn.Module):
    """Rows with `channels` numbers ask rows with `context` numbers, with several heads."""

    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def _split(self, rows: Tensor) -> Tensor:
        """(batch, rows, channels) → (batch, heads, rows, channels per head)."""
        return rows.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, rows: Tensor, context: Tensor) -> Tensor:
        """(batch, positions, channels), (batch, tokens, context) → (batch, positions, channels)."""
        q = self._split(self.to_q(rows))
        k = self._split(self.to_k(context))
        v = self._split(self.to_v(context))
        attended = attend(q, k, v)
        attended = attended.transpose(1, 2).flatten(2)  # (batch, positions, channels)
        return self.to_out(attended)


class GatedGelu(nn.Module):
    """A linear layer whose first half is multiplied by GELU of its second half.

    GEGLU: Shazeer, 2020, https://arxiv.org/abs/2002.05202.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.proj = nn.Linear(before, 2 * after)

    def forward(self, rows: Tensor) -> Tensor:
        """(..., before) → (..., after)."""
        values, gates = self.proj(rows).chunk(2, dim=-1)
        return values * F.gelu(gates)


class FeedForward(nn.Module):
    """Two linear layers with a gated GELU between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GatedGelu(channels, 4 * channels),
            nn.Identity(),  # again a dropout of probability 0
            nn.Linear(4 * channels, channels),
        )

    def forward(self, rows: Tensor) -> Tensor:
        """(..., channels) → the same shape."""
        return self.net(rows)


class TransformerBlock(nn.Module):
    """Attention of positions to each other, attention to the text, and a feed-forward layer.

    All three normalise their input first and add their output to it.
    """

    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1 = Attention(channels, channels, heads)
        self.ff = FeedForward(channels)
        self.attn2 = Attention(channels, context, heads)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, rows: Tensor, context: Tensor) -> Tensor:
        """(batch, positions, channels), (batch, tokens, context) → (batch, positions, channels)."""
        normed = self.norm1(rows)
        rows = rows + self.attn1(normed, normed)
        rows = rows + self.attn2(self.norm2(rows), context)
        return rows + self.ff(self.norm3(rows))


class Transformer(nn.Module):
    """A transformer block over the positions of an image, with the image added to its output."""

    def __init__(self, channels: int, context: int, heads: int, groups: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be split among {heads} heads")
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # 1e-5 in the residual blocks
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context, heads)])
        self.proj_out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(batch, channels, height, width), (batch, tokens, context) → the shape of x."""
        height, width = x.shape[2:]
        h = self.proj_in(self.norm(x))
        rows = h.flatten(2).transpose(1, 2)  # (batch, positions, channels)
        for block in self.transformer_blocks:
            rows = block(rows, context)
        h = rows.transpose(1, 2).unflatten(2, (height, width))
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Half the height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) → (batch, channels, height / 2, width / 2)."""
        return self.op(x)


class Upsample(nn.Module):
    """Twice the height and width: every pixel becomes four, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) → (batch, channels, 2 height, 2 width)."""
        return self.conv(F.interpolate(x, scale_factor=2))


class Stage(nn.ModuleList):
    """Layers one after the other: a residual block gets the time, a transformer the text."""

    def forward(self, x: Tensor, time: Tensor, context: Tensor, checkpointing: bool) -> Tensor:
        """(batch, before, height, width), (batch, time), (batch, tokens, context) → next x.

        With `checkpointing`, only the inputs of the blocks are kept for the backward pass.
        """
        for layer in self:
            if isinstance(layer, ResidualBlock):
                inputs = (x, time)
            elif isinstance(layer, Transformer):
                inputs = (x, context)
            else:
                x = layer(x)
                continue
            if checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
        return x


class Unet(Network):
    """Predicts the noise in latents, given the states of a text.

    The default has 859.5 M parameters. Level i is `width * multipliers[i]` wide and half as large
    as the level before. It has `blocks` residual blocks on the way down and one more on the way up,
    each followed by a transformer if i is in `attention_levels`. The middle always has one. All
    widths are multiples of `groups` (of the normalisation) and, where there is a transformer, of
    `heads`; ValueError otherwise.

    `checkpointing = True` computes the blocks a second time in the backward pass instead of keeping
    what is inside them (Chen et al., 2016, https://arxiv.org/abs/1604.06174): far less memory for a
    third more time. It changes no result.
    """

    checkpointing: bool = False

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        width: int = 320,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        blocks: int = 2,
        attention_levels: Sequence[int] = (0, 1, 2),
        heads: int = 8,
        context_width: int = 768,
        groups: int = 32,
    ) -> None:
        super().__init__()
        self.config = {
            "net": "stable_diffusion_unet",
            "arguments": {
                "in_channels": in_channels,
                "out_channels": out_channels,
                "width": width,
                "multipliers": list(multipliers),
                "blocks": blocks,
                "attention_levels": list(attention_levels),
                "heads": heads,
                "context_width": context_width,
                "groups": groups,
            },
        }
        self.width = width
        time = 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))

        def block(before: int, after: int, level: int) -> list[nn.Module]:
            """A residual block, with a transformer on the levels that have one."""
            layers: list[nn.Module] = [ResidualBlock(before, after, time, groups)]
            if level in attention_levels:
                layers.append(Transformer(after, context_width, heads, groups))
            return layers

        # The way down. `kept` are the widths of what it leaves for the way up.
        now = width
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(in_channels, now, 3, padding=1)])])
        kept = [now]
        for level, multiplier in enumerate(multipliers):
            if level > 0:
                self.input_blocks.append(Stage([Downsample(now)]))
                kept.append(now)
            for _ in range(blocks):
                self.input_blocks.append(Stage(block(now, width * multiplier, level)))
                now = width * multiplier
                kept.append(now)

        self.middle_block = Stage(
            [
                ResidualBlock(now, now, time, groups),
                Transformer(now, context_width, heads, groups),
                ResidualBlock(now, now, time, groups),
            ]
        )

        # The way up. The last stage of a level doubles the size.
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for number in range(blocks + 1):
                layers = block(now + kept.pop(), width * multiplier, level)
                now = width * multiplier
                if level > 0 and number == blocks:
                    layers.append(Upsample(now))
                self.output_blocks.append(Stage(layers))
        self.out = nn.Sequential(
            nn.GroupNorm(groups, now),
            nn.SiLU(),
            zeroed(nn.Conv2d(now, out_channels, 3, padding=1)),
        )

    def forward(self, x: Tensor, t: Tensor, context: Tensor, extra: Tensor | None = None) -> Tensor:
        """Noisy latents (batch, in_channels, height, width) → the noise in them.

        `t`, whole or float (batch,), is the number of the step in 0 … 999. `context` is (batch,
        tokens, context_width), the states of the text encoder. Height and width are multiples of
        2 ** (levels - 1). The result is (batch, out_channels, height, width) in the dtype of the
        weights, to which the inputs are cast; the embedding of t is computed in float32.

        `extra` (batch, 4 width) is added to the embedding of t; Stable Diffusion has none.
        """
        dtype = next(self.parameters()).dtype
        time = self.time_embed(time_embedding(t, self.width).to(dtype))
        if extra is not None:
            time = time + extra.to(dtype)
        context = context.to(dtype)
        x = x.to(dtype)
        kept = []
        for stage in self.input_blocks:
            x = stage(x, time, context, self.checkpointing)
            kept.append(x)
        x = self.middle_block(x, time, context, self.checkpointing)
        for stage in self.output_blocks:
            x = torch.cat((x, kept.pop()), 1)
            x = stage(x, time, context, self.checkpointing)
        return self.out(x)
