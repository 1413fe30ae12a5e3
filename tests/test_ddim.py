"""p2_ddim.py: images from given noises by the graders' conventions, the grid, interpolation."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import save_image

import p2_ddim
from common.cli import UserError
from common.files import ROOT
from diffusion.schedule import Schedule
from models.ddim_unet import DdimUnet
from p2_ddim import (
    EtaGrid,
    Generate,
    Interpolate,
    Model,
    in_batches_that_fit,
    load_model,
    read_noises,
    slerp,
    to_pixels,
)
from tests.conftest import save_net

FILES = [f"{number:02d}.png" for number in range(5)]


@pytest.fixture
def noise_dir(tmp_path: Path) -> Path:
    """Five noises of 16x16."""
    folder = tmp_path / "noise"
    folder.mkdir()
    rng = torch.Generator().manual_seed(0)
    for number in range(5):
        torch.save(torch.randn(1, 3, 16, 16, generator=rng), folder / f"{number:02d}.pt")
    return folder


@pytest.fixture
def options(tmp_path: Path, noise_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Options for a small network, which stands for the course's.

    The shapes of the course's network have a test of their own.
    """
    torch.manual_seed(0)
    net = DdimUnet(size=16, width=32, multipliers=(1, 2), attention=(8,), blocks=1)
    for parameter in net.parameters():  # some are initialised with zeros
        torch.nn.init.normal_(parameter, 0, 0.05)
    torch.save(net.state_dict(), tmp_path / "UNet.pt")
    arguments = net.config["arguments"]
    monkeypatch.setattr(DdimUnet, "arguments_of", staticmethod(lambda weights: arguments))
    return {
        "noise_dir": noise_dir,
        "checkpoint": tmp_path / "UNet.pt",
        "output_dir": tmp_path / "out",
        "device": "cpu",
    }


def model_of(args: Generate) -> Model:
    return load_model(args, (16, 16))


def read_pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


# Images


def test_images_are_those_of_an_independent_sampler_and_torchvision(options, tmp_path):
    p2_ddim.main(Generate(**options, steps=10))
    assert sorted(path.name for path in options["output_dir"].iterdir()) == FILES

    net = model_of(Generate(**options)).net
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    alpha_bars = (1 - betas).cumprod(0)  # counted from 0, as in the course
    x = torch.load(options["noise_dir"] / "03.pt", weights_only=True)
    with torch.inference_mode():
        for t in range(901, 0, -100):
            a = alpha_bars[t]
            a_prev = alpha_bars[t - 100] if t > 100 else torch.ones_like(a)
            eps = net(x, torch.tensor([float(t)]))
            x0 = ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
            x = (a_prev.sqrt() * x0 + (1 - a_prev).sqrt() * eps).float()
    save_image(x, tmp_path / "expected.png", normalize=True)
    ours = read_pixels(options["output_dir"] / "03.png")
    assert np.abs(ours - read_pixels(tmp_path / "expected.png")).max() <= 1


def test_eta_0_gives_the_same_bytes_again_and_any_batch_size_the_same_images(options, tmp_path):
    for name, others in {"first": {}, "again": {}, "by twos": {"batch_size": 2}}.items():
        folder = {"output_dir": tmp_path / name}
        p2_ddim.main(Generate(**options | folder, steps=5, **others))
    for file in FILES:
        first = tmp_path / "first" / file
        assert first.read_bytes() == (tmp_path / "again" / file).read_bytes()
        by_twos = read_pixels(tmp_path / "by twos" / file)
        assert np.abs(read_pixels(first) - by_twos).max() <= 1


@pytest.mark.parametrize(
    "changes",
    [{"offset": 0}, {"clamp": "none"}, {"clamp": "dynamic"}, {"final_alpha": "first"}],
)
def test_each_convention_changes_the_images(options, changes):
    _, noises = read_noises(options["noise_dir"])
    images = []
    for others in ({}, changes):
        args = Generate(**options, steps=4, **others)
        images.append(in_batches_that_fit(model_of(args), noises, range(1), 0.0, args))
    assert not torch.equal(images[0], images[1])


def test_eta_changes_the_images(options):
    _, noises = read_noises(options["noise_dir"])
    args = Generate(**options, steps=4)
    model = model_of(args)
    deterministic = in_batches_that_fit(model, noises, range(1), 0.0, args)
    random = in_batches_that_fit(model, noises, range(1), 1.0, args)
    assert not torch.equal(deterministic, random)


