"""The readers that get damaged files, each with a small whole example."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import random
import signal
import sys
import tempfile
import typing
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import numpy as np
import safetensors.torch
import torch
from PIL import Image

import evaluate
import p2_ddim
import p2_ddpm_infer
import p2_ddpm_train
import p2_score
import p3_dann
import p3_dann_resnet
import report
import run_all
from common.attributes import read_attributes
from common.captions import read_captioned
from common.checkpoints import load_net, tensors_under
from common.class_folders import find_domain, load_domain
from common.cli import parse, refuse_empty_values
from common.data import decode_images, list_images, load_digits
from common.device import make_accelerator
from common.run import Run
from inversion.concepts import read_concepts, read_words
from models.context_unet import ContextUnet
from models.dann import NETS, DannCNN
from models.gan import GENERATORS, Generator
from preparation.archive import RECORD, measure, read_record, unpack
from preparation.inspection import inspect_folder
from reporting.architectures import gan_networks
from reporting.output import Output
from reporting.tables import all_tables
from tests.conftest import noise, save_images, save_net, write_domain
from tests.fuzz.damage import HOSTILE, damage
from zeroshot.loading import find_labelled, load_clip


class Target(NamedTuple):
    """A reader and its example."""

    make: Callable[[Path], None]
    """Write the example to an empty folder; any file of it may be damaged."""
    read: Callable[[Path], Any]
    """Read the example from the folder."""
    damage: Callable[[Path, random.Random], str] = damage
    """Damage one of its files; returns in what way."""
    is_slow: bool = False
    """Whether it takes seconds, and is left out of the tests."""


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


def make_id2label(folder: Path) -> None:
    save_images(folder / "val", noise(2, 16))
    for k, path in enumerate(sorted((folder / "val").iterdir())):
        path.rename(path.with_name(f"{k}_{k}.png"))
    (folder / "id2label.json").write_text(json.dumps({"0": "apple", "1": "car"}))


def make_classes(folder: Path) -> None:
    for seed, name in enumerate(("clock", "red car")):
        save_images(folder / name, noise(2, 12, seed))


def make_images(folder: Path) -> None:
    for k, suffix in enumerate(("png", "jpg", "png")):
        mode = ("RGB", "L", "P")[k]
        image = Image.fromarray(noise(1, 12, k)[0]).convert(mode)
        image.save(folder / f"{k}.{suffix}")


def make_statistics(folder: Path) -> None:
    arrays = {"mu": np.zeros(4), "sigma": np.eye(4), "features": "random-1", "count": 9}
    np.savez(folder / "a.npz", **arrays)
    np.savez(folder / "b.npz", **arrays)


def compare_statistics(folder: Path) -> None:
    args = evaluate.Fid(folder / "a.npz", folder / "b.npz", output_dir=folder / "out", device="cpu")
    evaluate.main(args)


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


# run_all.py

PROFILES = """
parts = ["faces", "digits"]

[problems]
p1 = ["faces"]
p2 = ["digits"]

[profiles.quick]
jobs = 2
data = "hw2_data"

[[steps]]
name = "data"
part = "data"
script = "prepare_data.py"
arguments = "synthetic --data-dir {data} {options}"
makes = "{data}"
draws_data = true
leaves = ["{data}/face"]
options.quick = "--face 64 40"

[[steps]]
name = "gan"
part = "faces"
script = "p1_dcgan.py"
arguments = "train --data-dir {data} --output-dir {makes} {start}"
makes = "{output}/p1"
needs = ["{data}/face"]
optional = "the faces"

[[steps]]
name = "report"
part = "report"
script = "report.py"
arguments = "{output}"
makes = "{output}/report.html"
always = true

[[alternatives.start]]
needs = ["weights"]
words = "--init weights"

