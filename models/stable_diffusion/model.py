"""Stable Diffusion v1: a text encoder, a U-Net in latents and their autoencoder.

Rombach et al., 2022, https://arxiv.org/abs/2112.10752. The names of the three networks' weights are
those of the published file after its prefixes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.stable_diffusion.text_encoder import TextEncoder
from models.stable_diffusion.unet import Unet
from models.stable_diffusion.vae import LATENT_SCALE, Vae

# The prefixes of the three networks in the published file.
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}


class StableDiffusion(nn.Module):
    """Predicts the noise in latents of 512x512 images, given the states of a prompt."""

    counts_steps = True
    range_limit = None  # latents have no range

    def __init__(
        self,
        unet: Unet | None = None,
        vae: Vae | None = None,
        text_encoder: TextEncoder | None = None,
        image_size: int = 512,
    ) -> None:
        """The networks of version 1 are made if they are not given; smaller ones are for tests."""
        super().__init__()
        self.unet = unet or Unet()
        self.vae = vae or Vae()
        self.text_encoder = text_encoder or TextEncoder()
        self.image_size = image_size
        arguments = self.vae.config["arguments"]
        side = image_size // 2 ** (len(arguments["multipliers"]) - 1)
        self.shape = (arguments["latent_channels"], side, side)
        self.length = self.text_encoder.config["arguments"]["length"]
        self.text_width = self.text_encoder.config["arguments"]["width"]

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (batch, length) → embeddings (batch, length, text_width)."""
        return self.text_encoder.embed(ids)

    def encode_text(self, embeddings: Tensor) -> Tensor:
        """Embeddings → states (batch, length, text_width)."""
        return self.text_encoder(embeddings)

    def predict(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """Noisy latents (batch, *shape), steps t (batch,) from 0 to 999, states → the noise."""
        dtype = next(self.unet.parameters()).dtype
        return self.unet(x.to(dtype), t, states.to(dtype)).float()

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [-1, 1] → mean and standard deviation of their latents (batch, *shape)."""
        mean, log_variance = self.vae.encode(images)
        return LATENT_SCALE * mean, LATENT_SCALE * torch.exp(0.5 * log_variance)

    def decode(self, x: Tensor) -> Tensor:
        """Latents (batch, *shape) → images, about in [-1, 1].

        One at a time, because the decoder's last layers take most of the memory of all networks.
        """
        images = [self.vae.decode(one.float() / LATENT_SCALE) for one in x.split(1)]
        return torch.cat(images)

    def save_memory(self) -> None:
        """Prepare for training with encoded images: the autoencoder leaves the GPU.

        The U-Net computes its blocks twice instead of keeping what is inside them.
        """
        self.vae.to("cpu")
        self.unet.checkpointing = True