def test_pixels_are_scaled_to_each_images_own_range_or_to_a_fixed_one():
    x = torch.linspace(-0.5, 0.2, 12).view(1, 3, 2, 2)
    own_range = to_pixels(x, "minmax")
    assert own_range.min() == 0
    assert own_range.max() == 255
    fixed = to_pixels(x, "fixed")
    assert fixed.min() == 64
    assert fixed.max() == 153


# What a checkpoint says about sampling


@pytest.fixture
def faces_net(options, tmp_path) -> dict:
    """Options for a checkpoint of ours that says how it is sampled."""
    net = DdimUnet(size=16, width=32, multipliers=(1, 2), attention=(8,), blocks=1)
    sampling = {"spacing": "trailing", "save_range": "fixed", "clamp": "dynamic"}
    schedule = {"steps": 100, "kind": "cosine"}
    path = save_net(net, tmp_path / "net.safetensors", schedule=schedule, sampling=sampling)
    return options | {"checkpoint": path}


def test_a_checkpoint_says_how_it_is_sampled(faces_net):
    model = model_of(Generate(**faces_net, steps=5))
    assert model.conventions == ("trailing", "fixed", "dynamic")
    assert model.steps == [100, 80, 60, 40, 20]


def test_an_option_comes_before_what_the_checkpoint_says(faces_net):
    model = model_of(Generate(**faces_net, steps=5, spacing="leading", clamp="none"))
    assert model.conventions == ("leading", "fixed", "none")
    assert model.steps == [82, 62, 42, 22, 2]
    model = model_of(Generate(**faces_net, steps=5, save_range="minmax"))
    assert model.conventions == ("trailing", "minmax", "dynamic")


def test_the_courses_conventions_are_the_defaults(options):
    assert model_of(Generate(**options)).conventions == ("leading", "minmax", "static")


def test_the_conventions_of_the_checkpoint_make_the_images(faces_net, tmp_path):
    """The same images as with explicit options, and others than with the course's."""
    explicit = {"spacing": "trailing", "save_range": "fixed", "clamp": "dynamic"}
    course = {"spacing": "leading", "save_range": "minmax", "clamp": "static"}
    for name, others in {"said": {}, "explicit": explicit, "course": course}.items():
        folder = {"output_dir": tmp_path / name}
        p2_ddim.main(Generate(**faces_net | folder, steps=3, **others))
    said = (tmp_path / "said" / "03.png").read_bytes()
    assert said == (tmp_path / "explicit" / "03.png").read_bytes()
    assert said != (tmp_path / "course" / "03.png").read_bytes()


def test_unknown_conventions_of_a_checkpoint_are_named(options, tmp_path):
    net = DdimUnet(size=16, width=32, multipliers=(1, 2), attention=(8,), blocks=1)
    path = save_net(net, tmp_path / "net.safetensors", sampling={"clamp": "often"})
    with pytest.raises(UserError, match=r"its sampling has clamp 'often', but only static, "):
        model_of(Generate(**options | {"checkpoint": path}))


def test_the_released_faces_say_how_they_are_sampled(options):
    path = ROOT / "checkpoints" / "ddim_faces.safetensors"
    model = load_model(Generate(**options | {"checkpoint": path}), (64, 64))
    assert model.conventions == ("trailing", "fixed", "static")
    assert model.steps[0] == 1_000


# Steps


@pytest.mark.parametrize(("steps", "last"), [(1, 2), (13, 2), (50, 2), (300, 2), (1000, 1)])
def test_any_number_of_steps_ends_at_the_lowest(options, steps, last):
    """Counted from 1. All 1,000 steps leave no room for the offset of 1."""
    model = model_of(Generate(**options, steps=steps))
    assert len(model.steps) == steps
    assert model.steps[-1] == last
    assert model.steps[0] <= 1000
    model = model_of(Generate(**options, steps=steps, spacing="trailing"))
    assert len(model.steps) == steps
    assert model.steps[0] == 1000
    assert model.steps[-1] == round(1000 / steps)


def test_the_published_schedule_is_the_default(options):
    model = model_of(Generate(**options))
    assert model.schedule.alpha_bar == Schedule(1000).alpha_bar
    courses_steps = range(981, 0, -20)  # 981, …, 21, 1, counted from 0
    assert model.steps == [1 + t for t in courses_steps]


# Plots and interpolation


def test_the_grid_and_both_ways_are_drawn(options):
    p2_ddim.main(EtaGrid(**options, steps=2))
    p2_ddim.main(Interpolate(**options, steps=2))
    for name in ("eta_grid.png", "slerp.png", "lerp.png"):
        assert Image.open(options["output_dir"] / name).size[0] > 500


