"""Score-based models: noise levels and samplers on data whose score is known, and the script."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import evaluate
import p2_ddim
import p2_ddpm_infer
import p2_score
from common.checkpoints import load_weights
from common.cli import UserError
from common.device import make_accelerator
from common.faces import FaceStates, make_face_net
from common.rng import make_rng
from diffusion.guidance import predict_eps
from diffusion.noise_levels import (
    NoiseLevels,
    annealed_variance,
    geometric_levels,
    karras_levels,
    langevin_length,
    langevin_variance,
    largest_distance,
    level_ratio,
    levels_needed,
)
from diffusion.samplers import (
    corrector_length,
    ddim_step,
    euler_step,
    ode_slope,
    score_of,
    step_pairs,
)
from diffusion.schedule import Schedule, spaced_steps
from metrics.features import random_features
from models.autoencoder import Autoencoder
from models.ddim_unet import DdimUnet, Sinusoid
from p2_score import Sample, Table, Train, train
from tests.conftest import noise, save_images, save_net
from tests.two_processes import run_with_two_processes

SPREAD = 0.5  # deviation of the Gaussian data
HIGH, LOW = 20.0, 0.01  # noise levels


def denoise(x: Tensor, sigma: float) -> Tensor:
    """The mean of the clean numbers, for data of N(0, SPREAD²)."""
    return x * SPREAD**2 / (SPREAD**2 + sigma**2)


class Draw:
    """Standard normal noise, as ImageNoise gives it."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.rng = torch.Generator().manual_seed(0)

    def __call__(self) -> Tensor:
        return torch.randn(self.shape, generator=self.rng)


def final(states) -> p2_score.State:
    """The last state of a sampler."""
    *_, last = states
    return last


# Noise levels


@pytest.mark.parametrize("parametrization", ["edm", "ncsn"])
def test_the_loss_is_least_at_the_score(parametrization):
    # A linear network at one noise level has a loss whose minimum can be computed.
    levels = NoiseLevels(0.799, 0.801, SPREAD, parametrization)
    weight = torch.zeros((), requires_grad=True)

    def network(x: Tensor, time: Tensor) -> Tensor:
        return weight * x

    rng = make_rng("data")
    x0 = SPREAD * torch.randn((200_000, 1, 1, 1), generator=rng)
    optimizer = torch.optim.LBFGS([weight], max_iter=20)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p2_score.denoising_losses(network, levels, x0, make_rng("noise"))["loss"]
        loss.backward()
        return loss

    optimizer.step(closure)
    x = torch.tensor([-1.0, 0.3, 2.0]).view(-1, 1, 1, 1)
    found = levels.denoise(network, x, torch.full((3,), 0.8)).detach()
    assert torch.allclose(found, denoise(x, 0.8), atol=0.01)
    score = -x / (SPREAD**2 + 0.8**2)
    assert torch.allclose(score_of(x, found, 0.8), score, atol=0.02)


class Silent(torch.nn.Module):
    """Returns zeros, and keeps the deviation of what it was given."""

    deviation = 0.0

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.deviation = x.std().item()
        return torch.zeros_like(x)


def test_edm_asks_for_a_target_of_variance_one_and_weights_all_levels_alike():
    levels = NoiseLevels(LOW, HIGH, SPREAD)
    rng = make_rng("data")
    x0 = SPREAD * torch.randn((50_000, 1, 1, 1), generator=rng)
    for value in (0.02, 0.5, 10.0):
        sigma = torch.full((len(x0),), value)
        x = x0 + value * torch.randn(x0.shape, generator=rng)
        network = Silent()
        # With an output of zero, the weighted error is the mean square of the target.
        errors = (levels.denoise(network, x, sigma) - x0).square().flatten()
        assert (levels.weight(sigma) * errors).mean().item() == pytest.approx(1, abs=0.03)
        assert network.deviation == pytest.approx(1, abs=0.03)


