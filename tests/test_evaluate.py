"""evaluate.py fid and faces: FID against pytorch-fid and formulas, random features, the face rule.

Also score.py, the former name of the script.
"""

import json
import subprocess
import sys
import urllib.error
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from pytorch_fid import fid_score, inception
from torchvision.transforms.functional import gaussian_blur

from common import progress
from common.cli import UserError, run_cli
from common.files import ROOT
from evaluate import Faces, Fid, main
from metrics.features import random_features
from metrics.frechet import frechet_distance
from preparation.synthetic.faces import draw_face
from tests.conftest import noise, save_images


def random_fid(generated: Path, real: Path, **options) -> dict:
    return main(Fid(generated, real, features="random", **options))


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """160 drawn faces, uint8 (160, 64, 64, 3)."""
    return np.stack([draw_face(np.random.default_rng(k))[0] for k in range(160)])


# Fréchet distance


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(0), np.cov(features, rowvar=False)


def nuclear_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The distance of features (n, d) with another formula.

    tr √(S1 S2) = |A Bᵀ|_* / √((n-1)(m-1)), with A and B centred.
    """
    mean_a = a.mean(0)
    mean_b = b.mean(0)
    a = a - mean_a
    b = b - mean_b
    trace = np.linalg.svd(a @ b.T, compute_uv=False).sum() / np.sqrt((len(a) - 1) * (len(b) - 1))
    variances = (a**2).sum() / (len(a) - 1) + (b**2).sum() / (len(b) - 1)
    return float(((mean_a - mean_b) ** 2).sum() + variances - 2 * trace)


def test_frechet_distance_of_diagonal_gaussians():
    rng = np.random.default_rng(0)
    means, variances = rng.normal(size=(2, 50)), rng.uniform(0.1, 4, (2, 50))
    expected = ((means[0] - means[1]) ** 2).sum() + (
        (np.sqrt(variances[0]) - np.sqrt(variances[1])) ** 2
    ).sum()
    found = frechet_distance(means[0], np.diag(variances[0]), means[1], np.diag(variances[1]))
    assert found == pytest.approx(expected, rel=1e-12)
    point, wide = np.zeros((3, 3)), np.diag([1.0, 2, 3])  # all images of a set alike
    assert frechet_distance(np.ones(3), point, np.zeros(3), wide) == pytest.approx(3 + 6)
    assert frechet_distance(np.zeros(3), wide, np.ones(3), point) == pytest.approx(3 + 6)


def test_frechet_distance_is_that_of_pytorch_fid():
    rng = np.random.default_rng(1)
    mix = rng.normal(size=(64, 64))
    a, b = rng.normal(size=(500, 64)) @ mix, 0.8 * rng.normal(size=(700, 64)) @ mix + 0.3
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # SciPy's, of an argument of pytorch-fid's
        expected = fid_score.calculate_frechet_distance(*statistics(a), *statistics(b))
    assert expected > 10
    assert frechet_distance(*statistics(a), *statistics(b)) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(*statistics(b), *statistics(a)) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(*statistics(a), *statistics(a)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("n", "m"), [(100, 60), (60, 400), (400, 100), (3, 2)])
def test_frechet_distance_of_fewer_images_than_features(n, m):
    rng = np.random.default_rng(2)
    spectrum = 10 / np.arange(1, 301)  # as steep as that of real features
    a, b = rng.normal(size=(n, 300)) * spectrum, rng.normal(size=(m, 300)) * spectrum + 0.1
    found = frechet_distance(*statistics(a), *statistics(b))
    assert found == pytest.approx(nuclear_distance(a, b), rel=1e-11)


# Inception


@pytest.fixture(scope="module")
def made_weights(tmp_path_factory) -> Path:
    """A file of random weights for pytorch-fid's network, which keep its features about 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models.Inception3, "load_state_dict", lambda *_: None)
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        net = inception.fid_inception_v3()
    rng = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=rng)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.bias.data.normal_(0, 0.3, generator=rng)
    path = tmp_path_factory.mktemp("weights") / "made.pth"
    torch.save(net.state_dict(), path)
    return path


