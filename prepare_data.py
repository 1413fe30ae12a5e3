"""Make, fetch or check hw2_data/, the folder that all other scripts read.

Its layout is that of the course's 2022 hand-out:

    digits/{mnistm,svhn,usps}/{data/NNNNN.png, train.csv, val.csv}   28x28, usps grey, others RGB
    face/{train/NNNNN.png, val/NNNNN.png, list_attr_celeba.txt}      64x64 RGB
    face/noise/{00.pt, ..., 09.pt}                                   what DDIM starts from, 64x64
    clip_zeroshot/{train/, val/}{CLASS}_{IMAGE}.png, id2label.json   the course has val/ alone

Two parts are not the course's: digits/mnist, as the other digits, and objects for adaptation
between two domains, in the layout of Office-Home:

    objects/{clipart,shaded}/CLASS/NNNNN.png                         64x64 RGB, drawn

Two more are for text-to-image models and textual inversion; the second is laid out as in 2024:

    captioned/{train,val}/{NNNNN.png, metadata.jsonl}                64x64 RGB, drawn, with captions
    textual_inversion/{{0,1}/N.png, input.json}                      two concepts, drawn

    python prepare_data.py synthetic                       # drawn here, no network, about a minute
    python prepare_data.py download --year 2022            # the course's own archive
    python prepare_data.py download --public --textures BSDS500/data/images/train
    python prepare_data.py import digits MNIST             # its four idx files; also .mat, .bz2
    python prepare_data.py import faces PHOTOS             # finds faces and cuts them out
    python prepare_data.py check hw2_data
    python prepare_data.py noises --output-dir noises      # for DDIM, if hw2_data has none

MNIST-M and SynthDigits: Ganin et al., 2016, https://arxiv.org/abs/1505.07818
CelebA: Liu et al., 2015, https://arxiv.org/abs/1411.7766
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from common.cli import UserError, at_least, each_once, in_range, is_domain, is_seed, run_cli
from common.data import list_images
from common.files import make_output_dir
from common.noises import find_noises
from common.progress import show_progress
from metrics.faces import count_faces
from preparation import archive, inspection, layout, own_digits, own_faces, public
from preparation.synthetic import object_domains
from preparation.synthetic.parts import (
    draw_captioned,
    draw_concepts,
    draw_object_domains,
    draw_part,
    parallel_map,
)
from preparation.synthetic.scenes import USUAL, Mix

Part = Literal["digits/mnistm", "digits/svhn", "digits/usps", "face"]
DRAWING_VERSION = 2  # raise it when what is drawn changes
# The same for parts that are newer, so that the others need not be drawn again.
NEWER_VERSIONS = {"objects": 1, "captioned": 1, "textual_inversion": 1}
MOST_IMAGES = 1_000_000  # of a split
FEWEST_OBJECTS = 24  # two of each class: one for training and one for validation
MOST_PROCESSES = 1_024


@dataclass
class Synthetic:
    """Draw the whole layout, offline.

    Handwriting on photographs, house numbers from fonts, faces and objects.
    """

    data_dir: Path = Path("hw2_data")
    """Folder to write; a part that is there already with the same settings is kept."""
    seed: int = 0
    """Seed of the drawings; image k of a split depends on the seed and on k only."""
    mnistm: tuple[int, int] = (6000, 1500)
    """Number of MNIST-M-like digits for train and val."""
    svhn: tuple[int, int] = (6000, 1500)
    """Number of house numbers for train and val."""
    usps: tuple[int, int] = (3000, 750)
    """Number of USPS-like digits for train and val."""
    face: tuple[int, int] = (4000, 1000)
    """Number of faces for train and val."""
    clip_zeroshot: tuple[int, int] = (1800, 600)
    """Number of objects for train and val; the twelve classes take turns."""
    objects: int = 600
    """Number of clip-art objects, and of shaded ones; the twelve classes take turns."""
    captioned: tuple[int, int] = (1200, 200)
    """Number of captioned scenes for train and val."""
    creatures: float = USUAL.creatures
    """Share of creatures among the captioned scenes."""
    trait_weight: int = USUAL.trait_weight
    """Weight of each trait of a creature (body, ears, coat, eyes) when its caption is chosen; its
    colour and the plain word "creature" have the weight 2."""
    num_workers: int = os.cpu_count() or 1
    """Processes that draw."""

    def __post_init__(self) -> None:
        is_seed("--seed", self.seed)
        check_counts("--mnistm", self.mnistm)
        check_counts("--svhn", self.svhn)
        check_counts("--usps", self.usps)
        check_counts("--face", self.face)
        check_counts("--clip-zeroshot", self.clip_zeroshot)
        check_counts("--captioned", self.captioned)
        in_range("--creatures", self.creatures, 0, 1)
        in_range("--trait-weight", self.trait_weight, 0, 1_000)
        if not FEWEST_OBJECTS <= self.objects <= MOST_IMAGES:
            raise UserError(
                f"--objects {self.objects}: each domain needs between {FEWEST_OBJECTS} and "
                f"{MOST_IMAGES:,} images"
            )
        in_range("--num-workers", self.num_workers, 1, MOST_PROCESSES)


def check_counts(flag: str, counts: tuple[int, int]) -> None:
    """Raise UserError unless both splits get an image."""
    train, val = counts
    if min(counts) < 1 or max(counts) > MOST_IMAGES:
        raise UserError(
            f"{flag} {train} {val}: each split needs between 1 and {MOST_IMAGES:,} images"
        )


@dataclass
class Download:
    """Fetch the course's archive of a year, or build the 2022 layout from public data sets."""

    year: Literal[2022, 2023, 2024] | None = None
    """Year of the archive to fetch from the course's Google Drive."""
    public: bool = False
    """Build from torchvision's MNIST, SVHN, USPS and CelebA instead."""
    data_dir: Path = Path("hw2_data")
    """Folder to write."""
    archive: Path | None = None
    """Zip file that was fetched by hand, with --year; nothing is downloaded then."""
    raw_dir: Path = Path("raw_data")
    """Folder where torchvision keeps, or finds, the public data sets."""
    textures: Path | None = None
    """Folder of photographs for MNIST-M: the training images of BSDS500."""
    parts: tuple[Part, ...] = ("digits/mnistm", "digits/svhn", "digits/usps", "face")
    """Parts to build with --public."""
    seed: int = 0
    """Seed of the splits and of MNIST-M's patches, with --public."""

    def __post_init__(self) -> None:
        if self.year is None and not self.public:
            raise UserError("download: give either --year 2022|2023|2024 or --public")
        if self.year is not None and self.public:
            raise UserError("download: give either --year 2022|2023|2024 or --public, not both")
        if self.public and self.archive is not None:
            raise UserError("--archive: goes with --year, not with --public")
        if self.public and "digits/mnistm" in self.parts and self.textures is None:
            raise UserError(
                "--textures: needed for MNIST-M; give a folder of photographs "
                f"(BSDS500, {public.BSDS_URL})"
            )
        each_once("--parts", self.parts)
        is_seed("--seed", self.seed)


