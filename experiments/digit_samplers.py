r"""A table of digit samplers: accuracy, diversity and cost by sampler, steps and guidance.

Rows: each of --samplers with --guidance, each of --guidances with the default sampler and steps of
p2_ddpm_infer.py, and the real validation images. Columns: network calls for each image (a guided
step counts 2), accuracy and diversity by each domain's classifier (see evaluate.py digits), and
seconds an image, from noise to pixels in batches of --batch-size with the network loaded and warm.
Image k starts from noise k in every row.

Rows of few images are less certain: of 100 images, one is 1 %. The same command again measures what
is missing, and further --samplers and --guidances add rows. Writes table.json (all that was
measured), table.csv, table.md and table.png.

    python experiments/digit_samplers.py --checkpoint runs/p2/digits/model.safetensors \
        --output-dir runs/p2/samplers --domains mnistm svhn --classifiers \
        runs/p2/judge-mnistm/model.safetensors runs/p2/judge-svhn/model.safetensors
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.checkpoints import load_net
from common.cli import UserError, at_least, each_once, in_range, is_seed, run_cli
from common.data import Images, load_digits
from common.device import Device, Precision, make_accelerator
from common.figures import save_table
from common.files import atomic_write, make_output_dir
from common.json_files import read_object
from common.progress import show_progress
from common.run import environment
from diffusion.schedule import Spacing
from metrics.digits import NETS, evaluate_digits
from p2_ddpm_infer import (
    LARGEST_GUIDANCE,
    Generate,
    Model,
    Sampler,
    file_name,
    in_batches,
    last_of,
    load_model,
    sample_digits,
)

SAMPLERS = ("ddpm", "ddim-50", "ddim-25", "ddim-10", "dpm-solver++-20", "dpm-solver++-10")
# The options that all rows of a table share.
SHARED = ("per_class", "ddpm_per_class", "spacing", "seed", "batch_size", "device", "precision")


@dataclass(kw_only=True)
class Table:
    """Measure the rows that are missing, one after the other; write the table after each."""

    checkpoint: Path
    """model.safetensors of p2_ddpm_train.py, or a published ContextUnet .pth."""
    output_dir: Path
    """Folder for the table. The same command again continues."""
    domains: tuple[str, ...]
    """Domains to generate, of those that the network knows."""
    classifiers: tuple[Path, ...]
    """A classifier for each of --domains: model.safetensors of evaluate.py train-classifier."""
    data_dir: Path = Path("hw2_data")
    """Data folder, whose validation images are the real ones."""
    samplers: tuple[str, ...] = SAMPLERS
    """Rows with --guidance: SAMPLER or SAMPLER-STEPS, with ddpm, ddim or dpm-solver++."""
    guidance: float = Generate.guidance
    """Guidance of the rows in --samplers."""
    guidances: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 5.0)
    """Rows with the default sampler and steps: their guidance."""
    interval: tuple[float, float] = Generate.interval
    """The range of t / T in which guidance is on, in every row."""
    spacing: Spacing = "beta"
    """Spacing of the steps, in every row."""
    per_class: int = 50
    """Images of each digit and domain."""
    ddpm_per_class: int = 10
    """Images of each digit and domain with ddpm, which is slow."""
    seed: int = 0
    """Seed of the noise."""
    batch_size: int = 250
    """Images computed at a time."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """bf16 autocast where the hardware is fast at it, or fp32."""

    def __post_init__(self) -> None:
        each_once("--domains", self.domains)
        if len(self.classifiers) != len(self.domains):
            raise UserError(
                f"--classifiers: needs one for each of --domains, in their order "
                f"({len(self.classifiers)} for {len(self.domains)} domains)"
            )
        if not self.samplers and not self.guidances:
            raise UserError("--samplers and --guidances: at least one row is needed")
        in_range("--guidance", self.guidance, -LARGEST_GUIDANCE, LARGEST_GUIDANCE)
        for guidance in self.guidances:
            in_range("--guidances", guidance, -LARGEST_GUIDANCE, LARGEST_GUIDANCE)
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"--interval {low:g} {high:g}: must rise and lie between 0 and 1")
        at_least("--per-class", self.per_class, 1)
        at_least("--ddpm-per-class", self.ddpm_per_class, 1)
        is_seed("--seed", self.seed)
        at_least("--batch-size", self.batch_size, 1)


class Row(NamedTuple):
    """What a row of the table is about; `steps` None is the sampler's default."""

    sampler: Sampler
    steps: int | None
    guidance: float