def test_inception_is_that_of_pytorch_fid(tmp_path, made_weights, capsys, monkeypatch):
    a = save_images(tmp_path / "a", noise(6, 40))
    b = save_images(tmp_path / "b", noise(5, 32, seed=1) // 2)
    files = [sorted(folder.glob("*.png")) for folder in (a, b)]
    state = torch.load(made_weights, weights_only=True)
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: state)
    net = inception.InceptionV3()
    theirs = [fid_score.get_activations(some, net, batch_size=3, num_workers=0) for some in files]
    assert theirs[0].std() > 0.05  # the comparison is about something
    monkeypatch.setattr(
        inception, "load_state_dict_from_url", lambda *_, **__: pytest.fail("looks for a network")
    )

    options = {"weights": made_weights, "batch_size": 4, "device": "cpu"}
    result = main(Fid(a, b, **options, save_stats=tmp_path / "b.npz"))
    expected = nuclear_distance(*theirs)
    assert expected > 1
    assert result["distance"] == pytest.approx(expected, rel=0, abs=1e-3)
    with np.load(tmp_path / "b.npz") as saved:
        np.testing.assert_allclose(
            saved["mu"], theirs[1].mean(0), rtol=1e-4, atol=1e-5
        )  # float32, other batches
        np.testing.assert_allclose(
            saved["sigma"], np.cov(theirs[1], rowvar=False), rtol=1e-3, atol=1e-5
        )
    printed = capsys.readouterr()
    assert "6 images are fewer than the 2,048 features" in printed.err
    assert "5 images are fewer than the 2,048 features" in printed.err
    assert f"warning: {made_weights}: not the published weights" in printed.err
    assert printed.out.startswith(
        "Fréchet distance of inception-"
    )  # with other weights it is not called FID


def test_statistics_of_pytorch_fid_are_read(tmp_path, capsys):
    variances = np.random.default_rng(0).uniform(0.5, 2, (2, 2048))
    for name, values in zip("ab", variances, strict=True):
        np.savez_compressed(tmp_path / f"{name}.npz", mu=np.zeros(2048), sigma=np.diag(values))
    result = main(Fid(tmp_path / "a.npz", tmp_path / "b.npz"))  # no net is needed
    assert result["distance"] == pytest.approx(
        ((variances[0] ** 0.5 - variances[1] ** 0.5) ** 2).sum()
    )
    assert result["images"] == {"generated": None, "real": None}
    assert capsys.readouterr().out.startswith(f"FID {result['distance']:.3f}: ")


