"""Accuracy and diversity of generated digits beside their cost, over samplers, numbers of steps and guidance: a table.

Rows: each of --samplers at --guidance, each of --guidances at p2_ddpm_infer.py's default sampler and steps, last the
real validation images. Columns: passes of the net an image (a guided step counts 2), accuracy before the judge of each
domain, diversity in % of the real images' (score.py digits), and seconds an image: from noise to pixels in batches of
--batch-size, the net loaded and warm. The rest is as p2_ddpm_infer.py has it. Image k comes from noise k in every row.

Rows of few images are less certain: of 100, one is 1 %; diversity compares as many generated as real images, and its
share of theirs depends a little on how many. The same command again does what is missing; further --samplers and
--guidances add rows to the table. Writes table.json (all that was measured), table.csv, table.md and table.png.

    python benchmarks/digit_samplers.py --checkpoint runs/p2/digits/model.safetensors --output-dir runs/p2/samplers \\
        --domains mnistm svhn --classifiers runs/p2/judge-mnistm/model.safetensors runs/p2/judge-svhn/model.safetensors
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections import deque
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import run as runs
from common.data import Images, load_digits
from common.diffusion import Sampler, Spacing
from common.figures import save_table
from common.run import UserError
from p2_ddpm_infer import Generate, Model, file_name, in_batches
from scoring import digits as judging

SAMPLERS = ("ddpm", "ddim-50", "ddim-25", "ddim-10", "dpm-solver++-20", "dpm-solver++-10")


@dataclass(kw_only=True)
class Table:
    """Measure the rows that are missing, one after the other; write the table after each."""

    checkpoint: Path  # model.safetensors of p2_ddpm_train.py, or a published ContextUnet .pth.
    output_dir: Path  # Where the table is written; the same command again continues.
    domains: tuple[str, ...]  # Of those the model knows.
    classifiers: tuple[Path, ...]  # The judge of each of --domains: model.safetensors of score.py train-classifier.
    data_dir: Path = Path("hw2_data")  # Its validation images are the real ones.
    samplers: tuple[str, ...] = SAMPLERS  # SAMPLER or SAMPLER-STEPS (ddpm, ddim, dpm-solver++), at --guidance.
    guidance: float = Generate.guidance  # w of these.
    guidances: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 5.0)  # w, at the default sampler and steps.
    interval: tuple[float, float] = Generate.interval  # The t / T between which guidance is on, in every row.
    spacing: Spacing = Generate.spacing  # Which steps, in every row.
    per_class: int = 50  # Images of each digit and domain.
    ddpm_per_class: int = 10  # The same for ddpm, which is slow.
    seed: int = 0  # Of the noise.
    batch_size: int = 250  # Images at a time.
    device: runs.Device = "auto"  # Where to compute.
    precision: runs.Precision = "auto"  # bf16 autocast where the hardware is fast at it, or fp32.


class Row(NamedTuple):
    """What a row of the table is about; `steps` None is the sampler's default."""

    sampler: Sampler
    steps: int | None
    guidance: float


def wanted_rows(args: Table) -> list[Row]:
    """The rows asked for. UserError for a sampler that does not exist."""
    default, rows = Generate(checkpoint=args.checkpoint, output_dir=args.output_dir), []
    for name in args.samplers:
        found = re.fullmatch(rf"({'|'.join(map(re.escape, get_args(Sampler)))})(?:-(\d+))?", name)
        if not found:
            raise UserError(f"--samplers {name}: SAMPLER or SAMPLER-STEPS with one of {', '.join(get_args(Sampler))}")
        rows.append(Row(found[1], int(found[2]) if found[2] else None, args.guidance))
    return rows + [Row(default.sampler, default.steps, guidance) for guidance in args.guidances]


def open_model(args: Table, row: Row) -> Model:
    """The model with the sampler of a row; everything else as p2_ddpm_infer.py has it."""
    names = ("checkpoint", "output_dir", "interval", "spacing", "seed", "batch_size", "device")
    same = {name: getattr(args, name) for name in names}
    options = {"sampler": row.sampler, "steps": row.steps, "guidance": row.guidance, "precision": args.precision}
    return Model(Generate(**same, **options))


