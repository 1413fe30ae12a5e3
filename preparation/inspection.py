"""What a data folder holds and what is wrong with it, for the layouts of all years."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from common.attributes import read_attributes
from common.captions import read_metadata
from common.checkpoints import load_weights
from common.class_folders import find_domain
from common.cli import UserError
from common.data import DIGIT_SIZE, FORMATS, list_images, read_labels
from common.json_files import read_object
from common.names import is_hidden
from common.noises import find_noises, load_noise, problem_of_noise
from common.progress import show_progress
from inversion.concepts import read_concepts

CSV_NAMES = ("train.csv", "val.csv", "test.csv")
NOISE_SHAPES = ((1, 3, 256, 256), (1, 3, 64, 64))  # the course's, and that of our 64x64 network
MOST_NAMES = 5  # file names in a message
MOST_KINDS = 3  # sizes, or numbers of channels, in a row of the table


@dataclass
class Report:
    """What was found: rows of the table, problems that make the folder unusable, and notes."""

    rows: list[tuple[str, ...]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Look(NamedTuple):
    """Size and number of channels of one image."""

    width: int
    height: int
    channels: int


class Found(NamedTuple):
    """The images of a folder: their names, and their sizes and channels in words."""

    names: list[str]
    sizes: str
    channels: str


# Words


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    text = ", ".join(names[:MOST_NAMES])
    if len(names) > MOST_NAMES:
        text += f" and {len(names) - MOST_NAMES:,} more"
    return text


def kinds(values: Iterable[str]) -> str:
    """The most frequent values, and how many others there are; "-" if there are none.

    Photographs may be of hundreds of sizes.
    """
    by_frequency = [value for value, _ in Counter(values).most_common()]
    text = " ".join(by_frequency[:MOST_KINDS])
    if len(by_frequency) > MOST_KINDS:
        text += f" and {len(by_frequency) - MOST_KINDS:,} more"
    return text or "-"


def each(counts: Iterable[int]) -> str:
    """The smallest and the largest of the numbers of images of a class."""
    numbers = list(counts)
    return f"{min(numbers):,}-{max(numbers):,} each"


def channel_name(channels: int) -> str:
    """The number of channels in words, as RGB for 3."""
    names = {1: "grey", 3: "RGB", 4: "RGBA"}
    return names.get(channels, str(channels))


# Images


def look_at(path: Path) -> Look | None:
    """Size and channels of an image that decodes whole; None for a broken one."""
    if not path.is_file():  # a pipe would be waited for
        return None
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            return Look(image.width, image.height, len(image.getbands()))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def inspect_images(folder: Path, size: tuple[int, int] | None, report: Report) -> Found:
    """Decode every image of a folder.

    Problems are a missing or empty folder, broken images and, where `size` (width, height) is
    given, images of another size.
    """
    try:
        paths = list_images(folder)
    except UserError as error:
        report.problems.append(str(error))
        return Found([], "-", "-")
    return inspect_files(paths, folder, size, report)


def inspect_files(
    paths: list[Path], folder: Path, size: tuple[int, int] | None, report: Report
) -> Found:
    """Decode image files, which are named by their path from `folder`.

    Problems are broken images and, where `size` (width, height) is given, images of another size.
    """
    names = [path.relative_to(folder).as_posix() for path in paths]
    with ThreadPoolExecutor() as pool:
        looked = pool.map(look_at, paths, chunksize=256)
        looks = list(show_progress(looked, len(paths), f"{folder}, images"))
    broken = []
    odd = []
    whole = []
    for name, look in zip(names, looks, strict=True):
        if look is None:
            broken.append(name)
            continue
        whole.append(look)
        if size is not None and (look.width, look.height) != size:
            odd.append(name)
    if broken:
        report.problems.append(f"{folder}: {len(broken):,} broken images: {some(broken)}")
    if odd and size is not None:
        width, height = size
        report.problems.append(
            f"{folder}: {len(odd):,} images are not {width}x{height}: {some(odd)}"
        )
    sizes = kinds(f"{look.width}x{look.height}" for look in whole)
    channels = kinds(channel_name(look.channels) for look in whole)
    return Found(names, sizes, channels)


# Digits


def inspect_digits(folder: Path, report: Report) -> None:
    """One digit domain: data/ and its csv files.

    Without val.csv (2024) the scripts split train.csv 80/20.
    """
    height, width = DIGIT_SIZE
    found = inspect_images(folder / "data", (width, height), report)
    listed: set[str] = set()  # the images in the csv files so far
    for csv_name in CSV_NAMES:
        file = folder / csv_name
        if file.exists():
            inspect_csv(file, found, listed, report)
        elif csv_name == "train.csv":
            report.problems.append(f"{file}: missing")
        elif csv_name == "val.csv":
            report.notes.append(f"{folder}: no val.csv; train.csv is split 80/20")
    left = [name for name in found.names if name not in listed]
    if left and listed:
        report.notes.append(
            f"{folder / 'data'}: {len(left):,} images are listed in no csv: {some(left)}"
        )


def inspect_csv(file: Path, found: Found, listed: set[str], report: Report) -> None:
    """One csv of a digit domain; adds its images to `listed`."""
    # 2022's test.csv is only a sample of the format to hand in. No script reads it.
    is_sample = file.name == "test.csv"
    try:
        paths, labels = read_labels(file, file.parent / "data", needs_labels=False)
    except UserError as error:
        messages = report.notes if is_sample else report.problems
        messages.append(str(error))
        return
    classes = "no labels"
    if labels is not None:
        counts = torch.bincount(labels, minlength=10).tolist()
        classes = f"{labels.min()}-{labels.max()}, {each(counts)}"
    part = f"digits/{file.parent.name}"
    report.rows.append((part, file.stem, f"{len(paths):,}", found.sizes, found.channels, classes))

    times = Counter(path.name for path in paths)
    twice = [name for name in times if name in listed or times[name] > 1]
    if twice and not is_sample:
        report.problems.append(f"{file}: {len(twice):,} images are listed twice: {some(twice)}")
    listed.update(times)


# Faces


def inspect_faces(folder: Path, report: Report) -> None:
    """2022's faces: train/, val/ and their attributes."""
    for split in ("train", "val"):
        found = inspect_images(folder / split, (64, 64), report)
        report.rows.append(
            ("face", split, f"{len(found.names):,}", found.sizes, found.channels, "")
        )
    attributes = folder / "list_attr_celeba.txt"
    if attributes.is_file():
        inspect_attributes(attributes, report)
    else:
        report.notes.append(f"{attributes}: missing, so there are no attributes")


