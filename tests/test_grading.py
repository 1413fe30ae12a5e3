"""grading/: each script with its grader's arguments, on tiny networks.

A stand-in for Python records what a script calls, which then runs in this process, because starting
Python takes seconds.
"""

import csv
import hashlib
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

import p3_textual_inversion
from common.files import ROOT
from diffusion.schedule import spaced_steps
from inversion.concepts import save_words
from models.dann import DannCNN
from models.ddim_unet import DdimUnet
from models.gan import Generator
from p2_ddpm_infer import Generate
from tests.conftest import save_net
from tests.test_textual_inversion import tiny_model

SCHEDULE = {"steps": 18, "as_given": True}  # the largest number of steps that the scripts take
SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "grading").glob("*/*.sh"))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: the scripts, no weights yet, and a Python that records its arguments."""
    folder = tmp_path / "the project"
    shutil.copytree(ROOT / "grading", folder / "grading")
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    record = shlex.quote(str(folder / "called"))
    python.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" >>{record}\necho >>{record}\n")
    python.chmod(0o755)
    monkeypatch.chdir(folder)
    for name in ("CHECKPOINTS", "DOMAIN", "FACES"):
        monkeypatch.delenv(name, raising=False)
    return folder


def call_bash(file: Path | str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a shell script in the current folder."""
    return subprocess.run(
        ["bash", str(file), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def grade(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run grading/SCRIPT.sh."""
    return call_bash(f"grading/{script}.sh", *arguments, **environment)


@pytest.fixture
def run(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """`run(script, *arguments, **environment)` does in this process what the script calls.

    Returns the words of each call.
    """

    def run(script: str, *arguments: str, **environment: str) -> list[list[str]]:
        record = project / "called"
        record.unlink(missing_ok=True)
        ended = grade(script, *arguments, **environment)
        assert ended.returncode == 0
        assert ended.stderr == ""
        monkeypatch.setattr(os, "fsync", lambda file: None)  # is slow for a thousand files
        calls = [line.split("\0")[:-1] for line in record.read_text().splitlines()]
        for call in calls:
            called = Path(call[0])
            assert called.parent == project
            monkeypatch.setattr(sys, "argv", call)
            runpy.run_path(str(ROOT / called.name), run_name="__main__")
        return calls

    return run


def read_images(folder: Path) -> dict[str, tuple[tuple[int, int], str]]:
    """Size and mode of everything in a folder, all of which must be PNG."""
    found = {}
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            assert image.format == "PNG"
            found[path.name] = (image.size, image.mode)
    return found


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def digit_names(per_class: int) -> list[str]:
    numbers = range(1, per_class + 1)
    return [f"{digit}_{number:03d}.png" for digit in range(10) for number in numbers]


# All scripts


def test_every_year_has_its_three_scripts():
    expected = []
    for year in (2022, 2023, 2024):
        expected += [f"grading/{year}/hw2_{number}.sh" for number in (1, 2, 3)]
    assert [str(path) for path in SCRIPTS] == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [("2022/hw2_2", "2023/hw2_1"), ("2022/hw2_3", "2023/hw2_3"), ("2023/hw2_2", "2024/hw2_2")],
)
def test_scripts_of_the_same_problem_differ_in_their_comment_only(one, other):
    lines = (ROOT / "grading" / f"{one}.sh").read_text().splitlines()
    others = (ROOT / "grading" / f"{other}.sh").read_text().splitlines()
    assert lines[2:] == others[2:]


def test_wrong_numbers_of_arguments_print_the_usage(project):
    usages = {"1": "OUT", "2": "NOISE_DIR OUT UNET.pt", "3": "IMAGE_DIR OUT.csv"}
    special = {"2022/hw2_2": "OUT", "2024/hw2_3": "INPUT.json OUT MODEL.ckpt"}
    for path in SCRIPTS:
        script = f"{path.parent.name}/{path.stem}"
        usage = special.get(script, usages[script[-1]])
        count = len(usage.split())
        too_few = ["x"] * (count - 1)
        too_many = ["x"] * (count + 1)
        one_empty = ["x"] * (count - 1) + [""]
        for arguments in (too_few, too_many, one_empty):
            ended = grade(script, *arguments)
            assert ended.returncode == 2
            assert ended.stderr == f"usage: bash grading/{script}.sh {usage}\n"
    assert not (project / "called").exists()


def test_a_missing_checkpoint_is_one_line_that_says_what_to_put_where(project):
    for script, name, arguments in (
        ("2022/hw2_1", "wgangp_faces", ["out"]),
        ("2022/hw2_2", "ddpm_digits", ["out"]),
        ("2024/hw2_1", "ddpm_digits", ["out"]),
        ("2023/hw2_3", "dann_usps", ["usps", "out.csv"]),
    ):
        ended = grade(script, *arguments)
        assert ended.returncode == 2
        file = f"{project}/checkpoints/{name}.safetensors"
        assert ended.stderr.startswith(f"error: {file}: no such file; put model.safetensors of 'p")
        assert ended.stderr.count("\n") == 1
    elsewhere = grade("2022/hw2_2", "out", CHECKPOINTS="elsewhere")
    assert "elsewhere/ddpm_digits.safetensors" in elsewhere.stderr
    assert not list(project.glob("out*"))


@pytest.fixture
def inversion(project) -> None:
    """INPUT.json, a tiny model in place of Stable Diffusion, and its words in another folder."""
    prompt = {"token_name": "<new1>", "prompt": ["A <new1> on a plain background."]}
    Path("input.json").write_text(json.dumps({"0": prompt}))
    save_net(tiny_model(), Path("model.safetensors"))
    Path("words").mkdir()
    save_words(Path("words/sd_words.safetensors"), {"<new1>": torch.ones(1, 32)})


def test_25_images_of_each_prompt(run, project, inversion):
    arguments = ("input.json", "an out", "model.safetensors")
    run("2024/hw2_3", *arguments, CHECKPOINTS="words")
    names = {f"source0_prompt0_{number}.png" for number in range(25)}
    found = read_images(Path("an out/0/0"))
    assert set(found) == names
    before = hashes(Path("an out/0/0"))
    shutil.rmtree("an out")
    run("2024/hw2_3", *arguments, CHECKPOINTS="words")
    assert hashes(Path("an out/0/0")) == before


def test_missing_words_are_one_line_with_the_command_that_learns_them(
    project, inversion, error_of, monkeypatch
):
    ended = grade("2024/hw2_3", "input.json", "out", "model.safetensors")
    assert ended.returncode == 0
    call = (project / "called").read_text().split("\0")[1:-1]
    assert call == ["generate", "input.json", "out", "model.safetensors"]
    monkeypatch.setattr(p3_textual_inversion, "SMALL_MODEL", project / "checkpoints" / "x")
    commands = p3_textual_inversion.Train | p3_textual_inversion.Generate
    error = error_of(commands, p3_textual_inversion.main, *call)
    assert "no embedding of <new1> is known; learn it with: python" in error
    assert "train input.json --model model.safetensors" in error
    assert not Path("out").exists()


def test_a_link_at_the_root_is_like_the_script(project):
    """Graders type: bash hw2_1.sh OUT."""
    Path("hw2_1.sh").symlink_to("grading/2023/hw2_1.sh")
    ended = call_bash("hw2_1.sh", "out")
    file = f"{project}/checkpoints/ddpm_digits.safetensors"
    assert ended.stderr.startswith(f"error: {file}: no such file")


# Problem 1


def test_a_thousand_faces(run, project):
    save_net(Generator(4, 2), project / "checkpoints" / "wgangp_faces.safetensors")
    run("2022/hw2_1", "a b/faces")
    expected = {f"{number:04d}.png": ((64, 64), "RGB") for number in range(1000)}
    assert read_images(project / "a b" / "faces") == expected
    run("2022/hw2_1", "again")
    assert hashes(project / "again") == hashes(project / "a b" / "faces")
    assert "dcgan_faces" in grade("2022/hw2_1", "other", FACES="dcgan").stderr


# Problem 2


@pytest.fixture
def digits_elsewhere(project) -> Path:
    """A folder with ddpm_digits.safetensors, which is not checkpoints/."""
    torch.manual_seed(0)
    net = DdimUnet(3, 28, 8, multipliers=(1,), attention=(), blocks=1, n_classes=20, patch=7)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)  # what starts from zeros hides the class
    file = project / "elsewhere" / "ddpm_digits.safetensors"
    save_net(net, file, domains=["mnistm", "svhn"], schedule=SCHEDULE)
    return file.parent


def test_a_thousand_digits_of_mnistm(run, project, digits_elsewhere):
    """The script of 2022, which that of 2023 equals."""
    run("2022/hw2_2", "out", CHECKPOINTS=digits_elsewhere.name)
    assert read_images(project / "out") == dict.fromkeys(digit_names(100), ((28, 28), "RGB"))
    run("2022/hw2_2", "again", CHECKPOINTS=digits_elsewhere.name)
    assert hashes(project / "again") == hashes(project / "out")


def test_500_digits_of_both_domains(run, project, digits_elsewhere):
    calls = run("2024/hw2_1", "both/of them", CHECKPOINTS=digits_elsewhere.name)
    folder = project / "both" / "of them"
    assert sorted(path.name for path in folder.iterdir()) == ["mnistm", "svhn"]
    expected = dict.fromkeys(digit_names(50), ((28, 28), "RGB"))
    assert read_images(folder / "mnistm") == expected
    assert read_images(folder / "svhn") == expected
    mnistm = hashes(folder / "mnistm")
    for name, digest in hashes(folder / "svhn").items():
        assert digest != mnistm[name]

    mnistm_args, svhn_args = (tyro.cli(Generate, args=call[1:]) for call in calls)
    assert mnistm_args.domains == ("mnistm",)
    assert mnistm_args.interval == (0.1, 0.45)
    assert svhn_args.domains == ("svhn",)
    assert svhn_args.interval == (0, 0.3)
    for args, calls_each in ((mnistm_args, 12), (svhn_args, 24)):
        assert args.spacing is None  # "beta" for digits
        steps = spaced_steps(1000, args.steps, "beta")
        low, high = args.interval
        guided = [t for t in steps if low <= t / 1000 <= high]
        assert len(steps) + len(guided) == calls_each


def test_a_face_for_each_noise_and_the_same_bytes_again(run, project):
    """The second time with the real Python, as a grader runs it."""
    net = DdimUnet(size=16, width=8, multipliers=(1, 2), attention=(8,), blocks=1)
    torch.nn.init.normal_(net.out[2].weight, std=0.1)
    save_net(net, project / "own.safetensors", size=16, schedule={"steps": 50})
    (project / "the noises").mkdir()
    for number in range(10):
        torch.save(torch.randn(1, 3, 16, 16), project / "the noises" / f"{number:02d}.pt")
    run("2023/hw2_2", "the noises", "out", "own.safetensors")
    expected = {f"{number:02d}.png": ((16, 16), "RGB") for number in range(10)}
    assert read_images(project / "out") == expected
    first = hashes(project / "out")
    assert len(set(first.values())) == 10

    shutil.rmtree(project / "out")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = ROOT / "grading" / "2024" / "hw2_2.sh"
    ended = call_bash(script, "the noises", "out", "own.safetensors", PATH=path)
    assert ended.returncode == 0
    assert ended.stderr == ""
    assert hashes(project / "out") == first


# Problem 3


def read_csv(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.fixture
def one_answer_networks(project) -> None:
    """Networks that always answer with the same label: 3 for SVHN and 4 for USPS."""
    for domain, label in (("svhn", 3), ("usps", 4)):
        net = DannCNN()
        torch.nn.init.zeros_(net.class_classifier.c_fc3.weight)
        net.class_classifier.c_fc3.bias.data = torch.eye(10)[label]
        save_net(net, project / "checkpoints" / f"dann_{domain}.safetensors")


@pytest.mark.usefixtures("one_answer_networks")
def test_labels_of_a_folder(run, project):
    """The domain that the path names last decides, in any case; otherwise DOMAIN does.

    The csv has a row for each image, sorted by name.
    """
    images = project / "USPS" / "my SVHN" / "data"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, shape in (("b.png", (28, 28)), ("a10.png", (28, 28, 3)), ("a9.PNG", (16, 16))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(images / name)
    run("2022/hw2_3", "USPS/my SVHN/data", "out of it/pred.csv", DOMAIN="usps")
    first = project / "out of it" / "pred.csv"
    header = ["image_name", "label"]
    assert read_csv(first) == [header, ["a10.png", "3"], ["a9.PNG", "3"], ["b.png", "3"]]
    run("2022/hw2_3", "USPS/my SVHN/data", "again.csv", DOMAIN="usps")
    assert (project / "again.csv").read_bytes() == first.read_bytes()

    (project / "USPS").rename(project / "images")
    (project / "images" / "my SVHN").rename(project / "images" / "unnamed")
    run("2022/hw2_3", "images/unnamed/data", "pred.csv", DOMAIN="USPS")
    expected = "image_name,label\na10.png,4\na9.PNG,4\nb.png,4\n"
    assert (project / "pred.csv").read_text() == expected


@pytest.mark.parametrize(
    ("path", "domain"),
    [
        ("svhn/x", "svhn"),
        ("a/SVHN_to_Usps", "usps"),
        ("usps_svhn/usps/1", "usps"),
        ("uspsvhn", "svhn"),
    ],
)
@pytest.mark.usefixtures("project")
def test_the_path_names_the_domain(path, domain):
    ended = grade("2023/hw2_3", path, "out.csv")
    assert f"/dann_{domain}.safetensors" in ended.stderr


@pytest.mark.parametrize("environment", [{}, {"DOMAIN": "mnistm"}])
@pytest.mark.usefixtures("project")
def test_an_unknown_domain_is_named(environment):
    ended = grade("2022/hw2_3", "images/data", "out.csv", **environment)
    assert ended.returncode == 2
    message = "error: images/data: the path names neither svhn nor usps; DOMAIN=svhn"
    assert ended.stderr.startswith(message)
    assert ended.stderr.count("\n") == 1
