"""report.py on made output directories: images and links resolve, tables say what was found."""

import base64
import csv
import io
import itertools
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import report
from common.cli import UserError
from report import Report
from reporting import output as reading

HARDWARE = {"device": "cpu", "name": "A CPU", "precision": "fp32", "processes": 1, "threads": 2}


class Page(HTMLParser):
    """What a page holds: ids, addresses of links and images, the rows of its tables, its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: dict[str, str] = {}  # alternative text → source
        self.sources: list[str] = []  # of anything else
        self.rows: list[list[str]] = []
        self.classes: list[str] = []  # of cells
        self.text = ""
        self.in_cell = False
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a":
            self.links.append(values["href"])
        elif tag == "img":
            assert values["alt"]
            assert int(values["width"]) > 0
            self.images[values["alt"]] = values["src"]
        elif "src" in values or tag == "link":
            self.sources.append(tag)
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True
            self.classes.append(values.get("class", ""))

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def row(self, start: str) -> list[str]:
        """The one table row whose first cell starts so.

        Rows of two cells are left out: they are those of the last table.
        """
        found = [row for row in self.rows if len(row) > 2 and row[0].startswith(start)]
        assert len(found) == 1, (start, found)
        return found[0]


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_image(path: Path, shade: int = 0, frames: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = []
    for number in range(frames):
        pixels = np.full((8, 6, 3), shade + 10 * number, np.uint8)
        images.append(Image.fromarray(pixels))
    if frames > 1:
        images[0].save(path, save_all=True, append_images=images[1:])
    else:
        images[0].save(path)


def write_run(folder: Path, data_dir: Path, result: dict, **arguments: object) -> None:
    config = {
        "arguments": {"data_dir": str(data_dir), "seed": 3, **arguments},
        "hardware": HARDWARE,
        "versions": {"torch": "9.9"},
        "git_commit": "0123456789abcdef",
    }
    write_json(folder / "config.json", config)
    write_json(folder / "result.json", result)


def write_error(folder: Path, mse: float, images: int = 10) -> None:
    """The graders' error of DDIM."""
    truth = str(folder.parent / "data/face/GT")
    error = {"score": "mse", "mse": mse, "images": {f"{k}.png": mse for k in range(images)}}
    write_json(folder / "p2/score/ddim/result.json", error | {"arguments": {"truth": truth}})


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that run_all.sh writes, in small.

    The data has as many files as the course's, which are counted as 3 in this test.
    """
    folder = tmp_path / "out put"
    data = tmp_path / "data"
    counts = dict.fromkeys(reading.COURSE_COUNTS, 3)
    monkeypatch.setattr(reading, "COURSE_COUNTS", counts)
    for part in counts:
        for number in range(3):
            write_image(data / part / f"{number}.png")
    write_faces(folder, data)
    write_digits(folder, data)
    write_ddim(folder)
    write_adaptation(folder, data)
    write_clip(folder, data)
    (folder / "steps").mkdir()
    (folder / "steps/dcgan.txt").write_text("python p1_dcgan.py train --lr 1e-3\n60\n")
    return folder


def write_faces(folder: Path, data: Path) -> None:
    """Two GANs with their scores: DCGAN has an FID, WGAN-GP a random-feature distance."""
    val = {"real": str(data / "face/val")}
    for method, extra in (("dcgan", {"smooth": 0.9}), ("wgangp", {"norm": "layer"})):
        run = folder / f"p1/{method}"
        write_run(run, data, {"seconds": 60.0}, width=8, net="generator", **extra)
        write_image(folder / f"p1/first32_{method}.png")
        write_image(run / "figures/curves.png")
        write_image(run / "figures/training.gif", frames=2)
        faces = {
            "metric": "exactly one face",
            "one_face_percent": 86.5,
            "real": {"one_face_percent": 95.31},
            "images": 1000,
            "arguments": val,
        }
        write_json(folder / f"p1/score/{method}-faces/result.json", faces)
    score = {"images": {"generated": 1000}, "arguments": val}
    fid = score | {"metric": "FID", "distance": 26.995, "floor": 5.25}
    write_json(folder / "p1/score/dcgan-fid/result.json", fid)
    random = score | {
        "metric": "random-feature Fréchet distance",
        "distance": 16.9,
        "floor": 1.2,
    }
    write_json(folder / "p1/score/wgangp-random/result.json", random)


def write_digits(folder: Path, data: Path) -> None:
    """Digits of two domains, the first evaluated by the course's classifier."""
    write_run(folder / "p2/digits", data, {"seconds": 1.0}, domains=["mnistm", "svhn"])
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
        for figure in ("grid", "reverse", "guidance"):
            write_image(folder / f"p2/figures/{domain}_{figure}.png", 50)
        write_image(folder / f"p2/figures/{domain}_reverse.gif", frames=3)
        write_image(folder / f"p2/score/{domain}/confusion.png")
    write_image(folder / "p2/digits/figures/curves.png")
    write_image(folder / "p2/digits/figures/training.gif", frames=2)