[[alternatives.start]]
words = ""
"""


def make_profiles(folder: Path) -> None:
    (folder / "profiles.toml").write_text(PROFILES)
    made = folder / "data/digits/mnistm/made.json"
    made.parent.mkdir(parents=True)
    made.write_text('{"made_by": "synthetic"}')
    (folder / "out/steps").mkdir(parents=True)
    (folder / "out/steps/gan.txt").write_text("python p1_dcgan.py train\n60\n")


def plan_a_run(folder: Path) -> None:
    """Plan all steps, and print their commands."""
    args = run_all.RunAll(folder / "data", folder / "out", dry_run=True)
    with mock.patch.object(run_all, "ROOT", folder):
        run_all.main(args)


# Command lines

# Words that may stand after an option. An argument of a program has no zero byte.
WORDS = [
    *("-1", "0", "1", "2", "0.5", "1e300", "nan", "-inf", str(2**64), "1_0", "٣", "0x10", " ", "-"),
    *("None", "True", "svhn", "mnistm", "svhn/../svhn", "..", "Smiling=1", "Bald=-1:nan"),
    *("{}", "{0.__class__}", "a {", "%s", "x=y"),
    *(word for word in HOSTILE if isinstance(word, str) and "\0" not in word),
]


def make_command(folder: Path) -> None:
    (folder / "words.json").write_text("[]")


def change_options(path: Path, rng: random.Random) -> str:
    """Write the command line of a random command, with one to three options of random values."""
    from tests.test_options import COMMANDS, option_of  # imports every script

    name = rng.choice(list(COMMANDS))
    options = list(options_of(COMMANDS[name], option_of))
    odd = rng.sample(options, min(len(options), rng.choice((1, 1, 2, 3))))
    positional: list[str] = []
    flags: list[str] = []
    for option in options:
        if option not in odd and not option.is_required:
            continue
        words = [random_word(option, rng)] if option in odd else ["x"]
        if option.is_list or isinstance(option.default, tuple):
            words *= rng.choice((0, 1, 2, 2, 3))
        if option.flag is None:
            positional += words
        else:
            flags += [option.flag, *words]
    path.write_text(json.dumps([name, *positional, *flags]))
    return f"{name} {positional} {flags}"


def options_of(command: type, option_of: Callable[..., Any]) -> Iterator[Any]:
    """The options of a command that take a value."""
    hints = typing.get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        option = option_of(field, hints[field.name])
        if option.kind is not bool:
            yield option


def random_word(option: Any, rng: random.Random) -> str:
    """A word for an option; half of them are of its type."""
    if rng.random() < 0.5:
        return rng.choice(WORDS)
    if typing.get_origin(option.kind) is Literal:
        return str(rng.choice(typing.get_args(option.kind)))
    if option.kind is int:
        return str(rng.choice((-1, 0, 1, 2, 7, 31, 64, 10**6, 10**9, 2**32, 10**40)))
    if option.kind is float:
        return repr(rng.choice((-0.5, 0.0, 1e-300, 1e-3, 0.5, 0.999, 1.0, 1.001, 7.5, 1e9, 1e308)))
    return rng.choice(WORDS)


def parse_command(folder: Path) -> None:
    from tests.test_options import COMMANDS

    name, *words = json.loads((folder / "words.json").read_text())
    with mock.patch.object(sys, "argv", ["script.py", *words]):
        refuse_empty_values(words)
        parse(COMMANDS[name])


# The report


def make_output(folder: Path) -> None:
    """A small output directory, with results of every kind of table."""
    from tests import test_report as writers

    data = folder / "data"
    writers.write_gans(folder, data)
    writers.write_digits(folder, data)
    writers.write_ddim(folder)
    writers.write_face_models(folder, data)
    writers.write_guided(folder, data)
    writers.write_dann(folder, data)
    writers.write_resnet(folder, data)
    writers.write_clip(folder, data)
    writers.write_inversion(folder)
    (folder / "steps").mkdir()
    (folder / "steps/dcgan.txt").write_text("python p1_dcgan.py train --lr 1e-3\n60\n")


def make_results(folder: Path) -> None:
    """The same without images."""
    make_output(folder)
    for path in (*folder.rglob("*.png"), *folder.rglob("*.gif")):
        path.unlink()


def read_results(folder: Path) -> None:
    """The tables and the networks of the GANs, from which the page is made."""
    output = Output(folder)
    all_tables(output)
    gan_networks(output)


# CLIP


def make_clip(folder: Path) -> None:
    from tests.test_clip import openai_file, small_clip

    openai_file(small_clip(quick_gelu=True), folder / "clip.jit", archive=True)


# Trainings that go on with a damaged run directory


@functools.cache
def data_of_trainings() -> Path:
    """Two domains of digits and some faces, which are there until the program ends."""
    keeper = tempfile.TemporaryDirectory()
    KEPT.append(keeper)
    data = Path(keeper.name)
    for seed, domain in enumerate(("mnistm", "svhn")):
        write_domain(data / "digits" / domain, {"train": 12, "val": 6}, seed=seed)
    save_images(data / "face" / "train", noise(8, 32))
    return data


KEPT: list[Any] = []
# Two epochs of two steps, on the CPU.
TINY: dict[str, Any] = {
    "epochs": 2,
    "images_per_epoch": 8,
    "batch_size": 4,
    "device": "cpu",
    "precision": "fp32",
}


def dann_arguments(folder: Path) -> Any:
    options = {"source": "mnistm", "target": "svhn", "net": "cnn"} | TINY
    return p3_dann.Train(output_dir=folder / "run", data_dir=data_of_trainings(), **options)


def resnet_arguments(folder: Path) -> Any:
    options: dict[str, Any] = {"source": "mnistm", "target": "svhn", "net": "resnet18"}
    options |= {"width": 16, "size": 16} | TINY
    return p3_dann_resnet.Train(output_dir=folder / "run", data_dir=data_of_trainings(), **options)


def ddpm_arguments(folder: Path) -> Any:
    options: dict[str, Any] = {"domains": ("mnistm",), "width": 32, "timesteps": 4}
    options |= {"schedule": "cosine"} | TINY
    return p2_ddpm_train.Train(output_dir=folder / "run", data_dir=data_of_trainings(), **options)


def score_arguments(folder: Path) -> Any:
    options: dict[str, Any] = {"size": 32, "width": 32, "blocks": 1, "patch": 2, "grid_every": 9}
    options |= TINY
    return p2_score.Train(output_dir=folder / "run", data_dir=data_of_trainings(), **options)


def stop_in_second_epoch(self: Run, first: int, last: int, images: int) -> Iterator[int]:
    """`Run.steps`, as if SIGTERM came in the third step."""
    for step in range(first, last):
        self.stop_signal = signal.SIGTERM if step == 2 else None
        yield step
        if self.stopping:
            sys.exit(128 + signal.SIGTERM)


def training(train: Callable[[Any], Any], arguments: Callable[[Path], Any]) -> Target:
    """A run that was stopped in the middle, and then goes on."""

    def make(folder: Path) -> None:
        stopped = mock.patch.object(Run, "steps", stop_in_second_epoch)
        with stopped, contextlib.suppress(SystemExit):
            train(arguments(folder))

    def go_on(folder: Path) -> None:
        train(arguments(folder))

    return Target(make, go_on, is_slow=True)


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
    "id2label": Target(make_id2label, lambda f: find_labelled(f, "val")),
    "statistics": Target(make_statistics, compare_statistics),
    "profiles": Target(make_profiles, plan_a_run),
    "options": Target(make_command, parse_command, damage=change_options),
    "results": Target(make_results, read_results),
    "report": Target(make_output, lambda f: report.main(report.Report(f)), is_slow=True),
    "clip": Target(make_clip, lambda f: load_clip("ViT-B-32", "openai", f / "clip.jit")),
    "archive": Target(make_archive, lambda f: unpack(f / "hw2_data.zip", f / "data")),
    "record": Target(make_record, read_record),
    "checkpoint": Target(make_stable_diffusion, lambda f: tensors_under(f / "sd.ckpt")),
    "run": Target(make_run, continue_run),
    "p3_dann": training(p3_dann.train, dann_arguments),
    "p3_dann_resnet": training(p3_dann_resnet.train, resnet_arguments),
    "p2_ddpm_train": training(p2_ddpm_train.train, ddpm_arguments),
    "p2_score": training(p2_score.train, score_arguments),
}
QUICK = tuple(name for name, target in TARGETS.items() if not target.is_slow)
