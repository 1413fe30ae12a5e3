"""The table of the DDIM paper in small: quality of faces by the number of steps and by η, beside their cost.

A cell: Fréchet distance of --count faces to the real validation images, the share of them with exactly one face by
dlib's detector, and seconds a face from noise files to PNG, start included. η = 1 at all of 1,000 --steps is DDPM. Face
k comes from noise k in every cell; steps end at T (trailing); pixels are those of [-1, 1]. Distances compare with such
of as many images only; the last row is that of real training images. The same command again does what is missing. Every
cell has a folder with its images and the result.json of both scores; table.csv, table.md and table.png lie beside them.

    python benchmarks/face_samplers.py --checkpoint runs/p2/faces/model.safetensors --output-dir runs/p2/face-samplers
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import p2_ddim
import prepare_data
import score
from common import run as runs
from common.figures import save_table
from models.ddim_unet import DdimUnet


@dataclass(kw_only=True)
class Table:
    """Make and judge the faces of every cell that is missing; write the table after each."""

    checkpoint: Path  # model.safetensors of p2_ddpm_train.py --domains faces --net ddim.
    output_dir: Path  # Where everything is written; the same command again continues.
    data_dir: Path = Path("hw2_data")  # Its face/val is compared with; its face/train gives the last row.
    steps: tuple[int, ...] = (10, 20, 50, 100)  # Of DDIM.
    etas: tuple[float, ...] = (0.0, 0.5, 1.0)  # 0 is deterministic, 1 as random as DDPM.
    count: int = 1_000  # Faces of a cell.
    features: Literal["inception", "random"] = "random"  # Of the distance; see score.py fid.
    weights: Path | None = None  # Of the inception features, where they cannot be downloaded.
    seed: int = 0  # Of the noise.
    batch_size: int = 50  # Images at a time.
    device: runs.Device = "auto"  # Where to compute.
    precision: runs.Precision = "auto"  # bf16 autocast where the hardware is fast at it, or fp32.


def measure(args: Table, noises: Path, steps: int, eta: float) -> dict[str, Any]:
    """One cell, made and judged unless that is done; what its result.json files and seconds.json hold."""
    folder = args.output_dir / f"ddim-{steps}-eta-{eta:g}"
    val = args.data_dir / "face" / "val"
    fid, faces, cost = (folder / name for name in ("fid/result.json", "faces/result.json", "seconds.json"))
    if not cost.exists():
        options = {name: getattr(args, name) for name in ("checkpoint", "seed", "batch_size", "device", "precision")}
        options |= {"steps": steps, "eta": eta, "save_range": "fixed", "spacing": "trailing"}
        started = time.monotonic()
        p2_ddim.main(p2_ddim.Generate(noise_dir=noises, output_dir=folder / "images", **options))
        runs.atomic_write(cost, json.dumps((time.monotonic() - started) / args.count) + "\n")
    if not fid.exists():
        options = {"features": args.features, "weights": args.weights, "device": args.device}
        train = args.data_dir / "face" / "train"
        score.main(score.Fid(folder / "images", val, floor=train, output_dir=fid.parent, **options))
    if not faces.exists():
        score.main(score.Faces(folder / "images", real=val, output_dir=faces.parent))
    cell = json.loads(fid.read_text()) | json.loads(faces.read_text())
    return cell | {"metric": json.loads(fid.read_text())["metric"], "seconds": json.loads(cost.read_text())}


def main(args: Table) -> list[list[str]]:
    """Fill the table; returns it."""
    if not args.steps or not args.etas or args.count < 2:
        raise runs.UserError("--steps and --etas: at least one of each; --count: at least 2")
    config = runs.load_net(args.checkpoint, {"ddim_unet": DdimUnet})[0].config["arguments"]
    # What the cells share must be what it was: another checkpoint or count needs a folder of its own.
    shared = {name: str(getattr(args, name)) for name in ("count", "features", "seed", "device", "precision")}
    shared |= {"data_dir": str(args.data_dir.resolve())}
    shared |= {"checkpoint": hashlib.sha256(args.checkpoint.read_bytes()).hexdigest()}
    about = runs.make_output_dir(args.output_dir) / "about.json"
    if about.exists() and json.loads(about.read_text()) != shared:
        raise runs.UserError(f"--output-dir {args.output_dir}: holds a table of something else, see about.json")
    runs.atomic_write(about, json.dumps(shared, indent=1) + "\n")
    noises = args.output_dir / "noises"
    prepare_data.main(prepare_data.Noises(noises, args.count, config["size"], args.seed))
    rows = [["steps", "η", "distance", "exactly one face, %", "seconds a face"]]
    for steps in args.steps:
        for eta in args.etas:
            cell = measure(args, noises, steps, eta)
            told = [f"{cell['distance']:.2f}", f"{cell['one_face_percent']:.1f}", f"{cell['seconds']:.3g}"]
            rows.append([str(steps), f"{eta:g}", *told])
            real = cell["real"]["one_face_percent"]
            last = ["real images", "", f"{cell['floor']:.2f}", f"{real:.1f}", ""]
            save_table([*rows, last], args.output_dir / "table.png", f"{args.count:,} faces, {cell['metric']}")
    print((args.output_dir / "table.md").read_text() + str(args.output_dir / "table.png"))
    return [*rows, last]


if __name__ == "__main__":
    runs.command_line(Table, main)
