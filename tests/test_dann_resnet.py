"""p3_dann_resnet.py: the reversal at three places, honest choice of epochs, exact resume."""

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor

import p3_dann_resnet
from common.checkpoints import load_net, load_weights
from common.cli import UserError
from common.domains import Domains, Inputs
from metrics.unlabelled import CRITERIA, all_criteria, bnm, certainty, corr_c, infomax, snd
from models.adaptation import AdaptationNet, ResNet
from p3_dann_resnet import (
    NETS,
    DomainAdversarial,
    Embed,
    Predict,
    Recipe,
    Table,
    Train,
    adaptation_losses,
    confusion_loss,
    domain_loss,
    embed,
    infomax_loss,
    load_data,
    make_net,
    predict,
    set_statistics,
    table,
    total_loss,
    train,
)
from tests.conftest import noise, save_images
from tests.two_processes import run_with_two_processes

TINY = {"width": 16, "net": "resnet18", "device": "cpu", "precision": "fp32"}


def small(data_dir: Path, name: str, **options: Any) -> Train:
    """Arguments of a run of two epochs of three steps on digits."""
    defaults = {
        "data_dir": data_dir,
        "output_dir": data_dir.parent / name,
        "source": "usps",
        "target": "svhn",
        "size": 16,
        "epochs": 2,
        "images_per_epoch": 24,
        "batch_size": 8,
    }
    return Train(**TINY | defaults | options)


def tiny_net(place: str) -> AdaptationNet:
    """A network for 16x16 images of three classes."""
    torch.manual_seed(0)
    return AdaptationNet("resnet18", 3, place, size=16, width=16, dense=16, hidden=32)


def weights_of(args: Train) -> dict[str, Tensor]:
    """The weights that a run wrote."""
    return load_weights(args.output_dir / "model.safetensors")[0]


def same(one: Train, other: Train) -> bool:
    """Whether two runs ended in the same weights, bit for bit."""
    ours = weights_of(one)
    theirs = weights_of(other)
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) for name, value in ours.items()
    )


# The networks


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_resnet_is_torchvisions(name):
    """With its keys and its outputs, for photographs of the usual width."""
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)().eval()
    ours = ResNet(name, 224, 64).eval()
    weights = theirs.state_dict()
    del weights["fc.weight"], weights["fc.bias"]
    ours.load_state_dict(weights)
    theirs.fc = torch.nn.Identity()
    x = torch.randn(1, 3, 96, 96)
    features = x
    for stage in ours.stages():
        features = stage(features)
    assert torch.equal(features, theirs(x))
    assert features.shape == (1, ours.channels)


def test_small_images_leave_a_map_of_an_eighth():
    net = AdaptationNet("resnet50", 10, "backbone", size=32, width=16)
    x = net.lower(torch.zeros(1, 3, 32, 32))
    for stage in net.backbone.stages()[:-1]:
        x = stage(x)
    assert net.backbone.get_submodule("layer4")(x).shape == (1, 512, 4, 4)


def test_the_efficientnet_is_timms():
    """With its keys and its pooled features."""
    torch.manual_seed(0)
    theirs = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    net = AdaptationNet("efficientnet_lite0", 3, "backbone", size=64, frozen=5).eval()
    net.backbone.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    _, features = net.upper(net.lower(images))
    pixels = 127.5 * (images + 1)
    torch.testing.assert_close(features, theirs((pixels - 127) / 128), atol=1e-4, rtol=1e-4)


def test_frozen_stages_keep_weights_and_statistics():
    net = AdaptationNet("resnet18", 3, "backbone", size=16, width=16, frozen=2).train()
    before = {name: value.clone() for name, value in net.backbone.layer1.state_dict().items()}
    images = torch.randn(4, 3, 16, 16)
    scores, domain = DomainAdversarial(net)(net.lower(images), 1.0)
    (scores.sum() + domain.sum()).backward()
    for name, value in net.backbone.layer1.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in net.backbone.layer1.parameters())
    assert net.backbone.layer2[0].conv1.weight.grad.abs().sum() > 0
    whole = AdaptationNet("resnet18", 3, "backbone", size=16, width=16).eval()
    whole.load_state_dict(net.state_dict())
    torch.testing.assert_close(whole(images), net.eval()(images))
    with pytest.raises(ValueError, match="resnet18 has 5 stages; at most 4 can be frozen"):
        AdaptationNet("resnet18", 3, "backbone", size=16, width=16, frozen=5)


