"""Make, fetch or check hw2_data/, the folder all other scripts read. Its layout is that of the course's 2022 hand-out:

    digits/{mnistm,svhn,usps}/{data/NNNNN.png, train.csv, val.csv}     28x28, usps grey, the others RGB
    face/{train/NNNNN.png, val/NNNNN.png, list_attr_celeba.txt}        64x64 RGB
    face/noise/{00.pt, ..., 09.pt}                                     what DDIM starts from; here of 64x64 images
    clip_zeroshot/{train/, val/}{CLASS}_{IMAGE}.png, id2label.json     the course hands out val/ alone

    python prepare_data.py synthetic                       # drawn here, no network, under a minute
    python prepare_data.py download --year 2022            # the course's own archive
    python prepare_data.py download --public --textures BSDS500/data/images/train
    python prepare_data.py check hw2_data
    python prepare_data.py noises --output-dir noises      # for DDIM, where hw2_data has none

MNIST-M and SynthDigits: Ganin et al. 2016, https://arxiv.org/abs/1505.07818. CelebA: Liu et al. 2015,
https://arxiv.org/abs/1411.7766.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm
from tyro.conf import Positional

from common.data import list_images
from common.run import UserError, command_line, make_output_dir
from scoring.faces import count_faces
from synthesis import archive, digits, faces, inspection, layout, looks, objects, public

Part = Literal["digits/mnistm", "digits/svhn", "digits/usps", "face"]
DRAWING_VERSION = 2  # raise it when what is drawn changes
CHUNK = 50  # images per task of a worker


@dataclass
class Synthetic:
    """Draw the whole layout: handwriting on photographs, house numbers from fonts, faces, objects. No network."""

    data_dir: Path = Path("hw2_data")
    """Where to write; a part that is there already with the same settings is kept."""
    seed: int = 0
    """Image k of a split depends on this and on k only."""
    mnistm: tuple[int, int] = (6000, 1500)
    """Images for train and val."""
    svhn: tuple[int, int] = (6000, 1500)
    """Images for train and val."""
    usps: tuple[int, int] = (3000, 750)
    """Images for train and val."""
    face: tuple[int, int] = (4000, 1000)
    """Images for train and val."""
    clip_zeroshot: tuple[int, int] = (1800, 600)
    """Images for train and val, of twelve classes in turn."""
    num_workers: int = os.cpu_count() or 1
    """Processes that draw."""


@dataclass
class Download:
    """Fetch the course's archive of a year, or build the 2022 layout from public data sets."""

    year: Literal[2022, 2023, 2024] | None = None
    """Whose archive to fetch from the course's Google Drive."""
    public: bool = False
    """Build from torchvision's MNIST, SVHN, USPS and CelebA instead."""
    data_dir: Path = Path("hw2_data")
    """Where to write."""
    archive: Path | None = None
    """A zip fetched by hand, with --year: nothing is downloaded."""
    raw_dir: Path = Path("raw_data")
    """Where torchvision keeps, or finds, the public data sets."""
    textures: Path | None = None
    """A folder of photographs for MNIST-M: BSDS500's training images."""
    parts: tuple[Part, ...] = ("digits/mnistm", "digits/svhn", "digits/usps", "face")
    """What to build with --public."""
    seed: int = 0
    """Of the splits and patches of --public."""


@dataclass
class Check:
    """Print what a data folder holds and what is wrong with it: exit status 0 if fine, 1 if not."""

    data_dir: Positional[Path] = Path("hw2_data")
    """The folder to check."""


@dataclass
class Noises:
    """Write standard normal noises 00.pt, 01.pt, ... of 1x3xSIZExSIZE, what p2_ddim.py starts from."""

    output_dir: Path
    """Where to write; noises that are there already must be these very ones."""
    count: int = 10
    """How many."""
    size: int = 64
    """Height and width: those of the model's images."""
    seed: int = 0
    """Noise k depends on this, on k and on the size only."""


# ------------------------------------------------------------------------------------------------------------ synthetic


