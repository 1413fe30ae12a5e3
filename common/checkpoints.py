"""Reading and writing networks: our own .safetensors files and the pickles that others publish."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from common.archives import ArchiveError, is_torchscript, read_archive, read_tensors
from common.cli import UserError
from common.files import atomic_write
from models.network import Network

# Keys under which published checkpoints keep their weights.
WRAPPERS = ("state_dict", "model_state_dict", "model", "string_to_param")
# What DataParallel and DistributedDataParallel, torch.compile, and the public DDPM script put
# before every key.
PREFIXES = ("module.", "_orig_mod.", "nn_model.")
# What the constructor of a network raises for arguments that cannot be meant.
BAD_SIZES = (
    *(KeyError, TypeError, ValueError, IndexError),
    *(AttributeError, ZeroDivisionError, RuntimeError),
)


def load_net(
    path: Path, nets: Mapping[str, type[Network]], flag: str = "--checkpoint"
) -> tuple[Any, dict[str, Any]]:
    """Build the network of a checkpoint, in eval mode; returns it and the configuration it carries.

    `nets` maps the names in our metadata to classes. A published file names no network: it is taken
    for the first of them. Raises UserError if the file is another network's; the message has the
    first key that does not fit.
    """
    weights, config = load_weights(path, flag)
    name = config.get("net", next(iter(nets)))
    if name not in nets:
        expected = " or ".join(nets)
        raise UserError(f"{flag} {path}: contains the network '{name}', expected {expected}")
    net = build_net(nets[name], config, weights)
    if net is None:
        raise UserError(f"{flag} {path}: is not a {nets[name].__name__}")
    misfit = first_misfit(net.state_dict(), weights)
    if misfit:
        raise UserError(f"{flag} {path}: is not this {nets[name].__name__} ({misfit})")
    net.load_state_dict(weights)
    return net.eval(), config


def build_net(
    kind: type[Network], config: dict[str, Any], weights: dict[str, Tensor]
) -> Network | None:
    """A network with the arguments in `config`, or those that its weights' shapes show.

    None if it cannot be built from them.
    """
    arguments = config.get("arguments") or {}
    try:
        if not arguments:
            arguments = kind.arguments_of(weights)
        return kind(**arguments)
    except BAD_SIZES:
        return None


def first_misfit(expected: dict[str, Tensor], found: dict[str, Tensor]) -> str:
    """The first key whose shape differs, described in words; empty if all keys and shapes agree."""
    for key in {**expected, **found}:
        there = list(found[key].shape) if key in found else "missing"
        wanted = list(expected[key].shape) if key in expected else "no such key"
        if there != wanted:
            return f"'{key}' is {there}, expected {wanted}"
    return ""


def load_weights(
    path: Path, flag: str = "--checkpoint"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights and the configuration of a checkpoint.

    The file is one of ours (.safetensors), or a published pickle or TorchScript archive in any
    usual wrapping, which has no configuration. No file can run code. Raises UserError that names
    the file.
    """
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    if path.suffix == ".safetensors":
        return load_safetensors(path, flag)
    return load_pickle(path, flag), {}


def tensors_under(path: Path, flag: str = "--checkpoint") -> dict[str, Tensor]:
    """All tensors of a checkpoint by the names that it has for them, in a memory map of the file.

    The file is a .safetensors file or an archive of PyTorch (.ckpt, .pt, .pth), whose tensors may
    be under the key "state_dict". Raises UserError that names the file.
    """
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    if path.suffix == ".safetensors":
        tensors, _ = load_safetensors(path, flag)
        return tensors
    try:
        tensors = read_tensors(path)
    except ArchiveError as error:
        raise UserError(f"{flag} {error}") from None
    if not tensors:
        raise UserError(f"{flag} {path}: holds no dictionary of tensors")
    return tensors


def load_safetensors(path: Path, flag: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of one of our files, and the configuration in its metadata."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        config = json.loads(metadata.get("config", "{}"))
        if not isinstance(config, dict):
            raise UserError(f"{flag} {path}: its configuration is not a json object")
        return safetensors.torch.load_file(path), config
    except (safetensors.SafetensorError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{flag} {path}: not a whole safetensors file ({error})") from None


def load_pickle(path: Path, flag: str) -> dict[str, Tensor]:
    """The weights of a published file, without its wrapping and the prefixes of its keys."""
    try:
        content = unpickle(path)
    except Exception:  # a damaged or hostile pickle can raise anything
        raise UserError(
            f"{flag} {path}: not a whole file of PyTorch weights (only tensors are loaded)"
        ) from None
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        content = {}
    weights = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if not weights:
        raise UserError(f"{flag} {path}: holds no dictionary of weights")
    return without_prefixes(weights)


def unpickle(path: Path) -> Any:
    """The content of a published file. No code of it is run.

    torch.load refuses a TorchScript archive, and a file that has objects of other classes beside
    its weights: the tensors of both are read without the rest.
    """
    if is_torchscript(path):
        return read_tensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return read_archive(path)


def without_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of wrappers from all keys; keys beside a wrapped network are dropped."""
    while True:
        prefixes = [p for p in PREFIXES if any(key.startswith(p) for key in weights)]
        if not prefixes:
            return weights
        prefix = prefixes[0]
        weights = {
            key.removeprefix(prefix): value
            for key, value in weights.items()
            if key.startswith(prefix)
        }


def save_net(path: Path, net: nn.Module, config: dict[str, Any]) -> None:
    """Write a network as .safetensors, with `config` (what builds it) as json in the metadata."""
    weights = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    metadata = {"config": json.dumps(config)}
    atomic_write(path, lambda file: safetensors.torch.save_file(weights, file, metadata))
