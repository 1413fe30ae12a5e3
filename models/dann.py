"""Domain-adversarial networks (Ganin et al., 2016, https://arxiv.org/abs/1505.07818): the reversal layer and two nets.

Both nets share one contract: `net(images, lambd)` → (class log-probabilities, domain log-probabilities), with domain 0
the source and 1 the target; `net.features(images)` → the vector that both heads read.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn


class _ReverseGradient(torch.autograd.Function):
    """Identity forward, -lambda times the gradient backward (equations 16 and 17 of the paper)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lambd: float) -> Tensor:
        ctx.lambd = lambd
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.lambd * gradient, None


def reverse_gradient(x: Tensor, lambd: float) -> Tensor:
    """R_lambda(x): x itself, its gradient times -lambda. A pure function: nothing is kept between calls."""
    return _ReverseGradient.apply(x, lambd)


class ClassPrior(nn.Module):
    """How frequent the classes are in the target, as the net itself predicts; what source images then weigh.

    Aligning features moves images of one class to another where the two domains' class frequencies differ. Source
    images weighted by the target's frequencies take that incentive away, without any label of the target: Tachet des
    Combes et al., 2020, https://arxiv.org/abs/2003.04475. The source's own frequencies are taken as equal, as MNIST-M's
    nearly are (9.1 to 11.3 %).
    """

    def __init__(self, classes: int = 10, trust: float = 1.0, momentum: float = 0.01) -> None:
        super().__init__()
        self.trust, self.momentum = trust, momentum
        self.register_buffer("frequencies", torch.full((classes,), 1 / classes))

    @torch.no_grad()
    def update(self, log_p: Tensor) -> None:
        """Move towards the mean of the target's class log-probabilities (batch, classes)."""
        self.frequencies.lerp_(log_p.float().exp().mean(0), self.momentum)

    def weights(self, labels: Tensor) -> Tensor:
        """Weights of source images with these labels (batch,), 1 in the mean; all 1 for a trust of 0 (plain DANN)."""
        weights = torch.lerp(torch.full_like(self.frequencies, 1 / len(self.frequencies)), self.frequencies, self.trust)
        weights = weights[labels]
        return weights / weights.mean()


class DannCNN(nn.Module):
    """The small net of the course's reports, with the keys of the widely used public checkpoints. Input 28x28.

    The public code is https://github.com/fungtion/DANN; checkpoints of its three parts load as they are.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.config = {"net": "cnn", "arguments": {"classes": classes}}
        self.feature = nn.Sequential(
            OrderedDict(
                f_conv1=nn.Conv2d(3, 64, 5),
                f_bn1=nn.BatchNorm2d(64),
                f_pool1=nn.MaxPool2d(2),
                f_relu1=nn.ReLU(),
                f_conv2=nn.Conv2d(64, 50, 5),
                f_bn2=nn.BatchNorm2d(50),
                f_drop1=nn.Dropout2d(),
                f_pool2=nn.MaxPool2d(2),
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
                d_fc1=nn.Linear(50 * 4 * 4, 100), d_bn1=nn.BatchNorm1d(100), d_relu1=nn.ReLU(), d_fc2=nn.Linear(100, 2)
            )
        )

    def features(self, images: Tensor) -> Tensor:
        """Images (batch, 3, 28, 28) in [-1, 1] → features (batch, 800)."""
        return self.feature(images).flatten(1)  # (batch, 50, 4, 4) → (batch, 800)

    def forward(self, images: Tensor, lambd: float = 0.0) -> tuple[Tensor, Tensor]:
        """Images (batch, 3, 28, 28) in [-1, 1] → class (batch, classes) and domain (batch, 2) log-probabilities."""
        features = self.features(images)
        classes = self.class_classifier(features).float().log_softmax(1)
        domains = self.domain_classifier(reverse_gradient(features, lambd)).float().log_softmax(1)
        return classes, domains


class DannDeep(nn.Module):
    """The stronger net of this project: five convolutions, a bottleneck, and a domain classifier as wide as it needs.

    Instance normalisation of the input takes brightness and contrast out of both domains before anything is learned.
    Pooling stands before normalisation and rectifier, which makes both cheaper. Input 28x28.
    """

    def __init__(self, classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.config = {"net": "deep", "arguments": {"classes": classes, "width": width}}
        layers: list[nn.Module] = [nn.InstanceNorm2d(3)]
        for before, after, kernel, pool in (
            (3, width, 5, True),  # 28 → 14
            (width, 2 * width, 3, False),
            (2 * width, 2 * width, 3, True),  # 14 → 7
            (2 * width, 3 * width, 3, False),
            (3 * width, 3 * width, 3, True),  # 7 → 3
        ):
            layers.append(nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False))
            if pool:
                layers.append(nn.MaxPool2d(2))
            layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.feature = nn.Sequential(*layers)
        flat, features, hidden = 9 * 3 * width, 8 * width, 16 * width
        self.bottleneck = nn.Sequential(nn.Linear(flat, features, bias=False), nn.BatchNorm1d(features), nn.ReLU())
        self.class_classifier = nn.Linear(features, classes)
        layers = []
        for before in (features, hidden):
            layers += [nn.Linear(before, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(0.1)]
        self.domain_classifier = nn.Sequential(*layers, nn.Linear(hidden, 2))

    def features(self, images: Tensor) -> Tensor:
        """Images (batch, 3, 28, 28) in [-1, 1] → features (batch, 8 width)."""
        return self.bottleneck(self.feature(images).flatten(1))  # (batch, 3 width, 3, 3) → (batch, 27 width)

    def forward(self, images: Tensor, lambd: float = 0.0) -> tuple[Tensor, Tensor]:
        """Images (batch, 3, 28, 28) in [-1, 1] → class (batch, classes) and domain (batch, 2) log-probabilities."""
        features = self.features(images)
        classes = self.class_classifier(features).float().log_softmax(1)
        domains = self.domain_classifier(reverse_gradient(features, lambd)).float().log_softmax(1)
        return classes, domains


NETS = {"cnn": DannCNN, "deep": DannDeep}
