"""prepare_data.py import: digits and faces in the formats in which people have them."""

import bz2
import csv
import gzip
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image

import prepare_data
from common.cli import UserError
from common.data import load_digits
from preparation import own_digits, own_faces
from preparation.own_faces import Box, Options, Place, cut_out, cut_out_face, place_of_eyes
from preparation.synthetic.faces import draw_face
from prepare_data import Check, Import
from tests.test_prepare_data import write_idx

RNG = np.random.default_rng(0)
OPTIONS = Options(val=0.2, smallest=40, several="largest", seed=0)

# Digits


def run_import(source: Path, out: Path, **options) -> None:
    prepare_data.main(Import("digits", source, out, **options))


def pixels_of(folder: Path, domain: str, split: str) -> tuple[np.ndarray, list[int]]:
    """The images (n, height, width, 3) and labels that training would see."""
    images = load_digits(folder, domain, split)
    assert images.labels is not None
    return images.pixels.numpy().transpose(0, 2, 3, 1), images.labels.tolist()


def test_idx_files_of_another_data_set(tmp_path, capsys):
    """Fashion-MNIST has MNIST's names; any counts are fine then, and both splits are taken."""
    source = tmp_path / "fashion"
    source.mkdir()
    images = RNG.integers(0, 256, (7, 28, 28))
    write_idx(source / "train-images-idx3-ubyte.gz", 2051, images)
    write_idx(source / "train-labels-idx1-ubyte", 2049, np.arange(7))
    write_idx(source / "t10k-images-idx3-ubyte", 2051, images[:3])
    write_idx(source / "t10k-images-idx3-ubyte.gz", 2051, images[:3])
    write_idx(source / "t10k-labels-idx1-ubyte.gz", 2049, np.arange(3))
    run_import(source, tmp_path / "out", domain="fashion")
    assert capsys.readouterr().out == "digits/fashion: 7 train, 3 val\n"
    pixels, labels = pixels_of(tmp_path / "out", "fashion", "train")
    assert np.array_equal(pixels[..., 0], images)
    assert labels == list(range(7))
    assert pixels_of(tmp_path / "out", "fashion", "val")[1] == [0, 1, 2]


def test_one_idx_file_is_split_by_the_seed(tmp_path):
    images = RNG.integers(0, 256, (20, 28, 28))
    write_idx(tmp_path / "kuzushiji-images-idx3-ubyte", 2051, images)
    write_idx(tmp_path / "kuzushiji-labels-idx1-ubyte.gz", 2049, np.arange(20) % 10)
    source = tmp_path / "kuzushiji-images-idx3-ubyte"
    for seed, out in ((0, "a"), (0, "b"), (1, "c")):
        run_import(source, tmp_path / out, domain="kuzushiji", val=0.25, seed=seed)
    train, train_labels = pixels_of(tmp_path / "a", "kuzushiji", "train")
    val, val_labels = pixels_of(tmp_path / "a", "kuzushiji", "val")
    assert (len(train), len(val)) == (15, 5)
    both = [image.tobytes() for image in (*train[..., 0], *val[..., 0])]
    assert sorted(both) == sorted(image.astype(np.uint8).tobytes() for image in images)
    for image, label in zip((*train, *val), train_labels + val_labels, strict=True):
        number = next(k for k in range(20) if np.array_equal(images[k], image[..., 0]))
        assert label == number % 10
    assert np.array_equal(val, pixels_of(tmp_path / "b", "kuzushiji", "val")[0])
    assert not np.array_equal(val, pixels_of(tmp_path / "c", "kuzushiji", "val")[0])


def test_emnist_is_turned_upright(tmp_path, capsys):
    """Its files store rows and columns exchanged, and have the split in the middle of the name."""
    images = RNG.integers(0, 256, (4, 28, 28))
    for split, count in (("train", 4), ("test", 2)):
        write_idx(tmp_path / f"emnist-digits-{split}-images-idx3-ubyte", 2051, images[:count])
        write_idx(tmp_path / f"emnist-digits-{split}-labels-idx1-ubyte", 2049, np.arange(count))
    run_import(tmp_path, tmp_path / "out", domain="emnist")
    assert capsys.readouterr().out == "digits/emnist: 4 train, 2 val\n"
    pixels, _ = pixels_of(tmp_path / "out", "emnist", "train")
    assert np.array_equal(pixels[..., 0], images.transpose(0, 2, 1))


