"""A classifier of the attributes of clean faces, which measures generated ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.network import Network

SMALLEST_INPUT = 32  # the network halves its input five times


class AttributeClassifier(Network):
    """EfficientNet-Lite0 with one logit for each attribute, 3.4 M parameters.

    Tan and Le, 2019, https://arxiv.org/abs/1905.11946. `attributes` are the names of the logits, in
    their order. Images are resized to `input_size` first.
    """

    def __init__(self, attributes: Sequence[str], input_size: int = 128) -> None:
        super().__init__()
        import timm  # takes seconds to import

        if not attributes:
            raise ValueError("a classifier of attributes needs at least one")
        if input_size < SMALLEST_INPUT:
            raise ValueError(f"the input must have at least {SMALLEST_INPUT} pixels a side")
        self.attributes = list(attributes)
        self.input_size = input_size
        self.config = {
            "net": "attribute_classifier",
            "arguments": {"attributes": self.attributes, "input_size": input_size},
        }
        self.backbone: nn.Module = timm.create_model("tf_efficientnet_lite0", num_classes=0)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(1280, len(self.attributes))

    def features(self, images: Tensor) -> Tensor:
        """Images (batch, 3, height, width) in [-1, 1] → features (batch, 1280)."""
        size = (self.input_size, self.input_size)
        x = F.interpolate(images, size, mode="bicubic", antialias=True)
        x = (127.5 * x + 0.5) / 128  # (pixels - 127) / 128, as the ImageNet weights expect
        return self.backbone(x.contiguous(memory_format=torch.channels_last))

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 3, height, width) in [-1, 1] → logits (batch, attributes)."""
        return self.head(self.dropout(self.features(images)))