@dataclass
class Import:
    """Write digits or faces of one's own into the layout.

    `digits` reads idx files, SVHN's .mat, USPS's .bz2 or .h5, or a folder for each digit. `faces`
    reads any photographs, finds the faces and cuts them out like the course's.
    """

    kind: Positional[Literal["digits", "faces"]]
    """What to import."""
    source: Annotated[Positional[Path], arg(metavar="SOURCE")]
    """File or folder with the digits, or folder with photographs and perhaps folders in it."""
    data_dir: Path = Path("hw2_data")
    """Folder to write."""
    domain: str | None = None
    """Name of the digits, digits/DOMAIN; mnist, svhn or usps if the files are theirs."""
    val: float = 0.2
    """Share of the images for val, where the source has one split."""
    smallest: int | None = None
    """Width in pixels of the smallest face that is taken; 40 if not given."""
    several: Literal["largest", "drop"] | None = None
    """Which face of a photograph with several is taken (largest), or none of them (drop)."""
    seed: int = 0
    """Seed of the choice for val."""
    num_workers: int | None = None
    """Threads that look for faces; as many as cores if not given."""

    def __post_init__(self) -> None:
        is_domain("--domain", self.domain)
        if self.kind == "faces" and self.domain is not None:
            raise UserError(f"--domain {self.domain}: is for digits, not faces")
        if self.kind == "digits":
            for flag in ("smallest", "several", "num_workers"):
                if getattr(self, flag) is not None:
                    raise UserError(f"--{flag.replace('_', '-')}: is for faces, not digits")
        if not 0 < self.val < 1:
            raise UserError(f"--val {self.val:g}: must be above 0 and below 1")
        in_range("--smallest", self.smallest, 1, 100_000)
        is_seed("--seed", self.seed)
        in_range("--num-workers", self.num_workers, 1, MOST_PROCESSES)


@dataclass
class Check:
    """Print what a data folder holds and what is wrong with it.

    The exit status is 0 if all is fine and 1 if not.
    """

    data_dir: Annotated[Positional[Path], arg(metavar="DATA_DIR")] = Path("hw2_data")
    """Folder to check."""


