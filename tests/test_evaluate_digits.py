"""evaluate.py digits, train-classifier and mse.

Analytic cases, the graders' reading of a folder, resume, errors.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoints import load_net
from common.cli import UserError, run_cli
from common.data import Images, load_digits
from common.device import make_accelerator
from evaluate import Digits, Faces, Fid, Mse, TrainClassifier, main
from metrics import digits
from metrics.digits import diversity, evaluate_digits, vendi_score
from models.digit_classifier import DigitClassifier
from models.network import Network


class Corner(Network):
    """Reads the digit k from the brightness 25 k of the corner, as tests/conftest.py draws it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"net": "corner", "arguments": {}}
        self.register_buffer("levels", 25.0 * torch.arange(10) / 127.5 - 1)

    def features(self, images):
        return images.mean(1)[:, ::3, ::3].flatten(1)

    def forward(self, images):
        return -(images[:, :, :14, :14].mean((1, 2, 3))[:, None] - self.levels).square()


@pytest.fixture
def corner(tmp_path, monkeypatch) -> Path:
    """The file of a classifier that is right about what the corner of an image says."""
    monkeypatch.setattr(digits, "NETS", {"corner": Corner})
    torch.save({"state_dict": Corner().state_dict()}, tmp_path / "corner.pth")
    return tmp_path / "corner.pth"


@pytest.fixture
def course(tmp_path) -> Path:
    """A file like the course's Classifier.pth, with random weights."""
    torch.manual_seed(0)
    torch.save(
        {"state_dict": DigitClassifier().state_dict(), "epoch": 3}, tmp_path / "Classifier.pth"
    )
    return tmp_path / "Classifier.pth"