# The method


@pytest.mark.parametrize("place", ["backbone", "dense", "label"])
def test_the_reversed_gradient_is_minus_lambda_times_the_domain_classifiers(place):
    """At the place itself, and in all that it was computed from."""
    net = tiny_net(place).double()
    images = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    domains = torch.tensor([0.0, 0, 0, 1, 1, 1], dtype=torch.float64)

    def gradients(lambd: float, is_reversed: bool) -> dict[str, Tensor]:
        net.zero_grad()
        x = net.lower(images)
        if is_reversed:
            _, scores = DomainAdversarial(net)(x, lambd)
        else:
            scores = net.domain(net.upper(x)[1]).flatten()
        torch.nn.functional.binary_cross_entropy_with_logits(scores, domains).backward()
        return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}

    plain = gradients(1.0, is_reversed=False)
    reverse = gradients(0.3, is_reversed=True)
    assert plain.keys() == reverse.keys()
    for name, value in plain.items():
        factor = 1.0 if name.startswith("domain.") else -0.3
        torch.testing.assert_close(reverse[name], factor * value, atol=1e-12, rtol=1e-9)
    reached = {name.split(".")[0] for name in reverse}
    expected = {
        "backbone": {"backbone", "domain"},
        "dense": {"backbone", "dense", "domain"},
        "label": {"backbone", "dense", "label", "domain"},
    }
    assert reached == expected[place]


def test_the_last_place_reads_probabilities():
    """They stay below 1 where the scores are a thousand times as large."""
    net = tiny_net("label").eval()
    x = net.lower(torch.randn(4, 3, 16, 16))
    scores, read = net.upper(x)
    torch.testing.assert_close(read, scores.softmax(1))
    with torch.no_grad():
        net.label.weight *= 1_000
    scores, read = net.upper(x)
    assert scores.abs().max() > 10
    assert read.max() <= 1


def test_both_domains_weigh_alike_in_batches_of_different_sizes():
    source = torch.tensor([1.0, -2.0, 0.5, 3.0])
    target = torch.tensor([2.0])
    expected = (source.exp().log1p().mean() + (-target).exp().log1p().mean()) / 2
    torch.testing.assert_close(domain_loss(source, target), expected)


@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_the_losses_are_those_of_each_domain(forward):
    """The class loss reads the source, the other terms the target; the domain loss reads both."""
    net = DomainAdversarial(tiny_net("dense")).eval()  # so that joint and separate agree
    source = torch.randn(4, 3, 16, 16)
    target = torch.randn(2, 3, 16, 16)
    labels = torch.tensor([0, 1, 2, 0])
    args = Recipe(output_dir=Path(), infomax=True, mcc=True, forward=forward, label_smoothing=0)
    losses = adaptation_losses(net, source, labels, target, 1.0, args)
    scores, domain = net(source, 1.0)
    target_scores, target_domain = net(target, 1.0)
    expected = {
        "class_loss": torch.nn.functional.cross_entropy(scores, labels),
        "domain_loss": domain_loss(domain, target_domain),
        "domain_accuracy": 100 * torch.cat([domain < 0, target_domain > 0]).float().mean(),
        "infomax_loss": infomax_loss(target_scores),
        "confusion_loss": confusion_loss(target_scores),
    }
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, msg=name)


def test_the_domain_classifier_sees_both_domains_at_once():
    """Also where the rest of the network sees one after the other."""
    net = tiny_net("dense").train()
    images = torch.randn(6, 3, 16, 16)
    source, target = images[:4], images[4:]
    scores, domain = DomainAdversarial(net)(images, 1.0, sizes=(4, 2))
    expected = [net.upper(part) for part in (source, target)]
    torch.testing.assert_close(scores, torch.cat([scores for scores, _ in expected]))
    read = torch.cat([read for _, read in expected])
    torch.testing.assert_close(domain, net.domain(read).flatten())


