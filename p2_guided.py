r"""Faces by attribute: one network with attributes, classifier-free and classifier guidance.

`train` teaches a diffusion model of faces to read attributes with three states: there (1), not
there (-1) and unknown (0). `train-classifier` trains a classifier of noisy images, whose gradient
can guide any diffusion model of the same images, also one without attributes. `sample` asks for
attributes in either way, or in both; `grid` draws a row of faces for each attribute.

Classifier guidance: Dhariwal and Nichol, 2021, https://arxiv.org/abs/2105.05233.
Classifier-free guidance: Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598.
Several conditions: Liu et al., 2022, https://arxiv.org/abs/2206.01714.

    python p2_guided.py train --init checkpoints/ddpm_faces.safetensors --output-dir runs/p2/guided
    python p2_guided.py train-classifier --checkpoint checkpoints/ddpm_faces.safetensors \
        --output-dir runs/p2/noisy-classifier
    python p2_guided.py sample --checkpoint runs/p2/guided/model.safetensors --guidance free \
        --attributes Smiling=1 Male=-1 --output-dir runs/smiling
    python p2_guided.py sample --checkpoint checkpoints/ddpm_faces.safetensors \
        --classifier runs/p2/noisy-classifier/model.safetensors --guidance classifier \
        --attributes Eyeglasses=1 --output-dir runs/glasses
    python p2_guided.py grid --checkpoint runs/p2/guided/model.safetensors --guidance free \
        --output-dir runs/p2/attributes
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from common.asked import (
    ASKED_FILE,
    Asked,
    Others,
    RealRows,
    read_request,
    refuse_unknown,
    values_of,
    weights_of,
)
from common.attributes import (
    ATTRIBUTES_FILE,
    attributes_of,
)
from common.checkpoints import load_net
from common.cli import UserError, at_least, each_once, in_range, is_seed, run_cli
from common.data import list_images, to_uint8
from common.device import Device, Precision, make_accelerator, place
from common.faces import (
    FaceNet,
    digest_of_states,
    face_names,
    load_face_model,
)
from common.figures import save_image, save_labelled
from common.files import atomic_write, make_output_dir
from common.processes import my_share
from common.progress import show_progress
from common.reverse_process import State
from common.rng import ImageNoise
from diffusion.guidance import attribute_eps, classifier_gradient, composed_eps, shifted_eps
from diffusion.samplers import Clamp, ancestral_step, clamp_x0, ddim_step, step_pairs
from diffusion.schedule import Schedule, spaced_steps
from guided.classifier import TrainClassifier, train_classifier
from guided.network import Train, train
from models.noisy_classifier import NoisyClassifier

if TYPE_CHECKING:
    from accelerate import Accelerator

Guidance = Literal["none", "free", "classifier", "both"]
SCALES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)


@dataclass(kw_only=True)
class Sampling:
    """Options of the commands that sample."""

    checkpoint: Path
    """Network of train; with --guidance classifier also one of p2_ddpm_train.py for faces."""
    output_dir: Path
    """Folder for the images."""
    classifier: Path | None = None
    """model.safetensors of train-classifier, for --guidance classifier and both."""
    guidance: Guidance = "none"
    """What enforces the attributes: the network alone (none), guidance (free, classifier), both."""
    scale: tuple[float, ...] = ()
    """Strength; free 4 and classifier 8 if not given. With both, that of free comes first."""
    interval: tuple[float, float] = (0.0, 1.0)
    """The range of t / T in which guidance is on."""
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """Ancestral sampling (ddpm), or DDIM, without noise or with --eta."""
    steps: int = 50
    """Steps of the sampler."""
    eta: float = 0.0
    """Randomness of ddim: 0 adds no noise, 1 as much as ddpm."""
    others: Others = "unknown"
    """Attributes that are not named: unknown, as in a random real image, or all absent."""
    data_dir: Path = Path("hw2_data")
    """Data folder, whose attributes are counted and, for --others real, drawn from."""
    seed: int = 0
    """Seed of the noise. Image k depends on it and on k alone."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """bf16 autocast of the network where the hardware is fast at it, or fp32, as gradients are."""

    def __post_init__(self) -> None:
        self._check_guidance()
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"--interval {low:g} {high:g}: must rise and lie between 0 and 1")
        at_least("--steps", self.steps, 1)
        in_range("--eta", self.eta, 0, 1)
        if self.eta > 0 and self.sampler != "ddim":
            raise UserError(f"--eta {self.eta:g}: only --sampler ddim adds noise in this way")
        is_seed("--seed", self.seed)

    def _check_guidance(self) -> None:
        strengths = {"none": 0, "free": 1, "classifier": 1, "both": 2}[self.guidance]
        given = " ".join(f"{scale:g}" for scale in self.scale)
        if self.scale and not strengths:
            raise UserError(f"--scale {given}: needs --guidance free, classifier or both")
        if self.scale and len(self.scale) != strengths:
            raise UserError(f"--scale {given}: --guidance {self.guidance} takes {strengths}")
        for scale in self.scale:
            in_range("--scale", scale, 0, 1_000)
        needs_classifier = self.guidance in ("classifier", "both")
        if needs_classifier and self.classifier is None:
            raise UserError(f"--guidance {self.guidance}: needs --classifier")
        if self.classifier is not None and not needs_classifier:
            raise UserError(f"--classifier {self.classifier}: needs --guidance classifier or both")
        if self.others != "unknown" and self.guidance == "classifier":
            raise UserError(f"--others {self.others}: classifiers only get --attributes")


@dataclass(kw_only=True)
class Sample(Sampling):
    """Write faces 0000.png, 0001.png, … with attributes, and asked.json with what was asked."""

    attributes: tuple[str, ...] = ()
    """NAME=1 or NAME=-1 for each; NAME=1:3 has a strength of its own and is a term of its own."""
    num_images: int = 100
    """Number of images."""
    batch_size: int = 50
    """Images computed at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        read_request(self.attributes)
        if not self.attributes and (self.guidance, self.others) != ("none", "unknown"):
            raise UserError(f"--guidance {self.guidance}: needs --attributes, such as Smiling=1")
        at_least("--num-images", self.num_images, 1)
        at_least("--batch-size", self.batch_size, 1)