def generate(model: Model, domain: str, per_class: int) -> tuple[Images, float, float]:
    """The images that p2_ddpm_infer.py writes, the net's passes an image, as counted, and seconds an image."""
    batches = in_batches(per_class, model.args.batch_size)
    deque(islice(model.states(domain, *batches[0], model.args.guidance), 2), maxlen=0)  # the noise and a step: warm
    passes = 0

    def count(net: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal passes
        passes += len(inputs[0])

    hook = model.net.register_forward_pre_hook(count)
    start = time.perf_counter()
    parts = [deque(model.states(domain, *batch, model.args.guidance), maxlen=1)[0][1] for batch in batches]
    seconds = time.perf_counter() - start
    hook.remove()
    labels = torch.tensor([digit for digits, _ in batches for digit in digits])
    names = [file_name(digit, number) for batch in batches for digit, number in zip(*batch, strict=True)]
    return Images(torch.cat(parts), labels, names), passes / len(labels), seconds / len(labels)


def measure(args: Table, row: Row, real: dict[str, Images]) -> dict[str, Any]:
    """A row: its images of every domain, generated and judged."""
    model = open_model(args, row)
    per_class = args.ddpm_per_class if row.sampler == "ddpm" else args.per_class
    made = {domain: generate(model, domain, per_class) for domain in args.domains}
    # Only now: Accelerate's precision is one for the whole program, and the judge reads in fp32, as in score.py.
    accelerator = runs.make_accelerator(args.device, "fp32")
    judged = {}
    for domain, classifier in zip(args.domains, args.classifiers, strict=True):
        net = runs.load_net(classifier, judging.NETS, "--classifiers")[0].to(accelerator.device)
        judged[domain] = judging.judge(net, made[domain][0], real[domain], accelerator, args.seed)
    return {
        "sampler": row.sampler,
        "steps": len(model.steps),
        "guidance": row.guidance,
        "per_class": per_class,
        "evaluations": made[args.domains[0]][1],
        "seconds": sum(seconds for _, _, seconds in made.values()) / len(made),
        "domains": judged,
    }


def identity(args: Table) -> dict[str, Any]:
    """What all rows of a table must share, in json's types: the arguments, and what the files hold."""
    digests = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in (args.checkpoint, *args.classifiers)]
    names = ("per_class", "ddpm_per_class", "spacing", "seed", "batch_size", "device", "precision")
    shared = {name: getattr(args, name) for name in names}
    shared |= {"domains": list(args.domains), "interval": list(args.interval)}
    return shared | {"data_dir": str(args.data_dir.resolve()), "checkpoint": digests[0], "classifiers": digests[1:]}


def read_rows(file: Path, expected: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier sitting. UserError if they were measured otherwise."""
    if not file.exists():
        return []
    try:
        content = json.loads(file.read_text())
        before, rows = content["arguments"], content["rows"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{file}: damaged or something else; remove it, or take another --output-dir") from None
    changed = [
        f"{name} was {before.get(name)}, is {value}" for name, value in expected.items() if before.get(name) != value
    ]
    if changed:
        raise UserError(f"--output-dir {file.parent}: holds a table of something else ({', '.join(changed)})")
    return rows


def write(file: Path, arguments: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """table.json, and the table itself as csv, markdown and a picture."""
    environment = runs.environment(runs.make_accelerator(arguments["device"], arguments["precision"]))
    content = {"arguments": arguments, **environment, "rows": rows}
    runs.atomic_write(file, json.dumps(content, indent=1) + "\n")
    domains = arguments["domains"]
    within = "" if arguments["interval"] == [0.0, 1.0] else " where t / T is in {}-{}".format(*arguments["interval"])
    table = [["sampler", f"steps ({arguments['spacing']})", f"guidance w{within}", "images a digit", "passes an image"]]
    table[0] += [f"{domain} {what}, %" for domain in domains for what in ("accuracy", "diversity")]
    table[0].append("seconds an image")
    order = list(get_args(Sampler))
    for row in sorted(rows, key=lambda row: (order.index(row["sampler"]), -row["steps"], row["guidance"])):
        cells = [row["sampler"], str(row["steps"]), f"{row['guidance']:g}", str(row["per_class"])]
        cells.append(f"{row['evaluations']:g}")
        for domain in domains:
            judged = row["domains"][domain]
            share = judged["diversity_percent_of_real"]
            cells += [f"{judged['accuracy']:.2f}", "none" if share is None else f"{share:.1f}"]
        table.append([*cells, f"{row['seconds']:.4g}"])
    last = ["real images", "", "", "", ""]
    for domain in domains:
        last += [f"{rows[0]['domains'][domain]['real_accuracy']:.2f}", "100.0"]
    save_table([*table, [*last, ""]], file.with_suffix(".png"), "Samplers and guidance")


def main(args: Table) -> list[dict[str, Any]]:
    """Check everything, then measure what is missing; returns the rows."""
    if not args.domains or len(args.classifiers) != len(args.domains):
        told = f"{len(args.classifiers)} for {len(args.domains)} domains"
        raise UserError(f"--classifiers: one for each of --domains, in their order, is needed ({told})")
    if min(args.per_class, args.ddpm_per_class, args.batch_size) < 1:
        raise UserError("--per-class, --ddpm-per-class and --batch-size: at least 1")
    asked, known = {}, []
    for row in wanted_rows(args):
        model = open_model(args, row)
        asked[row.sampler, len(model.steps), row.guidance] = row  # the default is named twice
        known = model.domains
    if not asked:
        raise UserError("--samplers and --guidances: at least one row is needed")
    unknown = [domain for domain in args.domains if domain not in known]
    if unknown:
        raise UserError(f"--domains {unknown[0]}: {args.checkpoint} knows {' '.join(known)}")
    for classifier in args.classifiers:
        runs.load_net(classifier, judging.NETS, "--classifiers")
    file, arguments = runs.make_output_dir(args.output_dir) / "table.json", identity(args)
    rows = read_rows(file, arguments)
    cache = args.output_dir.parent / "cache"
    real = {domain: load_digits(args.data_dir, domain, "val", cache) for domain in args.domains}
    for key, row in asked.items():
        if key in [(done["sampler"], done["steps"], done["guidance"]) for done in rows]:
            continue
        rows.append(measure(args, row, real))
        write(file, arguments, rows)
        judged = [f"{d} {j['accuracy']:.2f} %" for d, j in rows[-1]["domains"].items()]
        print(f"{key[0]}, {key[1]} steps, w = {key[2]:g}: {', '.join(judged)}, {rows[-1]['seconds']:.4g} s an image")
    print(file.with_suffix(".md").read_text() + str(file.with_suffix(".png")))
    return rows


if __name__ == "__main__":
    runs.command_line(Table, main)
