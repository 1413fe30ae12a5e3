"""p3_dann.py and models/dann.py: independent formulas, honest training, resume, commands."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import p3_dann
from common.augment import augment_digits, of_3x3
from common.checkpoints import load_net, load_weights
from common.cli import UserError, run_cli
from common.device import make_accelerator
from common.files import ROOT
from common.rng import make_rng
from common.run import Run
from models.dann import NETS, DannCNN, DannDeep
from p3_dann import (
    ClassPrior,
    DomainAdversarial,
    Embed,
    Predict,
    Recipe,
    ReverseGradient,
    Table,
    Train,
    dann_losses,
    embed,
    lambda_at,
    predict,
    table,
    train,
)
from tests.golden import fill, image

GOLDEN_CLASSES = [
    -3.2987256,
    -2.4418471,
    -1.6666993,
    -1.5560194,
    -2.2089996,
    -3.1600661,
    -3.7140594,
    -3.4549489,
]
GOLDEN_DOMAINS = [-0.6458206, -0.7428253, -0.6462362, -0.7423676]


def small(data_dir: Path, name: str, **options) -> Train:
    """A run of two epochs of three steps."""
    defaults = {
        "net": "cnn",
        "epochs": 2,
        "images_per_epoch": 24,
        "batch_size": 8,
        "augmentation": 1.0,
        "device": "cpu",
        "precision": "fp32",
    }
    return Train(data_dir=data_dir, output_dir=data_dir.parent / name, **defaults | options)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_weights(folder / "model.safetensors")[0]


def assert_same_weights(one: Path, other: Path) -> None:
    a = weights_of(one)
    b = weights_of(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


# Method


def test_reversal_is_identity_forward_and_minus_lambda_backward():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 3, dtype=torch.float64)
    for lambd in (0.0, 0.3, 2.0):
        y = ReverseGradient.apply(x, lambd)
        assert torch.equal(y, x)
        (gradient,) = torch.autograd.grad((weights * y.sin()).sum(), x)
        torch.testing.assert_close(gradient, -lambd * weights * x.cos())


@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_one_backward_pass_gives_the_gradients_of_the_saddle_point(forward):
    """Equations 13 to 15: the extractor follows d(class)/dθ - λ d(domain)/dθ, a head its loss."""
    torch.manual_seed(0)
    net = DannDeep(width=4).double().eval()
    lambd = 0.7
    images = torch.randn(10, 3, 28, 28, dtype=torch.float64)
    labels = torch.arange(5)
    args = Recipe(output_dir=Path(), forward=forward, label_smoothing=0.0)
    losses = dann_losses(DomainAdversarial(net), images, labels, lambd, args, ClassPrior())
    (losses["class_loss"] + losses["domain_loss"]).backward()

    features = net.features(images)
    domains = torch.tensor([0] * 5 + [1] * 5)
    class_loss = F.cross_entropy(net.class_classifier(features[:5]), labels)
    domain_loss = F.cross_entropy(net.domain_classifier(features), domains)
    for name, parameter in net.named_parameters():
        of_class = gradient_of(class_loss, parameter)
        of_domain = gradient_of(domain_loss, parameter)
        sign = 1 if name.startswith("domain_classifier") else -lambd
        expected = of_class + sign * of_domain
        # The heads answer in float32.
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-9)


def gradient_of(loss: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The gradient of a loss, zeros if it does not depend on the parameter."""
    (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)
    return torch.zeros_like(parameter) if gradient is None else gradient


