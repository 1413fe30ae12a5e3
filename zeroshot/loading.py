"""What zero-shot classification starts from: image files with their classes, and a CLIP from any of its sources."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor, nn

from common.data import list_images
from common.run import UserError, load_weights

OPENAI = "ViT-B-32, openai"  # the weights of the course
OPENAI_KEYS = {"input_resolution", "context_length", "vocab_size"}  # in OpenAI's files only


class Labelled(NamedTuple):
    """Image files, the class of each (n,), and the classes' names."""

    paths: list[Path]
    labels: np.ndarray
    names: list[str]


def find_labelled(data_dir: Path, split: str) -> Labelled:
    """The course's layout, {class id}_{image id}.png beside id2label.json, or a sub-folder for each class.

    Raises UserError for a missing or empty folder, an id without a label, a broken id2label.json.
    """
    root = data_dir / "clip_zeroshot" if (data_dir / "clip_zeroshot").is_dir() else data_dir
    folder, id_file = root / split if (root / split).is_dir() else root, root / "id2label.json"
    if not folder.is_dir():
        raise UserError(f"--data-dir {data_dir}: no such folder")
    if not (root / split).is_dir() and any((root / name).is_dir() for name in ("train", "val", "test")):
        raise UserError(f"--split {split}: no folder {root / split}")
    if not id_file.is_file():
        classes = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
        if not classes:
            raise UserError(f"--data-dir {data_dir}: has neither {id_file.name} nor a folder for each class")
        files = [(path, label) for label, f in enumerate(classes) for path in list_images(f)]
        return Labelled([p for p, _ in files], np.array([k for _, k in files]), [f.name for f in classes])
    try:
        label_of = json.loads(id_file.read_text())
        ids = sorted(label_of, key=int)
        names = [str(label_of[i]) for i in ids]
    except (ValueError, AttributeError, TypeError, LookupError):
        raise UserError(f'{id_file}: not of the form {{"0": "apple", …}}') from None
    paths, labels = list_images(folder), []
    for path in paths:
        if (class_id := path.name.split("_")[0]) not in label_of:
            raise UserError(f"{path}: its class id {class_id!r} is not in {id_file}")
        labels.append(ids.index(class_id))
    return Labelled(paths, np.array(labels), names)


class Clip(NamedTuple):
    """A CLIP in eval mode, with its tokenizer, what it does to an image before, and its name."""

    net: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    preprocess: Callable[[Image.Image], Tensor]
    name: str


def load_clip(model: str, pretrained: str, checkpoint: Path | None) -> Clip:
    """Weights by open_clip's name, or of a file: OpenAI's, `pretrain`'s, else of the architecture `model`.

    `pretrained` tells what a state file needs besides, too: OpenAI's weights QuickGELU, x · sigmoid(1.702 x), whatever
    the architecture's own activation is, and others another normalisation of the images.
    """
    if model not in open_clip.list_models():
        raise UserError(f"--model {model}: not one of open_clip's (python -c 'import open_clip as o; o.list_models()')")
    if pretrained not in (tags := open_clip.list_pretrained_tags_by_model(model)):
        raise UserError(f"--pretrained {pretrained}: {model} has {', '.join(tags) or 'none'}")
    needs = open_clip.pretrained.get_pretrained_cfg(model, pretrained)
    options = {"force_quick_gelu": needs.get("quick_gelu", False)}
    options |= {f"image_{key}": needs[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in needs}
    weights, config, name = {}, {}, f"{model}, {pretrained}"
    if checkpoint is not None:
        weights, config = read_weights(checkpoint)
        name = f"{checkpoint.resolve().parent.name}/{checkpoint.name}"
    logging.disable(logging.CRITICAL)  # the hub's clients tell every try
    try:
        if OPENAI_KEYS & weights.keys():
            net = open_clip.model.build_model_from_openai_state_dict(weights, cast_dtype=torch.float32).float()
            name = OPENAI if net.visual.conv1.weight.shape == (768, 3, 32, 32) else name
            options = {}
        elif config.get("net") == "clip":
            net, options = open_clip.CLIP(**config["arguments"]), config["preprocess"]
            net.load_state_dict(weights)
        else:
            tag = pretrained if checkpoint is None else None
            net, _, preprocess = open_clip.create_model_and_transforms(model, tag, **options)
            if checkpoint is not None:
                net.load_state_dict(weights)
            return Clip(net.eval(), open_clip.get_tokenizer(model), preprocess, name)
    except Exception as error:  # what a hub without network, or another net's weights, raise is anybody's guess
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        if checkpoint is not None:
            raise UserError(f"--checkpoint {checkpoint}: is not a CLIP of --model {model} ({reason})") from None
        raise UserError(
            f"--pretrained {pretrained}: no weights of {model} and no download ({reason}); fetch them elsewhere "
            f"(OpenAI's are ViT-B-32.pt) and give the file as --checkpoint, or train a small CLIP by `pretrain`"
        ) from None
    finally:
        logging.disable(logging.NOTSET)
    preprocess = open_clip.image_transform(net.visual.image_size, is_train=False, **options)
    tokenizer = open_clip.SimpleTokenizer(context_length=net.context_length)
    return Clip(net.eval(), tokenizer, preprocess, name)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and configuration of a file; OpenAI's are TorchScript archives, of which only the weights are taken."""
    if path.is_file() and path.suffix != ".safetensors":
        with warnings.catch_warnings(action="ignore", category=FutureWarning), contextlib.suppress(RuntimeError):
            return dict(torch.jit.load(path, map_location="cpu").state_dict()), {}  # RuntimeError: not an archive
    return load_weights(path)
