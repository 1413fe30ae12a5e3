"""p3_dann.py and models/dann.py: the method against independent formulas, honesty, exact resume."""

import copy
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
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import p3_dann
from common.checkpoints import load_net, load_weights
from common.classification import accuracy
from common.cli import UserError
from common.device import make_accelerator
from common.files import ROOT
from common.run import Run
from common.target_losses import confusion_loss, infomax_loss
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
from tests.conftest import save_net
from tests.golden import fill, image

GOLDEN_CLASSES = [
    *(-3.2987256, -2.4418471, -1.6666993, -1.5560194),
    *(-2.2089996, -3.1600661, -3.7140594, -3.4549489),
]
GOLDEN_DOMAINS = [-0.6458206, -0.7428253, -0.6462362, -0.7423676]


def small(data_dir: Path, name: str, **options: Any) -> Train:
    """Arguments of a run of two epochs of three steps."""
    defaults = {
        "net": "cnn",
        "epochs": 2,
        "images_per_epoch": 24,
        "batch_size": 8,
        "augmentation": 1.0,
        "device": "cpu",
        "precision": "fp32",
    }
    output_dir = data_dir.parent / name
    return Train(data_dir=data_dir, output_dir=output_dir, **defaults | options)


def same_weights(one: Path, other: Path) -> bool:
    """Whether the models of two run directories are the same."""
    weights, _ = load_weights(one / "model.safetensors")
    others, _ = load_weights(other / "model.safetensors")
    assert weights.keys() == others.keys()
    return all(torch.equal(value, others[key]) for key, value in weights.items())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# The method


@pytest.mark.parametrize("lambd", [0.0, 0.3, 2.0])
def test_reversal_is_the_identity_forward_and_minus_lambda_backward(lambd):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 3, dtype=torch.float64)
    y = ReverseGradient.apply(x, lambd)
    assert torch.equal(y, x)
    (gradient,) = torch.autograd.grad((weights * y.sin()).sum(), x)
    torch.testing.assert_close(gradient, -lambd * weights * x.cos())


def gradient_or_zero(loss: Tensor, parameter: Tensor) -> Tensor:
    """The gradient of a loss, which may not depend on the parameter."""
    (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)
    return torch.zeros_like(parameter) if gradient is None else gradient


def test_the_domain_classifier_sees_both_domains_at_once():
    """Also where the rest of the network sees one after the other."""
    torch.manual_seed(0)
    net = DannDeep(width=4).train()
    images = torch.randn(10, 3, 28, 28)
    source, target = images[:6], images[6:]
    labels = torch.arange(6)
    bare = copy.deepcopy(net)
    torch.manual_seed(1)  # the same dropout in both
    class_log_p, domain_log_p = DomainAdversarial(net)(images, 1.0, sizes=(6, 4))
    torch.manual_seed(1)
    features = [bare.features(part) for part in (source, target)]
    expected = torch.cat([bare.classify(part) for part in features])
    torch.testing.assert_close(class_log_p, expected)
    torch.testing.assert_close(domain_log_p, bare.discriminate(torch.cat(features)))

    class Recorder(torch.nn.Module):
        def forward(self, images, lambd, sizes=()):
            self.sizes = sizes
            return torch.zeros(len(images), 10), torch.zeros(len(images), 2)

    recorder = Recorder()
    for forward, sizes in (("separate", (6, 4)), ("joint", ())):
        args = Recipe(output_dir=Path(), forward=forward)
        dann_losses(recorder, images, labels, 1.0, args, ClassPrior())
        assert recorder.sizes == sizes
    dann_losses(recorder, source, labels, 1.0, replace(args, forward="separate"), ClassPrior())
    assert recorder.sizes == ()


