"""Pruning of whole channels: C-OBD, C-OBS, Kron-OBD and Kron-OBS."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.budget import count_parameters
from compression_baselines.pruners import fisher, scores
from compression_baselines.pruners.select import Ranking
from compression_baselines.structure import Kept, convolutions, keep_channels_

SCORES = {"c-obs": scores.c_obs, "kron-obd": scores.kron_obd, "kron-obs": scores.kron_obs}  # of the weight, A and G
UPDATES = {"c-obs": scores.c_obs_update, "kron-obs": scores.kron_obs_update}  # of the weight, A, G and the removed channels

Curvature = Mapping[str, tuple[Tensor, ...]]  # for each layer: A and G, or only the diagonal of its Fisher


def curvature(model: nn.Module, method: str, images: DataLoader[Any], kind: str) -> Curvature:
    """The part of every convolution's Fisher that the method's scores need."""
    layers = convolutions(model)
    if method == "c-obd":
        return {name: (diagonal,) for name, diagonal in fisher.diagonal(model, layers, images, kind).items()}
    return fisher.kronecker(model, layers, images, kind)


def rank(model: nn.Module, method: str, found: Curvature, limit: float) -> Ranking:
    """The channels of all convolutions in order of importance."""
    importance = {}
    for name, conv in convolutions(model).items():
        weight = conv.weight.detach().double().flatten(1)
        if method == "c-obd":
            importance[name] = scores.c_obd(weight, found[name][0].flatten(1))
        else:
            importance[name] = SCORES[method](weight, *found[name])
    return Ranking(importance, limit)


def dense_numbers(kept: Kept, before: Kept | None) -> dict[str, list[int]]:
    """The dense network's numbers of a model's channels; ``before`` lists those that the model has (None: all)."""
    return {name: [before[name][index] for index in indices] if before else list(indices) for name, indices in kept.items()}


def count(model: nn.Module, kept: Kept, before: Kept | None) -> int:
    """Number of parameters of the model after it keeps only these of its current channels."""
    shape = copy.deepcopy(model)
    keep_channels_(shape, dense_numbers(kept, before), before)
    return count_parameters(shape)


@torch.no_grad()
def prune_(model: nn.Module, method: str, found: Curvature, kept: Kept, before: Kept | None) -> None:
    """Remove all channels except ``kept``, in place. The methods in ``UPDATES`` first let the remaining weights compensate.

    ``kept`` are numbers of the model's current channels; ``before`` lists their numbers in the dense network (None: all).
    """
    for name, conv in convolutions(model).items():
        removed = torch.ones(conv.out_channels, dtype=torch.bool, device=conv.weight.device)
        removed[list(kept[name])] = False
        if method in UPDATES and removed.any():
            weight = UPDATES[method](conv.weight.double().flatten(1), *found[name], removed)
            conv.weight.copy_(weight.view_as(conv.weight))
    keep_channels_(model, dense_numbers(kept, before), before)