def test_the_losses_of_a_batch():
    net = DomainAdversarial(tiny_net("dense"))
    source = torch.randn(4, 3, 16, 16)
    target = torch.randn(2, 3, 16, 16)
    labels = torch.tensor([0, 1, 2, 0])
    args = Recipe(output_dir=Path(), infomax=True, mcc=True)
    losses = adaptation_losses(net, source, labels, target, 1.0, args)
    assert 0 <= losses["domain_accuracy"] <= 100
    expected = sum(value for name, value in losses.items() if name != "domain_accuracy")
    torch.testing.assert_close(total_loss(losses), expected)
    losses.pop("domain_accuracy")
    assert sorted(losses) == ["class_loss", "confusion_loss", "domain_loss", "infomax_loss"]
    assert all(loss.isfinite() for loss in losses.values())
    plain = adaptation_losses(net, source, labels, None, 1.0, Recipe(output_dir=Path()))
    assert list(plain) == ["class_loss"]


@pytest.mark.parametrize("loss", [infomax_loss, confusion_loss])
def test_very_certain_scores_give_finite_gradients(loss):
    """Also where no image is of some class."""
    scores = torch.tensor([[200.0, 0, 0], [0, 300, 0]], requires_grad=True)
    value = loss(scores)
    value.backward()
    assert value.isfinite()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_infomax_and_confusion_are_least_for_certain_and_balanced_answers():
    certain = 20 * torch.eye(3).repeat(4, 1)  # each of three classes four times
    one_class = 20 * torch.eye(3)[:1].repeat(12, 1)
    unsure = torch.zeros(12, 3)
    assert infomax_loss(certain).item() == pytest.approx(-math.log(3), abs=1e-4)
    assert infomax_loss(one_class).item() == pytest.approx(0, abs=1e-4)
    assert infomax_loss(unsure).item() == pytest.approx(0, abs=1e-6)
    assert confusion_loss(certain).item() < 0.01
    assert confusion_loss(unsure).item() == pytest.approx(2 / 3)


def test_confusion_is_the_papers_formula():
    scores = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    p = (scores / 2.5).softmax(1)
    certainty = [1 + math.exp(sum(v * math.log(v) for v in row)) for row in p.tolist()]
    weights = [5 * value / sum(certainty) for value in certainty]
    matrix = [
        [sum(weights[i] * p[i, a] * p[i, b] for i in range(5)).item() for b in range(3)]
        for a in range(3)
    ]
    expected = 1 - sum(matrix[a][a] / sum(matrix[a]) for a in range(3)) / 3
    assert confusion_loss(scores).item() == pytest.approx(expected, rel=1e-5)


# The choice of an epoch


def test_a_classifier_that_calls_all_images_the_same_ranks_last():
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 4
    good = (4.0 * torch.eye(4)[labels] + torch.randn(60, 4, generator=rng)).softmax(1)
    poor = (1.0 * torch.eye(4)[labels] + torch.randn(60, 4, generator=rng)).softmax(1)
    collapsed = torch.eye(4)[torch.zeros(60, dtype=torch.long)]
    for name, criterion in CRITERIA.items():
        assert criterion(good) > criterion(poor) > criterion(collapsed), name
    # These two are only printed: they prefer the collapsed one.
    assert certainty(collapsed) > certainty(good)
    assert snd(collapsed) > snd(good)
    assert sorted(all_criteria(good)) == ["bnm", "certainty", "corr_c", "infomax", "snd"]


def test_criteria_of_certain_and_balanced_answers():
    p = torch.eye(4).repeat(5, 1)
    assert infomax(p) == pytest.approx(math.log(4))
    assert bnm(p) == pytest.approx(1)
    assert corr_c(p) == pytest.approx(1)
    assert certainty(p) == pytest.approx(0)
    alone = torch.eye(4)[:1].repeat(20, 1)
    assert bnm(alone) == pytest.approx(0.5)
    assert corr_c(alone) == pytest.approx(0.5)
    # Each of 20 images has 4 equal neighbours; the others are e^20 times as far.
    assert snd(p) == pytest.approx(math.log(4), abs=1e-4)