def test_source_images_are_weighted_by_the_targets_class_frequencies():
    torch.manual_seed(0)
    prior = ClassPrior(momentum=0.5)
    probabilities = torch.rand(8, 10).softmax(1)
    labels = torch.arange(10)
    torch.testing.assert_close(prior.weights(labels), torch.ones(10))
    prior.update(probabilities.log())
    frequencies = 0.05 + 0.5 * probabilities.mean(0)
    torch.testing.assert_close(prior.weights(labels), 10 * frequencies)
    expected = 2 * frequencies[:2] / frequencies[:2].sum()
    torch.testing.assert_close(prior.weights(labels[:2]), expected)
    for trust, expected in ((0.0, torch.ones(10)), (0.5, 0.5 + 5 * frequencies)):
        prior.trust = trust
        torch.testing.assert_close(prior.weights(labels), expected)

    net = DomainAdversarial(DannDeep(width=4)).eval()
    args = Recipe(output_dir=Path(), forward="joint")
    images = torch.randn(10, 3, 28, 28)
    with torch.inference_mode():
        _, domains = net(images, 0.0)
        weights = prior.weights(labels[:5])
        losses = dann_losses(net, images, labels[:5], 1.0, args, prior)
    expected = -((weights * domains[:5, 0]).sum() + domains[5:, 1].sum()) / 10
    torch.testing.assert_close(losses["domain_loss"], expected)


def test_lambda_is_a_function_of_progress_only():
    assert lambda_at(0.0, 1.0) == 0.0
    # 2 / (1 + exp(-10 p)) - 1 = tanh(5 p)
    assert lambda_at(0.5, 0.3) == pytest.approx(0.3 * math.tanh(2.5))
    assert lambda_at(1.0, 1.0) == pytest.approx(math.tanh(5))


def test_dann_cnn_has_the_published_keys_and_outputs():
    net = fill(DannCNN())
    published = json.loads((ROOT / "tests/golden/dann_cnn.json").read_text())
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == published
    with torch.inference_mode():
        classes, domains = DomainAdversarial(net)(image(2, 3, 28), 0.0)
    # Golden outputs are stated to 1e-7 in float32; 1e-4 allows for another order of the sums.
    assert classes.flatten()[:8].tolist() == pytest.approx(GOLDEN_CLASSES, rel=1e-4)
    assert domains.flatten().tolist() == pytest.approx(GOLDEN_DOMAINS, rel=1e-4)


@pytest.mark.parametrize("net", [DannCNN(), DannDeep()])
def test_nets_give_log_probabilities(net):
    images = torch.randn(3, 3, 28, 28)
    classes, domains = DomainAdversarial(net).eval()(images, 0.0)
    assert torch.equal(net(images), classes)
    assert (classes.shape, domains.shape) == ((3, 10), (3, 2))
    torch.testing.assert_close(classes.exp().sum(1), torch.ones(3))
    torch.testing.assert_close(domains.exp().sum(1), torch.ones(3))


def test_deep_net_ignores_brightness_and_contrast():
    torch.manual_seed(0)
    net = DannDeep().eval()
    images = torch.rand(4, 3, 28, 28)
    # 1e-3 is for the epsilon of the normalisation.
    torch.testing.assert_close(net(0.5 * images + 0.2), net(images), rtol=1e-3, atol=1e-3)


def test_augmentation_keeps_shape_depends_on_the_generator_and_can_be_off():
    images = torch.rand(16, 3, 28, 28) * 2 - 1
    assert augment_digits(images, make_rng(0), 0.0) is images
    one, same, other = (augment_digits(images, make_rng(seed), 1.0) for seed in (0, 0, 1))
    assert one.shape == images.shape
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_3x3_neighbourhoods_agree_with_pooling():
    images = torch.randn(5, 3, 28, 28)
    wide = F.pad(images, (1, 1, 1, 1), mode="replicate")
    assert torch.equal(of_3x3(images, torch.maximum), F.max_pool2d(wide, 3, 1))
    torch.testing.assert_close(of_3x3(images, torch.add) / 9, F.avg_pool2d(wide, 3, 1))


# Honesty


@pytest.mark.parametrize("method", ["source", "dann", "target"])
def test_target_labels_are_read_by_target_only_training_alone(data_dir, method):
    train(small(data_dir, "before", method=method))
    file = data_dir / "digits/svhn/train.csv"
    header, *rows = file.read_text().splitlines()
    shuffled = [header]
    for row in rows:
        name, label = row.split(",")
        shuffled.append(f"{name},{(int(label) * 7 + 3) % 10}")
    file.write_text("\n".join(shuffled) + "\n")
    train(small(data_dir, "after", method=method))
    one = weights_of(data_dir.parent / "before")
    other = weights_of(data_dir.parent / "after")
    are_equal = all(torch.equal(one[key], other[key]) for key in one)
    assert are_equal == (method != "target")


