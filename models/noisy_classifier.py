"""A classifier of noisy images, whose gradient guides the sampling of a diffusion model.

It is the way down of a U-Net that knows the noise's step, as in Dhariwal and Nichol, 2021,
https://arxiv.org/abs/2105.05233, with group normalisation, so that an image's gradient does not
depend on the other images of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from models.ddim_unet import Block, Sinusoid, group_norm
from models.network import Network


class NoisyClassifier(Network):
    """Noisy images or latents of `size` positions, and their step → logits of attributes.

    Level i is `width * multipliers[i]` wide and half as large as the level before, with `blocks`
    blocks, and with attention where its size is in `attention`.
    """

    counts_steps = True  # as DdimUnet

    def __init__(
        self,
        in_channels: int = 3,
        size: int = 64,
        width: int = 64,
        multipliers: Sequence[int] = (1, 2, 2),
        attention: Sequence[int] = (8,),
        blocks: int = 1,
        dropout: float = 0.1,
        patch: int = 1,
        n_attributes: int = 10,
    ) -> None:
        super().__init__()
        self.config = {
            "net": "noisy_classifier",
            "arguments": {
                "in_channels": in_channels,
                "size": size,
                "width": width,
                "multipliers": list(multipliers),
                "attention": list(attention),
                "blocks": blocks,
                "dropout": dropout,
                "patch": patch,
                "n_attributes": n_attributes,
            },
        }
        self.patch = patch
        time = 4 * width
        self.time = nn.Sequential(
            Sinusoid(width), nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time)
        )
        now = width * multipliers[0]
        self.first = nn.Conv2d(in_channels * patch**2, now, 3, padding=1)
        self.layers = nn.ModuleList()
        for level, multiplier in enumerate(multipliers):
            if level > 0:
                self.layers.append(nn.Conv2d(now, now, 3, 2, padding=1))  # half the size
            attends = size // patch >> level in attention
            for _ in range(blocks):
                self.layers.append(Block(now, width * multiplier, time, dropout, attends))
                now = width * multiplier
        self.norm = group_norm(now)
        self.head = nn.Linear(now, n_attributes)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(batch, in_channels, size, size) and steps float (batch,) → logits (batch, attributes).

        The steps count from 0, as those of DdimUnet.
        """
        time = self.time(t)
        x = self.first(F.pixel_unshuffle(x, self.patch))
        for layer in self.layers:
            x = layer(x, time) if isinstance(layer, Block) else layer(x)
        pooled = F.silu(self.norm(x)).mean((2, 3))  # (batch, width * multipliers[-1])
        return self.head(pooled)