def draw_chunk(task: tuple[str, int, str, range, int, Path]) -> list[Any]:
    """Draw and save some images of a split; returns their labels, or for faces their attributes."""
    part, seed, split, rows, first, folder = task
    known = []
    for k in rows:
        name = f"{first + k:05d}.png"
        if part == "face":
            image, what = faces.draw_face(np.random.default_rng([seed, digits.SPLITS.index(split), k]))
        elif part == "clip_zeroshot":
            number, what = divmod(k, len(objects.NAMES))
            image, name = objects.draw_object(seed, split, what, number), f"{what}_{number}.png"
        else:
            image, what = digits.draw_digit(seed, part.removeprefix("digits/"), split, k)
        layout.save_image(image, folder / name)
        known.append(what)
    return known


@contextmanager
def worker_map(workers: int) -> Iterator[Callable]:
    """An ordered lazy map over processes. Forked where that is safe: a fresh process would import torch for nothing."""
    if workers <= 1:
        yield map
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with context.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:  # the parent stops them
        yield pool.imap


def draw_part(folder: Path, part: str, seed: int, counts: tuple[int, int], run_map: Callable) -> None:
    """Fill `folder` with a drawn part; the validation images are numbered after the training images."""
    attribute_rows = []
    for split, first, count in zip(digits.SPLITS, (0, counts[0]), counts, strict=True):
        images = folder / ("data" if part.startswith("digits/") else split)
        images.mkdir(exist_ok=True)
        chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
        results = run_map(draw_chunk, [(part, seed, split, rows, first, images) for rows in chunks])
        bar = tqdm(results, f"{part} {split}", len(chunks), leave=False, disable=None, unit_scale=CHUNK, unit="image")
        known = [what for chunk in bar for what in chunk]
        if part == "face":
            attribute_rows += [(f"{first + k:05d}.png", values) for k, values in enumerate(known)]
        elif part != "clip_zeroshot":
            layout.write_labels(folder, split, first, known)
    if part == "face":
        layout.write_attributes(folder, looks.ATTRIBUTES, attribute_rows)
        layout.write_noises(folder / "noise", seed)
    elif part == "clip_zeroshot":
        layout.write_names(folder, objects.NAMES)


def synthetic(args: Synthetic) -> None:
    """Draw the parts that are not there yet; UserError if other data is in their place."""
    counts = {f"digits/{domain}": getattr(args, domain) for domain in digits.DOMAINS} | {"face": args.face}
    counts["clip_zeroshot"] = args.clip_zeroshot
    for part, (train, val) in counts.items():
        if min(train, val) < 1:
            raise UserError(
                f"--{part.removeprefix('digits/').replace('_', '-')} {train} {val}: each split needs an image"
            )
    make_output_dir(args.data_dir, "--data-dir")
    settings = {
        part: {"made_by": "synthetic", "version": DRAWING_VERSION, "seed": args.seed, "train": train, "val": val}
        for part, (train, val) in counts.items()
    }
    left = [part for part in counts if not layout.is_finished(args.data_dir, part, settings[part])]
    if not left:
        print(f"{args.data_dir}: already finished, nothing to do")
        return
    total = sum(sum(counts[part]) for part in left)
    print(f"drawing {total:,} images with {args.num_workers} processes")
    start = time.monotonic()
    with worker_map(args.num_workers) as run_map:
        for part in left:

            def fill(folder: Path, part: str = part) -> None:
                draw_part(folder, part, args.seed, counts[part], run_map)

            layout.write_part(args.data_dir, part, settings[part], fill)
            print(f"{part}: {counts[part][0]:,} train, {counts[part][1]:,} val")
    if "face" in left:
        sample = list_images(args.data_dir / "face" / "val")[:200]
        rate = np.mean([count_faces(path) == 1 for path in sample])
        print(f"face: exactly one face found in {rate:.1%} of {len(sample)} (dlib's HOG detector)")
    print(f"{args.data_dir}: finished in {time.monotonic() - start:.0f} s")


# ------------------------------------------------------------------------------------------------------------- download