def write_ddim(folder: Path) -> None:
    """Ten faces from noises and the plots of DDIM."""
    write_error(folder, 1.27)
    for number in range(10):
        write_image(folder / f"p2/ddim/generated/0{number}.png", 20 * number)
    for name in ("p2/ddim/eta_grid", "p2/ddim/slerp", "p2/ddim/lerp", "p2/faces/figures/curves"):
        write_image(folder / f"{name}.png")


def write_adaptation(folder: Path, data: Path) -> None:
    """DANN on two targets with two seeds, source-only and target-only training with one."""
    accuracies = {"source": (50.0,), "dann": (76.0, 79.0), "target": (99.0,)}
    for target in ("svhn", "usps"):
        for method, values in accuracies.items():
            for seed, value in enumerate(values):
                run = folder / f"p3/{target}-deep-{method}-seed{seed}"
                result = {"accuracy": {target: value}}
                write_run(run, data, result, net="deep", method=method, target=target)
        for kind in ("class", "domain"):
            write_image(folder / f"p3/figures/{target}/tsne_{kind}.png")
        write_image(folder / f"p3/{target}-deep-dann-seed0/figures/curves.png")
    table = 'method,svhn\n"source, <b>only</b> & _more_",50.00 ± 1.00\n'
    (folder / "p3/table.csv").write_text(table)


def write_clip(folder: Path, data: Path) -> None:
    """Zero-shot classification and the small CLIP."""
    clip = {
        "accuracy": 71.8,
        "interval": [68.1, 75.3],
        "chance": 10.0,
        "model": "ViT-B-32",
        "templates": "course",
    }
    write_json(folder / "p3/clip/result.json", clip)
    for name in ("cases", "confusion", "similarity"):
        write_image(folder / f"p3/clip/{name}.png")
    write_run(folder / "p3/clip-small", data, {"seconds": 9.0})
    write_image(folder / "p3/clip-small/figures/curves.png")


def make_page(output: Path) -> Page:
    """The page that report.py makes of an output directory."""
    return Page(report.main(Report(output)))


