"""Zero-shot classification by CLIP: an image gets the class whose caption lies nearest to it.

Two towers map images and texts to unit vectors of one space; cosines of an image with "A photo of {class}." are its
scores. Weights are OpenAI's or any of open_clip's, or of a small CLIP that `pretrain` trains on a captioned folder.
Paper: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021,
https://arxiv.org/abs/2103.00020

    python p3_clip_zeroshot.py --data-dir hw2_data --output-dir runs/p3/clip                      # downloads ViT-B/32
    python p3_clip_zeroshot.py --data-dir hw2_data --output-dir runs/p3/clip --checkpoint ViT-B-32.pt
    python p3_clip_zeroshot.py pretrain --data-dir hw2_data --output-dir runs/p3/clip-small
    python p3_clip_zeroshot.py --data-dir hw2_data --output-dir runs/p3/zeroshot \
        --checkpoint runs/p3/clip-small/model.safetensors
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import open_clip
import safetensors.torch
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from common import run as runs
from common.augment import augment_faces, diff_augment
from common.data import decode_image, decode_images, draw_batch, normalise
from common.figures import save_curves, save_table
from common.run import Run, UserError, generator
from zeroshot.evidence import judge, write_evidence
from zeroshot.loading import OPENAI, Clip, find_labelled, load_clip

KINDS = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
TEMPLATES = {  # {} is the name of the class, {a} the name with "a" or "an"
    "course": ("A photo of {}.",),
    "article": ("A photo of {a}.",),
    "cifar18": tuple(  # those of CLIP's authors for CIFAR
        [f"a {kind}photo of {article} {{}}." for kind in KINDS for article in ("a", "the")]
        + [f"a photo of {article} {size} {{}}." for size in ("small", "big") for article in ("a", "the")]
    ),
    "imagenet80": tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES),  # theirs for ImageNet
}
TemplateSet = Literal["course", "article", "cifar18", "imagenet80"]
HEADER = ["model", "prompts", "names", "accuracy, %", "95 % interval", "top-5, %"]
REPORTED = [f"{OPENAI}: a course report, 50 classes", "course", "spaces", "56.64", "", ""]


@dataclass(kw_only=True)
class Zeroshot:
    """Classify the images of DATA_DIR/clip_zeroshot/val, or of a folder with one sub-folder a class."""

    data_dir: Path = Path("hw2_data")  # With clip_zeroshot/{val/CLASS_IMAGE.png, id2label.json}, or CLASS/*.jpg.
    output_dir: Path = Path("runs/p3/clip")  # Where tables, predictions and figures are written.
    split: str = "val"  # Sub-folder with the images.
    model: str = "ViT-B-32"  # open_clip's name of the architecture.
    pretrained: str = "openai"  # open_clip's name of its weights, which are downloaded if there is no --checkpoint.
    checkpoint: Path | None = None  # A file instead: OpenAI's .pt, a state file of open_clip's, or of `pretrain`.
    templates: TemplateSet = "course"  # The prompts of the main figure; the table has all sets.
    prompt: str | None = None  # One prompt of your own instead, e.g. "A photo of {}.".
    names: Literal["spaces", "underscores"] = "spaces"  # How a name like traffic_light is spelt in the main figure.
    batch_size: int = 100  # Images or prompts at a time.
    num_workers: int = 4  # Threads that decode images.
    seed: int = 0  # Of the choice of the cases that are drawn.
    device: runs.Device = "auto"  # Where to compute.
    precision: runs.Precision = "auto"  # bf16 autocast where the hardware is fast at it, or fp32.


@dataclass(kw_only=True)
class Pretrain:
    """Train a small CLIP on the images of a folder, captioned by CIFAR's 18 templates. The last epoch counts."""

    output_dir: Path  # Where everything is written; the same command again continues an interrupted run.
    data_dir: Path = Path("hw2_data")  # As for zero-shot classification.
    split: str = "train"  # Sub-folder with the images.
    epochs: int = 30  # Passes over the images.
    batch_size: int = 32  # Images of a step.
    lr: float = 3e-3  # Peak learning rate of the image tower's AdamW ...
    text_lr: float = 1e-4  # ... and of the text tower's: a faster one draws all captions together, and learning ends.
    image_size: int = 64  # Side to which images are resized.
    vision: str = "test_resnet"  # timm's name of the image tower, trained from scratch and averaged over space.
    augment: tuple[Literal["color", "translation", "cutout"], ...] = ("translation",)  # Of images.
    flip: bool = True  # Mirror images half of the time.
    seed: int = 0  # Of initialisation, order, captions and augmentation.
    device: runs.Device = "auto"  # Where to compute.
    precision: runs.Precision = "auto"  # bf16 autocast where the hardware is fast at it, or fp32.