@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_one_backward_pass_gives_the_gradients_of_the_saddle_point(forward):
    """Equations 13 to 15: the extractor descends class loss - λ · domain loss.

    Each of the two classifiers descends its own loss.
    """
    torch.manual_seed(0)
    net = DannDeep(width=4).double().eval()
    lambd = 0.7
    images = torch.randn(10, 3, 28, 28, dtype=torch.float64)
    labels = torch.arange(5)  # of the first half; the second half is the target
    args = Recipe(output_dir=Path(), forward=forward, label_smoothing=0.0)
    losses = dann_losses(DomainAdversarial(net), images, labels, lambd, args, ClassPrior())
    (losses["class_loss"] + losses["domain_loss"]).backward()

    features = net.features(images)
    class_loss = F.cross_entropy(net.class_classifier(features[:5]), labels)
    domains = torch.tensor([0] * 5 + [1] * 5)
    domain_loss = F.cross_entropy(net.domain_classifier(features), domains)
    for name, parameter in net.named_parameters():
        of_class = gradient_or_zero(class_loss, parameter)
        of_domain = gradient_or_zero(domain_loss, parameter)
        sign = 1 if name.startswith("domain_classifier") else -lambd
        expected = of_class + sign * of_domain
        # The log-probabilities of both classifiers are float32.
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-9)


@pytest.fixture
def prior_and_frequencies() -> tuple[ClassPrior, Tensor]:
    """A prior after one update from equal frequencies, and its class frequencies by formula."""
    torch.manual_seed(0)
    prior = ClassPrior(momentum=0.5)
    torch.testing.assert_close(prior.weights(torch.arange(10)), torch.ones(10))
    probabilities = torch.rand(8, 10).softmax(1)
    prior.update(probabilities.log())
    return prior, 0.05 + 0.5 * probabilities.mean(0)


def test_source_images_are_weighted_by_how_frequent_their_class_is(prior_and_frequencies):
    prior, frequencies = prior_and_frequencies
    labels = torch.arange(10)
    torch.testing.assert_close(prior.weights(labels), 10 * frequencies)
    two = 2 * frequencies[:2] / frequencies[:2].sum()  # 1 on average in any batch
    torch.testing.assert_close(prior.weights(labels[:2]), two)
    prior.trust = 0.5
    torch.testing.assert_close(prior.weights(labels), 0.5 + 5 * frequencies)
    prior.trust = 0.0
    torch.testing.assert_close(prior.weights(labels), torch.ones(10))


def test_the_domain_loss_has_the_weights_of_the_prior(prior_and_frequencies):
    prior, _ = prior_and_frequencies
    net = DomainAdversarial(DannDeep(width=4).eval())
    args = Recipe(output_dir=Path(), forward="joint")
    images = torch.randn(10, 3, 28, 28)
    labels = torch.arange(5)
    weights = prior.weights(labels)
    with torch.inference_mode():
        _, domains = net(images, 1.0)
        losses = dann_losses(net, images, labels, 1.0, args, prior)
    expected = -((weights * domains[:5, 0]).sum() + domains[5:, 1].sum()) / 10
    torch.testing.assert_close(losses["domain_loss"], expected)


def test_a_grey_network_does_not_see_colour():
    net = DannDeep(width=4, grey=True).eval()
    images = torch.rand(3, 3, 28, 28) * 2 - 1
    moved = torch.rand(3, 1, 28, 28) * 2 - 1
    recoloured = images + torch.cat([moved, -moved, torch.zeros_like(moved)], 1)
    with torch.inference_mode():
        torch.testing.assert_close(net(recoloured), net(images), atol=1e-6, rtol=1e-5)
        net.grey = False
        assert (net(recoloured) - net(images)).abs().max() > 1e-4
    assert net.config["arguments"] == {"classes": 10, "width": 4, "grey": True}


