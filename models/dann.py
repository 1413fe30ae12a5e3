"""Networks for domain adaptation of digits (Ganin et al., 2016, https://arxiv.org/abs/1505.07818).

Both have the same three parts: `features(images)` → vectors, and two heads that read them,
`classify(features)` and `discriminate(features)` (0 is the source domain, 1 the target). How the
parts are joined, with the gradient reversal layer between them, is in p3_dann.py.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from models.network import Network


class DannNet(Network):
    """What both networks do with their parts."""

    class_classifier: nn.Module
    domain_classifier: nn.Module | None

    def features(self, images: Tensor) -> Tensor:
        """Images (batch, 3, 28, 28) in [-1, 1] → features (batch, d)."""
        raise NotImplementedError

    def classify(self, features: Tensor) -> Tensor:
        """Features (batch, d) → log-probabilities of the classes (batch, classes), float32."""
        return self.class_classifier(features).float().log_softmax(1)

    def discriminate(self, features: Tensor) -> Tensor:
        """Features (batch, d) → log-probabilities of the two domains (batch, 2), float32."""
        assert self.domain_classifier is not None
        return self.domain_classifier(features).float().log_softmax(1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 3, 28, 28) in [-1, 1] → log-probabilities of the classes."""
        return self.classify(self.features(images))


class DannCNN(DannNet):
    """The small network of the course's reports, with the keys of widely used public checkpoints.

    The public code is https://github.com/fungtion/DANN. Checkpoints of its three parts load as they
    are.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.config = {"net": "cnn", "arguments": {"classes": classes}}
        self.feature = nn.Sequential(
            OrderedDict(
                f_conv1=nn.Conv2d(3, 64, 5),  # 28 → 24
                f_bn1=nn.BatchNorm2d(64),
                f_pool1=nn.MaxPool2d(2),  # 24 → 12
                f_relu1=nn.ReLU(),
                f_conv2=nn.Conv2d(64, 50, 5),  # 12 → 8
                f_bn2=nn.BatchNorm2d(50),
                f_drop1=nn.Dropout2d(),
                f_pool2=nn.MaxPool2d(2),  # 8 → 4
                f_relu2=nn.ReLU(),
            )
        )
        self.class_classifier = nn.Sequential(
            OrderedDict(
                c_fc1=nn.Linear(50 * 4 * 4, 100),
                c_bn1=nn.BatchNorm1d(100),
                c_relu1=nn.ReLU(),
                c_drop1=nn.Dropout(),
                c_fc2=nn.Linear(100, 100),
                c_bn2=nn.BatchNorm1d(100),
                c_relu2=nn.ReLU(),
                c_fc3=nn.Linear(100, classes),
            )
        )
        self.domain_classifier = nn.Sequential(
            OrderedDict(
                d_fc1=nn.Linear(50 * 4 * 4, 100),
                d_bn1=nn.BatchNorm1d(100),
                d_relu1=nn.ReLU(),
                d_fc2=nn.Linear(100, 2),
            )
        )

    def features(self, images: Tensor) -> Tensor:
        """Images (batch, 3, 28, 28) in [-1, 1] → features (batch, 800)."""
        return self.feature(images).flatten(1)  # (batch, 50, 4, 4) → (batch, 800)


class DannDeep(DannNet):
    """The stronger network of this project: five convolutions, a bottleneck, two heads.

    Instance normalisation of the input removes brightness and contrast from both domains before
    anything is learned. Pooling comes before normalisation and ReLU, which makes both cheaper.
    """

    def __init__(
        self, classes: int = 10, width: int = 32, hidden: int | None = None, grey: bool = False
    ) -> None:
        """`hidden` is the width of the domain classifier, 16 `width` by default.

        0 leaves it out, as the released files do: only training needs it. With `grey` the network
        sees the mean of the three channels only, so that colour cannot matter.
        """
        super().__init__()
        self.config = {"net": "deep", "arguments": {"classes": classes, "width": width}}
        self.grey = grey
        if grey:
            self.config["arguments"]["grey"] = True
        if hidden is None:
            hidden = 16 * width
        else:
            self.config["arguments"]["hidden"] = hidden
        self.feature = nn.Sequential(
            nn.InstanceNorm2d(3),
            *_convolution(3, width, kernel=5, pool=True),  # 28 → 14 pixels
            *_convolution(width, 2 * width, kernel=3, pool=False),
            *_convolution(2 * width, 2 * width, kernel=3, pool=True),  # 14 → 7
            *_convolution(2 * width, 3 * width, kernel=3, pool=False),
            *_convolution(3 * width, 3 * width, kernel=3, pool=True),  # 7 → 3
        )
        flat = 3 * width * 3 * 3
        features = 8 * width
        self.bottleneck = nn.Sequential(
            nn.Linear(flat, features, bias=False), nn.BatchNorm1d(features), nn.ReLU()
        )
        self.class_classifier = nn.Linear(features, classes)
        self.domain_classifier = None
        if hidden > 0:
            self.domain_classifier = nn.Sequential(
                nn.Linear(features, hidden),
                nn.BatchNorm1d(hidden),
                nn.LeakyReLU(0.1),
                nn.Linear(hidden, hidden),
                nn.BatchNorm1d(hidden),
                nn.LeakyReLU(0.1),
                nn.Linear(hidden, 2),
            )

    def features(self, images: Tensor) -> Tensor:
        """Images (batch, 3, 28, 28) in [-1, 1] → features (batch, 8 width)."""
        if self.grey:
            images = images.mean(1, keepdim=True).expand_as(images)
        x = self.feature(images).flatten(1)  # (batch, 3 width, 3, 3) → (batch, 27 width)
        return self.bottleneck(x)


def _convolution(before: int, after: int, kernel: int, pool: bool) -> list[nn.Module]:
    """A convolution that keeps the size, pooling if asked for, BatchNorm and ReLU."""
    layers: list[nn.Module] = [
        nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False),
    ]
    if pool:
        layers.append(nn.MaxPool2d(2))
    layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return layers


NETS = {"cnn": DannCNN, "deep": DannDeep}
