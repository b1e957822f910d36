"""EigenDamage: pruning in the eigenbasis of each layer's Fisher, with or without a depthwise separable middle."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, cast

import tensorly
import torch
from tensorly.decomposition import parafac
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.budget import count_parameters
from compression_baselines.pruners import fisher, scores
from compression_baselines.pruners.select import Ranking
from compression_baselines.structure import Bottleneck, Sizes, bottleneck, bottleneck_, convolutions

Rotated = Mapping[str, tuple[Tensor, ...]]  # per layer: rotated kernel, Q_A, Q_G, scores of its input and output directions
Kept = Mapping[str, list[int]]  # directions to keep, under "<layer>/inputs" and "<layer>/outputs"


def rotate(model: nn.Module, images: DataLoader[Any], kind: str) -> Rotated:
    """Every convolution (of a bottleneck, the middle one) in the eigenbasis of its Fisher."""
    layers = convolutions(model)
    rotated = {}
    for name, (a, g) in fisher.kronecker(model, layers, images, kind).items():
        kernel = layers[name].weight.detach().double()
        rotated[name] = scores.eigendamage(kernel, scores.channel_factor(a, kernel.shape[1]), g)
    return rotated


def rank(rotated: Rotated, limit: float) -> Ranking:
    """Input and output directions of all layers in order of importance."""
    importance = {}
    for name, (_, _, _, inputs, outputs) in rotated.items():
        importance |= {f"{name}/inputs": inputs, f"{name}/outputs": outputs}
    return Ranking(importance, limit)


def sizes(model: nn.Module, kept: Kept, *, separable: bool) -> dict[str, tuple[int, int]]:
    """Numbers of input and output directions of the layers that become smaller as bottlenecks; others stay unchanged."""
    found = {}
    for name, conv in convolutions(model).items():
        inputs, outputs = len(kept[f"{name}/inputs"]), len(kept[f"{name}/outputs"])
        made = bottleneck(conv, inputs, outputs, separable=separable)
        donor = model.get_submodule(name)
        if isinstance(donor, Bottleneck) or count_parameters(made) < count_parameters(donor):
            found[name] = (inputs, outputs)
    return found


def count(model: nn.Module, chosen: Sizes, *, separable: bool) -> int:
    """Number of parameters of the model with bottlenecks of these sizes, rotations included."""
    shape = copy.deepcopy(model)
    bottleneck_(shape, chosen, separable=separable)
    return count_parameters(shape)


@torch.no_grad()
def prune_(model: nn.Module, rotated: Rotated, kept: Kept, chosen: Sizes, *, separable: bool) -> None:
    """Replace the ``chosen`` layers by truncated bottlenecks, in place.

    If a layer is already a bottleneck, its rotations are multiplied by the new ones. A separable middle is the canonical
    polyadic decomposition of the truncated kernel, with as many terms as its smaller side has directions.
    """
    donors = {name: model.get_submodule(name) for name in chosen}
    bottleneck_(model, chosen, separable=separable)
    for name, donor in donors.items():
        kernel, q_a, q_g, *_ = rotated[name]
        inputs, outputs = kept[f"{name}/inputs"], kept[f"{name}/outputs"]
        middle, into, out_of = kernel[outputs][:, inputs], q_a[:, inputs].mT, q_g[:, outputs]
        first, core, last = (cast(nn.Conv2d, layer) for layer in cast(Bottleneck, model.get_submodule(name)))
        if separable and core.kernel_size != (1, 1):
            into, middle, out_of = _separate(into, middle, out_of, core.out_channels)
        if isinstance(donor, Bottleneck):
            into = into @ cast(nn.Conv2d, donor[0]).weight.double().flatten(1)
            out_of = cast(nn.Conv2d, donor[2]).weight.double().flatten(1) @ out_of
        for layer, value in ((first, into), (core, middle), (last, out_of)):
            layer.weight.copy_(value.reshape(layer.weight.shape))


def _separate(into: Tensor, kernel: Tensor, out_of: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    with tensorly.backend_context("pytorch"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about more terms than a side has directions, which is intended
        weights, (u, v, s) = parafac(kernel.flatten(2), rank, init="svd", n_iter_max=200, random_state=0)
    return v.mT @ into, (s * weights).mT.reshape(rank, 1, *kernel.shape[2:]), out_of @ u
