"""Augmentation of digit images in whole batches, on the device, from an explicit generator."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def augment_digits(images: Tensor, rng: torch.Generator, strength: float, neighbours: bool = True) -> Tensor:
    """Random grey mix, affine map, neighbouring digits, stroke width, blur, noise and inversion.

    `images` is float (batch, 3, height, width) in [-1, 1]; the result has the same shape and may exceed the range a
    little. A strength of 0 gives the images back. Neighbours are strips of other images of the batch, pasted at the
    left and right border as street photographs show them; pass False for images that already have them.
    """
    if strength == 0:
        return images
    batch, _, height, width = images.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand((batch, *(shape or (1, 1, 1))), generator=rng, device=rng.device) * (high - low) + low

    # Colour → a random mix of the channels.
    weights = uniform(0.1, 1.1, 3, 1, 1)
    images = (images * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)  # (batch, 1, height, width)

    # Rotation, shear, scale, shift.
    angle, shear = strength * uniform(-0.2, 0.2, 1), strength * uniform(-0.25, 0.25, 1)
    scale_x, scale_y = (strength * uniform(-0.35, 0.35, 1)).exp(), (strength * uniform(-0.3, 0.3, 1)).exp()
    shift_x, shift_y = strength * uniform(-0.15, 0.15, 1), strength * uniform(-0.15, 0.15, 1)
    row_x = torch.cat([angle.cos() * scale_x, (shear - angle.sin()) * scale_x, shift_x], 1)
    row_y = torch.cat([angle.sin() * scale_y, angle.cos() * scale_y, shift_y], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), [batch, 1, height, width], align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)

    if neighbours:
        images = paste_neighbours(images, rng, chance=0.5 * strength)

    # Stroke width: a 3x3 maximum or minimum for one image in five each.
    choice = uniform(0, 1)
    wider, thinner = F.max_pool2d(images, 3, 1, 1), -F.max_pool2d(-images, 3, 1, 1)
    images = torch.where(choice < 0.2 * strength, wider, torch.where(choice > 1 - 0.2 * strength, thinner, images))

    # Blur (a step towards the image blurred twice by a 3x3 box), then noise in proportion to the contrast.
    blurred = F.avg_pool2d(F.avg_pool2d(F.pad(images, (2, 2, 2, 2), "replicate"), 3, 1), 3, 1)
    images = torch.lerp(images, blurred, strength * uniform(-0.5, 1).clamp(min=0))
    noise = torch.randn(images.shape, generator=rng, device=rng.device)
    images = images + noise * images.std((1, 2, 3), keepdim=True) * uniform(0, 0.1 * strength)

    images = torch.where(uniform(0, 1) < 0.5, -images, images)
    return images.expand(-1, 3, -1, -1)


def paste_neighbours(images: Tensor, rng: torch.Generator, chance: float) -> Tensor:
    """Replace 2-8 columns at the left and at the right border, each with `chance`, by part of another image's digit.

    Images (batch, channels, height, width); the other image is brought to the mean and contrast of this one first.
    """
    batch, _, _, width = images.shape
    mean, contrast = images.mean((1, 2, 3), keepdim=True), images.std((1, 2, 3), keepdim=True) + 1e-3
    standard = (images - mean) / contrast
    column = torch.arange(width, device=images.device)
    for side in (0, 1):
        draws = torch.rand(3, batch, 1, 1, 1, generator=rng, device=rng.device)
        strip = (2 + draws[0] * 7).long() * (draws[1] < chance)  # columns to replace
        margin = (5 + draws[2] * 4).long()  # the empty columns beside the other digit, left out
        other = standard.roll(1 + side, 0) * contrast + mean
        if side == 0:
            inside, source = column < strip, column - strip + width - margin
        else:
            inside, source = column >= width - strip, column - (width - strip) + margin
        source = source.clamp(0, width - 1).expand(-1, images.shape[1], images.shape[2], -1)
        images = torch.where(inside, other.gather(3, source), images)
    return images