def test_infomax_and_confusion_read_the_target_only():
    """Their values are those of the target's scores, each only if it is asked for."""
    net = DomainAdversarial(DannDeep(width=4).eval())
    images = torch.randn(9, 3, 28, 28)
    labels = torch.arange(5)
    with torch.inference_mode():
        log_p, _ = net(images, 1.0)
        for options in ({}, {"infomax": True}, {"mcc": True}, {"infomax": True, "mcc": True}):
            args = Recipe(output_dir=Path(), forward="joint", **options)
            losses = dann_losses(net, images, labels, 1.0, args, ClassPrior())
            assert ("infomax_loss" in losses) == ("infomax" in options)
            assert ("confusion_loss" in losses) == ("mcc" in options)
    torch.testing.assert_close(losses["infomax_loss"], infomax_loss(log_p[5:]))
    torch.testing.assert_close(losses["confusion_loss"], confusion_loss(log_p[5:]))


def test_lambda_is_a_function_of_progress_only():
    """2 / (1 + exp(-10 p)) - 1 is tanh(5 p)."""
    assert lambda_at(0.0, 1.0) == 0.0
    assert lambda_at(0.5, 0.3) == pytest.approx(0.3 * math.tanh(2.5))
    assert lambda_at(1.0, 1.0) == pytest.approx(math.tanh(5))


# Networks


def test_dann_cnn_has_the_published_keys_and_outputs():
    net = fill(DannCNN())
    published = json.loads((ROOT / "tests/golden/dann_cnn.json").read_text())
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == published
    x = image(2, 3, 28)
    with torch.inference_mode():
        classes = net(x).flatten()
        domains = net.discriminate(net.features(x)).flatten()
    # Golden outputs are recorded to 1e-7 in float32; 1e-4 allows for another order of the sums.
    assert classes[:8].tolist() == pytest.approx(GOLDEN_CLASSES, rel=1e-4)
    assert domains.tolist() == pytest.approx(GOLDEN_DOMAINS, rel=1e-4)


@pytest.mark.parametrize("net", [DannCNN(), DannDeep()])
def test_networks_return_log_probabilities(net):
    classes, domains = DomainAdversarial(net.eval())(torch.randn(3, 3, 28, 28), 1.0)
    assert classes.shape == (3, 10)
    assert domains.shape == (3, 2)
    torch.testing.assert_close(classes.exp().sum(1), torch.ones(3))
    torch.testing.assert_close(domains.exp().sum(1), torch.ones(3))


def test_the_deep_network_ignores_brightness_and_contrast():
    torch.manual_seed(0)
    net = DannDeep().eval()
    images = torch.rand(4, 3, 28, 28)
    # The epsilon of the normalisation is the only difference.
    torch.testing.assert_close(net(0.5 * images + 0.2), net(images), rtol=1e-3, atol=1e-3)


def test_a_wider_deep_network_is_built_from_its_file(tmp_path):
    net = DannDeep(width=8)
    file = save_net(net, tmp_path / "model.safetensors")
    loaded, config = load_net(file, NETS)
    assert config["arguments"]["width"] == 8
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, net.state_dict()[key])


# Honesty


@pytest.mark.parametrize(
    ("method", "select"),
    [("source", "last"), ("dann", "last"), ("dann", "infomax"), ("target", "last")],
)
def test_only_training_on_the_target_reads_its_labels(data_dir, method, select):
    train(small(data_dir, "before", method=method, select=select))
    file = data_dir / "digits/svhn/train.csv"
    header, *rows = file.read_text().splitlines()
    lines = [header]
    for row in rows:
        name, label = row.split(",")
        lines.append(f"{name},{(int(label) * 7 + 3) % 10}")
    file.write_text("\n".join(lines) + "\n")
    train(small(data_dir, "after", method=method, select=select))
    same = same_weights(data_dir.parent / "before", data_dir.parent / "after")
    assert same == (method != "target")