def test_the_epoch_is_chosen_by_the_criterion_that_was_named(data_dir, monkeypatch):
    values = iter([0.3, 0.9, 0.5])
    monkeypatch.setattr(
        p3_dann_resnet, "all_criteria", lambda p: dict.fromkeys(CRITERIA, next(values))
    )
    args = small(data_dir, "chosen", select="bnm", epochs=3)
    result = train(args)
    assert result["epoch"] == 2
    rows = [json.loads(line) for line in (args.output_dir / "metrics.jsonl").open()]
    assert result["accuracy"]["target"] == rows[1]["accuracy_target"]
    assert result["last_accuracy"]["target"] == rows[2]["accuracy_target"]
    assert result["last_accuracy"]["source"] == rows[2]["source_accuracy"]
    assert result["by_criterion"]["bnm"] == rows[1]["accuracy_target"]
    best = max(row["accuracy_target"] for row in rows)
    assert result["oracle_best_accuracy_target"] == best

    # The file has the weights of epoch 2, not of the last one.
    values = iter([0.3, 0.9, 0.5])
    last = small(data_dir, "last", epochs=3)
    train(last)
    assert not same(args, last)


def test_labels_of_the_target_change_nothing_but_its_accuracies(data_dir, monkeypatch):
    args = small(data_dir, "labels", infomax=True, mcc=True, select="infomax")
    before = train(args)
    first = [json.loads(line) for line in (args.output_dir / "metrics.jsonl").open()]

    def shuffled(args: Recipe, cache: Path) -> Domains:
        data = load_data(args, cache)
        assert data.target.labels is None
        wrong = torch.zeros_like(data.target_val.labels)
        return data._replace(target_val=data.target_val._replace(labels=wrong))

    monkeypatch.setattr(p3_dann_resnet, "load_data", shuffled)
    other = small(data_dir, "shuffled", infomax=True, mcc=True, select="infomax")
    after = train(other)
    assert same(args, other)
    assert before["epoch"] == after["epoch"]
    assert before["accuracy"]["source"] == after["accuracy"]["source"]
    second = [json.loads(line) for line in (other.output_dir / "metrics.jsonl").open()]
    for row, other_row in zip(first, second, strict=True):
        assert row.pop("accuracy_target") != other_row.pop("accuracy_target")
        assert row == other_row


def test_without_lambda_the_target_changes_no_weight(data_dir):
    """In separate batches, source only and λ = 0 train the same network."""
    alone = small(data_dir, "alone", place="none")
    zero = small(data_dir, "zero", place="dense", lambda_max=0.0, forward="separate")
    train(alone)
    train(zero)
    ours = dict(make_net(alone, 10)[0].named_parameters())
    theirs = weights_of(zero)
    trained = weights_of(alone)
    for name in ours:  # without the statistics, which the target does change
        assert torch.equal(trained[name], theirs[name]), name
    assert not torch.equal(trained["label.weight"], ours["label.weight"])


# Runs


@pytest.mark.parametrize("place", ["none", "label"])
def test_a_run_resumes_bit_for_bit(data_dir, stop_in_step_1, place):
    whole = small(data_dir, "whole", place=place, select="infomax")
    broken = small(data_dir, "broken", place=place, select="infomax")
    result = train(whole)
    stop_in_step_1(train, broken)
    again = train(broken)
    assert same(whole, broken)
    assert result["accuracy"] == again["accuracy"]
    assert (whole.output_dir / "figures" / "curves.png").exists()


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """The number of images of every measurement."""
    counts = []
    measure = p3_dann_resnet.probabilities

    def spy(net, inputs, accelerator):
        counts.append(len(inputs))
        return measure(net, inputs, accelerator)

    monkeypatch.setattr(p3_dann_resnet, "probabilities", spy)
    return counts


def test_fewer_images_can_measure_an_epoch(data_dir, measured):
    everything, few = small(data_dir, "all"), small(data_dir, "few", measured_images=5)
    train(everything)
    assert min(measured) > 5
    measured.clear()
    train(few)
    assert measured == 6 * [5]  # two domains and the unlabelled images, after two epochs
    assert same(everything, few)