@dataclass(kw_only=True)
class Grid(Sampling):
    """Draw faces for each attribute, and faces at several strengths of the guidance.

    Every row of attributes.png starts from the same noises, and so does every row of scales.png,
    whose attribute is the first.
    """

    attributes: tuple[str, ...] = ()
    """NAME=1 or NAME=-1, a row for each; NAME=1 for all that are known, if not given."""
    scales: tuple[float, ...] = SCALES
    """Strengths of the guidance in scales.png; with both they are the first one's."""
    columns: int = 10
    """Noises that the faces start from, one in each column."""

    def __post_init__(self) -> None:
        super().__post_init__()
        read_request(self.attributes)
        each_once("--scales", self.scales)
        for scale in self.scales:
            in_range("--scales", scale, 0, 1_000)
        in_range("--columns", self.columns, 1, 100)


# Sampling


class Model(NamedTuple):
    """A diffusion model with the steps of the sampler, and perhaps a classifier that guides it."""

    net: FaceNet
    schedule: Schedule
    steps: list[int]
    clamp: Clamp
    names: list[str]  # of the network's attributes, if it has any
    classifier: NoisyClassifier | None
    classifier_names: list[str]
    accelerator: Accelerator


class Request(NamedTuple):
    """What is asked of a batch of images.

    `known` is what the network gets, (batch, attributes), or None for nothing. `terms` (terms,
    batch, attributes) and `weights` are those of `composed_eps`, or None without free guidance.
    `for_classifier` is the `asked` of `classifier_gradient`, or None without a classifier.
    """

    known: Tensor | None = None
    terms: Tensor | None = None
    weights: Tensor | None = None
    for_classifier: Tensor | None = None


class Strengths(NamedTuple):
    """How strong both kinds of guidance are."""

    free: float = 4.0
    classifier: float = 8.0


