"""Augmentation of digit images in whole batches, on the device, from an explicit generator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def augment_digits(images: Tensor, rng: torch.Generator, strength: float) -> Tensor:
    """Random grey mix, affine map, stroke width, blur, noise and inversion.

    `images` is float (batch, 3, height, width) in [-1, 1]; the result has the same shape and may exceed the range a
    little. A strength of 0 gives the images back.
    """
    if strength == 0:
        return images

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        shape = (len(images), *(shape or (1, 1, 1)))
        return torch.rand(shape, generator=rng, device=rng.device) * (high - low) + low

    # Colour → a random mix of the channels, for half of the images.
    weights = uniform(0.1, 1.1, 3, 1, 1)
    grey = (images * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)  # (batch, 1, height, width)
    images = torch.where(uniform(0, 1) < 0.5 * strength, grey, images)

    # Rotation, shear, scale, shift.
    angle, shear = strength * uniform(-0.2, 0.2, 1), strength * uniform(-0.25, 0.25, 1)
    scale_x, scale_y = ((strength * uniform(-0.35, 0.35, 1)).exp() for _ in "xy")
    shift_x, shift_y = strength * uniform(-0.15, 0.15, 1), strength * uniform(-0.15, 0.15, 1)
    row_x = torch.cat([angle.cos() * scale_x, (shear - angle.sin()) * scale_x, shift_x], 1)
    row_y = torch.cat([angle.sin() * scale_y, angle.cos() * scale_y, shift_y], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), images.shape, align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)

    # Stroke width: the maximum, or the minimum, of 3x3 pixels, for a fifth of the images each.
    choice = uniform(0, 1)
    wider, thinner = of_3x3(images, torch.maximum), of_3x3(images, torch.minimum)
    images = torch.where(choice < 0.2 * strength, wider, torch.where(choice > 1 - 0.2 * strength, thinner, images))

    # Blur: a step towards the image smoothed twice over 3x3 pixels. Then noise and, for half of the images, inversion.
    smooth = of_3x3(of_3x3(images, torch.add), torch.add) / 81
    images = torch.lerp(images, smooth, strength * uniform(-0.5, 1).clamp(min=0))
    noise = torch.randn(images.shape, generator=rng, device=rng.device) * uniform(0, 0.05 * strength)
    return (images + noise) * torch.where(uniform(0, 1) < 0.5, -1, 1)


def of_3x3(images: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine the 3x3 neighbourhood of every pixel (edges repeated); shifts are much faster here than pooling."""
    height, width = images.shape[-2:]
    wide = F.pad(images, (1, 1, 1, 1), mode="replicate")
    rows = combine(combine(wide[..., :height, :], wide[..., 1 : height + 1, :]), wide[..., 2:, :])
    return combine(combine(rows[..., :width], rows[..., 1 : width + 1]), rows[..., 2:])
