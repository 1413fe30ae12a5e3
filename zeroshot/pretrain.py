"""Train a small CLIP from scratch, so that everything runs without a download.

Contrastive training: Radford et al., 2021, https://arxiv.org/abs/2103.00020, section 2.3. The
command is `python p3_clip_zeroshot.py pretrain`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from common.augment import augment_faces, diff_augment
from common.captions import read_captioned
from common.cli import UserError, above, at_least, each_once, in_range, is_seed
from common.data import decode_images, draw_batch, normalise
from common.device import Device, Precision, make_accelerator
from common.figures import save_curves
from common.rng import derive_seed, make_rng
from common.run import Run
from common.trackers import Tracker
from common.training import warmup_cosine
from zeroshot.loading import find_labelled, rows_of_tokens
from zeroshot.prompts import cifar_templates, prompts_of

# Peak learning rate of the text tower. A faster one makes all captions alike, and learning ends.
TEXT_LR = 1e-4
LENGTH = 24  # tokens of a caption


@dataclass(kw_only=True)
class Pretrain:
    """Train a small CLIP on images with classes, captioned with CIFAR's 18 templates, or captions.

    The last epoch is the result: none is chosen afterwards.
    """

    output_dir: Path
    """Run directory. The same command again continues an interrupted run."""
    data_dir: Path = Path("hw2_data")
    """Data folder, laid out as for zero-shot classification."""
    captioned: bool = False
    """Train on DATA_DIR/captioned and the captions in its metadata.jsonl instead of classes."""
    split: str = "train"
    """Sub-folder with the images."""
    epochs: int = 30
    """Passes over the images."""
    batch_size: int = 32
    """Images of a step."""
    lr: float = 3e-3
    """Peak learning rate of the image tower's AdamW."""
    image_size: int = 64
    """Side to which images are resized."""
    vision: str = "test_resnet"
    """timm's name of the image tower, which is trained from scratch and averaged over space."""
    augment: tuple[Literal["color", "translation", "cutout"], ...] = ("translation",)
    """Augmentation of the images; list none to switch it off."""
    flip: bool = True
    """Mirror half of the images."""
    seed: int = 0
    """Seed of initialisation, order, captions and augmentation."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """bf16 autocast where the hardware is fast at it, or fp32."""
    log_with: tuple[Tracker, ...] = ()
    """Trackers that get the metrics too: tensorboard, wandb or mlflow."""

    def __post_init__(self) -> None:
        at_least("--epochs", self.epochs, 1)
        at_least("--batch-size", self.batch_size, 2)
        above("--lr", self.lr, 0, 1)
        in_range("--image-size", self.image_size, 32, 1_024)
        each_once("--augment", self.augment, at_least_one=False)
        is_seed("--seed", self.seed)


def contrastive_loss(logits: Tensor, same: Tensor) -> Tensor:
    """Symmetric cross-entropy of images and captions (figure 3 of the paper).

    `logits` is (images, captions). Many images share a caption: each pair in `same`, bool of that
    shape, is a positive pair, and all of a row or column have equal weight (Yang et al., 2022,
    https://arxiv.org/abs/2204.03610).
    """
    logits = logits.float()
    of_image = same / same.sum(1, keepdim=True)  # targets of each image over the captions
    of_caption = same / same.sum(0, keepdim=True)  # targets of each caption over the images
    image_loss = -(of_image * logits.log_softmax(1)).sum(1).mean()
    caption_loss = -(of_caption * logits.log_softmax(0)).sum(0).mean()
    return 0.5 * image_loss + 0.5 * caption_loss


def pretrain(args: Pretrain) -> dict[str, Any]:
    """Train one run; returns the content of result.json."""
    import open_clip

    check_vision(args.vision)
    accelerator = make_accelerator(args.device, args.precision, args.log_with, args.output_dir)
    if accelerator.num_processes > 1:
        raise UserError("pretrain runs in one process: its loss compares all images of a batch")
    device = accelerator.device
    run = Run(args, accelerator)
    if run.result is not None:
        return run.result
    data = load_captions(args) if args.captioned else load_classes(args)
    pixels = data.pixels.to(device)
    labels = data.labels.to(device)
    tokens = data.tokens.to(device)

    torch.manual_seed(derive_seed(args.seed, "init"))
    config = make_config(args, data.vocabulary)
    bare_net = open_clip.CLIP(**config["arguments"])
    bare_net = bare_net.to(device, memory_format=torch.channels_last)
    adam = make_optimizer(bare_net, args)
    net, adam = accelerator.prepare(bare_net, adam)
    parts = {"net": bare_net, "optimizer": adam}

    steps_per_epoch = max(1, len(pixels) // args.batch_size)
    last = args.epochs * steps_per_epoch
    first = run.load_state(parts)
    for step in run.steps(first, last, args.batch_size):
        net.train()
        for group in adam.param_groups:
            group["lr"] = group["peak"] * warmup_cosine((step + 1) / last, 0.1)
        rng = make_rng(args.seed, "step", step, accelerator.process_index, device=device)
        rows = draw_batch(len(pixels), step, args.batch_size, accelerator, args.seed, "order")
        images = augment_faces(normalise(pixels[rows]), rng, args.flip)
        images = diff_augment(images, rng, args.augment)
        images = images.contiguous(memory_format=torch.channels_last)

        # Each class in the batch gets one caption, with a random template if it has several.
        classes = labels[rows].unique()
        template = torch.randint(tokens.shape[1], (len(classes),), generator=rng, device=device)
        image_features, text_features, scale = net(images, tokens[classes, template])
        logits = scale * image_features @ text_features.T  # (images, captions)
        same = labels[rows][:, None] == classes
        loss = contrastive_loss(logits, same)
        adam.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(net.parameters(), 1.0)
        adam.step()
        with torch.no_grad():
            bare_net.logit_scale.clamp_(0, math.log(100))  # section 2.5

        correct = same.gather(1, logits.argmax(1, keepdim=True)).float().mean()
        run.add_losses(step, {"loss": loss, "training_accuracy": correct})
        epoch, rest = divmod(step + 1, steps_per_epoch)
        epoch_ends = rest == 0
        if epoch_ends:
            scale = bare_net.logit_scale.exp().item()
            row = {"step": step + 1, "epoch": epoch, "scale": scale}
            row |= run.epoch_means(steps_per_epoch)
            run.log_metrics(row)
            run.log_row(row)
        if run.save_due() or epoch_ends:
            run.save_state(step + 1, parts)
    panels = {name: [name] for name in ("loss", "training_accuracy", "scale")}
    save_curves(run.history(), panels, run.dir / "figures" / "curves.png")
    run.save_model(bare_net, config | {"seed": args.seed})
    return run.finish(run.history()[-1])


def check_vision(name: str) -> None:
    """Raise UserError unless timm knows the architecture."""
    import timm

    if not timm.is_model(name):
        raise UserError(f"--vision {name}: timm has no model of this name")


class Captioned(NamedTuple):
    """Images, and the captions that are true of them."""

    pixels: Tensor
    """uint8 (n, 3, size, size)."""
    labels: Tensor
    """int64 (n,): the row of `tokens` with the captions of each image."""
    tokens: Tensor
    """int64 (classes, captions of a class, LENGTH)."""
    vocabulary: list[int] | None
    """CLIP's tokens in the captions, which are counted from 1 in `tokens`; None for all tokens."""


def load_classes(args: Pretrain) -> Captioned:
    """Images with classes: each class has one caption for each of CIFAR's templates."""
    found = find_labelled(args.data_dir, args.split)
    templates = cifar_templates()
    prompts = []
    for name in found.names:
        prompts += prompts_of(name, templates, "spaces")
    tokens = caption_tokens(prompts).unflatten(0, (len(found.names), len(templates)))
    pixels = decode_images(found.paths, (args.image_size, args.image_size))
    return Captioned(pixels, torch.from_numpy(found.labels), tokens, None)


def load_captions(args: Pretrain) -> Captioned:
    """Images with captions. Each different caption is a class of its own.

    The network gets only the tokens that there are: CLIP's whole table would be most of its file.
    """
    folder = args.data_dir / "captioned" / args.split
    pixels, texts = read_captioned(folder, args.image_size, args.output_dir.parent / "cache")
    captions = sorted(set(texts))
    number_of = {caption: number for number, caption in enumerate(captions)}
    labels = torch.tensor([number_of[text] for text in texts])
    tokens = caption_tokens(captions)
    vocabulary = sorted(set(tokens.flatten().tolist()) - {0})  # 0 fills the rest of a caption
    return Captioned(pixels, labels, rows_of_tokens(tokens, vocabulary)[:, None], vocabulary)


def make_config(args: Pretrain, vocabulary: list[int] | None) -> dict[str, Any]:
    """What builds the network, and how its images are prepared, as the checkpoint keeps it."""
    vision = {
        "timm_model_name": args.vision,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": args.image_size,
    }
    text = {"context_length": LENGTH, "width": 128, "heads": 4, "layers": 2}
    half = (0.5, 0.5, 0.5)  # the mean and sd that `normalise` uses
    config: dict[str, Any] = {
        "net": "clip",
        "arguments": {"embed_dim": 128, "vision_cfg": vision, "text_cfg": text},
        "preprocess": {"mean": half, "std": half, "resize_mode": "squash"},
    }
    if vocabulary is not None:
        text["vocab_size"] = len(vocabulary) + 1
        config["vocabulary"] = vocabulary
    return config


def caption_tokens(captions: list[str]) -> Tensor:
    """Tokens of captions, int64 (captions, LENGTH)."""
    import open_clip

    return open_clip.SimpleTokenizer(context_length=LENGTH)(captions)


def make_optimizer(net: torch.nn.Module, args: Pretrain) -> torch.optim.AdamW:
    """AdamW with one peak learning rate for the image tower and one for the rest."""
    image_tower = list(net.visual.parameters())
    rest = [p for name, p in net.named_parameters() if not name.startswith("visual.")]
    groups = [
        {"params": image_tower, "peak": args.lr},
        {"params": rest, "peak": TEXT_LR},
    ]
    return torch.optim.AdamW(groups, args.lr, (0.9, 0.98), weight_decay=0.05, fused=True)