class Generated(NamedTuple):
    """The images of a domain, the network calls for each, and the seconds for each."""

    images: Images
    calls: float
    seconds: float


def wanted_rows(args: Table) -> list[Row]:
    """The rows asked for. Raises UserError for a sampler that does not exist."""
    names = get_args(Sampler)
    choices = "|".join(re.escape(name) for name in names)
    rows = []
    for text in args.samplers:
        found = re.fullmatch(rf"({choices})(?:-(\d+))?", text)
        if not found:
            known = ", ".join(names)
            raise UserError(
                f"--samplers {text}: must be SAMPLER or SAMPLER-STEPS with one of {known}"
            )
        name, steps = found.groups()
        rows.append(Row(name, int(steps) if steps else None, args.guidance))
    default = Generate(checkpoint=args.checkpoint, output_dir=args.output_dir)
    swept = [Row(default.sampler, default.steps, guidance) for guidance in args.guidances]
    return rows + swept


def options_of(args: Table, row: Row) -> Generate:
    """The options of p2_ddpm_infer.py for a row."""
    return Generate(
        checkpoint=args.checkpoint,
        output_dir=args.output_dir,
        sampler=row.sampler,
        steps=row.steps,
        guidance=row.guidance,
        interval=args.interval,
        spacing=args.spacing,
        seed=args.seed,
        batch_size=args.batch_size,
        device=args.device,
        precision=args.precision,
    )


