"""What a data folder holds and what is wrong with it, for all years' layouts of the course's hw2_data."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from common.data import DIGIT_SIZE, list_images, read_labels
from common.run import UserError, load_weights

CSV_NAMES = ("train.csv", "val.csv", "test.csv")
NOISE_SHAPES = ((1, 3, 256, 256), (1, 3, 64, 64))  # the course's; of our 64x64 model
SHOWN = 5  # file names per complaint
KINDS = 3  # sizes, or numbers of channels, per row of the table


@dataclass
class Report:
    """Rows of the table, complaints (the folder is not usable as it is) and remarks (it is)."""

    rows: list[tuple[str, ...]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


def kinds(seen: Iterable[str]) -> str:
    """The most frequent values, and how many others there are: photographs may be of hundreds of sizes."""
    values = [value for value, _ in Counter(seen).most_common()]
    return " ".join(values[:KINDS]) + (f" and {len(values) - KINDS:,} more" if len(values) > KINDS else "") or "-"


def look_at(path: Path) -> tuple[tuple[int, int], int] | None:
    """((width, height), channels) of an image that decodes whole, None of a broken one."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.size, len(image.getbands())
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def inspect_images(folder: Path, size: tuple[int, int] | None, report: Report) -> tuple[list[str], str, str]:
    """Decode every image of a folder; returns the names and what to print of sizes and of channels.

    A missing or empty folder, broken images and, where `size` (width, height) is given, other sizes are complaints.
    """
    try:
        paths = list_images(folder)
    except UserError as error:
        report.problems.append(str(error))
        return [], "-", "-"
    with ThreadPoolExecutor() as pool:
        looks = dict(zip(paths, pool.map(look_at, paths, chunksize=256), strict=True))
    broken = [path.name for path, seen in looks.items() if seen is None]
    if broken:
        report.problems.append(f"{folder}: {len(broken):,} broken images: {some(broken)}")
    odd = [path.name for path, seen in looks.items() if seen is not None and size is not None and seen[0] != size]
    if odd:
        report.problems.append(f"{folder}: {len(odd):,} images are not {size[0]}x{size[1]}: {some(odd)}")
    whole = [seen for seen in looks.values() if seen is not None]
    sizes = kinds(f"{width}x{height}" for (width, height), _ in whole)
    channels = kinds({1: "grey", 3: "RGB", 4: "RGBA"}.get(bands, str(bands)) for _, bands in whole)
    return [path.name for path in paths], sizes, channels


def inspect_digits(folder: Path, report: Report) -> None:
    """One digit domain: data/ and its csv files; without val.csv (2024) the loader splits train.csv 80/20."""
    names, sizes, channels = inspect_images(folder / "data", (DIGIT_SIZE[1], DIGIT_SIZE[0]), report)
    listed: set[str] = set()
    for csv_name in CSV_NAMES:
        if not (folder / csv_name).exists():
            if csv_name == "train.csv":
                report.problems.append(f"{folder / csv_name}: missing")
            elif csv_name == "val.csv":
                report.notes.append(f"{folder}: no val.csv, train.csv is split 80/20")
            continue
        try:
            paths, labels = read_labels(folder / csv_name, folder / "data")
        except UserError as error:  # 2022's test.csv is a sample of the output format, which nothing reads
            (report.notes if csv_name == "test.csv" else report.problems).append(str(error))
            continue
        counts = torch.bincount(labels, minlength=10).tolist()
        spread = f"{labels.min()}-{labels.max()}, {min(counts):,}-{max(counts):,} each"
        report.rows.append((f"digits/{folder.name}", csv_name[:-4], f"{len(paths):,}", sizes, channels, spread))
        here = [path.name for path in paths]
        counted = Counter(here)
        twice = [name for name in counted if name in listed or counted[name] > 1]
        if twice and csv_name != "test.csv":
            report.problems.append(f"{folder / csv_name}: {len(twice):,} images stand in a csv twice: {some(twice)}")
        listed.update(here)
    left = [name for name in names if name not in listed]
    if left and listed:
        report.notes.append(f"{folder / 'data'}: {len(left):,} images are in no csv: {some(left)}")


