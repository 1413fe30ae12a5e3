"""models/gan.py, p1_dcgan.py, p1_wgangp.py: nets as printed, losses against formulas, exact resume, sampling."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import p1_dcgan
import p1_wgangp
from common.augment import augment_faces, diff_augment
from common.data import load_folder, normalise, shuffled
from common.gan import Sample, end_epoch, sample, spread
from common.run import Run, UserError, command_line, derive_seed, generator, load_net, load_weights, make_accelerator
from models.gan import GENERATORS, Critic, Discriminator, Generator, InstanceNorm, ProjectionGenerator

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """hw2_data with face/train: twelve random 64x64 images."""
    folder, rng = tmp_path / "hw2_data" / "face" / "train", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number:05d}.png")
    return tmp_path / "hw2_data"


def options(script, data_dir: Path, name: str, **others):
    """A run of two epochs of three steps."""
    others = {"epochs": 2, "batch_size": 4, "width": 8} | others
    return script.Train(data_dir=data_dir, output_dir=data_dir.parent / name, device="cpu", precision="fp32", **others)


# --------------------------------------------------------------------------------------------------------------- nets


def shapes(net: nn.Module) -> list[tuple[str, list[int]]]:
    """Convolutions and normalisations in order: as a report prints them."""
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.LayerNorm)
    return [(type(m).__name__, list(m.weight.shape)) for m in net.modules() if isinstance(m, kinds)]


def test_dcgan_is_the_printed_one():
    generator_net, discriminator = Generator(), Discriminator()
    assert shapes(generator_net) == [
        ("ConvTranspose2d", [100, 512, 4, 4]),
        ("BatchNorm2d", [512]),
        ("ConvTranspose2d", [512, 256, 4, 4]),
        ("BatchNorm2d", [256]),
        ("ConvTranspose2d", [256, 128, 4, 4]),
        ("BatchNorm2d", [128]),
        ("ConvTranspose2d", [128, 64, 4, 4]),
        ("BatchNorm2d", [64]),
        ("ConvTranspose2d", [64, 3, 4, 4]),
    ]
    assert shapes(discriminator) == [
        ("Conv2d", [64, 3, 4, 4]),
        ("Conv2d", [128, 64, 4, 4]),
        ("BatchNorm2d", [128]),
        ("Conv2d", [256, 128, 4, 4]),
        ("BatchNorm2d", [256]),
        ("Conv2d", [512, 256, 4, 4]),
        ("BatchNorm2d", [512]),
        ("Conv2d", [1, 512, 4, 4]),
    ]
    for net, convolutions in ((generator_net, (0, 3, 6, 9, 12)), (discriminator, (0, 2, 5, 8, 11))):
        assert [i for i, m in enumerate(net.main) if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)] == [*convolutions]
        assert net.main[convolutions[1]].weight.std().item() == pytest.approx(0.02, rel=0.05)
    images = generator_net.eval()(torch.randn(2, 100))
    assert images.shape == (2, 3, 64, 64)
    assert images.abs().max() <= 1
    assert discriminator(images).shape == (2,)


@pytest.mark.parametrize("norm", ["instance", "layer", "none"])
def test_the_critic_judges_each_image_alone(norm):
    torch.manual_seed(0)
    critic, images = Critic(width=8, norm=norm), torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(critic(images)[:1], critic(images[:1]), rtol=1e-4, atol=1e-6)
    if norm == "layer":
        sizes = [tuple(m.normalized_shape) for m in critic.modules() if isinstance(m, nn.LayerNorm)]
        assert sizes == [(16, 16, 16), (32, 8, 8), (64, 4, 4)]


def test_spectral_normalisation_bounds_every_convolution():
    torch.manual_seed(0)
    critic = Critic(width=8, norm="none", spectral=True)
    for _ in range(30):
        critic(torch.randn(2, 3, 64, 64))  # one power iteration each
    for layer in (m for m in critic.main if isinstance(m, nn.Conv2d)):
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_instance_norm_is_that_of_torch():
    x = torch.randn(3, 5, 8, 8)
    torch.testing.assert_close(InstanceNorm()(x), nn.InstanceNorm2d(5)(x))


def test_the_projection_generator_is_the_printed_one():
    net = ProjectionGenerator(width=2)
    assert [s for kind, s in shapes(net) if kind == "ConvTranspose2d"] == [
        [100, 32, 4, 4],
        [32, 16, 5, 5],
        [16, 8, 5, 5],
        [8, 4, 5, 5],
        [4, 3, 5, 5],
    ]
    assert net(torch.randn(2, 100)).shape == (2, 3, 64, 64)
    assert ProjectionGenerator().project[0].weight.shape[1] == 1024


# ------------------------------------------------------------------------------------------------------------- losses


def test_bce_is_that_of_the_sigmoid():
    logits = torch.tensor([-2.0, 0.5, 3.0])
    d = 1 / (1 + (-logits).exp())
    expected = -(0.9 * d.log() + 0.1 * (1 - d).log()).mean()
    torch.testing.assert_close(p1_dcgan.bce(logits, 0.9), expected)


def test_penalty_of_analytic_critics():
    torch.manual_seed(0)
    real, fake, epsilon = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4), torch.rand(5, 1, 1, 1)
    weights = torch.randn(3, 4, 4)
    linear = p1_wgangp.gradient_penalty(lambda x: (x * weights).sum((1, 2, 3)), real, fake, epsilon)
    torch.testing.assert_close(linear, (weights.norm() - 1).square())  # over all 48 numbers, not over the channels
    square = p1_wgangp.gradient_penalty(lambda x: x.square().sum((1, 2, 3)) / 2, real, fake, epsilon)
    between = epsilon * real + (1 - epsilon) * fake  # which is the gradient
    torch.testing.assert_close(square, (between.flatten(1).norm(dim=1) - 1).square().mean())


def test_penalty_has_a_finite_derivative_where_the_gradient_is_zero():
    weight = torch.zeros(3, 4, 4, requires_grad=True)
    images = torch.randn(2, 3, 4, 4)
    p1_wgangp.gradient_penalty(lambda x: (x * weight).sum((1, 2, 3)), images, images, torch.rand(2, 1, 1, 1)).backward()
    assert weight.grad.isfinite().all()


def test_flips_mirror_about_half():
    images = torch.randn(400, 1, 2, 3)
    flipped = (augment_faces(images, generator(0), True) != images).flatten(1).any(1)
    torch.testing.assert_close(augment_faces(images, generator(0), True)[flipped], images[flipped].flip(3))
    assert 150 < flipped.sum() < 250
    assert augment_faces(images, generator(0), False) is images


def test_diff_augment_by_policy():
    torch.manual_seed(0)
    images = torch.rand(64, 3, 16, 16) * 2 - 1
    assert torch.equal(diff_augment(images, generator(0), ()), images)
    assert torch.equal(
        *(diff_augment(images, generator(1), ("color", "translation", "cutout")) for _ in range(2)),
    )
    moved = diff_augment(images, generator(0), ("translation",))
    shifts = set()
    for before, after in zip(images, moved, strict=True):  # each is the image shifted by up to two, zeros outside
        padded = nn.functional.pad(before, (2, 2, 2, 2))
        found = [(y, x) for y in range(5) for x in range(5) if torch.equal(padded[:, y : y + 16, x : x + 16], after)]
        assert len(found) == 1
        shifts |= set(found)
    assert len(shifts) > 10
    hidden = (diff_augment(images, generator(0), ("cutout",)) == 0).float().mean((1, 2, 3))
    assert hidden.max() == 0.25
    assert hidden.min() > 0.02
    coloured = diff_augment(images, generator(0), ("color",)).flatten(1)
    for before, after in zip(images, coloured, strict=True):  # linear in the image, its channels' mean and a constant
        grey = before.mean(0, keepdim=True).expand(3, -1, -1)
        terms = torch.stack([before.flatten(), grey.flatten(), torch.ones(3 * 16 * 16)], 1)
        by = torch.linalg.lstsq(terms, after[:, None])
        assert (terms @ by.solution - after[:, None]).abs().max() < 1e-4
        contrast = (by.solution[0] + by.solution[1]).item()
        assert 0.5 <= contrast <= 1.5
        assert -1e-4 <= by.solution[0].item() / contrast <= 2  # saturation
    leaf = images.clone().requires_grad_(True)
    diff_augment(leaf, generator(0), ("color", "translation", "cutout")).sum().backward()
    assert leaf.grad.abs().flatten(1).sum(1).min() > 0


# ----------------------------------------------------------------------------------------------------------- training


def test_real_and_generated_images_share_a_batch_or_have_one_each():
    """Logits of the real ones come first; a joint batch normalises both alike, so that contrast can be seen."""
    shown = []

    class Normalised(nn.Module):
        def forward(self, images):
            shown.append(len(images))
            return ((images - images.mean()) / images.std()).abs().mean((1, 2, 3))

    real = torch.randn(8, 3, 4, 4, generator=generator(0))
    for batches, expected in (("separate", [8, 8]), ("joint", [16])):
        shown.clear()
        logits = p1_dcgan.judged(Normalised(), real, real / 4, lambda images: images, batches)
        assert shown == expected
        assert logits.shape == (2, 8)
        ratio = (logits[0] / logits[1]).mean().item()
        assert ratio == pytest.approx(1 if batches == "separate" else 4, rel=0.1)  # the means are nearly 0


def first_step(script, faces: Path, **others):
    """The first step, with Adams that keep the gradient itself: last.pt, the real images, the step's draws.

    Nothing is augmented, so that the latents are the first draw of the step.
    """
    plain = {"epochs": 1, "batch_size": 12, "augment": (), "flip": False, "beta1": 0.0}
    args = options(script, faces, "step", **plain | others)
    script.train(args)
    state = torch.load(args.output_dir / "last.pt", weights_only=True)
    assert state["step"] == 1
    pixels = load_folder(faces / "face" / "train", None).pixels
    return state, normalise(pixels[shuffled(12, 0, 12, 0, "order")]), generator(0, "step", 0, 0)


def begun(*kinds) -> list[nn.Module]:
    """The nets as the scripts make them for seed 0."""
    torch.manual_seed(derive_seed(0, "init"))
    return [kind(width=8).train() for kind in kinds]


def discriminator_loss(d, g, real, rng):
    """-0.9 log D(x) - 0.1 log(1 - D(x)) - 0.2 log D(G(z)) - 0.8 log(1 - D(G(z))), and the fakes."""
    fake = g(torch.randn((len(real), 100), generator=rng))
    x, z = d(torch.cat([real, fake.detach()])).sigmoid().chunk(2)
    return -(0.9 * x.log() + 0.1 * (1 - x).log()).mean() - (0.2 * z.log() + 0.8 * (1 - z).log()).mean(), fake


def critic_loss(critic, g, real, rng):
    """D(G(z)) - D(x) + 10 (|∇D| - 1)² + 0.01 D(x)², and the latents of the generator's step."""
    latents = torch.randn((2, len(real), 100), generator=rng)
    fake = g(latents[0]).detach()
    epsilon = torch.rand((len(real), 1, 1, 1), generator=rng)
    between = (epsilon * real + (1 - epsilon) * fake).requires_grad_(True)
    slopes = torch.autograd.grad(critic(between).sum(), between, create_graph=True)[0].flatten(1).norm(dim=1)
    loss = critic(fake).mean() - critic(real).mean() + 10 * (slopes - 1).square().mean()
    return loss + 0.01 * critic(real).square().mean(), latents[1]