@dataclass
class Noises:
    """Write standard normal noises 00.pt, 01.pt, ..., which p2_ddim.py starts from.

    Each is 1x3xSIZExSIZE.
    """

    output_dir: Path
    """Folder to write; noises that are there already must be exactly these."""
    count: int = 10
    """Number of noises."""
    size: int = 64
    """Height and width: those of the network's images."""
    seed: int = 0
    """Seed of the noises; noise k depends on the seed, on k and on the size only."""

    def __post_init__(self) -> None:
        at_least("--count", self.count, 1)
        in_range("--size", self.size, 1, 4_096)
        is_seed("--seed", self.seed)


def synthetic(args: Synthetic) -> None:
    """Draw the parts that are not there yet. Raises UserError if other data is in their place."""
    counts = {  # of the images in the halves of each part
        "digits/mnistm": in_splits(args.mnistm),
        "digits/svhn": in_splits(args.svhn),
        "digits/usps": in_splits(args.usps),
        "face": in_splits(args.face),
        "objects": dict.fromkeys(object_domains.DOMAINS, args.objects),
        "captioned": in_splits(args.captioned),
        "textual_inversion": {"0": layout.CONCEPT_IMAGES, "1": layout.CONCEPT_IMAGES},
        "clip_zeroshot": in_splits(args.clip_zeroshot),  # last: run_all.py takes it for the end
    }
    mix = Mix(args.creatures, args.trait_weight)
    make_output_dir(args.data_dir, "--data-dir")
    missing = {}  # the settings of each part that is not there yet
    for part, halves in counts.items():
        settings: dict[str, Any] = {
            "made_by": "synthetic",
            "version": NEWER_VERSIONS.get(part, DRAWING_VERSION),
            "seed": args.seed,
            **halves,
        }
        if part == "captioned":
            settings |= changed_fields(mix)
        if not layout.is_finished(args.data_dir, part, settings):
            missing[part] = settings
    if not missing:
        print(f"{args.data_dir}: already finished, nothing to do")
        return

    total = sum(sum(counts[part].values()) for part in missing)
    print(f"drawing {total:,} images with {args.num_workers} processes")
    start = time.monotonic()
    with parallel_map(args.num_workers) as run_map:
        for part, settings in missing.items():
            with layout.new_part(args.data_dir, part, settings) as folder:
                if part == "objects":
                    draw_object_domains(folder, args.seed, args.objects, run_map)
                elif part == "captioned":
                    draw_captioned(folder, args.seed, args.captioned, mix, run_map)
                elif part == "textual_inversion":
                    draw_concepts(folder, args.seed)
                else:
                    train, val = counts[part].values()
                    draw_part(folder, part, args.seed, (train, val), run_map)
            words = [f"{count:,} {half}" for half, count in counts[part].items()]
            print(f"{part}: {', '.join(words)}")
    if "face" in missing:
        print_face_rate(args.data_dir / "face" / "val")
    print(f"{args.data_dir}: finished in {time.monotonic() - start:.0f} s")


def changed_fields(mix: Mix) -> dict[str, Any]:
    """The fields of the mix that were asked for, by name.

    Defaults are left out, so that what was drawn before these options existed counts as finished.
    """
    usual = USUAL._asdict()
    return {name: value for name, value in mix._asdict().items() if value != usual[name]}


def in_splits(counts: tuple[int, int]) -> dict[str, int]:
    """The numbers of images for train and val, by name."""
    return dict(zip(("train", "val"), counts, strict=True))


def print_face_rate(folder: Path) -> None:
    """Print in how many of the first 200 images exactly one face is found."""
    paths = list_images(folder)[:200]
    found = [count_faces(path) for path in show_progress(paths, len(paths), "faces found")]
    rate = found.count(1) / len(found)
    print(f"face: exactly one face found in {rate:.1%} of {len(paths)} (dlib's HOG detector)")


def download(args: Download) -> None:
    """Fetch and unpack an archive, or assemble the layout from public data.

    Raises UserError that says what to fetch by hand if a download fails.
    """
    if args.public and args.textures is not None:
        list_images(args.textures)  # raises UserError for a folder without images
    make_output_dir(args.data_dir, "--data-dir")
    if args.public:
        build_from_public(args)
    elif args.archive is not None and args.year is not None:
        archive.unpack_and_record(args.year, args.archive, args.data_dir)
    elif args.year is not None:
        fetch_and_unpack(args.year, args.data_dir)
    print(f"{args.data_dir}: finished; python prepare_data.py check {args.data_dir} lists it")


def build_from_public(args: Download) -> None:
    """Build the parts that are not there yet."""
    settings = {"made_by": "download --public", "seed": args.seed}
    for part in args.parts:
        if layout.is_finished(args.data_dir, part, settings):
            print(f"{part}: already finished, nothing to do")
            continue
        with layout.new_part(args.data_dir, part, settings) as folder:
            public.fill_part(folder, part, args.raw_dir, args.textures, args.seed)
        print(f"{part}: finished")


