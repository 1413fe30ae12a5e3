"""The U-Net of the widely used public script for diffusion of 28x28 digits by class: its keys, its outputs.

The public script is https://github.com/TeaPearce/Conditional_Diffusion_MNIST. Noise prediction: Ho et al., 2020,
https://arxiv.org/abs/2006.11239; dropped classes: Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DoubleConv(nn.Module):
    """Two 3x3 convolutions with BatchNorm and GELU; a residual one adds what the first gives to what the second does.

    1.414, not the root of 2, keeps the variance of the sum: what the published weights were trained with.
    """

    def __init__(self, before: int, after: int, residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        self.conv1 = nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.GELU())
        self.conv2 = nn.Sequential(nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        """(batch, before, height, width) → (batch, after, height, width)."""
        first = self.conv1(x)
        second = self.conv2(first)
        return (first + second) / 1.414 if self.residual else second


def _model(*layers: nn.Module) -> nn.Sequential:
    """Layers one after the other under the key `model`, where published checkpoints have them."""
    return nn.Sequential(OrderedDict(model=nn.Sequential(*layers)))


def _down(before: int, after: int) -> nn.Sequential:
    return _model(DoubleConv(before, after), nn.MaxPool2d(2))  # half the height and width


def _up(before: int, after: int) -> nn.Sequential:
    return _model(nn.ConvTranspose2d(before, after, 2, 2), DoubleConv(after, after), DoubleConv(after, after))


def _embed(before: int, after: int) -> nn.Sequential:
    return _model(nn.Linear(before, after), nn.GELU(), nn.Linear(after, after))


class ContextUnet(nn.Module):
    """Predicts noise in 28x28 images: 28 → 14 → 7 → a vector, and up again; time and class modulate the way up.

    `n_feat` is the width: 128 makes 6.6 M parameters, 256 makes 26.3 M. `n_classes` is 10 for one domain of digits, 20
    for two. A class enters as a one-hot row, a dropped one as zeros. The public script feeds
    one_hot(c) * (-1 * (1 - context_mask)): its mask is 1 where the class is dropped, and a kept row holds -1 instead of
    1. `flipped_one_hot` does the same, so that checkpoints of that script answer as they were trained.
    """

    def __init__(
        self, in_channels: int = 3, n_feat: int = 128, n_classes: int = 10, flipped_one_hot: bool = False
    ) -> None:
        super().__init__()
        arguments = {"in_channels": in_channels, "n_feat": n_feat, "n_classes": n_classes}
        self.config = {"net": "context_unet", "arguments": arguments | {"flipped_one_hot": flipped_one_hot}}
        self.n_classes, self.flipped_one_hot = n_classes, flipped_one_hot
        wide = 2 * n_feat
        self.init_conv = DoubleConv(in_channels, n_feat, residual=True)
        self.down1 = _down(n_feat, n_feat)
        self.down2 = _down(n_feat, wide)
        self.to_vec = nn.Sequential(nn.AvgPool2d(7), nn.GELU())
        self.timeembed1, self.timeembed2 = _embed(1, wide), _embed(1, n_feat)
        self.contextembed1, self.contextembed2 = _embed(n_classes, wide), _embed(n_classes, n_feat)
        self.up0 = nn.Sequential(nn.ConvTranspose2d(wide, wide, 7, 7), nn.GroupNorm(8, wide), nn.ReLU())
        self.up1 = _up(2 * wide, n_feat)
        self.up2 = _up(wide, n_feat)
        self.out = nn.Sequential(
            nn.Conv2d(wide, n_feat, 3, padding=1),
            nn.GroupNorm(8, n_feat),
            nn.ReLU(),
            nn.Conv2d(n_feat, in_channels, 3, padding=1),
        )

    @staticmethod
    def arguments_of(weights: dict[str, Tensor]) -> dict[str, Any]:
        """The constructor's arguments for a checkpoint of the public script, by its shapes; {} for other weights."""
        first, embedding = (weights.get(key) for key in ("init_conv.conv1.0.weight", "contextembed1.model.0.weight"))
        if first is None or embedding is None:
            return {}
        sizes = {"in_channels": first.shape[1], "n_feat": first.shape[0], "n_classes": embedding.shape[1]}
        return sizes | {"flipped_one_hot": True}

    def context(self, classes: Tensor | None, drop: Tensor | None, batch: int) -> Tensor | None:
        """Classes (batch,) and where to drop them → one-hot rows (batch, n_classes), zeros where dropped."""
        if classes is None:
            return self.contextembed1.model[0].weight.new_zeros(batch, self.n_classes)
        rows = F.one_hot(classes, self.n_classes).float()
        if drop is not None:
            rows = rows.masked_fill(drop[:, None], 0.0)
        return -rows if self.flipped_one_hot else rows

    def forward(self, x: Tensor, t: Tensor, classes: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        """Noisy images (batch, in_channels, 28, 28) → the noise in them, same shape.

        `t`, float (batch,), is the step divided by the number of steps, in [0, 1]: the caller divides. `classes`, int64
        (batch,), None for no class at all; `drop`, bool (batch,), True where a row's class is withheld.
        """
        with torch.autocast(x.device.type, enabled=False):  # bf16 could not tell 0.899 from 0.900
            rows, time = self.context(classes, drop, len(x)), t.float()[:, None]
            scale1, shift1 = self.contextembed1(rows), self.timeembed1(time)  # (batch, 2 n_feat)
            scale2, shift2 = self.contextembed2(rows), self.timeembed2(time)  # (batch, n_feat)
        first = self.init_conv(x)  # (batch, n_feat, 28, 28)
        down1 = self.down1(first)  # (batch, n_feat, 14, 14)
        down2 = self.down2(down1)  # (batch, 2 n_feat, 7, 7)
        h = self.up0(self.to_vec(down2))  # (batch, 2 n_feat, 1, 1) → (batch, 2 n_feat, 7, 7)
        h = self.up1(torch.cat((_modulate(h, scale1, shift1), down2), 1))  # (batch, n_feat, 14, 14)
        h = self.up2(torch.cat((_modulate(h, scale2, shift2), down1), 1))  # (batch, n_feat, 28, 28)
        return self.out(torch.cat((h, first), 1))


def _modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * x + shift by channel, in the precision of x."""
    return torch.addcmul(shift.to(x.dtype)[:, :, None, None], x, scale.to(x.dtype)[:, :, None, None])
