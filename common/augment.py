"""Augmentation of whole batches of images, on the device, from an explicit random generator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def augment_digits(images: Tensor, rng: torch.Generator, strength: float) -> Tensor:
    """Random grey mix, affine map, stroke width, blur, noise and inversion.

    `images` is float (batch, 3, height, width) in [-1, 1]; the result has the same shape and may
    exceed the range a little. A strength of 0 returns the images unchanged.
    """
    if strength == 0:
        return images

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        """One number for each image, or one of this shape."""
        draw = torch.rand((len(images), *(shape or (1, 1, 1))), generator=rng, device=rng.device)
        return draw * (high - low) + low

    # Colour becomes a random mix of the channels, for half of the images.
    weights = uniform(0.1, 1.1, 3, 1, 1)
    mixed = (images * weights).sum(1, keepdim=True)  # (batch, 1, height, width)
    grey = mixed / weights.sum(1, keepdim=True)
    images = torch.where(uniform(0, 1) < 0.5 * strength, grey, images)

    # Rotation, shear, scale and shift.
    angle = strength * uniform(-0.2, 0.2, 1)
    shear = strength * uniform(-0.25, 0.25, 1)
    scale_x = (strength * uniform(-0.35, 0.35, 1)).exp()
    scale_y = (strength * uniform(-0.35, 0.35, 1)).exp()
    shift_x = strength * uniform(-0.15, 0.15, 1)
    shift_y = strength * uniform(-0.15, 0.15, 1)
    row_x = torch.cat([angle.cos() * scale_x, (shear - angle.sin()) * scale_x, shift_x], 1)
    row_y = torch.cat([angle.sin() * scale_y, angle.cos() * scale_y, shift_y], 1)
    maps = torch.stack([row_x, row_y], 1)  # (batch, 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)

    # Stroke width: the maximum or the minimum of 3x3 pixels, for a fifth of the images each.
    choice = uniform(0, 1)
    wider = of_3x3(images, torch.maximum)
    thinner = of_3x3(images, torch.minimum)
    is_thinned = choice > 1 - 0.2 * strength
    is_widened = choice < 0.2 * strength
    images = torch.where(is_widened, wider, torch.where(is_thinned, thinner, images))

    # Blur: a step towards the image that is smoothed twice over 3x3 pixels.
    smooth = of_3x3(of_3x3(images, torch.add), torch.add) / 81
    images = torch.lerp(images, smooth, strength * uniform(-0.5, 1).clamp(min=0))

    # Noise, and inversion of half of the images.
    noise = torch.randn(images.shape, generator=rng, device=rng.device)
    images = images + noise * uniform(0, 0.05 * strength)
    return images * torch.where(uniform(0, 1) < 0.5, -1, 1)


def of_3x3(images: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine the 3x3 neighbourhood of every pixel; pixels at the edge are repeated.

    Shifted copies are much faster here than pooling.
    """
    height, width = images.shape[-2:]
    wide = F.pad(images, (1, 1, 1, 1), mode="replicate")
    rows = combine(wide[..., :height, :], wide[..., 1 : height + 1, :])
    rows = combine(rows, wide[..., 2:, :])
    pairs = combine(rows[..., :width], rows[..., 1 : width + 1])
    return combine(pairs, rows[..., 2:])


def add_neighbours(images: Tensor, rng: torch.Generator, share: float) -> Tensor:
    """Put another digit of the batch at the right and at the left edge, as house numbers have them.

    `images` is (batch, 3, 28, 28). Each side gets a neighbour with probability `share`, 3 to 9
    pixels of it; that at the left may itself have the neighbour that it got at its right. The digit
    in the middle stays the one that counts.
    """
    if share == 0:
        return images
    batch, _, height, width = images.shape
    columns = torch.arange(width, device=images.device)
    for side in ("right", "left"):
        others = torch.randperm(batch, generator=rng, device=rng.device)
        visible = torch.randint(3, 10, (batch, 1), generator=rng, device=rng.device)
        present = torch.rand((batch, 1), generator=rng, device=rng.device) < share
        # A digit begins about 5 pixels from the edges of its own image.
        if side == "right":
            covered = columns >= width - visible  # (batch, width)
            take = columns - (width - visible) + 5
        else:
            covered = columns < visible
            take = columns - visible + width - 5
        take = take.clamp(0, width - 1)[:, None, None, :].expand(-1, 3, height, -1)
        neighbours = images[others].gather(3, take)
        images = torch.where((covered & present)[:, None, None, :], neighbours, images)
    return images


def tint(images: Tensor, rng: torch.Generator, share: float) -> Tensor:
    """Give the channels of a share of the images contrasts and brightnesses of their own.

    `images` is float (batch, 3, height, width); the result may exceed its range. A channel keeps
    between a tenth and all of its contrast, some turn negative, and noise is added, so that a
    grey image becomes one with two colours and a channel may hardly show the digit.
    """
    if share == 0:
        return images

    def uniform(low: float, high: float, channels: int) -> Tensor:
        """One number for each channel of each image, or one for all channels."""
        draw = torch.rand((len(images), channels, 1, 1), generator=rng, device=rng.device)
        return draw * (high - low) + low

    contrast = uniform(0.1, 1, 3)
    contrast = torch.where(uniform(0, 1, 3) < 0.1, -contrast, contrast)
    noise = torch.randn(images.shape, generator=rng, device=rng.device)
    tinted = images * contrast + uniform(-0.5, 0.5, 3) + noise * uniform(0, 0.05, 1)
    return torch.where(uniform(0, 1, 1) < share, tinted, images)


