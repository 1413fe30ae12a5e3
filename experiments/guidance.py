r"""Faces by attribute in several ways: does the face have what was asked, and what does it cost?

Rows: an unguided network, which is asked nothing; the network with attributes, asked plainly, with
the other attributes unknown, as in a random real image, or absent; classifier-free guidance and
classifier guidance at --free-scales and --classifier-scales; both with the middle one of each.
Classifier guidance leads the network of --unconditional, which knows no attributes.

Every row asks for each attribute once as there and once as not there, --count images each, from the
same noises. The hit rate is the mean of both, as an independent classifier sees them
(evaluate.py attributes), and its share of what that classifier reaches on real faces. Beside it is
the guiding classifier's own hit rate, which guidance raises directly.

KID, the random features' distance and the rate of exactly one face are those of --pooled images,
each asked for one attribute as a random real image has it, because no real set is half bald.

The same command again continues. Beside the table there are samples.png with the first pooled faces
of every row, and trade_off.png with KID against the hit rate.

    python experiments/guidance.py --checkpoint runs/p2/guided/model.safetensors \
        --classifier runs/p2/noisy-classifier/model.safetensors \
        --evaluator runs/classifier/attributes/model.safetensors --output-dir runs/p2/guidance
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import evaluate
import p2_guided
from common.asked import ASKED_FILE, Asked, Others, RealRows
from common.attributes import attributes_of
from common.cli import UserError, at_least, each_once, in_range, is_seed, run_cli
from common.data import list_images, load_folder, normalise
from common.device import Device, Precision
from common.figures import pyplot
from common.files import ROOT, atomic_write
from common.json_files import read_json, read_object
from common.progress import show_progress
from common.rng import make_rng
from experiments.face_rows import (
    Lines,
    check_shared,
    decimals,
    read_or_compute,
    timed,
    write_reference,
)
from metrics.attributes import load_evaluator
from p2_guided import Guidance, Model

RARE = ("Bald", "Mustache")  # attributes with a column of their own
COLUMNS = ["network", "guidance", "the others"]
HIT_RATE = "hit rate, %"
KID = "KID × 1,000"
SOME = ("Smiling=1",)  # stands for what is asked image by image
SHARED = ("count", "pooled", "steps", "seed", "device", "precision", "data_dir")


@dataclass(kw_only=True)
class Table:
    """Sample and evaluate what is missing; write the table after each row."""

    checkpoint: Path
    """Network with attributes, of p2_guided.py train."""
    classifier: Path
    """Classifier of noisy faces, of p2_guided.py train-classifier."""
    evaluator: Path
    """Independent classifier, of evaluate.py train-attributes."""
    output_dir: Path
    """Folder for everything. The same command again continues."""
    unconditional: Path = ROOT / "checkpoints" / "ddpm_faces.safetensors"
    """Network without attributes, which the classifier guides."""
    data_dir: Path = Path("hw2_data")
    """Data folder with face/train, face/val and face/list_attr_celeba.txt."""
    free_scales: tuple[float, ...] = (2.0, 4.0, 8.0)
    """Strengths of classifier-free guidance."""
    classifier_scales: tuple[float, ...] = (3.0, 8.0, 20.0)
    """Strengths of classifier guidance."""
    count: int = 20
    """Images of each attribute, once asked as there and once as not there."""
    pooled: int = 200
    """Images of a row that are asked as real images are, for the distances."""
    steps: int = 50
    """Steps of ancestral sampling."""
    batch_size: int = 50
    """Images computed at a time."""
    seed: int = 0
    """Seed of the noise, and of what the pooled images are asked."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """bf16 autocast where the hardware is fast at it, or fp32."""

    def __post_init__(self) -> None:
        for flag, scales in (
            ("--free-scales", self.free_scales),
            ("--classifier-scales", self.classifier_scales),
        ):
            each_once(flag, scales)
            for scale in scales:
                in_range(flag, scale, 0, 1_000)
        at_least("--count", self.count, 1)
        at_least("--pooled", self.pooled, 2)
        at_least("--steps", self.steps, 1)
        at_least("--batch-size", self.batch_size, 1)
        is_seed("--seed", self.seed)


class Row(NamedTuple):
    """A way to ask."""

    guidance: Guidance
    scale: tuple[float, ...] = ()
    others: Others = "unknown"
    is_asked: bool = True

    @property
    def is_conditional(self) -> bool:
        """Whether it samples the network with attributes."""
        return self.is_asked and self.guidance != "classifier"

    @property
    def network(self) -> str:
        """Which network is sampled."""
        return "with attributes" if self.is_conditional else "unconditional"

    @property
    def words(self) -> str:
        """The kind of guidance and its strength."""
        if not self.is_asked:
            return "nothing asked"
        return " ".join([self.guidance, *(f"{scale:g}" for scale in self.scale)])

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.words} {self.others}".replace(" ", "-")


def rows_of(args: Table) -> list[Row]:
    """All ways to ask."""
    middle = (args.free_scales[len(args.free_scales) // 2],)
    middle += (args.classifier_scales[len(args.classifier_scales) // 2],)
    return [
        Row("none", is_asked=False),
        Row("none"),
        Row("none", others="real"),
        Row("none", others="absent"),
        *(Row("free", (scale,)) for scale in args.free_scales),
        Row("free", middle[:1], others="absent"),
        *(Row("classifier", (scale,)) for scale in args.classifier_scales),
        Row("both", middle),
    ]


# Images


def options_of(args: Table, row: Row, folder: Path) -> p2_guided.Sample:
    """The options of `p2_guided.py sample` for a row."""
    needs_classifier = row.guidance in ("classifier", "both")
    return p2_guided.Sample(
        checkpoint=args.checkpoint if row.is_conditional else args.unconditional,
        output_dir=folder,
        classifier=args.classifier if needs_classifier else None,
        guidance=row.guidance,
        scale=row.scale,
        others=row.others,
        attributes=SOME if row.is_asked else (),
        steps=args.steps,
        data_dir=args.data_dir,
        seed=args.seed,
        batch_size=args.batch_size,
        device=args.device,
        precision=args.precision,
    )


class Source(NamedTuple):
    """What a row samples: a model with its options, and what the attributes are called."""

    model: Model
    options: p2_guided.Sample
    names: list[str]
    real: RealRows


def write_asked(args: Table, row: Row, source: Source, folder: Path) -> None:
    """Write --count images for each attribute and value, and asked.json.

    The unguided network is asked nothing: the same images stand for all, once there and once not,
    so that its hit rate is 50 % whatever they show.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(args.count)
    asked_of: dict[str, dict[str, int]] = {}
    for value in (1, -1):
        if not row.is_asked:
            files = [f"nothing_{value}_{number:04d}.png" for number in numbers]
            write_some(source, [], numbers, files, folder)
            asked_of |= {file: dict.fromkeys(source.names, value) for file in files}
            continue
        for name in source.names:
            files = [f"{name}_{value}_{number:04d}.png" for number in numbers]
            write_some(source, [Asked(name, value)], numbers, files, folder)
            asked_of |= {file: {name: value} for file in files}
    atomic_write(folder / ASKED_FILE, json.dumps(asked_of, indent=1) + "\n")