def inspect_faces(folder: Path, report: Report) -> None:
    """2022's faces: train/, val/ and their attributes."""
    for split in ("train", "val"):
        names, sizes, channels = inspect_images(folder / split, (64, 64), report)
        report.rows.append(("face", split, f"{len(names):,}", sizes, channels, ""))
    attributes = folder / "list_attr_celeba.txt"
    if not attributes.is_file():
        report.notes.append(f"{attributes}: not there, no attributes")
        return
    lines = attributes.read_text().splitlines()
    columns = len(lines[1].split()) if len(lines) > 1 else 0
    bad = [
        i
        for i, line in enumerate(lines[2:], 3)
        if len(line.split()) != columns + 1 or set(line.split()[1:]) - {"1", "-1"}
    ]
    if len(lines) < 3 or lines[0].strip() != str(len(lines) - 2):
        report.problems.append(f"{attributes}: line 1 is not the number of rows, {max(len(lines) - 2, 0)}")
    if bad:
        report.problems.append(f"{attributes}: {len(bad):,} bad rows, first in line {bad[0]}")
    report.rows.append(("face", "attributes", f"{len(lines) - 2:,}", "", "", f"{columns} of each image"))


def inspect_inversion(folder: Path, report: Report) -> None:
    """2023's and 2024's DDIM problem: noise/*.pt, GT/*.png and UNet.pt."""
    noises, sizes = sorted((folder / "noise").glob("*.pt")), set()
    for path in noises:
        try:
            noise = torch.load(path, map_location="cpu", weights_only=True)
            shape = tuple(noise.shape)
        except Exception:  # what a damaged pickle raises is anybody's guess
            report.problems.append(f"{path}: not a whole tensor")
            continue
        if shape in NOISE_SHAPES:
            sizes.add(f"{shape[3]}x{shape[2]}")
        else:
            report.problems.append(f"{path}: shape {shape}, expected {NOISE_SHAPES[0]}")
    if noises:
        report.rows.append(("face", "noise", f"{len(noises)}", " ".join(sorted(sizes)) or "-", "", ""))
    if (folder / "GT").is_dir():
        names, sizes, channels = inspect_images(folder / "GT", (256, 256), report)
        report.rows.append(("face", "GT", f"{len(names)}", sizes, channels, ""))
        missing = sorted({path.stem for path in noises} ^ {Path(name).stem for name in names})
        if missing:
            report.problems.append(f"{folder}: noise and GT do not pair: {some(missing)}")
    if (folder / "UNet.pt").is_file():
        try:
            weights, _ = load_weights(folder / "UNet.pt")
            report.rows.append(("face", "UNet.pt", "1", "", "", f"{len(weights)} tensors"))
        except UserError as error:
            report.problems.append(str(error).removeprefix("--checkpoint "))


def inspect_zero_shot(folder: Path, report: Report) -> None:
    """clip_zeroshot/: {class_id}_{image_id}.png in val/, perhaps in train/ too, and id2label.json."""
    try:
        labels = json.loads((folder / "id2label.json").read_text())
    except (OSError, ValueError):
        labels = None
    if not isinstance(labels, dict):
        report.problems.append(f"{folder / 'id2label.json'}: missing, or not a json dictionary of class ids and names")
        labels = None
    for split in ("train", "val") if (folder / "train").is_dir() else ("val",):
        names, sizes, channels = inspect_images(folder / split, None, report)
        ids = {name: name.split("_")[0] for name in names}
        odd = [n for n in names if not re.match(r"\d+_\d+\.", n) or (labels is not None and ids[n] not in labels)]
        if odd:
            report.problems.append(f"{folder / split}: {len(odd):,} names without a known class id: {some(odd)}")
        counts = Counter(ids[name] for name in set(names) - set(odd)).values()
        classes = f"{len(counts)} classes" + (f", {min(counts):,}-{max(counts):,} each" if counts else "")
        report.rows.append(("clip_zeroshot", split, f"{len(names):,}", sizes, channels, classes))


def inspect_folder(data_dir: Path) -> Report:
    """Everything known under `data_dir`. UserError if there is no such folder."""
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such folder")
    report, face = Report(), data_dir / "face"
    if (data_dir / "digits").is_dir():
        for folder in sorted(path for path in (data_dir / "digits").iterdir() if path.is_dir()):
            inspect_digits(folder, report)
    if any((face / name).exists() for name in ("train", "val", "list_attr_celeba.txt")):
        inspect_faces(face, report)
    if face.is_dir():
        inspect_inversion(face, report)
    if (data_dir / "clip_zeroshot").is_dir():
        inspect_zero_shot(data_dir / "clip_zeroshot", report)
    if not report.rows and not report.problems:
        report.problems.append(f"{data_dir}: holds neither digits/ nor face/ nor clip_zeroshot/")
    return report


def print_report(report: Report) -> None:
    """The table, then remarks, then complaints."""
    table = [("part", "split", "images", "size", "channels", "labels"), *report.rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for note in report.notes:
        print(f"note: {note}")
    for problem in report.problems:
        print(f"wrong: {problem}")
    print("something is wrong" if report.problems else "all fine")