@torch.inference_mode()
def sample_faces(
    model: Model, request: Request, numbers: Sequence[int], args: Sampling
) -> Iterator[State]:
    """Sample faces number k; yields the noise and the state of every step, latents or images."""
    schedule = model.schedule
    low, high = args.interval
    draw = ImageNoise(args.seed, numbers, model.net.shape, model.accelerator.device)
    x = draw().contiguous(memory_format=torch.channels_last)
    yield State(schedule.T, x, None)
    for t, previous in step_pairs(model.steps):
        is_guided = low <= t / schedule.T <= high
        with model.accelerator.autocast():
            if is_guided and request.terms is not None and request.weights is not None:
                eps = composed_eps(model.net, schedule, x, t, request.terms, request.weights)
            else:
                eps = attribute_eps(model.net, schedule, x, t, request.known)
        if is_guided and request.for_classifier is not None:
            assert model.classifier is not None
            gradient = classifier_gradient(model.classifier, schedule, x, t, request.for_classifier)
            eps = shifted_eps(schedule, eps, gradient, t)
        x0 = clamp_x0(schedule.x0_from_eps(x, t, eps), model.clamp)
        if args.sampler == "ddpm":
            noise = draw() if previous > 0 else None
            x = ancestral_step(schedule, x, x0, t, previous, noise)
        else:
            noise = draw() if previous > 0 and args.eta > 0 else None
            x = ddim_step(schedule, x0, eps, t, previous, args.eta, noise)
        yield State(previous, x, x0)


def make_request(
    model: Model,
    asked: Sequence[Asked],
    numbers: Sequence[int],
    args: Sampling,
    real: RealRows | None,
) -> Request:
    """What `asked` and the options mean for the images `numbers`.

    Guidance without strength is no guidance: with --guidance free, 0 leaves the unconditional
    network.
    """
    if not asked:
        return Request()
    strengths = strengths_of(args)
    if args.guidance == "none":
        return Request(known=others_of(model, asked, numbers, args, real))
    if args.guidance == "classifier":
        weights = weights_of(asked, model.classifier_names, strengths.classifier)
        return Request(for_classifier=for_classifier_of(model, asked, weights, len(numbers)))

    request = Request()
    known = others_of(model, asked, numbers, args, real)
    terms, weights = terms_of(model, asked, known, strengths.free)
    if weights.any():
        request = Request(known, terms, weights)
    if args.guidance == "both":  # weights of single attributes are those of the terms
        plain = [item._replace(weight=None) for item in asked]
        weights = weights_of(plain, model.classifier_names, strengths.classifier)
        weighted = for_classifier_of(model, plain, weights, len(numbers))
        request = request._replace(for_classifier=weighted)
    return request


def for_classifier_of(
    model: Model, asked: Sequence[Asked], weights: Tensor, count: int
) -> Tensor | None:
    """The `asked` of `classifier_gradient` for `count` images; None if all weights are 0."""
    if not weights.any():
        return None
    weighted = values_of(asked, model.classifier_names) * weights
    return weighted.expand(count, -1).to(model.accelerator.device)


def terms_of(
    model: Model, asked: Sequence[Asked], known: Tensor, free: float
) -> tuple[Tensor, Tensor]:
    """The terms of `composed_eps` and their weights: all that is asked as one, or each its own."""
    device = model.accelerator.device
    if all(item.weight is None for item in asked):
        return known[None], torch.tensor([free], device=device)
    terms = torch.stack([values_of([item], model.names) for item in asked])
    weights = weights_of(asked, [item.name for item in asked], free)
    return terms[:, None].expand(-1, len(known), -1).to(device), weights.to(device)


def others_of(
    model: Model,
    asked: Sequence[Asked],
    numbers: Sequence[int],
    args: Sampling,
    real: RealRows | None,
) -> Tensor:
    """What the network gets: what is asked, and the other attributes as --others says.

    float32 (numbers, attributes), 1, -1 or 0 for unknown.
    """
    device = model.accelerator.device
    if args.others == "real":
        assert real is not None
        return real.draw(asked, model.names, args.seed, numbers).to(device)
    values = values_of(asked, model.names)
    if args.others == "absent":
        values = torch.where(values == 0, -1.0, values)
    return values.expand(len(numbers), -1).to(device)