def test_sigma_is_drawn_within_its_range():
    for parametrization in ("edm", "ncsn"):
        levels = NoiseLevels(LOW, HIGH, SPREAD, parametrization)
        sigma = levels.draw(10_000, make_rng("sigma"))
        assert sigma.min() >= LOW * 0.999
        assert sigma.max() <= HIGH * 1.001
        middle = sigma.log().mean().item()
        if parametrization == "edm":
            assert middle == pytest.approx(-1.2, abs=0.05)
        else:
            assert middle == pytest.approx(math.log(LOW * HIGH) / 2, abs=0.05)


def test_the_network_can_tell_all_levels_apart_in_bf16():
    levels = NoiseLevels(0.02, 150.0, SPREAD)
    sigmas = torch.tensor(geometric_levels(150.0, 0.02, 472))
    times = levels.time(sigmas)
    assert (times.diff() < 0).all()
    assert times[0].item() == pytest.approx(1_000, abs=1e-2)
    assert times[-1].item() == pytest.approx(0, abs=1e-2)
    embedded = Sinusoid(64)(times).bfloat16()
    assert len(embedded.unique(dim=0)) == 472


@pytest.mark.parametrize("make", [geometric_levels, karras_levels])
def test_levels_fall_from_sigma_max_to_exactly_sigma_min(make):
    for count in (2, 3, 18, 500):
        sigmas = make(HIGH, LOW, count)
        assert len(sigmas) == count
        assert (sigmas[0], sigmas[-1]) == (HIGH, LOW)
        assert all(a > b for a, b in itertools.pairwise(sigmas))
    assert make(HIGH, LOW, 1) == [HIGH]
    with pytest.raises(ValueError, match="at least one noise level"):
        make(HIGH, LOW, 0)


@pytest.mark.parametrize(("low", "high", "data"), [(1, 1, 1), (2, 1, 1), (0, 1, 1), (1, 2, 0)])
def test_impossible_levels_are_refused(low, high, data):
    with pytest.raises(ValueError, match="sigma"):
        NoiseLevels(low, high, data)


def test_the_largest_distance_is_that_of_two_different_images():
    data = torch.zeros(3, 1, 2, 2)
    data[1] = 1  # distance 2 from the others
    assert largest_distance(data, 50, make_rng("pairs")) == 2
    with pytest.raises(ValueError, match="two images"):
        largest_distance(data[:1], 50, make_rng("pairs"))
    with pytest.raises(ValueError, match="the same"):
        largest_distance(torch.ones(3, 1, 2, 2), 50, make_rng("pairs"))


# Langevin dynamics


def test_the_rules_of_ncsnv2_give_its_numbers():
    assert level_ratio(3 * 64 * 64) == pytest.approx(1.0195, abs=5e-5)
    assert levels_needed(90, 0.01, 3 * 64 * 64) == 472
    # Step lengths for the range of CelebA (90 to 0.01), by levels and steps at each.
    for count, steps, e, left in (
        (10, 1, 0.87, 1.87),
        (20, 5, 0.29, 1.22),
        (100, 1, 0.17, 1.17),
        (200, 5, 0.074, 1.065),
        (500, 2, 0.035, 1.035),
        (1_000, 1, 0.018, 1.018),
    ):
        ratio = 9_000 ** (1 / (count - 1))
        found = langevin_length(ratio, steps)
        assert found == pytest.approx(e, rel=0.02)
        assert langevin_variance(found, ratio, steps) == pytest.approx(left, abs=0.005)


def variance_of_langevin(count: int, steps: int) -> float:
    """Variance relative to σ_min² after the whole annealing of noise alone: the recursion."""
    ratio = 9_000 ** (1 / (count - 1))
    e = langevin_length(ratio, steps)
    variance = 1.0
    for level in range(count):
        for _ in range(steps):
            variance = (1 - e) ** 2 * variance + 2 * e
        if level + 1 < count:
            variance *= ratio**2
    assert annealed_variance(ratio, steps, count) == pytest.approx(variance, rel=1e-9)
    return variance


