"""Reading and writing networks: our own .safetensors files and the pickles that others publish."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from common.archives import (
    ArchiveError,
    is_torchscript,
    read_archive,
    read_tensors,
    refuse_compressed,
)
from common.cli import UserError
from common.files import atomic_write
from common.metadata import MetadataError, check_config, read_config
from common.pickles import Stub
from models.network import Network, shapes_only

# Keys under which published checkpoints keep their weights. Averaged ones come first.
AVERAGED = "ema"
WRAPPERS = (
    *(AVERAGED, "state_dict", "model_state_dict", "ddpm_state_dict", "model", "net", "params"),
    "string_to_param",
)
DEEPEST_WRAPPING = 4
PARAMETER_DICT = "torch.nn.modules.container.ParameterDict"  # in which learned words may lie
# What DataParallel and DistributedDataParallel, torch.compile, and the public DDPM script put
# before every key.
PREFIXES = ("module.", "_orig_mod.", "nn_model.")
# What the constructor of a network raises for arguments that cannot be meant.
BAD_SIZES = (
    *(KeyError, TypeError, ValueError, IndexError),
    *(AttributeError, ZeroDivisionError, RuntimeError, AssertionError),
)


def load_net(
    path: Path,
    nets: Mapping[str, type[Network]],
    flag: str = "--checkpoint",
    needs: Sequence[str] = (),
) -> tuple[Any, dict[str, Any]]:
    """Build the network of a checkpoint, in eval mode; returns it and the configuration it carries.

    `nets` maps the names in our metadata to classes. A published file names no network: it is taken
    for the first of them. `needs` are names that the configuration must have. Raises UserError if
    the file is another network's; the message has the first key that does not fit.
    """
    weights, config = load_weights(path, flag)
    name = config.get("net", next(iter(nets)))
    if name not in nets:
        expected = " or ".join(nets)
        raise UserError(f"{flag} {path}: contains the network '{name}', expected {expected}")
    for field in needs:
        if field not in config:
            raise UserError(f"{flag} {path}: its configuration has no {field}")
    return build_net(nets[name], config, weights, f"{flag} {path}"), config


def build_net(
    kind: type[Network], config: dict[str, Any], weights: dict[str, Tensor], where: str
) -> Any:
    """A network with these weights, in eval mode.

    Its constructor gets the arguments in `config`, or those that the weights' shapes show. Raises
    UserError, which starts with `where`, before any memory is taken for a network that does not
    have the weights' shapes.
    """
    arguments = config.get("arguments") or {}
    try:
        if not arguments:
            arguments = kind.arguments_of(weights)
        with shapes_only():
            expected = kind(**arguments).state_dict()
    except BAD_SIZES:
        raise UserError(f"{where}: is not a {kind.__name__}") from None
    misfit = first_misfit(expected, weights)
    if misfit:
        raise UserError(f"{where}: is not this {kind.__name__} ({misfit})")
    refuse_damaged(where, weights)
    net = kind(**arguments)
    net.load_state_dict(weights)
    return net.eval()


def first_misfit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """The first key whose shape differs, described in words; empty if all keys and shapes agree."""
    for key in {**expected, **found}:
        there = describe(found[key]) if key in found else "missing"
        wanted = describe(expected[key]) if key in expected else "no such key"
        if there != wanted:
            return f"{shown(key)} is {there}, expected {wanted}"
    return ""


def describe(value: Tensor) -> str:
    """The shape of a tensor, and whether its numbers are whole: "[3, 2]" or "[] of integers"."""
    is_other = value.is_floating_point() or value.is_complex() or value.is_quantized
    return str(list(value.shape)) + ("" if is_other else " of integers")


def shown(key: str) -> str:
    """A key of a file in quotes, in one line, and not too much of it."""
    return ascii(key)[:200]


def refuse_damaged(where: str, weights: Mapping[str, Tensor]) -> None:
    """Raise UserError, which starts with `where` and names the key, for weights of no use.

    They must be plain numbers in memory, each of them there, and finite in float32.
    """
    for key, value in weights.items():
        problem = problem_of(value)
        if problem:
            raise UserError(f"{where}: {shown(key)} {problem}")


def problem_of(value: Tensor) -> str:
    """What is wrong with a tensor, as a phrase; empty if nothing is."""
    if value.layout != torch.strided or value.is_quantized:
        return "is sparse or quantized; only plain tensors are loaded"
    if value.device.type != "cpu":
        return "has no numbers"
    if value.is_complex():
        return "has complex numbers"
    if value.numel() * value.itemsize > value.untyped_storage().nbytes():
        return "repeats the same numbers in memory (it was expanded); save a copy of it"
    if value.is_floating_point() and not value.float().isfinite().all():
        return "has numbers that are not finite"
    return ""


def load_weights(
    path: Path, flag: str = "--checkpoint"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights and the configuration of a checkpoint.

    The file is one of ours (.safetensors), or a published pickle or TorchScript archive in any
    usual wrapping, which has no configuration. FILE::KEY takes the weights under this key of a
    published file. No file can run code. Raises UserError that names the file.
    """
    path, key = file_and_key(path)
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    if key is not None and path.suffix == ".safetensors":
        raise UserError(f"{flag} {path}::{key}: a .safetensors file has no keys to choose from")
    if path.suffix == ".safetensors":
        weights, config = load_safetensors(path, flag)
        return without_prefixes(weights), config
    return load_pickle(path, flag, key), {}


