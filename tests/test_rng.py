"""common/rng.py: random numbers that depend on a key alone."""

import pytest
import torch

from common.rng import ImageNoise, derive_seed, make_rng


def test_seeds_depend_on_the_whole_key_and_nothing_else():
    assert derive_seed(0, "a", 1) == derive_seed(0, "a", 1)
    keys = [(0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "b", 1), (0, "a1")]
    seeds = {derive_seed(*key) for key in keys}
    assert len(seeds) == len(keys)

    first, second, again = (torch.rand(3, generator=make_rng(0, "x", k)) for k in (1, 2, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_noise_depends_on_the_seed_and_the_image_number_alone():
    shape = (1, 2, 2)
    four = ImageNoise(0, range(4), shape)
    two = ImageNoise(0, [2, 7], shape)
    for _ in range(3):
        assert torch.equal(four()[2], two()[0])
    other_seed = ImageNoise(1, range(4), shape)
    assert not torch.equal(other_seed(), ImageNoise(0, range(4), shape)())


def test_noise_is_standard_normal():
    noise = ImageNoise(0, range(4), (1, 2, 2))
    draws = torch.stack([noise() for _ in range(50)])
    assert draws.std().item() == pytest.approx(1, abs=0.1)
