"""RigL: Evci et al. (ICML 2020)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compression_baselines.masks.base import Masks, RandomStart, Settings, top


def drop_and_grow(weight: Tensor, gradient: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mask without its ``count`` smallest weights, and the ``count`` places outside it with the largest gradients."""
    kept = mask & ~top(torch.where(mask, -weight.abs(), -torch.inf), count)
    return kept, top(torch.where(kept, -torch.inf, gradient.abs()), count)


def _keep_gradient(layer: nn.Module, args: Any, output: Any) -> None:
    weight = layer.weight
    if isinstance(weight, Tensor) and weight.requires_grad:
        weight.retain_grad()


class Rigl(RandomStart):
    """Starts from random masks. Replaces each layer's smallest weights by those outside its mask with the largest gradients.

    A step that changes the masks makes no update. The replaced share falls to zero like a cosine.
    """

    def __init__(self, masks: Masks, settings: Settings) -> None:
        super().__init__(masks, settings)
        for layer in masks.layers.values():  # the gradient of the masked weight is dense, that of the parameter is not
            layer.register_forward_hook(_keep_gradient)

    def fraction(self, step: int) -> float:
        """Share of a layer's weights that step ``step`` replaces."""
        assert self.settings.drop_fraction is not None
        return self.settings.drop_fraction / 2 * (1 + math.cos(math.pi * (step + 1) / self.settings.last_update))

    def before_update(self, step: int) -> None:
        if not self.settings.due(step):
            return
        for name, layer in self.masks.layers.items():
            weight, mask = layer.weight, self.masks.mask(name)
            assert isinstance(weight, Tensor)
            gradient = weight.grad
            assert gradient is not None
            if dist.is_initialized():
                dist.all_reduce(gradient)
            count = min(int(self.fraction(step) * int(mask.sum())), int((~mask).sum()))
            kept, grown = drop_and_grow(weight.detach(), gradient, mask, count)
            self.masks.assign({name: kept | grown})
        assert self.masks.optimizer is not None
        self.masks.optimizer.zero_grad()
