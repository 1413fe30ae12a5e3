"""A U-Net with self-attention for diffusion of 28x28 images by class, as course reports print it.

Its blocks are those of https://github.com/dome272/Diffusion-Models-pytorch. Noise prediction: Ho et
al., 2020, https://arxiv.org/abs/2006.11239. Dropped classes: Ho and Salimans, 2022,
https://arxiv.org/abs/2207.12598.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.network import Network


class DoubleConv(nn.Module):
    """Two 3x3 convolutions with GELU between them, each normalised over the whole image.

    A residual one adds its input and applies another GELU.
    """

    def __init__(self, before: int, after: int, residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        self.wconv = nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.GroupNorm(1, after),
            nn.GELU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.GroupNorm(1, after),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, before, height, width) → (batch, after, height, width)."""
        if self.residual:
            return F.gelu(x + self.wconv(x))
        return self.wconv(x)


class SelfAttention(nn.Module):
    """Attention of all positions to all positions, then two linear layers.

    Both are residual and normalise their input first.
    """

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.ln = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.ff_self = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, channels),
            nn.GELU(),
            nn.Linear(channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) → the same shape."""
        batch, channels, height, width = x.shape
        rows = x.flatten(2).transpose(1, 2)  # (batch, positions, channels)
        qkv = self.qkv(self.ln(rows))  # (batch, positions, 3 channels)
        qkv = qkv.view(batch, height * width, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (batch, heads, positions, channels per head) each
        attended = F.scaled_dot_product_attention(q, k, v)
        attended = attended.transpose(1, 2).flatten(2)  # (batch, positions, channels)
        rows = rows + self.out(attended)
        rows = rows + self.ff_self(rows)
        return rows.transpose(1, 2).reshape(batch, channels, height, width)


class Stage(nn.Module):
    """Two DoubleConvs; the embedding is added to each channel; attention if asked for."""

    def __init__(self, before: int, after: int, embedding: int, attention: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            DoubleConv(before, before, residual=True), DoubleConv(before, after)
        )
        self.emb_layer = nn.Sequential(nn.SiLU(), nn.Linear(embedding, after))
        self.attention = SelfAttention(after) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(batch, before, height, width), (batch, embedding) → (batch, after, height, width)."""
        shift = self.emb_layer(embedding)[:, :, None, None]
        return self.attention(self.conv(x) + shift)


class AttentionUnet(Network):
    """Predicts the noise in 28x28 images.

    Max-pooling leads 28 → 14 → 7 pixels, transposed convolutions back. The default width is the
    printed one, 5.9 M parameters. All stages below full resolution end in self-attention. The label
    embedding is added to that of the time; nothing is added for a dropped class.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, n_classes: int = 10) -> None:
        super().__init__()
        self.config = {
            "net": "attention_unet",
            "arguments": {"in_channels": in_channels, "width": width, "n_classes": n_classes},
        }
        wide = 2 * width
        self.embedding = 4 * width
        self.label_emb = nn.Embedding(n_classes, self.embedding)
        self.conv1 = DoubleConv(in_channels, width)
        self.pool = nn.MaxPool2d(2)
        self.down1 = Stage(width, wide, self.embedding, attention=True)
        self.down2 = Stage(wide, wide, self.embedding, attention=True)
        self.bottom = nn.Sequential(
            DoubleConv(wide, 2 * wide),
            DoubleConv(2 * wide, 2 * wide),
            DoubleConv(2 * wide, wide),
        )
        self.upsample1 = nn.ConvTranspose2d(wide, wide, 4, 2, padding=1)  # 7 → 14
        self.up1 = Stage(2 * wide, width, self.embedding, attention=True)
        self.upsample2 = nn.ConvTranspose2d(width, width, 4, 2, padding=1)  # 14 → 28
        self.up2 = Stage(wide, width, self.embedding, attention=False)
        self.out = nn.Conv2d(width, in_channels, 1)

    def embed(self, t: Tensor, classes: Tensor | None, drop: Tensor | None) -> Tensor:
        """Embeddings (batch, 4 width) of times and classes.

        Sines and cosines of 1000 t, plus the label embeddings of classes that are not dropped.
        """
        half = self.embedding // 2
        exponents = torch.arange(half, device=t.device) * (-math.log(10000) / half)
        angles = 1000 * t.float()[:, None] * torch.exp(exponents)
        embedding = torch.cat((angles.sin(), angles.cos()), 1)
        if classes is None:
            return embedding
        labels = self.label_emb(classes)
        if drop is not None:
            labels = labels.masked_fill(drop[:, None], 0.0)
        return embedding + labels

    def forward(
        self, x: Tensor, t: Tensor, classes: Tensor | None = None, drop: Tensor | None = None
    ) -> Tensor:
        """Noisy images (batch, in_channels, 28, 28) → the noise in them, same shape.

        `t`, float (batch,), is the step divided by the number of steps, in [0, 1]; the caller
        divides. `classes` is int64 (batch,), or None for no class. `drop` is bool (batch,), True
        where the class of a row is withheld.
        """
        embedding = self.embed(t, classes, drop)
        first = self.conv1(x)  # (batch, width, 28, 28)
        down = self.down1(self.pool(first), embedding)  # (batch, 2 width, 14, 14)
        h = self.down2(self.pool(down), embedding)  # (batch, 2 width, 7, 7)
        h = self.bottom(h)
        h = torch.cat((down, self.upsample1(h)), 1)
        h = self.up1(h, embedding)  # (batch, width, 14, 14)
        h = torch.cat((first, self.upsample2(h)), 1)
        h = self.up2(h, embedding)  # (batch, width, 28, 28)
        return self.out(h)