def fetch_and_unpack(year: int, data_dir: Path) -> None:
    """Download an archive and unpack it; if that fails, the downloaded file is kept."""
    made = [*data_dir.glob("*/made.json"), *data_dir.glob("*/*/made.json")]
    if made:  # the long download would be in vain
        raise UserError(
            f"--data-dir {data_dir}: holds other data ({made[0].parent}); choose a new folder"
        )
    archive.read_record(data_dir)  # the same for a damaged record
    fetched = archive.fetch(year, data_dir)
    try:
        archive.unpack_and_record(year, fetched, data_dir)
    except UserError as error:
        raise UserError(f"{error}; the download is kept: --archive {fetched}") from None
    fetched.unlink()


def import_digits(args: Import) -> None:
    """Write digits/DOMAIN if it is not there yet.

    Raises UserError if other data is in its place, and for files that cannot be read.
    """
    source = own_digits.read_digits(args.source, args.domain)
    domain = args.domain or source.domain
    if domain is None:
        raise UserError(f"import digits {args.source}: --domain must give them a name")
    train, val = source.train, source.val
    if val is None:
        train, val = own_digits.split(train, args.val, args.seed)
    digest = hashlib.sha256()
    for values in (*train, *val):
        digest.update(values.tobytes())
    settings = {"made_by": "import digits", "sha256": digest.hexdigest()}
    part = f"digits/{domain}"
    make_output_dir(args.data_dir, "--data-dir")
    if layout.is_finished(args.data_dir, part, settings):
        print(f"{part}: already finished, nothing to do")
        return
    with layout.new_part(args.data_dir, part, settings) as folder:
        public.fill_digits(
            folder,
            [
                (own_digits.at_size(train.images), train.labels.tolist()),
                (own_digits.at_size(val.images), val.labels.tolist()),
            ],
        )
    print(f"{part}: {len(train.labels):,} train, {len(val.labels):,} val")


def import_faces(args: Import) -> None:
    """Write face/train and face/val, and print why photographs were left out.

    face/left_out.csv names each of them. Raises UserError if other faces are there, or if no face
    is found.
    """
    paths = list_images(args.source, recursive=True)
    options = own_faces.Options(args.val, args.smallest or 40, args.several or "largest", args.seed)
    settings: dict[str, Any] = {
        "made_by": "import faces",
        "photographs": own_faces.digest_of(paths),
    }
    settings |= options._asdict()
    workers = args.num_workers or os.cpu_count() or 1
    find_eyes = own_faces.eye_finder()
    settings["upright"] = find_eyes is not None
    make_output_dir(args.data_dir, "--data-dir")
    if layout.is_finished(args.data_dir, "face", settings):
        print("face: already finished, nothing to do")
        return
    with layout.new_part(args.data_dir, "face", settings) as folder:
        counts = own_faces.fill_faces(folder, paths, options, find_eyes, workers)
    print(f"face: {counts['train']:,} train, {counts['val']:,} val of {len(paths):,} photographs")
    for reason, count in counts.items():
        if reason not in ("train", "val"):
            print(f"  left out, {reason}: {count:,}")


def noises(args: Noises) -> None:
    """Write the noises aside, then move them to their place.

    Raises UserError if other noises are there, because p2_ddim.py would read them too.
    """
    folder = make_output_dir(args.output_dir)
    with tempfile.TemporaryDirectory(prefix=".noises-", dir=folder) as aside:
        layout.write_noises(Path(aside), args.seed, args.count, args.size)
        made = {path.name: path for path in Path(aside).iterdir()}
        for path in find_noises(folder):
            if path.name not in made or path.read_bytes() != made[path.name].read_bytes():
                raise UserError(
                    f"--output-dir {folder}: {path.name} is another noise; remove it first"
                )
        for name, path in made.items():
            path.replace(folder / name)
    print(f"{args.count:,} noises of 1x3x{args.size}x{args.size}: {folder}")


def check(args: Check) -> None:
    """Print the report; exit with status 1 if something is wrong."""
    report = inspection.inspect_folder(args.data_dir)
    inspection.print_report(report)
    if report.problems:
        sys.exit(1)


def main(args: Synthetic | Download | Import | Check | Noises) -> None:
    """Run one sub-command."""
    match args:
        case Synthetic():
            synthetic(args)
        case Download():
            download(args)
        case Import() if args.kind == "digits":
            import_digits(args)
        case Import():
            import_faces(args)
        case Check():
            check(args)
        case Noises():
            noises(args)


if __name__ == "__main__":
    run_cli(Synthetic | Download | Import | Check | Noises, main)