def test_source_only_training_does_not_depend_on_the_target(data_dir):
    train(small(data_dir, "one", method="source", target="svhn"))
    result = train(small(data_dir, "two", method="source", target="usps"))
    assert_same_weights(data_dir.parent / "one", data_dir.parent / "two")
    assert set(result["accuracy"]) == {"mnistm", "svhn", "usps"}
    assert result["grey"] == {"mnistm": False, "svhn": False, "usps": True}


def test_training_learns_and_records_every_epoch(data_dir):
    args = small(data_dir, "run", epochs=30, lr=3e-3, augmentation=0.0, target="usps")
    result = train(args)
    folder = data_dir.parent / "run"
    # The label can be seen in the images' corner; chance is 10 %.
    assert result["accuracy"]["mnistm"] >= 60
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 31))
    columns = {
        "lambda",
        "learning_rate",
        "class_loss",
        "class_accuracy",
        "domain_loss",
        "domain_accuracy",
        "accuracy_usps",
    }
    assert all(columns <= row.keys() for row in rows)
    assert rows[-1]["class_loss"] < rows[0]["class_loss"]
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["accuracy"]["usps"] == rows[-1]["accuracy_usps"]  # the last epoch, not the best
    assert result["oracle_best_accuracy"]["usps"] == max(row["accuracy_usps"] for row in rows)
    assert Image.open(folder / "figures" / "curves.png").size[0] > 500


# Resume


