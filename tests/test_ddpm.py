"""p2_ddpm_train.py and p2_ddpm_infer.py: the loss, balanced domains, exact resume, the graders' files."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import p2_ddpm_infer
import p2_ddpm_train
from common.data import Images, normalise, shuffled
from common.diffusion import Schedule
from common.run import UserError, command_line, derive_seed, generator, load_weights
from models.context_unet import ContextUnet
from p2_ddpm_infer import Generate
from p2_ddpm_train import Train, balance, load_data, loss_of, make_net, train

ROOT = Path(__file__).resolve().parent.parent


def small(data_dir: Path, name: str, **options) -> Train:
    """A run of two epochs of three steps."""
    options = {"epochs": 2, "images_per_epoch": 24, "batch_size": 8, "width": 32, "grid_every": 1} | options
    options = {"domains": ("mnistm", "svhn"), "steps": 6, "schedule": "cosine"} | options
    return Train(data_dir=data_dir, output_dir=data_dir.parent / name, device="cpu", precision="fp32", **options)


class Recorder(nn.Module):
    """Predicts zeros and keeps what it was given."""

    def forward(self, x, time, classes, drop):
        self.x, self.time, self.classes, self.drop = x, time, classes, drop
        return torch.zeros_like(x)


def test_loss_is_the_mean_squared_error_of_the_noise(tmp_path):
    schedule, net, args = Schedule(100), Recorder(), Train(output_dir=tmp_path, drop=0.3)
    x0, labels = torch.rand(400, 3, 4, 4) * 2 - 1, torch.arange(400) % 20
    losses = loss_of(net, schedule, x0, labels, args, generator(0))
    t = (net.time * 100).round().long()
    assert (t.min(), t.max()) == (1, 100)
    signal_part, sigma = schedule.coefficients(t)
    eps = (net.x - signal_part * x0) / sigma  # what must have been added
    torch.testing.assert_close(losses["loss"], eps.square().mean(), rtol=1e-3, atol=1e-3)
    assert 0.2 < net.drop.float().mean() < 0.4  # withheld, not kept
    assert torch.equal(net.classes, labels)
    assert sum(losses[f"count_t{n}"] for n in range(4)) == 400
    per_image = eps.square().flatten(1).mean(1)
    torch.testing.assert_close(losses["loss_t3"], per_image[t > 75].sum(), rtol=1e-3, atol=1e-3)
    target = signal_part * eps - sigma * x0
    velocity = loss_of(net, Schedule(100, prediction="v"), x0, labels, args, generator(0))["loss"]
    torch.testing.assert_close(velocity, target.square().mean(), rtol=1e-3, atol=1e-3)
    weighted = loss_of(net, schedule, x0, labels, dataclasses.replace(args, min_snr=5.0), generator(0))["loss"]
    torch.testing.assert_close(weighted, (schedule.min_snr_weight(t) * per_image).mean(), rtol=1e-3, atol=1e-3)


def test_domains_are_balanced_and_labelled_apart(data_dir, monkeypatch):
    seen = []

    def spy(net, schedule, x0, labels, args, rng):
        seen.append(labels.clone())
        return loss_of(net, schedule, x0, labels, args, rng)

    monkeypatch.setattr(p2_ddpm_train, "loss_of", spy)
    train(small(data_dir, "run", epochs=1, images_per_epoch=80))
    for labels in seen:
        assert (labels < 10).tolist() == [True] * 4 + [False] * 4
        assert labels.max() < 20
    assert len(torch.cat(seen).unique()) == 20


def test_balanced_classes_are_drawn_as_often_as_the_commonest():
    labels = torch.tensor([0, 1, 1, 1, 1, 1, 2, 2])
    pixels = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1)
    images = balance(Images(pixels, labels, [str(row) for row in range(8)]))
    assert images.labels.bincount().tolist() == [5, 5, 5]
    assert images.pixels.flatten().bincount().tolist() == [5, 1, 1, 1, 1, 1, 3, 2]
    assert torch.equal(images.labels, labels[images.pixels.flatten().long()])
    assert images.names == [str(int(value)) for value in images.pixels.flatten()]


def test_a_run_begins_with_the_weights_of_another_and_takes_the_shares_asked_for(data_dir, monkeypatch):
    def first_step(*given):
        steps.append((given[0].state_dict()["out.2.weight"].clone(), int((given[3] < 10).sum())))
        return loss_of(*given)

    steps = []
    options = {"net": "ddim", "epochs": 1}
    train(small(data_dir, "first", **options))
    before = load_weights(data_dir.parent / "first" / "model.safetensors")[0]["out.2.weight"]
    monkeypatch.setattr(p2_ddpm_train, "loss_of", first_step)
    init = data_dir.parent / "first" / "model.safetensors"
    train(small(data_dir, "second", init=init, shares=(1, 3), **options))
    weight, of_mnistm = steps[0]
    assert torch.equal(weight, before)
    assert before.abs().max() > 0  # a new net's are zeros
    assert of_mnistm == 2  # of 8
    with pytest.raises(UserError, match="has domains"):
        train(small(data_dir, "third", init=init, **options | {"domains": ("svhn", "mnistm")}))
    with pytest.raises(UserError, match="has schedule"):
        train(small(data_dir, "third", init=init, prediction="v", **options))
    with pytest.raises(UserError, match="is a net 'ddim_unet'"):
        train(small(data_dir, "third", init=init, **options | {"net": "context"}))


def test_settings_that_cannot_be_meant(data_dir):
    for wrong in ({"width": 0}, {"width": -32}, {"width": 40}, {"drop": 1.5}, {"min_snr": 0.0}, {"shares": (1, 0)}):
        flag = "--" + next(iter(wrong)).replace("_", "-")
        with pytest.raises(UserError, match=flag):
            train(small(data_dir, "never", domains=("mnistm", "svhn"), **wrong))
    assert not (data_dir.parent / "never").exists()


@pytest.mark.parametrize("net", ["context", "attention", "ddim"])
def test_training_resumes_bit_for_bit_within_an_epoch(net, data_dir, stop_in_step_1):
    options = {"net": net}
    whole, cut = small(data_dir, "whole", **options), small(data_dir, "cut", **options)
    train(whole)
    stop_in_step_1(train, cut)
    assert torch.load(cut.output_dir / "last.pt", weights_only=True)["step"] == 2
    train(cut)
    a, b = (load_weights(run.output_dir / "model.safetensors")[0] for run in (whole, cut))
    assert all(torch.equal(a[key], b[key]) for key in a)
    rows = [json.loads(line) for line in (cut.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert {"loss", "loss_t0", "loss_t3", "gradient_norm", "learning_rate"} <= rows[0].keys()
    assert Image.open(cut.output_dir / "samples/epoch_0002.png").size == (10 * 30 + 2, 20 * 30 + 2)
    assert Image.open(cut.output_dir / "figures/training.gif").n_frames == 2


def test_faces_are_learned_without_classes(tmp_path):
    folder, rng = tmp_path / "hw2_data/face/train", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(6):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    options = {"net": "ddim", "width": 32, "patch": 2, "blocks": 1, "prediction": "v"}
    args = small(tmp_path / "hw2_data", "run", domains=("faces",), epochs=1, **options)
    train(args)
    config = load_weights(args.output_dir / "model.safetensors")[1]
    assert (config["arguments"]["n_classes"], config["size"], config["domains"]) == (0, 16, ["faces"])
    assert (config["arguments"]["patch"], config["schedule"]["prediction"]) == (2, "v")
    assert Image.open(args.output_dir / "samples/epoch_0001.png").size == (8 * 18 + 2, 4 * 18 + 2)


def test_two_processes_train_one_model(data_dir):
    """The first step follows the mean of the gradients of both processes' halves of the batch."""
    args = small(data_dir, "run", epochs=1, images_per_epoch=8, clip=1e9)
    flags = ["--data-dir", data_dir, "--output-dir", args.output_dir, "--domains", *args.domains, "--device", "cpu"]
    for name in ("epochs", "images_per_epoch", "batch_size", "width", "steps", "schedule", "clip"):
        flags += ["--" + name.replace("_", "-"), getattr(args, name)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, ROOT / "p2_ddpm_train.py", *flags, "--precision", "fp32"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((args.output_dir / "config.json").read_text())["hardware"]["processes"] == 2

    torch.manual_seed(derive_seed(0, "init"))
    net, schedule = make_net(args, 3, 28, 20), Schedule(args.steps, args.schedule)
    data = load_data(args)
    for rank in (0, 1):
        rows = [shuffled(len(images.pixels), 0, 4, 0, "order", n)[rank::2] for n, images in enumerate(data)]
        x0 = normalise(torch.cat([images.pixels[r] for images, r in zip(data, rows, strict=True)]))
        labels = torch.cat([images.labels[r] + 10 * n for n, (images, r) in enumerate(zip(data, rows, strict=True))])
        (loss_of(net, schedule, x0, labels, args, generator(0, "step", 0, rank))["loss"] / 2).backward()
    assert all(value.isfinite().all() for value in load_weights(args.output_dir / "model.safetensors")[0].values())
    state = torch.load(args.output_dir / "last.pt", weights_only=True)["adam"]["state"]
    for number, parameter in enumerate(net.parameters()):
        error = 10 * state[number]["exp_avg"] - parameter.grad  # after one step the moment is a tenth of the gradient
        assert error.norm() <= 3e-2 * parameter.grad.norm() + 1e-6  # BatchNorm enlarges float32's errors


@pytest.fixture
def checkpoint(data_dir) -> Path:
    train(small(data_dir, "trained", epochs=1))
    return data_dir.parent / "trained" / "model.safetensors"


def options(checkpoint: Path, output_dir: Path, **others) -> Generate:
    others = {"per_class": 3, "steps": 3, "device": "cpu", "precision": "fp32"} | others
    return Generate(checkpoint=checkpoint, output_dir=output_dir, **others)


def test_files_are_the_graders_and_depend_on_seed_and_number_alone(checkpoint, tmp_path):
    for name, others in {"a": {}, "b": {"batch_size": 7}, "c": {"per_class": 2}, "d": {"seed": 1}}.items():
        p2_ddpm_infer.main(options(checkpoint, tmp_path / name, sampler="ddpm", **others))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["mnistm", "svhn"]
    pixels = {}
    for name in "abcd":
        files = sorted((tmp_path / name / "svhn").iterdir())
        pixels[name] = {file.name: np.asarray(Image.open(file)).astype(int) for file in files}
    assert list(pixels["a"]) == [f"{digit}_{number:03d}.png" for digit in range(10) for number in (1, 2, 3)]
    assert pixels["a"]["0_001.png"].shape == (28, 28, 3)
    for name, image in pixels["a"].items():
        assert np.abs(image - pixels["b"][name]).max() <= 1  # another batch size: another order of float32 sums
        assert np.abs(image - pixels["d"][name]).max() > 1
    assert all(np.abs(image - pixels["a"][name]).max() <= 1 for name, image in pixels["c"].items())
    (tmp_path / "a" / "mnistm" / ".DS_Store").touch()  # not told of: a stray file that is seen is
    with pytest.raises(UserError, match=r"a/mnistm: holds 0_003\.png, which graders would read too"):
        p2_ddpm_infer.main(options(checkpoint, tmp_path / "a", per_class=2))


def test_one_domain_goes_into_the_folder_itself_with_its_figures(checkpoint, tmp_path):
    figures = tmp_path / "figures"
    sweep = {"figures_dir": figures, "guidance_sweep": (0.0, 2.0)}
    p2_ddpm_infer.main(options(checkpoint, tmp_path / "out", domains=("mnistm",), per_class=1, **sweep))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{digit}_001.png" for digit in range(10)]
    assert Image.open(figures / "mnistm_grid.png").size == (10 * 30 + 2, 10 * 30 + 2)
    assert Image.open(figures / "mnistm_reverse.gif").n_frames == 4
    for name in ("mnistm_reverse.png", "mnistm_guidance.png"):
        assert Image.open(figures / name).size[0] > 500
    grid = np.asarray(Image.open(figures / "mnistm_grid.png")).astype(int)
    first = np.asarray(Image.open(tmp_path / "out" / "3_001.png")).astype(int)
    assert np.abs(grid[2 + 3 * 30 :, 2:][:28, :28] - first).max() <= 1  # row 3, first noise


def test_published_weights_generate(tmp_path):
    torch.manual_seed(0)
    net = ContextUnet(3, 8, 10)
    torch.save({f"nn_model.{key}": value for key, value in net.state_dict().items()}, tmp_path / "x.pth")
    p2_ddpm_infer.main(options(tmp_path / "x.pth", tmp_path / "out", per_class=1, noise_steps=400))
    assert len(list((tmp_path / "out").iterdir())) == 10
    model = p2_ddpm_infer.Model(options(tmp_path / "x.pth", tmp_path / "out", noise_steps=400))
    assert model.schedule.a[400] == pytest.approx(np.prod(1 - np.linspace(1e-4, 0.02, 400)))  # as it was trained
    assert model.net.flipped_one_hot
    model = p2_ddpm_infer.Model(options(tmp_path / "x.pth", tmp_path / "out", noise_steps=400, plain_one_hot=True))
    assert not model.net.flipped_one_hot
    assert model.pixels(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [0, 128, 255]
    model = p2_ddpm_infer.Model(options(tmp_path / "x.pth", tmp_path / "out", unit_range=True))
    assert model.pixels(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [0, 0, 255]
    for wrong, told in ((ContextUnet(3, 8, 26), "knows 26 classes"), (ContextUnet(1, 8, 10), "images of 1 channels")):
        torch.save(wrong.state_dict(), tmp_path / "y.pth")
        with pytest.raises(UserError, match=rf"--checkpoint .*y\.pth: .*{told}"):
            p2_ddpm_infer.Model(options(tmp_path / "y.pth", tmp_path / "out"))


def test_bad_input_is_one_line_and_status_2(checkpoint, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": torch.ones(1)}, tmp_path / "other.pth")
    generate = ["--output-dir", "y", "--checkpoint"]
    begin = ["--output-dir", "x", "--data-dir", data_dir]
    for script, words, told in (
        (p2_ddpm_train, [*begin, "--domains", "mnistm", "mars"], "has no digit domain 'mars'"),
        (p2_ddpm_train, [*begin, "--domains", "mnistm", "faces"], "faces have no digits"),
        (p2_ddpm_train, [*begin, "--domains", "faces"], "face/train: no such folder"),
        (p2_ddpm_train, [*begin, "--domains", "mnistm", "svhn", "--batch-size", 9], "--batch-size 9"),
        (p2_ddpm_train, [*begin, "--shares", 1, 2], "--shares 1 2: one for each of --domains"),
        (p2_ddpm_train, [*begin, "--domains", "faces", "--balance-classes"], "--balance-classes: faces have no"),
        (p2_ddpm_train, [*begin, "--domains", "mnistm", "mnistm"], "--domains mnistm mnistm: at least one"),
        (p2_ddpm_train, [*begin, "--steps", 10], "--steps 10: β would go from 0.01 to 2"),
        (p2_ddpm_train, [*begin, "--clip", -1], "--clip -1.0: must be above 0"),
        (p2_ddpm_train, [*begin, "--lr", "nan"], "--lr nan: must be above 0"),
        (p2_ddpm_train, [*begin, "--images-per-epoch", -5], "--images-per-epoch -5: must be at least 1"),
        (p2_ddpm_train, [*begin, "--patch", 2], "--net context: has no --patch"),
        (p2_ddpm_train, [*begin, "--net", "ddim", "--patch", 3], "--patch 3: must divide 28"),
        (p2_ddpm_infer, [*generate, "other.pth"], "other.pth: is not this ContextUnet"),
        (p2_ddpm_infer, [*generate, checkpoint, "--domains", "usps"], "--domains usps:"),
        (
            p2_ddpm_infer,
            [*generate, checkpoint, "--domains", "svhn", "--figures-dir", "y/z"],
            "y/z: lies among the digits",
        ),
        (p2_ddpm_infer, [*generate, checkpoint, "--figures-dir", "y/svhn"], "y/svhn: lies among the digits"),
        (p2_ddpm_infer, [*generate, checkpoint, "--plain-one-hot"], "is no published ContextUnet"),
        (p2_ddpm_infer, [*generate, checkpoint, "--steps", 7], "--steps 7: must be 1 to 6"),
        (p2_ddpm_infer, [*generate, checkpoint, "--interval", 0.8, 0.2], "--interval 0.8 0.2: must rise"),
        (p2_ddpm_infer, [*generate, checkpoint, "--eta", 0.5], "--eta 0.5: must be 0 to 1, and 0 but for"),
        (p2_ddpm_infer, [*generate, checkpoint, "--large-sigma"], "--large-sigma: is for --sampler ddpm"),
        (p2_ddpm_infer, [*generate, checkpoint, "--guidance", "nan"], "--guidance and --guidance-sweep: must be"),
        (p2_ddpm_infer, [*generate, checkpoint, "--domains", "svhn", "svhn"], "--domains svhn svhn: each once"),
        (p2_ddpm_infer, [*generate, checkpoint, "--unit-range"], "whose images are in [-1, 1]"),
        (p2_ddpm_infer, [*generate, checkpoint, "--guidance-sweep", 1], "--guidance-sweep: needs --figures-dir"),
    ):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            command_line(Train if script is p2_ddpm_train else Generate, script.main)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert told in error
    assert not (tmp_path / "y").exists()
