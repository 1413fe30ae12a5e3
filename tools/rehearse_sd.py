"""Rehearse textual inversion with Stable Diffusion v1 at full size, with random weights.

The weights of Stable Diffusion are a download of 4.3 GB. This makes a file of the same size and
layout with random numbers: float32 tensors under "state_dict", the schedule's buffers, and an
object of another library, as the published pickle has it. Then p3_textual_inversion.py loads it,
learns a word in a few steps, and draws one image. The image is noise; what is shown is that all of
it runs, in how many seconds and how much memory.

    python tools/rehearse_sd.py --images DOG_PHOTOS --work-dir runs/rehearsal
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from common.cli import UserError, in_range, run_cli
from common.data import list_images
from common.device import Device
from common.files import ROOT, atomic_write, make_output_dir
from models.stable_diffusion.model import PREFIXES, StableDiffusion


@dataclass(kw_only=True)
class Rehearse:
    """Write a random sd-v1-4.ckpt, learn a word from some images, and draw one image."""

    images: Path
    """Folder with a few images of one thing."""
    work_dir: Path = Path("runs/rehearsal")
    """Folder for the file of weights (4.3 GB), the word and the image."""
    train_steps: int = 2
    """Training steps."""
    steps: int = 2
    """Steps of the sampler."""
    batch_size: int = 2
    """Images of a training step."""
    device: Device = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        in_range("--train-steps", self.train_steps, 1, 1_000)
        in_range("--steps", self.steps, 1, 1_000)
        in_range("--batch-size", self.batch_size, 2, 64)


class ModelCheckpoint:
    """Stands for pytorch_lightning's class of this name, which the published file mentions."""


def write_random_file(path: Path) -> None:
    """Write random weights in the layout of sd-v1-4.ckpt."""
    torch.manual_seed(0)
    net = StableDiffusion()
    weights = {}
    for name, prefix in PREFIXES.items():
        for key, value in getattr(net, name).state_dict().items():
            weights[prefix + key] = value
    for name in ("betas", "alphas_cumprod", "sqrt_alphas_cumprod"):
        weights[name] = torch.rand(1_000)
    ids = torch.arange(77)[None]
    weights["cond_stage_model.transformer.text_model.embeddings.position_ids"] = ids

    # A pickle names a class by its module, which must be there while it is written.
    name = "pytorch_lightning.callbacks.model_checkpoint"
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        package = ".".join(parts[:count])
        sys.modules[package] = types.ModuleType(package)
    ModelCheckpoint.__module__ = name
    sys.modules[name].ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
    content = {
        "epoch": 0,
        "global_step": 470_000,
        "callbacks": {ModelCheckpoint: {"best_model_score": None}},
        "state_dict": weights,
    }
    atomic_write(path, lambda file: torch.save(content, file))


def run(*words: object) -> None:
    """Run p3_textual_inversion.py in a process of its own; print its seconds and peak memory."""
    import resource

    started = time.monotonic()
    command = [sys.executable, str(ROOT / "p3_textual_inversion.py"), *map(str, words)]
    ended = subprocess.run(command, check=False)
    if ended.returncode:
        raise UserError(f"{words[0]}: ended with status {ended.returncode}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    seconds = time.monotonic() - started
    print(f"{words[0]}: {seconds:.0f} s, at most {peak:.1f} GiB of memory so far", flush=True)


def main(args: Rehearse) -> None:
    """Rehearse once."""
    list_images(args.images)
    folder = make_output_dir(args.work_dir, "--work-dir")
    file = folder / "sd-v1-4.ckpt"
    if not file.exists():
        started = time.monotonic()
        write_random_file(file)
        seconds = time.monotonic() - started
        print(f"{file}: {file.stat().st_size / 1e9:.2f} GB, written in {seconds:.0f} s", flush=True)
    words = folder / "word"
    run(
        "train",
        *("--images", args.images, "--token", "<new1>", "--init", "dog", "--model", file),
        *("--output-dir", words, "--steps", args.train_steps, "--batch-size", args.batch_size),
        *("--snapshot-every", args.train_steps, "--device", args.device),
    )
    concept = {"token_name": "<new1>", "src_image": "dog", "prompt": ["A <new1> on a bench."]}
    atomic_write(folder / "input.json", json.dumps({"0": concept}))
    run(
        "generate",
        *(folder / "input.json", folder / "images", file),
        *("--embeddings", words / "words.safetensors", "--count", 1, "--steps", args.steps),
        *("--device", args.device),
    )


if __name__ == "__main__":
    run_cli(Rehearse, main)