def assert_gradient(adam: dict, loss: torch.Tensor, net: nn.Module) -> None:
    """Adam's first moment, with no memory, is the gradient of `loss`.

    Sums of float32 in another order differ by 0.1 %, since BatchNorm enlarges what differs among a new net's fakes.
    """
    expected = torch.autograd.grad(loss, list(net.parameters()))
    for number, gradient in enumerate(expected):
        error = (adam["state"][number]["exp_avg"] - gradient).norm()
        assert error <= 1e-2 * gradient.norm()


def test_dcgan_descends_its_two_losses(faces):
    """The discriminator its own, then the generator -log D(G(z)) by the new D."""
    state, real, rng = first_step(p1_dcgan, faces, real_label=0.9, fake_label=0.2, instance_noise=0.0)
    g, d = begun(Generator, Discriminator)
    loss, fake = discriminator_loss(d, g, real, rng)
    assert_gradient(state["d_adam"], loss, d)
    d.load_state_dict(state["discriminator"])
    assert_gradient(state["g_adam"], -d(torch.cat([real, fake])).sigmoid()[12:].log().mean(), g)


def test_wgan_gp_descends_its_two_losses(faces):
    """The critic its own, then the generator -D(G(z)) by the new D."""
    state, real, rng = first_step(p1_wgangp, faces, n_critic=1, penalty=10.0, drift=0.01)
    g, critic = begun(Generator, Critic)
    loss, latents = critic_loss(critic, g, real, rng)
    assert_gradient(state["c_adam"], loss, critic)
    critic.load_state_dict(state["critic"])
    assert_gradient(state["g_adam"], -critic(g(latents)).mean(), g)


