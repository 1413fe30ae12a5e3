"""Tensors that a run can compute again, kept in files that are only used if they are whole."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from common.cli import UserError
from common.files import atomic_write


def read_cached(
    path: Path, key: str, shape: tuple[int | None, ...], dtype: torch.dtype
) -> Tensor | None:
    """The tensor that `write_cached` wrote for this key; None if there is no such file.

    None also for a file that is damaged, has another key inside, another type or shape (None
    stands for any length), or other numbers than were written.
    """
    if not path.is_file():  # a pipe would be waited for
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key or list(file.keys()) != ["content"]:
                return None
            found = file.get_slice("content").get_shape()
            if len(found) != len(shape):
                return None
            if any(want not in (None, have) for have, want in zip(found, shape, strict=True)):
                return None
            content = file.get_tensor("content")
    except (OSError, safetensors.SafetensorError):
        return None
    if content.dtype != dtype or digest_of(content) != metadata.get("sha256"):
        return None
    return content


def write_cached(path: Path, key: str, content: Tensor) -> None:
    """Keep a tensor for a later run; without the space or the right to write, do nothing."""
    metadata = {"key": key, "sha256": digest_of(content)}
    content = content.contiguous()
    with contextlib.suppress(UserError):
        atomic_write(
            path,
            lambda file: safetensors.torch.save_file({"content": content}, file, metadata),
        )


def digest_of(content: Tensor) -> str:
    """The sha256 of a tensor's numbers."""
    raw = content.contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()