def noise(count: int, size: int = 28, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def save_named(folder: Path, images: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        Image.fromarray(image).save(folder / name)
    return folder


def save_digits(folder: Path, pairs: list[tuple[int, int]]) -> Path:
    """Images of (digit of the name, digit that the corner says)."""
    images = noise(len(pairs))
    for image, (_, seen) in zip(images, pairs, strict=True):
        image[:14, :14] = 25 * seen
    names = (f"{digit}_{number:03d}.png" for number, (digit, _) in enumerate(pairs))
    return save_named(folder, dict(zip(names, images, strict=True)))


# Digits


def test_confusion_of_a_made_classifier(tmp_path, corner, capsys):
    pairs = [(0, 0)] * 3 + [(0, 7)] + [(4, 4), (4, 9)] + [(9, 9)] * 2
    folder = save_digits(tmp_path / "digits", pairs)
    result = main(Digits(folder, corner, output_dir=tmp_path / "out"))
    matrix = np.zeros((10, 10), dtype=int)
    np.add.at(matrix, tuple(np.array(pairs).T), 1)
    assert result["confusion"] == matrix.tolist()
    assert (result["accuracy"], result["images"], result["diversity_percent_of_real"]) == (
        75.0,
        8,
        None,
    )
    by_digit = {
        digit: (row["images"], row["accuracy"])
        for digit, row in enumerate(result["digits"])
        if row["images"]
    }
    assert by_digit == {0: (4, 75.0), 4: (2, 50.0), 9: (2, 100.0)}
    assert result["digits"][1] == {"images": 0, "accuracy": None, "diversity": None}
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert written == json.loads(json.dumps(result, default=str))
    assert (written["score"], written["net"], written["arguments"]["classifier"]) == (
        "digits",
        "Corner",
        str(corner),
    )
    with Image.open(tmp_path / "out" / "confusion.png") as drawn:
        assert min(drawn.size) > 500
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"accuracy 75.00 % of 8 images of {folder} (Corner)"
    assert [line.split() for line in lines[2:5]] == [
        ["0", "4", "75.00"],
        ["1", "0", "none"],
        ["2", "0", "none"],
    ]
    assert len(lines) == 12


def test_the_course_classifier_sees_what_the_graders_show_it(tmp_path, course):
    images = noise(40)
    folder = save_named(
        tmp_path / "digits", {f"{k % 10}_{k:03d}.png": image for k, image in enumerate(images)}
    )
    result = main(Digits(folder, course, device="cpu"))
    net = DigitClassifier()
    net.load_state_dict(torch.load(course, weights_only=True)["state_dict"])
    shown = np.stack(
        [np.asarray(Image.open(path)) / 127.5 - 1 for path in sorted(folder.glob("*.png"))]
    )
    with torch.inference_mode():
        seen = net(torch.from_numpy(shown).float().permute(0, 3, 1, 2)).argmax(1).numpy()
    labels = np.array([int(path.name[0]) for path in sorted(folder.glob("*.png"))])
    assert result["accuracy"] == pytest.approx(100 * (seen == labels).mean())
    for label, predicted in zip(labels, seen, strict=True):
        result["confusion"][label][predicted] -= 1
    assert not np.any(result["confusion"])


def test_vendi_score_counts_different_images():
    points = 100.0 * np.eye(6)  # farther apart than any bandwidth here
    assert vendi_score(points, 1.0) == pytest.approx(6)
    assert vendi_score(points[[0] * 6], 1.0) == pytest.approx(1)
    assert vendi_score(points[[0, 0, 0, 1, 1, 1]], 1.0) == pytest.approx(2)
    shares = np.array([4, 1, 1]) / 6
    assert vendi_score(points[[0, 0, 0, 0, 1, 2]], 1.0) == pytest.approx(
        np.exp(-(shares * np.log(shares)).sum())
    )
    near = np.array([[0.0], [1.0]])  # kernel exp(-1/2): eigenvalues (1 ± exp(-1/2)) / 2
    values = (1 + np.array([1, -1]) * np.exp(-0.5)) / 2
    assert vendi_score(near, 1.0) == pytest.approx(np.exp(-(values * np.log(values)).sum()))


def test_diversity_is_that_of_equal_numbers_of_real_images():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(400, 8))
    others = rng.normal(size=(50, 8))
    same = diversity(real[:50], real[:50], 0)
    assert same["percent_of_real"] == pytest.approx(100)
    assert (same["images"], same["real_sd"]) == (50, None)
    assert diversity(real[:1].repeat(50, 0), real, 0)["percent_of_real"] == pytest.approx(
        0, abs=1e-9
    )

    found = diversity(others, real, 0)  # of 8 sets of 50
    assert found["percent_of_real"] == pytest.approx(
        100, abs=10
    )  # 50 images; sets of 50 differ by 3 %
    assert 0 < found["real_sd"] < 0.1 * found["real"]
    scaled = diversity(1e3 * others, 1e3 * real, 0)
    assert scaled["percent_of_real"] == pytest.approx(found["percent_of_real"])
    assert diversity(others[np.arange(50) % 5], real, 0)["percent_of_real"] < 40  # 5 images in turn
    assert diversity(0.5 * others, real, 0)["percent_of_real"] < 60  # drawn to the typical image
    # With fewer real images, as many of the others are drawn.
    assert diversity(real, others, 0)["images"] == 50
    assert diversity(others, real, 0) == found
    for few, many in (
        (others[:1], real),
        (others[:0], real),
        (others, real[:1]),
        (others, np.zeros((9, 8))),
    ):
        assert diversity(few, many, 0) is None


def test_diversity_beside_real_images(tmp_path, data_dir, corner, capsys):
    """All validation images are as diverse as they are; one image of each digit is not at all."""
    real = load_digits(data_dir, "svhn", "val")
    images = real.pixels.permute(0, 2, 3, 1).numpy()
    every = {}
    one = {}
    for digit in range(10):
        rows = torch.nonzero(real.labels == digit).flatten().tolist()
        every |= {f"{digit}_{k}.png": images[row] for k, row in enumerate(rows)}
        one |= {f"{digit}_{k}.png": images[rows[0]] for k in range(3)}
    options = {"data_dir": data_dir, "domain": "svhn"}
    result = main(Digits(save_named(tmp_path / "every", every), corner, **options))
    assert (result["accuracy"], result["real_accuracy"]) == (100, 100)
    assert result["diversity_percent_of_real"] == pytest.approx(100)
    assert [row["diversity"]["images"] for row in result["digits"]] == [3] * 10
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(
        "(Corner), 100.00 % of 30 real ones (svhn, val); diversity 100.0 % of real images'"
    )
    assert lines[2].split()[-1] == "100.0"
    result = main(Digits(save_named(tmp_path / "one", one), corner, **options))
    assert result["accuracy"] == 100
    assert result["diversity_percent_of_real"] == pytest.approx(0, abs=1e-6)
    assert [row["diversity"]["generated"] for row in result["digits"]] == pytest.approx([1] * 10)
    capsys.readouterr()
    alone = save_named(tmp_path / "alone", {"3_0.png": images[0]})
    result = main(Digits(alone, corner, data_dir=data_dir, domain="usps"))
    assert result["diversity_percent_of_real"] is None
    assert "real ones (grey usps, val); diversity undefined\n" in capsys.readouterr().out


def test_the_spread_of_the_mean_over_digits():
    """Digits are independent, so the variance of their mean is the sum of variances over n²."""
    real = Images(torch.from_numpy(noise(200)).permute(0, 3, 1, 2), torch.arange(200) % 10, [])
    images = Images(torch.from_numpy(noise(50)).permute(0, 3, 1, 2), torch.arange(50) % 10, [])
    accelerator = make_accelerator("cpu", "fp32")
    result = evaluate_digits(Corner(), images, real, accelerator, seed=0)
    found = [row["diversity"] for row in result["digits"]]
    assert [d["images"] for d in found] == [5] * 10
    variances = [(100 * d["real_sd"] / (d["real"] - 1)) ** 2 for d in found]  # of 4 sets of 5 each
    assert result["real_diversity_sd"] == pytest.approx(np.sqrt(sum(variances)) / 10)
    assert result["diversity_percent_of_real"] == pytest.approx(
        np.mean([d["percent_of_real"] for d in found])
    )
    result = evaluate_digits(Corner(), images, images, accelerator, seed=0)
    assert result["real_diversity_sd"] is None  # there is only one set of real images


# Mse


def test_mse_of_known_images(tmp_path, capsys):
    truth = noise(3, 32)
    predicted = truth.copy()
    signs = np.where(truth[1] < 128, 3, -3)
    predicted[1] = truth[1] + signs  # squared error 9 everywhere
    predicted[2] = 0
    truth[2] = 255  # the difference does not fit into uint8
    names = ["00.png", "01.png", "02.png"]
    ours = save_named(tmp_path / "predicted", dict(zip(names, predicted, strict=True)))
    theirs = save_named(tmp_path / "truth", dict(zip(names, truth, strict=True)))
    result = main(Mse(ours, theirs, output_dir=tmp_path / "out"))
    assert result["images"] == {"00.png": 0, "01.png": 9, "02.png": 255**2}
    assert result["mse"] == pytest.approx((9 + 255**2) / 3)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["mse"] == result["mse"]
    assert capsys.readouterr().out.splitlines() == [
        "00.png 0.000",
        "01.png 9.000",
        "02.png 65025.000",
        f"mean squared error 21678.000 (0-255) of 3 images of {ours}",
    ]
    one = noise(1, 32)
    one[0, 0, 0] //= 2
    a = save_named(tmp_path / "a", {"x.png": one[0]})
    b = save_named(tmp_path / "b", {"x.png": noise(1, 32)[0]})
    expected = np.square(one.astype(float) - noise(1, 32)).mean()
    assert main(Mse(a, b))["mse"] == pytest.approx(expected, rel=1e-12)


# Train-classifier


def tiny(data_dir: Path, output_dir: Path, **changes) -> TrainClassifier:
    options = {
        "epochs": 2,
        "images_per_epoch": 32,
        "batch_size": 16,
        "device": "cpu",
        "precision": "fp32",
    }
    return TrainClassifier(output_dir=output_dir, data_dir=data_dir, **options | changes)


def test_a_trained_classifier_learns_and_evaluates(data_dir, tmp_path, capsys):
    """The corner gives the digit away, so a few steps suffice without augmentation."""
    run = tmp_path / "run"
    args = tiny(data_dir, run, epochs=4, images_per_epoch=160, augmentation=0.0, ema_decay=0.8)
    result = main(args)
    assert result["accuracy"] > 60  # chance is 10 %
    assert result["grey"] is False
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["epoch"]) for row in rows] == [(10, 1), (20, 2), (30, 3), (40, 4)]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert (run / "figures" / "curves.png").stat().st_size > 5_000
    net, config = load_net(run / "model.safetensors", digits.NETS)
    assert (type(net).__name__, config["domain"]) == ("DigitResNet", "mnistm")
    out = capsys.readouterr().out
    assert f"{run}: {result['accuracy']:.2f} % of 30 val images of mnistm" in out

    real = load_digits(data_dir, "mnistm", "val")
    names = (f"{label}_{k:03d}.png" for k, label in enumerate(real.labels.tolist()))
    folder = save_named(
        tmp_path / "digits", dict(zip(names, real.pixels.permute(0, 2, 3, 1).numpy(), strict=True))
    )
    found = main(Digits(folder, run / "model.safetensors", data_dir=data_dir, device="cpu"))
    assert found["accuracy"] == found["real_accuracy"] == pytest.approx(result["accuracy"])
    assert found["diversity_percent_of_real"] == pytest.approx(100)