@pytest.mark.parametrize("script", [p1_dcgan, p1_wgangp])
def test_training_resumes_bit_for_bit_within_an_epoch(script, faces, stop_in_step_1):
    whole, cut = options(script, faces, "whole"), options(script, faces, "cut")
    script.train(whole)
    stop_in_step_1(script.train, cut)
    assert torch.load(cut.output_dir / "last.pt", weights_only=True)["step"] == 2
    result = script.train(cut)
    a, b = (load_weights(run.output_dir / "model.safetensors")[0] for run in (whole, cut))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert (whole.output_dir / "metrics.jsonl").read_text() == (cut.output_dir / "metrics.jsonl").read_text()
    assert result["epoch"] == 2
    for name in ("samples/epoch_0001.png", "samples/epoch_0002.png"):
        assert Image.open(cut.output_dir / name).size == (8 * 66 + 2, 4 * 66 + 2)
    assert Image.open(cut.output_dir / "figures/training.gif").n_frames == 2
    assert Image.open(cut.output_dir / "figures/curves.png").size[0] > 500


def test_the_generator_moves_after_every_n_critic_th_step_of_the_whole_run(faces):
    args = options(p1_wgangp, faces, "run", epochs=3, n_critic=4)  # three steps an epoch, nine in all
    p1_wgangp.train(args)
    state = torch.load(args.output_dir / "last.pt", weights_only=True)
    assert state["g_adam"]["state"][0]["step"].item() == 2
    assert state["c_adam"]["state"][0]["step"].item() == 9


