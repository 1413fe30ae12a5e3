"""grading/: each script with its grader's arguments, on tiny networks.

A stand-in for Python notes what a script calls. That is then run in this process, because starting
Python takes seconds.
"""

import csv
import hashlib
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

from common.files import ROOT
from diffusion.schedule import spaced_steps
from models.context_unet import ContextUnet
from models.dann import DannCNN
from models.ddim_unet import DdimUnet
from models.gan import Generator
from p2_ddpm_infer import Generate
from tests.conftest import save_net

SCHEDULE = {"steps": 18, "as_given": True}  # as many as the scripts take at most
SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "grading").glob("*/*.sh"))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the scripts, no weights yet, and a Python that notes its arguments in it."""
    folder = tmp_path / "the project"
    shutil.copytree(ROOT / "grading", folder / "grading")
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    noted = shlex.quote(str(folder / "called"))
    python.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" >>{noted}\necho >>{noted}\n")
    python.chmod(0o755)
    monkeypatch.chdir(folder)
    for name in ("CHECKPOINTS", "DOMAIN", "FACES"):
        monkeypatch.delenv(name, raising=False)
    return folder


def grade(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run grading/SCRIPT.sh from the current folder."""
    return run_bash(f"grading/{script}.sh", *arguments, **environment)


def run_bash(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """Run bash with these words; returns how it ended."""
    return subprocess.run(
        ["bash", *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def run(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`run(script, *arguments, **environment)` does what a script calls in this process.

    It returns the arguments of the calls.
    """

    def run(script: str, *arguments: str, **environment: str) -> list[list[str]]:
        (project / "called").unlink(missing_ok=True)
        ended = grade(script, *arguments, **environment)
        assert (ended.returncode, ended.stderr) == (0, "")
        monkeypatch.setattr(os, "fsync", lambda file: None)  # most of the time of a thousand files
        lines = (project / "called").read_text().splitlines()
        calls = [line.split("\0")[:-1] for line in lines]
        for called, *rest in calls:
            assert Path(called).parent == project
            monkeypatch.setattr(sys, "argv", [called, *rest])
            runpy.run_path(str(ROOT / Path(called).name), run_name="__main__")
        return calls

    return run


def read_images(folder: Path) -> dict[str, tuple[tuple[int, int], str]]:
    """Size and mode of everything in a folder."""
    found = {}
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            assert image.format == "PNG"
            found[path.name] = (image.size, image.mode)
    return found


def fingerprint(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def digit_names(per_class: int) -> list[str]:
    names = []
    for digit in range(10):
        names += [f"{digit}_{number:03d}.png" for number in range(1, per_class + 1)]
    return names


def test_every_year_has_its_three_scripts():
    expected = []
    for year in (2022, 2023, 2024):
        expected += [f"grading/{year}/hw2_{number}.sh" for number in (1, 2, 3)]
    assert [str(path) for path in SCRIPTS] == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2022/hw2_2", "2023/hw2_1"),
        ("2022/hw2_3", "2023/hw2_3"),
        ("2023/hw2_2", "2024/hw2_2"),
    ],
)
def test_the_same_problem_has_the_same_script(one, other):
    texts = []
    for script in (one, other):
        lines = (ROOT / "grading" / f"{script}.sh").read_text().splitlines()
        texts.append(lines[2:])  # without the year
    assert texts[0] == texts[1]


def test_wrong_numbers_of_arguments_give_the_usage(project):
    usages = {"1": "OUT", "2": "NOISE_DIR OUT UNET.pt", "3": "IMAGE_DIR OUT.csv"}
    special = {"2022/hw2_2": "OUT", "2024/hw2_3": "INPUT.json OUT MODEL.ckpt"}
    for path in SCRIPTS:
        script = f"{path.parent.name}/{path.stem}"
        usage = special.get(script, usages[script[-1]])
        count = len(usage.split())
        for arguments in (["x"] * (count - 1), ["x"] * (count + 1), ["x"] * (count - 1) + [""]):
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
        file = project / "checkpoints" / f"{name}.safetensors"
        expected = f"error: {file}: no such file; put model.safetensors of 'p"
        assert ended.stderr.startswith(expected)
        assert ended.stderr.count("\n") == 1
    ended = grade("2022/hw2_2", "out", CHECKPOINTS="elsewhere")
    assert "elsewhere/ddpm_digits.safetensors" in ended.stderr
    assert not list(project.glob("out*"))


def test_textual_inversion_says_that_it_is_not_there(project):
    ended = grade("2024/hw2_3", "input.json", "out", "model.ckpt")
    assert ended.returncode == 1
    assert "textual inversion" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_thousand_faces(run, project):
    save_net(Generator(4, 2), project / "checkpoints" / "wgangp_faces.safetensors")
    run("2022/hw2_1", "a b/faces")
    expected = {f"{number:04d}.png": ((64, 64), "RGB") for number in range(1000)}
    assert read_images(project / "a b" / "faces") == expected
    run("2022/hw2_1", "again")
    assert fingerprint(project / "again") == fingerprint(project / "a b" / "faces")
    assert "dcgan_faces" in grade("2022/hw2_1", "other", FACES="dcgan").stderr


@pytest.fixture
def digits_checkpoint(project: Path) -> Path:
    """A tiny network for the digits of both domains, in the folder elsewhere."""
    torch.manual_seed(0)
    net = ContextUnet(n_feat=8, n_classes=20)
    for weight in net.parameters():
        if weight.dim() > 1:
            weight.data *= 2.4  # with PyTorch's own weights a class fades from layer to layer
    config = {"domains": ["mnistm", "svhn"], "schedule": SCHEDULE}
    return save_net(net, project / "elsewhere" / "ddpm_digits.safetensors", **config)


def test_a_thousand_digits_and_the_same_bytes_again(run, project, digits_checkpoint):
    run("2022/hw2_2", "out", CHECKPOINTS="elsewhere")
    assert read_images(project / "out") == dict.fromkeys(digit_names(100), ((28, 28), "RGB"))
    run("2022/hw2_2", "again", CHECKPOINTS="elsewhere")
    assert fingerprint(project / "again") == fingerprint(project / "out")


def test_500_digits_of_each_domain(run, project, digits_checkpoint):
    calls = run("2024/hw2_1", "both/of them", CHECKPOINTS="elsewhere")
    mnistm, svhn = (tyro.cli(Generate, args=call[1:]) for call in calls)
    assert (mnistm.domains, mnistm.interval) == (("mnistm",), (0, 1))
    assert (svhn.domains, svhn.interval) == (("svhn",), (0, 0.3))
    for args in (mnistm, svhn):
        steps = spaced_steps(1_000, args.steps, args.spacing)
        low, high = args.interval
        guided = [t for t in steps if low <= t / 1_000 <= high]
        assert args.spacing == "beta"
        assert len(steps) + len(guided) == 24  # network calls for each image
    out = project / "both" / "of them"
    assert sorted(path.name for path in out.iterdir()) == ["mnistm", "svhn"]
    for domain in ("mnistm", "svhn"):
        assert read_images(out / domain) == dict.fromkeys(digit_names(50), ((28, 28), "RGB"))
    mnistm_files = fingerprint(out / "mnistm")
    svhn_files = fingerprint(out / "svhn")
    assert all(mnistm_files[name] != svhn_files[name] for name in mnistm_files)


def test_a_face_for_each_noise_and_the_same_bytes_again(run, project):
    """The second time with the real Python, as a grader runs it."""
    net = DdimUnet(size=16, width=8, multipliers=(1, 2), attention=(8,), blocks=1)
    torch.nn.init.normal_(net.out[2].weight, std=0.1)
    save_net(net, project / "own.safetensors", size=16, schedule={"steps": 50})
    (project / "the noises").mkdir()
    for number in range(10):
        torch.save(torch.randn(1, 3, 16, 16), project / "the noises" / f"{number:02d}.pt")
    arguments = ["the noises", "out", "own.safetensors"]
    run("2023/hw2_2", *arguments)
    expected = {f"{number:02d}.png": ((16, 16), "RGB") for number in range(10)}
    assert read_images(project / "out") == expected
    assert len(set(fingerprint(project / "out").values())) == 10
    shutil.copytree(project / "out", project / "first")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = ROOT / "grading" / "2024" / "hw2_2.sh"
    ended = run_bash(str(script), *arguments, PATH=path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert fingerprint(project / "out") == fingerprint(project / "first")


def test_labels_of_a_folder(run, project):
    """The domain that the path names last decides, in any case, or else DOMAIN.

    The csv has a row for each image, sorted by name.
    """
    for label, domain in ((3, "svhn"), (4, "usps")):
        net = DannCNN()  # it always answers with its label
        torch.nn.init.zeros_(net.class_classifier.c_fc3.weight)
        net.class_classifier.c_fc3.bias.data = torch.eye(10)[label]
        save_net(net, project / "checkpoints" / f"dann_{domain}.safetensors")
    rng = np.random.default_rng(0)
    images = project / "USPS" / "my SVHN" / "data"
    images.mkdir(parents=True)
    for name, shape in (("b.png", (28, 28)), ("a10.png", (28, 28, 3)), ("a9.PNG", (16, 16))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(images / name)
    run("2022/hw2_3", "USPS/my SVHN/data", "out of it/pred.csv", DOMAIN="usps")
    with (project / "out of it" / "pred.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["image_name", "label"], ["a10.png", "3"], ["a9.PNG", "3"], ["b.png", "3"]]
    run("2022/hw2_3", "USPS/my SVHN/data", "again.csv", DOMAIN="usps")
    assert (project / "again.csv").read_bytes() == (project / "out of it" / "pred.csv").read_bytes()
    (project / "USPS").rename(project / "images")
    (project / "images" / "my SVHN").rename(project / "images" / "unnamed")
    run("2022/hw2_3", "images/unnamed/data", "pred.csv", DOMAIN="USPS")
    assert (project / "pred.csv").read_text() == "image_name,label\na10.png,4\na9.PNG,4\nb.png,4\n"


@pytest.mark.parametrize(
    ("path", "domain"),
    [
        ("svhn/x", "svhn"),
        ("a/SVHN_to_Usps", "usps"),
        ("usps_svhn/usps/1", "usps"),
        ("uspsvhn", "svhn"),
    ],
)
def test_domain_by_path(project, path, domain):
    ended = grade("2023/hw2_3", path, "out.csv")
    assert f"/dann_{domain}.safetensors" in ended.stderr


def test_a_link_at_the_root_does_as_the_script(project):
    """What graders type: bash hw2_1.sh OUT."""
    Path("hw2_1.sh").symlink_to("grading/2023/hw2_1.sh")
    ended = run_bash("hw2_1.sh", "out")
    file = project / "checkpoints" / "ddpm_digits.safetensors"
    assert ended.stderr.startswith(f"error: {file}: no such file")


def test_domain_unknown(project):
    for environment in ({}, {"DOMAIN": "mnistm"}):
        ended = grade("2022/hw2_3", "images/data", "out.csv", **environment)
        assert ended.returncode == 2
        expected = "error: images/data: the path names neither svhn nor usps; DOMAIN=svhn"
        assert ended.stderr.startswith(expected)
        assert ended.stderr.count("\n") == 1
