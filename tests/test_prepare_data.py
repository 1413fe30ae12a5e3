"""prepare_data.py: what it writes (always the same bytes), what it refuses, what `check` finds."""

import csv
import gzip
import hashlib
import itertools
import json
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import prepare_data
from common.class_folders import find_domain, match_classes, split_by_class
from common.cli import UserError
from common.data import load_digits
from common.rng import make_rng
from preparation import archive, layout, mnist, public
from preparation.synthetic import digits, looks, object_domains, objects, scenes
from prepare_data import Check, Download, Import, Noises, Synthetic

TINY = {
    "mnistm": (20, 10),
    "svhn": (20, 10),
    "usps": (20, 10),
    "face": (3, 2),
    "clip_zeroshot": (24, 13),
    "objects": 26,
    "captioned": (12, 3),
    "num_workers": 1,
}


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file under `folder` and the hash of its bytes."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def read_rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "hw2_data"
    prepare_data.main(Synthetic(folder, **TINY))
    return folder


@pytest.fixture
def copied(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "hw2_data"))


def test_layout(made):
    for domain, mode in (("mnistm", "RGB"), ("svhn", "RGB"), ("usps", "L")):
        folder = made / "digits" / domain
        names = []
        for split, count in (("train", 20), ("val", 10)):
            header, *rows = read_rows(folder / f"{split}.csv")
            assert header == ["image_name", "label"]
            assert [row[1] for row in rows].count("7") == count // 10
            assert sorted(int(row[1]) for row in rows) == sorted(list(range(10)) * (count // 10))
            names += [row[0] for row in rows]
        assert names == [f"{k:05d}.png" for k in range(30)]
        assert sorted(path.name for path in (folder / "data").iterdir()) == names
        with Image.open(folder / "data" / "00000.png") as image:
            assert (image.size, image.mode) == ((28, 28), mode)
    assert [path.name for path in sorted((made / "face" / "val").iterdir())] == [
        "00003.png",
        "00004.png",
    ]
    assert not list(made.glob(".partial*"))


def test_attribute_file_is_celebas(made):
    lines = (made / "face" / "list_attr_celeba.txt").read_text().splitlines()
    assert lines[0] == "5"
    assert lines[1].split() == list(looks.ATTRIBUTES)
    assert len(looks.ATTRIBUTES) == 10
    rows = [line.split() for line in lines[2:]]
    assert [row[0] for row in rows] == [f"{k:05d}.png" for k in range(5)]
    assert all(len(row) == 11 and set(row[1:]) <= {"1", "-1"} for row in rows)


def test_same_seed_same_bytes_whatever_the_workers(made, tmp_path):
    prepare_data.main(Synthetic(tmp_path / "again", **TINY | {"num_workers": 2}))
    assert fingerprint(tmp_path / "again") == fingerprint(made)


def test_image_depends_on_its_own_index_only(made):
    """Image 25 is image 5 of val: the same without those before it, another with another seed."""
    for domain in digits.DOMAINS:
        image, label = digits.draw_digit(0, domain, "val", 5)
        with Image.open(made / "digits" / domain / "data" / "00025.png") as stored:
            assert np.array_equal(np.asarray(stored), image)
        assert read_rows(made / "digits" / domain / "val.csv")[6] == ["00025.png", str(label)]
        assert not np.array_equal(digits.draw_digit(1, domain, "val", 5)[0], image)


def test_objects_and_their_names(made):
    folder = made / "clip_zeroshot"
    assert json.loads((folder / "id2label.json").read_text()) == {
        str(k): name for k, name in enumerate(objects.NAMES)
    }
    assert len(objects.NAMES) == 12
    for split, count in (("train", 24), ("val", 13)):
        names = {path.name for path in (folder / split).iterdir()}
        assert names == {f"{k % 12}_{k // 12}.png" for k in range(count)}
    with Image.open(folder / "val" / "0_1.png") as stored:
        assert np.array_equal(np.asarray(stored), objects.draw_object(0, "val", 0, 1))
    assert not np.array_equal(
        objects.draw_object(0, "val", 0, 1), objects.draw_object(1, "val", 0, 1)
    )


def test_held_out_colours():
    """Two of eight colours for each class, and each colour is held out of some classes only."""
    held = np.array(
        [[objects.is_held_out(label, colour) for colour in range(8)] for label in range(12)]
    )
    assert (held.sum(1) == 2).all()
    assert (held.any(0) & ~held.all(0)).all()
    named = [
        {colour for k, colour in enumerate(objects.COLOURS) if held[label, k]}
        for label in range(12)
    ]
    assert (named[0], named[1], named[11]) == (
        {"red", "green"},
        {"orange", "teal"},
        {"green", "purple"},
    )


def test_training_shows_no_pair_that_validation_shows(monkeypatch):
    class SeenError(Exception):
        pass

    def see(colour, outline, rng):
        raise SeenError(colour)

    monkeypatch.setattr(objects, "Pen", see)
    for label in range(12):
        shown = {"train": set(), "val": set()}
        for split, k in itertools.product(shown, range(60)):
            with pytest.raises(SeenError) as seen:
                objects.draw_object(0, split, label, k)
            distance = np.abs(
                np.array(list(objects.COLOURS.values())) - np.array(seen.value.args[0])
            ).max(1)
            assert distance.min() <= 18  # the most that a colour is changed
            shown[split].add(int(distance.argmin()))
        held = {colour for colour in range(8) if objects.is_held_out(label, colour)}
        assert shown == {"train": set(range(8)) - held, "val": held}


def test_objects_are_drawn_in_their_main_colour():
    """More than a sixth of each object has it, whatever the details.

    The object leaves room for a background.
    """
    for label in range(12):
        pen = objects.Pen((1, 2, 3), 3, np.random.default_rng(0))
        objects.DRAWERS[objects.NAMES[label]](pen)
        pixels = np.asarray(pen.image)
        assert (pixels[..., :3][pixels[..., 3] > 0] == (1, 2, 3)).all(-1).mean() > 1 / 6
        assert (
            0.1 < (pixels[..., 3] > 0).mean() < 0.8
        )  # of the canvas; the rest lets the background through


# Objects in two domains


def test_object_domains_have_office_homes_layout(made):
    folder = made / "objects"
    assert sorted(path.name for path in folder.iterdir()) == ["clipart", "made.json", "shaded"]
    clipart = find_domain(folder / "clipart", "--source-dir")
    shaded = find_domain(folder / "shaded", "--target-dir")
    match_classes(clipart, shaded, "equal")
    for domain in (clipart, shaded):
        assert domain.classes == list(objects.NAMES)
        assert torch.bincount(domain.labels).tolist() == [3, 3] + [2] * 10  # they take turns
        assert sorted(path.name for path in (domain.folder / "apple").iterdir()) == [
            "00000.png",
            "00001.png",
            "00002.png",
        ]
        train, val = split_by_class(domain)
        assert (len(train), len(val)) == (14, 12)
    with Image.open(folder / "shaded" / "car" / "00002.png") as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")


def test_an_object_depends_on_seed_domain_and_number_only(made):
    for domain in object_domains.DOMAINS:
        image, label = object_domains.draw_object(0, domain, 25)
        assert label == 1
        with Image.open(made / "objects" / domain / "car" / "00002.png") as stored:
            assert np.array_equal(np.asarray(stored), image)
        assert not np.array_equal(object_domains.draw_object(1, domain, 25)[0], image)
        assert not np.array_equal(object_domains.draw_object(0, domain, 37)[0], image)


def test_clip_art_has_black_lines_on_a_plain_ground_and_photographs_do_not():
    """Clip art has a few flat colours, one of which fills the ground. A photograph has none."""
    shares = {domain: [] for domain in object_domains.DOMAINS}
    for domain, k in itertools.product(object_domains.DOMAINS, range(36)):
        image, _ = object_domains.draw_object(0, domain, k)
        colours, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
        shares[domain].append(counts.max() / counts.sum())
        flat = colours[counts >= 205]  # one pixel in twenty
        black = np.mean((image < 60).all(-1))
        if domain == "clipart":
            assert 1 <= len(flat) <= 4  # ground, white, one colour, black
            assert 0.02 < black < 0.4
        else:
            assert len(flat) == 0
    assert min(shares["clipart"]) > 0.3
    assert max(shares["shaded"]) < 0.05


def test_another_version_of_the_objects_leaves_other_parts_alone(copied, monkeypatch, capsys):
    """And so does a folder that was drawn before there were objects."""
    before = fingerprint(copied)
    made = json.loads((copied / "digits" / "usps" / "made.json").read_text())
    assert made == {"made_by": "synthetic", "version": 2, "seed": 0, "train": 20, "val": 10}
    monkeypatch.setitem(prepare_data.NEWER_VERSIONS, "objects", 99)
    with pytest.raises(UserError, match="objects holds other data"):
        prepare_data.main(Synthetic(copied, **TINY))
    monkeypatch.undo()
    shutil.rmtree(copied / "objects")
    prepare_data.main(Synthetic(copied, **TINY))
    out = capsys.readouterr().out
    assert "drawing 52 images" in out
    assert "objects: 26 clipart, 26 shaded" in out
    assert fingerprint(copied) == before


def test_noises(made, tmp_path):
    noises = [
        torch.load(path, weights_only=True) for path in sorted((made / "face" / "noise").iterdir())
    ]
    assert [(tuple(noise.shape), noise.dtype) for noise in noises] == [
        ((1, 3, 64, 64), torch.float32)
    ] * 10
    together = torch.cat(noises)
    assert abs(together.mean()) < 0.015  # five standard errors of 122,880 numbers
    assert abs(together.std() - 1) < 0.015
    layout.write_noises(tmp_path / "seed 1", 1)
    others = [torch.load(tmp_path / "seed 1" / f"{k:02d}.pt", weights_only=True) for k in range(10)]
    correlations = torch.corrcoef(torch.stack([noise.flatten() for noise in noises + others]))
    assert (
        correlations - torch.eye(20)
    ).abs().max() < 0.05  # 5.5 standard errors: seed and number change the noise
    expected = torch.randn(1, 3, 64, 64, generator=make_rng(0, "face noise", 7))
    assert torch.equal(noises[7], expected)


def test_noises_alone_are_those_of_the_layout(made, tmp_path):
    """Byte for byte; the same command again is fine."""
    folder = tmp_path / "a b" / "noises"
    for _ in range(2):
        prepare_data.main(Noises(folder))
        assert fingerprint(folder) == fingerprint(made / "face" / "noise")


def test_noises_of_other_numbers_and_sizes(tmp_path):
    prepare_data.main(Noises(tmp_path, count=101, size=4, seed=5))
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == [f"{k:03d}.pt" for k in range(101)]
    noises = torch.cat([torch.load(path, weights_only=True) for path in files])
    assert noises.shape == (101, 3, 4, 4)
    assert torch.equal(
        noises[100:], torch.randn(1, 3, 4, 4, generator=make_rng(5, "face noise", 100))
    )
    before = fingerprint(tmp_path)
    for other in (
        Noises(tmp_path, count=102, size=4, seed=6),
        Noises(tmp_path, count=10, size=4, seed=5),
    ):
        with pytest.raises(UserError, match=r"000\.pt is another noise"):
            prepare_data.main(other)
    with pytest.raises(UserError, match="--count 0"):
        prepare_data.main(Noises(tmp_path, count=0))
    assert fingerprint(tmp_path) == before


def test_base_digits_stand_in_one_place_only():
    labels = digits.base_digits()[1]
    split = digits.split_base(labels, seed=0)
    assert set(split) == {
        ("mnistm", "train"),
        ("mnistm", "val"),
        ("usps", "train"),
        ("usps", "val"),
    }
    everything = np.concatenate(list(split.values()))
    assert np.array_equal(np.sort(everything), np.arange(1797))  # every one once
    for part in split.values():
        assert np.bincount(labels[part], minlength=10).min() >= 10
    pool = digits.base_pool(0, "usps", "val")
    assert all((labels[indices] == digit).all() for digit, indices in enumerate(pool))
    assert set(np.concatenate(pool)) == set(split["usps", "val"])


def test_mnistm_formula():
    rng = np.random.default_rng(0)
    digit, patch = (
        rng.integers(0, 256, (28, 28), np.uint8),
        rng.integers(0, 256, (28, 28, 3), np.uint8),
    )
    blend = digits.mnistm_blend(digit, patch)
    expected = [
        [[abs(int(patch[i, j, c]) - int(digit[i, j])) for c in range(3)] for j in range(28)]
        for i in range(28)
    ]
    assert blend.dtype == np.uint8
    assert blend.tolist() == expected


def test_finished_data_is_left_alone(made, capsys):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    prepare_data.main(Synthetic(made, **TINY))
    assert "already finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_other_data_is_not_overwritten(made, tmp_path):
    before = fingerprint(made)
    with pytest.raises(UserError, match=r"digits/mnistm holds other data.*'seed': 0"):
        prepare_data.main(Synthetic(made, seed=1, **TINY))
    assert fingerprint(made) == before
    (tmp_path / "digits" / "svhn").mkdir(parents=True)
    (tmp_path / "digits" / "svhn" / "mine.txt").touch()
    with pytest.raises(UserError, match="digits/svhn holds other data"):
        prepare_data.main(Synthetic(tmp_path, **TINY))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["mine.txt"]


def test_interrupted_run_leaves_no_half_part(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "draw_svhn", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare_data.main(Synthetic(tmp_path, **TINY))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits"]
    assert [path.name for path in (tmp_path / "digits").iterdir()] == [
        "mnistm"
    ]  # whole: it was finished before
    monkeypatch.undo()
    prepare_data.main(Synthetic(tmp_path, **TINY))
    prepare_data.main(Check(tmp_path))


def test_settings_that_make_no_sense_are_refused(tmp_path, error_of, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = Synthetic | Download | Import | Check | Noises
    for words, message in (
        ("synthetic --usps 20 0", "--usps 20 0: each split needs between 1 and 1,000,000 images"),
        ("synthetic --clip-zeroshot 0 5", "--clip-zeroshot 0 5: each split needs"),
        ("synthetic --mnistm 1000001 5", "--mnistm 1000001 5: each split needs"),
        ("synthetic --objects 23", "--objects 23: each domain needs between 24 and 1,000,000"),
        ("synthetic --seed -1", "--seed -1: must be between 0 and 4,294,967,295"),
        ("synthetic --num-workers 0", "--num-workers 0: must be between 1 and 1024"),
        ("download", "either --year 2022|2023|2024 or --public"),
        ("download --year 2022 --public", "either --year 2022|2023|2024 or --public"),
        ("download --public --archive a.zip", "--archive: goes with --year, not with --public"),
        ("download --public", "--textures: needed for MNIST-M"),
        ("download --public --parts face face", "--parts face face: names something twice"),
        ("download --public --parts", "--parts: needs at least one value"),
        ("import", "import: {digits,faces}"),
        ("import digits", "SOURCE"),
        ("import digits nowhere", "nowhere: no such file or folder"),
        ("import faces nowhere", "nowhere: no such folder"),
        ("import faces . --domain x", "--domain x: is for digits, not faces"),
        ("import digits . --domain a/b", "--domain a/b: must be the name of a folder in digits/"),
        ("import digits . --smallest 9", "--smallest: is for faces, not digits"),
        ("import digits . --val 1", "--val 1: must be above 0 and below 1"),
        ("noises --output-dir x --count 0", "--count 0: must be at least 1"),
        ("noises --output-dir x --size 0", "--size 0: must be between 1 and 4096"),
        ("noises --output-dir x --size 99999", "--size 99999: must be between 1 and 4096"),
    ):
        assert message in error_of(commands, prepare_data.main, *words.split())
    assert not list(tmp_path.iterdir())


# Check


def complaints(folder: Path, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        prepare_data.main(Check(folder))
    assert stop.value.code == 1
    out = capsys.readouterr().out
    return "\n".join(line for line in out.splitlines() if line.startswith("wrong:"))


def test_check_of_good_data(made, capsys):
    prepare_data.main(Check(made))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all fine"
    assert ["digits/usps", "train", "20", "28x28", "grey", "0-9,", "2-2", "each"] in [
        line.split() for line in lines
    ]
    assert ["face", "val", "2", "64x64", "RGB"] in [line.split() for line in lines]
    assert ["face", "noise", "10", "64x64"] in [line.split() for line in lines]
    assert "clip_zeroshot train 24 64x64 RGB 12 classes, 2-2 each" in [
        " ".join(line.split()) for line in lines
    ]
    assert "clip_zeroshot val 13 64x64 RGB 12 classes, 1-2 each" in [
        " ".join(line.split()) for line in lines
    ]


def test_check_names_each_fault(copied, capsys):
    domain = copied / "digits" / "mnistm"
    (domain / "val.csv").write_text("image_name,label\n00020.png,12\n")
    broken = domain / "data" / "00003.png"
    broken.write_bytes(broken.read_bytes()[:200])
    (copied / "digits" / "svhn" / "train.csv").unlink()
    rows = (copied / "digits" / "usps" / "val.csv").read_text()
    (copied / "digits" / "usps" / "val.csv").write_text(rows + rows.splitlines()[1] + "\n")
    (copied / "digits" / "usps" / "data" / "00001.png").unlink()
    Image.new("RGB", (32, 32)).save(copied / "face" / "train" / "00001.png")
    text = complaints(copied, capsys)
    assert "1 broken images: 00003.png" in text
    assert "label '12' of 00020.png" in text
    assert "svhn/train.csv: missing" in text
    assert "00001.png is not in" in text
    assert "1 images are not 64x64: 00001.png" in text
    assert "usps/val.csv: 1 images are listed twice: 00020.png" in text
    assert len(text.splitlines()) == 6


def test_check_knows_the_other_years(copied, capsys):
    """2024 has no val.csv; 2023 and 2024 have noises, images to reproduce, and a zero-shot set."""
    (copied / "digits" / "mnistm" / "val.csv").unlink()
    for folder in ("face/noise", "clip_zeroshot"):
        shutil.rmtree(copied / folder)
    for folder in ("face/noise", "face/GT", "clip_zeroshot/val"):
        (copied / folder).mkdir(parents=True)
    torch.save(torch.zeros(1, 3, 256, 256), copied / "face" / "noise" / "00.pt")
    Image.new("RGB", (256, 256)).save(copied / "face" / "GT" / "00.png")
    Image.new("RGB", (32, 32)).save(copied / "clip_zeroshot" / "val" / "4_17.png")
    (copied / "clip_zeroshot" / "id2label.json").write_text(json.dumps({"4": "bicycle"}))
    prepare_data.main(Check(copied))
    out = capsys.readouterr().out
    assert "no val.csv; train.csv is split 80/20" in out
    assert "10 images are listed in no csv" in out
    assert "1 classes" in out
    torch.save(torch.zeros(3), copied / "face" / "noise" / "00.pt")
    (copied / "face" / "UNet.pt").write_bytes(b"not weights")
    Image.new("RGB", (32, 32)).save(copied / "clip_zeroshot" / "val" / "5_1.png")
    text = complaints(copied, capsys)
    assert "00.pt: shape (3,)" in text
    assert "UNet.pt: not a whole file" in text
    assert "1 names without a known class id: 5_1.png" in text


def test_check_of_objects_and_noises(copied, capsys):
    """Images of many sizes are fine; broken ones, unknown classes and bad noises are not."""
    folder, noise = copied / "clip_zeroshot", copied / "face" / "noise"
    for k in range(8):
        Image.new("RGB", (20 + k, 30)).save(folder / "val" / f"3_{100 + k}.png")
    prepare_data.main(Check(copied))
    assert "clip_zeroshot val 21 64x64 20x30 21x30 and 6 more RGB 12 classes, 1-9 each" in " ".join(
        capsys.readouterr().out.split()
    )
    broken = folder / "train" / "4_1.png"
    broken.write_bytes(broken.read_bytes()[:100])
    (folder / "val" / "3_100.png").rename(folder / "val" / "12_100.png")
    (folder / "val" / "3_101.png").rename(folder / "val" / "house.png")
    (noise / "04.pt").write_bytes((noise / "04.pt").read_bytes()[:500])
    (noise / "05.pt").write_bytes(b"q")  # a pickle that asks for a value which it does not contain
    text = complaints(copied, capsys)
    assert "train: 1 broken images: 4_1.png" in text
    assert "val: 2 names without a known class id: 12_100.png, house.png" in text
    assert "04.pt: not a whole tensor" in text
    assert "05.pt: not a whole tensor" in text
    assert len(text.splitlines()) == 4
    for content in ("[1, 2]", "null", "7", "{"):
        (folder / "id2label.json").write_text(content)
        assert "id2label.json: missing, or not a json dictionary" in complaints(copied, capsys)
    (folder / "id2label.json").unlink()
    assert "id2label.json: missing" in complaints(copied, capsys)


def test_check_of_object_domains(copied, capsys):
    prepare_data.main(Check(copied))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "objects clipart 26 64x64 RGB 12 classes, 2-3 each" in lines
    assert "objects shaded 26 64x64 RGB 12 classes, 2-3 each" in lines
    broken = copied / "objects" / "shaded" / "fish" / "00001.png"
    broken.write_bytes(broken.read_bytes()[:100])
    for file in (copied / "objects" / "clipart" / "key").iterdir():
        file.unlink()
    text = complaints(copied, capsys)
    assert "objects/clipart/key: contains no image" in text
    assert "objects/shaded: 1 broken images: fish/00001.png" in text
    assert len(text.splitlines()) == 2


def test_check_of_captions_and_concepts(copied, capsys):
    prepare_data.main(Check(copied))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "captioned train 12 64x64 RGB 12 different captions" in lines
    assert "textual_inversion 0 5 64x64 RGB <new1>, 2 prompts" in lines
    (copied / "captioned" / "train" / "00003.png").unlink()
    (copied / "captioned" / "val" / "metadata.jsonl").write_text("{}")
    shutil.rmtree(copied / "textual_inversion" / "1")
    text = complaints(copied, capsys)
    assert "metadata.jsonl names 1 images that are not there: 00003.png" in text
    assert "metadata.jsonl, line 1: not of the form" in text
    assert "textual_inversion/1: no such folder" in text
    assert len(text.splitlines()) == 3
    (copied / "textual_inversion" / "input.json").write_text("[]")
    assert "input.json: not of the form" in complaints(copied, capsys)


def test_captions_stand_beside_their_images(made):
    folder = made / "captioned" / "train"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == [f"{k:05d}.png" for k in range(12)]
    image, text, scene = scenes.draw_captioned(0, "train", 5)
    assert rows[5] == {"file_name": "00005.png", "text": text, **scene.traits()}
    with Image.open(folder / "00005.png") as stored:
        assert np.array_equal(np.asarray(stored), image)


def test_captions_of_another_mix_are_other_data(made, tmp_path):
    drawn = tmp_path / "hw2_data"
    args = Synthetic(drawn, **TINY, creatures=1.0, trait_weight=50)
    prepare_data.main(args)
    lines = (drawn / "captioned" / "train" / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    mix = scenes.Mix(creatures=1.0, trait_weight=50)
    expected = [scenes.captioned_scene(0, "train", k, mix)[1] for k in range(12)]
    assert [row["text"] for row in rows] == expected
    assert all(row["subject"] == scenes.CREATURE for row in rows)
    usual = (made / "captioned" / "train" / "metadata.jsonl").read_text().splitlines()
    assert not all(json.loads(line)["subject"] == scenes.CREATURE for line in usual)
    prepare_data.main(args)  # finished
    with pytest.raises(UserError, match=r"captioned holds other data.*'trait_weight': 50"):
        prepare_data.main(Synthetic(drawn, **TINY, creatures=1.0))
    with pytest.raises(UserError, match="captioned holds other data"):
        prepare_data.main(Synthetic(drawn, **TINY))


def test_check_of_missing_and_empty_folders(tmp_path, capsys):
    with pytest.raises(UserError, match="no such folder"):
        prepare_data.main(Check(tmp_path / "nowhere"))
    assert "holds none of digits/, face/" in complaints(tmp_path, capsys)


# Import

IMAGES = "train-images-idx3-ubyte"
LABELS = "t10k-labels-idx1-ubyte"


def write_idx(path: Path, magic: int, values: np.ndarray) -> None:
    header = struct.pack(f">{1 + values.ndim}I", magic, *values.shape)
    content = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def idx_files(tmp_path, monkeypatch) -> Path:
    """A small MNIST of 30 and 20 images; the training images and the test labels are not packed."""
    monkeypatch.setattr(mnist, "COUNTS", {"train": 30, "t10k": 20})
    folder = tmp_path / "MNIST raw"
    folder.mkdir()
    rng = np.random.default_rng(0)
    write_idx(folder / IMAGES, 2051, rng.integers(0, 256, (30, 28, 28)))
    write_idx(folder / "train-labels-idx1-ubyte.gz", 2049, np.arange(30) % 10)
    write_idx(folder / "t10k-images-idx3-ubyte.gz", 2051, rng.integers(0, 256, (20, 28, 28)))
    write_idx(folder / LABELS, 2049, np.arange(20) // 2)
    return folder


def test_mnist_is_imported(idx_files, tmp_path, capsys):
    out = tmp_path / "hw2_data"
    prepare_data.main(Import("digits", idx_files, out))
    assert capsys.readouterr().out == "digits/mnist: 30 train, 20 val\n"
    pixels = np.random.default_rng(0).integers(0, 256, (50, 28, 28))
    first = 0
    for split, labels in (("train", np.arange(30) % 10), ("val", np.arange(20) // 2)):
        images = load_digits(out, "mnist", split)
        assert images.labels.tolist() == labels.tolist()
        assert images.names == [f"{first + k:05d}.png" for k in range(len(labels))]
        for channel in range(3):
            assert np.array_equal(images.pixels[:, channel], pixels[first : first + len(labels)])
        first += len(labels)
    with Image.open(out / "digits" / "mnist" / "data" / "00049.png") as image:
        assert (image.size, image.mode) == ((28, 28), "L")
    prepare_data.main(Check(out))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        "digits/mnist train 30 28x28 grey 0-9, 3-3 each",
        "digits/mnist val 20 28x28 grey 0-9, 2-2 each",
        "all fine",
    ]


def test_mnist_is_imported_once(idx_files, tmp_path, capsys):
    """Packing makes no difference; other files are other data."""
    out = tmp_path / "hw2_data"
    prepare_data.main(Import("digits", idx_files, out))
    before = fingerprint(out)
    content = (idx_files / IMAGES).read_bytes()
    (idx_files / f"{IMAGES}.gz").write_bytes(gzip.compress(content))
    (idx_files / IMAGES).unlink()
    prepare_data.main(Import("digits", idx_files, out))
    assert "digits/mnist: already finished" in capsys.readouterr().out
    write_idx(idx_files / IMAGES, 2051, np.zeros((30, 28, 28)))
    with pytest.raises(UserError, match=r"digits/mnist holds other data .*; remove it first"):
        prepare_data.main(Import("digits", idx_files, out))
    assert fingerprint(out) == before


@pytest.mark.parametrize(
    ("name", "magic", "shape", "message"),
    [
        (IMAGES, 2049, (30, 28, 28), "starts with 2049, 30, 28, 28 instead of 2051, 30, 28, 28"),
        (IMAGES, 2051, (29, 28, 28), "starts with 2051, 29, 28, 28 instead of 2051, 30, 28, 28"),
        (IMAGES, 2051, (30, 32, 32), "starts with 2051, 30, 32, 32 instead of 2051, 30, 28, 28"),
        (LABELS, 2051, (20,), "starts with 2051, 20 instead of 2049, 20 (magic number and shape"),
        (LABELS, 2049, (30,), "starts with 2049, 30 instead of 2049, 20"),
    ],
)
def test_an_idx_file_of_something_else_is_named(idx_files, tmp_path, name, magic, shape, message):
    write_idx(idx_files / name, magic, np.zeros(shape))
    with pytest.raises(UserError) as error:
        prepare_data.main(Import("digits", idx_files, tmp_path / "out"))
    assert str(error.value).startswith(f"{idx_files / name}: {message}")
    assert not (tmp_path / "out").exists()


def test_a_damaged_idx_file_is_named(idx_files, tmp_path):
    def error() -> str:
        with pytest.raises(UserError) as caught:
            prepare_data.main(Import("digits", idx_files, tmp_path / "out"))
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    labels = idx_files / LABELS
    whole = labels.read_bytes()
    labels.write_bytes(whole[:-1])
    assert error() == f"{labels}: holds 19 bytes after its header instead of 20"
    labels.write_bytes(whole[:7])
    assert error() == f"{labels}: is too short for an idx file"
    labels.write_bytes(whole[:-1] + b"\x0a")
    assert error() == f"{labels}: has the label 10"
    labels.write_bytes(whole)
    packed = idx_files / "train-labels-idx1-ubyte.gz"
    content = packed.read_bytes()
    for damaged in (content[:-9], b"<html>", content[:-8] + b"????" + content[-4:]):
        packed.write_bytes(damaged)
        assert error() == f"{packed}: not a whole gzip file"
    packed.write_bytes(content[:15] + b"????" + content[19:])  # it is unpacked to something else
    assert error().startswith(f"{packed}: starts with 2049, ")
    packed.unlink()
    assert error() == (
        f"{idx_files}: has neither train-labels-idx1-ubyte nor train-labels-idx1-ubyte.gz"
    )


# Download


@pytest.mark.parametrize(
    ("count", "train", "val"),
    [(70_000, 44_800, 11_200), (99_289, 63_544, 15_887), (9_298, 5_950, 1_488)],
)
def test_public_split_has_the_courses_counts(count, train, val):
    first, second = public.split_rows(count, seed=0)
    assert (len(first), len(second)) == (train, val)
    assert len(set(first) | set(second)) == train + val


def test_public_mnistm_is_the_formula_on_a_patch_of_a_photo():
    photo = np.random.default_rng(1).integers(0, 256, (30, 29, 3), np.uint8)
    images = np.random.default_rng(2).integers(0, 3, (5, 28, 28), np.uint8)
    two = list(public.make_mnistm(images, np.array([4, 1]), [photo], seed=3))
    alone = list(public.make_mnistm(images, np.array([1]), [photo], seed=3))
    assert np.array_equal(two[1], alone[0])  # a row's patch is its own
    patches = [photo[top : top + 28, left : left + 28] for top in range(3) for left in range(2)]
    expected = [
        np.where(images[4][..., None] > 0, 255 - patch, patch) for patch in patches
    ]  # |patch − 255|, |patch − 0|
    assert sum(np.array_equal(two[0], other) for other in expected) == 1


def test_public_parts_are_assembled(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    raw = {"mnistm": (28, 28), "svhn": (32, 32, 3), "usps": (16, 16)}
    made_of = {
        domain: rng.integers(0, 256, (50, *shape), np.uint8) for domain, shape in raw.items()
    }
    labels = np.arange(50) % 10
    monkeypatch.setattr(public, "load_digits", lambda domain, raw_dir: (made_of[domain], labels))
    files = [tmp_path / f"{k:06d}.jpg" for k in range(5)]
    for k, file in enumerate(files):
        Image.new("RGB", (178, 218), (40 * k, 0, 0)).save(file)
    names, values = ["Bald", "Young"], np.array([[1, -1]] * 5)
    monkeypatch.setattr(public, "load_celeba", lambda raw_dir, seed: (files, names, values))
    monkeypatch.setattr(public, "COURSE_FACES", (3, 2))
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 40), (10, 20, 30)).save(tmp_path / "photos" / "plain.png")
    out = tmp_path / "hw2_data"
    prepare_data.main(Download(public=True, data_dir=out, textures=tmp_path / "photos"))
    prepare_data.main(Check(out))
    row = public.split_rows(50, 0)[0][0]
    with Image.open(out / "digits" / "mnistm" / "data" / "00000.png") as image:
        expected = np.where(made_of["mnistm"][row][..., None] > 0, (245, 235, 225), (10, 20, 30))
        assert np.array_equal(np.asarray(image), expected)
    assert read_rows(out / "digits" / "usps" / "train.csv")[1] == ["00000.png", str(row % 10)]
    assert [
        len(read_rows(out / "digits" / "svhn" / f"{split}.csv")) - 1 for split in ("train", "val")
    ] == [32, 8]
    assert [path.name for path in sorted((out / "face" / "val").iterdir())] == [
        "00003.png",
        "00004.png",
    ]
    assert (out / "face" / "list_attr_celeba.txt").read_text().splitlines()[2].split() == [
        "00000.png",
        "1",
        "-1",
    ]


def test_face_crop_is_the_centre():
    picture = np.zeros((218, 178, 3), np.uint8)
    picture[29:189, 9:169] = 200  # the central 160x160
    face = public.crop_face(Image.fromarray(picture))
    assert face.shape == (64, 64, 3)
    assert (face == 200).all()


def test_public_without_its_sources_says_what_to_fetch(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--textures: needed .*BSDS500"):
        prepare_data.main(Download(public=True, data_dir=tmp_path / "out"))
    import gdown

    def fail(*_, **__):
        raise RuntimeError("host not found\nTraceback")

    monkeypatch.setattr(gdown, "download", fail)
    options = {"data_dir": tmp_path / "out", "raw_dir": tmp_path / "raw"}
    with pytest.raises(
        UserError,
        match=r"usps: the download failed \(host not found\); .* put usps.bz2 .* --raw-dir",
    ):
        prepare_data.main(Download(public=True, parts=("digits/usps",), **options))
    assert not list((tmp_path / "out").iterdir())


def make_zip(path: Path, content: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)
    return path


def test_archive_is_unpacked_and_merged(made, tmp_path):
    content = {f"hw2_data/{name}": (made / name).read_bytes() for name in fingerprint(made)}
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("ours")
    file = make_zip(
        tmp_path / "a.zip", content | {"hw2_data/README.md": b"theirs", "__MACOSX/x": b""}
    )
    prepare_data.main(Download(year=2022, data_dir=out, archive=file))
    ours = {"README.md", archive.RECORD}
    assert {k: v for k, v in fingerprint(out).items() if k not in ours} == fingerprint(made)
    assert (out / "README.md").read_text() == "ours"
    second = make_zip(tmp_path / "b.zip", {"hw2_data/face/noise/10.pt": b"noise"})
    prepare_data.main(Download(year=2023, data_dir=out, archive=second))  # beside 2022's faces
    assert (out / "face" / "noise" / "10.pt").read_bytes() == b"noise"
    with pytest.raises(UserError, match=r"is there already"):
        prepare_data.main(Download(year=2022, data_dir=out, archive=file))


def test_hostile_and_broken_archives_are_refused(tmp_path):
    out = tmp_path / "deep" / "out"
    hostile = make_zip(tmp_path / "hostile.zip", {"digits/a.png": b"a", "../../evil.txt": b"evil"})
    with pytest.raises(UserError, match=r"'../../evil.txt' points out"):
        prepare_data.main(Download(year=2022, data_dir=out, archive=hostile))
    whole = make_zip(tmp_path / "whole.zip", {"digits/a.png": b"a" * 99}).read_bytes()
    (tmp_path / "flipped.zip").write_bytes(whole.replace(b"aaa", b"aba"))
    with pytest.raises(UserError, match=r"'digits/a.png' is broken"):
        prepare_data.main(Download(year=2022, data_dir=out, archive=tmp_path / "flipped.zip"))
    (tmp_path / "cut.zip").write_bytes(whole[:50])
    with pytest.raises(UserError, match="not a whole zip"):
        prepare_data.main(Download(year=2022, data_dir=out, archive=tmp_path / "cut.zip"))
    with pytest.raises(UserError, match="holds neither digits/ nor face/"):
        prepare_data.main(
            Download(year=2022, data_dir=out, archive=make_zip(tmp_path / "c.zip", {"x": b""}))
        )
    assert not list(out.iterdir())
    assert not list(tmp_path.rglob("evil.txt"))


def test_failed_download_is_one_line(tmp_path, monkeypatch):
    import gdown

    def fail(*_, **__):
        raise OSError("quota exceeded\nsecond line")

    monkeypatch.setattr(gdown, "download", fail)
    with pytest.raises(UserError) as error:
        prepare_data.main(Download(year=2024, data_dir=tmp_path))
    assert "quota exceeded" in str(error.value)
    assert archive.DRIVE_IDS[2024] in str(error.value)
    assert "--archive" in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    (tmp_path / "digits" / "usps").mkdir(parents=True)
    (tmp_path / "digits" / "usps" / "made.json").touch()
    with pytest.raises(
        UserError, match=r"holds other data .*usps\); choose a new folder"
    ):  # before a long download
        prepare_data.main(Download(year=2024, data_dir=tmp_path))


def test_download_needs_one_source(tmp_path):
    for arguments in ({}, {"year": 2022, "public": True}):
        with pytest.raises(UserError, match=r"either --year .* or --public"):
            prepare_data.main(Download(data_dir=tmp_path, **arguments))


def test_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        prepare_data.main(Synthetic(tmp_path / "file" / "hw2_data", **TINY))


def test_drawn_faces_are_faces():
    """The graders' detector finds exactly one face in most of them.

    98 % of 200 was measured; 24 of 30 leaves room for chance.
    """
    import dlib

    from preparation.synthetic.faces import draw_face

    detector = dlib.get_frontal_face_detector()
    pictures = [draw_face(np.random.default_rng([7, k]))[0] for k in range(30)]
    assert sum(len(detector(picture, 1)) == 1 for picture in pictures) >= 24
