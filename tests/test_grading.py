"""grading/: each script by its grader's arguments, on tiny nets; checkpoints/release.py: what it stores and tells.

A stand-in for Python notes what a script calls, which then runs in this process: starting Python takes seconds.
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
import safetensors.torch
import torch
import tyro
from PIL import Image

from checkpoints import release
from checkpoints.release import Release
from common.diffusion import Schedule
from common.run import ROOT, UserError, load_net
from models.context_unet import ContextUnet
from models.dann import DannCNN
from models.ddim_unet import DdimUnet
from models.gan import GENERATORS, Generator
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
    """What bash says of grading/SCRIPT.sh, from the current folder."""
    command = ["bash", f"grading/{script}.sh", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.fixture
def run(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`run(script, *arguments, **environment)`: what the script calls, done in this process; returns its arguments."""

    def run(script: str, *arguments: str, **environment: str) -> list[list[str]]:
        (project / "called").unlink(missing_ok=True)
        ended = grade(script, *arguments, **environment)
        assert (ended.returncode, ended.stderr) == (0, "")
        monkeypatch.setattr(os, "fsync", lambda file: None)  # of a thousand files: most of the time
        calls = [call.split("\0")[:-1] for call in (project / "called").read_text().splitlines()]
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
    return [f"{digit}_{number:03d}.png" for digit in range(10) for number in range(1, per_class + 1)]


def test_every_year_has_its_three_scripts():
    expected = [f"grading/{year}/hw2_{number}.sh" for year in (2022, 2023, 2024) for number in (1, 2, 3)]
    assert [str(path) for path in SCRIPTS] == expected
    for name in ("2022/hw2_2 2023/hw2_1", "2022/hw2_3 2023/hw2_3", "2023/hw2_2 2024/hw2_2"):  # the same problem
        one, other = ((ROOT / "grading" / f"{script}.sh").read_text().splitlines() for script in name.split())
        assert one[2:] == other[2:]


def test_wrong_numbers_of_arguments_give_the_usage(project):
    usages = {"1": "OUT", "2": "NOISE_DIR OUT UNET.pt", "3": "IMAGE_DIR OUT.csv"}
    special = {"2022/hw2_2": "OUT", "2024/hw2_3": "INPUT.json OUT MODEL.ckpt"}
    for path in SCRIPTS:
        script = f"{path.parent.name}/{path.stem}"
        usage = special.get(script, usages[script[-1]])
        count = len(usage.split())
        for arguments in (["x"] * (count - 1), ["x"] * (count + 1), ["x"] * (count - 1) + [""]):
            ended = grade(script, *arguments)
            assert (ended.returncode, ended.stderr) == (2, f"usage: bash grading/{script}.sh {usage}\n")
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
        expected = f"error: {project}/checkpoints/{name}.safetensors: no such file; put model.safetensors of 'p"
        assert ended.stderr.startswith(expected)
        assert ended.stderr.count("\n") == 1
    assert "elsewhere/ddpm_digits.safetensors" in grade("2022/hw2_2", "out", CHECKPOINTS="elsewhere").stderr
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


