"""What a classifier sees in drawn scenes: the independent measure of the small text-to-image model.

The classifier learns from drawings of another seed than the model, and with labels that the model
never sees. The command is `python evaluate.py train-scenes`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.captions import paths_of, read_metadata
from common.checkpoints import load_net
from common.cli import UserError, above, at_least, below, is_seed
from common.data import decode_cached, draw_batch, normalise
from common.device import Device, Precision, make_accelerator, place
from common.figures import save_curves
from common.progress import show_progress
from common.rng import derive_seed, make_rng
from common.run import Run
from common.trackers import Tracker
from common.training import update_ema, warmup_cosine
from models.scene_classifier import SceneClassifier
from preparation.synthetic import scenes

SIZE = scenes.SIZE
HUES = 8  # into which the circle of hues is divided
# The values of each trait. A trait that a scene does not have is left out of the loss.
TRAITS: dict[str, tuple[Any, ...]] = {
    "subject": scenes.SUBJECTS,
    "colour": scenes.COLOUR_NAMES,
    "style": scenes.STYLES,
    "ground": scenes.GROUNDS,
    "ground_colour": scenes.COLOUR_NAMES,
    "body": tuple(scenes.BODIES),
    "ears": tuple(scenes.EARS),
    "coat": tuple(scenes.COATS),
    "second_colour": scenes.COLOUR_NAMES,
    "eyes": tuple(scenes.EYES),
    "dark_hue": tuple(range(HUES)),
    "light_hue": tuple(range(HUES)),
}
OF_CREATURES = ("body", "ears", "coat", "second_colour", "eyes")
OF_PRINTS = ("dark_hue", "light_hue")
COLOURS = ("colour", "ground_colour", "second_colour")  # a print does not show them


@dataclass(kw_only=True)
class TrainScenes:
    """Train a classifier of drawn scenes, which measures text-to-image models and learned words.

    The last epoch is the result.
    """

    output_dir: Path
    """Run directory. The same command again continues an interrupted run."""
    data_dir: Path = Path("hw2_data")
    """Data folder with captioned/{train,val}, drawn with another seed than the model's."""
    epochs: int = 10
    """Passes over the drawings."""
    batch_size: int = 128
    """Images of a step, over all processes."""
    lr: float = 3e-3
    """Peak learning rate of AdamW."""
    ema_decay: float = 0.99
    """Decay of the averaged network, which is the one that is evaluated and saved."""
    seed: int = 0
    """Seed of initialisation, order and augmentation."""
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
        below("--ema-decay", self.ema_decay, 0, 1)
        is_seed("--seed", self.seed)


def value_of(trait: str, value: Any) -> Any:
    """The value of a trait as TRAITS lists it: hues are rounded to one of eight."""
    if trait in OF_PRINTS:
        return round(value * HUES) % HUES
    return value


def has_trait(scene: Mapping[str, Any], trait: str) -> bool:
    """Whether a scene shows the trait."""
    if trait in COLOURS and scene["style"] == "print":
        return False
    if trait in OF_CREATURES:
        return scene["subject"] == scenes.CREATURE
    if trait in OF_PRINTS:
        return scene["style"] == "print"
    return True


def labels_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The number of the value of each trait, int64 (n,); -1 where a scene does not have it.

    Raises UserError for rows without the traits, such as captions of other images.
    """
    labels = {}
    for trait, values in TRAITS.items():
        numbers = []
        for row in rows:
            try:
                number = values.index(value_of(trait, row[trait])) if has_trait(row, trait) else -1
            except (KeyError, ValueError, TypeError, OverflowError):
                raise UserError(
                    f"metadata.jsonl: {row['file_name']} has no known {trait}; the classifier "
                    "learns from scenes of prepare_data.py synthetic"
                ) from None
            numbers.append(number)
        labels[trait] = torch.tensor(numbers)
    return labels


def load_scenes(folder: Path, cache_dir: Path | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Scenes of a folder, uint8 (n, 3, 64, 64), and the labels of each trait."""
    rows = read_metadata(folder)
    labels = labels_of(rows)
    paths = paths_of(folder, rows)
    images = decode_cached(paths, None, (SIZE, SIZE), cache_dir, "scenes")
    return images.pixels, labels


