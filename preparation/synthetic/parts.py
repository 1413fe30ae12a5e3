"""Drawing whole parts of the layout (digits/mnistm, …, objects) in several processes."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.progress import show_progress
from preparation import layout
from preparation.synthetic import digits, faces, looks, object_domains, objects, scenes

CHUNK = 50  # images that a process draws before it reports
Map = Callable[..., Iterator[Any]]  # like the built-in map


class Split(NamedTuple):
    """Where the images of a split (or domain) go, and what they depend on."""

    part: str
    seed: int
    name: str  # "train" or "val", for objects "clipart" or "shaded"
    first: int  # the number of the first image in the names of the files
    folder: Path
    mix: scenes.Mix = scenes.USUAL  # only captioned scenes have one


@contextmanager
def parallel_map(processes: int) -> Iterator[Map]:
    """A lazy `map` that keeps the order and computes in several processes.

    They are forked where that is safe, because a fresh process would import torch for nothing.
    """
    if processes <= 1:
        yield map
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with context.Pool(processes, initializer=ignore_interrupt) as pool:
        yield pool.imap


def ignore_interrupt() -> None:
    """Let Ctrl-C reach the parent process alone, which then stops the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def draw_part(folder: Path, part: str, seed: int, counts: tuple[int, int], run_map: Map) -> None:
    """Fill `folder` with a drawn part: counts[0] images for train and counts[1] for val.

    The validation images are numbered after the training images.
    """
    train_count, val_count = counts
    is_digits = part.startswith("digits/")
    train_folder = folder / ("data" if is_digits else "train")
    val_folder = folder / ("data" if is_digits else "val")
    train = draw_split(Split(part, seed, "train", 0, train_folder), train_count, run_map)
    val = draw_split(Split(part, seed, "val", train_count, val_folder), val_count, run_map)
    if is_digits:
        layout.write_labels(folder, "train", 0, train)
        layout.write_labels(folder, "val", train_count, val)
    elif part == "face":
        rows = [(layout.image_name(k), values) for k, values in enumerate(train + val)]
        layout.write_attributes(folder, looks.ATTRIBUTES, rows)
        layout.write_noises(folder / "noise", seed)
    else:
        layout.write_names(folder, objects.NAMES)


def draw_object_domains(folder: Path, seed: int, count: int, run_map: Map) -> None:
    """Fill `folder` with DOMAIN/CLASS/NNNNN.png, `count` images of each domain."""
    for domain in object_domains.DOMAINS:
        for name in objects.NAMES:
            (folder / domain / name).mkdir(parents=True)
        draw_split(Split("objects", seed, domain, 0, folder / domain), count, run_map)


def draw_captioned(
    folder: Path, seed: int, counts: tuple[int, int], mix: scenes.Mix, run_map: Map
) -> None:
    """Fill `folder` with {train,val}/NNNNN.png and metadata.jsonl, which has their captions."""
    for name, count in zip(("train", "val"), counts, strict=True):
        split = Split("captioned", seed, name, 0, folder / name, mix)
        layout.write_captions(split.folder, draw_split(split, count, run_map))


def draw_concepts(folder: Path, seed: int) -> None:
    """Fill `folder` with {0,1}/{0,...,4}.png and input.json, as the course hands them out."""
    for concept, _ in enumerate(scenes.WORDS):
        (folder / str(concept)).mkdir()
        for k in range(layout.CONCEPT_IMAGES):
            image, _ = scenes.draw_concept(seed, concept, k)
            layout.save_image(image, folder / str(concept) / f"{k}.png")
    layout.write_json(folder / "input.json", scenes.input_json())


def draw_split(split: Split, count: int, run_map: Map) -> list[Any]:
    """Draw and save a split; returns the labels of its images, or for faces their attributes."""
    split.folder.mkdir(exist_ok=True)
    starts = range(0, count, CHUNK)
    chunks = [(split, range(start, min(start + CHUNK, count))) for start in starts]
    what = f"{split.part} {split.name}, times {CHUNK} images"
    known = []
    for some in show_progress(run_map(draw_chunk, chunks), len(chunks), what):
        known += some
    return known


def draw_chunk(chunk: tuple[Split, range]) -> list[Any]:
    """Draw and save some images of a split; returns their labels, or for faces their attributes."""
    split, numbers = chunk
    known = []
    for k in numbers:
        image, what, name = draw_image(split, k)
        layout.save_image(image, split.folder / name)
        known.append(what)
    return known


def draw_image(split: Split, k: int) -> tuple[np.ndarray, Any, str]:
    """Image k of a split, its label (or attributes), and the name of its file."""
    name = layout.image_name(split.first + k)
    if split.part == "face":
        rng = np.random.default_rng([split.seed, digits.SPLITS.index(split.name), k])
        image, attributes = faces.draw_face(rng)
        return image, attributes, name
    if split.part == "captioned":
        image, text, scene = scenes.draw_captioned(split.seed, split.name, k, split.mix)
        return image, {"file_name": name, "text": text, **scene.traits()}, name
    if split.part == "clip_zeroshot":
        number, label = divmod(k, len(objects.NAMES))  # the classes take turns
        image = objects.draw_object(split.seed, split.name, label, number)
        return image, label, f"{label}_{number}.png"
    if split.part == "objects":
        image, label = object_domains.draw_object(split.seed, split.name, k)
        number = k // len(objects.NAMES)
        return image, label, f"{objects.NAMES[label]}/{layout.image_name(number)}"
    domain = split.part.removeprefix("digits/")
    image, label = digits.draw_digit(split.seed, domain, split.name, k)
    return image, label, name
