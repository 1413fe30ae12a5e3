"""p2_ddim.py: given noises to images by the graders' conventions, the grid over eta, interpolation."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import save_image

import p2_ddim
from common.diffusion import Schedule
from common.run import UserError, command_line
from models.ddim_unet import DdimUnet
from p2_ddim import EtaGrid, Generate, Interpolate, read_noises, slerp


@pytest.fixture
def noise_dir(tmp_path: Path) -> Path:
    """Five noises of 16x16."""
    folder, rng = tmp_path / "noise", torch.Generator().manual_seed(0)
    folder.mkdir()
    for number in range(5):
        torch.save(torch.randn(1, 3, 16, 16, generator=rng), folder / f"{number:02d}.pt")
    return folder


@pytest.fixture
def options(tmp_path: Path, noise_dir: Path, monkeypatch) -> dict:
    """A small net with random weights stands for the course's, whose shape has a test of its own."""
    torch.manual_seed(0)
    net = DdimUnet(size=16, width=32, multipliers=(1, 2), attention=(8,), blocks=1)
    for parameter in net.parameters():  # some begin at zero
        torch.nn.init.normal_(parameter, 0, 0.05)
    torch.save(net.state_dict(), tmp_path / "UNet.pt")
    arguments = net.config["arguments"]
    monkeypatch.setattr(DdimUnet, "arguments_of", staticmethod(lambda weights: arguments), raising=False)
    return {"noise_dir": noise_dir, "checkpoint": tmp_path / "UNet.pt", "output_dir": tmp_path / "out", "device": "cpu"}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_images_are_those_of_an_independent_sampler_and_torchvision(options, tmp_path):
    p2_ddim.main(Generate(**options, steps=10))
    assert sorted(path.name for path in options["output_dir"].iterdir()) == [f"{number:02d}.png" for number in range(5)]
    net = p2_ddim.Model(Generate(**options), (16, 16)).net
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    alphas = (1 - betas).cumprod(0)  # counted from 0, as the course does
    x = torch.load(options["noise_dir"] / "03.pt", weights_only=True)
    with torch.inference_mode():
        for t in range(901, 0, -100):
            a, before = alphas[t], alphas[t - 100] if t > 100 else torch.tensor(1.0, dtype=torch.float64)
            eps = net(x, torch.tensor([float(t)]))
            x0 = ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
            x = (before.sqrt() * x0 + (1 - before).sqrt() * eps).float()
    save_image(x, tmp_path / "expected.png", normalize=True)
    assert np.abs(pixels(tmp_path / "expected.png") - pixels(options["output_dir"] / "03.png")).max() <= 1


def test_eta_0_is_the_same_to_the_byte_and_for_any_batch_size(options, tmp_path):
    for name, others in {"a": {}, "b": {}, "c": {"batch_size": 2}}.items():
        p2_ddim.main(Generate(**options | {"output_dir": tmp_path / name}, steps=5, **others))
    files = [f"{number:02d}.png" for number in range(5)]
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    assert all(np.abs(pixels(tmp_path / "a" / file) - pixels(tmp_path / "c" / file)).max() <= 1 for file in files)


@pytest.mark.parametrize(("steps", "last"), [(1, 2), (13, 2), (50, 2), (300, 2), (1000, 1)])
def test_any_number_of_steps_ends_at_the_lowest(options, steps, last):
    model = p2_ddim.Model(Generate(**options, steps=steps), (16, 16))
    assert len(model.steps) == steps
    assert model.steps[-1] == last  # counted from 1; at 1,000 steps there is no room for the offset
    assert model.steps[0] <= 1000
    model = p2_ddim.Model(Generate(**options, steps=steps, spacing="trailing"), (16, 16))
    assert (len(model.steps), model.steps[0], model.steps[-1]) == (steps, 1000, round(1000 / steps))


def test_conventions_are_flags(options):
    variants = {
        "default": {},
        "offset": {"offset": 0},
        "unclamped": {"clamp": False},
        "alpha": {"final_alpha": "first"},
    }
    _, noises = read_noises(options["noise_dir"])
    images = {}
    for name, others in variants.items():
        images[name] = p2_ddim.Model(Generate(**options, steps=4, **others), (16, 16)).generate(noises[:1], eta=0.0)
    images["eta"] = p2_ddim.Model(Generate(**options, steps=4), (16, 16)).generate(noises[:1], eta=1.0)
    assert all(not torch.equal(images["default"], image) for name, image in images.items() if name != "default")
    x = torch.linspace(-0.5, 0.2, 12).view(1, 3, 2, 2)
    spread = {r: p2_ddim.Model(Generate(**options, save_range=r), (16, 16)).to_pixels(x) for r in ("minmax", "fixed")}
    assert (spread["minmax"].min(), spread["minmax"].max()) == (0, 255)
    assert (spread["fixed"].min(), spread["fixed"].max()) == (64, 153)


