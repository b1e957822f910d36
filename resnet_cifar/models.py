"""ResNets for small images (He et al. 2016, section 4.2): depths 6n + 2, widths 16, 32, 64, shortcuts without weights."""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

from resnet_cifar.config import DEPTHS


class Downsample(nn.Module):
    """He et al.'s option A: every second row and column, and zeros for the new channels, half on either side."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        before = self.new_channels // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.new_channels - before))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalization around an identity shortcut; activations work in place."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity() if stride == 1 else Downsample(channels - in_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class ResNet(nn.Module):
    """Shapes: input (N, 3, H, W) with H and W at least 4, output (N, num_classes)."""

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        rest = (BasicBlock(channels, channels, 1) for _ in range(blocks - 1))
        return nn.Sequential(BasicBlock(in_channels, channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def build(arch: str, num_classes: int) -> ResNet:
    """The dense network of this name ("resnet20", ...)."""
    return ResNet(DEPTHS[arch], num_classes)


def is_factorized(module: nn.Module, name: str) -> bool:
    """Whether the experiments factorize a layer: both convolutions of every block, but not the stem or the classifier."""
    return re.fullmatch(r"layer\d\.\d+\.conv[12]", name) is not None