def prompts_of(name: str, templates: Sequence[str], spelling: str) -> list[str]:
    """The prompts of one class: its name, with underscores or with spaces for them, in every template."""
    name = name.replace("_", " ") if spelling == "spaces" else name
    with_article = f"{'an' if name[:1].lower() in tuple('aeiou') else 'a'} {name}"
    return [template.replace("{}", name).replace("{a}", with_article) for template in templates]


@torch.inference_mode()
def encode_images(clip: Clip, paths: list[Path], accelerator: Accelerator, args: Zeroshot) -> Tensor:
    """Unit image features float32 (n, features); a broken file is a UserError."""

    def read(path: Path) -> Tensor:
        return clip.preprocess(Image.fromarray(decode_image(path).transpose(1, 2, 0)))  # (height, width, channels)

    features, start = [], time.monotonic()
    with ThreadPoolExecutor(args.num_workers) as pool:
        for first in tqdm(range(0, len(paths), args.batch_size), "images", disable=None, leave=False):
            images = torch.stack(list(pool.map(read, paths[first : first + args.batch_size])))
            with accelerator.autocast():
                features.append(clip.net.encode_image(images.to(accelerator.device)).float().cpu())
    print(f"{len(paths):,} images encoded, {len(paths) / (time.monotonic() - start):,.0f} images/s")
    return F.normalize(torch.cat(features), dim=-1)


@torch.inference_mode()
def encode_texts(clip: Clip, texts: list[str], accelerator: Accelerator, args: Zeroshot) -> dict[str, Tensor]:
    """Unit features (features,) of each text, kept beside the output for the next time."""
    key = hashlib.sha256(json.dumps([texts, accelerator.mixed_precision, repr(clip.net)]).encode())
    for name, value in clip.net.state_dict().items():
        if not name.startswith("visual."):
            key.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    cache = args.output_dir.parent / "cache" / f"texts-{key.hexdigest()[:16]}.safetensors"
    try:
        features = safetensors.torch.load_file(cache)["features"]
    except (OSError, safetensors.SafetensorError):
        parts = []
        for first in tqdm(range(0, len(texts), args.batch_size), "prompts", disable=None, leave=False):
            tokens = clip.tokenizer(texts[first : first + args.batch_size]).to(accelerator.device)
            with accelerator.autocast():
                parts.append(clip.net.encode_text(tokens).float().cpu())
        features = F.normalize(torch.cat(parts), dim=-1)
        with contextlib.suppress(UserError):  # no right to write there: the next start encodes again
            runs.atomic_write(cache, lambda path: safetensors.torch.save_file({"features": features}, path))
    return dict(zip(texts, features, strict=True))


def classifier(names: Sequence[str], templates: Sequence[str], spelling: str, features: dict[str, Tensor]) -> Tensor:
    """One unit vector for each class (classes, features): the mean of its prompts' unit vectors, normalised again."""
    means = [torch.stack([features[text] for text in prompts_of(name, templates, spelling)]).mean(0) for name in names]
    return F.normalize(torch.stack(means), dim=-1)


