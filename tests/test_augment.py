"""common/augment.py: shapes, ranges and randomness of both kinds of augmentation."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from common.augment import (
    add_neighbours,
    augment_digits,
    augment_faces,
    crop_and_flip,
    diff_augment,
    of_3x3,
    tint,
    turn_zoom_and_shift,
)
from common.rng import make_rng

# Digits


def test_digits_keep_their_shape_and_depend_on_the_rng():
    images = torch.rand(16, 3, 28, 28) * 2 - 1
    first = augment_digits(images, make_rng(0), 1.0)
    again = augment_digits(images, make_rng(0), 1.0)
    other = augment_digits(images, make_rng(1), 1.0)
    assert first.shape == images.shape
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_strength_of_0_changes_nothing():
    images = torch.rand(16, 3, 28, 28) * 2 - 1
    assert augment_digits(images, make_rng(0), 0.0) is images


def test_neighbours_cover_the_edges_and_nothing_else():
    """Every column is the image's own, or one of another image: at most 9 at each side."""
    numbers = torch.arange(16.0)[:, None] * 100 + torch.arange(28.0)  # image and column
    images = numbers[:, None, None, :].expand(16, 3, 28, 28)
    found = add_neighbours(images, make_rng(0), 0.5)
    assert torch.equal(found, found[:, :1, :1].expand_as(found))  # whole columns move
    columns = found[:, 0, 0]
    own = columns == numbers
    assert own[:, 9:19].all()
    covered = (~own).sum(1)
    assert (covered == 0).any()
    assert covered.max() > 9  # both sides
    right = columns[:, 19:][~own[:, 19:]] % 100  # from the other digit's left edge on
    assert right.min() == 5
    left = columns[:, :9][~own[:, :9]] % 100
    assert left.max() == 22
    every = add_neighbours(images, make_rng(0), 1.0)[:, 0, 0]
    assert ((every != numbers)[:, :3].sum() + (every != numbers)[:, -3:].sum()) > 70
    assert add_neighbours(images, make_rng(0), 0.0) is images


def test_tinted_channels_have_contrasts_of_their_own():
    grey = torch.rand(200, 1, 28, 28).expand(200, 3, 28, 28) * 2 - 1
    found = tint(grey, make_rng(0), 0.5)
    changed = (found != grey).flatten(1).any(1)
    assert 70 < changed.sum() < 130
    assert torch.equal(found[~changed], grey[~changed])
    centred = grey[:, 0].flatten(1) - grey[:, 0].flatten(1).mean(1, keepdim=True)
    slopes = (found.flatten(2) * centred[:, None]).sum(2) / centred.square().sum(1)[:, None]
    slopes = slopes[changed]  # of each channel: (changed, 3)
    assert 0.05 < slopes.abs().min() < 0.2
    assert 0.9 < slopes.abs().max() < 1.05
    assert 0.03 < (slopes < 0).float().mean() < 0.2
    assert (slopes.max(1).values - slopes.min(1).values).min() > 0.005
    assert tint(grey, make_rng(0), 0.0) is grey


def test_turned_digits_stay_in_range_and_what_comes_in_is_black():
    white = torch.ones(200, 3, 16, 16)
    images = turn_zoom_and_shift(white, make_rng(0))
    assert images.shape == white.shape
    assert images.min() >= -1
    assert images.max() <= 1
    shares = (images[:, 0] > 0).float().mean((1, 2))  # of white pixels; 1 / 1.4² is 0.51
    assert 0.3 < shares.min() < 0.6
    assert shares.max() > 0.9
    assert images[shares.argmin(), :, 0].max() < 0 or images[shares.argmin(), :, -1].max() < 0
    assert torch.equal(images, turn_zoom_and_shift(white, make_rng(0)))


def test_crops_are_parts_of_the_image_and_half_are_mirrored():
    image = torch.rand(3, 20, 18)
    crops = crop_and_flip(image.expand(200, 3, 20, 18), 16, make_rng(0))
    parts = image.unfold(1, 16, 1).unfold(2, 16, 1)  # (3, 5, 3, 16, 16)
    parts = parts.permute(1, 2, 0, 3, 4).flatten(0, 1)
    plain = [crop for crop in crops if any(torch.equal(crop, part) for part in parts)]
    mirrored = [crop for crop in crops if any(torch.equal(crop.flip(2), part) for part in parts)]
    assert len(plain) + len(mirrored) == 200
    assert 70 < len(plain) < 130


def test_3x3_neighbourhoods_agree_with_pooling():
    images = torch.randn(5, 3, 28, 28)
    wide = F.pad(images, (1, 1, 1, 1), mode="replicate")
    assert torch.equal(of_3x3(images, torch.maximum), F.max_pool2d(wide, 3, 1))
    torch.testing.assert_close(of_3x3(images, torch.add) / 9, F.avg_pool2d(wide, 3, 1))


# Faces


def test_about_half_of_the_faces_are_mirrored():
    images = torch.randn(400, 1, 2, 3)
    augmented = augment_faces(images, make_rng(0), flip=True)
    changed = (augmented != images).flatten(1).any(1)
    torch.testing.assert_close(augmented[changed], images[changed].flip(3))
    assert 150 < changed.sum() < 250
    assert augment_faces(images, make_rng(0), flip=False) is images


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.rand(64, 3, 16, 16) * 2 - 1


EVERYTHING = ("color", "translation", "cutout")


def test_no_policy_changes_nothing_and_the_rng_decides_the_rest(images):
    assert torch.equal(diff_augment(images, make_rng(0), ()), images)
    first = diff_augment(images, make_rng(1), EVERYTHING)
    again = diff_augment(images, make_rng(1), EVERYTHING)
    assert torch.equal(first, again)


def test_translation_shifts_by_up_to_two_pixels_with_zeros_outside(images):
    moved = diff_augment(images, make_rng(0), ("translation",))
    all_shifts = set()
    for before, after in zip(images, moved, strict=True):
        padded = F.pad(before, (2, 2, 2, 2))
        shifts = [
            (y, x)
            for y, x in itertools.product(range(5), repeat=2)
            if torch.equal(padded[:, y : y + 16, x : x + 16], after)
        ]
        assert len(shifts) == 1
        all_shifts.update(shifts)
    assert len(all_shifts) > 10


def test_cutout_hides_at_most_a_quarter(images):
    cut = diff_augment(images, make_rng(0), ("cutout",))
    hidden = (cut == 0).float().mean((1, 2, 3))
    assert hidden.max() == 0.25
    assert hidden.min() > 0.02


def test_colour_is_linear_in_the_image_its_grey_version_and_a_constant(images):
    coloured = diff_augment(images, make_rng(0), ("color",)).flatten(1)
    for before, after in zip(images, coloured, strict=True):
        grey = before.mean(0, keepdim=True).expand(3, -1, -1)
        constant = torch.ones(3 * 16 * 16)
        terms = torch.stack([before.flatten(), grey.flatten(), constant], dim=1)
        weights = torch.linalg.lstsq(terms, after[:, None]).solution
        assert (terms @ weights - after[:, None]).abs().max() < 1e-4
        contrast = (weights[0] + weights[1]).item()
        saturation = weights[0].item() / contrast
        assert 0.5 <= contrast <= 1.5
        assert -1e-4 <= saturation <= 2


def test_gradients_reach_every_image(images):
    images.requires_grad_(True)
    diff_augment(images, make_rng(0), EVERYTHING).sum().backward()
    assert images.grad.abs().flatten(1).sum(1).min() > 0