@pytest.mark.parametrize(("steps", "wide"), [(5, 1.12), (50, 1.016)])
def test_langevin_dynamics_leaves_the_variance_of_its_recursion(steps, wide):
    assert variance_of_langevin(472, steps) == pytest.approx(wide, abs=0.002)
    sigmas = geometric_levels(90, 0.01, 472)
    draw = Draw(6_000, 1, 1, 1)
    e = langevin_length(sigmas[0] / sigmas[1], steps)

    def nothing(x: Tensor, sigma: float) -> Tensor:
        return torch.zeros_like(x)  # the data is the number 0

    # Only the last 40 levels: what came before is forgotten.
    x = sigmas[-40] * draw()
    last = final(p2_score.langevin(nothing, x, sigmas[-40:], steps, e, draw))
    variance = (last.x / sigmas[-1]).square().mean().item()
    assert variance == pytest.approx(wide, abs=0.05)
    assert torch.equal(last.denoised, torch.zeros_like(x))


def test_each_image_has_a_corrector_of_its_own():
    score = torch.randn(3, 2, 4, 4, generator=make_rng("score"))
    z = torch.randn(3, 2, 4, 4, generator=make_rng("noise"))
    together = corrector_length(score, z, 0.16)
    alone = torch.cat([corrector_length(score[i : i + 1], z[i : i + 1], 0.16) for i in range(3)])
    assert torch.equal(together, alone)
    expected = 2 * (0.16 * z[1].norm() / score[1].norm()) ** 2
    assert together[1].item() == pytest.approx(expected.item(), rel=1e-5)


# Samplers on Gaussian data


@pytest.mark.parametrize("sampler", ["ancestral", "pc", "euler", "heun"])
def test_samplers_reach_the_variance_of_the_data(sampler):
    draw = Draw(50, 1, 20, 20)  # the corrector's length is only right with many numbers an image
    x = HIGH * draw()
    if sampler == "ancestral":
        states = p2_score.ancestral(denoise, x, geometric_levels(HIGH, LOW, 400), draw)
    elif sampler == "pc":
        sigmas = geometric_levels(HIGH, LOW, 400)
        states = p2_score.predictor_corrector(denoise, x, sigmas, 0.05, draw)
    elif sampler == "euler":
        states = p2_score.euler(denoise, x, karras_levels(HIGH, LOW, 400))
    else:
        states = p2_score.heun(denoise, x, karras_levels(HIGH, LOW, 40))
    last = final(states)
    assert last.sigma == LOW
    assert last.denoised.var().item() == pytest.approx(SPREAD**2, rel=0.03)
    assert torch.equal(last.denoised, denoise(last.x, LOW))  # Tweedie's mean


def test_the_error_of_heun_falls_fourfold_when_the_steps_are_halved():
    x = HIGH * torch.ones(1, 1, 1, 1, dtype=torch.float64)
    exact = HIGH * math.sqrt((SPREAD**2 + LOW**2) / (SPREAD**2 + HIGH**2))
    errors = {"euler": [], "heun": []}
    for count in (41, 81, 161):
        sigmas = karras_levels(HIGH, LOW, count)
        for name, method in (("euler", p2_score.euler), ("heun", p2_score.heun)):
            errors[name].append(abs(final(method(denoise, x, sigmas)).x.item() - exact))
    for order, name in ((2, "euler"), (4, "heun")):
        first, second, third = errors[name]
        assert first / second == pytest.approx(order, rel=0.15)
        assert second / third == pytest.approx(order, rel=0.15)