def zeroshot(args: Zeroshot) -> dict[str, Any]:
    """Classify, write tables, predictions and figures; returns the content of result.json."""
    if args.prompt is not None and prompts_of("x", [args.prompt], "spaces") == [args.prompt]:
        raise UserError(f"--prompt {args.prompt!r}: has no {{}} where the name goes")
    if args.batch_size < 1 or args.num_workers < 1 or args.seed < 0:
        raise UserError("--batch-size and --num-workers: at least 1; --seed: at least 0")
    found = find_labelled(args.data_dir, args.split)
    accelerator, start = runs.make_accelerator(args.device, args.precision), time.monotonic()
    if accelerator.num_processes > 1:
        raise UserError("zero-shot classification runs in one process")
    if (runs.make_output_dir(args.output_dir) / "config.json").exists():
        raise UserError(f"--output-dir {args.output_dir}: holds a training run; give a directory of its own")
    clip = load_clip(args.model, args.pretrained, args.checkpoint)
    clip.net.to(accelerator.device)

    sets = TEMPLATES | ({"prompt": (args.prompt,)} if args.prompt is not None else {})
    main_set = ("prompt" if args.prompt is not None else args.templates, args.names)
    spellings = ["spaces", "underscores"] if any("_" in name for name in found.names) else [args.names]
    variants = [(name, spelling) for name in sets for spelling in spellings]
    texts = {text for kind, way in variants for name in found.names for text in prompts_of(name, sets[kind], way)}
    images = encode_images(clip, found.paths, accelerator, args)  # (n, features)
    features = encode_texts(clip, sorted(texts), accelerator, args)
    labels = torch.from_numpy(found.labels)

    results, rows = {}, [HEADER, REPORTED]
    for variant in variants:
        kind, way = variant
        cosines = images @ classifier(found.names, sets[kind], way, features).T  # (n, classes)
        results[variant] = judge(cosines, labels)
        if variant == main_set:
            probabilities = (clip.net.logit_scale.detach().float().cpu().exp() * cosines).softmax(1)
            main_cosines = cosines
        low, high = results[variant]["interval"]
        told = [f"{results[variant]['accuracy']:.2f}", f"{low:.2f} to {high:.2f}", f"{results[variant]['top5']:.2f}"]
        rows.append([clip.name, kind, way, *told])
    if clip.name != OPENAI:
        rows.insert(2, [OPENAI, "course", "spaces", "not measured", "", ""])
    save_table(rows, args.output_dir / "table", f"{len(labels):,} images, chance {100 / len(found.names):.1f} %")
    write_evidence(args.output_dir, found, main_cosines.numpy(), probabilities.numpy(), args.seed)
    result = results[main_set] | {"model": clip.name, "templates": main_set[0], "names": main_set[1]}
    result |= {"images": len(labels), "classes": len(found.names), "chance": 100 / len(found.names)}
    result |= {"seconds": round(time.monotonic() - start, 1), "arguments": asdict(args)} | runs.environment(accelerator)
    runs.atomic_write(args.output_dir / "result.json", json.dumps(result, indent=1, default=str) + "\n")
    print((args.output_dir / "table.md").read_text())
    print(f"{clip.name}: {result['accuracy']:.2f} %, all in {args.output_dir}")
    return result


# ---------------------------------------------------------------------------------------------------------- pretraining


def contrastive_loss(logits: Tensor, same: Tensor) -> Tensor:
    """Symmetric cross-entropy of images and captions (figure 3 of the paper), logits (images, captions).

    Many images share a caption: each pair of `same`, bool of that shape, is a positive one, all with equal weight
    (Yang et al. 2022, https://arxiv.org/abs/2204.03610).
    """
    loss = 0.0
    for dim in (1, 0):  # each image over the captions, each caption over the images
        target = same / same.sum(dim, keepdim=True)
        loss = loss - 0.5 * (target * logits.float().log_softmax(dim)).sum(dim).mean()
    return loss


