"""Labelled images in Office-Home's layout: a folder for each domain, in it one for each class.

    source = find_domain(Path("Clipart"), "--source-dir")      # Clipart/CLASS/*.jpg or *.png
    target = find_domain(Path("Real World"), "--target-dir")
    source, target = match_classes(source, target, "equal")    # a label means the same in both
    images = load_domain(source, 256, cache_dir)
    train_rows, val_rows = split_by_class(source)

Office-Home: Venkateswara et al., 2017, https://arxiv.org/abs/1706.07522
"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from common.cli import UserError
from common.data import Images, decode_cached, list_images
from common.names import is_hidden

VAL_EVERY = 5  # one image in five is for validation


class Domain(NamedTuple):
    """The images of a domain, sorted by class, then in natural order."""

    folder: Path
    paths: list[Path]
    labels: torch.Tensor  # int64 (n,), positions in `classes`
    classes: list[str]  # sorted


def find_domain(folder: Path, flag: str) -> Domain:
    """List the images of a domain. The classes are the names of its sub-folders, sorted.

    Hidden folders and files beside the class folders are ignored. Raises UserError, which names
    `flag` or the folder, if the folder is missing, has no class folder, has a class without images,
    or has one image only.
    """
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: no such folder")
    children = sorted(folder.iterdir())
    subfolders = [child for child in children if child.is_dir() and not is_hidden(child.name)]
    if not subfolders:
        raise UserError(f"{flag} {folder}: has no class folder; expected {folder}/CLASS/*.jpg")
    classes = sorted({class_name(subfolder) for subfolder in subfolders})
    paths = []
    labels = []
    for subfolder in sorted(subfolders, key=class_name):
        files = list_images(subfolder)
        paths += files
        labels += [classes.index(class_name(subfolder))] * len(files)
    if len(paths) == 1:
        raise UserError(f"{flag} {folder}: has a single image, {paths[0]}; at least two are needed")
    return Domain(folder, paths, torch.tensor(labels), classes)


def class_name(folder: Path) -> str:
    """The name of a class folder in Unicode's composed form (NFC).

    Some systems store an accent apart from its letter, so that equal names differ.
    """
    return unicodedata.normalize("NFC", folder.name)


def match_classes(
    source: Domain, target: Domain, classes: Literal["equal", "shared"]
) -> tuple[Domain, Domain]:
    """Give both domains the same classes, so that a label means the same in both.

    With "equal" they must have the same classes already. With "shared" the images of all other
    classes are left out, of the target too, so that the names of its folders are used there. The
    labels are positions in the sorted list of shared classes. Raises UserError that says which
    classes each side lacks, or that fewer than two are shared.
    """
    shared = sorted(set(source.classes) & set(target.classes))
    if classes == "equal" and source.classes != target.classes:
        words = [*lacking(source, target), *lacking(target, source)]
        if len(shared) >= 2:
            words.append(f"--classes shared takes the {len(shared)} that both have")
        raise UserError(f"--classes equal: {'; '.join(words)}")
    if len(shared) < 2:
        names = ", ".join(shared) or "none"
        raise UserError(
            f"--classes {classes}: {source.folder} and {target.folder} share fewer than two "
            f"classes ({names})"
        )
    return keep_classes(source, shared), keep_classes(target, shared)


def lacking(domain: Domain, other: Domain) -> list[str]:
    """The words "FOLDER lacks A, B" for classes that only the other domain has, or nothing."""
    names = sorted(set(other.classes) - set(domain.classes))
    return [f"{domain.folder} lacks {', '.join(names)}"] if names else []


def keep_classes(domain: Domain, classes: list[str]) -> Domain:
    """The images of these classes alone; their labels are positions in `classes`."""
    new_labels = {name: label for label, name in enumerate(classes)}
    paths = []
    labels = []
    for path, label in zip(domain.paths, domain.labels.tolist(), strict=True):
        name = domain.classes[label]
        if name in new_labels:
            paths.append(path)
            labels.append(new_labels[name])
    return Domain(domain.folder, paths, torch.tensor(labels), classes)


def split_by_class(domain: Domain) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows for training and for validation, int64, each in ascending order.

    Within each class, in natural order, the second image of every five is for validation: the 2nd,
    7th, 12th and so on. A class with two images has one in each; one with a single image has it in
    training. Raises UserError if no class has two images.
    """
    train = []
    val = []
    counts = [0] * len(domain.classes)  # images of each class so far
    for row, label in enumerate(domain.labels.tolist()):
        is_val = counts[label] % VAL_EVERY == 1
        counts[label] += 1
        if is_val:
            val.append(row)
        else:
            train.append(row)
    if not val:
        raise UserError(
            f"{domain.folder}: no class has two images, so there is none for validation"
        )
    return torch.tensor(train), torch.tensor(val)


def load_domain(domain: Domain, size: int, cache_dir: Path | None = None) -> Images:
    """Decode a domain as uint8 (n, 3, size, size), with its labels; see `decode_image`.

    The shorter side is resized and the middle is kept. Raises UserError that names a broken file.
    """
    return decode_cached(domain.paths, domain.labels, (size, size), cache_dir, domain.folder.name)
