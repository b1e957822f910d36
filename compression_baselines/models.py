"""The networks of the compression table: wide ResNets for small images, and VGG with one linear layer ("nfc")."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

VGG_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # convolutions a stage
VGG_CHANNELS = (64, 128, 256, 512, 512)


class Add(nn.Module):
    """The sum of two branches of the same channels."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left + right


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalization. If shapes change, the shortcut is a 1x1 convolution with its own.

    The shortcut's input is subsampled by slicing instead of a stride of its convolution. The function is the same, but oneDNN's
    strided 1x1 convolution corrupts memory below 16 channels, which can remain after pruning (oneDNN issue 6035).
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.add: nn.Module = Add()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.add(self.bn2(self.conv2(out)), self.shortcut(x[:, :, :: self.stride, :: self.stride]))
        return F.relu(out, inplace=True)


class ResNet(nn.Module):
    """ResNet of depth 6n + 2 with stages of width, 2 width and 4 width channels.

    Width 64 is what the released code trains; 32 is what GraSP and the sparse-training papers call ResNet32.
    Shapes: input (N, 3, H, W), output (N, classes).
    """

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks, stride=1)
        self.layer2 = self._stage(width, 2 * width, blocks, stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, stride=2)
        self.linear = nn.Linear(4 * width, num_classes)
        kaiming_(self)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        rest = (BasicBlock(channels, channels, 1) for _ in range(blocks - 1))
        return nn.Sequential(BasicBlock(in_channels, channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class VGG(nn.Module):
    """VGG with batch normalization, global average pooling and a single linear layer.

    Shapes: input (N, 3, H, W) with H and W at least 32, output (N, classes).
    """

    def __init__(self, depth: int, num_classes: int, *, kaiming: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for count, out_channels in zip(VGG_STAGES[depth], VGG_CHANNELS, strict=True):
            if layers:
                layers.append(nn.MaxPool2d(2))
            for _ in range(count):
                layers += [nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)]
                layers.append(nn.ReLU(inplace=True))
                channels = out_channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        kaiming_(self)
        if not kaiming:
            nn.init.normal_(self.classifier.weight, std=0.01)
            nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < 32:
            raise ValueError(f"vgg halves its images five times and needs at least 32 pixels, got {min(x.shape[2:])}")
        return self.classifier(self.features(x).mean((2, 3)))


def kaiming_(model: nn.Module) -> None:
    """Kaiming normal initialization (fan in) of every convolution and linear layer."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)


def is_factorized(module: nn.Module, name: str) -> bool:
    """Whether the experiments factorize a layer: all convolutions except the first, but not the classifier."""
    return name not in ("conv1", "features.0", "linear", "classifier")
