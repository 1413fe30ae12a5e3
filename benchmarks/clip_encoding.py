"""Images a second through CLIP's image tower: batches with threads that decode, against one image at a time in fp32.

The net is ViT-B/32 with random weights, which cost what trained ones do; decoding and resizing are included. Both
loops run in one process, ours second.

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
import open_clip
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.run import UserError, command_line, make_accelerator
from p3_clip_zeroshot import Zeroshot, encode_images
from zeroshot.loading import Clip


@dataclass
class Benchmark:
    """Time both loops over the same PNG files; print their ratio and the cosine of their features."""

    model: str = "ViT-B-32"  # open_clip's name of the architecture.
    images: int = 300  # How many.
    size: int = 256  # Their side in pixels.
    batch_size: int = 100  # Of ours.


@torch.inference_mode()
def one_by_one(clip: Clip, paths: list[Path], device: torch.device) -> torch.Tensor:
    """The loop of most notebooks."""
    features = []
    for path in paths:
        image = clip.preprocess(Image.open(path).convert("RGB"))[None].to(device)
        vector = clip.net.encode_image(image)
        features.append((vector / vector.norm(dim=-1, keepdim=True)).cpu())
    return torch.cat(features)


def main(args: Benchmark) -> None:
    """Run both loops."""
    if args.model not in open_clip.list_models():
        raise UserError(f"--model {args.model}: not one of open_clip's")
    accelerator = make_accelerator()
    torch.manual_seed(0)
    net, _, preprocess = open_clip.create_model_and_transforms(args.model)
    clip = Clip(net.eval().to(accelerator.device), open_clip.get_tokenizer(args.model), preprocess, args.model)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{k}.png" for k in range(args.images)]
        for path in paths:
            coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            coarse.resize((args.size, args.size), Image.Resampling.BICUBIC).save(path)
        one_by_one(clip, paths[:3], accelerator.device)  # both warm
        encode_images(clip, paths[: args.batch_size], accelerator, Zeroshot(batch_size=args.batch_size))
        start = time.perf_counter()
        expected = one_by_one(clip, paths, accelerator.device)
        middle = time.perf_counter()
        found = encode_images(clip, paths, accelerator, Zeroshot(batch_size=args.batch_size))
        seconds = middle - start, time.perf_counter() - middle
    for name, spent in zip(
        ("one by one, fp32", "ours, " + accelerator.mixed_precision.replace("no", "fp32")), seconds, strict=True
    ):
        print(f"{name:16} {spent:7.1f} s, {args.images / spent:6.1f} images/s")
    print(f"ours is {seconds[0] / seconds[1]:.1f}x as fast; least cosine of the same image's features ", end="")
    print(f"{(expected * found).sum(1).min():.4f}")


if __name__ == "__main__":
    command_line(Benchmark, main)
