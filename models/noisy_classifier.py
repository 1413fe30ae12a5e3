"""A classifier of noisy images, whose gradient guides the sampling of a diffusion model.

It is the way down of the diffusion model's own U-Net, and its middle, with a linear layer on top
(Dhariwal and Nichol, 2021, https://arxiv.org/abs/2105.05233). It can start with the weights of the
U-Net, which knows already what an image under noise looks like. Group normalisation keeps an
image's gradient independent of the other images of its batch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from models.ddim_unet import Block, DdimUnet, group_norm
from models.network import Network


class NoisyClassifier(Network):
    """Noisy images or latents, and their step → logits of attributes.

    `unet` are the constructor's arguments of the DdimUnet whose first two parts it has.
    """

    counts_steps = True  # as DdimUnet

    def __init__(self, unet: dict[str, Any], n_attributes: int = 10, dropout: float = 0.1) -> None:
        super().__init__()
        self.config = {
            "net": "noisy_classifier",
            "arguments": {"unet": unet, "n_attributes": n_attributes, "dropout": dropout},
        }
        arguments: dict[str, Any] = unet | {"dropout": dropout}
        whole = DdimUnet(**arguments)
        self.patch = whole.patch
        self.shape = whole.shape  # of the noisy images or latents, without the batch
        self.time = whole.time
        self.down = nn.ModuleList(whole.layers("down"))
        self.mid = nn.ModuleList(whole.layers("mid"))
        channels = unet["width"] * unet["multipliers"][-1]
        self.norm = group_norm(channels)
        self.head = nn.Linear(channels, n_attributes)

    def start_from(self, unet: DdimUnet) -> None:
        """Copy the weights of a U-Net with the arguments `unet`; the linear layer has none."""
        self.time.load_state_dict(unet.time.state_dict())
        for part, layers in (("down", self.down), ("mid", self.mid)):
            layers.load_state_dict(nn.ModuleList(unet.layers(part)).state_dict())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(batch, in_channels, size, size) and steps float (batch,) → logits (batch, attributes).

        The steps count from 0, as those of DdimUnet.
        """
        time = self.time(t)
        x = F.pixel_unshuffle(x, self.patch)
        for layer in (*self.down, *self.mid):
            x = layer(x, time) if isinstance(layer, Block) else layer(x)
        pooled = F.silu(self.norm(x)).mean((2, 3))  # (batch, channels)
        return self.head(pooled)
