"""A classifier of what drawn scenes show: the subject, its colour, the background and more."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from models.digit_classifier import ResidualBlock
from models.network import Network


class SceneClassifier(Network):
    """A small residual network with one linear layer for each trait."""

    def __init__(self, traits: Mapping[str, int], width: int = 32) -> None:
        """`traits` has the number of values of each trait."""
        super().__init__()
        self.config = {
            "net": "scene_classifier",
            "arguments": {"traits": dict(traits), "width": width},
        }
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 5, 2, padding=2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            ResidualBlock(width, width, 1),
            ResidualBlock(width, 2 * width, 2),
            ResidualBlock(2 * width, 3 * width, 2),
            ResidualBlock(3 * width, 4 * width, 2),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.heads = nn.ModuleDict()
        for name, values in traits.items():
            self.heads[name] = nn.Linear(4 * 4 * width, values)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (batch, 3, 64, 64) in [-1, 1] → logits (batch, values) of each trait."""
        features = self.body(images)  # (batch, 16 width): four positions
        return {name: head(features) for name, head in self.heads.items()}