def generate(model: Model, domain: str, per_class: int, options: Generate) -> Generated:
    """Make the images that p2_ddpm_infer.py would write; count the network's calls."""

    def sample(digits: list[int], numbers: list[int]) -> Any:
        return sample_digits(model, domain, digits, numbers, options.guidance, options)

    batches = in_batches(per_class, options.batch_size)
    list(islice(sample(*batches[0]), 2))  # the noise and one step, to warm up

    calls = 0

    def count(net: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal calls
        calls += len(inputs[0])

    hook = model.net.register_forward_pre_hook(count)
    start = time.perf_counter()
    pixels = []
    for digits, numbers in show_progress(batches, len(batches), "digits, batches"):
        pixels.append(last_of(sample(digits, numbers)).pixels)
    seconds = time.perf_counter() - start
    hook.remove()

    labels = []
    names = []
    for digits, numbers in batches:
        labels += digits
        names += [file_name(digit, number) for digit, number in zip(digits, numbers, strict=True)]
    images = Images(torch.cat(pixels), torch.tensor(labels), names)
    return Generated(images, calls / len(labels), seconds / len(labels))


def measure(args: Table, row: Row, real: dict[str, Images]) -> dict[str, Any]:
    """Generate the images of a row for every domain, and evaluate them."""
    options = options_of(args, row)
    model = load_model(options)
    per_class = args.ddpm_per_class if row.sampler == "ddpm" else args.per_class
    made = {domain: generate(model, domain, per_class, options) for domain in args.domains}
    # Only now, because Accelerate has one precision for the whole program: the classifier reads in
    # fp32, as in evaluate.py.
    accelerator = make_accelerator(args.device, "fp32")
    evaluated = {}
    for domain, classifier in zip(args.domains, args.classifiers, strict=True):
        net, _ = load_net(classifier, NETS, "--classifiers")
        net.to(accelerator.device)
        images = made[domain].images
        evaluated[domain] = evaluate_digits(net, images, real[domain], accelerator, args.seed)
    return {
        "sampler": row.sampler,
        "steps": len(model.steps),
        "guidance": row.guidance,
        "per_class": per_class,
        "evaluations": made[args.domains[0]].calls,
        "seconds": sum(generated.seconds for generated in made.values()) / len(made),
        "domains": evaluated,
    }


def identity(args: Table) -> dict[str, Any]:
    """What all rows of a table must share: the options, and what the files contain."""
    shared = {name: getattr(args, name) for name in SHARED}
    shared["domains"] = list(args.domains)
    shared["interval"] = list(args.interval)
    shared["data_dir"] = str(args.data_dir.resolve())
    shared["checkpoint"] = digest(args.checkpoint)
    shared["classifiers"] = [digest(file) for file in args.classifiers]
    return shared


def digest(file: Path) -> str:
    """The first digits of a file's SHA-256."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def read_rows(file: Path, expected: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier sitting. Raises UserError if they were measured otherwise."""
    if not file.exists():
        return []
    content = read_object(file)
    before = content.get("arguments")
    rows = content.get("rows")
    if not isinstance(before, dict) or not isinstance(rows, list):
        raise UserError(f"{file}: damaged or not a table; remove it")
    changes = []
    for name, value in expected.items():
        if before.get(name) != value:
            changes.append(f"{name} was {before.get(name)}, is {value}")
    if changes:
        raise UserError(
            f"--output-dir {file.parent}: holds a table of something else ({', '.join(changes)})"
        )
    return rows


def write_table(file: Path, arguments: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write table.json, and the table itself as csv, markdown and a picture."""
    accelerator = make_accelerator(arguments["device"], arguments["precision"])
    content = {"arguments": arguments, **environment(accelerator), "rows": rows}
    atomic_write(file, json.dumps(content, indent=1) + "\n")

    domains = arguments["domains"]
    low, high = arguments["interval"]
    where = "" if (low, high) == (0.0, 1.0) else f" where t / T is in {low}-{high}"
    header = [
        "sampler",
        f"steps ({arguments['spacing']})",
        f"guidance w{where}",
        "images a digit",
        "calls an image",
    ]
    real = ["real images", "", "", "", ""]
    for domain in domains:
        header += [f"{domain} accuracy, %", f"{domain} diversity, %"]
        real += [f"{rows[0]['domains'][domain]['real_accuracy']:.2f}", "100.0"]
    table = [[*header, "seconds an image"]]
    order = list(get_args(Sampler))
    rows = sorted(
        rows, key=lambda row: (order.index(row["sampler"]), -row["steps"], row["guidance"])
    )
    table += [cells_of(row, domains) for row in rows]
    save_table([*table, [*real, ""]], file.with_suffix(".png"), "Samplers and guidance")


def cells_of(row: dict[str, Any], domains: list[str]) -> list[str]:
    """A measured row in words."""
    cells = [
        row["sampler"],
        str(row["steps"]),
        f"{row['guidance']:g}",
        str(row["per_class"]),
        f"{row['evaluations']:g}",
    ]
    for domain in domains:
        score = row["domains"][domain]
        share = score["diversity_percent_of_real"]
        cells.append(f"{score['accuracy']:.2f}")
        cells.append("none" if share is None else f"{share:.1f}")
    cells.append(f"{row['seconds']:.4g}")
    return cells


def check_rows(args: Table) -> dict[tuple[str, int, float], Row]:
    """The rows by sampler, number of steps and guidance, each once.

    Raises UserError for a sampler, a number of steps or a domain that the network does not have.
    """
    rows = {}
    for row in wanted_rows(args):
        model = load_model(options_of(args, row))
        rows[row.sampler, len(model.steps), row.guidance] = row
        for domain in args.domains:
            if domain not in model.domains:
                known = " ".join(model.domains)
                raise UserError(f"--domains {domain}: {args.checkpoint} only knows {known}")
    return rows


def main(args: Table) -> list[dict[str, Any]]:
    """Check everything, then measure what is missing; returns the rows."""
    wanted = check_rows(args)
    for classifier in args.classifiers:
        load_net(classifier, NETS, "--classifiers")
    file = make_output_dir(args.output_dir) / "table.json"
    arguments = identity(args)
    rows = read_rows(file, arguments)
    done = [(row["sampler"], row["steps"], row["guidance"]) for row in rows]
    cache = args.output_dir.parent / "cache"
    real = {}
    for domain in args.domains:
        real[domain] = load_digits(args.data_dir, domain, "val", cache)
    for (sampler, steps, guidance), row in wanted.items():
        if (sampler, steps, guidance) in done:
            continue
        measured = measure(args, row, real)
        rows.append(measured)
        write_table(file, arguments, rows)
        scores = [f"{d} {score['accuracy']:.2f} %" for d, score in measured["domains"].items()]
        print(
            f"{sampler}, {steps} steps, w = {guidance:g}: {', '.join(scores)}, "
            f"{measured['seconds']:.4g} s an image"
        )
    print(file.with_suffix(".md").read_text() + str(file.with_suffix(".png")))
    return rows


if __name__ == "__main__":
    run_cli(Table, main)