def inspect_attributes(file: Path, report: Report) -> None:
    """CelebA's list_attr_celeba.txt: the number of rows, the names, then a row for each image."""
    try:
        table = read_attributes(file)
    except UserError as error:
        report.problems.append(str(error))
        return
    rows = f"{len(table.images):,}"
    report.rows.append(("face", "attributes", rows, "", "", f"{len(table.names)} of each image"))


# What DDIM starts from


def inspect_inversion(folder: Path, report: Report) -> None:
    """2023's and 2024's DDIM problem: noise/*.pt, GT/*.png and UNet.pt."""
    noises = find_noises(folder / "noise")
    if noises:
        inspect_noises(noises, report)
    if (folder / "GT").is_dir():
        found = inspect_images(folder / "GT", (256, 256), report)
        report.rows.append(("face", "GT", f"{len(found.names)}", found.sizes, found.channels, ""))
        stems = {Path(name).stem for name in found.names}
        alone = sorted({path.stem for path in noises} ^ stems)
        if alone:
            report.problems.append(
                f"{folder}: these are in only one of noise/ and GT/: {some(alone)}"
            )
    weights = folder / "UNet.pt"
    if weights.is_file():
        try:
            tensors, _ = load_weights(weights)
            report.rows.append(("face", "UNet.pt", "1", "", "", f"{len(tensors)} tensors"))
        except UserError as error:
            report.problems.append(str(error).removeprefix("--checkpoint "))


def inspect_noises(paths: list[Path], report: Report) -> None:
    """Noise files, each one a tensor of the course's shape or of ours."""
    sizes = set()
    for path in paths:
        try:
            noise = load_noise(path)
        except Exception:  # a damaged or hostile pickle can raise anything
            report.problems.append(f"{path}: not a whole tensor")
            continue
        problem = problem_of_noise(noise)
        if problem:
            report.problems.append(f"{path}: {problem}")
            continue
        shape = tuple(noise.shape)
        if shape in NOISE_SHAPES:
            sizes.add(f"{shape[3]}x{shape[2]}")
        else:
            report.problems.append(f"{path}: shape {shape}, expected {NOISE_SHAPES[0]}")
    words = " ".join(sorted(sizes)) or "-"
    report.rows.append(("face", "noise", f"{len(paths)}", words, "", ""))


# Zero-shot classification


def inspect_zero_shot(folder: Path, report: Report) -> None:
    """clip_zeroshot/: id2label.json, and {class_id}_{image_id}.png in val/ and perhaps train/."""
    labels = read_class_names(folder / "id2label.json", report)
    splits = ("train", "val") if (folder / "train").is_dir() else ("val",)
    for split in splits:
        found = inspect_images(folder / split, None, report)
        odd = []
        counts: Counter[str] = Counter()  # images of each class id
        for name in found.names:
            class_id = name.split("_")[0]
            well_formed = re.match(r"\d+_\d+\.", name) is not None
            if well_formed and (labels is None or class_id in labels):
                counts[class_id] += 1
            else:
                odd.append(name)
        if odd:
            report.problems.append(
                f"{folder / split}: {len(odd):,} names without a known class id: {some(odd)}"
            )
        classes = f"{len(counts)} classes"
        if counts:
            classes += f", {each(counts.values())}"
        images = f"{len(found.names):,}"
        row = ("clip_zeroshot", split, images, found.sizes, found.channels, classes)
        report.rows.append(row)


