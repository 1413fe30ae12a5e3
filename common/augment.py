"""Augmentation of digit images in whole batches, on the device, from an explicit generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def augment_faces(images: Tensor, rng: torch.Generator, flip: bool) -> Tensor:
    """Random horizontal flips of float images (batch, channels, height, width)."""
    if not flip:
        return images
    flipped = torch.rand((len(images), 1, 1, 1), generator=rng, device=rng.device) < 0.5
    return torch.where(flipped, images.flip(3), images)


def diff_augment(images: Tensor, rng: torch.Generator, policy: Sequence[str]) -> Tensor:
    """Differentiable augmentation of what a discriminator sees, real or generated: any of color, translation, cutout.

    `images` is float (batch, 3, height, width) in [-1, 1]. Zhao et al., 2020, https://arxiv.org/abs/2006.10738
    """
    batch, _, height, width = images.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand((batch, 1, 1, 1), generator=rng, device=rng.device) * (high - low) + low

    if "color" in policy:  # brightness, saturation, contrast
        images = images + uniform(-0.5, 0.5)
        grey = images.mean(1, keepdim=True)
        images = grey + (images - grey) * uniform(0, 2)
        mean = images.mean((1, 2, 3), keepdim=True)
        images = mean + (images - mean) * uniform(0.5, 1.5)
    rows = torch.arange(height, device=images.device).view(1, 1, height, 1)
    columns = torch.arange(width, device=images.device).view(1, 1, 1, width)
    if "translation" in policy:  # by up to an eighth of the size, zeros outside
        down, right = ((uniform(-0.125, 0.125) * size).round().long() for size in (height, width))
        inside = (rows + down >= 0) & (rows + down < height) & (columns + right >= 0) & (columns + right < width)
        take = (rows + down).clamp(0, height - 1) * width + (columns + right).clamp(0, width - 1)
        moved = images.flatten(2).gather(2, take.flatten(2).expand(-1, images.shape[1], -1))  # (batch, 3, pixels)
        images = moved.view_as(images) * inside
    if "cutout" in policy:  # a square of half the size becomes 0
        above, left = ((uniform(0, 1) * size).floor() for size in (height, width))
        down, right = rows - above, columns - left
        hidden = (down >= -height // 4) & (down < height // 4) & (right >= -width // 4) & (right < width // 4)
        images = images * ~hidden
    return images