def test_digits(run, project):
    """A thousand of MNIST-M by the script of 2022, which 2023's equals; 500 of each domain by that of 2024."""
    torch.manual_seed(0)
    net = ContextUnet(n_feat=8, n_classes=20)
    for weight in net.parameters():
        weight.data *= 2.4 if weight.dim() > 1 else 1  # PyTorch's own let a class fade from layer to layer
    domains = {"domains": ["mnistm", "svhn"], "schedule": SCHEDULE}
    save_net(net, project / "elsewhere" / "ddpm_digits.safetensors", **domains)
    run("2022/hw2_2", "out", CHECKPOINTS="elsewhere")
    assert read_images(project / "out") == dict.fromkeys(digit_names(100), ((28, 28), "RGB"))
    run("2022/hw2_2", "again", CHECKPOINTS="elsewhere")
    assert fingerprint(project / "again") == fingerprint(project / "out")
    calls = [tyro.cli(Generate, args=call[1:]) for call in run("2024/hw2_1", "both/of them", CHECKPOINTS="elsewhere")]
    assert [(args.domains, args.interval) for args in calls] == [(("mnistm",), (0, 1)), (("svhn",), (0, 0.3))]
    for args in calls:
        steps = Schedule().subset(args.steps, args.spacing)
        guided = [t for t in steps if args.interval[0] <= t / 1_000 <= args.interval[1]]
        assert (args.spacing, len(steps) + len(guided)) == ("beta", 24)  # passes of the net an image
    assert sorted(path.name for path in (project / "both" / "of them").iterdir()) == ["mnistm", "svhn"]
    for domain in ("mnistm", "svhn"):
        assert read_images(project / "both" / "of them" / domain) == dict.fromkeys(digit_names(50), ((28, 28), "RGB"))
    images = [fingerprint(project / "both" / "of them" / domain) for domain in ("mnistm", "svhn")]
    assert all(images[0][name] != images[1][name] for name in images[0])


def test_a_face_for_each_noise_and_the_same_bytes_again(run, project):
    """The second time by the real Python, as a grader runs it."""
    net = DdimUnet(size=16, width=8, multipliers=(1, 2), attention=(8,), blocks=1)
    torch.nn.init.normal_(net.out[2].weight, std=0.1)
    save_net(net, project / "own.safetensors", size=16, schedule={"steps": 50})
    (project / "the noises").mkdir()
    for number in range(10):
        torch.save(torch.randn(1, 3, 16, 16), project / "the noises" / f"{number:02d}.pt")
    run("2023/hw2_2", "the noises", "out", "own.safetensors")
    assert read_images(project / "out") == {f"{number:02d}.png": ((16, 16), "RGB") for number in range(10)}
    assert len(set(fingerprint(project / "out").values())) == 10
    shutil.copytree(project / "out", project / "first")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", str(ROOT / "grading" / "2024" / "hw2_2.sh"), "the noises", "out", "own.safetensors"]
    ended = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert fingerprint(project / "out") == fingerprint(project / "first")


def test_labels_of_a_folder(run, project):
    """The domain that the path names last decides, in any case; else DOMAIN. A row for each image, sorted by name."""
    nets = {domain: DannCNN() for domain in ("svhn", "usps")}
    for label, (domain, net) in enumerate(nets.items(), start=3):  # each always answers with its own label
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
        assert list(csv.reader(file)) == [["image_name", "label"], ["a10.png", "3"], ["a9.PNG", "3"], ["b.png", "3"]]
    run("2022/hw2_3", "USPS/my SVHN/data", "again.csv", DOMAIN="usps")
    assert (project / "again.csv").read_bytes() == (project / "out of it" / "pred.csv").read_bytes()
    (project / "USPS").rename(project / "images")
    (project / "images" / "my SVHN").rename(project / "images" / "unnamed")
    run("2022/hw2_3", "images/unnamed/data", "pred.csv", DOMAIN="USPS")
    assert (project / "pred.csv").read_text() == "image_name,label\na10.png,4\na9.PNG,4\nb.png,4\n"


@pytest.mark.parametrize(
    ("path", "domain"),
    [("svhn/x", "svhn"), ("a/SVHN_to_Usps", "usps"), ("usps_svhn/usps/1", "usps"), ("uspsvhn", "svhn")],
)
def test_domain_by_path(project, path, domain):
    ended = grade("2023/hw2_3", path, "out.csv")
    assert f"/dann_{domain}.safetensors" in ended.stderr


def test_a_link_at_the_root_does_as_the_script(project):
    """What graders type: bash hw2_1.sh OUT."""
    Path("hw2_1.sh").symlink_to("grading/2023/hw2_1.sh")
    ended = subprocess.run(["bash", "hw2_1.sh", "out"], capture_output=True, text=True, check=False)
    assert ended.stderr.startswith(f"error: {project}/checkpoints/ddpm_digits.safetensors: no such file")