def strengths_of(args: Sampling) -> Strengths:
    """The strengths that --scale gives, or the usual ones."""
    match args.guidance, args.scale:
        case "free", (free,):
            return Strengths(free=free)
        case "classifier", (classifier,):
            return Strengths(classifier=classifier)
        case "both", (free, classifier):
            return Strengths(free, classifier)
    return Strengths()


def load_model(args: Sampling) -> Model:
    """Load the network, its schedule and the classifier.

    Raises UserError for files that do not fit each other, or the options.
    """
    accelerator = make_accelerator(args.device, args.precision)
    start = load_face_model(args.checkpoint, "--checkpoint")
    timesteps = start.schedule.T
    if args.steps > timesteps:
        raise UserError(f"--steps {args.steps}: the network was trained with {timesteps:,} steps")
    classifier = None
    classifier_names = []
    if args.classifier is not None:
        kinds = {"noisy_classifier": NoisyClassifier}
        classifier, config = load_net(
            args.classifier, kinds, "--classifier", needs=("attributes", "states", "schedule")
        )
        classifier_names = config["attributes"]
        if config["states"] != digest_of_states(start.net):
            raise UserError(
                f"--classifier {args.classifier}: was trained on the states of another model than "
                f"{args.checkpoint}"
            )
        if classifier.shape != start.net.shape:
            raise UserError(
                f"--classifier {args.classifier}: is for other states than {args.checkpoint}"
            )
        theirs = Schedule.from_config(config["schedule"])
        same_noise = theirs.alpha_bar == start.schedule.alpha_bar
        if not same_noise or theirs.counted_to != start.schedule.counted_to:
            raise UserError(
                f"--classifier {args.classifier}: has another noise schedule than {args.checkpoint}"
            )
        classifier = place(classifier, accelerator.device).eval().requires_grad_(False)
    sampling = start.sampling
    return Model(
        place(start.net, accelerator.device).eval(),
        start.schedule,
        spaced_steps(timesteps, args.steps, sampling["spacing"]),
        sampling["clamp"],
        start.names,
        classifier,
        classifier_names,
        accelerator,
    )


def check_request(model: Model, asked: Sequence[Asked], args: Sampling) -> RealRows | None:
    """Check what is asked, print how many training images have it, and return their attributes.

    None without a file of attributes. Raises UserError for what nobody here knows.
    """
    if asked and args.guidance != "classifier":
        refuse_without_attributes(model, args)
        refuse_unknown(asked, model.names, str(args.checkpoint))
    if args.guidance in ("classifier", "both"):
        refuse_unknown(asked, model.classifier_names, str(args.classifier))
    for item in asked:
        if item.weight is not None and args.guidance == "none":
            raise UserError(f"--attributes {item.words}: a weight needs guidance, --guidance free")
        if item.weight is not None and args.others != "unknown":
            raise UserError(f"--others {args.others}: does not go with {item.words}")
    if not asked:
        return None
    try:
        files = [path.name for path in list_images(args.data_dir / "face" / "train")]
        real = RealRows.read(attributes_of(args.data_dir), files)
        refuse_unknown(asked, real.names, str(args.data_dir / "face" / ATTRIBUTES_FILE))
    except UserError as error:
        if args.others == "real":
            raise
        if model.accelerator.is_main_process:
            print(f"training images with these attributes: not counted ({error})")
        return None
    return real


def refuse_without_attributes(model: Model, args: Sampling) -> None:
    """Raise UserError for a network that has no attributes, and says how it can be guided."""
    if not model.names:
        raise UserError(
            f"--checkpoint {args.checkpoint}: has no attributes; take --guidance classifier"
        )


def sample(args: Sample) -> None:
    """Write the images and what was asked of each; processes share the batches."""
    model = load_model(args)
    accelerator = model.accelerator
    asked = read_request(args.attributes)
    real = check_request(model, asked, args)
    if asked and real is not None and accelerator.is_main_process:
        print(real.sentence(asked))
    names = face_names(args.num_images)
    make_output_dir(args.output_dir, only=[*names, ASKED_FILE])
    accelerator.wait_for_everyone()  # all have looked before the first one writes

    write_faces(model, asked, range(args.num_images), args, real, names)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        of_each = {item.name: item.value for item in asked}
        content = json.dumps(dict.fromkeys(names, of_each), indent=1)
        atomic_write(args.output_dir / ASKED_FILE, content + "\n")
        print(f"{args.num_images:,} faces: {args.output_dir}")


