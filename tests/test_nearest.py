"""evaluate.py nearest: copies of training images are found, others are not taken for copies."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import UserError
from common.data import decode_images
from evaluate import Nearest, main
from metrics import nearest
from tests.conftest import noise, save_images


@pytest.fixture
def folders(tmp_path):
    """Training images, and others that are not among them."""
    train = save_images(tmp_path / "train", noise(12, size=16, seed=0))
    real = save_images(tmp_path / "real", noise(8, size=16, seed=1))
    return train, real


def pixels_of(train, real, generated, **options) -> dict:
    """The result with the pixels as features."""
    return main(Nearest(generated, train, real, features="pixels", device="cpu", **options))


def test_copies_are_found_and_drawn(folders, tmp_path, capsys, monkeypatch):
    """Also mirrored ones, and with another batch size."""
    shown = []
    draw = nearest.save_labelled

    def see(*arguments):
        shown.append(arguments)
        draw(*arguments)

    monkeypatch.setattr(nearest, "save_labelled", see)
    train, real = folders
    copies = noise(12, size=16, seed=0)[[7, 3, 5]]
    copies[1] = copies[1, :, ::-1]
    generated = save_images(tmp_path / "copies", copies)
    out = tmp_path / "out"
    result = pixels_of(train, real, generated, output_dir=out, batch_size=2)
    assert result["nearer_percent"] == 100
    assert result["generated"] == {"images": 3, "median": 0, "min": 0}
    assert result["real"]["images"] == 8
    assert result["real"]["min"] > 1
    assert result["training_images"] == 12
    assert json.loads((out / "result.json").read_text())["score"] == "nearest"
    assert "nearer than a real one in 100.0 % of all pairs" in capsys.readouterr().out
    with Image.open(out / "nearest.png") as image:
        assert image.width > image.height / 2
    drawn, names = shown[0][0], shown[0][2]
    assert names == ["generated", "training", "real, not trained on", "training"]
    ours, theirs = drawn[:3], drawn[3:6]
    assert all(
        torch.equal(mine, other) or torch.equal(mine.flip(2), other)
        for mine, other in zip(ours, theirs, strict=True)
    )
    assert not any(torch.equal(a, b) for a, b in zip(drawn[6:9], drawn[9:], strict=True))
    again = pixels_of(train, real, generated)
    assert again["generated"] == result["generated"]
    assert again["real"] == pytest.approx(result["real"])


def test_the_nearest_image_is_the_one_of_a_loop(folders, tmp_path):
    """And the rows name it."""
    train, real = folders
    embedding = nearest.open_features("pixels", torch.device("cpu"))
    train_files, files = sorted(train.iterdir()), sorted(real.iterdir())
    theirs = embedding.embed(decode_images(train_files)).double()
    found = nearest.find_neighbours(real, files, theirs, embedding, 3, None)
    for number, file in enumerate(files):
        pixels = decode_images([file])
        distances = []
        for turned in (pixels, pixels.flip(3)):
            ours = embedding.embed(turned).double()[0]
            distances.append([float((ours - row).square().sum().sqrt()) for row in theirs])
        expected = np.min(distances, 0)
        assert found.distances[number].item() == pytest.approx(expected.min())
        assert found.rows[number].item() == expected.argmin()


def test_real_images_are_as_near_as_real_ones(folders, tmp_path):
    train, real = folders
    others = save_images(tmp_path / "others", noise(8, size=16, seed=2))
    assert 20 < pixels_of(train, real, others)["nearer_percent"] < 80
    same = save_images(tmp_path / "same", noise(8, size=16, seed=1))
    assert pixels_of(train, real, same)["nearer_percent"] == 50  # equal ones count half


def test_images_of_another_size_are_drawn_too(folders, tmp_path):
    train, real = folders
    large = save_images(tmp_path / "large", noise(3, size=32, seed=3))
    pixels_of(train, real, large, output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "nearest.png").exists()
    assert (tmp_path / "out" / "result.json").exists()


def test_images_of_another_kind_are_farther(folders, tmp_path):
    train, real = folders
    white = save_images(tmp_path / "white", np.full((4, 16, 16, 3), 255, np.uint8))
    assert pixels_of(train, real, white)["nearer_percent"] == 0


def test_share_counts_pairs():
    generated = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    real = torch.tensor([2.0, 3.0], dtype=torch.float64)
    # 1 is nearer than both, 2 than one and as near as one, 5 than none.
    assert nearest.share_nearer(generated, real) == pytest.approx(100 * 3.5 / 6)


def test_nearest_names_what_is_wrong(folders, tmp_path):
    train, real = folders
    with pytest.raises(UserError) as error:
        Nearest(train, train, real)
    assert str(error.value) == (
        f"GENERATED {train}: shares images with the training images {train}; "
        "give a folder of other images"
    )
    with pytest.raises(UserError) as error:
        Nearest(real, train, tmp_path / "x" / ".." / "train")
    assert "shares images with the training images" in str(error.value)
    with pytest.raises(UserError, match="shares images"):
        Nearest(tmp_path / "other", tmp_path, real)  # REAL lies in TRAIN
    with pytest.raises(UserError, match="none: no such folder"):
        pixels_of(train, tmp_path / "none", real)
    with pytest.raises(UserError, match="lies in"):
        pixels_of(train, real, real, output_dir=real / "out")