def test_training_resumes_bit_for_bit(data_dir, tmp_path, stop_in_step_1, capsys):
    """Stopped after the second of six steps, in the middle of the first epoch, and continued."""
    options = {"images_per_epoch": 48}
    whole = tiny(data_dir, tmp_path / "whole", **options)
    cut = tiny(data_dir, tmp_path / "cut", **options)
    main(whole)
    stop_in_step_1(main, cut)
    assert not (cut.output_dir / "result.json").exists()
    result = main(cut)
    files = [(args.output_dir / "model.safetensors").read_bytes() for args in (whole, cut)]
    assert files[0] == files[1]
    rows = [(args.output_dir / "metrics.jsonl").read_text() for args in (whole, cut)]
    assert rows[0] == rows[1]
    capsys.readouterr()
    assert main(cut) == result
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"holds a run with other arguments \(--domain was mnistm, is svhn\)"
    ):
        main(dataclasses.replace(cut, domain="svhn"))


def test_seeds_differ(data_dir, tmp_path):
    short = {"epochs": 1, "images_per_epoch": 16}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        main(tiny(data_dir, tmp_path / name, seed=seed, **short))
    weights = [
        load_net(tmp_path / name / "model.safetensors", digits.NETS)[0].state_dict()
        for name in "abc"
    ]
    key = "feature.1.weight"
    assert torch.equal(weights[0][key], weights[1][key])
    assert not torch.equal(weights[0][key], weights[2][key])