def test_every_image_and_link_resolves(output):
    """The page needs no other file: images are in it, links go to its headings or to papers."""
    page = make_page(output)
    assert len(page.ids) == len(set(page.ids)) >= 8
    assert not page.sources
    for link in page.links:
        assert link[1:] in page.ids if link.startswith("#") else link.startswith("https://"), link
    assert len(page.images) == 42  # 6 of GANs, 12 of DDPM, 14 of DDIM, 6 of DANN, 4 of CLIP
    for source in page.images.values():
        kind, content = source.removeprefix("data:").split(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as image:
            image.load()
            assert image.get_format_mimetype() == kind
            assert image.size == (6, 8)
    shown = base64.b64decode(page.images["Face from noise 07"].partition(",")[2])
    assert shown == (output / "p2/ddim/generated/07.png").read_bytes()


def test_numbers_stand_beside_bars_with_a_verdict(output):
    page = make_page(output)
    fid = ["FID, DCGAN", "27.00", "other real images 5.25", "22.97", "≤ 30 / ≤ 27 (2022)", "pass"]
    assert page.row("FID, DCGAN") == fid
    assert page.row("FID, WGAN-GP")[1::4] == [
        "",
        "not measured: PROFILE=full runs it, with the weights of its Inception network",
    ]
    assert page.row("random-feature distance (not FID), WGAN-GP")[1:6:4] == ["16.90", "no bar"]
    assert page.row("exactly one face, DCGAN")[1:3] == ["86.50", "real images 95.31"]
    assert page.row("exactly one face, DCGAN")[-1] == "pass 1 of 2"
    assert page.row("accuracy, MNIST-M")[-1] == "pass"
    assert page.row("accuracy, SVHN")[-1] == "no bar; independent classifier"
    mean = page.row("mean accuracy of the domains")
    assert (mean[1], mean[-1]) == ("96.75", "none; independent classifier")
    assert page.row("mean squared error")[1::4] == ["1.27", "pass"]
    usps = page.row("DANN, MNIST-M → USPS, deep net, runs: 2")
    assert usps[1:3] == [
        "77.50 ± 2.12",
        "source only 50.00; trained on target 99.00",
    ]  # 1.5 * root of 2
    assert usps[-1] == "pass 1 of 2"
    assert page.row("DANN, MNIST-M → SVHN")[-1] == "pass"
    assert page.row("accuracy, ViT-B-32")[1:3] == [
        "71.80",
        "chance 10.00; 95 % interval 68.10 to 75.30",
    ]
    assert page.row("norm")[1:] == ["no such option", "layer"]  # in which the two GANs differ
    assert page.row("dcgan")[1:] == ["python p1_dcgan.py train --lr 1e-3", "60"]
    assert page.row("p1/dcgan")[1:] == [
        "3",
        "cpu (A CPU), fp32, processes: 1, threads: 2",
        "0123456789",
        "60.00",
    ]
    # A generator of width 8 from 100 latents: transposed convolutions of 4x4, and two parameters of
    # BatchNorm for each channel.
    widths = [100, 64, 32, 16, 8, 3]
    count = sum(16 * a * b for a, b in itertools.pairwise(widths)) + 2 * sum(widths[1:-1])
    assert f"Generator of DCGAN: {count:,} parameters" in page.text


def test_the_courses_classifier_goes_before_one_of_our_own(output):
    file = output / "p2/score/mnistm/result.json"
    score = json.loads(file.read_text())
    write_json(file, score | {"net": "DigitResNet"})
    assert make_page(output).row("accuracy, MNIST-M")[-1] == "none; independent classifier"
    write_json(output / "p2/score/course/result.json", score | {"accuracy": 91.0})
    assert make_page(output).row("accuracy, MNIST-M")[1::4] == ["91.00", "pass 1 of 2"]


def test_a_training_that_continues_from_other_weights_says_so(output):
    note = (
        "Not from scratch. This training was initialised from the weights of "
        "checkpoints/x.safetensors"
    )
    assert note not in make_page(output).text
    data = output.parent / "data"
    init = "checkpoints/x.safetensors"
    write_run(output / "p2/digits", data, {"seconds": 1.0}, domains=["mnistm", "svhn"], init=init)
    assert make_page(output).text.count(note) == 1


@pytest.mark.parametrize(("mse", "verdict"), [(19.99, "pass"), (20.0, "fail")])
def test_a_bar_is_below_20_not_at_it(output, mse, verdict):
    write_error(output, mse)
    page = make_page(output)
    assert page.row("mean squared error")[-1] == verdict
    assert verdict in page.classes


def test_no_bar_is_passed_by_too_few_images(output):
    write_error(output, 1.27, images=9)
    page = make_page(output)
    assert page.row("mean squared error")[-1] == "none: 9 images, 10 are needed"
    assert "fail" not in page.classes


def test_only_runs_of_the_table_are_averaged(output):
    """A run beside them, whatever its settings, does not count."""
    result = {"accuracy": {"usps": 1.0}}
    write_run(output / "p3/mine", output.parent / "data", result, net="deep", method="dann")
    assert make_page(output).row("DANN, MNIST-M → USPS, deep net, runs: 2")[1] == "77.50 ± 2.12"


def test_no_bar_is_passed_on_other_data(output):
    """Drawn data, another number of files than the course's, or none: the verdict says so."""
    data = output.parent / "data"
    write_json(data / "digits/svhn/made.json", {"made_by": "synthetic"})
    write_image(data / "face/val/another.png")
    (data / "digits/usps/data").rename(data / "elsewhere")
    page = make_page(output)
    assert page.row("DANN, MNIST-M → SVHN")[-1] == "synthetic"
    assert page.row("exactly one face, DCGAN")[-1] == reading.OTHER
    assert page.row("DANN, MNIST-M → USPS")[-1] == reading.UNKNOWN
    assert page.row("accuracy, MNIST-M")[-1] == "pass"
    assert "Synthetic data." in page.text
    (data / "face/val/another.png").unlink()
    assert make_page(output).row("exactly one face, DCGAN")[-1] == "pass 1 of 2"
    write_image(data / "face/train/another.png")  # another split of the same photographs
    assert make_page(output).row("exactly one face, DCGAN")[-1] == reading.OTHER


def test_tables_are_those_of_the_page(output):
    """The csv has the very cells; markdown and LaTeX escape what would be signs of their own."""
    page = make_page(output)
    for file in sorted((output / "report").glob("*.csv")):
        with file.open(newline="") as content:
            rows = list(csv.reader(content))
        assert all(row in page.rows for row in rows), file
        assert file.with_suffix(".md").read_text().count("\n") == len(rows) + 1
        assert file.with_suffix(".tex").read_text().count("\\\\\n") == len(rows)
    latex = (output / "report/p3_dann_methods.tex").read_text()
    assert (
        r"source, \ensuremath{<}b\ensuremath{>}only\ensuremath{<}/b\ensuremath{>} "
        r"\& \_more\_ & 50.00" in latex
    )
    assert "source, <b>only</b> & _more_" in page.text  # and was no tag there


def test_what_was_not_run_is_listed(tmp_path):
    """One finished part: the page stands, and the others are named with their reason."""
    write_run(tmp_path / "p1/dcgan", tmp_path, {"seconds": 1.0}, width=8)
    page = Page(report.main(Report(tmp_path)))
    assert not page.images
    assert page.row("accuracy, MNIST-M")[-1] == "not measured: not run"
    with (tmp_path / "report/missing.csv").open(newline="") as file:
        missing = dict(csv.reader(file))
    assert missing["mean squared error to the given images, 0 to 255"].startswith(
        "needs the course's UNet.pt"
    )
    assert (
        missing["figure: Film of the training of WGAN-GP"]
        == "not run (p1/wgangp/figures/training.gif is not there)"
    )
    assert "Not run: the first 32 faces of DCGAN." in page.text
    assert "Not run: MNIST-M digits, ten by ten." in page.text


def test_of_a_large_film_the_last_frame_is_shown(output, monkeypatch):
    monkeypatch.setattr(reading, "LARGEST_FILM", 10)
    page = make_page(output)
    content = base64.b64decode(
        page.images["MNIST-M: film of the reverse process"].partition(",")[2]
    )
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        assert np.asarray(image)[0, 0].tolist() == [20, 20, 20]  # the third of shades 0, 10, 20


def test_bad_input_names_the_file(output, tmp_path):
    with pytest.raises(UserError, match="contains none of p1, p2, p3"):
        report.main(Report(tmp_path / "nothing"))
    (output / "p2/figures/svhn_grid.png").write_bytes(b"half")
    with pytest.raises(UserError, match=r"svhn_grid\.png: not a whole image"):
        report.main(Report(output))
    (output / "p3/clip/result.json").write_text('{"accuracy":')
    with pytest.raises(UserError, match=r"clip/result\.json: not a whole json object"):
        report.main(Report(output))
