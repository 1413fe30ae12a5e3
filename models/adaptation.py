"""Networks for domain adaptation of photographs and drawings: a backbone and three small heads.

    images → backbone → features → dense → label        the classes
                            └─────────┴───────┴── domain    source or target, from one of the three

What the domain classifier reads is `place`. How the parts are joined, with the gradient reversal
layer before the domain classifier, is in p3_dann_resnet.py.

Backbones: ResNet (He et al., 2015, https://arxiv.org/abs/1512.03385), and EfficientNet-Lite0 (Tan
and Le, 2019, https://arxiv.org/abs/1905.11946) from timm.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from models.network import Network

BackboneName = Literal["resnet18", "resnet50", "efficientnet_lite0"]
Place = Literal["none", "backbone", "dense", "label"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of pixels in [0, 1], as torchvision's weights expect them
IMAGENET_STD = (0.229, 0.224, 0.225)
SMALL = 64  # images up to this side keep a map of size / 8


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut, of ResNet-18; the output is `width` wide."""

    expansion = 1

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(before, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, before, height, width) → (batch, width, height / stride, width / stride)."""
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, of ResNet-50; the output is 4 `width` wide."""

    expansion = 4

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = shortcut(before, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, before, height, width) → (batch, 4 width, height / stride, width / stride)."""
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


def shortcut(before: int, after: int, stride: int) -> nn.Sequential | None:
    """A 1x1 convolution where a block changes the shape, or None where it does not."""
    if before == after and stride == 1:
        return None
    convolution = nn.Conv2d(before, after, 1, stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after))


class ResNet(nn.Module):
    """ResNet-18 or -50 of any width, without the label head, with torchvision's keys.

    With the usual width of 64, and images of more than 64 pixels, torchvision's weights load as
    they are. Smaller images lose only a factor 8 of their size, not 32: the first convolution is
    3x3 with stride 1, and there is no max-pooling. 32x32 images leave a map of 4x4.
    """

    def __init__(self, name: Literal["resnet18", "resnet50"], size: int, width: int) -> None:
        super().__init__()
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock
        counts = (2, 2, 2, 2)
        if name == "resnet50":
            block = Bottleneck
            counts = (3, 4, 6, 3)
        if size <= SMALL:
            self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        now = width
        for level, count in enumerate(counts):
            blocks = []
            for number in range(count):
                stride = 2 if level > 0 and number == 0 else 1
                blocks.append(block(now, width * 2**level, stride))
                now = width * 2**level * block.expansion
            self.add_module(f"layer{level + 1}", nn.Sequential(*blocks))
        self.channels = now
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stages(self) -> list[nn.Module]:
        """Five parts in order; the last one ends with the pooled features (batch, channels)."""
        first = nn.Sequential(self.conv1, self.bn1, nn.ReLU(), self.maxpool)
        layers = [self.get_submodule(f"layer{level}") for level in (1, 2, 3, 4)]
        last = nn.Sequential(layers[3], nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return [first, *layers[:3], last]


class EfficientNet(nn.Module):
    """timm's EfficientNet-Lite0 without its label head, with timm's keys."""

    def __init__(self) -> None:
        super().__init__()
        import timm  # takes seconds to import

        net: Any = timm.create_model("tf_efficientnet_lite0", num_classes=0)
        self.conv_stem = net.conv_stem
        self.bn1 = net.bn1
        self.blocks = net.blocks
        self.conv_head = net.conv_head
        self.bn2 = net.bn2
        self.global_pool = net.global_pool
        self.channels = 1280

    def stages(self) -> list[nn.Module]:
        """Seven parts in order; the last one ends with the pooled features (batch, 1280)."""
        first = nn.Sequential(self.conv_stem, self.bn1, self.blocks[0])
        last = nn.Sequential(self.blocks[6], self.conv_head, self.bn2, self.global_pool)
        return [first, *self.blocks[1:6], last]


def make_backbone(name: BackboneName, size: int, width: int) -> ResNet | EfficientNet:
    """A backbone for images of `size` pixels; `width` is that of a ResNet."""
    if name == "efficientnet_lite0":
        return EfficientNet()
    return ResNet(name, size, width)


class AdaptationNet(Network):
    """A backbone, a dense layer, a label head, and a domain classifier at one place.

    The first `frozen` stages of the backbone are never changed, and stay in eval mode: `lower` is
    their output, and `upper` does the rest.
    """

    def __init__(
        self,
        backbone: BackboneName = "resnet50",
        classes: int = 10,
        place: Place = "backbone",
        size: int = 32,
        width: int = 64,
        frozen: int = 0,
        dense: int = 256,
        hidden: int = 1024,
    ) -> None:
        """`dense` and `hidden` are the widths of the dense layer and of the domain classifier.

        `hidden` = 0 leaves the domain classifier out: only training needs it.

        Raises ValueError if no stage of the backbone is left to train.
        """
        super().__init__()
        self.config = {
            "net": "adaptation",
            "arguments": {
                "backbone": backbone,
                "classes": classes,
                "place": place,
                "size": size,
                "width": width,
                "frozen": frozen,
                "dense": dense,
                "hidden": hidden,
            },
        }
        self.place = place
        self.size = size
        self.frozen = frozen
        self.is_efficientnet = backbone == "efficientnet_lite0"
        self.backbone = make_backbone(backbone, size, width)
        stages = self.backbone.stages()
        if not 0 <= frozen < len(stages):
            raise ValueError(
                f"{backbone} has {len(stages)} stages; at most {len(stages) - 1} can be frozen"
            )
        for stage in stages[:frozen]:
            stage.requires_grad_(False)

        channels = self.backbone.channels
        self.dense = nn.Sequential(nn.Linear(channels, dense), nn.BatchNorm1d(dense), nn.ReLU())
        self.label = nn.Linear(dense, classes)
        # It comes last, so that the other parts start alike at every place.
        self.domain: nn.Module | None = None
        if place != "none" and hidden > 0:
            reads = {"backbone": channels, "dense": dense, "label": classes}
            self.domain = nn.Sequential(
                nn.Linear(reads[place], hidden),
                nn.BatchNorm1d(hidden),
                nn.ReLU(),
                nn.Linear(hidden, hidden),
                nn.BatchNorm1d(hidden),
                nn.ReLU(),
                nn.Linear(hidden, 1),
            )

    def train(self, mode: bool = True) -> AdaptationNet:
        """Set the mode of everything but the frozen stages."""
        super().train(mode)
        for stage in self.backbone.stages()[: self.frozen]:
            stage.eval()
        return self

    def lower(self, images: Tensor) -> Tensor:
        """Images (batch, 3, size, size) in [-1, 1] → the output of the frozen stages.

        With none frozen that is the image, normalised as the backbone's published weights expect.
        """
        if self.is_efficientnet:
            x = (127.5 * images + 0.5) / 128  # (pixels - 127) / 128
        else:
            mean = images.new_tensor(IMAGENET_MEAN).view(3, 1, 1)
            std = images.new_tensor(IMAGENET_STD).view(3, 1, 1)
            x = ((images + 1) / 2 - mean) / std
        for stage in self.backbone.stages()[: self.frozen]:
            x = stage(x)
        return x

    def upper(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output of `lower` → scores of the classes, and what the domain classifier reads.

        They are (batch, classes) and (batch, d). Without a domain classifier the second is the
        features of the backbone.
        """
        for stage in self.backbone.stages()[self.frozen :]:
            x = stage(x)
        dense = self.dense(x)
        scores = self.label(dense)
        if self.place == "dense":
            return scores, dense
        if self.place == "label":
            # Probabilities, not scores: scores can grow without bound, so that the network could
            # hide the domain by their scale alone. Their gradient goes through the label head.
            return scores, scores.softmax(1)
        return scores, x

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 3, size, size) in [-1, 1] → scores of the classes (batch, classes)."""
        scores, _ = self.upper(self.lower(images))
        return scores