def test_svhn_s_mat_files(tmp_path, capsys):
    """Label 10 is the digit 0, and the images become 28x28 in colour."""
    images = RNG.integers(0, 256, (32, 32, 3, 4)).astype(np.uint8)
    labels = np.array([[1], [10], [3], [9]], np.uint8)
    scipy.io.savemat(tmp_path / "train_32x32.mat", {"X": images, "y": labels})
    scipy.io.savemat(tmp_path / "test_32x32.mat", {"X": images[..., :2], "y": labels[:2]})
    scipy.io.savemat(tmp_path / "extra_32x32.mat", {"X": images, "y": labels})
    run_import(tmp_path, tmp_path / "out")
    assert capsys.readouterr().out == "digits/svhn: 4 train, 2 val\n"
    pixels, found = pixels_of(tmp_path / "out", "svhn", "train")
    assert found == [1, 0, 3, 9]
    small = Image.fromarray(images[..., 2]).resize((28, 28), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels[2], np.asarray(small))


def usps_lines(images: np.ndarray, labels: list[int]) -> bytes:
    """LIBSVM's text: labels from 1, pixels from -1 to 1, numbered from 1."""
    lines = []
    for image, label in zip(images, labels, strict=True):
        cells = [f"{k}:{value / 127.5 - 1:.6f}" for k, value in enumerate(image.ravel(), 1)]
        lines.append(f"{label + 1} {' '.join(cells)}\n")
    return "".join(lines).encode()


def test_usps_as_bz2(tmp_path, capsys):
    images = RNG.integers(0, 256, (6, 16, 16))
    labels = [9, 0, 4, 4, 2, 1]
    (tmp_path / "usps.bz2").write_bytes(bz2.compress(usps_lines(images, labels)))
    (tmp_path / "usps.t.bz2").write_bytes(bz2.compress(usps_lines(images[:2], labels[:2])))
    found = own_digits.read_digits(tmp_path)
    assert found.domain == "usps"
    assert np.array_equal(found.train.images, images)
    assert found.train.labels.tolist() == labels
    assert found.val is not None
    assert found.val.labels.tolist() == [9, 0]
    run_import(tmp_path, tmp_path / "out")
    prepare_data.main(Check(tmp_path / "out"))
    assert "all fine" in capsys.readouterr().out


def test_usps_as_h5(tmp_path):
    h5py = pytest.importorskip("h5py", reason="reading .h5 needs h5py, which is optional")
    images = RNG.integers(0, 256, (6, 256))
    with h5py.File(tmp_path / "usps.h5", "w") as file:
        for split, count in (("train", 6), ("test", 2)):
            group = file.create_group(split)
            group["data"] = images[:count] / np.float32(255)
            group["target"] = np.arange(count)
    found = own_digits.read_digits(tmp_path / "usps.h5")
    assert np.array_equal(found.train.images.reshape(6, 256), images)
    assert found.val is not None
    assert found.val.labels.tolist() == [0, 1]
    (tmp_path / "usps.h5").write_bytes(b"not hdf5")
    with pytest.raises(UserError, match=r"usps\.h5: not an \.h5 file of USPS"):
        own_digits.read_digits(tmp_path / "usps.h5")


def test_h5_without_its_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "usps.h5").write_bytes(b"")
    with pytest.raises(UserError) as error:
        own_digits.read_digits(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'usps.h5'}: reading .h5 needs a package: pip install h5py; "
        "usps.bz2 of LIBSVM needs none"
    )