def train_scenes(args: TrainScenes) -> dict[str, Any]:
    """Train one classifier; returns the content of result.json (on the main process)."""
    accelerator = make_accelerator(args.device, args.precision, args.log_with, args.output_dir)
    device = accelerator.device
    run = Run(args, accelerator)
    if run.result is not None:
        return run.result if run.is_main else {}
    cache = args.output_dir.parent / "cache"
    pixels, labels = load_scenes(args.data_dir / "captioned" / "train", cache)
    validation = load_scenes(args.data_dir / "captioned" / "val", cache)
    pixels = pixels.to(device)
    labels = {trait: numbers.to(device) for trait, numbers in labels.items()}

    torch.manual_seed(derive_seed(args.seed, "init"))
    sizes = {trait: len(values) for trait, values in TRAITS.items()}
    bare_net = place(SceneClassifier(sizes), device)
    ema = copy.deepcopy(bare_net)
    adam = torch.optim.AdamW(bare_net.parameters(), weight_decay=0.05, fused=True)
    net, adam = accelerator.prepare(bare_net, adam)
    parts = {"net": bare_net, "ema": ema, "optimizer": adam}

    steps_per_epoch = max(1, len(pixels) // args.batch_size)
    last = args.epochs * steps_per_epoch
    first = run.load_state(parts)
    for step in run.steps(first, last, args.batch_size):
        net.train()
        adam.param_groups[0]["lr"] = args.lr * warmup_cosine(step / last, warm_up=0.1)
        rng = make_rng(args.seed, "augment", step, accelerator.process_index, device=device)
        rows = draw_batch(len(pixels), step, args.batch_size, accelerator, args.seed, "order")
        images = less_sharp(normalise(pixels[rows]), rng)
        images = images.contiguous(memory_format=torch.channels_last)

        # The sum over the traits; those that a scene does not have do not count.
        logits = net(images)
        losses = []
        for trait, numbers in labels.items():
            of_batch = numbers[rows]
            errors = F.cross_entropy(
                logits[trait].float(), of_batch, ignore_index=-1, reduction="sum"
            )
            losses.append(errors / (of_batch >= 0).sum().clamp(min=1))
        loss = torch.stack(losses).sum()
        adam.zero_grad()
        accelerator.backward(loss)
        adam.step()
        update_ema(ema, bare_net, args.ema_decay, step)

        run.add_losses(step, {"loss": loss})
        epoch, rest = divmod(step + 1, steps_per_epoch)
        if rest == 0:
            row = {"step": step + 1, "epoch": epoch} | run.epoch_means(steps_per_epoch)
            run.log_metrics(row)
            run.log_row(row)
        if run.save_due() or rest == 0:
            run.save_state(step + 1, parts)
    if run.is_main:
        found = accuracies(see(ema, validation[0], device), validation[1])
        save_curves(run.history(), {"loss": ["loss"]}, run.dir / "figures" / "curves.png")
        run.save_model(ema, ema.config | {"seed": args.seed})
        words = [f"{trait} {percent:.1f}" for trait, percent in found.items()]
        run.log(f"{run.dir}: {', '.join(words)} % of {len(validation[0]):,} val scenes")
        run.finish({"accuracy": found})
    return run.result or {}


def less_sharp(images: Tensor, rng: torch.Generator) -> Tensor:
    """Add a little noise, and soften half of the batch.

    Images of a diffusion model are less sharp than drawings; the classifier should not mind.
    """
    noise = torch.randn(images.shape, generator=rng, device=images.device)
    images = images + 0.06 * noise
    is_soft = torch.rand(len(images), generator=rng, device=images.device) < 0.5
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return torch.where(is_soft[:, None, None, None], soft, images)


def load_scene_classifier(path: Path, flag: str = "--classifier") -> SceneClassifier:
    """The classifier of a file. Raises UserError if it is another network or has other traits."""
    net, _ = load_net(path, {"scene_classifier": SceneClassifier}, flag)
    sizes = {trait: len(values) for trait, values in TRAITS.items()}
    if net.config["arguments"]["traits"] != sizes:
        raise UserError(f"{flag} {path}: has other traits; train it with evaluate.py train-scenes")
    return net.float()


@torch.inference_mode()
def see(net: SceneClassifier, pixels: Tensor, device: torch.device) -> dict[str, Tensor]:
    """The most probable value of each trait, int64 (n,), for images uint8 (n, 3, 64, 64)."""
    net.eval().to(device)
    found: dict[str, list[Tensor]] = {trait: [] for trait in TRAITS}
    batches = pixels.split(200)
    for some in show_progress(batches, len(batches), "classifier, batches"):
        logits = net(normalise(some.to(device)).contiguous(memory_format=torch.channels_last))
        for trait, values in logits.items():
            found[trait].append(values.argmax(1).cpu())
    return {trait: torch.cat(parts) for trait, parts in found.items()}


def accuracies(seen: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, float]:
    """How many of the scenes that have a trait are seen with its right value, in %."""
    found = {}
    for trait, numbers in labels.items():
        has_it = numbers >= 0
        if has_it.any():
            right = seen[trait][has_it] == numbers[has_it]
            found[trait] = 100 * right.float().mean().item()
    return found


def hits(seen: Mapping[str, Tensor], trait: str, value: Any) -> Tensor:
    """Which images are seen with this value of a trait, bool (n,)."""
    return seen[trait] == TRAITS[trait].index(value_of(trait, value))
