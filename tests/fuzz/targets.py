"""The readers that get damaged files, each with a small whole example."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from PIL import Image

import p2_ddim
import p2_ddpm_infer
from common.attributes import read_attributes
from common.captions import read_captioned
from common.checkpoints import load_net, tensors_under
from common.class_folders import find_domain, load_domain
from common.data import decode_images, list_images, load_digits
from common.device import make_accelerator
from common.run import Run
from inversion.concepts import read_concepts, read_words
from metrics.frechet import load_statistics
from models.context_unet import ContextUnet
from models.dann import NETS, DannCNN
from models.gan import GENERATORS, Generator
from preparation.archive import RECORD, measure, read_record, unpack
from preparation.inspection import inspect_folder
from tests.conftest import noise, save_images, save_net, write_domain
from zeroshot.loading import find_labelled


class Target(NamedTuple):
    """A reader and its example."""

    make: Callable[[Path], None]
    """Write the example to an empty folder; any file of it may be damaged."""
    read: Callable[[Path], Any]
    """Read the example from the folder."""


def make_generator(folder: Path) -> None:
    torch.manual_seed(0)
    save_net(Generator(4, 4), folder / "net.safetensors", method="dcgan", seed=0)


def make_published(folder: Path) -> None:
    torch.manual_seed(0)
    torch.save({"state_dict": DannCNN().state_dict(), "epoch": 3}, folder / "net.pth")


def make_digits_net(folder: Path) -> None:
    torch.manual_seed(0)
    schedule = {"steps": 4, "kind": "cosine"}
    options = {"domains": ["mnistm"], "schedule": schedule}
    save_net(ContextUnet(3, 8, 10), folder / "net.safetensors", **options)


def draw_digits(folder: Path) -> None:
    p2_ddpm_infer.main(
        p2_ddpm_infer.Generate(
            checkpoint=folder / "net.safetensors",
            output_dir=folder / "out",
            per_class=1,
            steps=1,
            device="cpu",
            precision="fp32",
        )
    )


def make_words(folder: Path) -> None:
    safetensors.torch.save_file({"<new1>": torch.ones(2, 8)}, folder / "words.safetensors")
    torch.save({"string_to_param": {"*": torch.ones(2, 8)}, "step": 5}, folder / "old.pt")


def read_all_words(folder: Path) -> None:
    read_words(folder / "words.safetensors")
    read_words(folder / "old.pt")


def make_input_json(folder: Path) -> None:
    concept = {
        "src_image": "dog",
        "token_name": "<new1>",
        "prompt": ["A <new1> on a hill.", "Two <new1>."],
        "prompt_4_clip_eval": ["A dog on a hill.", "Two dogs."],
        "baseline": [[79, 34], [70.5, 30]],
    }
    (folder / "input.json").write_text(json.dumps({"0": concept, "1": concept}))


def make_captions(folder: Path) -> None:
    save_images(folder, noise(3, 16))
    rows = [{"file_name": f"{k:03d}.png", "text": f"a picture of {k}"} for k in range(3)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_data(folder: Path) -> None:
    write_domain(folder / "digits" / "mnistm", {"train": 6, "val": 3})
    save_images(folder / "face" / "train", noise(3, 64))
    make_attributes(folder / "face")
    noises = folder / "face" / "noise"
    noises.mkdir()
    for k in range(2):
        torch.save(torch.randn(1, 3, 8, 8), noises / f"{k:02d}.pt")
    zero_shot = folder / "clip_zeroshot"
    save_images(zero_shot / "val", noise(2, 16))
    for k, path in enumerate(sorted((zero_shot / "val").iterdir())):
        path.rename(path.with_name(f"{k}_{k}.png"))
    (zero_shot / "id2label.json").write_text(json.dumps({"0": "apple", "1": "car"}))


def make_attributes(folder: Path) -> None:
    lines = ["3", "Bald Smiling", *(f"{k:03d}.png  1 -1" for k in range(3))]
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")


def read_data(folder: Path) -> None:
    inspect_folder(folder)
    load_digits(folder, "mnistm", "train")
    read_attributes(folder / "face" / "list_attr_celeba.txt")
    p2_ddim.read_noises(folder / "face" / "noise")
    find_labelled(folder, "val")


def make_classes(folder: Path) -> None:
    for seed, name in enumerate(("clock", "red car")):
        save_images(folder / name, noise(2, 12, seed))


def make_images(folder: Path) -> None:
    for k, suffix in enumerate(("png", "jpg", "png")):
        mode = ("RGB", "L", "P")[k]
        image = Image.fromarray(noise(1, 12, k)[0]).convert(mode)
        image.save(folder / f"{k}.{suffix}")


def make_statistics(folder: Path) -> None:
    np.savez(folder / "a.npz", mu=np.zeros(4), sigma=np.eye(4), features="random-1", count=9)


def make_archive(folder: Path) -> None:
    with zipfile.ZipFile(folder / "hw2_data.zip", "w") as file:
        file.writestr("hw2_data/digits/mnistm/train.csv", "image_name,label\n0.png,1\n")
        file.writestr("hw2_data/digits/mnistm/data/0.png", b"image")


def make_record(folder: Path) -> None:
    record = {"2022": measure(Path(__file__))}
    (folder / RECORD).write_text(json.dumps(record))


def make_stable_diffusion(folder: Path) -> None:
    state = {"model.diffusion_model.out.2.bias": torch.zeros(4), "betas": torch.ones(3)}
    torch.save({"state_dict": state, "epoch": 1}, folder / "sd.ckpt")


@dataclass
class RunArguments:
    output_dir: Path
    batch_size: int = 2


def net_and_adam() -> dict[str, Any]:
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    return {"net": net, "adam": torch.optim.Adam(net.parameters())}


def make_run(folder: Path) -> None:
    parts = net_and_adam()
    parts["net"](torch.ones(2, 3)).sum().backward()
    parts["adam"].step()
    run = Run(RunArguments(folder), make_accelerator("cpu", "fp32"))
    run.load_state({})
    run.log_metrics({"step": 1, "loss": 0.5})
    run.save_state(1, parts)


def continue_run(folder: Path) -> None:
    run = Run(RunArguments(folder), make_accelerator("cpu", "fp32"))
    parts = net_and_adam()
    for step in run.steps(run.load_state(parts), 3, 2):
        parts["adam"].zero_grad()
        parts["net"](torch.ones(2, 3)).sum().backward()
        parts["adam"].step()
        run.save_state(step + 1, parts)


TARGETS = {
    "generator": Target(make_generator, lambda f: load_net(f / "net.safetensors", GENERATORS)),
    "published": Target(make_published, lambda f: load_net(f / "net.pth", NETS)),
    "digits": Target(make_digits_net, draw_digits),
    "words": Target(make_words, read_all_words),
    "input.json": Target(make_input_json, lambda f: read_concepts(f / "input.json")),
    "captions": Target(make_captions, lambda f: read_captioned(f, 16, None)),
    "data": Target(make_data, read_data),
    "classes": Target(
        make_classes, lambda f: load_domain(find_domain(f, "--source-dir"), 12, None)
    ),
    "images": Target(make_images, lambda f: decode_images(list_images(f), (12, 12))),
    "statistics": Target(make_statistics, lambda f: load_statistics(f / "a.npz")),
    "archive": Target(make_archive, lambda f: unpack(f / "hw2_data.zip", f / "data")),
    "record": Target(make_record, read_record),
    "checkpoint": Target(make_stable_diffusion, lambda f: tensors_under(f / "sd.ckpt")),
    "run": Target(make_run, continue_run),
}