def test_ddim_is_eulers_method_and_both_models_have_one_score():
    # One network, seen as a noise predictor (DDPM) and as a denoiser (score-based).
    torch.manual_seed(0)
    net = DdimUnet(3, 8, 32, (1,), (8,), blocks=1)
    torch.nn.init.normal_(net.out[2].weight, std=0.05)
    schedule = Schedule(1_000)
    steps = spaced_steps(1_000, 8)
    start = torch.randn(2, 3, 8, 8, generator=make_rng("x"))
    sigma = {}
    for t in steps:
        alpha_bar = schedule.alpha_bar[t]
        sigma[t] = math.sqrt((1 - alpha_bar) / alpha_bar)
    sigma[0] = 0.0
    x_ddim = start
    x = start / math.sqrt(schedule.alpha_bar[steps[0]])  # x_0 + σ z
    with torch.inference_mode():
        for t, previous in step_pairs(steps):
            signal = math.sqrt(schedule.alpha_bar[t])
            eps = predict_eps(net, schedule, signal * x, t)
            denoised = x - sigma[t] * eps
            score = score_of(x, denoised, sigma[t])  # of x = x_t / √ᾱ
            same = signal * schedule.score_from_eps(t, eps)  # of x_t, by the chain rule
            assert torch.allclose(score, same, rtol=1e-3, atol=1e-3)
            x = euler_step(x, ode_slope(x, denoised, sigma[t]), sigma[t], sigma[previous])

            eps = predict_eps(net, schedule, x_ddim, t)
            x0 = schedule.x0_from_eps(x_ddim, t, eps)
            x_ddim = ddim_step(schedule, x0, eps, t, previous)
    assert torch.allclose(x, x_ddim, rtol=1e-3, atol=1e-3)


# The script


@pytest.fixture
def faces_dir(tmp_path: Path) -> Path:
    """Six 16x16 images."""
    return save_images(tmp_path / "faces", noise(6, size=16))


