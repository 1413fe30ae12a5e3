r"""Zero-shot classification with CLIP: an image gets the class whose caption is nearest to it.

Two networks map images and texts to unit vectors in the same space. The scores of an image are its
cosines with "A photo of {class}." for each class. The weights are OpenAI's, any others that
open_clip knows, or those of a small CLIP that `pretrain` trains on a captioned folder.

Paper: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021,
https://arxiv.org/abs/2103.00020

    python p3_clip_zeroshot.py --data-dir hw2_data --output-dir runs/p3/clip
    python p3_clip_zeroshot.py --data-dir hw2_data --output-dir runs/p3/clip \
        --checkpoint ViT-B-32.pt
    python p3_clip_zeroshot.py pretrain --data-dir hw2_data --output-dir runs/p3/clip-small
    python p3_clip_zeroshot.py --data-dir hw2_data --output-dir runs/p3/zeroshot \
        --checkpoint runs/p3/clip-small/model.safetensors

The first command downloads OpenAI's ViT-B/32; the second takes it from a file.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from common.cache import read_cached, write_cached
from common.cli import UserError, in_range, is_seed, run_cli
from common.data import decode_image
from common.device import Device, Precision, make_accelerator
from common.figures import save_table
from common.files import atomic_write, make_output_dir
from common.processes import gather_shares, my_share
from common.progress import show_progress
from common.run import environment
from zeroshot.evidence import measure, write_evidence
from zeroshot.loading import OPENAI, Clip, find_labelled, load_clip
from zeroshot.pretrain import Pretrain, pretrain
from zeroshot.prompts import Spelling, TemplateSet, prompts_of, template_sets

if TYPE_CHECKING:
    from accelerate import Accelerator

HEADER = ["model", "prompts", "names", "accuracy, %", "95 % interval", "top-5, %"]
REPORTED = [f"{OPENAI}: a course report, 50 classes", "course", "spaces", "56.64", "", ""]


@dataclass(kw_only=True)
class Zeroshot:
    """Classify the images of DATA_DIR/clip_zeroshot/val, or of a folder with a folder per class."""

    data_dir: Path = Path("hw2_data")
    """Data folder with clip_zeroshot/{val/CLASS_IMAGE.png, id2label.json}, or with CLASS/*.jpg."""
    output_dir: Path = Path("runs/p3/clip")
    """Folder for tables, predictions and plots."""
    split: str = "val"
    """Sub-folder with the images."""
    model: str = "ViT-B-32"
    """open_clip's name of the architecture; OpenAI's way of writing it, ViT-B/32, is read too."""
    pretrained: str = "openai"
    """open_clip's name of its weights, which are downloaded if there is no --checkpoint."""
    checkpoint: Path | None = None
    """File of weights to use instead: OpenAI's .pt, one of open_clip's, or one of `pretrain`."""
    templates: TemplateSet = "course"
    """Set of prompts for the main result; the table has all sets."""
    prompt: str | None = None
    """A prompt of your own for the main result, such as "A photo of {}."."""
    names: Spelling = "spaces"
    """How a name like traffic_light is spelt in the main result."""
    batch_size: int = 100
    """Images or prompts computed at a time."""
    num_workers: int = 4
    """Threads that decode images."""
    seed: int = 0
    """Seed of the choice of the cases that are drawn."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """bf16 autocast where the hardware is fast at it, or fp32."""

    def __post_init__(self) -> None:
        self.model = self.model.replace("/", "-")
        if self.prompt is not None and "{}" not in self.prompt and "{a}" not in self.prompt:
            raise UserError(f"--prompt {self.prompt!r}: has no {{}} where the name goes")
        in_range("--batch-size", self.batch_size, 1, 1_000_000)
        in_range("--num-workers", self.num_workers, 1, 1_024)
        is_seed("--seed", self.seed)


# The method


@torch.inference_mode()
def encode_images(
    clip: Clip, paths: list[Path], accelerator: Accelerator, args: Zeroshot
) -> Tensor:
    """Unit vectors of image files, float32 (n, features). Raises UserError for a broken file.

    Processes share the batches, and each gets all vectors.
    """

    def read(path: Path) -> Tensor:
        array = decode_image(path).transpose(1, 2, 0)  # (3, height, width) → (height, width, 3)
        return clip.preprocess(Image.fromarray(array))

    features = []
    started = time.monotonic()
    with ThreadPoolExecutor(args.num_workers) as pool:
        mine = my_share(range(0, len(paths), args.batch_size), accelerator)
        for start in show_progress(mine, len(mine), "images, batches"):
            batch = paths[start : start + args.batch_size]
            images = torch.stack(list(pool.map(read, batch))).to(accelerator.device)
            with accelerator.autocast():
                features.append(clip.net.encode_image(images).float().cpu())
    features = gather_shares(features, accelerator)
    rate = len(paths) / (time.monotonic() - started)
    if accelerator.is_main_process:
        print(f"{len(paths):,} images encoded, {rate:,.0f} images/s")
    return F.normalize(torch.cat(features), dim=-1)


@torch.inference_mode()
def encode_texts(
    clip: Clip, texts: list[str], accelerator: Accelerator, args: Zeroshot
) -> dict[str, Tensor]:
    """The unit vector (features,) of each text. They are cached beside the output.

    Processes share the batches, and each gets all vectors.
    """
    key = text_cache_key(clip, texts, accelerator.mixed_precision)
    cache = args.output_dir.parent / "cache" / f"texts-{key}.safetensors"
    features = read_cached(cache, key, (len(texts), None), torch.float32)
    if features is None:
        parts = []
        mine = my_share(range(0, len(texts), args.batch_size), accelerator)
        for start in show_progress(mine, len(mine), "prompts, batches"):
            tokens = clip.tokenizer(texts[start : start + args.batch_size])
            with accelerator.autocast():
                parts.append(clip.net.encode_text(tokens.to(accelerator.device)).float().cpu())
        # Nobody has written the cache before all have looked for it: they meet here.
        features = F.normalize(torch.cat(gather_shares(parts, accelerator)), dim=-1)
        if accelerator.is_main_process:
            write_cached(cache, key, features)
    return dict(zip(texts, features, strict=True))


def text_cache_key(clip: Clip, texts: list[str], precision: str) -> str:
    """A hash of all that the vectors of the texts depend on."""
    key = hashlib.sha256(json.dumps([texts, precision, repr(clip.net)]).encode())
    for name, value in clip.net.state_dict().items():
        if not name.startswith("visual."):
            raw = value.cpu().contiguous().flatten().view(torch.uint8)
            key.update(raw.numpy())
    return key.hexdigest()[:16]


def class_vectors(
    names: Sequence[str],
    templates: Sequence[str],
    spelling: Spelling,
    features: dict[str, Tensor],
) -> Tensor:
    """One unit vector for each class (classes, features): prompt ensembling.

    It is the mean of the unit vectors of the class's prompts, normalised again.
    """
    means = []
    for name in names:
        vectors = [features[text] for text in prompts_of(name, templates, spelling)]
        means.append(torch.stack(vectors).mean(0))
    return F.normalize(torch.stack(means), dim=-1)


# The command


def zeroshot(args: Zeroshot) -> dict[str, Any]:
    """Classify, write tables, predictions and plots; returns the content of result.json.

    Processes share the images and prompts; the first one does the rest.
    """
    found = find_labelled(args.data_dir, args.split)
    accelerator = make_accelerator(args.device, args.precision)
    started = time.monotonic()
    if (make_output_dir(args.output_dir) / "config.json").exists():
        raise UserError(
            f"--output-dir {args.output_dir}: holds a training run; choose a folder of its own"
        )
    clip = load_clip(args.model, args.pretrained, args.checkpoint)
    clip.net.to(accelerator.device)

    # Every set of prompts, with names spelt both ways if any of them has an underscore.
    sets = template_sets()
    main_set = args.templates
    if args.prompt is not None:
        main_set = "prompt"
        sets["prompt"] = (args.prompt,)
    spellings: list[Spelling] = [args.names]
    if any("_" in name for name in found.names):
        spellings = ["spaces", "underscores"]
    texts = set()
    for templates in sets.values():
        for spelling in spellings:
            for name in found.names:
                texts.update(prompts_of(name, templates, spelling))
    images = encode_images(clip, found.paths, accelerator, args)  # (n, features)
    features = encode_texts(clip, sorted(texts), accelerator, args)
    if not accelerator.is_main_process:
        return {}
    labels = torch.from_numpy(found.labels)

    rows = [HEADER, REPORTED]
    if clip.name != OPENAI:
        rows.append([OPENAI, "course", "spaces", "not measured", "", ""])
    for set_name, templates in sets.items():
        for spelling in spellings:
            vectors = class_vectors(found.names, templates, spelling, features)
            cosines = images @ vectors.T  # (n, classes)
            measured = measure(cosines, labels)
            rows.append([clip.name, set_name, spelling, *in_words(measured)])
            if (set_name, spelling) == (main_set, args.names):
                main_cosines = cosines
                main_measured = measured
    scale = clip.net.logit_scale.detach().float().cpu().exp()
    probabilities = (scale * main_cosines).softmax(1)

    chance = 100 / len(found.names)
    title = f"{len(labels):,} images, chance {chance:.1f} %"
    save_table(rows, args.output_dir / "table", title)
    write_evidence(args.output_dir, found, main_cosines.numpy(), probabilities.numpy(), args.seed)
    result = {
        **main_measured,
        "model": clip.name,
        "templates": main_set,
        "names": args.names,
        "images": len(labels),
        "classes": len(found.names),
        "chance": chance,
        "seconds": round(time.monotonic() - started, 1),
        "arguments": asdict(args),
        **environment(accelerator),
    }
    content = json.dumps(result, indent=1, default=str) + "\n"
    atomic_write(args.output_dir / "result.json", content)
    print((args.output_dir / "table.md").read_text())
    print(f"{clip.name}: {result['accuracy']:.2f} %, everything is in {args.output_dir}")
    return result


def in_words(measured: dict[str, Any]) -> list[str]:
    """The cells of a row of the table: accuracy, its interval, top-5 accuracy."""
    low, high = measured["interval"]
    return [
        f"{measured['accuracy']:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{measured['top5']:.2f}",
    ]


def main(args: Zeroshot | Pretrain) -> Any:
    """Run one command."""
    match args:
        case Zeroshot():
            return zeroshot(args)
        case Pretrain():
            return pretrain(args)


if __name__ == "__main__":
    commands_and_help = {"zeroshot", "pretrain", "--help", "-h"}
    if not commands_and_help & set(sys.argv[1:2]):
        sys.argv.insert(1, "zeroshot")  # the command if none is named
    run_cli(Zeroshot | Pretrain, main, shared=Zeroshot | Pretrain)
