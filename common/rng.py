"""Random numbers that depend on a named key alone, so that a resumed run draws the same ones.

Every draw has a key, such as (seed, "step", 17). No state of a generator is ever saved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on the key alone, such as (args.seed, "step", 17, rank)."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_rng(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A new random generator, seeded with `derive_seed(*key)`."""
    return torch.Generator(device).manual_seed(derive_seed(*key))


def seed_dropout(*key: int | str) -> None:
    """Seed torch's global generator, which dropout draws from, with `derive_seed("dropout", *key)`.

    Called in every step, it makes a resumed run drop the same activations.
    """
    torch.manual_seed(derive_seed("dropout", *key))


class ImageNoise:
    """Noise for a batch of numbered images. What image k gets depends on (seed, k) alone.

    Each call gives the next noise: that of one sampler step. Where sampling starts from noise that
    is drawn too, the first call gives x_T.
    """

    def __init__(
        self,
        seed: int,
        numbers: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        """`numbers` are the k of the images, `shape` is that of one image (or latent)."""
        self.rngs = [make_rng(seed, "image", number) for number in numbers]
        self.shape = tuple(shape)
        self.device = device

    def __call__(self) -> torch.Tensor:
        """Standard normal noise (images, *shape), float32."""
        draws = [torch.randn(self.shape, generator=rng) for rng in self.rngs]
        return torch.stack(draws).to(self.device)
