"""tools/release.py: what it stores, what its card says; the released weights and their cards."""

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from common.checkpoints import load_net
from common.cli import UserError
from common.files import ROOT
from models.gan import GENERATORS, Generator
from tests.conftest import save_net
from tests.test_grading import fingerprint
from tools import release
from tools.release import Release


def make_run(folder: Path, net: torch.nn.Module, **config: object) -> Path:
    """A finished run of p1_dcgan.py from another machine, beside the data that it names."""
    data = folder.parent / "secret place" / "data"
    (data / "face").mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    save_net(net, folder / "model.safetensors", **config)
    command = (
        "/secret/p1_dcgan.py train --data-dir /secret/data --output-dir=/secret/runs/dcgan --seed 7"
    )
    content = {
        "arguments": {
            "data_dir": str(data),
            "batch_size": 64,
            "seed": 7,
            "output_dir": "/secret/runs/dcgan",
        },
        "command": command,
        "versions": {"torch": "2.0"},
        "git_commit": "abc",
        "hardware": {
            "device": "cuda",
            "name": "Some GPU",
            "precision": "bf16",
            "processes": 2,
            "threads": 4,
        },
    }
    (folder / "config.json").write_text(json.dumps(content))
    rows = '{"step": 10, "epoch": 1}\n{"step": 2000, "epoch": 20}\n'
    (folder / "metrics.jsonl").write_text(rows)
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
        score = {
            "score": "fid",
            "metric": "FID",
            "distance": distance,
            "floor": None,
            "images": {"generated": 9},
            "command": "/secret/evaluate.py fid /secret/faces --features inception",
        }
        (tmp_path / f"{label}.json").write_text(json.dumps(score))
    results = tuple(f"{label}={tmp_path / label}.json" for label in scores)
    note = ("Of the seventh seed.",)
    for out in ("a", "b"):
        release.main(Release(run, "faces", results=results, note=note, output_dir=tmp_path / out))
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
    for key, value in loaded.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value, stored[key].float())

    card = (tmp_path / "a" / "faces.md").read_text()
    assert hashlib.sha256(file.read_bytes()).hexdigest() in card
    for text in (
        f"{file.stat().st_size:,} bytes",
        "11 tensors in float16 (1 of their numbers, below 3e-8, became 0); unchanged: 12 buffers",
        "2 too wide for float16",
        "CelebA: non-commercial research",
        "`python p1_dcgan.py train --data-dir data --output-dir=dcgan --seed 7`, commit abc",
        "seed 7, epochs 20, steps 2,000 of 64 images",
        "1.50 hours on device: cuda, name: Some GPU",
        "| full | FID | distance 16.88 | 9 | `python evaluate.py fid faces --features inception` |",
        "| half | FID | distance 16.89 | 9 | `python evaluate.py fid faces --features inception` |",
        "Of the seventh seed.",
    ):
        assert text in card
    assert "secret" not in card


def test_release_names_the_data(tmp_path):
    """Drawn data is not under the terms of what it imitates; DANN saw two domains."""
    for domain in ("mnistm", "usps"):
        (tmp_path / "digits" / domain).mkdir(parents=True)
    (tmp_path / "digits" / "usps" / "made.json").write_text('{"made_by": "synthetic"}')
    about = {"source": "mnistm", "target": "usps", "method": "dann"}
    assert release.describe_data(about, tmp_path) == {
        "data": "MNIST-M, USPS-like images: train split",
        "terms of the data": (
            "MNIST-M: digits of MNIST on photographs of BSDS500 (non-commercial research); "
            "USPS-like images: drawn by prepare_data.py synthetic"
        ),
    }
    assert "USPS" not in str(release.describe_data(about | {"method": "source"}, tmp_path))
    with pytest.raises(UserError, match="digits/svhn: no such folder; --data-dir"):
        release.describe_data({"domains": ["mnistm", "svhn"]}, tmp_path)


def test_release_refuses(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", Generator(4, 2))
    out = tmp_path / "out"
    with pytest.raises(UserError, match="--results half: must be LABEL=FILE"):
        release.main(Release(run, "faces", results=("half",), output_dir=out))
    monkeypatch.setattr(release, "MOST_BYTES", 1_000)
    with pytest.raises(UserError, match="bytes in half precision, over 1,000"):
        release.main(Release(run, "faces", output_dir=out))
    (run / "result.json").unlink()
    with pytest.raises(OSError, match=r"result\.json"):
        release.main(Release(run, "faces", output_dir=out))
    assert not out.exists()


def test_results_of_every_score():
    row = release.result_row
    dann = {
        "accuracy": {"svhn": 82.871, "mnistm": 99.0},
        "oracle_best_accuracy": {"svhn": 90.0},
        "seconds": 3.0,
    }
    numbers = "accuracy svhn 82.87, accuracy mnistm 99.00"
    assert row("full", dann) == f"| full |  | {numbers} |  | its own |"
    faces = {
        "metric": "exactly one face",
        "one_face_percent": 96.2,
        "real": {"one_face_percent": 95.31},
    }
    numbers = "one face percent 96.20, real one face percent 95.31"
    assert row("x", faces) == f"| x | exactly one face | {numbers} |  | its own |"
    digits = {
        "metric": "accuracy",
        "net": "DigitResNet",
        "accuracy": 99.5,
        "digits": [{"accuracy": 1.0}],
        "real_accuracy": None,
        "diversity_percent_of_real": 81.04,
        "images": 1000,
    }
    numbers = "accuracy 99.50, diversity percent of real 81.04"
    assert row("half", digits) == f"| half | accuracy, DigitResNet | {numbers} | 1000 | its own |"
    assert row("x", {"epoch": 3, "d_loss": 1.0}) == ""


def test_folders_of_another_machine_are_removed_from_a_command():
    command = (
        "evaluate.py fid /a/b/faces /d/data/face/val --weights /w/run/net.pt --data-dir=/d/data x/y"
    )
    short = "evaluate.py fid faces data/face/val --weights run/net.pt --data-dir=data x/y"
    assert release.strip_folders(command) == short


def test_released_weights_load_and_agree_with_their_cards():
    released = sorted((ROOT / "checkpoints").glob("*.safetensors"))
    names = {path.stem for path in released}
    assert names >= {
        "dann_svhn",
        "dann_usps",
        "dcgan_faces",
        "ddim_faces",
        "ddpm_digits",
        "wgangp_faces",
    }
    for path in released:
        net, _ = load_net(path, release.NETS)
        assert all(weight.isfinite().all() for weight in net.parameters())
        content = path.read_bytes()
        card = path.with_suffix(".md").read_text()
        digest = hashlib.sha256(content).hexdigest()
        assert f"{len(content):,} bytes, sha256 `{digest}`" in card
        assert len(content) <= release.MOST_BYTES
    assert sum(path.stat().st_size for path in released) <= 60e6