def fill_public(folder: Path, part: Part, args: Download) -> None:
    """One part from torchvision's data sets in --raw-dir."""
    domain = part.removeprefix("digits/")
    if part == "face":
        files, names, values = public.load_celeba(args.raw_dir, args.seed)
        layout.fill_faces(folder, files, names, values, public.COURSE_FACES)
        return
    images, labels = public.load_digits(domain, args.raw_dir)
    splits = []
    for rows in public.split_rows(len(labels), args.seed):
        if domain == "mnistm":
            paths = list_images(args.textures)
            photos = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
            if small := [path for path, photo in zip(paths, photos, strict=True) if min(photo.shape[:2]) < digits.SIZE]:
                raise UserError(f"{small[0]}: a texture has at least {digits.SIZE}x{digits.SIZE} pixels")
            made = public.make_mnistm(images, rows, photos, args.seed)
        else:
            made = public.resize_digits(images[rows])
        splits.append((made, labels[rows].tolist()))
    layout.fill_digits(folder, splits)


def download(args: Download) -> None:
    """Fetch and unpack an archive, or assemble the layout from public data; UserError says what to fetch by hand."""
    if (args.year is None) != args.public:
        raise UserError("download: give either --year 2022|2023|2024 or --public")
    if args.public and args.archive is not None:
        raise UserError("--archive: goes with --year, not with --public")
    if args.public and "digits/mnistm" in args.parts:
        if args.textures is None:
            raise UserError(f"--textures: needed for MNIST-M, a folder of photographs (BSDS500, {public.BSDS_URL})")
        list_images(args.textures)
    make_output_dir(args.data_dir, "--data-dir")
    if args.public:
        for part in args.parts:
            settings = {"made_by": "download --public", "seed": args.seed}
            if layout.is_finished(args.data_dir, part, settings):
                print(f"{part}: already finished, nothing to do")
            else:
                layout.write_part(
                    args.data_dir, part, settings, lambda folder, part=part: fill_public(folder, part, args)
                )
                print(f"{part}: done")
    elif args.archive is not None:
        archive.unpack(args.archive, args.data_dir)
    else:
        if made := [*args.data_dir.glob("*/made.json"), *args.data_dir.glob("*/*/made.json")]:
            raise UserError(f"--data-dir {args.data_dir}: holds other data ({made[0].parent}); take a new folder")
        fetched = archive.fetch(args.year, args.data_dir)
        try:
            archive.unpack(fetched, args.data_dir)
        except UserError as error:
            raise UserError(f"{error}; what was fetched is kept: --archive {fetched}") from None
        fetched.unlink()
    print(f"{args.data_dir}: finished; python prepare_data.py check {args.data_dir} tells what is there")


# --------------------------------------------------------------------------------------------------------------- noises


def noises(args: Noises) -> None:
    """Write the noises aside, then move them to their place; UserError if others are there, which would be read too."""
    if args.count < 1 or args.size < 1:
        raise UserError(f"--count {args.count}, --size {args.size}: at least 1")
    folder = make_output_dir(args.output_dir)
    with tempfile.TemporaryDirectory(prefix=".noises-", dir=folder) as aside:
        layout.write_noises(Path(aside), args.seed, args.count, args.size)
        made = {path.name: path for path in Path(aside).iterdir()}
        for path in sorted(folder.glob("*.pt")):
            if path.name not in made or path.read_bytes() != made[path.name].read_bytes():
                raise UserError(f"--output-dir {folder}: {path.name} is another noise, remove it first")
        for name, path in made.items():
            path.replace(folder / name)
    print(f"{args.count:,} noises of 1x3x{args.size}x{args.size}: {folder}")


def main(args: Synthetic | Download | Check | Noises) -> None:
    """Run one sub-command."""
    if isinstance(args, Synthetic):
        synthetic(args)
    elif isinstance(args, Download):
        download(args)
    elif isinstance(args, Noises):
        noises(args)
    else:
        report = inspection.inspect_folder(args.data_dir)
        inspection.print_report(report)
        if report.problems:
            sys.exit(1)


if __name__ == "__main__":
    command_line(Synthetic | Download | Check | Noises, main)
