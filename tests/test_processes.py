"""Work that several processes share: the split, and the files of two processes beside those of one.

The trainings, and the sampling of faces, have tests of this kind in the files of their scripts.
"""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.utils
import pytest
import safetensors.torch
import torch

from common import cli, progress
from common.files import ROOT
from common.processes import gather_shares, my_share, work_alone
from diffusion.schedule import Schedule
from inversion.concepts import save_words
from models.autoencoder import Autoencoder
from models.context_unet import ContextUnet
from models.dann import DannCNN
from models.ddim_unet import DdimUnet
from models.digit_classifier import DigitResNet
from models.gan import Generator
from tests.conftest import noise, save_images, save_net
from tests.test_clip import SMALL, small_clip
from tests.test_textual_inversion import INPUT, tiny_model
from tests.two_processes import run_all_with_two_processes


def process(number: int, count: int) -> Any:
    """What `my_share` reads of an Accelerator."""
    return SimpleNamespace(process_index=number, num_processes=count)


def test_shares_are_split_by_number_and_put_together_again(monkeypatch):
    for count in (1, 2, 3, 5):
        shares = [my_share(list("abcd"), process(number, count)) for number in range(count)]
        assert shares[0][0] == "a"
        assert sorted("".join(map("".join, shares))) == list("abcd")
        monkeypatch.setattr(accelerate.utils, "gather_object", lambda mine, shares=shares: shares)
        for number in range(count):
            assert gather_shares(shares[number], process(number, count)) == list("abcd")
    assert my_share(range(0, 10, 3), process(1, 2)) == range(3, 10, 6)
    assert my_share("ab", None) == "ab"
    assert gather_shares(["a", "b"], None) == ["a", "b"]


def test_the_first_process_does_alone_what_is_not_shared(monkeypatch, capsys):
    before = dict(os.environ)
    work_alone()
    assert dict(os.environ) == before
    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    work_alone()
    assert "the first of the 3 processes works alone" in capsys.readouterr().out
    assert not torchrun.keys() & os.environ.keys()
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        work_alone()
    assert ended.value.code == 0
    assert capsys.readouterr().out == ""


# The same bytes


@pytest.fixture
def commands(tmp_path: Path, data_dir: Path) -> list[list[object]]:
    """Commands that share their work, with tiny networks; OUT stands for the output folder."""
    torch.manual_seed(0)
    of_digits = Schedule(6, "cosine").to_config()
    digits = save_net(
        ContextUnet(3, 8, 20),
        tmp_path / "digits.safetensors",
        domains=["mnistm", "svhn"],
        size=28,
        schedule=of_digits,
    )
    noises = tmp_path / "noise"
    noises.mkdir()
    for number in range(5):
        torch.save(torch.randn(1, 3, 16, 16), noises / f"{number:02d}.pt")
    faces = save_net(
        DdimUnet(size=16, width=32, blocks=1, multipliers=(1,)),
        tmp_path / "faces.safetensors",
        schedule=Schedule(20, "cosine").to_config(),
    )
    gan = save_net(Generator(width=4), tmp_path / "gan.safetensors")
    autoencoder = save_net(
        Autoencoder(size=16, latent_channels=2, encoder_width=4, decoder_width=8),
        tmp_path / "autoencoder.safetensors",
    )
    classifier = save_net(DigitResNet(width=8), tmp_path / "classifier.safetensors")
    dann = save_net(DannCNN(), tmp_path / "dann.safetensors")
    text_to_image = save_net(
        tiny_model(),
        tmp_path / "model.safetensors",
        schedule=Schedule(kind="cosine", prediction="x0").to_config(),
    )
    words = tmp_path / "words.safetensors"
    save_words(words, {"<new1>": torch.randn(1, 32), "<new2>": torch.randn(2, 32)})
    input_json = tmp_path / "input.json"
    concepts = {"0": INPUT["0"]}  # the only one with prompts in known words
    input_json.write_text(json.dumps(concepts))
    save_images(tmp_path / "0", noise(3, 20))
    clip = tmp_path / "clip.safetensors"
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    config = json.dumps({"net": "clip", "arguments": SMALL, "preprocess": half})
    safetensors.torch.save_file(small_clip().state_dict(), clip, {"config": config})
    for name in ("apple", "key", "traffic_light"):
        save_images(tmp_path / "photographs" / name, noise(4, 20, len(name)))
    some = save_images(tmp_path / "some", noise(130, 28))
    others = save_images(tmp_path / "others", noise(60, 28, 1))
    labelled = tmp_path / "labelled"
    labelled.mkdir()
    for number, image in enumerate(sorted(some.iterdir())):
        (labelled / f"{number % 10}_{number:03d}.png").symlink_to(image)

    on_cpu = ["--device", "cpu"]
    fp32 = [*on_cpu, "--precision", "fp32"]
    return [
        [
            *("p2_ddpm_infer.py", "--checkpoint", digits, "--output-dir", "OUT/digits"),
            *("--per-class", 3, "--steps", 2, "--batch-size", 8, *fp32),
        ],
        [
            *("p2_ddim.py", "generate", "--checkpoint", faces, "--noise-dir", noises),
            *("--output-dir", "OUT/ddim", "--steps", 2, "--batch-size", 2, "--eta", 1, *fp32),
        ],
        [
            *("p1_dcgan.py", "sample", "--checkpoint", gan, "--output-dir", "OUT/gan"),
            *("--num-images", 40, "--batch-size", 12, "--grid", "OUT/grid.png", *on_cpu),
        ],
        [
            *("p2_autoencoder.py", "reconstruct", "--checkpoint", autoencoder),
            *("--image-dir", some, "--output-dir", "OUT/decoded", *on_cpu),
        ],
        [
            *("p3_textual_inversion.py", "generate", input_json, "OUT/drawn", text_to_image),
            *("--embeddings", words, "--count", 5, "--steps", 2, "--batch-size", 2, *fp32),
        ],
        [
            *("p3_clip_zeroshot.py", "zeroshot", "--data-dir", tmp_path / "photographs"),
            *("--output-dir", "OUT/zeroshot", "--checkpoint", clip, "--batch-size", 5, *fp32),
        ],
        [
            *("p3_dann.py", "predict", "--checkpoint", dann, "--image-dir", some),
            *("--output-csv", "OUT/labels/labels.csv", *on_cpu),
        ],
        [
            *("evaluate.py", "fid", some, others, "--features", "random", "--floor", some),
            *("--output-dir", "OUT/fid", "--save-stats", "OUT/stats/others.npz"),
        ],
        [
            *("evaluate.py", "kid", some, others, "--features", "random", "--subsets", 3),
            *("--output-dir", "OUT/kid"),
        ],
        ["evaluate.py", "faces", others, "--output-dir", "OUT/rate"],
        [
            *("evaluate.py", "digits", labelled, "--classifier", classifier, *on_cpu),
            *("--data-dir", data_dir, "--domain", "svhn", "--output-dir", "OUT/accuracy"),
        ],
        [
            *("evaluate.py", "inversion", "OUT/drawn", input_json, "--clip", clip),
            *("--count", 5, "--output-dir", "OUT/clip", *on_cpu),
        ],
        # The last one is not shared: the second process ends.
        [
            *("p2_ddim.py", "eta-grid", "--checkpoint", faces, "--noise-dir", noises),
            *("--output-dir", "OUT/eta", "--steps", 2, *fp32),
        ],
    ]


