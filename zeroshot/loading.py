"""What zero-shot classification starts from: labelled image files, and a CLIP from any source."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common.checkpoints import first_misfit, load_weights, refuse_damaged, shown
from common.cli import UserError
from common.data import list_images
from common.json_files import read_object
from common.names import is_hidden, is_label
from models.network import shapes_only

OPENAI = "ViT-B-32, openai"  # the weights that the course uses
# Entries that only OpenAI's own files have.
OPENAI_KEYS = {"input_resolution", "context_length", "vocab_size"}


class Labelled(NamedTuple):
    """Image files, the class of each, int64 (n,), and the names of the classes."""

    paths: list[Path]
    labels: np.ndarray
    names: list[str]


def find_labelled(data_dir: Path, split: str) -> Labelled:
    """Find the images of a split with their classes.

    The layout is the course's ({class id}_{image id}.png beside id2label.json), or one sub-folder
    for each class. Raises UserError for a missing or empty folder, an id without a label, and a
    broken id2label.json.
    """
    root = data_dir
    if (data_dir / "clip_zeroshot").is_dir():
        root = data_dir / "clip_zeroshot"
    folder = root / split
    if not folder.is_dir():
        if any((root / name).is_dir() for name in ("train", "val", "test")):
            raise UserError(f"--split {split}: no folder {folder}")
        folder = root
    if not folder.is_dir():
        raise UserError(f"--data-dir {data_dir}: no such folder")
    id_file = root / "id2label.json"
    if id_file.is_file():
        return label_by_name(folder, id_file)
    return label_by_folder(folder, data_dir)


def label_by_folder(folder: Path, data_dir: Path) -> Labelled:
    """Images in one sub-folder for each class, whose name is the class's."""
    children = sorted(folder.iterdir())
    classes = [child for child in children if child.is_dir() and not is_hidden(child.name)]
    if not classes:
        raise UserError(
            f"--data-dir {data_dir}: has neither id2label.json nor a folder for each class"
        )
    paths = []
    labels = []
    for label, child in enumerate(classes):
        for path in list_images(child):
            paths.append(path)
            labels.append(label)
    return Labelled(paths, np.array(labels), [child.name for child in classes])


def label_by_name(folder: Path, id_file: Path) -> Labelled:
    """Images whose names start with a class id, which `id_file` maps to the class's name."""
    try:
        label_of = read_object(id_file)
        ids = sorted(label_of, key=int)
        names = [label_of[i] for i in ids]
    except ValueError:
        raise UserError(f'{id_file}: not of the form {{"0": "apple", …}}') from None
    for name in names:
        if not is_label(name) or not name.strip() or names.count(name) > 1:
            raise UserError(f"{id_file}: {shown(str(name))} is not the name of one class")
    paths = list_images(folder)
    labels = []
    for path in paths:
        class_id = path.name.split("_")[0]
        if class_id not in label_of:
            raise UserError(f"{path}: its class id {class_id!r} is not in {id_file}")
        labels.append(ids.index(class_id))
    return Labelled(paths, np.array(labels), names)


class Clip(NamedTuple):
    """A CLIP in eval mode, its tokenizer, the preparation of an image for it, and its name."""

    net: Any
    tokenizer: Callable[[list[str]], Tensor]
    preprocess: Callable[[Image.Image], Tensor]
    name: str


def load_clip(
    model: str, pretrained: str, checkpoint: Path | None, flag: str = "--checkpoint"
) -> Clip:
    """Load a CLIP: weights by open_clip's names, or those of a file.

    The file is OpenAI's, one of `pretrain`, or one with the weights of the architecture `model`.
    `pretrained` also says what such weights need besides: OpenAI's were trained with QuickGELU,
    x · sigmoid(1.702 x), and others with another normalisation of the images. Raises UserError
    that names the flag or the file, and says what to do without a download.
    """
    needs = check_names(model, pretrained)
    weights: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    if checkpoint is not None:
        weights, config = load_weights(checkpoint, flag)
        refuse_damaged(f"{flag} {checkpoint}", weights)
    try:
        with quiet_logging():
            if OPENAI_KEYS & weights.keys():
                return build_openai(weights, checkpoint)
            if config.get("net") == "clip":
                return build_own(weights, config, checkpoint)
            return build_named(model, pretrained, weights, needs, checkpoint)
    except Exception as error:  # a hub without network, or wrong weights, can raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        if checkpoint is not None:
            raise UserError(
                f"{flag} {checkpoint}: is not a CLIP of the architecture {model} ({reason})"
            ) from None
        raise UserError(
            f"the weights '{pretrained}' of {model} are not here and cannot be downloaded "
            f"({reason}); download them elsewhere (OpenAI's are ViT-B-32.pt) and give the file as "
            f"{flag}, or train a small CLIP with `pretrain`"
        ) from None