def test_the_norms_of_the_noises_on_both_ways_are_printed(options, capsys):
    """Noise of 768 numbers has a norm of 28; a straight line passes near the origin, at 28 / √2."""
    p2_ddim.main(Interpolate(**options, steps=2))
    printed = capsys.readouterr().out
    norms = {}
    for way, listed in re.findall(r"(\w+): \|noise\| = ([\d, ]+);", printed):
        norms[way] = [int(norm) for norm in listed.split(", ")]
    assert len(norms["slerp"]) == 11
    assert min(norms["slerp"]) >= 26
    assert norms["lerp"][5] <= 21


@pytest.fixture
def two_noises() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_slerp_goes_from_one_noise_to_the_other_and_changes_the_length_evenly(two_noises):
    a, b = two_noises
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    for alpha in (0.0, 0.3, 1.0):
        length = (1 - alpha) * a.norm() + alpha * b.norm()
        assert slerp(a, b, alpha).norm().item() == pytest.approx(length.item(), rel=1e-5)


def test_slerp_is_the_usual_formula(two_noises):
    a, b = two_noises
    b = b * a.norm() / b.norm()  # the formula is for vectors of the same length
    omega = math.acos((a.flatten() @ b.flatten() / a.norm() ** 2).item())
    expected = (math.sin(0.7 * omega) * a + math.sin(0.3 * omega) * b) / math.sin(omega)
    torch.testing.assert_close(slerp(a, b, 0.3), expected, rtol=1e-4, atol=1e-4)


def test_slerp_is_safe_between_parallel_and_opposite_noises(two_noises):
    a, _ = two_noises
    torch.testing.assert_close(slerp(a, 2 * a, 0.5), 1.5 * a)
    half_way = slerp(a, -a, 0.5)
    assert half_way.isfinite().all()
    assert half_way.norm().item() == pytest.approx(a.norm().item(), rel=1e-5)
    cosine = (half_way.flatten() @ a.flatten()).item() / a.norm().item() ** 2
    assert abs(cosine) < 1e-3
    torch.testing.assert_close(slerp(a, -a, 1.0), -a, rtol=1e-4, atol=1e-4)


# Bad input


def write_bad_noises(folder: Path, noise_dir: Path) -> None:
    """Write a folder for each kind of bad noise."""
    (folder / "empty").mkdir()
    contents = {"list": [1], "flat": torch.zeros(4), "grey": torch.zeros(1, 1, 16, 16)}
    for name, content in contents.items():
        (folder / name).mkdir()
        torch.save(content, folder / name / "00.pt")
    (folder / "cut").mkdir()
    (folder / "cut" / "00.pt").write_bytes((noise_dir / "00.pt").read_bytes()[:100])
    (folder / "mixed").mkdir()
    torch.save(torch.zeros(1, 3, 16, 16), folder / "mixed" / "00.pt")
    torch.save(torch.zeros(1, 3, 32, 32), folder / "mixed" / "01.pt")


def test_bad_noises_are_named(options, noise_dir, tmp_path, monkeypatch, error_of):
    monkeypatch.chdir(tmp_path)
    write_bad_noises(tmp_path, noise_dir)
    for folder, message in (
        ("none", "--noise-dir none: no such folder"),
        ("empty", "--noise-dir empty: contains 0 noises"),
        ("list", "list/00.pt: contains a list, not a tensor"),
        ("flat", "flat/00.pt: has shape [4]"),
        ("grey", "grey/00.pt: has shape [1, 16, 16], expected 1 x 3 x 16 x 16"),
        ("cut", "cut/00.pt: not a whole file"),
        ("mixed", "mixed/01.pt: has shape [3, 32, 32], expected 1 x 3 x 16 x 16"),
    ):
        words = ["--noise-dir", folder, "--output-dir", "y", "--checkpoint", options["checkpoint"]]
        commands = Generate | EtaGrid | Interpolate
        assert message in error_of(commands, p2_ddim.main, "generate", *words)
    assert not (tmp_path / "y").exists()
    with pytest.raises(UserError, match="contains 5 noises"):
        read_noises(noise_dir, minimum=6)


def test_noises_that_do_not_fit_the_network_are_named(options):
    with pytest.raises(UserError, match=r"noise: the noises are 32x32, .*UNet\.pt makes 16x16"):
        load_model(Generate(**options), (32, 32))


def test_an_offset_beyond_the_last_step_is_named(options):
    with pytest.raises(UserError, match=r"--offset 100: 50 steps would start at 1081"):
        model_of(Generate(**options, offset=100))