def test_a_target_without_labels_is_adapted_to_but_not_measured(data_dir, capsys):
    labelled = small(data_dir, "labelled")
    train(labelled)
    for split in ("train", "val"):
        file = data_dir / "digits" / "svhn" / f"{split}.csv"
        names = [line.split(",")[0] for line in file.read_text().splitlines()]
        file.write_text("".join(f"{name}\n" for name in names))
    capsys.readouterr()
    unlabelled = small(data_dir, "unlabelled")
    result = train(unlabelled)
    assert "note: svhn: val has no labels" in capsys.readouterr().out
    assert list(result["accuracy"]) == ["mnistm"]
    assert same_weights(labelled.output_dir, unlabelled.output_dir)
    with pytest.raises(UserError, match=r"svhn/train.csv: line 1 is 'image_name', expected"):
        train(small(data_dir, "upper", method="target"))


def test_a_file_that_no_csv_lists_does_not_matter(data_dir):
    train(small(data_dir, "before", method="source"))
    folder = data_dir / "digits" / "mnistm" / "data"
    (folder / "odd.png").write_bytes(b"no image")
    os.mkfifo(folder / "pipe.png")
    train(small(data_dir, "after", method="source"))
    assert same_weights(data_dir.parent / "before", data_dir.parent / "after")


def test_training_on_the_source_does_not_depend_on_the_target(data_dir):
    train(small(data_dir, "svhn", method="source", target="svhn"))
    result = train(small(data_dir, "usps", method="source", target="usps"))
    assert same_weights(data_dir.parent / "svhn", data_dir.parent / "usps")
    assert set(result["accuracy"]) == {"mnistm", "svhn", "usps"}
    assert result["grey"] == {"mnistm": False, "svhn": False, "usps": True}


def test_training_learns_and_records_every_epoch(data_dir):
    args = small(data_dir, "run", epochs=30, lr=3e-3, augmentation=0.0, target="usps")
    result = train(args)
    # The corner of an image shows its label; chance is 10 %.
    assert result["accuracy"]["mnistm"] >= 60
    rows = read_metrics(args.output_dir)
    assert [row["epoch"] for row in rows] == list(range(1, 31))
    columns = {"lambda", "learning_rate", "accuracy_usps", "source_accuracy", "infomax", "snd"}
    columns |= {"class_loss", "class_accuracy", "domain_loss", "domain_accuracy"}
    for row in rows:
        assert columns <= row.keys()
    assert rows[-1]["class_loss"] < rows[0]["class_loss"]
    assert json.loads((args.output_dir / "result.json").read_text()) == result
    assert Image.open(args.output_dir / "figures" / "curves.png").size[0] > 500

    # The result is the last epoch's, not the best one's.
    recorded = [row["accuracy_usps"] for row in rows]
    assert result["accuracy"]["usps"] == recorded[-1]
    assert result["oracle_best_accuracy"]["usps"] == max(recorded)


def test_fewer_images_can_measure_an_epoch(data_dir, monkeypatch):
    seen = []
    accuracy = p3_dann.accuracy

    def spy(net, images, accelerator):
        seen.append(len(images.names))
        return accuracy(net, images, accelerator)

    monkeypatch.setattr(p3_dann, "accuracy", spy)
    train(small(data_dir, "all"))
    assert max(seen) > 5
    seen.clear()
    train(small(data_dir, "few", measured_images=5))
    assert set(seen) == {5}
    assert same_weights(data_dir.parent / "all", data_dir.parent / "few")


@pytest.mark.parametrize("criterion", ["source_accuracy", "corr_c"])
def test_the_selected_epoch_is_the_first_with_the_largest_value(data_dir, criterion):
    args = small(data_dir, "run", epochs=6, lr=3e-3, target="usps", select=criterion)
    result = train(args)
    rows = read_metrics(args.output_dir)
    values = [row[criterion] for row in rows]
    assert result["select"] == criterion
    assert result["epoch"] == rows[values.index(max(values))]["epoch"]
    assert result["accuracy"]["usps"] == rows[result["epoch"] - 1]["accuracy_usps"]
    net, _ = load_net(args.output_dir / "model.safetensors", NETS)
    data = p3_dann.load_data(args)
    found = accuracy(net, data.validation["usps"], make_accelerator("cpu", "fp32"))
    assert found == pytest.approx(result["accuracy"]["usps"])