def augment_faces(images: Tensor, rng: torch.Generator, flip: bool) -> Tensor:
    """Mirror half of the float images (batch, channels, height, width)."""
    if not flip:
        return images
    mirrored = torch.rand((len(images), 1, 1, 1), generator=rng, device=rng.device) < 0.5
    return torch.where(mirrored, images.flip(3), images)


def diff_augment(images: Tensor, rng: torch.Generator, policy: Sequence[str]) -> Tensor:
    """Differentiable augmentation of what a discriminator sees, real or generated.

    `policy` names any of "color", "translation" and "cutout". `images` is float
    (batch, 3, height, width) in [-1, 1]. Zhao et al., 2020, https://arxiv.org/abs/2006.10738
    """
    batch, _, height, width = images.shape

    def uniform(low: float, high: float) -> Tensor:
        """One number for each image."""
        draw = torch.rand((batch, 1, 1, 1), generator=rng, device=rng.device)
        return draw * (high - low) + low

    if "color" in policy:
        images = images + uniform(-0.5, 0.5)  # brightness
        grey = images.mean(1, keepdim=True)
        images = grey + (images - grey) * uniform(0, 2)  # saturation
        mean = images.mean((1, 2, 3), keepdim=True)
        images = mean + (images - mean) * uniform(0.5, 1.5)  # contrast
    if "translation" in policy:
        down = (uniform(-0.125, 0.125) * height).round().long()  # at most an eighth of the size
        right = (uniform(-0.125, 0.125) * width).round().long()
        images = translate(images, down, right)
    if "cutout" in policy:
        top = (uniform(0, 1) * height).floor()
        left = (uniform(0, 1) * width).floor()
        images = cut_out(images, top, left)
    return images


def translate(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Shift the content of each image by whole pixels, with zeros outside.

    `images` is (batch, channels, height, width), the shifts are int64 (batch, 1, 1, 1).
    """
    _, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device).view(1, 1, height, 1) + down
    columns = torch.arange(width, device=images.device).view(1, 1, 1, width) + right
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    take = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    take = take.flatten(2).expand(-1, channels, -1)  # (batch, channels, height · width)
    moved = images.flatten(2).gather(2, take).view_as(images)
    return moved * inside


def cut_out(images: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Set a square of half the size to 0 in each image, centred at `top` and `left`.

    `images` is (batch, channels, height, width), the places are (batch, 1, 1, 1).
    """
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device).view(1, 1, height, 1) - top
    columns = torch.arange(width, device=images.device).view(1, 1, 1, width) - left
    hidden_rows = (rows >= -height // 4) & (rows < height // 4)
    hidden_columns = (columns >= -width // 4) & (columns < width // 4)
    return images * ~(hidden_rows & hidden_columns)


def crop_and_flip(images: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """A random square of `size` pixels of each image, mirrored with probability one half.

    `images` is (batch, channels, height, width), at least `size` high and wide.
    """
    batch, _, height, width = images.shape

    def up_to(largest: int) -> Tensor:
        """A whole number from 0 to `largest` for each image: (batch, 1)."""
        return torch.randint(largest + 1, (batch, 1), generator=rng, device=rng.device)

    pixels = torch.arange(size, device=images.device)
    rows = up_to(height - size) + pixels  # (batch, size)
    columns = up_to(width - size) + pixels
    columns = torch.where(up_to(1) == 1, columns.flip(1), columns)
    numbers = torch.arange(batch, device=images.device)[:, None, None]
    # → (batch, size, size, channels) → (batch, channels, size, size)
    return images[numbers, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def turn_zoom_and_shift(images: Tensor, rng: torch.Generator) -> Tensor:
    """Turn each image by up to 10 degrees, zoom it in or out by up to 1.4, shift it by an eighth.

    `images` is float (batch, channels, height, width) in [-1, 1]. What comes in at the edge is
    black. The zoom is as wide as it is because digits fill the image in some data sets (USPS), and
    20 of 28 pixels in others (MNIST).
    """

    def uniform(largest: float) -> Tensor:
        """A number between -largest and largest for each image: (batch, 1)."""
        draw = torch.rand((len(images), 1), generator=rng, device=rng.device)
        return (2 * draw - 1) * largest

    angle = torch.deg2rad(uniform(10))
    zoom = uniform(math.log(1.4)).exp()
    # The map's coordinates go from -1 to 1, so that an eighth of the size is 0.25.
    row_x = torch.cat([zoom * angle.cos(), -zoom * angle.sin(), uniform(0.25)], 1)
    row_y = torch.cat([zoom * angle.sin(), zoom * angle.cos(), uniform(0.25)], 1)
    maps = torch.stack([row_x, row_y], 1)  # (batch, 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # zeros outside, then black
