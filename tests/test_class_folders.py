"""common/class_folders.py: domains, the classes of two of them, and a line for each fault."""

import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import data
from common.class_folders import find_domain, load_domain, match_classes, split_by_class
from common.cli import UserError


def write_classes(folder: Path, counts: dict[str, int], shade: int = 0) -> Path:
    """Write plain 8x8 images CLASS/0.png, CLASS/1.png, …; image k has the brightness shade + k."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for k in range(count):
            Image.new("L", (8, 8), shade + k).save(folder / name / f"{k}.png")
    return folder


def names_of(paths: list[Path]) -> list[str]:
    return [f"{path.parent.name}/{path.name}" for path in paths]


# Listing


def test_classes_are_the_sorted_folder_names(tmp_path):
    write_classes(tmp_path, {"mug": 1, "Bike": 2, "alarm clock": 1})
    domain = find_domain(tmp_path, "--source-dir")
    assert domain.folder == tmp_path
    assert domain.classes == ["Bike", "alarm clock", "mug"]  # capital letters come first
    assert names_of(domain.paths) == ["Bike/0.png", "Bike/1.png", "alarm clock/0.png", "mug/0.png"]
    assert domain.labels.tolist() == [0, 0, 1, 2]
    assert domain.labels.dtype == torch.int64


def test_sixty_five_classes(tmp_path):
    names = [f"class {k}" for k in range(65)]
    write_classes(tmp_path, dict.fromkeys(names, 1))
    domain = find_domain(tmp_path, "--source-dir")
    assert domain.classes == sorted(names)
    assert domain.labels.tolist() == list(range(65))
    assert [path.parent.name for path in domain.paths] == sorted(names)


def test_hidden_folders_and_stray_files_are_ignored(tmp_path):
    write_classes(tmp_path, {"mug": 2, "bike": 1, ".cache": 3})
    (tmp_path / "made.json").write_text("{}")
    (tmp_path / "cover.png").write_bytes(b"not an image")
    (tmp_path / "mug/Thumbs.db").write_bytes(b"x")
    (tmp_path / "mug/.hidden.png").write_bytes(b"x")
    domain = find_domain(tmp_path, "--source-dir")
    assert domain.classes == ["bike", "mug"]
    assert names_of(domain.paths) == ["bike/0.png", "mug/0.png", "mug/1.png"]


def test_symlinked_folders_and_unicode_names(tmp_path):
    write_classes(tmp_path / "elsewhere", {"x": 2})
    domain_folder = write_classes(tmp_path / "Österreich", {"自転車": 1, "Küche": 1})
    (domain_folder / "linked mug").symlink_to(tmp_path / "elsewhere/x")
    domain = find_domain(domain_folder, "--source-dir")
    assert domain.classes == ["Küche", "linked mug", "自転車"]
    assert domain.labels.tolist() == [0, 1, 1, 2]
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        images = load_domain(domain, 8, cache)
        assert images.pixels[:, 0, 0, 0].tolist() == [0, 0, 1, 0]
        assert images.labels.tolist() == [0, 1, 1, 2]


def test_an_accent_may_be_stored_in_two_ways(tmp_path):
    composed, apart = (unicodedata.normalize(form, "Küche") for form in ("NFC", "NFD"))
    assert composed != apart
    one = find_domain(write_classes(tmp_path / "one", {composed: 1, "mug": 1}), "--source-dir")
    two = find_domain(write_classes(tmp_path / "two", {apart: 1, "mug": 1}), "--target-dir")
    assert one.classes == two.classes == [composed, "mug"]
    assert match_classes(one, two, "equal")[1].paths == two.paths


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (None, "--source-dir {folder}: no such folder"),
        ({}, "--source-dir {folder}: has no class folder; expected {folder}/CLASS/*.jpg"),
        ({"mug": 2, "bike": 0}, "{folder}/bike: contains no image"),
        (
            {"mug": 1},
            "--source-dir {folder}: has a single image, {folder}/mug/0.png; "
            "at least two are needed",
        ),
    ],
)
def test_a_bad_domain_is_one_line(tmp_path, counts, message):
    folder = tmp_path / "Real World"
    if counts is not None:
        folder.mkdir()
        write_classes(folder, counts)
        Image.new("L", (8, 8)).save(folder / "stray.png")
    with pytest.raises(UserError) as error:
        find_domain(folder, "--source-dir")
    assert str(error.value) == message.format(folder=folder)


# The classes of two domains


@pytest.fixture
def domains(tmp_path):
    """`domains(source counts, target counts)`: two domains in the folders S and T."""

    def make(*counts: dict[str, int]):
        return tuple(
            find_domain(write_classes(tmp_path / name, part, shade), f"--{name}")
            for name, part, shade in zip("ST", counts, (0, 100), strict=True)
        )

    return make


@pytest.mark.parametrize("classes", ["equal", "shared"])
def test_equal_classes_stay_as_they_are(domains, classes):
    source, target = domains({"bike": 2, "mug": 1}, {"mug": 1, "bike": 3})
    matched = match_classes(source, target, classes)
    for before, after in zip((source, target), matched, strict=True):
        assert after.paths == before.paths
        assert after.labels.tolist() == before.labels.tolist()
        assert after.classes == ["bike", "mug"]


def test_shared_classes_get_the_same_labels(domains):
    source, target = domains({"a": 1, "b": 2, "d": 1, "e": 1}, {"e": 2, "d": 1, "c": 3, "b": 1})
    source, target = match_classes(source, target, "shared")
    assert source.classes == target.classes == ["b", "d", "e"]
    assert names_of(source.paths) == ["b/0.png", "b/1.png", "d/0.png", "e/0.png"]
    assert source.labels.tolist() == [0, 0, 1, 2]
    assert names_of(target.paths) == ["b/0.png", "d/0.png", "e/0.png", "e/1.png"]
    assert target.labels.tolist() == [0, 1, 2, 2]
    assert load_domain(target, 8).pixels[:, 0, 0, 0].tolist() == [100, 100, 100, 101]


def test_unequal_classes_are_told_apart_in_one_line(domains, tmp_path):
    source, target = domains({"a": 1, "b": 2, "d": 1, "e": 1}, {"e": 2, "d": 1, "c": 3, "b": 1})
    with pytest.raises(UserError) as error:
        match_classes(source, target, "equal")
    assert str(error.value) == (
        f"--classes equal: {tmp_path}/S lacks c; {tmp_path}/T lacks a; "
        "--classes shared takes the 3 that both have"
    )
    shutil.rmtree(tmp_path / "S/d")
    smaller = find_domain(tmp_path / "S", "--source-dir")
    with pytest.raises(UserError, match=r"equal: \S+/S lacks c, d; \S+/T lacks a; --classes"):
        match_classes(smaller, target, "equal")
    shutil.rmtree(tmp_path / "T/c")
    shutil.rmtree(tmp_path / "S/a")
    smaller = find_domain(tmp_path / "S", "--source-dir")
    target = find_domain(tmp_path / "T", "--target-dir")
    with pytest.raises(UserError) as error:  # only one side lacks something
        match_classes(smaller, target, "equal")
    assert str(error.value) == (
        f"--classes equal: {tmp_path}/S lacks d; --classes shared takes the 2 that both have"
    )


@pytest.mark.parametrize(
    ("counts", "classes", "message"),
    [
        (({"a": 2, "b": 1}, {"c": 2, "b": 1}), "shared", "share fewer than two classes (b)"),
        (({"a": 2}, {"c": 2}), "shared", "share fewer than two classes (none)"),
        (({"a": 2}, {"a": 2}), "equal", "share fewer than two classes (a)"),
        (({"a": 2, "b": 1}, {"c": 2, "b": 1}), "equal", "S lacks c; {folder}/T lacks a"),
    ],
)
def test_fewer_than_two_shared_classes_are_one_line(domains, tmp_path, counts, classes, message):
    with pytest.raises(UserError) as error:
        match_classes(*domains(*counts), classes)
    assert str(error.value).startswith(f"--classes {classes}: {tmp_path}/S ")
    assert str(error.value).endswith(message.format(folder=tmp_path))
    assert "\n" not in str(error.value)


# Training and validation


def test_the_second_of_every_five_images_is_for_validation(tmp_path):
    counts = {"a": 1, "b": 2, "c": 5, "d": 8}
    domain = find_domain(write_classes(tmp_path, counts), "--source-dir")
    train, val = split_by_class(domain)
    assert train.dtype == val.dtype == torch.int64
    assert names_of([domain.paths[row] for row in val]) == [
        *("b/1.png", "c/1.png", "d/1.png", "d/6.png"),
    ]
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(16))
    assert train.tolist() == sorted(train.tolist())
    assert domain.labels[train].unique().tolist() == [0, 1, 2, 3]


def test_the_split_of_a_class_does_not_depend_on_the_others(domains):
    source, target = domains({"a": 3, "b": 7, "c": 6}, {"b": 1, "c": 1})
    shared, _ = match_classes(source, target, "shared")

    def names(domain):
        paths = [domain.paths[row] for row in split_by_class(domain)[1]]
        return [name for name in names_of(paths) if not name.startswith("a/")]

    assert names(shared) == names(source) == ["b/1.png", "b/6.png", "c/1.png"]


def test_classes_of_one_image_each_cannot_be_split(tmp_path):
    domain = find_domain(write_classes(tmp_path, {"a": 1, "b": 1}), "--source-dir")
    with pytest.raises(UserError) as error:
        split_by_class(domain)
    assert str(error.value) == (
        f"{tmp_path}: no class has two images, so there is none for validation"
    )


# Decoding


def test_images_of_all_kinds_become_rgb_of_one_size(tmp_path):
    """Grey, palette, CMYK, RGBA; the shorter side is resized and the middle is kept."""
    folder = tmp_path / "Art" / "mug"
    folder.mkdir(parents=True)
    wide = Image.new("RGB", (96, 32), (0, 0, 0))
    wide.paste((250, 200, 10), (32, 0, 64, 32))  # the middle square
    wide.save(folder / "0.png")
    wide.transpose(Image.Transpose.ROTATE_90).save(folder / "1.png")
    Image.new("L", (40, 40), 77).save(folder / "2.jpg")
    colour = Image.new("RGB", (40, 50), (10, 200, 30))
    colour.quantize(4).save(folder / "3.png")
    colour.convert("CMYK").save(folder / "4.JPEG", quality=95)
    colour.convert("RGBA").save(folder / "5.png")
    images = load_domain(find_domain(tmp_path / "Art", "--source-dir"), 16)
    assert images.pixels.shape == (6, 3, 16, 16)
    assert images.pixels.dtype == torch.uint8
    assert images.names == ["0.png", "1.png", "2.jpg", "3.png", "4.JPEG", "5.png"]
    middle = images.pixels[:, :, 8, 8].tolist()
    assert middle[:3] == [[250, 200, 10], [250, 200, 10], [77, 77, 77]]
    assert middle[3] == middle[5] == [10, 200, 30]
    assert np.abs(np.array(middle[4]) - (10, 200, 30)).max() <= 4  # JPEG is lossy
    assert (images.pixels[:2, 0, 2:-2, 2:-2] == 250).all()


def test_a_truncated_photograph_is_named(tmp_path):
    folder = write_classes(tmp_path, {"bike": 1, "mug": 1})
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(photo).save(folder / "bike/photo.jpg")
    content = (folder / "bike/photo.jpg").read_bytes()
    (folder / "bike/photo.jpg").write_bytes(content[: len(content) // 2])
    (folder / "mug/1.jpg").write_text("<html>404</html>")
    domain = find_domain(folder, "--source-dir")
    with pytest.raises(UserError) as error:
        load_domain(domain, 8, tmp_path / "cache")
    assert str(error.value) == f"{folder}/bike/photo.jpg: not a whole image"
    (folder / "bike/photo.jpg").unlink()
    with pytest.raises(UserError, match=r"mug/1.jpg: not a whole image"):
        load_domain(find_domain(folder, "--source-dir"), 8)


def test_the_cache_knows_files_of_all_classes(tmp_path, monkeypatch):
    """Files of the same name in two classes; a change in any class is seen."""
    folder = write_classes(tmp_path / "S", {"a": 2, "b": 2, "c": 1})
    Image.new("L", (8, 8), 50).save(folder / "b/0.png")
    cache = tmp_path / "cache"

    def load(size: int = 8) -> torch.Tensor:
        return load_domain(find_domain(folder, "--source-dir"), size, cache).pixels[:, 0, 0, 0]

    assert load().tolist() == [0, 1, 50, 1, 0]
    with monkeypatch.context() as patch:
        patch.setattr(data, "decode_images", lambda *_: pytest.fail("decoded a second time"))
        assert load().tolist() == [0, 1, 50, 1, 0]
    Image.new("L", (8, 8), 60).save(folder / "c/0.png")
    assert load().tolist() == [0, 1, 50, 1, 60]
    (folder / "a/1.png").rename(folder / "b/2.png")
    assert load().tolist() == [0, 50, 1, 1, 60]
    assert load(size=4).tolist() == [0, 50, 1, 1, 60]
    assert len(list(cache.iterdir())) == 4