def test_missing_weights_are_reported_in_one_line(tmp_path, monkeypatch):
    images = save_images(tmp_path / "images", noise(2))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def no_network(*_, **__):
        raise urllib.error.URLError("no name")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    name = "pt_inception-2015-12-05-6726825d.pth"
    with pytest.raises(
        UserError, match=rf"^[^\n]+put https://\S+/{name} at \S+/hub/checkpoints/{name} or [^\n]+$"
    ):
        main(Fid(images, images))
    with pytest.raises(UserError, match=r"^--weights no.pth: no such file$"):
        main(Fid(images, images, weights=Path("no.pth")))
    torch.save(torch.nn.Linear(1, 1).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(
        UserError, match=r"^--weights \S+linear.pth: is not pytorch-fid's InceptionV3 [^\n]+$"
    ):
        main(Fid(images, images, weights=tmp_path / "linear.pth"))


# Random features


def test_random_features_never_change():
    """Golden values, because distances are compared over months and machines.

    1e-4 leaves room for other float32 kernels.
    """
    name, embed = random_features()
    pixels = (torch.arange(2 * 3 * 64 * 64) * 37 % 256).view(2, 3, 64, 64).byte()
    features = embed(pixels)
    assert (name, features.shape) == ("random-1", (2, 480))
    assert features[0, [0, 63, 100, 200, 479]].tolist() == pytest.approx(
        [3.431651, 2.694252, 0.647613, 2.200854, 0.350115], rel=1e-4
    )
    assert features.double().sum().item() == pytest.approx(2455.724331, rel=1e-4)
    digits = embed((torch.arange(3 * 28 * 28) * 37 % 256).view(1, 3, 28, 28).byte())
    assert digits[0, [0, 63, 100, 200, 479]].tolist() == pytest.approx(
        [1.935316, 3.695931, 1.470784, 2.295682, 0.302274], rel=1e-4
    )


def test_random_features_depend_on_the_images_alone(tmp_path):
    a, b = save_images(tmp_path / "a", noise(9)), save_images(tmp_path / "b", noise(7, seed=1))
    before = torch.random.get_rng_state()
    first = random_fid(a, b)["distance"]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(123)
    assert random_fid(a, b)["distance"] == first
    for batch_size in (1, 4):  # float32 sums in another order
        assert random_fid(a, b, batch_size=batch_size)["distance"] == pytest.approx(first, rel=1e-4)


def test_random_features_separate_bad_faces_from_good_ones(tmp_path, drawn):
    """Each fault, however mild, must stand out from the distance of two sets of good faces."""
    real, good = save_images(tmp_path / "real", drawn[:80]), drawn[80:]
    rng = np.random.default_rng(0)
    blurred = (
        gaussian_blur(torch.from_numpy(good).permute(0, 3, 1, 2), 7, 1.0)
        .permute(0, 2, 3, 1)
        .numpy()
    )
    bad = {
        "blurred": blurred,
        "noisy": (good + rng.normal(0, 20, good.shape)).clip(0, 255).astype(np.uint8),
        "dark": (0.7 * good).astype(np.uint8),
        "collapsed": np.concatenate([good[:5]] * 16),
        "noise": noise(80, 64),
    }
    floor = random_fid(save_images(tmp_path / "good", good), real)["distance"]
    for fault, images in bad.items():
        distance = random_fid(save_images(tmp_path / fault, images), real)["distance"]
        assert distance > 1.5 * floor, fault


# Fid


def test_fid_reads_sub_folders_and_no_hidden_files(tmp_path, capsys):
    images = noise(9)
    flat, real = (
        save_images(tmp_path / "flat", images),
        save_images(tmp_path / "real", noise(4, seed=1)),
    )
    nested = save_images(tmp_path / "nested", images[:3])
    save_images(nested / "more" / "deep", images[3:])
    (nested / "._000.png").write_bytes(b"what macOS leaves")
    save_images(nested / ".hidden", noise(2, seed=5))
    result = random_fid(nested, real)
    assert result["images"] == {"generated": 9, "real": 4}
    assert result["distance"] == pytest.approx(random_fid(flat, real)["distance"], rel=1e-9)
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 2
    assert lines[0] == (
        f"random-feature Fréchet distance {result['distance']:.3f}: 9 images of {nested} "
        f"against 4 images of {real} (random-1)"
    )
    assert "FID" not in printed.out
    assert f"warning: {nested}: 9 images are fewer than the 480 features" in printed.err


def test_grey_images_are_read_as_rgb(tmp_path):
    images = noise(4)
    images[..., 1:] = images[..., :1]
    grey = tmp_path / "grey"
    grey.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(grey / f"{number}.png")
    assert random_fid(grey, save_images(tmp_path / "rgb", images))["distance"] == pytest.approx(
        0, abs=1e-6
    )


def test_kept_statistics_give_the_same_distance(tmp_path):
    a, b = save_images(tmp_path / "a", noise(6)), save_images(tmp_path / "b", noise(5, seed=1))
    kept = tmp_path / "kept" / "b.npz"
    first = random_fid(a, b, save_stats=kept)
    again = random_fid(a, kept)
    assert (again["distance"], again["images"]) == (first["distance"], {"generated": 6, "real": 5})
    assert random_fid(kept, a)["distance"] == pytest.approx(first["distance"], rel=1e-9)
    assert main(Fid(kept, kept))["metric"] == "random-feature Fréchet distance"  # the file says so
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    for pair in ((a, tmp_path / "theirs.npz"), (kept, tmp_path / "theirs.npz")):
        with pytest.raises(
            UserError, match=r"npz: has features \S+, which cannot be compared with \S+$"
        ):
            random_fid(*pair)


@pytest.mark.parametrize(
    "changed",
    [
        {"sigma": np.eye(4) + np.triu(np.ones((4, 4)), 1)},  # not symmetric
        {"sigma": -np.eye(4)},
        {"sigma": np.eye(3)},
        {"sigma": np.full((4, 4), np.nan)},
        {"sigma": np.eye(4).astype(object)},
        {"mu": np.array([0, 0, 0, np.inf])},
        {"mu": np.zeros((4, 1))},
        {"mu": np.zeros(0), "sigma": np.zeros((0, 0))},
        {"count": -3},
        {"count": 2.5},
        {"count": np.nan},
        {"sigma": np.eye(4) * (1 + 1j)},
        {"sigma": np.eye(4).astype(str)},
        {"mu": np.full(4, 1e300)},
        {"features": "random-1\nerror"},
    ],
)
def test_statistics_that_cannot_be_are_refused(tmp_path, changed):
    good = {"mu": np.zeros(4), "sigma": np.eye(4), "features": "random-1", "count": 9}
    np.savez(tmp_path / "good.npz", **good)
    np.savez(tmp_path / "bad.npz", **(good | changed))
    assert main(Fid(tmp_path / "good.npz", tmp_path / "good.npz"))["distance"] == 0
    with pytest.raises(UserError, match=r"bad\.npz: not a whole file of statistics"):
        main(Fid(tmp_path / "bad.npz", tmp_path / "good.npz"))


def test_statistics_of_other_lengths_are_refused(tmp_path):
    for size in (4, 5):
        arrays = {"mu": np.zeros(size), "sigma": np.eye(size), "features": "random-1"}
        np.savez(tmp_path / f"{size}.npz", **arrays)
    with pytest.raises(UserError, match=r"4\.npz: has 4 features, but .*5\.npz has 5"):
        main(Fid(tmp_path / "4.npz", tmp_path / "5.npz"))


def test_floor_is_of_equal_size(tmp_path, capsys):
    real, train = (
        save_images(tmp_path / "real", noise(12, seed=1)),
        save_images(tmp_path / "train", noise(20, seed=2)),
    )
    a, kept = save_images(tmp_path / "a", noise(8) // 2), tmp_path / "a.npz"
    floors = [random_fid(a, real, floor=train, seed=seed) for seed in (0, 0, 1)]
    assert [floor["images"]["floor"] for floor in floors] == [8, 8, 8]
    assert floors[0]["floor"] == floors[1]["floor"] != floors[2]["floor"]
    assert floors[0]["floor"] < floors[0]["distance"] / 2
    out, err = capsys.readouterr()
    assert f"; floor {floors[0]['floor']:.3f}: 8 images of {train}\n" in out
    assert "--floor" not in err

    all_of_it = random_fid(
        train, real, floor=train, save_stats=kept
    )  # 20 of 20: the choice is the whole folder
    assert all_of_it["floor"] == pytest.approx(all_of_it["distance"], rel=1e-9)
    few = random_fid(train, real, floor=a)
    assert few["floor"] == pytest.approx(floors[0]["distance"], rel=1e-9)
    assert f"warning: --floor {a}: has 8 images, not 20" in capsys.readouterr().err
    assert (
        random_fid(kept, real, floor=train)["images"]["floor"] == 12
    )  # kept statistics know their number
    np.savez(kept, mu=np.zeros(480), sigma=np.eye(480), features="random-1")
    with pytest.raises(UserError, match=r"--floor: the number of images in \S+a.npz is unknown"):
        random_fid(kept, real, floor=train)


def test_fid_names_what_is_wrong(tmp_path):
    good = save_images(tmp_path / "good", noise(3))
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = save_images(tmp_path / "broken", noise(3))
    (broken / "001.png").write_bytes((broken / "001.png").read_bytes()[:300])
    odd = save_images(tmp_path / "odd", noise(3))
    Image.fromarray(noise(1, 32)[0]).save(odd / "1000.png")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04")
    np.savez(tmp_path / "other.npz", x=1)
    np.savez(
        tmp_path / "nan.npz",
        mu=np.zeros(480),
        sigma=np.full((480, 480), np.nan),
        features="random-1",
    )
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(tmp_path / "dims.npz", mu=np.zeros(768), sigma=np.eye(768))
    one = save_images(tmp_path / "one", noise(1))
    for folder, message in (
        (tmp_path / "none", "none: no such folder"),
        (tmp_path / "none.npz", "none.npz: no such file"),
        (empty, "empty: contains no image"),
        (one, "one: has one image, but a distance needs at least 2"),
        (broken, "001.png: not a whole image"),
        (odd, "1000.png: is 32x32, but 000.png is 28x28"),
        (tmp_path / "broken.npz", "broken.npz: not a whole file"),
        (tmp_path / "other.npz", "other.npz: not a whole file"),
        (tmp_path / "nan.npz", "nan.npz: not a whole file"),
        (tmp_path / "shape.npz", "shape.npz: not a whole file"),
        (tmp_path / "dims.npz", "dims.npz: has 768 features, but FID has 2048"),
    ):
        for pair in ((folder, good), (good, folder)):
            with pytest.raises(UserError, match=rf"^[^\n]*/{message}[^\n]*$"):
                random_fid(*pair)
    for options, message in (
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"save_stats": tmp_path / "x.txt"}, r"--save-stats \S+x.txt: must end in .npz"),
        ({"floor": empty}, "empty: contains no image"),
    ):
        with pytest.raises(UserError, match=message):
            random_fid(good, good, **options)