def test_domain_unknown(project):
    for environment in ({}, {"DOMAIN": "mnistm"}):
        ended = grade("2022/hw2_3", "images/data", "out.csv", **environment)
        assert ended.returncode == 2
        assert ended.stderr.startswith("error: images/data: the path names neither svhn nor usps; DOMAIN=svhn")
        assert ended.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------ releases


def make_run(folder: Path, net: torch.nn.Module, **config: object) -> Path:
    """A finished run of p1_dcgan.py, as it lies on another machine, beside the data it names."""
    data = folder.parent / "secret place" / "data"
    (data / "face").mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    save_net(net, folder / "model.safetensors", **config)
    arguments = {"data_dir": str(data), "batch_size": 64, "seed": 7, "output_dir": "/secret/runs/dcgan"}
    command = "/secret/p1_dcgan.py train --data-dir /secret/data --output-dir=/secret/runs/dcgan --seed 7"
    hardware = {"device": "cuda", "name": "Some GPU", "precision": "bf16", "processes": 2, "threads": 4}
    made = {"arguments": arguments, "command": command, "versions": {"torch": "2.0"}, "git_commit": "abc"}
    (folder / "config.json").write_text(json.dumps(made | {"hardware": hardware}))
    (folder / "metrics.jsonl").write_text('{"step": 10, "epoch": 1}\n{"step": 2000, "epoch": 20}\n')
    (folder / "result.json").write_text('{"epoch": 20, "d_loss": 1.5, "seconds": 5400.0}')
    return folder


def test_release(tmp_path):
    torch.manual_seed(0)
    net = Generator(4, 4)
    with torch.no_grad():
        net.main[0].weight *= 1e-7 / 0.02  # all of it near or below float16's smallest number
        net.main[3].weight.view(-1)[0] = 1e5  # above its largest
        net.main[6].weight.view(-1)[0] = 1e-9  # one number that does not matter
        net.main[1].running_var.fill_(1 / 3)
    run = make_run(tmp_path / "run", net, method="dcgan", seed=7)
    scores = {"full": 16.884, "half": 16.889}
    for label, distance in scores.items():
        score = {"score": "fid", "metric": "FID", "distance": distance, "floor": None, "images": {"generated": 9}}
        score["command"] = "/secret/score.py fid /secret/faces --features inception"
        (tmp_path / f"{label}.json").write_text(json.dumps(score))
    figures = tuple(f"{label}={tmp_path / label}.json" for label in scores)
    for out in ("a", "b"):
        release.main(Release(run, "faces", figures=figures, note=("Of the seventh seed.",), output_dir=tmp_path / out))
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")

    file = tmp_path / "a" / "faces.safetensors"
    stored = safetensors.torch.load_file(file)
    parameters = dict(net.named_parameters())
    whole = {"main.0.weight", "main.3.weight"}
    for key, value in net.state_dict().items():
        if key in parameters and key not in whole:
            assert stored[key].dtype == torch.float16
            assert torch.equal(stored[key], value.half())
        else:
            assert torch.equal(stored[key], value)
            assert stored[key].dtype == value.dtype
    loaded, config = load_net(file, GENERATORS)
    assert config == net.config | {"method": "dcgan", "seed": 7}
    assert all(p.dtype == torch.float32 and torch.equal(p, stored[k].float()) for k, p in loaded.named_parameters())

    card = (tmp_path / "a" / "faces.md").read_text()
    assert hashlib.sha256(file.read_bytes()).hexdigest() in card
    for told in (
        f"{file.stat().st_size:,} bytes",
        "11 tensors in float16 (1 of their numbers, below 3e-8, became 0); unchanged: 12 buffers",
        "2 too wide for float16",
        "CelebA: non-commercial research",
        "`python p1_dcgan.py train --data-dir data --output-dir=dcgan --seed 7`, commit abc",
        "seed 7, epochs 20, steps 2,000 of 64 images",
        "1.50 hours on device: cuda, name: Some GPU",
        "| full | FID | distance 16.88 | 9 | `python score.py fid faces --features inception` |",
        "| half | FID | distance 16.89 | 9 | `python score.py fid faces --features inception` |",
        "Of the seventh seed.",
    ):
        assert told in card
    assert "secret" not in card


