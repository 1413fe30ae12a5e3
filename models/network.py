"""What all networks have in common: each says what builds it again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Network(nn.Module):
    """An nn.Module with a configuration that checkpoints keep.

    `config` has the network's name under "net" and the constructor's arguments under "arguments".
    """

    config: dict[str, Any]

    @staticmethod
    def arguments_of(weights: dict[str, Tensor]) -> dict[str, Any]:
        """The constructor's arguments for published weights, read from their shapes.

        Empty, for the defaults, unless a network knows better.
        """
        return {}


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Networks that are built in this block have shapes, but no numbers and no memory for them."""
    with torch.device("meta"), WithoutNormal():
        yield


class WithoutNormal(TorchFunctionMode):
    """Leaves weights as they are where they would be drawn from a normal distribution.

    On the meta device torch imports its compiler for that, which takes two to three seconds.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`; `normal_` returns its tensor instead."""
        kwargs = kwargs or {}
        if func in (nn.init.normal_, Tensor.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
