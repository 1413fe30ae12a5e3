"""The U-Net of the widely used public script for diffusion of 28x28 digits by class.

It has the keys and the outputs of that script, https://github.com/TeaPearce/Conditional_Diffusion_MNIST.
Noise prediction: Ho et al., 2020, https://arxiv.org/abs/2006.11239. Dropped classes: Ho and
Salimans, 2022, https://arxiv.org/abs/2207.12598.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.network import Network


class DoubleConv(nn.Module):
    """Two 3x3 convolutions, each with BatchNorm and GELU.

    A residual one adds the output of the first convolution to that of the second. The sum is
    divided by 1.414, and not by the root of 2, because the published weights were trained so.
    """

    def __init__(self, before: int, after: int, residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        self.conv1 = nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.GELU()
        )
        self.conv2 = nn.Sequential(
            nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.GELU()
        )

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
    upsample = nn.ConvTranspose2d(before, after, 2, 2)  # twice the height and width
    return _model(upsample, DoubleConv(after, after), DoubleConv(after, after))


def _embed(before: int, after: int) -> nn.Sequential:
    return _model(nn.Linear(before, after), nn.GELU(), nn.Linear(after, after))


class ContextUnet(Network):
    """Predicts the noise in 28x28 images; time and class modulate the way up.

    The way down is 28 → 14 → 7 pixels → one vector. `n_feat` is the width: 128 makes 6.6 M
    parameters, 256 makes 26.3 M. `n_classes` is 10 for one domain of digits, 20 for two.

    A class enters as a one-hot row, a dropped class as zeros. The public script multiplies the row
    by -1 * (1 - context_mask), so that the row of a kept class has -1 in place of 1.
    `flipped_one_hot` does the same, for checkpoints of that script.
    """

    def __init__(
        self,
        in_channels: int = 3,
        n_feat: int = 128,
        n_classes: int = 10,
        flipped_one_hot: bool = False,
    ) -> None:
        super().__init__()
        self.config = {
            "net": "context_unet",
            "arguments": {
                "in_channels": in_channels,
                "n_feat": n_feat,
                "n_classes": n_classes,
                "flipped_one_hot": flipped_one_hot,
            },
        }
        self.n_classes = n_classes
        self.flipped_one_hot = flipped_one_hot
        wide = 2 * n_feat
        self.init_conv = DoubleConv(in_channels, n_feat, residual=True)
        self.down1 = _down(n_feat, n_feat)
        self.down2 = _down(n_feat, wide)
        self.to_vec = nn.Sequential(nn.AvgPool2d(7), nn.GELU())
        self.timeembed1 = _embed(1, wide)
        self.timeembed2 = _embed(1, n_feat)
        self.contextembed1 = _embed(n_classes, wide)
        self.contextembed2 = _embed(n_classes, n_feat)
        self.up0 = nn.Sequential(
            nn.ConvTranspose2d(wide, wide, 7, 7), nn.GroupNorm(8, wide), nn.ReLU()
        )
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
        """The constructor's arguments for a checkpoint of the public script, from its shapes.

        Empty for other weights.
        """
        first = weights.get("init_conv.conv1.0.weight")
        embedding = weights.get("contextembed1.model.0.weight")
        if first is None or embedding is None:
            return {}
        return {
            "in_channels": first.shape[1],
            "n_feat": first.shape[0],
            "n_classes": embedding.shape[1],
            "flipped_one_hot": True,
        }

    def context(self, classes: Tensor | None, drop: Tensor | None, batch: int) -> Tensor:
        """One-hot rows (batch, n_classes) of the classes (batch,), zeros where they are dropped."""
        if classes is None:
            weight = next(self.contextembed1.parameters())  # for its device and precision
            return weight.new_zeros(batch, self.n_classes)
        rows = F.one_hot(classes, self.n_classes).float()
        if drop is not None:
            rows = rows.masked_fill(drop[:, None], 0.0)
        return -rows if self.flipped_one_hot else rows

    def forward(
        self, x: Tensor, t: Tensor, classes: Tensor | None = None, drop: Tensor | None = None
    ) -> Tensor:
        """Noisy images (batch, in_channels, 28, 28) → the noise in them, same shape.

        `t`, float (batch,), is the step divided by the number of steps, in [0, 1]; the caller
        divides. `classes` is int64 (batch,), or None for no class. `drop` is bool (batch,), True
        where the class of a row is withheld.
        """
        # In bf16 the times 0.899 and 0.900 are the same number.
        with torch.autocast(x.device.type, enabled=False):
            rows = self.context(classes, drop, len(x))
            time = t.float()[:, None]
            scale1 = self.contextembed1(rows)  # (batch, 2 n_feat)
            shift1 = self.timeembed1(time)
            scale2 = self.contextembed2(rows)  # (batch, n_feat)
            shift2 = self.timeembed2(time)
        first = self.init_conv(x)  # (batch, n_feat, 28, 28)
        down1 = self.down1(first)  # (batch, n_feat, 14, 14)
        down2 = self.down2(down1)  # (batch, 2 n_feat, 7, 7)
        h = self.to_vec(down2)  # (batch, 2 n_feat, 1, 1)
        h = self.up0(h)  # (batch, 2 n_feat, 7, 7)
        h = torch.cat((_modulate(h, scale1, shift1), down2), 1)
        h = self.up1(h)  # (batch, n_feat, 14, 14)
        h = torch.cat((_modulate(h, scale2, shift2), down1), 1)
        h = self.up2(h)  # (batch, n_feat, 28, 28)
        return self.out(torch.cat((h, first), 1))


def _modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Scale and shift each channel, in the precision of x."""
    scale = scale.to(x.dtype)[:, :, None, None]
    shift = shift.to(x.dtype)[:, :, None, None]
    return torch.addcmul(shift, x, scale)
