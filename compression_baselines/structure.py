"""Builds networks from the architecture that their checkpoints store: dense, or pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from compression_baselines.config import CompressionConfig
from compression_baselines.models import VGG, Add, BasicBlock, ResNet

ARCHITECTURE = ("network", "depth", "width", "kaiming", "num_classes", "pruned")

Kept = Mapping[str, Sequence[int]]  # output channels that each convolution keeps, as the dense network numbers them
Sizes = Mapping[str, Sequence[int]]  # for each bottleneck: the numbers of its input and output directions


def architecture(config: CompressionConfig) -> dict[str, Any]:
    """The flags that describe the network, to be stored in checkpoints."""
    return {key: getattr(config, key, None) for key in ARCHITECTURE}


def build(architecture: Mapping[str, Any]) -> nn.Module:
    """The network with this network, depth, width, num_classes and kaiming, in its pruned shape unless ``pruned`` is None."""
    depth, classes, pruned = architecture["depth"], architecture["num_classes"], architecture["pruned"]
    if architecture["network"] == "vgg":
        model: nn.Module = VGG(depth, classes, kaiming=architecture["kaiming"])
    else:
        model = ResNet(depth, architecture["width"], classes)
    if pruned is not None:
        if pruned["kind"] == "channels":
            keep_channels_(model, pruned["kept"])
        else:
            bottleneck_(model, pruned["sizes"], separable=pruned["kind"] == "separable")
            if pruned["fix_rotation"]:
                fix_rotations_(model)
    return model


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Every convolution of a network, by name. A bottleneck counts as one: the convolution in its middle."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not isinstance(model.get_submodule(name.rpartition(".")[0]), Bottleneck):
            found[name] = module
        elif isinstance(module, Bottleneck):
            found[name] = cast(nn.Conv2d, module[1])
    return found


class UnionAdd(nn.Module):
    """The sum of two branches with different channels, over the union of their channels; absent ones count as zero.

    ``left`` and ``right`` are the positions (long, 1-d) of each branch's channels among the ``channels`` of the union. With it
    EigenDamage prunes the two branches of a residual block independently.
    """

    left: Tensor
    right: Tensor

    def __init__(self, left: Sequence[int], right: Sequence[int], channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("left", torch.tensor(left))
        self.register_buffer("right", torch.tensor(right))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        total = left.new_zeros(left.shape[0], self.channels, *left.shape[2:])
        return total.index_add(1, self.left, left).index_add(1, self.right, right.to(left.dtype))


def keep_channels_(model: nn.Module, kept: Kept, before: Kept | None = None) -> None:
    """Cut a ResNet or VGG, in place, to the given output channels of each convolution; adapt the layers that read them.

    ``before`` lists the current channels of a model that was cut before. After a residual block, the channels are the union of
    its branches' channels (:class:`UnionAdd`).
    """
    before = before or {name: range(conv.out_channels) for name, conv in convolutions(model).items()}

    def cut(conv: str, norm: str, inputs: Sequence[int], inputs_before: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        rows = _places(kept[conv], before[conv])
        donor = cast(nn.Conv2d, model.get_submodule(conv))
        model.set_submodule(conv, _cut_conv(donor, rows, _places(inputs, inputs_before)))
        model.set_submodule(norm, _cut_norm(cast(nn.BatchNorm2d, model.get_submodule(norm)), rows))
        return kept[conv], before[conv]

    stream: Sequence[int] = range(3)
    stream_before: Sequence[int] = range(3)
    if isinstance(model, VGG):
        for index, layer in enumerate(model.features):
            if isinstance(layer, nn.Conv2d):
                stream, stream_before = cut(f"features.{index}", f"features.{index + 1}", stream, stream_before)
        model.classifier = _cut_linear(model.classifier, _places(stream, stream_before))
        return
    assert isinstance(model, ResNet)
    stream, stream_before = cut("conv1", "bn1", stream, stream_before)
    for path, block in model.named_modules():
        if not isinstance(block, BasicBlock):
            continue
        middle, middle_before = cut(f"{path}.conv1", f"{path}.bn1", stream, stream_before)
        out, out_before = cut(f"{path}.conv2", f"{path}.bn2", middle, middle_before)
        if not isinstance(block.shortcut, nn.Identity):
            stream, stream_before = cut(f"{path}.shortcut.0", f"{path}.shortcut.1", stream, stream_before)
        union = sorted({*out, *stream})
        same = len(out) == len(stream) == len(union)
        block.add = Add() if same else UnionAdd(_places(out, union), _places(stream, union), len(union))
        block.add.to(model.linear.weight.device)
        stream, stream_before = union, sorted({*out_before, *stream_before})
    model.linear = _cut_linear(model.linear, _places(stream, stream_before))


def _places(wanted: Sequence[int], there: Sequence[int]) -> list[int]:
    place = {channel: index for index, channel in enumerate(there)}
    return [place[channel] for channel in wanted]


def _new_conv(like: nn.Conv2d, inputs: int, outputs: int, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias, with the geometry, device and dtype of another and channels of its own."""
    geometry: Any = (like.kernel_size, like.stride, like.padding, like.dilation)
    return nn.Conv2d(inputs, outputs, *geometry, groups, bias=False, device=like.weight.device, dtype=like.weight.dtype)