def write_some(
    source: Source, asked: list[Asked], numbers: Sequence[int], files: list[str], folder: Path
) -> None:
    """Write the images `numbers`, of which the same is asked, as `files` of a folder."""
    options = dataclasses.replace(source.options, output_dir=folder)
    p2_guided.write_faces(source.model, asked, numbers, options, source.real, files)


def write_pooled(args: Table, row: Row, source: Source, folder: Path) -> None:
    """Write --pooled images; each is asked for one attribute as a random real image has it."""
    folder.mkdir(parents=True, exist_ok=True)
    real = source.real
    groups: dict[Asked, list[int]] = {}
    for number in range(args.pooled):
        name = source.names[number % len(source.names)]
        rng = make_rng(args.seed, "pooled", number)
        image = int(torch.randint(len(real.values), (1,), generator=rng))
        value = int(real.values[image, real.names.index(name)])
        groups.setdefault(Asked(name, value), []).append(number)
    for item, numbers in groups.items():
        files = [f"{number:04d}.png" for number in numbers]
        write_some(source, [item] if row.is_asked else [], numbers, files, folder)


# Scores


@torch.inference_mode()
def own_hit_rate(args: Table, names: Sequence[str], folder: Path) -> float:
    """The hit rate of a folder of images in %, as the guiding classifier sees it without noise."""
    options = options_of(args, Row("classifier", (1.0,)), folder)
    model = p2_guided.load_model(options)
    assert model.classifier is not None
    images = load_folder(folder, (model.net.image_size, model.net.image_size))
    asked_of = read_object(folder / ASKED_FILE)
    device = model.accelerator.device
    logits = []
    batches = images.pixels.split(args.batch_size)
    for some in show_progress(batches, len(batches), "guiding classifier, batches"):
        x = model.net.encode(normalise(some.to(device)))
        t = torch.ones(len(x), device=device)
        logits.append(model.classifier(x, model.schedule.time(t, model.classifier)))
    sees = torch.cat(logits).cpu() > 0
    rates = []
    for name in names:
        column = model.classifier_names.index(name)
        for value in (1, -1):
            rows = [
                row for row, file in enumerate(images.names) if asked_of[file].get(name) == value
            ]
            hits = sees[rows, column] == (value == 1)
            rates.append(100 * hits.float().mean().item())
    return sum(rates) / len(rates)


def score(args: Table, names: Sequence[str], folder: Path) -> dict[str, Any]:
    """The hit rates of a row: the evaluator's, and the guiding classifier's own."""
    command = evaluate.Attributes(
        folder / "asked",
        args.evaluator,
        data_dir=args.data_dir,
        device=args.device,
        output_dir=folder / "hits",
    )
    found = dict(read_or_compute(command))
    file = folder / "own.json"
    if not file.exists():
        atomic_write(file, json.dumps(own_hit_rate(args, names, folder / "asked")) + "\n")
    found["own"] = read_json(file)
    return found