def test_the_saved_generator_is_the_average(faces):
    args = options(p1_dcgan, faces, "run")
    p1_dcgan.train(args)
    state = torch.load(args.output_dir / "last.pt", weights_only=True)
    saved = load_weights(args.output_dir / "model.safetensors")[0]
    assert all(torch.equal(saved[key], state["ema"][key]) for key in saved)
    assert not torch.equal(saved["main.0.weight"], state["generator"]["main.0.weight"])
    assert torch.equal(saved["main.1.running_var"], state["generator"]["main.1.running_var"])


@pytest.mark.parametrize("script", [p1_dcgan, p1_wgangp])
def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_state(script, faces, monkeypatch):
    args = options(script, faces, "run")
    lerp = script.normalise

    def spoil(pixels: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return lerp(pixels) * (math.nan if len(calls) == 5 else 1)

    calls: list[int] = []
    monkeypatch.setattr(script, "normalise", spoil)
    with pytest.raises(UserError, match=r"run: step 5 is not finite \(.*nan"):
        script.train(args)
    state = torch.load(args.output_dir / "last.pt", weights_only=True)
    assert state["step"] == 3  # the end of the first epoch
    assert all(value.isfinite().all() for value in state["ema"].values())
    assert not (args.output_dir / "result.json").exists()


@pytest.mark.parametrize("name", ["p1_dcgan", "p1_wgangp"])
def test_two_processes_train_one_gan(name, faces):
    """The first step follows the mean of the gradients of both processes' halves of the batch."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    output = faces.parent / "run"
    flags = ["--data-dir", faces, "--output-dir", output, "--epochs", "1", "--batch-size", "12", "--precision", "fp32"]
    flags += ["--width", "8", "--beta1", "0", "--no-flip", "--augment"]  # with nothing, as in first_step
    flags += ["--n-critic", "1", "--drift", "0.01"] if name == "p1_wgangp" else ["--fake-label", "0.2"]
    flags += [] if name == "p1_wgangp" else ["--instance-noise", "0"]
    command = [*torchrun, ROOT / f"{name}.py", "train", "--device", "cpu", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((output / "config.json").read_text())["hardware"]["processes"] == 2
    assert json.loads((output / "result.json").read_text())["epoch"] == 1
    pixels, state = load_folder(faces / "face" / "train", None).pixels, torch.load(output / "last.pt")
    kind, adam, loss_of = (
        (Critic, "c_adam", critic_loss) if name == "p1_wgangp" else (Discriminator, "d_adam", discriminator_loss)
    )
    g, net = begun(Generator, kind)
    rows = shuffled(12, 0, 12, 0, "order")
    losses = [loss_of(net, g, normalise(pixels[rows[k::2]]), generator(0, "step", 0, k))[0] for k in (0, 1)]
    assert_gradient(state[adam], sum(losses) / 2, net)


def test_collapse_is_told(faces, capsys):
    run = Run(options(p1_dcgan, faces, "run"), make_accelerator("cpu", "fp32"))
    run.load_state({})

    class Constant(nn.Module):
        latent = 100

        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(latents), 3, 64, 64)

    real = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    end_epoch(run, Constant(), real, {"step": 2000, "epoch": 1}, {})
    assert "the generator collapsed" in capsys.readouterr().out
    assert run.history()[0]["variety"] == 0
    assert spread(torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)])) == pytest.approx(0.5**0.5)


# ------------------------------------------------------------------------------------------------------------ samples


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small generator with batch statistics of its own."""
    torch.manual_seed(0)
    net = Generator(width=4)
    for _ in range(3):
        net(3 * torch.randn(8, 100))
    run = Run(p1_dcgan.Train(output_dir=tmp_path / "run"), make_accelerator("cpu", "fp32"))
    run.save_model(net, net.config)
    return tmp_path / "run" / "model.safetensors"


def test_samples_depend_on_seed_and_number_alone(checkpoint, tmp_path):
    folders = []
    for name, count, batch, seed in (("a", 40, 40, 0), ("b", 40, 7, 0), ("c", 5, 1, 0), ("d", 5, 5, 1)):
        folders.append(tmp_path / name)
        grid = tmp_path / f"{name}.png"
        sample(
            Sample(
                checkpoint=checkpoint, output_dir=folders[-1], num_images=count, batch_size=batch, seed=seed, grid=grid
            )
        )
    a, b, c, d = ({file.name: file.read_bytes() for file in sorted(folder.iterdir())} for folder in folders)
    assert list(a) == [f"{number:04d}.png" for number in range(40)]
    assert a == b
    assert c == {name: a[name] for name in list(a)[:5]}
    assert all(d[name] != c[name] for name in c)
    assert len(set(a.values())) == 40
    with pytest.raises(UserError, match=r"a: holds 0005\.png, which graders would read too"):
        sample(Sample(checkpoint=checkpoint, output_dir=folders[0], num_images=5))
    assert Image.open(tmp_path / "a.png").size == (8 * 66 + 2, 4 * 66 + 2)
    net = load_net(checkpoint, GENERATORS)[0]
    with torch.inference_mode():  # eval mode: by the running statistics
        latents = torch.randn(100, generator=generator(0, "image", 3))
        expected = ((net(latents[None])[0] + 1) * 127.5).permute(1, 2, 0)
    pixels = np.asarray(Image.open(folders[0] / "0003.png"))
    assert pixels.shape == (64, 64, 3)
    assert np.abs(pixels - expected.numpy()).max() <= 0.51


def test_bad_input_is_one_line_and_status_2(checkpoint, faces, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other" / "face" / "train").mkdir(parents=True)
    torch.save(Critic(width=4).state_dict(), tmp_path / "critic.pth")
    broken = faces / "face/train/00003.png"
    broken.write_bytes(broken.read_bytes()[:100])
    for words, told in (
        (["train", "--output-dir", "x", "--data-dir", "none"], "none/face/train: no such folder"),
        (["train", "--output-dir", "x", "--data-dir", "other"], "other/face/train: no PNG or JPEG image in it"),
        (["train", "--output-dir", "x", "--data-dir", faces], "00003.png: not a whole image"),
        (["sample", "--output-dir", "y", "--checkpoint", "critic.pth"], "critic.pth: is not this Generator"),
        (["sample", "--output-dir", "y", "--checkpoint", checkpoint, "--num-images", 0], "--num-images"),
        (["sample", "--output-dir", "y", "--checkpoint", checkpoint, "--grid", "y/grid.png"], "--grid y/grid.png"),
    ):
        for script in (p1_dcgan, p1_wgangp):
            monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
            with pytest.raises(SystemExit) as ended:
                command_line(script.Train | Sample, script.main)
            assert ended.value.code == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert told in error
    assert not (tmp_path / "y").exists()
