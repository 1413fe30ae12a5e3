"""experiments/ and benchmarks/: each prints its help and does a tiny run."""

import csv
import dataclasses
import importlib
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import p2_ddpm_train
from benchmarks import convolutions, ddpm_sampling, startup
from common.cli import UserError
from common.data import labels_of, load_digits
from common.figures import save_image
from common.files import ROOT
from experiments import digit_diversity, digit_samplers, face_samplers
from metrics.features import Embedding, random_features
from models.context_unet import ContextUnet
from models.ddim_unet import DdimUnet
from models.digit_classifier import DigitResNet
from tests.conftest import save_net

SCRIPTS = [
    path
    for folder in ("experiments", "benchmarks", "tools")
    for path in sorted((ROOT / folder).glob("[a-z]*.py"))
    if path.stem not in ("harness", "face_rows")  # which are no scripts
]


@pytest.fixture
def digits_net(tmp_path: Path) -> Path:
    """A tiny network for the digits of one domain, with 6 steps of noise."""
    torch.manual_seed(0)
    schedule = {"steps": 6, "kind": "cosine"}
    options = {"domains": ["mnistm"], "schedule": schedule}
    return save_net(ContextUnet(3, 8, 10), tmp_path / "net.safetensors", **options)


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A tiny classifier of digits."""
    torch.manual_seed(1)
    return save_net(DigitResNet(width=8), tmp_path / "classifier.safetensors")


@pytest.fixture
def table(data_dir: Path, tmp_path: Path, digits_net: Path, classifier: Path):
    """A table of three rows of digit samplers."""
    return digit_samplers.Table(
        checkpoint=digits_net,
        output_dir=tmp_path / "table",
        data_dir=data_dir,
        domains=("mnistm",),
        classifiers=(classifier,),
        samplers=("ddim-3", "ddpm"),
        guidances=(0.0,),
        per_class=2,
        ddpm_per_class=1,
        device="cpu",
        precision="fp32",
    )


def test_rows_are_measured_once_and_further_ones_added(table, monkeypatch):
    digit_samplers.main(table)
    rows = digit_samplers.main(dataclasses.replace(table, guidances=(0.0, 2.0)))
    keys = ("sampler", "steps", "guidance", "per_class", "evaluations")
    found = [tuple(row[key] for key in keys) for row in rows]
    assert found == [
        ("ddim", 3, 1.0, 2, 6),
        ("ddpm", 6, 1.0, 1, 12),
        ("dpm-solver++", 6, 0.0, 2, 6),
        ("dpm-solver++", 6, 2.0, 2, 12),
    ]
    for row in rows:
        assert 0 <= row["domains"]["mnistm"]["accuracy"] <= 100
        assert row["seconds"] > 0
    with (table.output_dir / "table.csv").open() as file:
        names = [row[0] for row in csv.reader(file)]
    assert names[1:] == ["ddpm", "ddim", "dpm-solver++", "dpm-solver++", "real images"]
    monkeypatch.setattr(digit_samplers, "measure", None)  # nothing is measured again
    assert digit_samplers.main(table) == rows


def test_another_table_is_refused(table):
    digit_samplers.main(dataclasses.replace(table, samplers=()))
    with pytest.raises(UserError, match=r"holds a table of something else \(seed was 0, is 1\)"):
        digit_samplers.main(dataclasses.replace(table, seed=1))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"samplers": ("euler-3",)}, "--samplers euler-3: must be SAMPLER or SAMPLER-STEPS"),
        ({"samplers": ("ddim-7",)}, "--steps 7: the network was trained with 6 steps"),
        ({"domains": ("usps",)}, "--domains usps: .* only knows mnistm"),
        ({"classifiers": ()}, "--classifiers: needs one for each of --domains"),
        ({"samplers": (), "guidances": ()}, "--samplers and --guidances: at least one row"),
    ],
)
def test_rows_that_cannot_be_are_refused(table, changed, message):
    with pytest.raises(UserError, match=message):
        digit_samplers.main(dataclasses.replace(table, **changed))


@pytest.fixture
def faces_dir(tmp_path: Path) -> Path:
    """Data with a few 16x16 "faces" of noise."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        folder = tmp_path / "faces" / "face" / split
        folder.mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "faces"


def random_embedding(*_: object) -> Embedding:
    """Stands for `open_embedding`, whose EfficientNet may not be installed."""
    return random_features()


def without_package(*_: object) -> Embedding:
    """As `open_embedding` where the package of EfficientNet is missing."""
    raise UserError("--features efficientnet: the weights are missing")


