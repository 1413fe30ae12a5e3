"""A U-Net that works in the latents of an autoencoder, with that autoencoder in the same file."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from models.autoencoder import Autoencoder
from models.ddim_unet import DdimUnet
from models.network import Network


class LatentUnet(Network):
    """A DdimUnet for latents, and the autoencoder that makes and reads them.

    A sampler calls it as it calls a DdimUnet: the state has `shape`, and `decode` makes images of
    the last one. The autoencoder is frozen: it has no gradients and stays in eval mode.
    """

    counts_steps = True

    def __init__(self, unet: dict[str, Any], autoencoder: dict[str, Any]) -> None:
        """`unet` and `autoencoder` are the constructors' arguments of the two networks.

        Raises ValueError if the U-Net is not for latents of that autoencoder.
        """
        super().__init__()
        self.unet = DdimUnet(**unet)
        self.autoencoder = Autoencoder(**autoencoder).eval().requires_grad_(False)
        if self.unet.shape != self.autoencoder.latent_shape:
            raise ValueError(
                f"the U-Net is for states {self.unet.shape}, "
                f"but the latents are {self.autoencoder.latent_shape}"
            )
        self.config = {
            "net": "latent_unet",
            "arguments": {
                "unet": self.unet.config["arguments"],
                "autoencoder": self.autoencoder.config["arguments"],
            },
        }
        self.shape = self.unet.shape
        self.image_size = self.autoencoder.config["arguments"]["size"]

    def train(self, mode: bool = True) -> LatentUnet:
        """Set the mode of the U-Net alone."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        classes: Tensor | None = None,
        drop: Tensor | None = None,
        attributes: Tensor | None = None,
    ) -> Tensor:
        """Noisy latents (batch, *shape) → the noise in them; the rest is as in DdimUnet."""
        return self.unet(x, t, classes, drop, attributes)

    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] → latents (batch, *shape)."""
        return self.autoencoder.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (batch, *shape) → images, about in [-1, 1]."""
        return self.autoencoder.decode(latents)