def into(folder: Path, commands: list[list[object]]) -> list[list[str]]:
    """The commands with their output folder."""
    return [[str(word).replace("OUT/", f"{folder}/") for word in words] for words in commands]


def contents_of(folder: Path) -> dict[str, bytes]:
    """All results below a folder, but .npz files, which have times; of result.json the results."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.parent.name == "cache" or path.suffix == ".npz":
            continue
        if path.name == "result.json":
            result = json.loads(path.read_text())
            for name in ("seconds", "arguments", "command", "hardware"):
                del result[name]
            text = json.dumps(result).replace(str(folder), "OUT")
            found[str(path.relative_to(folder))] = text.encode()
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def test_two_processes_write_the_files_of_one(commands, tmp_path, monkeypatch, capsys):
    for words in into(tmp_path / "one", commands):
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(cli, "leave_process_group", lambda: None)
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    capsys.readouterr()
    printed = run_all_with_two_processes(into(tmp_path / "two", commands))

    one = contents_of(tmp_path / "one")
    two = contents_of(tmp_path / "two")
    assert one.keys() == two.keys()
    different = [name for name in one if one[name] != two[name]]
    assert different == []
    for name in (
        *("digits/svhn/9_003.png", "ddim/04.png", "grid.png", "gan/0039.png", "decoded/129.png"),
        *("drawn/0/1/source0_prompt1_4.png", "zeroshot/table.csv", "labels/labels.csv"),
        *("fid/result.json", "kid/result.json", "rate/result.json", "accuracy/confusion.png"),
        *("clip/table.csv", "eta/eta_grid.png"),
    ):
        assert name in one
    assert (tmp_path / "two" / "stats" / "others.npz").is_file()
    assert "the first of the 2 processes works alone" in printed
    assert printed.count("mnistm: 30 digits") == 1


# Failures

FAILS = """
import sys
from dataclasses import dataclass

sys.path.insert(0, sys.argv.pop(1))
from common.cli import UserError, run_cli
from common.device import make_accelerator
from common.processes import gather_shares

@dataclass
class Command:
    '''One of two processes fails, and the other one waits for it.'''

def main(args):
    accelerator = make_accelerator("cpu", "fp32")
    if accelerator.process_index == 1:
        raise UserError("a broken image")
    gather_shares([1], accelerator)

run_cli(Command, main, shared=Command)
"""


def test_all_end_when_one_process_fails(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc_per_node", "2", str(script), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: a broken image") == 1


# Progress


def test_the_first_process_alone_shows_progress(monkeypatch, capsys):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)

    def items() -> Iterator[int]:
        for clock.now in (4.0, 8.0, 12.0, 16.0):
            yield 7

    shown = []
    for rank in (0, 1):
        clock.now = 0.0
        monkeypatch.setenv("RANK", str(rank))
        assert list(progress.show_progress(items(), 4, "faces")) == [7] * 4
        shown.append(capsys.readouterr().err)
    assert shown == ["faces: 3/4, about 00:04 left\n", ""]