def test_a_run_resumes_with_the_chosen_epoch(data_dir, stop_in_step_1, monkeypatch):
    """The first epoch is chosen, and the run stops after it."""
    monkeypatch.setattr(p3_dann_resnet, "selected_epoch", lambda rows, selection: rows[0])
    whole = small(data_dir, "whole", images_per_epoch=8, epochs=3)
    broken = small(data_dir, "broken", images_per_epoch=8, epochs=3)
    result = train(whole)
    assert result["epoch"] == 1
    stop_in_step_1(train, broken)
    train(broken)
    assert same(whole, broken)


def test_the_averaged_network_has_statistics_of_its_own(monkeypatch):
    """They are those of training images, and the layers are left as they were."""
    net = tiny_net("backbone")
    pixels = torch.randint(256, (50, 3, 16, 16), dtype=torch.uint8)
    inputs = Inputs(net, pixels, "none")
    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.fill_(7.0)
    batches = []
    draw = inputs.draw
    monkeypatch.setattr(inputs, "draw", lambda *args: batches.append(1) or draw(*args))
    set_statistics(net, inputs, None, 30, Recipe(output_dir=Path(), batch_size=50))
    assert len(batches) == 30
    first = net.backbone.bn1
    maps = net.backbone.conv1(net.lower(pixels.float() / 127.5 - 1))
    torch.testing.assert_close(first.running_mean, maps.mean((0, 2, 3)), atol=0.02, rtol=0.1)
    assert first.momentum == 0.1


def test_two_processes_train_one_network(data_dir):
    """BatchNorm sees each domain apart, in two forward passes before one backward pass."""
    args = small(data_dir, "two", place="label", forward="separate", mcc=True)
    words = ["train", "--mcc"]
    for name in ("data_dir", "output_dir", "source", "target", "size", "width", "net", "place"):
        words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    words += ["--epochs", "1", "--images-per-epoch", "24", "--batch-size", "8"]
    words += ["--forward", "separate", "--device", "cpu", "--precision", "fp32"]
    run_with_two_processes("p3_dann_resnet.py", *words)
    config = json.loads((args.output_dir / "config.json").read_text())
    assert config["hardware"]["processes"] == 2
    assert all(value.isfinite().all() for value in weights_of(args).values())
    assert len((args.output_dir / "metrics.jsonl").read_text().splitlines()) == 1


def write_photographs(folder: Path, classes: list[str], count: int, seed: int) -> Path:
    """Random images DOMAIN/CLASS/000.png; those of a class have one brightness."""
    for number, name in enumerate(classes):
        pixels = noise(count, size=20, seed=seed) // 4 + 60 * number
        save_images(folder / name, pixels.astype("uint8"))
    return folder


@pytest.fixture
def photographs(tmp_path: Path) -> dict[str, Path]:
    """Two domains of three classes, one with a name that is not ASCII."""
    classes = ["Chaise", "Tasse à café", "Vélo"]
    return {
        "source_dir": write_photographs(tmp_path / "Art", classes, 6, seed=0),
        "target_dir": write_photographs(tmp_path / "Real World", classes, 4, seed=1),
    }


def test_fewer_photographs_are_measured_once(photographs, tmp_path, measured):
    """The unlabelled images are the target's: there is no third measurement."""
    options = {"size": 16, "epochs": 1, "images_per_epoch": 16, "batch_size": 8}
    options["measured_images"] = 2
    train(Train(output_dir=tmp_path / "run", **TINY | options | photographs))
    assert measured == [2, 2]


def test_the_folder_of_a_target_image_only_measures(photographs, tmp_path):
    """Two images that change places between classes leave the weights as they are."""
    options = {"size": 16, "epochs": 1, "images_per_epoch": 8, "batch_size": 8, "mcc": True}
    first = Train(output_dir=tmp_path / "first", **TINY | options | photographs)
    train(first)
    folder = photographs["target_dir"]
    one, other = folder / "Chaise" / "000.png", folder / "Vélo" / "000.png"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    second = Train(output_dir=tmp_path / "second", **TINY | options | photographs)
    train(second)
    assert same(first, second)