def pretrain(args: Pretrain) -> dict[str, Any]:
    """Train one run; returns the content of result.json."""
    if not timm.is_model(args.vision):
        raise UserError(f"--vision {args.vision}: not one of timm's")
    if args.image_size < 32 or min(args.lr, args.text_lr) <= 0:
        raise UserError(f"--image-size {args.image_size}: at least 32; --lr and --text-lr: above 0")
    found = find_labelled(args.data_dir, args.split)
    accelerator = runs.make_accelerator(args.device, args.precision)
    if accelerator.num_processes > 1:
        raise UserError("pretrain runs in one process: its loss compares all images of a batch")
    device = accelerator.device
    run = Run(args, accelerator)
    if run.result is not None:
        return run.result
    pixels = decode_images(found.paths, (args.image_size, args.image_size)).to(device)
    labels, templates = torch.from_numpy(found.labels).to(device), TEMPLATES["cifar18"]

    torch.manual_seed(runs.derive_seed(args.seed, "init"))
    vision = {"timm_model_name": args.vision, "timm_pool": "avg", "timm_proj": "linear", "image_size": args.image_size}
    text = {"context_length": 24, "width": 128, "heads": 4, "layers": 2}
    half = (0.5, 0.5, 0.5)  # as `normalise` does
    config = {"net": "clip", "arguments": {"embed_dim": 128, "vision_cfg": vision, "text_cfg": text}}
    config["preprocess"] = {"mean": half, "std": half, "resize_mode": "squash"}
    bare_net = open_clip.CLIP(**config["arguments"]).to(device, memory_format=torch.channels_last)
    prompts = [prompt for name in found.names for prompt in prompts_of(name, templates, "spaces")]
    tokens = open_clip.SimpleTokenizer(context_length=bare_net.context_length)(prompts).to(device)
    tokens = tokens.unflatten(0, (-1, len(templates)))  # (classes * templates, 24) → (classes, templates, 24)
    others = [p for name, p in bare_net.named_parameters() if not name.startswith("visual.")]
    groups = [{"params": [*bare_net.visual.parameters()], "peak": args.lr}, {"params": others, "peak": args.text_lr}]
    net, optimizer = accelerator.prepare(
        bare_net, torch.optim.AdamW(groups, args.lr, (0.9, 0.98), weight_decay=0.05, fused=True)
    )
    parts = {"net": bare_net, "optimizer": optimizer}

    steps_per_epoch = max(1, len(pixels) // args.batch_size)
    last = args.epochs * steps_per_epoch
    for step in run.steps(run.load_state(parts), last, args.batch_size):
        net.train()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * runs.warmup_cosine((step + 1) / last, 0.1)
        rng = generator(args.seed, "step", step, accelerator.process_index, device=device)
        rows = draw_batch(len(pixels), step, args.batch_size, accelerator, args.seed, "order")
        images = augment_faces(normalise(pixels[rows]), rng, args.flip)
        images = diff_augment(images, rng, args.augment).contiguous(memory_format=torch.channels_last)
        classes = labels[rows].unique()  # each in one caption of the step
        drawn = torch.randint(len(templates), (len(classes),), generator=rng, device=device)
        image_features, text_features, scale = net(images, tokens[classes, drawn])
        same = labels[rows][:, None] == classes  # (images, captions)
        logits = scale * image_features @ text_features.T
        loss = contrastive_loss(logits, same)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            bare_net.logit_scale.clamp_(0, math.log(100))  # section 2.5
        hits = same.gather(1, logits.argmax(1, keepdim=True)).float().mean()
        run.add(step, {"loss": loss, "training_accuracy": hits})

        epoch, inside = divmod(step + 1, steps_per_epoch)
        if inside == 0:
            row = {"step": step + 1, "epoch": epoch, "scale": bare_net.logit_scale.exp().item()}
            row |= run.means(steps_per_epoch)
            run.metrics(row)
            run.log(", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in row.items() if k != "step"))
        if run.save_due() or inside == 0:
            run.save_state(step + 1, parts)
    panels = {name: [name] for name in ("loss", "training_accuracy", "scale")}
    save_curves(run.history(), panels, run.dir / "figures" / "curves.png")
    run.save_model(bare_net, config | {"seed": args.seed})
    run.finish(run.history()[-1])
    return run.result


def main(args: Zeroshot | Pretrain) -> Any:
    """Run one sub-command."""
    return {Zeroshot: zeroshot, Pretrain: pretrain}[type(args)](args)


if __name__ == "__main__":
    if not {"zeroshot", "pretrain", "--help", "-h"} & set(sys.argv[1:2]):
        sys.argv.insert(1, "zeroshot")  # what is meant if no command is named
    runs.command_line(Zeroshot | Pretrain, main)