def write_faces(
    model: Model,
    asked: Sequence[Asked],
    numbers: Sequence[int],
    args: Sample,
    real: RealRows | None,
    names: Sequence[str],
) -> None:
    """Write the faces `numbers` under their names; processes share the batches."""
    mine = my_share(range(0, len(numbers), args.batch_size), model.accelerator)
    for start in show_progress(mine, len(mine), "faces, batches"):
        some = numbers[start : start + args.batch_size]
        request = make_request(model, asked, some, args, real)
        pixels = last_pixels(model, request, some, args)
        for name, image in zip(names[start:], pixels, strict=False):
            save_image(image, args.output_dir / name)


@torch.inference_mode()
def last_pixels(model: Model, request: Request, numbers: Sequence[int], args: Sampling) -> Tensor:
    """The finished images of a batch: uint8 (n, 3, height, width), on the CPU."""
    x = torch.empty(0)
    for state in sample_faces(model, request, numbers, args):
        x = state.x
    with model.accelerator.autocast():
        return to_uint8(model.net.decode(x)).cpu()


def grid(args: Grid) -> None:
    """Draw attributes.png, and scales.png where there is a strength to vary."""
    model = load_model(args)
    asked = read_request(args.attributes) or all_known(model, args)
    real = check_request(model, asked, args)
    make_output_dir(args.output_dir)
    numbers = range(args.columns)
    columns = [f"noise {number}" for number in numbers]
    rows = []
    for item in show_progress(asked, len(asked), "attributes"):
        request = make_request(model, [item], numbers, args, real)
        rows.append(last_pixels(model, request, numbers, args))
    how = f"the others: {args.others}; {args.sampler}, {args.steps} steps, seed {args.seed}"
    strengths = strengths_of(args)
    strength = {
        "none": "",
        "free": f" {strengths.free:g}",
        "classifier": f" {strengths.classifier:g}",
        "both": f" {strengths.free:g} and {strengths.classifier:g}",
    }
    about = f"guidance: {args.guidance}{strength[args.guidance]}; {how}"
    file = args.output_dir / "attributes.png"
    save_labelled(torch.cat(rows), file, [item.words for item in asked], columns, about)
    print(file)
    if args.guidance == "none":
        return

    first = asked[0]._replace(weight=None)
    strips = []
    for scale in show_progress(args.scales, len(args.scales), "scales"):
        scales = (scale, strengths.classifier) if args.guidance == "both" else (scale,)
        scaled = dataclasses.replace(args, scale=scales)
        request = make_request(model, [first], numbers, scaled, real)
        strips.append(last_pixels(model, request, numbers, scaled))
    about = f"guidance: {args.guidance}; {how}"
    if args.guidance == "both":
        about = f"guidance: free, and the classifier's {strengths.classifier:g}; {how}"
    row_names = [f"{first.words}, scale {scale:g}" for scale in args.scales]
    file = args.output_dir / "scales.png"
    save_labelled(torch.cat(strips), file, row_names, columns, about)
    print(file)


def all_known(model: Model, args: Sampling) -> list[Asked]:
    """All attributes, as there, that both the network and the classifier know, if they are asked.

    Raises UserError if there are none.
    """
    names = model.classifier_names if args.guidance == "classifier" else model.names
    if args.guidance == "both":
        names = [name for name in names if name in model.classifier_names]
    if not names:
        refuse_without_attributes(model, args)
        raise UserError(f"--classifier {args.classifier}: knows no attribute of the network")
    return [Asked(name, 1) for name in names]


def main(args: Train | TrainClassifier | Sample | Grid) -> Any:
    """Run one command."""
    match args:
        case Train():
            return train(args)
        case TrainClassifier():
            return train_classifier(args)
        case Sample():
            return sample(args)
        case Grid():
            return grid(args)


if __name__ == "__main__":
    run_cli(Train | TrainClassifier | Sample | Grid, main, shared=Train | TrainClassifier | Sample)