def test_predict_finds_what_training_measured(photographs, data_dir, tmp_path):
    """Both prepare images alike, photographs and digits."""
    options = {"size": 16, "epochs": 1, "images_per_epoch": 16, "batch_size": 8}
    args = Train(output_dir=tmp_path / "run", **TINY | options | photographs)
    result = train(args)
    checkpoint = args.output_dir / "model.safetensors"
    right = 0
    for name in ("Chaise", "Tasse à café", "Vélo"):
        image_dir = photographs["target_dir"] / name
        predict(Predict(checkpoint=checkpoint, image_dir=image_dir, output_csv=tmp_path / "p.csv"))
        with (tmp_path / "p.csv").open(newline="") as file:
            right += sum(row["label"] == name for row in csv.DictReader(file))
    assert result["accuracy"]["target"] == pytest.approx(100 * right / 12)

    args = small(data_dir, "digits", size=32)
    result = train(args)
    checkpoint = args.output_dir / "model.safetensors"
    domain = data_dir / "digits" / "svhn"
    predict(
        Predict(checkpoint=checkpoint, image_dir=domain / "data", output_csv=tmp_path / "d.csv")
    )
    with (tmp_path / "d.csv").open(newline="") as file:
        found = {row["image_name"]: row["label"] for row in csv.DictReader(file)}
    with (domain / "val.csv").open(newline="") as file:
        truth = list(csv.DictReader(file))
    right = sum(found[row["image_name"]] == row["label"] for row in truth)
    assert result["accuracy"]["target"] == pytest.approx(100 * right / len(truth))


def test_photographs_by_folders_of_classes(photographs, tmp_path):
    options = {"size": 16, "epochs": 1, "images_per_epoch": 16, "batch_size": 8}
    args = Train(output_dir=tmp_path / "run", place="dense", **TINY | options | photographs)
    result = train(args)
    assert result["classes"] == 3
    data = load_data(args, args.output_dir.parent / "cache")
    assert [len(part.names) for part in (data.source, data.source_val)] == [15, 3]
    assert len(data.target_val.names) == len(data.target.names) == 12
    assert data.source.pixels.shape[2:] == (18, 18)  # of which 16x16 are cut out

    checkpoint = args.output_dir / "model.safetensors"
    image_dir = photographs["target_dir"] / "Vélo"
    predict(Predict(checkpoint=checkpoint, image_dir=image_dir, output_csv=tmp_path / "pred.csv"))
    with (tmp_path / "pred.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image_name", "label"]
    assert [row[0] for row in rows[1:]] == ["000.png", "001.png", "002.png", "003.png"]
    assert {row[1] for row in rows[1:]} <= {"Chaise", "Tasse à café", "Vélo"}

    plots = tmp_path / "plots"
    embed(Embed(checkpoint=checkpoint, output_dir=plots, per_domain=6, **photographs))
    assert (plots / "tsne_class.png").exists()
    assert (plots / "tsne_domain.pdf").exists()
    with pytest.raises(UserError, match="needs --source-dir and --target-dir"):
        embed(Embed(checkpoint=checkpoint, output_dir=plots))


def test_frozen_stages_are_computed_once(photographs, tmp_path, monkeypatch):
    seen = []
    lower = AdaptationNet.lower

    def counted(self: AdaptationNet, images: Tensor) -> Tensor:
        seen.append(len(images))
        return lower(self, images)

    file = tmp_path / "resnet18.pth"
    torch.manual_seed(0)
    weights = ResNet("resnet18", 16, 16).state_dict()
    torch.save(weights | {"fc.weight": torch.zeros(3, 128), "fc.bias": torch.zeros(3)}, file)
    monkeypatch.setattr(AdaptationNet, "lower", counted)
    options = {"size": 16, "epochs": 2, "images_per_epoch": 16, "batch_size": 8, "views": 3}
    options |= {"frozen": 3, "weights": str(file), "place": "backbone"}
    args = Train(output_dir=tmp_path / "run", **TINY | options | photographs)
    result = train(args)
    # 15 source and 12 target images three times each; 3 and 12 that are measured once.
    assert sum(seen) == 3 * 15 + 3 * 12 + 3 + 12
    assert result["weights"].startswith("resnet18.pth, sha256 ")
    trained = weights_of(args)
    for name, value in weights.items():
        frozen = name.startswith(("conv1", "bn1", "layer1", "layer2"))
        assert torch.equal(trained[f"backbone.{name}"], value) == frozen, name
    net, config = load_net(args.output_dir / "model.safetensors", NETS)
    assert config["class_names"] == ["Chaise", "Tasse à café", "Vélo"]
    assert net(torch.zeros(1, 3, 16, 16)).shape == (1, 3)


