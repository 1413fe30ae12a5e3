"""A small text-to-image diffusion model of 64x64 images: Stable Diffusion's parts, made small.

Its text encoder and its U-Net are those of models/stable_diffusion at a fraction of the width. In
place of an autoencoder it sees squares of 4x4 pixels as one position. Text enters by
cross-attention, as in Rombach et al., 2022, https://arxiv.org/abs/2112.10752.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.network import Network
from models.stable_diffusion.text_encoder import TextEncoder
from models.stable_diffusion.unet import Unet

CLIP_TOKENS = 49_408


class TextToImage(Network):
    """Predicts the velocity v in noisy images, given the states of a prompt."""

    rows: Tensor  # of the table of embeddings, for each of CLIP's tokens
    counts_steps = True
    range_limit = 1.0  # it diffuses pixels

    def __init__(
        self,
        vocabulary: Sequence[int],
        size: int = 64,
        patch: int = 4,
        width: int = 64,
        multipliers: Sequence[int] = (1, 2, 2),
        attention_levels: Sequence[int] = (1, 2),
        blocks: int = 1,
        heads: int = 4,
        text_width: int = 128,
        text_layers: int = 3,
        length: int = 24,
    ) -> None:
        """`vocabulary` lists the CLIP tokens that the model knows; all others share one vector.

        `length` is the number of tokens of a prompt. The rest are the sizes of the networks.
        """
        super().__init__()
        self.config = {
            "net": "text_to_image",
            "arguments": {
                "vocabulary": list(vocabulary),
                "size": size,
                "patch": patch,
                "width": width,
                "multipliers": list(multipliers),
                "attention_levels": list(attention_levels),
                "blocks": blocks,
                "heads": heads,
                "text_width": text_width,
                "text_layers": text_layers,
                "length": length,
            },
        }
        smallest = patch * 2 ** (len(multipliers) - 1)
        if size % smallest:
            raise ValueError(f"the size of the images must be a multiple of {smallest}, not {size}")
        if text_width % heads:
            raise ValueError(f"{heads} heads must divide the width of the text, {text_width}")
        self.patch = patch
        self.length = length
        self.text_width = text_width
        self.image_size = size
        self.shape = (3 * patch**2, size // patch, size // patch)  # of the U-Net's input
        self.text_encoder = TextEncoder(len(vocabulary) + 1, text_width, text_layers, heads, length)
        self.unet = Unet(
            in_channels=self.shape[0],
            out_channels=self.shape[0],
            width=width,
            multipliers=tuple(multipliers),
            blocks=blocks,
            attention_levels=tuple(attention_levels),
            heads=heads,
            context_width=text_width,
        )
        self.whole_prompt = nn.Linear(text_width, 4 * width)
        rows = torch.full((CLIP_TOKENS,), len(vocabulary))  # the last row is for unknown tokens
        rows[torch.tensor(vocabulary)] = torch.arange(len(vocabulary))
        self.register_buffer("rows", rows, persistent=False)

    def embed(self, ids: Tensor) -> Tensor:
        """CLIP's token ids (batch, length) → the embeddings (batch, length, text_width)."""
        return self.text_encoder.embed(self.rows[ids])

    def unknown(self, ids: Tensor) -> Tensor:
        """Which of CLIP's token ids the model has never seen, bool of the same shape."""
        return self.rows[ids] == len(self.config["arguments"]["vocabulary"])

    def encode_text(self, embeddings: Tensor) -> Tensor:
        """Embeddings (batch, length, text_width) → states of the same shape."""
        return self.text_encoder(embeddings)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (batch, 3, size, size) in [-1, 1] → what is diffused (batch, *shape), and zeros.

        Each square of pixels becomes the channels of one position. The zeros are the standard
        deviations, as an autoencoder would give them.
        """
        squares = F.pixel_unshuffle(images, self.patch)
        return squares, torch.zeros_like(squares)

    def decode(self, x: Tensor) -> Tensor:
        """The inverse of `encode`: (batch, *shape) → images (batch, 3, size, size)."""
        return F.pixel_shuffle(x, self.patch)

    def save_memory(self) -> None:
        """Do nothing: the model is small."""

    def predict(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """Noisy x (batch, *shape), steps t (batch,) from 0 to 999, states → v in the shape of x.

        The last state has seen the whole prompt. It is added to the embedding of the time, which
        teaches a small network what a prompt names faster than cross-attention alone.
        """
        return self.unet(x, t, states, self.whole_prompt(states[:, -1]))

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Noisy x, steps t and the token ids (batch, length) of prompts → v, for training."""
        return self.predict(x, t, self.encode_text(self.embed(ids)))