def check_names(model: str, pretrained: str) -> dict[str, Any]:
    """What open_clip knows about these weights. Raises UserError for names it does not know."""
    import open_clip

    if model not in open_clip.list_models():
        raise UserError(
            f"--model {model}: open_clip has no model of this name "
            "(python -c 'import open_clip; print(*open_clip.list_models())' prints them)"
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained not in tags:
        known = ", ".join(tags) or "none"
        raise UserError(f"--pretrained {pretrained}: {model} has these weights: {known}")
    return open_clip.pretrained.get_pretrained_cfg(model, pretrained)


@contextlib.contextmanager
def quiet_logging() -> Iterator[None]:
    """Switch off logging, because the hub's clients log every attempt to download."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def file_name(checkpoint: Path | None) -> str:
    """How a file of weights is called in tables: FOLDER/FILE."""
    assert checkpoint is not None
    return f"{checkpoint.resolve().parent.name}/{checkpoint.name}"


def build_openai(weights: dict[str, Tensor], checkpoint: Path | None) -> Clip:
    """A CLIP from OpenAI's own file."""
    import open_clip

    build = open_clip.model.build_model_from_openai_state_dict
    with shapes_only():  # so that no sizes can fill the memory
        build({key: value.to("meta") for key, value in weights.items()}, cast_dtype=torch.float32)
    net = build(weights, cast_dtype=torch.float32)
    net = net.float()
    is_vit_b_32 = net.visual.conv1.weight.shape == (768, 3, 32, 32)
    name = OPENAI if is_vit_b_32 else file_name(checkpoint)
    return with_tools(net, {}, name)


def build_own(weights: dict[str, Tensor], config: dict[str, Any], checkpoint: Path | None) -> Clip:
    """A CLIP from a file of `pretrain`."""
    import open_clip

    with shapes_only():  # so that no sizes can fill the memory
        expected = open_clip.CLIP(**config["arguments"]).state_dict()
    misfit = first_misfit(expected, weights)
    if misfit:
        raise ValueError(misfit)
    net = open_clip.CLIP(**config["arguments"])
    net.load_state_dict(weights)
    clip = with_tools(net, config["preprocess"], file_name(checkpoint))
    vocabulary = config.get("vocabulary")
    if vocabulary is None:
        return clip
    tokenizer = clip.tokenizer
    return clip._replace(tokenizer=lambda texts: rows_of_tokens(tokenizer(texts), vocabulary))


def rows_of_tokens(tokens: Tensor, vocabulary: list[int]) -> Tensor:
    """CLIP's tokens counted from 1 in a sorted list; those that are not in it become 0.

    The end of a text keeps the largest number, by which open_clip finds it.
    """
    known = torch.tensor(vocabulary)
    rows = torch.searchsorted(known, tokens).clamp(max=len(known) - 1)
    return torch.where(known[rows] == tokens, rows + 1, 0)


def with_tools(net: nn.Module, image_options: dict[str, Any], name: str) -> Clip:
    """A CLIP with the preparation of images and the tokenizer that its sizes ask for."""
    import open_clip

    size = net.visual.image_size
    preprocess = open_clip.image_transform(size, is_train=False, **image_options)
    tokenizer = open_clip.SimpleTokenizer(context_length=net.context_length)
    return Clip(net.eval(), tokenizer, preprocess, name)


def build_named(
    model: str,
    pretrained: str,
    weights: dict[str, Tensor],
    needs: dict[str, Any],
    checkpoint: Path | None,
) -> Clip:
    """A CLIP of an architecture of open_clip's, with downloaded weights or those of a file."""
    import open_clip

    options = {"force_quick_gelu": needs.get("quick_gelu", False)}
    for key in ("mean", "std", "interpolation", "resize_mode"):
        if key in needs:
            options[f"image_{key}"] = needs[key]
    tag = pretrained if checkpoint is None else None
    net, _, preprocess = open_clip.create_model_and_transforms(model, tag, **options)
    name = f"{model}, {pretrained}"
    if checkpoint is not None:
        net.load_state_dict(weights)
        name = file_name(checkpoint)
    return Clip(net.eval(), open_clip.get_tokenizer(model), preprocess, name)