def _pointwise(like: nn.Conv2d, inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, bias=False, device=like.weight.device, dtype=like.weight.dtype)


def _cut_conv(conv: nn.Conv2d, rows: Sequence[int], columns: Sequence[int]) -> nn.Conv2d:
    made = _new_conv(conv, len(columns), len(rows))
    made.weight.data = conv.weight.data[rows][:, columns].clone()
    return made.train(conv.training)


def _cut_norm(norm: nn.BatchNorm2d, rows: Sequence[int]) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(len(rows), norm.eps, norm.momentum, device=norm.weight.device, dtype=norm.weight.dtype)
    for name, value in norm.state_dict().items():
        made.state_dict()[name].copy_(value[rows] if value.ndim else value)
    return made.train(norm.training)


def _cut_linear(linear: nn.Linear, columns: Sequence[int]) -> nn.Linear:
    weight = linear.weight
    made = nn.Linear(len(columns), linear.out_features, device=weight.device, dtype=weight.dtype)
    made.weight.data, made.bias.data = linear.weight.data[:, columns].clone(), linear.bias.data.clone()
    return made


class Bottleneck(nn.Sequential):
    """A convolution in a truncated eigenbasis: 1x1 into it, the small k x k in it (or a depthwise one), 1x1 out of it."""


def bottleneck(conv: nn.Conv2d, inputs: int, outputs: int, *, separable: bool) -> Bottleneck:
    """The layer that replaces a convolution. Its weights are yet to be set.

    It has ``inputs`` and ``outputs`` directions. If ``separable`` and the kernel is larger than 1x1, it has a depthwise
    convolution over the smaller of the two numbers.
    """
    groups = 1
    if separable and conv.kernel_size != (1, 1):
        groups = inputs = outputs = min(inputs, outputs)
    return Bottleneck(
        _pointwise(conv, conv.in_channels, inputs),
        _new_conv(conv, inputs, outputs, groups),
        _pointwise(conv, outputs, conv.out_channels),
    )


def bottleneck_(model: nn.Module, sizes: Sizes, *, separable: bool) -> None:
    """Replace convolutions, or larger bottlenecks, by bottlenecks of the given sizes, in place."""
    for name, (inputs, outputs) in sizes.items():
        donor = model.get_submodule(name)
        if isinstance(donor, Bottleneck):
            first, middle, last = (cast(nn.Conv2d, layer) for layer in donor)
            made = bottleneck(middle, inputs, outputs, separable=separable)
            made[0] = _pointwise(first, first.in_channels, inputs)
            made[2] = _pointwise(last, outputs, last.out_channels)
        else:
            made = bottleneck(cast(nn.Conv2d, donor), inputs, outputs, separable=separable)
        model.set_submodule(name, made)


def fix_rotations_(model: nn.Module) -> None:
    """Exclude the 1x1 convolutions of every bottleneck from training."""
    for module in model.modules():
        if isinstance(module, Bottleneck):
            module[0].requires_grad_(False)
            module[2].requires_grad_(False)