# Errors


def test_bad_input_is_one_line_and_status_2(tmp_path, data_dir, course, monkeypatch, error_of):
    good = {f"{k}_{k:03d}.png": image for k, image in enumerate(noise(3))}
    for name in ("good", "text", "word", "upper", "nested", "cut", "odd"):
        save_named(tmp_path / name, good)
    (tmp_path / "text" / "notes.txt").write_text("no digit")
    shutil.copy(tmp_path / "word" / "0_000.png", tmp_path / "word" / "x_000.png")
    shutil.copy(tmp_path / "upper" / "0_000.png", tmp_path / "upper" / "1_1.PNG")
    (tmp_path / "nested" / "0_more").mkdir()
    (tmp_path / "cut" / "1_001.png").write_bytes(
        (tmp_path / "good" / "1_001.png").read_bytes()[:200]
    )
    save_named(tmp_path / "odd", {"2_009.png": noise(1, 32)[0]})
    save_named(tmp_path / "large", {"0_1.png": noise(1, 64)[0]})
    save_named(tmp_path / "two", dict(list(good.items())[:2]))
    save_named(tmp_path / "wide", good | {"1_001.png": noise(1, 32)[0][:28]})
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    monkeypatch.chdir(tmp_path)
    classifier = ["--classifier", course]
    to_train = ["train-classifier", "--output-dir", "new", "--data-dir"]
    for words, message in (
        (["digits", "none", *classifier], "none: no such folder"),
        (["digits", "empty", *classifier], "empty: no image in it"),
        (
            ["digits", "text", *classifier],
            "text/notes.txt: is not named DIGIT_NAME.png, but every file here is read",
        ),
        (["digits", "word", *classifier], "word/x_000.png: is not named DIGIT_NAME.png"),
        (["digits", "upper", *classifier], "upper/1_1.PNG: is not named DIGIT_NAME.png"),
        (["digits", "nested", *classifier], "nested/0_more: is not named DIGIT_NAME.png"),
        (["digits", "cut", *classifier], "cut/1_001.png: not a whole image"),
        (["digits", "odd", *classifier], "odd/2_009.png: is 32x32, but 0_000.png is 28x28"),
        (["digits", "large", *classifier], "large/0_1.png: is 64x64, but a digit must be 28x28"),
        (["digits", "good", "--classifier", "no.pth"], "--classifier no.pth: no such file"),
        (
            ["digits", "good", "--classifier", "good/0_000.png"],
            "--classifier good/0_000.png: not a whole file of",
        ),
        (
            ["digits", "good", "--classifier", "other.pth"],
            "--classifier other.pth: is not this DigitClassifier",
        ),
        (
            ["digits", "good", *classifier, "--data-dir", "x"],
            "--data-dir x: has no digit domain 'mnistm'",
        ),
        (
            ["digits", "good", *classifier, "--real", data_dir, "--domain", "mars"],
            "has no digit domain 'mars'",
        ),
        (
            ["digits", "good", *classifier, "--output-dir", "good"],
            "--output-dir good: lies in good, where nothing",
        ),
        (
            ["digits", "good", *classifier, "--output-dir", "good/a/b"],
            "--output-dir good/a/b: lies in good",
        ),
        (
            ["digits", "good", *classifier, "--output-dir", "run"],
            "--output-dir run: holds a run or another score",
        ),
        (["mse", "good", "none"], "none: no such folder"),
        (["mse", "empty", "good"], "empty: contains no image"),
        (["mse", "two", "good"], "two/2_002.png: no such file, although good has one"),
        (["mse", "good", "two"], "two/2_002.png: no such file, although good has one"),
        (["mse", "wide", "good"], "wide/1_001.png: is 32x28, but good/1_001.png is 28x28"),
        (["mse", "cut", "good"], "cut/1_001.png: not a whole image"),
        (
            ["mse", "good", "good", "--output-dir", "run"],
            "--output-dir run: holds a run or another score",
        ),
        ([*to_train, "none"], "--data-dir none: has no digit domain 'mnistm'"),
        ([*to_train, data_dir, "--epochs", 0], "--epochs 0: must be at least 1"),
        ([*to_train, data_dir, "--width", -1], "--width -1: must be between 1 and 4096"),
        (
            [*to_train, data_dir, "--label-smoothing", 2],
            "--label-smoothing 2.0: must be at least 0 and below 1",
        ),
        ([*to_train, data_dir, "--batch-size", 1], "--batch-size 1: must be at least 2"),
        ([*to_train, data_dir, "--lr", "nan"], "--lr nan: must be above 0 and at most 1"),
        ([*to_train, data_dir, "--lr", "1e300"], "--lr 1e+300: must be above 0 and at most 1"),
        ([*to_train, data_dir, "--augmentation", "inf"], "--augmentation inf: must be between 0"),
        (
            [*to_train, data_dir, "--ema-decay", 1],
            "--ema-decay 1.0: must be at least 0 and below 1",
        ),
        ([*to_train, data_dir, "--seed", -1], "--seed -1: must be between 0 and 4,294,967,295"),
    ):
        error = error_of(Fid | Faces | Digits | TrainClassifier | Mse, main, *words)
        assert message in error, words
    names = sorted(path.name for path in (tmp_path / "good").iterdir())
    assert names == sorted(good)  # nothing was added


def test_real_is_the_former_name_of_data_dir(monkeypatch):
    seen = []
    for flag in ("--real", "--data-dir"):
        words = ["digits", "a", "--classifier", "b", flag, "c"]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
        run_cli(Digits | Mse, seen.append)
    assert seen[0] == seen[1] == Digits(Path("a"), Path("b"), data_dir=Path("c"))
