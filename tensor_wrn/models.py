"""WideResNet (Zagoruyko & Komodakis 2016), pre-activation, with ordinary, factorized or tensor convolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tensor_wrn.layers import FORMS
from tensor_wrn.shapes import stage_channels


class BasicBlock(nn.Module):
    """Batch normalization and ReLU before each of two 3x3 convolutions; the shortcut is a 1x1 convolution if channels change.

    A convolutional shortcut starts after the first normalization and ReLU; the identity starts before them. The convolution's
    input is subsampled by slicing, because oneDNN's strided 1x1 convolution corrupts memory below 16 channels (oneDNN issue
    6035).
    """

    def __init__(self, in_channels: int, channels: int, stride: int, form: str, rank_scale: float, rule: str) -> None:
        super().__init__()
        self.stride = stride
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = convolution(in_channels, channels, stride, form, rank_scale, rule)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = convolution(channels, channels, 1, form, rank_scale, rule)
        self.shortcut: nn.Module | None = None
        if in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.bn1(x), inplace=True)
        out = self.conv2(F.relu(self.bn2(self.conv1(first)), inplace=True))
        return out + (x if self.shortcut is None else self.shortcut(first[:, :, :: self.stride, :: self.stride]))


def convolution(in_channels: int, channels: int, stride: int, form: str, rank_scale: float, rule: str) -> nn.Module:
    """A 3x3 convolution: an ordinary one for "Conv", otherwise the tensor form of that name, with shapes by ``rule``."""
    if form == "Conv":
        return nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
    return FORMS[form](in_channels, channels, 3, rank_scale, stride=stride, padding=1, rule=rule)


class WideResNet(nn.Module):
    """WideResNet of depth 6n + 4 with stages of 16, 32 and 64 times ``width`` channels.

    Shapes: input (N, 3, H, W), output (N, classes); with ``activations`` also the outputs of the three stages.
    """

    def __init__(
        self,
        depth: int,
        width: float,
        num_classes: int,
        form: str = "Conv",
        rank_scale: float = 1.0,
        rule: str = "released",
    ) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        channels = stage_channels(width)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        stages = []
        for stage, stride in enumerate((1, 2, 2)):
            kind = (form, rank_scale, rule)
            first = BasicBlock(channels[stage], channels[stage + 1], stride, *kind)
            rest = (BasicBlock(channels[stage + 1], channels[stage + 1], 1, *kind) for _ in range(blocks - 1))
            stages.append(nn.Sequential(first, *rest))
        self.block1, self.block2, self.block3 = stages
        self.bn1 = nn.BatchNorm2d(channels[-1])
        self.fc = nn.Linear(channels[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor, activations: bool = False) -> Any:
        first = self.block1(self.conv1(x))
        second = self.block2(first)
        third = self.block3(second)
        logits = self.fc(F.relu(self.bn1(third), inplace=True).mean((2, 3)))
        return (logits, [first, second, third]) if activations else logits


def build(architecture: Mapping[str, Any]) -> WideResNet:
    """The network with this depth, width, num_classes, form, rank_scale and tensor_shapes. Tensor cores have no values yet.

    An architecture without tensor_shapes, from before there were two rules, has the rule "nearest". Raises ValueError if a
    tensor form has no rank scale.
    """
    if architecture["form"] != "Conv" and architecture["rank_scale"] is None:
        raise ValueError(f"{architecture['form']} needs a rank scale: give --conv {architecture['form']}_R or --rank-scale")
    keys = ("depth", "width", "num_classes", "form", "rank_scale")
    return WideResNet(*(architecture[key] for key in keys), architecture.get("tensor_shapes", "nearest"))


def is_factorized(module: nn.Module, name: str) -> bool:
    """Whether a layer of the "Conv" form is factorized: every convolution except the first, shortcuts included."""
    return name not in ("conv1", "fc")