def command(args: Train) -> list[str]:
    """The command line of a run."""
    words = [sys.executable, str(ROOT / "p3_dann.py"), "train"]
    for name, value in vars(args).items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def rows_of(folder: Path) -> list[str]:
    """The lines of metrics.jsonl so far."""
    file = folder / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def test_killed_and_interrupted_runs_end_in_the_same_weights(data_dir):
    whole = small(data_dir, "whole", epochs=100)
    train(whole)
    cut = replace(whole, output_dir=data_dir.parent / "cut")
    for sent, code in (
        (signal.SIGKILL, -signal.SIGKILL),
        (signal.SIGINT, 128 + signal.SIGINT),
    ):
        seen = len(rows_of(cut.output_dir))
        process = subprocess.Popen(
            command(cut), cwd=data_dir, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while len(rows_of(cut.output_dir)) < seen + 3:  # a few more epochs
            assert time.monotonic() < deadline, "no epoch within a minute"
            time.sleep(0.01)
        process.send_signal(sent)
        assert process.wait(60) == code
        assert not (cut.output_dir / "result.json").exists()
    train(cut)
    assert "continuing" in (cut.output_dir / "log.txt").read_text()
    assert_same_weights(whole.output_dir, cut.output_dir)
    assert rows_of(whole.output_dir) == rows_of(cut.output_dir)


def test_a_run_resumes_in_the_middle_of_an_epoch(data_dir, stop_in_step_1):
    whole = small(data_dir, "whole")
    cut = small(data_dir, "cut")
    train(whole)
    stop_in_step_1(train, cut)
    assert torch.load(cut.output_dir / "last.pt", weights_only=True)["step"] == 2
    train(cut)
    assert_same_weights(whole.output_dir, cut.output_dir)
    assert rows_of(whole.output_dir)[0] == rows_of(cut.output_dir)[0]


def test_a_finished_run_stops_at_once_and_other_arguments_are_refused(data_dir, capsys):
    first = train(small(data_dir, "run"))
    capsys.readouterr()
    assert train(small(data_dir, "run")) == first
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--lr was 0.001, is 0.01\b"):
        train(small(data_dir, "run", lr=0.01))


def test_two_processes_train_and_write_one_run(data_dir):
    args = small(data_dir, "run")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    python, *words = command(args)
    done = subprocess.run(
        [python, *torchrun, *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((args.output_dir / "config.json").read_text())
    assert config["hardware"]["processes"] == 2
    assert len((args.output_dir / "metrics.jsonl").read_text().splitlines()) == 2
    assert (args.output_dir / "log.txt").read_text().count("epoch 2,") == 1
    assert all(value.isfinite().all() for value in weights_of(args.output_dir).values())
    assert not list(args.output_dir.glob(".*"))
    result = json.loads((args.output_dir / "result.json").read_text())
    assert result["accuracy"].keys() == {"svhn", "mnistm"}


# Commands


@pytest.fixture
def checkpoint(data_dir) -> Path:
    train(small(data_dir, "trained", target="usps"))
    return data_dir.parent / "trained" / "model.safetensors"


def test_predict_writes_the_graders_csv(checkpoint, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (28, 28), 128).save(folder / "b.png")
    Image.new("L", (40, 30), 128).save(folder / "a.jpg")
    Image.new("RGB", (16, 16), 128).save(folder / "c.jpeg")
    (folder / "notes.txt").touch()
    file = tmp_path / "new" / "out.csv"
    predict(Predict(checkpoint=checkpoint, image_dir=folder, output_csv=file))
    expected = r"image_name,label\na.jpg,\d\nb.png,\d\nc.jpeg,\d\n"
    assert re.fullmatch(expected, file.read_text())


def test_predict_with_a_published_checkpoint_agrees_with_the_net(data_dir, tmp_path):
    net = fill(DannCNN())
    weights = {f"module.{key}": value for key, value in net.state_dict().items()}
    checkpoint = tmp_path / "x.pth"
    torch.save({"state_dict": weights}, checkpoint)
    folder = data_dir / "digits/mnistm/data"
    predict(Predict(checkpoint=checkpoint, image_dir=folder, output_csv=tmp_path / "out.csv"))
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image_name"] for row in rows] == [f"{i:05d}.png" for i in range(90)]
    arrays = [np.asarray(Image.open(folder / row["image_name"])) for row in rows]
    pixels = np.stack(arrays).transpose(0, 3, 1, 2)
    with torch.inference_mode():
        expected = net(torch.from_numpy(pixels / 127.5 - 1).float()).argmax(1)
    assert [int(row["label"]) for row in rows] == expected.tolist()


def test_a_wider_deep_net_is_built_from_its_file(data_dir, tmp_path):
    run = Run(small(data_dir, "wide"), make_accelerator("cpu", "fp32"))
    net = DannDeep(width=8)
    run.save_model(net, net.config)
    loaded, config = load_net(run.dir / "model.safetensors", NETS)
    assert config["arguments"]["width"] == 8
    weights = net.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in loaded.state_dict().items())


def test_warnings_of_a_collapse(data_dir, capsys):
    args = small(data_dir, "run")
    run = Run(args, make_accelerator("cpu", "fp32"))
    run.load_state({})
    good = {"step": 1, "epoch": 1, "class_accuracy": 0.9, "domain_accuracy": 0.6}
    p3_dann.end_epoch(run, args, DannCNN(), {}, good)
    assert "warning" not in capsys.readouterr().out
    bad = {"step": 2, "epoch": 2, "class_accuracy": 0.8, "domain_accuracy": 0.99}
    p3_dann.end_epoch(run, args, DannCNN(), {}, bad)
    printed = capsys.readouterr().out
    assert "class accuracy fell by 5 points" in printed
    assert "domain accuracy is 99%" in printed


def test_embed_draws_both_figures_and_keeps_the_features(checkpoint, data_dir, tmp_path):
    embed(
        Embed(
            checkpoint=checkpoint,
            data_dir=data_dir,
            output_dir=tmp_path / "figures",
            per_domain=20,
            device="cpu",
        )
    )
    arrays = np.load(tmp_path / "figures" / "features.npz")
    assert arrays["features"].shape == (40, 800)
    assert arrays["points"].shape == (40, 2)
    assert arrays["domain"].tolist() == [0] * 20 + [1] * 20
    for name in ("tsne_class", "tsne_domain"):
        assert Image.open(tmp_path / "figures" / f"{name}.png").size[0] > 500
        assert (tmp_path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_table_holds_our_runs_and_the_reports(data_dir, monkeypatch):
    monkeypatch.setitem(p3_dann.RECIPES["cnn"], "epochs", 1)
    output = data_dir.parent / "p3"
    table(
        Table(
            data_dir=data_dir,
            output_dir=output,
            nets=("cnn",),
            seeds=(0, 1),
            device="cpu",
            images_per_epoch=128,
        )
    )
    with (output / "table.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == ["mnistm → svhn, %", "mnistm → usps, %"]
    assert [row[0] for row in rows[1:]] == [
        "trained on source, cnn net",
        "adapted by DANN, cnn net",
        "trained on target, cnn net",
        "trained on source, the reports",
        "adapted by DANN, the reports",
        "trained on target, the reports",
    ]
    values = []
    for seed in (0, 1):
        file = output / f"usps-cnn-dann-seed{seed}/result.json"
        values.append(json.loads(file.read_text())["accuracy"]["usps"])
    assert rows[2][2] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    assert rows[5][1:] == ["42.06 / 49.60 / 61.57", "82.51 / 82.60 / 89.05"]
    assert Image.open(output / "table.png").size[0] > 500
    assert (output / "table.md").read_text().count("\n") == 8


def run_command(monkeypatch, capsys, *words: object) -> str:
    """Run p3_dann.py in this process; it must end with status 2 and one line, which is returned."""
    monkeypatch.setattr(sys, "argv", ["p3_dann.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        run_cli(Train | Predict | Embed | Table, p3_dann.main)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_bad_input_is_one_line_and_status_2(data_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    torch.save({"conv.weight": torch.ones(1)}, tmp_path / "other.pth")
    (tmp_path / "hostile.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:300])
    torch.save(DannCNN().state_dict(), tmp_path / "good.pth")
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    csv_file = tmp_path / "out.csv"
    to_train = ["train", "--output-dir", "run", "--data-dir"]
    to_predict = ["predict", "--output-csv", csv_file, "--image-dir"]
    into_file = ["--output-csv", "file/x.csv"]
    for words, message in (
        ([*to_train, "none"], "--data-dir none: has no digit domain 'mnistm'"),
        ([*to_train, data_dir, "--target", "mars"], "has no digit domain 'mars'"),
        (
            ["train", "--data-dir", data_dir, "--output-dir", "file/x"],
            "--output-dir file/x: cannot be written",
        ),
        ([*to_train, data_dir, "--batch-size", 0], "--batch-size 0"),
        ([*to_train, data_dir, "--epochs", 0], "--epochs 0"),
        ([*to_train, data_dir, "--lr", -1], "--lr -1.0: must be above 0"),
        (
            [*to_train, data_dir, "--ema-decay", 1],
            "--ema-decay 1.0: must be at least 0 and below 1",
        ),
        (["table", "--output-dir", "run", "--data-dir", data_dir, "--seeds"], "--seeds"),
        ([*to_predict, data_dir, "--checkpoint", "x.pth"], "x.pth: no such file"),
        ([*to_predict, data_dir, "--checkpoint", "cut.pth"], "cut.pth: not a whole file"),
        ([*to_predict, data_dir, "--checkpoint", "other.pth"], "other.pth: is not this DannCNN"),
        ([*to_predict, "empty", "--checkpoint", "good.pth"], "empty: contains no PNG or JPEG"),
        ([*to_predict, "hostile", "--checkpoint", "hostile.pth"], "hostile.pth: not a whole file"),
        (
            ["predict", "--image-dir", data_dir, "--checkpoint", "good.pth", *into_file],
            "--output-csv",
        ),
        ([*to_predict, "nowhere", "--checkpoint", "good.pth"], "nowhere: no such folder"),
        (
            ["embed", "--checkpoint", "good.pth", "--output-dir", "run"],
            "does not say its two domains",
        ),
    ):
        assert message in run_command(monkeypatch, capsys, *words)
    assert not any((tmp_path / "run").iterdir())
    assert not csv_file.exists()


def test_the_script_says_its_error_and_its_help_from_a_shell():
    done = subprocess.run(
        [sys.executable, ROOT / "p3_dann.py", "train", "--output-dir", os.devnull],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