@pytest.mark.parametrize("inner", ["", "train"])
def test_a_folder_for_each_digit(tmp_path, inner):
    source = tmp_path / "images"
    for digit, count in ((0, 3), (7, 2)):
        for number in range(count):
            path = source / inner / str(digit) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (40, 40), 10 * digit + number).save(path)
    if inner:
        (source / "Test" / "5").mkdir(parents=True)
        Image.new("RGB", (28, 28), (1, 2, 3)).save(source / "Test" / "5" / "a.png")
    run_import(source, tmp_path / "out", domain="mine", val=0.4)
    pixels, labels = pixels_of(tmp_path / "out", "mine", "train")
    val, val_labels = pixels_of(tmp_path / "out", "mine", "val")
    if inner:
        assert labels == [0, 0, 0, 7, 7]
        assert pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 70, 71]
        assert (val_labels, val[0, 0, 0].tolist()) == ([5], [1, 2, 3])
    else:
        assert sorted(labels + val_labels) == [0, 0, 0, 7, 7]
        assert len(val_labels) == 2


def test_what_is_wrong_with_digits_is_named(tmp_path):
    def error(content: dict, **options) -> str:
        folder = tmp_path / "source"
        folder.mkdir()
        for name, values in content.items():
            if name.endswith(".mat"):
                scipy.io.savemat(folder / name, values)
            else:
                (folder / name).write_bytes(values)
        with pytest.raises(UserError) as caught:
            run_import(folder, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        text = str(caught.value)
        assert "\n" not in text
        return text.replace(f"{folder}", "DIR")

    images = np.zeros((32, 32, 3, 2), np.uint8)
    good = {"X": images, "y": [[1], [2]]}
    header = np.array([2051, 10, 28, 28], ">u4").tobytes()
    assert "no known file of digits" in error({"notes.txt": b""})
    assert error({"a.mat": {"X": images}}) == (
        "DIR/a.mat: has no X and y, as SVHN's train_32x32.mat has"
    )
    assert error({"a.mat": {**good, "y": [[1]]}}) == "DIR/a.mat: has 2 images and 1 labels"
    assert error({"a.mat": {**good, "y": [[1], [11]]}}) == "DIR/a.mat: has the label 11"
    assert error({"a.mat": {**good, "y": ["a", "b"]}}) == "DIR/a.mat: its labels are no numbers"
    assert error({"a.mat": {**good, "X": images[..., 0]}}).startswith("DIR/a.mat: X must be uint8")
    assert error({"a.mat": good, "b.mat": good}) == (
        "DIR: has several files of digits (a.mat, b.mat); name one of them"
    )
    assert error({"a.bz2": b"BZh9"}).startswith("DIR/a.bz2: not a whole LIBSVM file (")
    two_pixels = bz2.compress(b"1 1:0.5 2:3.5\n")
    assert error({"a.bz2": two_pixels}) == "DIR/a.bz2: its pixels are not in the range of USPS"
    name = "x-images-idx3-ubyte"
    labels = "DIR/x-images-idx3-ubyte: its labels are missing (x-labels-idx1-ubyte, as it is or as"
    assert error({name: header}, domain="x").startswith(labels)
    assert error({name: header[:9]}) == f"DIR/{name}: is too short for an idx file"
    assert "starts with 2049 instead of 2051" in error({name: b"\0\0\x08\x01" + header})
    huge = np.array([2051, 2**31, 2**31, 2**31], ">u4").tobytes()
    assert "its header says 2,147,483,648 images" in error({f"{name}.gz": gzip.compress(huge)})
    broken = error({"a.mat": good, "val.png": b""}, val=0.1)
    assert broken == "--val 0.1: of 2 digits, one split would be empty"


def test_digits_without_a_name_need_one(tmp_path):
    (tmp_path / "source" / "3").mkdir(parents=True)
    Image.new("L", (28, 28)).save(tmp_path / "source" / "3" / "a.png")
    with pytest.raises(UserError, match=r"source: --domain must give them a name"):
        run_import(tmp_path / "source", tmp_path / "out")


# Faces


def photograph(size: int, width: int, height: int, angle: float = 0) -> Image.Image:
    """A grey photograph with a drawn face of `size` pixels in its middle, turned by an angle."""
    pixels, _ = draw_face(np.random.default_rng(0))
    face = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
    photo = Image.new("RGB", (width, height), (120, 130, 140))
    photo.paste(face, ((width - size) // 2, (height - size) // 2))
    return photo.rotate(angle, Image.Resampling.BICUBIC)


def test_the_whole_of_a_small_photograph_stays_as_it_is():
    photo = Image.fromarray(RNG.integers(0, 256, (64, 64, 3)).astype(np.uint8))
    place = Place(x=10, y=20, u=10, v=20, scale=1, angle=0)
    assert np.array_equal(np.asarray(cut_out(photo, place)), np.asarray(photo))


def test_beyond_the_edges_the_last_pixels_are_repeated():
    photo = Image.new("RGB", (64, 64), (200, 10, 30))
    place = Place(x=0, y=0, u=32, v=32, scale=1, angle=0.3)
    assert own_faces.missing_share(photo, place) > 0.5
    assert np.array_equal(np.asarray(cut_out(photo, place)), np.asarray(photo))


def test_places_are_turned_and_scaled():
    place = Place(x=200, y=300, u=50, v=50, scale=2, angle=math.pi / 2)
    assert place.in_photo(50, 50) == (200, 300)
    assert place.in_photo(60, 50) == pytest.approx((200, 320))
    assert place.in_photo(50, 60) == pytest.approx((180, 300))


@pytest.mark.parametrize("degrees", [0, 25, -60])
def test_eyes_get_the_place_that_celeba_s_have(degrees):
    """Whatever the size and the angle of the face in the photograph."""
    angle = math.radians(degrees)
    left = np.array([310.0, 205.0])
    right = left + 77 * np.array([math.cos(angle), math.sin(angle)])
    place = place_of_eyes(left, right)
    assert place.scale == pytest.approx(5)  # CelebA's eyes are 38.5 pixels apart, 15.4 of 64
    assert place.in_photo(24.2, 32.8) == pytest.approx(tuple(left))
    assert place.in_photo(39.6, 32.8) == pytest.approx(tuple(right))


def test_without_landmarks_the_box_gets_its_place(tmp_path):
    path = tmp_path / "a.png"
    photograph(220, 500, 400).save(path)
    face = cut_out_face(path, OPTIONS, None)
    assert isinstance(face, np.ndarray)
    assert (face.shape, face.dtype) == ((64, 64, 3), np.uint8)
    large = Image.fromarray(face).resize((320, 320), Image.Resampling.BICUBIC)
    (box,) = own_faces.find_faces(large)
    assert (box.left + box.width / 2) / 5 == pytest.approx(own_faces.BOX_CENTRE[0], abs=4)
    assert (box.top + box.width / 2) / 5 == pytest.approx(own_faces.BOX_CENTRE[1], abs=4)
    assert box.width / 5 == pytest.approx(own_faces.BOX_WIDTH, rel=0.15)


def test_landmarks_turn_a_face_upright(tmp_path, monkeypatch):
    """The predictor's five points: two corners of each eye, and the nose."""
    find_eyes = find_eyes_with([(110, 100), (120, 110), (70, 60), (80, 70), (90, 110)], monkeypatch)
    left, right = find_eyes(Image.new("RGB", (200, 200)), Box(50, 40, 90))
    assert left.tolist() == [75, 65]
    assert right.tolist() == [115, 105]
    assert math.degrees(place_of_eyes(left, right).angle) == pytest.approx(45)


def find_eyes_with(points: list[tuple[int, int]], monkeypatch) -> own_faces.FindEyes:
    """What `eye_finder` returns where the package is there and dlib sees these points."""
    import dlib

    class Predictor:
        def __init__(self, path: str) -> None:
            assert path == "/there/models/shape_predictor_5_face_landmarks.dat"

        def __call__(self, pixels: np.ndarray, box: Any) -> Any:
            assert (box.left(), box.top(), box.right(), box.bottom()) == (50, 40, 140, 130)
            parts = [SimpleNamespace(x=x, y=y) for x, y in points]
            return SimpleNamespace(parts=lambda: parts)

    spec = SimpleNamespace(origin="/there/__init__.py")
    monkeypatch.setattr(own_faces.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(dlib, "shape_predictor", Predictor)
    find_eyes = own_faces.eye_finder()
    assert find_eyes is not None
    return find_eyes


def test_photographs_without_a_fitting_face_are_listed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(own_faces.importlib.util, "find_spec", lambda name: None)
    source = tmp_path / "photos"
    (source / "more").mkdir(parents=True)
    photograph(220, 400, 300).save(source / "a.png")
    photograph(200, 300, 300).save(source / "more" / "b.jpg")
    photograph(240, 300, 400).save(source / "c.png")
    photograph(48, 300, 300).save(source / "small.png")
    Image.new("RGB", (300, 200), "blue").save(source / "sea.png")
    both = Image.new("RGB", (700, 300), (120, 130, 140))
    both.paste(photograph(220, 350, 300), (0, 0))
    both.paste(photograph(180, 350, 300), (350, 0))
    both.save(source / "two.png")
    photograph(220, 400, 300).crop((122, 103, 271, 252)).save(source / "edge.png")
    (source / "text.png").write_text("not an image")
    Path(os.fsdecode(os.fsencode(source) + b"/\xff.png")).write_text("its name is no UTF-8")
    os.mkfifo(source / "pipe.png")
    (source / "link.png").symlink_to("nowhere.png")
    command = Import("faces", source, tmp_path / "out", several="drop", num_workers=1)
    prepare_data.main(command)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "faces that lean are not turned upright: that needs a package, "
        "pip install face_recognition_models"
    )
    assert lines[1] == "face: 2 train, 1 val of 11 photographs"
    assert sorted(lines[2:]) == [
        "  left out, cannot be read: 4",
        "  left out, face at the edge: 1",
        "  left out, face too small: 1",
        "  left out, no face: 1",
        "  left out, several faces: 1",
    ]
    with (tmp_path / "out" / "face" / "left_out.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["photograph", "reason"]
    assert [str(source / "small.png"), "face too small"] in rows
    assert len(rows) == 9
    assert len(list((tmp_path / "out" / "face").glob("*/*.png"))) == 3
    prepare_data.main(command)
    assert capsys.readouterr().out.splitlines()[1:] == ["face: already finished, nothing to do"]
    (source / "sea.png").unlink()
    with pytest.raises(UserError, match="face holds other data"):
        prepare_data.main(command)
    Image.new("RGB", (300, 200), "blue").save(source / "sea.png")
    prepare_data.main(command)
    assert "already finished" in capsys.readouterr().out
    monkeypatch.setattr(own_faces, "eye_finder", lambda: find_no_eyes)  # the package is there now
    with pytest.raises(UserError, match="face holds other data"):
        prepare_data.main(command)


def find_no_eyes(photo: Image.Image, box: Box) -> tuple[np.ndarray, np.ndarray]:
    raise AssertionError("nothing is cut out")


def test_a_large_photograph_is_not_copied_around_a_face():
    """Only the part around the face is padded."""
    photo = Image.new("RGB", (4_000, 3_000), (9, 8, 7))
    place = Place(x=100, y=200, u=31, v=40, scale=10, angle=0.5)
    part, moved = own_faces.surroundings(photo, place)
    assert max(part.size) < 1_000
    assert moved.in_photo(31, 40)[0] - moved.in_photo(0, 0)[0] == pytest.approx(
        place.in_photo(31, 40)[0] - place.in_photo(0, 0)[0]
    )
    assert (np.asarray(cut_out(photo, place)) == (9, 8, 7)).all()


def test_fewer_than_two_faces_are_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (300, 200), "blue").save(tmp_path / "photos" / "sea.png")
    with pytest.raises(UserError, match="1 photographs: 0 faces found; two are needed"):
        prepare_data.main(Import("faces", tmp_path / "photos", tmp_path / "out", num_workers=1))
    assert not (tmp_path / "out" / "face").exists()