def draw_trade_off(lines: Lines, rows: Sequence[Row], file: Path) -> None:
    """Draw KID against the hit rate; the strengths of one kind of guidance are joined."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 4.2))
    points: dict[str, list[tuple[float, float, str]]] = {}
    columns = [lines.header.index(name) for name in (HIT_RATE, KID)]
    for row, cells in zip(rows, lines.rows, strict=False):
        if "–" in [cells[column] for column in columns]:  # not measured
            continue
        kind = row.guidance  # its strengths are joined
        if not row.is_asked:
            kind = row.words
        elif row.others != "unknown":
            kind = f"{row.words}, others {row.others}"
        x, y = (float(cells[column]) for column in columns)
        points.setdefault(kind, []).append((x, y, row.words))
    for kind, places in points.items():
        axis.plot([x for x, *_ in places], [y for _, y, _ in places], "o-", label=kind)
        for x, y, words in places:
            axis.annotate(words, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
    axis.set_xlabel("balanced hit rate, %")
    axis.set_ylabel(KID)
    if points:
        axis.legend(fontsize=7)
    figure.savefig(file, dpi=150, bbox_inches="tight")
    plt.close(figure)


def main(args: Table) -> list[list[str]]:
    """Sample and evaluate what is missing; returns the lines of the table."""
    shared = {name: getattr(args, name) for name in SHARED}
    for name in ("checkpoint", "unconditional", "classifier", "evaluator"):
        shared[name] = getattr(args, name).resolve()
    check_shared(args.output_dir, shared)
    rows = rows_of(args)
    names, real = check_networks(args, rows)
    size = load_model(args, rows[0]).net.image_size
    reference = write_reference(
        args.output_dir, args.data_dir, size, [args.pooled], args.seed, "--pooled"
    )
    title = (
        f"{args.count:,} images of each attribute and value; {args.pooled:,} pooled images; "
        f"ancestral sampling, {args.steps} steps, batches of what is asked alike; "
        f"{reference.description}"
    )
    rare = [name for name in RARE if name in names]
    columns = [*COLUMNS, HIT_RATE, "of real, %", *(f"{name}, %" for name in rare)]
    columns += ["guiding classifier's own, %", "diversity of real, %"]
    lines = Lines(columns, args.output_dir, reference, title, args.device)
    for row in rows:
        folder = args.output_dir / "rows" / row.name
        source = Source(load_model(args, row), options_of(args, row, folder), names, real)
        asked = folder / "asked"
        pooled = folder / "pooled"
        timed(asked, args.count, partial(write_asked, args, row, source, asked))
        seconds = timed(folder, args.pooled, partial(write_pooled, args, row, source, pooled))
        found = score(args, names, folder)
        measured = [decimals(found["balanced_hit_rate"], 1), decimals(found["percent_of_real"], 1)]
        measured += [decimals(found["attributes"][name]["balanced"], 1) for name in rare]
        measured += [f"{found['own']:.1f}", decimals(diversity_of(found), 1)]
        words = [row.network, row.words, row.others if row.is_asked else ""]
        lines.add(words, folder, pooled, seconds, measured)
    folder = args.output_dir / f"real-{args.pooled}"
    blanks = [""] * (len(columns) - len(COLUMNS))
    images = reference.train[args.pooled]
    lines.add(["real images", "", ""], folder, images, None, blanks)
    lines.draw_samples(size)
    draw_trade_off(lines, rows, args.output_dir / "trade_off.png")
    lines.print()
    return lines.rows


def load_model(args: Table, row: Row) -> Model:
    """The model of a row."""
    return p2_guided.load_model(options_of(args, row, args.output_dir))


def check_networks(args: Table, rows: Sequence[Row]) -> tuple[list[str], RealRows]:
    """The attributes of the network, and those of the training images.

    Raises UserError, before anything is sampled, for networks that do not fit each other.
    """
    both, by_classifier = (
        next(row for row in rows if row.guidance == guidance) for guidance in ("both", "classifier")
    )
    model = load_model(args, both)
    if not model.names:
        raise UserError(f"--checkpoint {args.checkpoint}: has no attributes")
    load_model(args, by_classifier)
    net, _ = load_evaluator(args.evaluator, model.accelerator.device)
    for flag, path, known in (
        ("--classifier", args.classifier, model.classifier_names),
        ("--evaluator", args.evaluator, net.attributes),
    ):
        lacking = [name for name in model.names if name not in known]
        if lacking:
            raise UserError(f"{flag} {path}: does not know {' '.join(lacking)}")
    files = [path.name for path in list_images(args.data_dir / "face" / "train")]
    return model.names, RealRows.read(attributes_of(args.data_dir), files)


def diversity_of(found: dict[str, Any]) -> float | None:
    """The diversity of all images of a row in % of real images', if it was measured."""
    of_all = (found["diversity"] or {}).get("all")
    return None if of_all is None else of_all["percent_of_real"]


if __name__ == "__main__":
    run_cli(Table, main)