def test_result_json(tmp_path):
    a, b = save_images(tmp_path / "a", noise(6)), save_images(tmp_path / "b", noise(5, seed=1))
    result = random_fid(a, b, output_dir=tmp_path / "fid")
    written = json.loads((tmp_path / "fid" / "result.json").read_text())
    assert written == json.loads(json.dumps(result, default=str))
    assert {key: written[key] for key in ("score", "features", "images")} == {
        "score": "fid",
        "features": "random-1",
        "images": {"generated": 6, "real": 5},
    }
    assert written["arguments"]["generated"] == str(a)
    assert written["hardware"]["device"] == "cpu"
    random_fid(a, a, output_dir=tmp_path / "fid")  # the same score again
    assert json.loads((tmp_path / "fid" / "result.json").read_text())["distance"] == pytest.approx(
        0, abs=1e-6
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    for command, folder in ((Faces(a), "fid"), (Fid(a, b), "run"), (Faces(a), "run")):
        command.output_dir = tmp_path / folder
        with pytest.raises(UserError, match=r"--output-dir \S+: holds a run or another score"):
            main(command)


# Faces


def test_exactly_one_face_counts(tmp_path, drawn, capsys, monkeypatch):
    """Each of the drawn faces 0 to 7 is found; two side by side are two faces, noise is none."""
    monkeypatch.setattr("metrics.faces.IMAGES_A_THREAD", 1)  # so that there are several threads
    folder = save_images(tmp_path / "images", drawn[:5])
    Image.fromarray(drawn[5]).convert("L").save(folder / "grey.png")
    Image.fromarray(drawn[6]).save(folder / "compressed.JPG", quality=95)
    save_images(folder / "more", noise(2, 64))
    Image.fromarray(np.concatenate(drawn[:2], axis=1)).save(folder / "two.png")
    (folder / "broken.png").write_bytes((folder / "000.png").read_bytes()[:500])
    (folder / "notes.txt").write_text("not an image")
    real = save_images(tmp_path / "real", np.concatenate([drawn[:3], noise(1, 64)]))
    expected = {"one_face_percent": 70.0, "images": 10, "none": 2, "one": 7, "several": 1}
    expected["unreadable"] = [str(folder / "broken.png")]
    for workers in (1, 3):
        result = main(Faces(folder, real=real, num_workers=workers, output_dir=tmp_path / "faces"))
        assert {key: result[key] for key in expected} == expected
        assert (result["real"]["one_face_percent"], result["real"]["images"]) == (75.0, 4)
    line = (
        f"exactly one face in 70.00 % of 10 images of {folder} "
        "(none in 2, several in 1; 1 unreadable), "
        f"in 75.00 % of 4 images of {real} (none in 1, several in 0; 0 unreadable)"
    )
    assert capsys.readouterr().out.splitlines() == [line, line]
    assert json.loads((tmp_path / "faces" / "result.json").read_text())["real"]["one"] == 3


def test_faces_names_what_is_wrong(tmp_path, error_of):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a: none of its 1 images can be read"):
        main(Faces(tmp_path / "a"))
    with pytest.raises(UserError, match=r"--num-workers 0: must be between 1 and 1024"):
        main(Faces(tmp_path / "a", num_workers=0))
    error = error_of(Fid | Faces, main, "faces", tmp_path / "none")
    assert error == f"error: {tmp_path / 'none'}: no such folder\n"


def test_long_work_prints_the_time_left(monkeypatch, capsys):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(progress.show_progress("abcd", 4, "letters")) == ["a", "b", "c", "d"]
    assert capsys.readouterr().err == "letters: 2/4, about 00:12 left\n"


def test_command_line_reads_both_commands(tmp_path, monkeypatch):
    seen = []
    words = ["fid", "A", "B.npz", "--features", "random", "--batch-size", "7"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    run_cli(Fid | Faces, seen.append)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "faces", "A", "--real", "B"])
    run_cli(Fid | Faces, seen.append)
    assert seen[0] == Fid(Path("A"), Path("B.npz"), features="random", batch_size=7)
    assert (seen[1].images, seen[1].real) == (Path("A"), Path("B"))


# The former name


def test_score_py_runs_evaluate_py(tmp_path):
    """It says that it has another name now; output, result and exit status are evaluate.py's."""
    folder = save_images(tmp_path / "images", noise(2))
    expected = main(Fid(folder, folder, features="random"))
    words = ["fid", folder, folder, "--features", "random", "--output-dir", tmp_path / "fid"]
    ended = subprocess.run(
        [sys.executable, ROOT / "score.py", *words], capture_output=True, text=True, check=True
    )
    assert ended.stderr.startswith("note: score.py is now called evaluate.py")
    assert ended.stdout.startswith("random-feature Fréchet distance 0.000: 2 images of ")
    written = json.loads((tmp_path / "fid" / "result.json").read_text())
    assert written["distance"] == expected["distance"]
    assert written["command"].split()[0] == str(ROOT / "evaluate.py")
    words = ["fid", tmp_path / "none", folder]
    ended = subprocess.run([sys.executable, ROOT / "score.py", *words], capture_output=True)
    assert ended.returncode == 2
    assert ended.stderr.decode().splitlines()[1] == f"error: {tmp_path / 'none'}: no such folder"