def small(faces_dir: Path, name: str, **options) -> Train:
    """A training of two epochs of two steps on tiny images."""
    defaults = {
        "data_dir": faces_dir,
        "output_dir": faces_dir.parent / name,
        "size": 16,
        "width": 32,
        "blocks": 1,
        "patch": 4,
        "epochs": 2,
        "images_per_epoch": 4,
        "batch_size": 2,
        "device": "cpu",
        "precision": "fp32",
    }
    return Train(**(defaults | options))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after one epoch."""
    folder = save_images(tmp_path_factory.mktemp("trained") / "faces", noise(6, size=16))
    args = small(folder, "run", epochs=1)
    train(args)
    return args.output_dir / "model.safetensors"


def read_folder(folder: Path) -> list[np.ndarray]:
    """All images of a folder, in order."""
    return [np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))]


@pytest.mark.parametrize("parametrization", ["edm", "ncsn"])
def test_training_measures_its_levels_and_keeps_them(parametrization, faces_dir, capsys):
    args = small(faces_dir, "run", parametrization=parametrization, keep_every=1)
    result = train(args)
    assert math.isfinite(result["loss"])
    weights, config = load_weights(args.output_dir / "model.safetensors")
    pixels = FaceStates(make_face_net(16, 32, 1, 4), load(faces_dir), False, draws=6).sample(
        6, make_rng("rows")
    )
    distances = torch.cdist(pixels.flatten(1), pixels.flatten(1))
    levels = config["noise_levels"]
    assert levels["sigma_max"] == pytest.approx(distances.max().item(), rel=1e-5)
    assert levels["sigma_data"] == pytest.approx(pixels.std().item(), rel=1e-5)
    assert levels["sigma_min"] == 0.02
    assert levels["parametrization"] == parametrization
    assert "768 dimensions: Langevin dynamics needs" in capsys.readouterr().out
    copies = sorted(file.name for file in (args.output_dir / "epochs").iterdir())
    assert copies == ["0001.safetensors", "0002.safetensors"]
    state = torch.load(args.output_dir / "last.pt", weights_only=True)
    assert torch.equal(weights["out.2.weight"], state["ema"]["out.2.weight"])
    assert not torch.equal(weights["out.2.weight"], state["net"]["out.2.weight"])


def load(folder: Path) -> Tensor:
    """The images of a folder, uint8 (n, 3, height, width)."""
    return torch.from_numpy(np.stack(read_folder(folder))).permute(0, 3, 1, 2)


def test_training_resumes_bit_for_bit(faces_dir, stop_in_step_1):
    autoencoder = save_net(
        Autoencoder(size=16, latent_channels=2, encoder_width=4, decoder_width=8),
        faces_dir.parent / "autoencoder.safetensors",
    )
    options = {"autoencoder": autoencoder, "patch": 1, "dropout": 0.1}
    whole = small(faces_dir, "whole", **options)
    broken = small(faces_dir, "broken", **options)
    train(whole)
    stop_in_step_1(train, broken)
    train(broken)
    one, _ = load_weights(whole.output_dir / "model.safetensors")
    other, _ = load_weights(broken.output_dir / "model.safetensors")
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    # The autoencoder in a trained network serves the next training as well as the file itself.
    init = whole.output_dir / "model.safetensors"
    train(small(faces_dir, "more", epochs=1, init=init, **options | {"autoencoder": init}))


@pytest.mark.parametrize("sampler", ["langevin", "pc", "ancestral", "euler", "heun"])
def test_an_image_depends_on_seed_and_number_alone(sampler, trained, tmp_path):
    options = {"checkpoint": trained, "sampler": sampler, "calls": 4, "device": "cpu"}
    folders = [tmp_path / "one", tmp_path / "other"]
    p2_score.sample(Sample(output_dir=folders[0], num_images=5, **options))
    p2_score.sample(Sample(output_dir=folders[1], num_images=3, batch_size=2, **options))
    one, other = map(read_folder, folders)
    assert len(one) == 5
    for image, again in zip(one, other, strict=False):
        assert np.abs(image.astype(int) - again.astype(int)).max() <= 1
    assert not np.array_equal(one[0], one[1])


def test_the_calls_that_are_printed_are_made(trained):
    accelerator = make_accelerator("cpu", "fp32")
    options = Sample(checkpoint=trained, output_dir=trained.parent, device="cpu")
    model = p2_score.load_model(options)
    made = []
    model.net.register_forward_hook(lambda *_: made.append(1))
    for sampler, calls, spent in (
        ("langevin", 7, 7),
        ("pc", 7, 7),
        ("ancestral", 6, 6),
        ("euler", 6, 6),
        ("heun", 6, 5),
        ("heun", 1, 1),
    ):
        made.clear()
        plan = p2_score.make_plan(model, sampler, calls)
        assert plan.calls == spent
        list(p2_score.sample_faces(model, range(1), plan, seed=0))
        assert len(made) == spent, sampler
    assert accelerator.device.type == "cpu"


def test_plots_show_ten_images_at_ten_levels(trained, tmp_path):
    plots = tmp_path / "plots"
    args = Sample(
        checkpoint=trained,
        output_dir=tmp_path / "images",
        num_images=33,
        calls=19,
        final_denoising=False,
        grid=tmp_path / "grid.png",
        plots_dir=plots,
        device="cpu",
    )
    p2_score.sample(args)
    assert sorted(file.name for file in plots.iterdir()) == ["denoised.png", "noisy.png"]
    assert Image.open(tmp_path / "grid.png").size == (8 * 18 + 2, 4 * 18 + 2)
    assert len(read_folder(tmp_path / "images")) == 33


def test_two_processes_sample_the_same_bytes(trained, tmp_path):
    words = ["--num-images", 6, "--batch-size", 2, "--calls", 3, "--device", "cpu"]
    options = ["sample", "--checkpoint", trained, "--precision", "fp32", *words]
    run_with_two_processes("p2_score.py", *options, "--output-dir", tmp_path / "two")
    args = Sample(
        checkpoint=trained,
        output_dir=tmp_path / "one",
        num_images=6,
        batch_size=2,
        calls=3,
        device="cpu",
        precision="fp32",
    )
    p2_score.sample(args)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_two_processes_train(faces_dir):
    args = small(faces_dir, "two", epochs=1)
    flags = []
    for name in ("data_dir", "output_dir", "size", "width", "blocks", "patch", "epochs"):
        flags += [f"--{name.replace('_', '-')}", getattr(args, name)]
    flags += ["--images-per-epoch", 4, "--batch-size", 4, "--device", "cpu"]
    run_with_two_processes("p2_score.py", "train", *flags, "--precision", "fp32")
    weights, _ = load_weights(args.output_dir / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_the_table_has_a_row_for_every_sampler_and_number_of_calls(trained, tmp_path, monkeypatch):
    embedding = random_features()  # in place of EfficientNet, which may not be installed
    monkeypatch.setattr(evaluate, "open_embedding", lambda *_: embedding)
    for split, seed in (("train", 0), ("val", 1)):
        save_images(tmp_path / "data" / "face" / split, noise(8, size=16, seed=seed))
    table = Table(
        checkpoint=trained,
        output_dir=tmp_path / "table",
        data_dir=tmp_path / "data",
        samplers=("langevin",),
        calls=(3, 101),
        count=4,
        count_above=2,
        device="cpu",
    )
    rows = p2_score.main(table)
    assert [row[:3] for row in rows] == [
        ["langevin", "3", "2"],
        ["langevin", "101", "100"],
        ["langevin, no final denoising", "3", "2"],
        ["real images", "", ""],
        ["real images", "", ""],
    ]
    assert [row[4] for row in rows] == ["4", "2", "4", "4", "2"]
    assert [float(row[3]) for row in rows[:2]] == pytest.approx([2, 2], abs=0.1)  # variance left
    assert rows[3][3] == ""
    assert (tmp_path / "table" / "samples.png").is_file()
    monkeypatch.setattr(p2_score, "sample", lambda _: pytest.fail("sampled again"))
    monkeypatch.setattr(evaluate, "main", None)  # or measured
    assert p2_score.main(table) == rows


def test_bad_input_is_named(faces_dir, trained, tmp_path, error_of):
    def error(*words: object) -> str:
        return error_of(Train | Sample | Table, p2_score.main, *words)

    new = ["train", "--output-dir", tmp_path / "new", "--data-dir", faces_dir, "--size", 16]
    small_net = ["--width", 32, "--blocks", 1, "--patch", 4]
    assert "--sigma-min 3: must be below --sigma-max 2" in error(
        *new, "--sigma-min", 3, "--sigma-max", 2
    )
    wrong = ["--init", trained, *small_net, "--parametrization", "ncsn"]
    assert "--parametrization ncsn: the network in --init" in error(*new, *wrong)
    assert "--sigma-min 1000: must be below 2" in error(*new, *small_net, "--sigma-min", 1_000)
    same = save_images(tmp_path / "same", np.zeros((3, 16, 16, 3), dtype=np.uint8))
    words = ["--size", 16, "--output-dir", tmp_path / "x"]
    assert "all images are the same" in error("train", "--data-dir", same, *words, *small_net)
    (same / "001.png").unlink()
    (same / "002.png").unlink()
    assert f"--data-dir {same}: has 1 image" in error("train", "--data-dir", same, *words)

    out = ["--output-dir", tmp_path / "images"]
    sample = ["sample", "--checkpoint", trained, *out]
    assert "--calls 0" in error(*sample, "--calls", 0)
    ddpm = save_net(make_face_net(16, 32, 1, 4), tmp_path / "ddpm.safetensors")
    message = error("sample", "--checkpoint", ddpm, *out)
    assert f"--checkpoint {ddpm}: is not a score-based model" in message
    plots = tmp_path / "images"
    assert f"--plots-dir {plots}: must not lie" in error(*sample, "--plots-dir", plots)

    # The other way round: scripts for DDPM refuse a score-based model.
    torch.save(torch.zeros(1, 3, 16, 16), tmp_path / "00.pt")
    ddim = ["generate", "--noise-dir", tmp_path, "--checkpoint", trained, *out]
    is_refused = f"--checkpoint {trained}: is a score-based model"
    assert is_refused in error_of(p2_ddim.Generate | p2_ddim.EtaGrid, p2_ddim.main, *ddim)
    infer = ["--checkpoint", trained, *out]
    assert is_refused in error_of(p2_ddpm_infer.Generate, p2_ddpm_infer.main, *infer)
    assert not (tmp_path / "new" / "config.json").exists()


def test_a_net_for_other_latents_is_refused(tmp_path):
    autoencoder = save_net(
        Autoencoder(size=32, latent_channels=2, encoder_width=4, decoder_width=8),
        tmp_path / "autoencoder.safetensors",
    )
    with pytest.raises(UserError, match="is for 32x32 images, not 16x16"):
        make_face_net(16, 32, 1, autoencoder=autoencoder)