# Resume


def command_of(args: Train) -> list[str]:
    """The words after `python` that train with these arguments."""
    words = [str(ROOT / "p3_dann.py"), "train"]
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag] if value else []
        elif value is not None and value != ():
            words += [flag, str(value)]
    return words


def wait_for_epochs(folder: Path, count: int) -> None:
    """Wait until a training has recorded this many epochs."""
    file = folder / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if file.exists() and len(file.read_text().splitlines()) >= count:
            return
        time.sleep(0.01)
    pytest.fail(f"{count} epochs are not recorded within a minute")


def test_killed_and_interrupted_runs_end_in_the_same_weights(data_dir):
    whole = small(data_dir, "whole", epochs=25)
    train(whole)
    cut = replace(whole, output_dir=data_dir.parent / "cut")
    command = [sys.executable, *command_of(cut)]
    epochs = 0
    for sent, status in (
        (signal.SIGKILL, -signal.SIGKILL),
        (signal.SIGINT, 128 + signal.SIGINT),
    ):
        process = subprocess.Popen(
            command, cwd=data_dir, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for_epochs(cut.output_dir, epochs + 3)
        process.send_signal(sent)
        assert process.wait(60) == status
        assert not (cut.output_dir / "result.json").exists()
        epochs = len((cut.output_dir / "metrics.jsonl").read_text().splitlines())
    train(cut)
    assert "continuing" in (cut.output_dir / "log.txt").read_text()
    assert same_weights(whole.output_dir, cut.output_dir)
    assert read_metrics(whole.output_dir) == read_metrics(cut.output_dir)


def test_a_run_resumes_in_the_middle_of_an_epoch(data_dir, stop_in_step_1):
    whole = small(data_dir, "whole")
    cut = small(data_dir, "cut")
    train(whole)
    stop_in_step_1(train, cut)
    assert torch.load(cut.output_dir / "last.pt", weights_only=True)["step"] == 2
    train(cut)
    assert same_weights(whole.output_dir, cut.output_dir)
    assert read_metrics(whole.output_dir)[0] == read_metrics(cut.output_dir)[0]


def test_a_finished_run_stops_at_once_and_other_arguments_are_refused(data_dir, capsys):
    first = train(small(data_dir, "run"))
    capsys.readouterr()
    assert train(small(data_dir, "run")) == first
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--lr was 0.001, is 0.01\b"):
        train(small(data_dir, "run", lr=0.01))


def test_a_run_that_is_older_than_some_options_is_still_the_same_run(data_dir):
    first = train(small(data_dir, "run"))
    file = small(data_dir, "run").output_dir / "config.json"
    config = json.loads(file.read_text())
    for name in ("neighbours", "tint", "grey", "mcc", "infomax"):
        del config["arguments"][name]
    file.write_text(json.dumps(config))
    assert train(small(data_dir, "run")) == first


def test_options_of_dann_do_not_reach_the_other_rows_of_the_table(data_dir, tmp_path):
    options = {"mcc": True, "neighbours": 0.5, "images_per_epoch": 24, "batch_size": 8, "epochs": 1}
    out = tmp_path / "table"
    table(Table(data_dir=data_dir, output_dir=out, targets=("usps",), seeds=(0,), **options))
    found = {}
    for method in ("source", "dann", "target"):
        (file,) = out.glob(f"*-{method}-seed0/config.json")
        arguments = json.loads(file.read_text())["arguments"]
        found[method] = (arguments["mcc"], arguments["neighbours"])
    assert found == {"source": (False, 0.5), "dann": (True, 0.5), "target": (False, 0.0)}
    with pytest.raises(UserError, match="--mcc: goes with --method dann, not source"):
        Train(output_dir=out, method="source", mcc=True)


def test_two_processes_train_and_write_one_run(data_dir):
    args = small(data_dir, "run")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc_per_node", "2", *command_of(args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    config = json.loads((args.output_dir / "config.json").read_text())
    assert config["hardware"]["processes"] == 2
    assert len(read_metrics(args.output_dir)) == 2
    assert (args.output_dir / "log.txt").read_text().count("epoch 2,") == 1
    weights, _ = load_weights(args.output_dir / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert not list(args.output_dir.glob(".*"))
    result = json.loads((args.output_dir / "result.json").read_text())
    assert result["accuracy"].keys() == {"svhn", "mnistm"}


def test_a_collapse_is_reported(data_dir, capsys):
    args = small(data_dir, "run")
    run = Run(args, make_accelerator("cpu", "fp32"))
    run.load_state({})
    net = DannCNN()
    data = p3_dann.load_data(args)
    good = {"step": 1, "epoch": 1, "class_accuracy": 0.9, "domain_accuracy": 0.6}
    p3_dann.end_epoch(run, args, net, copy.deepcopy(net), data, good)
    assert "warning" not in capsys.readouterr().out
    bad = {"step": 2, "epoch": 2, "class_accuracy": 0.8, "domain_accuracy": 0.99}
    p3_dann.end_epoch(run, args, net, copy.deepcopy(net), data, bad)
    printed = capsys.readouterr().out
    assert "class accuracy fell by 5 points" in printed
    assert "domain accuracy is 99%" in printed


# Other commands


def test_predict_writes_the_graders_csv(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (28, 28), 128).save(folder / "b.png")
    Image.new("L", (40, 30), 128).save(folder / "a.jpg")
    Image.new("RGB", (16, 16), 128).save(folder / "c.jpeg")
    (folder / "notes.txt").touch()
    checkpoint = save_net(DannCNN(), tmp_path / "model.safetensors")
    output_csv = tmp_path / "new" / "out.csv"
    predict(Predict(checkpoint=checkpoint, image_dir=folder, output_csv=output_csv))
    text = output_csv.read_text()
    assert re.fullmatch(r"image_name,label\na.jpg,\d\nb.png,\d\nc.jpeg,\d\n", text)


def test_predict_quotes_odd_names_as_csv_readers_expect(tmp_path):
    names = ["a,b.png", 'a"b.png', "a\nb.webp", os.fsdecode(b"caf\xe9.png")]
    folder = tmp_path / "images"
    folder.mkdir()
    for name in names:
        Image.new("RGB", (28, 28)).save(folder / name, "png")
    checkpoint = save_net(DannCNN(), tmp_path / "net.safetensors")
    predict(Predict(checkpoint=checkpoint, image_dir=folder, output_csv=tmp_path / "pred.csv"))
    with (tmp_path / "pred.csv").open(newline="", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image_name", "label"]
    assert sorted(name for name, _ in rows[1:]) == sorted(names)


def test_predict_with_a_published_checkpoint_agrees_with_the_network(data_dir, tmp_path):
    net = fill(DannCNN())
    weights = {f"module.{key}": value for key, value in net.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "x.pth")
    folder = data_dir / "digits/mnistm/data"
    output_csv = tmp_path / "out.csv"
    predict(Predict(checkpoint=tmp_path / "x.pth", image_dir=folder, output_csv=output_csv))
    with output_csv.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image_name"] for row in rows] == [f"{number:05d}.png" for number in range(90)]

    arrays = [np.asarray(Image.open(folder / row["image_name"])) for row in rows]
    images = torch.from_numpy(np.stack(arrays).transpose(0, 3, 1, 2) / 127.5 - 1).float()
    with torch.inference_mode():
        expected = net(images).argmax(1)
    assert [int(row["label"]) for row in rows] == expected.tolist()


def test_embed_draws_both_plots_and_keeps_the_features(data_dir, tmp_path):
    training = small(data_dir, "trained", target="usps")
    train(training)
    folder = tmp_path / "figures"
    args = Embed(
        checkpoint=training.output_dir / "model.safetensors",
        data_dir=data_dir,
        output_dir=folder,
        per_domain=20,
        device="cpu",
    )
    embed(args)
    arrays = np.load(folder / "features.npz")
    assert arrays["features"].shape == (40, 800)
    assert arrays["points"].shape == (40, 2)
    assert arrays["domain"].tolist() == [0] * 20 + [1] * 20
    for name in ("tsne_class", "tsne_domain"):
        assert Image.open(folder / f"{name}.png").size[0] > 500
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_the_table_has_our_runs_and_those_of_the_reports(data_dir, monkeypatch):
    monkeypatch.setitem(p3_dann.RECIPES["cnn"], "epochs", 1)
    output = data_dir.parent / "p3"
    args = Table(
        data_dir=data_dir,
        output_dir=output,
        nets=("cnn",),
        seeds=(0, 1),
        device="cpu",
        images_per_epoch=128,
    )
    table(args)
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


# Bad input


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with bad and good checkpoints and folders in it."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "file").touch()
    torch.save({"conv.weight": torch.ones(1)}, tmp_path / "other.pth")
    (tmp_path / "hostile.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:300])
    torch.save(DannCNN().state_dict(), tmp_path / "good.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMANDS = Train | Predict | Embed | Table


def test_bad_options_of_training_are_named(here, data_dir, error_of):
    to_train = ["train", "--output-dir", "run", "--data-dir"]
    to_table = ["table", "--output-dir", "run", "--data-dir", data_dir]
    to_file = ["train", "--data-dir", data_dir, "--output-dir", "file/x"]
    for words, message in (
        ([*to_train, "none"], "--data-dir none: has no digit domain 'mnistm'"),
        ([*to_train, data_dir, "--target", "mars"], "has no digit domain 'mars'"),
        ([*to_train, data_dir, "--batch-size", 0], "--batch-size 0"),
        ([*to_train, data_dir, "--epochs", 0], "--epochs 0"),
        ([*to_train, data_dir, "--lr", -1], "--lr -1.0: must be above 0"),
        ([*to_train, data_dir, "--ema-decay", 1], "--ema-decay 1.0: must be at least 0 and below"),
        (to_file, "--output-dir file/x: cannot be written"),
        ([*to_table, "--seeds"], "--seeds"),
    ):
        assert message in error_of(COMMANDS, p3_dann.main, *words)
    assert not any((here / "run").iterdir())


def test_bad_input_of_predict_and_embed_is_named(here, data_dir, error_of):
    output_csv = here / "out.csv"
    to_predict = ["predict", "--output-csv", output_csv, "--image-dir"]
    to_file = ["predict", "--image-dir", data_dir, "--checkpoint", "good.pth"]
    to_embed = ["embed", "--output-dir", "run", "--checkpoint"]
    for words, message in (
        ([*to_predict, data_dir, "--checkpoint", "x.pth"], "x.pth: no such file"),
        ([*to_predict, data_dir, "--checkpoint", "cut.pth"], "cut.pth: not a whole file"),
        ([*to_predict, data_dir, "--checkpoint", "other.pth"], "other.pth: is not this DannCNN"),
        ([*to_predict, "empty", "--checkpoint", "good.pth"], "empty: contains no image"),
        ([*to_predict, "x", "--checkpoint", "hostile.pth"], "hostile.pth: not a whole file"),
        ([*to_predict, "nowhere", "--checkpoint", "good.pth"], "nowhere: no such folder"),
        ([*to_file, "--output-csv", "file/x.csv"], "--output-csv"),
        ([*to_embed, "good.pth"], "does not say its two domains"),
    ):
        assert message in error_of(COMMANDS, p3_dann.main, *words)
    assert not any((here / "run").iterdir())
    assert not output_csv.exists()


def test_an_error_in_a_shell_is_one_line_and_status_2():
    command = [sys.executable, ROOT / "p3_dann.py", "train", "--output-dir", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