def test_the_table_has_every_place_beside_the_report(data_dir):
    arguments = {
        field: getattr(small(data_dir, "table"), field)
        for field in ("data_dir", "output_dir", "source", "target", "size", "width", "net")
    }
    args = Table(
        **arguments,
        device="cpu",
        epochs=1,
        images_per_epoch=8,
        batch_size=8,
        seeds=(0, 1),
        per_domain=5,
    )
    shutil.copytree(data_dir / "digits" / "svhn", data_dir / "digits" / "mnist")
    table(replace(args, target="mnist"))
    with (args.output_dir / "table.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows[1:]] == ["none", "backbone", "dense", "label"]
    assert rows[0][3] == "mnist, chosen by infomax, %"
    assert rows[1][5] == "95.2 / 53.6"  # the report's, beside USPS → MNIST alone
    for row in rows[1:]:
        results = []
        for seed in (0, 1):
            folder = args.output_dir / f"{row[0]}-seed{seed}"
            results.append(json.loads((folder / "result.json").read_text()))
        mean = sum(result["last_accuracy"]["target"] for result in results) / 2
        assert row[2].startswith(f"{mean:.2f} ± ")
    assert (args.output_dir / "label-seed0" / "figures" / "tsne_domain.png").exists()
    assert not (args.output_dir / "label-seed1" / "figures" / "tsne_domain.png").exists()


def test_a_collapse_of_the_source_is_reported(data_dir, monkeypatch, capsys):
    accuracies = iter([90.0, 50.0, 80.0, 50.0])
    monkeypatch.setattr(p3_dann_resnet, "percent_correct", lambda p, images: next(accuracies))
    train(small(data_dir, "collapse"))
    assert "warning: the source accuracy is 5 points or more below its best" in (
        capsys.readouterr().out
    )


# Mistakes


def test_bad_options_are_named(data_dir, photographs, tmp_path, error_of):
    def error(*words: object) -> str:
        return error_of(Train | Predict | Embed | Table, p3_dann_resnet.main, *words)

    out = ["train", "--output-dir", tmp_path / "x", "--data-dir", data_dir]
    assert "--target-dir: photographs need both" in error(
        *out, "--source-dir", photographs["source_dir"]
    )
    assert "--width 24: must be a multiple of 16" in error(*out, "--width", 24)
    assert "--frozen 2: needs --weights" in error(*out, "--frozen", 2)
    assert "has no digit domain 'mnist'" in error(*out)
    tiny = [*out, "--net", "resnet18", "--width", 16, "--source", "usps", "--target", "svhn"]
    assert "no such file" in error(*tiny, "--weights", tmp_path / "none.pth")
    lone = ["embed", "--checkpoint", tmp_path, "--output-dir", tmp_path / "x", "--target-dir", "y"]
    assert "--source-dir: photographs need both" in error(*lone)
    wrong = tmp_path / "wrong.pth"
    torch.save(ResNet("resnet18", 224, 8).state_dict(), wrong)
    message = error(*tiny, "--weights", wrong)
    assert f"--weights {wrong}: is not this resnet18 ('conv1.weight' is" in message
    deep = ["--source-dir", photographs["source_dir"], "--target-dir", photographs["target_dir"]]
    assert "--frozen 6: resnet18 has 5 stages; at most 4 can be frozen" in error(
        *tiny, *deep, "--weights", wrong, "--frozen", 6
    )
    assert not (tmp_path / "x" / "config.json").exists()