def test_face_samplers_do_without_kid(tmp_path, monkeypatch, capsys):
    options = {"checkpoint": tmp_path, "output_dir": tmp_path, "data_dir": tmp_path}
    monkeypatch.setattr(face_samplers.evaluate, "main", without_package)
    face_samplers.measure_kid(face_samplers.Table(**options), tmp_path, tmp_path / "kid")
    reason = "--features efficientnet: the weights are missing"
    assert capsys.readouterr().err == f"left out: KID ({reason})\n"
    assert face_samplers.two_decimals(None) == ""


def test_face_samplers_fill_their_table_once(faces_dir, tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = DdimUnet(size=16, width=32, multipliers=(1, 2), attention=(8,), blocks=1)
    schedule = {"steps": 8, "kind": "cosine"}
    checkpoint = save_net(net, tmp_path / "ddim.safetensors", schedule=schedule)
    table = face_samplers.Table(
        checkpoint=checkpoint,
        output_dir=tmp_path / "table",
        data_dir=faces_dir,
        steps=(2, 8),
        etas=(0.0, 1.0),
        count=3,
        device="cpu",
        precision="fp32",
    )
    monkeypatch.setattr(face_samplers.evaluate, "open_embedding", random_embedding)
    rows = face_samplers.main(table)
    assert [row[:2] for row in rows[1:-1]] == [["2", "0"], ["2", "1"], ["8", "0"], ["8", "1"]]
    assert rows[-1][0] == "real images"
    assert all(float(row[2]) > 0 for row in rows[1:])
    assert all(float(row[3]) > 0 for row in rows[1:-1])
    monkeypatch.setattr(face_samplers.p2_ddim, "main", None)  # nothing is made again
    assert face_samplers.main(table) == rows
    with pytest.raises(UserError, match="holds a table of something else"):
        face_samplers.main(dataclasses.replace(table, count=4))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_script_prints_its_help(script, monkeypatch, capsys):
    """--help has the first words of the header and names each option."""
    module = importlib.import_module(f"{script.parent.name}.{script.stem}")
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.setitem(sys.modules, "__main__", module)
    command = command_of(module)
    with pytest.raises(SystemExit) as end:
        module.run_cli(command, module.main)
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert " ".join(module.__doc__.split()[:3]) in text
    for field in dataclasses.fields(command):
        flag = f"--{field.name.replace('_', '-')}"
        assert flag in text or field.name.upper() in text


def command_of(module: ModuleType) -> type:
    """The dataclass that the script's `main` takes."""
    return typing.get_type_hints(module.main)["args"]


def in_this_process(function: Callable, *arguments: object) -> object:
    """Stands for `in_own_process`, whose new process would import everything again."""
    return function(*arguments)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dann_training", {"net": "cnn", "images": 16, "batch_size": 4, "num_workers": 0}),
        ("dann_resnet_training", {"net": "resnet18", "size": 65, "batch_size": 2, "steps": 1}),
        ("gan_training", {"images": 4, "batch_size": 2, "num_workers": 0}),
        ("ddpm_training", {"images": 4, "batch_size": 2, "width": 32, "num_workers": 0}),
        ("ddim_unet", {"size": 32, "width": 16, "repeats": 1}),
        ("clip_encoding", {"model": "ViT-S-32-alt", "images": 1, "size": 8, "batch_size": 1}),
    ],
)
def test_benchmarks_print_a_ratio(name, options, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(module, "in_own_process", in_this_process, raising=False)
    monkeypatch.setattr(p2_ddpm_train, "spaced_steps", lambda timesteps, count: [timesteps])
    for function in ("end_epoch", "draw_samples"):  # which ddpm_training replaces
        monkeypatch.setattr(p2_ddpm_train, function, getattr(p2_ddpm_train, function))
    module.main(module.Benchmark(**options))
    assert "x as fast" in capsys.readouterr().out


def test_the_convolution_benchmark_counts_the_operations_of_each_pass(monkeypatch, capsys):
    layer = convolutions.Layer(2, 3, kernel=4, stride=2, size=8)  # to 4x4 pixels
    monkeypatch.setattr(convolutions, "LAYERS", [layer])
    convolutions.main(convolutions.Benchmark(batch_size=1, matrix=8, seconds=0.001))
    assert capsys.readouterr().out.count("2 to   3") == 2

    def operations_of(run: Callable, operations: float, args: object) -> float:
        passes.append(run())
        return operations

    passes = []

    monkeypatch.setattr(convolutions, "speed", operations_of)
    args = convolutions.Benchmark(batch_size=5)
    numbers = 5 * 3 * 4 * 4  # in the output, each a sum of 2 * 4 * 4 products
    assert convolutions.layer_speeds(layer, "contiguous", args) == [numbers * 2 * 4 * 4 * 2] * 3

    y, of_input, of_weights = passes
    assert y.shape == (5, 3, 4, 4)
    assert of_input[0].shape == (5, 2, 8, 8)
    assert of_input[1] is None
    assert of_weights[0] is None
    assert of_weights[1].shape == (3, 2, 4, 4)


def test_the_sampling_benchmark_prints_a_ratio_and_accuracies(
    digits_net, classifier, monkeypatch, capsys
):
    monkeypatch.setattr(ddpm_sampling, "in_own_process", in_this_process)
    ddpm_sampling.main(
        ddpm_sampling.Benchmark(
            checkpoint=digits_net,
            classifier=classifier,
            steps=2,
            per_class=1,
            textbook_images=2,
        )
    )
    text = capsys.readouterr().out
    assert "x as fast" in text
    assert text.count("accuracy") == 2


def test_the_sampling_benchmark_has_the_settings_of_the_graders_script():
    args = ddpm_sampling.Benchmark(checkpoint=Path("x"), classifier=Path("x"))
    low, high = args.interval
    words = f"--steps {args.steps} --guidance {args.guidance:g} --interval {low:g} {high:g}"
    script = (ROOT / "grading" / "common.sh").read_text()
    assert words in script
    assert f"--sampler {args.sampler} " in script


def test_the_start_benchmark_compares_with_import_torch(monkeypatch, capsys):
    monkeypatch.setattr(startup, "user_seconds", lambda arguments: float(len(arguments)))
    startup.main(startup.Benchmark(repeats=1))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("import torch")
    assert any(line.startswith("p1_dcgan.py") for line in lines)


# Diversity by kind of features


def test_a_poor_set_has_little_diversity_with_every_kind(
    tmp_path, data_dir, classifier, monkeypatch, capsys
):
    """Repeated digits are found poor; real ones as diverse as others, and the files are written."""
    monkeypatch.setattr(digit_diversity, "efficientnet_features", random_embedding)
    real = load_digits(data_dir, "mnistm", "val")
    folder = tmp_path / "generated"
    folder.mkdir()
    for number, (image, label) in enumerate(zip(real.pixels, labels_of(real), strict=True)):
        save_image(image, folder / f"{label}_{number:03}.png")
    args = digit_diversity.Compare(
        folders=(folder,),
        classifiers=(classifier,),
        output_dir=tmp_path / "out",
        data_dir=data_dir,
        few=1,
    )
    table = digit_diversity.main(args)
    assert table[0] == ["digits", "accuracy, %", "classifier", "EfficientNet", "pixels"]
    names = [row[0] for row in table[1:]]
    assert names == [
        "generated",
        "real, nearest to the mean",
        "real, 1 of each repeated",
        "real",
    ]
    assert [float(cell) for cell in table[1][2:]] == pytest.approx([100, 100, 100], abs=0.1)
    assert [float(cell) for cell in table[3][2:]] == pytest.approx([0, 0, 0], abs=0.1)
    for name in ("table.csv", "table.md", "table.png", "spread.png", "nearest.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0


def test_classifiers_of_one_name_are_refused(tmp_path):
    def compare(*files: str) -> digit_diversity.Compare:
        return digit_diversity.Compare(
            folders=(tmp_path,), classifiers=tuple(map(Path, files)), output_dir=tmp_path / "out"
        )

    for files in (("a/net.pth", "b/net.pth"), ("pixels.pth",), ("EfficientNet/model.safetensors",)):
        with pytest.raises(UserError, match=r"--classifiers .*: another column is called"):
            compare(*files)
    compare("a/model.safetensors", "b/model.safetensors")


def test_the_real_images_are_drawn_with_the_seed(tmp_path, data_dir):
    real = load_digits(data_dir, "mnistm", "val")
    args = digit_diversity.Compare(
        folders=(tmp_path,),
        classifiers=(Path("net.pth"),),
        output_dir=tmp_path / "out",
        real_images=20,
    )
    drawn = digit_diversity.draw_real(real, args)
    assert labels_of(drawn).bincount(minlength=10).tolist() == [2] * 10
    assert digit_diversity.draw_real(real, args).names == drawn.names
    args.seed = 1
    assert digit_diversity.draw_real(real, args).names != drawn.names
    args.real_images = 2_000
    assert digit_diversity.draw_real(real, args).names == real.names
    with pytest.raises(UserError, match="--real-images"):
        dataclasses.replace(args, real_images=19)


def test_a_folder_without_some_digits_is_named(tmp_path, data_dir, classifier):
    folder = tmp_path / "generated"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (28, 28)).save(folder / f"1_{number}.png")
    with pytest.raises(UserError, match="generated: needs two images of each digit"):
        digit_diversity.main(
            digit_diversity.Compare(
                folders=(folder,),
                classifiers=(classifier,),
                output_dir=tmp_path / "out",
                data_dir=data_dir,
            )
        )