def test_release_names_the_data(tmp_path):
    """Drawn data is not under the terms of what it imitates; DANN saw two domains."""
    for domain in ("mnistm", "usps"):
        (tmp_path / "digits" / domain).mkdir(parents=True)
    (tmp_path / "digits" / "usps" / "made.json").write_text('{"made_by": "synthetic"}')
    about = {"source": "mnistm", "target": "usps", "method": "dann"}
    assert release.describe_data(about, tmp_path) == {
        "data": "MNIST-M, USPS-like images: train split",
        "terms of the data": "MNIST-M: digits of MNIST on photographs of BSDS500 (non-commercial research); "
        "USPS-like images: drawn by prepare_data.py synthetic",
    }
    assert "USPS" not in str(release.describe_data(about | {"method": "source"}, tmp_path))
    with pytest.raises(UserError, match="digits/svhn: no such folder; --data-dir"):
        release.describe_data({"domains": ["mnistm", "svhn"]}, tmp_path)


def test_release_refuses(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", Generator(4, 2))
    out = tmp_path / "out"
    with pytest.raises(UserError, match="--figures half=: must be LABEL=FILE"):
        release.main(Release(run, "faces", figures=("half",), output_dir=out))
    monkeypatch.setattr(release, "MOST_BYTES", 1_000)
    with pytest.raises(UserError, match="bytes in half precision, over 1,000"):
        release.main(Release(run, "faces", output_dir=out))
    (run / "result.json").unlink()
    with pytest.raises(OSError, match=r"result\.json"):
        release.main(Release(run, "faces", output_dir=out))
    assert not out.exists()


def test_figures_of_every_score():
    row = release.figure_row
    dann = {"accuracy": {"svhn": 82.871, "mnistm": 99.0}, "oracle_best_accuracy": {"svhn": 90.0}, "seconds": 3.0}
    assert row("full", dann) == "| full |  | accuracy svhn 82.87, accuracy mnistm 99.00 |  | its own |"
    faces = {"metric": "exactly one face", "one_face_percent": 96.2, "real": {"one_face_percent": 95.31}}
    told = "one face percent 96.20, real one face percent 95.31"
    assert row("x", faces) == f"| x | exactly one face | {told} |  | its own |"
    digits = {"metric": "accuracy", "net": "DigitResNet", "accuracy": 99.5, "digits": [{"accuracy": 1.0}]}
    digits |= {"real_accuracy": None, "diversity_percent_of_real": 81.04, "images": 1000}
    told = "accuracy 99.50, diversity percent of real 81.04"
    assert row("half", digits) == f"| half | accuracy, DigitResNet | {told} | 1000 | its own |"
    assert row("x", {"epoch": 3, "d_loss": 1.0}) == ""
    command = "score.py fid /a/b/faces /d/data/face/val --weights /w/judge/net.pt --data-dir=/d/data x/y"
    short = "score.py fid faces data/face/val --weights judge/net.pt --data-dir=data x/y"
    assert release.strip_folders(command) == short


def test_what_is_released_loads_and_is_what_its_card_tells():
    released = sorted((ROOT / "checkpoints").glob("*.safetensors"))
    names = ["dann_svhn", "dann_usps", "dcgan_faces", "ddim_faces", "ddpm_digits", "wgangp_faces"]
    assert {path.stem for path in released} >= set(names)
    for path in released:
        net, _ = load_net(path, release.NETS)
        assert all(weight.isfinite().all() for weight in net.parameters())
        content, card = path.read_bytes(), path.with_suffix(".md").read_text()
        assert f"{len(content):,} bytes, sha256 `{hashlib.sha256(content).hexdigest()}`" in card
        assert len(content) <= release.MOST_BYTES
    assert sum(path.stat().st_size for path in released) <= 60e6