def test_the_grid_and_both_paths_are_drawn(options, capsys):
    p2_ddim.main(EtaGrid(**options, steps=2))
    p2_ddim.main(Interpolate(**options, steps=2))
    for name in ("eta_grid.png", "slerp.png", "lerp.png"):
        assert Image.open(options["output_dir"] / name).size[0] > 500
    told = {line.split(":")[0]: line for line in capsys.readouterr().out.splitlines()}
    norms = {k: [int(n) for n in told[k].split("= ")[1].split(";")[0].split(", ")] for k in ("slerp", "lerp")}
    assert len(norms["slerp"]) == 11
    assert min(norms["slerp"]) >= 26  # noise of 768 numbers has a norm of 28
    assert norms["lerp"][5] <= 21  # the straight line passes near the origin: 28 / √2


def test_slerp_keeps_the_norm_and_is_safe_everywhere():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 8, 8, generator=rng)
    for alpha in (0.0, 0.3, 1.0):
        length = (1 - alpha) * a.norm() + alpha * b.norm()
        assert slerp(a, b, alpha).norm().item() == pytest.approx(length.item(), rel=1e-5)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    omega = math.acos((a.flatten() @ b.flatten() / a.norm() / b.norm()).item())
    same_length = b * a.norm() / b.norm()
    expected = (math.sin(0.7 * omega) * a + math.sin(0.3 * omega) * same_length) / math.sin(omega)
    torch.testing.assert_close(slerp(a, same_length, 0.3), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slerp(a, 2 * a, 0.5), 1.5 * a)
    half = slerp(a, -a, 0.5)
    assert half.isfinite().all()
    assert half.norm().item() == pytest.approx(a.norm().item(), rel=1e-5)
    assert abs((half.flatten() @ a.flatten()).item()) < 1e-3 * a.norm().item() ** 2
    torch.testing.assert_close(slerp(a, -a, 1.0), -a, rtol=1e-4, atol=1e-4)


def test_published_schedule_is_the_default(options):
    model = p2_ddim.Model(Generate(**options), (16, 16))
    assert model.schedule.a == Schedule(1000).a
    assert model.steps == [1 + t for t in range(981, 0, -20)]  # the course's 1, 21, …, 981, counted from 1


def test_bad_input_is_one_line_and_status_2(options, noise_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name, content in {"list": [1], "flat": torch.zeros(4), "grey": torch.zeros(1, 1, 16, 16)}.items():
        (tmp_path / name).mkdir()
        torch.save(content, tmp_path / name / "00.pt")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "00.pt").write_bytes((noise_dir / "00.pt").read_bytes()[:100])
    (tmp_path / "mixed").mkdir()
    for number, size in enumerate((16, 32)):
        torch.save(torch.zeros(1, 3, size, size), tmp_path / "mixed" / f"0{number}.pt")
    for folder, told in (
        ("none", "--noise-dir none: no such folder"),
        ("empty", "--noise-dir empty: has 0 noises"),
        ("list", "list/00.pt: holds a list, not a tensor"),
        ("flat", "flat/00.pt: has shape [4]"),
        ("grey", "grey/00.pt: has shape [1, 16, 16], expected 1 x 3 x 16 x 16"),
        ("cut", "cut/00.pt: not a whole file"),
        ("mixed", "mixed/01.pt: has shape [3, 32, 32], expected 1 x 3 x 16 x 16"),
    ):
        words = ["generate", "--noise-dir", folder, "--output-dir", "y", "--checkpoint", options["checkpoint"]]
        monkeypatch.setattr(sys, "argv", ["p2_ddim.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            command_line(Generate | EtaGrid | Interpolate, p2_ddim.main)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert told in error
    assert not (tmp_path / "y").exists()
    with pytest.raises(UserError, match="has 5 noises"):
        read_noises(noise_dir, at_least=6)
    with pytest.raises(UserError, match=r"noise: is 32x32, .*UNet\.pt 16x16"):
        p2_ddim.Model(Generate(**options), (32, 32))
    with pytest.raises(UserError, match="--offset 100: 50 steps would begin at 1081"):
        p2_ddim.Model(Generate(**options, offset=100), (16, 16))
