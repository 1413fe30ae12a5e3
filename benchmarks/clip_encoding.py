"""Images a second through CLIP's image network: batches and threads against one image at a time.

The baseline encodes one image at a time in fp32, as most notebooks do. Ours encodes batches in the
precision that --precision auto chooses, while threads decode. The network is ViT-B/32 with random
weights, which cost what trained ones do. Decoding and resizing are included.

    python benchmarks/clip_encoding.py
    python benchmarks/clip_encoding.py --model RN50 --images 100
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.harness import print_rate, write_smooth_image
from common.cli import UserError, at_least, in_range, run_cli
from common.device import make_accelerator
from p3_clip_zeroshot import Zeroshot, encode_images
from zeroshot.loading import Clip


@dataclass
class Benchmark:
    """Time both loops over the same PNG files; print their ratio and the features' cosine."""

    model: str = "ViT-B-32"
    """open_clip's name of the architecture."""
    images: int = 300
    """Number of images."""
    size: int = 256
    """Side of the images in pixels."""
    batch_size: int = 100
    """Images of a batch of ours."""

    def __post_init__(self) -> None:
        at_least("--images", self.images, 1)
        in_range("--size", self.size, 1, 4_096)
        at_least("--batch-size", self.batch_size, 1)


@torch.inference_mode()
def one_by_one(clip: Clip, paths: list[Path], device: torch.device) -> torch.Tensor:
    """The baseline: unit features (n, d), one image at a time."""
    features = []
    for path in paths:
        image = clip.preprocess(Image.open(path).convert("RGB"))[None].to(device)
        vector = clip.net.encode_image(image)
        features.append((vector / vector.norm(dim=-1, keepdim=True)).cpu())
    return torch.cat(features)


def random_clip(model: str, device: torch.device) -> Clip:
    """A CLIP with random weights. Raises UserError for a name that open_clip does not know."""
    import open_clip

    if model not in open_clip.list_models():
        raise UserError(f"--model {model}: open_clip has no model of this name")
    torch.manual_seed(0)
    net, _, preprocess = open_clip.create_model_and_transforms(model)
    return Clip(net.eval().to(device), open_clip.get_tokenizer(model), preprocess, model)


def main(args: Benchmark) -> None:
    """Run both loops in this process, ours second."""
    accelerator = make_accelerator()
    clip = random_clip(args.model, accelerator.device)
    options = Zeroshot(batch_size=args.batch_size)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{k}.png" for k in range(args.images)]
        for path in paths:
            write_smooth_image(path, 16, args.size, rng)
        one_by_one(clip, paths[:3], accelerator.device)  # warm up both
        encode_images(clip, paths[: args.batch_size], accelerator, options)
        start = time.perf_counter()
        expected = one_by_one(clip, paths, accelerator.device)
        middle = time.perf_counter()
        found = encode_images(clip, paths, accelerator, options)
        end = time.perf_counter()
    precision = accelerator.mixed_precision.replace("no", "fp32")
    print_rate("one by one, fp32", args.images, middle - start)
    print_rate(f"ours, {precision}", args.images, end - middle)
    cosine = (expected * found).sum(1).min()
    ratio = (middle - start) / (end - middle)
    print(f"ours is {ratio:.1f}x as fast; smallest cosine of an image's features {cosine:.4f}")


if __name__ == "__main__":
    run_cli(Benchmark, main)