def read_class_names(file: Path, report: Report) -> dict[str, Any] | None:
    """The content of id2label.json; None, and a problem, if it is missing or something else."""
    try:
        return read_object(file)
    except UserError:
        report.problems.append(f"{file}: missing, or not a json dictionary of class ids and names")
        return None


# Objects in two domains


def inspect_objects(folder: Path, report: Report) -> None:
    """objects/DOMAIN/CLASS/*.png."""
    for child in sorted(folder.iterdir()):
        if not child.is_dir() or is_hidden(child.name):
            continue
        try:
            domain = find_domain(child, "--data-dir")
        except UserError as error:
            report.problems.append(str(error).removeprefix("--data-dir "))
            continue
        found = inspect_files(domain.paths, child, None, report)
        counts = torch.bincount(domain.labels).tolist()
        classes = f"{len(domain.classes)} classes, {each(counts)}"
        images = f"{len(found.names):,}"
        report.rows.append(("objects", child.name, images, found.sizes, found.channels, classes))


# Captioned images and concepts


def inspect_captioned(folder: Path, report: Report) -> None:
    """captioned/{train,val}/ with metadata.jsonl."""
    for split in ("train", "val"):
        if not (folder / split).is_dir():
            continue
        found = inspect_images(folder / split, None, report)
        try:
            rows = read_metadata(folder / split)
        except UserError as error:
            report.problems.append(str(error))
            continue
        missing = sorted({row["file_name"] for row in rows} - set(found.names))
        if missing:
            report.problems.append(
                f"{folder / split}: metadata.jsonl names {len(missing):,} images that are not "
                f"there: {some(missing)}"
            )
        captions = f"{len({row['text'] for row in rows}):,} different captions"
        images = f"{len(found.names):,}"
        report.rows.append(("captioned", split, images, found.sizes, found.channels, captions))


def inspect_concepts(folder: Path, report: Report) -> None:
    """textual_inversion/{0,1}/ and input.json."""
    try:
        concepts = read_concepts(folder / "input.json")
    except UserError as error:
        report.problems.append(str(error))
        return
    for concept in concepts:
        found = inspect_images(folder / concept.name, None, report)
        if not found.names:
            continue
        images = f"{len(found.names):,}"
        words = f"{concept.word}, {len(concept.prompts)} prompts"
        row = ("textual_inversion", concept.name, images, found.sizes, found.channels, words)
        report.rows.append(row)


# The whole folder


def inspect_folder(data_dir: Path) -> Report:
    """Everything known under `data_dir`. Raises UserError if there is no such folder."""
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such folder")
    report = Report()
    digits = data_dir / "digits"
    face = data_dir / "face"
    zero_shot = data_dir / "clip_zeroshot"
    objects = data_dir / "objects"
    if digits.is_dir():
        for domain in sorted(digits.iterdir()):
            if domain.is_dir() and not is_hidden(domain.name):
                inspect_digits(domain, report)
    if any((face / name).exists() for name in ("train", "val", "list_attr_celeba.txt")):
        inspect_faces(face, report)
    if face.is_dir():
        inspect_inversion(face, report)
    if zero_shot.is_dir():
        inspect_zero_shot(zero_shot, report)
    if objects.is_dir():
        inspect_objects(objects, report)
    if (data_dir / "captioned").is_dir():
        inspect_captioned(data_dir / "captioned", report)
    if (data_dir / "textual_inversion").is_dir():
        inspect_concepts(data_dir / "textual_inversion", report)
    if not report.rows and not report.problems:
        report.problems.append(
            f"{data_dir}: holds none of digits/, face/, clip_zeroshot/, objects/, captioned/ and "
            "textual_inversion/"
        )
    return report


def print_report(report: Report) -> None:
    """Print the table, then notes, then problems."""
    table = [("part", "split", "images", "size", "channels", "labels"), *report.rows]
    columns = range(len(table[0]))
    widths = [max(len(row[column]) for row in table) for column in columns]
    for row in table:
        cells = [row[column].ljust(widths[column]) for column in columns]
        print("  ".join(cells).rstrip())
    for note in report.notes:
        print(f"note: {note}")
    for problem in report.problems:
        print(f"wrong: {problem}")
    print("something is wrong" if report.problems else "all fine")