def file_and_key(path: Path) -> tuple[Path, str | None]:
    """The two parts of FILE::KEY."""
    if "::" not in path.name or path.is_file():
        return path, None
    name, key = path.name.split("::", 1)
    return path.with_name(name), key


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
        hint = "" if tensors or is_torchscript(path) else hint_at_module(read_archive(path))
    except ArchiveError as error:
        raise UserError(f"{flag} {error}") from None
    if not tensors:
        raise UserError(f"{flag} {path}: holds no dictionary of tensors{hint}")
    return tensors


def load_safetensors(path: Path, flag: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of one of our files, and the configuration in its metadata, which is checked."""
    try:
        config = read_config(path)
        check_config(config)
        return safetensors.torch.load_file(path), config
    except MetadataError as error:
        raise UserError(f"{flag} {path}: {error}") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{flag} {path}: not a whole safetensors file ({error})") from None


def digest_of(path: Path) -> str:
    """The sha256 of a checkpoint's file, with the key of FILE::KEY."""
    path, key = file_and_key(path)
    return hashlib.sha256(path.read_bytes() + (key or "").encode()).hexdigest()


def load_pickle(path: Path, flag: str, key: str | None = None) -> dict[str, Tensor]:
    """The weights of a published file, without its wrapping and the prefixes of its keys.

    With `key` they are those under this key of the file.
    """
    content: Any = None
    try:
        content = unpickle(path)
    except Exception:  # a damaged or hostile pickle can raise anything
        raise UserError(
            f"{flag} {path}: not a whole file of PyTorch weights (only tensors are loaded)"
        ) from None
    if key is not None:
        content = content.get(key) if isinstance(content, dict) else None
    keys, weights = find_weights(content)
    if not weights and key is not None:
        raise UserError(f"{flag} {path}: has no weights under {shown(key)}")
    if not weights:
        raise UserError(f"{flag} {path}: holds no dictionary of weights{hint_at_module(content)}")
    others = []
    if keys[:1] == [AVERAGED]:
        others = [key for key in WRAPPERS if key != AVERAGED and find_weights(content.get(key))[1]]
    if others:
        print(
            f"{path}: has weights under '{others[0]}' and their average under 'ema'; takes 'ema' "
            f"({path.name}::{others[0]} takes the others)"
        )
    return without_prefixes(weights)


def find_weights(
    content: Any, depth: int = DEEPEST_WRAPPING
) -> tuple[list[str], dict[str, Tensor]]:
    """The weights in a published file, and the keys of the wrappings around them.

    A wrapping may lie in another, `depth` times. Both are empty if there are no weights.
    """
    if isinstance(content, Stub) and content.name == PARAMETER_DICT:
        content = content.state.get("_parameters") if isinstance(content.state, dict) else None
    if not isinstance(content, dict):
        return [], {}
    for key in WRAPPERS:
        if depth > 0 and isinstance(content.get(key), dict | Stub):
            keys, weights = find_weights(content[key], depth - 1)
            if weights:
                return [key, *keys], weights
    weights = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    return [], weights


def hint_at_module(content: Any) -> str:
    """What to do with a file that holds a whole module in place of weights; else nothing."""
    values = list(content.values()) if isinstance(content, dict) else [content]
    for value in values:
        is_module = isinstance(value, Stub) and isinstance(value.state, dict)
        if is_module and "_modules" in value.state:
            return (
                f" but a whole module, {shown(value.name)}, whose code is never run; save its "
                "weights alone: torch.save(module.state_dict(), FILE)"
            )
    return ""


def unpickle(path: Path) -> Any:
    """The content of a published file. No code of it is run.

    torch.load refuses a TorchScript archive, and a file that has objects of other classes beside
    its weights: the tensors of both are read without the rest.
    """
    if is_torchscript(path):
        return read_tensors(path)
    refuse_compressed(path)
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
