r"""Train a classifier of noisy faces, whose gradient guides a diffusion model (p2_guided.py).

It reads what the diffusion model reads, at every step of the same noise schedule: pixels or
latents, and the number of the step. Near pure noise it can know nothing, and its accuracy shows it.
It starts as the diffusion model's own way down and middle, whose features say much about an image.

Papers: Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021,
https://arxiv.org/abs/2105.05233; Baranchuk et al., Label-Efficient Semantic Segmentation with
Diffusion Models, 2022, https://arxiv.org/abs/2112.03126.

    python p2_guided.py train-classifier --checkpoint checkpoints/ddpm_faces.safetensors \
        --output-dir runs/p2/noisy-classifier
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.attributes import TEN_ATTRIBUTES, positive_weights, shares_of, split_faces
from common.cli import above, at_least, below, each_once, in_range, is_seed
from common.data import draw_batch, some_rows
from common.device import Device, Precision, make_accelerator, place
from common.faces import FaceNet, FaceStates, digest_of_states, load_face_model, load_labelled
from common.figures import save_curves
from common.quarters import QUARTERS
from common.rng import derive_seed, make_rng, seed_dropout
from common.run import Run
from common.trackers import Tracker
from common.training import update_ema, warmup_cosine
from diffusion.schedule import Schedule
from models.latent_unet import LatentUnet
from models.noisy_classifier import NoisyClassifier


@dataclass(kw_only=True)
class TrainClassifier:
    """Train a classifier of noisy faces for guidance. The last epoch is the result.

    It learns from the first five sevenths of the training images: the rest is the evaluator's.
    """

    output_dir: Path
    """Run directory. The same command again continues an interrupted run."""
    checkpoint: Path
    """Diffusion model of faces, whose states and noise schedule the classifier is for."""
    data_dir: Path = Path("hw2_data")
    """Data folder with face/train, face/val and face/list_attr_celeba.txt."""
    attributes: tuple[str, ...] = TEN_ATTRIBUTES
    """Attributes to learn, by the names in the file."""
    pretrained: bool = True
    """Start with the weights of --checkpoint, which has seen all images, but no label."""
    dropout: float = 0.1
    """Dropout in the residual blocks."""
    largest_weight: float = 10.0
    """Largest weight of the rarer value of an attribute in the loss; 1 weighs all alike."""
    flip: bool = True
    """Mirror each face with probability one half."""
    epochs: int = 20
    """Epochs of --images-per-epoch images."""
    images_per_epoch: int = 20_000
    """Images of an epoch, whatever the size of the data."""
    batch_size: int = 128
    """Images of a step, over all processes."""
    lr: float = 5e-4
    """Peak learning rate of AdamW: warmed up over 2 % of the steps, then a half cosine to 0."""
    weight_decay: float = 0.05
    """AdamW weight decay."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema_decay: float = 0.999
    """Decay of the averaged network, which is the one that is saved."""
    measured_images: int | None = None
    """Images kept aside from training that measure an epoch; by default all of them."""
    seed: int = 1
    """Seed of initialisation, order and noise."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """bf16 autocast where the hardware is fast at it, or fp32."""
    log_with: tuple[Tracker, ...] = ()
    """Trackers that get the metrics too: tensorboard, wandb or mlflow."""

    def __post_init__(self) -> None:
        each_once("--attributes", self.attributes)
        below("--dropout", self.dropout, 0, 1)
        in_range("--largest-weight", self.largest_weight, 1, 1_000)
        at_least("--epochs", self.epochs, 1)
        at_least("--images-per-epoch", self.images_per_epoch, 1)
        at_least("--batch-size", self.batch_size, 2)
        above("--lr", self.lr, 0, 1)
        in_range("--weight-decay", self.weight_decay, 0, 100)
        above("--clip", self.clip, 0, 1e6)
        below("--ema-decay", self.ema_decay, 0, 1)
        at_least("--measured-images", self.measured_images, 1)
        is_seed("--seed", self.seed)


def train_classifier(args: TrainClassifier) -> dict[str, Any]:
    """Train one run; returns the content of result.json (on the main process)."""
    accelerator = make_accelerator(args.device, args.precision, args.log_with, args.output_dir)
    device = accelerator.device
    run = Run(args, accelerator)
    if run.result is not None:
        return run.result if run.is_main else {}
    start = load_face_model(args.checkpoint, "--checkpoint")
    schedule = start.schedule
    images, labels = load_labelled(args.data_dir, start.size, args.attributes, args.output_dir)
    labels = labels.to(device)
    steps_per_epoch = max(1, args.images_per_epoch // args.batch_size)
    last = args.epochs * steps_per_epoch
    own_names = set(split_faces(images.names).guidance)  # the other images are the evaluator's
    is_own = torch.tensor([name in own_names for name in images.names])
    own = is_own.nonzero().flatten().to(device)  # rows
    others = (~is_own).nonzero().flatten()
    others = others[some_rows(len(others), args.measured_images)].to(device)
    draws = last * args.batch_size + args.epochs * QUARTERS * len(others)
    states = FaceStates(place(start.net, device), images.pixels.to(device), args.flip, draws)

    torch.manual_seed(derive_seed(args.seed, "init"))
    bare_net = place(make_classifier(args, start.net), device)
    ema = copy.deepcopy(bare_net)
    adam = torch.optim.AdamW(bare_net.parameters(), weight_decay=args.weight_decay, fused=True)
    net, adam = accelerator.prepare(bare_net, adam)
    parts = {"net": bare_net, "ema": ema, "adam": adam}
    weights = positive_weights(labels[own], args.largest_weight)

    first = run.load_state(parts)
    for step in run.steps(first, last, args.batch_size):
        net.train()
        learning_rate = args.lr * warmup_cosine(step / last, warm_up=0.02)
        adam.param_groups[0]["lr"] = learning_rate
        rng = make_rng(args.seed, "step", step, accelerator.process_index, device=device)
        seed_dropout(args.seed, step, accelerator.process_index)
        turns = draw_batch(len(own), step, args.batch_size, accelerator, args.seed, "order")
        rows = own[turns]
        x0 = states.draw(rows, rng).contiguous(memory_format=torch.channels_last)

        # The smaller of two draws: with little noise there is more to learn.
        t = torch.randint(1, schedule.T + 1, (2, len(x0)), generator=rng, device=device).amin(0)
        noise = torch.randn(x0.shape, generator=rng, device=device)
        x_t = schedule.q_sample(x0, t, noise)
        logits = net(x_t, schedule.time(t, bare_net)).float()
        truth = (labels[rows] == 1).float()
        loss = F.binary_cross_entropy_with_logits(logits, truth, pos_weight=weights)
        adam.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(bare_net.parameters(), args.clip)
        adam.step()
        update_ema(ema, bare_net, args.ema_decay, step)

        run.add_losses(step, {"loss": loss})
        epoch, rest = divmod(step + 1, steps_per_epoch)
        epoch_ends = rest == 0
        if epoch_ends:
            row = {"step": step + 1, "epoch": epoch} | run.epoch_means(steps_per_epoch)
            end_classifier_epoch(run, row, ema, schedule, states, labels, others)
        if run.save_due() or epoch_ends:
            run.save_state(step + 1, parts)
    if run.is_main:
        kept = {
            "attributes": list(args.attributes),
            "shares": shares_of(args.attributes, labels[own]),
            "weights": dict(zip(args.attributes, weights.tolist(), strict=True)),
            "schedule": schedule.to_config(),
            "states": digest_of_states(start.net),
            "trained_on": sorted(Path(name).stem for name in own_names),
            "seed": args.seed,
        }
        run.save_model(ema, ema.config | kept)
        run.finish(run.history()[-1])
    return run.result or {}


def make_classifier(args: TrainClassifier, diffusion: FaceNet) -> NoisyClassifier:
    """The classifier for the states of a diffusion model, with its weights if asked for."""
    unet = diffusion.unet if isinstance(diffusion, LatentUnet) else diffusion
    arguments = unet.config["arguments"] | {"n_attributes": 0}
    net = NoisyClassifier(arguments, len(args.attributes), args.dropout)
    if args.pretrained:
        net.start_from(unet)
    return net


def end_classifier_epoch(
    run: Run,
    row: dict[str, Any],
    ema: NoisyClassifier,
    schedule: Schedule,
    states: FaceStates,
    labels: Tensor,
    rows: Tensor,
) -> None:
    """Log the epoch with the balanced accuracy by quarter of t; draw the curves.

    `rows` are images that the classifier does not learn from.
    """
    if not run.is_main:
        return
    found = accuracy_by_quarter(ema, schedule, states, labels, rows)
    columns = [f"accuracy_t{number}" for number in range(QUARTERS)]
    if not math.isnan(found[0]):  # as it is if every attribute is the same in all these images
        row |= dict(zip(columns, found, strict=True))
    run.log_metrics(row)
    run.log_row(row)
    panels = {"loss": ["loss"], "balanced accuracy by quarter of t, %": columns}
    save_curves(run.history(), panels, run.dir / "figures" / "curves.png")


@torch.inference_mode()
def accuracy_by_quarter(
    net: NoisyClassifier, schedule: Schedule, states: FaceStates, labels: Tensor, rows: Tensor
) -> list[float]:
    """Balanced accuracy in percent, mean over the attributes, with noise of each quarter of t.

    Those that all images have, or none, are left out.
    """
    net.eval()
    device = rows.device
    found = []
    truth = labels[rows] == 1
    for number in range(QUARTERS):
        rng = make_rng(0, "quarter", number, device=device)
        low = number * schedule.T // QUARTERS + 1
        high = (number + 1) * schedule.T // QUARTERS + 1
        guesses = []
        for some in rows.split(500):
            x0 = states.draw(some, rng)
            t = torch.randint(low, max(high, low + 1), (len(x0),), generator=rng, device=device)
            x_t = schedule.q_sample(x0, t, torch.randn(x0.shape, generator=rng, device=device))
            guesses.append(net(x_t, schedule.time(t, net)) > 0)
        guess = torch.cat(guesses)
        hits_of_present = (guess & truth).sum(0) / truth.sum(0)
        hits_of_absent = (~guess & ~truth).sum(0) / (~truth).sum(0)
        found.append(50 * (hits_of_present + hits_of_absent).nanmean().item())
    return found
