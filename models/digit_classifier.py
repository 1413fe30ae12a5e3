"""Classifiers of 28x28 digits, which measure how good generated digits are.

The course's own small network, and a stronger one that is independent of it. Both map images
(batch, 3, 28, 28) in [-1, 1], i.e. pixels / 127.5 - 1, to logits (batch, 10).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from models.network import Network


class DigitClassifier(Network):
    """The network of the course's Classifier.pth, with its keys, which graders use for MNIST-M."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"net": "digit_classifier", "arguments": {}}
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 4 * 4, 128)
        self.fc2 = nn.Linear(128, 64)
        self.fc3 = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        """Images (batch, 3, 28, 28) in [-1, 1] → the last layer's input (batch, 64)."""
        x = F.relu(F.max_pool2d(self.conv1(images), 2))  # 28 → 24 → 12
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # 12 → 8 → 4
        x = x.flatten(1)  # (batch, 16, 4, 4) → (batch, 256)
        x = F.relu(self.fc1(x))
        return F.relu(self.fc2(x))

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 3, 28, 28) in [-1, 1] → logits (batch, 10)."""
        return self.fc3(self.features(images))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2016, https://arxiv.org/abs/1512.03385).

    The shortcut is the identity, or a 1x1 convolution where the width or the size changes.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        same = before == after and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, before, height, width) → (batch, after, height / stride, width / stride)."""
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.skip(x))


class DigitResNet(Network):
    """A residual network of 13 convolutions in three stages, 0.7 M parameters at width 32.

    Instance normalisation of the input makes it look at the shape of a digit, whatever its
    brightness and contrast.
    """

    def __init__(self, classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.config = {"net": "digit_resnet", "arguments": {"classes": classes, "width": width}}
        self.feature = nn.Sequential(
            nn.InstanceNorm2d(3),
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            ResidualBlock(width, width, stride=1),  # 28 pixels
            ResidualBlock(width, width, stride=1),
            ResidualBlock(width, 2 * width, stride=2),  # 28 → 14
            ResidualBlock(2 * width, 2 * width, stride=1),
            ResidualBlock(2 * width, 4 * width, stride=2),  # 14 → 7
            ResidualBlock(4 * width, 4 * width, stride=1),
        )
        self.classifier = nn.Linear(4 * width, classes)

    def features(self, images: Tensor) -> Tensor:
        """Images (batch, 3, 28, 28) in [-1, 1] → features (batch, 4 width)."""
        return self.feature(images).mean((2, 3))  # (batch, 4 width, 7, 7) → (batch, 4 width)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 3, 28, 28) in [-1, 1] → logits (batch, classes)."""
        return self.classifier(self.features(images))
