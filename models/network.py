"""What all networks have in common: each says what builds it again."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


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
